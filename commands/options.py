"""Options that several commands share, as decorators of a command."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

if TYPE_CHECKING:
    from tokexport.recipes.schema import Recipe

_SOURCES = {"model": "checkpoint", "adapter": "adapter", "compressor": "compressor"}
Command = TypeVar("Command", bound=Callable[..., Any])


def recipe_options_for(default: str) -> Callable[[Command], Command]:
    """Return what adds the options that say which recipe is taken, by default which one, and what is changed in it."""
    options = [
        click.option(
            "--recipe",
            "-r",
            "recipe_name",
            default=default,
            show_default=True,
            help="Name of a recipe, or path of a TOML file.",
        ),
        click.option("--model", help="Checkpoint directory or hub id instead of the recipe's model and adapter."),
        click.option(
            "--weights",
            type=click.Choice(["checkpoint", "random"]),
            help="Read the checkpoint, or make random weights of its architecture.",
        ),
        click.option(
            "--num-layers",
            type=click.IntRange(min=1),
            help="Cut a model with random weights to so many decoder layers.",
        ),
        click.option("--adapter", help="LoRA adapter to merge: a directory (PEFT), or the name of one that ships."),
        click.option(
            "--compressor", help="What a method learned: a file that 'tokexport train' wrote, or a name that ships."
        ),
        click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Precision of the graphs."),
        click.option(
            "--quantize",
            type=click.Choice(["none", "int8", "int4"]),
            help="Weights in fewer bits; int4 is for the decoder, all else is in int8 then.",
        ),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change a value of the recipe, e.g. compress.0.phase=0.5.",
        ),
    ]
    return with_options(*options)


def recipe_options(command: Command) -> Command:
    """Add the options that say which recipe is taken and what is changed in it."""
    return recipe_options_for("mini_adsc")(command)


RECIPE_OPTIONS = (
    "recipe_name",
    "settings",
    "model",
    "weights",
    "num_layers",
    "adapter",
    "compressor",
    "dtype",
    "quantize",
)
"""The parameters of a command that ``recipe_options`` add."""


def recipe_from(*, recipe_name: str, settings: tuple[str, ...], **changes: Any) -> "Recipe":
    """Return what ``recipe_options`` ask for."""
    from tokexport.recipes.load import load_changed

    return load_changed(recipe_name, settings, **changes)


def engine_options(command: Command) -> Command:
    """Add the options that say what runs an artefact."""
    options = [
        click.option("--backend", default="ort", show_default=True, help="Engine; 'tokexport doctor' lists them."),
        click.option("--threads", type=click.IntRange(min=1), help="CPU threads, by default one per core."),
    ]
    return with_options(*options)(command)


def jobs_option(command: Command) -> Command:
    """Add the option that says how many processes evaluate."""
    option = click.option(
        "--jobs",
        "-j",
        default=1,
        show_default=True,
        type=click.IntRange(min=1),
        help="Processes that ask at once and share the threads.",
    )
    return option(command)


def source_options(command: Command) -> Command:
    """Add the options that say where lies what an artefact was made from; the command gets one ``source``."""

    @functools.wraps(command)
    def with_source(*args: Any, **options: Any) -> Any:
        from tokexport.engines.backend import Source

        parts = {name: options.pop(name) for name in _SOURCES}
        return command(*args, source=Source(**parts), **options)

    what = [
        click.option(f"--{name}", help=f"The {meaning}, if it has moved since the build.")
        for name, meaning in _SOURCES.items()
    ]
    return cast("Command", with_options(*what)(with_source))


def answer_options(command: Command) -> Command:
    """Add the options that say what is asked about and how the answer is chosen."""
    options = [
        click.option(
            "--image",
            "images",
            multiple=True,
            type=click.Path(path_type=Path),
            help="Image file; may be given more than once.",
        ),
        click.option(
            "--max-new-tokens", default=64, show_default=True, type=click.IntRange(min=1), help="Longest answer."
        ),
        click.option("--temperature", default=0.0, show_default=True, help="0 takes the likeliest token."),
        click.option("--top-k", default=0, show_default=True, help="Draw from so many tokens; 0 is all."),
        click.option("--top-p", default=1.0, show_default=True, help="Draw from tokens holding this probability."),
        click.option("--seed", default=0, show_default=True, help="Of the draws."),
        click.option(
            "--max-text-tokens", type=click.IntRange(min=1), help="Room for text in the cache, by default the recipe's."
        ),
        click.option(
            "--max-images", type=click.IntRange(min=0), help="Room for images in the cache, by default the recipe's."
        ),
    ]
    return with_options(*options)(command)


def output_options(command: Command) -> Command:
    """Add the options that say where results are printed."""
    options = [
        click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
        click.option("--quiet", "-q", is_flag=True, help="Nothing for people on stderr but errors."),
    ]
    return with_options(*options)(command)


def with_options(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Return a decorator that adds options, listed in their order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add
