"""kernels/shrink.py against float64: values, masks, every way the work is cut."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import (
    DEVICE,
    DTYPES,
    assert_as_exact_as,
    assert_product,
    assert_rounded_once,
    nan_filled,
    random,
)

from lora_fast.kernels.dropout import draw_bytes, threshold
from lora_fast.kernels.shrink import Tile, pick_tile, shrink

M, K = 33, 70
# Small enough that 33 rows, 70 columns and 48 ranks need several blocks each way.
SMALL = Tile(rows=16, columns=32, ranks=16, splits=1, num_warps=4, num_stages=2)


def seed_of(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64, device=DEVICE)


def unpacked(mask: torch.Tensor, K: int) -> torch.Tensor:
    """uint8 (…, ⌈K / 8⌉) → 0 and 1 (…, K) in float64."""
    bits = (mask[..., None] >> torch.arange(8, device=mask.device)) & 1
    return bits.flatten(-2)[..., :K].double()


def check(x, a, ranks=None, *, seed=None, dropout_p=0.0, tile=None):
    """Runs shrink into memory full of NaN and holds it to the error of PyTorch in the same dtype; returns S, masks."""
    with nan_filled():
        s, mask = shrink(x, a, ranks, seed=seed, dropout_p=dropout_p, tile=tile)
    assert s.dtype == x.dtype and s.shape == (x.shape[0], a.shape[0])
    groups = a.split(ranks) if seed is not None and ranks is not None else (a,)
    dropped = [x] * len(groups) if mask is None else [x * m.to(x.dtype) for m in unpacked(mask, x.shape[1])]
    eager = torch.cat([d @ part.t() for d, part in zip(dropped, groups)], 1)
    exact = torch.cat([d.double() @ part.double().t() for d, part in zip(dropped, groups)], 1)
    assert_as_exact_as(s, eager, exact)
    return s, mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", [1, 5, 8, 16, 48, 130])
def test_values(R, dtype):
    check(random(M, K, dtype=dtype), random(R, K, dtype=dtype, seed=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [(16,), (5, 8), (48, 1, 12)])
def test_values_with_dropout(ranks, dtype):
    x, a = random(M, K, dtype=dtype), random(sum(ranks), K, dtype=dtype, seed=1)
    _, mask = check(x, a, ranks, seed=seed_of(3), dropout_p=0.3)
    assert mask.shape == (len(ranks), M, 9) and mask.dtype == torch.uint8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("splits", [1, 3])
def test_rounded_once(dtype, splits):
    x, a = random(M, 500, dtype=dtype), random(20, 500, dtype=dtype, seed=1)
    s, _ = check(x, a, tile=SMALL._replace(splits=splits))
    assert_rounded_once(s, x.double() @ a.double().t())
    s, mask = check(x, a, (12, 8), seed=seed_of(3), dropout_p=0.3, tile=SMALL)
    parts = zip(unpacked(mask, 500), a.double().split((12, 8)))
    assert_rounded_once(s, torch.cat([(x.double() * kept) @ part.t() for kept, part in parts], 1))


@given(
    M=st.integers(1, 40),
    K=st.integers(1, 80),
    ranks=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    splits=st.integers(1, 4),
    dropout=st.booleans(),
)
@settings(max_examples=12)
def test_any_shape(M, K, ranks, splits, dropout):
    x, a = random(M, K), random(sum(ranks), K, seed=1)
    seed = seed_of(5) if dropout else None
    with nan_filled():
        s, mask = shrink(x, a, ranks, seed=seed, dropout_p=0.5, tile=SMALL._replace(splits=splits))
    assert s.shape == (M, sum(ranks))
    kept = unpacked(mask, K) if dropout else [1.0] * len(ranks)
    for m, s_part, a_part in zip(kept, s.split(ranks, 1), a.split(ranks)):
        assert_product(s_part, x * m, a_part.t())


@triton.jit
def _draw_kernel(seed_ptr, out_ptr, count, drop_below, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    byte = draw_bytes(tl.load(seed_ptr), index, drop_below)
    tl.store(out_ptr + index, byte.to(tl.uint8), mask=index < count)


@pytest.mark.parametrize("tile", [None, SMALL, SMALL._replace(splits=3), Tile(32, 64, 32, 2, 4, 2)])
def test_masks_depend_on_seed_and_place_only(tile):
    x, a = random(M, K), random(48, K, seed=1)
    with nan_filled():
        _, mask = shrink(x, a, (16, 30, 2), seed=seed_of(11), dropout_p=0.25, tile=tile)
    expected = torch.empty(3 * M * 9, dtype=torch.uint8, device=DEVICE)
    _draw_kernel[(triton.cdiv(expected.numel(), 256),)](
        seed_of(11), expected, expected.numel(), threshold(0.25), BLOCK=256
    )
    expected = expected.view(3, M, 9)
    expected[..., -1] &= 0b00111111  # 70 = 8 · 8 + 6: the last two bits lie beyond K
    assert torch.equal(mask, expected)


def test_masks_keep_the_right_share_and_differ_between_adapters():
    x, a = random(64, 256), random(3, 256, seed=1)
    _, mask = shrink(x, a, (1, 1, 1), seed=seed_of(1), dropout_p=0.1)
    other_seed = shrink(x, a, (1, 1, 1), seed=seed_of(2), dropout_p=0.1)[1]
    kept = unpacked(mask, 256)
    n = 64 * 256
    for g in range(3):
        assert abs(float(kept[g].sum()) - 0.9 * n) < 5 * (n * 0.09) ** 0.5  # five standard deviations
        for other in (kept[(g + 1) % 3], unpacked(other_seed, 256)[g]):
            # Independent masks agree with probability 0.9² + 0.1² = 0.82.
            assert abs(float((kept[g] == other).sum()) - 0.82 * n) < 5 * (n * 0.82 * 0.18) ** 0.5


@pytest.mark.parametrize("seed", [None, 7])
def test_same_bits_twice(seed):
    x, a = random(M, K, dtype=torch.float16), random(20, K, dtype=torch.float16, seed=1)
    seed = None if seed is None else seed_of(seed)
    tile = SMALL._replace(splits=3)
    (s0, mask0), (s1, mask1) = (shrink(x, a, (16, 4), seed=seed, dropout_p=0.2, tile=tile) for _ in range(2))
    assert torch.equal(s0, s1)
    assert seed is None or torch.equal(mask0, mask1)


def test_stacked_adapters_without_dropout_are_one():
    x, a = random(M, K), random(20, K, seed=1)
    assert torch.equal(shrink(x, a, (16, 4))[0], shrink(x, a)[0])


def test_strides():
    wide, a = random(M, 2 * K), random(K, 12, seed=1)
    check(wide[:, 3 : 3 + K], a.t())  # rows further apart than they are long; a stored as (K, R)
    check(wide[::2, :K], random(12, 2 * K, seed=2)[:, ::2], (8, 4), seed=seed_of(3), dropout_p=0.3)


def test_few_rows():
    check(random(1, 1100, dtype=torch.float16), random(16, 1100, dtype=torch.float16, seed=1))


def test_more_partial_sums_than_one_step_adds():
    check(random(4, 640), random(3, 640, seed=1), tile=SMALL._replace(splits=20))


@pytest.mark.parametrize("seed", [None, 7])
def test_no_rows(seed):
    s, mask = shrink(random(0, K), random(12, K), (8, 4), seed=None if seed is None else seed_of(seed), dropout_p=0.2)
    assert s.shape == (0, 12)
    assert mask is None if seed is None else mask.shape == (2, 0, 9)


def test_nan_and_inf_pass_through_and_stay_in_their_rows():
    x, a = random(M, K), random(5, K, seed=1)
    x[3, 69], x[7, 0] = float("nan"), float("inf")
    s, _ = shrink(x, a)
    assert s[3].isnan().all() and not s[7].isfinite().any()
    assert s[[i for i in range(M) if i not in (3, 7)]].isfinite().all()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="needs 9 GB of memory that the operating system hands out lazily")
def test_offsets_beyond_31_bits():
    rows = 33
    stride = 2**31 // (rows - 2)  # the last row starts beyond 2³¹ elements
    x = torch.empty(stride * (rows - 1) + K, dtype=torch.float16).as_strided((rows, K), (stride, 1))
    x.copy_(random(rows, K, dtype=torch.float16))
    check(x, random(5, K, dtype=torch.float16, seed=1))


def test_tiles_cover_shapes_and_chips():
    for capability in [(0, 0), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (9, 4)]:
        for ranks in [(1,), (512,), (16, 16), (300, 2), (16, 8, 8), (64, 64, 64)]:
            for dtype in (torch.float32, torch.bfloat16):
                for dropout in (False, True):
                    if not dropout:
                        ranks = (sum(ranks),)
                    tile = pick_tile(8192, 4096, ranks, dropout, dtype, capability)
                    assert tile.num_stages >= 2 and tile.columns >= 32 and tile.splits >= 1
                    assert tile.ranks >= min(16, max(ranks))
    # A few tokens fill the GPU by splitting K.
    assert pick_tile(1, 4096, (16,), False, torch.bfloat16, (9, 0)).splits == 16
