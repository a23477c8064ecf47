"""The least times: figures worked out by hand, and machines that cannot be."""

import pytest

from tokexport.errors import InputError
from tokexport.exporter.time_bound import Machine, decode_bound_ms, prefill_bound_ms, time_bounds

MACHINE = Machine(gflops_per_s=100, gb_per_s=10)


@pytest.mark.parametrize(
    ("flops", "weight_bytes", "ms"),
    [(2 * 10**9, 10**6, 20), (10**6, 5 * 10**7, 5)],
    ids=["computing is slower", "reading is slower"],
)
def test_a_prefill_takes_what_is_slower(flops: int, weight_bytes: int, ms: float):
    assert prefill_bound_ms(MACHINE, flops=flops, weight_bytes=weight_bytes) == pytest.approx(ms)


def test_a_decode_step_reads_weights_and_cache():
    assert decode_bound_ms(MACHINE, weight_bytes=4 * 10**7, kv_bytes=10**7) == pytest.approx(5)


def test_the_bounds_of_a_plan_are_those_of_its_parts():
    report = {
        "flops": {"full": 4 * 10**9, "compressed": 2 * 10**9},
        "kv_bytes": {"full": 2 * 10**7, "compressed": 10**7},
        "disk_bytes": {"graphs": {"decoder_model_merged": {"weights": 4 * 10**7}}},
    }
    bounds = time_bounds(report, MACHINE)
    assert bounds["prefill_ms"] == {"full": pytest.approx(40), "compressed": pytest.approx(20)}
    assert bounds["decode_ms_per_token"] == {"full": pytest.approx(6), "compressed": pytest.approx(5)}
    assert bounds["machine"]["gb_per_s"] == 10


def test_figures_are_read_as_doctor_prints_them():
    assert Machine.parse("180,20.5") == Machine(gflops_per_s=180, gb_per_s=20.5)


@pytest.mark.parametrize("text", ["180", "180,20,3", "fast,20", ""])
def test_what_is_no_pair_of_numbers_is_refused(text: str):
    with pytest.raises(InputError, match=r"must be 'here', or GFLOP/s and GB/s as 'tokexport doctor' prints them"):
        Machine.parse(text)


@pytest.mark.parametrize(("text", "what"), [("0,20", "0 GFLOP/s"), ("180,-1", "-1 GB/s"), ("nan,20", "nan GFLOP/s")])
def test_a_machine_that_computes_nothing_is_refused(text: str, what: str):
    with pytest.raises(InputError, match=f"^a machine of {what} computes nothing; give a number above 0$"):
        Machine.parse(text)
