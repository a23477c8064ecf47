"""VisionZip: the tokens that the class token attends to, and averages of the others.

B images, G what the tower sees of an image, the class token and then N vision tokens, A of them attended to most,
R the rest, T averages, C width of the tower, E width of keys
"""

import torch
from torch import Tensor

from tokexport.exporter.modules import ops
from tokexport.exporter.modules.bottleneck import TopTokens
from tokexport.exporter.modules.tower_stage import ClassAttention, LayerKeys, TowerStage, marked


class AttendedAndAverages(TowerStage):
    """Keep what the class token attends to, in its order, and behind it averages of the rest (arXiv 2412.04467).

    Of the rest, every so many-th token is a target. The others join the target whose key is most like theirs, and each
    target with those that joined it becomes their mean.

    Args:
        layer: of the tower, whose attention and keys count.
        num_tokens: N.
        attended: A.
        averages: T.
        has_class_token: whether the class token itself stays too, in front.
    """

    own_R: Tensor
    number_T: Tensor

    def __init__(self, *, layer: int, num_tokens: int, attended: int, averages: int, has_class_token: bool) -> None:
        super().__init__()
        self.attention = ClassAttention(layer)
        self.keys = LayerKeys(layer, "averaged")
        self.top = TopTokens(attended)
        self._num_rest = num_tokens - attended
        self._has_class_token = has_class_token
        self._step = self._num_rest // averages
        # Data, not weights: on the CPU also while the model is built on the meta device.
        number_T = torch.arange(averages, device="cpu")
        own_R = torch.full((self._num_rest,), -1, device="cpu")
        own_R[number_T * self._step] = number_T
        self.register_buffer("number_T", number_T, persistent=False)
        self.register_buffer("own_R", own_R, persistent=False)

    def forward(self, hidden_BGC: Tensor, attention: Tensor, keys: Tensor) -> Tensor:
        """Return (B, A + T, C), or one more with the class token.

        Args:
            hidden_BGC: what the tower emits.
            attention: of the class token, (B, N).
            keys: of length 1, (B, N, E).
        """
        tokens_BNC = hidden_BGC[:, 1:]
        attended_BA = self.top(attention)
        # What is not marked has the higher score, and of equal scores the first comes first.
        rest_BR = ops.top_tokens(-marked(attended_BA, attention), self._num_rest)
        share_BTR = self.joined(ops.pick_tokens(keys, rest_BR)).to(tokens_BNC.dtype)
        averages_BTC = share_BTR @ ops.pick_tokens(tokens_BNC, rest_BR)
        kept = [ops.pick_tokens(tokens_BNC, attended_BA), averages_BTC]
        return torch.cat([hidden_BGC[:, :1], *kept] if self._has_class_token else kept, dim=1)

    def joined(self, key_BRE: Tensor) -> Tensor:
        """Return which share of each token of the rest goes into each average, (B, T, R); rows sum to 1."""
        num_averages = len(self.number_T)
        target_BTE = key_BRE[:, : num_averages * self._step : self._step]
        nearest_BR = (key_BRE @ target_BTE.mT).argmax(-1)
        group_BR = torch.where(self.own_R >= 0, self.own_R, nearest_BR)
        member_BTR = (group_BR.unsqueeze(1) == self.number_T.unsqueeze(1)).float()
        return member_BTR / member_BTR.sum(-1, keepdim=True)
