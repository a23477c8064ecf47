"""The ladder: it passes on artefacts that are right, and fails on every way in which one can be wrong."""

# pyright: reportPrivateUsage=false

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from tests.conftest import adsc, recipe_for, save_checkpoint, tiny_config
from tests.engines.conftest import with_checksums_of_today
from tokexport.engines.backend import AS_BUILT, SessionOptions, Source
from tokexport.engines.generate import IMAGE
from tokexport.engines.parity import Verification, failure_text, verify
from tokexport.engines.probe import NEW_TOKENS, make_probe
from tokexport.engines.source import source_design
from tokexport.errors import BackendUnavailableError, CheckpointError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.graph_io import GraphName
from tokexport.recipes.schema import QuantizeTable, Recipe

Export = Callable[[Recipe], Bundle]
Copy = Callable[[Bundle], Bundle]

METACOMPRESS: dict[str, object] = {"method": "metacompress", "keep": 6, "width": 8, "weights": "untrained"}
SAMPLE = {"method": "sample", "keep": 12}
"""Leaves 12 of 16 tokens before the language model."""

RESIZE = {"method": "resize", "keep": 9}
"""Shrinks the image from 4 x 4 to 3 x 3 patches."""


def climbed(bundle: Bundle, backend: str = "ort", repro: Path | None = None) -> Verification:
    return verify(bundle, backend, SessionOptions.for_bundle(bundle, threads=1), repro=repro)


def change_initializer(bundle: Bundle, graph: GraphName, name: str, change: Callable[[np.ndarray], object]) -> Bundle:
    """Change a constant of a graph that lies in the graph's own file."""
    path = bundle.graph_path(graph)
    model = ir.load(path)
    value = model.graph.initializers[name]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    change(array)
    value.const_value = ir.tensor(array, name=name)
    ir.save(model, path)
    return with_checksums_of_today(bundle)


def change_weight(bundle: Bundle, graph: GraphName, name: str) -> Bundle:
    """Double one row of a weight in the file of the weights."""
    tensor = ir.load(bundle.graph_path(graph)).graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.offset is not None
    assert tensor.length is not None
    data = np.memmap(tensor.path, np.float32, "r+", tensor.offset, (tensor.length // 4,))
    data[: tensor.shape.numpy()[-1]] *= 2
    data.flush()
    del data
    return with_checksums_of_today(bundle)


def external_weights(bundle: Bundle, graph: GraphName, part: str) -> list[str]:
    initializers = ir.load(bundle.graph_path(graph)).graph.initializers
    return [
        name
        for name, value in initializers.items()
        if part in name and isinstance(value.const_value, ir.ExternalTensor)
    ]


@pytest.fixture(scope="module")
def ladder(tiny_adsc: Bundle) -> Verification:
    return climbed(tiny_adsc)


def test_the_ladder_passes_for_a_compressed_artefact(ladder: Verification):
    assert ladder.first_failure is None
    assert ladder.passed


@pytest.mark.parametrize("backend", ["torch-eager", "transformers"])
def test_an_engine_that_runs_no_graphs_has_nothing_to_prove(tiny_adsc: Bundle, backend: str):
    with pytest.raises(BackendUnavailableError, match=f"^backend '{backend}' runs the checkpoint, not the graphs"):
        climbed(tiny_adsc, backend)


def test_the_ladder_passes_for_an_uncompressed_artefact(tiny_full: Bundle):
    assert climbed(tiny_full).first_failure is None


@pytest.mark.parametrize(
    "compress",
    [
        [adsc(positions="renumber")],
        [adsc(pattern="grid")],
        [SAMPLE, {"method": "adsc", "drops": [{"layer": 2, "keep": 5}]}],
        [{"method": "adsc", "drops": [{"layer": 0, "keep": 6}]}],
        [RESIZE],
        [RESIZE, {"method": "adsc", "drops": [{"layer": 1, "keep": 6}, {"layer": 3, "keep": 4}], "pattern": "grid"}],
        [{"method": "pool", "keep": 4}],
        [METACOMPRESS, {"method": "adsc", "drops": [{"layer": 1, "keep": 5}]}],
    ],
    ids=[
        "renumbered positions",
        "grid",
        "sample before adsc",
        "bottleneck before the first layer",
        "smaller image",
        "smaller image before adsc",
        "average pooling",
        "a learned mixture before adsc",
    ],
)
def test_the_ladder_passes_for_every_way_to_compress(
    checkpoint: Path, exported: Export, compress: list[dict[str, object]]
):
    assert climbed(exported(recipe_for(checkpoint, *compress))).first_failure is None


def test_the_matrix_of_a_learned_mixture_is_compared(checkpoint: Path, exported: Export):
    checks = {check.name: check for check in climbed(exported(recipe_for(checkpoint, METACOMPRESS))).checks}
    assert checks["stages.metacompress"].passed
    assert checks["stages.metacompress.matrix"].max_abs_diff < 1e-5


def test_the_ladder_passes_without_grouped_heads(tmp_path: Path, exported: Export):
    checkpoint = save_checkpoint(tmp_path / "mha", tiny_config(num_kv_heads=4))
    assert climbed(exported(recipe_for(checkpoint, adsc()))).first_failure is None


def test_the_ladder_climbs_from_transformers_to_the_engine(ladder: Verification):
    steps = dict.fromkeys(check.step for check in ladder.checks)
    assert list(steps) == [
        "transformers step by step",
        "transformers vs reference",
        "reference vs ort-portable",
        "ort-portable vs ort",
    ]


@pytest.mark.parametrize("step", ["transformers vs reference", "reference vs ort-portable", "ort-portable vs ort"])
def test_a_rung_compares_features_logits_tokens_and_the_whole_cache(ladder: Verification, step: str):
    names = {check.name for check in ladder.checks if check.step == step}
    turns = {f"{what}, turn {turn}" for what in ("logits", "greedy tokens") for turn in (1, 2, 3)}
    cache = {f"{what}, layer {layer}" for what in ("keys", "values") for layer in range(4)}
    assert names >= {"image features", *turns, *cache}


def test_the_kept_indices_of_every_bottleneck_are_compared(ladder: Verification):
    kept = [check.name for check in ladder.checks if check.name.startswith("kept tokens")]
    assert kept == ["kept tokens, bottlenecks.1", "kept tokens, bottlenecks.3"]


def test_the_report_has_the_keys_of_the_contract(ladder: Verification):
    report = ladder.report()
    assert report["passed"] is True
    assert report["checks"]
    for check in report["checks"]:
        assert check.keys() >= {"name", "passed", "max_abs_diff", "cosine", "tolerance"}
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_the_probe_holds_three_turns_and_an_image_in_the_first_two(tiny_adsc: Bundle):
    probe = make_probe(source_design(tiny_adsc, AS_BUILT))
    assert [prompt.count(IMAGE) for prompt in probe.prompts] == [1, 1, 0]
    assert len(probe.pixel_values) == 2
    assert NEW_TOKENS >= 32


def test_the_probe_is_the_same_every_time(tiny_adsc: Bundle):
    first, second = (make_probe(source_design(tiny_adsc, AS_BUILT)) for _ in range(2))
    assert first.prompts == second.prompts
    assert (first.pixel_values == second.pixel_values).all()


def test_the_probe_never_says_the_image_token(tiny_adsc: Bundle):
    probe = make_probe(source_design(tiny_adsc, AS_BUILT))
    assert not any(4 in prompt for prompt in probe.prompts)


@pytest.mark.parametrize("layer", [0, 3])
def test_a_changed_weight_of_the_decoder_fails_and_names_its_layer(tiny_adsc: Bundle, copied: Copy, layer: int):
    (name, *_) = external_weights(tiny_adsc, "decoder_model_merged", f"layers.{layer}.self_attn.k_proj")
    verification = climbed(change_weight(copied(tiny_adsc), "decoder_model_merged", name))
    first = verification.first_failure
    assert first is not None
    assert (first.step, first.graph) == ("reference vs ort-portable", "decoder_model_merged")
    broken = [check.layer for check in verification.checks if check.layer is not None and not check.passed]
    assert min(broken) == layer


def test_a_changed_weight_of_the_vision_tower_fails_and_names_its_layer(tiny_adsc: Bundle, copied: Copy):
    (name, *_) = external_weights(tiny_adsc, "vision_encoder", "layers.1.mlp.fc1.weight") or external_weights(
        tiny_adsc, "vision_encoder", "layers.1"
    )
    verification = climbed(change_weight(copied(tiny_adsc), "vision_encoder", name))
    assert failure_text(verification).startswith(
        "parity failed at reference vs ort-portable, vision_encoder, layer 1: vision_tower.encoder.layers.1 off by "
    )


def test_a_changed_weight_of_the_token_embedding_fails(tiny_adsc: Bundle, copied: Copy):
    (name, *_) = external_weights(tiny_adsc, "embed_tokens", "weight")
    bundle = copied(tiny_adsc)
    tensor = ir.load(bundle.graph_path("embed_tokens")).graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    data = np.memmap(tensor.path, np.float32, "r+", tensor.offset or 0)
    data *= 1.01
    data.flush()
    assert not climbed(with_checksums_of_today(bundle)).passed


def test_another_kept_index_in_the_graph_fails(tiny_adsc: Bundle, copied: Copy):
    def change(index: np.ndarray) -> None:
        index[3] += 1

    damaged = change_initializer(copied(tiny_adsc), "decoder_model_merged", "bottlenecks.3.index_M", change)
    first = climbed(damaged).first_failure
    assert first is not None
    assert (first.name, first.max_abs_diff) == ("kept tokens, bottlenecks.3", 1.0)


def test_a_graph_that_keeps_other_tokens_computes_other_logits(tiny_adsc: Bundle, copied: Copy):
    def change(index: np.ndarray) -> None:
        index[:] = index[:] + 1

    damaged = change_initializer(copied(tiny_adsc), "decoder_model_merged", "bottlenecks.1.index_M", change)
    broken = {check.name for check in climbed(damaged).checks if not check.passed}
    assert broken >= {"logits, turn 1", "keys, layer 1", "values, layer 3"}
    assert "keys, layer 0" not in broken


@pytest.mark.parametrize("constant", ["rows_SH", "columns_WS", "positions_GN"])
def test_an_image_shrunk_in_another_way_fails(checkpoint: Path, exported: Export, copied: Copy, constant: str):
    def change(matrix: np.ndarray) -> None:
        matrix[1] = matrix[0]

    right = exported(recipe_for(checkpoint, RESIZE))
    name = f"vision_tower.embeddings.{constant}"
    first = climbed(change_initializer(copied(right), "vision_encoder", name, change)).first_failure
    assert first is not None
    assert (first.step, first.graph, first.layer) == ("reference vs ort-portable", "vision_encoder", 0)


def with_recipe_of(bundle: Bundle, change: Callable[[dict[str, object]], object]) -> Bundle:
    """Let the manifest claim another recipe than the graphs were made from."""
    path = bundle.path / "tokexport.json"
    table = json.loads(path.read_text())
    change(table["recipe"]["compress"][0])
    path.write_text(json.dumps(table))
    return Bundle.open(bundle.path)


@pytest.mark.parametrize("change", [{"phase": 0.5}, {"pattern": "grid"}], ids=lambda change: next(iter(change)))
def test_graphs_of_another_recipe_fail(tiny_adsc: Bundle, copied: Copy, change: dict[str, object]):
    claimed = with_recipe_of(copied(tiny_adsc), lambda step: step.update(change))
    first = climbed(claimed).first_failure
    assert first is not None
    assert first.step == "reference vs ort-portable"


def test_graphs_with_other_positions_fail_in_the_keys_behind_the_bottleneck(tiny_adsc: Bundle, copied: Copy):
    claimed = with_recipe_of(copied(tiny_adsc), lambda step: step.update(positions="renumber"))
    broken = {check.name for check in climbed(claimed).checks if not check.passed}
    assert "keys, layer 1" in broken
    # Values carry no positions: those of the first layer behind the bottleneck are still right.
    assert not {"keys, layer 0", "values, layer 0", "values, layer 1"} & broken


def test_another_checkpoint_of_the_same_sizes_is_refused(tiny_adsc: Bundle, tmp_path: Path):
    other = save_checkpoint(tmp_path / "other", tiny_config(), seed=1)
    with pytest.raises(CheckpointError) as caught:
        verify(tiny_adsc, "ort", SessionOptions.for_bundle(tiny_adsc, source=Source(model=str(other))))
    assert str(caught.value) == (
        f"{other} is not the checkpoint that {tiny_adsc.path} was made from; give the right one with --model"
    )


def test_the_checkpoint_may_have_moved(tiny_adsc: Bundle, checkpoint: Path, tmp_path: Path):
    moved = tmp_path / "moved"
    moved.symlink_to(checkpoint)
    assert source_design(tiny_adsc, Source(model=str(moved))).model.directory == moved


@pytest.fixture(scope="module")
def repro(tiny_adsc: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Verification]:
    """Return the folder that a failure left, and the failure."""
    folder = tmp_path_factory.mktemp("damaged")
    bundle = Bundle.open(shutil.copytree(tiny_adsc.path, folder / "copy"))
    (name, *_) = external_weights(bundle, "decoder_model_merged", "layers.1.self_attn.k_proj")
    return folder / "repro", climbed(change_weight(bundle, "decoder_model_merged", name), repro=folder / "repro")


def test_a_failure_leaves_inputs_and_both_outputs(repro: tuple[Path, Verification]):
    names = {path.name for path in repro[0].iterdir()}
    assert names == {"inputs.npz", "expected.npz", "found.npz", "recipe.toml", "checks.json"}


def test_the_inputs_left_are_those_of_the_probe(repro: tuple[Path, Verification], tiny_adsc: Bundle):
    probe = make_probe(source_design(tiny_adsc, AS_BUILT))
    with np.load(repro[0] / "inputs.npz") as inputs:
        assert (inputs["pixel_values"] == probe.pixel_values).all()
        assert tuple(inputs["prompt_2"]) == probe.prompts[1]
        assert len(inputs["answer_3"]) == NEW_TOKENS


def test_the_outputs_left_show_the_difference_that_is_told(repro: tuple[Path, Verification]):
    folder, verification = repro
    first = verification.first_failure
    assert first is not None
    with np.load(folder / "expected.npz") as expected, np.load(folder / "found.npz") as found:
        assert set(expected) == set(found) >= {"image_features", "logits_1", "key_1", "value_3"}
        half, _, layer = first.name.partition("s, layer ")
        difference = expected[f"{half}_{layer}"] - found[f"{half}_{layer}"]
        assert np.abs(difference).max() == pytest.approx(first.max_abs_diff)
        assert np.allclose(expected["key_0"], found["key_0"], atol=1e-3)
        assert np.abs(expected["key_1"] - found["key_1"]).max() > 1e-2


def test_the_text_of_a_failure_names_step_graph_and_layer(repro: tuple[Path, Verification]):
    text = failure_text(repro[1])
    assert text.startswith("parity failed at reference vs ort-portable, decoder_model_merged, layer 1: ")
    assert "\n" not in text


def test_the_text_of_a_failure_names_the_folder(repro: tuple[Path, Verification]):
    folder, verification = repro
    assert failure_text(verification).endswith(f"; inputs and both outputs are in {folder}")


def test_the_checks_left_say_which_failed(repro: tuple[Path, Verification]):
    document = json.loads((repro[0] / "checks.json").read_text())
    assert "torch" in document["versions"]
    assert {check["name"] for check in document["checks"] if not check["passed"]} >= {"keys, layer 1", "logits, turn 1"}


def test_the_reference_is_transformers_with_fused_attention(tiny_adsc: Bundle):
    from tokexport.engines.backends.transformers import load_reference

    model = load_reference(source_design(tiny_adsc, AS_BUILT))
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


# What is quantized

QUANTIZED = {
    "int8": QuantizeTable.for_bits("int8"),
    "int4": QuantizeTable(vision_encoder="int4", embed_tokens="int8", decoder="int4", block_size=16),
    "mixed": QuantizeTable(vision_encoder="int8", decoder="int4", keep=("lm_head", "layers.0.*"), block_size=16),
    "table": QuantizeTable(embed_tokens="int8"),
}


@pytest.fixture(scope="module")
def quantized(checkpoint: Path, exported: Export) -> Callable[[str], Bundle]:
    return lambda name: exported(replace(recipe_for(checkpoint, adsc()), quantize=QUANTIZED[name]))


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_ladder_of_a_quantized_artefact_has_a_step_for_it(quantized: Callable[[str], Bundle], name: str):
    verification = climbed(quantized(name))
    assert verification.first_failure is None
    steps = list(dict.fromkeys(check.step for check in verification.checks))
    assert steps[2:] == [
        "reference vs quantized reference",
        "quantized reference vs ort-portable",
        "ort-portable vs ort",
    ]
    rounded = [check.graph for check in verification.checks if check.name == "rounded weights"]
    assert len(rounded) == {"int8": 3, "int4": 3, "mixed": 2, "table": 1}[name]
    lost = [check for check in verification.checks if check.step == steps[2] and check.name == "logits, turn 1"]
    # Rounding is there, and is little.
    assert 1e-5 < (lost[0].norm_diff or 0) < lost[0].tolerance < 1


def test_graphs_of_four_bits_are_proved_as_tightly_as_those_of_float32(quantized: Callable[[str], Bundle]):
    checks = [check for check in climbed(quantized("int4")).checks if check.step.startswith("quantized reference")]
    assert {check.norm_diff for check in checks} == {None}
    assert any(check.name == "greedy tokens, turn 3" for check in checks)


@pytest.mark.parametrize(("name", "graph"), [("int8", "decoder_model_merged"), ("int4", "vision_encoder")])
def test_another_whole_number_fails(quantized: Callable[[str], Bundle], copied: Copy, name: str, graph: GraphName):
    bundle = copied(quantized(name))
    (stored, *_) = [value for value in external_weights(bundle, graph, f".{name}") if "layers.1" in value]
    tensor = ir.load(bundle.graph_path(graph)).graph.initializers[stored].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    data = np.memmap(tensor.path, np.uint8, "r+", tensor.offset or 0)
    data[5] ^= 1
    data.flush()
    del data
    failure = failure_text(climbed(with_checksums_of_today(bundle)))
    layer = stored.removesuffix(f".transposed.{name}")
    where = f"parity failed at quantized reference vs ort-portable, {graph}: rounded weights"
    assert failure == f"{where} 1 numbers differ, the first in {layer}"


def test_another_scale_of_bytes_fails(quantized: Callable[[str], Bundle], copied: Copy):
    bundle = copied(quantized("int8"))
    (name, *_) = [value for value in external_weights(bundle, "vision_encoder", ".scale") if "layers.1" in value]
    first = climbed(change_weight(bundle, "vision_encoder", name)).first_failure
    assert first is not None
    assert first.step == "quantized reference vs ort-portable"
