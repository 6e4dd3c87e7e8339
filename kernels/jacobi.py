"""Singular values and vectors of many updates s·B·A from the Grams of their factors, R ≤ 64: three launches.

B (N, R), A (R, K), s a number; G_B = BᵀB and G_A = AAᵀ (R, R) in float64. With D_B and D_A the powers of two that bring
the columns of B and the rows of A to norms within √½ … √2, and Ĝ = D⁻¹GD⁻¹:

    Ĝ_B = L_B L_Bᵀ, Ĝ_A = L_A L_Aᵀ         pivoted Cholesky, and M with MᵀĜM = I: Q_B = B D_B⁻¹ M_B has orthonormal
                                           columns, and B D_B⁻¹ = Q_B L_Bᵀ
    C = L_Bᵀ (s D_B D_A) L_A = U_c Σ V_cᵀ  the core, s·B·A = Q_B C Q_Aᵀ; by one-sided Jacobi:
                                           J C = Σ V_cᵀ, U_c = Jᵀ
    X = D_B⁻¹ M_B U_c, Y = D_A⁻¹ M_A V_c  U = B X, V = Aᵀ Y

One side of the core's vectors is the product of the rotations J, the other is J C over Σ. To divide both, as in
U = B A V Σ⁻¹ with V = AᵀBᵀU Σ⁻¹, would lose orthogonality.

What decides the accuracy (ε = 2⁻⁵²):
- B and A are what is stored, and products of bf16, fp16 or fp32 numbers are exact in float64: G errs by the rounding of
  its sums alone. The relative error of every σ is a few ε (κ_B² + κ_A²), κ the condition with unit columns.
- An index whose column of B or row of A is zero drops out exactly. Pivots ≤ 8 R ε count as zero.
- The next pivot is the largest of (weight × what is left of Ĝ's diagonal), weight = D_B D_A: both rows and columns of C
  then come in descending size, and rounding in a small one is relative to its own size.
- The side with fewer pivots lies on the rows, else the side with the larger spread of norms: rows that depend on each
  other, and columns of very different norms, cost sweeps (17 instead of 8 at R = 32, κ = 1e7). Rows below
  R ε √(‖C‖² + max weight²) are left to rounding: they take no part in rotations and end as σ = 0.

Round d of a sweep pairs row i with row i ⊕ d: 2ᵐ − 1 rounds let each two of 2ᵐ rows meet, without a branch. The larger
row goes to the lower index, so that σ come out sorted. Sweeps end with the first that neither rotated nor swapped.

Sources: Demmel and Veselić 1992 (what Jacobi's method keeps of small σ), de Rijk 1989 (the swap), Drmač and Veselić
2008, LAPACK working notes 169 and 170 (pivoting, choice of the side), Higham 2002, chapter 10 (Cholesky).

Time is latency: at R = 64 some 9 sweeps of 63 rounds follow each other, each with four barriers, two square roots and
two divisions. Projected, not measured: 0.5 to 1 µs a round, so 0.3 to 0.6 ms for every 132 updates on an H100 or H200,
where a multiprocessor has room for one such program; at R = 16, 15 rounds without a barrier, and all updates of a
7B-shaped adapter at once. Elimination is R steps, a tenth of that. Bytes hardly count: 8 RP² for every partial Gram,
some 40 RP² for the rest of an update."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.kernels.gram import Grams
from lora_fast.kernels.launch import launch, next_power_of_2

# Padded rank → warps: a thread holds eight numbers of a matrix. 64 × 64 take as many threads as a program may have at
# 128 registers each; of larger matrices two no longer fit.
WARPS = {16: 1, 32: 4, 64: 16}
# Ten are enough for what the choice of the side leaves.
MAX_SWEEPS = 40


class CoreSvd(NamedTuple):
    """Of n updates, on the Grams' device; float64, status and sweeps int32.

    S (n, R): singular values, descending, exactly 0 beyond the numerical rank.
    X, Y (n, R, R) or None: U = lora_B @ X and V = lora_A.T @ Y; columns beyond the rank are 0.
    kappa (n,): the larger ‖L‖_F ‖L⁻¹‖_F of both factors with unit columns, zero ones left out (0 if all are). inf where
        columns depend on each other to within √(8 R ε), which is then what S may err by, relative to unit columns, and
        where Jacobi's method did not converge.
    norms (n, R): ‖b_i‖‖a_i‖, of column i of B and row i of A.
    orthogonality (n,) or None: the larger of ‖XᵀG_BX − I‖_F and ‖YᵀG_AY − I‖_F over the rank.
    status (n,): 0 full rank; 1 a smaller one; 2 not converged; 3 NaN or inf in G or s, and all the above NaN.
    sweeps (n,)."""

    S: Tensor
    X: Tensor | None
    Y: Tensor | None
    kappa: Tensor
    norms: Tensor
    orthogonality: Tensor | None
    status: Tensor
    sweeps: Tensor


@triton.jit
def _sum(partials_p, first_p, matrix, offsets, RP: tl.constexpr):
    """Elements of a factor's Gram: of its partial sums (RP, RP), in their order."""
    total = tl.zeros(offsets.shape, tl.float64)
    for part in range(tl.load(first_p + matrix), tl.load(first_p + matrix + 1)):
        total += tl.load(partials_p + tl.cast(part, tl.int64) * (RP * RP) + offsets)
    return total


@triton.jit
def _half_exponent(square):
    """h with 2ʰ within a factor √2 of √square; square a normal number."""
    exponent = ((square.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1023
    return (exponent + 1) >> 1


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["count", "R"])
def _cholesky_kernel(
    partials_p, first_p, scalings_p,
    lower_p, maps_p, weights_p, rank_p, kappas_p, scale_p, norms_p,
    count, R,
    RP: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """One factor: Lᵀ (R, RP), row k from the k-th pivot; (D⁻¹M)ᵀ (R, R) where X or Y will be; count of pivots and κ.
    With B also the norms, the weights D_B D_A (RP,) over their largest with the sign of s, and |s| times that one."""
    update = tl.program_id(0).to(tl.int64)
    side = tl.program_id(1)  # 0: B, 1: A
    matrix = side * count + update
    i = tl.arange(0, RP)
    squares_b = _sum(partials_p, first_p, update, i * (RP + 1), RP)  # (RP,), the diagonals
    squares_a = _sum(partials_p, first_p, count + update, i * (RP + 1), RP)
    scaling = tl.load(scalings_p + update)
    # An index is live if its column of B and its row of A are not zero; none is where a number isn't finite. A Gram's
    # diagonal bounds the rest of it: |G_ij|² ≤ G_ii G_jj.
    finite = tl.max(tl.where(squares_a + squares_b + tl.abs(scaling) < float("inf"), 0, 1), 0) == 0
    size = tl.broadcast_to(tl.where(finite, tl.abs(scaling), 0.0), (RP,))
    live = (squares_a > 0.0) & (squares_b > 0.0) & (size > 0.0)
    live_count = tl.sum(live.to(tl.int32), 0)
    exponent_a = tl.where(live, _half_exponent(squares_a), 0)
    exponent_b = tl.where(live, _half_exponent(squares_b), 0)
    largest = tl.max(tl.where(live, exponent_a + exponent_b, -2000), 0)
    largest = tl.where(live_count > 0, largest, 0)
    weight = tl.where(live, _power_of_two(tl.where(live, exponent_a + exponent_b - largest, 0)), 0.0)  # at most 1
    poison = tl.where(finite, 0.0, float("nan"))
    if side == 0:
        tl.store(weights_p + update * RP + i, tl.where(scaling < 0.0, -weight, weight))
        tl.store(norms_p + update * R + i, tl.sqrt(squares_b) * tl.sqrt(squares_a), mask=i < R)
        tl.store(scale_p + update, _power_of_two(largest) * tl.abs(scaling) + poison)

    scale = _power_of_two(-tl.where(side == 0, exponent_b, exponent_a))  # D⁻¹
    rest = _sum(partials_p, first_p, matrix, i[:, None] * RP + i[None, :], RP)  # (RP, RP)
    rest = tl.where(live[:, None] & live[None, :], rest * scale[:, None] * scale[None, :], 0.0)
    on_diagonal = i[:, None] == i[None, :]
    pivots = tl.sum(tl.where(on_diagonal, rest, 0.0), 1)  # what is left of the diagonal; from its pivot on, the pivot
    l_squared = tl.sum(pivots, 0)
    # The elimination's steps applied to D⁻¹, transposed: at a pivot its column is one of D⁻¹M, times √pivot.
    applied = tl.where(on_diagonal, scale[:, None], 0.0)
    smallest = tl.full((), 8 * 2.0**-52, tl.float64) * R
    rank = tl.full((), 0, tl.int32)
    lower_p += matrix * RP * RP
    if VECTORS:
        maps_p += matrix * R * R
    for k in range(0, R):
        score = tl.where(pivots > smallest, pivots * weight, 0.0)
        chosen = (i == tl.argmax(score, 0)) & (score > 0.0)  # none where nothing is left
        pivot = tl.sum(tl.where(chosen, pivots, 0.0), 0)
        inverse = tl.where(pivot > 0.0, 1.0 / tl.sqrt(tl.where(pivot > 0.0, pivot, 1.0)), 0.0)
        column = tl.sum(tl.where(chosen[None, :], rest, 0.0), 1) * inverse
        column = tl.where(weight > 0.0, column, 0.0)
        m = tl.sum(tl.where(chosen[None, :], applied, 0.0), 1) * inverse
        tl.store(lower_p + k * RP + i, column)
        if VECTORS:
            tl.store(maps_p + k * R + i, m, mask=i < R)
        weight = tl.where(chosen, 0.0, weight)  # past pivots have none
        rest -= column[:, None] * column[None, :]
        column = tl.where(chosen, 0.0, column)
        applied -= m[:, None] * column[None, :]
        pivots -= column * column
        rank += (pivot > 0.0).to(tl.int32)
    tl.store(rank_p + matrix, rank)
    applied *= tl.where(live, 1.0 / scale, 0.0)[:, None]
    m_squared = tl.sum(tl.sum(applied * applied, 0) / tl.where(pivots > smallest, pivots, 1.0), 0)
    kappa = tl.sqrt(l_squared) * tl.sqrt(m_squared)
    tl.store(kappas_p + matrix, tl.where(rank < live_count, float("inf"), kappa))


@triton.jit
def _orient(core, rank_b, rank_a, RP: tl.constexpr):
    """The core, transposed if B's side is not the one for the rows, and whether it was."""
    i = tl.arange(0, RP)
    huge = 2.0**100  # infinity times 0 would be NaN
    of_rows = tl.sum(core * core, 1)
    of_columns = tl.sum(core * core, 0)
    least_row = tl.min(tl.where(i < rank_b, of_rows, huge), 0)
    least_column = tl.min(tl.where(i < rank_a, of_columns, huge), 0)
    columns_spread = least_column * tl.max(of_rows, 0) < least_row * tl.max(of_columns, 0)
    flip = (rank_a < rank_b) | ((rank_a == rank_b) & columns_spread)
    return tl.where(flip, tl.trans(core), core), flip


@triton.jit(do_not_specialize=["count", "R", "width", "max_sweeps"])
def _jacobi_kernel(
    lower_p, weights_p, scale_p, rank_p, kappas_p,
    s_p, kappa_p, status_p, sweeps_p,
    count, R, width, max_sweeps,
    RP: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """S of the core; with VECTORS, U_cᵀ and V_cᵀ (RP, RP) take the place of L_Bᵀ and L_Aᵀ."""
    update = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, RP)
    b_at = update * RP * RP
    a_at = (count + update) * RP * RP
    core = tl.zeros((RP, RP), tl.float64)
    for j in range(0, R):
        l_b = tl.load(lower_p + b_at + i * RP + j, mask=i < R, other=0.0)  # (RP,), row j of L_B
        l_a = tl.load(lower_p + a_at + i * RP + j, mask=i < R, other=0.0)  # (RP,)
        l_a *= tl.load(weights_p + update * RP + j)
        core += l_b[:, None] * l_a[None, :]
    core, flip = _orient(core, tl.load(rank_p + update), tl.load(rank_p + count + update), RP)
    # The largest weight is 1. Where products cancel, rounding is relative to it and not to C.
    epsilon = tl.full((), 2.0**-52, tl.float64)
    noise = epsilon * R * epsilon * R * (tl.sum(tl.sum(core * core, 1), 0) + 1.0)
    tolerance = epsilon * epsilon * RP  # (ε √RP)²
    if VECTORS:
        rotation = tl.where(i[:, None] == i[None, :], tl.full((RP, RP), 1.0, tl.float64), 0.0)
    norms = tl.zeros((RP,), tl.float64)
    sweep = tl.full((), 0, tl.int32)
    moving = tl.full((), 1, tl.int32)
    while (sweep < max_sweeps) & (moving > 0):
        norms = tl.sum(core * core, 1)  # once a sweep: in between they follow the rotations
        moved = tl.zeros((RP,), tl.int32)
        for d in range(1, width):
            other = i ^ d
            low = i < other
            index = tl.broadcast_to(other[:, None], (RP, RP))
            partner = tl.gather(core, index, 0)
            product = tl.sum(core * partner, 1)
            of_partner = tl.gather(norms, other, 0)
            alpha = tl.where(low, norms, of_partner)
            beta = tl.where(low, of_partner, norms)
            rotate = (product * product > tolerance * (alpha * beta)) & (tl.minimum(alpha, beta) > noise)
            # tan of the angle that makes both rows orthogonal, |tan| ≤ 1
            difference = beta - alpha
            twice = tl.where(rotate, 2.0 * product, 0.0)
            root = tl.sqrt(difference * difference + twice * twice)
            divisor = tl.where(rotate, tl.abs(difference) + root, 1.0)
            t = tl.where(difference < 0.0, -twice, twice) / divisor
            cosine = 1.0 / tl.sqrt(1.0 + t * t)
            sine = cosine * t
            alpha -= t * product
            beta += t * product
            norms = tl.where(low, tl.maximum(alpha, beta), tl.minimum(alpha, beta))
            swap = alpha < beta
            own = tl.where(swap, tl.where(low, sine, -sine), cosine)
            others = tl.where(swap, cosine, tl.where(low, -sine, sine))
            core = own[:, None] * core + others[:, None] * partner
            if VECTORS:
                rotation = own[:, None] * rotation + others[:, None] * tl.gather(rotation, index, 0)
            moved |= (rotate | swap).to(tl.int32)
        moving = tl.max(moved, 0)
        sweep += 1

    # The last sweep moved nothing: its norms are those of the rows, to the bit, and sorted.
    kept = norms > noise
    sigma = tl.where(kept, tl.sqrt(norms), 0.0)
    scale = tl.load(scale_p + update)
    tl.store(s_p + update * R + i, sigma * scale, mask=i < R)
    rank = tl.sum((sigma * scale > 0.0).to(tl.int32), 0)
    status = tl.where(moving > 0, 2, (rank < R).to(tl.int32))
    tl.store(status_p + update, tl.where(scale < float("inf"), status, 3))
    tl.store(sweeps_p + update, sweep)
    kappa = tl.maximum(tl.load(kappas_p + update), tl.load(kappas_p + count + update)) + scale * 0.0
    tl.store(kappa_p + update, tl.where(moving > 0, float("inf"), kappa))
    if VECTORS:
        at = i[:, None] * RP + i[None, :]
        tl.debug_barrier()  # L has been read
        tl.store(lower_p + tl.where(flip, a_at, b_at) + at, tl.where(kept[:, None], rotation, 0.0))
        core *= tl.where(kept, 1.0 / tl.where(kept, sigma, 1.0), 0.0)[:, None]
        tl.store(lower_p + tl.where(flip, b_at, a_at) + at, core)


@triton.jit(do_not_specialize=["count", "R"])
def _map_kernel(
    partials_p, first_p, vectors_p, s_p,
    maps_p, orthogonality_p,
    count, R,
    RP: tl.constexpr,
):  # fmt: skip
    """X in place of (D⁻¹M)ᵀ, for one side of an update, and ‖XᵀGX − I‖_F."""
    update = tl.program_id(0).to(tl.int64)
    side = tl.program_id(1)  # 0: B, 1: A
    matrix = side * count + update
    vectors_p += matrix * RP * RP
    maps_p += matrix * R * R
    i = tl.arange(0, RP)
    inside = i < R

    mapped = tl.zeros((RP, RP), tl.float64)  # (vector, R)
    for k in range(0, R):
        vector = tl.load(vectors_p + i * RP + k)  # (vector,)
        m = tl.load(maps_p + k * R + i, mask=inside, other=0.0)  # (R,)
        mapped += vector[:, None] * m[None, :]
    poison = tl.load(s_p + update * R) * 0.0
    tl.debug_barrier()  # M has been read
    tl.store(maps_p + i[None, :] * R + i[:, None], mapped + poison, mask=inside[:, None] & inside[None, :])
    tl.debug_barrier()  # X is in memory

    product = tl.zeros((RP, RP), tl.float64)  # XᵀG (vector, R)
    for part in range(tl.load(first_p + matrix), tl.load(first_p + matrix + 1)):
        gram_p = partials_p + tl.cast(part, tl.int64) * (RP * RP)
        for k in range(0, R):
            x = tl.load(maps_p + k * R + i, mask=inside, other=0.0)  # (vector,)
            gram = tl.load(gram_p + k * RP + i)  # (R,)
            product += x[:, None] * gram[None, :]
    kept = tl.load(s_p + update * R + i, mask=inside, other=0.0) > 0.0
    squares = tl.zeros((RP,), tl.float64)
    for k in range(0, R):
        x = tl.load(maps_p + i * R + k, mask=inside, other=0.0)  # (R,)
        error = tl.sum(product * x[None, :], 1) - ((i == k) & kept).to(tl.float64)
        squares += error * error
    tl.store(orthogonality_p + matrix, tl.sqrt(tl.sum(squares, 0)))


def svd_of_grams(grams: Grams, R: int, scalings: Tensor, *, vectors: bool, max_sweeps: int = MAX_SWEEPS) -> CoreSvd:
    """Singular values of scalings[u]·B_u·A_u, u = 0 … n − 1, and maps to their vectors.

    grams: of n factors B and n factors A (`gram.grams`), R ≤ 64. scalings (n,) float64 on their device."""
    n, device = scalings.numel(), grams.partials.device
    RP = grams.partials.shape[-1]

    def empty(*shape, dtype=torch.float64):
        return torch.empty(shape, dtype=dtype, device=device)

    S, norms, scale = empty(n, R), empty(n, R), empty(n)
    kappas, kappa, rank = empty(2, n), empty(n), empty(2, n, dtype=torch.int32)
    status, sweeps = empty(n, dtype=torch.int32), empty(n, dtype=torch.int32)
    core, weights = empty(2, n, RP, RP), empty(n, RP)
    maps, orthogonality = (empty(2, n, R, R), empty(2, n)) if vectors else (None, None)
    if n:
        settings = {"RP": RP, "num_warps": WARPS[RP]}
        launch(_cholesky_kernel, (n, 2), (n, R), VECTORS=vectors, **settings)(
            grams.partials, grams.first, scalings,
            core, maps, weights, rank, kappas, scale, norms,
        )  # fmt: skip
        launch(_jacobi_kernel, (n,), (n, R, next_power_of_2(R), max_sweeps), VECTORS=vectors, **settings)(
            core, weights, scale, rank, kappas,
            S, kappa, status, sweeps,
        )  # fmt: skip
        if vectors:
            launch(_map_kernel, (n, 2), (n, R), **settings)(
                grams.partials, grams.first, core, S,
                maps, orthogonality,
            )  # fmt: skip
    X, Y = maps if vectors else (None, None)
    return CoreSvd(S, X, Y, kappa, norms, orthogonality.amax(0) if vectors else None, status, sweeps)
