"""Where the labels of points go, so that none lies on another or on a point.

All sizes are in one unit, e.g. pixels of a drawing.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_DIRECTIONS = 16
_RINGS = 14


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangle with sides along the axes."""

    left: float
    low: float
    width: float
    height: float

    def meets(self, other: "Box") -> bool:
        """Return whether the two share an area."""
        is_beside = self.left + self.width <= other.left or other.left + other.width <= self.left
        is_above = self.low + self.height <= other.low or other.low + other.height <= self.low
        return not (is_beside or is_above)

    def holds(self, other: "Box") -> bool:
        """Return whether the other lies within."""
        is_within = self.left <= other.left and other.left + other.width <= self.left + self.width
        return is_within and self.low <= other.low and other.low + other.height <= self.low + self.height


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[Box],
    frame: Box,
    *,
    gap: float,
) -> list[Box | None]:
    """Return the box of each label, near its point, None where there is no room.

    Labels are placed one after the other, each at the free place next to its point, tried in rings around it.

    Args:
        points: what is labelled.
        sizes: width and height of each label.
        obstacles: what no label may lie on, the points' own marks among it.
        frame: in which all labels lie.
        gap: from a point to the nearest place of its label, and from one ring to the next.
    """
    taken = list(obstacles)
    placed: list[Box | None] = []
    for point, size in zip(points, sizes, strict=True):
        free = (
            box for box in _places(point, size, gap) if frame.holds(box) and not any(box.meets(one) for one in taken)
        )
        box = next(free, None)
        placed.append(box)
        if box is not None:
            taken.append(box)
    return placed


def _places(point: tuple[float, float], size: tuple[float, float], gap: float) -> Iterator[Box]:
    """Yield boxes around a point, the nearest first: beside it to the right, then around."""
    (x, y), (width, height) = point, size
    for ring in range(1, _RINGS + 1):
        for step in range(_DIRECTIONS):
            # 0, 1, -1, 2, -2, ...: what reads best, to the right, comes first.
            turn = (step + 1) // 2 * (1 if step % 2 else -1)
            angle = 2 * math.pi * turn / _DIRECTIONS
            right, up = math.cos(angle), math.sin(angle)
            # The side of the box that faces the point lies on the ring.
            left = x + ring * gap * right - width * (1 - right) / 2
            low = y + ring * gap * up - height * (1 - up) / 2
            yield Box(left=left, low=low, width=width, height=height)
