"""The report of an artefact for people: Markdown, and one HTML file that needs nothing beside itself.

``_contents`` reads the JSON documents, the templates lay out what it found. What was not measured or
not checked is said to be so, and a method that loses to its control is named at the top.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from tokexport.engines import accuracy_text, cost_text, loyalty_text
from tokexport.engines.compare import difference_of
from tokexport.engines.mixing import made_image
from tokexport.engines.pages import (
    DASH,
    Plot,
    change_text,
    count_text,
    escape_markdown,
    flops_text,
    ms_text,
    number_text,
    page_environment,
    setting_rows,
    size_text,
    times_text,
    typeset,
)
from tokexport.engines.report_plots import GainBar, LayerRun, TimeBar, draw_gains, draw_mixing, draw_times, draw_tokens
from tokexport.engines.reselection import RESELECTION, RESELECTION_COLUMNS, reselection_rows
from tokexport.errors import BundleError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.plan import full_vision_tokens


@dataclass(frozen=True, kw_only=True)
class ReportDocuments:
    """The JSON documents of an artefact, each None where it was not made; ``name`` is the recipe's."""

    name: str
    plan: Mapping[str, Any]
    verify: Mapping[str, Any] | None
    bench: Mapping[str, Any] | None
    accuracy: Mapping[str, Any] | None = None
    mixing: Mapping[str, Any] | None = None
    loyalty: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Headline:
    """One figure at the top; ``tone`` is ``good``, ``bad``, ``absent`` or ``plain``."""

    label: str
    value: str
    detail: str
    tone: str = "plain"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One measured row of the bench; times in ms, gains against all tokens in the same setting.

    A setting is a runtime and a dtype; two engines may share one, as those of PyTorch do.
    """

    setting: str
    engine: str
    method: str
    compressed: bool
    is_control: bool
    ttft: float
    ttft_range: tuple[float, float]
    vision: float
    prefill: float
    decode: float
    kv_bytes: int
    kv_bytes_planned: int | None
    peak_rss_bytes: int
    tokens: float | None
    predicted: float | None
    ttft_gain: float | None = None
    prefill_gain: float | None = None
    remark: str = ""

    @property
    def label(self) -> str:
        return f"{self.engine} {self.method}"

    @property
    def is_method(self) -> bool:
        return self.compressed and not self.is_control


def render_markdown(documents: ReportDocuments) -> str:
    """Return the report as GitHub-flavoured Markdown."""
    # Names and notes come from outside: nothing in them may become a tag, a link or a table border.
    environment = page_environment(finalize=escape_markdown)
    return environment.get_template("report.md.j2").render(_contents(documents))


def render_html(documents: ReportDocuments) -> str:
    """Return the report as one HTML page without scripts or anything fetched from elsewhere."""
    contents = _contents(documents)
    plots = _plots(documents.plan, contents["runs"], contents["arms"])
    mixing = _mixing_plot(documents.mixing) if documents.mixing else None
    return page_environment(autoescape=True).get_template("report.html.j2").render(contents, plots=plots, mixing=mixing)


def write_reports(bundle: Bundle) -> tuple[Path, Path]:
    """Write ``reports/report.md`` and ``reports/report.html`` from the JSON reports of an artefact.

    Raises:
        BundleError: the artefact has no ``plan.json``, or the reports cannot be written.
    """
    plan = bundle.read_report("plan.json")
    if plan is None:
        raise BundleError(f"{bundle.path} has no reports/plan.json to report on; build the artefact again")
    documents = ReportDocuments(
        name=bundle.recipe.name,
        plan=plan,
        verify=bundle.read_report("verify.json"),
        bench=bundle.read_report("bench.json"),
        accuracy=bundle.read_report("eval.json"),
        mixing=bundle.read_report("mixing.json"),
        loyalty=bundle.read_report("loyalty.json"),
    )
    markdown = bundle.write_report("report.md", render_markdown(documents))
    return markdown, bundle.write_report("report.html", render_html(documents))


def _contents(documents: ReportDocuments) -> dict[str, Any]:
    """Return what the templates lay out, by the names that they use."""
    plan, verify, bench, accuracy = documents.plan, documents.verify, documents.bench, documents.accuracy
    full, per_layer = full_vision_tokens(plan), plan["vision_tokens"]["per_layer"]
    mean = sum(per_layer) / len(per_layer)
    arms = _arms(bench) if bench else ()
    gates = [{"meaning": "", "bound": _bound(gate)} | gate for gate in bench.get("gates", ())] if bench else []
    return {
        "name": documents.name,
        "checkpoint": str(plan.get("checkpoint", DASH)),
        "dtype": str(plan.get("dtype", DASH)),
        "kept": f"{full} -> {count_text(mean)} tokens per layer ({100 * mean / full:.3g} %)",
        "kept_share": mean / full,
        "headlines": [
            *_planned_headlines(plan),
            _speed_headline(plan, bench, arms),
            *_accuracy_headline(accuracy),
            *_loyalty_headline(documents.loyalty),
            _parity_headline(verify),
        ],
        "findings": list(_findings(verify, arms, gates)),
        "costs": list(_costs(plan)),
        "runs": list(_runs(per_layer)),
        "arms": arms,
        "pairs": list(_pairs(arms)),
        "gates": gates,
        "foretold": list(cost_text.foretold_rows(bench)) if bench else [],
        "foretold_remark": cost_text.foretold_remark(bench) if bench else "",
        "profile": list(cost_text.profile_rows(bench)) if bench else [],
        "profile_remark": cost_text.profile_remark(bench) if bench else "",
        "answered": list(accuracy_text.figure_rows(accuracy)) if accuracy else [],
        "accuracy_remarks": list(accuracy_text.remarks(accuracy)) if accuracy else [],
        "reselected": list(reselection_rows(reselect)) if (reselect := (accuracy or {}).get("reselect")) else [],
        "reselection": RESELECTION,
        "reselection_columns": RESELECTION_COLUMNS,
        "loyalty_columns": loyalty_text.COLUMNS,
        "loyal": list(loyalty_text.loyalty_rows(documents.loyalty)) if documents.loyalty else [],
        "loyalty_remarks": list(loyalty_text.loyalty_remarks(documents.loyalty)) if documents.loyalty else [],
        "ladder": _ladder(verify) if verify else {},
        "environment": _surroundings(documents),
    }


def _planned_headlines(plan: Mapping[str, Any]) -> Iterable[Headline]:
    prompt = plan.get("prompt_tokens", {})
    text = f" with {prompt['text']} text tokens" if "text" in prompt else ""
    for label, key, scale in (("Prefill FLOPs", "flops", flops_text), ("KV cache", "kv_bytes", size_text)):
        sizes = plan[key]
        detail = f"{scale(sizes['full'])} -> {scale(sizes['compressed'])}{text}"
        yield Headline(label=label, value=change_text(sizes["reduction"]), detail=detail)


def _speed_headline(plan: Mapping[str, Any], bench: Mapping[str, Any] | None, arms: Iterable[Arm]) -> Headline:
    label = "First token, speed-up"
    if bench is None:
        predicted = plan.get("predicted_prefill_speedup")
        detail = f"prefill predicted {times_text(predicted)}; measure it with tokexport bench"
        return Headline(label=label, value="not measured", detail=detail, tone="absent")
    gains = bench["speedup"]
    gain = gains["ttft"]
    detail = f"prefill {times_text(gains['prefill'])} measured, {times_text(gains['predicted_prefill'])} predicted"
    tone = "plain" if any(arm.remark for arm in arms) else "good"
    if gain is None or gain < 1:
        tone = "bad"
    return Headline(label=label, value=times_text(gain), detail=detail, tone=tone)


def _parity_headline(verify: Mapping[str, Any] | None) -> Headline:
    if verify is None:
        return Headline(label="Parity", value="not checked", detail="check it with tokexport verify", tone="absent")
    checks = verify["checks"]
    good = sum(bool(check["passed"]) for check in checks)
    detail = f"{good} of {len(checks)} checks within tolerance"
    word, tone = ("passed", "good") if verify["passed"] else ("failed", "bad")
    return Headline(label="Parity", value=word, detail=detail, tone=tone)


def _accuracy_headline(accuracy: Mapping[str, Any] | None) -> Iterable[Headline]:
    if accuracy is not None:
        value, detail = accuracy_text.headline(accuracy)
        yield Headline(label="Accuracy", value=value, detail=detail)


def _loyalty_headline(loyalty: Mapping[str, Any] | None) -> Iterable[Headline]:
    if loyalty is not None:
        value, detail = loyalty_text.loyalty_headline(loyalty)
        yield Headline(label="Loyalty", value=value, detail=detail)


def _findings(
    verify: Mapping[str, Any] | None, arms: Iterable[Arm], gates: Iterable[Mapping[str, Any]]
) -> Iterable[str]:
    """Say what a reader must not miss: what failed, and what did not pay."""
    if verify is not None and not verify["passed"]:
        failed = [check["name"] for check in verify["checks"] if not check["passed"]]
        names = "; ".join(failed) or "no check says why"
        yield f"Parity failed: {names}. The artefact does not compute what the reference computes."
    for gate in gates:
        if not gate["passed"]:
            yield f"Gate {gate['name']} missed: {number_text(gate['value'])}, wanted {gate['bound']}."
    yield from (f"{arm.label} is {arm.remark}." for arm in arms if arm.is_method and arm.remark)


def _costs(plan: Mapping[str, Any]) -> Iterable[tuple[str, str, str, str]]:
    """Yield the name of each size, with all tokens, compressed, and the change."""
    rows: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
        ("Tokens entering the language model", "prompt_tokens", count_text),
        ("Prefill FLOPs", "flops", flops_text),
        ("KV cache", "kv_bytes", size_text),
        ("KV cache, vision part", "kv_bytes_vision", size_text),
    )
    for name, key, scale in rows:
        if sizes := plan.get(key):
            full, compressed = sizes["full"], sizes["compressed"]
            yield name, scale(full), scale(compressed), change_text(1 - compressed / full if full else 0.0)


def _runs(per_layer: Iterable[int]) -> Iterable[LayerRun]:
    first = 0
    for tokens, layers in groupby(per_layer):
        count = len(list(layers))
        yield LayerRun(first=first, last=first + count - 1, tokens=tokens)
        first += count


def _arms(bench: Mapping[str, Any]) -> tuple[Arm, ...]:
    rows = bench["rows"]
    shows_dtype = len({row["dtype"] for row in rows}) > 1
    arms = [_arm(row, bench["speedup"], shows_dtype=shows_dtype) for row in rows]
    return tuple(_judged(arm, arms) for arm in arms)


def _arm(row: Mapping[str, Any], speedup: Mapping[str, Any], *, shows_dtype: bool) -> Arm:
    is_control = row.get("is_control", False)
    shown = f" {row['dtype']}" if shows_dtype else ""
    planned = speedup["predicted_prefill"] if row["compressed"] and not is_control else None
    ttft = row["ttft_ms"]
    return Arm(
        setting=row.get("runtime", row["engine"]) + shown,
        engine=row["engine"] + shown,
        method=row.get("method") or ("compressed" if row["compressed"] else "full"),
        compressed=row["compressed"],
        is_control=is_control,
        ttft=ttft["median"],
        ttft_range=(ttft["p10"], ttft["p90"]),
        vision=row["vision_ms"],
        prefill=row["prefill_ms"],
        decode=row["decode_ms_per_token"],
        kv_bytes=row["kv_bytes"],
        kv_bytes_planned=row.get("kv_bytes_planned"),
        peak_rss_bytes=row["peak_rss_bytes"],
        tokens=row.get("mean_vision_tokens"),
        predicted=row.get("predicted_prefill", planned),
    )


def _judged(arm: Arm, arms: Iterable[Arm]) -> Arm:
    """Return the arm with its gains, and what a method owes to its baseline and its controls."""
    rivals = [other for other in arms if other.setting == arm.setting]
    full = next((other for other in rivals if not other.compressed and not other.is_control), None)
    if full is None or arm is full:
        return arm
    sooner = [rival for rival in rivals if rival.ttft < arm.ttft and (rival is full or rival.is_control)]
    remark = "; ".join(_loss(arm, rival) for rival in sooner) if arm.is_method else ""
    ttft_gain, prefill_gain = _ratio(full.ttft, arm.ttft), _ratio(full.prefill, arm.prefill)
    return replace(arm, ttft_gain=ttft_gain, prefill_gain=prefill_gain, remark=remark)


def _loss(arm: Arm, rival: Arm) -> str:
    name = f"its control {rival.method}" if rival.is_control else "all tokens"
    overlap = arm.ttft_range[0] <= rival.ttft_range[1] and rival.ttft_range[0] <= arm.ttft_range[1]
    noise = ", within the spread of the runs" if overlap else ""
    return f"slower than {name} by {100 * (arm.ttft / rival.ttft - 1):.1f} %{noise}"


def _pairs(arms: Sequence[Arm]) -> Iterable[tuple[str, Arm | None, Arm | None]]:
    """Yield the lines of the 2 x 2 table: engine, all tokens, compressed."""
    for setting in dict.fromkeys(arm.setting for arm in arms if not arm.is_control):
        mine = [arm for arm in arms if arm.setting == setting and not arm.is_control]
        full = next((arm for arm in mine if not arm.compressed), None)
        yield from ((setting, full, compressed) for compressed in [arm for arm in mine if arm.compressed] or [None])


def _bound(gate: Mapping[str, Any]) -> str:
    return f"{'at most' if gate.get('is_upper') else 'at least'} {number_text(gate['bar'])}"


def _ladder(verify: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the checks by step; ``used`` is the share of its tolerance that a check used up."""
    ladder: dict[str, list[dict[str, Any]]] = {}
    for check in verify["checks"]:
        off_by = difference_of(check)
        used = _ratio(off_by, check["tolerance"])
        row = {"mean_abs_diff": None, "norm_ratio": None, "note": "", "used": used, "off_by": off_by} | check
        ladder.setdefault(check.get("step") or "comparisons", []).append(row)
    return ladder


def _surroundings(documents: ReportDocuments) -> dict[str, list[tuple[str, str]]]:
    """Return what the numbers depend on: machine, library versions, workload, how parity was checked."""
    bench, verify = documents.bench or {}, documents.verify or {}
    machine = bench.get("environment", {})
    sections: dict[str, Mapping[str, Any]] = {
        "Machine": {key: value for key, value in machine.items() if key != "versions"},
        "Versions": machine.get("versions", {}),
        "Workload": bench.get("workload", {}),
        "Accuracy": accuracy_text.settings(documents.accuracy) if documents.accuracy else {},
        "Loyalty": loyalty_text.loyalty_settings(documents.loyalty) if documents.loyalty else {},
        "Parity": {key: verify[key] for key in ("backend", "dtype", "seconds") if key in verify},
    }
    return {title: setting_rows(rows) for title, rows in sections.items() if rows}


def _plots(plan: Mapping[str, Any], runs: Sequence[LayerRun], arms: Sequence[Arm]) -> list[Plot]:
    """Return the plots of the page: the first is of the plan, the others are of the bench."""
    plots = [_tokens_plot(runs, full_vision_tokens(plan))]
    if arms:
        plots.append(_time_plot(arms))
    if any(arm.prefill_gain for arm in arms):
        plots.append(_gain_plot(arms))
    return plots


def _tokens_plot(runs: Sequence[LayerRun], full: int) -> Plot:
    title = "Vision tokens entering each decoder layer"
    alt = "; ".join(f"layers {run.layers}: {run.tokens}" for run in runs)
    num_layers = runs[-1].last + 1
    mean = sum(run.tokens * (run.last + 1 - run.first) for run in runs) / num_layers
    return Plot(
        title=title,
        caption=f"On average {count_text(mean)} of {full} tokens in each of {num_layers} layers.",
        svg=draw_tokens(title, f"{title}, of {full} without compression. {alt}.", runs, full),
    )


def _time_plot(arms: Sequence[Arm]) -> Plot:
    title = "Where the time to the first token goes"
    alt = "; ".join(f"{arm.label}: vision {ms_text(arm.vision)} ms, prefill {ms_text(arm.prefill)} ms" for arm in arms)
    bars = [
        TimeBar(label=arm.label, text=f"{ms_text(arm.vision + arm.prefill)} ms", vision=arm.vision, prefill=arm.prefill)
        for arm in arms
    ]
    return Plot(
        title=title,
        caption="Vision encoder and prefill of one image and its prompt, median of the runs.",
        svg=draw_times(title, f"{title}. {alt}.", bars),
    )


def _gain_plot(arms: Sequence[Arm]) -> Plot:
    title = "Measured against predicted prefill speed-up"
    bars = [
        GainBar(
            label=arm.label,
            text=typeset(times_text(arm.prefill_gain)),
            measured=arm.prefill_gain,
            predicted=arm.predicted,
            is_control=arm.is_control,
        )
        for arm in arms
        if arm.prefill_gain
    ]
    alt = "; ".join(
        f"{bar.label}: measured {times_text(bar.measured)}, predicted {times_text(bar.predicted)}" for bar in bars
    )
    return Plot(
        title=title,
        caption="The prediction counts FLOPs only; the dashed line is no gain.",
        svg=draw_gains(title, f"{title}. {alt}.", bars),
    )


def _mixing_plot(mixing: Mapping[str, Any]) -> Plot:
    title = f"What {mixing['method']} mixes, on one image"
    rows, columns = mixing["grid"]
    shown = {f"token {row['row']} of {mixing['kept']}": row["weights"] for row in mixing["rows"]}
    pictures = {"all together": mixing["total"], **shown}
    alt = f"Which of {rows} x {columns} tokens go into {', '.join(pictures)}."
    return Plot(
        title=title,
        caption=(
            f"Darker is drawn from more. A token that stays is spread over {math.exp(mixing['entropy']):.3g} of the "
            f"{rows * columns} that arrive (the exponential of its rows' mean entropy)."
        ),
        svg=draw_mixing(title, f"{title}. {alt}", made_image(), (rows, columns), pictures),
    )


def _ratio(value: float | None, to: float | None) -> float | None:
    return value / to if value is not None and to else None
