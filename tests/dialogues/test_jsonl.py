"""Dialogues of others: read as they are, or refused with line and field."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokexport.dialogues.generate import make_dialogue
from tokexport.dialogues.jsonl import read_jsonl, write_jsonl
from tokexport.dialogues.schema import Turn
from tokexport.errors import InputError

TURN = {"question": "Where is the star?", "answer": "left"}
LINE = {"image": "scene.png", "turns": [TURN]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an image in it."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "scene.png")
    return tmp_path


def written(folder: Path, *lines: object) -> Path:
    """Write one line for each: bytes and text as they are, the rest as JSON."""
    path = folder / "own.jsonl"
    encoded = [line if isinstance(line, bytes | str) else json.dumps(line) for line in lines]
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in encoded))
    return path


def error_of(path: Path) -> str:
    """Return why a file is refused, without the folder's path."""
    with pytest.raises(InputError) as caught:
        read_jsonl(path)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{path.parent}/", "")


def test_a_line_is_a_dialogue(folder: Path):
    line = {
        "id": "first",
        "image": "scene.png",
        "turns": [TURN, {"question": "And?", "answers": ["a", "b"], "kind": "x"}],
    }
    (dialogue,) = read_jsonl(written(folder, line))
    assert (dialogue.name, dialogue.image) == ("first", folder / "scene.png")
    assert dialogue.turns == (
        Turn(question="Where is the star?", answers=("left",)),
        Turn(question="And?", answers=("a", "b"), kind="x"),
    )


def test_a_line_without_an_id_is_named_by_its_number(folder: Path):
    assert [dialogue.name for dialogue in read_jsonl(written(folder, LINE, "", LINE))] == ["1", "3"]


def test_an_id_may_be_a_number(folder: Path):
    assert read_jsonl(written(folder, {**LINE, "id": 12}))[0].name == "12"


def test_an_image_may_be_absolute(folder: Path):
    (folder / "below").mkdir()
    path = written(folder / "below", {**LINE, "image": str(folder / "scene.png")})
    assert read_jsonl(path)[0].image == folder / "scene.png"


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n"])
def test_any_end_of_line_and_a_byte_order_mark_are_read(folder: Path, ending: str):
    text = json.dumps(LINE) + ending
    assert len(read_jsonl(written(folder, b"\xef\xbb\xbf" + (text * 2).encode()))) == 2


def test_text_that_is_not_ascii_is_kept(folder: Path):
    line = {**LINE, "turns": [{"question": "Où est l'étoile ?", "answer": "à gauche"}]}
    path = written(folder, json.dumps(line, ensure_ascii=False))
    assert read_jsonl(path)[0].turns[0].answers == ("à gauche",)


def turn_with(**fields: object) -> dict[str, Any]:
    """A line with one turn, whose fields are set, or left out where they are None."""
    return {**LINE, "turns": [{name: value for name, value in (TURN | fields).items() if value is not None}]}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{'image'", ": not JSON (Expecting property name enclosed in double quotes at character 2)"),
        ([LINE], ': [{"image": "scene.png", "turns": [{"q... is no JSON object; give an object with image and turns'),
        ("7", ": 7 is no JSON object; give an object with image and turns"),
        ("[" * 100000, ": cannot be read (maximum recursion depth exceeded"),
        ("9" * 5000, ": cannot be read (Exceeds the limit"),
        ({**LINE, "images": "a"}, " has no field 'images'; did you mean 'image'?"),
        ({"turns": [TURN]}, ": image is missing; give a text, the path of an image file"),
        ({**LINE, "image": ""}, ": image is empty; give a text, the path of an image file"),
        ({**LINE, "image": 3}, ": image is 3; give a text, the path of an image file"),
        ({**LINE, "image": "no.png"}, ": image no.png does not exist; give a path that is absolute or relative to the"),
        ({**LINE, "image": "x" * 5000}, " does not exist; give a path that is absolute or relative to the file"),
        ({**LINE, "id": ""}, ": id is empty; give a text, one that no other line has"),
        ({**LINE, "id": True}, ": id is true; give a text, one that no other line has"),
        ({"image": "scene.png"}, ": turns is missing; give a list of at least one question and answer"),
        ({**LINE, "turns": []}, ": turns is empty; give a list of at least one question and answer"),
        ({**LINE, "turns": TURN}, ': turns is {"question": "Where is the star?", "a...; give a list'),
        ({**LINE, "turns": [TURN, "Where?"]}, ': turns[1]: "Where?" is no JSON object; give an object with question'),
        (turn_with(question=None), ": turns[0]: question is missing; give a text, the question"),
        (turn_with(question=" "), ": turns[0]: question is empty; give a text, the question"),
        (turn_with(question=["Where?"]), ': turns[0]: question is ["Where?"]; give a text, the question'),
        (turn_with(answer=None), ": turns[0]: answer is missing; give a text, the right answer, or a list of them as"),
        (turn_with(answer=""), ": turns[0]: answer is empty; give a text, the right answer"),
        (turn_with(answer=0), ": turns[0]: answer is 0; give a text, the right answer"),
        (turn_with(answer="\ud800"), ": turns[0]: answer holds half a character, an unpaired surrogate; give a text"),
        (turn_with(answer=None, answers=[]), ": turns[0]: answers is empty; give a list of at least one right answer"),
        (turn_with(answer=None, answers="a"), ': turns[0]: answers is "a"; give a list of at least one right answer'),
        (turn_with(answer=None, answers=["a", ""]), ": turns[0]: answers[1] is empty; give a text, a right answer"),
        (turn_with(answers=["a"]), ": turns[0] has answer and answers; keep one of them"),
        (turn_with(anser="a"), ": turns[0] has no field 'anser'; did you mean 'answer'?"),
        (turn_with(kind=3), ": turns[0]: kind is 3; give a text or leave it out"),
        (b'{"image": "\xff"}', ": byte 12 is not UTF-8; save the file as UTF-8"),
        ({**LINE, "id": "1"}, ": id '1' is that of line 1 already; give every dialogue an id of its own"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "line",
)
def test_a_line_that_is_wrong_is_refused_with_its_number_and_field(folder: Path, line: object, reason: str):
    message = error_of(written(folder, LINE, line))
    assert message.startswith("own.jsonl, line 2")
    assert reason in message


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_a_dialogue_is_refused(folder: Path, content: str):
    assert error_of(written(folder, content)) == "own.jsonl holds no dialogue; expected one JSON object a line"


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    expected = "there is no file own.jsonl; give the path of a JSON-lines file of dialogues"
    assert error_of(tmp_path / "own.jsonl") == expected


def test_a_folder_is_refused(tmp_path: Path):
    (tmp_path / "own").mkdir()
    assert "own cannot be read (Is a directory)" in error_of(tmp_path / "own")


def test_what_is_written_is_read_back(tmp_path: Path):
    dialogues = [make_dialogue(0, "test", index, num_turns=4) for index in range(3)]
    read = read_jsonl(write_jsonl(dialogues, tmp_path / "made"))
    assert [replace(dialogue, image=Path()) for dialogue in read] == [
        replace(dialogue, image=Path()) for dialogue in dialogues
    ]
    for dialogue, original in zip(read, dialogues, strict=True):
        assert isinstance(dialogue.image, Path)
        with Image.open(dialogue.image) as image:
            assert np.array_equal(np.asarray(image), np.asarray(original.image))


def test_an_image_on_disk_is_copied_as_it_is(folder: Path):
    (dialogue,) = read_jsonl(written(folder, LINE))
    (copied,) = read_jsonl(write_jsonl([dialogue], folder / "copy"))
    assert isinstance(copied.image, Path)
    assert copied.image.read_bytes() == (folder / "scene.png").read_bytes()
    assert copied.image != dialogue.image
