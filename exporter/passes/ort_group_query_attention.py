"""``TensorScatter`` x 2 + ``Attention`` -> ONNX Runtime's ``GroupQueryAttention``.

```
x_q -Reshape-Transpose-RotaryEmbedding-------------------------.
x_k -Reshape-Transpose-RotaryEmbedding-TensorScatter(past_k)----Attention-Transpose-Reshape-> y
x_v -Reshape-Transpose-----------------TensorScatter(past_v)---'

x_q -RotaryEmbedding-.
x_k -RotaryEmbedding--GroupQueryAttention(past_k, past_v)-> y, present_k, present_v
x_v -----------------'
```
ONNX Runtime's ``Attention`` computes over the whole capacity of the cache, this operator over what
is in it; and it writes into the cache in place when past and present are one buffer.
"""

from typing import cast

import numpy as np
import onnx_ir as ir
from onnx_ir import tape
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from tokexport.errors import ExportError

DOMAIN = "com.microsoft"
# What the attributes have to be, whether written out or left to their default.
_PLAIN_ATTENTION = {"is_causal": 1, "softcap": 0, "qk_matmul_output_mode": 0}
_PLAIN_ROTATION = {"interleaved": 0, "num_heads": 0, "rotary_embedding_dim": 0}


class FuseGroupQueryAttention(InPlacePass):
    """Fuse every cached attention; afterwards ``count`` says how many there were.

    Raises:
        ExportError: a cached attention is not of the form above.
    """

    def __init__(self) -> None:
        self.count = 0
        self._lengths: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def call(self, model: ir.Model) -> PassResult:
        self.count, self._lengths = 0, {}
        for node in list(model.graph):
            if node.op_type == "Attention" and len(node.inputs) > 6 and node.inputs[6] is not None:
                self._fuse(model.graph, node)
                self.count += 1
        if self.count:
            model.graph.opset_imports[DOMAIN] = 1
            RemoveUnusedNodesPass()(model)  # the splits into heads that nothing reads any more
        return PassResult(model, modified=self.count > 0)

    def _fuse(self, graph: ir.Graph, attention: ir.Node) -> None:
        _require_plain(attention, _PLAIN_ATTENTION, used_inputs=(0, 1, 2, 6))
        query, keys, values, length = (attention.inputs[index] for index in (0, 1, 2, 6))
        key_write, value_write = _producer(keys, "TensorScatter"), _producer(values, "TensorScatter")
        merge_transpose = _only_user(attention.outputs[0], "Transpose")
        merge_reshape = _only_user(merge_transpose.outputs[0], "Reshape")
        num_heads, num_kv_heads = _num_heads(query), _num_heads(keys)
        new = tape.Tape()
        rotated_query = _rotated(new, query, num_heads)
        rotated_key = _rotated(new, key_write.inputs[1], num_kv_heads)
        last, total = self._lengths_of(new, length)
        outputs = new.op_multi_out(
            "GroupQueryAttention",
            inputs=[
                rotated_query,
                rotated_key,
                _unsplit(value_write.inputs[1]),
                key_write.inputs[0],
                value_write.inputs[0],
                last,
                total,
            ],
            attributes={"num_heads": num_heads, "kv_num_heads": num_kv_heads},
            domain=DOMAIN,
            num_outputs=3,
            name=attention.name.removesuffix("Attention") + "GroupQueryAttention" if attention.name else None,
        )
        graph.insert_before(attention, new.nodes)
        old = (merge_reshape.outputs[0], key_write.outputs[0], value_write.outputs[0])
        for before, after in zip(old, outputs, strict=True):
            after.name, after.shape, after.type = before.name, before.shape, before.type
        ir.convenience.replace_all_uses_with(old, outputs, replace_graph_outputs=True)
        graph.remove([merge_reshape, merge_transpose, attention, key_write, value_write], safe=True)

    def _lengths_of(self, new: tape.Tape, length: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """Return, from the true lengths (B,), the index of the last token (B,) and the longest length, both int32."""
        assert length is not None
        if length not in self._lengths:
            short = new.op("Cast", [length], {"to": ir.DataType.INT32})
            one = new.op("Constant", [], {"value": ir.tensor(np.array(1, np.int32))})
            last = new.op("Sub", [short, one])
            total = new.op("ReduceMax", [short], {"keepdims": 0})
            last.name, total.name = f"{length.name}.last", f"{length.name}.total"
            self._lengths[length] = (last, total)
        return self._lengths[length]


def _rotated(new: tape.Tape, split: ir.Value | None, num_heads: int) -> ir.Value:
    """Return the rotation of heads that stay side by side."""
    rotary = _producer(split, "RotaryEmbedding")
    _require_plain(rotary, _PLAIN_ROTATION, used_inputs=(0, 1, 2, 3))
    inputs = [_unsplit(rotary.inputs[0]), *rotary.inputs[1:]]
    return new.op("RotaryEmbedding", inputs, {"num_heads": num_heads}, name=rotary.name)


def _require_plain(node: ir.Node, plain: dict[str, int], used_inputs: tuple[int, ...]) -> None:
    """Refuse a node that says more than the fused operator will."""
    others = {name: item.value for name, item in node.attributes.items() if plain.get(name) != item.value}
    missing = [name for name, value in plain.items() if value and name not in node.attributes]
    extra = [index for index, value in enumerate(node.inputs) if value is not None and index not in used_inputs]
    if others or missing or extra:
        raise ExportError(
            f"{node.name} cannot be fused: its attributes {others or missing} and inputs {extra} ask for something "
            "else than causal attention with whole-head rotation"
        )


def _unsplit(value: ir.Value | None) -> ir.Value:
    """Return what ``Reshape`` and ``Transpose`` split into heads."""
    reshape = _producer(_producer(value, "Transpose").inputs[0], "Reshape")
    return cast(ir.Value, reshape.inputs[0])


def _num_heads(value: ir.Value | None) -> int:
    assert value is not None
    assert value.shape is not None
    return cast(int, value.shape[1])


def _producer(value: ir.Value | None, op_type: str) -> ir.Node:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != op_type:
        found = node.op_type if node is not None else "no node"
        raise ExportError(
            f"{value.name if value else 'an input'} comes from {found}, expected {op_type}; the attention "
            "cannot be fused"
        )
    return node


def _only_user(value: ir.Value, op_type: str) -> ir.Node:
    users = value.consumers()
    if len(users) != 1 or users[0].op_type != op_type:
        raise ExportError(
            f"{value.name} is used by {[user.op_type for user in users]}, expected one {op_type}; the "
            "attention cannot be fused"
        )
    return users[0]
