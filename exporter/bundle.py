"""The artefact on disk: its manifest, how it is written so that no half of it is ever seen, how it is trusted.

```
OUT/
  tokexport.json    the manifest: versions, model, recipe, plan, graph inputs and outputs, SHA-256 of every file
  recipe.toml       the recipe with every default filled in
  onnx/             the graphs and their weights
  config.json, tokenizer and processor files
  reports/          plan, verify, bench; may be made again, so not part of the checksums
```
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tokexport.errors import BundleError, RecipeError
from tokexport.exporter.graph_io import GraphIO, GraphName
from tokexport.exporter.plan import TokenPlan, VlmSpec
from tokexport.exporter.staging import remove_abandoned, replaced_path, staging_folder
from tokexport.recipes.load import parse_recipe
from tokexport.recipes.schema import Recipe
from tokexport.recipes.tables import parse_table, table_of

SCHEMA_VERSION = 1
MANIFEST = "tokexport.json"
REPORTS = "reports"
_LIBRARIES = (
    "tokexport",
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "safetensors",
)
# A file larger than this is compared by size when an artefact is opened, by checksum when it is verified.
_QUICK_CHECK_BYTES = 256 << 20
# numpy raises without a number when a write is cut short.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, None)


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """Which model an artefact was made from.

    Attributes:
        checkpoint: its name or directory.
        weights: whether they were read or made at random.
        fingerprint: of all weights, an adapter's and those that methods learned among them.
        num_parameters: of all of them.
        base_fingerprint: of the checkpoint alone; empty in artefacts made before it was recorded.
    """

    checkpoint: str
    weights: str
    fingerprint: str
    num_parameters: int
    base_fingerprint: str = ""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size and checksum of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``tokexport.json`` holds."""

    schema_version: int
    versions: Mapping[str, str]
    model: ModelRecord
    recipe: Mapping[str, Any]
    spec: VlmSpec
    plan: TokenPlan
    graphs: Mapping[str, GraphIO]
    files: Mapping[str, FileRecord] = field(default_factory=dict)


@dataclass(frozen=True)
class Bundle:
    """An artefact that was opened and found whole."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path, *, check_all: bool = False) -> "Bundle":
        """Open an artefact.

        Args:
            path: its directory.
            check_all: compare the checksum of every file, however large.

        Raises:
            BundleError: no artefact, made by a newer tokexport, or damaged; the text says which file.
        """
        if not (path / MANIFEST).is_file():
            what = "has no tokexport.json" if path.is_dir() else "is no directory"
            raise BundleError(f"{path} {what}, so it is no artefact; make one with: tokexport build -o {path}")
        manifest = _read_manifest(path / MANIFEST)
        for name, record in manifest.files.items():
            _check_file(path / name, record, check_all=check_all)
        return cls(path, manifest)

    @property
    def recipe(self) -> Recipe:
        return parse_recipe(str(self.manifest.recipe.get("name", "")), self.manifest.recipe)

    @property
    def spec(self) -> VlmSpec:
        return self.manifest.spec

    @property
    def plan(self) -> TokenPlan:
        return self.manifest.plan

    def graph_path(self, graph: GraphName) -> Path:
        return self.path / "onnx" / f"{graph}.onnx"

    def graph_io(self, graph: GraphName) -> GraphIO:
        return self.manifest.graphs[graph]

    def write_report(self, name: str, content: str | Mapping[str, Any]) -> Path:
        """Write ``reports/name``; a mapping is written as JSON."""
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        return write_atomically(self.path / REPORTS / name, text)

    def read_report(self, name: str) -> dict[str, Any] | None:
        """Return a JSON report, None where it was not made yet."""
        path = self.path / REPORTS / name
        return json.loads(path.read_text()) if path.is_file() else None


class BundleWriter:
    """Writes an artefact beside its place and moves it there when it is complete.

    Used as a context: leaving it without ``commit`` having been called, by an error or by Ctrl-C,
    removes everything that was written.

    Raises:
        BundleError: the place is taken, cannot be written or has too little room.
    """

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        self.out = out.expanduser().absolute()
        self._overwrite = overwrite
        self._stack = contextlib.ExitStack()
        self.staging = Path()

    def __enter__(self) -> Self:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(self.out)
            _check_place(self.out, overwrite=self._overwrite)
            with contextlib.ExitStack() as stack:
                self.staging = stack.enter_context(staging_folder(self.out)) / self.out.name
                (self.staging / "onnx").mkdir(parents=True)
                self.staging.chmod(0o755)
                self._stack = stack.pop_all()
        except OSError as error:
            raise BundleError(f"{self.out.parent} cannot be written ({error.strerror}); choose another -o") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if isinstance(error, OSError) and self._is_ours(error):
            # numpy says how many bytes it could not write, but not why.
            reason = error.strerror or f"the disk is full or a limit is reached: {error}"
            raise BundleError(f"{self.out} could not be written ({reason}); nothing was left behind") from error

    def _is_ours(self, error: OSError) -> bool:
        """Whether an error is about writing here, and not about reading elsewhere."""
        return error.errno in _NO_ROOM or str(error.filename or "").startswith(str(self.staging))

    def require_room(self, num_bytes: int, contents: str = "") -> None:
        """Raise ``BundleError`` if the disk has less room than ``num_bytes``; ``contents`` says what takes it."""
        free = shutil.disk_usage(self.staging).free
        if free < num_bytes:
            what = f" ({contents})" if contents else ""
            raise BundleError(
                f"{self.out} needs {num_bytes / 1e6:,.0f} MB{what} and its disk has {free / 1e6:,.0f} MB free; "
                "choose another -o or make room"
            )

    def write_manifest(self, manifest: Manifest) -> Bundle:
        """Write the manifest with the checksum of every file, and open the artefact where it stands."""
        files = {path.relative_to(self.staging).as_posix(): table_of(_record(path)) for path in _files(self.staging)}
        table = {**table_of(manifest), "files": files}
        write_atomically(self.staging / MANIFEST, json.dumps(table, indent=2) + "\n")
        return Bundle(self.staging, _read_manifest(self.staging / MANIFEST))

    def commit(self) -> Bundle:
        """Move the finished artefact to its place, all at once."""
        _check_place(self.out, overwrite=self._overwrite)
        if self.out.exists():
            self.out.rename(replaced_path(self.staging.parent, self.out))  # it goes back if the next line fails
        self.staging.rename(self.out)
        return Bundle(self.out, _read_manifest(self.out / MANIFEST))


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that shape an artefact."""
    found: dict[str, str] = {}
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write_atomically(path: Path, text: str) -> Path:
    """Write a text file so that a reader sees the old one or the new one, never a part.

    Raises:
        BundleError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise BundleError(f"{path} cannot be written ({error.strerror or error})") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _read_manifest(path: Path) -> Manifest:
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read as JSON ({error}); build the artefact again") from error
    found = table.get("schema_version") if isinstance(table, dict) else None
    if not isinstance(found, int):
        raise BundleError(f"{path} is no manifest of tokexport; build the artefact again")
    if found > SCHEMA_VERSION:
        raise BundleError(
            f"{path.parent} was made by a newer tokexport (schema {found}, this one reads "
            f"{SCHEMA_VERSION}); upgrade tokexport"
        )
    try:
        return parse_table(Manifest, table, MANIFEST)
    except (RecipeError, AssertionError) as error:
        raise BundleError(f"{path} is damaged: {error}; build the artefact again") from error


def _check_file(path: Path, expected: FileRecord, *, check_all: bool) -> None:
    if not path.is_file():
        raise BundleError(f"{path} is missing from the artefact; build it again")
    size = path.stat().st_size
    if size != expected.bytes:
        raise BundleError(f"{path} is damaged: {size:,} bytes, expected {expected.bytes:,}; build the artefact again")
    if (check_all or size <= _QUICK_CHECK_BYTES) and _record(path) != expected:
        raise BundleError(f"{path} is damaged: its SHA-256 is not the one in the manifest; build the artefact again")


def _check_place(out: Path, *, overwrite: bool) -> None:
    if out.is_dir():
        if any(out.iterdir()) and not overwrite:
            raise BundleError(f"{out} exists and is not empty; choose another -o, or replace it with --overwrite")
        if any(out.iterdir()) and not (out / MANIFEST).is_file():
            raise BundleError(
                f"{out} is not empty and no artefact, so --overwrite will not replace it; choose another -o"
            )
    elif out.exists():
        raise BundleError(f"{out} is a file; choose a directory for -o")


def _files(folder: Path) -> Iterator[Path]:
    return (
        path for path in sorted(folder.rglob("*")) if path.is_file() and REPORTS not in path.relative_to(folder).parts
    )


def _record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        return FileRecord(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())
