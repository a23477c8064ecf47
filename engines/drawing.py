"""Drawings as SVG that stands inside an HTML page and takes its colours and letters from it."""

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholders: in the SVG they become the page's CSS colours of these names, so that one drawing
# reads well on light and on dark.
_NAMES = ("paper", "ink", "muted", "rule", "kept", "gone", "vision", "control")
COLOURS = {name: f"#01020{number}" for number, name in enumerate(_NAMES)}


def draw_axes(
    title: str,
    alt: str,
    size: tuple[float, float],
    paint: Callable[["Axes"], None],
    finish: Callable[["Axes"], None] | None = None,
) -> Markup:
    """Paint into one pair of axes, ``size`` inches wide and high; ``finish`` what needs to know where all else lies."""

    def paint_all(figure: "Figure") -> None:
        axes = figure.subplots()
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        paint(axes)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, handlelength=1.0)
        if finish is not None:
            finish(axes)

    return draw_figure(title, alt, size, paint_all)


def draw_figure(title: str, alt: str, size: tuple[float, float], paint: Callable[["Figure"], None]) -> Markup:
    """Paint into a figure, ``size`` inches wide and high."""
    # Imported here: it takes half a second that the rest of the program need not wait for.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "text.parse_math": False,
        "axes.axisbelow": True,
        "text.color": COLOURS["ink"],
        "axes.labelcolor": COLOURS["muted"],
        "xtick.color": COLOURS["muted"],
        "ytick.color": COLOURS["ink"],
        "grid.color": COLOURS["rule"],
        "font.size": 10.5,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return _inlined(buffer.getvalue(), title, alt)


def _inlined(svg: str, title: str, alt: str) -> Markup:
    """Return a drawing without what belongs to a file: prolog, namespaces, page-wide styles, common ids."""
    drawing = svg[svg.index("<svg") :]
    drawing = re.sub(r"<style.*?</style>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing).replace("xlink:href=", "href=")
    for name, colour in COLOURS.items():
        drawing = drawing.replace(colour, f"var(--{name})")
    view_box = re.search(r'viewBox="[^"]*"', drawing)
    assert view_box is not None
    head = Markup('<svg {} role="img" aria-label="{}"><title>{}</title>').format(Markup(view_box.group()), alt, title)
    # matplotlib escaped every label that it wrote.
    return head + Markup(drawing[drawing.index(">") + 1 :].strip())
