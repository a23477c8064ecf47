"""Which form of MetaCompress suits the mini model, and what each term of its loss is worth: all trained alike.

Every variant is trained for a few steps and asked the same dialogues of the validation split. Run from the root of the
repository: ``python benchmarks/sweep_metacompress.py``. What is there already is used again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

import tokexport
from tokexport.engines.build import build
from tokexport.exporter.export import design
from tokexport.exporter.modules.token_mixing import START_BETA
from tokexport.recipes.load import load_recipe, override
from tokexport.recipes.schema import Recipe
from tokexport.training.loop import Schedule
from tokexport.training.metacompress import Distillation, train_compressor
from tokexport.training.tuning_data import made_material

_PAPER_CLIP = 1e-2
# Far above any norm that occurs.
_NO_CLIP = 1e9


@dataclass(frozen=True)
class Variant:
    """One form of MetaCompress, with options in TOML, and of its training."""

    options: str = 'pattern = "stride"'
    entropy: float = 1.0
    column: float = 1.0
    clip: float = _PAPER_CLIP
    beta: float = START_BETA
    learning_rate: float = 1e-3

    def recipe(self, name: str, keep: int) -> Recipe:
        """Return the recipe of an untrained compressor."""
        step = f'{{method = "metacompress", keep = {keep}, weights = "untrained", {self.options}}}'
        return replace(load_recipe("mini_full", [f"compress=[{step}]"]), name=name)


ABLATION: Mapping[str, Variant] = {
    "divergence alone": Variant(entropy=0, column=0),
    "+ entropy": Variant(column=0),
    "+ column, without clipping": Variant(entropy=0, clip=_NO_CLIP),
    "+ column": Variant(entropy=0),
    "all": Variant(),
}
FORMS: Mapping[str, Variant] = {
    "beta from 1": Variant(beta=1),
    "beta from 16": Variant(beta=16),
    "width 16": Variant('pattern = "stride", width = 16'),
    "width 128": Variant('pattern = "stride", width = 128'),
    "learning rate 1e-2": Variant(learning_rate=1e-2),
    "terms at a tenth": Variant(entropy=0.1, column=0.1),
    "terms at a hundredth": Variant(entropy=0.01, column=0.01),
}


@click.command()
@click.option("--keep", default=58, show_default=True, help="Of 576 tokens.")
@click.option("--steps", default=300, show_default=True, help="Of training.")
@click.option("--dialogues", default=500, show_default=True, help="Of the validation split.")
@click.option("--only", type=click.Choice(["ablation", "forms"]), help="By default both.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/sweep_metacompress"), show_default=True)
def main(keep: int, steps: int, dialogues: int, only: str | None, out: Path) -> None:
    """Train and ask every variant, and print a table."""
    click.echo("| variant | untrained | trained | 95 % interval | turn 1 | 2 | 3 |\n|---|---:|---:|---|---:|---:|---:|")
    for group, variants in (("ablation", ABLATION), ("forms", FORMS)):
        for number, (name, variant) in enumerate(variants.items() if only in (None, group) else ()):
            folder = out / f"{group}_{number}_{keep}_{steps}"
            recipe = variant.recipe(f"{group}_{number}", keep)
            untrained = _accuracy(recipe, folder / "untrained", dialogues)
            trained = _accuracy(_trained(recipe, variant, folder, steps), folder / "trained", dialogues)
            low, high = trained["interval"]
            turns = " | ".join(f"{turn['accuracy']:.3f}" for turn in trained["turns"])
            click.echo(
                f"| {name} | {untrained['accuracy']:.3f} | {trained['accuracy']:.3f} | {low:.3f} to {high:.3f} "
                f"| {turns} |"
            )


def _trained(recipe: Recipe, variant: Variant, folder: Path, num_steps: int) -> Recipe:
    made = design(recipe)
    schedule = Schedule(
        num_steps=num_steps, batch_size=8, learning_rate=variant.learning_rate, max_grad_norm=variant.clip
    )
    material = made_material(made, num=num_steps * schedule.batch_size)
    distillation = Distillation(
        schedule=schedule, entropy=variant.entropy, column=variant.column, start_beta=variant.beta
    )
    path = train_compressor(made, material, distillation, folder)
    return override(recipe, compressor=str(path))


def _accuracy(recipe: Recipe, path: Path, num_dialogues: int) -> Mapping[str, Any]:
    if not path.is_dir():
        build(recipe, path, with_verify=False, with_bench=False)
    return tokexport.evaluate(path, "validation", dialogues=num_dialogues).report()


if __name__ == "__main__":
    main()
