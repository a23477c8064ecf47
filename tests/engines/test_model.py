"""An artefact from Python: load, ask, stream, chat; build and plan."""

# pyright: reportPrivateUsage=false

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tokexport
from tokexport.engines.generate import Sampling
from tokexport.engines.images import load_image
from tokexport.engines.model import Vlm, _opened
from tokexport.errors import BackendUnavailableError, BundleError, CheckpointError, InputError, RecipeError
from tokexport.exporter.bundle import Bundle

QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def vlm(tiny_adsc: Bundle) -> Vlm:
    return tokexport.load(tiny_adsc.path, threads=1)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)).save(path)
    return path


def test_an_answer_has_text_tokens_and_times(vlm: Vlm, picture: Path):
    answer = vlm.generate(QUESTION, [picture], max_new_tokens=6)
    assert 0 < len(answer.token_ids) <= 6
    assert answer.text == answer.text.strip()
    assert 0 < answer.ttft_ms <= answer.total_ms
    assert answer.prompt_tokens > 0


def test_the_same_question_gets_the_same_answer(vlm: Vlm, picture: Path):
    answers = [vlm.generate(QUESTION, [picture], max_new_tokens=8) for _ in range(2)]
    assert answers[0].token_ids == answers[1].token_ids


def test_a_stream_says_what_generate_says(vlm: Vlm, picture: Path):
    chat = vlm.chat(max_new_tokens=10)
    streamed = "".join(chat.stream(QUESTION, [picture]))
    answer = vlm.generate(QUESTION, [picture], max_new_tokens=10)
    assert streamed.strip() == answer.text == chat.last.text
    assert chat.last.token_ids == answer.token_ids


def test_an_engine_answers_as_the_others_do(tiny_adsc: Bundle, vlm: Vlm, picture: Path):
    expected = vlm.generate(QUESTION, [picture], max_new_tokens=8).token_ids
    for backend in ("ort-portable", "torch-eager"):
        other = tokexport.load(tiny_adsc.path, backend=backend, threads=1)
        assert other.generate(QUESTION, [picture], max_new_tokens=8).token_ids == expected


@pytest.mark.parametrize("kind", ["path", "text", "image"])
def test_an_image_is_given_as_path_text_or_image(vlm: Vlm, picture: Path, kind: str):
    images = {"path": picture, "text": str(picture), "image": load_image(picture)}
    expected = vlm.generate(QUESTION, [picture], max_new_tokens=4).token_ids
    assert vlm.generate(QUESTION, [images[kind]], max_new_tokens=4).token_ids == expected


@pytest.mark.parametrize("kind", ["transparent", "16 bits", "turned"])
def test_an_opened_image_is_seen_as_its_file_is(tmp_path: Path, kind: str):
    path, exif = tmp_path / "a.png", Image.Exif()
    exif[0x0112] = 6
    if kind == "transparent":
        Image.new("RGBA", (4, 2), (0, 0, 0, 0)).save(path)
    elif kind == "16 bits":
        Image.fromarray((np.arange(256) * 257).astype("uint16").reshape(16, 16)).save(path)
    else:
        Image.new("RGB", (4, 2)).save(path, exif=exif)
    with Image.open(path) as image:
        found = np.asarray(_opened(image))
    expected = np.asarray(load_image(path))
    assert found.shape == expected.shape
    assert (found == expected).all()


def test_a_chat_goes_on_from_what_was_said(tiny_full: Bundle, picture: Path):
    chat = tokexport.load(tiny_full.path, threads=1).chat(max_new_tokens=3)
    first = chat.ask(QUESTION, [picture])
    second = chat.ask("And behind it?")
    assert second.prompt_tokens < 30
    conversation = chat._conversation
    assert conversation.num_images == 1
    assert conversation.text_tokens == sum(answer.prompt_tokens + len(answer.token_ids) for answer in (first, second))


def test_an_image_may_come_in_the_second_turn(vlm: Vlm, picture: Path):
    chat = vlm.chat(max_new_tokens=2)
    chat.ask("Hello.")
    assert chat.ask(QUESTION, [picture]).token_ids
    assert chat._conversation.num_images == 1


@pytest.mark.parametrize(
    ("question", "num_images"),
    [("", 0), ("What is <image>?", 0), ("word " * 200, 0), (QUESTION, 4)],
    ids=["empty", "marker", "too long", "too many images"],
)
def test_a_failed_question_leaves_the_chat_usable(vlm: Vlm, picture: Path, question: str, num_images: int):
    spoilt = vlm.chat(max_new_tokens=3)
    spoilt.ask(QUESTION, [picture])
    with pytest.raises(InputError):
        spoilt.ask(question, [picture] * num_images)
    after = spoilt.ask("And behind it?").token_ids
    clean = vlm.chat(max_new_tokens=3)
    clean.ask(QUESTION, [picture])
    assert clean.ask("And behind it?").token_ids == after


def test_a_failed_first_question_leaves_the_chat_usable(vlm: Vlm, picture: Path):
    expected = vlm.generate(QUESTION, [picture], max_new_tokens=3).token_ids
    chat = vlm.chat(max_new_tokens=3)
    with pytest.raises(InputError):
        chat.ask("")
    assert chat.ask(QUESTION, [picture]).token_ids == expected


def test_a_missing_image_leaves_the_chat_usable(vlm: Vlm, picture: Path):
    chat = vlm.chat(max_new_tokens=3)
    with pytest.raises(InputError, match=r"^there is no image "):
        chat.ask(QUESTION, [picture.with_name("missing.png")])
    assert chat.ask(QUESTION, [picture]).token_ids


def test_an_answer_cut_short_by_a_full_cache_says_so(tiny_adsc: Bundle):
    chat = tokexport.load(tiny_adsc.path, threads=1, max_text_tokens=40).chat(max_new_tokens=64)
    answer = chat.ask("Hello.")
    assert answer.ended_by == "full cache"
    assert len(answer.token_ids) == 40 - answer.prompt_tokens + 1


def test_an_answer_cut_short_by_its_longest_length_says_so(vlm: Vlm):
    assert vlm.generate("Hello.", max_new_tokens=2).ended_by == "max_new_tokens"


def test_a_question_behind_a_full_cache_is_refused(tiny_adsc: Bundle):
    chat = tokexport.load(tiny_adsc.path, threads=1, max_text_tokens=40).chat(max_new_tokens=64)
    chat.ask("Hello.")
    for _ in range(2):
        with pytest.raises(InputError, match=r"do not fit into a cache for 40; .* raise --max-text-tokens$"):
            chat.ask("And now?")


def test_a_stream_left_early_leaves_the_chat_usable(vlm: Vlm):
    chat = vlm.chat(max_new_tokens=8)
    next(iter(chat.stream("Hello.")))
    assert chat.ask("And now?").token_ids


@pytest.mark.parametrize("count", [0, -1])
def test_an_answer_of_no_tokens_is_refused(vlm: Vlm, count: int):
    with pytest.raises(InputError, match=rf"^max-new-tokens {count} must be at least 1$"):
        vlm.generate("Hello.", max_new_tokens=count)


def test_a_seed_repeats_a_drawn_answer(vlm: Vlm):
    sampling = Sampling(temperature=3.0, seed=5)
    answers = [vlm.generate("Hello.", max_new_tokens=8, sampling=sampling).token_ids for _ in range(2)]
    assert answers[0] == answers[1]


def test_more_room_is_given_when_asked_for(tiny_adsc: Bundle, vlm: Vlm):
    roomy = tokexport.load(tiny_adsc.path, max_text_tokens=300, max_images=5)
    assert (roomy.session.options.max_text_tokens, roomy.session.options.max_images) == (300, 5)
    assert roomy.session.kv_bytes > vlm.session.kv_bytes


def test_a_model_without_room_for_images_answers_text(tiny_adsc: Bundle, picture: Path):
    vlm = tokexport.load(tiny_adsc.path, max_images=0)
    assert vlm.generate("Hello.", max_new_tokens=2).token_ids
    with pytest.raises(InputError, match=r"^1 images do not fit into a cache for 0; raise --max-images$"):
        vlm.generate(QUESTION, [picture])


@pytest.mark.parametrize("options", [{"max_text_tokens": 0}, {"max_text_tokens": -5}, {"max_images": -1}], ids=str)
def test_room_of_less_than_nothing_is_refused(tiny_adsc: Bundle, options: dict[str, Any]):
    with pytest.raises(InputError):
        tokexport.load(tiny_adsc.path, **options)


def test_a_folder_that_is_no_artefact_is_refused(tmp_path: Path):
    with pytest.raises(BundleError, match=r"has no tokexport.json, so it is no artefact; make one with: "):
        tokexport.load(tmp_path)


def test_an_unknown_engine_is_refused(tiny_adsc: Bundle):
    with pytest.raises(BackendUnavailableError, match=r"^there is no backend 'onnx'"):
        tokexport.load(tiny_adsc.path, backend="onnx")


def test_an_engine_that_runs_from_the_checkpoint_says_that_it_is_gone(tiny_adsc: Bundle, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"^there is no model directory .+gone; give a directory, "):
        tokexport.load(tiny_adsc.path, backend="torch-eager", model=str(tmp_path / "gone"))


def test_plan_from_python_has_the_keys_of_the_contract():
    report = tokexport.plan("mini_adsc")
    assert report["vision_tokens"].keys() == {"emitted", "entering_llm", "per_layer"}
    for key in ("flops", "kv_bytes", "kv_bytes_vision"):
        assert report[key].keys() == {"full", "compressed", "reduction"}


def test_plan_from_python_takes_settings_and_a_text_length():
    report = tokexport.plan("mini_adsc", settings=["compress.0.drops.0.keep=300"], text_tokens=7)
    assert report["prompt_tokens"]["text"] == 7
    assert 300 in report["vision_tokens"]["per_layer"]


def test_plan_from_python_refuses_an_unknown_recipe():
    with pytest.raises(RecipeError, match=r"^there is no recipe 'mini_adcs'; did you mean 'mini_adsc'\?$"):
        tokexport.plan("mini_adcs")


def test_build_from_python_makes_an_artefact_that_answers(checkpoint: Path, tmp_path: Path):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        '[model]\nfamily = "llava15"\ncheckpoint = "nowhere"\n'
        '[[compress]]\nmethod = "adsc"\ndrops = [{ layer = 1, keep = 8 }, { layer = 3, keep = 0.5 }]\n'
    )
    built = tokexport.build(
        str(recipe), tmp_path / "out", model=str(checkpoint), with_verify=False, with_bench=False, threads=1
    )
    assert (built.verification, built.bench) == (None, None)
    assert built.bundle.path == tmp_path / "out"
    assert tokexport.load(tmp_path / "out").generate("Hello.", max_new_tokens=1).token_ids
