"""Ranks to try, intervals of paired ratios, and crossovers, on constructed numbers whose answers are known."""

import math

import numpy as np
import pytest

from lora_fast import LoraFastError
from lora_fast.profiler import models
from lora_fast.profiler.crossover import (
    ALWAYS,
    BRACKETED,
    NEVER,
    UNMEASURED,
    crossover,
    crossovers,
    flops_ratio_at,
    non_decreasing,
    ranks_of_shares,
    shares_sentence,
)
from lora_fast.profiler.intervals import MIN_ROUNDS, interval, log_ratios, ratio_with_interval, resampled_medians
from lora_fast.profiler.profile import Arm
from lora_fast.profiler.ranks import auto_ranks, parse_ranks

RANKS = [1, 4, 16, 64, 256]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,2,4", [1, 2, 4]),
        ("64, 8,8", [8, 64]),
        ("4:1024:x2", [4, 8, 16, 32, 64, 128, 256, 512, 1024]),
        ("3:100:x5", [3, 15, 75]),
        ("1,8:32:x2,256", [1, 8, 16, 32, 256]),
        ("7:7:x2", [7]),
        ([16, 4], [4, 16]),
        (12, [12]),
        ("auto", None),
        ("AUTO", None),
    ],
)
def test_ranks_are_read(text, expected):
    assert parse_ranks(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "0", "-4", "4,0", "2.5", "eight", "4:", "4:64", "4:64:2", "64:4:x2", "4:64:x1", "0:8:x2", "1;2", "²"]
    + [[], [0], [2.0], [True], [None], 8.5, None],
)
def test_what_is_no_rank_is_refused(text):
    with pytest.raises(LoraFastError, match="rank"):
        parse_ranks(text)


def linears(*shapes):
    import torch

    return [torch.nn.Linear(k, n, device="meta") for k, n in shapes]


def test_auto_ranks_end_where_lora_meets_the_dense_model():
    import torch

    # One linear of 64 → 64: a rank costs 128 parameters, so r = 32 trains the 4096 of the weight; the bias adds none.
    targets = [torch.nn.Linear(64, 64, bias=False, device="meta")]
    assert auto_ranks(targets[0], targets, 128) == [2, 8, 32]
    # The embedding beside it makes room for r = 64 = min(N, K), above which there is nothing to gain.
    model = torch.nn.Sequential(torch.nn.Embedding(1000, 64, device="meta"), *targets)
    assert auto_ranks(model, targets, 128) == [1, 4, 16, 64]


def test_auto_ranks_are_at_most_six():
    targets = linears((8192, 8192))
    ranks = auto_ranks(targets[0], targets, 2 * 8192)
    assert ranks == [4, 16, 64, 256, 1024, 4096]


def test_non_decreasing_pools_what_violates():
    assert non_decreasing([1, 2, 3]) == [1, 2, 3]
    assert non_decreasing([3, 1]) == [2, 2]
    assert non_decreasing([1, 5, 3, 4, 9]) == [1, 4, 4, 4, 9]
    assert non_decreasing([4, 3, 2, 1]) == [2.5] * 4


def affine(constant, slope, ranks=RANKS):
    """ln(ratio to full) of a cost constant + slope · r, where full costs 1."""
    return [math.log(constant + slope * rank) for rank in ranks]


@pytest.mark.parametrize("true", [1.5, 10, 37.3, 64.5, 200])
def test_the_crossover_of_an_affine_cost_is_exact(true):
    found = crossover(RANKS, affine(0.6, 0.4 / true))
    low, high = found.bracket
    assert found.status == BRACKETED
    assert low < true < high and RANKS.index(high) == RANKS.index(low) + 1
    assert found.rank == pytest.approx(true, rel=1e-9)


def test_a_cost_of_exactly_one_is_no_longer_cheaper():
    found = crossover([1, 16, 64], [math.log(0.5), 0.0, math.log(2)])
    assert found.bracket == (1, 16) and found.rank == pytest.approx(16)


def test_no_crossover_is_said_on_both_sides():
    never = crossover(RANKS, affine(0.5, 0.001))
    assert never.status == NEVER and never.bracket == (256, None) and never.rank is None
    assert "none up to r=256" in never.sentence("time")
    always = crossover(RANKS, affine(1.01, 0.001))
    assert always.status == ALWAYS and always.bracket == (None, 1) and always.rank is None
    assert "even at r=1" in always.sentence("memory")
    assert crossover([], []).status == UNMEASURED


def test_noise_does_not_invent_a_second_crossing():
    # 1.01 then 0.98 is pooled to just below 1, so the last cheap rank is 64 and not 4; the mean of logs is the pool.
    found = crossover(RANKS, [math.log(v) for v in (0.90, 0.95, 1.01, 0.98, 1.30)])
    pooled = math.sqrt(1.01 * 0.98)
    assert found.bracket == (64, 256)
    assert found.rank == pytest.approx(64 + (1 - pooled) / (1.30 - pooled) * 192)
    # 1.05 then 0.98 is pooled to above 1.
    assert crossover(RANKS, [math.log(v) for v in (0.90, 0.95, 1.05, 0.98, 1.30)]).bracket == (4, 16)


def test_a_rank_that_ran_out_of_memory_brackets_without_a_place():
    found = crossover([8, 64, 512], [math.log(0.5), math.log(0.8), math.inf])
    assert found.status == BRACKETED and found.bracket == (64, 512) and found.rank is None
    assert "between r=64 and r=512" in found.sentence("memory")
    beyond = crossover([8, 64], [math.inf, math.inf])
    assert beyond.status == ALWAYS and beyond.bracket == (None, 8)


def arms_of(time=None, flops=None, memory=None, rounds=11):
    """LoRA at RANKS and full, whose step takes 100 ms in even rounds and 300 ms in odd ones; each cost is given as
    (constant, slope): constant + slope · r of full's."""
    clock = np.where(np.arange(rounds) % 2, 300.0, 100.0)
    made = []
    for rank in RANKS:
        arm = Arm("lora", rank, rank, 0.1)
        if time:
            arm.ratio_to_full = time[0] + time[1] * rank
            arm.samples_ms = (clock * arm.ratio_to_full).tolist()
        if flops:
            arm.flops_ratio = flops[0] + flops[1] * rank
        if memory:
            arm.memory_ratio = memory[0] + memory[1] * rank
        made.append(arm)
    full = Arm("full", None, 1000, 1.0, step_ms=100.0 if time else None, peak_MiB=1e3 if memory else None)
    full.samples_ms = clock.tolist() if time else []
    return [*made, full]


def test_three_costs_have_three_crossovers():
    found = crossovers(arms_of(time=(0.8, 0.2 / 40), flops=(0.7, 0.3 / 100), memory=(0.5, 1e-4)), seed=0)
    assert [found[cost].bracket for cost in ("time", "flops", "memory")] == [(16, 64), (64, 256), (256, None)]
    assert found["time"].rank == pytest.approx(40) and found["time"].interval == pytest.approx((40, 40))
    assert found["flops"].rank == pytest.approx(100) and found["flops"].interval is None
    assert [found[cost].short for cost in ("time", "flops", "memory")] == ["40 [40–40]", "100", ">256"]


def test_a_cost_that_nobody_knows_has_no_crossover():
    found = crossovers(arms_of(memory=(2.0, 0.0)), seed=0)
    assert found["time"].status == found["flops"].status == UNMEASURED
    assert "FLOPs were not counted" in found["flops"].sentence("FLOPs") and found["flops"].short == "–"
    assert found["memory"].short == "<1"


def test_a_full_arm_of_another_process_gives_a_bracket_without_an_interval():
    arms = arms_of(time=(0.8, 0.2 / 40))
    arms[-1].samples_ms = arms[-1].samples_ms[:-2]
    found = crossovers(arms, seed=0)["time"]
    assert found.bracket == (16, 64) and found.rank == pytest.approx(40) and found.interval is None


def test_arms_of_peft_are_not_ranks_of_ours():
    arms = arms_of(flops=(0.7, 0.3 / 100), memory=(0.5, 1e-4))
    arms.insert(0, Arm("peft", 1, 1, 0.1, flops_ratio=2.0, memory_ratio=3.0))
    found = crossovers(arms, seed=0)
    assert found["flops"].bracket == (64, 256) and found["memory"].short == ">256"
    assert flops_ratio_at(arms, 100) == pytest.approx(1)


def test_a_short_answer_says_how_it_is_censored():
    draws = np.log([[0.9, 1.05, 1.2, 1.4, 1.6], [0.9, 0.95, 0.97, 0.98, 0.99]] * 50)
    found = crossover(RANKS, [math.log(v) for v in (0.9, 0.95, 0.98, 1.3, 1.5)], draws)
    assert found.interval == (pytest.approx(3), None) and found.short.endswith("[3–>256]")
    assert crossover([8, 64], [math.log(0.5), math.inf]).short == "8–64"


def test_shares_of_the_parameters_are_where_they_should_be():
    """Llama-3-8B with every linear of its layers adapted: 2,621,440 parameters for one rank."""
    parameters, per_rank = 8_030_261_248, 2_621_440
    ranks = ranks_of_shares(parameters, per_rank)
    assert {share: round(rank) for share, rank in ranks.items()} == {"10%": 340, "20%": 766}
    for share, rank in ranks.items():
        assert rank * per_rank / (parameters + rank * per_rank) == pytest.approx(float(share.rstrip("%")) / 100)
    text = shares_sentence(ranks, arms_of(flops=(0.6656, 0.0003487)))
    assert "10% of all at r≈340 and 20% of all at r≈766" in text
    assert "warning sign" in text and "0.78 and 0.93 of full's FLOPs" in text
    assert "FLOPs" not in shares_sentence(ranks, arms_of(memory=(0.5, 0.1)))


def noisy_columns(rng, rounds, ratios, noise=0.03, disturbance=0.5):
    """(rounds, arms) step times of arms and of the baseline; a round's disturbance hits every step of it alike."""
    rounds_factor = np.exp(disturbance * rng.standard_normal(rounds))
    baseline = rounds_factor * np.exp(noise * rng.standard_normal(rounds))
    arms = rounds_factor[:, None] * np.asarray(ratios) * np.exp(noise * rng.standard_normal((rounds, len(ratios))))
    return np.stack([log_ratios(arm, baseline) for arm in arms.T], axis=1)


def test_the_crossover_interval_covers_the_truth_and_is_censored_at_the_ends():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(60):
        logs = noisy_columns(rng, 20, np.exp(affine(0.8, 0.2 / 40)))
        found = crossover(RANKS, np.median(logs, axis=0).tolist(), resampled_medians(logs, seed=trial, resamples=300))
        low, high = found.interval
        assert found.status == BRACKETED and low <= found.rank <= high
        hits += low <= 40 <= high
    assert hits >= 51  # 95% of 60 is 57; fewer than 51 has probability below 1% even at 91%

    logs = noisy_columns(rng, 20, np.exp(affine(0.8, 0.2 / 250)))
    found = crossover(RANKS, np.median(logs, axis=0).tolist(), resampled_medians(logs, seed=0))
    assert found.interval[0] > 64 and found.interval[1] is None
    assert "to above 256" in found.sentence("time")
    far = noisy_columns(rng, 20, np.exp(affine(0.3, 0.0001)))
    assert crossover(RANKS, np.median(far, axis=0).tolist(), resampled_medians(far)).interval is None


@pytest.mark.parametrize("rounds", [MIN_ROUNDS, 11, 30])
def test_the_interval_covers_the_ratio_as_often_as_it_says(rounds):
    rng = np.random.default_rng(rounds)
    hits = 0
    for trial in range(400):
        logs = noisy_columns(rng, rounds, [0.93])
        low, high = interval(resampled_medians(logs, seed=trial, resamples=400)[:, 0])
        hits += low <= math.log(0.93) <= high
    # A resampled median is a discrete thing: 90 to 99% at these few rounds. Sequential timing, the mistake that this
    # replaces, would cover next to never, since the disturbance is fifteen times the noise.
    assert 0.90 <= hits / 400 <= 0.995


def test_a_disturbance_of_the_whole_round_cancels():
    factor = np.array([1.0, 30.0, 1.2, 7.0, 1.0, 2.0, 5.0])
    ratio, (low, high) = ratio_with_interval(1.05 * 200 * factor, 200 * factor)
    assert (ratio, low, high) == pytest.approx((1.05, 1.05, 1.05))


def test_infinite_draws_censor_and_never_become_numbers_in_between():
    draws = np.array([10.0] * 94 + [math.inf] * 6)
    assert interval(draws) == (10.0, math.inf)


@pytest.mark.parametrize(
    ("shape", "parameters"),
    # Llama 3's counts as published with the checkpoints of 3.2-1B, 3.2-3B and 3.1-8B.
    [
        ("llama-5m", 4_999_424),
        ("llama-1b", 1_235_814_400),
        ("llama-3b", 3_212_749_824),
        ("llama-8b", 8_030_261_248),
    ],
)
def test_built_in_shapes_have_their_size(shape, parameters):
    import torch

    model = models.build(models.resolve(shape), device="meta", dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.training and model.config.use_cache is False
