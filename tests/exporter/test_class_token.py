"""Tokens chosen by the class token's attention: on cases worked out by hand, in graphs, and what is refused."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from tests.conftest import adsc, recipe_for
from tokexport.engines.backend import SessionOptions
from tokexport.engines.parity import verify
from tokexport.errors import RecipeError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.export import design
from tokexport.exporter.modules.prumerge import AttendedWithNeighbours
from tokexport.exporter.modules.visionzip import AttendedAndAverages
from tokexport.exporter.modules.vscan import LocalAndGlobal
from tokexport.recipes.schema import Recipe

VISIONZIP: dict[str, object] = {"method": "visionzip", "keep": 7, "contextual": 3}
PRUMERGE: dict[str, object] = {"method": "prumerge", "keep": 6, "neighbours": 4}
VSCAN: dict[str, object] = {"method": "vscan", "keep": 9, "window": 2, "local_layer": 0, "layer": 2, "keep_inside": 4}
CHOOSING = ("visionzip", "prumerge", "vscan")
SIX_DEGREES = [0.0, 90.0, 10.0, 170.0, 45.0, 165.0]


def column(*values: float) -> Tensor:
    """Return one image of tokens of width 1."""
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1)


def directions(degrees: list[float]) -> Tensor:
    """Return one image of keys of length 1 in the plane."""
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack((angle.cos(), angle.sin()), dim=-1).unsqueeze(0)


# --- VisionZip by hand


def visionzip(*, attended: int = 2, averages: int = 2, has_class_token: bool = False) -> AttendedAndAverages:
    return AttendedAndAverages(
        layer=0, num_tokens=6, attended=attended, averages=averages, has_class_token=has_class_token
    )


@pytest.mark.parametrize("has_class_token", [False, True])
def test_visionzip_keeps_what_is_attended_to_and_averages_the_rest(has_class_token: bool):
    attention = torch.tensor([[0.1, 0.3, 0.1, 0.1, 0.2, 0.1]])
    # The rest is 0, 2, 3, 5; every second is a target, 0 and 3. Token 2 joins 0, token 5 joins 3.
    found = visionzip(has_class_token=has_class_token)(
        column(99, 0, 1, 4, 9, 16, 25), attention, directions(SIX_DEGREES)
    )
    assert found.flatten().tolist() == [99] * has_class_token + [1, 16, (0 + 4) / 2, (9 + 25) / 2]


def test_visionzip_takes_the_first_of_equals_and_leaves_a_target_with_itself():
    # All alike: 0 and 1 stay; of 2, 3, 4, 5 the targets are 2 and 4, and the others join the first.
    found = visionzip()(column(99, 0, 1, 4, 9, 16, 25), torch.full((1, 6), 0.1), directions([30.0] * 6))
    assert found.flatten().tolist() == pytest.approx([0, 1, (4 + 9 + 25) / 3, 16])


def test_visionzip_spaces_its_targets_evenly_over_the_rest():
    # Of a rest of five, two targets stand two apart: the first and the third.
    share = visionzip(attended=1).joined(directions([0.0, 1.0, 90.0, 89.0, 2.0]))
    torch.testing.assert_close(share, torch.tensor([[[1, 1, 0, 0, 1], [0, 0, 1.5, 1.5, 0]]]) / 3)


def test_visionzip_chooses_for_each_image():
    generator = torch.Generator().manual_seed(0)
    hidden, attention, keys = (torch.rand(2, *size, generator=generator) for size in ((7, 4), (6,), (6, 3)))
    together = visionzip()(hidden, attention, keys)
    alone = [visionzip()(hidden[n : n + 1], attention[n : n + 1], keys[n : n + 1]) for n in (0, 1)]
    torch.testing.assert_close(together, torch.cat(alone))
    assert visionzip().top(attention)[0].tolist() != visionzip().top(attention)[1].tolist()


# --- PruMerge by hand


def prumerge(*, kept: int, always: tuple[int, ...] = ()) -> AttendedWithNeighbours:
    return AttendedWithNeighbours(layer=0, num_tokens=5, kept=kept, neighbours=1, always=always)


def test_prumerge_adds_to_each_kept_token_what_is_most_like_it_and_sums_the_rest():
    attention = torch.tensor([[0.4, 0.1, 0.3, 0.1, 0.1]])
    # 0 and 2 stay. Most like 0 is 2, which stays as well; most like 2 is 3.
    found = prumerge(kept=2)(column(99, 1, 10, 100, 1000, 10000), attention, directions([0.0, 180.0, 20.0, 30.0, 90.0]))
    expected = [1 + 0.3 * 100, 100 + 0.1 * 1000, 0.1 * (10 + 1000 + 10000)]
    assert found.flatten().tolist() == pytest.approx(expected)


def test_prumerge_of_equals_takes_the_first_and_never_itself():
    weights = prumerge(kept=2).weights(torch.full((1, 5), 0.1), directions([50.0] * 5))
    expected = [[1, 0.1, 0, 0, 0], [0.1, 1, 0, 0, 0], [0, 0, 0.1, 0.1, 0.1]]
    torch.testing.assert_close(weights, torch.tensor([expected]))


def test_prumerge_plus_keeps_equidistant_tokens_and_the_most_attended_of_the_others():
    attention = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.0]])
    always = prumerge(kept=3, always=(0, 3))
    kept_BA = always.weights(attention, directions([0.0, 40.0, 80.0, 120.0, 160.0])).argmax(-1)[:, :-1]
    assert kept_BA.tolist() == [[0, 2, 3]]


def test_half_of_what_prumerge_plus_keeps_is_equidistant(checkpoint: Path):
    made = design(recipe_for(checkpoint, {**PRUMERGE, "plus": True}))
    stage = made.methods[0].feature_stage(made.model.spec, made.plans[0])
    assert isinstance(stage, AttendedWithNeighbours)
    # 6 tokens are 5 kept ones and the sum; 2 of 16 in the middle of their halves.
    assert stage.is_always_N.nonzero().flatten().tolist() == [4, 12]


# --- VScan by hand


def vscan(*, kept: int, grid: tuple[int, int] = (2, 4)) -> LocalAndGlobal:
    return LocalAndGlobal(local_layer=0, layer=1, grid=grid, window=2, per_window=1, kept=kept)


def test_vscan_keeps_the_best_of_each_window_and_the_best_of_the_others():
    # Windows: 0 1 4 5 and 2 3 6 7. The first keeps 5, the second the first of equals, 2.
    local = torch.tensor([[0.1, 0.2, 0.1, 0.1, 0.1, 0.3, 0.1, 0.1]])
    assert vscan(kept=3).stands_out(local).nonzero()[:, 1].tolist() == [2, 5]
    degrees = [1.0, 88.0, 90.0, 2.0, 3.0, 0.0, 179.0, 180.0]
    length = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]).unsqueeze(-1)
    features = directions(degrees) * length
    late = torch.tensor([[0.0, 0.1, 0.0, 0.1, 0.1, 0.0, 0.1, 0.6]])
    # 7 is the best of the others. 1 joins 2; 0, 3 and 4 join 5; 6 joins 7.
    expected = [features[:, row].mean(1) for row in ([1, 2], [0, 3, 4, 5], [6, 7])]
    torch.testing.assert_close(vscan(kept=3)(features, local, late), torch.stack(expected, dim=1))


def test_vscan_of_equal_tokens_leaves_each_kept_one_with_itself():
    share = vscan(kept=2, grid=(2, 4)).joined(torch.ones(1, 8, 3), torch.tensor([[1, 6]]))
    expected = [[1 / 7] * 6 + [0, 1 / 7], [0] * 6 + [1, 0]]
    torch.testing.assert_close(share, torch.tensor([expected]))


def test_windows_lie_where_they_are_in_each_image():
    attention = torch.zeros(2, 16)
    attention[0, [2, 5, 8, 15]] = attention[1, [0, 7, 13, 10]] = 1.0
    found = vscan(kept=6, grid=(4, 4)).stands_out(attention)
    assert [row.nonzero().flatten().tolist() for row in found] == [[2, 5, 8, 15], [0, 7, 10, 13]]


# --- in graphs


@pytest.mark.parametrize("step", [VISIONZIP, PRUMERGE, VSCAN], ids=lambda step: step["method"])
def test_attention_stays_fused_and_no_product_of_the_tower_stands_twice(
    checkpoint: Path, exported: Callable[[Recipe], Bundle], tiny_full: Bundle, step: dict[str, Any]
):
    full = nodes_of_the_tower(tiny_full)
    found = nodes_of_the_tower(exported(recipe_for(checkpoint, step)))
    assert full["Attention"] == 2  # of three layers, LLaVA takes the output of the second
    assert (found["Attention"], found["MatMul"], found["LayerNormalization"]) == (
        full["Attention"],
        full["MatMul"],
        full["LayerNormalization"],
    )


def nodes_of_the_tower(bundle: Bundle) -> Counter[str]:
    graph = ir.load(bundle.graph_path("vision_encoder")).graph
    return Counter(node.op_type for node in graph if str(node.name).startswith("/vision_tower/"))


@pytest.mark.parametrize(
    "steps",
    [
        [VISIONZIP],
        [{**VISIONZIP, "class_token": False}, {"method": "adsc", "drops": [{"layer": 2, "keep": 4}]}],
        [{"method": "resize", "keep": 9}, VISIONZIP],
        [PRUMERGE],
        [{**PRUMERGE, "plus": True}, {"method": "fastv", "keep": 3}],
        [{**VSCAN, "tower_layer": 0}],
    ],
    ids=[
        "visionzip",
        "visionzip without the class token before adsc",
        "visionzip of a smaller image",
        "prumerge",
        "prumerge plus before fastv",
        "vscan",
    ],
)
def test_every_rung_of_the_ladder_holds(
    checkpoint: Path, exported: Callable[[Recipe], Bundle], steps: list[dict[str, Any]]
):
    bundle = exported(recipe_for(checkpoint, *steps))
    found = verify(bundle, "ort", SessionOptions.for_bundle(bundle, threads=1))
    assert [check for check in found.checks if not check.passed] == []
    (stage,) = (f"stages.{step['method']}" for step in steps if step["method"] in CHOOSING)
    checks = {check.name: check for check in found.checks}
    assert checks[f"kept tokens, {stage}.top"].max_abs_diff == 0
    assert checks[f"kept tokens, {stage}.top"].note == ""  # nor a near-tie
    assert f"{stage}.top" not in checks  # the reference follows it, so that would be a check that cannot fail
    assert checks[f"{stage}.attention"].max_abs_diff < 1e-6


@pytest.mark.parametrize(("options", "layer"), [({}, 1), ({"tower_layer": 0}, 0), ({"tower_layer": 1}, 1)])
@pytest.mark.parametrize("step", [VISIONZIP, PRUMERGE, VSCAN], ids=lambda step: step["method"])
def test_the_layer_whose_output_is_taken_is_read_or_the_one_that_is_named(
    checkpoint: Path, step: dict[str, Any], options: dict[str, object], layer: int
):
    made = design(recipe_for(checkpoint, {**step, **options}))
    stage: Any = made.methods[0].feature_stage(made.model.spec, made.plans[0])
    assert stage.attention.layer == layer


# --- what is refused


@pytest.mark.parametrize("step", [VISIONZIP, PRUMERGE, VSCAN], ids=lambda step: step["method"])
def test_a_tower_without_a_class_token_is_refused(checkpoint: Path, step: dict[str, Any]):
    made = design(recipe_for(checkpoint, step))
    spec = replace(made.model.spec, class_token_layers=None)
    with pytest.raises(RecipeError) as caught:
        made.methods[0].plan(spec, made.plans[0])
    assert str(caught.value) == (
        f"[[compress]] {step['method']} chooses by the attention of a class token, which the vision tower of this "
        'model of family llava15 does not have; choose a method without, e.g. "divprune"'
    )


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        (
            [{"method": "sample", "keep": 12}, VISIONZIP],
            "visionzip chooses among the 16 vision tokens that the tower emits, of which an earlier method left 12; "
            "put visionzip first",
        ),
        ([adsc(), VISIONZIP], "a method that drops tokens before the language model stands behind one that drops"),
        ([{**VISIONZIP, "keep": 17}], "visionzip: keep = 17 is more than the 16 vision tokens"),
        (
            [{**PRUMERGE, "neighbours": 16}],
            "prumerge neighbours = 16 must be at least 1 and below the 16 vision tokens that the tower emits",
        ),
        ([{**PRUMERGE, "neighbours": 0}], "prumerge neighbours = 0 must be at least 1 and below the 16 vision tokens"),
        ([{**VSCAN, "window": 3}], "vscan window = 3 does not divide the 4 x 4 grid of tokens; choose a number that"),
        ([{**VSCAN, "local_layer": 2}], "vscan local_layer = 2 is not a layer of the vision tower whose"),
        (
            [{**VISIONZIP, "tower_layer": 2}],
            "visionzip tower_layer = 2 is not a layer of the vision tower whose attention the image features come from"
            "; choose 0 to 1",
        ),
        ([{**PRUMERGE, "tower_layer": -1}], "prumerge tower_layer = -1 is not a layer of the vision tower whose"),
        ([{**VSCAN, "keep": 7}], "vscan keep = 7 leaves no token to each of 4 windows; keep at least 8, or raise"),
        ([{**VSCAN, "layer": 4}], "vscan before layer 4: the model has the layers 0 to 3"),
        ([{"method": "sample", "keep": 12}, VSCAN], "vscan needs a full grid of tokens, which an earlier method"),
        ([{**VISIONZIP, "contextual": 0}], "visionzip contextual = 0 asks for 0 merged tokens of 7; choose 1 to 5, so"),
        ([{**VISIONZIP, "contextual": 6}], "visionzip contextual = 6 asks for 6 merged tokens of 7; choose 1 to 5, so"),
        (
            [{**VISIONZIP, "contextual": 0.99, "class_token": False}],
            "visionzip contextual = 0.99 asks for 7 merged tokens of 7; choose 1 to 6, so that a vision token",
        ),
    ],
)
def test_what_does_not_fit_is_refused(checkpoint: Path, steps: list[dict[str, object]], text: str):
    with pytest.raises(RecipeError) as caught:
        design(recipe_for(checkpoint, *steps))
    assert str(caught.value).startswith(f"[[compress]] {text}")
