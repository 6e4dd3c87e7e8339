"""Why LoRA is slow or large here: what is said of committed results and of estimates, and what is not."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lora_fast.profiler import advice, estimate_memory
from lora_fast.profiler.advice import advise
from lora_fast.profiler.profile import Arm, Profile

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "cpu" / "profile.json"
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 6000,
}
MiB = 2**20
pytestmark = pytest.mark.filterwarnings("ignore::lora_fast.LoraFastWarning")


@pytest.fixture
def estimate(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    base = {"batch_size": 2, "seq_len": 64, "device": "cpu", "dtype": "fp32"}

    def of(ranks="4,16", **changes):
        return estimate_memory(str(path), ranks, **{**base, **changes})

    return of


@pytest.fixture
def measured() -> Profile:
    return Profile.from_dict(json.loads(RESULTS.read_text()))


def numbers(text: str) -> list[float]:
    return [float(value.replace(",", "")) for value in re.findall(r"\d[\d,]*\.?\d*", text)]


def test_the_committed_run_is_explained_from_its_own_numbers(measured):
    text = advice.optimizer_share(measured)
    full, arm = measured.full, measured.lora[3]
    assert arm.rank == 64 and text in advise(measured)
    spread = (arm.forward_ms + arm.backward_ms) / (full.forward_ms + full.backward_ms)
    assert f"from {arm.ratio_to_full:.2f} towards {spread:.2f} of full's time" in text
    assert f"({full.optimizer_ms / full.step_ms:.0%}) at 1,024 tokens" in text

    text = advice.activations(measured)
    small = measured.lora[0]
    assert f"({small.by_category['activations'] / small.peak_MiB:.0%})" in text and "2016" in text
    assert f"up to {small.forward_ms:.3g} ms on {small.step_ms:.3g}." in text
    # fp32 base, no foreach, no dropout, every layer adapted, a CPU: none of these can be the reason.
    for silent in ("few_tokens", "fp32_adapters", "recomputation", "foreach", "dropout_masks", "few_targets", "peft"):
        assert getattr(advice, silent)(measured) is None, silent


def test_steps_far_slower_than_their_flops_are_told(measured):
    slow = next(arm for arm in measured.lora if arm.ratio_ci[0] > advice.SLOWER * arm.flops_ratio)
    text = advice.slower_than_counted(measured)
    assert f"{slow.name} takes {slow.ratio_to_full:.2f} of full's time with {slow.flops_ratio:.2f} of its FLOPs" in text
    assert f"{slow.ratio_to_full / slow.flops_ratio:.2f} times as long" in text and "28 adapted layers" in text
    for arm in measured.lora:
        arm.flops_ratio = arm.ratio_ci[0]
    assert advice.slower_than_counted(measured) is None
    for arm in measured.lora:
        arm.flops_ratio = None
    assert advice.slower_than_counted(measured) is None  # of a run without FLOPs nothing is claimed


def test_without_an_optimizer_that_weighs_the_batch_is_not_blamed(measured):
    measured.full.optimizer_ms = 0.04 * measured.full.step_ms
    assert advice.optimizer_share(measured) is None
    assert advice.few_tokens(measured) is None
    measured.workload |= {"device": "cuda", "dtype": "bf16", "batch_size": 1, "seq_len": 100}
    assert "100 tokens a pass give 100 FLOPs per byte" in advice.few_tokens(measured)
    measured.workload |= {"seq_len": 156}
    assert advice.few_tokens(measured) is None


def test_fp32_adapters_cost_what_bf16_ones_save(estimate):
    wide, narrow = (estimate("64", dtype="bf16", adapter_dtype=dtype) for dtype in ("fp32", "bf16"))
    text = advice.fp32_adapters(wide)
    states = ("adapters", "gradients", "optimizer")
    held = sum(wide.lora[0].by_category[name] for name in states)
    assert numbers(text)[2] == pytest.approx(held, abs=0.06) and "--adapter-dtype bf16 halves" in text
    assert sum(narrow.lora[0].by_category[name] for name in states) == pytest.approx(held / 2, rel=0.01)
    assert advice.fp32_adapters(narrow) is advice.fp32_adapters(estimate("64")) is None


def test_checkpointing_is_named_where_it_is_missing_and_where_it_costs(estimate):
    without, with_it = estimate(), estimate(gradient_checkpointing=True)
    text = advice.activations(without)
    assert text and advice.recomputation(without) is None
    arm = without.lora[0]
    assert f"up to {arm.forward_flops / (arm.forward_flops + arm.backward_flops):.0%} more FLOPs" in text
    assert advice.activations(with_it) is None
    # A lower bound of what is said to be an upper one: the layers run twice, the head once.
    extra = with_it.lora[0].backward_flops - arm.backward_flops
    share = numbers(advice.recomputation(with_it))[0] / 100
    whole = with_it.lora[0].forward_flops + with_it.lora[0].backward_flops
    assert 0.2 * share < extra / whole <= share + 0.005
    assert with_it.lora[0].peak_MiB < arm.peak_MiB


def test_temporaries_of_foreach_are_what_goes_without_it(estimate):
    # Few tokens, so that the optimizer's step is the peak.
    with_it, without = (estimate(seq_len=8, foreach=foreach) for foreach in (True, False))
    assert with_it.full.peak_phase == "optimizer"
    text = advice.foreach(with_it)
    (held, peak) = numbers(text)[:2]
    assert (held, peak) == pytest.approx((with_it.full.by_category["temporaries"], with_it.full.peak_MiB), abs=0.06)
    assert without.full.phase_peaks_MiB["optimizer"] == pytest.approx(peak - held, rel=0.2)
    assert "memory's crossover" in text and advice.foreach(without) is None


def test_logits_are_found_in_the_temporaries(estimate):
    found = estimate()
    text = advice.logits(found)
    assert "128 tokens × 6,000 words" in text and f"is {4 * 128 * 6000 / MiB:.1f} MiB" in text
    more = estimate(batch_size=4)
    copies = int(re.search(r"are (\d+) of them", text)[1])
    # Twice the tokens: twice the copies' bytes, and the temporaries grow by just that.
    grown = more.lora[0].by_category["temporaries"] - found.lora[0].by_category["temporaries"]
    assert grown == pytest.approx(copies * 4 * 128 * 6000 / MiB, rel=0.1)
    assert advice.logits(replace(found, workload=found.workload | {"vocab_size": 10**6})) is None
    assert advice.logits(replace(found, workload=found.workload | {"vocab_size": None})) is None


def test_dropout_costs_a_bit_per_element(estimate):
    """Against the same step without dropout, in which nothing else differs."""
    plain, dropped = estimate("4"), estimate("4", lora_dropout=0.1)
    more = dropped.lora[0].by_category["activations"] - plain.lora[0].by_category["activations"]
    text = advice.dropout_masks(replace(dropped, workload=dropped.workload | {"lora_dropout": 0.1}))
    mask = 128 * dropped.workload["adapted"]["in_features"] / 8 / MiB
    assert more == pytest.approx(mask, rel=0.05)
    assert (text is None) == (mask < 0.01 * dropped.lora[0].peak_MiB)
    long = estimate("4", lora_dropout=0.1, seq_len=1024)
    assert advice.dropout_masks(long) is None  # below a hundredth of this peak
    long.lora[0].peak_MiB = 320 * mask
    assert f"35 layers draw and keep a mask each, {16 * mask:.1f} MiB in bits, 5% of" in advice.dropout_masks(long)
    assert advice.dropout_masks(plain) is None


def test_few_targets_are_named_where_more_cost_little(estimate):
    some, all_of_them = estimate("1,2", target_modules="q_proj,v_proj"), estimate("1,2")
    text = advice.few_targets(some)
    assert "10 of 36 linear layers" in text and "section 4" in text
    # What is said to be the frozen model's share is what is left as the rank goes to 0.
    base = 2 * some.lora[0].flops_ratio - some.lora[1].flops_ratio
    assert f"the rest, {base:.2f} of full's" in text
    assert advice.few_targets(all_of_them) is None
    assert advice.few_targets(estimate("256,512", target_modules="q_proj,v_proj")) is None


def test_peft_arms_are_compared_at_their_rank(estimate):
    found = estimate("4,16", dtype="bf16")
    assert advice.peft(found) is None
    four, sixteen = found.lora
    four.step_ms, sixteen.step_ms = 10.0, 12.0
    other = replace(four, kind="peft", step_ms=15.0, peak_MiB=four.peak_MiB + 30)
    other.by_category = four.by_category | {"activations": four.by_category["activations"] + 29}
    found.arms[1:1] = [other, Arm("peft", 99, 1, 0.1, step_ms=1.0, peak_MiB=1.0)]
    text = advice.peft(found)
    assert "1.50 (r4) times ours" in text and "30 MiB (r4) above ours" in text and "r99" not in text
    assert "At r4 29 MiB are activations: its fp32 adapters keep an fp32 copy" in text
    assert "fp32 copy" not in advice.peft(replace(found, workload=found.workload | {"adapter_dtype": "bf16"}))
    other.peak_MiB, other.step_ms = four.peak_MiB - 30, None
    four.projected_ratio, other.projected_ratio = 0.5, 0.7
    text = advice.peft(found)
    assert "its steps take, projected, 1.40 (r4) times ours" in text and "30 MiB (r4) below ours" in text


def test_a_profile_without_numbers_gets_no_advice():
    arms = [Arm("lora", 4, 10, 0.1, status="oom"), Arm("full", None, 100, 1.0, status="oom")]
    work = {"dtype": "bf16", "batch_size": 1, "seq_len": 8, "target_modules": ["q"], "device": "cpu", "foreach": True}
    work["optimizer"] = "AdamW"
    assert advise(Profile({}, work | {"adapter_dtype": "fp32", "lora_dropout": 0.1}, arms, None, {})) == []
