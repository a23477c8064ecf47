"""From a recipe's [model] table to a model: its configuration, sizes and weights."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from tokexport.errors import CheckpointError, RecipeError
from tokexport.exporter.bundled import BUNDLED, BUNDLED_MODEL, local_directory, settled
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
from tokexport.recipes.load import merged
from tokexport.recipes.schema import ModelTable

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

    The ``table`` of the result is resolved: paths are absolute, and a cut is part of the
    architecture, so that describing it again gives the same model.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of another architecture.
        RecipeError: unknown family or configuration key, or an architecture that the checkpoint contradicts.
    """
    family = load_family(table.family)
    local = local_directory(table.checkpoint)
    if table.weights == "random" and local is None and table.architecture:
        directory, config = BUNDLED / BUNDLED_MODEL, family.make_config(None, table.architecture)
    else:
        directory = local or _from_hub(table.checkpoint)
        config = family.read_config(directory)
        described = family.make_config(config, table.architecture)
        if table.weights == "checkpoint" and described.to_dict() != config.to_dict():
            raise RecipeError(
                f"[model.architecture] says something else than the config.json of {table.checkpoint}; remove it, or "
                "use random weights"
            )
        config = described
    before = family.spec(config).num_layers
    table = replace(table, checkpoint=settled(table.checkpoint), adapter=table.adapter and settled(table.adapter))
    if table.num_layers is not None:
        if table.num_layers > before:
            raise CheckpointError(
                f"num_layers = {table.num_layers} is more than the {before} decoder layers of "
                f"{table.checkpoint}; choose a smaller number"
            )
        change = family.layer_change(table.num_layers)
        config = family.make_config(config, change)
        table = replace(table, num_layers=None, architecture=merged(table.architecture, change))
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
    if table.weights == "checkpoint" and local_directory(table.checkpoint) is None and table.architecture:
        table = replace(table, weights="random")
    return describe_model(table)


def open_weights(model: Model) -> Weights:
    """Open the weights of a model and check them against its configuration.

    Raises:
        CheckpointError: weights or the adapter are missing, damaged, surplus or of the wrong shape.
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
        weights = merge_adapter(weights, _adapter_directory(model.table.adapter), model.family.canonical_name)
    return weights


def expected_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Return every tensor of the ``transformers`` model with its shape; nothing is allocated."""
    with torch.device("meta"):
        reference = model.family.reference_model(model.config)
    return {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}


def fingerprint(model: Model) -> str:
    """Return a SHA-256 that tells checkpoints apart without reading gigabytes.

    It covers the shape of every tensor, the seed of random weights or the configuration and weight
    files of a checkpoint, and an adapter's; of a weight file name, size, first and last mebibyte.

    Raises:
        CheckpointError: the adapter is not where it was.
    """
    digest = hashlib.sha256(repr(sorted(expected_shapes(model).items())).encode())
    if model.table.weights == "random":
        digest.update(f"random {model.table.seed}".encode())
    else:
        _add_files(digest, model.directory, "config.json")
    if model.table.adapter is not None:
        _add_files(digest, _adapter_directory(model.table.adapter), "adapter_config.json")
    return digest.hexdigest()


def _add_files(digest: Any, directory: Path, config: str) -> None:
    path = directory / config
    digest.update(path.read_bytes() if path.is_file() else b"")
    for path in sorted(directory.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_FINGERPRINT_BYTES))
            file.seek(max(0, path.stat().st_size - _FINGERPRINT_BYTES))
            digest.update(file.read())


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
    """Fetch a checkpoint by its hub id.

    Raises:
        CheckpointError: it is none, or cannot be fetched.
    """
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"there is no model directory {name}; give a directory, a hub id like "
            f"llava-hf/llava-1.5-7b-hf, or {BUNDLED_MODEL}"
        )
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


def _adapter_directory(name: str) -> Path:
    directory = local_directory(name)
    if directory is None:
        raise CheckpointError(f"there is no adapter directory {name}; say where it is with --adapter")
    return directory
