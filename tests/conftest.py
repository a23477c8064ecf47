"""A real, tiny LLaVA-1.5 checkpoint made by transformers, and artefacts made from it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

import tokexport.recipes
from tokexport.exporter.bundle import Bundle, BundleWriter
from tokexport.exporter.export import design, export
from tokexport.recipes.load import override, parse_recipe
from tokexport.recipes.schema import Recipe

MINI = Path(tokexport.recipes.__path__[0]) / "models" / "mini"
NUM_LAYERS, NUM_VISION_TOKENS, IMAGE_SIZE = 4, 16, 56


def tiny_config(*, num_kv_heads: int = 2, tied: bool = False) -> LlavaConfig:
    """Return LLaVA-1.5 with 4 x 4 vision tokens and 4 decoder layers with grouped heads."""
    return LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": 14,
            "projection_dim": 32,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 576,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": num_kv_heads,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 3,
            "tie_word_embeddings": tied,
        },
        tie_word_embeddings=tied,
        image_token_index=4,
        image_seq_length=NUM_VISION_TOKENS,
    )


def save_checkpoint(folder: Path, config: LlavaConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Save a checkpoint as transformers does, with weights large enough to tell models apart."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(4)
    torch.nn.Module.to(model, dtype=dtype)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        shutil.copyfile(MINI / name, folder / name)
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"] |= {
        "size": {"shortest_edge": IMAGE_SIZE},
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def save_adapter(folder: Path, *, seed: int = 0) -> Path:
    """Save a LoRA adapter of one projection of the tiny model, as PEFT does."""
    generator = torch.Generator().manual_seed(seed)
    lora = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora"
    down_RI, up_OR = (torch.randn(shape, generator=generator) for shape in ((4, 64), (64, 4)))
    folder.mkdir()
    save_file({f"{lora}_A.weight": down_RI, f"{lora}_B.weight": up_OR}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    return folder


def recipe_for(checkpoint: Path, *compress: dict[str, object], dtype: str = "float32") -> Recipe:
    """Return a recipe for a checkpoint on disk."""
    return parse_recipe(
        "tiny",
        {
            "model": {"family": "llava15", "checkpoint": str(checkpoint)},
            "compress": list(compress),
            "export": {"dtype": dtype},
            "session": {"max_text_tokens": 128, "max_images": 3},
            "plan": {"text_tokens": 8},
        },
    )


def adsc(**options: object) -> dict[str, object]:
    """Return an ADSC table for the tiny model: 16 -> 8 -> 4 tokens."""
    return {"method": "adsc", "drops": [{"layer": 1, "keep": 8}, {"layer": 3, "keep": 4}], **options}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", tiny_config())


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Bundle]:
    """Export recipes, each only once."""
    made: dict[str, Bundle] = {}

    def get(recipe: Recipe) -> Bundle:
        if repr(recipe) not in made:
            with BundleWriter(tmp_path_factory.mktemp("artefact") / "out") as writer:
                export(design(recipe), writer)
                made[repr(recipe)] = writer.commit()
        return made[repr(recipe)]

    return get


@pytest.fixture(scope="session")
def tiny_full(checkpoint: Path, exported: Callable[[Recipe], Bundle]) -> Bundle:
    return exported(recipe_for(checkpoint))


@pytest.fixture(scope="session")
def tiny_adsc(checkpoint: Path, exported: Callable[[Recipe], Bundle]) -> Bundle:
    return exported(recipe_for(checkpoint, adsc()))


@pytest.fixture(scope="session")
def tiny_lora(
    checkpoint: Path, exported: Callable[[Recipe], Bundle], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, Path]:
    """Return an artefact with a merged adapter, and where the adapter was moved after the export."""
    folder = tmp_path_factory.mktemp("adapter")
    adapter = save_adapter(folder / "old")
    bundle = exported(override(recipe_for(checkpoint), adapter=str(adapter)))
    return bundle, adapter.rename(folder / "new")
