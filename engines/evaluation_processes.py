"""Dialogues asked by several processes at once, each with an engine of its own.

A small model keeps few cores busy: on two, two processes of one thread each ask twice as many questions as one of two.
"""

import functools
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from tokexport.dialogues.schema import Dialogue
from tokexport.engines.evaluate import AskedDialogue
from tokexport.engines.evaluation_data import DialogueSet
from tokexport.errors import TokexportError

Asker = Callable[[Dialogue], AskedDialogue]


def ask_in_processes(opener: Callable[[], Asker], asked: DialogueSet, jobs: int) -> Iterator[AskedDialogue]:
    """Yield how dialogues were answered, in their order.

    Args:
        opener: opens an engine and returns what asks it; called once in each process, so it has to be picklable.
        asked: the dialogues.
        jobs: processes.

    Raises:
        TokexportError: what the engine or a dialogue raised, or the end of a process.
    """
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
_work: list[tuple[Callable[[], Asker], DialogueSet]] = []


def _start(opener: Callable[[], Asker], asked: DialogueSet) -> None:
    # Who started this process hears Ctrl-C and ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _work.append((opener, asked))


@functools.cache
def _asker() -> Asker:
    # Not in the initializer: there an error would end the process instead of being told.
    ((opener, _),) = _work
    return opener()


def _ask(number: int) -> AskedDialogue:
    ((_, asked),) = _work
    return _asker()(asked.get(number))
