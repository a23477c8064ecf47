"""A made picture: what is in it, how it is painted, and what every patch of it shows.

A scene is plain data. The same scene is always painted the same.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from statistics import NormalDist
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokexport.dialogues.schema import Split
from tokexport.dialogues.sprites import (
    DIGITS,
    FACES,
    LETTERS,
    PLAIN,
    SHAPES,
    STYLES,
    Mask,
    Style,
    digit_mask,
    digit_samples,
    letter_mask,
    shape_mask,
)

Kind = Literal["shape", "letter", "digit"]
Size = Literal["small", "large"]
Rgb = tuple[int, int, int]
Item = TypeVar("Item")

SIDE = 336
PATCH = 14
CELL = 56
# Middles of objects stand at multiples of half a patch: on a patch, or between two or four. At any pixel, a tower as
# small as the mini model's would have to learn every object 196 times.
STEP = PATCH // 2
MIN_OBJECTS, MAX_OBJECTS = 4, 10

COLOURS: dict[str, Rgb] = {
    "red": (215, 30, 35),
    "green": (45, 165, 55),
    "blue": (40, 80, 235),
    "yellow": (252, 222, 15),
    "orange": (250, 130, 20),
    "purple": (155, 45, 195),
    "white": (248, 248, 248),
    "black": (18, 18, 18),
}
BACKGROUNDS: dict[str, Rgb] = {
    "grey": (142, 142, 142),
    "sand": (205, 185, 145),
    "navy": (28, 38, 78),
    "brown": (104, 72, 50),
    "pink": (232, 178, 194),
    "teal": (35, 115, 125),
}
# Grey is neither.
BRIGHTNESS = {"sand": "bright", "pink": "bright", "navy": "dark", "brown": "dark", "teal": "dark"}
TEXTURES = ("plain", "stripes", "dots")
SIZES: tuple[Size, ...] = ("small", "large")
CATEGORIES = SHAPES + LETTERS + DIGITS

_PIXELS: dict[tuple[bool, Size], tuple[int, int]] = {
    (True, "small"): (14, 18),
    (True, "large"): (28, 36),
    (False, "small"): (18, 21),
    (False, "large"): (28, 36),
}
_SHAPE_SHARE, _LETTER_SHARE, _SMALL_SHARE, _FREE_SHARE = 0.5, 0.25, 0.55, 0.3
_SHAPE_ANGLE, _LETTER_ANGLE = 12, 4
_COLOUR_SPREAD = 12
# Of free places, in pixels between two objects and to the edge.
_GAP = 5
_MIN_CONTRAST = 205


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One object: what it is, and where its bounds begin in pixels."""

    category: str
    colour: str
    size: Size
    rgb: Rgb
    pixels: int
    angle: int = 0
    # A letter's font face, a digit's place on the sheet.
    source: str | int = ""
    style: Style = PLAIN
    left: int = 0
    top: int = 0

    @cached_property
    def kind(self) -> Kind:
        """Whether it is a shape, a letter or a digit."""
        if self.category in SHAPES:
            return "shape"
        return "letter" if self.category in LETTERS else "digit"

    @cached_property
    def mask(self) -> Mask:
        """How much of every pixel within its bounds it covers."""
        if isinstance(self.source, int):
            return digit_mask(self.source, self.pixels, self.style)
        if self.source:
            return letter_mask(self.category, self.pixels, self.angle, self.source, self.style)
        return shape_mask(self.category, self.pixels, self.angle)

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom, the last two exclusive."""
        height, width = self.mask.shape
        return self.left, self.top, self.left + width, self.top + height

    @cached_property
    def centre(self) -> tuple[float, float]:
        """The middle of its bounds, x and y."""
        left, top, right, bottom = self.bounds
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True, kw_only=True)
class Background:
    """What lies behind the objects; levels of brightness are of 255."""

    colour: str
    texture: str
    texture_angle: float
    texture_spacing: float
    texture_phase: float
    texture_level: float
    gradient_angle: float
    gradient_level: float
    noise_level: float
    noise_seed: int


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A background and the objects on it, which do not overlap."""

    background: Background
    objects: tuple[SceneObject, ...]

    @cached_property
    def num_of(self) -> Counter[tuple[str, ...]]:
        """How many objects have a category, a colour, a size, or a colour and a category or kind."""
        counts: Counter[tuple[str, ...]] = Counter()
        for item in self.objects:
            counts.update([(item.category,), (item.colour,), (item.size,), (item.kind,)])
            counts.update([(item.colour, item.category), (item.colour, item.kind), (item.size, item.kind)])
        return counts


@dataclass(frozen=True, kw_only=True)
class PatchLabels:
    """What every patch shows, row by row; 0 is background.

    ``category`` counts ``CATEGORIES`` from 1, ``colour`` counts ``COLOURS`` from 1, ``size`` is 1 for small and
    2 for large, all (24, 24). ``background`` and ``texture`` count ``BACKGROUNDS`` and ``TEXTURES`` from 0.
    """

    category: NDArray[np.int64]
    colour: NDArray[np.int64]
    size: NDArray[np.int64]
    background: int
    texture: int


def pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    """Return one item, all equally likely."""
    return items[int(rng.integers(len(items)))]


@cache
def palette(background: str) -> tuple[str, ...]:
    """Return the colours that stand out from a background."""
    weights = np.array([2, 4, 3])
    behind = np.array(BACKGROUNDS[background])
    distances = {name: math.sqrt((weights * (np.array(rgb) - behind) ** 2).sum()) for name, rgb in COLOURS.items()}
    return tuple(name for name, distance in distances.items() if distance >= _MIN_CONTRAST)


def make_scene(
    rng: np.random.Generator,
    split: Split,
    *,
    min_objects: int = MIN_OBJECTS,
    max_objects: int = MAX_OBJECTS,
    is_for_questions: bool = True,
    is_styled: bool = False,
) -> Scene:
    """Draw a scene, by default one whose objects can be told apart in words: see ``_can_be_told_apart``.

    A split has its own font faces and digit samples, of which styles make many more. Crowded scenes for no questions
    stand in cells.
    """
    assert max_objects <= MAX_OBJECTS or not is_for_questions, "so many objects cannot be told apart"
    background = _draw_background(rng)
    while True:
        num_objects = int(rng.integers(min_objects, max_objects + 1))
        drawn = _draw_objects(rng, split, num_objects, palette(background.colour), STYLES if is_styled else (PLAIN,))
        if not is_for_questions or _can_be_told_apart(drawn):
            break
    is_free = num_objects <= MAX_OBJECTS and rng.random() < _FREE_SHARE
    placed = _place_freely(rng, drawn) if is_free else _place_in_cells(rng, drawn)
    return Scene(background=background, objects=tuple(placed))


def _draw_background(rng: np.random.Generator) -> Background:
    return Background(
        colour=pick(rng, tuple(BACKGROUNDS)),
        texture=pick(rng, TEXTURES),
        texture_angle=rng.uniform(0, math.pi),
        texture_spacing=rng.uniform(20, 30),
        texture_phase=rng.uniform(0, 30),
        texture_level=rng.uniform(15, 24) * pick(rng, (-1, 1)),
        gradient_angle=rng.uniform(0, math.tau),
        gradient_level=rng.uniform(0, 20),
        noise_level=rng.uniform(2, 11),
        noise_seed=int(rng.integers(2**32)),
    )


def _draw_objects(
    rng: np.random.Generator, split: Split, num_objects: int, colours: tuple[str, ...], styles: Sequence[Style]
) -> list[SceneObject]:
    # Few shapes and few colours a scene, so that some occur more than once and some never.
    num_shapes, num_colours = int(rng.integers(3, 6)), int(rng.integers(3, 6))
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:num_shapes]]
    colours = tuple(colours[i] for i in rng.permutation(len(colours))[:num_colours])
    drawn: list[SceneObject] = []
    for _ in range(num_objects):
        which, size = rng.random(), SIZES[int(rng.random() >= _SMALL_SHARE)]
        is_shape = which < _SHAPE_SHARE
        source: str | int = ""
        if is_shape:
            category = pick(rng, shapes)
        elif which < _SHAPE_SHARE + _LETTER_SHARE:
            category = pick(rng, LETTERS)
            source = pick(rng, FACES[split])
        else:
            category = pick(rng, DIGITS)
            source = pick(rng, digit_samples(split, category))
        most = _SHAPE_ANGLE if is_shape else _LETTER_ANGLE
        low, high = _PIXELS[is_shape, size]
        colour = pick(rng, colours)
        shift = rng.integers(-_COLOUR_SPREAD, _COLOUR_SPREAD + 1, 3)
        red, green, blue = (min(255, max(0, int(x))) for x in COLOURS[colour] + shift)
        drawn.append(
            SceneObject(
                category=category,
                colour=colour,
                size=size,
                rgb=(red, green, blue),
                pixels=int(rng.integers(low, high + 1)),
                # Even degrees, so that there are few enough masks to keep.
                angle=2 * int(rng.integers(-most // 2, most // 2 + 1)),
                source=source,
                style=PLAIN if is_shape or len(styles) == 1 else pick(rng, styles),
            )
        )
    return drawn


def _can_be_told_apart(objects: Sequence[SceneObject]) -> bool:
    """Whether two shapes have no twin, one letter or digit has its colour alone, and three objects can be named."""
    of_category = Counter(item.category for item in objects)
    of_kind = Counter((item.kind, item.colour) for item in objects)
    single = [item for item in objects if of_category[item.category] == 1]
    return (
        sum(item.kind == "shape" for item in single) >= 2
        and any(count == 1 and kind != "shape" for (kind, _), count in of_kind.items())
        and len(single) >= 3
    )


def _place_in_cells(rng: np.random.Generator, objects: Sequence[SceneObject]) -> list[SceneObject]:
    num_columns = SIDE // CELL
    placed: list[SceneObject] = []
    for item, cell in zip(objects, rng.permutation(num_columns**2), strict=False):
        row, column = divmod(int(cell), num_columns)
        height, width = item.mask.shape
        left = _snapped(rng, column * CELL, CELL, width)
        top = _snapped(rng, row * CELL, CELL, height)
        placed.append(replace(item, left=left, top=top))
    return placed


def _place_freely(rng: np.random.Generator, objects: Sequence[SceneObject]) -> list[SceneObject]:
    placed: list[SceneObject] = []
    for item in objects:
        height, width = item.mask.shape
        while True:
            left = _snapped(rng, _GAP, SIDE - 2 * _GAP, width)
            top = _snapped(rng, _GAP, SIDE - 2 * _GAP, height)
            if not any(_is_near(other, left, top, left + width, top + height) for other in placed):
                break
        placed.append(replace(item, left=left, top=top))
    return placed


def _snapped(rng: np.random.Generator, start: int, room: int, length: int) -> int:
    """Draw where something of a length begins within some room, its middle at a multiple of ``STEP``."""
    first = -(-(start + length // 2) // STEP)
    last = (start + room - length + length // 2) // STEP
    return STEP * int(rng.integers(first, last + 1)) - length // 2


def _is_near(other: SceneObject, left: int, top: int, right: int, bottom: int) -> bool:
    x0, y0, x1, y1 = other.bounds
    return left < x1 + _GAP and right > x0 - _GAP and top < y1 + _GAP and bottom > y0 - _GAP


@cache
def _axes() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the columns (1, side) and the rows (side, 1), from the middle of the image."""
    line = np.arange(SIDE, dtype=np.float32) - SIDE / 2
    return line[None, :], line[:, None]


def render(scene: Scene) -> Image.Image:
    """Paint a scene as 336 x 336 RGB."""
    background = scene.background
    columns, rows = _axes()
    cos, sin = math.cos(background.gradient_angle), math.sin(background.gradient_angle)
    scale = 2 * background.gradient_level / SIDE
    level = (columns * np.float32(scale * cos)) + (rows * np.float32(scale * sin))
    if background.texture != "plain":
        level += _texture(background)
    canvas = level[:, :, None] + np.array(BACKGROUNDS[background.colour], np.float32)
    for item in scene.objects:
        left, top, right, bottom = item.bounds
        under = canvas[top:bottom, left:right]
        cover = item.mask[:, :, None] * np.float32(1 / 255)
        under += cover * (np.array(item.rgb, np.float32) - under)
    canvas += _noise(background, canvas.shape)
    np.clip(canvas, 0, 255, out=canvas)
    return Image.fromarray(canvas.astype(np.uint8))


@cache
def _gaussian_steps() -> NDArray[np.float32]:
    """Return the normal distribution in 256 equally likely steps."""
    return np.array([NormalDist().inv_cdf((step + 0.5) / 256) for step in range(256)], np.float32)


def _noise(background: Background, shape: tuple[int, ...]) -> NDArray[np.float32]:
    # Steps by random bytes: exact normal numbers would take more time than the rest of the picture.
    rng = np.random.Generator(np.random.SFC64(background.noise_seed))
    steps = rng.integers(0, 256, shape, np.uint8)
    return (_gaussian_steps() * np.float32(background.noise_level))[steps]


def _texture(background: Background) -> NDArray[np.float32]:
    """Return lines or dots of some pixels in width as levels of brightness (side, side)."""
    columns, rows = _axes()
    spacing, half = np.float32(background.texture_spacing), np.float32(background.texture_spacing / 2)
    cos, sin = np.float32(math.cos(background.texture_angle)), np.float32(math.sin(background.texture_angle))
    across = columns * cos + rows * sin + np.float32(background.texture_phase)
    distance = np.abs(across % spacing - half)
    width = np.float32(2.0)
    if background.texture == "dots":
        along = columns * -sin + rows * cos
        distance = np.hypot(distance, along % spacing - half)
        width = np.float32(3.5)
    return (width + np.float32(0.5) - distance).clip(0, 1) * np.float32(background.texture_level)


def cover(scene: Scene) -> NDArray[np.uint8]:
    """Return how much of every pixel objects cover, (336, 336), 255 for all of it."""
    covered = np.zeros((SIDE, SIDE), np.uint8)
    for item in scene.objects:
        left, top, right, bottom = item.bounds
        window = covered[top:bottom, left:right]
        np.maximum(window, item.mask, out=window)
    return covered


def patch_labels(scene: Scene, patch: int = PATCH) -> PatchLabels:
    """Say of every patch which object it shows.

    A patch shows the object that covers most of it, if that is at least 12 % of the patch or at least 15 % of the
    object.
    """
    num_rows = SIDE // patch
    # Row 0 is what a patch shows without an object.
    covered = np.zeros((len(scene.objects) + 1, num_rows, num_rows))
    for i, item in enumerate(scene.objects, start=1):
        left, top, right, bottom = item.bounds
        first_row, first_column = top // patch, left // patch
        num_down, num_across = -(-bottom // patch) - first_row, -(-right // patch) - first_column
        window = np.zeros((num_down * patch, num_across * patch))
        y, x = top - first_row * patch, left - first_column * patch
        window[y : y + bottom - top, x : x + right - left] = item.mask / 255
        area = window.reshape(num_down, patch, num_across, patch).sum(axis=(1, 3))
        is_shown = (area >= 0.12 * patch**2) | (area >= 0.15 * area.sum())
        covered[i, first_row : first_row + num_down, first_column : first_column + num_across] = area * is_shown
    shown = covered.argmax(axis=0)
    colours, sizes = list(COLOURS), list(SIZES)
    return PatchLabels(
        category=np.array([0, *(CATEGORIES.index(item.category) + 1 for item in scene.objects)])[shown],
        colour=np.array([0, *(colours.index(item.colour) + 1 for item in scene.objects)])[shown],
        size=np.array([0, *(sizes.index(item.size) + 1 for item in scene.objects)])[shown],
        background=list(BACKGROUNDS).index(scene.background.colour),
        texture=TEXTURES.index(scene.background.texture),
    )
