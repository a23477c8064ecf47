"""What a model is tuned on: LLaVA's data where there are any, made conversations where there are none."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset
from transformers import LlavaProcessor

from tokexport.exporter.export import Design
from tokexport.training.compressed import CompressedLlava
from tokexport.training.conversation import ConversationEncoder
from tokexport.training.llava_data import LlavaConversations, Padding, Reader, read_records
from tokexport.training.mini import PixelNormalizer, Talker
from tokexport.training.mini_data import Conversations

# Made conversations that no part of the mini model's own training saw.
_SEED = 100


@dataclass(frozen=True, kw_only=True)
class Material:
    """Examples with what makes batches of them and the module that learns from these."""

    examples: "Dataset[Any]"
    objective_of: Callable[[CompressedLlava], nn.Module]
    collate: Callable[[list[Any]], Any] | None = None


def llava_material(made: Design, data: Path, images: Path, *, num: int) -> Material:
    """Return conversations of a file in LLaVA's format.

    Raises:
        InputError: a malformed file or a missing image.
    """
    processor: Any = LlavaProcessor.from_pretrained(made.model.directory)
    encoder = ConversationEncoder(processor, made.model.spec.num_vision_tokens)
    examples = LlavaConversations(read_records(data, images), encoder, processor.image_processor, num=num)
    pad_id = processor.tokenizer.pad_token_id
    padding = Padding(processor.tokenizer.eos_token_id if pad_id is None else pad_id, made.model.spec.image_size)
    return Material(examples=examples, objective_of=Reader, collate=padding)


def made_material(made: Design, *, num: int, text_tokens: int = 256) -> Material:
    """Return conversations about made scenes."""
    processor: Any = LlavaProcessor.from_pretrained(made.model.directory)
    num_image_tokens = made.model.spec.num_vision_tokens
    examples = Conversations(
        ConversationEncoder(processor, num_image_tokens),
        pad_id=processor.tokenizer.pad_token_id,
        text_tokens=text_tokens,
        num_image_tokens=num_image_tokens,
        num=num,
        seed=_SEED,
    )
    return Material(examples=examples, objective_of=lambda model: Talker(model, PixelNormalizer(processor)))
