"""Recipes in several precisions, and what is lost by compression, by precision and by both."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import adsc, recipe_for
from tokexport.engines.accuracy import EvalOptions
from tokexport.engines.comparison_text import LOSS_REMARK, loss_lines
from tokexport.engines.evaluation_data import open_dialogues
from tokexport.engines.intervals import Difference, paired_difference
from tokexport.engines.precisions import at_precisions, find_losses
from tokexport.engines.recipe_comparison import RecipeComparison, compare_recipes
from tokexport.errors import InputError
from tokexport.recipes.schema import ExportTable, Recipe


def recipes(checkpoint: Path) -> list[Recipe]:
    return [
        replace(recipe_for(checkpoint), name="full"),
        replace(recipe_for(checkpoint, adsc()), name="thin"),
    ]


@pytest.fixture(scope="module")
def found(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> RecipeComparison:
    return compare_recipes(
        recipes(checkpoint),
        tmp_path_factory.mktemp("compare"),
        open_dialogues(dialogues=2),
        EvalOptions(max_new_tokens=2, threads=1),
        precisions=["int8"],
        repeats=1,
    )


def test_every_recipe_is_made_in_every_precision(checkpoint: Path):
    made = at_precisions(recipes(checkpoint), ["int8", "float16"])
    assert [recipe.name for recipe in made.recipes] == [
        *("full", "full@int8", "full@float16"),
        *("thin", "thin@int8", "thin@float16"),
    ]
    assert made.recipes[1].quantize.decoder == "int8"
    assert made.recipes[5].export.dtype == "float16"
    assert made.recipes[5].compress == made.recipes[3].compress


@pytest.mark.parametrize(
    ("precisions", "words"),
    [
        (["int7"], "the precision 'int7' is not known; choose among float16, bfloat16, int8, int4"),
        (["int8", "int4", "int8"], "the precision int8 is given twice; give each once"),
    ],
)
def test_a_precision_that_means_nothing_is_refused(checkpoint: Path, precisions: list[str], words: str):
    with pytest.raises(InputError) as caught:
        at_precisions(recipes(checkpoint), precisions)
    assert str(caught.value) == words


def test_recipes_in_another_precision_are_refused_where_several_are_asked_for(checkpoint: Path):
    given = [replace(recipes(checkpoint)[0], export=ExportTable(dtype="float16"))]
    with pytest.raises(InputError, match=r"^full is in float16, and --precisions compares others with float32; "):
        at_precisions(given, ["int8"])
    assert at_precisions(given, []).recipes == tuple(given)


def test_losses_are_told_apart(checkpoint: Path):
    made = at_precisions(recipes(checkpoint), ["int8"])
    dialogue_Q = np.arange(4)
    scores = {
        "full": np.array([1.0, 1.0, 1.0, 1.0]),
        "full@int8": np.array([1.0, 1.0, 1.0, 0.0]),
        "thin": np.array([1.0, 1.0, 0.0, 0.0]),
        "thin@int8": np.array([1.0, 0.0, 0.0, 0.0]),
    }

    def differ(name: str, other: str) -> Difference:
        return paired_difference(scores[name], scores[other], dialogue_Q)

    losses = find_losses(list(scores), "full", made, differ)
    means = [
        tuple(None if part is None else part.mean for part in (loss.of_compression, loss.of_precision, loss.of_both))
        for loss in losses
    ]
    assert means == [(None, None, None), (None, -0.25, -0.25), (-0.5, None, -0.5), (-0.5, -0.25, -0.75)]


def test_what_could_not_be_made_is_compared_with_nothing(checkpoint: Path):
    made = at_precisions(recipes(checkpoint), ["int8"])
    losses = find_losses(["full", "thin", "thin@int8"], "full", made, lambda _one, _other: None)
    assert [loss.recipe for loss in losses] == ["full", "thin", "thin@int8"]
    assert losses[2].of_compression is None


def test_artefacts_in_eight_bits_stand_beside_those_in_float32(found: RecipeComparison):
    rows = {row["recipe"]: row for row in found.rows}
    assert [loss.recipe for loss in found.losses] == list(rows)
    assert rows["thin@int8"]["precision"] == "vision int8, embeddings int8, decoder int8"
    assert rows["thin@int8"]["bytes_on_disk"] < rows["thin"]["bytes_on_disk"]
    thin = next(loss for loss in found.losses if loss.recipe == "thin@int8")
    assert thin.of_precision is not None
    assert thin.of_precision.mean == pytest.approx(rows["thin@int8"]["accuracy"] - rows["thin"]["accuracy"])
    assert thin.of_both is not None
    assert thin.of_both.mean == pytest.approx(rows["thin@int8"]["accuracy"] - rows["full"]["accuracy"])


def test_the_losses_are_printed(found: RecipeComparison):
    lines = loss_lines(found.report())
    assert lines[0][0] == "full"
    assert lines[0][-3:] == ["–", "–", "–"]
    assert LOSS_REMARK in found.markdown()
    assert " | ".join(lines[3]) in found.markdown()
