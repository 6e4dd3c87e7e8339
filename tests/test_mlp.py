"""lora_swiglu_mlp: values and all gradients against float64, in PyTorch and on the kernels, and what PyTorch asks of an
op."""

import pytest
import torch
from kernel_support import DEVICE, DTYPES, assert_as_exact_as, count_launches, nan_filled, random
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lora_fast import LoraFastError, lora_swiglu_mlp, tuning
from lora_fast.kernels import reference

OPS = torch.ops.lora_fast
M, K, I, N = 33, 24, 40, 24  # noqa: E741 - I is the intermediate size
SCALINGS = (0.75, 2.0, 0.5)


def leaves(dtype, ranks=(5, 3, 4), biases=True, sizes=(K, I, N), master=None):
    """(weight, lora_A, lora_B, scaling, bias) of gate, up and down; factors are leaves that require gradients."""
    k, i, n = sizes
    layers = []
    for number, ((out, inner), r) in enumerate(zip(((i, k), (i, k), (n, i)), ranks)):
        draw = lambda *shape, seed, scale=1.0, dtype=dtype, number=number: random(  # noqa: E731
            *shape, dtype=dtype, seed=10 * seed + number, scale=scale
        )
        a = draw(r, inner, seed=2, scale=inner**-0.5, dtype=master or dtype).requires_grad_()
        b = draw(out, r, seed=3, scale=r**-0.5, dtype=master or dtype).requires_grad_()
        bias = draw(out, seed=4, scale=0.3) if biases else None
        layers.append((draw(out, inner, seed=1, scale=inner**-0.5), a, b, SCALINGS[number], bias))
    return layers


def eager(x, gate, up, down, masks=None, mask_h=None, p=0.0):
    """What a PyTorch user writes, in x's dtype; masks in bits."""

    def linear(v, layer, mask):
        weight, a, b, scaling, bias = layer
        kept = v if mask is None else v * (reference.unpack_mask(mask, v) / (1 - p))
        update = kept @ a.to(v.dtype).t() @ b.to(v.dtype).t() * scaling
        return torch.nn.functional.linear(v, weight, bias) + update

    g, u = (linear(x, layer, None if masks is None else masks[i]) for i, layer in enumerate((gate, up)))
    return linear(torch.nn.functional.silu(g) * u, down, mask_h)


def run(function, dtype, x, layers, dy):
    """[y, dx, dA of each, dB of each], of copies of the leaves in `dtype` (None: as they are)."""

    def copied(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().to(dtype or value.dtype).requires_grad_(value.requires_grad)

    x = copied(x)
    layers = [tuple(map(copied, layer)) for layer in layers]
    y = function(x, *layers)
    y.backward(dy.to(y.dtype))
    return [y.detach(), x.grad, *(layer[1].grad for layer in layers), *(layer[2].grad for layer in layers)]


def check(ours, low, exact):
    for mine, eagers, truth in zip(ours, low, exact, strict=True):
        assert mine.dtype == eagers.dtype and mine.abs().max() > 0
        assert_as_exact_as(mine, eagers, truth)


@pytest.mark.parametrize("backend", ["torch", "triton-cublas", "triton-triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [(5, 3, 4), (16, 16, 16), (1, 48, 20)])
def test_errs_no_more_than_eager(backend, dtype, ranks):
    x, dy = random(M, K, dtype=dtype, seed=1).requires_grad_(), random(M, N, dtype=dtype, seed=2)
    layers = leaves(dtype, ranks, master=torch.float32)
    backend, _, route = backend.partition("-")

    def ours(x, *layers):
        return lora_swiglu_mlp(x, *layers, backend=backend)

    with nan_filled(), tuning.only(route or "cublas"), count_launches() as launches:
        mine = run(ours, None, x, layers, dy)
        again = run(ours, None, x, layers, dy)
    assert all(torch.equal(a, b) for a, b in zip(mine, again))
    assert bool(launches) == (backend == "triton")
    if backend == "triton":
        assert launches["_forward_kernel"] == launches["_backward_kernel"] == 2
        assert launches["gemm_lora_kernel"] == (2 * 5 if route == "triton" else 0)
    check(mine, run(eager, None, x, layers, dy), run(eager, torch.float64, x, layers, dy))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_has_three_masks_and_backward_the_same(backend, dtype):
    p = 0.3
    x, dy = random(M, K, dtype=dtype, seed=1).requires_grad_(), random(M, N, dtype=dtype, seed=2)
    layers = leaves(dtype, biases=False)
    columns = [[t.detach() if isinstance(t, torch.Tensor) else t for t in column] for column in zip(*layers)]
    none = [x.new_empty(0)] * 3
    torch.manual_seed(5)
    if backend == "triton":
        seeds = torch.randint(0, 2**63 - 1, (2,), device=DEVICE)
        arguments = columns[0], none, columns[1], columns[2], list(SCALINGS), None, None, seeds, p, True
        *_, masks, mask_h = OPS.swiglu_mlp_forward(x.detach(), *arguments)
    else:
        masks = torch.stack([OPS.dropout_mask(x.detach(), p) for _ in range(2)])
        mask_h = OPS.dropout_mask(x.new_empty(M, I), p)[None]

    def ours(x, *layers):
        torch.manual_seed(5)
        return lora_swiglu_mlp(x, *layers, dropout_p=p, backend=backend)

    def theirs(x, *layers):
        return eager(x, *layers, masks, mask_h[0], p)

    kept = [reference.unpack_mask(m, x.detach()).bool() for m in masks]
    kept_h = reference.unpack_mask(mask_h[0], x.new_empty(M, I)).bool()
    for one in (*kept, kept_h):
        n = one.numel()
        assert abs(int(one.sum()) - n * (1 - p)) < 5 * (n * p * (1 - p)) ** 0.5
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept_h[:, :K])
    with nan_filled():
        mine = run(ours, None, x, layers, dy)
    check(mine, run(theirs, None, x, layers, dy), run(theirs, torch.float64, x, layers, dy))
    silent = lora_swiglu_mlp(x, *layers, dropout_p=p, training=False, backend=backend)
    torch.testing.assert_close(silent, eager(x, *layers), rtol=0, atol=64 * torch.finfo(dtype).eps)


def test_batched_x_frozen_parts_and_autocast():
    layers, x = leaves(torch.float32), random(3, 11, K, seed=1).requires_grad_()
    y = lora_swiglu_mlp(x, *layers)
    assert y.shape == (3, 11, N)
    torch.testing.assert_close(y, eager(x.reshape(-1, K), *layers).view_as(y))
    whole = torch.autograd.grad(y.sum(), [x, *(t for layer in layers for t in layer[1:3])])
    frozen = [(w, a.detach(), b, s, bias) for w, a, b, s, bias in layers]
    some = torch.autograd.grad(lora_swiglu_mlp(x.detach(), *frozen).sum(), [layer[2] for layer in layers])
    for gradient, expected in zip(some, whole[2::2]):
        assert torch.equal(gradient, expected)
    (dx,) = torch.autograd.grad(lora_swiglu_mlp(x, *([*f[:2], f[2].detach(), *f[3:]] for f in frozen)).sum(), [x])
    assert torch.equal(dx, whole[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = lora_swiglu_mlp(x, *layers)
    cast = [(w.bfloat16(), a, b, s, bias.bfloat16()) for w, a, b, s, bias in layers]
    assert half.dtype == torch.bfloat16 and torch.equal(half, lora_swiglu_mlp(x.bfloat16(), *cast))
    trained = [(w.clone().requires_grad_(), *rest) for w, *rest in layers]
    lora_swiglu_mlp(x, *trained).sum().backward()
    assert all(layer[0].grad.abs().max() > 0 for layer in trained)


def test_gradcheck_and_second_derivatives():
    x = random(3, 5, dtype=torch.float64, seed=1).requires_grad_()
    layers = leaves(torch.float64, (2, 1, 2), sizes=(5, 4, 3))
    factors = [t for layer in layers for t in layer[1:3]]

    def function(x, *factors):
        parts = [(w, *factors[2 * i : 2 * i + 2], *rest) for i, (w, _, _, *rest) in enumerate(layers)]
        return lora_swiglu_mlp(x, *parts)

    assert torch.autograd.gradcheck(function, (x, *factors))
    assert torch.autograd.gradgradcheck(function, (x, *factors))
    first = torch.autograd.grad(function(x, *factors).square().sum(), (x, *factors), create_graph=True)
    assert all(gradient.requires_grad for gradient in first)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_opcheck(p):
    layers, x, dy = leaves(torch.float32), random(M, K, seed=1).requires_grad_(), random(M, N, seed=2)
    columns = [list(column) for column in zip(*layers)]
    masks = mask_h = None
    if p:
        masks, mask_h = OPS.dropout_mask(x, p).expand(2, -1, -1).clone(), OPS.dropout_mask(x.new_empty(M, I), p)[None]
    scalings = list(SCALINGS)
    arguments = columns[0], columns[4], columns[1], columns[2], scalings, masks, mask_h, None, p, False
    torch.library.opcheck(OPS.swiglu_mlp_forward.default, (x, *arguments))
    detached = [[t.detach() for t in column] for column in (columns[0], columns[1], columns[2])]
    _, g, u, s, s_down = (t.detach() for t in OPS.swiglu_mlp_forward(x, *arguments))
    saved = x.detach(), g, u, *detached, s, s_down, masks, mask_h, scalings, p
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(OPS.swiglu_mlp_backward.default, (dy, *saved, *needs, False))


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_fake_tensors_flops_and_what_is_saved(p):
    layers, x = leaves(torch.float32, biases=False), random(M, K, seed=1).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = lora_swiglu_mlp(x, *layers, dropout_p=p)
    own = {t.untyped_storage().data_ptr() for layer in layers for t in layer if isinstance(t, torch.Tensor)}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    bits = M * (2 * (K // 8) + I // 8) if p else 0
    total = sum(size for pointer, size in sizes.items() if pointer not in own)
    assert total == 4 * M * (K + 2 * I + 5 + 3 + 4) + bits  # x, g, u, three S, and the masks' bits
    with FlopCounterMode(display=False) as counter:
        y = lora_swiglu_mlp(x, *layers, dropout_p=p)
        forward = counter.get_total_flops()
        y.sum().backward()
    ranks = [(I, K, 5), (I, K, 3), (N, I, 4)]
    assert forward == 2 * M * sum(n * k + r * (n + k) for n, k, r in ranks)
    assert counter.get_total_flops() - forward == 2 * M * sum(n * k + 2 * r * (n + k) for n, k, r in ranks)
    with FakeTensorMode() as mode:
        fakes = [tuple(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in layer) for layer in layers]
        fake = lora_swiglu_mlp(mode.from_tensor(x), *fakes, dropout_p=p)
        fake.sum().backward()
    assert (fake.shape, fake.dtype) == (y.shape, y.dtype)


def test_bad_input_is_named():
    layers, x = leaves(torch.float32), random(M, K, seed=1)
    gate, up, down = layers
    narrow = leaves(torch.float32, sizes=(K, 8, N))
    for sentence, arguments in {
        r"gate has 3 parts; expected \(weight, lora_A, lora_B": (x, gate[:3], up, down),
        r"gate is \(40, 24\), up is \(8, 24\); expected one shape": (x, gate, narrow[1], down),
        r"x is \(1, 40\), weight is \(24, 8\)": (x, gate, up, narrow[2]),
        r"x is torch.float16, weight is torch.float32": (x.half(), *layers),
        r"backend='gpu'; expected one of": (x, *layers),
    }.items():
        with pytest.raises(LoraFastError, match=sentence):
            lora_swiglu_mlp(*arguments, backend="gpu" if "gpu" in sentence else "auto")
