"""Which vision tokens a mixing method draws from, on one image, for the report.

M tokens that stay, N tokens that arrive
"""

from typing import Any

import numpy as np
from PIL import Image

from tokexport.dialogues.generate import make_dialogue
from tokexport.engines.prompt import PromptProcessor
from tokexport.engines.taps import VisionTaps
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.graph_io import stage_name
from tokexport.exporter.method import arriving_plans, load_methods

_NUM_ROWS = 5
_DIGITS = 4


def made_image() -> Image.Image:
    """Return the image that the report shows."""
    image = make_dialogue(0, "validation", 0).image
    assert isinstance(image, Image.Image)
    return image


def mixing_of(bundle: Bundle, *, threads: int | None = None) -> dict[str, Any] | None:
    """Return what some tokens that stay are mixed from, and how much all take from each token, for a made image.

    None where no method mixes over a grid of tokens.
    """
    methods = load_methods(bundle.recipe.compress)
    for method, arriving in zip(methods, arriving_plans(methods, bundle.spec), strict=False):
        if method.is_mixing and arriving.grid is not None:
            break
    else:
        return None
    module = f"{stage_name(method.name)}.matrix"
    pixel_values = PromptProcessor(bundle.path).pixels([made_image()])
    matrix_MN = VisionTaps(bundle, [module], threads=threads)(pixel_values)[module][0]
    places = np.linspace(0, len(matrix_MN) - 1, _NUM_ROWS + 2).round().astype(int)[1:-1]
    return {
        "method": method.name,
        "grid": list(arriving.grid),
        "kept": len(matrix_MN),
        "rows": [{"row": int(place), "weights": matrix_MN[place].round(_DIGITS).tolist()} for place in places],
        "total": matrix_MN.sum(0).round(_DIGITS).tolist(),
        "entropy": float(-(matrix_MN * np.log(matrix_MN.clip(1e-9))).sum(1).mean()),
    }
