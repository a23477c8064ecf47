"""What an artefact takes before it is made: bytes on disk, exactly for weights, and memory while it runs.

Everything is read from modules on the meta device, so that no weight is touched.

K inputs, N outputs of a layer, V words, D width
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tokexport.exporter.graph_io import GRAPHS, METHOD_PARTS, GraphName
from tokexport.exporter.plan import DTYPE_BYTES, TokenPlan, VlmSpec, kv_cache_bytes
from tokexport.exporter.quantization import QuantizedLayer, bits_of, quantized_layers
from tokexport.recipes.schema import Recipe

INTERPRETER_BYTES = 100_000_000
"""Python with ONNX Runtime loaded and nothing opened; a benchmark measures its own."""

GPU_DTYPE = "bfloat16"
"""CPU engines do not run graphs in it, so its memory is that of a GPU."""

# Nodes, names and shapes, for each tensor that is a weight: 770 bytes in the mini tower, 820 to 1000 in decoders.
_GRAPH_BYTES_PER_WEIGHT = 840
# Rounding adds nodes and names of scales.
_GRAPH_BYTES_PER_ROUNDED = 320
# Configuration, recipe and manifest; the manifest names four tensors of the cache a layer.
_TEXT_BYTES, _TEXT_BYTES_PER_LAYER = 8_500, 850
# ONNX Runtime's three sessions, without weights and activations.
_SESSION_BYTES = 32_000_000
# Its CPU kernels compute in float32, whatever the graph is stored in.
_ACTIVATION_BYTES = 4
# The towers of CLIP and SigLIP have heads of 64 to 72.
_TOWER_HEAD_DIM = 64
# What a weight takes in memory over what it takes on disk: float16 is converted to float32 when the artefact is
# opened, and of int4 ONNX Runtime keeps a packed copy beside the stored one.
_IN_MEMORY = {"float32": 1, "float16": 2, "bfloat16": 1, "int8": 1, "int4": 2}


@dataclass(frozen=True, kw_only=True)
class GraphBytes:
    """Bytes of one graph on disk.

    Attributes:
        weights: of its weight file.
        graph: of the graph's own file: nodes, tables of positions, what a method learned.
        precision: in which most of its weights are stored.
    """

    weights: int
    graph: int
    precision: str

    @property
    def total(self) -> int:
        return self.weights + self.graph

    @property
    def resident(self) -> int:
        """Bytes that the weights take in the memory of ONNX Runtime."""
        return self.weights * _IN_MEMORY[self.precision]


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a session has room for, and the prompt that it is given.

    Attributes:
        max_text_tokens: text tokens that the cache holds.
        max_images: images that it holds.
        prompt_text_tokens: of the longest call with an image.
    """

    max_text_tokens: int
    max_images: int
    prompt_text_tokens: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Most memory that a run takes in ONNX Runtime on the CPU, in bytes, by what takes it."""

    interpreter: int
    weights: int
    kv_cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.interpreter + self.weights + self.kv_cache + self.activations

    def table(self) -> dict[str, int]:
        """Return every term and their sum."""
        return {**vars(self), "total": self.total}


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What an artefact takes.

    Attributes:
        graphs: bytes of each graph on disk.
        other_files: bytes of tokenizer, processor, configuration, recipe and manifest.
        tower_widths: of the tower, and the sum of inputs and outputs of its or the projector's widest layer.
        largest_weight: bytes of the largest one in the graphs that multiply.
    """

    graphs: Mapping[GraphName, GraphBytes]
    other_files: int
    tower_widths: tuple[int, int]
    largest_weight: int

    @property
    def disk_bytes(self) -> int:
        """Bytes of the artefact without its reports."""
        return sum(graph.total for graph in self.graphs.values()) + self.other_files

    @property
    def room_bytes(self) -> int:
        """Bytes that must be free before it is made: reports, and a disk's blocks, take some too."""
        # It is made beside its place and renamed, so it is there once.
        return int(self.disk_bytes * 1.01) + (16 << 20)

    def disk_text(self) -> str:
        """Return the bytes of each graph in words."""
        return ", ".join(f"{name} {graph.total / 1e6:,.0f} MB" for name, graph in self.graphs.items())

    def memory(
        self, spec: VlmSpec, plan: TokenPlan, room: Room, *, dtype: str, interpreter: int = INTERPRETER_BYTES
    ) -> Memory:
        """Return the memory that a run of batch 1 takes in ONNX Runtime on the CPU.

        The table of embeddings counts in full, though only what is looked up of it is read. Activations are an
        allowance: three times the inputs and outputs of the widest layer for every token, the attention scores of one
        layer over the whole cache, the same of the vision tower, which keeps its memory, and what sessions take. While
        an artefact is opened, without embeddings and a cache, its largest weight is there twice, if that is more.
        """
        tokens = plan.entering_llm + room.prompt_text_tokens
        capacity = room.max_text_tokens + room.max_images * plan.entering_llm
        tower_tokens = plan.emitted + 1  # the class token
        tower_width, tower_widest = self.tower_widths
        numbers = (
            tokens * 3 * (spec.hidden_size + spec.intermediate_size),
            spec.num_heads * tokens * max(tokens, capacity),
            tower_tokens * 3 * tower_widest,
            math.ceil(tower_width / _TOWER_HEAD_DIM) * tower_tokens**2,
        )
        cache = kv_cache_bytes(spec, plan, text_tokens=room.max_text_tokens, num_images=room.max_images, dtype=dtype)
        at_run = _SESSION_BYTES + _ACTIVATION_BYTES * sum(numbers)
        return Memory(
            interpreter=interpreter,
            weights=sum(graph.resident for graph in self.graphs.values()),
            kv_cache=cache,
            activations=max(at_run, self.largest_weight - cache - self.graphs["embed_tokens"].resident),
        )


def footprint_of(
    modules: Mapping[GraphName, nn.Module], recipe: Recipe, num_layers: int, files: Sequence[Path]
) -> Footprint:
    """Return what the artefact of a recipe takes.

    Args:
        modules: of its graphs, on any device.
        recipe: its precisions.
        num_layers: of its decoder.
        files: tokenizer and processor files, which are copied into it.
    """
    bytes_of: dict[GraphName, GraphBytes] = {graph: _graph_bytes(graph, modules[graph], recipe) for graph in GRAPHS}
    multiplied = [
        _weight_bytes(tensor, layers.get(name), recipe.export.dtype)
        for graph in GRAPHS
        if graph != "embed_tokens"
        for layers in [quantized_layers(graph, modules[graph], recipe.quantize)]
        for name, tensor in modules[graph].named_parameters()
    ]
    linears = [layer for layer in modules["vision_encoder"].modules() if isinstance(layer, nn.Linear)]
    return Footprint(
        graphs=bytes_of,
        other_files=sum(path.stat().st_size for path in files) + _TEXT_BYTES + _TEXT_BYTES_PER_LAYER * num_layers,
        tower_widths=(linears[0].in_features, max(layer.in_features + layer.out_features for layer in linears)),
        largest_weight=max(multiplied),
    )


def footprint_report(
    footprint: Footprint, spec: VlmSpec, plan: TokenPlan, recipe: Recipe, text_tokens: int
) -> dict[str, Any]:
    """Return what ``tokexport plan --json`` prints of disk and memory; its keys are a contract."""
    room = Room(
        max_text_tokens=min(recipe.session.max_text_tokens, spec.max_positions),
        max_images=recipe.session.max_images,
        prompt_text_tokens=text_tokens,
    )
    graphs = {
        str(name): {"weights": graph.weights, "graph": graph.graph, "precision": graph.precision}
        for name, graph in footprint.graphs.items()
    }
    full, compressed = (
        footprint.memory(spec, which, room, dtype=recipe.export.dtype).table()
        for which in (TokenPlan.uncompressed(spec), plan)
    )
    return {
        "disk_bytes": {
            "graphs": graphs,
            "other_files": footprint.other_files,
            "total": footprint.disk_bytes,
            "free_needed": footprint.room_bytes,
        },
        "memory_bytes": {"full": full, "compressed": compressed, "room": dict(vars(room))},
    }


def precision_of(graph: GraphName, recipe: Recipe) -> str:
    """Return the precision that a recipe stores most weights of a graph in."""
    bits = bits_of(graph, recipe.quantize)
    return recipe.export.dtype if bits == "none" else bits


def _graph_bytes(graph: GraphName, module: nn.Module, recipe: Recipe) -> GraphBytes:
    dtype = recipe.export.dtype
    layers = quantized_layers(graph, module, recipe.quantize)
    parameters = dict(module.named_parameters())
    # What a method learned lies in the graph's own file.
    own = {name for name in parameters if name.startswith(METHOD_PARTS)}
    inside = [parameters[name] for name in own] + list(module.buffers())
    structure = _GRAPH_BYTES_PER_WEIGHT * len(parameters) + _GRAPH_BYTES_PER_ROUNDED * len(layers)
    return GraphBytes(
        weights=sum(_weight_bytes(parameters[name], layers.get(name), dtype) for name in parameters.keys() - own),
        graph=sum(_plain_bytes(tensor, dtype) for tensor in inside) + structure,
        precision=precision_of(graph, recipe),
    )


def _weight_bytes(weight: Tensor, layer: QuantizedLayer | None, dtype: str) -> int:
    """Return the bytes that a weight is stored in, its scales included."""
    return _plain_bytes(weight, dtype) if layer is None else layer.stored_bytes(*weight.shape)


def _plain_bytes(tensor: Tensor, dtype: str) -> int:
    return tensor.numel() * (DTYPE_BYTES[dtype] if tensor.is_floating_point() else tensor.element_size())
