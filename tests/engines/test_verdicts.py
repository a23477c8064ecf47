"""Verdicts on methods beside their controls."""

from typing import Any

import numpy as np
import pytest

from tokexport.engines.comparison_text import verdict_cells, verdict_remarks
from tokexport.engines.verdicts import Contestant, Verdict, find_verdicts

# A hundred dialogues of two questions.
DIALOGUES = np.repeat(np.arange(100), 2)


def contestant(recipe: str, scores: np.ndarray[Any, Any] | None = None, **changes: Any) -> Contestant:
    accuracy = 0.5 if scores is None else float(scores.mean())
    usual: dict[str, Any] = {
        "is_control": recipe != "method",
        "tokens": 100.0,
        "accuracy": accuracy,
        "interval": (accuracy - 0.1, accuracy + 0.1),
        "ttft_ms": 50.0,
        "scores_Q": scores,
    }
    return Contestant(recipe=recipe, **(usual | changes))


def right(first: int, last: int) -> np.ndarray[Any, Any]:
    """Return scores with the questions from ``first`` to before ``last`` right."""
    index_Q = np.arange(200)
    return ((first <= index_Q) & (index_Q < last)).astype(np.float64)


def judge(*contestants: Contestant) -> Verdict:
    (verdict,) = find_verdicts(contestants, DIALOGUES)
    return verdict


@pytest.mark.parametrize(
    ("method", "control", "word", "gained", "lost"),
    [
        (right(0, 120), right(0, 100), "better", 20, 0),
        (right(0, 100), right(0, 120), "worse", 0, 20),
        (right(0, 100), right(0, 100), "not distinguishable", 0, 0),
        # As many gained as lost.
        (right(0, 100), right(20, 120), "not distinguishable", 20, 20),
    ],
    ids=["better", "worse", "equal", "other questions"],
)
def test_accuracy_is_judged_by_the_paired_difference(
    method: np.ndarray[Any, Any], control: np.ndarray[Any, Any], word: str, gained: int, lost: int
):
    verdict = judge(contestant("method", method), contestant("sample", control))
    assert (verdict.accuracy, verdict.basis) == (word, "paired")
    assert (verdict.gained, verdict.lost) == (gained, lost)
    assert verdict.difference == pytest.approx((gained - lost) / 200)


def test_questions_of_one_dialogue_are_resampled_together():
    """20 of 200 gained, in 10 dialogues, have the spread of 10 in 100, not of 20 in 200."""
    verdict = judge(contestant("method", right(0, 120)), contestant("sample", right(0, 100)))
    assert verdict.difference_interval is not None
    low, high = verdict.difference_interval
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(0.1 * 0.9 / 100), rel=0.15)


def test_without_answers_the_intervals_decide_and_tell_less_apart():
    method, control = contestant("method", right(0, 120)), contestant("sample", accuracy=0.5)
    verdict = judge(method, control)
    assert (verdict.accuracy, verdict.basis, verdict.gained) == ("not distinguishable", "intervals", None)
    assert verdict.difference_interval == pytest.approx((-0.1, 0.3))
    assert judge(method, contestant("sample", accuracy=0.3, interval=(0.2, 0.4))).accuracy == "better"


@pytest.mark.parametrize(("tokens", "control"), [(110.0, "sample"), (90.0, "sample"), (110.1, None), (89.9, None)])
def test_a_control_is_at_most_a_tenth_apart(tokens: float, control: str | None):
    verdict = judge(contestant("method", right(0, 9)), contestant("sample", right(0, 9), tokens=tokens))
    assert verdict.control == control
    assert (verdict.accuracy is None) == (control is None)


def test_the_nearest_control_is_taken_and_of_equally_near_ones_the_best():
    near = [contestant("resize", right(0, 150), tokens=104.0), contestant("random", right(0, 50), tokens=98.0)]
    method = contestant("method", right(0, 100))
    assert judge(method, *near).control == "random"
    assert judge(method, *near, contestant("sample", right(0, 60), tokens=102.0)).control == "sample"


def test_a_control_has_the_precision_of_the_method():
    method = contestant("method", right(0, 100), precision="int8")
    assert judge(method, contestant("sample", right(0, 100))).control is None
    assert judge(method, contestant("sample@int8", right(0, 100), tokens=95.0, precision="int8")).control is not None


def test_the_time_to_the_first_token_is_given_beside_the_controls():
    verdict = judge(contestant("method", right(0, 9), ttft_ms=60.0), contestant("sample", right(0, 9)))
    assert verdict.ttft_ratio == pytest.approx(1.2)


def test_a_verdict_reads_as_a_line():
    verdict = judge(contestant("method", right(0, 120), ttft_ms=60.0), contestant("sample", right(0, 100)))
    cells = verdict_cells(verdict.report())
    assert cells[:4] == ["method", "sample (100 tokens)", "better", "+10.0"]
    assert cells[5] == "1.20 x"
    assert verdict_cells(Verdict(recipe="alone").report())[:2] == ["alone", "none within 10 % of its tokens"]


def test_it_is_said_which_verdicts_are_not_paired():
    verdict = judge(contestant("method", right(0, 120)), contestant("sample"))
    (remark,) = verdict_remarks([verdict.report()])
    assert remark.startswith("Of method and the control not all answers")
