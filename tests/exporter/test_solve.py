"""From a budget to schedules that meet it."""

from dataclasses import replace
from pathlib import Path

import pytest

from tokexport.errors import RecipeError
from tokexport.exporter.export import planned
from tokexport.exporter.plan import VlmSpec
from tokexport.exporter.solve import Budget, propose
from tokexport.recipes.load import load_recipe


@pytest.fixture(scope="module")
def spec() -> VlmSpec:
    made, _ = planned(load_recipe("llava15_full"))
    return made.model.spec


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kv=0.433", Budget(kind="kv", keep=0.433)),
        ("flops=0.46", Budget(kind="flops", keep=0.46)),
        ("kv=5e-1", Budget(kind="kv", keep=0.5)),
    ],
)
def test_a_budget_is_a_kind_and_a_part(text: str, expected: Budget):
    assert Budget.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("flop=0.5", "a budget of 'flop' is not known; did you mean 'flops'?"),
        ("=0.5", "a budget of '' is not known; choose one of: flops, kv"),
        ("0.5", "a budget of '0.5' is not known; choose one of: flops, kv"),
        ("kv", "the budget kv must be a part between 0 and 1, e.g. kv=0.433"),
        ("kv=half", "the budget kv=half must be a part between 0 and 1, e.g. kv=0.433"),
        ("flops=0", "the budget flops=0 must be a part between 0 and 1, e.g. flops=0.433"),
        ("kv=1", "the budget kv=1 must be a part between 0 and 1"),
        ("kv=43.3", "the budget kv=43.3 must be a part between 0 and 1"),
        ("kv=-0.5", "the budget kv=-0.5 must be a part between 0 and 1"),
        ("kv=nan", "the budget kv=nan must be a part between 0 and 1"),
    ],
)
def test_another_form_of_budget_is_refused(text: str, error: str):
    with pytest.raises(RecipeError) as caught:
        Budget.parse(text)
    assert str(caught.value).startswith(error)


@pytest.mark.parametrize("text", ["kv=0.433", "kv=0.5", "flops=0.46", "flops=0.9", "kv=0.2"])
def test_every_proposal_meets_the_budget(spec: VlmSpec, text: str):
    budget = Budget.parse(text)
    proposals = propose(spec, budget, text_tokens=36)
    assert proposals
    assert all(getattr(proposal, budget.kind) <= budget.keep for proposal in proposals)


def test_a_proposal_halves_at_rising_layers(spec: VlmSpec):
    for proposal in propose(spec, Budget.parse("kv=0.433"), text_tokens=36):
        layers, keeps = zip(*proposal.drops, strict=True)
        assert keeps == (288, 144, 72)[: len(keeps)]
        assert list(layers) == sorted(set(layers))
        assert layers[0] >= 1


def test_the_nearest_proposal_stands_first(spec: VlmSpec):
    kept = [proposal.kv for proposal in propose(spec, Budget.parse("kv=0.433"), text_tokens=36)]
    assert kept == sorted(kept, reverse=True)


def test_the_budget_of_the_paper_gives_a_schedule_like_that_of_the_recipe(spec: VlmSpec):
    # 250 of 576 tokens are 0.434; the recipe's 249.75 need 0.4336.
    three = next(p for p in propose(spec, Budget.parse("kv=0.4336"), text_tokens=36) if len(p.drops) == 3)
    assert three.kv == pytest.approx(249.75 / 576)
    (first, _), (second, _), (third, _) = three.drops
    assert 4 * first + 2 * second + third == 79


@pytest.mark.parametrize("text", ["kv=0.433", "flops=0.46"])
def test_what_a_proposal_says_is_what_its_recipe_plans(spec: VlmSpec, text: str):
    proposal = propose(spec, Budget.parse(text), text_tokens=36)[0]
    drops = ", ".join(f"{{layer = {layer}, keep = {keep}}}" for layer, keep in proposal.drops)
    _, report = planned(load_recipe("llava15_adsc", [f"compress.0.drops=[{drops}]"]), text_tokens=36)
    assert 1 - report["kv_bytes_vision"]["reduction"] == pytest.approx(proposal.kv)
    assert 1 - report["flops"]["reduction"] == pytest.approx(proposal.flops)


def test_a_proposal_can_be_pasted_into_a_recipe(spec: VlmSpec, tmp_path: Path):
    proposal = propose(spec, Budget.parse("kv=0.433"), text_tokens=36)[0]
    path = tmp_path / "pasted.toml"
    path.write_text(f'extends = "llava15_full"\n[[compress]]\nmethod = "adsc"\n{proposal.toml()}\n')
    made, _ = planned(load_recipe(str(path)))
    assert made.plan.mean_vision_tokens / 576 == pytest.approx(proposal.kv)


def test_evener_stretches_win_among_equals(spec: VlmSpec):
    # One halving of 4 layers: before layer 1, 2 or 3 it keeps 0.625, 0.75, 0.875.
    small = replace(spec, num_layers=4)
    single = [p for p in propose(small, Budget.parse("kv=0.8"), text_tokens=0) if len(p.drops) == 1]
    assert [proposal.drops for proposal in single] == [((2, 288),)]
    assert single[0].kv == 0.75


@pytest.mark.parametrize(
    ("text", "least"),
    # The three earliest halvings: (1 + 1/2 + 1/4 + 29/8) / 32 = 0.168.
    [("kv=0.01", "kv = 0.168"), ("kv=0.167", "kv = 0.168")],
)
def test_an_impossible_budget_names_the_least(spec: VlmSpec, text: str, least: str):
    with pytest.raises(RecipeError, match=rf"^no schedule of up to 3 halvings keeps only .*the least is {least}$"):
        propose(spec, Budget.parse(text), text_tokens=36)


def test_a_model_with_few_vision_tokens_is_halved_as_often_as_it_can(spec: VlmSpec):
    proposals = propose(replace(spec, vision_grid=(2, 2)), Budget.parse("kv=0.6"), text_tokens=36)
    assert {tuple(keep for _, keep in proposal.drops) for proposal in proposals} == {(2,), (2, 1)}
