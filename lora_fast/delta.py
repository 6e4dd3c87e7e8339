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

import atexit
import heapq
import math
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from lora_fast.checkpoint_pair import PANEL, CheckpointPair
from lora_fast.config import LoraFastError
from lora_fast.spectrum import EPS, Spectrum

# Blocks of the Krylov basis, each as wide as the k asked for and these more. One pass over the matrix makes a block.
_DEPTH, _OVERSAMPLING = 3, 8
# Columns of the Gram matrix that one GEMM writes: of the other triangle only what lies in the blocks of the diagonal.
_BLOCK = 1024
# The certificate speaks of singular values above this share of the largest.
_SMALLEST = 1e-6
# Host memory that the matrices in work at one time may take, those that lie on disk and are mapped counted too.
_HOST_BYTES = 10**9
# float64 panels to allow for, 134 MB: base, tuned, ΔW and the ulps, and what the allocator keeps of earlier ones (up to
# 12 in all were seen).
_PANELS = 16


class _Sums(NamedTuple):
    """What one reading of a matrix gives beside its Gram matrix: ‖ΔW‖_F², ‖W‖_F² of the base, and the largest singular
    value that the rounding of the stored weights can be expected to have."""

    update: float
    base: float
    noise_edge: float


class _Accumulator:
    """Adds up _Sums over panels; on the device, so that a GPU is not waited for at each of them.

    Rounding noise: the base is the reference and exact; tuned = round(W + ΔW), so rounding gives each element of
    tuned − base an error uniform in ±ulp/2, of variance v = ulp²/12, ulp being that of the stored number. Of a base
    with more digits than the tuned weights, v is twice that: training may have begun with rounding it. The largest
    singular value of such noise is at most √max_i Σ_j v_ij + √max_j Σ_i v_ij (for large matrices), which is
    σ_n (√N + √K) where all elements are alike. The mean of v alone would be too little for weights whose rows differ in
    size: those of large ones make singular values above the edge that it gives.
    An element without a difference has rounded like others, back to where it was. But a line (along the short side)
    without any was not trained, like the row of a token that never came, and carries no noise.
    Source: Bandeira and van Handel, Ann. Probab. 44 (2016), arXiv:1408.6185."""

    def __init__(self, pair: CheckpointPair, name: str, device: torch.device | str | None) -> None:
        n = min(pair.shape(name))
        self._dtype = pair.dtype(name)
        self._roundings = 2 if torch.finfo(pair.base_dtype(name)).eps < torch.finfo(self._dtype).eps else 1
        self._squares = torch.zeros(2, dtype=torch.float64, device=device)
        self._largest_line = torch.zeros((), dtype=torch.float64, device=device)
        self._columns = torch.zeros(n, dtype=torch.float64, device=device)

    def add(self, base: Tensor, tuned: Tensor, delta: Tensor) -> None:
        self._squares += torch.stack([torch.linalg.vector_norm(delta), torch.linalg.vector_norm(base)]).square()
        ulps = _squared_ulps(tuned, self._dtype)
        touched = (delta != 0).any(1).double()
        self._largest_line = torch.maximum(self._largest_line, (ulps.sum(1) * touched).max())
        self._columns += touched @ ulps

    def sums(self) -> _Sums:
        edge = self._largest_line.sqrt() + self._columns.max().sqrt()
        return _Sums(*self._squares.tolist(), float(edge) * math.sqrt(self._roundings / 12))


def _squared_ulps(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """(distance to the next larger number of `dtype`)² of float64 numbers that `dtype` holds."""
    info = torch.finfo(dtype)
    power = (stored.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)  # 2^⌊log₂|x|⌋, of 0 too: 0
    return power.clamp_min_(info.smallest_normal).mul_(info.eps).square_()


def _checked(pair: CheckpointPair, name: str, sums: _Sums) -> _Sums:
    if not math.isfinite(sums.update + sums.base):
        raise LoraFastError(pair.non_finite(name) or f"{name}: the weights are too large to be squared in float64")
    return sums


def _gram(pair: CheckpointPair, name: str, device: torch.device | str | None) -> tuple[Tensor, _Sums]:
    """The lower triangle of ΔWᵀΔW (n, n), on the short side, and the sums; what lies above it is not set."""
    n = min(pair.shape(name))
    gram = torch.zeros(n, n, dtype=torch.float64, device=device)
    accumulator = _Accumulator(pair, name, device)
    for base, tuned in pair.panels(name, device):
        delta = tuned - base
        accumulator.add(base, tuned, delta)
        for start in range(0, n, _BLOCK):
            end = start + _BLOCK
            gram[start:end, :end].addmm_(delta[:, start:end].T, delta[:, :end])
        del base, tuned, delta  # or they would be there until after the next ones are read
    return gram, _checked(pair, name, accumulator.sums())


def _krylov(
    pair: CheckpointPair, name: str, k: int, seed: int, device: torch.device | str | None
) -> tuple[Tensor, Tensor, _Sums]:
    """σ̂ (q,) descending, the vectors (n, q) of the short side that belong to them, and the sums."""
    n, width = min(pair.shape(name)), k + _OVERSAMPLING
    accumulator = _Accumulator(pair, name, device)
    # Drawn on the CPU and anew for each matrix: the same on every device, in every order.
    block = torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(device)
    basis = block[:, :0]
    for depth in range(_DEPTH):
        image = torch.zeros_like(block)
        for base, tuned in pair.panels(name, device):
            delta = tuned - base
            if depth == 0:
                accumulator.add(base, tuned, delta)
            image.addmm_(delta.T, delta @ block)
            del base, tuned, delta
        if depth == 0:
            sums = _checked(pair, name, accumulator.sums())
        # The columns that are orthonormal already stay what they are, but for signs.
        basis = torch.linalg.qr(torch.cat([basis, image], dim=1))[0]
        block = basis[:, -width:]
    core = basis.new_zeros(basis.shape[1], basis.shape[1])
    for base, tuned in pair.panels(name, device):
        image = (tuned - base) @ basis
        core.addmm_(image.T, image)
    squares, vectors = torch.linalg.eigh(core)
    return _square_roots(squares, sums), basis @ vectors.flip(1), sums


def _square_roots(eigenvalues: Tensor, sums: _Sums) -> Tensor:
    """Descending, of ascending eigenvalues that rounding can have made negative; exact zeros of a zero update."""
    return eigenvalues.flip(0).clamp_min(0).sqrt() if sums.update else torch.zeros_like(eigenvalues)


def _is_small(n: int, k: int) -> bool:
    """Whether the Krylov basis would span all of the short side, or nearly: the exact way is then the cheaper one."""
    return 2 * _DEPTH * (k + _OVERSAMPLING) >= n


def _rounding(shape: tuple[int, int], energy: float, top: float) -> float:
    """What float64 can have changed in a square σ²: √L ε ‖ΔW‖_F² from the sums of L products and √n ε σ₁² from the
    eigenvalues. Probabilistic bounds; the worst case has L and n for their roots. Source: Higham and Mary, SIAM J. Sci.
    Comput. 41 (2019)."""
    return EPS * (math.sqrt(max(shape)) * energy + math.sqrt(min(shape)) * top**2)


def _spectrum(pair: CheckpointPair, name: str, S: Tensor, sums: _Sums, method: str, k: int | None = None) -> Spectrum:
    """S: all singular values that the basis holds, of which k are kept."""
    S = S.cpu()
    kept, top = S[:k], float(S[0])
    error = _rounding(pair.shape(name), sums.update, top)
    smallest = float(kept[kept > _SMALLEST * top].min()) if top else 1.0
    if method == "topk":
        missed = max(sums.update - float(S.square().sum()), 0.0) + error
        certificate = math.sqrt(1 + missed / smallest**2) - 1
    else:
        certificate = error / smallest**2
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
        noise_std=sums.noise_edge / sum(map(math.sqrt, pair.shape(name))),
    )


def delta_spectra(
    base: str | os.PathLike,
    tuned: str | os.PathLike,
    *,
    device: torch.device | str | None = None,
    method: str = "exact",
    k: int = 64,
    seed: int = 0,
    exclude: Collection[str] = (),
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Spectrum]:
    """The spectrum of tuned − base for every matrix that both checkpoints hold, keyed by module path.

    base, tuned: a safetensors file, or a folder with model.safetensors or with an index and its shards; which tensors
    are matrices, and what `exclude` leaves out, CheckpointPair says.
    method: "exact", all min(N, K) singular values; "topk", the k largest, as lower bounds, of a block Krylov basis that
    `seed` starts (matrices so small that it would not be cheaper are done exactly). ‖ΔW‖_F is exact with both.
    Spectrum.certificate bounds the relative error of every singular value above 1e-6 σ₁ that is given; with "topk" it
    is √(1 + R²/σ̂²) − 1 of the smallest one.
    Memory of the host, for a matrix with the short side n: 8 n² bytes and 134 MB beyond its two stored matrices, then
    16 n² and 134 MB without them: never more than 1 GB beyond them up to n = 8490. Matrices are in work at the same
    time only as far as 1 GB holds them all.
    device: where Gram matrices and eigenvalues are computed; a GPU without a number is the one of LOCAL_RANK.
    progress(done, total, name) is told of each matrix of this process.

    Under `torchrun --nproc-per-node=k`, or wherever torch.distributed is initialized, every rank has to call this; the
    matrices are spread over the ranks by cost, and each rank returns the whole, the same to the bit as one process
    does: a matrix is computed by one thread, since LAPACK's results depend on the number of threads. Across unlike
    processors or GPUs that does not hold.
    Raises LoraFastError (on every rank) where the checkpoints don't fit together, or hold NaN or inf."""
    if method not in ("exact", "topk"):
        raise LoraFastError(f"method={method!r}; expected 'exact' or 'topk'")
    if not isinstance(k, int) or k < 1:
        raise LoraFastError(f"k={k!r}; expected the number of singular values, at least 1")
    rank, ranks, device = _process(device)
    found: dict[str, Spectrum] = {}
    failure = None
    try:
        pair = CheckpointPair(base, tuned, exclude=exclude)
        own = _assigned({name: _cost(pair.shape(name), method, k) for name in pair.names}, ranks)[rank]
        found = _all_spectra(pair, own, method, k, seed, device, progress)
    except Exception as error:
        if ranks == 1:
            raise
        failure = error
    if ranks == 1:
        return {name: found[name] for name in pair.names}
    # A rank that failed takes part, or the others would wait for it until their time is out.
    parts: list = [None] * ranks
    distributed.all_gather_object(parts, (found, failure and f"{type(failure).__name__}: {failure}"))
    if failure is not None:
        raise failure
    for other, (_, message) in enumerate(parts):
        if message is not None:
            raise LoraFastError(f"rank {other} failed: {message}")
    found = {name: spectrum for part, _ in parts for name, spectrum in part.items()}
    return {name: found[name] for name in pair.names}


def _process(device: torch.device | str | None) -> tuple[int, int, torch.device]:
    """This process's rank, the number of ranks, and its device; joins torchrun's process group where nobody has."""
    device = torch.device(device or "cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if not distributed.is_available():
        return 0, 1, device
    joined = distributed.is_initialized()
    if not joined and (not distributed.is_torchelastic_launched() or os.environ.get("WORLD_SIZE") == "1"):
        return 0, 1, device
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the one that nccl gathers on
    if not joined:
        # A rank may wait for the largest matrix of another for longer than the 10 or 30 minutes that are the default.
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
        # Not before the end: a second call could not join the same group again.
        atexit.register(distributed.destroy_process_group)
    return distributed.get_rank(), distributed.get_world_size(), device


def _cost(shape: tuple[int, int], method: str, k: int) -> int:
    """Flops, those of the eigenvalues twice: half of them are products of a matrix and a vector, at half the speed."""
    L, n = max(shape), min(shape)
    if method == "topk" and not _is_small(n, k):
        width = k + _OVERSAMPLING
        return L * n * (4 * _DEPTH * width + 2 * _DEPTH * width)
    return L * n**2 + 8 * n**3 // 3


def _assigned(costs: dict[str, int], ranks: int) -> list[list[str]]:
    """The matrices of each rank: from the costliest down, each to the rank with the least so far (Graham's LPT, within
    4/3 of the best). Ties go by order, so that all ranks agree."""
    loads = [(0, rank) for rank in range(ranks)]
    assigned: list[list[str]] = [[] for _ in range(ranks)]
    for name in sorted(costs, key=lambda name: -costs[name]):
        load, rank = heapq.heappop(loads)
        assigned[rank].append(name)
        heapq.heappush(loads, (load + costs[name], rank))
    return assigned


def _all_spectra(
    pair: CheckpointPair,
    names: Sequence[str],
    method: str,
    k: int,
    seed: int,
    device: torch.device,
    progress: Callable[[int, int, str], None] | None,
) -> dict[str, Spectrum]:
    """One matrix to a thread, as many at a time as there are threads and _HOST_BYTES hold; on a GPU one at a time."""
    threads = torch.get_num_threads()
    workers = threads if device.type == "cpu" else 1
    found: dict[str, Spectrum] = {}
    running: dict[Future, str] = {}
    left = list(reversed(names))
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        while left or running:
            taken = sum(host_bytes(pair, name, method, k) for name in running.values())
            while left and len(running) < workers:
                taken += host_bytes(pair, left[-1], method, k)
                if running and taken > _HOST_BYTES:
                    break
                name = left.pop()
                running[pool.submit(_one_spectrum, pair, name, method, k, seed, device)] = name
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                name = running.pop(future)
                found[name] = future.result()
                if progress is not None:
                    progress(len(found), len(names), name)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what a thread sets is also what later threads start with
    return found


def host_bytes(pair: CheckpointPair, name: str, method: str, k: int) -> int:
    """The most host memory that one matrix takes on the CPU: panels, and either the pages of its stored weights with
    the Gram matrix or Krylov bases, or later the Gram matrix and LAPACK's copy of it."""
    N, K = pair.shape(name)
    n, stored, panels = min(N, K), pair.stored_bytes(name), 8 * _PANELS * min(PANEL, N * K)
    if method == "topk" and not _is_small(n, k):
        return stored + panels + 8 * 4 * n * _DEPTH * (k + _OVERSAMPLING)
    return panels + max(stored + 8 * n**2, 16 * n**2)


def _one_spectrum(pair: CheckpointPair, name: str, method: str, k: int, seed: int, device: torch.device) -> Spectrum:
    n = min(pair.shape(name))
    if method == "topk" and not _is_small(n, k):
        S, _, sums = _krylov(pair, name, k, seed, device)
        return _spectrum(pair, name, S, sums, "topk", k)
    gram, sums = _gram(pair, name, device)
    return _spectrum(pair, name, _square_roots(torch.linalg.eigvalsh(gram), sums), sums, "exact")


@dataclass(frozen=True, eq=False)
class DenseSvd:
    """The largest k singular values and vectors of a dense update ΔW ≈ U diag(S) Vᵀ, float64 on the CPU.

    U (N, k) and V (K, k) have orthonormal columns; S (k,) descending. spectrum: of the whole update, as `delta_spectra`
    returns it; ‖ΔW − U diag(S) Vᵀ‖_F² = spectrum.frobenius_norm² − Σ S²."""

    U: Tensor
    S: Tensor
    V: Tensor
    spectrum: Spectrum


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
        spectrum = _spectrum(pair, name, S, sums, "topk", k)
    else:
        gram, sums = _gram(pair, name, device)
        squares, vectors = torch.linalg.eigh(gram)
        del gram
        vectors = vectors.flip(1)
        spectrum = _spectrum(pair, name, _square_roots(squares, sums), sums, "exact")
        k = min(k if isinstance(k, int) else k(spectrum), n)
    vectors = vectors[:, :k]
    image = torch.cat([(tuned - base) @ vectors for base, tuned in pair.panels(name, device)])
    Q, R = torch.linalg.qr(image)
    left, S, right = torch.linalg.svd(R)
    long, short = Q @ left, vectors @ right.mT
    U, V = (long, short) if N >= K else (short, long)
    return DenseSvd(U.cpu(), S.cpu(), V.cpu(), spectrum)
