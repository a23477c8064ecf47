"""Tuning behind the relevance compressor: it reads what an export reads, keeps what an export keeps, and learns."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import LlavaForConditionalGeneration

from tests.conftest import IMAGE_SIZE, NUM_VISION_TOKENS, adsc, override, recipe_for
from tests.training.conftest import write_llava_data
from tests.training.test_compressed import pixels, with_image, words
from tests.training.test_roll_out import two_conversations
from tokexport.engines.backend import SessionOptions
from tokexport.engines.generate import IMAGE, Conversation
from tokexport.engines.torch_session import TorchSession
from tokexport.errors import RecipeError, TrainingError
from tokexport.exporter.compressor_file import save_compressor
from tokexport.exporter.export import Design, design
from tokexport.exporter.methods.relevance import Relevance
from tokexport.exporter.modules.relevance import RelevanceNet
from tokexport.training.compressed import NO_LABEL, Arriving, CompressedLlava
from tokexport.training.loop import LOG_FILE, Schedule
from tokexport.training.lora import LoraTuning
from tokexport.training.relevance_adapter import RelevantThinning, asked_attention, tune_behind_relevance
from tokexport.training.roll_out import RollOut
from tokexport.training.tuning_data import Material, llava_material

RELEVANCE = {"method": "relevance", "keep": 6, "channels": [4, 8], "kernel": 3}
TUNING = LoraTuning(schedule=Schedule(num_steps=3, batch_size=3, learning_rate=1e-2), rank=4)


@pytest.fixture(scope="module")
def relevance(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Return the method with a network of its own."""
    method = Relevance(keep=6, channels=(4, 8), kernel=3, weights="untrained")
    network = method.network()
    network.start(torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("network") / "compressor.safetensors"
    save_compressor(path, network, method.trained_sizes())
    return {**RELEVANCE, "weights": str(path)}


@pytest.fixture(scope="module")
def made(checkpoint: Path, relevance: dict[str, object]) -> Design:
    return design(recipe_for(checkpoint, relevance))


@pytest.fixture(scope="module")
def material(made: Design, tmp_path_factory: pytest.TempPathFactory) -> Material:
    return llava_material(made, *write_llava_data(tmp_path_factory.mktemp("data")), num=100)


def network_of(made: Design) -> RelevanceNet:
    (method,) = made.methods
    assert isinstance(method, Relevance)
    network = method.network()
    network.load_state_dict(dict(method.learned(made.model.spec, made.plans[0])))
    return network


class Watching(RelevantThinning):
    """Keeps what it was asked with."""

    arriving: Arriving
    index_IM: torch.Tensor

    def choose(self, arriving: Arriving) -> torch.Tensor:
        self.arriving, self.index_IM = arriving, super().choose(arriving)
        return self.index_IM


def test_it_chooses_by_the_attention_that_labels_are_learned_from(llava: LlavaForConditionalGeneration, made: Design):
    batch = two_conversations()
    watching = Watching(network_of(made), 6, "keep")
    with torch.inference_mode():
        CompressedLlava(llava, {0: watching})(**batch)
    expected = RollOut(llava)(**batch)["attention"]
    assert_close(asked_attention(watching.arriving), expected)


def test_rows_ask_each_for_themselves(llava: LlavaForConditionalGeneration, made: Design):
    # One row without an image, and images and answers at other places.
    rows = [
        with_image(words(3, 1), words(12, 2)),
        words(12 + 3 + NUM_VISION_TOKENS, 3),
        with_image(words(9, 4), words(6, 5)),
    ]
    ids = torch.stack([torch.as_tensor(row) for row in rows])
    labels = torch.full_like(ids, NO_LABEL)
    for row, first in enumerate((24, 9, 28)):
        labels[row, first : first + 2] = ids[row, first : first + 2]
    watching = Watching(network_of(made), 6, "keep")
    model = CompressedLlava(llava, {0: watching})
    with torch.inference_mode():
        model(pixels(2), ids, labels)
        together = watching.index_IM
        assert asked_attention(watching.arriving).sum(1).max() < 1
        for image, row in enumerate((0, 2)):
            model(pixels(2)[image : image + 1], ids[row : row + 1], labels[row : row + 1])
            assert_close(watching.index_IM, together[image : image + 1])


def test_a_conversation_without_an_answer_asks_with_all_that_follows(
    llava: LlavaForConditionalGeneration, made: Design
):
    ids = with_image(words(3, 1), words(5, 2)).unsqueeze(0)
    watching = Watching(network_of(made), 6, "keep")
    attention: list[torch.Tensor] = []
    for first in (None, 3 + NUM_VISION_TOKENS + 5):
        # A last token to be said is said by all five.
        labels = torch.full_like(ids, NO_LABEL)
        tokens = ids
        if first is not None:
            tokens = torch.cat((ids, ids[:, -1:]), 1)
            labels = torch.full_like(tokens, NO_LABEL)
            labels[0, first] = tokens[0, first]
        with torch.inference_mode():
            model = CompressedLlava(llava, {0: watching})
            model.answer(model.image_features(pixels(1)), tokens, labels)
            attention.append(asked_attention(watching.arriving))
    assert_close(attention[0], attention[1])


def test_scores_are_in_float32_and_gradients_reach_the_layer_that_is_read(
    llava: LlavaForConditionalGeneration, made: Design
):
    batch = two_conversations()
    watching = Watching(network_of(made), 6, "keep")
    model = CompressedLlava(llava, {0: watching})
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(**batch)
        assert asked_attention(watching.arriving).dtype == torch.float32
    loss.backward()
    first: Any = llava.model.language_model.layers[0]
    for project in (first.self_attn.q_proj, first.self_attn.k_proj):
        assert project.weight.grad.abs().max() > 0


def test_a_batch_without_images_keeps_nothing(llava: LlavaForConditionalGeneration, made: Design):
    watching = Watching(network_of(made), 6, "keep")
    ids_1T = torch.tensor([[1, 30, 31, 32]])
    loss, _ = CompressedLlava(llava, {0: watching})(torch.zeros(0, 3, IMAGE_SIZE, IMAGE_SIZE), ids_1T, ids_1T)
    assert watching.index_IM.shape == (0, 6)
    assert loss.isfinite()


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_what_was_tuned_is_what_an_export_runs(
    checkpoint: Path,
    llava: LlavaForConditionalGeneration,
    relevance: dict[str, object],
    material: Material,
    tmp_path: Path,
    positions: Any,
):
    made = design(recipe_for(checkpoint, {**relevance, "positions": positions}))
    adapter = tune_behind_relevance(made, material, TUNING, tmp_path)
    adapted: Any = PeftModel.from_pretrained(llava, adapter)
    watching = Watching(network_of(made), 6, positions)
    model = CompressedLlava(adapted.base_model.model, {0: watching})
    pixels_13PP = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    before, after = [1, 30, 31], [32, 33, 34]
    ids_1T = torch.tensor([[*before, *[4] * NUM_VISION_TOKENS, *after, 40]])
    labels_1T = torch.full_like(ids_1T, NO_LABEL)
    labels_1T[0, -1] = 40
    with torch.no_grad():
        loss, _ = model(pixels_13PP, ids_1T, labels_1T)

    exported = design(override(made.recipe, adapter=str(adapter)))
    for design_, is_same in ((exported, True), (made, False)):
        session = TorchSession(design_, SessionOptions(max_text_tokens=64, max_images=1, threads=1))
        features = session.encode_images(pixels_13PP.numpy())
        logits_W = torch.from_numpy(Conversation(session).feed([*before, IMAGE, *after], [features])[-1])
        assert (abs(-logits_W.log_softmax(-1)[40] - loss) < 1e-3) == is_same
        if is_same:
            assert session.choices[0].kept_BM.tolist() == watching.index_IM.tolist()


def test_another_recipe_is_another_run(
    made: Design, material: Material, checkpoint: Path, relevance: dict[str, object], tmp_path: Path
):
    tune_behind_relevance(made, material, TUNING, tmp_path)
    other = design(recipe_for(checkpoint, {**relevance, "keep": 5}))
    with pytest.raises(TrainingError, match=r"belongs to another run \(keep was 6, is 5\)"):
        tune_behind_relevance(other, material, TUNING, tmp_path)


def test_a_recipe_of_another_method_is_refused(checkpoint: Path, material: Material, tmp_path: Path):
    with pytest.raises(RecipeError, match=r"has the methods \['adsc'\]; this training is for relevance alone"):
        tune_behind_relevance(design(recipe_for(checkpoint, adsc())), material, TUNING, tmp_path)


def test_an_untrained_network_is_refused(checkpoint: Path, material: Material, tmp_path: Path):
    made = design(recipe_for(checkpoint, {**RELEVANCE, "weights": "untrained"}))
    with pytest.raises(RecipeError, match="has an untrained network, which keeps tokens at random; train one with"):
        tune_behind_relevance(made, material, TUNING, tmp_path)
    assert not list(tmp_path.iterdir())


def test_longer_training_fits_better(made: Design, material: Material, tmp_path: Path):
    schedule = replace(TUNING.schedule, num_steps=20, log_every=1)
    tune_behind_relevance(made, material, replace(TUNING, schedule=schedule), tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
