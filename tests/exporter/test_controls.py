"""The controls by hand: which tokens sample, random and resize keep, and what they refuse."""

from dataclasses import replace

import pytest
import torch

from tests.exporter.test_methods import FULL, SPEC, drops, kept_features
from tokexport.errors import RecipeError
from tokexport.exporter.method import Method, plan_tokens
from tokexport.exporter.methods.random import Random
from tokexport.exporter.methods.resize import Resize
from tokexport.exporter.methods.sample import Sample
from tokexport.exporter.modules.bottleneck import FeatureGather
from tokexport.exporter.plan import TokenPlan

# --- sample and random by hand


@pytest.mark.parametrize(
    ("keep", "phase", "expected"),
    [(4, 0.5, (2, 6, 10, 14)), (4, 0.0, (0, 4, 8, 12)), (0.25, 0.5, (2, 6, 10, 14)), (2, 0.5, (4, 12))],
)
def test_sample_keeps_equidistant_tokens(keep: float, phase: float, expected: tuple[int, ...]):
    assert kept_features(Sample(keep=keep, phase=phase)) == expected


@pytest.mark.parametrize(
    ("keep", "phase", "expected"),
    [
        (4, 0.5, (5, 7, 13, 15)),
        (0.25, 0.0, (0, 2, 8, 10)),
        (6, 0.0, (0, 1, 2, 8, 9, 10)),
        (0.4, 0.5, (4, 6, 7, 12, 14, 15)),
    ],
)
def test_sample_keeps_rows_and_columns_at_equal_distances(keep: float, phase: float, expected: tuple[int, ...]):
    method = Sample(keep=keep, pattern="grid", phase=phase)
    assert kept_features(method) == expected
    plan = method.plan(SPEC, FULL)
    assert plan.grid == (2, len(expected) // 2)
    # What is left is a grid for what comes behind.
    assert Sample(keep=2, pattern="grid").plan(SPEC, plan).entering_llm == 2


def test_random_keeps_tokens_in_their_order_each_at_most_once():
    kept = kept_features(Random(keep=7))
    assert len(kept) == 7
    assert list(kept) == sorted(set(kept))
    assert 0 <= kept[0] <= kept[-1] < 16


def test_random_keeps_the_same_tokens_every_time():
    assert kept_features(Random(keep=7, seed=3)) == kept_features(Random(keep=7, seed=3))


def test_another_seed_keeps_other_tokens():
    assert len({kept_features(Random(keep=7, seed=seed)) for seed in range(4)}) == 4


def test_the_random_choice_is_that_of_yesterday():
    assert kept_features(Random(keep=4)) == (0, 6, 12, 15)


@pytest.mark.parametrize("method", [Sample(keep=4), Random(keep=4)], ids=["sample", "random"])
def test_what_enters_the_model_is_thinned_for_every_layer(method: Method):
    plan = method.plan(SPEC, FULL)
    assert (plan.emitted, plan.entering_llm, plan.per_layer, plan.grid) == (16, 4, (4, 4, 4, 4), None)


def test_a_feature_gather_takes_the_rows_of_its_index():
    features = torch.arange(8.0).reshape(1, 4, 2)
    assert FeatureGather((1, 3))(features).tolist() == [[[2, 3], [6, 7]]]


# --- resize by hand


@pytest.mark.parametrize(("keep", "side"), [(4, 2), (9, 3), (0.25, 2), (0.5, 3), (0.4, 2), (0.45, 3)])
def test_resize_takes_a_square_or_the_nearest_to_a_fraction(keep: float, side: int):
    # 0.4 of 16 tokens are 6, two from 4 and three from 9; 0.45 are 7.
    assert Resize(keep=keep).tower_grid(SPEC, FULL) == (side, side)


def test_of_a_smaller_image_the_tower_emits_fewer_tokens():
    assert Resize(keep=9).plan(SPEC, FULL) == TokenPlan(emitted=9, entering_llm=9, per_layer=(9, 9, 9, 9), grid=(3, 3))


def test_a_smaller_image_is_still_a_grid_for_adsc():
    arriving = Resize(keep=9).plan(SPEC, FULL)
    # 6 of 3 x 3 are 2 rows of 3; of these the first, second and third column is every one.
    assert drops((1, 6), pattern="grid").indices(SPEC, arriving) == {1: (0, 1, 2, 3, 4, 5)}


@pytest.mark.parametrize("method", [drops((1, 8)), Sample(keep=4), Random(keep=4)], ids=["adsc", "sample", "random"])
def test_only_resize_changes_what_the_tower_sees(method: Method):
    assert method.tower_grid(SPEC, FULL) is None


@pytest.mark.parametrize(
    ("keep", "nearest"),
    [(6, "4 or 9"), (12, "9"), (16, "9"), (25, "9"), (3, "4"), (1, "4"), (0, "4"), (-4, "4"), (0.9, "9"), (0.12, "4")],
)
def test_a_number_that_no_smaller_image_gives_is_refused_with_the_nearest(keep: float, nearest: str):
    with pytest.raises(RecipeError, match=rf"from 2 x 2 to 3 x 3; choose {nearest}$"):
        Resize(keep=keep).plan(SPEC, FULL)


@pytest.mark.parametrize(
    ("grid", "text"),
    [
        ((2, 8), "[[compress]] resize: the vision tower has 2 x 8 patches, expected a square; choose another method"),
        ((2, 2), "[[compress]] resize: no smaller square of at least 2 x 2 fits into the 2 x 2 patches of the vision"),
    ],
)
def test_a_tower_whose_grid_has_no_smaller_square_is_refused(grid: tuple[int, int], text: str):
    spec = replace(SPEC, vision_grid=grid)
    with pytest.raises(RecipeError) as caught:
        plan_tokens([Resize(keep=4)], spec)
    assert str(caught.value).startswith(text)
