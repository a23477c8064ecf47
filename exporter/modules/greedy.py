"""The greedy choice of tokens that span the largest volume, one operator that becomes one ``Loop`` in a graph.

B batch, N tokens to choose from, M chosen ones
"""

from typing import Any

import torch
from onnxscript import FLOAT, script, values
from onnxscript.onnx_opset import opset18
from torch import Tensor

# Below what any token leaves, and so of a token that is chosen already.
_TAKEN = -1.0
# A token that adds less than rounding does adds nothing: what it leaves of others is not divided by it.
_LEAST = 1e-6


def greedy_gains(kernel_BNN: Tensor, count: int) -> Tensor:
    """Return what each token adds to those chosen before it, (B, N), of which the highest ``count`` are the choice.

    It is the greedy maximum of the determinant of a kernel's rows and columns (Chen et al., arXiv 1709.05135, algorithm
    1), by an incremental Cholesky decomposition. A token that is chosen has the variance that it had given those before
    it, any other what it had when the last one was chosen. Of equals the first is chosen.

    Args:
        kernel_BNN: symmetric and positive semidefinite, float32, values from -1 to 1; N may be 0.
        count: M.
    """
    if torch.compiler.is_exporting():
        return _greedy_gains(kernel_BNN, count)
    return _gains(kernel_BNN, count, None)


def followed_gains(kernel_BNN: Tensor, followed_BM: Tensor) -> Tensor:
    """Return the same (B, N) where ``followed_BM`` are chosen in this order, whatever adds the most.

    What a token adds is lowered by how much more another would have added, so that a choice against the rule does not
    have the score that it would have by the rule.
    """
    return _gains(kernel_BNN, followed_BM.shape[1], followed_BM)


def _gains(kernel_BNN: Tensor, count: int, followed_BM: Tensor | None) -> Tensor:
    row_B = torch.arange(len(kernel_BNN), device=kernel_BNN.device)
    left_BN = kernel_BNN.diagonal(dim1=1, dim2=2).clone()
    gain_BN = left_BN.clone()
    root_BNM = kernel_BNN.new_zeros(*left_BN.shape, count)
    for step in range(min(count, left_BN.shape[1])):
        best_B1, pick_B1 = left_BN.max(-1, keepdim=True)
        gain_BN = torch.where(left_BN <= _TAKEN, gain_BN, left_BN)
        if followed_BM is not None:
            pick_B1 = followed_BM[:, step : step + 1]
            gain_BN = gain_BN.scatter(1, pick_B1, 2 * left_BN.gather(1, pick_B1) - best_B1)
        pick_B, variance_B1 = pick_B1[:, 0], left_BN.gather(1, pick_B1)
        shared_BN = kernel_BNN[row_B, pick_B] - (root_BNM @ root_BNM[row_B, pick_B].unsqueeze(-1)).squeeze(-1)
        column_BN = shared_BN / variance_B1.clamp(min=_LEAST).sqrt()
        root_BNM[:, :, step] = column_BN
        left_BN = (left_BN - column_BN * column_BN).scatter(1, pick_B1, _TAKEN)
    return gain_BN


@torch.library.custom_op("tokexport::greedy_gains", mutates_args=())
def _greedy_gains(kernel_BNN: Tensor, count: int) -> Tensor:
    return _gains(kernel_BNN, count, None)


@_greedy_gains.register_fake
def _(kernel_BNN: Tensor, count: int) -> Tensor:  # noqa: ARG001 - the operator's own
    return torch.empty_like(kernel_BNN[..., 0])


# The signatures of onnxscript speak of ONNX values, and know no attributes of a function's own. Graphs are of opset 18
# until the exporter has put functions into them, and then made newer.
op: Any = opset18


@script(values.Opset("tokexport", 1), default_opset=opset18)
def _loop(kernel: FLOAT, count: int) -> FLOAT:
    """The same in ONNX: a loop of no steps where there are no tokens, so that decoding does not pay for it."""
    # One token more, which is never chosen: TensorRT looks for a largest also in the loop that takes no step.
    size = op.Shape(kernel, start=1, end=2)
    padded = op.Pad(kernel, [0, 0, 0, 0, 1, 1])
    number = op.Range(op.Constant(value_int=0), op.Add(op.Squeeze(size), 1), op.Constant(value_int=1))
    is_itself = op.Equal(op.Unsqueeze(number, [1]), op.Unsqueeze(number, [0]))
    variances = op.ReduceSum(op.Mul(padded, op.Cast(is_itself, to=1)), [2], keepdims=0)
    taken = op.Constant(value_float=-1.0)
    least = op.Constant(value_float=1e-6)
    last = op.Constant(value_ints=[2])
    left = op.Where(op.Equal(number, size), taken, variances)
    gain = op.Identity(left)
    most = op.Constant(value_int=count)
    place = op.Range(op.Constant(value_int=0), most, op.Constant(value_int=1))
    root = op.ConstantOfShape(op.Concat(op.Shape(padded, start=0, end=2), op.Unsqueeze(most, [0]), axis=0))
    for step in range(op.Min(op.Squeeze(size), most)):
        pick = op.ArgMax(left, axis=1, keepdims=1)
        gain = op.Where(op.LessOrEqual(left, taken), gain, left)
        variance = op.GatherElements(left, pick, axis=1)
        own = op.Unsqueeze(op.GatherND(root, pick, batch_dims=1), last)
        shared = op.Sub(op.GatherND(padded, pick, batch_dims=1), op.Squeeze(op.MatMul(root, own), last))
        column = op.Div(shared, op.Sqrt(op.Max(variance, least)))
        root = op.Add(root, op.Mul(op.Unsqueeze(column, last), op.Cast(op.Equal(place, step), to=1)))
        left = op.Where(op.Equal(number, pick), taken, op.Sub(left, op.Mul(column, column)))
    return op.Slice(gain, [0], size, [1])


def onnx_greedy_gains(kernel: Any, count: int) -> Any:
    """How ``torch.onnx.export`` writes the operator."""
    return _loop(kernel, count=count)
