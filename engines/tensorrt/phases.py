"""What a decoder engine is called with: an image in a prompt, text alone, one token.

Each phase is an optimization profile of one engine with one set of weights. A size that is nothing but 0 in a phase
makes TensorRT's compiler fail, so the phases without an image could take one; what they are tuned for has none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tokexport.engines.backend import DecoderStep, SessionOptions
from tokexport.errors import InputError
from tokexport.exporter.graph_io import GraphIO
from tokexport.exporter.plan import TokenPlan

PhaseName = Literal["image", "text", "decode"]
Range = tuple[int, int, int]
Shape = tuple[int, ...]

# Text before an image in one call; what is longer is run before, as text. The usual prompt has 35 tokens there.
_MOST_PREFIX = 64


@dataclass(frozen=True)
class Phase:
    """How many tokens a call has: at least, tuned for, at most."""

    name: PhaseName
    prefix: Range
    vision: Range
    suffix: Range

    @property
    def new(self) -> Range:
        """All tokens of a call as they enter the decoder."""
        least, usual, most = (
            prefix + vision + suffix
            for prefix, vision, suffix in zip(self.prefix, self.vision, self.suffix, strict=True)
        )
        return least, usual, most


@dataclass(frozen=True)
class Room:
    """What one call takes at most.

    Attributes:
        prefix: text tokens before an image.
        suffix: text tokens behind it, or without one.
    """

    prefix: int
    suffix: int


def room_of(options: SessionOptions) -> Room:
    """Return how the text of one call is split, so that both parts together fit into the cache.

    Raises:
        InputError: there is no room for a token on both sides of an image.
    """
    text = options.max_text_tokens
    if text < 2:
        raise InputError(f"max-text-tokens {text} must be at least 2 for TensorRT; raise it")
    prefix = min(_MOST_PREFIX, text // 2)
    return Room(prefix, text - prefix)


def phases(plan: TokenPlan, options: SessionOptions) -> tuple[Phase, ...]:
    """Return the phases of an engine with room for ``options``."""
    room, image = room_of(options), plan.entering_llm
    usual = min(32, room.prefix), min(32, room.suffix)
    prefix, vision = (0, 0, room.prefix), (0, 0, image if options.max_images else 0)
    with_image = Phase("image", (0, usual[0], room.prefix), (image, image, image), (0, usual[1], room.suffix))
    others = (
        Phase("text", prefix, vision, (1, usual[1], room.suffix)),
        Phase("decode", prefix, vision, (1, 1, room.suffix)),
    )
    return (with_image, *others) if options.max_images else others


def decoder_shapes(
    io: GraphIO, plan: TokenPlan, phase: Phase, capacities: Sequence[int]
) -> Mapping[str, Sequence[Shape]]:
    """Return, by input, its smallest, usual and largest shape in a phase."""
    kept = plan.groups[-1].vision_tokens
    most_logits = phase.prefix[2] + phase.suffix[2] + (kept if phase.vision[2] else 0)
    ranges: dict[str, Range] = {
        "batch": (1, 1, 1),
        "prefix": phase.prefix,
        "vision": phase.vision,
        "suffix": phase.suffix,
        "prefix + vision + suffix": phase.new,
        "num_logits": (1, 1, most_logits),
    }
    ranges |= {f"capacity_{group}": (size, size, size) for group, size in enumerate(capacities)}
    return {
        tensor.name: [
            tuple(dim if isinstance(dim, int) else ranges[dim][place] for dim in tensor.shape) for place in range(3)
        ]
        for tensor in io.inputs
    }


def phase_of(step: DecoderStep) -> PhaseName:
    """Return the phase that a call belongs to."""
    if step.image_features.shape[1]:
        return "image"
    return "decode" if step.prefix_embeds.shape[1] + step.suffix_embeds.shape[1] == 1 else "text"
