"""How a peer is asked: one JSON object a line on stdin, one on stdout. Runs in the peer's own Python; needs numpy only.

``prepare`` converts the checkpoint, ``open`` loads what was converted, ``measure`` answers the question once,
``footprint`` tells memory and disk. Each is answered with an object; one with ``failed`` holds the reason in one line.
"""

import json
import os
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Task:
    """One peer in one precision, and what it is asked.

    Attributes:
        checkpoint: a LLaVA-1.5 checkpoint of ``transformers``.
        folder: where the peer keeps what it made of the checkpoint.
        variant: precision, as the peer calls it.
        vision_tokens: of the image.
        kept: which of them enter the language model, None for all.
        threads: of the CPU.
        pixels: file of the image as the tower takes it, float32 (1, 3, height, width).
        image: file of the same image in bytes, (height, width, 3).
        before: token ids in front of the image.
        after: token ids behind it.
        max_tokens: of prompt and answer together.
    """

    checkpoint: Path
    folder: Path
    variant: str
    vision_tokens: int
    kept: Sequence[int] | None
    threads: int
    pixels: Path
    image: Path
    before: Sequence[int]
    after: Sequence[int]
    max_tokens: int

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> "Task":
        """Return what a request says."""
        paths = {name: Path(table[name]) for name in ("checkpoint", "folder", "pixels", "image")}
        told: dict[str, Any] = {**table, **paths}
        return cls(**told)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Milliseconds of one answer, None for a part that the peer does not tell, and the answer."""

    vision_ms: float | None
    prefill_ms: float | None
    ttft_ms: float
    decode_ms_per_token: float
    tokens: Sequence[int] = ()


class Model(ABC):
    """An opened peer."""

    files: Sequence[Path] = ()
    """What it reads, for its size on disk."""

    version = ""
    """Of the library that computes."""

    @abstractmethod
    def run(self, new_tokens: int) -> Run:
        """Answer the question from nothing, with so many tokens behind the first."""


class StepwiseModel(Model):
    """A model that is driven call by call."""

    @abstractmethod
    def encode(self) -> Any:
        """Return the features of the image, (M, D)."""

    @abstractmethod
    def prefill(self, features: Any) -> int:
        """Forget what was, read the prompt, and return the first token of the answer."""

    @abstractmethod
    def decode(self, token: int) -> int:
        """Return the token that follows."""

    def run(self, new_tokens: int) -> Run:
        start = time.perf_counter()
        features = self.encode()
        encoded = time.perf_counter()
        token = self.prefill(features)
        prefilled = time.perf_counter()
        tokens = [token]
        for _ in range(new_tokens):
            token = self.decode(token)
            tokens.append(token)
        decoded = time.perf_counter()
        return Run(
            vision_ms=1000 * (encoded - start),
            prefill_ms=1000 * (prefilled - encoded),
            ttft_ms=1000 * (prefilled - start),
            decode_ms_per_token=1000 * (decoded - prefilled) / new_tokens,
            tokens=tokens,
        )


def rows_kept(task: Task, features_ND: NDArray[Any]) -> NDArray[Any]:
    """Return the features that enter the language model, (M, D)."""
    return features_ND if task.kept is None else features_ND[np.asarray(task.kept)]


def serve(prepare: Callable[[Task], None], open_model: Callable[[Task], Model]) -> None:
    """Answer requests until there are no more; libraries that print do so to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        _answer_all(prepare, open_model, answers)
    except Exception as error:  # noqa: BLE001 - whatever it is, it has to stand in the table
        _say(answers, {"failed": reason(error)})


def reason(error: BaseException) -> str:
    """Return an error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _answer_all(prepare: Callable[[Task], None], open_model: Callable[[Task], Model], answers: TextIO) -> None:
    model: Model | None = None
    for request in _requests():
        match request.pop("do"):
            case "prepare":
                prepare(Task.of(request))
                _say(answers, {})
            case "open":
                model = open_model(Task.of(request))
                _say(answers, {"version": model.version})
            case "measure":
                assert model is not None
                # While others had their turn, caches and pages of this one went cold; that is no peer's fault.
                model.run(1)
                _say(answers, vars(model.run(request["new_tokens"])))
            case _:
                assert model is not None
                disk = sum(path.stat().st_size for path in model.files)
                _say(answers, {"peak_rss_bytes": _peak_rss_bytes(), "disk_bytes": disk})


def _requests() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def _say(answers: TextIO, answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer), file=answers, flush=True)


def _peak_rss_bytes() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
