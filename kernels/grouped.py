"""Several adapters in one batch: each segment of rows has an adapter of its own rank and scaling, or none.

Row i of x (M, K) belongs to adapter g(i); A_g is (R_g, K), B_g (N, R_g), and s'_g = scaling_g / (1 − p):

    forward    s_i = (x_i ∘ m_i) A_gᵀ           y_i = x_i Wᵀ + s_i (s'_g B_g)ᵀ
    backward   ds_i = dy_i (s'_g B_g)           dx_i = dy_i W + m_i ∘ (ds_i A_g)
               dA_g = Σ_i ds_iᵀ (x_i ∘ m_i)     dB_g = s'_g Σ_i dy_iᵀ s_i      over the rows of g

All adapters' factors lie in two matrices, `a_all` (ΣR, K) and `b_all` (N, ΣR), which `stack_factors` makes: adapter g
has the ranks from offsets[g] on. `b_all` is a transposed view of (ΣR, N), so that a tile of either starts at an aligned
address whatever the ranks before it. S and dS are (M, width): row i holds its own adapter's R_g numbers, then zeros;
width is the largest rank rounded up to 16, for 16-byte loads.

Two of the four formulas on each side are the same kernel with the factors exchanged:

    project    s = (x ∘ m) Aᵀ      and  ds = dy B
    expand     y + s Bᵀ            and  dx + m ∘ (ds A)
    outer      dA = dsᵀ (x ∘ m)    and  dBᵀ = sᵀ dy
    gemm       x Wᵀ + s Bᵀ         and  dy W + m ∘ (ds A),  with the adapters' part inside the GEMM

Bytes moved, with e bytes an element, M' rows that have an adapter, X = e M' K, Y = e M' N and S = e M width:
    grouped_shrink X + S, + M'K/8 written with dropout      grouped_grad_s Y + S
    grouped_expand 2 e M N + S (2 Y in place)               grouped_grad_x 2 e M K + S, + M'K/8 read with dropout
    grouped_grad_a X + S + 4 ΣR K, + M'K/8                  grouped_grad_b Y + S + 4 ΣR N
    grouped_gemm e (M K + N K + M N) + S: the frozen layer's own traffic and S
and the factor itself, of which every block of rows reads its adapter's share through L2.
An adapter of more than CHUNK_ROWS rows adds 8 width K (or N) bytes for each of the batch's chunks, mostly in L2.

Which rows a program owns comes from a small table made once a batch on the host (`block_table`): a block of rows never
crosses the border of a segment, and each adapter has the list of its rows. So a row is summed in the same order
whatever else is in the batch, and an adapter's outputs and gradients are, bit for bit, those of its rows alone in the
same tiles. No atomics. Rows outside every segment have no adapter.

Design compared with: vLLM's shrink and expand (Punica's SGMV; inference only, split-K), and the grouped Gram kernel of
Axolotl's ScatterMoE adapters.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.kernels.devices import AMD, capability_of, stages_that_fit
from lora_fast.kernels.dropout import draw_bytes, spread_bytes, threshold
from lora_fast.kernels.launch import cdiv, launch, next_power_of_2

# An adapter with more rows than this has its dA and dB summed by several programs, into partial sums that a second
# launch adds up in order. One adapter alone gets 128 programs at M = 8192 and K = 4096, and 4 partial sums to add.
CHUNK_ROWS = 2048
# Rows a block may have. 16 is the smallest side of tl.dot, 128 the tallest tile of the GEMM.
BLOCK_ROWS = (128, 64, 32, 16)


class Tile(NamedTuple):
    """Rows, columns (of K or N) and ranks that a program holds at a time; depth is the step along K of the GEMM."""

    rows: int
    columns: int
    ranks: int
    num_warps: int
    num_stages: int
    depth: int = 0


class GroupedTable(NamedTuple):
    """Who owns which row, on the device; every size that a launch needs is on the host."""

    rows: int  # M
    block_rows: int
    ranks: tuple[int, ...]  # of each adapter
    offsets: tuple[int, ...]  # first row of each adapter in a_all, first column in b_all
    width: int  # of S and dS
    covered: int  # M', rows that have an adapter
    blocks: Tensor  # int32 (blocks, 4): first row, end, rank offset, rank (0: no adapter)
    chunks: Tensor  # int32 (chunks, 4): from and to where in `order`, adapter, unused
    adapters: Tensor  # int32 (adapters, 4): rank offset, rank, its first chunk, its last chunk + 1
    order: Tensor  # int32 (M',): row numbers, adapter by adapter, ascending


# --- Tables and factors, on the host ----------------------------------------------------------------------------------


def pick_block_rows(segments: Sequence[tuple[int, int, int]]) -> int:
    """Rows per block: the fewest padded rows, where starting a block counts as 32 rows.

    The 32 are a guess that a GPU has to confirm. They give single rows blocks of 16, 33 rows one of 64, 100 rows one of
    128."""
    lengths = [end - start for start, end, _ in segments]
    return min(BLOCK_ROWS, key=lambda size: sum(-(-length // size) for length in lengths) * (size + 32))


def block_table(
    segments: Sequence[tuple[int, int, int]],
    ranks: Sequence[int],
    rows: int,
    device: torch.device | str,
    *,
    block_rows: int | None = None,
) -> GroupedTable:
    """segments: (first row, end, adapter or −1), disjoint, in any order; ranks: of each adapter; rows: M.

    One copy from the host to the device, which no CUDA graph can capture. Depends on its arguments alone: make it once
    a batch, for all layers of equal ranks."""
    spans = sorted(segment for segment in segments if segment[0] < segment[1])
    block_rows = block_rows or pick_block_rows(spans)
    offsets = [sum(ranks[:adapter]) for adapter in range(len(ranks))]

    blocks: list[tuple[int, int, int, int]] = []
    owned: list[list[Tensor]] = [[] for _ in ranks]
    end_before = 0
    for start, end, adapter in [*spans, (rows, rows, -1)]:
        pieces = [(end_before, start, 0, 0)]  # a gap between two segments: no adapter
        if adapter < 0:
            pieces.append((start, end, 0, 0))
        else:
            pieces.append((start, end, offsets[adapter], ranks[adapter]))
            owned[adapter].append(torch.arange(start, end, dtype=torch.int32))
        for first, last, offset, rank in pieces:
            blocks += [(row, min(row + block_rows, last), offset, rank) for row in range(first, last, block_rows)]
        end_before = end

    chunks: list[tuple[int, int, int, int]] = []
    adapters: list[tuple[int, int, int, int]] = []
    covered = 0
    for adapter, lists in enumerate(owned):
        end = covered + sum(map(len, lists))
        # An adapter without rows has one empty chunk, which writes its zeros.
        pieces = [(at, min(at + CHUNK_ROWS, end), adapter, 0) for at in range(covered, end, CHUNK_ROWS)]
        pieces = pieces or [(covered, covered, adapter, 0)]
        adapters.append((offsets[adapter], ranks[adapter], len(chunks), len(chunks) + len(pieces)))
        chunks += pieces
        covered = end

    quads = torch.tensor([*blocks, *chunks, *adapters], dtype=torch.int32).view(-1, 4)
    order = [rows_of_segment for lists in owned for rows_of_segment in lists]
    packed = torch.cat([quads.view(-1), *order]).to(device)
    sizes = [4 * len(blocks), 4 * len(chunks), 4 * len(adapters), covered]
    blocks_part, chunks_part, adapters_part, order_part = packed.split(sizes)
    return GroupedTable(
        rows,
        block_rows,
        tuple(ranks),
        tuple(offsets),
        -(-max(ranks, default=0) // 16) * 16,
        covered,
        blocks_part.view(-1, 4),
        chunks_part.view(-1, 4),
        adapters_part.view(-1, 4),
        order_part,
    )


def stack_factors(
    lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor], factors: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A_g (R_g, K), B_g (N, R_g), s'_g → a_all (ΣR, K), b_all (N, ΣR), the second stored as (ΣR, N); at least one g.

    Five launches, however many the adapters. Scaled before the one rounding."""
    a_all = torch.cat(list(lora_As)).to(dtype)
    scaled = torch.cat(torch._foreach_mul(list(lora_Bs), list(factors)), dim=1)
    b_rows = scaled.new_empty(scaled.shape[1], scaled.shape[0], dtype=dtype).copy_(scaled.t())
    return a_all, b_rows.t()


# --- Tiles ------------------------------------------------------------------------------------------------------------
# None spills, compiled for sm_80, sm_89, sm_90, sm_100, sm_120 and gfx942. IEEE fp32 has no matrix units: its products
# are made in registers, where the sums must fit beside the operands, hence the small tiles.


def _pipelined(tile: Tile, stage_elements: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tile:
    """`tile` with as many of its pipeline stages as fit into shared memory."""
    stages = stages_that_fit(tile.num_stages, stage_elements * dtype.itemsize, capability)
    return tile._replace(num_stages=max(stages, 1))


def _padded_rank(width: int, largest: int) -> int:
    return min(max(next_power_of_2(width), 16), largest)


def pick_project_tile(block_rows: int, width: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tile:
    """Bound by the read of x, of which 8192 rows make but 128 programs: about 40 KB of it under way in each.

    From rank 64 on narrower steps: with dropout, wider ones spill registers on sm_80 and sm_89."""
    rows, ranks = min(block_rows, 64), _padded_rank(width, 128)
    if dtype.itemsize == 4:
        rows, columns, ranks, stages = min(rows, 32), 32, min(ranks, 32), 4
    elif rows == 64:
        columns, stages = (128, 4) if ranks < 64 else (64, 6)
    else:
        columns, stages = {16: 256, 32: 256, 64: 128, 128: 64}[ranks], 4
    return _pipelined(Tile(rows, columns, ranks, 4, stages), (rows + ranks) * columns, dtype, capability)


def pick_expand_tile(block_rows: int, width: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tile:
    """Bound by reading and writing y: small tiles, several programs on a multiprocessor; one step for ranks to 64."""
    rows, columns, ranks = min(block_rows, 64), 128, _padded_rank(width, 64)
    if dtype.itemsize == 4:
        rows, columns, ranks = min(rows, 32), 64, min(ranks, 32)
    return _pipelined(Tile(rows, columns, ranks, 4, 2), (rows + columns) * ranks, dtype, capability)


def pick_outer_tile(width: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tile:
    """Bound by the read of x, 48 KB of it under way: row numbers come a stage earlier than rows, so that 8 stages hold
    half as many tiles of x. A (128, 128) sum wants 8 warps."""
    rows, columns, ranks = 64, 128, _padded_rank(width, 128)
    if dtype.itemsize == 4:
        rows, columns, ranks = 32, 64, min(ranks, 32)
    tile = Tile(rows, columns, ranks, 8 if ranks == 128 else 4, 8)
    return _pipelined(tile, rows * (columns + ranks) // 2, dtype, capability)


def pick_gemm_tile(block_rows: int, width: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tile:
    """As in any GEMM, the largest tile that the registers hold: 128 × 256 from Hopper on, 128 × 128 before."""
    ranks = _padded_rank(width, 64)
    if dtype.itemsize == 4:
        tile = Tile(min(block_rows, 64), 64, min(ranks, 32), 4, 3, 16)
    elif block_rows == 128 and capability[0] in (9, 10) and capability != AMD:
        tile = Tile(128, 256, ranks, 8, 3, 64)
    elif block_rows == 128:
        tile = Tile(128, 128, min(ranks, 32), 8, 4, 64 if capability == (8, 0) else 32)
    else:
        tile = Tile(block_rows, 128, min(ranks, 32), 4, 4, 64)
    return _pipelined(tile, (tile.rows + tile.columns) * tile.depth, dtype, capability)


# --- Kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _row_block(blocks_ptr, number, ROWS: tl.constexpr, PIECES: tl.constexpr):
    """First row, end, rank offset and rank of the `number`-th tile; PIECES tiles of ROWS rows make a block."""
    entry = blocks_ptr + (number // PIECES).to(tl.int64) * 4
    start = tl.load(entry) + (number % PIECES) * ROWS
    return start, tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def _mask_tile(mask_ptr, rows, rows_in, first_column, mask_bytes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Bits of the dropout mask as booleans (ROWS, COLUMNS); first_column is a multiple of 8."""
    places = first_column // 8 + tl.arange(0, COLUMNS // 8)
    pointers = mask_ptr + rows[:, None] * mask_bytes + places[None, :]
    byte = tl.load(pointers, mask=rows_in[:, None] & (places[None, :] < mask_bytes), other=0)  # (ROWS, COLUMNS / 8)
    return spread_bytes(byte, ROWS, COLUMNS)


@triton.jit(do_not_specialize=["drop_below"])
def _project_kernel(
    x_ptr, a_ptr, s_ptr, mask_ptr, seed_ptr, blocks_ptr,
    K, width, mask_bytes, drop_below,
    stride_xm, stride_ar, stride_ak, stride_sm,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, PIECES: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """s = (x ∘ m) Aᵀ for ROWS rows and RANKS ranks of their adapter; draws m and writes it."""
    rank_tiles = tl.cdiv(width, RANKS)
    pid = tl.program_id(0)
    start, end, offset, rank = _row_block(blocks_ptr, pid // rank_tiles, ROWS, PIECES)
    first_rank = (pid % rank_tiles) * RANKS
    rows = (start + tl.arange(0, ROWS)).to(tl.int64)
    ranks = first_rank + tl.arange(0, RANKS)
    columns = tl.arange(0, COLUMNS)
    rows_in = rows < end
    ranks_in = ranks < rank
    x_ptrs = x_ptr + rows[:, None] * stride_xm + columns[None, :]
    a_ptrs = a_ptr + (offset + ranks).to(tl.int64)[None, :] * stride_ar + columns[:, None] * stride_ak
    if DROPOUT:
        seed = tl.load(seed_ptr)
        places = tl.arange(0, COLUMNS // 8)
        # Every tile of ranks draws the same bytes; the first writes them.
        bytes_written = tl.where(first_rank == 0, mask_bytes, 0)

    acc = tl.zeros((ROWS, RANKS), tl.float32)
    # Without an adapter, or beyond its rank, x is not read: s is zero.
    for k in range(0, tl.where((first_rank < rank) & (start < end), K, 0), COLUMNS):
        x = tl.load(x_ptrs, mask=rows_in[:, None] & (columns[None, :] < K - k), other=0.0)  # (ROWS, COLUMNS)
        a = tl.load(a_ptrs, mask=ranks_in[None, :] & (columns[:, None] < K - k), other=0.0)  # (COLUMNS, RANKS)
        if DROPOUT:
            index = rows[:, None] * mask_bytes + (k // 8 + places)[None, :]
            byte = draw_bytes(seed, index, drop_below)  # (ROWS, COLUMNS / 8)
            # Bits beyond K, in the last byte of a row, are stored as zeros.
            byte &= ((1 << tl.minimum(tl.maximum(K - k - places * 8, 0), 8)) - 1)[None, :]
            byte_in = rows_in[:, None] & ((k // 8 + places)[None, :] < bytes_written)
            tl.store(mask_ptr + index, byte.to(tl.uint8), mask=byte_in)
            x = tl.where(spread_bytes(byte, ROWS, COLUMNS), x, 0.0)
        acc = tl.dot(x, a, acc, input_precision="ieee")
        x_ptrs += COLUMNS
        a_ptrs += COLUMNS * stride_ak

    s_ptrs = s_ptr + rows[:, None] * stride_sm + ranks[None, :]
    tl.store(s_ptrs, acc.to(s_ptr.dtype.element_ty), mask=rows_in[:, None] & (ranks < width)[None, :])


@triton.jit
def _low_rank(
    acc, s_ptr, b_ptr, rows, rows_in, columns, N, offset, rank, stride_sm, stride_br, stride_bn, RANKS: tl.constexpr
):
    """acc (rows, columns) + s Bᵀ, over as many steps as the adapter's own rank takes."""
    s_ptrs = s_ptr + rows[:, None] * stride_sm
    b_ptrs = b_ptr + columns.to(tl.int64)[None, :] * stride_bn
    # s is zero from the rank to width: a bound that 16 divides keeps its loads 16 bytes wide.
    padded_rank = (rank + 15) // 16 * 16
    for first_rank in range(0, rank, RANKS):
        ranks = first_rank + tl.arange(0, RANKS)
        ranks_in = ranks < rank
        s_in = rows_in[:, None] & (ranks < padded_rank)[None, :]
        s = tl.load(s_ptrs + ranks[None, :], mask=s_in, other=0.0)  # (rows, RANKS)
        b_rows = b_ptrs + (offset + ranks).to(tl.int64)[:, None] * stride_br
        b = tl.load(b_rows, mask=ranks_in[:, None] & (columns < N)[None, :], other=0.0)  # (RANKS, columns)
        acc = tl.dot(s, b, acc, input_precision="ieee")
    return acc


@triton.jit
def _expand_kernel(
    y_ptr, s_ptr, b_ptr, mask_ptr, out_ptr, blocks_ptr,
    N, mask_bytes,
    stride_ym, stride_sm, stride_br, stride_bn, stride_om,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, PIECES: tl.constexpr,
    HAS_Y: tl.constexpr, IN_PLACE: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """out = y + m ∘ (s Bᵀ) for a tile of ROWS rows and COLUMNS columns."""
    column_tiles = tl.cdiv(N, COLUMNS)
    pid = tl.program_id(0)
    start, end, offset, rank = _row_block(blocks_ptr, pid // column_tiles, ROWS, PIECES)
    if IN_PLACE:
        end = tl.where(rank > 0, end, start)  # rows without an adapter are right as they are
    first_column = (pid % column_tiles) * COLUMNS
    rows = (start + tl.arange(0, ROWS)).to(tl.int64)
    columns = first_column + tl.arange(0, COLUMNS)
    rows_in = rows < end
    inside = rows_in[:, None] & (columns < N)[None, :]
    if HAS_Y:  # before the products, which then hide its latency
        y = tl.load(y_ptr + rows[:, None] * stride_ym + columns[None, :], mask=inside, other=0.0)  # (ROWS, COLUMNS)

    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    acc = _low_rank(acc, s_ptr, b_ptr, rows, rows_in, columns, N, offset, rank, stride_sm, stride_br, stride_bn, RANKS)
    if HAS_MASK:
        acc = tl.where(_mask_tile(mask_ptr, rows, rows_in, first_column, mask_bytes, ROWS, COLUMNS), acc, 0.0)
    if HAS_Y:
        acc += y.to(tl.float32)
    out_ptrs = out_ptr + rows[:, None] * stride_om + columns[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gemm_kernel(
    x_ptr, w_ptr, bias_ptr, s_ptr, b_ptr, mask_ptr, y_ptr, blocks_ptr,
    row_tiles, N, K, mask_bytes,
    stride_xm, stride_wg, stride_wn, stride_wk, stride_sm, stride_br, stride_bn, stride_ym,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, RANKS: tl.constexpr, PIECES: tl.constexpr,
    GROUP: tl.constexpr, STACKED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """y = x Wᵀ + bias + m ∘ (s Bᵀ) for a tile of ROWS rows and COLUMNS columns; STACKED: W is the adapter's own."""
    # GROUP row tiles go through the columns together, so that they find W's tiles in L2.
    column_tiles = tl.cdiv(N, COLUMNS)
    pid = tl.program_id(0)
    group = pid // (GROUP * column_tiles)
    group_rows = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = pid - group * GROUP * column_tiles
    start, end, offset, rank = _row_block(blocks_ptr, group * GROUP + within % group_rows, ROWS, PIECES)
    first_column = (within // group_rows) * COLUMNS
    rows = (start + tl.arange(0, ROWS)).to(tl.int64)
    columns = first_column + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    rows_in = rows < end
    columns_in = columns < N
    # Rows outside load the last one's numbers, which is cheaper than a mask in the loop; they are not stored. Not so
    # for columns: where W comes transposed they are the contiguous dimension, and a clamp would break up its loads.
    x_ptrs = x_ptr + tl.minimum(rows, end - 1)[:, None] * stride_xm + depth[None, :]
    w_ptrs = w_ptr + columns.to(tl.int64)[None, :] * stride_wn + depth[:, None] * stride_wk
    if STACKED:  # all adapters have one rank; an empty block has none, and reads nothing
        w_ptrs += (offset // tl.maximum(rank, 1)).to(tl.int64) * stride_wg

    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    if HAS_MASK:  # the mask covers the adapter's part alone, which therefore comes first
        acc = _low_rank(
            acc, s_ptr, b_ptr, rows, rows_in, columns, N, offset, rank, stride_sm, stride_br, stride_bn, RANKS
        )
        acc = tl.where(_mask_tile(mask_ptr, rows, rows_in, first_column, mask_bytes, ROWS, COLUMNS), acc, 0.0)
    for k in range(0, tl.where(start < end, K, 0), DEPTH):
        x = tl.load(x_ptrs, mask=depth[None, :] < K - k, other=0.0)  # (ROWS, DEPTH)
        w = tl.load(w_ptrs, mask=(depth[:, None] < K - k) & columns_in[None, :], other=0.0)  # (DEPTH, COLUMNS)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += DEPTH
        w_ptrs += DEPTH * stride_wk
    if not HAS_MASK:  # after the loop it takes no shared memory from the loop's pipeline
        acc = _low_rank(
            acc, s_ptr, b_ptr, rows, rows_in, columns, N, offset, rank, stride_sm, stride_br, stride_bn, RANKS
        )
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=columns_in, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows[:, None] * stride_ym + columns[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=rows_in[:, None] & columns_in[None, :])


@triton.jit
def _outer_kernel(
    x_ptr, s_ptr, mask_ptr, scales_ptr, out_ptr, order_ptr, chunks_ptr, adapters_ptr,
    K, width, mask_bytes,
    stride_xm, stride_sm, stride_oc, stride_or, stride_ok,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_SCALES: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """out = scale · sᵀ (x ∘ m) over the rows of a chunk, for RANKS ranks and COLUMNS columns; PARTIAL: unscaled, to the
    chunk's own place in out."""
    column_tiles = tl.cdiv(K, COLUMNS)
    rank_tiles = tl.cdiv(width, RANKS)
    pid = tl.program_id(0)
    first_column = (pid % column_tiles) * COLUMNS
    first_rank = ((pid // column_tiles) % rank_tiles) * RANKS
    chunk = (pid // column_tiles // rank_tiles).to(tl.int64)
    first = tl.load(chunks_ptr + chunk * 4)
    last = tl.load(chunks_ptr + chunk * 4 + 1)
    adapter = tl.load(chunks_ptr + chunk * 4 + 2)
    offset = tl.load(adapters_ptr + adapter * 4)
    rank = tl.load(adapters_ptr + adapter * 4 + 1)
    columns = first_column + tl.arange(0, COLUMNS)
    ranks = first_rank + tl.arange(0, RANKS)
    columns_in = columns < K
    s_ranks_in = ranks < (rank + 15) // 16 * 16  # as in _low_rank

    acc = tl.zeros((RANKS, COLUMNS), tl.float32)
    for at in range(first, tl.where(first_rank < rank, last, first), ROWS):
        places = at + tl.arange(0, ROWS)
        rows_in = places < last
        rows = tl.load(order_ptr + places, mask=rows_in, other=0).to(tl.int64)
        x_ptrs = x_ptr + rows[:, None] * stride_xm + columns[None, :]
        x = tl.load(x_ptrs, mask=rows_in[:, None] & columns_in[None, :], other=0.0)  # (ROWS, COLUMNS)
        s_ptrs = s_ptr + rows[:, None] * stride_sm + ranks[None, :]
        s = tl.load(s_ptrs, mask=rows_in[:, None] & s_ranks_in[None, :], other=0.0)  # (ROWS, RANKS)
        if HAS_MASK:
            x = tl.where(_mask_tile(mask_ptr, rows, rows_in, first_column, mask_bytes, ROWS, COLUMNS), x, 0.0)
        acc = tl.dot(tl.trans(s), x, acc, input_precision="ieee")

    if HAS_SCALES:
        acc *= tl.load(scales_ptr + adapter)
    if PARTIAL:
        out_ptr += chunk * stride_oc
        offset = 0
    out_ptrs = out_ptr + (offset + ranks).to(tl.int64)[:, None] * stride_or + columns.to(tl.int64)[None, :] * stride_ok
    tl.store(out_ptrs, acc, mask=(ranks < rank)[:, None] & columns_in[None, :])


@triton.jit
def _add_chunks_kernel(
    partial_ptr, scales_ptr, out_ptr, adapters_ptr,
    K, width,
    stride_pc, stride_pr, stride_or, stride_ok,
    RANKS: tl.constexpr, COLUMNS: tl.constexpr, HAS_SCALES: tl.constexpr,
):  # fmt: skip
    """out = scale · the sum, in order, of the chunks of an adapter."""
    column_tiles = tl.cdiv(K, COLUMNS)
    rank_tiles = tl.cdiv(width, RANKS)
    pid = tl.program_id(0)
    adapter = (pid // column_tiles // rank_tiles).to(tl.int64)
    offset = tl.load(adapters_ptr + adapter * 4)
    rank = tl.load(adapters_ptr + adapter * 4 + 1)
    first_chunk = tl.load(adapters_ptr + adapter * 4 + 2)
    last_chunk = tl.load(adapters_ptr + adapter * 4 + 3)
    columns = (pid % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = ((pid // column_tiles) % rank_tiles) * RANKS + tl.arange(0, RANKS)
    inside = (ranks < rank)[:, None] & (columns < K)[None, :]
    partial_ptrs = partial_ptr + ranks.to(tl.int64)[:, None] * stride_pr + columns[None, :]
    partial_ptrs += first_chunk.to(tl.int64) * stride_pc

    acc = tl.zeros((RANKS, COLUMNS), tl.float32)
    for _ in range(first_chunk, last_chunk):
        acc += tl.load(partial_ptrs, mask=inside, other=0.0)  # (RANKS, COLUMNS)
        partial_ptrs += stride_pc
    if HAS_SCALES:
        acc *= tl.load(scales_ptr + adapter)
    out_ptrs = out_ptr + (offset + ranks).to(tl.int64)[:, None] * stride_or + columns.to(tl.int64)[None, :] * stride_ok
    tl.store(out_ptrs, acc, mask=inside)


# --- Launchers --------------------------------------------------------------------------------------------------------


def _project(x, factor, table, seed, dropout_p, tile, capability):
    """x (M, C), factor (ΣR, C) → (M, width), mask."""
    s = x.new_empty(table.rows, table.width)
    mask = None
    if seed is not None:
        # Where there is no adapter nothing is drawn.
        make = torch.empty if table.covered == table.rows else torch.zeros
        mask = make(1, table.rows, -(-x.shape[1] // 8), dtype=torch.uint8, device=x.device)
    if s.numel() == 0:
        return s, mask
    tile = tile or pick_project_tile(table.block_rows, table.width, x.dtype, capability or capability_of(x))
    pieces = table.block_rows // tile.rows
    grid = (len(table.blocks) * pieces * cdiv(table.width, tile.ranks),)
    launch(
        _project_kernel, grid,
        (x.shape[1], table.width, 0 if mask is None else mask.shape[2], threshold(dropout_p),
         x.stride(0), *factor.stride(), s.stride(0)),
        ROWS=tile.rows, COLUMNS=tile.columns, RANKS=tile.ranks, PIECES=pieces, DROPOUT=seed is not None,
        num_warps=tile.num_warps, num_stages=tile.num_stages
    )(x, factor, s, mask, seed, table.blocks)  # fmt: skip
    return s, mask


def _expand(y, s, factor, table, mask, out, tile, capability):
    """y (M, C) or None, s (M, width), factor (ΣR, C) → (M, C)."""
    columns = factor.shape[1]
    if out is None:
        out = s.new_empty(table.rows, columns, dtype=s.dtype if y is None else y.dtype)
    if out.numel() == 0:
        return out
    tile = tile or pick_expand_tile(table.block_rows, table.width, s.dtype, capability or capability_of(s))
    pieces = table.block_rows // tile.rows
    grid = (len(table.blocks) * pieces * cdiv(columns, tile.columns),)
    launch(
        _expand_kernel, grid,
        (columns, 0 if mask is None else mask.shape[-1],
         0 if y is None else y.stride(0), s.stride(0), *factor.stride(), out.stride(0)),
        ROWS=tile.rows, COLUMNS=tile.columns, RANKS=tile.ranks, PIECES=pieces,
        HAS_Y=y is not None, IN_PLACE=out is y, HAS_MASK=mask is not None,
        num_warps=tile.num_warps, num_stages=tile.num_stages
    )(y, s, factor, mask, out, table.blocks)  # fmt: skip
    return out


def _outer(x, s, table, mask, scales, out, stride_or, stride_ok, tile, capability):
    """Σ sᵀ x by adapter into out, fp32."""
    columns = x.shape[1]
    if out.numel() == 0:
        return out
    tile = tile or pick_outer_tile(table.width, x.dtype, capability or capability_of(x))
    chunks, adapters = len(table.chunks), len(table.adapters)
    partial = chunks > adapters
    sums = x.new_empty(chunks, table.width, columns, dtype=torch.float32) if partial else out
    stride_oc, stride_pr, stride_pk = sums.stride() if partial else (0, stride_or, stride_ok)
    tiles = cdiv(columns, tile.columns) * cdiv(table.width, tile.ranks)
    launch(
        _outer_kernel, (chunks * tiles,),
        (columns, table.width, 0 if mask is None else mask.shape[-1],
         x.stride(0), s.stride(0), stride_oc, stride_pr, stride_pk),
        ROWS=tile.rows, COLUMNS=tile.columns, RANKS=tile.ranks,
        HAS_MASK=mask is not None, HAS_SCALES=scales is not None and not partial, PARTIAL=partial,
        num_warps=tile.num_warps, num_stages=tile.num_stages
    )(x, s, mask, None if partial else scales, sums, table.order, table.chunks, table.adapters)  # fmt: skip
    if partial:
        grid = (adapters * cdiv(columns, 128) * cdiv(table.width, 16),)
        launch(
            _add_chunks_kernel, grid,
            (columns, table.width, sums.stride(0), sums.stride(1), stride_or, stride_ok),
            RANKS=16, COLUMNS=128, HAS_SCALES=scales is not None,
            num_warps=4
        )(sums, scales, out, table.adapters)  # fmt: skip
    return out


def grouped_shrink(
    x: Tensor,
    a_all: Tensor,
    table: GroupedTable,
    *,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    tile: Tile | None = None,
    capability: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x (M, K), a_all (ΣR, K) → s (M, width) in x's dtype, mask uint8 (1, M, ⌈K / 8⌉).

    seed: int64 (1,) on the device: draw a mask (bits of rows without an adapter are 0). None: no dropout, no mask."""
    return _project(x, a_all, table, seed, dropout_p, tile, capability)


def grouped_grad_s(
    dy: Tensor,
    b_all: Tensor,
    table: GroupedTable,
    *,
    tile: Tile | None = None,
    capability: tuple[int, int] | None = None,
) -> Tensor:
    """dy (M, N), b_all (N, ΣR) scaled → ds (M, width) in dy's dtype."""
    return _project(dy, b_all.t(), table, None, 0.0, tile, capability)[0]


def grouped_expand(
    y: Tensor,
    s: Tensor,
    b_all: Tensor,
    table: GroupedTable,
    *,
    out: Tensor | None = None,
    tile: Tile | None = None,
    capability: tuple[int, int] | None = None,
) -> Tensor:
    """y (M, N), s (M, width), b_all (N, ΣR) scaled → y + s bᵀ in y's dtype, rounded once.

    out: where to write it, y itself allowed: then rows without an adapter are neither read nor written."""
    return _expand(y, s, b_all.t(), table, None, out, tile, capability)


def grouped_grad_x(
    ds: Tensor,
    a_all: Tensor,
    table: GroupedTable,
    *,
    mask: Tensor | None = None,
    accumulate: Tensor | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
    capability: tuple[int, int] | None = None,
) -> Tensor:
    """ds (M, width), a_all (ΣR, K), mask (1, M, ⌈K / 8⌉) → accumulate + m ∘ (ds A) (M, K); out as in grouped_expand."""
    return _expand(accumulate, ds, a_all, table, mask, out, tile, capability)


def grouped_grad_a(
    ds: Tensor,
    x: Tensor,
    table: GroupedTable,
    *,
    mask: Tensor | None = None,
    tile: Tile | None = None,
    capability: tuple[int, int] | None = None,
) -> Tensor:
    """ds (M, width), x (M, K) → dA_all (ΣR, K) fp32; adapter g's is rows offsets[g] to offsets[g] + R_g."""
    out = x.new_empty(sum(table.ranks), x.shape[1], dtype=torch.float32)
    return _outer(x, ds, table, mask, None, out, out.stride(0), out.stride(1), tile, capability)


def grouped_grad_b(
    dy: Tensor,
    s: Tensor,
    table: GroupedTable,
    scales: Tensor,
    *,
    tile: Tile | None = None,
    capability: tuple[int, int] | None = None,
) -> Tensor:
    """dy (M, N), s (M, width), scales fp32 (adapters,) holding s' → dB_all (N, ΣR) fp32, columns as rows above."""
    out = dy.new_empty(dy.shape[1], sum(table.ranks), dtype=torch.float32)
    return _outer(dy, s, table, None, scales, out, out.stride(1), out.stride(0), tile, capability)


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    b_all: Tensor,
    table: GroupedTable,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    tile: Tile | None = None,
    capability: tuple[int, int] | None = None,
) -> Tensor:
    """x (M, K), weight (N, K), bias (N,), s (M, width), b_all (N, ΣR) scaled → x Wᵀ + bias + s bᵀ (M, N) in x's dtype.

    weight (G, N, K): of each of the G adapters its own, as experts have; they have one rank R ≥ 1 then.
    dx = dy W + m ∘ (ds A) is grouped_gemm(dy, weight.t(), ds, a_all.t(), table, mask=mask). Each block of rows reads W,
    so many short segments are better served by one GEMM over all rows and grouped_expand."""
    N, K = weight.shape[-2:]
    stacked = weight.dim() == 3
    y = x.new_empty(table.rows, N)
    if y.numel() == 0:
        return y
    tile = tile or pick_gemm_tile(table.block_rows, table.width, x.dtype, capability or capability_of(x))
    pieces = table.block_rows // tile.rows
    row_tiles = len(table.blocks) * pieces
    launch(
        _gemm_kernel, (row_tiles * cdiv(N, tile.columns),),
        (row_tiles, N, K, 0 if mask is None else mask.shape[-1],
         x.stride(0), weight.stride(0) if stacked else 0, *weight.stride()[-2:],
         s.stride(0), b_all.stride(1), b_all.stride(0), y.stride(0)),
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, RANKS=tile.ranks, PIECES=pieces,
        GROUP=8, STACKED=stacked, HAS_BIAS=bias is not None, HAS_MASK=mask is not None,
        num_warps=tile.num_warps, num_stages=tile.num_stages
    )(x, weight, bias, s, b_all, mask, y, table.blocks)  # fmt: skip
    return y
