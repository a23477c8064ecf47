"""The mini model: how it starts, what learns in which stage, and the checkpoint that comes out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tests.conftest import MINI
from tokexport.dialogues.generate import make_dialogue
from tokexport.errors import TrainingError
from tokexport.exporter.checkpoint import describe_model, open_weights
from tokexport.recipes.schema import ModelTable
from tokexport.training.loop import STATE_FILE
from tokexport.training.mini import (
    LANGUAGE,
    PROJECTOR,
    STAGES,
    TOWER,
    PatchNamer,
    PatchSharpener,
    PixelNormalizer,
    Stage,
    require_grad,
    shortened,
    train_mini,
    write_checkpoint,
)
from tokexport.training.mini_data import CrowdedScenes

SHORT = tuple(
    replace(stage, schedule=replace(stage.schedule, num_steps=2 if stage.name == "see" else 1, batch_size=1))
    for stage in STAGES
)


def train(folder: Path, seed: int = 0) -> Path:
    # Compiling takes longer than these few steps.
    with torch.compiler.set_stance("force_eager"):
        return train_mini(folder, stages=SHORT, seed=seed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a training of a few steps."""
    folder = tmp_path_factory.mktemp("mini")
    assert train(folder) == folder / "checkpoint"
    return folder


@pytest.fixture(scope="module")
def fresh() -> LlavaForConditionalGeneration:
    """Return a mini model with random weights."""
    torch.manual_seed(0)
    llava = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(MINI))
    llava.set_attn_implementation("eager")
    return llava


def learned(folder: Path) -> set[str]:
    """Return the names of what of the model learned in a stage, as the model names it."""
    names = (name for name in load_file(folder / STATE_FILE) if not name.startswith("optimizer."))
    return {name.partition("llava.")[2] for name in names if "llava." in name}


def test_the_checkpoint_is_one_that_an_export_reads(trained: Path):
    model = describe_model(ModelTable(family="llava15", checkpoint=str(trained / "checkpoint")))
    weights = open_weights(model)
    assert {weights.load(name).dtype for name in weights.shapes} == {torch.float16}
    assert all(weights.load(name).isfinite().all() for name in weights.shapes)


def test_the_checkpoint_holds_the_weights_of_the_last_stage(trained: Path):
    weights = open_weights(describe_model(ModelTable(family="llava15", checkpoint=str(trained / "checkpoint"))))
    folder = trained / STAGES[-1].name
    stored = load_file(folder / STATE_FILE).items()
    last = {name.partition("llava.")[2]: tensor for name, tensor in stored if not name.startswith("optimizer.")}
    for name in learned(folder):
        assert torch.equal(weights.load(name), last[name].half()), name


def test_all_but_the_weights_is_as_in_the_bundled_model(trained: Path):
    names = {path.name for path in MINI.iterdir()} - {"model.safetensors"}
    assert {path.name for path in (trained / "checkpoint").iterdir()} == {*names, "model.safetensors"}
    for name in names:
        assert (trained / "checkpoint" / name).read_bytes() == (MINI / name).read_bytes()


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_teaches_its_parts_and_no_others(trained: Path, fresh: LlavaForConditionalGeneration, stage: Stage):
    expected = {name for name, _ in fresh.named_parameters() if name.startswith(stage.trained)}
    assert learned(trained / stage.name) == expected != set()


def test_every_part_but_the_words_is_taught_in_some_stage(fresh: LlavaForConditionalGeneration):
    parts = tuple(part for stage in STAGES for part in stage.trained)
    untaught = [name for name, _ in fresh.named_parameters() if not name.startswith(parts)]
    assert untaught == ["model.language_model.embed_tokens.weight"]


def test_the_vision_tower_learns_with_tasks_that_the_checkpoint_leaves_out(trained: Path):
    heads = {name.partition(".")[0] for name in load_file(trained / "see" / STATE_FILE)} - {"optimizer", "llava"}
    assert heads == {"heads", "norm", "cover_norm", "cover"}


def test_every_stage_logs_its_steps(trained: Path):
    for stage in SHORT:
        (line,) = [json.loads(line) for line in (trained / stage.name / "log.jsonl").read_text().splitlines()]
        assert (line["stage"], line["step"]) == (stage.name, stage.schedule.num_steps)


def test_a_training_that_is_done_gives_the_same_checkpoint_again(trained: Path):
    path = trained / "checkpoint" / "model.safetensors"
    before = path.read_bytes()
    train(trained)
    assert path.read_bytes() == before


def test_a_training_with_another_seed_is_refused(trained: Path):
    with pytest.raises(TrainingError, match=r"belongs to another run \(seed was 0, is 1\)"):
        train(trained, seed=1)


def test_the_checkpoint_is_small_enough_to_ship(trained: Path):
    path = trained / "checkpoint" / "model.safetensors"
    assert path.stat().st_size < 16e6
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_checkpoint_that_cannot_be_written_is_told(fresh: LlavaForConditionalGeneration, tmp_path: Path):
    (tmp_path / "checkpoint").touch()
    with pytest.raises(TrainingError, match=rf"^{tmp_path / 'checkpoint'} cannot be written .*; free some room or "):
        write_checkpoint(fresh, tmp_path / "checkpoint")


def test_pixels_are_what_the_image_processor_makes(own_processor: Any):
    image = make_dialogue(0, "test", 0).image
    assert isinstance(image, Image.Image)
    expected = own_processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, *image.size, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(PixelNormalizer(own_processor)(pixels), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "parts", [(TOWER,), (PROJECTOR,), LANGUAGE, (TOWER, *LANGUAGE), ()], ids=lambda parts: " ".join(parts) or "none"
)
def test_only_the_named_parts_learn(fresh: LlavaForConditionalGeneration, parts: tuple[str, ...]):
    require_grad(fresh, parts)
    learning = {name for name, parameter in fresh.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, _ in fresh.named_parameters() if name.startswith(parts)}
    assert bool(learning) == bool(parts)


@pytest.mark.parametrize(("share", "num_steps"), [(1.0, [10, 4]), (0.5, [5, 2]), (0.01, [1, 1])])
def test_a_share_of_the_steps_is_at_least_one(share: float, num_steps: list[int]):
    stages = [
        replace(stage, schedule=replace(stage.schedule, num_steps=steps))
        for stage, steps in zip(STAGES, (10, 4), strict=False)
    ]
    assert [stage.schedule.num_steps for stage in shortened(stages, share)] == num_steps


@pytest.mark.parametrize("is_right", [True, False])
def test_the_middle_of_an_object_is_named_by_words_that_no_text_has(
    own_processor: Any, fresh: LlavaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, is_right: bool
):
    namer = PatchNamer(fresh, PixelNormalizer(own_processor), own_processor.tokenizer)
    ids = namer.get_buffer("centre")
    assert int(ids.min()) >= len(own_processor.tokenizer)
    example = {name: value[None] for name, value in CrowdedScenes(0, 1)[0].items()}
    table: Any = fresh.get_input_embeddings()
    said = example["centre"] if is_right else 1 - example["centre"]
    monkeypatch.setattr(fresh.model.multi_modal_projector, "forward", lambda _features: table.weight[ids][said])
    _, figures = namer(**example)
    assert figures["centre"] == (1 if is_right else 0)


def test_sharpening_starts_where_nothing_has_moved(own_processor: Any, fresh: LlavaForConditionalGeneration):
    sharpener = PatchSharpener(PatchNamer(fresh, PixelNormalizer(own_processor), own_processor.tokenizer))
    example = {name: value[None] for name, value in CrowdedScenes(0, 1, is_styled=True)[0].items()}
    require_grad(fresh, (TOWER, PROJECTOR))
    with torch.no_grad():
        start, figures = sharpener(**example)
        assert figures["moved"] == 0
        fresh.model.multi_modal_projector.linear_2.weight.add_(0.05)
        end, figures = sharpener(**example)
        fresh.model.multi_modal_projector.linear_2.weight.sub_(0.05)
    assert figures["moved"] > 0
    assert start != end
    assert not any(parameter.requires_grad for parameter in sharpener.before.parameters())


def test_a_training_begins_with_a_stage_on_the_weights_that_ship(tmp_path: Path):
    with torch.compiler.set_stance("force_eager"):
        checkpoint = train_mini(tmp_path, stages=SHORT, first=SHORT[-1].name)
    assert {path.name for path in tmp_path.iterdir()} == {SHORT[-1].name, "checkpoint", "curve.svg"}
    made, shipped = load_file(checkpoint / "model.safetensors"), load_file(MINI / "model.safetensors")
    changed = {name for name, tensor in made.items() if not torch.equal(tensor, shipped[name])}
    assert changed
    assert all("language_model" not in name for name in changed)


def test_a_training_that_begins_with_an_unknown_stage_is_refused(tmp_path: Path):
    with pytest.raises(TrainingError, match=r"^there is no stage 'sharpn'; did you mean 'sharpen'\?; stages are see, "):
        train_mini(tmp_path, first="sharpn")
