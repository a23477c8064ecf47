"""From chats to tokens: every token is fed once, and what cannot be laid out is refused."""

# pyright: reportPrivateUsage=false

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from tokexport.engines.generate import IMAGE
from tokexport.engines.prompt import Dialogue, PromptProcessor, require_askable
from tokexport.errors import BundleError, CheckpointError, InputError
from tokexport.exporter.bundle import Bundle

REWRITING = "{{ messages | length }}{% for message in messages %}{{ message['role'] }}{% endfor %}"
"""A template whose first letter changes with every turn."""


@pytest.fixture(scope="module")
def processor(tiny_full: Bundle) -> PromptProcessor:
    return PromptProcessor(tiny_full.path)


@pytest.fixture
def processor_files(tiny_full: Bundle, tmp_path: Path) -> Path:
    """Return a copy of an artefact's files but the graphs."""
    return shutil.copytree(tiny_full.path, tmp_path / "files", ignore=shutil.ignore_patterns("onnx"))


def said(processor: PromptProcessor, tokens: list[int]) -> str:
    return processor._tokenizer.decode([token for token in tokens if token != IMAGE])


def test_the_first_question_begins_with_the_tokenizers_first_token(processor: PromptProcessor):
    assert Dialogue.start(processor).ask("What?", 0)[0] == 1


def test_an_image_is_one_marker_before_the_text(processor: PromptProcessor):
    tokens = Dialogue.start(processor).ask("What?", 2)
    assert tokens.count(IMAGE) == 2
    first, second = (index for index, token in enumerate(tokens) if token == IMAGE)
    assert said(processor, tokens[second:]).endswith("What?\nASSISTANT:")
    assert said(processor, tokens[:first]) == "<s>USER: "


def test_a_second_question_brings_only_what_was_not_read(processor: PromptProcessor):
    dialogue = Dialogue.start(processor)
    dialogue.ask("What is it?", 1)
    dialogue.hear("A red house.")
    assert said(processor, dialogue.ask("And behind it?", 0)) == "</s>USER: And behind it?\nASSISTANT:"


def test_the_text_read_grows_with_every_turn(processor: PromptProcessor):
    dialogue, read = Dialogue.start(processor), [""]
    for turn in range(3):
        dialogue.ask(f"Question {turn}?", 0)
        read.append(dialogue.read_text)
        dialogue.hear(f"Answer {turn}.")
        read.append(dialogue.read_text)
    assert all(after.startswith(before) and len(after) > len(before) for before, after in pairwise(read))


def test_every_token_of_a_chat_is_fed_once(processor: PromptProcessor):
    dialogue, fed = Dialogue.start(processor), ""
    for turn in range(3):
        fed += said(processor, dialogue.ask(f"Question {turn}?", 0))
        dialogue.hear(f"Answer {turn}.")
        fed += f" Answer {turn}."
    whole = processor.render(dialogue.messages, is_answer_next=False)
    assert f"{fed}</s>" == f"<s>{whole}"


@pytest.mark.parametrize("answer", ["", "  ", "USER: no", "A house.\n\nIt is red.", "</s>"], ids=repr)
def test_an_answer_of_any_kind_lets_the_chat_go_on(processor: PromptProcessor, answer: str):
    dialogue = Dialogue.start(processor)
    dialogue.ask("What?", 0)
    dialogue.hear(answer)
    assert said(processor, dialogue.ask("More?", 0)).endswith("</s>USER: More?\nASSISTANT:")


def test_a_template_that_rewrites_earlier_turns_is_refused(processor_files: Path):
    (processor_files / "chat_template.jinja").write_text(REWRITING)
    dialogue = Dialogue.start(PromptProcessor(processor_files))
    dialogue.ask("What?", 0)
    dialogue.hear("A house.")
    with pytest.raises(InputError) as caught:
        dialogue.ask("And?", 0)
    assert str(caught.value) == (
        "the chat template rewrites earlier turns, so they cannot be kept in the cache; "
        "start a new conversation for every question"
    )


@pytest.mark.parametrize("text", ["", " ", "\n\t"], ids=repr)
def test_an_empty_prompt_is_refused(processor: PromptProcessor, text: str):
    with pytest.raises(InputError, match=r"^the prompt is empty; ask something$"):
        Dialogue.start(processor).ask(text, 1)


def test_a_prompt_with_the_marker_of_images_is_refused(processor: PromptProcessor):
    with pytest.raises(InputError) as caught:
        Dialogue.start(processor).ask("What is in <image>?", 1)
    assert str(caught.value) == (
        "the prompt holds <image>, the place of an image; leave it out, images are placed before the text"
    )


@pytest.mark.parametrize("text", ["naïve café", "日本語", "🦊 fox", "a" * 300, "<s> [INST] </s>"])
def test_any_text_can_be_asked(processor: PromptProcessor, text: str):
    assert text in said(processor, Dialogue.start(processor).ask(text, 0))


def test_text_streams_as_soon_as_it_makes_whole_characters(processor: PromptProcessor):
    tokens = processor.encode("a 🦊 fox", is_start=False)
    pieces = list(processor.stream_text(iter(tokens)))
    assert "".join(pieces) == "a 🦊 fox"
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) < len(tokens)


def test_the_stop_token_is_the_tokenizers_end_of_sequence(processor: PromptProcessor):
    assert processor.stop_ids == (2,)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "processor_config.json"], ids=["no tokenizer", "no image processor"]
)
def test_a_missing_file_is_named_as_what_is_not_usable(processor_files: Path, name: str):
    (processor_files / name).unlink()
    with pytest.raises(BundleError) as caught:
        PromptProcessor(processor_files)
    text = str(caught.value)
    assert text.startswith(f"{processor_files} has no usable tokenizer and image processor (")
    assert text.endswith("); build it from a checkpoint that has them")
    assert "\n" not in text


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_file_is_refused_in_one_line(processor_files: Path, name: str, content: str):
    (processor_files / name).write_text(content)
    with pytest.raises(BundleError) as caught:
        PromptProcessor(processor_files)
    assert "\n" not in str(caught.value)


def test_a_missing_chat_template_is_said_when_a_question_is_asked(processor_files: Path):
    (processor_files / "chat_template.jinja").unlink()
    with pytest.raises(BundleError) as caught:
        Dialogue.start(PromptProcessor(processor_files)).ask("What?", 0)
    assert str(caught.value) == (
        "the checkpoint has no chat template, so prompts cannot be laid out; "
        "add chat_template.jinja to it and build again"
    )


@pytest.mark.parametrize("template", ["{{ messages", "{{ messages.nothing.there }}", "{{ raise_exception('no') }}"])
def test_a_broken_chat_template_is_refused_in_one_line(processor_files: Path, template: str):
    (processor_files / "chat_template.jinja").write_text(template)
    with pytest.raises((BundleError, InputError)) as caught:
        Dialogue.start(PromptProcessor(processor_files)).ask("What?", 0)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_can_be_asked_passes(processor_files: Path):
    require_askable(processor_files)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["tokenizer.json"], "no tokenizer (tokenizer.json or tokenizer.model)"),
        (
            ["processor_config.json"],
            "no image processor (processor_config.json or preprocessor_config.json)",
        ),
        (
            ["tokenizer.json", "processor_config.json"],
            "no tokenizer (tokenizer.json or tokenizer.model) and "
            "no image processor (processor_config.json or preprocessor_config.json)",
        ),
    ],
    ids=["tokenizer", "image processor", "both"],
)
def test_a_checkpoint_without_a_processor_is_refused(processor_files: Path, names: list[str], missing: str):
    for name in names:
        (processor_files / name).unlink()
    with pytest.raises(CheckpointError) as caught:
        require_askable(processor_files)
    assert str(caught.value) == (
        f"{processor_files} has {missing}, so an artefact made from it could not be asked anything; "
        "copy the files from the model that it comes from"
    )


def test_a_checkpoint_without_a_chat_template_is_refused(processor_files: Path):
    (processor_files / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match=r"^the checkpoint has no chat template, .*; add chat_template\.jinja to"):
        require_askable(processor_files)


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", "{"), ("chat_template.jinja", "{{ messages")],
    ids=["tokenizer", "template"],
)
def test_a_checkpoint_with_a_broken_processor_is_refused(processor_files: Path, name: str, content: str):
    (processor_files / name).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        require_askable(processor_files)
    assert "\n" not in str(caught.value)


def test_the_image_size_of_the_processor_is_that_of_the_model(tiny_full: Bundle):
    table = json.loads((tiny_full.path / "processor_config.json").read_text())
    assert table["image_processor"]["crop_size"] == {"height": 56, "width": 56}
