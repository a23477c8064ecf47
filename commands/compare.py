"""``tokexport compare``: recipes on one table."""

import json
from pathlib import Path
from typing import Any

import click

from tokexport.commands.options import engine_options, jobs_option, output_options
from tokexport.engines.terminal import Terminal
from tokexport.errors import InputError


@click.command()
@click.argument("recipes", nargs=-1)
@click.option(
    "--recipes",
    "listed",
    metavar="RECIPE,...",
    callback=lambda _context, _option, given: _parts(given),
    help="More of them, in one list.",
)
@click.option(
    "--out", "-o", type=click.Path(path_type=Path), default=Path("out/compare"), show_default=True, help="Folder."
)
@click.option(
    "--data", default="test", show_default=True, help="test, validation, train, or a JSON-lines file of dialogues."
)
@click.option("--dialogues", type=click.IntRange(min=1), help="How many; by default 2000 made ones, or all.")
@click.option(
    "--budgets",
    metavar="TOKENS,...",
    callback=lambda _context, _option, given: _budgets(given),
    help="Make every compressed recipe at each mean of vision tokens per layer, e.g. 192,128,64.",
)
@click.option(
    "--precisions",
    metavar="PRECISION,...",
    callback=lambda _context, _option, given: _parts(given),
    help="Make every recipe in each beside float32, e.g. int8,int4.",
)
@click.option("--repeats", default=9, show_default=True, type=click.IntRange(min=1), help="Measured runs of each.")
@engine_options
@jobs_option
@output_options
def compare(
    recipes: tuple[str, ...],
    listed: tuple[str, ...],
    out: Path,
    data: str,
    dialogues: int | None,
    budgets: tuple[int, ...],
    precisions: tuple[str, ...],
    repeats: int,
    backend: str,
    threads: int | None,
    jobs: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Build, evaluate and measure RECIPES: names, TOML files, or folders of them.

    One of them must be without compression; the others are compared with it, and each with the control (sample,
    random or resize) that keeps as many tokens. What is there already is used again, so an interrupted comparison
    goes on where it was stopped.
    """
    from tokexport.engines.accuracy import EvalOptions
    from tokexport.engines.evaluation_data import open_dialogues
    from tokexport.engines.recipe_comparison import PAGE, TABLE, compare_recipes
    from tokexport.recipes.load import load_recipe

    names = _names((*recipes, *listed))
    if not names:
        raise click.UsageError("no recipe is given; give names, TOML files, or folders of them")
    terminal = Terminal(quiet=quiet)
    loaded = [load_recipe(name) for name in names]
    asked = open_dialogues(data, dialogues=dialogues)
    with terminal.working():
        found = compare_recipes(
            loaded,
            out,
            asked,
            EvalOptions(backend=backend, threads=threads, jobs=jobs),
            budgets=budgets,
            precisions=precisions,
            repeats=repeats,
            progress=terminal.step,
            tick=terminal.tick,
        )
    terminal.show(found.markdown(), f"also in {out / TABLE}; plots and pictures in {out / PAGE}")
    if as_json:
        click.echo(json.dumps(found.report(), indent=2, default=str))


def _parts(given: str | None) -> tuple[str, ...]:
    """Return what stands between the commas of a list."""
    parts = tuple(one.strip() for one in given.split(",")) if given is not None else ()
    if not all(parts):
        raise click.BadParameter(f"{given!r} has nothing before or behind a comma; leave the comma out")
    return parts


def _budgets(given: str | None) -> tuple[int, ...]:
    """Return the whole numbers of a list with commas."""
    parts = _parts(given)
    try:
        return tuple(int(one) for one in parts)
    except ValueError:
        raise click.BadParameter(f"{given!r} is no list of whole numbers, e.g. 192,128,64") from None


def _names(given: tuple[str, ...]) -> list[str]:
    """Return recipes, the files of folders among them in the order of their names."""
    names: list[Any] = []
    for name in given:
        if Path(name).is_dir():
            files = sorted(str(path) for path in Path(name).glob("*.toml"))
            if not files:
                raise InputError(f"the folder {name} holds no recipe (*.toml); give recipes, or a folder of them")
            names += files
        else:
            names.append(name)
    return names
