"""Which form of ADSC suits the mini model: patterns, positions, phases, schedules and curricula, tuned alike.

Every variant is tuned for a few steps, and before and behind that reads the same conversations of the validation split:
the figure is the share of the answers' tokens that it finds right, each with the right answers before it. Run from the
root of the repository: ``python benchmarks/sweep_adsc.py``. A tuning that is there already is used again.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import click
import torch
from torch.utils.data import DataLoader, Subset

from tokexport.dialogues.questions import KINDS
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
_STRONG = ((0, 144), (3, 16))
# Of nearly as many vision tokens a layer, early and mild or late and strong.
_SCHEDULES = {
    252: (
        ((1, 288), (3, 180), (6, 80)),
        ((2, 288), (4, 96), (6, 48)),
        ((3, 64), (5, 48)),
        ((3, 121), (5, 49)),
        ((3, 81), (5, 36)),
        ((0, 480), (4, 24)),
    ),
    192: (
        ((1, 288), (2, 192), (3, 144), (4, 96), (6, 72)),
        ((1, 384), (3, 36)),
        ((0, 432), (3, 48)),
        ((0, 360), (4, 24)),
    ),
    128: (((0, 288), (1, 192), (2, 144), (4, 96), (5, 64), (6, 48)), ((0, 288), (3, 32)), ((0, 240), (4, 16))),
    64: (
        ((0, 192), (1, 96), (2, 64), (3, 48), (4, 32), (6, 24)),
        ((0, 288), (1, 72), (2, 48), (3, 32), (4, 24), (6, 12)),
        ((0, 144), (3, 16)),
        ((0, 160), (3, 6)),
        ((0, 120), (4, 8)),
    ),
}


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
    "the same, strong first": Variant(curriculum="strong-first"),
    "the same, no curriculum": Variant(curriculum="none"),
    "64 tokens, mild first": Variant(drops=_STRONG),
    "64 tokens, strong first": Variant(drops=_STRONG, curriculum="strong-first"),
    "64 tokens, no curriculum": Variant(drops=_STRONG, curriculum="none"),
    **{
        f"{budget} tokens: {', '.join(f'{keep} from {layer}' for layer, keep in drops)}": Variant(drops=drops)
        for budget, schedules in _SCHEDULES.items()
        for drops in schedules
    },
}


@click.command()
@click.option("--steps", default=40, show_default=True, help="Of tuning; 0 leaves it out.")
@click.option("--conversations", default=128, show_default=True, help="Of the validation split.")
@click.option("--only", multiple=True, metavar="WORDS", help="Variants whose names hold the words.")
@click.option("--threads", type=int, help="By default one per core.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/sweep_adsc"), show_default=True)
def main(steps: int, conversations: int, only: tuple[str, ...], threads: int | None, out: Path) -> None:
    """Tune and ask every variant, and print a table."""
    if threads is not None:
        torch.set_num_threads(threads)
    click.echo("| variant | tokens per layer | untuned | tuned |\n|---|---:|---:|---:|")
    click.echo(f"| nothing dropped | 576 | {_right(load_recipe('mini_full'), conversations)} | – |")
    for name, variant in VARIANTS.items():
        if only and not any(words in name for words in only):
            continue
        slug = re.sub(r"\W+", "_", name)
        recipe = variant.recipe(slug)
        untuned = _right(recipe, conversations)
        tuned = _right(_tuned(recipe, variant, out / f"{slug}_{steps}", steps), conversations) if steps else "–"
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
    material = made_material(made, num=num, split="validation", text_tokens=256, kinds=KINDS)
    thinnings = curriculum(made, "none")[-1] if made.methods else {}
    objective = material.objective_of(CompressedLlava(llava, thinnings))
    batches = DataLoader(Subset(material.examples, range(num)), batch_size=batch_size, collate_fn=material.collate)
    with torch.inference_mode():
        shares = [100 * objective(**batch)[1]["right"].item() for batch in batches]
    return f"{mean(shares):.1f} ± {1.96 * stdev(shares) / len(shares) ** 0.5:.1f}"


if __name__ == "__main__":
    main()
