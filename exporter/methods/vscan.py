"""VScan (arXiv 2505.22654): tokens that stand out in a window or the image, and fewer inside the language model.

The first stage reads the class token's attention in two layers of the vision tower and merges behind the projector. The
second drops tokens before a layer of the language model by the last token's attention, with the queries and keys of
that layer; this choice is made by the question that comes with the image, and later turns have to live with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from tokexport.errors import RecipeError
from tokexport.exporter.class_token import ByClassToken
from tokexport.exporter.drops import Drop, plan_drop
from tokexport.exporter.plan import PositionPolicy, TokenPlan, VlmSpec, scaled_layers

if TYPE_CHECKING:
    from torch import nn

    from tokexport.exporter.modules.bottleneck import Bottleneck

_ONE_THIRD = 1 / 3


@dataclass(frozen=True, kw_only=True)
class VScan(ByClassToken):
    """Keep half of the tokens by windows and half by the whole image, then fewer from ``layer`` on.

    Attributes:
        window: rows and columns of tokens in a window. Each keeps equally many, at most half of ``keep`` together; the
            whole image adds what is missing.
        local_layer: of the tower, counted from 0, whose attention counts in windows.
        layer: of the language model, counted from 0, before which tokens are dropped.
        keep_inside: of ``keep``, a token count (int) or a fraction (float); 32 of 96 in the paper.
        positions: whether tokens kept inside the language model keep their rotary positions or are numbered anew, as in
            the authors' code.
    """

    window: int = 6
    local_layer: int = 5
    layer: int = 16
    keep_inside: int | float = _ONE_THIRD
    positions: PositionPolicy = "renumber"

    def plan(self, spec: VlmSpec, arriving: TokenPlan) -> TokenPlan:
        self._require_windows(arriving)
        plan = super().plan(spec, arriving)
        self.require_layer(spec, "local_layer", self.local_layer)
        if self._per_window(arriving, plan) < 1:
            raise RecipeError(
                f"[[compress]] vscan keep = {self.keep} leaves no token to each of {self._num_windows(arriving)} "
                f"windows; keep at least {2 * self._num_windows(arriving)}, or raise window"
            )
        return plan_drop(plan, spec, Drop(layer=self.layer, keep=self.keep_inside), "[[compress]] vscan")

    @classmethod
    def choices(cls, spec: VlmSpec) -> Mapping[str, Sequence[Any]]:
        # The paper's places: layer 5 of 23 in the tower, 16 of 32 in the language model.
        early = (spec.class_token_layers or 0) // 4
        return {**super().choices(spec), "local_layer": (early,), "layer": (spec.num_layers // 2,)}

    def feature_stage(self, spec: VlmSpec, arriving: TokenPlan) -> "nn.Module":
        from tokexport.exporter.modules.vscan import LocalAndGlobal  # planning does without torch

        plan = self.plan(spec, arriving)
        assert arriving.grid is not None
        return LocalAndGlobal(
            local_layer=self.local_layer,
            layer=self.layer_read(spec),
            grid=arriving.grid,
            window=self.window,
            per_window=self._per_window(arriving, plan),
            kept=plan.entering_llm,
        )

    def bottlenecks(self, spec: VlmSpec, arriving: TokenPlan) -> "dict[int, Bottleneck]":
        from tokexport.exporter.modules.bottleneck import ScoredGather  # planning does without torch
        from tokexport.exporter.modules.span_attention import SpanAttention

        count = self.plan(spec, arriving).per_layer[self.layer]
        return {self.layer: ScoredGather(count, SpanAttention("own", "last"), self.positions)}

    def for_num_layers(self, before: int, after: int) -> Self:
        return replace(self, layer=scaled_layers([self.layer], before, after)[0])

    def _require_windows(self, arriving: TokenPlan) -> None:
        if arriving.grid is None:
            raise RecipeError(
                "[[compress]] vscan needs a full grid of tokens, which an earlier method broke; put vscan before it"
            )
        rows, columns = arriving.grid
        if self.window < 1 or rows % self.window or columns % self.window:
            raise RecipeError(
                f"[[compress]] vscan window = {self.window} does not divide the {rows} x {columns} grid of tokens; "
                "choose a number that does"
            )

    def _num_windows(self, arriving: TokenPlan) -> int:
        return arriving.emitted // self.window**2

    def _per_window(self, arriving: TokenPlan, plan: TokenPlan) -> int:
        return plan.entering_llm // 2 // self._num_windows(arriving)
