"""LoRA on the language model with a recipe's bottlenecks in place, whatever these are."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tokexport.errors import CheckpointError, TrainingError
from tokexport.exporter.bundled import local_directory
from tokexport.exporter.checkpoint import Model, fingerprint, open_weights
from tokexport.exporter.export import Design
from tokexport.training.compressed import CompressedLlava, Thinning
from tokexport.training.frozen import load_llava, without_adapter
from tokexport.training.loop import Listener, Schedule, attention_for, fit, make_accelerator
from tokexport.training.tuning_data import Material

try:
    from peft import (
        LoraConfig,
        PeftConfig,
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )
except ImportError as error:
    raise TrainingError("tuning needs the package peft; install it with: pip install 'tokexport[train]'") from error

# The share of the steps that is trained at the recipe's keeps; the rest is split evenly over what comes before.
_LAST_SHARE = 0.5
ADAPTER_FILE = "adapter_model.safetensors"
_LINEAR_LAYERS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True, kw_only=True)
class LoraTuning:
    """How a model is tuned to a recipe.

    Attributes:
        schedule: how long and how fast.
        rank: of the LoRA matrices; alpha is twice that.
        gradient_checkpointing: compute activations twice to save memory.
        seed: of the LoRA matrices.
        start: directory or name of an adapter of this rank or a lower one to go on from, such as that of a milder
            recipe.
    """

    schedule: Schedule
    rank: int = 16
    gradient_checkpointing: bool = False
    seed: int = 0
    start: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise TrainingError(f"rank = {self.rank} must be at least 1")


def tune_lora(
    made: Design,
    material: Material,
    tuning: LoraTuning,
    folder: Path,
    *,
    stages: Sequence[Mapping[int, Thinning]],
    run_name: str,
    settings: Mapping[str, Any],
    listener: Listener | None = None,
) -> Path:
    """Tune a model and store the adapter.

    Args:
        made: the recipe, checked against its model.
        material: what to learn from.
        tuning: how.
        folder: where checkpoint, log and adapter go.
        stages: what stands before which layer, one after the other; of several, the last takes half of the steps.
        run_name: stands in the log.
        settings: everything else that makes this run what it is.
        listener: told how it goes.

    Returns:
        The adapter's directory, in PEFT's format.

    Raises:
        CheckpointError: the adapter to start from does not fit.
        TrainingError: see ``fit``.
    """
    torch.manual_seed(tuning.seed)
    llava, accelerator = load_llava(without_adapter(made.model)), make_accelerator()
    llava.set_attn_implementation(attention_for(accelerator.device))
    config = LoraConfig(r=tuning.rank, lora_alpha=2 * tuning.rank, target_modules=_LINEAR_LAYERS)
    with warnings.catch_warnings():
        # PEFT asks transformers in an older way.
        warnings.simplefilter("ignore", FutureWarning)
        tuned: Any = get_peft_model(llava, config)
    if tuning.start is not None:
        _take_over(tuned, made, tuning.start)
    model = CompressedLlava(tuned.base_model.model, stages[0])
    if tuning.gradient_checkpointing:
        llava.activation_checkpointing_enable()
        llava.enable_input_require_grads()
    length = tuning.schedule.num_steps

    def narrow(step: int) -> None:
        model.thinnings = stages[stage_at(step / length, len(stages))]

    fit(
        material.objective_of(model),
        material.examples,
        tuning.schedule,
        folder,
        stage=run_name,
        settings={
            "rank": tuning.rank,
            "seed": tuning.seed,
            "start": tuning.start and fingerprint(_with_adapter(made, tuning.start))[:12],
            "model": fingerprint(without_adapter(made.model))[:12],
            "data": material.name,
            **settings,
        },
        collate=material.collate,
        before_step=narrow,
        listener=listener,
    )
    if accelerator.is_main_process:
        _store(tuned, folder / "adapter", made.model.table.checkpoint)
    accelerator.wait_for_everyone()
    return folder / "adapter"


def _take_over(tuned: Any, made: Design, start: str) -> None:
    """Fill LoRA matrices with those of an adapter; what a higher rank adds changes nothing yet."""
    directory = local_directory(start)
    if directory is None:
        raise CheckpointError(
            f"there is no adapter directory {start}; give --start a directory, or the name of an adapter that ships"
        )
    open_weights(_with_adapter(made, start))  # names what does not fit
    config: Any = PeftConfig.from_pretrained(str(directory))
    own = tuned.peft_config["default"]
    stored, filled = load_file(directory / ADAPTER_FILE), get_peft_model_state_dict(tuned, save_embedding_layers=False)
    # A product of matrices is scaled by alpha over rank, the same in all that these trainings make.
    is_alike = config.lora_alpha * own.r == own.lora_alpha * config.r and stored.keys() == filled.keys()
    if config.r > own.r or not is_alike:
        raise TrainingError(
            f"the adapter {start} has rank and alpha {config.r, config.lora_alpha} on {len(stored) // 2} matrices, "
            f"expected at most {own.r, own.lora_alpha} on all of the language model's; start from one made by "
            "'tokexport train adsc' or 'relevance-adapter' with the same --rank or a lower one, or leave --start out"
        )
    # Of both factors: A starts at random and B at zero, so what stays of them adds nothing.
    for name, tensor in stored.items():
        filled[name] = filled[name].clone()
        filled[name][tuple(slice(size) for size in tensor.shape)] = tensor
    set_peft_model_state_dict(tuned, filled)


def _with_adapter(made: Design, adapter: str) -> Model:
    return replace(made.model, table=replace(made.model.table, adapter=adapter))


def _store(tuned: Any, folder: Path, checkpoint: str) -> None:
    tuned.peft_config["default"].base_model_name_or_path = checkpoint
    try:
        # As fine as the weights that they are merged into.
        weights = {name: tensor.half() for name, tensor in tuned.state_dict().items() if ".lora_" in name}
        # Embeddings were not tuned; to find that out, PEFT would ask the hub for the base model.
        tuned.save_pretrained(folder, save_embedding_layers=False, state_dict=weights)
        # A card to fill in, about nothing.
        (folder / "README.md").unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{folder} cannot be written ({error}); free some room or choose another folder") from error


def stage_at(done: float, num_stages: int) -> int:
    """Return the stage of a curriculum after a share of the steps."""
    if num_stages == 1 or done >= 1 - _LAST_SHARE:
        return num_stages - 1
    return int(done / (1 - _LAST_SHARE) * (num_stages - 1))
