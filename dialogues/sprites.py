"""Masks of what stands in a scene: drawn shapes, printed letters, handwritten digits.

A mask is 8-bit, cut to its bounds; 255 is fully covered. Fonts and digit samples of the splits are disjoint.
A style changes how a character looks within what people would still call the same, so that a few fonts and writers
teach what all have in common.
"""

import json
import math
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tokexport.dialogues.schema import Split

Mask = NDArray[np.uint8]
Points = list[tuple[float, float]]

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
# Without those that look like a handwritten digit or a drawn shape: B D G I O Q S Z.
LETTERS = ("A", "C", "E", "F", "H", "J", "K", "L", "M", "N", "P", "R", "T", "U", "X", "Y")
DIGITS = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")

FACES: dict[Split, tuple[str, ...]] = {
    "train": (
        "DejaVuSans",
        "DejaVuSansMono-Bold",
        "DejaVuSerif-Bold",
        "STIXGeneral",
        "cmb10",
        "cmr10",
        "cmss10",
        "cmtt10",
    ),
    "validation": ("DejaVuSerif", "DejaVuSansMono"),
    "test": ("DejaVuSans-Bold", "STIXGeneralBol"),
}


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a character differs from its font's or its writer's.

    Attributes:
        stretch: of the width.
        slant: -1 to 1, of the most that is natural: more for what is written by hand.
        weight: 0 to 1, from the strokes as they are to heavy ones.
    """

    stretch: float = 1.0
    slant: float = 0.0
    weight: float = 0.0


PLAIN = Style()
_RNG = np.random.default_rng(0)
# Few enough that masks come again.
STYLES = tuple(
    Style(stretch=_RNG.uniform(0.78, 1.1), slant=_RNG.uniform(-1, 1), weight=_RNG.uniform(0, 1)) for _ in range(48)
)

DIGIT_SIDE = 8
SHEET_COLUMNS = 43

_SUPERSAMPLING = 4
_TRAIN_SHARE, _VALIDATION_SHARE = 0.7, 0.15
# Outlines by which letters are thickened, in supersampled pixels: hairlines would vanish in the noise.
_LETTER_OUTLINE = 2
_MAX_LETTER_ASPECT = 1.15
# The most that a style does: strokes thicker by shares of the height, shear, and grey levels of a digit's ink.
_LETTER_WEIGHT, _LETTER_SLANT, _DIGIT_SLANT, _DIGIT_INK = 0.07, 0.08, 0.25, 45


def shape_mask(shape: str, pixels: int, angle: int) -> Mask:
    """Return the mask of a shape ``pixels`` wide before it is turned by ``angle`` degrees."""
    return _shape_mask(shape, pixels, 0 if shape in ("circle", "ring") else angle)


@cache
def _shape_mask(shape: str, pixels: int, angle: int) -> Mask:
    # Room for a square that is turned.
    side = _SUPERSAMPLING * (2 * pixels)
    # Whole numbers are the centres of pixels, and what is drawn covers the pixels of both ends.
    radius, middle = (_SUPERSAMPLING * pixels - 1) / 2, (side - 1) / 2
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    if shape in ("circle", "ring"):
        draw.ellipse([middle - radius, middle - radius, middle + radius, middle + radius], fill=255)
        if shape == "ring":
            hole = 0.52 * radius
            draw.ellipse([middle - hole, middle - hole, middle + hole, middle + hole], fill=0)
    else:
        cos, sin = radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))
        turned = [(middle + x * cos - y * sin, middle + x * sin + y * cos) for x, y in _outline(shape)]
        # Pillow would cut some ends off and round others up.
        draw.polygon([(round(x), round(y)) for x, y in turned], fill=255)
    return _cut(image)


def _outline(shape: str) -> Points:
    """Return the corners of a shape within -1 to 1, y downwards."""
    arm = 0.34
    match shape:
        case "square":
            return [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
        case "triangle":
            return [(0, -0.95), (1, 0.85), (-1, 0.85)]
        case "diamond":
            return [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)]
        case "cross":
            quarter: Points = [(arm, -1), (arm, -arm), (1, -arm)]
            half = quarter + [(-y, x) for x, y in quarter]
            return half + [(-x, -y) for x, y in half]
        case "star":
            turns = [math.pi * k / 5 for k in range(10)]
            radii = [1.0 if k % 2 == 0 else 0.45 for k in range(10)]
            return [(r * math.sin(t), -r * math.cos(t)) for r, t in zip(radii, turns, strict=True)]
        case _:
            assert shape == "heart", shape
            turns = [math.tau * k / 48 for k in range(48)]
            # The common parametric heart, 32 wide and 29 high, brought to the unit square.
            curve = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
            return [(math.sin(t) ** 3, -(y + 2.5) / 15) for t, y in zip(turns, curve, strict=True)]


# Without styles there are few enough to keep; with them, those of a picture and its labels are.
@lru_cache(maxsize=8192)
def letter_mask(letter: str, pixels: int, angle: int, face: str, style: Style = PLAIN) -> Mask:
    """Return the mask of a letter about ``pixels`` high, turned by ``angle`` degrees; wide ones are less high."""
    left, top, right, bottom = _font(face, 100).getbbox(letter)
    # Heavier strokes grow outwards too, and the letter is not to.
    thicker = style.weight * _LETTER_WEIGHT * pixels
    aspect = style.stretch * (right - left) / (bottom - top)
    height = min(1.0, _MAX_LETTER_ASPECT / aspect) * pixels - thicker
    font = _font(face, round(100 * _SUPERSAMPLING * height / (bottom - top)))
    side = _SUPERSAMPLING * (2 * pixels)
    image = Image.new("L", (side, side))
    outline = _LETTER_OUTLINE + round(_SUPERSAMPLING * thicker / 2)
    ImageDraw.Draw(image).text((side / 2, side / 2), letter, fill=255, font=font, anchor="mm", stroke_width=outline)
    image = _styled(image, style.stretch, _LETTER_SLANT * style.slant)
    return _cut(image.rotate(angle, Image.Resampling.BILINEAR))


def _styled(image: Image.Image, stretch: float, shear: float) -> Image.Image:
    """Return an image stretched and sheared sideways about its middle."""
    if (stretch, shear) == (1, 0):
        return image
    middle = (image.width - 1) / 2
    # Where each pixel comes from.
    across, down = 1 / stretch, shear / stretch
    shift = middle - across * middle - down * middle
    return image.transform(
        image.size, Image.Transform.AFFINE, (across, down, shift, 0, 1, 0), Image.Resampling.BILINEAR
    )


@cache
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf", size)


# Not all of them fit into memory, and they are cheap; this many, so that labels find what the picture used.
@lru_cache(maxsize=256)
def digit_mask(sample: int, pixels: int, style: Style = PLAIN) -> Mask:
    """Return the mask of a handwritten digit, ``pixels`` high with its margins."""
    sheet, _ = _digits()
    row, column = divmod(sample, SHEET_COLUMNS)
    cell = sheet[row * DIGIT_SIDE : (row + 1) * DIGIT_SIDE, column * DIGIT_SIDE : (column + 1) * DIGIT_SIDE]
    image = Image.fromarray(cell).resize((pixels, pixels), Image.Resampling.BICUBIC)
    scaled = np.asarray(_styled(image, style.stretch, _DIGIT_SLANT * style.slant), np.float32)
    # Strokes of one pixel in eight come out pale; the middle greys become full cover and the haze goes.
    return _tight(((scaled - 55 + _DIGIT_INK * style.weight) * 1.65).clip(0, 255).astype(np.uint8))


@cache
def digit_samples(split: Split, value: str) -> tuple[int, ...]:
    """Return the places on the sheet of a split's samples of one digit."""
    _, values = _digits()
    first = round(_TRAIN_SHARE * len(values))
    second = round((_TRAIN_SHARE + _VALIDATION_SHARE) * len(values))
    places = {"train": range(first), "validation": range(first, second), "test": range(second, len(values))}[split]
    return tuple(place for place in places if values[place] == value)


@cache
def _digits() -> tuple[Mask, str]:
    folder = resources.files("tokexport.dialogues") / "assets"
    with (folder / "digits.png").open("rb") as file, Image.open(file) as image:
        sheet = np.asarray(image)
    return sheet, json.loads((folder / "digits.json").read_text(encoding="utf-8"))["values"]


def _cut(image: Image.Image) -> Mask:
    return _tight(np.asarray(image.reduce(_SUPERSAMPLING)))


def _tight(mask: Mask) -> Mask:
    """Return what is covered by a twentieth or more, with the bounds it has."""
    rows, columns = np.flatnonzero(mask.max(1) > 12), np.flatnonzero(mask.max(0) > 12)
    cut = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].copy()
    cut.flags.writeable = False
    return cut
