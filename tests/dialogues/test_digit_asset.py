"""The sheet of digits that ships is the one that the script makes."""

from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokexport.dialogues.digit_asset import write


@pytest.mark.skipif(
    find_spec("sklearn") is None, reason="the digits come from scikit-learn; install it with: pip install scikit-learn"
)
def test_the_sheet_that_ships_is_made_by_the_script(tmp_path: Path):
    write(tmp_path)
    shipped = resources.files("tokexport.dialogues") / "assets"
    assert (tmp_path / "digits.json").read_text() == (shipped / "digits.json").read_text()
    with Image.open(tmp_path / "digits.png") as made, (shipped / "digits.png").open("rb") as file:
        assert np.array_equal(np.asarray(made), np.asarray(Image.open(file)))
