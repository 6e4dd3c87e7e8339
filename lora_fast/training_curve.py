"""What the curves of one training say about its rank: losses on the training text and on held-out text, by step.

Signal 1 of the guide "How to choose the rank r?". Its words (slowly, close, low, high) carry no numbers; the thresholds
here are ours."""

import itertools
import math
import statistics
from collections.abc import Iterable
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
SOURCE = (
    f"{GUIDE_RANK}, signal 1 (too small: falls slowly, both losses high; fits: falls smoothly, both close; too large: "
    "training loss low, validation loss higher, unstable). A rule of thumb without a measurement; its thresholds are "
    f"ours: slow is a fall of less than {SLOW:.0%}; higher is a gap that grew by {GAP:.0%} of the fall, or a rise by "
    f"{RISE:.0%} of it; unstable is a training loss that rose again by {UNSTABLE:.0%} of its fall"
)


@dataclass(frozen=True)
class CurveReading:
    """verdict: "too small", "fits", "too large" or "can't tell". sentence: why, with figures. gap: by how much the
    held-out loss is above the training loss at the end, less by how much it was at the start (of two texts one is the
    easier; a held-out loss that stays below is no overfitting). rise: of the held-out loss above its least. Both None
    where there are too few points."""

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
) -> CurveReading:
    """Read (step, loss) of the training text and of held-out text, in one unit, as Trainer's log has them.

    evaluation: best with one before training, at step 0. expected: the held-out loss that was to be reached, such as
    that of the best rank after as many steps; without it a curve that fell can't be called high, and a rank that is
    too small is found only where hardly anything was learned. noise: what two held-out losses may differ by chance.
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

    regained = max(later - earlier for earlier, later in itertools.combinations(levels, 2))
    if regained > UNSTABLE * (levels[0] - min(levels)) + noise:
        said = f"the training loss rose again by {regained:.3g}: unstable, by the rank or by the learning rate"
        return CurveReading("too large", said, **found)
    learned = max(levels[0] - levels[-1], train[0][1] - levels[-1])
    if rise > max(noise, RISE * fall) and learned > 0:
        at = evaluation[losses.index(least)][0]
        said = f"the held-out loss rose by {rise:.3g} after step {at:g} while the training loss fell: overfitting"
        return CurveReading("too large", said, **found)
    if gap > max(noise, GAP * fall) and learned > 0:
        share = f", {gap / fall:.0%} of its fall" if fall else ", which never fell"
        said = f"the training loss ended {gap:.3g} further below the held-out loss{share}"
        return CurveReading("too large", said, **found)
    short = None if expected is None else end - expected
    if short is not None and short > noise:
        said = f"the held-out loss stayed {short:.3g} above the {expected:.4g} that was expected"
        return CurveReading("too small", said + _ending(losses, fall, noise), **found)
    if fall < SLOW * abs(start) and learned < SLOW * abs(train[0][1]):
        said = f"the losses fell by less than {SLOW:.0%}, held-out from {start:.4g} to {least:.4g}"
        if short is not None:
            return CurveReading("fits", said + ", and no more was expected", **found)
        return CurveReading("too small", said + ": too small a rank, or learning rate", **found)
    said = f"both losses fell together, held-out from {start:.4g} to {end:.4g}, and the gap grew by {max(gap, 0):.2g}"
    ending = _ending(losses, fall, noise)
    if ending and short is None:
        return CurveReading("can't tell", said + ending, **found)
    return CurveReading("fits", said + ending, **found)


def _ending(losses: list[float], fall: float, noise: float) -> str:
    last = losses[-2] - losses[-1]
    return f", still falling at the end, by {last:.2g}: train longer first" if last > max(noise, STILL * fall) else ""


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
