"""What an artefact takes, foretold: beside the files that are then written, and worked out by hand."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.conftest import adsc, recipe_for
from tokexport.errors import BundleError
from tokexport.exporter.bundle import MANIFEST, Bundle, BundleWriter
from tokexport.exporter.export import design, export, planned
from tokexport.exporter.footprint import Footprint, GraphBytes, Room
from tokexport.exporter.graph_io import GRAPHS
from tokexport.exporter.plan import TokenPlan
from tokexport.recipes.load import load_recipe
from tokexport.recipes.schema import QuantizeTable, Recipe

METACOMPRESS: dict[str, object] = {"method": "metacompress", "keep": 6, "width": 8, "weights": "untrained"}
ROOM = Room(max_text_tokens=10, max_images=1, prompt_text_tokens=4)


class Usage(NamedTuple):
    """What ``shutil.disk_usage`` returns."""

    total: int
    used: int
    free: int


def footprint(recipe: Recipe) -> Footprint:
    made = design(recipe)
    with torch.device("meta"):
        return made.footprint(made.modules())


def with_sizes(weights: int, *, precision: str = "float32", largest: int = 0) -> Footprint:
    """Return a footprint of three graphs alike and a tower of width 64."""
    graph = GraphBytes(weights=weights, graph=10, precision=precision)
    return Footprint(graphs=dict.fromkeys(GRAPHS, graph), other_files=5, tower_widths=(64, 100), largest_weight=largest)


@pytest.mark.parametrize(
    ("changes", "compress"),
    [
        ({}, adsc()),
        ({}, METACOMPRESS),
        ({"quantize": QuantizeTable.for_bits("int8")}, adsc()),
        ({"quantize": QuantizeTable.for_bits("int4")}, adsc()),
        ({"quantize": QuantizeTable(decoder="int8", keep=("lm_head", "layers.0.*"))}, adsc()),
        ({"dtype": "float16"}, adsc()),
    ],
    ids=["adsc", "metacompress", "int8", "int4", "some int8", "float16"],
)
def test_weight_files_have_the_bytes_that_were_foretold(
    checkpoint: Path, exported: Callable[[Recipe], Bundle], changes: dict[str, Any], compress: dict[str, object]
):
    recipe = recipe_for(checkpoint, compress, dtype=changes.pop("dtype", "float32"))
    recipe = replace(recipe, **changes)
    bundle, foretold = exported(recipe), footprint(recipe)
    for graph in GRAPHS:
        stored = bundle.graph_path(graph).with_suffix(".onnx_data").stat().st_size
        assert foretold.graphs[graph].weights == stored, graph


def test_an_artefact_has_about_the_bytes_that_were_foretold(tiny_adsc: Bundle):
    # Of a tiny model the graphs and texts, which are estimated, are a fifth.
    actual = sum(file.bytes for file in tiny_adsc.manifest.files.values()) + (tiny_adsc.path / MANIFEST).stat().st_size
    assert footprint(tiny_adsc.recipe).disk_bytes == pytest.approx(actual, rel=0.05)


def test_bytes_on_disk_are_added_up():
    foretold = with_sizes(1000)
    assert foretold.disk_bytes == 3 * 1010 + 5
    assert foretold.room_bytes == int(3035 * 1.01) + (16 << 20)


def test_the_memory_of_a_run_is_worked_out_by_hand(checkpoint: Path):
    spec = design(recipe_for(checkpoint)).model.spec
    memory = with_sizes(1000).memory(spec, TokenPlan.uncompressed(spec), ROOM, dtype="float32", interpreter=7)
    assert (memory.interpreter, memory.weights) == (7, 3000)
    # 16 vision tokens and 10 of text, 4 layers, keys and values of 2 heads of 16 in 4 bytes.
    assert memory.kv_cache == 4 * 26 * 2 * 2 * 16 * 4
    # A prompt of 16 + 4 tokens: 3 x (64 + 96) numbers each, scores of 4 heads over a cache of 26; the tower's 17
    # tokens: 3 x 100 numbers each, scores of one head.
    numbers = 20 * 3 * 160 + 4 * 20 * 26 + 17 * 3 * 100 + 17 * 17
    assert memory.activations == 32_000_000 + 4 * numbers
    assert memory.total == 7 + 3000 + memory.kv_cache + memory.activations


@pytest.mark.parametrize(
    ("precision", "times"), [("float32", 1), ("int8", 1), ("float16", 2), ("int4", 2), ("bfloat16", 1)]
)
def test_some_precisions_take_more_memory_than_disk(precision: str, times: int):
    assert with_sizes(1000, precision=precision).graphs["embed_tokens"].resident == times * 1000


def test_a_weight_that_is_packed_while_opening_can_take_more_than_a_run(checkpoint: Path):
    spec = design(recipe_for(checkpoint)).model.spec
    memory = with_sizes(1000, largest=10**9).memory(spec, TokenPlan.uncompressed(spec), ROOM, dtype="float32")
    assert memory.activations == 10**9 - memory.kv_cache - 1000


def test_fewer_tokens_take_less_memory(checkpoint: Path):
    _, report = planned(recipe_for(checkpoint, {"method": "sample", "keep": 8}))
    full, compressed = report["memory_bytes"]["full"], report["memory_bytes"]["compressed"]
    assert compressed["kv_cache"] < full["kv_cache"]
    assert compressed["activations"] < full["activations"]
    assert compressed["weights"] == full["weights"]


def test_the_7b_in_half_precision_is_14_gigabytes():
    _, report = planned(
        replace(load_recipe("llava15_adsc"), export=replace(load_recipe("llava15_adsc").export, dtype="float16"))
    )
    assert round(report["disk_bytes"]["total"] / 1e9, 1) == 14.1


def test_a_full_disk_is_refused_with_the_bytes_of_each_graph_before_weights_are_read(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(total=10**9, used=10**9, free=10_000_000))
    steps: list[str] = []
    expected = (
        r"^\S+out needs 18 MB \(vision_encoder \d MB, embed_tokens 0 MB, decoder_model_merged 1 MB\) and its disk has "
        r"10 MB free; choose another -o or make room$"
    )
    with pytest.raises(BundleError, match=expected), BundleWriter(tmp_path / "out") as writer:
        export(design(recipe_for(checkpoint)), writer, steps.append)
    assert steps == []
    assert list(tmp_path.iterdir()) == []
