"""The updates ΔW = s·B·A of an adapter: their factors, read from a PEFT folder or out of a model."""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_fast.checkpoint import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from lora_fast.checkpoint_files import counting_order
from lora_fast.config import ALL_LINEAR, BASE_CHANGING_INITS, LoraConfig, LoraFastError, few, plain_name
from lora_fast.distributed import check_matrices, inside_wrapper
from lora_fast.experts import factors_by_expert
from lora_fast.injection import check_in_place, lora_layers, lora_state
from lora_fast.linear import whole
from lora_fast.parameter import LoraParameter

_NO_PRODUCT = (
    "it is DoRA, whose update is not scaling · lora_B lora_A; merge it into its base and compare the two "
    "(delta_spectra, or lora-fast svd --base BASE --tuned MERGED)"
)
# PEFT's values of init_lora_weights that leave the base weights as they are.
_STARTS_OF_FACTORS_ALONE = frozenset({"True", "False", "gaussian", "orthogonal", "eva"})
DIVERGED = "holds NaN or inf; the training run that wrote it diverged"
# The weights of a mixture's experts in the order in which all of Transformers' modules that stack them declare them.
_DECLARED = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")


class Factors(NamedTuple):
    """One update ΔW = scaling · lora_B lora_A: lora_A (R, K), lora_B (N, R), in the dtype and on the device that they
    have. Of a convolution, K = C_in · kh · kw. Of an embedding N is its width and K the vocabulary, and ΔW is the
    transpose of what is added to its weight. Each matrix of a stack of experts has one, named name[0] … name[E − 1]."""

    name: str
    lora_A: Tensor
    lora_B: Tensor
    scaling: float


class Place(NamedTuple):
    """Where a folder holds an update: the path that its two keys begin with; the name by which the config's patterns
    know it, a layer's path or a parameter's whole name; which of how many experts it is, 0 of 1 where it is no stack's.
    """

    path: str
    target: str
    expert: int
    experts: int


@dataclass(frozen=True)
class AdapterUpdates:
    """An adapter's updates; the layers whose base weight is stored as (K, N), and those of which that is not known;
    what a reader of spectra should know; of a folder, where each update is."""

    source: str
    factors: list[Factors]
    transposed: frozenset[str]
    note: str | None
    untold: frozenset[str] = frozenset()
    places: Mapping[str, Place] = field(default_factory=dict)


def adapter_factors(adapter: str | os.PathLike | nn.Module) -> list[Factors]:
    """The factors of every update that `adapter` makes, in its order.

    adapter: a PEFT folder, a model adapted by lora-fast (its active adapter), or one adapted by PEFT (likewise).
    Names are paths of modules in the base model; of one of target_parameters the parameter's, without ".weight", and
    behind it which expert of a stack: "mlp.gate", "mlp.experts.down_proj[3]".
    Weights that an adapter trains in full (modules_to_save) and biases are no s·B·A and are not listed.
    What the updates are relative to: the base weights; but an adapter that started with PiSSA or OLoRA took s·B₀·A₀ off
    them first, and a folder's s·B·A is relative to what was left. In a model adapted by lora-fast B₀ and A₀ are known:
    there such a layer gives [B, −B₀] and [A; A₀], of rank 2 R, relative to the original weights.
    Raises LoraFastError for what is no adapter, another method than plain LoRA (DoRA among them, by name), A without B,
    ranks that differ, NaN or inf, and for a folder from which it can't be known which parameters its target_parameters
    are."""
    found = read_updates(adapter, check_finite=True)
    if not isinstance(adapter, (str, os.PathLike)):
        for name, lora_A, lora_B, _ in found.factors:
            if not (torch.isfinite(lora_A).all() and torch.isfinite(lora_B).all()):
                raise LoraFastError(f"{found.source}: {name} {DIVERGED}")
    return found.factors


def read_updates(adapter: str | os.PathLike | nn.Module, *, check_finite: bool) -> AdapterUpdates:
    if isinstance(adapter, (str, os.PathLike)):
        return _from_folder(Path(adapter), check_finite)
    if not isinstance(adapter, nn.Module):
        raise LoraFastError(
            f"adapter is a {type(adapter).__name__}; expected a PEFT folder, or a model that carries an adapter"
        )
    while len(adapter._modules) == 1 and (inner := inside_wrapper(adapter)):
        adapter = getattr(adapter, inner)
    return _from_peft(adapter) if _carries_peft(adapter) else _from_model(adapter)


def _from_folder(folder: Path, check_finite: bool) -> AdapterUpdates:
    config, tensors = read_adapter(folder, check_finite=check_finite)
    if config.use_dora:
        raise LoraFastError(f"{folder / CONFIG_NAME}: use_dora=True; {_NO_PRODUCT}")
    source = str(folder / WEIGHTS_NAME)
    pairs: dict[str, dict[str, Tensor]] = {}
    embeddings, others = set(), []
    for key, value in tensors.items():
        path, _, rest = key.rpartition(".lora_")
        if rest in ("A.weight", "B.weight", "embedding_A", "embedding_B"):
            pairs.setdefault(path, {})[rest.removeprefix("embedding_")[0]] = value
            if rest.startswith("embedding"):
                embeddings.add(path)
        elif path:
            raise LoraFastError(
                f"{source}: {path} has a lora_{rest}"
                + (", so it is DoRA" if "magnitude" in rest else "")
                + "; its update is not scaling · lora_B lora_A, use PEFT for it"
            )
        elif not key.endswith(".base_layer.weight"):  # of an embedding PEFT keeps a copy along, as it was
            others.append(key)
    parameters = _parameters(source, config, pairs)
    factors, places = [], {}
    experts_of: dict[str, tuple[str, int]] = {}
    for path, pair in sorted(pairs.items(), key=lambda item: counting_order(parameters.get(item[0], item[0]))):
        target = parameters.get(path, path)
        both = _factors(source, target, pair.get("A"), pair.get("B"), config.scaling_of(target))
        experts = 1
        if path in parameters:
            experts = _experts(source, config, both)
            first, count = experts_of.setdefault(target.rpartition(".")[0], (target, experts))
            if experts != count:
                raise LoraFastError(
                    f"{source}: by the ranks in {CONFIG_NAME} (r, rank_pattern) {first} has {count} experts and "
                    f"{target} {experts}; correct the config"
                )
            both = both._replace(name=_layer_name(target))
        elif (rank := both.lora_A.shape[0]) != config.rank_of(path):
            raise LoraFastError(
                f"{source}: {path} has rank {rank}, {CONFIG_NAME} gives it {config.rank_of(path)} (r, rank_pattern): "
                "its scaling can't be known; correct the config"
            )
        for expert, factor in enumerate(_by_expert(both, experts)):
            factors.append(factor)
            places[factor.name] = Place(path, target, expert, experts)
    if not factors:
        raise LoraFastError(f"{source} holds no lora_A and lora_B; expected the weights of a LoRA adapter")
    untold = frozenset(name for name, place in places.items() if place.path in parameters)
    transposed = frozenset(places) - untold if config.fan_in_fan_out else frozenset(embeddings)
    notes = []
    if config.init_lora_weights in BASE_CHANGING_INITS:
        notes.append(_start_note(config.init_lora_weights))
    if others:
        notes.append(_others_note(others))
    return AdapterUpdates(source, factors, transposed, "; ".join(notes) or None, untold, places)


def _parameters(source: str, config: LoraConfig, pairs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """{path in the file: whole name} of the parameters that target_parameters means.

    The file has the path of the module that holds them alone, with a "base_layer" for each that is declared after it.
    Raises LoraFastError where that leaves open which parameter it is."""
    wanted = [entry.rpartition(".") for entry in config.target_parameters or ()]
    owners: dict[str, list[str]] = {}
    for path in pairs if wanted else ():
        owners.setdefault(re.sub(r"(\.base_layer)+$", "", path), []).append(path)
    found: dict[str, str] = {}
    for owner, paths in owners.items():
        named = {leaf for of, _, leaf in wanted if of and f".{owner}".endswith(f".{of}")}
        either = named | {leaf for of, _, leaf in wanted if not of}  # a bare name means such a parameter of any module
        if paths == [owner] and (not either or _is_layer(config, owner, bool(named))):
            continue
        leaves = next((leaves for leaves in (named, either) if len(leaves) == len(paths)), ())
        names = nested(owner, leaves) or {}
        if names.keys() != set(paths) or not _agree(names, pairs):
            raise LoraFastError(
                f"{source}: it can't be known from target_parameters={list(config.target_parameters)} which parameters "
                f"of {owner} have its {len(paths)} pairs of factors; load_adapter the folder into its model and give "
                "that model"
            )
        found |= names
    return found


def _is_layer(config: LoraConfig, path: str, named: bool) -> bool:
    """Whether target_modules means a path that the file has; named: whether target_parameters names parameters of it
    with the module's name."""
    wanted = config.target_modules
    if not isinstance(wanted, str):
        return any(f".{path}".endswith(f".{entry}") for entry in wanted or ())
    return not named if wanted.lower() == ALL_LINEAR else re.fullmatch(wanted, path) is not None


def nested(owner: str, leaves: Collection[str]) -> dict[str, str] | None:
    """{path in PEFT's file: whole name} of these parameters of one module, the first declared innermost; None where
    their order is not known."""
    if len(leaves) > 1 and not set(leaves) <= set(_DECLARED):
        return None
    outermost_first = sorted(leaves, key=_DECLARED.index, reverse=True) if len(leaves) > 1 else leaves
    return {owner + depth * ".base_layer": f"{owner}.{leaf}" for depth, leaf in enumerate(outermost_first)}


def _agree(names: Mapping[str, str], pairs: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether the factors of gate_up_proj (2 I, H) and down_proj (H, I) of one module have sizes that fit together."""
    paths = {name.rpartition(".")[2]: path for path, name in names.items()}
    if not {"gate_up_proj", "down_proj"} <= paths.keys():
        return True
    both = [pairs[paths[leaf]] for leaf in ("gate_up_proj", "down_proj")]
    if any(factor not in pair or pair[factor].dim() != 2 for pair in both for factor in "AB"):
        return True  # refused by name, later
    (N, K), (H, I) = ((pair["B"].shape[0], pair["A"].shape[1]) for pair in both)  # noqa: E741 - the model's width
    return N == 2 * I and K == H


def _experts(source: str, config: LoraConfig, both: Factors) -> int:
    """How many experts the factors of a whole parameter are of."""
    rows, rank = both.lora_A.shape[0], config.rank_of(both.name)
    if rows == 0 or rows % rank:
        raise LoraFastError(
            f"{source}: lora_A of {both.name} has {rows} rows, no multiple of the rank {rank} that {CONFIG_NAME} gives "
            "it (r, rank_pattern): the number of experts can't be known; correct the config"
        )
    return rows // rank


def _by_expert(both: Factors, experts: int) -> list[Factors]:
    """The factors of each expert, of those of a whole stack."""
    if experts == 1:
        return [both]
    a, b = factors_by_expert(both.lora_A, both.lora_B, experts)
    # Copied once: an expert's columns lie `experts` apart, and read one expert at a time all memory of lora_B would be
    # read for each.
    each = zip(a.unbind(), b.contiguous().unbind())
    return [Factors(f"{both.name}[{expert}]", *pair, both.scaling) for expert, pair in enumerate(each)]


def _layer_name(parameter: str) -> str:
    """The name of a parameter's update: as of a layer, the module's path where it is called weight."""
    return parameter.removesuffix(".weight")


def _from_model(model: nn.Module) -> AdapterUpdates:
    state = lora_state(model)
    name, source = state.active, f"adapter {state.active!r} of this {type(model).__name__}"
    config = state.configs[name]
    if config.use_dora:
        raise LoraFastError(f"{source} has use_dora=True; {_NO_PRODUCT}")
    check_in_place(model, state, adapter_name=name)
    factors, transposed, layers = [], set(), lora_layers(model)
    check_matrices(layers)
    for path, layer in layers.items():
        path = plain_name(path)
        if name not in layer.adapter_specs:
            continue
        if config.init_lora_weights in BASE_CHANGING_INITS:
            lora_A, lora_B = layer.plain_factors(name, config.init_lora_weights)
            scaling = 1.0
        else:
            lora_A, lora_B = layer.lora_A[name].weight, layer.lora_B[name].weight
            scaling = layer.adapter_specs[name].scaling
        both = _factors(source, path, lora_A, lora_B, scaling)
        turned = layer.fan_in_fan_out
        if isinstance(layer, LoraParameter):
            both, turned = both._replace(name=_layer_name(path)), layer.transposed
        found = _by_expert(both, layer.stacked)
        factors += found
        if turned:
            transposed |= {factor.name for factor in found}
    others = [*map(plain_name, state.copies.get(name, {})), *(state.biases if config.bias != "none" else ())]
    return AdapterUpdates(source, factors, frozenset(transposed), _others_note(others) if others else None)


def _carries_peft(model: nn.Module) -> bool:
    """Whether PEFT adapted `model` (get_peft_model, or Transformers' add_adapter), without importing peft to ask."""
    return any(hasattr(module, "peft_config") for module in model.modules())


def _from_peft(model: nn.Module) -> AdapterUpdates:
    # Imported here and not above: `import lora_fast` must not bring in peft.
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    source = f"this {type(model).__name__}"
    factors, transposed, names = [], set(), set()
    for path, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        # A wrapper of a parameter holds the module, or the wrapper of another of its parameters, as its base_layer.
        path = plain_name(path).removeprefix("base_model.model.").replace(".base_layer", "")
        if isinstance(layer, ParamWrapper):
            path = f"{path}.{layer.parameter_name}"
        if not isinstance(layer, LoraLayer):
            raise LoraFastError(
                f"{source}: {path} is a {type(layer).__module__}.{type(layer).__name__}; expected plain LoRA, whose "
                "update is scaling · lora_B lora_A"
            )
        held = layer.lora_A.keys() | layer.lora_embedding_A.keys()
        active = [name for name in layer.active_adapters if name in held]
        if len(active) > 1:
            raise LoraFastError(
                f"{source}: {len(active)} adapters are active on {path} ({', '.join(active)}); set_adapter to one"
            )
        if not active:
            continue
        name = active[0]
        names.add(name)
        if name in layer.lora_variant or layer.lora_bias.get(name):
            variant = "lora_bias" if layer.lora_bias.get(name) else type(layer.lora_variant[name]).__name__
            raise LoraFastError(
                f"{source}: {path} is a LoRA variant ({variant}{', DoRA' if layer.use_dora.get(name) else ''}); its "
                "update is not scaling · lora_B lora_A, use PEFT for it"
            )
        if name in layer.lora_embedding_A:
            lora_A, lora_B, turned = layer.lora_embedding_A[name], layer.lora_embedding_B[name], True
        else:
            lora_A, lora_B = layer.lora_A[name].weight, layer.lora_B[name].weight
            turned = getattr(layer, "fan_in_fan_out", False)
        both, experts = _factors(source, path, lora_A, lora_B, layer.scaling[name]), 1
        if isinstance(layer, ParamWrapper):
            both, experts = both._replace(name=_layer_name(path)), layer.num_experts
            turned = layer.get_param().dim() == 3 and not layer._did_swap_in_out_features
        found = _by_expert(both, experts)
        factors += found
        if turned:
            transposed |= {factor.name for factor in found}
    if not factors:
        raise LoraFastError(f"{source} has no active LoRA adapter; set_adapter to one")
    configs = next(module.peft_config for module in model.modules() if hasattr(module, "peft_config"))
    starts = {str(configs[name].init_lora_weights) for name in names} - _STARTS_OF_FACTORS_ALONE
    notes = [_start_note(start) for start in sorted(starts)]
    if others := [other for name in names for other in configs[name].modules_to_save or ()]:
        notes.append(_others_note(others))
    return AdapterUpdates(source, factors, frozenset(transposed), "; ".join(notes) or None)


def _start_note(start: str) -> str:
    remedy = "; for the update of the original ones, load_adapter it into the base model and give that model"
    return (
        f"init_lora_weights={start!r} took something off the base weights at the start, and s·B·A is relative to what "
        "was left" + (remedy if start in BASE_CHANGING_INITS else "")
    )


def _others_note(others: list[str]) -> str:
    return f"it also trains {few(others)} in full; that is no product of factors, and is left out"


def _factors(source: str, path: str, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float) -> Factors:
    """Both factors as matrices. Raises LoraFastError where they are not two of one rank."""
    if lora_A is None or lora_B is None:
        there, gone = ("lora_A", "lora_B") if lora_B is None else ("lora_B", "lora_A")
        raise LoraFastError(f"{source}: {path} has {there} and no {gone}; the file is incomplete")
    lora_A, lora_B = whole(lora_A.detach()), whole(lora_B.detach())
    for factor in (lora_A, lora_B):
        if factor.dim() < 2 or not factor.is_floating_point() or factor.is_meta:
            raise LoraFastError(
                f"{source}: a factor of {path} is {factor.dtype} of shape {tuple(factor.shape)} on {factor.device}; "
                "expected a matrix of floating-point numbers that are in memory"
            )
    shapes = tuple(lora_A.shape), tuple(lora_B.shape)
    lora_A, lora_B = lora_A.flatten(1), lora_B.flatten(1)
    if lora_A.shape[0] != lora_B.shape[1]:
        raise LoraFastError(
            f"{source}: the ranks of {path} differ: lora_A is {shapes[0]}, of rank {lora_A.shape[0]}, lora_B is "
            f"{shapes[1]}, of rank {lora_B.shape[1]}"
        )
    return Factors(path, lora_A, lora_B, float(scaling))
