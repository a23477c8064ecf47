"""``Transpose(weight)`` -> the weight stored the other way round.

``nn.Linear`` keeps (outputs, inputs) and multiplies by the transpose. Stored transposed, the weight
goes into ``MatMul`` as it is, and no engine has to hold it twice while it loads.
"""

from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult


@dataclass(init=False)
class FoldResult(PassResult):
    """``renamed`` maps the name of every folded weight to its new one."""

    renamed: dict[str, str] = field(default_factory=dict)

    def __init__(self, model: ir.Model, renamed: dict[str, str]) -> None:
        super().__init__(model, modified=bool(renamed))
        self.renamed = renamed


class FoldWeightTransposes(InPlacePass):
    """Fold every transpose whose input is a weight; the tensor stays lazy."""

    def call(self, model: ir.Model) -> FoldResult:
        renamed: dict[str, str] = {}
        for node in list(model.graph):
            weight = node.inputs[0] if node.op_type == "Transpose" else None
            if weight is None or not weight.is_initializer() or not isinstance(weight.const_value, ir.LazyTensor):
                continue
            if len(weight.uses()) > 1 or weight.is_graph_output():
                continue
            order = tuple(node.attributes["perm"].as_ints())
            folded = ir.Value(name=f"{weight.name}.transposed", const_value=_transposed(weight.const_value, order))
            folded.shape, folded.dtype = folded.const_value.shape, folded.const_value.dtype
            assert weight.name is not None and folded.name is not None
            renamed[weight.name] = folded.name
            model.graph.initializers.add(folded)
            node.outputs[0].replace_all_uses_with(folded)
            model.graph.remove(node, safe=True)
            model.graph.initializers.pop(weight.name)
        return FoldResult(model, renamed)


def _transposed(tensor: ir.LazyTensor, order: tuple[int, ...]) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().transpose(order).copy(), dtype=tensor.dtype, name=tensor.name)

    shape = ir.Shape([tensor.shape[axis] for axis in order])
    return ir.LazyTensor(read, dtype=tensor.dtype, shape=shape, name=f"{tensor.name}.transposed")
