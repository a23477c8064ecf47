"""Dialogues as files: one JSON object a line, images beside it.

```
{"id": "7", "image": "images/7.png", "turns": [{"question": "Where is the star?", "answer": "top left"}]}
```

``image`` is absolute or relative to the file. ``answers``, a list, takes the place of ``answer`` where several are
right. ``id`` and a turn's ``kind`` may be left out.

A file of questions alone holds one a line, as it stands or as one turn of the above.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from tokexport.dialogues.schema import Dialogue, Turn
from tokexport.errors import InputError, nearest

_LINE_FIELDS = ["id", "image", "turns"]
_TURN_FIELDS = ["question", "answer", "answers", "kind"]


def read_jsonl(path: Path, *, needs_answers: bool = True) -> list[Dialogue]:
    """Read dialogues, in the file's order; images are found, not opened. Blank lines are skipped.

    Args:
        path: the file.
        needs_answers: refuse questions without an answer.

    Raises:
        InputError: the file, or a line of it, is not as expected; the text names line and field.
    """
    dialogues: list[Dialogue] = []
    line_of: dict[str, int] = {}
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        fields = _as_object(where, _parse(where, line), "with image and turns")
        dialogue = _dialogue(where, path.parent, fields, str(number), needs_answers=needs_answers)
        first = line_of.setdefault(dialogue.name, number)
        if first != number:
            raise InputError(
                f"{where}: id {dialogue.name!r} is that of line {first} already; give every dialogue an id of its own"
            )
        dialogues.append(dialogue)
    if not dialogues:
        raise InputError(f"{path} holds no dialogue; expected one JSON object a line")
    return dialogues


def read_questions(path: Path) -> tuple[Turn, ...]:
    """Read questions, one a line: text, or JSON objects where the first line is one. Blank lines are skipped.

    Raises:
        InputError: the file, or a line of it, is not as expected; the text names line and field.
    """
    lines = [(f"{path}, line {number}", line) for number, line in _lines(path)]
    if not lines:
        raise InputError(f"{path} holds no question; expected one a line")
    if lines[0][1].startswith("{"):
        return tuple(_turn(where, _parse(where, line), needs_answers=False) for where, line in lines)
    return tuple(
        Turn(question=_text(where, "question", {"question": line}, "the question"), answers=()) for where, line in lines
    )


def write_jsonl(dialogues: Iterable[Dialogue], folder: Path) -> Path:
    """Write ``dialogues.jsonl`` and its images to ``folder``, made where missing, and return the file's path.

    An image in memory becomes a PNG; one on disk is copied as it is.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    path = folder / "dialogues.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number, dialogue in enumerate(dialogues):
            name = _write_image(dialogue.image, folder, f"images/{number:06d}")
            line = {"id": dialogue.name, "image": name, "turns": [_turn_fields(turn) for turn in dialogue.turns]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return path


def _write_image(image: Path | Image.Image, folder: Path, stem: str) -> str:
    if isinstance(image, Path):
        name = stem + image.suffix
        shutil.copyfile(image, folder / name)
    else:
        name = f"{stem}.png"
        # Noise does not compress; a higher level costs time and saves next to nothing.
        image.save(folder / name, compress_level=1)
    return name


def _turn_fields(turn: Turn) -> dict[str, Any]:
    answers: dict[str, Any] = {"answer": turn.answers[0]} if len(turn.answers) == 1 else {"answers": turn.answers}
    return {"question": turn.question, **answers, **({"kind": turn.kind} if turn.kind else {})}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers from 1."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; give the path of a JSON-lines file of dialogues") from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); give the path of a JSON-lines file of dialogues"
        ) from error
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}, line {number}: byte {error.start + 1} is not UTF-8; save the file as UTF-8"
            ) from error
        if text:
            yield number, text


def _parse(where: str, line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not JSON ({error.msg} at character {error.colno}); expected one JSON object a line"
        ) from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"{where}: cannot be read ({error}); expected one JSON object a line") from error


def _dialogue(where: str, folder: Path, fields: dict[str, Any], number: str, *, needs_answers: bool) -> Dialogue:
    _check_fields(where, fields, _LINE_FIELDS)
    name = fields.get("id", number)
    # Numbers are common as ids in the files of data sets.
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    image = folder / _text(where, "image", fields, "the path of an image file")
    name = _text(where, "id", {"id": name}, "one that no other line has")
    if not _is_file(image):
        raise InputError(f"{where}: image {image} does not exist; give a path that is absolute or relative to the file")
    turns = fields.get("turns")
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{where}: turns {_came(fields, 'turns')}; give a list of at least one question and answer")
    asked = (_turn(f"{where}: turns[{i}]", turn, needs_answers=needs_answers) for i, turn in enumerate(turns))
    return Dialogue(name=name, image=image, turns=tuple(asked))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        # A name too long, or a folder that may not be entered.
        return False


def _turn(where: str, found: object, *, needs_answers: bool) -> Turn:
    fields = _as_object(where, found, "with question and answer")
    _check_fields(where, fields, _TURN_FIELDS)
    if "answer" in fields and "answers" in fields:
        raise InputError(f"{where} has answer and answers; keep one of them")
    question = _text(where, "question", fields, "the question")
    kind = fields.get("kind", "")
    if not isinstance(kind, str):
        raise InputError(f"{where}: kind {_came(fields, 'kind')}; give a text or leave it out")
    has_answers = needs_answers or "answer" in fields or "answers" in fields
    return Turn(question=question, answers=_answers(where, fields) if has_answers else (), kind=kind)


def _answers(where: str, fields: dict[str, Any]) -> tuple[str, ...]:
    if "answers" not in fields:
        return (_text(where, "answer", fields, "the right answer, or a list of them as answers"),)
    answers = fields["answers"]
    if not isinstance(answers, list) or not answers:
        raise InputError(f"{where}: answers {_came(fields, 'answers')}; give a list of at least one right answer")
    return tuple(
        _text(where, f"answers[{i}]", {f"answers[{i}]": answer}, "a right answer") for i, answer in enumerate(answers)
    )


def _as_object(where: str, found: object, what: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise InputError(f"{where}: {_json(found)} is no JSON object; give an object {what}")
    return found


def _check_fields(where: str, fields: dict[str, Any], known: list[str]) -> None:
    for name in fields:
        if name not in known:
            raise InputError(f"{where} has no field {name!r}{nearest(name, known)}")


def _text(where: str, name: str, fields: dict[str, Any], what: str) -> str:
    text = fields.get(name)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: {name} {_came(fields, name)}; give a text, {what}")
    # JSON can escape half a character, which no file and no tokenizer can hold.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{where}: {name} holds half a character, an unpaired surrogate; give a text, {what}")
    return text.strip()


def _came(fields: dict[str, Any], name: str) -> str:
    """Say what is wrong with a field: ``is missing``, ``is empty`` or ``is 3``."""
    if name not in fields:
        return "is missing"
    found = fields[name]
    is_empty = found in (None, [], {}) or (isinstance(found, str) and not found.strip())
    return "is empty" if is_empty else f"is {_json(found)}"


def _json(found: object) -> str:
    """Return a value as it stands in the file, cut to what fits in an error."""
    text = json.dumps(found, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
