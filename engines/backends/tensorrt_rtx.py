"""TensorRT for RTX and edge GPUs; it compiles on any machine, also without a GPU."""

from tokexport.engines.tensorrt.backend import TensorrtBackend
from tokexport.engines.tensorrt.library import Library


class TensorrtRtx(TensorrtBackend):
    """TensorRT for RTX and edge GPUs."""

    runtime = "TensorRT-RTX"
    library = Library.load("tensorrt_rtx", "tensorrt-rtx", "rtx")
