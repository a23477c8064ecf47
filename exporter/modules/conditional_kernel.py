"""How vision tokens are like each other, and like the words of the question, as they enter the language model.

B batch, N vision tokens, S text tokens behind them, D width
"""

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional

from tokexport.exporter.modules.span_attention import Look

if TYPE_CHECKING:
    from tokexport.exporter.modules.decoder import DecoderLayer, Rope

Relevance = Literal["like", "unlike", "none"]

# Keeps the least relevant token from none at all, and tokens that are all as relevant from a division by 0.
_LEAST = 1e-6


class ConditionalKernel(Look):
    """The kernel of a determinantal point process, likeness of tokens times the relevance of both (CDPruner).

    It stands before the first layer, where both are embeddings, and reads nothing of the layer.

    Args:
        relevance: ``like`` the words or ``unlike`` them, or ``none``: all tokens alike.
    """

    def __init__(self, relevance: Relevance) -> None:
        super().__init__()
        self.is_own = True
        self.reads_text = relevance != "none"
        self._relevance = relevance

    def forward(
        self,
        layer: "DecoderLayer",
        x_BTD: Tensor,
        rope: "Rope",
        num_before: int,
        num_vision: int,
        entered: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Return (B, N, N), float32, values from -1 to 1."""
        vision_BND, text_BSD = entered
        # Cosines of hundreds of tokens decide by their last digits: more than half precision holds.
        direction_BND = functional.normalize(vision_BND.float(), dim=-1)
        if self._relevance != "none":
            likeness_BN = mean_likeness(direction_BND, text_BSD.float())
            relevance_BN = stretched(likeness_BN if self._relevance == "like" else -likeness_BN)
            direction_BND = direction_BND * relevance_BN.unsqueeze(-1)
        return direction_BND @ direction_BND.mT


def mean_likeness(direction_BND: Tensor, text_BSD: Tensor) -> Tensor:
    """Return the cosine of directions with text tokens, averaged over these, (B, N); 0 without text."""
    word_BSD = functional.normalize(text_BSD, dim=-1)
    mean_BD1 = (word_BSD.sum(1) / torch.sym_max(text_BSD.shape[1], 1)).unsqueeze(-1)
    return (direction_BND @ mean_BD1).squeeze(-1)


def stretched(score_BN: Tensor) -> Tensor:
    """Return scores moved and scaled to lie between 0 and 1, (B, N); 1 where all are the same."""
    # Of no tokens there is no least and no largest.
    least_B1 = functional.pad(score_BN, (0, 1), value=math.inf).amin(-1, keepdim=True)
    most_B1 = functional.pad(score_BN, (0, 1), value=-math.inf).amax(-1, keepdim=True)
    return (score_BN - least_B1 + _LEAST) / (most_B1 - least_B1 + _LEAST)
