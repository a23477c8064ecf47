"""Engines on a GPU: buffers made once, a cache that never leaves the device, decode as a CUDA graph."""

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokexport.engines.backend import Array, Choice, DecoderStep
from tokexport.engines.tensorrt.engine_folder import Engines
from tokexport.engines.tensorrt.library import Library
from tokexport.engines.tensorrt.phases import PhaseName, phase_of, phases
from tokexport.engines.tensorrt.session import Runner
from tokexport.errors import EngineError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.graph_io import cache_names, choice_names, choosing_layers

# Runs of one shape before it is captured, so that nothing is allocated while it is.
_WARM_UP = 2


class GpuRunner(Runner):
    """Runs engines of one artefact.

    Args:
        bundle: the artefact.
        library: the TensorRT that built them.
        engines: the engines.

    Raises:
        EngineError: an engine cannot be loaded on this GPU.
    """

    def __init__(self, bundle: Bundle, library: Library, engines: Engines) -> None:
        self._bundle, self._trt = bundle, library.module
        self._device, self._dtype = torch.device("cuda"), getattr(torch, bundle.recipe.export.dtype)
        self._stream = torch.cuda.Stream()
        self._logger = self._trt.Logger(self._trt.Logger.ERROR)
        runtime = self._trt.Runtime(self._logger)
        self._vision = _Engine(runtime, engines, "vision_encoder")
        self._decoder = _Engine(runtime, engines, "decoder")
        names: list[PhaseName] = [phase.name for phase in phases(bundle.plan, engines.room)]
        self._contexts = {name: self._decoder.context(number, self._stream) for number, name in enumerate(names)}
        self._vision_context = self._vision.context(0, self._stream)
        self._cache = self._new_cache(engines)
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._results: dict[str, Tensor] = {}
        ios = [bundle.graph_io(graph) for graph in ("vision_encoder", "decoder_model_merged")]
        self._choosing = choosing_layers(ios[1])
        self._dtype_of = {tensor.name: getattr(torch, tensor.dtype) for io in ios for tensor in io.outputs}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._decoded = 0

    def encode(self, pixel_values: NDArray[np.float32]) -> Array:
        pixels = self._filled("pixel_values", torch.from_numpy(pixel_values).to(self._dtype))
        features = self._run(self._vision, self._vision_context, {"pixel_values": pixels}, "image_features")
        return features.float().cpu().numpy()

    def decode(self, step: DecoderStep) -> NDArray[np.float32]:
        inputs = {name: self._filled(name, self._typed(array)) for name, array in step.inputs().items()} | self._cache
        phase = phase_of(step)
        context = self._contexts[phase]
        if phase == "decode":
            return self._decode_one(context, inputs).float().cpu().numpy()
        logits = self._run(self._decoder, context, inputs, "logits").float().cpu().numpy()
        if step.image_features.shape[1]:
            self.choices = {
                layer: Choice(*(self._results[name].cpu().numpy() for name in choice_names(layer)))
                for layer in self._choosing
            }
        return logits

    def read_cache(self, layer: int, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        keys, values = (self._cache[name][:, :, :length].float().cpu().numpy() for name in cache_names(layer))
        return keys, values

    @property
    def kv_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._cache.values())

    def _new_cache(self, engines: Engines) -> dict[str, Tensor]:
        spec, plan = self._bundle.spec, self._bundle.plan
        capacities = engines.room.capacities(plan)
        cache: dict[str, Tensor] = {}
        for layer, group in enumerate(plan.group_of_layer):
            for name in cache_names(layer):
                shape = (1, spec.num_kv_heads, capacities[group], spec.head_dim)
                cache[name] = torch.zeros(shape, dtype=self._dtype, device=self._device)
        return cache

    def _typed(self, array: Array) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def _filled(self, name: str, value: Tensor) -> Tensor:
        """Return the buffer of this name and shape with a value in it; a graph finds it where it was."""
        key = (name, tuple(value.shape))
        if key not in self._buffers:
            self._buffers[key] = torch.empty(value.shape, dtype=value.dtype, device=self._device)
        self._buffers[key].copy_(value)
        return self._buffers[key]

    def _run(self, engine: "_Engine", context: Any, inputs: Mapping[str, Tensor], output: str) -> Tensor:
        result = self._bind(engine, context, inputs, output)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            _execute(context, self._stream)
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _bind(self, engine: "_Engine", context: Any, inputs: Mapping[str, Tensor], output: str) -> Tensor:
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise EngineError(f"the engine takes no {name} of {tuple(tensor.shape)} in this profile")
            # An empty tensor has no address, and every input needs one.
            context.set_tensor_address(name, tensor.data_ptr() or self._stand_in.data_ptr())
        for name in engine.outputs:
            if name.startswith("present."):
                # In place: the cache goes out where it came in.
                past = name.replace("present.", "past_key_values.", 1)
                context.set_tensor_address(name, inputs[past].data_ptr())
                continue
            shape = tuple(context.get_tensor_shape(name))
            key = (name, shape)
            if key not in self._buffers:
                self._buffers[key] = torch.empty(shape, dtype=self._dtype_of[name], device=self._device)
            self._results[name] = self._buffers[key]
            context.set_tensor_address(name, self._buffers[key].data_ptr() or self._stand_in.data_ptr())
        return self._results[output]

    @property
    def _stand_in(self) -> Tensor:
        key = ("", (1,))
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(256, dtype=torch.uint8, device=self._device)
        return self._buffers[key]

    def _decode_one(self, context: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run one token: the first few as they are, the others as a graph of the same shapes and addresses."""
        self._decoded += 1
        logits = self._buffers.get(("logits", (1, 1, self._bundle.spec.vocab_size)))
        if self._graph is not None and logits is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._graph.replay()
            torch.cuda.current_stream().wait_stream(self._stream)
            return logits
        result = self._run(self._decoder, context, inputs, "logits")
        if self._decoded == _WARM_UP:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # A library that cannot be captured goes on without.
            with contextlib.suppress(RuntimeError), torch.cuda.graph(graph, stream=self._stream):
                _execute(context, self._stream)
                self._graph = graph
        return result


class _Engine:
    """One engine that was loaded."""

    def __init__(self, runtime: Any, engines: Engines, name: str) -> None:
        self.engine = runtime.deserialize_cuda_engine(engines.plan(name))
        if self.engine is None:
            raise EngineError(
                f"{engines.path / name}.engine cannot be loaded on this GPU; it was built for compute capability "
                f"{engines.record['capability']}"
            )
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        self.outputs = [name for name in names if self.engine.get_tensor_mode(name).name == "OUTPUT"]

    def context(self, profile: int, stream: "torch.cuda.Stream") -> Any:
        """Return what runs one profile."""
        context = self.engine.create_execution_context()
        if context is None:
            raise EngineError("there is not enough GPU memory for the engine; compile with less room")
        context.set_optimization_profile_async(profile, stream.cuda_stream)
        stream.synchronize()
        return context


def _execute(context: Any, stream: "torch.cuda.Stream") -> None:
    if not context.execute_async_v3(stream.cuda_stream):
        raise EngineError("the engine stopped with an error; its reason stands above")
