"""The Triton kernels in Triton's interpreter, against PyTorch's attention; and compiled for GPUs that are not here."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tokexport.errors import InputError

pytest.importorskip("triton")

from tokexport.engines.tensorrt import flash_attention as kernels

CLOSE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-6}


Attend = Callable[..., Tensor]


@pytest.fixture(scope="module")
def attend() -> Iterator[Attend]:
    """Return the kernels in Triton's interpreter, which a process chooses before it imports Triton."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield lambda *given, **options: pool.submit(kernels.flash_attention, *given, **options).result()


def expected(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    num_new = query.shape[2]
    rows = [
        functional.scaled_dot_product_attention(
            query[row : row + 1].float(),
            key[row : row + 1, :, :length].float(),
            value[row : row + 1, :, :length].float(),
            attn_mask=torch.ones(num_new, length, dtype=torch.bool).tril(length - num_new),
            enable_gqa=True,
        )
        for row, length in enumerate(lengths)
    ]
    return torch.cat(rows)


def tensors(
    num_heads: int,
    num_kv_heads: int,
    num_new: int,
    capacity: int,
    lengths: list[int],
    head_dim: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch = len(lengths)
    query = torch.randn(batch, num_heads, num_new, head_dim, generator=generator).to(dtype)
    key, value = torch.randn(2, batch, num_kv_heads, capacity, head_dim, generator=generator).to(dtype)
    for row, length in enumerate(lengths):
        # Behind the true length a cache holds anything.
        key[row, :, length:], value[row, :, length:] = 100, torch.nan
    return query, key, value


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "num_new", "capacity", "lengths"),
    [
        (4, 4, 1, 100, [1]),
        (4, 2, 1, 700, [700]),
        (8, 1, 1, 300, [257]),
        (6, 2, 1, 90, [63, 64, 65]),
        (4, 4, 7, 64, [7]),
        (4, 2, 65, 130, [129]),
        (2, 1, 5, 70, [5, 69]),
        (2, 2, 130, 700, [700]),
        (1, 1, 700, 700, [700]),
    ],
)
def test_the_kernels_compute_what_attention_does(
    attend: Attend,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    num_new: int,
    capacity: int,
    lengths: list[int],
):
    query, key, value = tensors(num_heads, num_kv_heads, num_new, capacity, lengths, 64, dtype)
    found = attend(query, key, value, torch.tensor(lengths))
    torch.testing.assert_close(
        found.float(), expected(query, key, value, lengths), atol=CLOSE[dtype], rtol=CLOSE[dtype]
    )


@pytest.mark.parametrize("num_new", [1, 66])
def test_wide_heads(attend: Attend, num_new: int):
    query, key, value = tensors(2, 2, num_new, 100, [99], 128, torch.float32)
    found = attend(query, key, value, torch.tensor([99]))
    torch.testing.assert_close(found, expected(query, key, value, [99]), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("num_parts", [1, 3, 16])
def test_the_number_of_parts_does_not_matter(attend: Attend, num_parts: int):
    query, key, value = tensors(4, 2, 1, 300, [257], 64, torch.float32)
    found = attend(query, key, value, torch.tensor([257]), num_parts=num_parts)
    torch.testing.assert_close(found, expected(query, key, value, [257]), atol=2e-6, rtol=2e-6)


def test_an_alignment_to_the_upper_left_would_be_found_out(attend: Attend):
    query, key, value = tensors(2, 2, 5, 70, [69], 64, torch.float32)
    found = attend(query, key, value, torch.tensor([69]))
    wrong = functional.scaled_dot_product_attention(query, key[:, :, :69], value[:, :, :69], is_causal=True)
    assert (found - wrong).abs().max() > 0.1


@pytest.mark.parametrize("capability", kernels.CAPABILITIES)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_kernels_are_compiled_without_a_gpu(phase: kernels.Phase, capability: int):
    head_dim, dtype = (64, torch.float16) if capability % 20 else (128, torch.bfloat16)
    made = kernels.compiled(phase, capability, dtype, 32, 8, head_dim)
    assert f".target sm_{capability}" in made.asm["ptx"]
    # Its matrix units multiply, whatever their name on this GPU.
    assert "mma" in made.asm["ptx"]
    assert made.asm["cubin"][:4] == b"\x7fELF"


@pytest.mark.parametrize(
    ("head_dim", "dtype", "text"),
    [
        (
            48,
            torch.float16,
            "heads of width 48 in torch.float16: flash attention is made for widths 64 and 128 in float16",
        ),
        (64, torch.float64, "heads of width 64 in torch.float64"),
    ],
)
def test_what_the_kernels_are_not_made_for_is_refused(head_dim: int, dtype: torch.dtype, text: str):
    query, key, value = tensors(2, 2, 3, 10, [3], head_dim, dtype)
    with pytest.raises(InputError, match=text):
        kernels.flash_attention(query, key, value, torch.tensor([3]))


def test_strided_tensors_are_refused():
    query, key, value = tensors(2, 2, 3, 10, [3], 64, torch.float16)
    with pytest.raises(InputError, match="reads contiguous tensors"):
        kernels.flash_attention(query, key.transpose(1, 2).contiguous().transpose(1, 2), value, torch.tensor([3]))
