"""Flash attention over a static cache, as Triton kernels (arXiv 2205.14135, arXiv 2307.08691).

Causal with the lower right aligned: query i of T stands at place ``length - T + i`` of the cache and sees all places up
to there. Heads may share keys (arXiv 2305.13245). Scores and sums are in float32.

``prefill_kernel`` is for prompts, a program for each block of queries. For single tokens ``decode_part_kernel`` splits
the cache among programs, so that all of a GPU works on it, and ``decode_sum_kernel`` puts the parts together (flash
decoding). Triton's interpreter runs them on a CPU, and ``compiled`` compiles them for a GPU that is not there.

B batch, H query heads, K key/value heads, T new tokens, C capacity, E head width, S parts of the cache
"""

import math
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tokexport.engines.tensorrt import flash_kernels
from tokexport.errors import InputError

# Compiled, they are objects that are given a grid in brackets.
_KERNELS: Any = flash_kernels
HEAD_DIMS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CAPABILITIES = (80, 86, 89, 90, 120)
"""Compute capabilities that the kernels are compiled for."""

Phase = Literal["prefill", "decode", "plugin"]
# Powers of two are what exponents cost least with.
LOG2_E = math.log2(math.e)
QUERY_BLOCK, KEY_BLOCK = 64, 64
# Text that a driver translates when an engine is loaded, of CUDA 12.8 or newer, which all of CAPABILITIES need. By
# default Triton writes that of its own assembler, which drivers for older CUDA do not know.
_PLUGIN_PTX = 87
# The least that a matrix unit multiplies.
_LEAST_ROWS = 16


def flash_attention(
    query_BHTE: Tensor, key_BKCE: Tensor, value_BKCE: Tensor, length_B: Tensor, *, num_parts: int = 8
) -> Tensor:
    """Return what T new tokens, already in the cache, see of it, (B, H, T, E).

    Args:
        query_BHTE: the queries, contiguous.
        key_BKCE: cache of keys, contiguous.
        value_BKCE: cache of values, contiguous.
        length_B: tokens in the cache, the new ones included.
        num_parts: of the cache, where there is one new token.

    Raises:
        InputError: a head width or a precision that the kernels are not made for, or strided tensors.
    """
    batch, num_heads, num_new, head_dim = query_BHTE.shape
    num_kv_heads, capacity = key_BKCE.shape[1:3]
    require_made_for(head_dim, query_BHTE.dtype)
    if not all(tensor.is_contiguous() for tensor in (query_BHTE, key_BKCE, value_BKCE)):
        raise InputError("flash attention reads contiguous tensors; call .contiguous() before")
    out = torch.empty_like(query_BHTE)
    scale = LOG2_E / math.sqrt(head_dim)
    constants: dict[str, Any] = {
        **heads_of(num_heads, num_kv_heads, head_dim),
        "WIDEN": knobs.runtime.interpret and query_BHTE.dtype == torch.bfloat16,
    }
    cache = (key_BKCE, value_BKCE, length_B)
    if num_new > 1:
        grid = (triton.cdiv(num_new, QUERY_BLOCK), batch * num_heads)
        _KERNELS.prefill_kernel[grid](
            query_BHTE, *cache, out, scale, num_new, capacity, **constants, QUERY_BLOCK=QUERY_BLOCK, KEY_BLOCK=KEY_BLOCK
        )
        return out
    part_out = query_BHTE.new_empty((batch, num_heads, num_parts, head_dim), dtype=torch.float32)
    part_weight = query_BHTE.new_empty((batch, num_heads, num_parts), dtype=torch.float32)
    _KERNELS.decode_part_kernel[(num_parts, batch * num_kv_heads)](
        query_BHTE,
        *cache,
        part_out,
        part_weight,
        scale,
        capacity,
        num_parts,
        **constants,
        ROWS=decode_rows(num_heads, num_kv_heads),
        KEY_BLOCK=KEY_BLOCK,
    )
    _KERNELS.decode_sum_kernel[(batch * num_heads,)](
        part_out, part_weight, out, num_parts, HEAD_DIM=head_dim, PARTS=triton.next_power_of_2(num_parts)
    )
    return out


def plugin_attention(query_BHTE: Tensor, key_BKCE: Tensor, value_BKCE: Tensor, length_B: Tensor) -> Tensor:
    """Return the same from the one kernel that the plugin has, however many tokens are new."""
    batch, num_heads, num_new, head_dim = query_BHTE.shape
    num_kv_heads, capacity = key_BKCE.shape[1:3]
    require_made_for(head_dim, query_BHTE.dtype)
    out = torch.empty_like(query_BHTE)
    _KERNELS.plugin_kernel[plugin_grid(num_new, batch * num_heads)](
        query_BHTE,
        key_BKCE,
        value_BKCE,
        length_B,
        num_new,
        capacity,
        out,
        **_plugin_constants(num_heads, num_kv_heads, head_dim),
        WIDEN=knobs.runtime.interpret and query_BHTE.dtype == torch.bfloat16,
    )
    return out


def plugin_grid(num_new: Any, num_rows: Any) -> tuple[Any, Any]:
    """Return how many programs the plugin's kernel takes, for numbers or expressions of them."""
    return (num_new + (QUERY_BLOCK - 1)) // QUERY_BLOCK, num_rows


def require_made_for(head_dim: int, dtype: torch.dtype) -> None:
    """Check that there are kernels.

    Raises:
        InputError: a head width or a precision that they are not made for.
    """
    if head_dim not in HEAD_DIMS or dtype not in DTYPES:
        raise InputError(
            f"heads of width {head_dim} in {dtype}: flash attention is made for widths "
            f"{' and '.join(map(str, HEAD_DIMS))} in {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}"
        )


def _plugin_constants(num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
    scale = LOG2_E / math.sqrt(head_dim)
    blocks = {"QUERY_BLOCK": QUERY_BLOCK, "KEY_BLOCK": KEY_BLOCK}
    return {"SCALE": scale, **heads_of(num_heads, num_kv_heads, head_dim), **blocks}


def heads_of(num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, int]:
    """Return the constants that all kernels are compiled for."""
    return {"NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, "HEAD_DIM": head_dim}


def decode_rows(num_heads: int, num_kv_heads: int) -> int:
    """Return the rows of a matrix that holds the query heads of one key head."""
    return max(_LEAST_ROWS, triton.next_power_of_2(num_heads // num_kv_heads))


def compiled(
    phase: Phase, capability: int, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> Any:
    """Compile the kernel of a phase for a GPU that need not be there.

    Args:
        phase: prefill, decode, or plugin for both.
        capability: of the GPU, e.g. 86.
        dtype: of queries, keys and values.
        num_heads: H.
        num_kv_heads: K.
        head_dim: E.

    Returns:
        Triton's kernel, its ``asm`` holding ``ptx`` and ``cubin``.
    """
    short = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    constants = {**heads_of(num_heads, num_kv_heads, head_dim), "KEY_BLOCK": KEY_BLOCK, "WIDEN": False}
    tensors = dict.fromkeys(("query", "key", "value"), f"*{short}")
    if phase == "prefill":
        kernel = _KERNELS.prefill_kernel
        constants["QUERY_BLOCK"] = QUERY_BLOCK
        others = {"length": "*i32", "out": f"*{short}", "scale": "fp32", "num_new": "i32", "capacity": "i32"}
    elif phase == "plugin":
        kernel = _KERNELS.plugin_kernel
        constants |= _plugin_constants(num_heads, num_kv_heads, head_dim)
        # Lengths are as the graph has them.
        others = {"length": "*i64", "num_new": "i32", "capacity": "i32", "out": f"*{short}"}
    else:
        kernel = _KERNELS.decode_part_kernel
        constants["ROWS"] = decode_rows(num_heads, num_kv_heads)
        others = {"length": "*i32", "part_out": "*fp32", "part_weight": "*fp32", "scale": "fp32"}
        others |= {"capacity": "i32", "num_parts": "i32"}
    signature = {**tensors, **others, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants)
    options: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}
    if phase == "plugin":
        options["ptx_version"] = _PLUGIN_PTX
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
