"""PyramidDrop (arXiv 2410.17247): fewer tokens at each stage of the language model, by the last token's attention.

Before each stage the vision tokens stay that the last token of the prompt attends to most, with queries and keys of the
layer that follows. The choice is made when the image comes in, by the question that comes with it, and later turns
have to live with it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokexport.exporter.drops import Dropping
from tokexport.exporter.plan import PositionPolicy, TokenPlan, VlmSpec

if TYPE_CHECKING:
    from tokexport.exporter.modules.bottleneck import Bottleneck


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Dropping):
    """Keep what the last token attends to, stage by stage.

    Attributes:
        positions: whether kept tokens keep their rotary positions or are numbered anew, as in the paper.
    """

    positions: PositionPolicy = "renumber"

    def bottlenecks(self, spec: VlmSpec, arriving: TokenPlan) -> "dict[int, Bottleneck]":
        from tokexport.exporter.modules.bottleneck import ScoredGather  # planning does without torch
        from tokexport.exporter.modules.span_attention import SpanAttention

        kept = self.plan(spec, arriving).per_layer
        return {
            drop.layer: ScoredGather(kept[drop.layer], SpanAttention("own", "last"), self.positions)
            for drop in self.drops
        }
