"""CDPruner (arXiv 2506.10967): vision tokens that are unlike each other and have to do with the question.

Greedily, each next token is the one that makes the determinant of the chosen tokens' kernel the largest: the cosine of
two tokens, times the relevance of both, which is how like the question a token is, stretched from 0 to 1. Nothing is
learned. The choice is made when the image comes in, by the question that comes with it, and later turns have to live
with it.

For LLaVA the authors take relevance from CLIP's text encoder, which LLaVA's checkpoints do not hold; public code for
models without one takes the language model's own embeddings. So does this: relevance is the cosine of image features
with the embeddings of the text behind the image, averaged over its tokens, those of the chat template included. That is
a weaker signal: words one by one are no sentence, and nothing trained them to lie near what they name. In CLIP, tokens
that are like the text are the irrelevant ones, and the authors' code turns the sign around; here ``unlike`` does.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tokexport.exporter.drops import Drop, plan_drop
from tokexport.exporter.method import Method
from tokexport.exporter.plan import PositionPolicy, TokenPlan, VlmSpec

if TYPE_CHECKING:
    from tokexport.exporter.modules.bottleneck import Bottleneck


@dataclass(frozen=True, kw_only=True)
class CdPruner(Method):
    """Keep tokens by a determinantal point process, before the first layer.

    Attributes:
        keep: a token count (int) or a fraction (float).
        relevance: ``like`` the question as in the paper's formula, ``unlike`` it as in the authors' code for CLIP, or
            ``none``: all tokens are as relevant, and no question is read.
        positions: whether kept tokens keep their rotary positions or are numbered anew, as in the authors' code.
    """

    keep: int | float
    relevance: Literal["like", "unlike", "none"] = "like"
    positions: PositionPolicy = "renumber"

    def plan(self, spec: VlmSpec, arriving: TokenPlan) -> TokenPlan:
        return plan_drop(arriving, spec, Drop(layer=0, keep=self.keep), "[[compress]] cdpruner")

    def bottlenecks(self, spec: VlmSpec, arriving: TokenPlan) -> "dict[int, Bottleneck]":
        from tokexport.exporter.modules.bottleneck import DiverseGather  # planning does without torch
        from tokexport.exporter.modules.conditional_kernel import ConditionalKernel

        count = self.plan(spec, arriving).per_layer[0]
        return {0: DiverseGather(count, ConditionalKernel(self.relevance), self.positions)}
