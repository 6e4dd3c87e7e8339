"""kernels/expert_table.py, and the grouped kernels on stacked weights, against float64 and PyTorch."""

import itertools

import pytest
import torch
from kernel_support import DEVICE, DTYPES, assert_as_exact_as, assert_rounded_once, count_launches, nan_filled, random

from lora_fast import experts  # noqa: F401 - registers the op
from lora_fast.kernels import grouped
from lora_fast.kernels.expert_table import expert_table

OP = torch.ops.lora_fast.experts_forward
SCALING = 0.75
# Rows of each expert: none, one, some, more than a chunk of them.
BATCHES = {
    "few rows": (4, 0, 10, 0, 19),
    "empty ends": (0, 0, 7, 0),
    "one expert": (33,),
    "chunks": (0, 2500, 1, 2100, 0, 30),
    "many experts": tuple(i % 3 for i in range(130)),
}


def offsets_of(counts):
    return torch.tensor(counts, dtype=torch.int32).cumsum(0).int().to(DEVICE)


@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize("batch", BATCHES)
def test_the_table_is_that_of_the_host(batch, rank):
    counts = BATCHES[batch]
    ends = list(itertools.accumulate(counts))
    with nan_filled():
        table = expert_table(offsets_of(counts), rank, ends[-1])
    segments = [(end - count, end, expert) for expert, (count, end) in enumerate(zip(counts, ends))]
    host = grouped.block_table(segments, [rank] * len(counts), ends[-1], DEVICE, block_rows=table.block_rows)
    assert table[:6] == host[:6]
    for ours, theirs in ((table.blocks, host.blocks), (table.chunks, host.chunks)):
        assert len(theirs) <= len(ours) <= len(counts) + len(theirs)
        assert torch.equal(ours[: len(theirs)], theirs) and not ours[len(theirs) :].any()
    assert torch.equal(table.adapters, host.adapters) and torch.equal(table.order, host.order)


def exact(x, weight, lora_A, lora_B, counts, dy):
    """y, dx, dA, dB in float64, row by row."""
    x, lora_A, lora_B = (t.double().requires_grad_() for t in (x.detach(), lora_A.detach(), lora_B.detach()))
    a, b = lora_A.view(len(counts), -1, x.shape[1]), lora_B.view(lora_B.shape[0], -1, len(counts)).permute(2, 0, 1)
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(DEVICE)
    y = torch.einsum("mk,mnk->mn", x, (weight.double() + SCALING * b @ a)[owner])
    return y.detach(), *torch.autograd.grad(y, (x, lora_A, lora_B), dy.double())


def run(x, weight, lora_A, lora_B, offsets, dy, transposed, triton):
    leaves = [t.detach().requires_grad_() for t in (x, lora_A, lora_B)]
    x, lora_A, lora_B = leaves
    y, _ = OP(x, weight, lora_A, lora_B, offsets, SCALING, transposed, triton)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [1, 5, 48])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype, rank, transposed):
    counts, K, N = BATCHES["few rows"], 70, 44
    M, E = sum(counts), len(counts)
    x, dy = random(M, K, dtype=dtype), random(M, N, dtype=dtype, seed=1)
    weight = random(E, N, K, dtype=dtype, seed=2, scale=K**-0.5)
    lora_A, lora_B = random(E * rank, K, seed=3, scale=K**-0.5), random(N, rank * E, seed=4, scale=rank**-0.5)
    wanted = exact(x, weight, lora_A, lora_B, counts, dy)
    stored = weight.mT.contiguous() if transposed else weight
    arguments = x, stored, lora_A, lora_B, offsets_of(counts), dy, transposed
    eager = run(*arguments, False)
    with count_launches() as launches, nan_filled():
        ours = run(*arguments, True)
    assert launches["_gemm_kernel"] + launches["_expand_kernel"] == 2 and launches["_table_kernel"] == 2, launches
    for result, plain, right in zip(ours, eager, wanted):
        assert result.shape == right.shape and right.abs().max() > 0
        assert_as_exact_as(result, plain, right)
    again = run(*arguments, True)
    assert all(map(torch.equal, ours, again))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_of_stacked_weights_is_rounded_once(dtype, transposed):
    counts, K, N, R = (5, 0, 20, 16), 96, 80, 16
    M, E = sum(counts), len(counts)
    x, s = random(M, K, dtype=dtype), random(M, R, dtype=dtype, seed=1)
    weight, b = random(E, N, K, dtype=dtype, seed=2), random(E * R, N, dtype=dtype, seed=3).t()
    stored = weight.mT.contiguous().mT if transposed else weight
    with nan_filled():
        y = grouped.grouped_gemm(x, stored, s, b, expert_table(offsets_of(counts), R, M))
    owner = torch.repeat_interleave(torch.arange(E), torch.tensor(counts)).to(DEVICE)
    right = torch.einsum("mk,mnk->mn", x.double(), weight.double()[owner])
    right += torch.einsum("mr,mnr->mn", s.double(), b.double().view(N, E, R).permute(1, 0, 2)[owner])
    assert_rounded_once(y, right)


def test_chunks_of_an_expert_are_added_up():
    counts, K, N, rank = BATCHES["chunks"], 8, 8, 2
    M, E = sum(counts), len(counts)
    x, dy, weight = random(M, K), random(M, N, seed=1), random(E, N, K, seed=2)
    lora_A, lora_B = random(E * rank, K, seed=3), random(N, rank * E, seed=4)
    wanted = exact(x, weight, lora_A, lora_B, counts, dy)
    arguments = x, weight, lora_A, lora_B, offsets_of(counts), dy, False
    with count_launches() as launches:
        ours = run(*arguments, True)
    assert launches["_add_chunks_kernel"] == 2
    for result, plain, right in zip(ours, run(*arguments, False), wanted):
        assert_as_exact_as(result, plain, right)
    dA = ours[2].view(E, -1)
    assert not dA[0].any() and not dA[4].any() and all(dA[e].any() for e in (1, 2, 3, 5))


def test_no_rows():
    weight, lora_A, lora_B = random(3, 4, 5), random(6, 5), random(4, 6)
    x, offsets = random(0, 5), offsets_of((0, 0, 0))
    y, dx, dA, dB = run(x, weight, lora_A, lora_B, offsets, random(0, 4), False, True)
    assert y.shape == (0, 4) and dx.shape == (0, 5)
    assert dA.shape == lora_A.shape and dB.shape == lora_B.shape and not dA.any() and not dB.any()
