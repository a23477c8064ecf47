"""One training loop for everything that is learned: steps, schedule, log, checkpoints.

Devices, mixed precision, several GPUs and accumulation are the business of ``accelerate``.
"""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from tokexport.errors import TokexportError, TrainingError, nearest
from tokexport.training.memory import keep_freed_memory
from tokexport.training.muon import Float32Muon
from tokexport.training.state import TrainingState, load_state, save_state

try:
    from accelerate import Accelerator
except ImportError as error:
    raise TrainingError(
        "training needs the packages accelerate and peft; install them with: pip install 'tokexport[train]'"
    ) from error

STATE_FILE, LOG_FILE = "state.safetensors", "log.jsonl"

Optimizer = Literal["adamw", "muon"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to learn.

    The learning rate rises linearly over the warm-up and falls as a cosine to a twentieth.

    Attributes:
        num_steps: optimizer steps.
        batch_size: examples a step and a process.
        accumulate: parts a batch is computed in, one after the other, to save memory.
        learning_rate: at its highest.
        optimizer: ``muon`` orthogonalises the updates of matrices, which takes fewer steps from random weights.
        warmup: share of the steps.
        weight_decay: of matrices; vectors have none.
        max_grad_norm: gradients are clipped to this norm.
        log_every: steps.
        save_minutes: between two checkpoints.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    optimizer: Optimizer = "adamw"
    accumulate: int = 1
    warmup: float = 0.03
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    log_every: int = 20
    save_minutes: float = 5.0

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.batch_size % self.accumulate:
            raise TrainingError(
                f"accumulate = {self.accumulate} must divide the batch size {self.batch_size}, so that all parts are "
                "alike"
            )
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise TrainingError(f"{name} = {getattr(self, name)} must be a number above 0")
        for name in ("warmup", "weight_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainingError(f"{name} = {getattr(self, name)} must be from 0 to 1")
        if self.optimizer not in get_args(Optimizer):
            raise TrainingError(
                f"there is no optimizer {self.optimizer!r}{nearest(self.optimizer, [*get_args(Optimizer)])}"
            )

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, as a share of the highest."""
        warmup = max(1, round(self.warmup * self.num_steps))
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, self.num_steps - warmup)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(kw_only=True)
class Listener:
    """Who is told how it goes.

    Attributes:
        tick: told the steps done and the steps of all.
        note: told a line for people now and then.
    """

    tick: Callable[[int, int], None] = field(default=lambda _done, _total: None)
    note: Callable[[str], None] = field(default=lambda _text: None)


def fit(
    objective: nn.Module,
    examples: "Dataset[Any]",
    schedule: Schedule,
    folder: Path,
    *,
    stage: str,
    settings: Mapping[str, Any],
    collate: Callable[[list[Any]], Any] | None = None,
    compiled: Sequence[nn.Module] = (),
    before_step: Callable[[int], None] = lambda _step: None,
    listener: Listener | None = None,
) -> None:
    """Train ``objective`` on ``examples`` in their order, going on where an earlier run stopped.

    Args:
        objective: takes a batch as keyword arguments, returns a loss and figures for the log.
        examples: one per place, at least as many as the schedule takes.
        schedule: how long and how fast.
        folder: where checkpoint and log are kept.
        stage: its name in the log.
        settings: everything else that makes this run what it is; a checkpoint is taken up only where it is the same.
        collate: makes a batch from examples.
        compiled: modules to compile, where a compiler is at hand.
        before_step: told the number of the step that follows.
        listener: told how it goes.

    Raises:
        TrainingError: a loss that is no number, too little memory, a checkpoint of another run or a full disk.
    """
    _make_folder(folder)
    listener = listener or Listener()
    accelerator = make_accelerator(schedule.accumulate)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    optimizers = _optimizers(objective, schedule)
    run = json.dumps({"stage": stage, **asdict(schedule), **settings}, sort_keys=True, default=str)
    objective.to(accelerator.device)
    state_path = folder / STATE_FILE
    state = load_state(state_path, run, objective, optimizers) or TrainingState(run=run, step=0, seconds=0.0)
    if state.step:
        listener.note(f"{stage}: going on after step {state.step} of {schedule.num_steps}")
    if state.step >= schedule.num_steps:
        return
    for module in compiled if can_compile(accelerator.device) else ():
        module.compile(dynamic=False)
    batches = _batches(examples, schedule, state.step, accelerator, collate)
    prepared, batches, *stepped = accelerator.prepare(objective, batches, *optimizers)
    clock, saved, meter = time.monotonic() - state.seconds, time.monotonic(), _Meter()
    prepared.train()
    # Closed, it ends the processes that make examples, also where the run was stopped.
    with contextlib.closing(iter(batches)) as stream:
        for step in range(state.step, schedule.num_steps):
            before_step(step)
            for group in (group for optimizer in stepped for group in optimizer.param_groups):
                group["lr"] = schedule.learning_rate * schedule.rate(step)
            with _explained(schedule):
                meter.add(*_step(prepared, stream, stepped, accelerator, schedule))
            meter.require_finite(stage, step)
            listener.tick(step + 1, schedule.num_steps)
            seconds = time.monotonic() - clock
            is_last = step + 1 == schedule.num_steps
            if accelerator.is_main_process and ((step + 1) % schedule.log_every == 0 or is_last):
                line = {"stage": stage, "step": step + 1, "seconds": round(seconds, 1), **meter.read()}
                line["learning_rate"] = schedule.learning_rate * schedule.rate(step)
                _append(folder / LOG_FILE, line)
                listener.note(", ".join(f"{key} {_short(value)}" for key, value in line.items()))
            if accelerator.is_main_process and (is_last or time.monotonic() - saved > 60 * schedule.save_minutes):
                state = TrainingState(run=run, step=step + 1, seconds=seconds)
                save_state(state_path, state, objective, optimizers)
                saved = time.monotonic()


def make_accelerator(accumulate: int = 1) -> "Accelerator":
    """Return the device and precision to train with: CUDA where there is one, bfloat16 where it is fast."""
    return Accelerator(
        mixed_precision="bf16" if has_fast_bfloat16() else "no",
        gradient_accumulation_steps=accumulate,
        cpu=not torch.cuda.is_available(),
    )


def has_fast_bfloat16() -> bool:
    """Whether the device to train with computes bfloat16 at least as fast as float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def attention_for(device: torch.device) -> str:
    """Return the attention of ``transformers`` that trains fastest.

    In bfloat16 on a CPU plain matrix products are: the backward pass of the fused attention makes a step of the
    mini model 1.7 times as long. In float32 the fused one takes 0.8 of their time.
    """
    return "eager" if device.type == "cpu" and has_fast_bfloat16() else "sdpa"


def can_compile(device: torch.device) -> bool:
    """Whether ``torch.compile`` has the compiler it needs."""
    return device.type == "cuda" or shutil.which("g++") is not None


def _step(
    module: Any,
    stream: Iterator[Mapping[str, Tensor]],
    optimizers: Sequence[Any],
    accelerator: "Accelerator",
    schedule: Schedule,
) -> tuple[Tensor, Mapping[str, Tensor], Tensor]:
    losses: list[Tensor] = []
    figures: Mapping[str, Tensor] = {}
    norm = torch.tensor(0.0)
    for _ in range(schedule.accumulate):
        with accelerator.accumulate(module):
            loss, figures = module(**next(stream))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(module.parameters(), schedule.max_grad_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
    return torch.stack(losses).mean(), figures, torch.as_tensor(norm)


class _Meter:
    """Averages figures between two lines of the log."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._count = 0
        self._last: dict[str, float] = {}

    def add(self, loss: Tensor, figures: Mapping[str, Tensor], norm: Tensor) -> None:
        self._last = {"loss": loss.item(), "grad_norm": norm.item(), **{k: v.item() for k, v in figures.items()}}
        for key, value in self._last.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        self._count += 1

    def require_finite(self, stage: str, step: int) -> None:
        wrong = [key for key in ("loss", "grad_norm") if not math.isfinite(self._last[key])]
        if wrong:
            raise TrainingError(
                f"stage {stage}, step {step + 1}: the {wrong[0]} is {self._last[wrong[0]]}; the last checkpoint is "
                "kept; start in another folder with a lower learning rate or smaller clipping"
            )

    def read(self) -> dict[str, float]:
        means = {key: round(total / self._count, 5) for key, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means


def _optimizers(module: nn.Module, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Return AdamW for everything, or Muon for the matrices of transformer layers and AdamW for the rest."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    with_muon = {name for name, p in named if schedule.optimizer == "muon" and p.ndim == 2 and ".layers." in name}
    groups = [
        {
            "params": [p for name, p in named if p.ndim > 1 and name not in with_muon],
            "weight_decay": schedule.weight_decay,
        },
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98), fused=True)
    ]
    if with_muon:
        matrices = [p for name, p in named if name in with_muon]
        # Updates as large as AdamW's, so that one learning rate suits both.
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=schedule.learning_rate,
                weight_decay=schedule.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
            if has_fast_bfloat16()
            else Float32Muon(matrices, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
        )
    return optimizers


def _batches(
    examples: "Dataset[Any]",
    schedule: Schedule,
    first_step: int,
    accelerator: "Accelerator",
    collate: Callable[[list[Any]], Any] | None,
) -> "DataLoader[Any]":
    per_step = schedule.batch_size * accelerator.num_processes
    places = range(first_step * per_step, schedule.num_steps * per_step)
    return DataLoader(
        Subset(examples, places),
        batch_size=schedule.batch_size // schedule.accumulate,
        num_workers=1 if accelerator.device.type == "cpu" else 8,
        collate_fn=collate,
        prefetch_factor=4,
        pin_memory=accelerator.device.type == "cuda",
    )


class _explained:  # noqa: N801 - reads as a word where it is used
    """Turn what PyTorch says when memory runs out, or an example cannot be made, into what to do about it."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or (
            isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
        )
        if is_memory:
            raise TrainingError(f"there is not enough memory for {_advice(self._schedule)}") from error
        if isinstance(error, TokexportError):
            # From the process that makes examples, PyTorch hands on a whole traceback, its last line the error.
            last_line = str(error).rstrip().rpartition("\n")[2]
            raise type(error)(
                last_line.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
            ) from None


def _advice(schedule: Schedule) -> str:
    at_once = schedule.batch_size // schedule.accumulate
    if at_once == 1:
        return "a single example; take gradient checkpointing, a smaller model or a machine with more"
    parts = next(n for n in range(schedule.accumulate + 1, schedule.batch_size + 1) if schedule.batch_size % n == 0)
    return (
        f"{at_once} examples at once; try a batch size of {at_once // 2 * schedule.accumulate}, or "
        f"accumulate = {parts} for nearly the same result"
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{folder} cannot be made ({error.strerror}); choose another folder") from error


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
