"""The operators that must reach ONNX as they are meant.

Every operator has a PyTorch body, so that a module which calls it *is* the reference, and a
translation to one standard ONNX node or a few, so that engines find an attention and not its pieces.

B batch, T new tokens, H query heads, K key/value heads, E head width, C cache capacity, R table rows,
N vision tokens that arrive, M kept ones, D width, X = heads x E
"""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript.onnx_opset import opset24
from torch import Tensor
from torch.nn import functional

from tokexport.exporter.modules.greedy import onnx_greedy_gains


@torch.library.custom_op("tokexport::gather_tokens", mutates_args=())
def _gather_tokens(features_BND: Tensor, index_M: Tensor) -> Tensor:
    return features_BND.index_select(1, index_M)


@_gather_tokens.register_fake
def _(features_BND: Tensor, index_M: Tensor) -> Tensor:
    return features_BND.new_empty(features_BND.shape[0], index_M.shape[0], features_BND.shape[2])


@torch.library.custom_op("tokexport::cached_attention", mutates_args=())
def _cached_attention(query_BHTE: Tensor, key_BKCE: Tensor, value_BKCE: Tensor, length_B: Tensor) -> Tensor:
    return _attend(query_BHTE, key_BKCE, value_BKCE, length_B)


@_cached_attention.register_fake
def _(query_BHTE: Tensor, key_BKCE: Tensor, value_BKCE: Tensor, length_B: Tensor) -> Tensor:
    return torch.empty_like(query_BHTE)


@torch.library.custom_op("tokexport::cache_update", mutates_args=())
def _cache_update(cache_BKCE: Tensor, new_BKTE: Tensor, start_B: Tensor) -> Tensor:
    return _write(cache_BKCE.clone(), new_BKTE, start_B)


@_cache_update.register_fake
def _(cache_BKCE: Tensor, new_BKTE: Tensor, start_B: Tensor) -> Tensor:
    return torch.empty_like(cache_BKCE)


@torch.library.custom_op("tokexport::rotary", mutates_args=())
def _rotary(x_BHTE: Tensor, cos_RE: Tensor, sin_RE: Tensor, position_BT: Tensor) -> Tensor:
    return _rotate(x_BHTE, cos_RE, sin_RE, position_BT)


@_rotary.register_fake
def _(x_BHTE: Tensor, cos_RE: Tensor, sin_RE: Tensor, position_BT: Tensor) -> Tensor:
    return torch.empty_like(x_BHTE)


# The signatures of onnxscript speak of ONNX values, while tracing hands it symbols.
onnx_op: Any = opset24


@torch.library.custom_op("tokexport::split_heads", mutates_args=())
def _split_heads(x_BTX: Tensor, num_heads: int, head_dim: int) -> Tensor:
    return x_BTX.unflatten(2, (num_heads, head_dim)).transpose(1, 2).contiguous()


@_split_heads.register_fake
def _(x_BTX: Tensor, num_heads: int, head_dim: int) -> Tensor:
    return x_BTX.new_empty(x_BTX.shape[0], num_heads, x_BTX.shape[1], head_dim)


@torch.library.custom_op("tokexport::merge_heads", mutates_args=())
def _merge_heads(x_BHTE: Tensor) -> Tensor:
    return x_BHTE.transpose(1, 2).flatten(2).contiguous()


@_merge_heads.register_fake
def _(x_BHTE: Tensor) -> Tensor:
    return x_BHTE.new_empty(x_BHTE.shape[0], x_BHTE.shape[2], x_BHTE.shape[1] * x_BHTE.shape[3])


@torch.library.custom_op("tokexport::keep_tokens", mutates_args=())
def _keep_tokens(span_BN: Tensor, index_M: Tensor) -> Tensor:
    return span_BN.index_select(1, index_M[: span_BN.shape[1]])


@_keep_tokens.register_fake
def _(span_BN: Tensor, index_M: Tensor) -> Tensor:
    num_kept: Any = torch.sym_min(span_BN.shape[1], index_M.shape[0])
    return span_BN.new_empty(span_BN.shape[0], num_kept, *span_BN.shape[2:])


@torch.library.custom_op("tokexport::pick_tokens", mutates_args=())
def _pick_tokens(span_BN: Tensor, index_BM: Tensor) -> Tensor:
    return span_BN[torch.arange(len(span_BN), device=span_BN.device).unsqueeze(1), index_BM]


@_pick_tokens.register_fake
def _(span_BN: Tensor, index_BM: Tensor) -> Tensor:
    return span_BN.new_empty(*index_BM.shape, *span_BN.shape[2:])


@torch.library.custom_op("tokexport::top_tokens", mutates_args=())
def _top_tokens(score_BN: Tensor, count: int) -> Tensor:
    return score_BN.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values


@_top_tokens.register_fake
def _(score_BN: Tensor, count: int) -> Tensor:
    num_kept: Any = torch.sym_min(score_BN.shape[1], count)
    return score_BN.new_empty(score_BN.shape[0], num_kept, dtype=torch.int64)


def split_heads(x_BTX: Tensor, head_dim: int) -> Tensor:
    """Return ``x_BTX``, X heads side by side, as (B, H, T, E).

    An operator of its own because tracing computes the shape of a reshape from the sizes of the
    inputs, with a dozen nodes, where ONNX says "as it is" with a constant.
    """
    num_heads = x_BTX.shape[2] // head_dim
    if torch.compiler.is_exporting():
        return _split_heads(x_BTX, num_heads, head_dim)
    return x_BTX.unflatten(2, (num_heads, head_dim)).transpose(1, 2)


def merge_heads(x_BHTE: Tensor) -> Tensor:
    """Return heads side by side again, (B, T, H x E)."""
    if torch.compiler.is_exporting():
        return _merge_heads(x_BHTE)
    return x_BHTE.transpose(1, 2).flatten(2)


def keep_tokens(span_BN: Tensor, index_M: Tensor) -> Tensor:
    """Return the tokens ``index_M`` of ``span_BN`` (B, N) or (B, N, D), or nothing where N is 0.

    An operator of its own because tracing would otherwise fix "N is more than M" into the graph,
    and the graph could no longer be run without an image.
    """
    return _keep_tokens(span_BN, index_M)


def pick_tokens(span_BN: Tensor, index_BM: Tensor) -> Tensor:
    """Return the tokens ``index_BM`` of ``span_BN`` (B, N) or (B, N, D), others in each row, as (B, M) or (B, M, D).

    An operator of its own because tracing would write the rows' numbers into the graph, in a dozen nodes.
    """
    return _pick_tokens(span_BN, index_BM)


def top_tokens(score_BN: Tensor, count: int) -> Tensor:
    """Return which ``count`` tokens have the highest scores, ascending, (B, M); all of them where there are fewer.

    Of equals the first is taken, which ONNX promises and PyTorch's ``topk`` does not.
    """
    return _top_tokens(score_BN, count)


def gather_tokens(features_BND: Tensor, index_M: Tensor) -> Tensor:
    """Return the tokens ``index_M`` of ``features_BND`` as (B, M, D).

    An operator of its own because tracing would reshape a constant index and fold it under a new
    name, and nobody could find in the graph which tokens are kept.
    """
    return _gather_tokens(features_BND, index_M)


def cached_attention(query_BHTE: Tensor, key_BKCE: Tensor, value_BKCE: Tensor, length_B: Tensor) -> Tensor:
    """Attend from the last T of ``length_B`` tokens to all of them, causally, as (B, H, T, E).

    The causal mask is aligned to the lower right: query i of T sees the keys 0 .. length - T + i.
    Entries of the cache behind ``length_B`` are never read. Grouped heads share keys as in
    arXiv 2305.13245.
    """
    if torch.compiler.is_exporting():
        return _cached_attention(query_BHTE, key_BKCE, value_BKCE, length_B)
    return _attend(query_BHTE, key_BKCE, value_BKCE, length_B)


def cache_update(cache_BKCE: Tensor, new_BKTE: Tensor, start_B: Tensor) -> Tensor:
    """Return the cache with ``new_BKTE`` written at ``start_B``; outside of tracing, in place."""
    if torch.compiler.is_exporting():
        return _cache_update(cache_BKCE, new_BKTE, start_B)
    return _write(cache_BKCE, new_BKTE, start_B)


def rotary(x_BHTE: Tensor, cos_RE: Tensor, sin_RE: Tensor, position_BT: Tensor) -> Tensor:
    """Rotate the two halves of each head by the angle of its position (RoFormer, arXiv 2104.09864).

    The tables hold one row per position and half a head's width per row.
    """
    if torch.compiler.is_exporting():
        return _rotary(x_BHTE, cos_RE, sin_RE, position_BT)
    return _rotate(x_BHTE, cos_RE, sin_RE, position_BT)


def _attend(query_BHTE: Tensor, key_BKCE: Tensor, value_BKCE: Tensor, length_B: Tensor) -> Tensor:
    if length_B.device.type != "cpu":
        return attend_to_all(query_BHTE, key_BKCE, value_BKCE, length_B)
    num_new = query_BHTE.shape[2]
    is_grouped = query_BHTE.shape[1] != key_BKCE.shape[1]
    rows: list[Tensor] = []
    for row, length in enumerate(length_B.tolist()):
        # One query and a first prompt need no explicit mask, which lets SDPA take its fused kernel.
        is_first = num_new == length
        mask = None
        if not is_first and num_new > 1:
            mask = torch.ones(num_new, length, dtype=torch.bool, device=query_BHTE.device).tril(length - num_new)
        rows.append(
            functional.scaled_dot_product_attention(
                query_BHTE[row : row + 1],
                key_BKCE[row : row + 1, :, :length],
                value_BKCE[row : row + 1, :, :length],
                attn_mask=mask,
                is_causal=is_first and num_new > 1,
                enable_gqa=is_grouped,
            )
        )
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def attend_to_all(query_BHTE: Tensor, key_BKCE: Tensor, value_BKCE: Tensor, length_B: Tensor) -> Tensor:
    """Return the same as ``cached_attention`` of lengths that are on the device, and stay there.

    The whole capacity is read and masked, so that one captured graph serves every length.
    """
    new_T = torch.arange(query_BHTE.shape[2], device=length_B.device)
    place_C = torch.arange(key_BKCE.shape[2], device=length_B.device)
    last_BT = (length_B - query_BHTE.shape[2]).unsqueeze(1) + new_T
    is_seen_B1TC = (place_C <= last_BT.unsqueeze(2)).unsqueeze(1)
    is_grouped = query_BHTE.shape[1] != key_BKCE.shape[1]
    return functional.scaled_dot_product_attention(
        query_BHTE, key_BKCE, value_BKCE, attn_mask=is_seen_B1TC, enable_gqa=is_grouped
    )


def write_at(cache_BKCE: Tensor, new_BKTE: Tensor, start_B: Tensor) -> Tensor:
    """Do the same as ``cache_update``, in place, at places that are on the device, and stay there."""
    place_BT = start_B.unsqueeze(1) + torch.arange(new_BKTE.shape[2], device=start_B.device)
    return cache_BKCE.scatter_(2, place_BT[:, None, :, None].expand_as(new_BKTE), new_BKTE)


def _write(cache_BKCE: Tensor, new_BKTE: Tensor, start_B: Tensor) -> Tensor:
    if start_B.device.type != "cpu":
        return write_at(cache_BKCE, new_BKTE, start_B)
    for row, start in enumerate(start_B.tolist()):
        cache_BKCE[row, :, start : start + new_BKTE.shape[2]] = new_BKTE[row]
    return cache_BKCE


def _rotate(x_BHTE: Tensor, cos_RE: Tensor, sin_RE: Tensor, position_BT: Tensor) -> Tensor:
    cos_B1TE, sin_B1TE = cos_RE[position_BT].unsqueeze(1), sin_RE[position_BT].unsqueeze(1)
    low, high = x_BHTE.chunk(2, dim=-1)
    return torch.cat((low * cos_B1TE - high * sin_B1TE, high * cos_B1TE + low * sin_B1TE), dim=-1)


def _onnx_attention(query: Any, key: Any, value: Any, length: Any) -> Any:
    return onnx_op.Attention(query, key, value, None, None, None, length, is_causal=1)[0]


def _onnx_cache_update(cache: Any, new: Any, start: Any) -> Any:
    return onnx_op.TensorScatter(cache, new, start, axis=2)


def _onnx_rotary(x: Any, cos: Any, sin: Any, position: Any) -> Any:
    return onnx_op.RotaryEmbedding(x, cos, sin, position)


def _onnx_split_heads(x: Any, num_heads: int, head_dim: int) -> Any:
    # Not -1 for the heads: of no tokens, any number of heads would do.
    shape = onnx_op.Constant(value_ints=[0, 0, num_heads, head_dim])
    return onnx_op.Transpose(onnx_op.Reshape(x, shape), perm=[0, 2, 1, 3])


def _onnx_merge_heads(x: Any) -> Any:
    return onnx_op.Reshape(onnx_op.Transpose(x, perm=[0, 2, 1, 3]), onnx_op.Constant(value_ints=[0, 0, -1]))


def _onnx_keep_tokens(span: Any, index: Any) -> Any:
    num_present = onnx_op.Shape(span, start=1, end=2)
    zero, axis = onnx_op.Constant(value_ints=[0]), onnx_op.Constant(value_ints=[0])
    return onnx_op.Gather(span, onnx_op.Slice(index, zero, num_present, axis), axis=1)


def _onnx_pick_tokens(span: Any, index: Any) -> Any:
    last = onnx_op.Constant(value_ints=[-1])
    return onnx_op.GatherND(span, onnx_op.Unsqueeze(index, last), batch_dims=1)


def _onnx_top_tokens(score: Any, count: int) -> Any:
    num_kept = onnx_op.Min(onnx_op.Shape(score, start=1, end=2), onnx_op.Constant(value_ints=[count]))
    _, highest = onnx_op.TopK(score, num_kept, axis=1)
    ascending, _ = onnx_op.TopK(highest, num_kept, axis=1, largest=0)
    return ascending


def _onnx_gather_tokens(features: Any, index: Any) -> Any:
    return onnx_op.Gather(features, index, axis=1)


def _onnx_to(x: Any, dtype: int, non_blocking: bool = False, copy: bool = False, memory_format: Any = None) -> Any:
    return onnx_op.Cast(x, to=dtype)


def _onnx_matrix_transpose(x: Any) -> Any:
    *others, rows, columns = range(len(x.shape))
    return onnx_op.Transpose(x, perm=[*others, columns, rows])


def _onnx_flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    # Not -1 for what is flattened: of no tokens, any number would do.
    start, end = start_dim % len(x.shape), end_dim % len(x.shape) + 1
    # No part is empty: what folds constants leaves such out, by a node that knows no module it comes from.
    before = [onnx_op.Shape(x, start=0, end=start)] if start else []
    after = [onnx_op.Shape(x, start=end)] if end < len(x.shape) else []
    size = onnx_op.ReduceProd(onnx_op.Shape(x, start=start, end=end))
    shape = onnx_op.Concat(*before, size, *after, axis=0)
    return onnx_op.Reshape(x, shape, allowzero=1)


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return how each operator is written, beside those that the exporter of PyTorch knows.

    Three are PyTorch's own: it has no translation of ``to``, writes ``mT`` as an ``Einsum``, and ``flatten`` so that a
    graph refuses a call without tokens.
    """
    return {
        torch.ops.aten.to.dtype: _onnx_to,
        torch.ops.aten.mT.default: _onnx_matrix_transpose,
        torch.ops.aten.flatten.using_ints: _onnx_flatten,
        torch.ops.tokexport.cached_attention.default: _onnx_attention,
        torch.ops.tokexport.cache_update.default: _onnx_cache_update,
        torch.ops.tokexport.rotary.default: _onnx_rotary,
        torch.ops.tokexport.split_heads.default: _onnx_split_heads,
        torch.ops.tokexport.merge_heads.default: _onnx_merge_heads,
        torch.ops.tokexport.keep_tokens.default: _onnx_keep_tokens,
        torch.ops.tokexport.gather_tokens.default: _onnx_gather_tokens,
        torch.ops.tokexport.pick_tokens.default: _onnx_pick_tokens,
        torch.ops.tokexport.top_tokens.default: _onnx_top_tokens,
        torch.ops.tokexport.greedy_gains.default: onnx_greedy_gains,
    }
