"""The least time that a prefill and a decode step can take on a machine, from two figures of it.

A prefill multiplies: its FLOPs over the rate of matrix products. A decode step reads all weights and the cache once:
their bytes over the bandwidth of memory. An engine comes near to these or does not; it does not beat them, unless the
figures were measured at a worse moment than the run.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from tokexport.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a machine reaches.

    Attributes:
        gflops_per_s: 1e9 FLOPs a second in products of large matrices, a multiply-add being two.
        gb_per_s: 1e9 bytes a second in reading memory.
        precision: of the matrices: float32, float16, int8 or int4; empty where the figures were given.
        threads: that computed; None where the figures were given.
    """

    gflops_per_s: float
    gb_per_s: float
    precision: str = ""
    threads: int | None = None

    def __post_init__(self) -> None:
        for value, unit in ((self.gflops_per_s, "GFLOP/s"), (self.gb_per_s, "GB/s")):
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"a machine of {value:g} {unit} computes nothing; give a number above 0")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read figures that were given, e.g. ``180,20``.

        Raises:
            InputError: not two numbers above 0.
        """
        try:
            gflops, gigabytes = (float(part) for part in text.split(","))
        except ValueError:
            raise InputError(
                f"the machine {text} must be 'here', or GFLOP/s and GB/s as 'tokexport doctor' prints them, e.g. 180,20"
            ) from None
        return cls(gflops_per_s=gflops, gb_per_s=gigabytes)


def prefill_bound_ms(machine: Machine, *, flops: int, weight_bytes: int) -> float:
    """Return the least milliseconds of a prefill: what is slower of computing, and of reading the weights once."""
    return 1e3 * max(flops / (1e9 * machine.gflops_per_s), weight_bytes / (1e9 * machine.gb_per_s))


def decode_bound_ms(machine: Machine, *, weight_bytes: int, kv_bytes: int) -> float:
    """Return the least milliseconds of one decode step: weights and what the cache holds are read once."""
    return 1e3 * (weight_bytes + kv_bytes) / (1e9 * machine.gb_per_s)


def decoder_weight_bytes(report: Mapping[str, Any]) -> int:
    """Return the bytes of the decoder's weights, given what ``tokexport plan`` reports."""
    return report["disk_bytes"]["graphs"]["decoder_model_merged"]["weights"]


def time_bounds(report: Mapping[str, Any], machine: Machine) -> dict[str, Any]:
    """Return what ``tokexport plan --machine --json`` adds, given its report: milliseconds, full and compressed."""
    weights = decoder_weight_bytes(report)
    plans = ("full", "compressed")
    return {
        "machine": dict(vars(machine)),
        "prefill_ms": {
            plan: prefill_bound_ms(machine, flops=report["flops"][plan], weight_bytes=weights) for plan in plans
        },
        "decode_ms_per_token": {
            plan: decode_bound_ms(machine, weight_bytes=weights, kv_bytes=report["kv_bytes"][plan]) for plan in plans
        },
    }
