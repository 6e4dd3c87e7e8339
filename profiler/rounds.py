"""Randomized rounds: every arm takes one step a round, in a new random order; each round is kept as soon as it ends.

Timing one arm after the other is wrong where it looks best: on a busy machine it gave 0.38 of full fine-tuning with a
tight interval where the truth was 0.93. Here each round steps every arm once, and only ratios within a round are
compared, so that a disturbance of the whole round cancels. The random order makes what is left independent from round
to round, even where the disturbances last for many rounds: which of two arms meets more of them is a coin's toss."""

import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lora_fast.profiler.intervals import CONFIDENCE_AT_TARGET, MIN_ROUNDS, half_width, ratio_with_interval
from lora_fast.profiler.workload import describe

# Rounds before the first timed one. What is compiled, tuned or allocated once shows in a step that takes longer;
# warm-up ends once no arm's median over three rounds differs from the one before by more than STABLE.
MIN_WARM_UP, MAX_WARM_UP = 3, 10
STABLE = 0.10
# Of a time budget, what warm-up may take.
WARM_UP_SHARE = 0.25
# Widths of fewer rounds' intervals say little, and a width decides when to stop.
MIN_ROUNDS_AT_TARGET = 10


@dataclass(frozen=True)
class Stop:
    """When to stop: after `rounds`; or after budget_s seconds, once there are `least` rounds; or once the interval of
    every arm's ratio to `baseline` has a half-width of at most target_ci of the ratio. final: unless more rounds are
    to follow in another process.

    No rule looks at a ratio, so that none favours a result. The last looks at widths, which favours intervals that
    came out narrow by chance: these are therefore asked for more than 95% (`CONFIDENCE_AT_TARGET`)."""

    rounds: int
    budget_s: float | None = None
    target_ci: float | None = None
    baseline: str | None = None
    least: int = MIN_ROUNDS
    final: bool = True

    def reached(self, series: Mapping[str, Sequence[float]]) -> bool:
        """Whether all ratios of these step times are known as well as asked for."""
        base = series.get(self.baseline)
        if self.target_ci is None or base is None or len(base) < MIN_ROUNDS_AT_TARGET:
            return False
        return all(
            half_width(*ratio_with_interval(values, base, CONFIDENCE_AT_TARGET)) <= self.target_ci
            for name, values in series.items()
            if name != self.baseline
        )


@dataclass
class Record:
    """What was timed, in memory and, if there is a file, in it: one line of JSON per round, appended as the round ends.

    A process that is killed leaves a file from which the next one goes on; a line that was cut off is dropped. The file
    also says which arm is at work, and so whose fault an end was. Ratios are formed within a round, so rounds of
    several processes may stand in one series."""

    path: Path | None = None
    rounds: list[dict[str, dict[str, float]]] = field(default_factory=list)
    failed: dict[str, dict] = field(default_factory=dict)
    warm_ups: list[dict] = field(default_factory=list)
    stopped: str | None = None
    at: str | None = None
    product_tflops_s: float | None = None

    @classmethod
    def open(cls, path: Path | None) -> "Record":
        """To go on with what the file holds."""
        record = cls(path)
        if path is not None and path.exists():
            path.write_bytes(b"".join(record._read()))
        return record

    @classmethod
    def look(cls, path: Path) -> "Record":
        """What the file holds so far, while another process appends to it."""
        record = cls(path)
        if path.exists():
            record._read()
        record.path = None  # not to be written to
        return record

    def _read(self) -> list[bytes]:
        """The lines that are whole."""
        whole = []
        for line in self.path.read_bytes().split(b"\n")[:-1]:  # behind the last newline is a line that was cut off
            try:
                entry = json.loads(line)
            except ValueError:  # as a full disk leaves it
                continue
            self._take(entry)
            whole.append(line + b"\n")
        return whole

    def _take(self, entry: dict) -> None:
        kind, value = next(iter(entry.items()))
        if kind == "at":
            self.at = value
            return
        self.at = None
        if kind == "round":
            self.rounds.append(value)
        elif kind == "failed":
            self.failed |= value
        elif kind == "warm_up":
            self.warm_ups.append(value)
        elif kind == "product_tflops_s":
            self.product_tflops_s = value
        else:
            self.stopped = value

    def add(self, kind: str, value) -> None:
        """kind: "round", {arm: {series: value}}; "failed", {arm: status}; "at", an arm; "warm_up"; "stopped";
        "product_tflops_s", of the machine."""
        self._take({kind: value})
        if self.path is not None:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({kind: value}) + "\n")
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from error  # a full disk's names no file

    def series(self, name: str, of: str = "step_ms") -> list[float]:
        return [taken[name][of] for taken in self.rounds if name in taken and of in taken[name]]


def run_rounds(
    names: Sequence[str],
    step: Callable[[str], dict[str, float]],
    stop: Stop,
    record: Record,
    *,
    seed: int = 0,
    on_failure: Callable[[str], None] = lambda name: None,
    between: Callable[[], None] = lambda: None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Warm up, then step every arm once a round until `stop` says so; rounds that the record holds already count.

    step(name) takes one step and returns {"step_ms": …} and perhaps other series; an arm whose step raises gets its
    status in the record, and on_failure(name), and is not tried again. between: called after each round. progress: the
    timed rounds, how many there will be at most, as far as the budget lets tell, and a word on them."""
    # A record that is taken up again goes on with other orders.
    order = random.Random(seed + len(record.rounds))
    left = [name for name in names if name not in record.failed]
    started, already = clock(), len(record.rounds)

    def report(text: str) -> None:
        done, expected = len(record.rounds), stop.rounds
        if stop.budget_s is not None and done > already:
            in_budget = already + math.ceil(stop.budget_s * (done - already) / max(clock() - started, 1e-9))
            expected = min(expected, max(in_budget, stop.least, done + 1))
        progress(done, expected, text)

    def spent(share: float = 1.0) -> bool:
        return stop.budget_s is not None and clock() - started > share * stop.budget_s

    def one_round() -> dict[str, dict[str, float]]:
        taken = {}
        order.shuffle(left)
        for name in list(left):
            record.add("at", name)
            try:
                taken[name] = step(name)
            except Exception as error:
                record.add("failed", {name: describe(error)})
                left.remove(name)
                on_failure(name)
        between()
        return taken

    def why() -> str | None:
        done = len(record.rounds)
        if done >= stop.rounds:
            return "rounds"
        if done >= stop.least and spent():
            return "time budget"
        return "target" if stop.reached({name: record.series(name) for name in left}) else None

    if record.stopped or why() == "rounds":
        return
    warming: list[dict[str, float]] = []
    while left and len(warming) < MAX_WARM_UP and not _warm(warming):
        if len(warming) >= MIN_WARM_UP and spent(WARM_UP_SHARE):
            break
        report(f"warm-up {len(warming) + 1}")
        warming.append({name: sample["step_ms"] for name, sample in one_round().items()})
    record.add("warm_up", {"rounds": len(warming), "stable": _warm(warming)})
    while left and why() is None:
        record.add("round", one_round())
        report(f"{len(left)} arms a round")
    if stop.final:
        record.add("stopped", why())


def _warm(rounds: list[dict[str, float]]) -> bool:
    """Whether each arm's median over the last three rounds is that of the three before the last, within STABLE."""
    if len(rounds) < MIN_WARM_UP:
        return False
    for name in rounds[-1]:
        values = [taken[name] for taken in rounds if name in taken]
        now, before = np.median(values[-3:]), np.median(values[-4:-1])
        if abs(math.log(now / before)) > STABLE:
            return False
    return True
