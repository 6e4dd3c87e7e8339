"""Matrix product plus low-rank update in one pass over the result: y = x w + mask ∘ (s b) + bias.

    forward   y  = x Wᵀ + S (s'·lora_B)ᵀ + bias            w = weight.t(), s = S (M, R), b = (s'·lora_B).t()
    backward  dx = dy W + m ∘ (dS lora_A)                  x = dy, w = weight, s = dS (M, R), b = lora_A
    q, k, v   dx = Σᵢ dyᵢ Wᵢ + Σᵢ mᵢ ∘ (dSᵢ lora_Aᵢ)       the K-loops follow one another on one accumulator
    update    y  = accumulate + m ∘ (s b)                  no product: what a base layer of another kind gave is there

All in fp32, rounded once to x's dtype. Bytes: x, w, s, b and what is optional are read, y is written; programs that
run together share rows of x and columns of w in L2. Added to the plain product are R / K of its FLOPs, and for a mask
M·N / 8 bytes; a second pass over y (cuBLAS with beta = 1) would read and write M·N elements instead.

Where the update stands. Without a mask it follows the K-loop, on the loop's own accumulator: nothing of it is live in
the loop, which keeps the registers and the shared memory of a plain product. With a mask it comes first: dot → mask →
loop, since a product that is to be masked needs an accumulator of its own, and before the loop there is no other. No
loop holds a condition, which would undo its pipeline.

Between two tiles of a persistent program the tensor cores would wait for the first loads of the second. Of a tile that
is `flat` Triton makes one loop of both, over the steps of all tiles: what ends a tile runs inside it while the next
tile's loads are on their way. That takes a single K-loop, whose accumulator starts at zero, and updates in one block;
a masked one follows the loop there too, a part of the columns at a time, of which one has a second accumulator.

Two ways to memory. Tensor descriptors (TMA) from sm_90 on, where every base and row is a multiple of 16 bytes; pointers
elsewhere. s, b, bias and the masks are small and have any rank or stride: always pointers."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_fast.kernels.devices import capability_of
from lora_fast.kernels.dropout import spread_bytes
from lora_fast.kernels.gemm_tiles import FLAT_RANK, SMS, Tile, pick_tile, rank_block, uses_descriptors
from lora_fast.kernels.launch import Launch, cdiv, plan

GROUP_M = 8  # so many tiles downwards before the next column of tiles

# --- Kernel -----------------------------------------------------------------------------------------------------------


@triton.jit
def _place(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Number of a tile → its row and column among the tiles: GROUP_M downwards, then one to the right."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * tiles_n)
    within = tile % (GROUP_M * tiles_n)
    height = min(tl.cdiv(M, BLOCK_M) - group * GROUP_M, GROUP_M)  # the last group may be lower
    return group * GROUP_M + within % height, within // height


@triton.jit
def _indices(acc, place):
    """Rows (BLOCK_M) and columns (BLOCK_N) of y that stand in acc, and which of them (BLOCK_M, 1), (1, BLOCK_N) y has.

    place: the first row, the first column, M, N."""
    row, column, M, N = place
    rows = row.to(tl.int64) + tl.arange(0, acc.shape[0])
    columns = column.to(tl.int64) + tl.arange(0, acc.shape[1])
    return rows, columns, (rows < M)[:, None], (columns < N)[None, :]


@triton.jit
def _load_w(w, k, column, W_IS_NK: tl.constexpr):
    """w[k:, column:] by its descriptor, which is of w or of w transposed: whichever has contiguous rows."""
    return w.load([column, k]).T if W_IS_NK else w.load([k, column])


@triton.jit
def _add_product(acc, x, w, sizes, place, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr, W_IS_NK: tl.constexpr):
    """acc + x[rows] w[:, columns]: the main loop."""
    K, stride_xm, stride_wk, stride_wn = sizes
    if DESCRIPTORS:
        row, column, _, _ = place
        for k in range(0, K, BLOCK_K):
            x_tile = x.load([row, k])  # (BLOCK_M, BLOCK_K)
            w_tile = _load_w(w, k, column, W_IS_NK)  # (BLOCK_K, BLOCK_N)
            acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
    else:
        rows, columns, in_rows, in_columns = _indices(acc, place)
        ks = tl.arange(0, BLOCK_K)
        x_pointers = x + rows[:, None] * stride_xm + ks[None, :]
        w_pointers = w + ks[:, None] * stride_wk + columns[None, :] * stride_wn
        for k in range(0, K, BLOCK_K):
            inside = ks < K - k
            x_tile = tl.load(x_pointers, in_rows & inside[None, :], 0.0)  # (BLOCK_M, BLOCK_K)
            w_tile = tl.load(w_pointers, inside[:, None] & in_columns, 0.0)  # (BLOCK_K, BLOCK_N)
            acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
            x_pointers += BLOCK_K
            w_pointers += BLOCK_K * stride_wk
    return acc


@triton.jit
def _add_block(acc, update, place, first, last, BLOCK_R: tl.constexpr):
    """acc + s[rows, first:last] b[first:last, columns], BLOCK_R ranks at most. update: s, b and their strides."""
    s, b, strides = update
    stride_sm, stride_br, stride_bn = strides
    rows, columns, in_rows, in_columns = _indices(acc, place)
    r = first + tl.arange(0, BLOCK_R).to(tl.int64)
    s_pointers = s + rows[:, None] * stride_sm + r[None, :]
    b_pointers = b + r[:, None] * stride_br + columns[None, :] * stride_bn
    s_tile = tl.load(s_pointers, in_rows & (r < last)[None, :], 0.0)  # (BLOCK_M, BLOCK_R)
    b_tile = tl.load(b_pointers, (r < last)[:, None] & in_columns, 0.0)  # (BLOCK_R, BLOCK_N)
    return tl.dot(s_tile, b_tile, acc, input_precision="ieee")


@triton.jit
def _add_update(
    acc, update, place, first, last, BLOCK_R: tl.constexpr, STAGES: tl.constexpr, FLAT: tl.constexpr
):  # fmt: skip
    """acc + s[rows, first:last] b[first:last, columns]."""
    if FLAT:  # a loop beside the K-loop would keep Triton from making one of that and the tiles'
        acc = _add_block(acc, update, place, first, last, BLOCK_R)
    else:
        for start in tl.range(first, last, BLOCK_R, num_stages=STAGES):
            acc = _add_block(acc, update, place, start, last, BLOCK_R)
    return acc


@triton.jit
def _add_masked(
    acc, update, masks, ranks, stride_mask, place, BLOCK_R: tl.constexpr, STAGES: tl.constexpr, FLAT: tl.constexpr
):  # fmt: skip
    """acc + Σ mask ∘ (s[rows] b[:, columns]), over the adapters that lie side by side in s and b."""
    rows, _, in_rows, _ = _indices(acc, place)
    bytes = place[1] // 8 + tl.arange(0, acc.shape[1] // 8)
    first = 0
    for i in tl.static_range(len(masks)):
        last = first + ranks[i]
        part = tl.zeros(acc.shape, tl.float32)
        part = _add_update(part, update, place, first, last, BLOCK_R, STAGES, FLAT)
        # A row's bytes are bounded by the stride, whose divisors Triton knows: 16-byte loads.
        pointers = masks[i] + rows[:, None] * stride_mask + bytes[None, :]
        kept = tl.load(pointers, in_rows & (bytes < stride_mask)[None, :], 0)  # (BLOCK_M, BLOCK_N / 8)
        acc += tl.where(spread_bytes(kept, acc.shape[0], acc.shape[1]), part, 0.0)
        first = last
    return acc


@triton.jit
def _finish(
    y, acc, update, masks, ranks, stride_mask, bias, place,
    BLOCK_R: tl.constexpr, DESCRIPTORS: tl.constexpr, FLAT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """y[rows, columns] = acc + bias and, if flat, masked updates; in parts side by side."""
    row, column, M, N = place
    if DESCRIPTORS and PARTS > 1:
        HALF: tl.constexpr = acc.shape[1] // 2
        MORE: tl.constexpr = PARTS // 2
        left, right = acc.reshape(acc.shape[0], 2, HALF).permute(0, 2, 1).split()
        _finish(y, left, update, masks, ranks, stride_mask, bias, place, BLOCK_R, DESCRIPTORS, FLAT, MORE)
        place = row, column + HALF, M, N
        _finish(y, right, update, masks, ranks, stride_mask, bias, place, BLOCK_R, DESCRIPTORS, FLAT, MORE)
    else:
        rows, columns, in_rows, in_columns = _indices(acc, place)
        if FLAT:
            acc = _add_masked(acc, update, masks, ranks, stride_mask, place, BLOCK_R, 1, FLAT)
        if bias is not None:
            acc += tl.load(bias + columns[None, :], in_columns, 0.0).to(tl.float32)
        if DESCRIPTORS:
            y.store([row, column], acc.to(y.dtype))
        else:
            tl.store(y + rows[:, None] * N + columns[None, :], acc.to(y.dtype.element_ty), in_rows & in_columns)


@triton.jit
def gemm_lora_kernel(
    x0, x1, x2,  # up to three x (M, K) and w (K, N): descriptors or pointers (triton 3.6 takes no tuple of descriptors)
    w0, w1, w2,
    s,  # (M, ΣR)
    b,  # (ΣR, N)
    masks,  # of uint8 (M, stride_mask), a bit for each column of y
    bias,  # (N,) or None
    accumulate,  # as y, or None; only where there is no x
    y,  # (M, N), contiguous
    sizes,  # for each pair K, stride_xm, stride_wk, stride_wn
    ranks,  # how ΣR is divided among the masks; the whole without masks
    update_strides,  # stride_sm, stride_br, stride_bn
    stride_mask, stride_accumulate,
    M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    DESCRIPTORS: tl.constexpr, W_IS_NK: tl.constexpr, PERSISTENT: tl.constexpr, PARTS: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0)
    stop = start + 1  # without PERSISTENT a loop of one turn, which the compiler removes
    step = 1
    if PERSISTENT:
        stop = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        step = tl.num_programs(0)
    if FLAT:
        tl.assume(sizes[0][0] > 0)  # no tile without a step of its K-loop: one loop can serve both
    for tile in tl.range(start, stop, step, flatten=FLAT):
        tile_m, tile_n = _place(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        place = tile_m * BLOCK_M, tile_n * BLOCK_N, M, N
        update = s, b, update_strides

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if not FLAT:
            # Side by side, the pipelines of several short loops take more registers than there are.
            STAGES: tl.constexpr = 1 if len(masks) > 1 else 2
            acc = _add_masked(acc, update, masks, ranks, stride_mask, place, BLOCK_R, STAGES, FLAT)
        if accumulate is not None:
            rows, columns, in_rows, in_columns = _indices(acc, place)
            pointers = accumulate + rows[:, None] * stride_accumulate + columns[None, :]
            acc += tl.load(pointers, in_rows & in_columns, 0.0).to(tl.float32)
        if len(sizes) > 0:
            acc = _add_product(acc, x0, w0, sizes[0], place, BLOCK_K, DESCRIPTORS, W_IS_NK)
        if len(sizes) > 1:
            acc = _add_product(acc, x1, w1, sizes[1], place, BLOCK_K, DESCRIPTORS, W_IS_NK)
        if len(sizes) > 2:
            acc = _add_product(acc, x2, w2, sizes[2], place, BLOCK_K, DESCRIPTORS, W_IS_NK)
        if len(masks) == 0:
            acc = _add_update(acc, update, place, 0, ranks[0], BLOCK_R, 2, FLAT)
        _finish(y, acc, update, masks, ranks, stride_mask, bias, place, BLOCK_R, DESCRIPTORS, FLAT, PARTS)


# --- Launchers --------------------------------------------------------------------------------------------------------


def gemm_lora(
    x: Tensor | None,
    w: Tensor | None,
    s: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    accumulate: Tensor | None = None,
    tile: Tile | None = None,
    capability: tuple[int, int] | None = None,
) -> Tensor:
    """x (M, K), w (K, N), s (M, R), b (R, N), bias (N,), mask uint8 (M, ⌈N / 8⌉), accumulate (M, N) → y (M, N), new.

    All of one dtype but the mask. The last dimension of x, s and accumulate is contiguous; w and b have any strides.
    Without x and w: the update alone, mask ∘ (s b) + bias, and only then + accumulate."""
    return gemm_lora_sum(
        () if x is None else (x,),
        () if w is None else (w,),
        s,
        b,
        masks=() if mask is None else (mask,),
        bias=bias,
        accumulate=accumulate,
        tile=tile,
        capability=capability,
    )


def gemm_lora_sum(
    xs: Sequence[Tensor],
    ws: Sequence[Tensor],
    s: Tensor,
    b: Tensor,
    *,
    ranks: Sequence[int] | None = None,
    masks: Sequence[Tensor] = (),
    bias: Tensor | None = None,
    accumulate: Tensor | None = None,
    tile: Tile | None = None,
    capability: tuple[int, int] | None = None,
) -> Tensor:
    """y = Σᵢ xᵢ wᵢ + Σⱼ maskⱼ ∘ (sⱼ bⱼ) + bias in one launch: xᵢ (M, Kᵢ), wᵢ (Kᵢ, N), i < 3 → y (M, N).

    s (M, ΣR) and b (ΣR, N) hold the adapters side by side. With masks (one each, or none at all), `ranks` says where
    one ends and the next begins; without, they are one product. Without any x also + accumulate (M, N)."""
    if s.shape[0] == 0 or b.shape[1] == 0:
        return s.new_empty(s.shape[0], b.shape[1])
    prepared = prepare(xs, ws, s, b, ranks=ranks, masks=masks, accumulate=accumulate, tile=tile, capability=capability)
    return prepared.run(xs, ws, s, b, masks, bias, accumulate)


class Prepared(NamedTuple):
    """A call of gemm_lora_sum but for the numbers in its tensors; any whose dtypes, sizes, strides and alignment to 16
    bytes are the same may run by it."""

    tile: Tile
    launch: Launch
    size: tuple[int, int]
    described: tuple[TensorDescriptor, ...]  # of all xs, all ws and y, but for their memory; empty without descriptors

    def run(
        self,
        xs: Sequence[Tensor],
        ws: Sequence[Tensor],
        s: Tensor,
        b: Tensor,
        masks: Sequence[Tensor] = (),
        bias: Tensor | None = None,
        accumulate: Tensor | None = None,
    ) -> Tensor:
        """Of ws and b only the memory counts here: a matrix is as good as its transpose."""
        y = stored = torch.empty(self.size, dtype=s.dtype, device=s.device)
        nothing = (None,) * (3 - len(xs))
        if self.described:
            *operands, stored = map(_located, self.described, (*xs, *ws, y))
            xs, ws = operands[: len(xs)], operands[len(xs) :]
        self.launch(*xs, *nothing, *ws, *nothing, s, b, tuple(masks), bias, accumulate, stored)
        return y


def _described(tensor: Tensor, shape: Sequence[int], strides: Sequence[int], block: list[int]) -> TensorDescriptor:
    """A descriptor of tensors in this tensor's dtype, aligned as it is; it doesn't keep its memory."""
    descriptor = TensorDescriptor(tensor, list(shape), list(strides), block)
    descriptor.base = None
    return descriptor


def _located(described: TensorDescriptor, tensor: Tensor) -> TensorDescriptor:
    """The descriptor of this tensor, without the checks of making one, which `described` has passed for it."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__.update(described.__dict__, base=tensor)
    return descriptor


def prepare(
    xs: Sequence[Tensor],
    ws: Sequence[Tensor],
    s: Tensor,
    b: Tensor,
    *,
    ranks: Sequence[int] | None = None,
    masks: Sequence[Tensor] = (),
    accumulate: Tensor | None = None,
    tile: Tile | None = None,
    capability: tuple[int, int] | None = None,
) -> Prepared:
    """All of gemm_lora_sum that needs no numbers: worth keeping where the same call comes again and again."""
    capability = capability or capability_of(s)
    w_is_nk = _is_nk(ws)
    aligned = bool(xs) and are_aligned(xs, ws, capability)
    descriptors = aligned and uses_descriptors(capability)
    if xs and accumulate is not None:
        raise ValueError("accumulate is for an update alone: beside a product there is nothing to add it to")
    numbers = (
        tuple((x.shape[1], x.stride(0), *w.stride()) for x, w in zip(xs, ws)),
        tuple(ranks) if masks and ranks else (s.shape[1],),
        (s.stride(0), *b.stride()),
        masks[0].stride(0) if masks else 0,
        0 if accumulate is None else accumulate.stride(0),
        s.shape[0],
        b.shape[1],
    )
    size, flat_rank = (s.shape[0], b.shape[1]), max(numbers[1]) if len(xs) == 1 else None
    kind = s.dtype, capability, len(masks), aligned, flat_rank, descriptors, w_is_nk
    tile, launch = _plan(numbers, *kind, tile, _sms(s.device))
    described = []
    if descriptors:
        m, n, k = tile.block_m, tile.block_n, tile.block_k
        rows = [(x, [m, k]) for x in xs] + [(w.t(), [n, k]) if w_is_nk else (w, [k, n]) for w in ws]
        described = [_described(matrix, matrix.shape, matrix.stride(), block) for matrix, block in rows]
        described.append(_described(xs[0], size, (size[1], 1), [m, n // tile.parts]))  # y, new: aligned as well
    return Prepared(tile, launch, size, tuple(described))


@plan
def _plan(
    numbers: tuple,
    dtype: torch.dtype,
    capability: tuple[int, int],
    masks: int,
    aligned: bool,
    flat_rank: int | None,
    descriptors: bool,
    w_is_nk: bool,
    tile: Tile | None,
    sms: int,
) -> tuple[Tile, Launch]:
    """The tile, picked where none is given, and the launch with these `numbers`, the kernel's from `sizes` on."""
    sizes, ranks, *_, M, N = numbers
    kind = {"pairs": len(sizes), "masks": masks, "aligned": aligned, "rank": flat_rank}
    tile = tile or pick_tile(M, N, dtype, capability, **kind)
    if tile.flat and not (descriptors and flat_rank is not None and flat_rank <= FLAT_RANK):
        raise ValueError(f"a flat tile takes descriptors, one product and updates of r ≤ {FLAT_RANK}: {tile}")
    tiles = cdiv(M, tile.block_m) * cdiv(N, tile.block_n)
    return tile, Launch(
        gemm_lora_kernel,
        (min(tiles, sms) if tile.persistent else tiles,),
        numbers,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        BLOCK_R=rank_block(max(ranks), flat=tile.flat),
        GROUP_M=GROUP_M,
        DESCRIPTORS=descriptors,
        W_IS_NK=w_is_nk,
        PERSISTENT=tile.persistent,
        PARTS=tile.parts,
        FLAT=tile.flat,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _is_nk(ws: Sequence[Tensor]) -> bool:
    """Whether every w (K, N) is the transpose of a matrix with contiguous rows. One flag serves all w: of mixed layouts
    only pointers know what to do."""
    return all([w.stride(0) == 1 for w in ws])


def are_aligned(xs: Sequence[Tensor], ws: Sequence[Tensor], capability: tuple[int, int]) -> bool:
    """Whether xs (M, Kᵢ), ws (Kᵢ, N) and a new y (M, N) can be read and written 16 bytes at a time on this GPU."""
    descriptors, w_is_nk = uses_descriptors(capability), _is_nk(ws)
    if ws[0].shape[1] % _row_step(xs[0].dtype, descriptors):
        return False
    return all([is_aligned(tensor, descriptors) for tensor in (*xs, *([w.t() for w in ws] if w_is_nk else ws))])


def _row_step(dtype: torch.dtype, descriptors: bool) -> int:
    """Rows have to be multiples of so many numbers: of 16 bytes for a descriptor. Of a pointer's sizes and strides
    Triton asks whether 16 divides them, whatever the dtype, and reads number by number where it doesn't."""
    return 16 // dtype.itemsize if descriptors else 16


def is_aligned(tensor: Tensor, descriptors: bool = False) -> bool:
    """Whether rows are contiguous, at multiples of 16 bytes and as long as `_row_step` wants, none overlapping (CUDA
    asks for strides of a row at least; of an expanded dy they are 0)."""
    step, (rows, columns), (stride, within) = _row_step(tensor.dtype, descriptors), tensor.shape, tensor.stride()
    if rows == 0 or columns == 0 or within != 1 or stride < columns or tensor.data_ptr() % 16:
        return False
    # A descriptor knows where a row ends; a pointer's loads are cut off by the number of columns.
    return stride % step == 0 and (descriptors or columns % step == 0)


@functools.cache
def _sms(device: torch.device) -> int:
    # An H100's 132 for tensors without a device, so that tests and compilation see what a GPU would.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else SMS["sm_90"]
