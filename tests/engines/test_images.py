"""Image files of every kind: read as a person sees them, or refused in one line."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from skimage import data

from tokexport.engines.images import load_image
from tokexport.engines.model import load
from tokexport.errors import InputError
from tokexport.exporter.bundle import Bundle

Colour = tuple[int, int, int]
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
ORIENTATION = 0x0112


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def read(path: Path) -> NDArray[np.uint8]:
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def halves(left: Colour, right: Colour) -> Image.Image:
    """Return an image of 8 x 4 pixels in two colours."""
    image = Image.new("RGB", (8, 4), left)
    image.paste(right, (4, 0, 8, 4))
    return image


def ramp(dtype: str, scale: int) -> Image.Image:
    """Return greys from 0 to 255 times ``scale``, 16 x 16."""
    return Image.fromarray((np.arange(256).reshape(16, 16) * scale).astype(dtype))


def refusal(path: Path) -> str:
    """Return the text with which a file is refused."""
    with pytest.raises(InputError) as caught:
        load_image(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def test_rgb_is_read_as_it_is(tmp_path: Path):
    image = halves(RED, BLUE)
    assert (read(saved(tmp_path / "a.png", image)) == np.asarray(image)).all()


def test_transparency_lies_over_white(tmp_path: Path):
    image = Image.new("RGBA", (2, 1))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 0)])
    assert read(saved(tmp_path / "a.png", image)).tolist() == [[list(RED), list(WHITE)]]


def test_half_transparent_black_is_grey(tmp_path: Path):
    path = saved(tmp_path / "a.png", Image.new("RGBA", (1, 1), (0, 0, 0, 128)))
    assert read(path).tolist() == [[[127, 127, 127]]]


def test_transparent_grey_lies_over_white(tmp_path: Path):
    image = Image.new("LA", (2, 1))
    image.putdata([(80, 255), (80, 0)])
    assert read(saved(tmp_path / "a.png", image)).tolist() == [[[80] * 3, list(WHITE)]]


def test_the_transparent_colour_of_a_palette_is_white(tmp_path: Path):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putdata([0, 1])
    path = saved(tmp_path / "a.png", image, transparency=1)
    assert read(path).tolist() == [[list(RED), list(WHITE)]]


def test_a_palette_without_transparency_gives_its_colours(tmp_path: Path):
    path = saved(tmp_path / "a.png", halves(RED, BLUE).convert("P"))
    assert (read(path)[0, [0, 7]] == [RED, BLUE]).all()


def test_grey_becomes_three_equal_channels(tmp_path: Path):
    found = read(saved(tmp_path / "a.png", ramp("uint8", 1)))
    assert (found == np.arange(256).reshape(16, 16, 1)).all()


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path):
    path = saved(tmp_path / "a.png", ramp("uint16", 257))
    with Image.open(path) as image:
        assert image.mode == "I;16"
    assert (read(path) == np.arange(256).reshape(16, 16, 1)).all()


def test_a_16_bit_tiff_is_scaled_and_not_clipped(tmp_path: Path):
    found = read(saved(tmp_path / "a.tiff", ramp("uint16", 257)))
    assert (found == np.arange(256).reshape(16, 16, 1)).all()


def test_one_bit_is_black_and_white(tmp_path: Path):
    image = Image.new("1", (2, 1))
    image.putdata([0, 1])
    assert read(saved(tmp_path / "a.png", image)).tolist() == [[[0] * 3, [255] * 3]]


def test_a_cmyk_jpeg_has_the_colours_that_are_printed(tmp_path: Path):
    path = saved(tmp_path / "a.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=95)
    assert np.abs(read(path).astype(int) - RED).max() <= 6


@pytest.mark.parametrize(
    ("orientation", "size", "corner"),
    [(1, (8, 4), RED), (3, (8, 4), BLUE), (6, (4, 8), RED), (8, (4, 8), BLUE)],
    ids=["upright", "upside down", "turned right", "turned left"],
)
def test_a_photograph_is_turned_upright(tmp_path: Path, orientation: int, size: tuple[int, int], corner: Colour):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = halves(RED, BLUE).resize((64, 32), Image.Resampling.NEAREST)
    found = read(saved(tmp_path / "a.jpg", image, exif=exif, quality=95))
    assert found.shape[:2] == (8 * size[1], 8 * size[0])
    assert np.abs(found[0, 0].astype(int) - corner).max() <= 6


def test_one_pixel_is_enough(tmp_path: Path):
    assert read(saved(tmp_path / "a.png", Image.new("RGB", (1, 1), GREEN))).tolist() == [[list(GREEN)]]


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN, BLUE)]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:], duration=100)
    assert (read(path) == RED).all()


@pytest.mark.parametrize("suffix", ["webp", "bmp", "tiff", "ppm"])
def test_other_common_formats_are_read(tmp_path: Path, suffix: str):
    options: dict[str, object] = {"lossless": True} if suffix == "webp" else {}
    image = halves(RED, BLUE)
    assert (read(saved(tmp_path / f"a.{suffix}", image, **options)) == np.asarray(image)).all()


def test_a_wrong_ending_does_not_matter(tmp_path: Path):
    assert (read(saved(tmp_path / "a.jpg", halves(RED, BLUE), format="PNG"))[0, 0] == RED).all()


def test_a_wide_panorama_is_read(tmp_path: Path):
    path = saved(tmp_path / "a.png", Image.new("L", (20000, 300)))
    assert read(path).shape == (300, 20000, 3)


@pytest.mark.parametrize("size", [(20000, 10), (10, 20000)], ids=["wide", "high"])
def test_a_line_is_refused_with_its_size(tmp_path: Path, size: tuple[int, int]):
    text = refusal(saved(tmp_path / "a.png", Image.new("L", size)))
    assert f"is {size[0]} x {size[1]} pixels, narrower than 1:100; crop it first" in text


@pytest.mark.parametrize("size", [(15000, 12000), (20000, 20000)], ids=["180 million", "400 million"])
def test_an_image_too_large_for_memory_is_refused(tmp_path: Path, size: tuple[int, int]):
    text = refusal(saved(tmp_path / "a.png", Image.new("1", size)))
    assert "is too large (Image size (" in text
    assert text.endswith("; scale it down first")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp"])
@pytest.mark.parametrize("part", [0.5, 0.9])
def test_a_truncated_image_is_refused(tmp_path: Path, suffix: str, part: float):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    assert re.search(r"is damaged or truncated \(.+\); fetch it again$", refusal(path))


def test_a_png_with_a_flipped_byte_is_refused(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = saved(tmp_path / "a.png", Image.fromarray(noise))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert "is damaged or truncated" in refusal(path)


@pytest.mark.parametrize("content", [b"not an image\n", b""], ids=["text", "empty"])
def test_a_file_that_is_no_image_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert refusal(path).endswith("is no image that can be read; give a PNG, JPEG, WebP or another common format")


def test_a_missing_file_is_refused(tmp_path: Path):
    assert refusal(tmp_path / "a.png").startswith("there is no image ")


def test_a_directory_is_refused(tmp_path: Path):
    assert refusal(tmp_path).endswith("cannot be read (Is a directory); give the path of an image file")


def test_a_path_below_a_file_is_not_called_damaged(tmp_path: Path):
    path = saved(tmp_path / "a.png", halves(RED, BLUE))
    assert "damaged" not in refusal(path / "b.png")


def test_a_name_that_no_file_can_have_is_not_called_damaged(tmp_path: Path):
    assert "damaged" not in refusal(tmp_path / ("a" * 300 + ".png"))


@pytest.mark.parametrize("name", ["astronaut", "camera"], ids=["colour", "grey"])
def test_a_photograph_is_answered_end_to_end(tmp_path: Path, tiny_adsc: Bundle, name: str):
    photograph = np.asarray(getattr(data, name)())
    path = saved(tmp_path / "photograph.png", Image.fromarray(photograph))
    answer = load(tiny_adsc.path).generate("What is in the picture?", [path], max_new_tokens=3)
    assert 0 < len(answer.token_ids) <= 3


def test_another_photograph_gives_another_answer(tiny_adsc: Bundle, tmp_path: Path):
    vlm = load(tiny_adsc.path)
    paths = [
        saved(tmp_path / f"{name}.png", Image.fromarray(np.asarray(getattr(data, name)())))
        for name in ("astronaut", "coffee")
    ]
    answers = [vlm.generate("What is in the picture?", [path], max_new_tokens=8).token_ids for path in paths]
    assert answers[0] != answers[1]
