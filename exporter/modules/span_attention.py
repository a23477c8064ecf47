"""Attention to the vision tokens in the open, where a method chooses by it; the model's own attention stays fused.

B batch, H query heads, K key/value heads, E head width, T tokens of a call, U the last of them, N vision tokens,
D width
"""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from tokexport.exporter.modules.decoder import DecoderLayer, Rope


class SpanAttention(nn.Module):
    """How much later tokens of a call attend to its vision tokens.

    Only the rows asked for are computed, over the tokens of this call. Without an image, nothing is.

    Args:
        layer: ``own`` is the layer that follows, ``before`` the one that has just run.
        queries: all ``text`` tokens behind the image, averaged, or the ``last`` token alone.
    """

    def __init__(self, layer: Literal["own", "before"], queries: Literal["text", "last"]) -> None:
        super().__init__()
        self.is_own = layer == "own"
        self._queries = queries

    def forward(self, layer: "DecoderLayer", x_BTD: Tensor, rope: "Rope", num_before: int, num_vision: int) -> Tensor:
        """Return shares (B, N), averaged over heads and rows.

        Args:
            layer: whose queries and keys count.
            x_BTD: what arrived at it.
            rope: with the positions of these tokens.
            num_before: tokens before the vision tokens.
            num_vision: N.
        """
        x_BTD = layer.input_layernorm(x_BTD)
        num_behind = x_BTD.shape[1] - num_before - num_vision
        # Of no image there is nothing to see, and no row is needed.
        num_rows: Any = torch.sym_min(num_vision, 1) * (num_behind if self._queries == "text" else 1)
        first = x_BTD.shape[1] - num_rows
        row_rope = replace(rope, position_BT=rope.position_BT[:, first:])
        query_BHUE = layer.self_attn.queries(x_BTD[:, first:], row_rope)
        return attention_to_span(query_BHUE, layer.self_attn.keys(x_BTD, rope), num_before, num_vision)


def attention_to_span(query_BHUE: Tensor, key_BKTE: Tensor, num_before: int, num_vision: int) -> Tensor:
    """Return the attention of the last U of T tokens to a span, averaged over heads and these tokens, (B, N).

    The shares of each row sum to 1 over all T. Without rows (U = 0), all are 0.

    Args:
        query_BHUE: of the last U tokens, rotated.
        key_BKTE: of all T, rotated.
        num_before: tokens before the span.
        num_vision: N.
    """
    num_rows, num_tokens = query_BHUE.shape[2], key_BKTE.shape[2]
    key_BHTE = key_BKTE
    if query_BHUE.shape[1] != key_BKTE.shape[1]:
        key_BHTE = key_BKTE.repeat_interleave(query_BHUE.shape[1] // key_BKTE.shape[1], dim=1)
    score_BHUT = query_BHUE @ key_BHTE.mT / math.sqrt(query_BHUE.shape[3])
    place_T = torch.arange(num_tokens, device=score_BHUT.device)
    row_U = torch.arange(num_rows, device=score_BHUT.device) + (num_tokens - num_rows)
    is_later_UT = place_T > row_U.unsqueeze(1)
    # Sums over hundreds of tokens: in half precision, small shares would be lost.
    share_BHUT = score_BHUT.float().masked_fill(is_later_UT, -math.inf).softmax(-1)
    seen_BHUN = share_BHUT[..., num_before : num_before + num_vision]
    return seen_BHUN.mean(1).sum(1) / torch.sym_max(num_rows, 1)
