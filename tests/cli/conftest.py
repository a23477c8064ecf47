"""Running commands, in this process or in one of their own."""

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tokexport.cli
from tokexport.exporter.bundle import Bundle


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """Return the JSON on stdout, which holds nothing else."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """Return the text of the one error line, the last on stderr."""
        lines = self.err.rstrip("\n").split("\n")
        assert "Traceback" not in self.err
        assert sum(line.startswith("error: ") for line in lines) == 1
        assert lines[-1].startswith("error: ")
        return lines[-1].removeprefix("error: ")


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run a command in this process."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["tokexport", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            tokexport.cli.main()
        code = ended.value.code
        assert isinstance(code, int)
        return Outcome(code, *capsys.readouterr())

    yield call
    signal.signal(signal.SIGTERM, before)


def in_process(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start a command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tokexport", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def outcome_of(process: subprocess.Popen[str], said: str = "") -> Outcome:
    out, err = process.communicate(timeout=600)
    return Outcome(process.returncode, out, said + err)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of a recipe of the tiny model with ADSC; its checkpoint is to be given with --model."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(
        'description = "for tests"\n[model]\nfamily = "llava15"\ncheckpoint = "someone/tiny"\n'
        "[session]\nmax_text_tokens = 128\nmax_images = 2\n[plan]\ntext_tokens = 8\n"
        '[[compress]]\nmethod = "adsc"\ndrops = [{ layer = 1, keep = 8 }, { layer = 3, keep = 4 }]\n'
    )
    return path


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    Image.linear_gradient("L").save(path)
    return path


@pytest.fixture
def artefact(tiny_adsc: Bundle) -> Path:
    return tiny_adsc.path


@pytest.fixture(scope="session")
def built(recipe: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """Build the tiny model with everything that build does."""
    out = tmp_path_factory.mktemp("built") / "out"
    arguments = ("--recipe", recipe, "--model", checkpoint, "-o", out, "--threads", 1, "--json")
    return out, outcome_of(in_process("build", *arguments))
