"""From a module without memory to an ONNX graph without weights.

Modules stand on the meta device, tracing runs on fake tensors, and the graph's initializers are
bound to lazy tensors that are read when the file is written. No weight is in memory before that.
"""

import ast
import contextlib
import functools
import logging
import warnings
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)
from onnxscript.optimizer import fold_constants
from onnxscript.version_converter import convert_version
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.onnx._internal.exporter._core import exported_program_to_ir
from torch.onnx._internal.exporter._registration import ONNXRegistry

from tokexport.exporter.graph_io import GraphIO, TensorIO, node_scope
from tokexport.exporter.modules.ops import onnx_translations
from tokexport.exporter.passes.fold_weight_transposes import FoldWeightTransposes
from tokexport.exporter.passes.share_sizes import ShareSizes
from tokexport.exporter.repeated_layers import SCOPES, RepeatedLayers, renamed
from tokexport.exporter.weights import Weights, converted

OPSET = 24
# Sizes to trace with: none is 0 or 1, which torch.export would take for constants.
_EXAMPLE_SIZES = {"batch": 2, "num_images": 2, "prefix": 5, "suffix": 7, "length": 6, "num_logits": 3}
_EXAMPLE_CAPACITY = 1024


def trace(module: nn.Module, io: GraphIO, *, dtype: str, vision: int = 0) -> ir.Model:
    """Trace ``module`` (on the meta device) into a graph with the inputs and outputs ``io``.

    Args:
        module: takes the inputs in their order; a trailing cache as one list of pairs.
        io: the names and dimensions that the graph gets.
        dtype: of the floating-point weights.
        vision: the size of the dimension ``vision``.

    Returns:
        The model; initializers that stand for weights have no value yet.
    """
    sizes = {
        **_EXAMPLE_SIZES,
        "vision": vision,
        "prefix + vision + suffix": _EXAMPLE_SIZES["prefix"] + vision + _EXAMPLE_SIZES["suffix"],
    }
    module = module.to(getattr(torch, dtype)).eval().requires_grad_(False)
    layers = RepeatedLayers(module)
    with FakeTensorMode(allow_non_fake_inputs=True), _quiet():
        _make_fake(module)
        tensors = [_example(tensor, sizes) for tensor in io.inputs]
        shapes = [
            {axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(tensor.shape) if isinstance(dim, str)}
            for tensor in io.inputs
        ]
        plain = sum(not tensor.name.startswith("past_key_values.") for tensor in io.inputs)
        with layers.set_apart():
            model = _converted(module, _with_pairs(tensors, plain), _with_pairs(shapes, plain))
        layers.put_back(model, _converted)
    fold_constants(model, onnx_shape_inference=True)  # which gives every value a type, too
    Sequential(
        ShareSizes(),
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        CommonSubexpressionEliminationPass(),
        RemoveUnusedNodesPass(),
    )(model)
    _name_nodes(model.graph)
    ClearMetadataAndDocStringPass()(model)  # stack traces, with the paths of this machine
    _name_inputs_and_outputs(model, io)
    return model


def bind_weights(model: ir.Model, weights: Weights, names: Mapping[str, str], dtype: str) -> dict[str, str]:
    """Give every initializer without a value the tensor it stands for, read when it is needed.

    Args:
        model: a traced graph.
        weights: where tensors come from.
        names: for each parameter of the traced module, its name in ``weights``.
        dtype: what floating-point weights are converted to.

    Returns:
        For each parameter the name of its initializer, in the order of the graph.
    """
    bound: list[str] = []
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            assert value.shape is not None
            value.const_value = _lazy(name, names[name], weights, value.shape, dtype)
            bound.append(name)
    fold = FoldWeightTransposes()
    fold(model)
    return {name: fold.renamed.get(name, name) for name in bound}


def _converted(module: nn.Module, args: tuple[Any, ...], dynamic_shapes: tuple[Any, ...]) -> ir.Model:
    """Return the graph of a module of fake parameters, whose values are missing in it."""
    program = torch.export.export(module, args, dynamic_shapes=dynamic_shapes, strict=False)
    translations = _translations()
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, GraphModule)]
    called = {node.target for graph in graphs for node in graph.nodes if node.op == "call_function"}
    # The exporter leaves these checks out.
    called.discard(torch.ops.aten._assert_tensor_metadata.default)
    if all(map(translations.is_registered, called)):
        # It would trace the program once more to take operators apart, which nothing here needs.
        program.run_decompositions = lambda *_, **__: program
    model = exported_program_to_ir(program, registry=translations)
    convert_version(model, OPSET, fallback=True)
    for value in model.graph.initializers.values():
        if isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            value.const_value = None
    InlinePass()(model)
    return model


@functools.cache
def _translations() -> ONNXRegistry:
    """Return how the exporter of PyTorch writes each operator, which ``torch.onnx.export`` finds out at every call."""
    registry = ONNXRegistry.from_torchlib(opset_version=OPSET)
    for operator, translation in onnx_translations().items():
        registry.register_op(operator, translation)
    return registry


def _lazy(name: str, stored_name: str, weights: Weights, shape: ir.Shape, dtype: str) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        tensor = converted(weights.load(stored_name), getattr(torch, dtype), stored_name)
        return ir.tensor(tensor.contiguous(), name=name)

    return ir.LazyTensor(read, dtype=ir.DataType[_IR_NAMES[dtype]], shape=shape, name=name)


_IR_NAMES = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "int64": "INT64"}


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Silence the exporter about torchvision, which is not needed, and about its own use of old names."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


def _make_fake(module: nn.Module) -> None:
    """Replace parameters on the meta device by fake ones on the CPU; buffers are data and stay."""
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            setattr(child, name, nn.Parameter(fake, requires_grad=False))
        assert not any(buffer.is_meta for buffer in child.buffers(recurse=False)), child


def _example(tensor: TensorIO, sizes: Mapping[str, int]) -> Tensor:
    shape = [dim if isinstance(dim, int) else sizes.get(dim, _EXAMPLE_CAPACITY) for dim in tensor.shape]
    return torch.zeros(shape, dtype=getattr(torch, tensor.dtype))


def _with_pairs(values: Sequence[Any], plain: int) -> tuple[Any, ...]:
    """Return the first ``plain`` values, then the others as one list of pairs, if there are any."""
    rest = values[plain:]
    pairs = [tuple(rest[i : i + 2]) for i in range(0, len(rest), 2)]
    return (*values[:plain], pairs) if pairs else tuple(values[:plain])


def _name_inputs_and_outputs(model: ir.Model, io: GraphIO) -> None:
    """Give inputs, outputs and symbolic dimensions the names of the interface, throughout the graph."""
    symbols: dict[str, str] = {}
    for value, tensor in zip(model.graph.inputs, io.inputs, strict=True):
        assert value.shape is not None
        symbols |= {
            str(found.value): wanted
            for found, wanted in zip(value.shape, tensor.shape, strict=True)
            if isinstance(found, ir.SymbolicDim) and isinstance(wanted, str)
        }
    for value in _all_values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape([renamed(dim, symbols) for dim in value.shape])
    for values, tensors in ((model.graph.inputs, io.inputs), (model.graph.outputs, io.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            value.name = tensor.name
            value.shape = ir.Shape(tensor.shape)
            value.dtype = ir.DataType[_IR_NAMES[tensor.dtype]]


# The second is that of sizes, which are read for the whole graph.
_NO_SCOPES = ("", "_empty_nn_module_stack_from_metadata_hook")


def _name_nodes(graph: ir.Graph) -> None:
    """Name every node by the module it comes from, e.g. ``/layers.0/self_attn/q_proj/MatMul``."""
    seen: dict[str, int] = {}
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "['']"))
        scope = next((entry for entry in reversed(scopes[:-1]) if entry not in _NO_SCOPES), "")
        name = f"{node_scope(scope)}{node.op_type}".replace("//", "/")
        seen[name] = seen.get(name, 0) + 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


def _all_values(graph: ir.Graph) -> Sequence[ir.Value]:
    return [*graph.inputs, *(output for node in graph for output in node.outputs)]
