"""The small network of the relevance compressor (arXiv 2506.01097): from attention to the importance of tokens.

B batch, N vision tokens, C channels
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class SeparableConv1d(nn.Module):
    """A depthwise and a pointwise convolution along the tokens (arXiv 1704.04861)."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(channels_in, channels_in, kernel, padding=kernel // 2, groups=channels_in)
        self.pointwise = nn.Conv1d(channels_in, channels_out, 1)

    def forward(self, x_BCN: Tensor) -> Tensor:
        return functional.relu(self.pointwise(self.depthwise(x_BCN)))


class RelevanceNet(nn.Module):
    """How important each vision token is, given how much the question attends to it in the first layer.

    The paper gives the channels and leaves kernel and scale open. Fully convolutional, so N is free; it may be 0.

    Args:
        channels: of the convolutions, one after the other.
        kernel: tokens that a depthwise convolution sees, odd.
    """

    def __init__(self, channels: Sequence[int], kernel: int) -> None:
        super().__init__()
        widths = (1, *channels)
        self.layers = nn.ModuleList(
            SeparableConv1d(before, after, kernel) for before, after in zip(widths, channels, strict=False)
        )
        self.head = nn.Conv1d(channels[-1], 1, 1)

    @torch.no_grad()
    def start(self, generator: torch.Generator | None = None) -> None:
        """Start from weights that keep the size of what goes through."""
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                fan_in = module.weight[0].numel()
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * (2 / fan_in) ** 0.5)
                cast(Tensor, module.bias).zero_()

    def forward(self, attention_BN: Tensor) -> Tensor:
        """Return scores (B, N), whose softmax is the importance, of attention (B, N); only its ratios count."""
        # A call without an image has no tokens, and engines convolve nothing only where there is something.
        padded_BN = functional.pad(attention_BN, (0, 1))
        share_BN = padded_BN / padded_BN.mean(-1, keepdim=True).clamp(min=_LEAST)
        # Attention is spread over orders of magnitude.
        x_BCN = share_BN.add(_FLOOR).log().to(self.head.weight.dtype).unsqueeze(1)
        for layer in self.layers:
            x_BCN = layer(x_BCN)
        return self.head(x_BCN)[:, 0, :-1]


_LEAST = 1e-9
_FLOOR = 1e-2
