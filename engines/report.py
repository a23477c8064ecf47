"""The report of an artefact for people: Markdown, and one HTML file that needs nothing beside itself.

``_contents`` reads the JSON documents, the templates lay out what it found. What was not measured or
not checked is said to be so, and a method that loses to its control is named at the top.
"""

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tokexport.errors import BundleError
from tokexport.exporter.bundle import Bundle

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DASH = "–"
_MAX_LABEL = 28
_MAX_LABELLED_RUNS = 12
# Placeholders that no drawing uses otherwise; the SVG gets the page's CSS colour of that name instead,
# so that one drawing reads well on light and on dark.
_COLOURS = {name: f"#01020{i}" for i, name in enumerate(("ink", "muted", "rule", "kept", "gone", "vision", "control"))}


@dataclass(frozen=True, kw_only=True)
class ReportDocuments:
    """The JSON documents of an artefact, each None where it was not made; ``name`` is the recipe's."""

    name: str
    plan: Mapping[str, Any]
    verify: Mapping[str, Any] | None
    bench: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Headline:
    """One figure at the top; ``tone`` is ``good``, ``bad`` or ``plain``."""

    label: str
    value: str
    detail: str
    tone: str = "plain"


@dataclass(frozen=True, kw_only=True)
class LayerRun:
    """Consecutive decoder layers with the same number of vision tokens; ``last`` is inclusive."""

    first: int
    last: int
    tokens: int

    @property
    def layers(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One measured row of the bench; times in ms, gains against all tokens on the same engine and dtype."""

    setting: str
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
        return f"{self.setting} {self.method}"

    @property
    def is_method(self) -> bool:
        return self.compressed and not self.is_control


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawing with its title and the line under it; what it shows in words is inside the SVG."""

    title: str
    caption: str
    svg: Markup


def render_markdown(documents: ReportDocuments) -> str:
    """Return the report as GitHub-flavoured Markdown."""
    # Names and notes come from outside: nothing in them may become a tag, a link or a table border.
    environment = _environment(finalize=_escape_markdown)
    return environment.get_template("report.md.j2").render(_contents(documents))


def render_html(documents: ReportDocuments) -> str:
    """Return the report as one HTML page without scripts or anything fetched from elsewhere."""
    contents = _contents(documents)
    plots = _plots(documents.plan, contents["runs"], contents["arms"])
    return _environment(autoescape=True).get_template("report.html.j2").render(contents, plots=plots)


def write_reports(bundle: Bundle) -> tuple[Path, Path]:
    """Write ``reports/report.md`` and ``reports/report.html`` from the JSON reports of an artefact.

    Raises:
        BundleError: the artefact has no ``plan.json``, or the reports cannot be written.
    """
    plan = bundle.read_report("plan.json")
    if plan is None:
        raise BundleError(f"{bundle.path} has no reports/plan.json, so there is nothing to report; build the artefact again")
    documents = ReportDocuments(
        name=bundle.recipe.name,
        plan=plan,
        verify=bundle.read_report("verify.json"),
        bench=bundle.read_report("bench.json"),
    )
    markdown = bundle.write_report("report.md", render_markdown(documents))
    return markdown, bundle.write_report("report.html", render_html(documents))


def _environment(**settings: Any) -> Environment:
    environment = Environment(
        loader=PackageLoader("tokexport.engines"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **settings,
    )
    environment.filters |= {"ms": _ms, "size": _size, "times": _times, "count": _count, "number": _number, "cosine": _cosine, "percent": _percent, "typeset": _typeset}
    return environment


def _contents(documents: ReportDocuments) -> dict[str, Any]:
    """Return what the templates lay out, by the names that they use."""
    plan, verify, bench = documents.plan, documents.verify, documents.bench
    emitted, per_layer = plan["vision_tokens"]["emitted"], plan["vision_tokens"]["per_layer"]
    mean = sum(per_layer) / len(per_layer)
    arms = _arms(bench) if bench else ()
    gates = bench.get("gates", ()) if bench else ()
    return {
        "name": documents.name,
        "checkpoint": str(plan.get("checkpoint", _DASH)),
        "dtype": str(plan.get("dtype", _DASH)),
        "kept": f"{emitted} -> {_count(mean)} tokens per layer ({100 * mean / emitted:.3g} %)",
        "kept_share": mean / emitted,
        "headlines": [*_planned_headlines(plan), _speed_headline(plan, bench, arms), _parity_headline(verify)],
        "findings": list(_findings(verify, arms, gates)),
        "costs": list(_costs(plan)),
        "runs": list(_runs(per_layer)),
        "arms": arms,
        "pairs": list(_pairs(arms)),
        "gates": gates,
        "ladder": _ladder(verify) if verify else {},
        "environment": _surroundings(documents),
    }


def _planned_headlines(plan: Mapping[str, Any]) -> Iterable[Headline]:
    prompt = plan.get("prompt_tokens", {})
    text = f" with {prompt['text']} text tokens" if "text" in prompt else ""
    for label, key, scale in (("Prefill FLOPs", "flops", _flops), ("KV cache", "kv_bytes", _size)):
        sizes = plan[key]
        detail = f"{scale(sizes['full'])} -> {scale(sizes['compressed'])}{text}"
        yield Headline(label=label, value=_change(sizes["reduction"]), detail=detail)


def _speed_headline(plan: Mapping[str, Any], bench: Mapping[str, Any] | None, arms: Iterable[Arm]) -> Headline:
    label = "First token, speed-up"
    if bench is None:
        predicted = plan.get("predicted_prefill_speedup")
        detail = f"prefill predicted {_times(predicted)}; measure it with tokexport bench"
        return Headline(label=label, value="not measured", detail=detail)
    gains = bench["speedup"]
    gain = gains["ttft"]
    pays = gain is not None and gain > 1 and not any(arm.remark for arm in arms)
    detail = f"prefill {_times(gains['prefill'])} measured, {_times(gains['predicted_prefill'])} predicted"
    return Headline(label=label, value=_times(gain), detail=detail, tone="good" if pays else "bad")


def _parity_headline(verify: Mapping[str, Any] | None) -> Headline:
    if verify is None:
        return Headline(label="Parity", value="not checked", detail="check it with tokexport verify")
    checks = verify["checks"]
    good = sum(bool(check["passed"]) for check in checks)
    detail = f"{good} of {len(checks)} checks within tolerance"
    word, tone = ("passed", "good") if verify["passed"] else ("failed", "bad")
    return Headline(label="Parity", value=word, detail=detail, tone=tone)


def _findings(verify: Mapping[str, Any] | None, arms: Sequence[Arm], gates: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """Say what a reader must not miss: what failed, and what did not pay."""
    if verify is not None and not verify["passed"]:
        failed = [check["name"] for check in verify["checks"] if not check["passed"]]
        yield f"Parity failed: {'; '.join(failed) or 'no check says why'}. The artefact does not compute what the reference computes."
    yield from (f"Gate {gate['name']} missed: {_number(gate['value'])}, the bar is {_number(gate['bar'])}." for gate in gates if not gate["passed"])
    yield from (f"{arm.label} is {arm.remark}." for arm in arms if arm.is_method and arm.remark)


def _costs(plan: Mapping[str, Any]) -> Iterable[tuple[str, str, str, str]]:
    """Yield the name of each size, with all tokens, compressed, and the change."""
    rows: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
        ("Tokens entering the language model", "prompt_tokens", _count),
        ("Prefill FLOPs", "flops", _flops),
        ("KV cache", "kv_bytes", _size),
        ("KV cache, vision part", "kv_bytes_vision", _size),
    )
    for name, key, scale in rows:
        if sizes := plan.get(key):
            full, compressed = sizes["full"], sizes["compressed"]
            yield name, scale(full), scale(compressed), _change(1 - compressed / full if full else 0.0)


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
    setting = f"{row['engine']} {row['dtype']}" if shows_dtype else row["engine"]
    planned = speedup["predicted_prefill"] if row["compressed"] and not is_control else None
    ttft = row["ttft_ms"]
    return Arm(
        setting=setting,
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
    gain = _ratio(full.ttft, arm.ttft)
    losses = [_loss(arm, full, "all tokens")] if arm.ttft > full.ttft else []
    losses += [_loss(arm, rival, f"its control {rival.method}") for rival in rivals if rival.is_control and rival.ttft < arm.ttft]
    remark = "; ".join(losses) if arm.is_method else ""
    return replace(arm, ttft_gain=gain, prefill_gain=_ratio(full.prefill, arm.prefill), remark=remark)


def _loss(arm: Arm, rival: Arm, name: str) -> str:
    overlap = arm.ttft_range[0] <= rival.ttft_range[1] and rival.ttft_range[0] <= arm.ttft_range[1]
    noise = ", within the spread of the runs" if overlap else ""
    return f"slower than {name} by {100 * (arm.ttft / rival.ttft - 1):.1f} %{noise}"


def _pairs(arms: Sequence[Arm]) -> Iterable[tuple[str, Arm | None, Arm | None]]:
    """Yield the lines of the 2 x 2 table: engine, all tokens, compressed."""
    for setting in dict.fromkeys(arm.setting for arm in arms if not arm.is_control):
        mine = [arm for arm in arms if arm.setting == setting and not arm.is_control]
        full = next((arm for arm in mine if not arm.compressed), None)
        yield from ((setting, full, compressed) for compressed in [arm for arm in mine if arm.compressed] or [None])


def _ladder(verify: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the checks by step; ``used`` is the share of its tolerance that a check used up."""
    ladder: dict[str, list[dict[str, Any]]] = {}
    for check in verify["checks"]:
        used = _ratio(check["max_abs_diff"], check["tolerance"])
        row = {"mean_abs_diff": None, "norm_ratio": None, "note": "", "used": used} | check
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
        "Parity": {key: verify[key] for key in ("backend", "dtype", "seconds") if key in verify},
    }
    return {title: [(key.replace("_", " "), _text(value)) for key, value in rows.items()] for title, rows in sections.items() if rows}


def _plots(plan: Mapping[str, Any], runs: Sequence[LayerRun], arms: Sequence[Arm]) -> dict[str, Plot]:
    plots = {"tokens": _tokens_plot(plan["vision_tokens"], runs)}
    if arms:
        plots["time"] = _time_plot(arms)
    if gained := [arm for arm in arms if arm.prefill_gain is not None]:
        plots["gain"] = _gain_plot(gained)
    return plots


def _tokens_plot(tokens: Mapping[str, Any], runs: Sequence[LayerRun]) -> Plot:
    per_layer, emitted = tokens["per_layer"], tokens["emitted"]

    def paint(axes: "Axes") -> None:
        layers = range(len(per_layer))
        axes.bar(layers, [emitted] * len(per_layer), width=0.82, color=_COLOURS["gone"], label=f"all tokens ({emitted})")
        axes.bar(layers, per_layer, width=0.82, color=_COLOURS["kept"], label="kept")
        for run in runs if len(runs) <= _MAX_LABELLED_RUNS else ():
            axes.text((run.first + run.last) / 2, run.tokens + 0.02 * emitted, str(run.tokens), ha="center", weight="bold")
        axes.set_xlim(-0.6, len(per_layer) - 0.4)
        axes.set_ylim(0, 1.15 * emitted)
        axes.set_xlabel("decoder layer, counted from 0")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y")

    alt = "; ".join(f"layers {run.layers}: {run.tokens}" for run in runs)
    title = "Vision tokens entering each decoder layer"
    svg = _draw(title, f"{title}, of {emitted} without compression. {alt}.", (12.6, 3.0), paint)
    caption = f"On average {_count(sum(per_layer) / len(per_layer))} of {emitted} tokens in each of {len(per_layer)} layers."
    return Plot(title=title, caption=caption, svg=svg)


def _time_plot(arms: Sequence[Arm]) -> Plot:
    def paint(axes: "Axes") -> None:
        vision, prefill = [arm.vision for arm in arms], [arm.prefill for arm in arms]
        axes.barh(range(len(arms)), vision, height=0.62, color=_COLOURS["vision"], label="vision and projector")
        axes.barh(range(len(arms)), prefill, height=0.62, left=vision, color=_COLOURS["kept"], label="prefill")
        for row, arm in enumerate(arms):
            _label_bar(axes, row, arm.vision + arm.prefill, f"{_ms(arm.vision + arm.prefill)} ms")
        _label_rows(axes, arms, "ms, shorter is better")

    title = "Where the time to the first token goes"
    alt = "; ".join(f"{arm.label}: vision {_ms(arm.vision)} ms, prefill {_ms(arm.prefill)} ms" for arm in arms)
    caption = "Vision encoder and prefill of one image and its prompt, median of the runs."
    return Plot(title=title, caption=caption, svg=_draw(title, f"{title}. {alt}.", _bar_size(arms), paint))


def _gain_plot(arms: Sequence[Arm]) -> Plot:
    def paint(axes: "Axes") -> None:
        gains = [arm.prefill_gain or 0.0 for arm in arms]
        for is_control, colour, label in ((False, "kept", "measured"), (True, "control", "measured, control")):
            if rows := [row for row, arm in enumerate(arms) if arm.is_control == is_control]:
                axes.barh(rows, [gains[row] for row in rows], height=0.62, color=_COLOURS[colour], label=label)
        if rows := [row for row, arm in enumerate(arms) if arm.predicted is not None]:
            predicted = [arm.predicted for arm in arms if arm.predicted is not None]
            axes.scatter(predicted, rows, 50, marker="D", color=_COLOURS["vision"], edgecolors=_COLOURS["ink"], label="predicted", zorder=3)
        for row, arm in enumerate(arms):
            _label_bar(axes, row, max(gains[row], arm.predicted or 0.0), _times(gains[row]))
        axes.axvline(1.0, color=_COLOURS["muted"], linewidth=1.0, linestyle=(0, (4, 3)))
        _label_rows(axes, arms, "prefill speed-up over all tokens on the same engine")

    title = "Measured against predicted prefill speed-up"
    alt = "; ".join(f"{arm.label}: measured {_times(arm.prefill_gain)}, predicted {_times(arm.predicted)}" for arm in arms)
    caption = "The prediction counts FLOPs only; the dashed line is no gain."
    return Plot(title=title, caption=caption, svg=_draw(title, f"{title}. {alt}.", _bar_size(arms), paint))


def _bar_size(arms: Sequence[Arm]) -> tuple[float, float]:
    return 6.2, 1.2 + 0.38 * len(arms)


def _label_bar(axes: "Axes", row: int, end: float, text: str) -> None:
    axes.annotate(_typeset(text), (end, row), xytext=(8, 0), textcoords="offset points", va="center")


def _label_rows(axes: "Axes", arms: Sequence[Arm], unit: str) -> None:
    labels = [arm.label if len(arm.label) <= _MAX_LABEL else f"{arm.label[: _MAX_LABEL - 1]}…" for arm in arms]
    axes.set_yticks(range(len(arms)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    axes.set_xlabel(unit)
    axes.grid(axis="x")


def _draw(title: str, alt: str, size: tuple[float, float], paint: Callable[["Axes"], None]) -> Markup:
    """Paint into one pair of axes and return it as SVG that can stand in an HTML page."""
    # Imported here: it takes half a second that the rest of the program need not wait for.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "text.parse_math": False,
        "axes.axisbelow": True,
        "text.color": _COLOURS["ink"],
        "axes.labelcolor": _COLOURS["muted"],
        "xtick.color": _COLOURS["muted"],
        "ytick.color": _COLOURS["ink"],
        "grid.color": _COLOURS["rule"],
        "font.size": 10.5,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        paint(axes)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0.2, handlelength=1.0, columnspacing=1.4)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inlined(buffer.getvalue(), title, alt)


def _inlined(svg: str, title: str, alt: str) -> Markup:
    """Return a drawing without what belongs to a file: prolog, namespaces, styles for the whole page, common ids."""
    drawing = svg[svg.index("<svg") :]
    drawing = re.sub(r"<style.*?</style>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing).replace("xlink:href=", "href=")
    for name, colour in _COLOURS.items():
        drawing = drawing.replace(colour, f"var(--{name})")
    view_box = re.search(r'viewBox="[^"]*"', drawing)
    assert view_box is not None
    head = Markup('<svg {} role="img" aria-label="{}"><title>{}</title>').format(Markup(view_box.group()), alt, title)
    # matplotlib escaped every label that it wrote.
    return head + Markup(drawing[drawing.index(">") + 1 :].strip())


def _ratio(value: float | None, to: float | None) -> float | None:
    return value / to if value is not None and to else None


def _ms(value: float | None) -> str:
    if value is None:
        return _DASH
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(num_bytes: float | None) -> str:
    if num_bytes is None:
        return _DASH
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _flops(value: float) -> str:
    return f"{value / 1e12:.3g} TFLOP" if value >= 1e12 else f"{value / 1e9:.3g} GFLOP"


def _percent(share: float | None) -> str:
    if share is None:
        return _DASH
    return f"{100 * share:,.0f} %" if share >= 1 else f"{100 * share:.3g} %"


def _times(value: float | None) -> str:
    return _DASH if value is None else f"{value:.2f}x"


def _change(reduction: float) -> str:
    return "0 %" if abs(reduction) < 5e-4 else f"{-100 * reduction:+.1f} %"


def _count(value: float | None) -> str:
    return _DASH if value is None else f"{value:.1f}".removesuffix(".0")


def _number(value: float | None) -> str:
    if value is None:
        return _DASH
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def _cosine(value: float | None) -> str:
    return _DASH if value is None else f"{value:.7f}"


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, (list, tuple)) else str(value)


def _escape_markdown(value: object) -> object:
    return re.sub(r"([\\`*\[\]<|])", r"\\\1", " ".join(value.splitlines())) if isinstance(value, str) else value


def _typeset(text: str) -> str:
    """Give formatted figures their typographic signs and keep a figure and its unit on one line."""
    text = re.sub(r"(\d)x(?!\w)", "\\1\N{MULTIPLICATION SIGN}", text.replace("->", "\N{RIGHTWARDS ARROW}"))
    text = re.sub(r"(?<!\S)-(?=\d)", "\N{MINUS SIGN}", text)
    return re.sub(r"(?<=[\d×]) (?=%|ms\b|[KMGT]B\b|[GT]FLOP\b)", "\N{NO-BREAK SPACE}", text)
