"""An artefact as a model of lmms-eval: which requests it follows, and which it refuses."""

from importlib.util import find_spec
from typing import Any

import pytest
from PIL import Image

from tokexport.dialogues.generate import make_example
from tokexport.engines.backend import SessionOptions
from tokexport.engines.generate import Sampling
from tokexport.engines.lmms_eval_model import Request, TokexportModel, manifest
from tokexport.engines.model import Vlm
from tokexport.errors import BackendUnavailableError, InputError
from tokexport.exporter.bundle import Bundle

IMAGE = Image.linear_gradient("L").convert("RGB")
HAS_LMMS_EVAL = find_spec("lmms_eval") is not None
needs_lmms_eval = pytest.mark.skipif(
    not HAS_LMMS_EVAL, reason="being run by lmms-eval needs lmms-eval; install it with: pip install 'tokexport[eval]'"
)


@pytest.fixture(scope="module")
def vlm(tiny_adsc: Bundle) -> Vlm:
    return Vlm(tiny_adsc, "ort", SessionOptions.for_bundle(tiny_adsc, threads=1))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Request(max_new_tokens=1024)),
        ({"max_new_tokens": 16, "until": "\n\n"}, Request(max_new_tokens=16, until=("\n\n",))),
        ({"until": ["a", "", "b"], "num_beams": 1, "top_p": None}, Request(until=("a", "b"))),
        ({"temperature": 0, "top_p": 1.0, "do_sample": False, "image_aspect_ratio": "original"}, Request()),
        ({"temperature": 0.7, "do_sample": False}, Request()),
        ({"temperature": 0.7, "top_p": 0.9}, Request(sampling=Sampling(temperature=0.7, top_p=0.9))),
    ],
    ids=str,
)
def test_the_settings_of_a_task_are_read(settings: dict[str, Any], expected: Request):
    assert Request.parse(settings) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_beams": 3}, "the task sets num_beams = 3, which an artefact cannot follow; remove it"),
        ({"repetition_penalty": 1.2}, "the task sets repetition_penalty = 1.2"),
        ({"image_aspect_ratio": "pad"}, "the task sets image_aspect_ratio = 'pad'"),
        ({"temperature": -1}, "temperature -1.0 must be 0"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_followed_are_refused(settings: dict[str, Any], expected: str):
    with pytest.raises(InputError, match=expected):
        Request.parse(settings)


@pytest.fixture(scope="module")
def images(vlm: Vlm) -> list[Image.Image]:
    """Return an image about which a model with random weights has something to say."""
    candidates = ([make_example(0, "test", index, 1)[1]] for index in range(50))
    return next(one for one in candidates if len(vlm.generate("Is it?", one, max_new_tokens=6).text) > 5)


def test_an_answer_is_that_of_the_artefact(vlm: Vlm, images: list[Image.Image]):
    expected = vlm.generate("Is it?", images, max_new_tokens=6).text
    assert Request(max_new_tokens=6).answer(vlm, "<image>\nIs it?", images) == expected


def test_an_answer_ends_before_a_stop_text(vlm: Vlm, images: list[Image.Image]):
    whole = Request(max_new_tokens=6).answer(vlm, "Is it?", images)
    stop = whole[3:5]
    cut = Request(max_new_tokens=6, until=("never said", stop)).answer(vlm, "Is it?", images)
    assert cut == whole[: whole.index(stop)].strip() != whole


@pytest.mark.skipif(HAS_LMMS_EVAL, reason="lmms-eval is installed, so nothing asks for it")
@pytest.mark.parametrize("use", [manifest, lambda: TokexportModel("out")], ids=["entry point", "model"])
def test_without_lmms_eval_its_extra_is_named(use: Any):
    with pytest.raises(BackendUnavailableError, match=r"pip install 'tokexport\[eval\]'"):
        use()


@needs_lmms_eval
def test_lmms_eval_finds_the_model():
    from lmms_eval.models import get_model  # pyright: ignore[reportMissingImports]

    assert get_model("tokexport") is TokexportModel


@needs_lmms_eval
def test_requests_are_answered_in_their_order(tiny_adsc: Bundle):
    from lmms_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    model = TokexportModel(str(tiny_adsc.path), threads=1)
    model.task_dict = {"task": {"test": [{"images": [IMAGE]}, {"images": [IMAGE, IMAGE.rotate(90)]}, {"images": []}]}}
    requests = [
        Instance(
            request_type="generate_until",
            arguments=("Is it?", {"max_new_tokens": 4}, lambda doc: doc["images"], number, "task", "test"),
            idx=0,
            metadata={"task": "task", "doc_id": number, "repeats": 1},
        )
        for number in range(3)
    ]
    expected = [
        model.vlm.generate("Is it?", doc["images"], max_new_tokens=4).text for doc in model.task_dict["task"]["test"]
    ]
    assert model.generate_until(requests) == expected


@needs_lmms_eval
def test_what_lmms_eval_may_ask_and_an_artefact_cannot_is_refused(tiny_adsc: Bundle):
    with pytest.raises(InputError, match="batch_size 4 must be 1"):
        TokexportModel(str(tiny_adsc.path), batch_size=4)
    model = TokexportModel(str(tiny_adsc.path), threads=1)
    for kind, ask in {
        "loglikelihood": model.loglikelihood,
        "generate_until_multi_round": model.generate_until_multi_round,
    }.items():
        with pytest.raises(InputError, match=f"'generate_until', not '{kind}'; choose a task with that output_type"):
            ask([])
