"""Flash attention on the device, in Triton's language; see ``flash_attention.py`` for what each kernel is for.

Upper case is known when a kernel is compiled. Sizes of blocks are powers of two.
"""

# Triton's language is not Python's: tensors have operators of their own, and kernels are compiled, not called.
# pyright: basic, reportMissingParameterType=false, reportUntypedFunctionDecorator=false, reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def product(left, right, WIDEN: tl.constexpr):
    """Multiply matrices into float32; ``WIDEN`` is for the interpreter, which takes bfloat16 for integers here."""
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, out_dtype=tl.float32)


@triton.jit
def prefill_kernel(
    query,
    key,
    value,
    length,
    out,
    scale,
    num_new,
    capacity,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Attend with one block of queries of one head."""
    block, row = tl.program_id(0), tl.program_id(1)
    batch, head = row // NUM_HEADS, row % NUM_HEADS
    kv_row = batch * NUM_KV_HEADS + head // (NUM_HEADS // NUM_KV_HEADS)
    total = tl.load(length + batch).to(tl.int32)
    i = block * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    e = tl.arange(0, HEAD_DIM)
    at = (row.to(tl.int64) * num_new + i)[:, None] * HEAD_DIM + e[None, :]
    q = tl.load(query + at, mask=i[:, None] < num_new, other=0.0)
    # The last place that each query sees.
    last = total - num_new + i
    end = tl.minimum(total, total - num_new + (block + 1) * QUERY_BLOCK)
    start_of_cache = kv_row.to(tl.int64) * capacity * HEAD_DIM
    largest = tl.full((QUERY_BLOCK,), float("-inf"), tl.float32)
    weight = tl.zeros((QUERY_BLOCK,), tl.float32)
    mixed = tl.zeros((QUERY_BLOCK, HEAD_DIM), tl.float32)
    for first in range(0, end, KEY_BLOCK):
        j = first + tl.arange(0, KEY_BLOCK)
        places = start_of_cache + j[:, None] * HEAD_DIM + e[None, :]
        is_there = j[:, None] < total
        k = tl.load(key + places, mask=is_there, other=0.0)
        v = tl.load(value + places, mask=is_there, other=0.0)
        score = product(q, tl.trans(k), WIDEN) * scale
        score = tl.where(j[None, :] <= last[:, None], score, float("-inf"))
        # Every query sees the first place, so that this is a number from the first block on.
        now = tl.maximum(largest, tl.max(score, 1))
        share = tl.exp2(score - now[:, None])
        fade = tl.exp2(largest - now)
        weight = weight * fade + tl.sum(share, 1)
        mixed = mixed * fade[:, None] + product(share.to(v.dtype), v, WIDEN)
        largest = now
    tl.store(out + at, (mixed / weight[:, None]).to(out.dtype.element_ty), mask=i[:, None] < num_new)


@triton.jit
def plugin_kernel(
    query,
    key,
    value,
    length,
    num_new,
    capacity,
    out,
    SCALE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Do what ``prefill_kernel`` does, called as TensorRT calls a plugin: inputs, whole numbers, outputs."""
    prefill_kernel(
        query,
        key,
        value,
        length,
        out,
        SCALE,
        num_new,
        capacity,
        NUM_HEADS,
        NUM_KV_HEADS,
        HEAD_DIM,
        QUERY_BLOCK,
        KEY_BLOCK,
        WIDEN,
    )


@triton.jit
def decode_part_kernel(
    query,
    key,
    value,
    length,
    part_out,
    part_weight,
    scale,
    capacity,
    num_parts,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Attend with one token, all query heads of one key head, to one part of the cache."""
    part, kv_row = tl.program_id(0), tl.program_id(1)
    group: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    batch = kv_row // NUM_KV_HEADS
    total = tl.load(length + batch).to(tl.int32)
    h = tl.arange(0, ROWS)
    e = tl.arange(0, HEAD_DIM)
    # Query heads that share a key head lie side by side.
    row = kv_row * group + h
    q = tl.load(query + row[:, None] * HEAD_DIM + e[None, :], mask=h[:, None] < group, other=0.0)
    blocks = tl.cdiv(tl.cdiv(total, KEY_BLOCK), num_parts)
    first_place = part * blocks * KEY_BLOCK
    end = tl.minimum(total, first_place + blocks * KEY_BLOCK)
    start_of_cache = kv_row.to(tl.int64) * capacity * HEAD_DIM
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    for first in range(first_place, end, KEY_BLOCK):
        j = first + tl.arange(0, KEY_BLOCK)
        places = start_of_cache + j[:, None] * HEAD_DIM + e[None, :]
        is_there = j[:, None] < total
        k = tl.load(key + places, mask=is_there, other=0.0)
        v = tl.load(value + places, mask=is_there, other=0.0)
        score = product(q, tl.trans(k), WIDEN) * scale
        score = tl.where(j[None, :] < total, score, float("-inf"))
        now = tl.maximum(largest, tl.max(score, 1))
        share = tl.exp2(score - now[:, None])
        fade = tl.exp2(largest - now)
        weight = weight * fade + tl.sum(share, 1)
        mixed = mixed * fade[:, None] + product(share.to(v.dtype), v, WIDEN)
        largest = now
    # A part behind the end has seen nothing: its weight is 0 and so is what it mixed.
    is_empty = first_place >= end
    log_weight = tl.where(is_empty, float("-inf"), largest + tl.log2(tl.where(is_empty, 1.0, weight)))
    mean = tl.where(is_empty, 0.0, mixed / tl.where(is_empty, 1.0, weight)[:, None])
    at = row * num_parts + part
    tl.store(part_weight + at, log_weight, mask=h < group)
    tl.store(part_out + at[:, None] * HEAD_DIM + e[None, :], mean, mask=h[:, None] < group)


@triton.jit
def decode_sum_kernel(
    part_out,
    part_weight,
    out,
    num_parts,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Put the parts of one head together."""
    row = tl.program_id(0)
    s = tl.arange(0, PARTS)
    e = tl.arange(0, HEAD_DIM)
    at = row * num_parts + s
    log_weight = tl.load(part_weight + at, mask=s < num_parts, other=float("-inf"))
    share = tl.exp2(log_weight - tl.max(log_weight, 0))
    parts = tl.load(part_out + at[:, None] * HEAD_DIM + e[None, :], mask=s[:, None] < num_parts, other=0.0)
    mixed = tl.sum(parts * share[:, None], 0) / tl.sum(share, 0)
    tl.store(out + row * HEAD_DIM + e, mixed.to(out.dtype.element_ty))
