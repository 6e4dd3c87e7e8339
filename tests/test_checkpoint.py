"""Adapter folders: what is refused, what a crash leaves, and files for servers that read one rank and alpha."""

import copy
import json
import os
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import CAUSAL_LM, FAMILIES, assert_unchanged, build, peft_model, snapshot

from lora_fast import (
    LoraConfig,
    LoraFastError,
    LoraFastWarning,
    apply_lora,
    load_adapter,
    lora_parameters,
    remove_lora,
    resize_adapter,
    save_adapter,
    set_adapter,
)
from lora_fast.checkpoint import CONFIG_NAME, WEIGHTS_NAME, read_adapter

EPS = torch.finfo(torch.float32).eps
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def trained(model, **lora):
    """`model` with an adapter whose parts are all away from their start."""
    torch.manual_seed(5)
    apply_lora(model, LoraConfig(**({"r": 4, "lora_alpha": 6, "init_lora_weights": False} | lora)))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(**CAUSAL_LM).logits


def assert_close(ours, theirs):
    """Equal but for the roundings of two layers."""
    assert (ours - theirs).norm() <= 128 * EPS * theirs.norm()


@pytest.fixture
def saved(tmp_path):
    save_adapter(trained(build("llama")), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder, **changes):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def refused(folder, *said, model=None):
    """load_adapter refuses with a one-line sentence that holds all of `said`, and leaves the model as it was."""
    model = build("llama") if model is None else model
    before = snapshot(model)
    with pytest.raises(LoraFastError) as error:
        load_adapter(model, folder)
    text = str(error.value)
    assert "\n" not in text
    for part in said:
        assert part in text
    assert_unchanged(model, before)


def test_a_missing_folder_or_file(tmp_path, saved):
    refused(tmp_path / "nothing", "nothing", "not a folder")
    (saved / WEIGHTS_NAME).unlink()
    refused(saved, WEIGHTS_NAME)
    (saved / "adapter_model.bin").write_bytes(b"")
    refused(saved, "pickle")
    (saved / CONFIG_NAME).unlink()
    refused(saved, CONFIG_NAME)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file(saved, kept):
    path = saved / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:kept])
    refused(saved, WEIGHTS_NAME, "can't be read")


def test_a_config_that_is_not_json(saved):
    (saved / CONFIG_NAME).write_text('{"r": 4')
    refused(saved, CONFIG_NAME, "not JSON")
    (saved / CONFIG_NAME).write_text("[" * 100_000)
    refused(saved, CONFIG_NAME, "not JSON")
    (saved / CONFIG_NAME).write_text("[]")
    refused(saved, "expected a JSON object")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf(saved, value):
    edit_tensors(saved, lambda tensors: tensors[FIRST].view(-1)[7:8].fill_(value))
    refused(saved, FIRST, "NaN or inf")


def test_numbers_of_no_use(saved):
    edit_tensors(saved, lambda tensors: tensors.update({FIRST: tensors[FIRST].to(torch.complex64)}))
    refused(saved, FIRST.removeprefix("base_model.model."), "torch.complex64")


def test_numbers_of_8_bits(saved):
    edit_tensors(saved, lambda tensors: tensors.update({FIRST: tensors[FIRST].to(torch.float8_e4m3fn)}))
    model = load_adapter(build("llama"), saved)
    stored = load_file(saved / WEIGHTS_NAME)[FIRST]
    assert torch.equal(model.model.layers[0].self_attn.q_proj.lora_A["default"].weight, stored.float())


def test_a_folder_that_can_not_be_made(saved):
    with pytest.raises(LoraFastError, match=r"adapter_config.json/below/it can't be made"):
        save_adapter(load_adapter(build("llama"), saved), saved / CONFIG_NAME / "below" / "it")


def test_wrong_shapes(saved):
    edit_tensors(saved, lambda tensors: tensors.update({FIRST: tensors[FIRST][:3].clone()}))
    refused(saved, "layers.0.self_attn.q_proj.lora_A.weight", "(3, 32)", "(4, 32)")


def test_another_models_adapter(saved):
    refused(saved, "target_modules", model=build("gpt2"))
    refused(saved, "(32, 4)", "(16, 4)", model=build("llama", hidden_size=16, head_dim=8))


def test_missing_and_left_over_tensors(saved):
    edit_tensors(saved, lambda tensors: tensors.update({"base_model.model.extra.weight": torch.ones(2)}))
    refused(saved, "extra.weight", "no place")
    edit_tensors(saved, lambda tensors: [tensors.pop(FIRST), tensors.pop("base_model.model.extra.weight")])
    refused(saved, "lacks model.layers.0.self_attn.q_proj.lora_A.weight")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("lora_bias", True),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 1]]),
        ("alora_invocation_tokens", [5]),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("a_field_of_tomorrow", 0.5),
        ("r", 0),
        ("r", "8"),
        ("r", None),
        ("lora_alpha", None),
    ],
)
def test_fields_that_would_change_the_result(saved, field, value):
    edit_config(saved, **{field: value})
    refused(saved, field)


def test_fields_that_change_nothing(saved):
    edit_config(
        saved, peft_version="9.9", a_field_of_tomorrow=None, another=[], use_dora=False, megatron_core="megatron.core"
    )
    load_adapter(build("llama"), saved)


def test_missing_trained_biases(tmp_path):
    save_adapter(trained(build("llama", attention_bias=True), bias="lora_only"), tmp_path / "adapter")
    edit_tensors(tmp_path / "adapter", lambda t: [t.pop(k) for k in list(t) if k.endswith("q_proj.base_layer.bias")])
    refused(tmp_path / "adapter", "lacks", "q_proj.base_layer.bias", model=build("llama", attention_bias=True))


def test_a_second_adapters_biases_are_its_own(tmp_path):
    model = trained(build("llama", attention_bias=True), target_modules=["q_proj"])
    apply_lora(model, LoraConfig(target_modules=["v_proj"], bias="lora_only"), adapter_name="second")
    biases = {n for n, p in model.named_parameters() if n.endswith(".bias") and p.requires_grad}
    assert biases == {n for n, _ in model.named_parameters() if n.endswith("v_proj.bias")}
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(build("llama", attention_bias=True), tmp_path / "adapter", trainable=False)
    assert not any(p.requires_grad for p in loaded.parameters())
    set_adapter(model, "default")
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith(".bias"))


@pytest.mark.parametrize("wrong", [{"adapter_dtype": torch.int8}, {"adapter_dtype": "float32"}, {"trainable": "no"}])
def test_wrong_arguments_of_load_adapter(saved, wrong):
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(LoraFastError, match=next(iter(wrong))):
        load_adapter(model, saved, **wrong)
    assert_unchanged(model, before)


@pytest.mark.parametrize("config", [peft.LoraConfig(), {"r": 8}, LoraConfig])
def test_a_config_of_another_kind(config):
    with pytest.raises(LoraFastError, match=r"expected a lora_fast\.LoraConfig"):
        apply_lora(build("llama"), config)
    apply_lora(build("llama"), LoraConfig.from_peft(peft.LoraConfig(target_modules=["q_proj"]).to_dict()))


def test_a_wrapped_model():
    with pytest.raises(LoraFastError, match=r"model\.module"):
        apply_lora(torch.nn.DataParallel(build("llama")), LoraConfig())


def test_an_adapter_name_twice(saved):
    model = load_adapter(build("llama"), saved)
    with pytest.raises(LoraFastError, match="'default' is there already"):
        load_adapter(model, saved)
    load_adapter(model, saved, adapter_name="second", trainable=False)
    assert not any(p.requires_grad for p in lora_parameters(model))
    set_adapter(model, "default")
    assert all(p.requires_grad for p in lora_parameters(model))


def test_a_folder_with_something_else_stays_as_it_is(tmp_path):
    model = trained(build("llama"))
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "thesis.tex").write_text("years of work")
    with pytest.raises(LoraFastError, match=r"thesis holds something else \(thesis.tex\)"):
        save_adapter(model, thesis)
    assert [path.name for path in thesis.iterdir()] == ["thesis.tex"]
    with pytest.raises(LoraFastError, match="is a file"):
        save_adapter(model, thesis / "thesis.tex")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis"]


def test_saving_replaces_an_adapter_and_keeps_its_readme(tmp_path):
    folder = tmp_path / "new" / "adapter"
    model = trained(build("llama"))
    save_adapter(model, folder)
    (folder / "README.md").write_text("notes")
    remove_lora(model)
    expected = logits(trained(model, r=7, target_modules=["q_proj"]))
    save_adapter(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG_NAME, WEIGHTS_NAME]
    assert (folder / "README.md").read_text() == "notes"
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    assert torch.equal(logits(load_adapter(build("llama"), folder)), expected)


def test_the_current_folder_stays_the_current_folder(tmp_path, monkeypatch):
    """Swapped by its name, a folder in which a shell sits would be gone from under it."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    monkeypatch.chdir(folder)
    inode = folder.stat().st_ino
    model = trained(build("llama"))
    for adapter in ({}, {"r": 7, "target_modules": ["q_proj"]}):
        if adapter:
            (folder / "README.md").write_text("notes")
            remove_lora(model)
            trained(model, **adapter)
        save_adapter(model, ".")
        assert folder.stat().st_ino == inode == os.stat(".").st_ino
        assert {CONFIG_NAME, WEIGHTS_NAME} <= set(os.listdir("."))
        assert torch.equal(logits(load_adapter(build("llama"), ".")), logits(model))
    assert (folder / "README.md").read_text() == "notes" and len(os.listdir(".")) == 3
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("moves", [0, 1])
def test_a_save_killed_in_the_current_folder_leaves_nothing_that_loads(tmp_path, monkeypatch, moves):
    monkeypatch.chdir(tmp_path)
    model = trained(build("llama"))
    save_adapter(model, ".")
    done, move = [], os.replace

    def die(source, target):
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(target)
        move(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(model, ".")
    refused(tmp_path, f"holds no {CONFIG_NAME}")
    monkeypatch.setattr(os, "replace", move)
    save_adapter(model, ".")
    load_adapter(build("llama"), ".")


def test_another_process_may_save_the_same_at_the_same_time(tmp_path, monkeypatch):
    model, out = trained(build("llama")), tmp_path / "out"

    rename = Path.rename

    def meanwhile(self, target):
        if not out.exists():
            out.mkdir()
            (out / CONFIG_NAME).write_text("{}")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", meanwhile)
    save_adapter(model, out)
    monkeypatch.undo()
    assert_close(logits(load_adapter(build("llama"), out)), logits(model))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o2775])
def test_a_replaced_folder_keeps_its_permissions(saved, mode):
    saved.chmod(mode)
    save_adapter(trained(build("llama")), saved)
    assert stat.S_IMODE(saved.stat().st_mode) == mode


_SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from lora_fast import LoraConfig
from lora_fast.checkpoint import write_adapter
folder = Path(sys.argv[1])
while True:
    for r in (3, 5):
        tensors = {f"{i}.lora_A.weight": torch.full((r, 40), float(r)) for i in range(30)}
        write_adapter(folder, LoraConfig(r=r, target_modules=["0"]), tensors)
        print("saved", flush=True)
"""


@pytest.mark.parametrize("pause_s", [0.0, 0.003, 0.011])
def test_a_killed_save_leaves_a_whole_adapter(tmp_path, pause_s):
    folder = tmp_path / "adapter"
    with subprocess.Popen(
        [sys.executable, "-c", _SAVE_FOREVER, folder], stdout=subprocess.PIPE, cwd=tmp_path, text=True
    ) as process:
        for _ in range(4):
            assert process.stdout.readline() == "saved\n"
        time.sleep(pause_s)  # into the midst of some save
        process.send_signal(signal.SIGKILL)
    config, tensors = read_adapter(folder)
    assert config.r in (3, 5)
    assert len(tensors) == 30
    assert all(torch.equal(value, torch.full((config.r, 40), float(config.r))) for value in tensors.values())


def test_overlapping_patterns_survive_the_file(tmp_path):
    """The first match wins, and PEFT reads patterns sorted by key: "q_proj" would go behind "layers.0.…" and change."""
    model = trained(
        build("llama"), rank_pattern={"q_proj": 3, "layers.0.self_attn.q_proj": 9}, alpha_pattern={"v_proj": 2}
    )
    save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "adapter")
    assert_close(logits(theirs), logits(model))
    assert torch.equal(logits(load_adapter(build("llama"), tmp_path / "adapter")), logits(model))
    ranks = {len(v) for k, v in read_adapter(tmp_path / "adapter")[1].items() if k.endswith("q_proj.lora_A.weight")}
    assert ranks == {3}


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True, "rank_pattern": {"q_proj": 3, "down_proj": 7}, "alpha_pattern": {"v_proj": 2}},
        {"target_modules": r".*\.1\.mlp\.(up|gate)_proj"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
    ],
    ids=["rslora and patterns", "regex", "pissa", "olora"],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_portable_needs_one_rank_and_alpha_alone(tmp_path, lora, family):
    if family == "gpt2" and "target_modules" in lora:
        lora = {"target_modules": r".*\.1\.mlp\.c_.*"}
    model = trained(build(family), **lora)
    save_adapter(model, tmp_path / "adapter", portable=True)
    config = json.loads((tmp_path / "adapter" / CONFIG_NAME).read_text())
    assert config["lora_alpha"] == config["r"] and isinstance(config["target_modules"], list)
    assert not config["use_rslora"] and not config["rank_pattern"] and not config["alpha_pattern"]
    tensors = read_adapter(tmp_path / "adapter")[1]
    assert {v.shape[0] for k, v in tensors.items() if "lora_A" in k} == {config["r"]}
    # What such a server computes: the base as it was downloaded, plus B A at scaling 1.
    served = build(family)
    with torch.no_grad():
        for key in [k for k in tensors if k.endswith("lora_A.weight")]:
            weight = served.get_parameter(key.replace("lora_A.weight", "weight"))
            delta = tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
            weight += delta if family == "llama" else delta.T
    expected = logits(model)
    assert (expected - logits(build(family))).norm() > 1e-2 * expected.norm()
    assert (logits(served) - expected).norm() <= 512 * EPS * expected.norm()
    assert_close(logits(peft.PeftModel.from_pretrained(build(family), tmp_path / "adapter")), logits(served))


@pytest.mark.parametrize("lora", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}], ids=["modules_to_save", "bias"])
def test_portable_refuses_what_such_servers_do_not_read(tmp_path, lora):
    model = trained(build("llama", attention_bias=True), **lora)
    with pytest.raises(LoraFastError, match=next(iter(lora))):
        save_adapter(model, tmp_path / "adapter", portable=True)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"bias": "all"},
        {"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"target_modules": ["lm_head", "q_proj"]},
    ],
    ids=lambda lora: next(iter(lora)),
)
def test_everything_that_is_trained_goes_through_pefts_files(tmp_path, lora):
    model = trained(build("llama", attention_bias=True), **lora)
    expected = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_adapter(model, tmp_path / "ours")
        theirs = peft.PeftModel.from_pretrained(build("llama", attention_bias=True), tmp_path / "ours")
        theirs.save_pretrained(tmp_path / "theirs")
    assert_close(logits(theirs), expected)
    for folder in ("ours", "theirs"):
        loaded = load_adapter(build("llama", attention_bias=True), tmp_path / folder)
        assert_close(logits(loaded), expected)
        remove_lora(loaded)
        for name, value in build("llama", attention_bias=True).state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name


def test_pefts_half_precision_adapter_becomes_an_fp32_master(tmp_path):
    theirs = peft_model(build("llama"), r=4, target_modules="all-linear", init_lora_weights=False).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    model = load_adapter(copy.deepcopy(build("llama")), tmp_path)
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
    stored = load_file(tmp_path / WEIGHTS_NAME)
    assert stored[FIRST].dtype == torch.bfloat16
    assert torch.equal(model.model.layers[0].self_attn.q_proj.lora_A["default"].weight, stored[FIRST].float())


@pytest.mark.parametrize(("family", "head"), [("bert", "classifier"), ("roberta", "classifier"), ("opt", "fc1")])
def test_all_biases_beside_modules_to_save_go_through_pefts_files(tmp_path, family, head):
    lora = {"target_modules": ["query" if head == "classifier" else "q_proj"], "modules_to_save": [head], "bias": "all"}
    theirs = peft_model(build(family), r=4, init_lora_weights=False, **lora)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in (p for p in theirs.parameters() if p.requires_grad):
            parameter += 0.05 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    assert any("original_module" in key for key in load_file(tmp_path / WEIGHTS_NAME))  # what PEFT alone writes twice
    loaded = load_adapter(build(family), tmp_path)
    inputs = FAMILIES[family].inputs
    with torch.no_grad():
        assert_close(loaded.eval()(**inputs).logits, theirs.eval()(**inputs).logits)


def test_a_model_without_token_embeddings(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (4,), "num_feat_extract_layers": 1}
    base = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**sizes)).eval()
    with pytest.raises(NotImplementedError):
        base.get_input_embeddings()
    model, sound = trained(copy.deepcopy(base)).eval(), torch.randn(2, 100)
    save_adapter(model, tmp_path / "ours")
    loaded = load_adapter(base, tmp_path / "ours")
    with torch.no_grad():
        assert_close(loaded(sound).last_hidden_state, model(sound).last_hidden_state)


def test_layers_that_peft_takes_for_experts_are_announced(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 61, "q_lora_rank": 10, "kv_lora_rank": 8, "v_head_dim": 8, "pad_token_id": 2}
    sizes |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "first_k_dense_replace": 1, "n_routed_experts": 4}
    sizes |= {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    torch.manual_seed(0)
    base = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes))
    with pytest.warns(LoraFastWarning, match=r"experts in model\.layers\.1\.mlp\.experts \(1 modules so\) are stacked"):
        model = trained(copy.deepcopy(base), target_modules="all-linear")
    # Three of the dense block, three of the shared experts.
    with pytest.warns(LoraFastWarning, match=r"PEFT takes the names of model\.layers\.0\.mlp\.\w+ \(6 modules so\)"):
        save_adapter(model, tmp_path / "all")
    expected = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoraFastWarning)
        assert_close(logits(load_adapter(copy.deepcopy(base), tmp_path / "all")), expected)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "all")
    assert not any(".mlp.shared_experts." in n and "lora_" in n for n, _ in theirs.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoraFastWarning)
        model = trained(copy.deepcopy(base), target_modules=["q_b_proj", "o_proj"])
        save_adapter(model, tmp_path / "attention")
    assert_close(logits(peft.PeftModel.from_pretrained(base, tmp_path / "attention")), logits(model))


def test_pefts_own_way_to_the_class_of_the_model_is_kept(tmp_path):
    """Without a task_type PEFT's AutoPeftModel… asks the file for the class, which PEFT wrote into it."""
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    theirs = peft_model(copy.deepcopy(base), target_modules=["q_proj"])
    theirs.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = json.loads((tmp_path / "theirs" / CONFIG_NAME).read_text())["auto_mapping"]
    assert wanted["base_model_class"] == "LlamaForCausalLM"
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    save_adapter(apply_lora(ours, LoraConfig(target_modules=["q_proj"])), tmp_path / "ours")
    resize_adapter(tmp_path / "theirs", tmp_path / "smaller", rank=2)
    loaded = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    save_adapter(loaded, tmp_path / "again")
    for name in ("ours", "smaller", "again"):
        assert json.loads((tmp_path / name / CONFIG_NAME).read_text())["auto_mapping"] == wanted
        found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / name)
        assert type(found.get_base_model()) is transformers.LlamaForCausalLM
    # With a task_type PEFT writes none, and neither do we.
    named = apply_lora(build("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    save_adapter(named, tmp_path / "named")
    assert json.loads((tmp_path / "named" / CONFIG_NAME).read_text())["auto_mapping"] is None
