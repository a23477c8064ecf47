"""How near the plan came: what it foretells of the disk, the memory and the time, beside what was measured."""

from collections.abc import Mapping
from typing import Any

import torch

from tokexport.engines.backend import load_backend
from tokexport.engines.machine import machine_of
from tokexport.engines.worker import Workload
from tokexport.exporter.bundle import MANIFEST, Bundle
from tokexport.exporter.export import Design
from tokexport.exporter.footprint import Footprint, Room
from tokexport.exporter.plan import kv_cache_bytes, prefill_flops
from tokexport.exporter.time_bound import Machine, decode_bound_ms, prefill_bound_ms


def foretold_and_measured(
    bundle: Bundle, made: Design, row: Mapping[str, Any], workload: Workload, *, threads: int | None
) -> dict[str, Any]:
    """Return what ``tokexport bench --json`` prints under ``foretold``.

    Args:
        bundle: the artefact.
        made: the design that it was made from.
        row: the row of the table that measured it in its engine.
        workload: that was measured.
        threads: that computed.

    Returns:
        ``figures``, each with what was foretold (for times the least), what was measured and the ratio of the two, and
        the ``machine`` that the times are foretold from. Memory and times are foretold for ONNX Runtime on the CPU
        alone; with another engine they are missing and ``machine`` is None.
    """
    with torch.device("meta"):
        footprint = made.footprint(made.modules())
    figures = [_figure("disk_bytes", footprint.disk_bytes, _bytes_on_disk(bundle))]
    machine = None
    if load_backend(row["engine"]).is_foretold:
        figures.append(_peak(footprint, made, row, workload))
        weight_bytes = footprint.graphs["decoder_model_merged"].weights
        machine = machine_of(made, weight_bytes=weight_bytes, threads=threads)
        figures += _times(footprint, made, row, workload, machine)
    return {"figures": figures, "machine": None if machine is None else dict(vars(machine))}


def _bytes_on_disk(bundle: Bundle) -> int:
    """Return the bytes of an artefact without its reports."""
    return sum(file.bytes for file in bundle.manifest.files.values()) + (bundle.path / MANIFEST).stat().st_size


def _peak(footprint: Footprint, made: Design, row: Mapping[str, Any], workload: Workload) -> dict[str, Any]:
    room = Room(
        max_text_tokens=workload.text_tokens + workload.new_tokens,
        max_images=1,
        prompt_text_tokens=workload.text_tokens,
    )
    memory = footprint.memory(
        made.model.spec,
        made.plan,
        room,
        dtype=made.recipe.export.dtype,
        interpreter=row["baseline_rss_bytes"],
    )
    return {**_figure("peak_rss_bytes", memory.total, row["peak_rss_bytes"]), "terms": memory.table()}


def _times(
    footprint: Footprint, made: Design, row: Mapping[str, Any], workload: Workload, machine: Machine
) -> list[dict[str, Any]]:
    spec, plan, text = made.model.spec, made.plan, workload.text_tokens
    weights = footprint.graphs["decoder_model_merged"].weights
    cache = kv_cache_bytes(spec, plan, text_tokens=text, num_images=1, dtype=made.recipe.export.dtype)
    least = {
        "prefill_ms": prefill_bound_ms(machine, flops=prefill_flops(spec, plan, text), weight_bytes=weights),
        "decode_ms_per_token": decode_bound_ms(machine, weight_bytes=weights, kv_bytes=cache),
    }
    return [_figure(name, bound, row[name]) for name, bound in least.items()]


def _figure(name: str, foretold: float, measured: float) -> dict[str, Any]:
    return {"name": name, "foretold": foretold, "measured": measured, "measured_of_foretold": measured / foretold}
