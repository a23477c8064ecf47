"""Tokens chosen by what an image shows, on cases worked out by hand."""

import pytest
import torch

from tokexport.exporter.modules.bottleneck import TopTokens
from tokexport.exporter.modules.selection import FarthestIndex, FarthestPoints


def test_divprune_takes_the_farthest_and_then_what_is_farthest_from_all():
    # Directions in the plane, in degrees; lengths do not matter. 170 is 80 from its nearest, more than any other.
    degrees = torch.tensor([0.0, 10.0, 90.0, 75.0, 170.0, 5.0])
    lengths = torch.tensor([1.0, 5.0, 2.0, 1.0, 9.0, 1.0]).unsqueeze(-1)
    radians = degrees.deg2rad()
    features = torch.stack((radians.cos(), radians.sin()), dim=-1) * lengths
    # 0 is 170 from it. Then 90 is 80 from what is nearest to it, 75 then 15, and 10 is 10.
    order = [4, 0, 2, 3, 1, 5]
    for count in range(1, 6):
        expected = sorted(order[:count])
        assert FarthestPoints(count).index(features.unsqueeze(0)).tolist() == [expected]
    kept = FarthestPoints(2)(features.unsqueeze(0))
    torch.testing.assert_close(kept, features[[0, 4]].unsqueeze(0))


def test_divprune_of_copies_takes_none_twice():
    features = torch.ones(2, 6, 3)
    assert FarthestPoints(4).index(features).tolist() == [[0, 1, 2, 3]] * 2


def test_divprune_chooses_for_each_image():
    features = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    together = FarthestPoints(5).index(features)
    assert together.tolist() == [FarthestPoints(5).index(features[n : n + 1])[0].tolist() for n in (0, 1)]
    assert together[0].tolist() != together[1].tolist()


def directions(*degrees: float) -> torch.Tensor:
    """Return (1, N, 2)."""
    radians = torch.tensor(degrees).deg2rad()
    return torch.stack((radians.cos(), radians.sin()), dim=-1).unsqueeze(0)


@pytest.mark.parametrize("kept", [[4], [0, 4], [0, 2, 4], [0, 2, 3, 4]])
def test_what_divprune_keeps_by_the_rule_scores_1(kept: list[int]):
    scores = FarthestIndex(len(kept)).scores(directions(0, 10, 90, 75, 170, 5), torch.tensor([kept]))
    assert scores[0, kept].tolist() == [1.0] * len(kept)
    assert scores.sum() == len(kept) + (6 - len(kept)) * scores.min()


def test_what_divprune_keeps_against_the_rule_scores_how_much_nearer_it_was():
    # Of 170 and 10 the latter is 160 from it; 0, which was passed over, is 170 from it.
    scores = FarthestIndex(2).scores(directions(0, 10, 90, 75, 170, 5), torch.tensor([[1, 4]]))
    distance = 1 - torch.tensor([160.0, 170.0]).deg2rad().cos()
    torch.testing.assert_close(scores[0, [4, 1, 0]], torch.tensor([1.0, distance[0] - distance[1], 0.0]))
    assert scores[0, [2, 3, 5]].max() < scores[0, 1]


def test_infinite_scores_are_above_all_others():
    scores = TopTokens(2).scores(torch.tensor([[0.25, torch.inf, 0.5]]), torch.tensor([[1, 2]]))
    assert scores.tolist() == [[0.25, 1.0, 0.5]]
