"""Layers that read one input, computed together: found in their parent's source, equal to one by one, nothing kept."""

import copy
import gc
import pickle
import threading
import weakref

import peft
import pytest
import torch
from support import CAUSAL_LM, FAMILIES, build, injected
from torch import nn

from lora_fast import LoraConfig, accelerate_peft, apply_lora, fusion_report, set_adapter, shared_input
from lora_fast.fusion import calls_by_path
from lora_fast.shared_input import children_called_alike
from lora_fast.swiglu_mlp import unfuse_mlps

EPS = torch.finfo(torch.float32).eps


def followers(model):
    """{last name of the leader: last names of its followers}."""
    names = {id(m): n.rpartition(".")[2] for n, m in model.named_modules()}
    leaders = [m for m in model.modules() if getattr(m, "followers", ())]
    return {names[id(m)]: tuple(names[id(f)] for f in m.followers) for m in leaders}


def step(model, inputs=CAUSAL_LM, seed=1):
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model.train()(**inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def apart(model):
    """The same model with every layer by itself."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "followers"):
            module.followers = ()
    return model


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        bound = 64 * EPS * theirs[name].abs().max()
        assert (value - theirs[name]).abs().max() <= bound, name
        assert value.abs().max() > 0, name


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"q_proj": ("k_proj", "v_proj"), "gate_proj": ("up_proj",)}),
        ("qwen2", {"q_proj": ("k_proj", "v_proj"), "gate_proj": ("up_proj",)}),
        ("bert", {"query": ("key", "value")}),
        ("opt", {"q_proj": ("k_proj", "v_proj")}),
        ("t5", {"k": ("v",)}),
        ("gpt2", {}),  # one layer for q, k and v
    ],
)
@pytest.mark.parametrize("with_peft", [False, True])
def test_found_in_the_source_and_equal_to_one_by_one(family, expected, with_peft):
    if with_peft:
        torch.manual_seed(0)
        lora = {"target_modules": "all-linear", "r": 5, "lora_dropout": 0.1, "init_lora_weights": False}
        model = peft.get_peft_model(build(family), peft.LoraConfig(**lora))
        accelerate_peft(model)
    else:
        model = injected(family, lora={"target_modules": "all-linear", "lora_dropout": 0.1})
    unfuse_mlps(model)  # gate and up as layers of their own
    found = followers(model)
    assert {k: v for k, v in found.items() if not k.startswith("wi_")} == expected
    inputs = FAMILIES[family].inputs
    alone = apart(model)
    assert_close(step(model, inputs), step(alone, inputs))
    together = calls_by_path(model)["lora_linears", None]
    members = sum(1 + len(m.followers) for m in model.modules() if getattr(m, "followers", ()))
    assert together == members
    assert calls_by_path(alone)["lora_linears", None] == 0
    assert not shared_input._slot.waiting


def test_the_first_step_is_as_every_other_and_copies_as_the_original():
    model = injected()
    first = step(model)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again = step(twin)
        assert all(torch.equal(again[name], first[name]) for name in first)
        assert followers(twin) == followers(model)
        own = set(twin.modules())
        assert all(f in own for m in twin.modules() for f in getattr(m, "followers", ()))


class Attention(nn.Module):
    """q, k and v of one x; `change` may do something to x between them."""

    def __init__(self, change=None):
        super().__init__()
        torch.manual_seed(2)
        self.q, self.k, self.v = (nn.Linear(12, n, bias=n == 7) for n in (7, 8, 9))
        self.change = change

    def forward(self, x):
        q = self.q(x)
        if self.change is not None:
            self.change(self, x)
        k = self.k(x)
        return torch.cat([q, k, self.v(x)], dim=-1)


def adapted(change=None, **lora):
    model = apply_lora(Attention(change), LoraConfig(r=3, init_lora_weights=False, **lora))
    assert followers(model) == {"q": ("k", "v")}
    return model


def one_by_one(model, x):
    return apart(model)(x)


def x_and_base(requires_grad=True):
    base = torch.randn(5, 12, generator=torch.Generator().manual_seed(3)).requires_grad_(requires_grad)
    return base * 1.0, base


def test_an_input_changed_in_between_is_seen():
    def change(module, x):
        with torch.no_grad():
            x.mul_(2)

    model = adapted(change)
    # Each call gets its own x; apart computes q of x and then k, v of 2 x, by definition.
    expected, got = one_by_one(model, x_and_base(False)[0]), model(x_and_base(False)[0])
    torch.testing.assert_close(got, expected, rtol=0, atol=64 * EPS)
    plain = adapted()(x_and_base(False)[0])
    assert not torch.allclose(got, plain)
    assert not shared_input._slot.waiting


def test_a_switch_in_between_is_seen():
    model = adapted()
    apply_lora(model, LoraConfig(r=2, init_lora_weights=False), adapter_name="second")
    set_adapter(model, "default")
    switched = model
    switched.change = lambda module, x: set_adapter(switched, "second")
    got = switched(x_and_base()[0])
    set_adapter(switched, "default")
    twin = apart(switched)
    twin.change = lambda module, x: set_adapter(twin, "second")
    torch.testing.assert_close(got, twin(x_and_base()[0]), rtol=0, atol=64 * EPS)


@pytest.mark.parametrize("what", ["lora_B", "lora_A", "weight", "another part of one memory", "autocast"])
@torch.no_grad()
def test_weights_changed_and_autocast_left_in_between_are_seen(what):
    model, (x, _) = adapted(), x_and_base(False)
    both = torch.stack([model.k.weight, 3 * model.k.weight])
    if what == "another part of one memory":
        model.k.weight.data = both[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        model.q(x)
    assert shared_input._slot.waiting
    if what in ("lora_A", "lora_B"):
        getattr(model.k, what)["default"].weight.mul_(3)
    elif what == "weight":
        model.k.weight.add_(3)
    elif what == "another part of one memory":
        model.k.weight.data = both[1]
    got = model.k(x)
    torch.testing.assert_close(got, apart(model).k(x), rtol=1e-5, atol=64 * EPS)


def test_a_layer_that_is_not_called_costs_and_leaves_nothing():
    class Sometimes(Attention):
        def forward(self, x, values=True):
            q = self.q(x)
            k = self.k(x)
            return torch.cat([q, k, self.v(x)], dim=-1) if values else torch.cat([q, k], dim=-1)

    model = apply_lora(Sometimes(), LoraConfig(r=3, init_lora_weights=False))
    x, base = x_and_base()
    model(x, values=False).sum().backward()
    assert all(p.grad is None for n, p in model.v.named_parameters())
    # What v was computed for lives no longer than until the next call of any adapted layer.
    (waiting,) = shared_input._slot.waiting.values()
    left = weakref.ref(waiting[2])
    del waiting
    model.k(torch.ones(1, 12))
    gc.collect()
    assert left() is None and not shared_input._slot.waiting
    dx = base.grad
    x, base = x_and_base()
    apart(model)(x, values=False).sum().backward()
    torch.testing.assert_close(dx, base.grad, rtol=0, atol=64 * EPS * dx.abs().max().item())


def test_nothing_lives_longer_for_it():
    model = adapted()
    x, _ = x_and_base()
    y = model(x)
    alive = weakref.ref(x)
    y.sum().backward()
    del x, y
    assert alive() is None


def test_hooks_on_one_layer_see_and_change_what_they_did_before():
    model = adapted()
    seen = []
    model.k.register_forward_hook(lambda module, args, output: seen.append(output.shape) or output * 2)
    model.v.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    x, _ = x_and_base()
    got = model(x)
    assert seen == [(5, 8)]
    torch.testing.assert_close(got, one_by_one(model, x), rtol=0, atol=256 * EPS)
    assert calls_by_path(model)["lora_linear", None] == 1  # v, whose hook could change its x


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_recomputed_activations_are_the_same(reentrant, p):
    model = adapted(lora_dropout=p).train()
    results = []
    for checkpoint in (False, True):
        model.zero_grad()
        torch.manual_seed(4)
        x, base = x_and_base()
        if checkpoint:
            y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
        else:
            y = model(x)
        y.square().sum().backward()
        results.append([base.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == 7
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_inference_mode_and_modes_without_a_graph():
    model = adapted().eval()
    x, _ = x_and_base(False)
    expected = model(x).detach()
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(x.clone()), expected, rtol=0, atol=64 * EPS)
    q = model.q(x)  # computes k and v along, with a graph
    with torch.no_grad():
        assert not model.k(x).requires_grad  # and isn't given what carries one
    assert q.requires_grad


def test_threads_do_not_take_from_each_other():
    model = adapted().eval()
    xs = [torch.randn(64, 12, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    expected = [model(x).detach() for x in xs]
    wrong, barrier = [], threading.Barrier(4)

    def work(number):
        barrier.wait()
        for turn in range(40):
            i = (number + turn) % len(xs)
            if not torch.equal(model(xs[i]).detach(), expected[i]):
                wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiled_without_a_break():
    model = adapted().eval()
    x, _ = x_and_base(False)
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x), rtol=0, atol=64 * EPS
    )


def test_what_counts_as_called_alike():
    class Tricky(nn.Module):
        def forward(self, x, y):
            a = self.a(x)
            x = x + 1
            b = self.b(x)
            if y is not None:
                c = self.c(x)
                d = self.d(x)
            else:
                c, d = self.e(x), self.f(y)
            return a + b + c + d + self.g(x, y) + self.h(x=x) + self.i(self.j(x))

    class Plain(nn.Module):
        def forward(self, x):
            y = self.a(x)
            z = self.b(x)
            return y + z + self.a(x)

    assert set(children_called_alike(Tricky)) == {("b", "j"), ("c", "d")}
    assert children_called_alike(Plain) == (("a", "b"),)
    assert children_called_alike(type("FromNowhere", (nn.Module,), {"forward": eval("lambda self, x: x")})) == ()


def test_report_counts_both_paths():
    model = injected()
    unfuse_mlps(model)
    step(model)
    calls = fusion_report(model).calls
    layers = FAMILIES["llama"].config["num_hidden_layers"]
    assert calls["lora_linears", None] == 5 * layers and calls["lora_linear", None] == 2 * layers
