"""Operators of PyTorch that are written otherwise than its exporter would, with tokens and without."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tokexport.exporter.graph_io import GraphIO, TensorIO
from tokexport.exporter.trace import trace


class Flattened(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (2, 2)).flatten(2) * 2


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.mT * 2).mT


class Converted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 3).to(torch.int64).to(torch.float32)


class TakenApart(nn.Module):
    """``rsub`` has no translation, so that the program is decomposed."""

    def forward(self, x: Tensor) -> Tensor:
        return 1 - x


@pytest.mark.parametrize(
    ("module", "op_types"),
    [
        (Flattened(), {"Reshape"}),
        (Transposed(), {"Transpose"}),
        (Converted(), {"Cast"}),
        (TakenApart(), {"Sub"}),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_an_operator_computes_what_it_does_in_pytorch(module: nn.Module, op_types: set[str], num_tokens: int):
    shape = ("batch", "length", 4)
    io = GraphIO(
        inputs=(TensorIO(name="x", dtype="float32", shape=shape),),
        outputs=(TensorIO(name="y", dtype="float32", shape=shape),),
    )
    model = trace(module, io, dtype="float32")
    found = {node.op_type for node in model.graph}
    assert op_types <= found
    assert not found & {"Einsum", "Flatten"}
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.linspace(-2, 2, 8 * num_tokens).reshape(2, num_tokens, 4)
    (y,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(np.asarray(y), module(x).numpy(), rtol=1e-6)
