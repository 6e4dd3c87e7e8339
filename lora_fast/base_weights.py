"""The base weights beneath an adapter's updates, from safetensors or a model, a panel of rows in memory at a time."""

import json
import math
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora_fast.adapter_updates import AdapterUpdates
from lora_fast.config import LoraFastError, few

_INDEX_NAME, _FILE_NAME = "model.safetensors.index.json", "model.safetensors"
# Bytes of a panel in float64.
_PANEL_BYTES = 1 << 26


class _Stored(NamedTuple):
    """A tensor in a safetensors file, of which [start:end] reads the rows that it names and no others. The file is open
    only meanwhile, so that none of its pages stay in the memory of the process."""

    file: Path
    name: str
    shape: tuple[int, ...]

    def rows(self, start: int, end: int) -> Tensor:
        try:
            with safe_open(self.file, framework="pt") as opened:
                return opened.get_slice(self.name)[start:end]
        except (SafetensorError, OSError) as e:
            raise _damaged(self.file, e) from None


class BaseWeight(NamedTuple):
    """One base weight: (N, …) with K the product of what follows, or (K, N) where it is stored transposed."""

    source: str
    stored: Tensor | _Stored
    transposed: bool

    def panels(self, device: torch.device | str | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows as a float64 matrix), from the top down."""
        stored, (rows, *others) = self.stored, self.stored.shape
        step = max(1, _PANEL_BYTES // (8 * max(math.prod(others), 1)))
        for start in range(0, rows, step):
            end = start + step
            panel = stored[start:end] if isinstance(stored, Tensor) else stored.rows(start, end)
            if not panel.is_floating_point():
                raise LoraFastError(f"{self.source} is {panel.dtype}; expected the base before it was quantized")
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
            name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter.detach()
            for name, parameter in base.named_parameters(remove_duplicate=False)
        }
    else:
        source = f"base={os.fspath(base)!r}"
        stored = _safetensors(Path(base))
    weights, missing = {}, []
    for layer, lora_A, lora_B, _ in found.factors:
        key = _matching_name(f"{layer}.weight", stored)
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


def _matching_name(name: str, names: Collection[str]) -> str | None:
    """`name` itself, or the one of `names` that it is the end of, or that is the end of it: a checkpoint may lack the
    prefix that the model's class puts before its weights, or have one that the class lacks."""
    if name in names:
        return name
    longer = [other for other in names if other.endswith(f".{name}")]
    found = longer or [other for other in names if name.endswith(f".{other}")]
    return found[0] if len(found) == 1 else None


def _safetensors(base: Path) -> dict[str, _Stored]:
    """Every tensor of a safetensors file, a folder with model.safetensors, or one with shards and their index; only
    headers are read."""
    index = base / _INDEX_NAME
    if index.is_file():
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = sorted({base / shard for shard in shards})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise LoraFastError(f"{index} is damaged; expected a JSON object with a weight_map") from None
        if gone := [file.name for file in files if not file.is_file()]:
            raise LoraFastError(
                f"{base} lacks {few(gone)}, which {_INDEX_NAME} lists; download the checkpoint to its end"
            )
    else:
        files = [base / _FILE_NAME if base.is_dir() else base]
        if not files[0].is_file():
            raise LoraFastError(
                f"base={os.fspath(base)!r} has no {files[0].name}; expected a safetensors file, a folder with "
                f"{_FILE_NAME} or {_INDEX_NAME}, or a model"
            )
    stored = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    stored[name] = _Stored(file, name, tuple(opened.get_slice(name).get_shape()))
        except (SafetensorError, OSError) as e:
            raise _damaged(file, e) from None
    return stored


def _damaged(file: Path, error: Exception) -> LoraFastError:
    return LoraFastError(f"{file} can't be read: {error}; it is damaged or not a safetensors file")
