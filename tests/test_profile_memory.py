"""The memory pass: the tracker against sums done by hand, the child against the system's count, memory running out."""

import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

from lora_fast import LoraFastError, apply_lora, lora_parameters
from lora_fast.profiler import memory, models, process
from lora_fast.profiler.memory import CATEGORIES, MALLOC, track_step
from lora_fast.profiler.predict import predict
from lora_fast.profiler.workload import Workload, optimizer_of, out_of_memory, requested_MiB

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and limits memory as Linux does")
TINY = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def workload(**changes) -> Workload:
    fields = {
        "batch_size": 2,
        "seq_len": 8,
        "dtype": "fp32",
        "target_modules": "all-linear",
        "device": "cpu",
        "seed": 0,
    }
    return Workload(**{**fields, **changes})


class OneLinear(nn.Module):
    """loss = Σ x Wᵀ with W (20, 10): a step whose bytes can be counted by hand. The token ids become x (2, 3, 10)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(10, 20, bias=False)
        self.config = SimpleNamespace(vocab_size=7)

    def forward(self, input_ids, labels):
        return SimpleNamespace(loss=self.linear(input_ids).sum())


class Dies(OneLinear):
    """Its process gets the signal that Linux sends when memory runs out."""

    def forward(self, input_ids, labels):
        os.kill(os.getpid(), signal.SIGKILL)


class Hangs(OneLinear):
    def forward(self, input_ids, labels):
        while True:
            time.sleep(1)


class Raises(OneLinear):
    def forward(self, input_ids, labels):
        raise IndexError("index 7 is out of range")


class Wide(OneLinear):
    """16 MiB of weights for 8 token ids: as much again in gradients, and twice as much in AdamW's states."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 2**19, bias=False)

    def forward(self, input_ids, labels):
        return super().forward(input_ids.float(), labels)


class Idle(Wide):
    """A second layer that no gradient reaches, and so without states."""

    def __init__(self):
        super().__init__()
        self.linear, self.other = nn.Linear(8, 64, bias=False), nn.Linear(64, 64)
        self.config = PretrainedConfig(vocab_size=7)


class Asks(OneLinear):
    """Asks PyTorch's allocator for more than any machine has."""

    def forward(self, input_ids, labels):
        return SimpleNamespace(loss=torch.empty(2**58).sum())


def measured(source, work, rank=None, limit=None, **more) -> dict:
    arguments = {"kind": "full" if rank is None else "lora", "rank": rank, "memory_limit_MiB": limit} | more
    return process.run_in_child("memory", source, work, arguments, environment=MALLOC)


def sent(tmp_path, cls):
    return models.save_module(cls(), tmp_path / "model.pt")


def test_a_step_counted_by_hand():
    model = OneLinear()
    x = torch.ones(2, 3, 10)
    batch = {"input_ids": x, "labels": x}
    optimizer = optimizer_of(workload(), list(model.parameters()))
    memory._plain_step(model, optimizer, batch)
    tracked = track_step(model, optimizer, batch)

    weight = 20 * 10 * 4
    states = 2 * weight + 4  # two moments, and the step count, a float32 scalar
    output = 2 * 3 * 20 * 4
    between = {"weights": weight, "optimizer": states, "activations": x.numel() * 4}
    assert tracked["after_step"] == {**dict.fromkeys(CATEGORIES, 0), **between, "gradients": weight}
    # The product's output and the loss are alive together; the sum's backward needs neither.
    assert tracked["phase_peaks"]["forward"] == sum(between.values()) + output + 4
    assert sum(tracked["by_category"].values()) == tracked["peak"] == max(tracked["phase_peaks"].values())
    # AdamW makes its denominator beside weight, gradient and both moments: the peak of a step with so few tokens.
    assert tracked["peak_phase"] == "optimizer"
    assert tracked["peak"] >= sum(between.values()) + 2 * weight


def tiny_model(tmp_path, **changes):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**TINY, **changes}))
    return models.resolve(str(path))


@pytest.mark.parametrize("tied", [False, True])
def test_full_fine_tuning_holds_four_times_its_parameters(tmp_path, tied):
    model = models.build(tiny_model(tmp_path, tie_word_embeddings=tied), device="cpu", dtype=torch.float32)
    optimizer = optimizer_of(workload(), list(model.parameters()))
    batch = workload().batch(model)
    memory._plain_step(model, optimizer, batch)
    after = track_step(model, optimizer, batch)["after_step"]

    parameters = list(model.parameters())  # a tied weight is listed once
    count = 4 * sum(parameter.numel() for parameter in parameters)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert after["weights"] == count + buffers
    assert after["gradients"] == count
    assert after["optimizer"] == 2 * count + 4 * len(parameters)
    assert after["adapters"] == 0


def test_a_lora_step_holds_gradients_and_states_of_its_adapters_only(tmp_path):
    model = models.build(tiny_model(tmp_path), device="cpu", dtype=torch.bfloat16)
    base = 2 * sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    apply_lora(model, workload().lora_config(4), adapter_name="r4")
    adapters = lora_parameters(model)
    optimizer = optimizer_of(workload(), adapters)
    batch = workload().batch(model)
    memory._plain_step(model, optimizer, batch)
    tracked = track_step(model, optimizer, batch, adapters=adapters)

    # Σ (K + N) over q (32, 32), k and v (32, 16), o (32, 32), gate and up (32, 48), down (48, 32), in two layers; fp32.
    count = 4 * 4 * 2 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
    assert tracked["after_step"]["weights"] == base + buffers
    assert tracked["after_step"]["adapters"] == tracked["after_step"]["gradients"] == count
    assert tracked["after_step"]["optimizer"] == 2 * count + 4 * len(adapters)
    assert sum(tracked["by_category"].values()) == tracked["peak"]


def test_nothing_is_counted_twice_and_nothing_stays_behind():
    model = OneLinear()
    optimizer = optimizer_of(workload(), list(model.parameters()))
    x = torch.ones(2, 3, 10)
    batch = {"input_ids": x, "labels": x}
    memory._plain_step(model, optimizer, batch)
    first = track_step(model, optimizer, batch)
    tracker = memory.MemoryTracker()
    tracker.start("forward")
    with tracker:
        kept = torch.ones(1000)
        view = kept[:10].view(2, 5)
        del view
        torch.zeros(500).add_(1)
    assert tracker.total == 4000 and tracker.peak == 6000
    tracker.add(kept, "gradients")
    assert tracker.current["gradients"] == 4000 and tracker.current["activations"] == 0
    del kept
    assert tracker.total == 0 and set(tracker.current.values()) == {0}
    assert track_step(model, optimizer, batch) == first


def test_an_allocator_granule_rounds_up():
    tracker = memory.MemoryTracker(round_to=512)
    tensor = torch.ones(129)  # 516 bytes
    tracker.add(tensor, "weights")
    assert tracker.total == 1024


@LINUX
def test_the_child_agrees_with_the_resident_peak():
    result = measured(models.resolve("llama-5m"), workload(batch_size=8, seq_len=256))
    assert result["status"] == "ok"
    assert sum(result["by_category_MiB"].values()) == pytest.approx(result["peak_MiB"])
    # What the system counted holds the libraries' scratch memory too: 3% here, and never less than the tensors.
    assert 0.99 <= result["resident_peak_MiB"] / result["peak_MiB"] <= 1.08
    parameters = 4_999_424 * 4 / 2**20
    assert result["after_step_MiB"]["gradients"] == pytest.approx(parameters)
    assert result["after_step_MiB"]["optimizer"] == pytest.approx(2 * parameters, rel=1e-4)


@LINUX
def test_memory_that_runs_out_is_a_status(tmp_path):
    source = sent(tmp_path, Wide)
    result = measured(source, workload(), limit=110)  # enough to load it, not for its states
    assert result["status"] == "oom" and result["requested_MiB"] == 16
    assert "allocate" in result["error"]
    assert measured(source, workload(), limit=400)["status"] == "ok"


def test_a_child_that_is_killed_says_so(tmp_path):
    result = measured(sent(tmp_path, Dies), workload())
    assert result["status"] == "killed" and "SIGKILL" in result["error"]


@LINUX
def test_a_kill_counts_as_memory_where_the_system_counts_one_for_memory():
    """Linux counts its own kills; no test can make it kill a process without endangering the others."""
    assert process._memory_kills() >= 0
    killed = process._death(-signal.SIGKILL, "", for_memory=True)
    assert killed["status"] == "oom" and "memory ran out" in killed["error"]
    assert process._death(-signal.SIGSEGV, "", for_memory=True)["status"] == "killed"


@pytest.mark.parametrize("rank", [4, None])
def test_what_no_gradient_reaches_has_no_states(tmp_path, rank):
    source, work = sent(tmp_path, Idle), workload()
    real = memory.measure_arm(source, work, "full" if rank is None else "lora", rank)
    found = predict(source, work, rank)
    assert {name: size / 2**20 for name, size in found.by_category.items()} == real["by_category_MiB"]
    assert {name: size / 2**20 for name, size in found.after_step.items()} == real["after_step_MiB"]
    reached = 8 * 64 if rank is None else rank * (8 + 64)
    assert found.by_category["optimizer"] == 2 * 4 * reached + 4 * (1 if rank is None else 2)


def test_a_child_that_hangs_ends_in_time_and_says_where(tmp_path):
    result = measured(
        sent(tmp_path, Hangs), workload(), arm_timeout_s=20
    )  # its imports take 5 s, and on a busy machine more
    assert result == {"status": "timeout", "error": result["error"]}
    assert "not done after 20 s, in forward (test_profile_memory.py:" in result["error"]
    assert measured(sent(tmp_path, OneLinear), workload(), arm_timeout_s=600)["status"] != "timeout"


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ("0:00:00.001000", "0.001 s"),
        ("0:00:20", "20 s"),
        ("0:00:59.500000", "59.5 s"),
        ("0:01:00.500000", "0:01:00"),
        ("1:00:00", "1:00:00"),
    ],
)
def test_how_long_a_hung_child_was_given_is_never_nothing(told, says):
    death = process._death(1, f"Timeout ({told})!\nThread 0x1 (most recent call first):\n  ...\n", for_memory=False)
    assert death == {"status": "timeout", "error": f"not done after {says}, where is not known"}


def test_a_child_that_raises_has_failed_says_why_and_leaves_no_file(tmp_path, monkeypatch):
    source = sent(tmp_path, Raises)
    monkeypatch.setattr(process.tempfile, "tempdir", str(tmp_path))
    result = measured(source, workload())
    assert result == {"status": "failed", "error": "IndexError: index 7 is out of range", "requested_MiB": None}
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_wrong_input_found_in_the_child_is_wrong_input_here(tmp_path):
    with pytest.raises(LoraFastError, match="target_modules"):
        measured(sent(tmp_path, OneLinear), workload(target_modules=("nothing",)), rank=4)


def test_the_allocators_own_refusal_is_recognized():
    with pytest.raises(RuntimeError) as refusal:
        Asks()(None, None)
    assert out_of_memory(refusal.value)
    assert requested_MiB(str(refusal.value)) == 2**58 * 4 / 2**20
    assert requested_MiB("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total of") == 1536
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_memory(ValueError("out of memory"))
