"""Loops that say that they go on, for engines that do not know a loop of a number of steps alone.

```
Loop(steps, "", states)  ->  Loop(steps, True, states)
```
Without one TensorRT's parser does not register the condition that comes into the body, and refuses the node that hands
it on.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult


class LoopConditions(InPlacePass):
    """Give every loop without a condition one that holds; afterwards ``count`` says how many."""

    def __init__(self) -> None:
        self.count = 0

    def call(self, model: ir.Model) -> PassResult:
        loops = [node for node in model.graph if node.op_type == "Loop" and node.inputs[1] is None]
        self.count = len(loops)
        if loops:
            goes_on = ir.Value(
                name="loops_go_on",
                shape=ir.Shape([]),
                type=ir.TensorType(ir.DataType.BOOL),
                const_value=ir.tensor(np.array(True), name="loops_go_on"),
            )
            model.graph.register_initializer(goes_on)
            for loop in loops:
                loop.replace_input_with(1, goes_on)
        return PassResult(model, modified=self.count > 0)
