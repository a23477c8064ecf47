"""Labels of the relevance compressor: on a case worked out by hand, and against the definition with whole matrices."""

from pathlib import Path

import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import LlavaForConditionalGeneration

from tests.conftest import NUM_VISION_TOKENS
from tests.training.test_compressed import IMAGE_TOKEN, labels_behind, pixels, with_image, words
from tokexport.training.compressed import NO_LABEL
from tokexport.training.roll_out import RollOut, first_answers, roll_out, sharpened


def test_two_layers_by_hand():
    # One head of three tokens. In layer 0, token 1 reads token 0; in layer 1, token 2 reads token 1 with half a share.
    first, second = torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3)
    first[..., 1, 0], second[..., 2, 1], second[..., 2, 0] = 1.0, 0.5, 0.5
    slopes = [torch.ones(1, 1, 3, 3), torch.tensor([1.0, 2.0, 3.0]).expand(1, 1, 3, 3).clone()]
    # A negative slope counts for nothing.
    slopes[1][..., 2, 0] = -1.0
    reach = roll_out([first, second], slopes, torch.tensor([2]))
    # Itself, token 1 with 0.5 x 2, and token 0 only through it.
    assert reach.tolist() == [[1.0, 1.0, 1.0]]


def test_a_row_from_behind_is_the_row_of_the_whole_product():
    generator = torch.Generator().manual_seed(0)
    attention = [torch.rand(2, 3, 5, 5, generator=generator).tril() for _ in range(4)]
    slopes = [torch.randn(2, 3, 5, 5, generator=generator) for _ in range(4)]
    whole = torch.eye(5).expand(2, 5, 5)
    for share, slope in zip(attention, slopes, strict=True):
        whole = whole + (share * slope).clamp(min=0).mean(1) @ whole
    place = torch.tensor([4, 2])
    assert_close(roll_out(attention, slopes, place), whole[torch.arange(2), place])


def test_the_lower_half_is_nothing_and_the_rest_sums_to_one():
    assert sharpened(torch.tensor([[1.0, 4.0, 2.0, 4.0]])).tolist() == [[0.0, 0.5, 0.0, 0.5]]
    assert sharpened(torch.zeros(1, 4)).tolist() == [[0.25] * 4]


def test_the_first_answer_ends_before_the_next_question():
    no = NO_LABEL
    labels = torch.tensor([[no, no, 5, 6, no, 7, 8], [no, 4, 3, 2, 1, 1, 1]])
    first, end = first_answers(labels)
    assert (first.tolist(), end.tolist()) == ([2, 1], [4, 7])


def test_what_is_read_is_the_questions_attention_in_the_first_layer(checkpoint: Path):
    llava = LlavaForConditionalGeneration.from_pretrained(checkpoint)
    batch = two_conversations()
    found = RollOut(llava)(**batch)
    with torch.inference_mode():
        result = llava(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], output_attentions=True)
    for row, (num_before, num_asked) in enumerate(((3, 5), (7, 1))):
        behind = num_before + NUM_VISION_TOKENS
        share = result.attentions[0][row].mean(0)[behind : behind + num_asked, num_before:behind].mean(0)
        assert_close(found["attention"][row], share)


def test_labels_are_shares_and_depend_on_the_answer(checkpoint: Path):
    batch = two_conversations()
    found = RollOut(LlavaForConditionalGeneration.from_pretrained(checkpoint))(**batch)["label"]
    assert_close(found.sum(1), torch.ones(2))
    assert ((found == 0).sum(1) >= NUM_VISION_TOKENS // 2).all()
    batch["input_ids"][0, -4:] = torch.tensor([300, 301, 302, 303])
    other = RollOut(LlavaForConditionalGeneration.from_pretrained(checkpoint))(**batch)["label"]
    assert not torch.allclose(other[0], found[0])
    assert_close(other[1], found[1])


def test_conversations_without_an_image_are_left_out(checkpoint: Path):
    explain = RollOut(LlavaForConditionalGeneration.from_pretrained(checkpoint))
    ids = torch.stack([torch.tensor(words(24 + NUM_VISION_TOKENS, 1)), with_image(words(3, 1), words(21, 2))])
    labels = labels_behind(ids, 30)
    assert explain(pixels(1), ids, labels)["label"].shape == (1, NUM_VISION_TOKENS)
    assert len(explain(pixels(0), ids[:1], labels[:1])["label"]) == 0


def two_conversations() -> dict[str, Tensor]:
    """Return two of 12 text tokens, the last 4 of which are the answer."""
    ids = torch.stack([with_image(words(3, 1), words(9, 2)), with_image(words(7, 3), words(5, 4))])
    assert (ids == IMAGE_TOKEN).sum().item() == 2 * NUM_VISION_TOKENS
    return {"pixel_values": pixels(2), "input_ids": ids, "labels": labels_behind(ids, 24)}
