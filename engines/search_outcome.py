"""Which measured candidate wins, and what has to be said of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokexport.engines.cost_budget import NAMES, Allowance, CostBudget, Kind, amount_text
from tokexport.engines.evaluation_data import DialogueSet
from tokexport.engines.intervals import COVERAGE
from tokexport.engines.recipe_comparison import RecipeComparison
from tokexport.engines.search_space import Candidate
from tokexport.engines.verdicts import Contestant, Verdict, judge

# Counts are whole, so a control at the same cost is not always at quite the same.
_AS_CHEAP = 1.05
# A 95 % interval reaches 1.96 standard errors to either side.
_ERRORS_OF_AN_INTERVAL = 2 * NormalDist().inv_cdf(0.5 + COVERAGE / 2)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A measured candidate.

    Attributes:
        candidate: that was measured.
        contestant: as it is judged.
        row: of the comparison.
        costs: by plan, the time by the clock.
        load: the largest part of any budget that it takes up.
        price: its budgeted costs beside the uncompressed model's, on average.
        is_pareto: whether none is at least as accurate and costs no more, and better in one of them.
        may_win: whether it meets the budgets and is of a method that was asked for.
    """

    candidate: Candidate
    contestant: Contestant
    row: Mapping[str, Any]
    costs: Mapping[Kind, float]
    load: float
    price: float
    is_pareto: bool
    may_win: bool

    @property
    def name(self) -> str:
        """The recipe's."""
        return self.contestant.recipe

    def report(self) -> dict[str, Any]:
        """Return the row for ``search.json``."""
        return {
            **self.row,
            "description": self.candidate.recipe.description,
            "costs": dict(self.costs),
            "meets_budgets": self.load <= 1,
            "is_pareto": self.is_pareto,
        }


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was found.

    Attributes:
        entries: the measured candidates, the dearest first.
        winner: None where none meets the budgets.
        tied: those that are more accurate than the winner, by no more than one standard error, and cost more.
        controls: how the winner stands to each control that meets the budgets and is not worse than it.
        summary: in sentences, the most important first.
        full: the row of the uncompressed model.
        allowance: the budgets as amounts, times as they were measured.
    """

    entries: tuple[Entry, ...]
    winner: Candidate | None
    tied: tuple[str, ...]
    controls: tuple[Verdict, ...]
    summary: tuple[str, ...]
    full: Mapping[str, Any]
    allowance: Allowance

    def report(self) -> dict[str, Any]:
        """Return its part of ``search.json``."""
        return {
            "summary": list(self.summary),
            "winner": None if self.winner is None else self.winner.recipe.name,
            "tied": list(self.tied),
            "controls_as_good": [verdict.report() for verdict in self.controls],
            "full": dict(self.full),
            "limits": self.allowance.report(),
            "rows": [entry.report() for entry in self.entries],
        }


def judged(
    compared: RecipeComparison,
    candidates: Sequence[Candidate],
    allowance: Allowance,
    budgets: Sequence[CostBudget],
    methods: Sequence[str],
    asked: DialogueSet,
) -> Outcome:
    """Return which candidate wins: the most accurate that meets the budgets, of equals the one that costs least.

    Equal are those whose accuracy is within one standard error of the best one's, of the difference paired by question
    (the one-standard-error rule; Breiman et al., Classification and Regression Trees, 1984, section 3.4.3).

    Args:
        compared: the candidates built, evaluated and measured beside the uncompressed model.
        candidates: that were compared.
        allowance: the budgets as amounts. A limit of time is taken anew from the uncompressed model, measured in turns
            with the candidates.
        budgets: as they were given.
        methods: that may win, all if none is given.
        asked: the dialogues.
    """
    full = next(row for row in compared.rows if not row["compressed"])
    allowance = allowance.measured(budgets, full["ttft_ms"]["median"])
    entries = _entries(compared, candidates, allowance, methods)
    able = [entry for entry in entries if entry.may_win]
    if not able:
        summary = _nothing_found(entries, allowance)
        return Outcome(
            entries=entries, winner=None, tied=(), controls=(), summary=(summary,), full=full, allowance=allowance
        )
    dialogue_Q = asked.dialogue_numbers()
    best = max(able, key=lambda entry: (entry.contestant.accuracy, -entry.price))
    equal = [entry for entry in able if entry is best or _within_one_error(best, entry, dialogue_Q)]
    winner = min(equal, key=lambda entry: (entry.price, -entry.contestant.accuracy))
    tied = [entry for entry in equal if entry.contestant.accuracy > winner.contestant.accuracy]
    verdicts = {
        entry.name: judge(winner.contestant, entry.contestant, dialogue_Q)
        for entry in entries
        if entry.candidate.is_control and entry is not winner and entry.load <= 1
    }
    as_good = [entry for entry in entries if entry.name in verdicts and verdicts[entry.name].accuracy != "better"]
    return Outcome(
        entries=entries,
        winner=winner.candidate,
        tied=tuple(entry.name for entry in tied),
        controls=tuple(verdicts[entry.name] for entry in as_good),
        summary=tuple(_summary(winner, allowance, full, tied, as_good, num_controls=len(verdicts))),
        full=full,
        allowance=allowance,
    )


def _within_one_error(best: Entry, other: Entry, dialogue_Q: NDArray[np.int64]) -> bool:
    verdict = judge(best.contestant, other.contestant, dialogue_Q)
    assert verdict.difference is not None
    assert verdict.difference_interval is not None
    low, high = verdict.difference_interval
    return verdict.difference <= (high - low) / _ERRORS_OF_AN_INTERVAL


def _entries(
    compared: RecipeComparison,
    candidates: Sequence[Candidate],
    allowance: Allowance,
    methods: Sequence[str],
) -> tuple[Entry, ...]:
    contestants = {one.recipe: one for one in compared.contestants}
    rows = {row["recipe"]: row for row in compared.rows}
    able = [candidate for candidate in candidates if candidate.recipe.name in contestants]
    costs = {
        candidate.recipe.name: _costs(candidate, rows[candidate.recipe.name], list(allowance.limits))
        for candidate in able
    }
    points = {name: (contestants[name].accuracy, costs[name]) for name in costs}
    entries: list[Entry] = []
    for candidate in able:
        name = candidate.recipe.name
        load = allowance.load(costs[name])
        entries.append(
            Entry(
                candidate=candidate,
                contestant=contestants[name],
                row=rows[name],
                costs=costs[name],
                load=load,
                price=allowance.price(costs[name]),
                is_pareto=not any(_dominates(other, points[name]) for other in points.values()),
                may_win=load <= 1 and candidate.is_of(methods),
            )
        )
    return tuple(sorted(entries, key=lambda entry: -entry.price))


def _costs(candidate: Candidate, row: Mapping[str, Any], kinds: Sequence[Kind]) -> dict[Kind, float]:
    return {kind: row["ttft_ms"]["median"] if kind == "ttft" else candidate.costs[kind] for kind in kinds}


def _dominates(one: tuple[float, Mapping[Kind, float]], other: tuple[float, Mapping[Kind, float]]) -> bool:
    no_worse = one[0] >= other[0] and all(one[1][kind] <= other[1][kind] for kind in one[1])
    return no_worse and (one[0] > other[0] or any(one[1][kind] < other[1][kind] for kind in one[1]))


def _nothing_found(entries: Sequence[Entry], allowance: Allowance) -> str:
    if not entries:
        return "none of the finalists could be built, evaluated and measured; see why in search.md"
    nearest = min(entries, key=lambda entry: entry.load)
    if nearest.load <= 1:
        return (
            f"only controls meet the budgets, e.g. {nearest.name}, and --method leaves them out; allow more, or add "
            "their methods"
        )
    return (
        f"none of the {len(entries)} that were measured meets the budgets; the nearest is {nearest.name} with "
        f"{allowance.excess(nearest.costs)}; allow more"
    )


def _summary(
    winner: Entry,
    allowance: Allowance,
    full: Mapping[str, Any],
    tied: Sequence[Entry],
    controls: Sequence[Entry],
    *,
    num_controls: int,
) -> list[str]:
    accuracy = winner.contestant.accuracy
    costs = ", ".join(
        f"{NAMES[kind]} {amount_text(kind, cost)} ({100 * cost / allowance.full[kind]:.1f} % of full)"
        for kind, cost in winner.costs.items()
    )
    lines = [
        f"the winner is {winner.name}: accuracy {100 * accuracy:.1f} %, {100 * full['accuracy']:.1f} % without "
        f"compression; {costs}"
    ]

    def beside(others: Sequence[Entry]) -> str:
        return ", ".join(
            f"{one.name} ({100 * (one.contestant.accuracy - accuracy):+.1f} points at {100 * one.price:.0f} % of full, "
            f"the winner is at {100 * winner.price:.0f} %)"
            for one in others
        )

    if tied:
        lines.append(
            f"more right answers, by at most one standard error, and a higher cost: {beside(tied)}; more --dialogues "
            "tell finer differences"
        )
    no_dearer = [one for one in controls if one.price <= _AS_CHEAP * winner.price]
    if winner.candidate.is_control:
        lines.append("it is a control: no method that chooses tokens, or was trained to, is worth more than it here")
    elif no_dearer:
        lines.append(f"it is not distinguishably better than a control that costs no more: {beside(no_dearer)}")
    elif controls:
        lines.append(f"a control is as good at a higher cost that meets the budgets too: {beside(controls)}")
    elif num_controls:
        lines.append(f"it is more accurate than every control that meets the budgets ({num_controls} measured)")
    else:
        lines.append(
            "no control that meets the budgets was measured, so it is not known whether the method is worth it"
        )
    return lines
