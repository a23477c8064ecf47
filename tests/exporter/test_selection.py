"""Tokens chosen by what an image shows, on cases worked out by hand."""

import torch

from tokexport.exporter.modules.selection import FarthestPoints


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
