"""An artefact as a model of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), for the standard benchmarks.

```console
$ pip install 'tokexport[cpu,eval]'
$ lmms-eval --model tokexport --model_args pretrained=out/llava --tasks mme --batch_size 1
```

lmms-eval finds it by the entry point ``lmms_eval.models`` of the package, see ``manifest``. The module can be imported
without lmms-eval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from tokexport.engines.backend import DEFAULT_BACKEND, Source
from tokexport.engines.generate import Sampling
from tokexport.engines.model import Vlm, load
from tokexport.errors import BackendUnavailableError, InputError

MODEL_ID = "tokexport"

_MISSING = "lmms-eval is not installed; install it with: pip install 'tokexport[eval]'"
_GREEDY = Sampling()
_IMAGE_MARK = "<image>"
# What the models of lmms-eval take where a task does not say.
_MAX_NEW_TOKENS = 1024
# Settings of tasks that change nothing at these values.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "num_beams": (1, None),
    "repetition_penalty": (1, None),
    "image_aspect_ratio": ("original", None),
    "use_cache": (True, None),
}


def _lmms_eval(module: str) -> Any:
    try:
        return import_module(f"lmms_eval.{module}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "lmms_eval":
            raise
        raise BackendUnavailableError(_MISSING) from error


def _base_class() -> Any:
    try:
        return _lmms_eval("api.model").lmms
    except BackendUnavailableError:
        return object


# The class has to be one of lmms-eval's where that is installed, and the module has to be importable where not.
_Base: Any = _base_class()


@dataclass(frozen=True, kw_only=True)
class Request:
    """How one answer is generated, read from a task's ``generation_kwargs``."""

    max_new_tokens: int = _MAX_NEW_TOKENS
    until: tuple[str, ...] = ()
    sampling: Sampling = _GREEDY

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> "Request":
        """Read a task's settings; what cannot be followed is refused.

        Raises:
            InputError: a setting that an artefact cannot follow.
        """
        known = {"max_new_tokens", "until", "do_sample", "temperature", "top_p", "top_k"}
        for name, value in settings.items():
            if name not in known and value not in _NEUTRAL.get(name, ()):
                raise InputError(
                    f"the task sets {name} = {value!r}, which an artefact cannot follow; remove it with --gen_kwargs "
                    "or choose another task"
                )
        until = settings.get("until") or ()
        return cls(
            max_new_tokens=int(settings.get("max_new_tokens") or _MAX_NEW_TOKENS),
            until=(until,) if isinstance(until, str) else tuple(mark for mark in until if mark),
            sampling=_sampling(settings),
        )

    def answer(self, vlm: Vlm, context: str, images: Sequence[Image.Image]) -> str:
        """Return what an artefact answers, up to the first stop text."""
        chat = vlm.chat(max_new_tokens=self.max_new_tokens, sampling=self.sampling)
        text = ""
        for piece in chat.stream(context.replace(_IMAGE_MARK, " ").strip(), images):
            text += piece
            ends = [place for mark in self.until if (place := text.find(mark)) >= 0]
            if ends:
                return text[: min(ends)].strip()
        return text.strip()


class TokexportModel(_Base):
    """An artefact; images stand before the text of a prompt.

    Args:
        pretrained: the artefact's directory.
        backend: the engine.
        threads: CPU threads, None for as many as there are cores.
        max_text_tokens: room for a prompt and its answer, None for the recipe's.
        max_images: room for images, None for the recipe's.
        model: the checkpoint, for engines that run from it and if it has moved.
        adapter: its adapter, likewise.
        batch_size: 1.
        max_batch_size: without effect at a batch size of 1.
        device: without effect, as the engine decides where it runs.

    Raises:
        BackendUnavailableError: lmms-eval is not installed.
        InputError: a batch size other than 1.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        backend: str = DEFAULT_BACKEND,
        threads: int | None = None,
        max_text_tokens: int | None = None,
        max_images: int | None = None,
        model: str | None = None,
        adapter: str | None = None,
        compressor: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        if _Base is object:
            raise BackendUnavailableError(_MISSING)
        if int(batch_size) != 1:
            raise InputError(f"batch_size {batch_size} must be 1, an artefact holds one conversation at a time")
        super().__init__()
        self.vlm = load(
            Path(pretrained),
            backend=backend,
            threads=threads,
            max_text_tokens=max_text_tokens,
            max_images=max_images,
            source=Source(model=model, adapter=adapter, compressor=compressor),
        )

    @property
    def batch_size(self) -> int:
        """How many requests run at once."""
        return 1

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests, each with its task's images."""
        answers: list[str] = []
        for request in tqdm(requests, desc=MODEL_ID, disable=self.rank != 0):
            context, settings, images_of, number, task, split = request.args
            images = _images(images_of(self.task_dict[task][split][number]), task)
            answers.append(Request.parse(settings).answer(self.vlm, context, images))
            self.cache_hook.add_partial("generate_until", (context, settings), answers[-1])
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse: an artefact answers, it does not rate given answers."""
        raise _refusal("loglikelihood")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse: tasks decide what they ask next; ``tokexport eval`` measures several turns."""
        raise _refusal("generate_until_multi_round")


def manifest() -> Any:
    """Return what lmms-eval reads from the entry point: the name of the model and its class.

    Raises:
        BackendUnavailableError: lmms-eval is not installed.
    """
    return _lmms_eval("models.registry_v2").ModelManifest(
        model_id=MODEL_ID, simple_class_path=f"{__name__}.{TokexportModel.__name__}"
    )


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    temperature = float(settings.get("temperature") or 0)
    if temperature == 0 or settings.get("do_sample") is False:
        # Tasks often give top_p beside temperature 0, where it has no effect in any model.
        return _GREEDY
    top_p, top_k = settings.get("top_p"), settings.get("top_k")
    return Sampling(temperature=temperature, top_p=1.0 if top_p is None else float(top_p), top_k=int(top_k or 0))


def _images(found: Sequence[Any] | None, task: str) -> list[Image.Image]:
    images: list[Image.Image] = []
    for visual in found or ():
        if not isinstance(visual, Image.Image):
            raise InputError(f"task {task} shows a {type(visual).__name__}, and an artefact sees images only")
        images.append(visual)
    return images


def _refusal(kind: str) -> InputError:
    return InputError(
        f"an artefact answers requests of the kind 'generate_until', not {kind!r}; choose a task with that output_type"
    )
