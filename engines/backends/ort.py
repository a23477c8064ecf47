"""ONNX Runtime on the CPU with its fused attention."""

import onnx_ir as ir

from tokexport.engines.backend import Backend, SessionOptions
from tokexport.engines.backends.ort_portable import CPU_DTYPES, OrtSession
from tokexport.errors import ExportError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.passes.ort_group_query_attention import FuseGroupQueryAttention


class Ort(Backend):
    """The artefact's graphs, every decoder attention fused into ``GroupQueryAttention``.

    Rewriting takes milliseconds and no weights, so it is done on opening and not stored.
    """

    runtime = "ONNX Runtime"

    dtypes = CPU_DTYPES

    def open(self, bundle: Bundle, options: SessionOptions) -> OrtSession:
        self.require(bundle.recipe.export.dtype)
        return OrtSession(bundle, options, rewritten_decoder(bundle))


def rewritten_decoder(bundle: Bundle) -> bytes:
    """Return the artefact's decoder with fused attention, serialised; weights stay in their file.

    Raises:
        ExportError: not every layer's attention was fused.
    """
    model = ir.load(bundle.graph_path("decoder_model_merged"))
    fuse = FuseGroupQueryAttention()
    fuse(model)
    if fuse.count != bundle.spec.num_layers:
        raise ExportError(
            f"{fuse.count} of {bundle.spec.num_layers} attentions were fused for ONNX Runtime; the graph "
            "is not one of tokexport's"
        )
    return ir.to_proto(model).SerializeToString()
