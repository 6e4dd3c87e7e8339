"""The ops of lora-fast as PyTorch sees them: checked, flattened to matrices, registered with torch.library.

Each op is a short composition of the steps that kernels/reference.py defines; `steps` is that module (plain PyTorch) or
fused.py (the same steps as Triton kernels and cuBLAS calls).

Registered (fake implementation, autograd and FLOP formula), so that torch.compile, FakeTensor, selective checkpointing
and the FLOP counter each see one op. Where nobody looks on, the same functions run under a plain autograd.Function: the
dispatcher's way into Python and back costs 70 µs more per forward and backward, which small models feel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lora_fast.backend import check_backend, runs_triton
from lora_fast.config import LoraFastError
from lora_fast.dispatch import (
    KERNEL_GROUP,
    bias_or_none,
    casts_to_keep,
    check_devices,
    check_factors,
    check_linear,
    check_one_dtype,
    compute_input,
    draw_masks,
    fake_mask,
    flatten,
    implement,
    in_dtype,
    is_batched,
    is_differentiated,
    is_observed,
    is_packed,
    is_transformed,
    library,
    on_own_device,
    owned,
    ranks_of,
    reshaped,
    row_count,
    scales_of,
    shrink_or_draw,
    steps_for,
    tensors_among,
    unpacked,
)
from lora_fast.kernels import reference

# biases: one per layer, empty where there is none. With `seed` the op draws the masks and returns them last.
library.define(
    "linears_forward(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] lora_As, Tensor[] lora_Bs, "
    "float[] scalings, Tensor? mask, Tensor? seed, float dropout_p, bool triton) -> Tensor[]"
)
library.define(
    "linears_backward(Tensor?[] dys, Tensor x, Tensor?[] weights, Tensor[] lora_As, Tensor[] lora_Bs, Tensor s, "
    "Tensor? mask, float[] scalings, float dropout_p, bool needs_dx, bool needs_dA, bool needs_dB, bool triton) "
    "-> Tensor[]"
)
library.define(
    "update_forward(Tensor x, Tensor base, Tensor lora_A, Tensor lora_B, float scaling, Tensor? mask, Tensor? seed, "
    "float dropout_p, bool triton) -> Tensor[]"
)


def _columns(s: Tensor, ranks: Sequence[int]) -> Sequence[Tensor]:
    """S_g (M, R_g) of each layer of a group."""
    return (s,) if len(ranks) == 1 else s.split_with_sizes(ranks, 1)


@on_own_device
def _linears_forward(x, weights, biases, lora_As, lora_Bs, scalings, mask, seed, dropout_p, triton, casts=None):
    """[y of each layer, S (M, ΣR), and the masks if they were drawn here]. casts: a list for the adapters as cast."""
    steps, rows, ranks = steps_for(triton), flatten(x), ranks_of(lora_As)
    ((a, bs),) = steps.cast_factors([(lora_As, lora_Bs, scales_of(scalings, dropout_p))], x.dtype)
    if casts is not None:
        casts += a, *bs
    s, drawn = shrink_or_draw(steps, rows, a, ranks, mask, seed, dropout_p)
    ys = []
    for weight, bias, s_g, b in zip(weights, biases, _columns(s, ranks), bs):
        y = steps.linear_lora(rows, unpacked(weight), s_g, b, bias_or_none(bias))
        ys.append(reshaped(y, (*x.shape[:-1], y.shape[-1])))
    return [*ys, s] if seed is None else [*ys, s, drawn]


@on_own_device
def _update_forward(x, base, lora_A, lora_B, scaling, mask, seed, dropout_p, triton):
    """[base + update, S (M, R), and the mask if it was drawn here]."""
    steps, ranks = steps_for(triton), ranks_of([lora_A])
    ((a, (b,)),) = steps.cast_factors([([lora_A], [lora_B], scales_of([scaling], dropout_p))], x.dtype)
    s, drawn = shrink_or_draw(steps, flatten(x), a, ranks, mask, seed, dropout_p)
    y = reshaped(steps.update_lora(flatten(base), s, b), base.shape)
    return [y, s] if seed is None else [y, s, drawn]


@on_own_device
def _linears_backward(
    dys, x, weights, lora_As, lora_Bs, s, mask, scalings, dropout_p, needs_dx, needs_dA, needs_dB, triton, casts=()
):
    """[dx, every dA, every dB], empty where not needed, or where dy is None (that output was not used). casts: of
    forward, or nothing."""
    steps, rows, ranks = steps_for(triton), flatten(x), ranks_of(lora_As)
    count, scales, s_parts = len(dys), scales_of(scalings, dropout_p), _columns(s, ranks)
    used = [i for i in range(count) if dys[i] is not None]
    if len(used) < count:
        dys, weights, lora_As, lora_Bs, s_parts, ranks, scales = (
            [values[i] for i in used] for values in (dys, weights, lora_As, lora_Bs, s_parts, ranks, scales)
        )
        if mask is not None:
            mask = torch.stack([mask[i] for i in used])  # an index would be copied to the GPU, which no capture allows
    dys = [in_dtype(flatten(dy), x.dtype) for dy in dys]
    if casts and len(used) == count:
        a, *bs = casts
    else:
        ((a, bs),) = steps.cast_factors([(lora_As, lora_Bs, scales)], x.dtype)
    dx, dAs, dBs, found_dBs = None, [None] * count, [None] * count, None
    if needs_dx or needs_dA:
        ds, found_dBs = steps.grad_s_and_b(dys, bs, s_parts if needs_dB else None, scales)
    elif needs_dB:
        found_dBs = [steps.grad_b(dy, s_g, scale) for dy, s_g, scale in zip(dys, s_parts, scales)]
    if needs_dB:
        for i, dB, lora_B in zip(used, found_dBs, lora_Bs):
            dBs[i] = in_dtype(dB, lora_B.dtype)
    if needs_dx or needs_dA:
        weights = [unpacked(weight) if needs_dx else None for weight in weights]
        found, found_dAs = steps.grad_x_and_a(dys, weights, ds, a, rows, ranks, mask, needs_dx, needs_dA)
        if needs_dx:
            dx = found if x.dim() == 2 else found.view(x.shape)
        if needs_dA:
            for i, dA, lora_A in zip(used, found_dAs, lora_As):
                dAs[i] = owned(dA, lora_A.dtype)
    return [x.new_empty(0) if gradient is None else gradient for gradient in (dx, *dAs, *dBs)]


implement("linears_forward", _linears_forward)
implement("update_forward", _update_forward)
implement("linears_backward", _linears_backward)


@torch.library.register_fake("lora_fast::linears_forward", lib=library)
def _(x, weights, biases, lora_As, lora_Bs, scalings, mask, seed, dropout_p, triton):
    ys = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    s = x.new_empty(row_count(x.shape), sum(ranks_of(lora_As)))
    return [*ys, s] if seed is None else [*ys, s, fake_mask(x, len(weights))]


@torch.library.register_fake("lora_fast::update_forward", lib=library)
def _(x, base, lora_A, lora_B, scaling, mask, seed, dropout_p, triton):
    y, s = base.new_empty(base.shape), x.new_empty(row_count(x.shape), lora_A.shape[0])
    return [y, s] if seed is None else [y, s, fake_mask(x, 1)]


@torch.library.register_fake("lora_fast::linears_backward", lib=library)
def _(dys, x, weights, lora_As, lora_Bs, s, mask, scalings, dropout_p, needs_dx, needs_dA, needs_dB, triton):
    def gradients(needed, factors):
        return [x.new_empty(0) if dy is None or not needed else f.new_empty(f.shape) for dy, f in zip(dys, factors)]

    return [x.new_empty(x.shape if needs_dx else 0), *gradients(needs_dA, lora_As), *gradients(needs_dB, lora_Bs)]


def plain_update(x, lora_A, lora_B, scaling, mask, dropout_p):
    """scaling · drop(x) Aᵀ Bᵀ (M, N) in steps that autograd can follow."""
    rows = flatten(x) if mask is None else flatten(x) * reference.unpack_mask(mask, flatten(x))
    return (rows @ lora_A.to(x.dtype).t() @ lora_B.to(x.dtype).t()) * (scaling / (1 - dropout_p))


def _gradients(ctx, dys, x, weights, lora_As, lora_Bs, casts, s, mask, needs_dx, needs_dA, needs_dB):
    """(dx, dAs, dBs) of a group of layers, anything where not needed; weights are None where the base layer ran by
    itself."""
    if torch.is_grad_enabled() or any(map(is_batched, dys)):  # create_graph=True, or many dys at once
        return _differentiable_gradients(ctx, dys, x, weights, lora_As, lora_Bs, mask, needs_dx, needs_dA, needs_dB)
    inputs = dys, x, weights, lora_As, lora_Bs, s, mask, ctx.scalings, ctx.dropout_p
    inputs = *inputs, needs_dx, needs_dA, needs_dB, ctx.triton
    as_op = is_observed() and not is_packed(weights)
    dx, *rest = torch.ops.lora_fast.linears_backward(*inputs) if as_op else _linears_backward(*inputs, casts)
    return dx, rest[: len(dys)], rest[len(dys) :]


@torch.enable_grad()
def _differentiable_gradients(ctx, dys, x, weights, lora_As, lora_Bs, mask, needs_dx, needs_dA, needs_dB):
    """The same by autograd's own gradients of the formula, which it can differentiate and batch."""
    lora_As, lora_Bs = ([f.view_as(f) for f in factors] for factors in (lora_As, lora_Bs))  # one may serve two layers
    outputs, dys_used = [], []
    for i, (dy, weight) in enumerate(zip(dys, weights)):
        if dy is not None:
            m = None if mask is None else mask[i]
            y = plain_update(x, lora_As[i], lora_Bs[i], ctx.scalings[i], m, ctx.dropout_p)
            y = y if weight is None else y + flatten(x) @ unpacked(weight).to(x.dtype).t()
            if y.requires_grad:  # not where all that reaches this output is frozen
                outputs.append(y)
                dys_used.append(flatten(dy).to(x.dtype))
    none = [None] * len(dys)
    wanted = [x if needs_dx else None, *(lora_As if needs_dA else none), *(lora_Bs if needs_dB else none)]
    trained = [tensor is not None and tensor.requires_grad for tensor in wanted]
    inputs = [tensor for tensor, is_trained in zip(wanted, trained) if is_trained]
    found = iter(())
    if inputs and outputs:
        found = iter(torch.autograd.grad(outputs, inputs, dys_used, create_graph=True, allow_unused=True))
    dx, *factors = [next(found, None) if is_trained else None for is_trained in trained]
    return dx, factors[: len(dys)], factors[len(dys) :]


def _save(ctx, x, weights, biases, lora_As, lora_Bs, scalings, mask, dropout_p, triton, s, casts=()) -> None:
    ctx.save_for_backward(x, s, mask, *tensors_among(weights), *lora_As, *lora_Bs, *casts)
    ctx.packed = weights if is_packed(weights) else None
    ctx.scalings, ctx.dropout_p, ctx.triton = scalings, dropout_p, triton
    ctx.bias_dtypes = [bias if bias is None else bias.dtype for bias in biases]
    ctx.set_materialize_grads(False)


def _saved(ctx):
    x, s, mask, *rest = ctx.saved_tensors
    count = len(ctx.scalings)
    weights, lora_As, lora_Bs = (rest[i * count : (i + 1) * count] for i in range(3))
    return x, s, mask, ctx.packed or weights, lora_As, lora_Bs, rest[3 * count :]


def _linears_gradients(ctx, dys, needs_dx, needs_dbias, needs_dA, needs_dB):
    """(dx, dbiases, dAs, dBs); needs_dbias, needs_dA, needs_dB: a flag per layer."""
    x, s, mask, weights, lora_As, lora_Bs, casts = _saved(ctx)
    flags = needs_dx, any(needs_dA), any(needs_dB)
    dx, dAs, dBs = _gradients(ctx, dys, x, weights, lora_As, lora_Bs, casts, s, mask, *flags)
    dbiases = [None] * len(dys)
    if any(needs_dbias):
        for i, (dy, needed, dtype) in enumerate(zip(dys, needs_dbias, ctx.bias_dtypes)):
            dbiases[i] = flatten(dy).sum(0).to(dtype) if needed and dy is not None else None
    dAs = [dA if needed and dy is not None else None for dA, needed, dy in zip(dAs, needs_dA, dys)]
    dBs = [dB if needed and dy is not None else None for dB, needed, dy in zip(dBs, needs_dB, dys)]
    return dx if needs_dx else None, dbiases, dAs, dBs


def _setup_linears(ctx, inputs, output, casts=()):
    x, weights, biases, lora_As, lora_Bs, scalings, mask, seed, dropout_p, triton = inputs
    s = output[len(weights)]
    mask = mask if seed is None else output[-1]
    _save(ctx, x, weights, biases, lora_As, lora_Bs, scalings, mask, dropout_p, triton, s, casts)


def _backward_linears(ctx, grads):
    count = len(ctx.scalings)
    needs_dx, _, needs_dbias, needs_dA, needs_dB, *_ = ctx.needs_input_grad
    if all(dy is None for dy in grads[:count]):
        dx, dbiases, dAs, dBs = None, *([None] * count for _ in range(3))
    else:
        dx, dbiases, dAs, dBs = _linears_gradients(ctx, grads[:count], needs_dx, needs_dbias, needs_dA, needs_dB)
    return dx, [None] * count, dbiases, dAs, dBs, None, None, None, None, None


def _setup_update(ctx, inputs, output):
    x, _, lora_A, lora_B, scaling, mask, seed, dropout_p, triton = inputs
    mask = mask if seed is None else output[2]
    _save(ctx, x, [None], [], [lora_A], [lora_B], [scaling], mask, dropout_p, triton, output[1])


def _backward_update(ctx, grads):
    dy = grads[0]
    if dy is None:
        return (None,) * 9
    needs_dx, needs_dbase, needs_dA, needs_dB, *_ = ctx.needs_input_grad
    dx, _, (dA,), (dB,) = _linears_gradients(ctx, [dy], needs_dx, (), (needs_dA,), (needs_dB,))
    return dx, dy if needs_dbase else None, dA, dB, None, None, None, None, None


torch.library.register_autograd(
    "lora_fast::linears_forward", _backward_linears, setup_context=_setup_linears, lib=library
)
torch.library.register_autograd("lora_fast::update_forward", _backward_update, setup_context=_setup_update, lib=library)


# Both save inside forward: with a setup_context, torch inspects forward's signature at each call, for 70 µs.
class _LinearsFunction(torch.autograd.Function):
    """linears_forward with its autograd formula, without the dispatcher; only tensors of the top level count here, and
    each argument takes its time, so that what has no gradient comes as one."""

    @staticmethod
    def forward(ctx, constants, x, *factors):
        weights, scalings, *_ = constants
        count = len(scalings)
        biases, lora_As, lora_Bs = (factors[i * count : (i + 1) * count] for i in range(3))
        inputs = x, weights, biases, lora_As, lora_Bs, *constants[1:]
        casts: list[Tensor] = []
        output = _linears_forward(*inputs, casts)
        _setup_linears(ctx, inputs, output, casts_to_keep(casts, [x], constants[-1]))
        return tuple(output[:count])

    @staticmethod
    def backward(ctx, *dys):
        count = len(ctx.scalings)
        if all(dy is None for dy in dys):
            return (None,) * (2 + 3 * count)
        _, needs_dx, *needs = ctx.needs_input_grad
        needs_dbias, needs_dA, needs_dB = (needs[i * count : (i + 1) * count] for i in range(3))
        dx, dbiases, dAs, dBs = _linears_gradients(ctx, dys, needs_dx, needs_dbias, needs_dA, needs_dB)
        return None, dx, *dbiases, *dAs, *dBs


class _UpdateFunction(torch.autograd.Function):
    """update_forward with its autograd formula, without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _update_forward(*inputs)
        _setup_update(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, dy):
        return _backward_update(ctx, (dy,))


@register_flop_formula(torch.ops.lora_fast.linears_forward)
def _linears_forward_flops(x, weights, biases, lora_As, *args, **kwargs) -> int:
    return 2 * row_count(x) * sum(n * k + a[0] * (n + k) for (n, k), a in zip(weights, lora_As))


@register_flop_formula(torch.ops.lora_fast.update_forward)
def _update_forward_flops(x, base, lora_A, *args, **kwargs) -> int:
    return 2 * row_count(x) * lora_A[0] * (x[-1] + base[-1])


@register_flop_formula(torch.ops.lora_fast.linears_backward)
def _linears_backward_flops(
    dys, x, weights, lora_As, lora_Bs, s, mask, scalings, dropout_p, needs_dx, needs_dA, needs_dB, *args, **kwargs
) -> int:
    total, k = 0, x[-1]
    for dy, weight, (rank, _) in zip(dys, weights, lora_As):
        if dy is not None:
            n = dy[-1]
            base = n * k if needs_dx and weight is not None else 0
            adapter = needs_dB * n + (needs_dx or needs_dA) * n + needs_dA * k + needs_dx * k
            total += base + rank * adapter
    return 2 * row_count(x) * total


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Linear layer plus low-rank update: y = x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ.

    x (..., K), weight (N, K), lora_A (R, K), lora_B (N, R), bias (N,) → y (..., N) in x's dtype (autocast's where it is
    on), each product accumulated in fp32; lora_A and lora_B may be fp32 masters and get fp32 gradients. `weight` is
    frozen: where it requires a gradient, the base product is left to torch and only the update is ours. dropout_p acts
    where `training`.
    Kept for backward: x, x's product with lora_A (M, R) and, with dropout, one bit per element of x; on the Triton
    kernels maybe lora_A and lora_B in x's dtype too, where they have at most 1/48 of x's elements.
    Raises LoraFastError for sizes, dtypes or devices that do not fit, or a backend that can't run. Source:
    arXiv:2106.09685, section 4.1."""
    biases = [bias]
    return lora_linears(
        x, [weight], [lora_A], [lora_B], [scaling], biases, dropout_p=dropout_p, training=training, backend=backend
    )[0]


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    biases: Sequence[Tensor | None] | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Several LoRA linears that read the same x (q/k/v, gate/up): y_g = x W_gᵀ + bias_g + scaling_g · drop_g(x) A_gᵀ
    B_gᵀ, each with a dropout mask of its own.

    x (..., K); of each layer weight (N_g, K), lora_A (R_g, K), lora_B (N_g, R_g), bias (N_g,) or None → a tuple of
    (..., N_g). The same values as `lora_linear` for each, with x read once for all A_g, once for all dA_g, and dx
    summed without a tensor per layer. Kept for backward: what lora_linear keeps, x once, the 1/48 for all together.
    Raises LoraFastError as lora_linear does, and where the lists differ in length."""
    check_backend(backend)
    biases = [None] * len(weights) if biases is None else biases
    lengths = {len(values) for values in (weights, lora_As, lora_Bs, scalings, biases)}
    if len(lengths) > 1 or not weights:
        raise LoraFastError(
            f"{len(weights)} weights, {len(lora_As)} lora_As, {len(lora_Bs)} lora_Bs, {len(scalings)} scalings, "
            f"{len(biases)} biases; expected one of each per layer"
        )
    for weight, lora_A, lora_B, bias in zip(weights, lora_As, lora_Bs, biases):
        check_linear(x, weight, lora_A, lora_B, bias, dropout_p)
    check_one_dtype(weights)
    x = compute_input(x, weights[0].dtype)
    p = dropout_p if training else 0.0
    if is_transformed() or (torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)):
        return tuple(
            lora_update(
                x,
                torch.nn.functional.linear(x, unpacked(w), None if bias is None else in_dtype(bias, x.dtype)),
                a,
                b,
                s,
                dropout_p=p,
                backend=backend,
            )
            for w, bias, a, b, s in zip(weights, biases, lora_As, lora_Bs, scalings)
        )
    triton = runs_triton(backend, "lora_linear", x, max(ranks_of(lora_As)))
    if triton and len(weights) > KERNEL_GROUP:
        lists = weights, lora_As, lora_Bs, scalings, biases
        rest = lora_linears(x, *(v[KERNEL_GROUP:] for v in lists), dropout_p=p, backend=backend)
        return (*lora_linears(x, *(v[:KERNEL_GROUP] for v in lists), dropout_p=p, backend=backend), *rest)
    mask, seed = draw_masks(x, len(weights), p, triton)
    constants = [float(scaling) for scaling in scalings], mask, seed, p, triton
    if is_observed() and not is_packed(weights):
        op = torch.ops.lora_fast.linears_forward
        biases = [x.new_empty(0) if bias is None else bias for bias in biases]
        return tuple(op(x, list(weights), biases, list(lora_As), list(lora_Bs), *constants)[: len(weights)])
    if not is_differentiated():
        return tuple(_linears_forward(x, weights, biases, lora_As, lora_Bs, *constants)[: len(weights)])
    return _LinearsFunction.apply((tuple(weights), *constants), x, *biases, *lora_As, *lora_Bs)


def lora_update(
    x: Tensor,
    base: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """The low-rank update on top of a base layer that runs by itself (quantized, offloaded): y = base + scaling ·
    drop(x) Aᵀ Bᵀ.

    x (..., K), base (..., N), lora_A (R, K), lora_B (N, R) → y like base; the products run in x's dtype (autocast's
    where it is on).
    Raises LoraFastError for sizes that do not fit."""
    check_backend(backend)
    if x.dim() < 1 or x.shape[:-1] != base.shape[:-1]:
        raise LoraFastError(f"x is {tuple(x.shape)}, base is {tuple(base.shape)}; all sizes but the last must be equal")
    check_factors(x, lora_A, lora_B, base.shape[-1], dropout_p)
    check_devices(x=x, base=base, lora_A=lora_A, lora_B=lora_B)
    x = compute_input(x, None)
    p = dropout_p if training else 0.0
    if is_transformed():
        a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
        update = torch.nn.functional.dropout(x, p, True) @ a.t() @ b.t()
        return torch.add(base, update, alpha=scaling).to(base.dtype)
    triton = runs_triton(backend, "lora_update", x, lora_A.shape[0])
    mask, seed = draw_masks(x, 1, p, triton)
    inputs = x, base, lora_A, lora_B, float(scaling), mask, seed, p, triton
    if is_observed():
        return torch.ops.lora_fast.update_forward(*inputs)[0]
    return _UpdateFunction.apply(*inputs) if is_differentiated() else _update_forward(*inputs)[0]
