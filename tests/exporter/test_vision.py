"""The vision tower on a smaller image: matrices worked out by hand, and what ``transformers`` computes."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.conftest import tiny_config
from tokexport.exporter.modules.vision import ClipVisionEncoder, interpolation_matrix


@pytest.mark.parametrize(
    ("before", "after", "antialias", "expected"),
    [
        (2, 1, True, [[1 / 2, 1 / 2]]),
        (2, 1, False, [[1 / 2, 1 / 2]]),
        # Twice as wide a kernel with a = -1/2: distances of 1/4, 1/4, 3/4 and 5/4 weigh 111, 111, 29 and -9 of 128,
        # which are made to add up to one.
        (4, 2, True, [[111 / 242, 111 / 242, 29 / 242, -9 / 242], [-9 / 242, 29 / 242, 111 / 242, 111 / 242]]),
        # The kernel with a = -3/4: distances of 1/2 weigh 19/32, of 3/2 -3/32; those off the edge fall on it.
        (4, 2, False, [[16 / 32, 19 / 32, -3 / 32, 0], [0, -3 / 32, 19 / 32, 16 / 32]]),
        (3, 3, True, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    ],
)
def test_an_interpolation_matrix_has_the_weights_of_its_kernel(
    before: int, after: int, antialias: bool, expected: list[list[float]]
):
    torch.testing.assert_close(
        interpolation_matrix(before, after, antialias=antialias), torch.tensor(expected, dtype=torch.float32)
    )


@pytest.mark.parametrize("antialias", [True, False])
def test_an_even_image_stays_as_it_is(antialias: bool):
    matrix = interpolation_matrix(336, 168, antialias=antialias)
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(168))


@pytest.mark.parametrize(("image_size", "side"), [(56, 2), (56, 3), (336, 12), (336, 17), (340, 16)])
def test_the_tower_sees_what_transformers_sees_of_a_smaller_image(image_size: int, side: int):
    model, config = transformers_model(image_size)
    encoder = loaded(ClipVisionEncoder(config, (side, side), []), model)
    pixel_values = noise(image_size)
    with torch.inference_mode():
        expected = features_of(model, shrunk(pixel_values, side, "bicubic"))
        found = encoder(pixel_values)
    assert found.shape == (2, side**2, 64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_another_way_to_shrink_an_image_would_be_seen():
    model, config = transformers_model(56)
    encoder = loaded(ClipVisionEncoder(config, (3, 3), []), model)
    with torch.inference_mode():
        other = features_of(model, shrunk(noise(56), 3, "bilinear"))
        found = encoder(noise(56))
    assert (found - other).abs().max() > 1e-3


def test_the_whole_grid_leaves_the_image_alone():
    model, config = transformers_model(56)
    encoder = loaded(ClipVisionEncoder(config, (4, 4), []), model)
    assert not any(name.endswith(("rows_SH", "positions_GN")) for name, _ in encoder.named_buffers())


def noise(image_size: int) -> Tensor:
    return torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))


def shrunk(pixel_values: Tensor, side: int, mode: str) -> Tensor:
    """Return images of ``side`` x ``side`` patches."""
    return functional.interpolate(
        pixel_values, size=(14 * side, 14 * side), mode=mode, align_corners=False, antialias=True
    )


def transformers_model(image_size: int) -> tuple[LlavaForConditionalGeneration, LlavaConfig]:
    config = tiny_config()
    assert isinstance(config.vision_config, CLIPVisionConfig)
    config.vision_config.image_size = image_size
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval(), config


def loaded(encoder: ClipVisionEncoder, model: LlavaForConditionalGeneration) -> ClipVisionEncoder:
    """Give an encoder the weights of the model; the last layer of the tower has no place in it."""
    weights: Mapping[str, Tensor] = model.model.state_dict()
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    return encoder.eval()


def features_of(model: Any, pixel_values: Tensor) -> Tensor:
    """Return image features as LLaVA takes them, but with interpolated position embeddings."""
    inner = model.model
    output = inner.vision_tower(pixel_values, interpolate_pos_encoding=True, output_hidden_states=True)
    return inner.multi_modal_projector(output.hidden_states[-2][:, 1:])
