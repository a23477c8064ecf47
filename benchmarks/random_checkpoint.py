"""A checkpoint of random weights, as published ones are: sharded safetensors in float16, in their names."""

import json
import shutil
import sys
from pathlib import Path

import click
import torch
from safetensors.torch import save_file

from tokexport.errors import TokexportError
from tokexport.exporter.checkpoint import processor_files
from tokexport.exporter.export import Design

_SHARD_BYTES = 5_000_000_000
_MARK = "fingerprint"


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
    raise TokexportError(f"the tensor {name} has no published name; only LLaVA-1.5 can be written")


def write_checkpoint(made: Design, folder: Path) -> Path:
    """Write the model of a design, one shard in memory at a time, unless it stands there."""
    wanted, mark = made.fingerprint(), folder / _MARK
    if mark.is_file() and mark.read_text() == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weights = made.open_weights()
    places: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    label = f"making {folder}"
    with click.progressbar(list(weights.shapes), label=label, file=sys.stderr) as names:
        for name in names:
            shard[published_name(name)] = weights.load(name).half().contiguous()
            if sum(tensor.nbytes for tensor in shard.values()) > _SHARD_BYTES:
                _write_shard(shard, folder, places)
    _write_shard(shard, folder, places)
    for path in processor_files(made.model.directory):
        shutil.copyfile(path, folder / path.name)
    config = {**made.model.config.to_dict(), "architectures": ["LlavaForConditionalGeneration"], "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str))
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    mark.write_text(wanted)
    return folder


def _write_shard(shard: dict[str, torch.Tensor], folder: Path, places: dict[str, str]) -> None:
    if not shard:
        return
    file = f"model-{len(set(places.values())) + 1:05d}.safetensors"
    save_file(shard, folder / file, {"format": "pt"})
    places |= dict.fromkeys(shard, file)
    shard.clear()
