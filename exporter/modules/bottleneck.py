"""Where vision tokens leave the sequence inside the language model.

B batch, T decoder tokens that arrive, D width, N vision tokens of a call, M kept ones
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from tokexport.exporter.modules import ops
from tokexport.exporter.modules.greedy import followed_gains, greedy_gains
from tokexport.exporter.modules.span_attention import Look
from tokexport.exporter.plan import PositionPolicy


class Bottleneck(nn.Module, ABC):
    """Thins the vision span of hidden states and positions.

    Attributes:
        positions: which rotary positions the tokens behind it have.
        look: makes what it chooses by, None for a choice that is the same whatever is there.
    """

    positions: PositionPolicy
    look: Look | None

    def scores(self, seen: Tensor, followed_BM: Tensor | None = None) -> Tensor:
        """Return what it chooses by, (B, N) in float32; N is 0 in a call without an image.

        Args:
            seen: what ``look`` makes.
            followed_BM: tokens that stay in any case, from the first choice to the last, None to choose.
        """
        return seen.float()

    @abstractmethod
    def choose(self, score_BN: Tensor | None) -> Tensor:
        """Return which of N vision tokens stay, ascending: (M,) the same whatever the image, or (B, M).

        Args:
            score_BN: what it chooses by, None where it looks at nothing; where N is 0, so is M.
        """

    def forward(self, x_BT: Tensor, num_before: int, num_vision: int, index: Tensor) -> Tensor:
        """Return ``x_BT``, (B, T) or (B, T, D), with the chosen ones of the N tokens from ``num_before`` on."""
        end = num_before + num_vision
        kept = ops.keep_tokens if index.ndim == 1 else ops.pick_tokens
        return torch.cat((x_BT[:, :num_before], kept(x_BT[:, num_before:end], index), x_BT[:, end:]), dim=1)


class StaticGather(Bottleneck):
    """Keep the vision tokens of a constant index, whatever the image.

    In a graph this is one ``Gather`` on the vision span. The index is cut to the number of vision
    tokens present: all of it when the call brings an image, nothing when it brings text only. That
    is how one graph serves prefill, continuation and decode.
    """

    index_M: Tensor

    def __init__(self, index: tuple[int, ...], positions: PositionPolicy) -> None:
        super().__init__()
        self.positions: PositionPolicy = positions
        self.look: Look | None = None
        # On the CPU even while the model is built on the meta device: the index is data, not a weight.
        self.register_buffer("index_M", torch.tensor(index, dtype=torch.int64, device="cpu"), persistent=False)

    def choose(self, score_BN: Tensor | None) -> Tensor:
        return self.index_M


class Chooser(nn.Module, ABC):
    """Which tokens stay, by what it sees of them; of equals the first is taken."""

    @abstractmethod
    def forward(self, seen: Tensor) -> Tensor:
        """Return (B, M), ascending."""

    @abstractmethod
    def scores(self, seen: Tensor, followed_BM: Tensor) -> Tensor:
        """Return (B, N), of which those that should stay are the highest, where ``followed_BM`` have been kept so far.

        How much lower one is that stayed all the same tells how far the choice was from a tie.
        """


class TopTokens(Chooser):
    """Those with the highest scores."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, seen: Tensor) -> Tensor:
        """Return (B, M) of scores (B, N)."""
        return ops.top_tokens(seen, self.count)

    def scores(self, seen: Tensor, followed_BM: Tensor) -> Tensor:
        """Return the scores, infinite ones as twice the highest other."""
        highest_B1 = seen.masked_fill(seen.isinf(), 0).amax(-1, keepdim=True)
        return torch.where(seen.isinf(), 2 * highest_B1, seen)


class GreedyGains(nn.Module):
    """What each token adds to those chosen before it, of which the ``count`` highest are the choice."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, kernel_BNN: Tensor, followed_BM: Tensor | None = None) -> Tensor:
        """Return (B, N) of a kernel; see ``greedy`` for both ways."""
        if followed_BM is None:
            return greedy_gains(kernel_BNN, self.count)
        return followed_gains(kernel_BNN, followed_BM)


class ScoredGather(Bottleneck):
    """Keep the M vision tokens with the highest scores.

    Args:
        count: M, whatever the image, so that every later shape is known.
        look: makes what the scores are made from.
        positions: which rotary positions the tokens behind it have.
        score: makes scores (B, N) of attention (B, N); by default they are the same.
    """

    def __init__(self, count: int, look: Look, positions: PositionPolicy, score: nn.Module | None = None) -> None:
        super().__init__()
        self.positions: PositionPolicy = positions
        self.look = look
        self.score = nn.Identity() if score is None else score
        self.top = TopTokens(count)

    def scores(self, seen: Tensor, followed_BM: Tensor | None = None) -> Tensor:
        return self.score(seen).float()

    def choose(self, score_BN: Tensor | None) -> Tensor:
        assert score_BN is not None
        return self.top(score_BN)


class DiverseGather(ScoredGather):
    """Keep M vision tokens, each of which adds the most to those chosen before it.

    The score of a token that stays is what it added, of any other what it would have added in place of the last one, so
    that those that stay have the highest scores.

    Args:
        count: M.
        look: makes the kernel (B, N, N) by whose determinant tokens add to each other.
        positions: which rotary positions the tokens behind it have.
    """

    def __init__(self, count: int, look: Look, positions: PositionPolicy) -> None:
        super().__init__(count, look, positions, GreedyGains(count))

    def scores(self, seen: Tensor, followed_BM: Tensor | None = None) -> Tensor:
        return self.score(seen, followed_BM)


class FeatureGather(nn.Module):
    """Keep the image features of a constant index, before the language model."""

    index_M: Tensor

    def __init__(self, index: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("index_M", torch.tensor(index, dtype=torch.int64, device="cpu"), persistent=False)

    def forward(self, features_BND: Tensor) -> Tensor:
        """Return (B, M, D) of ``features_BND`` (B, N, D)."""
        return ops.gather_tokens(features_BND, self.index_M)
