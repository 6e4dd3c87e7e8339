"""The largest batch and the largest length of an arm's step that a memory holds, and the largest rank.

Each moment of a step takes a number of bytes that is linear in the rank and in the batch and quadratic in the length
(predict.combined), so a handful of traced steps tells every size of every rank. Where steps of different sizes don't
consist of the same moments, and where what follows from others is not what a trace of the answer says, each size that
is looked at is traced."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lora_fast.profiler.models import ModelSource
from lora_fast.profiler.predict import Traced, combined, trace
from lora_fast.profiler.workload import Workload

BATCH, LENGTH = "batch_size", "seq_len"
UNITS = {BATCH: 1, LENGTH: 64}
# A trace of the answer and what was combined from others differ by less: the allocator rounds each storage up.
TOLERANCE = 1e-3
# No size is larger.
MOST = 2**31
# Guesses along a line, from which on the interval is halved.
GUESSES = 6


class Peaks:
    """Peak bytes of arms at sizes other than the workload's; rank None is full fine-tuning.

    steps: of every arm, as traced at the workload. longest: the model's positions, None without a bound."""

    def __init__(
        self,
        source: ModelSource,
        workload: Workload,
        steps: dict[int | None, Traced],
        longest: int | None,
        **how: Any,  # as `trace` takes it
    ):
        self.source, self.workload, self.longest, self.how = source, workload, longest, how
        self._traced = {(rank, self._sizes()): step for rank, step in steps.items()}
        ranks = sorted(rank for rank in steps if rank is not None)
        self._ends = (ranks[0], ranks[-1]) if len(ranks) > 2 else ()
        # Whether combined steps can be relied on: for ranks; by size, for full fine-tuning and for all ranks.
        self._trusted: dict[object, bool] = {}

    def fits(self, rank: int | None, room: int) -> dict:
        """{"fits": whether the workload does, "largest_batch_size", "largest_seq_len": the other size as it is; 0 where
        none fits}; room in bytes."""
        return {
            "fits": self._trace(rank).extended().peak <= room,
            **{f"largest_{name}": self._largest(rank, name, room) for name in UNITS},
        }

    def largest_rank(self, room: int, most: int) -> int:
        """The largest rank, at most `most`, at the workload's sizes; 0: none; room in bytes."""
        ranks = sorted(rank for rank, _ in self._traced if rank is not None)
        nodes = (ranks[0], ranks[-1] if len(ranks) > 1 else 2 * ranks[0])

        def told(rank: int) -> Traced | None:
            return combined([self._trace(node) for node in nodes], lagrange(nodes, rank))

        return self._search("rank", told, self._trace, room, 1, nodes[0], most)

    def _largest(self, rank: int | None, name: str, room: int) -> int:
        between, at, unit = self._between(rank), getattr(self.workload, name), UNITS[name]
        most = self.longest if name == LENGTH and self.longest is not None else MOST
        if at <= unit and self._trace(rank).extended().peak > room:
            return 0

        def told(size: int) -> Traced | None:
            return self._combined(between, rank, name, size)

        def traced(size: int) -> Traced:
            return self._trace(rank, name, size)

        return self._search((rank is None, name), told, traced, room, unit, at, most)

    def _search(
        self,
        kind: object,
        told: Callable[[int], Traced | None],
        traced: Callable[[int], Traced],
        room: int,
        unit: int,
        start: int,
        most: int,
    ) -> int:
        """`largest`, by what others tell of a size; by traces where a trace of the answer says otherwise, which is
        asked once of a kind."""

        def by_others(size: int) -> int:
            return told(size).extended().peak

        def by_trace(size: int) -> int:
            return traced(size).extended().peak

        if kind not in self._trusted:
            self._trusted[kind] = told(start + unit) is not None
            if self._trusted[kind] and (found := largest(by_others, room, unit, start, most)):
                self._trusted[kind] = abs(by_others(found) - by_trace(found)) <= TOLERANCE * by_trace(found)
        return largest(by_others if self._trusted[kind] else by_trace, room, unit, start, most)

    def _between(self, rank: int | None) -> tuple[int | None, ...]:
        """The ranks whose steps tell this one's: the ends, where they do so at the workload's sizes."""
        if rank is None or not self._ends or rank in self._ends:
            return (rank,)
        told = combined([self._trace(end) for end in self._ends], lagrange(self._ends, rank))
        own = self._trace(rank).extended().peak
        return self._ends if told and abs(told.extended().peak - own) <= TOLERANCE * own else (rank,)

    def _nodes(self, name: str) -> tuple[int, ...]:
        """Sizes that tell others. One sequence is no node: it is viewed where several are copied."""
        if name == BATCH:
            return (2, 3)
        at, unit = self.workload.seq_len, UNITS[LENGTH]
        if self.longest is None or 3 * at <= self.longest:
            return (at, 2 * at, 3 * at)
        step = at // (3 * unit) * unit or at // 4
        return (at - 2 * step, at - step, at) if step else (at,)

    def _combined(self, between: Sequence[int | None], rank: int | None, name: str, size: int) -> Traced | None:
        if name == BATCH and size == 1:
            return self._trace(rank, name, size)
        nodes = self._nodes(name)
        by_rank = lagrange(between, rank) if len(between) > 1 else [1]
        parts = [self._trace(end, name, node) for end in between for node in nodes]
        return combined(parts, [a * b for a in by_rank for b in lagrange(nodes, size)])

    def _sizes(self, name: str = BATCH, size: int | None = None) -> tuple[int, int]:
        work = self.workload if size is None else replace(self.workload, **{name: size})
        return work.batch_size, work.seq_len

    def _trace(self, rank: int | None, name: str = BATCH, size: int | None = None) -> Traced:
        """At this size, or at the workload's."""
        key = rank, self._sizes(name, size)
        if key not in self._traced:
            work = self.workload if size is None else replace(self.workload, **{name: size})
            self._traced[key] = trace(self.source, work, rank, **self.how)
        return self._traced[key]


def lagrange(nodes: Sequence[float], at: float) -> list[float]:
    """The weights of a polynomial's values at `nodes` in its value at `at`."""
    weights = []
    for node in nodes:
        weight = 1.0
        for other in nodes:
            if other != node:
                weight *= (at - other) / (node - other)
        weights.append(weight)
    return weights


def largest(peak: Callable[[int], int], room: int, unit: int, start: int, most: int) -> int:
    """The largest multiple of `unit`, at most `most`, whose peak, which grows with it, is within `room`; 0: none.

    Peaks are nearly linear: the line through the two that are nearest to `room` says where to look next, until one
    multiple fits and the next one doesn't."""
    known: dict[int, int] = {}
    fits, beyond = 0, most // unit + 1  # in units
    guess = max(1, start // unit)
    while beyond - fits > 1:
        guess = min(max(guess, fits + 1), beyond - 1)
        known[guess] = peak(guess * unit)
        if known[guess] <= room:
            fits = guess
        else:
            beyond = guess
        if len(known) == 1:
            guess = 2 * guess if fits else guess // 2
            continue
        (a, low), (b, high) = sorted(known.items(), key=lambda point: abs(point[1] - room))[:2]
        if high == low or len(known) > GUESSES:
            guess = min(2 * fits, (fits + beyond) // 2) if fits else beyond // 2
        else:
            guess = int(a + (room - low) * (b - a) / (high - low))
    return fits * unit
