"""Engines from an artefact's graphs: parsed, checked, built, counted. Needs a GPU only where the library does."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tokexport.engines.backend import AttentionKind, SessionOptions
from tokexport.engines.tensorrt.dialect import rewritten_decoder
from tokexport.engines.tensorrt.kernels import read_kernels, require_fused
from tokexport.engines.tensorrt.library import Library
from tokexport.engines.tensorrt.phases import Shape, decoder_shapes, phases
from tokexport.errors import EngineError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.graph_io import GraphIO
from tokexport.exporter.passes.flash_attention_op import OPERATOR

Shapes = Mapping[str, Sequence[Shape]]
"""By input: smallest, usual and largest."""

_DTYPES = {"float16": "HALF", "bfloat16": "BF16", "float32": "FLOAT", "int64": "INT64"}
# Counted in the parsed network; each has to be there as often as its operator in the graph.
_OPERATORS = {"ATTENTION_INPUT": "Attention", "ROTARY_EMBEDDING": "RotaryEmbedding", "KV_CACHE_UPDATE": "TensorScatter"}


@dataclass(frozen=True, kw_only=True)
class Built:
    """One engine.

    Attributes:
        plan: what the library serialised.
        layers: how often the network has what belongs to a decoder layer.
        fused_attentions: kernels that are a whole attention, in all profiles together.
        seconds: that parsing and building took.
        peak_rss_bytes: of this process, all that it held included.
        log: every line of the builder.
    """

    plan: bytes
    layers: Mapping[str, int]
    fused_attentions: int
    seconds: float
    peak_rss_bytes: int
    log: Sequence[str]

    def report(self) -> dict[str, Any]:
        """Return what ``engine.json`` tells of it."""
        return {
            "bytes": len(self.plan),
            "layers": dict(self.layers),
            "fused_attentions": self.fused_attentions,
            "seconds": round(self.seconds, 2),
            "peak_rss_bytes": self.peak_rss_bytes,
        }


def build_vision_encoder(bundle: Bundle, library: Library, options: SessionOptions, target: Any) -> Built:
    """Build the engine of the vision encoder, for up to as many images a call as the cache has room for.

    Raises:
        EngineError: see ``build_decoder``.
    """
    import onnx_ir as ir

    path, io = bundle.graph_path("vision_encoder"), bundle.graph_io("vision_encoder")
    attentions = [node.name or "" for node in ir.load(path).graph if node.op_type == "Attention"]
    counts = (1, 1, max(1, options.max_images))
    shapes = {
        tensor.name: [
            tuple(dim if isinstance(dim, int) else counts[place] for dim in tensor.shape) for place in range(3)
        ]
        for tensor in io.inputs
    }
    return _built(library, path, path.read_bytes(), io, [shapes], attentions, target, expected={})


def build_decoder(
    bundle: Bundle, library: Library, options: SessionOptions, target: Any, attention: AttentionKind = "fused"
) -> Built:
    """Build the engine of the decoder, one profile a phase.

    Args:
        bundle: the artefact.
        library: the TensorRT that builds.
        options: room of the cache, which is part of the engine.
        target: the library's word for a compute capability, None for the GPU in this machine.
        attention: what computes it; a plugin has to be registered before.

    Raises:
        EngineError: the graph is not parsed as it is meant, or an attention does not become one kernel.
    """
    capacities = options.capacities(bundle.plan)
    path, io = bundle.graph_path("decoder_model_merged"), bundle.graph_io("decoder_model_merged")
    dialect = rewritten_decoder(bundle, capacities, attention)
    profiles = [decoder_shapes(io, bundle.plan, phase, capacities) for phase in phases(bundle.plan, options)]
    expected = {kind: dialect.operators[operator] for kind, operator in _OPERATORS.items()}
    if attention == "plugin":
        expected["PLUGIN_V3"] = dialect.operators[OPERATOR]
    return _built(library, path, dialect.graph, io, profiles, dialect.attentions, target, expected=expected)


def _built(
    library: Library,
    path: Path,
    graph: bytes,
    io: GraphIO,
    profiles: Sequence[Shapes],
    attentions: Sequence[str],
    target: Any,
    *,
    expected: Mapping[str, int],
) -> Built:
    trt, started = library.module, time.monotonic()
    log: list[str] = []
    logger = _logger(trt, log.append)
    builder = trt.Builder(logger)
    network = builder.create_network(0)  # strongly typed: the precision is the graph's
    parser = trt.OnnxParser(network, logger)
    # The path is where the weights' files are looked for.
    if not parser.parse(graph, str(path)):
        reasons = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise EngineError(f"{library.backend} {library.version} does not take {path.name}: {reasons}")
    layers = _layers(network)
    _require_network(network, io, path.name)
    wrong = {kind: layers.get(kind, 0) for kind, number in expected.items() if layers.get(kind, 0) != number}
    if wrong:
        raise EngineError(
            f"{path.name} was parsed into {wrong}, expected {dict(expected)}; it is not computed as meant"
        )
    config = _config(trt, builder, target, profiles)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = next((line for line in reversed(log) if line.startswith("ERROR")), "no reason given")
        raise EngineError(f"{library.backend} {library.version} cannot build {path.name}: {reason}")
    fused = require_fused(read_kernels(log), attentions, len(profiles))
    return Built(
        plan=bytes(plan),
        layers={kind: layers.get(kind, 0) for kind in (*_OPERATORS, *(expected.keys() - _OPERATORS.keys()))},
        fused_attentions=fused,
        seconds=time.monotonic() - started,
        peak_rss_bytes=psutil.Process().memory_info().rss,
        log=log,
    )


def _config(trt: Any, builder: Any, target: Any, profiles: Sequence[Shapes]) -> Any:
    config = builder.create_builder_config()
    # For the list of kernels in the log, see kernels.py.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(target, 0)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, ranges in shapes.items():
            profile.set_shape(name, *ranges)
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(f"TensorRT takes no profile with the shapes {dict(shapes)}")
    return config


def _layers(network: Any) -> Counter[str]:
    return Counter(network.get_layer(index).type.name for index in range(network.num_layers))


def _require_network(network: Any, io: GraphIO, name: str) -> None:
    """Check that inputs and outputs have the names, precisions and sizes that the artefact says."""
    for what, tensors, number, get in (
        ("input", io.inputs, network.num_inputs, network.get_input),
        ("output", io.outputs, network.num_outputs, network.get_output),
    ):
        found = {tensor.name: tensor for tensor in (get(index) for index in range(number))}
        expected = {tensor.name: tensor for tensor in tensors}
        if found.keys() != expected.keys():
            raise EngineError(f"{name} was parsed with the {what}s {sorted(found)}, expected {sorted(expected)}")
        for key, tensor in expected.items():
            dtype, shape = found[key].dtype.name, tuple(found[key].shape)
            fixed = [size for size, dim in zip(shape, tensor.shape, strict=True) if isinstance(dim, int)]
            meant = [dim for dim in tensor.shape if isinstance(dim, int)]
            if dtype != _DTYPES[tensor.dtype] or fixed != meant:
                raise EngineError(
                    f"{what} {key} of {name} was parsed as {dtype} {shape}, expected {tensor.dtype} {tensor.shape}"
                )


def _logger(trt: Any, add: Callable[[str], None]) -> Any:
    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            add(msg if severity.name == "VERBOSE" else f"{severity.name} {msg}")

    return Log()
