"""Static sizes: how many tokens reach which layer, and what that costs.

``TokenPlan`` is the waist of tokexport. Graph shapes, cache capacities, FLOPs and the predicted
speed-up are read from it, and none of them knows which method made it.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any, Literal

from tokexport.errors import RecipeError

PositionPolicy = Literal["keep", "renumber"]
"""Rotary positions of the tokens that stay: those they came with, or side by side."""

Pattern = Literal["stride", "grid"]
"""What is thinned: the row-major sequence, or the rows and the columns of a grid of tokens."""

# torch.export takes a dimension of 0 or 1 for fixed, and the graph could not be run without an image.
LEAST_KEEP = 2
# Of the sides of a cell; where no product is squarer, the nearest counts that are do better.
_MOST_STRETCH = 2.0

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class VlmSpec:
    """The sizes of a vision-language model that planning needs.

    Attributes:
        class_token_layers: layers of the vision tower up to the one whose output is taken, where a class token in them
            attends to the vision tokens and methods can read it; None where there is no such token.
    """

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    image_size: int
    vision_grid: tuple[int, int]
    class_token_layers: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise RecipeError(f"the model's {name} = {value} must be at least 1")
        if min(self.vision_grid) < 1:
            raise RecipeError(f"an image of {self.image_size} pixels holds no patch; raise the model's image_size")

    @property
    def num_vision_tokens(self) -> int:
        """Vision tokens of one image when nothing is compressed."""
        return self.vision_grid[0] * self.vision_grid[1]


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Consecutive decoder layers that see the same number of vision tokens."""

    first_layer: int
    num_layers: int
    vision_tokens: int


@dataclass(frozen=True, kw_only=True)
class TokenPlan:
    """Vision tokens of one image on their way through the model.

    Attributes:
        emitted: tokens that the vision tower emits.
        entering_llm: tokens that enter the language model.
        per_layer: tokens that enter each decoder layer.
        grid: rows and columns of the tokens entering the language model, None once they are no
            longer a grid.
        places: of the tokens entering the language model among those emitted, which are then their rotary positions
            within the image, ascending; None where they stand side by side.
    """

    emitted: int
    entering_llm: int
    per_layer: tuple[int, ...]
    grid: tuple[int, int] | None = None
    places: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        chain = (self.emitted, self.entering_llm, *self.per_layer)
        assert all(before >= after >= 1 for before, after in pairwise(chain)), chain
        if self.places is not None:
            assert len(self.places) == self.entering_llm, self
            assert all(before <= after for before, after in pairwise((0, *self.places, self.emitted - 1))), self

    @classmethod
    def uncompressed(cls, spec: VlmSpec) -> "TokenPlan":
        count = spec.num_vision_tokens
        return cls(emitted=count, entering_llm=count, per_layer=(count,) * spec.num_layers, grid=spec.vision_grid)

    def resized(self, grid: tuple[int, int]) -> "TokenPlan":
        """Return the plan of a smaller image, of which the tower emits ``grid``, rows and columns.

        Tokens dropped behind the tower would be others of another image, so none may be dropped yet.
        """
        assert {self.entering_llm, *self.per_layer} == {self.emitted}, self
        count = grid[0] * grid[1]
        return replace(self, emitted=count, entering_llm=count, per_layer=(count,) * len(self.per_layer), grid=grid)

    def thinned_before_llm(
        self, keep: int, grid: tuple[int, int] | None = None, *, places: Sequence[int] | None = None
    ) -> "TokenPlan":
        """Return the plan with ``keep`` tokens entering the model.

        Args:
            keep: how many.
            grid: their rows and columns, if they have any.
            places: among the tokens that arrive, whose positions they keep; by default they stand side by side.

        Raises:
            RecipeError: tokens are already dropped inside the model, which comes behind.
        """
        if set(self.per_layer) != {self.entering_llm}:
            raise RecipeError(
                "[[compress]] a method that drops tokens before the language model stands behind one that drops "
                "them inside; change their order"
            )
        before = range(self.emitted) if self.places is None else self.places
        return replace(
            self,
            entering_llm=keep,
            per_layer=tuple(min(keep, n) for n in self.per_layer),
            grid=grid,
            places=None if places is None else tuple(before[place] for place in places),
        )

    def arriving_at(self, layer: int) -> int:
        """Return how many tokens come to a layer, before any bottleneck that stands there."""
        return self.per_layer[layer - 1] if layer > 0 else self.entering_llm

    def require_grid(self, where: str, layer: int = 0) -> tuple[int, int]:
        """Return rows and columns of the tokens that come to a layer.

        Raises:
            RecipeError: they are no grid; ``where`` begins its text.
        """
        if self.grid is None or self.arriving_at(layer) != self.entering_llm:
            raise RecipeError(
                f'{where} pattern = "grid" needs a full grid of tokens, which an earlier method broke; use '
                'pattern = "stride"'
            )
        return self.grid

    def thinned_before_layer(self, layer: int, keep: int) -> "TokenPlan":
        """Return the plan with at most ``keep`` tokens from ``layer`` on."""
        return replace(self, per_layer=tuple(min(keep, n) if i >= layer else n for i, n in enumerate(self.per_layer)))

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """Layers gathered by the tokens they see, in order.

        The first group holds what enters the model, even where a bottleneck before layer 0 leaves
        it without a layer, so that a group's number is the number of bottlenecks passed.
        """
        runs: list[LayerGroup] = []
        if self.per_layer[0] != self.entering_llm:
            runs.append(LayerGroup(first_layer=0, num_layers=0, vision_tokens=self.entering_llm))
        first = 0
        for count, layers in groupby(self.per_layer):
            length = len(list(layers))
            runs.append(LayerGroup(first_layer=first, num_layers=length, vision_tokens=count))
            first += length
        return tuple(runs)

    @property
    def group_of_layer(self) -> tuple[int, ...]:
        """For each layer, the number of its group."""
        return tuple(number for number, group in enumerate(self.groups) for _ in range(group.num_layers))

    @property
    def num_positions(self) -> int:
        """Rotary positions that an image takes up."""
        return self.entering_llm if self.places is None else self.emitted

    @property
    def mean_vision_tokens(self) -> float:
        """Vision tokens per layer, averaged over the layers."""
        return sum(self.per_layer) / len(self.per_layer)


def prefill_flops(spec: VlmSpec, plan: TokenPlan, text_tokens: int) -> int:
    """FLOPs of the decoder's prefill of one image and ``text_tokens``, batch 1.

    Twice the multiply-adds of projections, attention scores and values, and the gated MLP; vision
    tower, head and decode are not counted.
    """
    query_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    total = 0
    for vision_tokens in plan.per_layer:
        n = vision_tokens + text_tokens
        projections = 2 * n * spec.hidden_size * (query_width + kv_width)
        attention = 2 * n * n * query_width
        mlp = 3 * n * spec.hidden_size * spec.intermediate_size
        total += projections + attention + mlp
    return 2 * total


def kv_cache_bytes(spec: VlmSpec, plan: TokenPlan, *, text_tokens: int, num_images: int, dtype: str) -> int:
    """Bytes of a cache that holds ``num_images`` images and ``text_tokens``, batch 1."""
    tokens = sum(num_images * n + text_tokens for n in plan.per_layer)
    return 2 * tokens * spec.num_kv_heads * spec.head_dim * DTYPE_BYTES[dtype]


def resolve_keep(keep: int | float, arriving: int, where: str) -> int:
    """Turn a fraction (a float) or a token count (an int) into a token count.

    Raises:
        RecipeError: it keeps nothing, everything, or more than arrives.
    """
    if isinstance(keep, float) and not 0 < keep < 1:
        raise RecipeError(
            f"{where} keep = {keep} must lie between 0 and 1 as a fraction; a token count is written as a whole number"
        )
    count = round(keep * arriving) if isinstance(keep, float) else keep
    if count < LEAST_KEEP:
        raise RecipeError(
            f"{where} keep = {keep} leaves {count} of {arriving} vision tokens; keep at least {LEAST_KEEP}, as a "
            "graph takes a single token for a constant"
        )
    if count > arriving:
        raise RecipeError(
            f"{where} keep = {keep} is more than the {arriving} vision tokens that arrive; choose a smaller number"
        )
    if count == arriving:
        raise RecipeError(
            f"{where} keep = {keep} keeps all {arriving} vision tokens that arrive and has no effect; "
            "remove it or choose a smaller number"
        )
    return count


def keep_text(before: int, after: float) -> str:
    """Say a ratio the way tokexport says it everywhere: ``576 -> 144 tokens (25 %)``."""
    return f"{before} -> {after:g} tokens ({100 * after / before:.3g} %)"


def stride_index(arriving: int, keep: int, phase: float) -> tuple[int, ...]:
    """Return ``keep`` of ``arriving`` positions at equal distances, ascending.

    Position i is floor((i + phase) * arriving / keep): phase 0 takes the first token of each
    stretch, 0.5 its middle.
    """
    return tuple(min(int((i + phase) * arriving / keep), arriving - 1) for i in range(keep))


def grid_index(grid: tuple[int, int], kept: tuple[int, int], phase: float) -> tuple[int, ...]:
    """Return the row-major positions of ``kept`` rows and columns at equal distances in ``grid``."""
    rows = stride_index(grid[0], kept[0], phase)
    columns = stride_index(grid[1], kept[1], phase)
    return tuple(row * grid[1] + column for row in rows for column in columns)


def full_vision_tokens(report: Mapping[str, Any]) -> int:
    """Return the vision tokens of one uncompressed image, given what ``plan_report`` returned."""
    return report["prompt_tokens"]["full"] - report["prompt_tokens"]["text"]


def plan_report(spec: VlmSpec, plan: TokenPlan, *, text_tokens: int, dtype: str) -> dict[str, Any]:
    """Return what ``tokexport plan --json`` prints; its keys are a contract."""
    full = TokenPlan.uncompressed(spec)

    def compared(full_value: int, compressed_value: int) -> dict[str, int | float]:
        reduction = 1 - compressed_value / full_value if full_value else 0.0
        return {"full": full_value, "compressed": compressed_value, "reduction": reduction}

    def kv(which: TokenPlan, text: int) -> int:
        return kv_cache_bytes(spec, which, text_tokens=text, num_images=1, dtype=dtype)

    flops = compared(prefill_flops(spec, full, text_tokens), prefill_flops(spec, plan, text_tokens))
    return {
        "vision_tokens": {
            "emitted": plan.emitted,
            "entering_llm": plan.entering_llm,
            "per_layer": list(plan.per_layer),
        },
        "mean_vision_tokens": plan.mean_vision_tokens,
        "prompt_tokens": {
            "text": text_tokens,
            "full": full.entering_llm + text_tokens,
            "compressed": plan.entering_llm + text_tokens,
        },
        "dtype": dtype,
        "flops": flops,
        "predicted_prefill_speedup": flops["full"] / flops["compressed"],
        "kv_bytes": compared(kv(full, text_tokens), kv(plan, text_tokens)),
        "kv_bytes_vision": compared(kv(full, 0), kv(plan, 0)),
    }


def squarest_grid(grid: tuple[int, int], arriving: tuple[int, int], keep: int) -> tuple[int, int] | None:
    """Return rows and columns whose product is ``keep`` and whose cells on ``grid`` are nearest to squares.

    None where no product fits into the ``arriving`` rows and columns.
    """
    fits = [
        (rows, keep // rows) for rows in range(1, arriving[0] + 1) if keep % rows == 0 and keep // rows <= arriving[1]
    ]
    return min(fits, key=lambda kept: (_stretch(grid, kept), kept)) if fits else None


def grid_counts(grid: tuple[int, int]) -> list[int]:
    """Return, ascending, every count that whole rows and columns within ``grid`` make."""
    return sorted({rows * columns for rows in range(1, grid[0] + 1) for columns in range(1, grid[1] + 1)})


@functools.cache
def even_grids(grid: tuple[int, int]) -> Mapping[int, tuple[int, int]]:
    """Return, by ascending count, the rows and columns of fewer tokens whose cells on ``grid`` are nearly square."""
    squarest = {count: squarest_grid(grid, grid, count) for count in grid_counts(grid)[1:-1]}
    return {count: kept for count, kept in squarest.items() if kept and _stretch(grid, kept) <= _MOST_STRETCH}


def _stretch(grid: tuple[int, int], kept: tuple[int, int]) -> float:
    """Return the longer side of a cell over its shorter one."""
    ratio = (grid[0] / kept[0]) / (grid[1] / kept[1])
    return max(ratio, 1 / ratio)


def scaled_layers(layers: Sequence[int], before: int, after: int) -> tuple[int, ...]:
    """Move layer numbers of a model of ``before`` layers to one of ``after``, in order and all different.

    Raises:
        RecipeError: a layer is not in the longer model, or the shorter one has not enough layers.
    """
    beyond = [layer for layer in layers if not 0 <= layer < before]
    if beyond:
        raise RecipeError(f"a bottleneck stands before layer {beyond[0]}: the model has the layers 0 to {before - 1}")
    if len(layers) > after:
        raise RecipeError(f"{len(layers)} bottlenecks do not fit into {after} layers; use {len(layers)} or more")
    return moved_layers(layers, after / before, after)


def moved_layers(layers: Sequence[int], factor: float, num_layers: int) -> tuple[int, ...]:
    """Multiply ascending layer numbers by ``factor`` and keep them in order, different, and within the model."""
    moved: list[int] = []
    for number, layer in enumerate(layers):
        least = moved[-1] + 1 if moved else 0
        most = num_layers - (len(layers) - number)  # leaves one layer for each that follows
        moved.append(min(max(least, round(layer * factor)), most))
    return tuple(moved)
