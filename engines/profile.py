"""Where the time of an artefact goes, by kind of operator and by whose it is: ONNX Runtime's own profile.

The session is the one that is measured, with profiling switched on; each of its kernels writes how long it took. What a
method costs are its own nodes, and those nodes of the model that are there for its choice alone, e.g. the products of
queries that a scorer looks with.
"""

import json
import re
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from tokexport.engines.backend import SessionOptions, load_backend
from tokexport.engines.worker import Workload, run_workload
from tokexport.errors import BackendUnavailableError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.graph_io import CHOICES, METHOD_SCOPES, GraphName

_WARMUP = 2
# The part of a bottleneck that says which tokens stay; see exporter/modules/bottleneck.py.
_CHOICE = re.compile(r"/bottlenecks\.\d+/top/")
_KERNEL = "_kernel_time"


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One run of one node; ``us`` are microseconds."""

    node: str
    op: str
    us: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a graph with its kernels in order."""

    us: float
    kernels: tuple[Kernel, ...]


def require_profile(engine: str) -> None:
    """Raise ``BackendUnavailableError`` if an engine writes no profile."""
    if not load_backend(engine).is_profiled:
        raise BackendUnavailableError(
            f"backend {engine!r} writes no profile; leave --profile out, or choose one of ONNX Runtime, e.g. ort"
        )


def profile(
    bundle: Bundle, engine: str, options: SessionOptions, workload: Workload, *, repeats: int, full_prefill_ms: float
) -> dict[str, Any]:
    """Return what ``tokexport bench --profile --json`` prints under ``profile``.

    Args:
        bundle: the artefact.
        engine: of ONNX Runtime.
        options: room and threads.
        workload: what is run.
        repeats: profiled runs, after two that are not counted; figures are means of these and, of decode, of tokens.
        full_prefill_ms: of the uncompressed model in the same engine.

    Returns:
        ``phases`` (vision, prefill, decode), each with its milliseconds a run, those by kind of operator, and those of
        the method; and what the ``method`` takes until the first token, also as a part of ``full_prefill_ms``.

    Raises:
        BackendUnavailableError: the engine writes no profile.
    """
    require_profile(engine)
    with tempfile.TemporaryDirectory() as folder:
        session = load_backend(engine).open(bundle, replace(options, profile=Path(folder)))
        for _ in range(_WARMUP + repeats):
            run_workload(session, workload)
        traces = {graph: read_runs(path.read_text(encoding="utf-8")) for graph, path in session.end_profile().items()}
    decoder = traces["decoder_model_merged"]
    # Each answer is one prefill, then one step for each token of the answer.
    calls = 1 + workload.new_tokens
    assert len(decoder) == calls * (_WARMUP + repeats), (len(decoder), calls)
    counted = decoder[calls * _WARMUP :]
    runs: dict[str, tuple[GraphName, Sequence[Run]]] = {
        "vision": ("vision_encoder", traces["vision_encoder"][_WARMUP:]),
        "prefill": ("decoder_model_merged", counted[::calls]),
        "decode": ("decoder_model_merged", [run for i, run in enumerate(counted) if i % calls]),
    }
    owned = {graph: method_nodes(ir.load(bundle.graph_path(graph)).graph) for graph, _ in runs.values()}
    phases = {name: summary(phase, owned[graph]) for name, (graph, phase) in runs.items()}
    taken = phases["vision"]["method"]["ms"] + phases["prefill"]["method"]["ms"]
    return {"phases": phases, "method": {"ms": taken, "of_full_prefill": taken / full_prefill_ms}}


def read_runs(trace: str) -> list[Run]:
    """Return the runs in a profile that ONNX Runtime wrote, in order."""
    events: list[Mapping[str, Any]] = json.loads(trace)
    starts = sorted((event for event in events if event["name"] == "model_run"), key=lambda event: event["ts"])
    kernels = sorted((event for event in events if event["name"].endswith(_KERNEL)), key=lambda event: event["ts"])
    runs: list[Run] = []
    for start in starts:
        end = start["ts"] + start["dur"]
        mine = [event for event in kernels if start["ts"] <= event["ts"] < end]
        runs.append(Run(us=start["dur"], kernels=tuple(_kernel(event) for event in mine)))
    return runs


def method_nodes(graph: ir.Graph) -> frozenset[str]:
    """Return the names of the nodes that a method added: its own, and those that only its choice needs."""
    needed: set[ir.Node] = set()
    told = [value for value in graph.outputs if not (value.name or "").startswith(CHOICES)]
    waiting = [node for node in (value.producer() for value in told) if node is not None]
    while waiting:
        node = waiting.pop()
        if node not in needed and not _CHOICE.match(node.name or ""):
            needed.add(node)
            waiting += node.predecessors()
    return frozenset(
        node.name or "" for node in graph if node not in needed or (node.name or "").startswith(METHOD_SCOPES)
    )


def summary(runs: Sequence[Run], owned: frozenset[str]) -> dict[str, Any]:
    """Return milliseconds a run: of all, of each kind of operator (largest first), and of the nodes of a method."""
    shares = [_by_op(run.kernels) for run in runs]
    total = _mean_ms(sum(share.values()) for share in shares)
    counts = Counter(kernel.op for kernel in runs[0].kernels)
    taken = {op: _mean_ms(share.get(op, 0.0) for share in shares) for op in counts}
    method = [[kernel for kernel in run.kernels if _is_of(kernel.node, owned)] for run in runs]
    method_ms = _mean_ms(sum(kernel.us for kernel in mine) for mine in method)
    return {
        "run_ms": _mean_ms(run.us for run in runs),
        "kernels_ms": total,
        "ops": [
            {"op": op, "count": counts[op], "ms": taken[op], "share": taken[op] / total}
            for op in sorted(counts, key=lambda op: -taken[op])
        ],
        "method": {"nodes": len(method[0]), "ms": method_ms, "share": method_ms / total},
    }


def _is_of(node: str, owned: frozenset[str]) -> bool:
    # What ONNX Runtime makes of a node on opening has a name of its own, mostly one that begins like the node's.
    return node in owned or node.startswith(METHOD_SCOPES)


def _by_op(kernels: Iterable[Kernel]) -> Mapping[str, float]:
    taken: defaultdict[str, float] = defaultdict(float)
    for kernel in kernels:
        taken[kernel.op] += kernel.us
    return taken


def _kernel(event: Mapping[str, Any]) -> Kernel:
    return Kernel(node=event["name"].removesuffix(_KERNEL), op=event["args"]["op_name"], us=event["dur"])


def _mean_ms(microseconds: Iterable[float]) -> float:
    return statistics.fmean(microseconds) / 1e3
