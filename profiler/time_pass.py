"""The time pass: which arms share a process, what happens when one of them ends it, and ratios to full fine-tuning.

Where all arms fit into memory together, one process times them. Where they don't, each process has the smallest rank
beside its arms, and an arm's ratio to full fine-tuning is its ratio to that rank over full's ratio to it, each paired
within a process. The processes take turns there and back, A B B A, so that a machine that slowly changes speed does the
same to all."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lora_fast.profiler.intervals import (
    CONFIDENCE,
    CONFIDENCE_AT_TARGET,
    MIN_ROUNDS,
    half_width,
    quotient_with_interval,
    ratio_with_interval,
)
from lora_fast.profiler.models import ModelSource
from lora_fast.profiler.process import run_in_child
from lora_fast.profiler.profile import Arm
from lora_fast.profiler.rounds import Record
from lora_fast.profiler.timing import results
from lora_fast.profiler.workload import AGAIN, FULL, FULL_AGAIN, LORA, Workload

# The saving in question is 10-30% of a step. Where two equal arms may differ by more than 10%, the table cannot show
# it.
NOISE_LIMIT = 0.10
# A record is read from its beginning, while its rounds are timed: not more often than this.
LOOK_S = 1.0


@dataclass(frozen=True)
class Rules:
    """When timing stops, as `rounds.Stop` says, and what an arm's step may take at most, in seconds."""

    rounds: int
    budget_s: float | None
    target_ci: float | None
    arm_timeout_s: float | None

    @property
    def confidence(self) -> float:
        return CONFIDENCE if self.target_ci is None else CONFIDENCE_AT_TARGET


def groups_of(arms: Sequence[Arm], available_MiB: float | None) -> tuple[list[list[str]], dict[str, str]]:
    """The names that each process times, and of arms that are in none why not.

    All adapters and optimizer states of a process stay in memory together, beside the weights and one arm's step. The
    second copy is full fine-tuning's, or the smallest rank's where that is too much."""
    states = {a.name: a.after_step_MiB["adapters"] + a.after_step_MiB["optimizer"] for a in arms if a.after_step_MiB}
    steps = {a.name: a.peak_MiB - states[a.name] for a in arms if a.name in states}

    def needed(names: Sequence[str]) -> float:
        originals = [name.removesuffix(AGAIN) for name in names]
        most = max((steps[name] for name in originals if name in steps), default=0.0)
        return sum(states.get(name, 0.0) for name in originals) + most

    def fits(names: Sequence[str]) -> bool:
        return available_MiB is None or needed(names) <= available_MiB

    # An arm that raised under the memory tracker may run without it.
    names = [arm.name for arm in arms if arm.status in ("ok", "failed")]
    reasons = {arm.name: arm.error or arm.status for arm in arms if arm.name not in names}
    ranks = [arm.name for arm in arms if arm.kind == LORA and arm.name in names]
    reference = ranks[0] if ranks else names[0] if names else None
    for again in ([FULL_AGAIN] if FULL in names else []) + ([reference + AGAIN] if ranks else []):
        if fits([*names, again]):
            return [[*names, again]], reasons
    if not names:
        return [], reasons

    groups = [[reference]]
    for name in sorted(set(names) - {reference}, key=lambda name: (name == FULL, states.get(name, 0.0))):
        if fits([*groups[-1], name]):
            groups[-1].append(name)
        elif groups[-1] != [reference] and fits([reference, name]):
            groups.append([reference, name])
        else:
            needs = needed([reference, name])
            reasons[name] = f"not timed: beside {reference} it needs {needs:.0f} MiB of {available_MiB:.0f} MiB"
    for group, again in ((groups[-1], FULL_AGAIN), *((group, reference + AGAIN) for group in groups)):
        if again.removesuffix(AGAIN) in group and fits([*group, again]):
            group.append(again)
            break
    return groups, reasons


def time_groups(
    source: ModelSource,
    workload: Workload,
    groups: Sequence[Sequence[str]],
    rules: Rules,
    folder: Path,
    progress: Callable[[int, int, str], None],
    watch: Callable[[Record], None] = lambda record: None,
) -> list[dict]:
    """What `timing.results` says of each group. folder: of the records, from which an earlier run is taken up. watch is
    called with the record of the group at work as rounds end."""
    count = len(groups)
    visits = [*range(count), *reversed(range(count - 1))]
    done_before = set()
    looked = -math.inf
    for number, index in enumerate(visits):
        first_half = index in visits[number + 1 :]
        budget = None if rules.budget_s is None else rules.budget_s / count
        arguments = {
            "rounds": math.ceil(rules.rounds / 2) if first_half else rules.rounds,
            "budget_s": budget / 2 if budget and (first_half or index in done_before) else budget,
            "target_ci": None if first_half else rules.target_ci,
            "least": MIN_ROUNDS // 2 if first_half else MIN_ROUNDS,
            "final": not first_half,
            "arm_timeout_s": rules.arm_timeout_s,
        }

        def report(done: int, total: int, text: str, number=number, index=index) -> None:
            progress(done, total, text if count == 1 else f"process {number + 1} of {len(visits)}, {text}")
            nonlocal looked
            if done and (done == total or time.monotonic() - looked > LOOK_S):
                looked = time.monotonic()
                watch(Record.look(record_file(folder, index)))

        _time_group(source, workload, groups[index], record_file(folder, index), arguments, report)
        done_before.add(index)
    return [results(Record.open(record_file(folder, index)), names) for index, names in enumerate(groups)]


def record_file(folder: Path, index: int) -> Path:
    return folder / f"rounds-{index + 1}.jsonl"


def _time_group(source, workload, names, file, arguments, progress) -> None:
    """A child that an arm has ended is followed by one without it, which goes on from the rounds that there are."""
    progress(0, arguments["rounds"], "loading")
    while set(names) - set(Record.open(file).failed):
        asked = {"arms": list(names), "record": str(file), **arguments}
        result = run_in_child("time", source, workload, asked, progress=progress)
        if result["status"] == "ok":
            return
        record = Record.open(file)
        guilty = names if record.at is None else [record.at]
        record.add("failed", {name: result for name in guilty if name not in record.failed})


def add_times(arms: Sequence[Arm], timed: Sequence[dict], workload: Workload, rules: Rules) -> dict | None:
    """Fill in medians and ratios; returns the A/A result."""
    good = [{name: one for name, one in group["arms"].items() if one["status"] == "ok"} for group in timed]
    bad = {name: one for group in timed for name, one in group["arms"].items() if one["status"] != "ok"}
    home = next((group for group in good if FULL in group), {})
    for arm in arms:
        group = home if arm.name in home else next((group for group in good if arm.name in group), {})
        if not group:
            if arm.name in bad and arm.status == "ok":
                failure = bad[arm.name]
                arm.status, arm.requested_MiB = failure["status"], failure.get("requested_MiB")
                arm.error = f"in the timing pass, beside the other arms: {failure['error']}"
            continue
        _fill(arm, group[arm.name], workload)
        if arm.kind == FULL:
            continue
        if group is home:
            via = None
        else:
            via = next((name for name in group if name in home and not name.endswith(AGAIN)), None)
            if via is None:
                continue
        for of in ("step_ms", "cpu_ms"):
            if group[arm.name][of]:
                ratio = _ratio(group, home, arm.name, via, of, rules.confidence)
                if of == "step_ms":
                    arm.ratio_to_full, arm.ratio_ci = ratio
                    arm.ratio_via = via
                else:
                    arm.cpu_ratio, arm.cpu_ratio_ci = ratio
    return _aa(good, rules.confidence)


def with_times_so_far(arms: Sequence[Arm], record: Record) -> list[Arm]:
    """Copies with the medians of the rounds so far; no intervals, which would take time from what is being timed."""
    found = []
    for arm in arms:
        samples = record.series(arm.name)
        pairs = [(r[arm.name]["step_ms"], r[FULL]["step_ms"]) for r in record.rounds if {arm.name, FULL} <= r.keys()]
        found.append(
            replace(
                arm,
                step_ms=statistics.median(samples) if samples else arm.step_ms,
                ratio_to_full=statistics.median(one / full for one, full in pairs) if pairs else None,
            )
        )
    return found


def _fill(arm: Arm, series: dict, workload: Workload) -> None:
    for phase in ("step_ms", "forward_ms", "backward_ms", "optimizer_ms"):
        setattr(arm, phase, statistics.median(series[phase]))
    arm.tokens_per_s = 1e3 * workload.tokens / arm.step_ms
    arm.samples_ms = series["step_ms"]


def _ratio(group: dict, home: dict, name: str, via: str | None, of: str, confidence: float):
    """name's ratio to full, or the quotient of both ratios to via."""
    if via is None:
        return ratio_with_interval(group[name][of], home[FULL][of], confidence)
    return quotient_with_interval(
        ratio_with_interval(group[name][of], group[via][of], confidence),
        ratio_with_interval(home[FULL][of], home[via][of], confidence),
    )


def _aa(good: Sequence[dict], confidence: float) -> dict | None:
    for group in good:
        for again in (name for name in group if name.endswith(AGAIN)):
            original = again.removesuffix(AGAIN)
            if original in group:
                samples = group[again]["step_ms"]
                ratio, ci = ratio_with_interval(samples, group[original]["step_ms"], confidence)
                floor = max(abs(end - 1) for end in ci)
                limit = NOISE_LIMIT
                return {
                    "of": original,
                    "ratio": ratio,
                    "ci": ci,
                    "noise_floor": floor,
                    "limit": limit,
                    "samples_ms": samples,
                }
    return None


def widest(arms: Sequence[Arm], aa: dict | None) -> float | None:
    """The largest half-width among the ratios' intervals; None where there are none."""
    pairs = [(arm.ratio_to_full, arm.ratio_ci) for arm in arms if arm.ratio_ci]
    if aa:
        pairs.append((aa["ratio"], aa["ci"]))
    return max((half_width(*pair) for pair in pairs), default=None)


def available_MiB(device: str) -> float | None:
    """Free memory of the device; None where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**20
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable:")), None)
