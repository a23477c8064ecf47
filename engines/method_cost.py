"""What a method's part of the vision encoder holds and costs, read from the graph and measured alone.

What a method makes of image features is one named scope of the graph, ``/stages/NAME/``, so that it can be cut out.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tokexport.exporter.bundle import Bundle
from tokexport.exporter.graph_io import node_scope, stage_name
from tokexport.exporter.method import arriving_plans, load_methods

_WARMUP = 3


def method_contents(bundle: Bundle) -> dict[str, dict[str, int]]:
    """Return nodes, parameters and FLOPs of each method that works on image features.

    FLOPs are twice the multiply-adds of matrix products for one image.
    """
    parameters = _parameters(bundle)
    return {
        name: {
            "nodes": len(nodes),
            "parameters": parameters[name],
            "flops": sum(_product_flops(node) for node in nodes),
        }
        for name, nodes in _scopes(bundle, _vision_encoder(bundle)).items()
    }


def measure_methods(bundle: Bundle, *, threads: int | None, repeats: int) -> dict[str, list[float]]:
    """Return the milliseconds of each run of each method that works on image features, one image at a time.

    Each runs alone in a session of ONNX Runtime, on features of noise.
    """
    from tokexport.engines.ort_session import inference_session  # needs ONNX Runtime

    whole, taken = _vision_encoder(bundle), {}
    for name, nodes in _scopes(bundle, whole).items():
        model = _cut_out(whole, nodes)
        feeds = {str(value.name): _example(value) for value in model.graph.inputs}
        session = inference_session(ir.to_proto(model).SerializeToString(), bundle.path / "onnx", threads=threads)
        runs: list[float] = []
        for _ in range(_WARMUP + repeats):
            started = time.perf_counter()
            session.run(None, feeds)
            runs.append(1e3 * (time.perf_counter() - started))
        taken[name] = runs[_WARMUP:]
    return taken


def _vision_encoder(bundle: Bundle) -> ir.Model:
    return ir.load(bundle.graph_path("vision_encoder"))


def _scopes(bundle: Bundle, model: ir.Model) -> dict[str, list[ir.Node]]:
    """Return the nodes of each method that has some in the vision encoder."""
    scopes = {step.method: node_scope(stage_name(step.method)) for step in bundle.recipe.compress}
    found = {
        name: [node for node in model.graph if node.name is not None and node.name.startswith(scope)]
        for name, scope in scopes.items()
    }
    return {name: nodes for name, nodes in found.items() if nodes}


def _parameters(bundle: Bundle) -> dict[str, int]:
    import torch

    methods = load_methods(bundle.recipe.compress)
    counts: dict[str, int] = {}
    for method, arriving in zip(methods, arriving_plans(methods, bundle.spec), strict=False):
        with torch.device("meta"):
            stage = method.feature_stage(bundle.spec, arriving)
        counts[method.name] = 0 if stage is None else sum(parameter.numel() for parameter in stage.parameters())
    return counts


def _product_flops(node: ir.Node) -> int:
    if node.op_type != "MatMul":
        return 0
    left, (out,) = node.inputs[0], node.outputs
    assert left is not None
    return 2 * math.prod(_sizes(out)) * _sizes(left)[-1]


def _sizes(value: ir.Value) -> list[int]:
    """Return the shape of a value for one image."""
    assert value.shape is not None, value.name
    return [dim if isinstance(dim, int) else 1 for dim in value.shape]


def _cut_out(model: ir.Model, nodes: Sequence[ir.Node]) -> ir.Model:
    """Return the nodes as a model of their own: what they take from elsewhere comes in, what they hand on goes out."""
    own = {output for node in nodes for output in node.outputs}
    taken = {value: None for node in nodes for value in node.inputs if value not in own and not _is_constant(value)}
    handed_on = [
        value for value in own if value in model.graph.outputs or any(use.node not in nodes for use in value.uses())
    ]
    part = ir.convenience.extract(model.graph, [value for value in taken if value is not None], handed_on)
    return ir.Model(part, ir_version=model.ir_version)


def _is_constant(value: ir.Value | None) -> bool:
    return value is None or value.const_value is not None


def _example(value: ir.Value) -> NDArray[Any]:
    sizes = _sizes(value)
    assert value.dtype is not None
    if value.dtype.is_floating_point():
        return np.random.default_rng(0).standard_normal(sizes).astype(value.dtype.numpy())
    return np.ones(sizes, value.dtype.numpy())  # the number of images
