"""Candidates asked in PyTorch: scores that are kept, and who is asked more."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import adsc, recipe_for
from tokexport.dialogues.jsonl import write_jsonl
from tokexport.engines.accuracy import EvalOptions, evaluate_artefact
from tokexport.engines.cost_budget import Allowance, parse_budgets
from tokexport.engines.evaluation_data import open_apart, open_dialogues
from tokexport.engines.screening import FILE, Screened, Screening, best_of_each, survivors
from tokexport.engines.search_space import Candidate, as_given
from tokexport.errors import InputError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.export import design
from tokexport.recipes.load import load_recipe

OPTIONS = EvalOptions(backend="torch-eager", max_new_tokens=2, threads=1)


def screening(checkpoint: Path, folder: Path, said: list[str]) -> Screening:
    return Screening(
        design(recipe_for(checkpoint)), folder, open_dialogues(dialogues=5), OPTIONS, said.append, lambda *_: None
    )


def candidates(checkpoint: Path, *steps: dict[str, object]) -> list[Candidate]:
    base = design(recipe_for(checkpoint))
    recipes = [replace(recipe_for(checkpoint, step), name=str(step["method"])) for step in steps]
    budgets = parse_budgets(["flops=0.9"])
    allowance = Allowance.of(budgets, base.model.spec, text_tokens=8, dtype="float32")
    return as_given(base, recipes, (), allowance)


def test_a_candidate_scores_what_its_artefact_does(checkpoint: Path, tiny_adsc: Bundle, tmp_path: Path):
    asked = open_dialogues(dialogues=3)
    expected = evaluate_artefact(tiny_adsc.path, asked, OPTIONS, store=False).evaluation.scores_Q
    (found,) = screening(checkpoint, tmp_path, []).ask(candidates(checkpoint, adsc()), 3)
    assert [score for dialogue in found.scores for score in dialogue] == list(expected)


def test_scores_are_kept_and_only_more_dialogues_are_asked(checkpoint: Path, tmp_path: Path):
    tried = candidates(checkpoint, {"method": "sample", "keep": 8})
    first = screening(checkpoint, tmp_path, []).ask(tried, 2)
    with (tmp_path / FILE).open("a") as file:
        file.write('\n{"key": "half a li')
    again = screening(checkpoint, tmp_path, [])
    assert again.ask(tried, 2) == first
    more = again.ask(tried, 3)[0]
    assert more.scores[:2] == first[0].scores
    lines = [line for line in (tmp_path / FILE).read_text().splitlines() if line.endswith("}")]
    assert [(json.loads(line)["first"], len(json.loads(line)["scores"])) for line in lines] == [(0, 2), (2, 1)]
    assert screening(checkpoint, tmp_path, []).ask(tried, 3) == [more]


def test_a_candidate_that_fails_is_left_out_and_noted(checkpoint: Path, tmp_path: Path):
    said: list[str] = []
    asking = screening(checkpoint, tmp_path, said)
    broken = {"method": "relevance", "keep": 4, "weights": "gone.safetensors"}
    found = asking.ask(candidates(checkpoint, broken, {"method": "sample", "keep": 8}), 1)
    assert [one.candidate.recipe.name for one in found] == ["sample"]
    assert list(asking.failures) == ["relevance"]
    assert any(text.startswith("relevance failed: there are no compressor weights") for text in said)


BASE = load_recipe("mini_full")


def screened(name: str, accuracy: float, tokens: int, method: str = "adsc") -> Screened:
    made = design(replace(BASE, name=name))
    candidate = Candidate(
        recipe=made.recipe,
        form=None,
        plan=made.plan.thinned_before_llm(tokens),
        methods=(method,),
        is_control=False,
        costs={"kv": float(tokens)},
    )
    right = round(100 * accuracy)
    return Screened(candidate=candidate, scores=tuple((float(number < right),) for number in range(100)))


def price(candidate: Candidate) -> float:
    return candidate.costs["kv"]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, ["a"]),
        (2, ["a", "c"]),  # the most accurate, and the best of those that cost less
        (4, ["a", "b", "c", "d"]),
        (5, ["a", "b", "e", "c", "d"]),
        (9, ["a", "b", "e", "c", "d"]),
    ],
)
def test_half_of_the_places_are_for_accuracy_and_half_for_what_costs_less(count: int, expected: Sequence[str]):
    every = [
        screened("b", 0.88, 300),
        screened("d", 0.5, 50),
        screened("a", 0.9, 300),
        screened("e", 0.85, 310),
        screened("c", 0.8, 100),
    ]
    assert [one.candidate.recipe.name for one in survivors(every, count, price)] == expected


def test_of_equals_the_dearer_is_asked_more_and_the_cheapest_too():
    every = [screened("a", 0.8, 200), screened("b", 0.8, 300), screened("c", 0.8, 250)]
    assert [one.candidate.recipe.name for one in survivors(every, 2, price)] == ["b", "a"]


def test_the_best_of_each_method_is_found():
    every = [screened("a", 0.7, 9), screened("b", 0.8, 9), screened("c", 0.1, 9, method="fastv")]
    assert [one.candidate.recipe.name for one in best_of_each(every)] == ["b", "c"]


def test_dialogues_to_choose_by_are_others_than_those_that_decide():
    decide, choose = open_apart("test", 4, None, 3)
    assert (decide.description["split"], choose.description["split"]) == ("test", "validation")
    decide, choose = open_apart("validation", 4, None, 3)
    assert {dialogue.name for dialogue in decide}.isdisjoint(dialogue.name for dialogue in choose)
    assert (decide.size, choose.size) == (4, 3)


def test_a_file_is_parted(tmp_path: Path):

    data = str(write_jsonl(open_dialogues(dialogues=5), tmp_path))
    names = [dialogue.name for dialogue in open_dialogues(data)]
    decide, choose = open_apart(data, None, None, 180)
    assert [dialogue.name for dialogue in decide] == names[:3]
    assert [dialogue.name for dialogue in choose] == names[3:]
    with pytest.raises(InputError, match="4 dialogues and 2 others to choose by are more than the 5 of"):
        open_apart(data, 4, None, 180)
