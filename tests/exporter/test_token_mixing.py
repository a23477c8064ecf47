"""Merging tokens: averages over windows, and the matrix of MetaCompress against its formula."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tokexport.exporter.modules.token_mixing import MetaCompressor, MixingMatrix, WindowAverage
from tokexport.exporter.windows import Windows

LINE = Windows((12,), (3,), (2,))
GRID = Windows((4, 6), (2, 3), (2, 1))
CASES = [LINE, GRID]
WIDTH, SCORE_WIDTH = 16, 8


def features(windows: Windows, count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, math.prod(windows.arriving), WIDTH, generator=torch.Generator().manual_seed(seed))


def averaging_matrix(windows: Windows) -> Tensor:
    """Return the (M, N) matrix of the windows, made place by place."""
    if len(windows.arriving) == 1:
        windows = Windows((1, *windows.arriving), (1, *windows.kernel), (1, *windows.stride))
    rows, columns = windows.kept
    matrix = torch.zeros(rows, columns, *windows.arriving)
    for row in range(rows):
        for column in range(columns):
            top, left = row * windows.stride[0], column * windows.stride[1]
            matrix[row, column, top : top + windows.kernel[0], left : left + windows.kernel[1]] = 1
    matrix = matrix.flatten(2).flatten(0, 1)
    return matrix / matrix.sum(1, keepdim=True)


def started(windows: Windows, seed: int = 0) -> MixingMatrix:
    matrix = MixingMatrix(WIDTH, SCORE_WIDTH, windows)
    matrix.start(torch.Generator().manual_seed(seed))
    return matrix


@pytest.mark.parametrize("windows", CASES, ids=["sequence", "grid"])
def test_windows_are_averaged(windows: Windows):
    seen = features(windows)
    assert_close(WindowAverage(windows)(seen), averaging_matrix(windows) @ seen)


@pytest.mark.parametrize("windows", CASES, ids=["sequence", "grid"])
def test_the_matrix_is_the_paper_s(windows: Windows):
    module, seen = started(windows), features(windows)
    with torch.no_grad():
        module.key_DC.add_(0.3 * torch.randn(WIDTH, SCORE_WIDTH, generator=torch.Generator().manual_seed(5)))
        module.beta_C.copy_(torch.linspace(0.5, 2, SCORE_WIDTH))
    places = module._placed(torch.zeros_like(seen))
    placed = seen + places
    query = (averaging_matrix(windows) @ placed) @ module.query_DC
    scores = query @ torch.diag(module.beta_C) @ (placed @ module.key_DC).mT / math.sqrt(SCORE_WIDTH)
    assert_close(module(seen), scores.softmax(-1))
    assert_close(module(seen).sum(-1), torch.ones(len(seen), windows.count))


@pytest.mark.parametrize("windows", CASES, ids=["sequence", "grid"])
def test_what_is_mixed_is_without_positions(windows: Windows):
    module, seen = MetaCompressor(WIDTH, SCORE_WIDTH, windows), features(windows)
    module.matrix.start(torch.Generator().manual_seed(0))
    assert_close(module(seen), module.matrix(seen) @ seen)


@pytest.mark.parametrize("windows", CASES, ids=["sequence", "grid"])
def test_every_place_has_a_position_of_its_own(windows: Windows):
    places = started(windows)._placed(torch.zeros(1, math.prod(windows.arriving), WIDTH))[0]
    distances = torch.cdist(places, places) + 10 * torch.eye(len(places))
    assert distances.min() > 0.1


def test_the_matrix_is_made_from_the_image():
    module = started(GRID)
    first, second = module(features(GRID, 2))
    assert (first - second).abs().max() > 0.01
    assert_close(module(features(GRID, 2)[:1])[0], first)


def test_the_start_is_the_same_for_the_same_seed():
    first, again, other = (started(GRID, seed).query_DC for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    module = started(GRID)
    assert torch.equal(module.query_DC, module.key_DC)


def test_untrained_rows_take_most_from_their_own_window():
    windows = Windows((24, 24), (3, 3), (3, 3))
    module = MixingMatrix(192, 64, windows)
    module.start(torch.Generator().manual_seed(0))
    matrix = module(0.3 * torch.randn(1, 576, 192, generator=torch.Generator().manual_seed(1)))[0]
    own = (averaging_matrix(windows) > 0).float()
    # Nine of 576 places by chance.
    assert ((matrix * own).sum(1) > 3 * 9 / 576).float().mean() > 0.9
