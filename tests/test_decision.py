"""The decision: each rule of both guides from inputs, precedence, what is measured next, totality and monotonicity."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fast import Decision, LoraFastError, decide, lora_svdvals, search_rank
from lora_fast.decision import section
from lora_fast.profiler.crossover import crossovers
from lora_fast.profiler.profile import Arm, Profile
from lora_fast.rank_rules import TASKS
from lora_fast.spectrum import Spectrum

TOTAL, PER_RANK = 8_030_261_248, 2_621_440  # Llama-3-8B, all linear layers: r=341 is 10%, r=766 is 20%


def profile(ratios, memory=0.6, *, total=TOTAL, per_rank=PER_RANK, estimated=False, noisy=False, full="ok", oom=()):
    """A Profile with these ratios of step times (in an estimate: FLOPs) to full fine-tuning."""
    arms = []
    for rank, ratio in ratios.items():
        share = rank * per_rank / (total + rank * per_rank)
        arm = Arm("lora", rank, rank * per_rank, share, memory_ratio=memory, tokens_per_s=1000 / ratio)
        if estimated:
            arm.flops_ratio = ratio
        else:
            arm.ratio_to_full, arm.ratio_ci = ratio, (ratio - 0.02, ratio + 0.02)
        arms.append(arm)
    arms += [Arm("lora", rank, rank * per_rank, 0.5, status="oom") for rank in oom]
    arms.append(Arm("full", None, total, 1.0, status=full, tokens_per_s=1000))
    aa = {"ratio": 1.0, "ci": (0.98, 1.02), "noise_floor": 0.2 if noisy else 0.02, "limit": 0.1}
    workload = {"model": "llama", "parameters": total, "method": "estimated" if estimated else "measured"}
    return Profile({}, workload, arms, None if estimated else aa, crossovers(arms, 0))


CHEAP = {1: 0.7, 16: 0.72, 64: 0.75, 256: 0.85, 1024: 0.94}
SLOW = {1: 0.8, 16: 0.87, 64: 1.01, 256: 1.61}


def search(losses, seeds=2, **options):
    """A real search over all of these, with a difference of 0.02 between two seeds; without its times, which for
    trainings of no length are noise."""
    train = lambda rank, seed: losses[rank] + (0.01 if seed % 2 else -0.01)  # noqa: E731
    found = search_rank(train, list(losses), "grid", seeds=seeds, **options)
    return replace(found, trials=tuple(replace(trial, seconds=None) for trial in found.trials))


PLATEAU = {1: 3.0, 2: 2.6, 4: 2.3, 8: 2.0, 16: 2.0, 32: 2.0}
RISING = {1: 3.0, 4: 2.6, 16: 2.3, 64: 2.0}
FALLING = {1: 3.0, 4: 2.0, 16: 2.4, 64: 2.9}


def spectra(values, rank, shape=(200, 120)):
    values = torch.tensor(values, dtype=torch.float64)
    norm = float(torch.linalg.vector_norm(values))
    return {
        f"layers.{n}.q_proj": Spectrum(
            f"layers.{n}.q_proj", values, shape, rank, 2.0, norm, 1e-15, "ok", "factors", torch.float32
        )
        for n in range(2)
    }


FLAT_16 = [1.0] * 16
FIVE_OF_16 = [1.0] * 5 + [1e-3] * 11


# ------------------------------------------------------------------------- the second guide: its summary table's rows


@pytest.mark.parametrize(
    ("row", "given", "rank", "span"),
    [
        ("default", {"task": "medium", "model_size": 7, "data_size": 50_000}, 4, (4, 8)),
        ("as large as GPT-3", {"model_size": 175, "task": "medium", "data_size": 50_000}, 1, (1, 2)),
        ("simple classification", {"task": "binary-classification"}, 2, (2, 2)),
        ("generation", {"task": "summarization"}, 4, (4, 8)),
        ("generation", {"task": "translation"}, 8, (4, 8)),
        ("small data", {"data_size": 999}, 2, (1, 2)),
        ("few resources", {"scenario": "constrained"}, 1, (1, 1)),
        ("not sure", {}, 4, (4, 4)),
    ],
)
def test_rows_of_the_summary_table(row, given, rank, span):
    found = decide(**given)
    assert (found.rank, found.range) == (rank, span)
    assert row in found.sentence
    assert found.kind == ("measure" if row == "not sure" else "rank")
    assert found.confidence <= 0.3 and found.next.name == "search"


def test_it_says_when_it_does_not_know():
    found = decide()
    assert found.sentence.startswith("Not known yet.") and found.sure == "a guess"
    assert [i.name for i in found.indicators if i.sure] == ["rules of thumb"]
    assert all(i.verdict == "not known" and i.value == "–" for i in found.indicators if not i.sure)


def test_rows_that_meet_narrow_each_other_and_rows_that_do_not_are_printed():
    assert decide(task="simple", data_size=500).range == (2, 2)
    found = decide(task="summarization", model_size=175, data_size=50_000)
    assert found.range == (1, 2)
    assert any("4 to 8" in text for text in found.disagreements)


def test_scenarios():
    assert decide(scenario="prototype", task="medium").range == (4, 4)
    assert decide(scenario="continual").rank == 8
    assert decide(scenario="production", task="medium").kind == "measure"


# ---------------------------------------------------------------------------------- the first guide: four indicators


@pytest.mark.parametrize(
    ("rank", "verdict", "kind"),
    [(64, "LoRA", "rank"), (340, "LoRA", "measure"), (341, "evaluate", "measure"), (766, "full fine-tuning", "full")],
)
def test_share_of_trained_parameters(rank, verdict, kind):
    """10% asks for an evaluation, 20% decides where nothing is measured."""
    found = decide(rank=rank, model_size=TOTAL / 1e9, parameters_per_rank=PER_RANK)
    (share,) = [i for i in found.indicators if i.name == "trained share"]
    assert (share.verdict, found.kind) == (verdict, kind)
    assert float(share.value.rstrip("%")) == pytest.approx(100 * rank * PER_RANK / (TOTAL + rank * PER_RANK), abs=0.01)


def test_measured_cost_counts_for_more_than_the_share():
    found = decide(profile(CHEAP), rank=1024)
    assert found.kind == "measure"  # r ≥ 128: quality against full fine-tuning is still open
    assert any("stand-in" in text for text in found.disagreements)


def test_a_plateau_that_misses_the_target_means_full_fine_tuning():
    found = decide(search=search(PLATEAU), target=1.9)
    assert (found.kind, found.rank, found.range, found.target_reached) == ("full", None, None, False)
    assert "1.9 is missed" in found.sentence
    assert found.next.name == "full arm"
    assert decide(search=search({r: 2.0 for r in (1, 2, 4)}), target=1.9).kind == "full"
    assert decide(search=search(PLATEAU), target=2.05).kind == "rank"
    negative = search({rank: -loss for rank, loss in PLATEAU.items()}, direction="maximize")
    assert decide(search=negative, target=-1.9).kind == "full"
    assert decide(search=negative, target=-2.05).kind == "rank"


def test_the_smallest_rank_that_reaches_the_target():
    found = decide(search=search(PLATEAU), target=2.35)
    assert (found.kind, found.rank, found.target_reached) == ("rank", 4, True)
    assert found.range[0] == 4 and found.range[1] >= 8
    assert decide(search=search(RISING), target=2.35).rank == 16


def test_what_is_better_and_costs_no_more_is_taken_though_a_rank_reaches_the_target():
    losses = {16: 2.3, 64: 2.0, 128: 2.0, "full": 1.5}
    equal = from_times(losses, {16: 95, 64: 98, 128: 120, "full": 100})
    found = decide(search=equal, target=2.1)
    assert (found.kind, found.target_reached) == ("full", True) and "better still (1.5)" in found.sentence
    cheaper = from_times(losses, {16: 70, 64: 80, 128: 90, "full": 100})
    assert decide(search=cheaper, target=2.1).rank == 64


def test_a_target_within_the_noise_asks_for_seeds():
    found = decide(search=search(PLATEAU), target=1.995)
    assert (found.kind, found.next.name) == ("measure", "seeds")
    assert "it reaches: r=" in found.next.why and "it misses: full fine-tuning" in found.next.why


def test_a_curve_that_falls_or_rises_is_no_plateau():
    falls, rises = decide(search=search(FALLING), target=1.5), decide(search=search(RISING), target=1.5)
    assert (falls.kind, falls.next.name) == ("measure", "full arm")
    assert (rises.kind, rises.rank) == ("measure", 64)
    single = decide(search=search({8: 2.0}), target=1.5)
    assert (single.kind, single.next.name) == ("measure", "search")


def test_without_a_target_a_plateau_is_the_answer():
    found = decide(search=search(PLATEAU))
    assert (found.kind, found.rank, found.range[0]) == ("rank", 8, 8)
    assert found.confidence >= 0.75


def test_a_rising_curve_asks_for_larger_ranks_unless_they_cost_as_much_as_full():
    found = decide(search=search(RISING))
    assert (found.kind, found.rank, found.next.name) == ("measure", 64, "full arm")
    cheap = decide(profile(CHEAP), search(RISING))
    assert cheap.kind == "measure"
    slow = decide(profile(SLOW), search(RISING))
    assert slow.kind == "full" and "r=128 would be as slow as full fine-tuning" in slow.sentence


def test_full_fine_tuning_as_an_arm():
    better = decide(search=search({**PLATEAU, "full": 1.5}))
    assert better.kind == "full" and "1.5 against 2" in better.sentence
    assert better.confidence > decide(search=search(PLATEAU), target=1.9).confidence
    assert decide(search=search({**PLATEAU, "full": 2.0})).rank == 8
    worse = decide(search=search({**PLATEAU, "full": 2.4}))
    assert worse.rank == 8 and "full fine-tuning is worse" in worse.sentence
    reached = decide(search=search({**PLATEAU, "full": 1.5}), target=1.6)
    assert (reached.kind, reached.target_reached) == ("full", True)
    neither = decide(search=search({**PLATEAU, "full": 2.0}), target=1.6)
    assert (neither.kind, neither.rank, neither.target_reached) == ("rank", 8, False)
    assert "nothing that was tried reaches the target" in neither.sentence
    both = decide(search=search({**PLATEAU, "full": 1.5}), target=2.1)
    assert (both.kind, both.rank) == ("rank", 8) and "which the target does not ask for" in both.sentence


@pytest.mark.parametrize("task", ["code", "mathematics", "domain-knowledge", "complex"])
def test_demanding_tasks_leave_it_open(task):
    found = decide(task=task)
    assert found.kind == "measure" and "full" in found.next.command
    assert any("task and domain speaks for weighing full fine-tuning" in text for text in found.disagreements)


def test_domain_and_tasks_of_later_work():
    assert decide(task="medium", domain="near").kind == "rank"
    assert decide(task="medium", domain="far").kind == "measure"
    assert decide(task="continued-pretraining").kind == "full"
    assert decide(task="code").range == (64, 256)
    found = decide(task="reinforcement-learning", model_size=7, data_size=50_000)
    assert (found.kind, found.range) == ("rank", (1, 32))
    # Measured here, it counts for more than what was measured elsewhere.
    assert decide(search=search({**PLATEAU, "full": 2.0}), task="continued-pretraining").rank == 8


def test_a_rank_as_slow_as_full_fine_tuning_means_full():
    found = decide(profile(SLOW), rank=256)
    assert found.kind == "full" and "r=256 is as slow as full fine-tuning" in found.sentence
    assert decide(profile(CHEAP), rank=16).kind == "rank"
    assert decide(profile({64: 0.7, 256: 0.949}), rank=256).kind == "measure"
    assert decide(profile({64: 0.7, 256: 0.951}), rank=256).kind == "full"
    between = decide(profile({64: 0.7, 256: 1.0}), rank=160)  # 0.85, on a line in r
    (step,) = [i for i in between.indicators if i.name == "step time"]
    assert step.value == "0.85"
    assert [step.verdict, *(i.verdict for i in found.indicators if i.name == "step time")] == [
        "LoRA",
        "full fine-tuning",
    ]
    # At 625 and 1,000 tokens a second a million of them take 1,600 s and 1,000 s, at $0.001 a second.
    paid = decide(profile({256: 1.6}), rank=256, price_per_hour=3.6)
    assert any("$1.6 against $1 for 1,000,000 tokens" in i.says for i in paid.indicators)
    beyond = decide(profile({64: 0.7, 256: 1.0}), rank=512)
    assert beyond.kind == "full"


def test_times_that_are_noise_do_not_decide():
    found = decide(profile(SLOW, noisy=True), rank=256)
    assert found.kind == "measure"
    (step,) = [i for i in found.indicators if i.name == "step time"]
    assert (step.verdict, step.sure) == ("not known", 0)


def test_flops_stand_in_for_time_and_are_less_sure():
    timed, counted = (decide(profile(SLOW, estimated=e), rank=256) for e in (False, True))
    assert (timed.kind, counted.kind) == ("full", "full")
    assert counted.confidence < timed.confidence


def test_a_projected_time_stands_between_the_two():
    """FLOPs say that r=256 is cheaper, the projection that it is slower; a measured time is asked before both."""
    estimated = profile(CHEAP, estimated=True)
    for arm in estimated.lora:
        arm.projected_ratio = SLOW.get(arm.rank, 1.0)
    found = decide(estimated, rank=256)
    (step,) = [i for i in found.indicators if i.name == "step time"]
    assert step.value == f"{SLOW[256]:.2f} (projected)" and "by the GPU's peak rates one at r=256 takes" in step.says
    assert found.kind == decide(profile(SLOW, estimated=True), rank=256).kind == "full"
    assert decide(profile(CHEAP, estimated=True), rank=256).kind != "full"
    timed = profile(CHEAP)
    for arm in timed.lora:
        arm.projected_ratio = 1.5
    (step,) = [i for i in decide(timed, rank=256).indicators if i.name == "step time"]
    assert step.value.startswith(f"{CHEAP[256]:.2f} [")


def from_times(losses, seconds):
    """A search as it is written, with these seconds for whole trainings."""
    found = search(losses).to_dict()
    for trial in found["trials"]:
        trial["seconds"] = seconds[trial["rank"]]
    return found


def test_total_training_time_counts_for_more_than_a_step():
    losses = {16: 2.3, 64: 2.0, 128: 2.0, "full": 2.0}
    slow = from_times(losses, {16: 90, 64: 120, 128: 150, "full": 100})
    found = decide(profile(CHEAP), slow)
    assert found.kind == "full" and "faster (training time of r=64: 1.20 [1.20, 1.20] of it)" in found.sentence
    assert any("a whole training 1.20 [1.20, 1.20]; that is what is paid" in text for text in found.disagreements)
    fast = from_times(losses, {16: 70, 64: 80, 128: 85, "full": 100})
    assert decide(profile(SLOW), fast).rank == 64
    assert decide(profile(SLOW), fast, price_per_hour=3.6).rank == 64
    (total,) = [i for i in decide(search=fast, price_per_hour=3.6).indicators if i.name == "training time"]
    assert "$0.08 against $0.1" in total.says


def test_training_times_that_differ_too_much_between_seeds_do_not_decide():
    found = from_times({16: 2.3, 64: 2.0, 128: 2.0, "full": 2.0}, {16: 90, 64: 120, 128: 150, "full": 100})
    for trial in found["trials"]:
        trial["seconds"] *= 1.5 if trial["seed"] else 0.5
    assert decide(profile(CHEAP), found).rank == 64  # 120 against 100 on average, 0.4 to 3.6 of single ones
    (total,) = [i for i in decide(search=found).indicators if i.name == "training time"]
    assert total.verdict == "not known" and total.value == "1.20 [0.40, 3.60]"


def test_memory_decides_between_equals_in_quality_and_time():
    equal = from_times({16: 2.3, 64: 2.0, 128: 2.0, "full": 2.0}, {16: 98, 64: 99, 128: 100, "full": 100})
    assert decide(profile(CHEAP, memory=0.7), equal).rank == 64
    assert decide(profile(CHEAP, memory=1.3), equal).kind == "full"


def test_from_128_on_full_fine_tuning_is_weighed():
    losses = {16: 2.6, 64: 2.3, 128: 2.0, 256: 2.0}
    found = decide(search=search(losses))
    assert (found.kind, found.rank) == ("measure", 128)
    assert "from r=128 on" in found.sentence
    below = decide(search=search({16: 2.6, 64: 2.0, 128: 2.0}))
    assert (below.kind, below.rank) == ("rank", 64)
    # The evaluation: cost is known and speaks for LoRA, quality has its plateau, the task asks for nothing else.
    assert decide(profile(CHEAP), search(losses)).kind == "rank"
    assert decide(profile(CHEAP), search(losses), task="code").kind == "measure"
    assert decide(profile(SLOW), search(losses)).kind == "full"
    assert decide(rank=128).kind == "measure" and decide(rank=127, task="medium").kind == "rank"


# --------------------------------------------------------------------------------------- spectra, budget, constraints


def test_spectra():
    found = decide(spectra=spectra(FIVE_OF_16, 16))
    assert (found.kind, found.rank) == ("rank", 5)
    assert decide(spectra=spectra(FLAT_16, 16)).rank == 16
    assert any("rules on the spectra disagree" in text for text in decide(spectra=spectra(FLAT_16, 16)).disagreements)
    considered = decide(spectra=spectra(FIVE_OF_16, 16), rank=64)
    assert considered.rank == 5 and any("you consider r=64" in text for text in considered.disagreements)
    dense = decide(spectra=spectra([1.0] * 10 + [0.0] * 110, None))
    assert dense.rank == 9  # 90% of ten equal ones
    nothing = decide(spectra=spectra([0.0] * 16, 16), task="medium")
    assert nothing.rank == 4
    assert decide(search=search(PLATEAU), spectra=spectra(FLAT_16, 16)).rank == 8
    agrees = decide(search=search(PLATEAU), spectra=spectra([1.0] * 6 + [1e-3] * 10, 16))
    assert agrees.confidence > decide(search=search(PLATEAU)).confidence


def test_spectra_of_real_factors():
    generator = torch.Generator().manual_seed(3)
    lora_A, lora_B = (torch.randn(*shape, generator=generator) for shape in ((7, 90), (70, 7)))
    lora_A[3:] *= 1e-4
    values = lora_svdvals(lora_A, lora_B, 2.0)
    norm = float(torch.linalg.vector_norm(2.0 * lora_B.double() @ lora_A.double()))
    one = Spectrum("q_proj", values, (70, 90), 7, 2.0, norm, 1e-15, "ok", "factors", torch.float32)
    assert decide(spectra=[one]).rank == 3


def test_budget():
    found = decide(profile(CHEAP), rank=64, budget=20 * PER_RANK + 5)
    assert (found.kind, found.rank, found.range[1]) == ("rank", 20, 20)
    (budget,) = [i for i in found.indicators if i.name == "budget"]
    assert "allows up to r=20" in budget.says
    # Full fine-tuning is beyond it, though it is better: the best rank that is left, and why.
    full = decide(profile(CHEAP), search({**PLATEAU, "full": 1.5}), budget=4 * PER_RANK)
    assert (full.kind, full.rank) == ("rank", 4) and "full fine-tuning would be the answer, but" in full.sentence
    assert decide(budget=5).indicators[-2].verdict == "not known"
    with pytest.raises(LoraFastError, match="is less than r=1 trains"):
        decide(profile(CHEAP), budget=PER_RANK - 1)


def test_a_rank_that_a_budget_forbids_is_told_where_it_is_better():
    capped = decide(profile(CHEAP), search(PLATEAU), budget=2 * PER_RANK)
    assert (capped.kind, capped.rank) == ("rank", 2)
    assert "the best of those that budget and memory allow (up to 2)" in capped.sentence
    assert "r=8 is better (2 against 2.6), and beyond them" in capped.sentence
    equal = decide(profile(CHEAP), search({1: 3.0, 2: 2.0, 4: 2.0}), budget=2 * PER_RANK)
    assert "allow (up to 2)" in equal.sentence and "and beyond them" not in equal.sentence
    single = decide(profile(CHEAP), search({2: 2.6, 8: 2.0}), budget=2 * PER_RANK)
    assert "r=2 is the only rank tried that budget and memory allow; r=8 is better" in single.sentence


def document_of(losses):
    """The content of a search.json, with the model's size and what each rank trains."""
    rows = [{"rank": r, "trained": TOTAL if r == "full" else r * PER_RANK, "reading": None} for r in losses]
    return {"search": search(losses).to_dict(), "model": {"parameters": TOTAL}, "ranks": rows}


def test_a_search_says_the_models_size_by_itself():
    found = decide(search=document_of({**PLATEAU, "full": 1.5}), budget=4 * PER_RANK)
    assert (found.kind, found.rank) == ("rank", 4) and "below the model's 8,030,261,248" in found.sentence
    (share,) = [i for i in found.indicators if i.name == "trained share"]
    assert share.value == f"{4 * PER_RANK / (TOTAL + 4 * PER_RANK):.2%}"
    with pytest.raises(LoraFastError, match="is less than r=1 trains"):
        decide(search=document_of(PLATEAU), budget=PER_RANK - 1)


def test_a_search_on_random_weights_is_less_sure():
    document = document_of({**PLATEAU, "full": 2.0})
    sure = decide(search=document)
    document["model"]["weights"] = "random"
    found = decide(search=document)
    assert (found.rank, sure.rank) == (8, 8) and found.sure == "low" and sure.sure == "high"


def test_a_budget_that_cannot_be_held_against_the_answer_is_told():
    full, rank = decide(search=search({**PLATEAU, "full": 1.5}), budget=1000), decide(rank=8, task="medium", budget=9)
    assert full.kind == "full" and "whether the budget of 1,000 parameters allows it is not known" in full.sentence
    assert rank.kind == "rank" and "whether the budget of 9 parameters allows it is not known" in rank.sentence
    assert "is not known" not in decide(profile(CHEAP), search(PLATEAU), budget=10**10).sentence


def test_what_the_curve_says_of_the_rank_that_is_considered():
    said = {
        rank: [t for t in decide(search=search(PLATEAU), rank=rank).disagreements if t.startswith("you consider")]
        for rank in (2, 8, 32, 64)
    }
    assert said[8] == [] and said[64] == ["you consider r=64, which the search did not try"]
    assert said[2] == ["you consider r=2: 2.6, worse than r=8 (2)"]
    assert said[32] == ["you consider r=32: 2, as good as r=8 (2)"]


def test_where_nothing_reaches_the_target_longer_training_is_what_may():
    for losses, rank in (({**PLATEAU, "full": 1.9}, 8), ({**FALLING, "full": 2.5}, 4)):
        found = decide(search=search(losses), target=0.1)
        assert found.target_reached is False and found.next.name == "longer training"
        assert found.next.command.endswith(f"--ranks {rank},full --steps N")
        assert f"r={rank} reaches it: r={rank};" in found.next.why
        assert "only full fine-tuning does: full fine-tuning" in found.next.why
    assert decide(search=search({**PLATEAU, "full": 1.9}), target=1.95).next is None


def test_without_noise_no_rank_is_within_it():
    sentence = decide(search=search(PLATEAU).to_dict() | {"noise": None}).sentence
    assert "noise is not known" in sentence and "within the noise" not in sentence


def test_no_search_is_asked_for_where_the_share_is_that_of_full_fine_tuning():
    found = decide(profile(CHEAP), tokens=1e13)  # a capacity of r=1,907,349; r=766 trains 20%
    assert found.kind == "full" and found.next.command.endswith("--ranks 128,512,full")


def test_what_does_not_fit_is_no_answer():
    found = decide(profile(SLOW, full="oom"), rank=256)
    assert found.kind != "full" and found.next.command.count("full") == 0
    capped = decide(profile({8: 0.7, 16: 0.7}, oom=[64], full="oom"), search=search(RISING), target=2.2)
    assert capped.rank == 16
    assert decide(profile({8: 0.7}, oom=[16]), search=search({16: 2.0, 32: 2.0})).rank <= 8


def test_capacity():
    found = decide(task="medium", tokens=73e6, parameters_per_rank=2_500_000)
    assert found.rank == 15  # 73M bits / (2 · 2.5M), as published, with the figure that shows it is a lower bound
    assert any("256 was needed" in i.says for i in found.indicators)
    both = decide(task="code", tokens=5e8, parameters_per_rank=2_500_000)
    assert (both.rank, both.range) == (100, (100, 256))
    assert decide(task="code", tokens=73e6, parameters_per_rank=2_500_000).rank == 64


# ------------------------------------------------------------------------------------------- what is measured next


def test_what_is_measured_next_is_what_would_change_the_answer_most():
    complete = decide(profile(CHEAP), search({**PLATEAU, "full": 2.0}), spectra(FLAT_16, 16))
    assert complete.next is None
    assert decide(profile(CHEAP), task="medium").next.name == "search"
    single = decide(profile(CHEAP), search({1: 3.0, 4: 2.0, 16: 2.0, "full": 2.0}, seeds=[0]))
    assert single.next is None  # the search itself repeated two ranks, so that noise is known
    without_noise = search({1: 3.0, 4: 2.0, 16: 2.0, "full": 2.0}).to_dict() | {"noise": None}
    assert decide(profile(CHEAP), without_noise).next.name == "seeds"
    costly = decide(search=search({**PLATEAU, "full": 2.0}), model_size=0.001, parameters_per_rank=50_000)
    assert costly.next.name == "profile" and "slower than full: full fine-tuning" in costly.next.why


def test_a_search_in_which_no_rank_gave_a_value():
    assert decide(search=search_rank(lambda rank: math.nan, [1, 2])).kind == "measure"
    only_full = decide(search=search_rank({"full": 1.5}.__getitem__, [1, 2, "full"]))
    assert only_full.kind == "measure" and "only full fine-tuning gave a value" in only_full.sentence


def test_documents_are_taken_as_objects_are():
    run, found = profile(CHEAP), search({**PLATEAU, "full": 2.0})
    written = json.loads(json.dumps([run.to_dict(), {"schema_version": 1, "search": found.to_dict()}]))
    one, other = decide(run, found), decide(*written)
    assert one == other
    assert json.loads(json.dumps(one.to_dict(), allow_nan=False))["rank"] == 8


def test_section_of_a_report():
    found = section(decide(search=search({**PLATEAU, "full": 2.0}), target=2.1))
    assert [point["rank"] for point in found["curve"]["points"]] == list(PLATEAU)
    assert found["curve"]["points"][3]["mean"] == pytest.approx(2.0)
    assert found["curve"]["full"]["mean"] == pytest.approx(2.0)
    # Two seeds 0.02 apart: σ = 0.01 √2, and 2.5 standard errors of a mean of two are 2.5 σ / √2.
    assert found["curve"]["points"][0]["half_width"] == pytest.approx(0.025)
    assert (found["curve"]["recommended"], found["curve"]["target"]) == (8, 2.1)
    assert len(found["indicators"]) == 11 and all(row["source"] for row in found["indicators"])
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "poetry"}, "task='poetry'; known are simple, medium, complex, binary-classification"),
        ({"domain": "middle"}, "domain='middle'; expected near or far"),
        ({"scenario": "rich"}, "scenario='rich'; known are prototype"),
        ({"target": math.nan}, "target=nan"),
        ({"target": "low"}, "target='low'"),
        ({"rank": 0}, "rank=0"),
        ({"budget": -1}, "budget=-1"),
        ({"data_size": -1}, "data_size=-1"),
        ({"model_size": 0}, "model_size=0"),
        ({"price_per_hour": -1.0}, "price_per_hour=-1.0"),
        ({"profile": 3}, "profile is a int"),
        ({"profile": {"arms": []}}, "profile is not the content of a run.json"),
        ({"search": {"points": []}}, "search is not what a rank search writes"),
        ({"spectra": {"layers": [{}]}}, "spectra is not the content of a spectra.json"),
        ({"spectra": 7}, "spectra is a int"),
    ],
)
def test_wrong_input_is_refused_in_one_line(arguments, message):
    with pytest.raises(LoraFastError, match=message) as caught:
        decide(**arguments)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------- any evidence, and none at all

RANKS = st.sampled_from([1, 2, 8, 16, 64, 128, 256, 1024])


@st.composite
def searches(draw):
    ranks = sorted(draw(st.sets(RANKS, min_size=1, max_size=5)))
    points = [{"rank": r, "mean": draw(st.floats(0.5, 3)), "count": draw(st.integers(1, 3))} for r in ranks]
    if draw(st.booleans()):
        points.append({"rank": "full", "mean": draw(st.floats(0.5, 3)), "count": draw(st.integers(1, 3))})
    trials = [
        {"rank": p["rank"], "seed": 0, "value": p["mean"], "status": "ok", "seconds": draw(st.none() | st.floats(1, 9))}
        for p in points
    ]
    if draw(st.integers(0, 9)) == 0:
        points = []
    return {
        "points": points,
        "trials": trials,
        "noise": draw(st.none() | st.floats(0, 0.5)),
        "direction": draw(st.sampled_from(["minimize", "maximize"])),
        "verdict": draw(st.sampled_from(["plateau", "rises then falls", "still rising", "flat", "full fine-tuning"])),
        "sentence": "a sentence",
    }


@st.composite
def profiles(draw):
    ratios = draw(st.dictionaries(RANKS, st.floats(0.4, 2), max_size=4))
    return profile(
        dict(sorted(ratios.items())),
        draw(st.floats(0.3, 1.5)),
        total=draw(st.sampled_from([5_000_000, TOTAL])),
        per_rank=draw(st.sampled_from([18_500, PER_RANK])),
        estimated=draw(st.booleans()),
        noisy=draw(st.booleans()),
        full=draw(st.sampled_from(["ok", "ok", "oom", "failed"])),
        oom=draw(st.sampled_from([(), (), (2048,), (4,)])),
    )


EVIDENCE = st.fixed_dictionaries(
    {},
    optional={
        "profile": profiles(),
        "search": searches(),
        "spectra": st.sampled_from([spectra(FLAT_16, 16), spectra(FIVE_OF_16, 16), spectra([0.0] * 4, 4)]),
        "task": st.sampled_from(["simple", "medium", "complex", *TASKS]),
        "target": st.floats(0.4, 3.2),
        "rank": RANKS,
        "domain": st.sampled_from(["near", "far"]),
        "budget": st.integers(6_000_000, 10**10),
        "model_size": st.sampled_from([0.1, 7, 30, 175]),
        "data_size": st.sampled_from([0, 500, 50_000, 10**6]),
        "tokens": st.floats(1, 1e12),
        "scenario": st.sampled_from(["prototype", "production", "constrained", "multi-task", "continual"]),
        "parameters_per_rank": st.sampled_from([18_500, PER_RANK]),
        "price_per_hour": st.floats(0.1, 50),
    },
)


@settings(max_examples=400)
@given(EVIDENCE)
def test_any_evidence_gives_an_answer(evidence):
    found = decide(**evidence)
    assert isinstance(found, Decision)
    assert 0 < found.confidence < 1
    assert found.kind in ("rank", "full", "measure")
    if found.kind == "full":
        assert found.rank is None and found.range is None
    else:
        assert 1 <= found.range[0] <= found.rank <= found.range[1]
    assert found.kind != "measure" or found.next is not None
    assert len({i.name for i in found.indicators}) == len(found.indicators) == 11
    assert all(i.source and i.threshold and 0 <= i.sure <= 1 for i in found.indicators)
    json.dumps(found.to_dict(), allow_nan=False)


@settings(max_examples=400)
@given(EVIDENCE, st.data())
def test_more_evidence_never_lowers_the_confidence_in_the_same_answer(evidence, data):
    kept = data.draw(st.sets(st.sampled_from(sorted(evidence)))) if evidence else set()
    less, more = decide(**{name: evidence[name] for name in kept}), decide(**evidence)
    if (less.kind, less.rank) == (more.kind, more.rank):
        assert more.confidence >= less.confidence - 1e-12


def read(verdicts):
    """The content of a search.json whose trainings were read so, by rank."""
    ranks = [
        {"rank": rank, "reading": verdict and {"verdict": verdict, "sentence": f"it {verdict}"}}
        for rank, verdict in verdicts.items()
    ]
    return {"search": search(PLATEAU).to_dict(), "ranks": ranks}


@pytest.mark.parametrize(
    ("verdicts", "value", "speaks"),
    [
        ({8: "fits", 32: "too large", "full": "too large"}, "fits, at r=8", "LoRA"),
        ({8: "too large", 32: "too large"}, "too large, at r=8", "LoRA"),
        ({8: "too small", 32: "fits"}, "too small, at r=8", "LoRA"),
        ({1: "too small", 4: "too small"}, "too small, at r=4", "evaluate"),
        ({8: "can't tell"}, "–", "not known"),
        ({8: None}, "–", "not known"),
        ({}, "–", "not known"),
    ],
)
def test_training_curves_are_an_indicator(verdicts, value, speaks):
    found = decide(search=read(verdicts))
    (indicator,) = [i for i in found.indicators if i.name == "training curves"]
    assert found.rank == 8 and (indicator.value, indicator.verdict) == (value, speaks)
    assert (indicator.sure > 0) == (value != "–") and "signal 1" in indicator.source
    against = [text for text in found.disagreements if text.startswith("signal 1 reads")]
    assert bool(against) == (verdicts.get(8) in ("too large", "too small"))
    # It changes neither the answer nor how sure it is: what was measured at several ranks says more.
    plain = decide(search=search(PLATEAU))
    assert (found.rank, found.range, found.confidence) == (plain.rank, plain.range, plain.confidence)


def trained(losses, start, shape=(0.7, 0.95, 0.99, 1.0), train=None, reading="too large", **options):
    """The content of a search.json whose held-out losses went from start to these means by these shares of the fall."""
    found = search(losses, **options).to_dict()
    rows = []
    for point in found["points"]:
        fall = start - point["mean"]
        evaluation = [[0, start], *([10 * n, start - share * fall] for n, share in enumerate(shape, 1))]
        steps = train or [[s, start - fall * (1 - math.exp(-s / 5))] for s in range(1, 41)]
        said = {"verdict": reading, "sentence": "the training loss rose again: unstable"}
        rows.append({"rank": point["rank"], "train": steps, "evaluation": evaluation, "reading": said})
    return {"search": found, "ranks": rows}


ALIKE = {1: 5.58, 4: 5.579, "full": 5.581}


def test_trainings_that_learned_nothing_are_no_evidence_for_a_rank():
    """Held-out losses of ln 256 and a little more, before and after: the smallest rank is as good, and says nothing."""
    found = decide(search=trained(ALIKE, 5.613))
    assert found.kind == "measure" and found.rank == decide().rank and found.target_reached is None
    assert found.confidence == decide().confidence and found.sure == "a guess"
    assert "hardly anything was learned: the held-out loss went from 5.613 to 5.579 at best (r=4)" in found.sentence
    assert "of less than 1%; train longer, or with another learning rate, first" in found.sentence
    assert found.next.name == "another training" and found.next.worth > 0
    assert found.next.what.startswith("train longer, or with another learning rate, at r=1, 4, full")
    assert found.next.command.endswith("--ranks 1,4,full --steps N --learning-rate RATE")
    by_name = {indicator.name: indicator for indicator in found.indicators}
    assert by_name["loss against rank"].sure == by_name["training curves"].sure == 0
    assert "too large" not in json.dumps(found.to_dict()) and "unstable" not in json.dumps(found.to_dict())
    everything = {"task": "code", "spectra": spectra(FLAT_16, 16), "profile": profile(CHEAP)}
    found = decide(search=trained(ALIKE, 5.613), **everything)
    assert (found.kind, found.rank, found.sure) == ("measure", 16, "low")


def test_a_target_that_was_met_without_learning_is_told():
    met, missed = (decide(search=trained(ALIKE, 5.613), target=target) for target in (5.6, 5.0))
    assert (met.kind, met.target_reached) == ("measure", True) and "5.6 is reached with so little" in met.sentence
    assert (missed.kind, missed.target_reached) == ("measure", False) and "so little" not in missed.sentence


@pytest.mark.parametrize(
    ("start", "best", "kind"),
    [
        (5.0, 5.0 * (1 - 0.011), "rank"),
        (5.0, 5.0 * (1 - 0.009), "measure"),
        # Between two seeds 0.02: a mean of two is known to ± 2.5 · 0.02 / √2 / √2 = 0.025.
        (0.5, 0.47, "rank"),
        (0.5, 0.48, "measure"),
    ],
)
def test_how_far_losses_must_fall_to_say_anything(start, best, kind):
    found = decide(search=trained({1: best, 4: best}, start))
    assert found.kind == kind
    assert ("hardly anything was learned" in found.sentence) == (kind == "measure")
    assert ("within the noise between seeds" in found.sentence) == (best == 0.48)


def test_a_training_that_had_not_settled_lowers_the_confidence():
    sure = decide(search=trained(PLATEAU, 4.0))
    plain = decide(search=search(PLATEAU))
    assert (sure.rank, sure.confidence) == (plain.rank, plain.confidence) and "still fell" not in sure.sentence
    falling = decide(search=trained(PLATEAU, 4.0, shape=(0.3, 0.6, 0.8, 1.0)))
    assert (falling.kind, falling.rank) == (sure.kind, sure.rank) == ("rank", 8)
    assert falling.confidence == pytest.approx(sure.confidence - 0.25) and sure.sure == "high" != falling.sure
    assert "the held-out loss of the best, r=8, still fell at the end, by 0.4" in falling.sentence
    jumps = [[s, 3.0 if s <= 20 else 3.9] for s in range(1, 41)]
    unstable = decide(search=trained(PLATEAU, 4.0, train=jumps))
    assert (
        unstable.confidence == falling.confidence and "the training of the best, r=8, was unstable" in unstable.sentence
    )
    # Where nothing else is left to measure, that is what to do next.
    last = decide(search=trained({1: 2.0, 4: 2.0, "full": 2.0}, 4.0, shape=(0.3, 0.6, 0.8, 1.0)), rank=1)
    assert last.next.name == "another training" and "still fell at the end" in last.next.what
    assert "full" in last.next.command and "--steps N" in last.next.command


def test_full_fine_tuning_that_was_not_tried_is_less_sure_where_the_ranks_had_not_settled():
    options = {"shape": (0.3, 0.6, 0.8, 1.0)}
    rough, smooth = (decide(search=trained(PLATEAU, 4.0, **more), target=1.9) for more in (options, {}))
    assert rough.kind == smooth.kind == "full"
    assert rough.confidence == pytest.approx(smooth.confidence - 0.25)


def test_a_score_has_no_losses_by_step_to_be_judged():
    scores = {rank: -loss for rank, loss in PLATEAU.items()}
    found = decide(search=trained(scores, -2.001, direction="maximize"))
    assert found.kind == "rank" and found.confidence == decide(search=search(PLATEAU)).confidence


def test_a_rank_above_the_smallest_side_of_a_layer_is_told():
    wide = {64: 3.0, 128: 2.6, 256: 2.0}  # of layers (200, 120)
    alone, both = decide(search=search(wide)), decide(search=search(wide), spectra=spectra(FLAT_16, 16))
    told = [text for text in both.disagreements if "above min(N, K) = 120" in text]
    assert both.rank == alone.rank == 256 and len(told) == 1
    assert not any("min(N, K)" in text for text in alone.disagreements)
    small = decide(search=search(PLATEAU), spectra=spectra(FLAT_16, 16))
    assert not any("min(N, K)" in text for text in small.disagreements)
    measured = profile(CHEAP)
    measured.workload["smallest_side"] = 100
    assert any("min(N, K) = 100" in text for text in decide(measured, search(wide)).disagreements)
