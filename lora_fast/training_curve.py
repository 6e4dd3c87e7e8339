"""What the curves of one training say about its rank: losses on the training text and on held-out text, by step.

Signal 1 of the guide "How to choose the rank r?". Its words (slowly, close, low, high) carry no numbers; the thresholds
here are ours."""

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from numbers import Real

from lora_fast.config import LoraFastError
from lora_fast.rank_evidence import GUIDE_RANK

# Of the fall of the held-out loss (before training, to its least): a later rise by this share is overfitting, a gap to
# the training loss that grew by this share is too, and a last interval with this share says that it was still falling.
RISE, GAP, STILL = 0.1, 0.25, 0.1
# A fall of both losses by less than this share of where they began is no learning.
SLOW = 0.01
# Of the fall of the training loss, means over fifths of the steps: rising again by this share is instability.
UNSTABLE = 0.5
PARTS = 5
# So many standard errors apart, two means are told from each other, as those of a rank search are.
TOLD_APART = 2.5
# What each finding makes of a rank; full fine-tuning has none, so that there the finding is the verdict.
OF_RANK = {"unstable": "too large", "overfits": "too large", "learned little": "too small"}
SOURCE = (
    f"{GUIDE_RANK}, signal 1 (too small: falls slowly, both losses high; fits: falls smoothly, both close; too large: "
    "training loss low, validation loss higher, unstable). A rule of thumb without a measurement; its thresholds are "
    f"ours: slow is a fall of less than {SLOW:.0%}; higher is a gap that grew by {GAP:.0%} of the fall, or a rise by "
    f"{RISE:.0%} of it; unstable is a training loss that rose again by {UNSTABLE:.0%} of its fall"
)


@dataclass(frozen=True)
class CurveReading:
    """verdict: "too small", "fits", "too large" or "can't tell"; of full fine-tuning, which has no rank, "learned
    little", "fits", "unstable", "overfits" or "can't tell". sentence: why, with figures. gap: by how much the held-out
    loss is above the training loss at the end, less by how much it was at the start (of two texts one is the easier; a
    held-out loss that stays below is no overfitting). rise: of the held-out loss above its least. Both None where there
    are too few points."""

    verdict: str
    sentence: str
    gap: float | None = None
    rise: float | None = None
    source: str = SOURCE

    def to_dict(self) -> dict:
        return asdict(self)


def read_training_curve(
    train: Iterable[tuple[float, float]],
    evaluation: Iterable[tuple[float, float]],
    *,
    expected: float | None = None,
    noise: float = 0.0,
    full: bool = False,
) -> CurveReading:
    """Read (step, loss) of the training text and of held-out text, in one unit, as Trainer's log has them.

    evaluation: best with one before training, at step 0. expected: the held-out loss that was to be reached, such as
    that of the best rank after as many steps; without it a curve that fell can't be called high, and a rank that is
    too small is found only where hardly anything was learned. noise: what two held-out losses may differ by chance.
    full: the training was full fine-tuning.
    Raises LoraFastError for pairs that are none, steps that don't ascend, or settings that are no numbers."""
    for name, value, least in (("expected", expected, -math.inf), ("noise", noise, 0)):
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and value >= least
        if not number and not (name == "expected" and value is None):
            raise LoraFastError(f"{name}={value!r}; expected a finite number{' of at least 0' if least == 0 else ''}")
    train, evaluation = _pairs(train, "train"), _pairs(evaluation, "evaluation")
    if len(train) < PARTS or len(evaluation) < 3:
        short = f"{len(train)} training losses and {len(evaluation)} evaluations; {PARTS} and 3 are needed"
        return CurveReading("can't tell", short)
    if not all(math.isfinite(loss) for _, loss in (*train, *evaluation)):
        step = next(step for step, loss in (*train, *evaluation) if not math.isfinite(loss))
        said = f"the loss was not finite at step {step:g}: training diverged, which says more about the learning rate"
        return CurveReading("can't tell", said)

    levels = _parts([loss for _, loss in train])
    losses = [loss for _, loss in evaluation]
    start, end, least = losses[0], losses[-1], min(losses)
    fall, rise = start - least, end - least
    gap = (end - levels[-1]) - max(0.0, start - train[0][1])
    found = {"gap": gap, "rise": rise}
    verdicts = {name: name if full else verdict for name, verdict in OF_RANK.items()}
    short = None if expected is None else end - expected
    learned = max(levels[0] - levels[-1], train[0][1] - levels[-1])

    # First of all: where nothing was learned, any noise is a large share of the fall.
    if _is_flat(train, levels) and max(abs(loss - start) for loss in losses) <= max(noise, SLOW * abs(start)):
        if short is not None and short > noise:
            return CurveReading(verdicts["learned little"], _short_of(short, expected), **found)
        return _nothing_learned(start, least, short is not None, verdicts["learned little"], full, found)
    regained = max(later - earlier for earlier, later in itertools.combinations(levels, 2))
    if regained > UNSTABLE * (levels[0] - min(levels)) + noise:
        by = "by the learning rate" if full else "by the rank or by the learning rate"
        said = f"the training loss rose again by {regained:.3g}: unstable, {by}"
        return CurveReading(verdicts["unstable"], said, **found)
    if rise > max(noise, RISE * fall) and learned > 0:
        at = evaluation[losses.index(least)][0]
        said = f"the held-out loss rose by {rise:.3g} after step {at:g} while the training loss fell: overfitting"
        return CurveReading(verdicts["overfits"], said, **found)
    if gap > max(noise, GAP * fall) and learned > 0:
        share = f", {gap / fall:.0%} of its fall" if fall else ", which never fell"
        said = f"the training loss ended {gap:.3g} further below the held-out loss{share}"
        return CurveReading(verdicts["overfits"], said, **found)
    if short is not None and short > noise:
        said = _short_of(short, expected) + _ending(losses, noise)
        return CurveReading(verdicts["learned little"], said, **found)
    if fall < SLOW * abs(start) and learned < SLOW * abs(train[0][1]):
        return _nothing_learned(start, least, short is not None, verdicts["learned little"], full, found)
    said = f"both losses fell together, held-out from {start:.4g} to {end:.4g}, and the gap grew by {max(gap, 0):.2g}"
    ending = _ending(losses, noise)
    if ending and short is None:
        return CurveReading("can't tell", said + ending, **found)
    return CurveReading("fits", said + ending, **found)


def learned_nothing(losses: Sequence[float], noise: float = 0.0) -> bool:
    """Whether held-out losses, the first before training, fell by less than SLOW, or by no more than the noise."""
    fall = losses[0] - min(losses)
    return fall < SLOW * abs(losses[0]) or fall <= noise


def falls_still(losses: Sequence[float], noise: float = 0.0) -> float | None:
    """By how much held-out losses, the first before training, still fell in the last interval; None where they did not
    by more than the noise, or STILL of the whole fall."""
    last = losses[-2] - losses[-1]
    return last if last > max(noise, STILL * (losses[0] - min(losses))) else None


def _is_flat(train: list[tuple[float, float]], levels: list[float]) -> bool:
    """Whether training losses moved by less than SLOW, or by no more than their scatter from step to step makes of it.

    The scatter is read from second differences, which a steady fall leaves out, and by their median, which a jump does:
    of equal scatter σ they have √6 σ, and the median of |x| is 0.6745 of a normal x's."""
    losses = [loss for _, loss in train]
    bends = [abs(before - 2 * loss + after) for before, loss, after in zip(losses, losses[1:], losses[2:])]
    error = TOLD_APART * statistics.median(bends) / (0.6745 * math.sqrt(6))
    least, share = SLOW * abs(losses[0]), PARTS / len(losses)
    spread, fall = max(levels) - min(levels), losses[0] - levels[-1]
    return spread < max(least, error * math.sqrt(2 * share)) and fall < max(least, error * math.sqrt(1 + share))


def _short_of(short: float, expected: float) -> str:
    return f"the held-out loss stayed {short:.3g} above the {expected:.4g} that was expected"


def _nothing_learned(
    start: float, least: float, was_expected: bool, verdict: str, full: bool, found: dict
) -> CurveReading:
    by = f"less than {SLOW:.0%}" if start - least < SLOW * abs(start) else "no more than noise"
    said = f"the losses fell by {by}, held-out from {start:.4g} to {least:.4g}"
    if was_expected:
        return CurveReading("fits", said + ", and no more was expected", **found)
    why = "too small a learning rate, or too few steps" if full else "too small a rank, or learning rate"
    return CurveReading(verdict, f"{said}: {why}", **found)


def _ending(losses: list[float], noise: float) -> str:
    last = falls_still(losses, noise)
    return "" if last is None else f", still falling at the end, by {last:.2g}: train longer first"


def _pairs(points: Iterable[tuple[float, float]], name: str) -> list[tuple[float, float]]:
    try:
        found = [(float(step), float(loss)) for step, loss in points]
    except (TypeError, ValueError) as error:
        raise LoraFastError(f"{name} holds no pairs (step, loss): {error}") from None
    if any(later <= earlier for (earlier, _), (later, _) in itertools.pairwise(found)):
        raise LoraFastError(f"{name}: its steps don't ascend; expected (step, loss) in the order of training")
    return found


def _parts(values: list[float]) -> list[float]:
    """Means over PARTS stretches of about equal length."""
    edges = [round(i * len(values) / PARTS) for i in range(PARTS + 1)]
    return [statistics.fmean(values[low:high]) for low, high in itertools.pairwise(edges)]
