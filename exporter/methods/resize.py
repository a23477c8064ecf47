"""A smaller image, shrunk inside the graph: fewer tokens out of a cheaper vision tower, a control."""

import math
from dataclasses import dataclass
from typing import ClassVar

from tokexport.errors import RecipeError, nearest_numbers
from tokexport.exporter.method import Method
from tokexport.exporter.plan import TokenPlan, VlmSpec, resolve_keep

# One patch would be one token, which a graph takes for a constant.
_LEAST_SIDE = 2


@dataclass(frozen=True, kw_only=True)
class Resize(Method):
    """Shrink the image, so that a square of fewer patches covers all of it.

    Attributes:
        keep: a token count (int), which must be a square, or a fraction (float), of which the nearest square is taken.
    """

    is_control: ClassVar[bool] = True

    keep: int | float

    def plan(self, spec: VlmSpec, arriving: TokenPlan) -> TokenPlan:
        if arriving != TokenPlan.uncompressed(spec):
            raise RecipeError(
                "[[compress]] resize makes the image smaller, before any method can drop a token of it; put it first"
            )
        return arriving.resized(self.tower_grid(spec, arriving))

    def tower_grid(self, spec: VlmSpec, arriving: TokenPlan) -> tuple[int, int]:
        where = "[[compress]] resize:"
        rows, columns = spec.vision_grid
        if rows != columns:
            raise RecipeError(
                f"{where} the vision tower has {rows} x {columns} patches, expected a square; choose another method"
            )
        squares = {side * side: side for side in range(_LEAST_SIDE, rows)}
        if not squares:
            raise RecipeError(
                f"{where} no smaller square of at least {_LEAST_SIDE} x {_LEAST_SIDE} fits into the {rows} x {columns} "
                "patches of the vision tower; choose another method"
            )
        if isinstance(self.keep, float):
            count = resolve_keep(self.keep, spec.num_vision_tokens, where)
            square = round(math.sqrt(count)) ** 2  # the nearest to a whole number is that of its nearest root
        else:
            count = square = self.keep
        if square not in squares:
            raise RecipeError(
                f"{where} keep = {self.keep} asks for {count} tokens, but a smaller image has a square of them, from "
                f"{_LEAST_SIDE} x {_LEAST_SIDE} to {rows - 1} x {rows - 1}; choose {nearest_numbers(count, squares)}"
            )
        return squares[square], squares[square]
