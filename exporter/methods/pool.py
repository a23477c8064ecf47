"""Average pooling before the language model: the mean of each window, a control for every learned mixture."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokexport.exporter.plan import TokenPlan, VlmSpec
from tokexport.exporter.windows import Windowed

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Pool(Windowed):
    """Keep the mean of the vision tokens in each window."""

    def feature_stage(self, spec: VlmSpec, arriving: TokenPlan) -> "nn.Module":
        from tokexport.exporter.modules.token_mixing import WindowAverage  # planning does without torch

        return WindowAverage(self.windows(arriving))
