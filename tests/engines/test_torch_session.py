"""What PyTorch runs on a GPU, as far as a CPU can tell."""

import numpy as np
import pytest
import torch

from tests.engines.conftest import open_engine, pixels, words
from tokexport.engines.backend import AS_BUILT, Session, SessionOptions
from tokexport.engines.generate import IMAGE, Conversation
from tokexport.engines.source import source_design
from tokexport.engines.torch_session import GraphedTorchSession
from tokexport.errors import BackendUnavailableError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.modules import ops


@pytest.mark.parametrize(("num_new", "lengths"), [(1, [1]), (1, [9, 4]), (3, [3]), (3, [9, 5])])
def test_attention_over_the_whole_cache_is_attention_over_what_is_in_it(num_new: int, lengths: list[int]):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(len(lengths), 4, num_new, 8, generator=generator)
    key, value = torch.randn(2, len(lengths), 2, 9, 8, generator=generator)
    found = ops.attend_to_all(query, key, value, torch.tensor(lengths))
    torch.testing.assert_close(found, ops.cached_attention(query, key, value, torch.tensor(lengths)))


def test_places_that_are_tensors_are_written_like_places_that_are_numbers():
    new = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([0, 5])
    found, expected = (write(torch.zeros(2, 3, 7, 4), new, starts) for write in (ops.write_at, ops.cache_update))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert expected[1, :, 5:].ne(0).all()


def logits(session: Session) -> np.ndarray:
    talk = Conversation(session)
    features = session.encode_images(pixels())
    found = [talk.feed([*words(3), IMAGE, *words(2)], [features], all_logits=True)]
    return np.concatenate(found + [talk.feed([word]) for word in words(3, seed=1)])


def test_tokens_through_fixed_buffers_are_those_of_the_modules(tiny_adsc: Bundle):
    options = SessionOptions.for_bundle(tiny_adsc, threads=1)
    graphed = GraphedTorchSession(source_design(tiny_adsc, AS_BUILT), options, device="cpu")
    np.testing.assert_allclose(logits(graphed), logits(open_engine(tiny_adsc, "torch-eager")), atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("backend", ["torch-cuda", "torch-cuda-graph"])
def test_without_a_gpu_it_says_so(tiny_adsc: Bundle, backend: str):
    with pytest.raises(BackendUnavailableError) as caught:
        open_engine(tiny_adsc, backend)
    assert str(caught.value) == (f"backend {backend!r} cannot run here: it needs an NVIDIA GPU, and there is none")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend", ["torch-cuda", "torch-cuda-graph"])
def test_a_gpu_computes_what_the_cpu_does(tiny_adsc: Bundle, backend: str):
    expected = logits(open_engine(tiny_adsc, "torch-eager"))
    np.testing.assert_allclose(logits(open_engine(tiny_adsc, backend)), expected, atol=1e-3)
