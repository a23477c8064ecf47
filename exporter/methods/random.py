"""Random tokens before the language model: the same seeded choice for every image and turn, a control."""

import random as stdlib_random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokexport.exporter.method import Method
from tokexport.exporter.plan import TokenPlan, VlmSpec, resolve_keep

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """Keep a seeded random subset, in order.

    Attributes:
        keep: a token count (int) or a fraction (float).
        seed: of the choice.
    """

    keep: int | float
    seed: int = 0

    def plan(self, spec: VlmSpec, arriving: TokenPlan) -> TokenPlan:
        return arriving.thinned_before_llm(resolve_keep(self.keep, arriving.entering_llm, "[[compress]] random:"))

    def feature_stage(self, spec: VlmSpec, arriving: TokenPlan) -> "nn.Module":
        from tokexport.exporter.modules.bottleneck import FeatureGather  # planning does without torch

        count = arriving.entering_llm
        chosen = stdlib_random.Random(self.seed).sample(range(count), self.plan(spec, arriving).entering_llm)
        return FeatureGather(tuple(sorted(chosen)))
