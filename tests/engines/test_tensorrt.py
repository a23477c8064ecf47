"""TensorRT without a GPU: its graph computes what the portable one does, and engines are what they claim."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx_ir import tape

from tests.conftest import NUM_LAYERS, NUM_VISION_TOKENS, adsc, recipe_for
from tokexport.engines.backend import DecoderStep, Session, SessionOptions, load_backend, open_session
from tokexport.engines.generate import IMAGE, Conversation
from tokexport.engines.tensorrt.dialect import rewritten_decoder
from tokexport.engines.tensorrt.engine_folder import find
from tokexport.engines.tensorrt.kernels import Kernel, read_kernels, require_fused
from tokexport.engines.tensorrt.phases import decoder_shapes, phase_of, phases
from tokexport.engines.tensorrt.session import Runner, TensorrtSession
from tokexport.errors import BackendUnavailableError, EngineError, InputError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.graph_io import cache_names

OPTIONS = SessionOptions(max_text_tokens=40, max_images=2, threads=1)


class OrtRunner(Runner):
    """The graphs that TensorRT is given, in ONNX Runtime; refuses what no profile has room for."""

    def __init__(self, bundle: Bundle, built: SessionOptions, graph: bytes | None = None) -> None:
        capacities = [built.max_text_tokens + built.max_images * group.vision_tokens for group in bundle.plan.groups]
        io = bundle.graph_io("decoder_model_merged")
        self.shapes = {
            phase.name: decoder_shapes(io, bundle.plan, phase, capacities) for phase in phases(bundle.plan, built)
        }
        settings = ort.SessionOptions()
        folder = str(bundle.path / "onnx")
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        self._vision = ort.InferenceSession(str(bundle.graph_path("vision_encoder")))
        self._decoder = ort.InferenceSession(graph or rewritten_decoder(bundle, capacities).graph, settings)
        sizes = {tensor.name: tensor.shape for tensor in self._decoder.get_inputs()}
        self.cache: dict[str, Any] = {
            name: np.zeros(shape, np.float32) for name, shape in sizes.items() if name.startswith("past_key")
        }
        self.calls: list[str] = []

    def encode(self, pixel_values: NDArray[np.float32]) -> Any:
        return self._vision.run(None, {"pixel_values": pixel_values})[0]

    def decode(self, step: DecoderStep) -> NDArray[np.float32]:
        phase = phase_of(step)
        for name, array in step.inputs().items():
            least, _, most = self.shapes[phase][name]
            inside = [low <= size <= high for low, size, high in zip(least, array.shape, most, strict=True)]
            assert all(inside), (phase, name, array.shape, least, most)
        self.calls.append(phase)
        inputs = {name: array for name, array in step.inputs().items()}
        logits, *present = self._decoder.run(None, inputs | self.cache)
        self.cache = dict(zip(self.cache, present, strict=True))
        return np.asarray(logits)

    def read_cache(self, layer: int, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        keys, values = (self.cache[name][:, :, :length] for name in cache_names(layer))
        return keys, values

    @property
    def kv_bytes(self) -> int:
        return sum(array.nbytes for array in self.cache.values())


def in_dialect(bundle: Bundle, options: SessionOptions = OPTIONS, graph: bytes | None = None) -> TensorrtSession:
    return TensorrtSession(bundle, options, options, OrtRunner(bundle, options, graph))


def three_turns(session: Session) -> Iterator[NDArray[np.float32]]:
    """Yield all logits of an image prompt, single tokens, text, a second image with text on both sides, and a token."""
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((2, 3, session.spec.image_size, session.spec.image_size)).astype(np.float32)
    features = session.encode_images(pixels)
    talk = Conversation(session)
    yield talk.feed([1, 5, IMAGE, 7, 8, 9], [features[:1]], all_logits=True)
    yield talk.feed([11])
    yield talk.feed([12])
    yield talk.feed([13, 14, 15], all_logits=True)
    yield talk.feed([16, 17, IMAGE, 18], [features[1:]], all_logits=True)
    yield talk.feed([19])


@pytest.fixture(scope="module", params=["full", "adsc", "renumbered"])
def bundle(request: pytest.FixtureRequest, checkpoint: Path, exported: Any) -> Bundle:
    steps = {"full": [], "adsc": [adsc()], "renumbered": [adsc(positions="renumber")]}[request.param]
    return exported(recipe_for(checkpoint, *steps))


def test_what_tensorrt_is_given_computes_what_the_portable_graph_does(bundle: Bundle):
    portable = open_session(bundle, "ort-portable", OPTIONS)
    rewritten = in_dialect(bundle)
    for expected, found in zip(three_turns(portable), three_turns(rewritten), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)
    for layer, group in enumerate(bundle.plan.group_of_layer):
        length = 12 + 2 * bundle.plan.groups[group].vision_tokens
        for found, expected in zip(
            rewritten.read_cache(layer, length), portable.read_cache(layer, length), strict=True
        ):
            np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_mask_aligned_to_the_upper_left_is_found_out(tiny_adsc: Bundle):
    capacities = [40 + 2 * group.vision_tokens for group in tiny_adsc.plan.groups]
    model = ir.from_proto(onnx.load_from_string(rewritten_decoder(tiny_adsc, capacities).graph))
    ends = [node.inputs[1] for node in model.graph if node.op_type == "LessOrEqual"]
    for first_and_row in (end.producer() for end in ends if end is not None):
        assert first_and_row is not None
        # Counted from the first token of the cache instead of from where the new ones begin.
        new = tape.Tape()
        nothing = new.op("Sub", [first_and_row.inputs[0], first_and_row.inputs[0]])
        model.graph.insert_before(first_and_row, new.nodes)
        first_and_row.replace_input_with(0, nothing)
    assert len(ends) == len(tiny_adsc.plan.groups)
    wrong = in_dialect(tiny_adsc, graph=ir.to_proto(model).SerializeToString())
    portable = open_session(tiny_adsc, "ort-portable", OPTIONS)
    pairs = list(zip(three_turns(portable), three_turns(wrong), strict=True))
    # A first prompt is the same either way, everything that follows is not.
    np.testing.assert_allclose(pairs[0][1], pairs[0][0], atol=2e-5)
    assert all(np.abs(found - expected).max() > 0.1 for expected, found in pairs[1:])


def test_calls_longer_than_a_profile_are_split(tiny_adsc: Bundle):
    options = replace(OPTIONS, max_text_tokens=12)
    rng = np.random.default_rng(1)
    pixels = rng.standard_normal((1, 3, 56, 56)).astype(np.float32)
    answers: list[NDArray[np.float32]] = []
    rewritten = in_dialect(tiny_adsc, options)
    for session in (open_session(tiny_adsc, "ort-portable", options), rewritten):
        features = session.encode_images(pixels)
        talk = Conversation(session)
        answers.append(talk.feed([*range(20, 28), IMAGE, 1, 2], [features], all_logits=True))
        answers.append(talk.feed([3]))
        talk = Conversation(session)
        answers.append(talk.feed([IMAGE, *range(20, 32)], [features], all_logits=True))
        talk = Conversation(session)
        answers.append(talk.feed([*range(20, 32)]))
    for expected, found in zip(answers[:4], answers[4:], strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)
    assert rewritten._runner.calls == ["text", "image", "decode", "image", "text", "text", "text"]  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


def test_tokens_behind_the_end_of_the_cache_are_refused(tiny_adsc: Bundle):
    session = in_dialect(tiny_adsc)
    none = np.zeros((1, 0, 64), np.float32)
    step = DecoderStep(
        prefix_embeds=none,
        image_features=none,
        suffix_embeds=np.zeros((1, 3, 64), np.float32),
        position_ids=np.arange(3)[None],
        past_lengths=np.array([[10], [10], [46]]),
        logits_to_keep=np.array([2]),
    )
    with pytest.raises(
        InputError, match="3 new tokens behind 46 do not fit into the cache of layer group 2, built for 48"
    ):
        session.decode(step)


def test_more_images_than_an_engine_takes_at_once_are_encoded_in_parts(tiny_adsc: Bundle):
    pixels = np.random.default_rng(2).standard_normal((5, 3, 56, 56)).astype(np.float32)
    found: Any = in_dialect(tiny_adsc).encode_images(pixels)
    expected: Any = open_session(tiny_adsc, "ort-portable", OPTIONS).encode_images(pixels)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_every_phase_without_an_image_could_take_one(tiny_adsc: Bundle):
    found = phases(tiny_adsc.plan, OPTIONS)
    assert [(phase.name, phase.vision) for phase in found] == [
        ("image", (NUM_VISION_TOKENS,) * 3),
        ("text", (0, 0, NUM_VISION_TOKENS)),
        ("decode", (0, 0, NUM_VISION_TOKENS)),
    ]
    # Text of a call fits into the cache beside all images.
    assert all(phase.prefix[2] + phase.suffix[2] == OPTIONS.max_text_tokens for phase in found)
    assert [phase.name for phase in phases(tiny_adsc.plan, replace(OPTIONS, max_images=0))] == ["text", "decode"]


def logged(name: str, tactic: str, *nodes: str) -> str:
    layers = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    return f"Name: {name}, LayerType: kgen, Inputs: [], TacticName: {tactic}, StreamId: 0, Metadata: {layers}"


def test_kernels_are_read_from_a_build_log():
    lines = [logged("_mha_myl0_3", "_gemm_mha_v2_0xab", "/a"), logged("__myl_Add_myl1_4", "__myl_Add_0xcd", "/b", "/a")]
    kernels = read_kernels(["nothing", "\n".join([*lines, "something else"])])
    assert kernels == [Kernel(0, "_gemm_mha_v2_0xab", ("/a",)), Kernel(1, "__myl_Add_0xcd", ("/b", "/a"))]
    require_fused(kernels, ["/a"], 1)
    with pytest.raises(
        EngineError, match=r"1 of 1 attentions are not one .* each of 2 profiles: /a \(1 kernels in 1 g"
    ):
        require_fused(kernels, ["/a"], 2)
    with pytest.raises(EngineError, match=r"/a \(2 kernels in 1 graphs\)"):
        require_fused([*kernels[:1], *kernels], ["/a"], 1)


@pytest.fixture(scope="module")
def compiled(checkpoint: Path, exported: Any) -> tuple[Bundle, Path]:
    pytest.importorskip("tensorrt_rtx")
    bundle = exported(recipe_for(checkpoint, adsc(), dtype="float16"))
    return bundle, compiler().compile(bundle, OPTIONS, capability="8.6")


def compiler() -> Any:
    return load_backend("tensorrt-rtx")


def test_engines_are_built_without_a_gpu_every_attention_fused(compiled: tuple[Bundle, Path]):
    bundle, path = compiled
    record = json.loads((path / "engine.json").read_text())
    assert path.name == f"tensorrt-rtx-{record['version']}-sm86-float16"
    assert (record["attention"], record["room"]) == ("fused", {"max_text_tokens": 40, "max_images": 2})
    decoder = record["engines"]["decoder"]
    # One a layer and phase.
    assert decoder["fused_attentions"] == 3 * NUM_LAYERS
    assert decoder["layers"] == {
        "ATTENTION_INPUT": NUM_LAYERS,
        "ROTARY_EMBEDDING": 2 * NUM_LAYERS,
        "KV_CACHE_UPDATE": 2 * NUM_LAYERS,
    }
    assert record["engines"]["vision_encoder"]["fused_attentions"] == 2
    assert decoder["bytes"] == (path / "decoder.engine").stat().st_size
    assert "decoder: " in (path / "build.log").read_text()
    # An artefact with engines is still the artefact.
    assert Bundle.open(bundle.path, check_all=True).manifest == bundle.manifest


def test_engines_that_stand_there_are_kept_unless_told_otherwise(compiled: tuple[Bundle, Path]):
    bundle, path = compiled
    with pytest.raises(EngineError, match="is there already with fused attention; build it again with --overwrite"):
        compiler().compile(bundle, OPTIONS, capability="8.6")
    before = (path / "engine.json").stat().st_mtime_ns
    assert compiler().compile(bundle, OPTIONS, capability="8.6", overwrite=True) == path
    assert (path / "engine.json").stat().st_mtime_ns > before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("capability", "text"),
    [
        ("9.0", "builds for 7.5, 8.0, 8.6, 8.9, 12.0, 12.1, not for compute capability 9.0; choose one of these"),
        ("sm86", "'sm86' is no compute capability; write it like 8.6"),
    ],
)
def test_gpus_that_cannot_be_built_for_are_refused(compiled: tuple[Bundle, Path], capability: str, text: str):
    with pytest.raises(InputError, match=text):
        compiler().compile(compiled[0], OPTIONS, capability=capability)


def test_precision_that_no_fused_attention_computes_is_refused(tiny_adsc: Bundle):
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(BackendUnavailableError, match="does not run graphs in float32, only in float16 and bfloat16"):
        compiler().compile(tiny_adsc, OPTIONS)


def test_an_engine_needs_a_gpu_to_run(compiled: tuple[Bundle, Path]):
    with pytest.raises(
        BackendUnavailableError, match=r"cannot run here: compiles for .*; to run, it needs an NVIDIA GPU"
    ):
        open_session(compiled[0], "tensorrt-rtx", OPTIONS)


@pytest.mark.parametrize(
    ("capability", "text"),
    [
        ((8, 9), ""),
        ((9, 0), "compiles for compute capability 7.5, 8.0, 8.6, 8.9, 12.0, 12.1; the GPU in this machine has 9.0"),
    ],
)
def test_doctor_tells_whether_the_gpu_is_one_that_is_compiled_for(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], text: str
):
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert compiler().state() == text


def found(bundle: Bundle, **changes: Any) -> Any:
    """Look for engines as a session on a GPU of compute capability 8.6 would."""
    library = replace(compiler().library, **{key: changes.pop(key) for key in ("version",) if key in changes})
    return find(bundle, library, changes.pop("capability", "8.6"), replace(OPTIONS, **changes))


def test_engines_are_found_with_the_room_they_were_built_with(compiled: tuple[Bundle, Path]):
    bundle, path = compiled
    engines = found(bundle, max_text_tokens=10)
    assert (engines.path, engines.room.max_text_tokens, engines.room.max_images) == (path, 40, 2)
    assert len(engines.plan("decoder")) == (path / "decoder.engine").stat().st_size


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"version": "9.9"}, EngineError, "has only tensorrt-rtx-.*-sm86-float16, and engines run with the version"),
        (
            {"capability": "8.9"},
            EngineError,
            r"expected tensorrt-rtx-.*-sm89-float16; build it with: .* --capability 8\.9",
        ),
        (
            {"max_text_tokens": 41},
            InputError,
            "max-text-tokens 41 is more than the 40 .* --max-text-tokens 41 --overwrite",
        ),
        ({"max_images": 3}, InputError, "max-images 3 is more than the 2 that"),
    ],
)
def test_engines_for_something_else_are_refused(
    compiled: tuple[Bundle, Path], changes: dict[str, Any], error: type[Exception], text: str
):
    with pytest.raises(error, match=text):
        found(compiled[0], **changes)


@pytest.fixture
def own(compiled: tuple[Bundle, Path], tmp_path: Path) -> tuple[Bundle, Path]:
    """Return a copy that a test may damage."""
    bundle, path = compiled
    shutil.copytree(bundle.path, tmp_path / "own")
    return Bundle.open(tmp_path / "own"), tmp_path / "own" / path.relative_to(bundle.path)


def test_engines_of_other_graphs_are_refused(own: tuple[Bundle, Path]):
    bundle, path = own
    record = json.loads((path / "engine.json").read_text())
    record["graphs"]["onnx/decoder_model_merged.onnx"] = "0" * 64
    (path / "engine.json").write_text(json.dumps(record))
    with pytest.raises(
        EngineError, match=r"was built from other graphs than .* has now; build it with: tokexport compile"
    ):
        found(bundle)


def test_a_damaged_record_is_refused(own: tuple[Bundle, Path]):
    (own[1] / "engine.json").write_text("{")
    with pytest.raises(EngineError, match=r"engine.json cannot be read .*; build again with: tokexport compile"):
        found(own[0])


def test_an_engine_that_was_cut_short_is_refused(own: tuple[Bundle, Path]):
    with (own[1] / "decoder.engine").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(EngineError, match=r"decoder.engine has 100 bytes, expected \d+; build it again with"):
        found(own[0]).plan("decoder")


def test_an_artefact_without_engines_says_how_to_build_them(tiny_adsc: Bundle):
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(EngineError, match=r"has no engines; expected .*; build it with: tokexport compile"):
        found(tiny_adsc)


def test_a_disk_without_room_is_refused_before_anything_is_built(
    own: tuple[Bundle, Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(EngineError, match=r"do not fit on the disk of .*, which has 0 MB left; free some room"):
        compiler().compile(own[0], OPTIONS, capability="8.9")
    assert [path.name for path in own[1].parent.iterdir()] == [own[1].name]
