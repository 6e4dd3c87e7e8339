"""All evidence for a decision in one go, within a time budget: a profile, then a rank search, then the spectrum of one
of its adapters."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_fast import LoraFastError
from lora_fast.profiler import models, spectra
from lora_fast.profiler.profile import Profile
from lora_fast.profiler.rank_run import DEFAULTS, RankRun, plan_search, run_search
from lora_fast.profiler.ranks import parse_ranks
from lora_fast.profiler.runs import RunFolder, default_folder, resolve_device
from lora_fast.profiler.sweep import profile_ranks
from lora_fast.rank_search import FULL

Progress = Callable[[str, int, int, str], None]
RANKS = "1,4,16,64,full"
PROFILE, SEARCH, SPECTRA = "profile", "search", "svd"
# Of the budget: what the timing rounds of the profile may take, its memory pass and start-up coming on top; what is
# kept for the spectra; and how far a training may be off its prediction from the profile's steps.
TIMING_SHARE, SPECTRA_SHARE, SAFETY = 0.1, 0.05, 0.75
# A training of fewer steps says nothing of its rank; more than this per training only makes it longer.
LEAST_STEPS, MOST_STEPS = 20, 2000
HELD_OUT_SEQUENCES = 32
# A forward pass is about a third of a step, and a training is evaluated this often.
FORWARD_SHARE, EVALUATIONS = 1 / 3, 6


@dataclass(frozen=True)
class AtOnce:
    """What was measured, in the folders profile/, search/ and svd/ of `folder` (spectra: None where there are no
    adapters), and in `split` what each part was given and took, in words."""

    profile: Profile
    search: RankRun
    spectra: dict | None
    folder: Path
    split: tuple[str, ...]


def parse_duration(text: str) -> float:
    """--time-budget: "10m", "90s", "1h", "1h30m", "600" → seconds. Raises LoraFastError."""
    match = re.fullmatch(r"\s*(?:(\d+)h)?\s*(?:(\d+(?:\.\d+)?)m)?\s*(?:(\d+(?:\.\d+)?)s?)?\s*", text)
    hours, minutes, seconds = (float(part or 0) for part in match.groups()) if match else (0, 0, 0)
    total = 3600 * hours + 60 * minutes + seconds
    if not total:
        raise LoraFastError(f"--time-budget {text!r}; expected a duration such as 10m, 90s or 1h30m")
    return total


def measure_at_once(
    model: str,
    train: str | Path,
    evaluation: str | Path,
    *,
    time_budget_s: float,
    ranks: str | Sequence = RANKS,
    seeds: int = 2,
    most_steps: int = MOST_STEPS,
    batch_size: int | None = None,
    seq_len: int | None = None,
    learning_rate: float | None = None,
    device: str = "auto",
    out: str | Path | None = None,
    progress: Progress = lambda stage, done, total, text: None,
) -> AtOnce:
    """Profile the ranks and full fine-tuning, train and evaluate them on the text, and take the spectra of the adapter
    of the largest rank.

    The profile's step times say how many steps each training of the search may take within what is left of the budget,
    at most most_steps. seq_len None: 512, or what the model allows. out: a new folder; None:
    runs/decide-MODEL-DATE-TIME. The other arguments are those of `profile_ranks` and `plan_search`. Raises
    LoraFastError for wrong input, before anything is measured, and where the budget does not allow LEAST_STEPS steps a
    training."""
    if most_steps < LEAST_STEPS:
        raise LoraFastError(f"--steps {most_steps}; expected at least {LEAST_STEPS}, fewer say nothing of a rank")
    began = time.monotonic()
    device = resolve_device(device)
    folder = RunFolder(out or default_folder(f"decide-{Path(str(model)).stem}"))
    batch_size = batch_size or DEFAULTS["batch_size"]
    seq_len = seq_len or _length(model)
    settings = {"batch_size": batch_size, "seq_len": seq_len, "device": device}

    def plan(steps: int, out: Path):
        return plan_search(
            model,
            train,
            evaluation,
            ranks,
            strategy="grid",
            seeds=seeds,
            steps=steps,
            learning_rate=learning_rate,
            held_out_sequences=HELD_OUT_SEQUENCES,
            keep_adapters=True,
            out=out,
            **settings,
        )

    first = plan(LEAST_STEPS, folder.path / SEARCH)  # says now what is wrong with the text
    numbers = parse_ranks([rank for rank in first.ranks if rank != FULL])
    profile = profile_ranks(
        model,
        numbers,
        dtype=first.recipe.dtype,
        time_budget_s=TIMING_SHARE * time_budget_s,
        out=folder.path / PROFILE,
        progress=progress,
        **settings,
    )
    took = time.monotonic() - began
    split = [f"profile {_words(took)}"]

    given = (1 - SPECTRA_SHARE) * time_budget_s - took
    evaluated = EVALUATIONS * FORWARD_SHARE * -(-len(first.held_out) // batch_size)
    steps_s = seeds * sum(_step_ms(profile, rank) for rank in first.ranks) / 1e3
    steps = affordable_steps(given, steps_s, evaluated)
    if steps < LEAST_STEPS:
        least = took + (LEAST_STEPS + evaluated) * steps_s / SAFETY
        raise LoraFastError(
            f"--time-budget {_words(time_budget_s)} leaves {steps} steps for each of {first.most} trainings, "
            f"and fewer than {LEAST_STEPS} say nothing: give about {_words(least / (1 - SPECTRA_SHARE))}, fewer "
            f"--ranks, or shorter sequences; the profile is in {folder.path / PROFILE}"
        )
    steps = min(steps, most_steps)
    started = time.monotonic()
    search = run_search(plan(steps, folder.path / SEARCH), progress)
    took = time.monotonic() - started
    split.append(
        f"search {_words(took)} of {_words(given)} ({len(first.ranks)} arms × {seeds} seeds × {steps} steps of "
        f"{first.recipe.tokens_per_step} tokens)"
    )

    started = time.monotonic()
    found = _spectra(search, numbers, folder.path / SPECTRA, device, progress)
    split.append(f"spectra {_words(time.monotonic() - started)} of {_words(SPECTRA_SHARE * time_budget_s)}")
    split.append(f"{_words(time.monotonic() - began)} of {_words(time_budget_s)} in all")
    return AtOnce(profile, search, found, folder.path, tuple(split))


def affordable_steps(seconds: float, steps_s: float, evaluated: float) -> int:
    """Steps of each training: steps_s is what one step of all of them takes together, evaluated the steps' worth of
    time that a training's evaluations take. LEAST_STEPS where no step was timed."""
    return max(0, int(SAFETY * seconds / steps_s - evaluated)) if steps_s else LEAST_STEPS


def _length(model: str) -> int:
    subject = models.build(models.resolve(str(model)), device="meta", dtype=torch.float32)
    longest = models.max_positions(subject)
    return min(DEFAULTS["seq_len"], longest or DEFAULTS["seq_len"])


def _step_ms(profile: Profile, rank) -> float:
    """Of the arm, or of the slowest where it was not timed; 0 where none was."""
    arms = profile.arms
    arm = next(arm for arm in arms if (arm.kind == "full" if rank == FULL else arm.kind == "lora" and arm.rank == rank))
    return arm.step_ms or max((other.step_ms or 0.0 for other in arms), default=0.0)


def _spectra(search: RankRun, ranks: list[int], out: Path, device: str, progress: Progress) -> dict | None:
    """Of the largest rank's first adapter that is there."""
    for rank in reversed(ranks):
        adapters = [search.adapter(rank, seed) for seed in search.document["seeds"]]
        adapter = next((path for path in adapters if (path / "adapter_config.json").is_file()), None)
        if adapter is not None:
            found = spectra.of_adapter(str(adapter), device=device, progress=progress)
            spectra.write(found, RunFolder(out))
            return found
    return None


def _words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
