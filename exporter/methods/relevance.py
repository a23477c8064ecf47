"""The relevance compressor (arXiv 2506.01097): a small learned network ranks tokens by the first layer's attention.

How much the question attends to each vision token in layer 0 goes through a few convolutions, and the tokens with the
highest scores enter the language model. It reads the question that comes with the image, and later turns have to live
with its choice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from tokexport.errors import RecipeError
from tokexport.exporter.bundled import settled
from tokexport.exporter.drops import Drop, plan_drop
from tokexport.exporter.graph_io import bottleneck_name
from tokexport.exporter.method import UNTRAINED, Method
from tokexport.exporter.plan import PositionPolicy, TokenPlan, VlmSpec

if TYPE_CHECKING:
    from torch import Tensor

    from tokexport.exporter.modules.bottleneck import Bottleneck
    from tokexport.exporter.modules.relevance import RelevanceNet


@dataclass(frozen=True, kw_only=True)
class Relevance(Method):
    """Keep the tokens that a network finds important, before the first layer.

    Attributes:
        keep: a token count (int) or a fraction (float).
        weights: a safetensors file, or the name of weights that ship; ``untrained`` is enough to measure speed.
        channels: of the network's convolutions.
        kernel: tokens that each of them sees.
        positions: whether kept tokens keep their rotary positions or are numbered anew.
    """

    keep: int | float
    weights: str
    channels: tuple[int, ...] = (32, 64, 128, 256, 512)
    kernel: int = 7
    positions: PositionPolicy = "keep"

    def __post_init__(self) -> None:
        if not self.channels or min(self.channels) < 1:
            raise RecipeError(
                f"[[compress]] relevance channels = {list(self.channels)} must be at least one number, all at least 1"
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise RecipeError(f"[[compress]] relevance kernel = {self.kernel} must be odd and at least 1")

    def plan(self, spec: VlmSpec, arriving: TokenPlan) -> TokenPlan:
        return plan_drop(arriving, spec, Drop(layer=0, keep=self.keep), "[[compress]] relevance")

    def bottlenecks(self, spec: VlmSpec, arriving: TokenPlan) -> "dict[int, Bottleneck]":
        from tokexport.exporter.modules.bottleneck import ScoredGather  # planning does without torch
        from tokexport.exporter.modules.span_attention import SpanAttention

        count = self.plan(spec, arriving).per_layer[0]
        look = SpanAttention("own", "text")
        return {0: ScoredGather(count, look, self.positions, self.network())}

    def network(self) -> "RelevanceNet":
        """Return the network without values."""
        from tokexport.exporter.modules.relevance import RelevanceNet

        return RelevanceNet(self.channels, self.kernel)

    def learned(self, spec: VlmSpec, arriving: TokenPlan) -> "Mapping[str, Tensor]":
        import torch

        from tokexport.exporter.compressor_file import load_compressor

        if self.weights == UNTRAINED:
            module = self.network()
            module.start(torch.Generator().manual_seed(0))
            return dict(module.named_parameters())
        with torch.device("meta"):
            module = self.network()
        return load_compressor(self.weights, module, self.trained_sizes())

    @property
    def learner(self) -> str:
        return f"{bottleneck_name(0)}.score"

    def settled(self) -> Self:
        return self if self.weights == UNTRAINED else replace(self, weights=settled(self.weights))

    def trained_sizes(self) -> dict[str, str]:
        """Return, in words, the sizes that weights are made for."""
        return {
            "method": self.name,
            "channels": ", ".join(map(str, self.channels)),
            "kernel": str(self.kernel),
        }
