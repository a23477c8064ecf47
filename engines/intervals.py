"""Confidence intervals by bootstrap over dialogues.

The turns of a dialogue share an image and a conversation, so they are not independent: whole dialogues are drawn, with
replacement (the cluster bootstrap; Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8).

Q questions, L dialogues, R resamples, C figures
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Interval = tuple[float, float]

NUM_RESAMPLES = 2000
COVERAGE = 0.95
_SEED = 0
# Draws of one block are held in memory at once.
_MAX_DRAWS = 4_000_000
# Scores of one question that differ by less are equal: stored ones are rounded.
_SAME = 1e-4


@dataclass(frozen=True, kw_only=True)
class Difference:
    """An accuracy minus another on the same questions.

    Attributes:
        mean: from -1 to 1.
        interval: its 95 % interval.
        gained: questions that score higher.
        lost: questions that score lower.
    """

    mean: float
    interval: Interval
    gained: int
    lost: int

    def report(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {"mean": self.mean, "interval": list(self.interval), "gained": self.gained, "lost": self.lost}


def paired_difference(scores_Q: Floats, other_Q: Floats, dialogue_Q: NDArray[np.int64]) -> Difference:
    """Return the mean of ``scores`` minus ``other``, its interval by bootstrap over dialogues.

    Args:
        scores_Q: of every question, from 0 to 1.
        other_Q: of the same questions.
        dialogue_Q: the number of the dialogue of each question, from 0.
    """
    change_Q = scores_Q - other_Q
    change_LC, count_LC = (
        sum_by_dialogue(values_Q[:, None], dialogue_Q) for values_Q in (change_Q, np.ones_like(change_Q))
    )
    (interval,) = ratio_intervals(change_LC, count_LC)
    return Difference(
        mean=float(change_Q.mean()),
        interval=interval,
        gained=int((change_Q > _SAME).sum()),
        lost=int((change_Q < -_SAME).sum()),
    )


def ratio_intervals(above_LC: Floats, below_LC: Floats) -> list[Interval]:
    """Return the 95 % interval of each sum over dialogues of ``above`` over that of ``below``.

    With scores above and numbers of questions below this is the interval of an accuracy. The draws are the same in
    every call on as many dialogues.

    Args:
        above_LC: the part of each dialogue in the numerator of each figure.
        below_LC: its part in the denominator; a resample in which it is zero everywhere is left out.
    """
    num_dialogues = len(above_LC)
    rng = np.random.default_rng(_SEED)
    chances_L = np.full(num_dialogues, 1 / num_dialogues)
    block = max(1, _MAX_DRAWS // num_dialogues)
    ratios: list[Floats] = []
    for first in range(0, NUM_RESAMPLES, block):
        size = min(block, NUM_RESAMPLES - first)
        draws_RL = rng.multinomial(num_dialogues, chances_L, size=size).astype(np.float64)
        below_RC = draws_RL @ below_LC
        ratios.append(draws_RL @ above_LC / np.where(below_RC == 0, np.nan, below_RC))
    tail = 50 * (1 - COVERAGE)
    low_C, high_C = np.nanpercentile(np.concatenate(ratios), (tail, 100 - tail), axis=0)
    return [(float(low), float(high)) for low, high in zip(low_C, high_C, strict=True)]


def sum_by_dialogue(values_QC: Floats, dialogue_Q: NDArray[np.int64]) -> Floats:
    """Return sums (L, C) of what Q questions have, over each dialogue.

    Args:
        values_QC: C figures of each question.
        dialogue_Q: the number of the dialogue of each, from 0, ascending.
    """
    sums_LC = np.zeros((int(dialogue_Q[-1]) + 1, values_QC.shape[1]))
    np.add.at(sums_LC, dialogue_Q, values_QC)
    return sums_LC
