"""What training needs to go on after it was stopped: one safetensors file, replaced as a whole."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from tokexport.errors import TrainingError

_OPTIMIZER = "optimizer."


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Where a run stands.

    Attributes:
        run: what is trained how, in words that another run does not share.
        step: optimizer steps done.
        seconds: that they took.
    """

    run: str
    step: int
    seconds: float


def save_state(path: Path, state: TrainingState, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Write the trained parameters and what the optimizers remember of each."""
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in _trained(module)}
    for name, parameter in _trained(module):
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{_OPTIMIZER}{key}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    partial = path.with_suffix(".partial")
    header = {"run": state.run, "step": str(state.step), "seconds": f"{state.seconds:.1f}"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata=header)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise TrainingError(f"{path} cannot be written ({error}); free some room or choose another folder") from error


def load_state(path: Path, run: str, module: nn.Module, optimizers: Sequence[Optimizer]) -> TrainingState | None:
    """Read back what ``save_state`` wrote, None where there is nothing.

    Raises:
        TrainingError: the file is damaged or of another run.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            header: dict[str, str] = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = TrainingState(run=header["run"], step=int(header["step"]), seconds=float(header["seconds"]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise TrainingError(f"{path} cannot be read ({error}); delete it to start again") from error
    if state.run != run:
        raise TrainingError(
            f"{path} belongs to another run ({_difference(state.run, run)}); give the options it was started with, "
            "another folder, or delete it to start again"
        )
    trained = dict(_trained(module))
    for name, parameter in trained.items():
        if name not in tensors or tensors[name].shape != parameter.shape:
            raise TrainingError(
                f"{path} cannot be read ({name} is missing or of another shape); delete it to start again"
            )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
    for optimizer in optimizers:
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in trained.items():
            if parameter in held:
                optimizer.state[parameter] = _memory(tensors, name, parameter.device)
    return state


def _memory(tensors: Mapping[str, Tensor], name: str, device: torch.device) -> dict[str, Tensor]:
    """Return what an optimizer remembered of a parameter; the number of steps stays on the CPU."""
    keys = {key.removeprefix(_OPTIMIZER).partition(".")[0] for key in tensors if key.startswith(_OPTIMIZER)}
    found = {key: tensors[place] for key in keys if (place := f"{_OPTIMIZER}{key}.{name}") in tensors}
    return {key: tensor if key == "step" else tensor.to(device) for key, tensor in found.items()}


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def _difference(stored: str, wanted: str) -> str:
    """Say in which settings two runs differ."""
    try:
        before, now = json.loads(stored), json.loads(wanted)
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return ", ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in keys)
    except (ValueError, AttributeError):
        return f"{stored[:60]!r}"
