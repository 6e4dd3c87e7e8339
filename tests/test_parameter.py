"""LoRA on parameters (`target_parameters`): stacked experts and routers in whole models against PEFT, through files and
through what training scripts do."""

import copy
import json
import pickle

import peft
import pytest
import torch
import transformers
from accelerate import cpu_offload
from kernel_support import DEVICE, count_launches, error
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from support import CAUSAL_LM, VOCABULARY, assert_unchanged, logits, peft_model, snapshot
from torch import nn

from lora_fast import (
    LoraConfig,
    LoraFastError,
    LoraFastWarning,
    accelerate_peft,
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
from lora_fast.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from lora_fast.fusion import calls_by_path
from lora_fast.injection import lora_layers
from lora_fast.linear import NO_ADAPTER

_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 32, "num_experts_per_tok": 2}
# {family: name of Transformers' classes, fields of the config, the router's weight}
MIXTURES = {
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 8, "moe_intermediate_size": 24, "num_experts": 5}, "gate.weight"),
    "mixtral": ("Mixtral", {"intermediate_size": 24, "num_local_experts": 5}, "gate.weight"),
    "gpt_oss": ("GptOss", {"head_dim": 8, "intermediate_size": 24, "num_local_experts": 5}, "router.weight"),
}
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
EXPERTS = {"target_modules": [], "target_parameters": [GATE_UP, DOWN]}
FIRST = "model.layers.0.mlp.experts"
ON_CPU = ("torch", "the tensors are on the CPU")


def build(family="qwen3_moe", **config):
    """A fresh model in training mode, no two of its numbers alike."""
    name, sizes, _ = MIXTURES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**_SIZES | sizes | config)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    return model.train()


def injected(model=None, name="default", seed=5, **lora):
    """`model` with an adapter whose update is not zero, on its experts unless `lora` says otherwise."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 3, "lora_alpha": 12, "init_lora_weights": False} | EXPERTS | lora)
    return apply_lora(build() if model is None else model, config, adapter_name=name)


def peft_injected(model=None, seed=5, **lora):
    """The same by PEFT."""
    torch.manual_seed(seed)
    lora = {"r": 3, "lora_alpha": 12, "init_lora_weights": False} | EXPERTS | lora
    return peft_model(build() if model is None else model, **lora)


def factors(model):
    """{the adapted layer's or parameter's name, "A" or "B": factor of "default"}, in our model or PEFT's."""
    if not hasattr(model, "peft_config"):
        layers = lora_layers(model)
    else:
        layers = {}
        for path, layer in model.base_model.model.named_modules():
            if hasattr(layer, "lora_A"):
                layers[".".join([path.replace(".base_layer", ""), *filter(None, [parameter_of(layer)])])] = layer
    found = {}
    for name, layer in layers.items():
        found |= {(name, "A"): layer.lora_A["default"].weight, (name, "B"): layer.lora_B["default"].weight}
    return found


def parameter_of(layer):
    return getattr(layer, "parameter_name", None)


def step(model, inputs=CAUSAL_LM):
    """{"logits": logits, (layer, factor): gradient, …} of a step of training."""
    model.zero_grad()
    output = model.train()(**inputs)
    output.loss.backward()
    return {"logits": output.logits.detach()} | {name: f.grad.clone() for name, f in factors(model).items()}


def assert_close(ours, theirs):
    """Every value within 1e-5 of the other's norm, and none of them zero."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert value.any() and error(ours[name], value) < 1e-5, name


# ------------------------------------------------------------------------------------------------------- against PEFT

CHOICES = {
    "experts": EXPERTS,
    "experts and linears": EXPERTS | {"target_modules": ["q_proj", "o_proj"], "use_rslora": True},
    "one weight of one layer": EXPERTS | {"target_parameters": ["layers.1.mlp.experts.down_proj"]},
    "the router": EXPERTS | {"target_parameters": ["mlp.ROUTER"]},
    "a linear layer's weight": EXPERTS | {"target_parameters": ["o_proj.weight"]},
    "experts and router": EXPERTS | {"target_parameters": ["ROUTER", "gate_up_proj", "down_proj"]},
    "patterns": EXPERTS
    | {
        "target_modules": ["v_proj"],
        "rank_pattern": {"layers.1.mlp.experts.down_proj": 5, "experts.gate_up_proj": 2},
        "alpha_pattern": {r"layers\.0\..*(v|up)_proj": 7, "down_proj": 1},
    },
}


def chosen(choice, family):
    lora = CHOICES[choice]
    return lora | {"target_parameters": [n.replace("ROUTER", MIXTURES[family][2]) for n in lora["target_parameters"]]}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("family", MIXTURES)
def test_equals_peft_and_its_files(family, choice, tmp_path):
    base, lora = build(family), chosen(choice, family)
    ours, theirs = injected(copy.deepcopy(base), **lora), peft_injected(copy.deepcopy(base), **lora)
    mine, yours = factors(ours), factors(theirs)
    assert mine.keys() == yours.keys() != set() and {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in ours.named_parameters() if any(p is factor for factor in mine.values())
    }
    assert all(torch.equal(factor, yours[name]) for name, factor in mine.items())
    mine, yours = step(ours), step(theirs)
    assert_close(mine, yours)
    assert error(logits(base), yours["logits"]) > 1e-2  # the update shows

    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    written, expected = (load_file(tmp_path / who / WEIGHTS_NAME) for who in ("ours", "theirs"))
    assert written.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in written.items())
    for who in ("ours", "theirs"):
        loaded = load_adapter(copy.deepcopy(base), tmp_path / who)
        assert torch.equal(logits(loaded), logits(ours))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert torch.equal(logits(loaded), logits(theirs))


def test_overlapping_patterns_mean_the_same_in_the_file(tmp_path):
    """PEFT sorts patterns as it writes them, and the first match wins."""
    ranks = {r"layers\.1\..*": 4, "down_proj": 2}
    ours = injected(target_modules=["q_proj"], rank_pattern=ranks, alpha_pattern={"experts.*": 3, r".*\.0\..*": 30})
    assert {len(f) for (_, which), f in factors(ours).items() if which == "A"} == {4, 20, 3, 15, 10}
    save_adapter(ours, tmp_path)
    assert_close({"": logits(peft.PeftModel.from_pretrained(build(), tmp_path))}, {"": logits(ours)})
    assert torch.equal(logits(load_adapter(build(), tmp_path)), logits(ours))


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("init", [True, "gaussian"])
def test_starts_as_peft_and_changes_nothing(family, init):
    base = build(family)
    ours = injected(copy.deepcopy(base), init_lora_weights=init, use_rslora=True)
    theirs = factors(peft_injected(copy.deepcopy(base), init_lora_weights=init, use_rslora=True))
    for (name, factor), value in factors(ours).items():
        assert torch.equal(value, theirs[name, factor]) and value.any() == (factor == "A")
    assert error(logits(ours), logits(base)) < 1e-6


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_reads_what_peft_makes_of_all_linear(family, tmp_path):
    """In models whose experts were linear layers once, PEFT adapts the stacked ones, gate and up at twice the rank."""
    base = build(family)
    theirs = peft_injected(copy.deepcopy(base), target_modules="all-linear", target_parameters=None)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    ranks = {name: len(factor) // 5 for (name, which), factor in factors(ours).items() if which == "A"}
    assert ranks[f"{FIRST}.gate_up_proj"] == 2 * ranks[f"{FIRST}.down_proj"] == 6
    assert_close(step(ours), step(theirs))


# ------------------------------------------------------------------------------------ several adapters, and switching


@pytest.mark.parametrize(
    ("first", "second"),
    [([DOWN], [GATE_UP, DOWN]), ([GATE_UP], [GATE_UP, DOWN]), ([DOWN], [GATE_UP]), ([GATE_UP, DOWN], [DOWN])],
)
def test_adapters_on_different_parameters_are_each_saved_as_peft_nests_it(first, second, tmp_path):
    base, wanted, alone = build(), {"default": first, "second": second}, {}
    model = copy.deepcopy(base)
    for rank, name in enumerate(wanted, 2):
        injected(model, name, rank, r=rank, target_parameters=wanted[name])
        alone[name] = logits(model)
    for name, parameters in wanted.items():
        save_adapter(model, tmp_path / name, adapter_name=name)
        written, outermost = load_file(tmp_path / name / WEIGHTS_NAME), f"base_model.model.{FIRST}"
        places = {parameters[-1]: outermost} | ({GATE_UP: f"{outermost}.base_layer"} if len(parameters) == 2 else {})
        assert sum(key.startswith(outermost) for key in written) == 2 * len(places)
        for parameter, place in places.items():
            layer = lora_layers(model)[f"model.layers.0.{parameter}"]
            assert torch.equal(written[f"{place}.lora_A.weight"], layer.lora_A[name].weight)
            assert torch.equal(written[f"{place}.lora_B.weight"], layer.lora_B[name].weight)
        set_adapter(model, name)
        assert torch.equal(logits(model), alone[name])
        assert {id(p) for p in model.parameters() if p.requires_grad} == set(map(id, lora_parameters(model)))
        assert len(lora_parameters(model)) == 4 * len(parameters)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)
        assert error(logits(theirs), alone[name]) < 1e-5
    assert error(alone["second"], alone["default"]) > 1e-2
    for order in (tuple(wanted), tuple(wanted)[::-1]):
        loaded = copy.deepcopy(base)
        for name in order:
            load_adapter(loaded, tmp_path / name, adapter_name=name)
        for name in order:
            set_adapter(loaded, name)
            assert torch.equal(logits(loaded), alone[name])


def test_disabled_it_is_the_base():
    base = build()
    model = injected(copy.deepcopy(base))
    expected = logits(model)
    with disable_adapters(model):
        assert torch.equal(logits(model), logits(base))
        injected(model, "second")
        assert torch.equal(logits(model), logits(base))
    set_adapter(model, "default")
    assert torch.equal(logits(model), expected) and error(expected, logits(base)) > 1e-2


@pytest.mark.parametrize("keep", ["cpu", "device"])
@pytest.mark.parametrize("family", MIXTURES)
def test_merging_adds_the_update_and_unmerging_takes_it_back_bit_for_bit(family, keep):
    model = injected(build(family), target_parameters=[GATE_UP, DOWN, MIXTURES[family][2]])
    expected, layers = logits(model), lora_layers(model)
    before = snapshot(model)
    merge_lora(model, keep=keep)
    assert error(logits(model), expected) < 1e-5
    for name, layer in layers.items():
        (lora_A, lora_B), old = (f["default"].weight.double() for f in (layer.lora_A, layer.lora_B)), before["values"]
        count, transposed = (1, False) if name.endswith("weight") else (5, family == "gpt_oss")
        delta = torch.einsum("nre,erk->enk", lora_B.view(-1, 3, count), lora_A.view(count, 3, -1)) * 4
        delta = (delta.mT if transposed else delta).reshape(layer.weight.shape)
        assert torch.allclose(layer.weight.double(), old[name].double() + delta, rtol=1e-6, atol=1e-6)
        assert not torch.equal(layer.weight, old[name])
    unmerge_lora(model)
    assert_unchanged(model, before)
    assert torch.equal(logits(model), expected)


def test_what_can_not_be_merged_is_left_alone():
    model = injected()
    lora_layers(model)[f"{FIRST}.down_proj"].lora_B["default"].weight.data[0, 0] = torch.nan
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        LoraFastError, match=r"adapter 'default' holds NaN or inf in model\.layers\.0\.mlp\.experts\.down"
    ):
        merge_lora(model)
    assert all(torch.equal(a, b) or b.isnan().any() for a, b in zip(model.state_dict().values(), before.values()))


@pytest.mark.parametrize("family", MIXTURES)
def test_removing_restores_class_names_and_values(family):
    model = build(family)
    before = snapshot(model)
    names = [GATE_UP, DOWN, MIXTURES[family][2]]
    injected(model, target_parameters=names)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, before["modules"][FIRST][1]) and type(experts) is not before["modules"][FIRST][1]
    assert [name for name in model.state_dict() if ".lora_" not in name] == list(before["values"])
    injected(model, "second", target_parameters=names[1:], target_modules=["q_proj"])
    remove_lora(model)
    assert_unchanged(model, before)
    injected(model)
    merge_lora(model)
    merged = {name: value.clone() for name, value in model.state_dict().items() if ".lora_" not in name}
    expected = logits(model)
    remove_lora(model)
    after = snapshot(model)
    assert all(torch.equal(after["values"][name], value) for name, value in merged.items())
    assert after["modules"].keys() == before["modules"].keys() and torch.equal(logits(model), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole_and_apart(copied):
    model = injected(target_parameters=[GATE_UP, DOWN, "gate.weight"])
    injected(model, "second", target_parameters=[DOWN], seed=6)
    expected = logits(model)
    twin = copied(model)
    assert torch.equal(logits(twin), expected)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}
    for name, layer in lora_layers(twin).items():
        assert layer.owner is twin.get_submodule(name.rpartition(".")[0])
    set_adapter(twin, "default")
    assert error(logits(twin), expected) > 1e-2 and torch.equal(logits(model), expected)
    merge_lora(twin)
    remove_lora(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in build().modules()]
    assert torch.equal(logits(model), expected)


# --------------------------------------------------------------------------------- what training scripts do to a model


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", MIXTURES)
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant):
    model = injected(build(family), target_parameters=[GATE_UP, DOWN, MIXTURES[family][2]])
    inputs = CAUSAL_LM | {"use_cache": False}
    expected = step(model, inputs)
    before = calls_by_path(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, value in step(model, inputs).items():
        assert value.any() and torch.equal(value, expected[name]), name
    twice = {call: 2 * count for call, count in before.items()}
    assert calls_by_path(model) - before == twice and len(twice) == 2


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_and_router_compile_as_one_graph(family):
    torch._dynamo.reset()
    model = injected(build(family, num_hidden_layers=1), target_parameters=[GATE_UP, DOWN, MIXTURES[family][2]])
    block, found = model.model.layers[0].mlp, []
    x, dy = torch.randn(2, 2, 9, 32)
    for call in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        y = call(x)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(dy)
        found.append({"y": y.detach()} | {name: factor.grad.clone() for name, factor in factors(model).items()})
    assert_close(found[1], found[0])
    assert calls_by_path(model).total() == 2  # none of them compiled


def test_a_base_weight_that_is_trained_too_gets_its_gradient():
    ours, theirs = injected(), peft_injected()
    named = {f"{FIRST}.down_proj": ours, f"base_model.model.{FIRST}.base_layer.base_layer.down_proj": theirs}
    trained = [model.get_parameter(name).requires_grad_() for name, model in named.items()]
    assert_close(step(ours), step(theirs))
    assert_close({"base": trained[0].grad}, {"base": trained[1].grad})
    # The other layer's are frozen.
    assert calls_by_path(ours) == {("formed", "down_proj is trained itself"): 1, ("lora_experts", None): 1}


def test_a_call_that_is_not_the_models_own():
    model = injected()
    experts = model.get_submodule(FIRST)
    x, index, weights = torch.randn(4, 32), torch.tensor([[0, 3]] * 4), torch.rand(4, 2)
    expected = experts(x, index, weights)
    found = experts(x, top_k_index=index, top_k_weights=weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    before = dict(experts._parameters)
    with pytest.raises(RuntimeError):  # from inside the base's forward
        experts(x[:, :5], top_k_index=index, top_k_weights=weights)
    assert all(parameter is before[name] for name, parameter in experts._parameters.items())
    reason = "the call has keyword arguments"
    assert calls_by_path(model) == {("lora_experts", None): 1, ("formed", reason): 2}


@pytest.mark.parametrize("with_peft", [False, True])
def test_the_kernels_give_the_same(with_peft):
    inputs, found = {name: value.to(DEVICE) for name, value in CAUSAL_LM.items()}, []
    for backend in ("triton", "torch"):
        model = build("gpt_oss", num_hidden_layers=1).to(DEVICE)
        torch.manual_seed(5)
        if with_peft:
            accelerate_peft(model := peft_injected(model), backend=backend)
        else:
            apply_lora(model, LoraConfig(**EXPERTS, r=3, init_lora_weights=False), backend=backend)
        with count_launches() as launches:
            found.append(step(model, inputs))
        reason = None if backend == "triton" else "backend='torch' was asked for"
        assert [(row.path, row.reason) for row in fusion_report(model).rows] == 2 * [(backend, reason)]
        assert (launches["_table_kernel"] > 0) == (backend == "triton")
    assert_close(*found)


def test_the_rank_that_the_kernels_see_is_an_experts():
    model = build(num_hidden_layers=1).to(DEVICE)
    with pytest.warns(LoraFastWarning, match="r=110 exceeds"):
        apply_lora(model, LoraConfig(**EXPERTS, r=110), backend="triton")
    assert fusion_report(model).counts == {"triton": 2}


def test_the_report_has_a_row_for_each_parameter():
    model = injected(target_modules=["q_proj"], target_parameters=[GATE_UP, DOWN, "gate.weight"])
    rows = {row.module: (row.path, row.reason) for row in fusion_report(model).rows}
    assert rows.keys() == {name for name, _ in factors(model)} and len(rows) == 8
    formed = "W + ΔW is formed at each call: Qwen3MoeTopKRouter is no module of experts as Transformers describes them"
    assert rows[f"{FIRST}.gate_up_proj"] == rows[f"{FIRST}.down_proj"] == ON_CPU
    assert rows["model.layers.0.mlp.gate.weight"] == ("torch", formed)
    logits(model)
    calls = {("lora_experts", None): 2, ("formed", formed.partition(": ")[2]): 2, ("lora_linear", None): 2}
    assert fusion_report(model).calls == calls
    with disable_adapters(model):
        logits(model)
        assert {(row.path, row.reason) for row in fusion_report(model).rows} == {("base", NO_ADAPTER)}
    assert fusion_report(model).calls == calls | {("base", NO_ADAPTER): 6}
    set_adapter(injected(model, "second", target_parameters=[DOWN]), "second")
    paths = {row.module.rpartition(".")[2]: row.path for row in fusion_report(model).rows}
    assert paths == {"q_proj": "base", "gate_up_proj": "base", "down_proj": "torch", "weight": "base"}


@torch.no_grad()
def test_a_module_of_experts_alone(tmp_path):
    bare = build().get_submodule(FIRST)
    arguments = torch.randn(4, 32), torch.tensor([[0, 3]] * 4), torch.rand(4, 2)
    experts = injected(copy.deepcopy(bare), target_parameters=["gate_up_proj", "down_proj"])
    assert (
        [row.module for row in fusion_report(experts).rows]
        == list(lora_layers(experts))
        == ["gate_up_proj", "down_proj"]
    )
    save_adapter(experts, tmp_path / "adapter")
    loaded = load_adapter(copy.deepcopy(bare), tmp_path / "adapter")
    assert torch.equal(loaded(*arguments), experts(*arguments))
    assert error(loaded(*arguments), bare(*arguments)) > 1e-2


# ------------------------------------------------------------------------------------------------------ accelerate_peft


def ours_and_pefts(model):
    """PEFT's model and a copy made fast."""
    fast = copy.deepcopy(model)
    accelerate_peft(fast)
    return fast, model


@pytest.mark.parametrize("lora", [EXPERTS, EXPERTS | {"target_parameters": [DOWN], "target_modules": ["q_proj"]}])
@pytest.mark.parametrize("family", MIXTURES)
def test_accelerated_peft_equals_peft(family, lora):
    fast, stock = ours_and_pefts(peft_injected(build(family), **lora))
    assert_close(step(fast), step(stock))
    calls = calls_by_path(fast)
    assert calls["lora_experts", None] == 2 and {path for path, _ in calls} <= {"lora_experts", "lora_linear"}
    rows = [(row.path, row.reason) for row in fusion_report(fast).rows if "experts" in row.module]
    assert rows == [ON_CPU] * 2 * len(lora["target_parameters"])
    assert torch.equal(logits(copy.deepcopy(fast)), logits(fast))
    assert torch.equal(logits(pickle.loads(pickle.dumps(fast))), logits(fast))


def test_a_bf16_base_errs_no_more_than_pefts():
    """On one module of experts: in a model rounding may send a token elsewhere."""
    module = nn.ModuleDict({"experts": build("mixtral").get_submodule(FIRST)})
    lora = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": []}
    stock = peft.inject_adapter_in_model(peft.LoraConfig(r=3, init_lora_weights=False, **lora), module.bfloat16())
    double, routing = copy.deepcopy(stock).double(), (torch.tensor([[0, 3], [1, 0]] * 8), torch.rand(16, 2))
    double["experts"].get_base_layer().config._experts_implementation, found = "eager", []  # the grouped has no float64
    for parameter in (p for n, p in stock.named_parameters() if "lora_" in n):
        parameter.data = parameter.data.float()  # as get_peft_model leaves them
    for model in (*ours_and_pefts(stock), double):
        dtype = torch.float64 if model is double else torch.bfloat16
        torch.manual_seed(1)
        x, dy = (torch.randn(16, 32).bfloat16().to(dtype) for _ in range(2))
        x.requires_grad_()
        y = model["experts"](x, routing[0], routing[1].bfloat16().to(dtype))
        leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
        found.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    assert len(found[0]) == 6
    for fast, plain, exact in zip(*found, strict=True):
        assert fast.dtype == plain.dtype and error(fast, exact) <= 1.5 * error(plain, exact)


def inner(model):
    return model.base_model.model.get_submodule(FIRST).base_layer


# What is done to both models → why PEFT's forward runs, in the first layer at least.
FALLBACKS = {
    "disabled": (lambda model: model.base_model.disable_adapter_layers(), "adapters are disabled"),
    "merged": (lambda model: model.merge_adapter(), "the adapter is merged into the base weight"),
    "two active": (
        lambda model: model.base_model.set_adapter(["default", "second"]),
        "2 of its adapters are active, not one",
    ),
    "a trained base": (
        lambda model: inner(model).base_layer.gate_up_proj.requires_grad_(),
        "gate_up_proj is trained itself",
    ),
    "the inner one disabled": (lambda model: inner(model).enable_adapters(False), "adapters are disabled"),
    "a hook on the experts": (
        lambda model: inner(model).base_layer.register_forward_hook(lambda module, args, y: 2 * y),
        "what it wraps has hooks or a forward of its own",
    ),
    "a hook on what is wrapped": (
        lambda model: inner(model).register_forward_hook(lambda module, args, y: 2 * y),
        "what it wraps has hooks or a forward of its own",
    ),
    "experts spread": (
        lambda model: setattr(inner(model).base_layer, "_is_expert_parallel", True),
        "its experts are spread over processes",
    ),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_falls_back_to_pefts_forward_with_a_reason(case):
    change, reason = FALLBACKS[case]
    stock = peft_injected()
    stock.add_adapter("second", peft.LoraConfig(r=2, init_lora_weights=False, **EXPERTS))
    fast, stock = ours_and_pefts(stock)
    change(fast), change(stock)
    outputs = [model(**CAUSAL_LM) for model in (fast, stock)]
    assert error(outputs[0].logits.detach(), outputs[1].logits.detach()) < 1e-5
    assert calls_by_path(fast)["peft", reason] > 0
    if outputs[1].loss.requires_grad:
        outputs[0].loss.backward(), outputs[1].loss.backward()
        gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (fast, stock)]
        assert_close(*gradients)
    assert error(logits(fast), logits(stock)) < 1e-5  # without gradients too


def test_a_second_adapter_goes_into_the_same_wrappers():
    model, plain = peft_injected(), peft_injected()
    accelerate_peft(model)
    for each in (model, plain):
        torch.manual_seed(9)
        each.add_adapter("second", peft.LoraConfig(r=2, init_lora_weights=False, **EXPERTS))
        each.set_adapter("second")
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert error(logits(model), logits(plain)) < 1e-5
    assert error(logits(pickle.loads(pickle.dumps(model))), logits(plain)) < 1e-5


def test_a_router_stays_pefts():
    fast, stock = ours_and_pefts(peft_injected(target_parameters=["gate.weight", DOWN]))
    assert_close(step(fast), step(stock))
    rows = {row.module.rpartition("mlp.")[2]: (row.path, row.reason) for row in accelerate_peft(fast).rows}
    assert rows["experts"] == ON_CPU
    assert rows["gate"] == ("peft", "Qwen3MoeTopKRouter is no module of experts as Transformers describes them")
    assert type(fast.base_model.model.model.layers[0].mlp.gate) is ParamWrapper


# ------------------------------------------------------------------------------------------------------------ refusals


def special(model):
    weight = model.get_submodule(FIRST).down_proj.detach().as_subclass(type("Sharded", (torch.Tensor,), {}))
    model.get_submodule(FIRST).down_proj = nn.Parameter(weight, requires_grad=False)


def integers(model):
    weight = torch.zeros(5, 32, 24, dtype=torch.int8)
    model.get_submodule(FIRST).down_proj = nn.Parameter(weight, requires_grad=False)


def nothing(model):
    pass


def of_its_own(name, value):
    return lambda model: setattr(model.get_submodule(FIRST), name, value)


# What is done to a model, the parameter asked for, what is said.
REFUSED = {
    "a near name": (nothing, "experts.gate_up", r"of Qwen3MoeForCausalLM is named 'experts.gate_up'; did you mean exp"),
    "another name": (nothing, "stack", r"is named 'stack'.*tacked experts are in model\.layers\.0\.mlp\.experts"),
    "a module": (nothing, "experts", "is named 'experts'"),
    "a vector": (nothing, "norm.weight", r"model\.norm\.weight is of shape \(32,\); expected \(N, K\), or \(E, N, K\)"),
    "integers": (integers, DOWN, r"down_proj is a Parameter of torch\.int8; expected a plain floating-point parameter"),
    "another tensor": (special, DOWN, r"down_proj is a \w+ of torch\.float32; expected a plain floating-point par"),
    "offloaded": (cpu_offload, DOWN, "_proj is offloaded by accelerate; keep it on a device"),
    "a name taken": (
        of_its_own("lora_down_proj", 3),
        DOWN,
        r"is of a Qwen3MoeExperts with a lora_down_proj of its own",
    ),
    "a forward": (of_its_own("forward", print), DOWN, "forward was replaced on the instance"),
    "a layer's": (
        lambda model: apply_lora(model, LoraConfig(target_modules=["q_proj"])),
        "q_proj.weight",
        r"q_proj\.weight is the weight of a layer that target_modules adapts",
    ),
}


def test_a_layer_and_its_weight_are_not_adapted_both():
    model = build()
    before = snapshot(model)
    with pytest.raises(LoraFastError, match=r"q_proj\.weight is the weight of a layer that target_modules adapts too"):
        injected(model, target_modules=["q_proj"], target_parameters=["q_proj.weight"])
    assert_unchanged(model, before)


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_adapted_is_refused_and_nothing_changed(case):
    change, name, sentence = REFUSED[case]
    model = build()
    change(model)

    def seen():
        parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
        return parameters, {name: (type(m), sorted(m.__dict__), list(m._modules)) for name, m in model.named_modules()}

    before = seen()
    with pytest.raises(LoraFastError, match=sentence):
        apply_lora(model, LoraConfig(target_modules=[], target_parameters=[GATE_UP, name]), adapter_name="another")
    assert seen() == before


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"bias": "all"}, r"bias='all' with target_parameters=\['mlp.experts.gate_up_proj', .*expected 'none'"),
        ({"lora_dropout": 0.1}, r"lora_dropout=0.1 with target_parameters=\['mlp.experts.gate_up_proj', .*expected 0"),
        (
            {"init_lora_weights": "pissa"},
            r"init_lora_weights='pissa' starts from a layer's weight; with target_parameters",
        ),
        ({"init_lora_weights": "olora"}, r"init_lora_weights='olora' starts"),
        ({"target_parameters": DOWN}, r"target_parameters='mlp.experts.down_proj'; expected a list of parameter names"),
        ({"target_parameters": [3]}, r"target_parameters=\[3\]; expected a list"),
        ({"target_parameters": []}, r"target_modules=\[\]; expected module names"),
    ],
)
def test_configs_that_can_not_be_meant(fields, sentence):
    with pytest.raises(LoraFastError, match=sentence):
        LoraConfig(**EXPERTS | fields)


@pytest.mark.parametrize("modules", [[], None, ["q_proj"], "all-linear"])
def test_configs_go_through_pefts_file(modules, tmp_path):
    theirs = peft.LoraConfig(**EXPERTS | {"target_modules": modules}, r=3, rank_pattern={"down_proj": 5})
    theirs.save_pretrained(tmp_path)
    ours = LoraConfig.from_peft(json.loads((tmp_path / CONFIG_NAME).read_text()))
    assert set(ours.target_parameters) == {GATE_UP, DOWN} and ours.rank_of(f"{FIRST}.down_proj") == 5
    assert set(ours.target_modules) == set(modules or [])
    written = ours.to_peft()
    assert LoraConfig.from_peft(json.loads(json.dumps(written))) == ours
    again = peft.LoraConfig(**written)
    assert set(again.target_parameters) == {GATE_UP, DOWN} and set(again.target_modules) == set(ours.target_modules)
    assert "target_parameters" not in LoraConfig(target_modules=["q_proj"]).to_peft()


def test_portable_files_hold_linear_layers_alone(tmp_path):
    with pytest.raises(
        LoraFastError, match=r"portable=True: \S+\.gate_up_proj is no linear layer; save without portable"
    ):
        save_adapter(injected(), tmp_path / "adapter", portable=True)
    assert not (tmp_path / "adapter").exists()


def turned(tensors):
    """As PEFT's older versions stored it: the sides of an expert exchanged."""
    for key in [key for key in tensors if ".lora_A." in key]:
        other = key.replace("lora_A", "lora_B")
        tensors[key], tensors[other] = tensors[other].T.contiguous(), tensors[key].T.contiguous()


# What is changed in the config and among the tensors, what is said.
FILES = {
    "older": (
        {"peft_version": "0.19.0"},
        nothing,
        "peft_version='0.19.0' stored target_parameters with lora_A and lora",
    ),
    "older still": ({"peft_version": "0.18.1.dev0"}, nothing, "peft_version='0.18.1.dev0' stored"),
    "turned": ({}, turned, r"base_layer\.lora_A\.weight is \(15, 48\), the model needs \(15, 32\)"),
    "one less": ({}, lambda tensors: tensors.popitem(), r"lacks model\.layers\.1\.mlp\.experts"),
    "one more": ({"target_parameters": [DOWN]}, nothing, r"holds model\.layers\.0\.mlp\.experts\.base_layer\.lora_A"),
    "another name": ({"target_parameters": ["experts.other"]}, nothing, "is named 'experts.other'"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_do_not_fit_are_refused(case, tmp_path):
    fields, change, sentence = FILES[case]
    save_adapter(injected(), tmp_path)
    config, tensors = json.loads((tmp_path / CONFIG_NAME).read_text()), load_file(tmp_path / WEIGHTS_NAME)
    change(tensors)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config | fields))
    save_file(dict(sorted(tensors.items())), tmp_path / WEIGHTS_NAME)
    model = build()
    before = snapshot(model)
    with pytest.raises(LoraFastError, match=sentence):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("version", ["0.19.1", "0.20.0.dev0", "1.0", ""])
def test_files_of_newer_versions_are_read(version, tmp_path):
    model = injected()
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config | {"peft_version": version}))
    assert torch.equal(logits(load_adapter(build(), tmp_path)), logits(model))


def test_experts_that_seem_to_be_meant_are_named_in_a_warning():
    told = r"in model\.layers\.0\.mlp\.experts \(2 modules so\).*=\['experts.gate_up_proj', 'experts.down_proj'\]"
    with pytest.warns(LoraFastWarning, match=told):
        apply_lora(build(), LoraConfig())
