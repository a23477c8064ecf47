"""Reading image files the way a person sees them."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tokexport.errors import InputError

# The processor scales the shorter side up to the model's; beyond these the result would not fit into memory.
_MAX_PIXELS = 178_956_970
_MAX_ASPECT = 100


def load_image(path: Path) -> Image.Image:
    """Read an image file as 8-bit RGB.

    Rotation from EXIF is applied, transparency is laid over white, 16-bit grey is scaled to 8 bits;
    of an animation the first frame is taken.

    Raises:
        InputError: no file, no image, a damaged one, or one too large or too narrow to process.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                _check_size(path, image)
                image.load()
                return _as_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise InputError(f"there is no image {path}; give the path of an image file") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory; give the path of an image file") from None
    except UnidentifiedImageError:
        raise InputError(
            f"{path} is no image that can be read; give a PNG, JPEG, WebP or another common format"
        ) from None
    except Image.DecompressionBombError:
        raise InputError(f"{path} has more than {_MAX_PIXELS:,} pixels; scale it down first") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path} is damaged or truncated ({error}); fetch it again") from error


def _check_size(path: Path, image: Image.Image) -> None:
    width, height = image.size
    if width * height > _MAX_PIXELS:
        raise InputError(f"{path} is {width} x {height} pixels, more than {_MAX_PIXELS:,} in all; scale it down first")
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise InputError(f"{path} is {width} x {height} pixels, narrower than 1:{_MAX_ASPECT}; crop it first")


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        scale = 255 / max(65535, values.max(initial=0))
        return Image.fromarray((values.clip(min=0) * scale).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")
