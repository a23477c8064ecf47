"""Muon in float32: the same steps as PyTorch's, and updates whose singular values are near one."""

import pytest
import torch
from torch.optim import Muon

from tokexport.training.muon import Float32Muon, orthogonalized

SHAPES = [(24, 64), (64, 24), (32, 32)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_steps_like_pytorchs(shape: tuple[int, int]):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    rule = {"lr": 0.01, "weight_decay": 0.1}
    steps = [Float32Muon([ours], **rule), Muon([theirs], adjust_lr_fn="match_rms_adamw", **rule)]
    for _ in range(3):
        gradient = torch.randn(shape, generator=generator)
        for parameter, optimizer in zip((ours, theirs), steps, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    # PyTorch's rounds to bfloat16.
    assert (ours - theirs).norm() < 0.02 * moved


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_update_has_singular_values_near_one(shape: tuple[int, int]):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalized(matrix))
    assert 0.6 < values.min() <= values.max() < 1.3


def test_a_matrix_without_gradient_stays():
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    Float32Muon([parameter], lr=1.0, weight_decay=1.0).step()
    assert torch.equal(parameter.data, torch.ones(2, 2))
