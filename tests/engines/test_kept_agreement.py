"""Choices by attention on the ladder: what was kept is told, followed by the reference, and judged by its scores."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from tests.conftest import IMAGE_SIZE, adsc, recipe_for
from tests.engines.conftest import with_checksums_of_today
from tokexport.engines import parity
from tokexport.engines.backend import Session, SessionOptions, load_backend
from tokexport.engines.build import verify_artefact
from tokexport.engines.compare import Tolerance, load_tolerances
from tokexport.engines.generate import IMAGE, Conversation
from tokexport.engines.parity import verify
from tokexport.engines.source import source_design
from tokexport.engines.torch_session import TorchSession
from tokexport.errors import InputError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.compressor_file import save_compressor
from tokexport.exporter.graph_io import GraphName
from tokexport.exporter.method import chooser_names, load_methods
from tokexport.exporter.methods.relevance import Relevance
from tokexport.recipes.schema import QuantizeTable, Recipe

OPTIONS = SessionOptions(max_text_tokens=160, max_images=2, threads=1)
SMALL = {"keep": 6, "channels": [4, 8]}
FASTV = {"method": "fastv", "keep": 6, "layer": 2}
VISIONZIP = {"method": "visionzip", "keep": 7, "contextual": 3}
PRUMERGE = {"method": "prumerge", "keep": 6, "neighbours": 4}
DIVPRUNE = {"method": "divprune", "keep": 6}
VSCAN = {"method": "vscan", "keep": 9, "window": 2, "local_layer": 0, "layer": 2, "keep_inside": 4}
PYRAMID = {"method": "pyramiddrop", "drops": [{"layer": 1, "keep": 8}, {"layer": 3, "keep": 4}]}

Export = Callable[[Recipe], Bundle]
Copy = Callable[[Bundle], Bundle]


def keeping_the_lowest(bundle: Bundle, graph: GraphName = "decoder_model_merged") -> Bundle:
    """Let the first choice of a graph keep the tokens with the lowest scores."""
    path = bundle.graph_path(graph)
    model = ir.load(path)
    choice = next(node for node in model.graph if node.op_type in ("TopK", "ArgMax"))
    if choice.op_type == "TopK":
        choice.attributes["largest"] = ir.AttrInt64("largest", 0)
    else:
        choice.op_type = "ArgMin"
    ir.save(model, path)
    return with_checksums_of_today(bundle)


def flat_weights(folder: Path) -> str:
    """Write a relevance network that finds all tokens equally important, but for the last bits."""
    network = Relevance(keep=6, channels=(4, 8), weights="untrained").network()
    network.start(torch.Generator().manual_seed(0))
    with torch.no_grad():
        network.head.weight.mul_(1e-7)
        assert network.head.bias is not None
        network.head.bias.fill_(1)
    file = folder / "flat.safetensors"
    save_compressor(file, network, Relevance(keep=6, channels=(4, 8), weights="untrained").trained_sizes())
    return str(file)


@pytest.fixture
def nearly_tied(checkpoint: Path, exported: Export, copied: Copy, tmp_path: Path) -> Bundle:
    """Return an artefact of nearly equal scores whose graph decides otherwise than the reference."""
    recipe = recipe_for(checkpoint, {"method": "relevance", **SMALL, "weights": flat_weights(tmp_path)})
    return keeping_the_lowest(copied(exported(recipe)))


def prompt(session: Session) -> None:
    pixels = np.random.default_rng(0).standard_normal((1, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    Conversation(session).feed([5, IMAGE, 6, 7], [session.encode_images(pixels)])


@pytest.mark.parametrize("backend", ["torch-eager", "ort-portable", "ort"])
def test_a_session_tells_what_was_kept(checkpoint: Path, exported: Export, backend: str):
    session = load_backend(backend).open(exported(recipe_for(checkpoint, PYRAMID)), OPTIONS)
    prompt(session)
    shapes = {layer: (choice.score_BN.shape, choice.kept_BM.shape) for layer, choice in session.choices.items()}
    assert shapes == {1: ((1, 16), (1, 8)), 3: ((1, 8), (1, 4))}
    for choice in session.choices.values():
        highest = np.sort(np.argsort(-choice.score_BN[0], kind="stable")[: choice.kept_BM.shape[1]])
        assert choice.kept_BM[0].tolist() == highest.tolist()


def test_text_without_an_image_leaves_what_was_told(checkpoint: Path, exported: Export):
    session = load_backend("ort").open(exported(recipe_for(checkpoint, FASTV)), OPTIONS)
    prompt(session)
    before = session.choices
    assert isinstance(session.conversation, Conversation)
    session.conversation.feed([8, 9])
    assert session.choices is before
    assert session.conversation.choices == [before]


def test_the_reference_keeps_what_it_is_told_to(checkpoint: Path, exported: Export):
    bundle = exported(recipe_for(checkpoint, FASTV))
    session = TorchSession(source_design(bundle, OPTIONS.source), OPTIONS)
    kept_BM = np.array([[0, 1, 2, 3, 4, 15]])
    session.follow([{2: kept_BM}])
    prompt(session)
    assert session.choices[2].kept_BM.tolist() == kept_BM.tolist()
    prompt(session)
    assert session.choices[2].kept_BM.tolist() != kept_BM.tolist()


@pytest.mark.parametrize("step", [FASTV, PYRAMID], ids=["fastv", "pyramiddrop"])
def test_tokens_kept_against_their_scores_fail_and_nothing_else_does(
    checkpoint: Path, exported: Export, copied: Copy, step: dict[str, Any]
):
    found = verify(keeping_the_lowest(copied(exported(recipe_for(checkpoint, step)))), "ort", OPTIONS)
    broken = [check for check in found.checks if not check.passed]
    layer = 2 if step is FASTV else 1
    assert {check.name for check in broken} == {f"kept tokens, image {image}, layer {layer}" for image in (1, 2)}
    assert all(check.note.endswith("kept against their scores, or not in order") for check in broken)


def test_near_ties_pass_and_are_followed(nearly_tied: Bundle):
    found = verify(nearly_tied, "ort", OPTIONS)
    assert found.first_failure is None
    notes = [check.note for check in found.checks if check.name.startswith("kept tokens, image")]
    assert len(notes) == 4
    assert all("near-ties among 6 tokens" in note for note in notes)


@pytest.mark.parametrize("step", [VISIONZIP, PRUMERGE, VSCAN], ids=["visionzip", "prumerge", "vscan"])
def test_what_the_vision_encoder_keeps_is_followed_and_judged_by_scores(
    checkpoint: Path, exported: Export, copied: Copy, step: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    bundle = keeping_the_lowest(copied(exported(recipe_for(checkpoint, step))), "vision_encoder")
    broken = [check for check in verify(bundle, "ort-portable", OPTIONS).checks if not check.passed]
    assert [check.name for check in broken] == [f"kept tokens, stages.{step['method']}.top"]
    assert broken[0].note.endswith("kept against their scores, or not in order")

    def loose(name: str) -> dict[str, Tolerance]:
        tolerances = load_tolerances(name)
        return {**tolerances, "scores": replace(tolerances["scores"], relative=10.0)}

    monkeypatch.setattr(parity, "load_tolerances", loose)
    found = verify(bundle, "ort-portable", OPTIONS)
    assert found.first_failure is None
    assert any("near-ties" in check.note for check in found.checks if check.name == broken[0].name)


def test_a_token_that_is_not_the_farthest_fails(checkpoint: Path, exported: Export, copied: Copy):
    bundle = keeping_the_lowest(copied(exported(recipe_for(checkpoint, DIVPRUNE))), "vision_encoder")
    broken = [check for check in verify(bundle, "ort-portable", OPTIONS).checks if not check.passed]
    assert [check.name for check in broken] == ["kept tokens, stages.divprune.index"]
    assert broken[0].note.endswith("kept against their scores, or not in order")


@pytest.mark.parametrize("step", [VISIONZIP, DIVPRUNE], ids=["visionzip", "divprune"])
def test_the_reference_keeps_of_an_image_what_it_is_told_to(checkpoint: Path, exported: Export, step: dict[str, Any]):
    session = TorchSession(source_design(exported(recipe_for(checkpoint, step)), OPTIONS.source), OPTIONS)
    pixels = np.random.default_rng(0).standard_normal((1, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    (name,) = chooser_names(load_methods(recipe_for(checkpoint, step).compress))
    chosen, features = session.vision_layer_outputs(pixels)[name].astype(np.int64), session.encode_images(pixels)
    others = np.setdiff1d(np.arange(16), chosen)[None, : chosen.shape[1]]
    session.follow_stages({name: others})
    assert session.vision_layer_outputs(pixels)[name].tolist() == others.tolist()
    assert not np.array_equal(session.encode_images(pixels), features)
    assert session.stage_choices(pixels, {name: others})[name].kept_BM.tolist() == others.tolist()


@pytest.mark.parametrize("step", [VISIONZIP, DIVPRUNE], ids=["visionzip", "divprune"])
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_choices_of_a_rounded_vision_encoder_are_followed(
    checkpoint: Path, exported: Export, step: dict[str, Any], bits: Any
):
    quantize = replace(QuantizeTable.for_bits(bits), block_size=16)
    found = verify(exported(replace(recipe_for(checkpoint, step), quantize=quantize)), "ort", OPTIONS)
    assert found.first_failure is None
    judged = [check for check in found.checks if check.name.startswith("kept tokens, stages.")]
    assert [check.step for check in judged] == ["quantized reference vs ort-portable"]


@pytest.mark.parametrize("vision", ["int8", "none"])
def test_a_rounded_vision_encoder_that_keeps_the_lowest_fails(
    checkpoint: Path, exported: Export, copied: Copy, vision: Any
):
    quantize = replace(QuantizeTable.for_bits("int8"), vision_encoder=vision)
    recipe = replace(recipe_for(checkpoint, VISIONZIP), quantize=quantize)
    bundle = keeping_the_lowest(copied(exported(recipe)), "vision_encoder")
    broken = [check for check in verify(bundle, "ort-portable", OPTIONS).checks if not check.passed]
    assert [check.name for check in broken] == ["kept tokens, stages.visionzip.top"]


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_choices_of_rounded_weights_are_followed(checkpoint: Path, exported: Export, bits: Any):
    quantize = replace(QuantizeTable.for_bits(bits), block_size=16)
    found = verify(exported(replace(recipe_for(checkpoint, FASTV), quantize=quantize)), "ort", OPTIONS)
    assert found.first_failure is None
    lost = [check for check in found.checks if check.name == "token scores, image 1, layer 2"]
    assert 1e-4 < (lost[0].norm_diff or 0) < lost[0].tolerance


def test_agreement_is_counted_over_images(checkpoint: Path, exported: Export):
    found = verify_artefact(exported(recipe_for(checkpoint, FASTV)).path, threads=1, images=3)
    check = found.checks[-1]
    assert (check.name, check.passed, check.cosine) == ("kept tokens, 3 images", True, 1.0)
    assert check.note == "100.000 % of 18 alike, 0 near-ties, 0 against scores"


def test_agreement_counts_near_ties(nearly_tied: Bundle):
    check = verify_artefact(nearly_tied.path, threads=1, images=2).checks[-1]
    assert check.passed
    assert 0 < check.cosine < 1
    assert "12 alike" in check.note.replace(" of", "")


@pytest.mark.parametrize(
    ("step", "kept"), [(VISIONZIP, 3), (PRUMERGE, 5), (DIVPRUNE, 6), (VSCAN, 9)], ids=lambda step: str(step)[:22]
)
def test_choices_of_the_vision_encoder_are_counted(checkpoint: Path, exported: Export, step: dict[str, Any], kept: int):
    found = verify_artefact(exported(recipe_for(checkpoint, step)).path, threads=1, images=2).checks
    counted = {check.graph: check for check in found if check.name == "kept tokens, 2 images"}
    check = counted.pop("vision_encoder")
    assert (check.step, check.passed) == ("reference vs ort-portable", True)
    assert check.note == f"100.000 % of {2 * kept} alike, 0 near-ties, 0 against scores"
    assert list(counted) == (["decoder_model_merged"] if step is VSCAN else [])


def test_agreement_fails_where_the_vision_encoder_keeps_others(checkpoint: Path, exported: Export, copied: Copy):
    bundle = keeping_the_lowest(copied(exported(recipe_for(checkpoint, PRUMERGE))), "vision_encoder")
    check = verify_artefact(bundle.path, threads=1, images=1).checks[-1]
    assert (check.graph, check.passed) == ("vision_encoder", False)
    assert "0 near-ties" in check.note


def test_agreement_fails_where_tokens_are_kept_against_their_scores(checkpoint: Path, exported: Export, copied: Copy):
    bundle = keeping_the_lowest(copied(exported(recipe_for(checkpoint, FASTV))))
    assert not verify_artefact(bundle.path, threads=1, images=1).checks[-1].passed


@pytest.mark.parametrize(
    ("step", "bits", "message"),
    [
        (adsc(), "none", "keeps the same tokens of every image, so --images has no effect"),
        (FASTV, "int8", "is in int8, where an input between two steps falls to either"),
    ],
    ids=["constant", "int8"],
)
def test_agreement_is_refused_where_it_says_nothing(
    checkpoint: Path, exported: Export, step: dict[str, Any], bits: Any, message: str
):
    bundle = exported(replace(recipe_for(checkpoint, step), quantize=QuantizeTable.for_bits(bits)))
    with pytest.raises(InputError, match=message):
        verify_artefact(bundle.path, threads=1, images=1)
