"""The ops on Triton kernels: values and all gradients against float64, by both routes, and that kernels did run.

Without a GPU Triton's interpreter runs them, on small sizes."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import DEVICE, DTYPES, assert_as_exact_as, count_launches, nan_filled, random

from lora_fast import (
    LoraFastError,
    backend,
    dispatch,
    fused,
    grouped,
    lora_linear,
    lora_linears,
    lora_swiglu_mlp,
    lora_update,
    mlp,
    ops,
    tuning,
)
from lora_fast.dispatch import PackedWeight, on_own_device
from lora_fast.kernels import gemm_lora, gemm_tiles, reference
from lora_fast.kernels.devices import capability_of

OPS = torch.ops.lora_fast
ROUTES = ("cublas", fused.UPDATE_FIRST, "triton")


def layers(ns, k, ranks, dtype, master=None):
    """Weights, biases (the first without one), lora_As, lora_Bs: the factors are masters and require gradients."""
    master = master or dtype
    weights = [random(n, k, dtype=dtype, seed=10 + i, scale=k**-0.5) for i, n in enumerate(ns)]
    biases = [None if i == 0 else random(n, dtype=dtype, seed=20 + i).requires_grad_() for i, n in enumerate(ns)]
    lora_As = [random(r, k, dtype=master, seed=30 + i, scale=k**-0.5).requires_grad_() for i, r in enumerate(ranks)]
    lora_Bs = [random(n, r, dtype=master, seed=40 + r, scale=r**-0.5).requires_grad_() for n, r in zip(ns, ranks)]
    return weights, biases, lora_As, lora_Bs


def run(function, dtype, x, weights, biases, lora_As, lora_Bs, dys):
    """y_i, then dx, every dA, dB and dbias, of copies of the leaves in `dtype` (None: as they are)."""
    copies = [
        [None if v is None else v.detach().to(dtype or v.dtype).requires_grad_(v.requires_grad) for v in values]
        for values in ([x], weights, biases, lora_As, lora_Bs)
    ]
    (x,), weights, biases, lora_As, lora_Bs = copies
    ys = function(x, weights, lora_As, lora_Bs, biases)
    torch.autograd.backward(ys, [dy.to(y.dtype) for dy, y in zip(dys, ys)])
    leaves = [x, *lora_As, *lora_Bs, *(b for b in biases if b is not None)]
    return [*(y.detach() for y in ys), *(leaf.grad for leaf in leaves)]


def eager(scalings, masks=None, p=0.0):
    """What a PyTorch user writes, in the leaves' dtype."""

    def function(x, weights, lora_As, lora_Bs, biases):
        ys = []
        for i, (w, a, b, bias) in enumerate(zip(weights, lora_As, lora_Bs, biases)):
            kept = x if masks is None else x * (reference.unpack_mask(masks[i], x) / (1 - p))
            update = kept @ a.to(x.dtype).t() @ b.to(x.dtype).t()
            ys.append(torch.nn.functional.linear(x, w, bias) + update * scalings[i])
        return ys

    return function


def check(ours, low, exact, factor=2.0):
    assert len(ours) == len(low) == len(exact)
    for mine, eagers, truth in zip(ours, low, exact):
        assert mine.abs().max() > 0
        assert_as_exact_as(mine, eagers, truth, factor=factor)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 5, 16, 48, 80])
def test_one_layer(r, dtype, route):
    leaves = layers([12], 70, [r], dtype, torch.float32)
    x, dy = random(33, 70, dtype=dtype, seed=1).requires_grad_(), random(33, 12, dtype=dtype, seed=2)
    scalings = [0.75]

    def ours(x, weights, lora_As, lora_Bs, biases):
        return [lora_linear(x, weights[0], lora_As[0], lora_Bs[0], 0.75, biases[0], backend="triton")]

    with nan_filled(), tuning.only(route), count_launches() as launches:
        mine = run(ours, None, x, *leaves, [dy])
    assert launches["_shrink_kernel"] == 1 and launches["_cast_kernel"] == 2
    assert launches["gemm_lora_kernel"] == (2 if route == "triton" else 0)
    check(mine, run(eager(scalings), None, x, *leaves, [dy]), run(eager(scalings), torch.float64, x, *leaves, [dy]))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_group(dtype, p, route):
    """q, k and v of unequal sizes and ranks, one without a bias, each with a mask of its own."""
    leaves = layers([16, 7, 9], 24, [5, 16, 3], dtype)
    x = random(2, 17, 24, dtype=dtype, seed=1).requires_grad_()
    dys = [random(2, 17, n, dtype=dtype, seed=50 + n) for n in (16, 7, 9)]
    scalings, drawn = [0.75, 2.0, 0.5], []

    def ours(x, weights, lora_As, lora_Bs, biases):
        torch.manual_seed(7)
        if p:
            seed = torch.randint(0, 2**63 - 1, (1,), device=x.device)
            none = [x.new_empty(0) if bias is None else bias.detach() for bias in biases]
            factors = [[f.detach() for f in lora_As], [f.detach() for f in lora_Bs]]
            *_, mask = OPS.linears_forward(x.detach(), weights, none, *factors, scalings, None, seed, p, True)
            drawn.append(mask)
            torch.manual_seed(7)
        return lora_linears(x, weights, lora_As, lora_Bs, scalings, biases, dropout_p=p, backend="triton")

    with nan_filled(), tuning.only(route), count_launches() as launches:
        mine = run(ours, None, x, *leaves, dys)
        again = run(ours, None, x, *leaves, dys)
    assert all(torch.equal(a, b) for a, b in zip(mine, again)), "not the same bits twice"
    assert launches["_shrink_kernel"] > 0 and launches["_grad_a_kernel"] > 0
    if route == "triton" or DEVICE.type == "cpu":  # else the tuner has dS and dB as the GPU is faster
        assert launches["_grad_s_and_b_kernel"] > 0
    masks = drawn[0] if p else None
    if p:
        kept = reference.unpack_mask(masks.reshape(-1, 3), x.new_empty(3 * 34, 24)).reshape(3, 34, 24)
        n = kept[0].numel()
        for one in kept:  # a binomial five sigmas out: 1 in 1.7 million
            assert abs(float(one.sum()) - n * (1 - p)) < 5 * (n * p * (1 - p)) ** 0.5
        assert not torch.equal(kept[0], kept[1])

    def flat(function):
        return lambda x, *rest: [y.reshape(2, 17, -1) for y in function(x.reshape(-1, 24), *rest)]

    low = run(flat(eager(scalings, masks, p)), None, x, *leaves, dys)
    check(mine, low, run(flat(eager(scalings, masks, p)), torch.float64, x, *leaves, dys))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_update_of_a_base_in_another_dtype(dtype):
    """A base layer that runs by itself, in fp32, beside an adapter in half of it: the sum in the base's dtype."""
    x, base = random(33, 24, dtype=dtype, seed=1), random(33, 12, seed=2)
    lora_A, lora_B = random(5, 24, seed=3), random(12, 5, seed=4)
    y = lora_update(x, base, lora_A, lora_B, 0.75, backend="triton")
    s = (x @ lora_A.to(dtype).t()).double()
    exact = base.double() + s @ (0.75 * lora_B).to(dtype).double().t()
    assert y.dtype == torch.float32
    assert (y.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * (exact - base.double()).abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_update_alone(dtype, p):
    leaves = layers([12], 24, [5], dtype)
    x, dy = random(33, 24, dtype=dtype, seed=1).requires_grad_(), random(33, 12, dtype=dtype, seed=2)
    seed = torch.tensor([123456789], device=DEVICE)
    mask = None
    if p:
        arguments = x.detach(), random(33, 12, dtype=dtype), *(f[0].detach() for f in leaves[2:])
        *_, mask = OPS.update_forward(*arguments, 0.75, None, seed, p, True)

    def ours(x, weights, lora_As, lora_Bs, biases):
        base = torch.nn.functional.linear(x, weights[0], biases[0])
        drop = (None, seed, p, True) if p else (None, None, 0.0, True)
        return [OPS.update_forward(x, base, lora_As[0], lora_Bs[0], 0.75, *drop)[0]]

    with nan_filled(), count_launches() as launches:
        mine = run(ours, None, x, *leaves, [dy])
    assert launches["gemm_lora_kernel"] == 2
    function = eager([0.75], mask, p)
    check(mine, run(function, None, x, *leaves, [dy]), run(function, torch.float64, x, *leaves, [dy]))


@settings(max_examples=12)
@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.sampled_from(ROUTES))
def test_any_size(m, k, n, r, route):
    leaves = layers([n], k, [r], torch.float32)
    x, dy = random(m, k, seed=1).requires_grad_(), random(m, n, seed=2)

    def ours(x, weights, lora_As, lora_Bs, biases):
        return [lora_linear(x, weights[0], lora_As[0], lora_Bs[0], 0.75, biases[0], backend="triton")]

    with nan_filled(), tuning.only(route):
        mine = run(ours, None, x, *leaves, [dy])
    exact = run(eager([0.75]), torch.float64, x, *leaves, [dy])
    # With every number positive the same formula gives Σ |terms| of each sum, by which rounding is bounded.
    x, *leaves, dy = _positive([x]), *map(_positive, leaves), dy.abs()
    terms = run(eager([0.75]), torch.float64, *x, *leaves, [dy])
    for value, truth, bound in zip(mine, exact, terms):
        assert value.shape == truth.shape
        assert ((value.double() - truth).abs() <= 8 * torch.finfo(torch.float32).eps * bound).all()


def _positive(tensors):
    return [None if t is None else t.detach().abs().requires_grad_(t.requires_grad) for t in tensors]


def test_a_transposed_weight_and_strided_x():
    """GPT-2's weight is (K, N), seen as (N, K); x and dy may be slices or transposed."""
    leaves = layers([12], 24, [5], torch.float32)
    leaves[0][0] = leaves[0][0].t().contiguous().t()
    wide = random(33, 40, seed=1)
    for x in (wide[:, :24], random(24, 33, seed=1).t(), wide[:, 3:27]):
        x = x.detach().requires_grad_()
        dy = random(12, 33, seed=2).t()
        for route in ROUTES:

            def ours(x, weights, lora_As, lora_Bs, biases):
                return [lora_linear(x, weights[0], lora_As[0], lora_Bs[0], 0.75, backend="triton")]

            with nan_filled(), tuning.only(route):
                mine = run(ours, None, x, *leaves, [dy])
            check(mine, run(eager([0.75]), None, x, *leaves, [dy]), run(eager([0.75]), torch.float64, x, *leaves, [dy]))


@pytest.mark.parametrize("route", ROUTES)
def test_a_strided_bias(route):
    x, (weight,), _, (a,), (b,) = random(33, 24, seed=1), *layers([12], 24, [5], torch.float32)
    bias = random(12, 3, seed=2)[:, 1]
    with tuning.only(route):
        y = lora_linear(x, weight, a, b, 0.75, bias, backend="triton")
    exact = eager([0.75])(*(t.double() for t in (x,)), [weight.double()], [a.double()], [b.double()], [bias.double()])
    torch.testing.assert_close(y.double(), exact[0], rtol=0, atol=1e-5)


@contextmanager
def choices_asked():
    """Yields the [(step, what its choice depends on, names of the candidates), …] of the calls inside the block."""
    asked = []

    def asking(step, sizes, device, names, call):
        asked.append((step, sizes, list(names)))
        return choose(step, sizes, device, names, call)

    choose = tuning.choose
    with mock.patch.object(tuning, "choose", asking), mock.patch.object(tuning, "_recent", {}):
        yield asked


def matrix(n, k, layout, aligned, dtype=torch.float16):
    """(n, k) with contiguous rows ("NK") or columns ("KN"), at an odd address unless aligned."""
    rows, columns = (n, k) if layout == "NK" else (k, n)
    lies = random(rows * columns + 1, dtype=dtype, seed=5)[0 if aligned else 1 :][: rows * columns].view(rows, columns)
    return lies if layout == "NK" else lies.t()


@pytest.mark.parametrize("layout", ["NK", "KN"])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_choice_knows_how_matrices_lie(layout, aligned, has_bias):
    """On each the two routes differ in speed; an address that is no multiple of 16 bytes rules tiles out too."""
    x, weight = random(9, 32, dtype=torch.float16, seed=1), matrix(16, 32, layout, aligned)
    (lora_A,), (lora_B,) = layers([16], 32, [5], torch.float32)[2:]
    bias = random(16, dtype=torch.float16, seed=2) if has_bias else None
    x.requires_grad_()
    with choices_asked() as asked:
        y = lora_linear(x, weight, lora_A, lora_B, 0.75, bias, backend="triton")
        torch.autograd.grad(y, x, torch.ones_like(y))
    (forward, sizes, routes), _, (backward, sizes_back, routes_back) = asked  # between them dS and dB
    lies = {"weight": layout, "aligned": aligned}
    shape = {"M": 9, "N": 16, "K": 32, "R": 5, "dtype": torch.float16}
    assert (forward, sizes) == ("linear_lora", shape | {"bias": has_bias} | lies)
    assert (backward, sizes_back) == ("grad_x", shape | {"N": "16", "masks": 0} | lies)
    chip = gemm_tiles.architecture(capability_of(x))
    names = {f"triton {tile.name}" for tile in gemm_tiles.TILES[chip if aligned else "unaligned"]}
    assert set(routes) <= {"cublas", fused.UPDATE_FIRST, *names} and len(routes) == len(routes_back) > 3


@pytest.mark.parametrize(
    ("M", "N", "R", "expected"),
    [
        (96, 300, 3, ["triton, one read of dy", "two reads of dy"]),  # partial sums of half a read of dy
        (33, 70, 12, ["two reads of dy", "triton, one read of dy"]),  # of one and a half
        (33, 70, 40, None),  # in fp32 no tile has room for the sums of such a rank
    ],
)
def test_ds_and_db_by_one_read_of_dy_or_two(M, N, R, expected):
    dy, b, s = random(M, N), random(N, R, seed=1), random(M, R, seed=2)
    with choices_asked() as asked:
        ds, (dB,) = fused.grad_s_and_b([dy], [b], [s], [0.5])
    if expected is None:
        assert not asked
    else:
        sizes = {"M": M, "N": N, "R": R, "dtype": torch.float32, "aligned": False}
        assert asked == [("grad_s_and_b", sizes, expected)]
        with tuning.only("triton"), count_launches() as launches:
            ds_by_one, (dB_by_one,) = fused.grad_s_and_b([dy], [b], [s], [0.5])
        torch.testing.assert_close(ds_by_one, ds)
        torch.testing.assert_close(dB_by_one, dB)
        assert launches["_grad_s_and_b_kernel"] == 1
    exact = dy.double() @ b.double(), 0.5 * dy.double().t() @ s.double()
    for result, truth in zip((ds, dB), exact):
        torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_what_is_kept_for_one_group_is_not_taken_for_another(p):
    """Groups alike in every size but how the ranks are divided, and one whose weights lie otherwise, in turns."""
    x, dys = random(9, 32, seed=1).requires_grad_(), [random(9, 16, seed=2), random(9, 16, seed=3)]
    mask = torch.stack([reference.pack_mask(random(9, 32, seed=60 + i) > -0.5) for i in range(2)]) if p else None
    groups = [layers([16, 16], 32, ranks, torch.float32) for ranks in ((5, 3), (3, 5), (4, 4))]
    weights, *rest = groups[0]
    groups.append(([weight.t().contiguous().t() for weight in weights], *rest))
    for weights, _, lora_As, lora_Bs in (*groups, *groups):

        def ours(x, weights, lora_As, lora_Bs, biases):
            empty = [torch.empty(0, device=x.device)] * 2
            return OPS.linears_forward(x, weights, empty, lora_As, lora_Bs, [0.75, 0.75], mask, None, p, True)[:2]

        function, leaves = eager([0.75, 0.75], mask, p), (weights, [None, None], lora_As, lora_Bs)
        with tuning.only("triton"):
            mine = run(ours, None, x, *leaves, dys)
        check(mine, run(function, None, x, *leaves, dys), run(function, torch.float64, x, *leaves, dys))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_repeated_are_alike_to_the_bit(dtype, route):
    """The first launch of a kind goes Triton's way and later ones by themselves; sizes that descriptors take."""
    weights, _, lora_As, lora_Bs = layers([64, 64], 64, [16, 8], dtype, torch.float32)
    x, dys = random(70, 64, dtype=dtype, seed=1).requires_grad_(), [random(70, 64, dtype=dtype, seed=i) for i in (2, 3)]
    mlp_layers = list(zip([*weights, weights[0]], [*lora_As, lora_As[0]], [*lora_Bs, lora_Bs[0]], (0.75, 0.75, 0.75)))
    leaves = [x, *lora_As, *lora_Bs]

    def step():
        ys = lora_linears(x, weights, lora_As, lora_Bs, [0.75, 0.75], backend="triton")
        y = lora_swiglu_mlp(x, *mlp_layers, backend="triton")
        return [*ys, *torch.autograd.grad(ys, leaves, dys), y, *torch.autograd.grad(y, leaves, dys[0])]

    with tuning.only(route):
        first, *others = [step() for _ in range(3)]
    assert all(bool(value.any()) for value in first)
    assert all(torch.equal(one, other) for results in others for one, other in zip(first, results))


def test_db_by_two_reads_is_scaled_in_fp32():
    """20 · 40 · 64 is a number in fp16, twice that is none."""
    sizes = ((64, 16), 20.0), ((16, 8), 0.5), ((64, 8), 40.0)
    dy, b, s = (torch.full(size, value, dtype=torch.float16, device=DEVICE) for size, value in sizes)
    with tuning.only("two reads"):
        _, (dB,) = fused.grad_s_and_b([dy], [b], [s], [2.0])
    for found in (dB, fused.grad_b(dy, s, 2.0)):
        assert found.dtype == torch.float32 and bool((found == 102400).all())


def test_a_product_prepared_for_an_aligned_x_is_not_taken_for_another():
    """On Hopper the first takes descriptors, which refuse an address that 16 doesn't divide."""
    memory, weight = random(32 * 64 + 1, seed=1), random(64, 64, seed=2, scale=0.125)
    s, b = random(32, 16, seed=3), random(64, 16, seed=4)
    hopper = gemm_lora.capability_of if DEVICE.type == "cuda" else lambda tensor: (9, 0)
    with (
        mock.patch.object(fused, "capability_of", hopper),
        mock.patch.object(gemm_lora, "capability_of", hopper),
        tuning.only("triton"),
    ):
        for x in (memory[:-1], memory[1:], memory[:-1]):
            x = x.view(32, 64)
            exact = x.double() @ weight.double().t() + s.double() @ b.double().t()
            assert (fused.linear_lora(x, weight, s, b).double() - exact).abs().max() < 1e-4


@pytest.mark.parametrize("needs_dB", [True, False])
def test_the_registered_backward_takes_a_dy_that_requires_a_gradient(needs_dB):
    """A gradient of it isn't offered, as for any op without a formula; asking for its value is no error."""
    (weight,), _, (a,), (b,) = layers([12], 24, [5], torch.float32)
    x, dy, s = random(9, 24, seed=1), random(9, 12, seed=2).requires_grad_(), random(9, 5, seed=3)
    arguments = x, [weight], [a.detach()], [b.detach()], s, None, [0.75], 0.0, True, True, needs_dB, True
    with tuning.only("two reads"):
        dx, *_ = OPS.linears_backward([dy], *arguments)
        exact, *_ = OPS.linears_backward([dy.detach()], *arguments[:-1], False)
    torch.testing.assert_close(dx.detach(), exact)


def test_weights_of_a_group_that_lie_differently_are_one_kind():
    x, dys = random(9, 32, seed=1), [random(9, 16, seed=2), random(9, 16, seed=3)]
    weights = [matrix(16, 32, layout, True, torch.float32) for layout in ("NK", "KN")]
    (a, b), (c, d) = layers([16, 16], 32, [5, 3], torch.float32)[2:]
    x.requires_grad_()
    with choices_asked() as asked:
        ys = lora_linears(x, weights, [a, b], [c, d], [1.0, 1.0], backend="triton")
        torch.autograd.grad(ys, x, dys)
    told = [(step, sizes["weight"], sizes["aligned"]) for step, sizes, _ in asked if step != "grad_s_and_b"]
    assert told == [("linear_lora", "NK", True), ("linear_lora", "KN", True), ("grad_x", "mixed", False)]


class OnASecondGpu(torch.Tensor):
    """Says that it is there; its numbers are on the CPU."""

    device, is_cuda = torch.device("cuda", 1), True

    def get_device(self):
        return 1


def test_every_op_makes_the_gpu_of_its_tensors_the_current_one(monkeypatch):
    """Triton launches on the current GPU; a model spread over several has layers on others."""
    current = [torch.device("cuda", 0)]

    @contextmanager
    def device(other):
        current.append(other)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1].index)
    x = torch.empty(3, 4).as_subclass(OnASecondGpu)
    launch = on_own_device(lambda *arguments: current[-1])
    assert launch(x, 1) == launch([None, x], x) == x.device
    assert launch(torch.empty(0)) == torch.device("cuda", 0) and len(current) == 1
    for step in (ops._linears_forward, ops._linears_backward, ops._update_forward):
        assert step.__wrapped__
    for op in (mlp, grouped):
        assert op._forward.__wrapped__ and op._backward.__wrapped__


def test_checkpoints_redraw_the_same_mask():
    x = random(33, 24, seed=1).requires_grad_()
    (weight,), _, (a,), (b,) = layers([12], 24, [5], torch.float32)
    results = []
    for recompute in (False, True):
        torch.manual_seed(3)
        function = lambda x: lora_linear(x, weight, a, b, dropout_p=0.4, backend="triton")  # noqa: E731
        y = torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False) if recompute else function(x)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, a, b])])
    assert all(torch.equal(p, q) for p, q in zip(*results))
    torch.manual_seed(4)
    assert not torch.equal(lora_linear(x, weight, a, b, dropout_p=0.4, backend="triton"), results[0][0])


@pytest.mark.parametrize("route", ROUTES)
def test_weights_in_another_dtype_are_cast_at_each_call(route):
    """fp32 weights under autocast: what is remembered of the first call serves the second, in x's dtype again."""
    x = random(33, 24, seed=1).requires_grad_()
    (weight,), _, (a,), (b,) = layers([16], 24, [5], torch.float32)

    def step(weight):
        with tuning.only(route), torch.autocast(DEVICE.type, torch.float16):
            y = lora_linear(x, weight, a, b, 0.75, backend="triton")
            return y.detach(), *torch.autograd.grad(y.float().sin().sum(), [x, a, b])

    expected = step(weight.half())
    for _ in range(2):
        results = step(weight)
        assert all(map(torch.equal, results, expected)) and all(result.any() for result in results)


def test_a_list_of_weights_may_change_before_backward():
    """Backward has the layers that forward had, whatever becomes of the caller's list, of packed weights too."""
    x = random(33, 24, seed=1).requires_grad_()
    weights, _, lora_As, lora_Bs = layers([16, 8], 24, [5, 3], torch.float32)
    weights = [PackedWeight(w, w.shape, w.dtype, lambda w=w: w) for w in weights]

    def dx(change):
        given = list(weights)
        ys = lora_linears(x, given, lora_As, lora_Bs, [1.0, 2.0])
        change(given)
        return torch.autograd.grad(sum(y.square().sum() for y in ys), x)[0]

    expected = dx(lambda given: None)
    assert expected.any() and torch.equal(dx(list.clear), expected) and torch.equal(dx(list.reverse), expected)


@pytest.mark.parametrize("op", ["q, k, v", "q, k, v, one unused", "mlp"])
def test_adapters_are_kept_as_cast_where_they_are_small(op, monkeypatch):
    """Bit for bit what casting them again gives, in one launch less, for at most 1 / CAST_SHARE of what is kept."""
    assert all(f"1/{dispatch.CAST_SHARE}" in op.__doc__ for op in (lora_linear, lora_linears, lora_swiglu_mlp))
    M, K = 40, 24
    x = random(M, K, dtype=torch.float16, seed=1).requires_grad_()
    ranks = [5, 3, 4]
    layer = [(K, K), (K, K), (K, K)] if op == "mlp" else [(12, K), (9, K), (15, K)]
    weights = [random(n, k, dtype=torch.float16, seed=10 + n, scale=k**-0.5) for n, k in layer]
    lora_As = [random(r, k, seed=30 + r).requires_grad_() for (_, k), r in zip(layer, ranks)]
    lora_Bs = [random(n, r, seed=40 + r).requires_grad_() for (n, _), r in zip(layer, ranks)]
    factors = sum(f.numel() for f in (*lora_As, *lora_Bs))
    activations = M * 3 * K if op == "mlp" else M * K

    def step(backend="triton"):
        sizes = []
        with count_launches() as launches:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
                parts = list(zip(weights, lora_As, lora_Bs, [0.5, 2.0, 1.0]))
                if op == "mlp":
                    ys = [lora_swiglu_mlp(x, *parts, backend=backend)]
                else:
                    ys = lora_linears(x, *map(list, zip(*parts)), backend=backend)
            used = ys[:2] if "unused" in op else ys
            grads = torch.autograd.grad(
                sum(y.float().sin().sum() for y in used), [x, *lora_As, *lora_Bs], allow_unused=True
            )
        return [*ys, *[grad for grad in grads if grad is not None]], sum(sizes), launches["_cast_kernel"]

    monkeypatch.setattr(dispatch, "CAST_SHARE", activations / factors * 1.001)
    expected, without, casts = step()
    assert casts == 2
    monkeypatch.setattr(dispatch, "CAST_SHARE", activations / factors * 0.999)
    results, kept, casts = step()
    assert casts == (2 if "unused" in op else 1)  # those of the layers that were used are other ones
    assert kept == without + factors
    assert len(results) == len(expected) and all(map(torch.equal, results, expected))
    assert all(result.any() for result in results)
    monkeypatch.setattr(dispatch, "CAST_SHARE", 0)
    assert step("torch")[1] == without  # PyTorch casts in no time, and keeps nothing


def test_more_layers_than_a_kernel_takes():
    leaves = layers([5, 6, 7, 8, 9], 12, [2, 3, 4, 5, 6], torch.float32)
    x = random(9, 12, seed=1).requires_grad_()
    dys = [random(9, n, seed=n) for n in (5, 6, 7, 8, 9)]
    scalings = [1.0, 2.0, 0.5, 0.25, 3.0]

    def ours(x, weights, lora_As, lora_Bs, biases):
        return list(lora_linears(x, weights, lora_As, lora_Bs, scalings, biases, backend="triton"))

    check(
        run(ours, None, x, *leaves, dys),
        run(eager(scalings), None, x, *leaves, dys),
        run(eager(scalings), torch.float64, x, *leaves, dys),
        factor=3.0,  # dx: five layers in two sums, where autograd's order may happen to be the better one
    )


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU computes bf16 rightly, and runs kernels by itself")
def test_the_interpreter_is_never_taken_by_itself_nor_in_bf16(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED_DTYPES", (torch.float16, torch.float32))  # as it is outside of tests
    x, (weight,), _, (a,), (b,) = random(3, 12), *layers([5], 12, [2], torch.float32)
    with count_launches() as launches:
        lora_linear(x, weight, a, b)
    assert not launches
    with pytest.raises(LoraFastError, match=r"backend='triton': Triton's interpreter computes bf16 wrongly"):
        lora_linear(x.bfloat16(), weight.bfloat16(), a, b, backend="triton")
    with pytest.raises(LoraFastError, match=r"backend='triton': r=513 is above 512"):
        lora_update(x, random(3, 5), random(513, 12), random(5, 513), backend="triton")
