"""Whether the comparators tell rounding from damage."""

import math
import tomllib
from collections.abc import Callable
from dataclasses import asdict
from importlib import resources
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from tokexport.engines.compare import (
    Check,
    Kind,
    Tolerance,
    compare_choices,
    compare_counts,
    compare_indices,
    compare_kept,
    compare_tensors,
    difference_of,
    load_tolerances,
    misplaced_tokens,
)
from tokexport.errors import RecipeError
from tokexport.exporter.plan import DTYPE_BYTES
from tokexport.recipes.tables import parse_table

QUANTIZATION = ("int8", "int4", "bytes")

Damage = Callable[[NDArray[np.float32]], NDArray[np.float32]]

TIGHT = Tolerance(absolute=1e-4, reason="for the test")


def logits() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)


def with_value(value: float) -> Damage:
    def damage(x: NDArray[np.float32]) -> NDArray[np.float32]:
        damaged = x.copy()
        damaged[2, 3] = value
        return damaged

    return damage


def test_equal_tensors_pass():
    assert compare_tensors("logits", logits(), logits(), TIGHT).passed


def test_rounding_passes():
    assert compare_tensors("logits", logits() + 5e-5, logits(), TIGHT).passed


@pytest.mark.parametrize(
    "damage",
    [
        lambda x: x + 1e-3,
        lambda x: x[:, ::-1],
        lambda x: x[::-1],
        np.zeros_like,
        with_value(math.nan),
        with_value(math.inf),
        lambda x: x[:-1],
        lambda x: x.T,
        lambda x: x[:0],
    ],
    ids=["shifted", "reordered", "other order of rows", "zeroed", "nan", "inf", "shorter", "transposed", "empty"],
)
def test_damaged_tensors_fail(damage: Damage):
    assert not compare_tensors("logits", damage(logits()), logits(), TIGHT).passed


def test_values_that_should_be_finite_and_are_not_fail_even_where_the_expected_ones_are_not():
    broken = with_value(math.nan)(logits())
    assert not compare_tensors("logits", broken, broken, TIGHT).passed


@pytest.mark.parametrize("tolerance", [TIGHT, Tolerance(relative=2e-2, reason="for the test")], ids=["abs", "rel"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_an_expected_value_that_is_not_finite_fails(value: float, tolerance: Tolerance):
    assert not compare_tensors("logits", logits(), with_value(value)(logits()), tolerance).passed


def test_the_difference_on_the_bound_passes():
    tolerance = Tolerance(absolute=0.25, reason="for the test")
    assert compare_tensors("x", np.array([1.25]), np.array([1.0]), tolerance).passed


def test_a_relative_bound_is_a_part_of_the_largest_value_expected():
    tolerance = Tolerance(relative=0.1, reason="for the test")
    check = compare_tensors("x", np.array([-20.0, 1.0]), np.array([-20.0, 3.0]), tolerance)
    assert check.tolerance == pytest.approx(2.0)
    assert check.passed


def test_numbers_of_a_check_are_those_worked_out_by_hand():
    check = compare_tensors("x", np.array([3.0, 0.0]), np.array([0.0, 4.0]), TIGHT, step="s", graph="g", layer=7)
    assert (check.max_abs_diff, check.mean_abs_diff, check.cosine, check.norm_ratio) == (4.0, 3.5, 0.0, 0.75)
    assert (check.step, check.graph, check.layer) == ("s", "g", 7)


def test_a_bound_on_the_norm_is_a_part_of_what_is_expected():
    expected, found = np.array([3.0, 4.0]), np.array([3.0, 4.5])
    for bound, passed in ((0.11, True), (0.09, False)):
        check = compare_tensors("x", found, expected, Tolerance(norm=bound, reason="for the test"))
        assert (check.passed, check.norm_diff, check.tolerance) == (passed, pytest.approx(0.1), bound)
        assert difference_of(asdict(check)) == pytest.approx(0.1)
    assert difference_of(asdict(compare_tensors("x", found, expected, TIGHT))) == 0.5


def test_counts_name_the_first_part_that_differs():
    check = compare_counts("numbers", {"a": 0, "b": 2, "c": 3})
    assert (check.passed, check.max_abs_diff, check.note) == (False, 5, "5 numbers differ, the first in b")
    assert compare_counts("numbers", {"a": 0}).passed


def test_another_shape_is_named():
    check = compare_tensors("x", np.zeros((2, 3)), np.zeros((3, 2)), TIGHT)
    assert check.note == "shape (2, 3), expected (3, 2)"


def test_two_tensors_without_elements_are_equal():
    assert compare_tensors("x", np.zeros((0, 4)), np.zeros((0, 4)), TIGHT).passed


def test_small_integers_are_compared_without_wrapping_around():
    check = compare_tensors("x", np.array([0], np.uint8), np.array([1], np.uint8), TIGHT)
    assert check.max_abs_diff == 1


def test_equal_choices_pass_without_a_note():
    check = compare_choices("tokens", logits() + 1e-5, logits(), TIGHT)
    assert (check.passed, check.note) == (True, "")


def test_another_choice_between_almost_equal_logits_is_a_near_tie():
    expected = np.array([[1.0, 1.0001, 0.0], [0.0, 0.0, 2.0]], np.float32)
    found = np.array([[1.0001, 1.0, 0.0], [0.0, 0.0, 2.0]], np.float32)
    check = compare_choices("tokens", found, expected, TIGHT)
    assert (check.passed, check.max_abs_diff, check.note) == (True, 0.0, "1 near-ties")


def test_another_choice_between_different_logits_is_wrong():
    expected = np.array([[1.0, 1.1, 0.0], [0.0, 0.0, 2.0]], np.float32)
    found = np.array([[1.1, 1.0, 0.0], [0.0, 0.0, 2.0]], np.float32)
    check = compare_choices("tokens", found, expected, TIGHT)
    assert (check.passed, check.max_abs_diff, check.cosine) == (False, 1.0, 0.0)


def test_a_near_tie_excuses_no_other_wrong_choice():
    expected = np.array([[1.0, 1.0001], [0.0, 2.0]], np.float32)
    found = np.array([[1.0001, 1.0], [2.0, 0.0]], np.float32)
    assert not compare_choices("tokens", found, expected, TIGHT).passed


def test_choices_of_another_number_of_steps_fail():
    check = compare_choices("tokens", logits()[:-1], logits(), TIGHT)
    assert (check.passed, check.note) == (False, "shape (4, 32), expected (5, 32)")


def test_equal_indices_pass():
    assert compare_indices("kept", np.array([0, 2, 4]), np.array([0, 2, 4])).passed


@pytest.mark.parametrize(
    ("found", "wrong"),
    [([0, 2, 5], 1.0), ([2, 0, 4], 2.0), ([0, 2], math.inf), ([], math.inf)],
    ids=["one other", "reordered", "one missing", "none"],
)
def test_other_indices_fail(found: list[int], wrong: float):
    check = compare_indices("kept", np.array(found, np.int64), np.array([0, 2, 4]))
    assert (check.passed, check.max_abs_diff) == (False, wrong)


def test_the_note_on_indices_says_how_many_are_kept():
    assert compare_indices("kept", np.array([0, 2]), np.array([0, 2, 4])).note == "2 kept, expected 3"


@pytest.mark.parametrize(
    "check",
    [
        compare_tensors("x", logits()[:-1], logits(), TIGHT, step="s", graph="g"),
        compare_tensors("x", with_value(math.nan)(logits()), logits(), TIGHT, step="s", graph="g"),
        compare_choices("x", logits()[:-1], logits(), TIGHT, step="s", graph="g"),
        compare_indices("x", np.array([0, 2]), np.array([0, 2, 4]), step="s", graph="g"),
    ],
    ids=["tensors", "tensors not finite", "choices", "indices"],
)
def test_what_cannot_be_compared_is_infinitely_far_and_keeps_its_place(check: Check):
    assert (check.passed, check.max_abs_diff, check.cosine, check.tolerance) == (False, math.inf, 0.0, 0.0)
    assert (check.name, check.step, check.graph) == ("x", "s", "g")


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_every_precision_has_a_tolerance_for_everything_compared(dtype: str):
    assert set(load_tolerances(dtype)) == set(get_args(Kind))


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_every_tolerance_has_a_reason_and_bounds_something(dtype: str):
    for tolerance in load_tolerances(dtype).values():
        assert len(tolerance.reason) > 20
        assert tolerance.bound(np.ones(1)) > 0


def test_there_are_no_tolerances_for_a_precision_that_cannot_be_exported():
    text = (resources.files("tokexport.engines") / "tolerances.toml").read_text(encoding="utf-8")
    assert set(tomllib.loads(text)) == {*DTYPE_BYTES, *QUANTIZATION}


def test_no_tolerance_of_float32_reaches_one_in_a_thousand():
    assert all(tolerance.bound(np.ones(1)) <= 1e-3 for tolerance in load_tolerances("float32").values())


def test_a_tolerance_without_a_reason_is_refused():
    with pytest.raises(RecipeError, match=r"^\[float32.logits\] needs the key 'reason'$"):
        parse_table(Tolerance, {"absolute": 1e-4}, "[float32.logits]")


# --- tokens kept for their scores

SCORES = np.array([[0.5, 0.1, 0.3, 0.29995, 0.2]], np.float32)


@pytest.mark.parametrize(
    ("kept", "ties", "wrong"),
    [
        ([0, 2], 0, 0),
        ([0, 3], 1, 0),
        ([0, 4], 0, 1),
        ([3, 4], 1, 1),
        ([1, 4], 0, 2),
        ([2, 0], 0, 2),
        ([0, 0], 0, 2),
    ],
    ids=["right", "a near-tie", "too low", "one of each", "both too low", "not in order", "one twice"],
)
def test_tokens_kept_against_their_scores_are_counted_near_ties_apart(kept: list[int], ties: int, wrong: int):
    assert misplaced_tokens(np.array([kept]), SCORES, TIGHT) == (ties, wrong)
    check = compare_kept("kept", np.array([kept]), SCORES, TIGHT)
    assert (check.passed, check.max_abs_diff) == (wrong == 0, wrong)


def test_of_equal_scores_the_first_is_right():
    exact = Tolerance(reason="for the test")
    assert misplaced_tokens(np.array([[0, 1]]), np.zeros((1, 4), np.float32), exact) == (0, 0)
    # Without any room, an equal score is still a near-tie, not an error.
    assert misplaced_tokens(np.array([[2, 3]]), np.zeros((1, 4), np.float32), exact) == (2, 0)


def test_more_tokens_than_have_scores_cannot_be_compared():
    check = compare_kept("kept", np.arange(6)[None], SCORES, TIGHT)
    assert (check.passed, check.note) == (False, "6 kept of 5")
