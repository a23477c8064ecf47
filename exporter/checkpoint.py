"""From a recipe's [model] table to a model: its configuration, sizes and weights."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from tokexport.errors import CheckpointError
from tokexport.exporter.family import Family, load_family
from tokexport.exporter.plan import VlmSpec
from tokexport.exporter.weights import (
    RandomWeights,
    SafetensorsWeights,
    TiedWeights,
    Weights,
    check_shapes,
    merge_adapter,
)
from tokexport.recipes.schema import ModelTable

BUNDLED_MODEL = "mini"
_FINGERPRINT_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that is described but not loaded.

    Attributes:
        table: the recipe's table it was made from.
        directory: where configuration, tokenizer and processor lie.
        num_layers_before_cut: decoder layers before ``num_layers`` cut them.
    """

    table: ModelTable
    family: Family
    config: PreTrainedConfig
    spec: VlmSpec
    directory: Path
    num_layers_before_cut: int


def describe_model(table: ModelTable) -> Model:
    """Read everything about a model but its weights.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of another architecture.
        RecipeError: unknown family or configuration key.
    """
    family = load_family(table.family)
    if table.weights == "random":
        directory = _local_directory(table.checkpoint) or _bundled(BUNDLED_MODEL)
        is_own = _local_directory(table.checkpoint) is not None
        config = family.make_config(family.read_config(directory) if is_own else None, table.architecture)
    else:
        directory = checkpoint_directory(table.checkpoint)
        config = family.read_config(directory)
    before = family.spec(config).num_layers
    if table.num_layers is not None:
        if table.num_layers > before:
            raise CheckpointError(
                f"num_layers = {table.num_layers} is more than the {before} decoder layers of "
                f"{table.checkpoint}; choose a smaller number"
            )
        config = family.make_config(config, family.layer_change(table.num_layers))
    return Model(
        table=table,
        family=family,
        config=config,
        spec=family.spec(config),
        directory=directory,
        num_layers_before_cut=before,
    )


def describe_for_plan(table: ModelTable) -> Model:
    """Like ``describe_model``, but a checkpoint that is not on this machine is described by the recipe alone."""
    if table.weights == "checkpoint" and _local_directory(table.checkpoint) is None and table.architecture:
        table = ModelTable(
            family=table.family, checkpoint=table.checkpoint, weights="random", architecture=table.architecture
        )
    return describe_model(table)


def open_weights(model: Model) -> Weights:
    """Open the weights of a model and check them against its configuration.

    Raises:
        CheckpointError: weights are missing, damaged, surplus or of the wrong shape.
    """
    expected = expected_shapes(model)
    if model.table.weights == "random":
        weights: Weights = RandomWeights(expected, model.table.seed)
    else:
        weights = SafetensorsWeights(model.directory, model.family.canonical_name)
    head, embedding = model.family.head, model.family.embedding
    is_tied = model.config.tie_word_embeddings or getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if is_tied and head not in weights.shapes and embedding in weights.shapes:
        weights = TiedWeights(weights, head, embedding)
    check_shapes(weights, expected, model.table.checkpoint)
    if model.table.adapter is not None:
        weights = merge_adapter(weights, Path(model.table.adapter), model.family.canonical_name)
    return weights


def expected_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Return every tensor of the ``transformers`` model with its shape; nothing is allocated."""
    with torch.device("meta"):
        reference = model.family.reference_model(model.config)
    return {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}


def fingerprint(model: Model) -> str:
    """Return a SHA-256 that tells checkpoints apart without reading gigabytes.

    It covers the configuration and, of every weight file, name, size, first and last mebibyte; for
    random weights the seed.
    """
    digest = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    if model.table.weights == "random":
        digest.update(f"random {model.table.seed}".encode())
        return digest.hexdigest()
    adapter = [Path(model.table.adapter)] if model.table.adapter else []
    for directory in [model.directory, *adapter]:
        for path in sorted(directory.glob("*.safetensors")):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(_FINGERPRINT_BYTES))
                file.seek(max(0, path.stat().st_size - _FINGERPRINT_BYTES))
                digest.update(file.read())
    return digest.hexdigest()


def checkpoint_directory(name: str) -> Path:
    """Return the directory of a bundled model, a path, or a hub id (fetched if need be).

    Raises:
        CheckpointError: there is no such thing.
    """
    local = _local_directory(name)
    if local is not None:
        return local
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"there is no model directory {name}; give a directory, a hub id like "
            f"llava-hf/llava-1.5-7b-hf, or {BUNDLED_MODEL}"
        )
    return _from_hub(name)


def processor_files(directory: Path) -> Sequence[Path]:
    """Return the tokenizer, processor and chat template files of a checkpoint."""
    patterns = (
        "tokenizer*",
        "*processor_config.json",
        "chat_template*",
        "special_tokens_map.json",
        "added_tokens.json",
        "generation_config.json",
    )
    return sorted({path for pattern in patterns for path in directory.glob(pattern)})


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{name} is no directory here and cannot be fetched from the hub ({reason}); give --model DIR with a "
            "downloaded checkpoint, or --weights random for its architecture alone"
        ) from error


def _local_directory(name: str) -> Path | None:
    if name == BUNDLED_MODEL:
        return _bundled(name)
    path = Path(name).expanduser()
    return path if path.is_dir() else None


def _bundled(name: str) -> Path:
    return Path(str(resources.files("tokexport.recipes"))) / "models" / name
