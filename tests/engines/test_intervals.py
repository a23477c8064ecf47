"""Intervals of data whose spread is known."""

import numpy as np
import pytest
from numpy.typing import NDArray

from tokexport.engines import intervals
from tokexport.engines.intervals import ratio_intervals


def accuracy_interval(scores_L: NDArray[np.float64], questions: int = 1) -> tuple[float, float]:
    """Return the interval of dialogues whose questions all have the same score."""
    above_LC = questions * scores_L[:, None]
    return ratio_intervals(above_LC, np.full_like(above_LC, questions))[0]


def half_right(num_dialogues: int) -> NDArray[np.float64]:
    return (np.arange(num_dialogues) % 2).astype(np.float64)


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_dialogues_that_are_all_alike_have_no_spread(score: float):
    assert accuracy_interval(np.full(20, score)) == (score, score)


@pytest.mark.parametrize("num_dialogues", [100, 400, 2000])
def test_half_right_has_the_spread_of_the_binomial(num_dialogues: int):
    margin = 1.96 * np.sqrt(0.25 / num_dialogues)
    assert accuracy_interval(half_right(num_dialogues)) == pytest.approx((0.5 - margin, 0.5 + margin), abs=margin / 8)


def test_more_questions_on_the_same_image_tell_nothing_more_if_they_fall_together():
    assert accuracy_interval(half_right(100), questions=4) == accuracy_interval(half_right(100))


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [accuracy_interval((rng.random(60) < 0.7).astype(np.float64)) for _ in range(200)]
    assert 0.90 <= np.mean([low <= 0.7 <= high for low, high in found]) <= 0.98


def test_the_interval_is_the_same_every_time():
    assert accuracy_interval(half_right(30)) == accuracy_interval(half_right(30))


def test_many_dialogues_are_drawn_in_blocks(monkeypatch: pytest.MonkeyPatch):
    whole = accuracy_interval(half_right(30))
    monkeypatch.setattr(intervals, "_MAX_DRAWS", 30 * 7)
    assert accuracy_interval(half_right(30)) == whole


def test_a_kind_that_a_resample_lacks_is_left_out_of_it():
    # The kind is asked in one dialogue of three only, and answered right there.
    above_LC, below_LC = np.array([[0.0], [0.0], [1.0]]), np.array([[0.0], [0.0], [1.0]])
    assert ratio_intervals(above_LC, below_LC) == [(1.0, 1.0)]
