"""Whether this machine has the disk and the memory that a plan asks for."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from tokexport.exporter.footprint import GPU_DTYPE


def fit_here(report: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Compare a plan with this machine.

    Args:
        report: what ``tokexport plan`` reports.
        folder: where artefacts are made; it need not exist yet.

    Returns:
        Bytes needed and free of the disk, bytes needed, free and there at all of memory, and whether each is enough.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    disk_needed, disk_free = report["disk_bytes"]["free_needed"], shutil.disk_usage(existing).free
    memory, memory_needed = psutil.virtual_memory(), report["memory_bytes"]["compressed"]["total"]
    is_here = report["dtype"] != GPU_DTYPE
    return {
        "disk": {"needed": disk_needed, "free": disk_free, "fits": disk_needed <= disk_free},
        "memory": {
            "needed": memory_needed,
            "free": memory.available,
            "installed": memory.total,
            "fits": memory_needed <= memory.available or not is_here,
        },
    }


def fit_warnings(fit: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each thing that there is too little of."""
    disk, memory = fit["disk"], fit["memory"]
    warnings: list[str] = []
    if not disk["fits"]:
        warnings.append(
            f"warning: the artefact needs {_size(disk['needed'])} of disk and {_size(disk['free'])} are free here, so "
            "build and export will refuse; make room, give another -o, or store weights in fewer bits"
        )
    if not memory["fits"]:
        there = f"{_size(memory['installed'])} are installed, of which {_size(memory['free'])} are free"
        advice = "free some" if memory["needed"] <= memory["installed"] else "take --quantize, or a larger machine"
        warnings.append(
            f"warning: a run takes about {_size(memory['needed'])} of memory in ONNX Runtime on the CPU and {there}; "
            f"{advice}"
        )
    return warnings


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
