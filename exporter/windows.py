"""Windows over vision tokens: how wide they are, how far apart, and how many fit.

Methods that merge tokens start from averages over windows, and the windows alone say how many tokens come out.
"""

import functools
import math
from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Self

from tokexport.errors import RecipeError, nearest_numbers
from tokexport.exporter.budget import Load
from tokexport.exporter.method import Method
from tokexport.exporter.plan import Pattern, PositionPolicy, TokenPlan, VlmSpec, resolve_keep

# Of the tokens that a fraction asks for.
_MAY_DIFFER = 0.05


@dataclass(frozen=True)
class Windows:
    """Windows of one size at equal distances along each axis: of a sequence one, of a grid rows and columns."""

    arriving: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        """How many windows fit along each axis."""
        return tuple(
            (length - kernel) // stride + 1
            for length, kernel, stride in zip(self.arriving, self.kernel, self.stride, strict=True)
        )

    @property
    def count(self) -> int:
        """How many tokens come out."""
        return math.prod(self.kept)

    @property
    def overlap(self) -> int:
        """By how many tokens kernels and strides differ: none where windows tile."""
        return sum(abs(kernel - stride) for kernel, stride in zip(self.kernel, self.stride, strict=True))

    @property
    def centres(self) -> tuple[int, ...]:
        """The token in the middle of each window, the first of two."""
        along = [
            [number * stride + (kernel - 1) // 2 for number in range(kept)]
            for kernel, stride, kept in zip(self.kernel, self.stride, self.kept, strict=True)
        ]
        if len(along) == 1:
            return tuple(along[0])
        rows, columns = along
        return tuple(self.arriving[1] * row + column for row in rows for column in columns)


@dataclass(frozen=True, kw_only=True)
class Windowed(Method, ABC):
    """A method before the language model with one token for each window.

    Attributes:
        keep: a token count (int) or a fraction (float), for which kernel and stride are found; or else give both. For
            a fraction of a grid, windows that overlap less are taken where their count is within 5 % of it.
        kernel: tokens that a window covers, along each axis.
        stride: tokens from one window to the next, along each axis.
        pattern: ``stride`` lays windows along the row-major sequence, ``grid`` along rows and columns.
        positions: ``renumber`` puts the tokens side by side, ``keep`` where the middle of its window was.
    """

    keep: int | float | None = None
    kernel: int | None = None
    stride: int | None = None
    pattern: Pattern = "grid"
    positions: PositionPolicy = "renumber"

    def plan(self, spec: VlmSpec, arriving: TokenPlan) -> TokenPlan:
        windows = self.windows(arriving)
        grid = (windows.kept[0], windows.kept[1]) if len(windows.kept) == 2 else None
        places = windows.centres if self.positions == "keep" else None
        return arriving.thinned_before_llm(windows.count, grid, places=places)

    def for_budget(self, spec: VlmSpec, arriving: TokenPlan, tokens: int) -> Self:
        if self.plan(spec, arriving).mean_vision_tokens == tokens:
            return self
        return super(Windowed, replace(self, kernel=None, stride=None)).for_budget(spec, arriving, tokens)

    def within(self, spec: VlmSpec, arriving: TokenPlan, load: Load) -> Self:
        return super(Windowed, replace(self, kernel=None, stride=None)).within(spec, arriving, load)

    def windows(self, arriving: TokenPlan) -> Windows:
        """Return the windows over the tokens that arrive.

        Raises:
            RecipeError: no windows make what is asked for.
        """
        where = f"[[compress]] {self.name}:"
        if (self.keep is None) == (self.kernel is None) or (self.kernel is None) != (self.stride is None):
            given = [key for key in ("keep", "kernel", "stride") if getattr(self, key) is not None]
            raise RecipeError(
                f"{where} {' and '.join(given) or 'nothing'} is given, expected either keep, or kernel and stride"
            )
        grid = arriving.require_grid(where) if self.pattern == "grid" else None
        axes = grid or (arriving.entering_llm,)
        if self.kernel is not None and self.stride is not None:
            return _given(axes, self.kernel, self.stride, where)
        assert self.keep is not None
        count = resolve_keep(self.keep, arriving.entering_llm, where)
        if grid is not None:
            return _grid_windows(grid, count, where, may_differ=isinstance(self.keep, float))
        return _fitted(axes, (count,))


def fitting(length: int, count: int) -> tuple[int, int]:
    """Return kernel and stride of ``count`` windows over ``length`` tokens, as close to a tiling as can be.

    Of those where both differ least, the ones that cover most tokens are taken.
    """
    if count == 1:
        return length, length
    largest = (length - 1) // (count - 1)
    choices = [
        (kernel, stride)
        for stride in range(1, largest + 1)
        # The last window ends within the tokens, and no other would fit behind it.
        for kernel in range(max(1, length - count * stride + 1), length - (count - 1) * stride + 1)
    ]
    return min(choices, key=lambda choice: (abs(choice[0] - choice[1]), -choice[0]))


def _given(axes: tuple[int, ...], kernel: int, stride: int, where: str) -> Windows:
    if kernel < 1 or stride < 1 or kernel > min(axes):
        raise RecipeError(
            f"{where} kernel = {kernel} and stride = {stride} must be at least 1, and the kernel at most {min(axes)}, "
            "the tokens that arrive along an axis"
        )
    windows = Windows(axes, (kernel,) * len(axes), (stride,) * len(axes))
    # What keep cannot ask for, windows cannot either.
    resolve_keep(windows.count, math.prod(axes), f"{where} kernel = {kernel} and stride = {stride} make")
    return windows


def _fitted(axes: tuple[int, ...], kept: tuple[int, ...]) -> Windows:
    found = [fitting(length, number) for length, number in zip(axes, kept, strict=True)]
    return Windows(axes, tuple(kernel for kernel, _ in found), tuple(stride for _, stride in found))


@functools.cache
def _grids(axes: tuple[int, int]) -> Mapping[int, Windows]:
    """Return, by count, the windows that make it: the nearest to a tiling, of equals the squarest grid."""
    made: dict[int, Windows] = {}
    for kept in product(*(range(1, length + 1) for length in axes)):
        windows = _fitted(axes, kept)
        if 1 < windows.count < math.prod(axes):
            made[windows.count] = min(made.get(windows.count, windows), windows, key=_effort)
    return made


def _effort(windows: Windows) -> tuple[int, float]:
    rows, columns = windows.kept
    return windows.overlap, max(rows / columns, columns / rows)


def _grid_windows(axes: tuple[int, int], count: int, where: str, *, may_differ: bool) -> Windows:
    made = _grids(axes)
    if may_differ:
        # A little off, windows that tile are worth more than an exact count of such that overlap.
        near = [number for number in made if abs(number - count) <= _MAY_DIFFER * count] or list(made)
        count = min(near, key=lambda number: (made[number].overlap, abs(number - count), _effort(made[number])))
    if count not in made:
        raise RecipeError(
            f"{where} no kernel and stride over {axes[0]} x {axes[1]} tokens make {count}; keep "
            f'{nearest_numbers(count, made)}, or lay the windows along the sequence with pattern = "stride"'
        )
    return made[count]
