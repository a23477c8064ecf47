"""Weights of compressors on disk: written, read, and refused where they do not fit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tokexport.errors import CheckpointError
from tokexport.exporter.bundled import settled
from tokexport.exporter.compressor_file import load_compressor, save_compressor

SIZES = {"method": "metacompress", "tokens": "4 x 4"}


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_compressor(tmp_path / "made" / "compressor.safetensors", module(), SIZES)
    return tmp_path / "made" / "compressor.safetensors"


@pytest.mark.parametrize("source", ["the file", "its folder"])
def test_what_was_written_is_read(path: Path, source: str):
    values = load_compressor(str(path if source == "the file" else path.parent), module(), SIZES)
    expected = dict(module().named_parameters())
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[name], expected[name]) for name in expected)
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def rewritten(path: Path, change: Callable[[dict[str, torch.Tensor]], object], sizes: dict[str, str] = SIZES) -> str:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, sizes)
    return str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("bias"), "has no bias; it was trained for another model or another recipe"),
        (lambda t: t.update(scale=torch.ones(1)), "has scale, which is not known"),
        (lambda t: t.update(weight=torch.ones(2, 4)), "has weight of 2 x 4, expected 2 x 3"),
        (lambda t: t["weight"][0, :2].fill_(torch.nan), "weight has 2 values that are no numbers; train it again"),
        (lambda t: t["bias"].fill_(torch.inf), "bias has 2 values that are no numbers"),
    ],
    ids=["missing", "surplus", "shape", "nan", "infinite"],
)
def test_weights_that_do_not_fit_are_refused(
    path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
):
    with pytest.raises(CheckpointError) as caught:
        load_compressor(rewritten(path, change), module(), SIZES)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_weights_for_other_sizes_are_refused(path: Path):
    with pytest.raises(
        CheckpointError, match=r"was trained for tokens 4 x 4, the recipe has 5 x 5; train it for this recipe$"
    ):
        load_compressor(str(path), module(), {**SIZES, "tokens": "5 x 5"})
    with pytest.raises(
        CheckpointError, match=r"was trained for method unknown, the recipe has metacompress; tokens un"
    ):
        load_compressor(rewritten(path, lambda _: None, {"format": "pt"}), module(), SIZES)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"^there are no compressor weights nowhere; train them .* --compressor$"):
        load_compressor("nowhere", module(), SIZES)
    with pytest.raises(CheckpointError, match="there are no compressor weights"):
        load_compressor(str(tmp_path), module(), SIZES)


def test_a_file_that_is_damaged(path: Path):
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"cannot be read as safetensors \(.*\); fetch or train it again"):
        load_compressor(str(path), module(), SIZES)


def test_a_path_means_the_same_from_everywhere(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(path.parent)
    assert settled(path.name) == str(path.resolve())
    assert settled("mini") == "mini"
    assert settled("untrained") == "untrained"
