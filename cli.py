"""The command line: options in, one call, results out. No logic lives here.

Imports stand inside the commands, so that ``tokexport --help`` does not wait for torch.
"""

import json
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from tokexport.commands.compare import compare
from tokexport.commands.compile import compile_engines
from tokexport.commands.doctor import doctor
from tokexport.commands.evaluate import evaluate
from tokexport.commands.options import (
    answer_options,
    engine_options,
    output_options,
    recipe_from,
    recipe_options,
    source_options,
)
from tokexport.commands.plan import plan
from tokexport.commands.search import search
from tokexport.commands.train import train
from tokexport.engines.terminal import Terminal
from tokexport.errors import GateError, InputError, ParityError, TokexportError

if TYPE_CHECKING:
    from tokexport.engines.generate import Sampling
    from tokexport.engines.model import Chat, Vlm

_EXIT_INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="tokexport")
def cli() -> None:
    """Compile LLaVA checkpoints with token compression into ONNX graphs, prove them, measure them."""


@cli.command()
@recipe_options
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Directory of the artefact, by default out/RECIPE.")
@engine_options
@click.option("--overwrite", is_flag=True, help="Replace an artefact that stands there.")
@click.option(
    "--verify/--no-verify", "with_verify", default=True, help="Prove the artefact before it is put in its place."
)
@click.option("--bench/--no-bench", "with_bench", default=True, help="Measure it shortly.")
@output_options
def build(
    out: Path | None,
    backend: str,
    threads: int | None,
    overwrite: bool,
    with_verify: bool,
    with_bench: bool,
    as_json: bool,
    quiet: bool,
    **recipe: Any,
) -> None:
    """Export a recipe, verify it, measure it: one artefact."""
    from tokexport.engines.build import build as build_artefact
    from tokexport.engines.cost_tables import foretold_table
    from tokexport.engines.tables import bench_tables, plan_tables, verify_table

    loaded, terminal = recipe_from(**recipe), Terminal(quiet=quiet)
    place = out or Path("out") / loaded.name
    with terminal.working():
        built = build_artefact(
            loaded,
            place,
            backend=backend,
            threads=threads,
            overwrite=overwrite,
            with_verify=with_verify,
            with_bench=with_bench,
            progress=terminal.step,
            tick=terminal.tick,
            written=terminal.written,
        )
    report = built.bundle.read_report("plan.json") or {}
    terminal.show(*plan_tables(report, built.bundle.plan))
    verified = built.verification.report() if built.verification else None
    measured = built.bench.report() if built.bench else None
    if verified:
        terminal.show(verify_table(verified))
    if measured:
        terminal.show(*bench_tables(measured), foretold_table(measured))
    terminal.show(f"built {built.bundle.path}", f"  ask it:  tokexport run {place} --image FILE --prompt TEXT")
    if as_json:
        _print_json(
            {
                "path": str(built.bundle.path),
                "plan": report,
                "verify": verified,
                "bench": measured,
            }
        )


@cli.command()
@recipe_options
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Directory of the artefact, by default out/RECIPE.")
@click.option("--overwrite", is_flag=True, help="Replace an artefact that stands there.")
@output_options
def export(out: Path | None, overwrite: bool, as_json: bool, quiet: bool, **recipe: Any) -> None:
    """Write the ONNX graphs only, without running them."""
    from tokexport.engines.build import export_only

    loaded, terminal = recipe_from(**recipe), Terminal(quiet=quiet)
    with terminal.working():
        bundle = export_only(
            loaded,
            out or Path("out") / loaded.name,
            overwrite=overwrite,
            progress=terminal.step,
            written=terminal.written,
        )
    terminal.show(f"exported {bundle.path}; not verified")
    if as_json:
        _print_json({"path": str(bundle.path), "plan": bundle.read_report("plan.json")})


@cli.command()
@click.argument("artefact", type=click.Path(path_type=Path))
@engine_options
@source_options
@click.option(
    "--images", type=click.IntRange(min=1), help="Also compare which vision tokens are kept of so many made images."
)
@click.option(
    "--reduce",
    "with_reduction",
    is_flag=True,
    help="Where the engine fails, leave the smallest part of its graph that fails; needs Polygraphy.",
)
@output_options
def verify(artefact: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Prove that an artefact computes what its checkpoint does. Exit code 3 if not."""
    from tokexport.engines.build import verify_artefact
    from tokexport.engines.parity import failure_text
    from tokexport.engines.tables import verify_table

    terminal = Terminal(quiet=quiet)
    with terminal.working():
        verification = verify_artefact(artefact, progress=terminal.step, tick=terminal.tick, **options)
    report = verification.report()
    terminal.show(verify_table(report))
    if as_json:
        _print_json(report)
    if not verification.passed:
        raise ParityError(failure_text(verification))


@cli.command()
@click.argument("artefact", type=click.Path(path_type=Path))
@engine_options
@source_options
@click.option("--text-tokens", type=click.IntRange(min=1), help="Text tokens of the prompt, by default the recipe's.")
@click.option("--new-tokens", default=16, show_default=True, type=click.IntRange(min=1), help="Tokens of the answer.")
@click.option("--repeats", default=7, show_default=True, type=click.IntRange(min=1), help="Measured runs of every row.")
@click.option(
    "--control",
    "controls",
    multiple=True,
    default=["sample", "random"],
    show_default=True,
    help="Method to compare with at the same number of tokens.",
)
@click.option("--profile", "with_profile", is_flag=True, help="Say where the time goes, by kind of operator.")
@click.option("--gate", is_flag=True, help="Exit with code 4 if a figure misses its bar.")
@output_options
def bench(artefact: Path, gate: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure {PyTorch, engine} x {all tokens, compressed} beside the plan's prediction."""
    from tokexport.engines.bench import bench_artefact
    from tokexport.engines.cost_tables import foretold_table, profile_tables
    from tokexport.engines.tables import bench_tables

    terminal = Terminal(quiet=quiet)
    with terminal.working():
        report = bench_artefact(artefact, progress=terminal.step, tick=terminal.tick, **options).report()
    terminal.show(*bench_tables(report), foretold_table(report), *profile_tables(report))
    if as_json:
        _print_json(report)
    missed = [
        f"{entry['meaning']} is {entry['value']:.3g}, bar {entry['bar']:g}"
        for entry in report["gates"]
        if not entry["passed"]
    ]
    if gate and missed:
        raise GateError(f"{len(missed)} figures miss their bars: {'; '.join(missed)}")


@cli.command()
@click.argument("artefact", type=click.Path(path_type=Path))
@click.option("--prompt", "-p", required=True, help="The question.")
@answer_options
@engine_options
@source_options
@output_options
def run(artefact: Path, prompt: str, images: tuple[Path, ...], as_json: bool, quiet: bool, **options: Any) -> None:
    """Answer one question about images, streaming."""
    vlm, chat_ = _open_chat(artefact, options)
    for piece in chat_.stream(prompt, images):
        if not as_json:
            click.echo(piece, nl=False)
    if as_json:
        _print_json(asdict(chat_.last))
    else:
        click.echo()
    _show_timing(Terminal(quiet=quiet), chat_, vlm)


@cli.command()
@click.argument("artefact", type=click.Path(path_type=Path))
@answer_options
@click.option(
    "--reselect",
    is_flag=True,
    help="Read images and conversation again with every question, so that vision tokens are chosen by it.",
)
@engine_options
@source_options
@output_options
def chat(artefact: Path, images: tuple[Path, ...], as_json: bool, quiet: bool, **options: Any) -> None:
    """Talk in several turns on one cache. /image FILE adds an image, /reset starts anew, /quit ends."""
    terminal = Terminal(quiet=quiet)
    vlm, chat_ = _open_chat(artefact, options)
    terminal.show("/image FILE adds an image to the next question, /reset starts anew, /quit ends")
    waiting = list(images)
    for line in _questions():
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return
        if command == "/image":
            waiting.append(Path(argument.strip()))
        elif command == "/reset":
            chat_, waiting = _new_chat(vlm, options), list(images)
        elif command.startswith("/"):
            terminal.show(f"there is no command {command}; /image FILE, /reset and /quit are known")
        else:
            cost_to = terminal if options["reselect"] and (as_json or not quiet) else None
            waiting = _turn(chat_, line, waiting, as_json=as_json, cost_to=cost_to)


@cli.command()
@click.argument("artefact", type=click.Path(path_type=Path))
@output_options
def inspect(artefact: Path, as_json: bool, quiet: bool) -> None:
    """Show what an artefact holds: model, recipe, graphs, inputs and outputs."""
    from tokexport.engines.tables import bundle_tables, describe_bundle
    from tokexport.exporter.bundle import Bundle

    bundle = Bundle.open(artefact)
    description = describe_bundle(bundle)
    Terminal(quiet=quiet).show(*bundle_tables(bundle, description))
    if as_json:
        _print_json(description)


@cli.command("list")
@output_options
def list_(as_json: bool, quiet: bool) -> None:
    """List recipes, methods, families and engines."""
    from tokexport.engines.doctor import list_everything
    from tokexport.engines.tables import new_table

    found = list_everything()
    if as_json:
        _print_json(found)
        return
    for kind, entries in found.items():
        table = new_table(kind, "")
        for name, text in entries.items():
            table.add_row(name, text)
        Terminal(quiet=quiet).show(table)


cli.add_command(plan)
cli.add_command(doctor)
cli.add_command(train)
cli.add_command(compare)
cli.add_command(evaluate)
cli.add_command(search)
cli.add_command(compile_engines)


def main() -> None:
    """Run the command line and exit with the code of what happened."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except TokexportError as error:
        _fail(str(error), error.exit_code)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message(), 1)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", _EXIT_INTERRUPTED)
    except MemoryError:
        _fail("not enough memory; use fewer layers, a smaller model or a machine with more", 1)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}", 1)
    except Exception as error:
        if not _came_of_interruption(error):
            raise
        _fail("interrupted", _EXIT_INTERRUPTED)


def _came_of_interruption(error: BaseException | None) -> bool:
    """Say whether ``error`` was raised while an interruption unwound the stack.

    torch.export cleans up after itself on the way out; interrupted between two of its steps, that
    fails with an error of its own, which hides the interruption.
    """
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fail(text: str, code: int) -> None:
    click.echo(f"error: {' '.join(text.split())}", err=True)
    sys.exit(code)


def _open_chat(artefact: Path, options: dict[str, Any]) -> tuple["Vlm", "Chat"]:
    from tokexport.engines.model import load

    _sampling(options)  # a wrong number is said before the model is opened
    opening = ("backend", "threads", "max_text_tokens", "max_images", "source")
    vlm = load(artefact, **{name: options[name] for name in opening})
    return vlm, _new_chat(vlm, options)


def _new_chat(vlm: "Vlm", options: dict[str, Any]) -> "Chat":
    reselect = options.get("reselect", False)
    return vlm.chat(max_new_tokens=options["max_new_tokens"], sampling=_sampling(options), reselect=reselect)


def _sampling(options: dict[str, Any]) -> "Sampling":
    from tokexport.engines.generate import Sampling

    return Sampling(**{name: options[name] for name in ("temperature", "top_k", "top_p", "seed")})


def _questions() -> Iterator[str]:
    """Yield lines until the input ends; only a person gets a prompt sign."""
    while True:
        if sys.stdin.isatty():
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _turn(
    chat_: "Chat", question: str, images: list[Path], *, as_json: bool, cost_to: Terminal | None = None
) -> list[Path]:
    """Ask and print, and tell what choosing tokens anew cost; return the images that still wait for a question."""
    from tokexport.engines.reselection import reselection_text

    continuing = chat_.continuing_cost(question) if cost_to and not images else None
    try:
        for piece in chat_.stream(question, images):
            if not as_json:
                click.echo(piece, nl=False)
    except InputError as error:
        if not sys.stdin.isatty():
            raise
        click.echo(f"error: {error}", err=True)
        return images
    document = asdict(chat_.last)
    if cost_to:
        document["continuing"] = asdict(continuing) if continuing else None
    click.echo(json.dumps(document)) if as_json else click.echo()
    if cost_to:
        cost_to.show(reselection_text(chat_.last, continuing))
    return []


def _show_timing(terminal: Terminal, chat_: "Chat", vlm: "Vlm") -> None:
    answer = chat_.last
    terminal.show(
        f"{answer.prompt_tokens} text tokens, first token after {answer.ttft_ms:.0f} ms, "
        f"{len(answer.token_ids)} tokens in {answer.total_ms:.0f} ms, cache {vlm.session.kv_bytes / 1e6:.1f} MB"
    )
    if vlm.bundle.manifest.model.weights == "random":
        terminal.show("the weights are random, so the answer means nothing")


def _print_json(document: Mapping[str, Any]) -> None:
    click.echo(json.dumps(document, indent=2))
