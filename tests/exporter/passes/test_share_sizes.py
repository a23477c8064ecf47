"""A named size is read from the input that has it, and numbers and whole shapes are left alone."""

import onnx_ir as ir
import pytest

from tokexport.exporter.passes.share_sizes import ShareSizes


@pytest.mark.parametrize(
    ("axes", "shape", "found"),
    [
        ("start=1, end=2", ["2", "length", "4"], ("x", 0, 1)),
        ("start=0, end=1", ["2", "length", "4"], ("y", 0, 1)),
        ("start=1, end=2", ["2", "other", "4"], ("y", 1, 2)),
        ("start=0, end=2", ["2", "length", "4"], ("y", 0, 2)),
    ],
)
def test_a_named_size_is_read_from_an_input(axes: str, shape: list[str], found: tuple[str, int, int]):
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["": 24]>
        g (float[length] x, float[2] y) => (int64[n] size) {{
            size = Shape <{axes}> (y)
        }}""")
    y = model.graph.inputs[1]
    y.shape = ir.Shape([int(dim) if dim.isdigit() else dim for dim in shape])
    changed = ShareSizes()(model).modified
    (node,) = model.graph
    assert node.inputs[0] is not None
    assert (node.inputs[0].name, node.attributes["start"].as_int(), node.attributes["end"].as_int()) == found
    assert changed == (found[0] == "x")


def test_a_size_that_no_input_has_is_read_where_it_was_read_first():
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["": 24]>
        g (float[n] x) => (int64[1] one, int64[1] two) {
            first = NonZero (x)
            second = Neg (first)
            one = Shape <start=1, end=2> (first)
            two = Shape <start=1, end=2> (second)
        }""")
    values = {node.op_type: node.outputs[0] for node in model.graph}
    for name in ("NonZero", "Neg"):
        values[name].shape = ir.Shape([1, "found"])
    assert ShareSizes()(model).modified
    assert [node.inputs[0] for node in model.graph if node.op_type == "Shape"] == [values["NonZero"]] * 2
