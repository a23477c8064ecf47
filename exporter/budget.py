"""Which options of a method meet a budget: a mean of vision tokens per decoder layer."""

from collections.abc import Iterable
from typing import TypeVar

from tokexport.errors import RecipeError

TOLERANCE = 0.02
"""A budget is met by a mean that differs from it by at most this part."""

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
