"""``Transpose(weight)`` -> the weight stored the other way round.

``nn.Linear`` keeps (outputs, inputs) and multiplies by the transpose. Stored transposed, the weight
goes into ``MatMul`` as it is, and no engine has to hold it twice while it loads.
"""

import onnx_ir as ir
import torch
from onnx_ir.passes import InPlacePass, PassResult


class FoldWeightTransposes(InPlacePass):
    """Fold every transpose whose input is a weight; the tensor stays lazy.

    Afterwards ``renamed`` maps the name of every folded weight to its new one.
    """

    def __init__(self) -> None:
        self.renamed: dict[str, str] = {}

    def call(self, model: ir.Model) -> PassResult:
        self.renamed = {}
        for node in list(model.graph):
            weight = node.inputs[0] if node.op_type == "Transpose" else None
            if weight is None or weight.name is None or not isinstance(weight.const_value, ir.LazyTensor):
                continue
            if len(weight.uses()) > 1:
                continue
            reverse = range(len(weight.const_value.shape) - 1, -1, -1)
            order = node.attributes["perm"].as_ints() if "perm" in node.attributes else reverse
            tensor = _transposed(weight.const_value, tuple(order))
            name = f"{weight.name}.transposed"
            folded = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.renamed[weight.name] = name
            model.graph.initializers.add(folded)
            node.outputs[0].replace_all_uses_with(folded)
            model.graph.remove(node, safe=True)
            model.graph.initializers.pop(weight.name)
        return PassResult(model, modified=bool(self.renamed))


def _transposed(tensor: ir.LazyTensor, order: tuple[int, ...]) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        array = tensor.numpy()
        # Three times as fast as numpy; torch does not know numpy's bfloat16, but whole numbers of its size.
        whole = torch.from_numpy(array.view(f"i{array.itemsize}")).permute(order).contiguous()
        return ir.tensor(whole.numpy().view(array.dtype), dtype=tensor.dtype, name=tensor.name)

    shape = ir.Shape([tensor.shape[axis] for axis in order])
    return ir.LazyTensor(read, dtype=tensor.dtype, shape=shape, name=f"{tensor.name}.transposed")
