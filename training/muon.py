"""Muon (https://kellerjordan.github.io/posts/muon/) for machines without matrix units for bfloat16.

PyTorch's orthogonalises in bfloat16 everywhere. On a CPU that computes it in software, that is eighty times as slow as
float32, and takes longer than the model.

R rows, C columns, K the smaller of both
"""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Muon

_COEFFICIENTS, _NUM_ITERATIONS, _LEAST_NORM = (3.4445, -4.7750, 2.0315), 5, 1e-7


class Float32Muon(Muon):
    """PyTorch's Muon, its updates orthogonalised in float32 and scaled to match AdamW's (arXiv 2502.16982)."""

    def __init__(self, params: Any, *, lr: float, weight_decay: float) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one step."""
        assert closure is None, "nothing here evaluates a loss twice"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                momentum_RC = state["momentum_buffer"]
                momentum_RC.lerp_(parameter.grad, 1 - group["momentum"])
                update_RC = orthogonalized(parameter.grad.lerp(momentum_RC, group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update_RC, alpha=-0.2 * group["lr"] * max(parameter.shape) ** 0.5)


def orthogonalized(matrix_RC: Tensor) -> Tensor:
    """Return a matrix of the same singular vectors, with singular values near 1, in float32.

    Five steps of a Newton-Schulz iteration, with Muon's coefficients.
    """
    matrix_KX = matrix_RC.float() if matrix_RC.shape[0] <= matrix_RC.shape[1] else matrix_RC.float().T
    matrix_KX = matrix_KX / matrix_KX.norm().clamp(min=_LEAST_NORM)
    a, b, c = _COEFFICIENTS
    for _ in range(_NUM_ITERATIONS):
        gram_KK = matrix_KX @ matrix_KX.T
        matrix_KX = torch.addmm(matrix_KX, torch.addmm(gram_KK, gram_KK, gram_KK, beta=b, alpha=c), matrix_KX, beta=a)
    return matrix_KX if matrix_RC.shape[0] <= matrix_RC.shape[1] else matrix_KX.T
