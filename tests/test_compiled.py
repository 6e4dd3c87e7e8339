"""Under torch.compile: what it computes is what runs without it, and new sizes of x need no new graph."""

import shutil

import peft
import pytest
import torch
from kernel_support import DEVICE, random
from support import build
from torch._dynamo.testing import CompileCounterWithBackend

from lora_fast import (
    LoraConfig,
    accelerate_peft,
    apply_lora,
    lora_grouped_linear,
    lora_linear,
    lora_linears,
    lora_swiglu_mlp,
    lora_update,
)

K, N = 24, 40
RANKS = (5, 3, 4)
SCALINGS = (0.75, 2.0, 0.5)
EPS = torch.finfo(torch.float32).eps


def factors(g, n=N, k=K):
    """(weight, lora_A, lora_B, scaling) of adapter g."""
    a, b = (random(*shape, seed=10 * g + i, scale=0.3) for i, shape in enumerate(((RANKS[g], k), (n, RANKS[g]))))
    return random(n, k, seed=10 * g + 2, scale=0.2), a.requires_grad_(), b.requires_grad_(), SCALINGS[g]


LAYERS = [factors(g) for g in range(3)]
DOWN = factors(2, n=K, k=N)
WEIGHTS, LORA_AS, LORA_BS, _ = (list(column) for column in zip(*LAYERS))
SEGMENTS = [(2, 7, 1), (7, 11, 0), (12, 15, 2)]
OPS = {
    "lora_linear": lambda x, **kw: lora_linear(x, *LAYERS[0], **kw),
    "lora_linears": lambda x, **kw: torch.cat(lora_linears(x, WEIGHTS, LORA_AS, LORA_BS, SCALINGS, **kw), -1),
    "lora_update": lambda x, **kw: lora_update(x, x @ WEIGHTS[0].t(), *LAYERS[0][1:], **kw),
    "lora_swiglu_mlp": lambda x, **kw: lora_swiglu_mlp(x, LAYERS[0], LAYERS[1], DOWN, **kw),
    "lora_grouped_linear": lambda x, **kw: lora_grouped_linear(
        x, WEIGHTS[0], LORA_AS, LORA_BS, SCALINGS, SEGMENTS, **kw
    ),
}
TRAINED = [*LORA_AS, *LORA_BS, *DOWN[1:3]]


def step(call, batch, length):
    """[y, dx, gradients of all factors that have one]."""
    for factor in TRAINED:
        factor.grad = None
    x = random(batch, length, K, seed=5).requires_grad_()
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    torch.manual_seed(6)
    y = call(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(factor.grad for factor in TRAINED if factor.grad is not None)]


def assert_equal(ours, theirs):
    for value, expected in zip(ours, theirs, strict=True):
        assert expected.abs().max() > 0
        assert (value - expected).abs().max() <= 64 * EPS * expected.abs().max()


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_one_graph_for_all_sizes_of_x(op, backend, p):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = lambda x: OPS[op](x, dropout_p=p, backend=backend)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for batch, length in ((3, 11), (2, 16), (5, 7)):
        assert_equal(step(compiled, batch, length), step(call, batch, length))
    assert counter.frame_count == 1


@pytest.mark.parametrize("with_peft", [False, True])
def test_a_model_is_compiled_twice_for_any_number_of_lengths(with_peft):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, settings = build("llama", num_hidden_layers=1), {"r": 5, "lora_dropout": 0.2, "target_modules": "all-linear"}
    if with_peft:
        model = peft.get_peft_model(model, peft.LoraConfig(**settings, init_lora_weights=False))
        accelerate_peft(model)
    else:
        apply_lora(model, LoraConfig(**settings, init_lora_weights=False))
    model = model.to(DEVICE).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (12, 17, 30):
        tokens = (torch.arange(2 * length, device=DEVICE) * 7 % 50).view(2, length)
        results = []
        for call in (compiled, model):
            model.zero_grad()
            torch.manual_seed(1)
            loss = call(input_ids=tokens, labels=tokens).loss
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        assert_equal(*results)
    assert counter.frame_count == 2  # the first for its length alone, the second for all


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("op", ["lora_linears", "lora_swiglu_mlp"])
def test_inductor(op):
    """Its code relies on the strides that the ops say they return."""
    torch._dynamo.reset()
    call = lambda x: torch.nn.functional.silu(OPS[op](x.square(), dropout_p=0.0))  # noqa: E731
    compiled = torch.compile(call, fullgraph=True)
    for batch, length in ((3, 11), (2, 16)):
        assert_equal(step(compiled, batch, length), step(call, batch, length))
