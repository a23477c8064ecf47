"""Uniform sampling before the language model: equidistant vision tokens, the control every method must beat."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tokexport.errors import RecipeError, nearest_numbers
from tokexport.exporter.method import Method
from tokexport.exporter.plan import (
    Pattern,
    PositionPolicy,
    TokenPlan,
    VlmSpec,
    even_grids,
    grid_index,
    resolve_keep,
    stride_index,
)

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Sample(Method):
    """Keep equidistant tokens.

    Attributes:
        keep: a token count (int) or a fraction (float), of a grid the nearest that rows and columns make.
        pattern: ``stride`` thins the row-major sequence, ``grid`` the rows and columns.
        phase: where in its stretch or cell the kept token lies, from 0 (first) to below 1.
        positions: ``renumber`` puts the tokens side by side, ``keep`` where they were.
    """

    is_control: ClassVar[bool] = True

    keep: int | float
    pattern: Pattern = "stride"
    phase: float = 0.5
    positions: PositionPolicy = "renumber"

    def __post_init__(self) -> None:
        if not 0 <= self.phase < 1:
            raise RecipeError(f"[[compress]] sample phase = {self.phase} must be at least 0 and below 1")

    def plan(self, spec: VlmSpec, arriving: TokenPlan) -> TokenPlan:
        index, grid = self._index(arriving)
        return arriving.thinned_before_llm(len(index), grid, places=index if self.positions == "keep" else None)

    def feature_stage(self, spec: VlmSpec, arriving: TokenPlan) -> "nn.Module":
        from tokexport.exporter.modules.bottleneck import FeatureGather  # planning does without torch

        return FeatureGather(self._index(arriving)[0])

    def _index(self, arriving: TokenPlan) -> tuple[tuple[int, ...], tuple[int, int] | None]:
        """Return which tokens are kept, ascending, and their rows and columns where they have such."""
        where = "[[compress]] sample:"
        count = resolve_keep(self.keep, arriving.entering_llm, where)
        if self.pattern == "stride":
            return stride_index(arriving.entering_llm, count, self.phase), None
        grid = arriving.require_grid(where)
        grids = even_grids(grid)
        if isinstance(self.keep, float):
            count = min(grids, key=lambda number: abs(number - count))
        if count not in grids:
            raise RecipeError(
                f"{where} {count} tokens are no even rows x columns of {grid[0]} x {grid[1]}; keep "
                f'{nearest_numbers(count, grids)}, or take them along the sequence with pattern = "stride"'
            )
        return grid_index(grid, grids[count], self.phase), grids[count]
