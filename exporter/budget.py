"""Which options of a method meet a budget: a mean of vision tokens per decoder layer, or what a plan may cost."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from tokexport.errors import RecipeError
from tokexport.exporter.plan import TokenPlan

TOLERANCE = 0.02
"""A budget is met by a mean that differs from it by at most this part."""

Load = Callable[[TokenPlan], float]
"""Returns the part of a budget that a plan takes up, 1 being all of it; with fewer tokens it is less."""

Choice = TypeVar("Choice")


def is_met(mean: float, tokens: int) -> bool:
    """Return whether a mean of vision tokens per layer meets a budget of ``tokens``."""
    return abs(mean - tokens) <= TOLERANCE * tokens


def nearest_choice(choices: Iterable[tuple[float, Choice]], tokens: int, where: str) -> Choice:
    """Return what comes nearest to a budget; of equals the first.

    Args:
        choices: the mean of vision tokens per layer of each, and what makes it.
        tokens: the budget.
        where: begins the text of the error, e.g. ``[[compress]] resize:``.

    Raises:
        RecipeError: none meets the budget; the text names the nearest.
    """
    found = list(choices)
    if not found:
        raise RecipeError(f"{where} no setting fits the model, so no budget can be met; leave it out")
    mean, best = min(found, key=lambda choice: abs(choice[0] - tokens))
    if not is_met(mean, tokens):
        means = [mean for mean, _ in found]
        below, above = [m for m in means if m < tokens], [m for m in means if m > tokens]
        nearest = [f"{m:.4g}" for m in (*([max(below)] if below else []), *([min(above)] if above else []))]
        raise RecipeError(
            f"{where} nothing comes within {100 * TOLERANCE:g} % of {tokens} vision tokens per layer; the nearest is "
            f"{' or '.join(nearest)}"
        )
    return best


def fullest_choice(choices: Iterable[tuple[float, Choice]]) -> Choice | None:
    """Return what takes up most of a budget and not more than all, or the least where all are more; None of nothing.

    Args:
        choices: the part of the budget that each takes up, and what takes it.
    """
    found = list(choices)
    fitting = [choice for choice in found if choice[0] <= 1]
    if fitting:
        return max(fitting, key=lambda choice: choice[0])[1]
    return min(found, key=lambda choice: choice[0])[1] if found else None
