"""``tokexport eval``: its document, its gate, and what it refuses."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.cli.conftest import Run, in_process, outcome_of
from tokexport.dialogues.jsonl import write_jsonl
from tokexport.engines.evaluation_data import open_dialogues
from tokexport.exporter.bundle import Bundle

SHORT = ("--dialogues", 2, "--max-new-tokens", 2, "--threads", 1)


@pytest.fixture
def own(tiny_adsc: Bundle, tmp_path: Path) -> Path:
    """Return a copy of an artefact, as evaluating writes into its reports."""
    return shutil.copytree(tiny_adsc.path, tmp_path / "adsc")


def test_the_document_holds_what_scripts_rely_on(run: Run, own: Path, tiny_full: Bundle, tmp_path: Path):
    full = shutil.copytree(tiny_full.path, tmp_path / "full")
    outcome = run("eval", own, *SHORT, "--full", full, "--answers", tmp_path / "a.jsonl", "--json")
    document = outcome.document
    assert outcome.code == 0
    assert document.keys() >= {"accuracy", "per_turn", "dialogues", "questions", "relative_to_full", "per_kind"}
    assert (document["dialogues"], document["questions"], len(document["per_turn"])) == (2, 6, 3)
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 6
    assert json.loads((own / "reports" / "eval.json").read_text()) == document
    assert "all questions" in outcome.err


def test_quiet_and_without_storing_nothing_is_left(run: Run, own: Path):
    outcome = run("eval", own, *SHORT, "--no-store", "--quiet")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    assert not (own / "reports" / "eval.json").exists()


def test_a_file_of_dialogues_is_evaluated(run: Run, own: Path, tmp_path: Path):
    data = write_jsonl(open_dialogues(dialogues=2, turns=2), tmp_path / "data")
    document = run("eval", own, "--data", data, "--max-new-tokens", 2, "--threads", 1, "--json").document
    assert document["questions"] == 4
    assert document["data"]["file"] == "dialogues.jsonl"


def test_an_accuracy_below_the_bar_exits_with_4(run: Run, own: Path):
    outcome = run("eval", own, *SHORT, "--min-accuracy", 0.5, "--json")
    assert outcome.code == 4
    assert outcome.error == "the accuracy is 0.0000, below the 0.5 of --min-accuracy"
    assert outcome.document["accuracy"] == 0


def test_an_accuracy_at_the_bar_is_enough(run: Run, own: Path):
    assert run("eval", own, *SHORT, "--min-accuracy", 0).code == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "tset"], "'tset' is no split and no JSON-lines file; did you mean 'test'?"),
        (
            ["--data", "missing.jsonl"],
            "there is no file missing.jsonl; give the path of a JSON-lines file of dialogues",
        ),
        (["--data", "{file}"], "{file}, line 2: turns is missing; give a list of at least one question and answer"),
        (["--metric", "vqa"], "dialogue test-000000, turn 1 has "),
        (["--max-text-tokens", "5"], "dialogue test-000000, turn 1: "),
        (["--backend", "ort-portabel"], "there is no backend 'ort-portabel'; did you mean 'ort-portable'?"),
        (["--full", "nowhere"], "nowhere is no directory, so it is no artefact; make one with: "),
        (["--answers", "missing/a.jsonl"], "missing/a.jsonl cannot be written (No such file or directory); choose "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_evaluated_is_refused(
    run: Run, artefact: Path, tmp_path: Path, picture: Path, arguments: list[str], expected: str
):
    file = tmp_path / "data.jsonl"
    whole = {"image": str(picture), "turns": [{"question": "Is it?", "answer": "yes"}]}
    file.write_text(f"{json.dumps(whole)}\n{json.dumps({'image': str(picture)})}\n")
    outcome = run("eval", artefact, *(argument.format(file=file) for argument in arguments))
    assert outcome.code == 1
    assert outcome.error.startswith(expected.format(file=file))


def test_loyalty_is_measured_on_images_of_ones_own(
    run: Run, own: Path, tiny_full: Bundle, picture: Path, tmp_path: Path
):
    (tmp_path / "questions.txt").write_text("What is it?\nHow many are there?\n")
    where = ("--full", tiny_full.path, "--images", picture.parent, "--questions", tmp_path / "questions.txt")
    outcome = run("eval", own, "--loyalty", *where, "--max-new-tokens", 2, "--threads", 1, "--json")
    assert outcome.code == 0
    document = outcome.document
    assert document.keys() >= {"token_agreement", "answer_agreement", "agreeing_prefix", "first_token_kl", "per_turn"}
    assert [turn["question"] for turn in document["per_turn"]] == ["What is it?", "How many are there?"]
    assert json.loads((own / "reports" / "loyalty.json").read_text()) == document
    assert "asked in turn: What is it? How many are there?" in outcome.err


def test_loyalty_is_measured_on_the_dialogues_of_accuracy(run: Run, own: Path, tiny_full: Bundle):
    outcome = run("eval", own, "--loyalty", "--full", tiny_full.path, *SHORT, "--no-store", "--json")
    assert (outcome.document["questions"], outcome.document["data"]["split"]) == (6, "test")
    assert not (own / "reports" / "loyalty.json").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--loyalty"], "--loyalty is to the uncompressed model, which was not given; name its artefact"),
        (["--loyalty", "--full", "{adsc}"], "{adsc} is compressed itself (16 -> 9 tokens"),
        (["--images", "photos"], "--images photos has no effect without --loyalty, as accuracy needs right answers;"),
        (["--questions", "a.txt"], "--questions a.txt has no effect without --loyalty"),
        (["--loyalty", "--full", "{full}", "--questions", "a.txt"], "--questions a.txt has no effect without --images"),
        (["--loyalty", "--full", "{full}", "--images", "gone"], "the folder gone does not exist; give a folder of"),
        (["--loyalty", "--full", "{full}", "--images", "p", "--turns", "2"], "--turns 2 has no effect on --images p;"),
        (["--loyalty", "--full", "{full}", "--images", "p", "--data", "x"], "--data x has no effect on --images p;"),
        (["--loyalty", "--full", "{full}", "--min-accuracy", "0.5"], "--min-accuracy 0.5 has no effect on --loyalty,"),
        (["--loyalty", "--full", "{full}", "--metric", "vqa"], "--metric vqa has no effect on --loyalty,"),
        (["--reselect"], "{adsc} keeps the same vision tokens whatever is asked, so --reselect has no effect; it is"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_has_no_effect_is_refused(
    run: Run, artefact: Path, tiny_full: Bundle, arguments: list[str], expected: str
):
    names = {"adsc": artefact, "full": tiny_full.path}
    outcome = run("eval", artefact, *(argument.format(**names) for argument in arguments))
    assert outcome.code == 1
    assert outcome.error.startswith(expected.format(**names))


@pytest.mark.parametrize(
    "arguments", [["--dialogues", "0"], ["--min-accuracy", "95"], ["--metric", "soft"], ["--turns", "0"]], ids=" ".join
)
def test_wrong_usage_exits_with_2(run: Run, arguments: list[str]):
    assert run("eval", "out", *arguments).code == 2


def test_ctrl_c_leaves_nothing_half_written(own: Path, tmp_path: Path):
    def listen() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs, and what they start, are deaf to it

    # So many dialogues that it is still at them when it is interrupted.
    arguments = ("eval", own, "--dialogues", 100_000, "--threads", 1, "--answers", tmp_path / "answers.jsonl")
    process = in_process(*arguments, preexec_fn=listen)
    assert process.stderr is not None
    said = ""
    while "evaluating" not in said:
        said += process.stderr.readline()
        assert process.poll() is None
    assert len(list(tmp_path.iterdir())) == 2
    process.send_signal(signal.SIGINT)
    outcome = outcome_of(process, said)
    assert (outcome.code, outcome.error) == (130, "interrupted")
    assert list(tmp_path.iterdir()) == [own]
    assert not (own / "reports" / "eval.json").exists()
