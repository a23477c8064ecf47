"""ONNX Runtime on the CPU with its fused attention."""

from tokexport.engines.backend import Rewriter, SessionOptions
from tokexport.engines.ort_session import CPU_DTYPES, OrtSession, rewritten_decoder
from tokexport.exporter.bundle import Bundle


class Ort(Rewriter):
    """The artefact's graphs, every decoder attention fused into ``GroupQueryAttention``.

    Rewriting takes milliseconds and no weights, so it is done on opening and not stored.
    """

    runtime = "ONNX Runtime"

    is_foretold = True

    is_profiled = True

    dtypes = CPU_DTYPES

    def decoder_graph(self, bundle: Bundle) -> bytes:
        return rewritten_decoder(bundle)

    def open(self, bundle: Bundle, options: SessionOptions) -> OrtSession:
        self.require(bundle.recipe.export.dtype)
        return OrtSession(bundle, options, self.decoder_graph(bundle), is_fast=True)
