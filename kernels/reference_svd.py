"""SVD of updates ΔW = s·B·A from their factors alone, all of one rank at once: the path taken on a CPU and for ranks
that the kernels don't take, and the meaning of kernels/gram.py and kernels/jacobi.py.

lora_A (R, K), lora_B (N, R). With D_B, D_A the column norms of B and row norms of A, rounded to powers of two, so that
dividing by them is exact, B̂ = B D_B⁻¹ and Â = D_A⁻¹ A:

    B̂ᵀB̂ = L_B L_Bᵀ,   ÂÂᵀ = L_A L_Aᵀ,   C = L_Bᵀ (s D_B D_A) L_A = U_c Σ V_cᵀ            all R × R
    U = B X,  X = D_B⁻¹ L_B⁻ᵀ U_c;    V = Aᵀ Y,  Y = D_A⁻¹ L_A⁻ᵀ V_c

since B̂ L_B⁻ᵀ and Âᵀ L_A⁻ᵀ have orthonormal columns. The products of bf16, fp16 or fp32 numbers in a Gram matrix are
exact in fp64, and its error moves each σ by a relative c ε (‖L_B⁻¹‖² + ‖L_A⁻¹‖²), c of a few (Carson, Ma, Shao 2026,
arXiv:2603.11953: a Gram matrix in higher precision). Where that is too much, the triangles that QR gives take the place
of L_Bᵀ and L_Aᵀ: 3 to 4 times the time, and as exact as fp64 allows."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
# fp64 numbers converted at a time: 8 MiB stay in a CPU's cache between the conversion and the product.
CHUNK = 1 << 20


class CoreSvd(NamedTuple):
    """Of n updates: S (n, p) descending, X, Y (n, R, p) or None, kappa (n,) the larger ‖L‖_F ‖L⁻¹‖_F of both factors
    with unit columns, inf where one has dependent columns (and S, X, Y then mean nothing), all fp64."""

    S: Tensor
    X: Tensor | None
    Y: Tensor | None
    kappa: Tensor


def grams(factors: Sequence[Tensor]) -> Tensor:
    """factors (n_i, R) → every factorᵀ factor (count, R, R), products and sums in fp64."""
    out = factors[0].new_empty(len(factors), factors[0].shape[1], factors[0].shape[1], dtype=torch.float64)
    for indices in _by_shape(factors):
        rows, R = factors[indices[0]].shape
        step = max(1, min(rows, CHUNK // max(R, 1)))
        # One matrix at a time, in pieces, where it is large; many at once where they are small.
        many = max(1, CHUNK // max(step * R, 1)) if step == rows else 1
        # In the memory order that the factors have: lora_A comes as the transpose of (R, K).
        transposed = factors[indices[0]].stride(0) < factors[indices[0]].stride(1)
        stored = [factors[index].mT if transposed else factors[index] for index in indices]
        buffer = out.new_empty(min(many, len(indices)), *((R, step) if transposed else (step, R)))
        for first in range(0, len(indices), many):
            chosen = slice(first, first + many)
            for start in range(0, rows, step):
                pieces, length = stored[chosen], min(step, rows - start)
                part = buffer[: len(pieces)].narrow(1 + transposed, 0, length)
                if length < rows:
                    pieces = [piece.narrow(int(transposed), start, length) for piece in pieces]
                torch.stack(pieces, out=part)
                part = part.mT if transposed else part
                product = part.mT @ part
                if start:
                    out[indices[first]] += product[0]
                else:
                    out[indices[chosen]] = product
        if rows == 0:
            out[indices] = 0.0
    return out


def _by_shape(factors: Sequence[Tensor]) -> list[list[int]]:
    groups: dict[tuple, list[int]] = {}
    for index, factor in enumerate(factors):
        groups.setdefault((*factor.shape, factor.stride(0) < factor.stride(1)), []).append(index)
    return list(groups.values())


def svd_of_grams(gram_b: Tensor, gram_a: Tensor, scalings: Tensor, vectors: bool) -> CoreSvd:
    """gram_b = BᵀB, gram_a = AAᵀ (n, R, R), scalings (n,), all fp64 → as above. Columns of B or rows of A that are zero
    are left out exactly."""
    diagonals = [torch.diagonal(gram, dim1=-2, dim2=-1) for gram in (gram_b, gram_a)]
    alive = (diagonals[0] > 0) & (diagonals[1] > 0)
    norms = [torch.where(alive, torch.exp2(torch.round(torch.log2(d) / 2)), 1.0) for d in diagonals]
    both = alive[:, :, None] & alive[:, None, :]
    identity = torch.eye(gram_b.shape[-1], dtype=torch.float64, device=gram_b.device)
    lowers, inverses = [], []
    for gram, norm in zip((gram_b, gram_a), norms):
        # What is left out becomes a row and column of the identity, which the core below multiplies by 0.
        unit = torch.where(both, gram / norm[:, :, None] / norm[:, None, :], identity)
        lower, failed = torch.linalg.cholesky_ex(unit)
        lower = torch.where((failed == 0)[:, None, None] & torch.isfinite(lower), lower, torch.nan)
        lowers.append(lower)
        inverses.append(torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False))
    sizes = [torch.linalg.matrix_norm(m) for m in (*lowers, *inverses)]
    kappa = torch.maximum(sizes[0] * sizes[2], sizes[1] * sizes[3]).nan_to_num(nan=torch.inf)
    weights = torch.where(alive, scalings[:, None] * norms[0] * norms[1], 0.0)
    core = lowers[0].mT @ (weights[:, :, None] * lowers[1])
    if not vectors:
        return CoreSvd(_svd(core, False)[1], None, None, kappa)
    u, s, vh = _svd(core, True)
    x, y = ((inverse.mT @ v) / norm[:, :, None] for inverse, v, norm in zip(inverses, (u, vh.mT), norms))
    # Beyond the rank, a vector of the core may point along what was left out; it means nothing there.
    x, y = (torch.where(alive[:, :, None], m, 0.0) for m in (x, y))
    return CoreSvd(s, x, y, kappa)


def _svd(core: Tensor, vectors: bool) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """LAPACK's or cuSOLVER's SVD (U, S, Vh) of small matrices, with nan for those that are not finite."""
    finite = torch.isfinite(core).all(dim=(-2, -1), keepdim=True)
    core = torch.where(finite, core, 0.0)
    if not vectors:
        return None, torch.where(finite[..., 0], torch.linalg.svdvals(core), torch.nan), None
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    values = torch.where(finite[..., 0], s, torch.nan)
    return torch.where(finite, u, torch.nan), values, torch.where(finite, vh, torch.nan)


def orthonormal(factor: Tensor) -> tuple[Tensor, Tensor]:
    """factor (…, n, R) → Q (…, n, p) with orthonormal columns and an upper triangle (…, p, R) with a diagonal ≥ 0, in
    fp64, p = min(n, R). The sign makes Q one and the same whether matrices are factored one by one or many at once."""
    q, upper = torch.linalg.qr(factor.double())
    signs = torch.where(torch.diagonal(upper, dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return q * signs[..., None, :], upper * signs[..., :, None]


def svd_by_qr(
    lora_A: Tensor, lora_B: Tensor, scalings: Tensor, vectors: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """lora_A (n, R, K), lora_B (n, N, R), scalings (n,) → U_c (n, min(N, R), p), S (n, p), V_cᵀ (n, p, min(K, R)) with
    U = Q_B U_c and V = Q_A V_c of `orthonormal`; U_c and V_c are None without `vectors`. Of any condition."""
    if vectors:
        uppers = [orthonormal(factor)[1] for factor in (lora_B, lora_A.mT)]
    else:
        uppers = [torch.linalg.qr(factor.double(), mode="r")[1] for factor in (lora_B, lora_A.mT)]
    return _svd(uppers[0] @ (scalings[:, None, None] * uppers[1].mT), vectors)
