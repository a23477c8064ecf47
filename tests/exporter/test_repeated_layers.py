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
    x, seen = torch.randn(3, 6, WIDTH), torch.randn(3, 6)
    computed: Any = ReferenceEvaluator(ir.to_proto(graph)).run(None, {"x": x.numpy(), "seen": seen.numpy()})
    for wanted, value in zip(model(x, seen), computed, strict=True):
        np.testing.assert_allclose(value, wanted.detach().numpy(), rtol=1e-5, atol=1e-6)


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


def test_layers_run_as_before_when_they_were_traced(traced: Traced):
    model = Model(Layer(), Layer())
    traced(model)
    assert not any("forward" in vars(layer) for layer in model.layers)
