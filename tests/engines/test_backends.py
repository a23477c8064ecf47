"""Engines run the same artefact to the same logits, on a cache of the planned size, written in place."""

# pyright: reportPrivateUsage=false

import os
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.conftest import NUM_LAYERS
from tests.engines.conftest import open_engine, pixels, words
from tokexport.engines import ort_session
from tokexport.engines.backend import (
    DEFAULT_BACKEND,
    DecoderStep,
    Session,
    list_backends,
    load_backend,
    planned_kv_bytes,
)
from tokexport.engines.backends.ort_cuda import OrtCuda
from tokexport.engines.generate import IMAGE, Conversation
from tokexport.engines.ort_session import OrtSession
from tokexport.errors import BackendUnavailableError, InputError
from tokexport.exporter.bundle import Bundle

STATIC = ["ort", "ort-portable", "torch-eager"]
"""Engines with a cache of fixed capacity."""
ALL = (
    "openvino, ort, ort-cuda, ort-portable, tensorrt, tensorrt-rtx, torch-cuda, torch-cuda-graph, torch-eager, "
    "transformers"
)
SAME = 1e-4

TURNS = ([*words(6), IMAGE, *words(4, seed=1)], words(3, seed=2), [IMAGE], words(1, seed=3))


def logits_of(session: Session) -> NDArray[np.float32]:
    """Hold a conversation of four turns with two images; return the logits behind each turn."""
    encoded, used = session.encode_images(pixels(2)), 0
    conversation, found = Conversation(session), []
    for turn in TURNS:
        count = turn.count(IMAGE)
        found.append(conversation.feed(turn, [encoded[i : i + 1] for i in range(used, used + count)]))
        used += count
    return np.concatenate(found)


@pytest.fixture(scope="module")
def expected_adsc(tiny_adsc: Bundle) -> NDArray[np.float32]:
    return logits_of(open_engine(tiny_adsc, "torch-eager"))


@pytest.fixture(scope="module")
def expected_full(tiny_full: Bundle) -> NDArray[np.float32]:
    return logits_of(open_engine(tiny_full, "transformers"))


def test_the_engines_are_those_with_a_file():
    assert set(list_backends()) >= {*STATIC, "transformers"}
    assert DEFAULT_BACKEND in list_backends()


@pytest.mark.parametrize("backend", ["openvino", "ort", "ort-portable"])
def test_an_engine_computes_the_logits_of_pytorch_when_compressed(
    backend: str, tiny_adsc: Bundle, expected_adsc: NDArray[np.float32]
):
    assert np.abs(logits_of(open_engine(tiny_adsc, backend)) - expected_adsc).max() < SAME


@pytest.mark.parametrize("backend", [*STATIC, "openvino"])
def test_an_engine_computes_the_logits_of_transformers_when_not_compressed(
    backend: str, tiny_full: Bundle, expected_full: NDArray[np.float32]
):
    assert np.abs(logits_of(open_engine(tiny_full, backend)) - expected_full).max() < SAME


def test_compressed_logits_are_not_those_of_all_tokens(
    expected_adsc: NDArray[np.float32], expected_full: NDArray[np.float32]
):
    assert np.abs(expected_adsc - expected_full).max() > 1000 * SAME


def test_transformers_runs_a_compressed_artefact_with_all_tokens(tiny_adsc: Bundle, expected_full: NDArray[np.float32]):
    assert not load_backend("transformers").is_compressed
    session = open_engine(tiny_adsc, "transformers")
    assert session.plan.per_layer == (16,) * NUM_LAYERS
    assert (logits_of(session) == expected_full).all()


@pytest.mark.parametrize("backend", STATIC)
def test_the_cache_has_the_planned_bytes(backend: str, tiny_adsc: Bundle):
    session = open_engine(tiny_adsc, backend, max_text_tokens=50, max_images=2)
    # Layers 0; 1 and 2; 3 hold 50 + 2 x (16; 8; 4) tokens of 2 heads of 16 numbers, keys and values.
    assert session.kv_bytes == (82 + 66 + 66 + 58) * 2 * 16 * 2 * 4
    assert session.kv_bytes == planned_kv_bytes(session, "float32")


@pytest.mark.parametrize("backend", STATIC)
def test_the_cache_keeps_its_size_while_it_is_filled(backend: str, tiny_adsc: Bundle):
    session = open_engine(tiny_adsc, backend)
    before = session.kv_bytes
    logits_of(session)
    assert session.kv_bytes == before


@pytest.mark.parametrize("backend", ["transformers", "openvino"])
def test_a_cache_that_grows_holds_just_what_was_read(backend: str, tiny_full: Bundle):
    session = open_engine(tiny_full, backend)
    logits_of(session)
    assert session.kv_bytes == NUM_LAYERS * (14 + 2 * 16) * 2 * 16 * 2 * 4


@pytest.mark.parametrize("backend", ["ort", "ort-portable"])
def test_the_cache_is_written_in_place(backend: str, tiny_adsc: Bundle):
    session = open_engine(tiny_adsc, backend)
    assert isinstance(session, OrtSession)
    buffers = [value.data_ptr() for value in session._cache.values()]
    assert not any(keys.any() for keys, _ in (session.read_cache(layer, 10) for layer in range(NUM_LAYERS)))
    Conversation(session).feed(words(10))
    assert all(np.abs(session.read_cache(layer, 10)[0]).min(axis=(0, 1, 3)).all() for layer in range(NUM_LAYERS))
    assert [value.data_ptr() for value in session._cache.values()] == buffers


@pytest.mark.parametrize("backend", STATIC)
def test_nothing_is_written_behind_the_length_of_the_cache(backend: str, tiny_adsc: Bundle):
    session = open_engine(tiny_adsc, backend)
    conversation = Conversation(session)
    conversation.feed([*words(6), IMAGE], list(session.encode_images(pixels())[None]))
    for layer, group in enumerate(session.plan.group_of_layer):
        length = conversation.lengths[group]
        keys, values = session.read_cache(layer, session.capacities[group])
        assert not keys[:, :, length:].any()
        assert not values[:, :, length:].any()
        assert keys[:, :, :length].any(axis=(0, 1, 3)).all()


@pytest.mark.parametrize("backend", [*STATIC, "openvino"])
def test_the_caches_of_engines_agree(backend: str, tiny_adsc: Bundle):
    sessions = [open_engine(tiny_adsc, name) for name in ("torch-eager", backend)]
    for session in sessions:
        logits_of(session)
    for layer in range(NUM_LAYERS):
        pairs = [session.read_cache(layer, 22) for session in sessions]
        for expected, found in zip(*pairs, strict=True):
            assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", ["ort", "ort-portable"])
def test_onnx_runtime_uses_the_threads_asked_for(backend: str, threads: int, tiny_adsc: Bundle):
    session = open_engine(tiny_adsc, backend, threads=threads)
    assert isinstance(session, OrtSession)
    for opened in (session._vision, session._embedding, session._decoder):
        assert opened.get_session_options().intra_op_num_threads == threads


@pytest.mark.parametrize("backend", ["torch-eager", "transformers"])
def test_pytorch_uses_the_threads_asked_for(backend: str, tiny_adsc: Bundle):
    before = torch.get_num_threads()
    try:
        open_engine(tiny_adsc, backend, threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", [*STATIC, "openvino"])
def test_threads_do_not_change_the_answer(backend: str, tiny_adsc: Bundle, expected_adsc: NDArray[np.float32]):
    assert np.abs(logits_of(open_engine(tiny_adsc, backend, threads=2)) - expected_adsc).max() < SAME


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ort-portabel", "there is no backend 'ort-portabel'; did you mean 'ort-portable'?"),
        ("ort_portable", "there is no backend 'ort_portable'; did you mean 'ort-portable'?"),
        ("zzz", f"there is no backend 'zzz'; choose one of: {ALL}"),
        ("", f"there is no backend ''; choose one of: {ALL}"),
    ],
)
def test_an_unknown_engine_is_refused_with_the_nearest(name: str, expected: str):
    with pytest.raises(BackendUnavailableError) as caught:
        load_backend(name)
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("limit", "set_by_user", "seen"),
    [(1800, None, [None, None, "1"]), (1, None, [None] * 3), (1800, "0", ["0"] * 3)],
    ids=["short prompts", "long prompts", "set by the user"],
)
def test_attention_has_all_scores_at_once_for_short_prompts(
    tiny_adsc: Bundle, monkeypatch: pytest.MonkeyPatch, limit: int, set_by_user: str | None, seen: list[str | None]
):
    found: list[str | None] = []
    open_session = ort_session.inference_session

    def watched(*arguments: Any, **options: Any) -> Any:
        found.append(os.environ.get(ort_session._WITHOUT_TILES))
        return open_session(*arguments, **options)

    monkeypatch.delenv(ort_session._WITHOUT_TILES, raising=False)
    if set_by_user is not None:
        monkeypatch.setenv(ort_session._WITHOUT_TILES, set_by_user)
    monkeypatch.setattr(ort_session, "inference_session", watched)
    monkeypatch.setattr(ort_session, "_MOST_TOKENS_WITHOUT_TILES", limit)
    open_engine(tiny_adsc, "ort")
    assert found == seen
    assert os.environ.get(ort_session._WITHOUT_TILES) == set_by_user


@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_a_second_row_in_a_batch_is_refused(backend: str, tiny_adsc: Bundle):
    session = open_engine(tiny_adsc, backend)
    two = np.zeros((2, 1, session.spec.hidden_size), np.float32)
    step = DecoderStep(
        prefix_embeds=two,
        image_features=two[:, :0],
        suffix_embeds=two[:, :0],
        position_ids=np.zeros((2, 1), np.int64),
        past_lengths=np.zeros((3, 2), np.int64),
        logits_to_keep=np.zeros(1, np.int64),
    )
    with pytest.raises(InputError, match=r"^a session runs batch 1, not 2$"):
        session.decode(step)


def test_a_session_has_the_room_of_the_recipe(tiny_adsc: Bundle):
    session = open_engine(tiny_adsc)
    assert (session.options.max_text_tokens, session.options.max_images) == (128, 3)


@pytest.mark.parametrize(
    ("providers", "text"),
    [
        (["CPUExecutionProvider"], "installed without CUDA; install it with: pip uninstall onnxruntime, then pip"),
        (["CUDAExecutionProvider"], "it needs an NVIDIA GPU, and there is none"),
    ],
)
def test_onnx_runtime_on_a_gpu_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tiny_full: Bundle, providers: list[str], text: str
):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
    assert text in load_backend("ort-cuda").state()
    monkeypatch.setattr(OrtCuda, "dtypes", ("float32",))
    with pytest.raises(BackendUnavailableError, match=f"backend 'ort-cuda' cannot run here: .*{text}"):
        open_engine(tiny_full, "ort-cuda")
