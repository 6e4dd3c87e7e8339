"""Shrink: S = drop(x) Aᵀ for one adapter or several on the same input, in one read of x.

    without dropout   S   = x aᵀ                  x (M, K), a (Rt, K): the lora_A's of the adapters, stacked
    with dropout      S_g = (x ∘ m_g) a_gᵀ        m_g drawn here for each adapter g, independent of the others
                      m (G, M, ⌈K / 8⌉) uint8 is written, in the format of dropout.py; 1 / (1 − p) is left to lora_B

S (M, Rt) is in x's dtype, accumulated in fp32.

Bytes moved, e bytes an element: e (M K + M Rt), + G M ⌈K / 8⌉ written with dropout, + 8 M Rt for each part where K is
split (fp32 written and read again, mostly in L2). Each block of rows also reads all of a, e Rt K bytes, through L2.
x ∘ m exists in registers only. Ranks beyond one block (128 without dropout; 128, 64 and 32 each for one, two and three
adapters with it) go to neighbouring programs, which read the same tile of x at about the same time, through L2, and
redraw the same masks."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.kernels.devices import AMD, MULTIPROCESSORS, capability_of, stages_that_fit
from lora_fast.kernels.dropout import draw_bytes, spread_bytes, threshold
from lora_fast.kernels.launch import Launch, cdiv, next_power_of_2, plan
from lora_fast.kernels.partials import Sum, add_up


class Tile(NamedTuple):
    """A program sums over `columns` of K a step, for `rows` of x and `ranks` of each adapter. K is cut in `splits`."""

    rows: int
    columns: int
    ranks: int
    splits: int
    num_warps: int
    num_stages: int


# Bound by the read of x: five tiles of 8 KB under way are more than the 25 KB on each multiprocessor that cover the
# latency of 4.8 TB/s. 64 rows are the least for wgmma, and make 128 programs of 8192 rows. (128 columns spill on sm_100
# at R = 128 and on sm_120 at R = 16.)
PLAIN = Tile(64, 64, 128, 0, 4, 6)
# Decoding: 16 rows are the least for tl.dot, the programs come from splitting K.
FEW_ROWS = Tile(16, 256, 128, 0, 4, 4)
# Drawing wants registers, as the bits of a whole tile are alive at once: two or three adapters get half the columns and
# twice the warps. Keyed by the number of adapters.
DROPOUT = {1: Tile(64, 128, 128, 0, 4, 4), 2: Tile(64, 64, 64, 0, 8, 4), 3: Tile(64, 64, 32, 0, 8, 4)}
# IEEE fp32 has no matrix units: products in registers, where the sums must fit beside the operands.
FP32 = Tile(32, 32, 32, 0, 4, 2)


def pick_tile(
    M: int, K: int, ranks: tuple[int, ...], dropout: bool, dtype: torch.dtype, capability: tuple[int, int]
) -> Tile:
    """The tile for x (M, K) and adapters of these ranks."""
    if dtype.itemsize == 4:
        tile = FP32
    elif dropout:
        tile = DROPOUT[len(ranks)]
    else:
        tile = PLAIN if M > 16 else FEW_ROWS
    tile = tile._replace(ranks=min(max(next_power_of_2(max(ranks)), 16), tile.ranks))
    # Without wgmma (before Hopper, on AMD) the tile of a passes through registers as well.
    wgmma = capability[0] in (9, 10) and capability != AMD
    budget = 8192 if wgmma else 4096
    if not wgmma and tile.ranks >= 64:
        tile = tile._replace(num_warps=8)
    while tile.columns > 32 and len(ranks) * tile.ranks * tile.columns > budget:
        tile = tile._replace(columns=tile.columns // 2)
    while not (stages := _stages(tile, len(ranks), dtype, capability)):
        tile = tile._replace(columns=tile.columns // 2)
    programs = cdiv(M, tile.rows) * cdiv(max(ranks), tile.ranks)
    # Rounded down, so that all run at once; drawing needs a second program on each multiprocessor to cover waiting.
    splits = MULTIPROCESSORS * (2 if dropout else 1) // max(programs, 1)
    splits = max(1, min(splits, K // 256))
    return tile._replace(num_stages=stages, splits=splits)


def _stages(tile: Tile, adapters: int, dtype: torch.dtype, capability: tuple[int, int]) -> int:
    stage_bytes = (tile.rows + adapters * tile.ranks) * tile.columns * dtype.itemsize
    return stages_that_fit(tile.num_stages, stage_bytes, capability)


@triton.jit
def _drop(
    x, adapter: tl.constexpr, mask_ptr, seed, drop_below, stored_rows, row, column, M, K,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x (BM, BK) with its adapter's mask applied; the mask is stored for rows below `stored_rows`."""
    row_bytes = (K + 7) // 8
    byte = column // 8 + tl.arange(0, BK // 8)
    index = (row + adapter * M)[:, None] * row_bytes + byte[None, :]
    kept = draw_bytes(seed, index, drop_below)  # (BM, BK / 8)
    # The last byte of a row may reach beyond K: its bits there are stored as zeros.
    stored = kept & ((1 << tl.minimum(K - byte * 8, 8)) - 1)[None, :]
    inside = (row < stored_rows)[:, None] & (byte < row_bytes)[None, :]
    tl.store(mask_ptr + index, stored.to(tl.uint8), mask=inside)
    return tl.where(spread_bytes(kept, BM, BK), x, 0.0)


@triton.jit
def _load_a(a_ptr, first_rank, rank, block_r, columns, K, stride_ar, stride_ak, BR: tl.constexpr):
    """Block `block_r` of an adapter's rows in a, transposed: (BK, BR), zero beyond its rank and beyond K."""
    r = block_r * BR + tl.arange(0, BR)
    offsets = (first_rank + r).to(tl.int64)[:, None] * stride_ar + columns.to(tl.int64)[None, :] * stride_ak
    a = tl.load(a_ptr + offsets, mask=(r < rank)[:, None] & (columns < K)[None, :], other=0.0)  # (BR, BK)
    return a.T


@triton.jit
def _store_s(s_ptr, acc, first_rank, rank, block_r, row, M, Rt, BR: tl.constexpr):
    r = block_r * BR + tl.arange(0, BR)
    inside = (row < M)[:, None] & (r < rank)[None, :]
    tl.store(s_ptr + row[:, None] * Rt + (first_rank + r)[None, :], acc.to(s_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["drop_below"])
def _shrink_kernel(
    x_ptr, a_ptr, s_ptr, mask_ptr, seed_ptr,
    M, K, rank0, rank1, rank2, blocks_r, k_split, drop_below,
    stride_xm, stride_ar, stride_ak,
    ADAPTERS: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    # Neighbours share a tile of x where the ranks need several blocks.
    block_r = tl.program_id(0) % blocks_r
    row = (tl.program_id(0) // blocks_r).to(tl.int64) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    Rt = rank0 + rank1 + rank2
    stored_rows = tl.where(block_r == 0, M, 0)  # the programs of a block of rows draw the same masks: one stores them
    seed = tl.load(seed_ptr) if DROPOUT else 0

    acc0 = tl.zeros((BM, BR), tl.float32)
    acc1 = tl.zeros((BM, BR), tl.float32) if ADAPTERS > 1 else 0
    acc2 = tl.zeros((BM, BR), tl.float32) if ADAPTERS > 2 else 0
    for column in range(split * k_split, (split + 1) * k_split, BK):
        columns = column + tl.arange(0, BK)
        inside = (row < M)[:, None] & (columns < K)[None, :]
        x = tl.load(x_ptr + row[:, None] * stride_xm + columns[None, :], mask=inside, other=0.0)  # (BM, BK)
        x0 = _drop(x, 0, mask_ptr, seed, drop_below, stored_rows, row, column, M, K, BM, BK) if DROPOUT else x
        a0 = _load_a(a_ptr, 0, rank0, block_r, columns, K, stride_ar, stride_ak, BR)  # (BK, BR)
        acc0 = tl.dot(x0, a0, acc0, input_precision="ieee")
        if ADAPTERS > 1:
            x1 = _drop(x, 1, mask_ptr, seed, drop_below, stored_rows, row, column, M, K, BM, BK) if DROPOUT else x
            a1 = _load_a(a_ptr, rank0, rank1, block_r, columns, K, stride_ar, stride_ak, BR)
            acc1 = tl.dot(x1, a1, acc1, input_precision="ieee")
        if ADAPTERS > 2:
            x2 = _drop(x, 2, mask_ptr, seed, drop_below, stored_rows, row, column, M, K, BM, BK) if DROPOUT else x
            a2 = _load_a(a_ptr, rank0 + rank1, rank2, block_r, columns, K, stride_ar, stride_ak, BR)
            acc2 = tl.dot(x2, a2, acc2, input_precision="ieee")

    s_ptr += split.to(tl.int64) * M * Rt  # with one split s itself, else this split's partial sum
    _store_s(s_ptr, acc0, 0, rank0, block_r, row, M, Rt, BR)
    if ADAPTERS > 1:
        _store_s(s_ptr, acc1, rank0, rank1, block_r, row, M, Rt, BR)
    if ADAPTERS > 2:
        _store_s(s_ptr, acc2, rank0 + rank1, rank2, block_r, row, M, Rt, BR)


@plan
def _plan(
    M: int,
    K: int,
    strides: tuple[int, int, int],  # of a row of x, of a
    ranks: tuple[int, ...],
    drop_below: int | None,
    dtype: torch.dtype,
    tile: Tile | None,
    capability: tuple[int, int],
) -> tuple[int, Launch]:
    """Into how many parts K is split, and the launch."""
    tile = tile or pick_tile(M, K, ranks, drop_below is not None, dtype, capability)
    # Whole tiles to a split, so that a byte of a mask never belongs to two programs.
    k_split = cdiv(cdiv(K, tile.columns), tile.splits) * tile.columns
    splits = cdiv(K, k_split)
    blocks_r = cdiv(max(ranks), tile.ranks)
    return splits, Launch(
        _shrink_kernel,
        (cdiv(M, tile.rows) * blocks_r, splits),
        (M, K, *ranks, *[0] * (3 - len(ranks)), blocks_r, k_split, drop_below or 0, *strides),
        ADAPTERS=len(ranks),
        DROPOUT=drop_below is not None,
        BM=tile.rows,
        BK=tile.columns,
        BR=tile.ranks,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def shrink(
    x: Tensor,
    a: Tensor,
    ranks: tuple[int, ...] | None = None,
    *,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    tile: Tile | None = None,
    capability: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x (M, K) with contiguous rows, a (Rt, K) of any strides in x's dtype → S (M, Rt), masks (G, M, ⌈K / 8⌉) or None.

    ranks: of the G ≤ 3 adapters stacked in a, one adapter if None. seed: int64 of one element on x's device, read by
    the kernel, so that a CUDA graph draws anew; seed, M, K and p alone decide the masks. Without it, no dropout."""
    (M, K), Rt = x.shape, a.shape[0]
    s = torch.empty((M, Rt), dtype=x.dtype, device=x.device)
    mask = drop_below = None
    if seed is None or ranks is None:
        ranks = (Rt,)  # without masks stacked adapters are one
    if seed is not None:
        mask = torch.empty((len(ranks), M, (K + 7) // 8), dtype=torch.uint8, device=x.device)
        drop_below = threshold(dropout_p)
    if M == 0:
        return s, mask
    strides = (x.stride(0), *a.stride())
    splits, launch = _plan(M, K, strides, ranks, drop_below, x.dtype, tile, capability or capability_of(x))
    target = s if splits == 1 else torch.empty((splits, M, Rt), dtype=torch.float32, device=x.device)
    launch(x, a, target, mask, seed)
    if splits > 1:
        add_up([Sum(target, s)])
    return s, mask
