"""Which of several measured candidates wins, of figures that are made up."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tokexport.engines.cost_budget import Allowance, parse_budgets
from tokexport.engines.evaluation_data import open_dialogues
from tokexport.engines.recipe_comparison import RecipeComparison
from tokexport.engines.search_outcome import Outcome, judged
from tokexport.engines.search_space import Candidate
from tokexport.engines.verdicts import Contestant
from tokexport.exporter.export import design
from tokexport.exporter.plan import TokenPlan
from tokexport.recipes.load import load_recipe

BASE = design(load_recipe("mini_full"))
FULL = TokenPlan.uncompressed(BASE.model.spec)
# A hundred dialogues of three questions.
ASKED = open_dialogues(dialogues=100)
HALF = Allowance.of(parse_budgets(["kv=0.5"]), BASE.model.spec, text_tokens=36, dtype="float32")


def measured(name: str, tokens: int, right: Sequence[int], **changes: Any) -> tuple[Candidate, Contestant]:
    """Return a candidate with so many tokens, that answers the questions from ``right[0]`` to before ``right[1]``."""
    plan = FULL.thinned_before_llm(tokens)
    is_control = bool(changes.get("is_control"))
    candidate = Candidate(
        recipe=replace(BASE.recipe, name=name),
        form=None,
        plan=plan,
        methods=("sample",) if is_control else ("adsc",),
        is_control=is_control,
        costs=HALF.costs(plan),
    )
    index_Q = np.arange(300)
    scores_Q = ((right[0] <= index_Q) & (index_Q < right[1])).astype(np.float64)
    contestant = Contestant(
        recipe=name,
        is_control=is_control,
        tokens=tokens,
        accuracy=float(scores_Q.mean()),
        interval=(0.0, 1.0),
        ttft_ms=changes.get("ttft_ms", 50.0),
        scores_Q=scores_Q,
    )
    return candidate, contestant


def decide(
    *found: tuple[Candidate, Contestant], methods: Sequence[str] = (), budget: str = "kv=0.5", full_ms: float = 100.0
) -> Outcome:
    rows = [{"recipe": "mini_full", "compressed": False, "accuracy": 0.95, "ttft_ms": {"median": full_ms}}]
    rows += [
        {"recipe": one.recipe, "compressed": True, "is_control": one.is_control, "ttft_ms": {"median": one.ttft_ms}}
        for _, one in found
    ]
    compared = RecipeComparison(
        rows=tuple(rows), verdicts=(), losses=(), failures={}, settings={}, contestants=tuple(one for _, one in found)
    )
    return judged(compared, [one for one, _ in found], HALF, parse_budgets([budget]), methods, ASKED)


def winner_of(outcome: Outcome) -> str | None:
    return None if outcome.winner is None else outcome.winner.recipe.name


GOOD, FAIR = measured("good", 250, (0, 270)), measured("fair", 240, (0, 210))
# Six answers fewer right in two dialogues, and six or five more in two others.
LIKE_GOOD, CHEAPER = measured("like good", 250, (6, 276)), measured("cheaper", 200, (6, 275))


def test_the_most_accurate_wins():
    assert winner_of(decide(FAIR, GOOD)) == "good"


def test_of_equals_the_cheaper_wins_and_the_others_are_named():
    outcome = decide(GOOD, CHEAPER, FAIR)
    assert (winner_of(outcome), outcome.tied) == ("cheaper", ("good",))
    assert any("by at most one standard error, and a higher cost: good (" in text for text in outcome.summary)


def test_a_cheaper_one_that_is_worse_by_more_than_a_standard_error_does_not_win():
    """Three answers fewer in one dialogue of a hundred: 1.0 points, the error is 0.8, and the interval has zero."""
    outcome = decide(GOOD, measured("cheaper", 200, (3, 270)))
    assert (winner_of(outcome), outcome.tied) == ("good", ())


def test_of_equals_at_one_cost_the_more_accurate_wins():
    better = measured("better", 250, (0, 272))
    assert winner_of(decide(GOOD, better, LIKE_GOOD)) == "better"


def test_what_takes_more_than_the_budget_does_not_win():
    outcome = decide(FAIR, measured("large", 400, (0, 300)))
    assert winner_of(outcome) == "fair"
    assert [entry.load <= 1 for entry in outcome.entries] == [False, True]  # the dearest first


def test_a_time_counts_as_it_was_measured_beside_the_uncompressed_model():
    slow, fast = measured("slow", 200, (0, 270), ttft_ms=61.0), measured("fast", 250, (0, 210), ttft_ms=59.0)
    assert winner_of(decide(slow, fast, budget="ttft=0.5", full_ms=120.0)) == "fast"
    assert winner_of(decide(slow, fast, budget="ttft=0.5", full_ms=130.0)) == "slow"


def test_without_any_that_meets_the_budget_the_nearest_is_named():
    outcome = decide(measured("large", 400, (0, 300)), measured("larger", 500, (0, 300)))
    assert winner_of(outcome) is None
    (text,) = outcome.summary
    assert text.startswith("none of the 2 that were measured meets the budgets; the nearest is large with ")
    assert text.endswith(" MB of kv where 3.8 MB are allowed; allow more")


def test_a_control_that_is_as_good_is_said():
    control = measured("control", 255, (0, 268), is_control=True)
    outcome = decide(measured("method", 250, (0, 270)), control)
    assert winner_of(outcome) == "method"
    assert [verdict.control for verdict in outcome.controls] == ["control"]
    assert outcome.summary[-1] == (
        "it is not distinguishably better than a control that costs no more: control (-0.7 points at 48 % of full, the "
        "winner is at 47 %)"
    )


def test_a_control_that_is_as_good_at_a_higher_cost_is_said():
    outcome = decide(CHEAPER, measured("control", 250, (0, 270), is_control=True), methods=("adsc",))
    assert winner_of(outcome) == "cheaper"
    assert outcome.summary[-1].startswith(
        "a control is as good at a higher cost that meets the budgets too: control (+0.3"
    )


def test_a_control_that_is_worse_is_said():
    outcome = decide(GOOD, measured("control", 250, (0, 210), is_control=True))
    assert outcome.controls == ()
    assert outcome.summary[-1] == "it is more accurate than every control that meets the budgets (1 measured)"


def test_without_a_control_nothing_is_claimed():
    assert decide(GOOD).summary[-1].startswith("no control that meets the budgets was measured, so it is not known")


def test_a_control_may_win_unless_methods_are_asked_for():
    control = measured("control", 200, (0, 285), is_control=True)
    assert winner_of(decide(GOOD, control)) == "control"
    assert decide(GOOD, control).summary[-1].startswith("it is a control: no method that chooses tokens")
    asked = decide(GOOD, control, methods=("adsc",))
    assert winner_of(asked) == "good"
    assert "control (+5.0 points at 39 % of full" in asked.summary[-1]
    assert decide(control, methods=("adsc",)).summary[0].startswith("only controls meet the budgets, e.g. control, and")


@pytest.mark.parametrize(
    ("other", "is_pareto"),
    [(measured("x", 260, (0, 270)), False), (measured("x", 240, (0, 100)), True), (measured("x", 250, (0, 270)), True)],
    ids=["dearer and as accurate", "cheaper and worse", "the same"],
)
def test_the_pareto_set_is_what_nothing_else_beats(other: tuple[Candidate, Contestant], is_pareto: bool):
    entries = {entry.name: entry.is_pareto for entry in decide(GOOD, other).entries}
    assert entries == {"good": True, "x": is_pareto}
