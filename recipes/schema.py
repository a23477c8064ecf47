"""The tables of a recipe, as frozen dataclasses that check themselves when made."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tokexport.errors import RecipeError

DType = Literal["float32", "float16", "bfloat16"]
WeightSource = Literal["checkpoint", "random"]


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
    session: SessionTable = SessionTable()
    plan: PlanTable = PlanTable()
