"""VisionZip (arXiv 2412.04467): vision tokens that the class token attends to, and averages of the others.

It stands between the vision tower and the projector. Nothing is learned and the question is not read, so one cache
serves every later turn.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokexport.errors import RecipeError
from tokexport.exporter.class_token import ByClassToken
from tokexport.exporter.plan import TokenPlan, VlmSpec

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class VisionZip(ByClassToken):
    """Keep dominant tokens by attention and merge the rest into contextual ones by the likeness of keys.

    Attributes:
        contextual: how many of ``keep`` are merged ones, a count (int) or a fraction (float); the paper has 30 of 192,
            20 of 128 and 10 of 64.
        class_token: whether the class token itself is one of the dominant tokens, as in the authors' code.
    """

    contextual: int | float = 0.15625
    class_token: bool = True

    def plan(self, spec: VlmSpec, arriving: TokenPlan) -> TokenPlan:
        plan = super().plan(spec, arriving)
        contextual, most = self._num_contextual(plan), plan.entering_llm - self.class_token - 1
        if not 1 <= contextual <= most:
            raise RecipeError(
                f"[[compress]] visionzip contextual = {self.contextual} asks for {contextual} merged tokens of "
                f"{plan.entering_llm}; choose 1 to {most}, so that a vision token stays as it is"
            )
        return plan

    def feature_stage(self, spec: VlmSpec, arriving: TokenPlan) -> "nn.Module":
        from tokexport.exporter.modules.visionzip import AttendedAndAverages  # planning does without torch

        plan = self.plan(spec, arriving)
        contextual = self._num_contextual(plan)
        return AttendedAndAverages(
            layer=self.layer_read(spec),
            num_tokens=arriving.emitted,
            attended=plan.entering_llm - contextual - self.class_token,
            averages=contextual,
            has_class_token=self.class_token,
        )

    def _num_contextual(self, plan: TokenPlan) -> int:
        if isinstance(self.contextual, float):
            return round(self.contextual * plan.entering_llm)
        return self.contextual
