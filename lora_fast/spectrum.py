"""The spectrum of one update ΔW: the quantities that are read off its singular values, the choice of a rank to truncate
it to, and what its shape says about the rank that it was trained with.

σ₁ ≥ σ₂ ≥ … are the singular values of ΔW (N, K), float64; p = σ / Σσ; ‖ΔW‖_F² = Σσ². Every quantity of an update that
is zero (an adapter whose B never left its start) is 0 or None, never nan."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_fast.config import LoraFastError, few

EPS = torch.finfo(torch.float64).eps
METHODS = ("factors", "exact", "topk")
SCOPES = ("layer", "global")
# A share such as 0.9 is no binary fraction, and a sum of squares is rounded: a spectrum that keeps just that share
# counts as keeping it. Relative to the share that is dropped, so that a share of 1 drops nothing but zeros.
_SLACK = 1e-12


def kind_of(name: str) -> str:
    """The last part of a module's path that is not a number: "q_proj" of model.layers.0.self_attn.q_proj; of a stack of
    experts the last two, "experts.down_proj" of mlp.experts.down_proj[3]: a dense layer may have the same name."""
    path, stack, _ = name.partition("[")
    parts = [part for part in path.split(".") if not part.isdigit()]
    return ".".join(parts[-2 if stack else -1 :]) or name


class Gap(NamedTuple):
    """The largest ratio σᵢ / σᵢ₊₁, and i, the number of singular values above it."""

    ratio: float
    after: int


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of one update ΔW (N, K) and what is known beside them.

    name: module path in the base model. singular_values: float64 on the CPU, descending; all of them (min(R, N, K) of a
    product of factors, min(N, K) of a dense update), or the largest alone where method is "topk". shape: (N, K).
    rank, scaling: R and s of the factors; None for a dense update. frobenius_norm: ‖ΔW‖_F, of the whole update also
    where only the largest singular values are here. certificate: bound on the relative error of every σ > 1e-6 σ₁.
    status: as of the SVD. method: "factors", "exact" (dense, all σ) or "topk" (dense, the largest).
    storage_dtype: what the factors, or the weights whose difference this is, were stored in. weight_norm: ‖W‖_F of the
    base weight, where it was given. noise_std: standard deviation that the rounding of the stored weights gives one
    element of a dense update.
    Raises LoraFastError where the values are not finite, not descending, or negative."""

    name: str
    singular_values: Tensor
    shape: tuple[int, int]
    rank: int | None
    scaling: float | None
    frobenius_norm: float
    certificate: float
    status: str
    method: str
    storage_dtype: torch.dtype
    weight_norm: float | None = None
    noise_std: float | None = None

    def __post_init__(self) -> None:
        s = self.singular_values
        if s.dtype != torch.float64 or s.dim() != 1 or s.device.type != "cpu":
            raise LoraFastError(
                f"{self.name}: singular_values is {s.dtype} of shape {tuple(s.shape)} on {s.device}; expected one "
                "float64 vector on the CPU"
            )
        if self.method not in METHODS:
            raise LoraFastError(f"{self.name}: method={self.method!r}; expected one of {', '.join(METHODS)}")
        # One pass for all three: nan compares false, and an inf leads to a difference of inf or nan.
        if s.numel() and not (s[-1] >= 0 and torch.isfinite(s[0]) and bool((s[:-1] >= s[1:]).all())):
            raise LoraFastError(
                f"{self.name}: the singular values are not finite, descending and at least 0; does the update hold "
                "NaN or inf?"
            )

    @property
    def kind(self) -> str:
        return kind_of(self.name)

    @property
    def complete(self) -> bool:
        """Whether all singular values are here, and not the largest alone."""
        return self.method != "topk" or len(self.singular_values) >= min(self.shape)

    @property
    def spectral_norm(self) -> float:
        """‖ΔW‖₂ = σ₁."""
        return float(self.singular_values[0]) if len(self.singular_values) else 0.0

    @property
    def is_zero(self) -> bool:
        return self.spectral_norm == 0.0

    @cached_property
    def _unit(self) -> Tensor:
        """σ / σ₁, whose squares neither overflow nor vanish; zeros for a zero update."""
        return self.singular_values / self.spectral_norm if not self.is_zero else self.singular_values

    @cached_property
    def dropped_energies(self) -> Tensor:
        """Σ_{i>k} σᵢ² / σ₁² for k = 0 … count, float64: summed from the smallest, so that each is true to its own
        digits. Of a spectrum with the largest σ alone, the energy of the others (from ‖ΔW‖_F) is part of each."""
        squares = self._unit.square()
        rest = 0.0
        if not self.complete and not self.is_zero:
            rest = max((self.frobenius_norm / self.spectral_norm) ** 2 - float(squares.sum()), 0.0)
        tails = torch.cat([squares, squares.new_tensor([rest])])
        return tails.flip(0).cumsum(0).flip(0)

    @property
    def tolerance(self) -> float:
        """The size up to which a singular value can't be told from 0, relative to σ₁.

        Factors are known no better than they were stored. Rounding moves each element of B and A by a relative ε/√12 or
        so (ε of the storage dtype), independently, which moves a singular value of s·B·A by 0.4 ε σ₁ (1 + √(R/N)) at
        most: hence ε of the storage dtype. The usual max(N, K)·ε is for a matrix that was itself rounded to that dtype,
        in the worst case; for a 4096 × 4096 update stored in bf16 it would be 32 σ₁ and every rank 0. It stays as the
        floor of the arithmetic, with float64's ε: 1e-12 σ₁ at these sizes. Source: Golub and Van Loan, Matrix
        Computations, section 5.4.1 (numerical rank: the threshold follows the errors of the data).
        A dense update comes by the eigenvalues of its Gram matrix in float64, whose square root has the floor
        √(max(N, K) ε). The rounding of the stored weights is relative to W, not to ΔW: noise_std is for that."""
        arithmetic = max(self.shape) * EPS
        if self.method == "factors":
            return max(torch.finfo(self.storage_dtype).eps, arithmetic)
        return math.sqrt(arithmetic)

    @property
    def numerical_rank(self) -> int | None:
        """#{σ > tolerance · σ₁}: directions that are there at all. None where the largest σ alone are known and all are
        above it. Source: Golub and Van Loan, Matrix Computations, section 5.4.1."""
        count = int((self._unit > self.tolerance).sum())
        return count if self.complete or count < len(self.singular_values) else None

    @property
    def effective_rank(self) -> float | None:
        """exp(−Σ p ln p), p = σ/Σσ: 1 for one direction, k for k equal ones, 0 for a zero update. None where only the
        largest σ are known. Rounding noise in a dense update inflates it. Source: Roy and Vetterli, EUSIPCO 2007."""
        if not self.complete:
            return None
        return math.exp(_entropy(self._unit / self._unit.sum())) if not self.is_zero else 0.0

    @property
    def stable_rank(self) -> float:
        """‖ΔW‖_F² / σ₁², between 1 and the rank; 0 for a zero update. Source: Rudelson and Vershynin, J. ACM 54 (2007),
        arXiv:math/0503442."""
        return (self.frobenius_norm / self.spectral_norm) ** 2 if not self.is_zero else 0.0

    def energy_rank(self, q: float) -> int | None:
        """The smallest k with Σ_{i≤k} σᵢ² ≥ q ‖ΔW‖_F²: truncated to rank k, the update is off by √(1 − q) ‖ΔW‖_F at
        most, and no matrix of lower rank is that close. 0 for a zero update; None where the largest σ alone are known
        and they do not reach q. Source: Eckart and Young, Psychometrika 1 (1936)."""
        if not 0 < q <= 1:
            raise LoraFastError(f"q={q!r}; expected a share of the energy in (0, 1]")
        dropped = self.dropped_energies
        k = int((dropped > (1 - q) * (1 + _SLACK) * dropped[0]).sum())
        return k if k <= len(self.singular_values) else None

    @property
    def gap(self) -> Gap | None:
        """The largest σᵢ/σᵢ₊₁ and its i: where to cut with the least said about the choice. A σᵢ₊₁ within the tolerance
        counts as the tolerance, so that the ratio is finite. None for a zero update and for a single σ. Source: the
        wider the gap, the less a perturbation turns the subspace that is kept (Wedin, BIT 12, 1972)."""
        unit = self._unit
        if self.is_zero or len(unit) < 2:
            return None
        floored = unit.clamp_min(self.tolerance)
        ratios = floored[:-1] / floored[1:]
        place = int(ratios.argmax())
        return Gap(float(ratios[place]), place + 1)

    @property
    def relative_size(self) -> float | None:
        """‖ΔW‖_F / ‖W‖_F, or None where W was not given or is 0. Source: the definition of a relative perturbation."""
        return self.frobenius_norm / self.weight_norm if self.weight_norm else None

    @property
    def noise_edge(self) -> float | None:
        """σ_n (√N + √K): the largest singular value of noise of standard deviation σ_n alone, for large N and K; None
        where the noise is not known. Source: Marchenko and Pastur 1967; Geman, Ann. Probab. 8 (1980)."""
        return None if self.noise_std is None else self.noise_std * sum(map(math.sqrt, self.shape))

    @property
    def noise_threshold(self) -> float | None:
        """λ(β) √max(N, K) σ_n, β = min(N, K) / max(N, K), λ(β)² = 2(β+1) + 8β / (β+1 + √(β²+14β+1)): keeping what is
        above it and nothing else has the least squared error of all thresholds, in the limit of large matrices; 4/√3 √N
        σ_n where N = K, 15% above the noise's edge. None where the noise is not known. The noise is taken to be alike
        in all elements; rows of a larger scale than others round more and can reach above it. Source: Gavish and
        Donoho, IEEE Trans. Inf. Theory 60 (2014), arXiv:1305.5870."""
        if self.noise_std is None:
            return None
        beta = min(self.shape) / max(self.shape)
        lambda_ = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
        return lambda_ * math.sqrt(max(self.shape)) * self.noise_std

    @property
    def corrected_rank(self) -> int | None:
        """#{σ > noise_threshold}: the directions of a dense update that the rounding of the stored weights can't have
        made. None where the noise is not known, or where the largest σ alone are known and all are above it."""
        if self.noise_threshold is None:
            return None
        count = int((self.singular_values > self.noise_threshold).sum())
        return count if self.complete or count < len(self.singular_values) else None

    @cached_property
    def corrected(self) -> "Spectrum | None":
        """The spectrum of what stands above the noise, whose energy ranks, effective rank and norm then mean the update
        and not its rounding. None where corrected_rank is."""
        if self.corrected_rank is None:
            return None
        kept = self.singular_values[: self.corrected_rank]
        return replace(
            self,
            singular_values=kept,
            frobenius_norm=float(torch.linalg.vector_norm(kept)),
            method="exact",
            noise_std=None,
        )

    def to_dict(self, *, singular_values: bool = True) -> dict[str, Any]:
        """All of it for JSON: numbers are finite or None. singular_values=False leaves the list of them out."""
        gap, corrected = self.gap, self.corrected
        found = {
            "name": self.name,
            "shape": list(self.shape),
            "rank": self.rank,
            "scaling": self.scaling,
            "method": self.method,
            "status": self.status,
            "storage_dtype": str(self.storage_dtype).removeprefix("torch."),
            "certificate": self.certificate,
            "frobenius_norm": self.frobenius_norm,
            "spectral_norm": self.spectral_norm,
            "weight_norm": self.weight_norm,
            "relative_size": self.relative_size,
            **_ranks(self),
            "gap": None if gap is None else gap._asdict(),
            "noise_std": self.noise_std,
            "noise_edge": self.noise_edge,
            "noise_threshold": self.noise_threshold,
            "corrected_rank": self.corrected_rank,
            "corrected": None if corrected is None else _ranks(corrected),
        }
        if singular_values:
            found["singular_values"] = self.singular_values.tolist()
        finite = lambda value: value if not isinstance(value, float) or math.isfinite(value) else None  # noqa: E731
        return {key: finite(value) for key, value in found.items()}


def _ranks(spectrum: Spectrum) -> dict[str, float | None]:
    energy_ranks = {f"r{percent}": spectrum.energy_rank(percent / 100) for percent in (90, 95, 99)}
    return {
        "numerical_rank": spectrum.numerical_rank,
        "effective_rank": spectrum.effective_rank,
        "stable_rank": spectrum.stable_rank,
        **energy_ranks,
    }


def _entropy(p: Tensor) -> float:
    """−Σ p ln p, with 0 ln 0 = 0."""
    return -float(torch.special.xlogy(p, p).sum())


def kept_energy(spectrum: Spectrum, k: int) -> float:
    """Σ_{i≤k} σᵢ² / ‖ΔW‖_F², against the whole update: the share of its energy that rank k keeps, true to 1e-9. Of a
    zero update every rank keeps all of it: 1."""
    if k < 0 or (k > len(spectrum.singular_values) and not spectrum.complete):
        raise LoraFastError(
            f"k={k}; {spectrum.name} has {len(spectrum.singular_values)} computed singular values: expected 0 to that "
            "many, or compute more"
        )
    dropped = spectrum.dropped_energies
    if spectrum.is_zero:
        return 1.0
    return 1.0 - float(dropped[min(k, len(dropped) - 1)] / dropped[0])


def truncation_error(spectrum: Spectrum, k: int) -> float:
    """‖ΔW − ΔW_k‖_F = √Σ_{i>k} σᵢ², the distance to the nearest matrix of rank k."""
    dropped = spectrum.dropped_energies
    return spectrum.spectral_norm * math.sqrt(float(dropped[min(k, len(dropped) - 1)]))


def ranks_for(
    spectra: Sequence[Spectrum],
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    budget: int | None = None,
    scope: str = "layer",
    minimum: int = 1,
) -> list[int]:
    """The rank k to truncate each update to, by exactly one criterion, measured against the whole update.

    Of the singular values always the largest are kept, and none that is exactly 0. With scope="layer" each update
    meets the criterion by itself:
        rank: k = rank, or less where the update has fewer.
        energy: the smallest k that keeps this share of ‖ΔW‖_F², in (0, 1].
        error: the smallest k with ‖ΔW − ΔW_k‖_F ≤ error, an absolute size.
        budget: the one largest k for all updates with Σ k (N + K) ≤ budget trainable parameters.
    With scope="global" one threshold runs through the singular values of all updates:
        rank: the rank · len(spectra) largest are kept, so rank is the mean.
        energy: the fewest that keep this share of Σ ‖ΔW‖_F² over all updates.
        error: the fewest with √Σ ‖ΔW − ΔW_k‖_F² ≤ error over all updates.
        budget: by σ² / (N + K), the energy that a parameter buys, highest first, as long as one still fits; those of
            narrower updates may fit where a wide one no longer does. What is lost against the best choice of all is
            less than the energy of the first direction that did not fit: without it this is the greedy choice, which is
            the best for directions that could be split. The budget is never exceeded.
    minimum: each update keeps at least this many (its largest, counted before the others), since PEFT can't load rank
    0; with minimum=0 the caller leaves updates of rank 0 out of the adapter's target_modules.
    Raises LoraFastError where the criterion is not met by any ranks, or needs singular values that were not computed.
    Source: Eckart and Young 1936 (the largest are the best); arXiv:2604.27796 (one threshold for all layers)."""
    criteria = {"rank": rank, "energy": energy, "error": error, "budget": budget}
    given = [name for name, value in criteria.items() if value is not None]
    if len(given) != 1:
        raise LoraFastError(
            f"{' and '.join(given) or 'no criterion'} given; expected exactly one of rank, energy, error and budget"
        )
    if scope not in SCOPES:
        raise LoraFastError(f"scope={scope!r}; expected 'layer' or 'global'")
    _check_criterion(given[0], criteria[given[0]])
    if not _is_whole(minimum) or minimum < 0:
        raise LoraFastError(f"minimum={minimum!r}; expected a whole number of at least 0")
    if not spectra:
        return []
    if scope == "global":
        return _global_ranks(spectra, given[0], criteria[given[0]], minimum)
    if budget is not None:
        return _uniform_ranks(spectra, budget, minimum)
    ranks = []
    for spectrum in spectra:
        if rank is not None:
            k = min(rank, _count(spectrum)) if spectrum.complete or rank <= len(spectrum.singular_values) else None
        elif energy is not None:
            k = spectrum.energy_rank(energy)
        else:
            allowed = error * (1 + _SLACK)
            sizes = spectrum.dropped_energies.sqrt() * spectrum.spectral_norm
            k = int((sizes > allowed).sum())
            k = k if k <= len(spectrum.singular_values) else None
        if k is None:
            raise _too_few(spectrum, given[0], criteria[given[0]])
        ranks.append(max(k, min(minimum, len(spectrum.singular_values))))
    return ranks


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_criterion(name: str, value: float) -> None:
    if name in ("rank", "budget"):
        if not _is_whole(value) or value < 1:
            raise LoraFastError(f"{name}={value!r}; expected a whole number of at least 1")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise LoraFastError(f"{name}={value!r}; expected a number")
    elif name == "energy" and not 0 < value <= 1:
        raise LoraFastError(f"energy={value!r}; expected a share of the energy in (0, 1], such as 0.99")
    elif name == "error" and not 0 <= value < math.inf:
        raise LoraFastError(f"error={value!r}; expected ‖ΔW − ΔW_k‖_F, a finite number of at least 0")


def _count(spectrum: Spectrum) -> int:
    """The number of its computed singular values that are not exactly 0."""
    return int((spectrum.singular_values > 0).sum())


def _too_few(spectrum: Spectrum, name: str, value: float) -> LoraFastError:
    return LoraFastError(
        f"{name}={value!r} needs more of {spectrum.name} than its {len(spectrum.singular_values)} computed singular "
        f"values, which hold {kept_energy(spectrum, len(spectrum.singular_values)):.4f} of its energy; compute more of "
        "them (k), or all (method='exact')"
    )


def _least(spectra: Sequence[Spectrum], minimum: int) -> list[int]:
    return [min(minimum, len(spectrum.singular_values)) for spectrum in spectra]


def _check_affordable(spectra: Sequence[Spectrum], budget: int, minimum: int) -> None:
    needed = sum(k * sum(spectrum.shape) for k, spectrum in zip(_least(spectra, minimum), spectra))
    if needed > budget:
        raise LoraFastError(
            f"budget={budget} is below the {needed} parameters of rank {minimum} in each of {len(spectra)} updates; "
            "raise it, or leave layers out"
        )


def _uniform_ranks(spectra: Sequence[Spectrum], budget: int, minimum: int) -> list[int]:
    _check_affordable(spectra, budget, minimum)
    counts = [_count(spectrum) for spectrum in spectra]
    ranks = _least(spectra, minimum)
    for k in range(1, max(counts) + 1):
        wider = [max(least, min(k, count)) for least, count in zip(_least(spectra, minimum), counts)]
        if sum(r * sum(spectrum.shape) for r, spectrum in zip(wider, spectra)) > budget:
            return ranks
        for spectrum in spectra:
            if not spectrum.complete and k > len(spectrum.singular_values):
                raise _too_few(spectrum, "budget", budget)
        ranks = wider
    return ranks


class _Pool(NamedTuple):
    """The singular values of several updates in one order, highest first: `value` σ² (in units of the largest of all)
    or σ² per parameter, `energy` σ², `owner` the update's index."""

    value: Tensor
    energy: Tensor
    owner: Tensor


def _pool(spectra: Sequence[Spectrum], least: Sequence[int], unit: float, per_parameter: bool) -> _Pool:
    energies, owners, costs = [], [], []
    for index, (spectrum, first) in enumerate(zip(spectra, least)):
        energy = (spectrum.singular_values[first : max(first, _count(spectrum))] / unit).square()
        energies.append(energy)
        owners.append(torch.full(energy.shape, index))
        costs.append(torch.full(energy.shape, float(sum(spectrum.shape)), dtype=torch.float64))
    energy, owner, cost = torch.cat(energies), torch.cat(owners), torch.cat(costs)
    value = energy / cost if per_parameter else energy
    order = torch.sort(value, descending=True, stable=True).indices  # among equals, in the order of the updates
    return _Pool(value[order], energy[order], owner[order])


def _global_ranks(spectra: Sequence[Spectrum], name: str, wanted: float, minimum: int) -> list[int]:
    least = _least(spectra, minimum)
    unit = max(spectrum.spectral_norm for spectrum in spectra) or 1.0
    pool = _pool(spectra, least, unit, per_parameter=name == "budget")
    ranks = list(least)
    if name == "budget":
        _check_affordable(spectra, wanted, minimum)
        left = wanted - sum(k * sum(spectrum.shape) for k, spectrum in zip(ranks, spectra))
        chosen = []
        for place, owner in enumerate(pool.owner.tolist()):
            if (cost := sum(spectra[owner].shape)) <= left:
                left -= cost
                chosen.append(place)
    elif name == "rank":
        chosen = range(min(max(wanted * len(spectra) - sum(least), 0), len(pool.owner)))
    else:
        unknown = sum(float(s.dropped_energies[-1]) * (s.spectral_norm / unit) ** 2 for s in spectra)
        tails = torch.cat([pool.energy, pool.energy.new_tensor([unknown])]).flip(0).cumsum(0).flip(0)
        total = sum(float(s.dropped_energies[0]) * (s.spectral_norm / unit) ** 2 for s in spectra)
        allowed = (1 - wanted) * total if name == "energy" else (wanted / unit) ** 2
        count = int((tails > allowed * (1 + _SLACK)).sum())
        if count > len(pool.owner):
            raise _too_few(next(s for s in spectra if not s.complete), name, wanted)
        chosen = range(count)
    owners = pool.owner[list(chosen)].tolist()
    for owner in owners:
        ranks[owner] += 1
    last = {owner: place for place, owner in enumerate(owners)}
    for index, spectrum in enumerate(spectra):
        # Some of its values that were not computed may belong before ones of other updates that were chosen.
        exhausted = not spectrum.complete and ranks[index] == len(spectrum.singular_values)
        if exhausted and last.get(index, -1) < len(owners) - 1:
            raise _too_few(spectrum, name, wanted)
    return ranks


@dataclass(frozen=True)
class Reading:
    """What one rule says about the rank of one layer or of a group of them.

    group: a module's path, a kind of module ("q_proj"), or "all layers". rule: its name. verdict: "fits", "too large",
    "too small", "no update", "needs rank k" or "can't tell". sentence: the reading in words, with its figures. source:
    where the rule comes from, and which of its thresholds are ours."""

    group: str
    rule: str
    verdict: str
    sentence: str
    source: str


# "Large" is within a decade of σ₁: what stands out on the log plot that the guide asks to look at.
LARGE = 0.1
# Near its largest possible value, and no place to cut.
SATURATED, NO_GAP = 0.8, 2.0

_ENERGY_SOURCE = (
    "Eckart and Young 1936: no matrix of lower rank is closer. That half the parameters or less make it too large is "
    "ours: r is chosen among powers of two"
)
_GUIDE_SOURCE = (
    "the guide “如何选择秩 r?”, signal 3 (singular values of ΔW): fits: a few large ones, then fast decay; too large: "
    "the later ones are large too (noise); too small: only 1 or 2 large ones. A rule of thumb; that large means σ₁/10 "
    "or more, and later the second half, is ours. In one search over ranks (benchmarks/bench_one_run_rank.py) "
    "about as many were large as the rank that sufficed"
)
_SATURATION_SOURCE = (
    "our own heuristic, without a source: an effective rank of 0.8 r or more and no σ twice the next says that r "
    "limits the update; it contradicts the guide's rule on a flat spectrum. In one search over ranks "
    "(benchmarks/bench_one_run_rank.py) it found nothing wrong with four times the rank that sufficed"
)
_DEAD_SOURCE = "Golub and Van Loan, section 5.4.1: singular values within the rounding of the stored factors are zero"
_DENSE_SOURCE = (
    "energy rank (Eckart and Young 1936; used on full fine-tunes by Biderman et al., arXiv:2405.09673, who warn that a "
    "high rank found is not a high rank needed); rounding noise cut at Gavish and Donoho's threshold, arXiv:1305.5870"
)


def readings(spectra: Sequence[Spectrum]) -> list[Reading]:
    """What the spectra say about the rank, one Reading per rule: for all layers together, and for each kind of module
    where there are several. A single spectrum is read under its own name.

    The rules disagree on some spectra (a flat one above all), and each is given with its source: none decides."""
    if not spectra:
        return []
    if len(spectra) == 1:
        return _group_readings(spectra[0].name, spectra)
    found = _group_readings("all layers", spectra)
    kinds: dict[str, list[Spectrum]] = {}
    for spectrum in spectra:
        kinds.setdefault(spectrum.kind, []).append(spectrum)
    if len(kinds) > 1:
        for kind, members in kinds.items():
            found += _group_readings(kind, members)
    return found


def _group_readings(group: str, spectra: Sequence[Spectrum]) -> list[Reading]:
    found = []
    if zeros := [spectrum for spectrum in spectra if spectrum.is_zero]:
        names = few([spectrum.name for spectrum in zeros])
        sentence = f"{len(zeros)} of {len(spectra)} updates are exactly 0 ({names}): not trained"
        if any(spectrum.rank is not None for spectrum in zeros):
            sentence += ", or B is still as it started"
        found.append(Reading(group, "zero update", "no update", sentence, "definition: σ₁ = 0"))
    live = [spectrum for spectrum in spectra if not spectrum.is_zero]
    if dense := [spectrum for spectrum in live if spectrum.rank is None]:
        found.append(_dense_reading(group, dense))
    if adapters := [spectrum for spectrum in live if spectrum.rank is not None]:
        found += [rule(group, adapters) for rule in (_energy_reading, _guide_reading, _saturation_reading)]
        if dead := [s for s in adapters if s.numerical_rank < len(s.singular_values)]:
            fewest = min(dead, key=lambda s: s.numerical_rank)
            found.append(
                Reading(
                    group,
                    "dead directions",
                    "too large",
                    f"{len(dead)} of {len(adapters)} updates have fewer directions than their rank; {fewest.name} has "
                    f"{fewest.numerical_rank} of {fewest.rank}",
                    _DEAD_SOURCE,
                )
            )
    return found


def _rank_words(spectra: Sequence[Spectrum]) -> str:
    ranks = sorted({spectrum.rank for spectrum in spectra})
    return f"r={ranks[0]}" if len(ranks) == 1 else f"r={ranks[0]}…{ranks[-1]}"


def _majority(verdicts: Sequence[str]) -> tuple[str, str]:
    """The verdict of more than half the layers, else "can't tell"; and the count of each in words."""
    counts = Counter(verdicts).most_common()
    words = ", ".join(f"{verdict} in {count}" for verdict, count in counts) + f" of {len(verdicts)}"
    return (counts[0][0] if 2 * counts[0][1] > len(verdicts) else "can't tell"), words


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _energy_reading(group: str, spectra: Sequence[Spectrum]) -> Reading:
    ranks = [spectrum.energy_rank(0.99) for spectrum in spectra]
    needed = sum(max(k, 1) * sum(spectrum.shape) for k, spectrum in zip(ranks, spectra))
    share = needed / sum(spectrum.rank * sum(spectrum.shape) for spectrum in spectra)
    most, neediest = max(zip(ranks, (spectrum.name for spectrum in spectra)))
    verdict = "too large" if share <= 0.5 else "fits"
    words = f"rank {most} keeps 99% of the energy"
    if len(spectra) > 1:
        words += f" of every update ({neediest} needs it, the median one {_median(ranks)}), and a rank for each"
    sentence = f"{_rank_words(spectra)} {verdict.replace('too', 'is too')}: {words}, {share:.0%} of the parameters"
    return Reading(group, "energy", verdict, sentence, _ENERGY_SOURCE)


def _guide_reading(group: str, spectra: Sequence[Spectrum]) -> Reading:
    large = [int((spectrum.singular_values >= LARGE * spectrum.spectral_norm).sum()) for spectrum in spectra]
    verdicts = []
    for count, spectrum in zip(large, spectra):
        if spectrum.rank <= 2:
            verdicts.append("can't tell")  # one or two values have no tail
        elif count <= 2:
            verdicts.append("too small")
        else:
            verdicts.append("too large" if 2 * count > spectrum.rank else "fits")
    verdict, words = _majority(verdicts)
    typical = _median(large)
    sentence = (
        f"{typical} of the singular values {'at the median ' if len(spectra) > 1 else ''}"
        f"are σ₁/10 or more, at {_rank_words(spectra)}: {words}"
    )
    return Reading(group, "shape (guide)", verdict, sentence, _GUIDE_SOURCE)


def _saturation_reading(group: str, spectra: Sequence[Spectrum]) -> Reading:
    shares = [spectrum.effective_rank / spectrum.rank for spectrum in spectra]
    verdicts = []
    for share, spectrum in zip(shares, spectra):
        saturated = share >= SATURATED and (spectrum.gap is None or spectrum.gap.ratio < NO_GAP)
        # Of rank 1 the effective rank is 1 whatever was learned.
        verdicts.append("can't tell" if spectrum.rank == 1 else "too small" if saturated else "fits")
    verdict, words = _majority(verdicts)
    sentence = f"the effective rank is {_median(shares):.2f} r{' at the median' if len(spectra) > 1 else ''}: {words}"
    if verdict == "too small":
        sentence += f"; try r={2 * max(spectrum.rank for spectrum in spectra)}"
    return Reading(group, "saturation", verdict, sentence, _SATURATION_SOURCE)


def _dense_reading(group: str, spectra: Sequence[Spectrum]) -> Reading:
    ranks = [(spectrum.corrected or spectrum).energy_rank(0.9) for spectrum in spectra]
    above = sum(spectrum.corrected is not None for spectrum in spectra)
    noise = f"{above} of {len(spectra)} freed of rounding noise" if above else "rounding noise included"
    known = [rank for rank in ranks if rank is not None]
    if len(known) < len(ranks):
        sentence = (
            f"{len(ranks) - len(known)} of {len(ranks)} updates need more than the computed singular values for 90% of "
            f"their energy ({noise}); compute more of them"
        )
        return Reading(group, "r90 of a dense update", "can't tell", sentence, _DENSE_SOURCE)
    sentence = (
        f"a LoRA of rank {max(known)} can hold 90% of the energy of every update"
        + (f", of rank {_median(known)} of the median one" if len(known) > 1 else "")
        + f" ({noise})"
    )
    return Reading(group, "r90 of a dense update", f"needs rank {max(known)}", sentence, _DENSE_SOURCE)
