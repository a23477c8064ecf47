"""The benchmark for GPUs, on a small model on the CPU: all of it but the kernels."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks.gpu import Run, main
from tokexport.engines.worker import Workload
from tokexport.exporter.export import planned


def ran(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_every_arm_gives_a_row_and_is_not_measured_again(tmp_path: Path):
    once = ("--device", "cpu", "--repeats", 1, "--new-tokens", 2, "--text-tokens", 4, "--out", tmp_path / "out")
    once = (*once, "--no-verify", "--method", "adsc", "--engine", "ort", "--engine", "tensorrt-rtx")
    outcome = ran(*once)
    assert outcome.exit_code == 0, outcome.output
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(document["arms"]) == ["ort adsc", "tensorrt-rtx adsc"]
    row = document["arms"]["ort adsc"]
    assert row["mean_vision_tokens"] == (576 + 288 + 144 + 72) / 4
    assert row["ttft_ms"]["median"] > 0
    assert row["device_bytes"] is None
    # Float32 is not what TensorRT takes; a GPU that is missing is another reason.
    assert "does not run graphs in float32" in document["arms"]["tensorrt-rtx adsc"]["failed"]
    assert "| ort | adsc |" in (tmp_path / "out" / "results.md").read_text()
    ran(*once)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["arms"]["ort adsc"] == row
    other = ran(*once, "--repeats", 2)
    assert other.exit_code == 1
    assert "choose another --out" in other.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_is_missing(tmp_path: Path):
    outcome = ran("--out", tmp_path / "out")
    assert outcome.exit_code == 1
    assert "this benchmark cannot run here: it needs an NVIDIA GPU, and there is none; to try" in outcome.output
    assert not (tmp_path / "out").exists()


def test_an_unknown_engine_is_refused(tmp_path: Path):
    outcome = ran("--device", "cpu", "--engine", "ort-cude", "--out", tmp_path / "out")
    assert (outcome.exit_code, (tmp_path / "out").exists()) == (1, False)
    assert "there is no engine 'ort-cude'; choose from: " in outcome.output


@pytest.mark.parametrize(
    ("num_layers", "method", "mean"),
    [(32, "full", 576.0), (32, "adsc", 249.75), (32, "metacompress", 58.0), (16, "adsc", 252.0)],
)
def test_the_model_is_llava_with_the_papers_budgets(num_layers: int, method: str, mean: float):
    run = Run(
        device="cuda",
        num_layers=num_layers,
        workload=Workload(text_tokens=64, new_tokens=64),
        repeats=1,
        with_verify=False,
        out=Path("out"),
    )
    made, _ = planned(run.recipe(method))
    assert made.plan.mean_vision_tokens == mean
    assert (made.model.spec.hidden_size, made.recipe.export.dtype) == (4096, "float16")
