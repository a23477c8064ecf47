"""From pixels to the image features that enter the language model.

B images, N vision tokens, M after compression, C width of the tower, D width of the language model
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector


class ClipVisionEncoder(nn.Module):
    """The CLIP tower of ``transformers``, LLaVA's projector, and every compression before the decoder.

    Sub-modules carry the names of ``LlavaForConditionalGeneration``, so that weights load by name.
    Layers behind the one whose output is taken are not built.
    """

    def __init__(self, config: LlavaConfig, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        assert isinstance(config.vision_config, CLIPVisionConfig)
        vision_config = CLIPVisionConfig.from_dict(config.vision_config.to_dict())
        assert isinstance(vision_config, CLIPVisionConfig)
        vision_config.num_hidden_layers = _num_layers_used(config)
        self.vision_tower: Any = CLIPVisionModel(vision_config)
        self.vision_tower.set_attn_implementation("sdpa")
        self.vision_tower.post_layernorm = nn.Identity()  # feeds only the pooled output, which LLaVA leaves out
        # A buffer is data, also where the weights stand on the meta device.
        embeddings = self.vision_tower.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions, device="cpu").unsqueeze(0)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.stages = nn.ModuleList(stages)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the image features (B, M, D) of ``pixel_values`` (B, 3, height, width)."""
        hidden_BNC = self.vision_tower.pre_layrnorm(self.vision_tower.embeddings(pixel_values))
        for layer in self.vision_tower.encoder.layers:
            hidden_BNC = layer(hidden_BNC, attention_mask=None)
        features_BND = self.multi_modal_projector(hidden_BNC[:, 1:])  # without the class token
        for stage in self.stages:
            features_BND = stage(features_BND)
        return features_BND


def _num_layers_used(config: LlavaConfig) -> int:
    """Return how many tower layers stand before the hidden state that LLaVA takes.

    Hidden state 0 is the embedding, so the state -2 of a tower of L layers is the output of L - 1.
    """
    layer, vision = config.vision_feature_layer, config.vision_config
    assert isinstance(layer, int)
    assert isinstance(vision, CLIPVisionConfig)
    return layer if layer >= 0 else vision.num_hidden_layers + 1 + layer
