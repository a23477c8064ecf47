"""MetaCompress (arXiv 2603.21701): a learned matrix, made from the image alone, mixes vision tokens into fewer.

It stands once before the language model, so that one cache serves every later question. In a graph it is a
subgraph of the vision encoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from tokexport.errors import RecipeError
from tokexport.exporter.budget import Load, is_met
from tokexport.exporter.bundled import settled
from tokexport.exporter.method import UNTRAINED
from tokexport.exporter.plan import TokenPlan, VlmSpec
from tokexport.exporter.windows import Windowed

if TYPE_CHECKING:
    from torch import Tensor

    from tokexport.exporter.modules.token_mixing import MetaCompressor


@dataclass(frozen=True, kw_only=True)
class MetaCompress(Windowed):
    """Mix vision tokens by a matrix made from the image.

    Attributes:
        width: of the scores, far below the model's.
        weights: a safetensors file, or the name of weights that ship; ``untrained`` is enough to measure speed.
    """

    is_mixing: ClassVar[bool] = True

    weights: str
    width: int = 64

    def __post_init__(self) -> None:
        if self.width < 1:
            raise RecipeError(f"[[compress]] metacompress width = {self.width} must be at least 1")

    def feature_stage(self, spec: VlmSpec, arriving: TokenPlan) -> "MetaCompressor":
        from tokexport.exporter.modules.token_mixing import MetaCompressor  # planning does without torch

        return MetaCompressor(spec.hidden_size, self.width, self.windows(arriving))

    def learned(self, spec: VlmSpec, arriving: TokenPlan) -> "Mapping[str, Tensor]":
        import torch

        from tokexport.exporter.compressor_file import load_compressor

        if self.weights == UNTRAINED:
            module = self.feature_stage(spec, arriving)
            module.matrix.start(torch.Generator().manual_seed(0))
            return dict(module.named_parameters())
        with torch.device("meta"):
            module = self.feature_stage(spec, arriving)
        return load_compressor(self.weights, module, self.trained_sizes(arriving))

    def for_budget(self, spec: VlmSpec, arriving: TokenPlan, tokens: int) -> Self:
        mean = self.plan(spec, arriving).mean_vision_tokens
        if is_met(mean, tokens):
            return self
        if self.weights != UNTRAINED:
            raise RecipeError(
                f"[[compress]] metacompress: the weights {self.weights} are trained for {mean:g} vision tokens per "
                f"layer, not {tokens}; train others for it with 'tokexport train metacompress'"
            )
        return super().for_budget(spec, arriving, tokens)

    def within(self, spec: VlmSpec, arriving: TokenPlan, load: Load) -> Self:
        return super().within(spec, arriving, load) if self.weights == UNTRAINED else self

    def settled(self) -> Self:
        return self if self.weights == UNTRAINED else replace(self, weights=settled(self.weights))

    def trained_sizes(self, arriving: TokenPlan) -> dict[str, str]:
        """Return, in words, the sizes that weights are made for and that their shapes do not show."""
        windows = self.windows(arriving)
        return {
            "method": self.name,
            "tokens": " x ".join(map(str, windows.arriving)),
            "kernel": " x ".join(map(str, windows.kernel)),
            "stride": " x ".join(map(str, windows.stride)),
            "positions": self.positions,
        }
