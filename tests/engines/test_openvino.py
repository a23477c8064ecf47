"""OpenVINO runs artefacts of every kind as the ladder demands; its cache goes back where a conversation does."""

# pyright: reportPrivateUsage=false

import gc
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.conftest import adsc, recipe_for
from tests.engines.conftest import open_engine, pixels, with_checksums_of_today, words
from tokexport.engines.backend import SessionOptions
from tokexport.engines.generate import IMAGE, Conversation
from tokexport.engines.parity import verify
from tokexport.errors import BackendUnavailableError
from tokexport.exporter.bundle import Bundle
from tokexport.recipes.schema import QuantizeTable, Recipe

openvino: Any = import_module("tokexport.engines.backends.openvino")

Export = Callable[[Recipe], Bundle]

SAME = 1e-4
METHODS: dict[str, dict[str, Any]] = {
    "metacompress": {"method": "metacompress", "keep": 4, "weights": "untrained"},
    "relevance": {"method": "relevance", "keep": 6, "channels": [4, 8], "weights": "untrained"},
    "fastv": {"method": "fastv", "keep": 6, "layer": 2},
    "pyramiddrop": {"method": "pyramiddrop", "drops": [{"layer": 1, "keep": 8}, {"layer": 3, "keep": 4}]},
    "visionzip": {"method": "visionzip", "keep": 7, "contextual": 3},
    "vscan": {"method": "vscan", "keep": 9, "window": 2, "local_layer": 0, "layer": 2, "keep_inside": 4},
    "divprune": {"method": "divprune", "keep": 6},
}
ROUNDED = {
    "int8": QuantizeTable(vision_encoder="int8", embed_tokens="int8", decoder="int8"),
    "int4": QuantizeTable(vision_encoder="int8", embed_tokens="int8", decoder="int4", block_size=16),
}


def proved(bundle: Bundle) -> list[str]:
    """Climb to the engine and return what failed."""
    verification = verify(bundle, "openvino", SessionOptions.for_bundle(bundle, threads=1))
    assert any(check.step == "ort-portable vs openvino" for check in verification.checks)
    return [f"{check.step}: {check.name}" for check in verification.checks if not check.passed]


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_method_is_proved(checkpoint: Path, exported: Export, method: str):
    assert proved(exported(recipe_for(checkpoint, METHODS[method]))) == []


@pytest.mark.parametrize("precision", ROUNDED)
def test_rounded_weights_are_proved(checkpoint: Path, exported: Export, precision: str):
    assert proved(exported(replace(recipe_for(checkpoint, adsc()), quantize=ROUNDED[precision]))) == []


def test_a_mask_aligned_to_the_upper_left_is_no_proof(tiny_adsc: Bundle, monkeypatch: pytest.MonkeyPatch):
    def upper_left(query: Any, keys: Any) -> Any:
        zero, one, rows = (openvino._constant([value]) for value in (0, 1, 2))
        num_new = openvino.ops.unsqueeze(openvino._size(query), zero)
        return openvino.ops.slice(right(keys, keys), zero, num_new, one, rows).output(0)

    right = openvino._mask
    monkeypatch.setattr(openvino, "_mask", upper_left)
    failed = proved(tiny_adsc)
    assert failed
    assert all(name.startswith("ort-portable vs openvino: ") for name in failed)


def test_every_layer_has_a_fused_attention_that_holds_its_cache(tiny_adsc: Bundle):
    session: Any = open_engine(tiny_adsc, "openvino")
    nodes = session._decoder.get_compiled_model().get_runtime_model().get_ops()
    kinds = [(node.get_rt_info()["layerType"].value, node.get_friendly_name()) for node in nodes]
    assert [kind for kind, _ in kinds].count("ScaledDotProductAttention") == tiny_adsc.spec.num_layers
    assert not [name for kind, name in kinds if kind == "Concatenation" and "self_attn" in name]
    # One mask for each of the three lengths of caches.
    assert [kind for kind, _ in kinds].count("Range") == 2 * len(session.plan.groups)


def test_what_a_conversation_goes_back_behind_is_forgotten(tiny_adsc: Bundle):
    session = open_engine(tiny_adsc, "openvino")
    conversation = Conversation(session)
    conversation.feed([*words(6), IMAGE], [session.encode_images(pixels())])
    held = session.kv_bytes
    conversation.probe(words(9, seed=1))
    found = conversation.feed(words(3, seed=2))
    assert session.kv_bytes == held + 3 * 2 * 2 * 16 * 4 * tiny_adsc.spec.num_layers

    other = open_engine(tiny_adsc)
    same = Conversation(other)
    same.feed([*words(6), IMAGE], [other.encode_images(pixels())])
    assert np.abs(found - same.feed(words(3, seed=2))).max() < SAME


def test_what_a_call_that_failed_left_is_forgotten(tiny_adsc: Bundle, monkeypatch: pytest.MonkeyPatch):
    session: Any = open_engine(tiny_adsc, "openvino")
    conversation = Conversation(session)
    expected = [conversation.feed(tokens) for tokens in (words(6), words(3, seed=2))]

    conversation = Conversation(session)
    assert np.array_equal(conversation.feed(words(6)), expected[0])
    decoder = session._decoder

    def infer(inputs: dict[str, Any]) -> Any:
        decoder.infer(inputs)
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(session, "_decoder", SimpleNamespace(infer=infer))
        with pytest.raises(RuntimeError, match="no memory"):
            conversation.feed(words(2, seed=3))
    assert np.abs(conversation.feed(words(3, seed=2)) - expected[1]).max() < SAME


def test_a_new_conversation_begins_with_an_empty_cache(tiny_adsc: Bundle):
    session = open_engine(tiny_adsc, "openvino")
    first = Conversation(session).feed(words(5))
    assert np.array_equal(Conversation(session).feed(words(5)), first)


def test_an_operator_that_openvino_does_not_know_is_named(tiny_adsc: Bundle, copied: Callable[[Bundle], Bundle]):
    bundle = copied(tiny_adsc)
    path = bundle.graph_path("decoder_model_merged")
    model = ir.load(path)
    next(node for node in model.graph if node.op_type == "Sigmoid").op_type = "NoSuchOperator"
    ir.save(model, path)
    with pytest.raises(BackendUnavailableError) as caught:
        open_engine(with_checksums_of_today(bundle), "openvino")
    text = str(caught.value)
    assert text.startswith(f"OpenVINO {openvino.ov.get_version().partition('-')[0]} does not read {path}: ")
    assert "NoSuchOperator" in text
    assert "\n" not in text
    assert text.endswith("update it, or use another backend, e.g. ort")


def test_half_precision_is_left_to_others(checkpoint: Path, exported: Export):
    with pytest.raises(BackendUnavailableError, match="'openvino' does not run graphs in float16, only in float32"):
        open_engine(exported(recipe_for(checkpoint, dtype="float16")), "openvino")


def test_a_session_gives_its_memory_back(tiny_adsc: Bundle, monkeypatch: pytest.MonkeyPatch):
    released: list[object] = []
    monkeypatch.setattr(openvino.ov.CompiledModel, "release_memory", lambda model: released.append(model))
    session = open_engine(tiny_adsc, "openvino")
    assert not released
    del session
    gc.collect()
    assert len(released) == 1


def test_a_signal_is_heard_after_sessions_that_overlap(checkpoint: Path, exported: Export):
    # The first ends while the second goes on.
    script = """
import gc, signal, sys
from pathlib import Path
from tokexport.engines.backend import SessionOptions, open_session
from tokexport.exporter.bundle import Bundle

bundle = Bundle.open(Path(sys.argv[1]))
options = SessionOptions.for_bundle(bundle, threads=1)
sessions = [open_session(bundle, "openvino", options) for _ in range(2)]
while sessions:
    del sessions[0]
    gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("heard"))
signal.raise_signal(signal.SIGUSR1)
"""
    path = exported(recipe_for(checkpoint, adsc())).path
    ended = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "heard\n"), ended.stderr
