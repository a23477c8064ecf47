"""What single modules of the vision encoder's graph compute, for checks and pictures."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tokexport.errors import ParityError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.graph_io import node_scope


def vision_taps(
    bundle: Bundle, pixel_values: NDArray[np.float32], modules: Sequence[str], *, threads: int | None
) -> dict[str, NDArray[np.float32]]:
    """Return what the last node of each module computes in the vision graph.

    Raises:
        ParityError: the graph has no nodes of a module.
    """
    from tokexport.engines.ort_session import inference_session  # needs ONNX Runtime

    model = ir.load(bundle.graph_path("vision_encoder"))
    last: dict[str, ir.Value] = {}
    for node in model.graph:
        for module in modules:
            if node.name is not None and node.name.startswith(node_scope(module)):
                last[module] = node.outputs[0]
    missing = [module for module in modules if module not in last]
    if missing:
        raise ParityError(f"the vision graph has no nodes of {', '.join(missing)}; export it again")
    model.graph.outputs.extend(value for value in last.values() if value not in model.graph.outputs)
    session = inference_session(ir.to_proto(model).SerializeToString(), bundle.path / "onnx", threads=threads)
    dtype = np.float16 if bundle.recipe.export.dtype == "float16" else np.float32
    names = [value.name for value in last.values()]
    outputs = session.run(names, {"pixel_values": pixel_values.astype(dtype)})
    return {module: np.asarray(output, np.float32) for module, output in zip(last, outputs, strict=True)}
