"""What a compressed model may cost: time to the first token, bytes of the cache, FLOPs of the prefill.

FLOPs and bytes are exact in a plan. The time is foretold: from that of the uncompressed model, measured once, the part
of its prefill is taken away that the plan saves in FLOPs, and the part of its vision tower that a smaller image saves.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from tokexport.errors import InputError, nearest
from tokexport.exporter.plan import TokenPlan, VlmSpec, kv_cache_bytes, prefill_flops

Kind = Literal["ttft", "kv", "flops"]
KINDS: tuple[Kind, ...] = get_args(Kind)
UNITS: Mapping[Kind, Mapping[str, float]] = {
    "ttft": {"us": 1e-3, "ms": 1.0, "s": 1e3},
    "kv": {"kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "flops": {"M": 1e6, "G": 1e9, "T": 1e12},
}
"""What an amount is counted in: milliseconds, bytes, FLOPs."""

NAMES: Mapping[Kind, str] = {"ttft": "first token", "kv": "KV cache", "flops": "FLOPs"}
_SHOWN: Mapping[Kind, tuple[float, str]] = {"ttft": (1, "ms"), "kv": (1e6, "MB"), "flops": (1e9, "G")}
_NUMBER = re.compile(r"(?P<number>[-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*(?P<unit>[A-Za-z]*)")
# A session of an engine reaches about 0.95 of the speed-up that FLOPs foretell.
_REACHED = 0.95
# A time that is foretold may be off by so much, so what is over by less is measured.
_SLACK = 1.1


@dataclass(frozen=True, kw_only=True)
class CostBudget:
    """A ``--budget``: at most a part of what the uncompressed model costs, or at most an amount.

    Attributes:
        kind: what is limited.
        part: of the uncompressed model's, None for an amount.
        amount: in milliseconds, bytes or FLOPs, None for a part.
        text: as it was given.
    """

    kind: Kind
    part: float | None = None
    amount: float | None = None
    text: str

    @classmethod
    def parse(cls, text: str) -> "CostBudget":
        """Read ``ttft=0.5``, ``ttft=300ms``, ``kv=20MB`` or ``flops=120G``.

        Raises:
            InputError: another form, an unknown kind or unit, or a number that is not above 0.
        """
        name, separator, value = (part.strip() for part in text.partition("="))
        if name not in KINDS:
            raise InputError(f"a budget of {name!r} is not known{nearest(name, list(KINDS))}")
        kind = KINDS[KINDS.index(name)]
        units = UNITS[kind]
        found = _NUMBER.fullmatch(value)
        if not separator or found is None:
            raise InputError(
                f"the budget {text} must be a part of what the uncompressed model takes, e.g. {kind}=0.5, or an amount "
                f"with a unit ({', '.join(units)})"
            )
        number, unit = float(found["number"]), found["unit"]
        if not (math.isfinite(number) and number > 0):
            raise InputError(f"the budget {text} allows nothing; give a number above 0")
        if unit and unit not in units:
            raise InputError(f"the budget {text} is in {unit!r}, expected {' or '.join(units)}")
        if unit:
            return cls(kind=kind, amount=number * units[unit], text=text)
        if number > 1:
            raise InputError(
                f"the budget {text} is more than all that the uncompressed model takes; give a part below 1, or a unit "
                f"({', '.join(units)})"
            )
        return cls(kind=kind, part=number, text=text)

    def allowed(self, full: float) -> float:
        """Return the amount that is allowed, given that of the uncompressed model."""
        return self.amount if self.amount is not None else (self.part or 0) * full

    def limit(self, full: float) -> float:
        """Return the amount that is allowed, if that makes a difference.

        Raises:
            InputError: the uncompressed model meets the budget.
        """
        limit = self.allowed(full)
        if limit >= full:
            raise InputError(
                f"the budget {self.text} is met by the uncompressed model, which takes {amount_text(self.kind, full)}; "
                "give less, or leave it out"
            )
        return limit


def parse_budgets(texts: Sequence[str]) -> tuple[CostBudget, ...]:
    """Read every ``--budget``.

    Raises:
        InputError: none, a wrong one, or two of one kind.
    """
    budgets = tuple(CostBudget.parse(text) for text in texts)
    kinds = [budget.kind for budget in budgets]
    if not budgets:
        raise InputError("a search needs a budget, e.g. --budget flops=0.5")
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise InputError(f"the budget {kind} is given twice; give each once")
    return budgets


def amount_text(kind: Kind, amount: float) -> str:
    """Return an amount in a unit that people read."""
    scale, unit = _SHOWN[kind]
    if kind == "flops" and amount >= 1e12:
        scale, unit = 1e12, "T"
    return f"{amount / scale:,.{1 if amount / scale < 1000 else 0}f} {unit}"


@dataclass(frozen=True, kw_only=True)
class FullTimes:
    """What the uncompressed model took, in milliseconds."""

    ttft_ms: float
    vision_ms: float
    prefill_ms: float


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """Budgets of one model, as amounts.

    Attributes:
        spec: of the model.
        text_tokens: of the prompt beside one image.
        dtype: of the cache.
        limits: what is allowed.
        full: what the uncompressed model takes of the same.
        times: of the uncompressed model, None where no time is limited.
    """

    spec: VlmSpec
    text_tokens: int
    dtype: str
    limits: Mapping[Kind, float] = field(default_factory=dict)
    full: Mapping[Kind, float] = field(default_factory=dict)
    times: FullTimes | None = None

    @classmethod
    def of(
        cls,
        budgets: Sequence[CostBudget],
        spec: VlmSpec,
        *,
        text_tokens: int,
        dtype: str,
        times: FullTimes | None = None,
    ) -> "Allowance":
        """Return budgets as amounts.

        Raises:
            InputError: the uncompressed model meets one.
        """
        bare = cls(spec=spec, text_tokens=text_tokens, dtype=dtype, times=times)
        costs = bare.costs(TokenPlan.uncompressed(spec))
        full: dict[Kind, float] = {budget.kind: costs[budget.kind] for budget in budgets}
        limits: dict[Kind, float] = {budget.kind: budget.limit(full[budget.kind]) for budget in budgets}
        return cls(spec=spec, text_tokens=text_tokens, dtype=dtype, times=times, limits=limits, full=full)

    def measured(self, budgets: Sequence[CostBudget], ttft_ms: float) -> "Allowance":
        """Return what budgets allow where the uncompressed model, beside the candidates, took ``ttft_ms``."""
        whole: dict[Kind, float] = {**self.full, "ttft": ttft_ms}
        full: dict[Kind, float] = {budget.kind: whole[budget.kind] for budget in budgets}
        return replace(self, limits={budget.kind: budget.allowed(full[budget.kind]) for budget in budgets}, full=full)

    def costs(self, plan: TokenPlan) -> dict[Kind, float]:
        """Return what a plan costs; a time only where that of the uncompressed model is known."""
        flops = prefill_flops(self.spec, plan, self.text_tokens)
        kv = kv_cache_bytes(self.spec, plan, text_tokens=self.text_tokens, num_images=1, dtype=self.dtype)
        costs: dict[Kind, float] = {"kv": kv, "flops": flops}
        if self.times is not None:
            full = TokenPlan.uncompressed(self.spec)
            saved = 1 - flops / prefill_flops(self.spec, full, self.text_tokens)
            smaller = 1 - plan.emitted / full.emitted
            costs["ttft"] = (
                self.times.ttft_ms - _REACHED * saved * self.times.prefill_ms - smaller * self.times.vision_ms
            )
        return costs

    def load(self, costs: Mapping[Kind, float]) -> float:
        """Return the largest part of any budget that costs take up; 1 is all of it."""
        return max(costs[kind] / limit for kind, limit in self.limits.items())

    def excess(self, costs: Mapping[Kind, float]) -> str:
        """Return in words which costs are over their budgets, and by how much."""
        return " and ".join(
            f"{amount_text(kind, costs[kind])} of {kind} where {amount_text(kind, limit)} are allowed"
            for kind, limit in self.limits.items()
            if costs[kind] > limit
        )

    def may_meet(self, costs: Mapping[Kind, float]) -> bool:
        """Return whether costs by plan meet the budgets, as far as a plan can tell."""
        return all(costs[kind] <= limit * (_SLACK if kind == "ttft" else 1) for kind, limit in self.limits.items())

    def price(self, costs: Mapping[Kind, float]) -> float:
        """Return what the budgeted costs are beside the uncompressed model's, on average: by it the cheaper is told."""
        return sum(costs[kind] / full for kind, full in self.full.items()) / len(self.full)

    def report(self) -> dict[str, Any]:
        """Return the limits, and what they are parts of, for ``search.json``."""
        return {kind: {"limit": limit, "full": self.full[kind]} for kind, limit in self.limits.items()}
