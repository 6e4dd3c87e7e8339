"""Adapters on disk, in PEFT's folder format, both ways: `adapter_config.json` and `adapter_model.safetensors`.

A file is read and checked whole before the model is touched, and a folder is replaced whole or not at all (the current
one: whole, or left without its config, which nothing loads)."""

import ctypes
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_fast.backend import check_backend
from lora_fast.config import ALL_LINEAR, BASE_CHANGING_INITS, LoraConfig, LoraFastError, few, plain_name, warn
from lora_fast.distributed import check_matrices, gathered, once
from lora_fast.injection import (
    LoraState,
    check_adapter_dtype,
    check_in_place,
    check_injection,
    inject,
    lora_layers,
    lora_state,
)
from lora_fast.linear import LoraLayer
from lora_fast.parameter import LoraParameter
from lora_fast.quantized import matrix_shape
from lora_fast.targets import embedding_of, misread_by_peft, saved_module_names, target_modules

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_OURS = frozenset({CONFIG_NAME, WEIGHTS_NAME, "README.md"})


def save_adapter(
    model: nn.Module, folder: str | os.PathLike, *, adapter_name: str | None = None, portable: bool = False
) -> None:
    """Writes the active adapter (or `adapter_name`) as a PEFT folder, which PEFT loads to the same function.

    portable=True writes it for servers that read only one global rank and alpha (vLLM, llama.cpp, SGLang): scaling is
    folded into B, every factor is padded with zeros to one rank, lora_alpha = r, no patterns, no rsLoRA; an update that
    changed the base weight at its start (PiSSA, OLoRA) becomes one of rank 2 R on the original base.
    A folder that holds an earlier adapter is replaced whole or, in a crash, not at all, and keeps its permissions; the
    current folder stays itself, and a crash may leave it without adapter_config.json, so that nothing loads it. Raises
    LoraFastError, with nothing written, where the folder holds anything else, where portable=True can't carry the
    adapter, or where a module that it trains was replaced since (resize_token_embeddings does that).
    Of a model whose weights are sharded over processes (FSDP2's `fully_shard`) the parts are gathered: every process
    has to call, and the first one writes."""
    state = lora_state(model)
    name = state.active if adapter_name is None else adapter_name
    if name not in state.configs:
        raise LoraFastError(f"adapter_name={name!r}; this model carries {', '.join(map(repr, state.configs))}")
    check_in_place(model, state, adapter_name=name)
    folder = Path(folder).resolve()
    layers = {plain_name(path): layer for path, layer in lora_layers(model).items() if name in layer.adapter_specs}
    check_matrices(layers)
    once(model, lambda: check_output_folder(folder))
    if misread := misread_by_peft(model, [n for n, layer in layers.items() if not isinstance(layer, LoraParameter)]):
        warn(
            f"PEFT takes the names of {misread[0]} ({len(misread)} modules so) for those of experts in a "
            f"{model.config.model_type} model and won't load their adapters; load_adapter does"
        )
    if portable:
        config, tensors = _portable(model, state, name, layers)
    else:
        config, tensors = _as_trained(model, state, name, layers)
    if config.base_model_name_or_path is None:
        source = getattr(getattr(model, "config", None), "name_or_path", None) or None
        config = replace(config, base_model_name_or_path=source)
    if config.task_type is None:  # by which PEFT's AutoPeftModel… would know the model's class
        config = replace(config, auto_mapping=_class_of(model))
    once(model, lambda: write_adapter(folder, config, tensors))


def _class_of(model: nn.Module) -> dict[str, str]:
    """The model's class as PEFT writes it, below what `fully_shard` made of it while the program ran."""
    kinds = [kind for kind in type(model).__mro__ if issubclass(kind, nn.Module)]
    kind = next(k for k in kinds if getattr(sys.modules.get(k.__module__), k.__name__, None) is k)
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}


def _as_trained(
    model: nn.Module, state: LoraState, name: str, layers: dict[str, LoraLayer]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    linears = [path for path, layer in layers.items() if not isinstance(layer, LoraParameter)]
    config = _with_named_targets(model, state.configs[name].with_exact_patterns(list(layers)), linears)
    config = replace(config, fan_in_fan_out=_fan_in_fan_out(layers))
    tensors = {}
    places = _places(layers)
    for path, layer in layers.items():
        for key, factor in zip(_factor_keys(layer), layer.factor_modules(name)):
            tensors[f"{places[path]}.{key}"] = gathered(factor.weight)
    for path, module in state.copies.get(name, {}).items():
        tensors |= {plain_name(f"{path}.{key}"): gathered(value) for key, value in module.state_dict().items()}
    if config.bias != "none":
        for path in state.biases:
            plain = plain_name(path)
            owner = plain.removesuffix(".bias")
            key = f"{owner}.base_layer.bias" if owner in layers else plain
            tensors[key] = gathered(model.get_parameter(path))
    return config, tensors


def _portable(
    model: nn.Module, state: LoraState, name: str, layers: dict[str, LoraLayer]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    config = state.configs[name]
    unserved = {"modules_to_save": state.copies.get(name), "bias": config.bias != "none", "use_dora": config.use_dora}
    for field, value in unserved.items():
        if value:
            raise LoraFastError(
                f"portable=True: {field} can't be served by vLLM, llama.cpp or SGLang; save without portable"
            )
    if stacked := [path for path, layer in layers.items() if isinstance(layer, LoraParameter)]:
        raise LoraFastError(f"portable=True: {stacked[0]} is no linear layer; save without portable")
    factors = {path: layer.plain_factors(name, config.init_lora_weights) for path, layer in layers.items()}
    rank = max(a.shape[0] for a, _ in factors.values())
    tensors = {}
    for path, (a, b) in factors.items():
        key_a, key_b, _ = _factor_keys(layers[path])
        tensors[f"{path}.{key_a}"] = nn.functional.pad(a, (0, 0, 0, rank - a.shape[0]))
        tensors[f"{path}.{key_b}"] = nn.functional.pad(b, (0, rank - b.shape[1]))
    plain = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=config.lora_dropout,
        target_modules=list(layers),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        fan_in_fan_out=_fan_in_fan_out(layers),
    )
    return _with_named_targets(model, plain, list(layers)), tensors


def _factor_keys(module: nn.Module) -> tuple[str, str, str]:
    """What PEFT's file calls lora_A, lora_B and DoRA's magnitude of this module, behind its path."""
    if isinstance(module, nn.Embedding):
        return "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"
    return "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"


def _fan_in_fan_out(layers: Mapping[str, LoraLayer]) -> bool:
    """What PEFT's config says of how weights are stored; it means linear layers."""
    return any(layer.fan_in_fan_out for layer in layers.values() if not isinstance(layer, nn.Embedding))


def _with_named_targets(model: nn.Module, config: LoraConfig, paths: list[str]) -> LoraConfig:
    """target_modules as a list of names that means just `paths`: their last segments where that is exact, as servers
    expect."""
    given = config.target_modules
    if not given or (isinstance(given, str) and given.lower() != ALL_LINEAR):
        return config
    short = replace(config, target_modules=sorted({path.rpartition(".")[2] for path in paths}))
    try:
        exact = list(map(plain_name, target_modules(model, short))) == paths
    except LoraFastError:  # the last segments also name modules that can't be adapted
        exact = False
    return short if exact else replace(config, target_modules=paths)


def _places(targets: Mapping[str, nn.Module]) -> dict[str, str]:
    """{dotted name: where PEFT's file has its factors}: of a layer its name; PEFT nests the parameters of one module,
    the last outermost, so that its factors bear the module's name and the first's most "base_layer"s."""
    places = dict(zip(targets, targets))
    owners: dict[str, dict[int, str]] = {}
    for path, layer in targets.items():
        if isinstance(layer, LoraParameter):
            number = list(layer.owner._parameters).index(layer.parameter_name)
            owners.setdefault(path.rpartition(".")[0], {})[number] = path
    for owner, paths in owners.items():
        for depth, number in enumerate(sorted(paths, reverse=True)):
            places[paths[number]] = owner + depth * ".base_layer"
    return places


def check_output_folder(folder: Path) -> None:
    """Raises LoraFastError unless `folder` is absent, empty, or holds an adapter and nothing else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise LoraFastError(f"{folder} is a file; expected a folder for the adapter")
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in _OURS)
    if foreign:
        raise LoraFastError(
            f"{folder} holds something else ({', '.join(foreign[:3])}); choose a new one, or one with an adapter alone"
        )


def write_adapter(folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Writes config and tensors (keyed by module path in the base model) into `folder`, replacing an adapter there
    as `save_adapter` says."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as e:
        raise LoraFastError(f"{folder} can't be made ({e}); choose a folder that can be written to") from None
    try:
        on_cpu = {_PREFIX + key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
        save_file(on_cpu, fresh / WEIGHTS_NAME, metadata={"format": "pt"})
        text = json.dumps(config.to_peft(), indent=2, sort_keys=True)
        (fresh / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        if (folder / "README.md").is_file():
            shutil.copy2(folder / "README.md", fresh / "README.md")
        # mkdtemp makes it private
        fresh.chmod(stat.S_IMODE(folder.stat().st_mode) if folder.exists() else 0o777 & ~_umask())
        for path in (*fresh.iterdir(), fresh):
            _to_disk(path)
        if folder.exists() and folder.samefile(os.curdir):
            _move_files(fresh, folder)
        elif not _moved(fresh, folder):
            _exchange(fresh, folder)  # the old adapter is now `fresh`, and goes below
        _to_disk(folder.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _moved(fresh: Path, folder: Path) -> bool:
    """Whether `fresh` could become `folder`: not where there is one, even if another process made it just now."""
    try:
        fresh.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        return False
    return True


def _move_files(fresh: Path, folder: Path) -> None:
    """Moves the files of an adapter over those in `folder`, which a process works in: swapped for another, it would
    leave that process in a deleted folder. Without a config meanwhile, so that no mixture of old and new ever loads."""
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    _to_disk(folder)
    os.replace(fresh / WEIGHTS_NAME, folder / WEIGHTS_NAME)
    _to_disk(folder)
    os.replace(fresh / CONFIG_NAME, folder / CONFIG_NAME)
    _to_disk(folder)


def _exchange(one: Path, other: Path) -> None:
    """Swaps two folders: in one step where the kernel can (Linux's renameat2 with RENAME_EXCHANGE), else in three
    renames."""
    at_cwd, exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None and renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
        return
    aside = one.with_name(one.name + ".old")
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


def read_adapter(folder: str | os.PathLike, *, check_finite: bool = True) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and the tensors (keyed by module path in the base model, on the CPU, as stored) of a PEFT adapter
    folder.

    check_finite=False leaves it to the caller to find NaN and inf.
    Raises LoraFastError for a missing or damaged file, another PEFT method, a field that lora-fast can't honour, NaN or
    inf."""
    folder = Path(folder)
    if not folder.is_dir():
        raise LoraFastError(f"{folder} is not a folder; expected one with {CONFIG_NAME} and {WEIGHTS_NAME}")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            pickled = (folder / "adapter_model.bin").is_file()
            advice = "; adapter_model.bin is a pickle: load it with PEFT once and save it again" if pickled else ""
            raise LoraFastError(f"{folder} holds no {name}{advice}")
    try:
        peft_config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise LoraFastError(f"{folder / CONFIG_NAME} is not JSON ({e})") from None
    config = LoraConfig.from_peft(peft_config, source=str(folder / CONFIG_NAME))
    try:
        stored = load_file(folder / WEIGHTS_NAME)
    except (SafetensorError, OSError, ValueError) as e:
        raise LoraFastError(
            f"{folder / WEIGHTS_NAME} can't be read: {e}; it is damaged or not a safetensors file"
        ) from None
    tensors = {}
    for key, value in stored.items():
        if not key.startswith(_PREFIX):
            raise LoraFastError(f"{folder / WEIGHTS_NAME}: {key} doesn't start with {_PREFIX!r}, as PEFT's keys do")
        # float(): of 8-bit numbers torch can't tell
        if check_finite and value.is_floating_point() and not torch.isfinite(value.float()).all():
            raise LoraFastError(
                f"{folder / WEIGHTS_NAME}: {key} holds NaN or inf; the training run that wrote it diverged"
            )
        tensors[plain_name(key.removeprefix(_PREFIX))] = value
    return config, tensors


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    adapter_name: str = "default",
    trainable: bool = True,
    backend: str = "auto",
    adapter_dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Reads a PEFT adapter folder into `model`, adapting its modules where they are not yet, and makes it the active
    adapter.

    trainable=False leaves its factors frozen (and off the optimizer). adapter_dtype: dtype of the masters. An adapter
    started with PiSSA or OLoRA changes the base weight again as it did at its start, as in PEFT. Returns `model`.
    Raises LoraFastError, with the model unchanged, for all that `read_adapter` and `apply_lora` refuse, and for tensors
    that are missing, left over or of another shape than the model's."""
    check_backend(backend)
    check_adapter_dtype(adapter_dtype)
    if not isinstance(trainable, bool):
        raise LoraFastError(f"trainable={trainable!r}; expected True or False")
    config, tensors = read_adapter(folder)
    tensors = _without_second_copies(config, tensors)
    targets = check_injection(model, config, adapter_name)
    _check_fit(model, config, targets, tensors, source=str(Path(folder) / WEIGHTS_NAME))
    init = config.init_lora_weights if config.init_lora_weights in BASE_CHANGING_INITS else False
    inject(
        model,
        config,
        targets,
        adapter_name,
        backend=backend,
        adapter_dtype=adapter_dtype,
        trainable=trainable,
        init=init,
    )
    _fill(model, lora_state(model), adapter_name, tensors)
    return model


def _without_second_copies(config: LoraConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the biases of modules_to_save that PEFT writes again with bias="all": its copy's, which is there under
    the module's own name too, and the original's, which is the base's."""
    again = re.compile(r"\.(modules_to_save|original_module)\.(.*\.)?bias$")
    return {key: value for key, value in tensors.items() if config.bias != "all" or not again.search(key)}


def _expected(model: nn.Module, config: LoraConfig, targets: dict[str, nn.Module]) -> dict[str, torch.Size]:
    """{key: shape} of every tensor that the adapter of `config` must have."""
    shapes, plain = {}, {plain_name(path): module for path, module in targets.items()}
    places = _places(plain)
    for path, module in plain.items():
        ranks = config.rank_of(path) * getattr(module, "stacked", 1)
        n, k = matrix_shape(module)
        sizes = (ranks, k), (n, ranks), (n,)
        keys = _factor_keys(module)[: 3 if config.use_dora else 2]
        shapes |= {f"{places[path]}.{key}": torch.Size(size) for key, size in zip(keys, sizes)}
        if config.bias != "none" and getattr(module, "bias", None) is not None:
            shapes[f"{path}.base_layer.bias"] = module.bias.shape
    saved = saved_module_names(model, config)
    for path in saved:
        values = model.get_submodule(path).state_dict()
        shapes |= {plain_name(f"{path}.{key}"): value.shape for key, value in values.items()}
    if config.bias == "all":
        elsewhere = tuple(f"{path}." for path in saved)
        for path, parameter in model.named_parameters():
            owner, _, leaf = path.rpartition(".")
            if leaf == "bias" and owner not in targets and not path.startswith(elsewhere):
                shapes[plain_name(path)] = parameter.shape
    return shapes


def _optional(model: nn.Module, targets: dict[str, nn.Module]) -> dict[str, torch.Size]:
    """{key: shape} of base tensors that PEFT may save along: a targeted head's own weight, resized embeddings."""
    shapes = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):  # a tied head's weight by its own name too
        owner, _, leaf = path.rpartition(".")
        if owner in targets:
            shapes[f"{plain_name(owner)}.base_layer.{leaf}"] = parameter.shape
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        embedding = embedding_of(model, getter)
        path = next((n for n, m in model.named_modules() if m is embedding), None) if embedding is not None else None
        if path is not None and path not in targets:
            shapes |= {plain_name(f"{path}.{key}"): value.shape for key, value in embedding.state_dict().items()}
    return shapes


def _check_fit(
    model: nn.Module,
    config: LoraConfig,
    targets: dict[str, nn.Module],
    tensors: Mapping[str, Tensor],
    *,
    source: str,
) -> None:
    expected = _expected(model, config, targets)
    allowed = expected | {k: s for k, s in _optional(model, targets).items() if k not in expected}
    if missing := [key for key in expected if key not in tensors]:
        raise LoraFastError(f"{source} lacks {few(missing)}; was it saved for another model, or other target_modules?")
    if strange := [key for key in tensors if key not in allowed]:
        raise LoraFastError(
            f"{source} holds {few(strange)}, which {type(model).__name__} with this config has no place for"
        )
    for key, value in tensors.items():
        if value.shape != allowed[key]:
            raise LoraFastError(f"{source}: {key} is {tuple(value.shape)}, the model needs {tuple(allowed[key])}")
        if ".lora_" in key and not value.is_floating_point():
            raise LoraFastError(f"{source}: {key} is of {value.dtype}; expected floating-point numbers")


@torch.no_grad()
def _fill(model: nn.Module, state: LoraState, name: str, tensors: Mapping[str, Tensor]) -> None:
    modules = {plain_name(path): (path, module) for path, module in model.named_modules()}  # a wrapper's inside is last
    layers = {plain_name(path): layer for path, layer in lora_layers(model).items() if name in layer.adapter_specs}
    places = _places(layers)
    layers = {places[path]: layer for path, layer in layers.items()}
    for key, value in tensors.items():
        owner, _, rest = key.partition(".lora_")
        if rest and owner in layers:
            factors = dict(zip(_factor_keys(layers[owner]), layers[owner].factor_modules(name)))
            factors[f"lora_{rest}"].weight.copy_(value)
            continue
        # modules_to_save stand in their original's place while their adapter is active, so their keys lead there.
        owner, _, leaf = key.replace(".base_layer.", ".").rpartition(".")
        owner, module = modules[owner]
        path, tensor = f"{owner}.{leaf}" if owner else leaf, getattr(module, leaf)
        if path not in state.biases and not path.startswith(tuple(f"{saved}." for saved in state.originals)):
            if torch.equal(tensor.detach().cpu(), value.to(tensor.dtype)):
                continue
            state.replaced.setdefault(path, tensor.detach().to("cpu", copy=True))
        tensor.copy_(value)
