"""Budgets of time, cache and FLOPs: what is read, what is refused, and what a plan takes of them."""

from dataclasses import replace

import pytest

from tests.exporter.test_methods import FULL, SPEC
from tokexport.engines.cost_budget import Allowance, CostBudget, FullTimes, amount_text, parse_budgets
from tokexport.errors import InputError
from tokexport.exporter.plan import kv_cache_bytes, prefill_flops

TIMES = FullTimes(ttft_ms=100.0, vision_ms=30.0, prefill_ms=60.0)


@pytest.mark.parametrize(
    ("text", "kind", "part", "amount"),
    [
        ("ttft=0.5", "ttft", 0.5, None),
        ("kv=1e-1", "kv", 0.1, None),
        ("ttft=300ms", "ttft", None, 300),
        ("ttft=0.3s", "ttft", None, 300),
        ("kv=20MB", "kv", None, 20e6),
        ("kv=1MiB", "kv", None, 2**20),
        ("flops=120G", "flops", None, 120e9),
        ("flops = 0.12 T", "flops", None, 0.12e12),
    ],
)
def test_a_budget_is_a_part_or_an_amount(text: str, kind: str, part: float | None, amount: float | None):
    budget = CostBudget.parse(text)
    assert (budget.kind, budget.part) == (kind, part)
    assert budget.amount == (None if amount is None else pytest.approx(amount))


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        ([], "a search needs a budget, e.g. --budget flops=0.5"),
        (["flop=0.5"], "a budget of 'flop' is not known; did you mean 'flops'?"),
        (
            ["flops"],
            "the budget flops must be a part of what the uncompressed model takes, e.g. flops=0.5, or an amount",
        ),
        (["flops=half"], "the budget flops=half must be a part of what the uncompressed model takes"),
        (["ttft=3min"], "the budget ttft=3min is in 'min', expected us or ms or s"),
        (["kv=20ms"], "the budget kv=20ms is in 'ms', expected kB or KB or MB or GB or KiB or MiB or GiB"),
        (["kv=0"], "the budget kv=0 allows nothing; give a number above 0"),
        (["kv=-1MB"], "the budget kv=-1MB allows nothing; give a number above 0"),
        (
            ["flops=2"],
            "the budget flops=2 is more than all that the uncompressed model takes; give a part below 1, or a",
        ),
        (["kv=0.5", "kv=2MB"], "the budget kv is given twice; give each once"),
    ],
    ids=str,
)
def test_budgets_that_mean_nothing_are_refused(texts: list[str], problem: str):
    with pytest.raises(InputError) as refused:
        parse_budgets(texts)
    assert str(refused.value).startswith(problem)


def allowed(*texts: str, times: FullTimes | None = None) -> Allowance:
    return Allowance.of(parse_budgets(texts), SPEC, text_tokens=8, dtype="float32", times=times)


@pytest.mark.parametrize("text", ["flops=1", "kv=1GB"])
def test_a_budget_that_the_uncompressed_model_meets_is_refused(text: str):
    with pytest.raises(InputError, match=rf"^the budget {text} is met by the uncompressed model, which takes .*; give"):
        allowed(text)


def test_costs_are_those_of_the_plan_and_the_fullest_budget_counts():
    half = FULL.thinned_before_llm(8)
    allowance = allowed("flops=0.5", "kv=0.9")
    costs = allowance.costs(half)
    assert costs["flops"] == prefill_flops(SPEC, half, 8)
    assert costs["kv"] == kv_cache_bytes(SPEC, half, text_tokens=8, num_images=1, dtype="float32")
    of_flops, of_kv = costs["flops"] / prefill_flops(SPEC, FULL, 8), 16 / 24
    assert allowance.load(costs) == pytest.approx(max(of_flops / 0.5, of_kv / 0.9))
    assert allowance.price(costs) == pytest.approx((of_flops + of_kv) / 2)
    assert not allowance.may_meet(costs)


def test_a_time_is_foretold_from_that_of_the_uncompressed_model():
    half = FULL.thinned_before_llm(8)
    allowance = allowed("ttft=0.7", times=TIMES)
    saved = 1 - prefill_flops(SPEC, half, 8) / prefill_flops(SPEC, FULL, 8)
    assert allowance.costs(FULL)["ttft"] == 100
    assert allowance.costs(half)["ttft"] == pytest.approx(100 - 0.95 * saved * 60)
    # 2 x 2 of 4 x 4 patches save three quarters of the tower too.
    assert allowance.costs(FULL.resized((2, 2)))["ttft"] < allowance.costs(FULL.thinned_before_llm(4))["ttft"] - 22


def test_a_time_that_is_foretold_a_little_over_the_budget_is_measured():
    allowance = allowed("ttft=70ms", times=TIMES)
    assert allowance.may_meet({"ttft": 76})
    assert not allowance.may_meet({"ttft": 78})


@pytest.mark.parametrize(
    ("kind", "amount", "text"),
    [("ttft", 93.24, "93.2 ms"), ("kv", 10e6, "10.0 MB"), ("flops", 5.2e9, "5.2 G"), ("flops", 8.3e12, "8.3 T")],
)
def test_amounts_are_read_in_their_units(kind: str, amount: float, text: str):
    assert amount_text(kind, amount) == text


def test_a_cache_in_half_precision_takes_half():
    full = {
        dtype: Allowance(spec=replace(SPEC), text_tokens=8, dtype=dtype).costs(FULL)["kv"]
        for dtype in ("float32", "float16")
    }
    assert full["float16"] == full["float32"] / 2
