"""lora_linear and lora_update: values and all gradients against a float64 formula, dropout, dtypes, and what PyTorch
asks of an op.

The rule for low precision: the op may err at most 1.5 times as much as the same-dtype eager PyTorch path errs against
float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lora_fast import LoraFastError, lora_grouped_linear, lora_linear, lora_linears, lora_swiglu_mlp, lora_update
from lora_fast.dora import scale_columns
from lora_fast.kernels import reference

OPS = torch.ops.lora_fast
SCALING = 0.75
# (shape of x without K, K, N): nothing divides anything, and one empty batch.
SHAPES = [((33,), 70, 12), ((3, 11), 12, 33), ((2, 1, 5), 33, 70), ((129,), 48, 33), ((0,), 70, 12)]
RANKS = [1, 5, 8, 16, 48]


def tensors(rows, k, n, r, dtype=torch.float32, adapter_dtype=None, seed=0):
    """{x (…, K), weight (N, K), bias (N,), lora_A (R, K), lora_B (N, R)}, all but weight trained; dy (…, N)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=dtype, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    adapter_dtype = adapter_dtype or dtype
    values = {
        "x": draw(*rows, k),
        "weight": draw(n, k, scale=k**-0.5),
        "bias": draw(n),
        "lora_A": draw(r, k, dtype=adapter_dtype, scale=k**-0.5),
        "lora_B": draw(n, r, dtype=adapter_dtype, scale=r**-0.5),
    }
    return {name: value.requires_grad_(name != "weight") for name, value in values.items()}, draw(*rows, n)


def exact(values, dy, scaling=SCALING, keep=None, p=0.0):
    """The formula and its derivatives written out in float64: y, dx, dbias, dlora_A, dlora_B (and dweight)."""
    x, w, b, a, bb = (values[n].detach().double() for n in ("x", "weight", "bias", "lora_A", "lora_B"))
    shape, x, dy = x.shape, x.reshape(-1, x.shape[-1]), dy.double().reshape(-1, w.shape[0])
    m = torch.ones_like(x) if keep is None else keep.double().reshape(x.shape) / (1 - p)
    delta = scaling * bb @ a
    return {
        "y": (x @ w.T + b + (m * x) @ delta.T).reshape(*shape[:-1], w.shape[0]),
        "x": (dy @ w + m * (dy @ delta)).reshape(shape),
        "weight": dy.T @ x,
        "bias": dy.sum(0),
        "lora_A": scaling * (dy @ bb).T @ (m * x),
        "lora_B": scaling * dy.T @ ((m * x) @ a.T),
    }


def eager(x, weight, lora_A, lora_B, scaling, bias, keep=None, p=0.0):
    """What a PyTorch user writes: the products in x's dtype, autograd for the rest."""
    dropped = x if keep is None else x * (keep.to(x.dtype) / (1 - p))
    update = (dropped @ lora_A.to(x.dtype).t()) @ lora_B.to(x.dtype).t()
    return torch.nn.functional.linear(x, weight.to(x.dtype), bias.to(x.dtype)) + update * scaling


def run(function, values, dy, *args, **kwargs):
    """{"y": output, name: gradient of every leaf that requires one}."""
    leaves = {name: v.detach().clone().requires_grad_(v.requires_grad) for name, v in values.items()}
    if not values["x"].is_contiguous():  # clone() of an expanded or sliced tensor is dense: take the original's storage
        leaves["x"] = values["x"].detach().requires_grad_(values["x"].requires_grad)
    ordered = [leaves[n] for n in ("x", "weight", "lora_A", "lora_B")]
    y = function(*ordered, SCALING, leaves["bias"], *args, **kwargs)
    y.backward(dy)
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}


def error(value, truth):
    assert value.shape == truth.shape
    return (value.double() - truth).norm().item()


def assert_as_exact_as_eager(ours, eagers, truth):
    for name, value in ours.items():
        assert value.dtype == eagers[name].dtype, name
        assert torch.isfinite(value).all(), name
        if value.numel() and truth[name].norm() > 0:
            assert value.abs().max() > 0, f"{name} is all zero"
        assert error(value, truth[name]) <= 1.5 * error(eagers[name], truth[name]), name


# ------------------------------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize(("rows", "k", "n"), SHAPES)
def test_linear_errs_no_more_than_eager(rows, k, n, r, dtype):
    values, dy = tensors(rows, k, n, r, dtype)
    ours, eagers = run(lora_linear, values, dy), run(eager, values, dy)
    assert set(ours) == {"y", "x", "bias", "lora_A", "lora_B"}
    assert_as_exact_as_eager(ours, eagers, exact(values, dy))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("r", RANKS)
def test_fp32_masters_get_fp32_gradients(r, dtype):
    values, dy = tensors((33,), 70, 12, r, dtype, adapter_dtype=torch.float32)
    ours, eagers = run(lora_linear, values, dy), run(eager, values, dy)
    assert ours["lora_A"].dtype == ours["lora_B"].dtype == torch.float32
    assert ours["y"].dtype == ours["x"].dtype == dtype
    # The truth is the formula at the fp32 masters: the op rounds s · lora_B to x's dtype, the eager path lora_B.
    assert_as_exact_as_eager(ours, eagers, exact(values, dy))


def test_float64_is_the_formula():
    values, dy = tensors((33,), 70, 12, 5, torch.float64)
    truth = exact(values, dy)
    for name, value in run(lora_linear, values, dy).items():
        # 70 terms a sum at most, values of order 1
        torch.testing.assert_close(value, truth[name], rtol=0, atol=70 * torch.finfo(torch.float64).eps * 20)


@pytest.mark.parametrize("r", [5, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base_dtype", [None, torch.float32, torch.bfloat16])
def test_update_adds_to_the_base(r, dtype, base_dtype):
    values, dy = tensors((3, 11), 70, 12, r, dtype)
    base_dtype = base_dtype or dtype
    dy = dy.to(base_dtype)

    def ours(x, weight, lora_A, lora_B, scaling, bias):
        base = torch.nn.functional.linear(x, weight, bias).to(base_dtype)
        return lora_update(x, base, lora_A, lora_B, scaling)

    def theirs(x, weight, lora_A, lora_B, scaling, bias):
        base = torch.nn.functional.linear(x, weight, bias).to(base_dtype)
        return base + (((x @ lora_A.t()) @ lora_B.t()) * scaling).to(base_dtype)

    values["weight"].requires_grad_(True)
    got, eagers = run(ours, values, dy), run(theirs, values, dy)
    assert got["y"].dtype == base_dtype
    assert_as_exact_as_eager(got, eagers, exact(values, dy))


def test_weight_that_requires_a_gradient_gets_it():
    values, dy = tensors((33,), 70, 12, 5)
    values["weight"].requires_grad_(True)
    ours = run(lora_linear, values, dy)
    assert ours["weight"].abs().max() > 0
    assert_as_exact_as_eager(ours, run(eager, values, dy), exact(values, dy))
    with torch.no_grad():  # no graph to build: the fused op again, and the same values
        torch.testing.assert_close(
            lora_linear(*(values[n] for n in ("x", "weight", "lora_A", "lora_B")), SCALING, values["bias"]), ours["y"]
        )


@pytest.mark.parametrize("missing", [("x",), ("x", "lora_A"), ("x", "lora_B"), ("lora_A", "lora_B"), ("bias",)])
def test_only_what_requires_a_gradient_gets_one(missing):
    values, dy = tensors((33,), 70, 12, 5)
    everything = run(lora_linear, values, dy)
    for name in missing:
        values[name].requires_grad_(False)
    some = run(lora_linear, values, dy)
    assert set(some) == set(everything) - set(missing)
    for name, value in some.items():
        assert torch.equal(value, everything[name]), name


@pytest.mark.parametrize("layout", ["transposed", "sliced", "every other", "expanded"])
def test_strided_x_and_dy(layout):
    values, dy = tensors((12, 12), 33, 12, 5)
    x, dy = values["x"].detach(), dy.detach()
    if layout == "transposed":
        strided_x, strided_dy = x.transpose(0, 1), dy.transpose(0, 1)
    elif layout == "sliced":
        strided_x, strided_dy = torch.cat([x, x + 1], -1)[..., :33], torch.cat([dy, dy + 1], -1)[..., :12]
    elif layout == "every other":
        strided_x, strided_dy = torch.stack([x, x + 1], 1)[:, 0], torch.stack([dy, dy + 1], 1)[:, 0]
    else:
        strided_x, strided_dy = x[:1].expand(12, 12, 33), dy[:1].expand(12, 12, 12)
    assert layout == "sliced" or not strided_dy.is_contiguous()
    dense, strided = dict(values), dict(values)
    dense["x"] = strided_x.contiguous().requires_grad_()
    strided["x"] = strided_x.detach().requires_grad_()
    assert not strided["x"].is_contiguous()
    expected, got = run(lora_linear, dense, strided_dy.contiguous()), run(lora_linear, strided, strided_dy)
    for name, value in got.items():
        # The same sums of at most 144 products of values of order 1, taken in another order
        torch.testing.assert_close(value, expected[name], rtol=2e-6, atol=144 * torch.finfo(torch.float32).eps)


def test_conv1d_weight_is_a_view():
    """GPT-2 keeps its weight (K, N): the transposed view gives the same numbers."""
    values, dy = tensors((33,), 70, 12, 5)
    stored = values["weight"].detach().t().contiguous()
    transposed = values | {"weight": stored.t()}
    assert_as_exact_as_eager(run(lora_linear, transposed, dy), run(eager, values, dy), exact(values, dy))


def test_gradcheck():
    values, _ = tensors((5,), 7, 6, 3, torch.float64)
    x, w, b, a, bb = (values[n] for n in ("x", "weight", "bias", "lora_A", "lora_B"))
    p = 0.4
    mask = reference.pack_mask(torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) > p)
    for drop in ((None, None, 0.0, False), (mask[None], None, p, False)):

        def linear(x, b, a, bb, drop=drop):
            return OPS.linears_forward(x, [w], [b], [a], [bb], [SCALING], *drop)[0]

        def update(x, base, a, bb, drop=drop):
            return OPS.update_forward(x, base, a, bb, SCALING, *drop)[0]

        assert torch.autograd.gradcheck(linear, (x, b, a, bb))
        assert torch.autograd.gradcheck(update, (x, torch.randn(5, 6).double().requires_grad_(), a, bb))


def test_second_derivatives():
    values, _ = tensors((5,), 7, 6, 3, torch.float64)
    x, w, b, a, bb = (values[n] for n in ("x", "weight", "bias", "lora_A", "lora_B"))
    base = torch.zeros(5, 6, dtype=torch.float64)
    mask = reference.pack_mask(torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) > 0.4)
    for drop in ((None, None, 0.0, False), (mask[None], None, 0.4, False)):
        for function in (
            lambda x, a, bb, drop=drop: OPS.linears_forward(x, [w], [b], [a], [bb], [SCALING], *drop)[0],
            lambda x, a, bb, drop=drop: OPS.update_forward(x, base, a, bb, SCALING, *drop)[0],
        ):
            # gradgradcheck passes over gradients that autograd can't follow: none of ours may be such.
            first = torch.autograd.grad(function(x, a, bb).square().sum(), (x, a, bb), create_graph=True)
            usual = torch.autograd.grad(function(x, a, bb).square().sum(), (x, a, bb))
            assert all(gradient.requires_grad for gradient in first)
            torch.testing.assert_close(tuple(gradient.detach() for gradient in first), usual)
            assert torch.autograd.gradgradcheck(function, (x, a, bb))


def test_second_derivatives_of_layers_that_are_frozen_in_part():
    generator = torch.Generator().manual_seed(3)
    x, *weights = (torch.randn(*size, generator=generator).double() for size in ((5, 7), (6, 7), (4, 7)))
    factors = [torch.randn(*size, generator=generator).double() for size in ((3, 7), (2, 7), (6, 3), (4, 2))]
    bias = torch.zeros(6).double().requires_grad_()
    for trained in ([0], [2], [0, 2], [0, 3], []):
        values = [f.clone().requires_grad_(i in trained) for i, f in enumerate(factors)]
        leaves = [values[i] for i in trained] + [bias]
        ys = lora_linears(x, weights, values[:2], values[2:], [SCALING, SCALING], [bias, None])
        plain = [x @ w.t() + SCALING * x @ a.t() @ b.t() for w, a, b in zip(weights, values[:2], values[2:])]
        got, expected = ((p0.square().sum() + p1.square().sum()) for p0, p1 in (ys, (plain[0] + bias, plain[1])))
        first, usual = (torch.autograd.grad(loss, leaves, create_graph=True) for loss in (got, expected))
        torch.testing.assert_close(first, usual)
        second, usual = (
            torch.autograd.grad(sum(g.square().sum() for g in grads), leaves, allow_unused=True)
            for grads in (first, usual)
        )
        torch.testing.assert_close(second, usual)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_pass_through(poison):
    values, dy = tensors((33,), 70, 12, 5)
    values["x"].data[3, 4] = poison
    y = run(lora_linear, values, dy)["y"]
    assert not torch.isfinite(y[3]).any()
    assert torch.isfinite(y[:3]).all() and torch.isfinite(y[4:]).all()
    values, dy = tensors((33,), 70, 12, 5)
    dy[3, 4] = poison
    gradients = run(lora_linear, values, dy)
    assert not torch.isfinite(gradients["x"][3]).any() and torch.isfinite(gradients["x"][4:]).all()
    assert not torch.isfinite(gradients["lora_B"][4]).any() and torch.isfinite(gradients["lora_B"][5:]).all()
    assert not torch.isfinite(gradients["lora_A"]).any()


# -------------------------------------------------------------------------------------------------------------- dropout


def unpacked(packed, shape):
    bits = np.unpackbits(packed.numpy(), axis=1, bitorder="little")
    return torch.from_numpy(bits[:, : shape[-1]].astype(bool)).reshape(shape)


@given(st.integers(0, 9), st.integers(1, 40), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_mask_survives_packing(m, k, dtype):
    mask = torch.rand(m, k, generator=torch.Generator().manual_seed(41 * m + k)) > 0.5
    packed = reference.pack_mask(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (m, -(-k // 8))
    assert packed.tolist() == np.packbits(mask.numpy(), axis=1, bitorder="little").tolist()
    x = torch.arange(1, m * k + 1).to(dtype).reshape(m, k)
    assert torch.equal(reference.apply_mask(x, packed), torch.where(mask, x, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (7, 5), (33, 70), (3, 11, 13)])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_same_seed_keeps_the_elements_that_torch_keeps(dtype, shape, permuted, p):
    x = torch.ones(shape, dtype=dtype)
    if permuted:
        x = x.reshape(shape[::-1]).permute(*range(len(shape))[::-1])
    torch.manual_seed(3)
    kept = torch.nn.functional.dropout(x, p) != 0
    after_torch = torch.rand(1)
    torch.manual_seed(3)
    packed = OPS.dropout_mask(x, p)
    assert torch.equal(torch.rand(1), after_torch)  # and whatever is drawn next is the same too
    assert torch.equal(unpacked(packed, shape), kept)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_kept_fraction(p):
    torch.manual_seed(0)
    n = 1000 * 257
    kept = int(unpacked(OPS.dropout_mask(torch.ones(1000, 257), p), (1000, 257)).sum())
    assert abs(kept - n * (1 - p)) < 5 * math.sqrt(n * p * (1 - p))  # a binomial five sigmas out: 1 in 1.7 million


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_backward_uses_the_mask_of_forward(p, update):
    """With W = 0 and A = B = 1, y = m ∘ x / (1 − p) and dx = m ∘ dy / (1 − p): the mask can be read off both."""
    k = 37
    eye, zero = torch.eye(k), torch.zeros(k, k)
    x = torch.rand(29, k).add_(1).requires_grad_()
    dy = torch.rand(29, k).add_(1)
    if update:
        y = lora_update(x, torch.zeros(29, k), eye, eye, dropout_p=p)
    else:
        y = lora_linear(x, zero, eye, eye, dropout_p=p)
    y.backward(dy)
    kept = y.detach() != 0
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(y.detach(), torch.where(kept, x.detach() / (1 - p), 0))
    torch.testing.assert_close(x.grad, torch.where(kept, dy / (1 - p), 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("r", [5, 16])
@pytest.mark.parametrize("update", [False, True])
def test_dropout_values_and_gradients(dtype, r, update):
    p = 0.3
    values, dy = tensors((3, 11), 70, 12, r, dtype)
    torch.manual_seed(5)
    keep = torch.nn.functional.dropout(torch.ones(3, 11, 70, dtype=dtype), p) != 0

    def ours(x, weight, lora_A, lora_B, scaling, bias):
        torch.manual_seed(5)
        if update:
            base = torch.nn.functional.linear(x, weight, bias)
            return lora_update(x, base, lora_A, lora_B, scaling, dropout_p=p)
        return lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p=p)

    got, eagers = run(ours, values, dy), run(eager, values, dy, keep, p)
    assert_as_exact_as_eager(got, eagers, exact(values, dy, keep=keep, p=p))


def test_dropout_acts_in_training_only():
    values, _ = tensors((33,), 70, 12, 5)
    plain = lora_linear(values["x"], values["weight"], values["lora_A"], values["lora_B"], SCALING)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    silent = lora_linear(
        values["x"], values["weight"], values["lora_A"], values["lora_B"], SCALING, dropout_p=0.5, training=False
    )
    assert torch.equal(silent, plain)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------- what PyTorch asks


def op_samples():
    values, dy = tensors((3, 11), 12, 33, 5)
    x, w, b, a, bb = (values[n] for n in ("x", "weight", "bias", "lora_A", "lora_B"))
    mask = reference.pack_mask(torch.rand(33, 12) > 0.5)[None]
    base = torch.randn(3, 11, 33, requires_grad=True)
    forward, update, backward = (o.default for o in (OPS.linears_forward, OPS.update_forward, OPS.linears_backward))
    none = torch.empty(0)
    free, half = (None, None, 0.0, False), (mask, None, 0.5, False)
    yield "linear", forward, (x, [w], [b], [a], [bb], [SCALING], *free)
    yield "linear without bias", forward, (x, [w], [none], [a], [bb], [SCALING], *half)
    a2, bb2, w2 = a[:3].detach().requires_grad_(), bb[:7, :3].detach().requires_grad_(), w[:7]
    group = [w, w2], [b, none], [a, a2], [bb, bb2], [SCALING, 2.0]
    yield "two linears", forward, (x, *group, *free)
    yield "two linears with dropout", forward, (x, *group, torch.cat([mask, mask]), None, 0.5, False)
    yield "update", update, (x, base, a, bb, SCALING, *free)
    yield "update with dropout", update, (x, base, a, bb, SCALING, *half)
    dy, x, w, a, bb = (v.detach() for v in (dy, x, w, a, bb))
    s = (x @ a.t()).reshape(-1, 5)
    yield "backward", backward, ([dy], x, [w], [a], [bb], s, None, [SCALING], 0.0, True, True, True, False)
    yield "backward of dB", backward, ([dy], x, [w], [a], [bb], s, mask, [SCALING], 0.5, False, False, True, False)
    without = [dy], x, [None], [a], [bb], s, mask, [SCALING], 0.5
    yield "backward without weight", backward, (*without, True, False, True, False)
    masters = [dy.bfloat16()], x.bfloat16(), [w.bfloat16()], [a], [bb], s.bfloat16(), None, [SCALING], 0.0
    yield "backward to fp32 masters", backward, (*masters, True, True, True, False)
    s2 = torch.cat([s, s[:, :3]], dim=1)
    partly = [None, dy[..., :7].contiguous()], x, [w, w2], [a, a2.detach()], [bb, bb2.detach()], s2, None, [1.0, 2.0]
    yield "backward of one of two", backward, (*partly, 0.0, True, True, True, False)


@pytest.mark.parametrize(("op", "args"), [pytest.param(op, args, id=name) for name, op, args in op_samples()])
def test_opcheck(op, args):
    torch.library.opcheck(op, args)


def test_opcheck_of_the_mask():
    # Its values are random: everything but the comparison of two runs.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPS.dropout_mask.default, (torch.ones(7, 5), 0.5), test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_fake_tensors_have_the_real_shapes_and_dtypes(dtype, p):
    values, dy = tensors((3, 11), 70, 12, 5, dtype, adapter_dtype=torch.float32)

    def step(values, dy):
        leaves = {name: v.detach().requires_grad_(v.requires_grad) for name, v in values.items()}
        args = [leaves[n] for n in ("x", "weight", "lora_A", "lora_B")]
        y = lora_linear(*args, SCALING, leaves["bias"], dropout_p=p)
        y.backward(dy)
        return [y, *(leaves[n].grad for n in ("x", "lora_A", "lora_B", "bias"))]

    with FakeTensorMode() as mode:
        fakes = step({n: mode.from_tensor(v) for n, v in values.items()}, mode.from_tensor(dy))
    for fake, real in zip(fakes, step(values, dy), strict=True):
        assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)
    # Nothing fake stays behind for the next real call.
    assert all(type(table) is torch.Tensor for table in reference._FACTORS.values())


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("frozen_x", [False, True])
def test_flops(p, frozen_x):
    m, k, n, r = 33, 70, 12, 5
    values, dy = tensors((3, 11), k, n, r)
    values["x"].requires_grad_(not frozen_x)
    with FlopCounterMode(display=False) as counter:
        y = lora_linear(values["x"], values["weight"], values["lora_A"], values["lora_B"], SCALING, dropout_p=p)
        forward = counter.get_total_flops()
        y.backward(dy)
    assert forward == 2 * m * (n * k + r * k + n * r)
    dB, dS, dA, dx = n * r, n * r, r * k, n * k + r * k
    assert counter.get_total_flops() - forward == 2 * m * (dB + dS + dA + (0 if frozen_x else dx))
    with FlopCounterMode(display=False) as counter:
        lora_update(values["x"], torch.zeros(3, 11, n), values["lora_A"], values["lora_B"])
    assert counter.get_total_flops() == 2 * m * (r * k + n * r)


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_for_backward(p, update, dtype):
    """x itself, S and the mask's bits: no second x, in whatever dtype."""
    m, k, n, r = 33, 70, 12, 5
    values, _ = tensors((3, 11), k, n, r, dtype, adapter_dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        if update:
            y = lora_update(
                values["x"], torch.zeros(3, 11, n, dtype=dtype), values["lora_A"], values["lora_B"], dropout_p=p
            )
        else:
            y = lora_linear(values["x"], values["weight"], values["lora_A"], values["lora_B"], dropout_p=p)
    own = {values[name].untyped_storage().data_ptr() for name in values}
    extra = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert values["x"].untyped_storage().data_ptr() in extra
    extra = {pointer: nbytes for pointer, nbytes in extra.items() if pointer not in own}
    mask_bytes = m * -(-k // 8) if p else 0
    assert sum(extra.values()) == m * r * values["x"].element_size() + mask_bytes
    assert y.grad_fn is not None


def test_no_graph_no_saving():
    values, _ = tensors((33,), 70, 12, 5)
    args = [values[n] for n in ("x", "weight", "lora_A", "lora_B")]
    with torch.no_grad():
        assert lora_linear(*args).grad_fn is None
    with torch.inference_mode():
        assert not lora_linear(*args, dropout_p=0.5).requires_grad
    # An op that first ran in inference mode leaves nothing behind that autograd could not save.
    lora_linear(*args, dropout_p=0.5).sum().backward()
    assert values["lora_A"].grad.abs().max() > 0


def calls_of_every_op(backend):
    """{op: call on (12, 16) numbers}, each with biases, dropout that draws alike at each call, and 3-dimensional x."""
    values, _ = tensors((3, 4), 16, 16, 4)
    x, weight, lora_A, lora_B, bias = (values[n] for n in ("x", "weight", "lora_A", "lora_B", "bias"))
    layer, options = (weight, lora_A, lora_B, SCALING, bias), {"dropout_p": 0.5, "backend": backend}
    frozen = (weight, lora_A, lora_B, SCALING, bias.detach())

    def grouped(x):
        segments = [(0, 5, 0), (5, 9, 1)]
        factors = [lora_A, lora_A], [lora_B, lora_B], [1.0, SCALING]
        return lora_grouped_linear(x, weight, *factors, segments, bias, **options)

    calls = {
        "lora_linear": lambda x: lora_linear(x, *layer, **options),
        "lora_linears": lambda x: torch.stack(lora_linears(x, *map(list, zip(layer, layer)), **options)),
        "lora_update": lambda x: lora_update(x, x, lora_A, lora_B, **options),
        "lora_swiglu_mlp": lambda x: lora_swiglu_mlp(x, frozen, frozen, frozen, **options),
        "lora_grouped_linear": grouped,
        "scale_columns": lambda x: scale_columns(x, lora_B[:, 1], bias, backend=backend),
    }
    return x, calls


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_without_a_graph_every_op_computes_what_it_does_with_one(backend):
    x, calls = calls_of_every_op(backend)
    for name, call in calls.items():
        torch.manual_seed(1)
        expected = call(x)
        for without in (torch.no_grad, torch.inference_mode):
            torch.manual_seed(1)
            with without():
                y = call(x)
            assert expected.requires_grad and not y.requires_grad, name
            assert y.shape == expected.shape and torch.equal(y, expected), name
        torch.manual_seed(1)
        assert torch.equal(call(x).mul_(2), 2 * expected), name  # no view, which autograd lets nobody change


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_forward_mode_is_refused_rather_than_wrong(backend, graph):
    x, calls = calls_of_every_op(backend)
    for name, call in calls.items():
        with torch.set_grad_enabled(graph), torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
            with pytest.raises(NotImplementedError, match="jvp"):
                call(dual)
                pytest.fail(name)


@pytest.mark.parametrize("used", [(1,), (0, 2), (1, 2)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_outputs_that_nobody_used_leave_the_others_their_masks(backend, used):
    (x, *_), ns, ranks, p = tensors((5,), 19, 7, 2)[0].values(), (7, 9, 11), (2, 3, 4), 0.4
    layers = [tensors((5,), 19, n, r, seed=i)[0] for i, (n, r) in enumerate(zip(ns, ranks))]
    weights, lora_As, lora_Bs = ([layer[name] for layer in layers] for name in ("weight", "lora_A", "lora_B"))
    ys = lora_linears(x, weights, lora_As, lora_Bs, (0.5, 0.6, 0.7), dropout_p=p, backend=backend)
    masks = next(t for t in ys[0].grad_fn.saved_tensors if t is not None and t.dtype == torch.uint8)
    expected = []
    for i in used:
        kept = x * reference.unpack_mask(masks[i], x) / (1 - p)
        update = kept @ lora_As[i].t() @ lora_Bs[i].t() * (0.5, 0.6, 0.7)[i]
        expected.append(torch.nn.functional.linear(x, weights[i]) + update)
    leaves = [x, *(lora_As[i] for i in used), *(lora_Bs[i] for i in used)]
    found, truths = (
        torch.autograd.grad(sum((i + 1) * y.square().sum() for i, y in enumerate(outputs)), leaves)
        for outputs in ([ys[i] for i in used], expected)
    )
    for gradient, truth in zip(found, truths):
        torch.testing.assert_close(gradient, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_many_gradients_at_once(p):
    """is_grads_batched, also of factors that serve two layers; with p a mask of each layer."""
    values, _ = tensors((5,), 19, 12, 3, dtype=torch.float64)
    x, lora_A, lora_B = (values[name] for name in ("x", "lora_A", "lora_B"))
    weights = [values["weight"], 2 * values["weight"]]
    torch.manual_seed(1)
    ys = lora_linears(x, weights, [lora_A] * 2, [lora_B] * 2, (0.5, 0.25), dropout_p=p)
    dys = [torch.randn(4, *y.shape, dtype=y.dtype) for y in ys]
    together = torch.autograd.grad(ys, (x, lora_A, lora_B), dys, is_grads_batched=True, retain_graph=True)
    differentiable = torch.autograd.grad(ys, (x, lora_A, lora_B), [dy[2] for dy in dys], create_graph=True)
    for i in range(4):
        one = torch.autograd.grad(ys, (x, lora_A, lora_B), [dy[i] for dy in dys], retain_graph=True)
        for many, gradient in zip(together, one):
            torch.testing.assert_close(many[i], gradient)
    for many, gradient in zip(together, differentiable):
        torch.testing.assert_close(many[2], gradient)


def test_the_meta_device_tells_shapes():
    values, _ = tensors((5,), 19, 12, 3)
    x, weight, lora_A, lora_B = (values[name].to("meta") for name in ("x", "weight", "lora_A", "lora_B"))
    assert lora_linear(x, weight, lora_A, lora_B).shape == lora_update(x, x.new_empty(5, 12), lora_A, lora_B).shape


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("update", [False, True])
def test_a_backward_inside_autocast_is_the_one_outside(update, p):
    values, dy = tensors((33,), 70, 12, 5)

    def gradients(**autocast):
        torch.manual_seed(1)
        x, weight, lora_A, lora_B = (values[name] for name in ("x", "weight", "lora_A", "lora_B"))
        if update:
            y = lora_update(x, x @ weight.t(), lora_A, lora_B, dropout_p=p)
        else:
            y = lora_linear(x, weight, lora_A, lora_B, dropout_p=p)
        with torch.autocast("cpu", torch.bfloat16, **autocast):
            return torch.autograd.grad(y, (x, lora_A, lora_B) if not update else (lora_A, lora_B), dy)

    for inside, outside in zip(gradients(), gradients(enabled=False)):
        assert torch.equal(inside, outside)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_equals_explicit_casts(p, dtype):
    values, dy = tensors((33,), 70, 12, 5)

    def automatic(x, weight, lora_A, lora_B, scaling, bias):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=dtype):
            return lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p=p)

    def explicit(x, weight, lora_A, lora_B, scaling, bias):
        torch.manual_seed(1)
        return lora_linear(x.to(dtype), weight.to(dtype), lora_A, lora_B, scaling, bias.to(dtype), dropout_p=p)

    got, expected = run(automatic, values, dy.to(dtype)), run(explicit, values, dy.to(dtype))
    assert got["y"].dtype == dtype and got["x"].dtype == got["lora_A"].dtype == torch.float32
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name
        assert value.abs().max() > 0, name


def test_autocast_of_the_update():
    values, _ = tensors((33,), 70, 12, 5)
    base = torch.zeros(33, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_update(values["x"], base, values["lora_A"], values["lora_B"])
    assert y.dtype == base.dtype
    x = values["x"].detach().bfloat16()
    assert torch.equal(y, lora_update(x, base, values["lora_A"], values["lora_B"]))


# ------------------------------------------------------------------------------------------------------------ bad input


def refused(sentence, **changes):
    values, _ = tensors((33,), 70, 12, 5)
    arguments = {name: values[name].detach() for name in values} | changes
    with pytest.raises(LoraFastError, match=sentence):
        lora_linear(**arguments)


def test_bad_sizes_are_named():
    refused(r"x is \(33, 69\), weight is \(12, 70\); weight is \(out_features, in_features\)", x=torch.zeros(33, 69))
    refused(r"weight is \(70, 12\)", weight=torch.zeros(70, 12))
    refused(r"weight is \(70,\)", weight=torch.zeros(70))
    refused(r"x is \(\)", x=torch.tensor(1.0))
    refused(r"lora_A is \(6, 70\), lora_B is \(12, 5\); expected \(R, K\) and \(N, R\)", lora_A=torch.zeros(6, 70))
    refused(r"lora_A is \(70,\)", lora_A=torch.zeros(70))
    refused(r"x is \(33, 70\), lora_A is \(5, 12\); x's last size must be K", lora_A=torch.zeros(5, 12))
    refused(r"lora_B has N=70, the linear layer has N=12; lora_B is \(out_features, R\)", lora_B=torch.zeros(70, 5))
    refused(r"bias is \(11,\); expected \(N,\)=\(12,\)", bias=torch.zeros(11))
    refused(r"x is on cpu, .* lora_B on cpu, bias on meta; expected one device", bias=torch.zeros(12, device="meta"))
    refused(r"x is on cpu, weight on meta, lora_A on cpu, .*", weight=torch.zeros(12, 70, device="meta"))
    refused(r"x is on cpu, weight on cpu, lora_A on meta, .*", lora_A=torch.zeros(5, 70, device="meta"))
    refused(
        r"x is on cpu, .* lora_B on meta, bias on cpu; expected one device", lora_B=torch.zeros(12, 5, device="meta")
    )


def test_bad_values_are_named():
    refused(r"x is torch.bfloat16, weight is torch.float32; cast one of them", x=torch.zeros(33, 70).bfloat16())
    refused(r"dropout_p=1.0; expected a probability in \[0, 1\)", dropout_p=1.0)
    refused(r"dropout_p=-0.1", dropout_p=-0.1)
    refused(r"dropout_p=nan", dropout_p=math.nan)
    refused(r"backend='cuda'; expected one of 'auto', 'triton', 'torch'", backend="cuda")
    refused(
        r"backend='triton': lora_linear computes in torch.float64; the kernels take bf16, fp16 and fp32; use backend",
        **{name: torch.zeros(*shape).double() for name, shape in {"x": (3, 70), "weight": (12, 70)}.items()},
        bias=None,
        backend="triton",
    )


def test_other_numbers_are_refused():
    refused(
        "lora_A is torch.int64, lora_B is torch.float32; expected real", lora_A=torch.ones(5, 70, dtype=torch.int64)
    )
    refused("lora_B is torch.complex64; expected real", lora_B=torch.ones(12, 5, dtype=torch.complex64))
    ints = torch.ones(33, 70, dtype=torch.int64)
    refused("x is torch.int64; expected real", x=ints, weight=torch.ones(12, 70, dtype=torch.int64))
    values, _ = tensors((33,), 70, 12, 5)
    x, weight, lora_A, lora_B = (values[name].detach() for name in ("x", "weight", "lora_A", "lora_B"))
    with pytest.raises(LoraFastError, match=r"the weights are torch.float32, torch.float16; expected one dtype"):
        lora_linears(x, [weight, weight.half()], [lora_A] * 2, [lora_B] * 2, (1.0, 1.0))


def test_update_refuses_too():
    values, _ = tensors((33,), 70, 12, 5)
    x, a, bb = values["x"], values["lora_A"], values["lora_B"]
    with pytest.raises(LoraFastError, match=r"lora_B has N=12, the linear layer has N=11"):
        lora_update(x, torch.zeros(33, 11), a, bb)
    with pytest.raises(LoraFastError, match=r"x is \(33, 70\), base is \(32, 12\)"):
        lora_update(x, torch.zeros(32, 12), a, bb)
    with pytest.raises(LoraFastError, match=r"x is on cpu, base on cpu, lora_A on meta, lora_B on cpu; expected one"):
        lora_update(x, torch.zeros(33, 12), a.to("meta"), bb)
    with pytest.raises(LoraFastError, match=r"dropout_p=2"):
        lora_update(x, torch.zeros(33, 12), a, bb, dropout_p=2)


class _Seen(TorchDispatchMode):
    """Notes which ops of ours go through the dispatcher."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "lora_fast":
            self.ops.append(function._schema.name.removeprefix("lora_fast::"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("update", [False, True])
def test_whoever_looks_on_sees_one_op_and_changes_no_bit(update):
    values, dy = tensors((33,), 70, 12, 5)

    def ours(x, weight, lora_A, lora_B, scaling, bias):
        torch.manual_seed(3)
        if update:
            base = torch.nn.functional.linear(x, weight, bias)
            return lora_update(x, base, lora_A, lora_B, scaling, dropout_p=0.3)
        return lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p=0.3)

    unseen = run(ours, values, dy)
    with _Seen() as seen:
        observed = run(ours, values, dy)
    assert seen.ops == ["dropout_mask", "update_forward" if update else "linears_forward", "linears_backward"]
    assert unseen.keys() == observed.keys()
    for name, value in unseen.items():
        assert torch.equal(value, observed[name]), name


@pytest.mark.parametrize("update", [False, True])
def test_function_transforms_differentiate_and_batch(update):
    values, _ = tensors((33,), 70, 12, 5, dtype=torch.float64)
    x, w, b, a, bb = (values[n].detach() for n in ("x", "weight", "bias", "lora_A", "lora_B"))

    def ours(x):
        if update:
            return lora_update(x, x @ w.T + b, a, bb, SCALING)
        return lora_linear(x, w, a, bb, SCALING, b)

    whole = w + SCALING * bb @ a
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    y, dy = torch.func.jvp(ours, (x,), (tangent,))
    torch.testing.assert_close(y, x @ whole.T + b)
    torch.testing.assert_close(dy, tangent @ whole.T)
    torch.testing.assert_close(torch.func.vmap(ours)(x), x @ whole.T + b)
    torch.testing.assert_close(torch.func.grad(lambda x: ours(x).sum())(x), whole.sum(0).expand_as(x))
