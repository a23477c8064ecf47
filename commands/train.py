"""``tokexport train``: learning what a recipe needs."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokexport.commands.options import (
    RECIPE_OPTIONS,
    Command,
    output_options,
    recipe_from,
    recipe_options,
    with_options,
)
from tokexport.engines.terminal import Terminal
from tokexport.errors import InputError

if TYPE_CHECKING:
    from tokexport.exporter.export import Design
    from tokexport.training.loop import Schedule
    from tokexport.training.tuning_data import Material


@click.group()
def train() -> None:
    """Train the bundled mini model, or what a method of compression needs."""


@train.command()
@click.option(
    "--out", "-o", type=click.Path(path_type=Path), default=Path("out/train_mini"), show_default=True, help="Folder."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of weights and data.")
@click.option(
    "--share", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True), help="Of the steps."
)
@click.option("--from-stage", "first", metavar="STAGE", help="Begin with this stage, on the weights that ship.")
@output_options
def mini(out: Path, seed: int, share: float, first: str | None, as_json: bool, quiet: bool) -> None:
    """Train the mini model from nothing. Started again, it goes on where it was stopped."""
    from tokexport.training.mini import STAGES, shortened, train_mini

    terminal = Terminal(quiet=quiet)
    with terminal.working():
        checkpoint = train_mini(
            out, stages=shortened(STAGES, share), seed=seed, first=first, listener=_listener(terminal)
        )
    terminal.show(f"the checkpoint is in {checkpoint}")
    _report(as_json, checkpoint=str(checkpoint))


def _learning_options(*, steps: int, learning_rate: float | None, suits: str) -> Callable[[Command], Command]:
    """Add the options of everything that learns from conversations."""
    return with_options(
        click.option("--out", "-o", type=click.Path(path_type=Path), help="Folder, by default out/train_RECIPE."),
        click.option(
            "--data", type=click.Path(path_type=Path), help="Conversations in LLaVA's JSON, by default made scenes."
        ),
        click.option(
            "--images", type=click.Path(path_type=Path), help="Folder of their images, by default that of the data."
        ),
        click.option("--steps", default=steps, show_default=True, type=click.IntRange(min=1), help="Optimizer steps."),
        click.option(
            "--batch-size", default=8, show_default=True, type=click.IntRange(min=1), help="Conversations a step."
        ),
        click.option(
            "--accumulate", default=1, show_default=True, type=click.IntRange(min=1), help="Parts of a batch."
        ),
        click.option(
            "--learning-rate", default=learning_rate, show_default=True, type=float, help=f"At its highest{suits}."
        ),
        click.option("--gradient-checkpointing", is_flag=True, help="Compute activations twice to save memory."),
    )


_lora_options = with_options(
    click.option("--rank", default=16, show_default=True, type=click.IntRange(min=1), help="Of the LoRA matrices."),
    click.option(
        "--optimizer",
        type=click.Choice(["adamw", "muon"]),
        default="adamw",
        show_default=True,
        help="Muon orthogonalises the updates of matrices.",
    ),
    click.option(
        "--seed",
        default=0,
        show_default=True,
        type=click.IntRange(min=0),
        help="Of the LoRA matrices and of made scenes.",
    ),
    click.option("--start", metavar="ADAPTER", help="Go on from an adapter, such as that of a milder recipe."),
)


@train.command()
@recipe_options
@_learning_options(steps=600, learning_rate=1e-3, suits="; 2e-4 suits a 7B model")
@click.option(
    "--curriculum",
    type=click.Choice(["mild-first", "strong-first", "none"]),
    default="mild-first",
    show_default=True,
    help="In which order the bottlenecks narrow.",
)
@_lora_options
@output_options
def adsc(curriculum: Any, as_json: bool, quiet: bool, **options: Any) -> None:
    """Tune a model to its ADSC bottlenecks with LoRA; the adapter goes into a recipe or --adapter."""
    from tokexport.training.adsc import Tuning, tune

    _refuse_useless(options, "adapter", "dtype", "quantize")
    tuning = Tuning(curriculum=curriculum, **_lora(options))
    terminal = Terminal(quiet=quiet)
    made, material, out = _task(options, options["seed"])
    with terminal.working():
        adapter = tune(made, material, tuning, out, listener=_listener(terminal))
    _report_adapter(terminal, f"--recipe {made.recipe.name}", adapter, as_json=as_json)


@train.command()
@recipe_options
@_learning_options(steps=1000, learning_rate=None, suits=", by default 1e-3, of an oracle 0.1")
@click.option(
    "--entropy", default=1.0, show_default=True, type=click.FloatRange(min=0), help="Weight of rows' entropy."
)
@click.option("--column", default=1.0, show_default=True, type=click.FloatRange(min=0), help="Weight of column sums.")
@click.option("--clip", default=1e-2, show_default=True, help="Norm that gradients are clipped to.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the compressor and of made scenes."
)
@click.option(
    "--oracle",
    is_flag=True,
    help="Learn no compressor: find the best matrix for each image of one batch and tell how far others are from it.",
)
@output_options
def metacompress(
    oracle: bool,
    entropy: float,
    column: float,
    clip: float,
    seed: int,
    gradient_checkpointing: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Train the compressor of MetaCompress; its file goes into a recipe or --compressor."""
    from tokexport.training.metacompress import Distillation, train_compressor
    from tokexport.training.oracle import MATRICES_FILE, train_oracle

    _refuse_useless(options, "dtype", "quantize", *(() if oracle else ("compressor",)))
    if options["learning_rate"] is None:
        options["learning_rate"] = 0.1 if oracle else 1e-3
    distillation = Distillation(
        schedule=_schedule(options, max_grad_norm=clip),
        entropy=entropy,
        column=column,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
    )
    terminal = Terminal(quiet=quiet)
    made, material, out = _task(options, seed, kind="oracle" if oracle else "train")
    if oracle:
        with terminal.working():
            compared = train_oracle(made, material, distillation, out, listener=_listener(terminal))
        for name, figures in compared.items():
            terminal.show(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
        terminal.show(f"the matrices are in {out / MATRICES_FILE}")
        _report(as_json, matrices=str(out / MATRICES_FILE), comparison=compared)
        return
    with terminal.working():
        path = train_compressor(made, material, distillation, out, listener=_listener(terminal))
    terminal.show(f"the compressor is {path}; build with it: --recipe {made.recipe.name} --compressor {path}")
    _report(as_json, compressor=str(path))


@train.command()
@recipe_options
@_learning_options(steps=600, learning_rate=1e-3, suits="")
@click.option(
    "--conversations", default=1000, show_default=True, type=click.IntRange(min=2), help="Whose answers are explained."
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the network and of made scenes."
)
@output_options
def relevance(
    conversations: int, seed: int, gradient_checkpointing: bool, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Train the network of the relevance compressor; its file goes into a recipe or --compressor.

    The batch size is of conversations that are explained at once, and four times as many labels are learned from at a
    time. Labels are kept in the folder and used again.
    """
    from tokexport.dialogues.questions import KINDS
    from tokexport.training.relevance import Explaining, train_relevance

    _refuse_useless(options, "compressor", "dtype", "quantize")
    if gradient_checkpointing:
        raise InputError("--gradient-checkpointing has no effect on this training; leave it out")
    batch_size = options["batch_size"]
    explaining = Explaining(
        schedule=_schedule({**options, "batch_size": 4 * batch_size}),
        num_conversations=conversations,
        batch_size=batch_size,
        seed=seed,
    )
    terminal = Terminal(quiet=quiet)
    made, material, out = _task({**options, "steps": conversations}, seed, text_tokens=64, kinds=KINDS)
    with terminal.working():
        path, kept = train_relevance(made, material, explaining, out, listener=_listener(terminal))
    shares = ", ".join(f"{name} {share:.1%}" for name, share in kept.items())
    terminal.show(f"of the labels of other conversations, the tokens kept hold: {shares}")
    terminal.show(f"the network is {path}; build with it: --recipe {made.recipe.name} --compressor {path}")
    _report(as_json, compressor=str(path), kept=kept)


@train.command()
@recipe_options
@_learning_options(steps=600, learning_rate=1e-3, suits="; 2e-4 suits a 7B model")
@_lora_options
@output_options
def relevance_adapter(as_json: bool, quiet: bool, **options: Any) -> None:
    """Tune a model to what its relevance compressor keeps with LoRA; the adapter goes into a recipe or --adapter.

    The network has to be trained before, see 'tokexport train relevance'.
    """
    from tokexport.training.lora import LoraTuning
    from tokexport.training.relevance_adapter import tune_behind_relevance

    _refuse_useless(options, "adapter", "dtype", "quantize")
    tuning = LoraTuning(**_lora(options))
    terminal = Terminal(quiet=quiet)
    made, material, out = _task(options, options["seed"])
    with terminal.working():
        adapter = tune_behind_relevance(made, material, tuning, out, listener=_listener(terminal))
    compressor = options["compressor"]
    built = f"--recipe {made.recipe.name}" + (f" --compressor {compressor}" if compressor else "")
    _report_adapter(terminal, built, adapter, as_json=as_json)


def _lora(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a ``LoraTuning``."""
    names = ("rank", "gradient_checkpointing", "seed", "start")
    return {"schedule": _schedule(options, optimizer=options["optimizer"]), **{name: options[name] for name in names}}


def _report_adapter(terminal: Terminal, recipe: str, adapter: Path, *, as_json: bool) -> None:
    terminal.show(f"the adapter is in {adapter}; build with it: {recipe} --adapter {adapter}")
    _report(as_json, adapter=str(adapter))


def _refuse_useless(options: Mapping[str, Any], *names: str) -> None:
    useless = {name: options[name] for name in names}
    if options["data"] is None:
        useless["images"] = options["images"]
    for name, value in useless.items():
        if value is not None:
            raise InputError(f"--{name} {value} has no effect on this training; leave it out")


def _schedule(options: Mapping[str, Any], **more: Any) -> "Schedule":
    from tokexport.training.loop import Schedule

    names = {"num_steps": "steps", "batch_size": "batch_size", "accumulate": "accumulate"}
    return Schedule(
        learning_rate=options["learning_rate"], **{key: options[name] for key, name in names.items()}, **more
    )


def _task(
    options: Mapping[str, Any], seed: int, kind: str = "train", **made_options: Any
) -> "tuple[Design, Material, Path]":
    """Return the recipe's design, what to learn from, and the folder to work in.

    Options of made conversations count where there are no others.
    """
    from tokexport.exporter.export import design
    from tokexport.training.tuning_data import llava_material, made_material

    made = design(recipe_from(**{name: options[name] for name in RECIPE_OPTIONS}))
    data, num = options["data"], 64 * options["steps"] * options["batch_size"]
    if data is None:
        material = made_material(made, num=num, seed=seed, **made_options)
    else:
        material = llava_material(made, data, options["images"] or data.parent, num=num)
    return made, material, options["out"] or Path("out") / f"{kind}_{made.recipe.name}"


def _listener(terminal: Terminal) -> Any:
    from tokexport.training.loop import Listener

    return Listener(tick=terminal.tick, note=terminal.step)


def _report(as_json: bool, **document: object) -> None:
    if as_json:
        click.echo(json.dumps(document, indent=2))
