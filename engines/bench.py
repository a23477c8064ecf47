"""What was gained: {PyTorch, engine} x {all tokens, compressed} beside the plan's prediction, with control arms.

All engines are open at once, each in its own process, and take turns; a turn is one run to get warm
and one that counts. Figures are medians.
"""

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tokexport.engines.backend import AS_BUILT, SessionOptions, Source, load_backend
from tokexport.engines.environment import describe_environment
from tokexport.engines.foretold import foretold_and_measured
from tokexport.engines.method_cost import measure_methods, method_contents
from tokexport.engines.profile import profile, require_profile
from tokexport.engines.report import write_reports
from tokexport.engines.source import source_design
from tokexport.engines.worker import EngineProcess, Footprint, Timing, Workload
from tokexport.errors import BackendUnavailableError, BundleError, InputError
from tokexport.exporter.bundle import Bundle, BundleWriter
from tokexport.exporter.export import Design, design, export
from tokexport.exporter.method import load_methods, plan_tokens
from tokexport.exporter.plan import TokenPlan, kv_cache_bytes, prefill_flops
from tokexport.exporter.staging import staging_folder
from tokexport.recipes.schema import CompressTable

Progress = Callable[[str], None]

BASELINE = "transformers"
REFERENCE = "torch-eager"
FULL = "full"
_WARMUP = 2


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row of the table: an artefact and the engine that runs it."""

    bundle: Bundle
    engine: str
    method: str
    is_control: bool = False

    @property
    def plan(self) -> TokenPlan:
        is_compressed = load_backend(self.engine).is_compressed
        return self.bundle.plan if is_compressed else TokenPlan.uncompressed(self.bundle.spec)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A figure with the value it has to reach."""

    name: str
    meaning: str
    value: float
    bar: float
    is_upper: bool = False

    @property
    def passed(self) -> bool:
        return self.value <= self.bar if self.is_upper else self.value >= self.bar


@dataclass(frozen=True)
class Bench:
    """The outcome of a benchmark."""

    rows: tuple[Mapping[str, Any], ...]
    speedup: Mapping[str, float]
    bars: tuple[Bar, ...]
    workload: Mapping[str, Any]
    environment: Mapping[str, Any]
    methods: Sequence[Mapping[str, Any]] = ()
    foretold: Mapping[str, Any] = field(default_factory=dict)
    profile: Mapping[str, Any] | None = None

    def report(self) -> dict[str, Any]:
        """Return what ``tokexport bench --json`` prints; its keys are a contract."""
        return {
            "rows": list(self.rows),
            "speedup": dict(self.speedup),
            "gates": [{**asdict(bar), "passed": bar.passed} for bar in self.bars],
            "workload": dict(self.workload),
            "environment": dict(self.environment),
            "methods": list(self.methods),
            "foretold": dict(self.foretold),
            **({"profile": dict(self.profile)} if self.profile else {}),
        }


def bench(
    bundle: Bundle,
    engine: str,
    options: SessionOptions,
    *,
    text_tokens: int | None = None,
    new_tokens: int = 16,
    repeats: int = 7,
    controls: Sequence[str] = ("sample", "random"),
    with_profile: bool = False,
    progress: Progress = lambda _: None,
    tick: Callable[[int, int], None] = lambda _done, _total: None,
) -> Bench:
    """Measure an artefact against all tokens, PyTorch, and control methods at the same mean of tokens per layer.

    Args:
        bundle: the artefact.
        engine: the engine to measure.
        options: threads and where the checkpoint lies; room is made for exactly the workload.
        text_tokens: of the prompt, None for the recipe's.
        new_tokens: of the answer.
        repeats: measured runs of every arm, after two that are not counted.
        controls: methods whose ``keep`` takes a fraction.
        with_profile: say where the time of the artefact goes in its engine.
        progress: told what is being done.
        tick: told how many of all runs are done.

    Raises:
        CheckpointError: the checkpoint that the artefact was made from is not at hand.
        InputError: a number that cannot be measured with.
        BackendUnavailableError: the engine cannot be measured, or writes no profile.
    """
    _at_least("repeats", repeats, 1)
    _at_least("new-tokens", new_tokens, 1)
    text_tokens = bundle.recipe.plan.text_tokens if text_tokens is None else text_tokens
    _at_least("text-tokens", text_tokens, 0)
    workload = Workload(text_tokens=text_tokens, new_tokens=new_tokens)
    made = source_design(bundle, options.source)
    _require_measurable(engine, made, workload, controls)
    if with_profile:
        require_profile(engine)
    options = replace(options, max_text_tokens=text_tokens + new_tokens, max_images=1)
    with _arms(bundle, engine, made, controls, progress) as arms:
        rows = measure_arms(arms, options, workload, repeats, progress, tick)
    progress("measuring the method alone")
    methods = _method_costs(bundle, rows, options.threads, repeats)
    progress("measuring this machine")
    foretold = foretold_and_measured(bundle, made, _measured(rows), workload, threads=options.threads)
    found = None
    if with_profile:
        progress("profiling")
        full_ms = _of(rows, FULL)["prefill_ms"]
        found = profile(bundle, engine, options, workload, repeats=repeats, full_prefill_ms=full_ms)
    speedup = _speedup(rows)
    return Bench(
        rows=rows,
        speedup=speedup,
        bars=(*_bars(rows, speedup, engine), *_method_bars(methods)),
        workload={**asdict(workload), "repeats": repeats, "batch": 1},
        environment=asdict(describe_environment(options.threads)),
        methods=methods,
        foretold=foretold,
        profile=found,
    )


def _require_measurable(engine: str, made: Design, workload: Workload, controls: Sequence[str]) -> None:
    """Find out before the work what would stop it."""
    backend, spec = load_backend(engine), made.model.spec
    backend.require(made.recipe.export.dtype)
    if not backend.is_compressed:
        raise BackendUnavailableError(
            f"backend {engine!r} runs all tokens, so it has no gain to measure; choose another"
        )
    for control in controls if made.methods else ():
        if control not in (step.method for step in made.recipe.compress):
            plan_tokens(load_methods([_control(control, made)]), spec)
    longest = made.plan.num_positions + workload.text_tokens + workload.new_tokens
    if longest > spec.max_positions:
        raise InputError(
            f"{longest} tokens are more than the {spec.max_positions} positions of the model; ask for "
            "fewer text or new "
            "tokens"
        )


def bench_artefact(
    path: Path,
    *,
    backend: str,
    threads: int | None = None,
    source: Source = AS_BUILT,
    **options: Any,
) -> Bench:
    """Measure an artefact and write its report; see ``bench`` for the options."""
    bundle = Bundle.open(path)
    session = SessionOptions.for_bundle(bundle, threads=threads, source=source)
    measured = bench(bundle, backend, session, **options)
    bundle.write_report("bench.json", measured.report())
    write_reports(bundle)
    return measured


def measure_arms(
    arms: Sequence[Arm],
    options: SessionOptions,
    workload: Workload,
    repeats: int,
    progress: Progress,
    tick: Callable[[int, int], None],
) -> tuple[dict[str, Any], ...]:
    """Let artefacts take turns on a workload and return a row of the table for each."""
    with contextlib.ExitStack() as stack:
        engines: list[EngineProcess] = []
        for arm in arms:
            progress(f"opening {arm.engine} {arm.method}")
            engines.append(stack.enter_context(EngineProcess(arm.bundle.path, arm.engine, options, workload)))
        progress("measuring")
        timings: list[list[Timing]] = [[] for _ in arms]
        total, done = (_WARMUP + repeats) * len(arms), 0
        for turn in range(_WARMUP + repeats):
            for index, engine in enumerate(engines):
                timing = engine.measure()
                done += 1
                tick(done, total)
                if turn >= _WARMUP:
                    timings[index].append(timing)
        footprints = [engine.footprint() for engine in engines]
    return tuple(_row(arm, timings[i], footprints[i], workload) for i, arm in enumerate(arms))


@contextlib.contextmanager
def _arms(
    bundle: Bundle, engine: str, made: Design, controls: Sequence[str], progress: Progress
) -> Generator[list[Arm]]:
    """Give the arms of the table; artefacts made for it share the weights and are gone afterwards."""
    name = "+".join(step.method for step in made.recipe.compress) or FULL
    arms = [Arm(bundle=bundle, engine=BASELINE, method=FULL)]
    if name == FULL:
        yield [*arms, Arm(bundle=bundle, engine=engine, method=FULL)]
        return
    with _scratch(bundle.path) as folder:
        arms.append(Arm(bundle=_twin(bundle, made, (), folder / FULL, progress), engine=engine, method=FULL))
        if engine != REFERENCE:
            arms.append(Arm(bundle=bundle, engine=REFERENCE, method=name))
        arms.append(Arm(bundle=bundle, engine=engine, method=name))
        for control in controls:
            if control == name:
                continue
            twin = _twin(bundle, made, (_control(control, made),), folder / control, progress)
            arms.append(Arm(bundle=twin, engine=engine, method=control, is_control=True))
        yield arms


def _control(method: str, made: Design) -> CompressTable:
    """Return the method at the same mean of vision tokens per layer, or the nearest that it can keep."""
    # As a fraction, because not every method takes every count.
    return CompressTable(
        method=method, options={"keep": made.plan.mean_vision_tokens / made.model.spec.num_vision_tokens}
    )


@contextlib.contextmanager
def _scratch(path: Path) -> Generator[Path]:
    """Give a folder on the artefact's disk, so that weights can be linked."""
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(staging_folder(path.absolute()))
        except OSError as error:
            raise BundleError(
                f"{path.parent} cannot be written ({error.strerror}), where the artefacts to compare with have to "
                "stand; copy the artefact to a place that can be written"
            ) from error
        yield folder


def _twin(bundle: Bundle, made: Design, compress: tuple[CompressTable, ...], out: Path, progress: Progress) -> Bundle:
    progress(f"making the {out.name} artefact to compare with")
    recipe = replace(made.recipe, name=f"{made.recipe.name} ({out.name})", compress=compress)
    with BundleWriter(out) as writer:
        export(design(recipe), writer, twin=bundle)
        return writer.commit()


def _row(arm: Arm, timings: Sequence[Timing], footprint: Footprint, workload: Workload) -> dict[str, Any]:
    spec, plan, dtype = arm.bundle.spec, arm.plan, arm.bundle.recipe.export.dtype
    full = TokenPlan.uncompressed(spec)
    text = workload.text_tokens
    return {
        "engine": arm.engine,
        "runtime": load_backend(arm.engine).runtime or arm.engine,
        "dtype": dtype,
        "method": arm.method,
        "compressed": plan != full,
        "is_control": arm.is_control,
        "mean_vision_tokens": plan.mean_vision_tokens,
        "ttft_ms": _spread([timing.ttft_ms for timing in timings]),
        "vision_ms": _median([timing.vision_ms for timing in timings]),
        "prefill_ms": _median([timing.prefill_ms for timing in timings]),
        "prefill_ms_spread": _spread([timing.prefill_ms for timing in timings]),
        "decode_ms_per_token": _median([timing.decode_ms_per_token for timing in timings]),
        "kv_bytes": footprint.kv_bytes,
        "kv_bytes_planned": kv_cache_bytes(
            spec, plan, text_tokens=text + workload.new_tokens, num_images=1, dtype=dtype
        ),
        "peak_rss_bytes": footprint.peak_rss_bytes,
        "device_bytes": footprint.device_bytes,
        "baseline_rss_bytes": footprint.baseline_rss_bytes,
        "predicted_prefill": prefill_flops(spec, full, text) / prefill_flops(spec, plan, text),
    }


def _method_costs(
    bundle: Bundle, rows: Sequence[Mapping[str, Any]], threads: int | None, repeats: int
) -> tuple[dict[str, Any], ...]:
    """Return what each method that works on image features costs, beside the prefill that it shortens."""
    contents, prefill_ms = method_contents(bundle), _of(rows, FULL)["prefill_ms"]
    measured = measure_methods(bundle, threads=threads, repeats=repeats) if contents else {}
    return tuple(
        {
            "method": name,
            **contents[name],
            "ms": _spread(runs),
            "of_full_prefill": _median(runs) / prefill_ms,
        }
        for name, runs in measured.items()
    )


def _method_bars(methods: Sequence[Mapping[str, Any]]) -> list[Bar]:
    return [
        Bar(
            name=f"{entry['method']}_of_full_prefill",
            meaning=f"time of {entry['method']} over the prefill of all tokens",
            value=entry["of_full_prefill"],
            bar=0.02,
            is_upper=True,
        )
        for entry in methods
    ]


def _speedup(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compare the compressed engine with the same engine on all tokens."""
    before, after = _of(rows, FULL), _measured(rows)
    predicted = after["predicted_prefill"]
    prefill = before["prefill_ms"] / after["prefill_ms"]
    return {
        "ttft": before["ttft_ms"]["median"] / after["ttft_ms"]["median"],
        "prefill": prefill,
        "predicted_prefill": predicted,
        "prefill_of_predicted": prefill / predicted,
        "decode": before["decode_ms_per_token"] / after["decode_ms_per_token"],
    }


def _bars(rows: Sequence[Mapping[str, Any]], speedup: Mapping[str, float], engine: str) -> tuple[Bar, ...]:
    baseline, full, measured = rows[0], _of(rows, FULL), _measured(rows)
    wrong_kv = sum(abs(row["kv_bytes"] - row["kv_bytes_planned"]) for row in rows)
    bars = [
        Bar(
            name="kv_bytes_off_plan",
            meaning="bytes of cache allocated beyond or below the plan, all rows",
            value=wrong_kv,
            bar=0,
            is_upper=True,
        )
    ]
    if measured is not full:
        bars.append(
            Bar(
                name="prefill_of_predicted",
                meaning=f"prefill speed-up of {engine} over the plan's prediction",
                value=speedup["prefill_of_predicted"],
                bar=0.92,
            )
        )
    ratios = (
        ("prefill_ms", "full_prefill_of_transformers", 1.0),
        ("decode_ms_per_token", "full_decode_of_transformers", 0.6),
    )
    for key, name, bar in ratios:
        bars.append(
            Bar(
                name=name,
                meaning=f"{key} of {engine} over that of transformers, all tokens",
                value=full[key] / baseline[key],
                bar=bar,
                is_upper=True,
            )
        )
    return tuple(bars)


def _of(rows: Sequence[Mapping[str, Any]], method: str) -> Mapping[str, Any]:
    """Return the row of the engine (which stands behind the baseline) with a method."""
    return next(row for row in rows[1:] if row["method"] == method)


def _measured(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the row of the artefact in its engine, the last that is no control."""
    return [row for row in rows if not row["is_control"]][-1]


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def _spread(values: Sequence[float]) -> dict[str, float]:
    p10, median, p90 = np.percentile(values, (10, 50, 90))
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"{name} {value} must be at least {least}")
