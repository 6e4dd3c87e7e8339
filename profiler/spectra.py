"""The spectra of an adapter, or of the difference of two checkpoints, as one plain document (spectra.json): every
layer, every kind of module, the readings in words and the ranks that keep 99%."""

import difflib
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lora_fast import (
    LoraFastError,
    adapter_factors,
    adapter_spectra,
    amplification_factor,
    delta_spectra,
    intruder_dimensions,
    subspace_similarity,
)
from lora_fast.extract import NOT_LINEAR
from lora_fast.profiler.runs import RunFolder, environment
from lora_fast.spectrum import Spectrum, kept_energy, ranks_for, readings

SCHEMA_VERSION = 1
# What --energy of the suggestion keeps.
ENERGY = 0.99
# Below it a singular vector of W + ΔW counts as unlike one of W. Source: arXiv:2410.21228.
INTRUDER_COSINE = 0.5
# Read off every layer, and summed up per kind of module.
QUANTITIES = (
    "numerical_rank",
    "effective_rank",
    "stable_rank",
    "r90",
    "r95",
    "r99",
    "gap",
    "frobenius_norm",
    "relative_size",
    "corrected_rank",
    "corrected_effective_rank",
    "corrected_r90",
    "corrected_r99",
    "amplification",
)


Progress = Callable[[str, int, int, str], None]


def _rounded(phi: torch.Tensor) -> list[list[float]]:
    """To six digits, with which it is known to."""
    return [[round(value, 6) for value in row] for row in phi.tolist()]


def document(
    spectra: Mapping[str, Spectrum],
    *,
    source: Mapping[str, str | int | None],
    device: str,
    amplification: Mapping[str, float] | None = None,
    against: Mapping[str, Any] | None = None,
    intruders: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Plain data for tables, charts and JSON: numbers are finite or None.

    source: what was read, as the caller named it. amplification, intruders: by layer. against: what was found beside
    another adapter. A layer's place is its `stack` (the path before the first number), `depth` (that number, 0 without
    one) and `kind` (the path's last part that is no number)."""
    ordered = in_order(list(spectra.values()))
    layers = []
    for spectrum in ordered:
        stack, depth = place(spectrum.name)
        found = {"name": spectrum.name, "stack": stack, "depth": depth, "kind": spectrum.kind}
        found |= spectrum.to_dict()
        found["amplification"] = (amplification or {}).get(spectrum.name)
        found["intruders"] = (intruders or {}).get(spectrum.name)
        layers.append(found)
    return {
        "schema_version": SCHEMA_VERSION,
        "environment": environment(device),
        "source": dict(source),
        "kinds": kinds(layers),
        "readings": [asdict(reading) for reading in readings(ordered)],
        "suggestion": suggestion(ordered),
        "against": against,
        "layers": layers,
    }


def of_adapter(
    adapter: str,
    *,
    against: str | None = None,
    base: str | None = None,
    layer: str | None = None,
    intruders: bool = False,
    device: str = "cpu",
    progress: Progress = lambda stage, done, total, text="": None,
) -> dict[str, Any]:
    """The document of a PEFT folder. against: another, for the similarity of their subspaces, `layer` the one to draw.
    base: the weights it was trained on, for relative sizes and amplification, and for intruder dimensions where asked.

    Raises LoraFastError for all that `adapter_spectra` refuses, and a `layer` that isn't in both."""
    spectra = adapter_spectra(adapter, device=device, progress=lambda done, total: progress("spectra", done, total, ""))
    # Before the slow parts: what is wrong with these is told at once.
    between = None if against is None else _between(spectra, adapter, against, layer, device)
    amplification = None
    if base is not None:
        found = amplification_factor(
            adapter, base, device=device, progress=lambda done, total: progress("base", done, total, "")
        )
        amplification = {name: value.factor for name, value in found.items()}
        spectra = {name: replace(spectrum, weight_norm=found[name].weight_norm) for name, spectrum in spectra.items()}
    strangers = None
    if intruders:
        found = intruder_dimensions(
            adapter,
            base,
            threshold=INTRUDER_COSINE,
            device=device,
            progress=lambda done, total: progress("intruders", done, total, ""),
        )
        strangers = {
            name: {"count": value.count, "cosines": list(value.cosines), "threshold": INTRUDER_COSINE}
            for name, value in found.items()
        }
    return document(
        spectra,
        source={"adapter": str(adapter), "against": against, "base": base},
        device=device,
        amplification=amplification,
        against=between,
        intruders=strangers,
    )


def of_checkpoints(
    base: str,
    tuned: str,
    *,
    method: str = "exact",
    k: int = 64,
    exclude: Sequence[str] = (),
    device: str = "cpu",
    progress: Progress = lambda stage, done, total, text="": None,
) -> dict[str, Any]:
    """The document of the dense updates tuned − base. Raises LoraFastError for all that `delta_spectra` refuses."""
    spectra = delta_spectra(
        base,
        tuned,
        device=device,
        method=method,
        k=k,
        exclude=exclude,
        progress=lambda done, total, name: progress("spectra", done, total, name),
    )
    source = {"base": str(base), "tuned": str(tuned), "method": method, "k": k if method == "topk" else None}
    return document(spectra, source=source, device=device)


def _between(
    spectra: Mapping[str, Spectrum], adapter: str, against: str, layer: str | None, device: str
) -> dict[str, Any]:
    """φ of the right singular vectors (directions of the input) of ΔW, by layer, and the mean over layers up to the
    smallest grid's size."""
    grids = subspace_similarity(adapter, against, device=device)
    if layer is not None and layer not in grids:
        near = difflib.get_close_matches(layer, grids, n=3)
        hint = f"; near names: {', '.join(near)}" if near else f"; the first is {next(iter(grids))}"
        raise LoraFastError(f"--layer {layer!r} is not in both adapters{hint}")
    rows, columns = (min(grid.shape[axis] for grid in grids.values()) for axis in (0, 1))
    mean = torch.stack([grid[:rows, :columns] for grid in grids.values()]).mean(0)
    sizes = [spectra[name].shape[1] for name in grids]
    steps = sorted({1, *(2**power for power in range(1, 10)), min(rows, columns)})
    other = {factors.name for factors in adapter_factors(against)}
    return {
        "adapter": str(against),
        "shown": layer or max(grids, key=lambda name: spectra[name].frobenius_norm),
        # n, mean φ(n, n), and n / K, which is its expectation for random subspaces
        "diagonal": [
            [n, float(mean[n - 1, n - 1]), n * statistics.fmean(1 / size for size in sizes)]
            for n in steps
            if n <= min(rows, columns)
        ],
        "mean": _rounded(mean),
        "layers": [{"name": name, "phi": _rounded(grid)} for name, grid in grids.items()],
        "only_first": [name for name in spectra if name not in other],
        "only_second": sorted(other - set(spectra)),
    }


# As a block computes them. A file has its tensors by the alphabet.
KIND_ORDER = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


def in_order(spectra: Sequence[Spectrum]) -> list[Spectrum]:
    """By stack, depth, and place in the block where that is known, else as they come; what stands in no stack last."""
    stacks = list(dict.fromkeys(place(spectrum.name)[0] for spectrum in spectra))

    def key(spectrum: Spectrum) -> tuple[int, int, int]:
        stack, depth = place(spectrum.name)
        kind = spectrum.kind.rpartition(".")[2]  # without what an expert's begins with
        return (
            stacks.index(stack) if stack else len(stacks),
            depth,
            KIND_ORDER.index(kind) if kind in KIND_ORDER else len(KIND_ORDER),
        )

    return sorted(spectra, key=key)


def place(name: str) -> tuple[str, int]:
    """("model.layers", 3) of model.layers.3.self_attn.q_proj; the depth of a path without a number is 0."""
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return ("", 0) if first is None else (".".join(parts[:first]), int(parts[first]))


def kinds(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per kind of module, in the order of their first layer: how many layers, their shapes and ranks, each
    quantity's median, mean, min and max over the layers (None where a layer's is not known), and the layers' states."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        found.setdefault(layer["kind"], []).append(layer)
    return [
        {
            "kind": kind,
            "layers": len(members),
            "shapes": [list(shape) for shape in dict.fromkeys(tuple(layer["shape"]) for layer in members)],
            "rank": _over([layer["rank"] for layer in members]),
            **{name: _over([value_of(layer, name) for layer in _having(name, members)]) for name in QUANTITIES},
            "status": dict(sorted(_counts(layer["status"] for layer in members).items())),
            "zero": sum(layer["spectral_norm"] == 0 for layer in members),
        }
        for kind, members in found.items()
    ]


# An update that is zero has none of these; the others' are still worth their median.
OF_AN_UPDATE = ("gap", "amplification")


def _having(name: str, members: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    live = [layer for layer in members if layer["spectral_norm"] > 0] if name in OF_AN_UPDATE else members
    return live or members


def value_of(layer: Mapping[str, Any], name: str) -> float | None:
    """One of QUANTITIES of a layer of a document."""
    if name == "gap":
        return layer["gap"] and layer["gap"]["ratio"]
    if name.startswith("corrected_") and name != "corrected_rank":
        return layer["corrected"] and layer["corrected"][name.removeprefix("corrected_")]
    return layer[name]


def _over(values: Sequence[float | None]) -> dict[str, float] | None:
    if any(value is None for value in values):
        return None
    return {
        "median": statistics.median(values),
        "mean": statistics.fmean(values),
        "min": min(values),
        "max": max(values),
    }


def _counts(values) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


def suggestion(spectra: Sequence[Spectrum]) -> dict[str, Any] | None:
    """The ranks that keep ENERGY of every layer: one for all layers, and each layer's own, with what they train; None
    where there is no update at all, or too few singular values are known.

    Of a dense update in a storage dtype that rounds, of its part above the noise, and of the layers that
    `extract_adapter` takes: no embeddings and heads."""
    taken = [s for s in spectra if s.rank is not None or NOT_LINEAR.search(s.name) is None]
    known = [spectrum.corrected if spectrum.rank is None and spectrum.corrected else spectrum for spectrum in taken]
    known = [spectrum for spectrum in known if not spectrum.is_zero]
    if not known or any(spectrum.energy_rank(ENERGY) is None for spectrum in known):
        return None
    each = ranks_for(known, energy=ENERGY)
    one = max(each)
    adapters = all(spectrum.rank is not None for spectrum in known)
    if adapters:  # which hold the experts of a stack at one rank
        stacks = [spectrum.name.partition("[")[0] for spectrum in known]
        most: dict[str, int] = {}
        for stack, k in zip(stacks, each):
            most[stack] = max(k, most.get(stack, 0))
        each = [most[stack] for stack in stacks]
    sizes = [sum(spectrum.shape) for spectrum in known]
    return {
        "energy": ENERGY,
        "rank": one,
        "parameters": sum(one * size for size in sizes),
        "ranks": {spectrum.name: k for spectrum, k in zip(known, each)},
        "parameters_of_ranks": sum(k * size for k, size in zip(each, sizes)),
        "parameters_now": sum(s.rank * size for s, size in zip(known, sizes)) if adapters else None,
        "least_kept_energy": min(kept_energy(spectrum, k) for spectrum, k in zip(known, each)),
    }


_NUMBERS = re.compile(r"\[\n\s*([^\[\]{}\"]*?)\n\s*\]")


def to_json(found: Mapping[str, Any]) -> str:
    """JSON with every list of numbers on one line: a spectrum has thousands."""
    text = json.dumps(found, indent=2, allow_nan=False)
    # A string holds no line break in JSON, so what looks like a list over several lines is one.
    return _NUMBERS.sub(lambda match: "[" + re.sub(r"\s*\n\s*", " ", match[1]) + "]", text) + "\n"


def write(found: Mapping[str, Any], folder: RunFolder) -> list[str]:
    """spectra.json and the charts into `folder`; the names of the files."""
    from lora_fast.profiler import spectra_charts

    folder.write("spectra.json", to_json(found))
    charts = {
        "singular_values.png": spectra_charts.singular_values(found),
        "effective_rank.png": spectra_charts.effective_rank(found),
    }
    if found["against"]:
        charts["similarity.png"] = spectra_charts.similarity(found)
    for name, png in charts.items():
        folder.write(name, png)
    return ["spectra.json", *charts]


def read(path: str | Path) -> dict[str, Any]:
    """The document in a spectra.json. Raises LoraFastError for one of another schema_version."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    if found.get("schema_version") != SCHEMA_VERSION:
        raise LoraFastError(f"{path} has schema_version={found.get('schema_version')}; expected {SCHEMA_VERSION}")
    return found
