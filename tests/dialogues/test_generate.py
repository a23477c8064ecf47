"""Dialogues by number: the same whenever they are made, with kinds in turn."""

from collections import Counter
from dataclasses import replace
from typing import get_args

import pytest
from PIL import Image

from tokexport.dialogues.generate import _draw, corpus, make_dialogue, make_example
from tokexport.dialogues.questions import KINDS
from tokexport.dialogues.scene import render
from tokexport.dialogues.schema import Dialogue, Split


def content(dialogue: Dialogue) -> tuple[object, bytes]:
    assert isinstance(dialogue.image, Image.Image)
    return replace(dialogue, image=Image.new("L", (1, 1))), dialogue.image.tobytes()


def test_a_dialogue_does_not_depend_on_what_was_made_before():
    forwards = [content(make_dialogue(0, "train", index)) for index in range(4)]
    backwards = [content(make_dialogue(0, "train", index)) for index in reversed(range(4))]
    assert forwards == backwards[::-1]


@pytest.mark.parametrize(
    ("seed", "split", "index"), [(1, "train", 5), (0, "test", 5), (0, "train", 6)], ids=["seed", "split", "index"]
)
def test_another_number_gives_another_dialogue(seed: int, split: Split, index: int):
    assert content(make_dialogue(seed, split, index))[1] != content(make_dialogue(0, "train", 5))[1]


def test_an_example_is_the_dialogue_with_its_scene():
    scene, image, turns = make_example(2, "validation", 7, 3)
    dialogue = make_dialogue(2, "validation", 7)
    assert content(Dialogue(name="validation-000007", image=image, turns=turns)) == content(dialogue)
    assert render(scene).tobytes() == image.tobytes()


@pytest.mark.parametrize("split", get_args(Split))
@pytest.mark.parametrize("num_turns", [1, 3, 32])
def test_a_dialogue_has_as_many_turns_as_asked_for(split: Split, num_turns: int):
    assert len(make_dialogue(0, split, 3, num_turns=num_turns).turns) == num_turns


def test_no_question_comes_twice():
    for index in range(40):
        questions = [turn.question for turn in _draw(0, "train", index, 32, KINDS)[1]]
        assert len(set(questions)) == 32


def test_a_kind_comes_again_when_every_other_one_came():
    for index in range(40):
        kinds = [turn.kind for turn in _draw(0, "test", index, 3, KINDS)[1]]
        assert len(set(kinds)) == 3


def test_kinds_are_balanced():
    kinds = Counter(turn.kind for index in range(300) for turn in _draw(0, "test", index, 4, KINDS)[1])
    assert set(kinds) == set(KINDS)
    assert max(kinds.values()) - min(kinds.values()) < 0.25 * kinds.total() / len(KINDS)


def test_kinds_can_be_chosen():
    turns = make_dialogue(0, "train", 0, num_turns=6, kinds=["location", "counting"]).turns
    assert Counter(turn.kind for turn in turns) == {"location": 3, "counting": 3}


def test_questions_come_again_where_a_scene_has_no_others():
    turns = make_dialogue(0, "train", 0, num_turns=32, kinds=["whole_image"]).turns
    assert (len(turns), len({turn.question for turn in turns}) < 32) == (32, True)


def test_the_corpus_holds_questions_with_their_answers():
    sentences = list(corpus(2))
    assert len(sentences) == 32
    assert all(sentence.partition("?")[2] or sentence.startswith("Read ") for sentence in sentences)
    assert sentences == list(corpus(2))


def test_the_corpus_is_of_the_training_split():
    turns = make_example(0, "train", 0, 16)[2]
    assert list(corpus(1)) == [f"{turn.question} {turn.answers[0]}" for turn in turns]


def test_a_kind_can_be_narrowed_to_one_template():
    turns = make_dialogue(0, "train", 1, num_turns=8, kinds=["comparison.same_colour"]).turns
    assert {turn.kind for turn in turns} == {"comparison"}
    assert all("same colour" in turn.question for turn in turns)
    assert {
        turn.answers[0]
        for index in range(4)
        for turn in make_dialogue(0, "train", index, num_turns=8, kinds=["comparison.same_colour"]).turns
    } == {"yes", "no"}
