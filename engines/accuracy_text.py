"""An evaluation in words and figures, for terminals and reports alike."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def figure_rows(report: Mapping[str, Any]) -> Iterable[tuple[str, str, str, str]]:
    """Yield which questions, how many, their accuracy, and its 95 % interval."""
    entries = [("all questions", report)]
    entries += [(f"turn {entry['turn']}", entry) for entry in report["per_turn"]]
    entries += list(report["per_kind"].items())
    for name, entry in entries:
        yield name, f"{entry['questions']:,}", _percent(entry["accuracy"]), _interval(entry["interval"])


def headline(report: Mapping[str, Any]) -> tuple[str, str]:
    """Return the accuracy, and what it is beside the full model's or within which interval."""
    full = report["full"]
    if full is None:
        return _percent(report["accuracy"]), f"95 % interval {_interval(report['interval'])}"
    return _percent(report["accuracy"]), f"{_percent(full['full_accuracy'])} with all tokens"


def remarks(report: Mapping[str, Any]) -> Iterable[str]:
    """Yield a sentence on how the accuracy stands to the full model's, and on what takes its meaning away."""
    if full := report["full"]:
        yield _comparison(full)
    if report["ignores_compression"]:
        yield f"{report['backend']} runs all tokens, so this is the accuracy without compression"
    if report["weights"] == "random":
        yield "the weights are random, so the accuracy means nothing"


def settings(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the accuracy depends on."""
    names = ("backend", "metric", "dialogues", "max_new_tokens", "weights")
    return {**{name: report[name] for name in names}, **report["data"]}


def _comparison(full: Mapping[str, Any]) -> str:
    low, high = full["difference_interval"]
    difference = (
        f"{100 * full['difference']:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f}), "
        f"{full['gained']:,} questions gained, {full['lost']:,} lost"
    )
    if full["relative"] is None:
        return f"the full model answers nothing right; {difference}"
    of_full = f"{_percent(full['relative'])} ({_interval(full['relative_interval'])})"
    return f"{of_full} of the full model's {_percent(full['full_accuracy'])}; {difference}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(interval: Sequence[float]) -> str:
    low, high = interval
    return f"{100 * low:.1f} to {100 * high:.1f} %"
