"""What tunings have in common; the rest is tested with ADSC and relevance."""

import pytest

from tokexport.errors import TrainingError
from tokexport.training.loop import Schedule
from tokexport.training.lora import LoraTuning, stage_at


@pytest.mark.parametrize(
    ("done", "num_stages", "stage"),
    [(0.0, 4, 0), (0.16, 4, 0), (0.17, 4, 1), (0.34, 4, 2), (0.49, 4, 2), (0.5, 4, 3), (0.99, 4, 3), (0.0, 1, 0)],
)
def test_the_first_half_of_the_steps_is_split_evenly_over_what_comes_before(done: float, num_stages: int, stage: int):
    assert stage_at(done, num_stages) == stage


def test_a_rank_of_none_is_refused():
    with pytest.raises(TrainingError, match=r"^rank = 0 must be at least 1$"):
        LoraTuning(schedule=Schedule(num_steps=1, batch_size=1, learning_rate=1e-3), rank=0)
