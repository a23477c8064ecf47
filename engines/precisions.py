"""The same recipes in other precisions, and what is lost by compression, by precision and by both together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from tokexport.engines.intervals import Difference
from tokexport.errors import InputError, RecipeError
from tokexport.recipes.load import override
from tokexport.recipes.schema import Recipe

Precision = Literal["float16", "bfloat16", "int8", "int4"]
PRECISIONS: tuple[str, ...] = get_args(Precision)

Differ = Callable[[str, str], Difference | None]
"""Gives the accuracy of one recipe minus that of another, paired by question; None where they cannot be paired."""


@dataclass(frozen=True, kw_only=True)
class PreciseRecipes:
    """Recipes in several precisions.

    Attributes:
        recipes: each as it came, and behind it in the others.
        precisions: the precision that was asked for, by the name of a recipe, ``NAME@PRECISION``.
        bases: the name of the recipe that it was made from, by the same.
        failures: the error of each that cannot be made, by the name that it would have.
    """

    recipes: tuple[Recipe, ...]
    precisions: Mapping[str, str]
    bases: Mapping[str, str]
    failures: Mapping[str, str]


def at_precisions(recipes: Sequence[Recipe], precisions: Sequence[str]) -> PreciseRecipes:
    """Make every recipe in every precision, beside as it is.

    Raises:
        InputError: a precision that is not known, or is given twice, or recipes that are not all in float32.
    """
    for precision in precisions:
        if precision not in PRECISIONS:
            raise InputError(f"the precision {precision!r} is not known; choose among {', '.join(PRECISIONS)}")
        if precisions.count(precision) > 1:
            raise InputError(f"the precision {precision} is given twice; give each once")
    if precisions:
        _require_float32(recipes)
    made: list[Recipe] = []
    asked: dict[str, str] = {}
    bases: dict[str, str] = {}
    failures: dict[str, str] = {}
    for recipe in recipes:
        made.append(recipe)
        for precision in precisions:
            name = f"{recipe.name}@{precision}"
            try:
                changed = _in_precision(recipe, precision)
            except RecipeError as error:
                failures[name] = str(error)
            else:
                made.append(replace(changed, name=name, description=f"{recipe.name} in {precision}"))
                asked[name], bases[name] = precision, recipe.name
    return PreciseRecipes(recipes=tuple(made), precisions=asked, bases=bases, failures=failures)


def precision_of(recipe: Recipe) -> str:
    """Return in what a recipe stores its weights, in a word or two."""
    return str(recipe.quantize) if recipe.quantize.is_active else recipe.export.dtype


def _require_float32(recipes: Sequence[Recipe]) -> None:
    for recipe in recipes:
        if precision_of(recipe) != "float32":
            raise InputError(
                f"{recipe.name} is in {precision_of(recipe)}, and --precisions compares others with float32; give it "
                "in float32, or leave --precisions out"
            )


def _in_precision(recipe: Recipe, precision: str) -> Recipe:
    if precision in ("int8", "int4"):
        return override(recipe, quantize=precision)
    return override(recipe, dtype=precision)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What an artefact has lost, as differences of accuracy paired by question; None where there is nothing to lose.

    Attributes:
        recipe: its name.
        precision: what it stores its weights in.
        of_compression: beside all tokens in the same precision.
        of_precision: beside the same tokens in float32.
        of_both: beside all tokens in float32.
    """

    recipe: str
    precision: str
    of_compression: Difference | None
    of_precision: Difference | None
    of_both: Difference | None

    def report(self) -> dict[str, Any]:
        """Return the losses for ``compare.json``; its keys are a contract."""
        parts = {"of_compression": self.of_compression, "of_precision": self.of_precision, "of_both": self.of_both}
        return {
            "recipe": self.recipe,
            "precision": self.precision,
            **{name: None if part is None else part.report() for name, part in parts.items()},
        }


def find_losses(names: Sequence[str], full: str, made: PreciseRecipes, differ: Differ) -> tuple[Loss, ...]:
    """Return what every recipe has lost, in order; nothing where only one precision was asked for.

    Args:
        names: the recipes that were evaluated.
        full: the one of them that keeps all tokens in float32.
        made: how they were made.
        differ: compares two of them.
    """
    if not made.precisions:
        return ()

    def between(name: str, other: str) -> Difference | None:
        return None if name == other or other not in names else differ(name, other)

    losses: list[Loss] = []
    for name in names:
        precision, base = made.precisions.get(name, "float32"), made.bases.get(name, name)
        full_alike = full if base == name else f"{full}@{precision}"
        losses.append(
            Loss(
                recipe=name,
                precision=precision,
                of_compression=between(name, full_alike),
                of_precision=between(name, base),
                of_both=between(name, full),
            )
        )
    return tuple(losses)
