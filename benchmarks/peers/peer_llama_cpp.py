"""llama.cpp through cyllama, whose wheels hold the library: the language model in GGUF, tower and projector in a second
file (mtmd). It takes an image in bytes and has no pruning for LLaVA.
"""

import time
from collections.abc import Sequence
from typing import Any

import cyllama
import numpy as np
from cyllama.llama import llama_cpp
from gguf_files import VISION_FILE, convert, language_file
from serving import Model, Run, Task, serve


class LlamaCpp(Model):
    """A context of llama.cpp and one of mtmd."""

    version = f"cyllama {cyllama.__version__} (ggml {llama_cpp.ggml_version()}, {llama_cpp.ggml_commit()})"

    def __init__(self, task: Task) -> None:
        llama_cpp.disable_logging()
        llama_cpp.ggml_backend_load_all()
        self._model: Any = llama_cpp.LlamaModel(str(language_file(task)), llama_cpp.LlamaModelParams())
        options = llama_cpp.LlamaContextParams()
        options.n_ctx = options.n_batch = options.n_ubatch = task.max_tokens
        options.n_threads = options.n_threads_batch = task.threads
        self._context: Any = llama_cpp.LlamaContext(self._model, options)
        vision = llama_cpp.MtmdContextParams(use_gpu=False, print_timings=False, n_threads=task.threads)
        self._vision: Any = llama_cpp.MtmdContext(str(task.folder / VISION_FILE), self._model, vision)
        self._sampler: Any = llama_cpp.LlamaSampler()
        self._sampler.add_greedy()
        image = np.load(task.image)
        height, width, _ = image.shape
        self._bitmap = llama_cpp.MtmdBitmap.create_image(width, height, image.tobytes())
        self._task, self._length = task, 0
        if self._chunks().total_tokens != task.vision_tokens:
            raise ValueError(f"it makes {self._chunks().total_tokens} tokens of the image, not {task.vision_tokens}")
        self.files = [language_file(task), task.folder / VISION_FILE]

    def run(self, new_tokens: int) -> Run:
        # One call encodes the image and reads it, so that the tower alone is timed apart.
        start = time.perf_counter()
        for chunk in self._chunks():
            self._vision.encode_chunk(chunk)
        encoded = time.perf_counter()
        self._context.kv_cache_clear()
        self._length = 0
        self._read(self._task.before, with_logits=False)
        past, room = self._length, self._task.max_tokens
        self._length = self._vision.eval_chunks(self._context, self._chunks(), past, 0, room, False)
        self._read(self._task.after)
        tokens = [self._sampler.sample(self._context, -1)]
        prefilled = time.perf_counter()
        for _ in range(new_tokens):
            self._read(tokens[-1:])
            tokens.append(self._sampler.sample(self._context, -1))
        decoded = time.perf_counter()
        vision_ms, ttft_ms = 1000 * (encoded - start), 1000 * (prefilled - encoded)
        return Run(
            vision_ms=vision_ms,
            prefill_ms=ttft_ms - vision_ms,
            ttft_ms=ttft_ms,
            decode_ms_per_token=1000 * (decoded - prefilled) / new_tokens,
            tokens=tokens,
        )

    def _chunks(self) -> Any:
        """Return the image, resized and normalised, and nothing else."""
        marker = llama_cpp.get_default_media_marker()
        return self._vision.tokenize(marker, [self._bitmap], add_special=False, parse_special=True)

    def _read(self, tokens: Sequence[int], *, with_logits: bool = True) -> None:
        batch = llama_cpp.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
        for place, token in enumerate(tokens):
            batch.add(token, self._length + place, [0], with_logits and place == len(tokens) - 1)
        self._context.decode(batch)
        self._length += len(tokens)


def _open(task: Task) -> Model:
    return LlamaCpp(task)


if __name__ == "__main__":
    serve(convert, _open)
