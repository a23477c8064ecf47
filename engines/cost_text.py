"""Costs in words and figures, for terminals and reports alike."""

from collections.abc import Iterable, Mapping
from typing import Any

# Kinds of operator with less of a phase are shown as one.
_LEAST_SHARE = 0.01
_NAMES = {
    "disk_bytes": "artefact on disk",
    "peak_rss_bytes": "most memory",
    "prefill_ms": "prefill, least time",
    "decode_ms_per_token": "decode per token, least time",
}
_TERMS = {
    "interpreter": "Python and ONNX Runtime",
    "weights": "weights",
    "kv_cache": "KV cache",
    "activations": "activations (allowance)",
}


def foretold_rows(bench: Mapping[str, Any]) -> Iterable[tuple[str, str, str, str]]:
    """Yield what was foretold, how much, what was measured, and that over what was foretold; none in older reports."""
    for figure in bench.get("foretold", {}).get("figures", ()):
        name = figure["name"]
        scale = bytes_text if name.endswith("bytes") else milliseconds_text
        ratio = figure["measured_of_foretold"]
        measured = f"{ratio:.2f}x" if name.startswith(("prefill", "decode")) else f"{100 * (ratio - 1):+.2f} %"
        yield _NAMES[name], scale(figure["foretold"]), scale(figure["measured"]), measured
        for term, text in _TERMS.items():
            if term in figure.get("terms", {}):
                yield f"of it {text}", bytes_text(figure["terms"][term]), "", ""


def foretold_remark(bench: Mapping[str, Any]) -> str:
    """Return what the least times follow from, nothing where none were foretold."""
    machine = bench.get("foretold", {}).get("machine")
    return f"Least times are for {machine_text(machine)}, as measured beside." if machine else ""


def machine_text(machine: Mapping[str, Any]) -> str:
    """Return the figures of a machine."""
    how = f" in {machine['precision']} on {machine['threads']} threads" if machine["precision"] else ""
    return f"{machine['gflops_per_s']:,.0f} GFLOP/s{how} and {machine['gb_per_s']:,.1f} GB/s"


def memory_terms() -> Mapping[str, str]:
    """Return what takes memory, by the names of the terms in a plan."""
    return _TERMS


def bytes_text(num_bytes: float) -> str:
    """Return bytes in MB."""
    return f"{num_bytes / 1e6:,.1f} MB"


def milliseconds_text(value: float) -> str:
    """Return milliseconds in as many digits as mean something."""
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def profile_rows(bench: Mapping[str, Any]) -> Iterable[tuple[str, str, str, str, str]]:
    """Yield phase, kind of operator, count, time of a run and share of the phase; the method's own part closes each."""
    for name, phase in bench.get("profile", {}).get("phases", {}).items():
        shown = [op for op in phase["ops"] if op["share"] >= _LEAST_SHARE]
        for op in shown:
            yield name, op["op"], str(op["count"]), milliseconds_text(op["ms"]), _share(op["share"])
        rest = [op for op in phase["ops"] if op["share"] < _LEAST_SHARE]
        if rest:
            count, taken, share = (sum(op[key] for op in rest) for key in ("count", "ms", "share"))
            yield name, f"{len(rest)} other kinds", str(count), milliseconds_text(taken), _share(share)
        own = phase["method"]
        if own["nodes"]:
            yield name, "of it the method", str(own["nodes"]), milliseconds_text(own["ms"]), _share(own["share"])


def profile_remark(bench: Mapping[str, Any]) -> str:
    """Return what the method costs until the first token, nothing without a profile."""
    if "profile" not in bench:
        return ""
    method = bench["profile"]["method"]
    return (
        f"Until the first token the method takes {milliseconds_text(method['ms'])}, "
        f"{_share(method['of_full_prefill'])} of the prefill of all tokens."
    )


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"
