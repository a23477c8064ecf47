"""VScan's first stage: tokens that stand out in their window or in the whole image, with the others averaged in.

B images, N vision tokens in R rows and S columns, W windows of K tokens, M that stay, D width
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tokexport.exporter.modules import ops
from tokexport.exporter.modules.bottleneck import TopTokens
from tokexport.exporter.modules.tower_stage import ClassAttention, TowerStage, marked


class LocalAndGlobal(TowerStage):
    """Keep what the class token attends to in each window early on, and in the image later (arXiv 2505.22654).

    Every other token joins the kept one whose image feature is most like its own, and each kept token becomes the mean
    of itself and of those that joined it.

    Args:
        local_layer: of the tower, whose attention counts within windows.
        layer: of the tower, whose attention counts within the image.
        grid: R and S.
        window: rows and columns of one.
        per_window: tokens that each window keeps.
        kept: M, those of windows included.
    """

    is_before_projector: ClassVar[bool] = False
    number_N: Tensor
    number_M: Tensor

    def __init__(
        self, *, local_layer: int, layer: int, grid: tuple[int, int], window: int, per_window: int, kept: int
    ) -> None:
        super().__init__()
        self.local = ClassAttention(local_layer)
        self.attention = ClassAttention(layer)
        self.top = TopTokens(kept)
        self._window = window
        self._windows = (grid[0] // window, grid[1] // window)
        self._per_window = per_window
        # Data, not weights: on the CPU also while the model is built on the meta device.
        self.register_buffer("number_N", torch.arange(grid[0] * grid[1], device="cpu"), persistent=False)
        self.register_buffer("number_M", torch.arange(kept, device="cpu"), persistent=False)

    def forward(self, features_BND: Tensor, local: Tensor, attention: Tensor) -> Tensor:
        """Return (B, M, D) of ``features_BND`` (B, N, D).

        Args:
            features_BND: what the projector emits.
            local: attention of the class token in the early layer, (B, N).
            attention: in the late layer, (B, N).
        """
        kept_BM = self.top(attention.masked_fill(self.stands_out(local), torch.inf))
        return self.joined(features_BND.float(), kept_BM).to(features_BND.dtype) @ features_BND

    def stands_out(self, attention_BN: Tensor) -> Tensor:
        """Return whether a token is among those with the highest attention in its window, (B, N)."""
        rows, columns = self._windows
        shape = (rows, self._window, columns, self._window)
        window_XK = attention_BN.unflatten(1, shape).transpose(2, 3).flatten(3).flatten(0, 2)
        mark_XK = marked(ops.top_tokens(window_XK, self._per_window), window_XK)
        mark_BRCKK = mark_XK.unflatten(1, (self._window, self._window)).unflatten(0, (-1, rows, columns))
        return mark_BRCKK.transpose(2, 3).flatten(1) > 0

    def joined(self, features_BND: Tensor, kept_BM: Tensor) -> Tensor:
        """Return which share of each token goes into each that stays, (B, M, N); rows sum to 1."""
        direction_BND = functional.normalize(features_BND, dim=-1)
        likeness_BNM = direction_BND @ ops.pick_tokens(direction_BND, kept_BM).mT
        nearest_BN = likeness_BNM.argmax(-1)
        own_BMN = (kept_BM.unsqueeze(-1) == self.number_N).float()
        nearest_BMN = (nearest_BN.unsqueeze(1) == self.number_M.unsqueeze(1)).float()
        is_kept_BN = marked(kept_BM, features_BND[..., 0]) > 0
        member_BMN = torch.where(is_kept_BN.unsqueeze(1), own_BMN, nearest_BMN)
        return member_BMN / member_BMN.sum(-1, keepdim=True)
