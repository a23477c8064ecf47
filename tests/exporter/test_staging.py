"""Staging folders: those of the living stay, those of the dead are removed, wherever a process id comes from."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokexport.exporter import staging
from tokexport.exporter.staging import remove_abandoned, replaced_path, staging_folder

MAKER = """
import os, signal, sys
from pathlib import Path
from tokexport.exporter.staging import staging_folder

with staging_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print(folder, flush=True)
    sys.stdin.read()
"""
"""Makes a staging folder, says where, and keeps it until its input ends."""


@pytest.fixture
def maker(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds a staging folder of ``out``."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAKER, tmp_path / "out"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        yield process


def held_by(maker: subprocess.Popen[str]) -> Path:
    assert maker.stdout is not None
    return Path(maker.stdout.readline().strip())


def killed(maker: subprocess.Popen[str]) -> Path:
    """Kill a process and return the folder that it left."""
    folder = held_by(maker)
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    assert (folder / "half").is_file()
    return folder


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def lock_of(folder: Path) -> Path:
    (path,) = folder.glob("*.lock")
    return path


def put_aside(folder: Path, out: Path) -> None:
    replaced_path(folder, out).mkdir()
    (replaced_path(folder, out) / "old").write_text("old")


def test_a_folder_is_gone_afterwards(tmp_path: Path):
    with staging_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("half")
        assert folder.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_two_folders_of_one_artefact_are_not_the_same(tmp_path: Path):
    with staging_folder(tmp_path / "out") as first, staging_folder(tmp_path / "out") as second:
        assert first != second


def test_the_folder_of_a_process_that_was_killed_is_removed(tmp_path: Path, maker: subprocess.Popen[str]):
    killed(maker)
    remove_abandoned(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_running_process_stays(tmp_path: Path, maker: subprocess.Popen[str]):
    folder = held_by(maker)
    remove_abandoned(tmp_path / "out")
    assert (folder / "half").is_file()


def test_a_folder_of_this_process_stays(tmp_path: Path):
    with staging_folder(tmp_path / "out") as folder:
        remove_abandoned(tmp_path / "out")
        assert folder.is_dir()


def test_a_process_id_that_runs_here_keeps_no_folder_of_another_machine(tmp_path: Path, maker: subprocess.Popen[str]):
    lock_of(killed(maker)).write_text(str(os.getpid()))
    remove_abandoned(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_process_id_that_ended_here_removes_no_folder_of_another_machine(
    tmp_path: Path, maker: subprocess.Popen[str]
):
    folder = held_by(maker)
    lock_of(folder).write_text(str(ended_process()))
    remove_abandoned(tmp_path / "out")
    assert folder.is_dir()


@pytest.mark.parametrize(
    "name", [".other.tokexport-abc", ".out.tokexport-abc", ".out.tokexport-abc.tokexport-def", ".out.notes", ".out"]
)
def test_folders_without_a_lock_of_the_artefact_stay(tmp_path: Path, maker: subprocess.Popen[str], name: str):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "other.lock").write_text(str(ended_process()))
    killed(maker)
    remove_abandoned(tmp_path / "out")
    assert list(tmp_path.iterdir()) == [folder]


def test_a_disk_without_locks_keeps_every_folder(
    tmp_path: Path, maker: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
):
    def refuse(_file: object, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    left = killed(maker)
    monkeypatch.setattr(fcntl, "flock", refuse)
    with staging_folder(tmp_path / "out") as mine:
        remove_abandoned(tmp_path / "out")
        assert left.is_dir()
        assert mine.is_dir()


@pytest.mark.parametrize(("is_running", "stays"), [(True, True), (False, False)], ids=["running", "ended"])
def test_where_there_are_no_such_locks_the_process_id_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_running: bool, stays: bool
):
    monkeypatch.setattr(staging, "fcntl", None)  # as on Windows
    with staging_folder(tmp_path / "out") as made:
        left = shutil.copytree(made, tmp_path / ".out.tokexport-left")
    lock_of(left).write_text(str(os.getpid() if is_running else ended_process()))
    remove_abandoned(tmp_path / "out")
    assert left.is_dir() == stays


def test_the_lock_is_a_process_id_where_there_are_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(staging, "fcntl", None)
    with staging_folder(tmp_path / "out") as folder:
        remove_abandoned(tmp_path / "out")
        assert lock_of(folder).read_text() == str(os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_an_artefact_put_aside_goes_back_if_nothing_took_its_place(tmp_path: Path):
    out = tmp_path / "out"
    with staging_folder(out) as folder:
        put_aside(folder, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "old").is_file()


def test_an_artefact_that_a_killed_process_put_aside_goes_back(tmp_path: Path, maker: subprocess.Popen[str]):
    out = tmp_path / "out"
    put_aside(killed(maker), out)
    remove_abandoned(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "old").is_file()


def test_an_artefact_put_aside_does_not_replace_its_successor(tmp_path: Path, maker: subprocess.Popen[str]):
    out = tmp_path / "out"
    put_aside(killed(maker), out)
    out.mkdir()
    remove_abandoned(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list(out.iterdir()) == []
