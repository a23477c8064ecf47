"""Cached attentions become ONNX Runtime's operator: every one of them, or the graph is refused."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from tests.conftest import NUM_LAYERS
from tokexport.errors import ExportError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.passes.ort_group_query_attention import DOMAIN, FuseGroupQueryAttention

CAPACITY = 32


@pytest.fixture
def decoder(tiny_adsc: Bundle) -> ir.Model:
    return ir.load(tiny_adsc.graph_path("decoder_model_merged"))


def fused(model: ir.Model) -> ir.Model:
    FuseGroupQueryAttention()(model)
    return model


def step(bundle: Bundle, past: int, vision: int) -> dict[str, NDArray[np.generic]]:
    random = np.random.default_rng(0)

    def normal(*shape: int) -> NDArray[np.float32]:
        return random.standard_normal(shape, np.float32)

    spec, total = bundle.spec, 3 + vision + 2
    return {
        "prefix_embeds": normal(1, 3, spec.hidden_size),
        "image_features": normal(1, vision, spec.hidden_size),
        "suffix_embeds": normal(1, 2, spec.hidden_size),
        "position_ids": past + np.arange(total)[None],
        "past_lengths": np.full((len(bundle.plan.groups), 1), past),
        "logits_to_keep": np.array([0, 4]),
        **{
            f"past_key_values.{layer}.{half}": normal(1, spec.num_kv_heads, CAPACITY, spec.head_dim)
            for layer in range(spec.num_layers)
            for half in ("key", "value")
        },
    }


def run(model: ir.Model, folder: Path, inputs: dict[str, NDArray[np.generic]]) -> dict[str, NDArray[np.float32]]:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    graph = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, map(np.asarray, session.run(names, inputs)), strict=True))


def test_every_layer_is_fused_once(decoder: ir.Model):
    fuse = FuseGroupQueryAttention()
    assert fuse(decoder).modified
    assert fuse.count == NUM_LAYERS
    found = Counter(node.op_type for node in decoder.graph)
    assert found["GroupQueryAttention"] == NUM_LAYERS
    assert not found.keys() & {"Attention", "TensorScatter"}
    assert decoder.opset_imports[DOMAIN] == 1


def test_the_heads_are_those_of_the_model(decoder: ir.Model):
    heads = {
        (node.attributes["num_heads"].as_int(), node.attributes["kv_num_heads"].as_int())
        for node in fused(decoder).graph
        if node.op_type == "GroupQueryAttention"
    }
    assert heads == {(4, 2)}


def test_lengths_are_worked_out_once_per_group_of_layers(decoder: ir.Model, tiny_adsc: Bundle):
    found = Counter(node.op_type for node in fused(decoder).graph)
    assert found["ReduceMax"] == len(tiny_adsc.plan.groups) == 3


def test_inputs_and_outputs_stay_as_they_were(decoder: ir.Model):
    before = [(value.name, value.shape, value.dtype) for value in (*decoder.graph.inputs, *decoder.graph.outputs)]
    fused(decoder)
    after = [(value.name, value.shape, value.dtype) for value in (*decoder.graph.inputs, *decoder.graph.outputs)]
    assert after == before


def test_weights_are_not_read_while_fusing(decoder: ir.Model):
    before = {name: value.const_value for name, value in decoder.graph.initializers.items()}
    fused(decoder)
    for name, value in decoder.graph.initializers.items():
        assert value.const_value is before.get(name, value.const_value)


@pytest.mark.parametrize(("past", "vision"), [(0, 16), (5, 16), (5, 0)], ids=["prefill", "second image", "text only"])
def test_the_result_does_not_change(decoder: ir.Model, tiny_adsc: Bundle, past: int, vision: int):
    folder = tiny_adsc.path / "onnx"
    inputs = step(tiny_adsc, past, vision)
    expected = run(decoder, folder, inputs)
    found = run(fused(decoder), folder, inputs)
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=1e-4, atol=1e-4)
    lengths = {layer: past + 5 + (min(vision, tiny_adsc.plan.per_layer[layer])) for layer in range(NUM_LAYERS)}
    for layer, length in lengths.items():
        for half in ("key", "value"):
            name = f"present.{layer}.{half}"
            np.testing.assert_allclose(
                found[name][:, :, :length], expected[name][:, :, :length], rtol=1e-4, atol=1e-4, err_msg=name
            )


def test_fusing_twice_fuses_once(decoder: ir.Model):
    fused(decoder)
    again = FuseGroupQueryAttention()
    assert not again(decoder).modified
    assert again.count == 0


def test_an_attention_without_a_cache_is_left_alone(tiny_adsc: Bundle):
    model = ir.load(tiny_adsc.graph_path("vision_encoder"))
    before = [node.op_type for node in model.graph]
    fuse = FuseGroupQueryAttention()
    assert "Attention" in before
    assert not fuse(model).modified
    assert [node.op_type for node in model.graph] == before
    assert DOMAIN not in model.opset_imports


def first(model: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op_type and (node.name or "").startswith("/layers.1/"))


def without_write(model: ir.Model) -> None:
    write = first(model, "TensorScatter")
    assert write.inputs[0] is not None
    first(model, "Attention").replace_input_with(1, write.inputs[0])


def without_rotation(model: ir.Model) -> None:
    rotary = first(model, "RotaryEmbedding")
    rotary.outputs[0].replace_all_uses_with(rotary.inputs[0])  # pyright: ignore


def read_twice(model: ir.Model) -> None:
    attended = first(model, "Attention").outputs[0]
    copy = ir.node("Neg", [attended])
    model.graph.append(copy)
    model.graph.outputs.append(copy.outputs[0])


def with_bias_before_the_merge(model: ir.Model) -> None:
    attention = first(model, "Attention")
    doubled = ir.node("Neg", [attention.outputs[0]])
    attention.outputs[0].replace_all_uses_with(doubled.outputs[0])
    doubled.replace_input_with(0, attention.outputs[0])
    model.graph.insert_after(attention, doubled)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (without_write, "comes from no node, expected TensorScatter; the attention cannot be fused"),
        (without_rotation, "comes from Transpose, expected RotaryEmbedding; the attention cannot be fused"),
        (read_twice, "is used by ['Transpose', 'Neg'], expected one Transpose; the attention cannot be fused"),
        (with_bias_before_the_merge, "is used by ['Neg'], expected one Transpose; the attention cannot be fused"),
    ],
    ids=["no cache write", "no rotation", "read twice", "node between"],
)
def test_a_cached_attention_of_another_form_is_refused(
    decoder: ir.Model, damage: Callable[[ir.Model], None], text: str
):
    damage(decoder)
    with pytest.raises(ExportError) as caught:
        FuseGroupQueryAttention()(decoder)
    assert str(caught.value).endswith(text)


@pytest.mark.parametrize(
    ("op_type", "attribute"),
    [
        ("Attention", ir.AttrFloat32("scale", 0.5)),
        ("Attention", ir.AttrInt64("is_causal", 0)),
        ("RotaryEmbedding", ir.AttrInt64("interleaved", 1)),
    ],
    ids=["scale", "not causal", "interleaved rotation"],
)
def test_an_attention_that_computes_something_else_is_refused(decoder: ir.Model, op_type: str, attribute: ir.Attr):
    first(decoder, op_type).attributes[attribute.name] = attribute
    with pytest.raises(ExportError):
        FuseGroupQueryAttention()(decoder)
