"""Subclasses of nn.Linear: adapted where PEFT adapts them, called as they are, refused where they are quantized."""

import copy
import io
import pickle

import peft
import pytest
import torch
from support import CAUSAL_LM, adapted, assert_unchanged, build, injected, logits, pair, peft_model, snapshot, trainable
from torch import nn

from lora_fast import (
    LoraConfig,
    LoraFastError,
    LoraFastWarning,
    apply_lora,
    fusion_report,
    load_adapter,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lora_fast.subclass import LoraCalledBase

EPS = torch.finfo(torch.float32).eps


class Doubled(nn.Linear):
    """A forward of its own that draws random numbers and takes a second argument."""

    def forward(self, x, factor=2.0):
        return factor * nn.functional.dropout(super().forward(x), 0.5, self.training)


class Renamed(nn.Linear):
    """nn.Linear's own forward."""


class Attention(nn.Module):
    """torch's attention, which reads the weight of out_proj, and torch's encoder layer."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True, dropout=0.0)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.layer(x + self.attention(x, x, x)[0]))


def twins(base, **lora):
    """Our model and PEFT's on the same weights, started under the same seed."""
    lora = {"r": 3, "init_lora_weights": False} | lora
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    torch.manual_seed(4)
    apply_lora(ours, LoraConfig(**lora))
    torch.manual_seed(4)
    theirs = peft_model(theirs, **lora)
    assert adapted(ours) == adapted(theirs) != set()
    for name, parameter in trainable(ours).items():
        assert torch.equal(parameter, trainable(theirs)[name]), name
    return ours, theirs


def assert_same_step(ours, theirs, *inputs, **keywords):
    """Equal outputs and gradients, up to the rounding of the one addition that is done differently."""
    results = []
    for model in (ours, theirs):
        model.zero_grad()
        torch.manual_seed(8)
        y = model(*inputs, **keywords)
        y.square().sum().backward()
        results.append((y.detach(), {name: p.grad for name, p in trainable(model).items()}))
    (y, gradients), (reference, expected) = results
    torch.testing.assert_close(y, reference, rtol=64 * EPS, atol=64 * EPS)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradient is None) == (gradients[name] is None), name
        if gradient is not None:
            assert gradient.abs().max() > 0
            torch.testing.assert_close(gradients[name], gradient, rtol=256 * EPS, atol=256 * EPS, msg=name)


@pytest.mark.parametrize("targets", ["all-linear", ["0", "1", "3"], r"\d"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_forward_of_a_subclass_is_kept_as_in_peft(targets, dropout):
    torch.manual_seed(0)
    base = nn.Sequential(Doubled(7, 12), Renamed(12, 9, bias=False), nn.Tanh(), nn.Linear(9, 5))
    if targets == r"\d":
        targets = r"[013]"
    ours, theirs = twins(base, target_modules=targets, lora_dropout=dropout)
    x = torch.randn(2, 6, 7)
    assert_same_step(ours, theirs, x)
    assert_same_step(ours.eval(), theirs.eval(), x)
    assert_same_step(ours[0], theirs.base_model.model[0], x, factor=-0.5)
    reasons = {row.module: row.reason for row in fusion_report(ours).rows}
    assert "the base layer is a Doubled: it is called as it is" in reasons["0"]
    assert not isinstance(ours[1], LoraCalledBase) and "called as it is" not in (reasons["1"] or "")


@pytest.mark.parametrize("kind", [nn.Linear, Renamed, Doubled])
def test_an_output_may_be_changed_in_place(kind):
    """Falcon adds to the outputs of its linear layers in place."""
    model = apply_lora(nn.Sequential(kind(4, 4)), LoraConfig(r=2, init_lora_weights=False))
    y = model(torch.randn(3, 4))
    y += 1
    y.sum().backward()
    assert model[0].lora_A["default"].weight.grad.abs().max() > 0


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_falcon_is_copied_merged_and_given_back(how):
    base = build("falcon")
    plain, before = logits(base), snapshot(base)
    model = injected(model=base, lora={"target_modules": "all-linear"})
    assert sum(isinstance(module, LoraCalledBase) for module in model.modules()) == 8
    expected = logits(model)
    assert (expected - plain).norm() > 1e-2 * plain.norm()
    merge_lora(model)
    torch.testing.assert_close(logits(model), expected, rtol=256 * EPS, atol=256 * EPS)
    assert {row.path for row in fusion_report(model).rows} == {"base"}
    unmerge_lora(model)

    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model, protocol=0))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(logits(twin), expected)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    remove_lora(twin)
    assert torch.equal(logits(twin), plain) and torch.equal(logits(model), expected)
    remove_lora(model)
    assert_unchanged(model, before)


def test_falcon_compiles_as_one_graph():
    torch._dynamo.reset()
    model = injected("falcon", lora={"lora_dropout": 0.1}, num_hidden_layers=1)
    gradients = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        torch.manual_seed(1)
        run(**CAUSAL_LM).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in trainable(model).items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=64 * EPS, atol=64 * EPS, msg=name)


def test_low_precision_and_autocast_run_the_forward_of_a_subclass():
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        ours, theirs = pair("falcon", {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            mine, yours = logits(ours), logits(theirs)
        assert mine.dtype == yours.dtype
        assert (mine - yours).norm() <= 4 * torch.finfo(torch.bfloat16).eps * yours.norm()


def test_attention_whose_out_proj_is_only_read_is_adapted_as_in_peft_and_announced(tmp_path):
    """torch reads the weight of out_proj, and in evaluation those of an encoder layer's linears, past the adapter."""
    torch.manual_seed(0)
    base = Attention()
    with pytest.warns(LoraFastWarning) as record:
        ours, theirs = twins(base, target_modules="all-linear")
    said = "\n".join(str(warning.message) for warning in record)
    assert "torch.nn.MultiheadAttention reads the weight of attention.out_proj (2 modules so) without calling" in said
    assert "in evaluation torch.nn.TransformerEncoderLayer reads the weight of layer.linear1 (2 modules so)" in said
    x = torch.randn(2, 5, 12)
    assert_same_step(ours, theirs, x)
    with torch.no_grad():
        assert torch.equal(ours.eval().layer(x), base.eval().layer(x))  # as the warning says
        torch.testing.assert_close(ours(x), theirs.eval()(x), rtol=64 * EPS, atol=64 * EPS)
    save_adapter(ours, tmp_path / "ours")
    peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.warns(LoraFastWarning, match="attention.out_proj"):
        loaded = load_adapter(copy.deepcopy(base), tmp_path / "theirs").eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), ours(x))
    remove_lora(ours)
    assert type(ours.attention.out_proj) is type(base.attention.out_proj)


class Packed(nn.Linear):
    """A quantized layer: two values to a byte."""

    def __init__(self, k, n):
        super().__init__(k, n)
        self.weight = nn.Parameter(torch.zeros(n, k // 2, dtype=torch.uint8), requires_grad=False)


def float8(k, n):
    layer = Renamed(k, n)
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    return layer


def short(k, n):
    layer = Renamed(k, n)
    layer.weight = nn.Parameter(layer.weight.data.reshape(n // 2, 2 * k))
    return layer


def computed(k, n):
    return nn.utils.parametrizations.weight_norm(nn.Linear(k, n))


def lazy(k, n):
    return nn.LazyLinear(n)


@pytest.mark.parametrize("make", [Packed, float8, short, computed, lazy])
def test_subclasses_without_a_plain_weight_are_refused(make):
    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "odd": make(4, 4)})
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(LoraFastError, match=r"odd is a .*; lora-fast adapts torch.nn.Linear, .*accelerate_peft"):
        apply_lora(model, LoraConfig(r=2))
    assert [type(module) for module in model.modules()] == kinds
    if make is not lazy:  # torch lets nobody freeze a weight that isn't there yet
        assert adapted(apply_lora(model, LoraConfig(r=2, exclude_modules=["odd"]))) == {"plain"}


def test_a_router_says_at_its_first_call_that_it_takes_no_update():
    """As in PEFT, "all-linear" adapts a router; PEFT fails on the tuple that it returns, and we do by name."""
    sizes = {"num_local_experts": 3, "lm_head_bias": False, "attention_bias": False}
    from transformers import PhimoeConfig, PhimoeForCausalLM

    torch.manual_seed(0)
    config = PhimoeConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        **sizes,
    )
    base = PhimoeForCausalLM(config).eval()
    plain = logits(base)
    with pytest.raises(AttributeError):
        logits(peft_model(copy.deepcopy(base), target_modules="all-linear"))
    model = apply_lora(base, LoraConfig())
    with pytest.raises(LoraFastError, match=r"PhimoeTopKRouter.forward returned a tuple; .*exclude_modules"):
        logits(model)
    merge_lora(model)
    assert torch.equal(logits(model), plain)
    remove_lora(model)
    assert torch.equal(logits(model), plain)
    lora = {"r": 3, "init_lora_weights": False, "exclude_modules": ["router"], "target_modules": "all-linear"}
    ours, theirs = twins(model, **lora)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=64 * EPS, atol=64 * EPS)
