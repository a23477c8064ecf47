"""Which patches of an image stay behind each method, for pictures.

A choice that is a constant stands in the graph; a mixture, and a choice by what the image shows, are computed by the
vision encoder for the image; a choice by attention is an output of the decoder, for image and question. Of a stage of
the vision encoder that chooses and merges at once, the picture is of what it chooses.

N patches that the vision tower sees, M tokens that stay
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from PIL import Image

from tokexport.engines.backend import SessionOptions, load_backend
from tokexport.engines.generate import Conversation
from tokexport.engines.prompt import Dialogue, PromptProcessor
from tokexport.engines.taps import VisionTaps
from tokexport.errors import ParityError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.graph_io import GraphName, bottleneck_name, choosing_layers, stage_name
from tokexport.exporter.method import Method, arriving_plans, load_methods
from tokexport.exporter.plan import TokenPlan

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class KeptStage:
    """What is left behind one place where tokens go.

    Attributes:
        where: in words, e.g. ``from layer 3 on``.
        kept: how many tokens.
        weight_N: how much of each patch is in them: 1 where a token stays, 0 where it goes; of a mixture the sum of its
            shares in all that stay.
    """

    where: str
    kept: int
    weight_N: Floats


@dataclass(frozen=True, kw_only=True)
class KeptTokens:
    """What stays of one image.

    Attributes:
        grid: rows and columns of the patches that the tower sees.
        stages: one for each place where tokens go, as far as they can be seen.
        hidden: why what comes behind them cannot be seen, empty where all can.
    """

    grid: tuple[int, int]
    stages: tuple[KeptStage, ...]
    hidden: str = ""


def kept_tokens(bundle: Bundle, image: Image.Image, question: str, *, threads: int | None = None) -> KeptTokens:
    """Return which patches of an image stay behind each method of an artefact.

    Args:
        bundle: the artefact.
        image: what is asked about.
        question: what is asked first; only choices by attention read it.
        threads: CPU threads, None for as many as there are cores.
    """
    methods = load_methods(bundle.recipe.compress)
    plans = arriving_plans(methods, bundle.spec)
    grid = bundle.spec.vision_grid
    for method, arriving in zip(methods, plans, strict=False):
        grid = method.tower_grid(bundle.spec, arriving) or grid
    share_MN = np.eye(grid[0] * grid[1])
    stages = [_stage("a smaller image", share_MN)] if grid != bundle.spec.vision_grid else []
    chosen = _chosen(bundle, image, question, threads)
    hidden = ""
    try:
        for where, step in _steps(methods, plans, bundle, image, chosen, threads):
            share_MN = share_MN[step] if step.ndim == 1 else step @ share_MN
            stages.append(_stage(where, share_MN))
    except ParityError as error:  # it is compared all the same
        hidden = str(error)
    return KeptTokens(grid=grid, stages=tuple(stages), hidden=hidden)


def _steps(
    methods: Sequence[Method],
    plans: Sequence[TokenPlan],
    bundle: Bundle,
    image: Image.Image,
    chosen: Mapping[int, NDArray[np.int64]],
    threads: int | None,
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield where tokens go, and by which index (M,) or matrix (M, N).

    Raises:
        ParityError: what a method keeps cannot be seen.
    """
    unplaced = ""
    for method, (arriving, leaving) in zip(methods, pairwise(plans), strict=True):
        if arriving.emitted == leaving.emitted and arriving.entering_llm != leaving.entering_llm:
            _require_places(unplaced)
            stage, where = stage_name(method.name), "before the language model"
            if method.is_mixing:
                yield where, _computed(bundle, f"{stage}.matrix", image, threads).astype(np.float64)
            elif method.chooser:
                index_M = _computed(bundle, f"{stage}.{method.chooser}", image, threads).astype(np.int64)
                yield f"{where}, others merged into them" if method.is_merging else where, index_M
                unplaced = method.name if len(index_M) != leaving.entering_llm else ""
            else:
                yield where, _seen(_index(bundle, "vision_encoder", stage), method.name)
    method_at = {
        layer: method.name
        for method, (arriving, leaving) in zip(methods, pairwise(plans), strict=True)
        for layer in _drops(leaving) - _drops(arriving)
    }
    for layer, name in sorted(method_at.items()):
        _require_places(unplaced)
        step = _index(bundle, "decoder_model_merged", bottleneck_name(layer))
        yield f"from layer {layer} on", _seen(chosen.get(layer) if step is None else step, name)


def _require_places(unplaced: str) -> None:
    if unplaced:
        raise ParityError(f"not every token that {unplaced} makes is one of those that it chooses")


def _seen(step: NDArray[np.int64] | None, method: str) -> NDArray[np.int64]:
    if step is None:
        raise ParityError(f"the graph does not give out what {method} keeps of an image")
    return step


def _chosen(bundle: Bundle, image: Image.Image, question: str, threads: int | None) -> Mapping[int, NDArray[np.int64]]:
    """Return what each bottleneck that chooses by attention keeps, (M,), by its layer."""
    if not choosing_layers(bundle.graph_io("decoder_model_merged")):
        return {}
    processor = PromptProcessor(bundle.path)
    session = load_backend("ort-portable").open(bundle, SessionOptions.for_bundle(bundle, threads=threads))
    features = session.encode_images(processor.pixels([image]))
    Conversation(session).feed(Dialogue.start(processor).ask(question, 1), [features])
    return {layer: choice.kept_BM[0] for layer, choice in session.choices.items()}


def _computed(bundle: Bundle, module: str, image: Image.Image, threads: int | None) -> NDArray[np.float32]:
    """Return what a part of the vision encoder computes of an image, a matrix (M, N) or an index (M,)."""
    pixel_values = PromptProcessor(bundle.path).pixels([image])
    return VisionTaps(bundle, [module], threads=threads)(pixel_values)[module][0]


def _index(bundle: Bundle, graph: GraphName, module: str) -> NDArray[np.int64] | None:
    """Return which of the tokens that arrive at a module it keeps, None where that is no constant of the graph."""
    stored = ir.load(bundle.graph_path(graph)).graph.initializers.get(f"{module}.index_M")
    return None if stored is None or stored.const_value is None else stored.const_value.numpy()


def _drops(plan: TokenPlan) -> set[int]:
    """Return the layers before which tokens go."""
    counts = (plan.entering_llm, *plan.per_layer)
    return {layer for layer, (before, after) in enumerate(pairwise(counts)) if before != after}


def _stage(where: str, share_MN: Floats) -> KeptStage:
    return KeptStage(where=where, kept=len(share_MN), weight_N=share_MN.sum(0))
