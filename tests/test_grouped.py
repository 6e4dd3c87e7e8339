"""lora_grouped_linear: values and all gradients against float64 and against lora_linear segment by segment, in PyTorch
and on the kernels, and what PyTorch asks of an op."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import DEVICE, DTYPES, assert_as_exact_as, count_launches, error, nan_filled, random
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lora_fast import LoraFastError, grouped, lora_grouped_linear, lora_linear, tuning
from lora_fast.kernels import reference

OPS = torch.ops.lora_fast
BACKENDS = ("torch", "triton-cublas", "triton-triton")
M, K, N = 41, 70, 12
RANKS = (5, 48, 16, 1, 3)
SCALINGS = (0.75, 2.0, 0.5, 1.0, 3.0)
# Not in order: adapter 1 three times, twice next to itself, adapter 4 without rows, gaps at 7, 8 and from 38 on.
SEGMENTS = [(20, 27, 1), (0, 7, 3), (7, 7, 0), (30, 34, 1), (27, 30, -1), (9, 20, 0), (34, 36, 1), (36, 38, 2)]
FLAT = [0, 7, 3, 9, 20, 0, 20, 27, 1, 30, 36, 1, 36, 38, 2]  # as the op takes them


@pytest.fixture(params=BACKENDS)
def backend(request):
    """ "torch", or "triton" and the route that forward and backward take."""
    with tuning.only(request.param.partition("-")[2] or "cublas"):
        yield request.param


def leaves(dtype, master=None, sizes=(M, K, N), ranks=RANKS):
    """x, weight, every A and B, bias; all but the weight require gradients."""
    m, k, n = sizes
    master = master or dtype
    x = random(m, k, dtype=dtype, seed=1).requires_grad_()
    weight = random(n, k, dtype=dtype, seed=2, scale=k**-0.5)
    lora_As = [random(r, k, dtype=master, seed=30 + g, scale=k**-0.5).requires_grad_() for g, r in enumerate(ranks)]
    lora_Bs = [random(n, r, dtype=master, seed=60 + g, scale=r**-0.5).requires_grad_() for g, r in enumerate(ranks)]
    return x, weight, lora_As, lora_Bs, random(n, dtype=dtype, seed=3, scale=0.3).requires_grad_()


def eager(segments, scalings, mask=None, p=0.0):
    """What a PyTorch user writes, in x's dtype; the mask in bits."""

    def function(x, weight, lora_As, lora_Bs, bias):
        y = torch.nn.functional.linear(x, weight, bias)
        updates = [torch.zeros_like(row) for row in y]
        kept = x if mask is None else x * (reference.unpack_mask(mask, x) / (1 - p))
        for start, end, g in segments:
            if g >= 0:
                update = kept[start:end] @ lora_As[g].to(x.dtype).t() @ lora_Bs[g].to(x.dtype).t() * scalings[g]
                updates[start:end] = update
        unused = sum(factor.sum() for factor in (*lora_As, *lora_Bs)).to(x.dtype) * 0  # gives gradients of zero
        return (y + torch.stack(updates) if updates else y) + unused

    return function


def run(function, dtype, x, weight, lora_As, lora_Bs, bias, dy):
    """[y, dx, dbias, every dA, every dB], of copies of the leaves in `dtype` (None: as they are)."""

    def copied(t):
        return None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad)

    x, weight, bias = map(copied, (x, weight, bias))
    lora_As, lora_Bs = [copied(a) for a in lora_As], [copied(b) for b in lora_Bs]
    y = function(x, weight, lora_As, lora_Bs, bias)
    wanted = [t for t in (x, bias, *lora_As, *lora_Bs) if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy.to(y.dtype))]


def ours(segments=SEGMENTS, scalings=SCALINGS, **options):
    backend = options.pop("backend", "torch").partition("-")[0]

    def function(x, weight, lora_As, lora_Bs, bias):
        return lora_grouped_linear(x, weight, lora_As, lora_Bs, scalings, segments, bias, backend=backend, **options)

    return function


def check(mine, low, exact):
    for ours, eagers, truth in zip(mine, low, exact, strict=True):
        assert ours.dtype == eagers.dtype
        if not truth.any():  # an adapter without rows
            assert not ours.any()
            continue
        assert ours.any()
        assert_as_exact_as(ours, eagers, truth)


def detached(tensors):
    return [t.detach() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
def test_errs_no_more_than_eager(backend, dtype):
    tensors, dy = leaves(dtype, master=torch.float32), random(M, N, dtype=dtype, seed=4)
    with nan_filled(), count_launches() as launches:
        mine = run(ours(backend=backend), None, *tensors, dy)
        again = run(ours(backend=backend), None, *tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(mine, again)), "not the same bits twice"
    twice = {"_project_kernel": 4, "_outer_kernel": 4}  # S and dS, dA and dB
    twice |= {"_gemm_kernel": 4} if backend == "triton-triton" else {"_expand_kernel": 4}  # y and dx
    assert launches == ({} if backend == "torch" else twice)
    function = eager(SEGMENTS, SCALINGS)
    check(mine, run(function, None, *tensors, dy), run(function, torch.float64, *tensors, dy))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_has_one_mask_and_backward_the_same(backend, dtype):
    p = 0.3
    tensors, dy = leaves(dtype), random(M, N, dtype=dtype, seed=4)
    x, weight, lora_As, lora_Bs, _ = tensors
    torch.manual_seed(5)
    if backend == "torch":
        mask = OPS.dropout_mask(x.detach(), p)
    else:
        seed = torch.randint(0, 2**63 - 1, (1,), device=DEVICE)
        factors = detached(lora_As), detached(lora_Bs), list(SCALINGS)
        mask = OPS.grouped_forward(x.detach(), weight, None, *factors, FLAT, None, seed, p, True)[2][0]
    owned = torch.zeros(M, dtype=torch.bool)
    for start, end, g in SEGMENTS:
        owned[start:end] = g >= 0
    kept = reference.unpack_mask(mask, x.detach())[owned]
    assert abs(float(kept.sum()) - kept.numel() * (1 - p)) < 5 * (kept.numel() * p * (1 - p)) ** 0.5

    def seeded(*arguments):
        torch.manual_seed(5)
        return ours(backend=backend, dropout_p=p)(*arguments)

    with nan_filled():
        mine = run(seeded, None, *tensors, dy)
    function = eager(SEGMENTS, SCALINGS, mask, p)
    check(mine, run(function, None, *tensors, dy), run(function, torch.float64, *tensors, dy))
    with torch.no_grad():
        y, silent = seeded(*tensors), ours(backend=backend, dropout_p=p, training=False)(*tensors)
        assert torch.equal(silent, ours(backend=backend)(*tensors))
    changed = (y != silent).any(dim=1).cpu()
    assert torch.equal(y[~owned], silent[~owned]) and changed[owned].float().mean() > 0.8


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_equals_lora_linear_on_the_rows_of_each_adapter(backend, p):
    """With dropout of a single adapter: all its rows then draw what lora_linear draws."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    segments = [(0, M, 1)] if p else SEGMENTS
    tensors, dy = leaves(dtype), random(M, N, dtype=dtype, seed=4)
    torch.manual_seed(6)
    mine = run(ours(segments, backend=backend, dropout_p=p), None, *tensors, dy)

    def one_by_one(x, weight, lora_As, lora_Bs, bias):
        pieces, covered = torch.nn.functional.linear(x, weight, bias).clone(), 0
        options = {"dropout_p": p, "backend": backend.partition("-")[0]}
        for start, end, g in [*segments, *((0, 0, unused) for unused in range(len(RANKS)))]:
            if g >= 0:
                factors = lora_As[g], lora_Bs[g], SCALINGS[g], bias
                pieces[start:end] = lora_linear(x[start:end], weight, *factors, **options)
                covered += end - start
        assert covered == (M if p else 33)
        return pieces

    torch.manual_seed(6)
    for value, alone in zip(mine, run(one_by_one, None, *tensors, dy), strict=True):
        assert error(value, alone) < 16 * torch.finfo(dtype).eps or not (value.any() or alone.any())


@pytest.mark.parametrize(
    ("segments", "rows"),
    [
        ([], 7),  # adapters, but none of them used
        ([(0, 7, -1)], 7),
        ([(0, 0, 0)], 0),  # no rows
        ([(2, 3, 1)], 7),
    ],
)
def test_batches_that_leave_adapters_out(segments, rows, backend):
    sizes, ranks, scalings = (rows, 24, 12), (5, 16), (0.75, 2.0)
    tensors, dy = leaves(torch.float32, sizes=sizes, ranks=ranks), random(rows, 12, seed=4)
    with nan_filled():
        mine = run(ours(segments, scalings, backend=backend), None, *tensors, dy)
    function = eager(segments, scalings)
    check(mine, run(function, None, *tensors, dy), run(function, torch.float64, *tensors, dy))


def test_without_any_adapter_it_is_a_linear_layer():
    x, weight, _, _, bias = leaves(torch.float32)
    for segments in ([], [(0, 9, -1)]):
        y = lora_grouped_linear(x, weight, [], [], [], segments, bias, dropout_p=0.5)
        assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))


@settings(max_examples=8)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(-1, 2)), max_size=5),
    gap=st.integers(0, 3),
    order=st.randoms(use_true_random=False),
    k=st.integers(1, 40),
    n=st.integers(1, 40),
    backend=st.sampled_from(BACKENDS),
)
def test_any_segments(lengths, gap, order, k, n, backend):
    segments, rows = [], 0
    for length, adapter in lengths:
        segments.append((rows + gap, rows + gap + length, adapter))
        rows += gap + length
    order.shuffle(segments)
    ranks, scalings = (1, 17, 5), (0.75, 2.0, 0.5)
    tensors, dy = leaves(torch.float32, sizes=(rows, k, n), ranks=ranks), random(rows, n, seed=4)
    with nan_filled(), tuning.only(backend.partition("-")[2] or "cublas"):
        mine = run(ours(segments, scalings, backend=backend), None, *tensors, dy)
    exact = run(eager(segments, scalings), torch.float64, *tensors, dy)
    # With every number positive the same formula gives Σ |terms| of each sum, by which rounding is bounded.
    x, weight, lora_As, lora_Bs, bias = tensors
    positive = lambda t: t.detach().abs().requires_grad_(t.requires_grad)  # noqa: E731
    tensors = positive(x), positive(weight), [*map(positive, lora_As)], [*map(positive, lora_Bs)], positive(bias)
    bounds = run(eager(segments, scalings), torch.float64, *tensors, dy.abs())
    for value, truth, bound in zip(mine, exact, bounds, strict=True):
        assert value.shape == truth.shape
        assert ((value.double() - truth).abs() <= 8 * torch.finfo(torch.float32).eps * bound).all()


def test_batched_and_strided_x(backend):
    """x (..., K), a transposed x or weight, and a dy whose rows are not contiguous."""
    x, weight, lora_As, lora_Bs, bias = leaves(torch.float32, sizes=(42, 24, 12))
    dy, rest = random(42, 12, seed=4), (weight, lora_As, lora_Bs, bias)
    expected = run(ours(backend=backend), None, x, *rest, dy)
    x3 = x.detach().view(2, 3, 7, 24).requires_grad_()
    found = run(ours(backend=backend), None, x3, *rest, dy.view(2, 3, 7, 12))
    assert found[0].shape == (2, 3, 7, 12) and found[1].shape == (2, 3, 7, 24)
    for value, truth in zip(found, expected, strict=True):
        assert torch.equal(value.view_as(truth), truth)
    turned = x.detach().t().contiguous().t().requires_grad_()
    y = ours(backend=backend)(turned, weight.t().contiguous().t(), lora_As, lora_Bs, bias)
    dy = dy.t().contiguous().t()
    found = [y.detach(), *torch.autograd.grad(y, (turned, bias, *lora_As, *lora_Bs), dy)]
    for value, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-5)


def test_frozen_parts_and_a_trained_weight(backend):
    x, weight, lora_As, lora_Bs, bias = leaves(torch.float32, sizes=(M, 24, N))
    dy = random(M, N, seed=4)
    whole = run(ours(backend=backend), None, x, weight, lora_As, lora_Bs, bias, dy)
    frozen = x.detach(), weight, detached(lora_As), detached(lora_Bs), bias.detach()
    count = len(RANKS)
    parts = [whole[1:2], whole[3 : 3 + count], whole[3 + count :], whole[2:3]]
    tensors = x, weight, lora_As, lora_Bs, bias
    for place, expected in zip((0, 2, 3, 4), parts, strict=True):  # one kind of leaf at a time
        arguments = [tensors[i] if i == place else part for i, part in enumerate(frozen)]
        for found, wanted in zip(run(ours(backend=backend), None, *arguments, dy)[1:], expected, strict=True):
            assert torch.equal(found, wanted)
    one = [a if g == 1 else a.detach() for g, a in enumerate(lora_As)]  # and one adapter of several
    assert torch.equal(run(ours(backend=backend), None, x, weight, one, frozen[3], frozen[4], dy)[2], whole[4])
    trained = weight.clone().requires_grad_()
    with count_launches() as launches:
        y = ours(backend=backend)(x, trained, lora_As, lora_Bs, bias)
        found = torch.autograd.grad(y, (trained, x, bias, *lora_As, *lora_Bs), dy)
    assert bool(launches["_project_kernel"]) == (backend != "torch") and not launches["_gemm_kernel"]
    torch.testing.assert_close(found[0], dy.t() @ x.detach())
    for value, truth in zip((y, *found[1:]), whole, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(ours(backend=backend)(x, trained, lora_As, lora_Bs, bias), whole[0])
    with torch.inference_mode():
        assert torch.equal(ours(backend=backend)(x, trained, lora_As, lora_Bs, bias), whole[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_equals_explicit_casts(dtype):
    tensors, dy = leaves(torch.float32), random(M, N, dtype=dtype, seed=4)

    def automatic(*arguments):
        torch.manual_seed(1)
        with torch.autocast(DEVICE.type, dtype=dtype):
            return ours(dropout_p=0.3)(*arguments)

    def explicit(x, weight, lora_As, lora_Bs, bias):
        torch.manual_seed(1)
        return ours(dropout_p=0.3)(x.to(dtype), weight.to(dtype), lora_As, lora_Bs, bias.to(dtype))

    got, expected = run(automatic, None, *tensors, dy), run(explicit, None, *tensors, dy)
    assert got[0].dtype == dtype and all(gradient.dtype == torch.float32 for gradient in got[1:])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


SMALL = [(5, 6, 1), (0, 2, 0), (3, 5, 1)]


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck_and_second_derivatives(p):
    x, weight, lora_As, lora_Bs, bias = leaves(torch.float64, sizes=(7, 5, 3), ranks=(2, 1, 2))
    inputs = x, bias, *lora_As, *lora_Bs

    def function(x, bias, *factors):
        torch.manual_seed(3)
        return lora_grouped_linear(x, weight, factors[:3], factors[3:], (0.75, 2.0, 0.5), SMALL, bias, dropout_p=p)

    dy = random(7, 3, dtype=torch.float64, seed=4)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    first = torch.autograd.grad(function(*inputs), inputs, dy, create_graph=True)
    once = torch.autograd.grad(function(*inputs), inputs, dy)
    for graph, plain in zip(first, once, strict=True):
        torch.testing.assert_close(graph, plain, rtol=1e-12, atol=1e-12)
    # An adapter without rows has gradients of zero, and bias may be all that is trained.
    y = lora_grouped_linear(x.detach(), weight, lora_As, lora_Bs, SCALINGS[:3], [], bias)
    assert not any(t.any() for t in torch.autograd.grad(y.sum(), (*lora_As, *lora_Bs), create_graph=True))
    y = lora_grouped_linear(x.detach(), weight, detached(lora_As), detached(lora_Bs), SCALINGS[:3], SMALL, bias)
    assert torch.equal(torch.autograd.grad(y.sum(), bias, create_graph=True)[0], torch.full_like(bias, 7.0))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("base", [False, True])
def test_opcheck(p, base):
    x, weight, lora_As, lora_Bs, bias = leaves(torch.float32)
    weight, bias = (weight, bias) if base else (None, None)
    mask = OPS.dropout_mask(x.detach(), p)[None] if p else None
    arguments = lora_As, lora_Bs, list(SCALINGS), FLAT, mask, None, p, False
    torch.library.opcheck(OPS.grouped_forward.default, (x, weight, bias, *arguments))
    s = OPS.grouped_forward(x, weight, bias, *arguments)[1].detach()
    saved = x.detach(), weight, detached(lora_As), detached(lora_Bs), s, mask, list(SCALINGS), FLAT, p
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        torch.library.opcheck(OPS.grouped_backward.default, (random(M, N, seed=4), *saved, *needs, False))


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_fake_tensors_flops_and_what_is_saved(p):
    x, weight, lora_As, lora_Bs, _ = tensors = leaves(torch.float32)
    function, saved = ours(dropout_p=p), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = function(*tensors)
    own = {t.untyped_storage().data_ptr() for t in (weight, *lora_As, *lora_Bs)}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    total = sum(size for pointer, size in sizes.items() if pointer not in own)
    assert x.untyped_storage().data_ptr() in sizes
    assert total == 4 * M * (K + 48) + (M * 9 if p else 0)  # x, S, and the mask's bits
    with FlopCounterMode(display=False) as counter:
        y = function(*tensors)
        forward = counter.get_total_flops()
        y.sum().backward()
    adapters = 2 * (K + N) * sum((end - start) * RANKS[g] for start, end, g in SEGMENTS if g >= 0)
    assert forward == 2 * M * K * N + adapters
    assert counter.get_total_flops() - forward == 2 * M * K * N + 2 * adapters
    with FakeTensorMode() as mode:
        fake = [
            [mode.from_tensor(one) for one in t] if isinstance(t, list) else mode.from_tensor(t)
            for t in (x, weight, lora_As, lora_Bs, tensors[4])
        ]
        y_fake = function(*fake)
        y_fake.sum().backward()
        pairs = zip((y_fake, fake[0].grad, *(b.grad for b in fake[3])), (y, x.grad, *(b.grad for b in lora_Bs)))
        for one, real in pairs:
            assert (one.shape, one.dtype, one.device) == (real.shape, real.dtype, real.device)


@pytest.mark.parametrize("backend", ["torch", "triton-cublas"], indirect=True)
def test_whoever_looks_on_changes_no_bit(backend):
    tensors, dy = leaves(torch.float32), random(M, N, seed=4)

    def seeded(*arguments):
        torch.manual_seed(5)
        return ours(backend=backend, dropout_p=0.3)(*arguments)

    unseen = run(seeded, None, *tensors, dy)
    with FlopCounterMode(display=False):
        assert all(torch.equal(a, b) for a, b in zip(unseen, run(seeded, None, *tensors, dy), strict=True))


class Layer(torch.nn.Module):
    def __init__(self, tensors):
        super().__init__()
        _, self.weight, lora_As, lora_Bs, bias = tensors
        self.lora_As, self.lora_Bs = (torch.nn.ParameterList(detached(factors)) for factors in (lora_As, lora_Bs))
        self.bias = torch.nn.Parameter(bias.detach())

    def forward(self, x, segments):
        factors = list(self.lora_As), list(self.lora_Bs)
        y = lora_grouped_linear(x, self.weight, *factors, SCALINGS, segments, self.bias)
        return torch.nn.functional.silu(y)


def test_compiles_whole_and_once_for_batches_of_as_many_segments():
    tensors = leaves(torch.float32)
    layer, dy, graphs = Layer(tensors), random(M, N, seed=4), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    counted = torch.compile(layer, fullgraph=True, backend=count)
    first, second = [(2, 9, 2), (9, 20, 3), (20, 38, 4)], [(3, 11, 3), (11, 19, 4), (19, 37, 2)]
    for segments in (first, second, [(30, 33, 2), (4, 5, 2), (5, 17, 2)], [(4, 5, 3), (5, 17, 2), (19, 31, 3)]):
        results = []
        for call in (layer, compiled):
            layer.zero_grad()
            x = tensors[0].detach().requires_grad_()
            y = call(x, segments)
            y.backward(dy)
            results.append([y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        with torch.no_grad():
            counted(x, segments)
    assert len(graphs) == 2  # the first batch's, with its numbers, and one for any numbers (0 and 1 stay special)


def test_function_transforms_differentiate_and_batch():
    x, weight, lora_As, lora_Bs, bias = leaves(torch.float64)
    rest = weight, detached(lora_As), detached(lora_Bs), bias.detach()
    x = x.detach()
    y = ours()(x, *rest)
    (dx,) = torch.autograd.grad(ours()(x.requires_grad_(), *rest).sum(), x)
    x = x.detach()
    torch.testing.assert_close(torch.func.grad(lambda x: ours()(x, *rest).sum())(x), dx)
    batch = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.func.vmap(lambda x: ours()(x, *rest))(batch)[0], y)


@pytest.fixture
def copies(monkeypatch):
    """Empty caches; yields the keys of what is copied to the device, as it is made."""
    made = []
    for cache in (grouped._tables, grouped._scales):
        monkeypatch.setattr(cache, "recent", {})
        monkeypatch.setattr(cache, "captured", {})
        make = cache.make
        monkeypatch.setattr(cache, "make", lambda *key, make=make: (made.append(key), make(*key))[1])
    return made


def test_the_table_is_made_once_a_batch(copies):
    tensors, dy = leaves(torch.float32, sizes=(41, 24, 12)), random(41, 12, seed=4)
    with tuning.only("cublas"):
        for _ in range(2):
            run(ours(backend="triton"), None, *tensors, dy)
        run(ours([*reversed(SEGMENTS), (38, 41, -1)], backend="triton"), None, *tensors, dy)  # the same batch
        expected = [(tuple(FLAT), RANKS, 41, DEVICE), (SCALINGS, DEVICE)]
        assert copies == expected
        run(ours(backend="triton", dropout_p=0.5), None, *tensors, dy)  # other scalings, the same table
        assert copies == [*expected, (tuple(2 * scaling for scaling in SCALINGS), DEVICE)]


def test_the_caches_stay_small_and_keep_what_is_used(copies):
    kept, tables = grouped._tables.KEPT, grouped._tables

    def ask(row):
        return tables.get((row, row + 1, 0), (5,), 2 * kept, device=DEVICE)

    first = ask(0)
    for row in range(2 * kept):
        ask(row)
        assert ask(0) is first
        grouped._cached_spans((row, row + 1, 0), 2 * kept, 1)
    assert len(tables.recent) == kept and len(copies) == 2 * kept
    assert grouped._cached_spans.cache_info().currsize == grouped._cached_spans.cache_info().maxsize


def test_what_a_capture_has_seen_is_kept_and_nothing_is_copied_in_it(copies, monkeypatch):
    """The device is what the tests run on; that a graph is being captured is only said."""
    tensors, dy = leaves(torch.float32, sizes=(41, 24, 12)), random(41, 12, seed=4)
    step = ours(backend="triton", dropout_p=0.5)

    def seeded(*arguments):
        torch.manual_seed(5)
        return step(*arguments)

    def captured(is_captured):
        monkeypatch.setattr(grouped, "_is_captured", lambda device: is_captured)

    sentence = r"a CUDA graph is being captured, in which the table of these segments can't be copied to the GPU; call"
    with tuning.only("cublas"):
        captured(True)
        with pytest.raises(LoraFastError, match=sentence):
            run(seeded, None, *tensors, dy)
        assert not copies and not grouped._tables.recent
        captured(False)
        before = run(seeded, None, *tensors, dy)
        assert len(copies) == 2
        captured(True)
        torch.testing.assert_close(run(seeded, None, *tensors, dy), before, rtol=0, atol=0)
        with pytest.raises(LoraFastError, match="in which the scalings can't be copied to the GPU"):
            run(ours(backend="triton", dropout_p=0.25), None, *tensors, dy)
        assert len(copies) == 2 and len(grouped._tables.captured) == len(grouped._scales.captured) == 1
        captured(False)
        for row in range(2 * grouped._tables.KEPT):
            grouped._tables.get((row, row + 1, 0), (5,), 2 * grouped._tables.KEPT, device=DEVICE)
        captured(True)  # another graph of the same batch, after many other batches
        torch.testing.assert_close(run(seeded, None, *tensors, dy), before, rtol=0, atol=0)
        assert len(grouped._tables.recent) == grouped._tables.KEPT


@pytest.mark.skipif(DEVICE.type != "cuda", reason="a CUDA graph needs a GPU")
def test_a_cuda_graph(copies):
    tensors, dy = leaves(torch.float16), random(M, N, dtype=torch.float16, seed=4)
    x, weight, lora_As, lora_Bs, bias = tensors

    def step():
        y = lora_grouped_linear(x, weight, lora_As, lora_Bs, SCALINGS, SEGMENTS, bias, backend="triton")
        return [y.detach(), *torch.autograd.grad(y, [x, *lora_As, *lora_Bs, bias], dy)]

    with tuning.only("triton"):
        with (
            pytest.raises(LoraFastError, match="a CUDA graph is being captured"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            step()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        with torch.no_grad():
            x.copy_(random(M, K, dtype=torch.float16, seed=7))
        for row in range(2 * grouped._tables.KEPT):  # the graph's table has to survive other batches
            grouped._tables.get((row, row + 1, 0), (5,), 2 * grouped._tables.KEPT, device=DEVICE)
        graph.replay()
        assert all(torch.equal(replayed, eager) for replayed, eager in zip(results, step(), strict=True))


def test_compilers_leave_the_ops_out_of_their_cuda_graphs():
    for op in (OPS.grouped_forward.default, OPS.grouped_backward.default):
        assert torch.Tag.cudagraph_unsafe in op.tags


def refused(sentence, **changes):
    x, weight, lora_As, lora_Bs, bias = leaves(torch.float32)
    arguments = {"x": x, "weight": weight, "lora_As": lora_As, "lora_Bs": lora_Bs, "scalings": SCALINGS}
    arguments |= {"segments": SEGMENTS, "bias": bias} | changes
    with pytest.raises(LoraFastError, match=sentence):
        lora_grouped_linear(**arguments)


def test_bad_input_is_named():
    refused(r"segments\[1\] is \(5, 42, 0\), x has M=41 rows; expected 0 <= first", segments=[(0, 5, 0), (5, 42, 0)])
    refused(r"segments\[0\] is \(-1, 5, 0\), x has", segments=[(-1, 5, 0)])
    refused(r"segments\[0\] is \(5, 4, 0\), x has", segments=[(5, 4, 0)])
    refused(r"segments \(0, 5, 0\) and \(4, 9, 1\) share rows", segments=[(4, 9, 1), (0, 5, 0)])
    refused(r"segments \(0, 5, -1\) and \(4, 9, 1\) share rows", segments=[(4, 9, 1), (0, 5, -1)])
    refused(r"segments\[0\] is \(0, 5, 5\), lora_As has 5 adapters; expected an adapter below 5", segments=[(0, 5, 5)])
    refused(r"segments\[0\] is \(0, 5, -2\), lora_As has 5 adapters", segments=[(0, 5, -2)])
    none = {"lora_As": [], "lora_Bs": [], "scalings": []}
    refused(r"segments\[0\] is \(0, 5, 0\), lora_As has 0 adapters", **none, segments=[(0, 5, 0)])
    refused(r"segments\[0\] is \(0, 5\); expected \(first row, end, adapter or -1\), three ints", segments=[(0, 5)])
    refused(r"segments\[0\] is \(0, 5.0, 0\); expected", segments=[(0, 5.0, 0)])
    refused(r"segments\[0\] is 0; expected", segments=[0, 5, 0])
    refused(r"5 lora_As, 4 lora_Bs, 5 scalings; expected one of each per adapter", lora_Bs=leaves(torch.float32)[3][:4])
    refused(r"x is \(41, 69\), weight is \(12, 70\)", x=torch.zeros(41, 69))
    refused(r"x is \(41, 69\), weight is \(12, 70\)", x=torch.zeros(41, 69), **none, segments=[])
    refused(r"lora_A is \(6, 70\), lora_B is \(12, 5\)", lora_As=[torch.zeros(6, 70)] * 5)
    refused(r"bias is \(11,\)", bias=torch.zeros(11))
    refused(r"x is torch.float16, weight is torch.float32", x=torch.zeros(M, K).half())
    refused(r"dropout_p=1.0", dropout_p=1.0)
    refused(r"backend='gpu'; expected one of", backend="gpu")
    wide = {"lora_As": [random(513, K)], "lora_Bs": [random(N, 513)], "scalings": [1.0], "segments": []}
    refused(r"backend='triton': r=513 is above 512", **wide, backend="triton")


@pytest.mark.parametrize("transposed", [False, True])
def test_the_choice_knows_how_the_weight_lies(transposed):
    x, weight, lora_As, lora_Bs, bias = leaves(torch.float16, sizes=(M, 80, 16))
    weight = weight.t().contiguous().t() if transposed else weight
    asked = []

    def asking(step, sizes, device, candidates):
        asked.append((step, sizes["weight"], sizes["aligned"], sizes.get("bias")))
        return candidates["cublas"]()

    with mock.patch.object(tuning, "run", asking):
        y = lora_grouped_linear(x, weight, lora_As, lora_Bs, SCALINGS, SEGMENTS, bias, backend="triton")
        torch.autograd.grad(y, x, torch.ones_like(y))
    layout = "KN" if transposed else "NK"
    assert asked == [("grouped_linear", layout, True, True), ("grouped_grad_x", layout, True, None)]
