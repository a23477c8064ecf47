"""CDPruner: choices worked out by hand, beside determinants, and on every rung of the ladder."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from tests.conftest import recipe_for
from tests.engines.conftest import with_checksums_of_today
from tokexport.engines.backend import Choice, SessionOptions
from tokexport.engines.compare import load_tolerances, misplaced_tokens
from tokexport.engines.generate import IMAGE, Conversation
from tokexport.engines.parity import verify
from tokexport.engines.torch_session import TorchSession
from tokexport.errors import RecipeError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.export import design
from tokexport.exporter.methods.cdpruner import CdPruner
from tokexport.exporter.modules import ops
from tokexport.exporter.modules.conditional_kernel import ConditionalKernel, Relevance, mean_likeness, stretched
from tokexport.exporter.modules.greedy import followed_gains, greedy_gains
from tokexport.recipes.schema import Recipe

OPTIONS = SessionOptions(max_text_tokens=64, max_images=2, threads=1)
CDPRUNER = {"method": "cdpruner", "keep": 6}
# Directions in the plane, in degrees, and the words all at 0 degrees; lengths do not matter.
DEGREES, LENGTHS = (0.0, 0.0, 60.0, 90.0), (1.0, 3.0, 2.0, 0.5)


def kernel(relevance: Relevance) -> Tensor:
    radians = torch.tensor(DEGREES).deg2rad()
    vision = torch.stack((radians.cos(), radians.sin()), -1) * torch.tensor(LENGTHS).unsqueeze(-1)
    text = torch.tensor([[[2.0, 0.0], [0.1, 0.0]]])
    nothing: Any = None
    return ConditionalKernel(relevance)(nothing, nothing, nothing, 0, len(DEGREES), (vision.unsqueeze(0), text))


def choice(kernel_BNN: Tensor, count: int) -> Choice:
    score_BN = greedy_gains(kernel_BNN, count)
    return Choice(score_BN.numpy(), ops.top_tokens(score_BN, count).numpy())


# --- by hand


@pytest.mark.parametrize(
    ("relevance", "kept", "gains"),
    [
        # All add 1, so the first is taken. Of its copy nothing is left, of 60 degrees 1 - 1/4, of 90 all.
        ("none", [0, 3], [1, 0, 3 / 4, 1]),
        # Relevance 1, 1, 1/2 and 0 of cosines 1, 1, 1/2 and 0: 60 degrees adds 1/4 of what it adds above.
        ("like", [0, 2], [1, 0, 3 / 16, 0]),
        # Relevance 0, 0, 1/2 and 1: 90 degrees is first, and 60 degrees is 30 from it, so that 1/4 of 1/4 is left.
        ("unlike", [2, 3], [0, 0, 1 / 16, 1]),
    ],
)
def test_two_tokens_are_chosen_by_what_each_adds(relevance: Relevance, kept: list[int], gains: list[float]):
    score = greedy_gains(kernel(relevance), 2)
    torch.testing.assert_close(score, torch.tensor([gains]), atol=1e-5, rtol=0)
    assert ops.top_tokens(score, 2).tolist() == [kept]


def test_the_likeness_to_words_is_the_mean_of_cosines():
    vision = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    text = torch.tensor([[[3.0, 0.0], [1.0, 1.0]]])
    expected = torch.tensor([[(1 + math.sqrt(0.5)) / 2, math.sqrt(0.5) / 2]])
    torch.testing.assert_close(mean_likeness(vision, text), expected)


def test_without_words_or_a_difference_all_tokens_are_as_relevant():
    assert mean_likeness(torch.ones(1, 3, 2), torch.ones(1, 0, 2)).tolist() == [[0.0, 0.0, 0.0]]
    assert stretched(torch.full((1, 3), 0.7)).tolist() == [[1.0, 1.0, 1.0]]


def test_relevance_is_stretched_from_0_to_1_for_each_image():
    found = stretched(torch.tensor([[0.2, 0.4, 0.3], [-5.0, 5.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0, 0.5], [0.0, 1.0, 0.5]]), atol=1e-4, rtol=0)


def test_of_copies_none_is_taken_twice():
    assert ops.top_tokens(greedy_gains(torch.ones(2, 6, 6), 4), 4).tolist() == [[0, 1, 2, 3]] * 2


def test_of_no_tokens_none_is_chosen():
    assert stretched(torch.ones(1, 0)).shape == (1, 0)
    assert greedy_gains(torch.ones(1, 0, 0), 4).shape == (1, 0)


def test_each_choice_makes_the_determinant_the_largest():
    root = torch.randn(2, 20, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernels = torch.nn.functional.normalize(root, dim=-1) @ torch.nn.functional.normalize(root, dim=-1).mT
    kernels *= torch.rand(2, 20, 1, generator=torch.Generator().manual_seed(1)).expand(-1, -1, 20)
    kernels = (kernels @ kernels.mT) / (kernels @ kernels.mT).amax()
    found = choice(kernels.float(), 6)
    for row, kernel_NN in enumerate(kernels):
        chosen: list[int] = []
        for _ in range(6):
            volumes = [
                -math.inf if i in chosen else kernel_NN[[*chosen, i]][:, [*chosen, i]].det().item() for i in range(20)
            ]
            chosen.append(int(np.argmax(volumes)))
        assert found.order[row].tolist() == chosen


# --- a choice that is followed


def test_what_the_rule_would_choose_has_the_same_scores_where_it_is_followed():
    root = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    kernel_BNN = root @ root.mT / 30
    score = greedy_gains(kernel_BNN, 5)
    order = torch.from_numpy(choice(kernel_BNN, 5).order)
    assert torch.equal(followed_gains(kernel_BNN, order), score)


def test_a_choice_against_the_rule_is_told_by_its_score():
    # 60 degrees adds 3/4 where 90 degrees would have added 1/4 more.
    score = followed_gains(kernel("none"), torch.tensor([[0, 2]]))
    torch.testing.assert_close(score, torch.tensor([[1, 0, 1 / 2, 1]]), atol=1e-5, rtol=0)
    tolerance = load_tolerances("float32")["scores"]
    assert misplaced_tokens(np.array([[0, 2]]), score.numpy(), tolerance) == (0, 1)


def test_of_equals_either_is_followed():
    # The copy in place of the first token.
    score = followed_gains(kernel("none"), torch.tensor([[1, 3]]))
    torch.testing.assert_close(score, torch.tensor([[0, 1, 3 / 4, 1]]), atol=1e-5, rtol=0)


# --- as a method


def test_a_budget_sets_how_many_stay_in_every_layer(checkpoint: Path):
    made = design(recipe_for(checkpoint, CDPRUNER))
    changed = made.methods[0].for_budget(made.model.spec, made.plans[0], 5)
    assert changed == CdPruner(keep=5)
    assert changed.plan(made.model.spec, made.plans[0]).per_layer == (5, 5, 5, 5)


def test_keeping_all_is_refused(checkpoint: Path):
    with pytest.raises(RecipeError, match=r"^\[\[compress\]\] cdpruner before layer 0: keep = 16"):
        design(recipe_for(checkpoint, {"method": "cdpruner", "keep": 16}))


# --- in the model


@pytest.mark.parametrize(
    "step",
    [CDPRUNER, {**CDPRUNER, "positions": "keep"}, {**CDPRUNER, "relevance": "none"}],
    ids=["by default", "positions kept", "no relevance"],
)
def test_every_rung_of_the_ladder_holds(checkpoint: Path, exported: Callable[[Recipe], Bundle], step: dict[str, Any]):
    found = verify(exported(recipe_for(checkpoint, step)), "ort", OPTIONS)
    assert [check for check in found.checks if not check.passed] == []
    assert "kept tokens, image 1, layer 0" in {check.name for check in found.checks}


@pytest.mark.parametrize("dtype", ["float16"])
def test_half_precision_keeps_what_the_reference_does_but_for_near_ties(
    checkpoint: Path, exported: Callable[[Recipe], Bundle], dtype: Any
):
    found = verify(exported(recipe_for(checkpoint, CDPRUNER, dtype=dtype)), "ort", OPTIONS)
    assert [check for check in found.checks if not check.passed] == []


def test_a_graph_that_takes_what_adds_the_least_fails(
    checkpoint: Path, exported: Callable[[Recipe], Bundle], tmp_path: Path
):
    bundle = Bundle.open(shutil.copytree(exported(recipe_for(checkpoint, CDPRUNER)).path, tmp_path / "copy"))
    path = bundle.graph_path("decoder_model_merged")
    model = ir.load(path)
    (loop,) = (node for node in model.graph if node.op_type == "Loop")
    (largest,) = (node for node in loop.attributes["body"].as_graph() if node.op_type == "ArgMax")
    largest.op_type = "ArgMin"
    ir.save(model, path)
    failure = verify(with_checksums_of_today(bundle), "ort", OPTIONS).first_failure
    assert failure is not None
    assert failure.name == "token scores, image 1, layer 0"


def test_the_choice_depends_on_the_question(checkpoint: Path):
    def kept(relevance: str, behind: list[int]) -> list[int]:
        session = TorchSession(design(recipe_for(checkpoint, {**CDPRUNER, "relevance": relevance})), OPTIONS)
        pixels = np.random.default_rng(0).standard_normal((1, 3, 56, 56)).astype(np.float32)
        Conversation(session).feed([5, IMAGE, *behind], [session.encode_images(pixels)])
        return session.choices[0].kept_BM[0].tolist()

    assert kept("like", [8, 9]) != kept("like", [300, 17])
    assert kept("none", [8, 9]) == kept("none", [300, 17])
