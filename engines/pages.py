"""What every page is made with: templates, drawings with words, and figures the way they are written everywhere."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

DASH = "\N{EN DASH}"


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawing with its title and the line under it; what it shows in words is inside the SVG."""

    title: str
    caption: str
    svg: Markup


def page_environment(**settings: Any) -> Environment:
    """Return what renders the templates; settings are those of jinja2."""
    environment = Environment(
        loader=PackageLoader("tokexport.engines"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **settings,
    )
    environment.filters |= {
        "ms": ms_text,
        "size": size_text,
        "times": times_text,
        "percent": percent_text,
        "count": count_text,
        "number": number_text,
        "cosine": cosine_text,
        "typeset": typeset,
    }
    return environment


def ms_text(value: float | None) -> str:
    """Return milliseconds without their unit."""
    if value is None:
        return DASH
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size_text(num_bytes: float | None) -> str:
    """Return bytes with a unit."""
    if num_bytes is None:
        return DASH
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def flops_text(value: float) -> str:
    """Return FLOPs with a unit."""
    return f"{value / 1e12:.3g} TFLOP" if value >= 1e12 else f"{value / 1e9:.3g} GFLOP"


def percent_text(share: float | None) -> str:
    """Return a part of one in percent."""
    if share is None:
        return DASH
    return f"{100 * share:,.0f} %" if share >= 1 else f"{100 * share:.3g} %"


def times_text(value: float | None) -> str:
    """Return a factor."""
    return DASH if value is None else f"{value:.2f}x"


def change_text(reduction: float) -> str:
    """Return what a reduction of a part of one is in percent, with its sign."""
    return "0 %" if abs(reduction) < 5e-4 else f"{-100 * reduction:+.1f} %"


def count_text(value: float | None) -> str:
    """Return a number of tokens, which may be a mean."""
    return DASH if value is None else f"{value:.1f}".removesuffix(".0")


def number_text(value: float | None) -> str:
    """Return a figure of any size."""
    if value is None:
        return DASH
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def cosine_text(value: float | None) -> str:
    """Return a figure near one."""
    return DASH if value is None else f"{value:.7f}"


def setting_rows(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return settings by their names, both in words."""
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        name = key.removesuffix("_bytes")
        if isinstance(value, list | tuple):
            text = ", ".join(map(str, cast("Sequence[object]", value))) or "none"
        else:
            text = size_text(value) if name != key else str(value)
        rows.append((name.replace("_", " "), text))
    return rows


def escape_markdown(value: object) -> object:
    """Return text in which nothing means something to Markdown; other values as they are."""
    return re.sub(r"([\\`*\[\]<|])", r"\\\1", " ".join(value.splitlines())) if isinstance(value, str) else value


def typeset(text: str) -> str:
    """Give formatted figures their typographic signs and keep a figure and its unit on one line."""
    text = re.sub(r"(\d)x(?!\w)", "\\1\N{MULTIPLICATION SIGN}", text.replace("->", "\N{RIGHTWARDS ARROW}"))
    text = re.sub(r"(?<![^\s(])-(?=\d)", "\N{MINUS SIGN}", text)
    return re.sub(r"(?<=[\d\u00d7]) (?=%|ms\b|[KMGT]B\b|[GT]FLOP\b)", "\N{NO-BREAK SPACE}", text)
