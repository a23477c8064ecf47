"""ADSC tuning: its curriculum, and an adapter that an export merges."""

import dataclasses
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from tests.conftest import IMAGE_SIZE, NUM_VISION_TOKENS, adsc, recipe_for, save_adapter, save_checkpoint, tiny_config
from tests.training.conftest import write_llava_data
from tokexport.engines.backend import SessionOptions
from tokexport.engines.generate import IMAGE, Conversation
from tokexport.engines.torch_session import TorchSession
from tokexport.errors import CheckpointError, InputError, RecipeError, TrainingError
from tokexport.exporter.checkpoint import describe_model, open_weights
from tokexport.exporter.export import Design, design
from tokexport.exporter.methods.adsc import Adsc
from tokexport.recipes.load import load_recipe, override
from tokexport.training.adsc import Curriculum, Tuning, curriculum, eased, tune
from tokexport.training.compressed import NO_LABEL, CompressedLlava
from tokexport.training.frozen import load_llava, without_adapter
from tokexport.training.loop import LOG_FILE, Listener, Schedule
from tokexport.training.tuning_data import Material, llava_material, made_material

QUERY = "model.language_model.layers.0.self_attn.q_proj.weight"


def tuning(**changes: Any) -> Tuning:
    """Return two steps of two conversations."""
    of_schedule = {field.name for field in dataclasses.fields(Schedule)} & changes.keys()
    chosen = {"num_steps": 2, "batch_size": 2, "learning_rate": 1e-2, **{key: changes.pop(key) for key in of_schedule}}
    return Tuning(schedule=Schedule(**chosen), **{"rank": 4, **changes})


@pytest.fixture(scope="module")
def made(checkpoint: Path) -> Design:
    return design(recipe_for(checkpoint, adsc()))


@pytest.fixture(scope="module")
def material(made: Design, tmp_path_factory: pytest.TempPathFactory) -> Material:
    return llava_material(made, *write_llava_data(tmp_path_factory.mktemp("data")), num=100)


@pytest.fixture(scope="module")
def tuned(made: Design, material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tuning of two steps."""
    folder = tmp_path_factory.mktemp("tuned")
    assert tune(made, material, tuning(), folder) == folder / "adapter"
    return folder


def kept(made: Design, order: Curriculum) -> list[list[int]]:
    """Return how many tokens stay behind each bottleneck, stage by stage."""
    return [[len(thinning.index) for thinning in stage.values()] for stage in curriculum(made, order)]


def method_of(made: Design) -> Adsc:
    (method,) = made.methods
    assert isinstance(method, Adsc)
    return method


def test_mild_first_narrows_to_the_recipe(made: Design):
    # 16 (8/16)^0.25 = 13.5, 16 (4/16)^0.25 = 11.3 and so on.
    assert kept(made, "mild-first") == [[13, 11], [11, 8], [10, 6], [8, 4]]


def test_strong_first_widens_to_the_recipe(made: Design):
    # 16 (8/16)^1.6 = 5.3, 16 (4/16)^1.6 = 1.7, of which 2 are kept, and so on.
    assert kept(made, "strong-first") == [[5, 2], [6, 2], [7, 3], [8, 4]]


def test_no_curriculum_is_the_recipe_from_the_start(made: Design):
    assert kept(made, "none") == [[8, 4]]


SHIPPED = ["mini_adsc", "mini_adsc_192", "mini_adsc_128", "mini_adsc_64", "llava15_adsc", "llava15_13b_adsc"]


@pytest.mark.parametrize("pattern", ["stride", "grid"])
@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize(("order", "sign"), [("mild-first", -1), ("strong-first", 1)])
def test_every_bottleneck_moves_one_way_and_ends_at_the_recipe(name: str, pattern: str, order: Curriculum, sign: int):
    made = design(override(load_recipe(name, [f"compress.0.pattern={pattern}"]), weights="random"))
    stages = kept(made, order)
    assert stages[-1] == [made.plan.per_layer[drop.layer] for drop in method_of(made).drops]
    for before, after in pairwise(stages):
        assert all(sign * (b - a) > 0 for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("pattern", ["stride", "grid"])
@pytest.mark.parametrize("order", ["mild-first", "strong-first", "none"])
def test_the_last_stage_is_what_an_export_keeps(checkpoint: Path, order: Curriculum, pattern: str):
    made = design(recipe_for(checkpoint, adsc(pattern=pattern, phase=0.5, positions="renumber")))
    decoder: Any = made.modules()["decoder_model_merged"]
    exported = {int(layer): gather for layer, gather in decoder.bottlenecks.items()}
    last = curriculum(made, order)[-1]
    assert last.keys() == exported.keys()
    for layer, thinning in last.items():
        assert list(thinning.index) == exported[layer].index_M.tolist()
        assert thinning.positions == exported[layer].positions == "renumber"


@pytest.mark.parametrize("drops", [[(0, 3), (2, 2)], [(0, 4), (1, 3), (3, 2)]], ids=["two", "three"])
def test_the_strongest_stage_leaves_every_bottleneck_a_token_to_drop(checkpoint: Path, drops: list[tuple[int, int]]):
    tables = [{"layer": layer, "keep": keep} for layer, keep in drops]
    stages = kept(design(recipe_for(checkpoint, adsc(drops=tables))), "strong-first")
    for stage in stages:
        assert all(before > after >= 2 for before, after in pairwise([NUM_VISION_TOKENS, *stage]))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.2, 1.4, 1.6])
@pytest.mark.parametrize("name", SHIPPED)
def test_eased_grids_are_grids(name: str, share: float):
    made = design(override(load_recipe(name, ["compress.0.pattern=grid"]), weights="random"))
    side = made.model.spec.vision_grid[1]
    taken = list(range(made.model.spec.num_vision_tokens))
    method = eased(made, method_of(made), share)
    for index in method.indices(made.model.spec, made.plans[0]).values():
        taken = [taken[i] for i in index]
        rows, columns = {place // side for place in taken}, {place % side for place in taken}
        assert {(place // side, place % side) for place in taken} == {(r, c) for r in rows for c in columns}
        assert max(len(rows), len(columns)) <= 2 * min(len(rows), len(columns))


@pytest.mark.parametrize(
    ("compress", "methods"),
    [
        ([], "[]"),
        ([{"method": "sample", "keep": 8}], "['sample']"),
        (
            [{"method": "sample", "keep": 8}, {"method": "adsc", "drops": [{"layer": 2, "keep": 4}]}],
            "['sample', 'adsc']",
        ),
    ],
    ids=["none", "another", "two"],
)
def test_a_recipe_without_adsc_alone_is_refused(checkpoint: Path, compress: list[dict[str, object]], methods: str):
    with pytest.raises(RecipeError) as caught:
        curriculum(design(recipe_for(checkpoint, *compress)), "mild-first")
    assert str(caught.value) == (
        f"recipe tiny has the methods {methods}; tuning is for ADSC alone, e.g. recipe mini_adsc"
    )


def merged(checkpoint: Path, adapter: Path) -> torch.Tensor:
    """Return a weight that an export of the tiny model would write."""
    return open_weights(describe_model(override(recipe_for(checkpoint), adapter=str(adapter)).model)).load(QUERY)


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_an_adapter_is_made_that_an_export_merges(tuned: Path, checkpoint: Path):
    before = open_weights(describe_model(recipe_for(checkpoint).model)).load(QUERY)
    assert (merged(checkpoint, tuned / "adapter") - before).abs().max() > 1e-4


def test_all_of_an_adapter_has_learned(tuned: Path):
    # B starts at zero.
    assert {name.rpartition(".lora_")[2] for name in adapter_of(tuned)} == {"A.weight", "B.weight"}
    assert all(tensor.abs().max() > 0 for tensor in adapter_of(tuned).values())


def test_what_was_tuned_is_what_an_export_runs(tuned: Path, made: Design, llava: LlavaForConditionalGeneration):
    adapted: Any = PeftModel.from_pretrained(llava, tuned / "adapter")
    model = CompressedLlava(adapted.base_model.model, curriculum(made, "none")[-1])
    pixels, before, after = torch.ones(1, 3, IMAGE_SIZE, IMAGE_SIZE), [1, 30, 31], [32, 33, 34]
    ids_1T = torch.tensor([[*before, *[4] * NUM_VISION_TOKENS, *after, 40]])
    labels_1T = torch.full_like(ids_1T, NO_LABEL)
    labels_1T[0, -1] = 40
    with torch.no_grad():
        loss, _ = model(pixels, ids_1T, labels_1T)

    exported = design(override(made.recipe, adapter=str(tuned / "adapter")))
    for design_, is_same in ((exported, True), (made, False)):
        session = TorchSession(design_, SessionOptions(max_text_tokens=64, max_images=1, threads=1))
        features = session.encode_images(pixels.numpy())
        logits_W = torch.from_numpy(Conversation(session).feed([*before, IMAGE, *after], [features])[-1])
        assert (abs(-logits_W.log_softmax(-1)[40] - loss) < 1e-3) == is_same


def test_every_linear_layer_of_the_language_model_is_tuned_and_no_other(tuned: Path):
    modules = {name.partition(".lora_")[0] for name in adapter_of(tuned)}
    parts = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert modules == {
        f"base_model.model.model.language_model.layers.{layer}.{part}" for layer in range(4) for part in parts
    }


def test_the_adapter_names_the_checkpoint_that_it_is_for(tuned: Path, checkpoint: Path):
    table = json.loads((tuned / "adapter" / "adapter_config.json").read_text())
    assert (table["base_model_name_or_path"], table["r"], table["lora_alpha"]) == (str(checkpoint), 4, 8)


def test_the_log_tells_how_it_went(tuned: Path):
    (line,) = [json.loads(line) for line in (tuned / LOG_FILE).read_text().splitlines()]
    assert (line["stage"], line["step"]) == ("adsc tiny", 2)
    assert np.isfinite(line["loss"])
    assert 0 <= line["right"] <= 1


def test_tuning_in_two_sittings_is_tuning_in_one(made: Design, material: Material, tmp_path: Path):
    def stop(done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    chosen = tuning(num_steps=4, batch_size=1, save_minutes=0.0)
    with pytest.raises(KeyboardInterrupt):
        tune(made, material, chosen, tmp_path / "stopped", listener=Listener(tick=stop))
    for folder in (tmp_path / "stopped", tmp_path / "through"):
        tune(made, material, chosen, folder)
    expected, found = adapter_of(tmp_path / "through"), adapter_of(tmp_path / "stopped")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_checkpoint_of_another_model_is_refused(tuned: Path, material: Material, tmp_path: Path):
    other = design(recipe_for(save_checkpoint(tmp_path / "other", tiny_config(), seed=1), adsc()))
    with pytest.raises(TrainingError, match=r"belongs to another run \(model was '\w{12}', is '\w{12}'\)"):
        tune(other, material, tuning(), tuned)


def test_a_checkpoint_of_other_data_is_refused(tuned: Path, made: Design, tmp_path: Path):
    other = llava_material(made, *write_llava_data(tmp_path, 1), num=100)
    with pytest.raises(TrainingError, match=r"belongs to another run \(data was 'data.json \w{12}', is 'data.json "):
        tune(made, other, tuning(), tuned)


def test_activations_computed_twice_and_a_batch_in_parts_teach_nearly_the_same(
    tuned: Path, made: Design, material: Material, tmp_path: Path
):
    tune(made, material, tuning(gradient_checkpointing=True, accumulate=2), tmp_path)
    found, expected = (
        torch.cat([tensor.flatten() for name, tensor in adapter_of(folder).items() if "lora_B" in name])
        for folder in (tmp_path, tuned)
    )
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.8


def test_an_adapter_that_cannot_be_written_is_told(tuned: Path, made: Design, material: Material, tmp_path: Path):
    folder = shutil.copytree(tuned, tmp_path / "copy")
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    (folder / "adapter" / "adapter_model.safetensors").mkdir()
    with pytest.raises(TrainingError, match=rf"^{folder / 'adapter'} cannot be written .*; free some room or choose "):
        tune(made, material, tuning(), folder)


def test_the_model_is_loaded_without_the_recipes_adapter(checkpoint: Path, tmp_path: Path):
    adapter = save_adapter(tmp_path / "adapter")
    made = design(override(recipe_for(checkpoint, adsc()), adapter=str(adapter)))
    plain = LlavaForConditionalGeneration.from_pretrained(checkpoint).state_dict()
    assert torch.equal(load_llava(without_adapter(made.model)).state_dict()[QUERY].float(), plain[QUERY])


def test_a_model_with_random_weights_is_that_of_the_recipe(checkpoint: Path, tmp_path: Path):
    adapter = save_adapter(tmp_path / "adapter")
    recipe = override(recipe_for(checkpoint, adsc()), weights="random", adapter=str(adapter))
    expected = open_weights(describe_model(override(recipe_for(checkpoint), weights="random").model))
    assert torch.equal(load_llava(without_adapter(design(recipe).model)).state_dict()[QUERY], expected.load(QUERY))


def test_loading_draws_nothing_for_people(made: Design, capfd: pytest.CaptureFixture[str]):
    load_llava(without_adapter(made.model))
    assert capfd.readouterr() == ("", "")


def test_a_checkpoint_that_does_not_fit_its_configuration_is_refused(tmp_path: Path):
    folder = save_checkpoint(tmp_path / "tiny", tiny_config())
    made = design(recipe_for(folder, adsc()))
    table = json.loads((folder / "config.json").read_text())
    table["text_config"]["intermediate_size"] = 128
    (folder / "config.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=r"do not fit its config\.json"):
        load_llava(design(made.recipe).model)


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path):
    folder = save_checkpoint(tmp_path / "tiny", tiny_config())
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=f"^{folder} has no usable tokenizer and image processor"):
        llava_material(design(recipe_for(folder, adsc())), *write_llava_data(tmp_path, 1), num=1)


def test_made_scenes_are_for_images_of_their_size(made: Design):
    with pytest.raises(InputError) as caught:
        made_material(made, num=1)
    assert str(caught.value) == (
        "made scenes have 336 x 336 pixels, and the model takes 56; give conversations with --data"
    )


def test_a_tuning_goes_on_from_an_adapter(made: Design, material: Material, tuned: Path, tmp_path: Path):
    """Steps so small that nothing moves leave the adapter as it was."""
    tune(made, material, tuning(num_steps=1, learning_rate=1e-30, start=str(tuned / "adapter")), tmp_path)
    expected, found = adapter_of(tuned), adapter_of(tmp_path)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_tuning_does_not_go_on_where_another_adapter_was_its_start(
    made: Design, material: Material, tuned: Path, tmp_path: Path
):
    tune(made, material, tuning(num_steps=1, start=str(tuned / "adapter")), tmp_path)
    with pytest.raises(TrainingError, match=r"belongs to another run \(start was '[0-9a-f]{12}', is None\)"):
        tune(made, material, tuning(num_steps=1), tmp_path)


def test_a_start_of_lower_rank_is_the_same_in_more_room(made: Design, material: Material, tuned: Path, tmp_path: Path):
    tune(made, material, tuning(rank=6, num_steps=1, learning_rate=1e-30, start=str(tuned / "adapter")), tmp_path)
    expected, found = adapter_of(tuned), adapter_of(tmp_path)
    factors = [name.removesuffix(".lora_A.weight") for name in expected if name.endswith(".lora_A.weight")]
    assert factors
    for name in factors:
        assert found[f"{name}.lora_A.weight"].shape[0] == 6
        torch.testing.assert_close(
            found[f"{name}.lora_B.weight"] @ found[f"{name}.lora_A.weight"],
            expected[f"{name}.lora_B.weight"] @ expected[f"{name}.lora_A.weight"],
        )
        assert expected[f"{name}.lora_B.weight"].any()


def test_an_adapter_of_higher_rank_is_no_start(made: Design, material: Material, tuned: Path, tmp_path: Path):
    with pytest.raises(
        TrainingError, match=r"has rank and alpha \(4, 8\) on \d+ matrices, expected at most \(2, 4\) on all of"
    ):
        tune(made, material, tuning(rank=2, start=str(tuned / "adapter")), tmp_path)


def test_an_adapter_that_is_not_there_is_no_start(made: Design, material: Material, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"^there is no adapter directory nowhere; give --start a"):
        tune(made, material, tuning(start="nowhere"), tmp_path)
