"""``tokexport search``: the best recipe for a budget."""

import json
from pathlib import Path
from typing import Any

import click

from tokexport.commands.options import engine_options, jobs_option, output_options, recipe_from, recipe_options_for
from tokexport.engines.terminal import Terminal


@click.command()
@click.option(
    "--budget",
    "-b",
    "budgets",
    multiple=True,
    required=True,
    metavar="KIND=LIMIT",
    help="At most a part of what the uncompressed model takes (ttft=0.5, kv=0.4, flops=0.5) or an amount (ttft=300ms, "
    "kv=20MB, flops=120G). May be given more than once; all have to be met.",
)
@recipe_options_for("mini_full")
@click.option(
    "--out", "-o", type=click.Path(path_type=Path), default=Path("out/search"), show_default=True, help="Folder."
)
@click.option("--method", "methods", multiple=True, help="Only this method may win; may be given more than once.")
@click.option("--also", multiple=True, metavar="RECIPE", help="Try this recipe of the same model too, e.g. one tuned.")
@click.option(
    "--data", default="test", show_default=True, help="test, validation, train, or a JSON-lines file of dialogues."
)
@click.option(
    "--dialogues", type=click.IntRange(min=1), help="That decide, by default 2000 made ones or all left over."
)
@click.option(
    "--screening-data",
    help="Where candidates are screened: by default validation, or other dialogues of the same file.",
)
@click.option(
    "--screening",
    default=180,
    show_default=True,
    type=click.IntRange(min=1),
    help="Dialogues of the last round of screening; the rounds before have a ninth and a third of it.",
)
@click.option(
    "--finalists",
    default=6,
    show_default=True,
    type=click.IntRange(min=1),
    help="Candidates to build and measure, beside controls.",
)
@click.option("--repeats", default=9, show_default=True, type=click.IntRange(min=1), help="Measured runs of each.")
@engine_options
@jobs_option
@output_options
def search(
    budgets: tuple[str, ...],
    out: Path,
    methods: tuple[str, ...],
    also: tuple[str, ...],
    data: str,
    dialogues: int | None,
    screening_data: str | None,
    screening: int,
    finalists: int,
    repeats: int,
    backend: str,
    threads: int | None,
    jobs: int,
    as_json: bool,
    quiet: bool,
    **recipe: Any,
) -> None:
    """Find the most accurate recipe that meets budgets, and write it as TOML.

    Methods, layers, counts, patterns and positions are tried: by plan, then in PyTorch on few dialogues, and the best
    of them are built, proved, evaluated and measured. What is there already is used again, so an interrupted search
    goes on where it was stopped.
    """
    from tokexport.engines.accuracy import EvalOptions
    from tokexport.engines.cost_budget import parse_budgets
    from tokexport.engines.evaluation_data import open_apart
    from tokexport.engines.search import TABLE, WINNER, SearchOptions
    from tokexport.engines.search import search as find
    from tokexport.engines.search_text import search_tables
    from tokexport.recipes.load import load_recipe

    terminal = Terminal(quiet=quiet)
    wanted = SearchOptions(
        budgets=parse_budgets(budgets),
        methods=methods,
        also=tuple(load_recipe(name) for name in also),
        finalists=finalists,
        repeats=repeats,
    )
    asked, screened = open_apart(data, dialogues, screening_data, screening)
    options = EvalOptions(backend=backend, threads=threads, jobs=jobs)
    base = recipe_from(**recipe)
    with terminal.working():
        found = find(base, out, asked, screened, options, wanted, progress=terminal.step, tick=terminal.tick)
    terminal.show(*search_tables(found.report))
    if as_json:
        click.echo(json.dumps(found.report, indent=2, default=str))
    found.require_winner()
    terminal.show(f"also in {out / TABLE}; build it anywhere:  tokexport build -r {out / WINNER} -o FOLDER")
