"""The rank from which LoRA is no longer cheaper than full fine-tuning, for each cost: time, measured or projected,
FLOPs, memory.

Cost can only grow with the rank, so measured ratios are first made non-decreasing by the pool-adjacent-violators rule
(the least-squares non-decreasing fit; Barlow et al. 1972), which keeps noise from inventing several crossings. The
crossover is then bracketed by the last rank whose ratio to full is below 1 and the next measured one, and placed
between them on a straight line in r: a step's FLOPs and bytes are a constant plus a multiple of r."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from lora_fast.profiler.intervals import interval, log_ratios, resampled_medians

# What each cost is called in a sentence.
COSTS = {"time": "time", "projected": "projected time", "flops": "FLOPs", "memory": "memory"}
# Shares of all parameters, the adapter's included, at which the guide “LoRA微调中的Rank临界点与全量训练决策” calls an
# adapter large enough to think of full fine-tuning: 10% to 20%.
SHARES = (0.10, 0.20)
BRACKETED, NEVER, ALWAYS, UNMEASURED = "bracketed", "none up to r_max", "at every measured rank", "not measured"
HIDDEN = "hidden by noise"


@dataclass(frozen=True)
class Crossover:
    """status: "bracketed"; "none up to r_max": LoRA is cheaper at every measured rank; "at every measured rank": at
    none; "not measured": a side is missing, and reason says which; "hidden by noise": what is shown in place of one
    that noise may have made.
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
        """One sentence for people; cost is what the cost is called, such as "memory"."""
        if self.status == UNMEASURED:
            return f"{cost}: no crossover, because {self.reason}"
        if self.status == HIDDEN:
            return f"{cost}: not told apart from noise"
        if self.status == NEVER:
            text = f"{cost}: none up to r={self.r_max}; LoRA is cheaper than full fine-tuning at every rank tried"
        elif self.status == ALWAYS:
            text = f"{cost}: LoRA is not cheaper than full fine-tuning even at r={self.r_min}, the smallest rank tried"
        else:
            low, high = self.bracket
            where = (
                f"at r≈{self.rank:.0f}, between r={low} and r={high}" if self.rank else f"between r={low} and r={high}"
            )
            text = f"{cost}: LoRA stops being cheaper than full fine-tuning {where}"
        return text + self._interval_text()

    @property
    def short(self) -> str:
        """The answer in a word: "59 [49–67]", "220", "64–512", ">256", "<1", "in the noise", "–"."""
        if self.status == UNMEASURED:
            return "–"
        if self.status == HIDDEN:
            return "in the noise"
        if self.status == NEVER:
            return f">{self.r_max}"
        if self.status == ALWAYS:
            return f"<{self.r_min}"
        if self.rank is None:
            return "–".join(map(str, self.bracket))
        if self.interval is None:
            return f"{self.rank:.0f}"
        low, high = self.interval
        left = f"<{self.r_min}" if low is None else f"{low:.0f}"
        right = f">{self.r_max}" if high is None else f"{high:.0f}"
        return f"{self.rank:.0f} [{left}–{right}]"

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


def crossovers(arms: Sequence, seed: int) -> dict[str, Crossover]:
    """The crossover of each of COSTS, from a profile's Arms, of "projected" where it was; seed draws the interval of
    time's.

    Time is measured and has noise, so its crossover has an interval; the others are the same in every step."""
    full = next(arm for arm in arms if arm.kind == "full")
    lora = [arm for arm in arms if arm.kind == "lora"]
    found = {
        "time": _of_time(full, lora, seed),
        "projected": _of_ratios(lora, "projected_ratio"),
        "flops": _of_ratios(lora, "flops_ratio") or Crossover(UNMEASURED, reason="FLOPs were not counted"),
        "memory": _of_memory(full, lora),
    }
    return {cost: crossover for cost, crossover in found.items() if crossover is not None}


def _of_ratios(lora: list, field: str) -> Crossover | None:
    known = [(arm.rank, getattr(arm, field)) for arm in lora if getattr(arm, field) is not None]
    return crossover([rank for rank, _ in known], [math.log(ratio) for _, ratio in known]) if known else None


def _of_time(full, lora: list, seed: int) -> Crossover:
    timed = [arm for arm in lora if arm.ratio_to_full is not None]
    if not timed:
        return Crossover(UNMEASURED, reason=_missing(full, full.step_ms))
    ranks = [arm.rank for arm in timed]
    # A ratio that two processes measured has no common rounds to resample.
    if any(arm.ratio_via or len(arm.samples_ms) != len(full.samples_ms) for arm in timed) or not full.samples_ms:
        return crossover(ranks, [math.log(arm.ratio_to_full) for arm in timed])
    columns = np.stack([log_ratios(arm.samples_ms, full.samples_ms) for arm in timed], axis=1)
    return crossover(ranks, np.median(columns, axis=0).tolist(), resampled_medians(columns, seed=seed))


def _of_memory(full, lora: list) -> Crossover:
    sized = [arm for arm in lora if arm.memory_ratio is not None or (full.peak_MiB and arm.status == "oom")]
    if not sized:
        return Crossover(UNMEASURED, reason=_missing(full, full.peak_MiB))
    logs = [math.inf if arm.memory_ratio is None else math.log(arm.memory_ratio) for arm in sized]
    return crossover([arm.rank for arm in sized], logs)


def _missing(full, value: float | None) -> str:
    if full.status == "oom" and value is None:
        return "full fine-tuning ran out of memory"
    return "full fine-tuning was not measured" if value is None else "no rank was measured"


def ranks_of_shares(parameters: int, per_rank: int) -> dict[str, float]:
    """Ranks at which an adapter of r · per_rank parameters is each of SHARES of the whole: {"10%": r, "20%": r}."""
    return {f"{share:.0%}": share / (1 - share) * parameters / per_rank for share in SHARES}


def flops_ratio_at(arms: Sequence, rank: float) -> float | None:
    """A LoRA step's FLOPs against full's at any rank, from a profile's Arms: they are a constant plus a multiple of
    r, so that two ranks tell. None where there are not two."""
    known = [(arm.rank, arm.flops_ratio) for arm in arms if arm.kind == "lora" and arm.flops_ratio is not None]
    if len(known) < 2:
        return None
    (low, a), (high, b) = known[0], known[-1]
    return a + (rank - low) * (b - a) / (high - low)


def shares_sentence(ranks: dict[str, float], arms: Sequence) -> str:
    """What ranks_of_shares says, and what it does not."""
    text = f"Trained parameters pass {' and '.join(f'{share} of all at r≈{r:.0f}' for share, r in ranks.items())}"
    text += ": a warning sign by a rule of thumb, not a crossover"
    ratios = [flops_ratio_at(arms, rank) for rank in ranks.values()]
    if None not in ratios:
        text += f"; a LoRA step takes {' and '.join(f'{ratio:.2f}' for ratio in ratios)} of full's FLOPs there"
    return text + "."
