"""Where the tokens stand that methods keep before the language model."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.conftest import IMAGE_SIZE, recipe_for
from tests.exporter.test_methods import FULL, SPEC
from tokexport.engines.backend import SessionOptions
from tokexport.engines.generate import IMAGE, Conversation
from tokexport.engines.torch_session import TorchSession
from tokexport.exporter.export import design
from tokexport.exporter.method import Method
from tokexport.exporter.methods.random import Random
from tokexport.exporter.methods.sample import Sample


@pytest.mark.parametrize(
    ("method", "kept"),
    [(Sample(keep=4, positions="keep"), (2, 6, 10, 14)), (Random(keep=4, positions="keep"), (0, 6, 12, 15))],
    ids=["sample", "random"],
)
def test_tokens_that_keep_their_positions_stand_where_they_were(method: Method, kept: tuple[int, ...]):
    plan = method.plan(SPEC, FULL)
    assert plan.places == kept
    assert plan.num_positions == 16
    assert plan.places is not None
    # Side by side again behind a method that renumbers, and among the first ones' places behind one that does not.
    assert Sample(keep=2).plan(SPEC, plan).places is None
    assert Sample(keep=2, positions="keep", phase=0).plan(SPEC, plan).places == (plan.places[0], plan.places[2])


def test_a_sample_with_its_positions_is_a_bottleneck_before_the_first_layer(checkpoint: Path):
    """Both leave the same tokens at the same positions, one before the language model and one in it."""
    sample = {"method": "sample", "keep": 6, "phase": 0.0}
    logits = [
        answered(checkpoint, step)
        for step in ({**sample, "positions": "keep"}, sample, {"method": "adsc", "drops": [{"layer": 0, "keep": 6}]})
    ]
    np.testing.assert_allclose(logits[0], logits[2], atol=1e-4)
    assert np.abs(logits[1] - logits[2]).max() > 1e-2


def answered(checkpoint: Path, step: Mapping[str, object]) -> NDArray[np.float32]:
    """Return logits of two turns with an image each."""
    session = TorchSession(
        design(recipe_for(checkpoint, dict(step))), SessionOptions(max_text_tokens=64, max_images=2, threads=1)
    )
    pixels = np.random.default_rng(0).standard_normal((2, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    first, second = session.encode_images(pixels[:1]), session.encode_images(pixels[1:])
    conversation = Conversation(session)
    turns = [([7, 9, IMAGE, 11, 13], [first]), ([15, IMAGE, 17], [second]), ([19], [])]
    return np.concatenate([conversation.feed(ids, images) for ids, images in turns])
