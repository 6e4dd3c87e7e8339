"""The base weights beneath an adapter's updates, from safetensors or a model, a panel of rows in memory at a time."""

import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_fast.adapter_updates import AdapterUpdates
from lora_fast.checkpoint_files import DTYPES, Stored, stored_tensors
from lora_fast.config import LoraFastError, few, plain_name
from lora_fast.distributed import whole

# Bytes of a panel in float64.
_PANEL_BYTES = 1 << 26


# What models call the input embedding that a tied output head is.
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "shared.weight", "word_embeddings.weight")
# A stack of experts (its parameter's name in the model) where a checkpoint has a tensor for each expert: under one of
# these names, or in several that stand one below the other.
_OF_ONE_EXPERT = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}
# What Mixtral and its like call a mixture in their checkpoints, and in the model.
_MIXTURE = (".block_sparse_moe.", ".mlp.")


class BaseWeight(NamedTuple):
    """One base weight: (N, …) with K the product of what follows, or (K, N) where it is stored transposed.

    parts: the tensors that hold it, one below the other. expert: its place in the one tensor where that is a stack."""

    source: str
    parts: tuple[Tensor | Stored, ...]
    transposed: bool
    expert: int | None = None

    def panels(self, device: torch.device | str | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows as a float64 matrix), from the top down."""
        above = 0
        for stored in self.parts:
            dtype = DTYPES.get(stored.type) if isinstance(stored, Stored) else stored.dtype
            if dtype not in DTYPES.values():
                raise LoraFastError(
                    f"{self.source} is {getattr(stored, 'type', dtype)}; expected the base before it was quantized"
                )
            rows, columns = _size(stored, self.expert)
            step = max(1, _PANEL_BYTES // (8 * max(columns, 1)))
            for start in range(0, rows, step):
                place = slice(start, start + step) if self.expert is None else (self.expert, slice(start, start + step))
                panel = stored[place] if isinstance(stored, Tensor) else stored.read(place)
                yield above + start, whole(panel).to(device, torch.float64).flatten(1)
            above += rows

    def norm(self) -> float:
        """‖W‖_F."""
        return math.hypot(*(float(torch.linalg.matrix_norm(panel)) for _, panel in self.panels()))

    def matrix(self, device: torch.device) -> Tensor:
        """W (N, K) in float64."""
        sizes = [_size(stored, self.expert) for stored in self.parts]
        size = sum(rows for rows, _ in sizes), sizes[0][1]
        filled = torch.empty(size, dtype=torch.float64, device=device)
        for start, panel in self.panels(device):
            filled[start : start + len(panel)] = panel
        return filled.mT if self.transposed else filled


def _size(stored: Tensor | Stored, expert: int | None) -> tuple[int, int]:
    shape = stored.shape if expert is None else stored.shape[1:]
    return shape[0], math.prod(shape[1:])


def base_weights(base: str | os.PathLike | nn.Module, found: AdapterUpdates) -> dict[str, BaseWeight]:
    """{layer: its base weight} for every layer of an adapter, and for each expert of a stack, whether the base stacks
    them too or has a tensor for each. Raises LoraFastError where one is missing or of another shape, where it can't be
    known which way a stack's square matrices lie, or a file is missing or damaged."""
    turned = frozenset()
    if isinstance(base, nn.Module):
        source = f"base, a {type(base).__name__}"
        stored = {_plain(name): parameter.detach() for name, parameter in base.named_parameters(remove_duplicate=False)}
        turned = frozenset(
            _plain(f"{path}.{leaf}")
            for path, module in base.named_modules()
            if getattr(module, "is_transposed", False)
            for leaf in module._parameters
        )
    else:
        source = f"base={os.fspath(base)!r}"
        stored = stored_tensors(base, "base")
    stacks = Counter(name for name, bracket, _ in (f.name.partition("[") for f in found.factors) if bracket)
    held: dict[str, _Held | None] = {}
    weights, missing = {}, []
    for layer, lora_A, lora_B, _ in found.factors:
        name, bracket, place = layer.partition("[")
        if name not in held:
            held[name] = _held(name, stacks[name], stored, base, source)
            if held[name] is None:
                missing.append(name if bracket else f"{name}.weight")
        if held[name] is None:
            continue
        expert = int(place[:-1]) if bracket else None
        keys = held[name].of(expert)
        parts, expected = tuple(stored[key] for key in keys), (lora_B.shape[0], lora_A.shape[1])
        if held[name].tails:
            expert = None
        elif not bracket and tuple(parts[0].shape) in ((1, *expected), (1, *expected[::-1])):
            expert = 0  # a stack of one bears no number
        sizes = [_size(part, expert) for part in parts]
        size = sum(rows for rows, _ in sizes), sizes[0][1]
        if size not in (expected, expected[::-1]) or len({columns for _, columns in sizes}) > 1:
            shapes = " and ".join(str(tuple(part.shape)) for part in parts)
            raise LoraFastError(
                f"{source}: {' and '.join(keys)} is {shapes}, but the update of {layer} is (N, K) = {expected}; is "
                "this the base that the adapter was trained on?"
            )
        # Of a model with layers of both orders the config has one flag: the shape decides, where it is not square.
        if expected[0] != expected[1]:
            transposed = size == expected[::-1]
        elif held[name].tails:
            transposed = False  # linear layers, each an expert
        elif expert is None or layer not in found.untold:
            transposed = layer in found.transposed
        else:
            transposed = keys[0] in turned if isinstance(base, nn.Module) else _is_turned(source, keys[0], stored)
        weights[layer] = BaseWeight(f"{source}: {' and '.join(keys)}", parts, transposed, expert)
    if missing:
        raise LoraFastError(
            f"{source} holds no {few(missing)}; is this the base that the adapter was trained on? Where its files "
            "name weights otherwise, load it and give the model"
        )
    return weights


def _plain(name: str) -> str:
    """A name in a model as it is without PEFT's adapters and PyTorch's wrappers."""
    return plain_name(name).removeprefix("base_model.model.").replace(".base_layer", "")


class _Held(NamedTuple):
    """The tensors of a layer or of a stack in a checkpoint: the one in `keys`; or, where there are `tails`, of expert e
    those named "key.e.tail"."""

    keys: tuple[str, ...]
    tails: tuple[str, ...]

    def of(self, expert: int | None) -> list[str]:
        if not self.tails:
            return list(self.keys)
        return [f"{key}.{expert}.{tail}" for key, tail in zip(self.keys, self.tails)]


def _held(
    name: str,
    experts: int,
    stored: Mapping[str, Tensor | Stored],
    base: str | os.PathLike | nn.Module,
    source: str,
) -> _Held | None:
    """Where `stored` has a layer (0 experts) or a stack; None where it doesn't. Raises LoraFastError for a stack of
    another number of experts."""
    names = [name, *([name.replace(_MIXTURE[1], _MIXTURE[0])] if _MIXTURE[1] in name else ())]
    entries = [entry for wanted in names for entry in (f"{wanted}.weight", wanted)]
    if not experts and _is_tied_head(name, base):
        entries += EMBEDDINGS
    if key := next(filter(None, (_matching_name(entry, stored) for entry in entries)), None):
        shape = tuple(stored[key].shape)
        if experts and (len(shape) != 3 or shape[0] != experts):
            raise _other_number(f"{source}: {key} is {shape}", experts, name)
        return _Held((key,), ())
    for wanted in names if experts else ():
        owner, _, leaf = wanted.rpartition(".")
        for projections in _OF_ONE_EXPERT.get(leaf, ()):
            tails = tuple(f"{projection}.weight" for projection in projections)
            firsts = [_matching_name(f"{owner}.0.{tail}", stored) for tail in tails]
            if not all(first and first.endswith(f".0.{tail}") for first, tail in zip(firsts, tails)):
                continue
            found = _Held(tuple(first.removesuffix(f".0.{tail}") for first, tail in zip(firsts, tails)), tails)
            count = 0
            while all(key in stored for key in found.of(count)):
                count += 1
            if count != experts:
                raise _other_number(f"{source}: {found.keys[0]} has {count} experts", experts, name)
            return found
    return None


def _other_number(words: str, experts: int, name: str) -> LoraFastError:
    return LoraFastError(
        f"{words}, but the adapter has updates of {experts} experts of {name}; is this the base that the adapter was "
        "trained on?"
    )


def _is_turned(source: str, key: str, stored: Mapping[str, Tensor | Stored]) -> bool:
    """Whether a stack of square matrices is (E, K, N). A module's stacks lie one way, and beside a square one the other
    is not: (E, 2 I, H) is gate_up_proj and (E, H, I) down_proj, each longer than wide, or (E, H, 2 I) and (E, I, H)."""
    owner, _, leaf = key.rpartition(".")
    for other in {"gate_up_proj", "down_proj"} - {leaf}:
        shape = stored[f"{owner}.{other}"].shape if f"{owner}.{other}" in stored else ()
        if leaf in ("gate_up_proj", "down_proj") and len(shape) == 3 and shape[1] != shape[2]:
            return shape[1] < shape[2]
    raise LoraFastError(
        f"{source}: {key} stacks square matrices, and neither the adapter's folder nor the checkpoint tells whether "
        "they are (N, K) or (K, N); load_adapter the folder into its model and give that model for the folder"
    )


def _is_tied_head(layer: str, base: str | os.PathLike | nn.Module) -> bool:
    """Whether the layer is an output head that the checkpoint leaves out, its config.json saying that the embedding
    serves as one."""
    if isinstance(base, nn.Module) or not layer.endswith("lm_head"):
        return False
    folder = Path(base) if Path(base).is_dir() else Path(base).parent
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings")))


def _matching_name(name: str, names: Collection[str]) -> str | None:
    """`name` itself, or the one of `names` that it is the end of, or that is the end of it: a checkpoint may lack the
    prefix that the model's class puts before its weights, or have one that the class lacks."""
    if name in names:
        return name
    longer = [other for other in names if other.endswith(f".{name}")]
    found = longer or [other for other in names if name.endswith(f".{other}")]
    return found[0] if len(found) == 1 else None
