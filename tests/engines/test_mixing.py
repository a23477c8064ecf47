"""Pictures of what a mixing method draws from."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import recipe_for
from tokexport.engines.build import build
from tokexport.engines.mixing import mixing_of
from tokexport.exporter.bundle import Bundle
from tokexport.recipes.schema import Recipe

METACOMPRESS: dict[str, object] = {"method": "metacompress", "keep": 6, "width": 8, "weights": "untrained"}


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, exported: Callable[[Recipe], Bundle]) -> Bundle:
    return exported(recipe_for(checkpoint, METACOMPRESS))


def test_rows_and_their_sum_are_told(bundle: Bundle):
    mixing = mixing_of(bundle, threads=1)
    assert mixing is not None
    assert (mixing["method"], mixing["grid"], mixing["kept"]) == ("metacompress", [4, 4], 6)
    assert all(0 <= row["row"] < 6 and len(row["weights"]) == 16 for row in mixing["rows"])
    assert [sum(row["weights"]) for row in mixing["rows"]] == pytest.approx([1] * len(mixing["rows"]), abs=1e-3)
    assert sum(mixing["total"]) == pytest.approx(6, abs=1e-2)
    assert 0 < mixing["entropy"] < np.log(16)


def test_a_method_that_keeps_tokens_mixes_none(tiny_adsc: Bundle, tiny_full: Bundle):
    assert mixing_of(tiny_adsc) is None
    assert mixing_of(tiny_full) is None


@pytest.mark.parametrize(("steps", "has_picture"), [([METACOMPRESS], True), ([], False)], ids=["mixing", "full"])
def test_the_report_shows_what_is_mixed(
    checkpoint: Path, tmp_path: Path, steps: list[dict[str, object]], has_picture: bool
):
    made = build(recipe_for(checkpoint, *steps), tmp_path / "out", with_verify=False, with_bench=False, threads=1)
    page = (made.bundle.path / "reports" / "report.html").read_text()
    assert ("What metacompress mixes, on one image" in page) == has_picture
    assert ("data:image/png;base64," in page) == has_picture
