"""The model in the form it is trained in computes what ``transformers`` and the exported decoder compute."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tests.conftest import IMAGE_SIZE, NUM_VISION_TOKENS, adsc, recipe_for
from tokexport.engines.backend import SessionOptions
from tokexport.engines.generate import IMAGE, Conversation
from tokexport.engines.torch_session import TorchSession
from tokexport.exporter.export import Design, design
from tokexport.exporter.methods.adsc import Adsc
from tokexport.exporter.plan import TokenPlan
from tokexport.training.compressed import NO_LABEL, CompressedLlava, ConstantThinning, kept_places

IMAGE_TOKEN, PAD = 4, 3
STRIDE = {1: ConstantThinning(index=(0, 2, 4, 6, 8, 10, 12, 14)), 3: ConstantThinning(index=(0, 2, 4, 6))}


@pytest.fixture(params=["sdpa", "eager"])
def llava(request: pytest.FixtureRequest, llava: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Return the tiny model with each attention that training uses."""
    llava.set_attn_implementation(request.param)
    return llava


def words(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(5, 512, count)]


def pixels(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def with_image(before: Sequence[int], after: Sequence[int]) -> Tensor:
    return torch.tensor([*before, *[IMAGE_TOKEN] * NUM_VISION_TOKENS, *after])


def labels_behind(ids: Tensor, first: int) -> Tensor:
    """Label every token from ``first`` on."""
    return ids.masked_fill(torch.arange(ids.shape[-1]) < first, NO_LABEL)


def answered(
    model: CompressedLlava, pixel_values: Tensor, ids_BT: Tensor, labels_BT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, which share of the labels were the likeliest, and the logits (A, W) that both are made from."""
    logits: list[Tensor] = []
    hook = model.llava.lm_head.register_forward_hook(lambda _module, _inputs, output: logits.append(output))
    with torch.no_grad():
        loss, figures = model(pixel_values, ids_BT, labels_BT)
    hook.remove()
    return loss, figures["right"], logits[0]


def thinnings_of(made: Design) -> dict[int, ConstantThinning]:
    method = made.methods[0]
    assert isinstance(method, Adsc)
    indices = method.indices(made.model.spec, made.plans[0])
    return {layer: ConstantThinning(index=index, positions=method.positions) for layer, index in indices.items()}


def test_without_thinnings_it_is_the_model_of_transformers(llava: LlavaForConditionalGeneration):
    ids_BT = torch.stack([with_image(words(3, 1), words(9, 2)), with_image(words(7, 3), words(5, 4))])
    labels_BT = torch.stack([labels_behind(ids_T, 24) for ids_T in ids_BT])
    with torch.no_grad():
        expected: Any = llava(input_ids=ids_BT, pixel_values=pixels(2), labels=labels_BT)
    loss, right, logits_AW = answered(CompressedLlava(llava, {}), pixels(2), ids_BT, labels_BT)
    expected_AW = expected.logits[:, 23:-1].flatten(0, 1)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_AW, expected_AW, rtol=1e-4, atol=1e-4)
    assert right == (expected_AW.argmax(-1) == ids_BT[:, 24:].flatten()).float().mean()


def test_a_label_that_is_the_likeliest_counts_as_right(llava: LlavaForConditionalGeneration):
    model, ids_1T = CompressedLlava(llava, STRIDE), with_image(words(2), words(4)).unsqueeze(0)
    _, _, logits_AW = answered(model, pixels(1), ids_1T, labels_behind(ids_1T, 19))
    likeliest_1T = torch.cat((torch.full((1, 19), NO_LABEL), logits_AW.argmax(-1)[None]), dim=1)
    loss, right, _ = answered(model, pixels(1), ids_1T, likeliest_1T)
    assert right == 1
    torch.testing.assert_close(loss, -logits_AW.log_softmax(-1).max(-1).values.mean())


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"pattern": pattern, "positions": positions, "phase": phase}, id=f"{pattern} {positions} {phase}")
        for pattern in ("stride", "grid")
        for positions in ("keep", "renumber")
        for phase in (0.0, 0.5)
    ]
    + [pytest.param({"drops": [{"layer": 0, "keep": 6}]}, id="before the first layer")],
)
def test_with_thinnings_it_is_the_exported_decoder(
    checkpoint: Path, llava: LlavaForConditionalGeneration, options: dict[str, object]
):
    made = design(recipe_for(checkpoint, adsc(**options)))
    before, after, later = words(3, 1), words(5, 2), words(6, 3)
    session = TorchSession(made, SessionOptions(max_text_tokens=64, max_images=1, threads=1))
    conversation = Conversation(session)
    features = session.encode_images(pixels(1).numpy())
    # The second call finds the first in its cache.
    first_QW = conversation.feed([*before, IMAGE, *after], [features], all_logits=True)[-len(after) :]
    expected_AW = np.concatenate((first_QW, conversation.feed(later, all_logits=True)))

    ids_1T = with_image(before, [*after, *later, 9]).unsqueeze(0)
    labels_1T = labels_behind(ids_1T, len(before) + NUM_VISION_TOKENS + 1)
    model = CompressedLlava(llava, thinnings_of(made))
    _, _, logits_AW = answered(model, pixels(1), ids_1T, labels_1T)
    torch.testing.assert_close(logits_AW, torch.from_numpy(expected_AW), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "thinnings",
    [
        {},
        {**STRIDE, 3: ConstantThinning(index=(1, 3, 5, 7))},
        {layer: ConstantThinning(index=thinning.index, positions="renumber") for layer, thinning in STRIDE.items()},
    ],
    ids=["none", "another index", "other positions"],
)
def test_other_thinnings_say_something_else(
    llava: LlavaForConditionalGeneration, thinnings: dict[int, ConstantThinning]
):
    ids_1T = with_image(words(3), words(9)).unsqueeze(0)
    arguments = (pixels(1), ids_1T, labels_behind(ids_1T, 20))
    expected, found = (answered(CompressedLlava(llava, taken), *arguments)[2] for taken in (STRIDE, thinnings))
    assert (found - expected).abs().max() > 0.01


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_rows_of_a_batch_do_not_touch_each_other(llava: LlavaForConditionalGeneration, positions: Any):
    rows = [
        with_image(words(1, 1), words(9, 2)),
        torch.tensor(words(28, 3)),
        with_image(words(6, 4), words(4, 5)),
        with_image([], words(7, 6)),
    ]
    labels = [labels_behind(ids_T, len(ids_T) - 3) for ids_T in rows]
    images = pixels(3)
    of_row = [images[:1], images[:0], images[1:2], images[2:]]
    thinnings = {layer: ConstantThinning(index=found.index, positions=positions) for layer, found in STRIDE.items()}
    model = CompressedLlava(llava, thinnings)
    alone = [
        answered(model, seen, ids_T[None], labels_T[None])[2]
        for seen, ids_T, labels_T in zip(of_row, rows, labels, strict=True)
    ]
    ids_BT = torch.nn.utils.rnn.pad_sequence(rows, True, PAD)
    labels_BT = torch.nn.utils.rnn.pad_sequence(labels, True, NO_LABEL)
    together = answered(model, images, ids_BT, labels_BT)[2]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_a_batch_without_images_is_read(llava: LlavaForConditionalGeneration):
    ids_BT = torch.tensor([words(9, 1), words(9, 2)])
    labels_BT = labels_behind(ids_BT, 5)
    with torch.no_grad():
        expected: Any = llava(input_ids=ids_BT, labels=labels_BT)
    loss, _, _ = answered(CompressedLlava(llava, STRIDE), pixels(0), ids_BT, labels_BT)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)


def test_an_image_read_in_part_is_one_thinned_before_the_first_layer(llava: LlavaForConditionalGeneration):
    before, after = words(3, 1), words(9, 2)
    whole_1T = with_image(before, after).unsqueeze(0)
    index = (0, 3, 7, NUM_VISION_TOKENS - 1)
    thinned = CompressedLlava(llava, {0: ConstantThinning(index=index)})
    expected = answered(thinned, pixels(1), whole_1T, labels_behind(whole_1T, NUM_VISION_TOKENS + 5))
    part_1T = torch.tensor([[*before, *[IMAGE_TOKEN] * len(index), *after]])
    labels_1T = labels_behind(part_1T, len(index) + 5)
    with torch.no_grad():
        loss, _ = CompressedLlava(llava, {})(pixels(1), part_1T, labels_1T, read=torch.tensor([index]))
    torch.testing.assert_close(loss, expected[0])


def test_features_stand_where_a_plan_puts_them(llava: LlavaForConditionalGeneration):
    """As those read in part, in a batch with a conversation without an image too."""
    places = (0, 3, 7, NUM_VISION_TOKENS - 1)
    plan = TokenPlan(emitted=NUM_VISION_TOKENS, entering_llm=4, per_layer=(4,) * 4, places=places)
    part_1T = torch.tensor([[*words(3, 1), *[IMAGE_TOKEN] * len(places), *words(9, 2)]])
    labels_1T = labels_behind(part_1T, len(places) + 5)
    model = CompressedLlava(llava, {})
    with torch.no_grad():
        features = model.image_features(pixels(1))
        expected, _ = model.answer(features, part_1T, labels_1T, torch.tensor([places]))
        thin = features[:, list(places)]
        found, _ = model.answer(thin, part_1T, labels_1T, plan=plan)
        side_by_side, _ = model.answer(thin, part_1T, labels_1T)
        text_1T = torch.tensor([words(part_1T.shape[1], 5)])
        alone, _ = model.answer(features[:0], text_1T, labels_behind(text_1T, 4))
        both, _ = model.answer(
            thin,
            torch.cat((text_1T, part_1T)),
            torch.cat((labels_behind(text_1T, 4), labels_1T)),
            plan=plan,
        )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(both, torch.cat((alone, found)), rtol=1e-4, atol=1e-4)
    assert (side_by_side - expected).abs().max() > 1e-3


def test_each_image_can_be_read_in_other_parts(llava: LlavaForConditionalGeneration):
    parts = torch.tensor([[0, 1, 2, 3], [4, 9, 10, 15]])
    ids_BT = torch.tensor([[*words(3, n), *[IMAGE_TOKEN] * 4, *words(9, n + 1)] for n in range(2)])
    labels_BT = torch.stack([labels_behind(ids_T, 9) for ids_T in ids_BT])
    model = CompressedLlava(llava, {})
    with torch.no_grad():
        together, _ = model(pixels(2), ids_BT, labels_BT, read=parts)
        alone = [model(pixels(2)[n : n + 1], ids_BT[n : n + 1], labels_BT[n : n + 1], parts[n : n + 1]) for n in (0, 1)]
        same_parts, _ = model(pixels(2), ids_BT, labels_BT, read=parts[:1].expand(2, -1))
    torch.testing.assert_close(together, (alone[0][0] + alone[1][0]) / 2)
    assert (together - same_parts).abs() > 1e-4


def test_the_gradient_reaches_every_adapter_and_nothing_else(llava: LlavaForConditionalGeneration):
    config = LoraConfig(r=2, target_modules=r".*language_model\.layers\.\d+\..*_proj", init_lora_weights=False)
    tuned: Any = get_peft_model(llava, config)
    ids_1T = with_image(words(3), words(9)).unsqueeze(0)
    model = CompressedLlava(tuned.base_model.model, STRIDE)
    loss, _ = model(pixels(1), ids_1T, labels_behind(ids_1T, 20))
    loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.grad is not None)


def test_the_thinnings_can_be_changed_between_two_calls(llava: LlavaForConditionalGeneration):
    ids_1T = with_image(words(3), words(9)).unsqueeze(0)
    arguments = (pixels(1), ids_1T, labels_behind(ids_1T, 20))
    model = CompressedLlava(llava, {})
    model.thinnings = STRIDE
    expected = answered(CompressedLlava(llava, STRIDE), *arguments)[0]
    assert answered(model, *arguments)[0] == expected


@pytest.mark.parametrize(
    ("tokens", "index", "expected"),
    [
        (["..####."], (0, 2), [[0, 1, 2, 4, 6]]),
        (["####..."], (1, 3), [[1, 3, 4, 5, 6]]),
        (["...####"], (3,), [[0, 1, 2, 6]]),
        ([".####", "####."], (0, 1), [[0, 1, 2], [0, 1, 4]]),
        ([".####.", "......"], (0, 3), [[0, 1, 4, 5, -1, -1], [0, 1, 2, 3, 4, 5]]),
    ],
    ids=["in the middle", "at the start", "at the end", "two rows", "a row without an image"],
)
def test_text_and_the_tokens_of_the_index_stay(tokens: list[str], index: tuple[int, ...], expected: list[list[int]]):
    is_image_BT = torch.tensor([[token == "#" for token in row] for row in tokens])
    assert kept_places(is_image_BT, torch.tensor(index)).tolist() == expected


def test_each_image_keeps_tokens_of_its_own():
    is_image_BT = torch.tensor([[token == "#" for token in row] for row in (".####.", "......", "####..")])
    kept = kept_places(is_image_BT, torch.tensor([[0, 3], [1, 2]]))
    assert kept.tolist() == [[0, 1, 4, 5, -1, -1], [0, 1, 2, 3, 4, 5], [1, 2, 4, 5, -1, -1]]
