"""Launches as they are counted, bytes against what Triton's interpreter sees kernels move, and the times projected."""

import json
from collections import Counter

import pytest
import torch
import triton
from kernel_support import random
from torch import nn
from traffic import count_traffic

from lora_fast import LoraFastError, lora_linear, lora_linears, lora_swiglu_mlp, tuning
from lora_fast.cli import main
from lora_fast.profiler import estimate_memory
from lora_fast.profiler.models import resolve, resolve_shapes
from lora_fast.profiler.predict import trace
from lora_fast.profiler.profile import Arm, Profile
from lora_fast.profiler.roofline import CHIPS, Chip, Launch, LaunchCounter, chip_named
from lora_fast.profiler.sweep import _predict
from lora_fast.profiler.table import caption, columns, crossover_sentences
from lora_fast.profiler.workload import FULL, LORA, PEFT, Workload

pytestmark = pytest.mark.filterwarnings("ignore::lora_fast.LoraFastWarning")
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
# A launch takes as many picoseconds as it has bytes, or half its FLOPs.
SIMPLE = Chip("simple", 1, 1.0, 2.0, 2.0)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "config.json"


@pytest.fixture
def flat(tmp_path):
    """Of one layer, which is traced once: what fits takes many traces."""
    (tmp_path / "flat.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 1}))
    return tmp_path / "flat.json"


def workload(**changes):
    fields = {"batch_size": 2, "seq_len": 64, "dtype": "bf16", "target_modules": "all-linear", "device": "cuda"}
    return Workload(**{**fields, "seed": 0, **changes})


def launches(call):
    with LaunchCounter() as counter:
        call()
    return [(launch.flops, launch.bytes) for launch in counter.launches]


# --- Launches ---------------------------------------------------------------------------------------------------------


def test_an_operator_reads_its_inputs_and_writes_its_results_once():
    x, w, ids = torch.ones(6, 8), torch.ones(8, 10), torch.tensor([1, 2, 3])
    y = torch.ones(6, 10)
    for call, expected in {
        lambda: x @ w: [(2 * 6 * 8 * 10, 4 * (48 + 80 + 60))],
        lambda: x + 1: [(0, 4 * (48 + 48))],
        lambda: x + torch.ones(1).expand(6, 8): [(0, 4), (0, 4 * (48 + 1 + 48))],  # an expanded number is one
        lambda: y.clone().addmm_(x, w): [(0, 4 * 120), (2 * 480, 4 * (60 + 48 + 80 + 60))],
        lambda: y.add_(1): [(0, 4 * 120)],
        lambda: y.copy_(y + 1): [(0, 4 * 120), (0, 4 * 120)],
        lambda: y.zero_(): [(0, 4 * 60)],
        lambda: torch.mm(x, w, out=y): [(2 * 480, 4 * (48 + 80 + 60))],
        lambda: w.t()[1:].reshape(3, -1): [(0, 4 * (72 + 72))],  # views cost nothing, a copy does
        lambda: torch.empty_like(x): [],
        lambda: nn.functional.embedding(ids, w): [(0, 2 * 4 * 30)],  # three rows of the table
        lambda: torch._foreach_add_([x, y], 1.0): [(0, 2 * 4 * 108)],
        lambda: torch._foreach_mul([x, y], [x, y]): [(0, 2 * 4 * 108)],  # each read once
        lambda: torch._foreach_addcmul_([x], [x + 1], [x + 2]): [(0, 4 * 96), (0, 4 * 96), (0, 4 * 4 * 48)],
    }.items():
        assert launches(call) == expected, expected


def test_the_longer_of_two_times():
    half, single = Launch(torch.bfloat16, 989 * 10**9, 10**6), Launch(torch.float32, 989 * 10**9, 10**6)
    H100 = chip_named("h100")
    assert H100.seconds(half) == pytest.approx(1e-3)
    assert H100.seconds(single) == pytest.approx(989 / 67 * 1e-3)
    assert H100.seconds(half._replace(bytes=3350 * 10**7)) == pytest.approx(1e-2)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("h100", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("RTX4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A10G", None),
        ("RTX", None),
        ("", None),
    ],
)
def test_gpus_by_name(text, name):
    assert getattr(chip_named(text), "name", None) == name
    assert all(chip_named(chip.name) is chip for chip in CHIPS)


# --- lora-fast's steps as kernels -------------------------------------------------------------------------------------

M, K, N, R = 128, 192, 320, 8
HALF = torch.float16


def linear(p, backend):
    x, weight = random(M, K, dtype=HALF, seed=1).requires_grad_(), random(N, K, dtype=HALF, seed=2, scale=K**-0.5)
    factors = [random(R, K, seed=3).requires_grad_(), random(N, R, seed=4).requires_grad_()]
    dy = random(M, N, dtype=HALF, seed=5)

    def step():
        y = lora_linear(x, weight, *factors, 2.0, dropout_p=p, backend=backend)
        torch.autograd.grad(y, [x, *factors], dy)

    return step


def group(p, backend):
    widths = (N, 104, 72)
    x = random(M, K, dtype=HALF, seed=1).requires_grad_()
    weights = [random(n, K, dtype=HALF, seed=2, scale=K**-0.5) for n in widths]
    lora_As = [random(R, K, seed=3).requires_grad_() for _ in widths]
    lora_Bs = [random(n, R, seed=4).requires_grad_() for n in widths]
    dys = [random(M, n, dtype=HALF, seed=5) for n in widths]

    def step():
        ys = lora_linears(x, weights, lora_As, lora_Bs, [2.0] * 3, dropout_p=p, backend=backend)
        torch.autograd.grad(ys, [x, *lora_As, *lora_Bs], dys)

    return step


def mlp(p, backend):
    x, dy = random(M, K, dtype=HALF, seed=1).requires_grad_(), random(M, K, dtype=HALF, seed=2)
    shapes = [(K, N), (K, N), (N, K)]
    layers = [
        (
            random(n, k, dtype=HALF, seed=3, scale=k**-0.5),
            random(R, k, seed=4, scale=k**-0.5).requires_grad_(),
            random(n, R, seed=5).requires_grad_(),
            2.0,
        )
        for k, n in shapes
    ]

    def step():
        y = lora_swiglu_mlp(x, *layers, dropout_p=p, backend=backend)
        torch.autograd.grad(y, [x, *(factor for layer in layers for factor in layer[1:3])], dy)

    return step


@pytest.mark.skipif(
    not triton.knobs.runtime.interpret or torch.cuda.is_available(), reason="traffic is counted in Triton's interpreter"
)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("layers", [linear, group, mlp])
def test_bytes_are_those_that_kernels_move(layers, p):
    """But for partial sums, which are a small part; as PyTorch's operators the steps would move much more."""
    step = layers(p, "triton")
    with tuning.only("triton"), count_traffic() as traffic:
        step()
    step = layers(p, "torch")
    with LaunchCounter() as counter, counter.as_kernels():
        step()
    with LaunchCounter() as by_operators:
        step()
    moved = traffic.loaded() + traffic.stored()
    counted, unfused = (sum(launch.bytes for launch in each.launches) for each in (counter, by_operators))
    assert 0.88 * moved < counted <= moved and unfused > 1.3 * moved
    assert counter.flops == by_operators.flops == sum(launch.flops for launch in counter.launches)
    assert len(counter.launches) <= traffic.launches().total() + traffic.ops().total() + 6


def test_a_products_time_does_not_hide_what_dA_reads():
    with LaunchCounter() as counter, counter.as_kernels():
        linear(0.0, "torch")()
    flops = [launch.flops for launch in counter.launches if launch.flops]
    product, update = 2 * M * K * N, 2 * M * R
    # S; y; dS and dB; dx; dA
    assert flops == [update * K, product + update * N, 2 * update * N, product + update * K, update * K]
    x, y, w, s, a, b = (2 * numbers for numbers in (M * K, M * N, N * K, M * R, R * K, N * R))
    moved = [launch.bytes for launch in counter.launches if launch.flops]
    assert moved == [x + a + s, x + w + s + b + y, y + b + s + s + b, y + w + s + a + x, s + x + a]


# --- A step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [8, None])
@pytest.mark.parametrize("peft", [False, True])
def test_two_depths_tell_the_time_of_all(path, rank, peft):
    source, work = resolve(str(path)), workload(lora_dropout=0.1)
    found = [trace(source, work, rank, peft=peft and rank is not None, whole=whole) for whole in (False, True)]
    assert [len(step.found) for step in found] == [2, 1]
    extended, whole = (step.seconds(SIMPLE) for step in found)
    assert extended == pytest.approx(whole, rel=1e-9) and min(whole.values()) > 0
    assert found[0].launches() == found[1].launches() == sum(map(Counter.total, found[1].found[0].launches.values()))
    # Tracing as kernels or as operators changes neither FLOPs nor peaks.
    plain = trace(source, workload(lora_dropout=0.1, backend="torch"), rank, peft=peft and rank is not None)
    assert plain.extended().flops == found[0].extended().flops and plain.extended().peak == found[0].extended().peak
    ours = rank is not None and not peft
    assert (sum(plain.seconds(SIMPLE).values()) > 1.05 * sum(extended.values())) == ours


def test_every_product_of_a_step_is_among_its_launches(path):
    step = trace(resolve(str(path)), workload(gradient_checkpointing=True), 8, whole=True).found[0]
    made = {phase: sum(launch.flops * count for launch, count in made.items()) for phase, made in step.launches.items()}
    assert made == {"forward": step.forward_flops, "backward": step.backward_flops, "optimizer": 0}


def test_dropout_is_a_gpus_own(path):
    """PEFT's reads x and writes it and a byte of mask an element, and backward reads dy and that byte and writes dx."""
    source = resolve(str(path))
    steps = {p: trace(source, workload(lora_dropout=p, adapter_dtype="bf16"), 8, peft=True) for p in (0.0, 0.1)}
    tokens, widths = 2 * 64, 6 * 64 + 176  # of x of seven layers
    seconds = {p: step.seconds(SIMPLE) for p, step in steps.items()}
    forward, backward = (seconds[0.1][phase] - seconds[0.0][phase] for phase in ("forward", "backward"))
    assert forward == pytest.approx(5 * 1e-12 * tokens * widths * (2 + 2 + 1), rel=1e-6)
    first = 1e-12 * tokens * 3 * 64 * (2 + 2 + 1)  # q, k and v of the first layer, whose x needs no gradient
    assert backward == pytest.approx(forward - first, rel=1e-6)
    # In fp32 a CPU keeps the mask in four bytes where a GPU keeps it in one.
    cpu, gpu = (
        trace(source, workload(lora_dropout=0.1, dtype="fp32", device=d), 8, peft=True) for d in ("cpu", "cuda")
    )
    fewer = cpu.extended().phases["forward"]["activations"] - gpu.extended().phases["forward"]["activations"]
    assert fewer == pytest.approx(5 * tokens * widths * 3, rel=0.1)


def test_batches_of_a_step_repeat_its_passes_and_not_its_optimizer(path):
    one, four = (trace(resolve(str(path)), workload(gradient_accumulation=n), 8).seconds(SIMPLE) for n in (1, 4))
    assert (four["forward"], four["backward"]) == pytest.approx((4 * one["forward"], 4 * one["backward"]))
    assert four["optimizer"] == one["optimizer"]


def test_adamw_of_full_fine_tuning_is_bound_by_its_bytes():
    """Over lists PyTorch passes 20 times over as many numbers as there are parameters, in bf16: two for the decay,
    three for the first moment, two and three for the second, six for the denominator and four for the update."""
    seconds = trace(resolve_shapes("llama-8b"), workload(batch_size=1, seq_len=2048), None).seconds(chip_named("H100"))
    assert seconds["optimizer"] == pytest.approx(20 * 2 * 8_030_261_248 / 3.35e12, rel=1e-3)
    # Six FLOPs a parameter and token, but for the embedding, and attention on top.
    assert 0.9 * 6 * 8.03e9 * 2048 / 989e12 < seconds["forward"] + seconds["backward"] < 0.2


# --- What users see ---------------------------------------------------------------------------------------------------


def test_an_estimate_for_a_gpu_by_name(flat, tmp_path):
    out = tmp_path / "run"
    sizes = {"seq_len": 64, "memory_GiB": 1.01}
    estimate_memory(str(flat), "8", gpu="rtx4090", price_per_hour=1.0, compare_peft=True, out=out, **sizes)
    document = json.loads((out / "run.json").read_text())
    ours, pefts, full = document["arms"]
    assert [(arm["kind"], arm["rank"]) for arm in (ours, pefts, full)] == [(LORA, 8), (PEFT, 8), (FULL, None)]
    for arm in document["arms"]:
        took = sum(arm["projected_ms"].values())
        assert arm["projected_ratio"] == pytest.approx(took / sum(full["projected_ms"].values()))
        assert arm["projected_tokens_per_s"] == pytest.approx(64 / took * 1000)
        assert arm["usd_per_million_tokens"] == pytest.approx(1 / 3600 / arm["projected_tokens_per_s"] * 1e6)
        assert arm["step_ms"] is None
    assert ours["projected_ratio"] < pefts["projected_ratio"] and ours["peak_MiB"] < pefts["peak_MiB"]
    assert ours["fits"]["largest_batch_size"] > pefts["fits"]["largest_batch_size"] > 0
    assert document["workload"]["memory_GiB"] == 1.01 and document["workload"]["projected_on"]["name"] == "RTX 4090"

    run = Profile.from_dict(document)
    assert "µs on average: the host, which takes longer for one, decides the time" in caption(run)
    run.workload["launches"] = 1
    assert "the host" not in caption(run)
    assert "projected for RTX 4090, not measured" in caption(run) and "165 TFLOP/s in bf16" in caption(run)
    headers = [column.header.replace("\n", " ") for column in columns(run)]
    assert {"time vs full", "tokens/s at most", "$/1M tok at least"} <= set(headers)
    assert any(sentence.startswith("Crossover in projected time") for sentence in crossover_sentences(run))
    assert "Projected time: crossover at rank" in (out / "report.html").read_text()
    unnamed = estimate_memory(str(flat), "8", **sizes)
    assert unnamed.workload["projected_on"] is None and "projected" not in unnamed.crossover
    assert all(arm.projected_ms is None for arm in unnamed.arms)


def test_the_command(flat, capsys, monkeypatch):
    """--gpu is a memory or a name, whose memory it then is."""
    given = {}

    def estimated(model, ranks, **options):
        given.update(options)
        kept = options | {"memory_GiB": None, "gpu": None}
        return estimate_memory(model, ranks, **kept)

    monkeypatch.setattr("lora_fast.profiler.estimate.estimate_memory", estimated)
    command = ["estimate", str(flat), "--ranks", "2", "--seq-len", "16", "--json", "-"]
    for text, expected in {"24GB": {"memory_GiB": 24.0}, "rtx4090": {"gpu": "RTX 4090"}}.items():
        given.clear()
        assert main([*command, "--gpu", text, "--price", "2/h"]) == 0
        assert {name: given.get(name) for name in ("memory_GiB", "gpu")} == {"memory_GiB": None, "gpu": None} | expected
        assert given["price_per_hour"] == 2 and given["compare_peft"] is False
        assert json.loads(capsys.readouterr().out)["workload"]["price_per_hour"] == 2


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"shards": 2}, "no time is projected: several GPUs wait for their network"),
        ({"target_parameters": ["experts.down_proj"]}, "no time is projected: how tokens choose experts is not in"),
    ],
)
def test_where_shapes_tell_no_time(tmp_path, changes, why):
    mixture = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    mixture = CONFIG | mixture
    (tmp_path / "config.json").write_text(json.dumps(mixture))
    found = estimate_memory(str(tmp_path / "config.json"), "4", seq_len=64, gpu="H200", memory_GiB=1.01, **changes)
    assert any(note.startswith(why) for note in found.notes)
    assert found.full.projected_ms is None and "projected" not in found.crossover


def test_what_is_no_gpu(path):
    with pytest.raises(LoraFastError, match="gpu='H300'; expected the memory of one GPU, such as 24GB, or one of A"):
        estimate_memory(str(path), "4", gpu="H300")
    with pytest.raises(LoraFastError, match="gpu='H100' with device='cpu'; leave out one"):
        estimate_memory(str(path), "4", gpu="H100", device="cpu")


def test_a_measurement_on_a_known_gpu_has_the_projection_beside_it(path):
    arms = [Arm(LORA, 8, 0, 0.0), Arm(FULL, None, 0, 1.0)]
    assert _predict(arms, resolve(str(path)), workload(), {"name": "NVIDIA H200"}, lambda *told: None) == []
    assert 0 < arms[0].projected_ratio < arms[1].projected_ratio == 1
    unknown = [Arm(FULL, None, 0, 1.0)]
    assert _predict(unknown, resolve(str(path)), workload(), {"name": "A GPU"}, lambda *told: None) == []
    assert unknown[0].projected_ratio is None and unknown[0].predicted_MiB > 0
