"""OpenVINO GenAI: its own pipeline, from an image in bytes and a prompt in words."""

import time
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from openvino_files import convert, model_files
from serving import Model, Run, Task, serve

_WORD = " a"


class GenAi(Model):
    """A ``VLMPipeline``; tokens are thinned by its own ``pruning_ratio`` where not all are kept."""

    version = f"openvino-genai {genai.__version__.partition('-')[0]}"

    def __init__(self, task: Task) -> None:
        scheduler = genai.SchedulerConfig()
        # The same question again would be answered from its cache.
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = 2**31 - 1
        self._pipe: Any = genai.VLMPipeline(
            task.folder, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=task.threads
        )
        self._image = ov.Tensor(np.load(task.image)[None])
        self._pruned = task.kept is not None
        self._keep = 1.0 if task.kept is None else len(task.kept) / task.vision_tokens
        self._task, self._prompt = task, ""
        pruned, self._pruned = self._pruned, False
        self._set_prompt(len(task.before) + len(task.after) + task.vision_tokens)
        self._pruned = pruned
        self.files = model_files(task.folder)
        if self._pruned:
            self._require_effect()

    def run(self, new_tokens: int) -> Run:
        start = time.perf_counter()
        metrics = self._generate(new_tokens + 1).perf_metrics
        wall_ms = 1000 * (time.perf_counter() - start)
        ttft_ms, step_ms = metrics.get_ttft().mean, metrics.get_tpot().mean
        if metrics.get_num_generated_tokens() != new_tokens + 1:
            raise ValueError(f"it made {metrics.get_num_generated_tokens()} tokens, not {new_tokens + 1}")
        vision_ms = metrics.get_prepare_embeddings_duration().mean
        # What it does before and after its own clock runs is part of the answer.
        ttft_ms += max(0.0, wall_ms - ttft_ms - step_ms * new_tokens)
        return Run(
            vision_ms=vision_ms,
            prefill_ms=ttft_ms - vision_ms,
            ttft_ms=ttft_ms,
            decode_ms_per_token=step_ms,
        )

    def _require_effect(self) -> None:
        """Refuse to be measured with a pruning that does nothing, which the pipeline does not tell."""
        thinned, self._pruned = self._num_read(), False
        whole, self._pruned = self._num_read(), True
        if thinned == whole:
            raise ValueError(f"its pruning_ratio has no effect on LLaVA: {whole} tokens are read all the same")

    def _set_prompt(self, tokens: int) -> None:
        """Find words that make so many tokens, the image and what the pipeline adds included."""
        count = self._task.max_tokens - self._task.vision_tokens
        for _ in range(2):
            self._prompt = "<image>\n" + _WORD * count
            count += tokens - self._num_read()
        if self._num_read() != tokens:
            raise ValueError(f"no prompt of {tokens} tokens is found for its tokenizer, only one of {self._num_read()}")

    def _num_read(self) -> int:
        return self._generate(1).perf_metrics.get_num_input_tokens()

    def _generate(self, new_tokens: int) -> Any:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        if self._pruned:
            config.pruning_ratio = round(100 * (1 - self._keep))
        return self._pipe.generate(self._prompt, images=[self._image], generation_config=config)


def _open(task: Task) -> Model:
    return GenAi(task)


if __name__ == "__main__":
    serve(convert, _open)
