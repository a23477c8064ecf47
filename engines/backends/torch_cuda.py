"""PyTorch on an NVIDIA GPU: what engines there are measured against."""

from tokexport.engines.backend import Backend, SessionOptions
from tokexport.engines.environment import missing_gpu
from tokexport.engines.source import source_design
from tokexport.engines.torch_session import TorchSession
from tokexport.errors import BackendUnavailableError
from tokexport.exporter.bundle import Bundle


class TorchCuda(Backend):
    """The compressed model in PyTorch on an NVIDIA GPU, with fused attention."""

    runtime = "PyTorch, CUDA"
    device = "cuda"
    runs_graphs = False

    def state(self) -> str:
        return missing_gpu()

    def open(self, bundle: Bundle, options: SessionOptions) -> TorchSession:
        reason = self.state()
        if reason:
            raise BackendUnavailableError(f"backend {self.name!r} cannot run here: {reason}")
        return TorchSession(source_design(bundle, options.source), options, device="cuda")
