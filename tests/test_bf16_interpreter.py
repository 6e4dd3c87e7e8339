"""The interpreter's repaired bf16 against PyTorch's, bit for bit, over all bf16 numbers."""

import pytest
import torch
import triton
import triton.language as tl
from kernel_support import DEVICE, random

pytestmark = [
    pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU computes bf16 by itself"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of infinities and NaN
]

# All of them, with both zeros, subnormal numbers, both infinities and every NaN.
EVERY = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)


@triton.jit
def _arithmetic_kernel(
    x, y, sums, products, quotients, largest, less, negative, chosen, fused, bounded, N: tl.constexpr
):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(sums + i, a + b)
    tl.store(products + i, a * b)
    tl.store(quotients + i, a / b)
    tl.store(largest + i, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))
    tl.store(less + i, (a < b).to(tl.bfloat16))
    tl.store(negative + i, -a)
    tl.store(chosen + i, tl.where(a < b, a, 1.5))
    tl.store(fused + i, tl.fma(a, b, a))
    tl.store(bounded + i, tl.clamp(a, b - b, b, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _cast_kernel(x, to_fp32, to_fp16, to_bf16, from_fp32, from_fp16, wide, half, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    tl.store(to_fp32 + i, a.to(tl.float32))
    tl.store(to_fp16 + i, a.to(tl.float16))
    tl.store(to_bf16 + i, a.to(tl.bfloat16))
    tl.store(from_fp32 + i, tl.load(wide + i).to(tl.bfloat16))
    tl.store(from_fp16 + i, tl.load(half + i).to(tl.bfloat16))


@triton.jit
def _dot_kernel(x, y, z, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(z + i, tl.dot(tl.load(x + i), tl.load(y + i), input_precision="ieee"))


@triton.jit
def _sum_kernel(x, y, N: tl.constexpr):
    tl.store(y, tl.sum(tl.load(x + tl.arange(0, N)), 0))


def assert_same(result, expected):
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def test_arithmetic():
    other = EVERY[torch.randperm(EVERY.numel(), generator=torch.Generator().manual_seed(0))]
    out = [torch.empty_like(EVERY) for _ in range(9)]
    _arithmetic_kernel[(1,)](EVERY, other, *out, EVERY.numel())
    less = torch.lt(EVERY, other)
    expected = [EVERY + other, EVERY * other, EVERY / other, torch.maximum(EVERY, other), less.bfloat16(), -EVERY]
    expected += [torch.where(less, EVERY, 1.5), (EVERY.float() * other.float() + EVERY.float()).bfloat16()]
    expected.append(torch.minimum(torch.maximum(EVERY, other - other), other))
    for result, value in zip(out, expected, strict=True):
        assert_same(result, value)


def test_casts():
    # Around each bf16 number: exactly half-way, a little less and more, and far from it.
    bits = EVERY.view(torch.int16).to(torch.int32) << 16
    offsets = torch.tensor([0, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32).repeat(EVERY.numel() // 5 + 1)
    wide = (bits | offsets[: EVERY.numel()]).view(torch.float32)
    half = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    out = [torch.empty(EVERY.shape, dtype=d) for d in (torch.float32, torch.float16, *[torch.bfloat16] * 3)]
    _cast_kernel[(1,)](EVERY, *out, wide, half, EVERY.numel())
    for result, value in zip(out, [EVERY.float(), EVERY.half(), EVERY, wide.bfloat16(), half.bfloat16()], strict=True):
        assert_same(result, value)


def test_a_dot_adds_up_in_fp32():
    x, y = random(32, 32, dtype=torch.bfloat16), random(32, 32, dtype=torch.bfloat16, seed=1)
    z = torch.empty(32, 32)
    _dot_kernel[(1,)](x, y, z, 32)
    torch.testing.assert_close(z.double(), x.double() @ y.double(), rtol=0, atol=1e-5)


def test_a_sum_in_bf16_is_refused():
    with pytest.raises(triton.runtime.errors.InterpreterError, match="sum in fp32"):
        _sum_kernel[(1,)](EVERY, torch.empty(1), 16)
