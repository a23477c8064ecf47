"""Reading weights tensor by tensor, whatever their names, and making random ones.

Every source gives the same view: canonical names (those of ``transformers`` today), shapes, and a
tensor on demand, so that a checkpoint never has to fit into memory.
"""

import json
import math
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokexport.errors import CheckpointError

Rename = Callable[[str], str | None]
Shapes = Mapping[str, tuple[int, ...]]


class Weights(ABC):
    """A set of named tensors that are read on demand."""

    @property
    @abstractmethod
    def shapes(self) -> Shapes:
        """The shape of every tensor, by canonical name."""

    @abstractmethod
    def load(self, name: str) -> Tensor:
        """Return one tensor in the precision it is stored in."""


class SafetensorsWeights(Weights):
    """The weights of a checkpoint directory: one ``model.safetensors`` or shards with an index.

    Raises:
        CheckpointError: no weights, missing or truncated shards, or two tensors of one canonical name.
    """

    def __init__(self, directory: Path, rename: Rename) -> None:
        self._stored: dict[str, tuple[Path, str]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in _shard_paths(directory):
            handle = _open_shard(path)
            for stored_name in sorted(handle.keys()):
                name = rename(stored_name)
                if name is None:
                    continue
                if name in self._stored:
                    raise CheckpointError(
                        f"{directory} holds two tensors for {name}: {self._stored[name][1]} and "
                        f"{stored_name}; keep one of them"
                    )
                self._stored[name] = (path, stored_name)
                self._shapes[name] = tuple(handle.get_slice(stored_name).get_shape())

    @property
    def shapes(self) -> Shapes:
        return self._shapes

    def load(self, name: str) -> Tensor:
        path, stored_name = self._stored[name]
        # Opened anew for each tensor: pages of a file that stays mapped would add up to all of it.
        with _open_shard(path) as handle:
            try:
                tensor = handle.get_tensor(stored_name)
            except SafetensorError:
                tensor = None
        if tensor is None or tuple(tensor.shape) != self._shapes[name]:
            raise CheckpointError(f"{path} changed while it was read: {stored_name} is another; start again")
        return tensor


class RandomWeights(Weights):
    """Seeded random weights of the given shapes; the same on every machine.

    Matrices are scaled by 1 / sqrt(inputs), norms are one, so that activations neither vanish nor
    explode however deep the model is.
    """

    def __init__(self, shapes: Shapes, seed: int) -> None:
        self._shapes, self._seed = dict(shapes), seed

    @property
    def shapes(self) -> Shapes:
        return self._shapes

    def load(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if "norm" in name:
            return torch.ones(shape) if name.endswith(".weight") else torch.zeros(shape)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        is_table = "embed_tokens" in name or len(shape) < 2
        scale = 2.0 if is_table else 1 / math.sqrt(math.prod(shape[1:]))
        if name.endswith(".bias"):
            scale = 0.02
        return torch.randn(shape, generator=generator) * scale


@dataclass(frozen=True)
class AdapterWeights(Weights):
    """Weights with a LoRA adapter (arXiv 2106.09685) added: W + scaling * B A, one tensor at a time.

    PEFT merges into a model that is loaded as a whole; this merges into a stream.
    """

    base: Weights
    pairs: Mapping[str, tuple[Tensor, Tensor, float]] = field(repr=False)

    @property
    def shapes(self) -> Shapes:
        return self.base.shapes

    def load(self, name: str) -> Tensor:
        weight = self.base.load(name)
        if name not in self.pairs:
            return weight
        down_RI, up_OR, scaling = self.pairs[name]
        return (weight.float() + scaling * (up_OR.float() @ down_RI.float())).to(weight.dtype)


@dataclass(frozen=True)
class AddedWeights(Weights):
    """Weights and what was learned beside them, which is in memory."""

    base: Weights
    added: Mapping[str, Tensor] = field(repr=False)

    @property
    def shapes(self) -> Shapes:
        return {**self.base.shapes, **{name: tuple(tensor.shape) for name, tensor in self.added.items()}}

    def load(self, name: str) -> Tensor:
        return self.added[name] if name in self.added else self.base.load(name)


class HeldWeights(Weights):
    """Weights that stay in memory once they are read, for models that differ in little else.

    Args:
        base: where they are read.
        dtype: the precision they are held in.
        device: where they are held.
    """

    def __init__(self, base: Weights, dtype: torch.dtype, device: torch.device) -> None:
        self._base, self._dtype, self._device = base, dtype, device
        self._held: dict[str, Tensor] = {}

    @property
    def shapes(self) -> Shapes:
        return self._base.shapes

    def load(self, name: str) -> Tensor:
        """Return the one tensor of that name, which nobody may change."""
        if name not in self._held:
            self._held[name] = self._base.load(name).to(self._device, self._dtype)
        return self._held[name]


@dataclass(frozen=True)
class TiedWeights(Weights):
    """Weights in which the head is the token embedding."""

    base: Weights
    head: str
    embedding: str

    @property
    def shapes(self) -> Shapes:
        return {**self.base.shapes, self.head: self.base.shapes[self.embedding]}

    def load(self, name: str) -> Tensor:
        return self.base.load(self.embedding if name == self.head else name)


def converted(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a weight in another precision.

    Raises:
        CheckpointError: it holds what is no number, or more than ``dtype`` can hold.
    """
    result = tensor.to(dtype)
    if not tensor.numel() or all(bound.isfinite() for bound in result.aminmax()):
        return result
    largest = tensor.abs().max().item()
    if not math.isfinite(largest):
        count = int((~tensor.isfinite()).sum())
        raise CheckpointError(
            f"{name} has {count:,} of {tensor.numel():,} values that are no finite numbers; fetch or train the "
            "checkpoint again"
        )
    precision = str(dtype).removeprefix("torch.")
    raise CheckpointError(
        f"{name} reaches {largest:.3g}, and {precision} holds at most {torch.finfo(dtype).max:,.0f}; choose "
        "--dtype bfloat16 or float32"
    )


def merge_adapter(base: Weights, directory: Path, rename: Rename) -> AdapterWeights:
    """Return ``base`` with the LoRA adapter of ``directory`` (PEFT format) merged in.

    Raises:
        CheckpointError: not a plain LoRA adapter, or one that does not fit the model.
    """
    config = _read_json(directory / "adapter_config.json", f"{directory} is no PEFT adapter directory")
    _require_plain_lora(config, directory)
    handle = _open_shard(_adapter_path(directory))
    halves: dict[str, dict[str, Tensor]] = {}
    for stored_name in sorted(handle.keys()):
        module, separator, half = stored_name.removeprefix("base_model.model.").rpartition(".lora_")
        half = half.removesuffix(".weight")
        if not separator or half not in ("A", "B"):
            raise CheckpointError(
                f"adapter {directory} holds {stored_name}, which is no lora_A or lora_B weight; only "
                "plain LoRA adapters can be merged"
            )
        halves.setdefault(module, {})[half] = handle.get_tensor(stored_name)
    pairs: dict[str, tuple[Tensor, Tensor, float]] = {}
    for module, pair in halves.items():
        name = rename(f"{module}.weight") or module
        pairs[name] = (*_checked_pair(base, directory, module, name, pair), _scaling(config, module, pair))
    return AdapterWeights(base, pairs)


def check_shapes(weights: Weights, expected: Shapes, source: str) -> None:
    """Compare the tensors of a checkpoint with those the model has.

    Raises:
        CheckpointError: tensors are missing, left over or of another shape; the text names them.
    """
    found = weights.shapes
    missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected]
    wrong = [
        f"{name} is {_shape(found[name])}, expected {_shape(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    faults = [
        f"{len(names)} {kind}: {_listing(names)}"
        for kind, names in (("missing", missing), ("not known to the model", surplus), ("of the wrong shape", wrong))
        if names
    ]
    if faults:
        raise CheckpointError(f"the weights of {source} do not fit its config.json: {'; '.join(faults)}")


# Options of PEFT that make an adapter something else than W + scaling * B A.
_OTHER_LORA = (
    "use_dora",
    "fan_in_fan_out",
    "modules_to_save",
    "use_qalora",
    "lora_bias",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "arrow_config",
)
# Starts that leave the weights below the adapter as they were.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def _require_plain_lora(config: Mapping[str, Any], directory: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"adapter {directory} is of type {config.get('peft_type')!r}, expected LORA")
    for option in _OTHER_LORA:
        if config.get(option):
            raise CheckpointError(
                f"adapter {directory} sets {option} = {config[option]}, which cannot be merged; merge it "
                "with PEFT and export the result"
            )
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise CheckpointError(
            f"adapter {directory} was started with init_lora_weights = {config['init_lora_weights']!r}, which changes "
            "the weights below it; merge it with PEFT and export the result"
        )
    if config.get("bias", "none") != "none":
        raise CheckpointError(
            f'adapter {directory} trains biases (bias = "{config["bias"]}"); merge it with PEFT and export the result'
        )


def _checked_pair(
    base: Weights, directory: Path, module: str, name: str, pair: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    if name not in base.shapes:
        raise CheckpointError(
            f"adapter {directory} changes {module}, which the model does not have; it was trained for another model"
        )
    if set(pair) != {"A", "B"}:
        raise CheckpointError(f"adapter {directory} has only half of the LoRA pair of {module}; fetch it again")
    made = (pair["B"].shape[0], pair["A"].shape[1])
    if pair["A"].shape[0] != pair["B"].shape[1]:
        raise CheckpointError(
            f"adapter {directory} has lora_A of rank {pair['A'].shape[0]} and lora_B of rank {pair['B'].shape[1]} for "
            f"{module}; fetch it again"
        )
    if made != base.shapes[name]:
        raise CheckpointError(
            f"adapter {directory} makes {_shape(made)} for {name}, expected {_shape(base.shapes[name])}; "
            "it was trained for another model"
        )
    return pair["A"], pair["B"]


def _scaling(config: Mapping[str, Any], module: str, pair: Mapping[str, Tensor]) -> float:
    # PEFT's own rule: a key is a regular expression for the end of a module's name, from a dot on.
    patterns = config.get("alpha_pattern") or {}
    matching = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    alpha = next(matching, config.get("lora_alpha", 8))  # PEFT's default
    rank = pair["A"].shape[0]
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _shard_paths(directory: Path) -> list[Path]:
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        weight_map = _read_json(index, f"{index} is damaged").get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} is damaged: it has no weight_map; fetch it again")
        names = sorted({str(name) for name in weight_map.values()})
        missing = [name for name in names if not (directory / name).is_file()]
        if missing or not names:
            raise CheckpointError(
                f"{directory} lacks {len(missing)} of the {len(names)} shards in its index: "
                f"{_listing(missing)}; fetch them again"
            )
        return [directory / name for name in names]
    if single.is_file():
        return [single]
    if any(directory.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{directory} holds pickled weights (pytorch_model.bin), which are not read; save it again "
            "with safe_serialization=True"
        )
    raise CheckpointError(
        f"{directory} holds no model.safetensors and no model.safetensors.index.json; give a complete "
        "checkpoint, or use --weights random"
    )


def _adapter_path(directory: Path) -> Path:
    path = directory / "adapter_model.safetensors"
    if not path.is_file() and (directory / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"adapter {directory} holds adapter_model.bin, a pickle, which is not read because it can run code; load "
            "it with peft and save it again: save_pretrained(DIR, safe_serialization=True)"
        )
    return path


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; fetch it again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or truncated ({path.stat().st_size:,} bytes: {error}); fetch it again"
        ) from error


def _read_json(path: Path, problem: str) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{problem}: {path.name} cannot be read ({error})") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{problem}: {path.name} holds no JSON object")
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"


def _listing(names: list[str], limit: int = 5) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
