"""LLaVA in the form it is trained in: whole conversations at once, with a recipe's bottlenecks in place.

The sub-modules are those of ``transformers``; what happens between them is what the exported
decoder does, without a cache.

B conversations, I images, T tokens of the longest, U tokens that stay, N vision tokens of an image, M kept ones,
D width, E head width, A tokens that are answers, W vocabulary
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from tokexport.exporter.plan import PositionPolicy, TokenPlan

NO_LABEL = -100
"""Stands in the labels where a token is not learned; the value that PyTorch's cross entropy leaves out."""


@dataclass(frozen=True, kw_only=True)
class Arriving:
    """What comes to a bottleneck.

    Attributes:
        layer: the decoder layer behind it, of ``transformers``.
        hidden_BTD: what enters it.
        angles: cosines and sines of its rotary positions, (B, T, E) each.
        is_image_BT: where the tokens of images are.
        target_BT: what each token is to say, ``NO_LABEL`` where nothing is learned.
    """

    layer: Any
    hidden_BTD: Tensor
    angles: tuple[Tensor, Tensor]
    is_image_BT: Tensor
    target_BT: Tensor


class Thinning(Protocol):
    """Which of the vision tokens that arrive before a layer stay, and their positions."""

    @property
    def positions(self) -> PositionPolicy:
        """Whether they keep their rotary positions or are numbered anew."""
        ...

    def choose(self, arriving: Arriving) -> Tensor:
        """Return (M,), the same of every image, or (I, M) of each; ascending."""
        ...


@dataclass(frozen=True, kw_only=True)
class ConstantThinning:
    """The same tokens of every image."""

    index: tuple[int, ...]
    positions: PositionPolicy = "keep"

    def choose(self, arriving: Arriving) -> Tensor:
        return torch.tensor(self.index, device=arriving.is_image_BT.device)


class CompressedLlava(nn.Module):
    """A LLaVA of ``transformers`` whose decoder layers see fewer and fewer vision tokens.

    Args:
        llava: the model; gradients reach whatever of it requires them.
        thinnings: by decoder layer, what stands before it.
    """

    def __init__(self, llava: LlavaForConditionalGeneration, thinnings: Mapping[int, Thinning]) -> None:
        super().__init__()
        self.llava = llava
        self.thinnings: Mapping[int, Thinning] = thinnings

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, labels: Tensor, read: Tensor | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Read conversations and compare what follows each token with the labels.

        Args:
            pixel_values: the image of each conversation that has one, in their order.
            input_ids: (B, T); an image's N tokens stand side by side, one image a conversation.
            labels: (B, T), ``NO_LABEL`` where nothing is learned.
            read: (B, M), ascending: the only vision tokens that the decoder reads, where they have been without the
                others; an image then takes up M tokens of the input, and every conversation has one.

        Returns:
            The mean cross entropy of the labelled tokens, and as ``right`` the share of them that was the likeliest.
        """
        logits_AW, target_A = self.answer(self.image_features(pixel_values), input_ids, labels, read)
        return functional.cross_entropy(logits_AW, target_A), {"right": share_right(logits_AW, target_A)}

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Return what tower and projector make of images, (I, N, D)."""
        if not len(pixel_values):
            return pixel_values.new_zeros(0, 0, 0)
        seen: Any = self.llava.model.get_image_features(pixel_values=pixel_values)
        return torch.stack(tuple(seen.pooler_output))

    def answer(
        self,
        features_IND: Tensor,
        input_ids: Tensor,
        labels: Tensor,
        read: Tensor | None = None,
        plan: TokenPlan | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return logits (A, W) of the labelled tokens and their labels (A,), row by row.

        The arguments are those of ``forward``, with features in place of pixels, and ``plan``, which says where the
        features stand that enter the language model, where others arrived.
        """
        is_image_BT = input_ids == self.image_token
        hidden_BTD = self.embedded(features_IND, input_ids, read)
        position_BT = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        if read is not None:
            position_BT = _positions_of_all(position_BT, is_image_BT, read, features_IND.shape[1])
        if plan is not None and plan.places is not None:
            places_BM = torch.tensor(plan.places, device=input_ids.device).expand(len(input_ids), -1)
            position_BT = _positions_of_all(position_BT, is_image_BT, places_BM, plan.num_positions)
        # What a token is to say is the next token's label; so labels can go where their tokens go.
        target_BT = functional.pad(labels[:, 1:], (0, 1), value=NO_LABEL)
        hidden_BTD, target_BT = self._decoded(hidden_BTD, target_BT, position_BT, is_image_BT)
        hidden_AD, target_A = hidden_BTD[target_BT != NO_LABEL], target_BT[target_BT != NO_LABEL]
        return self.llava.lm_head(self._text_model.norm(hidden_AD)).float(), target_A

    @property
    def _text_model(self) -> Any:
        return self.llava.model.language_model

    @property
    def image_token(self) -> int:
        """The id of the tokens that an image takes the place of."""
        return self.llava.config.image_token_index

    def embedded(self, features_IND: Tensor, input_ids: Tensor, read_BM: Tensor | None = None) -> Tensor:
        """Return what the decoder reads, (B, T, D), image features in the places of images."""
        embedded_BTD = self.llava.get_input_embeddings()(input_ids)
        if not len(features_IND):
            return embedded_BTD
        if read_BM is not None:
            features_IND = features_IND.gather(1, read_BM.unsqueeze(-1).expand(-1, -1, features_IND.shape[-1]))
        is_image_BT1 = (input_ids == self.image_token).unsqueeze(-1)
        return embedded_BTD.masked_scatter(is_image_BT1, features_IND.flatten(0, 1).to(embedded_BTD.dtype))

    def _decoded(
        self, hidden_BTD: Tensor, target_BT: Tensor, position_BT: Tensor, is_image_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        text = self._text_model
        angles = text.rotary_emb(hidden_BTD, position_ids=position_BT)
        for index, layer in enumerate(text.layers):
            thinning = self.thinnings.get(index)
            if thinning is not None:
                arriving = Arriving(
                    layer=layer,
                    hidden_BTD=hidden_BTD,
                    angles=angles,
                    is_image_BT=is_image_BT,
                    target_BT=target_BT,
                )
                stay_BU = kept_places(is_image_BT, thinning.choose(arriving))
                # A row's padding repeats its first token, which may be the image's.
                is_image_BT = is_image_BT.gather(1, stay_BU.clamp(min=0)) & (stay_BU >= 0)
                target_BT = target_BT.gather(1, stay_BU.clamp(min=0)).masked_fill(stay_BU < 0, NO_LABEL)
                stay_BU = stay_BU.clamp(min=0)
                hidden_BTD = hidden_BTD.gather(1, stay_BU.unsqueeze(-1).expand(-1, -1, hidden_BTD.shape[-1]))
                position_BT = (
                    position_BT.gather(1, stay_BU)
                    if thinning.positions == "keep"
                    else torch.arange(stay_BU.shape[1], device=stay_BU.device).expand_as(stay_BU)
                )
                angles = text.rotary_emb(hidden_BTD, position_ids=position_BT)
            hidden_BTD = layer(hidden_BTD, attention_mask=self._mask(hidden_BTD), position_embeddings=angles)
        return hidden_BTD, target_BT

    def _mask(self, hidden_BTD: Tensor) -> Tensor | None:
        """Return what attention needs to be causal, (1, 1, T, T): a fused one nothing.

        Rows are padded on the right, where no token before can look, so that is mask enough.
        """
        if self._text_model.config._attn_implementation != "eager":
            return None
        length = hidden_BTD.shape[1]
        unseen_TT = torch.ones(length, length, dtype=torch.bool, device=hidden_BTD.device).triu(1)
        return torch.zeros(1, 1, length, length, device=hidden_BTD.device).masked_fill(unseen_TT, -torch.inf)


def share_right(logits_AW: Tensor, target_A: Tensor) -> Tensor:
    """Return which share of the labelled tokens was the likeliest."""
    return (logits_AW.argmax(-1) == target_A).float().mean()


def kept_places(is_image_BT: Tensor, index_M: Tensor) -> Tensor:
    """Return which tokens stay behind a bottleneck, ascending, as (B, U); -1 pads a row.

    All text stays, and of the image, where there is one, the tokens of ``index_M``: (M,) the same of every image, or
    (I, M) of each.
    """
    rows: list[Tensor] = []
    num_tokens = is_image_BT.shape[1]
    places_T = torch.arange(num_tokens, device=is_image_BT.device)
    index_IM = iter(index_M.expand(len(is_image_BT), -1) if index_M.ndim == 1 else index_M)
    for is_image_T in is_image_BT:
        image_N = is_image_T.nonzero()[:, 0]
        if not len(image_N):
            rows.append(places_T)
            continue
        first, last = int(image_N[0]), int(image_N[-1])
        rows.append(torch.cat((places_T[:first], first + next(index_IM), places_T[last + 1 :])))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def _positions_of_all(position_BT: Tensor, is_image_BT: Tensor, read_BM: Tensor, num_image_tokens: int) -> Tensor:
    """Return where the tokens would stand if the images were read whole, (B, T)."""
    has_image_B1 = is_image_BT.any(1, keepdim=True)
    first_B1 = is_image_BT.int().argmax(1, keepdim=True)
    is_behind_BT = (position_BT > first_B1) & ~is_image_BT & has_image_B1
    position_BT = position_BT + is_behind_BT * (num_image_tokens - read_BM.shape[1])
    return position_BT.masked_scatter(is_image_BT, (first_B1 + read_BM)[has_image_B1[:, 0]])
