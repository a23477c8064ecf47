"""Whether an engine keeps the same vision tokens as PyTorch, over many images and questions.

N vision tokens that arrive at a bottleneck, M kept ones
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokexport.dialogues.generate import make_dialogue
from tokexport.engines.backend import Choice, Session, SessionOptions, load_backend
from tokexport.engines.compare import Check, load_tolerances, misplaced_tokens
from tokexport.engines.generate import Conversation
from tokexport.engines.prompt import Dialogue, PromptProcessor
from tokexport.engines.source import source_design
from tokexport.engines.torch_session import TorchSession
from tokexport.errors import InputError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.graph_io import GraphName, choosing_layers

_DECODER: GraphName = "decoder_model_merged"

Tick = Callable[[int, int], None]


def require_choice(bundle: Bundle) -> None:
    """Check that an artefact chooses tokens, and that it can be said which it should.

    Raises:
        InputError: every image keeps the same tokens, or scores of int8 graphs are not near enough to each other.
    """
    if not choosing_layers(bundle.graph_io(_DECODER)):
        raise InputError(
            f"{bundle.path} keeps the same tokens of every image, so --images has no effect; it is for methods that "
            "choose by attention, like fastv"
        )
    quantize = bundle.recipe.quantize
    if "int8" in (quantize.vision_encoder, quantize.decoder):
        raise InputError(
            f"{bundle.path} is in int8, where an input between two steps falls to either, so --images has no bound for "
            "near-ties; leave it out"
        )


def kept_agreement(
    bundle: Bundle,
    backend: str,
    options: SessionOptions,
    num_images: int,
    *,
    tick: Tick = lambda _done, _total: None,
) -> Check:
    """Ask one question about each of made images, and compare which tokens the engine and PyTorch keep.

    PyTorch keeps what the engine kept, so that later bottlenecks are judged by the scores of the same tokens. A
    difference that is no near-tie fails.

    Args:
        bundle: an artefact that chooses by attention.
        backend: the engine.
        options: room and threads.
        num_images: how many.
        tick: told how many are done.
    """
    made = source_design(bundle, options.source)
    reference = TorchSession(made, options, is_quantized=made.recipe.quantize.is_active)
    engine, processor = load_backend(backend).open(bundle, options), PromptProcessor(bundle.path)
    tolerance = load_tolerances(made.recipe.export.dtype)["scores"]
    kept = ties = wrong = 0
    for number in range(num_images):
        dialogue = make_dialogue(0, "test", number, num_turns=1)
        assert isinstance(dialogue.image, Image.Image)
        pixel_values = processor.pixels([dialogue.image])
        prompt = Dialogue.start(processor).ask(dialogue.turns[0].question, 1)
        found = _choices(engine, pixel_values, prompt)
        reference.follow([{layer: choice.order for layer, choice in found.items()}])
        expected = _choices(reference, pixel_values, prompt)
        for layer, choice in found.items():
            near, far = misplaced_tokens(choice.kept_BM, expected[layer].score_BN, tolerance)
            kept, ties, wrong = kept + choice.kept_BM.size, ties + near, wrong + far
        tick(number + 1, num_images)
    return Check(
        step=f"reference vs {backend}",
        name=f"kept tokens, {num_images} images",
        passed=wrong == 0,
        max_abs_diff=float(wrong),
        cosine=1 - (ties + wrong) / kept,
        tolerance=0.0,
        graph=_DECODER,
        note=f"{100 - 100 * (ties + wrong) / kept:.3f} % of {kept} alike, {ties} near-ties, {wrong} against scores",
    )


def _choices(session: Session, pixel_values: NDArray[np.float32], prompt: Sequence[int]) -> Mapping[int, Choice]:
    Conversation(session).feed(prompt, [session.encode_images(pixel_values)])
    return session.choices
