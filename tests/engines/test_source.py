"""An artefact finds the checkpoint and the adapter that it was made from, also where they were moved."""

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import save_adapter
from tests.engines.conftest import open_engine, pixels, words
from tokexport.engines.backend import Session
from tokexport.engines.generate import IMAGE, Conversation
from tokexport.engines.source import source_design
from tokexport.errors import CheckpointError, InputError
from tokexport.exporter.bundle import Bundle


def logits_of(session: Session) -> np.ndarray:
    return Conversation(session).feed([*words(4), IMAGE, *words(3)], [session.encode_images(pixels())])


def test_an_adapter_may_have_moved(tiny_lora: tuple[Bundle, Path]):
    bundle, moved = tiny_lora
    assert source_design(bundle, adapter=str(moved)).model.table.adapter == str(moved)


def test_an_adapter_that_is_gone_is_refused(tiny_lora: tuple[Bundle, Path]):
    bundle, moved = tiny_lora
    with pytest.raises(CheckpointError) as caught:
        source_design(bundle)
    assert str(caught.value) == (
        f"there is no adapter directory {moved.with_name('old')}; say where it is with --adapter"
    )


def test_another_adapter_is_refused(tiny_lora: tuple[Bundle, Path], checkpoint: Path, tmp_path: Path):
    other = save_adapter(tmp_path / "other", seed=1)
    bundle, _ = tiny_lora
    with pytest.raises(CheckpointError) as caught:
        source_design(bundle, adapter=str(other))
    assert str(caught.value) == (
        f"{checkpoint} with the adapter {other} is not what {bundle.path} was made from; give the right ones with "
        "--model and --adapter"
    )


def test_an_adapter_for_an_artefact_without_one_is_refused(tiny_lora: tuple[Bundle, Path], tiny_full: Bundle):
    with pytest.raises(InputError) as caught:
        source_design(tiny_full, adapter=str(tiny_lora[1]))
    assert str(caught.value) == f"{tiny_full.path} was made without an adapter; leave out --adapter"


def test_pytorch_runs_with_the_adapter_that_was_exported(tiny_lora: tuple[Bundle, Path]):
    bundle, moved = tiny_lora
    reference = logits_of(open_engine(bundle, "torch-eager", adapter=str(moved)))
    assert np.abs(logits_of(open_engine(bundle)) - reference).max() < 1e-4


def test_the_adapter_changes_what_is_computed(tiny_lora: tuple[Bundle, Path], tiny_full: Bundle):
    assert np.abs(logits_of(open_engine(tiny_lora[0])) - logits_of(open_engine(tiny_full))).max() > 1e-2
