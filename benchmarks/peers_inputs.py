"""The image that all of ``benchmarks/peers.py`` are asked about."""

import json
from pathlib import Path

import numpy as np

from tokexport.engines.worker import Workload, make_question
from tokexport.exporter.export import Design


def write_question(made: Design, workload: Workload, folder: Path) -> None:
    """Write the image, as the tower takes it and in bytes, for peers to read."""
    pixels = make_question(made.model.spec, workload).pixel_values
    processor = json.loads((made.model.directory / "processor_config.json").read_text())["image_processor"]
    mean, std = (np.array(processor[f"image_{name}"])[:, None, None] for name in ("mean", "std"))
    np.save(folder / "pixels.npy", pixels)
    np.save(
        folder / "image.npy", (255 * (pixels[0] * std + mean)).round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    )
