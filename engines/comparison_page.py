"""A comparison of recipes as one HTML page that needs nothing beside itself."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from PIL import Image

from tokexport.engines.comparison_plots import ParetoPoint, define_images, draw_kept, draw_pareto, pareto_set
from tokexport.engines.comparison_text import (
    LOSS_HEADS,
    LOSS_REMARK,
    VERDICT_HEADS,
    column_heads,
    loss_lines,
    row_cells,
    verdict_cells,
    verdict_remarks,
)
from tokexport.engines.kept_tokens import KeptTokens
from tokexport.engines.pages import DASH, Plot, page_environment, setting_rows

# A cell this many points under the full model is as dark as one gets, so that its text is still read.
_DARKEST_LOSS, _DARKEST_SHARE = 50.0, 70.0
_TONES = {"better": "good", "worse": "bad"}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What is drawn for one recipe: a line of drawings and its caption for each stage, and why there is no more."""

    recipe: str
    stages: tuple[tuple[str, tuple[Markup, ...]], ...]
    hidden: str


def render_comparison(
    report: Mapping[str, Any],
    images: Sequence[Image.Image] = (),
    kept: Mapping[str, Sequence[KeptTokens]] | None = None,
) -> str:
    """Return the page of a comparison.

    Args:
        report: what ``compare.json`` holds.
        images: that are shown, as the vision tower sees them.
        kept: what stays of each of them, by the name of the recipe.
    """
    rows: Sequence[Mapping[str, Any]] = report["rows"]
    full = next(row for row in rows if not row["compressed"])
    ids = [f"image-{number}" for number in range(len(images))]
    settings: Mapping[str, Any] = report["settings"]
    dialogues, text_tokens = settings["data"]["dialogues"], settings["text_tokens"]
    return (
        page_environment(autoescape=True)
        .get_template("compare.html.j2")
        .render(
            title=f"{len(rows)} recipes compared",
            lead=f"{dialogues:,} dialogues, engine {settings['backend']}, {text_tokens} text tokens",
            failures=report["failures"],
            heads=column_heads(rows),
            rows=list(_lines(rows)),
            verdict_heads=VERDICT_HEADS,
            verdicts=[(verdict_cells(one), _TONES.get(one["accuracy"] or "", "")) for one in report["verdicts"]],
            verdict_remarks=verdict_remarks(report["verdicts"]),
            loss_heads=LOSS_HEADS,
            losses=loss_lines(report),
            loss_remark=LOSS_REMARK,
            plots=list(_plots(rows)),
            full=full["recipe"],
            heat_heads=_heat_heads(full),
            heat=[(row["recipe"], _heat_cells(row, full)) for row in rows],
            images=define_images(dict(zip(ids, images, strict=True))),
            pictures=[_picture(name, ids, found) for name, found in (kept or {}).items()],
            settings=_settings(settings),
        )
    )


def _lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    best = {point.label for point in pareto_set([_point(row, row["ttft_ms"]["median"]) for row in rows])}
    for row in rows:
        budget = f"asked for {row['budget']}, has {row['mean_vision_tokens']:.4g}" if row["budget"] else ""
        yield {
            "cells": row_cells(row),
            "is_best": row["recipe"] in best,
            "is_control": row["is_control"],
            "budget": budget,
        }


def _point(row: Mapping[str, Any], cost: float) -> ParetoPoint:
    low, high = row["interval"]
    return ParetoPoint(
        label=row["recipe"],
        cost=cost,
        accuracy=100 * row["accuracy"],
        interval=(100 * low, 100 * high),
        is_control=row["is_control"],
    )


def _plots(rows: Sequence[Mapping[str, Any]]) -> Iterator[Plot]:
    costs = (
        ("the time to the first token", "ms to the first token, median", [row["ttft_ms"]["median"] for row in rows]),
        ("FLOPs", "GFLOP of the decoder's prefill, by plan", [row["flops"]["compressed"] / 1e9 for row in rows]),
        ("the KV cache", "MB of KV cache, measured", [row["kv_bytes"] / 1e6 for row in rows]),
    )
    for name, unit, values in costs:
        points = [_point(row, value) for row, value in zip(rows, values, strict=True)]
        best = ", ".join(point.label for point in pareto_set(points))
        title = f"Accuracy against {name}"
        said = "; ".join(f"{point.label}: {point.accuracy:.1f} % at {point.cost:.4g}" for point in points)
        yield Plot(
            title=title,
            caption=f"Bars are 95 % intervals. No other recipe costs as little and answers as well as {best}.",
            svg=draw_pareto(title, f"{title}, {unit}. {said}.", points, unit),
        )


def _heat_heads(full: Mapping[str, Any]) -> list[str]:
    turns = [f"turn {turn['turn']}" for turn in full["per_turn"]]
    return ["all", *turns, *(kind.replace("_", " ") for kind in full["per_kind"])]


def _heat_cells(row: Mapping[str, Any], full: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the accuracies of a recipe, each with its darkness in percent."""

    def parts(of: Mapping[str, Any]) -> dict[str, float]:
        turns = {f"turn {turn['turn']}": turn["accuracy"] for turn in of["per_turn"]}
        return {"all": of["accuracy"], **turns, **{name: part["accuracy"] for name, part in of["per_kind"].items()}}

    mine = parts(row)
    cells: list[dict[str, Any]] = []
    for name, accuracy in parts(full).items():
        lost = 100 * (accuracy - mine[name]) if name in mine else 0.0
        share = round(_DARKEST_SHARE * min(1.0, max(0.0, lost / _DARKEST_LOSS)))
        cells.append({"text": f"{100 * mine[name]:.1f}" if name in mine else DASH, "share": share})
    return cells


def _picture(recipe: str, ids: Sequence[str], found: Sequence[KeptTokens]) -> Picture:
    stages: list[tuple[str, tuple[Markup, ...]]] = []
    for number, stage in enumerate(found[0].stages):
        rows, columns = found[0].grid
        caption = f"{stage.where}: {stage.kept} tokens, of {rows} x {columns} patches"
        title = f"{recipe}, {caption}"
        drawn = [draw_kept(one.stages[number], one.grid, name, title) for name, one in zip(ids, found, strict=True)]
        stages.append((caption, tuple(drawn)))
    return Picture(recipe=recipe, stages=tuple(stages), hidden=found[0].hidden)


def _settings(settings: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    environment: Mapping[str, Any] = settings["environment"]
    sections: dict[str, Mapping[str, Any]] = {
        "Evaluation": {key: settings[key] for key in ("backend", "metric", "max_new_tokens")} | settings["data"],
        "Measurement": {key: settings[key] for key in ("repeats", "text_tokens")},
        "Machine": {key: value for key, value in environment.items() if key != "versions"},
        "Versions": environment["versions"],
    }
    return {title: setting_rows(facts) for title, facts in sections.items()}
