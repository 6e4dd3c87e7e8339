"""SwiGLU MLPs of real models found by a probe, run as one op, equal to their own forward, and left alone otherwise."""

import copy
import pickle

import peft
import pytest
import torch
from support import CAUSAL_LM, FAMILIES, build, injected
from torch import nn

from lora_fast import (
    LoraConfig,
    LoraFastError,
    accelerate_peft,
    apply_lora,
    disable_adapters,
    fusion_report,
    merge_lora,
    remove_lora,
    set_adapter,
    unmerge_lora,
)
from lora_fast.fusion import calls_by_path
from lora_fast.swiglu_mlp import FusedSwiglu, fuse_mlps, unfuse_mlps

EPS = torch.finfo(torch.float32).eps


def fused(model):
    return [module for module in model.modules() if isinstance(module, FusedSwiglu)]


def step(model, inputs=CAUSAL_LM, seed=1):
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model.train()(**inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def by_layers(model):
    model = copy.deepcopy(model)
    unfuse_mlps(model)
    assert not fused(model)
    return model


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value - theirs[name]).abs().max() <= 128 * EPS * theirs[name].abs().max(), name
        assert value.abs().max() > 0, name


@pytest.mark.parametrize("with_peft", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("family", "mlps"), [("llama", 2), ("qwen2", 2), ("mistral", 2), ("gemma3", 0), ("phi3", 0), ("gpt2", 0), ("t5", 0)]
)
def test_what_is_one_is_found_and_equals_its_layers(family, mlps, p, with_peft):
    lora = {"target_modules": "all-linear", "r": 5, "lora_dropout": p, "init_lora_weights": False}
    if with_peft:
        torch.manual_seed(0)
        model = peft.get_peft_model(build(family), peft.LoraConfig(**lora))
        accelerate_peft(model)
    else:
        model = injected(family, lora=lora)
    assert len(fused(model)) == mlps
    inputs = FAMILIES[family].inputs
    assert_close(step(model, inputs), step(by_layers(model), inputs))
    assert calls_by_path(model)["lora_swiglu_mlp", None] == mlps


@pytest.mark.parametrize(("family", "mlps"), [("llama", 2), ("gemma3", 0)])
def test_on_the_meta_device_the_same_are_found(family, mlps):
    """One of each kind is filled with numbers and probed, so that an estimate sees what a run would."""
    real = fused(injected(family))
    with torch.device("meta"):
        model = build(family)
    apply_lora(model, LoraConfig(r=4, target_modules="all-linear"))
    assert [module.swiglu_layers for module in fused(model)] == [module.swiglu_layers for module in real]
    assert len(real) == mlps
    assert all(parameter.is_meta for parameter in model.parameters())


def test_gate_and_up_are_told_apart_by_what_they_do():
    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.first, self.second, self.third = nn.Linear(8, 20), nn.Linear(20, 8), nn.Linear(8, 20)

        def forward(self, hidden):
            return self.second(self.first(hidden) * nn.functional.silu(self.third(hidden)))

    model = apply_lora(Renamed(), LoraConfig(r=3, init_lora_weights=False))
    assert model.swiglu_layers == ("third", "first", "second") and type(model).__name__ == "Renamed"
    x = torch.randn(5, 8)
    torch.testing.assert_close(model(x), by_layers(model)(x))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.down(nn.functional.gelu(self.gate(x)) * self.up(x)),
        lambda self, x: self.down(nn.functional.gelu(self.gate(x), approximate="tanh") * self.up(x)),
        lambda self, x: self.down(nn.functional.silu(self.gate(x)) * (self.up(x) + 1e-2)),
        lambda self, x: self.down(nn.functional.silu(self.gate(x)) * self.up(x)) + 1e-2 * x,
        lambda self, x: self.down(nn.functional.silu(1.02 * self.gate(x)) * self.up(x)),
        lambda self, x, y: self.down(nn.functional.silu(self.gate(x)) * self.up(y)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_only_looks_like_one_is_left_alone(forward, dtype):
    model = type("Almost", (nn.Module,), {"forward": forward})()
    torch.manual_seed(3)
    model.gate, model.up, model.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)
    model.to(dtype)
    apply_lora(model, LoraConfig(r=3))
    assert not fused(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("limit", [7.0, 16.0, 20.0])
@pytest.mark.parametrize("what", ["gate", "up", "silu"])
def test_a_clamp_that_only_large_numbers_meet_is_seen(what, limit, dtype):
    """As of gpt-oss, DeepSeek-V4, Step-3.7: inputs of usual size never reach it."""

    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)

        def forward(self, x):
            gate, up = self.gate(x), self.up(x)
            gate = gate.clamp(max=limit) if what == "gate" else gate
            up = up.clamp(-limit, limit) if what == "up" else up
            act = nn.functional.silu(gate)
            return self.down((act.clamp(max=limit) if what == "silu" else act) * up)

    model = apply_lora(Clamped().to(dtype), LoraConfig(r=3))
    assert not fused(model)
    limit = 1e9
    fuse_mlps(model)
    assert len(fused(model)) == (dtype != torch.float16)  # which has no number as large


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("large", ["adapter", "a few of gate's outputs"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_activation_that_differs_only_near_zero_is_told_apart(activation, large, dtype):
    model = type("Other", (nn.Module,), {"forward": lambda self, x: self.down(self.act(self.gate(x)) * self.up(x))})()
    torch.manual_seed(3)
    model.act, model.gate, model.up, model.down = (
        getattr(nn.functional, activation),
        *(nn.Linear(*sizes, bias=False) for sizes in ((64, 96), (64, 96), (96, 64))),
    )
    if large != "adapter":
        with torch.no_grad():
            model.gate.weight[:2] *= 1000
    alpha = 3000 if large == "adapter" else 3
    apply_lora(model.to(dtype), LoraConfig(r=3, lora_alpha=alpha, target_modules=["gate", "up", "down"]))
    with torch.no_grad():
        model.gate.lora_B["default"].weight.normal_(std=0.1)
    fuse_mlps(model)
    assert not fused(model)
    model.act = nn.functional.silu
    fuse_mlps(model)
    assert fused(model)


class Halved(nn.Linear):
    """A forward of its own, which no op of several layers computes."""

    def forward(self, x):
        return 0.5 * super().forward(x)


class Swiglu(nn.Module):
    """A SwiGLU MLP of any linear layers, with a dropout of its own."""

    def __init__(self, linear=nn.Linear, p=0.0):
        super().__init__()
        torch.manual_seed(3)
        self.gate, self.up, self.down = linear(8, 20), linear(8, 20), linear(20, 8)
        self.dropout = nn.Dropout(p)

    def forward(self, x):
        return self.down(self.dropout(nn.functional.silu(self.gate(x)) * self.up(x)))


def test_layers_with_a_forward_of_their_own_are_called():
    model = apply_lora(Swiglu(Halved), LoraConfig(r=3, init_lora_weights=False))
    assert not fused(model)
    x = torch.randn(5, 8)
    with disable_adapters(model):
        base = model.gate(x)
    gate = model.gate
    update = x @ gate.lora_A["default"].weight.t() @ gate.lora_B["default"].weight.t() * (8 / 3)
    torch.testing.assert_close(gate(x), base + update)
    torch.testing.assert_close(base, 0.5 * nn.functional.linear(x, gate.weight, gate.bias))
    torch.testing.assert_close(model(x), model.down(nn.functional.silu(gate(x)) * model.up(x)))


@pytest.mark.parametrize(("p", "mlps"), [(0.0, 1), (0.01, 0)])
def test_a_dropout_of_its_own_is_kept(p, mlps):
    model = Swiglu(p=p).train()
    torch.manual_seed(9)
    apply_lora(model, LoraConfig(r=3))
    after = torch.rand(1)
    assert len(fused(model)) == mlps and model.training and model.dropout.training
    # What a model without an MLP draws for adapters of the same sizes: the probe draws nothing that lasts.
    model = nn.Sequential(*Swiglu().children())
    torch.manual_seed(9)
    apply_lora(model, LoraConfig(r=3))
    assert torch.equal(torch.rand(1), after)


def test_hooks_on_the_mlp_see_calls_of_the_model_alone():
    model, seen = Swiglu(), []
    model.register_forward_hook(lambda module, args, output: seen.append(output) or 2 * output)
    apply_lora(model, LoraConfig(r=3, init_lora_weights=False))
    assert len(fused(model)) == 1 and not seen
    x = torch.randn(5, 8)
    torch.testing.assert_close(model(x), by_layers(model)(x))
    assert len(seen) == 2


def test_hooks_for_all_modules_see_each_layer():
    model, seen = apply_lora(Swiglu(), LoraConfig(r=3)), []
    handle = nn.modules.module.register_module_full_backward_hook(lambda module, *_: seen.append(module))
    try:
        model(torch.randn(5, 8, requires_grad=True)).sum().backward()
    finally:
        handle.remove()
    assert {model.gate, model.up, model.down} <= set(seen)


def test_a_backend_that_can_not_run_is_refused_by_the_first_call():
    model = build("llama", dtype=torch.float64)  # which no kernel takes
    apply_lora(model, LoraConfig(r=4), backend="triton")
    assert len(fused(model)) == 2
    assert {module.backend for module in model.modules() if hasattr(module, "linear_call")} == {"triton"}
    with pytest.raises(LoraFastError, match="backend='triton': "):
        model(**CAUSAL_LM)


def test_states_in_which_its_own_forward_runs():
    model = injected()
    own = by_layers(model).eval()
    model.eval()
    inputs = CAUSAL_LM
    with torch.no_grad():
        expected = own(**inputs).logits
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-5)
        before = calls_by_path(model)["lora_swiglu_mlp", None]
        with disable_adapters(model), disable_adapters(own):
            assert torch.allclose(model(**inputs).logits, own(**inputs).logits, atol=1e-5)
        merge_lora(model)
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-5)
        unmerge_lora(model)
        handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: output * 2)
        own.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: output * 2)
        assert torch.allclose(model(**inputs).logits, own(**inputs).logits, atol=1e-5)
        handle.remove()
    reasons = {reason for path, reason in calls_by_path(model) if path == "layers"}
    assert reasons == {"not all three layers run a plain adapter", "a layer inside has hooks or a forward of its own"}
    assert calls_by_path(model)["lora_swiglu_mlp", None] == before + 1  # layer 1, beside the hooked one
    apply_lora(model, LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="second")
    step(model)
    set_adapter(model, "default")
    step(model)


def test_the_probe_leaves_no_trace():
    plain = build("llama").train()
    base = copy.deepcopy(plain)
    torch.manual_seed(9)
    apply_lora(base, LoraConfig(r=4))
    after = torch.rand(1)
    torch.manual_seed(9)
    peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=4, target_modules="all-linear"))
    assert torch.equal(torch.rand(1), after)  # PEFT, which probes nothing, draws as many numbers
    assert len(fused(base)) == 2 and not calls_by_path(base)
    assert [m.training for m in base.modules()] == [True] * len(list(base.modules()))


def test_copies_pickles_and_removal():
    model = injected()
    expected = step(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(fused(twin)) == 2
        again = step(twin)
        assert all(torch.equal(again[name], expected[name]) for name in expected)
    kind = type(build("llama").model.layers[0].mlp)
    remove_lora(model)
    mlp = model.model.layers[0].mlp
    assert type(mlp) is kind and "swiglu_layers" not in mlp.__dict__ and "calls_by_path" not in mlp.__dict__


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    model = injected(lora={"lora_dropout": 0.1})
    inputs = CAUSAL_LM | {"use_cache": False}
    expected = step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = step(model, inputs)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_compiles_without_a_break():
    model = injected().eval()
    expected = model(**CAUSAL_LM).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**CAUSAL_LM).logits, expected, rtol=0, atol=1e-5)


class WithModules(Swiglu):
    def __init__(self):
        super().__init__()
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.dropout(self.act(self.gate(x)) * self.up(x)))


@pytest.mark.parametrize("change", ["hook", "other activation", "dropout", "none"])
def test_what_happens_to_the_modules_inside_is_seen(change):
    model = apply_lora(WithModules(), LoraConfig(r=3, init_lora_weights=False)).train()
    assert len(fused(model)) == 1
    if change == "hook":
        model.act.register_forward_hook(lambda module, args, output: 2 * output)
    elif change == "other activation":
        model.act = nn.GELU()
    elif change == "dropout":
        model.dropout.p = 0.5
    x = torch.randn(5, 8)
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, by_layers(model)(x))
    assert next(iter(calls_by_path(model)))[0] == ("lora_swiglu_mlp" if change == "none" else "layers")


def test_it_goes_though_accelerate_hooked_it_since():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = injected()
    plain = copy.deepcopy(model)
    remove_lora(plain)
    expected = plain(**CAUSAL_LM).logits
    for layer in model.model.layers:
        add_hook_to_module(layer.mlp, ModelHook())
    remove_lora(model)
    assert torch.equal(model(**CAUSAL_LM).logits, expected)


@pytest.mark.parametrize("with_peft", [False, True])
def test_the_report_says_so(with_peft):
    if with_peft:
        lora = {"target_modules": "all-linear", "r": 5}
        model = peft.get_peft_model(build("llama"), peft.LoraConfig(**lora))
        report = accelerate_peft(model)
    else:
        model = injected()
        step(model)
        report = fusion_report(model)
        assert report.calls["lora_swiglu_mlp", None] == 2
        assert "2 calls so far took lora_swiglu_mlp" in str(report)
    assert [(row.path, row.reason) for row in report.mlps] == 2 * [("lora_swiglu_mlp", None)]
    assert "2 MLPs of three of them\n     2 lora_swiglu_mlp" in str(report)


def test_the_report_says_why_an_mlp_stays_as_it_is():
    model = injected("gemma3")
    report = fusion_report(model)
    assert {row.path for row in report.mlps} == {"layers"} and len(report.mlps) == len(model.model.layers)
    assert "something else than down(silu(gate(x)) * up(x)), on random rows (e.g. model.layers.0.mlp)" in str(report)
    model = build("llama")
    model.model.layers[0].mlp.forward = model.model.layers[0].mlp.forward
    apply_lora(model, LoraConfig(r=3, target_modules="all-linear"))
    first, second = fusion_report(model).mlps
    assert first.reason.startswith("its forward is not its class's") and second.path == "lora_swiglu_mlp"
    remove_lora(model)
    assert not fusion_report(model).mlps
