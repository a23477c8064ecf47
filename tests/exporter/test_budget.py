"""Methods set to a mean of vision tokens per layer, of 4 x 4 tokens and 4 layers."""

from dataclasses import dataclass

import pytest

from tests.exporter.test_methods import FULL, SPEC
from tokexport.errors import RecipeError
from tokexport.exporter.budget import is_met, nearest_choice
from tokexport.exporter.drops import Drop
from tokexport.exporter.method import Method
from tokexport.exporter.methods.adsc import Adsc
from tokexport.exporter.methods.fastv import FastV
from tokexport.exporter.methods.metacompress import MetaCompress
from tokexport.exporter.methods.pool import Pool
from tokexport.exporter.methods.pyramiddrop import PyramidDrop
from tokexport.exporter.methods.resize import Resize
from tokexport.exporter.methods.sample import Sample
from tokexport.exporter.methods.sparsevlm import SparseVlm
from tokexport.exporter.plan import TokenPlan, VlmSpec, even_grids

HALVED = (Drop(layer=1, keep=8), Drop(layer=3, keep=4))  # 16, 8, 8, 4: 9 on average


@dataclass(frozen=True, kw_only=True)
class Fixed(Method):
    """A method without an option for how many tokens stay."""

    def plan(self, spec: VlmSpec, arriving: TokenPlan) -> TokenPlan:
        return arriving.thinned_before_llm(4)


@pytest.mark.parametrize(
    ("method", "budget", "expected"),
    [
        (Sample(keep=8, phase=0.0), 4, Sample(keep=4, phase=0.0)),
        (FastV(layer=1, keep=8), 7, FastV(layer=1, keep=4)),  # (16 + 3 x 4) / 4
        (Resize(keep=4), 9, Resize(keep=9)),
        (Pool(kernel=2, stride=2), 4, Pool(kernel=2, stride=2)),
        (Pool(kernel=2, stride=2), 6, Pool(keep=6)),
        (MetaCompress(weights="untrained", keep=4), 6, MetaCompress(weights="untrained", keep=6)),
        (MetaCompress(weights="some.safetensors", keep=4), 4, MetaCompress(weights="some.safetensors", keep=4)),
        (Adsc(drops=HALVED), 9, Adsc(drops=HALVED)),
        # Layers 1 and 3 halved are 0 and 2, and (7 + 7 + 3 + 3) / 4. At 0 and 1 as many as before would stay.
        (Adsc(drops=HALVED), 5, Adsc(drops=(Drop(layer=0, keep=7), Drop(layer=2, keep=3)))),
    ],
    ids=str,
)
def test_a_method_meets_a_budget_with_its_own_options(method: Method, budget: int, expected: Method):
    assert method.for_budget(SPEC, FULL, budget) == expected


def test_fractions_of_a_schedule_become_counts():
    halves = PyramidDrop(drops=(Drop(layer=1, keep=0.5), Drop(layer=3, keep=0.5)))
    assert halves.for_budget(SPEC, FULL, 5).drops == (Drop(layer=0, keep=7), Drop(layer=2, keep=3))


def test_a_schedule_goes_nowhere_that_its_method_refuses():
    ranked_by_the_layer_before = SparseVlm(drops=HALVED)
    found = ranked_by_the_layer_before.for_budget(SPEC, FULL, 7)
    assert found.drops[0].layer == 1
    assert is_met(found.plan(SPEC, FULL).mean_vision_tokens, 7)
    with pytest.raises(
        RecipeError, match="sparsevlm: nothing comes within 2 % of 4 vision tokens per layer; the nearest"
    ):
        ranked_by_the_layer_before.for_budget(SPEC, FULL, 4)


@pytest.mark.parametrize("budget", [3, 6, 8, 12])
def test_a_grid_stays_a_grid_at_every_budget(budget: int):
    found = Adsc(drops=HALVED, pattern="grid").for_budget(SPEC, FULL, budget)
    assert is_met(found.plan(SPEC, FULL).mean_vision_tokens, budget)
    assert {drop.keep for drop in found.drops} <= even_grids((4, 4)).keys()


@pytest.mark.parametrize(
    ("method", "budget", "problem"),
    [
        (Resize(keep=4), 6, r"\[\[compress\]\] resize: nothing comes within 2 % of 6 .* the nearest is 4 or 9"),
        (FastV(layer=2, keep=8), 4, "fastv: nothing comes within 2 % of 4 vision tokens per layer; the nearest is 9$"),
        (Sample(keep=8), 16, "sample: nothing comes within 2 % of 16 vision tokens per layer; the nearest is 15$"),
        (Adsc(drops=HALVED), 1, "adsc: nothing comes within 2 % of 1 vision tokens per layer; the nearest is 2"),
        (MetaCompress(weights="w", keep=4), 6, "the weights w are trained for 4 vision tokens per layer, not 6; train"),
        (Fixed(), 6, "test_budget has no option that a budget sets"),
    ],
    ids=str,
)
def test_a_budget_that_cannot_be_met_is_refused_with_the_nearest(method: Method, budget: int, problem: str):
    with pytest.raises(RecipeError, match=problem):
        method.for_budget(SPEC, FULL, budget)


@pytest.mark.parametrize(("mean", "met"), [(98, True), (102, True), (97.9, False), (102.1, False)])
def test_a_budget_is_met_within_two_percent(mean: float, met: bool):
    assert is_met(mean, 100) == met


def test_a_method_without_any_setting_is_refused():
    with pytest.raises(RecipeError, match="x: no setting fits the model"):
        nearest_choice([], 5, "x:")


def test_grids_of_nearly_square_cells():
    # 2 x 2 cells of 2 x 2, ..., no 1 x 4: its cells are 4 x 1.
    assert even_grids((4, 4)) == {2: (1, 2), 4: (2, 2), 6: (2, 3), 8: (2, 4), 9: (3, 3), 12: (3, 4)}
