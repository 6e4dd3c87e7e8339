"""Predicted memory and FLOPs against the tracker and the FLOP counter on models that run, and what fits."""

import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lora_fast import LoraFastError
from lora_fast.cli import main
from lora_fast.profiler import estimate_memory
from lora_fast.profiler.estimate import RESERVE_GiB, parse_gpu
from lora_fast.profiler.memory import CATEGORIES, PHASES, track_step
from lora_fast.profiler.models import build, resolve
from lora_fast.profiler.predict import DEPTHS, SHARDED_DEPTHS, layers_are_alike, predict
from lora_fast.profiler.table import columns
from lora_fast.profiler.workload import Workload, loss_of, optimizer_of, train_adapter, train_full

pytestmark = pytest.mark.filterwarnings("ignore::lora_fast.LoraFastWarning")
GiB = 2**30
BASE = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
CONFIGS = {
    "dense": {"model_type": "llama", **BASE, "num_key_value_heads": 4},
    "grouped attention": {"model_type": "llama", **BASE, "tie_word_embeddings": True},
    "mixture of experts": {"model_type": "mixtral", **BASE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "two kinds of layers": {"model_type": "gemma3_text", **BASE, "head_dim": 16, "sliding_window": 16},
}


@pytest.fixture(params=CONFIGS)
def source(request, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS[request.param]))
    return resolve(str(path))


@pytest.fixture
def dense(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS["dense"]))
    return path


@pytest.fixture
def flat(tmp_path):
    """With so few layers the model is traced once, not at two depths."""
    path = tmp_path / "flat.json"
    path.write_text(json.dumps(CONFIGS["dense"] | {"num_hidden_layers": 1}))
    return path


def workload(**changes):
    fields = {"batch_size": 2, "seq_len": 64, "dtype": "fp32", "target_modules": "all-linear", "device": "cpu"}
    return Workload(**{**fields, "seed": 0, **changes})


def tracked(source, work, rank):
    attention = work.attn_implementation
    model = build(source, device="cpu", dtype=work.torch_dtype, attn_implementation=attention)
    trained = train_full(model, work) if rank is None else train_adapter(model, work, rank)
    optimizer, batch = optimizer_of(work, trained), work.batch(model)
    loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    passes = min(work.gradient_accumulation, 2)
    return track_step(model, optimizer, batch, adapters=() if rank is None else trained, micro_steps=passes)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [4, None])
def test_what_is_predicted_is_what_the_tracker_sees(source, rank, checkpointing):
    work = workload(gradient_checkpointing=checkpointing)
    found, real = predict(source, work, rank), tracked(source, work, rank)
    assert found.peak == pytest.approx(real["peak"], rel=1e-3)
    assert found.peak_phase == real["peak_phase"]
    for category in CATEGORIES:
        assert found.by_category[category] == pytest.approx(real["by_category"][category], abs=2e-3 * real["peak"])
    for phase in PHASES:
        assert sum(found.phases[phase].values()) == pytest.approx(real["phase_peaks"][phase], rel=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bf16"},
        {"dtype": "bf16", "adapter_dtype": "bf16", "foreach": True},
        {"lora_dropout": 0.1},
        {"gradient_accumulation": 3},
        {"target_modules": ("q_proj", "v_proj")},
        {"target_modules": ("embed_tokens", "q_proj")},
        {"target_modules": ("embed_tokens",), "dtype": "bf16", "gradient_checkpointing": True},
        {"use_dora": True},
        {"use_dora": True, "lora_dropout": 0.1, "dtype": "bf16"},
        {"attn_implementation": "eager"},
        {"optimizer": "adafactor"},
        {"optimizer": "adafactor", "foreach": True},
        {"optimizer": "sgd"},
    ],
)
@pytest.mark.parametrize("rank", [8, None])
def test_options_change_the_prediction_as_they_change_the_run(dense, changes, rank):
    source, work = resolve(str(dense)), workload(**changes)
    assert predict(source, work, rank).peak == pytest.approx(tracked(source, work, rank)["peak"], rel=1e-3)


def test_an_optimizer_holds_the_states_it_is_known_for(dense):
    """AdamW two numbers per trained parameter, Adafactor a row and a column of each matrix, SGD without momentum none;
    beside those a step count per tensor."""
    source = resolve(str(dense))
    model = build(source, device="meta", dtype=torch.float32)
    shapes = [parameter.shape for parameter in model.parameters()]
    expected = {
        "adamw": sum(2 * shape.numel() + 1 for shape in shapes),
        "adafactor": sum((sum(shape) if len(shape) > 1 else shape.numel()) + 1 for shape in shapes),
        "sgd": 0,
    }
    for name, numbers in expected.items():
        assert predict(source, workload(optimizer=name), None).after_step["optimizer"] == 4 * numbers


def test_two_depths_tell_what_all_layers_cost(source):
    for rank in (4, None):
        whole, extended = predict(source, workload(), rank, whole=True), predict(source, workload(), rank)
        assert extended.phases == whole.phases
        assert extended.flops == whole.flops
        assert (extended.parameters, extended.trainable) == (whole.parameters, whole.trainable)
    model = build(source, device="meta", dtype=torch.float32)
    alike = layers_are_alike(model, BASE["num_hidden_layers"])
    assert alike == ("layer_types" not in model.config.to_dict() or len(set(model.config.layer_types)) == 1)
    assert extended.traced_layers == (DEPTHS if alike else (BASE["num_hidden_layers"],))


@pytest.mark.parametrize(
    ("name", "vocabulary", "rank", "changes"),
    [
        ("dense", 640, None, {"device": "cuda"}),
        ("dense", 640, None, {"optimizer": "sgd", "gradient_accumulation": 2}),
        ("dense", 640, 32, {"adapter_dtype": "bf16"}),
        ("mixture of experts", 1024, None, {"device": "cuda"}),
        ("mixture of experts", 1024, 32, {"adapter_dtype": "bf16"}),
    ],
)
def test_a_peak_that_only_a_deep_model_has_is_found_from_two_depths(name, vocabulary, rank, changes, tmp_path):
    """With checkpointing the logits are the peak of two or three layers and the gradients that of eleven. FSDP divides
    gradients and not activations, so that many GPUs see it at the logits again."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIGS[name], "num_hidden_layers": 11, "vocab_size": vocabulary}))
    source = resolve(str(path))
    work = workload(dtype="bf16", gradient_checkpointing=True, **changes)
    whole, extended = predict(source, work, rank, whole=True), predict(source, work, rank)
    assert extended.traced_layers == DEPTHS and whole.traced_layers == (11,)
    assert extended.phases == whole.phases
    for shards in (2, 64):
        found = [predict(source, work, rank, whole=how, shards=shards) for how in (False, True)]
        assert found[0].traced_layers == SHARDED_DEPTHS
        # Each number is divided and rounded up by itself.
        assert found[0].peak == pytest.approx(found[1].peak, abs=len(CATEGORIES))
    if "device" in changes:  # else this is about what must stay equal
        flat = []
        for depth in DEPTHS:
            other = tmp_path / f"{depth}.json"
            other.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": depth}))
            flat.append(sum(predict(resolve(str(other)), work, rank).phases["backward"].values()))
        low, high = flat
        assert low + 9 * (high - low) < 0.95 * sum(whole.phases["backward"].values())


def test_flops_are_those_of_the_counter(dense):
    """PyTorch's counter knows no FlashAttention on a CPU: eager attention consists of products that it knows. It hooks
    into the layers, so that each adapted layer runs by itself, which takes the same products."""
    source, work = resolve(str(dense)), workload(attn_implementation="eager")
    for rank in (8, None):
        model = build(source, device="cpu", dtype=torch.float32, attn_implementation="eager")
        train_full(model, work) if rank is None else train_adapter(model, work, rank)
        with FlopCounterMode(display=False) as counter:
            loss = loss_of(model, work.batch(model))
            forward = counter.get_total_flops()
            loss.backward()
        found = predict(source, work, rank)
        assert (found.forward_flops, found.flops) == (forward, counter.get_total_flops())


def test_flash_attention_is_counted_too(dense):
    work = workload()
    flash, eager = (
        predict(resolve(str(dense)), workload(attn_implementation=name), None) for name in ("sdpa", "eager")
    )
    head = BASE["hidden_size"] // BASE["num_attention_heads"]
    product = 2 * work.batch_size * BASE["num_attention_heads"] * work.seq_len**2 * head
    assert flash.forward_flops == eager.forward_flops
    # Backward computes the scores once more: five products in place of four.
    assert flash.backward_flops - eager.backward_flops == BASE["num_hidden_layers"] * product


def test_an_8b_model_is_predicted_as_arithmetic_says():
    """bf16, sequence 2048, AdamW over one parameter after another, adapters in bf16. Full fine-tuning: weights,
    gradients and two states of 8.03 billion numbers, and two temporaries of the largest (the head, 1.96 GiB in all)."""
    found = estimate_memory("llama-8b", "8,64", adapter_dtype="bf16", foreach=False)
    full, small, large = found.full, *found.lora
    weights = 8_030_261_248 * 2 / GiB
    assert full.peak_MiB / 1024 == pytest.approx(4 * weights + 1.957, abs=0.01)
    assert full.trainable == 8_030_261_248
    assert small.trainable == 8 * 2_621_440
    assert [arm.flops_ratio for arm in found.lora] == pytest.approx([0.694, 0.712], abs=1e-3)
    assert small.backward_flops < 1.2 * small.forward_flops < full.backward_flops
    # One more rank adds its numbers three times (weights, states) and in activations Σ of S and dS.
    assert 0.0125 < (large.peak_MiB - small.peak_MiB) / 1024 / (large.rank - small.rank) < 0.0165
    assert found.workload["rank_of_share"]["10%"] == pytest.approx(8_030_261_248 / 9 / 2_621_440, rel=1e-3)


def test_layers_by_themselves_keep_what_was_known_of_peft_with_bf16_adapters():
    """29.3 GiB at r=8 and 30.1 at r=64, measured with PEFT's layers; with hooks on all modules each of ours runs by
    itself, as PEFT's do. As one op, the MLP keeps 3.5 GiB less."""
    work = workload(batch_size=1, seq_len=2048, dtype="bf16", adapter_dtype="bf16", device="cuda", foreach=False)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        apart = predict(resolve("llama-8b"), work, 8)
    finally:
        handle.remove()
    assert apart.peak / GiB == pytest.approx(29.3, abs=0.05)
    assert predict(resolve("llama-8b"), work, 8).peak / GiB == pytest.approx(29.3 - 3.5, abs=0.05)


def test_what_fits_is_the_largest_that_does(flat):
    memory = RESERVE_GiB + 10 / 1024
    ranks = "2,4,16"  # 4 from the two others
    found = estimate_memory(str(flat), ranks, batch_size=2, seq_len=64, dtype="fp32", device="cpu", memory_GiB=memory)
    for arm in found.arms[1::2]:
        assert arm.fits["fits"] == (arm.peak_MiB <= 10)
        work = {"seq_len": 64, "batch_size": 2, "adapter_dtype": "fp32"}
        for name, unit in (("batch_size", 1), ("seq_len", 64)):
            largest = arm.fits[f"largest_{name}"]
            assert largest % unit == 0 and largest > 0
            fits, beyond = (
                predict(resolve(str(flat)), workload(**{**work, name: value}), arm.rank).peak / 2**20
                for value in (largest, largest + unit)
            )
            assert fits <= 10 < beyond
    assert found.workload["largest_rank"] == found.workload["rank_limit"] == 64
    nothing = estimate_memory(str(flat), "4", dtype="fp32", device="cpu", memory_GiB=RESERVE_GiB + 1 / 1024)
    assert nothing.workload["largest_rank"] == 0
    assert [arm.fits for arm in nothing.arms] == [
        {"fits": False, "largest_batch_size": 0, "largest_seq_len": 0} for _ in nothing.arms
    ]


def test_shards_divide_what_fsdp_divides(dense):
    one, four = (estimate_memory(str(dense), "4", dtype="fp32", shards=shards) for shards in (1, 4))
    layer = sum(
        p.numel() for p in build(resolve(str(dense)), device="meta", dtype=torch.float32).model.layers[0].parameters()
    )
    for arm, sharded in zip(one.arms, four.arms):
        for category in ("weights", "adapters", "gradients", "optimizer"):
            assert sharded.by_category[category] <= arm.by_category[category] / 4 * 1.01 + 1e-3
        assert sharded.by_category["temporaries"] > 2 * layer * 4 / 2**20 or sharded.peak_phase == "optimizer"


def test_a_model_or_a_config_does_as_well_as_its_file(dense):
    model = build(resolve(str(dense)), device="cpu", dtype=torch.float32)
    peaks = [
        [arm.peak_MiB for arm in estimate_memory(given, "4", seq_len=64, dtype="fp32").arms]
        for given in (str(dense), model.config, model)
    ]
    assert peaks[0] == peaks[1] == peaks[2]


def test_crossovers_lie_where_the_ratios_pass_one(dense):
    found = estimate_memory(str(dense), "4,16,64,256", seq_len=64, dtype="fp32", device="cpu")
    for cost, ratios in (
        ("memory", [a.memory_ratio for a in found.lora]),
        ("flops", [a.flops_ratio for a in found.lora]),
    ):
        low, high = found.crossover[cost].bracket
        assert all(ratio < 1 for ratio, arm in zip(ratios, found.lora) if arm.rank <= low)
        assert all(ratio >= 1 for ratio, arm in zip(ratios, found.lora) if arm.rank >= high)
        rank = found.crossover[cost].rank
        exact = predict(resolve(str(dense)), workload(batch_size=1, adapter_dtype="fp32"), round(rank))
        full = predict(resolve(str(dense)), workload(batch_size=1), None)
        value = exact.peak / full.peak if cost == "memory" else exact.flops / full.flops
        assert value == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("text", "value"), [("24GB", 24), ("80 GiB", 80), ("24", 24), ("11.5g", 11.5)])
def test_memory_as_people_write_it(text, value):
    assert parse_gpu(text) == {"memory_GiB": value}


def test_the_command(flat, tmp_path, capsys):
    arguments = ["estimate", str(flat), "--ranks", "4,8", "--seq-len", "64", "--checkpointing"]
    assert main([*arguments, "--json", str(tmp_path / "told.json")]) == 0
    shown = capsys.readouterr().out
    assert "checkpointing" in shown and "Crossover in memory" in shown and "10% of all at r≈" in shown
    document = json.loads((tmp_path / "told.json").read_text())
    assert [arm["rank"] for arm in document["arms"]] == [4, 8, None]
    assert document["workload"]["method"] == "estimated"
    assert document["workload"]["gradient_checkpointing"] is True
    assert all(math.isfinite(arm["peak_MiB"]) and arm["fits"] is None for arm in document["arms"])
    assert main(["estimate", str(flat), "--ranks", "4", "--seq-len", "64", "--gpu", "1.01GB", "--json", "-"]) == 0
    assert all(arm["fits"]["largest_batch_size"] > 0 for arm in json.loads(capsys.readouterr().out)["arms"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "4,x"], "'x' is not a rank"),
        (["--gpu", "lots"], "gpu='lots'; expected the memory of one GPU, such as 24GB, or one of A100, "),
        (
            ["--gpu", "0.9GB"],
            "memory_GiB=0.9; expected more than the 1 GiB that the CUDA context and fragmentation take",
        ),
        (["--shards", "0"], "shards=0"),
        (["--device", "tpu"], "device='tpu'"),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--adapter-dtype", "int8"], "adapter_dtype='int8'"),
        (["--gradient-accumulation", "0"], "gradient_accumulation=0"),
        (["--target-modules", "q_porj"], "q_porj"),
    ],
)
def test_wrong_input_is_one_line(dense, capsys, arguments, message):
    assert main(["estimate", str(dense), "--seq-len", "64", *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err.splitlines()[-1] and said.out == ""


def test_a_length_that_was_not_given_is_what_the_model_allows(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["dense"] | {"max_position_embeddings": 48}))
    found = estimate_memory(str(tmp_path / "config.json"), "4")
    assert found.workload["seq_len"] == 48
    with pytest.raises(LoraFastError, match="seq_len=64 exceeds the model's max_position_embeddings=48"):
        estimate_memory(str(tmp_path / "config.json"), "4", seq_len=64)


def test_a_checkpoint_of_another_class_is_named(tmp_path):
    bert = {"model_type": "bert", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    bert |= {"num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 32, "is_decoder": True}
    for architecture, notes in (("BertForSequenceClassification", 1), ("BertLMHeadModel", 0)):
        (tmp_path / "config.json").write_text(json.dumps(bert | {"architectures": [architecture]}))
        found = estimate_memory(str(tmp_path / "config.json"), "4")
        said = [
            note for note in found.notes if note.startswith("read as BertLMHeadModel, and the checkpoint is of Bert")
        ]
        assert len(said) == notes and found.workload["seq_len"] == 32


def test_what_is_no_model_is_refused():
    with pytest.raises(LoraFastError, match="model is a int; expected a name"):
        estimate_memory(3)


def test_gpus_come_whole(dense):
    with pytest.raises(LoraFastError, match=r"shards=1\.5; expected a whole number of at least 1"):
        estimate_memory(str(dense), "4", seq_len=64, shards=1.5)


def test_a_table_is_in_the_unit_that_shows_something(dense):
    profile = estimate_memory(str(dense), "4", seq_len=64, dtype="fp32")
    largest = max(arm.peak_MiB for arm in profile.arms)
    assert largest < 1024
    for factor, unit, half_a_digit in ((1, "MiB", 0.51), (2000 / largest, "GiB", 5.2)):
        for arm in profile.arms:
            arm.peak_MiB *= factor
        peak = next(column for column in columns(profile) if column.header.startswith("peak"))
        assert peak.header == f"peak\n{unit}"
        shown = [float(peak.cell(arm)) * (1024 if unit == "GiB" else 1) for arm in profile.arms]
        assert shown == pytest.approx([arm.peak_MiB for arm in profile.arms], abs=half_a_digit)
