"""Sum of partial results: out = scale · Σₚ partials[p], in a fixed order, so that the same launch gives the same bits.

partials (P, …) fp32 contiguous, out (…) of any floating-point dtype contiguous. Reads 4 P bytes and writes one element
of out per element; partials are read right after they were written, mostly from the L2 cache. The result may be several
tensors, each with memory of its own: the rows of several adapters, say, taken apart on the way."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

# 256 columns of 16 partials are 16 loads in flight for each of 256 threads: latency, not bytes, is what costs here.
COLUMNS = 256
DEPTH = 16


@triton.jit
def _sum(partials_ptr, out_ptr, number, count, stride, size, scale, DEPTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Block `number` of COLUMNS of an output of `size` elements."""
    columns = number.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < size
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, count, DEPTH):
        rows = first + tl.arange(0, DEPTH)
        offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
        block = tl.load(partials_ptr + offsets, mask=(rows < count)[:, None] & inside[None, :], other=0.0)
        total += tl.sum(block, axis=0)  # (DEPTH, COLUMNS) → (COLUMNS,)
    tl.store(out_ptr + columns, (total * scale).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_kernel(partials_ptr, outs, sizes, count, stride, scale, DEPTH: tl.constexpr, COLUMNS: tl.constexpr):
    number = tl.program_id(0)
    if len(outs) == 1:
        _sum(partials_ptr, outs[0], number, count, stride, sizes[0], scale, DEPTH, COLUMNS)
    else:
        for i in tl.static_range(len(outs)):
            blocks = tl.cdiv(sizes[i], COLUMNS)
            if (number >= 0) & (number < blocks):
                _sum(partials_ptr, outs[i], number, count, stride, sizes[i], scale, DEPTH, COLUMNS)
            number -= blocks
            partials_ptr += sizes[i]


def sum_apart(partials: Tensor, outs: Sequence[Tensor], scale: float = 1.0) -> None:
    """Fills the outs with scale · partials.sum(0): partials (P, ΣR, …), outs (R_i, …), one after another."""
    count, sizes = partials.shape[0], tuple(out.numel() for out in outs)
    depth = min(DEPTH, triton.next_power_of_2(count))
    grid = (sum(triton.cdiv(size, COLUMNS) for size in sizes),)
    _sum_kernel[grid](
        partials, tuple(outs), sizes, count, partials.stride(0), scale, DEPTH=depth, COLUMNS=COLUMNS, num_warps=4
    )


def sum_partials(partials: Tensor, out: Tensor, scale: float = 1.0) -> Tensor:
    """Fills `out` with scale · partials.sum(0) and returns it."""
    sum_apart(partials, [out], scale)
    return out
