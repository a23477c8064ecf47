"""Weights in 8 or 4 bits: which layers of a model, how they are rounded, and what they then stand for.

K inputs and N outputs of a layer, G blocks of inputs, V words, D width
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import ceil
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from tokexport.errors import ExportError, RecipeError, nearest
from tokexport.exporter.graph_io import METHOD_PARTS, GraphName
from tokexport.recipes.schema import Bits, QuantizeTable

Kind = Literal["matrix", "table"]

# Not 127: on processors without dot products of bytes (AVX2), two products of larger weights are more than the 16 bits
# they are added in hold, and the sum is cut off without a word. With 64 every processor computes the same.
INT8_LARGEST = 64
_TABLE_LARGEST = 127


@dataclass(frozen=True, kw_only=True)
class QuantizedLayer:
    """A layer of a graph's module whose weight is rounded.

    Attributes:
        kind: a matrix to multiply with, or a table to look up in.
        bits: ``int8`` or ``int4``.
        block_size: inputs that share a scale, of ``int4``.
    """

    kind: Kind
    bits: Bits
    block_size: int

    def stored_name(self, name: str) -> str:
        """Return what the whole numbers of the weight ``name`` are called in a graph; matrices lie transposed."""
        return f"{name}.transposed.{self.bits}" if self.kind == "matrix" else f"{name}.{self.bits}"

    def stored_bytes(self, num_outputs: int, num_inputs: int) -> int:
        """Return the bytes of whole numbers and float32 scales of a module's weight, (N, K) or (V, D)."""
        if self.bits == "int4":
            return ceil(num_outputs * num_inputs / 2) + 4 * ceil(num_inputs / self.block_size) * num_outputs
        return num_outputs * num_inputs + 4 * num_outputs

    def round(self, weight: NDArray[np.float32]) -> "RoundedWeight":
        """Round a matrix (K, N) or a table (V, D)."""
        if self.kind == "table":
            return _rounded_int8(weight, axis=1, largest=_TABLE_LARGEST)
        if self.bits == "int8":
            return _rounded_int8(weight, axis=0, largest=INT8_LARGEST)
        return _rounded_int4(weight, self.block_size)


@dataclass(frozen=True, kw_only=True)
class RoundedWeight:
    """Whole numbers and what to multiply them with.

    Attributes:
        values: int8 (K, N) or (V, D).
        scale: float32, (1, N), (G, N) or (V, 1).
        block_size: rows that share a scale, 0 where all do.
    """

    values: NDArray[np.int8]
    scale: NDArray[np.float32]
    block_size: int = 0

    def restored(self) -> NDArray[np.float32]:
        """Return what the numbers stand for."""
        scale = self.scale
        if self.block_size:
            scale = scale.repeat(self.block_size, axis=0)[: len(self.values)]
        return self.values * scale


def bits_of(graph: GraphName, table: QuantizeTable) -> Bits:
    """Return how many bits a recipe stores the layers of a graph in."""
    bits: dict[GraphName, Bits] = {
        "vision_encoder": table.vision_encoder,
        "embed_tokens": table.embed_tokens,
        "decoder_model_merged": table.decoder,
    }
    return bits[graph]


def quantized_layers(graph: GraphName, module: nn.Module, table: QuantizeTable) -> dict[str, QuantizedLayer]:
    """Return the layers of a graph's module that are rounded, by the name of their weight."""
    bits = bits_of(graph, table)
    if bits == "none":
        return {}
    kind: Kind = "table" if graph == "embed_tokens" else "matrix"
    layer_type = nn.Embedding if kind == "table" else nn.Linear
    return {
        f"{name}.weight" if name else "weight": QuantizedLayer(kind=kind, bits=bits, block_size=table.block_size)
        for name, layer in module.named_modules()
        if isinstance(layer, layer_type) and not name.startswith(METHOD_PARTS) and not _is_kept(name, table)
    }


def require_layers(modules: Mapping[GraphName, nn.Module], table: QuantizeTable) -> None:
    """Check that everything a recipe keeps is there.

    Raises:
        RecipeError: a name to keep is that of no layer.
    """
    names = [
        name for module in modules.values() for name, layer in module.named_modules() if isinstance(layer, nn.Linear)
    ]
    for pattern in table.keep:
        if not any(fnmatchcase(name, pattern) for name in names):
            of_any_number = {re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names}
            raise RecipeError(f"[quantize] keep: no layer is called {pattern!r}{nearest(pattern, list(of_any_number))}")


def _is_kept(name: str, table: QuantizeTable) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in table.keep)


def _rounded_int8(weight: NDArray[np.float32], *, axis: int, largest: int) -> RoundedWeight:
    scale = np.abs(weight).max(axis=axis, keepdims=True) / np.float32(largest)
    # A channel of zeros stays one, whatever its scale.
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    return RoundedWeight(values=np.rint(weight / scale).astype(np.int8), scale=scale)


def _rounded_int4(weight_KN: NDArray[np.float32], block_size: int) -> RoundedWeight:
    blocks_of = _block_quantizer(block_size)
    packed, scale_GN, _ = blocks_of(np.ascontiguousarray(weight_KN, np.float32))
    num_inputs, num_outputs = weight_KN.shape
    halves = np.stack((packed & 0xF, packed >> 4), axis=-1).reshape(-1)[: weight_KN.size].astype(np.int8)
    # Four bits with a sign.
    values_KN = np.where(halves > 7, halves - 16, halves).astype(np.int8).reshape(weight_KN.shape)
    return RoundedWeight(
        values=values_KN, scale=scale_GN.reshape(ceil(num_inputs / block_size), num_outputs), block_size=block_size
    )


def _block_quantizer(
    block_size: int,
) -> Callable[[NDArray[np.float32]], tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]]:
    """Return ONNX Runtime's own quantizer of blocks, whose operator multiplies them."""
    # Importing it makes the root logger talkative, unless that has a handler.
    root, silent = logging.getLogger(), logging.NullHandler()
    root.addHandler(silent)
    try:
        from onnxruntime.quantization import QuantFormat
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )
    except ImportError as error:
        raise ExportError(
            "int4 weights are rounded by ONNX Runtime, which is not installed; install it with: pip install "
            "'tokexport[cpu]'"
        ) from error
    finally:
        root.removeHandler(silent)
    config = DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=True, quant_format=QuantFormat.QDQ)
    return DefaultWeightOnlyQuantizer(config).qbits_block_quant
