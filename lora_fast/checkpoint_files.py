"""The tensors of a safetensors checkpoint: where they lie, from headers alone, and their rows read on demand.

A checkpoint is a file, a folder with model.safetensors, or one with model.safetensors.index.json and its shards."""

import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_fast.config import LoraFastError

FILE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# safetensors' names of the types whose numbers mean what they say; quantized ones have scales beside them.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies; its type is safetensors' own name of it ("BF16")."""

    file: Path
    name: str
    shape: tuple[int, ...]
    type: str

    @contextmanager
    def opened(self) -> Iterator[Callable[[Any], Tensor]]:
        """Yields a function from an index, such as a slice of rows, to that part of the tensor and no other. The file
        is open only meanwhile, so that no page of it stays in the memory of the process."""
        with ExitStack() as stack:
            try:
                found = stack.enter_context(safe_open(self.file, "pt")).get_slice(self.name)
            except (SafetensorError, OSError) as error:
                raise _damaged(self.file, error) from None

            def read(index: Any) -> Tensor:
                try:
                    return found[index]
                except (SafetensorError, OSError) as error:
                    raise _damaged(self.file, error) from None

            yield read

    def read(self, index: Any = ()) -> Tensor:
        """All of it, or the part that `index` names."""
        with self.opened() as read:
            return read(index)


def stored_tensors(path: str | os.PathLike, argument: str) -> dict[str, Stored]:
    """Every tensor of a checkpoint, from the headers of its files. argument: what messages call the checkpoint.

    Raises LoraFastError where there is no such checkpoint, or a shard or an index is missing or damaged."""
    tensors: dict[str, Stored] = {}
    files, listed = _files(Path(path), argument)
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it can't be iterated over
                    found = opened.get_slice(name)
                    tensors[name] = Stored(file, name, tuple(found.get_shape()), found.get_dtype())
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from None
    if absent := sorted(set(listed) - set(tensors)):
        raise LoraFastError(
            f"{Path(path) / INDEX_NAME} lists {shortened(absent)}, which its shards don't hold; copy the checkpoint "
            "anew"
        )
    return tensors


def _files(path: Path, argument: str) -> tuple[list[Path], Collection[str]]:
    """The files of a checkpoint, and the names of tensors that its index promises."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise LoraFastError(f"{argument}={str(path)!r}; expected a .safetensors file or a folder. {_ADVICE}")
        return [path], ()
    if not path.is_dir():
        raise LoraFastError(
            f"{argument}={str(path)!r} doesn't exist; expected a .safetensors file or a folder with {FILE_NAME} or "
            f"{INDEX_NAME}. One on the hub is fetched first: hf download NAME --local-dir FOLDER"
        )
    if (path / INDEX_NAME).is_file():
        try:
            places = json.loads((path / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
            shards = sorted({path / place for place in places.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LoraFastError(f"{path / INDEX_NAME} is not an index of shards ({error!r}); copy it anew") from None
        if missing := [shard.name for shard in shards if not shard.is_file()]:
            raise LoraFastError(
                f"{path} lacks {', '.join(missing)}, which {INDEX_NAME} lists ({len(missing)} of {len(shards)} "
                "shards); download the checkpoint to its end"
            )
        return shards, places
    if (path / FILE_NAME).is_file():
        return [path / FILE_NAME], ()
    others = sorted(entry.name for entry in path.iterdir() if entry.suffix == ".safetensors")
    if (path / "adapter_config.json").is_file():
        advice = "It holds a LoRA adapter and not the weights of a model; adapter_spectra reads its factors"
    elif others:
        advice = f"It holds {shortened(others)}: name the file"
    else:
        advice = _ADVICE if any(entry.suffix in (".bin", ".pt", ".pth") for entry in path.iterdir()) else ""
    raise LoraFastError(f"{argument}={str(path)!r} holds neither {FILE_NAME} nor {INDEX_NAME}. {advice}".strip())


_ADVICE = (
    "Files of torch.save (.bin, .pt, .pth) are pickles, which may run code and can't be read in parts: load the model "
    "once and write it with save_pretrained"
)


def _damaged(file: Path, error: Exception) -> LoraFastError:
    return LoraFastError(f"{file} can't be read: {error}; it is damaged or not a safetensors file: copy it anew")


def counting_order(name: str) -> list:
    """Sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def shortened(names: Collection[str]) -> str:
    """All of them, those that differ in their numbers alone as one: "layers.*.up_proj.weight (32)"."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=counting_order):
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return ", ".join(group[0] if len(group) == 1 else f"{key} ({len(group)})" for key, group in groups.items())
