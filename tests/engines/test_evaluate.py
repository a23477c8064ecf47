"""Accuracy on dialogues: what is asked, what is counted, and what is refused."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokexport.dialogues.generate import make_dialogue
from tokexport.dialogues.schema import Dialogue, Turn
from tokexport.engines.backend import SessionOptions
from tokexport.engines.evaluate import Evaluation, ScoredAnswer, ask_dialogue
from tokexport.engines.evaluate import evaluate as put_together
from tokexport.engines.model import Vlm
from tokexport.engines.scoring import normalise_vqa
from tokexport.errors import InputError
from tokexport.exporter.bundle import Bundle

NEW_TOKENS = 4


def open_vlm(bundle: Bundle, backend: str = "ort", *, room: int = 200) -> Vlm:
    options = SessionOptions.for_bundle(bundle, max_text_tokens=room, max_images=1, threads=1)
    return Vlm(bundle, backend, options)


def made(count: int, num_turns: int = 3) -> list[Dialogue]:
    return [make_dialogue(0, "test", index, num_turns=num_turns) for index in range(count)]


def evaluate(
    vlm: Vlm,
    dialogues: Sequence[Dialogue],
    listen: Callable[[ScoredAnswer], object] = lambda _: None,
    **options: Any,
) -> Evaluation:
    return put_together((ask_dialogue(vlm, dialogue, **options) for dialogue in dialogues), listen=listen)


def ask(vlm: Vlm, dialogues: Sequence[Dialogue]) -> list[ScoredAnswer]:
    answers: list[ScoredAnswer] = []
    evaluate(vlm, dialogues, max_new_tokens=NEW_TOKENS, listen=answers.append)
    return answers


def with_key(vlm: Vlm, count: int, num_turns: int, right: Callable[[int, int], bool]) -> list[Dialogue]:
    """Return dialogues with the model's own answers accepted where ``right(dialogue, turn)``, counted from 0."""
    candidates = made(10 * count, num_turns)
    said = {(answer.dialogue, answer.turn): answer.answer for answer in ask(vlm, candidates)}
    # A model with random weights is sometimes silent, and nothing said is never right.
    dialogues = [one for one in candidates if all(normalise_vqa(said[one.name, t + 1]) for t in range(num_turns))]
    return [
        replace(
            dialogue,
            turns=tuple(
                replace(turn, answers=(said[dialogue.name, t + 1] if right(d, t) else "nothing of the kind",))
                for t, turn in enumerate(dialogue.turns)
            ),
        )
        for d, dialogue in enumerate(dialogues[:count])
    ]


def evaluation(scores: Sequence[float], *, turns: int = 1, kinds: Sequence[str] = ()) -> Evaluation:
    """Return the evaluation of dialogues of so many turns with these scores."""
    index_Q = np.arange(len(scores))
    return Evaluation(
        scores_Q=np.array(scores, np.float64),
        dialogue_Q=index_Q // turns,
        turn_Q=index_Q % turns + 1,
        kinds=tuple(kinds) or ("",) * len(scores),
        ttft_ms_Q=np.ones(len(scores)),
        read_tokens_Q=np.ones(len(scores)),
        sha256="0",
        seconds=1.0,
    )


@pytest.fixture(scope="module")
def vlm(tiny_adsc: Bundle) -> Vlm:
    return open_vlm(tiny_adsc)


# What is asked


def test_a_dialogue_is_one_conversation_with_the_image_in_its_first_turn(vlm: Vlm):
    (dialogue,) = made(1)
    chat = vlm.chat(max_new_tokens=NEW_TOKENS)
    expected = [
        chat.ask(turn.question, [dialogue.image] if number == 0 else []).text
        for number, turn in enumerate(dialogue.turns)
    ]
    assert [answer.answer for answer in ask(vlm, [dialogue])] == expected


def test_dialogues_do_not_hear_each_other(vlm: Vlm):
    first, second = made(2)
    assert ask(vlm, [first, second])[3:] == ask(vlm, [second])


def test_right_answers_are_counted_by_turn(vlm: Vlm):
    keyed = with_key(vlm, 4, 3, lambda d, t: t == 0 or d == 3)
    overall, by_turn, by_kind = evaluate(vlm, keyed, max_new_tokens=NEW_TOKENS).figures()
    assert overall.accuracy == pytest.approx(6 / 12)
    assert {turn: figure.accuracy for turn, figure in by_turn.items()} == {1: 1, 2: 0.25, 3: 0.25}
    assert sum(figure.questions for figure in by_kind.values()) == overall.questions == 12


@pytest.mark.parametrize("backend", ["ort-portable", "torch-eager"])
def test_engines_answer_alike(tiny_adsc: Bundle, vlm: Vlm, backend: str):
    dialogues = made(3)
    assert ask(open_vlm(tiny_adsc, backend), dialogues) == ask(vlm, dialogues)


def test_transformers_answers_like_the_uncompressed_artefact(tiny_full: Bundle):
    dialogues = made(2)
    assert ask(open_vlm(tiny_full, "transformers"), dialogues) == ask(open_vlm(tiny_full), dialogues)


def test_equal_data_is_known_by_its_checksum(vlm: Vlm):
    first, second = made(2, num_turns=1)
    altered = replace(first, turns=(replace(first.turns[0], answers=("something else",)),))
    repainted = replace(first, image=Image.new("RGB", (64, 64)))
    found = [evaluate(vlm, [one], max_new_tokens=1).sha256 for one in (first, first, second, altered, repainted)]
    assert found[0] == found[1]
    assert len(set(found)) == 4


# What is counted


def test_figures_are_sums_over_questions():
    found = evaluation([1, 1, 0, 1, 0, 0], turns=2, kinds=["a", "b", "a", "b", "a", "b"])
    report = found.report()
    assert report["accuracy"] == pytest.approx(3 / 6)
    assert (report["dialogues"], report["questions"]) == (3, 6)
    assert [(turn["turn"], turn["accuracy"], turn["questions"]) for turn in report["per_turn"]] == [
        (1, pytest.approx(1 / 3), 3),
        (2, pytest.approx(2 / 3), 3),
    ]
    assert report["per_kind"]["a"]["accuracy"] == pytest.approx(1 / 3)
    assert report["per_kind"]["b"]["accuracy"] == pytest.approx(2 / 3)


def test_dialogues_of_different_length_count_by_their_questions():
    found = replace(evaluation([1, 1, 1, 0]), dialogue_Q=np.array([0, 0, 0, 1]), turn_Q=np.array([1, 2, 3, 1]))
    report = found.report()
    assert report["accuracy"] == 0.75
    assert [turn["questions"] for turn in report["per_turn"]] == [2, 1, 1]


def test_data_without_kinds_has_none():
    assert evaluation([1, 0]).report()["per_kind"] == {}


def test_a_comparison_pairs_questions():
    found = evaluation([1, 1, 0, 0, 1]).compare(np.array([1.0, 0, 1, 1, 1]))
    assert (found.gained, found.lost) == (1, 2)
    assert found.difference == pytest.approx(-1 / 5)
    assert found.relative == pytest.approx(3 / 4)


def test_equal_answers_differ_by_nothing_however_few_there_are():
    scores = [1.0, 0.0, 1.0]
    found = evaluation(scores).compare(np.array(scores))
    assert found.difference_interval == (0, 0)
    assert found.relative_interval == (1, 1)


def test_pairing_makes_the_interval_narrow():
    rng = np.random.default_rng(0)
    full_Q = (rng.random(500) < 0.7).astype(np.float64)
    own_Q = full_Q.copy()
    own_Q[:10] = 0
    paired, shuffled = (evaluation(list(own)).compare(full_Q) for own in (own_Q, rng.permutation(own_Q)))
    widths = [high - low for low, high in (paired.difference_interval, shuffled.difference_interval)]
    assert widths[0] < widths[1] / 3
    assert paired.difference_interval[1] <= 0 < shuffled.difference_interval[1]


def test_nothing_is_relative_to_a_model_that_knows_nothing():
    found = evaluation([1, 0]).compare(np.zeros(2))
    assert (found.relative, found.relative_interval, found.gained) == (None, None, 1)


def test_stored_scores_that_were_rounded_are_no_change():
    found = evaluation([0.9000000000000001, 0.3]).compare(np.array([0.9, 0.3]))
    assert (found.gained, found.lost) == (0, 0)


# What is refused


def test_no_dialogues_are_refused(vlm: Vlm):
    with pytest.raises(InputError, match="there are no dialogues to evaluate; give at least one"):
        evaluate(vlm, [])


def test_a_metric_for_ten_annotators_is_refused_with_fewer(vlm: Vlm):
    with pytest.raises(InputError, match="turn 1 has 1 answers and the metric 'vqa' is defined for those of 10"):
        evaluate(vlm, [one_question("right")], metric="vqa")


def test_ten_annotators_are_scored_softly(vlm: Vlm):
    (keyed,) = with_key(vlm, 1, 1, lambda _d, _t: True)
    (turn,) = keyed.turns
    asked = replace(keyed, turns=(replace(turn, answers=(*turn.answers * 2, *["nobody"] * 8)),))
    assert evaluate(vlm, [asked], metric="vqa", max_new_tokens=NEW_TOKENS).accuracy == pytest.approx(0.6)


def test_an_unknown_metric_is_refused_with_the_nearest(vlm: Vlm):
    with pytest.raises(InputError, match=r"there is no metric 'exakt'; did you mean 'exact'\?"):
        evaluate(vlm, [one_question("right")], metric="exakt")


def test_a_question_that_does_not_fit_is_named(tiny_adsc: Bundle):
    with pytest.raises(InputError, match=r"dialogue one, turn 1: \d+ text tokens .* raise --max-text-tokens"):
        evaluate(open_vlm(tiny_adsc, room=10), [one_question("right", question="word " * 20)])


def test_an_answer_that_does_not_fit_is_named(tiny_adsc: Bundle):
    num_tokens = open_vlm(tiny_adsc).generate("Is it?", [Image.new("RGB", (56, 56))], max_new_tokens=1).prompt_tokens
    short = open_vlm(tiny_adsc, room=num_tokens + 1)
    expected = f"dialogue one, turn 1: the answer does not fit into a cache for {num_tokens + 1} text tokens; raise "
    with pytest.raises(InputError, match=expected):
        evaluate(short, [one_question("right")])


def test_a_model_with_too_few_positions_asks_for_fewer_turns(tiny_adsc: Bundle):
    turns = (Turn(question="Is it?", answers=("yes",)),) * 60
    longest = open_vlm(tiny_adsc, room=tiny_adsc.spec.max_positions)
    with pytest.raises(InputError, match=r"dialogue long, turn \d+: .* 512"):
        evaluate(longest, [Dialogue(name="long", image=Image.new("RGB", (56, 56)), turns=turns)])


def one_question(*answers: str, question: str = "Is it?") -> Dialogue:
    image = Image.new("RGB", (56, 56), "red")
    return Dialogue(name="one", image=image, turns=(Turn(question=question, answers=answers),))
