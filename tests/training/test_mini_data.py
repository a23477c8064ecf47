"""What the mini model learns from: tensors of one size, the same for the same number."""

from typing import Any

import numpy as np
import pytest
import torch

from tokexport.dialogues.generate import make_example
from tokexport.dialogues.questions import region_of
from tokexport.dialogues.scene import CATEGORIES, COLOURS, SIZES, make_scene
from tokexport.training.compressed import NO_LABEL
from tokexport.training.conversation import ConversationEncoder
from tokexport.training.mini_data import (
    Captions,
    Conversations,
    CrowdedScenes,
    centre_patches,
    covered_cells,
    patches_to_read,
    place_of,
)

PATCHES, IMAGE_TOKENS, TEXT_TOKENS = 576, 576, 64
IMAGE_TOKEN, PAD = 4, 3


def conversations(processor: Any, seed: int = 0) -> Conversations:
    return Conversations(
        ConversationEncoder(processor, IMAGE_TOKENS),
        pad_id=PAD,
        text_tokens=TEXT_TOKENS,
        num_image_tokens=IMAGE_TOKENS,
        num=10,
        seed=seed,
    )


@pytest.mark.parametrize("index", [0, 7])
def test_conversations_are_padded_to_one_size(own_processor: Any, index: int):
    example = conversations(own_processor)[index]
    ids_T, labels_T = example["input_ids"], example["labels"]
    assert ids_T.shape == labels_T.shape == (TEXT_TOKENS + IMAGE_TOKENS - 1,)
    assert int((ids_T == IMAGE_TOKEN).sum()) == IMAGE_TOKENS
    last = int((labels_T != NO_LABEL).nonzero()[-1])
    assert (ids_T[last + 1 :] == PAD).all()
    assert own_processor.tokenizer.decode(ids_T[last : last + 1]) == "</s>"


def test_the_room_for_text_is_filled(own_processor: Any):
    # What is left is less than two questions take.
    paddings = [int((conversations(own_processor)[index]["input_ids"] == PAD).sum()) for index in range(5)]
    assert max(paddings) < 40


def test_a_conversation_is_about_its_picture(own_processor: Any):
    example = conversations(own_processor)[3]
    _, image, turns = make_example(0, "train", 3, TEXT_TOKENS // 14)
    assert example["pixels"].shape == (3, 336, 336)
    assert example["pixels"].permute(1, 2, 0).contiguous().numpy().tobytes() == image.tobytes()
    text = own_processor.tokenizer.decode(example["input_ids"])
    assert f"{turns[0].question}\nASSISTANT: {turns[0].answers[0]}</s>" in text


def test_a_crowded_scene_labels_every_patch():
    example = CrowdedScenes(0, 10)[2]
    cover_shape = (PATCHES, 49)
    assert {name: tuple(tensor.shape) for name, tensor in example.items()} == {
        "pixels": (3, 336, 336),
        "cover": cover_shape,
        **dict.fromkeys(["category", "colour", "size", "centre", "background", "texture"], (PATCHES,)),
    }
    # A patch has an object's category exactly where it has its colour.
    assert ((example["category"] > 0) == (example["colour"] > 0)).all()
    assert (example["category"] > 0).any()


@pytest.mark.parametrize("index", [0, 1])
def test_a_number_gives_the_same_scene_every_time(index: int):
    first, again = CrowdedScenes(0, 10)[index], CrowdedScenes(0, 99)[index]
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_another_seed_gives_other_scenes():
    assert not torch.equal(CrowdedScenes(0, 10)[0]["pixels"], CrowdedScenes(1, 10)[0]["pixels"])


def test_the_middle_of_every_object_is_in_a_patch():
    scene, _, _ = make_example(0, "train", 0, 1)
    centres = centre_patches(scene).view(24, 24)
    middles = {(int(y) // 14, int(x) // 14) for x, y in (item.centre for item in scene.objects)}
    assert {(int(row), int(column)) for row, column in centres.nonzero()} == middles


def test_cells_outside_of_all_objects_are_not_covered():
    scene, _, _ = make_example(0, "train", 0, 1)
    # From (patches, cells) back to a map with a cell of 2 x 2 pixels.
    cells = covered_cells(scene).view(24, 24, 7, 7).permute(0, 2, 1, 3).reshape(168, 168)
    inside = torch.zeros(168, 168, dtype=torch.bool)
    for item in scene.objects:
        left, top, right, bottom = item.bounds
        inside[top // 2 : (bottom + 1) // 2, left // 2 : (right + 1) // 2] = True
        assert cells[top // 2 : (bottom + 1) // 2, left // 2 : (right + 1) // 2].max() > 0.9
    assert (cells[~inside] == 0).all()
    assert cells.max() <= 1


def captions(processor: Any) -> Captions:
    return Captions(
        ConversationEncoder(processor, IMAGE_TOKENS),
        pad_id=PAD,
        text_tokens=96,
        num_image_tokens=IMAGE_TOKENS,
        num=10,
        seed=0,
    )


def test_a_caption_tells_kind_colour_size_and_place_of_objects(own_processor: Any):
    labels_T = captions(own_processor)[3]["labels"]
    words = own_processor.tokenizer.decode(labels_T[labels_T != NO_LABEL]).removesuffix("</s>").split()
    sizes = [i for i, word in enumerate(words) if word in SIZES]
    assert len(sizes) >= 3
    assert all(words[i - 1] in COLOURS and words[i - 2] in CATEGORIES for i in sizes)


def test_the_place_of_an_object_is_the_one_that_questions_ask_for():
    scene, _, _ = make_example(0, "train", 0, 3)
    asked = {item: region_of(item) for item in scene.objects}
    assert all(region in (None, place_of(item)) for item, region in asked.items())
    assert any(asked.values())


def test_what_objects_touch_is_read_first():
    scene = make_scene(np.random.default_rng(3), "train")
    touched = {int(place) for place in (covered_cells(scene).sum(1) > 0).nonzero()[:, 0]}
    assert 10 < len(touched) < 90
    read = patches_to_read(np.random.default_rng(0), scene, 100).tolist()
    assert read == sorted(set(read))
    assert len(read) == 100
    assert touched < set(read)
    few = patches_to_read(np.random.default_rng(0), scene, 10).tolist()
    assert set(few) < touched


def test_which_of_the_rest_is_read_is_left_to_chance():
    scene = make_scene(np.random.default_rng(3), "train")
    first, again, other = (patches_to_read(np.random.default_rng(seed), scene, 100).tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert patches_to_read(np.random.default_rng(0), scene, 576).tolist() == list(range(576))
