"""Conversations are laid out as the engine reads them, and only what the model is to say is labelled."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NUM_VISION_TOKENS
from tests.training.conftest import TURNS
from tokexport.engines.generate import IMAGE
from tokexport.engines.prompt import Dialogue, PromptProcessor
from tokexport.errors import TrainingError
from tokexport.training.compressed import NO_LABEL
from tokexport.training.conversation import ConversationEncoder

IMAGE_TOKEN, STOP = 4, 2

# As in the chat template of published LLaVA-1.5 checkpoints, nothing ends an answer.
WITHOUT_STOP = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for p in m['content'] if p['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
WITHOUT_END = (
    "{% for m in messages %}{{ ' ' + m['role'].upper() + ':' }}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ ' ' + p['text'] }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


def fed_to_the_engine(checkpoint: Path, *, has_image: bool) -> list[int]:
    """Return every token that the engine reads in a conversation in which it says the answers of ``TURNS``."""
    processor = PromptProcessor(checkpoint)
    dialogue, fed = Dialogue.start(processor), list[int]()
    for number, (question, answer) in enumerate(TURNS):
        fed += dialogue.ask(question, num_images=int(has_image and number == 0))
        fed += processor.encode(f" {answer}", is_start=False)
        dialogue.hear(answer)
    spread = [[IMAGE_TOKEN] * NUM_VISION_TOKENS if token == IMAGE else [token] for token in fed]
    return [token for tokens in spread for token in tokens]


@pytest.mark.parametrize("has_image", [True, False], ids=["image", "text only"])
def test_the_tokens_are_those_that_the_engine_reads(encoder: ConversationEncoder, checkpoint: Path, has_image: bool):
    ids_T, _, _ = encoder.encode(TURNS, has_image=has_image)
    fed = fed_to_the_engine(checkpoint, has_image=has_image)
    # The engine has not read yet what ends the last answer.
    assert ids_T.tolist()[: len(fed)] == fed
    assert ids_T.tolist()[len(fed) :] == [STOP]


def test_the_answers_and_their_stop_tokens_are_labelled_and_nothing_else(encoder: ConversationEncoder, processor: Any):
    _, labels_T, turn_T = encoder.encode(TURNS, has_image=True)
    for number, (_, answer) in enumerate(TURNS):
        assert processor.tokenizer.decode(labels_T[turn_T == number]) == f" {answer}</s>"
    assert set(turn_T[labels_T != NO_LABEL].tolist()) == {0, 1, 2}
    assert (turn_T[labels_T == NO_LABEL] == -1).all()


def test_a_label_stands_at_the_token_it_names(encoder: ConversationEncoder):
    ids_T, labels_T, _ = encoder.encode(TURNS, has_image=True)
    assert (ids_T == labels_T)[labels_T != NO_LABEL].all()


@pytest.mark.parametrize(("has_image", "count"), [(True, NUM_VISION_TOKENS), (False, 0)], ids=["image", "text only"])
def test_the_image_takes_as_many_tokens_as_the_tower_emits(encoder: ConversationEncoder, has_image: bool, count: int):
    ids_T, _, _ = encoder.encode(TURNS, has_image=has_image)
    assert int((ids_T == IMAGE_TOKEN).sum()) == count


@pytest.mark.parametrize("num_turns", [1, 2, 3])
@pytest.mark.parametrize("spare", [0, 1, 5])
def test_turns_that_do_not_fit_are_left_out_whole(encoder: ConversationEncoder, num_turns: int, spare: int):
    shorter = encoder.encode(TURNS[:num_turns], has_image=True)
    room = len(shorter[0]) - (NUM_VISION_TOKENS - 1) + spare
    for found, expected in zip(encoder.encode(TURNS, has_image=True, max_text_tokens=room), shorter, strict=True):
        assert found.tolist() == expected.tolist()


def test_a_turn_that_lacks_one_token_of_room_is_left_out(encoder: ConversationEncoder):
    room = len(encoder.encode(TURNS[:2], has_image=False)[0]) - 1
    ids_T, _, _ = encoder.encode(TURNS, has_image=False, max_text_tokens=room)
    assert ids_T.tolist() == encoder.encode(TURNS[:1], has_image=False)[0].tolist()


def test_a_first_turn_that_does_not_fit_is_refused(encoder: ConversationEncoder):
    needed = len(encoder.encode(TURNS[:1], has_image=False)[0])
    with pytest.raises(TrainingError) as caught:
        encoder.encode(TURNS, has_image=False, max_text_tokens=needed - 1)
    assert str(caught.value) == (
        f"the first turn takes {needed} text tokens, more than {needed - 1}; allow more of them"
    )


@pytest.mark.parametrize(
    "template", [WITHOUT_STOP, WITHOUT_END], ids=["blank behind answers", "nothing behind answers"]
)
def test_a_template_without_a_stop_token_teaches_to_stop_all_the_same(own_processor: Any, template: str):
    own_processor.chat_template = template
    _, labels_T, turn_T = ConversationEncoder(own_processor, NUM_VISION_TOKENS).encode(TURNS, has_image=False)
    for number, (_, answer) in enumerate(TURNS):
        assert own_processor.tokenizer.decode(labels_T[turn_T == number]) == f" {answer}</s>"


@pytest.mark.parametrize(
    "template", [WITHOUT_STOP, WITHOUT_END], ids=["blank behind answers", "nothing behind answers"]
)
def test_a_template_without_a_stop_token_puts_none_between_turns(own_processor: Any, template: str):
    # The engine would not read one there either.
    own_processor.chat_template = template
    ids_T, _, _ = ConversationEncoder(own_processor, NUM_VISION_TOKENS).encode(TURNS, has_image=False)
    assert STOP not in ids_T[:-1]


def test_a_template_that_rewrites_earlier_turns_is_refused(own_processor: Any):
    own_processor.chat_template = "{{ messages | length }} messages{% for m in messages %}, {{ m['role'] }}{% endfor %}"
    encoder = ConversationEncoder(own_processor, NUM_VISION_TOKENS)
    with pytest.raises(TrainingError) as caught:
        encoder.encode(TURNS, has_image=False)
    assert str(caught.value) == (
        "the chat template rewrites earlier turns, so answers cannot be found in what it writes; use one that only "
        "appends"
    )


def test_a_checkpoint_without_a_template_is_refused(own_processor: Any):
    own_processor.chat_template = None
    with pytest.raises(TrainingError) as caught:
        ConversationEncoder(own_processor, NUM_VISION_TOKENS)
    assert str(caught.value) == "the checkpoint has no chat template, so conversations cannot be laid out; add one"
