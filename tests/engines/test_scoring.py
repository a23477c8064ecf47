"""Right and wrong answers, worked out by hand."""

from collections.abc import Callable, Sequence

import pytest

from tokexport.engines.scoring import exact_match, normalise, normalise_vqa, vqa_accuracy

Scorer = Callable[[str, Sequence[str]], float]

EXACT = [
    ("red", ["red"], 1),
    ("Red.", ["red"], 1),
    ("  the  red\nstar! ", ["red star"], 1),
    ("two", ["2"], 1),
    ("4", ["4", "four"], 1),
    ("“yes”", ["Yes"], 1),
    ("\uff17", ["7"], 1),
    ("top left", ["left top"], 0),
    ("red star", ["red"], 0),
    ("red", ["dark red"], 0),
    ("12", ["1"], 0),
    ("-5", ["5"], 0),
    (".5", ["5"], 0),
    ("3.5", ["35"], 0),
    ("", ["red"], 0),
    ("the", ["a"], 0),
    # The letter A is an answer, not an article.
    ("A", ["a"], 1),
    ("a", ["b"], 0),
    ("", ["A"], 0),
    ("?", ["!"], 0),
]


def mistakes(scorer: Scorer) -> list[tuple[str, list[str]]]:
    return [(answer, accepted) for answer, accepted, score in EXACT if scorer(answer, accepted) != score]


def test_an_answer_is_right_if_it_is_an_accepted_one():
    assert mistakes(exact_match) == []


@pytest.mark.parametrize(
    "damaged",
    [
        lambda _answer, _accepted: 1.0,
        lambda _answer, _accepted: 0.0,
        lambda answer, accepted: float(answer in accepted),
        lambda answer, accepted: float(normalise(answer) in normalise(accepted[0])),
        lambda answer, accepted: float(normalise(accepted[0]) in normalise(answer)),
        lambda answer, accepted: float(normalise_vqa(answer) == normalise_vqa(accepted[0])),
    ],
    ids=["always right", "never right", "not normalised", "part of it", "contains it", "the other rules"],
)
def test_a_damaged_scorer_is_caught(damaged: Scorer):
    assert mistakes(damaged) != []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", "cat"),
        ("Two dogs.", "2 dogs"),
        ("none", "0"),
        ("dont", "don't"),
        ("t-shirt", "t shirt"),
        ("t - shirt", "t shirt"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("the", "the"),
    ],
)
def test_text_is_normalised_as_the_evaluation_of_vqa_does(text: str, expected: str):
    assert normalise_vqa(text) == expected


@pytest.mark.parametrize(
    ("num_matching", "expected"),
    [
        (0, 0.0),
        # One of ten said it: nine sets of nine hold it once (1/3), one not at all.
        (1, 0.3),
        (2, 0.6),
        # Seven sets hold it three times, three twice: (7 + 3 x 2/3) / 10.
        (3, 0.9),
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_soft_accuracy_leaves_one_annotator_out(num_matching: int, expected: float):
    answers = ["red"] * num_matching + ["blue"] * (10 - num_matching)
    assert vqa_accuracy("Red.", answers) == pytest.approx(expected)


def test_soft_accuracy_of_nothing_said_is_zero():
    assert vqa_accuracy("", ["red"] * 10) == 0
