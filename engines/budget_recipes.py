"""Recipes made at budgets: the same method, set to each mean of vision tokens per layer that is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tokexport.errors import InputError, RecipeError, TokexportError
from tokexport.exporter.export import design
from tokexport.exporter.method import tables_of
from tokexport.recipes.schema import Recipe


@dataclass(frozen=True, kw_only=True)
class BudgetedRecipes:
    """Recipes at budgets.

    Attributes:
        recipes: in order; those without compression as they came.
        budgets: what was asked for, by the name of a recipe, ``NAME@TOKENS``.
        failures: the error of each that cannot be made, by the name that it would have.
    """

    recipes: tuple[Recipe, ...]
    budgets: Mapping[str, int]
    failures: Mapping[str, str]


def at_budgets(recipes: Sequence[Recipe], budgets: Sequence[int]) -> BudgetedRecipes:
    """Make every compressed recipe at every budget; without budgets all stay as they are.

    Raises:
        InputError: a budget that keeps nothing, or one that is given twice.
    """
    for budget in budgets:
        if budget < 1:
            raise InputError(f"the budget {budget} must be at least 1 vision token per layer; choose a larger one")
        if budgets.count(budget) > 1:
            raise InputError(f"the budget {budget} is given twice; give each once")
    made: list[Recipe] = []
    asked: dict[str, int] = {}
    failures: dict[str, str] = {}
    for recipe in recipes:
        if not budgets or not recipe.compress:
            made.append(recipe)
            continue
        for budget in budgets:
            name = f"{recipe.name}@{budget}"
            try:
                made.append(at_budget(recipe, budget))
                asked[name] = budget
            except TokexportError as error:
                failures[name] = str(error)
    return BudgetedRecipes(recipes=tuple(made), budgets=asked, failures=failures)


def at_budget(recipe: Recipe, tokens: int) -> Recipe:
    """Return a recipe whose one method keeps ``tokens`` vision tokens per layer on average, or nearly so.

    Raises:
        RecipeError: it has several methods, or its method has no such setting; the text names the nearest.
        CheckpointError: the model cannot be read.
    """
    made = design(recipe)
    if len(made.methods) != 1:
        names = ", ".join(method.name for method in made.methods)
        raise RecipeError(
            f"a budget sets the options of one method, and recipe {recipe.name} has {len(made.methods)} ({names}); "
            "compare it without budgets"
        )
    method = made.methods[0].for_budget(made.model.spec, made.plans[0], tokens)
    return replace(
        made.recipe,
        name=f"{recipe.name}@{tokens}",
        description=f"{recipe.name} set to {tokens} vision tokens per layer",
        compress=tables_of([method]),
    )
