"""Quantized layers in PyTorch: what the graphs' whole numbers stand for, as the reference of quantized graphs."""

from typing import Any

import torch
from torch import Tensor, nn

from tokexport.exporter.graph_io import GraphName
from tokexport.exporter.quantization import quantized_layers
from tokexport.recipes.schema import QuantizeTable

_LARGEST_BYTE = 255


def round_layers(graph: GraphName, module: nn.Module, table: QuantizeTable) -> None:
    """Put in place of weights what their rounded numbers stand for, and round what int8 layers read.

    Args:
        graph: which graph the module is traced to.
        module: with float32 weights; changed in place.
        table: what is quantized.
    """
    for name, layer in quantized_layers(graph, module, table).items():
        weight = module.get_parameter(name)
        stored = weight.detach().T if layer.kind == "matrix" else weight.detach()
        restored = torch.from_numpy(layer.round(stored.numpy()).restored())
        with torch.no_grad():
            weight.copy_(restored.T if layer.kind == "matrix" else restored)
        if layer.kind == "matrix" and layer.bits == "int8":
            module.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(_round_input)


def _round_input(_layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
    (x,) = inputs
    return (rounded_to_bytes(x),)


def rounded_to_bytes(x: Tensor) -> Tensor:
    """Return what a tensor is after ONNX' ``DynamicQuantizeLinear``, as float32: 256 even steps that hit zero."""
    if not x.numel():
        return x
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / _LARGEST_BYTE
    if not scale > 0:
        return x
    zero = (-low / scale).round().clamp(0, _LARGEST_BYTE)
    return ((x / scale).round() + zero).clamp(0, _LARGEST_BYTE).sub(zero) * scale
