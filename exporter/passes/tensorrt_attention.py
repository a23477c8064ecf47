"""Cached ``Attention`` in a form that TensorRT computes as the portable graph means it.

Its parser ignores the true length of a cache (input 6) without an error and takes ``is_causal`` to be aligned to the
upper left: a graph with a cache would build, run and answer wrongly. Its own operator takes a length, and kernels of
TensorRT 11 are known that then read the rest of the cache all the same. So what a token sees is written out:

```
mask[b, 0, i, j] = 0 where j <= start[b] + i, else so low that nothing is left of it
y = Attention(q, k, v, mask)
```
One mask serves all layers that see the same tokens, and the result is standard ONNX, which any runtime computes.
"""

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike
from onnx_ir import tape
from onnx_ir.passes import InPlacePass, PassResult

from tokexport.errors import ExportError

_CAUSAL = {"is_causal": 1, "softcap": 0.0, "qk_matmul_output_mode": 0}


class MaskCachedAttention(InPlacePass):
    """Give every cached attention its mask; afterwards ``names`` holds their names.

    The caches need sizes that are numbers, see ``FixSizes``.

    Raises:
        ExportError: a cached attention does not read a cache that was written at a start.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._masks: dict[ir.Value, ir.Value] = {}

    def call(self, model: ir.Model) -> PassResult:
        self.names, self._masks = [], {}
        for node in list(model.graph):
            if node.op_type == "Attention" and len(node.inputs) > 6 and node.inputs[6] is not None:
                self._mask(model.graph, node)
                self.names.append(node.name or "")
        return PassResult(model, modified=bool(self.names))

    def _mask(self, graph: ir.Graph, attention: ir.Node) -> None:
        others = {name: item.value for name, item in attention.attributes.items() if _CAUSAL.get(name) != item.value}
        query, keys, values, mask = attention.inputs[:4]
        if others or "is_causal" not in attention.attributes or mask is not None:
            raise ExportError(
                f"{attention.name} has {others or 'a mask of its own, or sees all'}, expected causal attention over a "
                "cache; it cannot be written for TensorRT"
            )
        write = keys.producer() if keys is not None else None
        if query is None or keys is None or write is None or write.op_type != "TensorScatter":
            raise ExportError(
                f"{attention.name} reads no cache that TensorScatter writes; it cannot be written for TensorRT"
            )
        start, new = write.inputs[2], tape.Tape()
        assert start is not None
        if start not in self._masks:
            self._masks[start] = _mask(new, query, keys, start)
        attended = new.op("Attention", [query, keys, values, self._masks[start]], {"is_causal": 0}, name=attention.name)
        graph.insert_before(attention, new.nodes)
        old = attention.outputs[0]
        attended.name, attended.shape, attended.type = old.name, old.shape, old.type
        old.replace_all_uses_with(attended)
        graph.remove(attention, safe=True)


def _mask(new: tape.Tape, query: ir.Value, keys: ir.Value, start: ir.Value) -> ir.Value:
    """Return what is added to the scores, (B, 1, T, C), of T tokens that begin at ``start`` (B,) of C places."""
    capacity = keys.shape[2] if keys.shape is not None else None
    if not isinstance(capacity, int) or query.dtype is None:
        raise ExportError(
            f"{keys.name} has {capacity} places, expected a number; TensorRT needs caches of a fixed size"
        )
    place_C = _constant(new, np.arange(capacity))
    num_new = new.op("Shape", [query], {"start": 2, "end": 3})
    row_T = new.op("Slice", [place_C, _constant(new, [0]), num_new, _constant(new, [0])])
    first_B11 = new.op("Unsqueeze", [start, _constant(new, [1, 2])])
    last_BT1 = new.op("Add", [first_B11, new.op("Unsqueeze", [row_T, _constant(new, [1])])])
    is_seen_BTC = new.op("LessOrEqual", [place_C, last_BT1])
    dtype = query.dtype.numpy()
    # Infinity would make NaN of a part of the cache in which nothing is seen, where kernels work by parts.
    nothing = np.array(0, dtype), np.array(float(ml_dtypes.finfo(dtype).min) / 2, dtype)
    mask_BTC = new.op("Where", [is_seen_BTC, *(_constant(new, value) for value in nothing)])
    mask = new.op("Unsqueeze", [mask_BTC, _constant(new, [1])])
    mask.name = f"{start.name}.mask"
    return mask


def _constant(new: tape.Tape, value: ArrayLike) -> ir.Value:
    array = np.asarray(value)
    return new.op("Constant", [], {"value": ir.tensor(array.astype(np.int64) if array.dtype.kind == "i" else array)})
