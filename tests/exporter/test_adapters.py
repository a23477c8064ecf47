"""LoRA adapters are merged as PEFT merges them, or refused."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tests.conftest import recipe_for, save_checkpoint, tiny_config
from tokexport.errors import CheckpointError
from tokexport.exporter import bundled
from tokexport.exporter.checkpoint import describe_model, fingerprint, open_weights
from tokexport.exporter.export import design
from tokexport.exporter.weights import Weights
from tokexport.recipes.load import override, recipe_toml

QUERY = "model.language_model.layers.0.self_attn.q_proj.weight"
# Attention and MLP of the vision tower, the projector, and attention of the language model.
TARGETS = ["q_proj", "v_proj", "fc1", "linear_1"]


@dataclass(frozen=True)
class Lora:
    """An adapter on disk, and what PEFT makes of it."""

    folder: Path
    merged: Mapping[str, Tensor]


@pytest.fixture
def lora(checkpoint: Path, tmp_path: Path) -> Callable[..., Lora]:
    """Save an adapter with PEFT, its B matrices not zero, and merge it with PEFT."""

    def make(**options: Any) -> Lora:
        torch.manual_seed(0)
        chosen = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False, **options}
        adapted = get_peft_model(LlavaForConditionalGeneration.from_pretrained(checkpoint), LoraConfig(**chosen))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(tmp_path / "adapter")
        plain = LlavaForConditionalGeneration.from_pretrained(checkpoint)
        merged = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()
        return Lora(tmp_path / "adapter", merged.state_dict())

    return make


def with_adapter(checkpoint: Path, adapter: Path) -> Weights:
    return open_weights(describe_model(override(recipe_for(checkpoint), adapter=str(adapter)).model))


def assert_merged_as_peft_does(checkpoint: Path, lora: Lora) -> None:
    weights = with_adapter(checkpoint, lora.folder)
    for name, expected in lora.merged.items():
        torch.testing.assert_close(weights.load(name), expected, rtol=1e-6, atol=1e-6, msg=name)


def edit_config(adapter: Path, **changes: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(adapter: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"use_rslora": True}, id="rslora"),
        pytest.param({"rank_pattern": {"q_proj": 2}}, id="rank of a module"),
        pytest.param({"rank_pattern": {"q_proj": 2}, "use_rslora": True}, id="rank and rslora"),
        pytest.param({"alpha_pattern": {"q_proj": 32}}, id="alpha of a module"),
        pytest.param({"alpha_pattern": {"layers.1.self_attn.q_proj": 32, "q_proj": 4}}, id="first alpha that fits"),
        pytest.param({"target_modules": "all-linear"}, id="every linear layer"),
        pytest.param({"target_modules": r".*language_model.*\.(q|o)_proj"}, id="targets by expression"),
        pytest.param(
            {"alpha_pattern": {r"language_model\.layers\.[01]\..*q_proj": 32}},
            id="alpha by expression",
        ),
        pytest.param(
            {"alpha_pattern": {r"^model\.language_model\..*\.q_proj": 32}},
            id="alpha by whole name",
        ),
    ],
)
def test_an_adapter_is_merged_as_peft_merges_it(options: dict[str, Any], checkpoint: Path, lora: Callable[..., Lora]):
    made = lora(**options)
    plain = open_weights(describe_model(recipe_for(checkpoint).model))
    assert not torch.allclose(made.merged[QUERY], plain.load(QUERY), atol=0.01)
    assert_merged_as_peft_does(checkpoint, made)


def test_an_alpha_for_a_part_of_a_name_is_for_no_module(checkpoint: Path, lora: Callable[..., Lora]):
    made = lora()
    edit_config(made.folder, alpha_pattern={"proj": 32})
    assert_merged_as_peft_does(checkpoint, made)


def test_an_adapter_with_names_of_an_older_layout_is_merged(checkpoint: Path, lora: Callable[..., Lora]):
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            older = name.replace("base_model.model.model.language_model.", "base_model.model.language_model.model.")
            tensors[older.replace("base_model.model.model.", "base_model.model.")] = tensors.pop(name)

    made = lora()
    edit_tensors(made.folder, rename)
    assert_merged_as_peft_does(checkpoint, made)


def test_an_adapter_leaves_the_precision_as_it_was(tmp_path: Path, lora: Callable[..., Lora]):
    folder = save_checkpoint(tmp_path / "half", tiny_config(), dtype=torch.bfloat16)
    made = lora()
    merged = with_adapter(folder, made.folder).load(QUERY)
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged.float(), made.merged[QUERY], rtol=2**-7, atol=2**-7)


@pytest.fixture
def shipped(lora: Callable[..., Lora], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lora:
    """Let an adapter ship with tokexport, by the name ``adapter``."""
    made = lora()
    monkeypatch.setattr(bundled, "BUNDLED", tmp_path / "models")
    folder = shutil.copytree(made.folder, tmp_path / "models" / "adapter")
    return Lora(folder, made.merged)


def test_an_adapter_that_ships_is_merged_by_its_name(checkpoint: Path, shipped: Lora):
    assert_merged_as_peft_does(checkpoint, Lora(Path("adapter"), shipped.merged))


@pytest.mark.usefixtures("shipped")
def test_the_recipe_keeps_the_name_of_an_adapter_that_ships(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # where a folder has this name too
    made = design(override(recipe_for(checkpoint), adapter="adapter"))
    assert 'adapter = "adapter"' in recipe_toml(made.recipe)


def test_an_adapter_that_ships_has_the_fingerprint_of_its_folder(checkpoint: Path, shipped: Lora):
    first, second = (
        fingerprint(describe_model(override(recipe_for(checkpoint), adapter=name).model))
        for name in ("adapter", str(shipped.folder))
    )
    assert first == second


@pytest.mark.usefixtures("shipped")
def test_a_folder_is_not_taken_for_the_adapter_of_its_name_that_ships(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    table = describe_model(override(recipe_for(checkpoint), adapter="./adapter").model).table
    assert table.adapter == str(tmp_path / "adapter")


def test_an_adapter_that_does_not_exist_is_refused(checkpoint: Path):
    model = describe_model(override(recipe_for(checkpoint), adapter="no/where").model)
    for read in (open_weights, fingerprint):
        with pytest.raises(CheckpointError) as caught:
            read(model)
        assert str(caught.value) == "there is no adapter directory no/where; say where it is with --adapter"


def test_a_fingerprint_covers_the_adapter(checkpoint: Path, lora: Callable[..., Lora]):
    plain = recipe_for(checkpoint)
    adapted = override(plain, adapter=str(lora().folder))
    assert fingerprint(describe_model(plain.model)) != fingerprint(describe_model(adapted.model))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"use_dora": True}, "sets use_dora = True, which cannot be merged; merge it with PEFT and export the result"),
        ({"fan_in_fan_out": True}, "sets fan_in_fan_out = True, which cannot be merged"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save = ['lm_head'], which cannot be merged"),
        ({"lora_bias": True}, "sets lora_bias = True, which cannot be merged"),
        ({"bias": "lora_only"}, 'trains biases (bias = "lora_only"); merge it with PEFT'),
        ({"peft_type": "IA3"}, "is of type 'IA3', expected LORA"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_an_adapter_that_is_no_plain_lora_is_refused(
    changes: dict[str, object], text: str, checkpoint: Path, lora: Callable[..., Lora]
):
    folder = lora().folder
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError) as caught:
        with_adapter(checkpoint, folder)
    assert str(caught.value).startswith(f"adapter {folder} {text}")


@pytest.mark.parametrize(
    "changes",
    [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"alora_invocation_tokens": [5, 6]}],
    ids=["pissa", "olora", "alora"],
)
def test_an_adapter_that_needs_another_base_is_refused(
    changes: dict[str, object], checkpoint: Path, lora: Callable[..., Lora]
):
    folder = lora().folder
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match="merge it with PEFT and export the result"):
        with_adapter(checkpoint, folder)


_Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda t: t.pop(f"{_Q}_A.weight"),
            "has only half of the LoRA pair of model.language_model.layers.0",
        ),
        (
            lambda t: t.update({f"{_Q}_B.weight": torch.ones(32, 4)}),
            f"makes 32 x 64 for {QUERY}, expected 64 x 64; it was trained for another model",
        ),
        (
            lambda t: t.update({f"{_Q}_A.weight": torch.ones(3, 64)}),
            "has lora_A of rank 3 and lora_B of rank 4 for model.language_model.layers.0",
        ),
        (
            lambda t: t.update({f"{_Q.replace('layers.0', 'layers.9')}_A.weight": torch.ones(4, 64)}),
            "changes model.language_model.layers.9.self_attn.q_proj, which the model does not have; it was trained for",
        ),
        (
            lambda t: t.update({f"{_Q}_magnitude_vector": torch.ones(64)}),
            f"holds {_Q}_magnitude_vector, which is no lora_A or lora_B weight; only plain LoRA adapters",
        ),
    ],
    ids=["half", "shape", "rank", "other model", "dora"],
)
def test_an_adapter_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Tensor]], object], text: str, checkpoint: Path, lora: Callable[..., Lora]
):
    folder = lora().folder
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError) as caught:
        with_adapter(checkpoint, folder)
    assert str(caught.value).startswith(f"adapter {folder} {text}")


def test_a_directory_without_an_adapter_is_refused(checkpoint: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"is no PEFT adapter directory: adapter_config\.json cannot be read"):
        with_adapter(checkpoint, tmp_path)


def test_an_adapter_without_weights_is_refused(checkpoint: Path, lora: Callable[..., Lora]):
    folder = lora().folder
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing; fetch it again"):
        with_adapter(checkpoint, folder)


@pytest.fixture
def pickled(checkpoint: Path, lora: Callable[..., Lora]) -> Lora:
    """Let PEFT save an adapter as it once did."""
    made = lora()
    adapted = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(checkpoint), made.folder)
    (made.folder / "adapter_model.safetensors").unlink()
    adapted.save_pretrained(str(made.folder), safe_serialization=False)
    return made


def test_a_pickled_adapter_is_refused(checkpoint: Path, pickled: Lora):
    with pytest.raises(CheckpointError) as caught:
        with_adapter(checkpoint, pickled.folder)
    assert str(caught.value) == (
        f"adapter {pickled.folder} holds adapter_model.bin, a pickle, which is not read because it can run code; "
        "load it with peft and save it again: save_pretrained(DIR, safe_serialization=True)"
    )


def test_a_pickled_adapter_converted_as_the_error_says_is_merged(checkpoint: Path, pickled: Lora):
    adapted = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(checkpoint), pickled.folder)
    adapted.save_pretrained(str(pickled.folder), safe_serialization=True)
    assert_merged_as_peft_does(checkpoint, pickled)
