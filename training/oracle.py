"""The oracle of MetaCompress (arXiv 2603.21701): for each image the matrix that changes its answers least.

Nothing is learned that another image could use; it tells how far a generator is from what a matrix can do.

I images, N vision tokens of an image, M after compression
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from tokexport.errors import CheckpointError, TrainingError
from tokexport.exporter.compressor_file import load_compressor
from tokexport.exporter.export import Design
from tokexport.exporter.method import UNTRAINED
from tokexport.exporter.modules.token_mixing import WindowAverage
from tokexport.exporter.windows import Windows
from tokexport.training.loop import Listener, fit, make_accelerator
from tokexport.training.metacompress import (
    Distillation,
    Distiller,
    compressor_of,
    distiller_of,
    frozen_llava,
    run_settings,
)
from tokexport.training.tuning_data import Material

MATRICES_FILE, COMPARISON_FILE = "oracle.safetensors", "oracle.json"

# What a row starts with for tokens outside its window, as a share of one inside, so that it can find them.
_START_OUTSIDE = 1e-3


class FreeMatrix(nn.Module):
    """A matrix of its own for each image, whatever the image shows.

    It starts as an average over windows.
    """

    def __init__(self, num_images: int, windows: Windows) -> None:
        super().__init__()
        share_MN = window_shares(windows)
        logits_MN = (share_MN / share_MN.max()).clamp(min=_START_OUTSIDE).log()
        self.logits_IMN = nn.Parameter(logits_MN.repeat(num_images, 1, 1))

    def forward(self, features_IND: Tensor) -> Tensor:
        """Return the matrices (I, M, N), whose rows sum to 1."""
        return self.logits_IMN[: len(features_IND)].softmax(-1)


class _Average(nn.Module):
    """The matrix of average pooling, the same for all images."""

    def __init__(self, windows: Windows) -> None:
        super().__init__()
        self.register_buffer("share_MN", window_shares(windows))

    def forward(self, features_IND: Tensor) -> Tensor:
        return self.get_buffer("share_MN").expand(len(features_IND), -1, -1)


@dataclass(frozen=True)
class _Same(Dataset[Any]):
    """The same few examples again and again, made once."""

    examples: Sequence[Any]
    num_steps: int

    def __len__(self) -> int:
        return len(self.examples) * self.num_steps

    def __getitem__(self, index: int) -> Any:
        return self.examples[index % len(self.examples)]


def train_oracle(
    made: Design, material: Material, distillation: Distillation, folder: Path, *, listener: Listener | None = None
) -> Mapping[str, Mapping[str, float]]:
    """Optimise a matrix for each image of one batch and compare it with pooling and with the recipe's compressor.

    Args:
        made: the recipe, checked against its model.
        material: its first examples are the batch.
        distillation: how; the batch size is the number of images.
        folder: where checkpoint, log, matrices and comparison go.
        listener: told how it goes.

    Returns:
        What ``Distiller`` tells of ``pool``, ``metacompress`` (where its weights are there) and ``oracle``, for the
        batch.

    Raises:
        RecipeError: the recipe has no MetaCompress, or something before it.
        TrainingError: a batch in parts, several processes, or see ``fit``.
    """
    method, arriving = compressor_of(made)
    listener = listener or Listener()
    accelerator, schedule = make_accelerator(), distillation.schedule
    if schedule.accumulate > 1 or accelerator.num_processes > 1:
        raise TrainingError(
            f"accumulate = {schedule.accumulate} and {accelerator.num_processes} processes: an oracle takes its images "
            "in one part and one process; take a smaller batch instead"
        )
    llava = frozen_llava(made, distillation)
    windows = method.windows(arriving)
    batch = [material.examples[index] for index in range(schedule.batch_size)]
    oracle = FreeMatrix(len(batch), windows)
    fit(
        material.objective_of(distiller_of(made, llava, oracle, distillation)),
        _Same(batch, schedule.num_steps),
        # Decay would pull towards a mean over the whole image.
        replace(schedule, weight_decay=0.0),
        folder,
        stage=f"oracle {made.recipe.name}",
        settings=run_settings(made, material, distillation),
        collate=material.collate,
        listener=listener,
    )
    matrices = {"pool": _Average(windows), "metacompress": _generator(made, listener), "oracle": oracle}
    together = (material.collate or default_collate)(batch)
    comparison = {
        name: _figures(material, distiller_of(made, llava, matrix, distillation), together, accelerator.device)
        for name, matrix in matrices.items()
        if matrix is not None
    }
    _store(folder, oracle, comparison)
    return comparison


def window_shares(windows: Windows) -> Tensor:
    """Return the matrix (M, N) that averages over windows."""
    return WindowAverage(windows)(torch.eye(math.prod(windows.arriving)).unsqueeze(0))[0]


def _generator(made: Design, listener: Listener) -> nn.Module | None:
    """Return the recipe's own generator, or None where it is not trained yet."""
    method, arriving = compressor_of(made)
    if method.weights == UNTRAINED:
        return None
    module = method.feature_stage(made.model.spec, arriving)
    try:
        values = load_compressor(method.weights, module, method.trained_sizes(arriving))
    except CheckpointError as error:
        listener.note(f"metacompress is left out of the comparison: {error}")
        return None
    module.load_state_dict(values, strict=False)
    return module.matrix


@torch.no_grad()
def _figures(
    material: Material, distiller: Distiller, batch: Mapping[str, Tensor], device: torch.device
) -> Mapping[str, float]:
    objective = material.objective_of(distiller).to(device).eval()
    _, figures = objective(**{name: value.to(device) for name, value in batch.items()})
    return {name: value.item() for name, value in figures.items()}


def _store(folder: Path, oracle: FreeMatrix, comparison: Mapping[str, Any]) -> None:
    path = folder / MATRICES_FILE
    partial = path.with_suffix(".partial")
    try:
        save_file({"matrix": oracle.logits_IMN.detach().float().softmax(-1).cpu().contiguous()}, partial)
        partial.replace(path)
        (folder / COMPARISON_FILE).write_text(json.dumps(comparison, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} cannot be written ({error}); free some room or choose another folder") from error
