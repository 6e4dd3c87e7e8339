"""Gradients of the adapters: dS and dB from one read of dy, dA from one read of x.

    grad_s_and_b   dS = dy b,  dB = scale · dyᵀ S      dy (M, N), b (N, R), S (M, R);  b carries the scale already
    grad_a         dA_g = dS_gᵀ (x ∘ m_g)              x (M, K), dS (M, Rt), m from `shrink`, of one adapter or several

dS is in dy's dtype; dB (N, R) and every dA_g (R_g, K) are fp32, for the master weights. All are accumulated in fp32,
without atomics: programs write partial sums, which partials.py adds in a fixed order.

grad_s_and_b cuts dy into `strips` of columns and `splits` of rows. A program keeps the dB of its strip while it walks
down its rows, and writes the strip's share of each row's dS. Bytes moved, e bytes an element:
    e (M N + 2 M R) + 4 N R + 8 R (strips · M + splits · N), the last term for partial sums, mostly in L2
At M = 8192, N = 4096, R = 16 that is 8 strips and 16 splits: 67 MB of dy and 17 MB of partial sums (8 MB written, then
read); at N = 14336, 28 strips and 4 splits: 235 MB and 37 MB. The partial sums grow with R: at R = 64 they are as many
bytes as a second read of dy, for small M and N more at any rank. Then two matrix products may be faster, which read dy
each; the caller chooses.

grad_a moves e (M K + M Rt) + 4 Rt K, + G M ⌈K / 8⌉ of masks, + 8 Rt K for each part where M is split, or once where
the dA of several adapters are taken apart; each block of columns also reads all of dS, e M Rt, through L2. Ranks beyond
one block (128; with masks 128, 64 and 32 each for one, two and three adapters) go to neighbouring programs, which share
x through L2."""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.kernels.devices import AMD, MULTIPROCESSORS, capability_of, stages_that_fit
from lora_fast.kernels.dropout import spread_bytes
from lora_fast.kernels.launch import Launch, cdiv, next_power_of_2, plan
from lora_fast.kernels.partials import Sum, add_up


class Tile(NamedTuple):
    """A program takes `rows` of dy or x at a time, always the same `columns` and `ranks`; `splits` programs share M."""

    rows: int
    columns: int
    ranks: int
    splits: int
    num_warps: int
    num_stages: int


# Widths of a strip of dy: the wider, the fewer partial sums.
STRIPS = (512, 256, 128)
# The tile of grad_a, by the number of masks. Three tiles of 16 KB under way cover the memory's latency; with 128
# columns a row's share of a mask is 16 bytes, enough for an asynchronous copy.
PLAIN = Tile(64, 128, 128, 0, 4, 4)
MASKED = {1: Tile(64, 128, 128, 0, 4, 4), 2: Tile(64, 128, 64, 0, 8, 4), 3: Tile(64, 128, 32, 0, 8, 4)}
# IEEE fp32 has no matrix units: products in registers, where the sums must fit beside the operands.
FP32 = Tile(32, 32, 32, 0, 4, 2)


def _has_wgmma(capability: tuple[int, int]) -> bool:
    """Or its successor: a matrix unit that reads both operands from shared memory."""
    return capability[0] in (9, 10) and capability != AMD


def _padded(R: int) -> int:
    return max(next_power_of_2(R), 16)


@plan
def pick_s_and_b_tile(M: int, N: int, R: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tile | None:
    """The tile with the fewest partial sums for dy (M, N) and rank R; None where none fits into a program (beyond R =
    64, by the chip)."""
    ranks, size = _padded(R), dtype.itemsize
    tiles = []
    for (rows, sums), columns in itertools.product(_rows_and_sums(dtype, capability), STRIPS):
        stage_bytes, b_bytes = rows * (columns + ranks) * size, columns * ranks * size
        stages = stages_that_fit(4, stage_bytes, capability, other_bytes=b_bytes)
        if columns * ranks <= sums and stages:
            splits = max(1, min(MULTIPROCESSORS // cdiv(N, columns), cdiv(M, rows)))
            tiles.append(Tile(rows, columns, ranks, splits, 8, stages))
    return min(tiles, key=lambda tile: partial_bytes(M, N, R, tile), default=None)


def _rows_and_sums(dtype: torch.dtype, capability: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Rows that a program of grad_s_and_b may take at a time, and how many sums of dB then fit beside them.

    The sums stay in registers: of 256 threads, 64 each where wgmma, which wants 64 rows, reads its operands from shared
    memory; where they pass through registers, 32, or 64 beside half the rows; 8 where fp32 products are made there."""
    if dtype.itemsize == 4:
        return ((32, 2048),)
    if _has_wgmma(capability):
        return ((64, 16384),)
    return ((64, 8192),) if capability == AMD else ((64, 8192), (32, 16384))


def partial_bytes(M: int, N: int, R: int, tile: Tile) -> int:
    """Bytes of partial sums of dS and dB, in fp32, written and read."""
    strips = cdiv(N, tile.columns)
    _, splits = _split_rows(M, tile)
    return 8 * R * ((strips * M if strips > 1 else 0) + (splits * N if splits > 1 else 0))


def pick_a_tile(
    M: int, K: int, ranks: tuple[int, ...], masked: bool, dtype: torch.dtype, capability: tuple[int, int]
) -> Tile:
    """The tile for x (M, K) and adapters of these ranks."""
    tile = FP32 if dtype.itemsize == 4 else MASKED[len(ranks)] if masked else PLAIN
    tile = tile._replace(ranks=min(_padded(max(ranks)), tile.ranks))
    if tile.ranks == 128:
        tile = tile._replace(num_warps=8)
    sums = 16384 if _has_wgmma(capability) else 8192 if len(ranks) < 3 else 4096
    while tile.columns > 64 and len(ranks) * tile.ranks * tile.columns > sums:
        tile = tile._replace(columns=tile.columns // 2)
    while not (stages := _stages(tile, len(ranks), dtype, capability)):
        tile = tile._replace(rows=tile.rows // 2)
    programs = cdiv(K, tile.columns) * cdiv(max(ranks), tile.ranks)
    # Rounded down, so that all run at once; with masks, a second program on each multiprocessor covers waiting.
    splits = MULTIPROCESSORS * (2 if masked else 1) // programs
    return tile._replace(num_stages=stages, splits=max(1, min(splits, M // 256)))


def _stages(tile: Tile, adapters: int, dtype: torch.dtype, capability: tuple[int, int]) -> int:
    stage_bytes = tile.rows * (tile.columns + adapters * tile.ranks) * dtype.itemsize
    return stages_that_fit(tile.num_stages, stage_bytes, capability)


@triton.jit
def _grad_s_and_b_kernel(
    dy_ptr, b_ptr, s_ptr, ds_ptr, db_ptr, scale,
    M, N, R, group_rows,
    stride_ym, stride_bn, stride_br, stride_sm, stride_ds,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    strip = tl.program_id(0)
    group = tl.program_id(1)
    columns = strip * BN + tl.arange(0, BN)
    r = tl.arange(0, BR)
    inside_b = (columns < N)[:, None] & (r < R)[None, :]
    columns_64 = columns.to(tl.int64)[:, None]
    b = tl.load(b_ptr + columns_64 * stride_bn + r[None, :] * stride_br, mask=inside_b, other=0.0)  # (BN, BR)
    # With one strip ds itself, else this strip's partial sum; db likewise.
    ds_ptr += strip.to(tl.int64) * M * R
    db_ptr += group.to(tl.int64) * N * R

    db = tl.zeros((BN, BR), tl.float32)
    for first in range(group * group_rows, (group + 1) * group_rows, BM):
        row = first + tl.arange(0, BM).to(tl.int64)
        inside = (row < M)[:, None] & (columns < N)[None, :]
        dy = tl.load(dy_ptr + row[:, None] * stride_ym + columns[None, :], mask=inside, other=0.0)  # (BM, BN)
        inside = (row < M)[:, None] & (r < R)[None, :]
        s = tl.load(s_ptr + row[:, None] * stride_sm + r[None, :], mask=inside, other=0.0)  # (BM, BR)
        ds = tl.dot(dy, b, input_precision="ieee")
        db = tl.dot(tl.trans(dy), s, db, input_precision="ieee")
        tl.store(ds_ptr + row[:, None] * stride_ds + r[None, :], ds.to(ds_ptr.dtype.element_ty), mask=inside)

    tl.store(db_ptr + columns_64 * R + r[None, :], db * scale, mask=inside_b)


@triton.jit
def _masked(x, adapter: tl.constexpr, mask_ptr, row, block_k, M, row_bytes, BM: tl.constexpr, BK: tl.constexpr):
    """x (BM, BK) with its adapter's mask applied."""
    # row_bytes, an argument, and a first byte that is a plain multiple: so Triton sees 16 aligned bytes and pipelines.
    byte = block_k * (BK // 8) + tl.arange(0, BK // 8)
    inside = (row < M)[:, None] & (byte < row_bytes)[None, :]
    offsets = (row + adapter * M)[:, None] * row_bytes + byte[None, :]
    kept = tl.load(mask_ptr + offsets, mask=inside, other=0)  # (BM, BK / 8)
    return tl.where(spread_bytes(kept, BM, BK), x, 0.0)


@triton.jit
def _load_ds(ds_ptr, first_rank, rank, block_r, row, M, stride_sm, BR: tl.constexpr):
    """Block `block_r` of an adapter's columns of ds: (BM, BR), zero beyond its rank and beyond M."""
    r = block_r * BR + tl.arange(0, BR)
    inside = (row < M)[:, None] & (r < rank)[None, :]
    return tl.load(ds_ptr + row[:, None] * stride_sm + (first_rank + r)[None, :], mask=inside, other=0.0)


@triton.jit
def _store_da(da_ptr, acc, first_rank, rank, block_r, columns, K, BR: tl.constexpr):
    r = block_r * BR + tl.arange(0, BR)
    inside = (r < rank)[:, None] & (columns < K)[None, :]
    tl.store(da_ptr + (first_rank + r).to(tl.int64)[:, None] * K + columns[None, :], tl.trans(acc), mask=inside)


@triton.jit
def _grad_a_kernel(
    ds_ptr, x_ptr, mask_ptr, da_ptr,
    M, K, rank0, rank1, rank2, row_bytes, blocks_r, split_rows,
    stride_sm, stride_xm,
    ADAPTERS: tl.constexpr, MASKED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    # Neighbours share a tile of x where the ranks need several blocks.
    block_r = tl.program_id(0) % blocks_r
    block_k = tl.program_id(0) // blocks_r
    split = tl.program_id(1)
    columns = block_k * BK + tl.arange(0, BK)
    Rt = rank0 + rank1 + rank2

    # Transposed sums, since the side of a tile that wgmma wants long, 64 at least, must be K, not R.
    acc0 = tl.zeros((BK, BR), tl.float32)
    acc1 = tl.zeros((BK, BR), tl.float32) if ADAPTERS > 1 else 0
    acc2 = tl.zeros((BK, BR), tl.float32) if ADAPTERS > 2 else 0
    for first in range(split * split_rows, (split + 1) * split_rows, BM):
        row = first + tl.arange(0, BM).to(tl.int64)
        inside = (row < M)[:, None] & (columns < K)[None, :]
        x = tl.load(x_ptr + row[:, None] * stride_xm + columns[None, :], mask=inside, other=0.0)  # (BM, BK)
        x0 = _masked(x, 0, mask_ptr, row, block_k, M, row_bytes, BM, BK) if MASKED else x
        ds0 = _load_ds(ds_ptr, 0, rank0, block_r, row, M, stride_sm, BR)  # (BM, BR)
        acc0 = tl.dot(tl.trans(x0), ds0, acc0, input_precision="ieee")
        if ADAPTERS > 1:
            x1 = _masked(x, 1, mask_ptr, row, block_k, M, row_bytes, BM, BK) if MASKED else x
            ds1 = _load_ds(ds_ptr, rank0, rank1, block_r, row, M, stride_sm, BR)
            acc1 = tl.dot(tl.trans(x1), ds1, acc1, input_precision="ieee")
        if ADAPTERS > 2:
            x2 = _masked(x, 2, mask_ptr, row, block_k, M, row_bytes, BM, BK) if MASKED else x
            ds2 = _load_ds(ds_ptr, rank0 + rank1, rank2, block_r, row, M, stride_sm, BR)
            acc2 = tl.dot(tl.trans(x2), ds2, acc2, input_precision="ieee")

    da_ptr += split.to(tl.int64) * Rt * K  # with one split da itself, else this split's partial sum
    _store_da(da_ptr, acc0, 0, rank0, block_r, columns, K, BR)
    if ADAPTERS > 1:
        _store_da(da_ptr, acc1, rank0, rank1, block_r, columns, K, BR)
    if ADAPTERS > 2:
        _store_da(da_ptr, acc2, rank0 + rank1, rank2, block_r, columns, K, BR)


def grad_b(dy: Tensor, s: Tensor, scale: float) -> Tensor:
    """dB (N, R) fp32 alone, by a matrix product: scaled in fp32, since fp16 could overflow."""
    return (dy.t() @ s).float().mul_(scale)


def _split_rows(M: int, tile: Tile) -> tuple[int, int]:
    """Rows of each split, whole tiles, and the number of splits that then have any."""
    rows = cdiv(cdiv(M, tile.rows), tile.splits) * tile.rows
    return rows, cdiv(M, rows)


@plan
def _s_and_b_plan(
    M: int,
    N: int,
    R: int,
    scale: float,
    strides: tuple[int, ...],  # of a row of dy, of b, of a row of s
    stride_ds: int,
    dtype: torch.dtype,
    tile: Tile | None,
    capability: tuple[int, int],
) -> tuple[int, int, Launch]:
    """Strips and groups, each with a partial sum of its own, and the launch."""
    tile = tile or pick_s_and_b_tile(M, N, R, dtype, capability)
    strips = cdiv(N, tile.columns)
    group_rows, groups = _split_rows(M, tile)
    launch = Launch(
        _grad_s_and_b_kernel,
        (strips, groups),
        (scale, M, N, R, group_rows, *strides, stride_ds if strips == 1 else R),
        BM=tile.rows,
        BN=tile.columns,
        BR=tile.ranks,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return strips, groups, launch


def grad_s_and_b(
    dy: Tensor,
    b: Tensor,
    s: Tensor,
    scale: float,
    *,
    ds: Tensor | None = None,
    later: list[Sum] | None = None,
    tile: Tile | None = None,
    capability: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """dy (M, N), S (M, R) with contiguous rows, b (N, R) of any strides → dS (M, R) in their dtype, dB (N, R) fp32.

    R: at most what pick_s_and_b_tile finds a tile for. ds: where dS goes, with contiguous rows (columns of the dS of
    several layers, say). later: a list; what is still to be added up is put there for the caller's `add_up`."""
    (M, N), R = dy.shape, s.shape[1]
    ds = torch.empty((M, R), dtype=dy.dtype, device=dy.device) if ds is None else ds
    if M == 0:
        return ds, torch.zeros((N, R), dtype=torch.float32, device=dy.device)
    strides = (dy.stride(0), *b.stride(), s.stride(0))
    kind = dy.dtype, tile, capability or capability_of(dy)
    strips, groups, launch = _s_and_b_plan(M, N, R, scale, strides, ds.stride(0), *kind)
    dB = torch.empty((N, R), dtype=torch.float32, device=dy.device)
    ds_target = ds if strips == 1 else torch.empty((strips, M, R), dtype=torch.float32, device=dy.device)
    db_target = dB if groups == 1 else torch.empty((groups, N, R), dtype=torch.float32, device=dy.device)
    launch(dy, b, s, ds_target, db_target)
    sums = [Sum(ds_target, ds)] if strips > 1 else []
    if groups > 1:
        sums.append(Sum(db_target, dB))
    if later is None:
        add_up(sums)
    else:
        later += sums
    return ds, dB


@plan
def _a_plan(
    M: int,
    K: int,
    ranks: tuple[int, ...],
    masked: bool,
    strides: tuple[int, int],  # of a row of ds, of x
    dtype: torch.dtype,
    tile: Tile | None,
    capability: tuple[int, int],
) -> tuple[int, Launch]:
    """Into how many parts M is split, and the launch."""
    tile = tile or pick_a_tile(M, K, ranks, masked, dtype, capability)
    split_rows, splits = _split_rows(M, tile)
    blocks_r = cdiv(max(ranks), tile.ranks)
    return splits, Launch(
        _grad_a_kernel,
        (cdiv(K, tile.columns) * blocks_r, splits),
        (M, K, *ranks, *[0] * (3 - len(ranks)), (K + 7) // 8, blocks_r, split_rows, *strides),
        ADAPTERS=len(ranks),
        MASKED=masked,
        BM=tile.rows,
        BK=tile.columns,
        BR=tile.ranks,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def grad_a(
    ds: Tensor,
    x: Tensor,
    ranks: tuple[int, ...] | None = None,
    mask: Tensor | None = None,
    *,
    tile: Tile | None = None,
    capability: tuple[int, int] | None = None,
) -> list[Tensor]:
    """dS (M, Rt), x (M, K) with contiguous rows in one dtype, masks (G, M, ⌈K / 8⌉) or None → every dA_g (R_g, K) fp32,
    each with memory of its own.

    ranks: of the adapters stacked in dS, with masks three at most; one adapter if None."""
    (M, K), Rt = x.shape, ds.shape[1]
    ranks = (Rt,) if ranks is None else tuple(ranks)
    make = torch.empty if M else torch.zeros
    dAs = [make((R, K), dtype=torch.float32, device=x.device) for R in ranks]
    if M == 0:
        return dAs
    together = ranks if mask is not None else (Rt,)  # without masks stacked adapters are one
    kind = x.dtype, tile, capability or capability_of(x)
    splits, launch = _a_plan(M, K, together, mask is not None, (ds.stride(0), x.stride(0)), *kind)
    if splits == 1 and len(dAs) == 1:
        launch(ds, x, mask, dAs[0])
        return dAs
    target = torch.empty((splits, Rt, K), dtype=torch.float32, device=x.device)
    launch(ds, x, mask, target)
    parts = [target] if len(dAs) == 1 else target.split_with_sizes(ranks, dim=1)
    add_up([Sum(part, dA) for part, dA in zip(parts, dAs)])
    return dAs
