"""Recipes at budgets, of a tiny model with 4 x 4 vision tokens and 4 layers."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import adsc, recipe_for
from tokexport.engines.budget_recipes import at_budgets
from tokexport.errors import InputError
from tokexport.exporter.export import design
from tokexport.recipes.schema import Recipe


def recipe(checkpoint: Path, name: str, *steps: dict[str, object]) -> Recipe:
    return replace(recipe_for(checkpoint, *steps), name=name)


def test_every_compressed_recipe_is_made_at_every_budget(checkpoint: Path):
    given = [recipe(checkpoint, "full"), recipe(checkpoint, "thin", adsc())]
    found = at_budgets(given, [8, 4])
    assert [one.name for one in found.recipes] == ["full", "thin@8", "thin@4"]
    assert found.budgets == {"thin@8": 8, "thin@4": 4}
    assert [design(one).plan.mean_vision_tokens for one in found.recipes] == [16, 8, 4]


def test_without_budgets_recipes_stay_as_they_are(checkpoint: Path):
    given = [recipe(checkpoint, "full"), recipe(checkpoint, "thin", adsc())]
    assert at_budgets(given, []).recipes == tuple(given)


def test_a_budget_that_cannot_be_met_is_named_and_stops_no_other(checkpoint: Path):
    found = at_budgets([recipe(checkpoint, "small", {"method": "resize", "keep": 4})], [9, 6])
    assert [one.name for one in found.recipes] == ["small@9"]
    assert "the nearest is 4 or 9" in found.failures["small@6"]


def test_a_recipe_of_two_methods_has_no_budget(checkpoint: Path):
    both = recipe(checkpoint, "both", {"method": "sample", "keep": 8}, {"method": "fastv", "layer": 1, "keep": 4})
    found = at_budgets([both], [4])
    assert found.failures["both@4"] == (
        "a budget sets the options of one method, and recipe both has 2 (sample, fastv); compare it without budgets"
    )


@pytest.mark.parametrize(
    ("budgets", "problem"),
    [([0], "the budget 0 must be at least 1"), ([4, 8, 4], "the budget 4 is given twice")],
    ids=["none kept", "twice"],
)
def test_budgets_that_mean_nothing_are_refused(budgets: list[int], problem: str):
    with pytest.raises(InputError, match=problem):
        at_budgets([], budgets)
