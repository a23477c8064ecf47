"""What TensorRT says it built: which kernels compute which nodes of the graph.

At its highest verbosity, the builder logs a line for every kernel, with the nodes that went into it. That needs no GPU,
unlike the engine inspector, which reads an engine that is loaded.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokexport.errors import EngineError

# _gemm_mha_v2_myl2_17: the 18th kernel of the third profile.
_KERNEL = re.compile(
    r"^Name: \S+_myl(?P<graph>\d+)_\d+, LayerType: .*TacticName: (?P<tactic>[^,]*), .*Metadata: (?P<from>.*)$"
)
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_FUSED_ATTENTION = re.compile("mha|fmha|flash|attention", re.IGNORECASE)


@dataclass(frozen=True)
class Kernel:
    """One kernel of an engine.

    Attributes:
        graph: the number of the profile that it belongs to.
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
    found = Counter(
        (kernel.graph, node)
        for kernel in kernels
        if _FUSED_ATTENTION.search(kernel.tactic)
        for node in kernel.nodes
        if node in attentions
    )
    wrong = [
        f"{name} (profile {graph}: {found[graph, name]})"
        for graph in range(num_profiles)
        for name in attentions
        if found[graph, name] != 1
    ]
    if wrong:
        raise EngineError(
            f"{len(wrong)} of {num_profiles * len(attentions)} attentions are not one fused kernel: "
            f"{', '.join(wrong[:3])}; see build.log"
        )
    return found.total()
