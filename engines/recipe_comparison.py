"""Recipes on one table: the accuracy of each, what it costs by plan, and what it takes by the clock."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokexport.engines.accuracy import EvalOptions, evaluate_artefact
from tokexport.engines.backend import SessionOptions
from tokexport.engines.bench import Arm, measure_arms
from tokexport.engines.build import build
from tokexport.engines.environment import describe_environment
from tokexport.engines.evaluate import data_sha256
from tokexport.engines.evaluation_data import DialogueSet
from tokexport.engines.worker import Workload
from tokexport.errors import BundleError, InputError, TokexportError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.export import design
from tokexport.exporter.plan import TokenPlan, plan_report
from tokexport.recipes.load import recipe_table
from tokexport.recipes.schema import Recipe

Progress = Callable[[str], None]
Tick = Callable[[int, int], None]
REPORT, TABLE = "compare.json", "compare.md"


@dataclass(frozen=True, kw_only=True)
class RecipeComparison:
    """The outcome.

    Attributes:
        rows: one a recipe, in the order in which they were given.
        failures: the error of each recipe that could not be built or evaluated, by its name.
        settings: of the evaluation and the measurement.
    """

    rows: tuple[Mapping[str, Any], ...]
    failures: Mapping[str, str]
    settings: Mapping[str, Any]

    def report(self) -> dict[str, Any]:
        """Return what ``tokexport compare --json`` prints; its keys are a contract."""
        return {"rows": list(self.rows), "failures": dict(self.failures), "settings": dict(self.settings)}

    def markdown(self) -> str:
        """Return the table for people."""
        turns = range(1, 1 + max((len(row["per_turn"]) for row in self.rows), default=0))
        heads = ["recipe", "tokens per layer", "FLOPs", "KV, vision", "first token", "accuracy", "of full"]
        heads += [f"turn {turn}" for turn in turns]
        lines = [_line(heads), _line(["---", *["---:"] * (len(heads) - 1)])]
        lines += [_line(_cells(row)) for row in self.rows]
        lines += [f"\n{name} is missing: {error}" for name, error in self.failures.items()]
        return "\n".join(lines) + "\n"


def compare_recipes(
    recipes: Sequence[Recipe],
    folder: Path,
    asked: DialogueSet,
    options: EvalOptions,
    *,
    repeats: int = 9,
    progress: Progress = lambda _: None,
    tick: Tick = lambda _done, _total: None,
) -> RecipeComparison:
    """Build, evaluate and measure recipes, and write ``compare.json`` and ``compare.md``.

    What is in the folder and was made from the same recipe and weights is used again, and so are
    its evaluations on the same data. A recipe that fails does not stop the others.

    Args:
        recipes: what to compare; one of them without compression, to which the others are compared.
        folder: where the artefacts go.
        asked: the dialogues.
        options: of the evaluation.
        repeats: measured runs of every artefact, in turns.
        progress: told what is being done.
        tick: told how much of it is done.

    Raises:
        InputError: no recipe without compression, two of one name, or none that could be built.
    """
    full = _full(recipes)
    # Made dialogues are known by their recipe, those of a file by what they hold.
    data = {**asked.description, **({} if asked.is_made else {"sha256": data_sha256(asked)})}
    failures: dict[str, str] = {}
    accuracies: dict[str, Mapping[str, Any]] = {}
    arms: list[Arm] = []
    for recipe in sorted(recipes, key=lambda recipe: recipe is not full):
        try:
            bundle = _artefact(recipe, folder / recipe.name, options, progress)
            compared = None if recipe is full else folder / full.name
            accuracies[recipe.name] = _accuracy(bundle, asked, data, options, compared, progress, tick)
        except TokexportError as error:
            if recipe is full:
                raise
            failures[recipe.name] = str(error)
            progress(f"{recipe.name} failed: {error}")
        else:
            arms.append(Arm(bundle=bundle, engine=options.backend, method=recipe.name))
    measured = _measured(arms, options, full.plan.text_tokens, repeats, progress, tick)
    rows = {arm.method: {**_costs(arm.bundle, full), **measured[arm.method], **accuracies[arm.method]} for arm in arms}
    found = RecipeComparison(
        rows=tuple(rows[recipe.name] for recipe in recipes if recipe.name in rows),
        failures=failures,
        settings={
            "data": dict(asked.description),
            **options.rules(),
            "repeats": repeats,
            "text_tokens": full.plan.text_tokens,
            "environment": vars(describe_environment(options.threads)),
        },
    )
    (folder / REPORT).write_text(json.dumps(found.report(), indent=2, default=str) + "\n", encoding="utf-8")
    (folder / TABLE).write_text(found.markdown(), encoding="utf-8")
    return found


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


def _artefact(recipe: Recipe, path: Path, options: EvalOptions, progress: Progress) -> Bundle:
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


def _accuracy(
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
    return {key: stored[key] for key in ("accuracy", "interval", "per_turn", "per_kind", "relative_to_full", "full")}


def _measured(
    arms: Sequence[Arm], options: EvalOptions, text_tokens: int, repeats: int, progress: Progress, tick: Tick
) -> dict[str, dict[str, Any]]:
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


def _costs(bundle: Bundle, full: Recipe) -> dict[str, Any]:
    planned = plan_report(bundle.spec, bundle.plan, text_tokens=full.plan.text_tokens, dtype=bundle.recipe.export.dtype)
    keys = ("mean_vision_tokens", "flops", "kv_bytes_vision", "predicted_prefill_speedup")
    is_compressed = bundle.plan != TokenPlan.uncompressed(bundle.spec)
    return {"recipe": bundle.recipe.name, "compressed": is_compressed, **{key: planned[key] for key in keys}}


def _cells(row: Mapping[str, Any]) -> list[str]:
    low, high = row["interval"]
    spread = f" ± {50 * (high - low):.1f}" if high > low else ""
    return [
        row["recipe"],
        f"{row['mean_vision_tokens']:.0f}",
        f"{-100 * row['flops']['reduction']:+.1f} %" if row["compressed"] else "–",
        f"{-100 * row['kv_bytes_vision']['reduction']:+.1f} %" if row["compressed"] else "–",
        f"{row['ttft_ms']['median']:.1f} ms",
        f"{100 * row['accuracy']:.1f}{spread} %",
        "–" if row["relative_to_full"] is None else f"{100 * row['relative_to_full']:.1f} %",
        *(f"{100 * turn['accuracy']:.1f}" for turn in row["per_turn"]),
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
