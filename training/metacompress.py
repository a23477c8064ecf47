"""Training of MetaCompress (arXiv 2603.21701): a frozen model, and a compressor that changes its answers least.

B conversations, I images, T tokens, N vision tokens of an image, M after compression, A tokens that are answers,
W vocabulary, D width
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from tokexport.errors import RecipeError, TrainingError
from tokexport.exporter.checkpoint import fingerprint
from tokexport.exporter.compressor_file import FILE_NAME, save_compressor
from tokexport.exporter.export import Design
from tokexport.exporter.methods.adsc import Adsc
from tokexport.exporter.methods.metacompress import MetaCompress
from tokexport.exporter.modules.token_mixing import START_BETA
from tokexport.exporter.plan import TokenPlan
from tokexport.training.compressed import NO_LABEL, CompressedLlava, ConstantThinning, kept_places, share_right
from tokexport.training.frozen import load_llava
from tokexport.training.loop import Listener, Schedule, attention_for, fit, make_accelerator
from tokexport.training.tuning_data import Material

_LEAST_SHARE = 1e-9
# Of the loss, in the log.
_PARTS = ("divergence", "entropy", "column")


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How a compressor is trained.

    Attributes:
        schedule: how long and how fast.
        entropy: weight of the mean entropy of rows, which makes them choose.
        column: weight of the largest column sum, which keeps rows from choosing the same token.
        start_beta: how sharply rows choose at the start.
        gradient_checkpointing: compute activations twice to save memory.
        seed: of the weights that it starts from.
    """

    schedule: Schedule
    entropy: float = 1.0
    column: float = 1.0
    start_beta: float = START_BETA
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("entropy", "column"):
            if getattr(self, name) < 0:
                raise TrainingError(f"{name} = {getattr(self, name)} must be at least 0")


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """Conversations with what the whole model answers.

    Attributes:
        features_IND: of the images.
        input_ids: (B, T), images whole.
        labels: (B, T).
        expected_AW: logits of the answers' tokens.
        target_A: the answers' tokens.
    """

    features_IND: Tensor
    input_ids: Tensor
    labels: Tensor
    expected_AW: Tensor
    target_A: Tensor


class Distiller(nn.Module):
    """Compares what a model answers from compressed image features with what it answers from all of them.

    Args:
        teacher: the model, nothing compressed; frozen.
        student: the same with what a recipe thins inside the language model.
        matrix: makes matrices (I, M, N) of image features (I, N, D); the only part that learns.
        plan: says where the M stand, by default side by side.
        entropy: see ``Distillation``.
        column: see ``Distillation``.
    """

    def __init__(
        self,
        teacher: CompressedLlava,
        student: CompressedLlava,
        matrix: nn.Module,
        *,
        plan: TokenPlan | None = None,
        entropy: float = 1.0,
        column: float = 1.0,
    ) -> None:
        super().__init__()
        self.teacher, self.student, self.matrix, self._plan = teacher, student, matrix, plan
        self._entropy, self._column = entropy, column

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, labels: Tensor, read: Tensor | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss and its parts; the arguments are those of ``CompressedLlava``, images read whole."""
        return self.compare(self.lesson(pixel_values, input_ids, labels))

    @torch.no_grad()
    def lesson(self, pixel_values: Tensor, input_ids: Tensor, labels: Tensor) -> Lesson:
        """Run the tower and the teacher, once for all that learn from them."""
        features_IND = self.teacher.image_features(pixel_values)
        expected_AW, target_A = self.teacher.answer(features_IND, input_ids, labels)
        return Lesson(
            features_IND=features_IND,
            input_ids=input_ids,
            labels=labels,
            expected_AW=expected_AW,
            target_A=target_A,
        )

    def compare(self, lesson: Lesson) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss and its parts."""
        right = share_right(lesson.expected_AW, lesson.target_A)
        if not len(lesson.features_IND):
            nothing = sum(parameter.sum() for parameter in self.matrix.parameters()) * 0.0
            return torch.as_tensor(nothing), {
                **dict.fromkeys(_PARTS, torch.tensor(0.0)),
                "right": right,
                "teacher": right,
            }
        matrix_IMN = self.matrix(lesson.features_IND)
        short_ids, short_labels = shortened(
            lesson.input_ids, lesson.labels, self.teacher.image_token, matrix_IMN.shape[1]
        )
        mixed_IMD = matrix_IMN @ lesson.features_IND.to(matrix_IMN.dtype)
        found_AW, _ = self.student.answer(mixed_IMD, short_ids, short_labels, plan=self._plan)
        divergence = functional.kl_div(
            found_AW.log_softmax(-1), lesson.expected_AW.log_softmax(-1), reduction="batchmean", log_target=True
        )
        entropy, column = row_entropy(matrix_IMN), largest_column(matrix_IMN)
        figures = {
            **dict(zip(_PARTS, (divergence.detach(), entropy.detach(), column.detach()), strict=True)),
            "right": share_right(found_AW, lesson.target_A),
            "teacher": right,
        }
        return divergence + self._entropy * entropy + self._column * column, figures


def row_entropy(matrix_IMN: Tensor) -> Tensor:
    """Return the entropy of a row, in nats, averaged over all rows."""
    # What is next to nothing has an infinite slope, and is to have none.
    return torch.special.entr(matrix_IMN.float().clamp(min=_LEAST_SHARE)).sum(-1).mean()


def largest_column(matrix_IMN: Tensor) -> Tensor:
    """Return how much all rows together take from the token that they take most from, averaged over images."""
    return matrix_IMN.float().sum(1).max(-1).values.mean()


def shortened(input_ids: Tensor, labels: Tensor, image_token: int, count: int) -> tuple[Tensor, Tensor]:
    """Return ids and labels of conversations whose images take up ``count`` tokens, padded by labels of none."""
    places_BU = kept_places(input_ids == image_token, torch.arange(count, device=input_ids.device))
    is_padding_BU = places_BU < 0
    places_BU = places_BU.clamp(min=0)
    ids_BU, labels_BU = input_ids.gather(1, places_BU), labels.gather(1, places_BU)
    return ids_BU.masked_fill(is_padding_BU, 0), labels_BU.masked_fill(is_padding_BU, NO_LABEL)


def train_compressor(
    made: Design, material: Material, distillation: Distillation, folder: Path, *, listener: Listener | None = None
) -> Path:
    """Train the compressor of a recipe, the model left as it is.

    Args:
        made: the recipe, checked against its model.
        material: what to learn from.
        distillation: how.
        folder: where checkpoint, log and compressor go.
        listener: told how it goes.

    Returns:
        The compressor's file.

    Raises:
        RecipeError: the recipe has no MetaCompress, or something before it.
        TrainingError: see ``fit``.
    """
    method, arriving = compressor_of(made)
    accelerator = make_accelerator()
    llava = frozen_llava(made, distillation)
    compressor = method.feature_stage(made.model.spec, arriving)
    compressor.matrix.start(torch.Generator().manual_seed(distillation.seed), distillation.start_beta)
    distiller = distiller_of(made, llava, compressor.matrix, distillation)
    fit(
        material.objective_of(distiller),
        material.examples,
        distillation.schedule,
        folder,
        stage=f"metacompress {made.recipe.name}",
        settings=run_settings(made, material, distillation),
        collate=material.collate,
        listener=listener,
    )
    path = folder / FILE_NAME
    if accelerator.is_main_process:
        try:
            save_compressor(path, compressor, method.trained_sizes(arriving))
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"{path} cannot be written ({error}); free some room or choose another folder"
            ) from error
    accelerator.wait_for_everyone()
    return path


def frozen_llava(made: Design, distillation: Distillation) -> LlavaForConditionalGeneration:
    """Return the model of a recipe as teacher and student share it."""
    llava = load_llava(made.model).requires_grad_(False)
    llava.set_attn_implementation(attention_for(make_accelerator().device))
    if distillation.gradient_checkpointing:
        llava.activation_checkpointing_enable()
    return llava


def distiller_of(
    made: Design, llava: LlavaForConditionalGeneration, matrix: nn.Module, distillation: Distillation
) -> Distiller:
    """Return what compares a recipe's model with itself behind ``matrix`` and behind what thins later."""
    teacher, student = CompressedLlava(llava, {}), CompressedLlava(llava, _thinnings_behind(made))
    return Distiller(
        teacher,
        student,
        matrix,
        plan=made.plans[1],
        entropy=distillation.entropy,
        column=distillation.column,
    )


def run_settings(made: Design, material: Material, distillation: Distillation) -> dict[str, Any]:
    """Return everything but the schedule that makes a run what it is."""
    method, arriving = compressor_of(made)
    return {
        "entropy": distillation.entropy,
        "column": distillation.column,
        "start_beta": distillation.start_beta,
        "seed": distillation.seed,
        "model": fingerprint(made.model)[:12],
        "data": material.name,
        **method.trained_sizes(arriving),
        "width": method.width,
        "thinnings": {layer: len(thinning.index) for layer, thinning in _thinnings_behind(made).items()},
    }


def compressor_of(made: Design) -> tuple[MetaCompress, TokenPlan]:
    """Return the recipe's compressor and what arrives there.

    Raises:
        RecipeError: the recipe has no MetaCompress, or something before it.
    """
    names = [method.name for method in made.methods]
    first = made.methods[0] if made.methods else None
    if not isinstance(first, MetaCompress) or not all(isinstance(method, Adsc) for method in made.methods[1:]):
        raise RecipeError(
            f"recipe {made.recipe.name} has the methods {names}; this training is for metacompress, alone or before "
            "adsc"
        )
    return first, made.plans[0]


def _thinnings_behind(made: Design) -> dict[int, ConstantThinning]:
    """Return what a recipe leaves out inside the language model."""
    return {
        layer: ConstantThinning(index=index, positions=method.positions)
        for method, arriving in zip(made.methods, made.plans, strict=False)
        if isinstance(method, Adsc)
        for layer, index in method.indices(made.model.spec, arriving).items()
    }
