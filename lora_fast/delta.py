"""Spectra of dense updates ΔW = tuned − base, streamed from two checkpoints matrix by matrix.

With P the matrix as it is read, (c, n) panels along its long side L, n = min(N, K):

    exact:  G = Σ PᵀP (n, n) float64, σ = √eigenvalues(G); floor √ε σ₁ = 1.5e-8 σ₁
    topk:   Q (n, q) spans [Mx, M²x, M³x], M = ΔWᵀΔW, x random (block Krylov); σ̂ = singular values of ΔW·Q ≤ σ, and
            R² = ‖ΔW‖_F² − ‖ΔW·Q‖_F² is exactly what Q misses: σᵢ² ≤ σ̂ᵢ² + R², and the first k with
            Σσ̂² ≥ q‖ΔW‖_F² is at least the true energy rank.

The subtraction is in float64. A product of two float64 numbers that came from bf16, fp16 or fp32 has to be accumulated
in float64 anyway, so it costs nothing more, and it is exact for 2-byte weights within 2⁴⁵ of each other and rounded to
1e-16 else, where one in bf16 is off by 1e-4 … 6e-4 of ΔW.
Sources: Halko, Martinsson, Tropp 2011, arXiv:0909.4061 (range finder); Musco and Musco 2015, arXiv:1504.05477."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_fast.checkpoint_pair import CheckpointPair
from lora_fast.config import LoraFastError
from lora_fast.spectrum import EPS, Spectrum

# Blocks of the Krylov basis, each as wide as the k asked for and these more. One pass over the matrix makes a block.
_DEPTH, _OVERSAMPLING = 3, 8
# Columns of the Gram matrix that one GEMM writes: of the other triangle only what lies in the blocks of the diagonal.
_BLOCK = 1024
# The certificate speaks of singular values above this share of the largest.
_SMALLEST = 1e-6


@dataclass
class _Sums:
    """What one reading of a matrix adds up beside its Gram matrix. Squared norms of ΔW and of W; of the squared ulps of
    the stored tuned weights, the largest sum over a line of the long side and the sums over those of the short side."""

    dtype: torch.dtype
    update: float = 0.0
    base: float = 0.0
    longest: float = 0.0
    short: Tensor | float = field(default=0.0, repr=False)

    def add(self, base: Tensor, tuned: Tensor, delta: Tensor) -> None:
        self.update += float(delta.square().sum())
        self.base += float(base.square().sum())
        ulps = _squared_ulps(tuned, self.dtype)
        touched = (delta != 0).any(1).double()
        self.longest = max(self.longest, float((ulps.sum(1) * touched).max()))
        self.short = self.short + touched @ ulps

    def noise_std(self, shape: tuple[int, int]) -> float:
        """The standard deviation of noise alike in all elements of an N × K matrix whose largest singular value is that
        of the rounding of the stored weights.

        The base is the reference and exact; tuned = round(W + ΔW), so rounding gives each element of tuned − base an
        error uniform in ±ulp/2, of variance v = ulp²/12, ulp being that of the stored number. Where v differs among
        elements, the largest singular value of such noise is at most √max_i Σ_j v_ij + √max_j Σ_i v_ij (for large
        matrices), which is σ_n (√N + √K) where they are all alike; the σ_n with that value is returned. The plain mean
        of v is too little: rows of large weights make singular values above its edge.
        A single element without a difference has rounded too, often from the other side; but a line (of the long side)
        without any was not trained, as that of a token that never came, and carries no noise.
        Source: Bandeira and van Handel, Ann. Probab. 44 (2016), arXiv:1408.6185."""
        if self.update == 0:
            return 0.0
        edge = math.sqrt(self.longest / 12) + math.sqrt(float(self.short.max()) / 12)
        return edge / sum(map(math.sqrt, shape))


def _squared_ulps(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """(distance to the next larger number of `dtype`)² of float64 numbers that `dtype` holds."""
    info = torch.finfo(dtype)
    power = (stored.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)  # 2^⌊log₂|x|⌋, of 0 too: 0
    return (power.clamp_min(info.smallest_normal) * info.eps).square()


def _check_finite(pair: CheckpointPair, name: str, sums: _Sums) -> None:
    if not math.isfinite(sums.update + sums.base):
        raise LoraFastError(pair.non_finite(name) or f"{name}: the weights are too large to be squared in float64")


def _gram(pair: CheckpointPair, name: str, device: torch.device | str | None) -> tuple[Tensor, _Sums]:
    """The lower triangle of ΔWᵀΔW (n, n), on the short side, and the sums; what lies above it is not set."""
    n = min(pair.shape(name))
    gram = torch.zeros(n, n, dtype=torch.float64, device=device)
    sums = _Sums(pair.dtype(name))
    for base, tuned in pair.panels(name, device):
        delta = tuned - base
        sums.add(base, tuned, delta)
        for start in range(0, n, _BLOCK):
            end = start + _BLOCK
            gram[start:end, :end].addmm_(delta[:, start:end].T, delta[:, :end])
    _check_finite(pair, name, sums)
    return gram, sums


def _krylov(
    pair: CheckpointPair, name: str, k: int, seed: int, device: torch.device | str | None
) -> tuple[Tensor, Tensor, _Sums]:
    """σ̂ (q,) descending, the vectors (n, q) of the short side that belong to them, and the sums."""
    n, width = min(pair.shape(name)), k + _OVERSAMPLING
    sums = _Sums(pair.dtype(name))
    # Drawn on the CPU and anew for each matrix: the same on every device, in every order.
    block = torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(device)
    basis = block[:, :0]
    for depth in range(_DEPTH):
        image = torch.zeros_like(block)
        for base, tuned in pair.panels(name, device):
            delta = tuned - base
            if depth == 0:
                sums.add(base, tuned, delta)
            image.addmm_(delta.T, delta @ block)
        _check_finite(pair, name, sums)
        if sums.update == 0:
            return block.new_zeros(width), torch.eye(n, width, dtype=torch.float64, device=device), sums
        # The columns that are orthonormal already stay what they are, but for signs.
        basis = torch.linalg.qr(torch.cat([basis, image], dim=1))[0]
        block = basis[:, -width:]
    core = basis.new_zeros(basis.shape[1], basis.shape[1])
    for base, tuned in pair.panels(name, device):
        image = (tuned - base) @ basis
        core.addmm_(image.T, image)
    squares, vectors = torch.linalg.eigh(core)
    return squares.flip(0).clamp_min(0).sqrt(), basis @ vectors.flip(1), sums


def _is_small(n: int, k: int) -> bool:
    """Whether the Krylov basis would span all of the short side, or nearly: the exact way is then the cheaper one."""
    return 2 * _DEPTH * (k + _OVERSAMPLING) >= n


def _rounding(shape: tuple[int, int], energy: float, top: float) -> float:
    """What float64 can have changed in a square σ²: √L ε ‖ΔW‖_F² from the sums of L products and √n ε σ₁² from the
    eigenvalues. Probabilistic bounds; the worst case has L and n for their roots. Source: Higham and Mary, SIAM J. Sci.
    Comput. 41 (2019)."""
    return EPS * (math.sqrt(max(shape)) * energy + math.sqrt(min(shape)) * top**2)


def _spectrum(
    pair: CheckpointPair, name: str, S: Tensor, sums: _Sums, missed: float, method: str, k: int | None = None
) -> Spectrum:
    """missed: R², what the basis does not hold. k: how many of S to keep."""
    S = S.cpu()
    kept = S[:k]
    top = float(S[0])
    error = missed + _rounding(pair.shape(name), sums.update, top)
    smallest = float(kept[kept > _SMALLEST * top].min()) if top else 1.0
    # σ² ≤ σ̂² + error, for exact ones also σ² ≥ σ̂² − error
    certificate = math.sqrt(1 + error / smallest**2) - 1 if method == "topk" else error / smallest**2
    return Spectrum(
        name=name,
        singular_values=kept,
        shape=pair.shape(name),
        rank=None,
        scaling=None,
        frobenius_norm=math.sqrt(sums.update),
        certificate=certificate,
        status="ok",
        method=method,
        storage_dtype=pair.dtype(name),
        weight_norm=math.sqrt(sums.base),
        noise_std=sums.noise_std(pair.shape(name)),
    )


@dataclass(frozen=True, eq=False)
class DenseSvd:
    """The largest k singular values and vectors of a dense update ΔW ≈ U diag(S) Vᵀ, float64 on the CPU.

    U (N, k) and V (K, k) have orthonormal columns; S (k,) descending. spectrum: of the whole update, as `delta_spectra`
    returns it; ‖ΔW − U diag(S) Vᵀ‖_F² = spectrum.frobenius_norm² − Σ S²."""

    U: Tensor
    S: Tensor
    V: Tensor
    spectrum: Spectrum


@torch.no_grad()
def dense_svd(
    pair: CheckpointPair,
    name: str,
    k: int | Callable[[Spectrum], int],
    *,
    device: torch.device | str | None = None,
    method: str = "exact",
    seed: int = 0,
) -> DenseSvd:
    """The SVD of one matrix of the pair, truncated to rank k, or to what k(spectrum) answers.

    Vectors of the short side are those of the Gram matrix (method "topk": of the Krylov basis); ΔW times them, streamed
    once more, gives the other side by QR, and the SVD of its small R makes both orthonormal and S the exact singular
    values of ΔW restricted to them. Needs 32 n² bytes of memory (n the short side) with method "exact".
    With method "topk" k is a number: the basis is built for it."""
    N, K = pair.shape(name)
    n = min(N, K)
    if method == "topk" and not isinstance(k, int):
        raise LoraFastError("k is a function; method='topk' builds its basis for a number k known before")
    if method == "topk" and not _is_small(n, k):
        S, vectors, sums = _krylov(pair, name, k, seed, device)
        missed = max(sums.update - float(S.square().sum()), 0.0)
        spectrum = _spectrum(pair, name, S, sums, missed, "topk", k)
    else:
        gram, sums = _gram(pair, name, device)
        squares, vectors = torch.linalg.eigh(gram)
        del gram
        S, vectors = squares.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
        spectrum = _spectrum(pair, name, S if sums.update else torch.zeros_like(S), sums, 0.0, "exact")
        k = min(k if isinstance(k, int) else k(spectrum), n)
    vectors = vectors[:, :k]
    image = torch.cat([(tuned - base) @ vectors for base, tuned in pair.panels(name, device)])
    Q, R = torch.linalg.qr(image)
    left, S, right = torch.linalg.svd(R)
    long, short = Q @ left, vectors @ right.mT
    U, V = (long, short) if N >= K else (short, long)
    return DenseSvd(U.cpu(), S.cpu(), V.cpu(), spectrum)
