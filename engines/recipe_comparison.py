"""Recipes on one table: the accuracy of each, what it costs by plan, and what it takes by the clock."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokexport.engines.accuracy import EvalOptions, evaluate_artefact
from tokexport.engines.backend import SessionOptions
from tokexport.engines.bench import Arm, measure_arms
from tokexport.engines.budget_recipes import at_budgets
from tokexport.engines.build import build
from tokexport.engines.comparison_page import render_comparison
from tokexport.engines.comparison_text import comparison_markdown
from tokexport.engines.environment import describe_environment
from tokexport.engines.evaluate import data_sha256
from tokexport.engines.evaluation_data import DialogueSet
from tokexport.engines.images import as_rgb, load_image
from tokexport.engines.intervals import Difference, Floats, paired_difference
from tokexport.engines.kept_tokens import kept_tokens
from tokexport.engines.precisions import Loss, at_precisions, find_losses, precision_of
from tokexport.engines.prompt import PromptProcessor
from tokexport.engines.verdicts import Contestant, Verdict, find_verdicts
from tokexport.engines.worker import Workload
from tokexport.errors import BundleError, InputError, TokexportError
from tokexport.exporter.bundle import Bundle, write_atomically
from tokexport.exporter.checkpoint import describe_model, fingerprint
from tokexport.exporter.export import design
from tokexport.exporter.method import load_methods
from tokexport.exporter.plan import TokenPlan, plan_report
from tokexport.recipes.load import recipe_table
from tokexport.recipes.schema import ModelTable, Recipe

Progress = Callable[[str], None]
Tick = Callable[[int, int], None]
REPORT, TABLE, PAGE = "compare.json", "compare.md", "compare.html"
_NUM_IMAGES = 3
_ACCURACY = ("accuracy", "interval", "per_turn", "per_kind", "relative_to_full", "full")


@dataclass(frozen=True, kw_only=True)
class RecipeComparison:
    """The outcome.

    Attributes:
        rows: one a recipe, in the order in which they were given.
        verdicts: one for each compressed recipe that is no control.
        losses: one a recipe where several precisions were asked for, by compression, by precision and by both.
        failures: the error of each recipe that could not be built or evaluated, by its name.
        settings: of the evaluation and the measurement.
        contestants: the compressed recipes, as they are judged.
    """

    rows: tuple[Mapping[str, Any], ...]
    verdicts: tuple[Verdict, ...]
    losses: tuple[Loss, ...]
    failures: Mapping[str, str]
    settings: Mapping[str, Any]
    contestants: tuple[Contestant, ...]

    def report(self) -> dict[str, Any]:
        """Return what ``tokexport compare --json`` prints; its keys are a contract."""
        return {
            "rows": list(self.rows),
            "verdicts": [verdict.report() for verdict in self.verdicts],
            "losses": [loss.report() for loss in self.losses],
            "failures": dict(self.failures),
            "settings": dict(self.settings),
        }

    def markdown(self) -> str:
        """Return the tables for people."""
        return comparison_markdown(self.report())


def compare_recipes(
    recipes: Sequence[Recipe],
    folder: Path,
    asked: DialogueSet,
    options: EvalOptions,
    *,
    budgets: Sequence[int] = (),
    precisions: Sequence[str] = (),
    repeats: int = 9,
    progress: Progress = lambda _: None,
    tick: Tick = lambda _done, _total: None,
) -> RecipeComparison:
    """Build, evaluate and measure recipes, and write ``compare.json``, ``compare.md`` and ``compare.html``.

    What is in the folder and was made from the same recipe and weights is used again, and so are
    its evaluations on the same data. A recipe that fails does not stop the others.

    Args:
        recipes: what to compare; one of them without compression, to which the others are compared.
        folder: where the artefacts go.
        asked: the dialogues.
        options: of the evaluation.
        budgets: means of vision tokens per layer, at each of which every compressed recipe is made in place of its own;
            without any, recipes are taken as they are.
        precisions: in each of which every recipe is made, beside float32; names as in ``PRECISIONS``.
        repeats: measured runs of every artefact, in turns.
        progress: told what is being done.
        tick: told how much of it is done.

    Raises:
        InputError: no recipe without compression, two of one name, recipes of different models, or a budget or a
            precision that means nothing.
    """
    full = _full(recipes)
    require_one_model([full, *(recipe for recipe in recipes if recipe is not full)])
    sized = at_budgets(recipes, budgets)
    made = at_precisions(sized.recipes, precisions)
    # Made dialogues are known by their recipe, those of a file by what they hold.
    data = {**asked.description, **({} if asked.is_made else {"sha256": data_sha256(asked)})}
    failures = {**sized.failures, **made.failures}
    answered: dict[str, Mapping[str, Any]] = {}
    arms: list[Arm] = []
    for recipe in sorted(made.recipes, key=lambda recipe: recipe is not full):
        try:
            bundle = artefact_of(recipe, folder / recipe.name, options, progress)
            compared = None if recipe is full else folder / full.name
            answered[recipe.name] = _answered(bundle, asked, data, options, compared, progress, tick)
        except TokexportError as error:
            if recipe is full:
                raise
            failures[recipe.name] = str(error)
            progress(f"{recipe.name} failed: {error}")
        else:
            arms.append(Arm(bundle=bundle, engine=options.backend, method=recipe.name))
    measured = measure_recipes(arms, options, full.plan.text_tokens, repeats, progress, tick)
    asked_for = {arm.method: sized.budgets.get(made.bases.get(arm.method, arm.method)) for arm in arms}
    costs = {arm.method: _costs(arm.bundle, full, asked_for[arm.method]) for arm in arms}
    rows = {name: {**costs[name], **measured[name], **_accuracy(answered[name])} for name in costs}
    ordered = tuple(rows[recipe.name] for recipe in made.recipes if recipe.name in rows)
    answers = _Answers(answered, full.name, asked)
    contestants = _contestants(ordered, answers)
    given = {"budgets": list(budgets), "precisions": list(precisions), "repeats": repeats}
    found = RecipeComparison(
        rows=ordered,
        verdicts=find_verdicts(contestants, answers.dialogue_Q),
        losses=find_losses([row["recipe"] for row in ordered], full.name, made, answers.differ),
        failures=failures,
        settings={
            "data": {**data, "dialogues": asked.size},
            **options.rules(),
            **given,
            "text_tokens": full.plan.text_tokens,
            "environment": vars(describe_environment(options.threads)),
        },
        contestants=contestants,
    )
    _write(folder, found)
    progress("drawing the page")
    write_atomically(folder / PAGE, _page(found, [arm.bundle for arm in arms], asked, options))
    return found


def _accuracy(answered: Mapping[str, Any]) -> dict[str, Any]:
    return {key: answered[key] for key in _ACCURACY}


def _write(folder: Path, found: RecipeComparison) -> None:
    write_atomically(folder / REPORT, json.dumps(found.report(), indent=2, default=str) + "\n")
    write_atomically(folder / TABLE, found.markdown())


def _full(recipes: Sequence[Recipe]) -> Recipe:
    names = [recipe.name for recipe in recipes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"two recipes are called {twice[0]}; give each a name of its own")
    full = [recipe for recipe in recipes if not recipe.compress]
    if len(full) != 1:
        raise InputError(
            f"{len(full)} of the recipes {', '.join(names)} are without [[compress]]; give one, to which the others "
            "are compared, e.g. mini_full"
        )
    return full[0]


def require_one_model(recipes: Sequence[Recipe]) -> None:
    """Refuse recipes of different models. An adapter tunes a model to its compression and makes no other of it.

    Raises:
        InputError: two are of different models, or one cannot be read.
    """
    names: dict[str, str] = {}
    seen: list[ModelTable] = []
    for recipe in recipes:
        table = replace(recipe.model, adapter=None)
        if table in seen:
            continue
        seen.append(table)
        try:
            names.setdefault(fingerprint(describe_model(table)), recipe.name)
        except TokexportError as error:
            raise InputError(
                f"whether {recipe.name} is made from the same model as the others cannot be found out: {error}; leave "
                "it out, or set its model to theirs"
            ) from error
    if len(names) > 1:
        first, other, *_ = names.values()
        raise InputError(
            f"{other} is made from another model than {first}, and accuracies of different models say nothing about "
            "compression; give recipes of one model"
        )


def artefact_of(recipe: Recipe, path: Path, options: EvalOptions, progress: Progress) -> Bundle:
    """Return the artefact that stands there if it is the recipe's, else make it."""
    made = design(recipe)
    try:
        bundle = Bundle.open(path)
    except BundleError:
        bundle = None
    if bundle is not None:
        is_same = bundle.manifest.recipe == recipe_table(made.recipe)
        if is_same and bundle.manifest.model.fingerprint == made.fingerprint():
            return bundle
    return build(
        recipe,
        path,
        backend=options.backend,
        threads=options.threads,
        overwrite=True,
        with_bench=False,
        progress=lambda text: progress(f"{recipe.name}: {text}"),
    ).bundle


def _answered(
    bundle: Bundle,
    asked: DialogueSet,
    data: Mapping[str, Any],
    options: EvalOptions,
    full: Path | None,
    progress: Progress,
    tick: Tick,
) -> Mapping[str, Any]:
    stored = bundle.read_report("eval.json") or {}
    is_same = data.items() <= stored.get("data", {}).items() and stored.get("dialogues") == asked.size
    has_full = full is None or bool(stored.get("full"))
    if not (is_same and has_full and options.rules().items() <= stored.items()):
        stored = evaluate_artefact(bundle.path, asked, options, full=full, progress=progress, tick=tick).report()
    return stored


class _Answers:
    """The scores of every recipe, question by question, as far as they are stored and of the same questions."""

    def __init__(self, answered: Mapping[str, Mapping[str, Any]], full: str, asked: DialogueSet) -> None:
        self._answered = answered
        self._sha256 = answered[full]["data"]["sha256"]
        self.dialogue_Q = asked.dialogue_numbers()

    def scores_of(self, name: str) -> Floats | None:
        """Return the scores (Q,) of a recipe, None where they are of other questions or not stored."""
        stored = self._answered[name]
        scores_Q = np.array(stored.get("scores", "").split(), np.float64)
        # What is made on request may have been made otherwise when it was asked.
        is_same = stored["data"]["sha256"] == self._sha256 and scores_Q.shape == self.dialogue_Q.shape
        return scores_Q if is_same else None

    def differ(self, name: str, other: str) -> Difference | None:
        """Return the accuracy of a recipe minus that of another."""
        scores_Q, other_Q = self.scores_of(name), self.scores_of(other)
        if scores_Q is None or other_Q is None:
            return None
        return paired_difference(scores_Q, other_Q, self.dialogue_Q)


def _contestants(rows: Sequence[Mapping[str, Any]], answers: _Answers) -> tuple[Contestant, ...]:
    return tuple(
        Contestant(
            recipe=row["recipe"],
            is_control=row["is_control"],
            tokens=row["mean_vision_tokens"],
            accuracy=row["accuracy"],
            interval=(row["interval"][0], row["interval"][1]),
            ttft_ms=row["ttft_ms"]["median"],
            scores_Q=answers.scores_of(row["recipe"]),
            precision=row["precision"],
        )
        for row in rows
        if row["compressed"]
    )


def _page(found: RecipeComparison, bundles: Sequence[Bundle], asked: DialogueSet, options: EvalOptions) -> str:
    """Return the page, with what stays of the first images of the data."""
    shown = [asked.get(number) for number in range(min(_NUM_IMAGES, asked.size))]
    images = [
        as_rgb(dialogue.image, "an image") if isinstance(dialogue.image, Image.Image) else load_image(dialogue.image)
        for dialogue in shown
    ]
    questions = [dialogue.turns[0].question for dialogue in shown]
    processor = PromptProcessor(bundles[0].path)
    kept = {
        bundle.recipe.name: [
            kept_tokens(bundle, image, question, threads=options.threads)
            for image, question in zip(images, questions, strict=True)
        ]
        for bundle in bundles
        if bundle.recipe.compress
    }
    ordered = {row["recipe"]: kept[row["recipe"]] for row in found.rows if row["recipe"] in kept}
    return render_comparison(found.report(), [processor.seen(image) for image in images], ordered)


def measure_recipes(
    arms: Sequence[Arm], options: EvalOptions, text_tokens: int, repeats: int, progress: Progress, tick: Tick
) -> dict[str, dict[str, Any]]:
    """Let artefacts take turns, and return the times and the memory of each by its recipe's name."""
    workload = Workload(text_tokens=text_tokens, new_tokens=8)
    sessions = SessionOptions.for_bundle(
        arms[0].bundle,
        threads=options.threads,
        max_text_tokens=text_tokens + workload.new_tokens,
        max_images=1,
    )
    rows = measure_arms(arms, sessions, workload, repeats, progress, tick)
    keys = ("ttft_ms", "vision_ms", "prefill_ms", "decode_ms_per_token", "kv_bytes", "peak_rss_bytes")
    return {row["method"]: {key: row[key] for key in keys} for row in rows}


def _costs(bundle: Bundle, full: Recipe, budget: int | None) -> dict[str, Any]:
    planned = plan_report(bundle.spec, bundle.plan, text_tokens=full.plan.text_tokens, dtype=bundle.recipe.export.dtype)
    keys = ("mean_vision_tokens", "flops", "kv_bytes_vision", "predicted_prefill_speedup")
    methods = load_methods(bundle.recipe.compress)
    return {
        "recipe": bundle.recipe.name,
        "methods": [method.name for method in methods],
        "compressed": bundle.plan != TokenPlan.uncompressed(bundle.spec),
        "is_control": bool(methods) and all(method.is_control for method in methods),
        "budget": budget,
        "precision": precision_of(bundle.recipe),
        "bytes_on_disk": sum(file.bytes for name, file in bundle.manifest.files.items() if name.startswith("onnx/")),
        **{key: planned[key] for key in keys},
    }
