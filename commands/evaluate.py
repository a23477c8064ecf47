"""``tokexport eval``: how well an artefact answers, and how loyal it is to the uncompressed model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokexport.commands.options import engine_options, jobs_option, output_options, source_options
from tokexport.engines.terminal import Terminal
from tokexport.errors import GateError, InputError

if TYPE_CHECKING:
    from tokexport.engines.evaluation_data import DialogueSet


@click.command("eval")
@click.argument("artefact", type=click.Path(path_type=Path))
@click.option("--data", help="test (the default), validation, train, or a JSON-lines file of dialogues.")
@click.option(
    "--dialogues", type=click.IntRange(min=1), help="How many; by default 2000 made ones, or all of the file or folder."
)
@click.option("--turns", type=click.IntRange(min=1), help="Questions of a made dialogue, by default 3.")
@click.option("--seed", type=click.IntRange(min=0), help="Of made dialogues, by default 0.")
@click.option(
    "--loyalty", "with_loyalty", is_flag=True, help="Measure, without right answers, how near it stays to --full."
)
@click.option("--images", type=click.Path(path_type=Path), help="Folder of images for --loyalty, in place of --data.")
@click.option(
    "--questions",
    type=click.Path(path_type=Path),
    help="What is asked about each of --images, one question a line; by default five open ones.",
)
@click.option(
    "--reselect", is_flag=True, help="Also read all again with every question, so that it chooses the tokens."
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
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), help="Longest answer, by default 16, about --images 64 tokens."
)
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
    with_loyalty: bool,
    full: Path | None,
    answers: Path | None,
    store: bool,
    min_accuracy: float | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure the accuracy of an artefact on dialogues about images, or its loyalty to the uncompressed model."""
    from tokexport.engines.accuracy import EvalOptions, evaluate_artefact
    from tokexport.engines.loyalty import loyalty_of
    from tokexport.engines.tables import eval_tables, loyalty_tables

    terminal = Terminal(quiet=quiet)
    _refuse_useless(options, min_accuracy, full, with_loyalty=with_loyalty)
    with terminal.working():
        asked = _dialogues(options, terminal, with_loyalty=with_loyalty)
        listening: dict[str, Any] = {"progress": terminal.step, "tick": terminal.tick}
        chosen = EvalOptions(**options)
        if with_loyalty:
            assert full is not None
            report = loyalty_of(artefact, full, asked, chosen, answers=answers, store=store, **listening).report()
        else:
            report = evaluate_artefact(
                artefact, asked, chosen, full=full, answers=answers, store=store, **listening
            ).report()
    terminal.show(*(loyalty_tables(report) if with_loyalty else eval_tables(report)))
    if as_json:
        click.echo(json.dumps(report, indent=2))
    if min_accuracy is not None and report["accuracy"] < min_accuracy:
        raise GateError(f"the accuracy is {report['accuracy']:.4f}, below the {min_accuracy:g} of --min-accuracy")


def _refuse_useless(
    options: Mapping[str, Any], min_accuracy: float | None, full: Path | None, *, with_loyalty: bool
) -> None:
    """Refuse options that would have no effect, and loyalty to nothing."""
    images, questions = options["images"], options["questions"]
    if not with_loyalty:
        for name, value in (("images", images), ("questions", questions)):
            if value is not None:
                raise InputError(
                    f"--{name} {value} has no effect without --loyalty, as accuracy needs right answers; add "
                    "--loyalty, or give dialogues with answers as --data"
                )
        return
    if full is None:
        raise InputError(
            "--loyalty is to the uncompressed model, which was not given; name its artefact, made by a recipe without "
            "[[compress]], with --full"
        )
    useless = {"metric": None if options["metric"] == "exact" else options["metric"], "min-accuracy": min_accuracy}
    for name, value in useless.items():
        if value is not None:
            raise InputError(f"--{name} {value} has no effect on --loyalty, which has no right answers; leave it out")


def _dialogues(options: dict[str, Any], terminal: Terminal, *, with_loyalty: bool) -> "DialogueSet":
    """Take what says which dialogues are asked out of the options, fill in the longest answer, and open them."""
    from tokexport.engines.evaluate import DEFAULT_MAX_NEW_TOKENS
    from tokexport.engines.evaluation_data import open_dialogues, open_unlabelled
    from tokexport.engines.loyalty import OPEN_ANSWER_TOKENS

    made = {name: options.pop(name) for name in ("dialogues", "turns", "seed")}
    data, images, questions = (options.pop(name) for name in ("data", "images", "questions"))
    if options["max_new_tokens"] is None:
        options["max_new_tokens"] = DEFAULT_MAX_NEW_TOKENS if images is None else OPEN_ANSWER_TOKENS
    if not with_loyalty:
        return open_dialogues(data or "test", **made)
    if images is not None:
        terminal.step(f"reading the images of {images}")
    return open_unlabelled(data, **made, images=images, questions=questions, tick=terminal.tick)
