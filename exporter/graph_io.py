"""Names, dtypes and symbolic dimensions of every graph: the interface that engines are written against.

A dimension is a number or a name. A name that stands in two places is the same number in both.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tokexport.exporter.plan import TokenPlan, VlmSpec

GraphName = Literal["vision_encoder", "embed_tokens", "decoder_model_merged"]
GRAPHS: tuple[GraphName, ...] = ("vision_encoder", "embed_tokens", "decoder_model_merged")

Dim = int | str


@dataclass(frozen=True, kw_only=True)
class TensorIO:
    """One input or output of a graph."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


@dataclass(frozen=True, kw_only=True)
class GraphIO:
    """The exact inputs and outputs of a graph, in order."""

    inputs: tuple[TensorIO, ...]
    outputs: tuple[TensorIO, ...]


def cache_names(layer: int, prefix: str = "past_key_values") -> tuple[str, str]:
    """Return the names of one layer's keys and values; ``present`` is the prefix of outputs."""
    return f"{prefix}.{layer}.key", f"{prefix}.{layer}.value"


CHOICES = ("token_scores.", "kept_tokens.")
"""Behind them in the outputs of the decoder stands the number of a layer."""


def choice_names(layer: int) -> tuple[str, str]:
    """Return the names of what a choice before a layer goes by, and of which tokens it keeps."""
    scores, kept = CHOICES
    return f"{scores}{layer}", f"{kept}{layer}"


def choosing_layers(io: GraphIO) -> tuple[int, ...]:
    """Return the layers before which a decoder chooses tokens by attention."""
    prefix = CHOICES[1]
    return tuple(int(tensor.name.removeprefix(prefix)) for tensor in io.outputs if tensor.name.startswith(prefix))


STAGES = "stages."
"""Behind it in the vision encoder stands the name of a method."""

BOTTLENECKS = "bottlenecks."
"""Behind it in the decoder stands the number of a layer."""

METHOD_PARTS = (STAGES, BOTTLENECKS)
"""What the names of modules begin with that are a method's and not the model's."""


def node_scope(module: str) -> str:
    """Return what the names of the nodes of a module begin with: ``layers.0.mlp`` -> ``/layers.0/mlp/``."""
    return "/" + re.sub(r"\.(?!\d)", "/", module) + "/"


def stage_name(method: str) -> str:
    """Return the name that what a method makes of image features has as a module of the vision encoder."""
    return f"{STAGES}{method}"


METHOD_SCOPES = ("/stages/", "/bottlenecks.")
"""What the names of nodes begin with that come from such modules."""


def bottleneck_name(layer: int) -> str:
    """Return the name that what stands before a layer has as a module of the decoder."""
    return f"{BOTTLENECKS}{layer}"


def vision_encoder_io(spec: VlmSpec, plan: TokenPlan, dtype: str) -> GraphIO:
    """Pixels of whole images in, vision tokens that enter the language model out."""
    return GraphIO(
        inputs=(TensorIO(name="pixel_values", dtype=dtype, shape=("num_images", 3, spec.image_size, spec.image_size)),),
        outputs=(
            TensorIO(name="image_features", dtype=dtype, shape=("num_images", plan.entering_llm, spec.hidden_size)),
        ),
    )


def embed_tokens_io(spec: VlmSpec, dtype: str) -> GraphIO:
    """Token ids in, embeddings out."""
    return GraphIO(
        inputs=(TensorIO(name="input_ids", dtype="int64", shape=("batch", "length")),),
        outputs=(TensorIO(name="inputs_embeds", dtype=dtype, shape=("batch", "length", spec.hidden_size)),),
    )


def decoder_io(spec: VlmSpec, plan: TokenPlan, dtype: str, choosing: Sequence[int] = ()) -> GraphIO:
    """Text, at most one image a call, more text, and the cache in; logits and the cache out, and what was chosen.

    ``vision`` is 0 or the plan's ``entering_llm``; ``prefix`` and ``suffix`` may be 0. A layer's
    cache has the capacity of its group; outputs are to be bound to the buffers of the inputs.
    Before each layer of ``choosing`` tokens are chosen by attention: of those that ``arrive`` there,
    all have scores and some are ``kept``, counted from 0.
    """
    width = spec.hidden_size
    return GraphIO(
        inputs=(
            TensorIO(name="prefix_embeds", dtype=dtype, shape=("batch", "prefix", width)),
            TensorIO(name="image_features", dtype=dtype, shape=("batch", "vision", width)),
            TensorIO(name="suffix_embeds", dtype=dtype, shape=("batch", "suffix", width)),
            TensorIO(name="position_ids", dtype="int64", shape=("batch", "prefix + vision + suffix")),
            TensorIO(name="past_lengths", dtype="int64", shape=(len(plan.groups), "batch")),
            TensorIO(name="logits_to_keep", dtype="int64", shape=("num_logits",)),
            *_cache_io(spec, plan, dtype, "past_key_values"),
        ),
        outputs=(
            TensorIO(name="logits", dtype=dtype, shape=("batch", "num_logits", spec.vocab_size)),
            *_cache_io(spec, plan, dtype, "present"),
            *(tensor for layer in choosing for tensor in _choice_io(layer)),
        ),
    )


def _choice_io(layer: int) -> tuple[TensorIO, TensorIO]:
    scores, kept = choice_names(layer)
    return (
        TensorIO(name=scores, dtype="float32", shape=("batch", f"arriving_{layer}")),
        TensorIO(name=kept, dtype="int64", shape=("batch", f"kept_{layer}")),
    )


def _cache_io(spec: VlmSpec, plan: TokenPlan, dtype: str, prefix: str) -> Sequence[TensorIO]:
    return [
        TensorIO(name=name, dtype=dtype, shape=("batch", spec.num_kv_heads, f"capacity_{group}", spec.head_dim))
        for layer, group in enumerate(plan.group_of_layer)
        for name in cache_names(layer, prefix)
    ]
