"""What the bundled mini model starts from: heads that already look where it is worth looking.

From random weights a small model spends most of its training on finding out where to look. What is set here
is only where attention starts; all of it learns on.

N vision tokens, C width of the tower, F waves, D width, W vocabulary, R rows of a head's weights
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from tokexport.training.mini_data import PATCHES

# Of the tower, see start_locally; offsets are rows and columns.
_LONGEST_WAVE, _NUM_LOCAL_LAYERS, _SHARPNESS = 100.0, 3, 1.1
_OFFSETS = ((0.0, 0.0), (1.6, 0.0), (-1.6, 0.0), (0.0, 1.6), (0.0, -1.6))
# Of the language model, see start_looking_up.
_NUM_LIKENESS_LAYERS, _LIKENESS, _SLOW, _LOUDNESS = 3, 2.5, 2e-3, 15.0
_NUM_LOOKING_BACK, _SHARED, _COPY = 6, 0.7, 0.6


@dataclass(frozen=True, kw_only=True)
class _LookBack:
    """How a head looks at the words before: how far, in waves of which frequencies, and what it does with them."""

    distance: float
    lowest: float
    highest: float
    sharpness: float
    is_copied: bool


_LAST_WORDS = _LookBack(distance=4.0, lowest=4e-3, highest=0.43, sharpness=0.4, is_copied=True)
_WORD_BEFORE = _LookBack(distance=1.0, lowest=0.1, highest=1.0, sharpness=0.7, is_copied=False)


def start_locally(llava: LlavaForConditionalGeneration) -> None:
    """Start the tower such that the heads of its first layers look at the patches around a patch.

    Position embeddings start as sines of row and column (arXiv 2205.01580), and queries and keys as those
    waves, turned by a head's offset, so that attention starts as a convolution (arXiv 2103.10697). From random
    weights a small tower needs many epochs only to find out which patches are neighbours.
    """
    tower: Any = llava.model.vision_tower
    table_NC: Tensor = tower.embeddings.position_embedding.weight
    num_waves = table_NC.shape[1] // 4
    frequency_F = _LONGEST_WAVE ** -torch.linspace(0, 1, num_waves)
    axes = torch.meshgrid(torch.arange(PATCHES), torch.arange(PATCHES), indexing="ij")
    row_NF, column_NF = (axis.reshape(-1, 1) * frequency_F for axis in axes)
    waves_NC = torch.cat((row_NF.sin(), row_NF.cos(), column_NF.sin(), column_NF.cos()), dim=1)
    with torch.no_grad():
        table_NC[1:] = waves_NC  # 0 is the class token
        for layer in tower.encoder.layers[:_NUM_LOCAL_LAYERS]:
            _look_around(layer.self_attn, frequency_F)


def _look_around(attention: Any, frequency_F: Tensor) -> None:
    """Let each head look at one offset: the patch itself, or the one below, above, right or left of it."""
    head_dim, num_waves = attention.head_dim, len(frequency_F)
    used = head_dim // 4
    for head, offset in zip(range(attention.num_heads), itertools.cycle(_OFFSETS), strict=False):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        for weight in (attention.q_proj.weight, attention.k_proj.weight):
            weight[rows] = 0
        for axis, shift in enumerate(offset):
            sines, cosines = 2 * axis * num_waves, (2 * axis + 1) * num_waves
            for wave in range(used):
                first, second = (
                    head * head_dim + 2 * (axis * used + wave),
                    head * head_dim + 2 * (axis * used + wave) + 1,
                )
                angle = frequency_F[wave] * shift
                sin, cos = _SHARPNESS * angle.sin(), _SHARPNESS * angle.cos()
                attention.k_proj.weight[first, sines + wave] = _SHARPNESS
                attention.k_proj.weight[second, cosines + wave] = _SHARPNESS
                # sin(x + angle) and cos(x + angle)
                attention.q_proj.weight[first, sines + wave], attention.q_proj.weight[first, cosines + wave] = cos, sin
                attention.q_proj.weight[second, cosines + wave], attention.q_proj.weight[second, sines + wave] = (
                    cos,
                    -sin,
                )


def start_looking_up(llava: LlavaForConditionalGeneration) -> None:
    """Start the language model such that words look at what is like them and at the words before.

    Both looks are needed to answer anything: ``colour`` and ``star`` have to come together in one place, and what is
    like a star in the image has to be found from there. Left to random weights, each waits for the other to be of
    use, and the model guesses from the words alone for thousands of steps.

    In the first layers all heads but the last start with keys like queries (arXiv 2305.09828), in the part of a head
    that rotates least, so that the word for a shape looks at the patches that are named by it. The last head of a
    layer starts with a look at a few words back, as a fixed function of the distance (arXiv 2108.12409); it is made of
    rotary waves along a direction that all words share and that no other head sees.
    """
    text: Any = llava.model.language_model
    width: int = text.config.hidden_size
    # Loud enough that what the first layers add does not drown the words.
    words_WD = text.embed_tokens.weight.data.mul_(_LOUDNESS)
    shared_D = functional.normalize(torch.randn(width), dim=0)
    words_WD += _SHARED * width**0.5 * words_WD.std() * shared_D
    # A pair of a head's dimensions turns by this angle from one token to the next.
    frequency_F: Tensor = text.rotary_emb.inv_freq
    last = text.config.num_attention_heads - 1
    with torch.no_grad():
        for layer in text.layers[:_NUM_LIKENESS_LAYERS]:
            for head in range(last):
                _look_at_likes(layer.self_attn, head, shared_D, frequency_F)
        for number, layer in enumerate(text.layers[:_NUM_LOOKING_BACK]):
            look = _LAST_WORDS if number % 2 == 0 else _WORD_BEFORE
            _look_back(layer.self_attn, last, shared_D, frequency_F, look)


def _look_at_likes(attention: Any, head: int, shared_D: Tensor, frequency_F: Tensor) -> None:
    head_dim, width = attention.head_dim, len(shared_D)
    slow_F = (frequency_F < _SLOW).nonzero()[:, 0]
    rows_R = head * head_dim + torch.cat((slow_F, slow_F + head_dim // 2))
    spread = _LIKENESS * (head_dim**0.5 / (len(rows_R) * width)) ** 0.5
    weight_RD = spread * torch.randn(len(rows_R), width)
    weight_RD -= torch.outer(weight_RD @ shared_D, shared_D)
    attention.q_proj.weight[rows_R] = weight_RD
    attention.k_proj.weight[rows_R] = weight_RD


def _look_back(attention: Any, head: int, shared_D: Tensor, frequency_F: Tensor, look: _LookBack) -> None:
    head_dim, width = attention.head_dim, len(shared_D)
    rows = slice(head * head_dim, (head + 1) * head_dim)
    used_F = ((frequency_F >= look.lowest) & (frequency_F <= look.highest)).float()
    # The score of a key is a sum of cosines of its distance, all of them 1 where the distance is the wanted one.
    angle_F = frequency_F * look.distance
    query_R = torch.cat((used_F, torch.zeros_like(used_F)))
    key_R = torch.cat((used_F * angle_F.cos(), used_F * angle_F.sin()))
    attention.q_proj.weight[rows] = look.sharpness * torch.outer(query_R, shared_D)
    attention.k_proj.weight[rows] = look.sharpness * torch.outer(key_R, shared_D)
    if look.is_copied:
        copied_RD = torch.linalg.qr(torch.randn(width, head_dim)).Q.T
        attention.v_proj.weight[rows] = _COPY * copied_RD
        attention.o_proj.weight[:, rows] = _COPY * copied_RD.T
