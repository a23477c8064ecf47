"""What TensorRT says it built: which kernels compute which nodes of the graph.

At its highest verbosity, the builder logs a line for every kernel, with the nodes that went into it. That needs no GPU,
unlike the engine inspector, which reads an engine that is loaded.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokexport.errors import EngineError

# _gemm_mha_v2_myl2_17: the 18th kernel of the third graph. A profile is a graph, or several where an operator is in
# none, like TopK; then not every number has kernels.
_KERNEL = re.compile(
    r"^Name: \S+_myl(?P<graph>\d+)_\d+, LayerType: .*TacticName: (?P<tactic>[^,]*), .*Metadata: (?P<from>.*)$"
)
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_FUSED_ATTENTION = re.compile("mha|fmha|flash|attention", re.IGNORECASE)


@dataclass(frozen=True)
class Kernel:
    """One kernel of an engine.

    Attributes:
        graph: the number of the part of the engine that it belongs to, which is of one profile.
        tactic: how it computes.
        nodes: what it computes, or a part of it.
    """

    graph: int
    tactic: str
    nodes: tuple[str, ...]


def read_kernels(log: Iterable[str]) -> list[Kernel]:
    """Return the kernels that a build log tells of."""
    lines = (line for message in log for line in message.splitlines())
    return [
        Kernel(int(found["graph"]), found["tactic"], tuple(_NODE.findall(found["from"])))
        for line in lines
        if (found := _KERNEL.match(line))
    ]


def require_fused(kernels: Sequence[Kernel], attentions: Sequence[str], num_profiles: int) -> int:
    """Check that every attention is one fused kernel in every profile, and return how many there are.

    Raises:
        EngineError: one is not.
    """
    graphs_of: dict[str, list[int]] = {name: [] for name in attentions}
    for kernel in kernels:
        if _FUSED_ATTENTION.search(kernel.tactic):
            for node in kernel.nodes:
                if node in graphs_of:
                    graphs_of[node].append(kernel.graph)
    wrong = [
        f"{name} ({len(graphs)} kernels in {len(set(graphs))} graphs)"
        for name, graphs in graphs_of.items()
        if not len(graphs) == len(set(graphs)) == num_profiles
    ]
    if wrong:
        raise EngineError(
            f"{len(wrong)} of {len(attentions)} attentions are not one fused kernel in each of {num_profiles} "
            f"profiles: {', '.join(wrong[:3])}; see build.log"
        )
    return sum(len(graphs) for graphs in graphs_of.values())
