"""``transformers``: the checkpoint as it is, with its fused attention, driven step by step; also compiled."""

import inspect
from typing import Any

import torch
import transformers
from serving import Model, StepwiseModel, Task, serve
from transformers import DynamicCache, LlavaForConditionalGeneration, StaticCache


class Transformers(StepwiseModel):
    """A ``LlavaForConditionalGeneration`` with its cache: growing, or of a fixed size where it is compiled."""

    version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def __init__(self, task: Task) -> None:
        torch.set_num_threads(task.threads)
        dtype, _, compiled = task.variant.partition("-")
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        loaded: Any = LlavaForConditionalGeneration.from_pretrained(
            task.checkpoint, dtype=self._dtype, attn_implementation="sdpa", output_loading_info=True
        )
        model, loading = loaded
        wrong = {name: sorted(keys) for name, keys in loading.items() if keys}
        if wrong:
            raise ValueError(f"the checkpoint was not loaded as it is: {wrong}")
        self._model: Any = model.eval().requires_grad_(False)
        self._language: Any = self._model.model.language_model
        self._is_compiled = bool(compiled)
        self._call = torch.compile(self._next, dynamic=False) if compiled else self._next
        self._pixels = _loaded(task.pixels).to(self._dtype)
        self._before, self._after = (torch.tensor([ids]) for ids in (task.before, task.after))
        self._max_tokens, self._length, self._cache = task.max_tokens, 0, None
        self._cache_name = "cache" if "cache" in inspect.signature(self._language.forward).parameters else _OLD_NAME
        self.files = sorted(task.checkpoint.glob("*.safetensors"))

    @torch.inference_mode()
    def encode(self) -> Any:
        features = self._model.model.get_image_features(pixel_values=self._pixels)
        return torch.stack(tuple(getattr(features, "pooler_output", features)))

    @torch.inference_mode()
    def prefill(self, features: Any) -> int:
        embed = self._model.get_input_embeddings()
        self._start()
        return self._run(torch.cat((embed(self._before), features, embed(self._after)), dim=1))

    @torch.inference_mode()
    def decode(self, token: int) -> int:
        return self._run(self._model.get_input_embeddings()(torch.tensor([[token]])))

    def _start(self) -> None:
        self._length = 0
        if not self._is_compiled:
            self._cache = DynamicCache()
        elif self._cache is None:  # compiled code is for this one
            self._cache = StaticCache(config=self._language.config, max_cache_len=self._max_tokens)
        else:
            self._cache.reset()

    def _run(self, embeds_1TD: Any) -> int:
        places = torch.arange(self._length, self._length + embeds_1TD.shape[1])[None]
        self._length += embeds_1TD.shape[1]
        return int(self._call(embeds_1TD, places, self._cache).argmax())

    def _next(self, embeds_1TD: Any, places_1T: Any, cache: Any) -> Any:
        output = self._language(
            inputs_embeds=embeds_1TD, position_ids=places_1T, use_cache=True, **{self._cache_name: cache}
        )
        return self._model.lm_head(output.last_hidden_state[:, -1])


_OLD_NAME = "past_key_values"


def _loaded(path: Any) -> Any:
    import numpy as np

    return torch.from_numpy(np.load(path))


def _prepare(_: Task) -> None:
    """Nothing has to be converted."""


def _open(task: Task) -> Model:
    return Transformers(task)


if __name__ == "__main__":
    serve(_prepare, _open)
