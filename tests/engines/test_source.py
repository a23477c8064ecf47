"""An artefact finds the checkpoint, the adapter and the compressor that it was made from, also where they moved."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import recipe_for, save_adapter, save_checkpoint, tiny_config
from tests.engines.conftest import open_engine, pixels, without_base_fingerprint, words
from tokexport.engines.backend import AS_BUILT, Session, Source
from tokexport.engines.generate import IMAGE, Conversation
from tokexport.engines.source import base_fingerprint, source_design
from tokexport.errors import CheckpointError, InputError
from tokexport.exporter.bundle import Bundle, BundleWriter
from tokexport.exporter.compressor_file import save_compressor
from tokexport.exporter.export import design, export
from tokexport.exporter.methods.metacompress import MetaCompress
from tokexport.recipes.schema import Recipe


def logits_of(session: Session) -> np.ndarray:
    return Conversation(session).feed([*words(4), IMAGE, *words(3)], [session.encode_images(pixels())])


def test_an_adapter_may_have_moved(tiny_lora: tuple[Bundle, Path]):
    bundle, moved = tiny_lora
    assert source_design(bundle, Source(adapter=str(moved))).model.table.adapter == str(moved)


def test_an_adapter_that_is_gone_is_refused(tiny_lora: tuple[Bundle, Path]):
    bundle, moved = tiny_lora
    with pytest.raises(CheckpointError) as caught:
        source_design(bundle, AS_BUILT)
    assert str(caught.value) == (
        f"there is no adapter directory {moved.with_name('old')}; say where it is with --adapter"
    )


def test_another_adapter_is_refused(tiny_lora: tuple[Bundle, Path], checkpoint: Path, tmp_path: Path):
    other = save_adapter(tmp_path / "other", seed=1)
    bundle, _ = tiny_lora
    with pytest.raises(CheckpointError) as caught:
        source_design(bundle, Source(adapter=str(other)))
    assert str(caught.value) == (
        f"{checkpoint} with the adapter {other} is not what {bundle.path} was made from; give the right ones with "
        "--model and --adapter"
    )


def test_an_adapter_for_an_artefact_without_one_is_refused(tiny_lora: tuple[Bundle, Path], tiny_full: Bundle):
    with pytest.raises(InputError) as caught:
        source_design(tiny_full, Source(adapter=str(tiny_lora[1])))
    assert str(caught.value) == f"{tiny_full.path} was made without an adapter; leave out --adapter"


def test_pytorch_runs_with_the_adapter_that_was_exported(tiny_lora: tuple[Bundle, Path]):
    bundle, moved = tiny_lora
    reference = logits_of(open_engine(bundle, "torch-eager", source=Source(adapter=str(moved))))
    assert np.abs(logits_of(open_engine(bundle)) - reference).max() < 1e-4


def test_the_adapter_changes_what_is_computed(tiny_lora: tuple[Bundle, Path], tiny_full: Bundle):
    assert np.abs(logits_of(open_engine(tiny_lora[0])) - logits_of(open_engine(tiny_full))).max() > 1e-2


@pytest.fixture(scope="module")
def mixed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    """Return an artefact with a compressor and where its weights lie now."""
    folder = tmp_path_factory.mktemp("mixed")
    step = {"method": "metacompress", "keep": 4, "width": 8, "weights": "untrained"}
    made = design(recipe_for(checkpoint, step))
    method, arriving = made.methods[0], made.plans[0]
    assert isinstance(method, MetaCompress)
    module = method.feature_stage(made.model.spec, arriving)
    for name, seed in (("old", 0), ("other", 1)):
        module.matrix.start(torch.Generator().manual_seed(seed))
        save_compressor(folder / f"{name}.safetensors", module, method.trained_sizes(arriving))
    recipe = recipe_for(checkpoint, {**step, "weights": str(folder / "old.safetensors")})
    with BundleWriter(folder / "out") as writer:
        export(design(recipe), writer)
        bundle = writer.commit()
    return bundle, (folder / "old.safetensors").rename(folder / "moved.safetensors")


def test_a_compressor_may_have_moved(mixed: tuple[Bundle, Path]):
    bundle, moved = mixed
    reference = logits_of(open_engine(bundle, "torch-eager", source=Source(compressor=str(moved))))
    assert np.abs(logits_of(open_engine(bundle)) - reference).max() < 1e-4


def test_a_compressor_that_is_gone_is_refused(mixed: tuple[Bundle, Path]):
    bundle, moved = mixed
    with pytest.raises(CheckpointError) as caught:
        source_design(bundle, AS_BUILT)
    assert str(caught.value) == (
        f"there are no compressor weights {moved.with_name('old.safetensors')}; train them with 'tokexport train' and "
        "give the file with --compressor"
    )


def test_another_compressor_is_refused(mixed: tuple[Bundle, Path], checkpoint: Path):
    bundle, moved = mixed
    other = moved.with_name("other.safetensors")
    with pytest.raises(CheckpointError) as caught:
        source_design(bundle, Source(compressor=str(other)))
    assert str(caught.value) == (
        f"{checkpoint} with the compressor {other} is not what {bundle.path} was made from; give the right ones with "
        "--model and --compressor"
    )


def test_a_compressor_for_an_artefact_without_one_is_refused(mixed: tuple[Bundle, Path], tiny_adsc: Bundle):
    with pytest.raises(InputError) as caught:
        source_design(tiny_adsc, Source(compressor=str(mixed[1])))
    assert str(caught.value) == f"{tiny_adsc.path} was made without a compressor; leave out --compressor"


def test_an_adapter_or_what_a_method_learned_makes_no_other_model(
    tiny_full: Bundle,
    tiny_lora: tuple[Bundle, Path],
    checkpoint: Path,
    exported: Callable[[Recipe], Bundle],
):
    learned = exported(recipe_for(checkpoint, {"method": "relevance", "keep": 6, "weights": "untrained"}))
    for bundle in (tiny_lora[0], learned):
        assert bundle.manifest.model.fingerprint != tiny_full.manifest.model.fingerprint
        assert base_fingerprint(bundle) == base_fingerprint(tiny_full)


def test_another_checkpoint_is_another_model(tiny_full: Bundle, exported: Callable[[Recipe], Bundle], tmp_path: Path):
    other = exported(recipe_for(save_checkpoint(tmp_path / "other", tiny_config(), seed=1)))
    assert base_fingerprint(other) != base_fingerprint(tiny_full)


def test_an_older_artefact_is_known_by_its_checkpoint(
    copied: Callable[[Bundle], Bundle], tiny_full: Bundle, tiny_lora: tuple[Bundle, Path]
):
    assert base_fingerprint(without_base_fingerprint(copied(tiny_lora[0]))) == base_fingerprint(tiny_full)


def test_an_older_artefact_of_the_checkpoint_alone_needs_none(copied: Callable[[Bundle], Bundle], tiny_full: Bundle):
    assert base_fingerprint(without_base_fingerprint(copied(tiny_full), checkpoint="gone")) == base_fingerprint(
        tiny_full
    )
