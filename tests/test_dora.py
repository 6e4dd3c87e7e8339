"""DoRA against PEFT's and against its equation in float64: values, all gradients, starts, files, merging, refusals."""

import copy
import pickle
from contextlib import nullcontext

import peft
import pytest
import torch
from accelerate import cpu_offload
from peft.tuners.lora import Linear as PeftLinear
from safetensors.torch import load_file, save_file
from support import (
    CAUSAL_LM,
    FAMILIES,
    TOKENS,
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

from lora_fast import (
    LoraConfig,
    LoraFastError,
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
from lora_fast.fusion import calls_by_path
from lora_fast.linear import LoraLayer

EPS = torch.finfo(torch.float32).eps
DORA = {"use_dora": True}
ALL = {"target_modules": "all-linear", "r": 4, "use_dora": True}
KINDS = ("lora_A", "lora_B", "lora_magnitude_vector")


def assert_close(ours, theirs, eps=EPS):
    """Equal to what rounding does to a few layers; wrong by 1e-5 fails."""
    assert theirs.abs().max() > 0
    assert (ours - theirs).abs().max() <= 64 * eps * theirs.abs().max()


def jitter(*models, size=0.05):
    """Moves all that is trained, in every model to the same numbers."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in trainable(models[0]).items():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
            for other in models[1:]:
                trainable(other)[name].copy_(parameter)


def step(model, inputs=CAUSAL_LM):
    """Logits and every gradient of a step in training."""
    model.train().zero_grad()
    torch.manual_seed(3)
    out = model(**inputs)
    out.loss.backward()
    return out.logits.detach(), {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


def factors(layer):
    return [layer.get_submodule(kind)["default"].weight for kind in KINDS]


def first_layer(model, kind=LoraLayer):
    return next(module for module in model.modules() if isinstance(module, kind))


PATTERNS = {"rank_pattern": {"layers.1.*": 7, "q_proj": 2}, "alpha_pattern": {"down_proj": 3}}
CASES = {
    "llama": ("llama", {"use_rslora": True} | PATTERNS),
    "llama dropped": ("llama", {"lora_dropout": 0.3}),
    "biases": ("qwen2", {"bias": "lora_only"}),
    "biases dropped": ("qwen2", {"bias": "all", "lora_dropout": 0.2, "init_lora_weights": "gaussian"}),
    "conv1d": ("gpt2", {"bias": "all", "fan_in_fan_out": True}),
    "conv1d dropped": ("gpt2", {"lora_dropout": 0.2, "fan_in_fan_out": True}),
    "own forward": ("falcon", {"bias": "lora_only"}),
    "own forward dropped": ("falcon", {"bias": "lora_only", "lora_dropout": 0.2}),
    "head": ("bert", {"task_type": "SEQ_CLS", "target_modules": ["query", "value", "dense"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_and_a_file_are_pefts(case, tmp_path):
    family, lora = CASES[case]
    inputs, lora = FAMILIES[family].inputs, ALL | lora
    ours, theirs = pair(family, lora)
    assert trainable(ours).keys() == trainable(theirs).keys()
    for name, parameter in trainable(theirs).items():
        torch.testing.assert_close(trainable(ours)[name], parameter, rtol=4 * EPS, atol=0)
    jitter(ours, theirs)
    (y, found), (expected, gradients) = step(ours, inputs), step(theirs, inputs)
    assert_close(y, expected)
    for name, gradient in gradients.items():
        assert_close(found[name], gradient)
    assert len(lora_parameters(ours)) == 3 * sum(isinstance(m, LoraLayer) for m in ours.modules())

    trained = logits(theirs, inputs)
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert_close(logits(load_adapter(build(family), tmp_path / "theirs"), inputs), trained)
    assert_close(logits(peft.PeftModel.from_pretrained(build(family), tmp_path / "ours"), inputs), trained)
    with disable_adapters(ours):
        save_adapter(ours, tmp_path / "disabled")
    read = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("ours", "disabled")]
    assert read[0] == read[1]


@pytest.mark.parametrize("shape", [(33,), (7, 33), (2, 5, 33), (0, 33)])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_the_equation_in_float64(rank, shape):
    torch.manual_seed(rank)
    layer = nn.Sequential(nn.Linear(33, 12).double())
    lora = {"r": rank, "lora_alpha": 7, "init_lora_weights": False, "target_modules": ["0"], "use_dora": True}
    apply_lora(layer, LoraConfig(**lora, bias="all"), adapter_dtype=torch.float64)
    jitter(layer)
    x, (a, b, m), bias = torch.randn(shape, dtype=torch.float64, requires_grad=True), factors(layer[0]), layer[0].bias
    moved = layer[0].weight + 7 / rank * b @ a
    expected = x @ (m / moved.detach().norm(dim=1) * moved.t()) + bias
    y, dy = layer(x), torch.randn(expected.shape, dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    inputs = (x, a, b, m, bias)
    for found, gradient in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)):
        torch.testing.assert_close(found, gradient, rtol=1e-11, atol=1e-12)
        assert gradient.any() or 0 in shape


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", ["llama", "falcon", "gpt2"])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_errs_as_little_as_pefts(family, autocast, dropout):
    lora, inputs = ALL | {"lora_dropout": dropout}, FAMILIES[family].inputs
    errors = torch.zeros(2, 4, dtype=torch.float64)
    for seed in range(3):
        models = pair(family, lora, seed=seed, dtype=torch.float32 if autocast else torch.bfloat16)
        jitter(*models, size=0.002)
        y, gradients = step(copy.deepcopy(models[1]).double(), inputs)
        for row, model in zip(errors, models):
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                found, own = step(model, inputs)
            row[0] += (found - y).square().sum()
            for column, kind in enumerate(KINDS, start=1):
                row[column] += sum((own[n] - g).square().sum() for n, g in gradients.items() if f".{kind}" in n)
    ratios = (errors[0] / errors[1]).sqrt()
    # PEFT runs fp32 adapters in fp32 on a bf16 base; ours are rounded to bf16, and so are their gradients' products.
    assert ratios[0] <= 1.2 and (ratios[1:] <= 1.5).all(), ratios


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_that_change_the_base(init, tmp_path):
    ours, theirs = pair("falcon", ALL | {"init_lora_weights": init})
    base = build("falcon")
    assert_close(logits(ours), logits(base))  # magnitudes are of W, not of what was left of it
    jitter(ours, theirs)
    trained = logits(ours)
    assert_close(trained, logits(theirs))
    save_adapter(ours, tmp_path / "ours")
    assert_close(logits(load_adapter(build("falcon"), tmp_path / "ours")), trained)
    with disable_adapters(ours):
        assert torch.equal(logits(ours), logits(base))
    remove_lora(ours)
    assert torch.equal(logits(ours), logits(base))


def test_several_adapters_of_which_one_is_dora():
    base = build("llama")
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    before = snapshot(ours)
    dora = {"r": 3, "target_modules": ["q_proj", "v_proj", "up_proj"], "use_dora": True, "init_lora_weights": False}
    configs = {"plain": ALL | {"use_dora": False, "init_lora_weights": False}, "dora": dora}
    torch.manual_seed(1)
    for name, lora in configs.items():
        apply_lora(ours, LoraConfig(**lora), adapter_name=name)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**configs["plain"]), adapter_name="plain")
    theirs.add_adapter("dora", peft.LoraConfig(**dora))
    seen = {}
    for name in ("plain", "dora", "plain", "dora"):
        set_adapter(ours, name), theirs.set_adapter(name)
        assert_close(logits(ours), logits(theirs))
        assert torch.equal(seen.setdefault(name, logits(ours)), logits(ours))
        assert sum(p.requires_grad for p in ours.parameters()) == len(lora_parameters(ours)) == len(trainable(theirs))
    with disable_adapters(ours):
        assert torch.equal(logits(ours), logits(base))
    for keep in ("cpu", "device"):
        merge_lora(ours, keep=keep)
        assert_close(logits(ours), seen["dora"])
        with disable_adapters(ours):
            assert torch.equal(logits(ours), logits(base))
        unmerge_lora(ours)
        assert torch.equal(logits(ours), seen["dora"])
    remove_lora(ours)
    assert_unchanged(ours.train(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_weights_are_the_equations(family, dtype):
    model = injected(family, dtype=dtype, lora=DORA)
    jitter(model)
    before, layer = snapshot(model), first_layer(model)
    a, b, m = (factor.double() for factor in factors(layer))
    moved = layer.matrix().double() + layer.adapter_specs["default"].scaling * b @ a
    expected = m[:, None] * moved / moved.norm(dim=1, keepdim=True)
    merge_lora(model)
    # Rounded once; the norms' products with W are rounded to W's dtype as well.
    assert (layer.matrix().double() - expected).norm() <= torch.finfo(dtype).eps * expected.norm()
    unmerge_lora(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize(("value", "said"), [(1e30, "exceeds what torch.float16 holds"), (torch.inf, "NaN or inf")])
def test_a_magnitude_that_cannot_be_merged(value, said):
    model = injected("llama", dtype=torch.float16, lora=DORA)
    with torch.no_grad():
        factors(model.model.layers[1].mlp.up_proj)[2][3] = value
    before = snapshot(model)
    with pytest.raises(LoraFastError, match=said) as error:
        merge_lora(model)
    assert "layers.1.mlp.up_proj" in str(error.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_stand_alone(copied):
    model = injected("falcon", lora=DORA)
    expected, other = logits(model), copied(model)
    assert torch.equal(logits(other), expected)
    with torch.no_grad():
        factors(first_layer(other))[2].mul_(2)
    assert not torch.equal(logits(other), expected) and torch.equal(logits(model), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, dropout):
    model = injected("qwen2", lora=DORA | {"lora_dropout": dropout})
    y, gradients = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, found = step(model)
    assert torch.equal(again, y) and all(torch.equal(found[name], gradients[name]) for name in gradients)


def run_alone(layer, call=None):
    """y of the layer's own call, or of another, and the gradients of x and of all that the adapter trains."""
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
    torch.manual_seed(1)
    y = (layer if call is None else call)(x)
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *(p for p in layer.parameters() if p.requires_grad)])]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "falcon"])
@pytest.mark.parametrize("how", ["compiled", "kernels"])
def test_compiled_and_on_the_kernels_it_computes_the_same(how, family, dropout):
    model = injected(family, lora=DORA | {"bias": "lora_only", "lora_dropout": dropout})
    jitter(model)
    layer = first_layer(model)
    expected, call = run_alone(layer), None
    if how == "compiled":
        torch._dynamo.reset()
        call = torch.compile(layer, fullgraph=True, backend="aot_eager")
    else:
        layer.backend = "triton"
    for found, value in zip(run_alone(layer, call), expected, strict=True):
        assert_close(found, value)


def test_function_transforms_hold_the_norms_constant():
    layer, x = first_layer(injected("llama", lora=DORA)).eval(), torch.randn(3, 32)
    weights = {f"{kind}.default.weight": factor.detach() for kind, factor in zip(KINDS, factors(layer))}

    def run(weights, x=x):
        return torch.func.functional_call(layer, weights, (x,))

    tangents = {name: torch.randn_like(weight) for name, weight in weights.items()}
    y, dy = torch.func.jvp(run, (weights,), (tangents,))
    cotangent = torch.randn_like(y)
    (gradients,) = torch.func.vjp(run, weights)[1](cotangent)
    torch.testing.assert_close((cotangent * dy).sum(), sum((gradients[n] * tangents[n]).sum() for n in weights))
    ensemble = {name: torch.stack([weight, 2 * weight]) for name, weight in weights.items()}
    for i, member in enumerate(torch.func.vmap(run)(ensemble)):
        assert_close(member, run({name: weight[i] for name, weight in ensemble.items()}))
    rows = torch.func.vmap(torch.func.grad(lambda w, x: run(w, x[None]).square().sum()), (None, 0))(weights, x)
    layer(x).square().sum().backward()
    for name, factor in zip(rows, factors(layer)):
        assert_close(rows[name].sum(0), factor.grad)


@pytest.mark.parametrize(("family", "dropout"), [("llama", 0.0), ("llama", 0.3), ("falcon", 0.0)])
def test_second_derivatives_and_batches_of_gradients(family, dropout):
    layer = first_layer(injected(family, lora=DORA | {"lora_dropout": dropout}).double()).train()
    x, inputs = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True), factors(layer)

    def run(x, magnitude):
        torch.manual_seed(0)
        return torch.func.functional_call(layer, {"lora_magnitude_vector.default.weight": magnitude}, (x,))[..., :4]

    assert torch.autograd.gradgradcheck(run, (x, inputs[2]))
    y = layer(x)
    dys = torch.randn(3, *y.shape, dtype=torch.float64)
    batch = torch.autograd.grad(y, [x, *inputs], dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        for found, expected in zip(batch, torch.autograd.grad(y, [x, *inputs], dy, retain_graph=True)):
            torch.testing.assert_close(found[i], expected)


class Casting(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_base_that_computes_in_another_dtype_than_its_input(dropout):
    lora = {"target_modules": ["0"], "r": 3, "init_lora_weights": False, "use_dora": True, "lora_dropout": dropout}
    ours, x = nn.Sequential(Casting(16, 12)).bfloat16(), torch.randn(7, 16)
    theirs = peft_model(copy.deepcopy(ours), **lora)
    jitter(apply_lora(ours, LoraConfig(**lora)), theirs)
    torch.manual_seed(0)
    expected = theirs(x)
    torch.manual_seed(0)
    assert_close(ours(x), expected, eps=torch.finfo(torch.bfloat16).eps / 4)


def test_a_row_of_zeros_is_trained():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3] = 0
    optimizer = torch.optim.SGD(lora_parameters(apply_lora(model, LoraConfig(**ALL))), 0.1)
    for _ in range(2):
        y, gradients = step(model)
        assert y.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients.values())
        optimizer.step()


def test_generation_and_the_report():
    ours, theirs = pair("llama", ALL | {"init_lora_weights": False})
    written = [m.eval().generate(input_ids=TOKENS, max_new_tokens=6, do_sample=False) for m in (ours, theirs)]
    assert torch.equal(*written)
    assert {path for path, _ in calls_by_path(ours)} == {"lora_linear", "lora_linears"}
    assert "2 layers its layers run DoRA" in str(fusion_report(ours))


def test_on_meta_and_files_with_wrong_magnitudes(tmp_path):
    save_adapter(injected("llama", lora=DORA), tmp_path)
    with torch.device("meta"):
        model = build("llama")
    assert {p.device.type for p in load_adapter(model, tmp_path).parameters()} == {"meta"}
    stored = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in stored if key.endswith("lora_magnitude_vector"))
    wrong = {"lacks": None, "the model needs": torch.ones(3), "NaN or inf": stored[key] * torch.nan}
    for said, value in wrong.items():
        changed = {k: v for k, v in (stored | {key: value}).items() if v is not None}
        save_file(changed, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
        model = build("llama")
        before = snapshot(model)
        with pytest.raises(LoraFastError, match=said):
            load_adapter(model, tmp_path)
        assert_unchanged(model, before)


def test_what_has_no_lengths_is_refused(tmp_path):
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(LoraFastError, match=r"use_dora=True: .*embed_tokens is an embedding; name it in"):
        apply_lora(model, LoraConfig(**ALL | {"target_modules": ["q_proj", "embed_tokens"]}))
    assert_unchanged(model, before)
    with pytest.raises(LoraFastError, match="q_proj is offloaded by accelerate; keep it on a device"):
        apply_lora(cpu_offload(model, execution_device=torch.device("cpu")), LoraConfig(**ALL))
    with pytest.raises(LoraFastError, match=r"use_dora=True with target_parameters=\['x'\]: .* expected False"):
        LoraConfig(target_parameters=["x"], use_dora=True)
    with pytest.raises(LoraFastError, match="portable=True: use_dora can't be served"):
        save_adapter(injected("llama", lora=DORA), tmp_path / "none", portable=True)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(("family", "paths"), [("qwen2", {"lora_linear", "lora_linears"}), ("gpt2", {"lora_linear"})])
def test_pefts_own_layers_accelerated(family, paths, dropout):
    stock = peft_model(build(family), **ALL, init_lora_weights=False, lora_dropout=dropout, bias="lora_only")
    jitter(stock)
    fast = copy.deepcopy(stock)
    accelerate_peft(fast)
    (y, found), (expected, gradients) = step(fast), step(stock)
    assert_close(y, expected)
    for name, gradient in gradients.items():
        assert_close(found[name], gradient)
    assert {path for path, _ in calls_by_path(fast)} == ({"lora_update"} if dropout else paths)


def test_a_plain_layer_of_peft_computes_dora_followers_along():
    stock = peft_model(build("qwen2"), **ALL, init_lora_weights=False)
    stock.add_adapter("plain", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    first_layer(stock, PeftLinear).set_adapter("plain")
    fast = copy.deepcopy(stock)
    accelerate_peft(fast)
    assert_close(logits(fast), logits(stock))
    assert first_layer(fast, PeftLinear).calls_by_path == {("lora_linears", None): 1}
