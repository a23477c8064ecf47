"""The decoder graph as TensorRT is given it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from tokexport.errors import ExportError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.passes.fix_sizes import FixSizes
from tokexport.exporter.passes.tensorrt_attention import MaskCachedAttention


@dataclass(frozen=True)
class Dialect:
    """A rewritten decoder; its weights stay in the artefact's files.

    Attributes:
        graph: serialised.
        attentions: names of the nodes of the decoder layers' attention.
        operators: how often each stands in the graph.
    """

    graph: bytes
    attentions: tuple[str, ...]
    operators: Mapping[str, int]


def rewritten_decoder(bundle: Bundle, capacities: Sequence[int]) -> Dialect:
    """Return the artefact's decoder with caches of fixed size and attention that says what it sees.

    Raises:
        ExportError: not every layer's attention was rewritten.
    """
    model = ir.load(bundle.graph_path("decoder_model_merged"))
    mask = MaskCachedAttention()
    FixSizes({"batch": 1, **{f"capacity_{group}": size for group, size in enumerate(capacities)}})(model)
    mask(model)
    if len(mask.names) != bundle.spec.num_layers:
        raise ExportError(
            f"{len(mask.names)} of {bundle.spec.num_layers} attentions were rewritten for TensorRT; the graph is not "
            "one of tokexport's"
        )
    operators = Counter(node.op_type for node in model.graph)
    return Dialect(ir.to_proto(model).SerializeToString(), tuple(mask.names), operators)
