"""Methods that leave vision tokens out before chosen decoder layers."""

import bisect
import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

from tokexport.errors import RecipeError
from tokexport.exporter.budget import Load, fullest_choice, is_met, nearest_choice
from tokexport.exporter.method import Method
from tokexport.exporter.plan import (
    LEAST_KEEP,
    TokenPlan,
    VlmSpec,
    even_grids,
    moved_layers,
    resolve_keep,
    scaled_layers,
)

# How finely schedules for a budget are searched.
_STEPS_A_LAYER, _SCALES = 32, 400
# How often fewer tokens are tried until a schedule costs what it may, and how many fewer at least.
_TRIES, _FEWER = 12, 0.98

# Schedules to start from, in parts of the layers and of all tokens: what differs is how early and how much is dropped.
_SHAPES = (
    ((1 / 4, 1 / 2), (1 / 2, 1 / 4), (3 / 4, 1 / 8)),
    ((1 / 8, 0.4),),
    ((3 / 8, 0.21), (5 / 8, 0.085)),
    ((0, 3 / 4), (3 / 8, 1 / 12)),
)


@dataclass(frozen=True, kw_only=True)
class Drop:
    """A bottleneck before ``layer`` (from 0) that keeps a token count (int) or a fraction (float)."""

    layer: int
    keep: int | float


@dataclass(frozen=True, kw_only=True)
class Dropping(Method):
    """A method with several bottlenecks.

    Attributes:
        drops: the bottlenecks, ascending by layer; fractions are of what arrives at each.
    """

    drops: tuple[Drop, ...]

    def __post_init__(self) -> None:
        if not self.drops:
            raise RecipeError(
                f"[[compress]] {self.name} needs at least one entry in drops, e.g. {{layer = 8, keep = 0.5}}"
            )
        layers = [drop.layer for drop in self.drops]
        if layers != sorted(set(layers)):
            raise RecipeError(
                f"[[compress]] {self.name} drops name the layers {layers}; each must be larger than the one before"
            )

    def plan(self, spec: VlmSpec, arriving: TokenPlan) -> TokenPlan:
        plan = arriving
        for drop in self.drops:
            plan = plan_drop(plan, spec, drop, f"[[compress]] {self.name} drop")
        return plan

    def for_budget(self, spec: VlmSpec, arriving: TokenPlan, tokens: int) -> Self:
        """Return the schedule moved and thinned, as far as can be by one factor, so that it meets a budget.

        Layers are whole numbers and move in steps. For each placement of the bottlenecks the counts are multiplied by
        the number that meets the budget; the placement is taken whose factor is the nearest to that number.
        """
        plan = self.plan(spec, arriving)
        if plan.mean_vision_tokens == tokens:
            return self
        counts = [plan.per_layer[drop.layer] for drop in self.drops]
        scales = dict(_scaled(counts, self.countable(arriving), arriving.entering_llm))
        best: list[tuple[float, float, Self]] = []
        for layers, factors in _placements([drop.layer for drop in self.drops], spec.num_layers).items():
            found = self._nearest_at(layers, scales, spec, arriving, tokens)
            if found is not None:
                mean, scale, changed = found
                best.append((mean, min(abs(math.log(scale / factor)) for factor in factors), changed))
        best.sort(key=lambda choice: choice[1])
        met = [(mean, changed) for mean, _, changed in best if is_met(mean, tokens)]
        every = met[:1] or [(mean, changed) for mean, _, changed in best]
        return nearest_choice(every, tokens, f"[[compress]] {self.name}:")

    @classmethod
    def choices(cls, spec: VlmSpec) -> Mapping[str, Sequence[Any]]:
        return {**super().choices(spec), "drops": _schedules(spec)}

    def within(self, spec: VlmSpec, arriving: TokenPlan, load: Load) -> Self:
        """Return the schedule with as many tokens as a budget allows, moved and thinned as ``for_budget`` does it."""
        tried: list[tuple[float, Self]] = []
        # Nothing costs less than as many tokens in every layer: attention costs their square, all else is linear.
        tokens = max(
            (n for n in range(LEAST_KEEP, arriving.entering_llm) if load(arriving.thinned_before_layer(0, n)) <= 1),
            default=LEAST_KEEP,
        )
        for _ in range(_TRIES):
            over = 1.0
            with contextlib.suppress(RecipeError):
                changed = self.for_budget(spec, arriving, tokens)
                over = load(changed.plan(spec, arriving))
                tried.append((over, changed))
                if over <= 1:
                    break
            tokens = min(tokens - 1, int(tokens * min(_FEWER, over**-0.5)))
            if tokens < LEAST_KEEP:
                break
        return fullest_choice(tried) or self

    def countable(self, arriving: TokenPlan) -> Sequence[int]:
        """Return the token counts that a bottleneck may keep, ascending."""
        return range(LEAST_KEEP, arriving.entering_llm)

    def _nearest_at(
        self,
        layers: tuple[int, ...],
        scales: Mapping[tuple[int, ...], float],
        spec: VlmSpec,
        arriving: TokenPlan,
        tokens: int,
    ) -> tuple[float, float, Self] | None:
        """Return mean, scale and schedule of the counts that come nearest to a budget with these layers."""
        stretches = [after - before for before, after in pairwise((*layers, spec.num_layers))]
        before = layers[0] * arriving.entering_llm
        totals = {
            keeps: before + sum(keep * stretch for keep, stretch in zip(keeps, stretches, strict=True))
            for keeps in scales
        }
        for keeps, total in sorted(totals.items(), key=lambda item: abs(item[1] - tokens * spec.num_layers)):
            drops = tuple(Drop(layer=layer, keep=keep) for layer, keep in zip(layers, keeps, strict=True))
            with contextlib.suppress(RecipeError):
                changed = replace(self, drops=drops)
                changed.plan(spec, arriving)
                return total / spec.num_layers, scales[keeps], changed
        return None

    def for_num_layers(self, before: int, after: int) -> Self:
        layers = scaled_layers([drop.layer for drop in self.drops], before, after)
        return replace(
            self, drops=tuple(replace(drop, layer=layer) for drop, layer in zip(self.drops, layers, strict=True))
        )


def _schedules(spec: VlmSpec) -> list[tuple[Drop, ...]]:
    """Return the shapes as schedules of a model, of counts that also make grids."""
    full = spec.num_vision_tokens
    counts = list(even_grids(spec.vision_grid))
    schedules: list[tuple[Drop, ...]] = []
    for shape in _SHAPES:
        if not counts or len(shape) > spec.num_layers:
            continue
        layers = moved_layers([round(part * spec.num_layers) for part, _ in shape], 1, spec.num_layers)
        keeps = [_nearest(counts, part * full) for _, part in shape]
        if all(before > after for before, after in pairwise((full, *keeps))):
            schedules.append(tuple(Drop(layer=layer, keep=keep) for layer, keep in zip(layers, keeps, strict=True)))
    return schedules


def _placements(layers: Sequence[int], num_layers: int) -> dict[tuple[int, ...], list[float]]:
    """Return where bottlenecks can move when all layers are multiplied by one factor, and by which factors."""
    found: dict[tuple[int, ...], list[float]] = {}
    for step in range(1, num_layers * _STEPS_A_LAYER):
        factor = step / _STEPS_A_LAYER
        found.setdefault(moved_layers(layers, factor, num_layers), []).append(factor)
    return found


def _scaled(counts: Sequence[int], countable: Sequence[int], full: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """Yield counts multiplied by one number, each the nearest that can be kept, and that number."""
    least, most = math.log(LEAST_KEEP / max(counts)), math.log(full / min(counts))
    for step in range(_SCALES + 1):
        scale = math.exp(least + (most - least) * step / _SCALES)
        keeps = tuple(_nearest(countable, count * scale) for count in counts)
        if all(before > after for before, after in pairwise((full, *keeps))):
            yield keeps, scale


def _nearest(ascending: Sequence[int], wanted: float) -> int:
    at = bisect.bisect(ascending, wanted)
    return min(ascending[max(0, at - 1) : at + 1], key=lambda count: abs(count - wanted))


def plan_drop(plan: TokenPlan, spec: VlmSpec, drop: Drop, what: str) -> TokenPlan:
    """Return the plan behind one bottleneck.

    Raises:
        RecipeError: the model has no such layer, or the bottleneck has no effect; ``what`` names it.
    """
    where = f"{what} before layer {drop.layer}:"
    if not 0 <= drop.layer < spec.num_layers:
        raise RecipeError(f"{where} the model has the layers 0 to {spec.num_layers - 1}")
    return plan.thinned_before_layer(drop.layer, resolve_keep(drop.keep, plan.per_layer[drop.layer], where))
