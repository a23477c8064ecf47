"""One engine in a process of its own, measured on request.

A process of its own gives every engine its own peak memory, and lets engines take turns, so that a
machine that slows down slows all of them.
"""

import contextlib
import multiprocessing
import resource
import signal
import sys
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from tokexport.engines.backend import Backend, Session, SessionOptions, load_backend
from tokexport.engines.generate import IMAGE, Conversation, Sampler, Sampling
from tokexport.errors import TokexportError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.plan import VlmSpec

_TOKENS_BEFORE_IMAGE = 5


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One question about one image, batch 1.

    Attributes:
        text_tokens: of the prompt.
        new_tokens: of the answer.
    """

    text_tokens: int
    new_tokens: int
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of one run; ``ttft_ms`` is from pixels to the first token."""

    vision_ms: float
    prefill_ms: float
    ttft_ms: float
    decode_ms_per_token: float


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of the cache, and of memory that the process held.

    Attributes:
        kv_bytes: of the cache.
        peak_rss_bytes: the most that it ever held.
        baseline_rss_bytes: with the engine's libraries loaded and nothing opened.
        device_bytes: that opening and running took of the GPU's memory, None without one. Libraries keep what they
            once took there, so it is the peak; whoever else uses the GPU at the same time is counted too.
    """

    kv_bytes: int
    peak_rss_bytes: int
    baseline_rss_bytes: int
    device_bytes: int | None = None


class EngineProcess:
    """An engine in another process; use it as a context.

    Raises:
        TokexportError: the engine could not be opened or a run failed; the error of the other process.
    """

    def __init__(self, path: Path, backend: str, options: SessionOptions, workload: Workload) -> None:
        context = multiprocessing.get_context("spawn")
        self._backend = backend
        self._connection, self._theirs = context.Pipe()
        arguments = (self._theirs, path, backend, options, workload)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)

    def __enter__(self) -> Self:
        try:
            with _interrupts_ignored():
                self._process.start()
            self._theirs.close()
            self._receive()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def measure(self) -> Timing:
        """Run the workload once."""
        timing = self._request("measure")
        assert isinstance(timing, Timing)
        return timing

    def footprint(self) -> Footprint:
        """Return memory figures after the runs so far."""
        footprint = self._request("footprint")
        assert isinstance(footprint, Footprint)
        return footprint

    def _request(self, what: str) -> object:
        try:
            self._connection.send(what)
        except OSError:
            raise self._death() from None
        return self._receive()

    def _receive(self) -> object:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if isinstance(answer, TokexportError):
            raise answer
        return answer

    def _death(self) -> TokexportError:
        self._process.join(timeout=2)
        return TokexportError(
            f"the process of engine {self._backend!r} ended with exit code {self._process.exitcode}, perhaps for lack "
            "of memory; free some, or measure a smaller model"
        )

    def _end(self) -> None:
        self._connection.close()
        if self._process.pid is None:
            return
        self._process.join(timeout=2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@dataclass(frozen=True)
class Question:
    """Pixels (1, 3, height, width), and the token ids before and behind the image."""

    pixel_values: NDArray[np.float32]
    before: tuple[int, ...]
    after: tuple[int, ...]


def make_question(spec: VlmSpec, workload: Workload) -> Question:
    """Return what a workload asks a model; the same wherever it is made."""
    generator = np.random.default_rng(workload.seed)
    pixel_values = generator.standard_normal((1, 3, spec.image_size, spec.image_size)).astype(np.float32)
    words = tuple(int(token) for token in generator.integers(5, spec.vocab_size, workload.text_tokens))
    return Question(pixel_values, words[:_TOKENS_BEFORE_IMAGE], words[_TOKENS_BEFORE_IMAGE:])


def run_workload(session: Session, workload: Workload) -> Timing:
    """Answer the workload's question and time its phases."""
    question = make_question(session.spec, workload)
    prompt = [*question.before, IMAGE, *question.after]
    conversation, sampler = Conversation(session), Sampler(Sampling())
    start = time.perf_counter()
    features = session.encode_images(question.pixel_values)
    encoded = time.perf_counter()
    logits = conversation.feed(prompt, [features])
    sampler(logits[-1])
    prefilled = time.perf_counter()
    num_new = sum(1 for _ in conversation.answer(logits, sampler, max_new_tokens=workload.new_tokens, stop_ids=()))
    decoded = time.perf_counter()
    return Timing(
        vision_ms=1000 * (encoded - start),
        prefill_ms=1000 * (prefilled - encoded),
        ttft_ms=1000 * (prefilled - start),
        decode_ms_per_token=1000 * (decoded - prefilled) / num_new,
    )


def _serve(connection: Connection, path: Path, backend: str, options: SessionOptions, workload: Workload) -> None:
    try:
        engine = load_backend(backend)
        before = _device_bytes(engine)
        baseline = _peak_rss_bytes()
        session = engine.open(Bundle.open(path), options)
        connection.send("ready")
        while True:
            request = connection.recv()
            if request == "measure":
                # While others had their turn, caches and pages of this one went cold; that is no engine's fault.
                run_workload(session, replace(workload, new_tokens=1))
                connection.send(run_workload(session, workload))
            else:
                held = _device_bytes(engine)
                connection.send(
                    Footprint(
                        kv_bytes=session.kv_bytes,
                        peak_rss_bytes=_peak_rss_bytes(),
                        device_bytes=None if before is None or held is None else held - before,
                        baseline_rss_bytes=baseline,
                    )
                )
    except (EOFError, BrokenPipeError):
        return
    except TokexportError as error:
        connection.send(error)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other side has to hear of it
        connection.send(
            TokexportError(f"engine {backend!r} failed: {' '.join(str(error).split()) or type(error).__name__}")
        )


def _device_bytes(engine: Backend) -> int | None:
    """Return the memory of the GPU in use now, the CUDA context of this process included."""
    if engine.device != "cuda":
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free


def _peak_rss_bytes() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: on Linux its peak is at least that of the process that started this one.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextlib.contextmanager
def _interrupts_ignored() -> Generator[None]:
    """Start processes deaf to Ctrl-C: this one hears it and ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
