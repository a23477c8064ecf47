"""Where the time goes: traces read, nodes told apart, and a real profile of each phase."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from tests.conftest import adsc, recipe_for
from tokexport.engines.backend import SessionOptions
from tokexport.engines.cost_text import profile_remark, profile_rows
from tokexport.engines.profile import Kernel, Run, method_nodes, profile, read_runs, require_profile, summary
from tokexport.engines.worker import Workload
from tokexport.errors import BackendUnavailableError
from tokexport.exporter.bundle import Bundle
from tokexport.recipes.schema import Recipe

FASTV: dict[str, object] = {"method": "fastv", "layer": 2, "keep": 8}
METACOMPRESS: dict[str, object] = {"method": "metacompress", "keep": 6, "width": 8, "weights": "untrained"}
Export = Callable[[Recipe], Bundle]


def event(name: str, ts: int, dur: int, op: str = "") -> dict[str, Any]:
    return {"name": name, "ts": ts, "dur": dur, "args": {"op_name": op} if op else {}}


def test_kernels_belong_to_the_run_that_they_lie_in():
    trace = [
        event("session_initialization", 0, 90),
        event("/b/Add_kernel_time", 130, 5, "Add"),
        event("/a/MatMul_kernel_time", 110, 20, "MatMul"),
        event("model_run", 200, 50),
        event("model_run", 100, 50),
        event("/a/MatMul_kernel_time", 210, 30, "MatMul"),
        event("/a/MatMul_fence_before", 205, 1, "MatMul"),
    ]
    matmul = Kernel(node="/a/MatMul", op="MatMul", us=20)
    assert read_runs(json.dumps(trace)) == [
        Run(us=50, kernels=(matmul, Kernel(node="/b/Add", op="Add", us=5))),
        Run(us=50, kernels=(Kernel(node="/a/MatMul", op="MatMul", us=30),)),
    ]


def test_a_summary_is_the_mean_of_runs_by_kind_and_by_owner():
    def run(product: float, own: float) -> Run:
        kernels = (
            Kernel(node="/layers.0/MatMul", op="MatMul", us=product),
            Kernel(node="/bottlenecks.1/MatMul", op="MatMul", us=own),
            Kernel(node="/layers.0/q_proj/Add_2", op="Add", us=1000),
        )
        return Run(us=product + own + 2000, kernels=kernels)

    found = summary([run(5000, 1000), run(7000, 3000)], frozenset({"/layers.0/q_proj/Add_2"}))
    assert found["run_ms"] == 10
    assert found["kernels_ms"] == 9
    assert found["ops"] == [
        {"op": "MatMul", "count": 2, "ms": 8, "share": pytest.approx(8 / 9)},
        {"op": "Add", "count": 1, "ms": 1, "share": pytest.approx(1 / 9)},
    ]
    assert found["method"] == {"nodes": 2, "ms": 3, "share": pytest.approx(1 / 3)}


def names_of(bundle: Bundle) -> frozenset[str]:
    return method_nodes(ir.load(bundle.graph_path("decoder_model_merged")).graph)


def test_without_a_method_no_node_is_a_methods(tiny_full: Bundle):
    assert names_of(tiny_full) == frozenset()


def test_a_constant_gather_adds_nodes_of_its_own_only(tiny_adsc: Bundle):
    found = names_of(tiny_adsc)
    assert found
    assert all(name.startswith(("/bottlenecks.1/", "/bottlenecks.3/")) for name in found)


def test_the_queries_that_a_scorer_looks_with_are_the_methods(checkpoint: Path, exported: Export):
    found = names_of(exported(recipe_for(checkpoint, FASTV)))
    looked_with = {name for name in found if not name.startswith("/bottlenecks.")}
    # Layer 1 ran before; it computes queries for all tokens once more than the model does, for the last one.
    assert any(name.startswith("/layers.1/self_attn/q_proj/MatMul") for name in looked_with)
    # Its own queries, and everything behind the bottleneck, are the model's.
    assert not any(name.startswith("/layers.3/") for name in found)
    assert sum(name.startswith("/layers.1/self_attn/q_proj/MatMul") for name in found) == 1


@pytest.mark.parametrize("compress", [adsc(), METACOMPRESS, FASTV], ids=lambda table: str(table["method"]))
@pytest.mark.parametrize("engine", ["ort", "ort-portable"])
def test_a_profile_tells_phases_and_the_method_apart(
    checkpoint: Path, exported: Export, compress: dict[str, object], engine: str
):
    bundle = exported(recipe_for(checkpoint, compress))
    options = SessionOptions(max_text_tokens=10, max_images=1, threads=1)
    workload = Workload(text_tokens=8, new_tokens=2)
    report = profile(bundle, engine, options, workload, repeats=1, full_prefill_ms=2.0)
    assert report["phases"].keys() == {"vision", "prefill", "decode"}
    for phase in report["phases"].values():
        assert sum(op["share"] for op in phase["ops"]) == pytest.approx(1)
        assert phase["kernels_ms"] > 0
    assert "Conv" in {op["op"] for op in report["phases"]["vision"]["ops"]}
    attention = "GroupQueryAttention" if engine == "ort" else "Attention"
    assert {op["op"]: op["count"] for op in report["phases"]["decode"]["ops"]}[attention] == 4
    own = [report["phases"][phase]["method"]["ms"] for phase in ("vision", "prefill")]
    assert report["method"] == {"ms": pytest.approx(sum(own)), "of_full_prefill": pytest.approx(sum(own) / 2)}
    assert [part > 0 for part in own] == ([True, False] if compress is METACOMPRESS else [False, True])


def test_nothing_is_left_of_a_profile(tiny_adsc: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    options = SessionOptions(max_text_tokens=10, max_images=1, threads=1)
    profile(tiny_adsc, "ort", options, Workload(text_tokens=8, new_tokens=1), repeats=1, full_prefill_ms=1.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("engine", ["torch-eager", "transformers"])
def test_an_engine_without_a_profile_is_refused(engine: str):
    with pytest.raises(BackendUnavailableError, match=f"^backend '{engine}' writes no profile; leave --profile out"):
        require_profile(engine)


def test_small_kinds_are_shown_as_one_and_the_method_closes_a_phase():
    ops = [
        {"op": "MatMul", "count": 7, "ms": 98.5, "share": 0.985},
        {"op": "Add", "count": 2, "ms": 0.9, "share": 0.009},
        {"op": "Mul", "count": 1, "ms": 0.6, "share": 0.006},
    ]
    phase = {"run_ms": 101.0, "kernels_ms": 100.0, "ops": ops, "method": {"nodes": 3, "ms": 2.0, "share": 0.02}}
    bench = {"profile": {"phases": {"prefill": phase}, "method": {"ms": 2.0, "of_full_prefill": 0.01}}}
    assert list(profile_rows(bench)) == [
        ("prefill", "MatMul", "7", "98.5 ms", "98.5 %"),
        ("prefill", "2 other kinds", "3", "1.5 ms", "1.5 %"),
        ("prefill", "of it the method", "3", "2 ms", "2.0 %"),
    ]
    assert profile_remark(bench) == "Until the first token the method takes 2 ms, 1.0 % of the prefill of all tokens."
    assert (list(profile_rows({})), profile_remark({})) == ([], "")
