"""Accuracy on dialogues: every dialogue is one conversation on one cache, with the model's own answers in it.

Q questions, L dialogues, C figures
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from tokexport.dialogues.schema import Dialogue, Turn
from tokexport.engines.intervals import Floats, Interval, paired_difference, ratio_intervals, sum_by_dialogue
from tokexport.engines.model import Answer, Chat, Speaker
from tokexport.engines.scoring import ANNOTATORS, METRICS, SCORERS, Metric
from tokexport.errors import InputError, nearest

DEFAULT_MAX_NEW_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class ScoredAnswer:
    """One question with what was answered; ``turn`` counts from 1, ``score`` is from 0 to 1."""

    dialogue: str
    turn: int
    kind: str
    question: str
    answer: str
    expected: tuple[str, ...]
    score: float

    def line(self) -> dict[str, Any]:
        """Return a line of the file of answers."""
        return {**vars(self), "expected": list(self.expected), "correct": self.score == 1}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """An accuracy over some of the questions, with its 95 % interval."""

    accuracy: float
    questions: int
    interval: Interval

    def report(self) -> dict[str, Any]:
        return {"accuracy": self.accuracy, "questions": self.questions, "interval": list(self.interval)}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How an artefact answered; one entry a question, in the order in which they were asked.

    Attributes:
        scores_Q: from 0 to 1.
        dialogue_Q: the number of the dialogue, from 0.
        turn_Q: the number of the turn in its dialogue, from 1.
        kinds: of the questions, empty where the data has none.
        ttft_ms_Q: time to the first token.
        read_tokens_Q: text and vision tokens read in that turn.
        sha256: of images, questions and accepted answers; equal where the data is.
        seconds: that it took.
    """

    scores_Q: Floats
    dialogue_Q: np.ndarray[Any, np.dtype[np.int64]]
    turn_Q: np.ndarray[Any, np.dtype[np.int64]]
    kinds: tuple[str, ...]
    ttft_ms_Q: Floats
    read_tokens_Q: Floats
    sha256: str
    seconds: float

    @property
    def accuracy(self) -> float:
        return float(self.scores_Q.mean())

    @property
    def num_dialogues(self) -> int:
        return int(self.dialogue_Q[-1]) + 1

    def figures(self) -> tuple[Figure, dict[int, Figure], dict[str, Figure]]:
        """Return the accuracy overall, by turn and by kind."""
        kind_Q = np.array(self.kinds)
        turns = [int(turn) for turn in np.unique(self.turn_Q)]
        kinds = sorted(set(self.kinds) - {""})
        columns = [self.turn_Q > 0, *(self.turn_Q == turn for turn in turns), *(kind_Q == kind for kind in kinds)]
        member_QC = np.stack(columns, axis=1).astype(np.float64)
        above_LC, below_LC = self._by_dialogue(member_QC * self.scores_Q[:, None]), self._by_dialogue(member_QC)
        found = [
            Figure(accuracy=float(above / below), questions=int(below), interval=interval)
            for above, below, interval in zip(
                above_LC.sum(0), below_LC.sum(0), ratio_intervals(above_LC, below_LC), strict=True
            )
        ]
        by_turn = dict(zip(turns, found[1:], strict=False))
        return found[0], by_turn, dict(zip(kinds, found[1 + len(turns) :], strict=True))

    def report(self) -> dict[str, Any]:
        """Return the part of ``tokexport eval --json`` that is about this artefact alone."""
        overall, by_turn, by_kind = self.figures()
        later_Q = self.turn_Q > 1
        return {
            **overall.report(),
            "per_turn": [{"turn": turn, **figure.report()} for turn, figure in by_turn.items()],
            "per_kind": {kind: figure.report() for kind, figure in by_kind.items()},
            "dialogues": self.num_dialogues,
            "ttft_ms": {
                "first_turn": float(self.ttft_ms_Q[~later_Q].mean()),
                "later_turns": float(self.ttft_ms_Q[later_Q].mean()) if later_Q.any() else None,
            },
            "seconds": self.seconds,
        }

    def compare(self, full_Q: Floats) -> "Comparison":
        """Compare with the scores of the uncompressed model on the same questions, question by question."""
        assert full_Q.shape == self.scores_Q.shape, "not the same questions"
        change = paired_difference(self.scores_Q, full_Q, self.dialogue_Q)
        relative: float | None = None
        relative_interval: Interval | None = None
        if full_Q.any():
            relative = float(self.scores_Q.sum() / full_Q.sum())
            above_LC, below_LC = self._by_dialogue(self.scores_Q[:, None]), self._by_dialogue(full_Q[:, None])
            (relative_interval,) = ratio_intervals(above_LC, below_LC)
        return Comparison(
            full_accuracy=float(full_Q.mean()),
            relative=relative,
            relative_interval=relative_interval,
            difference=change.mean,
            difference_interval=change.interval,
            gained=change.gained,
            lost=change.lost,
        )

    def _by_dialogue(self, values_QC: Floats) -> Floats:
        return sum_by_dialogue(values_QC, self.dialogue_Q)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What compression did to the accuracy, paired by question.

    Attributes:
        full_accuracy: of the uncompressed model.
        relative: accuracy over that, None where that is zero.
        relative_interval: its 95 % interval.
        difference: accuracy minus that of the uncompressed model.
        difference_interval: its 95 % interval.
        gained: questions that score higher than without compression.
        lost: questions that score lower.
    """

    full_accuracy: float
    relative: float | None
    relative_interval: Interval | None
    difference: float
    difference_interval: Interval
    gained: int
    lost: int


@dataclass(frozen=True, kw_only=True)
class AskedDialogue:
    """A dialogue with what was answered, turn by turn.

    Attributes:
        answers: one a turn.
        ttft_ms: time to the first token, one a turn.
        read_tokens: text and vision tokens read in each turn, as they enter the language model.
        sha256: of image, questions and accepted answers.
    """

    answers: tuple[ScoredAnswer, ...]
    ttft_ms: tuple[float, ...]
    read_tokens: tuple[int, ...]
    sha256: bytes


def ask_dialogue(
    vlm: Speaker,
    dialogue: Dialogue,
    *,
    metric: Metric = "exact",
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    reselect: bool = False,
) -> AskedDialogue:
    """Ask every question of a dialogue and score the answers.

    The image comes with the first question. A later question continues on the same cache, behind the answers that the
    model itself gave.

    Args:
        vlm: what is asked.
        dialogue: what to ask.
        metric: ``exact`` or ``vqa``, see ``engines.scoring``.
        max_new_tokens: the longest answer.
        reselect: read all again with every question, so that vision tokens are chosen by it.

    Raises:
        InputError: a dialogue that cannot be asked or scored, or too little room in the cache.
    """
    if metric not in METRICS:
        raise InputError(f"there is no metric {metric!r}{nearest(metric, list(METRICS))}")
    _check(dialogue, metric)
    answers: list[ScoredAnswer] = []
    said: list[Answer] = []
    chat = vlm.chat(max_new_tokens=max_new_tokens, reselect=reselect)
    for turn, asked, answer in answers_of(vlm, dialogue, chat):
        answers.append(_score(dialogue, turn, asked, answer, metric))
        said.append(answer)
    return AskedDialogue(
        answers=tuple(answers),
        ttft_ms=tuple(first_token_ms(answer) for answer in said),
        read_tokens=tuple(answer.prompt_tokens + answer.vision_tokens for answer in said),
        sha256=dialogue_sha256(dialogue),
    )


def answers_of(vlm: Speaker, dialogue: Dialogue, chat: Chat) -> Iterator[tuple[int, Turn, Answer]]:
    """Ask the questions of a dialogue in a chat that has just begun; yield each with its number from 1 and its answer.

    Raises:
        InputError: a question that cannot be asked, or too little room in the cache.
    """
    for turn, asked in enumerate(dialogue.turns, 1):
        try:
            answer = chat.ask(asked.question, [dialogue.image] if turn == 1 else [])
        except InputError as error:
            raise InputError(f"dialogue {dialogue.name}, turn {turn}: {error}") from error
        if answer.ended_by == "full cache":
            raise InputError(f"dialogue {dialogue.name}, turn {turn}: {_no_room(vlm)}")
        yield turn, asked, answer


def first_token_ms(answer: Answer) -> float:
    """Return the time to the first token; of an answer that is a stop token alone, to its end."""
    return answer.ttft_ms if answer.token_ids else answer.total_ms


def evaluate(
    asked: Iterable[AskedDialogue],
    *,
    listen: Callable[[ScoredAnswer], object] = lambda _: None,
    tick: Callable[[int], None] = lambda _done: None,
) -> Evaluation:
    """Put together how dialogues were answered.

    Args:
        asked: in the dialogues' order, each used once.
        listen: told every answer.
        tick: told how many dialogues are done.

    Raises:
        InputError: no dialogue.
    """
    started, digest = time.perf_counter(), hashlib.sha256()
    answers: list[ScoredAnswer] = []
    dialogues: list[int] = []
    times: list[float] = []
    read: list[int] = []
    for number, one in enumerate(asked):
        for answer in one.answers:
            listen(answer)
        answers += one.answers
        dialogues += [number] * len(one.answers)
        times += one.ttft_ms
        read += one.read_tokens
        digest.update(one.sha256)
        tick(number + 1)
    if not answers:
        raise InputError("there are no dialogues to evaluate; give at least one")
    return Evaluation(
        scores_Q=np.array([answer.score for answer in answers]),
        dialogue_Q=np.array(dialogues, np.int64),
        turn_Q=np.array([answer.turn for answer in answers], np.int64),
        kinds=tuple(answer.kind for answer in answers),
        ttft_ms_Q=np.array(times),
        read_tokens_Q=np.array(read, np.float64),
        sha256=digest.hexdigest(),
        seconds=time.perf_counter() - started,
    )


def data_sha256(dialogues: Iterable[Dialogue]) -> str:
    """Return the ``sha256`` that an evaluation of dialogues has, without asking them."""
    digest = hashlib.sha256()
    for dialogue in dialogues:
        digest.update(dialogue_sha256(dialogue))
    return digest.hexdigest()


def dialogue_sha256(dialogue: Dialogue) -> bytes:
    """Return the SHA-256 of a dialogue's image, questions and accepted answers."""
    digest = hashlib.sha256()
    for part in _content(dialogue):
        digest.update(part)
    return digest.digest()


def _score(dialogue: Dialogue, turn: int, asked: Turn, answer: Answer, metric: Metric) -> ScoredAnswer:
    return ScoredAnswer(
        dialogue=dialogue.name,
        turn=turn,
        kind=asked.kind,
        question=asked.question,
        answer=answer.text,
        expected=asked.answers,
        score=SCORERS[metric](answer.text, asked.answers),
    )


def _check(dialogue: Dialogue, metric: Metric) -> None:
    for number, turn in enumerate(dialogue.turns, 1):
        if metric == "vqa" and len(turn.answers) < ANNOTATORS:
            raise InputError(
                f"dialogue {dialogue.name}, turn {number} has {len(turn.answers)} answers and the metric 'vqa' is "
                f"defined for those of {ANNOTATORS} annotators; choose the metric 'exact'"
            )


def _no_room(vlm: Speaker) -> str:
    room, positions = vlm.session.options.max_text_tokens, vlm.session.spec.max_positions
    if room + vlm.session.plan.num_positions >= positions:
        return f"the answer does not fit behind the {positions} positions of the model; ask fewer turns a dialogue"
    return f"the answer does not fit into a cache for {room} text tokens; raise --max-text-tokens"


def _content(dialogue: Dialogue) -> Iterator[bytes]:
    """Yield what makes a dialogue what it is, its name apart."""
    yield json.dumps([[turn.question, turn.answers, turn.kind] for turn in dialogue.turns]).encode()
    image = dialogue.image
    if isinstance(image, Image.Image):
        yield repr((image.mode, image.size)).encode()
        yield image.tobytes()
    else:
        yield hashlib.sha256(image.read_bytes()).digest()
