"""Our own attention operator: the graph means what it did, and says so itself."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from tests.conftest import NUM_LAYERS
from tests.engines.test_tensorrt import OPTIONS, OrtRunner, three_turns
from tokexport.engines.backend import open_session
from tokexport.engines.tensorrt.session import TensorrtSession
from tokexport.errors import ExportError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.passes.fix_sizes import FixSizes
from tokexport.exporter.passes.flash_attention_op import DOMAIN, OPERATOR, UseFlashAttention


def rewritten(bundle: Bundle) -> ir.Model:
    model = ir.load(bundle.graph_path("decoder_model_merged"))
    capacities = {f"capacity_{group}": 40 + 2 * item.vision_tokens for group, item in enumerate(bundle.plan.groups)}
    FixSizes({"batch": 1, **capacities})(model)
    use = UseFlashAttention()
    use(model)
    assert use.count == NUM_LAYERS
    return model


def test_a_runtime_without_the_plugin_computes_what_the_operator_means(tiny_adsc: Bundle):
    graph = ir.to_proto(rewritten(tiny_adsc)).SerializeToString()
    session = TensorrtSession(tiny_adsc, OPTIONS, OPTIONS, OrtRunner(tiny_adsc, OPTIONS, graph))
    portable = open_session(tiny_adsc, "ort-portable", OPTIONS)
    for expected, found in zip(three_turns(portable), three_turns(session), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_shapes_are_inferred_through_the_operator(tiny_adsc: Bundle):
    proto = ir.to_proto(rewritten(tiny_adsc))
    nodes = [node for node in proto.graph.node if node.op_type == OPERATOR]
    assert {(node.domain, len(node.input)) for node in nodes} == {(DOMAIN, 4)}
    names = {node.output[0] for node in nodes}
    del proto.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in inferred.graph.value_info
    }
    assert {tuple(shapes[name][axis] for axis in (1, 3)) for name in names} == {(4, 16)}


def test_attention_that_is_not_causal_is_refused(tiny_adsc: Bundle):
    model = ir.load(tiny_adsc.graph_path("decoder_model_merged"))
    for node in model.graph:
        if node.op_type == "Attention":
            node.attributes["is_causal"] = ir.AttrInt64("is_causal", 0)
    with pytest.raises(ExportError, match=r"is not causal, expected causal attention over a cache; FlashAttention"):
        UseFlashAttention()(model)


def test_onnx_runtime_has_no_such_operator_of_its_own(tiny_adsc: Bundle):
    model = rewritten(tiny_adsc)
    model.functions.clear()
    settings = ort.SessionOptions()
    settings.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(tiny_adsc.path / "onnx")
    )
    with pytest.raises(Exception, match=OPERATOR):
        ort.InferenceSession(ir.to_proto(model).SerializeToString(), settings)
