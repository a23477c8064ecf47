"""Measuring this machine, and comparing it with a plan."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokexport.engines import machine
from tokexport.engines.fit import fit_here, fit_warnings
from tokexport.engines.machine import _best, _product, machine_of, measure_machine
from tokexport.errors import BackendUnavailableError
from tokexport.exporter.export import design
from tokexport.exporter.time_bound import Machine
from tokexport.recipes.load import load_recipe


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int4"])
def test_every_precision_of_a_cpu_is_measured(precision: str):
    found = measure_machine(precision, threads=1, matrix_KN=(64, 96), weight_bytes=1 << 16, seconds=0.01)
    assert (found.precision, found.threads) == (precision, 1)
    assert min(found.gflops_per_s, found.gb_per_s) > 0


def test_a_precision_that_no_cpu_engine_runs_is_refused():
    with pytest.raises(BackendUnavailableError, match=r"^backend 'ort' does not run graphs in bfloat16"):
        measure_machine("bfloat16")


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int4"])
def test_what_is_timed_is_the_product_of_the_precision(precision: str):
    (found,) = _product(precision, 3, (64, 32), 1)()
    # Rows of 64 halves, times columns of 64 halves.
    np.testing.assert_allclose(np.asarray(found, np.float32), np.full((3, 32), 16.0), rtol=0.02)


def test_the_machine_is_measured_with_the_matrices_of_a_recipe(monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}

    def recorded(precision: str, **options: Any) -> Machine:
        asked.update(options, precision=precision)
        return Machine(gflops_per_s=1, gb_per_s=1)

    monkeypatch.setattr(machine, "measure_machine", recorded)
    made = design(load_recipe("mini_full", ['quantize.decoder="int4"', "quantize.block_size=32"]))
    machine_of(made, weight_bytes=7, threads=3)
    spec = made.model.spec
    assert asked.pop("matrix_KN") == (spec.hidden_size, spec.intermediate_size)
    assert asked == {"precision": "int4", "threads": 3, "weight_bytes": 7, "block_size": 32}


def test_the_fastest_of_at_least_three_runs_counts():
    runs: list[int] = []
    assert 0 < _best(lambda: runs.append(0), 0) < 1
    assert len(runs) == 4  # and one to get warm


def plan(disk: int, memory: int, dtype: str = "float32") -> dict[str, Any]:
    return {"disk_bytes": {"free_needed": disk}, "memory_bytes": {"compressed": {"total": memory}}, "dtype": dtype}


def test_a_small_plan_fits(tmp_path: Path):
    fit = fit_here(plan(1, 1), tmp_path / "not" / "there" / "yet")
    assert (fit["disk"]["fits"], fit["memory"]["fits"]) == (True, True)
    assert fit_warnings(fit) == []


def test_a_plan_that_is_too_large_is_warned_of(tmp_path: Path):
    fit = fit_here(plan(10**18, 10**15), tmp_path)
    assert (fit["disk"]["fits"], fit["memory"]["fits"]) == (False, False)
    disk, memory = fit_warnings(fit)
    assert disk.startswith("warning: the artefact needs 1000000000.0 GB of disk and ")
    assert memory.startswith("warning: a run takes about 1000000.0 GB of memory in ONNX Runtime on the CPU and ")
    assert memory.endswith("; take --quantize, or a larger machine")


def test_memory_that_is_installed_but_taken_is_to_be_freed(tmp_path: Path):
    fit = fit_here(plan(1, 1), tmp_path)
    memory = {"needed": 4_000_000_000, "free": 3_000_000_000, "installed": 8_000_000_000, "fits": False}
    (warning,) = fit_warnings({**fit, "memory": memory})
    assert warning.endswith("and 8.0 GB are installed, of which 3.0 GB are free; free some")


def test_the_memory_of_a_gpu_is_not_compared_with_that_of_the_cpu(tmp_path: Path):
    assert fit_here(plan(1, 10**15, "bfloat16"), tmp_path)["memory"]["fits"]
