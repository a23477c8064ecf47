"""Loyalty: how near an artefact stays to the uncompressed model, in numbers that need no right answers.

Q questions, C sets of them
"""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokexport.dialogues.schema import Dialogue
from tokexport.engines.accuracy import (
    EvalOptions,
    Progress,
    Tick,
    answer_file,
    open_uncompressed,
    open_vlm,
    options_for_full,
    room_for,
)
from tokexport.engines.backend import load_backend
from tokexport.engines.evaluate import data_sha256
from tokexport.engines.evaluation_data import DialogueSet
from tokexport.engines.evaluation_processes import asking
from tokexport.engines.following import FollowedAnswer, ToldAnswer, follow, tell
from tokexport.engines.intervals import ratio_intervals, sum_by_dialogue
from tokexport.engines.report import write_reports
from tokexport.engines.reselection import require_choice
from tokexport.engines.source import base_fingerprint
from tokexport.errors import CheckpointError, InputError
from tokexport.exporter.bundle import Bundle

REPORT = "loyalty.json"
OPEN_ANSWER_TOKENS = 64
"""Of the longest answer to an open question."""

_QUANTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Loyalty:
    """How loyal an artefact is to the uncompressed model.

    Attributes:
        bundle: the artefact.
        full: the uncompressed one.
        asked: the dialogues.
        options: how they were asked.
        answers: one a question, in the order in which they were asked.
        dialogue_Q: the number of the dialogue of each, from 0.
        sha256: of images, questions and accepted answers, if there are any.
        seconds: that it took.
    """

    bundle: Bundle
    full: Path
    asked: DialogueSet
    options: EvalOptions
    answers: tuple[FollowedAnswer, ...]
    dialogue_Q: NDArray[np.int64]
    sha256: str
    seconds: float

    def report(self) -> dict[str, Any]:
        """Return what ``tokexport eval --loyalty --json`` prints; its keys are a contract."""
        turns = sorted({answer.turn for answer in self.answers})
        kinds = sorted({answer.kind for answer in self.answers} - {""})
        members = [
            np.ones(len(self.answers), bool),
            *(np.array([answer.turn == turn for answer in self.answers]) for turn in turns),
            *(np.array([answer.kind == kind for answer in self.answers]) for kind in kinds),
        ]
        overall, *parts = self._figures(np.stack(members, axis=1))
        questions = dict(enumerate(self.asked.common_questions, 1))
        by_turn = [
            {"turn": turn, "question": questions.get(turn), **part} for turn, part in zip(turns, parts, strict=False)
        ]
        return {
            **overall,
            "per_turn": by_turn,
            "per_kind": dict(zip(kinds, parts[len(turns) :], strict=True)),
            "dialogues": int(self.dialogue_Q[-1]) + 1,
            "full": str(self.full),
            "backend": self.options.backend,
            "max_new_tokens": self.options.max_new_tokens,
            "reselect": self.options.reselect,
            "dtype": self.bundle.recipe.export.dtype,
            "quantize": str(self.bundle.recipe.quantize),
            "weights": self.bundle.manifest.model.weights,
            "data": {**self.asked.description, "sha256": self.sha256},
            "seconds": self.seconds,
        }

    def _figures(self, member_QC: NDArray[np.bool_]) -> list[dict[str, Any]]:
        """Return the figures of each of C sets of questions."""
        tokens_Q, agreeing_Q, prefix_Q, kl_Q, ttft_Q, full_ttft_Q = (
            np.array([getattr(answer, name) for answer in self.answers], np.float64)
            for name in ("tokens", "agreeing", "prefix", "kl", "ttft_ms", "full_ttft_ms")
        )
        weight_QC = member_QC.astype(np.float64)
        ones_Q = np.ones_like(tokens_Q)
        ratios = {
            "token_agreement": (agreeing_Q, tokens_Q),
            "answer_agreement": ((prefix_Q == tokens_Q).astype(np.float64), ones_Q),
            "agreeing_prefix": (prefix_Q, ones_Q),
            "first_token_kl": (kl_Q, ones_Q),
        }
        found: list[dict[str, Any]] = [
            {
                "questions": int(is_asked_Q.sum()),
                "answer_tokens": float(tokens_Q[is_asked_Q].mean()),
                "ttft_ms": {"full": float(full_ttft_Q[is_asked_Q].mean()), "own": float(ttft_Q[is_asked_Q].mean())},
            }
            for is_asked_Q in member_QC.T
        ]
        for name, (above_Q, below_Q) in ratios.items():
            above_QC, below_QC = weight_QC * above_Q[:, None], weight_QC * below_Q[:, None]
            intervals = ratio_intervals(
                sum_by_dialogue(above_QC, self.dialogue_Q), sum_by_dialogue(below_QC, self.dialogue_Q)
            )
            for entry, above, below, interval in zip(found, above_QC.sum(0), below_QC.sum(0), intervals, strict=True):
                entry[name] = {"mean": float(above / below), "interval": list(interval)}
        for entry, is_asked_Q in zip(found, member_QC.T, strict=True):
            quantiles = np.percentile(kl_Q[is_asked_Q], _QUANTILES)
            entry["first_token_kl"] |= {f"p{q}": float(value) for q, value in zip(_QUANTILES, quantiles, strict=True)}
        return found


def loyalty_of(
    path: Path,
    full: Path,
    asked: DialogueSet,
    options: EvalOptions,
    *,
    answers: Path | None = None,
    store: bool = True,
    progress: Progress = lambda _: None,
    tick: Tick = lambda _done, _total: None,
) -> Loyalty:
    """Measure how loyal an artefact is to the uncompressed model, and keep the result in its reports.

    One of the two is open at a time; in between, the logits of each first token are held in memory.

    Args:
        path: the artefact.
        full: the uncompressed one, of the same model.
        asked: the dialogues; answers in them are not looked at.
        options: how they are asked.
        answers: a file for every answer, one JSON object a line.
        store: keep the result in the reports of the artefact.
        progress: told what is being done.
        tick: told how many dialogues of all are done.

    Raises:
        InputError: a compressed artefact as ``full``, or one of another model; data that cannot be asked, or too little
            room.
        CheckpointError: whether both are of one model cannot be found out.
    """
    started = time.perf_counter()
    bundle, full_bundle = Bundle.open(path), open_uncompressed(full)
    if not load_backend(options.backend).is_compressed:
        raise InputError(
            f"backend {options.backend!r} runs all tokens, so every artefact would be loyal; choose one that runs the "
            "artefact, like ort"
        )
    if options.reselect:
        require_choice(bundle, options.backend)
    _require_one_model(bundle, full_bundle)
    room = max(room_for(bundle, asked, options), room_for(full_bundle, asked, options))
    told = _told(full_bundle, asked, options_for_full(full_bundle, options), room, progress, tick)
    found: list[FollowedAnswer] = []
    dialogues: list[int] = []
    progress(f"opening {path.name}")
    opener = functools.partial(_open_follower, path, options, room, told)
    with answer_file(answers) as listen, asking(opener, asked, options.jobs) as followings:
        progress(f"asking {path.name} what it would have said")
        for number, following in enumerate(followings):
            for answer in following:
                listen(answer)
            found += following
            dialogues += [number] * len(following)
            tick(number + 1, asked.size)
    result = Loyalty(
        bundle=bundle,
        full=full,
        asked=asked,
        options=options,
        answers=tuple(found),
        dialogue_Q=np.array(dialogues, np.int64),
        sha256=data_sha256(asked),
        seconds=time.perf_counter() - started,
    )
    if store:
        bundle.write_report(REPORT, result.report())
        write_reports(bundle)
    return result


def _told(
    full: Bundle, asked: DialogueSet, options: EvalOptions, room: int, progress: Progress, tick: Tick
) -> dict[str, tuple[ToldAnswer, ...]]:
    """Return how the uncompressed model answers each dialogue, by its name."""
    told: dict[str, tuple[ToldAnswer, ...]] = {}
    name = full.path.name
    progress(f"opening {name}")
    with asking(functools.partial(_open_teller, full.path, options, room), asked, options.jobs) as tellings:
        progress(f"asking {name} {asked.size} dialogues")
        for number, (dialogue, telling) in enumerate(tellings, 1):
            told[dialogue] = telling
            tick(number, asked.size)
    return told


def _open_teller(
    path: Path, options: EvalOptions, room: int
) -> Callable[[Dialogue], tuple[str, tuple[ToldAnswer, ...]]]:
    vlm = open_vlm(path, options, room)
    return lambda dialogue: (dialogue.name, tell(vlm, dialogue, max_new_tokens=options.max_new_tokens))


def _open_follower(
    path: Path, options: EvalOptions, room: int, told: Mapping[str, tuple[ToldAnswer, ...]]
) -> Callable[[Dialogue], tuple[FollowedAnswer, ...]]:
    vlm = open_vlm(path, options, room)
    return lambda dialogue: follow(
        vlm,
        dialogue,
        told[dialogue.name],
        max_new_tokens=options.max_new_tokens,
        reselect=options.reselect,
    )


def _require_one_model(bundle: Bundle, full: Bundle) -> None:
    try:
        is_one = base_fingerprint(bundle) == base_fingerprint(full)
    except CheckpointError as error:
        raise CheckpointError(
            f"whether {bundle.path} and {full.path} are of one model cannot be found out: {error}; build them again, "
            "which writes it into the artefact"
        ) from error
    if not is_one:
        raise InputError(
            f"{full.path} is of another model ({full.manifest.model.checkpoint}) than {bundle.path} "
            f"({bundle.manifest.model.checkpoint}), which can be loyal to its own only; give the artefact of the same "
            "checkpoint without [[compress]]"
        )
