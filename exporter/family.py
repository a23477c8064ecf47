"""What a model family is, and how one is found.

A family is one file in ``exporter/families/``; its file name is its name in a recipe. It knows the
configuration, the names of the weights and the modules; it knows no method and no engine.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from tokexport.errors import RecipeError
from tokexport.exporter import families
from tokexport.exporter.graph_io import GraphName
from tokexport.exporter.modules.bottleneck import Bottleneck
from tokexport.exporter.modules.decoder import Decoder
from tokexport.exporter.plan import VlmSpec
from tokexport.exporter.registry import list_plugins, load_plugin


class Family(ABC):
    """One architecture of vision-language model.

    Attributes:
        weight_prefixes: for each graph, where the parameters of its module stand among the weights,
            by the beginning of their names.
        head: the weight of the language model's head.
        embedding: the weight of the token embedding, which a tied head shares.
        vision_layers: matches the names of the modules of the vision encoder that a parity check
            compares one by one.
    """

    weight_prefixes: Mapping[GraphName, Mapping[str, str]]
    head: str
    embedding: str
    vision_layers: re.Pattern[str]

    @abstractmethod
    def read_config(self, directory: Path) -> PreTrainedConfig:
        """Read the configuration of a checkpoint.

        Raises:
            CheckpointError: no configuration, or one of another architecture.
        """

    @abstractmethod
    def make_config(self, base: PreTrainedConfig | None, changes: Mapping[str, Any]) -> PreTrainedConfig:
        """Return the family's default configuration, or ``base``, with ``changes``.

        Raises:
            RecipeError: a change names a key the configuration does not have.
        """

    @abstractmethod
    def layer_change(self, num_layers: int) -> Mapping[str, Any]:
        """Return the change for ``make_config`` that sets the number of decoder layers."""

    @abstractmethod
    def spec(self, config: PreTrainedConfig) -> VlmSpec:
        """Return the sizes that planning needs.

        Raises:
            CheckpointError: the configuration asks for something that is not supported.
        """

    @abstractmethod
    def image_token_id(self, config: PreTrainedConfig) -> int:
        """Return the token that stands for an image in ``transformers``' prompts."""

    @abstractmethod
    def canonical_name(self, name: str) -> str | None:
        """Return the name of a stored tensor as ``transformers`` names it today, None for one without use."""

    @abstractmethod
    def vision_encoder(
        self, config: PreTrainedConfig, grid: tuple[int, int], stages: Mapping[str, nn.Module]
    ) -> nn.Module:
        """Return the module from pixels to image features.

        Args:
            config: of the model.
            grid: rows and columns of patches that the tower sees; pixels arrive in the size of the model and are
                shrunk to it.
            stages: what stands behind the projector, by the names of methods; kept as ``stages``.
        """

    @abstractmethod
    def decoder(self, config: PreTrainedConfig, bottlenecks: Mapping[int, Bottleneck]) -> Decoder:
        """Return the language model without its token embedding."""

    @abstractmethod
    def token_embedding(self, config: PreTrainedConfig) -> nn.Module:
        """Return the module from token ids to embeddings."""

    @abstractmethod
    def reference_model(self, config: PreTrainedConfig) -> PreTrainedModel:
        """Return the ``transformers`` model whose numbers are the truth."""


def list_families() -> list[str]:
    """Return the names of all families."""
    return list_plugins(families)


def load_family(name: str) -> Family:
    """Return the family called ``name``.

    Raises:
        RecipeError: there is none.
    """
    found = load_plugin(families, Family, name, "family", RecipeError)
    return found()  # pyright: ignore[reportAbstractUsage] - what a file defines is whole
