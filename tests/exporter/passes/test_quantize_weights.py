"""Weights become whole numbers, each is read once, and the graph computes what they stand for."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from tokexport.errors import ExportError
from tokexport.exporter.modules.rounding import rounded_to_bytes
from tokexport.exporter.passes.quantize_weights import QuantizeWeights
from tokexport.exporter.quantization import QuantizedLayer
from tokexport.recipes.schema import Bits

K, N = 48, 6
FLOAT = ir.TensorType(ir.DataType.FLOAT)


def weight(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((K, N)).astype(np.float32)


X = np.random.default_rng(9).standard_normal((2, 5, K)).astype(np.float32)


class Graph:
    """Two products with one input, b before a; ``reads`` lists whose weight was read."""

    def __init__(self, *, is_twice: bool = False) -> None:
        self.reads: list[str] = []
        x = ir.Value(name="x", shape=ir.Shape(["B", "T", K]), type=FLOAT)
        matrices = {name: self._initializer(name, seed) for seed, name in enumerate("ab")}
        nodes = [
            ir.node("MatMul", [x, matrices[name]], name=f"/{name}/MatMul", outputs=[self._output(f"y_{name}")])
            for name in "ba"
        ]
        if is_twice:
            nodes.append(ir.node("MatMul", [x, matrices["a"]], outputs=[self._output("again")]))
        outputs = [node.outputs[0] for node in nodes]
        graph = ir.Graph([x], outputs, nodes=nodes, initializers=[*matrices.values()], opset_imports={"": 24}, name="g")
        self.model = ir.Model(graph, ir_version=11)

    def _initializer(self, name: str, seed: int) -> ir.Value:
        def read() -> ir.TensorProtocol:
            self.reads.append(name)
            return ir.tensor(weight(seed), name=name)

        shape = ir.Shape([K, N])
        lazy = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=shape, name=name)
        return ir.Value(name=name, shape=shape, type=FLOAT, const_value=lazy)

    def _output(self, name: str) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(["B", "T", N]), type=FLOAT)

    def run(self) -> dict[str, NDArray[np.float32]]:
        proto = ir.to_proto(self.model)
        onnx.checker.check_model(proto, full_check=True)
        settings = onnxruntime.SessionOptions()
        settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        session = onnxruntime.InferenceSession(proto.SerializeToString(), settings, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, (np.asarray(y) for y in session.run(names, {"x": X})), strict=True))


def layers(bits: Bits) -> dict[str, QuantizedLayer]:
    return {name: QuantizedLayer(kind="matrix", bits=bits, block_size=16) for name in "ab"}


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_the_graph_computes_what_the_numbers_stand_for(bits: Bits):
    graph = Graph()
    quantize = QuantizeWeights(layers(bits))
    quantize(graph.model)
    assert quantize.stored == {name: (f"{name}.{bits}", f"{name}.scale") for name in "ab"}
    assert set(graph.model.graph.initializers) == {f"{name}.{part}" for name in "ab" for part in (bits, "scale")}
    x = rounded_to_bytes(torch.from_numpy(X)).numpy() if bits == "int8" else X
    found = graph.run()
    for seed, name in enumerate("ab"):
        rounded = layers(bits)[name].round(weight(seed)).restored()
        np.testing.assert_allclose(found[f"y_{name}"], x @ rounded, atol=2e-5)
        # Far from it is the product that was not rounded.
        assert np.abs(found[f"y_{name}"] - X @ weight(seed)).max() > 1e-3


def test_an_input_of_several_layers_is_rounded_once():
    graph = Graph()
    QuantizeWeights(layers("int8"))(graph.model)
    operators = [node.op_type for node in graph.model.graph]
    assert operators.count("DynamicQuantizeLinear") == 1
    assert operators.count("MatMulInteger") == 2
    assert next(iter(graph.model.graph)).name == "/b/DynamicQuantizeLinear"


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_weight_is_read_once_when_it_is_written(bits: Bits):
    graph = Graph()
    quantize = QuantizeWeights(layers(bits))
    quantize(graph.model)
    assert not graph.reads
    for name in ("a", "b"):
        for stored in quantize.stored[name]:
            tensor = graph.model.graph.initializers[stored].const_value
            assert tensor is not None
            assert len(tensor.tobytes()) == tensor.nbytes
    assert graph.reads == ["a", "b"]


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("order", [1, -1], ids=["values first", "scale first"])
def test_a_weight_is_read_once_however_many_write(workers: int, order: int, tmp_path: Path):
    graph = Graph()
    quantize = QuantizeWeights(layers("int8"))
    quantize(graph.model)
    names = [stored for name in ("a", "b") for stored in quantize.stored[name][::order]]
    tensors = [graph.model.graph.initializers[name].const_value for name in names]
    ir.external_data.convert_tensors_to_external(
        [tensor for tensor in tensors if tensor is not None], tmp_path, "data", max_workers=workers
    )
    assert sorted(graph.reads) == ["a", "b"]
    alone = Graph()
    again = QuantizeWeights(layers("int8"))
    again(alone.model)
    expected = [alone.model.graph.initializers[name].const_value for name in names]
    assert (tmp_path / "data").read_bytes() == b"".join(tensor.tobytes() for tensor in expected if tensor is not None)


def test_a_layer_that_is_not_named_stays_as_it_is():
    graph = Graph()
    QuantizeWeights({"a": layers("int8")["a"]})(graph.model)
    np.testing.assert_allclose(graph.run()["y_b"], X @ weight(1), atol=1e-5)


def test_a_table_is_looked_up_in_whole_numbers():
    table = weight(3)
    values = ir.Value(name="t", shape=ir.Shape([K, N]), type=FLOAT, const_value=ir.tensor(table, name="t"))
    ids = ir.Value(name="x", shape=ir.Shape(["B"]), type=ir.TensorType(ir.DataType.INT64))
    found = ir.Value(name="y", shape=ir.Shape(["B", N]), type=FLOAT)
    node = ir.node("Gather", [values, ids], name="/Gather", outputs=[found])
    graph = ir.Graph([ids], [found], nodes=[node], initializers=[values], opset_imports={"": 24}, name="g")
    model = ir.Model(graph, ir_version=11)
    layer = QuantizedLayer(kind="table", bits="int8", block_size=16)
    QuantizeWeights({"t": layer})(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    index = np.array([0, K - 1, 7, 7])
    np.testing.assert_array_equal(session.run(None, {"x": index})[0], layer.round(table).restored()[index])


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_weight_of_two_products_is_stored_once(bits: str):
    graph = Graph(is_twice=True)
    QuantizeWeights(layers(bits))(graph.model)
    products = "MatMulInteger" if bits == "int8" else "DequantizeLinear"
    nodes = [node for node in graph.model.graph if node.op_type == products]
    assert len({node.inputs[1 if bits == "int8" else 0] for node in nodes}) < len(nodes)
    onnx.checker.check_model(ir.to_proto(graph.model), full_check=True)


def test_a_weight_that_is_also_read_by_something_else_is_refused():
    graph = Graph()
    weight = graph.model.graph.initializers["a"]
    graph.model.graph.append(ir.node("Neg", [weight]))
    with pytest.raises(ExportError, match=r"weight a is used by \['MatMul', 'Neg'\], expected MatMul alone; .*keep"):
        QuantizeWeights(layers("int8"))(graph.model)
