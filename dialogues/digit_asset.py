"""Makes the sheet of handwritten digits from the data set that scikit-learn ships.

Run ``python -m tokexport.dialogues.digit_asset`` to write it again; the result is the same every time.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import tokexport.dialogues
from tokexport.dialogues.sprites import DIGIT_SIDE, SHEET_COLUMNS

_SEED = 7
# The source has 17 levels of grey; this spreads them over 8 bits and can be undone.
_LEVEL = 15


def make_sheet() -> tuple[Image.Image, str]:
    """Return all digits, 8 x 8 pixels each, row by row on one sheet, and their values as a text of as many characters.

    They are shuffled because the data set is sorted by writer: any part of the sheet has digits of all of them.
    """
    # Loaded by name: only this module needs scikit-learn, and the package works without it.
    found: Any = import_module("sklearn.datasets").load_digits()
    order = np.random.default_rng(_SEED).permutation(len(found.target))
    num_rows = -(-len(order) // SHEET_COLUMNS)
    cells = np.zeros((num_rows * SHEET_COLUMNS, DIGIT_SIDE, DIGIT_SIDE), np.uint8)
    cells[: len(order)] = found.images[order] * _LEVEL
    rows = cells.reshape(num_rows, SHEET_COLUMNS, DIGIT_SIDE, DIGIT_SIDE).transpose(0, 2, 1, 3)
    sheet = Image.fromarray(rows.reshape(num_rows * DIGIT_SIDE, SHEET_COLUMNS * DIGIT_SIDE))
    return sheet, "".join(str(value) for value in found.target[order])


def write(folder: Path) -> None:
    """Write ``digits.png`` and ``digits.json`` to ``folder``."""
    sheet, values = make_sheet()
    sheet.save(folder / "digits.png", optimize=True)
    source = "scikit-learn load_digits: Optical Recognition of Handwritten Digits, UCI, CC BY 4.0"
    text = json.dumps({"source": source, "values": values}, indent=2)
    (folder / "digits.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(tokexport.dialogues.__path__[0]) / "assets")
