"""Sum of partial results: out = scale · Σₚ partials[p], in a fixed order, so that the same launch gives the same bits.

partials (P, …) fp32 contiguous, out (…) of any floating-point dtype contiguous. Reads 4 P bytes and writes one element
of out per element; partials are read right after they were written, mostly from the L2 cache."""

import triton
import triton.language as tl
from torch import Tensor

# 256 columns of 16 partials are 16 loads in flight for each of 256 threads: latency, not bytes, is what costs here.
COLUMNS = 256
DEPTH = 16


@triton.jit
def _sum_kernel(partials_ptr, out_ptr, count, size, scale, DEPTH: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < size
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, count, DEPTH):
        rows = first + tl.arange(0, DEPTH)
        offsets = rows.to(tl.int64)[:, None] * size + columns[None, :]
        block = tl.load(partials_ptr + offsets, mask=(rows < count)[:, None] & inside[None, :], other=0.0)
        total += tl.sum(block, axis=0)  # (DEPTH, COLUMNS) → (COLUMNS,)
    tl.store(out_ptr + columns, (total * scale).to(out_ptr.dtype.element_ty), mask=inside)


def sum_partials(partials: Tensor, out: Tensor, scale: float = 1.0) -> Tensor:
    """Fills `out` with scale · partials.sum(0) and returns it."""
    depth = min(DEPTH, triton.next_power_of_2(partials.shape[0]))
    grid = (triton.cdiv(out.numel(), COLUMNS),)
    _sum_kernel[grid](partials, out, partials.shape[0], out.numel(), scale, DEPTH=depth, COLUMNS=COLUMNS, num_warps=4)
    return out
