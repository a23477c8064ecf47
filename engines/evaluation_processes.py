"""Dialogues asked by several processes at once, each with an engine of its own.

A small model keeps few cores busy: on two, two processes of one thread each ask twice as many questions as one of two.
"""

import contextlib
import functools
import gc
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tokexport.dialogues.schema import Dialogue
from tokexport.engines.evaluation_data import DialogueSet
from tokexport.errors import TokexportError

Found = TypeVar("Found")
Opener = Callable[[], Callable[[Dialogue], Found]]
"""Opens an engine and returns what asks it the questions of a dialogue."""


@contextlib.contextmanager
def asking(opener: Opener[Found], asked: DialogueSet, jobs: int) -> Generator[Iterator[Found]]:
    """Give how dialogues were answered, in their order, asked when it is gone through. Engines are closed behind it.

    Args:
        opener: called once in each process, so it has to be picklable.
        asked: the dialogues.
        jobs: processes; one is this process.

    Raises:
        TokexportError: what the engine or a dialogue raised, or the end of a process.
    """
    answers = _ask_here(opener(), asked) if jobs == 1 else ask_in_processes(opener, asked, jobs)
    try:
        with contextlib.closing(answers) as found:
            yield found
    finally:
        # A session and its conversation refer to each other, and the next model may need the memory at once.
        gc.collect()


def _ask_here(ask: Callable[[Dialogue], Found], asked: DialogueSet) -> Generator[Found]:
    for dialogue in asked:
        yield ask(dialogue)


def ask_in_processes(opener: Opener[Found], asked: DialogueSet, jobs: int) -> Generator[Found]:
    """Yield how dialogues were answered, see ``asking``."""
    executor = ProcessPoolExecutor(min(jobs, asked.size), multiprocessing.get_context("spawn"), _start, (opener, asked))
    try:
        yield from executor.map(_ask, range(asked.size))
    except BrokenProcessPool:
        raise TokexportError(
            f"one of {jobs} processes ended, perhaps for lack of memory; free some, or ask for fewer --jobs"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


# What this process works on, once it is started.
_work: list[tuple[Opener[Any], DialogueSet]] = []


def _start(opener: Opener[Any], asked: DialogueSet) -> None:
    # Who started this process hears Ctrl-C and ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _work.append((opener, asked))


@functools.cache
def _asker() -> Callable[[Dialogue], Any]:
    # Not in the initializer: there an error would end the process instead of being told.
    ((opener, _),) = _work
    return opener()


def _ask(number: int) -> Any:
    ((_, asked),) = _work
    return _asker()(asked.get(number))
