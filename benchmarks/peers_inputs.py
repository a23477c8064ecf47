"""What all of ``benchmarks/peers.py`` read: the checkpoint, as published ones are, and the image."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from tokexport.engines.worker import Workload, make_question
from tokexport.errors import TokexportError
from tokexport.exporter.checkpoint import processor_files
from tokexport.exporter.export import Design


def published_name(name: str) -> str:
    """Return what published LLaVA-1.5 checkpoints call a tensor; every version of ``transformers`` reads these."""
    for ours, theirs in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise TokexportError(f"the tensor {name} has no published name; only LLaVA-1.5 can be compared")


def write_checkpoint(made: Design, folder: Path) -> Path:
    """Write the model of a design as published checkpoints are, in float16, unless it stands there."""
    wanted = made.fingerprint()
    mark = folder / "fingerprint"
    if mark.is_file() and mark.read_text() == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weights = made.open_weights()
    save_file(
        {published_name(name): weights.load(name).half().contiguous() for name in weights.shapes},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    for path in processor_files(made.model.directory):
        shutil.copyfile(path, folder / path.name)
    config = {**made.model.config.to_dict(), "architectures": ["LlavaForConditionalGeneration"], "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str))
    mark.write_text(wanted)
    return folder


def write_question(made: Design, workload: Workload, folder: Path) -> None:
    """Write the image, as the tower takes it and in bytes, for peers to read."""
    pixels = make_question(made.model.spec, workload).pixel_values
    processor = json.loads((made.model.directory / "processor_config.json").read_text())["image_processor"]
    mean, std = (np.array(processor[f"image_{name}"])[:, None, None] for name in ("mean", "std"))
    np.save(folder / "pixels.npy", pixels)
    np.save(
        folder / "image.npy", (255 * (pixels[0] * std + mean)).round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    )
