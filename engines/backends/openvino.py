"""OpenVINO on the CPU for the decoder, ONNX Runtime for the rest: with AVX-512 the fastest for weights of four bits.

Both read the artefact's own graphs. Towers in int8 took two to three times as long in OpenVINO. Two operators of the
decoder are put into its terms. ``TensorScatter``, which writes into a cache of a fixed size, becomes ``Concat``: a
cache that OpenVINO keeps to itself and that grows. ``Attention`` over it becomes OpenVINO's fused attention with the
mask written out.

H heads of queries, K of keys and values, E numbers a head, Q new tokens, L tokens in a cache with the new ones
"""

import functools
import threading
import weakref
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokexport.engines.backend import Array, Backend, Choice, DecoderStep, Session, SessionOptions
from tokexport.engines.environment import available_cores
from tokexport.engines.ort_session import graph_file, inference_session
from tokexport.errors import BackendUnavailableError, InputError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.graph_io import cache_names, choice_names, choosing_layers

try:
    # By name: a type checker without the package would take this very file for it.
    ov: Any = import_module("openvino")
    ops: Any = import_module("openvino.opset13")
    transformations: Any = import_module("openvino._offline_transformations")
    frontend: Any = import_module("openvino.frontend.onnx")
except ImportError as error:
    raise BackendUnavailableError(
        "OpenVINO is not installed; install it with: pip install 'tokexport[cpu,openvino]'"
    ) from error

_TOKENS = 2
"""The axis of tokens in keys and values."""

_LENGTH = 6
"""The input of a cached ``Attention`` that says how many tokens the cache holds."""

_BEAMS = "beam_idx"
"""The input that says whose cache a sequence goes on with: only behind one is a cache fused with attention."""


_reading = threading.Lock()
_masks: dict[str, Any] = {}
"""Of the graph that is being read, by the name of the length of the caches that they are for."""


class OpenVino(Backend):
    """The artefact's graphs, the decoder in OpenVINO with cache and attention fused."""

    runtime = "OpenVINO"

    dtypes = ("float32",)

    def open(self, bundle: Bundle, options: SessionOptions) -> "OpenVinoSession":
        self.require(bundle.recipe.export.dtype)
        return OpenVinoSession(bundle, options)


class OpenVinoSession(Session):
    """Two sessions of ONNX Runtime, and a compiled decoder that holds a cache of the tokens that it has seen.

    Raises:
        BackendUnavailableError: this version of OpenVINO does not know an operator of the decoder.
    """

    def __init__(self, bundle: Bundle, options: SessionOptions) -> None:
        super().__init__(bundle.spec, bundle.plan, options)
        self._vision, self._embedding = (
            inference_session(graph_file(bundle, graph), bundle.path / "onnx", threads=options.threads, is_fast=True)
            for graph in ("vision_encoder", "embed_tokens")
        )
        decoder = _read(bundle.graph_path("decoder_model_merged"))
        caches = [
            tuple(zip(cache_names(layer), cache_names(layer, "present"), strict=True))
            for layer in range(self.spec.num_layers)
        ]
        _keep_caches(decoder, dict(pair for pairs in caches for pair in pairs))
        properties = _properties(bundle, options.threads or available_cores())
        compiled = _core().compile_model(decoder, "CPU", properties)
        self._decoder = compiled.create_infer_request()
        # OpenVINO 2026.4 keeps a model whose attention holds a cache for ever; most of its memory goes if asked to go.
        weakref.finalize(self, compiled.release_memory).atexit = False
        # An input that nothing reads, like the lengths of caches that know their own, is none of a compiled model.
        self._inputs = {name for value in self._decoder.model_inputs for name in value.names}
        self._choosing = choosing_layers(bundle.graph_io("decoder_model_merged"))
        states = {state.name: state for state in self._decoder.query_state()}
        self._caches = [tuple(states[past + present] for past, present in pairs) for pairs in caches]
        self._lengths = [0] * len(self.plan.groups)

    def encode_images(self, pixel_values: NDArray[np.float32]) -> Array:
        return np.asarray(self._vision.run(["image_features"], {"pixel_values": pixel_values})[0])

    def embed(self, input_ids: NDArray[np.int64]) -> Array:
        return np.asarray(self._embedding.run(["inputs_embeds"], {"input_ids": input_ids})[0])

    def decode(self, step: DecoderStep) -> NDArray[np.float32]:
        if step.prefix_embeds.shape[0] != 1:
            raise InputError(f"a session runs batch 1, not {step.prefix_embeds.shape[0]}")
        lengths = [int(length) for length in step.past_lengths[:, 0]]
        self._shorten(lengths)
        self._lengths = []  # should it fail, some caches hold more
        inputs = {**step.inputs(), _BEAMS: np.zeros(1, np.int32)}
        result = self._decoder.infer({name: array for name, array in inputs.items() if name in self._inputs})
        num_text = step.prefix_embeds.shape[1] + step.suffix_embeds.shape[1]
        has_image = step.image_features.shape[1] > 0
        self._lengths = [
            length + num_text + has_image * group.vision_tokens
            for length, group in zip(lengths, self.plan.groups, strict=True)
        ]
        if has_image:
            self.choices = {layer: Choice(*(result[name] for name in choice_names(layer))) for layer in self._choosing}
        return result["logits"]

    def read_cache(self, layer: int, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        key, value = (state.state.data[:, :, :length].copy() for state in self._caches[layer])
        return key, value

    @property
    def kv_bytes(self) -> int:
        return sum(state.state.byte_size for states in self._caches for state in states)

    def reset(self) -> None:
        self._decoder.reset_state()
        self._lengths = [0] * len(self.plan.groups)

    def _shorten(self, lengths: Sequence[int]) -> None:
        """Let caches forget what a conversation went back behind."""
        if lengths == self._lengths:
            return
        for layer, states in enumerate(self._caches):
            length = lengths[self.plan.group_of_layer[layer]]
            for state in states:
                state.state = ov.Tensor(np.ascontiguousarray(state.state.data[:, :, :length]))
        self._lengths = list(lengths)


@functools.cache
def _core() -> Any:
    """Return what reads and compiles every graph of this process; it never ends before the process does.

    OpenVINO gives a thread that compiles another stack for signal handlers, and puts the one from before back at the
    end. Of several cores, that one can be gone by then: the next signal, such as Ctrl-C, kills the process.
    """
    core = ov.Core()
    core.add_extension(frontend.ConversionExtension("TensorScatter", _grow))
    core.add_extension(frontend.ConversionExtension("Attention", _attend))
    return core


def _read(path: Path) -> Any:
    with _reading:
        try:
            return _core().read_model(path)
        except RuntimeError as error:
            reason = [line.strip(" -") for line in str(error).splitlines() if line.strip()][-1]
            raise BackendUnavailableError(
                f"OpenVINO {ov.get_version().partition('-')[0]} does not read {path}: {reason}; update it, or use "
                "another backend, e.g. ort"
            ) from error
        finally:
            _masks.clear()


def _properties(bundle: Bundle, threads: int) -> dict[str, str | int]:
    properties: dict[str, str | int] = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # Otherwise it computes in bfloat16 and rounds keys and values to bytes wherever that is faster.
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
    }
    quantize = bundle.recipe.quantize
    if quantize.decoder == "int4":
        # Inputs are rounded to bytes in blocks of so many, which have to be those of the weights.
        properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = quantize.block_size
    return properties


def _keep_caches(decoder: Any, present_of: Mapping[str, str]) -> None:
    """Let a decoder keep what comes in under one name and goes out under another, empty at first."""
    beams = ops.parameter([1], np.int32, name=_BEAMS)
    beams.output(0).set_names({_BEAMS})
    for past in decoder.get_parameters():
        if past.output(0).any_name in present_of:
            shape = past.partial_shape
            shape[0], shape[_TOKENS] = 1, -1
            past.set_partial_shape(shape)
            readers = past.output(0).get_target_inputs()
            chosen = ops.gather(past, beams, _constant(0))
            for reader in readers:
                reader.replace_source_output(chosen.output(0))
    decoder.add_parameters([beams])
    decoder.validate_nodes_and_infer_types()
    transformations.apply_make_stateful_transformation(decoder, dict(present_of))
    for node in decoder.get_ops():
        if node.get_type_name() == "ReadValue":
            empty = [0 if size.is_dynamic else size.get_length() for size in node.output(0).partial_shape]
            node.set_arguments([ops.constant(np.zeros(empty, np.float32)).output(0)])
    decoder.validate_nodes_and_infer_types()


def _grow(node: Any) -> list[Any]:
    """Return a cache (1, K, L, E): the new tokens behind those that it came with."""
    return ops.concat([node.get_input(0), node.get_input(1)], _TOKENS).outputs()


def _attend(node: Any) -> list[Any]:
    """Return what every token (1, H, Q, E) makes of the cache up to itself; layers of one length share a mask."""
    query, *cached, length = (node.get_input(place) for place in (0, 1, 2, _LENGTH))
    name = length.get_node().get_friendly_name()
    if name not in _masks:
        _masks[name] = _mask(query, cached[0])
    keys, values = (_repeated(value, _heads(query)) for value in cached)
    return ops.scaled_dot_product_attention(query, keys, values, _masks[name]).outputs()


def _mask(query: Any, keys: Any) -> Any:
    """Return what is added to scores, (1, 1, Q, L): nothing where a token sees a place."""
    num_new, num_all = (_size(value) for value in (query, keys))
    place_L = ops.range(_constant(0), num_all, _constant(1), "i64")
    own_Q = ops.range(ops.subtract(num_all, num_new), num_all, _constant(1), "i64")
    seen_QL = ops.less_equal(place_L, ops.unsqueeze(own_Q, _constant([1])))
    # Infinity would make NaN of a part in which nothing is seen, where kernels work by parts.
    nothing, least = np.float32(0), np.float32(np.finfo(np.float32).min / 2)
    mask_QL = ops.select(seen_QL, ops.constant(nothing), ops.constant(least))
    return ops.unsqueeze(mask_QL, _constant([0, 1])).output(0)


def _repeated(value: Any, num_heads: int) -> Any:
    """Return keys or values (1, K, L, E) once for every head of queries that shares them, (1, H, L, E)."""
    times = num_heads // _heads(value)
    if times == 1:
        return value
    # In these three steps OpenVINO's fused attention finds them again and leaves them out.
    apart = ops.unsqueeze(value, _constant([2]))
    repeated = ops.broadcast(apart, _constant([1, 1, times, 1, 1]), broadcast_spec="BIDIRECTIONAL")
    return ops.reshape(repeated, _constant([0, num_heads, -1, value.partial_shape[3].get_length()]), True).output(0)


def _heads(value: Any) -> int:
    return value.partial_shape[1].get_length()


def _size(value: Any) -> Any:
    return ops.gather(ops.shape_of(value, "i64"), _constant(_TOKENS), _constant(0))


def _constant(value: ArrayLike) -> Any:
    return ops.constant(np.array(value, np.int64))
