"""Conversations in LLaVA's format: what is wrong is named, what is right becomes batches."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from tests.conftest import IMAGE_SIZE, NUM_VISION_TOKENS
from tests.training.conftest import write_llava_data
from tokexport.errors import InputError
from tokexport.training.compressed import NO_LABEL, CompressedLlava
from tokexport.training.conversation import ConversationEncoder
from tokexport.training.llava_data import LlavaConversations, Padding, Reader, Record, read_records

IMAGE_TOKEN, PAD = 4, 3
ASKED = {"from": "human", "value": "<image>\nWhat is it?"}
TOLD = {"from": "gpt", "value": "a star"}


def entry(**changes: Any) -> dict[str, Any]:
    return {"id": "7", "image": "a.png", "conversations": [ASKED, TOLD], **changes}


def saying(*messages: object) -> dict[str, Any]:
    return entry(conversations=list(messages))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    return folder


def written(folder: Path, found: object) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(found))
    return path


def conversations(records: Sequence[Record], encoder: ConversationEncoder, processor: Any, **options: Any) -> Any:
    return LlavaConversations(records, encoder, processor.image_processor, **{"num": 100, **options})


def test_questions_answers_and_images_are_read(tmp_path: Path, images: Path):
    more = [{"from": "human", "value": " Where? "}, {"from": "gpt", "value": "left\n"}]
    path = written(tmp_path, [saying(ASKED, TOLD, *more)])
    assert read_records(path, images) == [
        Record(image=images / "a.png", turns=(("What is it?", "a star"), ("Where?", "left")))
    ]


@pytest.mark.parametrize("value", ["<image>\nWhat is it?", "What is it?\n<image>"], ids=["before", "behind"])
def test_the_place_of_the_image_is_no_part_of_the_question(tmp_path: Path, images: Path, value: str):
    path = written(tmp_path, [saying({"from": "human", "value": value}, TOLD)])
    assert read_records(path, images)[0].turns[0][0] == "What is it?"


@pytest.mark.parametrize("without", [{}, {"image": None}], ids=["no field", "null"])
def test_a_conversation_may_be_about_no_image(tmp_path: Path, images: Path, without: dict[str, Any]):
    path = written(tmp_path, [{"conversations": [{"from": "human", "value": "Hi"}, TOLD], **without}])
    assert read_records(path, images) == [Record(image=None, turns=(("Hi", "a star"),))]


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ("a text", " is str, expected an object with image and conversations"),
        ({"image": "a.png"}, ": conversations must be a list of question and answer in turn, at least one pair; it "),
        (entry(conversations={}), ": conversations must be a list of question and answer in turn, at least one pair; "),
        (saying(), ": conversations must be a list of question and answer in turn, at least one pair; it holds 0"),
        (saying(ASKED), ": conversations must be a list of question and answer in turn, at least one pair; it holds 1"),
        (saying(ASKED, "star"), ", conversations 1 is str, expected an object with from and value"),
        (saying(ASKED, {"value": "a star"}), ", conversations 1 has no text in from; choose one of: value"),
        (saying(ASKED, {"from": "gpt", "valeu": "x"}), ", conversations 1 has no text in value; did you mean 'valeu'?"),
        (saying(ASKED, {"from": "gpt", "value": 3}), ", conversations 1 has no text in value; "),
        (saying(TOLD, ASKED), ", conversations 0: from is 'gpt', expected \"human\"; questions and answers alternate"),
        (saying(ASKED, ASKED), ", conversations 1: from is 'human', expected \"gpt\"; questions and answers alternate"),
        (
            saying(ASKED, {"from": "assistant", "value": "x"}),
            ", conversations 1: from is 'assistant', expected \"gpt\"; questions and answers alternate",
        ),
        (
            saying({"from": "human", "value": "What?"}, TOLD),
            ": <image> stands in messages []; it must stand once, in message 0, where there is an image, and nowhere",
        ),
        (
            saying(ASKED, TOLD, ASKED, TOLD),
            ": <image> stands in messages [0, 2]; it must stand once, in message 0, where there is an image, and ",
        ),
        (
            saying({"from": "human", "value": "<image><image> What?"}, TOLD),
            ": <image> stands in messages [0, 0]; it must stand once",
        ),
        (entry(image=None), ": <image> stands in messages [0]; it must stand once, in message 0, where there is an im"),
        (
            saying({"from": "human", "value": "<image>\n"}, TOLD),
            ": question 0 is empty; every question needs words",
        ),
        (saying(ASKED, {"from": "gpt", "value": " \n"}), ": answer 0 is empty; every answer needs words"),
        (
            saying(ASKED, TOLD, {"from": "human", "value": "Or?"}, {"from": "gpt", "value": ""}),
            ": answer 1 is empty; every answer needs words",
        ),
        (
            saying(ASKED, {"from": "gpt", "value": "half \ud800"}),
            ", conversations 1: value holds half a character, an unpaired surrogate; ",
        ),
        (entry(image="b.png"), ": there is no image {images}/b.png; give the folder of the images with --images"),
        (entry(image=3), ": image is 3, expected the path of a file below the folder of the images"),
        (entry(image=""), ": image is '', expected the path of a file below the folder of the images"),
        (entry(image="b" * 300), ": there is no image {images}/bbbb"),
    ],
)
def test_what_is_wrong_is_named_with_its_number_and_field(tmp_path: Path, images: Path, found: object, text: str):
    path = written(tmp_path, [entry(), found])
    with pytest.raises(InputError) as caught:
        read_records(path, images)
    assert str(caught.value).startswith(f"{path}, entry 1{text.format(images=images)}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{", " is no JSON in UTF-8 (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); "),
        (b"[\xff]", " is no JSON in UTF-8 ('utf-8' codec can't decode byte 0xff in position 1: invalid start byte); "),
        (b"[" * 100_000, " is no JSON in UTF-8 (maximum recursion depth exceeded"),
        (b"[]", " holds an empty list, expected a list of at least one conversation"),
        (b"{}", " holds dict, expected a list of at least one conversation"),
        (None, " cannot be read (No such file or directory); give a file in LLaVA's format"),
    ],
    ids=["no JSON", "no UTF-8", "too deep", "empty list", "no list", "no file"],
)
def test_a_file_that_holds_no_conversations_is_refused(tmp_path: Path, content: bytes | None, text: str):
    path = tmp_path / "data.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_records(path, tmp_path)
    assert str(caught.value).startswith(f"{path}{text}")


@pytest.mark.parametrize("content", [b"no image", None], ids=["another file", "cut"])
def test_an_image_that_cannot_be_read_is_named_when_it_is_needed(
    images: Path, encoder: ConversationEncoder, processor: Any, content: bytes | None
):
    path = images / "a.png"
    path.write_bytes(path.read_bytes()[:-30] if content is None else content)
    examples = conversations([Record(image=path, turns=(("What?", "a star"),))], encoder, processor)
    with pytest.raises(InputError) as caught:
        _ = examples[0]
    assert str(caught.value).startswith(f"{path} cannot be read as an image (")
    assert str(caught.value).endswith("); replace it or remove its entry")


def test_an_example_is_what_the_encoder_and_the_image_processor_make(
    tmp_path: Path, encoder: ConversationEncoder, processor: Any
):
    (record,) = read_records(*write_llava_data(tmp_path, 1))
    assert record.image is not None
    example = conversations([record], encoder, processor)[0]
    ids_T, labels_T, _ = encoder.encode(record.turns, has_image=True)
    assert example["input_ids"].tolist() == ids_T.tolist()
    assert example["labels"].tolist() == labels_T.tolist()
    with Image.open(record.image) as image:
        expected = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(example["pixel_values"], expected)
    assert expected.shape == (3, IMAGE_SIZE, IMAGE_SIZE)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_any_kind_become_pixel_values(images: Path, encoder: ConversationEncoder, processor: Any, mode: str):
    path = images / "other.tiff"
    Image.new(mode, (70, 30)).save(path)
    example = conversations([Record(image=path, turns=(("What?", "a star"),))], encoder, processor)[0]
    assert example["pixel_values"].shape == (3, IMAGE_SIZE, IMAGE_SIZE)


def test_a_conversation_without_an_image_has_no_place_for_one(encoder: ConversationEncoder, processor: Any):
    example = conversations([Record(image=None, turns=(("Hi", "a star"),))], encoder, processor)[0]
    assert example["pixel_values"] is None
    assert IMAGE_TOKEN not in example["input_ids"]


def test_turns_beyond_the_room_are_left_out(encoder: ConversationEncoder, processor: Any):
    record = Record(image=None, turns=(("Hi", "a star"),) * 50)
    example = conversations([record], encoder, processor, max_text_tokens=64)[0]
    assert 32 < len(example["input_ids"]) <= 64


def order_of(num_records: int, encoder: ConversationEncoder, processor: Any, **options: Any) -> list[str]:
    """Return the answers of three epochs in their order."""
    records = [Record(image=None, turns=(("Hi", str(number)),)) for number in range(num_records)]
    examples = conversations(records, encoder, processor, num=3 * num_records, **options)
    answers = [examples[index]["labels"] for index in range(len(examples))]
    return [processor.tokenizer.decode(labels_T[labels_T != NO_LABEL]) for labels_T in answers]


def test_every_epoch_holds_every_conversation_in_another_order(encoder: ConversationEncoder, processor: Any):
    answers = order_of(6, encoder, processor)
    epochs = [tuple(answers[first : first + 6]) for first in (0, 6, 12)]
    assert [sorted(epoch) for epoch in epochs] == [[f" {number}</s>" for number in range(6)]] * 3
    assert len(set(epochs)) == 3


def test_the_order_is_that_of_the_seed(encoder: ConversationEncoder, processor: Any):
    assert order_of(6, encoder, processor, order_seed=1) == order_of(6, encoder, processor, order_seed=1)
    assert order_of(6, encoder, processor, order_seed=1) != order_of(6, encoder, processor, order_seed=2)


def example(length: int, image: float | None) -> dict[str, Any]:
    return {
        "pixel_values": None if image is None else torch.full((3, 2, 2), image),
        "input_ids": torch.arange(10, 10 + length),
        "labels": torch.arange(10, 10 + length),
    }


def test_shorter_conversations_are_padded_on_the_right():
    batch = Padding(PAD, side=2)([example(2, None), example(4, None)])
    assert batch["input_ids"].tolist() == [[10, 11, PAD, PAD], [10, 11, 12, 13]]
    assert batch["labels"].tolist() == [[10, 11, NO_LABEL, NO_LABEL], [10, 11, 12, 13]]


@pytest.mark.parametrize(
    ("images", "expected"), [((1.0, None, 2.0), [1.0, 2.0]), ((None, None), [])], ids=["some", "none"]
)
def test_a_batch_holds_the_images_there_are(images: tuple[float | None, ...], expected: list[float]):
    batch = Padding(PAD, side=2)([example(2, image) for image in images])
    assert batch["pixel_values"].shape == (len(expected), 3, 2, 2)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == expected


def test_the_reader_learns_from_batches_with_and_without_images(
    tmp_path: Path, llava: LlavaForConditionalGeneration, encoder: ConversationEncoder, processor: Any
):
    examples = conversations(read_records(*write_llava_data(tmp_path, 4)), encoder, processor)
    batch = Padding(PAD, IMAGE_SIZE)([examples[index] for index in range(4)])
    assert (len(batch["pixel_values"]), len(batch["input_ids"])) == (3, 4)
    assert int((batch["input_ids"] == IMAGE_TOKEN).sum()) == 3 * NUM_VISION_TOKENS
    loss, figures = Reader(CompressedLlava(llava, {}))(**batch)
    loss.backward()
    assert np.isfinite(loss.item())
    assert 0 <= figures["right"] <= 1
    assert llava.lm_head.weight.grad is not None
