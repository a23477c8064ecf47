"""A whole search on a tiny model: what is tried, built and written, what is used again, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import adsc, recipe_for, save_checkpoint, tiny_config
from tokexport.engines.accuracy import EvalOptions
from tokexport.engines.cost_budget import parse_budgets
from tokexport.engines.evaluation_data import DialogueSet, open_apart
from tokexport.engines.screening import FILE
from tokexport.engines.search import REPORT, TABLE, WINNER, Search, SearchOptions, search
from tokexport.engines.search_text import search_markdown, search_tables
from tokexport.errors import InputError, RecipeError
from tokexport.exporter.export import design
from tokexport.recipes.load import load_recipe
from tokexport.recipes.schema import Recipe

OPTIONS = EvalOptions(max_new_tokens=2, threads=1)


def base(checkpoint: Path) -> Recipe:
    return replace(recipe_for(checkpoint), name="full")


def wanted(checkpoint: Path, *budgets: str) -> SearchOptions:
    missing = recipe_for(checkpoint, {"method": "relevance", "keep": 4, "weights": "gone.safetensors"})
    return SearchOptions(
        budgets=parse_budgets(budgets),
        methods=("divprune", "relevance"),
        also=(replace(missing, name="unreadable"),),
        finalists=1,
        repeats=1,
    )


def dialogues() -> tuple[DialogueSet, DialogueSet]:
    return open_apart("test", 2, None, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def found(checkpoint: Path, folder: Path) -> Search:
    return search(base(checkpoint), folder, *dialogues(), OPTIONS, wanted(checkpoint, "flops=0.7", "kv=0.8"))


def test_the_method_that_was_asked_for_wins_within_the_budgets(found: Search):
    winner = found.outcome.winner
    assert winner is not None
    assert winner.methods == ("divprune",)
    row = next(row for row in found.report["rows"] if row["recipe"] == winner.recipe.name)
    assert row["meets_budgets"]
    assert row["costs"]["kv"] <= 0.8 * found.report["limits"]["kv"]["full"]
    assert found.report["winner"] == winner.recipe.name


def test_a_control_is_measured_beside_it_and_may_not_win(found: Search):
    assert [row["is_control"] for row in found.report["rows"]].count(True) == 1
    assert found.outcome.winner is not None
    assert not found.outcome.winner.is_control


@pytest.mark.usefixtures("found")
def test_the_winners_recipe_holds_everything(folder: Path, checkpoint: Path):
    recipe = load_recipe(str(folder / WINNER))
    made = design(recipe)
    assert made.recipe.compress == recipe.compress
    assert recipe.description.startswith(
        "Found by tokexport search --budget flops=0.7 --budget kv=0.8: divprune: keep "
    )
    assert recipe.model.checkpoint == str(checkpoint)
    # What the base says is kept.
    assert (recipe.session, recipe.plan, recipe.export) == (
        base(checkpoint).session,
        base(checkpoint).plan,
        base(checkpoint).export,
    )
    assert (folder / recipe.name / "tokexport.json").is_file()


def test_a_candidate_that_fails_is_named_and_stops_no_other(found: Search, folder: Path):
    assert {name.partition("@")[0] for name in found.report["failures"]} == {"unreadable"}
    assert "there are no compressor weights" in next(iter(found.report["failures"].values()))
    assert "unreadable failed: " in (folder / TABLE).read_text()


def test_what_was_found_is_written(found: Search, folder: Path):
    assert json.loads((folder / REPORT).read_text())["winner"] == found.report["winner"]
    text = (folder / TABLE).read_text()
    assert text == search_markdown(found.report)
    assert text.startswith("The winner is divprune-")
    assert "## Pareto set of accuracy and FLOPs and KV cache" in text
    assert len(search_tables(found.report)) >= 3


@pytest.mark.usefixtures("found")
def test_what_is_there_is_used_again(checkpoint: Path, folder: Path):
    before = (folder / FILE).read_text()
    said: list[str] = []
    again = search(
        base(checkpoint),
        folder,
        *dialogues(),
        OPTIONS,
        wanted(checkpoint, "flops=0.7", "kv=0.8"),
        progress=said.append,
    )
    assert (folder / FILE).read_text() == before
    assert not [text for text in said if "tracing" in text or "evaluating" in text]
    assert again.outcome.winner is not None


@pytest.mark.usefixtures("found")
def test_a_time_that_nothing_meets_is_told_with_the_nearest_before_anything_else_is_built(
    checkpoint: Path, folder: Path
):
    with pytest.raises(InputError, match=r"^no candidate meets the budgets; the nearest .* ms of ttft where 0\.0 ms"):
        search(base(checkpoint), folder, *dialogues(), OPTIONS, wanted(checkpoint, "ttft=1us"))


def test_a_budget_that_nothing_meets_is_told_before_anything_is_built(checkpoint: Path, tmp_path: Path):
    with pytest.raises(
        InputError, match=r"^no candidate meets the budgets; the nearest is .* with 2 vision tokens per"
    ):
        search(base(checkpoint), tmp_path, *dialogues(), OPTIONS, wanted(checkpoint, "flops=0.01"))
    assert not list(tmp_path.iterdir())


def test_a_base_with_compression_is_refused(checkpoint: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"^recipe tiny is compressed already \(adsc\); give the recipe of its model"):
        search(recipe_for(checkpoint, adsc()), tmp_path, *dialogues(), OPTIONS, wanted(checkpoint, "flops=0.7"))


def test_an_unknown_method_is_refused(checkpoint: Path, tmp_path: Path):
    asked = replace(wanted(checkpoint, "flops=0.7"), methods=("adcs",))
    with pytest.raises(RecipeError, match="there is no method 'adcs'; did you mean 'adsc'"):
        search(base(checkpoint), tmp_path, *dialogues(), OPTIONS, asked)


def test_recipes_that_are_no_candidates_are_refused(
    checkpoint: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    asked = wanted(checkpoint, "flops=0.7")
    with pytest.raises(InputError, match="recipe full compresses nothing, so it is no candidate; leave it out"):
        search(base(checkpoint), tmp_path, *dialogues(), OPTIONS, replace(asked, also=(base(checkpoint),)))
    twice = replace(recipe_for(checkpoint, adsc()), name="full")
    with pytest.raises(InputError, match="two recipes are called full; give each a name of its own"):
        search(base(checkpoint), tmp_path, *dialogues(), OPTIONS, replace(asked, also=(twice,)))
    other = save_checkpoint(tmp_path_factory.mktemp("other") / "tiny", tiny_config(), seed=1)
    foreign = replace(recipe_for(other, adsc()), name="foreign")
    with pytest.raises(InputError, match="foreign is made from another model than full"):
        search(base(checkpoint), tmp_path, *dialogues(), OPTIONS, replace(asked, also=(foreign,)))
