"""Vision tokens chosen anew for every question: by what, at what cost, and what is refused."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import recipe_for
from tests.engines.test_evaluate import evaluation, made, open_vlm
from tokexport.engines.accuracy import EvalOptions, evaluate_artefact
from tokexport.engines.evaluate import Evaluation
from tokexport.engines.evaluation_data import open_dialogues
from tokexport.engines.generate import Conversation
from tokexport.engines.model import Answer, Chat, ReadingCost, Vlm
from tokexport.engines.prompt import Dialogue
from tokexport.engines.reselection import (
    require_choice,
    reselection_report,
    reselection_rows,
    reselection_text,
)
from tokexport.errors import InputError
from tokexport.exporter.bundle import Bundle
from tokexport.recipes.schema import Recipe

NEW_TOKENS = 3
FIRST, SECOND, OTHER = "What is in the picture?", "And behind it?", "Which of them is red?"
CHOOSING: dict[str, dict[str, object]] = {
    "fastv": {"method": "fastv", "keep": 4, "layer": 1},
    "pyramiddrop": {"method": "pyramiddrop", "drops": [{"layer": 1, "keep": 6}, {"layer": 3, "keep": 3}]},
    "relevance": {"method": "relevance", "keep": 4, "weights": "untrained"},
    "sparsevlm": {"method": "sparsevlm", "drops": [{"layer": 1, "keep": 6}, {"layer": 3, "keep": 3}]},
}


@pytest.fixture
def choosing(checkpoint: Path, exported: Callable[[Recipe], Bundle]) -> Bundle:
    return exported(recipe_for(checkpoint, CHOOSING["fastv"]))


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8))


def chosen(vlm: Vlm) -> dict[int, list[int]]:
    return {layer: choice.kept_BM[0].tolist() for layer, choice in vlm.session.choices.items()}


def scores(vlm: Vlm) -> np.ndarray[Any, Any]:
    return np.concatenate([choice.score_BN[0] for choice in vlm.session.choices.values()])


def ask(chat: Chat, picture: Image.Image, *questions: str) -> list[Answer]:
    return [chat.ask(question, [] if number else [picture]) for number, question in enumerate(questions)]


# By what tokens are chosen


@pytest.mark.parametrize("method", CHOOSING)
def test_the_choice_is_that_of_the_whole_conversation_in_one_prompt(
    checkpoint: Path, exported: Callable[[Recipe], Bundle], picture: Image.Image, method: str
):
    vlm = open_vlm(exported(recipe_for(checkpoint, CHOOSING[method])))
    first, second = ask(vlm.chat(max_new_tokens=NEW_TOKENS, reselect=True), picture, FIRST, SECOND)
    found = chosen(vlm)
    whole = Dialogue.start(vlm.processor)
    whole.ask(FIRST, 1)
    whole.hear(first.text)
    whole.read_text = ""
    tokens = whole.ask(SECOND, 0)
    logits = Conversation(vlm.session).feed(tokens, [vlm.session.encode_images(vlm.processor.pixels([picture]))])
    assert chosen(vlm) == found
    assert second.token_ids[0] == int(logits[-1].argmax())


@pytest.mark.parametrize("method", CHOOSING)
def test_another_question_chooses_otherwise_where_continuing_keeps_what_there_is(
    checkpoint: Path, exported: Callable[[Recipe], Bundle], picture: Image.Image, method: str
):
    vlm = open_vlm(exported(recipe_for(checkpoint, CHOOSING[method])))
    found: dict[tuple[bool, str], np.ndarray[Any, Any]] = {}
    for reselect in (False, True):
        for question in (SECOND, OTHER):
            ask(vlm.chat(max_new_tokens=NEW_TOKENS, reselect=reselect), picture, FIRST, question)
            found[reselect, question] = scores(vlm)
    assert (found[False, SECOND] == found[False, OTHER]).all()
    assert np.abs(found[True, SECOND] - found[True, OTHER]).max() > 1e-6


def test_of_the_relevance_compressor_earlier_questions_choose_as_well(
    checkpoint: Path, exported: Callable[[Recipe], Bundle], picture: Image.Image
):
    vlm = open_vlm(exported(recipe_for(checkpoint, CHOOSING["relevance"])))
    found: list[np.ndarray[Any, Any]] = []
    for first in (FIRST, OTHER):
        # An answer that is the same whatever was asked.
        chat = vlm.chat(max_new_tokens=1, choose=lambda _logits: vlm.processor.stop_ids[0], reselect=True)
        ask(chat, picture, first, SECOND)
        found.append(scores(vlm))
    assert np.abs(found[0] - found[1]).max() > 1e-6


def test_the_first_turn_is_as_without(choosing: Bundle, picture: Image.Image):
    vlm = open_vlm(choosing)
    (again,), (once,) = (
        ask(vlm.chat(max_new_tokens=NEW_TOKENS, reselect=reselect), picture, FIRST) for reselect in (True, False)
    )
    assert (again.token_ids, again.prompt_tokens) == (once.token_ids, once.prompt_tokens)


def test_reading_again_alone_changes_nothing(tiny_full: Bundle, picture: Image.Image):
    vlm = open_vlm(tiny_full)
    # A word, as what random weights say is read as other tokens than it was said in.
    yes = [vlm.processor.encode("ASSISTANT: yes", is_start=False)[-1], vlm.processor.stop_ids[0]]
    heard: dict[bool, list[np.ndarray[Any, Any]]] = {False: [], True: []}

    def say_yes(reselect: bool) -> Callable[[np.ndarray[Any, Any]], int]:
        def choose(logits_W: np.ndarray[Any, Any]) -> int:
            heard[reselect].append(logits_W.copy())
            return yes[(len(heard[reselect]) - 1) % 2]

        return choose

    for reselect in heard:
        answers = ask(Chat(vlm, NEW_TOKENS, say_yes(reselect), reselect=reselect), picture, FIRST, SECOND, OTHER)
        assert [answer.text for answer in answers] == ["yes"] * 3
    np.testing.assert_allclose(heard[True], heard[False], atol=1e-4)


# What it costs


def test_all_tokens_of_the_conversation_are_read(choosing: Bundle, picture: Image.Image):
    vlm = open_vlm(choosing)
    once = ask(vlm.chat(max_new_tokens=NEW_TOKENS), picture, FIRST, SECOND)
    again = ask(vlm.chat(max_new_tokens=NEW_TOKENS, reselect=True), picture, FIRST, SECOND)
    assert [answer.vision_tokens for answer in once] == [16, 0]
    assert [answer.vision_tokens for answer in again] == [16, 16]
    said = once[0].prompt_tokens + len(once[0].token_ids) + once[1].prompt_tokens
    # The text of an answer may be other tokens than those it was said in.
    assert abs(again[1].prompt_tokens - said) <= NEW_TOKENS


def test_what_continuing_costs_is_found_out_without_a_trace(choosing: Bundle, picture: Image.Image):
    vlm = open_vlm(choosing)
    _, plain = ask(vlm.chat(max_new_tokens=NEW_TOKENS), picture, FIRST, SECOND)
    for reselect in (False, True):
        undisturbed = ask(vlm.chat(max_new_tokens=NEW_TOKENS, reselect=reselect), picture, FIRST, SECOND)[1]
        chat = vlm.chat(max_new_tokens=NEW_TOKENS, reselect=reselect)
        assert chat.continuing_cost(FIRST) is None
        chat.ask(FIRST, [picture])
        cost = chat.continuing_cost(SECOND)
        assert cost is not None
        assert cost.text_tokens == plain.prompt_tokens
        assert cost.ms > 0
        assert chat.ask(SECOND).token_ids == undisturbed.token_ids


def test_a_question_without_room_could_not_be_continued(choosing: Bundle, picture: Image.Image):
    chat = open_vlm(choosing, room=60).chat(max_new_tokens=NEW_TOKENS)
    chat.ask(FIRST, [picture])
    assert chat.continuing_cost("word " * 60) is None


def test_the_cost_is_told_beside_that_of_continuing():
    answer = Answer(prompt_tokens=61, vision_tokens=576, ttft_ms=63.4)
    told = "chosen anew for this question: 61 text and 576 vision tokens read, first token after 63 ms"
    assert reselection_text(answer, None) == told
    continuing = ReadingCost(text_tokens=12, ms=4.8)
    assert reselection_text(answer, continuing) == f"{told}; continuing on the cache reads 12 text tokens in 5 ms"


# Conversations


def test_an_image_of_a_later_turn_is_read_again_too(choosing: Bundle, picture: Image.Image):
    options = replace(open_vlm(choosing).session.options, max_images=2)
    vlm = Vlm(choosing, "ort", options)
    chat = vlm.chat(max_new_tokens=NEW_TOKENS, reselect=True)
    chat.ask(FIRST, [picture])
    assert chat.ask(SECOND, [picture.rotate(90)]).vision_tokens == 32
    assert chat.ask(OTHER).vision_tokens == 32
    with pytest.raises(InputError, match="3 images do not fit into a cache for 2"):
        chat.ask(OTHER, [picture])
    assert chat.ask(OTHER).vision_tokens == 32


def test_a_failed_question_leaves_the_conversation_as_it_was(choosing: Bundle, picture: Image.Image):
    vlm = open_vlm(choosing)
    expected = ask(vlm.chat(max_new_tokens=NEW_TOKENS, reselect=True), picture, FIRST, SECOND)[1].token_ids
    chat = vlm.chat(max_new_tokens=NEW_TOKENS, reselect=True)
    chat.ask(FIRST, [picture])
    for question in ("", "word " * 300):
        with pytest.raises(InputError):
            chat.ask(question)
    assert chat.ask(SECOND).token_ids == expected


def test_a_conversation_whose_session_was_taken_says_so(choosing: Bundle, picture: Image.Image):
    vlm = open_vlm(choosing)
    chat = vlm.chat(max_new_tokens=NEW_TOKENS, reselect=True)
    chat.ask(FIRST, [picture])
    vlm.chat()
    with pytest.raises(InputError, match="another conversation has begun on this session; start a new one"):
        chat.ask(SECOND)


def test_a_choice_without_the_question_is_refused(tiny_adsc: Bundle):
    with pytest.raises(InputError, match=r"keeps the same vision tokens whatever is asked, so --reselect has no"):
        open_vlm(tiny_adsc).chat(reselect=True)


@pytest.mark.parametrize("relevance", ["like", "none"])
def test_a_choice_that_reads_no_text_is_refused(tiny_full: Bundle, relevance: str):
    table = {"method": "cdpruner", "keep": 4, "relevance": relevance}
    manifest = tiny_full.manifest
    bundle = replace(tiny_full, manifest=replace(manifest, recipe={**manifest.recipe, "compress": [table]}))
    with pytest.raises(InputError) if relevance == "none" else nullcontext():
        require_choice(bundle, "ort")


def test_an_engine_that_runs_all_tokens_is_refused(choosing: Bundle):
    with pytest.raises(InputError, match=r"^backend 'transformers' runs all vision tokens, so none are chosen"):
        open_vlm(choosing, "transformers").chat(reselect=True)


# Accuracy without and with it


def scored(scores: Sequence[float], read: float, ttft: float) -> Evaluation:
    """Return the evaluation of two dialogues of two turns."""
    found = evaluation(scores, turns=2)
    return replace(found, read_tokens_Q=np.full(4, read), ttft_ms_Q=np.full(4, ttft))


def test_both_ways_are_compared_question_by_question():
    report = reselection_report(scored([1, 0, 1, 1], 20, 5), scored([1, 1, 1, 0], 80, 30))
    assert report["accuracy"] == {"continuing": 0.75, "reselected": 0.75}
    assert (report["gained"], report["lost"], report["difference"]) == (1, 1, 0)
    first, second = report["per_turn"]
    assert (first["turn"], first["questions"], first["difference"]) == (1, 2, 0)
    assert first["difference_interval"] == [0, 0]
    assert second["accuracy"] == {"continuing": 0.5, "reselected": 0.5}
    assert second["difference_interval"] == [-1, 1]
    assert second["read_tokens"] == {"continuing": 20, "reselected": 80}
    assert second["ttft_ms"] == {"continuing": 5, "reselected": 30}


def test_rows_say_what_changed():
    rows = list(reselection_rows(reselection_report(scored([1, 0, 1, 0], 20, 5), scored([1, 1, 1, 1], 80, 30))))
    assert rows[2] == (
        "turn 2",
        "0.0 -> 100.0 %",
        "+100.00 (+100.00 to +100.00)",
        "2 gained, 0 lost",
        "20 -> 80",
        "5.0 -> 30.0",
    )


def test_an_evaluation_keeps_its_figures_and_adds_those_of_choosing_anew(choosing: Bundle):
    asked, options = open_dialogues(dialogues=2), EvalOptions(max_new_tokens=2, threads=1)
    plain = evaluate_artefact(choosing.path, asked, options, store=False).report()
    report = evaluate_artefact(choosing.path, asked, replace(options, reselect=True), store=False).report()
    assert report["scores"] == plain["scores"]
    assert plain["reselect"] is None
    first, *later = report["reselect"]["per_turn"]
    assert first["read_tokens"]["continuing"] == first["read_tokens"]["reselected"]
    for turn in later:
        assert turn["read_tokens"]["reselected"] > turn["read_tokens"]["continuing"] + 16


def test_choosing_anew_what_is_never_chosen_is_refused_before_the_work(tiny_adsc: Bundle):
    steps: list[str] = []
    options = EvalOptions(reselect=True)
    with pytest.raises(InputError, match=r"it is for methods that choose by the question, like fastv$"):
        evaluate_artefact(tiny_adsc.path, open_dialogues(dialogues=1), options, progress=steps.append)
    assert steps == []


def test_made_dialogues_can_be_asked_anew(choosing: Bundle):
    (dialogue,) = made(1)
    chat = open_vlm(choosing).chat(max_new_tokens=NEW_TOKENS, reselect=True)
    assert isinstance(dialogue.image, Image.Image)
    answers = ask(chat, dialogue.image, *(turn.question for turn in dialogue.turns))
    assert [answer.vision_tokens for answer in answers] == [16, 16, 16]
