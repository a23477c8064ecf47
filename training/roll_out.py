"""Which vision tokens an answer comes from: attention roll-out weighted by gradients, the labels of ``relevance``.

B conversations, T tokens, H heads, N vision tokens, D width, U tokens behind an image
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from tokexport.training.compressed import NO_LABEL, CompressedLlava


class RollOut(nn.Module):
    """Explains the first answer of conversations by the image (arXiv 2506.01097, after arXiv 2103.15679).

    Args:
        llava: the model, frozen; it attends in plain matrix products from here on, whose gradients can be seen.
        most_tokens: of an answer that are explained, the first ones.
    """

    def __init__(self, llava: LlavaForConditionalGeneration, most_tokens: int = 16) -> None:
        super().__init__()
        llava.requires_grad_(False).set_attn_implementation("eager")
        self.whole = CompressedLlava(llava, {})
        self._most_tokens = most_tokens

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, labels: Tensor, read: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """Return, for each conversation with an image, what the network reads and what it is to say.

        Args:
            pixel_values: the image of each conversation that has one.
            input_ids: (B, T), images whole.
            labels: (B, T); only the first answer of a row counts.
            read: taken for material that has it; every image is read whole.

        Returns:
            ``attention``: of the first layer, from the text between image and answer to the image, averaged over heads
            and tokens. ``label``: the share of each vision token in the answer, 0 for the lower half. (B, N) both.
        """
        is_image_BT = input_ids == self.whole.image_token
        has_image_B = is_image_BT.any(1)
        input_ids, labels, is_image_BT = (part[has_image_B] for part in (input_ids, labels, is_image_BT))
        if not len(input_ids):
            nothing = torch.zeros(0, 0, device=labels.device)
            return {"attention": nothing, "label": nothing}
        first_B, end_B = first_answers(labels)
        length = int(end_B.max())
        input_ids, is_image_BT = input_ids[:, :length], is_image_BT[:, :length]
        with torch.no_grad():
            hidden_BTD = self.whole.embedded(self.whole.image_features(pixel_values), input_ids)
        hidden_BTD, attention_BHTT = self._run(hidden_BTD.requires_grad_())
        num_rows, num_vision = len(input_ids), int(is_image_BT[0].sum())
        place_T = torch.arange(length, device=input_ids.device)
        last_image_B1 = torch.where(is_image_BT, place_T, -1).amax(1, keepdim=True)
        is_asking_BT = (place_T > last_image_B1) & (place_T < first_B.unsqueeze(1))
        asked_BT = attention_BHTT[0].detach().mean(1)
        asked_BT = (asked_BT * is_asking_BT.unsqueeze(-1)).sum(1) / is_asking_BT.sum(1, keepdim=True)
        explained_BT = self._explained(hidden_BTD, attention_BHTT, input_ids, first_B, end_B)
        return {
            "attention": asked_BT[is_image_BT].view(num_rows, num_vision),
            "label": sharpened(explained_BT[is_image_BT].view(num_rows, num_vision)),
        }

    def _run(self, hidden_BTD: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the last hidden states and every layer's attention, (B, H, T, T) each."""
        text: Any = self.whole.llava.model.language_model
        result = text(inputs_embeds=hidden_BTD, use_cache=False, output_attentions=True)
        return result.last_hidden_state, result.attentions

    def _explained(
        self,
        hidden_BTD: Tensor,
        attention_BHTT: Sequence[Tensor],
        input_ids: Tensor,
        first_B: Tensor,
        end_B: Tensor,
    ) -> Tensor:
        """Return what each token has to do with the answer, (B, T), averaged over the answer's tokens."""
        num_tokens_B = (end_B - first_B).clamp(max=self._most_tokens)
        total_BT = torch.zeros(hidden_BTD.shape[:2], device=hidden_BTD.device)
        rows_B = torch.arange(len(input_ids), device=input_ids.device)
        most = int(num_tokens_B.max())
        for number in range(most):
            is_said_B = number < num_tokens_B
            place_B = (first_B + number).clamp(max=input_ids.shape[1] - 1)
            logits_BW = self.whole.llava.lm_head(hidden_BTD[rows_B, place_B - 1])
            said = logits_BW[rows_B, input_ids[rows_B, place_B]][is_said_B].sum()
            slopes = torch.autograd.grad(said, attention_BHTT, retain_graph=number + 1 < most)
            total_BT += roll_out(attention_BHTT, slopes, place_B - 1) * is_said_B.unsqueeze(1)
        return total_BT / num_tokens_B.unsqueeze(1)


@torch.no_grad()
def roll_out(attention_BHTT: Sequence[Tensor], slopes_BHTT: Sequence[Tensor], place_B: Tensor) -> Tensor:
    """Return how much each token reaches the token ``place_B`` through all layers, (B, T).

    With R = I, every layer adds mean over heads of (A dA)+ times R; what is returned is the row ``place_B`` of R. A row
    can be taken from the last layer back, so that no product of matrices is needed.

    Args:
        attention_BHTT: of each layer, in their order.
        slopes_BHTT: what a larger attention would do to the logit that is explained.
        place_B: the token that says it.
    """
    batch, length = attention_BHTT[0].shape[0], attention_BHTT[0].shape[-1]
    reach_B1T = torch.zeros(batch, 1, length, device=place_B.device)
    reach_B1T[torch.arange(batch, device=place_B.device), 0, place_B] = 1
    for attention, slope in zip(reversed(attention_BHTT), reversed(slopes_BHTT), strict=True):
        reach_B1T = reach_B1T + reach_B1T @ (attention * slope).clamp(min=0).mean(1).to(reach_B1T.dtype)
    return reach_B1T[:, 0]


def sharpened(share_BN: Tensor) -> Tensor:
    """Return shares (B, N) with the lower half set to 0, and the rest made to sum to 1."""
    num_low = share_BN.shape[1] // 2
    lowest_BL = share_BN.argsort(dim=1, stable=True)[:, :num_low]
    share_BN = share_BN.scatter(1, lowest_BL, 0.0)
    total_B1 = share_BN.sum(1, keepdim=True)
    # Of an answer that does not look at the image, all tokens are alike.
    return torch.where(total_B1 > 0, share_BN / total_B1, 1 / share_BN.shape[1])


def first_answers(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the first answer of each row begins and the place behind its end, (B,) each."""
    is_answer_BT = labels != NO_LABEL
    first_B = is_answer_BT.int().argmax(1)
    place_T = torch.arange(labels.shape[1], device=labels.device)
    is_over_BT = ~is_answer_BT & (place_T > first_B.unsqueeze(1))
    end_B = torch.where(is_over_BT.any(1), is_over_BT.int().argmax(1), labels.shape[1])
    return first_B, end_B
