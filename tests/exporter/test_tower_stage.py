"""What stages read of the vision tower: beside what ``transformers`` computes."""

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.conftest import IMAGE_SIZE, NUM_VISION_TOKENS, tiny_config
from tokexport.exporter.family import load_family
from tokexport.exporter.modules.selection import FarthestPoints
from tokexport.exporter.modules.tower_stage import ClassAttention, LayerKeys, TowerStage, marked
from tokexport.exporter.modules.vision import ClipVisionEncoder


class Noting(TowerStage):
    """Keeps every second token and notes what it was given."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.attention = ClassAttention(layer)
        self.keys = LayerKeys(layer, "joined")
        self.averaged = LayerKeys(layer, "averaged")

    def forward(self, hidden_BGC: Tensor, attention: Tensor, keys: Tensor, averaged: Tensor) -> Tensor:
        self.noted = hidden_BGC, attention, keys, averaged
        return hidden_BGC[:, 1::2]


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    made = LlavaForConditionalGeneration(tiny_config())
    with torch.no_grad():
        for parameter in made.model.vision_tower.parameters():
            parameter.mul_(2)  # else all tokens are attended to alike
    return made.eval()


def encoder_with(model: LlavaForConditionalGeneration, **stages: torch.nn.Module) -> ClipVisionEncoder:
    encoder = ClipVisionEncoder(tiny_config(), (4, 4), stages)
    weights = model.model.state_dict()
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    return encoder.eval()


def pixels() -> Tensor:
    return torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layer", [0, 1])
def test_a_look_sees_the_attention_and_the_keys_of_its_layer(model: LlavaForConditionalGeneration, layer: int):
    stage = Noting(layer)
    tower = model.model.vision_tower
    projected: list[Tensor] = []
    hook = tower.encoder.layers[layer].self_attn.k_proj.register_forward_hook(
        lambda _module, _inputs, output: projected.append(output)
    )
    tower.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = tower(pixels(), output_attentions=True, output_hidden_states=True)
        hook.remove()
        encoder_with(model, noting=stage)(pixels())
    hidden, attention, keys, averaged = stage.noted
    torch.testing.assert_close(hidden, expected.hidden_states[-2])
    torch.testing.assert_close(attention, expected.attentions[layer][:, :, 0, 1:].mean(1))
    assert attention.std() > 1e-3
    key_BNC = projected[0][:, 1:]
    torch.testing.assert_close(keys, key_BNC / key_BNC.norm(dim=-1, keepdim=True))
    mean_BNE = (key_BNC[..., :16] + key_BNC[..., 16:]) / 2  # two heads of 16
    torch.testing.assert_close(averaged, mean_BNE / mean_BNE.norm(dim=-1, keepdim=True))


def test_a_look_at_another_layer_would_be_seen(model: LlavaForConditionalGeneration):
    first, second = Noting(0), Noting(1)
    with torch.inference_mode():
        encoder_with(model, noting=first)(pixels())
        encoder_with(model, noting=second)(pixels())
    assert (first.noted[1] - second.noted[1]).abs().max() > 1e-3


def test_a_stage_of_the_tower_stands_before_the_projector(model: LlavaForConditionalGeneration):
    with torch.inference_mode():
        whole = encoder_with(model)(pixels())
        half = encoder_with(model, noting=Noting(1))(pixels())
    assert whole.shape == (2, NUM_VISION_TOKENS, 64)
    torch.testing.assert_close(half, whole[:, ::2])


def test_other_stages_stand_behind_it(model: LlavaForConditionalGeneration):
    with torch.inference_mode():
        half = encoder_with(model, noting=Noting(1))(pixels())
        found = encoder_with(model, noting=Noting(1), farthest=FarthestPoints(3))(pixels())
    torch.testing.assert_close(found, FarthestPoints(3)(half))


def test_marks_are_where_the_index_points():
    index = torch.tensor([[0, 3], [1, 2]])
    assert marked(index, torch.ones(2, 4)).tolist() == [[1, 0, 0, 1], [0, 1, 1, 0]]


@pytest.mark.parametrize(("feature_layer", "layers"), [(-2, 2), (-1, 3), (1, 1), (0, None), (-4, None)])
def test_llava15_says_in_how_many_layers_its_class_token_can_be_read(feature_layer: int, layers: int | None):
    config = tiny_config()
    assert isinstance(config, LlavaConfig)
    assert isinstance(config.vision_config, CLIPVisionConfig)
    config.vision_feature_layer = feature_layer
    assert load_family("llava15").spec(config).class_token_layers == layers
