"""The plots of the report of one artefact."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from tokexport.engines.drawing import COLOURS, draw_axes, draw_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

_MAX_LABEL = 28
_MAX_LABELLED_RUNS = 12


@dataclass(frozen=True, kw_only=True)
class LayerRun:
    """Consecutive decoder layers with the same number of vision tokens; ``last`` is inclusive."""

    first: int
    last: int
    tokens: int

    @property
    def layers(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True, kw_only=True)
class TimeBar:
    """Where one arm's time goes, in ms; ``text`` is written at the end of the bar."""

    label: str
    text: str
    vision: float
    prefill: float


@dataclass(frozen=True, kw_only=True)
class GainBar:
    """One arm's speed-up, and what the plan predicted; ``text`` is written inside the bar."""

    label: str
    text: str
    measured: float
    predicted: float | None
    is_control: bool


def draw_tokens(title: str, alt: str, runs: Sequence[LayerRun], full: int) -> Markup:
    """Draw the vision tokens that enter each decoder layer, before those that were removed."""
    num_layers = runs[-1].last + 1

    def paint(axes: "Axes") -> None:
        kept = [run.tokens for run in runs for _ in range(run.first, run.last + 1)]
        gone = [full] * num_layers
        axes.bar(range(num_layers), gone, width=0.82, color=COLOURS["gone"], label=f"all tokens ({full})")
        axes.bar(range(num_layers), kept, width=0.82, color=COLOURS["kept"], label="kept")
        for run in runs if len(runs) <= _MAX_LABELLED_RUNS else ():
            middle, above = (run.first + run.last) / 2, run.tokens + 0.02 * full
            axes.text(middle, above, str(run.tokens), ha="center", weight="bold")
        axes.set_xlim(-0.6, num_layers - 0.4)
        axes.set_ylim(0, 1.15 * full)
        axes.set_xlabel("decoder layer, counted from 0")
        axes.locator_params(axis="x", integer=True)
        axes.grid(axis="y")

    return draw_axes(title, alt, (12.6, 3.0), paint)


def draw_times(title: str, alt: str, bars: Sequence[TimeBar]) -> Markup:
    """Draw how the time of each arm divides into vision and prefill."""

    def paint(axes: "Axes") -> None:
        rows = range(len(bars))
        vision, prefill = [bar.vision for bar in bars], [bar.prefill for bar in bars]
        axes.barh(rows, vision, height=0.62, color=COLOURS["vision"], label="vision and projector")
        axes.barh(rows, prefill, height=0.62, left=vision, color=COLOURS["kept"], label="prefill")
        for row, bar in enumerate(bars):
            end = bar.vision + bar.prefill
            axes.annotate(bar.text, (end, row), (6, 0), textcoords="offset points", va="center")
        _label_rows(axes, [bar.label for bar in bars], "ms, shorter is better")

    return draw_axes(title, alt, _size_for(len(bars)), paint)


def draw_gains(title: str, alt: str, bars: Sequence[GainBar]) -> Markup:
    """Draw the measured speed-up of each arm and a marker where the plan predicted it."""

    def paint(axes: "Axes") -> None:
        for is_control, colour, label in ((False, "kept", "measured"), (True, "control", "measured, control")):
            if rows := [row for row, bar in enumerate(bars) if bar.is_control == is_control]:
                gains = [bars[row].measured for row in rows]
                axes.barh(rows, gains, height=0.62, color=COLOURS[colour], label=label)
        if predicted := [(bar.predicted, row) for row, bar in enumerate(bars) if bar.predicted is not None]:
            colours = {"color": COLOURS["vision"], "edgecolors": COLOURS["ink"]}
            axes.scatter(*zip(*predicted, strict=True), s=50, marker="D", label="predicted", zorder=3, **colours)
        for row, bar in enumerate(bars):
            # Inside the bar: beside it, the prediction's marker would claim the figure.
            label = axes.annotate(bar.text, (bar.measured, row), (-7, 0), textcoords="offset points")
            label.set(ha="right", va="center", color=COLOURS["paper"], weight="bold")
        axes.axvline(1.0, color=COLOURS["muted"], linewidth=1.0, linestyle=(0, (4, 3)))
        _label_rows(axes, [bar.label for bar in bars], "prefill speed-up over all tokens on the same engine")

    return draw_axes(title, alt, _size_for(len(bars)), paint)


def draw_mixing(
    title: str, alt: str, image: "Image", grid: tuple[int, int], pictures: Mapping[str, Sequence[float]]
) -> Markup:
    """Draw, over an image, how much each picture's tokens take from each place of a grid."""

    def paint(figure: "Figure") -> None:
        every = figure.subplots(1, len(pictures) + 1)
        extent = (0, grid[1], grid[0], 0)
        every[0].imshow(image, extent=extent)
        every[0].set_title("image", fontsize=10.5)
        for axes, (name, weights) in zip(every[1:], pictures.items(), strict=True):
            values = np.reshape(weights, grid)
            opacity = np.sqrt(values / values.max())
            axes.imshow(image.convert("L"), extent=extent, cmap="gray", alpha=0.35)
            axes.imshow(values, extent=extent, cmap="Blues", alpha=opacity, vmin=-values.max())
            axes.set_title(name, fontsize=10.5)
        for axes in every:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)

    return draw_figure(title, alt, (12.6, 2.4), paint)


def _size_for(num_bars: int) -> tuple[float, float]:
    return 6.2, 1.2 + 0.38 * num_bars


def _label_rows(axes: "Axes", labels: Sequence[str], unit: str) -> None:
    short = [label if len(label) <= _MAX_LABEL else f"{label[: _MAX_LABEL - 1]}…" for label in labels]
    axes.set_yticks(range(len(short)), short)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    axes.set_xlabel(unit)
    axes.grid(axis="x")
