"""Reports as tables for a terminal."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
from rich import box
from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from tokexport.engines.accuracy_text import figure_rows, remarks
from tokexport.engines.compare import difference_of
from tokexport.engines.loyalty_text import COLUMNS, loyalty_remarks, loyalty_rows
from tokexport.engines.method_cost import method_contents
from tokexport.engines.reselection import RESELECTION, RESELECTION_COLUMNS, reselection_rows
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.graph_io import GRAPHS, GraphName, TensorIO, node_scope, stage_name
from tokexport.exporter.plan import TokenPlan, full_vision_tokens, keep_text
from tokexport.recipes.tables import table_of


def new_table(*columns: str | Column, title: str = "", show_header: bool = True) -> Table:
    """Return an empty table in the one style that all of them have."""
    folded = (Column(name, overflow="fold") if isinstance(name, str) else name for name in columns)
    return Table(
        *folded, title=title, title_justify="left", show_header=show_header, box=box.SIMPLE_HEAD, pad_edge=False
    )


def plan_tables(report: Mapping[str, Any], plan: TokenPlan) -> list[Table]:
    """Return tokens by stretch of layers, and costs before and after."""
    tokens = new_table("layers", "vision tokens", title=f"{report['recipe']}: vision tokens of one image")
    full = full_vision_tokens(report)
    if plan.entering_llm != full:
        tokens.add_row("before layer 0", keep_text(full, plan.entering_llm))
    for group in plan.groups:
        if group.num_layers:
            last = group.first_layer + group.num_layers - 1
            tokens.add_row(f"{group.first_layer} to {last}", keep_text(full, group.vision_tokens))
    tokens.add_row("mean", keep_text(full, plan.mean_vision_tokens))
    text = report["prompt_tokens"]["text"]
    costs = new_table(
        "",
        "full",
        "compressed",
        "change",
        title=f"one image and {text} text tokens, batch 1, cache in {report['dtype']}",
    )
    for name, key, unit, scale in (
        ("prefill FLOPs (decoder)", "flops", "G", 1e9),
        ("KV cache", "kv_bytes", "MB", 1e6),
        ("KV cache, vision only", "kv_bytes_vision", "MB", 1e6),
    ):
        entry = report[key]
        costs.add_row(
            name,
            f"{entry['full'] / scale:,.1f} {unit}",
            f"{entry['compressed'] / scale:,.1f} {unit}",
            f"{-100 * entry['reduction']:+.1f} %" if entry["reduction"] else "none",
        )
    costs.add_row("predicted prefill speed-up", "", "", f"{report['predicted_prefill_speedup']:.2f} x")
    return [tokens, costs]


def engine_table(record: Mapping[str, Any]) -> Table:
    """Return what compiling made."""
    room = record["room"]
    title = (
        f"{record['backend']} {record['version']}, compute capability {record['capability']}, {record['dtype']}, "
        f"{record['attention']} attention, room for {room['max_text_tokens']} text tokens and "
        f"{room['max_images']} images"
    )
    table = new_table("engine", "fused attentions", "rotary", "cache updates", "size", "seconds", title=title)
    for name, engine in record["engines"].items():
        layers = engine["layers"]
        table.add_row(
            name,
            str(engine["fused_attentions"]),
            str(layers["ROTARY_EMBEDDING"]),
            str(layers["KV_CACHE_UPDATE"]),
            f"{engine['bytes'] / 1e6:,.1f} MB",
            f"{engine['seconds']:.1f}",
        )
    return table


def proposals_table(proposals: Sequence[Mapping[str, Any]]) -> Table:
    """Return schedules that meet a budget."""
    table = new_table("keeps KV", "keeps FLOPs", "drops", title="schedules of halvings that meet the budget")
    for proposal in proposals:
        table.add_row(f"{100 * proposal['kv']:.1f} %", f"{100 * proposal['flops']:.1f} %", proposal["toml"])
    return table


def verify_table(report: Mapping[str, Any]) -> Table:
    """Return the ladder, checks of one kind gathered into the worst of all layers and turns."""
    table = new_table("step", "check", "off by", "at most", "", title=f"parity, {report['dtype']}")
    last_step = ""
    for check in _gathered(report["checks"]):
        off_by = difference_of(check)
        found = "-" if off_by is None else f"{off_by:.2g}"
        verdict = Text("ok", "green") if check["passed"] else Text("failed", "red")
        note = f" ({check['note']})" if check["note"] else ""
        step = "" if check["step"] == last_step else check["step"]
        last_step = check["step"]
        table.add_row(step, check["name"], found, f"{check['tolerance']:.2g}", verdict.append(note))
    return table


def bench_tables(report: Mapping[str, Any]) -> list[RenderableType]:
    """Return the rows, and the figures with their bars."""
    workload = report["workload"]
    title = (
        f"1 image, {workload['text_tokens']} text tokens, {workload['new_tokens']} new, median of {workload['repeats']}"
    )
    names = [Column(name, no_wrap=True) for name in ("engine", "method")]
    numbers = ("tokens", "TTFT", "vision", "prefill", "decode", "KV", "RSS")
    rows = new_table(*names, *(Column(name, justify="right") for name in numbers), title=f"{title}; ms and MB")
    for row in report["rows"]:
        times = (row["ttft_ms"]["median"], row["vision_ms"], row["prefill_ms"])
        rows.add_row(
            row["engine"],
            row["method"] + (" (control)" if row["is_control"] else ""),
            f"{row['mean_vision_tokens']:.0f}",
            *(f"{time:.1f}" for time in times),
            f"{row['decode_ms_per_token']:.2f}",
            f"{row['kv_bytes'] / 1e6:.1f}",
            f"{row['peak_rss_bytes'] / 1e6:.0f}",
        )
    heading = f"prefill speed-up {_ratio(report)}"
    if not report["gates"]:
        return [rows, heading]
    figures = new_table("figure", "measured", "bar", "", title=heading)
    for gate in report["gates"]:
        sign = "at most" if gate["is_upper"] else "at least"
        verdict = Text("reached", "green") if gate["passed"] else Text("missed", "yellow")
        figures.add_row(gate["meaning"], f"{gate['value']:.3g}", f"{sign} {gate['bar']:g}", verdict)
    return [rows, figures]


def eval_tables(report: Mapping[str, Any]) -> list[RenderableType]:
    """Return the accuracy overall, by turn and by kind, and what compression changed."""
    title = f"{report['dialogues']:,} dialogues, {report['metric']} metric, {report['backend']}, {report['dtype']}"
    numbers = [Column(name, justify="right") for name in ("questions", "accuracy", "95 % interval")]
    table = new_table("", *numbers, title=title)
    for row in figure_rows(report):
        table.add_row(*row)
    tables: list[RenderableType] = [table, *remarks(report)]
    if reselect := report.get("reselect"):
        numbers = [Column(name, justify="right") for name in RESELECTION_COLUMNS]
        again = new_table("", *numbers, title=RESELECTION)
        for row in reselection_rows(reselect):
            again.add_row(*row)
        tables.append(again)
    return tables


def loyalty_tables(report: Mapping[str, Any]) -> list[RenderableType]:
    """Return how near an artefact stays to the uncompressed model, overall, by turn and by kind."""
    title = (
        f"loyalty, {report['dialogues']:,} dialogues, answers of at most {report['max_new_tokens']} tokens, "
        f"{report['backend']}, {report['dtype']}"
    )
    table = new_table("", *(Column(name, justify="right", overflow="fold") for name in COLUMNS), title=title)
    for row in loyalty_rows(report):
        table.add_row(*row)
    return [table, *loyalty_remarks(report)]


def _ratio(report: Mapping[str, Any]) -> str:
    prefill, predicted, ttft = (report["speedup"][key] for key in ("prefill", "predicted_prefill", "ttft"))
    return f"{prefill:.2f} x measured, {predicted:.2f} x predicted; TTFT {ttft:.2f} x"


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """Return what ``tokexport inspect --json`` prints."""
    manifest = bundle.manifest
    return {
        "path": str(bundle.path),
        "schema_version": manifest.schema_version,
        "versions": dict(manifest.versions),
        "model": vars(manifest.model),
        "recipe": manifest.recipe,
        "vision_tokens": {
            "emitted": bundle.plan.emitted,
            "entering_llm": bundle.plan.entering_llm,
            "per_layer": list(bundle.plan.per_layer),
        },
        "graphs": {graph: _describe_graph(bundle, graph) for graph in GRAPHS},
        "methods": _describe_methods(bundle),
        "files": table_of(manifest.files),
    }


def bundle_tables(bundle: Bundle, description: Mapping[str, Any]) -> list[Table]:
    """Return an artefact's model, graphs and files."""
    model, recipe = bundle.manifest.model, bundle.recipe
    what = new_table("", "", title=str(bundle.path), show_header=False)
    what.add_row("recipe", f"{recipe.name}: {recipe.description}")
    what.add_row(
        "checkpoint", f"{model.checkpoint} ({model.weights} weights, {model.num_parameters / 1e6:,.1f} M parameters)"
    )
    what.add_row("fingerprint", model.fingerprint)
    what.add_row("methods", ", ".join(step.method for step in recipe.compress) or "none")
    kept = keep_text(bundle.spec.num_vision_tokens, bundle.plan.mean_vision_tokens)
    what.add_row("vision tokens", f"{kept} per layer")
    quantized = f"; {recipe.quantize}" if recipe.quantize.is_active else ""
    what.add_row("precision", f"{recipe.export.dtype}{quantized}")
    what.add_row("made with", ", ".join(f"{name} {number}" for name, number in bundle.manifest.versions.items()))
    graphs = new_table("graph", "tensor", "dtype", "shape", title="inputs and outputs")
    for graph in GRAPHS:
        io = bundle.graph_io(graph)
        for arrow, tensors in (("->", io.inputs), ("<-", io.outputs)):
            for tensor in _without_repeats(tensors):
                graphs.add_row(graph, f"{arrow} {tensor.name}", tensor.dtype, " x ".join(map(str, tensor.shape)))
    sizes = new_table("graph", "nodes", "weights", "operators", title="contents")
    for graph in GRAPHS:
        entry = description["graphs"][graph]
        operators = ", ".join(f"{count} {name}" for name, count in entry["operators"].items())
        sizes.add_row(graph, str(entry["nodes"]), f"{entry['weight_bytes'] / 1e6:,.1f} MB", operators)
    tables = [what, graphs, sizes]
    if description["methods"]:
        methods = new_table("method", "nodes", "parameters", "FLOPs per image", "measured", title="on image features")
        for entry in description["methods"]:
            measured = f"{entry['ms']['median']:.3g} ms" if entry["ms"] else "tokexport bench measures it"
            methods.add_row(
                f"{entry['method']} ({entry['scope']})",
                str(entry["nodes"]),
                f"{entry['parameters']:,}",
                f"{entry['flops'] / 1e6:,.1f} M",
                measured,
            )
        tables.append(methods)
    return tables


def _describe_methods(bundle: Bundle) -> list[dict[str, Any]]:
    measured = {entry["method"]: entry["ms"] for entry in (bundle.read_report("bench.json") or {}).get("methods", [])}
    return [
        {"method": name, "scope": node_scope(stage_name(name)), **contents, "ms": measured.get(name)}
        for name, contents in method_contents(bundle).items()
    ]


def _describe_graph(bundle: Bundle, graph: GraphName) -> dict[str, Any]:
    path = bundle.graph_path(graph)
    nodes = Counter(node.op_type for node in ir.load(path).graph)
    return {
        "nodes": nodes.total(),
        "operators": dict(nodes.most_common()),
        "weight_bytes": path.with_name(f"{path.name}_data").stat().st_size,
        "io": table_of(bundle.manifest.graphs[graph]),
    }


def _without_repeats(tensors: Sequence[TensorIO]) -> list[TensorIO]:
    """Leave out all layers of the cache but the first."""
    return [
        tensor
        for tensor in tensors
        if not tensor.name.split(".")[0].startswith(("past_key", "present")) or ".0." in tensor.name
    ]


def _gathered(checks: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Gather checks that differ only in layer or turn into the worst of them; those that failed stand alone."""
    worst: dict[tuple[str, str], Mapping[str, Any]] = {}
    for number, check in enumerate(checks):
        kind = re.sub(r"\.\d+$|(, (layer|turn|image) \d+)+$", "", check["name"])
        key = (check["step"], kind if check["passed"] else f"{kind} {number}")
        before = worst.get(key)
        if before is None:
            worst[key] = check
        else:
            larger = max(check, before, key=lambda entry: difference_of(entry) or 0.0)
            worst[key] = {**larger, "name": f"{kind}, all", "note": check["note"] or before["note"]}
    return list(worst.values())
