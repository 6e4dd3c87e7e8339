"""lora_fast.dora's op and norms against float64, and what PyTorch asks of an op."""

import functools
import itertools

import pytest
import torch
from kernel_support import DEVICE, DTYPES, assert_as_exact_as, assert_rounded_once, error, nan_filled, random
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_fast.dora import row_norms, scale_columns

OPS = torch.ops.lora_fast
# Which of z, g and bias get a gradient; without any there is no graph.
TRAINED = [needs for needs in itertools.product((True, False), repeat=3) if any(needs)]


def inputs(*shape, dtype=torch.float64, needs=(True, True, True)):
    """z (..., N), g and bias (N,), both with gaps, in at least fp32; dy like z."""
    z, dy = random(*shape, seed=1).to(dtype), random(*shape, seed=2).to(dtype)
    g, bias = random(2, shape[-1], 2, seed=3).to(torch.promote_types(dtype, torch.float32))[:, :, 0]
    return [t.detach().requires_grad_(needed) for t, needed in zip((z, g, bias), needs)], dy


def plain(z, g, bias=None):
    """What a PyTorch user writes."""
    return (z * g if bias is None else z * g + bias).to(z.dtype)


def gradients(function, tensors, dy, **options):
    """y and the gradient of each tensor that gets one."""
    y = function(*tensors, **options)
    return [y.detach(), *torch.autograd.grad(y, [t for t in tensors if t.requires_grad], dy)]


# backend="triton" takes no bf16 in the interpreter, where the kernel's own tests have it.
BY_TRITON = [dtype for dtype in DTYPES if DEVICE.type == "cuda" or dtype != torch.bfloat16]


@pytest.mark.parametrize("needs", TRAINED, ids=str)
@pytest.mark.parametrize(
    ("backend", "dtype"), [*(("torch", dtype) for dtype in DTYPES), *(("triton", dtype) for dtype in BY_TRITON)]
)
def test_errs_no_more_than_pytorch(backend, dtype, needs):
    tensors, dy = inputs(3, 11, 70, dtype=dtype, needs=needs)
    dy = dy.transpose(0, 1).contiguous().transpose(0, 1)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    with nan_filled():
        ours = gradients(scale_columns, tensors, dy, backend=backend)
    for result, eager, truth in zip(ours, gradients(plain, tensors, dy), gradients(plain, exact, dy.double())):
        assert result.dtype == eager.dtype
        if result.shape == dy.shape:
            assert_rounded_once(result, truth.detach())
        else:
            assert_as_exact_as(result, eager, truth)


def test_sums_of_fp16_do_not_overflow():
    tensors, dy = inputs(3000, 12, dtype=torch.float16)
    dy = dy.abs() + 50
    _, _, dg, dbias = gradients(scale_columns, tensors, dy)
    assert error(dbias, dy.double().sum(0)) < 1e-6 and dbias.min() > torch.finfo(torch.float16).max
    assert error(dg, (dy.double() * tensors[0].detach().double()).sum(0)) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (0, 12)], ids=str)
def test_derivatives(shape, backend):
    for needs in TRAINED:
        tensors, _ = inputs(*shape, dtype=torch.float64 if backend == "torch" else torch.float32, needs=needs)
        for arguments in (tensors, tensors[:2]):
            leaves = [t for t in arguments if t.requires_grad]
            if not leaves:
                continue
            if backend == "torch" and shape[0]:
                assert torch.autograd.gradcheck(scale_columns, arguments)
            first, second = [], []
            for function in (functools.partial(scale_columns, backend=backend), plain):
                loss = (function(*arguments) ** 3).sum()
                first.append(torch.autograd.grad(loss, leaves, create_graph=True))
                second.append(torch.autograd.grad(sum(grad.square().sum() for grad in first[-1]), leaves))
            torch.testing.assert_close(*first, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(*second, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("needs", TRAINED, ids=str)
def test_many_gradients_at_once(needs, backend):
    tensors, _ = inputs(2, 5, 12, dtype=torch.float32, needs=needs)
    leaves, dys = [t for t in tensors if t.requires_grad], random(4, 2, 5, 12, seed=5)
    y = scale_columns(*tensors, backend=backend)
    together = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        for many, one in zip(together, torch.autograd.grad(y, leaves, dy, retain_graph=True)):
            torch.testing.assert_close(many[i], one)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_fake_tensors_have_the_real_shapes_and_dtypes(backend):
    tensors, dy = inputs(3, 11, 12, dtype=torch.float16)
    with FakeTensorMode() as mode:
        fakes = gradients(scale_columns, [mode.from_tensor(t) for t in tensors], mode.from_tensor(dy), backend=backend)
    for fake, real in zip(fakes, gradients(scale_columns, tensors, dy, backend=backend), strict=True):
        assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)


def op_samples():
    (z, g, bias), dy = inputs(3, 11, 12, dtype=torch.float16)
    forward, backward = OPS.scale_columns.default, OPS.scale_columns_backward.default
    yield "bias", forward, (z, g, bias, False)
    yield "no bias", forward, (z.detach(), g, None, False)
    yield "transposed", forward, (z[0].detach().t().contiguous().t().requires_grad_(), g.detach(), bias.half(), False)
    yield "one row", forward, (z[0, 0].detach(), g, bias, False)
    yield "no rows", forward, (z[:0].detach(), g, bias, False)
    z, g, dy = z.detach(), g.detach(), dy.transpose(0, 1).contiguous().transpose(0, 1)
    yield "backward", backward, (dy, z, g, True, False)
    yield "backward of dz", backward, (dy, dy, g, False, False)


@pytest.mark.parametrize(("op", "args"), [pytest.param(op, args, id=name) for name, op, args in op_samples()])
def test_opcheck(op, args):
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, True)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_graph_for_all_lengths(backend, needs):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(scale_columns, fullgraph=True, backend=counter)
    for rows in (11, 16, 7):
        tensors, dy = inputs(2, rows, 12, dtype=torch.float16, needs=needs)
        torch._dynamo.mark_dynamic(tensors[0], 1)
        ours, theirs = (gradients(f, tensors, dy, backend=backend) for f in (compiled, scale_columns))
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs))
    assert counter.frame_count == 1


def test_function_transforms_differentiate_and_batch():
    (z, g, bias), tangent = inputs(5, 12, needs=(False, False, False))
    y, dy = torch.func.jvp(scale_columns, (z, g, bias), (tangent, g.cos(), bias.cos()))
    torch.testing.assert_close(y, z * g + bias)
    torch.testing.assert_close(dy, tangent * g + z * g.cos() + bias.cos())
    torch.testing.assert_close(torch.func.vmap(scale_columns, in_dims=(0, None, None))(z, g, bias), z * g + bias)
    dg = torch.func.grad(lambda g: scale_columns(z, g, bias).square().sum())(g)
    torch.testing.assert_close(dg, (2 * (z * g + bias) * z).sum(0))
    half = z.half()
    for y in (torch.func.vmap(lambda z: scale_columns(z, g.float(), bias.float()))(half), scale_columns(half, g, bias)):
        assert y.dtype == half.dtype and error(y, half.double() * g + bias) < 1e-3


@pytest.mark.parametrize("needs", TRAINED, ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_z_is_kept_where_g_gets_a_gradient(backend, needs):
    tensors, _ = inputs(5, 12, dtype=torch.float32, needs=needs)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda t: t):
        scale_columns(*tensors, backend=backend)
    assert (tensors[0].data_ptr() in saved) == needs[1] and set(saved) <= {t.data_ptr() for t in tensors[:2]}


# ------------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("stored", ["rows", "columns", "every other row"])
@pytest.mark.parametrize("rank", [1, 5, 48])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_norms_are_those_of_the_sum(dtype, rank, stored):
    """With an update about as long as the weight. A GPU rounds A and W Aᵀ to the weight's dtype, as a product of them;
    the sum itself in bf16 would be rounded so, element by element."""
    N, K, scaling = 33, 70, 0.75
    weight = random(2 * N, K, seed=1, scale=K**-0.5).to(dtype)
    weight = {"rows": weight[:N], "columns": weight[:N].t().contiguous().t(), "every other row": weight[::2]}[stored]
    a, b = random(rank, K, seed=2, scale=K**-0.5), random(N, rank, seed=3, scale=rank**-0.5)
    norms = row_norms(weight, a, b, scaling)
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and norms.shape == (N,)
    exact = (weight.double() + scaling * b.double() @ a.double()).norm(dim=1)
    rounded = 16 * torch.finfo(norms.dtype).eps if DEVICE.type == "cpu" else 4 * torch.finfo(dtype).eps
    assert (norms / exact - 1).abs().max() < rounded
    assert (weight.double().norm(dim=1) / exact - 1).abs().max() > 0.1  # and not those of the weight


def test_norms_of_rows_that_are_zero_or_not_numbers():
    weight, a, b = random(4, 70, seed=1), random(5, 70, seed=2), random(4, 5, seed=3)
    weight[1], b[1], weight[2], weight[3, 7] = 0, 0, -0.5 * b[2] @ a, float("nan")
    norms = row_norms(weight, a, b, 0.5)
    assert norms[1] == torch.finfo(torch.float32).tiny and norms[3].isnan()
    # What cancels leaves the roundings of the parts behind, and no root of a negative number.
    assert 0 < norms[2] < 1e-3 * weight[2].norm() and norms[0].isfinite()


def test_norms_need_no_graph_and_no_memory():
    a, b = random(5, 70, seed=2).requires_grad_(), random(4, 5, seed=3).requires_grad_()
    weight = random(4, 70, seed=1)
    norms = row_norms(weight, a, b, 0.5)
    assert not norms.requires_grad
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(row_norms(weight, a, b, 0.5), norms)
    compiled = torch.compile(row_norms, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight, a, b, 0.5), norms)
    assert row_norms(*(t.to("meta") for t in (weight, a, b)), 0.5).shape == (4,)
