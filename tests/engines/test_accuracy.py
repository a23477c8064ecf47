"""An artefact and the uncompressed one on the same data: what is stored, reused, written and refused."""

import json
import os
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tokexport.dialogues.generate import make_dialogue
from tokexport.dialogues.jsonl import write_jsonl
from tokexport.dialogues.schema import Dialogue
from tokexport.engines.accuracy import Accuracy, EvalOptions, evaluate_artefact
from tokexport.engines.evaluate import AskedDialogue
from tokexport.engines.evaluation_data import DialogueSet, open_dialogues
from tokexport.engines.evaluation_processes import ask_in_processes, asking
from tokexport.engines.prompt import PromptProcessor
from tokexport.engines.scoring import normalise
from tokexport.errors import InputError, TokexportError
from tokexport.exporter.bundle import Bundle

OPTIONS = EvalOptions(max_new_tokens=3, threads=1)


def run(bundle: Bundle, asked: DialogueSet | None = None, options: EvalOptions = OPTIONS, **more: Any) -> Accuracy:
    return evaluate_artefact(bundle.path, asked or open_dialogues(dialogues=2), options, **more)


@pytest.fixture
def pair(tiny_adsc: Bundle, tiny_full: Bundle, tmp_path: Path) -> tuple[Bundle, Bundle]:
    """Copy both artefacts, as evaluating writes into their reports."""
    return (
        Bundle.open(shutil.copytree(tiny_adsc.path, tmp_path / "adsc")),
        Bundle.open(shutil.copytree(tiny_full.path, tmp_path / "full")),
    )


def key_of(bundle: Bundle, folder: Path, right: Callable[[int], bool], name: str) -> DialogueSet:
    """Return dialogues of one turn in a file, the artefact's own answers accepted where ``right(number)``."""
    asked = list(open_dialogues(dialogues=40, turns=1))
    said = folder / "said.jsonl"
    run(bundle, open_dialogues(dialogues=40, turns=1), answers=said, store=False)
    answers = [json.loads(line)["answer"] for line in said.read_text().splitlines()]
    # A model with random weights is sometimes silent, and nothing said is never right.
    spoken = [(one, answer) for one, answer in zip(asked, answers, strict=True) if normalise(answer)][:8]
    keyed = [
        replace(one, turns=(replace(one.turns[0], answers=(answer if right(number) else "nothing of the kind",)),))
        for number, (one, answer) in enumerate(spoken)
    ]
    return open_dialogues(str(write_jsonl(keyed, folder / name)))


def test_the_result_stands_in_the_reports(pair: tuple[Bundle, Bundle]):
    bundle, _ = pair
    report = run(bundle).report()
    assert bundle.read_report("eval.json") == report
    assert "| all questions | 6 |" in (bundle.path / "reports" / "report.md").read_text()
    assert report["relative_to_full"] is None
    assert report["data"]["split"] == "test"


def test_nothing_is_stored_if_not_wanted(pair: tuple[Bundle, Bundle]):
    bundle, full = pair
    run(bundle, store=False, full=full.path)
    assert bundle.read_report("eval.json") is full.read_report("eval.json") is None


def test_the_full_artefact_is_evaluated_once(pair: tuple[Bundle, Bundle], tmp_path: Path):
    bundle, full = pair
    asked = key_of(full, tmp_path, lambda number: number < 6, "data")
    steps: list[str] = []
    first, second = (run(bundle, asked, full=full.path, progress=steps.append).report()["full"] for _ in range(2))
    assert first["full_accuracy"] == 6 / 8
    assert first == second
    assert sum("evaluating full" in step for step in steps) == 1


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        (open_dialogues(dialogues=3), OPTIONS),
        (open_dialogues(dialogues=2, seed=1), OPTIONS),
        (open_dialogues(dialogues=2), EvalOptions(max_new_tokens=2, threads=1)),
        (open_dialogues(dialogues=2), EvalOptions(max_new_tokens=3, threads=1, backend="ort-portable")),
    ],
    ids=["more dialogues", "another seed", "shorter answers", "another engine"],
)
def test_a_stored_evaluation_of_another_kind_is_not_taken(
    pair: tuple[Bundle, Bundle], asked: DialogueSet, options: EvalOptions
):
    bundle, full = pair
    run(full)
    steps: list[str] = []
    run(bundle, asked, options, full=full.path, progress=steps.append)
    assert any("evaluating full" in step for step in steps)


def test_what_is_relative_to_full_is_its_part(pair: tuple[Bundle, Bundle], tmp_path: Path):
    bundle, full = pair
    asked = key_of(full, tmp_path, lambda _number: True, "data")
    report = run(bundle, asked, full=full.path).report()
    assert report["full"]["full_accuracy"] == 1
    assert report["relative_to_full"] == report["accuracy"] == 1 - report["full"]["lost"] / 8


def test_answers_are_written_one_a_line(pair: tuple[Bundle, Bundle], tmp_path: Path):
    path = tmp_path / "answers.jsonl"
    asked = key_of(pair[0], tmp_path, lambda number: number % 2 == 0, "data")
    found = run(pair[0], asked, answers=path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["correct"] for line in lines] == [True, False] * 4
    assert lines[0].keys() == {"dialogue", "turn", "kind", "question", "answer", "expected", "score", "correct"}
    assert found.report()["accuracy"] == 0.5


def test_an_interrupted_evaluation_leaves_nothing(pair: tuple[Bundle, Bundle], tmp_path: Path):
    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pair[0], answers=tmp_path / "answers.jsonl", tick=interrupt)
    assert {path.name for path in tmp_path.iterdir()} == {"adsc", "full"}
    assert pair[0].read_report("eval.json") is None


def test_answers_that_cannot_be_written_are_refused_before_the_work(tiny_adsc: Bundle, tmp_path: Path):
    steps: list[str] = []
    with pytest.raises(InputError, match=r"answers.jsonl cannot be written \(No such file or directory\); choose"):
        run(tiny_adsc, answers=tmp_path / "missing" / "answers.jsonl", progress=steps.append)
    assert steps == []


def test_a_compressed_artefact_is_not_the_full_one(tiny_adsc: Bundle):
    with pytest.raises(InputError, match=r"is compressed itself \(16 -> 9 tokens"):
        run(tiny_adsc, full=tiny_adsc.path)


def test_an_engine_that_runs_all_tokens_compares_nothing(tiny_adsc: Bundle, tiny_full: Bundle):
    with pytest.raises(InputError, match="backend 'transformers' runs all tokens, so there is nothing to compare"):
        run(tiny_adsc, options=EvalOptions(backend="transformers"), full=tiny_full.path)


def test_an_engine_that_runs_all_tokens_is_said_to_ignore_compression(tiny_adsc: Bundle):
    found = [
        run(tiny_adsc, open_dialogues(dialogues=1), EvalOptions(backend=name, max_new_tokens=1), store=False)
        for name in ("ort", "transformers")
    ]
    assert [one.report()["ignores_compression"] for one in found] == [False, True]


# Data


def test_made_dialogues_are_those_of_the_generator():
    asked = open_dialogues("validation", dialogues=2, turns=4, seed=5)
    expected = [make_dialogue(5, "validation", index, num_turns=4) for index in range(2)]
    assert [one.turns for one in asked] == [one.turns for one in expected]
    assert asked.description == {"split": "validation", "seed": 5, "turns": 4}


def test_by_default_2000_dialogues_are_made():
    assert open_dialogues().size == 2000


def test_of_a_file_all_or_the_first_are_taken(tmp_path: Path):
    path = str(write_jsonl(open_dialogues(dialogues=3, turns=1), tmp_path))
    assert [len(list(open_dialogues(path, dialogues=number))) for number in (None, 2)] == [3, 2]


@pytest.mark.parametrize("turns", [3, 12])
def test_there_is_room_for_the_longest_answers(tiny_adsc: Bundle, turns: int):
    asked = open_dialogues(dialogues=40, turns=turns)
    room = asked.room(PromptProcessor(tiny_adsc.path), 5)
    assert room >= max(DialogueSet({}, 40, asked.get, is_made=False).room(PromptProcessor(tiny_adsc.path), 5), 1)


def test_many_turns_get_more_room_than_the_recipe_has(tiny_adsc: Bundle):
    found = run(tiny_adsc, open_dialogues(dialogues=1, turns=8), store=False)
    assert found.evaluation.scores_Q.size == 8


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"data": "tset"}, "'tset' is no split and no JSON-lines file; did you mean 'test'?"),
        ({"data": "missing.jsonl"}, "there is no file missing.jsonl; give the path"),
        ({"dialogues": 0}, "dialogues 0 must be at least 1"),
        ({"turns": 0}, "turns 0 must be at least 1"),
        ({"data": "{file}", "turns": 2}, "turns 2 has no effect on the dialogues of a file; leave it out"),
        ({"data": "{file}", "seed": 2}, "seed 2 has no effect on the dialogues of a file; leave it out"),
        ({"data": "{file}", "dialogues": 2}, "2 dialogues are more than the 1 of "),
    ],
    ids=str,
)
def test_data_that_is_not_there_is_refused(tmp_path: Path, arguments: dict[str, Any], expected: str):
    path = write_jsonl(open_dialogues(dialogues=1), tmp_path)
    given = {name: value.format(file=path) if name == "data" else value for name, value in arguments.items()}
    with pytest.raises(InputError) as error:
        open_dialogues(**given)
    assert str(error.value).startswith(expected)


# In several processes


def test_several_processes_find_what_one_does(pair: tuple[Bundle, Bundle], tmp_path: Path):
    asked = key_of(pair[0], tmp_path, lambda number: number % 3 > 0, "data")
    done: list[tuple[int, int]] = []
    alone, together = tmp_path / "alone.jsonl", tmp_path / "together.jsonl"
    expected = run(pair[0], asked, answers=alone).report()
    found = run(
        pair[0],
        asked,
        replace(OPTIONS, jobs=2),
        answers=together,
        tick=lambda number, total: done.append((number, total)),
    ).report()
    assert together.read_text() == alone.read_text()
    assert {"seconds", "ttft_ms"} == {key for key, value in expected.items() if found[key] != value}
    assert done == [(number, 8) for number in range(1, 9)]


def test_made_dialogues_are_made_in_each_process(pair: tuple[Bundle, Bundle]):
    expected, found = (run(pair[0], options=replace(OPTIONS, jobs=jobs)).evaluation for jobs in (1, 5))
    assert found.sha256 == expected.sha256
    assert (found.scores_Q == expected.scores_Q).all()


def test_what_goes_wrong_in_a_process_is_told(pair: tuple[Bundle, Bundle], tmp_path: Path):
    asked = open_dialogues(dialogues=2)
    path = write_jsonl([*asked, replace(asked.get(0), name="long", turns=asked.get(0).turns * 9)], tmp_path)
    options = replace(OPTIONS, jobs=2, max_text_tokens=120)
    with pytest.raises(InputError, match=r"^dialogue long, turn \d+: .*raise --max-text-tokens"):
        run(pair[0], open_dialogues(str(path)), options)
    with pytest.raises(TokexportError, match="there is no backend 'ont'"):
        run(pair[0], asked, replace(options, backend="ont"))


def _die(_dialogue: object) -> AskedDialogue:
    os._exit(9)


def _dying() -> Callable[[object], AskedDialogue]:
    return _die


def test_a_process_that_ends_is_told():
    with pytest.raises(TokexportError, match=r"^one of 2 processes ended, perhaps for lack of memory;"):
        list(ask_in_processes(_dying, open_dialogues(dialogues=4), 2))


class _Engine:
    """Asks, and refers to itself as a session and its conversation do."""

    def __init__(self) -> None:
        self.conversation = self

    def __call__(self, dialogue: Dialogue) -> str:
        return dialogue.name


def test_an_engine_is_closed_when_all_is_asked():
    engines: list[weakref.ref[_Engine]] = []

    def opened() -> _Engine:
        engine = _Engine()
        engines.append(weakref.ref(engine))
        return engine

    with asking(opened, open_dialogues(dialogues=2), 1) as answers:
        assert list(answers) == ["test-000000", "test-000001"]
    assert engines[0]() is None


@pytest.mark.parametrize(("threads", "jobs", "expected"), [(8, 2, 4), (3, 2, 1), (1, 4, 1), (5, 1, 5), (None, 1, None)])
def test_processes_share_the_threads(threads: int | None, jobs: int, expected: int | None):
    assert EvalOptions(threads=threads, jobs=jobs).threads_each() == expected


def test_no_process_is_refused():
    with pytest.raises(InputError, match=r"^jobs 0 must be at least 1$"):
        EvalOptions(jobs=0)
