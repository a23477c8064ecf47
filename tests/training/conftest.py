"""Conversations about small images and the tiny model's weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tests.conftest import IMAGE_SIZE, MINI, NUM_VISION_TOKENS
from tokexport.training.conversation import ConversationEncoder

Turns = tuple[tuple[str, str], ...]

TURNS: Turns = (
    ("What is the colour of the star?", "red"),
    ("How many letters are there?", "3"),
    ("Is there a circle?", "no"),
)


@pytest.fixture(scope="session")
def processor(checkpoint: Path) -> Any:
    return LlavaProcessor.from_pretrained(checkpoint)


@pytest.fixture
def own_processor() -> Any:
    """Return a processor that a test may change."""
    return LlavaProcessor.from_pretrained(MINI)


@pytest.fixture(scope="session")
def encoder(processor: Any) -> ConversationEncoder:
    return ConversationEncoder(processor, NUM_VISION_TOKENS)


@pytest.fixture
def llava(checkpoint: Path) -> LlavaForConditionalGeneration:
    """Return the tiny model in fp32; a test may change it."""
    return LlavaForConditionalGeneration.from_pretrained(checkpoint)


def write_llava_data(folder: Path, num: int = 4) -> tuple[Path, Path]:
    """Write conversations in LLaVA's format and a folder of images; every third conversation is about none."""
    images = folder / "images"
    images.mkdir(parents=True)
    entries: list[dict[str, Any]] = []
    for number in range(num):
        question, answer = TURNS[number % len(TURNS)]
        said = [question, answer, "And what else?", f"number {number}"]
        entry: dict[str, Any] = {"id": str(number)}
        if number % 3 != 2:
            said[0] = f"<image>\n{question}"
            entry["image"] = f"{number}.png"
            noise = np.random.default_rng(number).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE + 9, 3), np.uint8)
            Image.fromarray(noise).save(images / entry["image"])
        entry["conversations"] = [
            {"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(said)
        ]
        entries.append(entry)
    path = folder / "data.json"
    path.write_text(json.dumps(entries))
    return path, images
