"""ADSC, attention-driven self-compression (arXiv 2602.12618).

Vision tokens are downsampled uniformly before chosen decoder layers. There are no scores and no
extra module: the model, tuned with the bottlenecks in place, moves what matters into the tokens
that stay. In a graph every bottleneck is a gather with a constant index.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tokexport.errors import RecipeError, nearest_numbers
from tokexport.exporter.drops import Dropping
from tokexport.exporter.plan import (
    Pattern,
    PositionPolicy,
    TokenPlan,
    VlmSpec,
    even_grids,
    grid_counts,
    grid_index,
    squarest_grid,
    stride_index,
)

if TYPE_CHECKING:
    from tokexport.exporter.modules.bottleneck import Bottleneck


@dataclass(frozen=True, kw_only=True)
class Adsc(Dropping):
    """Uniform downsampling inside the language model.

    Attributes:
        pattern: ``stride`` thins the row-major sequence, ``grid`` the rows and columns.
        phase: where in its cell the kept token lies, from 0 (first) to below 1.
        positions: whether kept tokens keep their rotary positions or are numbered anew.
    """

    pattern: Pattern = "stride"
    phase: float = 0.0
    positions: PositionPolicy = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.phase < 1:
            raise RecipeError(f"[[compress]] adsc phase = {self.phase} must be at least 0 and below 1")

    def plan(self, spec: VlmSpec, arriving: TokenPlan) -> TokenPlan:
        plan = super().plan(spec, arriving)
        if self.pattern == "grid":
            self._grids(plan, arriving)
        return plan

    @classmethod
    def choices(cls, spec: VlmSpec) -> Mapping[str, Sequence[Any]]:
        # Attention is causal: only the last token of a cell has seen the others.
        return {**super().choices(spec), "phase": (0.5, 0.99)}

    def countable(self, arriving: TokenPlan) -> Sequence[int]:
        if self.pattern == "grid" and arriving.grid is not None:
            return list(even_grids(arriving.grid))
        return super().countable(arriving)

    def bottlenecks(self, spec: VlmSpec, arriving: TokenPlan) -> "dict[int, Bottleneck]":
        from tokexport.exporter.modules.bottleneck import StaticGather  # planning does without torch

        return {layer: StaticGather(index, self.positions) for layer, index in self.indices(spec, arriving).items()}

    def indices(self, spec: VlmSpec, arriving: TokenPlan) -> dict[int, tuple[int, ...]]:
        """Return, by layer, which of the tokens arriving at its bottleneck are kept, ascending."""
        plan = self.plan(spec, arriving)
        counts = [arriving.arriving_at(self.drops[0].layer), *(plan.per_layer[drop.layer] for drop in self.drops)]
        if self.pattern == "stride":
            kept = [stride_index(n, m, self.phase) for n, m in pairwise(counts)]
        else:
            grids = self._grids(plan, arriving)
            kept = [grid_index(before, after, self.phase) for before, after in pairwise(grids)]
        return {drop.layer: index for drop, index in zip(self.drops, kept, strict=True)}

    def _grids(self, plan: TokenPlan, arriving: TokenPlan) -> list[tuple[int, int]]:
        """Return rows and columns before the first bottleneck and behind each."""
        grid = arriving.require_grid("[[compress]] adsc", self.drops[0].layer)
        grids = [grid]
        for drop in self.drops:
            keep = plan.per_layer[drop.layer]
            kept = squarest_grid(grid, grids[-1], keep)
            if kept is None:
                raise RecipeError(
                    f"[[compress]] adsc drop before layer {drop.layer}: {keep} tokens are no rows x columns within "
                    f"{grids[-1][0]} x {grids[-1][1]}; {nearest_numbers(keep, grid_counts(grids[-1]))} would be"
                )
            grids.append(kept)
        return grids
