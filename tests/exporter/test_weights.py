"""Checkpoints of every layout give the same weights; those that do not fit are refused."""

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tests.conftest import recipe_for, save_checkpoint, tiny_config
from tokexport.errors import CheckpointError, RecipeError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.checkpoint import describe_model, fingerprint, open_weights
from tokexport.exporter.export import design, planned, weight_names
from tokexport.exporter.trace import bind_weights, trace
from tokexport.exporter.weights import RandomWeights, TiedWeights, Weights, check_shapes, converted
from tokexport.recipes.load import override
from tokexport.recipes.schema import ModelTable, Recipe

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
NORM = "model.language_model.norm.weight"
QUERY = "model.language_model.layers.0.self_attn.q_proj.weight"

# How the tensors of a checkpoint were called at one time or another, from what transformers calls them today.
LAYOUTS: dict[str, list[tuple[str, str]]] = {
    "today": [],
    "vision_model inside the tower": [(r"^model\.vision_tower\.", "model.vision_tower.vision_model.")],
    "language_model.model": [
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    ],
    "language_model.model without vision_model": [
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.", ""),
    ],
    "head inside model.language_model": [(r"^lm_head\.", "model.language_model.lm_head.")],
}


def weights_of(checkpoint: Path) -> Weights:
    return open_weights(describe_model(recipe_for(checkpoint).model))


def reference(checkpoint: Path) -> Mapping[str, Tensor]:
    return LlavaForConditionalGeneration.from_pretrained(checkpoint).state_dict()


@pytest.fixture(scope="module")
def truth(checkpoint: Path) -> Mapping[str, Tensor]:
    return reference(checkpoint)


@pytest.fixture
def remade(checkpoint: Path, tmp_path: Path, truth: Mapping[str, Tensor]) -> Callable[..., Path]:
    """Save the tiny checkpoint with other tensors."""

    def remake(change: Callable[[dict[str, Tensor]], object] = dict.copy) -> Path:
        folder = shutil.copytree(checkpoint, tmp_path / "remade")
        tensors = {name: tensor.clone() for name, tensor in truth.items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return remake


def renamed(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    names: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, replacement in LAYOUTS[layout]:
            name = re.sub(pattern, replacement, name)
        names[name] = tensor
    return names


def assert_same(weights: Weights, expected: Mapping[str, Tensor]) -> None:
    assert weights.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    for name, tensor in expected.items():
        assert torch.equal(weights.load(name), tensor), name


# --- what is read


def test_a_checkpoint_gives_what_transformers_loads(checkpoint: Path, truth: Mapping[str, Tensor]):
    assert_same(weights_of(checkpoint), truth)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_names_gives_the_same_weights(
    layout: str, remade: Callable[..., Path], truth: Mapping[str, Tensor]
):
    def rename(tensors: dict[str, Tensor]) -> None:
        names = renamed(tensors, layout)
        tensors.clear()
        tensors.update(names)

    assert_same(weights_of(remade(rename)), truth)


def test_buffers_that_are_computed_today_are_left_aside(remade: Callable[..., Path], truth: Mapping[str, Tensor]):
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)

    assert_same(weights_of(remade(add)), truth)


def test_shards_give_the_same_weights(sharded: Path, truth: Mapping[str, Tensor]):
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert_same(weights_of(sharded), truth)


@pytest.fixture
def sharded(checkpoint: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    LlavaForConditionalGeneration.from_pretrained(checkpoint).save_pretrained(folder, max_shard_size="200KB")
    return folder


def test_a_tied_head_is_the_embedding(tmp_path: Path):
    folder = save_checkpoint(tmp_path / "tied", tiny_config(tied=True))
    stored = load_file(folder / "model.safetensors")
    weights = weights_of(folder)
    assert not [name for name in stored if "lm_head" in name]
    assert torch.equal(weights.load(HEAD), weights.load(EMBEDDING))
    assert_same(weights, reference(folder))


def test_an_untied_head_is_its_own(checkpoint: Path):
    weights = weights_of(checkpoint)
    assert not isinstance(weights, TiedWeights)
    assert not torch.equal(weights.load(HEAD), weights.load(EMBEDDING))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_checkpoint_in_half_precision_is_written_in_any(tmp_path: Path, stored: torch.dtype, dtype: str):
    made = design(recipe_for(save_checkpoint(tmp_path / "half", tiny_config(), dtype=stored), dtype=dtype))
    weights = open_weights(made.model)
    with torch.device("meta"):
        module = made.modules()["embed_tokens"]
    model = trace(module, made.graph_io()["embed_tokens"], dtype=dtype)
    (name,) = bind_weights(model, weights, weight_names("embed_tokens", module, made.model.family), dtype)
    table = model.graph.initializers[name].const_value
    assert table is not None
    assert weights.load(EMBEDDING).dtype == stored
    assert table.dtype == {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}.get(
        dtype, ir.DataType.BFLOAT16
    )
    expected = weights.load(EMBEDDING).to(getattr(torch, dtype))
    assert torch.equal(torch.from_numpy(table.numpy().astype("float32")), expected.float())


def test_an_artefact_of_a_half_precision_checkpoint_holds_its_numbers(
    tmp_path: Path, exported: Callable[[Recipe], Bundle]
):
    folder = save_checkpoint(tmp_path / "half", tiny_config(), dtype=torch.bfloat16)
    bundle = exported(recipe_for(folder))
    stored = ir.load(bundle.graph_path("decoder_model_merged")).graph.initializers
    query = stored["layers.0.self_attn.q_proj.weight.transposed"].const_value
    assert query is not None
    assert torch.equal(torch.from_numpy(query.numpy().copy()), weights_of(folder).load(QUERY).float().T)


# --- random weights


def random_weights(seed: int = 0) -> RandomWeights:
    shapes = {EMBEDDING: (512, 64), QUERY: (64, 64), NORM: (64,), "a.norm.bias": (4,), "b.bias": (64,)}
    return RandomWeights(shapes, seed)


def test_random_weights_are_the_same_every_time():
    for name in random_weights().shapes:
        assert torch.equal(random_weights().load(name), random_weights().load(name))


def test_random_weights_do_not_depend_on_the_order_of_reading():
    forwards, backwards = random_weights(), random_weights()
    first = {name: forwards.load(name) for name in forwards.shapes}
    second = {name: backwards.load(name) for name in reversed(list(backwards.shapes))}
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_gives_other_weights():
    assert not torch.equal(random_weights(0).load(QUERY), random_weights(1).load(QUERY))


def test_two_tensors_of_one_shape_are_not_the_same():
    weights = RandomWeights({"a.weight": (8, 8), "b.weight": (8, 8)}, seed=0)
    assert not torch.equal(weights.load("a.weight"), weights.load("b.weight"))


def test_random_norms_are_one_and_matrices_keep_the_scale():
    weights = random_weights()
    assert torch.equal(weights.load(NORM), torch.ones(64))
    assert torch.equal(weights.load("a.norm.bias"), torch.zeros(4))
    assert weights.load(QUERY).std().item() == pytest.approx(1 / 8, rel=0.05)


def test_random_weights_need_no_checkpoint(checkpoint: Path):
    recipe = override(recipe_for(checkpoint), weights="random")
    weights = open_weights(describe_model(recipe.model))
    assert isinstance(weights, RandomWeights)
    assert weights.shapes == weights_of(checkpoint).shapes


# --- what does not fit


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tensors: tensors.pop(NORM), f"1 missing: {NORM}"),
        (lambda tensors: tensors.pop(HEAD), f"1 missing: {HEAD}"),
        (lambda tensors: tensors.update(odd=torch.ones(1)), "1 not known to the model: odd"),
        (
            lambda tensors: tensors.update({QUERY: torch.ones(32, 64)}),
            f"1 of the wrong shape: {QUERY} is 32 x 64, expected 64 x 64",
        ),
        (
            lambda tensors: (tensors.pop(NORM), tensors.update(odd=torch.ones(1))),
            f"1 missing: {NORM}; 1 not known to the model: odd",
        ),
    ],
    ids=["missing", "head missing", "surplus", "shape", "missing and surplus"],
)
def test_weights_that_do_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], object], text: str, remade: Callable[..., Path]
):
    folder = remade(change)
    with pytest.raises(CheckpointError) as caught:
        weights_of(folder)
    assert str(caught.value) == f"the weights of {folder} do not fit its config.json: {text}"


def test_of_many_missing_weights_some_are_named():
    with pytest.raises(CheckpointError, match=r"7 missing: w0, w1, w2, w3, w4 and 2 more$"):
        check_shapes(RandomWeights({}, 0), {f"w{index}": (1,) for index in range(7)}, "it")


def test_two_tensors_of_one_canonical_name_are_refused(remade: Callable[..., Path]):
    folder = remade(lambda tensors: tensors.update({"language_model.lm_head.weight": tensors[HEAD].clone()}))
    with pytest.raises(CheckpointError, match=r"holds two tensors for lm_head\.weight: .*; keep one of them"):
        weights_of(folder)


def test_a_missing_shard_is_named(sharded: Path):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks 1 of the \d+ shards in its index: {shard.name}; fetch"):
        weights_of(sharded)


def test_a_truncated_shard_is_named(sharded: Path):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(
        CheckpointError, match=rf"{shard.name} is damaged or truncated \([\d,]+ bytes: .*; fetch it again"
    ):
        weights_of(sharded)


def test_a_shard_that_changes_while_it_is_read_is_named(sharded: Path):
    weights = weights_of(sharded)
    for shard in sharded.glob("model-*.safetensors"):
        save_file({name: tensor[..., :1].clone() for name, tensor in load_file(shard).items()}, shard)
    with pytest.raises(
        CheckpointError, match=r"model-0000\d-of-0000\d.safetensors changed while it was read: .*q_proj"
    ):
        weights.load(QUERY)


@pytest.mark.parametrize("values", [[1.0, torch.nan], [torch.inf, 2.0], [-torch.inf, torch.nan]])
def test_weights_that_are_no_finite_numbers_are_named(values: list[float]):
    count = sum(not math.isfinite(value) for value in values)
    with pytest.raises(CheckpointError, match=f"^x.weight has {count} of 2 values that are no finite numbers; fetch"):
        converted(torch.tensor(values), torch.float32, "x.weight")


def test_weights_that_a_precision_cannot_hold_are_named():
    tensor = torch.tensor([1.0, -70_000.0])
    with pytest.raises(CheckpointError) as caught:
        converted(tensor, torch.float16, "x.weight")
    assert (
        str(caught.value)
        == "x.weight reaches 7e+04, and float16 holds at most 65,504; choose --dtype bfloat16 or float32"
    )
    assert converted(tensor, torch.bfloat16, "x.weight").isfinite().all()


def test_no_weights_are_finite():
    assert converted(torch.empty(0, 3), torch.float16, "x.weight").shape == (0, 3)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("{", id="syntax"),
        pytest.param("[]", id="list"),
        pytest.param('{"weight_map": {}}', id="empty"),
        pytest.param(
            '{"weight_map": []}',
            id="list inside",
        ),
    ],
)
def test_a_damaged_index_is_refused(sharded: Path, content: str):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="index"):
        weights_of(sharded)


def test_pickled_weights_are_refused(checkpoint: Path, tmp_path: Path):
    shutil.copyfile(checkpoint / "config.json", tmp_path / "config.json")
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"holds pickled weights .* save it again with safe_serialization=True"):
        weights_of(tmp_path)


def test_a_checkpoint_without_weights_is_refused(checkpoint: Path, tmp_path: Path):
    shutil.copyfile(checkpoint / "config.json", tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors and no .* use --weights random"):
        weights_of(tmp_path)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (None, "has no config.json; give the directory of a LLaVA-1.5 checkpoint saved by transformers"),
        ("{", "config.json cannot be read as JSON"),
        ("[]", 'describes a model of type None, expected "llava"'),
        ('{"model_type": "llava_next"}', "describes a model of type 'llava_next', expected \"llava\"; family llava15"),
    ],
    ids=["none", "syntax", "list", "other"],
)
def test_a_directory_of_something_else_is_refused(tmp_path: Path, config: str | None, text: str):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError) as caught:
        weights_of(tmp_path)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"text_config": {"hidden_act": "gelu"}}, "text_config.hidden_act = 'gelu' is not supported by family llava15"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy = 'full' is not supported"),
        ({"vision_feature_layer": [-2, -3]}, "vision_feature_layer = [-2, -3] takes several layers"),
        ({"text_config": {"model_type": "mistral"}}, "text_config.model_type = 'mistral' is not supported"),
    ],
    ids=["activation", "class token", "several layers", "language model"],
)
def test_an_architecture_that_cannot_be_exported_is_refused(
    checkpoint: Path, tmp_path: Path, change: dict[str, Any], text: str
):
    folder = shutil.copytree(checkpoint, tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        planned(recipe_for(folder))
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("layer", [5, -9])
def test_a_tower_layer_that_does_not_exist_is_refused(checkpoint: Path, tmp_path: Path, layer: int):
    folder = shutil.copytree(checkpoint, tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vision_feature_layer": layer}))
    with pytest.raises(CheckpointError, match="vision_feature_layer"):
        planned(recipe_for(folder))


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "a/b/c", "~/no/where/at/all"])
def test_a_checkpoint_that_is_not_there_is_refused(name: str):
    with pytest.raises(CheckpointError, match=r"there is no model directory .*; give a directory, a hub id like"):
        describe_model(ModelTable(family="llava15", checkpoint=name))


def test_more_layers_than_the_model_has_are_refused(checkpoint: Path):
    recipe = override(recipe_for(checkpoint), weights="random", num_layers=5)
    with pytest.raises(CheckpointError, match="num_layers = 5 is more than the 4 decoder layers of"):
        planned(recipe)


def test_a_configuration_key_that_does_not_exist_is_refused(checkpoint: Path):
    recipe = override(recipe_for(checkpoint), weights="random")
    recipe = replace(recipe, model=replace(recipe.model, architecture={"text_config": {"hidden": 3}}))
    with pytest.raises(RecipeError, match=r"\[model\.architecture\.text_config\] has no key 'hidden'"):
        planned(recipe)


# --- fingerprints


def test_a_fingerprint_is_the_same_for_the_same_files_elsewhere(checkpoint: Path, tmp_path: Path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    first, second = (fingerprint(describe_model(recipe_for(path).model)) for path in (checkpoint, copy))
    assert first == second


def test_a_fingerprint_tells_checkpoints_apart(checkpoint: Path, remade: Callable[..., Path]):
    other = remade(lambda tensors: tensors[NORM].add_(1))
    first, second = (fingerprint(describe_model(recipe_for(path).model)) for path in (checkpoint, other))
    assert first != second
