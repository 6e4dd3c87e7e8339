"""The MODEL argument: every kind of it, and a sentence with a remedy for everything that is none."""

import json

import pytest
import torch
from torch import nn

from lora_fast import LoraFastError, apply_lora
from lora_fast.profiler import models
from lora_fast.profiler.workload import Workload, parse_modules

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def folder(tmp_path):
    """A model's folder as save_pretrained leaves it."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    model = models.build(models.resolve(str(tmp_path / "config.json")), device="cpu", dtype=torch.float32, seed=5)
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    return saved, model


def test_a_folder_is_loaded_with_its_weights(folder):
    saved, model = folder
    source = models.resolve(str(saved))
    assert (source.kind, source.name, source.weights) == ("folder", "saved", "loaded")
    loaded = models.build(source, device="cpu", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert loaded.training and loaded.config.use_cache is False
    halved = models.build(source, device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in halved.parameters()} == {torch.bfloat16}
    assert models.build(source, device="meta", dtype=torch.float32).lm_head.weight.device.type == "meta"


def test_a_config_is_built_with_random_weights_from_the_seed(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    source = models.resolve(str(path))
    assert (source.kind, source.name, source.weights) == ("config", tmp_path.name, "random")
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    first, same, other = (models.build(source, device="cpu", dtype=torch.float32, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)  # the caller's random numbers were left alone
    weights = [model.lm_head.weight for model in (first, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_module_travels_whole(folder, tmp_path):
    _, model = folder
    model.eval()
    source = models.save_module(model, tmp_path / "model.pt")
    copy = models.build(source, device="cpu", dtype=torch.float32)
    assert source.name == "LlamaForCausalLM" and copy.training and not model.training
    assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "MODEL is empty"),
        ("./nowhere", "no such file"),
        ("/no/such/folder", "no such file"),
        ("missing/config.json", "no such file"),
        ("llama-6m", "llama-5m, llama-25m, llama-1b, llama-3b, llama-8b, llama-70b; did you mean llama-5m"),
        ("nobody/nothing", "cannot be reached"),
        ("not a model!", "built-in shapes are llama-5m"),
    ],
)
def test_a_name_that_means_nothing(name, says):
    with pytest.raises(LoraFastError, match=says):
        models.resolve(name)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "no field model_type"),
        ("{}", "no field model_type"),
        ('{"model_type": "lama"}', "unknown model type 'lama'.*near names: .*llama"),
        ('{"model_type": ["llama"]}', "unknown model type"),
        ('{"model_type": "vit"}', "no causal language model"),
        (json.dumps({**CONFIG, "hidden_size": "wide"}), "refuses these fields|cannot make this model"),
        (json.dumps({**CONFIG, "num_attention_heads": 5}), "refuses these fields|cannot make this model"),
    ],
)
def test_a_config_that_is_none(tmp_path, content, says):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(LoraFastError, match=says):
        models.build(models.resolve(str(path)), device="cpu", dtype=torch.float32)


def test_weights_that_are_missing_or_damaged(folder):
    saved, _ = folder
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LoraFastError, match="damaged"):
        models.build(models.resolve(str(saved)), device="cpu", dtype=torch.float32)
    weights.unlink()
    with pytest.raises(LoraFastError, match=r"holds no weights.*random ones: lora-fast profile .*config\.json"):
        models.resolve(str(saved))
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    (saved / "model-1-of-2.safetensors").write_bytes(whole)
    with pytest.raises(LoraFastError, match="1 of 2 weight files are missing"):
        models.resolve(str(saved))
    (saved / "model.safetensors.index.json").unlink()
    (saved / "pytorch_model.bin.index.json").write_text(json.dumps(index))  # another format's, not downloaded
    assert models.resolve(str(saved)).kind == "folder"
    (saved / "model.safetensors.index.json").write_text("{")
    with pytest.raises(LoraFastError, match="cannot be read"):
        models.resolve(str(saved))


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(LoraFastError, match=r"no config\.json"):
        models.resolve(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(LoraFastError, match="adapter's folder"):
        models.resolve(str(tmp_path))
    with pytest.raises(LoraFastError, match=r"no config\.json; give"):
        (tmp_path / "notes.txt").write_text("")
        models.resolve(str(tmp_path / "notes.txt"))


def test_modules_that_cannot_be_measured(folder):
    _, model = folder
    with pytest.raises(LoraFastError, match="vocab_size"):
        models.check_module(nn.Linear(2, 2))
    with pytest.raises(LoraFastError, match="meta device"):
        models.check_module(model.to("meta"))


def test_a_model_with_adapters_is_refused(folder):
    _, model = folder
    models.check_module(model)
    apply_lora(model, WORK.lora_config(2))
    with pytest.raises(LoraFastError, match="carries adapters already"):
        models.check_module(model)


WORK = Workload(batch_size=2, seq_len=64, dtype="fp32", target_modules="all-linear", device="cpu", seed=0)


def test_a_batch_is_fixed_and_as_long_as_the_model_allows(folder):
    _, model = folder
    batch = WORK.batch(model)
    assert batch["input_ids"].shape == (2, 64) and batch["input_ids"].max() < 64
    assert torch.equal(batch["input_ids"], WORK.batch(model)["input_ids"])
    longer = Workload(**{**vars(WORK), "seq_len": 65})
    with pytest.raises(LoraFastError, match="max_position_embeddings=64"):
        longer.batch(model)


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"batch_size": True}, {"seq_len": 1}, {"seq_len": 2.0}, {"dtype": "int8"}]
)
def test_sizes_that_make_no_batch(wrong):
    with pytest.raises(LoraFastError, match=next(iter(wrong))):
        Workload(**{**vars(WORK), **wrong})


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("all-linear", "all-linear"),
        (" All-Linear", "all-linear"),
        ("q_proj", ("q_proj",)),
        ("q_proj,v_proj", ("q_proj", "v_proj")),
        (" q_proj, mlp.up_proj ,v_proj ", ("q_proj", "mlp.up_proj", "v_proj")),
        (["q_proj"], ("q_proj",)),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
    ],
)
def test_modules_are_names_or_an_expression(value, meant):
    assert parse_modules(value) == meant


@pytest.mark.parametrize("value", [5, None, [5], [], "(q_proj"])
@pytest.mark.parametrize("argument", ["target_modules", "exclude_modules"])
def test_what_names_no_modules_is_refused(value, argument):
    with pytest.raises(LoraFastError, match=f"{argument}=.*expression|{argument}=.*regex"):
        parse_modules(value, argument)
