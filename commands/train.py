"""``tokexport train``: learning what a recipe needs."""

import json
from pathlib import Path
from typing import Any

import click

from tokexport.commands.options import output_options, recipe_from, recipe_options
from tokexport.engines.terminal import Terminal
from tokexport.errors import InputError


@click.group()
def train() -> None:
    """Train the bundled mini model, or tune a model to its compression."""


@train.command()
@click.option(
    "--out", "-o", type=click.Path(path_type=Path), default=Path("out/train_mini"), show_default=True, help="Folder."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of weights and data.")
@click.option(
    "--share", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True), help="Of the steps."
)
@output_options
def mini(out: Path, seed: int, share: float, as_json: bool, quiet: bool) -> None:
    """Train the mini model from nothing. Started again, it goes on where it was stopped."""
    from tokexport.training.mini import STAGES, shortened, train_mini

    terminal = Terminal(quiet=quiet)
    with terminal.working():
        checkpoint = train_mini(out, stages=shortened(STAGES, share), seed=seed, listener=_listener(terminal))
    terminal.show(f"the checkpoint is in {checkpoint}")
    _report(as_json, checkpoint=str(checkpoint))


@train.command()
@recipe_options
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Folder, by default out/train_RECIPE.")
@click.option("--data", type=click.Path(path_type=Path), help="Conversations in LLaVA's JSON, by default made scenes.")
@click.option("--images", type=click.Path(path_type=Path), help="Folder of their images, by default that of the data.")
@click.option(
    "--curriculum",
    type=click.Choice(["mild-first", "strong-first", "none"]),
    default="mild-first",
    show_default=True,
    help="In which order the bottlenecks narrow.",
)
@click.option("--rank", default=16, show_default=True, type=click.IntRange(min=1), help="Of the LoRA matrices.")
@click.option("--steps", default=600, show_default=True, type=click.IntRange(min=1), help="Optimizer steps.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(min=1), help="Conversations a step.")
@click.option("--accumulate", default=1, show_default=True, type=click.IntRange(min=1), help="Parts of a batch.")
@click.option("--learning-rate", default=1e-3, show_default=True, help="At its highest; 2e-4 suits a 7B model.")
@click.option("--gradient-checkpointing", is_flag=True, help="Compute activations twice to save memory.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the LoRA matrices.")
@output_options
def adsc(
    out: Path | None,
    data: Path | None,
    images: Path | None,
    steps: int,
    batch_size: int,
    accumulate: int,
    learning_rate: float,
    gradient_checkpointing: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Tune a model to its ADSC bottlenecks with LoRA; the adapter goes into a recipe or --adapter."""
    from tokexport.exporter.export import design
    from tokexport.training.adsc import Tuning, tune
    from tokexport.training.loop import Schedule
    from tokexport.training.tuning_data import llava_material, made_material

    useless = {"images": images if data is None else None, "adapter": options["adapter"], "dtype": options["dtype"]}
    for name, value in useless.items():
        if value is not None:
            raise InputError(f"--{name} {value} has no effect on this tuning; leave it out")
    tuning = Tuning(
        schedule=Schedule(num_steps=steps, batch_size=batch_size, accumulate=accumulate, learning_rate=learning_rate),
        gradient_checkpointing=gradient_checkpointing,
        **{name: options.pop(name) for name in ("curriculum", "rank", "seed")},
    )
    made, terminal = design(recipe_from(**options)), Terminal(quiet=quiet)
    num = 64 * steps * batch_size
    material = llava_material(made, data, images or data.parent, num=num) if data else made_material(made, num=num)
    with terminal.working():
        adapter = tune(
            made, material, tuning, out or Path("out") / f"train_{made.recipe.name}", listener=_listener(terminal)
        )
    terminal.show(f"the adapter is in {adapter}; build with it: --recipe {made.recipe.name} --adapter {adapter}")
    _report(as_json, adapter=str(adapter))


def _listener(terminal: Terminal) -> Any:
    from tokexport.training.loop import Listener

    return Listener(tick=terminal.tick, note=terminal.step)


def _report(as_json: bool, **document: str) -> None:
    if as_json:
        click.echo(json.dumps(document, indent=2))
