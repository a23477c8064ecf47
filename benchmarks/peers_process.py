"""A peer in a process of its own Python, asked one JSON object a line; see ``benchmarks/peers/serving.py``."""

import contextlib
import json
import os
import re
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tokexport.errors import TokexportError

_MISSING = re.compile(r"No module named '?([\w.]+)'?")
_REQUIREMENTS = "benchmarks/peers-requirements.txt"


class PeerProcess:
    """A running script; use it as a context. Every failure is a ``TokexportError`` with its reason in one line.

    Args:
        python: the interpreter.
        script: answers as ``benchmarks/peers/serving.py`` does.
        log: what the peer prints.
        threads: told to libraries that take it from the environment.
        new_tokens: of an answer behind its first token.
        limit_s: after so many seconds without an answer the process is ended.
    """

    version = ""

    def __init__(self, python: str, script: Path, *, log: Path, threads: int, new_tokens: int, limit_s: float) -> None:
        self._command, self._log, self._limit_s, self._new_tokens = [python, str(script)], log, limit_s, new_tokens
        # These are read when a library is loaded, and may have been set for other work.
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self._environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        # Its Python has packages of its own.
        self._environment.pop("PYTHONPATH", None)
        self._has_timed_out = False

    def __enter__(self) -> Self:
        self._stderr = self._log.open("w")
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                env=self._environment,
            )
        except OSError as error:
            self._stderr.close()
            raise TokexportError(
                f"{self._command[0]} cannot be started ({error.strerror}); name another with --python"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # what was left to be written to a process that is gone
            self._pipe_in.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._pipe_out.close()
        self._stderr.close()

    def request(self, what: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a request.

        Raises:
            TokexportError: there is none, or it is a failure.
        """
        timer = threading.Timer(self._limit_s, self._give_up)
        timer.start()
        try:
            self._pipe_in.write(json.dumps(what) + "\n")
            self._pipe_in.flush()
            line = self._pipe_out.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            raise TokexportError(self._death())
        answer = json.loads(line)
        if "failed" in answer:
            raise TokexportError(readable(answer["failed"]))
        return answer

    def measure(self) -> Mapping[str, Any]:
        """Return milliseconds of one answer."""
        return self.request({"do": "measure", "new_tokens": self._new_tokens})

    def footprint(self) -> Mapping[str, Any]:
        """Return bytes of memory and disk."""
        return self.request({"do": "footprint"})

    @property
    def _pipe_in(self) -> Any:
        return self._process.stdin

    @property
    def _pipe_out(self) -> Any:
        return self._process.stdout

    def _give_up(self) -> None:
        self._has_timed_out = True
        self._process.kill()

    def _death(self) -> str:
        code = self._process.wait()
        if self._has_timed_out:
            return f"no answer within {self._limit_s:g} s; raise --limit"
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return readable(f"ended with exit code {code}: {lines[-1] if lines else 'it said nothing'}")


def readable(text: str) -> str:
    """Return a failure as a user can act on it."""
    missing = _MISSING.search(text)
    if missing:
        return f"{missing.group(1)} is not installed; install it with: pip install --no-deps -r {_REQUIREMENTS}"
    return " ".join(text.split())[:400]
