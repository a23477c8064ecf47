"""PruMerge: the tokens that the class token attends to, each with those most like it added to it.

B images, G what the tower sees of an image, the class token and then N vision tokens, A of them kept, K added to each,
M = A + 1, C width of the tower
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokexport.exporter.modules import ops
from tokexport.exporter.modules.bottleneck import TopTokens
from tokexport.exporter.modules.tower_stage import ClassAttention, LayerKeys, TowerStage, marked


class AttendedWithNeighbours(TowerStage):
    """Keep what the class token attends to, merge, and sum what is left into one more token (arXiv 2403.15388).

    To each kept token the K tokens are added whose keys are most like its own, kept or not, each times the class
    token's attention to it. The last token is the sum of all that are not kept, weighted alike.

    Args:
        layer: of the tower, whose attention and keys count.
        num_tokens: N.
        kept: A.
        neighbours: K.
        always: tokens that are kept whatever the attention to them.
    """

    is_always_N: Tensor
    number_N: Tensor

    def __init__(self, *, layer: int, num_tokens: int, kept: int, neighbours: int, always: Sequence[int] = ()) -> None:
        super().__init__()
        self.attention = ClassAttention(layer)
        self.keys = LayerKeys(layer, "joined")
        self.top = TopTokens(kept)
        self._neighbours = neighbours
        # Data, not weights: on the CPU also while the model is built on the meta device.
        is_always_N = torch.zeros(num_tokens, dtype=torch.bool, device="cpu")
        is_always_N[list(always)] = True
        self.register_buffer("is_always_N", is_always_N, persistent=False)
        self.register_buffer("number_N", torch.arange(num_tokens, device="cpu"), persistent=False)

    def forward(self, hidden_BGC: Tensor, attention: Tensor, keys: Tensor) -> Tensor:
        """Return (B, M, C), the kept tokens in their order and then the sum of the others.

        Args:
            hidden_BGC: what the tower emits.
            attention: of the class token, (B, N).
            keys: of length 1, (B, N, C).
        """
        return self.weights(attention, keys).to(hidden_BGC.dtype) @ hidden_BGC[:, 1:]

    def weights(self, attention_BN: Tensor, key_BNC: Tensor) -> Tensor:
        """Return how much of each token goes into each that stays, (B, M, N)."""
        kept_BA = self.top(attention_BN.masked_fill(self.is_always_N, torch.inf))
        likeness_BAN = ops.pick_tokens(key_BNC, kept_BA) @ key_BNC.mT
        is_own_BAN = kept_BA.unsqueeze(-1) == self.number_N
        likeness_XN = likeness_BAN.masked_fill(is_own_BAN, -torch.inf).flatten(0, 1)
        near_BAK = ops.top_tokens(likeness_XN, self._neighbours).unflatten(0, (-1, kept_BA.shape[1]))
        is_near_BAN = torch.zeros_like(likeness_BAN).scatter(2, near_BAK, 1.0)
        merged_BAN = is_near_BAN * attention_BN.unsqueeze(1) + is_own_BAN.float()
        left_BN = (1 - marked(kept_BA, attention_BN)) * attention_BN
        return torch.cat((merged_BAN, left_BN.unsqueeze(1)), dim=1)
