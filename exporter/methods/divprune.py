"""DivPrune (arXiv 2503.02175): the vision tokens that are most unlike each other, chosen before the language model.

Nothing is learned and the question is not read, so one cache serves every later turn.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tokexport.exporter.method import Method
from tokexport.exporter.plan import TokenPlan, VlmSpec, resolve_keep

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class DivPrune(Method):
    """Keep the tokens whose smallest distance from each other is the largest, by the cosine of image features.

    Attributes:
        keep: a token count (int) or a fraction (float).
    """

    chooser: ClassVar[str] = "index"

    keep: int | float

    def plan(self, spec: VlmSpec, arriving: TokenPlan) -> TokenPlan:
        return arriving.thinned_before_llm(resolve_keep(self.keep, arriving.entering_llm, "[[compress]] divprune:"))

    def feature_stage(self, spec: VlmSpec, arriving: TokenPlan) -> "nn.Module":
        from tokexport.exporter.modules.selection import FarthestPoints  # planning does without torch

        return FarthestPoints(self.plan(spec, arriving).entering_llm)
