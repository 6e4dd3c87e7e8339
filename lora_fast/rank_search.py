"""The rank by measurement: train and evaluate at several ranks and seeds, and read the smallest that is good enough.

Trials, their storage, resuming and sharing between processes are Optuna's; what is ours is which rank comes next, when
to stop, and what the curve says. A gain counts only where it exceeds the noise between seeds."""

import inspect
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Integral
from typing import Any

from lora_fast.config import LoraFastError

FULL = "full"
RANKS = tuple(2**e for e in range(10))
STRATEGIES, DIRECTIONS = ("progressive", "grid"), ("minimize", "maximize")
# A difference of means counts from so many of its standard errors on: on a plateau it is exceeded once in 161 times,
# and more often where the noise is known from few trainings.
SIGNIFICANT = 2.5
# A value beyond this is no result: its square would not be finite.
DIVERGED = 1e150
# The attribute of a trial that says what it is, and who took it.
ARM = "arm"
# Seconds between looks at trials that other processes have taken.
POLL_S = 0.5
# After so long a trial that another machine took is thought lost.
STALE_S = 24 * 3600.0
# A trial is named one write after it is begun; after so long its process was killed in between.
UNNAMED_S = 10.0

Rank = int | str


@dataclass(frozen=True)
class Trial:
    """One training: value is None where it failed (error says how) or was pruned; seconds it took."""

    rank: Rank
    seed: int
    value: float | None
    status: str
    seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Point:
    """The mean over the seeds of one rank; count of them that gave a value."""

    rank: Rank
    mean: float
    count: int


@dataclass(frozen=True)
class RankSearch:
    """best_rank: the smallest rank whose mean is within the noise of the best; "full" where full fine-tuning was an arm
    and beat every rank by more than it; None where nothing gave a value.
    noise: standard deviation between seeds, pooled over ranks; None where no rank has two.
    verdict: "plateau": no gain beyond best_rank; "rises then falls": beyond it results get worse (overfitting); "still
    rising": the largest rank tried is the best by more than the noise; "flat": no rank is better than the smallest;
    "full fine-tuning"; "no answer". sentence: the verdict with its figures. points: means, ascending, full last.
    trials: all of them. cost_s: seconds that they took together."""

    best_rank: Rank | None
    noise: float | None
    verdict: str
    sentence: str
    points: tuple[Point, ...]
    trials: tuple[Trial, ...]
    direction: str
    cost_s: float = field(default=0.0)

    def to_dict(self) -> dict:
        return asdict(self)


def search_rank(
    train_and_evaluate: Callable[..., float],
    ranks: Iterable[Rank] | None = None,
    strategy: str = "progressive",
    *,
    seeds: int | Sequence[int] = 1,
    direction: str = "minimize",
    start: int = 1,
    min_gain: float = 0.0,
    storage: str | None = None,
    study_name: str = "lora-rank",
    progress: Callable[[Trial], None] = lambda trial: None,
) -> RankSearch:
    """Find the smallest rank that is as good as the best one.

    train_and_evaluate(rank) or train_and_evaluate(rank, *, seed) trains at this rank and returns the validation loss
    (direction "minimize") or a score ("maximize"); rank is a number, or "full". It must hold everything else fixed, and
    scale the learning rate and alpha so that ranks are comparable (rsLoRA, or alpha ∝ r): else the curve shows scaling.
    An exception, NaN or infinity is a failed trial, and the search goes on. One that takes a keyword `report` is given
    report(step, value), by which hopeless trainings are stopped early (Optuna's median rule).
    ranks: the candidates, ascending powers of two up to 512 by default; with "full" among them, full fine-tuning is an
    arm. strategy: "grid" tries all; "progressive" doubles from the first candidate at or above `start` until the gain
    over a doubling (at the end, over the step to the last candidate) is within the noise (2.5 standard errors of
    the difference of means, at least min_gain), then tries candidates that it skipped below the best. seeds: a number
    of seeds, or the seeds, for every rank; with one, the first two ranks get a second, since without noise no gain can
    be judged.
    storage: where Optuna keeps the study, "sqlite:///search.db" say; a search that was killed goes on from there, and
    several processes with one storage and study_name share the work. progress is told of each trial that ends.
    Raises LoraFastError for wrong arguments, and ImportError's reason where Optuna is not installed."""
    candidates, with_full, seeds = check_search(ranks, strategy, start, seeds)
    if direction not in DIRECTIONS:
        raise LoraFastError(f"direction={direction!r}; expected one of {', '.join(DIRECTIONS)}")
    if isinstance(min_gain, bool) or not isinstance(min_gain, (int, float)) or not 0 <= min_gain < math.inf:
        raise LoraFastError(f"min_gain={min_gain!r}; expected a number of at least 0, in the metric's unit")
    study = _Study(train_and_evaluate, direction, storage, study_name, progress)
    curve = _Curve(study, seeds, 1 if direction == "minimize" else -1, float(min_gain))
    if strategy == "grid":
        curve.visit(candidates)
    else:
        _double(curve, candidates)
        _refine(curve, candidates)
    if with_full:
        curve.visit([FULL])
    return curve.result()


def check_search(
    ranks: Iterable[Rank] | None, strategy: str, start: int, seeds: int | Sequence[int]
) -> tuple[list[int], bool, list[int]]:
    """What `search_rank` makes of these: candidates, whether full is an arm, seeds. Raises LoraFastError."""
    if strategy not in STRATEGIES:
        raise LoraFastError(f"strategy={strategy!r}; expected one of {', '.join(STRATEGIES)}")
    candidates, with_full = _candidates(ranks, start if strategy == "progressive" else 1)
    return candidates, with_full, _seeds(seeds)


def _candidates(ranks: Iterable[Rank] | None, start: int) -> tuple[list[int], bool]:
    if isinstance(start, bool) or not isinstance(start, int) or start < 1:
        raise LoraFastError(f"start={start!r}; expected a rank, a whole number of at least 1")
    values = list(RANKS if ranks is None else [ranks] if isinstance(ranks, (int, str)) else ranks)
    given = [value for value in values if value != FULL]
    for value in given:
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise LoraFastError(f"ranks: {value!r} is no rank; expected whole numbers of at least 1, or {FULL!r}")
    numbers = sorted({int(value) for value in given})
    if not numbers:
        raise LoraFastError(f"ranks={values!r}; expected at least one rank")
    if start > numbers[-1]:
        raise LoraFastError(f"start={start} is above every candidate, the largest is {numbers[-1]}")
    return [value for value in numbers if value >= start], FULL in values


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        if seeds < 1:
            raise LoraFastError(f"seeds={seeds}; expected at least 1")
        return list(range(seeds))
    values = list(seeds) if isinstance(seeds, Iterable) else []
    if (
        not values
        or any(isinstance(s, bool) or not isinstance(s, int) for s in values)
        or len(set(values)) < len(values)
    ):
        raise LoraFastError(f"seeds={seeds!r}; expected a number of seeds, or different whole numbers")
    return values


# ------------------------------------------------------------------------------------------------ which rank comes next


class _Curve:
    """Means by rank as far as they are known. sign: 1 where smaller is better, -1 where larger is."""

    def __init__(self, study: "_Study", seeds: list[int], sign: int, min_gain: float):
        self.study, self.seeds, self.sign, self.min_gain = study, seeds, sign, min_gain
        self.values: dict[Rank, list[float]] = {}

    def visit(self, ranks: Sequence[Rank]) -> None:
        """Trains at every rank with every seed; one seed after the other, so that all ranks have one early."""
        wanted = [(rank, seed) for seed in self.seeds for rank in ranks]
        if len(self.seeds) == 1:
            known = [rank for rank in self.values if len(self.values[rank]) > 1]
            extra = [rank for rank in ranks if rank != FULL and rank not in known][: max(0, 2 - len(known))]
            wanted += [(rank, self.seeds[0] + 1) for rank in extra]
        found = self.study.run(wanted)
        for rank in ranks:
            self.values[rank] = [trial.value for trial in found if trial.rank == rank and trial.value is not None]

    def noise(self) -> float | None:
        """Standard deviation between seeds, pooled over ranks: √(Σ(v − mean)² / Σ(n − 1))."""
        groups = [values for values in self.values.values() if len(values) > 1]
        freedom = sum(len(values) - 1 for values in groups)
        if not freedom:
            return None
        return math.sqrt(sum(statistics.variance(v) * (len(v) - 1) for v in groups) / freedom)

    def mean(self, rank: Rank) -> float | None:
        return statistics.fmean(self.values[rank]) if self.values.get(rank) else None

    def gain(self, before: Rank, after: Rank) -> float:
        """By how much `after` is better than `before`; -inf where either has no value."""
        one, other = self.mean(before), self.mean(after)
        return -math.inf if one is None or other is None else self.sign * (one - other)

    def margin(self, one: Rank, other: Rank) -> float:
        """What a difference of their means must exceed to count."""
        noise = self.noise()
        if noise is None:
            return self.min_gain
        counts = [max(1, len(self.values.get(rank, ()))) for rank in (one, other)]
        return max(self.min_gain, SIGNIFICANT * noise * math.sqrt(sum(1 / count for count in counts)))

    def ranks(self) -> list[int]:
        """Ranks with a value, ascending."""
        return sorted(rank for rank, values in self.values.items() if rank != FULL and values)

    def best(self) -> int | None:
        """The rank with the best mean."""
        return min(self.ranks(), key=lambda rank: self.sign * self.mean(rank), default=None)

    def sufficient(self) -> int | None:
        """The smallest rank that is not worse than the best by more than the margin."""
        best = self.best()
        within = (rank for rank in self.ranks() if self.gain(rank, best) <= self.margin(rank, best))
        return next(within, None)

    def result(self) -> RankSearch:
        trials = tuple(self.study.trials())
        points = [Point(rank, self.mean(rank), len(self.values[rank])) for rank in self.ranks()]
        full = self.mean(FULL)
        if full is not None:
            points.append(Point(FULL, full, len(self.values[FULL])))
        best, verdict, sentence = self._verdict()
        direction = "minimize" if self.sign == 1 else "maximize"
        cost = sum(trial.seconds or 0.0 for trial in trials)
        return RankSearch(best, self.noise(), verdict, sentence, tuple(points), trials, direction, cost)

    def _verdict(self) -> tuple[Rank | None, str, str]:
        ranks, best = self.ranks(), self.best()
        full = self.mean(FULL)
        if best is None:
            if full is None:
                failed = next((trial.error for trial in self.study.trials() if trial.error), None)
                return None, "no answer", "no training gave a value" + (f"; the first: {failed}" if failed else "")
            return FULL, "full fine-tuning", f"only full fine-tuning gave a value, {full:.4g}"
        rank = self.sufficient()
        noise = self.noise()
        within = "" if noise is None else f" (noise between seeds {noise:.2g})"
        if full is not None and self.gain(best, FULL) > self.margin(best, FULL):
            by = f"{full:.4g} against {self.mean(best):.4g} at r={best}{within}"
            of_ranks = f"; of the ranks r={rank} is as good as any" if len(ranks) > 1 else ""
            return FULL, "full fine-tuning", f"full fine-tuning is better than every rank tried: {by}{of_ranks}"
        last = ranks[-1]
        if len(ranks) == 1:
            return rank, "flat", f"r={rank} is the only rank with a value, {self.mean(rank):.4g}"
        if rank == last:
            gain = self.gain(ranks[-2], last)
            said = (
                f"r={last}, the largest rank tried, is better than r={ranks[-2]} by {gain:.2g}{within}; try larger ones"
            )
            return rank, "still rising", said
        worse = self.gain(last, best)
        if worse > self.margin(last, best):
            said = f"r={rank} suffices; beyond r={best} results get worse, at r={last} by {worse:.2g}{within}"
            return rank, "rises then falls", said
        if rank == ranks[0]:
            return rank, "flat", f"no rank is better than r={rank} by more than the noise{within}"
        said = f"r={rank} suffices: larger ranks are not better by more than the noise{within}"
        return rank, "plateau", said


def _double(curve: _Curve, candidates: list[int]) -> None:
    """Visits candidates, each at least twice the one before, the last at the end, until one gains nothing."""
    current = candidates[0]
    curve.visit([current])
    while True:
        larger = [rank for rank in candidates if rank >= 2 * current]
        if not larger and candidates[-1] > current:
            larger = candidates[-1:]
        if not larger:
            return
        curve.visit([larger[0]])
        if curve.mean(current) is not None and curve.mean(larger[0]) is not None:
            before = curve.best() if curve.best() != larger[0] else current
            if curve.gain(before, larger[0]) <= curve.margin(before, larger[0]):
                return
        current = larger[0]


def _refine(curve: _Curve, candidates: list[int]) -> None:
    """Halves the gap of candidates that doubling skipped below the rank that suffices, as long as one does as well."""
    while (rank := curve.sufficient()) is not None:
        below = max((r for r in curve.ranks() if r < rank), default=0)
        skipped = [r for r in candidates if below < r < rank and r not in curve.values]
        if not skipped:
            return
        curve.visit([skipped[len(skipped) // 2]])


# ----------------------------------------------------------------------------------------------------------- the engine


class _Study:
    """An Optuna study of (rank, seed) trials; what is finished, here or elsewhere, is not run again."""

    def __init__(self, function, direction: str, storage: str | None, name: str, progress):
        try:
            import optuna
        except ImportError as error:
            raise LoraFastError(
                f"a search needs Optuna, which can't be imported ({error}); pip install optuna"
            ) from None
        self.optuna, self.function, self.progress = optuna, function, progress
        self.accepts = _keywords(function)
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            self.study = self._create(storage, name, direction)
        finally:
            optuna.logging.set_verbosity(verbosity)
        if self.study.direction.name.lower() != direction:
            raise LoraFastError(
                f"the study {name!r} in {storage} was begun with direction={self.study.direction.name.lower()!r}; give "
                "another study_name, or that direction"
            )

    def _create(self, storage: str | None, name: str, direction: str):
        """The study of this name, made where there is none."""
        optuna, tries = self.optuna, 5
        for attempt in range(tries):
            try:
                return optuna.create_study(
                    storage=storage,
                    study_name=name,
                    direction=direction,
                    load_if_exists=True,
                    sampler=optuna.samplers.RandomSampler(seed=0),
                    pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1),
                )
            except Exception as error:  # SQLAlchemy's errors are many
                # Two processes that begin on a new database at once make its tables at once.
                if attempt + 1 == tries or not re.search("already exists|locked|UNIQUE", str(error)):
                    raise LoraFastError(f"storage={storage!r}: {' '.join(str(error).split())[:300]}") from error
                time.sleep(POLL_S)

    def run(self, wanted: list[tuple[Rank, int]]) -> list[Trial]:
        """The trials of these (rank, seed), run here unless they are finished or another process is at them."""
        keys = set(wanted)
        while True:
            state = self._by_key()
            missing = [key for key in wanted if key not in state]
            if missing:
                self._one(*missing[0])
                continue
            if all(trial is not None for key, trial in state.items() if key in keys):
                return [state[key] for key in wanted]
            time.sleep(POLL_S)

    def trials(self) -> list[Trial]:
        return [trial for trial in self._by_key().values() if trial is not None]

    def _by_key(self) -> dict[tuple[Rank, int], Trial | None]:
        """{(rank, seed): its trial, or None while it runs}; one that was cut off counts as never begun."""
        states = self.optuna.trial.TrialState
        found: dict[tuple[Rank, int], Trial | None] = {}
        for frozen in self.study.get_trials(deepcopy=False):
            attributes = frozen.user_attrs
            if ARM not in attributes or "void" in attributes:
                continue
            key = _key(frozen)
            if frozen.state == states.RUNNING:
                if not _is_gone(frozen):
                    found.setdefault(key, None)
                continue
            value = frozen.value if frozen.state == states.COMPLETE else None
            status = {states.COMPLETE: "ok", states.PRUNED: "pruned"}.get(frozen.state, "failed")
            seconds = frozen.duration.total_seconds() if frozen.duration else None
            found[key] = Trial(*key, value, status, seconds, attributes.get("error"))
        return found

    def _one(self, rank: Rank, seed: int) -> None:
        trial = self.study.ask()
        # One attribute, written at once: another process sees all of it or nothing.
        trial.set_user_attr(ARM, {"rank": rank, "seed": seed, "host": platform.node(), "pid": os.getpid()})
        states = self.optuna.trial.TrialState
        if self._taken_before(trial.number, rank, seed):
            self._void(trial)
            return
        try:
            value = self._call(trial, rank, seed)
        except self.optuna.TrialPruned:
            self.study.tell(trial, state=states.PRUNED)
        except Exception as error:  # a failed arm is a row, and the search goes on
            trial.set_user_attr("error", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            self.study.tell(trial, state=states.FAIL)
        except BaseException:  # interrupted: as if it had not begun
            self._void(trial)
            raise
        else:
            self.study.tell(trial, value)
        self.progress(self._by_key()[(rank, seed)])

    def _void(self, trial: Any) -> None:
        trial.set_user_attr("void", True)
        self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)

    def _taken_before(self, number: int, rank: Rank, seed: int) -> bool:
        """Whether another process took this (rank, seed) in the moment between our look and our taking it.

        An earlier trial that is not named yet was begun a moment ago by a process that is about to name it, so it is
        waited for; one that stays unnamed belongs to a process that was killed in that moment.
        """
        states = self.optuna.trial.TrialState
        until = time.monotonic() + UNNAMED_S
        while True:
            unnamed = False
            for other in self.study.get_trials(deepcopy=False):
                attributes = other.user_attrs
                if other.number >= number or "void" in attributes:
                    continue
                if ARM not in attributes:
                    begun = other.datetime_start
                    fresh = begun is not None and time.time() - begun.timestamp() < UNNAMED_S
                    unnamed |= other.state == states.RUNNING and fresh
                elif _key(other) == (rank, seed) and not (other.state == states.RUNNING and _is_gone(other)):
                    return True
            if not unnamed or time.monotonic() > until:
                return False
            time.sleep(0.05)

    def _call(self, trial: Any, rank: Rank, seed: int) -> float:
        keywords: dict[str, Any] = {}
        if "seed" in self.accepts:
            keywords["seed"] = seed
        if "report" in self.accepts:
            keywords["report"] = lambda step, value: _report(self.optuna, trial, step, value)
        positional = (rank,)
        if "rank" in self.accepts:
            positional, keywords["rank"] = (), rank
        value = float(self.function(*positional, **keywords))
        if not abs(value) < DIVERGED:
            raise ValueError(f"train_and_evaluate returned {value}")
        return value


def _report(optuna, trial, step: int, value: float) -> None:
    trial.report(float(value), int(step))
    if trial.should_prune():
        raise optuna.TrialPruned()


def _keywords(function: Callable) -> set[str]:
    """Which of `seed` and `report` a function takes, and `rank` where it takes it by name only."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # no signature: a built-in
        return set()
    taken = {p.name for p in parameters if p.name == "rank" and p.kind is p.KEYWORD_ONLY}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return taken | {"seed"}
    return taken | {p.name for p in parameters if p.name in ("seed", "report")}


def _key(trial: Any) -> tuple[Rank, int]:
    return trial.user_attrs[ARM]["rank"], trial.user_attrs[ARM]["seed"]


def _is_gone(running: Any) -> bool:
    """Whether the process that took a trial is gone: on this machine it can be asked, elsewhere a day must pass."""
    arm = running.user_attrs[ARM]
    if arm["host"] != platform.node():
        return time.time() - running.datetime_start.timestamp() > STALE_S
    try:
        os.kill(arm["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
