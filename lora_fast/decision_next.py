"""What to measure next: the experiment whose possible outcomes would change the answer most, found by asking again with
each outcome in the place of the evidence that is missing."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from lora_fast.decision_answer import EVALUATE_SHARE, FULL_SHARE, Answer, Facts, answer_to, tried
from lora_fast.decision_inputs import FULL, Costs, Curve, Directions, Point, Ratio, ratio_at
from lora_fast.rank_rules import EVALUATE_FULL_FROM

# How far apart a rank and full fine-tuning are, in doublings, when the worth of an experiment is weighed. Ours.
FULL_AWAY = 4.0


@dataclass(frozen=True)
class Experiment:
    """What to measure next. name: of COMMANDS. why: what its outcomes would make of the answer. worth: by how many
    doublings of the rank the answer would move, on average over those outcomes."""

    name: str
    what: str
    why: str
    worth: float
    command: str


COMMANDS = {
    "search": "lora-fast rank search --model MODEL --train FILE --eval FILE --ranks {ranks}",
    "larger ranks": "lora-fast rank search --model MODEL --train FILE --eval FILE --ranks {ranks}",
    "full arm": "lora-fast rank search --model MODEL --train FILE --eval FILE --ranks {ranks}",
    "longer training": "lora-fast rank search --model MODEL --train FILE --eval FILE --ranks {ranks} --steps N",
    "another training": "lora-fast rank search --model MODEL --train FILE --eval FILE --ranks {ranks} --steps N "
    "--learning-rate RATE",
    "seeds": "lora-fast rank search --model MODEL --train FILE --eval FILE --ranks {ranks} --seeds 3",
    "profile": "lora-fast profile MODEL --ranks {ranks}",
    "spectra": "lora-fast svd ADAPTER",
}


def next_experiment(f: Facts, answer: Answer) -> Experiment | None:
    """The experiment after which the answer would be the most different, on average over what it may show.

    Each possible outcome is put in the place of the missing evidence, and the question is asked again."""
    found = None
    for name, what, ranks, outcomes in _experiments(f, answer):
        after = [(label, answer_to(supposed)) for label, supposed in outcomes]
        worth = sum(_distance(answer, then) for _, then in after) / len(after)
        if found is None or worth > found.worth:
            why = "; ".join(f"{label}: {_short(then)}" for label, then in after)
            command = COMMANDS[name].format(ranks=",".join(map(str, ranks)))
            found = Experiment(name, what, why, worth, command)
    return found if found is not None and found.worth > 0 else None


def _short(answer: Answer) -> str:
    if answer.kind == "full":
        return "full fine-tuning"
    return f"r={answer.rank}" + (", and more to measure" if answer.kind == "measure" else "")


def _distance(one: Answer, other: Answer) -> float:
    """In doublings of the rank; an open question that is settled, or a target that is met, counts as half of one."""
    is_met = one.target_reached is False and other.target_reached is True
    settled = 0.5 if is_met or (one.kind == "measure" and other.kind != "measure") else 0.0
    if (one.kind == "full") != (other.kind == "full"):
        return FULL_AWAY + settled
    return settled if one.kind == "full" else abs(math.log2(other.rank / one.rank)) + settled


_Outcomes = list[tuple[str, Facts]]
_Experiments = Iterator[tuple[str, str, list, _Outcomes]]


def _experiments(f: Facts, answer: Answer) -> _Experiments:
    """(name, what, ranks, [(outcome, the facts with it)]), the most telling kinds first."""
    if f.curve is not None and f.curve.unlearned is not None and tried(f):
        yield _learning_experiment(f)
        return
    if f.curve is None or len(tried(f)) < 2:
        yield from _search_experiments(f, answer.rank)
    else:
        yield from _wider_experiments(f, answer.rank)
        yield from _noise_experiments(f, answer.rank)
        yield from _longer_experiments(f)
        yield from _settling_experiments(f, answer.rank)
    yield from _cost_experiments(f, answer.rank)
    if f.curve is None and f.spectra is None:
        yield from _spectra_experiments(f, answer.rank)


def _searched(f: Facts, ranks: list[int]) -> tuple[list, _Outcomes]:
    """The arms of a search over these ranks, and full where it can be, and what it may find."""
    outcomes = [(f"r={r} suffices", replace(f, curve=_supposed(f, ranks, r))) for r in ranks]
    if f.no_full:
        return [*ranks], outcomes
    full = replace(f, curve=_supposed(f, ranks, ranks[-1], full_better=True))
    return [*ranks, FULL], [*outcomes, ("full is better", full)]


def _search_experiments(f: Facts, rank: int) -> _Experiments:
    if f.rank is None and f.per_rank and f.total:  # a share that means full fine-tuning needs no search of its own
        most = FULL_SHARE / (1 - FULL_SHARE) * f.total / f.per_rank
        rank = min(rank, 2 ** int(math.log2(max(1, most))))
    top = 4 * rank if rank < EVALUATE_FULL_FROM else rank
    ranks = sorted({max(1, rank // 4), rank, top if f.cap is None else min(top, max(f.cap, 1))})
    arms, outcomes = _searched(f, ranks)
    what = f"the quality of r={', '.join(map(str, arms))} on your data; all other evidence only stands in for it"
    yield "search", what, arms, outcomes


def _wider_experiments(f: Facts, rank: int) -> _Experiments:
    """What a search left out: larger ranks, and full fine-tuning."""
    c = f.curve
    if c.verdict == "still rising" and (f.cap is None or 2 * max(c.ranks) <= f.cap):
        larger = [2 * max(c.ranks), 4 * max(c.ranks)]
        outcomes = [
            ("no gain beyond", replace(f, curve=replace(c, verdict="plateau"))),
            (f"r={larger[0]} is better", replace(f, curve=_supposed(f, [*c.ranks, *larger], larger[0]))),
        ]
        yield "larger ranks", f"r={larger[0]} and {larger[1]}: the curve still rises", larger, outcomes
    if c.full is None and f.no_full is None:
        outcomes = [
            ("it is better", replace(f, curve=replace(c, full=_beyond(f, True)))),
            ("it is not", replace(f, curve=replace(c, full=_beyond(f, False)))),
        ]
        yield "full arm", f"full fine-tuning beside r={rank}, with the same data and seeds", [rank, FULL], outcomes


def _noise_experiments(f: Facts, rank: int) -> _Experiments:
    """More seeds, where the target lies within the noise, or no noise is known."""
    c, ranks = f.curve, tried(f)
    if f.target is not None and any(c.reaches(r, f.target) == "unclear" for r in ranks):
        best = c.best(ranks)
        margin = max(c.margin(r) for r in ranks)

        def off_by(margins: float) -> Facts:
            shift = f.target + c.sign * margins * margin - c.ranks[best].mean
            moved = {r: Point(point.mean + shift, point.count) for r, point in c.ranks.items()}
            return replace(f, curve=replace(c, ranks=moved))

        outcomes = [("it reaches", off_by(-1.01)), ("it misses", off_by(1.01))]
        yield "seeds", f"more seeds at r={best}: the target is within the noise", [best], outcomes
    elif f.target is not None and c.full is not None and c.reaches(FULL, f.target) == "unclear":
        beyond = 1.01 * c.sign * c.margin(FULL)
        sides = {"it reaches": f.target - beyond, "it misses": f.target + beyond}
        outcomes = [(k, replace(f, curve=replace(c, full=Point(mean, c.full.count)))) for k, mean in sides.items()]
        yield "seeds", "more seeds of full fine-tuning: the target is within the noise", [FULL], outcomes
    below = max((r for r in ranks if r < rank), default=None)
    if c.noise is None and below is not None:
        equal = replace(_supposed(f, c.ranks, below), full=c.full)
        outcomes = [("the gain was noise", replace(f, curve=equal)), ("it was not", f)]
        yield "seeds", f"a second seed at r={below} and {rank}: no noise is known", [below, rank], outcomes


def _longer_experiments(f: Facts) -> _Experiments:
    """More steps, where nothing that can be done reaches the target after those that were taken."""
    c, ranks = f.curve, tried(f)
    full = None if f.no_full is not None else c.full
    open_full = full is None and f.no_full is None
    if f.target is None or open_full or any(c.reaches(r, f.target) != "no" for r in ranks):
        return
    if full is not None and c.reaches(FULL, f.target) != "no":
        return
    best = c.best(ranks)
    shift = f.target - c.ranks[best].mean
    moved = {r: Point(point.mean + shift, point.count) for r, point in c.ranks.items()}
    moved[best] = Point(f.target, c.ranks[best].count)  # exactly
    outcomes = [(f"r={best} reaches it", replace(f, curve=replace(c, ranks=moved)))]
    arms: list = [best]
    if full is not None:
        at_target = Point(f.target, full.count)
        outcomes.append(("only full fine-tuning does", replace(f, curve=replace(c, full=at_target))))
        arms.append(FULL)
    outcomes.append(("none does", f))
    what = f"more steps at r={', '.join(map(str, arms))}: nothing reaches the target {f.target:.4g} after so many"
    yield "longer training", what, arms, outcomes


def _learning_experiment(f: Facts) -> tuple[str, str, list, _Outcomes]:
    """The same arms again, trained so that they learn something."""
    arms, outcomes = _searched(f, tried(f))
    what = f"train longer, or with another learning rate, at r={', '.join(map(str, arms))}: hardly anything was learned"
    return "another training", what, arms, outcomes


def _settling_experiments(f: Facts, rank: int) -> _Experiments:
    """The same arms for longer, or more calmly, where the best had not settled and another may overtake it."""
    c, ranks = f.curve, tried(f)
    if c.unsettled is None:
        return
    arms: list = [*ranks, *([FULL] if c.full is not None and f.no_full is None else [])]
    outcomes = [("the order stays", replace(f, curve=replace(c, unsettled=None)))]
    if ranks[-1] > rank:
        outcomes.append((f"r={ranks[-1]} is better", replace(f, curve=_supposed(f, ranks, ranks[-1]))))
    if FULL in arms:
        outcomes.append(("full is better", replace(f, curve=_supposed(f, ranks, rank, full_better=True))))
    what = f"train longer, or with a smaller learning rate, at r={', '.join(map(str, arms))}: {c.unsettled}"
    yield "another training", what, arms, outcomes


def _spectra_experiments(f: Facts, rank: int) -> _Experiments:
    less = max(1, rank // 4)
    outcomes = [
        (label, replace(f, spectra=Directions(rank, needed, needed, (), f.per_rank or 1)))
        for label, needed in ((f"r={less} holds 99%", less), ("it takes all", rank))
    ]
    yield "spectra", f"the spectrum of an adapter trained at r={rank}", [rank], outcomes


def _cost_experiments(f: Facts, rank: int) -> _Experiments:
    """A profile, where none times this rank, with the outcomes that its share of the parameters leaves plausible."""
    known = f.costs is not None and f.costs.noise is None and ratio_at(f.costs.time, rank) is not None
    if known or f.no_full is not None:
        return
    share = f.share(rank)
    plausible = rank >= EVALUATE_FULL_FROM if share is None else share >= EVALUATE_SHARE
    total, per_rank = round(f.total or 1e9), f.per_rank
    base = f.costs or Costs(None, total, per_rank, False, {}, {}, {}, {})
    outcomes = [("cheaper", replace(f, costs=replace(base, time={rank: Ratio(0.7)}, noise=None)))]
    if plausible:
        outcomes.append(("slower than full", replace(f, costs=replace(base, time={rank: Ratio(1.1)}, noise=None))))
    yield "profile", f"time and memory of r={rank} against full fine-tuning on this machine", [rank], outcomes


def _supposed(f: Facts, ranks: Iterable[int], knee: int, full_better: bool = False) -> Curve:
    """A curve that gains up to the knee and not beyond; it reaches the target there, full fine-tuning always."""
    c = f.curve
    sign = c.sign if c else 1
    ranks = sorted(set(ranks))
    goal = f.target if f.target is not None else 1.0
    gap = 1.0 if full_better else 0.0
    means = {r: Point(goal + sign * (gap + max(0, math.log2(knee / r))), 2) for r in ranks}
    seconds = c.seconds if c else {}
    full = None if f.no_full else Point(goal, 2)
    return Curve(means, full, 0.0, sign, "full fine-tuning" if full_better else "plateau", "supposed", seconds)


def _beyond(f: Facts, better: bool) -> Point:
    """Full fine-tuning's mean, better than every rank and the target, or equal to the best."""
    c = f.curve
    best = c.best(list(c.ranks))
    mean, count = c.ranks[best].mean, c.ranks[best].count
    if not better:
        return Point(mean, count)
    goals = [mean - c.sign * (2 * c.margin(best, best) + 1e-6 * abs(mean) + 1e-9)]
    if f.target is not None:
        goals.append(f.target)
    return Point(min(goals) if c.sign == 1 else max(goals), count)
