"""A model with its trained weights, to tune or to teach with."""

from dataclasses import replace
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from tokexport.exporter.checkpoint import Model, open_weights
from tokexport.training.progress_bars import without_progress_bars


def load_llava(model: Model) -> LlavaForConditionalGeneration:
    """Return a model with its weights, an adapter merged; in bfloat16 on a GPU.

    Raises:
        CheckpointError: the weights do not fit.
    """
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    weights = open_weights(model)  # names what does not fit
    if model.table.weights == "checkpoint" and model.table.adapter is None:
        with without_progress_bars():
            llava: Any = LlavaForConditionalGeneration.from_pretrained(model.directory, dtype=dtype)
        return llava
    llava = model.family.reference_model(model.config)
    llava.load_state_dict({name: weights.load(name) for name in weights.shapes}, strict=False)
    return llava.to(dtype)


def without_adapter(model: Model) -> Model:
    """Return the model as it was before its adapter."""
    return replace(model, table=replace(model.table, adapter=None))
