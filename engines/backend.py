"""What an engine is, and how one is found.

An engine is one file in ``engines/backends/``; its file name, with hyphens, is its name on the
command line. It opens an artefact and returns a session, which holds one conversation at a time.

B batch, T tokens, P prefix, V vision, S suffix, N images, M vision tokens of an image entering the
language model, D width, Q logits asked for, W vocabulary, G layer groups
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tokexport.engines import backends
from tokexport.errors import BackendUnavailableError, InputError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.graph_io import GraphName
from tokexport.exporter.plan import DTYPE_BYTES, TokenPlan, VlmSpec
from tokexport.exporter.registry import list_plugins, load_plugin

DEFAULT_BACKEND = "ort"

Array = NDArray[np.generic]
Device = Literal["cpu", "cuda"]
AttentionKind = Literal["fused", "plugin"]
"""In a compiled engine: the library's own kernel, or ours as a plugin."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where lies now what an artefact was made from; None for where it lay.

    Attributes:
        model: its checkpoint.
        adapter: the adapter that was merged.
        compressor: what its compression method learned.
    """

    model: str | None = None
    adapter: str | None = None
    compressor: str | None = None


AS_BUILT = Source()
"""Everything lies where it lay."""


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """How a session is opened.

    Attributes:
        max_text_tokens: text tokens, prompt and answers together, that the cache has room for.
        max_images: images that it has room for.
        threads: CPU threads, None for as many as there are cores.
        source: for engines that run from the checkpoint instead of from the graphs.
        profile: the folder in which an engine that can do so writes how long each kernel takes.
    """

    max_text_tokens: int
    max_images: int
    threads: int | None = None
    source: Source = AS_BUILT
    profile: Path | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("max-text-tokens", self.max_text_tokens, 1), ("max-images", self.max_images, 0)):
            if value < least:
                raise InputError(f"{name} {value} must be at least {least}")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads {self.threads} must be at least 1")

    def capacities(self, plan: TokenPlan) -> tuple[int, ...]:
        """Return the tokens that the cache of each layer group has room for."""
        return tuple(self.max_text_tokens + self.max_images * group.vision_tokens for group in plan.groups)

    @classmethod
    def for_bundle(
        cls,
        bundle: Bundle,
        *,
        max_text_tokens: int | None = None,
        max_images: int | None = None,
        threads: int | None = None,
        source: Source = AS_BUILT,
    ) -> "SessionOptions":
        """Fill what is None from the artefact's recipe."""
        table = bundle.recipe.session
        usual = min(table.max_text_tokens, bundle.spec.max_positions)
        return cls(
            max_text_tokens=usual if max_text_tokens is None else max_text_tokens,
            max_images=table.max_images if max_images is None else max_images,
            threads=threads,
            source=source,
        )


@dataclass(frozen=True, kw_only=True)
class DecoderStep:
    """One call of the decoder; see ``exporter.graph_io.decoder_io`` for the meaning of each array."""

    prefix_embeds: Array
    image_features: Array
    suffix_embeds: Array
    position_ids: NDArray[np.int64]
    past_lengths: NDArray[np.int64]
    logits_to_keep: NDArray[np.int64]

    def inputs(self) -> Mapping[str, Array]:
        """Return the arrays by the names of the graph's inputs."""
        return dict(vars(self))


@dataclass(frozen=True)
class Choice:
    """Scores (B, N) of the vision tokens that arrive at a bottleneck, and which M of them it keeps, (B, M)."""

    score_BN: NDArray[np.float32]
    kept_BM: NDArray[np.int64]

    @property
    def order(self) -> NDArray[np.int64]:
        """The same tokens (B, M) from the highest score to the lowest, of equals the first before the others."""
        order_BM = np.argsort(-np.take_along_axis(self.score_BN, self.kept_BM, 1), axis=1, kind="stable")
        return np.take_along_axis(self.kept_BM, order_BM, 1)


class Session(ABC):
    """An opened model with a cache for one conversation of batch 1.

    Attributes:
        plan: the tokens this session computes with.
        conversation: whose turns the cache holds now.
        choices: what bottlenecks chose by attention, by their layers, in the last call that brought an image.

    Raises:
        InputError: more room for text is asked for than the model has positions.
    """

    def __init__(self, spec: VlmSpec, plan: TokenPlan, options: SessionOptions) -> None:
        if options.max_text_tokens > spec.max_positions:
            raise InputError(
                f"max-text-tokens {options.max_text_tokens} is more than the {spec.max_positions} positions of the "
                "model; choose a smaller number"
            )
        self.spec, self.plan, self.options = spec, plan, options
        self.conversation: object = None
        self.choices: Mapping[int, Choice] = {}

    @property
    def capacities(self) -> tuple[int, ...]:
        """Tokens that the cache of each layer group has room for."""
        return self.options.capacities(self.plan)

    @abstractmethod
    def encode_images(self, pixel_values: NDArray[np.float32]) -> Array:
        """Return image features (N, M, D) of pixels (N, 3, height, width)."""

    @abstractmethod
    def embed(self, input_ids: NDArray[np.int64]) -> Array:
        """Return embeddings (B, T, D) of token ids (B, T)."""

    @abstractmethod
    def decode(self, step: DecoderStep) -> NDArray[np.float32]:
        """Run new tokens, write their keys and values into the cache, return logits (B, Q, W)."""

    @abstractmethod
    def read_cache(self, layer: int, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return keys and values (B, K, length, E) of one layer."""

    @property
    @abstractmethod
    def kv_bytes(self) -> int:
        """Bytes that the cache holds in memory now."""

    def end_profile(self) -> Mapping[GraphName, Path]:
        """End profiling and return the file written for each graph; none where ``Backend.is_profiled`` is not."""
        return {}

    def reset(self) -> None:  # noqa: B027 - most caches are overwritten, not cleared
        """Forget the conversation."""


class Backend(ABC):
    """One way to run a model."""

    runtime = ""
    """The library that computes, in its own spelling; engines of one library are compared with each other."""

    device: Device = "cpu"
    """What computes."""

    runs_graphs = True
    """Whether it runs the artefact's graphs, or the checkpoint they were made from."""

    is_compressed = True
    """Whether sessions compute with the artefact's plan, or always with all tokens."""

    is_foretold = False
    """Whether a plan's memory and least times are for it, which are for ONNX Runtime on the CPU."""

    is_profiled = False
    """Whether its sessions write a profile of ONNX Runtime."""

    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    """Precisions of graphs that it runs."""

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    def require(self, dtype: str) -> None:
        """Raise ``BackendUnavailableError`` if graphs in ``dtype`` cannot be run."""
        if dtype not in self.dtypes:
            raise BackendUnavailableError(
                f"backend {self.name!r} does not run graphs in {dtype}, only in {' and '.join(self.dtypes)}; choose "
                "one of these with --dtype, or write the graphs without running them: tokexport export"
            )

    def state(self) -> str:
        """Return why nothing can be run with it here, nothing where something can."""
        return ""

    @abstractmethod
    def open(self, bundle: Bundle, options: SessionOptions) -> Session:
        """Open an artefact.

        Raises:
            BackendUnavailableError: a package or a device is missing, or the precision is not supported.
        """


class Compiler(Backend, ABC):
    """An engine that an artefact is compiled for before it runs."""

    @abstractmethod
    def compile(
        self,
        bundle: Bundle,
        options: SessionOptions,
        *,
        capability: str | None = None,
        attention: AttentionKind = "fused",
        overwrite: bool = False,
        progress: Callable[[str], None] = lambda _: None,
    ) -> Path:
        """Build what ``open`` will run, beside the artefact's graphs.

        Args:
            bundle: the artefact.
            options: room of the cache, which becomes part of what is built.
            capability: compute capability of the GPU to build for, e.g. 8.6; by default that of this machine.
            attention: what computes the decoder's.
            overwrite: replace what was built before.
            progress: told what is being done.

        Returns:
            The folder with what was built.

        Raises:
            BackendUnavailableError: the precision is not supported, or a GPU is missing.
            InputError: a GPU that cannot be built for.
            EngineError: it cannot be built as promised, or stored, or is there already.
        """


class Rewriter(Backend, ABC):
    """An engine of ONNX Runtime that is given another decoder graph than the artefact holds."""

    @abstractmethod
    def decoder_graph(self, bundle: Bundle) -> bytes:
        """Return the decoder as the engine is given it, serialised; weights stay in the artefact's files."""


def list_backends() -> list[str]:
    """Return the names of all engines."""
    return list_plugins(backends)


def load_backend(name: str) -> Backend:
    """Return the engine called ``name``.

    Raises:
        BackendUnavailableError: there is none, or a package it needs is missing.
    """
    found = load_plugin(backends, Backend, name, "backend", BackendUnavailableError)
    return found()  # pyright: ignore[reportAbstractUsage] - what a file defines is whole


def open_session(bundle: Bundle, backend: str, options: SessionOptions) -> Session:
    """Open an artefact with an engine."""
    return load_backend(backend).open(bundle, options)


def planned_kv_bytes(session: Session, dtype: str) -> int:
    """Return the bytes of the session's cache as its plan has them."""
    per_token = 2 * session.spec.num_kv_heads * session.spec.head_dim * DTYPE_BYTES[dtype]
    return per_token * sum(session.capacities[group] for group in session.plan.group_of_layer)
