"""Kernels of the split design (LoRAFusion's), written for comparison: the low-rank dot before the K-loop, fp32 atomics.

    split_dropout  xd = x ∘ m / (1 − p), m as one byte an element       X read, 1.5 X written; one float drawn each
    update_first   y = x w + m ∘ (s b), the product s b in front of the loop over K
    atomic_grads   dS = dy b, dB = dyᵀ s from one read of dy: each tile adds its share to zeroed fp32 buffers by atomic
                   additions, whose order and so whose rounding changes from run to run; two casts follow

The loop over K is the one of our own GEMM, tiles and descriptors included, so that what differs is the design and not
how well somebody tuned a loop. Off a GPU, and without Triton's interpreter, PyTorch computes the same."""

from functools import partial

import torch
import triton
import triton.language as tl
from timing import fastest
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_fast.backend import interpreted
from lora_fast.kernels.devices import capability_of
from lora_fast.kernels.gemm_lora import (
    GROUP_M,
    _add_product,
    _add_update,
    _finish,
    _indices,
    _place,
    _sms,
    are_aligned,
)
from lora_fast.kernels.gemm_tiles import Tile, candidates, pick_tile, rank_block, uses_descriptors

DROPOUT_BLOCK = 1024
# A tile of 128 × 128 has 2 · 128 R sums, which fill the registers of 8 warps up to rank 64.
LARGE_TILE, SMALL_TILE, LARGE_TILE_RANK = 128, 64, 64


def runs_kernels(tensor: Tensor) -> bool:
    return tensor.is_cuda or interpreted()


@triton.jit(do_not_specialize=["seed", "p"])
def _dropout_kernel(x, dropped, kept, count, seed, p, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    keep = tl.rand(seed, place) >= p
    value = tl.load(x + place, inside, 0.0).to(tl.float32) / (1 - p)
    tl.store(dropped + place, tl.where(keep, value, 0.0).to(dropped.dtype.element_ty), inside)
    tl.store(kept + place, keep.to(tl.int8), inside)


def split_dropout(x: Tensor, p: float, seed: int) -> tuple[Tensor, Tensor]:
    """x (M, K) contiguous → x ∘ m / (1 − p), m int8 (M, K)."""
    if not runs_kernels(x):
        kept = torch.rand(x.shape, device=x.device) >= p
        return x * kept / (1 - p), kept.to(torch.int8)
    dropped, kept = torch.empty_like(x), torch.empty_like(x, dtype=torch.int8)
    grid = (triton.cdiv(x.numel(), DROPOUT_BLOCK),)
    _dropout_kernel[grid](x, dropped, kept, x.numel(), seed, p, BLOCK=DROPOUT_BLOCK)
    return dropped, kept


@triton.jit
def _update_first_kernel(
    x, w, sizes, s, b, update_strides, rank, kept, stride_kept, y, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    DESCRIPTORS: tl.constexpr, W_IS_NK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    stop = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), stop, tl.num_programs(0)):
        tile_m, tile_n = _place(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        place = tile_m * BLOCK_M, tile_n * BLOCK_N, M, N
        update = s, b, update_strides
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = _add_update(acc, update, place, 0, rank, BLOCK_R, 1, False)
        if kept is not None:
            rows, columns, in_rows, in_columns = _indices(acc, place)
            pointers = kept + rows[:, None] * stride_kept + columns[None, :]
            acc = tl.where(tl.load(pointers, in_rows & in_columns, 0) != 0, acc, 0.0)  # (BLOCK_M, BLOCK_N)
        acc = _add_product(acc, x, w, sizes, place, BLOCK_K, DESCRIPTORS, W_IS_NK)
        _finish(y, acc, update, (), (), 0, None, place, BLOCK_R, DESCRIPTORS, False, PARTS)


def update_first(x: Tensor, w: Tensor, s: Tensor, b: Tensor, kept: Tensor | None = None) -> Tensor:
    """x (M, K), w (K, N), s (M, R), b (R, N), kept int8 (M, N) → x w + kept ∘ (s b) (M, N), on a GPU in the fastest of
    the tiles that our own kernel chooses from where an update stands before the loop."""
    if not runs_kernels(x):
        update = s @ b if kept is None else (s @ b) * kept
        return update.addmm_(x, w)
    capability = capability_of(x)
    # As for one mask: the update needs registers before the loop.
    kind = {"masks": 1, "aligned": are_aligned([x], [w], capability)}
    if not x.is_cuda:
        return _launch(x, w, s, b, kept, pick_tile(x.shape[0], w.shape[1], x.dtype, capability, **kind))
    key = (*x.shape, *w.shape, w.stride(), s.shape[1], kept is None, x.dtype)
    if key not in _fastest:
        tiles = candidates(x.dtype, capability, **kind)
        _fastest[key] = fastest({tile: partial(_launch, x, w, s, b, kept, tile) for tile in tiles})
    return _launch(x, w, s, b, kept, _fastest[key])


_fastest: dict[tuple, Tile] = {}


def _launch(x: Tensor, w: Tensor, s: Tensor, b: Tensor, kept: Tensor | None, tile: Tile) -> Tensor:
    (M, K), N, R = x.shape, w.shape[1], s.shape[1]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    capability = capability_of(x)
    descriptors = uses_descriptors(capability) and are_aligned([x], [w], capability)
    w_is_nk = w.stride(0) == 1
    stored_w = w.t() if w_is_nk else w

    def operand(tensor: Tensor, *block: int) -> Tensor | TensorDescriptor:
        return TensorDescriptor.from_tensor(tensor, list(block)) if descriptors else tensor

    w_block = (tile.block_n, tile.block_k) if w_is_nk else (tile.block_k, tile.block_n)
    tiles = triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n)
    _update_first_kernel[(min(tiles, _sms(x.device)) if tile.persistent else tiles,)](
        operand(x, tile.block_m, tile.block_k), operand(stored_w, *w_block) if descriptors else w,
        (K, x.stride(0), w.stride(0), w.stride(1)),
        s, b, (s.stride(0), b.stride(0), b.stride(1)), R, kept, 0 if kept is None else kept.stride(0),
        operand(y, tile.block_m, tile.block_n // tile.parts), M, N,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        BLOCK_R=rank_block(R, flat=False), GROUP_M=GROUP_M,
        DESCRIPTORS=descriptors, W_IS_NK=w_is_nk, PARTS=tile.parts,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y


@triton.jit
def _atomic_grads_kernel(
    dy, b, s, ds, db, M, N, R, stride_dy, stride_b, stride_s,
    BM: tl.constexpr, BN: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    columns = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    r = tl.arange(0, RP)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    dy_tile = tl.load(dy + rows[:, None] * stride_dy + columns[None, :], inside, 0.0)  # (BM, BN)
    s_in, b_in = (rows < M)[:, None] & (r < R)[None, :], (columns < N)[:, None] & (r < R)[None, :]
    b_tile = tl.load(b + columns[:, None] * stride_b + r[None, :], b_in, 0.0)  # (BN, RP)
    s_tile = tl.load(s + rows[:, None] * stride_s + r[None, :], s_in, 0.0)  # (BM, RP)
    ds_tile = tl.dot(dy_tile, b_tile, input_precision="ieee")  # (BM, RP)
    tl.atomic_add(ds + rows[:, None] * R + r[None, :], ds_tile, mask=s_in, sem="relaxed")
    db_tile = tl.dot(tl.trans(dy_tile), s_tile, input_precision="ieee")  # (BN, RP)
    tl.atomic_add(db + columns[:, None] * R + r[None, :], db_tile, mask=b_in, sem="relaxed")


def atomic_grads(dy: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """dy (M, N), b (N, R), s (M, R), rows contiguous → dS = dy b (M, R), dB = dyᵀ s (N, R), both in dy's dtype."""
    if not runs_kernels(dy):
        return dy @ b, dy.t() @ s
    (M, N), R = dy.shape, b.shape[1]
    ds = torch.zeros((M, R), dtype=torch.float32, device=dy.device)
    db = torch.zeros((N, R), dtype=torch.float32, device=dy.device)
    padded = max(triton.next_power_of_2(R), 16)
    size = LARGE_TILE if padded <= LARGE_TILE_RANK and dy.dtype != torch.float32 else SMALL_TILE
    grid = (triton.cdiv(M, size), triton.cdiv(N, size))
    _atomic_grads_kernel[grid](
        dy, b, s, ds, db, M, N, R, dy.stride(0), b.stride(0), s.stride(0), BM=size, BN=size, RP=padded, num_warps=8
    )
    return ds.to(dy.dtype), db.to(dy.dtype)
