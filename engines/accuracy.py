"""What compression costs in accuracy: an artefact, and the uncompressed one beside it, on the same dialogues."""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tokexport.dialogues.schema import Dialogue
from tokexport.engines.backend import AS_BUILT, DEFAULT_BACKEND, SessionOptions, Source, load_backend
from tokexport.engines.environment import available_cores
from tokexport.engines.evaluate import (
    DEFAULT_MAX_NEW_TOKENS,
    AskedDialogue,
    Comparison,
    Evaluation,
    ScoredAnswer,
    ask_dialogue,
    evaluate,
)
from tokexport.engines.evaluation_data import DialogueSet
from tokexport.engines.evaluation_processes import asking
from tokexport.engines.intervals import Floats
from tokexport.engines.model import Vlm
from tokexport.engines.prompt import PromptProcessor
from tokexport.engines.report import write_reports
from tokexport.engines.reselection import require_choice, reselection_report
from tokexport.engines.scoring import METRICS, Metric
from tokexport.errors import InputError, nearest
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.plan import TokenPlan, keep_text

Progress = Callable[[str], None]
Tick = Callable[[int, int], None]
Listener = Callable[[ScoredAnswer], object]

REPORT = "eval.json"


class AnswerLine(Protocol):
    """What can be written to a file of answers."""

    def line(self) -> dict[str, Any]:
        """Return one line of it."""
        ...


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """How answers are made and scored.

    Attributes:
        backend: the engine.
        metric: ``exact`` or ``vqa``, see ``engines.scoring``.
        max_new_tokens: the longest answer.
        max_text_tokens: room for the text of a dialogue, None for what the data needs.
        threads: CPU threads, None for as many as there are cores.
        jobs: processes that ask at once and share the threads.
        source: for engines that run from the checkpoint.
        reselect: read all again with every question, so that vision tokens are chosen by it; accuracy is measured
            without and with that.
    """

    backend: str = DEFAULT_BACKEND
    metric: Metric = "exact"
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    max_text_tokens: int | None = None
    threads: int | None = None
    jobs: int = 1
    source: Source = AS_BUILT
    reselect: bool = False

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise InputError(f"there is no metric {self.metric!r}{nearest(self.metric, list(METRICS))}")
        if self.max_new_tokens < 1:
            raise InputError(f"max-new-tokens {self.max_new_tokens} must be at least 1")
        if self.jobs < 1:
            raise InputError(f"jobs {self.jobs} must be at least 1")

    def threads_each(self) -> int | None:
        """Return the threads of one process, None for as many as there are cores."""
        if self.jobs == 1:
            return self.threads
        return max(1, (self.threads or available_cores()) // self.jobs)

    def rules(self) -> dict[str, str | int]:
        """Return what has to be equal for two evaluations to be compared."""
        return {"backend": self.backend, "metric": self.metric, "max_new_tokens": self.max_new_tokens}


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How well an artefact answered, and what compression changed.

    Attributes:
        bundle: the artefact.
        asked: the dialogues.
        options: how it was evaluated.
        evaluation: what was found.
        full: the uncompressed artefact, if it was compared with one.
        comparison: with that.
        reselected: what was found where all was read again with every question, if that was asked for.
    """

    bundle: Bundle
    asked: DialogueSet
    options: EvalOptions
    evaluation: Evaluation
    full: Path | None = None
    comparison: Comparison | None = None
    reselected: Evaluation | None = None

    def report(self) -> dict[str, Any]:
        """Return what ``tokexport eval --json`` prints; its keys are a contract."""
        bundle, compared = self.bundle, self.comparison
        is_compressed = bundle.plan != TokenPlan.uncompressed(bundle.spec)
        return {
            **self.evaluation.report(),
            "relative_to_full": compared.relative if compared else None,
            "full": {"path": str(self.full), **asdict(compared)} if compared else None,
            "reselect": reselection_report(self.evaluation, self.reselected) if self.reselected else None,
            **self.options.rules(),
            "dtype": bundle.recipe.export.dtype,
            "quantize": str(bundle.recipe.quantize),
            "weights": bundle.manifest.model.weights,
            "ignores_compression": is_compressed and not load_backend(self.options.backend).is_compressed,
            "data": {**self.asked.description, "sha256": self.evaluation.sha256},
            # All of them, so that another artefact can be compared with this one question by question.
            "scores": " ".join(f"{score:g}" for score in self.evaluation.scores_Q),
        }


def evaluate_artefact(
    path: Path,
    asked: DialogueSet,
    options: EvalOptions,
    *,
    full: Path | None = None,
    answers: Path | None = None,
    store: bool = True,
    progress: Progress = lambda _: None,
    tick: Tick = lambda _done, _total: None,
) -> Accuracy:
    """Evaluate an artefact and keep the result in its reports.

    Args:
        path: the artefact.
        asked: the dialogues.
        options: how.
        full: the uncompressed artefact to compare with. Its stored evaluation is taken where it was made in the same
            way on the same data, else it is evaluated too.
        answers: a file for every answer, one JSON object a line.
        store: keep the results in the reports of both artefacts.
        progress: told what is being done.
        tick: told how many dialogues of all are done.

    Raises:
        InputError: data that cannot be asked or scored, too little room, or a compressed artefact as ``full``.
    """
    bundle = Bundle.open(path)
    full_bundle = None if full is None else _full_of(full, options)
    if options.reselect:
        require_choice(bundle, options.backend)
    continuing = replace(options, reselect=False)
    with answer_file(answers) as listen:
        found = _run(bundle, asked, continuing, listen, progress, tick)
    reselected = _run(bundle, asked, options, lambda _: None, progress, tick) if options.reselect else None
    result = Accuracy(bundle=bundle, asked=asked, options=options, evaluation=found, reselected=reselected)
    if full_bundle is not None:
        full_scores = stored_scores(full_bundle, found, options)
        if full_scores is None:
            full_options = options_for_full(full_bundle, options)
            full_found = _run(full_bundle, asked, full_options, lambda _: None, progress, tick)
            full_scores = full_found.scores_Q
            if store:
                _store(Accuracy(bundle=full_bundle, asked=asked, options=options, evaluation=full_found))
        result = replace(result, full=full, comparison=found.compare(full_scores))
    if store:
        _store(result)
    return result


def _run(
    bundle: Bundle, asked: DialogueSet, options: EvalOptions, listen: Listener, progress: Progress, tick: Tick
) -> Evaluation:
    name = bundle.path.name
    progress(f"opening {name}")
    opener = functools.partial(_open_asker, bundle.path, options, room_for(bundle, asked, options))
    with asking(opener, asked, options.jobs) as answered:
        again = ", all read again with every question" if options.reselect else ""
        progress(f"evaluating {name} on {asked.size} dialogues{again}")
        return evaluate(answered, listen=listen, tick=lambda done: tick(done, asked.size))


def _open_asker(path: Path, options: EvalOptions, max_text_tokens: int) -> Callable[[Dialogue], AskedDialogue]:
    return functools.partial(
        ask_dialogue,
        open_vlm(path, options, max_text_tokens),
        metric=options.metric,
        max_new_tokens=options.max_new_tokens,
        reselect=options.reselect,
    )


def open_vlm(path: Path, options: EvalOptions, max_text_tokens: int) -> Vlm:
    """Open an artefact to ask it dialogues about one image each."""
    bundle = Bundle.open(path)
    session = SessionOptions.for_bundle(
        bundle,
        max_text_tokens=max_text_tokens,
        max_images=1,
        threads=options.threads_each(),
        source=options.source,
    )
    return Vlm(bundle, options.backend, session)


def stored_scores(bundle: Bundle, like: Evaluation, options: EvalOptions) -> Floats | None:
    """Return the scores (Q,) that an artefact's last evaluation found, None if it was another one than ``like``."""
    stored = bundle.read_report(REPORT) or {}
    is_same = stored.get("data", {}).get("sha256") == like.sha256 and options.rules().items() <= stored.items()
    return np.array(stored["scores"].split(), np.float64) if is_same else None


def room_for(bundle: Bundle, asked: DialogueSet, options: EvalOptions) -> int:
    """Return how many text tokens a cache for the dialogues needs room for."""
    if options.max_text_tokens is not None:
        return options.max_text_tokens
    needed = asked.room(PromptProcessor(bundle.path), options.max_new_tokens)
    # A dialogue that does not fit is refused when it is asked, by its name.
    return min(max(needed, bundle.recipe.session.max_text_tokens), bundle.spec.max_positions)


def open_uncompressed(path: Path) -> Bundle:
    """Open an artefact to which another is compared.

    Raises:
        InputError: it is compressed itself.
    """
    bundle = Bundle.open(path)
    plan = bundle.plan
    full = TokenPlan.uncompressed(bundle.spec)
    if plan != full:
        raise InputError(
            f"{path} is compressed itself ({keep_text(full.emitted, plan.mean_vision_tokens)}), so nothing is "
            "relative to the full model; give the artefact of a recipe without [[compress]]"
        )
    return bundle


def options_for_full(bundle: Bundle, options: EvalOptions) -> EvalOptions:
    """Return how the uncompressed artefact is asked, given how the other one is."""
    # An adapter tunes a model to its compression; the uncompressed artefact is usually without one.
    is_adapted = bundle.recipe.model.adapter is not None
    source = Source(model=options.source.model, adapter=options.source.adapter if is_adapted else None)
    return replace(options, source=source, reselect=False)


def _full_of(path: Path, options: EvalOptions) -> Bundle:
    if not load_backend(options.backend).is_compressed:
        raise InputError(
            f"backend {options.backend!r} runs all tokens, so there is nothing to compare with {path}; leave out --full"
        )
    return open_uncompressed(path)


def _store(result: Accuracy) -> None:
    result.bundle.write_report(REPORT, result.report())
    write_reports(result.bundle)


@contextlib.contextmanager
def answer_file(path: Path | None) -> Generator[Callable[[AnswerLine], object]]:
    """Give what writes answers to a file that is there only when it is complete.

    Raises:
        InputError: it cannot be written.
    """
    if path is None:
        yield lambda _: None
        return
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with _writing(path):
        file = part.open("w", encoding="utf-8")

    def listen(answer: AnswerLine) -> None:
        with _writing(path):
            file.write(json.dumps(answer.line(), ensure_ascii=False) + "\n")

    try:
        yield listen
        with _writing(path):
            file.close()
            part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            file.close()
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path} cannot be written ({reason}); choose another file for --answers") from error
