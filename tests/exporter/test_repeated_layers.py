"""Equal layers are traced once, and the graph is that of every layer traced where it stands."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from tokexport.exporter import trace as tracing
from tokexport.exporter.graph_io import GraphIO, TensorIO
from tokexport.exporter.repeated_layers import RepeatedLayers
from tokexport.exporter.trace import trace

WIDTH = 4


class Layer(nn.Module):
    """Something with a weight, an attribute, and two outputs."""

    def __init__(self, scale: float = 1.0, width: int = WIDTH) -> None:
        super().__init__()
        self.scale = scale
        self.inner = nn.Linear(WIDTH, width)

    def forward(self, x_BTD: Tensor, seen_BT: Tensor, *, factor: float = 1.0) -> tuple[Tensor, tuple[Tensor]]:
        return torch.tanh(self.inner(x_BTD)) * self.scale * factor, (seen_BT + x_BTD.shape[1],)


class Model(nn.Module):
    """Layers in a list; before ``halved`` every other token goes."""

    def __init__(self, *layers: nn.Module, order: tuple[int, ...] = (), factor: float = 1.0, halved: int = -1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.order = order or tuple(range(len(layers)))
        self.factor, self.halved = factor, halved

    def forward(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        for number, index in enumerate(self.order):
            if number == self.halved:
                x, seen = x[:, ::2], seen[:, ::2]
            x, (seen,) = self.layers[index](x, seen, factor=self.factor)
        return x, seen


class Pooled(nn.Module):
    """Layers whose output has a shape that nothing which comes in has."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Flatten(1, 2)) for _ in range(2))

    def forward(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (layer(x) for layer in self.layers)
        return (first * second).unflatten(1, x.shape[1:]), -seen


Traced = Callable[[nn.Module], tuple[ir.Model, int]]
SIZES = ("batch", "length")


def tensor(name: str, *shape: int | str) -> TensorIO:
    return TensorIO(name=name, dtype="float32", shape=shape)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Traced:
    """Trace a model; the second result is how many modules were traced for it."""
    converted, count = tracing._converted, 0  # pyright: ignore[reportPrivateUsage]

    def counting(*args: Any) -> ir.Model:
        nonlocal count
        count += 1
        return converted(*args)

    def get(model: nn.Module) -> tuple[ir.Model, int]:
        io = GraphIO(
            inputs=(tensor("x", *SIZES, WIDTH), tensor("seen", *SIZES)),
            outputs=(tensor("y", *SIZES, WIDTH), tensor("seen_then", *SIZES)),
        )
        graph = trace(copy.deepcopy(model).to("meta"), io, dtype="float32")
        weights = model.state_dict()
        for name, value in graph.graph.initializers.items():
            if value.const_value is None:
                value.const_value = ir.tensor(weights[name].numpy(), name=name)
        return graph, count

    monkeypatch.setattr(tracing, "_converted", counting)
    return get


def assert_same(graph: ir.Model, model: nn.Module) -> None:
    """Run both on inputs of other sizes than those that were traced."""
    x, seen = torch.randn(3, 6, WIDTH), torch.randn(3, 6)
    computed: Any = ReferenceEvaluator(ir.to_proto(graph)).run(None, {"x": x.numpy(), "seen": seen.numpy()})
    for wanted, value in zip(model(x, seen), computed, strict=True):
        np.testing.assert_allclose(value, wanted.detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "num_traces"),
    [
        pytest.param(Model(Layer(), Layer(), Layer()), 2, id="equal layers"),
        pytest.param(Model(Layer(), Layer(2.0), Layer(), Layer(2.0)), 3, id="two kinds of layers"),
        pytest.param(Model(Layer(), Layer(3.0), Layer()), 2, id="a layer like no other"),
        pytest.param(Model(Layer()), 1, id="one layer"),
        pytest.param(Model(Layer(), Layer(), order=(0, 1, 0)), 2, id="a layer that runs twice"),
        pytest.param(Model(Layer(), Layer(), factor=0.5), 2, id="an argument that is no tensor"),
        pytest.param(Model(Layer(), Layer(), Layer(), halved=1), 2, id="fewer tokens on the way"),
        pytest.param(Pooled(), 1, id="an output like no input"),
    ],
)
def test_the_graph_computes_what_the_model_does(model: nn.Module, num_traces: int, traced: Traced):
    graph, found = traced(model)
    assert found == num_traces
    assert_same(graph, model)


def test_a_layer_has_nodes_weights_and_sizes_of_its_own(traced: Traced):
    graph, _ = traced(Model(Layer(), Layer(), Layer(), halved=1))
    products = [node for node in graph.graph if node.op_type == "MatMul"]
    assert [node.name for node in products] == [f"/layers.{layer}/inner/MatMul" for layer in range(3)]
    assert {f"layers.{layer}.inner.{part}" for layer in range(3) for part in ("weight", "bias")} <= set(
        graph.graph.initializers
    )
    rows = [[str(dim) for dim in node.outputs[0].shape or ()] for node in graph.graph if node.op_type == "Tanh"]
    assert rows[0] == ["batch", "length", "4"]
    assert rows[1] == rows[2] != rows[0]
    assert {node.domain for node in graph.graph} == {""}
    assert set(graph.opset_imports) == {""}


def test_layers_run_as_before_when_they_were_set_apart():
    model = Model(Layer(), Layer(), Layer(3.0))
    layers = RepeatedLayers(model)

    def replaced() -> list[bool]:
        return ["forward" in vars(layer) for layer in model.layers]

    def fail_inside() -> None:
        with layers.set_apart():
            assert replaced() == [True, True, False]
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert replaced() == [False] * 3


def test_layers_with_hooks_buffers_or_other_values_are_not_equal():
    def apart(*layers: nn.Module) -> list[bool]:
        with RepeatedLayers(model := Model(*layers)).set_apart():
            return ["forward" in vars(layer) for layer in model.layers]

    assert apart(Layer(), Layer()) == [True, True]
    assert apart(Layer(1.0), Layer(True)) == [False, False]
    assert apart(Layer(), Layer(width=5)) == [False, False]
    hooked, buffered = Layer(), Layer()
    hooked.register_forward_hook(lambda *_: None)
    buffered.register_buffer("seen", torch.zeros(1))
    assert apart(Layer(), hooked, buffered, Layer()) == [True, False, False, True]


class Pair(nn.Module):
    """A layer of any function of its weight and two tensors."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))
        self.function = function

    def forward(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        return self.function(self.weight, x, seen)


class Pairs(nn.Module):
    """Two equal layers; between them, half of the tokens go from the second tensor alone, and come back behind."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Pair(function) for _ in range(2))

    def forward(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        wide = seen.unsqueeze(-1).expand_as(x) + 1
        x, wide = self.layers[0](x, wide)
        x, half = self.layers[1](x, wide[:, ::2])
        return x + half.mean(1, keepdim=True) * half.shape[1], seen * 2


def written(weight: Tensor, x: Tensor, mem: Tensor) -> tuple[Tensor, Tensor]:
    mem.mul_(weight)
    return x + 1, mem * 2


FUNCTIONS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], int]] = {
    "another pattern of equal sizes": (lambda weight, x, mem: (x * weight, mem - weight), 3),
    "an output that is an input": (lambda weight, x, mem: (x * weight, mem), 3),
    "constants": (lambda weight, x, mem: (x * weight, mem + torch.tensor([1.0, 2.0, 3.0, 4.0])), 3),
    "a write into an input": (written, 1),
    "sizes that depend on data": (
        lambda weight, x, mem: (x + (mem > weight).nonzero().float().sum(), mem * weight),
        1,
    ),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_what_layers_may_do_is_in_the_graph(case: str, traced: Traced):
    function, num_traces = FUNCTIONS[case]
    model = Pairs(function)
    graph, found = traced(model)
    assert found == num_traces
    assert_same(graph, model)
