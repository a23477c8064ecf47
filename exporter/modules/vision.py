"""From pixels to the image features that enter the language model.

B images, N vision tokens, M after compression, C width of the tower, D width of the language model,
H and W height and width of an image in pixels, S side of a smaller one, G what the tower sees of that, the class
token included
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaConfig
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from tokexport.exporter.modules.tower_stage import TowerStage


class ClipVisionEncoder(nn.Module):
    """The CLIP tower of ``transformers``, LLaVA's projector, and every compression before the decoder.

    Sub-modules carry the names of ``LlavaForConditionalGeneration``, so that weights load by name.
    Layers behind the one whose output is taken are not built. ``grid``, rows and columns, is how many
    patches the tower sees; for fewer than the model has, the image is shrunk first. The first of ``stages``
    may be a ``TowerStage``, which may stand before the projector; the others stand behind it.
    """

    def __init__(self, config: LlavaConfig, grid: tuple[int, int], stages: Mapping[str, nn.Module]) -> None:
        super().__init__()
        assert isinstance(config.vision_config, CLIPVisionConfig)
        vision_config = CLIPVisionConfig.from_dict(config.vision_config.to_dict())
        assert isinstance(vision_config, CLIPVisionConfig)
        vision_config.num_hidden_layers = num_layers_used(config)
        self.vision_tower: Any = CLIPVisionModel(vision_config)
        self.vision_tower.set_attn_implementation("sdpa")
        self.vision_tower.post_layernorm = nn.Identity()  # feeds only the pooled output, which LLaVA leaves out
        if grid[0] * grid[1] < self.vision_tower.embeddings.num_patches:
            self.vision_tower.embeddings = SmallerImageEmbeddings(vision_config, grid)
        # A buffer is data, also where the weights stand on the meta device.
        embeddings = self.vision_tower.embeddings
        position_ids = torch.arange(embeddings.num_positions, device="cpu").unsqueeze(0)
        embeddings.register_buffer("position_ids", position_ids, persistent=False)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.stages = nn.ModuleDict(stages)
        assert not any(isinstance(stage, TowerStage) for stage in list(self.stages.values())[1:]), stages

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the image features (B, M, D) of ``pixel_values`` (B, 3, height, width)."""
        hidden_BGC = self.vision_tower.pre_layrnorm(self.vision_tower.embeddings(pixel_values))
        stages = list(self.stages.values())
        first = stages[0] if stages else None
        tower_stage = first if isinstance(first, TowerStage) else None
        seen: dict[str, Tensor] = {}
        for number, layer in enumerate(self.vision_tower.encoder.layers):
            if tower_stage is not None:
                # Before the layer, whose output then comes last of all that bears its name in a graph.
                seen |= tower_stage.look(number, layer, hidden_BGC)
            hidden_BGC = layer(hidden_BGC, attention_mask=None)
        tokens_BNC = hidden_BGC[:, 1:]  # without the class token
        if tower_stage is not None and tower_stage.is_before_projector:
            tokens_BNC = tower_stage(hidden_BGC, **seen)
        features_BND = self.multi_modal_projector(tokens_BNC)
        if tower_stage is not None and not tower_stage.is_before_projector:
            features_BND = tower_stage(features_BND, **seen)
        for stage in stages if tower_stage is None else stages[1:]:
            features_BND = stage(features_BND)
        return features_BND


class SmallerImageEmbeddings(CLIPVisionEmbeddings):
    """Patches of the image shrunk to ``grid`` patches, at positions interpolated like those of ``transformers``.

    In a graph these are products with constant matrices, which every engine computes alike.
    """

    rows_SH: Tensor
    columns_WS: Tensor
    positions_GN: Tensor

    def __init__(self, config: CLIPVisionConfig, grid: tuple[int, int]) -> None:
        super().__init__(config)
        assert isinstance(config.image_size, int)
        assert isinstance(config.patch_size, int)
        rows, columns = (
            interpolation_matrix(config.image_size, side * config.patch_size, antialias=True) for side in grid
        )
        full = config.image_size // config.patch_size
        down, across = (interpolation_matrix(full, side, antialias=False) for side in grid)
        class_token = torch.ones(1, 1, device="cpu")
        self.register_buffer("rows_SH", rows, persistent=False)
        self.register_buffer("columns_WS", columns.T.contiguous(), persistent=False)
        self.register_buffer("positions_GN", torch.block_diag(class_token, torch.kron(down, across)), persistent=False)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = True) -> Tensor:
        """Return class token and patches of the shrunk image, (B, G, C), of ``pixel_values`` (B, 3, H, W)."""
        return super().forward(self.rows_SH @ pixel_values @ self.columns_WS, interpolate_pos_encoding)

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Return the position embeddings (1, G, C) of the shrunk image."""
        return (self.positions_GN @ self.position_embedding.weight).unsqueeze(0)


def interpolation_matrix(before: int, after: int, *, antialias: bool) -> Tensor:
    """Return the (after, before) matrix of bicubic interpolation along one axis, on the CPU.

    ``antialias`` is what image processors do with pixels, and the absence of it what ``transformers`` does with
    position embeddings.
    """
    identity = torch.eye(before, device="cpu")
    shrunk = functional.interpolate(
        identity[None, None], size=(after, before), mode="bicubic", align_corners=False, antialias=antialias
    )
    return shrunk[0, 0]


def num_layers_used(config: LlavaConfig) -> int:
    """Return how many tower layers stand before the hidden state that LLaVA takes.

    Hidden state 0 is the embedding, so the state -2 of a tower of L layers is the output of L - 1.
    """
    layer, vision = config.vision_feature_layer, config.vision_config
    assert isinstance(layer, int)
    assert isinstance(vision, CLIPVisionConfig)
    return layer if layer >= 0 else vision.num_hidden_layers + 1 + layer
