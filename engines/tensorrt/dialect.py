"""The decoder graph as TensorRT is given it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from tokexport.engines.backend import AttentionKind
from tokexport.errors import ExportError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.passes.fix_sizes import FixSizes
from tokexport.exporter.passes.flash_attention_op import UseFlashAttention
from tokexport.exporter.passes.loop_conditions import LoopConditions
from tokexport.exporter.passes.tensorrt_attention import MaskCachedAttention


@dataclass(frozen=True)
class Dialect:
    """A rewritten decoder; its weights stay in the artefact's files.

    Attributes:
        graph: serialised.
        attentions: names of the nodes of the decoder layers' attention; none where it is a plugin.
        operators: how often each stands in the graph.
    """

    graph: bytes
    attentions: tuple[str, ...]
    operators: Mapping[str, int]


def rewritten_decoder(bundle: Bundle, capacities: Sequence[int], attention: AttentionKind = "fused") -> Dialect:
    """Return the artefact's decoder with caches of fixed size and attention that says what it sees.

    Args:
        bundle: the artefact.
        capacities: of each layer group's cache.
        attention: the library's own, behind a mask, or ours as a plugin.

    Raises:
        ExportError: not every layer's attention was rewritten.
    """
    model = ir.load(bundle.graph_path("decoder_model_merged"))
    FixSizes({"batch": 1, **{f"capacity_{group}": size for group, size in enumerate(capacities)}})(model)
    LoopConditions()(model)
    names: Sequence[str] = ()
    if attention == "plugin":
        use = UseFlashAttention(is_plugin=True)
        use(model)
        count = use.count
    else:
        mask = MaskCachedAttention()
        mask(model)
        names, count = mask.names, len(mask.names)
    if count != bundle.spec.num_layers:
        raise ExportError(
            f"{count} of {bundle.spec.num_layers} attentions were rewritten for TensorRT; the graph is not "
            "one of tokexport's"
        )
    operators = Counter(node.op_type for node in model.graph)
    return Dialect(ir.to_proto(model).SerializeToString(), tuple(names), operators)
