"""``Transpose(weight)`` becomes the weight stored the other way round, and nothing else does."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from tokexport.exporter.passes.fold_weight_transposes import FoldWeightTransposes

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)
X = np.array([[1, 10, 100], [2, 20, 200]], np.float32)


class Graph:
    """x @ transpose(weight), in variations; ``num_read`` counts how often the weight was read."""

    def __init__(self, *, is_lazy: bool = True, num_uses: int = 1, order: tuple[int, ...] = (1, 0)) -> None:
        self.num_read = 0
        shape = ir.Shape([2, 3])

        def read() -> ir.TensorProtocol:
            self.num_read += 1
            return ir.tensor(WEIGHT, name="w")

        lazy = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=shape, name="w")
        weight = ir.Value(
            name="w",
            shape=shape,
            type=ir.TensorType(ir.DataType.FLOAT),
            const_value=lazy if is_lazy else ir.tensor(WEIGHT, name="w"),
        )
        x = ir.Value(name="x", shape=ir.Shape([2, 3]), type=ir.TensorType(ir.DataType.FLOAT))
        transpose = ir.node("Transpose", [weight], {"perm": list(order)})
        product = ir.node("MatMul", [x if order == (1, 0) else transposed(x), transpose.outputs[0]])
        nodes = [transpose, product]
        if order != (1, 0):
            nodes.insert(0, product.inputs[0].producer())  # pyright: ignore
        outputs = [product.outputs[0]]
        for _ in range(num_uses - 1):
            nodes.append(ir.node("Neg", [weight]))
            outputs.append(nodes[-1].outputs[0])
        for output in outputs:
            output.type = ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph([x], outputs, nodes=nodes, initializers=[weight], opset_imports={"": 24}, name="g")
        self.model = ir.Model(graph, ir_version=10)

    def run(self) -> NDArray[np.float32]:
        return np.asarray(ReferenceEvaluator(ir.to_proto(self.model)).run(None, {"x": X})[0])

    @property
    def op_types(self) -> list[str]:
        return [node.op_type for node in self.model.graph]


def transposed(x: ir.Value) -> ir.Value:
    return ir.node("Transpose", [x], {"perm": [1, 0]}).outputs[0]


def test_a_transposed_weight_is_stored_transposed():
    graph = Graph()
    fold = FoldWeightTransposes()
    assert fold(graph.model).modified
    assert graph.op_types == ["MatMul"]
    assert fold.renamed == {"w": "w.transposed"}
    (stored,) = graph.model.graph.initializers.values()
    assert stored.const_value is not None
    assert np.array_equal(stored.const_value.numpy(), WEIGHT.T)
    assert list(stored.const_value.shape) == [3, 2]


def test_the_result_does_not_change():
    graph = Graph()
    before = graph.run()
    FoldWeightTransposes()(graph.model)
    # 0 x 1 + 1 x 10 + 2 x 100 = 210, 3 x 1 + 4 x 10 + 5 x 100 = 543; the second row of x is twice the first.
    assert np.array_equal(before, [[210, 543], [420, 1086]])
    assert np.array_equal(graph.run(), before)


def test_a_permutation_that_changes_nothing_is_folded_as_well():
    graph = Graph(order=(0, 1))
    before = graph.run()
    FoldWeightTransposes()(graph.model)
    assert graph.op_types == ["Transpose", "MatMul"]  # that of x stays
    assert np.array_equal(graph.run(), before)


def test_no_weight_is_read_while_folding():
    graph = Graph()
    FoldWeightTransposes()(graph.model)
    assert graph.num_read == 0


@pytest.mark.parametrize(
    "make",
    [lambda: Graph(is_lazy=False), lambda: Graph(num_uses=2)],
    ids=["constant that is no weight", "weight with another use"],
)
def test_what_does_not_match_is_left_alone(make: Callable[[], Graph]):
    graph = make()
    before = graph.op_types
    fold = FoldWeightTransposes()
    assert not fold(graph.model).modified
    assert graph.op_types == before
    assert fold.renamed == {}


def test_folding_twice_folds_once():
    graph = Graph()
    FoldWeightTransposes()(graph.model)
    assert not FoldWeightTransposes()(graph.model).modified


def test_a_transpose_without_an_order_reverses_the_axes():
    graph = Graph()
    graph.model.graph[0].attributes.pop("perm")
    FoldWeightTransposes()(graph.model)
    assert np.array_equal(graph.run(), [[210, 543], [420, 1086]])
