"""What DoRA adds behind a layer's product: a factor for each output, and its gradients.

    forward    y  = z ∘ g + bias           z (M, N), g (N,) in fp32, bias (N,)
    backward   dz = dy ∘ g                 dg = Σ_m dy ∘ z

Numbers are multiplied in fp32 and rounded once. Bytes moved, at e bytes an element: forward 2 e M N, backward 3 e M N
(dy and z read, dz written), 2 e M N where g gets no gradient; PyTorch's own steps, which hold the products in fp32,
move 12 and about 30 bytes for each element of bf16. Partial sums of dg are added up in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.kernels.devices import MULTIPROCESSORS
from lora_fast.kernels.launch import Launch, cdiv, plan
from lora_fast.kernels.partials import Sum, add_up

# Rows of 256 bytes, 16 elements a thread: all there is to do is to keep enough loads on their way. In bf16 those are
# 40 KB and more on a multiprocessor, which takes a dozen programs of at most 40 registers a thread, in backward seven
# of 72.
TILE = {"BLOCK_M": 16, "BLOCK_N": 128, "num_warps": 4}
# About so many programs of backward for each multiprocessor, which run all at once: the slowest is what counts.
RESIDENT = 5


@triton.jit
def _scale_kernel(z, g, bias, y, M, N, stride_z, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    blocks_n = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // blocks_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = column < N
    inside = (row < M)[:, None] & in_columns[None, :]
    out = tl.load(z + row[:, None] * stride_z + column[None, :], inside, 0.0).to(tl.float32)
    out *= tl.load(g + column, in_columns, 0.0)[None, :]
    if bias is not None:
        out += tl.load(bias + column, in_columns, 0.0).to(tl.float32)[None, :]
    tl.store(y + row[:, None] * N + column[None, :], out.to(y.dtype.element_ty), inside)


@triton.jit
def _scale_backward_kernel(
    dy, z, g, dz, partials,
    M, N, stride_dy, stride_z, part_rows,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dz of a strip of columns and `part_rows` rows, and their part of dg. z is read once, with dy."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = column < N
    factor = tl.load(g + column, in_columns, 0.0)[None, :]
    # Summed over rows behind the loop: within it warps would wait for each other.
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.program_id(1).to(tl.int64) * part_rows
    for start in range(0, part_rows, BLOCK_M):
        row = first + start + tl.arange(0, BLOCK_M)
        inside = (row < M)[:, None] & in_columns[None, :]
        gradient = tl.load(dy + row[:, None] * stride_dy + column[None, :], inside, 0.0).to(tl.float32)
        value = tl.load(z + row[:, None] * stride_z + column[None, :], inside, 0.0).to(tl.float32)
        total += gradient * value
        tl.store(dz + row[:, None] * N + column[None, :], (gradient * factor).to(dz.dtype.element_ty), inside)
    tl.store(partials + tl.program_id(1).to(tl.int64) * N + column, tl.sum(total, 0), in_columns)


@plan
def _forward(M: int, N: int, stride_z: int) -> Launch:
    grid = (cdiv(M, TILE["BLOCK_M"]) * cdiv(N, TILE["BLOCK_N"]),)
    return Launch(_scale_kernel, grid, (M, N, stride_z), **TILE)


@plan
def _backward(M: int, N: int, stride_dy: int, stride_z: int) -> tuple[int, Launch]:
    """Into how many parts the rows are cut, and the launch."""
    rows, strips = TILE["BLOCK_M"], cdiv(N, TILE["BLOCK_N"])
    parts = min(max(1, round(RESIDENT * MULTIPROCESSORS / strips)), cdiv(M, rows))
    part_rows = cdiv(cdiv(M, parts), rows) * rows
    parts = cdiv(M, part_rows)
    return parts, Launch(_scale_backward_kernel, (strips, parts), (M, N, stride_dy, stride_z, part_rows), **TILE)


def scale_columns(z: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
    """z (M, N) with contiguous rows, g (N,) fp32, bias (N,) or None, both contiguous → y = z ∘ g + bias in z's
    dtype."""
    M, N = z.shape
    y = torch.empty((M, N), dtype=z.dtype, device=z.device)
    if y.numel():
        _forward(M, N, z.stride(0))(z, g, bias, y)
    return y


def scale_columns_backward(dy: Tensor, z: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor | None]:
    """dy (M, N) and z (M, N) with contiguous rows, g (N,) fp32 → dz = dy ∘ g in dy's dtype, dg = Σ_m dy ∘ z in fp32;
    without z the first alone."""
    if z is None:
        return scale_columns(dy, g, None), None
    M, N = dy.shape
    dz = torch.empty((M, N), dtype=dy.dtype, device=dy.device)
    if not dz.numel():
        return dz, torch.zeros_like(g)
    parts, launch = _backward(M, N, dy.stride(0), z.stride(0))
    partials, dg = torch.empty((parts, N), dtype=torch.float32, device=dy.device), torch.empty_like(g)
    launch(dy, z, g, dz, partials)
    add_up([Sum(partials, dg)])
    return dz, dg
