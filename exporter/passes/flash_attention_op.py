"""Cached ``Attention`` -> one operator of our own, for engines in which a plugin computes it.

```
y = tokexport.FlashAttention(query, key cache, value cache, length)
```
The graph carries the operator's meaning as a function of standard operators: shapes are inferred through it, and a
runtime without the plugin computes that instead.
"""

import onnx_ir as ir
from onnx_ir import tape
from onnx_ir.passes import InPlacePass, PassResult

from tokexport.errors import ExportError

DOMAIN, OPERATOR = "tokexport", "FlashAttention"


class UseFlashAttention(InPlacePass):
    """Put our operator in place of every cached attention; afterwards ``count`` says how many there were.

    Args:
        is_plugin: write it as TensorRT's parser looks for a plugin, by attributes, and without its meaning, which the
            parser would take instead.

    Raises:
        ExportError: a cached attention is not causal, or has a mask.
    """

    def __init__(self, *, is_plugin: bool = False) -> None:
        self.count = 0
        self._is_plugin = is_plugin

    def call(self, model: ir.Model) -> PassResult:
        self.count = 0
        for node in list(model.graph):
            if node.op_type == "Attention" and len(node.inputs) > 6 and node.inputs[6] is not None:
                self._replace(model.graph, node)
                self.count += 1
        if self.count:
            if not self._is_plugin:
                meaning = _meaning(model.graph.opset_imports[""])
                model.functions[meaning.identifier()] = meaning
            model.graph.opset_imports[DOMAIN] = 1
        return PassResult(model, modified=self.count > 0)

    def _replace(self, graph: ir.Graph, attention: ir.Node) -> None:
        causal = attention.attributes.get("is_causal")
        extra = [index for index in (3, 4, 5) if attention.inputs[index] is not None]
        if causal is None or causal.as_int() != 1 or extra:
            raise ExportError(
                f"{attention.name} has the inputs {extra} or is not causal, expected causal attention over a cache; "
                f"{OPERATOR} does not compute it"
            )
        new = tape.Tape()
        inputs = [attention.inputs[index] for index in (0, 1, 2, 6)]
        found_by = {"plugin_namespace": DOMAIN, "plugin_version": "1", "aot": 1} if self._is_plugin else {}
        attended = new.op(OPERATOR, inputs, found_by, domain=DOMAIN, name=attention.name)
        graph.insert_before(attention, new.nodes)
        old = attention.outputs[0]
        attended.name, attended.shape, attended.type = old.name, old.shape, old.type
        old.replace_all_uses_with(attended)
        graph.remove(attention, safe=True)


def _meaning(opset: int) -> ir.Function:
    """Return the operator in terms of standard ones."""
    inputs = [ir.Value(name=name) for name in ("query", "key", "value", "length")]
    body = tape.Tape()
    query, key, value, length = inputs
    attended = body.op("Attention", [query, key, value, None, None, None, length], {"is_causal": 1})
    attended.name = "attended"
    graph = ir.Graph(inputs, [attended], nodes=body.nodes, opset_imports={"": opset}, name=OPERATOR)
    return ir.Function(DOMAIN, OPERATOR, graph=graph, attributes=[])
