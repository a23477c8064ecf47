"""ONNX Runtime with its flash attention on any NVIDIA GPU, also on one that TensorRT-RTX does not know, like Hopper."""

from tokexport.engines.backend import Rewriter, SessionOptions
from tokexport.engines.environment import missing_gpu
from tokexport.engines.ort_session import OrtSession, ort, rewritten_decoder
from tokexport.errors import BackendUnavailableError
from tokexport.exporter.bundle import Bundle

_PROVIDER = "CUDAExecutionProvider"


class OrtCuda(Rewriter):
    """ONNX Runtime on an NVIDIA GPU with its flash attention."""

    runtime = "ONNX Runtime, CUDA"

    # Flash attention computes in half precision; numpy, which the session speaks, has no bfloat16.
    dtypes = ("float16",)
    device = "cuda"

    def decoder_graph(self, bundle: Bundle) -> bytes:
        return rewritten_decoder(bundle)

    def state(self) -> str:
        if _PROVIDER not in ort.get_available_providers():
            return (
                "ONNX Runtime is installed without CUDA; install it with: pip uninstall onnxruntime, then pip install "
                "'tokexport[cuda]'"
            )
        return missing_gpu()

    def open(self, bundle: Bundle, options: SessionOptions) -> OrtSession:
        self.require(bundle.recipe.export.dtype)
        reason = self.state()
        if reason:
            raise BackendUnavailableError(f"backend {self.name!r} cannot run here: {reason}")
        # The CUDA libraries are those that came with torch.
        ort.preload_dlls()
        return OrtSession(bundle, options, self.decoder_graph(bundle), device="cuda")
