"""ONNX Runtime on the CPU, running the portable graphs as they are.

The graphs are standard ONNX, so this is also what any other runtime computes. ``ort`` is faster.
"""

from tokexport.engines.backend import Backend, SessionOptions
from tokexport.engines.ort_session import CPU_DTYPES, OrtSession, graph_file
from tokexport.exporter.bundle import Bundle


class OrtPortable(Backend):
    """The graphs of the artefact, unchanged."""

    runtime = "ONNX Runtime, portable graphs"

    is_foretold = True

    is_profiled = True

    dtypes = CPU_DTYPES

    def open(self, bundle: Bundle, options: SessionOptions) -> OrtSession:
        self.require(bundle.recipe.export.dtype)
        return OrtSession(bundle, options, graph_file(bundle, "decoder_model_merged"))
