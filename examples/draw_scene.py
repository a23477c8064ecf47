"""Draws the pictures of the demo, ``scene.png`` and ``shapes.png``: of these the mini model can read the second."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tokexport.dialogues.generate import make_dialogue

SIZE = (640, 480)
SUPERSAMPLING = 2
"""The scene is drawn this much larger and scaled down, for smooth edges."""


def draw_scene() -> Image.Image:
    """Return a picture of 640 x 480 pixels with five shapes and three letters on a lawn under a sky."""
    image = Image.new("RGB", (SIZE[0] * SUPERSAMPLING, SIZE[1] * SUPERSAMPLING), (186, 220, 240))
    draw = ImageDraw.Draw(image)
    draw.rectangle(_scaled(0, 330, 640, 480), fill=(112, 168, 92))
    draw.ellipse(_scaled(500, 30, 600, 130), fill=(250, 205, 60))
    draw.rectangle(_scaled(60, 220, 220, 380), fill=(205, 50, 45))
    draw.polygon(_scaled(40, 220, 140, 120, 240, 220), fill=(110, 70, 45))
    draw.ellipse(_scaled(280, 270, 400, 390), fill=(45, 85, 200))
    draw.polygon(_scaled(450, 390, 520, 240, 590, 390), fill=(120, 60, 160))
    font = ImageFont.load_default(size=64 * SUPERSAMPLING)
    for letter, x, y in (("A", 140, 300), ("B", 340, 330), ("C", 520, 350)):
        draw.text((x * SUPERSAMPLING, y * SUPERSAMPLING), letter, fill="white", font=font, anchor="mm")
    return image.resize(SIZE, Image.Resampling.LANCZOS)


def _scaled(*coordinates: int) -> tuple[int, ...]:
    return tuple(coordinate * SUPERSAMPLING for coordinate in coordinates)


if __name__ == "__main__":
    draw_scene().save(Path(__file__).with_name("scene.png"), optimize=True)
    shapes = make_dialogue(0, "test", 3).image
    assert isinstance(shapes, Image.Image)
    shapes.save(Path(__file__).with_name("shapes.png"), optimize=True)
