"""Every command that reads the checkpoint of an artefact takes the place to which its adapter was moved."""

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tokexport.exporter.bundle import Bundle

EAGER = ("--backend", "torch-eager")
COMMANDS = {
    "verify": (),
    "bench": ("--repeats", 1, "--new-tokens", 1),
    "eval": (*EAGER, "--dialogues", 1, "--max-new-tokens", 1),
    "run": (*EAGER, "-p", "Hello.", "--max-new-tokens", 1),
    "chat": (*EAGER, "--max-new-tokens", 1),
}


@pytest.fixture
def moved(tiny_lora: tuple[Bundle, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Return a copy of an artefact, as commands write into its reports, and where its adapter lies now."""
    bundle, adapter = tiny_lora
    return shutil.copytree(bundle.path, tmp_path / "lora"), adapter


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_takes_the_place_of_a_moved_adapter(run: Run, moved: tuple[Path, Path], command: str):
    artefact, adapter = moved
    outcome = run(command, artefact, *COMMANDS[command], "--threads", 1, "--adapter", adapter, stdin="Hello.\n")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_that_an_adapter_is_gone(run: Run, moved: tuple[Path, Path], command: str):
    artefact, adapter = moved
    outcome = run(command, artefact, *COMMANDS[command], "--threads", 1, stdin="Hello.\n")
    assert outcome.code == 1
    assert outcome.error == (
        f"there is no adapter directory {adapter.with_name('old')}; say where it is with --adapter"
    )


def test_the_full_artefact_of_an_evaluation_needs_no_adapter(
    run: Run, moved: tuple[Path, Path], tiny_full: Bundle, tmp_path: Path
):
    artefact, adapter = moved
    full = shutil.copytree(tiny_full.path, tmp_path / "full")
    outcome = run("eval", artefact, *COMMANDS["eval"], "--threads", 1, "--adapter", adapter, "--full", full)
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("command", ["eval", "run", "chat"])
@pytest.mark.parametrize("option", ["--model", "--adapter", "--compressor"])
def test_a_source_that_the_engine_does_not_read_is_refused(
    run: Run, moved: tuple[Path, Path], command: str, option: str
):
    options = COMMANDS[command][len(EAGER) :]
    outcome = run(command, moved[0], *options, "--threads", 1, option, "x", stdin="Hello.\n")
    assert outcome.code == 1
    assert outcome.error == (
        f"{option} x has no effect on backend 'ort', which runs the graphs of the artefact alone; leave it out, or "
        "choose a backend that runs from the checkpoint, like torch-eager"
    )
