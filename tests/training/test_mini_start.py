"""Where the attention of the mini model looks before any training."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tests.conftest import MINI
from tokexport.training.mini_start import start_locally, start_looking_up

SIDE = 24
FIRST_WORD, NUM_WORDS, NUM_PATCHES = 5, 40, 100


@pytest.fixture(scope="module")
def fresh() -> LlavaForConditionalGeneration:
    """Return a mini model with the weights it starts from."""
    torch.manual_seed(0)
    llava = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(MINI))
    llava.set_attn_implementation("eager")
    start_locally(llava)
    start_looking_up(llava)
    return llava


@pytest.fixture(scope="module")
def attention(fresh: LlavaForConditionalGeneration) -> Sequence[Tensor]:
    """Return how much each patch looks at each, layer by layer (heads, patches, patches), for a grey image."""
    tower: Any = fresh.model.vision_tower
    with torch.no_grad():
        found = tower(torch.zeros(1, 3, 14 * SIDE, 14 * SIDE), output_attentions=True).attentions
    return [of_layer[0, :, 1:, 1:] for of_layer in found]


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize(
    ("head", "offset"),
    [(0, (0.0, 0.0)), (1, (1.6, 0.0)), (2, (-1.6, 0.0)), (3, (0.0, 1.6)), (4, (0.0, -1.6))],
    ids=["itself", "below", "above", "right", "left"],
)
def test_a_head_of_a_first_layer_looks_around_its_offset(
    attention: Sequence[Tensor], layer: int, head: int, offset: tuple[float, float]
):
    steps = torch.arange(-3.0, 4.0)
    for row, column in ((12, 12), (17, 9)):
        seen = attention[layer][head, row * SIDE + column].view(SIDE, SIDE)
        near = seen[row - 3 : row + 4, column - 3 : column + 4]
        # Most of what it looks at is near; evenly spread, it would be 49 of 576.
        assert near.sum() > 0.45
        middle = ((near.sum(1) * steps).sum() / near.sum(), (near.sum(0) * steps).sum() / near.sum())
        assert middle == pytest.approx(offset, abs=0.4)


def test_the_later_layers_start_at_random(attention: Sequence[Tensor]):
    # All look about everywhere: none gives a patch even twice its share.
    assert max(float(of_layer.max()) for of_layer in attention[3:]) < 2 / SIDE**2


def read(llava: LlavaForConditionalGeneration, inputs_TD: Tensor) -> Sequence[Tensor]:
    """Return how much each token looks at each, layer by layer (heads, tokens, tokens)."""
    text: Any = llava.model.language_model
    with torch.no_grad():
        found = text(inputs_embeds=inputs_TD[None], output_attentions=True).attentions
    return [of_layer[0] for of_layer in found]


@pytest.fixture(scope="module")
def sentence(fresh: LlavaForConditionalGeneration) -> Tensor:
    """Return patches of which each is like a word, then some of those words, (tokens, width)."""
    table: Any = fresh.get_input_embeddings()
    words: Tensor = table.weight.detach()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randperm(500, generator=generator)[:NUM_PATCHES] + FIRST_WORD
    named = words[ids] - words.mean(0)
    patches = named / named.std() * words.std()
    return torch.cat((patches, words[ids[:NUM_WORDS]]))


def test_a_word_looks_at_the_patch_that_is_like_it(fresh: LlavaForConditionalGeneration, sentence: Tensor):
    seen = read(fresh, sentence)[0][:-1, NUM_PATCHES:, :NUM_PATCHES]
    likest = seen.sum(0).argmax(-1)
    assert (likest == torch.arange(NUM_WORDS)).float().mean() > 0.9
    own = seen.diagonal(dim1=1, dim2=2)
    assert own.mean() > 5 * seen.mean()


def test_what_all_words_share_does_not_make_them_look_at_each_other(
    fresh: LlavaForConditionalGeneration, sentence: Tensor
):
    seen = read(fresh, sentence)[0][:-1, -1]
    # Of others than itself and the patch that is like it.
    assert seen[:, NUM_PATCHES:-1].mean() < 1.5 * seen[:, NUM_WORDS:NUM_PATCHES].mean()


@pytest.mark.parametrize("layer", [1, 3, 5])
def test_the_last_head_of_every_other_layer_looks_at_the_word_before(
    fresh: LlavaForConditionalGeneration, sentence: Tensor, layer: int
):
    seen = read(fresh, sentence)[layer][-1]
    assert seen.diagonal(-1)[NUM_PATCHES:].mean() > 0.75


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_the_last_head_of_the_layers_between_looks_at_the_last_words(
    fresh: LlavaForConditionalGeneration, sentence: Tensor, layer: int
):
    seen = read(fresh, sentence)[layer][-1, -1]
    assert seen[-12:].sum() > 0.95
    assert seen[-12:].max() < 0.6


def test_the_last_words_come_together_where_the_last_one_stands(fresh: LlavaForConditionalGeneration, sentence: Tensor):
    text: Any = fresh.model.language_model
    captured: list[Tensor] = []
    hook = text.layers[0].self_attn.register_forward_hook(lambda _m, _i, output: captured.append(output[0][0, -1]))
    read(fresh, sentence)
    hook.remove()
    words = sentence[NUM_PATCHES:] - sentence[NUM_PATCHES:].mean(0)
    likeness = torch.nn.functional.cosine_similarity(captured[0], words, dim=1)
    assert likeness[-7:-1].mean() > 0.05 > 3 * likeness[:-12].mean().abs()


def test_the_layers_without_a_start_look_about_everywhere(fresh: LlavaForConditionalGeneration, sentence: Tensor):
    assert max(float(seen[:, -1].max()) for seen in read(fresh, sentence)[6:]) < 0.05
