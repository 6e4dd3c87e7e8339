"""The exact SVD of updates ΔW = s·B·A, which are never formed, for many matrices of mixed shapes at once.

Each rank's matrices go through three steps together: the Gram matrices of the factors in fp64, an SVD of an R × R core,
and, for those whose factors are so ill-conditioned that this does not certify 1e-9, a second pass by QR. The steps are
kernels/reference_svd.py on a CPU, kernels/gram.py and kernels/jacobi.py on a GPU."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fast.backend import check_backend, runs_triton
from lora_fast.config import LoraFastError
from lora_fast.dispatch import on_own_device
from lora_fast.kernels import reference_svd
from lora_fast.kernels.reference_svd import EPS, CoreSvd

# Up to this rank the core's SVD is a Triton kernel: beyond it, its matrix does not fit in the registers of a program.
KERNEL_RANK = 64
# Certificates bound the relative error of each singular value above this share of the largest.
SMALLEST = 1e-6
# What LAPACK adds, measured in ε of the largest singular value; one-sided Jacobi adds to each σ a few of its own ε.
_LAPACK, _JACOBI = 2 * EPS / SMALLEST, 64 * EPS
# A certificate's part for the Gram matrices: where it is more, the second pass follows.
_REFINE_ABOVE = 5e-10
# A singular value below this share of Σᵢ s ‖b_i‖‖a_i‖ ≥ σ₁ is what rounding makes of an exact zero.
_ZERO = 4 * EPS
# Bytes of fp64 factors that the second pass, and bytes of factors that a GPU, holds at a time.
_QR_BYTES, _DEVICE_BYTES = 1 << 28, 1 << 30


@dataclass(frozen=True)
class UpdateSvd:
    """SVD of one update ΔW (N, K) = scaling · lora_B lora_A, p = min(R, N, K).

    S (p,): singular values, descending, float64 on the CPU; exactly 0 beyond the numerical rank.
    kappa: the larger condition number ‖L‖_F ‖L⁻¹‖_F of the two factors with unit columns; inf where columns depend.
    certificate: a bound on the relative error of every singular value above 1e-6 · S[0].
    status: "ok"; "refined", the factors' condition asked for a second pass by QR; "not finite", a factor holds NaN or
    inf, and S is NaN."""

    S: Tensor
    kappa: float
    certificate: float
    status: str
    _left: Tensor | None = None
    _right: Tensor | None = None

    def left(self, lora_B: Tensor, k: int | None = None) -> Tensor:
        """U[:, :k] (N, k) float64 with orthonormal columns, zero beyond the numerical rank; from the lora_B (N, R) that
        the SVD was computed of, with `vectors=True`."""
        return self._vectors(lora_B, self._left, k)

    def right(self, lora_A: Tensor, k: int | None = None) -> Tensor:
        """V[:, :k] (K, k), likewise from lora_A (R, K)."""
        return self._vectors(lora_A.mT, self._right, k)

    def _vectors(self, factor: Tensor, core: Tensor | None, k: int | None) -> Tensor:
        if core is None:
            raise LoraFastError("this SVD was computed without vectors; ask for them with vectors=True")
        core = core[:, :k].to(factor.device)
        if self.status == "refined":
            return reference_svd.orthonormal(factor)[0] @ core
        return factor.double() @ core


@torch.no_grad()
def update_svds(
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    *,
    vectors: bool = False,
    device: torch.device | str | None = None,
    backend: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[UpdateSvd]:
    """SVD of every scaling_i · lora_B_i lora_A_i: lora_A_i (R_i, K_i), lora_B_i (N_i, R_i) of any floating-point dtype.

    Computed on `device`, by default where the factors are. progress(done, total) is told of matrices. Never raises for
    NaN or inf: the status of that matrix says it. Squares are taken in fp64: float64 factors far outside 1e±150 lose
    their values.
    Raises LoraFastError for sizes that don't fit."""
    check_backend(backend)
    if not len(lora_As) == len(lora_Bs) == len(scalings):
        raise LoraFastError(
            f"{len(lora_As)} lora_As, {len(lora_Bs)} lora_Bs and {len(scalings)} scalings; expected one of each for "
            "every update"
        )
    for lora_A, lora_B in zip(lora_As, lora_Bs):
        _check_factors(lora_A, lora_B)
    results: list[UpdateSvd | None] = [None] * len(lora_As)
    done = 0
    for indices in _batches(lora_As, lora_Bs):
        As = [lora_As[i].detach().to(device) for i in indices]
        Bs = [lora_Bs[i].detach().to(device) for i in indices]
        found = _batch_svds(As, Bs, [float(scalings[i]) for i in indices], vectors, backend)
        for index, result in zip(indices, found):
            results[index] = result
        done += len(indices)
        if progress is not None:
            progress(done, len(results))
    return results


def _check_factors(lora_A: Tensor, lora_B: Tensor) -> None:
    if lora_A.dim() != 2 or lora_B.dim() != 2 or lora_A.shape[0] != lora_B.shape[1]:
        raise LoraFastError(
            f"lora_A is {tuple(lora_A.shape)}, lora_B is {tuple(lora_B.shape)}; expected (R, K) and (N, R) of one R"
        )
    if not (lora_A.is_floating_point() and lora_B.is_floating_point()):
        raise LoraFastError(f"lora_A is {lora_A.dtype}, lora_B is {lora_B.dtype}; expected floating-point numbers")


def _batches(lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor]) -> list[list[int]]:
    """Indices of matrices of one rank, dtype and device, at most _DEVICE_BYTES of factors each."""
    batches: dict[tuple, list[list[int]]] = {}
    sizes: dict[tuple, int] = {}
    for index, (lora_A, lora_B) in enumerate(zip(lora_As, lora_Bs)):
        key = (lora_A.shape[0], lora_A.dtype, lora_B.dtype, lora_A.device, lora_B.device)
        size = lora_A.numel() * lora_A.itemsize + lora_B.numel() * lora_B.itemsize
        if key not in batches or sizes[key] + size > _DEVICE_BYTES:
            batches.setdefault(key, []).append([])
            sizes[key] = 0
        batches[key][-1].append(index)
        sizes[key] += size
    return [batch for group in batches.values() for batch in group]


def _batch_svds(
    lora_As: list[Tensor], lora_Bs: list[Tensor], scalings: list[float], vectors: bool, backend: str
) -> list[UpdateSvd]:
    R = lora_As[0].shape[0]
    if R == 0:
        empty = [torch.zeros(0, dtype=torch.float64)] + [torch.zeros(0, 0, dtype=torch.float64)] * 2
        return [UpdateSvd(empty[0], 1.0, 0.0, "ok", empty[1], empty[2]) for _ in lora_As]
    scales = torch.tensor(scalings, dtype=torch.float64)
    core, norms, exactness = _core_svds(lora_As, lora_Bs, scales.to(lora_As[0].device), vectors, backend)
    core = CoreSvd(*(None if t is None else t.cpu() for t in core))
    total = (scales[:, None].abs() * norms.cpu()).sum(1)  # Σᵢ s ‖b_i‖‖a_i‖
    # A Gram matrix errs by about √L ε, L the length of its sums (Higham and Mary 2019, SIAM J. Sci. Comput. 41), and σ
    # by that times ‖L⁻¹‖²: up to 0.57 times this was seen, at L = 200,000.
    lengths = torch.tensor([max(a.shape[1], b.shape[0]) for a, b in zip(lora_As, lora_Bs)], dtype=torch.float64)
    bounds = lengths.sqrt() * EPS * core.kappa.square() / R
    finite = torch.isfinite(total)
    short = torch.tensor([min(a.shape[1], b.shape[0]) < R for a, b in zip(lora_As, lora_Bs)])
    again = finite & (~(bounds <= _REFINE_ABOVE) | short)
    # Of all matrices at once: of hundreds, op by op, this would take longer than their SVDs on a GPU. Each result then
    # gets memory of its own, that keeping one (or sending it to a process) doesn't keep all.
    values, *maps = (
        [None] * len(lora_As) if t is None else t.unbind() for t in _clean(core.S, total[:, None], core.X, core.Y)
    )
    results: list[UpdateSvd | None] = [None] * len(lora_As)
    columns = (again.tolist(), finite.tolist(), core.kappa.tolist(), bounds.tolist(), values, *maps)
    for index, (is_flagged, is_finite, kappa, bound, S, left, right) in enumerate(zip(*columns)):
        if is_finite and not is_flagged:
            own = [None if t is None else t.clone() for t in (S, left, right)]
            results[index] = UpdateSvd(own[0], kappa, bound + exactness, "ok", *own[1:])
        elif not is_flagged:
            p = min(R, lora_As[index].shape[1], lora_Bs[index].shape[0])
            nan = torch.full((p,), torch.nan, dtype=torch.float64)
            results[index] = UpdateSvd(nan, math.nan, math.inf, "not finite")
    flagged = again.nonzero().flatten().tolist()
    for index, result in _refined(lora_As, lora_Bs, scales, total, core.kappa, flagged, vectors):
        results[index] = result
    return results


@on_own_device
def _core_svds(lora_As, lora_Bs, scales, vectors, backend) -> tuple[CoreSvd, Tensor, float]:
    """The first pass, ‖b_i‖‖a_i‖ of every matrix (n, R), and what the core's SVD adds to a certificate."""
    R, like = lora_As[0].shape[0], lora_As[0]
    if backend == "triton" and like.dtype != lora_Bs[0].dtype:
        raise LoraFastError(
            f"backend='triton': lora_A is {like.dtype}, lora_B is {lora_Bs[0].dtype}; the kernels take one dtype, "
            "backend='auto' takes both"
        )
    if like.dtype == lora_Bs[0].dtype and runs_triton(backend, "update_svds", like, R):
        from lora_fast.kernels import gram, jacobi

        partials = gram.grams(lora_As, lora_Bs)
        if R <= KERNEL_RANK:
            found = jacobi.svd_of_grams(partials, R, scales, vectors=vectors)
            return CoreSvd(found.S, found.X, found.Y, found.kappa), found.norms, _JACOBI
        gram_b, gram_a = partials.sum().split(len(lora_As))
    else:
        gram_b, gram_a = reference_svd.grams(lora_Bs), reference_svd.grams([a.mT for a in lora_As])
    # The root of each: the product of two squares would overflow where neither does.
    norms = torch.diagonal(gram_b, dim1=1, dim2=2).sqrt() * torch.diagonal(gram_a, dim1=1, dim2=2).sqrt()
    return reference_svd.svd_of_grams(gram_b, gram_a, scales, vectors), norms, _LAPACK


def _refined(lora_As, lora_Bs, scales, total, kappa, indices, vectors):
    """(index, result) of every matrix in `indices`, by QR: many of one shape at once."""
    groups: dict[tuple, list[int]] = {}
    for index in indices:
        groups.setdefault((lora_As[index].shape, lora_Bs[index].shape), []).append(index)
    for (a_shape, b_shape), group in groups.items():
        step = max(1, _QR_BYTES // (8 * (a_shape.numel() + b_shape.numel())))
        for first in range(0, len(group), step):
            chosen = group[first : first + step]
            As, Bs = (torch.stack([factors[i] for i in chosen]) for factors in (lora_As, lora_Bs))
            u, s, vh = reference_svd.svd_by_qr(As, Bs, scales[chosen].to(As.device), vectors)
            for place, index in enumerate(chosen):
                values = s[place].cpu()
                spread = (total[index] / values[0]).item() if values.any() else 1.0
                certificate = 2 * _LAPACK * max(1.0, spread)
                maps = (None, None) if u is None else (u[place].cpu(), vh[place].mT.cpu())
                S, *maps = _clean(values, total[index], *maps)
                yield index, UpdateSvd(S, kappa[index].item(), certificate, "refined", *maps)


def _clean(
    S: Tensor, total: Tensor, left: Tensor | None, right: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """S (…, p) and maps (…, R, p) with exact zeros in the place of what rounding makes of them; total: of _ZERO."""
    S = torch.where(_ZERO * total < S, S, 0.0)
    if left is not None:
        left, right = (torch.where((S > 0).unsqueeze(-2), core, 0.0) for core in (left, right))
    return S, left, right


def _flat(lora_A: Tensor, lora_B: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    if lora_A.dim() < 2 or lora_B.dim() < 2 or lora_A.shape[:-2] != lora_B.shape[:-2]:
        raise LoraFastError(
            f"lora_A is {tuple(lora_A.shape)}, lora_B is {tuple(lora_B.shape)}; expected (…, R, K) and (…, N, R) with "
            "the same leading sizes"
        )
    count = math.prod(lora_A.shape[:-2])  # -1 would not do where a size is 0
    return tuple(list(factor.reshape(count, *factor.shape[-2:])) for factor in (lora_A, lora_B))


def lora_svdvals(lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> Tensor:
    """Singular values S (…, p) of scaling · lora_B lora_A, float64, descending, p = min(R, N, K); the product is never
    formed. No gradients.

    lora_A (…, R, K), lora_B (…, N, R), any floating-point dtype, computed where they are. Relative error of each value
    above 1e-6 · S[0]: at most 1e-9 for factors with a condition (after scaling columns to one length) up to 1e3, and
    1e-7 up to 1e4; a NaN or inf in the factors makes that matrix's values NaN. Beyond the numerical rank S is 0.
    Raises LoraFastError for sizes that don't fit. Source of the method: reference_svd.py."""
    As, Bs = _flat(lora_A, lora_B)
    found = update_svds(As, Bs, [scaling] * len(As))
    p = min(lora_A.shape[-2], lora_A.shape[-1], lora_B.shape[-2])
    S = torch.stack([f.S for f in found]) if found else torch.zeros(0, p, dtype=torch.float64)
    return S.to(lora_A.device).reshape(*lora_A.shape[:-2], p)


@torch.no_grad()
def lora_svd(
    lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0, k: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """U (…, N, k), S (…, k), Vh (…, k, K) with U diag(S) Vh = scaling · lora_B lora_A, or its best approximation of
    rank k, all float64, k = p = min(R, N, K) by default; the product is never formed. No gradients.

    S as `lora_svdvals` gives it. U and Vᴴ have orthonormal columns and rows, and are zero beyond the numerical rank. A
    NaN or inf in the factors makes that matrix's results NaN.
    Raises LoraFastError for sizes that don't fit, or a k outside 1…p."""
    As, Bs = _flat(lora_A, lora_B)
    p = min(lora_A.shape[-2], lora_A.shape[-1], lora_B.shape[-2])
    if k is None:
        k = p
    elif isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= p:
        raise LoraFastError(f"k={k!r}; expected a whole number from 1 to min(R, N, K) = {p}")
    found = update_svds(As, Bs, [scaling] * len(As), vectors=True)
    (N, _), (_, K), leading = lora_B.shape[-2:], lora_A.shape[-2:], lora_A.shape[:-2]
    U, Vh = (lora_A.new_full((len(found), *size), torch.nan, dtype=torch.float64) for size in ((N, k), (k, K)))
    S = lora_A.new_empty(len(found), k, dtype=torch.float64)
    for i, (f, a, b) in enumerate(zip(found, As, Bs)):
        S[i] = f.S[:k]
        if f.status != "not finite":
            U[i], Vh[i] = f.left(b, k), f.right(a, k).mT
    return U.reshape(*leading, N, k), S.reshape(*leading, k), Vh.reshape(*leading, k, K)
