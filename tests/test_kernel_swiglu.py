"""kernels/swiglu.py against float64 and PyTorch: SwiGLU with the adapters' work fused in, forward and backward."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_support import DEVICE, DTYPES, assert_rounded_once, error, nan_filled, random

from lora_fast.kernels import swiglu
from lora_fast.kernels.shrink import shrink

# Cuts strips of a few dozen rows into parts already.
SMALL = swiglu.Tile(16, 16, 4, 2)
SEED = torch.tensor([20], device=DEVICE)


def torch_forward(g, u, a, kept):
    """h and S as PyTorch computes them in the dtype of the arguments: in float64 the truth, else the measure."""
    h = torch.nn.functional.silu(g) * u
    return h, (h * kept.to(h.dtype)) @ a.t()


def torch_backward(dh, g, u, ds_down, s_gate, s_up, scale_gate, scale_up, kept):
    """dg, du by autograd, then dA_down, dB_gate and dB_up; the gradient of what is None is None."""
    g, u = g.detach().requires_grad_(), u.detach().requires_grad_()
    h = torch.nn.functional.silu(g) * u
    dg, du = torch.autograd.grad(h, (g, u), dh)
    return (
        dg,
        du,
        None if ds_down is None else ds_down.t() @ (h.detach() * kept.to(h.dtype)),
        None if s_gate is None else scale_gate * (dg.t() @ s_gate),
        None if s_up is None else scale_up * (du.t() @ s_up),
    )


def keep_all(M, N):
    return torch.ones(M, N, dtype=torch.bool, device=DEVICE)


def unpacked(mask, N):
    """Bytes (1, M, ⌈N / 8⌉) → booleans (M, N), the least significant bit first."""
    assert mask.dtype == torch.uint8
    bits = (mask[0, :, :, None] >> torch.arange(8, device=mask.device)) & 1
    return bits.flatten(1)[:, :N].bool()


def forward_inputs(M, N, R, dtype):
    return random(M, N, dtype=dtype, seed=1), random(M, N, dtype=dtype, seed=2), random(R, N, dtype=dtype, seed=3)


def backward_inputs(M, N, ranks, dtype):
    rows = [random(M, N, dtype=dtype, seed=seed) for seed in (1, 2, 3)]
    return rows + [None if R is None else random(M, R, dtype=dtype, seed=4 + i) for i, R in enumerate(ranks)]


def double(tensors):
    return [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in tensors]


def assert_all_exact(results, eager, exact):
    """Every result errs at most twice as much against float64 as the same-dtype PyTorch path, as `assert_as_exact_as`.

    Where PyTorch happens to be exact a rounding is allowed, which averages out less the fewer the elements."""
    assert len(results) == len(eager) == len(exact)
    for result, plain, true in zip(results, eager, exact):
        if true is None:
            assert result is None
            continue
        rounding = torch.finfo(plain.dtype).eps / 4 * (1 + 3 / max(1, true.numel()) ** 0.5)
        assert error(result, true) <= 2 * max(error(plain, true), rounding)


def check_forward(arguments, **options):
    kept = keep_all(*arguments[0].shape)
    with nan_filled():
        h, s, mask = swiglu.swiglu_shrink(*arguments, **options)
    assert h.dtype == s.dtype == arguments[0].dtype
    if mask is not None:
        kept = unpacked(mask, kept.shape[1])
    assert_all_exact((h, s), torch_forward(*arguments, kept), torch_forward(*double(arguments), kept))
    return h, s, mask


def check_backward(arguments, mask=None, **options):
    kept = keep_all(*arguments[1].shape) if mask is None else unpacked(mask, arguments[1].shape[1])
    with nan_filled():
        results = swiglu.swiglu_backward(*arguments, 0.5, 3.0, mask, **options)
    assert all(result is None or result.dtype == torch.float32 for result in results[2:])
    eager = torch_backward(*arguments, 0.5, 3.0, kept)
    assert_all_exact(results, eager, torch_backward(*double(arguments), 0.5, 3.0, kept))
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "N", "R"), [(33, 70, 5), (70, 12, 1), (12, 33, 8), (5, 200, 16), (70, 136, 48), (33, 40, 100)]
)
def test_forward_is_as_exact_as_pytorch(M, N, R, dtype):
    check_forward(forward_inputs(M, N, R, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "N", "ranks"),
    [
        (33, 70, (5, 5, 5)),
        (70, 12, (1, 16, 8)),
        (12, 33, (8, 8, 8)),
        (40, 136, (16, 48, 1)),
        (33, 40, (None, 8, 5)),
        (33, 40, (8, None, 5)),
        (33, 40, (8, 5, None)),
        (33, 40, (None, None, None)),
        (33, 40, (48, None, 100)),
    ],
)
def test_backward_is_as_exact_as_pytorch(M, N, ranks, dtype):
    check_backward(backward_inputs(M, N, ranks, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_once(dtype):
    """h, dg and du are what is rounded; S, dA_down, dB_gate and dB_up are sums over what was."""
    M, N = 300, 500
    g, u, a = forward_inputs(M, N, 12, dtype)
    h, s, _ = check_forward((g, u, a))
    exact_h, _ = torch_forward(g.double(), u.double(), a.double(), keep_all(M, N))
    assert_rounded_once(h, exact_h)
    assert_rounded_once(s, h.double() @ a.double().t())
    arguments = backward_inputs(M, N, (12, 8, 12), dtype)
    results = check_backward(arguments)
    dg, du, da, db_gate, db_up = results
    exact = torch_backward(*double(arguments), 0.5, 3.0, keep_all(M, N))
    assert_rounded_once(dg, exact[0])
    assert_rounded_once(du, exact[1])
    _, g, u, ds_down, s_gate, s_up = double(arguments)
    h, _ = torch_forward(g, u, a.double(), keep_all(M, N))
    # An h or two lie so near the middle that fp32 falls on the other side.
    assert error(da, ds_down.t() @ h.to(dtype).double()) < 2e-5
    assert_rounded_once(db_gate, 0.5 * dg.double().t() @ s_gate)
    assert_rounded_once(db_up, 3.0 * du.double().t() @ s_up)


# From 16 columns on: a gradient of a number or two is a sum that cancels, where PyTorch's error is a matter of luck.
@settings(max_examples=10)
@given(M=st.integers(1, 150), N=st.integers(16, 150), R=st.integers(1, 40), half=st.booleans(), drop=st.booleans())
@example(M=129, N=150, R=17, half=True, drop=True)
@example(M=33, N=1, R=3, half=False, drop=False)
def test_any_shape_forward_and_backward(M, N, R, half, drop):
    """In small tiles, cut into parts, with the mask that forward drew."""
    dtype = torch.float16 if half else torch.float32
    options = {"seed": SEED, "dropout_p": 0.4} if drop else {}
    _, _, mask = check_forward(forward_inputs(M, N, R, dtype), tile=SMALL, **options)
    check_backward(backward_inputs(M, N, (R, 1, None), dtype), mask, tile=SMALL)


@pytest.mark.parametrize("R", [8, 150])
def test_the_mask_is_the_one_that_shrink_draws(R):
    """Rank 150 is beyond what the kernel sums: shrink does it."""
    g, u, a = forward_inputs(40, 70, R, torch.float32)
    h, s, mask = check_forward((g, u, a), seed=SEED, dropout_p=0.25)
    expected_s, expected_mask = shrink(h, a, seed=SEED, dropout_p=0.25)
    assert torch.equal(mask, expected_mask)
    assert error(s, expected_s) < 1e-6
    kept = unpacked(mask, 70)
    assert abs(float(kept.double().mean()) - 0.75) < 4 * (0.25 * 0.75 / kept.numel()) ** 0.5
    assert not torch.equal(mask, swiglu.swiglu_shrink(g, u, a, seed=SEED + 1, dropout_p=0.25)[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_reaches_only_the_down_projection(dtype):
    _, _, mask = swiglu.swiglu_shrink(*forward_inputs(70, 77, 8, dtype), seed=SEED, dropout_p=0.3)
    arguments = backward_inputs(70, 77, (8, 8, 8), dtype)
    masked = check_backward(arguments, mask)
    plain = swiglu.swiglu_backward(*arguments, 0.5, 3.0)
    assert [torch.equal(m, p) for m, p in zip(masked, plain)] == [True, True, False, True, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_beyond_the_kernels_limit(dtype):
    _, _, mask = check_forward(forward_inputs(33, 24, 140, dtype), seed=SEED, dropout_p=0.1)
    for ranks in ((140, 8, 140), (8, 140, None)):
        check_backward(backward_inputs(33, 24, ranks, dtype), mask)


def test_strided_rows_and_a_transposed_a():
    both = random(33, 2 * 48, seed=1)
    a = random(48, 8, seed=3).t()
    check_forward((both[:, :48], both[:, 48:], a))
    dh = random(33, 60, seed=4)[:, 5:53]
    s = random(33, 21, seed=5)
    check_backward((dh, both[:, :48], both[:, 48:], random(33, 11, seed=6)[:, 3:], s[:, :8], s[:, 8:]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_adapters(dtype):
    dh, g, u, *_ = backward_inputs(70, 200, (None, None, None), dtype)
    with nan_filled():
        h, grads = swiglu.swiglu(g, u), swiglu.swiglu_grad(dh, g, u)
    assert torch.equal(h, swiglu.swiglu_shrink(g, u, random(8, 200, dtype=dtype))[0])
    exact = torch_backward(*double((dh, g, u)), None, None, None, 1, 1, None)
    assert_all_exact((*grads, None, None, None), torch_backward(dh, g, u, None, None, None, 1, 1, None), exact)


def test_twice_the_same_bits():
    """With several parts, whose sums are added up in a fixed order."""
    assert swiglu.count_parts(strips=2, blocks=9, warps=SMALL.warps) == 2
    forward = forward_inputs(20, 140, 8, torch.float16)
    backward = backward_inputs(140, 20, (8, 8, 8), torch.float16)

    def run():
        h, s, mask = swiglu.swiglu_shrink(*forward, seed=SEED, dropout_p=0.1, tile=SMALL)
        return h, s, mask, *swiglu.swiglu_backward(*backward, 0.5, 3.0, tile=SMALL)

    assert all(torch.equal(one, two) for one, two in zip(run(), run()))


def test_no_rows():
    g, a = random(0, 24), random(8, 24)
    h, s, mask = swiglu.swiglu_shrink(g, g, a, seed=SEED, dropout_p=0.1)
    assert h.shape == (0, 24) and s.shape == (0, 8) and mask.shape == (1, 0, 3)
    s = random(0, 5)
    with nan_filled():
        dg, du, *grads = swiglu.swiglu_backward(g, g, g, s, s, None)
    assert dg.shape == du.shape == (0, 24) and grads[2] is None
    assert torch.equal(grads[0], torch.zeros(5, 24, device=DEVICE))
    assert torch.equal(grads[1], torch.zeros(24, 5, device=DEVICE))


def test_infinities_and_nan_pass_as_in_pytorch():
    inf, nan = float("inf"), float("nan")
    g = torch.tensor([[inf, -inf, nan, 1.0, -200.0, 200.0, 0.0, 1.0]], device=DEVICE)
    u = torch.tensor([[1.0, 1.0, 1.0, nan, 1.0, 1.0, inf, inf]], device=DEVICE)
    dh = torch.ones_like(g)
    dg, du, *_ = torch_backward(dh, g, u, None, None, None, 1, 1, None)
    results = swiglu.swiglu(g, u), *swiglu.swiglu_grad(dh, g, u)
    for result, expected in zip(results, (torch.nn.functional.silu(g) * u, dg, du)):
        torch.testing.assert_close(result, expected, equal_nan=True)


def test_offsets_beyond_32_bits():
    """Rows 2²⁴ elements apart: the last ones start beyond 2³¹. Memory between the rows is never touched."""
    M, N, apart = 140, 24, 1 << 24
    rows = torch.empty((M - 1) * apart + N, dtype=torch.float16, device=DEVICE).as_strided((M, N), (apart, 1))
    g, u, a = forward_inputs(M, N, 8, torch.float16)
    arguments = backward_inputs(M, N, (8, None, None), torch.float16)
    expected = swiglu.swiglu_shrink(g, u, a), swiglu.swiglu_backward(*arguments)
    for which in range(3):
        rows.copy_(arguments[which])
        assert torch.equal(swiglu.swiglu_backward(*arguments[:which], rows, *arguments[which + 1 :])[0], expected[1][0])
    rows.copy_(g)
    assert torch.equal(swiglu.swiglu_shrink(rows, u, a)[1], expected[0][1])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="takes memory that only a CPU hands out page by page")
def test_outputs_beyond_32_bits():
    """Rows 2²⁶ elements long, of which one strip is computed: the last rows start beyond 2³¹."""
    M, N, columns = 40, 1 << 26, 64
    dh, g, u = backward_inputs(M, columns, (8, None, None), torch.float16)[:3]
    expected = swiglu.swiglu_grad(dh, g, u)
    dg, du = (torch.empty(M * N, dtype=torch.float16) for _ in "gu")
    swiglu._backward_kernel[(1, 1)](
        dh, g, u, None, None, None, None,
        dg, du, None, None, None, None,
        M, N, 0, 0, 0, 0, M,
        columns, columns, columns, 0, 0, 0,
        BM=16, BN=columns, DOWN=0, GATE=0, UP=0, ALIGN=1, MASKED=False, WRITE_H=False,
    )  # fmt: skip
    for result, truth in zip((dg, du), expected):
        assert torch.equal(result.view(M, N)[:, :columns], truth)


@pytest.mark.parametrize(("M", "N"), [(1, 1), (2048, 4096), (2048, 14336), (8192, 14336), (100_000, 28672)])
def test_parts_keep_a_large_gpu_busy(M, N):
    for tile, strips, blocks in (
        (swiglu.FORWARD, M // 64 + 1, N // 64 + 1),
        (swiglu.BACKWARD, N // 64 + 1, M // 16 + 1),
        (swiglu.BACKWARD_WIDE, N // 64 + 1, M // 32 + 1),
    ):
        parts = swiglu.count_parts(strips, blocks, tile.warps)
        assert 1 <= parts <= max(1, blocks // swiglu.MIN_BLOCKS)
        if M * N > 1 << 22:
            slots = 132 * 16 // tile.warps
            rounds = -(-strips * parts // slots) * -(-blocks // parts)
            assert rounds <= 1.25 * strips * blocks / slots


def test_every_chip_and_dtype_gets_a_tile():
    for capability in ((0, 0), (8, 0), (8, 6), (8, 9), (9, 0), (9, 4), (10, 0), (12, 0)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for R in (0, 1, 16, 17, 64, 65, 128):
                for tile in (swiglu.forward_tile(R, dtype, capability), swiglu.backward_tile(R, dtype, capability)):
                    assert tile.columns % 16 == 0 and tile.rows % 16 == 0
