"""apply_lora, training, removing: as PEFT does it where PEFT does, and no bit changed but those asked for."""

import copy
import io
import pickle
import warnings

import peft
import pytest
import torch
import transformers
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from safetensors.torch import load_file
from support import (
    CAUSAL_LM,
    FAMILIES,
    adapted,
    assert_unchanged,
    build,
    injected,
    logits,
    pair,
    peft_model,
    snapshot,
    trainable,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lora_fast
from lora_fast import (
    LoraConfig,
    LoraFastError,
    adapter_spectra,
    apply_lora,
    disable_adapters,
    fusion_report,
    load_adapter,
    lora_parameters,
    merge_lora,
    remove_lora,
    save_adapter,
    set_adapter,
    unmerge_lora,
)
from lora_fast.linear import LoraLayer, LoraLinear

EPS = torch.finfo(torch.float32).eps
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def gradients(model, inputs=CAUSAL_LM, seed=1):
    model.zero_grad()
    torch.manual_seed(seed)
    model.train()(**inputs).loss.backward()
    result = {name: p.grad.clone() for name, p in trainable(model).items()}
    assert all(gradient.abs().max() > 0 for gradient in result.values())
    return result


def assert_same_start(ours, theirs):
    assert adapted(ours) == adapted(theirs) != set()
    mine, yours = trainable(ours), trainable(theirs)
    assert mine.keys() == yours.keys()
    for name, parameter in mine.items():
        assert torch.equal(parameter, yours[name]), name


# ------------------------------------------------------------------------------------- which modules: PEFT's own choice

CHOICES = {
    "names": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "set of names": ("llama", {"target_modules": {"q_proj", "down_proj"}}),
    "dotted ends": ("llama", {"target_modules": ["self_attn.q_proj", "layers.1.mlp.up_proj"]}),
    "whole name": ("llama", {"target_modules": ["model.layers.0.mlp.gate_proj"]}),
    "regex": ("llama", {"target_modules": r".*layers\.1\..*(q|down)_proj"}),
    "regex of the whole name": ("llama", {"target_modules": r"model\.layers\.\d\.self_attn\.(k|v)_proj|lm_head"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "ALL-Linear": ("opt", {"target_modules": "ALL-Linear"}),
    "all-linear with Conv1D": ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "all-linear without a head": ("vit", {"target_modules": "all-linear"}),
    "all-linear beside a classifier": ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "all-linear of two stacks": ("t5", {"target_modules": "all-linear"}),
    "the head by name": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "exclude names": (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": ["up_proj", "layers.0.self_attn.q_proj"]},
    ),
    "exclude regex": ("llama", {"target_modules": ATTENTION, "exclude_modules": r".*\.layers\.0\..*"}),
    "one layer": ("llama", {"target_modules": ATTENTION, "layers_to_transform": 1}),
    "layer 0": ("llama", {"target_modules": ATTENTION, "layers_to_transform": 0}),
    "no chosen layers": ("llama", {"target_modules": ATTENTION, "layers_to_transform": []}),
    "layers with a pattern": (
        "t5",
        {"target_modules": ["q", "wi"], "layers_to_transform": [1], "layers_pattern": ["h", "block"]},
    ),
    "nested indices": ("t5", {"target_modules": ["q", "v"], "layers_to_transform": [0]}),
    "a whole name stands whatever the layers": (
        "llama",
        {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [1]},
    ),
    "layer pattern of GPT-2": (
        "gpt2",
        {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h", "fan_in_fan_out": True},
    ),
    "modules_to_save are not adapted": (
        "llama",
        {"target_modules": ["q_proj", "lm_head", "up_proj"], "modules_to_save": ["lm_head", "layers.1.mlp"]},
    ),
    "modules_to_save with numbers": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["norm", "embed_tokens"]},
    ),
    "head of a task": ("roberta", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_same_modules_and_start_as_peft(choice):
    family, lora = CHOICES[choice]
    assert_same_start(*pair(family, {"r": 3, **lora}))


@pytest.mark.parametrize(
    ("ranks", "alphas"),
    [
        ({"q_proj": 5}, {"v_proj": 3}),
        ({"layers.0.self_attn.q_proj": 2, "q_proj": 6}, {"q_proj": 6, "layers.0.self_attn.q_proj": 2}),
        ({r"layers\.1\..*": 7, "v_proj": 2}, {"v_proj": 2, r".*\.1\..*": 40}),
        ({"proj": 7, "^model.layers.0.self_attn.v_proj": 1}, {"^layers.0.self_attn.v_proj": 3}),
        ({"q_proj|v_proj": 2}, {"[qv]_proj": 0.5}),
    ],
)
@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_by_pefts_rules(ranks, alphas, rslora):
    """The first key that matches the end of the dotted name wins; scaling is alpha / R, or alpha / √R."""
    lora = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "use_rslora": rslora}
    ours, theirs = pair("llama", lora | {"rank_pattern": ranks, "alpha_pattern": alphas, "init_lora_weights": False})
    assert_same_start(ours, theirs)
    reference = theirs.base_model.model
    for name, layer in ours.named_modules():
        if isinstance(layer, LoraLayer):
            spec = layer.adapter_specs["default"]
            assert spec.r == reference.get_submodule(name).r["default"], name
            assert spec.scaling == reference.get_submodule(name).scaling["default"], name
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=64 * EPS, atol=64 * EPS)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "bert", "t5"])
def test_biases_trained_as_in_peft(family, bias):
    ours, theirs = pair(family, dict(FAMILIES[family].lora) | {"bias": bias})
    assert_same_start(ours, theirs)
    trained = {name for name in trainable(ours) if "bias" in name and not name.startswith("classifier")}
    assert bool(trained) == (bias != "none" and family != "t5")  # T5 has no bias but the relative position's weight


# ------------------------------------------------------------------------------------------------------------ the start


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_random_starts_are_pefts(family, init, dtype):
    lora = dict(FAMILIES[family].lora) | {"init_lora_weights": init}
    ours, theirs = pair(family, lora, dtype=dtype)
    assert_same_start(ours, theirs)
    for name, parameter in trainable(ours).items():
        assert parameter.dtype == (torch.float32 if "lora_" in name else dtype)
        assert (parameter.abs().max() == 0) == (".lora_B." in name and init is not False)


@pytest.mark.parametrize(("family", "init"), [("llama", "pissa"), ("llama", "olora"), ("gpt2", "pissa")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_from_the_weight_are_pefts(family, init, dtype):
    lora = {"target_modules": "all-linear", "fan_in_fan_out": family == "gpt2", "r": 4, "lora_alpha": 12}
    ours, theirs = pair(family, lora | {"init_lora_weights": init}, dtype=dtype)
    # PEFT rounds the factors to the base's dtype, ours stay fp32.
    atol = 64 * EPS if dtype == torch.float32 else torch.finfo(dtype).eps
    mine, yours = dict(ours.named_parameters()), {}
    for name, parameter in theirs.named_parameters():
        yours[name.removeprefix("base_model.model.").replace(".base_layer", "")] = parameter
    assert mine.keys() == yours.keys()
    base = dict(build(family, dtype=dtype).named_parameters())
    for name, parameter in mine.items():
        torch.testing.assert_close(parameter.float(), yours[name].float(), rtol=atol, atol=atol)
        assert (
            "lora_" in name
            or f"{name.removesuffix('weight')}lora_A.default.weight" not in mine
            or not torch.equal(parameter, base[name])
        ), "the base weight must have changed"


def test_olora_on_conv1d_keeps_the_function():
    """PEFT factors a Conv1D's stored (K, N) weight as if it were (N, K), and fails; here it is the layer's matrix."""
    base = build("gpt2")
    before = logits(base)
    apply_lora(base, LoraConfig(r=4, init_lora_weights="olora"))
    layer = base.transformer.h[0].attn.c_attn
    assert layer.lora_A["default"].weight.shape == (4, 32) and layer.lora_B["default"].weight.shape == (96, 4)
    torch.testing.assert_close(logits(base), before, rtol=1e-4, atol=1e-5)
    b = layer.lora_B["default"].weight
    torch.testing.assert_close(b.T @ b, torch.eye(4), rtol=0, atol=64 * EPS)


@pytest.mark.parametrize("init", [True, "gaussian", "pissa", "olora"])
def test_the_start_changes_no_logit(init):
    base = build("llama")
    before = logits(base)
    apply_lora(base, LoraConfig(r=4, init_lora_weights=init))
    if init in ("pissa", "olora"):
        torch.testing.assert_close(logits(base), before, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(logits(base), before)


def test_adapter_dtype():
    model = injected(dtype=torch.bfloat16)
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
    model = build("llama", dtype=torch.bfloat16)
    apply_lora(model, LoraConfig(), adapter_dtype=torch.bfloat16)
    assert {p.dtype for p in lora_parameters(model)} == {torch.bfloat16}


def test_rank_above_the_layers_size_warns_and_works():
    with pytest.warns(lora_fast.LoraFastWarning, match=r"r=40 exceeds min\(N, K\)=32 of .*q_proj") as record:
        model = apply_lora(build("llama"), LoraConfig(r=40, target_modules=["q_proj"], init_lora_weights=False))
    assert record[0].filename == __file__  # the warning points at the caller
    gradients(model)


# ---------------------------------------------------------------------------------------- what the model stays and gets


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_model_keeps_its_class_names_and_weights(family):
    base = build(family)
    before = {name: (id(p), p.clone()) for name, p in base.named_parameters(remove_duplicate=False)}
    state_dict = list(base.state_dict())
    kind = type(base)
    model = injected(family, model=base)
    assert model is base and type(model) is kind
    for name, (identity, value) in before.items():
        parameter = model.get_parameter(name)
        assert id(parameter) == identity and torch.equal(parameter, value) and not parameter.requires_grad
    added = [name for name in model.state_dict() if ".lora_" not in name]
    assert added == state_dict
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".lora_" in name
    }
    assert [id(p) for p in lora_parameters(model)] == [id(p) for p in model.parameters() if p.requires_grad]


def test_an_adapter_that_a_mamba_never_calls_is_announced():
    model = build("mamba")
    with pytest.warns(lora_fast.LoraFastWarning, match=r"layers\.0\.mixer\.x_proj \(\d+ modules so\) without calling"):
        apply_lora(model, LoraConfig(target_modules=["in_proj", "x_proj"]))


@pytest.mark.parametrize(
    ("kind", "sizes", "told"),
    [
        (
            "Jamba",
            {"num_key_value_heads": 4, "num_experts": 1, "mamba_dt_rank": 3, "use_mamba_kernels": False},
            r"JambaMambaMixer reads the weight of \S+\.mamba\.dt_proj \(\d modules so\) without",
        ),
        (
            "WavLM",
            {"conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (4,), "num_feat_extract_layers": 1},
            r"WavLMAttention reads the weight of \S+\.[a-z_]+_proj \(8 modules so\) without",
        ),
    ],
)
def test_an_adapter_on_a_weight_that_is_read_elsewhere_is_announced(kind, sizes, told):
    sizes |= {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(vocab_size=61, **sizes))
    with pytest.warns(lora_fast.LoraFastWarning, match=told):
        apply_lora(model, LoraConfig())


def test_fusion_report_names_every_module_and_the_reason():
    model = injected()
    report = fusion_report(model)
    assert {row.module for row in report.rows} == adapted(model)
    assert sum(report.counts.values()) == len(report.rows) == 14
    text = str(report)
    for row in report.rows:
        assert (row.reason is None) == (row.path == "triton")
        assert row.reason is None or row.reason in text
    assert str(fusion_report(build("llama"))) == "lora-fast: no adapted module"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("init", [False, "pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_remove_puts_everything_back(family, init, dtype):
    base = build(family, dtype=dtype)
    base.get_input_embeddings().weight.requires_grad_(False)
    before = snapshot(base)
    targets = ["c_attn"] if family == "gpt2" else ["q_proj", "down_proj"]
    lora = {"init_lora_weights": init, "target_modules": targets}
    injected(family, model=base, lora=lora)
    if init is False:
        injected(family, model=base, lora=lora, name="second", seed=6)
    assert init is False or any(not torch.equal(v, before["values"].get(n, v)) for n, v in base.state_dict().items())
    remove_lora(base)
    assert_unchanged(base, before)


def test_remove_takes_back_trained_biases_and_modules():
    base = build("bert")
    before = snapshot(base)
    lora = dict(FAMILIES["bert"].lora) | {"bias": "all", "modules_to_save": ["classifier", "word_embeddings"]}
    injected("bert", model=base, lora=lora)
    with torch.no_grad():
        for parameter in trainable(base).values():
            parameter += 1
    remove_lora(base)
    assert_unchanged(base, before)


def resize(model):
    model.resize_token_embeddings(70, mean_resizing=False)


def swap(name):
    """Puts a plain linear layer, of the same sizes, in the place of the module of this name."""

    def act(model):
        old = model.get_submodule(name)
        model.set_submodule(name, nn.Linear(old.in_features, old.out_features, bias=False))

    return act


Q_PROJ = "model.layers.1.self_attn.q_proj"
REPLACED = {
    "a saved head, resized": ({"modules_to_save": ["lm_head"]}, resize, "lm_head"),
    "a saved head, swapped": ({"modules_to_save": ["lm_head"]}, swap("lm_head"), "lm_head"),
    "an adapted head, resized": ({"target_modules": ["q_proj", "lm_head"]}, resize, "lm_head"),
    "an adapted layer, swapped": ({}, swap(Q_PROJ), Q_PROJ),
}


@pytest.mark.parametrize("choice", REPLACED)
def test_a_module_that_was_replaced_is_named_and_never_overwritten(choice, tmp_path):
    lora, replace, name = REPLACED[choice]
    model = injected(lora={"target_modules": ["q_proj", "v_proj"]} | lora)
    replace(model)
    new = model.get_submodule(name)
    with torch.no_grad():
        new.weight += 1
    value, before = new.weight.clone(), snapshot(model)

    def disable():
        with disable_adapters(model):
            pass

    actions = (
        lambda: save_adapter(model, tmp_path / "adapter"),
        lambda: set_adapter(model, "default"),
        disable,
        lambda: merge_lora(model),
        lambda: adapter_spectra(model),
        lambda: apply_lora(model, LoraConfig(r=2, target_modules=["k_proj"]), adapter_name="two"),
    )
    told = (
        rf"^{name} was replaced after its adapter was put in \(resize_token.*resize first, then apply_lora: remove_lora"
    )
    for action in actions:
        with pytest.raises(LoraFastError, match=told):
            action()
        assert_unchanged(model, before)
    assert not any(tmp_path.iterdir())
    remove_lora(model)
    assert model.get_submodule(name) is new and torch.equal(new.weight, value)
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    base = build("llama").state_dict()
    for key, expected in base.items():
        if key != f"{name}.weight":
            assert torch.equal(model.state_dict()[key][: len(expected)], expected), key
    assert {n for n, p in model.named_parameters() if p.requires_grad} == base.keys()
    injected(model=model, lora=lora, name="again")
    save_adapter(model, tmp_path / "adapter")
    fresh = build("llama")
    if replace is resize:
        resize(fresh)
    fresh.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(logits(load_adapter(fresh, tmp_path / "adapter")), logits(model))


def test_a_tied_head_that_was_resized_in_place_is_told_in_its_call():
    model = injected(lora={"target_modules": ["q_proj", "lm_head"]}, tie_word_embeddings=True)
    resize(model)
    with pytest.raises(LoraFastError, match="lora_B has N=61, the linear layer has N=70"):
        logits(model)
    remove_lora(model)
    base = build("llama", tie_word_embeddings=True)
    assert torch.equal(logits(model)[..., :61], logits(base))


def test_a_replaced_module_leaves_other_adapters_be(tmp_path):
    model = injected(lora={"target_modules": ["q_proj"]})
    injected(model=model, lora={"target_modules": ["q_proj", "lm_head"]}, name="two", seed=6)
    expected = model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.clone()
    resize(model)
    save_adapter(model, tmp_path / "one", adapter_name="default")
    stored = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert torch.equal(stored["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"], expected)
    with pytest.raises(LoraFastError, match="lm_head was replaced"):
        save_adapter(model, tmp_path / "two")


def test_what_was_replaced_after_a_merge_stays_when_it_is_removed():
    model = injected(lora={"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["norm"]})
    merge_lora(model)
    resize(model)
    expected, before = logits(model), snapshot(model)
    for action in (unmerge_lora, lambda model: disable_adapters(model).__enter__()):
        with pytest.raises(LoraFastError, match="lm_head was replaced"):
            action(model)
        assert_unchanged(model, before)
    remove_lora(model)
    assert torch.equal(logits(model), expected)


def test_an_adapted_embedding_that_was_resized_after_a_merge_is_not_unmerged():
    model = injected(lora={"target_modules": ["q_proj", "embed_tokens"]})
    merge_lora(model)
    resize(model)
    expected, before = logits(model), snapshot(model)
    with pytest.raises(LoraFastError, match=r"embed_tokens.weight was resized .* was \(61, 32\), is \(70, 32\)"):
        unmerge_lora(model)
    assert_unchanged(model, before)
    remove_lora(model)
    assert torch.equal(logits(model), expected)


def test_a_module_that_is_replaced_while_adapters_are_disabled():
    model = injected(lora={"modules_to_save": ["lm_head"], "init_lora_weights": "pissa"})
    with pytest.raises(LoraFastError, match="lm_head was replaced"), disable_adapters(model):
        swap("lm_head")(model)
        new = model.lm_head
    remove_lora(model)
    base = build("llama")
    base.lm_head = new
    assert model.lm_head is new and torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_embedding_resized_in_place_is_saved_and_stays(tied, tmp_path):
    """Transformers resizes an embedding in place: what is trained is still the adapter's copy."""
    model = injected(lora={"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, tie_word_embeddings=tied)
    copied = model.model.embed_tokens
    resize(model)
    assert model.model.embed_tokens is copied
    with torch.no_grad():
        copied.weight += 0.1
    trained, before = copied.weight.clone(), snapshot(model)
    save_adapter(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(stored["base_model.model.model.embed_tokens.weight"], trained)
    merge_lora(model)
    unmerge_lora(model)
    set_adapter(model, "default")
    with pytest.raises(LoraFastError, match=r"model.embed_tokens was resized after its adapter was put in"):
        disable_adapters(model).__enter__()
    with pytest.raises(LoraFastError, match=r"model.embed_tokens was resized after its adapter was put in"):
        apply_lora(model, LoraConfig(target_modules=["k_proj"]), adapter_name="two")
    assert_unchanged(model, before)
    remove_lora(model)
    assert model.model.embed_tokens is copied and torch.equal(copied.weight, trained)
    assert (model.lm_head.weight is copied.weight) == tied
    assert torch.equal(model.get_submodule(Q_PROJ).weight, build("llama").get_submodule(Q_PROJ).weight)


def test_remove_leaves_the_biases_of_a_replaced_module():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 3), "tail": nn.Linear(4, 2)})
    body = model["body"].bias.detach().clone()
    apply_lora(model, LoraConfig(r=2, target_modules=["head", "tail", "body"], bias="all"))
    with torch.no_grad():
        model["body"].bias += 1
    model["head"], model["tail"] = nn.Linear(4, 3), nn.Linear(4, 5, bias=False)
    bias = model["head"].bias.detach().clone()
    remove_lora(model)
    assert torch.equal(model["head"].bias, bias) and torch.equal(model["body"].bias, body)
    assert type(model["body"]) is nn.Linear and all(p.requires_grad for p in model.parameters())


def test_wrapped_and_removed_modules_are_not_taken_for_replaced_ones(tmp_path):
    model = injected(lora={"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]})
    layers = model.model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    layers[1].self_attn.q_proj = nn.Sequential(layers[1].self_attn.q_proj)
    copied = model.lm_head
    model.lm_head = torch.compile(copied, backend="eager")
    save_adapter(model, tmp_path / "wrapped")
    stored = load_file(tmp_path / "wrapped" / "adapter_model.safetensors")
    assert torch.equal(stored["base_model.model.lm_head.weight"], copied.weight)
    assert sum(".lora_A." in key for key in stored) == 4
    merge_lora(model)
    unmerge_lora(model)
    del model.model.layers[1]
    save_adapter(model, tmp_path / "shortened")
    stored = load_file(tmp_path / "shortened" / "adapter_model.safetensors")
    assert sum(".lora_A." in key for key in stored) == 2


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_changes_the_weight_is_refused_on_a_tied_head(init):
    model = build("llama", tie_word_embeddings=True)
    before = snapshot(model)
    with pytest.raises(LoraFastError, match=rf"init_lora_weights='{init}' changes lm_head.weight.*tied to model.embed"):
        apply_lora(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=init))
    assert_unchanged(model, before)


# ---------------------------------------------------------------------------------- what training scripts do to a model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant, dropout):
    model = injected(family, lora={"lora_dropout": dropout})
    # Checkpointing switches the cache off, and attention beside a cache may round differently.
    inputs = CAUSAL_LM | {"use_cache": False}
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    # Newer versions of Transformers let gradients into a frozen embedding themselves; older ones leave it to us.
    model.disable_input_require_grads()
    calls = []
    handle = model.base_model.get_submodule("layers.0" if family == "llama" else "h.0").mlp.register_forward_pre_hook(
        lambda *_: calls.append(1)
    )
    for name, gradient in gradients(model, inputs).items():
        assert torch.equal(gradient, expected[name]), name
    assert len(calls) == 2  # it did run again in backward
    handle.remove()


def test_gradient_checkpointing_with_a_trained_embedding():
    model = injected(lora={"lora_dropout": 0.1, "modules_to_save": ["embed_tokens"]})
    expected = gradients(model)
    assert "model.embed_tokens.weight" in expected
    model.gradient_checkpointing_enable({"use_reentrant": True})
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name
    remove_lora(model)
    assert not any("lora_fast" in type(h).__module__ for m in model.modules() for h in m._forward_hooks.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compiles_as_one_graph(dropout):
    torch._dynamo.reset()
    model = injected(lora={"lora_dropout": dropout}, num_hidden_layers=1)
    expected, computed = gradients(model), logits(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    torch.manual_seed(1)
    model.train()
    compiled(**CAUSAL_LM).loss.backward()
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=64 * EPS, atol=64 * EPS, msg=name)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(**CAUSAL_LM).logits, computed, rtol=64 * EPS, atol=64 * EPS)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_apart(how):
    model = injected(lora={"modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 2}})
    injected(model=model, name="second", lora={"bias": "all"}, seed=8)
    expected = logits(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(logits(twin), expected)
    ours = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in ours for p in twin.parameters())
    set_adapter(twin, "default")
    assert not torch.equal(logits(twin), expected)
    assert torch.equal(logits(model), expected)
    merge_lora(twin)
    twin.gradient_checkpointing_enable({"use_reentrant": True})
    assert not model.model.gradient_checkpointing
    unmerge_lora(twin)
    gradients(twin)
    remove_lora(twin)
    assert torch.equal(logits(twin), logits(build("llama")))
    assert torch.equal(logits(model), expected)


def test_a_copied_embedding_brings_no_model_along():
    model = injected(lora={"modules_to_save": ["embed_tokens"]})
    remove_lora(model)
    injected(model=model)
    alone = copy.deepcopy(model.model.embed_tokens)
    assert all(hook.model is model for hook in alone._forward_hooks.values()) and alone._forward_hooks


def test_state_dict_round_trip():
    one, two = injected(seed=1), injected(seed=2)
    assert not torch.equal(logits(one), logits(two))
    two.load_state_dict(one.state_dict())
    assert torch.equal(logits(one), logits(two))


def test_generate():
    prompt = {"input_ids": CAUSAL_LM["input_ids"][:, :4], "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    lora = {"r": 4, "lora_alpha": 64, "init_lora_weights": False, "target_modules": "all-linear"}
    ours, theirs = pair("llama", lora)
    plain = build("llama").eval().generate(**prompt, **settings)
    generated = ours.eval().generate(**prompt, **settings)
    assert torch.equal(generated, theirs.eval().generate(**prompt, **settings))
    assert generated.shape == (2, 10) and not torch.equal(generated, plain)
    merge_lora(ours)
    assert torch.equal(ours.generate(**prompt, **settings), generated)
    with disable_adapters(ours):
        assert torch.equal(ours.generate(**prompt, **settings), plain)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_save_pretrained_keeps_the_base(family, tmp_path):
    base = build(family)
    plain = logits(base)
    model = injected(family, model=base)
    model.save_pretrained(tmp_path)
    reloaded = type(base).from_pretrained(tmp_path)
    assert not any(isinstance(module, LoraLayer) for module in reloaded.modules())
    assert torch.equal(logits(reloaded), plain)


def trainer(model, folder, **arguments):
    from transformers import Trainer, TrainingArguments

    tokens = torch.randint(3, 60, (12, 9), generator=torch.Generator().manual_seed(2))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    settings = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=4,
        save_steps=2,
        learning_rate=0.01,
        seed=4,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **arguments,
    )
    return Trainer(model=model, args=settings, train_dataset=data)


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_runs_as_with_peft_and_resumes(tmp_path, checkpointing):
    lora = {"r": 4, "lora_dropout": 0.1, "init_lora_weights": False, "target_modules": "all-linear"}
    ours, theirs = pair("llama", lora)
    run = trainer(ours, tmp_path / "ours", gradient_checkpointing=checkpointing)
    run.train()
    reference = trainer(theirs, tmp_path / "theirs", gradient_checkpointing=checkpointing)
    reference.train()
    assert len(losses(run)) == 4
    assert losses(run) == pytest.approx(losses(reference), rel=256 * EPS, abs=1e-4)  # logged with 4 decimals
    assert losses(run)[0] != losses(run)[-1]

    resumed = injected(seed=99, lora=lora)
    again = trainer(resumed, tmp_path / "ours", gradient_checkpointing=checkpointing)
    again.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2"))
    assert losses(again) == losses(run)
    for name, parameter in trainable(resumed).items():
        assert torch.equal(parameter, trainable(ours)[name]), name


def test_accelerate_hooks_keep_working():
    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    expected, plain = logits(injected()), logits(build("llama"))

    hooked, hook = build("llama"), Counting()
    layer = hooked.model.layers[0].self_attn.q_proj
    add_hook_to_module(layer, hook)
    injected(model=hooked)
    assert isinstance(layer, LoraLinear)
    assert torch.equal(logits(hooked), expected) and hook.calls == 1
    remove_lora(hooked)
    assert type(layer) is nn.Linear
    assert torch.equal(logits(hooked), plain) and hook.calls == 2

    # accelerate leaves the class's forward on the instance when it takes its hook off
    remove_hook_from_module(layer)
    assert "forward" in layer.__dict__
    injected(model=hooked)
    assert torch.equal(logits(hooked), expected)
    add_hook_to_module(layer, hook)
    assert torch.equal(logits(hooked), expected) and hook.calls == 3
    remove_hook_from_module(layer)
    remove_lora(hooked)
    assert torch.equal(logits(hooked), plain)

    offloaded = cpu_offload(build("llama"), execution_device="cpu")
    injected(model=offloaded)
    assert {p.device.type for p in lora_parameters(offloaded)} == {"cpu"}
    assert offloaded.lm_head.weight.device.type == "meta"
    # Each layer's weights come when it is called, so that q, k and v are computed one by one: another order of sums.
    torch.testing.assert_close(logits(offloaded), expected, rtol=0, atol=64 * torch.finfo(torch.float32).eps)
    assert gradients(offloaded).keys() == gradients(injected()).keys()
    with pytest.raises(LoraFastError, match=r"weight is offloaded by accelerate; move the model"):
        merge_lora(offloaded)
    remove_lora(offloaded)
    for lora, sentence in (
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' changes .*offloaded"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: lm_head is offloaded"),
    ):
        before = {name: id(module) for name, module in offloaded.named_modules()}
        with pytest.raises(LoraFastError, match=sentence):
            apply_lora(offloaded, LoraConfig(**lora), adapter_name="second")
        assert before == {name: id(module) for name, module in offloaded.named_modules()}
    assert torch.equal(logits(offloaded), plain)


def test_biases_on_meta_are_refused_with_nothing_changed():
    with torch.device("meta"):
        model = build("gpt2")
    with pytest.raises(LoraFastError, match=r"bias='all': .*bias is on the meta device .* load the model first"):
        apply_lora(model, LoraConfig(r=4, bias="all"))
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_on_meta_everything_is_on_meta():
    with torch.device("meta"):
        model = build("llama")
    apply_lora(model, LoraConfig(r=4))
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_exclusions_that_exclude_nothing_are_announced():
    said = r"exclude_modules: no module of LlamaForCausalLM is named 'dwn_proj'; did you mean down_proj"
    with pytest.warns(lora_fast.LoraFastWarning, match=said):
        model = apply_lora(build("llama"), LoraConfig(exclude_modules=["dwn_proj", "up_proj"]))
    assert adapted(model) == {
        name for name in adapted(apply_lora(build("llama"), LoraConfig())) if "up_proj" not in name
    }
    with pytest.warns(lora_fast.LoraFastWarning, match=r"is named '\.\*dwn\.\*'"):
        apply_lora(build("llama"), LoraConfig(exclude_modules=".*dwn.*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", lora_fast.LoraFastWarning)
        apply_lora(build("llama"), LoraConfig(exclude_modules=".*down_proj"))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_x_is_never_copied_to_fp32(dropout):
    """On a bf16 base with fp32 adapters nothing of x's size is kept in fp32, and x itself once for q, k and v."""
    lora = {"target_modules": ["q_proj", "k_proj", "v_proj"], "lora_dropout": dropout}
    model = injected("opt", dtype=torch.bfloat16, lora=lora)
    attention = model.model.decoder.layers[0].self_attn
    x = torch.randn(2, 9, 32, dtype=torch.bfloat16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        outputs = [attention.train().q_proj(x), attention.k_proj(x), attention.v_proj(x)]
    assert {y.dtype for y in outputs} == {torch.bfloat16}
    weights = {p.untyped_storage().data_ptr() for p in attention.parameters()}
    kept = {t.untyped_storage().data_ptr(): t for t in saved if t.untyped_storage().data_ptr() not in weights}
    like_x = [t for t in kept.values() if t.numel() == x.numel()]
    assert [t.data_ptr() for t in like_x] == [x.data_ptr()]
    rest = sum(t.untyped_storage().nbytes() for t in kept.values()) - x.untyped_storage().nbytes()
    assert rest == 3 * (18 * 4 * 2 + (18 * 32 // 8 if dropout else 0))  # S in bf16, and the mask's bits


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_training_is_as_exact_as_peft(dtype, autocast):
    """Gradients of fp32 adapters on a 16-bit base against float64: no further off than PEFT's with 16-bit adapters. And
    the same under autocast, where both have an fp32 base and fp32 adapters.

    One model's error is a matter of luck by a factor of two; so the errors of twelve are taken together."""
    lora = {"r": 4, "init_lora_weights": False, "target_modules": "all-linear"}
    ours, theirs = pair("llama", lora, dtype=torch.float32 if autocast else dtype)
    for parameter in trainable(theirs).values():
        parameter.data = parameter.data.to(torch.float32 if autocast else dtype)
    exact = injected(dtype=torch.float64, lora=lora)
    mine = yours = 0.0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in trainable(ours).items():
            parameter.data = (torch.randn(parameter.shape, generator=generator) / 6).to(dtype).float()
            trainable(theirs)[name].data.copy_(parameter.data)
        exact.load_state_dict({name: value.double() for name, value in ours.state_dict().items()})
        truth = gradients(exact)
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            found, reference = gradients(ours), gradients(theirs)
        assert all(gradient.dtype == torch.float32 for gradient in found.values())
        mine += sum((found[name].double() - value).square().sum().item() for name, value in truth.items())
        yours += sum((reference[name].double() - value).square().sum().item() for name, value in truth.items())
    assert mine**0.5 <= 1.5 * yours**0.5


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"target_modules": ["q_prj"]},
            r"no module of LlamaForCausalLM; did you mean q_proj.*Its linear layers are",
        ),
        ({"target_modules": "q_proj"}, r"target_modules='q_proj' matches no module.*write \['q_proj'\]"),
        ({"target_modules": ".*q_prj"}, r"target_modules='\.\*q_prj' matches no module.*did you mean q_proj"),
        ({"target_modules": ["nonsense_xyz"]}, r"its linear layers are q_proj, k_proj, v_proj, o_proj, gate_proj"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, r"matches modules .*takes all of them away"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [9]}, r"matches modules .*takes all of them away"),
        ({"target_modules": ["self_attn"]}, r"self_attn is a transformers.*Attention; .*accelerate_peft"),
        ({"modules_to_save": ["lm_hed"]}, r"modules_to_save: no module's name ends in 'lm_hed'; did you mean lm_head"),
        ({"task_type": "SEQ_CLS"}, r"task_type='SEQ_CLS' trains a head named classifier or score, and Llama"),
        (
            {"r": 33, "init_lora_weights": "pissa"},
            r"'pissa' takes at most r=min\(N, K\)=32 for .*; r=33",
        ),
        ({"rank_pattern": {"v_proj": 17}, "init_lora_weights": "olora"}, r"'olora' takes at most r=min\(N, K\)=16 for"),
    ],
)
def test_a_refused_injection_changes_nothing(config, sentence):
    model = build("llama")
    model.model.norm.weight.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(LoraFastError, match=sentence):
        apply_lora(model, LoraConfig(**config))
    assert_unchanged(model, before)
    assert type(model).__name__ == "LlamaForCausalLM" and not hasattr(model, "_lora_fast_state")


@pytest.mark.parametrize("name", ["keys", "train", "a.b", "", None])
def test_a_refused_name_changes_nothing(name):
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(LoraFastError, match=f"adapter_name={name!r}"):
        apply_lora(model, LoraConfig(), adapter_name=name)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"r": 0}, r"r=0; expected a whole number of at least 1"),
        ({"r": -4}, r"r=-4"),
        ({"r": 2.5}, r"r=2.5; expected a whole number"),
        ({"r": 8.0}, r"r=8.0; expected a whole number"),
        ({"r": True}, r"r=True; expected a whole number"),
        ({"r": "8"}, r"r='8'; expected a whole number"),
        ({"r": None}, r"r=None"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"alpha_pattern\['q_proj'\]='x'; expected a finite number"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern: '\(' is not a regular expression"),
        ({"lora_alpha": float("nan")}, r"lora_alpha=nan; expected a finite number"),
        ({"lora_alpha": None}, r"lora_alpha=None"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1.0; expected a probability in \[0, 1\)"),
        ({"lora_dropout": -0.1}, r"lora_dropout=-0.1"),
        ({"lora_dropout": float("nan")}, r"lora_dropout=nan"),
        ({"use_dora": 1}, r"use_dora=1; expected True or False"),
        ({"bias": "some"}, r"bias='some'; expected 'none', 'all' or 'lora_only'"),
        ({"bias": True}, r"bias=True"),
        (
            {"init_lora_weights": "eva"},
            r"init_lora_weights='eva'; expected True, False, 'gaussian', 'pissa' or",
        ),
        ({"init_lora_weights": 1}, r"init_lora_weights=1;"),
        ({"init_lora_weights": None}, r"init_lora_weights=None"),
        ({"target_modules": []}, r"target_modules=\[\]; expected module names, a regex or 'all-linear'"),
        ({"target_modules": None}, r"target_modules=None"),
        ({"target_modules": [3]}, r"target_modules=\[3\]; expected a list of module names"),
        ({"target_modules": "(q_proj"}, r"target_modules: '\(q_proj' is not a regular expression"),
        ({"exclude_modules": "*"}, r"exclude_modules: '\*' is not a regular expression"),
        ({"modules_to_save": "lm_head"}, r"modules_to_save='lm_head'; expected a list of module names"),
        ({"layers_to_transform": [1]}, r"work on module names; target_modules='all-linear' is one pattern"),
        ({"layers_pattern": "h", "target_modules": ["q"]}, r"layers_pattern='h' says where layers_to_transform counts"),
        ({"layers_to_transform": ["1"], "target_modules": ["q"]}, r"layers_to_transform=\['1'\]; expected"),
        ({"layers_to_transform": True, "target_modules": ["q"]}, r"layers_to_transform=True; expected"),
    ],
)
def test_bad_configs_are_refused(config, sentence):
    with pytest.raises(LoraFastError, match=sentence):
        LoraConfig(**config)


def test_a_misspelt_name_beside_a_good_one_is_announced(tmp_path):
    model = build("llama")
    wanted = ["q_proj", "v_prj", "layers.7.mlp.up_proj", "model.layers.0.mlp.down_proj"]
    said = r"no module of LlamaForCausalLM is named 'v_prj', 'layers.7.mlp.up_proj'; did you mean v_proj"
    with pytest.warns(lora_fast.LoraFastWarning, match=said) as record:
        apply_lora(model, LoraConfig(target_modules=wanted))
    assert [warning.filename for warning in record] == [__file__]
    with pytest.warns(lora_fast.LoraFastWarning, match="linear layers are q_proj, k_proj, .*, down_proj, lm_head$"):
        apply_lora(model, LoraConfig(target_modules=["q_proj", "xyz"]), adapter_name="second")
    # PEFT writes the names into its file as they were given, and is silent.
    peft_model(build("llama"), target_modules=wanted).save_pretrained(tmp_path)
    with pytest.warns(lora_fast.LoraFastWarning, match="is named .*'v_prj'.*did you mean .*v_proj"):
        loaded = lora_fast.load_adapter(build("llama"), tmp_path)
    assert adapted(loaded) == adapted(model)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": r".*\.q_proj|v_prj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "layers.0.mlp.up_proj"], "layers_to_transform": [1]},
    ],
)
def test_only_a_name_that_no_module_has_is_announced(lora):
    with warnings.catch_warnings():
        warnings.simplefilter("error", lora_fast.LoraFastWarning)
        apply_lora(build("llama"), LoraConfig(**lora))


def test_equal_configs_have_equal_hashes():
    fields = {"r": 4, "rank_pattern": {"q_proj": 2, "v_proj": 3}, "alpha_pattern": {"q_proj": 1}}
    turned = fields | {"rank_pattern": {"v_proj": 3, "q_proj": 2}, "target_modules": {"v_proj", "q_proj"}}
    one, two = LoraConfig(**fields, target_modules=["q_proj", "v_proj"]), LoraConfig(**turned)
    assert one == two and hash(one) == hash(two)
    assert len({one, two, copy.deepcopy(one), LoraConfig(), LoraConfig(), LoraConfig(r=4)}) == 3
    listed = LoraConfig(target_modules=["q"], layers_to_transform=[1], layers_pattern=["h"], modules_to_save=["head"])
    assert isinstance(hash(listed), int)


def test_refusals_of_a_model_that_carries_adapters():
    model = injected("qwen2", lora={"bias": "lora_only"})
    before = snapshot(model)
    for act, sentence in (
        (lambda: apply_lora(model, LoraConfig()), r"adapter 'default' is there already; choose another adapter_name"),
        (lambda: apply_lora(model, LoraConfig(target_modules=["nope"]), adapter_name="b"), r"matches no module"),
        (
            lambda: apply_lora(model, LoraConfig(bias="all"), adapter_name="b"),
            r"two adapters can't both train the base",
        ),
        (
            lambda: apply_lora(model, LoraConfig(), adapter_name="a.b"),
            r"adapter_name='a.b'; expected a name without",
        ),
        (lambda: apply_lora(model, LoraConfig(), adapter_name=""), r"adapter_name=''"),
        (lambda: apply_lora(model, LoraConfig(), adapter_name="b", backend="x"), r"backend='x'; expected one of"),
        (
            lambda: apply_lora(model, LoraConfig(), adapter_name="b", adapter_dtype=torch.int8),
            r"adapter_dtype=torch.int8",
        ),
        (lambda: set_adapter(model, "other"), r"adapter_name='other'; this model carries 'default'"),
        (lambda: unmerge_lora(model), r"no adapter is merged; merge_lora\(model\) comes first"),
        (lambda: merge_lora(model, keep="disk"), r"keep='disk'; expected 'cpu' or 'device'"),
    ):
        with pytest.raises(LoraFastError, match=sentence):
            act()
        assert_unchanged(model, before)
    merge_lora(model)
    before = snapshot(model)
    with pytest.raises(LoraFastError, match=r"adapter 'default' is merged already; unmerge_lora\(model\) first"):
        merge_lora(model)
    assert_unchanged(model, before)


def test_a_model_without_adapters_is_told_so():
    model = build("llama")
    for act in (merge_lora, unmerge_lora, remove_lora, lora_parameters, lambda m: set_adapter(m, "default")):
        with pytest.raises(LoraFastError, match=r"LlamaForCausalLM carries no lora-fast adapter; call apply_lora"):
            act(model)
    with pytest.raises(LoraFastError, match=r"carries no lora-fast adapter"), disable_adapters(model):
        pass
    with pytest.raises(LoraFastError, match=r"model is a dict; expected a torch.nn.Module"):
        apply_lora({}, LoraConfig())


def test_models_and_layers_that_belong_to_others_are_refused():
    wrapped = peft_model(build("llama"), target_modules=["q_proj"])
    for model in (wrapped, wrapped.base_model.model):
        before = snapshot(wrapped)
        with pytest.raises(LoraFastError, match=r"already carries PEFT adapters; call accelerate_peft"):
            apply_lora(model, LoraConfig())
        assert_unchanged(wrapped, before)

    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    apply_lora(model[0], LoraConfig(r=2))
    before = snapshot(model)
    with pytest.raises(LoraFastError, match=r"its submodule 0 carries adapters of its own"):
        apply_lora(model, LoraConfig(r=2))
    assert_unchanged(model, before)

    for hooked in (False, True):
        model = nn.Sequential(nn.Linear(4, 4))
        model[0].forward = lambda x: x
        if hooked:
            add_hook_to_module(model[0], ModelHook())
        before = snapshot(model)
        with pytest.raises(LoraFastError, match=r"0.forward was replaced on the instance"):
            apply_lora(model, LoraConfig(r=2))
        assert_unchanged(model, before)


def test_layers_that_a_model_never_calls_are_refused():
    model = build("mamba")
    before = snapshot(model)
    with pytest.raises(LoraFastError, match=r"out_proj can't be adapted in a mamba.*exclude_modules=\['out_proj'"):
        apply_lora(model, LoraConfig(target_modules=["in_proj", "out_proj"]))
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="out_proj"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["in_proj", "out_proj"]))


def test_any_module_will_do():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))
    x = torch.randn(4, 7)
    base = model(x)
    apply_lora(model, LoraConfig(r=2, init_lora_weights=False))
    a, b = (model[0].lora_A["default"].weight, model[0].lora_B["default"].weight)
    hidden = torch.tanh(x @ (model[0].weight + 4 * b @ a).T + model[0].bias)
    a, b = (model[2].lora_A["default"].weight, model[2].lora_B["default"].weight)
    torch.testing.assert_close(model(x), hidden @ (model[2].weight + 4 * b @ a).T)
    remove_lora(model)
    assert torch.equal(model(x), base)
