"""From a budget to drop schedules: the way back from what a plan costs to the layers it drops at."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from typing import Any, Literal, get_args

from tokexport.errors import RecipeError, nearest
from tokexport.exporter.plan import TokenPlan, VlmSpec, kv_cache_bytes, prefill_flops

BudgetKind = Literal["kv", "flops"]
_MAX_BOTTLENECKS = 3
# Schedules this close to each other meet the budget equally well; the evener one is better.
_RESOLUTION = 0.005


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be kept: a part of the vision KV cache or of the prefill FLOPs."""

    kind: BudgetKind
    keep: float

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read ``kv=0.433`` or ``flops=0.46``.

        Raises:
            RecipeError: another form, an unknown kind, or a part outside of 0 to 1.
        """
        kind, separator, value = text.partition("=")
        kinds = list(get_args(BudgetKind))
        if kind not in kinds:
            raise RecipeError(f"a budget of {kind!r} is not known{nearest(kind, kinds)}")
        try:
            keep = float(value)
        except ValueError:
            keep = -1.0
        if not separator or not 0 < keep < 1:
            raise RecipeError(f"the budget {text} must be a part between 0 and 1, e.g. {kind}=0.433")
        return cls(kind="kv" if kind == "kv" else "flops", keep=keep)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A schedule of halvings with what it keeps of KV and FLOPs."""

    drops: tuple[tuple[int, int], ...]
    kv: float
    flops: float

    def toml(self) -> str:
        """Return the schedule as the ``drops`` of an ADSC recipe."""
        return "drops = [" + ", ".join(f"{{ layer = {layer}, keep = {keep} }}" for layer, keep in self.drops) + "]"

    def table(self) -> dict[str, Any]:
        """Return the schedule for ``--json``."""
        return {
            **asdict(self),
            "drops": [{"layer": layer, "keep": keep} for layer, keep in self.drops],
            "toml": self.toml(),
        }


def propose(spec: VlmSpec, budget: Budget, *, text_tokens: int) -> tuple[Proposal, ...]:
    """Return, for one to three halvings, the schedule that comes nearest to the budget from below.

    Of schedules within half a percent of each other the one with the evenest stretches is taken.

    Raises:
        RecipeError: no schedule of halvings meets the budget; the text says what the least is.
    """
    best: list[Proposal] = []
    least = 1.0
    most = min(_MAX_BOTTLENECKS, spec.num_vision_tokens.bit_length() - 1, spec.num_layers - 1)
    for count in range(1, most + 1):
        found = list(_schedules(spec, count, text_tokens))
        least = min([least, *(getattr(proposal, budget.kind) for proposal in found)])
        fits = [proposal for proposal in found if getattr(proposal, budget.kind) <= budget.keep]
        if fits:
            best.append(min(fits, key=lambda proposal: _rank(proposal, budget, spec)))
    if not best:
        raise RecipeError(
            f"no schedule of up to {_MAX_BOTTLENECKS} halvings keeps only {budget.kind} = {budget.keep}; "
            f"the least is {budget.kind} = {least:.3f}"
        )
    return tuple(sorted(best, key=lambda proposal: budget.keep - getattr(proposal, budget.kind)))


def _schedules(spec: VlmSpec, count: int, text_tokens: int) -> Iterator[Proposal]:
    full = TokenPlan.uncompressed(spec)
    full_flops = prefill_flops(spec, full, text_tokens)
    full_kv = kv_cache_bytes(spec, full, text_tokens=0, num_images=1, dtype="float16")
    keeps = [spec.num_vision_tokens >> (step + 1) for step in range(count)]
    for layers in combinations(range(1, spec.num_layers), count):
        plan = full
        for layer, keep in zip(layers, keeps, strict=True):
            plan = plan.thinned_before_layer(layer, keep)
        yield Proposal(
            drops=tuple(zip(layers, keeps, strict=True)),
            kv=kv_cache_bytes(spec, plan, text_tokens=0, num_images=1, dtype="float16") / full_kv,
            flops=prefill_flops(spec, plan, text_tokens) / full_flops,
        )


def _rank(proposal: Proposal, budget: Budget, spec: VlmSpec) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    missed = budget.keep - getattr(proposal, budget.kind)
    edges = [0, *(layer for layer, _ in proposal.drops), spec.num_layers]
    stretches = [after - before for before, after in pairwise(edges)]
    return int(missed / _RESOLUTION), max(stretches) - min(stretches), proposal.drops
