"""A conversation on TensorRT engines: calls that fit the engines' profiles, and a cache that is never overrun.

P text tokens before an image, V vision tokens, S text tokens after it, G layer groups, Q logits, W vocabulary
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tokexport.engines.backend import Array, Choice, DecoderStep, Session, SessionOptions
from tokexport.engines.tensorrt.phases import Room, room_of
from tokexport.errors import InputError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.graph_io import choosing_layers


class Runner(ABC):
    """What computes: engines on a GPU, or the same graphs elsewhere.

    Attributes:
        choices: what bottlenecks chose by attention, by their layers, in the last call that brought an image.
    """

    choices: Mapping[int, Choice] = MappingProxyType({})

    @abstractmethod
    def encode(self, pixel_values: NDArray[np.float32]) -> Array:
        """Return image features of pixels."""

    @abstractmethod
    def decode(self, step: DecoderStep) -> NDArray[np.float32]:
        """Run one call that fits a profile, return logits (1, Q, W)."""

    @abstractmethod
    def read_cache(self, layer: int, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return keys and values of one layer."""

    @property
    @abstractmethod
    def kv_bytes(self) -> int:
        """Bytes of the cache."""


@dataclass(frozen=True)
class _Call:
    """A part of a step, and which of the last layer's tokens that come before it in the step."""

    step: DecoderStep
    num_before: int
    num_last: int


class TensorrtSession(Session):
    """A session whose calls are split where a prompt is longer than a profile.

    Args:
        bundle: the artefact.
        options: room that is asked for.
        built: room that the engines were built with.
        runner: computes one call.
    """

    def __init__(self, bundle: Bundle, options: SessionOptions, built: SessionOptions, runner: Runner) -> None:
        super().__init__(bundle.spec, bundle.plan, options)
        self._built, self._room, self._runner = built, room_of(built), runner
        self._table_WD = _embedding_table(bundle)
        self._is_choosing = bool(choosing_layers(bundle.graph_io("decoder_model_merged")))

    @property
    def capacities(self) -> tuple[int, ...]:
        """Tokens that the engines' cache of each layer group has room for, also where less was asked for."""
        return self._built.capacities(self.plan)

    def encode_images(self, pixel_values: NDArray[np.float32]) -> Array:
        most = max(1, self._built.max_images)
        parts = [self._runner.encode(pixel_values[at : at + most]) for at in range(0, len(pixel_values), most)]
        return np.concatenate(parts)

    def embed(self, input_ids: NDArray[np.int64]) -> Array:
        return self._table_WD[input_ids].astype(np.float32)

    def decode(self, step: DecoderStep) -> NDArray[np.float32]:
        if step.prefix_embeds.shape[0] != 1:
            raise InputError(f"a session runs batch 1, not {step.prefix_embeds.shape[0]}")
        self._require_room(step)
        wanted, logits = step.logits_to_keep, []
        for call in self._calls(step):
            here = wanted[(wanted >= call.num_before) & (wanted < call.num_before + call.num_last)] - call.num_before
            # A call computes at least one row of logits.
            keep = here if len(here) else np.array([call.num_last - 1])
            found = self._runner.decode(replace(call.step, logits_to_keep=keep))
            logits.append(found[:, : len(here)])
        self.choices = self._runner.choices
        return np.concatenate(logits, axis=1)

    def read_cache(self, layer: int, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return self._runner.read_cache(layer, length)

    @property
    def kv_bytes(self) -> int:
        return self._runner.kv_bytes

    def _require_room(self, step: DecoderStep) -> None:
        """Refuse what the engine would drop without a word: tokens behind the end of its cache."""
        num_text = step.prefix_embeds.shape[1] + step.suffix_embeds.shape[1]
        has_image = step.image_features.shape[1] > 0
        for group, capacity in zip(range(len(self.plan.groups)), self.capacities, strict=True):
            past = int(step.past_lengths[group, 0])
            new = num_text + (self.plan.groups[group].vision_tokens if has_image else 0)
            if not 0 <= past <= past + new <= capacity:
                raise InputError(
                    f"{new} new tokens behind {past} do not fit into the cache of layer group {group}, built for "
                    f"{capacity}; shorten the conversation or compile with more room"
                )

    def _calls(self, step: DecoderStep) -> Iterator[_Call]:
        """Split a step where it is longer than a profile; what comes out is what one call would give."""
        room, has_image = self._room, step.image_features.shape[1] > 0
        done = _Done(step, np.array([group.vision_tokens for group in self.plan.groups], np.int64))
        if not has_image:
            text = np.concatenate((step.prefix_embeds, step.suffix_embeds), axis=1)
            yield from done.text(text, room)
            return
        if self._is_choosing and step.suffix_embeds.shape[1] > room.suffix:
            raise InputError(
                f"{step.suffix_embeds.shape[1]} text tokens behind an image do not fit into one call, compiled for "
                f"{room.suffix}, and the choice of vision tokens reads all of them; shorten the question or compile "
                "with more room"
            )
        early = max(0, step.prefix_embeds.shape[1] - room.prefix)
        yield from done.text(step.prefix_embeds[:, :early], room)
        yield done.image(step.prefix_embeds[:, early:], step.suffix_embeds[:, : room.suffix])
        yield from done.text(step.suffix_embeds[:, room.suffix :], room)


class _Done:
    """Counts what of a step has been run."""

    def __init__(self, step: DecoderStep, vision_G: NDArray[np.int64]) -> None:
        self._step, self._vision_G = step, vision_G
        self._past_G1 = step.past_lengths.copy()
        self._position, self._last = 0, 0

    def text(self, embeds_1TD: Array, room: Room) -> Iterator[_Call]:
        for at in range(0, embeds_1TD.shape[1], room.suffix):
            part = embeds_1TD[:, at : at + room.suffix]
            yield self._call(part[:, :0], part[:, :0], part)

    def image(self, prefix: Array, suffix: Array) -> _Call:
        return self._call(prefix, self._step.image_features, suffix)

    def _call(self, prefix: Array, image: Array, suffix: Array) -> _Call:
        num_text, num_image = prefix.shape[1] + suffix.shape[1], image.shape[1]
        positions = self._step.position_ids[:, self._position : self._position + num_text + num_image]
        step = DecoderStep(
            prefix_embeds=prefix,
            image_features=image,
            suffix_embeds=suffix,
            position_ids=positions,
            past_lengths=self._past_G1,
            logits_to_keep=self._step.logits_to_keep,
        )
        new_G = num_text + (self._vision_G if num_image else 0 * self._vision_G)
        call = _Call(step, self._last, int(new_G[-1]))
        self._past_G1 = self._past_G1 + new_G[:, None]
        self._position += num_text + num_image
        self._last += int(new_G[-1])
        return call


def _embedding_table(bundle: Bundle) -> Array:
    """Return the table of token embeddings, (W, D), from the artefact's own graph."""
    graph = ir.load(bundle.graph_path("embed_tokens")).graph
    shape = (bundle.spec.vocab_size, bundle.spec.hidden_size)
    tables = [
        value.const_value
        for value in graph.initializers.values()
        if value.const_value is not None and tuple(value.const_value.shape) == shape
    ]
    return tables[0].numpy()
