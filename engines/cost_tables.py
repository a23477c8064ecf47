"""What an artefact takes and how long it must at least run, as tables for a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Column, Table

from tokexport.engines.cost_text import (
    foretold_remark,
    foretold_rows,
    machine_text,
    memory_terms,
    milliseconds_text,
    profile_remark,
    profile_rows,
)
from tokexport.engines.tables import new_table
from tokexport.exporter.footprint import GPU_DTYPE


def size_tables(report: Mapping[str, Any]) -> list[Table]:
    """Return bytes on disk and in memory, and the least times where a machine was given."""
    tables = [_disk_table(report["disk_bytes"]), _memory_table(report)]
    if "time_bound" in report:
        tables.append(_bound_table(report["time_bound"]))
    return tables


def foretold_table(bench: Mapping[str, Any]) -> Table:
    """Return what the plan foretold beside what was measured."""
    table = new_table(
        *_columns("foretold and measured", "foretold", "measured", "off by"), title=foretold_remark(bench)
    )
    for row in foretold_rows(bench):
        table.add_row(*row)
    return table


def profile_tables(bench: Mapping[str, Any]) -> list[RenderableType]:
    """Return where the time goes, nothing where it was not profiled."""
    rows = list(profile_rows(bench))
    if not rows:
        return []
    names = [Column("phase"), Column("operator")]
    title = "where the time goes, mean of the runs"
    table = new_table(*names, *_columns("", "count", "time", "share")[1:], title=title)
    last = ""
    for phase, *cells in rows:
        table.add_row("" if phase == last else phase, *cells)
        last = phase
    return [table, profile_remark(bench)]


def _disk_table(disk: Mapping[str, Any]) -> Table:
    table = new_table(*_columns("graph", "stored in", "weights", "graph"), title="the artefact on disk, in MB")
    for name, graph in disk["graphs"].items():
        table.add_row(name, graph["precision"], _mega(graph["weights"]), _mega(graph["graph"]))
    table.add_row("other files", "", "", _mega(disk["other_files"]))
    table.add_row("all", "", _mega(disk["total"]), "")
    return table


def _memory_table(report: Mapping[str, Any]) -> Table:
    memory, room = report["memory_bytes"], report["memory_bytes"]["room"]
    where = "a GPU" if report["dtype"] == GPU_DTYPE else "ONNX Runtime on the CPU"
    title = (
        f"most memory of a run in {where}, in MB; room for {room['max_text_tokens']} text tokens and "
        f"{room['max_images']} images"
    )
    table = new_table(*_columns("", "full", "compressed"), title=title)
    for key, name in {**memory_terms(), "total": "all"}.items():
        table.add_row(name, _mega(memory["full"][key]), _mega(memory["compressed"][key]))
    return table


def _bound_table(bound: Mapping[str, Any]) -> Table:
    table = new_table(*_columns("", "full", "compressed"), title=f"least time, at {machine_text(bound['machine'])}")
    for key, name in (("prefill_ms", "prefill (decoder)"), ("decode_ms_per_token", "decode, per token")):
        table.add_row(name, *(milliseconds_text(bound[key][plan]) for plan in ("full", "compressed")))
    return table


def _columns(first: str, *others: str) -> list[Column]:
    return [Column(first), *(Column(name, justify="right") for name in others)]


def _mega(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f}"
