"""kernels/scale_columns.py against float64: a factor for each column, and its gradients."""

from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_support import DEVICE, DTYPES, nan_filled, random

from lora_fast.kernels import scale_columns

EPS = torch.finfo(torch.float32).eps


def inputs(M, N, dtype, bias_dtype=None):
    """z, g, bias, dy."""
    z, dy = random(M, N, dtype=dtype, seed=1), random(M, N, dtype=dtype, seed=2)
    return z, random(N, seed=3), None if bias_dtype is None else random(N, dtype=bias_dtype, seed=4), dy


def assert_rounded_once(result, exact, size, sums=1):
    """Each number of `result` is the exact one rounded to its dtype, but for what fp32 loses of numbers that add up to
    `size` without their signs, in so many sums."""
    info = torch.finfo(result.dtype)
    bound = info.eps / 2 * exact.abs() + info.eps * info.tiny + (sums + 1) * EPS * size
    difference = (result.double() - exact).abs()
    assert result.shape == exact.shape and bool((difference <= bound).all()), f"{float((difference / bound).max())}"


def run(z, g, bias, dy):
    """y, dz, dg into memory full of NaN."""
    with nan_filled():
        y, gradients = scale_columns.scale_columns(z, g, bias), scale_columns.scale_columns_backward(dy, z, g)
        alone, nothing = scale_columns.scale_columns_backward(dy, None, g)
    assert nothing is None
    torch.testing.assert_close(alone, gradients[0], rtol=0, atol=0, equal_nan=True)
    return y, *gradients


def check(z, g, bias, dy):
    y, dz, dg = run(z, g, bias, dy)
    assert y.dtype == z.dtype and dz.dtype == dy.dtype and dg.dtype == torch.float32
    z, g, dy = z.double(), g.double(), dy.double()
    bias = torch.zeros_like(g) if bias is None else bias.double()
    assert_rounded_once(y, z * g + bias, (z * g).abs() + bias.abs())
    assert_rounded_once(dz, dy * g, 0 * dy)
    assert_rounded_once(dg, (dy * z).sum(0), (dy * z).abs().sum(0), sums=len(z))


def small_gpu():
    """Backward's programs loop over rows, as they do on a GPU with so many rows that an interpreter takes minutes."""
    backward = scale_columns._backward.__wrapped__  # not what is remembered for more multiprocessors
    return mock.patch.multiple(scale_columns, MULTIPROCESSORS=1, _backward=backward)


@pytest.mark.parametrize("bias_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N"), [(1, 1), (33, 1), (1, 200), (33, 70), (17, 128), (130, 129)])
def test_rounded_once(M, N, dtype, bias_dtype):
    check(*inputs(M, N, dtype, bias_dtype))


@settings(max_examples=20)
@given(M=st.integers(1, 260), N=st.integers(1, 300), half=st.booleans(), bias=st.booleans())
@example(M=256, N=700, half=True, bias=True)
@example(M=97, N=1, half=False, bias=False)
def test_any_shape(M, N, half, bias):
    dtype = torch.float16 if half else torch.float32
    with small_gpu():
        check(*inputs(M, N, dtype, dtype if bias else None))


@pytest.mark.parametrize(("M", "N"), [(1, 1), (33, 70), (8191, 4096), (100_000, 128), (2048, 28_672), (99, 128_256)])
def test_parts_cover_all_rows_and_run_at_once(M, N):
    parts, launch = scale_columns._backward(M, N, N, N)
    *_, part_rows = launch.numbers
    assert (parts - 1) * part_rows < M <= parts * part_rows and part_rows % scale_columns.TILE["BLOCK_M"] == 0
    strips = -(-N // scale_columns.TILE["BLOCK_N"])
    assert launch.grid == (strips, parts) and (parts == 1 or strips * parts <= 7 * 132)
    if M * N > 1 << 22:
        assert strips * parts >= 0.9 * 5 * 132


def test_strided_rows():
    z, g, bias, dy = inputs(33, 70, torch.float16, torch.float16)
    z, dy = torch.cat([dy, z, dy], 1)[:, 65:135], torch.cat([z, dy], 1)[:, 70:]
    with small_gpu():
        check(z, g, bias, dy)
        check(z, g, bias, dy[:1].expand_as(dy))


def test_twice_the_same_bits():
    """With several parts, whose sums are added up in a fixed order."""
    arguments = inputs(200, 150, torch.float16, torch.float32)
    with small_gpu():
        assert scale_columns._backward(200, 150, 150, 150)[0] > 1
        assert all(torch.equal(one, two) for one, two in zip(run(*arguments), run(*arguments)))


@pytest.mark.parametrize(("M", "N"), [(0, 70), (33, 0), (0, 0)])
def test_no_rows_or_columns(M, N):
    y, dz, dg = run(*inputs(M, N, torch.float16, torch.float16))
    assert y.shape == dz.shape == (M, N) and torch.equal(dg, torch.zeros(N, device=DEVICE))


def test_infinities_and_nan_pass_as_in_pytorch():
    z, g, bias, dy = inputs(20, 9, torch.float32, torch.float32)
    inf, nan = float("inf"), float("nan")
    z[3, 0], z[4, 1], z[5, 2], dy[3, 3], dy[4, 4], dy[5, 5] = inf, -inf, nan, inf, -inf, nan
    z[6, 6], dy[6, 6], g[6], bias[7], g[8] = 3e38, 3e38, 2.0, nan, inf
    z[7, 8] = dy[7, 8] = 0
    for result, expected in zip(run(z, g, bias, dy), (z * g + bias, dy * g, (dy * z).sum(0))):
        torch.testing.assert_close(result, expected, equal_nan=True)


def test_offsets_beyond_32_bits():
    """Rows 2²⁴ elements apart: the last ones start beyond 2³¹. Memory between the rows is never touched."""
    M, N, apart = 140, 24, 1 << 24
    rows = torch.empty((M - 1) * apart + N, dtype=torch.float16, device=DEVICE).as_strided((M, N), (apart, 1))
    z, g, bias, dy = inputs(M, N, torch.float16, torch.float16)
    expected = run(z, g, bias, dy)
    for arguments in ((rows, g, bias, dy), (z, g, bias, rows)):
        rows.copy_(z if arguments[0] is rows else dy)
        with small_gpu():
            y, dz, dg = run(*arguments)
        assert torch.equal(y, expected[0]) and torch.equal(dz, expected[1])
        torch.testing.assert_close(dg, expected[2], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="takes memory that only a CPU hands out page by page")
def test_outputs_beyond_32_bits():
    """Rows 2²⁶ elements long, of which one strip is computed, each row a part: the last ones start beyond 2³¹."""
    M, N, columns = 34, 1 << 26, 64
    z, g, _, dy = inputs(M, columns, torch.float16)
    dz, partials = torch.empty(M, N, dtype=torch.float16), torch.empty(M, N)
    scale_columns._scale_backward_kernel[(1, M)](
        dy, z, g, dz, partials, M, N, columns, columns, 1, BLOCK_M=1, BLOCK_N=columns
    )
    assert torch.equal(dz[:, :columns], scale_columns.scale_columns_backward(dy, z, g)[0])
    assert torch.equal(partials[:, :columns], dy.float() * z.float())
