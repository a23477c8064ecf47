"""A search as Markdown and as tables for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Column

from tokexport.engines.cost_budget import NAMES, amount_text
from tokexport.engines.tables import new_table

_MEASURED = "measured, the dearest first"
_TRIED = "the best form of each method, in PyTorch, on other dialogues"


def search_markdown(report: Mapping[str, Any]) -> str:
    """Return the summary, the measured candidates, what was tried, and what failed."""
    lines = [*(f"{_sentence(text)}\n" for text in report["summary"])]
    for title, heads, rows in (_pareto(report), _others(report), _tried(report)):
        if rows:
            numbers = ["---", "---", *["---:"] * (len(heads) - 2)]
            lines += [f"## {title}\n", _line(heads), _line(numbers), *(_line(row) for row in rows), ""]
    lines += [f"{name} was left out: {reason}\n" for name, reason in report["left_out"].items()]
    lines += [f"{name} failed: {error}\n" for name, error in report["failures"].items()]
    return "\n".join(lines)


def search_tables(report: Mapping[str, Any]) -> list[RenderableType]:
    """Return the tables and the summary under them."""
    shown: list[RenderableType] = []
    for title, heads, rows in (_tried(report), _others(report), _pareto(report)):
        if rows:
            columns = [Column(head, justify="right") for head in heads[2:]]
            table = new_table(heads[0], heads[1], *columns, title=title)
            for row in rows:
                table.add_row(*row)
            shown.append(table)
    return [*shown, *(_sentence(text) for text in report["summary"])]


Part = tuple[str, Sequence[str], Sequence[Sequence[str]]]


def _pareto(report: Mapping[str, Any]) -> Part:
    what = " and ".join(NAMES[kind] for kind in report["limits"])
    rows = [_row(row, report) for row in report["rows"] if row["is_pareto"]]
    return f"Pareto set of accuracy and {what}", _heads(report), [_full_row(report), *rows] if rows else []


def _others(report: Mapping[str, Any]) -> Part:
    rows = [_row(row, report) for row in report["rows"] if not row["is_pareto"]]
    return f"others that were {_MEASURED}", _heads(report), rows


def _heads(report: Mapping[str, Any]) -> list[str]:
    return [
        "recipe",
        "options",
        "tokens per layer",
        *(NAMES[kind] for kind in report["limits"]),
        "accuracy",
        "of full",
        "",
    ]


def _row(row: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    limits = report["limits"]
    costs = [
        f"{amount_text(kind, row['costs'][kind])} ({100 * row['costs'][kind] / limits[kind]['full']:.0f} %)"
        for kind in limits
    ]
    marks = [
        word
        for word, is_so in (
            ("winner", row["recipe"] == report["winner"]),
            ("control", row["is_control"]),
            ("over budget", not row["meets_budgets"]),
        )
        if is_so
    ]
    relative = row["relative_to_full"]
    return [
        row["recipe"],
        row["description"],
        f"{row['mean_vision_tokens']:.0f}",
        *costs,
        _accuracy(row),
        "–" if relative is None else f"{100 * relative:.1f} %",
        ", ".join(marks),
    ]


def _full_row(report: Mapping[str, Any]) -> list[str]:
    full, limits = report["full"], report["limits"]
    costs = [amount_text(kind, limits[kind]["full"]) for kind in limits]
    return [full["recipe"], "nothing compressed", f"{full['mean_vision_tokens']:.0f}", *costs, _accuracy(full), "–", ""]


def _accuracy(row: Mapping[str, Any]) -> str:
    low, high = row["interval"]
    return f"{100 * row['accuracy']:.1f}{f' ± {50 * (high - low):.1f}' if high > low else ''} %"


def _tried(report: Mapping[str, Any]) -> Part:
    """Return the best form of each method; of two as good the one that was asked more."""
    best: dict[str, Mapping[str, Any]] = {}
    for one in report["screened"]:
        name = "+".join(one["methods"])
        if name not in best or _rank(one) > _rank(best[name]):
            best[name] = one
    count = {name: sum("+".join(one["methods"]) == name for one in report["screened"]) for name in best}
    rows = [
        [
            one["recipe"],
            one["description"],
            str(count[name]),
            f"{one['mean_vision_tokens']:.0f}",
            str(one["dialogues"]),
            f"{100 * one['accuracy']:.1f} %",
        ]
        for name, one in sorted(best.items(), key=lambda item: -item[1]["accuracy"])
    ]
    return _TRIED, ["recipe", "options", "tried", "tokens per layer", "dialogues", "accuracy"], rows


def _rank(one: Mapping[str, Any]) -> tuple[int, float]:
    return one["dialogues"], one["accuracy"]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
