"""Sums of partial results: out = scale · Σₚ partials[p], in a fixed order, so that the same launch gives the same bits.

Several sums take one launch, since what they cost is mostly the launch. Reads 4 P bytes and writes one element of out
per element; partials are read right after they were written, mostly from the L2 cache."""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lora_fast.kernels.launch import Launch, cdiv, next_power_of_2, plan

# 256 columns of 16 partials are 16 loads in flight for each of 256 threads: latency, not bytes, is what costs here.
COLUMNS = 256
DEPTH = 16


class Sum(NamedTuple):
    """out ← scale · partials.sum(0): partials (P, …) fp32, each part contiguous; out of as many elements as a part, of
    any floating-point dtype, contiguous or (rows, columns) with contiguous rows."""

    partials: Tensor
    out: Tensor
    scale: float = 1.0


@triton.jit
def _sum(
    partials_ptr, out_ptr, number, count, stride, size, width, out_stride, scale,
    DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Block `number` of COLUMNS of an output of `size` elements, in rows of `width`."""
    places = number.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = places < size
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, count, DEPTH):
        parts = first + tl.arange(0, DEPTH)
        offsets = parts.to(tl.int64)[:, None] * stride + places[None, :]
        block = tl.load(partials_ptr + offsets, mask=(parts < count)[:, None] & inside[None, :], other=0.0)
        total += tl.sum(block, axis=0)  # (DEPTH, COLUMNS) → (COLUMNS,)
    out = out_ptr + places // width * out_stride + places % width
    tl.store(out, (total * scale).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_kernel(
    partials, outs, counts, strides, sizes, widths, out_strides, scales,
    DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    if len(outs) == 1:
        _sum(
            partials[0], outs[0], number, counts[0], strides[0], sizes[0], widths[0], out_strides[0], scales[0],
            DEPTH, COLUMNS,
        )  # fmt: skip
    else:
        for i in tl.static_range(len(outs)):
            blocks = tl.cdiv(sizes[i], COLUMNS)
            if (number >= 0) & (number < blocks):
                _sum(
                    partials[i], outs[i], number, counts[i], strides[i], sizes[i], widths[i], out_strides[i], scales[i],
                    DEPTH, COLUMNS,
                )  # fmt: skip
            number -= blocks


@plan
def _add_up(shapes: tuple[tuple, ...]) -> Launch:
    """Of each sum the number of parts, their distance, the size of out, its rows' width and distance, the scale."""
    counts, _, sizes, *_ = numbers = tuple(zip(*shapes))
    grid = (sum(cdiv(size, COLUMNS) for size in sizes),)
    depth = min(DEPTH, next_power_of_2(max(counts)))
    return Launch(_sum_kernel, grid, numbers, DEPTH=depth, COLUMNS=COLUMNS, num_warps=4)


def _rows(out: Tensor) -> tuple[int, int]:
    """Width of rows and from one to the next; contiguous memory is one row, whatever its shape."""
    return (out.numel(), out.numel()) if out.is_contiguous() else (out.shape[1], out.stride(0))


def add_up(sums: Sequence[Sum]) -> None:
    """Computes all sums; each of at least one element."""
    if not sums:
        return
    shapes = tuple([(p.shape[0], p.stride(0), out.numel(), *_rows(out), scale) for p, out, scale in sums])
    _add_up(shapes)(tuple([each.partials for each in sums]), tuple([each.out for each in sums]))
