"""Confidence intervals by bootstrap over dialogues.

The turns of a dialogue share an image and a conversation, so they are not independent: whole dialogues are drawn, with
replacement (the cluster bootstrap; Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8).

L dialogues, R resamples, C figures
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Interval = tuple[float, float]

NUM_RESAMPLES = 2000
COVERAGE = 0.95
_SEED = 0
# Draws of one block are held in memory at once.
_MAX_DRAWS = 4_000_000


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
