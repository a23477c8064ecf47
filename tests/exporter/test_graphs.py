"""What is in the graph files: standard operators, the promised interface, constant indices, weights once."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from tests.conftest import IMAGE_SIZE, NUM_LAYERS
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.checkpoint import describe_model, expected_shapes
from tokexport.exporter.graph_io import GRAPHS, GraphIO, GraphName, TensorIO
from tokexport.exporter.trace import OPSET

Arrays = Mapping[str, NDArray[Any]]

DECODER: GraphName = "decoder_model_merged"
DTYPES = {ir.DataType.FLOAT: "float32", ir.DataType.INT64: "int64"}


@pytest.fixture(params=["tiny_full", "tiny_adsc"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return request.getfixturevalue(request.param)


@pytest.fixture
def decoder(tiny_adsc: Bundle) -> ir.Model:
    return ir.load(tiny_adsc.graph_path(DECODER))


def data_path(bundle: Bundle, graph: GraphName) -> Path:
    return bundle.graph_path(graph).with_name(f"{graph}.onnx_data")


# --- operators


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_graph_has_standard_operators_only(bundle: Bundle, graph: GraphName):
    model = ir.load(bundle.graph_path(graph))
    assert model.opset_imports == {"": OPSET}
    assert {node.domain for node in model.graph} == {""}
    assert not model.functions


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_graph_passes_the_checker_of_onnx(bundle: Bundle, graph: GraphName):
    onnx.checker.check_model(str(bundle.graph_path(graph)), full_check=True)


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_value_has_a_type_and_a_shape(bundle: Bundle, graph: GraphName):
    values = [value for node in ir.load(bundle.graph_path(graph)).graph for value in node.outputs if value.name]
    assert [value.name for value in values if value.dtype is None or value.shape is None] == []


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_manifest_tells_the_inputs_and_outputs_of_the_graph(bundle: Bundle, graph: GraphName):
    model = ir.load(bundle.graph_path(graph))
    assert GraphIO(inputs=table(model.graph.inputs), outputs=table(model.graph.outputs)) == bundle.graph_io(graph)


def table(values: Sequence[ir.Value]) -> tuple[TensorIO, ...]:
    found: list[TensorIO] = []
    for value in values:
        assert value.shape is not None
        assert value.dtype is not None
        shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
        found.append(TensorIO(name=str(value.name), dtype=DTYPES[value.dtype], shape=shape))
    return tuple(found)


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_a_layer_is_made_of_whole_operators(bundle: Bundle, layer: int):
    scope = f"/layers.{layer}/"
    found = Counter(
        node.op_type for node in ir.load(bundle.graph_path(DECODER)).graph if (node.name or "").startswith(scope)
    )
    assert {name: found[name] for name in ("MatMul", "Attention", "TensorScatter", "RotaryEmbedding")} == {
        "MatMul": 7,
        "Attention": 1,
        "TensorScatter": 2,
        "RotaryEmbedding": 2,
    }
    assert found["RMSNormalization"] == 2
    assert not found.keys() & {"Softmax", "Expand", "Where", "Pow", "ReduceMean", "Sqrt"}


def test_a_decoder_has_nothing_more_than_its_layers_norm_and_head(bundle: Bundle):
    found = Counter(node.op_type for node in ir.load(bundle.graph_path(DECODER)).graph)
    assert found["MatMul"] == 7 * NUM_LAYERS + 1
    assert found["RMSNormalization"] == 2 * NUM_LAYERS + 1
    assert found["Attention"] == NUM_LAYERS


@pytest.mark.parametrize("graph", ["vision_encoder", DECODER])
def test_an_attention_has_one_output(bundle: Bundle, graph: GraphName):
    attentions = [node for node in ir.load(bundle.graph_path(graph)).graph if node.op_type == "Attention"]
    assert attentions
    assert {len(node.outputs) for node in attentions} == {1}


def test_the_embedding_is_one_gather(bundle: Bundle):
    assert [node.op_type for node in ir.load(bundle.graph_path("embed_tokens")).graph] == ["Gather"]


# --- bottlenecks


def test_every_bottleneck_gathers_hidden_states_once_by_a_constant(decoder: ir.Model):
    # 16 -> 8 -> 4 tokens before the layers 1 and 3.
    assert gathered(decoder, rank=3) == {"1": [tuple(range(0, 16, 2))], "3": [(0, 2, 4, 6)]}


def test_every_bottleneck_gathers_positions_as_it_gathers_hidden_states(decoder: ir.Model):
    assert gathered(decoder, rank=2) == gathered(decoder, rank=3)


def test_an_uncompressed_decoder_has_no_bottleneck(tiny_full: Bundle):
    assert gathered(ir.load(tiny_full.graph_path(DECODER)), rank=3) == {}


def gathered(model: ir.Model, *, rank: int) -> dict[str, list[tuple[int, ...]]]:
    """Return, by bottleneck, the constant indices with which it gathers values of a rank."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for node in model.graph:
        if node.op_type != "Gather" or not (node.name or "").startswith("/bottlenecks."):
            continue
        assert node.inputs[0] is not None
        assert node.inputs[0].shape is not None
        if len(node.inputs[0].shape) == rank:
            layer = (node.name or "").split("/")[1].removeprefix("bottlenecks.")
            found.setdefault(layer, []).append(constant_index(node))
    return found


def constant_index(gather: ir.Node) -> tuple[int, ...]:
    assert gather.attributes["axis"].as_int() == 1
    assert gather.inputs[1] is not None
    cut = gather.inputs[1].producer()
    assert cut is not None
    assert cut.op_type == "Slice"
    assert cut.inputs[0] is not None
    assert cut.inputs[0].is_initializer()
    assert cut.inputs[0].const_value is not None
    return tuple(cut.inputs[0].const_value.numpy().tolist())


# --- weights


def test_every_weight_is_stored_once(bundle: Bundle):
    shapes = expected_shapes(describe_model(bundle.recipe.model))
    # The last layer of the tower and its last norm feed nothing that LLaVA reads.
    unused = ("model.vision_tower.encoder.layers.2.", "model.vision_tower.post_layernorm.")
    used = sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith(unused))
    assert sum(data_path(bundle, graph).stat().st_size for graph in GRAPHS) == 4 * used


def test_the_manifest_counts_the_parameters_of_the_checkpoint(bundle: Bundle):
    shapes = expected_shapes(describe_model(bundle.recipe.model))
    assert bundle.manifest.model.num_parameters == sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize("graph", GRAPHS)
def test_weights_lie_outside_of_the_graph_file_and_only_there(bundle: Bundle, graph: GraphName):
    initializers = ir.load(bundle.graph_path(graph)).graph.initializers
    external = [
        value.const_value for value in initializers.values() if isinstance(value.const_value, ir.ExternalTensor)
    ]
    assert sum(tensor.nbytes for tensor in external) == data_path(bundle, graph).stat().st_size
    assert {tensor.location for tensor in external} == {f"{graph}.onnx_data"}


def test_compression_changes_no_weight(tiny_full: Bundle, tiny_adsc: Bundle):
    for graph in GRAPHS:
        assert data_path(tiny_full, graph).read_bytes() == data_path(tiny_adsc, graph).read_bytes()


def test_no_linear_weight_is_transposed_when_the_graph_runs(bundle: Bundle):
    for graph in GRAPHS:
        nodes = [node for node in ir.load(bundle.graph_path(graph)).graph if node.op_type == "Transpose"]
        assert not [node.name for node in nodes if node.inputs[0] is not None and node.inputs[0].is_initializer()]


# --- nothing of the machine


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_graph_says_nothing_about_the_machine_it_was_made_on(bundle: Bundle, graph: GraphName):
    content = bundle.graph_path(graph).read_bytes()
    folders = [Path.home(), Path(__file__).parents[2], Path(torch.__file__).parents[1], bundle.path.parent]
    for text in (*map(str, folders), "site-packages", ".py", "stack_trace"):
        assert text.encode() not in content, text


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_graph_carries_no_notes_of_the_exporter(bundle: Bundle, graph: GraphName):
    model = ir.load(bundle.graph_path(graph))
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph)
    assert model.producer_name == "tokexport"


def test_every_node_has_a_name_of_its_own(bundle: Bundle):
    for graph in GRAPHS:
        names = [node.name for node in ir.load(bundle.graph_path(graph)).graph]
        assert len(set(names)) == len(names)
        assert all(name and name.startswith("/") for name in names)


# --- numbers


def run(bundle: Bundle, inputs: Arrays, graph: GraphName = DECODER) -> dict[str, NDArray[Any]]:
    session = onnxruntime.InferenceSession(bundle.graph_path(graph), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, map(np.asarray, session.run(names, dict(inputs))), strict=True))


def decoder_inputs(
    bundle: Bundle, batch: int, past: Sequence[int], *, prefix: int = 3, vision: int = 16, suffix: int = 2
) -> dict[str, NDArray[Any]]:
    """Return a random step on a cache that holds ``past`` tokens per row, in every layer."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> NDArray[np.float32]:
        return random.standard_normal(shape, np.float32)

    spec, total = bundle.spec, prefix + vision + suffix
    return {
        "prefix_embeds": normal(batch, prefix, spec.hidden_size),
        "image_features": normal(batch, vision, spec.hidden_size),
        "suffix_embeds": normal(batch, suffix, spec.hidden_size),
        "position_ids": np.array(past)[:, None] + np.arange(total),
        "past_lengths": np.tile(np.array(past), (len(bundle.plan.groups), 1)),
        "logits_to_keep": np.array([0, 4]),
        **{
            f"past_key_values.{layer}.{half}": normal(batch, spec.num_kv_heads, 32, spec.head_dim)
            for layer in range(spec.num_layers)
            for half in ("key", "value")
        },
    }


def row(inputs: Arrays, index: int) -> dict[str, NDArray[Any]]:
    """Return one row of a batch."""
    axes = {"past_lengths": 1, "logits_to_keep": None}
    cut: dict[str, NDArray[Any]] = {}
    for name, array in inputs.items():
        axis = axes.get(name, 0)
        cut[name] = array if axis is None else array.take([index], axis=axis)
    return cut


@pytest.mark.parametrize("vision", [16, 0], ids=["with image", "text only"])
@pytest.mark.parametrize("past", [(0, 0), (3, 7)], ids=["first", "later"])
def test_a_batch_of_two_is_two_batches_of_one(tiny_adsc: Bundle, past: tuple[int, int], vision: int):
    inputs = decoder_inputs(tiny_adsc, 2, past, vision=vision)
    both = run(tiny_adsc, inputs)
    for index in range(2):
        alone = run(tiny_adsc, row(inputs, index))
        for name, array in alone.items():
            np.testing.assert_allclose(both[name][index : index + 1], array, rtol=1e-4, atol=1e-4, err_msg=name)
    assert not np.allclose(both["logits"][0], both["logits"][1], atol=0.1)


def test_what_lies_behind_the_length_of_a_cache_is_not_read(tiny_adsc: Bundle):
    inputs = decoder_inputs(tiny_adsc, 1, (3,))
    changed = {
        name: np.concatenate((array[:, :, :3], array[:, :, 3:] + 100), axis=2) if name.startswith("past_key") else array
        for name, array in inputs.items()
    }
    assert np.array_equal(run(tiny_adsc, inputs)["logits"], run(tiny_adsc, changed)["logits"])


def test_an_image_changes_what_is_said_about_it(tiny_adsc: Bundle):
    inputs = decoder_inputs(tiny_adsc, 1, (0,))
    other = {**inputs, "image_features": inputs["image_features"][:, ::-1]}
    before, after = (run(tiny_adsc, given)["logits"] for given in (inputs, other))
    assert np.array_equal(before[:, 0], after[:, 0])  # of a token before the image
    assert not np.allclose(before[:, 1], after[:, 1], atol=0.1)


@pytest.mark.parametrize("vision", [16, 0], ids=["with image", "text only"])
@pytest.mark.parametrize("past", [0, 5], ids=["first", "later"])
def test_the_reference_of_onnx_computes_the_same_step(tiny_adsc: Bundle, past: int, vision: int):
    inputs = decoder_inputs(tiny_adsc, 1, (past,), vision=vision)
    ours = run(tiny_adsc, inputs)
    reference = ReferenceEvaluator(str(tiny_adsc.graph_path(DECODER)))
    for name, expected in zip(reference.output_names, reference.run(None, dict(inputs)), strict=True):
        np.testing.assert_allclose(ours[name], np.asarray(expected), rtol=1e-4, atol=1e-3, err_msg=name)


def test_the_reference_of_onnx_sees_the_same_image(tiny_adsc: Bundle):
    shape = (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    inputs = {"pixel_values": np.random.default_rng(0).standard_normal(shape, np.float32)}
    ours = run(tiny_adsc, inputs, "vision_encoder")["image_features"]
    reference = ReferenceEvaluator(str(tiny_adsc.graph_path("vision_encoder")))
    np.testing.assert_allclose(ours, np.asarray(reference.run(None, inputs)[0]), rtol=1e-4, atol=1e-3)
