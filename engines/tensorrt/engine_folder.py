"""Compiled engines on disk: one folder for each library, version, compute capability and precision.

```
OUT/engines/tensorrt-rtx-1.7.1-sm86-float16/
  vision_encoder.engine, decoder.engine
  engine.json       what they were built from, for and with, and how long that took
  build.log         every line of the builder
```
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokexport.engines.backend import AttentionKind, SessionOptions
from tokexport.engines.tensorrt.compiler import Built
from tokexport.engines.tensorrt.library import Library
from tokexport.errors import EngineError, InputError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.staging import remove_abandoned, replaced_path, staging_folder

ENGINES, RECORD, LOG = "engines", "engine.json", "build.log"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Engines:
    """Engines that were found and fit.

    Attributes:
        path: their folder.
        record: what ``engine.json`` holds.
    """

    path: Path
    record: Mapping[str, Any]

    @property
    def room(self) -> SessionOptions:
        """The room of the cache that the decoder was built with."""
        return SessionOptions(**{key: self.record["room"][key] for key in ("max_text_tokens", "max_images")})

    def plan(self, name: str) -> bytes:
        """Return one engine as the library serialised it.

        Raises:
            EngineError: it was cut short or changed.
        """
        content, expected = (self.path / f"{name}.engine").read_bytes(), self.record["engines"][name]["bytes"]
        if len(content) != expected:
            raise EngineError(
                f"{self.path / name}.engine has {len(content)} bytes, expected {expected}; build it again with: "
                f"tokexport compile {self.path.parent.parent} --overwrite"
            )
        return content


def engine_path(bundle: Bundle, library: Library, capability: str) -> Path:
    """Return where engines for a GPU belong."""
    dtype = bundle.recipe.export.dtype
    key = f"{library.backend}-{library.version}-sm{capability.replace('.', '')}-{dtype}"
    return bundle.path / ENGINES / key


def store(
    path: Path,
    bundle: Bundle,
    library: Library,
    capability: str,
    options: SessionOptions,
    attention: AttentionKind,
    built: Mapping[str, Built],
) -> Engines:
    """Write engines so that no half of them is ever seen; what stood there is replaced.

    Raises:
        EngineError: they cannot be written.
    """
    record = {
        "schema_version": SCHEMA_VERSION,
        "backend": library.backend,
        "version": library.version,
        "capability": capability,
        "dtype": bundle.recipe.export.dtype,
        "attention": attention,
        "room": {"max_text_tokens": options.max_text_tokens, "max_images": options.max_images},
        "graphs": _graph_checksums(bundle),
        "engines": {name: engine.report() for name, engine in built.items()},
    }
    try:
        path.parent.mkdir(exist_ok=True)
        remove_abandoned(path)
        with staging_folder(path) as staging:
            made = staging / path.name
            made.mkdir()
            for name, engine in built.items():
                (made / f"{name}.engine").write_bytes(engine.plan)
            lines = [f"{name}: {line}\n" for name, engine in built.items() for line in engine.log]
            (made / LOG).write_text("".join(lines), encoding="utf-8")
            (made / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            if path.exists():
                path.rename(replaced_path(staging, path))
            made.rename(path)
    except OSError as error:
        needed = sum(len(engine.plan) for engine in built.values())
        raise EngineError(
            f"{path} cannot be written ({error.strerror or error}); it needs {needed / 1e6:.0f} MB: free some room or "
            "allow writing there"
        ) from error
    return Engines(path, record)


def require_none(path: Path) -> None:
    """Check that no engines stand where engines are to be written.

    Raises:
        EngineError: some do.
    """
    try:
        found = json.loads((path / RECORD).read_text(encoding="utf-8")).get("attention")
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError):
        found = None
    kind = "" if found is None else f" with {found} attention"
    raise EngineError(f"{path} is there already{kind}; build it again with --overwrite, or use it as it is")


def require_disk(bundle: Bundle) -> None:
    """Check that engines of about the size of the graphs' weights fit.

    Raises:
        EngineError: they do not.
    """
    needed = sum(record.bytes for name, record in bundle.manifest.files.items() if name.startswith("onnx/"))
    free = shutil.disk_usage(bundle.path).free
    if free < needed:
        raise EngineError(
            f"engines of about {needed / 1e6:.0f} MB do not fit on the disk of {bundle.path}, which has "
            f"{free / 1e6:.0f} MB left; free some room"
        )


def find(bundle: Bundle, library: Library, capability: str, options: SessionOptions) -> Engines:
    """Return the engines of an artefact for a GPU.

    Raises:
        EngineError: there are none, or they were built from other graphs.
        InputError: more room is asked for than they were built with.
    """
    path = engine_path(bundle, library, capability)
    remedy = f"tokexport compile {bundle.path} --backend {library.backend} --capability {capability}"
    if not (path / RECORD).is_file():
        others = sorted(other.name for other in path.parent.glob("*") if (other / RECORD).is_file())
        there = f"only {', '.join(others)}, and engines run with the version and on the GPU they were built for"
        raise EngineError(
            f"{bundle.path} has {there if others else 'no engines'}; expected {path.name}; build it with: {remedy}"
        )
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        found, graphs = Engines(path, record), record["graphs"]
        room = found.room
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"{path / RECORD} cannot be read ({error}); build again with: {remedy} --overwrite"
        ) from error
    if graphs != _graph_checksums(bundle):
        raise EngineError(
            f"{path} was built from other graphs than {bundle.path} has now; build it with: {remedy} --overwrite"
        )
    for key in ("max_text_tokens", "max_images"):
        asked, built = getattr(options, key), getattr(room, key)
        if asked > built:
            name = key.replace("_", "-")
            raise InputError(
                f"{name} {asked} is more than the {built} that {path.name} was built for; ask for less, or build it "
                f"with: {remedy} --{name} {asked} --overwrite"
            )
    return found


def _graph_checksums(bundle: Bundle) -> dict[str, str]:
    files = bundle.manifest.files.items()
    return {name: record.sha256 for name, record in sorted(files) if name.startswith("onnx/")}
