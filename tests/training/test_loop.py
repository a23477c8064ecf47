"""The training loop: it goes on where it stopped, says what went wrong, and keeps a log."""

import json
import math
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from tokexport.errors import InputError, TrainingError
from tokexport.training.loop import LOG_FILE, STATE_FILE, Listener, Schedule, fit
from tokexport.training.memory import keep_freed_memory

WIDTH = 4


class Points(Dataset[dict[str, Tensor]]):
    """Random vectors and their numbers; those of ``damaged`` hold no numbers."""

    def __init__(self, damaged: tuple[int, ...] = ()) -> None:
        self._damaged = damaged

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x_C = torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))
        return {"x": x_C * math.nan if index in self._damaged else x_C, "place": torch.tensor(float(index))}


class UnreadablePoints(Points):
    """Cannot make its third example."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index != 2:
            return super().__getitem__(index)
        try:
            raise OSError("broken")
        except OSError as error:
            raise InputError("2.png cannot be read as an image; replace it") from error


class Decoder(nn.Module):
    """Two layers, named as those of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Identity(nn.Module):
    """Learns to return what it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decoder = Decoder()
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, place: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        return (self.head(self.decoder(x)).float() - x).square().mean(), {"place": place.mean()}


class StoppedError(Exception):
    """Ends a run from outside."""


def stop_before(step: int) -> Callable[[int], None]:
    def before_step(number: int) -> None:
        if number == step:
            raise StoppedError

    return before_step


def schedule(**changes: Any) -> Schedule:
    """Return 6 steps of 4 examples, each with a checkpoint."""
    return Schedule(**{"num_steps": 6, "batch_size": 4, "learning_rate": 0.01, "save_minutes": 0.0, **changes})


def run(folder: Path, objective: nn.Module, chosen: Schedule | None = None, **options: Any) -> None:
    examples = options.pop("examples", Points())
    fit(
        objective,
        examples,
        chosen or schedule(),
        folder,
        stage="see",
        **{"settings": {"seed": 0}, **options},
    )


def parameters(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]


def test_training_makes_the_loss_smaller(tmp_path: Path):
    run(tmp_path, Identity(), schedule(num_steps=30, learning_rate=0.1, log_every=1, save_minutes=5.0))
    lines = log_of(tmp_path)
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]


@pytest.mark.parametrize(
    ("optimizer", "save_minutes"),
    [("adamw", 0.0), ("muon", 0.0), ("adamw", 5.0)],
    ids=["adamw", "muon", "no checkpoint yet"],
)
def test_a_run_that_was_stopped_ends_like_one_that_was_not(tmp_path: Path, optimizer: Any, save_minutes: float):
    chosen = schedule(optimizer=optimizer, save_minutes=save_minutes)
    through, stopped = Identity(), Identity()
    run(tmp_path / "through", through, chosen)
    with pytest.raises(StoppedError):
        run(tmp_path / "stopped", stopped, chosen, before_step=stop_before(4))
    resumed = Identity()
    run(tmp_path / "stopped", resumed, chosen)
    assert torch.equal(parameters(resumed), parameters(through))
    assert not torch.equal(parameters(stopped), parameters(through))


def test_a_run_that_was_stopped_makes_only_the_steps_that_are_missing(tmp_path: Path):
    with pytest.raises(StoppedError):
        run(tmp_path, Identity(), before_step=stop_before(4))
    steps: list[int] = []
    notes: list[str] = []
    run(tmp_path, Identity(), before_step=steps.append, listener=Listener(note=notes.append))
    assert steps == [4, 5]
    assert notes[0] == "see: going on after step 4 of 6"


def test_a_run_that_was_stopped_by_its_listener_goes_on_too(tmp_path: Path):
    def tick(done: int, _total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", Identity(), listener=Listener(tick=tick))
    through, resumed = Identity(), Identity()
    run(tmp_path / "through", through)
    run(tmp_path / "stopped", resumed)
    assert torch.equal(parameters(resumed), parameters(through))


def test_a_run_that_is_done_is_read_back(tmp_path: Path):
    first, again = Identity(), Identity()
    run(tmp_path, first)
    run(tmp_path, again, before_step=stop_before(0))
    assert torch.equal(parameters(again), parameters(first))


@pytest.mark.parametrize(
    ("chosen", "settings", "difference"),
    [
        (schedule(), {"seed": 1}, "seed was 0, is 1"),
        (schedule(batch_size=8), {"seed": 0}, "batch_size was 4, is 8"),
    ],
    ids=["settings", "schedule"],
)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, chosen: Schedule, settings: dict[str, Any], difference: str
):
    with pytest.raises(StoppedError):
        run(tmp_path, Identity(), before_step=stop_before(1))
    with pytest.raises(TrainingError) as caught:
        run(tmp_path, Identity(), chosen, settings=settings)
    assert f"state.safetensors belongs to another run ({difference}); " in str(caught.value)


def test_the_listener_hears_of_every_step(tmp_path: Path):
    ticks: list[tuple[int, int]] = []
    run(tmp_path, Identity(), schedule(num_steps=3), listener=Listener(tick=lambda *tick: ticks.append(tick)))
    assert ticks == [(1, 3), (2, 3), (3, 3)]


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path):
    # Places 8 to 11 are in the third step.
    with pytest.raises(TrainingError) as caught:
        run(tmp_path, Identity(), examples=Points(damaged=(10,)))
    assert str(caught.value) == (
        "stage see, step 3: the loss is nan; the last checkpoint is kept; start in another folder with a lower "
        "learning rate or smaller clipping"
    )
    tensors = load_file(tmp_path / STATE_FILE)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert tensors["optimizer.step.head.bias"] == 2


class EndlessSlope(Identity):
    """Has a finite loss with an infinite gradient."""

    def forward(self, x: Tensor, place: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        return (self.head(x).float() * 0).abs().sum().sqrt() * 1e30, {}


def test_a_gradient_that_is_no_number_stops_the_run(tmp_path: Path):
    with pytest.raises(TrainingError, match=r"^stage see, step 1: the grad_norm is nan; "):
        run(tmp_path, EndlessSlope())
    assert not (tmp_path / STATE_FILE).exists()


class Greedy(Identity):
    """Takes more memory than any machine has."""

    def forward(self, x: Tensor, place: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        return torch.empty(1 << 56).sum(), {}


class Starved(Identity):
    """Runs into the limit that Python itself tells of."""

    def forward(self, x: Tensor, place: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        raise MemoryError


@pytest.mark.parametrize("objective", [Greedy, Starved])
@pytest.mark.parametrize(
    ("batch_size", "accumulate", "text"),
    [
        (8, 1, "8 examples at once; try a batch size of 4, or accumulate = 2 for nearly the same result"),
        (8, 2, "4 examples at once; try a batch size of 4, or accumulate = 4 for nearly the same result"),
        (6, 2, "3 examples at once; try a batch size of 2, or accumulate = 3 for nearly the same result"),
        (4, 4, "a single example; take gradient checkpointing, a smaller model or a machine with more"),
    ],
)
def test_too_little_memory_becomes_advice(
    tmp_path: Path, objective: type[nn.Module], batch_size: int, accumulate: int, text: str
):
    with pytest.raises(TrainingError) as caught:
        run(tmp_path, objective(), schedule(batch_size=batch_size, accumulate=accumulate))
    assert str(caught.value) == f"there is not enough memory for {text}"


def test_other_errors_stay_what_they_are(tmp_path: Path):
    class Broken(Identity):
        def forward(self, x: Tensor, place: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match=r"^broken$"):
        run(tmp_path, Broken())


def test_an_example_that_cannot_be_made_is_told_in_its_own_words(tmp_path: Path):
    # Examples are made in another process.
    with pytest.raises(InputError, match=r"^2\.png cannot be read as an image; replace it$"):
        run(tmp_path, Identity(), schedule(batch_size=1), examples=UnreadablePoints())


@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_batch_in_parts_teaches_what_the_whole_batch_teaches(tmp_path: Path, accumulate: int):
    run(tmp_path / "whole", Identity(), schedule(log_every=1))
    run(tmp_path / "parts", Identity(), schedule(log_every=1, accumulate=accumulate))
    # In bfloat16, which some processors compute in, the gradients of parts are rounded one by one.
    for whole, parts in zip(log_of(tmp_path / "whole"), log_of(tmp_path / "parts"), strict=True):
        for figure in ("loss", "grad_norm"):
            assert parts[figure] == pytest.approx(whole[figure], rel=0.02)


def test_the_log_has_a_line_every_so_many_steps_and_one_at_the_end(tmp_path: Path):
    run(tmp_path, Identity(), schedule(num_steps=5, log_every=2))
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert {line["stage"] for line in lines} == {"see"}
    for line in lines:
        assert list(line) == ["stage", "step", "seconds", "loss", "grad_norm", "place", "learning_rate"]


def test_figures_in_the_log_are_means_since_the_line_before(tmp_path: Path):
    run(tmp_path, Identity(), schedule(num_steps=5, log_every=2))
    # Places 0 to 7, 8 to 15 and 16 to 19.
    assert [line["place"] for line in log_of(tmp_path)] == [3.5, 11.5, 17.5]


def test_the_learning_rate_in_the_log_is_that_of_the_step(tmp_path: Path):
    chosen = schedule(num_steps=4, log_every=1, warmup=0.5, learning_rate=0.2)
    run(tmp_path, Identity(), chosen)
    assert [line["learning_rate"] for line in log_of(tmp_path)] == pytest.approx([0.1, 0.2, 0.2, 0.2 * 0.525])


def test_a_learning_rate_near_zero_changes_next_to_nothing(tmp_path: Path):
    slow = Identity()
    run(tmp_path, slow, schedule(learning_rate=1e-12))
    assert torch.allclose(parameters(slow), parameters(Identity()), atol=1e-9)


def test_muon_is_for_matrices_of_layers_alone(tmp_path: Path):
    run(tmp_path, Identity(), schedule(num_steps=1, optimizer="muon"))
    names = load_file(tmp_path / STATE_FILE).keys()
    assert {name for name in names if name.startswith("optimizer.momentum_buffer")} == {
        "optimizer.momentum_buffer.decoder.layers.0.weight",
        "optimizer.momentum_buffer.decoder.layers.1.weight",
    }


def test_what_requires_no_gradient_stays_as_it_is(tmp_path: Path):
    objective = Identity()
    objective.head.requires_grad_(False)
    run(tmp_path, objective)
    assert torch.equal(objective.head.weight, Identity().head.weight)
    assert not torch.equal(parameters(objective.decoder), parameters(Identity().decoder))


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.5), (1, 1.0), (2, 1.0), (6, 0.525), (10, 0.05)], ids=lambda value: str(value)
)
def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine(step: int, rate: float):
    chosen = Schedule(num_steps=10, batch_size=1, learning_rate=0.1, warmup=0.2)
    assert chosen.rate(step) == pytest.approx(rate)


def test_the_first_of_few_steps_has_the_full_learning_rate():
    assert Schedule(num_steps=1, batch_size=1, learning_rate=0.1).rate(0) == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_steps": 0}, "num_steps = 0 must be at least 1"),
        ({"batch_size": -1}, "batch_size = -1 must be at least 1"),
        ({"accumulate": 0}, "accumulate = 0 must be at least 1"),
        ({"log_every": 0}, "log_every = 0 must be at least 1"),
        (
            {"batch_size": 8, "accumulate": 3},
            "accumulate = 3 must divide the batch size 8, so that all parts are alike",
        ),
        ({"learning_rate": 0.0}, "learning_rate = 0.0 must be a number above 0"),
        ({"learning_rate": math.nan}, "learning_rate = nan must be a number above 0"),
        ({"learning_rate": math.inf}, "learning_rate = inf must be a number above 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm = 0.0 must be a number above 0"),
        ({"warmup": 1.5}, "warmup = 1.5 must be from 0 to 1"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1 must be from 0 to 1"),
        ({"optimizer": "adam"}, "there is no optimizer 'adam'; did you mean 'adamw'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_schedule_that_makes_no_sense_is_refused(changes: dict[str, Any], text: str):
    with pytest.raises(TrainingError) as caught:
        schedule(**changes)
    assert str(caught.value) == text


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked to keep freed memory")
def test_glibc_agrees_to_keep_freed_memory():
    assert keep_freed_memory()
