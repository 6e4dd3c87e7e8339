"""The spectra of an adapter's updates ΔW = s·B·A, and how they lie to another adapter's and to the base weights.

lora_A (R, K), lora_B (N, R), W (N, K). ΔW is never formed. Layers are keyed by module path in the base model, each
expert of a stack as a layer of its own, path[0] … path[E − 1]."""

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_fast.adapter_updates import DIVERGED, AdapterUpdates, Factors, read_updates
from lora_fast.base_weights import base_weights
from lora_fast.config import LoraFastError, few, warn
from lora_fast.spectrum import Spectrum
from lora_fast.svd import UpdateSvd, update_svds

_SIDES = ("left", "right")
_OF = ("update", "factor")


class Amplification(NamedTuple):
    """factor = update_norm / projected_norm, with update_norm = ‖ΔW‖_F and projected_norm = ‖UᵀWV‖_F, U and V the top r
    singular vectors of ΔW; None where either is 0. weight_norm = ‖W‖_F, which costs no reading of its own."""

    factor: float | None
    update_norm: float
    projected_norm: float
    weight_norm: float


class IntruderDimensions(NamedTuple):
    """Of the top k left singular vectors of W + ΔW: their singular values, the largest |cos| of each to any left
    singular vector of W, and how many of these are below the threshold."""

    count: int
    cosines: tuple[float, ...]
    singular_values: tuple[float, ...]


def adapter_spectra(
    adapter: str | os.PathLike | nn.Module,
    *,
    base: str | os.PathLike | nn.Module | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Spectrum]:
    """{module path: Spectrum} of every update of an adapter, all computed together.

    adapter: as `adapter_factors` takes it. base: the base model, or its safetensors (a file, a folder, or a folder with
    an index), read one weight at a time, for ‖W‖_F and the relative size of each update. device: where to compute, by
    default where the factors are. progress(done, total) is told of matrices.
    Warns where the adapter holds more than s·B·A, or where that is not relative to the original base weights.
    Raises LoraFastError for all that `adapter_factors` refuses, and a weight that `base` lacks."""
    # NaN and inf show in the Gram matrices, and the status of each names its layer. Looking for them beforehand took
    # 130 ms for a 7B adapter of rank 16 in fp32, on two cores, and all the rest 80.
    found = read_updates(adapter, check_finite=False)
    if found.note:
        warn(f"{found.source}: {found.note}")
    weights = None if base is None else base_weights(base, found)
    svds = _svds(found, vectors=False, device=device, progress=progress)
    spectra = {}
    for (name, lora_A, lora_B, scaling), svd in zip(found.factors, svds):
        spectra[name] = Spectrum(
            name=name,
            singular_values=svd.S,
            shape=(lora_B.shape[0], lora_A.shape[1]),
            rank=lora_A.shape[0],
            scaling=scaling,
            frobenius_norm=float(torch.linalg.vector_norm(svd.S)),
            certificate=svd.certificate,
            status=svd.status,
            method="factors",
            storage_dtype=max(lora_A.dtype, lora_B.dtype, key=lambda dtype: torch.finfo(dtype).eps),
            weight_norm=None if weights is None else weights[name].norm(),
        )
    return spectra


def _svds(found: AdapterUpdates, **options: Any) -> list[UpdateSvd]:
    names, lora_As, lora_Bs, scalings = zip(*found.factors)
    svds = update_svds(lora_As, lora_Bs, scalings, **options)
    if broken := [name for name, svd in zip(names, svds) if svd.status == "not finite"]:
        raise LoraFastError(f"{found.source}: {few(broken)} {DIVERGED}")
    return svds


@torch.no_grad()
def subspace_similarity(
    one: str | os.PathLike | nn.Module,
    two: str | os.PathLike | nn.Module,
    i: int | None = None,
    j: int | None = None,
    *,
    side: str = "right",
    of: str = "update",
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """φ(i, j) = ‖U_iᵀ U'_j‖_F² / min(i, j) ∈ [0, 1] for every layer that both adapters have: how much of the smaller
    of two subspaces lies in the other, U_i spanned by the top i singular vectors of `one`, U'_j by the top j of `two`.

    Returns {layer: grid (i, j) float64}, grid[a − 1, b − 1] = φ(a, b), up to i and j (by default all). Directions
    beyond an update's numerical rank do not exist and add nothing. A random pair of subspaces of K dimensions has
    φ ≈ max(i, j) / K.
    side: "right" (input) or "left" (output) singular vectors. of="update" takes those of ΔW = s·B·A, which do not
    depend on how it is split into factors; of="factor" those of lora_A alone (right) or of lora_B alone (left), as the
    paper does.
    Source: Hu et al. 2021, arXiv:2106.09685, section 7.2 and appendix G.
    Raises LoraFastError where the adapters share no layer, or one of another shape."""
    _check_count(i, "i")
    _check_count(j, "j")
    for name, value, allowed in (("side", side, _SIDES), ("of", of, _OF)):
        if value not in allowed:
            raise LoraFastError(f"{name}={value!r}; expected {' or '.join(map(repr, allowed))}")
    adapters = [read_updates(adapter, check_finite=False) for adapter in (one, two)]
    places = [{factors.name: place for place, factors in enumerate(found.factors)} for found in adapters]
    shared = [name for name in places[0] if name in places[1]]
    if not shared:
        raise LoraFastError(
            f"{adapters[0].source} and {adapters[1].source} share no layer: the first has {few([*places[0]])}, the "
            f"second {few([*places[1]])}"
        )
    svds = [_svds(found, vectors=of == "update", device=device) for found in adapters]  # names what is not finite
    grids = {}
    for name in shared:
        bases = [
            _subspace(found.factors[place[name]], svd[place[name]], side, of, device)
            for found, svd, place in zip(adapters, svds, places)
        ]
        if bases[0].shape[0] != bases[1].shape[0]:
            raise LoraFastError(
                f"{name}: the {side} singular vectors of one have {bases[0].shape[0]} elements, of two "
                f"{bases[1].shape[0]}; compare adapters of one base model"
            )
        squares = (bases[0][:, :i].mT @ bases[1][:, :j].to(bases[0].device)).square().cpu()
        rows, columns = (torch.arange(1, n + 1, dtype=torch.float64) for n in squares.shape)
        grids[name] = squares.cumsum(0).cumsum(1) / torch.minimum(rows[:, None], columns)
    return grids


def _subspace(factors: Factors, svd: UpdateSvd, side: str, of: str, device: torch.device | str | None) -> Tensor:
    """Orthonormal singular vectors (length, count) of one side in descending order, zero beyond the numerical rank."""
    factor = (factors.lora_A if side == "right" else factors.lora_B).to(device)
    if of == "update":
        return svd.right(factor) if side == "right" else svd.left(factor)
    u, s, _ = torch.linalg.svd((factor.mT if side == "right" else factor).double(), full_matrices=False)
    return torch.where(s > max(factor.shape) * torch.finfo(torch.float64).eps * s[:1], u, 0.0)


@torch.no_grad()
def amplification_factor(
    adapter: str | os.PathLike | nn.Module,
    base: str | os.PathLike | nn.Module,
    r: int | None = None,
    *,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Amplification]:
    """‖ΔW‖_F / ‖UᵀWV‖_F for every layer, U and V the top r singular vectors of ΔW (all by default): by how much the
    update amplifies the directions that it acts on over what the base weight does with them.

    base: as for `adapter_spectra`; each weight is read once, a panel at a time, and progress(done, total) is told of
    weights. Table 7 of the paper has 6.91 / 0.32 =
    21.5 at r = 4 and 3.57 / 1.90 = 1.9 at r = 64, for one layer of GPT-3.
    Source: Hu et al. 2021, arXiv:2106.09685, section 7.3."""
    _check_count(r, "r")
    found = read_updates(adapter, check_finite=False)
    weights = base_weights(base, found)
    svds = _svds(found, vectors=True, device=device)
    amplifications = {}
    for done, ((name, lora_A, lora_B, _), svd) in enumerate(zip(found.factors, svds), 1):
        u, v = svd.left(lora_B.to(device), r), svd.right(lora_A.to(device), r)
        weight = weights[name]
        if weight.transposed:  # UᵀWV and its transpose VᵀWᵀU have one norm
            u, v = v, u
        projected = u.new_zeros(u.shape[1], v.shape[1])
        norms = []
        for start, panel in weight.panels(u.device):
            projected += u[start : start + len(panel)].mT @ (panel @ v)
            norms.append(float(torch.linalg.matrix_norm(panel)))
        update_norm = float(torch.linalg.vector_norm(svd.S))
        projected_norm = float(torch.linalg.matrix_norm(projected))
        factor = update_norm / projected_norm if update_norm and projected_norm else None
        amplifications[name] = Amplification(factor, update_norm, projected_norm, math.hypot(*norms))
        if progress is not None:
            progress(done, len(svds))
    return amplifications


@torch.no_grad()
def intruder_dimensions(
    adapter: str | os.PathLike | nn.Module,
    base: str | os.PathLike | nn.Module,
    k: int = 10,
    threshold: float = 0.5,
    *,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, IntruderDimensions]:
    """Which of the top k left singular vectors yⱼ of W + ΔW are unlike every xᵢ of W: max_i |cos(yⱼ, xᵢ)| < threshold.
    They go with forgetting of what the base model could. k and threshold are those of the paper and of PEFT.

    base: as for `adapter_spectra`. xᵢ whose singular value is 0 (below √(max(N, K) ε) σ₁) are no particular vectors
    and are left out. Exact, by two eigendecompositions of Gram matrices on the short side min(N, K), in float64, where
    the definition has two full SVDs; 4096 × 4096 is work for a GPU (device="cuda").
    Source: Shuttleworth et al. 2024, arXiv:2410.21228."""
    _check_count(k, "k")
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise LoraFastError(f"threshold={threshold!r}; expected a cosine in [0, 1]")
    found = read_updates(adapter, check_finite=False)
    weights = base_weights(base, found)
    intruders = {}
    for done, (name, lora_A, lora_B, scaling) in enumerate(found.factors, 1):
        a = lora_A.to(device, torch.float64)
        b = scaling * lora_B.to(device, torch.float64)
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise LoraFastError(f"{found.source}: {name} {DIVERGED}")
        cosines, values = _closest(weights[name].matrix(a.device), a, b, k)
        count = int((cosines < threshold).sum())
        intruders[name] = IntruderDimensions(count, tuple(cosines.tolist()), tuple(values.tolist()))
        if progress is not None:
            progress(done, len(found.factors))
    return intruders


def _closest(W: Tensor, a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """W (N, K), a (R, K), b (N, R), float64 → of the top k left singular vectors of W + b a: the largest |cos| to one
    of W, and the singular values."""
    floor = math.sqrt(max(W.shape) * torch.finfo(torch.float64).eps)
    if W.shape[0] <= W.shape[1]:
        # (W + ba)(W + ba)ᵀ = WWᵀ + P bᵀ + b Pᵀ + b (aaᵀ) bᵀ with P = W aᵀ: no second product of large matrices.
        gram, half = W @ W.mT, (W @ a.mT + 0.5 * b @ (a @ a.mT)) @ b.mT
    else:
        gram, half = W.mT @ W, a.mT @ (b.mT @ W + 0.5 * (b.mT @ b) @ a)
    energies, x = torch.linalg.eigh(gram)
    tuned, y = torch.linalg.eigh(gram + half + half.mT)
    values, y = tuned[-k:].flip(0).clamp_min(0).sqrt(), y[:, -k:].flip(1)
    sizes = energies.clamp_min(0).sqrt()
    known = sizes > floor * sizes[-1]
    if W.shape[0] <= W.shape[1]:
        overlaps = x.mT @ y
    else:
        # The eigenvectors are right singular vectors here: yⱼ = (W + ba) zⱼ / σⱼ, and xᵢᵀ = zᵢᵀ Wᵀ / σᵢ.
        left = W @ y + b @ (a @ y)
        left = left / torch.linalg.vector_norm(left, dim=0).clamp_min(torch.finfo(torch.float64).tiny)
        overlaps = (x.mT @ (W.mT @ left)) / torch.where(known, sizes, 1.0)[:, None]
    overlaps = torch.where(known[:, None], overlaps.abs(), 0.0)
    return overlaps.amax(0), values


def _check_count(value: int | None, name: str) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise LoraFastError(f"{name}={value!r}; expected a whole number of at least 1")
