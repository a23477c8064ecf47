"""The oracle of MetaCompress: the best matrix for each image, and what it is compared with."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.conftest import recipe_for
from tests.training.conftest import write_llava_data
from tokexport.errors import TrainingError
from tokexport.exporter.export import design
from tokexport.exporter.windows import Windows
from tokexport.training.loop import Listener, Schedule
from tokexport.training.metacompress import Distillation, train_compressor
from tokexport.training.oracle import FreeMatrix, train_oracle, window_shares
from tokexport.training.tuning_data import Material, llava_material

METACOMPRESS = {"method": "metacompress", "keep": 4, "width": 8, "weights": "untrained"}
SCHEDULE = Schedule(num_steps=30, batch_size=2, learning_rate=0.1, max_grad_norm=1e-2, log_every=1)
FREE = Distillation(schedule=SCHEDULE, entropy=0, column=0)


@pytest.fixture(scope="module")
def material(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Material:
    made = design(recipe_for(checkpoint, METACOMPRESS))
    return llava_material(made, *write_llava_data(tmp_path_factory.mktemp("data")), num=100)


def test_the_shares_of_windows_are_those_of_a_mean():
    shares = window_shares(Windows((2, 4), (2, 2), (2, 2)))
    assert shares.tolist() == [[0.25, 0.25, 0, 0] * 2, [0, 0, 0.25, 0.25] * 2]


def test_each_image_has_a_matrix_of_its_own_that_starts_as_a_mean():
    windows = Windows((4, 4), (2, 2), (2, 2))
    matrix = FreeMatrix(3, windows)
    found = matrix(torch.randn(2, 16, 8))
    assert found.shape == (2, 4, 16)
    assert_close(found.sum(-1), torch.ones(2, 4))
    assert_close(found[0], window_shares(windows), atol=1e-2, rtol=0)
    found[1].square().sum().backward()
    assert matrix.logits_IMN.grad is not None
    assert [grad.abs().sum() > 0 for grad in matrix.logits_IMN.grad] == [False, True, False]


def test_the_oracle_is_nearer_to_all_tokens_than_a_mean(checkpoint: Path, material: Material, tmp_path: Path):
    compared = train_oracle(design(recipe_for(checkpoint, METACOMPRESS)), material, FREE, tmp_path)
    assert list(compared) == ["pool", "oracle"]
    assert 0 <= compared["oracle"]["divergence"] < 0.9 * compared["pool"]["divergence"]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    # The same batch in every step, started where pooling nearly is.
    assert lines[0]["divergence"] == pytest.approx(compared["pool"]["divergence"], rel=0.1)
    assert json.loads((tmp_path / "oracle.json").read_text()) == compared
    matrix = load_file(tmp_path / "oracle.safetensors")["matrix"]
    assert matrix.shape == (2, 4, 16)
    assert_close(matrix.sum(-1), torch.ones(2, 4))


def test_the_recipes_compressor_is_compared_where_it_is_trained(checkpoint: Path, material: Material, tmp_path: Path):
    made = design(recipe_for(checkpoint, METACOMPRESS))
    path = train_compressor(made, material, replace(FREE, schedule=replace(SCHEDULE, num_steps=1)), tmp_path / "one")
    short = replace(FREE, schedule=replace(SCHEDULE, num_steps=1))
    notes: list[str] = []
    for weights, names in ((path, ["pool", "metacompress", "oracle"]), ("nowhere", ["pool", "oracle"])):
        chosen = design(recipe_for(checkpoint, {**METACOMPRESS, "weights": str(weights)}))
        compared = train_oracle(
            chosen, material, short, tmp_path / f"of {len(names)}", listener=Listener(note=notes.append)
        )
        assert list(compared) == names
    assert "metacompress is left out of the comparison: there are no compressor weights nowhere; " in notes[-1]


def test_a_batch_in_parts_is_refused(checkpoint: Path, material: Material, tmp_path: Path):
    made: Any = design(recipe_for(checkpoint, METACOMPRESS))
    with pytest.raises(TrainingError, match="accumulate = 2 and 1 processes: an oracle takes its images in one part"):
        train_oracle(made, material, replace(FREE, schedule=replace(SCHEDULE, accumulate=2)), tmp_path)
