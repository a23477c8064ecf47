"""The most accurate recipe that meets budgets: candidates by plan, the better in PyTorch, the best built and measured.

1. Forms of every method are set to what the budgets allow, by plan alone (``search_space``).
2. They answer dialogues in PyTorch, many of them few and the best of them more (``screening``). Recipes that are given,
   and cheaper settings of the best forms, join in the second round.
3. The finalists, and controls to judge them by, are built, proved, evaluated on other dialogues and measured, as
   ``compare`` does it. Only these figures decide.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokexport.engines.accuracy import EvalOptions
from tokexport.engines.backend import load_backend
from tokexport.engines.bench import Arm
from tokexport.engines.cost_budget import Allowance, CostBudget, FullTimes
from tokexport.engines.evaluation_data import DialogueSet
from tokexport.engines.prompt import require_askable
from tokexport.engines.recipe_comparison import artefact_of, compare_recipes, measure_recipes, require_one_model
from tokexport.engines.screening import Screened, Screening, best_of_each, survivors
from tokexport.engines.search_outcome import Outcome, judged
from tokexport.engines.search_space import Candidate, Form, as_given, at_level, bundled_recipes, forms_of
from tokexport.engines.search_text import search_markdown
from tokexport.engines.verdicts import MOST_APART
from tokexport.errors import BackendUnavailableError, InputError, RecipeError
from tokexport.exporter.bundle import write_atomically
from tokexport.exporter.export import Design, design
from tokexport.exporter.method import list_methods, load_method
from tokexport.recipes.load import recipe_toml
from tokexport.recipes.schema import Recipe

Progress = Callable[[str], None]
Tick = Callable[[int, int], None]
REPORT, TABLE, WINNER = "search.json", "search.md", "winner.toml"

# Parts of the budgets at which the best forms are also tried: what is as accurate and much cheaper is worth more.
_CHEAPER = (0.75, 0.5)
# Each round asks three times as many dialogues as the one before.
_GROWTH = 3
_FORMS_MADE_CHEAPER = 4
_REPEATS_OF_FULL = 3


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What is searched for.

    Attributes:
        budgets: all of which are to be met.
        methods: that may win; all there are if none is given.
        also: recipes to try too, for what was trained.
        finalists: how many candidates are built and measured, controls not counted.
        repeats: measured runs of each.
    """

    budgets: tuple[CostBudget, ...]
    methods: tuple[str, ...] = ()
    also: tuple[Recipe, ...] = ()
    finalists: int = 6
    repeats: int = 9

    def __post_init__(self) -> None:
        if self.finalists < 1 or self.repeats < 1:
            raise InputError(f"finalists {self.finalists} and repeats {self.repeats} must be at least 1")

    def report(self) -> dict[str, Any]:
        """Return the settings for ``search.json``."""
        also = [recipe.name for recipe in self.also]
        return {"methods": list(self.methods), "also": also, "finalists": self.finalists}


@dataclass(frozen=True, kw_only=True)
class Search:
    """The outcome; ``report`` is what ``tokexport search --json`` prints."""

    outcome: Outcome
    report: Mapping[str, Any]

    def require_winner(self) -> None:
        """Raise ``InputError`` if nothing that was measured meets the budgets."""
        if self.outcome.winner is None:
            raise InputError(self.outcome.summary[0])


def search(
    base: Recipe,
    folder: Path,
    asked: DialogueSet,
    screening: DialogueSet,
    options: EvalOptions,
    wanted: SearchOptions,
    *,
    progress: Progress = lambda _: None,
    tick: Tick = lambda _done, _total: None,
) -> Search:
    """Find the most accurate recipe that meets budgets, and write ``search.json``, ``search.md`` and ``winner.toml``.

    What is in the folder already is used again: scores of candidates, artefacts, evaluations.

    Args:
        base: the recipe without compression.
        folder: where everything goes.
        asked: dialogues that decide.
        screening: other dialogues, that candidates are chosen by.
        options: of the evaluation.
        wanted: what is searched for.
        progress: told what is being done.
        tick: told how much of it is done.

    Raises:
        InputError: a base with compression, recipes of another model, or budgets that the uncompressed model meets or
            that no candidate does.
        RecipeError: an unknown method.
        BackendUnavailableError: an engine that cannot run what is searched for.
    """
    started = time.perf_counter()
    made = _checked(base, options, wanted)
    given = _given(made, wanted.also)
    forms, left_out = forms_of(made, wanted.methods, given)
    forms += _controls(made, wanted.methods)
    allowance = _allowance(made, folder, options, wanted, progress, tick)
    progress("setting every form to the budgets")
    first = at_level(made, forms, allowance)
    ready = as_given(made, given, wanted.methods, allowance)
    _require_some([one for one in (*first, *ready) if one.is_of(wanted.methods)], allowance)
    rounds = _Rounds(made, allowance, Screening(made, folder, screening, options, progress, tick), wanted.finalists)
    screened = rounds.run(first, ready, screening.size)
    finalists = _finalists(screened, wanted.finalists, allowance)
    progress(f"building and measuring {len(finalists)} finalists")
    compared = compare_recipes(
        [base, *(one.candidate.recipe for one in finalists)],
        folder,
        asked,
        options,
        repeats=wanted.repeats,
        progress=progress,
        tick=tick,
    )
    outcome = judged(compared, [one.candidate for one in finalists], allowance, wanted.budgets, wanted.methods, asked)
    report: dict[str, Any] = {
        "base": base.name,
        "budgets": [budget.text for budget in wanted.budgets],
        **outcome.report(),
        "screened": [_screened_entry(one, allowance) for one in rounds.seen.values()],
        "left_out": dict(left_out),
        "failures": {**rounds.screening.failures, **compared.failures},
        "settings": {**compared.settings, "screening": {**screening.description, "dialogues": screening.size}}
        | wanted.report(),
        "seconds": time.perf_counter() - started,
    }
    _write(folder, report, outcome, wanted)
    return Search(outcome=outcome, report=report)


def _checked(base: Recipe, options: EvalOptions, wanted: SearchOptions) -> Design:
    """Return the design of a base that can be searched, or say why it cannot."""
    if base.compress:
        raise InputError(
            f"recipe {base.name} is compressed already ({', '.join(step.method for step in base.compress)}); give the "
            "recipe of its model without [[compress]], e.g. mini_full"
        )
    for name in wanted.methods:
        load_method(name)
    backend = load_backend(options.backend)
    if not backend.is_compressed:
        raise BackendUnavailableError(
            f"backend {options.backend!r} runs all tokens, so every recipe is the same in it; choose another"
        )
    backend.require(base.export.dtype)
    made = design(base)
    require_askable(made.model.directory)
    if wanted.also:
        uncompressed = [recipe.name for recipe in wanted.also if not recipe.compress]
        if uncompressed:
            raise InputError(f"recipe {uncompressed[0]} compresses nothing, so it is no candidate; leave it out")
        require_one_model([base, *wanted.also])
    return made


def _given(made: Design, also: Sequence[Recipe]) -> tuple[Recipe, ...]:
    """Return the recipes that ship for the model and those that the user adds, each once.

    Raises:
        InputError: two of one name, which is where each is built.
    """
    bundled = bundled_recipes(made)
    given = (*bundled, *(recipe for recipe in also if recipe not in bundled))
    names = [made.recipe.name, *(recipe.name for recipe in given)]
    for recipe in also:
        if names.count(recipe.name) > 1:
            raise InputError(f"two recipes are called {recipe.name}; give each a name of its own")
    return given


def _controls(made: Design, methods: Sequence[str]) -> tuple[Form, ...]:
    """Return forms of the controls that are not among the methods, which cannot win and are what these have to beat."""
    names = [name for name in list_methods() if methods and name not in methods and load_method(name).is_control]
    spec, table = made.model.spec, made.recipe.model
    forms: list[Form] = []
    for name in names:
        try:
            forms += [Form(method=method, model=table) for method in load_method(name).variants(spec)]
        except RecipeError:
            continue  # one control fewer
    return tuple(forms)


def _allowance(
    made: Design, folder: Path, options: EvalOptions, wanted: SearchOptions, progress: Progress, tick: Tick
) -> Allowance:
    """Return the budgets as amounts; where the time is limited, the uncompressed model is built and measured for it."""
    times, base = None, made.recipe
    if any(budget.kind == "ttft" for budget in wanted.budgets):
        bundle = artefact_of(base, folder / base.name, options, progress)
        arm = Arm(bundle=bundle, engine=options.backend, method=base.name)
        row = measure_recipes([arm], options, base.plan.text_tokens, _REPEATS_OF_FULL, progress, tick)[base.name]
        times = FullTimes(ttft_ms=row["ttft_ms"]["median"], vision_ms=row["vision_ms"], prefill_ms=row["prefill_ms"])
    return Allowance.of(
        wanted.budgets,
        made.model.spec,
        text_tokens=base.plan.text_tokens,
        dtype=base.export.dtype,
        times=times,
    )


def _require_some(candidates: Sequence[Candidate], allowance: Allowance) -> None:
    if not candidates:
        raise InputError("no method has a form that fits the model; give recipes with --also, or other methods")
    if not any(allowance.may_meet(candidate.costs) for candidate in candidates):
        nearest = min(candidates, key=lambda candidate: allowance.load(candidate.costs))
        raise InputError(
            f"no candidate meets the budgets; the nearest is {nearest.recipe.name} with "
            f"{nearest.plan.mean_vision_tokens:g} vision tokens per layer, {allowance.excess(nearest.costs)}; allow "
            "more"
        )


@dataclass
class _Rounds:
    """Rounds of screening: fewer candidates, more dialogues.

    Attributes:
        seen: by what it computes, every candidate with its last scores.
    """

    made: Design
    allowance: Allowance
    screening: Screening
    finalists: int
    seen: dict[str, Screened] = field(default_factory=dict)

    def run(self, first: Sequence[Candidate], ready: Sequence[Candidate], num_dialogues: int) -> list[Screened]:
        """Return what came into the last round, with scores of all dialogues.

        Args:
            first: forms at the budgets, which all come into the first round.
            ready: recipes as they are, which come into the second.
            num_dialogues: of the last round.
        """
        ready = [candidate for candidate in ready if self.allowance.may_meet(candidate.costs)]
        identities = {candidate.identity for candidate in ready}
        fitting = [
            candidate
            for candidate in first
            if self.allowance.may_meet(candidate.costs) and candidate.identity not in identities
        ]
        few = self._ask(fitting, max(1, num_dialogues // _GROWTH**2))
        kept = _without_repeats(
            [*survivors(few, max(2 * self.finalists, len(few) // _GROWTH), self.price), *best_of_each(few)]
        )
        second = [*ready, *(one.candidate for one in kept), *self._cheaper(kept)]
        more = self._ask(_once(second), max(1, num_dialogues // _GROWTH))
        methods, controls = _parted(more)
        last = [
            *survivors(methods, 2 * self.finalists, self.price),
            *survivors(controls, self.finalists, self.price),
        ]
        return self._ask([one.candidate for one in last], num_dialogues)

    def _ask(self, candidates: Sequence[Candidate], num_dialogues: int) -> list[Screened]:
        found = self.screening.ask(candidates, num_dialogues)
        self.seen |= {one.candidate.identity: one for one in found}
        return found

    def price(self, candidate: Candidate) -> float:
        """Return what a candidate costs."""
        return self.allowance.price(candidate.costs)

    def _cheaper(self, kept: Sequence[Screened]) -> list[Candidate]:
        """Return the best forms, and the best control, set to parts of the budgets."""
        methods, controls = (sorted(group, key=lambda one: -one.accuracy) for group in _parted(kept))
        best = [*methods[:_FORMS_MADE_CHEAPER], *controls[:1]]
        forms = [one.candidate.form for one in best if one.candidate.form is not None]
        made = [candidate for part in _CHEAPER for candidate in at_level(self.made, forms, self.allowance, part)]
        return [candidate for candidate in made if self.allowance.may_meet(candidate.costs)]


def _finalists(screened: Sequence[Screened], count: int, allowance: Allowance) -> list[Screened]:
    """Return the candidates to be built: the best ones, and controls to judge each of them by."""
    methods, controls = _parted(screened)
    chosen = survivors(methods, count, lambda candidate: allowance.price(candidate.costs))
    rivals: list[Screened] = []
    controls.sort(key=lambda one: -one.accuracy)
    for tokens in [None, *(one.candidate.plan.mean_vision_tokens for one in chosen)]:
        near = [one for one in controls if tokens is None or _apart(one, tokens) <= MOST_APART]
        if near and not any(one in rivals for one in near):
            rivals.append(near[0])
    return [*chosen, *rivals]


def _apart(one: Screened, tokens: float) -> float:
    return abs(one.candidate.plan.mean_vision_tokens - tokens) / tokens


def _parted(screened: Iterable[Screened]) -> tuple[list[Screened], list[Screened]]:
    """Return what is no control, and the controls."""
    every = list(screened)
    return [one for one in every if not one.candidate.is_control], [one for one in every if one.candidate.is_control]


def _without_repeats(screened: Iterable[Screened]) -> list[Screened]:
    return list({one.candidate.identity: one for one in screened}.values())


def _once(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return candidates that compute the same once, the first of them."""
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        found.setdefault(candidate.identity, candidate)
    return list(found.values())


def _screened_entry(one: Screened, allowance: Allowance) -> dict[str, Any]:
    candidate = one.candidate
    return {
        "recipe": candidate.recipe.name,
        "description": candidate.recipe.description,
        "origin": candidate.origin,
        "methods": list(candidate.methods),
        "is_control": candidate.is_control,
        "mean_vision_tokens": candidate.plan.mean_vision_tokens,
        "costs": {kind: candidate.costs[kind] for kind in allowance.limits},
        "accuracy": one.accuracy,
        "dialogues": len(one.scores),
    }


def _write(folder: Path, report: Mapping[str, Any], outcome: Outcome, wanted: SearchOptions) -> None:
    write_atomically(folder / REPORT, json.dumps(report, indent=2, default=str) + "\n")
    write_atomically(folder / TABLE, search_markdown(report))
    (folder / WINNER).unlink(missing_ok=True)  # of a search that had another outcome
    if outcome.winner is not None:
        write_atomically(folder / WINNER, _winner_toml(outcome.winner, wanted.budgets, outcome.summary[0]))


def _winner_toml(winner: Candidate, budgets: Sequence[CostBudget], summary: str) -> str:
    """Return the winner's recipe with every default filled in, and how it was found."""
    asked = " ".join(f"--budget {budget.text}" for budget in budgets)
    recipe = replace(winner.recipe, description=f"Found by tokexport search {asked}: {winner.recipe.description}")
    return f"# {summary}\n{recipe_toml(design(recipe).recipe)}"
