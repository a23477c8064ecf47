"""``tokexport eval``: how well an artefact answers."""

import json
from pathlib import Path
from typing import Any

import click

from tokexport.commands.options import engine_options, jobs_option, output_options, source_options
from tokexport.engines.terminal import Terminal
from tokexport.errors import GateError


@click.command("eval")
@click.argument("artefact", type=click.Path(path_type=Path))
@click.option(
    "--data", default="test", show_default=True, help="test, validation, train, or a JSON-lines file of dialogues."
)
@click.option(
    "--dialogues", type=click.IntRange(min=1), help="How many; by default 2000 made ones, or all of the file."
)
@click.option("--turns", type=click.IntRange(min=1), help="Questions of a made dialogue, by default 3.")
@click.option("--seed", type=click.IntRange(min=0), help="Of made dialogues, by default 0.")
@click.option(
    "--reselect", is_flag=True, help="Also read all again with every question, so that it chooses the vision tokens."
)
@engine_options
@jobs_option
@source_options
@click.option(
    "--metric",
    type=click.Choice(["exact", "vqa"]),
    default="exact",
    show_default=True,
    help="Equal to an accepted answer, or the soft accuracy of VQA-v2 over ten annotators.",
)
@click.option("--max-new-tokens", default=16, show_default=True, type=click.IntRange(min=1), help="Longest answer.")
@click.option(
    "--max-text-tokens", type=click.IntRange(min=1), help="Room for text in the cache, by default what the data needs."
)
@click.option("--answers", type=click.Path(path_type=Path), help="Write every answer to this JSON-lines file.")
@click.option("--full", type=click.Path(path_type=Path), help="The uncompressed artefact to compare with.")
@click.option("--min-accuracy", type=click.FloatRange(0, 1), help="Exit with code 4 below this.")
@click.option("--store/--no-store", default=True, help="Keep the result in the reports of the artefact.")
@output_options
def evaluate(
    artefact: Path,
    data: str,
    dialogues: int | None,
    turns: int | None,
    seed: int | None,
    full: Path | None,
    answers: Path | None,
    store: bool,
    min_accuracy: float | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure the accuracy of an artefact on dialogues about images."""
    from tokexport.engines.accuracy import EvalOptions, evaluate_artefact
    from tokexport.engines.evaluation_data import open_dialogues
    from tokexport.engines.tables import eval_tables

    terminal = Terminal(quiet=quiet)
    asked = open_dialogues(data, dialogues=dialogues, turns=turns, seed=seed)
    with terminal.working():
        report = evaluate_artefact(
            artefact,
            asked,
            EvalOptions(**options),
            full=full,
            answers=answers,
            store=store,
            progress=terminal.step,
            tick=terminal.tick,
        ).report()
    terminal.show(*eval_tables(report))
    if as_json:
        click.echo(json.dumps(report, indent=2))
    if min_accuracy is not None and report["accuracy"] < min_accuracy:
        raise GateError(f"the accuracy is {report['accuracy']:.4f}, below the {min_accuracy:g} of --min-accuracy")
