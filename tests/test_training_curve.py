"""Signal 1: every branch of the reading of a training's curves, at its threshold from both sides."""

import math

import pytest

from lora_fast import LoraFastError
from lora_fast.training_curve import GAP, RISE, SLOW, UNSTABLE, read_training_curve

STEPS = 20


def falling(start, end, steps=STEPS):
    """Exponential decay, the last part flat: (step, loss) for steps 1 … steps."""
    return [(s, end + (start - end) * math.exp(-8 * s / steps)) for s in range(1, steps + 1)]


def held_out(*losses):
    return list(enumerate(losses))


FALL = 1.0
GOOD = held_out(3.0, 2.3, 2.05, 2.0, 2.0)


def test_losses_that_fall_together_fit():
    found = read_training_curve(falling(3.0, 2.0), GOOD)
    assert found.verdict == "fits"
    assert found.rise == 0.0
    assert "signal 1" in found.source and f"{GAP:.0%}" in found.source


@pytest.mark.parametrize(("factor", "verdict"), [(0.9, "fits"), (1.1, "too large")])
def test_a_held_out_loss_that_rises_again_is_overfitting(factor, verdict):
    rise = factor * RISE * FALL
    found = read_training_curve(falling(3.0, 2.0), held_out(3.0, 2.1, 2.0, 2.0 + rise / 2, 2.0 + rise))
    assert found.verdict == verdict
    assert found.rise == pytest.approx(rise)
    # Within the noise it is none.
    assert read_training_curve(falling(3.0, 2.0), held_out(3.0, 2.0, 2.0 + rise), noise=2 * rise).verdict == "fits"


@pytest.mark.parametrize(("factor", "verdict"), [(0.9, "fits"), (1.1, "too large")])
def test_a_gap_that_grows_is_too_large_a_rank(factor, verdict):
    train = falling(3.0, 2.0)
    first, last = train[0][1], sum(loss for _, loss in train[-4:]) / 4
    wanted = factor * GAP * FALL  # gap: (2.0 − last − shift) − (3.0 − first)
    shift = wanted - (2.0 - last) + (3.0 - first)
    train = [train[0]] + [(step, loss - shift) for step, loss in train[1:]]
    found = read_training_curve(train, GOOD)
    assert found.verdict == verdict
    assert found.gap == pytest.approx(wanted)


def test_of_two_texts_one_may_be_the_easier():
    """A gap that was there from the start, either way, is not overfitting."""
    harder = [(step, loss + 0.6) for step, loss in GOOD]
    assert read_training_curve(falling(3.0, 2.0), harder).verdict == "fits"
    # The training text is the harder one: its loss comes nearer, and stays above.
    assert read_training_curve(falling(3.9, 2.1), GOOD).verdict == "fits"
    assert read_training_curve(falling(3.9, 1.6), GOOD).verdict == "too large"


def test_a_held_out_loss_that_never_falls_is_memorizing():
    found = read_training_curve(falling(3.0, 2.0), held_out(3.0, 3.0, 3.0))
    assert found.verdict == "too large" and "never fell" in found.sentence


@pytest.mark.parametrize(("factor", "verdict"), [(0.9, "fits"), (1.1, "too large")])
def test_a_training_loss_that_rises_again_is_unstable(factor, verdict):
    # Fifths of 4 losses each: 3.0, 2.0, 2.0 + x, 2.0, 2.0 — x against half of the fall of 1.
    levels = (3.0, 2.0, 2.0 + factor * UNSTABLE, 2.0, 2.0)
    train = [(4 * part + k + 1, level) for part, level in enumerate(levels) for k in range(4)]
    found = read_training_curve(train, GOOD)
    assert found.verdict == verdict
    assert ("unstable" in found.sentence) == (verdict == "too large")


@pytest.mark.parametrize(("factor", "verdict"), [(0.9, "too small"), (1.1, "fits")])
def test_hardly_any_fall_is_too_small_a_rank(factor, verdict):
    end = 3.0 * (1 - factor * SLOW)
    evaluation = held_out(3.0, end, end, end)
    assert read_training_curve(falling(3.0, end), evaluation).verdict == verdict
    # Where no more was to be learned, the least rank does.
    assert read_training_curve(falling(3.0, end), evaluation, expected=end).verdict == "fits"


UNLEARNED = held_out(5.613, 5.61, 5.6, 5.59, 5.58)


@pytest.mark.parametrize("scatter", [0.02, 0.3])
def test_where_nothing_was_learned_noise_is_no_instability(scatter):
    """The first by the share of the loss, the second by what the training losses scatter from step to step."""
    steps = [1, -1, -1, 0, 1, 1, -1, 0, -1, 1, 1, -1, 0, 1, -1, 1, 1, 0, 1, -1]
    train = [(s, 5.6 + scatter * step) for s, step in enumerate(steps, 1)]
    found = read_training_curve(train, UNLEARNED)
    assert found.verdict == "too small" and "fell by less than 1%" in found.sentence
    assert "unstable" not in found.sentence and "too small a rank, or learning rate" in found.sentence
    of_full = read_training_curve(train, UNLEARNED, full=True)
    assert of_full.verdict == "learned little" and "rank" not in of_full.sentence
    above = read_training_curve(train, UNLEARNED, expected=5.0)
    assert above.verdict == "too small" and "0.58 above" in above.sentence


def test_what_moved_is_not_taken_for_noise():
    """A loss that rose for good, and one that fell at once while the held-out loss stayed, which is memorizing."""
    risen = [(s, 3.0 if s <= 8 else 3.4) for s in range(1, 21)]
    found = read_training_curve(risen, held_out(3.0, 3.0, 3.4))
    assert found.verdict == "too large" and "unstable, by the rank" in found.sentence
    for count in (5, 20):
        at_once = [(s, 3.0 if s == 1 else 2.0) for s in range(1, count + 1)]
        assert read_training_curve(at_once, held_out(3.0, 3.0, 3.0)).verdict == "too large"


def test_full_fine_tuning_has_no_rank_to_be_too_large():
    unstable = read_training_curve([(s, 3.0 if s <= 8 else 3.4) for s in range(1, 21)], GOOD, full=True)
    assert unstable.verdict == "unstable" and unstable.sentence.endswith("unstable, by the learning rate")
    assert read_training_curve(falling(3.0, 2.0), held_out(3.0, 2.1, 2.0, 2.1, 2.2), full=True).verdict == "overfits"
    assert read_training_curve(falling(3.0, 2.0), GOOD, full=True).verdict == "fits"
    assert read_training_curve(falling(3.0, 2.0), GOOD, expected=1.9, full=True).verdict == "learned little"


def test_a_loss_above_the_expected_one_is_too_small_a_rank():
    train = falling(3.0, 2.0)
    assert read_training_curve(train, GOOD, expected=1.9).verdict == "too small"
    assert "0.1 above" in read_training_curve(train, GOOD, expected=1.9).sentence
    assert read_training_curve(train, GOOD, expected=1.9, noise=0.11).verdict == "fits"
    assert read_training_curve(train, GOOD, expected=2.1).verdict == "fits"
    # Overfitting is not cured by a larger rank.
    assert read_training_curve(train, held_out(3.0, 2.0, 2.4), expected=1.9).verdict == "too large"


def test_a_training_that_was_cut_short_says_so():
    train = [(s, 3.0 - 0.05 * s) for s in range(1, 21)]
    evaluation = held_out(3.0, 2.75, 2.5, 2.25, 2.0)
    assert read_training_curve(train, evaluation).verdict == "can't tell"
    assert "train longer" in read_training_curve(train, evaluation).sentence
    assert read_training_curve(train, evaluation, expected=2.0).verdict == "fits"
    short = read_training_curve(train, evaluation, expected=1.5)
    assert short.verdict == "too small" and "train longer" in short.sentence


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_tells_nothing_about_the_rank(bad):
    found = read_training_curve([*falling(3.0, 2.0), (STEPS + 1, bad)], GOOD)
    assert found.verdict == "can't tell"
    assert "diverged" in found.sentence and f"step {STEPS + 1}" in found.sentence
    assert read_training_curve(falling(3.0, 2.0), held_out(3.0, bad, 2.0)).verdict == "can't tell"


def test_too_few_points_tell_nothing():
    assert read_training_curve(falling(3.0, 2.0, 4), GOOD).verdict == "can't tell"
    assert read_training_curve(falling(3.0, 2.0), held_out(3.0, 2.0)).verdict == "can't tell"


def test_what_is_no_curve_is_refused():
    with pytest.raises(LoraFastError, match=r"train holds no pairs \(step, loss\)"):
        read_training_curve([3.0, 2.0], GOOD)
    with pytest.raises(LoraFastError, match="evaluation: its steps don't ascend"):
        read_training_curve(falling(3.0, 2.0), [(0, 3.0), (10, 2.0), (5, 2.0)])


@pytest.mark.parametrize("wrong", [{"noise": "x"}, {"noise": -1.0}, {"noise": math.nan}, {"expected": "low"}])
def test_what_is_no_number_is_refused(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(LoraFastError, match=f"{name}={value!r}; expected a finite number"):
        read_training_curve(falling(3.0, 2.0), GOOD, **wrong)
