"""Layers that a model repeats are traced once.

A tower or a decoder is dozens of equal layers, and to trace each of them would take most of the time of an export. So
each leaves one node in the graph that says which it is; one of them is traced apart; and a copy of its nodes, with the
weights of its own, takes the place of every such node.
"""

import contextlib
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.convenience import replace_all_uses_with
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils import _pytree as pytree

_DOMAIN = "tokexport.repeated_layer"
SCOPES = "pkg.torch.onnx.name_scopes"
"""The metadata by which the exporter of PyTorch tells the modules that a node comes from."""

Trace = Callable[[nn.Module, tuple[Any, ...], tuple[Any, ...]], ir.Model]
"""Makes a graph of a module, its example arguments and their dynamic dimensions."""


@dataclass(frozen=True)
class _Call:
    """What one layer was called with.

    Attributes:
        name: of the layer in the whole module.
        leaves: what is in its arguments, tensors and whatever else.
        tree: how the arguments are made of the leaves.
        kind: the same for calls whose graphs differ in the names of weights and dimensions alone.
    """

    name: str
    layer: nn.Module
    leaves: tuple[Any, ...]
    tree: pytree.TreeSpec
    kind: object

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]


class RepeatedLayers:
    """The layers of a module's lists that have an equal in their list.

    A layer is traced apart where each of its outputs has the shape and dtype of one of the tensors that it takes, as it
    is with whatever can be repeated, and where it takes nothing but tensors and plain values and writes into none. Any
    other is traced where it stands. What a layer decides in Python by a size, it decides as in its first call.
    """

    def __init__(self, module: nn.Module) -> None:
        self._layers = {name: (module.get_submodule(name), likeness) for name, likeness in _with_equals(module)}
        self._calls: list[_Call] = []
        self._outputs: dict[object, tuple[Sequence[int | None], pytree.TreeSpec]] = {}

    @contextlib.contextmanager
    def set_apart(self) -> Generator[None]:
        """Let each layer leave one node in a trace that is made meanwhile."""
        try:
            for name, (layer, likeness) in self._layers.items():
                layer.forward = self._stand_in(name, layer, likeness)
            yield
        finally:
            for layer, _ in self._layers.values():
                layer.__dict__.pop("forward", None)

    def put_back(self, model: ir.Model, trace: Trace) -> None:
        """Replace the nodes that layers left in ``model`` by what they stand for."""
        bodies: dict[object, ir.Graph] = {}
        for node in [node for node in model.graph if node.domain == _DOMAIN]:
            number = node.attributes["call"].as_int()
            call = self._calls[number]
            if call.kind not in bodies:
                bodies[call.kind] = _traced_apart(call, trace)
            is_first = call.name not in {earlier.name for earlier in self._calls[:number]}
            prefix = call.name if is_first else f"{call.name}_{number}"
            _put(model.graph, node, bodies[call.kind].clone(), call.name, prefix)
        model.opset_imports.pop(_DOMAIN, None)

    def _stand_in(self, name: str, layer: nn.Module, likeness: object) -> Callable[..., Any]:
        forward = layer.forward

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            leaves, tree = pytree.tree_flatten((args, kwargs))
            kind = _kind(leaves)
            if kind is None:
                return forward(*args, **kwargs)
            call = _Call(name, layer, tuple(leaves), tree, (likeness, tree, kind))
            if call.kind not in self._outputs:
                self._outputs[call.kind] = _probed(call, forward)
            sources, output_tree = self._outputs[call.kind]
            like = [call.tensors[source] for source in sources if source is not None]
            if len(like) < len(sources):
                return forward(*args, **kwargs)
            self._calls.append(call)
            results = torch.onnx.ops.symbolic_multi_out(
                f"{_DOMAIN}::{type(layer).__name__}",
                call.tensors,
                {"call": len(self._calls) - 1},
                dtypes=[tensor.dtype for tensor in like],
                shapes=[tensor.shape for tensor in like],
                version=1,
            )
            return pytree.tree_unflatten(results, output_tree)

        return stand_in


def _probed(call: _Call, forward: Callable[..., Any]) -> tuple[Sequence[int | None], pytree.TreeSpec]:
    """Return for each output which tensor that the layer takes looks like it, None where it cannot be traced apart."""
    args, kwargs = pytree.tree_unflatten(list(call.leaves), call.tree)
    found_inside = _sizes_of_data(call)
    num_before, versions = len(found_inside), _versions(call)
    with disable_proxy_modes_tracing():
        outputs, tree = pytree.tree_flatten(forward(*args, **kwargs))
    if len(found_inside) > num_before or _versions(call) != versions:
        del found_inside[num_before:]
        return [None], tree
    return [_source(output, call.tensors) for output in outputs], tree


def _sizes_of_data(call: _Call) -> list[Any]:
    """Return the list of sizes that depend on data, to which a layer adds those that it makes."""
    mode = detect_fake_mode(call.tensors)
    return [] if mode is None or mode.shape_env is None else mode.shape_env.pending_fresh_unbacked_symbols


def _versions(call: _Call) -> list[int]:
    """Return how often each tensor was written into."""
    return [tensor._version for tensor in call.tensors]  # pyright: ignore[reportPrivateUsage]


class _Flat(nn.Module):
    """A layer that takes and returns tensors side by side."""

    def __init__(self, call: _Call) -> None:
        super().__init__()
        self.layer = call.layer
        self._call = call

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._call.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._call.tree)
        return tuple(pytree.tree_leaves(self.layer(*args, **kwargs)))


def _traced_apart(call: _Call, trace: Trace) -> ir.Graph:
    """Return the graph of one layer; its inputs are the tensors of the call."""
    examples = tuple(
        torch.zeros([size if isinstance(size, int) else size.node.hint for size in _sizes(tensor)], dtype=tensor.dtype)
        for tensor in call.tensors
    )
    dynamic = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(_sizes(tensor)) if not isinstance(size, int)}
        for tensor in call.tensors
    )
    return trace(_Flat(call), examples, (dynamic,)).graph


def _put(graph: ir.Graph, node: ir.Node, body: ir.Graph, name: str, prefix: str) -> None:
    """Replace ``node`` by the nodes of ``body``, whose weights become those of the layer ``name``.

    ``prefix`` makes names of nodes and values unique.
    """
    given = [value for value in node.inputs if value is not None]
    symbols: dict[str, str] = {}
    for formal, value in zip(body.inputs, given, strict=True):
        assert formal.shape is not None
        assert value.shape is not None
        symbols |= {
            str(found.value): str(size.value)
            for found, size in zip(formal.shape, value.shape, strict=True)
            if isinstance(found, ir.SymbolicDim) and isinstance(size, ir.SymbolicDim)
        }
    outer = dict(zip(body.inputs, given, strict=True))
    outputs = [outer.get(value, value) for value in body.outputs]
    body.outputs.clear()
    for weight, value in body.initializers.items():
        # A constant of the trace may be another one in another call of the layer.
        own = f"{name}.{weight.removeprefix('layer.')}" if value.const_value is None else f"{prefix}/{weight}"
        if own not in graph.initializers:
            added = ir.Value(name=own, shape=value.shape, type=value.type, const_value=value.const_value)
            graph.initializers.add(added)
        outer[value] = graph.initializers[own]
    replace_all_uses_with(list(outer), list(outer.values()))
    nodes = list(body)
    body.remove(nodes)
    for inner in nodes:
        inner.name = f"{prefix}/{inner.name}"
        scopes = inner.metadata_props.get(SCOPES, "['layer', '']")
        inner.metadata_props[SCOPES] = re.sub(r"'layer(?=[.'])", f"'{name}", scopes)
        for value in inner.outputs:
            value.name = f"{prefix}/{value.name}"
            if value.shape is not None:
                value.shape = ir.Shape([renamed(dim, symbols) for dim in value.shape])
    replace_all_uses_with(node.outputs, outputs, replace_graph_outputs=True)
    graph.insert_after(node, nodes)
    graph.remove(node, safe=True)


def renamed(dim: int | ir.SymbolicDim, symbols: Mapping[str, str]) -> int | ir.SymbolicDim:
    """Return a dimension with other names for its symbols."""
    if isinstance(dim, int) or dim.value is None:
        return dim
    if dim.value in symbols:
        return ir.SymbolicDim(symbols[dim.value])

    def other(match: re.Match[str]) -> str:
        name = symbols.get(match[0], match[0])
        return name if name.isidentifier() else f"({name})"

    return ir.SymbolicDim(re.sub(r"[A-Za-z_]\w*", other, dim.value))


def _kind(leaves: Sequence[Any]) -> object:
    """Return what calls of the same graph share, or None where a layer takes what cannot be handed to another trace.

    Sizes that have a name are told apart by the first place where they stand, so that equal ones remain equal.
    """
    places: dict[str, int] = {}

    def size_kind(size: Any) -> object:
        return size if isinstance(size, int) else f"name {places.setdefault(str(size), len(places))}"

    if not all(map(_can_be_handed_on, leaves)):
        return None
    return tuple(
        (leaf.dtype, tuple(map(size_kind, _sizes(leaf)))) if isinstance(leaf, Tensor) else _plain(leaf)
        for leaf in leaves
    )


def _can_be_handed_on(leaf: Any) -> bool:
    """Return whether another trace can be given the like: a plain value, or a tensor whose sizes have examples."""
    if isinstance(leaf, Tensor):
        return all(isinstance(size, int) or size.node.has_hint() for size in _sizes(leaf))
    return isinstance(leaf, int | float | str | bool | None)


def _sizes(tensor: Tensor) -> tuple[Any, ...]:
    """Return the shape of a tensor, in which type checkers see numbers alone, but symbols are too."""
    return tuple(tensor.shape)


def _source(output: Any, tensors: Sequence[Tensor]) -> int | None:
    """Return which of the tensors that a layer takes has the shape and dtype of an output, if one has."""
    for source, tensor in enumerate(tensors):
        # As text: to compare symbols would promise that they are equal.
        if isinstance(output, Tensor) and (tensor.dtype, str(tensor.shape)) == (output.dtype, str(output.shape)):
            return source
    return None


def _with_equals(module: nn.Module) -> Generator[tuple[str, object]]:
    """Yield the names of layers that have an equal in their list, and what tells them from others."""
    for list_name, layers in module.named_modules():
        if not isinstance(layers, nn.ModuleList):
            continue
        found = [(f"{list_name}.{index}", _likeness(layer)) for index, layer in enumerate(layers)]
        everything = [likeness for _, likeness in found]
        yield from ((name, likeness) for name, likeness in found if everything.count(likeness) > 1)


def _likeness(layer: nn.Module) -> object:
    """Return what two layers share that differ in nothing but the values of their weights.

    Objects that are no plain values must be the same ones. A buffer is data and a hook may do anything, so a layer with
    one is like no other.
    """
    parts = list(layer.named_modules())
    if any(vars(part)[kept] for _, part in parts for kept in ("_buffers", "_forward_hooks", "_forward_pre_hooks")):
        return id(layer)
    return tuple(
        (
            name,
            type(part),
            tuple((key, _plain(value)) for key, value in vars(part).items() if key not in _BOOKKEEPING),
            tuple((key, value.shape, value.dtype) for key, value in part.named_parameters(recurse=False)),
        )
        for name, part in parts
    )


def _plain(value: object) -> object:
    """Return something that is equal for equal plain values and for the same object alone."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    return type(value), value if isinstance(value, int | float | str | bool | None) else id(value)


_BOOKKEEPING = vars(nn.Module()).keys()
