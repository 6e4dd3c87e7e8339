"""Base weights in 4 bits under adapters: predicted as they are tracked, timed beside full fine-tuning as it was."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from lora_fast import LoraFastError
from lora_fast.cli import main
from lora_fast.profiler import estimate_memory, profile_ranks, timing
from lora_fast.profiler.advice import advise
from lora_fast.profiler.html import different_work
from lora_fast.profiler.memory import CATEGORIES, measure_arm
from lora_fast.profiler.models import build, resolve
from lora_fast.profiler.predict import predict
from lora_fast.profiler.quantization import quantize, states_of
from lora_fast.profiler.table import title
from lora_fast.profiler.timing import time_arms
from lora_fast.profiler.workload import FULL, LORA, PEFT, Workload

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::lora_fast.LoraFastWarning")
MiB = 2**20
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}


@pytest.fixture
def config(tmp_path):
    def write(model_type="llama", **changes):
        path = tmp_path / f"{model_type}.json"
        path.write_text(json.dumps({"model_type": model_type, **CONFIG, **changes}))
        return path

    return write


def workload(**changes):
    fields = {"batch_size": 2, "seq_len": 64, "dtype": "fp32", "target_modules": "all-linear", "device": "cpu"}
    return Workload(**{**fields, "seed": 0, "quantize": "nf4", **changes})


@pytest.mark.parametrize(("kind", "dtype"), [("nf4", "bf16"), ("fp4", "fp32")])
def test_packed_weights_take_what_arithmetic_says(config, kind, dtype):
    """Half a byte a weight, a byte for 64 of them, four for 256 of those, and in each layer tables of 16 and 256
    numbers and their offset."""
    source, work = resolve(str(config())), workload(dtype=dtype, quantize=kind)
    model = build(source, device="meta", dtype=work.torch_dtype)
    packed = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert len(packed) == 35
    others = sum(t.numel() * t.itemsize for t in (*model.parameters(), *model.buffers()))
    others -= sum(weight.numel() * weight.itemsize for weight in packed)
    blocks = [weight.numel() // 64 for weight in packed]
    states = sum(n + 4 * (-(-n // 256) + 16 + 256 + 1) for n in blocks)
    expected = others + sum(weight.numel() // 2 for weight in packed) + states
    found = predict(source, work, 4)
    assert found.by_category["weights"] == expected
    assert (
        found.by_category["weights"]
        < 0.6 * predict(source, workload(dtype=dtype, quantize=None), 4).by_category["weights"]
    )


@pytest.mark.parametrize(
    ("model_type", "kind", "changes"),
    [
        ("llama", LORA, {}),
        ("llama", LORA, {"gradient_checkpointing": True}),
        ("llama", PEFT, {"dtype": "bf16", "lora_dropout": 0.1}),
        ("qwen2", LORA, {"dtype": "bf16", "lora_dropout": 0.1}),
        ("qwen2", PEFT, {"gradient_checkpointing": True}),
        ("gpt2", LORA, {"dtype": "bf16"}),  # of Conv1D
    ],
)
def test_what_is_predicted_is_what_the_tracker_sees(config, model_type, kind, changes):
    source, work = resolve(str(config(model_type, **(GPT2 if model_type == "gpt2" else {})))), workload(**changes)
    found, real = predict(source, work, 8, peft=kind == PEFT), measure_arm(source, work, kind, 8)
    assert found.peak / MiB == pytest.approx(real["peak_MiB"], rel=5e-3)
    assert found.peak_phase == real["peak_phase"]
    for category in CATEGORIES:
        near = pytest.approx(real["by_category_MiB"][category], abs=5e-3 * real["peak_MiB"])
        assert found.by_category[category] / MiB == near, category


def test_full_fine_tuning_and_the_counts_are_those_of_the_weights_as_they_were(config):
    source = resolve(str(config()))
    packed, plain = (
        [predict(source, workload(quantize=kind), rank, whole=True) for rank in (8, None)] for kind in ("nf4", None)
    )
    dense = sum(p.numel() for p in build(source, device="meta", dtype=torch.float32).parameters())
    assert packed[1].phases == plain[1].phases
    for one, other in zip(packed, plain):
        assert (one.parameters, one.trainable) == (other.parameters, other.trainable)
        assert one.parameters == dense + (one.trainable if one is packed[0] else 0)
        assert (one.forward_flops, one.backward_flops) == (other.forward_flops, other.backward_flops)
    assert predict(source, workload(), 8).phases == packed[0].phases  # from two depths
    # Nothing of a weight that was unpacked for an op stays.
    assert packed[0].phases["forward"]["activations"] == plain[0].phases["forward"]["activations"]


def test_an_8b_model_in_4_bits_takes_what_readme_says():
    work = workload(batch_size=1, seq_len=2048, dtype="bf16", device="cuda", foreach=False)
    ours, theirs = (predict(resolve("llama-8b"), work, 8, peft=peft).peak / 2**30 for peft in (False, True))
    readme = " ".join((Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8").split())
    assert f"a peak of {ours:.1f} GiB, and through PEFT's own layers {theirs:.1f} GiB" in readme


@pytest.mark.parametrize(("model_type", "changes"), [("llama", {"attention_bias": True}), ("gpt2", GPT2)])
def test_a_model_is_packed_as_transformers_packs_it(config, tmp_path, model_type, changes):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = build(resolve(str(config(model_type, **changes))), device="cpu", dtype=torch.float32)
    plain.save_pretrained(tmp_path / "plain")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
    ).train()  # for an evaluation some CPUs pack weights anew, and not of every size
    ours = quantize(plain, "nf4", "cpu").train()
    kinds = [{name: type(m) for name, m in model.named_modules()} for model in (ours, theirs)]
    assert kinds[0] == kinds[1]
    for (name, parameter), (other, expected) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other and torch.equal(parameter, expected), name
    for state, expected in zip(states_of(ours), states_of(theirs), strict=True):
        assert torch.equal(state, expected)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


@pytest.mark.parametrize("arms", [["r2", "r4", "peft r4", FULL, "full again"], ["r2", "r4", "r2 again"]])
def test_ranks_are_timed_on_packed_weights_and_full_fine_tuning_on_its_own(config, monkeypatch, arms):
    seen, step = set(), timing._cpu_step

    def note(arm, batch):
        packed = any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in arm.model.modules())
        result = step(arm, batch)
        seen.add((arm.base is not None, packed))
        return result

    monkeypatch.setattr(timing, "_cpu_step", note)
    result = time_arms(resolve(str(config(num_hidden_layers=1))), workload(seq_len=8), arms, 6)
    assert all(len(result["arms"][name]["step_ms"]) == 6 for name in arms)
    assert seen == ({(True, False), (False, True)} if FULL in arms else {(False, True)})


def test_a_profile_says_what_was_packed(config, tmp_path):
    found = profile_ranks(
        str(config(num_hidden_layers=2)),
        "4",
        quantize="nf4",
        seq_len=32,
        batch_size=2,
        steps=6,
        device="cpu",
        out=tmp_path / "run",
    )
    assert "fp32 (nf4 under adapters), batch" in title(found)
    assert found.workload["quantize"] == "nf4"
    assert any("the linear layers but the head, " in note and "are in nf4" in note for note in found.notes)
    arm, full = found.arms
    assert arm.peak_MiB == pytest.approx(arm.predicted_MiB, rel=5e-3)
    assert full.peak_MiB == pytest.approx(full.predicted_MiB, rel=1e-3)
    arm.ratio_to_full, arm.ratio_ci = 2.0, (1.9, 2.1)
    said = [text for text in advise(found) if "unpacked for every product" in text]
    assert len(said) == 1 and said[0].startswith("r4 takes 2.00 of full's time")
    assert not any("adds two products" in text for text in advise(found))
    other = estimate_memory(str(config(num_hidden_layers=2)), "4", dtype="fp32", seq_len=32, batch_size=2, device="cpu")
    assert different_work([found, other]) == {"quantize": ["nf4", None]}


def test_the_command(config, capsys):
    arguments = ["estimate", str(config()), "--ranks", "4", "--seq-len", "64", "--quantize", "nf4"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "bf16 (nf4 under adapters), adapters in fp32" in shown and "QLoRA, arXiv:2305.14314" in " ".join(
        shown.split()
    )
    assert main([*arguments, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["workload"]["quantize"] == "nf4"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["estimate", "MODEL", "--quantize", "int3"], "quantize='int3'; expected one of nf4, fp4"),
        (["estimate", "MODEL", "--quantize", "nf4", "--shards", "2"], "leave out shards or quantize"),
        (["profile", "MODEL", "--quantize", "nf4", "--layers"], "leave out one of the two"),
    ],
)
def test_wrong_input_is_one_line(config, capsys, arguments, says):
    assert main([str(config()) if argument == "MODEL" else argument for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and says in err


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(LoraFastError, match=r"quantize packs nn.Linear and Conv1D, of which LayerNorm has none"):
        quantize(torch.nn.LayerNorm(4), "nf4", "cpu")


def test_says_that_bitsandbytes_is_missing(config, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "lora_fast.profiler.quantization.find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(LoraFastError, match=r"needs bitsandbytes, .*pip install bitsandbytes"):
        workload()
