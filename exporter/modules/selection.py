"""Vision tokens chosen by what an image shows, before the language model.

B images, N vision tokens that arrive, M that stay, D width
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

# More than any distance between directions.
_FAR = 4.0


class FarthestPoints(nn.Module):
    """Keep tokens that are as unlike each other as can be, in their order (DivPrune, arXiv 2503.02175).

    Args:
        count: M.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.index = FarthestIndex(count)

    def forward(self, features_BND: Tensor) -> Tensor:
        """Return (B, M, D) of ``features_BND`` (B, N, D)."""
        index_BM1 = self.index(features_BND).unsqueeze(-1)
        return features_BND.gather(1, index_BM1.expand(-1, -1, features_BND.shape[-1]))


class FarthestIndex(nn.Module):
    """Which tokens are as unlike each other as can be.

    The first is the one whose nearest neighbour is the farthest; each further one is the farthest from all chosen
    before.
    In a graph the choices stand one after the other, so that every shape is known.

    Args:
        count: M.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, features_BND: Tensor) -> Tensor:
        """Return which tokens stay, ascending, (B, M); of equals the first is taken."""
        direction_BND = functional.normalize(features_BND.float(), dim=-1)
        distance_BNN = 1 - direction_BND @ direction_BND.mT
        itself_NN = torch.eye(distance_BNN.shape[-1], device=distance_BNN.device)
        pick_B1 = (distance_BNN + _FAR * itself_NN).amin(-1).argmax(-1, keepdim=True)
        picks = [pick_B1]
        nearest_BN = torch.full_like(distance_BNN[:, 0], _FAR)
        for _ in range(self.count - 1):
            row_B1N = pick_B1.unsqueeze(-1).expand(-1, -1, distance_BNN.shape[-1])
            nearest_BN = torch.minimum(nearest_BN, distance_BNN.gather(1, row_B1N)[:, 0])
            # Never twice, also where all that is left are copies.
            nearest_BN = nearest_BN.scatter(1, pick_B1, -1.0)
            pick_B1 = nearest_BN.argmax(-1, keepdim=True)
            picks.append(pick_B1)
        return torch.cat(picks, dim=-1).sort(-1).values
