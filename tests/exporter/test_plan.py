"""Static sizes: what reaches which layer, and what that costs, worked out by hand."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest

from tokexport.errors import RecipeError
from tokexport.exporter.export import planned
from tokexport.exporter.plan import (
    LayerGroup,
    TokenPlan,
    VlmSpec,
    full_vision_tokens,
    grid_index,
    keep_text,
    kv_cache_bytes,
    plan_report,
    prefill_flops,
    resolve_keep,
    scaled_layers,
    squarest_grid,
    stride_index,
)
from tokexport.recipes.load import load_recipe

SMALL = VlmSpec(
    family="llava15",
    num_layers=2,
    hidden_size=4,
    intermediate_size=6,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    vocab_size=10,
    max_positions=32,
    image_size=28,
    vision_grid=(2, 2),
)
FULL = TokenPlan.uncompressed(SMALL)


def test_a_full_plan_has_every_token_everywhere():
    assert TokenPlan.uncompressed(SMALL) == TokenPlan(emitted=4, entering_llm=4, per_layer=(4, 4), grid=(2, 2))


def test_flops_are_twice_the_multiply_adds_of_each_layer():
    # Layer 0, 4 + 1 tokens: projections 2 x 5 x 4 x (4 + 2) = 240, attention 2 x 5 x 5 x 4 = 200,
    # MLP 3 x 5 x 4 x 6 = 360; layer 1, 2 + 1 tokens: 144 + 72 + 216.
    plan = FULL.thinned_before_layer(1, 2)
    assert prefill_flops(SMALL, plan, text_tokens=1) == 2 * (800 + 432)


def test_llava_7b_needs_the_multiply_adds_that_were_published():
    made, _ = planned(load_recipe("llava15_full"))
    assert round(prefill_flops(made.model.spec, made.plan, text_tokens=118) / 2 / 1e12, 2) == 4.62


def test_adsc_saves_on_llava_7b_what_its_paper_says():
    _, report = planned(load_recipe("llava15_adsc"), text_tokens=36)
    assert round(100 * report["flops"]["reduction"], 1) == 53.7
    assert round(100 * report["kv_bytes_vision"]["reduction"], 1) == 56.6


@pytest.mark.parametrize(
    ("images", "dtype", "expected"),
    [(1, "float32", 144), (1, "float16", 72), (1, "bfloat16", 72), (2, "float32", 224)],
)
def test_a_cache_holds_keys_and_values_of_every_layer(images: int, dtype: str, expected: int):
    # Layer 0 sees 4 tokens of an image and layer 1 one; with 2 of text that is 6 + 3 tokens, or
    # 10 + 4 for two images; each is a key and a value of one head of width 2.
    plan = FULL.thinned_before_layer(1, 1)
    assert kv_cache_bytes(SMALL, plan, text_tokens=2, num_images=images, dtype=dtype) == expected


def test_a_report_compares_with_the_uncompressed_model():
    report = plan_report(SMALL, FULL.thinned_before_layer(1, 2), text_tokens=1, dtype="float32")
    assert report["flops"] == {"full": 3200, "compressed": 2464, "reduction": pytest.approx(0.23)}
    assert report["predicted_prefill_speedup"] == pytest.approx(3200 / 2464)
    # Without text 8 tokens against 6 of 16 bytes each, with text 10 against 8.
    assert report["kv_bytes_vision"] == {"full": 128, "compressed": 96, "reduction": 0.25}
    assert report["kv_bytes"] == {"full": 160, "compressed": 128, "reduction": pytest.approx(0.2)}
    assert report["vision_tokens"] == {"emitted": 4, "entering_llm": 4, "per_layer": [4, 2]}
    assert report["mean_vision_tokens"] == 3
    assert report["prompt_tokens"] == {"text": 1, "full": 5, "compressed": 5}


def test_tokens_left_out_before_the_model_are_not_in_its_prompt():
    plan = FULL.thinned_before_llm(2)
    assert plan == TokenPlan(emitted=4, entering_llm=2, per_layer=(2, 2), grid=None)
    assert plan_report(SMALL, plan, text_tokens=1, dtype="float32")["prompt_tokens"]["compressed"] == 3


def test_of_a_smaller_image_fewer_tokens_are_emitted():
    plan = TokenPlan.uncompressed(replace(SMALL, vision_grid=(4, 4))).resized((3, 2))
    assert plan == TokenPlan(emitted=6, entering_llm=6, per_layer=(6, 6), grid=(3, 2))


def test_an_image_whose_tokens_were_dropped_cannot_get_smaller():
    with pytest.raises(AssertionError):
        FULL.thinned_before_layer(1, 2).resized((1, 2))


@pytest.mark.parametrize("plan", [FULL, FULL.resized((1, 2)), FULL.thinned_before_llm(2)], ids=str)
def test_a_report_knows_the_tokens_of_an_uncompressed_image(plan: TokenPlan):
    assert full_vision_tokens(plan_report(SMALL, plan, text_tokens=3, dtype="float32")) == 4


@pytest.mark.parametrize(
    ("emitted", "entering", "per_layer"), [(4, 5, (4, 4)), (4, 4, (5, 4)), (4, 4, (3, 4)), (4, 4, (1, 0))]
)
def test_a_plan_that_grows_or_runs_dry_cannot_be_made(emitted: int, entering: int, per_layer: tuple[int, ...]):
    with pytest.raises(AssertionError):
        TokenPlan(emitted=emitted, entering_llm=entering, per_layer=per_layer)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("keep", [1, 3, 4, 9])
def test_thinning_never_makes_a_plan_grow(layer: int, keep: int):
    before = FULL.thinned_before_layer(1, 2)
    after = before.thinned_before_layer(layer, keep)
    assert all(new <= old for new, old in zip(after.per_layer, before.per_layer, strict=True))


@pytest.mark.parametrize(
    ("per_layer", "groups", "group_of_layer"),
    [
        ((8, 8, 8), [(0, 3, 8)], (0, 0, 0)),
        ((8, 4, 4), [(0, 1, 8), (1, 2, 4)], (0, 1, 1)),
        ((8, 4, 2), [(0, 1, 8), (1, 1, 4), (2, 1, 2)], (0, 1, 2)),
        ((4, 4, 2), [(0, 0, 8), (0, 2, 4), (2, 1, 2)], (1, 1, 2)),
    ],
    ids=["one", "two", "three", "bottleneck before layer 0"],
)
def test_layers_that_see_as_many_tokens_are_one_group(
    per_layer: tuple[int, ...], groups: list[tuple[int, int, int]], group_of_layer: tuple[int, ...]
):
    plan = TokenPlan(emitted=8, entering_llm=8, per_layer=per_layer)
    assert plan.groups == tuple(
        LayerGroup(first_layer=first, num_layers=count, vision_tokens=tokens) for first, count, tokens in groups
    )
    assert plan.group_of_layer == group_of_layer


@pytest.mark.parametrize(
    ("keep", "arriving", "expected"),
    [(144, 576, 144), (2, 576, 2), (575, 576, 575), (0.25, 576, 144), (0.5, 9, 4), (0.999, 576, 575), (0.004, 576, 2)],
)
def test_a_count_or_a_fraction_becomes_a_count(keep: float, arriving: int, expected: int):
    assert resolve_keep(keep, arriving, "here:") == expected


@pytest.mark.parametrize(
    ("keep", "text"),
    [
        (1.0, "here: keep = 1.0 must lie between 0 and 1 as a fraction; a token count is written as a whole number"),
        (0.0, "here: keep = 0.0 must lie between 0 and 1 as a fraction"),
        (-0.5, "here: keep = -0.5 must lie between 0 and 1 as a fraction"),
        (144.0, "here: keep = 144.0 must lie between 0 and 1 as a fraction; a token count is written as a whole"),
        (float("nan"), "here: keep = nan must lie between 0 and 1 as a fraction"),
        (0, "here: keep = 0 leaves 0 of 16 vision tokens; keep at least 2"),
        (1, "here: keep = 1 leaves 1 of 16 vision tokens; keep at least 2"),
        (-3, "here: keep = -3 leaves -3 of 16 vision tokens; keep at least 2"),
        (0.01, "here: keep = 0.01 leaves 0 of 16 vision tokens; keep at least 2"),
        (17, "here: keep = 17 is more than the 16 vision tokens that arrive; choose a smaller number"),
        (16, "here: keep = 16 keeps all 16 vision tokens that arrive and has no effect; remove it or choose"),
        (0.99, "here: keep = 0.99 keeps all 16 vision tokens that arrive and has no effect"),
    ],
)
def test_a_keep_that_cannot_be_or_does_nothing_is_refused(keep: float, text: str):
    with pytest.raises(RecipeError) as caught:
        resolve_keep(keep, 16, "here:")
    assert str(caught.value).startswith(text)


def test_a_ratio_is_said_in_one_way():
    assert keep_text(576, 144) == "576 -> 144 tokens (25 %)"
    assert keep_text(576, 249.75) == "576 -> 249.75 tokens (43.4 %)"


@pytest.mark.parametrize(
    ("arriving", "keep", "phase", "expected"),
    [
        (8, 4, 0.0, (0, 2, 4, 6)),
        (8, 4, 0.5, (1, 3, 5, 7)),
        (8, 3, 0.0, (0, 2, 5)),
        (8, 3, 0.5, (1, 4, 6)),
        (7, 2, 0.9, (3, 6)),
        (5, 1, 0.5, (2,)),
    ],
)
def test_a_stride_takes_positions_at_equal_distances(arriving: int, keep: int, phase: float, expected: tuple[int, ...]):
    assert stride_index(arriving, keep, phase) == expected


@pytest.mark.parametrize("phase", [0.0, 0.3, 0.5, 0.999])
@pytest.mark.parametrize(("arriving", "keep"), [(576, 575), (576, 288), (576, 145), (577, 3), (2, 1)])
def test_a_stride_rises_and_stays_inside(arriving: int, keep: int, phase: float):
    index = stride_index(arriving, keep, phase)
    assert len(index) == keep
    assert all(before < after for before, after in pairwise(index))
    assert 0 <= index[0] <= index[-1] < arriving


@pytest.mark.parametrize(
    ("grid", "kept", "phase", "expected"),
    [
        ((4, 4), (2, 2), 0.0, (0, 2, 8, 10)),
        ((4, 4), (2, 2), 0.5, (5, 7, 13, 15)),
        ((2, 4), (2, 2), 0.0, (0, 2, 4, 6)),
        ((4, 2), (2, 1), 0.0, (0, 4)),
    ],
)
def test_a_grid_takes_rows_and_columns(
    grid: tuple[int, int], kept: tuple[int, int], phase: float, expected: tuple[int, ...]
):
    assert grid_index(grid, kept, phase) == expected


@pytest.mark.parametrize(
    ("grid", "arriving", "keep", "expected"),
    [
        ((4, 4), (4, 4), 4, (2, 2)),
        ((4, 4), (4, 4), 8, (2, 4)),
        ((4, 4), (4, 4), 12, (3, 4)),
        ((24, 24), (24, 24), 288, (16, 18)),
        ((24, 24), (16, 18), 144, (12, 12)),
        ((2, 8), (2, 8), 4, (1, 4)),
        ((4, 4), (4, 4), 5, None),
        ((4, 4), (1, 4), 8, None),
    ],
)
def test_the_kept_grid_has_the_squarest_cells(
    grid: tuple[int, int], arriving: tuple[int, int], keep: int, expected: tuple[int, int] | None
):
    assert squarest_grid(grid, arriving, keep) == expected


@pytest.mark.parametrize(
    ("layers", "before", "after", "expected"),
    [
        ((8, 16, 24), 32, 16, (4, 8, 12)),
        ((6, 16, 23), 32, 8, (2, 4, 6)),
        ((1, 2, 3), 8, 4, (0, 1, 2)),
        ((0, 4), 8, 2, (0, 1)),
        ((), 8, 4, ()),
    ],
)
def test_layers_move_with_the_depth_of_the_model(
    layers: tuple[int, ...], before: int, after: int, expected: tuple[int, ...]
):
    assert scaled_layers(layers, before, after) == expected


def test_more_bottlenecks_than_layers_are_refused():
    with pytest.raises(RecipeError, match="3 bottlenecks do not fit into 2 layers; use 3 or more"):
        scaled_layers((8, 16, 24), 32, 2)


@pytest.mark.parametrize("layer", [-1, 32])
def test_a_layer_that_the_longer_model_does_not_have_is_refused(layer: int):
    with pytest.raises(
        RecipeError, match=f"a bottleneck stands before layer {layer}: the model has the layers 0 to 31"
    ):
        scaled_layers((layer,), 32, 16)


def test_the_number_of_layers_that_is_advised_is_enough():
    with pytest.raises(RecipeError) as caught:
        scaled_layers((1, 2, 3), 4, 2)
    advised = re.search(r"use (\d+) or more", str(caught.value))
    assert advised is not None
    assert len(scaled_layers((1, 2, 3), 4, int(advised[1]))) == 3


def test_grouped_heads_need_fewer_flops_and_less_cache():
    grouped, whole = SMALL, replace(SMALL, num_kv_heads=2)
    assert prefill_flops(grouped, FULL, 0) < prefill_flops(whole, FULL, 0)
    half, one = (kv_cache_bytes(spec, FULL, text_tokens=0, num_images=1, dtype="float16") for spec in (grouped, whole))
    assert 2 * half == one
