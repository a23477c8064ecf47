"""FastV (arXiv 2403.06764): keep the vision tokens that the last token attends to most in one early layer.

The choice is made when the image comes in, by the question that comes with it, and later turns have to live with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from tokexport.errors import RecipeError
from tokexport.exporter.drops import Drop, plan_drop
from tokexport.exporter.method import Method
from tokexport.exporter.plan import PositionPolicy, TokenPlan, VlmSpec, scaled_layers

if TYPE_CHECKING:
    from tokexport.exporter.modules.bottleneck import Bottleneck


@dataclass(frozen=True, kw_only=True)
class FastV(Method):
    """Rank vision tokens before ``layer`` by the attention of the layer before it, averaged over heads.

    Attributes:
        layer: the first that sees fewer, counted from 0; 2 and 3 in the paper.
        keep: a token count (int) or a fraction (float).
        positions: whether kept tokens keep their rotary positions, as in the paper, or are numbered anew.
    """

    keep: int | float
    layer: int = 2
    positions: PositionPolicy = "keep"

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise RecipeError(
                f"[[compress]] fastv layer = {self.layer} must be at least 1: tokens are ranked by the layer before it"
            )

    def plan(self, spec: VlmSpec, arriving: TokenPlan) -> TokenPlan:
        return plan_drop(arriving, spec, Drop(layer=self.layer, keep=self.keep), "[[compress]] fastv")

    @classmethod
    def choices(cls, spec: VlmSpec) -> Mapping[str, Sequence[Any]]:
        return {**super().choices(spec), "layer": sorted({1, 2, 3, spec.num_layers // 4} - {0})}

    def bottlenecks(self, spec: VlmSpec, arriving: TokenPlan) -> "dict[int, Bottleneck]":
        from tokexport.exporter.modules.bottleneck import ScoredGather  # planning does without torch
        from tokexport.exporter.modules.span_attention import SpanAttention

        count = self.plan(spec, arriving).per_layer[self.layer]
        return {self.layer: ScoredGather(count, SpanAttention("before", "last"), self.positions)}

    def for_num_layers(self, before: int, after: int) -> Self:
        return replace(self, layer=max(1, scaled_layers([self.layer], before, after)[0]))
