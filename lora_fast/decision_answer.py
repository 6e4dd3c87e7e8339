"""Which rank, or full fine-tuning: the answer to all the facts that are given, and what decides in what order.

What counts for more, from the top:
1. constraints: what exceeds the budget or ran out of memory here is no answer;
2. quality measured here: the loss-against-rank curve, against the target where one is given;
3. cost measured here: between choices that are equal in quality, or where the quality of full fine-tuning is not known;
4. the spectra of what was trained here;
5. what has been published for this kind of task, then rules of thumb.
Within one level, sources that disagree make the answer "measure this next". A lower level that disagrees with the
answer does not change it. Confidence comes from what supports an answer, by 1 - Π(1 - each): evidence that is missing
leaves it low, and evidence that is added never lowers it for the same answer. Losses by step are no evidence for a
rank, but of what a search is worth: one that learned nothing counts for nothing, one that had not ended for less."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lora_fast.decision_inputs import FULL, Costs, Curve, Directions, Ratio, ratio_at
from lora_fast.rank_rules import (
    COMPLEXITIES,
    EVALUATE_FULL_FROM,
    GENERATION,
    SCENARIOS,
    SUMMARY,
    TASKS,
    capacity_rank,
    guide_formula,
)

# Shares of trained parameters: from the first on the guide asks for an evaluation, and "10% to 20% or more" are its
# words for when full fine-tuning is the better choice. That it takes 20% to be one by itself is our reading.
EVALUATE_SHARE, FULL_SHARE = 0.10, 0.20
# "Hardly different" in cost: a ratio within 5%. Ours; the guide names no figure.
NEAR = 0.95
# What the guides count as their middle tiers stands for what is not known.
MIDDLE_SIZE, MIDDLE_DATA = 3.0, 50_000

# How sure each kind of evidence makes, from 0 to 1. Ours, and only their order is argued: what was measured here, above
# what was measured elsewhere, above rules of thumb.
ONE_RANK, SEARCHED, NOISE_KNOWN, ALL_REPEATED, FULL_TRIED = 0.45, 0.6, 0.15, 0.05, 0.1
MISSED, TIMED, COUNTED, SPECTRA, CHEAPER, PUBLISHED, SHARE = 0.55, 0.5, 0.35, 0.4, 0.2, 0.35, 0.25
RULES, PER_KNOWN = 0.1, 0.05
# What is taken from it where the best training was still falling at its end, or unstable: about what noise that is not
# known and full fine-tuning that was not tried take together.
UNSETTLED = 0.25

# Tasks for which the guide on full fine-tuning names new knowledge or complex logic.
DEMANDING = ("complex", "reasoning", "code", "mathematics", "domain-knowledge", "continued-pretraining")


@dataclass(frozen=True)
class Facts:
    """All that was given."""

    costs: Costs | None
    curve: Curve | None
    spectra: Directions | None
    task: str | None
    domain: str | None
    target: float | None
    rank: int | None
    budget: int | None
    model_size: float | None
    data_size: int | None
    tokens: float | None
    scenario: str | None
    per_rank: int | None
    usd_per_hour: float | None

    @property
    def complexity(self) -> str | None:
        if self.task is None or self.task in COMPLEXITIES:
            return self.task
        known = TASKS[self.task].complexity
        return known if known in COMPLEXITIES else "complex"

    @property
    def is_demanding(self) -> bool:
        return self.task in DEMANDING or self.domain == "far"

    @property
    def total(self) -> float | None:
        """Parameters of the base."""
        for found in (self.costs, self.curve):
            if found is not None and found.parameters:
                return found.parameters
        return None if self.model_size is None else self.model_size * 1e9

    @property
    def known(self) -> int:
        """How many of the inputs of the rules of thumb are known."""
        return sum(value is not None for value in (self.task, self.model_size, self.data_size, self.scenario))

    @property
    def cap(self) -> int | None:
        """The largest rank that budget and memory allow."""
        caps = []
        if self.budget is not None and self.per_rank is not None:
            caps.append(self.budget // self.per_rank)
        if self.costs is not None and self.costs.oom is not None:
            fits = [rank for rank in (*self.costs.memory, *self.costs.time) if rank < self.costs.oom]
            caps.append(max(fits, default=max(1, self.costs.oom - 1)))
        return min(caps, default=None)

    @property
    def no_full(self) -> str | None:
        """Why full fine-tuning can't be done, or None."""
        if self.budget is not None and self.total is not None and self.total > self.budget:
            return f"the budget of {self.budget:,} parameters is below the model's {self.total:,.0f}"
        if self.costs is not None and self.costs.full_oom:
            return "it does not fit into this machine's memory"
        return None

    def share(self, rank: int) -> float | None:
        """r Σ (K + N) over all parameters, the adapter's included."""
        if self.per_rank is None or self.total is None:
            return None
        return rank * self.per_rank / (self.total + rank * self.per_rank)


@dataclass(frozen=True)
class Cost:
    """Time of training at a rank over full fine-tuning's, by the best measure there is."""

    ratio: Ratio
    kind: str
    sure: float

    @property
    def is_near(self) -> bool:
        """As slow as full fine-tuning. A ratio that is only known to be at most something counts as that."""
        return self.ratio.value >= NEAR

    @property
    def is_above(self) -> bool:
        return self.ratio.value > 1 / NEAR

    @property
    def is_cheaper(self) -> bool:
        return self.ratio.value < NEAR and self.ratio.bound != "≥"


@dataclass(frozen=True)
class Answer:
    """What is decided, before what surrounds it. support: names of the evidence that the answer rests on."""

    kind: str
    rank: int
    low: int
    high: int
    reasons: tuple[str, ...]
    base: float
    support: tuple[tuple[str, float], ...] = ()
    target_reached: bool | None = None

    @property
    def confidence(self) -> float:
        doubt = 1 - self.base
        for _, sure in self.support:
            doubt *= 1 - sure
        return 1 - doubt


# ------------------------------------------------------------------------------------------------------- the answer


def answer_to(f: Facts) -> Answer:
    """The answer to these facts, within what can be done at all."""
    if f.curve is None or not tried(f):
        found = _without_quality(f)
    else:
        found = _by_quality(f) if f.curve.unlearned is None else _nothing_learned(f)
    if found.kind == "full" and f.no_full is not None:
        why = f"full fine-tuning would be the answer, but {f.no_full}; r={found.rank} is the best that is left"
        return _left(f, found, why)
    if found.kind == "measure" and f.no_full is not None and f.cap == 1:
        return replace(found, kind="rank", reasons=(*found.reasons, "nothing else can be done"))
    needed = f.total if found.kind == "full" else f.per_rank
    if f.budget is not None and needed is None:
        said = f"whether the budget of {f.budget:,} parameters allows it is not known without the model"
        return replace(found, reasons=(*found.reasons, said))
    return found


def _left(f: Facts, full: Answer, why: str) -> Answer:
    """The rank that stands where full fine-tuning would be the answer and can't be done."""
    reasons = (*full.reasons, why)
    if f.curve is not None and tried(f):
        reached = None if f.target is None else f.curve.reaches(full.rank, f.target) == "yes"
        return _measured(f, "rank", full.rank, full.low, full.high, *reasons, target_reached=reached)
    sure = _limited(f, _candidate(f)).sure  # of the rank; what spoke for full fine-tuning does not speak for it
    return _with_cost(f, replace(full, kind="rank", reasons=reasons, base=sure, support=()))


def tried(f: Facts) -> list[int]:
    """Ranks of the curve that can be used."""
    return [rank for rank in f.curve.ranks if f.cap is None or rank <= f.cap]


def cost_at(f: Facts, rank: int) -> Cost | None:
    """Whole trainings where the search timed them, else steps, measured or projected, else FLOPs; the first is what is
    paid, unless the times of single trainings differ so much that either could be the cheaper."""
    total = None if f.curve is None else f.curve.time_ratio(rank)
    if total is not None and not is_unclear(total):
        return Cost(total, "training time", TIMED)
    if f.costs is None:
        return None
    if f.costs.noise is None and (ratio := ratio_at(f.costs.time, rank)) is not None:
        return Cost(ratio, "step time", TIMED)
    if (ratio := ratio_at(f.costs.projected, rank)) is not None:
        return Cost(ratio, "projected step time", COUNTED)
    if (ratio := ratio_at(f.costs.flops, rank)) is not None:
        return Cost(ratio, "FLOPs", COUNTED)
    return None


def is_unclear(total: Ratio) -> bool:
    return total.interval is not None and total.interval[0] < NEAR and total.interval[1] > 1 / NEAR


def search_sure(curve: Curve) -> float:
    if curve.unlearned is not None:
        return 0.0
    return _lowered(curve, _by_count(curve))


def _lowered(curve: Curve, sure: float) -> float:
    return sure if curve.unsettled is None else sure - UNSETTLED


def _by_count(curve: Curve) -> float:
    if curve.is_pretraining:
        return ONE_RANK
    if len(curve.ranks) < 2:
        sure = ONE_RANK
    else:
        sure = SEARCHED
        if curve.noise is not None:
            sure += NOISE_KNOWN
        if all(point.count > 1 for point in curve.ranks.values()):
            sure += ALL_REPEATED
    return sure + (FULL_TRIED if curve.full is not None else 0)


def _measured(f: Facts, kind: str, rank: int, low: int, high: int, *reasons: str, **more) -> Answer:
    """An answer that rests on the curve, supported by spectra that agree and by a rank that costs less."""
    support = []
    if f.curve.unsettled is not None and f.curve.unsettled not in reasons:
        reasons = (*reasons, f.curve.unsettled)
    if kind == "full":
        base = _lowered(f.curve, more.pop("base")) if "base" in more else search_sure(f.curve)
    else:
        base = search_sure(f.curve)
        if f.spectra is not None and rank / 2 <= by_spectra(f.spectra)[0] <= 2 * rank:
            support.append(("spectra", SPECTRA))
    return _with_cost(f, Answer(kind, rank, min(low, rank), max(high, rank), reasons, base, tuple(support), **more))


def _with_cost(f: Facts, answer: Answer) -> Answer:
    cost = cost_at(f, answer.rank)
    if cost is None:
        return answer
    if answer.kind == "full" and cost.is_near and f.no_full is None:
        return replace(answer, support=(*answer.support, (cost.kind, cost.sure)))
    if answer.kind != "full" and cost.is_cheaper:
        return replace(answer, support=(*answer.support, (cost.kind, CHEAPER)))
    return answer


def _nothing_learned(f: Facts) -> Answer:
    """Losses of trainings in which nothing was learned rank nothing: until others are made, what asks for none names
    the rank, and cost, which is no better known by then, does not make it surer."""
    c, found = f.curve, _limited(f, _candidate(f))
    reasons, reached = [c.unlearned, "train longer, or with another learning rate, first", found.why], None
    if f.target is not None:
        reached = "yes" in [c.reaches(r, f.target) for r in (*tried(f), *([FULL] if c.full else []))]
        if reached:
            reasons.insert(1, f"the target {f.target:.4g} is reached with so little")
    return Answer("measure", found.rank, found.low, found.high, tuple(reasons), found.sure, target_reached=reached)


def _by_quality(f: Facts) -> Answer:
    """From the curve: quality first, cost between equals."""
    c, ranks = f.curve, tried(f)
    best, rank = c.best(ranks), c.sufficient(ranks)
    if f.target is not None:
        reached = {r: c.reaches(r, f.target) for r in ranks}
        if "yes" in reached.values():
            return _target_reached(f, next(r for r in ranks if reached[r] == "yes"), max(rank, best))
        full = c.reaches(FULL, f.target) if c.full is not None else None
        if full == "yes":
            said = f"only full fine-tuning reaches the target, with {c.full.mean:.4g}"
            return _measured(f, "full", rank, rank, best, said, target_reached=True)
        if "unclear" in (reached[best], full if f.no_full is None else None):
            said = f"the target {f.target:.4g} is missed by less than the noise between seeds"
            return _measured(f, "measure", rank, rank, best, said)
        if c.full is None:
            return _target_missed(f, rank, best)
        missed = f"nothing that was tried reaches the target {f.target:.4g}, not full fine-tuning either"
        return replace(_best_quality(f, rank, best, missed), target_reached=False)
    return _best_quality(f, rank, best)


def _target_reached(f: Facts, rank: int, high: int) -> Answer:
    """Two choices that meet the requirement are equals, between which cost decides."""
    c, cost = f.curve, cost_at(f, rank)
    said = f"r={rank} is the smallest rank that reaches the target {f.target:.4g}, with {c.ranks[rank].mean:.4g}"
    better = c.full is not None and c.gain(rank, FULL) > c.margin(rank, FULL)
    if better and cost is not None and cost.is_near:
        more = f"full fine-tuning is better still ({c.full.mean:.4g}) and costs no more ({cost.kind} {cost.ratio})"
        return _measured(f, "full", rank, rank, high, said, more, target_reached=True)
    if better:
        said += f"; full fine-tuning is better ({c.full.mean:.4g}), which the target does not ask for"
    elif c.full is not None and cost is not None and cost.is_above and c.reaches(FULL, f.target) == "yes":
        more = f"full fine-tuning reaches it too and costs less ({cost.kind} of r={rank}: {cost.ratio} of it)"
        return _measured(f, "full", rank, rank, high, said, more, target_reached=True)
    return _measured(f, "rank", rank, rank, high, said, target_reached=True)


def _target_missed(f: Facts, rank: int, best: int) -> Answer:
    """No rank reaches the target, and full fine-tuning was not tried."""
    c, ranks = f.curve, tried(f)
    missed = f"the target {f.target:.4g} is missed; the best rank, {best}, gives {c.ranks[best].mean:.4g}"
    if len(ranks) < 2:
        return _measured(
            f, "measure", rank, rank, best, f"{missed}, and it is the only one tried", target_reached=False
        )
    if _is_rising(f, rank):
        return replace(_still_rising(f, rank, missed), target_reached=False)
    if c.verdict == "rises then falls" and f.no_full is None:
        said = "larger ranks overfit, so that full fine-tuning, larger still, may or may not help"
        return _measured(f, "measure", rank, rank, best, missed, said, target_reached=False)
    said = f"larger ranks do not help any more ({c.sentence}): full fine-tuning is what may"
    if ranks[-1] < max(c.ranks):
        said = f"larger ranks than r={ranks[-1]} are beyond the budget or the memory"
    return _measured(f, "full", rank, rank, best, missed, said, base=MISSED, target_reached=False)


def _is_rising(f: Facts, rank: int) -> bool:
    """Whether the search says so, and the rank that suffices is the largest that was tried."""
    return f.curve.verdict == "still rising" and rank == max(f.curve.ranks)


def _still_rising(f: Facts, rank: int, *reasons: str) -> Answer:
    """A larger rank, unless that would cost as much as full fine-tuning."""
    cost = cost_at(replace(f, curve=replace(f.curve, seconds={})), 2 * rank)
    if cost is not None and cost.is_near and f.no_full is None and f.curve.full is None:
        said = f"larger ranks are better still, and r={2 * rank} would be as slow as full fine-tuning ({cost.ratio})"
        return _measured(f, "full", rank, rank, rank, *reasons, said, base=MISSED)
    if f.cap is not None and 2 * rank > f.cap:
        said = f"{f.curve.sentence}, which budget or memory do not allow"
        return _measured(f, "rank" if f.no_full else "measure", rank, rank, rank, *reasons, said)
    return _measured(f, "measure", rank, rank, 2 * rank, *reasons, f.curve.sentence)


def _best_quality(f: Facts, rank: int, best: int, *reasons: str) -> Answer:
    c, ranks = f.curve, tried(f)
    cost, full = cost_at(f, rank), c.full_is
    if full == "better":
        said = f"full fine-tuning is better than every rank tried: {c.full.mean:.4g} against {c.ranks[best].mean:.4g}"
        return _measured(f, "full", rank, rank, best, *reasons, said)
    if _is_rising(f, rank) and full is None:
        return _still_rising(f, rank, *reasons)
    suffices = _suffices(f, rank, best)
    if full is not None:
        return _between_equals(f, rank, best, full, *reasons, suffices)
    if cost is not None and cost.is_near and f.no_full is None:
        said = (
            f"it is as slow as full fine-tuning ({cost.kind} {cost.ratio} of it), which can be better and was not tried"
        )
        return _measured(f, "full", rank, rank, best, *reasons, suffices, said, base=MISSED)
    if len(ranks) < 2:
        return _measured(f, "measure", rank, rank, best, *reasons, suffices)
    if f.no_full is not None:
        return _measured(f, "rank", rank, rank, best, *reasons, suffices)
    if rank >= EVALUATE_FULL_FROM and (cost is None or f.is_demanding):
        said = f"from r={EVALUATE_FULL_FROM} on full fine-tuning has to be weighed, and it was not tried"
        return _measured(f, "measure", rank, rank, best, *reasons, suffices, said)
    share = f.share(rank)
    if share is not None and share >= EVALUATE_SHARE and cost is None:
        said = f"it trains {share:.0%} of the parameters, and what full fine-tuning costs here is not known"
        return _measured(f, "measure", rank, rank, best, *reasons, suffices, said)
    return _measured(f, "rank", rank, rank, best, *reasons, suffices)


def _suffices(f: Facts, rank: int, best: int) -> str:
    c, ranks = f.curve, tried(f)
    beyond = c.best(list(c.ranks))
    usable = len(ranks) < len(c.ranks)
    if len(ranks) < 2:
        said = f"r={rank} is the only rank tried{' that budget and memory allow' if usable else ''}"
    elif c.noise is None:
        said = f"r={rank} is the smallest of the best ranks; how much of their lead is noise is not known"
    else:
        among = f"of those that budget and memory allow (up to {f.cap})" if usable else ""
        said = f"r={rank} is the smallest rank that is as good as the best{among and ' '}{among}, to within the noise"
    if beyond not in ranks and c.gain(best, beyond) > c.margin(best, beyond):
        said += f"; r={beyond} is better ({c.ranks[beyond].mean:.4g} against {c.ranks[best].mean:.4g}), and beyond them"
    return said


def _between_equals(f: Facts, rank: int, best: int, full: str, *reasons: str) -> Answer:
    """Full fine-tuning was measured and is not better: the cheaper of the two, in time, then in memory."""
    if full == "worse":
        said = f"full fine-tuning is worse ({f.curve.full.mean:.4g})"
        return _measured(f, "rank", rank, rank, best, *reasons, said)
    cost = cost_at(f, rank)
    memory = ratio_at(f.costs.memory, rank) if f.costs is not None else None
    equal = f"full fine-tuning is no better ({f.curve.full.mean:.4g})"
    if cost is not None and cost.is_above:
        said = f"{equal} and faster ({cost.kind} of r={rank}: {cost.ratio} of it)"
        return _measured(f, "full", rank, rank, best, *reasons, said)
    if cost is not None and cost.is_near and memory is not None and memory.value > 1 / NEAR:
        said = f"{equal}, as fast, and takes less memory (r={rank}: {memory} of it)"
        return _measured(f, "full", rank, rank, best, *reasons, said)
    if cost is not None and cost.is_cheaper:
        equal += f", and slower ({cost.kind} of r={rank}: {cost.ratio} of it)"
    elif memory is not None and memory.value < NEAR:
        equal += f", and takes more memory (r={rank}: {memory} of it)"
    return _measured(f, "rank", rank, rank, best, *reasons, equal)


# ------------------------------------------------------------------------------------- where no quality was measured


@dataclass(frozen=True)
class _Candidate:
    rank: int
    low: int
    high: int
    why: str
    sure: float
    is_searched: bool = False  # whether the rules themselves ask for a search


def _without_quality(f: Facts) -> Answer:
    """Cost decides where it is measured; otherwise published results and rules, which only rarely settle it."""
    found = _limited(f, _candidate(f))
    rank, reasons = found.rank, (found.why,)

    def answer(kind: str, *more: str, base: float = found.sure, support=()) -> Answer:
        made = Answer(kind, rank, found.low, found.high, (*reasons, *more), base, tuple(support))
        return _with_cost(f, made)

    cost, share = cost_at(f, rank), f.share(rank)
    if f.curve is not None and not f.curve.ranks:
        return answer("measure", f"only full fine-tuning gave a value ({f.curve.full.mean:.4g}); no rank did")
    if f.curve is not None:
        return answer("measure", f"every rank that was tried is above the largest that can be used, {f.cap}")
    published = f.task == "continued-pretraining"
    if cost is not None and cost.is_near and f.no_full is None:
        # With what supports it: that cost, and what has been published.
        return answer(
            "full",
            f"r={rank} is as slow as full fine-tuning ({cost.kind} {cost.ratio} of it), which can be better",
            base=PUBLISHED if published else 0.0,
        )
    if published:
        return answer(
            "full", "continued pretraining: no LoRA reached full fine-tuning where it was measured", base=PUBLISHED
        )
    costs_less = cost is not None and cost.is_cheaper
    if share is not None and share >= EVALUATE_SHARE and not costs_less:
        said = f"r={rank} trains {share:.0%} of the parameters"
        if share >= FULL_SHARE or f.is_demanding:
            return answer("full", f"{said}{', for a demanding task' if f.is_demanding else ''}", base=SHARE)
        if f.no_full is None:
            return answer("measure", f"{said}: what full fine-tuning costs here has to be known")
    if f.no_full is None and rank >= EVALUATE_FULL_FROM:
        return answer(
            "measure", f"from r={EVALUATE_FULL_FROM} on full fine-tuning has to be weighed, on quality and cost"
        )
    if f.no_full is None and f.is_demanding:
        return answer("measure", "for a task like this the sources disagree on whether LoRA is enough")
    if found.is_searched:
        return answer("measure", "nothing is known of the situation" if not f.known else "the guide asks for a search")
    return answer("rank")


def _limited(f: Facts, found: _Candidate) -> _Candidate:
    if f.cap is None or found.high <= f.cap:
        return found
    rank = min(found.rank, f.cap)
    why = f"{found.why}; r={f.cap} is the largest that budget and memory allow"
    sure = found.sure if found.low <= rank else _covered(f, rank)  # below what its source said, that says nothing
    return replace(found, rank=rank, low=min(found.low, rank), high=f.cap, why=why, sure=sure)


def _candidate(f: Facts) -> _Candidate:
    """The rank to start from, by the highest of these that speaks: spectra, the caller, published results, rules."""
    published = by_publications(f)
    if f.spectra is not None:
        rank, low, why = by_spectra(f.spectra)
        return _Candidate(rank, low, rank, why, max(SPECTRA, _covered(f, rank)))
    if f.rank is not None:
        return _Candidate(f.rank, f.rank, f.rank, f"r={f.rank} is what you consider", _covered(f, f.rank))
    if published:  # the one that asks for the most, where another allows as much
        return replace(max(published, key=lambda found: found.low), high=max(found.high for found in published))
    return by_rules(f)


def _covered(f: Facts, rank: int) -> float:
    """How sure published results and rules make of a rank that something else named."""
    found = [found.sure for found in by_publications(f) if found.low <= rank <= found.high]
    return max([by_rules(f).sure, *found])


def by_spectra(spectra: Directions) -> tuple[int, int, str]:
    """(rank, low, why): what holds the update, or the trained rank where that is hardly less."""
    if spectra.trained is None:
        said = f"a LoRA of rank {spectra.needed} holds 90% of every update of the full fine-tune"
        return spectra.needed, spectra.typical, said
    fits = spectra.needed > spectra.trained / 2
    rank = spectra.trained if fits else spectra.needed
    said = f"of the rank {spectra.trained} that was trained, {spectra.needed} hold 99% of every layer's update"
    return rank, min(spectra.needed, rank) if fits else min(spectra.typical, rank), said


def by_publications(f: Facts) -> list[_Candidate]:
    """What has been published for such a task, or for so many tokens."""
    found = []
    formula = by_rules(f).rank
    if f.task in ("code", "mathematics"):
        why = "instruction tuning on it gained up to r=256 at 7B, with all layers adapted"
        found.append(_Candidate(64, 64, 256, why, PUBLISHED))
    if f.task == "reinforcement-learning":
        why = "in reinforcement learning ranks of 1 to 32 were as good as any"
        found.append(_Candidate(min(32, formula), 1, 32, why, PUBLISHED))
    if f.tokens is not None and f.per_rank is not None:
        least = max(1, math.ceil(capacity_rank(f.tokens, f.per_rank)))
        if least > formula:
            why = f"at least r={least} has the capacity for {f.tokens:,.0f} tokens, at 2 bits a parameter"
            found.append(_Candidate(least, least, least, why, PUBLISHED))
    return found


def by_rules(f: Facts) -> _Candidate:
    """The guide's summary table: rows in the order in which they bind, each narrowed by the next that it meets."""
    rows = list(_rows(f))
    name, ranks = rows[0]
    low, high = ranks[0], ranks[-1]
    for _, others in rows[1:]:
        if others[0] <= high and low <= others[-1]:
            low, high = max(low, others[0]), min(high, others[-1])
    size = MIDDLE_SIZE if f.model_size is None else f.model_size
    formula = guide_formula(size, f.complexity or "medium", MIDDLE_DATA if f.data_size is None else f.data_size)
    rank = min(max(formula, low), high)
    says = f"the guide's summary table says {span(low, high)} ({name})"
    return _Candidate(rank, low, high, says, RULES + PER_KNOWN * f.known, not f.known or f.scenario == "production")


def _rows(f: Facts) -> Iterator[tuple[str, tuple[int, ...]]]:
    if f.scenario == "constrained":
        yield "few resources", SUMMARY["few resources"]
    elif f.scenario is not None:
        yield f"scenario {f.scenario}", SCENARIOS[f.scenario].ranks
    if f.data_size is not None and f.data_size < 1_000:
        yield "small data", SUMMARY["small data (under 1,000 samples)"]
    if f.model_size is not None and f.model_size > 100:
        yield "as large as GPT-3", SUMMARY["as large as GPT-3"]
    if f.complexity == "simple":
        yield "simple classification", SUMMARY["simple classification"]
    if f.task in GENERATION:
        yield "generation", SUMMARY["generation"]
    yield ("default", SUMMARY["default"]) if f.known else ("not sure", SUMMARY["not sure"])


def span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"
