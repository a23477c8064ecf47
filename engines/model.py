"""An artefact ready to answer: what ``tokexport.load`` returns."""

import contextlib
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokexport.engines.backend import (
    AS_BUILT,
    DEFAULT_BACKEND,
    Array,
    Session,
    SessionOptions,
    Source,
    load_backend,
    open_session,
)
from tokexport.engines.generate import IMAGE, Conversation, EndedBy, Sampler, Sampling, TokenChooser
from tokexport.engines.images import as_rgb, load_image
from tokexport.engines.prompt import Dialogue, PromptProcessor
from tokexport.engines.reselection import require_choice
from tokexport.errors import InputError
from tokexport.exporter.bundle import Bundle

ImageLike = Image.Image | Path | str


@dataclass(frozen=True, kw_only=True)
class ReadingCost:
    """What it takes to read a question: text tokens, and milliseconds until the model could answer."""

    text_tokens: int
    ms: float


@dataclass
class Answer:
    """What was said in one turn.

    Attributes:
        text: without surrounding blanks.
        token_ids: of the answer, without the stop token.
        ended_by: what ended it.
        prompt_tokens: text tokens read in this turn.
        vision_tokens: read in this turn, as they enter the language model.
        ttft_ms: from the start of the turn, images and all, to the first token.
        total_ms: from the start of the turn to its end.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    ended_by: EndedBy = "interrupted"
    prompt_tokens: int = 0
    vision_tokens: int = 0
    ttft_ms: float = 0.0
    total_ms: float = 0.0


class Speaker:
    """What can be asked: a session, and what lays out its prompts."""

    def __init__(self, processor: PromptProcessor, session: Session) -> None:
        self.processor, self.session = processor, session

    def generate(
        self,
        prompt: str,
        images: Sequence[ImageLike] = (),
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
    ) -> Answer:
        """Answer one question about images.

        Raises:
            InputError: an empty prompt, an image that cannot be read, or too little room.
        """
        return self.chat(sampling=sampling, max_new_tokens=max_new_tokens).ask(prompt, images)

    def chat(
        self,
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        choose: TokenChooser | None = None,
        reselect: bool = False,
    ) -> "Chat":
        """Start a conversation; it ends when another one starts, as there is one cache.

        Args:
            max_new_tokens: the longest answer.
            sampling: how the next token is chosen, by default greedily.
            choose: chooses it in place of that.
            reselect: read images and conversation again with every question, so that it is this one by which vision
                tokens are chosen.

        Raises:
            InputError: nothing is chosen by a question, so ``reselect`` has no effect.
        """
        if reselect:
            self.require_choice()
        return Chat(self, max_new_tokens, choose or Sampler(sampling or Sampling()), reselect=reselect)

    def require_choice(self) -> None:
        """Raise ``InputError`` where it is known that no question chooses vision tokens."""


class Vlm(Speaker):
    """A vision-language model that was exported by tokexport.

    Args:
        bundle: the artefact.
        backend: the engine, see ``tokexport doctor``.
        options: room and threads.
    """

    def __init__(self, bundle: Bundle, backend: str, options: SessionOptions) -> None:
        _require_use(options.source, backend)
        self.bundle, self._backend = bundle, backend
        super().__init__(PromptProcessor(bundle.path), open_session(bundle, backend, options))

    def require_choice(self) -> None:
        require_choice(self.bundle, self._backend)


class Chat:
    """Turns of one conversation; what was read before stays in the cache.

    Attributes:
        last: the last turn's answer, complete once its stream is exhausted.
    """

    def __init__(self, vlm: Speaker, max_new_tokens: int, choose: TokenChooser, *, reselect: bool = False) -> None:
        if max_new_tokens < 1:
            raise InputError(f"max-new-tokens {max_new_tokens} must be at least 1")
        self._vlm, self._max_new_tokens = vlm, max_new_tokens
        self._choose, self._reselects = choose, reselect
        self._dialogue = Dialogue.start(vlm.processor)
        self._conversation = Conversation(vlm.session)
        # Of all images so far, where they are read again: what the vision encoder makes of them is the same.
        self._features: list[Array] = []
        self.last = Answer()

    def ask(self, prompt: str, images: Sequence[ImageLike] = ()) -> Answer:
        """Return the answer to the next question."""
        for _ in self.stream(prompt, images):
            pass
        return self.last

    def stream(self, prompt: str, images: Sequence[ImageLike] = ()) -> Generator[str]:
        """Yield the answer to the next question piece by piece.

        Raises:
            InputError: an empty prompt, an image that cannot be read, or too little room; the
                conversation is then as it was before the question.
        """
        started, vlm = time.perf_counter(), self._vlm
        pixels = vlm.processor.pixels([_opened(image) for image in images]) if images else None
        said, read = len(self._dialogue.messages), self._dialogue.read_text
        try:
            if self._reselects:
                self._dialogue.read_text = ""
            token_ids = self._dialogue.ask(prompt, len(images))
            features = vlm.session.encode_images(pixels) if pixels is not None else None
            logits = self._read(token_ids, [] if features is None else np.split(features, len(images)))
        except BaseException:
            del self._dialogue.messages[said:]
            self._dialogue.read_text = read
            raise
        num_images = token_ids.count(IMAGE)
        self.last = answer = Answer(
            prompt_tokens=len(token_ids) - num_images, vision_tokens=num_images * vlm.session.plan.entering_llm
        )
        tokens = self._conversation.answer(
            logits, self._choose, max_new_tokens=self._max_new_tokens, stop_ids=vlm.processor.stop_ids
        )
        try:
            with contextlib.closing(tokens):
                for piece in vlm.processor.stream_text(_noted(tokens, answer, started)):
                    answer.text += piece
                    yield piece
        finally:  # also where the listener leaves: what was said is part of the conversation
            answer.total_ms = 1000 * (time.perf_counter() - started)
            answer.ended_by = self._conversation.ended_by
            self._dialogue.hear(answer.text)
            answer.text = answer.text.strip()

    def continuing_cost(self, prompt: str) -> ReadingCost | None:
        """Return what it takes to read the next question behind the cache; it is read for that, and forgotten.

        None where that cannot be: in the first turn, without room, or where the chat template rewrites earlier turns.
        """
        if not self._conversation.text_tokens:
            return None
        started, copy = time.perf_counter(), replace(self._dialogue, messages=list(self._dialogue.messages))
        try:
            token_ids = copy.ask(prompt, 0)
            self._conversation.probe(token_ids)
        except InputError:
            return None
        return ReadingCost(text_tokens=len(token_ids), ms=1000 * (time.perf_counter() - started))

    def _read(self, token_ids: Sequence[int], features: Sequence[Array]) -> NDArray[np.float32]:
        """Return the logits behind a prompt that brings images, or all of them again."""
        if not self._reselects:
            return self._conversation.feed(token_ids, features)
        self._conversation.restart()
        all_features = [*self._features, *features]
        logits_QW = self._conversation.feed(token_ids, all_features)
        self._features = all_features
        return logits_QW


def load(
    path: str | Path,
    *,
    backend: str = DEFAULT_BACKEND,
    threads: int | None = None,
    max_text_tokens: int | None = None,
    max_images: int | None = None,
    source: Source = AS_BUILT,
) -> Vlm:
    """Open an artefact to ask it questions.

    Args:
        path: the artefact.
        backend: the engine.
        threads: CPU threads, None for as many as there are cores.
        max_text_tokens: text tokens of a whole conversation that the cache has room for.
        max_images: images that it has room for.
        source: for engines that run from the checkpoint.

    Raises:
        BundleError: the artefact is damaged, newer, or none.
        BackendUnavailableError: the engine is not installed or cannot run it.
    """
    bundle = Bundle.open(Path(path))
    options = SessionOptions.for_bundle(
        bundle,
        max_text_tokens=max_text_tokens,
        max_images=max_images,
        threads=threads,
        source=source,
    )
    return Vlm(bundle, backend, options)


def _require_use(source: Source, backend: str) -> None:
    """Refuse a source for an engine that runs the artefact's own graphs."""
    given = [f"--{name} {place}" for name, place in vars(source).items() if place is not None]
    if given and load_backend(backend).runs_graphs:
        raise InputError(
            f"{' and '.join(given)} has no effect on backend {backend!r}, which runs the graphs of the artefact alone; "
            "leave it out, or choose a backend that runs from the checkpoint, like torch-eager"
        )


def _opened(image: ImageLike) -> Image.Image:
    return as_rgb(image, "the image") if isinstance(image, Image.Image) else load_image(Path(image))


def _noted(tokens: Iterator[int], answer: Answer, started: float) -> Iterator[int]:
    """Pass tokens on, noting them and when the first came."""
    for token in tokens:
        if not answer.token_ids:
            answer.ttft_ms = 1000 * (time.perf_counter() - started)
        answer.token_ids.append(token)
        yield token
