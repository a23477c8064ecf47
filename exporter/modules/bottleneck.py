"""Where vision tokens leave the sequence inside the language model.

B batch, T decoder tokens that arrive, D width, N vision tokens of a call, M kept ones
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from tokexport.exporter.modules import ops
from tokexport.exporter.plan import PositionPolicy


class Bottleneck(nn.Module, ABC):
    """Thins the vision span of hidden states or positions.

    Attributes:
        positions: which rotary positions the tokens behind it have.
    """

    positions: PositionPolicy

    @abstractmethod
    def forward(self, x_BT: Tensor, num_before: int, num_vision: int) -> Tensor:
        """Return ``x_BT``, (B, T) or (B, T, D), with M of the tokens from ``num_before`` on, for N of them."""


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
        # On the CPU even while the model is built on the meta device: the index is data, not a weight.
        self.register_buffer("index_M", torch.tensor(index, dtype=torch.int64, device="cpu"), persistent=False)

    def forward(self, x_BT: Tensor, num_before: int, num_vision: int) -> Tensor:
        end = num_before + num_vision
        kept = ops.keep_tokens(x_BT[:, num_before:end], self.index_M)
        return torch.cat((x_BT[:, :num_before], kept, x_BT[:, end:]), dim=1)


class FeatureGather(nn.Module):
    """Keep the image features of a constant index, before the language model."""

    index_M: Tensor

    def __init__(self, index: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("index_M", torch.tensor(index, dtype=torch.int64, device="cpu"), persistent=False)

    def forward(self, features_BND: Tensor) -> Tensor:
        """Return (B, M, D) of ``features_BND`` (B, N, D)."""
        return ops.gather_tokens(features_BND, self.index_M)
