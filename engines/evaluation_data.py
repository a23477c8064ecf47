"""Which dialogues an artefact is evaluated on, and how much room in the cache they need."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast, get_args

from tokexport.dialogues.generate import make_dialogue
from tokexport.dialogues.jsonl import read_jsonl
from tokexport.dialogues.schema import Dialogue, Split
from tokexport.engines.prompt import Message, PromptProcessor
from tokexport.errors import InputError, nearest

SPLITS: tuple[Split, ...] = get_args(Split)
DEFAULT_DIALOGUES = 2000
DEFAULT_TURNS = 3

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
    """

    description: Mapping[str, str | int]
    size: int
    get: Callable[[int], Dialogue]
    is_made: bool

    def __iter__(self) -> Iterator[Dialogue]:
        return map(self.get, range(self.size))

    def turn_counts(self) -> list[int]:
        """Return how many turns each dialogue has; made ones are not made for it."""
        if self.is_made:
            return [int(self.description["turns"])] * self.size
        return [len(dialogue.turns) for dialogue in self]

    def room(self, processor: PromptProcessor, max_new_tokens: int) -> int:
        """Return the text tokens of the longest dialogue, the longest answers included."""
        if not self.is_made:
            return max(_num_tokens(processor, dialogue, max_new_tokens) for dialogue in self)
        longest = max(_num_tokens(processor, dialogue, max_new_tokens) for dialogue in islice(self, _PROBED))
        return round(_SLACK * longest)


def open_dialogues(
    data: str = "test", *, dialogues: int | None = None, turns: int | None = None, seed: int | None = None
) -> DialogueSet:
    """Return the dialogues of a generated split or of a file.

    Args:
        data: ``train``, ``validation``, ``test``, or the path of a JSON-lines file.
        dialogues: how many, None for 2,000 generated ones or the whole file.
        turns: of a generated dialogue, None for 3.
        seed: of the generator, None for 0.

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
    return _from_file(data, dialogues)


def _generated(data: str, size: int, turns: int, seed: int) -> DialogueSet:
    split = cast(Split, data)
    return DialogueSet(
        {"split": data, "seed": seed, "turns": turns},
        size,
        functools.partial(make_dialogue, seed, split, num_turns=turns),
        is_made=True,
    )


def _from_file(data: str, size: int | None) -> DialogueSet:
    path = Path(data)
    if not path.suffix and not path.exists():
        raise InputError(f"{data!r} is no split and no JSON-lines file{nearest(data, list(SPLITS))}")
    read = read_jsonl(path)
    if size is not None and size > len(read):
        raise InputError(f"{size} dialogues are more than the {len(read)} of {path}; ask for fewer or leave it out")
    return DialogueSet({"file": path.name}, size or len(read), read.__getitem__, is_made=False)


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
