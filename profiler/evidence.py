"""What lies in run folders, as evidence for a decision: a profile or an estimate, a rank search, spectra."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_fast import LoraFastError
from lora_fast.decision_inputs import curve_of, directions_of
from lora_fast.profiler.profile import Profile

SEARCH_SCHEMA = SPECTRA_SCHEMA = 1
# What each kind is called, the file that holds it, and keys by which its content is known.
FILES = {"profile": "run.json", "search": "search.json", "spectra": "spectra.json"}
MADE_BY = "lora-fast profile, estimate, rank search or svd"


@dataclass
class Evidence:
    """profile, search, spectra: each None where no run had it. tokens: of the text that the search trained on. read:
    (path, what it was). notes: what was left out, and what doesn't go together."""

    profile: Profile | None = None
    search: dict[str, Any] | None = None
    spectra: dict[str, Any] | None = None
    tokens: int | None = None
    read: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_evidence(paths: Sequence[str | Path]) -> Evidence:
    """All that the folders (or JSON files) hold; a folder may hold several kinds.

    Of several profiles of one model a measured one is taken before an estimate, and a later before an earlier. Raises
    LoraFastError for what is no run or was written by another version, for runs of different models, and for two
    searches or two spectra."""
    found: dict[str, list[tuple[Path, Any]]] = {kind: [] for kind in FILES}
    for path in map(Path, paths):
        for kind, file in _files(path.expanduser()):
            found[kind].append((path, _read(kind, file)))
    evidence = Evidence(read=[(str(path), kind) for kind, entries in found.items() for path, _ in entries])
    for kind in ("search", "spectra"):
        if len(found[kind]) > 1:
            names = " and ".join(str(path) for path, _ in found[kind][:2])
            raise LoraFastError(f"{names} both hold {'a search' if kind == 'search' else kind}; give one of them")
    if found["profile"]:
        evidence.profile = _one_profile(found["profile"], evidence.notes)
    evidence.search = next((document for _, document in found["search"]), None)
    evidence.spectra = next((document for _, document in found["spectra"]), None)
    evidence.tokens = tokens_of(evidence.search)
    _check_together(evidence, found)
    return evidence


def tokens_of(search: dict[str, Any] | None) -> int | None:
    """Tokens of the text that a search trained on, each counted once."""
    train = ((search or {}).get("data") or {}).get("train") or {}
    return train.get("tokens") or None


def _files(path: Path) -> list[tuple[str, Path]]:
    """(kind, file) of what a path holds."""
    if path.is_file():
        return [(_kind(path), path)]
    if not path.is_dir():
        raise LoraFastError(f"{path}: there is no such file or folder; expected a folder of {MADE_BY}")
    found = [(kind, path / name) for kind, name in FILES.items() if (path / name).is_file()]
    if found:
        return found
    if (path / "arms.jsonl").is_file():
        raise LoraFastError(f"{path} has arms.jsonl but no run.json: the run has not ended")
    if (path / "adapter_config.json").is_file():
        raise LoraFastError(f"{path} is an adapter; give the folder that `lora-fast svd {path}` writes")
    raise LoraFastError(f"{path} is no run: expected a folder of {MADE_BY}, with one of {', '.join(FILES.values())}")


def _load(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoraFastError(f"{file} can't be read as JSON: {error}") from None
    if not isinstance(document, dict):
        raise LoraFastError(f"{file} holds a {type(document).__name__}; expected the object that {MADE_BY} writes")
    return document


def _kind(file: Path) -> str:
    document = _load(file)
    if "arms" in document:
        return "profile"
    if "search" in document or {"points", "trials"} <= set(document):
        return "search"
    if {"layers", "readings"} <= set(document):
        return "spectra"
    raise LoraFastError(f"{file} is no run: expected the JSON of {MADE_BY}")


def _read(kind: str, file: Path) -> Any:
    if kind == "profile":
        from lora_fast.profiler.runs import read_profile

        return read_profile(file)
    document = _load(file)
    version, known = document.get("schema_version", 1), SEARCH_SCHEMA if kind == "search" else SPECTRA_SCHEMA
    if version != known:
        raise LoraFastError(f"{file}: schema_version={version!r}; this version reads {known}")
    try:
        (curve_of if kind == "search" else directions_of)(document)  # says which file is damaged
    except LoraFastError as error:
        raise LoraFastError(f"{file}: {error}") from None
    return document


def _one_profile(entries: list[tuple[Path, Profile]], notes: list[str]) -> Profile:
    first, profile = entries[0]
    for path, other in entries[1:]:
        names = [(p.workload["model"], p.workload["parameters"]) for p in (profile, other)]
        if names[0][1] != names[1][1]:  # the name of one model may differ: an id, a folder
            words = " and ".join(f"{model} ({count:,} parameters)" for model, count in names)
            raise LoraFastError(f"{first} and {path} are profiles of different models: {words}")
    best = max(entries, key=lambda entry: (not entry[1].estimated, entry[1].environment.get("started") or ""))
    notes += [f"{path} was left out: {best[0]} is of the same model" for path, other in entries if other is not best[1]]
    return best[1]


def _check_together(evidence: Evidence, found: dict[str, list]) -> None:
    """A search of another model than the profile's is refused; layers of other sizes are said."""
    work = evidence.profile.workload if evidence.profile else {}
    searched = (evidence.search or {}).get("model") or {}
    if work and searched.get("parameters") and searched["parameters"] != work["parameters"]:
        raise LoraFastError(
            f"{found['profile'][0][0]} and {found['search'][0][0]} are of different models: "
            f"{work['model']} ({work['parameters']:,} parameters) and {searched.get('name')} "
            f"({searched['parameters']:,})"
        )
    if searched.get("weights") == "random":
        evidence.notes.append(
            "the search trained a model of random weights: pretraining, which says little on a rank for fine-tuning"
        )
    spectra = directions_of(evidence.spectra) if evidence.spectra else None
    lora = next((arm for arm in evidence.profile.arms if arm.kind == "lora"), None) if evidence.profile else None
    if spectra is not None and lora is not None and not work.get("use_dora"):  # whose magnitudes count too
        per_rank = lora.trainable // lora.rank
        if per_rank != spectra.parameters_per_rank:
            evidence.notes.append(
                f"the spectra's layers have {spectra.parameters_per_rank:,} parameters a rank, the profile's "
                f"{per_rank:,}: other layers, or another model"
            )
