"""The base weights beneath an adapter's updates, from safetensors or a model, a panel of rows in memory at a time."""

import json
import math
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_fast.adapter_updates import AdapterUpdates
from lora_fast.checkpoint_files import DTYPES, Stored, stored_tensors
from lora_fast.config import LoraFastError, few, plain_name

# Bytes of a panel in float64.
_PANEL_BYTES = 1 << 26


# What models call the input embedding that a tied output head is.
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "shared.weight", "word_embeddings.weight")


class BaseWeight(NamedTuple):
    """One base weight: (N, …) with K the product of what follows, or (K, N) where it is stored transposed."""

    source: str
    stored: Tensor | Stored
    transposed: bool

    def panels(self, device: torch.device | str | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows as a float64 matrix), from the top down."""
        stored, (rows, *others) = self.stored, self.stored.shape
        dtype = DTYPES.get(stored.type) if isinstance(stored, Stored) else stored.dtype
        if dtype not in DTYPES.values():
            raise LoraFastError(
                f"{self.source} is {getattr(stored, 'type', dtype)}; expected the base before it was quantized"
            )
        step = max(1, _PANEL_BYTES // (8 * max(math.prod(others), 1)))
        for start in range(0, rows, step):
            place = slice(start, start + step)
            panel = stored[place] if isinstance(stored, Tensor) else stored.read(place)
            yield start, panel.to(device, torch.float64).flatten(1)

    def norm(self) -> float:
        """‖W‖_F."""
        return math.hypot(*(float(torch.linalg.matrix_norm(panel)) for _, panel in self.panels()))

    def matrix(self, device: torch.device) -> Tensor:
        """W (N, K) in float64."""
        size = self.stored.shape[0], math.prod(self.stored.shape[1:])
        whole = torch.empty(size, dtype=torch.float64, device=device)
        for start, panel in self.panels(device):
            whole[start : start + len(panel)] = panel
        return whole.mT if self.transposed else whole


def base_weights(base: str | os.PathLike | nn.Module, found: AdapterUpdates) -> dict[str, BaseWeight]:
    """{layer: its base weight} for every layer of an adapter. Raises LoraFastError where one is missing or of another
    shape, or a file is missing or damaged."""
    if isinstance(base, nn.Module):
        source = f"base, a {type(base).__name__}"
        stored = {
            plain_name(name).removeprefix("base_model.model.").replace(".base_layer.", "."): parameter.detach()
            for name, parameter in base.named_parameters(remove_duplicate=False)
        }
    else:
        source = f"base={os.fspath(base)!r}"
        stored = stored_tensors(base, "base")
    weights, missing = {}, []
    for layer, lora_A, lora_B, _ in found.factors:
        key = _matching_name(f"{layer}.weight", stored)
        if key is None and _is_tied_head(layer, base):
            key = next(filter(None, (_matching_name(name, stored) for name in EMBEDDINGS)), None)
        if key is None:
            missing.append(f"{layer}.weight")
            continue
        shape = tuple(stored[key].shape)
        size, expected = (shape[0], math.prod(shape[1:])), (lora_B.shape[0], lora_A.shape[1])
        # Of a model with layers of both orders the config has one flag: the shape decides, where it is not square.
        transposed = layer in found.transposed if expected[0] == expected[1] else size == expected[::-1]
        if size not in (expected, expected[::-1]):
            raise LoraFastError(
                f"{source}: {key} is {shape}, but the update of {layer} is (N, K) = {expected}; is this the base that "
                "the adapter was trained on?"
            )
        weights[layer] = BaseWeight(f"{source}: {key}", stored[key], transposed)
    if missing:
        raise LoraFastError(
            f"{source} holds no {few(missing)}; is this the base that the adapter was trained on? Where its files "
            "name weights otherwise, load it and give the model"
        )
    return weights


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
