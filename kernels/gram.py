"""Grams of factors of mixed shapes in one launch: BᵀB of every lora_B (N_i, R), A Aᵀ of every lora_A (R, K_i), in fp64.

A factor is read as x (R, L), L its long side: a lora_A as it lies, a lora_B transposed. G = x xᵀ (R, R). Products of
two bf16, fp16 or fp32 numbers are exact in fp64, and so are the sums but for their rounding: G is off by no more than
L 2⁻⁵³ |x| |x|ᵀ, element by element (Higham 2002, section 3.1).

x is cut along L into chunks of at most 64 RP columns, RP = max(16, next power of two of R), and a program takes one
chunk of one factor, which it finds in a table of addresses. It writes a partial sum; whoever needs the Gram adds a
factor's partial sums in their order. There are no atomics, and on one chip where a factor is cut depends on its shape
alone: the same factor gives the same bits, whatever else is in the launch. Beyond 64 ranks a program takes one pair of
blocks of 64 or 32 ranks, of the pairs on and above the diagonal, and stores the mirror image too; the pairs of a chunk
are neighbours and share their reads through L2.

Bytes moved, e bytes an element: e R Σ L, each once, + 8 RP² for each chunk. Where L fills its chunks the partial sums
are RP / (8 e R) of what is read, 1/16 in bf16 for R = RP, and more for R < 16. A 7B-shaped adapter in bf16, 448 factors
with L of 4096 or 11008: at R = 16, 80 MB and 2464 chunks of one warp and 2 KB (5 MB); at R = 64, 320 MB and 640 chunks
of four warps and 32 KB (21 MB): 19 and 5 for each of an H100's 132 multiprocessors, where all run at once."""

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.kernels.devices import AMD, capability_of, fp64_dot_options
from lora_fast.kernels.launch import cdiv, launch, next_power_of_2


class Tile(NamedTuple):
    """A program takes `ranks` × `columns` of x at a time; a chunk is `chunk` columns, a multiple of `columns`."""

    ranks: int
    columns: int
    chunk: int
    num_warps: int
    num_stages: int


class Grams(NamedTuple):
    """Grams of `matrices` factors. The partial sums first[j] … first[j + 1] − 1 add up to Gram j."""

    partials: Tensor  # (P, RP, RP) float64, zero outside R × R
    first: Tensor  # (matrices + 1,) int32
    R: int

    def sum(self) -> Tensor:
        """(matrices, R, R) float64."""
        matrices, R = self.first.numel() - 1, self.R
        out = torch.empty((matrices, R, R), dtype=torch.float64, device=self.partials.device)
        if matrices:
            launch(
                _sum_parts_kernel, (matrices, cdiv(R * R, SUM_BLOCK)), (R,),
                RP=self.partials.shape[-1], BLOCK=SUM_BLOCK, num_warps=4,
            )(self.partials, self.first, out)  # fmt: skip
        return out


ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# The most ranks of one tile: 64 × 64 sums in fp64 are 64 registers for each of 128 threads.
BLOCK_R = 64
SUM_BLOCK = 1024
# Chips whose matrix units have no fp64 multiply in plain registers.
FMA = ((8, 6), (8, 9), (12, 0))
# How a factor lies in memory: 16 bytes of ranks, or 16 bytes along its long side, can be read at a time; or neither.
RANKS, LONG, ANY = (tl.constexpr(kind) for kind in range(3))


def pick_tile(R: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tile:
    """The tile for factors of rank R."""
    RP = max(16, next_power_of_2(R))
    ranks = min(RP, BLOCK_R)
    chunk, size = 64 * RP, dtype.itemsize
    if capability == AMD:  # 16 bytes for each thread, 64 to a warp; in plain registers more columns would spill
        return Tile(ranks, 32 if ranks == 16 else 16, chunk, max(1, ranks * size // 64), 2)
    if capability[0] == 10 and RP == 64:
        return Tile(64, 16, chunk, 2, 3)  # of 64 ranks and 4 warps triton 3.6 and 3.7 make tcgen05, which has no fp64
    if RP > 64 and (capability[0] == 10 or capability in FMA):
        return Tile(32, 32, chunk, 2 if capability[0] == 10 else 4, 3)
    if capability in FMA:
        return Tile(ranks, 1024 // ranks, chunk, ranks // 16, 3)
    return Tile(ranks, 64 if ranks * size <= 64 else 32, chunk, ranks // 16, 3)  # 1 or 2 KB for each warp a stage


@triton.jit
def _load(p, stride_r, stride_l, r, n, R, end):
    return tl.load(
        p + r[:, None] * stride_r + n[None, :] * stride_l, mask=(r < R)[:, None] & (n < end)[None, :], other=0.0
    )


@triton.jit
def _widen(x):
    # Adding up an axis of one element computes nothing. triton 3.6 and 3.7 derive the layout of an fp64 product's
    # operand from the narrowest number on its way from the load, and then have no instruction; they don't look behind a
    # sum.
    return tl.sum(tl.expand_dims(x.to(tl.float64), 2), 2)


@triton.jit
def _gram(
    row_p, begin, end, first_i, first_j, R,
    LIES: tl.constexpr, ELEMENT: tl.constexpr, PAIRS: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Σ x_i x_jᵀ (BR, BR) over columns begin … end − 1; x_i holds the ranks from first_i on."""
    p = tl.load(row_p).to(tl.pointer_type(ELEMENT))
    stride_l = tl.load(row_p + 3)
    stride_r = tl.load(row_p + 4)
    # What the host has checked, said in terms that the compiler follows, so that it reads 16 bytes at a time.
    VECTOR: tl.constexpr = 128 // ELEMENT.primitive_bitwidth
    if LIES == RANKS:
        p = tl.multiple_of(p, 16)
        stride_r = 1
        stride_l = tl.multiple_of(stride_l, VECTOR)
        R = R // VECTOR * VECTOR
    elif LIES == LONG:
        p = tl.multiple_of(p, 16)
        stride_r = tl.multiple_of(stride_r, VECTOR)
        stride_l = 1
        end = end // VECTOR * VECTOR
    i = first_i + tl.arange(0, BR)
    j = first_j + tl.arange(0, BR)
    acc = tl.zeros((BR, BR), tl.float64)
    for start in range(begin, end, BL):
        n = start + tl.arange(0, BL)
        x = _widen(_load(p, stride_r, stride_l, i, n, R, end))  # (BR, BL)
        y = _widen(_load(p, stride_r, stride_l, j, n, R, end)) if PAIRS else x  # (BR, BL)
        acc = tl.dot(x, tl.trans(y), acc, out_dtype=tl.float64)
    return acc


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=["first_p", "owner_p"])
def _gram_kernel(
    table_p, first_p, owner_p, partials_p, R,
    ELEMENT: tl.constexpr, RP: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = RP // BR
    PAIRS: tl.constexpr = BLOCKS * (BLOCKS + 1) // 2
    part = tl.program_id(0) // PAIRS
    pair = tl.program_id(0) % PAIRS
    # The triangle of pairs, folded: line u and line BLOCKS − 1 − u hold BLOCKS + 1 pairs together.
    fold = pair // (BLOCKS + 1)
    place = pair % (BLOCKS + 1)
    above = place < BLOCKS - fold
    first_i = tl.where(above, fold, BLOCKS - 1 - fold) * BR
    first_j = tl.where(above, fold + place, place - 1) * BR

    matrix = tl.load(owner_p + part)
    row_p = table_p + matrix * 5
    length = tl.load(row_p + 1).to(tl.int32)
    first = tl.load(first_p + matrix)
    parts = tl.load(first_p + matrix + 1) - first
    columns = tl.cdiv(tl.cdiv(length, BL), parts) * BL
    begin = (part - first) * columns
    end = tl.where(first_j < R, tl.minimum(begin + columns, length), begin)

    stride_l = tl.load(row_p + 3)
    stride_r = tl.load(row_p + 4)
    VECTOR: tl.constexpr = 128 // ELEMENT.primitive_bitwidth
    aligned = tl.load(row_p) % 16 == 0
    if aligned & (stride_r == 1) & (stride_l % VECTOR == 0) & (R % VECTOR == 0):
        acc = _gram(row_p, begin, end, first_i, first_j, R, RANKS, ELEMENT, PAIRS > 1, BR, BL)
    elif aligned & (stride_l == 1) & (stride_r % VECTOR == 0) & (length % VECTOR == 0):
        acc = _gram(row_p, begin, end, first_i, first_j, R, LONG, ELEMENT, PAIRS > 1, BR, BL)
    else:
        acc = _gram(row_p, begin, end, first_i, first_j, R, ANY, ELEMENT, PAIRS > 1, BR, 16)

    partials_p += part.to(tl.int64) * (RP * RP)
    i = first_i + tl.arange(0, BR)
    j = first_j + tl.arange(0, BR)
    tl.store(partials_p + i[:, None] * RP + j[None, :], acc)
    if first_i != first_j:
        tl.store(partials_p + j[None, :] * RP + i[:, None], acc)


@triton.jit(do_not_specialize=["R"])
def _sum_parts_kernel(partials_p, first_p, out_p, R, RP: tl.constexpr, BLOCK: tl.constexpr):
    matrix = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < R * R
    offsets = place // R * RP + place % R
    total = tl.zeros((BLOCK,), tl.float64)
    for part in range(tl.load(first_p + matrix), tl.load(first_p + matrix + 1)):
        total += tl.load(partials_p + tl.cast(part, tl.int64) * (RP * RP) + offsets, mask=inside, other=0.0)
    tl.store(out_p + matrix.to(tl.int64) * R * R + place, total, mask=inside)


def grams(
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    *,
    tile: Tile | None = None,
    capability: tuple[int, int] | None = None,
) -> Grams:
    """lora_A_i (R, K_i), lora_B_i (N_i, R), 1 ≤ R ≤ 512, one dtype (bf16, fp16 or fp32), any strides, on one device
    → the Grams of all lora_B and then all lora_A."""
    R, dtype, device = lora_As[0].shape[0], lora_As[0].dtype, lora_As[0].device
    capability = capability or capability_of(lora_As[0])
    tile = tile or pick_tile(R, dtype, capability)
    # A factor a row: address, L, R, stride along L, stride between ranks. From an array, since for hundreds of factors
    # the time goes into such lists: 0.1 ms of a launch for 448.
    rows = chain.from_iterable((x.data_ptr(), *x.shape, *x.stride()) for x in (*lora_Bs, *lora_As))
    table = torch.frombuffer(array("q", rows), dtype=torch.int64).view(-1, 5)
    table[len(lora_Bs) :, 1:] = table[len(lora_Bs) :, [2, 1, 4, 3]]  # the long side of a lora_A is its second
    if R == 1:
        table[:, 4] = 0  # between ranks that don't exist: nothing that could hinder wide reads
    parts = (table[:, 1] + (tile.chunk - 1)).div(tile.chunk, rounding_mode="floor").clamp_min(1)
    matrices, ends = len(table), parts.cumsum(0)
    count = int(ends[-1])
    # One copy to the device: the table, then `first` and the factor that owns each part as int32.
    host = torch.zeros(table.numel() + (matrices + 2 + count) // 2, dtype=torch.int64)
    host[: table.numel()] = table.flatten()
    tail = host[table.numel() :].view(torch.int32)
    tail[1 : matrices + 1] = ends
    owner = tail[matrices + 1 : matrices + 1 + count]
    owner[ends[:-1]] = 1  # the next factor's first part; repeat_interleave starts threads, 5 ms on a busy machine
    owner.cumsum_(0)
    buffer = host.to(device)
    tail = buffer[table.numel() :].view(torch.int32)
    first, owner = tail[: matrices + 1], tail[matrices + 1 : matrices + 1 + count]

    RP = max(16, next_power_of_2(R))
    blocks = RP // tile.ranks
    partials = torch.empty((count, RP, RP), dtype=torch.float64, device=device)
    launch(
        _gram_kernel, (count * (blocks * (blocks + 1) // 2),), (R,),
        ELEMENT=ELEMENTS[dtype], RP=RP, BR=tile.ranks, BL=tile.columns,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
        **fp64_dot_options(capability),
    )(buffer, first, owner, partials)  # fmt: skip
    return Grams(partials, first, R)
