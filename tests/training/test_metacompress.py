"""Training of MetaCompress: what is compared, what learns, and what comes out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import LlavaForConditionalGeneration

from tests.conftest import NUM_VISION_TOKENS, recipe_for
from tests.training.conftest import write_llava_data
from tests.training.test_compressed import IMAGE_TOKEN, labels_behind, pixels, with_image, words
from tokexport.errors import RecipeError, TrainingError
from tokexport.exporter.export import Design, design
from tokexport.exporter.modules.token_mixing import MetaCompressor
from tokexport.exporter.windows import Windows
from tokexport.training.compressed import NO_LABEL, CompressedLlava, ConstantThinning
from tokexport.training.loop import Schedule
from tokexport.training.metacompress import (
    Distillation,
    Distiller,
    largest_column,
    row_entropy,
    shortened,
    train_compressor,
)
from tokexport.training.tuning_data import Material, llava_material

WINDOWS = Windows((4, 4), (2, 2), (2, 2))
METACOMPRESS = {"method": "metacompress", "keep": 4, "width": 8, "weights": "untrained"}
ADSC = {"method": "adsc", "drops": [{"layer": 2, "keep": 2}]}
SCHEDULE = Schedule(num_steps=4, batch_size=2, learning_rate=1e-2, max_grad_norm=1e-2, log_every=1)


def compressor(score_width: int = 8) -> MetaCompressor:
    made = MetaCompressor(64, score_width, WINDOWS)
    made.matrix.start(torch.Generator().manual_seed(0))
    return made


def distiller(
    llava: LlavaForConditionalGeneration, thinnings: dict[int, ConstantThinning] | None = None, **weights: float
) -> Distiller:
    llava.requires_grad_(False)
    return Distiller(
        CompressedLlava(llava, {}), CompressedLlava(llava, thinnings or {}), compressor().matrix, **weights
    )


def gradient(model: Distiller) -> Tensor:
    found = model.matrix.get_parameter("key_DC").grad
    assert found is not None
    return found


@pytest.fixture(scope="module")
def material(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Material:
    made = design(recipe_for(checkpoint, METACOMPRESS))
    return llava_material(made, *write_llava_data(tmp_path_factory.mktemp("data")), num=100)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    ids_BT = torch.stack([with_image(words(3, 1), words(9, 2)), with_image(words(7, 3), words(5, 4))])
    labels_BT = torch.stack([labels_behind(ids_T, 24) for ids_T in ids_BT])
    return {"pixel_values": pixels(2), "input_ids": ids_BT, "labels": labels_BT}


def test_the_divergence_is_that_of_answers_from_all_and_from_mixed_features(
    llava: LlavaForConditionalGeneration, batch: dict[str, Tensor]
):
    model = distiller(llava)
    loss, figures = model(**batch)
    features = model.teacher.image_features(batch["pixel_values"])
    mixed = model.matrix(features) @ features
    logits = []
    for seen in (features, mixed):
        embedded = torch.stack(
            [
                torch.cat(
                    (
                        llava.get_input_embeddings()(ids[: int((ids == IMAGE_TOKEN).int().argmax())]),
                        seen[row],
                        llava.get_input_embeddings()(
                            ids[int((ids == IMAGE_TOKEN).int().argmax()) + NUM_VISION_TOKENS :]
                        ),
                    )
                )
                for row, ids in enumerate(batch["input_ids"])
            ]
        )
        with torch.no_grad():
            found: Any = llava(inputs_embeds=embedded)
        logits.append(found.logits[:, -5:-1].flatten(0, 1).log_softmax(-1))
    expected = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean()
    assert_close(figures["divergence"], expected, rtol=1e-4, atol=1e-5)
    matrix = model.matrix(features)
    assert_close(loss, expected + row_entropy(matrix) + largest_column(matrix), rtol=1e-4, atol=1e-4)


def test_nothing_but_the_compressor_learns(llava: LlavaForConditionalGeneration, batch: dict[str, Tensor]):
    model = distiller(llava, {2: ConstantThinning(index=(0, 3))})
    model(**batch)[0].backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {f"matrix.{name}" for name in ("query_DC", "key_DC", "beta_C")}
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.grad is not None)


def test_the_divergence_alone_reaches_the_compressor(llava: LlavaForConditionalGeneration, batch: dict[str, Tensor]):
    model = distiller(llava, entropy=0, column=0)
    loss, figures = model(**batch)
    assert loss == figures["divergence"]
    loss.backward()
    assert gradient(model).abs().sum() > 0


def test_a_batch_without_images_teaches_nothing(llava: LlavaForConditionalGeneration):
    ids_BT = torch.tensor([words(9, 1), words(9, 2)])
    model = distiller(llava)
    loss, figures = model(pixels(0), ids_BT, labels_behind(ids_BT, 5))
    loss.backward()
    assert loss == 0
    assert gradient(model).abs().sum() == 0
    assert figures["right"] == figures["teacher"]


def test_entropy_and_column_of_known_matrices():
    choosing = torch.eye(4)[:3].unsqueeze(0)
    spread = torch.full((1, 3, 4), 0.25)
    same = torch.zeros(1, 3, 4)
    same[:, :, 1] = 1
    assert [row_entropy(matrix).item() for matrix in (choosing, spread, same)] == pytest.approx(
        [0, 1.3863, 0], abs=1e-4
    )
    assert [largest_column(matrix).item() for matrix in (choosing, spread, same)] == [1, 0.75, 3]


def test_conversations_are_shortened_by_their_image_tokens():
    ids = torch.tensor([[7, IMAGE_TOKEN, IMAGE_TOKEN, IMAGE_TOKEN, 8, 9], [5, 6, 7, 8, 9, 10]])
    labels = torch.where(ids > 8, ids, NO_LABEL)
    short_ids, short_labels = shortened(ids, labels, IMAGE_TOKEN, 2)
    assert short_ids.tolist() == [[7, IMAGE_TOKEN, IMAGE_TOKEN, 8, 9, 0], [5, 6, 7, 8, 9, 10]]
    assert short_labels[0].tolist() == [NO_LABEL] * 4 + [9, NO_LABEL]
    assert short_labels[1].tolist() == labels[1].tolist()


def trained(made: Design, material: Material, folder: Path, **changes: Any) -> Path:
    return train_compressor(made, material, replace(Distillation(schedule=SCHEDULE), **changes), folder)


@pytest.mark.parametrize("behind", [[], [ADSC]], ids=["alone", "before adsc"])
def test_a_trained_compressor_goes_into_the_graph(
    checkpoint: Path, material: Material, tmp_path: Path, behind: list[Any]
):
    made = design(recipe_for(checkpoint, METACOMPRESS, *behind))
    path = trained(made, material, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "divergence", "entropy", "column", "right", "teacher"} <= lines[0].keys()
    later = design(recipe_for(checkpoint, {**METACOMPRESS, "weights": str(path)}, *behind))
    before, after = (which.open_weights().load("stages.metacompress.matrix.key_DC") for which in (made, later))
    assert (before - after).abs().max() > 1e-4
    assert made.fingerprint() != later.fingerprint()


def test_a_training_that_is_done_gives_the_same_compressor_again(checkpoint: Path, material: Material, tmp_path: Path):
    made = design(recipe_for(checkpoint, METACOMPRESS))
    path = trained(made, material, tmp_path)
    before = load_file(path)
    path.unlink()
    after = load_file(trained(made, material, tmp_path))
    assert all(torch.equal(before[name], after[name]) for name in before.keys() | after.keys())
    with pytest.raises(TrainingError, match=r"belongs to another run \(entropy was 1.0, is 0.5\)"):
        trained(made, material, tmp_path, entropy=0.5)


@pytest.mark.parametrize("steps", [[], [ADSC], [{"method": "pool", "keep": 9}, METACOMPRESS]])
def test_a_recipe_without_a_compressor_at_its_start_is_refused(
    checkpoint: Path, material: Material, tmp_path: Path, steps: list[Any]
):
    names = [step["method"] for step in steps]
    with pytest.raises(RecipeError) as caught:
        trained(design(recipe_for(checkpoint, *steps)), material, tmp_path)
    assert str(caught.value) == (
        f"recipe tiny has the methods {names}; this training is for metacompress, alone or before adsc"
    )


@pytest.mark.parametrize("name", ["entropy", "column"])
def test_a_weight_below_zero_is_refused(name: str):
    with pytest.raises(TrainingError, match=f"{name} = -1 must be at least 0"):
        Distillation(schedule=SCHEDULE, **{name: -1})
