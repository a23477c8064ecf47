"""Conversations: prompts into decoder steps, logits into tokens, several turns on one cache.

P text tokens before an image, V vision tokens, S text tokens after it, Q logits, W vocabulary
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tokexport.engines.backend import Array, Choice, DecoderStep, Session
from tokexport.errors import InputError
from tokexport.exporter.plan import TokenPlan

IMAGE = -1
"""Stands in a prompt's token ids where an image goes."""


# Colder than this, logits divided by it overflow; hotter, all tokens are alike.
_TEMPERATURES = (0.001, 1000.0)

EndedBy = Literal["stop token", "max_new_tokens", "full cache", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: greedily at temperature 0, else drawn.

    Attributes:
        temperature: divides the logits; 0 takes the largest.
        top_k: draw from the k most likely tokens, 0 for all.
        top_p: draw from the most likely tokens that hold this much probability.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = _TEMPERATURES
        if self.temperature != 0 and not low <= self.temperature <= high:
            raise InputError(f"temperature {self.temperature} must be 0 (greedy) or from {low} to {high}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed {self.seed} must be from 0 to 2^63 - 1")
        if self.top_k < 0:
            raise InputError(f"top-k {self.top_k} must be at least 0 (0 is off)")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p {self.top_p} must be above 0 and at most 1 (1 is off)")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise InputError("top-k and top-p have no effect at temperature 0; set a temperature, e.g. 0.7")


TokenChooser = Callable[[NDArray[np.float32]], int]
"""Returns the next token of an answer, given logits (W,)."""


class Sampler:
    """Chooses the next token from logits (W,)."""

    def __init__(self, sampling: Sampling) -> None:
        self._draw = None if sampling.temperature == 0 else _drawer(sampling)

    def __call__(self, logits_W: NDArray[np.float32]) -> int:
        return int(logits_W.argmax()) if self._draw is None else self._draw(logits_W)


def _drawer(sampling: Sampling) -> TokenChooser:
    """Return a seeded draw behind the warpers of ``transformers``."""
    # Greedy runs, and so the measured memory of an engine, do without these two.
    import torch
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    generator = torch.Generator().manual_seed(sampling.seed)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))

    def draw(logits_W: NDArray[np.float32]) -> int:
        no_tokens = torch.empty(1, 0, dtype=torch.long)
        scores_1W = warpers(no_tokens, torch.from_numpy(logits_W)[None].float())  # pyright: ignore[reportArgumentType]
        return int(torch.multinomial(scores_1W.softmax(-1), 1, generator=generator))

    return draw


class Conversation:
    """One conversation on a session's cache: counts what is in it and feeds what is new.

    Starting one makes the session forget the one before.

    Attributes:
        text_tokens: in the cache.
        num_images: in the cache.
        choices: what bottlenecks chose by attention, for each image that was fed.
        ended_by: what ended the last answer.
    """

    def __init__(self, session: Session) -> None:
        session.reset()
        session.conversation = self
        self.session = session
        self.text_tokens = 0
        self.num_images = 0
        self.choices: list[Mapping[int, Choice]] = []
        self.ended_by: EndedBy = "interrupted"
        self._position = 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in the cache of each layer group."""
        return tuple(self.text_tokens + self.num_images * group.vision_tokens for group in self.session.plan.groups)

    def feed(
        self, token_ids: Sequence[int], images: Sequence[Array] = (), *, all_logits: bool = False
    ) -> NDArray[np.float32]:
        """Run new tokens through the model.

        Args:
            token_ids: text tokens, and ``IMAGE`` where an image goes.
            images: image features (1, V, D), one for every ``IMAGE``.
            all_logits: return the logits of every token instead of the last one's.

        Returns:
            Logits (Q, W).

        Raises:
            InputError: nothing to run, images that do not match the markers, or no room left.
        """
        self._check(token_ids, images)
        before = self._counts()
        try:
            logits = [
                self._step(prefix, image, suffix, all_logits=all_logits)
                for prefix, image, suffix in _spans(token_ids, images)
            ]
        except BaseException:
            self._return_to(before)
            raise
        return np.concatenate(logits) if all_logits else logits[-1]

    def probe(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Run text tokens through the model as ``feed`` does, and forget them again."""
        before = self._counts()
        try:
            return self.feed(token_ids)
        finally:
            self._return_to(before)

    def restart(self) -> None:
        """Forget all that was read.

        Raises:
            InputError: another conversation has begun on the session.
        """
        self._require_session()
        self.session.reset()
        self._return_to((0, 0, 0, 0))

    def answer(
        self, logits_QW: NDArray[np.float32], choose: TokenChooser, *, max_new_tokens: int, stop_ids: Sequence[int]
    ) -> Generator[int]:
        """Yield the tokens of an answer, from the logits behind the prompt until a stop token.

        The stop token is neither yielded nor put into the cache. Every other token goes into the
        cache, the last one too, so that a next turn finds the whole answer; when there is no room
        for one, the answer ends with it.
        """
        self.ended_by = "interrupted"
        for _ in range(max_new_tokens):
            token = choose(logits_QW[-1])
            if token in stop_ids:
                self.ended_by = "stop token"
                return
            try:
                yield token
            finally:  # also where the listener leaves: the token was said
                has_room = self.room >= 1
                if has_room and self.session.conversation is self:
                    logits_QW = self.feed([token])
            if not has_room:
                self.ended_by = "full cache"
                return
        self.ended_by = "max_new_tokens"

    @property
    def room(self) -> int:
        """Text tokens that still fit."""
        by_position = self.session.spec.max_positions - self._position
        return min(self.session.options.max_text_tokens - self.text_tokens, by_position)

    def _counts(self) -> tuple[int, int, int, int]:
        return self.text_tokens, self.num_images, self._position, len(self.choices)

    def _return_to(self, counts: tuple[int, int, int, int]) -> None:
        # What the cache holds behind these counts is overwritten by the next tokens.
        self.text_tokens, self.num_images, self._position, num_choices = counts
        del self.choices[num_choices:]

    def _require_session(self) -> None:
        if self.session.conversation is not self:
            raise InputError("another conversation has begun on this session; start a new one")

    def _step(
        self, prefix: Sequence[int], image: Array | None, suffix: Sequence[int], *, all_logits: bool
    ) -> NDArray[np.float32]:
        session = self.session
        prefix_embeds, suffix_embeds = self._embed(prefix), self._embed(suffix)
        features = prefix_embeds[:, :0] if image is None else image
        num_text = len(prefix) + len(suffix)
        kept = session.plan.groups[-1].vision_tokens if image is not None else 0
        last = num_text + kept - 1
        step = DecoderStep(
            prefix_embeds=prefix_embeds,
            image_features=features,
            suffix_embeds=suffix_embeds,
            position_ids=_positions(session.plan, len(prefix), image is not None, len(suffix))[None] + self._position,
            past_lengths=np.array(self.lengths, dtype=np.int64)[:, None],
            logits_to_keep=np.arange(0 if all_logits else last, last + 1, dtype=np.int64),
        )
        logits_BQW = session.decode(step)
        self.text_tokens += num_text
        self.num_images += image is not None
        if image is not None:
            self.choices.append(session.choices)
        self._position += num_text + (session.plan.num_positions if image is not None else 0)
        return logits_BQW[0]

    def _embed(self, token_ids: Sequence[int]) -> Array:
        if not token_ids:
            return np.zeros((1, 0, self.session.spec.hidden_size), np.float32)
        return self.session.embed(np.array([token_ids], dtype=np.int64))

    def _check(self, token_ids: Sequence[int], images: Sequence[Array]) -> None:
        session, markers = self.session, sum(token == IMAGE for token in token_ids)
        self._require_session()
        num_text = len(token_ids) - markers
        if not token_ids:
            raise InputError("the prompt is empty; give at least one token")
        if markers != len(images):
            raise InputError(f"the prompt has {markers} places for images and {len(images)} images were given")
        if self.num_images + markers > session.options.max_images:
            raise InputError(
                f"{self.num_images + markers} images do not fit into a cache for "
                f"{session.options.max_images}; raise --max-images"
            )
        if self.text_tokens + num_text > session.options.max_text_tokens:
            raise InputError(
                f"{self.text_tokens + num_text} text tokens ({num_text} of them new) do not fit into a cache for "
                f"{session.options.max_text_tokens}; shorten the prompt or raise --max-text-tokens"
            )
        end = self._position + num_text + markers * session.plan.num_positions
        if end > session.spec.max_positions:
            raise InputError(
                f"the conversation would reach position {end} and the model has "
                f"{session.spec.max_positions}; shorten it"
            )
        bad = [token for token in token_ids if token != IMAGE and not 0 <= token < session.spec.vocab_size]
        if bad:
            raise InputError(
                f"token id {bad[0]} is outside the model's vocabulary of {session.spec.vocab_size}; the "
                "tokenizer is another model's"
            )


def _positions(plan: TokenPlan, num_before: int, has_image: bool, num_after: int) -> NDArray[np.int64]:
    """Return rotary positions, from 0, of text, an image and text behind it."""
    places, width = (plan.places, plan.num_positions) if has_image else ((), 0)
    within = np.arange(width) if places is None else np.array(places, np.int64)
    behind = num_before + width
    return np.concatenate((np.arange(num_before), num_before + within, np.arange(behind, behind + num_after)))


def _spans(
    token_ids: Sequence[int], images: Sequence[Array]
) -> list[tuple[Sequence[int], Array | None, Sequence[int]]]:
    """Cut a prompt into decoder calls of at most one image each; the first takes the text before it too."""
    places = [index for index, token in enumerate(token_ids) if token == IMAGE]
    if not places:
        return [([], None, token_ids)]
    spans: list[tuple[Sequence[int], Array | None, Sequence[int]]] = []
    for number, place in enumerate(places):
        before = token_ids[:place] if number == 0 else []
        end = places[number + 1] if number + 1 < len(places) else len(token_ids)
        spans.append((before, images[number], token_ids[place + 1 : end]))
    return spans
