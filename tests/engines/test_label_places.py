"""Labels that lie on nothing."""

from itertools import combinations

import numpy as np
import pytest

from tokexport.engines.label_places import Box, place_labels

FRAME = Box(left=0, low=0, width=400, height=300)
SIZE = (60.0, 12.0)


def box(left: float, low: float, width: float = 10, height: float = 10) -> Box:
    return Box(left=left, low=low, width=width, height=height)


@pytest.mark.parametrize(
    ("other", "meets"),
    [(box(5, 5), True), (box(2, 2, 2, 2), True), (box(10, 0), False), (box(0, 10), False), (box(30, 30), False)],
    ids=["overlapping", "inside", "side by side", "one above the other", "apart"],
)
def test_boxes_meet_where_they_share_an_area(other: Box, meets: bool):
    assert box(0, 0).meets(other) == meets
    assert other.meets(box(0, 0)) == meets


def test_a_lone_label_stands_to_the_right_of_its_point():
    assert place_labels([(100, 100)], [SIZE], [], FRAME, gap=6) == [Box(left=106, low=94, width=60, height=12)]


def test_labels_of_crowded_points_lie_on_nothing():
    rng = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in rng.uniform((100, 100), (220, 160), (16, 2))]
    marks = [box(x - 3, y - 3, 6, 6) for x, y in points]
    placed = [one for one in place_labels(points, [SIZE] * 16, marks, FRAME, gap=6) if one is not None]
    assert len(placed) == 16
    assert not [pair for pair in combinations(placed, 2) if pair[0].meets(pair[1])]
    assert not [one for one in placed for mark in marks if one.meets(mark)]
    assert all(FRAME.holds(one) for one in placed)


def test_a_label_without_room_is_left_out():
    assert place_labels([(5, 5)], [SIZE], [], box(0, 0, 20, 20), gap=6) == [None]
