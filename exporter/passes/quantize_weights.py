"""Weights -> whole numbers of 8 or 4 bits, in standard operators that engines fuse.

```
int8 matrix  DynamicQuantizeLinear(x) -> MatMulInteger(values) -> Cast -> Mul(scale of x * scale of each channel)
int4 matrix  MatMul(x, DequantizeLinear(values, scale of each block))
int8 table   Gather(values, ids) -> Cast -> Mul(Gather(scale, ids))
```
Values stay lazy: a weight is read and rounded when it is written, so that a model never has to fit into memory.

K inputs, N outputs, G blocks
"""

from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir import tape
from onnx_ir.passes import InPlacePass, PassResult

from tokexport.errors import ExportError
from tokexport.exporter.quantization import QuantizedLayer, RoundedWeight

_OPERATORS = {"matrix": "MatMul", "table": "Gather"}


class QuantizeWeights(InPlacePass):
    """Round the weights of layers.

    Afterwards ``stored`` maps the name of every rounded weight to the names that took its place.

    Args:
        layers: by the name of the initializer, which is a matrix (K, N) or a table.

    Raises:
        ExportError: a weight is used by something else than products or look-ups.
    """

    def __init__(self, layers: Mapping[str, QuantizedLayer]) -> None:
        self._layers = layers
        self.stored: dict[str, tuple[str, ...]] = {}
        self._rounded_inputs: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}

    def call(self, model: ir.Model) -> PassResult:
        self.stored, self._rounded_inputs = {}, {}
        # A layer that is read twice, by a choice of tokens before it too, has two products.
        name_of = {user: name for name in self._layers for user in self._users(model.graph, name)}
        rounded = {name: self._rounded(model.graph, name) for name in self._layers}
        # In the graph's order: an input is rounded before the first that reads it.
        for node in list(model.graph):
            if node in name_of:
                name = name_of[node]
                self._replace(model.graph, node, *rounded[name], self._layers[name])
        for name in self._layers:
            model.graph.initializers.pop(name)
        return PassResult(model, modified=bool(self.stored))

    def _users(self, graph: ir.Graph, name: str) -> Sequence[ir.Node]:
        weight, operator = graph.initializers.get(name), _OPERATORS[self._layers[name].kind]
        users = [] if weight is None else weight.consumers()
        place = 1 if operator == "MatMul" else 0
        if not users or any(user.op_type != operator or user.inputs[place] is not weight for user in users):
            raise ExportError(
                f"the weight {name} is used by {[user.op_type for user in users]}, expected {operator} alone; it "
                "cannot be quantized: name its layer in [quantize] keep"
            )
        return users

    def _rounded(self, graph: ir.Graph, name: str) -> tuple[ir.Value, ir.Value]:
        """Add whole numbers and scale of a weight to the graph."""
        values, scale = _lazy(graph.initializers[name], self._layers[name])
        for value in (values, scale):
            graph.initializers.add(value)
        self.stored[name] = (values.name or "", scale.name or "")
        return values, scale

    def _replace(
        self, graph: ir.Graph, node: ir.Node, values: ir.Value, scale: ir.Value, layer: QuantizedLayer
    ) -> None:
        new = tape.Tape()
        name = (node.name or "").removesuffix(node.op_type)
        if layer.kind == "table":
            result = self._look_up(new, name, node, values, scale)
        elif layer.bits == "int8":
            result = self._multiply_int8(new, name, node, values, scale)
        else:
            attributes = {"axis": 0, "block_size": layer.block_size}
            restored = new.op("DequantizeLinear", [values, scale], attributes, name=f"{name}DequantizeLinear")
            result = new.op("MatMul", [node.inputs[0], restored], name=node.name)
        graph.insert_before(node, new.nodes)
        old = node.outputs[0]
        result.name, result.shape, result.type = old.name, old.shape, old.type
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        graph.remove(node, safe=True)

    def _look_up(self, new: tape.Tape, name: str, node: ir.Node, values: ir.Value, scale: ir.Value) -> ir.Value:
        ids = node.inputs[1]
        found = new.op("Gather", [values, ids], {"axis": 0}, name=node.name)
        scales = new.op("Gather", [scale, ids], {"axis": 0}, name=f"{name}Gather_scale")
        whole = new.op("Cast", [found], {"to": ir.DataType.FLOAT}, name=f"{name}Cast")
        return new.op("Mul", [whole, scales], name=f"{name}Mul")

    def _multiply_int8(self, new: tape.Tape, name: str, node: ir.Node, values: ir.Value, scale: ir.Value) -> ir.Value:
        x = node.inputs[0]
        assert x is not None
        if x not in self._rounded_inputs:  # of what several layers read, once
            rounded = new.op_multi_out("DynamicQuantizeLinear", [x], num_outputs=3, name=f"{name}DynamicQuantizeLinear")
            self._rounded_inputs[x] = (rounded[0], rounded[1], rounded[2])
        whole, x_scale, x_zero = self._rounded_inputs[x]
        product = new.op("MatMulInteger", [whole, values, x_zero], name=f"{name}MatMulInteger")
        product = new.op("Cast", [product], {"to": ir.DataType.FLOAT}, name=f"{name}Cast")
        scales = new.op("Mul", [x_scale, scale], name=f"{name}Mul_scale")
        return new.op("Mul", [product, scales], name=f"{name}Mul")


def _lazy(weight: ir.Value, layer: QuantizedLayer) -> tuple[ir.Value, ir.Value]:
    """Return values and scale of a weight as initializers; both are made at once, for whichever is read first."""
    tensor = weight.const_value
    assert tensor is not None
    rows, columns = tensor.shape.numpy()
    once = _Once(lambda: layer.round(np.asarray(tensor.numpy(), np.float32)))
    is_int4 = layer.kind == "matrix" and layer.bits == "int4"
    name = weight.name or ""

    def read_values() -> ir.TensorProtocol:
        values = once.take("values").values
        return ir.tensor(values.astype(ml_dtypes.int4) if is_int4 else values, name=f"{name}.{layer.bits}")

    def read_scale() -> ir.TensorProtocol:
        scale = once.take("scale").scale
        return ir.tensor(scale if layer.kind == "table" or is_int4 else scale[0], name=f"{name}.scale")

    if layer.kind == "table":
        scale_shape: tuple[int, ...] = (rows, 1)
    else:
        scale_shape = (-(-rows // layer.block_size), columns) if is_int4 else (columns,)
    kinds = ir.DataType.INT4 if is_int4 else ir.DataType.INT8
    values = ir.LazyTensor(read_values, dtype=kinds, shape=ir.Shape((rows, columns)), name=f"{name}.{layer.bits}")
    scale = ir.LazyTensor(read_scale, dtype=ir.DataType.FLOAT, shape=ir.Shape(scale_shape), name=f"{name}.scale")
    return _initializer(values), _initializer(scale)


class _Once:
    """Rounds a weight for whoever asks first for values or scale, perhaps at the same time, and forgets it when it has
    given both: the next weight needs the room."""

    def __init__(self, round_weight: Callable[[], RoundedWeight]) -> None:
        self._round, self._lock = round_weight, Lock()
        self._rounded: RoundedWeight | None = None
        self._taken: set[str] = set()

    def take(self, part: Literal["values", "scale"]) -> RoundedWeight:
        with self._lock:
            rounded = self._round() if self._rounded is None else self._rounded
            self._taken.add(part)
            is_over = len(self._taken) == 2
            self._rounded = None if is_over else rounded
            if is_over:
                self._taken.clear()
            return rounded


def _initializer(tensor: ir.LazyTensor) -> ir.Value:
    return ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
