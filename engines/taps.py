"""What single modules of the vision encoder's graph compute, for checks and pictures."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tokexport.errors import ParityError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.graph_io import node_scope


class VisionTaps:
    """The vision graph in ONNX Runtime with the last node of each of some modules as an output.

    Args:
        bundle: the artefact.
        modules: their names.
        threads: CPU threads, None for as many as there are cores.

    Raises:
        ParityError: the graph has no nodes of a module.
    """

    def __init__(self, bundle: Bundle, modules: Sequence[str], *, threads: int | None) -> None:
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
        self._session = inference_session(ir.to_proto(model).SerializeToString(), bundle.path / "onnx", threads=threads)
        self._dtype = np.float16 if bundle.recipe.export.dtype == "float16" else np.float32
        self._names = {module: str(value.name) for module, value in last.items()}

    def __call__(self, pixel_values: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Return what each module computes of images (B, 3, P, P)."""
        outputs = self._session.run(list(self._names.values()), {"pixel_values": pixel_values.astype(self._dtype)})
        return {module: np.asarray(output, np.float32) for module, output in zip(self._names, outputs, strict=True)}
