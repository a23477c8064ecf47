"""Folders beside an artefact in which it is made, and which vanish however their maker ends.

```
.OUT.tokexport-x1y2z3/
  OUT.lock            held as long as the maker runs
  OUT                 what is being made
  OUT.replaced        the artefact that stood in its place
```
The kernel lets go of a lock when a process ends, even if it was killed. So a lock tells the living from the dead
also on a volume that several machines or containers share, where a process id does not.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

import psutil

try:
    import fcntl
except ImportError:  # Windows; there the lock is a process id
    fcntl = None


@contextlib.contextmanager
def staging_folder(out: Path) -> Generator[Path]:
    """Give a folder beside ``out`` that is gone afterwards; an artefact that was put aside in it goes back.

    Raises:
        OSError: it cannot be made.
    """
    folder = Path(tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent))
    try:
        with _held(_lock_path(folder, out)):
            yield folder
    finally:
        _clear(folder, out)


def replaced_path(folder: Path, out: Path) -> Path:
    """Return where in a staging folder the artefact at ``out`` waits until another one has taken its place."""
    return folder / f"{out.name}.replaced"


def remove_abandoned(out: Path) -> None:
    """Remove the staging folders of ``out`` whose makers were killed; an artefact put aside in one goes back."""
    for folder in sorted(out.parent.iterdir()):
        if folder.name.startswith(_prefix(out)) and _is_abandoned(_lock_path(folder, out)):
            _clear(folder, out)


def _prefix(out: Path) -> str:
    return f".{out.name}.tokexport-"


def _lock_path(folder: Path, out: Path) -> Path:
    return folder / f"{out.name}.lock"


def _clear(folder: Path, out: Path) -> None:
    replaced = replaced_path(folder, out)
    with contextlib.suppress(FileNotFoundError):  # another build, which clears up too, was faster
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
    # The lock goes last: without one, what a second kill left would never be removed.
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _held(path: Path) -> Generator[None]:
    """Hold a lock; its file appears when it is held, not before."""
    part = path.with_suffix(".part")
    part.write_text(str(os.getpid()), encoding="utf-8")
    if fcntl is None:
        part.rename(path)
        yield
        return
    with part.open("r+b") as file:
        # A disk without locks refuses this one to everybody, so the folder will be left alone.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        part.rename(path)
        yield


def _is_abandoned(path: Path) -> bool:
    """Whether the maker behind a lock is gone; where that cannot be told, it is not."""
    try:
        with path.open("r+b") as file:
            if fcntl is None:
                process = file.read()
                return process.isdigit() and not psutil.pid_exists(int(process))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
