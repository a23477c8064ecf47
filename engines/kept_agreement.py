"""Whether an engine keeps the same vision tokens as PyTorch, over many images and questions.

N vision tokens that arrive at a bottleneck, M kept ones
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokexport.dialogues.generate import make_dialogue
from tokexport.engines.backend import Choice, Session, SessionOptions, load_backend
from tokexport.engines.compare import Check, Tolerance, load_tolerances, misplaced_tokens
from tokexport.engines.generate import Conversation
from tokexport.engines.prompt import Dialogue, PromptProcessor
from tokexport.engines.source import source_design
from tokexport.engines.taps import VisionTaps
from tokexport.engines.torch_session import TorchSession
from tokexport.errors import InputError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.graph_io import GraphName, choosing_layers
from tokexport.exporter.method import chooser_names, load_methods

_DECODER: GraphName = "decoder_model_merged"
_VISION: GraphName = "vision_encoder"

Tick = Callable[[int, int], None]


def require_choice(bundle: Bundle) -> None:
    """Check that an artefact chooses tokens, and that it can be said which it should.

    Raises:
        InputError: every image keeps the same tokens, or scores of int8 graphs are not near enough to each other.
    """
    if not choosing_layers(bundle.graph_io(_DECODER)) and not chooser_names(load_methods(bundle.recipe.compress)):
        raise InputError(
            f"{bundle.path} keeps the same tokens of every image, so --images has no effect; it is for methods that "
            "choose by what they see, like fastv or visionzip"
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
) -> list[Check]:
    """Ask one question about each of made images, and compare which tokens the engine and PyTorch keep.

    PyTorch keeps what the engine kept, so that later choices are judged by the scores of the same tokens. A difference
    that is no near-tie fails. What the vision encoder chooses is no output of its graph: it is read from the portable
    one in ONNX Runtime.

    Args:
        bundle: an artefact that chooses by attention or by image features.
        backend: the engine.
        options: room and threads.
        num_images: how many.
        tick: told how many are done.

    Returns:
        A check for the choices of the vision encoder, and one for those of the decoder, where they make any.
    """
    made = source_design(bundle, options.source)
    reference = TorchSession(made, options, is_quantized=made.recipe.quantize.is_active)
    choosers, processor = chooser_names(load_methods(bundle.recipe.compress)), PromptProcessor(bundle.path)
    taps = VisionTaps(bundle, choosers, threads=options.threads) if choosers else None
    is_choosing = bool(choosing_layers(bundle.graph_io(_DECODER)))
    engine = load_backend(backend).open(bundle, options) if is_choosing else None
    tolerance = load_tolerances(made.recipe.export.dtype)["scores"]
    in_vision, in_decoder = _Agreement(tolerance), _Agreement(tolerance)
    for number in range(num_images):
        dialogue = make_dialogue(0, "test", number, num_turns=1)
        assert isinstance(dialogue.image, Image.Image)
        pixel_values = processor.pixels([dialogue.image])
        if taps is not None:
            kept = {name: index_BM.astype(np.int64) for name, index_BM in taps(pixel_values).items()}
            reference.follow_stages(kept)
            in_vision.add(kept, reference.stage_choices(pixel_values, kept))
        if engine is not None:
            prompt = Dialogue.start(processor).ask(dialogue.turns[0].question, 1)
            found = _choices(engine, pixel_values, prompt)
            reference.follow([{layer: choice.order for layer, choice in found.items()}])
            expected = _choices(reference, pixel_values, prompt)
            in_decoder.add({layer: choice.kept_BM for layer, choice in found.items()}, expected)
        tick(number + 1, num_images)
    checks: list[tuple[_Agreement, str, GraphName]] = [
        (in_vision, "reference vs ort-portable", _VISION),
        (in_decoder, f"reference vs {backend}", _DECODER),
    ]
    return [
        agreement.check(step, f"kept tokens, {num_images} images", graph)
        for agreement, step, graph in checks
        if agreement.kept
    ]


@dataclass
class _Agreement:
    """How many tokens were kept, and of these against what should be by a near-tie, and by more."""

    tolerance: Tolerance
    kept: int = 0
    ties: int = 0
    wrong: int = 0

    def add(self, found: Mapping[Any, NDArray[np.int64]], expected: Mapping[Any, Choice]) -> None:
        """Count what an engine kept, (B, M) by the places of choices, by the scores of PyTorch."""
        for place, kept_BM in found.items():
            near, far = misplaced_tokens(kept_BM, expected[place].score_BN, self.tolerance)
            self.kept, self.ties, self.wrong = self.kept + kept_BM.size, self.ties + near, self.wrong + far

    def check(self, step: str, name: str, graph: GraphName) -> Check:
        """Return what was counted."""
        other = (self.ties + self.wrong) / self.kept
        return Check(
            step=step,
            name=name,
            passed=self.wrong == 0,
            max_abs_diff=float(self.wrong),
            cosine=1 - other,
            tolerance=0.0,
            graph=graph,
            note=f"{100 - 100 * other:.3f} % of {self.kept} alike, {self.ties} near-ties, {self.wrong} against scores",
        )


def _choices(session: Session, pixel_values: NDArray[np.float32], prompt: Sequence[int]) -> Mapping[int, Choice]:
    Conversation(session).feed(prompt, [session.encode_images(pixel_values)])
    return session.choices
