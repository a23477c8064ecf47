"""An artefact that hears what the uncompressed model answered, and is asked what it would have said.

The uncompressed model is asked first, several turns on one cache. Then the artefact is asked the same, and behind each
question it is given that model's answer token by token (teacher forcing). As both stand behind the same text at every
place, the artefact would have given the whole answer just where it agrees at every place of it, the end included.

W vocabulary
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokexport.dialogues.schema import Dialogue
from tokexport.engines.evaluate import answers_of, first_token_ms
from tokexport.engines.intervals import Floats
from tokexport.engines.model import Vlm


@dataclass(frozen=True, kw_only=True)
class ToldAnswer:
    """What the uncompressed model answered in one turn.

    Attributes:
        tokens: the stop token included, where one ended it.
        first_W: the logits of its first token.
        ttft_ms: time to that.
    """

    tokens: tuple[int, ...]
    first_W: NDArray[np.float32]
    ttft_ms: float


@dataclass(frozen=True, kw_only=True)
class FollowedAnswer:
    """How an artefact followed one answer of the uncompressed model.

    Attributes:
        dialogue: its name.
        turn: from 1.
        kind: of the question, empty where the data has none.
        question: what was asked.
        answer: of the uncompressed model.
        likeliest: the token that the artefact would have said at each place of it, as text.
        tokens: places, the end of the answer included.
        agreeing: at how many the artefact would have said the same token.
        prefix: at how many before the first where it would not.
        kl: of the distributions of the first token, uncompressed || artefact, in nats.
        ttft_ms: time to the first token.
        full_ttft_ms: that of the uncompressed model.
    """

    dialogue: str
    turn: int
    kind: str
    question: str
    answer: str
    likeliest: str
    tokens: int
    agreeing: int
    prefix: int
    kl: float
    ttft_ms: float
    full_ttft_ms: float

    def line(self) -> dict[str, Any]:
        """Return a line of the file of answers."""
        return {**vars(self), "equal": self.prefix == self.tokens}


class GreedyListener:
    """Takes the likeliest token, or the next one of an answer that is given, and notes which was the likeliest."""

    def __init__(self, given: Iterator[int] | None = None) -> None:
        self._given = given
        self.likeliest: list[int] = []
        self.first_W: NDArray[np.float32] | None = None

    def __call__(self, logits_W: NDArray[np.float32]) -> int:
        if self.first_W is None:
            self.first_W = np.array(logits_W, np.float32)
        self.likeliest.append(int(logits_W.argmax()))
        return self.likeliest[-1] if self._given is None else next(self._given)

    def take(self) -> tuple[tuple[int, ...], NDArray[np.float32]]:
        """Return the likeliest tokens and the first logits of the turn that has ended, and listen to the next."""
        found = tuple(self.likeliest)
        assert self.first_W is not None
        first_W, self.first_W, self.likeliest = self.first_W, None, []
        return found, first_W


def tell(vlm: Vlm, dialogue: Dialogue, *, max_new_tokens: int) -> tuple[ToldAnswer, ...]:
    """Return how the uncompressed model answers a dialogue, turn by turn.

    Raises:
        InputError: a dialogue that cannot be asked, or too little room in the cache.
    """
    listener = GreedyListener()
    chat = vlm.chat(max_new_tokens=max_new_tokens, choose=listener)
    told: list[ToldAnswer] = []
    for _, _, answer in answers_of(vlm, dialogue, chat):
        tokens, first_W = listener.take()
        told.append(ToldAnswer(tokens=tokens, first_W=first_W, ttft_ms=first_token_ms(answer)))
    return tuple(told)


def follow(
    vlm: Vlm, dialogue: Dialogue, told: tuple[ToldAnswer, ...], *, max_new_tokens: int, reselect: bool = False
) -> tuple[FollowedAnswer, ...]:
    """Return how an artefact follows what the uncompressed model answered, turn by turn.

    Args:
        vlm: the artefact.
        dialogue: what was asked.
        told: what was answered, with the same longest answer.
        max_new_tokens: the longest answer.
        reselect: read all again with every question, so that vision tokens are chosen by it.

    Raises:
        InputError: a dialogue that cannot be asked, or too little room in the cache.
    """
    listener = GreedyListener(token for answer in told for token in answer.tokens)
    chat = vlm.chat(max_new_tokens=max_new_tokens, choose=listener, reselect=reselect)
    found: list[FollowedAnswer] = []
    for (turn, asked, answer), expected in zip(answers_of(vlm, dialogue, chat), told, strict=True):
        likeliest, first_W = listener.take()
        agrees = [own == other for own, other in zip(likeliest, expected.tokens, strict=True)]
        found.append(
            FollowedAnswer(
                dialogue=dialogue.name,
                turn=turn,
                kind=asked.kind,
                question=asked.question,
                answer=answer.text,
                likeliest="".join(vlm.processor.stream_text(iter(likeliest))).strip(),
                tokens=len(agrees),
                agreeing=sum(agrees),
                prefix=(*agrees, False).index(False),
                kl=first_token_kl(expected.first_W, first_W),
                ttft_ms=first_token_ms(answer),
                full_ttft_ms=expected.ttft_ms,
            )
        )
    return tuple(found)


def first_token_kl(full_W: NDArray[np.float32], own_W: NDArray[np.float32]) -> float:
    """Return KL(full || own) in nats of the distributions of two logits (W,): sum p_full (log p_full - log p_own)."""
    log_full_W, log_own_W = _log_softmax(full_W), _log_softmax(own_W)
    # Of what the full model rules out, no logarithm is taken.
    is_possible_W = np.isfinite(log_full_W)
    difference_W = log_full_W[is_possible_W] - log_own_W[is_possible_W]
    # Rounding can make a sum of next to nothing negative.
    return max(0.0, float((np.exp(log_full_W[is_possible_W]) * difference_W).sum()))


def _log_softmax(logits_W: NDArray[np.float32]) -> Floats:
    shifted_W = logits_W.astype(np.float64) - float(logits_W.max())
    return shifted_W - np.log(np.exp(shifted_W).sum())
