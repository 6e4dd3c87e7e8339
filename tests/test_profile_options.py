"""Options of a profile that change the answer: recorded, obeyed, and PEFT and single layers beside it."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from lora_fast import LoraFastError, backend
from lora_fast.profiler import estimate_memory, layers, profile_ranks, sweep
from lora_fast.profiler.layers_table import layers_table
from lora_fast.profiler.models import build, resolve
from lora_fast.profiler.profile import Profile
from lora_fast.profiler.ranks import parse_share
from lora_fast.profiler.report import chart
from lora_fast.profiler.timing import shared_copy, time_arms
from lora_fast.profiler.workload import Workload, train_adapter, train_peft

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OPTIONS = {
    "dtype": "bf16",
    "adapter_dtype": "bf16",
    "lora_dropout": 0.1,
    "gradient_accumulation": 2,
    "gradient_checkpointing": True,
    "optimizer": "adafactor",
    "foreach": True,
    "attn_implementation": "eager",
    "backend": "torch",
    "target_ci": 0.9,
}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path / "config.json")


def test_options_are_recorded_and_obeyed(config, tmp_path):
    pytest.importorskip("peft")
    sizes = {"batch_size": 2, "seq_len": 16, "device": "cpu", "time_budget_s": 30}
    found = profile_ranks(config, [4], compare_peft=True, layers=True, out=tmp_path / "run", **sizes, **OPTIONS)
    work = json.loads((tmp_path / "run" / "run.json").read_text())["workload"]
    assert {name: work[name] for name in OPTIONS} == {**OPTIONS, "optimizer": "Adafactor"}
    assert work["tokens_per_step"] == 64 and work["rounds"] >= 10 and work["stopped_by"] == "target"
    assert work["widest_half_width"] <= 0.9 and 3 <= work["warm_up_rounds"] <= 10

    ours, peft, _ = found.arms
    assert [arm.name for arm in found.arms] == ["r4", "peft r4", "full"] and found.lora == [ours]
    assert peft.trainable == ours.trainable
    for arm in found.arms:
        assert arm.status == "ok" and arm.step_ms > 0 and len(arm.samples_ms) == work["rounds"]
        assert arm.predicted_MiB == pytest.approx(arm.peak_MiB, rel=2e-3)
    assert peft.ratio_to_full > 0 and peft.memory_ratio > 0
    drawn = [panel["beside"][-1] for panel in chart(found)["panels"]]
    assert drawn == [
        {"name": "PEFT's LoRA", "points": [{"rank": 4, "ratio": ratio}]}
        for ratio in (peft.ratio_to_full, peft.memory_ratio)
    ]
    for arm in (ours, peft):  # bf16 adapters: 2 bytes each
        assert arm.by_category["adapters"] == pytest.approx(2 * arm.trainable / 2**20)

    # q and o, k and v, gate and up, down: four shapes.
    assert [(row["in_features"], row["out_features"], row["modules"]) for row in found.layers] == [
        (32, 32, 4),
        (32, 16, 4),
        (32, 48, 4),
        (48, 32, 2),
    ]
    assert found.layers[0]["names"] == ["o_proj", "q_proj"]
    for row in found.layers:
        assert row["status"] == "ok" and row["rank"] == 4 and row["tokens"] == 32 and row["noise_floor"] > 0
        assert row["ms"] > 0 and row["frozen_ci"][0] <= row["ratio_to_frozen"] <= row["frozen_ci"][1]
        assert row["dense_ci"][0] <= row["ratio_to_dense"] <= row["dense_ci"][1]
    again = Profile.from_dict(json.loads((tmp_path / "run" / "run.json").read_text()))
    assert again.layers == json.loads(json.dumps(found.layers)) and layers_table(again).row_count == 4


def test_peft_without_peft_is_one_clear_line(config, monkeypatch):
    monkeypatch.setattr("lora_fast.profiler.workload.find_spec", lambda name: None)
    for command in (profile_ranks, estimate_memory):
        with pytest.raises(LoraFastError, match=r"not installed; pip install 'lora-fast\[peft\]'"):
            command(config, [4], compare_peft=True)


def workload(**changes):
    fields = {"batch_size": 2, "seq_len": 8, "dtype": "fp32", "target_modules": "all-linear", "device": "cpu"}
    return Workload(**{**fields, "seed": 0, **changes})


@pytest.mark.parametrize("dora", [False, True])
def test_pefts_arms_share_the_weights_and_train_the_same_adapter(config, dora):
    pytest.importorskip("peft")
    base = build(resolve(config), device="cpu", dtype=torch.bfloat16)
    copies = [shared_copy(base), shared_copy(base)]
    weights = {p.data_ptr() for p in base.parameters()}
    for dtype, rank in (("fp32", 3), ("bf16", 5)):
        model, trained = train_peft(copies.pop(), workload(dtype="bf16", adapter_dtype=dtype, use_dora=dora), rank)
        assert {p.dtype for p in trained} == {torch.float32 if dtype == "fp32" else torch.bfloat16}
        assert weights == {p.data_ptr() for p in model.parameters() if p.data_ptr() in weights}
        ours = train_adapter(shared_copy(base), workload(use_dora=dora), rank)
        assert sorted(tuple(p.shape) for p in trained) == sorted(tuple(p.shape) for p in ours)
        assert type(model).__module__.startswith("peft.") and model.training
    assert not any(hasattr(module, "lora_A") for module in base.modules())


def test_a_pefts_arm_steps_beside_ours(config):
    pytest.importorskip("peft")
    arms = ["r2", "peft r2", "peft r4", "full", "full again"]
    result = time_arms(resolve(config), workload(), arms, rounds=6)
    assert {name: len(one["step_ms"]) for name, one in result["arms"].items()} == dict.fromkeys(arms, 6)


def test_layers_compute_what_they_say():
    """Values and gradients of each arm's step, caught where autograd is asked for them."""
    steps, caught, true_grad = None, [], torch.autograd.grad

    def grad(y, inputs, dy):
        caught[:] = [y, inputs, dy, true_grad(y, inputs, dy)]
        return caught[3]

    steps = layers._steps(33, 20, workload(), [3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", grad)
        for name, count in (("frozen", 1), ("frozen again", 1), ("dense", 2), ("r3", 3)):
            steps[name]()
            y, inputs, dy, found = caught
            assert [tuple(g.shape) for g in found] == [tuple(t.shape) for t in inputs] and len(found) == count
            x = inputs[0].detach().double()
            assert (x.shape, y.shape) == ((16, 33), (16, 20)) and all(g.abs().sum() > 0 for g in found)
            if name == "dense":
                assert torch.allclose(y.double(), x @ inputs[1].double().t(), atol=1e-5)
                assert torch.allclose(found[1].double(), dy.double().t() @ x, atol=1e-5)
            if name == "r3":
                lora_A, lora_B = (t.detach().double() for t in inputs[1:])
                assert torch.allclose(found[2].double(), 2 * dy.double().t() @ (x @ lora_A.t()), atol=1e-5)
                assert torch.allclose(found[1].double(), 2 * (dy.double() @ lora_B).t() @ x, atol=1e-5)


@pytest.mark.parametrize(("text", "value"), [("2%", 0.02), ("0.5 %", 0.005), ("0.02", 0.02), (".1", 0.1)])
def test_shares_as_people_write_them(text, value):
    assert parse_share(text, "--target-ci") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "2%%", "-1%", "0", "100%", "1.5", "x", "nan"])
def test_what_is_no_share(text):
    with pytest.raises(LoraFastError, match="--target-ci"):
        parse_share(text, "--target-ci")


def test_documents_of_the_first_versions_still_load():
    """run.json of schema 1 before predictions, layers and references."""
    old = {"kind": "lora", "rank": 4, "trainable": 10, "trainable_share": 0.1, "status": "ok", "step_ms": 5.0}
    run = {"schema_version": 1, "environment": {}, "workload": {}, "aa": None, "crossover": {}, "notes": []}
    profile = Profile.from_dict(run | {"arms": [old]})
    arm = profile.arms[0]
    assert (arm.predicted_MiB, arm.ratio_via, arm.after_step_MiB, profile.layers) == (None, None, None, None)
    assert Profile.from_dict(profile.to_dict()).to_dict() == profile.to_dict()


def test_where_full_fine_tuning_runs_out_of_memory_its_prediction_stands_in():
    from lora_fast.profiler.crossover import crossovers
    from lora_fast.profiler.profile import Arm

    def arms(full_peak):
        made = [Arm("lora", rank, rank, 0.1, peak_MiB=peak, predicted_MiB=said) for rank, peak, said in SIZES]
        made.append(Arm("full", None, 100, 1.0, peak_MiB=full_peak, predicted_MiB=12.0))
        made[-1].status = "ok" if full_peak else "oom"
        for arm in made[:-1]:
            arm.status = "ok" if arm.peak_MiB else "oom"
        return made

    SIZES = ((2, 4.0, 4.1), (32, 8.0, 8.0), (64, None, 16.0))
    without = arms(None)
    (note,) = sweep._memory_ratios(without)
    assert "held against the 12.0 MiB that shapes predict" in note
    assert [arm.memory_ratio for arm in without] == pytest.approx([4 / 12, 8 / 12, 16 / 12, None])
    found = crossovers(without, 0)["memory"]
    assert found.rank == pytest.approx(48) and found.bracket == (32, 64)
    measured = arms(10.0)
    assert sweep._memory_ratios(measured) == []
    assert [arm.memory_ratio for arm in measured] == pytest.approx([0.4, 0.8, None, 1])
    assert crossovers(measured, 0)["memory"].bracket == (32, 64)
    unknown = arms(None)
    unknown[-1].predicted_MiB = None
    assert sweep._memory_ratios(unknown) == [] and crossovers(unknown, 0)["memory"].rank is None


def test_a_run_says_which_implementation_its_backend_came_to(monkeypatch):
    cpu = workload(backend="auto")
    assert sweep._implementation(cpu, [8, 600]) == "PyTorch: the tensors are on the CPU"
    assert sweep._implementation(replace(cpu, backend="torch"), [8]) == "PyTorch: backend='torch' was asked for"
    # As on a GPU, which takes ranks up to a limit.
    gpu = partial(backend.triton_unsupported, "lora_linear", torch.device("cpu"), torch.float32)
    monkeypatch.setattr(backend, "interpreted", lambda: True)
    monkeypatch.setattr(sweep, "why_not_triton", lambda asked, op, device, dtype, rank: gpu(rank))
    assert sweep._implementation(cpu, [8, 64]) == "Triton kernels"
    expected = "r8, r512: Triton kernels; r513: PyTorch: r=513 is above 512"
    assert sweep._implementation(cpu, [8, 512, 513]) == expected
