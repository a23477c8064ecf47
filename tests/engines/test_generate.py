"""Conversations: what is fed, what is refused, and which token is taken."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.conftest import NUM_VISION_TOKENS, recipe_for
from tests.engines.conftest import open_engine, pixels, words
from tokexport.engines.backend import Session
from tokexport.engines.generate import IMAGE, Conversation, Sampler, Sampling
from tokexport.errors import InputError
from tokexport.exporter.bundle import Bundle
from tokexport.recipes.schema import Recipe

SAME = 1e-4
"""The largest difference between logits that rounding makes, as in tolerances.toml."""


@pytest.fixture(scope="module")
def full(tiny_full: Bundle) -> Session:
    return open_engine(tiny_full)


@pytest.fixture(scope="module")
def thin(tiny_adsc: Bundle) -> Session:
    return open_engine(tiny_adsc)


def features(session: Session, count: int, seed: int = 0) -> list[NDArray[np.generic]]:
    encoded = session.encode_images(pixels(count, seed))
    return [encoded[i : i + 1] for i in range(count)]


def logits_of(session: Session, *turns: Sequence[int], num_images: int = 0) -> NDArray[np.float32]:
    """Feed turns to a new conversation and return the logits of every token."""
    conversation, waiting = Conversation(session), features(session, num_images) if num_images else []
    found: list[NDArray[np.float32]] = []
    for turn in turns:
        count = list(turn).count(IMAGE)
        found.append(conversation.feed(turn, waiting[:count], all_logits=True))
        waiting = waiting[count:]
    return np.concatenate(found)


def answer(session: Session, sampling: Sampling, count: int = 12, stop_ids: Sequence[int] = ()) -> list[int]:
    conversation = Conversation(session)
    logits = conversation.feed([*words(5), IMAGE, *words(4, seed=1)], features(session, 1))
    return list(conversation.answer(logits, Sampler(sampling), max_new_tokens=count, stop_ids=stop_ids))


def refusal(run: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        run()
    assert "\n" not in str(caught.value)
    return str(caught.value)


TEXT, MORE, REST = words(7), words(5, seed=1), words(9, seed=2)


@pytest.mark.parametrize(
    "turns",
    [
        (TEXT, MORE, REST),
        ([*TEXT, IMAGE, *MORE], REST),
        ([IMAGE, *MORE], REST),
        ([*TEXT, IMAGE], REST),
        ([IMAGE], REST),
        (TEXT, [*MORE, IMAGE, *REST]),
        ([*TEXT, IMAGE, *MORE], [*REST, IMAGE, *TEXT], MORE),
        ([*TEXT, IMAGE, IMAGE, *MORE], REST),
        ([IMAGE, *TEXT, IMAGE, *MORE, IMAGE], REST),
    ],
    ids=[
        "no image",
        "one image",
        "image first",
        "image last",
        "image alone",
        "image in the second turn",
        "an image in each turn",
        "two images side by side",
        "three images",
    ],
)
def test_turns_on_one_cache_equal_one_long_prompt(full: Session, turns: Sequence[Sequence[int]]):
    whole = [token for turn in turns for token in turn]
    count = whole.count(IMAGE)
    apart, together = logits_of(full, *turns, num_images=count), logits_of(full, whole, num_images=count)
    assert apart.shape == (len(whole) + count * (NUM_VISION_TOKENS - 1), full.spec.vocab_size)
    assert np.abs(apart - together).max() < SAME


@pytest.mark.parametrize("pieces", [(1, 1, 1), (3, 2), (5,)], ids=str)
def test_text_behind_an_image_may_come_in_pieces_when_compressed(thin: Session, pieces: Sequence[int]):
    start, text = [*TEXT, IMAGE, *MORE], words(sum(pieces), seed=3)
    ends = np.cumsum([0, *pieces])
    chunks = [text[a:b] for a, b in pairwise(ends)]
    apart = logits_of(thin, start, *chunks, num_images=1)
    assert np.abs(apart - logits_of(thin, [*start, *text], num_images=1)).max() < SAME


def test_text_before_an_image_may_come_in_pieces_when_compressed(thin: Session):
    apart = logits_of(thin, TEXT, [*MORE, IMAGE, *REST], num_images=1)[-len(REST) :]
    together = logits_of(thin, [*TEXT, *MORE, IMAGE, *REST], num_images=1)[-len(REST) :]
    assert np.abs(apart - together).max() < SAME


def test_the_second_image_of_a_prompt_may_come_in_a_second_turn_when_compressed(thin: Session):
    apart = logits_of(thin, [*TEXT, IMAGE, *MORE], [IMAGE, *REST], num_images=2)
    together = logits_of(thin, [*TEXT, IMAGE, *MORE, IMAGE, *REST], num_images=2)
    assert np.abs(apart - together).max() < SAME


def test_another_text_gives_other_logits(full: Session):
    assert np.abs(logits_of(full, TEXT)[-1] - logits_of(full, [*TEXT[:-1], TEXT[-1] + 1])[-1]).max() > 1000 * SAME


def test_another_image_gives_other_logits(thin: Session):
    prompt = [*TEXT, IMAGE, *MORE]
    found = [Conversation(thin).feed(prompt, features(thin, 1, seed=seed)) for seed in (0, 1)]
    assert np.abs(found[0] - found[1]).max() > 1000 * SAME


def test_images_swapped_give_other_logits(thin: Session):
    prompt, images = [*TEXT, IMAGE, *MORE, IMAGE, *REST], features(thin, 2)
    found = [Conversation(thin).feed(prompt, order) for order in (images, images[::-1])]
    assert np.abs(found[0] - found[1]).max() > 1000 * SAME


def test_a_new_conversation_forgets_the_one_before(thin: Session):
    before = logits_of(thin, TEXT)
    logits_of(thin, [*REST, IMAGE, *MORE], num_images=1)
    assert (logits_of(thin, TEXT) == before).all()


def test_logits_of_the_last_token_are_the_last_of_all(thin: Session):
    prompt = [*TEXT, IMAGE, *MORE]
    last = Conversation(thin).feed(prompt, features(thin, 1))
    assert last.shape == (1, thin.spec.vocab_size)
    assert np.abs(last[0] - logits_of(thin, prompt, num_images=1)[-1]).max() < SAME


def test_lengths_count_text_everywhere_and_vision_tokens_by_group(thin: Session):
    conversation = Conversation(thin)
    conversation.feed([*TEXT, IMAGE, *MORE], features(thin, 1))
    # 7 + 5 text tokens; 16, 8 and 4 vision tokens.
    assert conversation.lengths == (28, 20, 16)


def test_the_answer_is_in_the_cache_for_the_next_turn(full: Session):
    conversation = Conversation(full)
    said = list(conversation.answer(conversation.feed(TEXT), Sampler(Sampling()), max_new_tokens=4, stop_ids=()))
    after = conversation.feed(MORE)
    assert len(said) == 4
    assert np.abs(after[-1] - logits_of(full, [*TEXT, *said, *MORE])[-1]).max() < SAME


@pytest.mark.parametrize(
    ("token_ids", "num_images", "expected"),
    [
        ([], 0, "the prompt is empty; give at least one token"),
        (TEXT, 1, "the prompt has 0 places for images and 1 images were given"),
        ([IMAGE, *TEXT], 0, "the prompt has 1 places for images and 0 images were given"),
        ([IMAGE, *TEXT], 2, "the prompt has 1 places for images and 2 images were given"),
        ([576], 0, "token id 576 is outside the model's vocabulary of 576; the tokenizer is another model's"),
        ([-2], 0, "token id -2 is outside the model's vocabulary of 576; the tokenizer is another model's"),
        (words(129), 0, "129 text tokens (129 of them new) do not fit into a cache for 128; shorten the prompt or"),
        ([IMAGE] * 4, 4, "4 images do not fit into a cache for 3; raise --max-images"),
    ],
    ids=["empty", "image too many", "no image", "second image", "token too high", "token too low", "text", "images"],
)
def test_a_prompt_that_cannot_be_run_is_refused(
    thin: Session, token_ids: Sequence[int], num_images: int, expected: str
):
    images = features(thin, num_images) if num_images else []
    assert refusal(lambda: Conversation(thin).feed(token_ids, images)).startswith(expected)


@pytest.mark.parametrize("too_much", [words(122), [IMAGE] * 3], ids=["text", "images"])
def test_a_refused_turn_leaves_the_conversation_as_it_was(thin: Session, too_much: Sequence[int]):
    start, images = [*TEXT, IMAGE], features(thin, 3)
    conversation = Conversation(thin)
    conversation.feed(start, images[:1])
    lengths = conversation.lengths
    refusal(lambda: conversation.feed(too_much, images if IMAGE in too_much else []))
    assert conversation.lengths == lengths
    assert np.abs(conversation.feed(MORE)[-1] - logits_of(thin, [*start, *MORE], num_images=1)[-1]).max() < SAME


def test_a_conversation_beyond_the_models_positions_is_refused(tiny_full: Bundle):
    session = open_engine(tiny_full, max_text_tokens=512)
    conversation = Conversation(session)
    conversation.feed([IMAGE, *words(490)], features(session, 1))
    assert conversation.room == 6
    text = refusal(lambda: conversation.feed(words(7)))
    assert text == "the conversation would reach position 513 and the model has 512; shorten it"
    assert conversation.feed(words(6)).shape == (1, 576)


def test_an_image_whose_tokens_keep_their_positions_takes_up_all_of_them(
    checkpoint: Path, exported: Callable[[Recipe], Bundle]
):
    session = open_engine(
        exported(recipe_for(checkpoint, {"method": "sample", "keep": 4, "positions": "keep"})), max_text_tokens=512
    )
    conversation = Conversation(session)
    conversation.feed([IMAGE, *words(490)], features(session, 1))
    assert conversation.room == 6
    assert refusal(lambda: conversation.feed(words(7))).startswith("the conversation would reach position 513 and the")


def test_a_prompt_that_fills_the_cache_to_the_last_token_is_run(thin: Session):
    conversation = Conversation(thin)
    conversation.feed([*words(125), IMAGE, IMAGE, IMAGE, *words(3)], features(thin, 3))
    assert conversation.lengths == thin.capacities
    assert conversation.room == 0


@pytest.mark.parametrize("asked_for", [3, 4, 50])
def test_an_answer_ends_where_the_cache_is_full(thin: Session, asked_for: int):
    conversation = Conversation(thin)
    logits = conversation.feed(words(126))
    # Two tokens fit; the third is said and has no room.
    said = list(conversation.answer(logits, Sampler(Sampling()), max_new_tokens=asked_for, stop_ids=()))
    assert (len(said), conversation.room) == (3, 0)


def test_greedy_takes_the_largest_logit():
    assert Sampler(Sampling())(np.array([0.0, 3.0, 2.0, 3.0], np.float32)) == 1


def test_the_same_seed_draws_the_same_tokens(thin: Session):
    sampling = Sampling(temperature=2.0, seed=7)
    assert answer(thin, sampling) == answer(thin, sampling)


def test_another_seed_draws_other_tokens(thin: Session):
    drawn = {tuple(answer(thin, Sampling(temperature=2.0, seed=seed))) for seed in range(4)}
    assert len(drawn) == 4


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=5.0, top_k=1), Sampling(temperature=5.0, top_p=1e-6), Sampling(temperature=1e-3)],
    ids=["top-k", "top-p", "cold"],
)
def test_drawing_from_the_likeliest_token_alone_is_greedy(thin: Session, sampling: Sampling):
    assert answer(thin, sampling) == answer(thin, Sampling())


def test_draws_have_the_probabilities_of_the_softmax():
    sampler = Sampler(Sampling(temperature=2.0))
    logits = np.array([0.0, 2 * np.log(3.0)], np.float32)  # at temperature 2 the second is 3 times as likely
    drawn = [sampler(logits) for _ in range(2000)]
    assert np.mean(drawn) == pytest.approx(0.75, abs=0.04)


def test_top_k_draws_from_the_k_likeliest():
    sampler = Sampler(Sampling(temperature=10.0, top_k=2))
    assert {sampler(np.array([1.0, 0.0, 3.0, 2.0], np.float32)) for _ in range(200)} == {2, 3}


def test_top_p_draws_from_the_tokens_that_hold_the_probability():
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.7))
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    assert {sampler(logits) for _ in range(200)} == {0, 1}


def test_an_answer_stops_before_a_stop_token(thin: Session):
    whole = answer(thin, Sampling())
    stop = whole[5]
    assert answer(thin, Sampling(), stop_ids=[stop]) == whole[: whole.index(stop)]


def test_a_stop_token_stays_out_of_the_cache(thin: Session):
    conversation = Conversation(thin)
    logits = conversation.feed(TEXT)
    first = int(logits[-1].argmax())
    assert list(conversation.answer(logits, Sampler(Sampling()), max_new_tokens=4, stop_ids=[first])) == []
    assert conversation.text_tokens == len(TEXT)


def test_an_answer_has_at_most_as_many_tokens_as_asked_for(thin: Session):
    assert [len(answer(thin, Sampling(), count)) for count in (1, 2, 5)] == [1, 2, 5]


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"temperature": -0.1}, "temperature -0.1 must be 0 (greedy) or from 0.001 to 1000.0"),
        ({"temperature": 1.0, "top_k": -1}, "top-k -1 must be at least 0 (0 is off)"),
        ({"temperature": 1.0, "top_p": 0.0}, "top-p 0.0 must be above 0 and at most 1 (1 is off)"),
        ({"temperature": 1.0, "top_p": 1.1}, "top-p 1.1 must be above 0 and at most 1 (1 is off)"),
        ({"top_k": 5}, "top-k and top-p have no effect at temperature 0; set a temperature, e.g. 0.7"),
        ({"top_p": 0.5}, "top-k and top-p have no effect at temperature 0; set a temperature, e.g. 0.7"),
    ],
    ids=str,
)
def test_sampling_that_makes_no_sense_is_refused(wrong: dict[str, Any], expected: str):
    assert refusal(lambda: Sampling(**wrong)) == expected


def test_a_temperature_that_is_no_number_is_refused():
    assert refusal(lambda: Sampling(temperature=float("nan"))).startswith("temperature nan ")


@pytest.mark.parametrize("temperature", [1e-40, 1e-300])
def test_a_temperature_that_makes_logits_overflow_is_refused_or_greedy(thin: Session, temperature: float):
    try:
        sampling = Sampling(temperature=temperature)
    except InputError:
        return
    assert answer(thin, sampling, 3) == answer(thin, Sampling(), 3)


def test_a_probe_is_what_feeding_would_be(full: Session):
    conversation = Conversation(full)
    conversation.feed([*TEXT, IMAGE, *MORE], features(full, 1))
    before = (conversation.text_tokens, conversation.room, conversation.lengths)
    probed = conversation.probe(REST)
    assert (conversation.text_tokens, conversation.room, conversation.lengths) == before
    np.testing.assert_array_equal(conversation.feed(REST), probed)


def test_a_restarted_conversation_is_a_new_one(full: Session):
    conversation = Conversation(full)
    expected = conversation.feed([*TEXT, IMAGE, *MORE], features(full, 1))
    conversation.feed(REST)
    conversation.restart()
    assert (conversation.text_tokens, conversation.num_images, conversation.choices) == (0, 0, [])
    np.testing.assert_array_equal(conversation.feed([*TEXT, IMAGE, *MORE], features(full, 1)), expected)
