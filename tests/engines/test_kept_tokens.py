"""Which of 4 x 4 patches stay, for every kind of choice."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from tests.conftest import adsc, recipe_for
from tokexport.engines.backend import SessionOptions
from tokexport.engines.kept_tokens import KeptTokens, kept_tokens
from tokexport.engines.mixing import made_image
from tokexport.engines.prompt import PromptProcessor
from tokexport.engines.torch_session import TorchSession
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.export import design
from tokexport.exporter.modules.selection import FarthestIndex
from tokexport.recipes.schema import Recipe

OPTIONS = SessionOptions(max_text_tokens=64, max_images=1, threads=1)
See = Callable[..., KeptTokens]


@pytest.fixture
def see(checkpoint: Path, exported: Callable[[Recipe], Bundle]) -> See:
    def kept(*steps: dict[str, object]) -> KeptTokens:
        return kept_tokens(exported(recipe_for(checkpoint, *steps)), made_image(), "Is there a star?", threads=1)

    return kept


def places(found: KeptTokens) -> list[tuple[str, list[int]]]:
    return [(stage.where, [at for at, weight in enumerate(stage.weight_N) if weight]) for stage in found.stages]


def test_a_constant_choice_before_the_language_model(see: See):
    found = see({"method": "sample", "keep": 4, "phase": 0.0})
    assert places(found) == [("before the language model", [0, 4, 8, 12])]
    assert (found.grid, found.hidden) == ((4, 4), "")


def test_bottlenecks_thin_what_the_one_before_left(see: See):
    assert places(see(adsc())) == [("from layer 1 on", [0, 2, 4, 6, 8, 10, 12, 14]), ("from layer 3 on", [0, 4, 8, 12])]


def test_a_mixture_takes_from_every_patch_as_much_as_stays(see: See):
    found = see({"method": "metacompress", "keep": 6, "width": 8, "weights": "untrained"})
    (stage,) = found.stages
    assert stage.kept == 6
    assert sum(stage.weight_N) == pytest.approx(6, abs=1e-4)
    assert min(stage.weight_N) > 0


def test_of_a_smaller_image_every_patch_stays(see: See):
    found = see({"method": "resize", "keep": 4})
    assert found.grid == (2, 2)
    assert places(found) == [("a smaller image", [0, 1, 2, 3])]


def test_without_compression_nothing_goes(see: See):
    assert see() == KeptTokens(grid=(4, 4), stages=())


@pytest.mark.parametrize(
    "step",
    [
        {"method": "fastv", "layer": 1, "keep": 8},
        {"method": "pyramiddrop", "drops": [{"layer": 1, "keep": 8}, {"layer": 3, "keep": 4}]},
    ],
    ids=["fastv", "pyramiddrop"],
)
def test_a_choice_by_attention_is_told_by_the_graph(see: See, step: dict[str, object]):
    found = places(see(step))
    assert [(where, len(patches)) for where, patches in found] == [("from layer 1 on", 8), ("from layer 3 on", 4)][
        : len(found)
    ]
    # What is left behind the second bottleneck had passed the first.
    assert set(found[-1][1]) <= set(found[0][1])


def test_a_choice_of_one_token_after_another_is_told_by_the_graph(see: See):
    ((where, patches),) = places(see({"method": "cdpruner", "keep": 6}))
    assert (where, len(patches)) == ("from layer 0 on", 6)


def test_a_choice_by_what_the_image_shows_is_read_in_the_vision_encoder(see: See):
    found = see({"method": "divprune", "keep": 8}, {"method": "fastv", "keep": 5})
    (before, first), (_, second) = places(found)
    assert (before, len(first), len(second)) == ("before the language model", 8, 5)
    assert set(second) <= set(first)
    assert found.hidden == ""


def test_the_picture_of_divprune_is_what_it_chooses_of_the_features(
    checkpoint: Path, exported: Callable[[Recipe], Bundle]
):
    bundle = exported(recipe_for(checkpoint, {"method": "divprune", "keep": 8}))
    ((_, patches),) = places(kept_tokens(bundle, made_image(), "Is there a star?", threads=1))
    session = TorchSession(design(recipe_for(checkpoint)), OPTIONS)
    features = session.encode_images(PromptProcessor(bundle.path).pixels([made_image()]))
    assert patches == FarthestIndex(8)(torch.from_numpy(np.asarray(features, np.float32)))[0].tolist()


MERGING = "before the language model, others merged into them"


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        ({"method": "prumerge", "keep": 8, "neighbours": 4}, 7),
        ({"method": "visionzip", "keep": 8, "contextual": 3}, 4),
    ],
    ids=["prumerge", "visionzip"],
)
def test_a_stage_that_chooses_and_merges_shows_what_it_chooses(see: See, step: dict[str, object], kept: int):
    found = see(step)
    ((where, patches),) = places(found)
    assert (where, len(patches), found.hidden) == (MERGING, kept, "")
    behind = see(step, {"method": "fastv", "keep": 3, "layer": 1})
    assert places(behind) == places(found)
    assert behind.hidden == f"not every token that {step['method']} makes is one of those that it chooses"


def test_what_is_dropped_behind_a_stage_that_makes_no_further_token_is_shown(see: See):
    step = {"method": "vscan", "keep": 9, "window": 2, "local_layer": 0, "layer": 2, "keep_inside": 4}
    (before, first), (inside, second) = places(see(step))
    assert (before, inside, len(first), len(second)) == (MERGING, "from layer 2 on", 9, 4)
    assert set(second) <= set(first)


def test_a_graph_that_does_not_name_a_choice_costs_its_picture_alone(
    checkpoint: Path, exported: Callable[[Recipe], Bundle], tmp_path: Path
):
    made = exported(recipe_for(checkpoint, {"method": "divprune", "keep": 8}))
    older = Bundle(Path(shutil.copytree(made.path, tmp_path / "older")), made.manifest)
    graph = ir.load(older.graph_path("vision_encoder"))
    for node in graph.graph:
        node.name = (node.name or "").replace("/stages/divprune/index/", "/stages/divprune/")
    ir.save(graph, older.graph_path("vision_encoder"))
    found = kept_tokens(older, made_image(), "Is there a star?", threads=1)
    assert found.stages == ()
    assert found.hidden == "the vision graph has no nodes of stages.divprune.index; export it again"
