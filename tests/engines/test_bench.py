"""The benchmark: its rows, its keys, the bytes it counts, and what it leaves behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NUM_LAYERS
from tokexport.engines.backend import SessionOptions, Source
from tokexport.engines.bench import _control, bench, bench_artefact
from tokexport.engines.worker import EngineProcess, Workload
from tokexport.errors import BackendUnavailableError, BundleError, CheckpointError, InputError, RecipeError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.export import planned
from tokexport.exporter.method import load_methods, plan_tokens
from tokexport.recipes.load import load_recipe

Copy = Callable[[Bundle], Bundle]

TEXT, NEW = 8, 2
BYTES_PER_TOKEN = 2 * 2 * 16 * 4
"""Keys and values of one layer: 2 heads of 16 numbers in float32."""


@pytest.fixture(scope="module")
def measured(tiny_adsc: Bundle) -> dict[str, Any]:
    before = sorted(tiny_adsc.path.parent.iterdir())
    options = SessionOptions.for_bundle(tiny_adsc, threads=1)
    asked: dict[str, Any] = {"text_tokens": TEXT, "new_tokens": NEW, "repeats": 1, "with_profile": True}
    report = bench(tiny_adsc, "ort", options, **asked).report()
    return {**report, "left behind": [path for path in sorted(tiny_adsc.path.parent.iterdir()) if path not in before]}


def row_of(report: dict[str, Any], engine: str, method: str) -> dict[str, Any]:
    return next(row for row in report["rows"] if (row["engine"], row["method"]) == (engine, method))


def test_the_rows_are_two_engines_by_two_plans_and_the_controls(measured: dict[str, Any]):
    assert [(row["engine"], row["method"], row["is_control"]) for row in measured["rows"]] == [
        ("transformers", "full", False),
        ("ort", "full", False),
        ("torch-eager", "adsc", False),
        ("ort", "adsc", False),
        ("ort", "sample", True),
        ("ort", "random", True),
    ]


def test_a_row_has_the_keys_of_the_contract(measured: dict[str, Any]):
    for row in measured["rows"]:
        assert row.keys() >= {
            "engine",
            "dtype",
            "compressed",
            "ttft_ms",
            "vision_ms",
            "prefill_ms",
            "decode_ms_per_token",
            "kv_bytes",
            "peak_rss_bytes",
        }
        assert row["ttft_ms"].keys() == {"median", "p10", "p90"}


def test_the_report_has_the_keys_of_the_contract(measured: dict[str, Any]):
    assert measured.keys() >= {"rows", "speedup", "environment"}
    assert measured["speedup"].keys() >= {"ttft", "prefill", "predicted_prefill"}
    assert measured["environment"]["threads"] == 1
    assert measured["workload"] == {"text_tokens": TEXT, "new_tokens": NEW, "seed": 0, "repeats": 1, "batch": 1}


def test_every_time_and_size_is_a_positive_number(measured: dict[str, Any]):
    for row in measured["rows"]:
        times = [row["vision_ms"], row["prefill_ms"], row["decode_ms_per_token"], *row["ttft_ms"].values()]
        assert min(*times, row["peak_rss_bytes"], row["kv_bytes"]) > 0


def test_the_first_token_takes_vision_and_prefill(measured: dict[str, Any]):
    for row in measured["rows"]:
        assert row["ttft_ms"]["median"] == pytest.approx(row["vision_ms"] + row["prefill_ms"])


@pytest.mark.parametrize(
    ("engine", "method", "tokens"),
    [
        # Text and answer in all 4 layers, and the vision tokens of each layer.
        ("transformers", "full", 4 * (TEXT + NEW) + 4 * 16),
        ("ort", "full", 4 * (TEXT + NEW) + 4 * 16),
        ("torch-eager", "adsc", 4 * (TEXT + NEW) + 16 + 8 + 8 + 4),
        ("ort", "adsc", 4 * (TEXT + NEW) + 16 + 8 + 8 + 4),
        ("ort", "sample", 4 * (TEXT + NEW) + 4 * 9),
        ("ort", "random", 4 * (TEXT + NEW) + 4 * 9),
    ],
)
def test_the_cache_has_the_bytes_of_the_plan(measured: dict[str, Any], engine: str, method: str, tokens: int):
    row = row_of(measured, engine, method)
    assert row["kv_bytes"] == row["kv_bytes_planned"] == tokens * BYTES_PER_TOKEN


def test_controls_have_the_mean_tokens_of_the_method(measured: dict[str, Any]):
    method = row_of(measured, "ort", "adsc")["mean_vision_tokens"]
    assert method == (16 + 8 + 8 + 4) / NUM_LAYERS
    assert [row["mean_vision_tokens"] for row in measured["rows"] if row["is_control"]] == [method, method]


def test_speedups_compare_the_engine_with_itself_on_all_tokens(measured: dict[str, Any]):
    before, after = row_of(measured, "ort", "full"), row_of(measured, "ort", "adsc")
    assert measured["speedup"]["prefill"] == pytest.approx(before["prefill_ms"] / after["prefill_ms"])
    assert measured["speedup"]["ttft"] == pytest.approx(before["ttft_ms"]["median"] / after["ttft_ms"]["median"])
    assert measured["speedup"]["predicted_prefill"] == after["predicted_prefill"]


def test_the_plan_is_compared_with_the_artefact_in_its_engine(measured: dict[str, Any]):
    figures = {figure["name"]: figure for figure in measured["foretold"]["figures"]}
    row = row_of(measured, "ort", "adsc")
    for name in ("peak_rss_bytes", "prefill_ms", "decode_ms_per_token"):
        assert figures[name]["measured"] == row[name]
    assert 0 < figures["peak_rss_bytes"]["terms"]["interpreter"] < row["peak_rss_bytes"]


def test_the_method_is_profiled_as_a_part_of_the_full_prefill(measured: dict[str, Any]):
    method, full = measured["profile"]["method"], row_of(measured, "ort", "full")
    assert method["of_full_prefill"] == pytest.approx(method["ms"] / full["prefill_ms"])


def test_only_rows_with_fewer_tokens_are_called_compressed(measured: dict[str, Any]):
    assert [row["compressed"] for row in measured["rows"]] == [False, False, True, True, True, True]


def test_the_gate_on_the_cache_is_passed(measured: dict[str, Any]):
    gate = next(gate for gate in measured["gates"] if gate["name"] == "kv_bytes_off_plan")
    assert (gate["value"], gate["passed"]) == (0, True)


def test_nothing_is_left_beside_the_artefact(measured: dict[str, Any]):
    assert measured["left behind"] == []


def test_an_uncompressed_artefact_is_measured_against_transformers_alone(tiny_full: Bundle, copied: Copy):
    bundle = copied(tiny_full)
    report = bench_artefact(bundle.path, backend="ort", threads=1, repeats=1, new_tokens=1).report()
    assert [(row["engine"], row["method"]) for row in report["rows"]] == [("transformers", "full"), ("ort", "full")]
    assert json.loads((bundle.path / "reports" / "bench.json").read_text()) == json.loads(json.dumps(report))


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"repeats": 0}, "repeats 0 must be at least 1"),
        ({"new_tokens": 0}, "new-tokens 0 must be at least 1"),
        ({"text_tokens": -1}, "text-tokens -1 must be at least 0"),
        (
            {"text_tokens": 500},
            "532 tokens are more than the 512 positions of the model; ask for fewer text or new tokens",
        ),
    ],
    ids=str,
)
def test_a_number_that_cannot_be_measured_with_is_refused(tiny_adsc: Bundle, wrong: dict[str, Any], expected: str):
    with pytest.raises(InputError) as caught:
        bench(tiny_adsc, "ort", SessionOptions.for_bundle(tiny_adsc), **wrong)
    assert str(caught.value) == expected


def test_a_profile_of_an_engine_that_writes_none_is_refused_before_the_work(tiny_adsc: Bundle):
    with pytest.raises(BackendUnavailableError, match=r"^backend 'torch-eager' writes no profile; leave --profile out"):
        bench(tiny_adsc, "torch-eager", SessionOptions.for_bundle(tiny_adsc), with_profile=True)


@pytest.mark.parametrize(("control", "kept"), [("sample", 265), ("random", 265), ("resize", 256)])
def test_a_control_keeps_the_nearest_number_that_it_can(control: str, kept: int):
    made, _ = planned(load_recipe("mini_adsc"))
    plan = plan_tokens(load_methods([_control(control, made)]), made.model.spec)
    assert plan.per_layer == (kept,) * 8


def test_an_unknown_control_is_refused_and_leaves_nothing(tiny_adsc: Bundle):
    before = sorted(tiny_adsc.path.parent.iterdir())
    with pytest.raises(RecipeError, match=r"there is no method 'sampel'; did you mean 'sample'\?$"):
        bench(tiny_adsc, "ort", SessionOptions.for_bundle(tiny_adsc), controls=["sampel"], repeats=1)
    assert sorted(tiny_adsc.path.parent.iterdir()) == before


def opened(bundle: Bundle, backend: str, **options: Any) -> None:
    with EngineProcess(
        bundle.path, backend, SessionOptions.for_bundle(bundle, **options), Workload(text_tokens=2, new_tokens=1)
    ):
        pass


def test_an_engine_that_cannot_be_opened_gives_its_own_error(tiny_adsc: Bundle, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"^there is no model directory "):
        opened(tiny_adsc, "torch-eager", source=Source(model=str(tmp_path / "gone")))


def test_an_unknown_engine_gives_its_own_error(tiny_adsc: Bundle):
    with pytest.raises(BackendUnavailableError, match=r"^there is no backend 'onnx'"):
        opened(tiny_adsc, "onnx")


def test_a_damaged_artefact_gives_its_own_error(tiny_adsc: Bundle, copied: Copy):
    bundle = copied(tiny_adsc)
    path = bundle.graph_path("decoder_model_merged")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"is damaged: .* bytes, expected .*; build the artefact again$"):
        opened(bundle, "ort")


def test_a_workload_that_does_not_fit_gives_its_own_error(tiny_adsc: Bundle):
    options = SessionOptions.for_bundle(tiny_adsc, max_text_tokens=4)
    with (
        EngineProcess(tiny_adsc.path, "ort", options, Workload(text_tokens=9, new_tokens=1)) as engine,
        pytest.raises(InputError, match=r"^9 text tokens \(9 of them new\) do not fit into a cache for 4; "),
    ):
        engine.measure()
