"""Recipes on one table: what is built, reused, measured, and what a failing recipe does to the others."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import adsc, recipe_for, save_adapter, save_checkpoint, tiny_config
from tokexport.dialogues.generate import make_dialogue
from tokexport.dialogues.jsonl import write_jsonl
from tokexport.engines.accuracy import EvalOptions
from tokexport.engines.evaluation_data import open_dialogues
from tokexport.engines.recipe_comparison import RecipeComparison, compare_recipes, require_one_model
from tokexport.errors import InputError
from tokexport.recipes.load import override
from tokexport.recipes.schema import Recipe

OPTIONS = EvalOptions(max_new_tokens=2, threads=1)


def recipes(checkpoint: Path) -> list[Recipe]:
    return [
        replace(recipe_for(checkpoint, adsc()), name="thin"),
        replace(recipe_for(checkpoint), name="full"),
        replace(recipe_for(checkpoint, {"method": "sample", "keep": 10**6}), name="impossible"),
        replace(recipe_for(checkpoint, {"method": "sample", "keep": 9}), name="control"),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def found(checkpoint: Path, folder: Path) -> RecipeComparison:
    return compare_recipes(recipes(checkpoint), folder, open_dialogues(dialogues=2), OPTIONS, repeats=1)


def test_rows_stand_in_the_order_of_the_recipes(found: RecipeComparison):
    assert [row["recipe"] for row in found.rows] == ["thin", "full", "control"]


def test_a_row_holds_accuracy_costs_and_times(found: RecipeComparison):
    thin = found.rows[0]
    assert thin["flops"]["reduction"] > 0
    assert thin["ttft_ms"]["median"] > 0
    assert len(thin["per_turn"]) == 3
    assert thin["full"] is not None
    assert found.rows[1]["full"] is None


def test_a_recipe_that_fails_is_named_and_stops_no_other(found: RecipeComparison):
    assert list(found.failures) == ["impossible"]
    assert "impossible is missing: [[compress]] sample: keep = 1000000" in found.markdown()


def test_the_table_and_the_figures_are_written(found: RecipeComparison, folder: Path):
    assert (folder / "compare.md").read_text() == found.markdown()
    assert (folder / "compare.json").is_file()
    page = (folder / "compare.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count('<use href="#image-1"/>') == 3  # two bottlenecks of one recipe and a sample, of the second image


def test_a_method_is_judged_beside_its_control(found: RecipeComparison):
    # 16, 8, 8, 4: 9 tokens per layer on average, as the control keeps.
    (verdict,) = found.verdicts
    assert (verdict.recipe, verdict.control, verdict.control_tokens) == ("thin", "control", 9)
    assert verdict.basis == "paired"
    assert verdict.difference == pytest.approx(found.rows[0]["accuracy"] - found.rows[2]["accuracy"])
    assert found.report()["verdicts"] == [verdict.report()]


@pytest.mark.usefixtures("found")
def test_what_is_there_is_used_again(checkpoint: Path, folder: Path):
    said: list[str] = []
    compare_recipes(
        recipes(checkpoint)[:2], folder, open_dialogues(dialogues=2), OPTIONS, repeats=1, progress=said.append
    )
    assert not [text for text in said if "tracing" in text or "evaluating" in text]


@pytest.mark.usefixtures("found")
def test_an_evaluation_on_fewer_dialogues_is_not_taken_for_one_on_more(checkpoint: Path, folder: Path):
    said: list[str] = []
    compare_recipes(
        recipes(checkpoint)[:2], folder, open_dialogues(dialogues=3), OPTIONS, repeats=1, progress=said.append
    )
    assert [text for text in said if "evaluating" in text] == [
        "evaluating full on 3 dialogues",
        "evaluating thin on 3 dialogues",
    ]


@pytest.mark.usefixtures("found")
def test_evaluations_on_a_file_are_used_again_until_it_changes(checkpoint: Path, folder: Path, tmp_path: Path):
    said: list[str] = []

    def compare(first: int) -> int:
        said.clear()
        data = write_jsonl((make_dialogue(0, "test", first + number) for number in range(2)), tmp_path)
        given = [recipes(checkpoint)[1]]
        compare_recipes(given, folder, open_dialogues(str(data)), OPTIONS, repeats=1, progress=said.append)
        return sum("evaluating" in text for text in said)

    assert [compare(0), compare(0), compare(5)] == [1, 0, 1]


@pytest.mark.usefixtures("found")
def test_another_recipe_of_the_same_name_is_built_anew(checkpoint: Path, folder: Path):
    changed = replace(recipe_for(checkpoint, adsc(phase=0.5)), name="thin")
    said: list[str] = []
    both = [changed, recipes(checkpoint)[1]]
    compare_recipes(both, folder, open_dialogues(dialogues=2), OPTIONS, repeats=1, progress=said.append)
    assert any(text.startswith("thin: tracing") for text in said)


@pytest.mark.usefixtures("found")
def test_an_interrupted_comparison_goes_on_where_it_stopped(checkpoint: Path, folder: Path):
    given = [recipes(checkpoint)[1], replace(recipe_for(checkpoint, adsc(phase=0.25)), name="later")]
    before = (folder / "compare.json").read_text()
    said: list[str] = []

    def interrupt(text: str) -> None:
        if text == "evaluating later on 2 dialogues":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_recipes(given, folder, open_dialogues(dialogues=2), OPTIONS, repeats=1, progress=interrupt)
    assert (folder / "compare.json").read_text() == before
    found = compare_recipes(given, folder, open_dialogues(dialogues=2), OPTIONS, repeats=1, progress=said.append)
    assert [row["recipe"] for row in found.rows] == ["full", "later"]
    assert not [text for text in said if "tracing" in text]
    assert [text for text in said if "evaluating" in text] == ["evaluating later on 2 dialogues"]


def test_recipes_of_different_models_are_refused_before_anything_is_built(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
):
    other = save_checkpoint(tmp_path_factory.mktemp("other") / "tiny", tiny_config(), seed=1)
    given = [*recipes(checkpoint)[:2], replace(recipe_for(other, adsc()), name="foreign")]
    with pytest.raises(InputError, match="foreign is made from another model than full"):
        compare_recipes(given, tmp_path, open_dialogues(dialogues=1), OPTIONS)
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_read_is_told_before_anything_is_built(checkpoint: Path, tmp_path: Path):
    given = [*recipes(checkpoint)[:2], replace(recipe_for(tmp_path / "gone", adsc()), name="foreign")]
    with pytest.raises(InputError, match=r"^whether foreign is made from the same model .*; leave it out"):
        compare_recipes(given, tmp_path / "out", open_dialogues(dialogues=1), OPTIONS)
    assert not (tmp_path / "out").exists()


def test_an_adapter_makes_no_other_model(checkpoint: Path, tmp_path: Path):
    adapter = save_adapter(tmp_path / "adapter")
    tuned = override(recipes(checkpoint)[0], adapter=str(adapter))
    require_one_model([recipes(checkpoint)[1], tuned])


@pytest.mark.usefixtures("found")
def test_budgets_take_the_place_of_the_recipes_own(checkpoint: Path, folder: Path):
    given = [*recipes(checkpoint)[:2], replace(recipe_for(checkpoint, {"method": "resize", "keep": 4}), name="small")]
    asked = open_dialogues(dialogues=1)
    found = compare_recipes(given, folder, asked, OPTIONS, budgets=[6], repeats=1)
    assert [(row["recipe"], row["budget"], row["mean_vision_tokens"]) for row in found.rows] == [
        ("thin@6", 6, 6),
        ("full", None, 16),
    ]
    assert list(found.failures) == ["small@6"]
    assert found.settings["budgets"] == [6]


@pytest.mark.parametrize(
    ("names", "problem"),
    [(["thin"], "0 of the recipes thin are without"), (["thin", "thin", "full"], "two recipes are called thin")],
    ids=["no full one", "one name twice"],
)
def test_recipes_that_cannot_be_compared_are_refused(checkpoint: Path, tmp_path: Path, names: list[str], problem: str):
    given = [next(recipe for recipe in recipes(checkpoint) if recipe.name == name) for name in names]
    with pytest.raises(InputError, match=problem):
        compare_recipes(given, tmp_path, open_dialogues(dialogues=1), OPTIONS)
