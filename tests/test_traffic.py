"""How often each op reads and writes its large matrices: no more than planned, and in no more launches.

X is an (M, K) matrix, Y an (M, N), W a weight. Beyond what the frozen layer itself moves (forward reads X and W and
writes Y, backward reads dY and W and writes dX), a LoRA layer may move X + X + Y: X read once for S and once for dA, dY
once for dS and dB together; with dropout also the mask's bits, written once and read twice (3 X / 16 in fp16). What
remains is of the size of the adapters, of S, or of partial sums, and is bounded to the byte by the formulas below."""

from collections import Counter
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from kernel_support import random
from torch import Tensor
from traffic import Traffic, count_traffic

from lora_fast import fused, lora_linear, lora_linears, lora_swiglu_mlp, lora_update, tuning
from lora_fast.kernels import adapter_grads, grouped, reference, scale_columns, swiglu
from lora_fast.kernels import shrink as shrink_kernels

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret or torch.cuda.is_available(), reason="traffic is counted in Triton's interpreter"
)

# Unequal, so that a matrix's size tells what it is; a rank is small beside them.
M, K, N, R = 128, 192, 320, 8
NS, RANKS = (320, 104, 72), (8, 5, 3)  # of q, k and v
HALF, E = torch.float16, 2  # bytes an element
CAST = 4 + E  # an element of an adapter: the fp32 master read, its cast written
SEED = 16  # bytes: drawn, and read by the kernel that draws a mask

# --- Plans: how many passes over which matrices -----------------------------------------------------------------------


def passes(plan: dict[str, tuple[int, int]], *matrices: tuple[str, int, int]) -> dict[str, tuple[int, int]]:
    """plan and (name, elements, passes) of each: names of masks begin with "mask", an element of theirs is a byte."""
    return plan | {name: (elements, count) for name, elements, count in matrices}


def layer_plan(ns: tuple[int, ...], p: float, *, X: int, Y: int, W: int = 2) -> dict[str, tuple[int, int]]:
    """So many passes over X, over the Y and over the W of each layer, and three over the masks of X."""
    outputs = [(f"Y{i}", M * n, Y) for i, n in enumerate(ns)]
    weights = [(f"W{i}", n * K, W) for i, n in enumerate(ns)]
    return passes({}, ("X", M * K, X), *outputs, *weights, ("masks", len(ns) * M * K // 8, 3 if p else 0))


def excess(traffic: Traffic, plan: dict[str, tuple[int, int]], rest: int) -> dict[str, str]:
    """Where the traffic exceeds the plan; rest: bytes allowed for all that the plan does not name."""
    kinds, allowed = {}, {"rest": rest}
    for name, (elements, count) in plan.items():
        # A copy in fp32 is a pass like any other, of twice the bytes.
        for size in (1,) if name.startswith("mask") else (2, 4):
            assert (elements, size) not in kinds, f"{name} is as large as {kinds[elements, size]}"
            kinds[elements, size] = name
        allowed[name] = elements * count * (1 if name.startswith("mask") else E)
    found = traffic.by_size(kinds)
    for name, limit in allowed.items():
        assert bool(found[name]) == bool(limit), f"{name}: {found[name]} bytes counted, {limit} planned"
    return {name: f"{found[name]:,} B, planned {limit:,}" for name, limit in allowed.items() if found[name] > limit}


def partial_bytes(n: int, r: int) -> int:
    """Partial sums of dS and dB in fp32, written and read once."""
    total = adapter_grads.partial_bytes(M, n, r, adapter_grads.pick_s_and_b_tile(M, n, r, HALF, (0, 0)))
    assert total < E * M * n, "the partial sums of dS and dB cost more than a second read of dy"
    return total


def small_bytes(ns: tuple[int, ...], ranks: tuple[int, ...], p: float = 0.0) -> int:
    """What a group of layers moves beside matrices of the size of X, Y and W: fp32 masters, no part of K split."""
    r = sum(ranks)
    ab = r * K + sum(rank * n for rank, n in zip(ranks, ns))  # elements of the adapters
    forward = CAST * ab + E * (ab + 2 * M * r)  # cast; a and b read, S written and read
    # Cast; dS = dY b and dB read b and S, write dS and dB; dX reads dS and a, dA reads dS; dA written.
    backward = CAST * ab + E * (ab + 4 * M * r) + 4 * ab
    backward += sum(partial_bytes(n, rank) for n, rank in zip(ns, ranks))
    if len(ns) > 1:  # dA is taken apart by the kernel that sums it
        backward += 8 * r * K
    return forward + backward + (SEED if p else 0)


# --- Layers -----------------------------------------------------------------------------------------------------------


def factors(k: int, ns, ranks) -> tuple[list[Tensor], list[Tensor]]:
    """fp32 masters."""
    lora_As = [random(r, k, seed=30 + i, scale=k**-0.5).requires_grad_() for i, r in enumerate(ranks)]
    return lora_As, [random(n, r, seed=40 + i).requires_grad_() for i, (n, r) in enumerate(zip(ns, ranks))]


def count_layers(ns, ranks, p: float, route: str = "triton") -> Traffic:
    """Forward and backward of layers that read one x."""
    x = random(M, K, dtype=HALF, seed=1).requires_grad_()
    weights = [random(n, K, dtype=HALF, seed=10 + i, scale=K**-0.5) for i, n in enumerate(ns)]
    lora_As, lora_Bs = factors(K, ns, ranks)
    dys = [random(M, n, dtype=HALF, seed=50 + i) for i, n in enumerate(ns)]
    with tuning.only(route), count_traffic() as traffic:
        if len(ns) == 1:
            ys = [lora_linear(x, weights[0], lora_As[0], lora_Bs[0], 2.0, dropout_p=p, backend="triton")]
        else:
            ys = lora_linears(x, weights, lora_As, lora_Bs, [2.0] * len(ns), dropout_p=p, backend="triton")
        gradients = torch.autograd.grad(ys, [x, *lora_As, *lora_Bs], dys)
    # The counter has seen it all: every input read whole, every result written whole.
    assert all(traffic.loaded(given) >= given.nbytes for given in (x, *weights, *lora_As, *lora_Bs, *dys))
    assert all(traffic.stored(result) >= result.nbytes for result in (*ys, *gradients))
    return traffic


LAUNCHES = {"_cast_kernel": 2, "_shrink_kernel": 1, "_grad_a_kernel": 1}
# The sums: of dS over strips of columns, of dB over parts of the rows.
GRAD_S_AND_B = {"_grad_s_and_b_kernel": 1, "_sum_kernel": 1}


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_one_layer(p):
    traffic = count_layers((N,), (R,), p)
    # The frozen layer's 2 X + 2 Y + 2 W, and X + X + Y.
    assert not excess(traffic, layer_plan((N,), p, X=2 + 2, Y=2 + 1), small_bytes((N,), (R,), p))
    assert traffic.launches() == {**LAUNCHES, **GRAD_S_AND_B, "gemm_lora_kernel": 2}
    assert traffic.ops() == ({"randint": 1} if p else {})


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_one_layer_by_cublas(p):
    """The update is added to the product: 2 Y more in forward, 2 X in backward."""
    traffic = count_layers((N,), (R,), p, route="cublas")
    assert not excess(traffic, layer_plan((N,), p, X=2 + 2 + 2, Y=2 + 1 + 2), small_bytes((N,), (R,), p))
    # With a mask dX starts as the masked update, and the product is added to that.
    assert traffic.launches() == {**LAUNCHES, **GRAD_S_AND_B, **({"gemm_lora_kernel": 1} if p else {})}
    assert traffic.ops() == ({"randint": 1, "mm": 1, "addmm_": 2} if p else {"mm": 2, "addmm_": 2})


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_group(p):
    """Three layers read X three times in forward. dX is written once, where three frozen layers and autograd's sums of
    their dX would move 9 X."""
    traffic = count_layers(NS, RANKS, p)
    assert not excess(traffic, layer_plan(NS, p, X=4 + 2, Y=2 + 1), small_bytes(NS, RANKS, p))
    # One launch adds up each dB and the dS of q, whose columns make two strips; one takes the three dA apart.
    expected = {**LAUNCHES, "gemm_lora_kernel": 4, "_grad_s_and_b_kernel": 3, "_sum_kernel": 2}
    assert traffic.launches() == expected
    assert traffic.ops() == ({"randint": 1} if p else {})  # each dS is written beside the others


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_update_alone(p):
    """Beside a base layer that ran by itself: forward reads the base's Y and writes Y, backward writes dX; no W."""
    x, base = random(M, K, dtype=HALF, seed=1).requires_grad_(), random(M, N, dtype=HALF, seed=2).requires_grad_()
    dy = random(M, N, dtype=HALF, seed=3)
    (lora_A,), (lora_B,) = factors(K, [N], [R])
    with count_traffic() as traffic:
        y = lora_update(x, base, lora_A, lora_B, 2.0, dropout_p=p, backend="triton")
        torch.autograd.grad(y, [x, base, lora_A, lora_B], dy)
    assert not excess(traffic, layer_plan((N,), p, X=1 + 2, Y=2 + 1, W=0), small_bytes((N,), (R,), p))
    assert traffic.launches() == {**LAUNCHES, **GRAD_S_AND_B, "gemm_lora_kernel": 2}
    assert traffic.ops() == ({"randint": 1} if p else {})


# --- Worse compositions of the same steps -----------------------------------------------------------------------------


def shrink_each(x, a, ranks, mask):
    return torch.cat([shrink_kernels.shrink(x, part)[0] for part in a.split(list(ranks))], dim=1)


def shrink_a_copy(x, a, ranks, mask):
    padded = torch.nn.functional.pad(x, (0, 16))  # of no size that a plan names
    return shrink_kernels.shrink(padded[:, :K], a)[0]


def grad_a_each(ds, x, ranks, mask):
    return [dA for part in ds.split(list(ranks), dim=1) for dA in adapter_grads.grad_a(part, x)]


@pytest.mark.parametrize(
    ("step", "worse", "what"),
    [
        ("linear_lora", reference.linear_lora, {"Y0", "Y1"}),
        ("grad_s_and_b", reference.grad_s_and_b, {"Y0", "Y1"}),
        ("_grad_x", lambda *arguments: reference.grad_x_and_a(*arguments, needs_dA=False)[0], {"X"}),
        ("shrink", shrink_each, {"X"}),
        ("shrink", shrink_a_copy, {"rest"}),
        ("_grad_a", grad_a_each, {"X"}),
    ],
)
def test_one_more_pass_shows(step, worse, what):
    ns, ranks = NS[1:], RANKS[1:]
    with mock.patch.object(fused, step, worse):
        traffic = count_layers(ns, ranks, 0.0)
    assert what <= set(excess(traffic, layer_plan(ns, 0.0, X=3 + 2, Y=2 + 1), small_bytes(ns, ranks)))


# --- SwiGLU -----------------------------------------------------------------------------------------------------------


def parts_of(strips: int, blocks: int, warps: int) -> int:
    """Into how many parts the SwiGLU kernels cut a strip, none of them empty."""
    return triton.cdiv(blocks, triton.cdiv(blocks, swiglu.count_parts(strips, blocks, warps)))


def swiglu_forward_bytes() -> int:
    """Beside (M, N) matrices: A is read, S written after its partial sums."""
    tile = swiglu.forward_tile(R, HALF, (0, 0))
    parts = parts_of(triton.cdiv(M, tile.rows), triton.cdiv(N, tile.columns), tile.warps)
    return E * (R * N + M * R) + 8 * parts * M * R


def swiglu_backward_bytes() -> int:
    """dS_down, S_gate and S_up are read, dA_down, dB_gate and dB_up written after their partial sums."""
    tile = swiglu.backward_tile(R, HALF, (0, 0))
    parts = parts_of(triton.cdiv(N, tile.columns), triton.cdiv(M, tile.rows), tile.warps)
    return 3 * (E * M * R + 4 * R * N + 8 * parts * R * N)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_swiglu_with_its_adapters(p):
    """Forward reads g and u and writes h, backward reads dh, g and u and writes dg and du: no more than without
    adapters, but for the mask's bits."""
    g, u, dh = (random(M, N, dtype=HALF, seed=i) for i in range(3))
    a, ds, s_gate, s_up = random(R, N, dtype=HALF, seed=4), *(random(M, R, dtype=HALF, seed=i) for i in (5, 6, 7))
    seed = torch.tensor([1234]) if p else None
    with count_traffic() as forward:
        _, _, mask = swiglu.swiglu_shrink(g, u, a, seed=seed, dropout_p=p)
    with count_traffic() as backward:
        swiglu.swiglu_backward(dh, g, u, ds, s_gate, s_up, 2.0, 2.0, mask)
    mask_pass = ("mask", M * N // 8, 1 if p else 0)
    rest = swiglu_forward_bytes() + (SEED // 2 if p else 0)
    assert not excess(forward, passes({}, ("Y", M * N, 3), mask_pass), rest)
    assert forward.launches() == {"_forward_kernel": 1, "_sum_kernel": 1} and not forward.ops()
    assert not excess(backward, passes({}, ("Y", M * N, 5), mask_pass), swiglu_backward_bytes())
    assert backward.launches() == {"_backward_kernel": 1, "_sum_kernel": 1} and not backward.ops()


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_swiglu_mlp(p):
    """K → N → K. Without adapters, but with our SwiGLU: forward reads X twice, writes Y, writes g and u, reads them,
    writes h and reads it: 3 X + 6 Yi; backward reads dY, writes dh, reads dh, g and u, writes dg and du, reads both,
    writes dX: 2 X + 8 Yi. With adapters X + X + dY for S, dA and dS, and 2 Yi more: dg and du read for dS."""
    x, dy = random(M, K, dtype=HALF, seed=1).requires_grad_(), random(M, K, dtype=HALF, seed=2)
    weights = [random(N, K, dtype=HALF, seed=3, scale=K**-0.5), random(N, K, dtype=HALF, seed=4, scale=K**-0.5)]
    weights.append(random(K, N, dtype=HALF, seed=5, scale=N**-0.5))
    (a_gate, a_up), (b_gate, b_up) = factors(K, [N, N], [R, R])
    (a_down,), (b_down,) = factors(N, [K], [R])
    lora_As, lora_Bs = (a_gate, a_up, a_down), (b_gate, b_up, b_down)
    with tuning.only("triton"), count_traffic() as traffic:
        layers = zip(weights, lora_As, lora_Bs, (2.0, 2.0, 2.0))
        y = lora_swiglu_mlp(x, *layers, dropout_p=p, backend="triton")
        torch.autograd.grad(y, [x, *lora_As, *lora_Bs], dy)

    plan = passes({}, ("X", M * K, 5 + 3), ("Yi", M * N, 14 + 2), ("W", N * K, 3 * 2))
    plan = passes(plan, ("masks of x", 2 * M * K // 8, 3 if p else 0), ("mask of h", M * N // 8, 3 if p else 0))
    ab = 3 * R * (K + N)
    rest = swiglu_forward_bytes() + swiglu_backward_bytes() + 2 * CAST * ab + (2 * SEED if p else 0)
    # Without what the SwiGLU kernels have of it: A of down once, dA of down, dB of gate and up; S once, dS and S twice.
    rest += E * (2 * ab - R * N) + 4 * (ab - 3 * R * N) + partial_bytes(K, R)
    rest += E * M * R * (5 + 3 + 6) + 8 * 2 * R * K  # in forward; dS of down; of gate and up, and dA taken apart
    assert not excess(traffic, plan, rest)
    assert traffic.launches() == {
        **{"_cast_kernel": 2, "_shrink_kernel": 1, "_grad_a_kernel": 1, "_grad_s_and_b_kernel": 1},
        **{"gemm_lora_kernel": 5, "_forward_kernel": 1, "_backward_kernel": 1, "_sum_kernel": 4},
    }
    assert traffic.ops() == {"mm": 2, **({"randint": 1} if p else {})}  # dS of gate and of up


# --- DoRA -------------------------------------------------------------------------------------------------------------


def test_a_factor_for_each_column():
    """Forward reads z and writes y, backward reads dy and z and writes dz, and does not read z for dz alone. An fp32
    copy of any would be a pass of twice the bytes."""
    z, dy = random(M, N, dtype=HALF, seed=1), random(M, N, dtype=HALF, seed=2)
    g, bias = random(N, seed=3), random(N, dtype=HALF, seed=4)
    with count_traffic() as forward:
        scale_columns.scale_columns(z, g, bias)
    assert not excess(forward, passes({}, ("Y", M * N, 2)), (4 + E) * N)
    assert forward.launches() == {"_scale_kernel": 1} and not forward.ops()
    with count_traffic() as backward:
        scale_columns.scale_columns_backward(dy, z, g)
    parts = triton.cdiv(M, scale_columns.TILE["BLOCK_M"])  # of so few rows, each of one block
    assert not excess(backward, passes({}, ("Y", M * N, 3)), 4 * N * (1 + 2 * parts + 1))
    assert backward.launches() == {"_scale_backward_kernel": 1, "_sum_kernel": 1} and not backward.ops()
    with count_traffic() as frozen:
        scale_columns.scale_columns_backward(dy, None, g)
    assert not excess(frozen, passes({}, ("Y", M * N, 2)), 4 * N)
    assert frozen.launches() == {"_scale_kernel": 1} and not frozen.ops()


# --- Several adapters in a batch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_several_adapters_in_a_batch(p):
    """Every row has an adapter, of rank 8, 5 or 3: the traffic of one layer, but dS and dB read dY each."""
    table = grouped.block_table([(0, 40, 0), (40, 100, 2), (100, 128, 1)], RANKS, M, "cpu")
    x, dy = random(M, K, dtype=HALF, seed=1), random(M, N, dtype=HALF, seed=2)
    weight = random(N, K, dtype=HALF, seed=3, scale=K**-0.5)
    a, b = random(sum(RANKS), K, dtype=HALF, seed=4), random(sum(RANKS), N, dtype=HALF, seed=5).t()
    scales, seed = torch.full((3,), 2.0), torch.tensor([1234]) if p else None
    with count_traffic() as traffic:
        s, mask = grouped.grouped_shrink(x, a, table, seed=seed, dropout_p=p)
        grouped.grouped_gemm(x, weight, s, b, table)
        ds = grouped.grouped_grad_s(dy, b, table)
        grouped.grouped_gemm(dy, weight.t(), ds, a.t(), table, mask=mask)
        grouped.grouped_grad_b(dy, s, table, scales)
        grouped.grouped_grad_a(ds, x, table, mask=mask)
    ab = sum(RANKS) * (K + N)
    rest = E * (2 * ab + 6 * M * table.width) + 4 * ab + (SEED // 2 if p else 0)
    # What each launch reads of the table, and the scales.
    rest += 4 * table.blocks.nbytes + 2 * (table.chunks.nbytes + table.adapters.nbytes + table.order.nbytes)
    rest += scales.nbytes
    assert not excess(traffic, layer_plan((N,), p, X=2 + 2, Y=2 + 2), rest)
    assert traffic.launches() == {"_project_kernel": 2, "_gemm_kernel": 2, "_outer_kernel": 2} and not traffic.ops()

    y = dy.clone()
    with count_traffic() as beside:  # a GEMM that ran by itself
        grouped.grouped_expand(y, s, b, table, out=y)
        grouped.grouped_grad_x(ds, a, table, mask=mask)
    plan = passes({}, ("X", M * K, 1), ("Y", M * N, 2), ("mask", M * K // 8, 1 if p else 0))
    assert not excess(beside, plan, E * (ab + 2 * M * table.width) + 2 * table.blocks.nbytes)
    assert beside.launches() == {"_expand_kernel": 2} and not beside.ops()


# --- The counter ------------------------------------------------------------------------------------------------------


@triton.jit
def read_all_kernel(x, out, size, BLOCK: tl.constexpr):
    """Every program reads all of x, adds the sum to the first number of out, and stores it at its own place behind."""
    total = tl.sum(tl.load(x + tl.arange(0, BLOCK), tl.arange(0, BLOCK) < size, 0.0))
    tl.atomic_add(out, total)
    tl.store(out + 1 + tl.program_id(0), total)


def test_the_counter_counts_launches():
    x, out = torch.ones(40), torch.zeros(3)
    with count_traffic() as traffic:
        read_all_kernel[(2,)](x, out, 30, BLOCK=32)
    assert out.tolist() == [60.0, 30.0, 30.0]
    assert traffic.loaded(x) == 30 * 4 and traffic.stored(x) == 0  # masked, and once for both programs
    assert traffic.loaded(out) == 4 and traffic.stored(out) == 12  # the atomic reads and writes
    (step,) = traffic.steps
    assert step.requested_loaded == 2 * (30 + 1) * 4 and step.requested_stored == 2 * 2 * 4
    assert "loads X 0.75, 4 B" in traffic.report(X=x) and "X loaded 0.75, stored 0.00 times" in traffic.report(X=x)


def test_the_counter_finds_a_stray_access():
    with count_traffic(), pytest.raises(triton.runtime.errors.InterpreterError, match="no tensor of its arguments"):
        read_all_kernel[(2,)](torch.ones(20), torch.zeros(3), 30, BLOCK=32)


def test_the_counter_counts_ops():
    x, w, target = torch.ones(4, 6, requires_grad=True), torch.ones(5, 6), torch.zeros(2)
    with count_traffic() as traffic:
        y = torch.nn.functional.linear(x, w).view(2, 10)[:1]  # views cost nothing
        torch.empty(100)
        y.detach().add_(1)  # reads and writes the half that it changes
        target.copy_(w[0, :1].expand(2))  # reads the one element, writes two
    steps = [(step.name, step.loaded.total(), step.stored.total()) for step in traffic.steps]
    assert steps == [("mm", 4 * (24 + 30), 4 * 20), ("add_", 40, 40), ("copy_", 4, 8)]
    dy = torch.ones(4, 5)
    with count_traffic() as traffic:
        torch.autograd.grad(torch.nn.functional.linear(x, w), x, dy)
    assert traffic.ops() == Counter(mm=2) and traffic.loaded(w) == 2 * w.nbytes  # the backward pass too
