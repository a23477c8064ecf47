"""The main job: export, verify, measure, and only then put the artefact in its place."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tokexport.engines.backend import AS_BUILT, DEFAULT_BACKEND, SessionOptions, Source, load_backend
from tokexport.engines.bench import Bench, bench
from tokexport.engines.kept_agreement import kept_agreement, require_choice
from tokexport.engines.mixing import mixing_of
from tokexport.engines.parity import Verification, failure_text, require_provable, verify
from tokexport.engines.probe import make_probe
from tokexport.engines.prompt import require_askable
from tokexport.engines.report import write_reports
from tokexport.engines.source import source_design
from tokexport.errors import ParityError
from tokexport.exporter.bundle import Bundle, BundleWriter
from tokexport.exporter.export import design, export
from tokexport.recipes.schema import Recipe

REDUCED = "reduced"
"""Folder in the one that a failure leaves."""

_SHORT_BENCH_REPEATS = 3
Progress = Callable[[str], None]
Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Built:
    """A finished artefact with what was found out about it, None for what was left out."""

    bundle: Bundle
    verification: Verification | None
    bench: Bench | None


def build(
    recipe: Recipe,
    out: Path,
    *,
    backend: str = DEFAULT_BACKEND,
    threads: int | None = None,
    overwrite: bool = False,
    with_verify: bool = True,
    with_bench: bool = True,
    progress: Progress = lambda _: None,
    tick: Tick = lambda _done, _total: None,
    written: Tick = lambda _done, _total: None,
) -> Built:
    """Make an artefact from a recipe.

    Nothing is left at ``out`` unless every step succeeded; a failed proof leaves its inputs and
    outputs in a folder beside it.

    Args:
        recipe: what to make.
        out: the directory of the artefact.
        backend: the engine to verify and measure.
        threads: CPU threads, None for as many as there are cores.
        overwrite: replace an artefact that stands there.
        with_verify: climb the parity ladder.
        with_bench: make a short benchmark, without control arms.
        progress: told what is being done.
        tick: told how many of all measured runs are done.
        written: told how many bytes of a graph's weights are written.

    Raises:
        RecipeError, CheckpointError, BundleError: see ``design`` and ``export``.
        ParityError: the artefact does not compute what the checkpoint does.
    """
    # An engine that cannot do it is found out before the work, not behind it.
    if with_verify:
        require_provable(backend, recipe.export.dtype)
    if with_bench:
        load_backend(backend).require(recipe.export.dtype)
    made = design(recipe)
    require_askable(made.model.directory)
    repro = repro_folder(out)
    with BundleWriter(out, overwrite=overwrite) as writer:
        bundle = export(made, writer, progress, written=written)
        options = SessionOptions.for_bundle(bundle, threads=threads)
        verification = measured = None
        if with_verify:
            verification = verify(
                bundle, backend, options, repro=repro, progress=lambda text: progress(f"verifying {text}")
            )
            bundle.write_report("verify.json", verification.report())
            if not verification.passed:
                raise ParityError(failure_text(verification))
        if with_bench:
            measured = bench(
                bundle, backend, options, repeats=_SHORT_BENCH_REPEATS, controls=(), progress=progress, tick=tick
            )
            measured = replace(measured, bars=())  # a short run tells a speed-up, not whether it reaches a bar
            bundle.write_report("bench.json", measured.report())
        mixing = mixing_of(bundle, threads=threads)
        if mixing is not None:
            bundle.write_report("mixing.json", mixing)
        progress("writing the report")
        write_reports(bundle)
        return Built(writer.commit(), verification, measured)


def export_only(
    recipe: Recipe,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = lambda _: None,
    written: Tick = lambda _done, _total: None,
) -> Bundle:
    """Write the graphs without running anything."""
    made = design(recipe)
    require_askable(made.model.directory)
    with BundleWriter(out, overwrite=overwrite) as writer:
        export(made, writer, progress, written=written)
        return writer.commit()


def verify_artefact(
    path: Path,
    *,
    backend: str = DEFAULT_BACKEND,
    threads: int | None = None,
    source: Source = AS_BUILT,
    images: int | None = None,
    with_reduction: bool = False,
    progress: Progress = lambda _: None,
    tick: Tick = lambda _done, _total: None,
) -> Verification:
    """Prove an artefact again, every checksum and the whole ladder, and write its report.

    A failure leaves its inputs and outputs beside the artefact; see ``repro_folder``. With a number of ``images``, it
    is also compared which tokens are kept of as many.
    With ``with_reduction`` a failure of an engine leaves there the smallest part of its graph that fails; see
    ``reduction.py``.
    """
    progress("hashing files")
    bundle = Bundle.open(path, check_all=True)
    if images is not None:
        require_choice(bundle)
    options = SessionOptions.for_bundle(bundle, threads=threads, source=source)
    repro = repro_folder(path)
    if with_reduction:
        from tokexport.engines.reduction import reduce_failure, require_reducible  # needs ONNX Runtime

        require_reducible(backend, bundle.recipe)
        verification = verify(bundle, backend, options, repro=repro, progress=progress)
        if verification.engine_failed:
            probe = make_probe(source_design(bundle, source))
            reduced = reduce_failure(bundle, backend, options, probe, repro / REDUCED, progress=progress)
            verification = replace(verification, reduced=reduced)
    else:
        verification = verify(bundle, backend, options, repro=repro, progress=progress)
    if images is not None:
        progress(f"keeping tokens of {images} images")
        checks = kept_agreement(bundle, backend, options, images, tick=tick)
        verification = replace(verification, checks=(*verification.checks, *checks))
    bundle.write_report("verify.json", verification.report())
    write_reports(bundle)
    return verification


def repro_folder(out: Path) -> Path:
    """Return where a failed proof of ``out`` leaves its inputs and outputs."""
    absolute = out.expanduser().absolute()
    return absolute.with_name(f"{absolute.name}.repro")
