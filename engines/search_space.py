"""What a search tries: forms of every method, of bundled and given recipes, each set to what budgets allow."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokexport.engines.cost_budget import Allowance, Kind
from tokexport.errors import RecipeError
from tokexport.exporter.export import Design, design
from tokexport.exporter.method import Method, list_methods, load_method, tables_of
from tokexport.exporter.plan import TokenPlan
from tokexport.recipes.load import list_recipes, load_recipe
from tokexport.recipes.schema import ModelTable, Recipe
from tokexport.recipes.tables import table_of


@dataclass(frozen=True, kw_only=True)
class Form:
    """A method in one form, not yet set to a budget.

    Attributes:
        method: with its options.
        model: what it is put into; an adapter was tuned to this form.
        origin: the recipe that it comes from, None for a form that the method gives itself.
    """

    method: Method
    model: ModelTable
    origin: str | None = None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe to be tried.

    Attributes:
        recipe: whole, with a name of its own.
        form: that it was made from, None for a given recipe as it is.
        plan: of its tokens.
        methods: their names.
        is_control: whether its methods are what others have to beat.
        costs: by plan.
        origin: the recipe that it comes from, None for a form that a method gives itself.
    """

    recipe: Recipe
    form: Form | None
    plan: TokenPlan
    methods: tuple[str, ...]
    is_control: bool
    costs: Mapping[Kind, float]
    origin: str | None = None

    def is_of(self, methods: Sequence[str]) -> bool:
        """Return whether all its methods are among these; where none is given, all are."""
        return not methods or set(self.methods) <= set(methods)

    @property
    def identity(self) -> str:
        """What two candidates that compute the same have in common."""
        return json.dumps(
            [table_of(self.recipe.model), [[step.method, table_of(step.options)] for step in self.recipe.compress]],
            sort_keys=True,
        )


def forms_of(
    base: Design, methods: Sequence[str], given: Sequence[Recipe]
) -> tuple[tuple[Form, ...], Mapping[str, str]]:
    """Return what there is to try, and why a method gives no form of its own.

    Args:
        base: without compression.
        methods: their names, all there are if none is given.
        given: recipes of the same model, whose methods are tried too, with the weights that they have.

    Raises:
        RecipeError: an unknown method.
    """
    forms: list[Form] = []
    left_out: dict[str, str] = {}
    for name in methods or list_methods():
        try:
            found = load_method(name).variants(base.model.spec)
        except RecipeError as error:
            if name not in list_methods():
                raise
            left_out[name] = str(error)
        else:
            forms += [Form(method=method, model=base.recipe.model) for method in found]
    for recipe in given:
        made = design(recipe)
        if len(made.methods) == 1 and (not methods or made.methods[0].name in methods):
            forms.append(Form(method=made.methods[0], model=made.recipe.model, origin=recipe.name))
    tried = {form.method.name for form in forms}
    return tuple(forms), {name: reason for name, reason in left_out.items() if name not in tried}


def bundled_recipes(base: Design) -> tuple[Recipe, ...]:
    """Return the compressed recipes that ship for a model."""
    found: list[Recipe] = []
    for name in list_recipes():
        recipe = load_recipe(name)
        if recipe.compress and replace(recipe.model, adapter=None) == replace(base.recipe.model, adapter=None):
            found.append(recipe)
    return tuple(found)


def at_level(base: Design, forms: Iterable[Form], allowance: Allowance, level: float = 1.0) -> list[Candidate]:
    """Return every form set to a part of what is allowed, as many tokens as that admits; one of equals.

    Where even the fewest tokens of a form are too many, it is returned with these.
    """
    spec, full = base.model.spec, TokenPlan.uncompressed(base.model.spec)

    def load(plan: TokenPlan) -> float:
        return allowance.load(allowance.costs(plan)) / level

    made: dict[str, Candidate] = {}
    for form in forms:
        method = form.method.within(spec, full, load)
        candidate = _candidate(base, [method], form, allowance)
        made.setdefault(candidate.identity, candidate)
    return list(made.values())


def as_given(base: Design, recipes: Iterable[Recipe], methods: Sequence[str], allowance: Allowance) -> list[Candidate]:
    """Return recipes as they are, those with other methods left out."""
    found: list[Candidate] = []
    for recipe in recipes:
        made = design(recipe)
        names = [method.name for method in made.methods]
        if not methods or set(names) <= set(methods):
            whole = replace(_whole(base, made.methods, made.recipe.model), name=recipe.name)
            found.append(
                Candidate(
                    recipe=whole,
                    form=None,
                    plan=made.plan,
                    methods=tuple(names),
                    is_control=all(method.is_control for method in made.methods),
                    costs=allowance.costs(made.plan),
                    origin=recipe.name,
                )
            )
    return found


def _candidate(base: Design, methods: Sequence[Method], form: Form, allowance: Allowance) -> Candidate:
    recipe = _whole(base, methods, form.model)
    plan = methods[0].plan(base.model.spec, TokenPlan.uncompressed(base.model.spec))
    candidate = Candidate(
        recipe=recipe,
        form=form,
        plan=plan,
        methods=tuple(method.name for method in methods),
        is_control=all(method.is_control for method in methods),
        costs=allowance.costs(plan),
        origin=form.origin,
    )
    name = f"{form.origin}@{plan.mean_vision_tokens:g}" if form.origin else _name(candidate)
    return replace(candidate, recipe=replace(recipe, name=name))


def _whole(base: Design, methods: Sequence[Method], model: ModelTable) -> Recipe:
    compress = tables_of(methods)
    text = "; ".join(f"{step.method}: {options_text(step.options)}" for step in compress)
    return replace(base.recipe, description=text, compress=compress, model=model)


def _name(candidate: Candidate) -> str:
    """Return a name that is the same in every search, so that what was built is found again."""
    digest = hashlib.sha256(candidate.identity.encode()).hexdigest()
    return f"{'+'.join(candidate.methods)}-{digest[:6]}"


def options_text(options: Mapping[str, Any]) -> str:
    """Return options in a line: drops as ``121 from 3, 49 from 5``, all else as ``name value``."""
    parts: list[str] = []
    for name, value in table_of(options).items():
        if name == "drops":
            parts.append(", ".join(f"{drop['keep']} from layer {drop['layer']}" for drop in value))
        elif not isinstance(value, list):
            parts.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return "; ".join(parts)
