"""Vision tokens chosen by what an image shows, before the language model.

B images, N vision tokens that arrive, M that stay, D width
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokexport.exporter.modules.bottleneck import Chooser

# More than any distance between directions.
_FAR = 4.0
# Less than any difference of distances.
_NEVER = -4.0


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


class FarthestIndex(Chooser):
    """Those that are as unlike each other as can be.

    The first is the one whose nearest neighbour is the farthest; each further one is the farthest from all chosen
    before.
    In a graph the choices stand one after the other, so that every shape is known.

    Args:
        count: M.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, seen: Tensor) -> Tensor:
        """Return (B, M) of image features (B, N, D)."""
        distance_BNN, far_BN = _distances(seen)
        pick_B1 = far_BN.argmax(-1, keepdim=True)
        picks = [pick_B1]
        nearest_BN = torch.full_like(far_BN, _FAR)
        for _ in range(self.count - 1):
            nearest_BN = _nearer(nearest_BN, distance_BNN, pick_B1)
            pick_B1 = nearest_BN.argmax(-1, keepdim=True)
            picks.append(pick_B1)
        return torch.cat(picks, dim=-1).sort(-1).values

    def scores(self, seen: Tensor, followed_BM: Tensor) -> Tensor:
        """Return 1 for a token that was the farthest when it was kept.

        Of another that was kept, it is how much nearer it was, below 0; of the token that was the farthest then, if it
        was never kept, 0.
        """
        distance_BNN, far_BN = _distances(seen)
        is_left_BN = torch.zeros_like(far_BN, dtype=torch.bool).scatter(1, followed_BM, True)
        score_BN = torch.full_like(far_BN, _NEVER)
        nearest_BN = torch.full_like(far_BN, _FAR)
        for _ in range(followed_BM.shape[1]):
            best_B1, farthest_B1 = far_BN.max(-1, keepdim=True)
            # In which order they were kept is not known: the farthest first, as it should be.
            found_B1, pick_B1 = far_BN.masked_fill(~is_left_BN, _NEVER).max(-1, keepdim=True)
            behind_B1 = found_B1 - best_B1
            passed_over_B1 = score_BN.gather(1, farthest_B1).clamp(min=0)
            score_BN = score_BN.scatter(1, farthest_B1, passed_over_B1)
            score_BN = score_BN.scatter(1, pick_B1, torch.where(behind_B1 < 0, behind_B1, 1.0))
            is_left_BN = is_left_BN.scatter(1, pick_B1, False)
            far_BN = nearest_BN = _nearer(nearest_BN, distance_BNN, pick_B1)
        return score_BN


def _distances(features_BND: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance of each token from each, (B, N, N), and from the nearest other, (B, N)."""
    direction_BND = functional.normalize(features_BND.float(), dim=-1)
    distance_BNN = 1 - direction_BND @ direction_BND.mT
    itself_NN = torch.eye(distance_BNN.shape[-1], device=distance_BNN.device)
    return distance_BNN, (distance_BNN + _FAR * itself_NN).amin(-1)


def _nearer(nearest_BN: Tensor, distance_BNN: Tensor, pick_B1: Tensor) -> Tensor:
    """Return the distance from the nearest token that stays, now that ``pick_B1`` does too."""
    row_B1N = pick_B1.unsqueeze(-1).expand(-1, -1, distance_BNN.shape[-1])
    nearest_BN = torch.minimum(nearest_BN, distance_BNN.gather(1, row_B1N)[:, 0])
    # Never twice, also where all that is left are copies.
    return nearest_BN.scatter(1, pick_B1, -1.0)
