"""Rounds on a synthetic clock: how often the A/A interval holds the truth, a slow-down that is known, when timing
stops, and what a record keeps whatever happens to its file."""

import itertools
import json
import statistics

import numpy as np
import pytest

from lora_fast.profiler.intervals import (
    CONFIDENCE_AT_TARGET,
    half_width,
    median_interval,
    quotient_with_interval,
    ratio_with_interval,
)
from lora_fast.profiler.profile import Arm
from lora_fast.profiler.rounds import MAX_WARM_UP, MIN_ROUNDS_AT_TARGET, MIN_WARM_UP, Record, Stop, run_rounds
from lora_fast.profiler.time_pass import with_times_so_far

ARMS = ("r4", "r64", "full", "full again")


class Clock:
    """Step times of a machine that others use too, in ms: each arm's own cost, times how slow the machine is just then.

    That is exp of a walk that forgets (an AR(1) process over the steps, whatever arm they are of: frequency, heat,
    neighbours), of bursts that double the time of some thirty steps in a row (another process), and of jitter that only
    slows. At the default a step's neighbour is correlated with 0.9, and every third round has a burst in it."""

    def __init__(self, seed, cost=None, correlation=0.9, drift=0.05, bursts=0.003, jitter=0.01, steps=4000):
        rng = np.random.default_rng(seed)
        shocks = drift * (1 - correlation**2) ** 0.5 * rng.standard_normal(steps)
        walk = np.empty(steps)
        walk[0] = drift * rng.standard_normal()
        for i in range(1, steps):
            walk[i] = correlation * walk[i - 1] + shocks[i]
        slow = np.zeros(steps)
        for start in np.flatnonzero(rng.random(steps) < bursts):
            slow[start : start + rng.geometric(1 / 30)] = np.log(2)
        self.factors = np.exp(walk + slow + jitter * np.abs(rng.standard_normal(steps)))
        self.cost, self.taken, self.now = cost or {}, 0, 0.0

    def step(self, name):
        taken = 100.0 * self.cost.get(name, 1.0) * self.factors[self.taken]
        self.taken += 1
        self.now += taken / 1e3
        return {"step_ms": float(taken)}


def run(clock, stop, arms=ARMS, seed=0, record=None):
    record = record or Record()
    run_rounds(arms, clock.step, stop, record, seed=seed, clock=lambda: clock.now)
    return record


def covered(runs, stop, confidence=0.95, **machine):
    """The share of runs whose A/A interval holds 1."""
    hits = 0
    for number in range(runs):
        record = run(Clock(number, **machine), stop, seed=number)
        _, (low, high) = ratio_with_interval(record.series("full again"), record.series("full"), confidence)
        hits += low <= 1 <= high
    return hits / runs


@pytest.mark.parametrize("rounds", [6, 15, 30])
def test_the_aa_interval_covers_as_often_as_it_says(rounds):
    assert 0.93 <= covered(1000, Stop(rounds)) <= 0.97


@pytest.mark.parametrize(
    "machine", [{"correlation": 0.99, "drift": 0.3}, {"correlation": 0.0, "bursts": 0.0}, {"bursts": 0.05}]
)
def test_it_does_so_on_other_machines(machine):
    assert 0.93 <= covered(1000, Stop(20), **machine) <= 0.97


def test_stopping_at_a_width_costs_no_coverage():
    stop = Stop(200, target_ci=0.02, baseline="full")
    assert 0.93 <= covered(1000, stop, CONFIDENCE_AT_TARGET, steps=900) <= 0.97


def test_without_rounds_the_same_clock_would_fool_us():
    """One arm after the other, on the machine whose speed changes over some hundred steps."""
    hits = 0
    for number in range(200):
        clock = Clock(number, correlation=0.99, drift=0.3)
        one, other = ([clock.step("full")["step_ms"] for _ in range(30)] for _ in range(2))
        _, (low, high) = ratio_with_interval(one, other)
        hits += low <= 1 <= high
    assert hits / 200 < 0.6


@pytest.mark.parametrize(("cost", "sign"), [(1.05, 1), (1 / 1.05, -1)])
def test_a_slow_down_of_five_percent_is_found_with_its_sign(cost, sign):
    found = 0
    for number in range(100):
        record = run(Clock(number, {"r4": cost}), Stop(60), seed=number)
        ratio, (low, high) = ratio_with_interval(record.series("r4"), record.series("full"))
        assert (ratio - 1) * sign > 0 and low < cost * 1.03 and high > cost / 1.03
        found += low > 1 if sign > 0 else high < 1
    assert found >= 95


def test_the_interval_is_that_of_the_binomial_where_it_can_be():
    """n = 9: from the 2nd to the 8th value holds the median with 1 − 2·(1 + 9)/2⁹ = 0.9609."""
    values = np.arange(1.0, 10.0) ** 2
    assert median_interval(values[::-1], 1 - 20 / 512) == (4.0, 64.0)
    low, high = median_interval(values, 0.95)
    assert 4 < low < 9 and 49 < high < 64  # and a little less at 0.95
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert median_interval([5.0]) == (5.0, 5.0)


def test_a_quotient_of_ratios_has_the_wider_interval():
    ratio, (low, high) = quotient_with_interval((1.2, (1.1, 1.4)), (0.8, (0.75, 0.9)))
    assert ratio == pytest.approx(1.5)
    assert np.log(1.5 / low) ** 2 == pytest.approx(np.log(1.2 / 1.1) ** 2 + np.log(0.9 / 0.8) ** 2)
    assert np.log(high / 1.5) ** 2 == pytest.approx(np.log(1.4 / 1.2) ** 2 + np.log(0.8 / 0.75) ** 2)


def test_timing_stops_at_what_comes_first():
    assert len(run(Clock(0), Stop(7)).rounds) == 7
    assert run(Clock(0), Stop(7)).stopped == "rounds"
    record = run(Clock(0), Stop(500, budget_s=20.0))  # of 0.4 s a round, warm-up among them
    assert record.stopped == "time budget" and 30 <= len(record.rounds) + record.warm_ups[0]["rounds"] <= 52
    assert len(run(Clock(0), Stop(500, budget_s=1e-9)).rounds) == 6

    stop = Stop(500, budget_s=1e6, target_ci=0.02, baseline="full")
    record = run(Clock(0), stop)
    assert record.stopped == "target" and MIN_ROUNDS_AT_TARGET <= len(record.rounds) < 500

    def widths(rounds):
        """Of every arm's interval after so many rounds."""
        full = record.series("full")[:rounds]
        pairs = [
            ratio_with_interval(record.series(n)[:rounds], full, CONFIDENCE_AT_TARGET) for n in ARMS if n != "full"
        ]
        return [half_width(*pair) for pair in pairs]

    assert max(widths(len(record.rounds))) <= 0.02 < max(widths(len(record.rounds) - 1))


def test_how_many_rounds_are_left_is_told_by_the_budget():
    told, clock = [], Clock(0)
    record, stop = Record(), Stop(500, budget_s=20.0)
    run_rounds(
        ARMS,
        clock.step,
        stop,
        record,
        clock=lambda: clock.now,
        progress=lambda done, total, _: told.append((done, total)),
    )
    done = len(record.rounds)
    assert told[0] == (0, 500) and [so_far for so_far, _ in told if so_far] == list(range(1, done + 1))
    assert all(so_far < total <= 500 for so_far, total in told)
    later = [total for so_far, total in told if so_far > done / 3]
    assert all(0.7 * done <= total <= 1.4 * done for total in later), (done, later)
    told.clear()
    run_rounds(
        ARMS, clock.step, Stop(9), Record(), clock=lambda: clock.now, progress=lambda done, total, _: told.append(total)
    )
    assert set(told) == {9}


def test_the_rule_does_not_look_at_ratios():
    """The same noise stops after the same rounds, whatever an arm costs."""
    stop = Stop(500, target_ci=0.03, baseline="full")
    lengths = {len(run(Clock(3, {"r4": cost}), stop).rounds) for cost in (0.5, 0.98, 1.0, 1.02, 3.0)}
    assert len(lengths) == 1


def test_warm_up_ends_when_medians_stay():
    class Compiles(Clock):
        """Its first steps take long, and ever less so, or the first alone."""

        def __init__(self, slow):
            super().__init__(0, drift=0.0, bursts=0.0)
            self.slow, self.count = slow, dict.fromkeys(ARMS, 0)

        def step(self, name):
            number = self.count[name]
            self.count[name] += 1
            factor = self.slow[number] if number < len(self.slow) and name == "r4" else 1.0
            return {"step_ms": super().step(name)["step_ms"] * factor}

    def warm_up(*slow):
        record = run(Compiles(slow), Stop(6))
        assert all(value < 110 for value in record.series("r4")) == record.warm_ups[0]["stable"]
        return record.warm_ups

    assert warm_up() == [{"rounds": MIN_WARM_UP, "stable": True}]
    assert warm_up(50.0) == [{"rounds": 4, "stable": True}]
    assert warm_up(9.0, 6.0, 3.0, 2.0, 1.5) == [{"rounds": 8, "stable": True}]
    assert warm_up(*(2.0 ** (12 - i) for i in range(13))) == [{"rounds": MAX_WARM_UP, "stable": False}]


def test_a_record_is_whole_wherever_its_file_was_cut_off(tmp_path):
    file = tmp_path / "rounds.jsonl"
    clock = Clock(1)
    whole = run(clock, Stop(8), record=Record.open(file))
    text = file.read_bytes()
    assert Record.open(file).rounds == whole.rounds and Record.open(file).stopped == "rounds"
    starts = [i + 1 for i in range(len(text)) if text[i : i + 1] == b"\n"]
    for cut in (0, 1, starts[5] - 1, starts[5], starts[-3] - 7, starts[-2] + 3, len(text) - 1):
        file.write_bytes(text[:cut])
        record = Record.open(file)
        assert record.rounds == whole.rounds[: len(record.rounds)]
        assert len(record.rounds) == sum(line.startswith(b'{"round"') for line in text[:cut].split(b"\n")[:-1])
        again = run(clock, Stop(8), record=record)
        assert len(again.rounds) == 8 and again.rounds[: len(record.rounds)] == record.rounds
        assert Record.open(file).rounds == again.rounds
        assert all(json.loads(line) for line in file.read_text().splitlines())


def test_a_finished_record_is_left_alone(tmp_path):
    run(Clock(1), Stop(8), record=Record.open(tmp_path / "r"))
    before = (tmp_path / "r").read_bytes()
    clock = Clock(2)
    run(clock, Stop(8), record=Record.open(tmp_path / "r"))
    assert clock.taken == 0 and (tmp_path / "r").read_bytes() == before


def test_a_record_is_looked_at_while_another_process_writes_it(tmp_path):
    file = tmp_path / "r"
    assert Record.look(file).rounds == []
    rounds = [
        {"r1": {"step_ms": ms}, "full": {"step_ms": 2 * ms + extra}} for ms, extra in ((1.0, 1), (3.0, 0), (2.0, -1))
    ]
    half = b'{"round": {"r1": {"step_ms": 9'
    content = b"".join(json.dumps({"round": one}).encode() + b"\n" for one in rounds) + half
    file.write_bytes(content)
    record = Record.look(file)
    assert record.rounds == rounds and file.read_bytes() == content
    record.add("at", "r1")
    assert file.read_bytes() == content  # it is the other's to write
    arms = [Arm("lora", 1, 10, 0.1), Arm("lora", 8, 80, 0.5, step_ms=7.0), Arm("full", None, 100, 1.0)]
    one, eight, full = with_times_so_far(arms, record)
    assert (one.step_ms, full.step_ms, full.ratio_to_full) == (2.0, 3.0, 1.0)
    assert one.ratio_to_full == statistics.median([1 / 3, 3 / 6, 2 / 3]) and arms[0].step_ms is None
    assert (eight.step_ms, eight.ratio_to_full) == (7.0, None)


def test_a_record_says_who_was_at_work_and_who_failed(tmp_path):
    counts = itertools.count()

    def step(name):
        if name == "r64" and next(counts) == 5:
            raise MemoryError
        return {"step_ms": 1.0}

    failures = []
    record = Record.open(tmp_path / "r")
    run_rounds(ARMS, step, Stop(10), record, on_failure=failures.append)
    again = Record.open(tmp_path / "r")
    assert failures == ["r64"] and again.failed["r64"]["status"] == "oom"
    assert len(again.series("full")) == 10 and again.at is None
    again.add("at", "full")
    assert Record.open(tmp_path / "r").at == "full"
