"""SparseVLM (arXiv 2410.04417): the vision tokens that matter to those words of the question that are about the image.

After chosen layers the tokens stay that the raters attend to most: text tokens whose embeddings are nearer to the
image than the mean. The choice is made when the image comes in, by the question that comes with it, and later turns
have to live with it.

Counts are fixed, as in the authors' tables. What the paper adds, dropped tokens clustered and recycled as a few more,
is left out: these tokens only stay or go.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokexport.errors import RecipeError
from tokexport.exporter.drops import Dropping
from tokexport.exporter.plan import PositionPolicy, TokenPlan, VlmSpec

if TYPE_CHECKING:
    from tokexport.exporter.modules.bottleneck import Bottleneck


@dataclass(frozen=True, kw_only=True)
class SparseVlm(Dropping):
    """Keep what the raters attend to in the layer before each bottleneck.

    Attributes:
        positions: whether kept tokens keep their rotary positions or are numbered anew, as in the authors' first code.
    """

    positions: PositionPolicy = "renumber"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drops[0].layer < 1:
            raise RecipeError(
                f"[[compress]] sparsevlm drops layer = {self.drops[0].layer} must be at least 1: tokens are ranked by "
                "the layer before it"
            )

    def bottlenecks(self, spec: VlmSpec, arriving: TokenPlan) -> "dict[int, Bottleneck]":
        from tokexport.exporter.modules.bottleneck import ScoredGather  # planning does without torch
        from tokexport.exporter.modules.span_attention import SpanAttention

        kept = self.plan(spec, arriving).per_layer
        return {
            drop.layer: ScoredGather(kept[drop.layer], SpanAttention("before", "raters"), self.positions)
            for drop in self.drops
        }
