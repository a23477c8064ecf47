"""The figures of ``benchmarks/peers.py`` as Markdown: every row, and ours beside the fastest peer of as many bits."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
_OURS, _FULL = "tokexport", "all"


def pairs(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return, for each row of ours, the fastest peer with as many bits: with as many tokens, and with all of them.

    Ratios are the peer's figure over ours: above 1 ours is faster, or smaller.
    """
    measured = [row for row in rows if "failed" not in row]
    found: list[dict[str, Any]] = []
    for ours in (row for row in measured if row["system"] == _OURS):
        for method in dict.fromkeys((ours["method"], _FULL)):
            rivals = [
                row
                for row in measured
                if row["system"] != _OURS and (row["bits"], row["method"]) == (ours["bits"], method)
            ]
            if not rivals:
                continue
            peer = min(rivals, key=_ttft)
            found.append(
                {
                    "bits": ours["bits"],
                    "engine": ours["variant"].partition(" ")[2],
                    "method": ours["method"],
                    "peer": f"{peer['system']} {peer['variant']}",
                    "peer_method": peer["method"],
                    "ttft_ms": [_ttft(ours), _ttft(peer)],
                    "decode_ms_per_token": [row["decode_ms_per_token"]["median"] for row in (ours, peer)],
                    "ttft": _ttft(peer) / _ttft(ours),
                    "decode": peer["decode_ms_per_token"]["median"] / ours["decode_ms_per_token"]["median"],
                    "memory": peer["peak_rss_bytes"] / ours["peak_rss_bytes"],
                    "disk": peer["disk_bytes"] / ours["disk_bytes"],
                }
            )
    return found


def table(document: Mapping[str, Any]) -> str:
    """Return both tables with what they were measured on."""
    rows, environment = document["rows"], document["environment"]
    versions = dict.fromkeys(row["version"] for row in rows if row.get("version"))
    libraries = ["tokexport", "onnxruntime", *dict.fromkeys(row["engine"] for row in rows if row.get("engine"))]
    ours = [f"{name} {environment['versions'][name]}" for name in libraries if name in environment["versions"]]
    work = document["workload"]
    loads = ", ".join(f"{load['before']:.1f}" for load in document["loads"])
    order = ", one system at a time" if document.get("one_at_a_time") else ""
    lines = [
        f"{environment['cpu']}, {environment['threads']} threads; {', '.join(dict.fromkeys([*ours, *versions]))}",
        "",
        f"{work['vision_tokens']} vision and {work['text_tokens']} text tokens, {work['new_tokens']} more tokens, "
        f"medians of {work['repeats']} (10th to 90th percentile){order}. Load before each group: {loads}.",
        "",
        "| weights | system | tokens a layer | first token, ms | vision, ms | prefill, ms | a token, ms | memory, MB "
        "| disk, MB | tokens as the first row |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    reference = next((row["tokens_said"] for row in rows if row.get("tokens_said")), [])
    lines += [_line(row, reference) for row in rows]
    if not document["pairs"]:
        return "\n".join(lines) + "\n"
    lines += [
        "",
        "Ours beside the fastest peer with weights of as many bits; above 1 ours is faster or smaller:",
        "",
        "| weights | tokexport | peer | its tokens | ms, ours and its | first token | a token | memory | disk |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for pair in document["pairs"]:
        times = " / ".join(f"{value:.0f}" for value in pair["ttft_ms"])
        ratios = " | ".join(f"{pair[key]:.2f}" for key in ("ttft", "decode", "memory", "disk"))
        ours = ", ".join(filter(None, (pair["method"], pair["engine"])))
        head = f"| {pair['bits']} | {ours} | {pair['peer']} | {_tokens(pair['peer_method'])}"
        lines.append(f"{head} | {times} | {ratios} |")
    return "\n".join(lines) + "\n"


def _line(row: Row, reference: Sequence[int]) -> str:
    kept = "" if row["method"] == _FULL else f", {_tokens(row['method'])}"
    head = f"| {row['bits']} | {row['system']} {row['variant']}{kept} | {row['tokens']:g} |"
    if "failed" in row:
        return f"{head} {row['failed'].replace('|', '/')} | | | | | | |"
    parts = (row[key] for key in ("vision_ms", "prefill_ms", "decode_ms_per_token"))
    cells = [_spread(row["ttft_ms"]), *(_median(part) for part in parts)]
    cells += [f"{row[key] / 1e6:.0f}" for key in ("peak_rss_bytes", "disk_bytes")]
    cells.append(_equal(row["tokens_said"], reference) if row["method"] == _FULL else "–")
    return f"{head} {' | '.join(cells)} |"


def _equal(said: Sequence[int], reference: Sequence[int]) -> str:
    """Return how many tokens come before the first that differs."""
    if not said:
        return "–"
    places = (place for place, (one, other) in enumerate(zip(said, reference, strict=False)) if one != other)
    return f"{next(places, len(said))} of {len(reference)}"


def _tokens(method: str) -> str:
    return "all" if method == _FULL else f"as {method}"


def _ttft(row: Row) -> float:
    return row["ttft_ms"]["median"]


def _spread(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.0f} ({spread['p10']:.0f}–{spread['p90']:.0f})"


def _median(spread: Mapping[str, float] | None) -> str:
    return "–" if spread is None else f"{spread['median']:.1f}"
