"""What a method reads of the vision tower's layers, and how it thins vision tokens by that.

B images, G what the tower sees of an image, the class token and then N vision tokens, M that stay, C width of the
tower, H heads, E head width
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from tokexport.exporter.modules import ops

if TYPE_CHECKING:
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer


class TowerLook(nn.Module, ABC):
    """Something that is computed in the open from what arrives at a layer; the layer's own attention stays fused.

    It uses the layer's own modules on all tokens, so that in a graph these products stand only once.

    Args:
        layer: counted from 0.
    """

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    @abstractmethod
    def forward(self, layer: "CLIPEncoderLayer", hidden_BGC: Tensor) -> Tensor:
        """Return (B, N) or (B, N, any width), given the layer and what arrives at it."""


class ClassAttention(TowerLook):
    """How much the class token attends to each vision token, averaged over heads."""

    def forward(self, layer: "CLIPEncoderLayer", hidden_BGC: Tensor) -> Tensor:
        """Return shares (B, N), float32; with that of the class token itself each row sums to 1."""
        attention = layer.self_attn
        arrived_BGC = layer.layer_norm1(hidden_BGC)
        query_BH1E = ops.split_heads(attention.q_proj(arrived_BGC)[:, :1], attention.head_dim)
        key_BHGE = ops.split_heads(attention.k_proj(arrived_BGC), attention.head_dim)
        score_BH1G = query_BH1E @ key_BHGE.mT * attention.scale
        # Shares of hundreds of tokens: in half precision, small ones would be lost.
        return score_BH1G.float().softmax(-1)[:, :, 0, 1:].mean(1)


class LayerKeys(TowerLook):
    """The directions of a layer's keys, by whose cosine tokens are alike.

    Args:
        layer: counted from 0.
        heads: ``averaged`` into one key of E, or ``joined`` into one of C.
    """

    def __init__(self, layer: int, heads: Literal["averaged", "joined"]) -> None:
        super().__init__(layer)
        self._heads = heads

    def forward(self, layer: "CLIPEncoderLayer", hidden_BGC: Tensor) -> Tensor:
        """Return keys of length 1, (B, N, E) or (B, N, C), float32."""
        attention = layer.self_attn
        key_BNC = attention.k_proj(layer.layer_norm1(hidden_BGC))[:, 1:].float()
        if self._heads == "averaged":
            key_BNC = ops.split_heads(key_BNC, attention.head_dim).mean(1)
        return nn.functional.normalize(key_BNC, dim=-1)


class TowerStage(nn.Module):
    """Thins vision tokens by what it sees in layers of the tower.

    Each ``TowerLook`` among its parts is computed when its layer runs. ``forward`` takes the tokens, and what each look
    saw under the part's name.

    Attributes:
        is_before_projector: whether it takes what the tower emits (B, G, C) and returns (B, M, C), or takes what the
            projector emits, (B, N, width of the language model), and returns M of these.
    """

    is_before_projector: ClassVar[bool] = True

    def look(self, number: int, layer: "CLIPEncoderLayer", hidden_BGC: Tensor) -> dict[str, Tensor]:
        """Return what is read of layer ``number``, by the names of the parts that read it."""
        return {
            name: part(layer, hidden_BGC)
            for name, part in self.named_children()
            if isinstance(part, TowerLook) and part.layer == number
        }


def marked(index_BM: Tensor, score_BN: Tensor) -> Tensor:
    """Return 1.0 where a token is among ``index_BM`` and 0.0 elsewhere, (B, N) like ``score_BN``."""
    return torch.zeros_like(score_BN).scatter(1, index_BM, 1.0)
