"""Loyalty to the uncompressed artefact: its figures, what is asked, what is stored and what is refused."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tokexport
from tests.conftest import recipe_for, save_checkpoint, tiny_config
from tests.engines.conftest import without_base_fingerprint
from tokexport.dialogues.schema import Dialogue, Turn
from tokexport.engines.accuracy import EvalOptions
from tokexport.engines.evaluation_data import OPEN_QUESTIONS, DialogueSet, open_dialogues, open_images
from tokexport.engines.following import FollowedAnswer
from tokexport.engines.loyalty import Loyalty, loyalty_of
from tokexport.errors import CheckpointError, InputError
from tokexport.exporter.bundle import Bundle
from tokexport.recipes.schema import Recipe

OPTIONS = EvalOptions(max_new_tokens=3, threads=1)
FASTV = {"method": "fastv", "keep": 4, "layer": 1}


def run(bundle: Bundle, full: Bundle, asked: DialogueSet | None = None, **more: Any) -> Loyalty:
    options = more.pop("options", OPTIONS)
    return loyalty_of(bundle.path, full.path, asked or open_dialogues(dialogues=2), options, **more)


@pytest.fixture
def own(tiny_adsc: Bundle, tmp_path: Path) -> Bundle:
    """Copy an artefact, as measuring writes into its reports."""
    return Bundle.open(shutil.copytree(tiny_adsc.path, tmp_path / "adsc"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of three images and what is none."""
    place = tmp_path / "photos"
    (place / "more").mkdir(parents=True)
    for name, color in (("b.png", "red"), ("a.JPG", "green"), ("c.webp", "blue")):
        Image.new("RGB", (60, 50), color).save(place / name)
    Image.new("RGB", (8, 8)).save(place / "more" / "d.png")
    (place / "notes.txt").write_text("not an image")
    (place / "._a.JPG").write_text("not an image either")
    return place


def followed(tokens: int, prefix: int, agreeing: int, kl: float, turn: int = 1, **more: Any) -> FollowedAnswer:
    times = {"ttft_ms": 5.0, "full_ttft_ms": 9.0}
    names = {"dialogue": "one", "question": "Is it?", "answer": "yes", "likeliest": "no", "kind": ""}
    return FollowedAnswer(
        **{**names, **times, **more}, turn=turn, tokens=tokens, prefix=prefix, agreeing=agreeing, kl=kl
    )


def loyalty(bundle: Bundle, answers: Sequence[FollowedAnswer], dialogues: Sequence[int]) -> Loyalty:
    return Loyalty(
        bundle=bundle,
        full=bundle.path,
        asked=open_dialogues(dialogues=1),
        options=OPTIONS,
        answers=tuple(answers),
        dialogue_Q=np.array(dialogues),
        sha256="0",
        seconds=1.0,
    )


# Figures


def test_figures_are_sums_over_tokens_and_over_answers(tiny_adsc: Bundle):
    answers = [followed(4, 4, 4, 0.0), followed(2, 0, 1, 3.0, turn=2), followed(2, 1, 1, 0.6, kind="counting")]
    report = loyalty(tiny_adsc, answers, [0, 0, 1]).report()
    assert report["token_agreement"]["mean"] == pytest.approx(6 / 8)
    assert report["answer_agreement"]["mean"] == pytest.approx(1 / 3)
    assert report["agreeing_prefix"]["mean"] == pytest.approx(5 / 3)
    assert report["answer_tokens"] == pytest.approx(8 / 3)
    assert report["first_token_kl"]["mean"] == pytest.approx(1.2)
    assert report["first_token_kl"]["p50"] == pytest.approx(0.6)
    assert (report["questions"], report["dialogues"]) == (3, 2)
    first, second = report["per_turn"]
    assert (first["questions"], first["token_agreement"]["mean"]) == (2, pytest.approx(5 / 6))
    assert (second["questions"], second["first_token_kl"]["mean"]) == (1, pytest.approx(3.0))
    assert report["per_kind"].keys() == {"counting"}
    assert report["ttft_ms"] == {"full": 9.0, "own": 5.0}


def test_intervals_are_over_images(tiny_adsc: Bundle):
    # One image whose three answers all differ, and one whose answers are all equal: a resample may hold one of them.
    answers = [followed(1, 0, 0, 1.0, turn=turn) for turn in (1, 2, 3)]
    answers += [followed(1, 1, 1, 0.0, turn=turn) for turn in (1, 2, 3)]
    report = loyalty(tiny_adsc, answers, [0, 0, 0, 1, 1, 1]).report()
    assert report["answer_agreement"] == {"mean": 0.5, "interval": [0.0, 1.0]}
    assert report["first_token_kl"]["interval"] == [0.0, 1.0]


def test_an_artefact_is_loyal_to_itself(tiny_full: Bundle):
    report = run(tiny_full, tiny_full, store=False).report()
    for figure in ("token_agreement", "answer_agreement"):
        assert report[figure] == {"mean": 1.0, "interval": [1.0, 1.0]}
    assert report["agreeing_prefix"]["mean"] == report["answer_tokens"]
    assert report["first_token_kl"] == {"mean": 0, "interval": [0, 0], "p50": 0, "p90": 0, "p99": 0}


def test_an_artefact_of_fewer_tokens_is_less_loyal(tiny_full: Bundle, tiny_adsc: Bundle):
    report = run(tiny_adsc, tiny_full, open_dialogues(dialogues=4), store=False).report()
    assert report["token_agreement"]["mean"] < 1
    assert report["answer_agreement"]["mean"] <= report["token_agreement"]["mean"]
    assert report["first_token_kl"]["mean"] > 0


def test_another_engine_finds_the_same(tiny_full: Bundle, tiny_adsc: Bundle):
    found = [
        run(tiny_adsc, tiny_full, options=replace(OPTIONS, backend=name), store=False)
        for name in ("ort", "torch-eager")
    ]
    assert found[0].report()["token_agreement"] == found[1].report()["token_agreement"]
    for one, other in zip(found[0].answers, found[1].answers, strict=True):
        assert one.kl == pytest.approx(other.kl, rel=1e-3)


def test_several_processes_find_what_one_does(tiny_full: Bundle, tiny_adsc: Bundle):
    alone, together = (
        run(tiny_adsc, tiny_full, options=replace(OPTIONS, jobs=jobs), store=False).report() for jobs in (1, 2)
    )
    assert alone["first_token_kl"] == together["first_token_kl"]
    assert alone["data"] == together["data"]


def test_tokens_chosen_anew_are_another_loyalty(
    tiny_full: Bundle, checkpoint: Path, exported: Callable[[Recipe], Bundle]
):
    bundle = exported(recipe_for(checkpoint, FASTV))
    reports = [
        run(bundle, tiny_full, options=replace(OPTIONS, reselect=reselect), store=False).report()
        for reselect in (False, True)
    ]
    (first, *later), (first_again, *later_again) = (report["per_turn"] for report in reports)
    assert first["first_token_kl"] == first_again["first_token_kl"]
    for one, again in zip(later, later_again, strict=True):
        assert one["first_token_kl"]["mean"] != again["first_token_kl"]["mean"]
    assert [report["reselect"] for report in reports] == [False, True]


# What is stored


def test_the_result_stands_in_the_reports(own: Bundle, tiny_full: Bundle):
    report = run(own, tiny_full).report()
    assert own.read_report("loyalty.json") == report
    assert "## Loyalty" in (own.path / "reports" / "report.md").read_text()
    assert ">Loyalty</h2>" in (own.path / "reports" / "report.html").read_text()


def test_nothing_is_stored_if_not_wanted(own: Bundle, tiny_full: Bundle):
    run(own, tiny_full, store=False)
    assert own.read_report("loyalty.json") is None
    assert tiny_full.read_report("loyalty.json") is None


def test_answers_are_written_one_a_line(own: Bundle, tiny_full: Bundle, tmp_path: Path):
    found = run(own, tiny_full, answers=tmp_path / "answers.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["equal"] for line in lines] == [answer.prefix == answer.tokens for answer in found.answers]
    assert lines[0].keys() >= {"dialogue", "turn", "question", "answer", "likeliest", "kl"}


def test_data_without_answers_is_enough(own: Bundle, tiny_full: Bundle, tmp_path: Path):
    Image.new("RGB", (60, 50), "red").save(tmp_path / "a.png")
    line = {"image": "a.png", "turns": [{"question": "What is it?"}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(line))
    asked = open_dialogues(str(tmp_path / "data.jsonl"), needs_answers=False)
    assert run(own, tiny_full, asked).report()["questions"] == 1
    with pytest.raises(InputError, match=r"turns\[0\]: answer is missing; give a text"):
        open_dialogues(str(tmp_path / "data.jsonl"))


def test_from_python(own: Bundle, tiny_full: Bundle, folder: Path):
    report = tokexport.loyalty(own.path, tiny_full.path, images=folder, max_new_tokens=2, threads=1).report()
    assert (report["dialogues"], report["questions"]) == (3, 15)
    assert [turn["question"] for turn in report["per_turn"]] == list(OPEN_QUESTIONS)
    assert report["data"]["images"] == "photos"


def test_what_images_make_useless_is_refused(own: Bundle, tiny_full: Bundle, folder: Path):
    with pytest.raises(InputError, match=r"^--seed 3 has no effect on --images .*; leave one of them out$"):
        tokexport.loyalty(own.path, tiny_full.path, images=folder, seed=3)


# Images


def test_the_images_of_a_folder_are_asked_about_in_the_order_of_their_names(folder: Path):
    asked = open_images(folder)
    assert [dialogue.name for dialogue in asked] == ["a.JPG", "b.png", "c.webp"]
    assert all(tuple(turn.question for turn in dialogue.turns) == OPEN_QUESTIONS for dialogue in asked)
    assert asked.common_questions == OPEN_QUESTIONS


def test_the_first_images_are_taken(folder: Path):
    done: list[tuple[int, int]] = []
    asked = open_images(folder, images=2, tick=lambda number, total: done.append((number, total)))
    assert [dialogue.name for dialogue in asked] == ["a.JPG", "b.png"]
    assert done == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "What is it?\n\n  How many? \n",
            [Turn(question="What is it?", answers=()), Turn(question="How many?", answers=())],
        ),
        (
            '{"question": "What is it?", "kind": "open"}\n{"question": "How many?", "answer": "2"}\n',
            [Turn(question="What is it?", answers=(), kind="open"), Turn(question="How many?", answers=("2",))],
        ),
    ],
    ids=["text", "JSON lines"],
)
def test_questions_come_from_a_file(folder: Path, content: str, expected: list[Turn]):
    path = folder / "questions.txt"
    path.write_text(content)
    first: Dialogue = open_images(folder, questions=path).get(0)
    assert list(first.turns) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("\n", "holds no question; expected one a line"),
        ('{"question": "What?"}\nHow many?', "line 2: not JSON"),
        ('{"question": "What?"}\n7', "line 2: 7 is no JSON object"),
        ('{"qestion": "What?"}', "line 1 has no field 'qestion'; did you mean 'question'?"),
    ],
    ids=["empty", "text behind JSON", "a number", "a typing error"],
)
def test_questions_that_are_none_are_refused(folder: Path, content: str, expected: str):
    path = folder / "questions.txt"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        open_images(folder, questions=path)
    assert expected in str(caught.value)


def test_a_folder_without_images_is_refused(folder: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty holds no image; give one with PNG, JPEG, WebP or other image files"):
        open_images(tmp_path / "empty")
    with pytest.raises(InputError, match=r"gone does not exist; give a folder of images$"):
        open_images(tmp_path / "gone")
    with pytest.raises(InputError, match=r"b.png is a file; give a folder of images$"):
        open_images(folder / "b.png")
    with pytest.raises(InputError, match=r"^4 images are more than the 3 of .*; ask for fewer or leave it out$"):
        open_images(folder, images=4)


@pytest.mark.parametrize("damage", ["truncated", "no image"])
def test_an_image_that_cannot_be_read_is_named(folder: Path, damage: str):
    path = folder / "b.png"
    path.write_bytes(path.read_bytes()[:70] if damage == "truncated" else b"hello")
    with pytest.raises(InputError, match=r"b.png is .*; .*, or take it out of the folder$"):
        open_images(folder)


# What is refused


def test_a_compressed_artefact_is_not_the_full_one(tiny_adsc: Bundle):
    with pytest.raises(InputError, match=r"is compressed itself \(16 -> 9 tokens"):
        run(tiny_adsc, tiny_adsc)


def test_an_engine_that_runs_all_tokens_makes_everything_loyal(tiny_adsc: Bundle, tiny_full: Bundle):
    with pytest.raises(InputError, match=r"^backend 'transformers' runs all tokens, so every artefact would be loyal;"):
        run(tiny_adsc, tiny_full, options=replace(OPTIONS, backend="transformers"))


def test_an_artefact_of_another_model_is_refused(
    tiny_adsc: Bundle, exported: Callable[[Recipe], Bundle], tmp_path: Path
):
    other = exported(recipe_for(save_checkpoint(tmp_path / "other", tiny_config(), seed=1)))
    with pytest.raises(InputError, match=r"is of another model \(.*other\) than .*; give the artefact of the same"):
        run(tiny_adsc, other)


def test_choosing_anew_what_is_never_chosen_is_refused_before_the_work(tiny_adsc: Bundle, tiny_full: Bundle):
    steps: list[str] = []
    with pytest.raises(InputError, match=r"keeps the same vision tokens whatever is asked, so --reselect has no"):
        run(tiny_adsc, tiny_full, options=replace(OPTIONS, reselect=True), progress=steps.append)
    assert steps == []


def test_an_older_artefact_whose_checkpoint_is_gone_is_built_again(
    copied: Callable[[Bundle], Bundle], tiny_full: Bundle, tiny_lora: tuple[Bundle, Path]
):
    old = without_base_fingerprint(copied(tiny_lora[0]), checkpoint="gone")
    with pytest.raises(CheckpointError, match=r"^whether .* are of one model cannot be found out: .*; build them "):
        run(old, tiny_full)
