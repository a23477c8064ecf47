"""The machine and the libraries that a measurement was made with."""

import os
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from tokexport.exporter.bundle import library_versions


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What a reader needs to judge a figure."""

    cpu: str
    cores: int
    memory_bytes: int
    os: str
    python: str
    threads: int
    gpus: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)


def available_cores() -> int:
    """Return the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_environment(threads: int | None = None) -> Environment:
    """Return the environment of this process."""
    import psutil

    return Environment(
        cpu=_cpu_name(),
        cores=available_cores(),
        memory_bytes=psutil.virtual_memory().total,
        os=platform.platform(terse=True),
        python=platform.python_version(),
        threads=threads or available_cores(),
        gpus=list_gpus(),
        versions=library_versions(),
    )


def list_gpus() -> tuple[str, ...]:
    """Return each NVIDIA GPU with its driver and compute capability, nothing where there is no driver."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[part.strip() for part in line.split(",")] for line in listed.splitlines() if line.count(",") == 2]
    return tuple(f"{name}, driver {driver}, compute capability {capability}" for name, driver, capability in rows)


def missing_gpu() -> str:
    """Return what keeps torch, and what runs beside it, from an NVIDIA GPU; nothing where it has one."""
    import torch

    if torch.cuda.is_available():
        return ""
    found = list_gpus()
    if found:
        return f"torch {torch.__version__} does not see {found[0]}; install a torch with CUDA for this driver"
    return "it needs an NVIDIA GPU, and there is none"


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
