"""Between people and tensors: chat templates, tokens, pixels."""

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from PIL import Image
from tokenizers.decoders import DecodeStream
from transformers import LlavaProcessor

from tokexport.engines.generate import IMAGE
from tokexport.errors import BundleError, CheckpointError, InputError

Message = dict[str, Any]

_PROCESSOR_FILES = {
    "tokenizer": ("tokenizer.json", "tokenizer.model"),
    "image processor": ("processor_config.json", "preprocessor_config.json"),
}
"""What a processor is made of, and the files of which it needs one."""


class PromptProcessor:
    """The processor of an artefact: its tokenizer, image processor and chat template.

    Raises:
        BundleError: a file of it is missing or cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._processor: Any = LlavaProcessor.from_pretrained(directory)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).partition("\n")[0]
            raise BundleError(
                f"{directory} has no usable tokenizer and image processor ({reason}); build it from a "
                "checkpoint that has them"
            ) from error
        self._tokenizer = self._processor.tokenizer
        self._image_token: str = self._processor.image_token
        self._image_token_id: int = self._tokenizer.convert_tokens_to_ids(self._image_token)
        self._stop_ids = _stop_ids(directory, self._tokenizer.eos_token_id)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self._stop_ids

    def pixels(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Return RGB images as pixel values (N, 3, height, width)."""
        return np.asarray(
            self._processor.image_processor(images=list(images), return_tensors="np")["pixel_values"], np.float32
        )

    def seen(self, image: Image.Image) -> Image.Image:
        """Return an RGB image as the vision tower sees it, scaled and cut."""
        settings: dict[str, Any] = {"do_normalize": False, "do_rescale": False, "return_tensors": "np"}
        pixels_CRS = self._processor.image_processor(images=[image], **settings)["pixel_values"][0]
        return Image.fromarray(np.asarray(pixels_CRS).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))

    def encode(self, text: str, *, is_start: bool) -> list[int]:
        """Return token ids, ``IMAGE`` for every image token; a start gets the tokenizer's first token."""
        # Some templates write the first token themselves.
        is_bare = is_start and not text.startswith(self._tokenizer.bos_token or "\0")
        ids = self._tokenizer(text, add_special_tokens=is_bare)["input_ids"]
        return [IMAGE if token == self._image_token_id else token for token in ids]

    def render(self, messages: Sequence[Message], *, is_answer_next: bool) -> str:
        """Apply the chat template.

        Raises:
            BundleError: the checkpoint has none, or one that does not work.
        """
        if not self._processor.chat_template:
            raise BundleError(
                "the checkpoint has no chat template, so prompts cannot be laid out; add "
                "chat_template.jinja to it and build again"
            )
        try:
            return self._processor.apply_chat_template(
                list(messages), add_generation_prompt=is_answer_next, tokenize=False
            )
        except TemplateError as error:
            raise BundleError(
                f"the checkpoint's chat template does not work ({error}); mend chat_template.jinja and build again"
            ) from error

    def stream_text(self, tokens: Iterator[int]) -> Iterator[str]:
        """Yield text as soon as tokens make whole characters."""
        stream = DecodeStream(skip_special_tokens=True)
        backend = self._tokenizer.backend_tokenizer
        for token in tokens:
            piece = stream.step(backend, token)
            if piece:
                yield piece

    def user_message(self, text: str, num_images: int) -> Message:
        """Return what a user says, images first.

        Raises:
            InputError: nothing is said, or the text holds the marker of images.
        """
        if not text.strip():
            raise InputError("the prompt is empty; ask something")
        if self._image_token in text:
            raise InputError(
                f"the prompt holds {self._image_token}, the place of an image; leave it out, images are "
                "placed before the text"
            )
        return {"role": "user", "content": [{"type": "image"}] * num_images + [{"type": "text", "text": text}]}


def _stop_ids(directory: Path, eos: int | None) -> tuple[int, ...]:
    """Return the tokenizer's last token, and those at which the checkpoint says generation stops."""
    path = directory / "generation_config.json"
    try:
        found = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    except (OSError, ValueError, AttributeError) as error:
        raise BundleError(f"{path} cannot be read ({error}); build the artefact again") from error
    listed = found if isinstance(found, list) else [found]
    return tuple({token: None for token in (eos, *listed) if isinstance(token, int)})


def require_askable(directory: Path) -> None:
    """Find out before a build whether its artefact could be asked anything.

    Raises:
        CheckpointError: the checkpoint's tokenizer, image processor or chat template is missing or does not work.
    """
    missing = [
        f"no {what} ({' or '.join(names)})"
        for what, names in _PROCESSOR_FILES.items()
        if not any((directory / name).is_file() for name in names)
    ]
    if missing:
        raise CheckpointError(
            f"{directory} has {' and '.join(missing)}, so an artefact made from it could not be asked anything; copy "
            "the files from the model that it comes from"
        )
    try:
        Dialogue.start(PromptProcessor(directory)).ask("What is it?", 1)
    except BundleError as error:
        raise CheckpointError(str(error)) from error


@dataclass
class Dialogue:
    """The messages of a conversation and how far the model has read them."""

    processor: PromptProcessor
    messages: list[Message]
    read_text: str = ""

    @classmethod
    def start(cls, processor: PromptProcessor) -> "Dialogue":
        return cls(processor, [])

    def ask(self, text: str, num_images: int) -> list[int]:
        """Add a question and return the tokens that the model has not read yet."""
        self.messages.append(self.processor.user_message(text, num_images))
        rendered = self.processor.render(self.messages, is_answer_next=True)
        unread = _behind(rendered, self.read_text)
        is_start, self.read_text = not self.read_text, rendered
        return self.processor.encode(unread, is_start=is_start)

    def hear(self, answer: str) -> None:
        """Add the model's answer, whose tokens it has read while it wrote them."""
        answer = answer.strip()
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        rendered = self.processor.render(self.messages, is_answer_next=False)
        # A template that rewrites earlier turns is found out by the next question, if there is one.
        if rendered.startswith(self.read_text):
            rest = rendered[len(self.read_text) :].lstrip().removeprefix(answer)
            self.read_text = rendered[: len(rendered) - len(rest)]


def _behind(rendered: str, read: str) -> str:
    """Return what follows ``read``.

    Raises:
        InputError: the template changes earlier turns when later ones are added.
    """
    if not rendered.startswith(read):
        raise InputError(
            "the chat template rewrites earlier turns, so they cannot be kept in the cache; start a new "
            "conversation for every question"
        )
    return rendered[len(read) :]
