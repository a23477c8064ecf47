"""Vision tokens merged into fewer by averages: over windows, or by a matrix that is made from the image.

B images, N vision tokens that arrive, R rows and S columns of them where they are a grid, M tokens that stay, D width,
C width of the scores
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokexport.exporter.windows import Windows

# Of the waves of a position, in tokens.
_LONGEST_WAVE = 10_000.0
START_BETA = 4.0
"""How sharply rows choose before training."""


class WindowAverage(nn.Module):
    """The mean of the tokens in each window."""

    def __init__(self, windows: Windows) -> None:
        super().__init__()
        self.windows = windows

    def forward(self, features_BND: Tensor) -> Tensor:
        """Return (B, M, D) of ``features_BND`` (B, N, D)."""
        axes, kernel, stride = self.windows.arriving, self.windows.kernel, self.windows.stride
        if len(axes) == 1:
            return functional.avg_pool1d(features_BND.mT, kernel, stride).mT
        images_BDRS = features_BND.mT.unflatten(2, axes)
        return functional.avg_pool2d(images_BDRS, kernel, stride).flatten(2).mT


class MixingMatrix(nn.Module):
    """Which share of each token that arrives goes into each one that stays (MetaCompress, arXiv 2603.21701).

    A row asks for what its window shows and for where it lies; its weights are a softmax over all tokens. Untrained,
    with the same weights for both sides, it is a soft average over a window and its surroundings.

    Args:
        width: D.
        score_width: C.
        windows: which lay M rows over N tokens.
    """

    def __init__(self, width: int, score_width: int, windows: Windows) -> None:
        super().__init__()
        self.query_DC = nn.Parameter(torch.empty(width, score_width))
        self.key_DC = nn.Parameter(torch.empty(width, score_width))
        self.beta_C = nn.Parameter(torch.empty(score_width))
        self.average = WindowAverage(windows)
        # Data, not weights: on the CPU also while the model is built on the meta device.
        for axis, length in enumerate(windows.arriving):
            self.register_buffer(f"position_{axis}", _waves(length, width, axis, len(windows.arriving)), False)

    @torch.no_grad()
    def start(self, generator: torch.Generator | None = None, beta: float = START_BETA) -> None:
        """Start as a weighted average over windows: queries are made as keys are, and near tokens count most."""
        width, score_width = self.query_DC.shape
        self.query_DC.copy_(torch.randn(width, score_width, generator=generator) / math.sqrt(width))
        self.key_DC.copy_(self.query_DC)
        self.beta_C.fill_(beta)

    def forward(self, features_BND: Tensor) -> Tensor:
        """Return the matrix (B, M, N), whose rows sum to 1, for ``features_BND`` (B, N, D)."""
        placed_BND = self._placed(features_BND)
        query_BMC = self.average(placed_BND) @ self.query_DC
        key_BNC = placed_BND @ self.key_DC
        scale_C = self.beta_C / math.sqrt(len(self.beta_C))
        return ((query_BMC * scale_C) @ key_BNC.mT).softmax(-1)

    def _placed(self, features_BND: Tensor) -> Tensor:
        """Return the features with absolute positions added."""
        if len(self.average.windows.arriving) == 1:
            return features_BND + self.get_buffer("position_0")
        features_BRSD = features_BND.unflatten(1, self.average.windows.arriving)
        rows_R1D, columns_SD = self.get_buffer("position_0").unsqueeze(1), self.get_buffer("position_1")
        return (features_BRSD + rows_R1D + columns_SD).flatten(1, 2)


class MetaCompressor(nn.Module):
    """MetaCompress: every token that stays is an average of those that arrive, with weights made from the image."""

    def __init__(self, width: int, score_width: int, windows: Windows) -> None:
        super().__init__()
        self.matrix = MixingMatrix(width, score_width, windows)

    def forward(self, features_BND: Tensor) -> Tensor:
        """Return (B, M, D) of ``features_BND`` (B, N, D), what is mixed being without positions."""
        return self.matrix(features_BND) @ features_BND


def _waves(length: int, width: int, axis: int, num_axes: int) -> Tensor:
    """Return sines and cosines of the places along one axis, (length, D), in that axis' share of the width."""
    share = width // (2 * num_axes)
    frequency_F = _LONGEST_WAVE ** -(torch.arange(share, device="cpu") / share)
    angle_LF = torch.arange(length, device="cpu").unsqueeze(1) * frequency_F
    waves = torch.zeros(length, width, device="cpu")
    first = axis * 2 * share
    waves[:, first : first + 2 * share] = torch.cat((angle_LF.sin(), angle_LF.cos()), dim=1)
    return waves
