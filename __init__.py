"""tokexport: the compiler for token-compressed vision-language models.

```python
import tokexport

tokexport.build("mini_adsc", "out/mini_adsc")
vlm = tokexport.load("out/mini_adsc")
print(vlm.generate("What is in the picture?", ["scene.png"]).text)
```
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokexport.engines.accuracy import Accuracy
    from tokexport.engines.bench import Bench
    from tokexport.engines.build import Built
    from tokexport.engines.loyalty import Loyalty
    from tokexport.engines.model import Vlm
    from tokexport.engines.parity import Verification
    from tokexport.engines.scoring import Metric
    from tokexport.recipes.schema import Bits

__all__ = ["bench", "build", "evaluate", "load", "loyalty", "plan", "verify"]

# Imports stand inside the functions: "import tokexport" does not wait for torch.


def build(
    recipe: str = "mini_adsc",
    out: str | Path | None = None,
    *,
    model: str | None = None,
    weights: str | None = None,
    num_layers: int | None = None,
    adapter: str | None = None,
    compressor: str | None = None,
    dtype: str | None = None,
    quantize: "Bits | None" = None,
    settings: Sequence[str] = (),
    backend: str = "ort",
    threads: int | None = None,
    overwrite: bool = False,
    with_verify: bool = True,
    with_bench: bool = True,
) -> "Built":
    """Export, verify and measure a recipe.

    Args:
        recipe: the name of a recipe that ships, or the path of a TOML file.
        out: the artefact's directory, None for ``out/NAME``.
        model: a checkpoint directory or hub id instead of the recipe's.
        weights: ``checkpoint`` or ``random``.
        num_layers: cut a random model to so many decoder layers.
        adapter: a LoRA adapter to merge: a directory, or the name of one that ships.
        compressor: what a method learned: a file that training wrote, or the name of one that ships.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        quantize: ``int8`` weights, ``int4`` in the decoder and ``int8`` elsewhere, or ``none``.
        settings: ``key=value`` changes to the recipe.
        backend: the engine to verify and measure.
        threads: CPU threads, None for one per core.
        overwrite: replace an artefact that stands there.
        with_verify: climb the parity ladder.
        with_bench: make a short benchmark.

    Raises:
        TokexportError: see ``tokexport.errors``; nothing is left at ``out``.
    """
    from tokexport.engines.build import build as build_recipe
    from tokexport.recipes.load import load_changed

    loaded = load_changed(
        recipe,
        settings,
        model=model,
        weights=weights,
        num_layers=num_layers,
        adapter=adapter,
        compressor=compressor,
        dtype=dtype,
        quantize=quantize,
    )
    return build_recipe(
        loaded,
        Path(out) if out is not None else Path("out") / loaded.name,
        backend=backend,
        threads=threads,
        overwrite=overwrite,
        with_verify=with_verify,
        with_bench=with_bench,
    )


def load(
    path: str | Path,
    *,
    backend: str = "ort",
    threads: int | None = None,
    max_text_tokens: int | None = None,
    max_images: int | None = None,
    model: str | None = None,
    adapter: str | None = None,
    compressor: str | None = None,
) -> "Vlm":
    """Open an artefact to ask it questions; see ``engines.model.load`` for the arguments."""
    from tokexport.engines.backend import Source
    from tokexport.engines.model import load as load_artefact

    return load_artefact(
        path,
        backend=backend,
        threads=threads,
        max_text_tokens=max_text_tokens,
        max_images=max_images,
        source=Source(model=model, adapter=adapter, compressor=compressor),
    )


def plan(
    recipe: str = "mini_adsc",
    *,
    model: str | None = None,
    num_layers: int | None = None,
    settings: Sequence[str] = (),
    text_tokens: int | None = None,
) -> dict[str, Any]:
    """Return tokens per layer, FLOPs and KV bytes of a recipe, the keys of ``tokexport plan --json``."""
    from tokexport.exporter.export import planned
    from tokexport.recipes.load import load_changed

    loaded = load_changed(recipe, settings, model=model, num_layers=num_layers)
    return planned(loaded, text_tokens=text_tokens)[1]


def verify(
    path: str | Path,
    *,
    backend: str = "ort",
    threads: int | None = None,
    model: str | None = None,
    adapter: str | None = None,
    compressor: str | None = None,
) -> "Verification":
    """Climb the parity ladder of an artefact; ``passed`` of the result is the verdict."""
    from tokexport.engines.backend import Source
    from tokexport.engines.build import verify_artefact

    source = Source(model=model, adapter=adapter, compressor=compressor)
    return verify_artefact(Path(path), backend=backend, threads=threads, source=source)


def bench(
    path: str | Path,
    *,
    backend: str = "ort",
    threads: int | None = None,
    model: str | None = None,
    adapter: str | None = None,
    compressor: str | None = None,
    text_tokens: int | None = None,
    new_tokens: int = 16,
    repeats: int = 7,
    controls: Sequence[str] = ("sample", "random"),
) -> "Bench":
    """Measure an artefact beside PyTorch, all tokens and control methods; ``report()`` of the result is the JSON."""
    from tokexport.engines.backend import Source
    from tokexport.engines.bench import bench_artefact

    return bench_artefact(
        Path(path),
        backend=backend,
        threads=threads,
        source=Source(model=model, adapter=adapter, compressor=compressor),
        text_tokens=text_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        controls=controls,
    )


def evaluate(
    path: str | Path,
    data: str = "test",
    *,
    dialogues: int | None = None,
    turns: int | None = None,
    seed: int | None = None,
    full: str | Path | None = None,
    answers: str | Path | None = None,
    store: bool = True,
    backend: str = "ort",
    metric: "Metric" = "exact",
    max_new_tokens: int = 16,
    max_text_tokens: int | None = None,
    threads: int | None = None,
    jobs: int = 1,
    reselect: bool = False,
    model: str | None = None,
    adapter: str | None = None,
    compressor: str | None = None,
) -> "Accuracy":
    """Measure the accuracy of an artefact on dialogues; ``report()`` of the result is the JSON.

    ``data``, ``dialogues``, ``turns`` and ``seed`` are those of ``engines.evaluation_data.open_dialogues``, the rest
    is explained at ``engines.accuracy.evaluate_artefact`` and ``EvalOptions``.
    """
    from tokexport.engines.accuracy import EvalOptions, evaluate_artefact
    from tokexport.engines.backend import Source
    from tokexport.engines.evaluation_data import open_dialogues

    options = EvalOptions(
        backend=backend,
        metric=metric,
        max_new_tokens=max_new_tokens,
        max_text_tokens=max_text_tokens,
        threads=threads,
        jobs=jobs,
        reselect=reselect,
        source=Source(model=model, adapter=adapter, compressor=compressor),
    )
    return evaluate_artefact(
        Path(path),
        open_dialogues(data, dialogues=dialogues, turns=turns, seed=seed),
        options,
        full=None if full is None else Path(full),
        answers=None if answers is None else Path(answers),
        store=store,
    )


def loyalty(
    path: str | Path,
    full: str | Path,
    data: str | None = None,
    *,
    images: str | Path | None = None,
    questions: str | Path | None = None,
    dialogues: int | None = None,
    turns: int | None = None,
    seed: int | None = None,
    answers: str | Path | None = None,
    store: bool = True,
    backend: str = "ort",
    max_new_tokens: int | None = None,
    max_text_tokens: int | None = None,
    threads: int | None = None,
    jobs: int = 1,
    reselect: bool = False,
) -> "Loyalty":
    """Measure how near an artefact stays to the uncompressed one; ``report()`` of the result is the JSON.

    Args:
        path: the artefact.
        full: the uncompressed one.
        data: dialogues, see ``evaluate``, if it is not ``images``.
        images: a folder of images to ask ``questions`` about.
        questions: a file of them, None for five open ones.
        dialogues: how many, or how many images.
        turns: questions of a made dialogue, None for 3.
        seed: of made dialogues, None for 0.
        answers: a file for every answer.
        store: keep the result in the reports of the artefact.
        backend: the engine of both.
        max_new_tokens: the longest answer, None for 16, about images 64.
        max_text_tokens: room for the text of a dialogue, None for what the data needs.
        threads: CPU threads, None for one per core.
        jobs: processes that ask at once.
        reselect: read all again with every question, so that vision tokens are chosen by it.
    """
    from tokexport.engines.accuracy import EvalOptions
    from tokexport.engines.evaluate import DEFAULT_MAX_NEW_TOKENS
    from tokexport.engines.evaluation_data import open_unlabelled
    from tokexport.engines.loyalty import OPEN_ANSWER_TOKENS, loyalty_of

    usual = DEFAULT_MAX_NEW_TOKENS if images is None else OPEN_ANSWER_TOKENS
    options = EvalOptions(
        backend=backend,
        max_new_tokens=usual if max_new_tokens is None else max_new_tokens,
        max_text_tokens=max_text_tokens,
        threads=threads,
        jobs=jobs,
        reselect=reselect,
    )
    asked = open_unlabelled(
        data,
        dialogues=dialogues,
        turns=turns,
        seed=seed,
        images=None if images is None else Path(images),
        questions=None if questions is None else Path(questions),
    )
    return loyalty_of(
        Path(path), Path(full), asked, options, answers=None if answers is None else Path(answers), store=store
    )
