"""Training examples for the bundled mini model, made as they are needed.

P pixels of a side, S patches of a side, T tokens
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tokexport.dialogues.generate import make_example
from tokexport.dialogues.questions import KINDS, REGIONS
from tokexport.dialogues.scene import PATCH, SIDE, Scene, SceneObject, cover, make_scene, patch_labels, render
from tokexport.dialogues.schema import Split
from tokexport.training.compressed import NO_LABEL
from tokexport.training.conversation import ConversationEncoder

PATCHES = SIDE // PATCH
CELLS = 7


class CrowdedScenes(Dataset[dict[str, Tensor]]):
    """Pictures with many objects and what each patch shows, to teach a vision tower to see.

    Args:
        seed: of the scenes, which no dialogue shares.
        num: of scenes.
        is_styled: whether letters and digits come in many styles.
    """

    def __init__(self, seed: int, num: int, split: Split = "train", *, is_styled: bool = False) -> None:
        self._seed, self._num, self._is_styled = seed, num, is_styled
        self._split: Split = split

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self._seed, 1000 + len(self._split), index])
        scene = make_scene(
            rng, self._split, min_objects=8, max_objects=36, is_for_questions=False, is_styled=self._is_styled
        )
        labels = patch_labels(scene)
        return {
            "pixels": _pixels(render(scene)),
            "category": torch.from_numpy(labels.category.reshape(-1)),
            "colour": torch.from_numpy(labels.colour.reshape(-1)),
            "size": torch.from_numpy(labels.size.reshape(-1)),
            "centre": centre_patches(scene),
            "cover": covered_cells(scene),
            "background": torch.full((PATCHES**2,), labels.background),
            "texture": torch.full((PATCHES**2,), labels.texture),
        }


class _Padded(Dataset[dict[str, Tensor]]):
    """Conversations about pictures in tensors of one size.

    Args:
        encoder: lays the turns out.
        pad_id: the token behind a conversation.
        text_tokens: room for text.
        num_image_tokens: of an image that are read, all of the objects' first.
        num: of conversations.
        seed: of the generator.
    """

    def __init__(
        self,
        encoder: ConversationEncoder,
        *,
        pad_id: int,
        text_tokens: int,
        num_image_tokens: int,
        num: int,
        seed: int,
    ) -> None:
        self._encoder, self._pad_id = encoder, pad_id
        self._text_tokens, self._length = text_tokens, text_tokens + num_image_tokens - 1
        self._num_read = num_image_tokens
        self._num, self._seed = num, seed

    def __len__(self) -> int:
        return self._num

    def _example(self, index: int, scene: Scene, image: Any, turns: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
        ids_T, labels_T, _ = self._encoder.encode(turns, has_image=True, max_text_tokens=self._text_tokens)
        missing = (0, self._length - len(ids_T))
        return {
            "pixels": _pixels(image),
            "read": patches_to_read(np.random.default_rng([self._seed, 3000, index]), scene, self._num_read),
            "input_ids": torch.nn.functional.pad(ids_T, missing, value=self._pad_id),
            "labels": torch.nn.functional.pad(labels_T, missing, value=NO_LABEL),
        }


class Captions(_Padded):
    """One answer a picture that tells of every object what it is, its colour, its size and its place.

    What follows the word for an object is to be looked up by that word alone, the simplest look there is.
    """

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self._seed, 2000, index])
        scene = make_scene(rng, "train", min_objects=8, max_objects=24, is_for_questions=False)
        single = [item for item in scene.objects if scene.num_of[(item.category,)] == 1]
        # Few enough words for the room: a place may be two.
        told = [single[i] for i in rng.permutation(len(single))][: (self._text_tokens - 20) // 5]
        caption = " ".join(f"{item.category} {item.colour} {item.size} {place_of(item)}" for item in told)
        return self._example(index, scene, render(scene), [("What is in the picture?", caption)])


class Conversations(_Padded):
    """As many questions and answers about a picture as there is room for.

    Args:
        split: of the generator.
        kinds: of questions.
    """

    def __init__(
        self,
        encoder: ConversationEncoder,
        *,
        pad_id: int,
        text_tokens: int,
        num_image_tokens: int,
        num: int,
        seed: int,
        split: Split = "train",
        kinds: Sequence[str] = KINDS,
    ) -> None:
        super().__init__(
            encoder, pad_id=pad_id, text_tokens=text_tokens, num_image_tokens=num_image_tokens, num=num, seed=seed
        )
        self._kinds = kinds
        self._split: Split = split
        # A turn takes at least so many tokens, so that enough are asked to fill the room.
        self._num_turns = text_tokens // 14

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        scene, image, turns = make_example(self._seed, self._split, index, self._num_turns, kinds=self._kinds)
        return self._example(index, scene, image, [(turn.question, turn.answers[0]) for turn in turns])


def patches_to_read(rng: np.random.Generator, scene: Scene, num: int) -> Tensor:
    """Return ``num`` patches, ascending: those that objects touch and by chance others, or as many of them as fit."""
    touched = (cover(scene).reshape(PATCHES, PATCH, PATCHES, PATCH).max(axis=(1, 3)) > 0).reshape(-1)
    order = rng.permutation(PATCHES**2)
    order = order[np.argsort(~touched[order], kind="stable")]
    return torch.from_numpy(np.sort(order[:num]))


def place_of(item: SceneObject) -> str:
    """Return the ninth of the image that the middle of an object lies in, also where it is near a border."""
    column, row = (int(3 * position / SIDE) for position in item.centre)
    return REGIONS[3 * row + column]


def centre_patches(scene: Scene) -> Tensor:
    """Return, row by row, 1 for a patch with the middle of an object in it and 0 for another, (S x S,)."""
    centres = torch.zeros(PATCHES, PATCHES, dtype=torch.int64)
    for item in scene.objects:
        x, y = item.centre
        centres[int(y) // PATCH, int(x) // PATCH] = 1
    return centres.reshape(-1)


def covered_cells(scene: Scene) -> Tensor:
    """Return which share of each of a patch's 7 x 7 cells objects cover, (S x S, 49)."""
    cells = cover(scene).reshape(PATCHES, CELLS, PATCH // CELLS, PATCHES, CELLS, PATCH // CELLS).mean(axis=(2, 5)) / 255
    return torch.from_numpy(cells.transpose(0, 2, 1, 3).reshape(PATCHES**2, CELLS**2).astype(np.float32))


def _pixels(image: Any) -> Tensor:
    """Return an RGB image as bytes (3, P, P)."""
    return torch.from_numpy(np.asarray(image, np.uint8).copy()).permute(2, 0, 1).contiguous()
