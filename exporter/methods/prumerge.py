"""PruMerge (arXiv 2403.15388): vision tokens that the class token attends to, with those most like them added.

It stands between the vision tower and the projector. Nothing is learned and the question is not read, so one cache
serves every later turn.

The paper keeps the outliers of each image's attention, more of some images than of others; here ``keep`` fixes how
many, as the shapes of a graph do not depend on data. Tokens stay in their order. The authors' code reads another layer,
the last of the tower with all heads as one; here it is the penultimate, as the paper says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokexport.errors import RecipeError
from tokexport.exporter.class_token import ByClassToken
from tokexport.exporter.plan import TokenPlan, VlmSpec, stride_index

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class PruMerge(ByClassToken):
    """Keep tokens by attention, add their neighbours to them, and sum all others into one last token.

    Attributes:
        neighbours: how many tokens, by the likeness of keys, are added to each kept one, weighted by attention to them.
        plus: PruMerge+, which keeps equidistant tokens too. They are half of the kept ones, as in the authors' code for
            fixed numbers, and the other half has the highest attention among all others.
    """

    neighbours: int = 32
    plus: bool = False

    def plan(self, spec: VlmSpec, arriving: TokenPlan) -> TokenPlan:
        if not 1 <= self.neighbours < arriving.emitted:
            raise RecipeError(
                f"[[compress]] prumerge neighbours = {self.neighbours} must be at least 1 and below the "
                f"{arriving.emitted} vision tokens that the tower emits"
            )
        return super().plan(spec, arriving)

    @classmethod
    def choices(cls, spec: VlmSpec) -> Mapping[str, Sequence[Any]]:
        return {**super().choices(spec), "plus": (False, True)}

    def feature_stage(self, spec: VlmSpec, arriving: TokenPlan) -> "nn.Module":
        from tokexport.exporter.modules.prumerge import AttendedWithNeighbours  # planning does without torch

        kept = self.plan(spec, arriving).entering_llm - 1
        return AttendedWithNeighbours(
            layer=self.layer_read(spec),
            num_tokens=arriving.emitted,
            kept=kept,
            neighbours=self.neighbours,
            always=self._equidistant(arriving.emitted, kept),
        )

    def _equidistant(self, num_tokens: int, kept: int) -> Sequence[int]:
        return stride_index(num_tokens, kept // 2, 0.5) if self.plus else ()
