"""LLaVA-1.5 (arXiv 2310.03744): CLIP vision tower, two-layer projector, Llama decoder."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tokexport.errors import CheckpointError, RecipeError, nearest
from tokexport.exporter.family import Family
from tokexport.exporter.modules.bottleneck import Bottleneck
from tokexport.exporter.modules.decoder import Decoder, DecoderConfig
from tokexport.exporter.modules.vision import ClipVisionEncoder, num_layers_used
from tokexport.exporter.plan import VlmSpec

# Tensor names found in published checkpoints, and what transformers calls them today.
_RENAMES = [
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^(model\.)?language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(model\.)?vision_tower\.(vision_model\.)?"), "model.vision_tower."),
    (re.compile(r"^multi_modal_projector\."), "model.multi_modal_projector."),
]
# Buffers that older versions of transformers stored and that today's compute.
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")


class Llava15(Family):
    """LLaVA-1.5 in any size."""

    head = "lm_head.weight"
    embedding = "model.language_model.embed_tokens.weight"
    weight_prefixes = {  # noqa: RUF012 - a constant
        "vision_encoder": {
            "vision_tower.": "model.vision_tower.",
            "multi_modal_projector.": "model.multi_modal_projector.",
        },
        "embed_tokens": {"weight": embedding},
        "decoder_model_merged": {
            "layers.": "model.language_model.layers.",
            "norm.": "model.language_model.norm.",
            "lm_head.": "lm_head.",
        },
    }
    vision_layers = re.compile(r"vision_tower\.encoder\.layers\.\d+|multi_modal_projector")

    def read_config(self, directory: Path) -> PreTrainedConfig:
        path = directory / "config.json"
        try:
            table = json.loads(path.read_text())
        except FileNotFoundError:
            raise CheckpointError(
                f"{directory} has no config.json; give the directory of a LLaVA-1.5 checkpoint saved by transformers"
            ) from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch the checkpoint again") from error
        model_type = table.get("model_type") if isinstance(table, dict) else None
        if model_type != "llava":
            raise CheckpointError(
                f'{path} describes a model of type {model_type!r}, expected "llava"; family llava15 takes '
                "LLaVA-1.5 checkpoints only"
            )
        try:
            return LlavaConfig.from_pretrained(directory)
        except (StrictDataclassError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is not valid: {' '.join(str(error).split())}") from error

    def make_config(self, base: PreTrainedConfig | None, changes: Mapping[str, Any]) -> PreTrainedConfig:
        table = _merged((base or LlavaConfig()).to_dict(), changes, "[model.architecture]")
        try:
            return LlavaConfig.from_dict(table)
        except (StrictDataclassError, ValueError, TypeError) as error:
            raise RecipeError(f"[model.architecture] is not valid: {' '.join(str(error).split())}") from error

    def layer_change(self, num_layers: int) -> Mapping[str, Any]:
        return {"text_config": {"num_hidden_layers": num_layers}}

    def spec(self, config: PreTrainedConfig) -> VlmSpec:
        assert isinstance(config, LlavaConfig)
        _require("text_config.model_type", _model_type(config.text_config), "llama")
        _require("vision_config.model_type", _model_type(config.vision_config), "clip_vision_model")
        text, vision = _text_config(config), _vision_config(config)
        _require("text_config.hidden_act", text.hidden_act, "silu")
        _require("vision_feature_select_strategy", config.vision_feature_select_strategy, "default")
        rope: Any = text.rope_parameters
        _require("rope_type", rope.get("rope_type", "default"), "default", "linear", "llama3")
        if not isinstance(config.vision_feature_layer, int):
            raise CheckpointError(
                f"vision_feature_layer = {config.vision_feature_layer} takes several layers, which "
                "LLaVA-1.5 does not; expected one number"
            )
        num_tower_layers = vision.num_hidden_layers
        if not -num_tower_layers - 1 <= config.vision_feature_layer <= num_tower_layers:
            raise CheckpointError(
                f"vision_feature_layer = {config.vision_feature_layer} is outside of the vision tower, which has "
                f"{num_tower_layers} layers"
            )
        image_size, patch_size = vision.image_size, vision.patch_size
        if not isinstance(image_size, int) or not isinstance(patch_size, int):
            raise CheckpointError(f"image_size = {image_size} and patch_size = {patch_size} must be whole numbers")
        side = image_size // patch_size
        return VlmSpec(
            family="llava15",
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads or text.num_attention_heads,
            head_dim=text.head_dim or text.hidden_size // text.num_attention_heads,
            vocab_size=text.vocab_size,
            max_positions=text.max_position_embeddings,
            image_size=image_size,
            vision_grid=(side, side),
            class_token_layers=num_layers_used(config) or None,
        )

    def image_token_id(self, config: PreTrainedConfig) -> int:
        assert isinstance(config, LlavaConfig)
        return config.image_token_index

    def canonical_name(self, name: str) -> str | None:
        if _BUFFERS.search(name):
            return None
        for pattern, replacement in _RENAMES:
            name = pattern.sub(replacement, name)
        return name

    def vision_encoder(
        self, config: PreTrainedConfig, grid: tuple[int, int], stages: Mapping[str, nn.Module]
    ) -> nn.Module:
        assert isinstance(config, LlavaConfig)
        return ClipVisionEncoder(config, grid, stages)

    def decoder(self, config: PreTrainedConfig, bottlenecks: Mapping[int, Bottleneck]) -> Decoder:
        assert isinstance(config, LlavaConfig)
        text, spec = _text_config(config), self.spec(config)
        sizes = DecoderConfig(
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            num_layers=spec.num_layers,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            vocab_size=spec.vocab_size,
            rms_norm_eps=text.rms_norm_eps,
            attention_bias=text.attention_bias,
            mlp_bias=text.mlp_bias,
        )
        return Decoder(sizes, bottlenecks, _rope_tables(text))

    def token_embedding(self, config: PreTrainedConfig) -> nn.Module:
        assert isinstance(config, LlavaConfig)
        text = _text_config(config)
        return nn.Embedding(text.vocab_size, text.hidden_size)

    def reference_model(self, config: PreTrainedConfig) -> PreTrainedModel:
        assert isinstance(config, LlavaConfig)
        return LlavaForConditionalGeneration(config)


def _text_config(config: LlavaConfig) -> LlamaConfig:
    assert isinstance(config.text_config, LlamaConfig)
    return config.text_config


def _vision_config(config: LlavaConfig) -> CLIPVisionConfig:
    assert isinstance(config.vision_config, CLIPVisionConfig)
    return config.vision_config


def _model_type(config: object) -> str:
    return str(getattr(config, "model_type", None))


def _rope_tables(text: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of every position, (R, E / 2) each, on the CPU even under the meta device."""
    with torch.device("cpu"):
        rope = LlamaRotaryEmbedding(text)
        cos_1RE, sin_1RE = rope(torch.zeros(1), torch.arange(text.max_position_embeddings).unsqueeze(0))
    half = cos_1RE.shape[-1] // 2
    return cos_1RE[0, :, :half].contiguous(), sin_1RE[0, :, :half].contiguous()


def _require(name: str, value: object, *expected: str) -> None:
    if value not in expected:
        raise CheckpointError(
            f"{name} = {value!r} is not supported by family llava15; expected {' or '.join(map(repr, expected))}"
        )


def _merged(table: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    merged = dict(table)
    for key, value in changes.items():
        if key not in table:
            raise RecipeError(f"{where} has no key {key!r}{nearest(key, list(table))}")
        is_table = isinstance(table[key], Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(table[key], value, f"{where[:-1]}.{key}]") if is_table else value
    return merged
