"""Loyalty to the uncompressed model in words and figures, for terminals and reports alike."""

from collections.abc import Iterable, Mapping
from typing import Any

COLUMNS = ("number", "tokens agree", "agreeing prefix", "answers equal", "first-token KL, nats", "50, 90, 99 % below")
"""What ``loyalty_rows`` yields behind the name."""


def loyalty_rows(report: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    """Yield which questions, and what ``COLUMNS`` names of them, with 95 % intervals."""
    entries = [("all questions", report)]
    entries += [(f"turn {entry['turn']}", entry) for entry in report["per_turn"]]
    entries += list(report["per_kind"].items())
    for name, entry in entries:
        prefix, kl = entry["agreeing_prefix"], entry["first_token_kl"]
        low, high = kl["interval"]
        yield (
            name,
            f"{entry['questions']:,}",
            _share(entry["token_agreement"]),
            f"{prefix['mean']:.1f} of {entry['answer_tokens']:.1f}",
            _share(entry["answer_agreement"]),
            f"{kl['mean']:.2g} ({low:.2g} to {high:.2g})",
            f"{kl['p50']:.2g}, {kl['p90']:.2g}, {kl['p99']:.2g}",
        )


def loyalty_headline(report: Mapping[str, Any]) -> tuple[str, str]:
    """Return the share of equal tokens, and what else belongs to it."""
    answers, kl = report["answer_agreement"]["mean"], report["first_token_kl"]["mean"]
    detail = f"of the full model's tokens; {100 * answers:.1f} % of its answers, KL {kl:.3g} nats"
    return f"{100 * report['token_agreement']['mean']:.1f} %", detail


def loyalty_remarks(report: Mapping[str, Any]) -> Iterable[str]:
    """Yield a sentence on what was asked, on what was compared, and on what takes its meaning away."""
    questions = [entry["question"] for entry in report["per_turn"]]
    if all(questions):
        yield f"asked in turn: {' '.join(questions)}"
    ttft = report["ttft_ms"]
    again = ", all read again with every question" if report["reselect"] else ""
    yield (
        f"beside {report['full']}, behind the same answers{again}; first token after {ttft['full']:.1f} ms with all "
        f"tokens, {ttft['own']:.1f} ms compressed"
    )
    if report["weights"] == "random":
        yield "the weights are random, so loyalty means little"


def loyalty_settings(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what loyalty depends on."""
    return {**{name: report[name] for name in ("backend", "dialogues", "max_new_tokens", "weights")}, **report["data"]}


def _share(entry: Mapping[str, Any]) -> str:
    low, high = entry["interval"]
    return f"{100 * entry['mean']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
