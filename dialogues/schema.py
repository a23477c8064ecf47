"""What a dialogue is: one image and the questions asked about it, in order."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question and every answer that counts as right; the first is the reference. Without a label there is none."""

    question: str
    answers: tuple[str, ...]
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """One image, in memory or on disk, and the turns about it."""

    name: str
    image: Path | Image.Image
    turns: tuple[Turn, ...]
