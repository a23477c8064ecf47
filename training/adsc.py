"""ADSC tuning (arXiv 2602.12618): LoRA on the language model with the bottlenecks in place.

The bottlenecks reach the recipe's keeps step by step. The paper calls its order a reverse curriculum
and its steps are not published; both readings are here, and none for comparison.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tokexport.errors import RecipeError
from tokexport.exporter.export import Design
from tokexport.exporter.method import arriving_plans
from tokexport.exporter.methods.adsc import Adsc
from tokexport.exporter.plan import squarest_grid
from tokexport.training.compressed import ConstantThinning
from tokexport.training.loop import Listener
from tokexport.training.lora import LoraTuning, tune_lora
from tokexport.training.tuning_data import Material

Curriculum = Literal["mild-first", "strong-first", "none"]

# How far towards the recipe's keeps each step of a curriculum goes: 0 keeps all tokens, 1 what the recipe says.
_SHARES: Mapping[Curriculum, tuple[float, ...]] = {
    "mild-first": (0.25, 0.5, 0.75, 1.0),
    "strong-first": (1.6, 1.4, 1.2, 1.0),
    "none": (1.0,),
}


@dataclass(frozen=True, kw_only=True)
class Tuning(LoraTuning):
    """How a model is tuned to ADSC.

    Attributes:
        curriculum: in which order the bottlenecks narrow.
    """

    curriculum: Curriculum = "mild-first"


def tune(made: Design, material: Material, tuning: Tuning, folder: Path, *, listener: Listener | None = None) -> Path:
    """Tune a model to a recipe with ADSC and store the adapter, see ``tune_lora``.

    Raises:
        RecipeError: the recipe does not use ADSC alone.
        CheckpointError: the adapter to start from does not fit.
        TrainingError: see ``fit``.
    """
    stages = curriculum(made, tuning.curriculum)
    return tune_lora(
        made,
        material,
        tuning,
        folder,
        stages=stages,
        run_name=f"adsc {made.recipe.name}",
        settings={
            "curriculum": tuning.curriculum,
            "bottlenecks": {layer: list(thinning.index) for layer, thinning in stages[-1].items()},
            "positions": [thinning.positions for thinning in stages[-1].values()],
        },
        listener=listener,
    )


def curriculum(made: Design, order: Curriculum) -> tuple[dict[int, ConstantThinning], ...]:
    """Return what stands before which layer in each step of a curriculum; the last is the recipe's.

    Raises:
        RecipeError: the recipe does not use ADSC alone.
    """
    if len(made.methods) != 1 or not isinstance(made.methods[0], Adsc):
        names = [step.method for step in made.recipe.compress]
        raise RecipeError(
            f"recipe {made.recipe.name} has the methods {names}; tuning is for ADSC alone, e.g. recipe mini_adsc"
        )
    method = made.methods[0]
    return tuple(_thinnings(made, eased(made, method, share)) for share in _SHARES[order])


def eased(made: Design, method: Adsc, share: float) -> Adsc:
    """Return the method with keeps between all tokens (0) and its own (1), or beyond, evenly in ratio."""
    if share == 1:
        return method
    spec = made.model.spec
    arriving = made.plans[0].entering_llm
    targets = [made.plans[-1].per_layer[drop.layer] for drop in method.drops]
    keeps: list[int] = []
    before, grid = arriving, spec.vision_grid
    for number, target in enumerate(targets, start=1):
        least = 2 + len(targets) - number  # leaves one token for each bottleneck that follows to drop
        keep = max(least, min(before - 1, round(arriving * (target / arriving) ** share)))
        if method.pattern == "grid":
            keep, grid = _nearest_grid(spec.vision_grid, grid, keep)
        keeps.append(keep)
        before = keep
    return replace(
        method, drops=tuple(replace(drop, keep=keep) for drop, keep in zip(method.drops, keeps, strict=True))
    )


def _thinnings(made: Design, method: Adsc) -> dict[int, ConstantThinning]:
    spec = made.model.spec
    arriving = arriving_plans((), spec)[-1]
    return {
        layer: ConstantThinning(index=index, positions=method.positions)
        for layer, index in method.indices(spec, arriving).items()
    }


def _nearest_grid(whole: tuple[int, int], arriving: tuple[int, int], keep: int) -> tuple[int, tuple[int, int]]:
    """Return the count nearest to ``keep`` that makes rows and columns, and these."""
    most = math.prod(arriving) - 1
    for distance in range(most):
        for count in (keep - distance, keep + distance):
            grid = squarest_grid(whole, arriving, count) if 2 <= count <= most else None
            # Thin strips are grids too, but no even downsampling.
            if grid is not None and max(grid) <= 2 * min(grid):
                return count, grid
    raise RecipeError(f"no grid within {arriving[0]} x {arriving[1]} comes near {keep} tokens")
