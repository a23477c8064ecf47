"""How much later the first token of one artefact comes than another's, where a few percent count.

``tokexport bench`` gives every row one process. A process may be some percent slower than its twin for as long as it
lives, so here each artefact has several; all take turns, and what else runs on the machine meets all alike. Run from
the root of the repository: ``python -m benchmarks.first_token ARTEFACT OTHER``.
"""

from contextlib import ExitStack
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from tokexport.engines.backend import DEFAULT_BACKEND, SessionOptions
from tokexport.engines.intervals import ratio_intervals
from tokexport.engines.worker import EngineProcess, Workload
from tokexport.errors import TokexportError
from tokexport.exporter.bundle import Bundle

_WARMUP = 2


@click.command()
@click.argument("artefacts", nargs=2, type=click.Path(path_type=Path), metavar="ARTEFACT OTHER")
@click.option("--processes", default=2, show_default=True, type=click.IntRange(min=1), help="Of each artefact.")
@click.option("--repeats", default=60, show_default=True, type=click.IntRange(min=1), help="Turns of each process.")
@click.option("--text-tokens", default=36, show_default=True, type=click.IntRange(min=8))
@click.option("--threads", type=click.IntRange(min=1), help="By default as many as there are cores.")
def main(artefacts: tuple[Path, Path], processes: int, repeats: int, text_tokens: int, threads: int | None) -> None:
    """Print one table, and the ratio of the two with its 95 % interval."""
    workload = Workload(text_tokens=text_tokens, new_tokens=1)
    try:
        bundles = [Bundle.open(path) for path in artefacts]
        # P processes of each, turns T
        first_2PT, vision_2PT = measured(bundles, workload, processes, repeats, threads)
    except TokexportError as error:
        raise click.ClickException(str(error)) from error
    click.echo("| artefact | first token, ms, each process | vision, ms |\n|---|---:|---:|")
    for path, first_PT, vision_PT in zip(artefacts, first_2PT, vision_2PT, strict=True):
        first, vision = (", ".join(f"{ms:.1f}" for ms in np.median(ms_PT, axis=1)) for ms_PT in (first_PT, vision_PT))
        click.echo(f"| {path} | {first} | {vision} |")
    sums_2T1 = first_2PT.sum(axis=1)[:, :, None]
    ((low, high),) = ratio_intervals(*sums_2T1)
    ratio = sums_2T1[0].sum() / sums_2T1[1].sum()
    click.echo(f"\nthe first token comes after {ratio:.3f} of the other's time ({low:.3f} to {high:.3f})")


def measured(
    bundles: list[Bundle], workload: Workload, processes: int, repeats: int, threads: int | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the milliseconds until the first token and of the vision encoder, both (artefact, process, turn)."""
    room = workload.text_tokens + workload.new_tokens
    with ExitStack() as stack:
        opened = [
            stack.enter_context(
                EngineProcess(
                    bundle.path,
                    DEFAULT_BACKEND,
                    SessionOptions.for_bundle(bundle, max_text_tokens=room, max_images=1, threads=threads),
                    workload,
                )
            )
            for _ in range(processes)
            for bundle in bundles
        ]
        turns = [[process.measure() for process in opened] for _ in range(_WARMUP + repeats)][_WARMUP:]
    shape = repeats, processes, len(bundles)
    first, vision = (
        np.array([[getattr(timing, name) for timing in turn] for turn in turns]) for name in ("ttft_ms", "vision_ms")
    )
    return first.reshape(shape).transpose(2, 1, 0), vision.reshape(shape).transpose(2, 1, 0)


if __name__ == "__main__":
    main()
