"""TensorRT for datacenter GPUs; it compiles for the GPU that it runs on."""

from tokexport.engines.tensorrt.backend import TensorrtBackend
from tokexport.engines.tensorrt.library import Library


class Tensorrt(TensorrtBackend):
    """TensorRT for datacenter GPUs."""

    runtime = "TensorRT"
    library = Library.load("tensorrt", "tensorrt", "tensorrt")
