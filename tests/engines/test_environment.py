"""What is said of the machine that a figure was measured on."""

from pathlib import Path

import pytest
import torch

from tokexport.engines.environment import describe_environment, list_gpus, missing_gpu


def with_driver(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a driver's tool before all others."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_gpus_are_listed_with_driver_and_capability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with_driver(tmp_path, monkeypatch, "echo 'NVIDIA L4, 580.1, 8.9'; echo 'NVIDIA H200, 580.1, 9.0'")
    assert describe_environment().gpus == (
        "NVIDIA L4, driver 580.1, compute capability 8.9",
        "NVIDIA H200, driver 580.1, compute capability 9.0",
    )


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found'"])
def test_a_driver_without_a_gpu_lists_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str):
    with_driver(tmp_path, monkeypatch, script)
    assert list_gpus() == ()


def test_a_machine_without_a_driver_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list_gpus() == ()


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees the GPU here")
def test_a_gpu_that_torch_does_not_see_is_told_from_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with_driver(tmp_path, monkeypatch, "echo 'NVIDIA L4, 580.1, 8.9'")
    assert missing_gpu() == (
        f"torch {torch.__version__} does not see NVIDIA L4, driver 580.1, compute capability 8.9; install a torch with "
        "CUDA for this driver"
    )
    monkeypatch.setenv("PATH", "")
    assert missing_gpu() == "it needs an NVIDIA GPU, and there is none"
