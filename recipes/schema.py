"""The tables of a recipe, as frozen dataclasses that check themselves when made."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from tokexport.errors import RecipeError

DType = Literal["float32", "float16", "bfloat16"]
WeightSource = Literal["checkpoint", "random"]
Bits = Literal["none", "int8", "int4"]


# Those of the operator that multiplies blocks.
BLOCK_SIZES = (16, 32, 64, 128, 256)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise RecipeError(f"{name} = {value} must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class ModelTable:
    """Which model, and where its weights come from.

    ``checkpoint`` is a directory, a hub id, or the name of a model that ships with tokexport.
    ``adapter`` is the directory of a LoRA adapter, or the name of one that ships; it is merged into the weights.
    ``architecture`` holds configuration values in Hugging Face's names; they describe the model to
    ``plan`` and to ``weights = "random"``, where no checkpoint is read.
    """

    family: str
    checkpoint: str
    weights: WeightSource = "checkpoint"
    seed: int = 0
    adapter: str | None = None
    num_layers: int | None = None
    architecture: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_layers is not None and self.num_layers < 1:
            raise RecipeError(f"[model] num_layers = {self.num_layers} must be at least 1")
        if self.num_layers is not None and self.weights != "random":
            raise RecipeError(
                f'[model] num_layers = {self.num_layers} cuts the model, which only weights = "random" '
                "allows; remove num_layers or use random weights"
            )


@dataclass(frozen=True, kw_only=True)
class CompressTable:
    """One compression method and its options, checked by the method itself."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ExportTable:
    """How the graphs are written."""

    dtype: DType = "float32"


@dataclass(frozen=True, kw_only=True)
class QuantizeTable:
    """Which weights are stored and multiplied in fewer bits.

    ``int8`` rounds a matrix by output channel and, while the graph runs, what it is multiplied with by tensor; ``int4``
    rounds the matrix alone, ``block_size`` inputs of a channel together. Norms, biases, convolutions and what a
    compression method learned stay as they are.

    Attributes:
        vision_encoder: of tower and projector.
        embed_tokens: of the table of embeddings, ``none`` or ``int8``.
        decoder: of the language model.
        keep: names of layers that stay as they are, with ``*`` for any characters, e.g. ``lm_head`` or ``layers.0.*``.
        block_size: of ``int4``. Of 32, 64 and 128, 64 loses as little as 32 on the mini model, on a tenth less disk.
    """

    vision_encoder: Bits = "none"
    embed_tokens: Bits = "none"
    decoder: Bits = "none"
    keep: tuple[str, ...] = ()
    block_size: int = 64

    def __post_init__(self) -> None:
        if self.embed_tokens == "int4":
            raise RecipeError('[quantize] embed_tokens = "int4" is not known; a table of embeddings takes int8 or none')
        if self.block_size not in BLOCK_SIZES:
            raise RecipeError(f"[quantize] block_size = {self.block_size} must be one of {BLOCK_SIZES}")
        if self.keep and not self.is_active:
            raise RecipeError(
                '[quantize] keep says what is not quantized, and nothing is; say what is, e.g. decoder = "int8"'
            )

    @property
    def is_active(self) -> bool:
        """Whether anything is quantized."""
        return {self.vision_encoder, self.embed_tokens, self.decoder} != {"none"}

    @classmethod
    def for_bits(cls, bits: Bits) -> Self:
        """Return the table that quantizes all that can be.

        With ``int4`` that is the decoder; all else is in ``int8``. A tower is small, reads hundreds of tokens at once,
        which is where int8 is faster, and what it loses in ``int4`` no later layer wins back.
        """
        others: Bits = "none" if bits == "none" else "int8"
        return cls(vision_encoder=others, embed_tokens=others, decoder=bits)

    def __str__(self) -> str:
        parts = {"vision": self.vision_encoder, "embeddings": self.embed_tokens, "decoder": self.decoder}
        kept = f", but not {', '.join(self.keep)}" if self.keep else ""
        return ", ".join(f"{part} {bits}" for part, bits in parts.items() if bits != "none") + kept


@dataclass(frozen=True, kw_only=True)
class SessionTable:
    """How much room a session reserves when the caller does not say."""

    max_text_tokens: int = 1024
    max_images: int = 2

    def __post_init__(self) -> None:
        _at_least("[session] max_text_tokens", self.max_text_tokens, 1)
        _at_least("[session] max_images", self.max_images, 0)


@dataclass(frozen=True, kw_only=True)
class PlanTable:
    """The prompt that the accounting assumes."""

    text_tokens: int = 36

    def __post_init__(self) -> None:
        _at_least("[plan] text_tokens", self.text_tokens, 0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One model, how it is compressed and how it is written."""

    name: str
    description: str
    model: ModelTable
    compress: tuple[CompressTable, ...] = ()
    export: ExportTable = ExportTable()
    quantize: QuantizeTable = QuantizeTable()
    session: SessionTable = SessionTable()
    plan: PlanTable = PlanTable()

    def __post_init__(self) -> None:
        if self.quantize.is_active and self.export.dtype != "float32":
            raise RecipeError(
                f"[quantize] is for graphs that otherwise compute in float32, and [export] dtype is "
                f"{self.export.dtype}; leave one of them out"
            )
