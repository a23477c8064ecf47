"""Dialogues about made pictures, reachable by number in any order."""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from tokexport.dialogues.questions import KINDS, ask
from tokexport.dialogues.scene import Scene, make_scene, render
from tokexport.dialogues.schema import Dialogue, Split, Turn

SPLIT_CODES: dict[Split, int] = {"train": 0, "validation": 1, "test": 2}

# Of a new question, before the kind counts as exhausted.
_MAX_TRIES = 8
_CORPUS_SEED, _CORPUS_TURNS = 0, 16


def make_dialogue(seed: int, split: Split, index: int, *, num_turns: int = 3, kinds: Sequence[str] = KINDS) -> Dialogue:
    """Return dialogue ``index`` of a split, the same whatever else was made.

    Kinds follow each other in random order, every one once before any comes again. No question comes twice as long
    as the scene has others.
    """
    scene, turns = _draw(seed, split, index, num_turns, kinds)
    return Dialogue(name=f"{split}-{index:06d}", image=render(scene), turns=turns)


def make_example(
    seed: int, split: Split, index: int, num_turns: int, *, kinds: Sequence[str] = KINDS
) -> tuple[Scene, Image.Image, tuple[Turn, ...]]:
    """Return the same as ``make_dialogue`` with the scene, from which ``patch_labels`` are made."""
    scene, turns = _draw(seed, split, index, num_turns, kinds)
    return scene, render(scene), turns


def corpus(num: int) -> Iterator[str]:
    """Yield the questions about ``num`` scenes of the training split, each with its answer: ``question answer``."""
    for index in range(num):
        _, turns = _draw(_CORPUS_SEED, "train", index, _CORPUS_TURNS, KINDS)
        yield from (f"{turn.question} {turn.answers[0]}" for turn in turns)


def _draw(seed: int, split: Split, index: int, num_turns: int, kinds: Sequence[str]) -> tuple[Scene, tuple[Turn, ...]]:
    assert kinds, "a dialogue needs a kind of question"
    rng = np.random.default_rng([seed, SPLIT_CODES[split], index])
    while True:
        scene = make_scene(rng, split)
        turns = _ask_all(rng, scene, num_turns, kinds)
        if len(turns) == num_turns:
            return scene, turns


def _ask_all(rng: np.random.Generator, scene: Scene, num_turns: int, kinds: Sequence[str]) -> tuple[Turn, ...]:
    """Return ``num_turns`` turns, or fewer where the scene lacks a kind."""
    turns: list[Turn] = []
    asked: set[str] = set()
    while len(turns) < num_turns:
        num_before = len(turns)
        for place in rng.permutation(len(kinds)):
            turn = _ask_new(rng, scene, kinds[int(place)], asked) if len(turns) < num_turns else None
            if turn is not None:
                turns.append(turn)
                asked.add(turn.question)
        if len(turns) == num_before:
            if not asked:
                break
            # Nothing new is left to ask.
            asked.clear()
    return tuple(turns)


def _ask_new(rng: np.random.Generator, scene: Scene, kind: str, asked: set[str]) -> Turn | None:
    for _ in range(_MAX_TRIES):
        turn = ask(rng, scene, kind)
        if turn is None or turn.question not in asked:
            return turn
    return None
