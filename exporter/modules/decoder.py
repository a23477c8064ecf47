"""The Llama decoder whose layers see different numbers of vision tokens.

Written once: run as it is, it is the PyTorch reference; traced, it is ``decoder_model_merged.onnx``.
Sub-module names are those of ``transformers``, so that checkpoints load by name.

B batch, P text tokens before the image, V vision tokens, S text tokens after it, T = P + V + S,
D width, H query heads, K key/value heads, E head width, C cache capacity, G layer groups, R positions,
Q logits asked for, W vocabulary
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokexport.exporter.modules import ops
from tokexport.exporter.modules.bottleneck import Bottleneck


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What the decoder needs to know of a Llama configuration."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    attention_bias: bool
    mlp_bias: bool


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        return functional.rms_norm(x_BTD, (x_BTD.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention over a cache of fixed capacity that is written in place."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=config.attention_bias)

    def queries(self, x_BTD: Tensor, rope: "Rope") -> Tensor:
        """Return rotated queries (B, H, T, E)."""
        return rope(ops.split_heads(self.q_proj(x_BTD), self.head_dim))

    def keys(self, x_BTD: Tensor, rope: "Rope") -> Tensor:
        """Return rotated keys (B, K, T, E)."""
        return rope(ops.split_heads(self.k_proj(x_BTD), self.head_dim))

    def forward(self, x_BTD: Tensor, rope: "Rope", cache: "LayerCache", span: "Span") -> tuple[Tensor, "LayerCache"]:
        query_BHTE, key_BKTE = self.queries(x_BTD, rope), self.keys(x_BTD, rope)
        value_BKTE = ops.split_heads(self.v_proj(x_BTD), self.head_dim)
        key_BKCE = ops.cache_update(cache[0], key_BKTE, span.start_B)
        value_BKCE = ops.cache_update(cache[1], value_BKTE, span.start_B)
        attended_BHTE = ops.cached_attention(query_BHTE, key_BKCE, value_BKCE, span.end_B)
        return self.o_proj(ops.merge_heads(attended_BHTE)), (key_BKCE, value_BKCE)


class GatedMlp(nn.Module):
    """SiLU-gated feed-forward network (arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class DecoderLayer(nn.Module):
    """One pre-norm Llama layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMlp(config)

    def forward(self, x_BTD: Tensor, rope: "Rope", cache: "LayerCache", span: "Span") -> tuple[Tensor, "LayerCache"]:
        attended_BTD, cache = self.self_attn(self.input_layernorm(x_BTD), rope, cache, span)
        x_BTD = x_BTD + attended_BTD
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), cache


@dataclass(frozen=True)
class Rope:
    """The rotary tables together with the positions of the tokens at hand."""

    cos_RE: Tensor
    sin_RE: Tensor
    position_BT: Tensor

    def __call__(self, x_BHTE: Tensor) -> Tensor:
        return ops.rotary(x_BHTE, self.cos_RE, self.sin_RE, self.position_BT)


@dataclass(frozen=True)
class Span:
    """Where in the cache the tokens at hand go, per row."""

    start_B: Tensor
    end_B: Tensor


for _leaves in (Rope, Span):
    torch.export.register_dataclass(_leaves)  # so that a layer's tensors can be told when it is traced

LayerCache = tuple[Tensor, Tensor]
"""Keys and values of one layer, (B, K, C, E) each."""

Choice = tuple[Tensor, Tensor]
"""Scores of the N vision tokens that arrive at a bottleneck, (B, N), and which M of them stay, (B, M)."""


class Decoder(nn.Module):
    """Llama with bottlenecks before chosen layers.

    Args:
        config: sizes of the model.
        bottlenecks: what thins the vision span, by the layer before which it stands.
        rope_tables: cosines and sines, (R, E / 2) each.
    """

    cos_RE: Tensor
    sin_RE: Tensor

    def __init__(
        self, config: DecoderConfig, bottlenecks: Mapping[int, Bottleneck], rope_tables: tuple[Tensor, Tensor]
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bottlenecks = nn.ModuleDict({str(layer): bottleneck for layer, bottleneck in bottlenecks.items()})
        self.register_buffer("cos_RE", rope_tables[0], persistent=False)
        self.register_buffer("sin_RE", rope_tables[1], persistent=False)

    def forward(
        self,
        prefix_embeds: Tensor,
        image_features: Tensor,
        suffix_embeds: Tensor,
        position_ids: Tensor,
        past_lengths: Tensor,
        logits_to_keep: Tensor,
        past_key_values: Sequence[LayerCache],
        kept_tokens: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> tuple[Tensor, list[LayerCache], list[Choice]]:
        """Run T = P + V + S new tokens.

        Args:
            prefix_embeds: text before the image, (B, P, D); P may be 0.
            image_features: vision tokens, (B, V, D); V is 0 or what the plan says enters the model.
            suffix_embeds: text after the image, (B, S, D); S may be 0.
            position_ids: rotary positions on entry, (B, T).
            past_lengths: tokens already in the cache of each layer group, (G, B).
            logits_to_keep: which of the last layer's tokens get logits, (Q,), counted from 0.
            past_key_values: the cache of each layer, (B, K, C, E) twice.
            kept_tokens: what bottlenecks that choose have to keep, (B, M) by their layers, in place of their own
                choice, from the first that is chosen to the last.

        Returns:
            Logits (B, Q, W), the cache with the new tokens in it, and what each bottleneck chose that looks.
        """
        num_before, num_vision, num_after = prefix_embeds.shape[1], image_features.shape[1], suffix_embeds.shape[1]
        x_BTD = torch.cat((prefix_embeds, image_features, suffix_embeds), dim=1)
        group, caches, choices = 0, [], []
        rope = Rope(self.cos_RE, self.sin_RE, position_ids)
        span = Span(past_lengths[0], past_lengths[0] + x_BTD.shape[1])
        arrived_BTD = x_BTD
        for index, layer in enumerate(self.layers):
            if str(index) in self.bottlenecks:
                bottleneck = self.bottlenecks[str(index)]
                assert isinstance(bottleneck, Bottleneck)
                followed, score_BN = kept_tokens.get(index), None
                if bottleneck.look is not None:
                    seen_BTD, looking = (
                        (x_BTD, layer) if bottleneck.look.is_own else (arrived_BTD, self.layers[index - 1])
                    )
                    entered = (image_features, suffix_embeds)
                    seen = bottleneck.look(looking, seen_BTD, rope, num_before, num_vision, entered)
                    score_BN = bottleneck.scores(seen, followed)
                kept = bottleneck.choose(score_BN) if followed is None else followed.sort(-1).values
                if score_BN is not None:
                    choices.append((score_BN, kept))
                x_BTD = bottleneck(x_BTD, num_before, num_vision, kept)
                group += 1
                span = Span(past_lengths[group], past_lengths[group] + x_BTD.shape[1])
                position_BT = bottleneck(rope.position_BT, num_before, num_vision, kept)
                if bottleneck.positions == "renumber":
                    numbers_T = torch.arange(position_BT.shape[1], device=position_BT.device)
                    start_B = span.start_B
                    if start_B.device != numbers_T.device:  # see engines/torch_session.py
                        start_B = start_B.to(numbers_T.device)
                    position_BT = start_B.unsqueeze(1) + numbers_T
                rope = replace(rope, position_BT=position_BT)
                num_vision = x_BTD.shape[1] - num_before - num_after
            arrived_BTD = x_BTD
            x_BTD, cache = layer(x_BTD, rope, past_key_values[index], span)
            caches.append(cache)
        kept_BQD = self.norm(x_BTD).index_select(1, logits_to_keep)
        return self.lm_head(kept_BQD), caches, choices
