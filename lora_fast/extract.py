"""An adapter out of two checkpoints: the best low-rank approximation of what fine-tuning did to each linear layer.

ΔW = tuned − base (N, K), one matrix at a time, becomes the factors that lora_fast/resize.py describes. Where
checkpoints are stored in bf16, most directions of ΔW are the rounding of the stored weights: a true update of rank 8
and 0.3% of W's size seems to need rank 177 for 90% of its energy. Ranks are therefore picked, unless told otherwise,
from the singular values that rounding can't have made (Spectrum.corrected), while what is reported as kept is measured
against all of ‖ΔW‖_F², and noise_energy says which share of that lies below the noise. Energies are true to 1e-9; an
error below 1e-7 ‖ΔW‖_F, the root of what float64 leaves of a sum of squares, is not told from zero."""

import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_fast.checkpoint import write_adapter
from lora_fast.checkpoint_pair import CheckpointPair
from lora_fast.config import ALL_LINEAR, LoraConfig, LoraFastError
from lora_fast.delta import DenseSvd, delta_spectra, dense_svd
from lora_fast.resize import (
    NotCarried,
    ResizeReport,
    balanced_factors,
    check_dtype,
    output_folder,
    report_on,
    resized_layer,
    with_ranks,
)
from lora_fast.spectrum import Spectrum, ranks_for
from lora_fast.targets import embedding_of, saved_module_names
from lora_fast.targets import target_modules as find_targets

# Where the model is not known: names under which models keep what is no linear layer, and their heads.
NOT_LINEAR = re.compile(r"embed|norm|(^|[._])(ln|wte|wpe|shared|head|score|classifier)([._]|$)", re.IGNORECASE)
_CAUSAL_LM = ("ForCausalLM", "LMHeadModel")


class _Target(NamedTuple):
    """The linear layer whose weight a matrix of the checkpoints is: its path in the model, and whether the weight is
    stored (K, N), as by Conv1D."""

    path: str
    transposed: bool


@torch.no_grad()
def extract_adapter(
    base: str | os.PathLike,
    tuned: str | os.PathLike,
    out: str | os.PathLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    budget: int | None = None,
    scope: str = "layer",
    target_modules: str | Collection[str] | None = None,
    exclude: Collection[str] = (),
    save_others: bool = False,
    denoise: bool = True,
    method: str = "exact",
    k: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ResizeReport:
    """Writes into `out` a PEFT adapter of `base` that does what fine-tuning to `tuned` did to the linear layers, as
    well as the ranks that one of rank, energy, error and budget picks (see `lora_fast.spectrum.ranks_for`) can do it.

    base, tuned: safetensors files or folders, as `delta_spectra` takes them. Layers that did not change are left out.
    target_modules: as in LoraConfig; None: every linear layer but the output head. Which weights are linear layers
    says the model of base's config.json, built without weights by Transformers; without one, all matrices whose names
    are not those of embeddings, norms and heads are taken for weights of torch.nn.Linear.
    exclude: modules that are not to be read, such as one that a single checkpoint holds.
    save_others: what else changed (embeddings, norms, a head, biases) goes along whole, as PEFT's modules_to_save and
    bias; needs the model. Otherwise the report lists it, as not_carried.
    denoise: pick ranks from the singular values above the rounding noise of the stored weights. It covers rounding, not
    the optimizer's noise. energy and error then count against those alone, and a layer that has none is left out. With
    denoise=False they count against all of ΔW.
    method, k: "exact", or "topk": the k largest singular values, from a randomized basis.
    dtype: of the factors. device: where to compute. progress(done, total) is told of matrices.
    One matrix is in work at a time, 32 n² bytes for a short side n, beside the factors found so far; with
    scope="global" or a budget every matrix is read for its spectrum first, and again for its factors.
    Raises LoraFastError, with nothing written, for checkpoints that don't fit together or don't differ."""
    wanted = {"rank": rank, "energy": energy, "error": error, "budget": budget, "scope": scope}
    ranks_for([], **wanted)
    folder = output_folder(out)
    check_dtype(dtype)
    if method not in ("exact", "topk"):
        raise LoraFastError(f"method={method!r}; expected 'exact' or 'topk'")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise LoraFastError(f"k={k!r}; expected the number of singular values, at least 1")
    pair = CheckpointPair(base, tuned, exclude=exclude)
    model = _skeleton(Path(base))
    if save_others and model is None:
        raise LoraFastError(
            f"save_others=True: {base} has no config.json of a model that Transformers builds, so it is not known "
            "which modules the other tensors belong to; leave it out"
        )
    targets = _targets(pair, model, target_modules)

    def pick(spectra: Sequence[Spectrum]) -> list[int]:
        return ranks_for([s.corrected or s if denoise else s for s in spectra], **wanted)

    ranks, changed = None, False
    total = len(targets)
    if scope == "global" or budget is not None:
        total *= 2
        told = progress and (lambda done, _, name: progress(done, total))
        spectra = delta_spectra(
            base,
            tuned,
            device=device,
            method=method,
            k=k,
            exclude=[*exclude, *{pair.tensor(name) for name in pair.names if name not in targets}],
            progress=told,
        )
        spectra = {name: spectrum for name, spectrum in spectra.items() if spectrum.frobenius_norm > 0}
        ranks = dict.fromkeys(targets, 0) | dict(zip(spectra, pick(list(spectra.values()))))
        changed = bool(spectra)
    factors, layers = {}, []
    for done, (name, target) in enumerate(targets.items(), total - len(targets) + 1):
        svd, r = _truncated(pair, name, pick, None if ranks is None else ranks[name], method, k, device)
        changed = changed or (svd is not None and svd.spectrum.frobenius_norm > 0)
        if r > 0 and svd.spectrum.frobenius_norm > 0:
            U, V = (svd.V, svd.U) if target.transposed else (svd.U, svd.V)
            lora_A, lora_B, rounding_error = balanced_factors(U[:, :r], svd.S[:r], V[:, :r], dtype)
            factors |= {f"{target.path}.lora_A.weight": lora_A, f"{target.path}.lora_B.weight": lora_B}
            layer = resized_layer(svd.spectrum, None, r, rounding_error)
            shape = layer.shape[::-1] if target.transposed else layer.shape
            layers.append(replace(layer, name=target.path, shape=shape, noise_energy=_noise_energy(svd.spectrum)))
        if progress is not None:
            progress(done, total)
    if not layers:
        raise LoraFastError(
            f"base={str(base)!r} and tuned={str(tuned)!r} differ in none of their {len(targets)} linear layers"
            + (" by more than the rounding of the stored weights; denoise=False takes that too" if changed else "")
        )
    carried = {layer.name for layer in layers}
    rest = _changed_besides(pair, {name for name, target in targets.items() if target.path in carried}, targets)
    in_targets = {pair.tensor(name) for name in targets}
    folder_of_base = base if Path(base).is_dir() else Path(base).parent
    config = LoraConfig(
        target_modules=_short_names(pair, model, carried),
        fan_in_fan_out=any(target.transposed for target in targets.values() if target.path in carried),
        task_type="CAUSAL_LM" if model is not None and type(model).__name__.endswith(_CAUSAL_LM) else None,
        base_model_name_or_path=str(folder_of_base),
    )
    if save_others:
        others = [entry.name for entry in rest if entry.name not in in_targets]
        config, saved = _with_others(pair, model, config, others, carried)
        factors |= saved
        rest = [entry for entry in rest if entry.name in in_targets]
    write_adapter(folder, with_ranks(config, {layer.name: layer.rank for layer in layers}), factors)
    return report_on(folder, layers, rest)


def _truncated(
    pair: CheckpointPair,
    name: str,
    pick: Callable[[Sequence[Spectrum]], list[int]],
    rank: int | None,
    method: str,
    k: int,
    device: torch.device | str | None,
) -> tuple[DenseSvd | None, int]:
    """The SVD of one matrix and its rank: `rank`, or else the one that is picked from its spectrum alone."""
    if rank == 0:
        return None, 0
    if method == "topk":
        svd = dense_svd(pair, name, k, device=device, method="topk")
        rank = pick([svd.spectrum])[0] if rank is None else rank
        if rank <= len(svd.S):
            return svd, rank
    # Also where "topk" did a small matrix exactly, and more than k are wanted of it.
    chosen = lambda spectrum: pick([spectrum])[0] if rank is None else rank  # noqa: E731
    svd = dense_svd(pair, name, chosen, device=device)
    return svd, pick([svd.spectrum])[0] if rank is None else rank


def _noise_energy(spectrum: Spectrum) -> float | None:
    if spectrum.corrected is None:
        return None
    return max(0.0, 1 - (spectrum.corrected.frobenius_norm / spectrum.frobenius_norm) ** 2)


# ---- Which weights are linear layers ---------------------------------------------------------------------------------


def _skeleton(checkpoint: Path) -> nn.Module | None:
    """The model of the checkpoint's config.json without weights, on the meta device; None where there is no such file,
    Transformers isn't installed, or it builds no model from it. No code of the checkpoint runs."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if not (folder / "config.json").is_file():
        return None
    try:
        import transformers
    except ImportError:
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config) if named is None else named(config)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, ImportError):
        return None


def _path_in(model: nn.Module, name: str) -> str | None:
    """The path in the model of a module of its checkpoint, which may be saved with or without the head's prefix."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    modules = dict(model.named_modules())
    return next((path for path in (name, prefix + name, name.removeprefix(prefix)) if path in modules), None)


def _targets(
    pair: CheckpointPair, model: nn.Module | None, target_modules: str | Collection[str] | None
) -> dict[str, _Target]:
    """{name in the pair: the linear layer} of every matrix that may be extracted. Raises LoraFastError for none."""
    wanted = LoraConfig(target_modules=ALL_LINEAR if target_modules is None else target_modules).target_modules
    found = {}
    if model is not None:
        linears = find_targets(model, LoraConfig(target_modules=wanted))
        if embedding := next((path for path, module in linears.items() if isinstance(module, nn.Embedding)), None):
            raise LoraFastError(
                f"target_modules: {embedding} is a torch.nn.Embedding, and only linear layers are extracted; leave it "
                "out, and save_others=True takes it along whole"
            )
        for name in pair.names:
            path = _path_in(model, name)
            if path in linears:
                found[name] = _Target(path, not isinstance(linears[path], nn.Linear))
    else:
        every = isinstance(wanted, str) and wanted.lower() == ALL_LINEAR
        for name in pair.names:
            if len(pair.shape(name)) != 2 or pair.tensor(name) != name + ".weight":
                continue
            if every:
                matches = NOT_LINEAR.search(name) is None
            elif isinstance(wanted, str):
                matches = re.fullmatch(wanted, name) is not None
            else:
                matches = any(name == entry or name.endswith("." + entry) for entry in wanted)
            if matches:
                found[name] = _Target(name, False)
    if not found:
        raise LoraFastError(
            f"target_modules={target_modules!r} means none of the {len(pair.names)} matrices of the checkpoints, such "
            f"as {', '.join(pair.names[:3])}; name linear layers among them"
        )
    return found


def _short_names(pair: CheckpointPair, model: nn.Module | None, carried: set[str]) -> list[str]:
    """target_modules: the last parts of the layers' names where these mean no other module, as servers expect."""
    everything = pair.names if model is None else [name for name, _ in model.named_modules()]
    ends = {path.rpartition(".")[2] for path in carried}
    if {name for name in everything if name.rpartition(".")[2] in ends} == carried:
        return sorted(ends)
    return sorted(carried)


# ---- What is no low-rank update --------------------------------------------------------------------------------------


def _changed_besides(pair: CheckpointPair, carried: set[str], targets: dict[str, _Target]) -> list[NotCarried]:
    """Every tensor that differs and is not among the matrices `carried`."""
    found: dict[str, NotCarried] = {}
    for name in pair.names:
        tensor = pair.tensor(name)
        if name in carried or not any(not torch.equal(base, tuned) for base, tuned in pair.panels(name)):
            continue
        if name in targets:
            reason = "its change is within the rounding of the stored weights"
        else:
            reason = "one of a stack of experts" if name.endswith("]") else "not among the target modules"
        N, K = pair.shape(name)
        before = found.get(tensor)
        found[tensor] = NotCarried(tensor, (N, K), N * K + (before.size if before else 0), reason)
    for tensor, shape in pair.skipped.items():
        if pair.differs(tensor):
            found[tensor] = NotCarried(tensor, shape, torch.Size(shape).numel(), "not a matrix")
    return list(found.values())


def _with_others(
    pair: CheckpointPair, model: nn.Module, config: LoraConfig, others: list[str], carried: set[str]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """`config` with modules_to_save and bias for all of the tensors `others`, and those modules' tensors as tuned.

    Raises LoraFastError for one that is no module's, and where modules_to_save would mean another module too."""
    tensor_of = {}  # {name in the model: name in the checkpoints}
    for tensor in (*(pair.tensor(name) for name in pair.names), *pair.skipped):
        owner, _, leaf = tensor.rpartition(".")
        path = _path_in(model, owner)
        if path is not None:
            tensor_of[f"{path}.{leaf}"] = tensor
    in_model = {tensor: name for name, tensor in tensor_of.items()}
    modules, biases = [], False
    for tensor in others:
        if tensor not in in_model:
            raise LoraFastError(f"save_others=True: {tensor} is no tensor of {type(model).__name__}; exclude it")
        owner, _, _ = in_model[tensor].rpartition(".")
        if owner in carried:
            biases = True
        else:
            modules.append(owner)
    # A head that is tied to the embedding, and so in no file, is a module of its own once the embedding is a copy.
    inputs, outputs = (
        next((n for n, m in model.named_modules() if m is embedding), None)
        for embedding in (embedding_of(model), embedding_of(model, "get_output_embeddings"))
    )
    if inputs in modules and outputs is not None and f"{outputs}.weight" not in tensor_of:
        modules.append(outputs)
        tensor_of[f"{outputs}.weight"] = tensor_of[f"{inputs}.weight"]
    modules = list(dict.fromkeys(modules))
    config = replace(config, modules_to_save=modules or None, bias="lora_only" if biases else "none")
    if modules and set(saved_module_names(model, config)) != set(modules):
        raise LoraFastError(
            f"save_others=True: modules_to_save={modules} means other modules too, by the ends of their names; exclude "
            "some of them"
        )
    saved = {}
    for path in modules:
        for leaf in model.get_submodule(path).state_dict():
            saved[f"{path}.{leaf}"] = pair.tuned(tensor_of[f"{path}.{leaf}"])
    for path in sorted(carried) if biases else ():
        if f"{path}.bias" in tensor_of:
            saved[f"{path}.base_layer.bias"] = pair.tuned(tensor_of[f"{path}.bias"])
    return config, saved
