"""Whether a method earns its place: its accuracy and time beside a control that keeps as many vision tokens.

Q questions, L dialogues
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tokexport.engines.intervals import Floats, Interval, paired_difference

Word = Literal["better", "not distinguishable", "worse"]
Basis = Literal["paired", "intervals"]

MOST_APART = 0.10
"""A control keeps at most this part more or fewer tokens per layer than the method."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """What is known of a compressed recipe.

    Attributes:
        recipe: its name.
        is_control: whether its methods are what others are compared with.
        tokens: vision tokens per layer, the mean.
        accuracy: over all questions.
        interval: its 95 % interval.
        ttft_ms: time to the first token, the median.
        scores_Q: of every question, from 0 to 1, None where they are not of the same questions as the others'.
        precision: what its weights are stored in; a control has the same.
    """

    recipe: str
    is_control: bool
    tokens: float
    accuracy: float
    interval: Interval
    ttft_ms: float
    scores_Q: Floats | None = None
    precision: str = "float32"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a method stands to its control, all of it None where it has none.

    Attributes:
        recipe: the method's.
        control: the control's.
        control_tokens: its vision tokens per layer.
        accuracy: better or worse where the 95 % interval of the difference leaves out zero.
        difference: accuracy minus that of the control.
        difference_interval: its 95 % interval.
        basis: ``paired`` by question, resampled by dialogue; ``intervals`` where only those of both accuracies are
            known: then the difference is judged as if the worst ends of both came together.
        gained: questions that score higher than with the control, None where they are not paired.
        lost: questions that score lower.
        ttft_ratio: time to the first token over the control's.
    """

    recipe: str
    control: str | None = None
    control_tokens: float | None = None
    accuracy: Word | None = None
    difference: float | None = None
    difference_interval: Interval | None = None
    basis: Basis | None = None
    gained: int | None = None
    lost: int | None = None
    ttft_ratio: float | None = None

    def report(self) -> dict[str, Any]:
        """Return the verdict for ``compare.json``; its keys are a contract."""
        interval = self.difference_interval
        return {**vars(self), "difference_interval": None if interval is None else list(interval)}


def find_verdicts(contestants: Sequence[Contestant], dialogue_Q: NDArray[np.int64]) -> tuple[Verdict, ...]:
    """Return a verdict for every recipe that is no control, in order.

    The control of a recipe is the one in the same precision with the nearest mean of tokens per layer, at most 10 %
    apart, and of equally near ones the most accurate.

    Args:
        contestants: the compressed recipes.
        dialogue_Q: the number of the dialogue of each question, from 0.
    """
    controls = [one for one in contestants if one.is_control]
    return tuple(
        judge(one, control, dialogue_Q) if (control := _control_of(one, controls)) else Verdict(recipe=one.recipe)
        for one in contestants
        if not one.is_control
    )


def _control_of(method: Contestant, controls: Sequence[Contestant]) -> Contestant | None:
    alike = [one for one in controls if one.precision == method.precision]
    near = [one for one in alike if abs(one.tokens - method.tokens) <= MOST_APART * method.tokens]
    return min(near, key=lambda one: (abs(one.tokens - method.tokens), -one.accuracy), default=None)


def judge(method: Contestant, control: Contestant, dialogue_Q: NDArray[np.int64]) -> Verdict:
    """Return how one recipe stands to another one."""
    gained = lost = None
    if method.scores_Q is not None and control.scores_Q is not None:
        basis: Basis = "paired"
        paired = paired_difference(method.scores_Q, control.scores_Q, dialogue_Q)
        difference, interval, gained, lost = paired.mean, paired.interval, paired.gained, paired.lost
    else:
        basis = "intervals"
        difference = method.accuracy - control.accuracy
        interval = (method.interval[0] - control.interval[1], method.interval[1] - control.interval[0])
    low, high = interval
    return Verdict(
        recipe=method.recipe,
        control=control.recipe,
        control_tokens=control.tokens,
        accuracy="better" if low > 0 else "worse" if high < 0 else "not distinguishable",
        difference=difference,
        difference_interval=interval,
        basis=basis,
        gained=gained,
        lost=lost,
        ttft_ratio=method.ttft_ms / control.ttft_ms,
    )
