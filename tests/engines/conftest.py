"""Pixels, opened sessions and copies of artefacts for the tests of engines."""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.conftest import IMAGE_SIZE
from tokexport.engines.backend import Session, SessionOptions, open_session
from tokexport.exporter.bundle import MANIFEST, Bundle


def open_engine(bundle: Bundle, backend: str = "ort", **options: Any) -> Session:
    """Open an artefact; options are those of ``SessionOptions.for_bundle``, one thread if none are given."""
    return open_session(bundle, backend, SessionOptions.for_bundle(bundle, **{"threads": 1, **options}))


def pixels(count: int = 1, seed: int = 0) -> NDArray[np.float32]:
    """Return the pixel values of ``count`` noisy images of the tiny model."""
    shape = (count, 3, IMAGE_SIZE, IMAGE_SIZE)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def words(count: int, seed: int = 0) -> list[int]:
    """Return token ids of the tiny model that stand for nothing special."""
    return [int(token) for token in np.random.default_rng(seed).integers(5, 512, count)]


def with_checksums_of_today(bundle: Bundle) -> Bundle:
    """Write the manifest anew, so that an artefact changed on purpose opens."""
    path = bundle.path / MANIFEST
    table = json.loads(path.read_text())
    for name in table["files"]:
        content = (bundle.path / name).read_bytes()
        table["files"][name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    path.write_text(json.dumps(table))
    return Bundle.open(bundle.path)


def without_base_fingerprint(bundle: Bundle, **changes: str) -> Bundle:
    """Make an artefact one of before it said which checkpoint it is from; changes are of its recipe's model."""
    path = bundle.path / MANIFEST
    table = json.loads(path.read_text())
    del table["model"]["base_fingerprint"]
    table["recipe"]["model"] |= changes
    path.write_text(json.dumps(table))
    return Bundle.open(bundle.path)


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Bundle], Bundle]:
    """Copy an artefact, to be damaged."""

    def copy(bundle: Bundle) -> Bundle:
        return Bundle.open(shutil.copytree(bundle.path, tmp_path / "copy"))

    return copy
