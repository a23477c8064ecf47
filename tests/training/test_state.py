"""A checkpoint gives back exactly what was trained, or is refused."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from tokexport.errors import TrainingError
from tokexport.training.state import TrainingState, load_state, save_state

RUN = json.dumps({"stage": "see", "batch_size": 4, "seed": 0})


def module(seed: int = 0) -> nn.Sequential:
    """Return two layers, the bias of the second frozen."""
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    frozen_bias(made).requires_grad_(False)
    return made


def frozen_bias(made: nn.Sequential) -> nn.Parameter:
    return made.get_parameter("1.bias")


def adamw(trained: nn.Sequential) -> list[Optimizer]:
    return [AdamW((p for p in trained.parameters() if p.requires_grad), lr=0.1)]


def muon_and_adamw(trained: nn.Sequential) -> list[Optimizer]:
    others = [trained.get_parameter(name) for name in ("0.bias", "1.weight")]
    return [AdamW(others, lr=0.1), Muon([trained.get_parameter("0.weight")], lr=0.1)]


MakeOptimizers = Callable[[nn.Sequential], list[Optimizer]]


def train(trained: nn.Sequential, optimizers: list[Optimizer], *, first: int, last: int) -> None:
    for step in range(first, last):
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        trained(inputs).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Return the checkpoint of two steps."""
    trained = module()
    optimizers = adamw(trained)
    train(trained, optimizers, first=0, last=2)
    save_state(tmp_path / "state.safetensors", TrainingState(run=RUN, step=2, seconds=1.5), trained, optimizers)
    return tmp_path / "state.safetensors"


@pytest.mark.parametrize("make", [adamw, muon_and_adamw], ids=["adamw", "muon and adamw"])
def test_going_on_from_a_checkpoint_is_going_on(tmp_path: Path, make: MakeOptimizers):
    through, path = module(), tmp_path / "state.safetensors"
    optimizers = make(through)
    train(through, optimizers, first=0, last=3)
    save_state(path, TrainingState(run=RUN, step=3, seconds=1.0), through, optimizers)
    train(through, optimizers, first=3, last=6)

    resumed = module(seed=1)
    with torch.no_grad():
        frozen_bias(resumed).copy_(frozen_bias(module()))  # frozen, so not in the checkpoint
    optimizers = make(resumed)
    assert load_state(path, RUN, resumed, optimizers) == TrainingState(run=RUN, step=3, seconds=1.0)
    train(resumed, optimizers, first=3, last=6)
    for name, parameter in through.named_parameters():
        assert torch.equal(resumed.get_parameter(name), parameter), name


@pytest.mark.parametrize(
    ("make", "memory"),
    [
        (adamw, {"exp_avg.0.weight", "exp_avg_sq.1.weight", "step.0.bias"}),
        (muon_and_adamw, {"momentum_buffer.0.weight", "exp_avg.1.weight"}),
    ],
    ids=["adamw", "muon and adamw"],
)
def test_what_optimizers_remember_is_stored(tmp_path: Path, make: MakeOptimizers, memory: set[str]):
    trained, path = module(), tmp_path / "state.safetensors"
    optimizers = make(trained)
    train(trained, optimizers, first=0, last=1)
    save_state(path, TrainingState(run=RUN, step=1, seconds=0), trained, optimizers)
    assert {f"optimizer.{name}" for name in memory} <= load_file(path).keys()


def test_what_does_not_learn_is_not_stored(stored: Path):
    assert {name for name in load_file(stored) if not name.startswith("optimizer.")} == {
        "0.weight",
        "0.bias",
        "1.weight",
    }


def test_where_there_is_no_checkpoint_there_is_no_state(tmp_path: Path):
    assert load_state(tmp_path / "state.safetensors", RUN, module(), []) is None


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"stage": "see", "batch_size": 8, "seed": 0}, "batch_size was 4, is 8"),
        ({"stage": "talk", "batch_size": 4, "seed": 1}, "stage was 'see', is 'talk', seed was 0, is 1"),
        ({"stage": "see", "batch_size": 4}, "seed was 0, is None"),
        ({"stage": "see", "batch_size": 4, "seed": 0, "rank": 16}, "rank was None, is 16"),
    ],
    ids=["changed", "two changed", "gone", "new"],
)
def test_a_checkpoint_of_another_run_is_refused(stored: Path, settings: dict[str, object], difference: str):
    trained = module(seed=1)
    with pytest.raises(TrainingError) as caught:
        load_state(stored, json.dumps(settings), trained, adamw(trained))
    assert str(caught.value) == (
        f"{stored} belongs to another run ({difference}); give the options it was started with, another folder, or "
        "delete it to start again"
    )
    assert torch.equal(trained[0].weight, module(seed=1)[0].weight)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def scribble(path: Path) -> None:
    path.write_bytes(b"scribble")


def strip(path: Path) -> None:
    save_file(load_file(path), path)


def forget_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors["1.weight"]
    save_file(tensors, path, metadata={"run": RUN, "step": "2", "seconds": "1.5"})


def miscount(path: Path) -> None:
    save_file(load_file(path), path, metadata={"run": RUN, "step": "two", "seconds": "1.5"})


def reshape(path: Path) -> None:
    save_file(
        {**load_file(path), "1.weight": torch.zeros(3, 3)}, path, metadata={"run": RUN, "step": "2", "seconds": "1.5"}
    )


@pytest.mark.parametrize("damage", [cut, scribble, strip, miscount, forget_a_tensor, reshape])
def test_a_damaged_checkpoint_is_refused(stored: Path, damage: Callable[[Path], None]):
    damage(stored)
    trained = module(seed=1)
    with pytest.raises(TrainingError) as caught:
        load_state(stored, RUN, trained, adamw(trained))
    assert str(caught.value).startswith(f"{stored} cannot be read (")
    assert str(caught.value).endswith("); delete it to start again")
    assert torch.equal(trained[0].weight, module(seed=1)[0].weight)


def test_a_checkpoint_replaces_the_one_before(stored: Path):
    trained = module(seed=1)
    save_state(stored, TrainingState(run=RUN, step=5, seconds=9.0), trained, adamw(trained))
    found = module()
    state = load_state(stored, RUN, found, adamw(found))
    assert state == TrainingState(run=RUN, step=5, seconds=9.0)
    assert torch.equal(found[0].weight, trained[0].weight)
    assert list(stored.parent.iterdir()) == [stored]


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Let no file grow beyond 8 MiB, as on a disk without room; what the test run itself writes is smaller."""
    resource = pytest.importorskip("resource", reason="only Unix can limit the size of files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path):
    path = tmp_path / "state.safetensors"
    with pytest.raises(TrainingError) as caught:
        save_state(path, TrainingState(run=RUN, step=3, seconds=2.0), nn.Linear(1600, 1600), [])
    assert str(caught.value).startswith(f"{path} cannot be written (")
    assert str(caught.value).endswith("); free some room or choose another folder")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_checkpoint_before(stored: Path, request: pytest.FixtureRequest):
    before = stored.read_bytes()
    request.getfixturevalue("full_disk")
    with pytest.raises(TrainingError, match="cannot be written"):
        save_state(stored, TrainingState(run=RUN, step=3, seconds=2.0), nn.Linear(1600, 1600), [])
    assert stored.read_bytes() == before
    assert list(stored.parent.iterdir()) == [stored]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="cannot be written"):
        save_state(tmp_path / "file" / "state.safetensors", TrainingState(run=RUN, step=1, seconds=0), module(), [])
