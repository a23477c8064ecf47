"""``transformers``, uncompressed, with its fused attention: the numerical truth and the baseline of every speed-up."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel

from tokexport.engines.backend import Array, Backend, DecoderStep, Session, SessionOptions
from tokexport.engines.environment import available_cores
from tokexport.engines.source import source_design
from tokexport.errors import BackendUnavailableError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.checkpoint import open_weights
from tokexport.exporter.export import Design
from tokexport.exporter.plan import TokenPlan


class Transformers(Backend):
    """The checkpoint in ``transformers``, all vision tokens kept."""

    runtime = "PyTorch"
    runs_graphs = False

    is_compressed = False

    def open(self, bundle: Bundle, options: SessionOptions) -> "TransformersSession":
        return TransformersSession(source_design(bundle, options.source), options)


class TransformersSession(Session):
    """A ``LlavaForConditionalGeneration`` driven step by step, with its own growing cache."""

    def __init__(self, made: Design, options: SessionOptions) -> None:
        super().__init__(made.model.spec, TokenPlan.uncompressed(made.model.spec), options)
        torch.set_num_threads(options.threads or available_cores())
        self._dtype = getattr(torch, made.recipe.export.dtype)
        self.model = load_reference(made)
        self._cache = DynamicCache()

    @torch.inference_mode()
    def encode_images(self, pixel_values: NDArray[np.float32]) -> Array:
        features = self._inner.get_image_features(
            pixel_values=torch.from_numpy(pixel_values).to(self._dtype)
        ).pooler_output
        return torch.stack(tuple(features)).float().numpy()

    @torch.inference_mode()
    def embed(self, input_ids: NDArray[np.int64]) -> Array:
        return self._inner.get_input_embeddings()(torch.from_numpy(input_ids)).float().numpy()

    @torch.inference_mode()
    def decode(self, step: DecoderStep) -> NDArray[np.float32]:
        parts = (step.prefix_embeds, step.image_features, step.suffix_embeds)
        embeds_BTD = torch.from_numpy(np.concatenate(parts, axis=1)).to(self._dtype)
        output = self._inner.language_model(
            inputs_embeds=embeds_BTD,
            position_ids=torch.from_numpy(step.position_ids),
            cache=self._cache,
            use_cache=True,
        )
        hidden_BQD = output.last_hidden_state.index_select(1, torch.from_numpy(step.logits_to_keep))
        return self.model.lm_head(hidden_BQD).float().numpy()

    def read_cache(self, layer: int, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        entry: Any = self._cache.layers[layer]
        return entry.keys[:, :, :length].float().numpy(), entry.values[:, :, :length].float().numpy()

    @property
    def kv_bytes(self) -> int:
        entries: list[Any] = list(self._cache.layers)
        return sum(entry.keys.nbytes + entry.values.nbytes for entry in entries if entry.keys is not None)

    def reset(self) -> None:
        self._cache = DynamicCache()

    @property
    def _inner(self) -> Any:
        return self.model.model


def load_reference(made: Design) -> PreTrainedModel:
    """Return the ``transformers`` model of a design, every weight loaded.

    Raises:
        BackendUnavailableError: it would not run with fused attention, so it would be no fair baseline.
    """
    weights = open_weights(made.model)
    with torch.device("meta"):
        model = made.model.family.reference_model(made.model.config)
    dtype = getattr(torch, made.recipe.export.dtype)
    model.load_state_dict({name: weights.load(name).to(dtype) for name in model.state_dict()}, strict=True, assign=True)
    model = _with_real_buffers(model, made)
    parts = (model.config.get_text_config(), model.config.vision_config)
    used = {str(getattr(part, "_attn_implementation", None)) for part in parts}
    if used != {"sdpa"}:
        raise BackendUnavailableError(f"transformers would run with the attention {sorted(used)}, expected sdpa")
    return model.eval().requires_grad_(False)


def _with_real_buffers(model: PreTrainedModel, made: Design) -> PreTrainedModel:
    """Give buffers that are computed, not stored, their values: they are lost on the meta device."""
    config = made.model.config
    family = made.model.family
    tiny = family.make_config(config, family.layer_change(1))
    source = dict(family.reference_model(tiny).named_buffers()) if _has_meta_buffers(model) else {}
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, source[name])
    return model


def _has_meta_buffers(model: PreTrainedModel) -> bool:
    return any(buffer.is_meta for buffer in model.buffers())
