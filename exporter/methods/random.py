"""Random tokens before the language model: the same seeded choice for every image and turn, a control."""

import random as stdlib_random
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tokexport.exporter.method import Method
from tokexport.exporter.plan import PositionPolicy, TokenPlan, VlmSpec, resolve_keep

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """Keep a seeded random subset, in order.

    Attributes:
        keep: a token count (int) or a fraction (float).
        seed: of the choice.
        positions: ``renumber`` puts the tokens side by side, ``keep`` where they were.
    """

    is_control: ClassVar[bool] = True

    keep: int | float
    seed: int = 0
    positions: PositionPolicy = "renumber"

    def plan(self, spec: VlmSpec, arriving: TokenPlan) -> TokenPlan:
        index = self._index(arriving)
        return arriving.thinned_before_llm(len(index), places=index if self.positions == "keep" else None)

    def feature_stage(self, spec: VlmSpec, arriving: TokenPlan) -> "nn.Module":
        from tokexport.exporter.modules.bottleneck import FeatureGather  # planning does without torch

        return FeatureGather(self._index(arriving))

    def _index(self, arriving: TokenPlan) -> tuple[int, ...]:
        count = arriving.entering_llm
        kept = resolve_keep(self.keep, count, "[[compress]] random:")
        return tuple(sorted(stdlib_random.Random(self.seed).sample(range(count), kept)))
