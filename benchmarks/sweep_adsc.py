"""Which form of ADSC suits the mini model: patterns, positions, phases, schedules and curricula, tuned alike.

Every variant is tuned for a few steps and asked the same dialogues of the validation split. Run from the root of the
repository: ``python benchmarks/sweep_adsc.py``. What is there already is used again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

import tokexport
from tokexport.engines.build import build
from tokexport.exporter.export import design
from tokexport.recipes.load import load_recipe, override
from tokexport.recipes.schema import Recipe
from tokexport.training.adsc import Curriculum, Tuning, tune
from tokexport.training.loop import Schedule
from tokexport.training.tuning_data import made_material

HALVINGS = ((2, 288), (3, 144), (6, 72))
# Attention is causal: only the last token of a cell has seen the others.
_END = "phase = 0.99"


@dataclass(frozen=True)
class Variant:
    """One form of ADSC, with options in TOML, and of its tuning."""

    options: str = f'pattern = "grid", {_END}'
    drops: tuple[tuple[int, int], ...] = HALVINGS
    curriculum: Curriculum = "mild-first"

    def recipe(self, name: str) -> Recipe:
        """Return the recipe of an untuned model."""
        drops = ", ".join(f"{{layer = {layer}, keep = {keep}}}" for layer, keep in self.drops)
        step = f'{{method = "adsc", drops = [{drops}], {self.options}}}'
        return replace(load_recipe("mini_full", [f"compress=[{step}]"]), name=name)


VARIANTS: Mapping[str, Variant] = {
    "stride": Variant('pattern = "stride"'),
    "stride, end of the cell": Variant(f'pattern = "stride", {_END}'),
    "grid": Variant('pattern = "grid"'),
    "grid, middle of the cell": Variant('pattern = "grid", phase = 0.5'),
    "grid, end of the cell": Variant(),
    "the same, renumbered": Variant(f'pattern = "grid", {_END}, positions = "renumber"'),
    "the same, earlier and milder": Variant(drops=((1, 288), (3, 180), (6, 80))),
    "the same, later and stronger": Variant(drops=((3, 144), (5, 64))),
    "the same, strong first": Variant(curriculum="strong-first"),
    "the same, no curriculum": Variant(curriculum="none"),
    "64 tokens, a third at once": Variant(drops=((0, 192), (1, 96), (2, 64), (3, 48), (4, 32), (6, 24))),
    "64 tokens, half at once": Variant(drops=((0, 288), (1, 72), (2, 48), (3, 32), (4, 24), (6, 12))),
}


@click.command()
@click.option("--steps", default=60, show_default=True, help="Of tuning.")
@click.option("--dialogues", default=300, show_default=True, help="Of the validation split.")
@click.option("--only", multiple=True, type=click.Choice([*VARIANTS]), help="Variants; by default all.")
@click.option("--threads", type=int, help="For the questions, by default one per core.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/sweep_adsc"), show_default=True)
def main(steps: int, dialogues: int, only: tuple[str, ...], threads: int | None, out: Path) -> None:
    """Tune and ask every variant, and print a table."""
    click.echo("| variant | tokens per layer | untuned | tuned | 95 % interval |\n|---|---:|---:|---:|---|")
    for number, (name, variant) in enumerate(VARIANTS.items()):
        if only and name not in only:
            continue
        folder = out / f"{number}_{steps}"
        recipe = variant.recipe(f"variant_{number}")
        untuned = _accuracy(recipe, folder / "untuned", dialogues, threads)
        tuned = _accuracy(_tuned(recipe, variant, folder, steps), folder / "tuned", dialogues, threads)
        low, high = tuned["interval"]
        click.echo(
            f"| {name} | {design(recipe).plan.mean_vision_tokens:g} | {untuned['accuracy']:.3f} "
            f"| {tuned['accuracy']:.3f} | {low:.3f} to {high:.3f} |"
        )


def _tuned(recipe: Recipe, variant: Variant, folder: Path, num_steps: int) -> Recipe:
    made = design(recipe)
    schedule = Schedule(num_steps=num_steps, batch_size=8, learning_rate=1e-3)
    material = made_material(made, num=64 * num_steps * schedule.batch_size)
    adapter = tune(made, material, Tuning(schedule=schedule, curriculum=variant.curriculum), folder)
    return override(recipe, adapter=str(adapter))


def _accuracy(recipe: Recipe, path: Path, num_dialogues: int, threads: int | None) -> Mapping[str, Any]:
    if not path.is_dir():
        build(recipe, path, with_verify=False, with_bench=False)
    return tokexport.evaluate(path, "validation", dialogues=num_dialogues, threads=threads).report()


if __name__ == "__main__":
    main()
