"""Uniform sampling before the language model: equidistant vision tokens, the control every method must beat."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tokexport.errors import RecipeError
from tokexport.exporter.method import Method
from tokexport.exporter.plan import PositionPolicy, TokenPlan, VlmSpec, resolve_keep, stride_index

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Sample(Method):
    """Keep equidistant tokens of the row-major sequence.

    Attributes:
        keep: a token count (int) or a fraction (float).
        phase: where in its stretch the kept token lies, from 0 (first) to below 1.
        positions: ``renumber`` puts the tokens side by side, ``keep`` where they were.
    """

    is_control: ClassVar[bool] = True

    keep: int | float
    phase: float = 0.5
    positions: PositionPolicy = "renumber"

    def __post_init__(self) -> None:
        if not 0 <= self.phase < 1:
            raise RecipeError(f"[[compress]] sample phase = {self.phase} must be at least 0 and below 1")

    def plan(self, spec: VlmSpec, arriving: TokenPlan) -> TokenPlan:
        index = self._index(arriving)
        return arriving.thinned_before_llm(len(index), places=index if self.positions == "keep" else None)

    def feature_stage(self, spec: VlmSpec, arriving: TokenPlan) -> "nn.Module":
        from tokexport.exporter.modules.bottleneck import FeatureGather  # planning does without torch

        return FeatureGather(self._index(arriving))

    def _index(self, arriving: TokenPlan) -> tuple[int, ...]:
        count = arriving.entering_llm
        return stride_index(count, resolve_keep(self.keep, count, "[[compress]] sample:"), self.phase)
