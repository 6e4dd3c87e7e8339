"""The table of a batch whose rows are sorted by expert, made on the GPU, which alone knows where an expert's rows end.

`grouped.block_table` makes such a table on the host and copies it; here the host would have to wait for the router. The
numbers of blocks and chunks depend on values too, so that there are as many as there could be at most, E more than
full ones: those that the batch leaves over are empty, and the kernels pass them by. One launch, which writes 16 bytes a
block, a chunk and an expert."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.kernels.grouped import CHUNK_ROWS, GroupedTable, pick_block_rows
from lora_fast.kernels.launch import cdiv, launch, next_power_of_2

# Entries that a program makes times experts that it looks at: what the registers of four warps hold.
PLACES = 4096


@triton.jit
def _table_kernel(
    offsets_ptr, table_ptr,
    experts, rank, block_rows, chunk_rows, blocks, chunks, block_programs,
    SIZE: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """SIZE entries of the blocks or of the chunks behind them; the first program of chunks writes the adapters too."""
    pid = tl.program_id(0)
    of_chunks = pid >= block_programs
    expert = tl.arange(0, EXPERTS)
    end = tl.load(offsets_ptr + expert, mask=expert < experts, other=0)
    start = tl.load(offsets_ptr + expert - 1, mask=(expert > 0) & (expert < experts), other=0)
    size = tl.where(of_chunks, chunk_rows, block_rows)
    # An expert without rows has no block, but one empty chunk, which writes its zeros.
    count = tl.maximum((end - start + size - 1) // size, tl.where(of_chunks, 1, 0))
    count = tl.where(expert < experts, count, 0)
    last = tl.cumsum(count, 0)
    first = last - count

    number = tl.where(of_chunks, pid - block_programs, pid) * SIZE + tl.arange(0, SIZE)
    # At most one expert has this entry, so that a sum over experts is its value, and 0 where none has it.
    mine = (number[:, None] >= first[None, :]) & (number[:, None] < last[None, :])  # (SIZE, EXPERTS)
    row = tl.sum(tl.where(mine, start[None, :] + (number[:, None] - first[None, :]) * size, 0), 1)
    stop = tl.minimum(row + size, tl.sum(tl.where(mine, end[None, :], 0), 1))
    which = tl.sum(tl.where(mine, expert[None, :], 0), 1)
    used = tl.sum(tl.where(mine, 1, 0), 1)

    entry = table_ptr + (number + tl.where(of_chunks, blocks, 0)) * 4
    inside = number < tl.where(of_chunks, chunks, blocks)
    tl.store(entry, row, mask=inside)
    tl.store(entry + 1, stop, mask=inside)
    tl.store(entry + 2, tl.where(of_chunks, which, which * rank), mask=inside)
    tl.store(entry + 3, tl.where(of_chunks, 0, used * rank), mask=inside)
    if pid == block_programs:
        adapter = table_ptr + (blocks + chunks + expert) * 4
        exists = expert < experts
        tl.store(adapter, expert * rank, mask=exists)
        tl.store(adapter + 1, rank + expert * 0, mask=exists)
        tl.store(adapter + 2, first, mask=exists)
        tl.store(adapter + 3, last, mask=exists)


def expert_table(offsets: Tensor, rank: int, rows: int) -> GroupedTable:
    """offsets (E,) int32: the end of each expert's rows, of M in all; rank: R of every expert's adapter.

    The E experts are the adapters of the table: A_e is rows e·R to (e + 1)·R of a_all."""
    experts = len(offsets)
    block_rows = pick_block_rows([(0, cdiv(rows, experts), 0)])
    # Σ ⌈n_e / size⌉ ≤ E + ⌊M / size⌋, and no more blocks than rows.
    blocks, chunks = min(experts + rows // block_rows, rows), experts + rows // CHUNK_ROWS
    made = torch.empty(blocks + chunks + experts, 4, dtype=torch.int32, device=offsets.device)
    parts = made.split([blocks, chunks, experts])
    width = next_power_of_2(experts)
    size = max(1, min(64, PLACES // width))
    programs = cdiv(blocks, size)
    launch(
        _table_kernel,
        (programs + cdiv(chunks, size),),
        (experts, rank, block_rows, CHUNK_ROWS, blocks, chunks, programs),
        SIZE=size,
        EXPERTS=width,
        num_warps=4 if width <= 256 else 8,
    )(offsets, made)
    order = torch.arange(rows, dtype=torch.int32, device=offsets.device)
    ranks, firsts = (rank,) * experts, tuple(range(0, experts * rank, rank))
    return GroupedTable(rows, block_rows, ranks, firsts, cdiv(rank, 16) * 16, rows, *parts, order)
