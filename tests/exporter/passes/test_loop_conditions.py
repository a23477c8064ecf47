"""Loops of a number of steps get a condition that holds, others keep theirs."""

import onnx_ir as ir
import pytest

from tokexport.exporter.passes.loop_conditions import LoopConditions


@pytest.mark.parametrize(("condition", "count", "found"), [("", 1, "loops_go_on"), ("go", 0, "go")])
def test_only_a_loop_without_a_condition_gets_one(condition: str, count: int, found: str):
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["": 24]>
        g (float[2] x, int64 n, bool go) => (float[2] y) {{
            y = Loop (n, "{condition}", x) <body = b (int64 i, bool on, float[2] c) => (bool goes_on, float[2] d) {{
                goes_on = Identity (on)
                d = Neg (c)
            }}>
        }}""")
    fill = LoopConditions()
    assert fill(model).modified == bool(count)
    (loop,) = model.graph
    given = loop.inputs[1]
    assert given is not None
    assert (fill.count, given.name) == (count, found)
    assert (given.const_value is None) == (not count)
    assert [value is not None for value in loop.inputs] == [True, True, True]
