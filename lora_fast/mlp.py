"""lora_swiglu_mlp: a whole SwiGLU MLP with LoRA on its three layers as one op, the adapters' work inside the SwiGLU.

    g = gate(x), u = up(x), h = silu(g) ∘ u, y = down(h),  each layer x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ

What the adapters need of (M, I) matrices is computed where the SwiGLU reads and writes them anyway: S of the down
projection in the forward pass, dA of the down projection and dB of gate and up in the backward pass. h is computed
again in the backward pass instead of being kept, so that g and u are all that is saved of that size."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lora_fast.backend import check_backend, runs_triton
from lora_fast.config import LoraFastError
from lora_fast.dispatch import (
    bias_or_none,
    casts_to_keep,
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
from lora_fast.ops import lora_linear, lora_linears, plain_update

# weights, biases (empty where there is none), lora_As, lora_Bs, scalings: of gate, up and down, in this order. seeds:
# two numbers, for the masks of x and for the mask of h; with them the op draws the masks and returns them last.
library.define(
    "swiglu_mlp_forward(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] lora_As, Tensor[] lora_Bs, "
    "float[] scalings, Tensor? mask, Tensor? mask_h, Tensor? seeds, float dropout_p, bool triton) -> Tensor[]"
)
library.define(
    "swiglu_mlp_backward(Tensor dy, Tensor x, Tensor g, Tensor u, Tensor[] weights, Tensor[] lora_As, "
    "Tensor[] lora_Bs, Tensor s, Tensor s_down, Tensor? mask, Tensor? mask_h, float[] scalings, float dropout_p, "
    "bool needs_dx, bool needs_factors, bool triton) -> Tensor[]"
)


def _cast(steps, lora_As, lora_Bs, scales, dtype):
    """(a, (b_gate, b_up)) of gate and up, which read one x, and (a_down, (b_down,)): in one launch."""
    parts = slice(0, 2), slice(2, 3)
    return steps.cast_factors([(lora_As[part], lora_Bs[part], scales[part]) for part in parts], dtype)


@on_own_device
def _forward(x, weights, biases, lora_As, lora_Bs, scalings, mask, mask_h, seeds, dropout_p, triton, casts=None):
    """[y, g, u, S of gate and up (M, ΣR), S of down (M, R), and the masks if they were drawn here]. casts: a list for
    the adapters as cast."""
    steps, rows, ranks, scales = steps_for(triton), flatten(x), ranks_of(lora_As), scales_of(scalings, dropout_p)
    biases = list(map(bias_or_none, biases))
    (a, bs), (a_down, (b_down,)) = _cast(steps, lora_As, lora_Bs, scales, x.dtype)
    if casts is not None:
        casts += a, *bs, a_down, b_down
    seed = None if seeds is None else seeds[:1]
    s, mask = shrink_or_draw(steps, rows, a, ranks[:2], mask, seed, dropout_p)
    s_gate, s_up = s.split_with_sizes(ranks[:2], 1)
    g = steps.linear_lora(rows, unpacked(weights[0]), s_gate, bs[0], biases[0])
    u = steps.linear_lora(rows, unpacked(weights[1]), s_up, bs[1], biases[1])
    if seeds is None:
        h, s_down = steps.swiglu_shrink(g, u, a_down, mask_h)
    else:
        h, s_down, mask_h = steps.swiglu_shrink_and_draw(g, u, a_down, seeds[1:], dropout_p)
    y = steps.linear_lora(h, unpacked(weights[2]), s_down, b_down, biases[2])
    y = reshaped(y, (*x.shape[:-1], weights[2].shape[0]))
    return [y, g, u, s, s_down] if seeds is None else [y, g, u, s, s_down, mask, mask_h]


@on_own_device
def _backward(
    dy, x, g, u, weights, lora_As, lora_Bs, s, s_down, mask, mask_h, scalings, dropout_p, needs_dx, needs_factors,
    triton, casts=(),
):  # fmt: skip
    """[dx, then dA and dB of gate, up and down], empty where not needed. casts: of forward, or nothing."""
    steps, rows, ranks, scales = steps_for(triton), flatten(x), ranks_of(lora_As), scales_of(scalings, dropout_p)
    dy = in_dtype(flatten(dy), x.dtype)
    if casts:
        a, *bs, a_down, b_down = casts
    else:
        (a, bs), (a_down, (b_down,)) = _cast(steps, lora_As, lora_Bs, scales, x.dtype)
    ds_down, (dB_down,) = steps.grad_s_and_b([dy], [b_down], [s_down], scales[2:])
    dh, _ = steps.grad_x_and_a([dy], [unpacked(weights[2])], ds_down, a_down, g, ranks[2:], mask_h, needs_dA=False)
    s_gate, s_up = s.split_with_sizes(ranks[:2], 1)
    dg, du, dA_down, dB_gate, dB_up = steps.swiglu_backward(
        dh, g, u, ds_down, s_gate, s_up, scales[0], scales[1], mask_h
    )
    ds, _ = steps.grad_s_and_b([dg, du], bs, None, scales)
    weights = [unpacked(weight) if needs_dx else None for weight in weights[:2]]
    dx, dAs = steps.grad_x_and_a([dg, du], weights, ds, a, rows, ranks[:2], mask, needs_dx, needs_factors)
    dx = dx.view(x.shape) if needs_dx else x.new_empty(0)
    if not needs_factors:
        return [dx, *(x.new_empty(0) for _ in range(6))]
    dAs = [owned(dA, lora_A.dtype) for dA, lora_A in zip((*dAs, dA_down), lora_As)]
    return [dx, *dAs, *[in_dtype(dB, b.dtype) for dB, b in zip((dB_gate, dB_up, dB_down), lora_Bs)]]


implement("swiglu_mlp_forward", _forward)
implement("swiglu_mlp_backward", _backward)


@torch.library.register_fake("lora_fast::swiglu_mlp_forward", lib=library)
def _(x, weights, biases, lora_As, lora_Bs, scalings, mask, mask_h, seeds, dropout_p, triton):
    M, ranks, intermediate = row_count(x.shape), ranks_of(lora_As), weights[0].shape[0]
    g, u = x.new_empty(M, intermediate), x.new_empty(M, intermediate)
    y = x.new_empty(*x.shape[:-1], weights[2].shape[0])
    outputs = [y, g, u, x.new_empty(M, ranks[0] + ranks[1]), x.new_empty(M, ranks[2])]
    return outputs if seeds is None else [*outputs, fake_mask(x, 2), fake_mask(g, 1)]


@torch.library.register_fake("lora_fast::swiglu_mlp_backward", lib=library)
def _(
    dy, x, g, u, weights, lora_As, lora_Bs, s, s_down, mask, mask_h, scalings, dropout_p, needs_dx, needs_factors,
    triton,
):  # fmt: skip
    factors = [f.new_empty(f.shape) if needs_factors else x.new_empty(0) for f in (*lora_As, *lora_Bs)]
    return [x.new_empty(x.shape if needs_dx else 0), *factors]


def _plain(x, weights, biases, lora_As, lora_Bs, scalings, mask, mask_h, dropout_p):
    """y (M, N) in steps that autograd can follow."""

    def linear(rows, i, m):
        bias = bias_or_none(biases[i])
        y = torch.nn.functional.linear(
            rows, unpacked(weights[i]).to(x.dtype), None if bias is None else bias.to(x.dtype)
        )
        return y + plain_update(rows, lora_As[i], lora_Bs[i], scalings[i], m, dropout_p)

    rows = flatten(x)
    g, u = (linear(rows, i, None if mask is None else mask[i]) for i in range(2))
    return linear(torch.nn.functional.silu(g) * u, 2, None if mask_h is None else mask_h[0])


def _setup(ctx, inputs, output, casts=()) -> None:
    x, weights, biases, lora_As, lora_Bs, ctx.scalings, mask, mask_h, seeds, ctx.dropout_p, ctx.triton = inputs
    if seeds is not None:
        mask, mask_h = output[5:]
    _, g, u, s, s_down = output[:5]
    ctx.packed = weights if is_packed(weights) else None
    factors = *lora_As, *lora_Bs, *casts
    ctx.save_for_backward(x, g, u, s, s_down, mask, mask_h, *tensors_among(weights), *biases, *factors)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, needs_dx: bool, needs_factors: Sequence[bool]) -> tuple[Tensor | None, list[Tensor | None]]:
    """(dx, [dA of gate, up and down, dB of gate, up and down]); needs_factors: a flag per factor."""
    x, g, u, s, s_down, mask, mask_h, *rest = ctx.saved_tensors
    weights, biases, lora_As, lora_Bs = (rest[3 * i : 3 * i + 3] for i in range(4))
    weights, casts = ctx.packed or weights, rest[12:]
    if torch.is_grad_enabled() or is_batched(dy):  # autograd's own gradients of the formula can be differentiated
        with torch.enable_grad():
            lora_As, lora_Bs = ([f.view_as(f) for f in factors] for factors in (lora_As, lora_Bs))  # may be one twice
            y = _plain(x, weights, biases, lora_As, lora_Bs, ctx.scalings, mask, mask_h, ctx.dropout_p)
        inputs = [t for t, needed in zip((x, *lora_As, *lora_Bs), (needs_dx, *needs_factors)) if needed]
        found = iter(torch.autograd.grad(y, inputs, flatten(dy).to(x.dtype), create_graph=True))
        return next(found) if needs_dx else None, [next(found) if needed else None for needed in needs_factors]
    as_op = is_observed() and ctx.packed is None
    saved = g, u, weights, lora_As, lora_Bs, s, s_down, mask, mask_h
    inputs = dy, x, *saved, ctx.scalings, ctx.dropout_p, needs_dx, any(needs_factors), ctx.triton
    dx, *factors = torch.ops.lora_fast.swiglu_mlp_backward(*inputs) if as_op else _backward(*inputs, casts)
    return dx if needs_dx else None, [f if needed else None for f, needed in zip(factors, needs_factors)]


def _backward_registered(ctx, grads):
    needs_dx, _, _, needs_dA, needs_dB, *_ = ctx.needs_input_grad
    needs = (*needs_dA, *needs_dB)
    dx, factors = (None, [None] * 6) if grads[0] is None else _gradients(ctx, grads[0], needs_dx, needs)
    return dx, [None] * 3, [None] * 3, factors[:3], factors[3:], None, None, None, None, None, None


torch.library.register_autograd(
    "lora_fast::swiglu_mlp_forward", _backward_registered, setup_context=_setup, lib=library
)


class _Function(torch.autograd.Function):
    """swiglu_mlp_forward with its autograd formula, without the dispatcher; only tensors of the top level count, and
    each argument takes its time, so that what has no gradient comes as one."""

    @staticmethod
    def forward(ctx, constants, x, *factors):
        weights, biases, *rest = constants
        inputs = x, weights, biases, factors[:3], factors[3:], *rest
        casts: list[Tensor] = []
        output = _forward(*inputs, casts)
        _setup(ctx, inputs, output, casts_to_keep(casts, [x, *output[1:3]], rest[-1]))
        return output[0]

    @staticmethod
    def backward(ctx, dy):
        _, needs_dx, *needs = ctx.needs_input_grad
        dx, factors = (None, [None] * 6) if dy is None else _gradients(ctx, dy, needs_dx, needs)
        return None, dx, *factors


@register_flop_formula(torch.ops.lora_fast.swiglu_mlp_forward)
def _forward_flops(x, weights, biases, lora_As, *args, **kwargs) -> int:
    return 2 * row_count(x) * sum(n * k + a[0] * (n + k) for (n, k), a in zip(weights, lora_As))


@register_flop_formula(torch.ops.lora_fast.swiglu_mlp_backward)
def _backward_flops(
    dy, x, g, u, weights, lora_As, lora_Bs, s, s_down, mask, mask_h, scalings, p, needs_dx, needs_factors, triton,
    **kwargs,
) -> int:  # fmt: skip
    gate, up, down = ((n, k, a[0]) for (n, k), a in zip(weights, lora_As))
    total = down[0] * down[1] + 2 * down[2] * (down[0] + down[1])  # dh, dS, dB, dA
    for n, k, rank in (gate, up):
        total += 2 * rank * n + needs_dx * (n * k + rank * k) + needs_factors * rank * k
    return 2 * row_count(x) * total


def lora_swiglu_mlp(
    x: Tensor,
    gate: Sequence,
    up: Sequence,
    down: Sequence,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """A SwiGLU MLP with LoRA on each layer: y = down(silu(gate(x)) ∘ up(x)), each layer x Wᵀ + bias + scaling · drop(x)
    Aᵀ Bᵀ with a dropout mask of its own.

    gate, up, down: (weight, lora_A, lora_B, scaling) or (…, bias), with weight (I, K) for gate and up and (N, I) for
    down, lora_A (R, in_features), lora_B (out_features, R). x (..., K) → y (..., N) in x's dtype (autocast's where it
    is on). Weights and biases are frozen: where one requires a gradient, the layers run one after another.
    Kept for backward: x, g and u (M, I), three S (M, R), and the masks in bits; on the Triton kernels maybe the
    adapters in x's dtype too, where they have at most 1/48 of the elements of x, g and u.
    Raises LoraFastError for sizes, dtypes or devices that do not fit. Sources: arXiv:2106.09685, arXiv:2002.05202."""
    check_backend(backend)
    layers = []
    for name, layer in (("gate", gate), ("up", up), ("down", down)):
        if len(layer) not in (4, 5):
            raise LoraFastError(f"{name} has {len(layer)} parts; expected (weight, lora_A, lora_B, scaling[, bias])")
        layers.append((*layer, None) if len(layer) == 4 else tuple(layer))
    weights, lora_As, lora_Bs, scalings, biases = (list(column) for column in zip(*layers))
    for i, name in enumerate(("gate", "up", "down, on gate's and up's result")):
        taken = x if i < 2 else x.new_empty(1).expand(1, weights[0].shape[0])  # its sizes
        try:
            check_linear(taken, weights[i], lora_As[i], lora_Bs[i], biases[i], dropout_p)
        except LoraFastError as error:
            raise LoraFastError(f"{name}: {error}") from None
    if weights[0].shape != weights[1].shape:
        raise LoraFastError(f"gate is {tuple(weights[0].shape)}, up is {tuple(weights[1].shape)}; expected one shape")
    check_one_dtype(weights)
    x = compute_input(x, weights[0].dtype)
    p = dropout_p if training else 0.0
    trained = any(t is not None and t.requires_grad for t in (*weights, *biases)) and torch.is_grad_enabled()
    if is_transformed() or trained:
        options = {"dropout_p": p, "backend": backend}
        g, u = lora_linears(x, weights[:2], lora_As[:2], lora_Bs[:2], scalings[:2], biases[:2], **options)
        h = torch.nn.functional.silu(g) * u
        return lora_linear(h, weights[2], lora_As[2], lora_Bs[2], scalings[2], biases[2], **options)
    triton = runs_triton(backend, "lora_swiglu_mlp", x, max(ranks_of(lora_As)))
    mask = mask_h = seeds = None
    if p and triton:
        seeds = torch.randint(0, 2**63 - 1, (2,), device=x.device)
    elif p:
        mask, _ = draw_masks(x, 2, p, False)
        mask_h, _ = draw_masks(x.new_empty(*x.shape[:-1], weights[0].shape[0]), 1, p, False)
    constants = [float(scaling) for scaling in scalings], mask, mask_h, seeds, p, triton
    if is_observed() and not is_packed(weights):
        biases = [x.new_empty(0) if bias is None else bias for bias in biases]
        return torch.ops.lora_fast.swiglu_mlp_forward(x, weights, biases, lora_As, lora_Bs, *constants)[0]
    if not is_differentiated():
        return _forward(x, weights, biases, lora_As, lora_Bs, *constants)[0]
    return _Function.apply((weights, biases, *constants), x, *lora_As, *lora_Bs)
