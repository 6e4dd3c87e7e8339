"""LoRA on stacked experts: the op's values and gradients against float64, a mixture's experts against their own forward
with W + ΔW in place of W, and what PyTorch asks of an op."""

import copy
from importlib import import_module

import pytest
import torch
from kernel_support import DEVICE, DTYPES, assert_as_exact_as, error, nan_filled, random
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lora_fast.experts import ExpertFactors, call_refusal, refusal, run_experts
from lora_fast.parameter import lora_owner

OPS = torch.ops.lora_fast
SCALING = 0.75
E, R, M, K, N = 5, 3, 33, 7, 13
OFFSETS = torch.tensor([4, 4, 14, 14, 33], dtype=torch.int32, device=DEVICE)  # two experts are without rows


def leaves(dtype, *, transposed=False, master=None, rows=M):
    """x, weight, lora_A, lora_B; all but the weight require gradients."""
    x = random(rows, K, dtype=dtype, seed=1)
    weight = random(E, *((K, N) if transposed else (N, K)), dtype=dtype, seed=2, scale=K**-0.5)
    lora_A = random(E * R, K, dtype=master or dtype, seed=3, scale=K**-0.5)
    lora_B = random(N, R * E, dtype=master or dtype, seed=4, scale=R**-0.5)
    return x.requires_grad_(), weight, lora_A.requires_grad_(), lora_B.requires_grad_()


def ours(transposed=False, triton=False, offsets=OFFSETS):
    def function(x, weight, lora_A, lora_B):
        return OPS.experts_forward(x, weight, lora_A, lora_B, offsets, SCALING, transposed, triton)[0]

    return function


def eager(transposed=False):
    """What a PyTorch user writes, in x's dtype."""

    def function(x, weight, lora_A, lora_B):
        w = weight.mT if transposed else weight
        a, b = lora_A.to(x.dtype).view(E, R, -1), lora_B.to(x.dtype).view(-1, R, E)
        ends = OFFSETS.tolist()
        parts = [x[start:end] for start, end in zip([0, *ends], ends)]
        return torch.cat([p @ w[e].t() + p @ a[e].t() @ b[..., e].t() * SCALING for e, p in enumerate(parts)])

    return function


def formed(transposed=False):
    """y with W + ΔW of every row, as the equation has it."""

    def function(x, weight, lora_A, lora_B):
        delta = torch.einsum("nre,erk->enk", lora_B.view(-1, R, E), lora_A.view(E, R, -1))
        whole = (weight.mT if transposed else weight) + SCALING * delta
        expert = torch.searchsorted(OFFSETS, torch.arange(len(x), device=DEVICE), right=True)
        return torch.einsum("mk,mnk->mn", x, whole[expert])

    return function


def run(function, dtype, tensors, dy):
    """[y, and the gradient of every tensor that requires one], of copies of the tensors in `dtype` (None: as they
    are)."""
    tensors = [t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad) for t in tensors]
    y = function(*tensors)
    return [y.detach(), *torch.autograd.grad(y, [t for t in tensors if t.requires_grad], dy.to(y.dtype))]


def check(mine, low, exact):
    for ours, eagers, truth in zip(mine, low, exact, strict=True):
        assert ours.dtype == eagers.dtype and ours.any()
        assert_as_exact_as(ours, eagers, truth, factor=1.5)


# -------------------------------------------------------------------------------------------------------------- the op


@pytest.mark.parametrize("transposed", [False, True])
def test_equals_the_formed_weight_in_float64(transposed):
    tensors, dy = leaves(torch.float64, transposed=transposed), random(M, N, dtype=torch.float64, seed=5)
    with nan_filled():
        mine = run(ours(transposed), None, tensors, dy)
    for value, truth in zip(mine, run(formed(transposed), None, tensors, dy), strict=True):
        assert error(value, truth) < 1e-14


@pytest.mark.parametrize(("triton", "transposed"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_errs_no_more_than_eager(dtype, triton, transposed):
    tensors = leaves(dtype, transposed=transposed, master=torch.float32)
    dy = random(M, N, dtype=dtype, seed=5)
    with nan_filled():
        mine = run(ours(transposed, triton), None, tensors, dy)
        again = run(ours(transposed, triton), None, tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(mine, again)), "not the same bits twice"
    assert mine[2].dtype == mine[3].dtype == torch.float32
    check(mine, run(eager(transposed), None, tensors, dy), run(formed(transposed), torch.float64, tensors, dy))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_an_adapter_it_is_the_frozen_product(dtype, triton, transposed):
    x, weight, lora_A, lora_B = leaves(dtype, transposed=transposed)
    dy, none = random(M, N, dtype=dtype, seed=5), torch.zeros_like

    def plain(function):
        return lambda x, weight: function(x, weight, none(lora_A).to(x.dtype), none(lora_B).to(x.dtype))

    with nan_filled():
        mine = run(lambda x, weight: ours(transposed, triton)(x, weight, None, None), None, (x, weight), dy)
    low = run(plain(eager(transposed)), None, (x, weight), dy)
    check(mine, low, run(plain(formed(transposed)), torch.float64, (x, weight), dy))


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("wanted", [(0,), (3,), (2, 3)])
def test_only_what_needs_a_gradient_gets_one(wanted, triton):
    tensors, dy = leaves(torch.float16, master=torch.float32), random(M, N, dtype=torch.float16, seed=5)
    y, dx, dA, dB = run(ours(triton=triton), None, tensors, dy)
    some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    found = ours(triton=triton)(*some)
    found.backward(dy)
    with torch.no_grad():
        assert torch.equal(ours(triton=triton)(*tensors), y)
    assert torch.equal(found, y)
    for number, gradient in enumerate((dx, None, dA, dB)):
        assert torch.equal(some[number].grad, gradient) if number in wanted else some[number].grad is None


@pytest.mark.parametrize("triton", [False, True])
def test_no_rows(triton):
    tensors, dy = leaves(torch.float32, rows=0), random(0, N, seed=5)
    with nan_filled():
        y, *gradients = run(ours(triton=triton, offsets=torch.zeros_like(OFFSETS)), None, tensors, dy)
    assert y.shape == (0, N)
    for gradient, tensor in zip(gradients, (tensors[0], *tensors[2:]), strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


@pytest.mark.parametrize("triton", [False, True])
def test_masters_below_and_gradients_above_what_fp16_holds(triton):
    large = 1e7
    x, weight, lora_A, lora_B = leaves(torch.float16, master=torch.float32)
    tensors, dy = (x, weight, lora_A, lora_B.detach().div(large).requires_grad_()), random(M, N, seed=5).half()

    def function(*tensors):
        return OPS.experts_forward(*tensors, OFFSETS, SCALING * large, False, triton)[0]

    def exactly(x, weight, lora_A, lora_B):
        return formed()(x, weight, lora_A, lora_B * large)

    mine, exact = run(function, None, tensors, dy), run(exactly, torch.float64, tensors, dy)
    assert mine[3].abs().max() > torch.finfo(torch.float16).max
    for value, truth in zip(mine, exact, strict=True):
        assert error(value, truth) < torch.finfo(torch.float16).eps


@pytest.mark.parametrize("triton", [False, True])
def test_strided_operands(triton):
    tensors, dy = leaves(torch.float32), random(M, N, seed=5)
    x, weight = (t.detach().mT.contiguous().mT for t in tensors[:2])
    x.requires_grad_()

    def strided(_, __, *factors):
        return ours(triton=triton)(x, weight, *factors)

    y = strided(None, None, *tensors[2:])
    found = y, *torch.autograd.grad(y, (x, *tensors[2:]), dy.t().contiguous().t())
    for value, truth in zip(found, run(ours(triton=triton), None, tensors, dy), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(adapter, transposed):
    x, weight, lora_A, lora_B = leaves(torch.float32, transposed=transposed)
    factors = (lora_A, lora_B) if adapter else (None, None)
    arguments = x, weight, *factors, OFFSETS, SCALING, transposed, False
    torch.library.opcheck(OPS.experts_forward.default, arguments)
    s = OPS.experts_forward(*arguments)[1].detach()
    saved = [t if t is None else t.detach() for t in arguments[:4]]
    backward = random(M, N, seed=5), *saved, s, *arguments[4:7], not adapter, adapter, False, False
    torch.library.opcheck(OPS.experts_backward.default, backward)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize(("triton", "transposed"), [(False, False), (False, True), (True, True)])
def test_fake_tensors_flops_and_what_is_saved(triton, transposed, adapter):
    rank, padded = (R, 16 if triton else R) if adapter else (0, 0)
    x, weight, *factors = leaves(torch.float16, transposed=transposed, master=torch.float32)
    factors = factors if adapter else [None, None]
    trained = [t for t in (x, *factors) if t is not None]
    arguments = x, weight, *factors, OFFSETS, SCALING, transposed, triton
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y, s = OPS.experts_forward(*arguments)
    given = {t.untyped_storage().data_ptr() for t in arguments if isinstance(t, torch.Tensor)}
    kept = [t for t in saved if t.untyped_storage().data_ptr() not in given]
    assert len(saved) >= len(given) and sum(t.untyped_storage().nbytes() for t in kept) == 2 * M * padded
    with FlopCounterMode(display=False) as counter:
        OPS.experts_forward(*arguments)
    assert counter.get_total_flops() == 2 * M * (N * K + rank * (N + K))
    # dS for dx and dA alike; by itself, and with all that is asked for.
    products = {0: N * K + rank * K + rank * N, 1: rank * K + rank * N, 2: N * rank}
    for number, tensor in enumerate(trained):
        frozen = {id(t): t.detach() for t in trained if t is not tensor}
        y, _ = OPS.experts_forward(*[frozen.get(id(t), t) for t in arguments])
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(y, tensor, torch.ones_like(y))
        assert counter.get_total_flops() == 2 * M * products[number]
    y, s = OPS.experts_forward(*arguments)
    with FlopCounterMode(display=False) as counter:
        real = y, s, *torch.autograd.grad(y, trained, torch.ones_like(y))
    assert counter.get_total_flops() == 2 * M * (N * K + 2 * rank * (N + K))
    with FakeTensorMode() as mode:
        fakes = {id(t): mode.from_tensor(t) for t in arguments if isinstance(t, torch.Tensor)}
        y, s = OPS.experts_forward(*[fakes.get(id(t), t) for t in arguments])
        fake = y, s, *torch.autograd.grad(y, [fakes[id(t)] for t in trained], torch.ones_like(y))
    for one, other in zip(fake, real, strict=True):
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


# ------------------------------------------------------------------------------------------------- a mixture's experts

T, TOP_K = 11, 3
# {class of experts: the folder of Transformers, the class of its config, its sizes}
KINDS = {
    "Qwen3MoeExperts": ("qwen3_moe", "Qwen3MoeConfig", {"moe_intermediate_size": 9, "num_experts": E + 1}),
    "MixtralExperts": ("mixtral", "MixtralConfig", {"intermediate_size": 9, "num_local_experts": E + 1}),
    # With biases, weights (E, K, N), and gate and up interleaved.
    "GptOssExperts": ("gpt_oss", "GptOssConfig", {"intermediate_size": 9, "num_local_experts": E + 1}),
    # Without a gate.
    "NemotronHExperts": ("nemotron_h", "NemotronHConfig", {"moe_intermediate_size": 9, "n_routed_experts": E + 1}),
    # With a norm after the second product.
    "MuseSparkExperts": (
        "muse_spark",
        "MuseSparkTextConfig",
        {"moe_hidden_size": 14, "moe_intermediate_size": 9, "num_local_experts": E + 1},
    ),
}
BOTH = ("first", "second")


def build(kind, dtype=torch.float32):
    """A frozen module of experts with numbers of its own everywhere."""
    folder, config_class, sizes = KINDS[kind]
    path = f"transformers.models.{folder}"
    modeling = pytest.importorskip(f"{path}.modeling_{folder}", reason=f"this version of Transformers has no {folder}")
    config = getattr(import_module(f"{path}.configuration_{folder}"), config_class)
    module = getattr(modeling, kind)(config(hidden_size=14, num_attention_heads=2, num_hidden_layers=1, **sizes))
    module.config._experts_implementation = "eager"
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(random(*parameter.shape, seed=20 + seed, scale=parameter.shape[-1] ** -0.5))
    return module.to(DEVICE, dtype).requires_grad_(False)


def adapters_of(module, which=BOTH, dtype=torch.float32):
    """{name of the weight: factors that require gradients} of the first or the second weight, or both."""
    names = {"first": "gate_up_proj" if module.has_gate else "up_proj", "second": "down_proj"}
    adapters = {}
    for seed, name in enumerate(names[one] for one in which):
        count, n, k = getattr(module, name).shape
        n, k = (k, n) if module.is_transposed else (n, k)
        lora_A = random(count * R, k, dtype=dtype, seed=30 + seed, scale=k**-0.5).requires_grad_()
        lora_B = random(n, R * count, dtype=dtype, seed=40 + seed, scale=R**-0.5).requires_grad_()
        adapters[name] = ExpertFactors(lora_A, lora_B, 0.75 + seed)
    return adapters


def routed(dtype):
    """x, top_k_index and top_k_weights, of which no token goes to expert 3."""
    scores = random(T, E + 1, seed=50)
    scores[:, 3] = -torch.inf
    x = random(T, 14, dtype=dtype, seed=51).requires_grad_()
    return x, scores.topk(TOP_K).indices, random(T, TOP_K, seed=52).abs().to(dtype).requires_grad_()


def with_updates(module, x, index, weights, adapters):
    """The module's own forward with W + ΔW, formed in W's dtype."""
    whole = {}
    for name, (lora_A, lora_B, scaling) in adapters.items():
        weight = getattr(module, name)
        a, b = lora_A.to(weight.dtype), lora_B.to(weight.dtype)
        delta = torch.einsum("nre,erk->enk", b.view(len(b), R, -1), a.view(weight.shape[0], R, -1)) * scaling
        whole[name] = weight + (delta.mT if module.is_transposed else delta)
    return torch.func.functional_call(module, whole, (x, index, weights))


def outcomes(function, module, routing, adapters, **options):
    """{"y", "x", "weights", "down_proj.lora_A", …: y, and the gradient of every leaf}."""
    x, index, weights = routing
    leaves = {"x": x, "weights": weights}
    for name, adapter in adapters.items():
        leaves |= {f"{name}.lora_A": adapter.lora_A, f"{name}.lora_B": adapter.lora_B}
    y = function(module, x, index, weights, adapters, **options)
    dy = random(*y.shape, seed=53).to(y.dtype)
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, leaves.values(), dy), strict=True))


def exact_outcomes(module, routing, adapters):
    """The same by the module's own forward in float64, of the same numbers."""
    double = lambda t: t.detach().double().requires_grad_()  # noqa: E731
    adapters = {name: ExpertFactors(double(a), double(b), scaling) for name, (a, b, scaling) in adapters.items()}
    x, index, weights = routing
    routing = double(x), index, double(weights)
    return outcomes(with_updates, copy.deepcopy(module).double(), routing, adapters)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("which", [BOTH, ("first",), ("second",)], ids="+".join)
@pytest.mark.parametrize("kind", KINDS)
def test_experts_equal_their_own_forward_with_the_update(kind, which, dtype):
    module, routing = build(kind, dtype), routed(dtype)
    adapters = adapters_of(module, which, dtype)
    mine, exact = outcomes(run_experts, module, routing, adapters), exact_outcomes(module, routing, adapters)
    # The norm computes in fp32.
    bound = 1e-6 if dtype == torch.float32 or kind == "MuseSparkExperts" else 1e-14
    for name, truth in exact.items():
        assert mine[name].dtype == dtype and truth.any() and error(mine[name], truth) < bound, name


def test_what_older_versions_of_transformers_do_not_say_is_not_asked():
    module, routing = build("MixtralExperts"), routed(torch.float32)
    adapters = adapters_of(module)
    wanted = run_experts(module, *routing, adapters)
    for name in ("has_post_expert_norm", "_is_expert_parallel"):
        vars(module).pop(name, None)
    assert refusal(module) is None and torch.equal(run_experts(module, *routing, adapters), wanted)


HALF = [(kind, dtype, "torch") for kind in KINDS for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("kind", "dtype", "backend"), [*HALF, ("GptOssExperts", torch.float16, "triton")])
def test_experts_err_no_more_than_their_own_forward(kind, dtype, backend):
    module, routing = build(kind, dtype), routed(dtype)
    adapters = adapters_of(module)
    mine, again = (outcomes(run_experts, module, routing, adapters, backend=backend) for _ in range(2))
    low = outcomes(with_updates, module, routing, adapters)
    for name, truth in exact_outcomes(module, routing, adapters).items():
        assert mine[name].dtype == low[name].dtype and torch.equal(mine[name], again[name]), name
        assert_as_exact_as(mine[name], low[name], truth, factor=1.5)


class Spy(TorchDispatchMode):
    """Notes the dtype of x in every call of the op."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (OPS.experts_forward.default, OPS.experts_backward.default):
            self.dtypes.append(args[0].dtype)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_runs_both_products_in_its_dtype(kind, x_dtype):
    module, routing = build(kind), routed(x_dtype)
    adapters = adapters_of(module)

    def cast(function):
        def run(*arguments):
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
                return function(*arguments)

        return run

    exact = exact_outcomes(module, routing, adapters)
    low = outcomes(cast(with_updates), module, routing, adapters)
    with Spy() as spy:
        mine = outcomes(cast(run_experts), module, routing, adapters)
    assert spy.dtypes[:2] == [torch.bfloat16] * 2 and len(spy.dtypes) == 4
    for name, truth in exact.items():
        assert mine[name].dtype == low[name].dtype, name
        assert_as_exact_as(mine[name], low[name], truth)  # W + ΔW is formed in fp32: one rounding less than by S
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y = run_experts(module, *routing, adapters)
    assert y.dtype == x_dtype
    torch.autograd.grad(y, adapters["down_proj"].lora_A, torch.ones_like(y))


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_comes(kind):
    module = build(kind)
    x, index, weights = routed(torch.float32)
    routing = x[:0].detach().requires_grad_(), index[:0], weights[:0].detach().requires_grad_()
    found = outcomes(run_experts, module, routing, adapters_of(module))
    assert found["y"].shape == (0, 14) and not any(value.any() for value in found.values())


def test_refusals_of_a_module():
    assert all(refusal(build(kind)) is None for kind in KINDS)
    module = build("MixtralExperts")
    assert refusal(nn.Linear(2, 2)) == "Linear is no module of experts as Transformers describes them"
    module.__class__ = lora_owner(type(module))
    assert refusal(module) is None
    del module.down_proj
    assert refusal(module) == "MixtralExperts is no module of experts as Transformers describes them"
    module = build("MixtralExperts")
    module._is_expert_parallel = True
    assert refusal(module) == "its experts are spread over processes"


def test_refusals_of_a_call():
    x, index, weights = (t.detach() for t in routed(torch.float32))
    names = {"down_proj": None}

    def asked(*arguments, kind="GptOssExperts", change=lambda module: None, names=names):
        module = build(kind)
        change(module)
        return call_refusal(module, arguments, names)

    routing = x, index, weights
    assert asked(*routing) is None and asked(*routing, kind="NemotronHExperts", names={"up_proj": None}) is None
    other = "the call is not of hidden states, top_k_index and top_k_weights"
    assert asked(x, index) == asked(x, None, weights) == asked(*routing, weights) == other
    assert asked(x[None], index, weights) == "hidden states are (1, 11, 14), not (tokens, hidden size)"
    assert asked(x, index.flatten(), weights) == "hidden states are (11, 14), not (tokens, hidden size)"
    flat = lambda module: setattr(module, "down_proj", nn.Parameter(module.down_proj[0]))  # noqa: E731
    assert asked(*routing, change=flat) == "down_proj is no plain parameter of three dimensions"
    trained = lambda module: module.gate_up_proj.requires_grad_(True)  # noqa: E731
    assert asked(*routing, change=trained) == "gate_up_proj is trained itself"
    half = asked(x.bfloat16(), index, weights)
    assert half == "hidden states are in torch.bfloat16, gate_up_proj in torch.float32"
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert asked(x.bfloat16(), index, weights) is None
    biases = {"gate_up_proj_bias": None, "down_proj_bias": None, "down_proj": None}
    assert asked(*routing, names=biases) == "down_proj_bias is adapted too"


@pytest.mark.parametrize("transposed", [False, True])
def test_a_gradient_can_be_differentiated(transposed):
    arguments = leaves(torch.float64, transposed=transposed)
    trained = [tensor for tensor in arguments if tensor.requires_grad]

    def second(function):
        gradients = torch.autograd.grad(function(*arguments).square().sum(), trained, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), trained)

    for found, wanted in zip(second(ours(transposed)), second(formed(transposed))):
        assert wanted.abs().max() > 0 and error(found, wanted) < 1e-12
