"""Another model's answers in one conversation: what is given, what is noted, and the distance of two choices."""

from collections.abc import Callable
from dataclasses import replace
from math import log
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import recipe_for
from tokexport.dialogues.generate import make_dialogue
from tokexport.dialogues.schema import Dialogue
from tokexport.engines.backend import SessionOptions
from tokexport.engines.following import FollowedAnswer, GreedyListener, ToldAnswer, first_token_kl, follow, tell
from tokexport.engines.generate import Conversation
from tokexport.engines.model import Vlm
from tokexport.errors import InputError
from tokexport.exporter.bundle import Bundle
from tokexport.recipes.schema import Recipe

NEW_TOKENS = 5
FASTV = {"method": "fastv", "keep": 4, "layer": 1}
PYRAMID = {"method": "pyramiddrop", "drops": [{"layer": 1, "keep": 8}, {"layer": 3, "keep": 4}]}


def open_vlm(bundle: Bundle, *, room: int = 200) -> Vlm:
    return Vlm(bundle, "ort", SessionOptions.for_bundle(bundle, max_text_tokens=room, max_images=1, threads=1))


def dialogue(index: int = 0, num_turns: int = 3) -> Dialogue:
    return make_dialogue(0, "test", index, num_turns=num_turns)


def told_by(vlm: Vlm, one: Dialogue) -> tuple[ToldAnswer, ...]:
    return tell(vlm, one, max_new_tokens=NEW_TOKENS)


def followed(vlm: Vlm, told: tuple[ToldAnswer, ...], one: Dialogue) -> tuple[FollowedAnswer, ...]:
    return follow(vlm, one, told, max_new_tokens=NEW_TOKENS)


def text_tokens(vlm: Vlm) -> int:
    """Return how many are in the cache."""
    conversation = vlm.session.conversation
    assert isinstance(conversation, Conversation)
    return conversation.text_tokens


@pytest.fixture(scope="module")
def full(tiny_full: Bundle) -> Vlm:
    return open_vlm(tiny_full)


# The distance of two distributions


def test_the_distance_is_worked_out_by_hand():
    # 1/2, 1/4, 1/4 beside thirds: 1/2 log(3/2) + 2 x 1/4 log(3/4) = 1/2 log(9/8).
    full_W = np.log(np.array([2, 1, 1], np.float32))
    assert first_token_kl(full_W, np.zeros(3, np.float32)) == pytest.approx(log(9 / 8) / 2, rel=1e-6)


def test_the_distance_has_a_direction():
    # Thirds beside 1/2, 1/4, 1/4: 1/3 log(2/3) + 2/3 log(4/3).
    own_W = np.log(np.array([2, 1, 1], np.float32))
    expected = log(2 / 3) / 3 + 2 * log(4 / 3) / 3
    assert first_token_kl(np.zeros(3, np.float32), own_W) == pytest.approx(expected, rel=1e-6)


def test_only_ratios_of_probabilities_count():
    full_W, own_W = (np.random.default_rng(seed).standard_normal(50).astype(np.float32) for seed in (0, 1))
    assert first_token_kl(full_W + 64, own_W - 32) == pytest.approx(first_token_kl(full_W, own_W), rel=1e-4)


def test_equal_logits_are_no_distance_apart_however_large():
    logits_W = np.random.default_rng(0).standard_normal(32000).astype(np.float32) * 300
    assert first_token_kl(logits_W, logits_W) == 0


def test_what_the_full_model_rules_out_adds_nothing():
    full_W = np.array([0, 0, -np.inf], np.float32)
    assert first_token_kl(full_W, np.zeros(3, np.float32)) == pytest.approx(log(3 / 2), rel=1e-6)


# Listening


def test_a_listener_takes_the_likeliest_or_what_it_is_given():
    logits = [np.eye(4, dtype=np.float32)[place] for place in (2, 0, 3)]
    greedy, given = GreedyListener(), GreedyListener(iter((1, 1, 1)))
    assert [greedy(one) for one in logits] == [2, 0, 3]
    assert [given(one) for one in logits] == [1, 1, 1]
    assert given.likeliest == [2, 0, 3]


def test_each_turn_has_its_own_first_logits():
    listener = GreedyListener()
    for place in (2, 0):
        listener(np.eye(4, dtype=np.float32)[place])
    tokens, first_W = listener.take()
    listener(np.eye(4, dtype=np.float32)[3])
    assert (tokens, int(first_W.argmax())) == ((2, 0), 2)
    assert int(listener.take()[1].argmax()) == 3


# Following


def test_what_is_told_is_what_the_model_answers(full: Vlm):
    told = told_by(full, dialogue())
    chat = full.chat(max_new_tokens=NEW_TOKENS)
    for turn, (asked, answer) in enumerate(zip(dialogue().turns, told, strict=True)):
        said = chat.ask(asked.question, [dialogue().image] if turn == 0 else [])
        stop = said.ended_by == "stop token"
        assert list(answer.tokens[: len(answer.tokens) - stop]) == said.token_ids


def test_a_model_follows_itself_exactly(full: Vlm):
    for index in range(3):
        for answer in followed(full, told_by(full, dialogue(index)), dialogue(index)):
            assert answer.agreeing == answer.prefix == answer.tokens > 0
            assert answer.kl == 0
            assert answer.likeliest == answer.answer


@pytest.mark.parametrize("method", [FASTV, PYRAMID], ids=["fastv", "pyramiddrop"])
def test_tokens_are_chosen_by_the_question_and_not_by_the_answer_that_is_given(
    checkpoint: Path, exported: Callable[[Recipe], Bundle], method: dict[str, object]
):
    vlm = open_vlm(exported(recipe_for(checkpoint, method)))
    assert all(answer.kl == 0 for answer in followed(vlm, told_by(vlm, dialogue()), dialogue()))


def test_a_model_of_fewer_tokens_follows_less(full: Vlm, tiny_adsc: Bundle):
    thin = open_vlm(tiny_adsc)
    found = [answer for i in range(4) for answer in followed(thin, told_by(full, dialogue(i)), dialogue(i))]
    assert sum(answer.agreeing for answer in found) < sum(answer.tokens for answer in found)
    assert all(answer.kl > 0 for answer in found)


def test_an_answer_that_the_model_would_not_give_is_counted_place_by_place(full: Vlm):
    (told,) = told_by(full, one := dialogue(num_turns=1))
    assert len(told.tokens) == NEW_TOKENS
    other = (told.tokens[1] + 1) % 512 + 5
    (answer,) = followed(full, (replace(told, tokens=(told.tokens[0], other, *told.tokens[2:])),), one)
    assert (answer.tokens, answer.prefix) == (NEW_TOKENS, 1)
    assert answer.agreeing < NEW_TOKENS
    assert answer.kl == 0
    assert answer.answer != answer.likeliest


def test_later_turns_stand_behind_the_answers_that_were_told(full: Vlm, tiny_adsc: Bundle):
    told = told_by(full, dialogue())
    expected = text_tokens(full)
    thin = open_vlm(tiny_adsc)
    answers = followed(thin, told, dialogue())
    assert text_tokens(thin) == expected
    assert sum(answer.tokens for answer in answers) == sum(len(answer.tokens) for answer in told)


def test_a_conversation_that_does_not_fit_is_named(tiny_full: Bundle):
    with pytest.raises(InputError, match=r"^dialogue test-000000, turn 1: .* raise --max-text-tokens"):
        told_by(open_vlm(tiny_full, room=5), dialogue())
