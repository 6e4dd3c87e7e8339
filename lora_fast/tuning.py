"""Which of several implementations of one step runs for a shape: timed once on the user's GPU, then remembered.

A choice belongs to a GPU, the versions of torch and triton, a step ("linear_lora", "grad_x") and what its speed depends
on: sizes (M rounded up to a power of two), dtype, and, as the step names them, how the weight lies, whether rows are
aligned, whether there is a bias. It is looked up in this process, in the table that ships with the package
(`tuned.json`: empty until shapes were measured on a GPU), and in the user's cache file; else the candidates are timed
on the call's own tensors (median of repetitions with a cold L2 cache) and the winner is kept in all processes to come.
A kernel whose result isn't that of the library's route, by whatever fault of whichever compiler, is told of and not
timed.

Given the tables the choice is deterministic. The shipped table holds for every version of torch and triton, its rows
for those that run first: the same GPU then chooses the same everywhere, and a choice measured under other versions is
at worst slower, never wrong. Of the cache file only rows timed under the very versions that run are used; after an
update of either what the shipped table doesn't know is timed again, and the older rows stay for whoever goes back.

Where timing is not possible (a CUDA graph is being captured, the CPU interpreter) the first candidate runs and nothing
is remembered. Where memory is too short for it, the first candidate is this process's choice: it is not tried again in
every step of a training near the limit."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_fast.config import warn

SCHEMA_VERSION = 2
# ‖difference‖ / ‖result‖ of two candidates that is no rounding: that of bf16 is below 0.01, as is that of TF32.
WRONG = 0.03
FEW = 1024  # numbers, of which nothing can be said: all of them may be what cancelling terms left
_choices: dict[tuple[str, str], str] = {}
# What follows from choices, by all that they depend on as it comes: looked up in a fraction of the time that it takes
# to write that down as `_choices` has it. Batches of ever new lengths would fill the memory: beyond so many all are
# forgotten.
MOST_RECENT = 8192
_recent: dict[tuple, Any] = {}
_forced: str | None = None


def cache_file() -> Path:
    """Where choices are kept: $XDG_CACHE_HOME/lora_fast/tuning.json, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_fast" / "tuning.json"


@cache
def versions() -> str:
    """The versions that timings hold for: torch's with its build, which names the CUDA or ROCm of the BLAS."""
    import triton

    return f"torch {torch.__version__}, triton {triton.__version__}"


def _document(text: str) -> dict[str, Any]:
    """A table's JSON, an empty one for one that is broken or of another schema.

    {"schema_version", "gpus": {GPU: {versions: {step and sizes: {"choice", "ms": {candidate: ms}}}}}}"""
    try:
        document = json.loads(text)
        if document["schema_version"] == SCHEMA_VERSION:
            for tables in document["gpus"].values():
                for rows in tables.values():
                    for row in rows.values():
                        row["choice"]
            return document
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return {"schema_version": SCHEMA_VERSION, "gpus": {}}


def read_table(text: str, *, any_versions: bool) -> dict[tuple[str, str], str]:
    """{(GPU, step and sizes): candidate} of a table's JSON: the rows of the versions that run, or those of others too,
    where the running ones have none, the first in the file."""
    found: dict[tuple[str, str], str] = {}
    for gpu, tables in _document(text)["gpus"].items():
        others = list(tables) if any_versions else []
        for name in (versions(), *others):
            for key, row in tables.get(name, {}).items():
                found.setdefault((gpu, key), row["choice"])
    return found


@cache
def _known() -> dict[tuple[str, str], str]:
    shipped = read_table((files("lora_fast") / "tuned.json").read_text(encoding="utf-8"), any_versions=True)
    try:
        return read_table(cache_file().read_text(encoding="utf-8"), any_versions=False) | shipped
    except (OSError, ValueError, RuntimeError):  # not there, not text, or no home folder
        return shipped


def _remember(gpu: str, key: str, choice: str, ms: Mapping[str, float]) -> None:
    """Adds a row to the cache file; another process's row may be lost to a race, and is then timed again."""
    try:
        path = cache_file()
    except RuntimeError:
        return  # no home folder: the choice lives as long as the process
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        text = ""
    document = _document(text)
    row = {"choice": choice, "ms": {name: round(value, 4) for name, value in ms.items()}}
    document["gpus"].setdefault(gpu, {}).setdefault(versions(), {})[key] = row
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(document, indent=1, sort_keys=True), encoding="utf-8")
        fresh.replace(path)
    except OSError:
        pass  # a read-only home: the choice lives as long as the process


def _may_time() -> bool:
    return not torch.cuda.is_current_stream_capturing()


def _time(candidates: Mapping[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Median milliseconds of each candidate that runs, and computes what the first that is no kernel of ours does; one
    whose tile doesn't fit this GPU is left out."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    reference = next((name for name in candidates if not name.startswith("triton")), None)
    ms = {}
    for name, call in candidates.items():
        try:
            if reference not in (name, None) and (off := _difference(call, candidates[reference])) > WRONG:
                warn(f"{name} differs from {reference} by {off:.0%} and is left out; please report it: {versions()}")
                continue
            ms[name] = do_bench(call, warmup=10, rep=40, return_mode="median")
        except OutOfResources:
            continue
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler that can't do this tile: the others can still run
            if not name.startswith("triton"):
                raise
            warn(f"{name} failed to compile or run and is left out: {type(error).__name__}: {error}")
    return ms


def _difference(call: Callable[[], Tensor], reference: Callable[[], Tensor]) -> float:
    """‖result − expected‖_F / ‖expected‖_F; 0 where that can't tell: memory is too short, what is expected is not
    finite, or there are FEW numbers."""
    try:
        squares, numbers = torch.zeros(2, dtype=torch.float64, device="cpu"), 0
        # In parts, since fp32 copies of the whole could be what doesn't fit any more.
        for result, expected in zip(call().split(1024), reference().split(1024), strict=True):
            numbers += expected.numel()
            expected = expected.float()
            squares += torch.stack([(result.float() - expected).square().sum(), expected.square().sum()]).double().cpu()
    except torch.OutOfMemoryError:
        return 0.0
    difference, size = squares.tolist()
    if not math.isfinite(size) or difference == 0 or numbers < FEW:
        return 0.0
    return math.sqrt(difference / size) if size and math.isfinite(difference) else math.inf


def run(step: str, sizes: Mapping[str, Any], device: torch.device, candidates: Mapping[str, Callable[[], Any]]) -> Any:
    """The result of the candidate that `choose` names."""
    return candidates[choose(step, sizes, device, tuple(candidates), lambda name: candidates[name]())]()


def choose(
    step: str, sizes: Mapping[str, Any], device: torch.device, names: Sequence[str], call: Callable[[str], Any]
) -> str:
    """The name of the candidate that is fastest for these sizes; every candidate computes the same.

    names: of the candidates, the safest first. call(name): runs one. sizes: what the choice depends on, M by its next
    power of two, dtype with what torch lets cuBLAS make of fp32."""
    if _forced is not None:
        name = next((name for name in names if name.startswith(_forced)), None)
        if name is not None:
            return name
    if device.type != "cuda" or len(names) == 1:
        return names[0]
    gpu = torch.cuda.get_device_name(device)
    key = f"{step} " + " ".join(f"{name}={_told(name, value)}" for name, value in sizes.items())
    name = _choices.get((gpu, key)) or _known().get((gpu, key))
    if name not in names:
        if not _may_time():
            return names[0]
        try:
            ms = _time({name: partial(call, name) for name in names})
        except torch.OutOfMemoryError:
            name = names[0]  # runs after this: in here the exception still holds what was allocated
        else:
            name = min(ms, key=ms.get)
            _remember(gpu, key, name, ms)
    _choices[gpu, key] = name
    return name


def recall(place: tuple) -> Any:
    """What was kept for calls of this kind, None where nothing was."""
    return _recent.get((_forced, place))


def keep(place: tuple, value: Any) -> Any:
    """Keeps, for calls of this kind, what follows from a choice, and returns it."""
    if torch.cuda.is_initialized() and not _may_time():
        return value  # what was chosen in a capture may have been for want of timing
    if len(_recent) >= MOST_RECENT:
        _recent.clear()
    _recent[_forced, place] = value
    return value


def size_class(M: int) -> int:
    """The next power of two: M's share in a choice."""
    return 1 << max(M - 1, 0).bit_length()


def _told(name: str, value: Any) -> Any:
    if name == "M":
        return size_class(value)
    if value is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return f"{value} by TF32"  # eight times as fast by cuBLAS; the kernels stay with fp32
    return value


def choices() -> dict[str, str]:
    """{step and sizes: candidate} of every choice that this process made by table or by timing."""
    return {key: name for (_, key), name in _choices.items()}


@contextmanager
def only(prefix: str) -> Iterator[None]:
    """Inside the block the first candidate whose name starts with `prefix` runs wherever there is one, whatever is
    faster: for tests and benchmarks of each."""
    global _forced
    before, _forced = _forced, prefix
    try:
        yield
    finally:
        _forced = before
