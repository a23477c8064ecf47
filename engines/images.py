"""Reading image files the way a person sees them."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tokexport.errors import InputError

# The processor scales the shorter side up to the model's; a narrower image would not fit into memory.
_MAX_ASPECT = 100


def load_image(path: Path) -> Image.Image:
    """Read an image file as 8-bit RGB; see ``as_rgb``. Of an animation the first frame is taken.

    Raises:
        InputError: no file, no image, a damaged one, or one too large or too narrow to process.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                _check_aspect(image, str(path))
                image.load()
                return as_rgb(image, str(path))
    except FileNotFoundError:
        raise InputError(f"there is no image {path}; give the path of an image file") from None
    except UnidentifiedImageError:
        raise InputError(
            f"{path} is no image that can be read; give a PNG, JPEG, WebP or another common format"
        ) from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} is too large ({error}); scale it down first") from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, OSError) and error.strerror is not None:
            raise InputError(f"{path} cannot be read ({error.strerror}); give the path of an image file") from error
        raise InputError(f"{path} is damaged or truncated ({error}); fetch it again") from error


def as_rgb(image: Image.Image, name: str) -> Image.Image:
    """Return an image as 8-bit RGB, the way a person sees it.

    Rotation from EXIF is applied, transparency is laid over white, 16-bit grey is scaled to 8 bits.

    Raises:
        InputError: it is too narrow to process; the text calls it ``name``.
    """
    _check_aspect(image, name)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        scale = 255 / max(65535, values.max(initial=0))
        return Image.fromarray((values.clip(min=0) * scale).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def _check_aspect(image: Image.Image, name: str) -> None:
    width, height = image.size
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise InputError(f"{name} is {width} x {height} pixels, narrower than 1:{_MAX_ASPECT}; crop it first")
