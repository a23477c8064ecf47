"""A session of ONNX Runtime, which its engines open on one device or another, with one decoder graph or another."""

import functools
import os
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tokexport.engines.backend import Array, Choice, DecoderStep, Device, Session, SessionOptions
from tokexport.engines.environment import available_cores
from tokexport.errors import BackendUnavailableError, ExportError, InputError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.graph_io import GraphName, cache_names, choice_names, choosing_layers
from tokexport.exporter.passes.ort_group_query_attention import FuseGroupQueryAttention

try:
    import onnxruntime as ort
except ImportError as error:
    raise BackendUnavailableError(
        "ONNX Runtime is not installed; install it with: pip install 'tokexport[cpu]'"
    ) from error


# What the first cannot compute, like shapes, the second does.
_PROVIDERS: dict[Device, list[str]] = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
}
# Levels of accuracy of products with weights of four bits: with inputs as they are, and rounded to bytes.
_FLOAT_PRODUCTS, _BYTE_PRODUCTS = "1", "4"
# ``GroupQueryAttention`` on the CPU goes through its scores in tiles, or has those of all tokens at once. Tiles take up
# to 2.3 times as long for prompts of up to 1,200 tokens, but no memory that grows with the square of the longest one.
_WITHOUT_TILES = "ORT_GQA_DISABLE_FLASH_ATTENTION"
_MOST_TOKENS_WITHOUT_TILES = 1800
# Its CPU kernels do not compute in bfloat16.
CPU_DTYPES = ("float32", "float16")


def graph_file(bundle: Bundle, graph: GraphName) -> bytes:
    """Return a graph as it lies in the artefact."""
    return bundle.graph_path(graph).read_bytes()


class OrtSession(Session):
    """Three ONNX Runtime sessions and one cache that the decoder reads and writes in place.

    Args:
        bundle: the artefact; weights are read from it.
        options: room and threads.
        decoder: the serialised decoder graph, which may differ from the artefact's.
        device: where it is computed and the cache is kept.
        is_fast: multiply weights of four bits with inputs rounded to bytes; otherwise with float32.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: SessionOptions,
        decoder: bytes,
        device: Device = "cpu",
        *,
        is_fast: bool = False,
    ) -> None:
        super().__init__(bundle.spec, bundle.plan, options)
        self._dtype = np.dtype(bundle.recipe.export.dtype)
        folder, threads = bundle.path / "onnx", options.threads
        vision, embedding = graph_file(bundle, "vision_encoder"), graph_file(bundle, "embed_tokens")
        opened = functools.partial(
            inference_session,
            folder=folder,
            threads=threads,
            device=device,
            is_fast=is_fast,
            profile=options.profile,
        )
        self._vision, self._embedding = opened(vision), opened(embedding)
        longest = self.plan.entering_llm + options.max_text_tokens
        with _without_tiles(longest <= _MOST_TOKENS_WITHOUT_TILES):
            self._decoder = opened(decoder)
        self._binding = self._decoder.io_binding()
        self._choosing = choosing_layers(bundle.graph_io("decoder_model_merged"))
        self._bind_outputs()  # first, so that they are the first outputs of every run
        self._cache: dict[str, ort.OrtValue] = {}
        for layer, group in enumerate(self.plan.group_of_layer):
            shape = (1, self.spec.num_kv_heads, self.capacities[group], self.spec.head_dim)
            for past, present in zip(cache_names(layer), cache_names(layer, "present"), strict=True):
                value = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, self._dtype), device)
                self._cache[past] = value
                # One buffer as input and output: the cache is written in place, never copied.
                self._binding.bind_ortvalue_input(past, value)
                self._binding.bind_ortvalue_output(present, value)

    def encode_images(self, pixel_values: NDArray[np.float32]) -> Array:
        return np.asarray(self._vision.run(["image_features"], {"pixel_values": pixel_values.astype(self._dtype)})[0])

    def embed(self, input_ids: NDArray[np.int64]) -> Array:
        return np.asarray(self._embedding.run(["inputs_embeds"], {"input_ids": input_ids})[0])

    def decode(self, step: DecoderStep) -> NDArray[np.float32]:
        if step.prefix_embeds.shape[0] != 1:
            raise InputError(f"a session runs batch 1, not {step.prefix_embeds.shape[0]}")
        for name, array in step.inputs().items():
            dtype = self._dtype if np.issubdtype(array.dtype, np.floating) else array.dtype
            self._binding.bind_cpu_input(name, np.ascontiguousarray(array, dtype))
        self._bind_outputs()
        self._decoder.run_with_iobinding(self._binding)
        outputs = self._binding.get_outputs()
        if step.image_features.shape[1]:
            self.choices = {
                layer: Choice(outputs[1 + 2 * place].numpy(), outputs[2 + 2 * place].numpy())
                for place, layer in enumerate(self._choosing)
            }
        return outputs[0].numpy().astype(np.float32, copy=False)

    def _bind_outputs(self) -> None:
        """Let what is not the cache be allocated anew: its size may be another one."""
        for name in ("logits", *(name for layer in self._choosing for name in choice_names(layer))):
            self._binding.bind_output(name, "cpu")

    def read_cache(self, layer: int, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        key, value = (self._cache[name].numpy()[:, :, :length].astype(np.float32) for name in cache_names(layer))
        return key, value

    def cache_arrays(self) -> dict[str, Array]:
        """Return a copy of the whole cache, by the names of the decoder's inputs."""
        return {name: value.numpy().copy() for name, value in self._cache.items()}

    def end_profile(self) -> Mapping[GraphName, Path]:
        sessions: dict[GraphName, ort.InferenceSession] = {
            "vision_encoder": self._vision,
            "embed_tokens": self._embedding,
            "decoder_model_merged": self._decoder,
        }
        return {graph: Path(session.end_profiling()) for graph, session in sessions.items()}

    @property
    def kv_bytes(self) -> int:
        return sum(value.numpy().nbytes for value in self._cache.values())


def inference_session(
    graph: bytes,
    folder: Path,
    *,
    threads: int | None,
    device: Device = "cpu",
    is_fast: bool = False,
    profile: Path | None = None,
) -> "ort.InferenceSession":
    """Open a serialised graph whose weights lie in ``folder``; its profile goes into the folder ``profile``."""
    settings = ort.SessionOptions()
    if profile is not None:
        settings.enable_profiling = True
        # Files are named after the time: sessions that are opened in one second need a folder each.
        settings.profile_file_prefix = str(Path(tempfile.mkdtemp(dir=profile)) / "profile")
    settings.intra_op_num_threads = threads or available_cores()
    settings.log_severity_level = 3
    # The three sessions have a thread pool each. Threads that spin on after the vision encoder's run would
    # take the cores that the decoder's threads need: its first layer then takes twice as long.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    level = _BYTE_PRODUCTS if is_fast else _FLOAT_PRODUCTS
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return ort.InferenceSession(graph, settings, providers=_PROVIDERS[device])


@contextmanager
def _without_tiles(is_wanted: bool) -> Generator[None]:
    """Let attentions of sessions that are opened within compute all their scores at once.

    Operators read it from the environment when they are made, as no option of a session says it. What a user has set
    stays.
    """
    if not is_wanted or _WITHOUT_TILES in os.environ:
        yield
        return
    os.environ[_WITHOUT_TILES] = "1"
    try:
        yield
    finally:
        del os.environ[_WITHOUT_TILES]


def rewritten_decoder(bundle: Bundle) -> bytes:
    """Return the artefact's decoder with fused attention, serialised; weights stay in their file.

    Raises:
        ExportError: not every layer's attention was fused.
    """
    model = ir.load(bundle.graph_path("decoder_model_merged"))
    fuse = FuseGroupQueryAttention()
    fuse(model)
    if fuse.count != bundle.spec.num_layers:
        raise ExportError(
            f"{fuse.count} of {bundle.spec.num_layers} attentions were fused for ONNX Runtime; the graph "
            "is not one of tokexport's"
        )
    return ir.to_proto(model).SerializeToString()
