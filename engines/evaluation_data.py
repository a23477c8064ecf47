"""Which dialogues an artefact is evaluated on, and how much room in the cache they need."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from PIL import Image

from tokexport.dialogues.generate import make_dialogue
from tokexport.dialogues.jsonl import read_jsonl, read_questions
from tokexport.dialogues.schema import Dialogue, Split, Turn
from tokexport.engines.images import load_image
from tokexport.engines.prompt import Message, PromptProcessor
from tokexport.errors import InputError, nearest

SPLITS: tuple[Split, ...] = get_args(Split)
DEFAULT_DIALOGUES = 2000
DEFAULT_TURNS = 3

OPEN_QUESTIONS = (
    "Describe the image.",
    "Which objects are in the image?",
    "How many are there of each?",
    "What colors do they have?",
    "What text is in the image?",
)
"""What is asked about images of one's own, one after the other."""

# Generated questions come from few patterns: so many dialogues, and a fifth on top, show how long they get.
_PROBED = 32
_SLACK = 1.2


@dataclass(frozen=True)
class DialogueSet:
    """Dialogues that can be gone through more than once, also in another process.

    Attributes:
        description: where they come from, for reports.
        size: how many there are.
        get: returns one by its number.
        is_made: whether they are made when asked for, or all at hand.
        common_questions: those of every dialogue, empty where they differ.
    """

    description: Mapping[str, str | int]
    size: int
    get: Callable[[int], Dialogue]
    is_made: bool
    common_questions: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Dialogue]:
        return map(self.get, range(self.size))

    def turn_counts(self) -> list[int]:
        """Return how many turns each dialogue has; made ones are not made for it."""
        if self.is_made:
            return [int(self.description["turns"])] * self.size
        return [len(dialogue.turns) for dialogue in self]

    def dialogue_numbers(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Return the number of the dialogue of every question, from 0."""
        return np.repeat(np.arange(self.size), self.turn_counts())

    def part(self, first: int, size: int) -> "DialogueSet":
        """Return ``size`` dialogues from the one with the number ``first`` on."""
        assert 0 <= first <= first + size <= self.size, (first, size, self.size)
        moved = functools.partial(_get_moved, self.get, first)
        return DialogueSet({**self.description, "first": first}, size, moved, is_made=self.is_made)

    def room(self, processor: PromptProcessor, max_new_tokens: int) -> int:
        """Return the text tokens of the longest dialogue, the longest answers included."""
        if not self.is_made:
            return max(_num_tokens(processor, dialogue, max_new_tokens) for dialogue in self)
        longest = max(_num_tokens(processor, dialogue, max_new_tokens) for dialogue in islice(self, _PROBED))
        return round(_SLACK * longest)


def open_dialogues(
    data: str = "test",
    *,
    dialogues: int | None = None,
    turns: int | None = None,
    seed: int | None = None,
    needs_answers: bool = True,
) -> DialogueSet:
    """Return the dialogues of a generated split or of a file.

    Args:
        data: ``train``, ``validation``, ``test``, or the path of a JSON-lines file.
        dialogues: how many, None for 2,000 generated ones or the whole file.
        turns: of a generated dialogue, None for 3.
        seed: of the generator, None for 0.
        needs_answers: refuse questions of a file without an answer.

    Raises:
        InputError: an unknown split, no such file, a malformed one, or a number that does not fit it.
    """
    for name, value in (("dialogues", dialogues), ("turns", turns)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value} must be at least 1")
    if data in SPLITS:
        return _generated(
            data,
            DEFAULT_DIALOGUES if dialogues is None else dialogues,
            DEFAULT_TURNS if turns is None else turns,
            0 if seed is None else seed,
        )
    for name, value in (("turns", turns), ("seed", seed)):
        if value is not None:
            raise InputError(f"{name} {value} has no effect on the dialogues of a file; leave it out")
    return _from_file(data, dialogues, needs_answers=needs_answers)


def open_unlabelled(
    data: str | None = None,
    *,
    dialogues: int | None = None,
    turns: int | None = None,
    seed: int | None = None,
    images: Path | None = None,
    questions: Path | None = None,
    tick: Callable[[int, int], None] = lambda _done, _total: None,
) -> DialogueSet:
    """Return dialogues that need no answers: those of ``open_dialogues``, or about ``images``, see ``open_images``.

    Raises:
        InputError: what both raise, or an argument that would have no effect.
    """
    if images is None:
        if questions is not None:
            raise InputError(
                f"--questions {questions} has no effect without --images, the folder of what is asked about; add it"
            )
        return open_dialogues(data or "test", dialogues=dialogues, turns=turns, seed=seed, needs_answers=False)
    for name, value in (("data", data), ("turns", turns), ("seed", seed)):
        if value is not None:
            raise InputError(f"--{name} {value} has no effect on --images {images}; leave one of them out")
    return open_images(images, questions=questions, images=dialogues, tick=tick)


def open_images(
    folder: Path,
    *,
    questions: Path | None = None,
    images: int | None = None,
    tick: Callable[[int, int], None] = lambda _done, _total: None,
) -> DialogueSet:
    """Return dialogues about the images of a folder, in the order of their names, all of the same questions.

    Images are the files whose names end as a format does that Pillow reads. Folders inside and hidden files are left
    out. Each image is read once, so that a damaged one is found before the work begins.

    Args:
        folder: with the images.
        questions: a file, see ``dialogues.jsonl.read_questions``; None for ``OPEN_QUESTIONS``.
        images: how many, None for all.
        tick: told how many are read.

    Raises:
        InputError: no such folder, no image in it or too few, one that cannot be read, or no such questions.
    """
    turns = (
        tuple(Turn(question=question, answers=()) for question in OPEN_QUESTIONS)
        if questions is None
        else read_questions(questions)
    )
    paths = _image_files(folder)
    if images is not None and images > len(paths):
        raise InputError(f"{images} images are more than the {len(paths)} of {folder}; ask for fewer or leave it out")
    paths = paths[:images]
    for number, path in enumerate(paths, 1):
        try:
            load_image(path)
        except InputError as error:
            raise InputError(f"{error}, or take it out of the folder") from error
        tick(number, len(paths))
    dialogues = [Dialogue(name=path.name, image=path, turns=turns) for path in paths]
    asked = tuple(turn.question for turn in turns)
    description = {"images": folder.resolve().name, "questions": len(turns)}
    return DialogueSet(description, len(dialogues), dialogues.__getitem__, is_made=False, common_questions=asked)


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"the folder {folder} {what}; give a folder of images")
    endings = {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN}
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in endings and path.is_file() and not path.name.startswith(".")
    )
    if not paths:
        raise InputError(
            f"the folder {folder} holds no image; give one with PNG, JPEG, WebP or other image files in it"
        )
    return paths


def open_apart(
    data: str, dialogues: int | None, other_data: str | None, num_others: int
) -> tuple[DialogueSet, DialogueSet]:
    """Return dialogues that decide, and others to choose by, of which none is among the first.

    Args:
        data: where the first come from, see ``open_dialogues``.
        dialogues: how many, None for 2,000 generated ones or what the others leave of a file.
        other_data: where the others come from; None for the validation split, or the same file, its last dialogues.
        num_others: how many; of the same file at most half.

    Raises:
        InputError: see ``open_dialogues``; or too few dialogues in the file.
    """
    if other_data is None:
        other_data = "validation" if data in SPLITS else data
    if other_data != data:
        return open_dialogues(data, dialogues=dialogues), open_dialogues(other_data, dialogues=num_others)
    if data in SPLITS:
        first = DEFAULT_DIALOGUES if dialogues is None else dialogues
        every = open_dialogues(data, dialogues=first + num_others)
    else:
        every = open_dialogues(data)
        num_others = min(num_others, every.size // 2)
        first = every.size - num_others if dialogues is None else dialogues
    if num_others < 1 or first + num_others > every.size:
        raise InputError(
            f"{first} dialogues and {num_others} others to choose by are more than the {every.size} of {data}; ask for "
            "fewer, or give other data to choose by"
        )
    return every.part(0, first), every.part(first, num_others)


def _generated(data: str, size: int, turns: int, seed: int) -> DialogueSet:
    split = cast(Split, data)
    return DialogueSet(
        {"split": data, "seed": seed, "turns": turns},
        size,
        functools.partial(make_dialogue, seed, split, num_turns=turns),
        is_made=True,
    )


def _from_file(data: str, size: int | None, *, needs_answers: bool) -> DialogueSet:
    path = Path(data)
    if not path.suffix and not path.exists():
        raise InputError(f"{data!r} is no split and no JSON-lines file{nearest(data, list(SPLITS))}")
    read = read_jsonl(path, needs_answers=needs_answers)
    if size is not None and size > len(read):
        raise InputError(f"{size} dialogues are more than the {len(read)} of {path}; ask for fewer or leave it out")
    return DialogueSet({"file": path.name}, size or len(read), read.__getitem__, is_made=False)


def _get_moved(get: Callable[[int], Dialogue], first: int, number: int) -> Dialogue:
    return get(first + number)


def _num_tokens(processor: PromptProcessor, dialogue: Dialogue, max_new_tokens: int) -> int:
    try:
        messages = list(_messages(processor, dialogue))
    except InputError as error:
        raise InputError(f"dialogue {dialogue.name}: {error}") from error
    text = processor.render(messages, is_answer_next=False)
    return len(processor.encode(text, is_start=True)) + max_new_tokens * len(dialogue.turns)


def _messages(processor: PromptProcessor, dialogue: Dialogue) -> Iterable[Message]:
    for number, turn in enumerate(dialogue.turns):
        yield processor.user_message(turn.question, 1 if number == 0 else 0)
        yield {"role": "assistant", "content": [{"type": "text", "text": "."}]}
