"""Which form of ADSC suits the mini model: patterns, positions, phases, schedules and curricula, tuned alike.

Every variant is tuned for a few steps, and before and behind that reads the same conversations of the validation split:
the figure is the share of the answers' tokens that it finds right, each with the right answers before it. Run from the
root of the repository: ``python benchmarks/sweep_adsc.py``. A tuning that is there already is used again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import click
import torch
from torch.utils.data import DataLoader, Subset

from tokexport.exporter.export import design
from tokexport.recipes.load import load_recipe, override
from tokexport.recipes.schema import Recipe
from tokexport.training.adsc import Curriculum, Tuning, curriculum, tune
from tokexport.training.compressed import CompressedLlava
from tokexport.training.frozen import load_llava
from tokexport.training.loop import Schedule, attention_for
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
@click.option("--steps", default=40, show_default=True, help="Of tuning.")
@click.option("--conversations", default=128, show_default=True, help="Of the validation split.")
@click.option("--only", multiple=True, type=click.Choice([*VARIANTS]), help="Variants; by default all.")
@click.option("--threads", type=int, help="By default one per core.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/sweep_adsc"), show_default=True)
def main(steps: int, conversations: int, only: tuple[str, ...], threads: int | None, out: Path) -> None:
    """Tune and ask every variant, and print a table."""
    if threads is not None:
        torch.set_num_threads(threads)
    click.echo("| variant | tokens per layer | untuned | tuned |\n|---|---:|---:|---:|")
    for number, (name, variant) in enumerate(VARIANTS.items()):
        if only and name not in only:
            continue
        recipe = variant.recipe(f"variant_{number}")
        untuned = _right(recipe, conversations)
        tuned = _right(_tuned(recipe, variant, out / f"{number}_{steps}", steps), conversations)
        click.echo(f"| {name} | {design(recipe).plan.mean_vision_tokens:g} | {untuned} | {tuned} |")


def _tuned(recipe: Recipe, variant: Variant, folder: Path, num_steps: int) -> Recipe:
    made = design(recipe)
    schedule = Schedule(num_steps=num_steps, batch_size=8, learning_rate=1e-3)
    material = made_material(made, num=num_steps * schedule.batch_size)
    adapter = tune(made, material, Tuning(schedule=schedule, curriculum=variant.curriculum), folder)
    return override(recipe, adapter=str(adapter))


def _right(recipe: Recipe, num: int) -> str:
    """Return the share of tokens found right, with its 95 % interval, in percent."""
    made, batch_size = design(recipe), 8
    llava = load_llava(made.model).eval()
    llava.set_attn_implementation(attention_for(llava.device))
    material = made_material(made, num=num, split="validation")
    objective = material.objective_of(CompressedLlava(llava, curriculum(made, "none")[-1]))
    batches = DataLoader(Subset(material.examples, range(num)), batch_size=batch_size, collate_fn=material.collate)
    with torch.inference_mode():
        shares = [100 * objective(**batch)[1]["right"].item() for batch in batches]
    return f"{mean(shares):.1f} ± {1.96 * stdev(shares) / len(shares) ** 0.5:.1f}"


if __name__ == "__main__":
    main()
