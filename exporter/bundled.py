"""The checkpoints, adapters and compressors that ship, each a folder whose name a recipe gives."""

from importlib import resources
from pathlib import Path

BUNDLED_MODEL = "mini"
BUNDLED = Path(str(resources.files("tokexport.recipes"))) / "models"


def list_bundled() -> list[str]:
    """Return the names of what ships with tokexport."""
    return sorted(path.name for path in BUNDLED.iterdir() if path.is_dir())


def local_directory(name: str) -> Path | None:
    """Return the directory of something that ships or of a path, None where there is none."""
    if name in list_bundled():
        return BUNDLED / name
    path = Path(name).expanduser()
    return path if path.is_dir() else None


def settled(name: str) -> str:
    """Return a path that means the same from every directory; names and hub ids stay as they are."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name not in list_bundled() and path.exists() else name
