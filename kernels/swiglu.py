"""SwiGLU, and the adapters' work that reads the same numbers: S of the down projection in forward; in backward dA of
the down projection and dB of the gate and up projections.

With g, u (M, N) the outputs of gate and up, σ = sigmoid(g), m the dropout mask of the down projection's adapter:

    forward    h = gσ ∘ u                                S = (h ∘ m) Aᵀ
    backward   du = dh ∘ gσ                              dA = dSᵀ (h ∘ m)
               dg = dh ∘ u ∘ σ(1 + g(1 − σ))             dB_gate = scale_gate · dgᵀ S_gate, dB_up likewise

N is the intermediate size: out_features of gate and up, in_features of down. Products of elements are computed in fp32
and rounded once; matrix products take the rounded h, dg and du and sum in fp32. Sources: Shazeer 2020,
arXiv:2002.05202; Hu et al. 2021, arXiv:2106.09685, section 4.1.

Bytes moved, at e bytes an element: forward 3 e M N (g and u read, h written), backward 5 e M N (dh, g and u read, dg
and du written), no more than without adapters; with dropout M N / 8 in each. The rest is of the size of an adapter or
of its S, and for each part of the work (below) fp32 partial sums, written and read once. Separate kernels would read h
again in forward, and h, dg and du in backward: e M N and 3 e M N more."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.kernels.adapter_grads import grad_a, grad_b
from lora_fast.kernels.devices import AMD, MULTIPROCESSORS, capability_of
from lora_fast.kernels.dropout import draw_bytes, spread_bytes, threshold
from lora_fast.kernels.launch import Launch, cdiv, next_power_of_2, plan
from lora_fast.kernels.partials import Sum, add_up
from lora_fast.kernels.shrink import shrink


class Tile(NamedTuple):
    rows: int
    columns: int
    warps: int
    stages: int


# No adapter, no loop: 16 elements a thread, in rows of 256 bytes.
ELEMENTWISE = Tile(16, 128, 4, 1)

# Both passes wait for memory: what counts is some 40 KB of loads in flight on each multiprocessor, and 8 to 20 warps to
# hide the rounds between them. wgmma multiplies 64 rows at a time; at rank 16 three programs share a multiprocessor.
FORWARD = Tile(64, 64, 4, 3)
# mma.sync keeps its operands in registers: with more than 16 ranks 64 columns spill on sm_80, sm_89 and sm_120.
FORWARD_MMA = Tile(64, 32, 8, 3)
# fp32 products don't run on tensor cores and take two registers where bf16 takes one.
FORWARD_FP32 = Tile(32, 32, 8, 3)

# In backward three inputs and three sums share the registers. 64 columns are the least that wgmma takes of a transposed
# tile; 16 rows leave room for four or five programs on a multiprocessor, 32 rows halve the rounds.
BACKWARD = Tile(16, 64, 4, 3)
BACKWARD_WIDE = Tile(32, 64, 8, 3)
BACKWARD_MMA = Tile(32, 32, 8, 3)
BACKWARD_FP32 = Tile(16, 32, 4, 3)

# A program sums over its strip, or over a part of it: parts keep the GPU busy (16 warps on each multiprocessor, about
# what the tiles above leave room for), and cost their partial sums.
RESIDENT_WARPS = 16
MIN_BLOCKS = 4
MAX_PARTS = 32
# A grid's second dimension ends at 65,535.
MAX_GRID = 65535


def padded(R: int) -> int:
    """R as a dimension of a block: a power of two, at least the 16 that a tensor core takes; 0 stays 0."""
    return max(16, next_power_of_2(R)) if R else 0


def _has_wide_products(capability: tuple[int, int]) -> bool:
    """Whether sums or operands of a product live outside the registers (wgmma, tcgen05) or in twice as many (AMD); the
    interpreter counts as such."""
    return capability[0] in (0, 9, 10)


def forward_tile(R: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tile:
    """The tile for S of rank R (0: no adapter)."""
    if R == 0:
        return ELEMENTWISE
    if dtype == torch.float32:
        tile = FORWARD_FP32
    elif padded(R) == 16 or _has_wide_products(capability):
        tile = FORWARD
    else:
        tile = FORWARD_MMA
    return tile._replace(stages=2) if capability == AMD else tile


def backward_tile(R: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tile:
    """The tile for adapters of rank at most R (0: no adapter)."""
    if R == 0:
        return ELEMENTWISE
    if dtype == torch.float32:
        tile = BACKWARD_FP32
    elif padded(R) == 16 or (padded(R) == 32 and _has_wide_products(capability)):
        tile = BACKWARD
    else:
        tile = BACKWARD_WIDE if _has_wide_products(capability) else BACKWARD_MMA
    return tile._replace(stages=2) if capability == AMD else tile


def forward_limit(dtype: torch.dtype) -> int:
    """The largest rank whose S the forward kernel sums: beyond it registers spill."""
    return 64 if dtype == torch.float32 else 128


def backward_limit(dtype: torch.dtype, capability: tuple[int, int]) -> int:
    """The largest rank whose gradient the backward kernel sums. Beyond it registers spill, or what the strips read of S
    and dS (6 R M ⌈N / columns⌉ bytes in bf16, from the L2 cache) outweighs a second pass over h, dg and du."""
    return 128 if dtype != torch.float32 and _has_wide_products(capability) else 64


def count_parts(strips: int, blocks: int, warps: int) -> int:
    """Into how many parts a strip of `blocks` rounds is cut: the fewest within a fifth of a perfectly even load."""
    slots = MULTIPROCESSORS * RESIDENT_WARPS // warps
    most = max(1, min(MAX_PARTS, blocks // MIN_BLOCKS))

    def rounds(count):
        return math.ceil(strips * count / slots) * math.ceil(blocks / count)

    even = 1.2 * max(strips * blocks / slots, blocks / most)
    return next((count for count in range(1, most + 1) if rounds(count) <= even), most)


@triton.jit(do_not_specialize=["drop_below"])
def _forward_kernel(
    g_p, u_p, a_p, h_p, s_p, mask_p, seed_p,
    M, N, R, mask_width, part_columns,
    g_stride, u_stride, a_stride_r, a_stride_n,
    drop_below,
    BM: tl.constexpr, BN: tl.constexpr, RP: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    row0 = tl.program_id(0).to(tl.int64) * BM
    part = tl.program_id(1).to(tl.int64)
    first = tl.program_id(1) * part_columns
    last = min(first + part_columns, N)
    g_p += row0 * g_stride
    u_p += row0 * u_stride
    h_p += row0 * N
    rows = tl.arange(0, BM)
    row_ok = rows[:, None] < M - row0
    if RP:
        r = tl.arange(0, RP)
        s = tl.zeros((BM, RP), tl.float32)
    if DROPOUT:
        seed = tl.load(seed_p)
        mask_p += row0 * mask_width
    for n0 in tl.range(first, last, BN):
        n = n0 + tl.arange(0, BN)
        ok = row_ok & (n[None, :] < N)
        g = tl.load(g_p + rows[:, None] * g_stride + n[None, :], mask=ok, other=0.0).to(tl.float32)  # (BM, BN)
        u = tl.load(u_p + rows[:, None] * u_stride + n[None, :], mask=ok, other=0.0).to(tl.float32)  # (BM, BN)
        h = (g * tl.sigmoid(g) * u).to(h_p.dtype.element_ty)
        tl.store(h_p + rows[:, None] * N + n[None, :], h, mask=ok)
        if RP:
            a_at = a_p + n[:, None] * a_stride_n + r[None, :] * a_stride_r
            a = tl.load(a_at, mask=(n[:, None] < N) & (r[None, :] < R), other=0.0)  # (BN, RP)
            if DROPOUT:
                byte = n0 // 8 + tl.arange(0, BN // 8)
                index = (row0 + rows)[:, None] * mask_width + byte[None, :]
                kept = draw_bytes(seed, index, drop_below)  # (BM, BN / 8)
                byte_ok = row_ok & (byte[None, :] < mask_width)
                inside = (1 << tl.minimum(N - byte * 8, 8)) - 1  # the bits of the last byte beyond N are 0
                mask_at = mask_p + rows[:, None] * mask_width + byte[None, :]
                tl.store(mask_at, (kept & inside[None, :]).to(tl.uint8), mask=byte_ok)
                h = tl.where(spread_bytes(kept, BM, BN), h, 0.0)
            s = tl.dot(h, a, s, input_precision="ieee")
    if RP:
        s_at = s_p + (part * M + row0) * R + rows[:, None] * R + r[None, :]
        tl.store(s_at, s, mask=row_ok & (r[None, :] < R))


@triton.jit
def _backward_kernel(
    dh_p, g_p, u_p, mask_p, ds_p, s_gate_p, s_up_p,
    dg_p, du_p, h_p, da_p, db_gate_p, db_up_p,
    M, N, R_down, R_gate, R_up, mask_width, part_rows,
    dh_stride, g_stride, u_stride, ds_stride, s_gate_stride, s_up_stride,
    BM: tl.constexpr, BN: tl.constexpr, DOWN: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr,
    ALIGN: tl.constexpr, MASKED: tl.constexpr, WRITE_H: tl.constexpr,
):  # fmt: skip
    n0 = tl.program_id(0) * BN
    part = tl.program_id(1).to(tl.int64)
    first = part * part_rows
    last = min(first + part_rows, M)
    n = n0 + tl.arange(0, BN)
    rows = tl.arange(0, BM)
    n_ok = n[None, :] < N
    # Every rank and stride below is a multiple of ALIGN; said so that rows of rank 8 are read 16 bytes at a time.
    R_down = R_down // ALIGN * ALIGN
    R_gate = R_gate // ALIGN * ALIGN
    R_up = R_up // ALIGN * ALIGN
    ds_stride = ds_stride // ALIGN * ALIGN
    s_gate_stride = s_gate_stride // ALIGN * ALIGN
    s_up_stride = s_up_stride // ALIGN * ALIGN
    if DOWN:
        r_down = tl.arange(0, DOWN)
        da = tl.zeros((BN, DOWN), tl.float32)
    if GATE:
        r_gate = tl.arange(0, GATE)
        db_gate = tl.zeros((BN, GATE), tl.float32)
    if UP:
        r_up = tl.arange(0, UP)
        db_up = tl.zeros((BN, UP), tl.float32)
    if MASKED:
        # A row's few bytes are too narrow for an asynchronous copy: they are read one round ahead instead.
        byte = n0 // 8 + tl.arange(0, BN // 8)
        mask_p += rows[:, None] * mask_width + byte[None, :]
        byte_ok = byte[None, :] < mask_width
        first_ok = byte_ok & (rows[:, None] < last - first)
        upcoming = tl.load(mask_p + first * mask_width, mask=first_ok, other=0)  # (BM, BN / 8)
    for row in tl.range(first, last, BM):
        row0 = tl.cast(row, tl.int64)  # the interpreter counts in plain numbers
        row_ok = rows[:, None] < M - row0
        ok = row_ok & n_ok
        if MASKED:
            kept = upcoming
            next_ok = byte_ok & (rows[:, None] < last - row0 - BM)
            upcoming = tl.load(mask_p + (row0 + BM) * mask_width, mask=next_ok, other=0)  # (BM, BN / 8)
        dh_at = dh_p + row0 * dh_stride + rows[:, None] * dh_stride + n[None, :]
        g_at = g_p + row0 * g_stride + rows[:, None] * g_stride + n[None, :]
        u_at = u_p + row0 * u_stride + rows[:, None] * u_stride + n[None, :]
        dh = tl.load(dh_at, mask=ok, other=0.0).to(tl.float32)  # (BM, BN)
        g = tl.load(g_at, mask=ok, other=0.0).to(tl.float32)  # (BM, BN)
        u = tl.load(u_at, mask=ok, other=0.0).to(tl.float32)  # (BM, BN)
        sigma = tl.sigmoid(g)
        f = g * sigma
        h = (f * u).to(dg_p.dtype.element_ty)
        out = row0 * N + rows[:, None] * N + n[None, :]
        du = (dh * f).to(du_p.dtype.element_ty)
        dg = (dh * u * (sigma * (1.0 + g * (1.0 - sigma)))).to(dg_p.dtype.element_ty)
        tl.store(du_p + out, du, mask=ok)
        tl.store(dg_p + out, dg, mask=ok)
        if WRITE_H:
            tl.store(h_p + out, h, mask=ok)
        if DOWN:
            if MASKED:
                h = tl.where(spread_bytes(kept, BM, BN), h, 0.0)
            ds_at = ds_p + row0 * ds_stride + rows[:, None] * ds_stride + r_down[None, :]
            ds = tl.load(ds_at, mask=row_ok & (r_down[None, :] < R_down), other=0.0)  # (BM, DOWN)
            da = tl.dot(tl.trans(h), ds, da, input_precision="ieee")
        if GATE:
            s_gate_at = s_gate_p + row0 * s_gate_stride + rows[:, None] * s_gate_stride + r_gate[None, :]
            s_gate = tl.load(s_gate_at, mask=row_ok & (r_gate[None, :] < R_gate), other=0.0)  # (BM, GATE)
            db_gate = tl.dot(tl.trans(dg), s_gate, db_gate, input_precision="ieee")
        if UP:
            s_up_at = s_up_p + row0 * s_up_stride + rows[:, None] * s_up_stride + r_up[None, :]
            s_up = tl.load(s_up_at, mask=row_ok & (r_up[None, :] < R_up), other=0.0)  # (BM, UP)
            db_up = tl.dot(tl.trans(du), s_up, db_up, input_precision="ieee")
    n_ok = n[:, None] < N
    if DOWN:
        da_at = da_p + part * N * R_down + r_down[None, :] * N + n[:, None]
        tl.store(da_at, da, mask=n_ok & (r_down[None, :] < R_down))
    if GATE:
        db_gate_at = db_gate_p + part * N * R_gate + n[:, None] * R_gate + r_gate[None, :]
        tl.store(db_gate_at, db_gate, mask=n_ok & (r_gate[None, :] < R_gate))
    if UP:
        db_up_at = db_up_p + part * N * R_up + n[:, None] * R_up + r_up[None, :]
        tl.store(db_up_at, db_up, mask=n_ok & (r_up[None, :] < R_up))


@plan
def _forward_plan(M, N, R, strides, drop_below, dtype, tile, capability) -> tuple[int, Launch]:
    """Into how many parts N is cut, and the launch. strides: of a row of g, of u; of a, or 0, 0."""
    tile = tile or forward_tile(R, dtype, capability)
    strips, blocks = cdiv(M, tile.rows), cdiv(N, tile.columns)
    parts = count_parts(strips, blocks, tile.warps) if R else min(blocks, MAX_GRID)
    part_blocks = cdiv(blocks, parts)
    parts = cdiv(blocks, part_blocks)
    return parts, Launch(
        _forward_kernel,
        (strips, parts),
        (M, N, R, cdiv(N, 8), part_blocks * tile.columns, *strides, drop_below or 0),
        BM=tile.rows,
        BN=tile.columns,
        RP=padded(R),
        DROPOUT=drop_below is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _forward(g, u, a, seed, dropout_p, tile, capability):
    """h (M, N), S (M, R) or None, mask or None."""
    M, N = g.shape
    R = 0 if a is None else a.shape[0]
    h = torch.empty((M, N), dtype=g.dtype, device=g.device)
    s = torch.empty((M, R), dtype=g.dtype, device=g.device) if R else None
    mask = drop_below = None
    if R and seed is not None:
        mask = torch.empty((1, M, cdiv(N, 8)), dtype=torch.uint8, device=g.device)
        drop_below = threshold(dropout_p)
    if M == 0:
        return h, s, mask
    strides = (g.stride(0), u.stride(0), *(a.stride() if R else (0, 0)))
    parts, launch = _forward_plan(M, N, R, strides, drop_below, g.dtype, tile, capability or capability_of(g))
    partials = torch.empty((parts, M, R), dtype=torch.float32, device=g.device) if R else None
    launch(g, u, a, h, partials, mask, seed)
    if R:
        add_up([Sum(partials, s)])
    return h, s, mask


def swiglu(g: Tensor, u: Tensor, *, tile: Tile | None = None, capability: tuple[int, int] | None = None) -> Tensor:
    """g, u (M, N), rows may be strided → h = silu(g) ∘ u (M, N)."""
    return _forward(g, u, None, None, 0.0, tile, capability)[0]


def swiglu_shrink(
    g: Tensor,
    u: Tensor,
    a_down: Tensor,
    *,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    tile: Tile | None = None,
    capability: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """g, u (M, N), a_down (R, N) in their dtype → h (M, N), S_down (M, R), mask uint8 (1, M, ⌈N / 8⌉) or None.

    Rows of g and u may be strided, a_down in any way. seed: int64 of one element on their device; without it, no
    dropout. The mask is the one that `shrink(h, a_down, seed=seed, …)` draws."""
    if a_down.shape[0] <= forward_limit(g.dtype):
        return _forward(g, u, a_down, seed, dropout_p, tile, capability)
    h = swiglu(g, u, capability=capability)
    s, mask = shrink(h, a_down, seed=seed, dropout_p=dropout_p, capability=capability)
    return h, s, mask


def swiglu_grad(
    dh: Tensor, g: Tensor, u: Tensor, *, tile: Tile | None = None, capability: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """dh, g, u (M, N) → dg, du (M, N)."""
    return swiglu_backward(dh, g, u, None, None, None, tile=tile, capability=capability)[:2]


def swiglu_backward(
    dh: Tensor,
    g: Tensor,
    u: Tensor,
    ds_down: Tensor | None,
    s_gate: Tensor | None,
    s_up: Tensor | None,
    scale_gate: float = 1.0,
    scale_up: float = 1.0,
    mask: Tensor | None = None,
    *,
    tile: Tile | None = None,
    capability: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dh, g, u (M, N), ds_down (M, R_down), s_gate (M, R_gate), s_up (M, R_up), the mask of `swiglu_shrink` → dg, du
    (M, N), dA_down (R_down, N), dB_gate (N, R_gate), dB_up (N, R_up), the last three fp32.

    Rows of all inputs but the mask may be strided. Where ds_down, s_gate or s_up is None, so is its gradient."""
    M, N = g.shape
    capability = capability or capability_of(g)
    limit = backward_limit(g.dtype, capability)
    # What the kernel sums: no rank where a gradient isn't needed, or is computed after it from h, dg and du.
    inputs = [None if s is None or s.shape[1] > limit else s for s in (ds_down, s_gate, s_up)]
    ranks = [0 if s is None else s.shape[1] for s in inputs]
    dg = torch.empty((M, N), dtype=g.dtype, device=g.device)
    du = torch.empty((M, N), dtype=g.dtype, device=g.device)
    h = torch.empty_like(dg) if ds_down is not None and inputs[0] is None else None
    partials = _launch_backward(dh, g, u, mask, inputs, ranks, dg, du, h, tile, capability)

    # In one launch, of the parts that the kernel made.
    grads = [None if p is None else torch.empty(p.shape[1:], dtype=torch.float32, device=g.device) for p in partials]
    sums = [Sum(*each) for each in zip(partials, grads, (1.0, scale_gate, scale_up)) if each[0] is not None]
    if M:
        add_up(sums)
    else:
        for each in sums:
            each.out.zero_()
    dA_down, dB_gate, dB_up = grads
    if h is not None:
        (dA_down,) = grad_a(ds_down, h, mask=mask, capability=capability)
    if s_gate is not None and dB_gate is None:
        dB_gate = grad_b(dg, s_gate, scale_gate)
    if s_up is not None and dB_up is None:
        dB_up = grad_b(du, s_up, scale_up)
    return dg, du, dA_down, dB_gate, dB_up


@plan
def _backward_plan(M, N, ranks, strides, masked, write_h, dtype, tile, capability) -> tuple[int, Launch | None]:
    """Into how many parts M is cut, and the launch, None for M = 0. strides: of a row of dh, g, u; of dS, S, S or 0."""
    tile = tile or backward_tile(max(ranks), dtype, capability)
    strips, blocks = cdiv(N, tile.columns), cdiv(M, tile.rows)
    parts = count_parts(strips, blocks, tile.warps) if any(ranks) else min(blocks, MAX_GRID)
    part_blocks = cdiv(blocks, max(parts, 1))
    parts = cdiv(blocks, max(part_blocks, 1))
    return parts, None if M == 0 else Launch(
        _backward_kernel,
        (strips, parts),
        (M, N, *ranks, cdiv(N, 8), part_blocks * tile.rows, *strides),
        BM=tile.rows,
        BN=tile.columns,
        DOWN=padded(ranks[0]),
        GATE=padded(ranks[1]),
        UP=padded(ranks[2]),
        ALIGN=math.gcd(16, *ranks, *strides[3:]),
        MASKED=masked,
        WRITE_H=write_h,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _launch_backward(dh, g, u, mask, inputs, ranks, dg, du, h, tile, capability):
    """Fills dg, du and, if given, h; returns the partial sums of dA_down, dB_gate and dB_up, None for rank 0."""
    M, N = g.shape
    masked = mask is not None and ranks[0] > 0
    strides = (dh.stride(0), g.stride(0), u.stride(0), *[0 if s is None else s.stride(0) for s in inputs])
    parts, launch = _backward_plan(M, N, tuple(ranks), strides, masked, h is not None, g.dtype, tile, capability)
    shapes = (parts, ranks[0], N), (parts, N, ranks[1]), (parts, N, ranks[2])
    partials = [
        torch.empty(shape, dtype=torch.float32, device=g.device) if R else None for shape, R in zip(shapes, ranks)
    ]
    if launch is not None:
        launch(dh, g, u, mask if masked else None, *inputs, dg, du, h, *partials)
    return partials
