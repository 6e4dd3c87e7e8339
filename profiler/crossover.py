"""The rank from which LoRA is no longer cheaper than full fine-tuning, for one cost (time or memory).

Cost can only grow with the rank, so measured ratios are first made non-decreasing by the pool-adjacent-violators rule
(the least-squares non-decreasing fit; Barlow et al. 1972), which keeps noise from inventing several crossings. The
crossover is then bracketed by the last rank whose ratio to full is below 1 and the next measured one, and placed
between them on a straight line in r: a step's FLOPs and bytes are a constant plus a multiple of r."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from lora_fast.profiler.intervals import interval

BRACKETED, NEVER, ALWAYS, UNMEASURED = "bracketed", "none up to r_max", "at every measured rank", "not measured"


@dataclass(frozen=True)
class Crossover:
    """status: "bracketed"; "none up to r_max": LoRA is cheaper at every measured rank; "at every measured rank": at
    none; "not measured": a side is missing, and reason says which.
    bracket: the last rank at which LoRA is cheaper and the first from which it is not; None at an open end.
    rank: the crossing by interpolation. interval: its 95% interval; None at an end outside the measured ranks."""

    status: str
    bracket: tuple[int | None, int | None] = (None, None)
    rank: float | None = None
    interval: tuple[float | None, float | None] | None = None
    r_min: int | None = None
    r_max: int | None = None
    reason: str | None = None

    def to_dict(self) -> dict:
        return asdict(self)

    def sentence(self, cost: str) -> str:
        """One sentence for people; cost is "time" or "memory"."""
        if self.status == UNMEASURED:
            return f"{cost}: no crossover, because {self.reason}"
        if self.status == NEVER:
            text = f"{cost}: none up to r={self.r_max}; LoRA is cheaper than full fine-tuning at every measured rank"
        elif self.status == ALWAYS:
            text = (
                f"{cost}: LoRA is not cheaper than full fine-tuning even at r={self.r_min}, the smallest rank measured"
            )
        else:
            low, high = self.bracket
            where = (
                f"at r≈{self.rank:.0f}, between r={low} and r={high}" if self.rank else f"between r={low} and r={high}"
            )
            text = f"{cost}: LoRA stops being cheaper than full fine-tuning {where}"
        return text + self._interval_text()

    def _interval_text(self) -> str:
        if self.interval is None:
            return ""
        low, high = self.interval
        left = f"below {self.r_min}" if low is None else f"{low:.0f}"
        right = f"above {self.r_max}" if high is None else f"{high:.0f}"
        return f" (95% CI {left} to {right})"


def non_decreasing(values: Sequence[float]) -> list[float]:
    """The non-decreasing sequence nearest to values in least squares (pool adjacent violators)."""
    blocks: list[list[float]] = []  # [mean, count]
    for value in values:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, count = blocks.pop()
            previous, before = blocks[-1]
            blocks[-1] = [(previous * before + mean * count) / (before + count), before + count]
    return [mean for mean, count in blocks for _ in range(int(count))]


def crossing(ranks: Sequence[int], logs: Sequence[float]) -> tuple[int | None, int | None, float]:
    """Where ln(ratio to full) passes 0: (lo, hi, r), with r -inf below the first rank and +inf above the last."""
    smooth = non_decreasing(logs)
    if smooth[0] >= 0:
        return None, ranks[0], -math.inf
    if smooth[-1] < 0:
        return ranks[-1], None, math.inf
    i = max(index for index, value in enumerate(smooth) if value < 0)
    low, high = math.exp(smooth[i]), math.exp(smooth[i + 1])
    return ranks[i], ranks[i + 1], ranks[i] + (1 - low) / (high - low) * (ranks[i + 1] - ranks[i])


def crossover(ranks: Sequence[int], logs: Sequence[float], draws: np.ndarray | None = None) -> Crossover:
    """From ln(ratio to full) at ascending ranks; draws (resamples, ranks), if there is noise, gives the interval.

    An entry of +inf is a rank that ran out of memory where full fine-tuning did not: it brackets, uninterpolated."""
    if not ranks:
        return Crossover(UNMEASURED, reason="no rank was measured")
    finite = [i for i, value in enumerate(logs) if not math.isinf(value)]
    low, high, rank = None, ranks[0], -math.inf
    if finite:
        low, high, rank = crossing([ranks[i] for i in finite], [logs[i] for i in finite])
    if high is None:
        high = next((r for r, value in zip(ranks, logs, strict=True) if math.isinf(value) and r > low), None)
    bounds = None
    if draws is not None:
        ends = interval(np.array([crossing(ranks, row)[2] for row in draws]))
        # Every draw beyond the same end says no more than the status does.
        if not (math.isinf(ends[0]) and ends[0] == ends[1]):
            bounds = tuple(None if math.isinf(end) else end for end in ends)
    status = ALWAYS if low is None else NEVER if high is None else BRACKETED
    return Crossover(
        status,
        bracket=(low, high),
        rank=rank if math.isfinite(rank) else None,
        interval=bounds,
        r_min=ranks[0],
        r_max=ranks[-1],
    )
