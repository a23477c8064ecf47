"""What a compression method is, and how one is found.

A method is one file in ``exporter/methods/``; its file name is its name in a recipe. The file
defines one frozen dataclass, a subclass of ``Method``, whose fields are the recipe's options.
"""

import contextlib
import itertools
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

from tokexport.errors import RecipeError
from tokexport.exporter import methods
from tokexport.exporter.budget import Load, fullest_choice, nearest_choice
from tokexport.exporter.graph_io import stage_name
from tokexport.exporter.plan import LEAST_KEEP, TokenPlan, VlmSpec
from tokexport.exporter.registry import list_plugins, load_plugin
from tokexport.recipes.schema import CompressTable
from tokexport.recipes.tables import parse_table, table_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tokexport.exporter.modules.bottleneck import Bottleneck

UNTRAINED = "untrained"
"""Stands in a recipe in place of the file of what a method has learned."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """One way to leave vision tokens out; fields are recipe options.

    Attributes:
        is_mixing: whether the stage on image features has a part ``matrix`` that says, for each image, which share of
            every token that arrives goes into each one that stays (B, M, N).
        chooser: the part of that stage, a ``Chooser``, that says, for each image, which tokens stay (B, M); empty where
            there is none.
        is_merging: whether those that do not are merged into them, or into further ones.
        is_control: whether it is what a method with as many tokens has to beat.
    """

    is_mixing: ClassVar[bool] = False
    chooser: ClassVar[str] = ""
    is_merging: ClassVar[bool] = False
    is_control: ClassVar[bool] = False

    @abstractmethod
    def plan(self, spec: VlmSpec, arriving: TokenPlan) -> TokenPlan:
        """Return the plan behind this method, given the plan before it.

        Raises:
            RecipeError: an option does not fit the model or what arrives.
        """

    def tower_grid(self, spec: VlmSpec, arriving: TokenPlan) -> tuple[int, int] | None:
        """Return rows and columns of patches that the vision tower sees of a smaller image, None to leave it."""
        return None

    def feature_stage(self, spec: VlmSpec, arriving: TokenPlan) -> "nn.Module | None":
        """Return what thins the image features (B, N, D) to (B, M, D) before the language model.

        A ``TowerStage`` reads the vision tower, and may stand before the projector.
        """
        return None

    def bottlenecks(self, spec: VlmSpec, arriving: TokenPlan) -> "dict[int, Bottleneck]":
        """Return what stands before which decoder layer."""
        return {}

    def learned(self, spec: VlmSpec, arriving: TokenPlan) -> "Mapping[str, Tensor]":
        """Return what the module ``learner`` has learned, by the names of its parameters.

        Raises:
            CheckpointError: it is missing, damaged or of another shape.
        """
        return {}

    def settled(self) -> Self:
        """Return the method with paths that mean the same from every directory."""
        return self

    @property
    def learner(self) -> str:
        """The name of the method's module that has parameters, in the module of its graph."""
        return stage_name(self.name)

    @property
    def name(self) -> str:
        """The name in a recipe."""
        return type(self).__module__.rpartition(".")[2]

    def for_num_layers(self, before: int, after: int) -> Self:
        """Return the method for the same model cut from ``before`` to ``after`` decoder layers."""
        return self

    def for_budget(self, spec: VlmSpec, arriving: TokenPlan, tokens: int) -> Self:
        """Return the method with the mean of vision tokens per layer nearest to ``tokens``, see ``exporter.budget``.

        By default an option ``keep`` is set to the count that does so, all others staying as they are.

        Raises:
            RecipeError: no setting meets the budget; the text names the nearest.
        """
        if "keep" not in (field.name for field in fields(self)):
            raise RecipeError(
                f"[[compress]] {self.name} has no option that a budget sets; compare it without one, in a recipe of "
                "its own"
            )
        means = ((plan.mean_vision_tokens, changed) for plan, changed in self._counts(spec, arriving))
        return nearest_choice(means, tokens, f"[[compress]] {self.name}:")

    @classmethod
    def choices(cls, spec: VlmSpec) -> Mapping[str, Sequence[Any]]:  # noqa: ARG003 - for those that read it
        """Return the values that a search tries of each option that it changes; others have their defaults.

        By default all words of an option that is a choice of words, and a ``keep`` to start from.
        """
        hints = get_type_hints(cls)
        words = {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
        return {"keep": (0.5,), **words} if "keep" in hints else words

    @classmethod
    def variants(cls, spec: VlmSpec) -> "list[Self]":
        """Return the forms of the method that a search tries: every combination of ``choices`` that fits the model.

        Raises:
            RecipeError: none does, or there is an option that nobody but the user can choose.
        """
        choices, name = cls.choices(spec), cls.__module__.rpartition(".")[2]
        missing = [
            field.name
            for field in fields(cls)
            if field.default is MISSING and field.default_factory is MISSING and field.name not in choices
        ]
        if missing:
            options = " and ".join(missing)
            raise RecipeError(
                f"[[compress]] {name} needs {options}, which only a recipe can give; give one that has them"
            )
        found: list[Self] = []
        reasons: list[RecipeError] = []
        for values in itertools.product(*choices.values()):
            try:
                made = cls(**dict(zip(choices, values, strict=True)))
                made.plan(spec, TokenPlan.uncompressed(spec))
            except RecipeError as error:
                reasons.append(error)
            else:
                found.append(made)
        if not found:
            raise reasons[0] if reasons else RecipeError(f"[[compress]] {name} has no form that fits so small a model")
        return found

    def within(self, spec: VlmSpec, arriving: TokenPlan, load: Load) -> Self:
        """Return the method with as many tokens as a budget allows, or with the fewest where that is too many.

        By default an option ``keep`` is set to the count that does so, all others staying as they are; a method without
        one stays as it is.

        Args:
            spec: of the model.
            arriving: the plan before the method.
            load: the part of the budget that a plan takes up, 1 being all of it.
        """
        if "keep" not in (field.name for field in fields(self)):
            return self
        return fullest_choice((load(plan), changed) for plan, changed in self._counts(spec, arriving)) or self

    def _counts(self, spec: VlmSpec, arriving: TokenPlan) -> "Iterator[tuple[TokenPlan, Self]]":
        """Yield the method with every count that it takes, and the plan behind it."""
        for count in range(LEAST_KEEP, arriving.entering_llm):
            with contextlib.suppress(RecipeError):
                changed = replace(self, **{"keep": count})
                yield changed.plan(spec, arriving), changed


def chooser_names(methods: Iterable[Method]) -> tuple[str, ...]:
    """Return the modules of the vision encoder that say which tokens stay."""
    return tuple(f"{stage_name(method.name)}.{method.chooser}" for method in methods if method.chooser)


def list_methods() -> list[str]:
    """Return the names of all methods."""
    return list_plugins(methods)


def load_method(name: str) -> type[Method]:
    """Return the method called ``name``.

    Raises:
        RecipeError: there is none.
    """
    return load_plugin(methods, Method, name, "method", RecipeError)


def method_summary(name: str) -> str:
    """Return the first line of what a method's file says about it."""
    return (sys.modules[load_method(name).__module__].__doc__ or "").partition("\n")[0].rstrip(".")


def load_methods(steps: Sequence[CompressTable]) -> tuple[Method, ...]:
    """Make the methods of a recipe, in their order.

    Raises:
        RecipeError: an unknown method or option, or a method that stands there twice.
    """
    names = [step.method for step in steps]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f'[[compress]] method = "{name}" stands there twice; give one table with all its options')
    return tuple(parse_table(load_method(step.method), step.options, f"[[compress]] {step.method}") for step in steps)


def tables_of(chain: Sequence[Method]) -> tuple[CompressTable, ...]:
    """Return methods as recipe tables, every default filled in."""
    return tuple(CompressTable(method=method.name, options=table_of(method)) for method in chain)


def plan_tokens(chain: Sequence[Method], spec: VlmSpec) -> TokenPlan:
    """Return the plan of a model compressed by ``chain``, one after the other."""
    return arriving_plans(chain, spec)[-1]


def arriving_plans(chain: Sequence[Method], spec: VlmSpec) -> tuple[TokenPlan, ...]:
    """Return the plan before each method, and behind the last."""
    plans = [TokenPlan.uncompressed(spec)]
    for method in chain:
        plans.append(method.plan(spec, plans[-1]))
    return tuple(plans)
