"""Two figures of this machine, measured in a second: how fast it multiplies, and how fast it reads memory.

Both come from products of ONNX Runtime, in the session that runs artefacts. A product of one row reads a matrix and
does little else. The best of many short runs counts, as what else runs on a machine only ever slows it.

K inputs, N outputs
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tokexport.engines.backend import DEFAULT_BACKEND, load_backend
from tokexport.engines.environment import available_cores
from tokexport.exporter.export import Design
from tokexport.exporter.footprint import precision_of
from tokexport.exporter.passes.quantize_weights import QuantizeWeights
from tokexport.exporter.quantization import QuantizedLayer
from tokexport.exporter.time_bound import Machine, decoder_weight_bytes
from tokexport.exporter.trace import OPSET
from tokexport.recipes.schema import QuantizeTable

_SECONDS = 0.4
_LEAST_RUNS = 3
_ROWS = 512
_MATRIX = (1024, 4096)
# Larger than most caches; a model that is smaller is read as fast as something of its size.
_MOST_BYTES = 128 << 20
_READ_INPUTS = 1024


def measure_machine(
    precision: str,
    *,
    threads: int | None = None,
    matrix_KN: tuple[int, int] = _MATRIX,
    weight_bytes: int = _MOST_BYTES,
    block_size: int = QuantizeTable.block_size,
    seconds: float = _SECONDS,
) -> Machine:
    """Measure this machine.

    Args:
        precision: float32, float16, int8 or int4.
        threads: that compute, None for as many as there are cores.
        matrix_KN: inputs and outputs of the matrix that is multiplied with 512 rows.
        weight_bytes: of the memory that is read over and over again; at most 128 MiB are.
        block_size: inputs that share a scale, of int4.
        seconds: for each of the figures.

    Raises:
        BackendUnavailableError: ONNX Runtime is missing, or does not compute in the precision on a CPU.
    """
    if precision not in ("int8", "int4"):
        load_backend(DEFAULT_BACKEND).require(precision)
    inputs, outputs = matrix_KN
    taken = _best(_product(precision, _ROWS, matrix_KN, threads, block_size), seconds)
    columns = max(1, min(weight_bytes, _MOST_BYTES) // (4 * _READ_INPUTS))
    read = _best(_product("float32", 1, (_READ_INPUTS, columns), threads), seconds)
    return Machine(
        gflops_per_s=2 * _ROWS * inputs * outputs / taken / 1e9,
        gb_per_s=4 * _READ_INPUTS * columns / read / 1e9,
        precision=precision,
        threads=threads or available_cores(),
    )


def planning_machine(text: str, made: Design, report: Mapping[str, Any], threads: int | None) -> Machine:
    """Return the machine that a plan is made for: given figures, or ``here`` for this one at the recipe's sizes."""
    if text != "here":
        return Machine.parse(text)
    return machine_of(made, weight_bytes=decoder_weight_bytes(report), threads=threads)


def machine_of(made: Design, *, weight_bytes: int, threads: int | None) -> Machine:
    """Measure this machine with matrices like those of a recipe's decoder, which has ``weight_bytes``."""
    spec = made.model.spec
    return measure_machine(
        precision_of("decoder_model_merged", made.recipe),
        threads=threads,
        matrix_KN=(spec.hidden_size, spec.intermediate_size),
        weight_bytes=weight_bytes,
        block_size=made.recipe.quantize.block_size,
    )


def _best(run: Callable[[], object], seconds: float) -> float:
    """Return the seconds of the fastest run."""
    run()
    best, runs, end = float("inf"), 0, time.perf_counter() + seconds
    while runs < _LEAST_RUNS or time.perf_counter() < end:
        started = time.perf_counter()
        run()
        best, runs = min(best, time.perf_counter() - started), runs + 1
    return best


def _product(
    precision: str,
    rows: int,
    matrix_KN: tuple[int, int],
    threads: int | None,
    block_size: int = QuantizeTable.block_size,
) -> Callable[[], Any]:
    """Return a product of ``rows`` rows with a matrix that is stored in ``precision``."""
    from tokexport.engines.ort_session import inference_session  # needs ONNX Runtime

    dtype = np.dtype(np.float16 if precision == "float16" else np.float32)
    model = _product_model(rows, np.full(matrix_KN, 0.5, dtype))
    if precision in ("int8", "int4"):
        layer = QuantizedLayer(kind="matrix", bits="int8" if precision == "int8" else "int4", block_size=block_size)
        QuantizeWeights({"weight": layer})(model)
    session = inference_session(ir.to_proto(model).SerializeToString(), Path(), threads=threads, is_fast=True)
    feeds = {"x": np.full((rows, matrix_KN[0]), 0.5, dtype)}
    return lambda: session.run(None, feeds)


def _product_model(rows: int, weight_KN: NDArray[np.floating]) -> ir.Model:
    inputs, outputs = weight_KN.shape
    tensor = ir.tensor(weight_KN, name="weight")
    x = ir.val("x", dtype=tensor.dtype, shape=[rows, inputs])
    weight = ir.val("weight", const_value=tensor)
    node = ir.node("MatMul", [x, weight], name="product")
    y = node.outputs[0]
    y.name, y.shape, y.dtype = "y", ir.Shape([rows, outputs]), tensor.dtype
    graph = ir.Graph([x], [y], nodes=[node], initializers=[weight], opset_imports={"": OPSET}, name="product")
    return ir.Model(graph, ir_version=10)
