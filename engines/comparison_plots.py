"""The plots of a comparison: accuracy against what it costs, and which patches of an image stay."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup
from PIL import Image

from tokexport.engines.drawing import COLOURS, draw_axes
from tokexport.engines.kept_tokens import KeptStage
from tokexport.engines.label_places import Box, place_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (12.6, 5.6)
_LABEL_SIZE = 9.0
# Of the longer side of a picture, in pixels of the page's drawings.
_SIDE = 168
_DARKEST = 215


@dataclass(frozen=True, kw_only=True)
class ParetoPoint:
    """A recipe in a plot: its accuracy with a 95 % interval, in percent, against a cost."""

    label: str
    cost: float
    accuracy: float
    interval: tuple[float, float]
    is_control: bool


def pareto_set(points: Sequence[ParetoPoint]) -> list[ParetoPoint]:
    """Return those that no other beats, by ascending cost: none costs as little and answers as well or better."""
    best: list[ParetoPoint] = []
    for point in sorted(points, key=lambda one: (one.cost, -one.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best


def draw_pareto(title: str, alt: str, points: Sequence[ParetoPoint], cost: str) -> Markup:
    """Draw accuracy against a cost, with the set that no other recipe beats on a line."""
    best = pareto_set(points)

    def paint(axes: "Axes") -> None:
        axes.plot(
            [point.cost for point in best],
            [point.accuracy for point in best],
            drawstyle="steps-post",
            color=COLOURS["kept"],
            linewidth=1.2,
            alpha=0.6,
        )
        groups = {
            ("kept", "D", "on the Pareto set"): best,
            ("vision", "o", "method"): [one for one in points if one not in best and not one.is_control],
            ("control", "s", "control"): [one for one in points if one not in best and one.is_control],
        }
        for (colour, marker, label), members in groups.items():
            if members:
                _paint_points(axes, members, COLOURS[colour], marker, label)
        axes.set_xlabel(cost)
        axes.set_ylabel("accuracy, % of the questions")
        axes.margins(x=0.12, y=0.1)
        axes.grid(visible=True)

    return draw_axes(title, alt, _SIZE, paint, lambda axes: _label_points(axes, points, best))


def draw_kept(stage: KeptStage, grid: tuple[int, int], image_id: str, title: str) -> Markup:
    """Draw a stage over an image that stands in the page under an id: the darker a patch, the less of it stays."""
    rows, columns = grid
    weights = np.reshape(stage.weight_N, grid)
    shares = weights / weights.max()
    darkness = np.round(_DARKEST * (1 - np.sqrt(shares))).astype(np.uint8)
    veil = Image.fromarray(np.stack([np.zeros_like(darkness)] * 3 + [darkness], axis=-1), "RGBA")
    lines = "".join(f"M{_SIDE * at / columns:.3g} 0V{_SIDE}" for at in range(1, columns)) + "".join(
        f"M0 {_SIDE * at / rows:.3g}H{_SIDE}" for at in range(1, rows)
    )
    return Markup(
        '<svg viewBox="0 0 {side} {side}" role="img" aria-label="{title}"><title>{title}</title>'
        '<use href="#{image_id}"/><image href="{veil}" width="{side}" height="{side}" preserveAspectRatio="none" '
        'style="image-rendering: pixelated"/><path d="{lines}" class="cells"/></svg>'
    ).format(side=_SIDE, title=title, image_id=image_id, veil=_data_uri(veil), lines=lines)


def define_images(images: Mapping[str, Image.Image]) -> Markup:
    """Return a drawing that is not seen and holds images under their ids, so that each stands in the page once."""
    drawn = Markup().join(
        Markup('<image id="{}" href="{}" width="{}" height="{}" preserveAspectRatio="none"/>').format(
            name, _data_uri(image.resize((2 * _SIDE, 2 * _SIDE))), _SIDE, _SIDE
        )
        for name, image in images.items()
    )
    return Markup('<svg width="0" height="0" aria-hidden="true"><defs>{}</defs></svg>').format(drawn)


def _paint_points(axes: "Axes", points: Sequence[ParetoPoint], colour: str, marker: str, label: str) -> None:
    costs, accuracies = [point.cost for point in points], [point.accuracy for point in points]
    spread = [
        [point.accuracy - point.interval[0] for point in points],
        [point.interval[1] - point.accuracy for point in points],
    ]
    axes.errorbar(costs, accuracies, yerr=spread, fmt="none", ecolor=colour, elinewidth=1.2, alpha=0.7)
    axes.scatter(costs, accuracies, s=34, marker=marker, color=colour, label=label, zorder=3)


def _label_points(axes: "Axes", points: Sequence[ParetoPoint], best: Sequence[ParetoPoint]) -> None:
    """Write the label of every point where it lies on nothing else, with a line to its point where it is far."""
    from matplotlib.text import Text

    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout settles the axes, and so where points lie in pixels
    figure.set_layout_engine("none")
    spots = [_spot(axes, one.cost, one.accuracy) for one in points]
    unit = figure.dpi / 72
    marks = [Box(left=x - 4 * unit, low=y - 4 * unit, width=8 * unit, height=8 * unit) for x, y in spots]
    bars = [_bar(axes, one, unit) for one in points]
    stairs = [step for pair in pairwise(best) for step in _stairs(axes, *pair)]
    texts: list[Text] = []
    for point in points:
        weight = "bold" if point in best else "normal"
        texts.append(axes.text(point.cost, point.accuracy, point.label, fontsize=_LABEL_SIZE, weight=weight))
    sizes = [(box.width + 2 * unit, box.height) for box in (text.get_window_extent() for text in texts)]
    area = axes.get_window_extent()
    frame = Box(left=area.x0, low=area.y0, width=area.width, height=area.height)
    placed = place_labels(spots, sizes, [*marks, *bars, *stairs], frame, gap=6 * unit)
    for text, spot, box in zip(texts, spots, placed, strict=True):
        if box is None:
            text.remove()
            continue
        corner = axes.transData.inverted().transform((box.left + unit, box.low))
        text.set_position((float(corner[0]), float(corner[1])))
        text.set_verticalalignment("bottom")
        _join(axes, spot, box, unit)


def _spot(axes: "Axes", cost: float, accuracy: float) -> tuple[float, float]:
    """Return where in the drawing a value lies, in pixels."""
    x, y = axes.transData.transform((cost, accuracy))
    return float(x), float(y)


def _bar(axes: "Axes", point: ParetoPoint, unit: float) -> Box:
    (x, low), (_, high) = (_spot(axes, point.cost, end) for end in point.interval)
    return Box(left=x - unit, low=low, width=2 * unit, height=high - low)


def _stairs(axes: "Axes", before: ParetoPoint, after: ParetoPoint) -> tuple[Box, Box]:
    """Return the line between two points of the Pareto set: along the cost, then up."""
    (left, low), (right, high) = (_spot(axes, one.cost, one.accuracy) for one in (before, after))
    along = Box(left=left, low=low - 1, width=right - left, height=2)
    return along, Box(left=right - 1, low=low, width=2, height=high - low)


def _join(axes: "Axes", spot: tuple[float, float], box: Box, unit: float) -> None:
    """Draw a line from a point to its label, unless they lie side by side."""
    near = (
        min(max(spot[0], box.left), box.left + box.width),
        min(max(spot[1], box.low), box.low + box.height),
    )
    if np.hypot(near[0] - spot[0], near[1] - spot[1]) > 10 * unit:
        ends = axes.transData.inverted().transform([spot, near])
        axes.plot(ends[:, 0], ends[:, 1], color=COLOURS["muted"], linewidth=0.6, zorder=1)


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
