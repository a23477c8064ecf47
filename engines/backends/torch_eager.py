"""PyTorch running the very modules that were traced: the reference of every compressed graph."""

from tokexport.engines.backend import Backend, SessionOptions
from tokexport.engines.source import source_design
from tokexport.engines.torch_session import TorchSession
from tokexport.exporter.bundle import Bundle


class TorchEager(Backend):
    """The compressed model in PyTorch, not quantized, whatever its graphs are."""

    runtime = "PyTorch"
    runs_graphs = False

    def open(self, bundle: Bundle, options: SessionOptions) -> TorchSession:
        return TorchSession(source_design(bundle, options.source), options)
