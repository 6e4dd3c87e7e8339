"""What a profile, a search and spectra say, in the few figures that a decision needs.

Each is taken as the object of this package or as its plain document (run.json, search.json, spectra.json)."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_fast.config import LoraFastError
from lora_fast.rank_search import FULL, SIGNIFICANT
from lora_fast.spectrum import Spectrum, readings
from lora_fast.training_curve import SLOW, falls_still, learned_nothing, read_training_curve

Rank = int | str
ENERGY = 0.99


@dataclass(frozen=True)
class Ratio:
    """A cost at one rank over that of full fine-tuning. bound: "" where it was measured there or lies between two ranks
    that were; "≤" below the smallest and "≥" above the largest rank measured (costs can only grow with the rank).
    interval: 95%, where this very rank was timed."""

    value: float
    bound: str = ""
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        text = f"{self.bound + ' ' if self.bound else ''}{self.value:.2f}"
        return text + (f" [{self.interval[0]:.2f}, {self.interval[1]:.2f}]" if self.interval else "")


@dataclass(frozen=True)
class Costs:
    """Of a profile or an estimate. time, flops, memory, projected (time that was not measured): ratio to full
    fine-tuning by rank. parameters: of the base; parameters_per_rank: Σ (K + N) over the adapted layers. noise: why
    its times say nothing, or None. oom: the least rank that ran out of memory; full_oom: whether full fine-tuning
    did, or doesn't fit. tokens_per_s: by rank, "full" among them. smallest_side: the least min(N, K) of the adapted
    layers, where the run says it."""

    model: str | None
    parameters: int
    parameters_per_rank: int | None
    estimated: bool
    time: Mapping[int, Ratio]
    flops: Mapping[int, Ratio]
    memory: Mapping[int, Ratio]
    tokens_per_s: Mapping[Rank, float]
    noise: str | None = None
    oom: int | None = None
    full_oom: bool = False
    usd_per_hour: float | None = None
    smallest_side: int | None = None
    projected: Mapping[int, Ratio] = field(default_factory=dict)


def ratio_at(ratios: Mapping[int, Ratio], rank: int) -> Ratio | None:
    """At a rank, on straight lines between those measured: a step's FLOPs and bytes are a constant plus a multiple of
    the rank."""
    if rank in ratios:
        return ratios[rank]
    below = max((r for r in ratios if r < rank), default=None)
    above = min((r for r in ratios if r > rank), default=None)
    if below is None and above is None:
        return None
    if below is None:
        return Ratio(ratios[above].value, "≤")
    if above is None:
        return Ratio(max(ratio.value for ratio in ratios.values()), "≥")
    low, high = ratios[below].value, ratios[above].value
    return Ratio(low + (high - low) * (rank - below) / (above - below))


def costs_of(profile: Any) -> Costs:
    """From a Profile or the content of a run.json. Raises LoraFastError for anything else."""
    run = _document(profile, "profile", "a Profile, or the content of a run.json")
    try:
        arms, work = run["arms"], run["workload"]
        lora = sorted((arm for arm in arms if arm["kind"] == "lora"), key=lambda arm: arm["rank"])
        full = next((arm for arm in arms if arm["kind"] == "full"), None)
        aa = run.get("aa")
        noise = None
        if aa is not None and aa["noise_floor"] > aa["limit"]:
            noise = f"two equal arms differed by up to {aa['noise_floor']:.0%}"
        return Costs(
            model=work.get("model"),
            parameters=int(work["parameters"]),
            parameters_per_rank=round(lora[0]["trainable"] / lora[0]["rank"]) if lora else None,
            estimated=work.get("method") == "estimated",
            time=_ratios(lora, "ratio_to_full", "ratio_ci"),
            projected=_ratios(lora, "projected_ratio"),
            flops=_ratios(lora, "flops_ratio"),
            memory=_ratios(lora, "memory_ratio"),
            tokens_per_s={
                arm["rank"] or FULL: arm["tokens_per_s"] for arm in (*lora, full) if _number(arm, "tokens_per_s")
            },
            noise=noise,
            oom=min((arm["rank"] for arm in lora if _does_not_fit(arm)), default=None),
            full_oom=full is not None and _does_not_fit(full),
            usd_per_hour=work.get("price_per_hour"),
            smallest_side=work.get("smallest_side"),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LoraFastError(f"profile is not the content of a run.json ({type(error).__name__}: {error})") from None


def _document(given: Any, name: str, expected: str) -> Mapping[str, Any]:
    found = given.to_dict() if hasattr(given, "to_dict") else given
    if not isinstance(found, Mapping):
        raise LoraFastError(f"{name} is a {type(given).__name__}; expected {expected}")
    return found


def _number(arm: Mapping | None, key: str) -> bool:
    value = None if arm is None else arm.get(key)
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def _ratios(arms: Sequence[Mapping], key: str, interval: str = "") -> dict[int, Ratio]:
    found = {}
    for arm in arms:
        if _number(arm, key):
            ends = arm.get(interval)
            found[arm["rank"]] = Ratio(arm[key], interval=None if ends is None else (ends[0], ends[1]))
    return found


def _does_not_fit(arm: Mapping) -> bool:
    return arm.get("status") == "oom" or (bool(arm.get("fits")) and not arm["fits"]["fits"])


# --------------------------------------------------------------------------------------------------------- quality


@dataclass(frozen=True)
class Point:
    """The mean of `count` trainings."""

    mean: float
    count: int


@dataclass(frozen=True)
class Curve:
    """Quality against rank. ranks: ascending, without full fine-tuning, which is `full`. noise: standard deviation
    between seeds. sign: 1 where smaller is better, -1 where larger is. seconds: of each whole training that ended.
    readings: (verdict, sentence) of `read_training_curve` for the trainings of a rank, where their curves were kept.
    unlearned: that hardly anything was learned, in words; unsettled: that the best was still falling at its end, or
    unstable; None where that is not so, or no losses by step are known.
    parameters: of the base; parameters_per_rank: Σ (K + N) over the adapted layers; where the search says them.
    is_pretraining: the model began with random weights, so that little is said of fine-tuning."""

    ranks: Mapping[int, Point]
    full: Point | None
    noise: float | None
    sign: int
    verdict: str
    sentence: str
    seconds: Mapping[Rank, tuple[float, ...]]
    readings: Mapping[Rank, tuple[str, str]] = field(default_factory=dict)
    unlearned: str | None = None
    unsettled: str | None = None
    parameters: int | None = None
    parameters_per_rank: int | None = None
    is_pretraining: bool = False

    def point(self, rank: Rank) -> Point:
        return self.full if rank == FULL else self.ranks[rank]

    def gain(self, before: Rank, after: Rank) -> float:
        """By how much `after` is better than `before`."""
        return self.sign * (self.point(before).mean - self.point(after).mean)

    def margin(self, *ranks: Rank) -> float:
        """What a difference of two means, or of one mean and a given number, must exceed to count."""
        if self.noise is None:
            return 0.0
        return SIGNIFICANT * self.noise * math.sqrt(sum(1 / self.point(rank).count for rank in ranks))

    def time_ratio(self, rank: int) -> Ratio | None:
        """Of a whole training to full fine-tuning's, means over the seeds; interval: the extremes of single trainings,
        where there are two of each."""
        one, full = self.seconds.get(rank), self.seconds.get(FULL)
        if not one or not full:
            return None
        ends = (min(one) / max(full), max(one) / min(full)) if min(len(one), len(full)) > 1 else None
        return Ratio(statistics.fmean(one) / statistics.fmean(full), interval=ends)

    def best(self, ranks: Sequence[int]) -> int:
        return min(ranks, key=lambda rank: (self.sign * self.ranks[rank].mean, rank))

    def sufficient(self, ranks: Sequence[int]) -> int:
        """The smallest of these ranks that is not worse than the best of them by more than the margin."""
        best = self.best(ranks)
        return next(rank for rank in sorted(ranks) if self.gain(rank, best) <= self.margin(rank, best))

    def reaches(self, rank: Rank, target: float) -> str:
        """Whether the mean there is as good as target: "yes", "no", or "unclear": no, by less than the noise."""
        missing = self.sign * (self.point(rank).mean - target)
        return "yes" if missing <= 0 else "no" if missing > self.margin(rank) else "unclear"

    @property
    def full_is(self) -> str | None:
        """ "better" or "worse" than the best rank by more than the noise, or "equal"; None where it was not tried."""
        if self.full is None or not self.ranks:
            return None
        best = self.best(list(self.ranks))
        gain, margin = self.gain(best, FULL), self.margin(best, FULL)
        return "better" if gain > margin else "worse" if -gain > margin else "equal"


def curve_of(search: Any) -> Curve | None:
    """From a RankSearch or its dict, by itself or as `search` of a larger document; None where no training gave a
    value. Raises LoraFastError for anything else."""
    document = _document(search, "search", "a RankSearch, or the content of a search.json")
    found = document.get("search", document)
    try:
        points = {point["rank"]: Point(float(point["mean"]), int(point["count"])) for point in found["points"]}
        if any(not math.isfinite(point.mean) or point.count < 1 for point in points.values()):
            raise ValueError("a point whose mean is no number")
        full = points.pop(FULL, None)
        seconds: dict[Rank, list[float]] = {}
        for trial in found.get("trials", ()):
            if trial.get("status") == "ok" and _number(trial, "seconds"):
                seconds.setdefault(trial["rank"], []).append(trial["seconds"])
        noise, model = found["noise"], document.get("model") or {}
        trained = [row for row in document.get("ranks", ()) if row["rank"] != FULL and row.get("trained")]
        curve = Curve(
            ranks={rank: points[rank] for rank in sorted(points)},
            full=full,
            noise=None if noise is None else float(noise),
            sign={"minimize": 1, "maximize": -1}[found["direction"]],
            verdict=str(found["verdict"]),
            sentence=str(found["sentence"]),
            seconds={rank: tuple(values) for rank, values in seconds.items()},
            readings={
                row["rank"]: (str(row["reading"]["verdict"]), str(row["reading"]["sentence"]))
                for row in document.get("ranks", ())
                if row.get("reading")
            },
            parameters=model.get("parameters"),
            is_pretraining=model.get("weights") == "random",
            parameters_per_rank=round(trained[0]["trained"] / trained[0]["rank"]) if trained else None,
        )
        if not points and full is None:
            return None
        return _with_state(curve, {row["rank"]: row for row in document.get("ranks", ())})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LoraFastError(f"search is not what a rank search writes ({type(error).__name__}: {error})") from None


def _with_state(curve: Curve, rows: Mapping[Rank, Mapping]) -> Curve:
    """With what the losses by step of the best arm, full fine-tuning among them, say of the trainings as such."""
    best = min((*curve.ranks, *([FULL] if curve.full else [])), key=lambda rank: curve.sign * curve.point(rank).mean)
    row = rows.get(best, {})
    train, evaluation = row.get("train") or (), row.get("evaluation") or ()
    losses = [float(loss) for _, loss in evaluation]
    if curve.sign != 1 or len(losses) < 2 or not all(map(math.isfinite, losses)):
        return curve
    noise, arm = curve.margin(best), "full fine-tuning" if best == FULL else f"r={best}"
    if learned_nothing(losses, noise):
        slow = losses[0] - min(losses) < SLOW * abs(losses[0])
        said = (
            f"hardly anything was learned: the held-out loss went from {losses[0]:.4g} to {min(losses):.4g} at best "
            f"({arm}), a fall {f'of less than {SLOW:.0%}' if slow else 'within the noise between seeds'}"
        )
        return replace(curve, unlearned=said, readings={})
    if read_training_curve(train, evaluation, noise=noise, full=True).verdict == "unstable":
        return replace(curve, unsettled=f"the training of the best, {arm}, was unstable")
    if (last := falls_still(losses, noise)) is not None:
        return replace(curve, unsettled=f"the held-out loss of the best, {arm}, still fell at the end, by {last:.2g}")
    return curve


# --------------------------------------------------------------------------------------------------------- spectra


@dataclass(frozen=True)
class Directions:
    """What the spectra of one run say. trained: the adapter's rank; None of a full fine-tune. needed: the rank that
    holds what every layer learned (99% of the energy of an adapter's update, 90% of a dense one), typical: the median
    layer's. says: (rule, verdict, sentence, source) for all layers together. parameters_per_rank: Σ (N + K).
    smallest_side: the least min(N, K)."""

    trained: int | None
    needed: int
    typical: int
    says: tuple[tuple[str, str, str, str], ...]
    parameters_per_rank: int
    smallest_side: int | None = None


def directions_of(spectra: Any) -> Directions | None:
    """From {name: Spectrum}, a sequence of them, or the content of a spectra.json; None where nothing was learned, or
    too few singular values are known. Raises LoraFastError for anything else."""
    values = list(spectra.values()) if isinstance(spectra, Mapping) and "layers" not in spectra else spectra
    if isinstance(values, Sequence) and all(isinstance(value, Spectrum) for value in values):
        found = [value.to_dict(singular_values=False) for value in values]
        said = [vars(reading) for reading in readings(values)]
        return _directions(found, said)
    document = _document(spectra, "spectra", "spectra by layer, or the content of a spectra.json")
    try:
        return _directions(document["layers"], document["readings"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LoraFastError(f"spectra is not the content of a spectra.json ({type(error).__name__}: {error})") from None


def _directions(layers: Sequence[Mapping], said: Sequence[Mapping]) -> Directions | None:
    live = [layer for layer in layers if layer["spectral_norm"] > 0]
    if not live:
        return None
    trained = [layer["rank"] for layer in live]
    dense = None in trained
    needed = [(layer["corrected"] or layer)["r90"] if dense else layer["r99"] for layer in live]
    if None in needed:
        return None
    group = said[0]["group"] if said else None
    return Directions(
        trained=None if dense else max(trained),
        needed=max(1, *needed),
        typical=max(1, round(statistics.median(needed))),
        says=tuple((r["rule"], r["verdict"], r["sentence"], r["source"]) for r in said if r["group"] == group),
        parameters_per_rank=sum(sum(layer["shape"]) for layer in layers),
        smallest_side=min(min(layer["shape"]) for layer in layers),
    )
