"""kernels/gram.py against float64: every padded rank, mixed shapes, chunks, pairs of blocks, ways a factor can lie."""

import pytest
import torch
from kernel_support import DEVICE, count_launches, nan_filled, random
from torch import Tensor

from lora_fast.kernels.gram import Tile, grams, pick_tile

# All three, bf16 in the interpreter too: nothing is computed in bf16 here, numbers are only widened.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Columns that end within a tile, a tile that ends within a chunk, one column, fewer columns than ranks.
NS, KS = (70, 33, 1, 3), (96, 1, 129, 12)


def small(R: int) -> Tile:
    """Blocks and chunks so small that little matrices need several."""
    RP = max(16, 1 << (R - 1).bit_length())
    return Tile(ranks=min(RP, 64), columns=16, chunk=48, num_warps=4, num_stages=2)


def factors(R: int, dtype: torch.dtype, Ns=NS, Ks=KS) -> tuple[list[Tensor], list[Tensor]]:
    """lora_As and lora_Bs whose ranks differ in size by up to 2⁶."""
    scale = torch.logspace(-6, 0, R, base=2, device=DEVICE)
    As = [(random(R, K, seed=i) * scale[:, None]).to(dtype) for i, K in enumerate(Ks)]
    Bs = [(random(N, R, seed=20 + i) * scale.flip(0)).to(dtype) for i, N in enumerate(Ns)]
    return As, Bs


def check(As: list[Tensor], Bs: list[Tensor], **settings) -> Tensor:
    """Runs into memory full of NaN and 0x55; holds every element to the rounding of a sum in fp64."""
    R = As[0].shape[0]
    with nan_filled(), count_launches() as launches:
        result = grams(As, Bs, **settings)
    assert launches == {"_gram_kernel": 1}
    RP = max(16, 1 << (R - 1).bit_length())
    count = len(As) + len(Bs)
    assert result.partials.shape[1:] == (RP, RP) and result.partials.dtype == torch.float64
    assert result.first.dtype == torch.int32 and result.first.shape == (count + 1,)
    first = result.first.tolist()
    assert first[0] == 0 and first[-1] == result.partials.shape[0]
    with nan_filled():
        total = result.sum()
    assert total.shape == (count, R, R) and total.dtype == torch.float64
    columns = [*(b.double().cpu() for b in Bs), *(a.t().double().cpu() for a in As)]
    for j, x in enumerate(columns):
        partials = result.partials[first[j] : first[j + 1]].cpu()
        assert len(partials) >= 1
        outside = partials.clone()
        outside[:, :R, :R] = 0.0
        assert torch.equal(outside, torch.zeros_like(outside))
        added = partials[0, :R, :R]
        for part in partials[1:]:
            added = added + part[:R, :R]
        assert torch.equal(total[j].cpu(), added), "sum() adds the parts in their order"
        # Products are exact and each sum rounds once: γ for L − 1 additions, for ours and for the reference's.
        bound = 2 * len(x) * 2.0**-53 * (x.abs().t() @ x.abs())
        difference = (added - x.t() @ x).abs()
        assert bool((difference <= bound).all()), f"factor {j}: off by {float((difference / bound).max()):.3g} bounds"
    return total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", [1, 5, 8, 16, 32, 48, 64])
def test_ranks(R, dtype):
    check(*factors(R, dtype), tile=small(R))


@pytest.mark.parametrize("R, ranks", [(70, 64), (70, 32), (129, 64)])
def test_pairs_of_blocks(R, ranks):
    """Two and four blocks of 64 and four of 32 ranks, some of them beyond R; the triangle of pairs is folded."""
    As, Bs = factors(R, torch.float16, Ns=(70, 1), Ks=(33, 16))
    check(As, Bs, tile=small(R)._replace(ranks=ranks, columns=32, chunk=64))


def test_default_tile_cuts_long_factors():
    As, Bs = factors(16, torch.float16, Ns=(1024, 2100), Ks=(1025, 5))
    result = grams(As, Bs)
    assert result.first.tolist() == [0, 1, 4, 6, 7]
    check(As, Bs)


def test_what_else_is_in_the_launch_changes_nothing():
    As, Bs = factors(16, torch.float32, Ns=(2100, 64), Ks=(1100, 7))
    together = grams(As, Bs).sum()
    assert torch.equal(together, grams(As, Bs).sum()), "the same launch, the same bits"
    alone = grams(As[:1], Bs[:1]).sum()
    assert torch.equal(together[[0, 2]], alone)


def lay(x: Tensor, how: str) -> Tensor:
    """The same numbers, in memory as `how` says."""
    rows, columns = x.shape
    if how == "transposed":
        return x.t().contiguous().t()
    if how == "slice":  # of rows that are longer, each at an address of 16 bytes
        memory = torch.full((rows, columns // 8 * 8 + 8), float("nan"), dtype=x.dtype, device=x.device)
        memory[:, :columns] = x
        return memory[:, :columns]
    if how == "shifted":  # not at an address of 16 bytes
        memory = torch.full((rows * columns + 1,), float("nan"), dtype=x.dtype, device=x.device)
        memory[1:] = x.flatten()
        return memory[1:].view(rows, columns)
    return torch.stack([x, torch.full_like(x, float("nan"))], 2)[..., 0]  # "strided": every second number


@pytest.mark.parametrize("R", [5, 16])
@pytest.mark.parametrize("how", ["transposed", "slice", "shifted", "strided"])
def test_strides(how, R):
    As, Bs = factors(R, torch.float32, Ns=(70, 64), Ks=(72, 33))
    laid = [lay(x, how) for x in As], [lay(x, how) for x in Bs]
    assert all(torch.equal(x, y) for xs, ys in zip(laid, (As, Bs)) for x, y in zip(xs, ys))
    check(*laid, tile=small(R))


def test_numbers_at_the_ends_of_the_range():
    """Where an fp32 product would overflow or vanish."""
    a = torch.tensor([[3e38, 1e-45, 1e-30], [1e38, 1e-44, 1e-38]], device=DEVICE)
    total = grams([a], [a.t().contiguous()]).sum()
    exact = a.double() @ a.double().t()
    assert float(exact[0, 0]) > 1e76
    assert torch.allclose(total, exact.expand(2, 2, 2), rtol=1e-15, atol=0.0)
    assert float(grams([a[:, 1:2]], [a[:, 1:2].t()]).sum()[0, 0, 0]) > 0.0


def test_zeros_and_nothing():
    As, Bs = [random(5, 12), torch.zeros(5, 0, device=DEVICE)], [torch.zeros(9, 5, device=DEVICE)] * 2
    total = check(As, Bs)
    assert torch.equal(total[:2], torch.zeros_like(total[:2])) and torch.equal(total[3], torch.zeros_like(total[3]))


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
def test_not_finite_stays_in_its_factor():
    As, Bs = factors(5, torch.float32, Ns=(40, 40), Ks=(40, 40))
    Bs[0][3, 1] = float("nan")
    As[1][2, 7] = float("inf")
    total = grams(As, Bs, tile=small(5)).sum()
    finite = torch.isfinite(total).flatten(1).all(1)
    assert finite.tolist() == [False, True, True, False]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (9, 4)])
def test_tiles(capability):
    """What the kernel relies on: blocks that fill RP, an even number of them, whole tiles in a chunk."""
    for R in range(1, 513):
        for dtype in DTYPES:
            tile, RP = pick_tile(R, dtype, capability), max(16, 1 << (R - 1).bit_length())
            blocks = RP // tile.ranks
            assert blocks * tile.ranks == RP and (blocks == 1 or blocks % 2 == 0)
            assert blocks == 1 or RP > 64, "up to 64 ranks every number is read once"
            assert tile.chunk % tile.columns == 0 and tile.columns >= 16
