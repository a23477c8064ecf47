"""What OpenVINO reads of a checkpoint: written by optimum-intel, as its documentation says to."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from serving import Task

LANGUAGE, EMBEDDING, VISION = (
    f"openvino_{name}_model" for name in ("language", "text_embeddings", "vision_embeddings")
)


def convert(task: Task) -> None:
    """Convert the checkpoint to ``task.variant`` (fp16, int8, int4), unless that was done before.

    Raises:
        RuntimeError: it cannot be converted; the last line of what was printed.
    """
    if task.folder.is_dir():
        return
    half = task.folder.with_name(f"{task.folder.name}.part")
    shutil.rmtree(half, ignore_errors=True)
    command = [sys.executable, "-c", "from optimum.commands.optimum_cli import main; main()", "export", "openvino"]
    command += ["--model", str(task.checkpoint), "--task", "image-text-to-text", "--weight-format", task.variant]
    if task.variant == "int4":
        command += ["--group-size", str(_group_size(task.checkpoint)), "--ratio", "1.0", "--sym"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, str(half)], capture_output=True, text=True, env=environment, check=False)
    print(done.stdout, done.stderr, file=sys.stderr)  # noqa: T201 - into the peer's log
    if done.returncode:
        raise RuntimeError(f"optimum-intel does not convert it: {(done.stderr.strip() or '-').splitlines()[-1]}")
    # Without this name GenAI takes another normalisation of the image, and says nothing.
    processor = json.loads((task.checkpoint / "processor_config.json").read_text())
    (half / "preprocessor_config.json").write_text(json.dumps(processor["image_processor"]))
    half.rename(task.folder)


def model_files(folder: Path) -> Sequence[Path]:
    """Return the files of the models that answer a question."""
    return [path for name in (LANGUAGE, EMBEDDING, VISION) for path in sorted(folder.glob(f"{name}.*"))]


def _group_size(checkpoint: Path) -> int:
    """Return the largest usual group that divides the inputs of every matrix of the language model."""
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    widths = (text["hidden_size"], text["intermediate_size"])
    return next(size for size in (128, 64, 32, 16) if not any(width % size for width in widths))
