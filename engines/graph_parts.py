"""Parts of a graph that lie between given values, as graphs of their own, and what is told of one."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.analysis import analyze_implicit_usage

from tokexport.engines.compare import Check


@dataclass(frozen=True)
class Part:
    """Nodes of a graph with the names of what goes in and what comes out.

    Attributes:
        nodes: in the order of the graph.
        inputs: values that other nodes or the graph's caller give; no weights.
        outputs: values that are wanted, and those of the graph's outputs that the nodes compute.
    """

    nodes: tuple[ir.Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """A part of a graph that an engine computes differently.

    Attributes:
        folder: what it was left in.
        nodes: operators of the engine's part, in order.
        portable_nodes: operators of the same part of the portable graph.
        call: during which it differed.
        check: the output that differs most.
        command: shows the difference again.
    """

    folder: Path
    nodes: tuple[str, ...]
    portable_nodes: tuple[str, ...]
    call: str
    check: Check
    command: str

    def report(self) -> dict[str, Any]:
        """Return what ``tokexport verify --json`` prints of it."""
        return {**asdict(self), "folder": str(self.folder)}

    def text(self) -> str:
        """Say in one line what is left and how to look at it."""
        return f"{len(self.nodes)} nodes still differ in {self.check.name}, {self.call}; see it with: {self.command}"


def common_values(graph: ir.Graph, other: ir.Graph) -> list[str]:
    """Return the names of what nodes of both graphs compute, in the order of the first."""
    there = {output.name for node in other for output in node.outputs}
    return [
        output.name
        for node in graph
        if node.op_type != "Constant"
        for output in node.outputs
        if output.name is not None and output.name in there
    ]


def is_same_node(node: ir.Node, other: ir.Node | None) -> bool:
    """Return whether two nodes of two graphs compute the same from values of the same names."""
    return other is not None and _identity(node) == _identity(other)


def part_before(graph: ir.Graph, wanted: str | Sequence[str], borders: Collection[str], depth: int) -> Part:
    """Return the nodes from which values come, back to the borders.

    Args:
        graph: the graph.
        wanted: names of the values.
        borders: names of values at which a part may begin.
        depth: borders to go back over on every path; at 1 the part begins at the first ones.
    """
    names, edges = [wanted] if isinstance(wanted, str) else list(wanted), set(borders)
    values, given_to = ir.convenience.create_value_mapping(graph), _given_values(graph)
    # How many borders are left to cross behind a value, by the shortest path so far.
    left: dict[ir.Value, int] = {}
    waiting = [(values[name], depth) for name in names]
    while waiting:
        value, rest = waiting.pop()
        if left.get(value, 0) >= rest:
            continue
        left[value] = rest
        node = value.producer()
        for given in given_to[node] if node is not None else ():
            waiting.append((given, rest - (given.name in edges)))
    inside = {value.producer() for value in left} - {None}
    nodes = tuple(node for node in graph if node in inside)
    made = {output for node in nodes for output in node.outputs}
    inputs = dict.fromkeys(
        given.name or ""
        for node in nodes
        for given in given_to[node]
        if given not in made and not given.is_initializer()
    )
    ends = [output.name or "" for node in nodes for output in node.outputs if output.is_graph_output()]
    return Part(nodes, tuple(inputs), tuple(dict.fromkeys([*names, *ends])))


def _given_values(graph: ir.Graph) -> Mapping[ir.Node, Sequence[ir.Value]]:
    """Return what each node takes, and what the body of a loop reads of the values around it."""
    read_inside = analyze_implicit_usage(graph)
    return {
        node: [
            *(value for value in node.inputs if value is not None),
            *(
                value
                for attribute in node.attributes.values()
                if attribute.type == ir.AttributeType.GRAPH
                for value in sorted(read_inside[attribute.as_graph()], key=lambda value: value.name or "")
            ),
        ]
        for node in graph
    }


def part_graph(model: ir.Model, part: Part, given: Mapping[str, NDArray[np.generic]]) -> ir.Model:
    """Return a part as a model with its weights inside, for inputs like ``given``."""
    graph = ir.convenience.extract(model.graph, list(part.inputs), list(part.outputs))
    for value in graph.inputs:
        array = given[value.name or ""]
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    for value in (output for node in graph for output in node.outputs):
        value.shape = None  # of all calls; this is for one
    alone = ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
    ir.external_data.load_to_model(alone)
    return alone


def _identity(node: ir.Node) -> object:
    attributes = sorted((name, str(item.value)) for name, item in node.attributes.items())
    names = [value.name if value is not None else None for value in node.inputs]
    return node.domain, node.op_type, attributes, names, [value.name for value in node.outputs]
