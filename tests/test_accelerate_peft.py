"""accelerate_peft against stock PEFT: equal numbers, every reason to fall back, the model's life, the bytes kept."""

import copy
import gc
import io
import pickle
import sys
from contextlib import nullcontext
from functools import partial

import peft
import pytest
import support
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lora_fast
from lora_fast import LoraFastError, accelerate_peft
from lora_fast.fusion import calls_by_path
from lora_fast.peft_layers import FastForward, read_adapter

K, N = 33, 70  # sizes that no tile divides


class Net(nn.Module):
    """One linear layer, with `base` in its place where given."""

    def __init__(self, base: nn.Module | None = None):
        super().__init__()
        self.linear = nn.Linear(K, N) if base is None else base

    def forward(self, x, **kwargs):
        return self.linear(x, **kwargs)


def adapted(model: nn.Module, **config) -> nn.Module:
    """`model` with PEFT's adapter "default" on `linear`, B not zero."""
    defaults = {"r": 5, "lora_alpha": 7, "lora_dropout": 0.05, "target_modules": ["linear"]}
    model = peft.inject_adapter_in_model(peft.LoraConfig(**defaults | config), model)
    return randomized(model).train()


@torch.no_grad()
def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def fast_copy(model: nn.Module) -> nn.Module:
    fast = copy.deepcopy(model)
    accelerate_peft(fast)
    return fast


def pair(base: nn.Module | None = None, **config) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    stock = adapted(Net(base), **config)
    return stock, fast_copy(stock)


def llama(*, dtype=torch.float32, **config) -> nn.Module:
    """PEFT on a tiny Llama, with a dropout of 0.05."""
    defaults = {"r": 5, "target_modules": "all-linear", "lora_dropout": 0.05, "task_type": "CAUSAL_LM"}
    return randomized(support.peft_model(support.build("llama", dtype=dtype), **defaults | config)).train()


def x_like(*shape, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()


def run(model: nn.Module, x: Tensor, seed: int = 1, **kwargs) -> dict[str, Tensor]:
    """y, dx and the gradient of every parameter that has one, from one seed."""
    x = x.detach().requires_grad_(x.is_floating_point())
    model.zero_grad()
    torch.manual_seed(seed)
    y = model(x, **kwargs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4))
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "dx": x.grad} | gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train_step(model: nn.Module, inputs: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(**inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | gradients(model)


def error(values: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each value in the maximum norm; a value of all zeros where the exact one isn't fails."""
    assert values.keys() == exact.keys()
    for name in values:
        assert values[name].count_nonzero() or not exact[name].count_nonzero(), f"{name} is all zero"
    return {
        name: float((values[name].double() - exact[name]).abs().max() / exact[name].abs().max().clamp_min(1e-30))
        for name in values
    }


def assert_as_exact_as(fast, stock, exact, *, factor: float, floor: float) -> None:
    ours, theirs = error(fast, exact), error(stock, exact)
    for name in ours:
        assert ours[name] <= factor * theirs[name] + floor, f"{name}: {ours[name]:.2e} against {theirs[name]:.2e}"


def assert_equal(values: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert values.keys() == expected.keys()
    for name in values:
        assert torch.equal(values[name], expected[name]), name


def paths(model: nn.Module) -> set[str]:
    """The paths that layers' calls took; alone, with others of the same input or within an MLP is one path here."""
    fused = {"lora_linears": "lora_linear", "lora_swiglu_mlp": "lora_linear"}
    return {fused.get(path, path) for path, _ in calls_by_path(model) if path != "layers"}


def layer_calls(model: nn.Module) -> int:
    """How many calls of layers that was: an MLP in one op is three."""
    layers = {"lora_swiglu_mlp": 3, "layers": 0}
    return sum(layers.get(path, 1) * count for (path, _), count in calls_by_path(model).items())


# ---------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_equals_stock_peft(family, dropout, checkpointing):
    lora = {"r": 5, "target_modules": "all-linear", "lora_dropout": dropout, "fan_in_fan_out": family == "gpt2"}
    stock = randomized(support.peft_model(support.build(family), **lora)).train()
    inputs = support.FAMILIES[family].inputs
    fast = fast_copy(stock)
    exact = train_step(copy.deepcopy(stock).double(), inputs)
    plain = train_step(stock, inputs)
    if checkpointing:
        fast.enable_input_require_grads()
        reentrant = checkpointing == "reentrant"
        fast.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_as_exact_as(train_step(fast, inputs), plain, exact, factor=3, floor=1e-6)
    assert paths(fast) == {"lora_linear"}
    layers = sum(isinstance(module, FastForward) for module in fast.modules())
    assert layer_calls(fast) == (2 if checkpointing else 1) * layers
    assert layers == len(support.adapted(stock))


@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_fp32_adapters_on_a_bf16_base_err_no_more_than_bf16_adapters(rank, dropout):
    stock, fast = pair(nn.Linear(K, N).bfloat16(), r=rank, lora_dropout=dropout)
    assert stock.linear.lora_A["default"].weight.dtype == torch.bfloat16
    fast.linear.lora_A.float(), fast.linear.lora_B.float()
    x = x_like(2, 48, K, dtype=torch.bfloat16)
    exact = run(copy.deepcopy(stock).double(), x.double())
    values = run(fast, x)
    assert_as_exact_as(values, run(stock, x), exact, factor=1.5, floor=1e-3)
    assert values["y"].dtype == torch.bfloat16
    assert values["linear.lora_A.default.weight"].dtype == torch.float32
    assert paths(fast) == {"lora_linear"}


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast_errs_no_more_than_stock_peft(base_dtype, x_dtype):
    stock, fast = pair(nn.Linear(K, N).to(base_dtype))
    for model in (stock, fast):
        model.linear.lora_A.float(), model.linear.lora_B.float()
    x = x_like(2, 48, K, dtype=x_dtype)
    exact = run(copy.deepcopy(stock).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        expected, values = run(stock, x), run(fast, x)
    assert_as_exact_as(values, expected, exact, factor=1.5, floor=1e-3)
    assert {name: v.dtype for name, v in values.items()} == {name: v.dtype for name, v in expected.items()}
    assert paths(fast) == {"lora_linear"}


INPUTS = {
    "vector": x_like(K),
    "no rows": x_like(0, K),
    "four dimensions": x_like(2, 3, 5, K),
    "transposed": x_like(K, 12).detach().t(),
    "every second row": x_like(12, K).detach()[::2],
}


@pytest.mark.parametrize("shape", INPUTS)
def test_any_shape_and_stride_of_the_input_drops_the_same_elements(shape):
    stock, fast = pair(lora_dropout=0.5)
    expected, values = run(stock, INPUTS[shape]), run(fast, INPUTS[shape])
    for name in expected:
        torch.testing.assert_close(values[name], expected[name], rtol=1e-5, atol=1e-5)
    assert paths(fast) == {"lora_linear"}


def test_dropout_follows_its_own_training_flag_and_evaluation_draws_nothing():
    stock, fast = pair(lora_dropout=0.5)
    x = x_like(12, K)
    for mode in (lambda model: model.eval(), lambda model: model.linear.lora_dropout.train()):
        mode(stock), mode(fast)
        expected, values = run(stock, x), run(fast, x)
        for name in expected:
            torch.testing.assert_close(values[name], expected[name], rtol=1e-5, atol=1e-5)
    fast.eval()
    state = torch.get_rng_state()
    fast(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_base_that_is_trained_too_gets_its_gradients():
    stock, fast = pair()
    for model in (stock, fast):
        model.linear.base_layer.requires_grad_(True)
    expected, values = run(stock, x_like(12, K)), run(fast, x_like(12, K))
    assert "linear.base_layer.weight" in expected and "linear.base_layer.bias" in expected
    for name in expected:
        torch.testing.assert_close(values[name], expected[name], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------ the base layer as it is


class Quantized(nn.Linear):
    """Stands for a quantized layer: computes in bf16 and answers in x's dtype."""

    def forward(self, x):
        return nn.functional.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16()).to(x.dtype)


class Plain(Tensor):
    """A tensor subclass without a behaviour of its own, as sharded and quantized ones are with one."""


def hooked(base: nn.Module) -> None:
    base.register_forward_hook(lambda module, args, y: y + 1)


def replaced(base: nn.Module) -> None:
    base.forward = partial(lambda forward, x: forward(x) * 2, base.forward)


def special(base: nn.Module) -> None:
    base.weight = nn.Parameter(base.weight.detach().as_subclass(Plain), requires_grad=False)


BASES = {"quantized": (Quantized, None)} | {
    f"{change.__name__} {kind.__name__}": (kind, change)
    for kind in (nn.Linear, Quantized)
    for change in (hooked, replaced, special)
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_a_base_that_is_more_than_a_product_is_called_and_the_update_fused(base, dtype):
    kind, change = BASES[base]
    stock, fast = pair(kind(K, N).to(dtype))
    double = copy.deepcopy(stock).double()
    if change:
        change(stock.linear.base_layer), change(fast.linear.base_layer), change(double.linear.base_layer)
    x = x_like(12, K, dtype=dtype)
    exact, expected, values = run(double, x.double()), run(stock, x), run(fast, x)
    factor, floor = (3, 1e-6) if dtype == torch.float32 else (1.5, 1e-3)
    assert_as_exact_as(values, expected, exact, factor=factor, floor=floor)
    ((path, reason),) = calls_by_path(fast)
    assert path == "lora_update" and "called as it is" in reason
    assert accelerate_peft(fast).rows[0].reason.startswith(reason)


# -------------------------------------------------------------------------------------------- falling back, by reason


def two_adapters(model, active, **config) -> None:
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=3, target_modules=["linear"], **config), model, adapter_name="second"
    )
    randomized(model)
    model.linear.set_adapter(active)


class OwnDora(DoraLinearVariant):
    """A variant that nobody knows."""


def with_dora(model, *, kind=False, change=None, offload=False) -> None:
    two_adapters(model, "second", use_dora=True)
    if kind:
        model.linear.lora_variant["second"] = OwnDora()
    if change is not None:
        change(model.linear.lora_magnitude_vector["second"])
    model.linear.ephemeral_gpu_offload = offload


def set_layer(name, value):
    return lambda model: setattr(model.linear, name, value)


def on(part, function):
    """A change of lora_A, lora_B or lora_dropout of the adapter."""
    return lambda model: function(getattr(model.linear, part)["default"])


def put(part, module):
    return lambda model: getattr(model.linear, part).update({"default": module})


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Halve(nn.Module):
    def forward(self, weight):
        return weight / 2


def with_bias(model):
    two_adapters(model, "second", lora_bias=True)


def parametrized(factor):
    parametrize.register_parametrization(factor, "weight", Halve())


HOOKS = {
    "forward hook": lambda factor: factor.register_forward_hook(lambda module, args, y: y * 2),
    "forward pre-hook": lambda factor: factor.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "backward hook": lambda factor: factor.register_full_backward_hook(lambda module, dx, dy: (dx[0] * 2,)),
    "backward pre-hook": lambda factor: factor.register_full_backward_pre_hook(lambda module, dy: (dy[0] * 2,)),
    "own forward": replaced,
}

# What is done to both models → a part of the reason that the counter must show.
FALLBACKS = {
    "disabled": (lambda model: model.linear.enable_adapters(False), "disabled"),
    "merged": (lambda model: model.linear.merge(), "merged"),
    "two active": (lambda model: two_adapters(model, ["default", "second"]), "2 of its adapters"),
    "none active": (lambda model: model.linear.set_adapter([]), "0 of its adapters"),
    "a variant": (lambda model: with_dora(model, kind=True), "a LoRA variant, OwnDora"),
    "hook on magnitude": (lambda model: with_dora(model, change=hooked), "its magnitude is sharded, or has hooks"),
    "parametrized magnitude": (lambda model: with_dora(model, change=parametrized), "its magnitude is sharded, or"),
    "DoRA by way of a GPU": (lambda model: with_dora(model, offload=True), "ephemeral_gpu_offload"),
    "lora_bias": (with_bias, "bias of its own"),
    "uncast input": (set_layer("cast_input_dtype_enabled", False), "cast of the input"),
    "tensor scaling": (lambda model: model.linear.scaling.update(default=torch.tensor(0.3)), "scaling is a tensor"),
    "other factor": (put("lora_A", OwnLinear(K, 5, bias=False)), "OwnLinear"),
    "parametrized A": (on("lora_A", parametrized), "ParametrizedLinear"),
    "special tensor": (on("lora_B", special), "special tensor"),
    "other dropout": (put("lora_dropout", nn.AlphaDropout(0.5)), "AlphaDropout"),
    "all dropped": (put("lora_dropout", nn.Dropout(1.0)), "drops everything"),
    "hook on dropout": (on("lora_dropout", hooked), "nn.Dropout"),
    **{
        f"{name} on {part}": (on(part, function), "hooks or a forward of its own")
        for name, function in HOOKS.items()
        for part in ("lora_A", "lora_B")
    },
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_falls_back_to_pefts_forward_with_a_reason(case):
    change, reason = FALLBACKS[case]
    stock, fast = pair()
    torch.manual_seed(7), change(stock)
    torch.manual_seed(7), change(fast)
    x = x_like(12, K)
    assert_equal(run(fast, x), run(stock, x))
    ((path, shown),) = calls_by_path(fast)
    assert path == "peft" and reason in shown
    if case != "all dropped":  # p is read when it acts
        assert accelerate_peft(fast).rows[0].path == "peft"


@pytest.mark.parametrize("hidden", ["adapter_names", "autocast float64", "bf16 adapters", "int32", "global hook"])
def test_falls_back_for_how_it_is_called(hidden):
    stock, fast = pair()
    x, kwargs, context = x_like(12, K), {}, nullcontext()
    if hidden == "adapter_names":
        kwargs, reason = {"adapter_names": ["default", "__base__"] * 6}, "besides the input"
    elif hidden == "autocast float64":
        x, context, reason = x.detach().double(), torch.autocast("cpu", torch.bfloat16), "autocast"
        stock.double(), fast.double()
    elif hidden == "bf16 adapters":
        reason = "the adapter is in torch.bfloat16"
        for model in (stock, fast):
            model.linear.lora_A.bfloat16(), model.linear.lora_B.bfloat16()
    elif hidden == "int32":
        x, reason = torch.ones(12, K, dtype=torch.int32), "floating-point"
        for model in (stock, fast):
            model.linear.base_layer.forward = lambda x: torch.ones(12, N)
    else:
        reason = "hooks for all modules"
    with context:
        handle = register_module_forward_hook(lambda *_: None) if hidden == "global hook" else None
        try:
            values, expected = run(fast, x, **kwargs), run(stock, x, **kwargs)
        finally:
            if handle:
                handle.remove()
    assert_equal(
        {n: v for n, v in values.items() if v is not None}, {n: v for n, v in expected.items() if v is not None}
    )
    assert all(path == "peft" and reason in shown for path, shown in calls_by_path(fast))


@pytest.mark.parametrize("mismatch", ["input", "factors"])
def test_mismatched_dtypes_are_refused_in_pefts_words(mismatch):
    stock, fast = pair()
    x = x_like(12, K)
    for model in (stock, fast):
        if mismatch == "input":
            model.linear.base_layer.bfloat16()
        else:
            model.linear.lora_B.bfloat16()
    messages = []
    for model in (stock, fast):
        with pytest.raises(RuntimeError) as caught:
            model(x)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert paths(fast) == {"peft"}


def test_factors_on_the_meta_device_are_refused():
    stock, _ = pair()
    stock.linear.lora_A.to("meta")
    assert "meta" in read_adapter(stock.linear, "default")


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_graph_holds_pefts_own_ops(strict):
    stock, fast = pair(lora_dropout=0.0)
    x = x_like(12, K).detach()
    program = torch.export.export(fast.eval(), (x,), strict=strict)
    assert "lora_fast" not in str(program.graph)
    assert torch.equal(program.module()(x), stock.eval()(x))


def test_a_traced_graph_holds_pefts_own_ops():
    stock, fast = pair(lora_dropout=0.0)
    x = x_like(12, K).detach()
    traced = torch.jit.trace(fast.eval(), (x,), check_trace=False)
    assert torch.equal(traced(x), stock.eval()(x))
    assert paths(fast) == {"peft"}


def tangents(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        return torch.autograd.forward_ad.unpack_dual(model(dual)).tangent


def factor_gradients(model: nn.Module, x: Tensor) -> Tensor:
    """Of each row of x by itself."""
    weights = {name: p.detach() for name, p in model.named_parameters() if "lora_A" in name}

    def loss(weights, row):
        return torch.func.functional_call(model, weights, (row[None],)).square().sum()

    (rows,) = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x).values()
    return rows


TRANSFORMS = {
    "grad and vmap": factor_gradients,
    "vmap": lambda model, x: torch.func.vmap(model)(x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (torch.ones_like(x),))[1],
    "dual numbers": tangents,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms_run_pefts_own_forward(transform):
    stock, fast = pair(lora_dropout=0.0)
    x = x_like(12, K).detach()
    values, expected = (TRANSFORMS[transform](model, x) for model in (fast, stock))
    assert expected.count_nonzero() and torch.equal(values, expected)
    assert paths(fast) == {"peft"}


# ------------------------------------------------------------------------------------------------- the model's life


def test_lives_through_everything_that_peft_does(tmp_path):
    stock = llama()
    fast = fast_copy(stock)
    names = [name for name, _ in (*fast.named_parameters(), *fast.named_buffers())]
    assert names == [name for name, _ in (*stock.named_parameters(), *stock.named_buffers())]
    assert list(fast.state_dict()) == list(stock.state_dict())
    second = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")

    def each(function, *, path=None):
        """Does the same to both, compares the logits, and asks which paths these calls took."""
        answers = []
        for model in (stock, fast):
            torch.manual_seed(2)
            function(model)
            randomized(model).eval()
            for module in model.modules():
                module.__dict__.get("calls_by_path", {}).clear()
            answers.append(model(input_ids=support.TOKENS).logits)
        torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-5)
        if path:
            assert paths(fast) == path

    each(lambda model: None, path={"lora_linear"})
    each(lambda model: model.merge_adapter(), path={"peft"})
    each(lambda model: model.unmerge_adapter(), path={"lora_linear"})
    each(lambda model: model.add_adapter("second", second), path={"lora_linear"})
    each(lambda model: model.set_adapter("second"), path={"lora_linear", "peft"})
    each(lambda model: model.base_model.set_adapter(["default", "second"]), path={"lora_linear", "peft"})
    each(lambda model: model.set_adapter("default"), path={"lora_linear"})
    each(lambda model: model.delete_adapter("second"), path={"lora_linear"})
    each(lambda model: model.base_model.disable_adapter_layers(), path={"peft"})
    each(lambda model: model.base_model.enable_adapter_layers(), path={"lora_linear"})
    with stock.disable_adapter(), fast.disable_adapter():
        each(lambda model: None, path={"peft"})
    with peft.helpers.rescale_adapter_scale(stock, 0.5), peft.helpers.rescale_adapter_scale(fast, 0.5):
        each(lambda model: None, path={"lora_linear"})

    expected = stock(input_ids=support.TOKENS).logits
    for name, model in {"stock": stock, "fast": fast}.items():
        model.save_pretrained(tmp_path / name)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("stock", "fast")]
    assert files[0].read_bytes() == files[1].read_bytes()
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close(twin(input_ids=support.TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
        assert paths(twin) == {"lora_linear"}
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False)(input_ids=support.TOKENS).logits.shape == expected.shape

    resumed = peft.PeftModel.from_pretrained(support.build("llama"), tmp_path / "fast", is_trainable=True).eval()
    accelerate_peft(resumed)
    torch.testing.assert_close(resumed(input_ids=support.TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    resumed.load_adapter(tmp_path / "stock", "again")
    resumed.set_adapter("again")
    torch.testing.assert_close(resumed(input_ids=support.TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    assert paths(resumed) == {"lora_linear"}
    assert repr(fast).replace("LoraFastPeftLinear", "Linear") == repr(stock)
    assert torch.equal(
        fast.generate(input_ids=support.TOKENS, max_new_tokens=3, do_sample=False),
        stock.generate(input_ids=support.TOKENS, max_new_tokens=3, do_sample=False),
    )
    merged, expected = fast.merge_and_unload(), stock.merge_and_unload()
    assert not any(isinstance(module, PeftLinear) for module in merged.modules())
    assert torch.equal(merged(input_ids=support.TOKENS).logits, expected(input_ids=support.TOKENS).logits)


def test_a_batch_of_several_adapters_equals_stock_peft():
    stock = llama()
    torch.manual_seed(3)
    stock.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    fast = fast_copy(randomized(stock)).eval()
    rows = {"input_ids": support.TOKENS, "adapter_names": ["second", "__base__"]}
    assert torch.equal(fast(**rows).logits, stock.eval()(**rows).logits)
    assert paths(fast) == {"peft"}


def test_modules_to_save_and_token_indices_train_beside_it():
    stock = llama(target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[1, 5])
    fast = fast_copy(stock)
    expected, values = train_step(stock, support.CAUSAL_LM), train_step(fast, support.CAUSAL_LM)
    assert any("modules_to_save" in name for name in values) and any("trainable_tokens" in name for name in values)
    for name in expected:
        torch.testing.assert_close(values[name], expected[name], rtol=1e-5, atol=1e-6)


class TokenData(torch.utils.data.Dataset):
    rows = torch.randint(3, support.VOCABULARY, (16, 9), generator=torch.Generator().manual_seed(6))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def trainer_losses(folder, *, fast: bool, resume: bool = False, **arguments):
    """Losses of every step of a Trainer run with dropout 0.05, and the adapter at its end."""
    torch.manual_seed(0)
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        seed=3,
        report_to="none",
        disable_tqdm=True,
        **arguments,
    )
    trainer = Trainer(model=llama(), args=settings, train_dataset=TokenData())
    if fast:
        accelerate_peft(trainer.model)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    adapter = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return losses, adapter, paths(trainer.model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_of_a_trainer_run_equal_stock_pefts_and_resume(tmp_path, checkpointing):
    arguments = {"gradient_checkpointing": checkpointing}
    expected, expected_adapter, _ = trainer_losses(tmp_path / "stock", fast=False, **arguments)
    losses, adapter, taken = trainer_losses(tmp_path / "fast", fast=True, **arguments)
    resumed, resumed_adapter, _ = trainer_losses(tmp_path / "fast", fast=True, resume=True, **arguments)
    assert taken == {"lora_linear"}
    assert len(expected) == 4 and len(set(expected)) == 4
    assert losses == pytest.approx(expected, abs=2e-5) and resumed == pytest.approx(expected, abs=2e-5)
    for name, value in expected_adapter.items():
        torch.testing.assert_close(adapter[name], value, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(resumed_adapter[name], value, rtol=1e-3, atol=1e-4)


def test_compiles_whole_and_drops_the_same_elements():
    stock = llama()
    fast = fast_copy(stock)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    expected = train_step(stock, support.CAUSAL_LM)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            values = train_step(compiled, support.CAUSAL_LM)
    for name, value in expected.items():
        name = name if name == "loss" else f"_orig_mod.{name}"
        torch.testing.assert_close(values[name], value, rtol=1e-4, atol=1e-6)
    assert not calls_by_path(fast)
    assert not torch._dynamo.utils.counters["graph_break"]


# ----------------------------------------------------------------------------------------------- report and refusals


def test_the_report_is_printed_and_a_second_call_only_reports(capsys):
    model = llama(target_modules=["q_proj", "embed_tokens"])
    capsys.readouterr()
    report = accelerate_peft(model)
    assert capsys.readouterr().out == f"{report}\n"
    assert report.counts == {"torch": 2, "peft": 1}
    (embedding,) = [row for row in report.rows if row.path == "peft"]
    assert embedding.module.endswith("embed_tokens") and "Embedding has no fast path" in embedding.reason
    train_step(model, support.CAUSAL_LM)
    before = calls_by_path(model)
    assert accelerate_peft(model) == report and calls_by_path(model) == before and before.total() == 2
    model.add_adapter("wider", peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert accelerate_peft(model).counts == {"torch": 2, "peft": 3}  # "default" is active, v_proj doesn't have it
    model.set_adapter("wider")
    assert accelerate_peft(model).counts == {"torch": 4, "peft": 1}


def bare_lora_model():
    return llama().base_model


def mixed_model():
    config = peft.LoraConfig(r=5, target_modules=["q_proj"])
    return peft.get_peft_model(support.build("llama"), config, mixed=True)


def transformers_model():
    model = support.build("llama")
    model.add_adapter(peft.LoraConfig(r=5, target_modules=["q_proj"]))
    return model


def wrapped():
    return nn.DataParallel(llama())


@pytest.mark.parametrize("make", [bare_lora_model, mixed_model, transformers_model, wrapped])
def test_accepts_whatever_holds_pefts_layers(make):
    model = make()
    accelerate_peft(model)
    values = train_step(model, support.CAUSAL_LM)
    assert values["loss"].isfinite() and paths(model) == {"lora_linear"}


def test_accepts_a_distributed_model(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        stock = llama()
        expected = train_step(stock, support.CAUSAL_LM)
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(stock))
        accelerate_peft(model)
        values = train_step(model, support.CAUSAL_LM)
        for name in expected:
            ours = values[name if name == "loss" else f"module.{name}"]
            torch.testing.assert_close(ours, expected[name], rtol=1e-4, atol=1e-6)
        assert paths(model) == {"lora_linear"}
    finally:
        torch.distributed.destroy_process_group()


def ia3():
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    return peft.get_peft_model(support.build("llama"), config)


def merged():
    model = llama()
    model.merge_adapter()
    return model


def replaced_forwards():
    model = llama()
    for module in model.modules():
        if isinstance(module, PeftLinear):
            module.forward = partial(module.forward)
    return model


def falcon_dora():
    return support.peft_model(support.build("falcon"), target_modules="all-linear", use_dora=True)


REFUSED = {
    "no module": (lambda: 3, "int"),
    "a trainer": (lambda: type("Trainer", (), {"model": nn.Linear(2, 2)})(), "its attribute `model`"),
    "no adapter": (lambda: support.build("llama"), "it holds no PEFT layer"),
    "another method": (ia3, "2 times: ia3.layer.Linear has no fast path"),
    "DoRA over other layers": (
        falcon_dora,
        "8 times: the adapter is DoRA, and the base layer's weight is quantized or",
    ),
    "embedding alone": (lambda: llama(target_modules=["embed_tokens"]), "lora.layer.Embedding has no fast path"),
    "own forward": (replaced_forwards, "replaced on the instance"),
    "merged": (merged, "of this PeftModelForCausalLM are merged into the base weights: .*unmerge them first"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_raises_where_nothing_can_be_made_fast(case):
    make, message = REFUSED[case]
    model = make()
    before = [type(module) for module in model.modules()] if isinstance(model, nn.Module) else None
    with pytest.raises(LoraFastError, match=message.replace("(", r"\(")):
        accelerate_peft(model)
    if before:
        assert before == [type(module) for module in model.modules()]


def test_merging_and_disabling_one_layer_or_one_time_are_no_reason_to_refuse():
    model = llama()
    layers = [module for module in model.modules() if isinstance(module, PeftLinear)]
    for layer in layers[1:]:
        layer.merge()
    assert accelerate_peft(model).counts == {"torch": 1, "peft": len(layers) - 1}
    model.merge_adapter()
    assert accelerate_peft(model).counts == {"peft": len(layers)}  # fast already, once it is unmerged
    disabled = llama()
    disabled.base_model.disable_adapter_layers()
    assert accelerate_peft(disabled).counts == {"peft": len(layers)}


def test_says_that_peft_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft.tuners.tuners_utils", None)
    with pytest.raises(LoraFastError, match="pip install peft"):
        accelerate_peft(nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------- bytes kept for backward

MiB = 2**20


def small_llama() -> nn.Module:
    """The setting of the measurement: 4 layers of 512, bf16, frozen embeddings with gradients let in behind them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.enable_input_require_grads()
    return model.train()


def with_peft(dropout: float, *, fast: bool) -> nn.Module:
    config = {"r": 16, "target_modules": "all-linear", "lora_dropout": dropout, "task_type": "CAUSAL_LM"}
    model = support.peft_model(small_llama(), **config).train()
    if fast:
        accelerate_peft(model)
    return model.base_model.model.model


def with_lora_fast(dropout: float) -> nn.Module:
    return lora_fast.apply_lora(small_llama(), lora_fast.LoraConfig(r=16, lora_dropout=dropout)).train().model


TOKENS = torch.randint(0, 1000, (1, 512), generator=torch.Generator().manual_seed(8))


def kept_MiB(backbone: nn.Module) -> tuple[float, float]:
    """What a forward pass leaves behind, twice: what its graph saved for backward and what the allocator still lends.

    The first counts distinct storages, parameters left out; the second everything allocated but the output itself."""
    backbone(input_ids=TOKENS[:, :8])  # tables that are built once
    gc.collect()
    parameters = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    saved = {}  # holding each storage, so that no address is used twice

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            output = backbone(input_ids=TOKENS).last_hidden_state
    events = profile.profiler.kineto_results.events()
    alive = sum(event.nbytes() for event in events if event.name() == "[memory]")
    saved_bytes = sum(storage.nbytes() for storage in saved.values())
    return saved_bytes / MiB, (alive - output.untyped_storage().nbytes()) / MiB


def test_the_setting_is_the_one_in_which_peft_keeps_more_than_full_fine_tuning():
    assert kept_MiB(small_llama().model)[0] == pytest.approx(47.7, abs=0.1)
    assert kept_MiB(with_peft(0.0, fast=False))[0] == pytest.approx(69.6, abs=0.1)
    assert kept_MiB(with_peft(0.05, fast=False))[0] == pytest.approx(104.6, abs=0.1)


@pytest.mark.parametrize("dropout, limit_MiB", [(0.0, 45), (0.05, 47)])
@pytest.mark.parametrize("make", [partial(with_peft, fast=True), with_lora_fast], ids=["accelerate_peft", "apply_lora"])
def test_keeps_less_for_backward_than_full_fine_tuning(make, dropout, limit_MiB):
    saved, alive = kept_MiB(make(dropout))
    assert saved <= limit_MiB
    assert alive == pytest.approx(saved, abs=1)
