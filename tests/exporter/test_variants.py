"""Forms of methods that a search tries, and what of them fits into a budget, of 4 x 4 tokens and 4 layers."""

from dataclasses import replace

import pytest

from tests.exporter.test_methods import FULL, SPEC
from tokexport.errors import RecipeError
from tokexport.exporter.budget import fullest_choice
from tokexport.exporter.drops import Drop
from tokexport.exporter.method import Method, list_methods, load_method
from tokexport.exporter.methods.adsc import Adsc
from tokexport.exporter.methods.fastv import FastV
from tokexport.exporter.methods.metacompress import MetaCompress
from tokexport.exporter.methods.pool import Pool
from tokexport.exporter.methods.relevance import Relevance
from tokexport.exporter.methods.resize import Resize
from tokexport.exporter.methods.sample import Sample
from tokexport.exporter.methods.sparsevlm import SparseVlm
from tokexport.exporter.methods.visionzip import VisionZip
from tokexport.exporter.plan import TokenPlan

# The size of LLaVA's grid, with few layers.
LARGE = replace(SPEC, vision_grid=(24, 24), num_layers=8, class_token_layers=8)
NEEDS_WEIGHTS = {"metacompress", "relevance"}


def part_of_tokens(limit: float):
    """Return a load that a plan fills when its mean of tokens per layer is ``limit``."""
    return lambda plan: plan.mean_vision_tokens / limit


@pytest.mark.parametrize("name", sorted(set(list_methods()) - NEEDS_WEIGHTS))
def test_every_form_of_a_method_fits_the_model_and_a_budget(name: str):
    full = TokenPlan.uncompressed(LARGE)
    forms = load_method(name).variants(LARGE)
    assert len({repr(form) for form in forms}) == len(forms)
    for form in forms:
        mean = form.within(LARGE, full, part_of_tokens(300)).plan(LARGE, full).mean_vision_tokens
        assert 290 <= mean <= 300 or name == "resize"


def test_forms_are_all_combinations_of_what_is_chosen():
    forms = {(form.layer, form.positions) for form in FastV.variants(SPEC)}
    assert forms == {(layer, positions) for layer in (1, 2, 3) for positions in ("keep", "renumber")}


def test_forms_of_a_schedule_differ_in_pattern_position_phase_and_layers():
    forms = Adsc.variants(LARGE)
    assert {(form.pattern, form.positions, form.phase) for form in forms} == {
        (pattern, positions, phase)
        for pattern in ("stride", "grid")
        for positions in ("keep", "renumber")
        for phase in (0.5, 0.99)
    }
    assert {tuple(drop.layer for drop in form.drops) for form in forms} == {(2, 4, 6), (1,), (3, 5), (0, 3)}


def test_a_form_that_its_method_refuses_is_left_out():
    assert {form.drops[0].layer for form in SparseVlm.variants(LARGE)} == {1, 2, 3}


def test_what_reads_the_tower_is_tried_in_the_layer_before_too():
    assert [form.tower_layer for form in VisionZip.variants(SPEC)] == [None, 0]


@pytest.mark.parametrize("name", sorted(NEEDS_WEIGHTS))
def test_a_method_that_has_to_be_trained_has_no_form_of_its_own(name: str):
    with pytest.raises(RecipeError) as refused:
        load_method(name).variants(SPEC)
    assert str(refused.value) == (
        f"[[compress]] {name} needs weights, which only a recipe can give; give one that has them"
    )


def test_a_method_without_a_form_that_fits_says_why():
    with pytest.raises(RecipeError, match="chooses by the attention of a class token, which the vision tower of this"):
        VisionZip.variants(replace(SPEC, class_token_layers=None))


@pytest.mark.parametrize(
    ("method", "limit", "expected"),
    [
        (Sample(keep=8, phase=0.0), 6.5, Sample(keep=6, phase=0.0)),
        (Sample(keep=8), 1, Sample(keep=2)),  # the fewest, where all are too many
        (Resize(keep=4), 8, Resize(keep=4)),
        (Resize(keep=4), 9, Resize(keep=9)),
        (FastV(layer=2, keep=2), 12, FastV(layer=2, keep=8)),  # (2 x 16 + 2 x 8) / 4
        (Pool(kernel=2, stride=2), 6, Pool(keep=6)),
        (Relevance(weights="some.safetensors", keep=3), 8, Relevance(weights="some.safetensors", keep=8)),
        (MetaCompress(weights="some.safetensors", keep=4), 9, MetaCompress(weights="some.safetensors", keep=4)),
        (MetaCompress(weights="untrained", keep=4), 9, MetaCompress(weights="untrained", keep=9)),
    ],
    ids=str,
)
def test_a_method_keeps_what_a_budget_allows(method: Method, limit: float, expected: Method):
    assert method.within(SPEC, FULL, part_of_tokens(limit)) == expected


def test_a_schedule_costs_no_more_than_a_budget_allows():
    halved = Adsc(drops=(Drop(layer=1, keep=8), Drop(layer=3, keep=4)))
    squares = TokenPlan.uncompressed(SPEC)

    def load(plan: TokenPlan) -> float:
        # 16 x 16 in every layer is 4 times the budget; of unequal layers the squares are more than those of the mean.
        return 4 * sum(n * n for n in plan.per_layer) / sum(n * n for n in squares.per_layer)

    found = halved.within(SPEC, FULL, load)
    assert 0.4 < load(found.plan(SPEC, FULL)) <= 1


def test_a_schedule_that_cannot_be_cheap_enough_comes_as_near_as_it_can():
    ranked_by_the_layer_before = SparseVlm(drops=(Drop(layer=1, keep=8), Drop(layer=3, keep=4)))
    found = ranked_by_the_layer_before.within(SPEC, FULL, part_of_tokens(2))
    assert found.plan(SPEC, FULL).mean_vision_tokens > 2


def test_the_fullest_choice_is_the_one_that_takes_most_and_not_too_much():
    choices = [(0.5, "half"), (1.0, "all"), (1.1, "more"), (1.2, "most")]
    assert fullest_choice(choices) == "all"
    assert fullest_choice(choices[2:]) == "more"
    assert fullest_choice([]) is None
