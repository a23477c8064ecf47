"""Methods that leave vision tokens out before chosen decoder layers."""

from dataclasses import dataclass, replace
from typing import Self

from tokexport.errors import RecipeError
from tokexport.exporter.method import Method
from tokexport.exporter.plan import TokenPlan, VlmSpec, resolve_keep, scaled_layers


@dataclass(frozen=True, kw_only=True)
class Drop:
    """A bottleneck before ``layer`` (from 0) that keeps a token count (int) or a fraction (float)."""

    layer: int
    keep: int | float


@dataclass(frozen=True, kw_only=True)
class Dropping(Method):
    """A method with several bottlenecks.

    Attributes:
        drops: the bottlenecks, ascending by layer; fractions are of what arrives at each.
    """

    drops: tuple[Drop, ...]

    def __post_init__(self) -> None:
        if not self.drops:
            raise RecipeError(
                f"[[compress]] {self.name} needs at least one entry in drops, e.g. {{layer = 8, keep = 0.5}}"
            )
        layers = [drop.layer for drop in self.drops]
        if layers != sorted(set(layers)):
            raise RecipeError(
                f"[[compress]] {self.name} drops name the layers {layers}; each must be larger than the one before"
            )

    def plan(self, spec: VlmSpec, arriving: TokenPlan) -> TokenPlan:
        plan = arriving
        for drop in self.drops:
            plan = plan_drop(plan, spec, drop, f"[[compress]] {self.name} drop")
        return plan

    def for_num_layers(self, before: int, after: int) -> Self:
        layers = scaled_layers([drop.layer for drop in self.drops], before, after)
        return replace(
            self, drops=tuple(replace(drop, layer=layer) for drop, layer in zip(self.drops, layers, strict=True))
        )


def plan_drop(plan: TokenPlan, spec: VlmSpec, drop: Drop, what: str) -> TokenPlan:
    """Return the plan behind one bottleneck.

    Raises:
        RecipeError: the model has no such layer, or the bottleneck has no effect; ``what`` names it.
    """
    where = f"{what} before layer {drop.layer}:"
    if not 0 <= drop.layer < spec.num_layers:
        raise RecipeError(f"{where} the model has the layers 0 to {spec.num_layers - 1}")
    return plan.thinned_before_layer(drop.layer, resolve_keep(drop.keep, plan.per_layer[drop.layer], where))
