"""Windows over vision tokens: which are found for a count, and what is refused."""

import pytest

from tests.exporter.test_methods import FULL, SPEC
from tokexport.errors import RecipeError, nearest_numbers
from tokexport.exporter.method import Method, load_method
from tokexport.exporter.methods.pool import Pool
from tokexport.exporter.plan import TokenPlan
from tokexport.exporter.windows import Windows, fitting

LARGE = TokenPlan(emitted=576, entering_llm=576, per_layer=(576,) * 4, grid=(24, 24))


@pytest.mark.parametrize(
    ("number", "choices", "expected"), [(5, (8, 2), "2 or 8"), (1, (4, 2), "2"), (9, (2, 4), "4"), (5, (), "")]
)
def test_the_nearest_numbers_are_those_on_both_sides(number: int, choices: tuple[int, ...], expected: str):
    assert nearest_numbers(number, choices) == expected


@pytest.mark.parametrize("length", [2, 3, 10, 24, 576])
def test_every_count_along_an_axis_can_be_met(length: int):
    for count in range(1, length + 1):
        kernel, stride = fitting(length, count)
        assert Windows((length,), (kernel,), (stride,)).count == count
        assert 1 <= kernel <= length
        assert stride >= 1


@pytest.mark.parametrize(
    ("length", "count", "expected"),
    [(24, 8, (3, 3)), (24, 24, (1, 1)), (24, 1, (24, 24)), (576, 144, (4, 4)), (24, 7, (4, 3)), (10, 3, (3, 3))],
)
def test_windows_tile_where_they_can(length: int, count: int, expected: tuple[int, int]):
    assert fitting(length, count) == expected


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep": 64}, (8, 8)),
        ({"keep": 56}, (7, 8)),
        ({"keep": 0.1}, (7, 8)),
        ({"keep": 0.3}, (7, 24)),
        ({"keep": 192}, (8, 24)),
        ({"keep": 100}, (5, 20)),
        ({"keep": 0.7}, (17, 24)),
        ({"keep": 58, "pattern": "stride"}, (58,)),
        ({"keep": 0.1, "pattern": "stride"}, (58,)),
        ({"kernel": 4, "stride": 4}, (6, 6)),
        ({"kernel": 6, "stride": 3}, (7, 7)),
        ({"kernel": 10, "stride": 10, "pattern": "stride"}, (57,)),
    ],
)
def test_windows_make_what_is_asked_for(options: dict[str, object], kept: tuple[int, ...]):
    method = Pool(**options)  # type: ignore[arg-type]
    windows = method.windows(LARGE)
    assert windows.kept == kept
    plan = method.plan(SPEC, LARGE)
    assert plan.entering_llm == windows.count
    assert plan.grid == (kept if len(kept) == 2 else None)


def test_of_grids_with_as_many_windows_the_nearest_to_a_tiling_is_taken():
    for count in (144, 168, 192):
        found = Pool(keep=count).windows(LARGE)
        assert found.overlap == (1 if count == 168 else 0)
        for rows in (rows for rows in range(1, 25) if count % rows == 0 and count // rows <= 24):
            along = [fitting(24, rows), fitting(24, count // rows)]
            assert found.overlap <= sum(abs(kernel - stride) for kernel, stride in along)


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        (Windows((10,), (3,), (3,)), (1, 4, 7)),
        (Windows((10,), (4,), (2,)), (1, 3, 5, 7)),
        (Windows((4, 6), (2, 3), (2, 3)), (1, 4, 13, 16)),
        (Windows((3, 3), (3, 1), (1, 1)), (3, 4, 5)),
    ],
)
def test_the_middle_of_a_window_is_its_place(windows: Windows, expected: tuple[int, ...]):
    assert windows.centres == expected
    assert len(expected) == windows.count


def test_merged_tokens_stand_in_the_middle_of_their_windows_or_side_by_side():
    kept = Pool(keep=64, positions="keep").plan(SPEC, LARGE)
    assert kept.places is not None
    assert kept.places[:9] == (25, 28, 31, 34, 37, 40, 43, 46, 97)
    assert kept.num_positions == 576
    apart = Pool(keep=64).plan(SPEC, LARGE)
    assert (apart.places, apart.num_positions) == (None, 64)
    # A second method thins what the first one left.
    assert Pool(keep=4, positions="keep").plan(SPEC, kept).places == tuple(kept.places[i] for i in (9, 13, 41, 45))


@pytest.mark.parametrize(
    ("options", "arriving", "message"),
    [
        (
            {"keep": 58},
            LARGE,
            "no kernel and stride over 24 x 24 tokens make 58; keep 57 or 60, or lay the windows along the sequence "
            'with pattern = "stride"',
        ),
        ({"keep": 576}, LARGE, "keep = 576 keeps all 576 vision tokens that arrive and has no effect"),
        ({"keep": 0}, LARGE, "keep = 0 leaves 0 of 576 vision tokens"),
        ({"keep": 600}, LARGE, "keep = 600 is more than the 576 vision tokens that arrive"),
        ({"keep": 1.5}, LARGE, "keep = 1.5 must lie between 0 and 1 as a fraction"),
        ({}, LARGE, "nothing is given, expected either keep, or kernel and stride"),
        ({"keep": 8, "kernel": 2, "stride": 2}, LARGE, "keep and kernel and stride is given, expected either keep"),
        ({"kernel": 2}, LARGE, "kernel is given, expected either keep, or kernel and stride"),
        (
            {"kernel": 25, "stride": 1},
            LARGE,
            "kernel = 25 and stride = 1 must be at least 1, and the kernel at most 24",
        ),
        ({"kernel": 2, "stride": 0}, LARGE, "kernel = 2 and stride = 0 must be at least 1"),
        ({"kernel": 1, "stride": 1}, LARGE, "kernel = 1 and stride = 1 make keep = 576 keeps all 576"),
        (
            {"keep": 4},
            TokenPlan(emitted=16, entering_llm=8, per_layer=(8,) * 4),
            'pattern = "grid" needs a full grid of tokens, which an earlier method broke',
        ),
    ],
)
def test_what_windows_cannot_make_is_refused(options: dict[str, object], arriving: TokenPlan, message: str):
    with pytest.raises(RecipeError) as caught:
        Pool(**options).plan(SPEC, arriving)  # type: ignore[arg-type]
    assert str(caught.value).startswith("[[compress]] pool: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["pool", "metacompress"])
def test_windows_behind_other_windows(name: str):
    method_class: type[Method] = load_method(name)
    options = {"weights": "untrained"} if name == "metacompress" else {}
    first, second = (method_class(keep=keep, **options) for keep in (9, 4))  # type: ignore[call-arg]
    plan = second.plan(SPEC, first.plan(SPEC, FULL))
    assert (plan.emitted, plan.entering_llm, plan.grid) == (16, 4, (2, 2))
