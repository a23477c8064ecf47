"""What a search tries, on the mini model and its bundled recipes; nothing is read but plans."""

from dataclasses import replace

import pytest

from tokexport.engines.cost_budget import Allowance, parse_budgets
from tokexport.engines.search_space import as_given, at_level, bundled_recipes, forms_of, options_text
from tokexport.errors import RecipeError
from tokexport.exporter.export import design
from tokexport.exporter.method import list_methods
from tokexport.recipes.load import load_recipe, parse_recipe, recipe_table

BASE = design(load_recipe("mini_full"))
HALF = Allowance.of(parse_budgets(["flops=0.5"]), BASE.model.spec, text_tokens=36, dtype="float32")


def test_recipes_that_ship_for_the_model_are_tried_with_what_they_learned():
    bundled = bundled_recipes(BASE)
    assert {"mini_adsc", "mini_metacompress", "mini_relevance"} < {recipe.name for recipe in bundled}
    assert all(recipe.model.checkpoint == "mini" for recipe in bundled)
    forms, left_out = forms_of(BASE, (), bundled)
    assert {form.method.name for form in forms} == set(list_methods())
    assert left_out == {}
    assert {form.model.adapter for form in forms if form.origin == "mini_adsc"} == {"mini_adsc"}


def test_a_method_without_a_form_says_what_it_needs():
    forms, left_out = forms_of(BASE, ("sample", "relevance"), ())
    assert {form.method.name for form in forms} == {"sample"}
    assert list(left_out) == ["relevance"]
    assert "needs weights" in left_out["relevance"]


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(RecipeError, match="there is no method 'adcs'; did you mean 'adsc'"):
        forms_of(BASE, ("adcs",), ())


@pytest.mark.parametrize("level", [1.0, 0.5])
def test_every_form_takes_what_is_allowed_and_not_more(level: float):
    forms, _ = forms_of(BASE, ("adsc", "divprune", "sample", "relevance"), bundled_recipes(BASE))
    candidates = at_level(BASE, forms, HALF, level)
    loads = [HALF.load(candidate.costs) for candidate in candidates]
    assert max(loads) <= level
    assert min(loads) > 0.9 * level
    names = [candidate.recipe.name for candidate in candidates]
    assert len(set(names)) == len(names)
    assert any(name.startswith("mini_adsc@") for name in names)


def test_a_candidate_is_a_whole_recipe_of_its_own():
    candidate = at_level(BASE, forms_of(BASE, ("sample",), ())[0], HALF)[0]
    assert parse_recipe("again", recipe_table(candidate.recipe)) == candidate.recipe
    assert design(candidate.recipe).plan == candidate.plan
    assert candidate.is_control


def test_forms_that_become_the_same_are_tried_once():
    forms, _ = forms_of(BASE, ("sample",), ())
    twice = at_level(BASE, [*forms, *(replace(form, origin="again") for form in forms)], HALF)
    assert len(twice) == len(forms)


def test_given_recipes_are_also_tried_as_they_are():
    found = as_given(BASE, bundled_recipes(BASE), ("metacompress",), HALF)
    assert [candidate.recipe.name for candidate in found] == [
        "mini_metacompress",
        "mini_metacompress_192",
        "mini_metacompress_70",
    ]
    assert found[0].plan.entering_llm == 58


def test_options_read_as_a_line():
    options = {"drops": [{"layer": 3, "keep": 121}, {"layer": 5, "keep": 49}], "pattern": "grid", "phase": 0.99}
    assert options_text(options) == "121 from layer 3, 49 from layer 5; pattern grid; phase 0.99"
