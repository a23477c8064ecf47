"""What a model is tuned on: LLaVA's data where there are any, made conversations where there are none."""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset
from transformers import LlavaProcessor

from tokexport.dialogues.questions import KINDS
from tokexport.dialogues.scene import SIDE
from tokexport.dialogues.schema import Split
from tokexport.errors import CheckpointError, InputError
from tokexport.exporter.export import Design
from tokexport.training.conversation import ConversationEncoder
from tokexport.training.llava_data import LlavaConversations, Padding, Reader, read_records
from tokexport.training.mini import PixelNormalizer, Talker
from tokexport.training.mini_data import Conversations

# Made conversations that no part of the mini model's own training saw.
_SEED = 100
# What compression costs most comes up more often.
TUNING_KINDS = (*KINDS, *("counting",) * 4, "reading", "whole_image")


@dataclass(frozen=True, kw_only=True)
class Material:
    """Examples with what makes batches of them and the module that learns from these.

    Attributes:
        name: of what they are made from, which other material does not share.
    """

    name: str
    examples: "Dataset[Any]"
    objective_of: Callable[[nn.Module], nn.Module]
    collate: Callable[[list[Any]], Any] | None = None


def llava_material(made: Design, data: Path, images: Path, *, num: int) -> Material:
    """Return conversations of a file in LLaVA's format.

    Raises:
        InputError: a malformed file or a missing image.
        CheckpointError: the model has no tokenizer and image processor.
    """
    processor = _processor(made)
    encoder = ConversationEncoder(processor, made.model.spec.num_vision_tokens)
    examples = LlavaConversations(read_records(data, images), encoder, processor.image_processor, num=num)
    padding = Padding(_pad_id(processor), made.model.spec.image_size)
    name = f"{data.name} {hashlib.sha256(data.read_bytes()).hexdigest()[:12]}"
    return Material(name=name, examples=examples, objective_of=Reader, collate=padding)


def made_material(
    made: Design,
    *,
    num: int,
    text_tokens: int = 384,
    split: Split = "train",
    seed: int = 0,
    kinds: Sequence[str] = TUNING_KINDS,
    num_read: int | None = None,
) -> Material:
    """Return conversations about made scenes of a split.

    Args:
        made: the recipe, checked against its model.
        num: of conversations.
        text_tokens: of a conversation.
        split: of the generator.
        seed: another makes other conversations.
        kinds: of questions, one that stands there twice coming up twice as often.
        num_read: vision tokens that stand in a conversation, those of the objects first; by default all of the model.

    Raises:
        InputError: the model takes images of another size.
        CheckpointError: the model has no tokenizer and image processor.
    """
    if made.model.spec.image_size != SIDE:
        raise InputError(
            f"made scenes have {SIDE} x {SIDE} pixels, and the model takes {made.model.spec.image_size}; give "
            "conversations with --data"
        )
    processor = _processor(made)
    num_image_tokens = made.model.spec.num_vision_tokens if num_read is None else num_read
    examples = Conversations(
        ConversationEncoder(processor, num_image_tokens),
        pad_id=_pad_id(processor),
        text_tokens=text_tokens,
        num_image_tokens=num_image_tokens,
        num=num,
        seed=_SEED + seed,
        split=split,
        kinds=kinds,
    )
    asked = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return Material(
        name=f"made scenes of seed {seed}, {text_tokens} text tokens: {asked}",
        examples=examples,
        objective_of=lambda model: Talker(model, PixelNormalizer(processor)),
    )


def _processor(made: Design) -> Any:
    directory = made.model.directory
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LlavaProcessor.from_pretrained(directory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{directory} has no usable tokenizer and image processor ({reason}); give a checkpoint that has them"
        ) from error


def _pad_id(processor: Any) -> int:
    pad_id = processor.tokenizer.pad_token_id
    return processor.tokenizer.eos_token_id if pad_id is None else pad_id
