"""What bottlenecks choose by: attention to the vision tokens in the open; the model's own attention stays fused.

B batch, H query heads, K key/value heads, E head width, T tokens of a call, U the last of them, N vision tokens,
V those that entered the model, S text tokens behind them, D width
"""

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from tokexport.exporter.modules.decoder import DecoderLayer, Rope


class Look(nn.Module, ABC):
    """What a bottleneck sees of the vision tokens of a call, to choose among them.

    Attributes:
        is_own: whether it is given the layer behind the bottleneck, or the one that has just run.
        reads_text: whether what it sees depends on the text of the call.
    """

    is_own: bool
    reads_text: bool = True

    @abstractmethod
    def forward(
        self,
        layer: "DecoderLayer",
        x_BTD: Tensor,
        rope: "Rope",
        num_before: int,
        num_vision: int,
        entered: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Return (B, N), or (B, N, N) of each token with each.

        Args:
            layer: of the model, see ``is_own``.
            x_BTD: what arrived at it.
            rope: with the positions of these tokens.
            num_before: tokens before the vision tokens.
            num_vision: N, which is 0 without an image.
            entered: vision tokens (B, V, D) and the text behind them (B, S, D) as they entered the model.
        """


class SpanAttention(Look):
    """How much later tokens of a call attend to its vision tokens.

    Only the rows asked for are computed, over the tokens of this call. Without an image, nothing is.

    Args:
        layer: ``own`` is the layer that follows, ``before`` the one that has just run.
        queries: all ``text`` tokens behind the image, averaged, the ``last`` token alone, or of the text those that are
            ``raters``.
    """

    def __init__(self, layer: Literal["own", "before"], queries: Literal["text", "last", "raters"]) -> None:
        super().__init__()
        self.is_own = layer == "own"
        self._queries = queries
        self._raters = TextRaters() if queries == "raters" else None

    def forward(
        self,
        layer: "DecoderLayer",
        x_BTD: Tensor,
        rope: "Rope",
        num_before: int,
        num_vision: int,
        entered: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Return shares (B, N), averaged over heads and rows; rows that are no raters count as 0."""
        x_BTD = layer.input_layernorm(x_BTD)
        num_behind = x_BTD.shape[1] - num_before - num_vision
        # Of no image there is nothing to see, and no row is needed.
        num_rows: Any = torch.sym_min(num_vision, 1) * (1 if self._queries == "last" else num_behind)
        first = x_BTD.shape[1] - num_rows
        row_rope = replace(rope, position_BT=rope.position_BT[:, first:])
        query_BHUE = layer.self_attn.queries(x_BTD[:, first:], row_rope)
        weight_BU = None
        if self._raters is not None:
            vision_BVD, text_BSD = entered
            weight_BU = self._raters(vision_BVD, text_BSD[:, num_behind - num_rows :])
        return attention_to_span(query_BHUE, layer.self_attn.keys(x_BTD, rope), num_before, num_vision, weight_BU)


class TextRaters(nn.Module):
    """Which text tokens have to do with the image: those to which it attends more than to the mean of all.

    Each vision token shares itself out among the text tokens, by the product of both as they enter the language model
    (SparseVLM, arXiv 2410.04417, section 3.2).
    """

    def forward(self, vision_BVD: Tensor, text_BUD: Tensor) -> Tensor:
        """Return 1.0 for raters and 0.0 for others, (B, U)."""
        num_vision, num_text = vision_BVD.shape[1], text_BUD.shape[1]
        # Products of the whole width, without a scale: more than half precision holds.
        share_BVU = (vision_BVD.float() @ text_BUD.float().mT).softmax(-1)
        # Shares of each vision token sum to 1, so their mean is 1 / U; of equal ones all rate.
        return (share_BVU.sum(1) * num_text >= torch.sym_max(num_vision, 1)).float()


def attention_to_span(
    query_BHUE: Tensor, key_BKTE: Tensor, num_before: int, num_vision: int, weight_BU: Tensor | None = None
) -> Tensor:
    """Return the attention of the last U of T tokens to a span, averaged over heads and these tokens, (B, N).

    The shares of each row sum to 1 over all T. Without rows (U = 0), all are 0.

    Args:
        query_BHUE: of the last U tokens, rotated.
        key_BKTE: of all T, rotated.
        num_before: tokens before the span.
        num_vision: N.
        weight_BU: what rows are multiplied with, by default 1.
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
    seen_BUN = seen_BHUN.mean(1)
    if weight_BU is not None:
        seen_BUN = seen_BUN * weight_BU.unsqueeze(-1)
    return seen_BUN.sum(1) / torch.sym_max(num_rows, 1)
