"""The time pass: what each arm computes, the order of the rounds, arms that fail, and ratios on a constructed clock."""

import json
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lora_fast import lora_parameters
from lora_fast.profiler import models, profile_ranks, timing
from lora_fast.profiler.crossover import crossovers
from lora_fast.profiler.models import ModelSource
from lora_fast.profiler.profile import Arm
from lora_fast.profiler.rounds import MAX_WARM_UP, MIN_WARM_UP
from lora_fast.profiler.time_pass import Rules, add_times, groups_of, time_groups
from lora_fast.profiler.timing import SERIES, time_arms
from lora_fast.profiler.workload import FULL, FULL_AGAIN, Workload

RULES = Rules(rounds=6, budget_s=None, target_ci=None, arm_timeout_s=60)
WORK = Workload(batch_size=2, seq_len=8, dtype="fp32", target_modules="all-linear", device="cpu", seed=3)
ARMS = ["r2", "r4", FULL, FULL_AGAIN]


class TwoLinears(nn.Module):
    """Token ids (2, 8) → loss. With `trouble` set, the adapter of that rank meets it in its forward."""

    def __init__(self, trouble=None, rank=4):
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 4)
        self.config = SimpleNamespace(vocab_size=50)
        self.trouble, self.rank = trouble, rank

    def forward(self, input_ids, labels):
        weights = getattr(self.first, "lora_A", {})
        trained = [w for w in weights.values() if w.weight.requires_grad and w.weight.shape[0] == self.rank]
        active = trained and not self.first.adapters_disabled
        if active and self.trouble == "raise":
            raise IndexError("nothing there")
        if active and self.trouble == "memory":
            torch.empty(2**58)
        if active and self.trouble == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while active and self.trouble == "hang":
            time.sleep(1)
        return SimpleNamespace(loss=self.second(self.first(input_ids.float()).tanh()).square().mean())


class Big(nn.Module):
    """Token ids (2, 8) → loss, through half a million weights."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 700), nn.Linear(700, 700)
        self.config = SimpleNamespace(vocab_size=50)

    def forward(self, input_ids, labels):
        return SimpleNamespace(loss=self.second(self.first(input_ids.float()).tanh()).square().mean())


@pytest.fixture
def sent(tmp_path):
    return lambda *trouble: models.save_module(TwoLinears(*trouble), tmp_path / "model.pt")


@pytest.fixture
def stepped(monkeypatch):
    """What every step trained: (arm's adapter or None, names of the parameters with a gradient), in order."""
    seen, models_seen, true_step = [], [], timing._cpu_step

    def step(arm, batch):
        names = []
        hooks = [
            p.register_post_accumulate_grad_hook(
                lambda p, name=name: names.append((name, bool(p.grad.isfinite().all())))
            )
            for name, p in arm.model.named_parameters()
            if p.requires_grad
        ]
        try:
            return true_step(arm, batch)
        finally:
            for hook in hooks:
                hook.remove()
            seen.append((arm.adapter, sorted(name for name, finite in names if finite)))
            models_seen[:] = [arm.model]

    monkeypatch.setattr(timing, "_cpu_step", step)
    return SimpleNamespace(steps=seen, model=models_seen)


BASE = ["first.bias", "first.weight", "second.bias", "second.weight"]


def test_each_arm_trains_what_it_says_and_the_shared_weights_stay(sent, stepped):
    source = sent()
    before = torch.load(source.location, weights_only=False).state_dict()
    result = time_arms(source, WORK, ARMS, rounds=6)

    assert result["status"] == "ok" and list(result["arms"]) == ARMS
    for series in result["arms"].values():
        assert series["status"] == "ok"
        assert {len(series[name]) for name in SERIES} == {6}
        assert all(value > 0 for value in series["step_ms"])
        phases = np.sum([series[name] for name in ("forward_ms", "backward_ms", "optimizer_ms")], axis=0)
        assert np.allclose(phases, series["step_ms"])
    (warm_up,) = result["warm_ups"]
    assert MIN_WARM_UP <= warm_up["rounds"] <= MAX_WARM_UP and result["stopped"] == "rounds"
    assert len(stepped.steps) == 4 * (6 + warm_up["rounds"])
    for adapter, trained in stepped.steps:
        if adapter is None:
            assert trained == BASE
        else:
            layers = ("first", "second")
            assert trained == sorted(f"{m}.lora_{x}.{adapter}.weight" for m in layers for x in "AB")
    model = stepped.model[0]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(lora_parameters(model)) == 4


def test_full_fine_tuning_is_timed_without_any_rank(sent):
    arms = time_arms(sent(), WORK, [FULL, FULL_AGAIN], rounds=6)["arms"]
    assert {name: len(one["step_ms"]) for name, one in arms.items()} == {FULL: 6, FULL_AGAIN: 6}


def test_every_round_has_every_arm_in_an_order_of_its_own(sent, stepped):
    time_arms(sent(), WORK, ARMS[:3], rounds=9)
    orders = [tuple(adapter for adapter, _ in stepped.steps[i : i + 3]) for i in range(0, len(stepped.steps), 3)]
    assert all(sorted(map(str, order)) == ["None", "r2", "r4"] for order in orders)
    assert len(set(orders)) >= 4
    again = list(stepped.steps)
    stepped.steps.clear()
    time_arms(sent(), WORK, ARMS[:3], rounds=9)
    known = min(len(again), len(stepped.steps))  # warm-up may take more rounds or fewer
    assert [adapter for adapter, _ in stepped.steps][:known] == [adapter for adapter, _ in again][:known]


@pytest.mark.parametrize(("trouble", "status"), [("raise", "failed"), ("memory", "oom")])
def test_an_arm_that_fails_is_a_row_and_the_others_go_on(sent, stepped, trouble, status):
    arms = time_arms(sent(trouble), WORK, ARMS, rounds=6)["arms"]
    assert [adapter for adapter, _ in stepped.steps].count("r4") == 1  # not tried again
    assert arms["r4"]["status"] == status and "step_ms" not in arms["r4"]
    assert (arms["r4"]["requested_MiB"] == 2**40) is (trouble == "memory")
    assert all(len(arms[name]["step_ms"]) == 6 for name in ("r2", FULL, FULL_AGAIN))


@pytest.mark.parametrize(("trouble", "status"), [("kill", "killed"), ("hang", "timeout")])
def test_an_arm_that_ends_its_process_is_a_row_and_the_others_go_on(sent, tmp_path, trouble, status):
    reports, seen = [], []
    # A process that starts on a busy machine may take seconds to get as far as the trouble.
    rules = Rules(rounds=6, budget_s=None, target_ci=None, arm_timeout_s=300 if trouble == "kill" else 25)
    (timed,) = time_groups(
        sent(trouble), WORK, [ARMS], rules, tmp_path, lambda *report: reports.append(report), seen.append
    )
    assert timed["arms"]["r4"]["status"] == status
    assert ("SIGKILL" if trouble == "kill" else "in forward (test_profile_timing.py:") in timed["arms"]["r4"]["error"]
    for name in ("r2", FULL, FULL_AGAIN):
        assert [len(timed["arms"][name][of]) for of in ("step_ms", "cpu_ms")] == [6, 6]
    assert reports[-1] == (6, 6, "3 arms a round")
    # The rounds were seen as they ended.
    assert [len(record.rounds) for record in seen] == sorted(len(record.rounds) for record in seen)
    assert seen[-1].series("r2") == timed["arms"]["r2"]["step_ms"]

    arms = rows(2, 4)
    aa = add_times(arms, [timed], WORK, rules)
    assert [arm.status for arm in arms] == ["ok", status, "ok"] and aa["of"] == FULL
    assert arms[0].ratio_to_full > 0 and arms[1].ratio_to_full is None and arms[1].error


def test_a_spent_budget_leaves_six_rounds(sent):
    arms = time_arms(sent(), WORK, ARMS, rounds=500, budget_s=1e-9)["arms"]
    assert {len(series["step_ms"]) for series in arms.values()} == {6}


def test_a_sweep_writes_arms_as_they_end_and_leaves_the_model_alone(tmp_path):
    model = TwoLinears().eval()
    model.second.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lines = []

    def watch(stage, done, total, text):
        written = tmp_path / "run" / "arms.jsonl"
        lines.append(
            (stage, [json.loads(line) for line in written.read_text().splitlines()] if written.exists() else [])
        )

    profile = profile_ranks(model, [2], batch_size=2, seq_len=8, steps=6, out=tmp_path / "run", progress=watch)
    memory = [[(arm["kind"], arm["status"]) for arm in arms] for stage, arms in lines if stage == "memory"]
    assert memory == [[], [("lora", "ok")], [("lora", "ok"), ("full", "ok")]]
    written = next(arms for stage, arms in lines if stage == "time")
    assert all(arm["peak_MiB"] > 0 and arm["step_ms"] is None for arm in written)
    assert len(profile.full.samples_ms) == 6 and profile.lora[0].trainable == 2 * (8 + 6 + 6 + 4)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training and [p.requires_grad for p in model.parameters()] == [True, True, True, False]


def rows(*ranks):
    return [*(Arm("lora", rank, rank, 0.1) for rank in ranks), Arm("full", None, 100, 1.0)]


def series(step_ms):
    step_ms = list(map(float, step_ms))
    return {"status": "ok", **{name: step_ms for name in SERIES}}


def test_ratios_and_crossover_survive_a_disturbed_clock():
    """Rounds that take up to thirty times as long: paired ratios are those of the arms, whatever the medians say."""
    rng = np.random.default_rng(0)
    disturbance = np.exp(rng.uniform(0, 3.4, 25))
    noise = lambda: np.exp(0.01 * rng.standard_normal(25))  # noqa: E731
    cost = {"r1": 0.80, "r16": 0.95, "r64": 1.05, FULL: 1.0, FULL_AGAIN: 1.0}
    times = {name: series(100 * value * disturbance * noise()) for name, value in cost.items()}
    arms = rows(1, 16, 64)
    aa = add_times(arms, [{"arms": times}], WORK, RULES)
    for arm in arms[:-1]:
        low, high = arm.ratio_ci
        assert low <= arm.ratio_to_full <= high and high - low < 0.04
        assert arm.ratio_to_full == pytest.approx(cost[arm.name], rel=0.02)
        assert arm.tokens_per_s == pytest.approx(16e3 / arm.step_ms)
    assert arms[-1].ratio_to_full is None and arms[-1].samples_ms == times[FULL]["step_ms"]
    assert aa["noise_floor"] < 0.02 and aa["ci"][0] < 1.01 and aa["ci"][1] > 0.99
    time = crossovers(arms, seed=0)["time"]
    assert time.bracket == (16, 64) and time.interval[0] > 16 and time.interval[1] < 64


def test_without_full_fine_tuning_there_is_no_ratio_and_no_crossover():
    arms = rows(1, 16)
    arms[-1].status = "oom"
    times = {"r1": series([5] * 6), "r16": series([6] * 6)}
    assert add_times(arms, [{"arms": times}], WORK, RULES) is None
    assert [arm.step_ms for arm in arms] == [5, 6, None] and arms[0].ratio_to_full is None
    found = crossovers(arms, seed=0)
    assert {found[cost].reason for cost in ("time", "memory")} == {"full fine-tuning ran out of memory"}


def sized(*ranks, states):
    """Arms whose step takes 100 MiB beside what stays of them."""
    arms = rows(*ranks)
    for arm in arms:
        state = states[arm.name]
        arm.peak_MiB, arm.after_step_MiB = 100 + state, {"adapters": 0.0, "optimizer": state}
    return arms


def test_arms_that_do_not_fit_together_get_processes_with_a_reference_in_each():
    arms = sized(1, 64, states={"r1": 1.0, "r64": 60.0, FULL: 200.0})
    assert groups_of(arms, 600) == ([["r1", "r64", FULL, FULL_AGAIN]], {})  # 1 + 60 + 200 + 200, and 100 for a step
    assert groups_of(arms, None)[0] == [["r1", "r64", FULL, FULL_AGAIN]]
    assert groups_of(arms, 500)[0] == [["r1", "r64", FULL, "r1 again"]]
    assert groups_of(arms, 350)[0] == [["r1", "r64", "r1 again"], ["r1", FULL]]
    groups, reasons = groups_of(arms, 200)
    assert groups == [["r1", "r64", "r1 again"]] and "beside r1 it needs 301 MiB of 200 MiB" in reasons[FULL]
    arms[1].status, arms[1].error = "oom", "no room"
    assert groups_of(arms, 600) == ([["r1", FULL, FULL_AGAIN]], {"r64": "no room"})
    arms[0].status = arms[2].status = "timeout"
    assert groups_of(arms, 600)[0] == []


def test_a_ratio_through_a_reference_is_the_quotient_of_two():
    """Two processes on a machine that is twice as slow in one of them."""
    rng = np.random.default_rng(1)
    noise = lambda: np.exp(0.01 * rng.standard_normal(40))  # noqa: E731
    first = {name: series(100 * cost * noise()) for name, cost in {"r1": 0.8, "r64": 1.2, "r1 again": 0.8}.items()}
    second = {name: series(200 * cost * noise()) for name, cost in {"r1": 0.8, FULL: 1.0}.items()}
    arms = rows(1, 64)
    aa = add_times(arms, [{"arms": first}, {"arms": second}], WORK, RULES)
    for arm, cost in zip(arms, (0.8, 1.2)):
        assert arm.ratio_to_full == pytest.approx(cost, rel=0.01)
        assert arm.ratio_ci[0] < cost < arm.ratio_ci[1] and arm.ratio_ci[1] - arm.ratio_ci[0] < 0.04
    assert [arm.ratio_via for arm in arms] == [None, "r1", None]
    # Two independent intervals make a wider one.
    assert arms[1].ratio_ci[1] / arms[1].ratio_ci[0] > arms[0].ratio_ci[1] / arms[0].ratio_ci[0]
    assert aa["of"] == "r1" and aa["noise_floor"] < 0.02
    found = crossovers(arms, seed=0)["time"]
    assert found.bracket == (1, 64) and found.interval is None  # no common rounds to draw from


def test_processes_take_turns_and_every_arm_gets_its_rounds(sent, tmp_path):
    seen = []
    groups = [["r2", "r4", "r2 again"], ["r2", FULL]]
    timed = time_groups(sent(), WORK, groups, RULES, tmp_path, lambda done, total, text: seen.append(text))
    turns = list(dict.fromkeys(text.partition(",")[0] for text in seen))
    assert turns == ["process 1 of 3", "process 2 of 3", "process 3 of 3"]
    assert [len(group["warm_ups"]) for group in timed] == [2, 1]
    for group, names in zip(timed, groups):
        assert {name: len(one["step_ms"]) for name, one in group["arms"].items()} == dict.fromkeys(names, 6)
    arms = rows(2, 4)
    aa = add_times(arms, timed, WORK, RULES)
    assert [arm.ratio_via for arm in arms] == [None, "r2", None] and aa["of"] == "r2"
    assert all(arm.ratio_to_full > 0 for arm in arms[:-1])


def test_a_sweep_without_room_for_full_beside_the_ranks_still_has_ratios(monkeypatch, tmp_path):
    """Memory is real and so are the runs; only what the machine says is free is not."""
    from lora_fast.profiler import sweep

    # Weights 1.9 MiB, so 11.3 at the peak of full, 13.9 at r300's, 18.6 with both one's states.
    monkeypatch.setattr(sweep, "available_MiB", lambda device: 14.5)
    profile = profile_ranks(Big(), [1, 300], batch_size=2, seq_len=8, steps=6, out=tmp_path / "run")
    one, large = profile.lora
    assert (one.ratio_via, large.ratio_via) == (None, "r1")
    assert one.ratio_to_full > 0 and large.ratio_to_full > 0
    assert any("A B B A" in note and note.startswith("r300:") for note in profile.notes)
    assert not list((tmp_path / "run").glob("rounds-*"))


def test_sources_travel_as_json():
    source = ModelSource("shape", "llama-5m", "llama-5m")
    assert ModelSource(**json.loads(json.dumps(source.to_dict()))) == source


@pytest.mark.parametrize("ms, side", [(10.0, 256), (1.0, 512)])
def test_a_large_product_is_one_that_takes_long_enough(monkeypatch, ms, side):
    """2 n³ FLOPs in the time of the median product; a larger one is tried while that time is short."""
    shapes = []

    def clocked(call, device):
        call()
        shapes.append(call.keywords["out"].shape)
        return ms * (1 + len(shapes) % 3)  # the median of 1, 2 and 3 is 2

    monkeypatch.setattr(timing, "timed", clocked)
    monkeypatch.setattr(timing, "PRODUCT_SIDE", 512)
    assert timing.product_tflops_s(torch.device("cpu"), torch.float32) == pytest.approx(2 * side**3 / (2 * ms) / 1e9)
    assert shapes[-1] == (side, side)


def test_the_product_is_timed_once_for_a_run_that_is_taken_up(sent, tmp_path):
    record = tmp_path / "rounds.jsonl"
    first = time_arms(sent(), WORK, ARMS[:2], rounds=3, least=3, final=False, record=str(record))
    again = time_arms(sent(), WORK, ARMS[:2], rounds=6, record=str(record))
    assert again["product_tflops_s"] == first["product_tflops_s"] > 0
    assert record.read_text().count("product_tflops_s") == 1
