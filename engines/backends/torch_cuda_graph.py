"""PyTorch on an NVIDIA GPU, single tokens as a CUDA graph."""

from tokexport.engines.backend import Backend, SessionOptions
from tokexport.engines.environment import missing_gpu
from tokexport.engines.source import source_design
from tokexport.engines.torch_session import GraphedTorchSession
from tokexport.errors import BackendUnavailableError
from tokexport.exporter.bundle import Bundle


class TorchCudaGraph(Backend):
    """The same with single tokens as a CUDA graph."""

    runtime = "PyTorch, CUDA"
    device = "cuda"
    runs_graphs = False

    def state(self) -> str:
        return missing_gpu()

    def open(self, bundle: Bundle, options: SessionOptions) -> GraphedTorchSession:
        reason = self.state()
        if reason:
            raise BackendUnavailableError(f"backend {self.name!r} cannot run here: {reason}")
        return GraphedTorchSession(source_design(bundle, options.source), options, device="cuda")
