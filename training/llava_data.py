"""Conversations in the format that LLaVA's own training data come in.

A JSON list of ``{"id", "image", "conversations": [{"from": "human", "value": "<image>\\nWhat ...?"},
{"from": "gpt", "value": "..."}, ...]}``; the image is a path below a folder, and may be missing.

B conversations, T tokens of the longest
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from tokexport.errors import InputError, nearest
from tokexport.training.compressed import NO_LABEL
from tokexport.training.conversation import ConversationEncoder

_IMAGE = "<image>"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One conversation; ``image`` is None where it is about none."""

    image: Path | None
    turns: tuple[tuple[str, str], ...]


def read_records(path: Path, images: Path) -> list[Record]:
    """Read a file of conversations.

    Raises:
        InputError: no JSON, a field missing or wrong, or an image that is not there; with number and field.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a file in LLaVA's format") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON in UTF-8 ({error}); give a file in LLaVA's format") from error
    if not isinstance(found, list) or not found:
        what = "an empty list" if found == [] else type(found).__name__
        raise InputError(f"{path} holds {what}, expected a list of at least one conversation")
    return [_record(entry, f"{path}, entry {number}", images) for number, entry in enumerate(found)]


class LlavaConversations(Dataset[dict[str, Any]]):
    """Conversations as tokens and pixels, over and over.

    Args:
        records: the conversations.
        encoder: lays them out.
        image_processor: of the checkpoint.
        order_seed: of the order, which changes from epoch to epoch.
        max_text_tokens: turns beyond it are left out.
    """

    def __init__(
        self,
        records: Sequence[Record],
        encoder: ConversationEncoder,
        image_processor: Any,
        *,
        num: int,
        order_seed: int = 0,
        max_text_tokens: int = 2048,
    ) -> None:
        self._records, self._encoder, self._image_processor = records, encoder, image_processor
        self._num, self._order_seed, self._max_text_tokens = num, order_seed, max_text_tokens

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, place = divmod(index, len(self._records))
        order = torch.randperm(len(self._records), generator=torch.Generator().manual_seed(self._order_seed + epoch))
        record = self._records[int(order[place])]
        ids_T, labels_T, _ = self._encoder.encode(
            record.turns, has_image=record.image is not None, max_text_tokens=self._max_text_tokens
        )
        return {"pixel_values": self._pixels(record.image), "input_ids": ids_T, "labels": labels_T}

    def _pixels(self, path: Path | None) -> Tensor | None:
        if path is None:
            return None
        try:
            with Image.open(path) as image:
                found = self._image_processor(images=[image.convert("RGB")], return_tensors="pt")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{path} cannot be read as an image ({error}); replace it or remove its entry") from error
        return found["pixel_values"][0]


class Padding:
    """Makes a batch: conversations padded on the right, the images there are.

    Args:
        pad_id: the token behind a conversation.
        side: pixels of an image's side.
    """

    def __init__(self, pad_id: int, side: int) -> None:
        self._pad_id, self._side = pad_id, side

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        images = [example["pixel_values"] for example in examples if example["pixel_values"] is not None]
        return {
            "pixel_values": torch.stack(images) if images else torch.zeros(0, 3, self._side, self._side),
            "input_ids": pad_sequence([e["input_ids"] for e in examples], True, self._pad_id),
            "labels": pad_sequence([e["labels"] for e in examples], True, NO_LABEL),
        }


class Reader(nn.Module):
    """Learns to continue conversations whose images are already pixel values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return what the model returns."""
        dtype = next(self.model.parameters()).dtype
        return self.model(pixel_values.to(dtype), input_ids, labels)


def _record(entry: Any, where: str, images: Path) -> Record:
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {type(entry).__name__}, expected an object with image and conversations")
    said = entry.get("conversations")
    if not isinstance(said, list) or not said or len(said) % 2:
        raise InputError(
            f"{where}: conversations must be a list of question and answer in turn, at least one pair; "
            f"it holds {len(said) if isinstance(said, list) else type(said).__name__}"
        )
    texts = [_text(message, f"{where}, conversations {i}", ("human", "gpt")[i % 2]) for i, message in enumerate(said)]
    marked = [i for i, text in enumerate(texts) for _ in range(text.count(_IMAGE))]
    image = entry.get("image")
    if not (image is None or (isinstance(image, str) and image)):
        raise InputError(f"{where}: image is {image!r}, expected the path of a file below the folder of the images")
    if marked != ([0] if image is not None else []):
        raise InputError(
            f"{where}: {_IMAGE} stands in messages {marked}; it must stand once, in message 0, where there is an "
            "image, and nowhere else"
        )
    questions = [text.replace(_IMAGE, "").strip() for text in texts[::2]]
    answers = [text.strip() for text in texts[1::2]]
    for kind, listed in (("question", questions), ("answer", answers)):
        if "" in listed:
            raise InputError(f"{where}: {kind} {listed.index('')} is empty; every {kind} needs words")
    path = None if image is None else images / image
    if path is not None and not _is_file(path):
        raise InputError(f"{where}: there is no image {path}; give the folder of the images with --images")
    return Record(image=path, turns=tuple(zip(questions, answers, strict=True)))


def _text(message: Any, where: str, speaker: str) -> str:
    if not isinstance(message, dict):
        raise InputError(f"{where} is {type(message).__name__}, expected an object with from and value")
    for field in ("from", "value"):
        if not isinstance(message.get(field), str):
            raise InputError(f"{where} has no text in {field}{nearest(field, list(message))}")
    if any("\ud800" <= character <= "\udfff" for character in message["value"]):
        raise InputError(
            f"{where}: value holds half a character, an unpaired surrogate; write it whole or leave it out"
        )
    if message["from"] != speaker:
        raise InputError(f'{where}: from is {message["from"]!r}, expected "{speaker}"; questions and answers alternate')
    return message["value"]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long, or a folder that may not be entered
        return False
