"""kernels/adapter_grads.py against float64: dS, dB and dA, every way the work is cut, masks, views."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import (
    DEVICE,
    DTYPES,
    assert_as_exact_as,
    assert_product,
    assert_rounded_once,
    count_launches,
    nan_filled,
    random,
)

from lora_fast.kernels.adapter_grads import Tile, grad_a, grad_s_and_b, partial_bytes, pick_a_tile, pick_s_and_b_tile

M, N, K = 33, 70, 70
SCALE = 0.75
# Small enough that 33 rows and 70 columns need several programs each way.
SMALL = Tile(rows=16, columns=32, ranks=16, splits=2, num_warps=4, num_stages=2)


def padded(R: int) -> int:
    return max(16, 1 << (R - 1).bit_length())


def check_s_and_b(dy, b, s, tile):
    """Runs grad_s_and_b into memory full of NaN and holds it to the error of PyTorch in the same dtype."""
    with nan_filled():
        ds, db = grad_s_and_b(dy, b, s, SCALE, tile=tile)
    assert ds.dtype == dy.dtype and db.dtype == torch.float32
    assert_as_exact_as(ds, dy @ b, dy.double() @ b.double())
    assert_as_exact_as(db, (dy.t() @ s) * SCALE, dy.double().t() @ s.double() * SCALE)
    return ds, db


def random_masks(G: int, M: int, K: int, seed: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks as bytes (G, M, ⌈K / 8⌉), their bits beyond K zero, and as 0 and 1 (G, M, K)."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.zeros(G, M, (K + 7) // 8 * 8, dtype=torch.int64)
    bits[..., :K] = torch.rand(G, M, K, generator=generator) < 0.7
    packed = (bits.view(G, M, -1, 8) << torch.arange(8)).sum(-1).to(torch.uint8)
    return packed.to(DEVICE), bits[..., :K].to(DEVICE)


def check_a(ds, x, ranks=None, masks=None, tile=None):
    packed, bits = masks or (None, None)
    with nan_filled():
        das = grad_a(ds, x, ranks, packed, tile=tile)
    assert [da.shape[0] for da in das] == list(ranks or [ds.shape[1]])
    assert all(da.untyped_storage().nbytes() == da.nbytes for da in das)  # none holds another's memory
    da = torch.cat(das)
    assert da.dtype == torch.float32
    parts = (ds,) if ranks is None or masks is None else ds.split(ranks, 1)
    dropped = [x] * len(parts) if bits is None else [x * m.to(x.dtype) for m in bits]
    eager = torch.cat([part.t() @ d for part, d in zip(parts, dropped)])
    exact = torch.cat([part.double().t() @ d.double() for part, d in zip(parts, dropped)])
    assert_as_exact_as(da, eager, exact)
    return da


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", [1, 5, 8, 16, 48, 70])
def test_s_and_b(R, dtype):
    dy, b, s = random(M, N, dtype=dtype), random(N, R, dtype=dtype, seed=1), random(M, R, dtype=dtype, seed=2)
    check_s_and_b(dy, b, s, SMALL._replace(ranks=padded(R)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_once(dtype):
    dy, b, s = (random(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(300, 500), (500, 12), (300, 12)]))
    ds, db = check_s_and_b(dy, b, s, SMALL)
    assert_rounded_once(ds, dy.double() @ b.double())
    assert_rounded_once(db, dy.double().t() @ s.double() * SCALE)
    packed, bits = random_masks(2, 300, 500)
    da = check_a(torch.cat([s, ds], 1), dy, (12, 12), (packed, bits))
    assert_rounded_once(da, torch.cat([f.double().t() @ (dy.double() * m) for f, m in zip((s, ds), bits)]))


@pytest.mark.parametrize("rows, columns, splits", [(64, 128, 1), (16, 128, 3), (64, 32, 9)])
def test_s_and_b_however_it_is_cut(rows, columns, splits):
    tile = Tile(rows, columns, 16, splits, 4, 2)
    check_s_and_b(random(M, N), random(N, 12, seed=1), random(M, 12, seed=2), tile)


@pytest.mark.parametrize("M, N, R", [(33, 70, 12), (96, 300, 3)])
def test_s_and_b_with_a_tile_of_its_own_choice(M, N, R):
    check_s_and_b(random(M, N), random(N, R, seed=1), random(M, R, seed=2), None)


@given(M=st.integers(1, 40), N=st.integers(1, 80), R=st.integers(1, 40), splits=st.integers(1, 4))
@settings(max_examples=10)
def test_s_and_b_any_shape(M, N, R, splits):
    dy, b, s = random(M, N), random(N, R, seed=1), random(M, R, seed=2)
    with nan_filled():
        ds, db = grad_s_and_b(dy, b, s, SCALE, tile=SMALL._replace(ranks=padded(R), splits=splits))
    assert_product(ds, dy, b)
    assert_product(db, SCALE * dy.t(), s)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", [1, 5, 8, 16, 48, 130])
def test_a(R, dtype):
    check_a(random(M, R, dtype=dtype, seed=1), random(M, K, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [(16,), (5, 8), (48, 1, 12)])
@pytest.mark.parametrize("tile", [None, SMALL])
def test_a_with_masks(ranks, dtype, tile):
    ds, x = random(M, sum(ranks), dtype=dtype, seed=1), random(M, K, dtype=dtype)
    check_a(ds, x, ranks, random_masks(len(ranks), M, K), tile)


@given(
    M=st.integers(1, 40),
    K=st.integers(1, 80),
    ranks=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    splits=st.integers(1, 4),
    masked=st.booleans(),
)
@settings(max_examples=10)
def test_a_any_shape(M, K, ranks, splits, masked):
    ds, x = random(M, sum(ranks), seed=1), random(M, K)
    packed, bits = random_masks(len(ranks), M, K) if masked else (None, [1.0] * len(ranks))
    with nan_filled():
        das = grad_a(ds, x, ranks, packed, tile=SMALL._replace(splits=splits))
    assert [da.shape for da in das] == [(rank, K) for rank in ranks]
    for m, da_part, ds_part in zip(bits, das, ds.split(ranks, 1)):
        assert_product(da_part, ds_part.t(), x * m)


def test_rows_of_views():
    stacked, dy = random(M, 40, seed=1), random(M, 2 * N)[:, 3 : 3 + N]
    ds, _ = check_s_and_b(dy, random(16, N, seed=2).t(), stacked[:, 4:20], SMALL)
    assert ds.is_contiguous()
    check_a(stacked[:, 4:24], random(M, 2 * K, seed=3)[:, 5 : 5 + K], (12, 8), random_masks(2, M, K), SMALL)
    check_a(stacked[:, 4:24], random(2 * M, K, seed=3)[::2], tile=SMALL)


@pytest.mark.parametrize("splits", [1, 2])
def test_stacked_adapters_without_masks_are_one(splits):
    """Any number of them: in one launch, and one that takes their rows apart."""
    ds, x, ranks, tile = random(M, 29, seed=1), random(M, K), (12, 8, 1, 3, 5), SMALL._replace(splits=splits)
    with count_launches() as launches:
        das = grad_a(ds, x, ranks, tile=tile)
    assert launches == {"_grad_a_kernel": 1, "_sum_kernel": 1}
    assert torch.equal(torch.cat(das), *grad_a(ds, x, tile=tile))
    check_a(ds, x, ranks, tile=tile)


def test_same_bits_twice():
    dy, b, s = (random(*shape, dtype=torch.float16, seed=i) for i, shape in enumerate([(M, N), (N, 12), (M, 12)]))
    mask = random_masks(2, M, N)[0]
    first, second = (
        (*grad_s_and_b(dy, b, s, SCALE, tile=SMALL), *grad_a(s, dy, (8, 4), mask, tile=SMALL)) for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second))


@pytest.mark.parametrize("masked", [False, True])
def test_no_rows(masked):
    ds, db = grad_s_and_b(random(0, N), random(N, 12), random(0, 12), SCALE)
    assert ds.shape == (0, 12) and torch.equal(db, torch.zeros_like(db)) and db.shape == (N, 12)
    mask = torch.empty(2, 0, 9, dtype=torch.uint8, device=DEVICE) if masked else None
    da = torch.cat(grad_a(random(0, 12), random(0, K), (8, 4), mask))
    assert da.shape == (12, K) and torch.equal(da, torch.zeros_like(da))


def test_nan_stays_in_its_row_and_column():
    dy = random(M, N)
    dy[3, 69] = float("nan")
    ds, db = grad_s_and_b(dy, random(N, 5, seed=1), random(M, 5, seed=2), SCALE, tile=SMALL)
    (da,) = grad_a(random(M, 5, seed=2), dy)
    assert ds[3].isnan().all() and int(ds.isnan().sum()) == 5
    assert db[69].isnan().all() and int(db.isnan().sum()) == 5
    assert da[:, 69].isnan().all() and int(da.isnan().sum()) == 5


@pytest.mark.skipif(DEVICE.type != "cpu", reason="needs 4 GB of memory that the operating system hands out lazily")
def test_offsets_beyond_31_bits():
    stride = 2**31 // (M - 2)  # the last row starts beyond 2³¹ elements
    x = torch.empty(stride * (M - 1) + K, dtype=torch.float16).as_strided((M, K), (stride, 1))
    x.copy_(random(M, K, dtype=torch.float16))
    b, s = random(K, 5, dtype=torch.float16, seed=1), random(M, 5, dtype=torch.float16, seed=2)
    ds, db = grad_s_and_b(x, b, s, SCALE, tile=SMALL)
    assert_as_exact_as(ds, x @ b, x.double() @ b.double())
    assert_as_exact_as(db, (x.t() @ s) * SCALE, x.double().t() @ s.double() * SCALE)
    assert_as_exact_as(*grad_a(s, x, tile=SMALL), s.t() @ x, s.double().t() @ x.double())


def reads(M, N, R, dtype, capability) -> float:
    """Bytes of partial sums of dS and dB, in reads of dy."""
    tile = pick_s_and_b_tile(M, N, R, dtype, capability)
    return math.inf if tile is None else partial_bytes(M, N, R, tile) / (M * N * dtype.itemsize)


def test_tiles_cover_shapes_and_chips():
    for capability in [(0, 0), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (9, 4)]:
        for dtype in (torch.float32, torch.bfloat16):
            for ranks in [(1,), (512,), (16, 16), (300, 2), (16, 8, 8), (64, 64, 64)]:
                tile = pick_a_tile(8192, 4096, ranks, True, dtype, capability)
                assert tile.num_stages >= 2 and tile.rows >= 16 and tile.splits >= 1
            # Partial sums, in reads of dy: few at small ranks, at 64 one or two, at 128 too many.
            for M, N in ((8192, 4096), (8192, 14336), (2048, 4096)):
                assert reads(M, N, 16, dtype, capability) < 1
                assert reads(M, N, 128, dtype, capability) >= 3
                if dtype == torch.bfloat16 and capability != (9, 4):  # of AMD's registers 64 ranks take too many
                    assert 0.9 < reads(M, N, 64, dtype, capability) < 3
    # 8 strips by 16 groups of rows occupy 128 of 132 multiprocessors.
    assert pick_s_and_b_tile(8192, 4096, 16, torch.bfloat16, (9, 0))[:4] == (64, 512, 16, 16)
    assert partial_bytes(8192, 4096, 16, pick_s_and_b_tile(8192, 4096, 16, torch.bfloat16, (9, 0))) == 16777216
    assert pick_s_and_b_tile(8192, 4096, 512, torch.bfloat16, (9, 0)) is None
