"""Sizes that are read once, where they come into the graph.

```
Shape<start=0, end=1>(x: batch, 577, 160)  ->  Shape<start=0, end=1>(pixel_values: batch, 3, 336, 336)
```
A layer that is traced apart reads the sizes of what it is given, which in the whole graph are those of the inputs.
"""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult


class ShareSizes(InPlacePass):
    """Read a named dimension from the graph's input that has it, or else where it was read first."""

    def call(self, model: ir.Model) -> PassResult:
        places: dict[str, tuple[ir.Value, int]] = {}
        for value in model.graph.inputs:
            for axis, size in enumerate(value.shape or ()):
                if isinstance(size, ir.SymbolicDim) and size.value is not None:
                    places.setdefault(size.value, (value, axis))
        modified = False
        for node in model.graph:
            axis, value = _single_axis(node), node.inputs[0] if node.inputs else None
            if axis is None or value is None or value.shape is None:
                continue
            size = value.shape[axis]
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                shared, shared_axis = places.setdefault(size.value, (value, axis))
                if shared is not value:
                    node.replace_input_with(0, shared)
                    node.attributes.add(ir.AttrInt64("start", shared_axis))
                    node.attributes.add(ir.AttrInt64("end", shared_axis + 1))
                    modified = True
        return PassResult(model, modified=modified)


def _single_axis(node: ir.Node) -> int | None:
    """Return the axis whose size a node reads, if it is one alone."""
    if node.op_type != "Shape" or node.domain != "" or not {"start", "end"} <= node.attributes.keys():
        return None
    start, end = node.attributes["start"].as_int(), node.attributes["end"].as_int()
    return start if start >= 0 and end == start + 1 else None
