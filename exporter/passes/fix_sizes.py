"""Numbers in place of the names of a graph's dimensions, for engines that need to know them."""

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult


class FixSizes(InPlacePass):
    """Put numbers in place of symbolic dimensions; afterwards ``count`` says in how many values.

    Args:
        sizes: by the name of the dimension.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)
        self.count = 0

    def call(self, model: ir.Model) -> PassResult:
        self.count = 0
        values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
        for value in values:
            if value.shape is None:
                continue
            fixed = ir.Shape([self._size(dim) for dim in value.shape])
            self.count += fixed != value.shape
            value.shape = fixed
        return PassResult(model, modified=self.count > 0)

    def _size(self, dim: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        return self.sizes.get(dim.value or "", dim) if isinstance(dim, ir.SymbolicDim) else dim
