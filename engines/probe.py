"""The conversation that both sides of the parity ladder hold, and what a side answered.

N images, M vision tokens of one, B batch, K key/value heads, E head width, Q logits, W vocabulary
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokexport.engines.backend import Choice, Session
from tokexport.engines.generate import IMAGE, Conversation
from tokexport.exporter.export import Design

NEW_TOKENS = 32
TURNS: tuple[tuple[int, bool, int], ...] = ((14, True, 12), (9, True, 11), (0, False, 13))
"""For each turn: text tokens before the image, whether there is one, text tokens behind."""


@dataclass(frozen=True)
class Probe:
    """What both sides of a rung are asked: pixels, and the token ids of each turn's prompt.

    ``image_token_id`` is never said: ``transformers`` would look for an image there.
    """

    pixel_values: NDArray[np.float32]
    prompts: tuple[tuple[int, ...], ...]
    image_token_id: int


@dataclass
class Transcript:
    """What one side answered.

    Attributes:
        features: image features (N, M, D).
        logits: for each turn, of every prompt token and every step of the answer, (Q, W).
        answers: for each turn, the tokens of the answer.
        cache: for each layer, keys and values (B, K, length, E).
        choices: for each image, what bottlenecks chose by attention, by their layers.
    """

    features: NDArray[np.float32]
    logits: list[NDArray[np.float32]]
    answers: list[list[int]]
    cache: list[tuple[NDArray[np.float32], NDArray[np.float32]]]
    choices: list[Mapping[int, Choice]]

    def kept(self) -> list[dict[int, NDArray[np.int64]]]:
        """Return for each image which tokens each bottleneck kept, (B, M), from the highest score to the lowest."""
        return [{layer: choice.order for layer, choice in chosen.items()} for chosen in self.choices]

    def keeps_as(self, other: "Transcript") -> bool:
        """Say whether both kept the same tokens, in the same order: where one decides about the next, it matters."""
        pairs = zip(self.kept(), other.kept(), strict=True)
        return all(a.keys() == b.keys() and all(np.array_equal(a[layer], b[layer]) for layer in a) for a, b in pairs)


def make_probe(made: Design) -> Probe:
    """Return a fixed conversation for a model: smooth images with noise, tokens from all of the vocabulary."""
    spec, generator = made.model.spec, np.random.default_rng(20260212)
    num_images = sum(has_image for _, has_image, _ in TURNS)
    rows, columns = np.mgrid[0 : spec.image_size, 0 : spec.image_size] / spec.image_size
    waves = [np.sin((3 + i) * rows * (1 + c) + (5 - i) * columns) for i in range(num_images) for c in range(3)]
    smooth = np.stack(waves).reshape(num_images, 3, spec.image_size, spec.image_size)
    pixel_values = (smooth + 0.3 * generator.standard_normal(smooth.shape)).astype(np.float32)
    reserved = made.model.family.image_token_id(made.model.config)
    words = np.setdiff1d(np.arange(spec.vocab_size), [reserved])

    def text(count: int) -> list[int]:
        return [int(token) for token in generator.choice(words, count)]

    prompts = tuple(
        (*text(before), *([IMAGE] if has_image else []), *text(after)) for before, has_image, after in TURNS
    )
    return Probe(pixel_values, prompts, reserved)


def record(session: Session, probe: Probe, answers: Sequence[Sequence[int]] | None = None) -> Transcript:
    """Hold the probe's conversation; without ``answers`` they are chosen greedily."""
    features = session.encode_images(probe.pixel_values)
    transcript = Transcript(np.asarray(features, np.float32), [], [], [], [])
    conversation, used = Conversation(session), 0
    for turn, prompt in enumerate(probe.prompts):
        count = prompt.count(IMAGE)
        images = [features[used + i : used + i + 1] for i in range(count)]
        used += count
        logits = [conversation.feed(prompt, images, all_logits=True)]
        answer: list[int] = []
        for step in range(NEW_TOKENS):
            answer.append(_chosen(logits[-1][-1], probe) if answers is None else answers[turn][step])
            logits.append(conversation.feed(answer[-1:]))
        transcript.logits.append(np.concatenate(logits))
        transcript.answers.append(answer)
    for layer, group in enumerate(session.plan.group_of_layer):
        transcript.cache.append(session.read_cache(layer, conversation.lengths[group]))
    transcript.choices = conversation.choices
    return transcript


def _chosen(logits_W: NDArray[np.float32], probe: Probe) -> int:
    allowed_W = logits_W.copy()
    allowed_W[probe.image_token_id] = -np.inf
    return int(allowed_W.argmax())
