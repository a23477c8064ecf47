"""A comparison of recipes as Markdown, and its figures in words, for terminals and pages alike."""

from collections.abc import Mapping, Sequence
from typing import Any


def comparison_markdown(report: Mapping[str, Any]) -> str:
    """Return the tables of recipes and of verdicts, and what is missing."""
    rows = report["rows"]
    heads = column_heads(rows)
    lines = [_line(heads), _line(["---", *["---:"] * (len(heads) - 1)]), *(_line(row_cells(row)) for row in rows)]
    if any(verdict["control"] for verdict in report["verdicts"]):
        lines += ["", _line(VERDICT_HEADS), _line(["---", "---", "---", "---:", "---:", "---:"])]
        lines += [_line(verdict_cells(verdict)) for verdict in report["verdicts"]]
        lines += ["", *verdict_remarks(report["verdicts"])]
    if report["losses"]:
        lines += ["", _line(LOSS_HEADS), _line(["---", *["---:"] * (len(LOSS_HEADS) - 1)])]
        lines += [_line(cells) for cells in loss_lines(report)]
        lines += ["", LOSS_REMARK]
    lines += [f"\n{name} is missing: {error}" for name, error in report["failures"].items()]
    return "\n".join(lines) + "\n"


def column_heads(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the heads of the table of recipes, as many turns as the longest dialogue has."""
    turns = range(1, 1 + max((len(row["per_turn"]) for row in rows), default=0))
    heads = ["recipe", "tokens per layer", "FLOPs", "KV, vision", "first token", "accuracy", "of full"]
    return [*heads, *(f"turn {turn}" for turn in turns)]


def row_cells(row: Mapping[str, Any]) -> list[str]:
    """Return a line of the table of recipes."""
    low, high = row["interval"]
    spread = f" ± {50 * (high - low):.1f}" if high > low else ""
    return [
        row["recipe"],
        f"{row['mean_vision_tokens']:.0f}",
        f"{-100 * row['flops']['reduction']:+.1f} %" if row["compressed"] else "–",
        f"{-100 * row['kv_bytes_vision']['reduction']:+.1f} %" if row["compressed"] else "–",
        f"{row['ttft_ms']['median']:.1f} ms",
        f"{100 * row['accuracy']:.1f}{spread} %",
        "–" if row["relative_to_full"] is None else f"{100 * row['relative_to_full']:.1f} %",
        *(f"{100 * turn['accuracy']:.1f}" for turn in row["per_turn"]),
    ]


VERDICT_HEADS = (
    "method",
    "control",
    "accuracy",
    "difference, points",
    "95 % interval",
    "first token, of the control's",
)


def verdict_cells(verdict: Mapping[str, Any]) -> list[str]:
    """Return a line of the table of verdicts."""
    if verdict["control"] is None:
        return [verdict["recipe"], "none within 10 % of its tokens", *["–"] * 4]
    low, high = verdict["difference_interval"]
    return [
        verdict["recipe"],
        f"{verdict['control']} ({verdict['control_tokens']:.0f} tokens)",
        verdict["accuracy"],
        f"{100 * verdict['difference']:+.1f}",
        f"{100 * low:+.1f} to {100 * high:+.1f}",
        f"{verdict['ttft_ratio']:.2f} x",
    ]


def verdict_remarks(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return sentences on how the verdicts were reached."""
    bases = {verdict["basis"] for verdict in verdicts}
    remarks: list[str] = []
    if "paired" in bases:
        remarks.append(
            "Differences are paired by question, their intervals by bootstrap over dialogues. Each verdict stands for "
            "itself at 95 %: of twenty between equals, one would be wrong."
        )
    if "intervals" in bases:
        unpaired = [verdict["recipe"] for verdict in verdicts if verdict["basis"] == "intervals"]
        remarks.append(
            f"Of {', '.join(unpaired)} and the control not all answers to the same questions are stored, so only the "
            "intervals of both accuracies are compared, which tells fewer of them apart."
        )
    return remarks


LOSS_HEADS = ("artefact", "graphs", "first token", "per token", "accuracy", "compression", "precision", "both")
LOSS_REMARK = (
    "What is lost, in points, with its 95 % interval, paired by question: by compression beside all tokens in the same "
    "precision, by precision beside the same tokens in float32, by both beside all tokens in float32."
)


def loss_lines(report: Mapping[str, Any]) -> list[list[str]]:
    """Return the lines of the table of losses, and what the artefacts take on disk and by the clock."""
    rows = {row["recipe"]: row for row in report["rows"]}
    return [
        [
            loss["recipe"],
            f"{rows[loss['recipe']]['bytes_on_disk'] / 1e6:.1f} MB",
            f"{rows[loss['recipe']]['ttft_ms']['median']:.1f} ms",
            f"{rows[loss['recipe']]['decode_ms_per_token']:.2f} ms",
            f"{100 * rows[loss['recipe']]['accuracy']:.1f} %",
            *(_points(loss[part]) for part in ("of_compression", "of_precision", "of_both")),
        ]
        for loss in report["losses"]
    ]


def _points(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return "–"
    low, high = difference["interval"]
    return f"{100 * difference['mean']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
