"""Adapters written from the singular values and vectors of others: a smaller one from one, one from several.

Every layer's update ΔW (N, K) with singular values σ becomes its best approximation of rank k, ΔW_k = U_k Σ_k V_kᵀ
(Eckart, Young 1936), as balanced factors

    lora_B = U_k √Σ_k (N, k),   lora_A = √Σ_k V_kᵀ (k, K),   scaling exactly 1: lora_alpha = k, without rsLoRA,

ranks and alphas that differ among layers standing in rank_pattern and alpha_pattern under exact names. Balanced factors
lose least to the dtype that they are stored in. In training that goes on from them, a step of Adam moves ΔW by about
√(1 / s) of what it would in the same factors under a scaling s: after an adapter with s = 2, start from √2 times its
learning rate for the same step, though the best one has to be found again, for lora_A is no longer as large as at its
start.

Of a stack of experts every update is a matrix of its own, and all have one rank k, the parameter's, as PEFT stores
them. Where each layer has to meet a criterion by itself, so does each expert, and k is what the neediest of them needs.
A budget, or one threshold for all layers, takes a stack for one update with the singular values √(Σ_e σ_ei²): its rank
k costs E (N + K) k parameters and keeps Σ_{i≤k} Σ_e σ_ei².

What a layer keeps is measured against the whole of its spectrum: kept_energy = Σ_{i≤k} σ_i² / ‖ΔW‖_F², and
error = ‖ΔW − ΔW_k‖_F. What rounding the factors to their dtype adds is told apart, as rounding_error."""

import functools
import math
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_fast.adapter_updates import Place, nested, read_updates
from lora_fast.checkpoint import check_output_folder, read_adapter, write_adapter
from lora_fast.config import BASE_CHANGING_INITS, LoraConfig, LoraFastError, LoraFastWarning
from lora_fast.spectrum import Spectrum, kept_energy, ranks_for, truncation_error
from lora_fast.svd import UpdateSvd, update_svds

# Layers whose factors are in fp64 at a time: 0.5 GB at N = K = 8192 and R = 64.
_LAYERS_AT_A_TIME = 64
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ResizedLayer:
    """One layer of a written adapter, or one expert of a stack. Its shape is (N, K).

    old_rank: R of the factors it came from (their sum, of a merge); None, of two checkpoints. rank: k, as written.
    noise_energy: share of ‖ΔW‖_F² that lies below the noise of two stored checkpoints, where that was looked for.
    kept_energy: Σ_{i≤k} σ_i² / ‖ΔW‖_F² in [0, 1]; 1 of an update that is zero. error: ‖ΔW − ΔW_k‖_F.
    rounding_error: ‖ΔW_k − lora_B lora_A‖_F of the factors in the dtype in which they are written; to a few parts in a
    thousand, what was written is off ΔW by √(error² + rounding_error²). frobenius_norm: ‖ΔW‖_F."""

    name: str
    shape: tuple[int, int]
    old_rank: int | None
    rank: int
    kept_energy: float
    error: float
    rounding_error: float
    frobenius_norm: float
    noise_energy: float | None = None


class NotCarried(NamedTuple):
    """A tensor that differs between two checkpoints and that the adapter doesn't hold; size: its number of elements."""

    name: str
    shape: tuple[int, ...]
    size: int
    reason: str


@dataclass(frozen=True)
class ResizeReport:
    """What was written into `folder`: its layers, and their sums.

    parameters_before, parameters: Σ R (N + K) and Σ k (N + K); of two checkpoints, parameters_before is Σ N K.
    kept_energy: of all layers together, Σ Σ_{i≤k} σ_i² / Σ ‖ΔW‖_F². error, rounding_error: ‖·‖_F over all layers.
    not_carried: what differs between two checkpoints and is not in the adapter."""

    folder: str
    layers: tuple[ResizedLayer, ...]
    parameters_before: int
    parameters: int
    kept_energy: float
    error: float
    rounding_error: float
    not_carried: tuple[NotCarried, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, for JSON."""
        plain = asdict(self) | {"not_carried": [entry._asdict() for entry in self.not_carried]}
        for entry in (*plain["layers"], *plain["not_carried"]):
            entry["shape"] = list(entry["shape"])
        return plain | {"layers": list(plain["layers"])}


class _Update(NamedTuple):
    """ΔW of one layer as a sum of w · lora_B lora_A over `parts` (lora_A, lora_B, w), its place and the ends of its two
    keys in a PEFT file, and the sizes of its tensors there behind R: (K,) and (), but those of a convolution's channels
    and window."""

    name: str
    parts: tuple[tuple[Tensor, Tensor, float], ...]
    place: Place
    ends: tuple[str, str]
    tails: tuple[torch.Size, torch.Size]

    @property
    def keys(self) -> tuple[str, str]:
        return tuple(f"{self.place.path}.{end}" for end in self.ends)

    @property
    def is_parameter(self) -> bool:
        return self.place.target != self.place.path

    @property
    def kind(self) -> tuple:
        """What is the same in all adapters of one base."""
        return self.shape, self.ends, self.tails, self.place.target, self.place.experts

    def factors(self, device: torch.device | str | None) -> tuple[Tensor, Tensor, float]:
        """lora_A (R, K), lora_B (N, R) and scaling of the whole sum: of several parts, concatenated in fp64."""
        if len(self.parts) == 1:
            lora_A, lora_B, weight = self.parts[0]
            return lora_A.to(device), lora_B.to(device), weight
        lora_A = torch.cat([a.to(device).double() for a, _, _ in self.parts])
        lora_B = torch.cat([weight * b.to(device).double() for _, b, weight in self.parts], dim=1)
        return lora_A, lora_B, 1.0

    @property
    def rank(self) -> int:
        return sum(lora_A.shape[0] for lora_A, _, _ in self.parts)

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0][1].shape[0], self.parts[0][0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return functools.reduce(torch.promote_types, (factor.dtype for part in self.parts for factor in part[:2]))


@torch.no_grad()
def resize_adapter(
    adapter: str | os.PathLike,
    out: str | os.PathLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    budget: int | None = None,
    scope: str = "layer",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ResizeReport:
    """Writes the adapter of the PEFT folder `adapter` into `out` with smaller ranks: the best approximation of every
    update, picked against the whole of its spectrum by one of rank, energy, error and budget, as
    `lora_fast.spectrum.ranks_for` says.

    No layer grows, and none is left out: one whose update has fewer singular values above zero than asked for keeps
    those, and one that is zero keeps rank 1, its first row of lora_A beside a lora_B of zeros, so that it still trains.
    The experts of a stack keep one rank, as the top of this file says; those with fewer directions are filled up with
    zeros.
    modules_to_save, biases and all other tensors and fields are carried over. dtype: of the new factors, by default
    that of the old. device: where to compute. progress(done, total) is told of layers.
    `out` may be `adapter` itself, or hold another adapter: it is replaced as `save_adapter` says.
    Raises LoraFastError, with nothing written, for all that `read_adapter` and `adapter_factors` refuse, and for an
    adapter started with PiSSA or OLoRA, whose start depends on its rank."""
    wanted = {"rank": rank, "energy": energy, "error": error, "budget": budget, "scope": scope}
    ranks_for([], **wanted)  # refuses before anything is read
    folder = output_folder(out)
    check_dtype(dtype)
    config, tensors = _read(adapter)
    updates = _updates(adapter, tensors)
    factors, layers = _compressed(updates, wanted, dtype, device, progress)
    write_adapter(folder, with_ranks(config, _ranks_of_targets(updates, layers)), tensors | factors)
    return report_on(folder, layers)


@torch.no_grad()
def merge_adapters(
    adapters: Sequence[str | os.PathLike],
    weights: Sequence[float],
    out: str | os.PathLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    budget: int | None = None,
    scope: str = "layer",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ResizeReport:
    """Writes Σ weights_i · ΔW_i of several PEFT folders as one adapter into `out`.

    The sum is exact, by concatenation: lora_B = [w_1 s_1 B_1, w_2 s_2 B_2, …] (N, ΣR), lora_A = [A_1; A_2; …] (ΣR, K);
    its factors then lose what the SVD finds to be exactly zero, or, with one of rank, energy, error and budget, all but
    that, as in `resize_adapter`. No ΔW is formed. A layer that an adapter doesn't have counts as zero there. Fields
    other than ranks, alphas and targets are the first adapter's, but there is no dropout beside target_parameters;
    dtype: of the factors, by default the widest among the adapters'.
    Raises LoraFastError, with nothing written, for fewer weights than adapters or more, weights that are not finite,
    shapes of a layer that differ, bases that differ, and adapters with modules_to_save or biases, whose sum is not the
    sum of their changes."""
    wanted = {"rank": rank, "energy": energy, "error": error, "budget": budget, "scope": scope}
    exact = all(value is None for value in (rank, energy, error, budget))
    if not exact:
        ranks_for([], **wanted)
    folder = output_folder(out)
    check_dtype(dtype)
    if isinstance(adapters, (str, os.PathLike)) or not adapters:
        raise LoraFastError(f"adapters={adapters!r}; expected a list of adapter folders")
    if len(weights) != len(adapters):
        raise LoraFastError(f"{len(weights)} weights for {len(adapters)} adapters; give one weight for each")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise LoraFastError(f"weights={list(weights)!r}; expected finite numbers")
    configs, each = [], []
    for adapter in adapters:
        config, tensors = _read(adapter)
        updates = _updates(adapter, tensors)
        left_over = tensors.keys() - {key for update in updates for key in update.keys}
        left_over -= {f"{update.place.path}.base_layer.weight" for update in updates}  # the base's, which PEFT adds
        if left_over:
            raise LoraFastError(
                f"{adapter} holds {min(left_over)}, which is trained in full (modules_to_save or bias): adding such "
                "tensors with weights is not adding their changes; merge them into the base first"
            )
        configs.append(config)
        each.append(updates)
    _check_bases(adapters, configs)
    merged = _concatenated(adapters, each, weights)
    _warn_of_strangers(adapters, each)
    dtype = dtype or functools.reduce(torch.promote_types, (update.dtype for update in merged))
    factors, layers = _compressed(merged, None if exact else wanted, dtype, device, progress)
    config = _with_union_of_targets(configs, merged)
    write_adapter(folder, with_ranks(config, _ranks_of_targets(merged, layers)), factors)
    return report_on(folder, layers)


def output_folder(out: str | os.PathLike) -> Path:
    folder = Path(out).resolve()
    check_output_folder(folder)
    return folder


def check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in _DTYPES:
        raise LoraFastError(f"dtype={dtype!r}; expected one of {', '.join(map(str, _DTYPES))}")


def _read(adapter: str | os.PathLike) -> tuple[LoraConfig, dict[str, Tensor]]:
    if not isinstance(adapter, (str, os.PathLike)):
        raise LoraFastError(
            f"adapter is a {type(adapter).__name__}; expected a PEFT folder: write one with save_adapter first"
        )
    config, tensors = read_adapter(adapter, check_finite=False)  # adapter_factors does that
    if config.init_lora_weights in BASE_CHANGING_INITS:
        raise LoraFastError(
            f"{adapter}: init_lora_weights={config.init_lora_weights!r} changes the base weight by its rank each time "
            "it is loaded; load it and save_adapter(portable=True), which makes it an update of the original base"
        )
    return config, tensors


def _updates(adapter: str | os.PathLike, tensors: dict[str, Tensor]) -> list[_Update]:
    found = read_updates(adapter, check_finite=True)
    updates = []
    for name, lora_A, lora_B, scaling in found.factors:
        place, ends = found.places[name], ("lora_A.weight", "lora_B.weight")
        if f"{place.path}.{ends[0]}" not in tensors:
            ends = ("lora_embedding_A", "lora_embedding_B")
        tails = (tensors[f"{place.path}.{ends[0]}"].shape[1:], tensors[f"{place.path}.{ends[1]}"].shape[2:])
        updates.append(_Update(name, ((lora_A, lora_B, scaling),), place, ends, tails))
    return updates


def _concatenated(
    adapters: Sequence[str | os.PathLike], each: list[list[_Update]], weights: Sequence[float]
) -> list[_Update]:
    merged: dict[str, _Update] = {}
    firsts: dict[str, tuple[_Update, str | os.PathLike]] = {}
    for adapter, updates, weight in zip(adapters, each, weights):
        for update in updates:
            ((lora_A, lora_B, scaling),) = update.parts
            part = (lora_A, lora_B, weight * scaling)
            name = update.name.partition("[")[0]
            other, first = firsts.setdefault(name, (update, adapter))
            if other.kind != update.kind:
                raise LoraFastError(
                    f"{name} is {_sizes(other)} in {first} and {_sizes(update)} in {adapter}; adapters of one base "
                    "have the same shapes"
                )
            before = merged[update.name].parts if update.name in merged else ()
            merged[update.name] = update._replace(parts=(*before, part))
    return _nested_anew(list(merged.values()))


def _nested_anew(updates: list[_Update]) -> list[_Update]:
    """With the paths that parameters have in the file of an adapter of all of them."""
    owners: dict[str, set[str]] = {}
    for update in updates:
        if update.is_parameter:
            owner, _, leaf = update.place.target.rpartition(".")
            owners.setdefault(owner, set()).add(leaf)
    paths = {}
    for owner, leaves in owners.items():
        if (names := nested(owner, leaves)) is None:
            raise LoraFastError(
                f"the order in which {owner} declares {', '.join(sorted(leaves))} is not known, and the file of an "
                "adapter of all of them depends on it; merge adapters of the same parameters"
            )
        paths |= {name: path for path, name in names.items()}
    return [u._replace(place=u.place._replace(path=paths.get(u.place.target, u.place.path))) for u in updates]


def _warn_of_strangers(adapters: Sequence[str | os.PathLike], each: list[list[_Update]]) -> None:
    """Adapters of one base hardly ever have no layer in common: names that differ by a prefix look like this."""
    names = [{update.name for update in updates} for updates in each]
    for adapter, own, index in zip(adapters, names, range(len(names))):
        others = set().union(*names[:index], *names[index + 1 :])
        if len(adapters) > 1 and own and others and not own & others:
            warnings.warn(
                f"{adapter} shares no layer with the other adapters (it has {min(own)}, they have {min(others)}): each "
                "goes into the sum by itself; are they of one base?",
                LoraFastWarning,
                stacklevel=4,
            )


def _sizes(update: _Update) -> str:
    (N, K), window = update.shape, tuple(update.tails[0][1:])
    kind = "an embedding of " if "lora_embedding" in update.keys[0] else "a parameter of " * update.is_parameter
    stack = f"{update.place.experts} experts of " * (update.place.experts > 1)
    return f"{kind}{stack}(N, K) = ({N}, {K})" + (f" with a window {window}" if window else "")


def _check_bases(adapters: Sequence[str | os.PathLike], configs: list[LoraConfig]) -> None:
    bases = {config.base_model_name_or_path: adapter for adapter, config in zip(adapters, configs)}
    bases.pop(None, None)
    if len(bases) > 1:
        (one, first), (other, second) = list(bases.items())[:2]
        raise LoraFastError(
            f"{first} adapts {one!r} and {second} adapts {other!r}; updates of different bases have no sum: if these "
            "are one model under two names, write the same base_model_name_or_path into both adapter_config.json"
        )


def _compressed(
    updates: list[_Update],
    wanted: Mapping[str, Any] | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, Tensor], list[ResizedLayer]]:
    """{key: new factor} and the rows of a report; wanted: the criterion for the ranks, None: all that is not zero."""
    svds: list[UpdateSvd] = []
    for start in range(0, len(updates), _LAYERS_AT_A_TIME):
        chosen = [update.factors(device) for update in updates[start : start + _LAYERS_AT_A_TIME]]
        told = None if progress is None else lambda done, _, start=start: progress(start + done, len(updates))
        svds += update_svds(*zip(*chosen), vectors=True, progress=told)
    spectra = [_spectrum(update, svd) for update, svd in zip(updates, svds)]
    pieces: dict[str, list[Tensor]] = {}
    layers = []
    for update, svd, spectrum, k in zip(updates, svds, spectra, _ranks(updates, spectra, wanted)):
        lora_A, lora_B, _ = update.factors(device)
        new_A, new_B, rounding_error = balanced_factors(
            svd.left(lora_B, k), svd.S[:k], svd.right(lora_A, k), dtype or update.dtype
        )
        if svd.S[0] == 0:
            new_A = lora_A[:k].to(new_A.dtype)
        key_A, key_B = update.keys
        pieces.setdefault(key_A, []).append(new_A.reshape(k, *update.tails[0]).cpu())
        pieces.setdefault(key_B, []).append(new_B.reshape(*new_B.shape, *update.tails[1]).cpu())
        layers.append(resized_layer(spectrum, update.rank, k, rounding_error))
    tensors = {}
    for key_A, key_B in dict.fromkeys(update.keys for update in updates):
        a, b = pieces[key_A], pieces[key_B]
        # As PEFT stores a stack: lora_A (E k, K) expert by expert, lora_B (N, k E) rank by rank.
        tensors[key_A] = a[0] if len(a) == 1 else torch.cat(a)
        tensors[key_B] = b[0] if len(b) == 1 else torch.stack(b, 2).flatten(1)
    return tensors, layers


def _ranks(updates: list[_Update], spectra: list[Spectrum], wanted: Mapping[str, Any] | None) -> list[int]:
    """The rank of every update, one for all experts of a stack, as the top of this file says."""
    stacks: dict[str, list[int]] = {}
    for index, update in enumerate(updates):
        stacks.setdefault(update.place.path, []).append(index)
    if wanted is None or (wanted["scope"] == "layer" and wanted["budget"] is None):
        each = _nonzero_ranks(spectra) if wanted is None else ranks_for(spectra, **wanted)
        picked = [max(each[index] for index in members) for members in stacks.values()]
    else:
        picked = ranks_for([_joint([spectra[index] for index in members]) for members in stacks.values()], **wanted)
    of_stack = dict(zip(stacks, picked))
    return [of_stack[update.place.path] for update in updates]


def _nonzero_ranks(spectra: list[Spectrum]) -> list[int]:
    return [max(1, int((spectrum.singular_values > 0).sum())) for spectrum in spectra]


def _joint(spectra: list[Spectrum]) -> Spectrum:
    """Of one layer its spectrum; of the E experts of a stack that of one update with the values √(Σ_e σ_ei²), a rank of
    which costs E (N + K) parameters."""
    first, count = spectra[0], len(spectra)
    if count == 1:
        return first
    values = torch.linalg.vector_norm(torch.stack([spectrum.singular_values for spectrum in spectra]), dim=0)
    return replace(
        first,
        name=first.name.partition("[")[0],
        singular_values=values,
        shape=(count * first.shape[0], count * first.shape[1]),
        frobenius_norm=values.norm().item(),
    )


def _spectrum(update: _Update, svd: UpdateSvd) -> Spectrum:
    if svd.status == "not finite":
        raise LoraFastError(f"{update.name}: its update overflows; nothing can be kept of it")
    return Spectrum(
        name=update.name,
        singular_values=svd.S,
        shape=update.shape,
        rank=update.rank,
        scaling=update.parts[0][2] if len(update.parts) == 1 else 1.0,
        frobenius_norm=svd.S.norm().item(),
        certificate=svd.certificate,
        status=svd.status,
        method="factors",
        storage_dtype=update.dtype,
    )


def balanced_factors(U: Tensor, S: Tensor, V: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """lora_A = √Σ Vᵀ (k, K) and lora_B = U √Σ (N, k) in `dtype`, and the Frobenius norm of what rounding changed."""
    roots = S.sqrt().to(U.device)
    exact_A, exact_B = roots[:, None] * V.mT, U * roots
    lora_A, lora_B = exact_A.to(dtype), exact_B.to(dtype)
    if not (torch.isfinite(lora_A).all() and torch.isfinite(lora_B).all()):
        raise LoraFastError(
            f"the factors of an update with σ₁ = {float(S[0]):.1e} reach beyond {dtype}; write them in another dtype"
        )
    lost_A, lost_B = lora_A.double() - exact_A, lora_B.double() - exact_B
    # lora_B lora_A − U Σ Vᵀ = lost_B √Σ Vᵀ + lora_B lost_A, whose norm takes two Gram matrices of rank 2 k.
    left, right = torch.cat([lost_B, lora_B.double()], dim=1), torch.cat([exact_A, lost_A])
    squared = ((left.mT @ left) * (right @ right.mT)).sum()
    return lora_A, lora_B, math.sqrt(max(0.0, squared.item()))


def resized_layer(spectrum: Spectrum, old_rank: int | None, k: int, rounding_error: float) -> ResizedLayer:
    return ResizedLayer(
        name=spectrum.name,
        shape=spectrum.shape,
        old_rank=old_rank,
        rank=k,
        kept_energy=kept_energy(spectrum, k),
        error=truncation_error(spectrum, k),
        rounding_error=rounding_error,
        frobenius_norm=spectrum.frobenius_norm,
    )


def report_on(folder: Path, layers: list[ResizedLayer], not_carried: Collection[NotCarried] = ()) -> ResizeReport:
    total = math.fsum(layer.frobenius_norm**2 for layer in layers)
    kept = math.fsum(layer.kept_energy * layer.frobenius_norm**2 for layer in layers)
    sizes = [(layer, sum(layer.shape)) for layer in layers]
    return ResizeReport(
        folder=str(folder),
        layers=tuple(layers),
        parameters_before=sum(
            math.prod(layer.shape) if layer.old_rank is None else layer.old_rank * size for layer, size in sizes
        ),
        parameters=sum(layer.rank * size for layer, size in sizes),
        kept_energy=kept / total if total else 1.0,
        error=math.hypot(*(layer.error for layer in layers)),
        rounding_error=math.hypot(*(layer.rounding_error for layer in layers)),
        not_carried=tuple(not_carried),
    )


def _ranks_of_targets(updates: list[_Update], layers: list[ResizedLayer]) -> dict[str, int]:
    return {update.place.target: layer.rank for update, layer in zip(updates, layers)}


def with_ranks(config: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """`config` with these ranks ({path of a layer, or whole name of a parameter: rank}) and a scaling of 1 everywhere.
    r is the largest: servers size their buffers by it."""
    r = max(ranks.values())
    others = {"^" + re.escape(name): rank for name, rank in ranks.items() if rank != r}
    return replace(config, r=r, lora_alpha=r, use_rslora=False, rank_pattern=others, alpha_pattern=dict(others))


def _with_union_of_targets(configs: list[LoraConfig], merged: list[_Update]) -> LoraConfig:
    """The first config, with targets that mean every adapter's layers: what the configs share, else all their names."""
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
    first = replace(configs[0], fan_in_fan_out=any(config.fan_in_fan_out for config in configs))
    if all(getattr(config, field) == getattr(first, field) for config in configs for field in fields):
        return first
    parameters = list(dict.fromkeys(update.place.target for update in merged if update.is_parameter))
    return replace(
        first,
        target_modules=[update.name for update in merged if not update.is_parameter],
        target_parameters=parameters or None,
        lora_dropout=0.0 if parameters else first.lora_dropout,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )
