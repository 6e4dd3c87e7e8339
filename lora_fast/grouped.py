"""lora_grouped_linear: one linear layer whose rows belong to different adapters, of different ranks, or to none.

    y_i = x_i Wᵀ + bias + scaling_g · drop(x_i) A_gᵀ B_gᵀ    for each row i of adapter g

as one op, whatever the number of adapters: kernels/grouped.py, or in PyTorch a loop over the segments of rows."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lora_fast import tuning
from lora_fast.backend import check_backend, runs_triton
from lora_fast.config import LoraFastError
from lora_fast.dispatch import (
    check_linear,
    compute_input,
    draw_masks,
    fake_mask,
    flatten,
    implement,
    is_batched,
    is_differentiated,
    is_observed,
    is_transformed,
    library,
    on_own_device,
    ranks_of,
    reshaped,
    row_count,
    scales_of,
)
from lora_fast.kernels import reference

# segments: first row, end and adapter of each, one after another, checked by the op itself, which sees numbers where a
# compiler sees symbols. SymInt: a compiled graph then serves as many other segments. Without a weight the op is the
# update alone. With `seed` the op draws the mask and returns it last. Tagged so that a compiler leaves the ops out of
# its CUDA graphs: the table of a batch that they see for the first time is copied from the host.
library.define(
    "grouped_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor[] lora_As, Tensor[] lora_Bs, float[] scalings, "
    "SymInt[] segments, Tensor? mask, Tensor? seed, float dropout_p, bool triton) -> Tensor[]",
    tags=(torch.Tag.cudagraph_unsafe,),
)
library.define(
    "grouped_backward(Tensor dy, Tensor x, Tensor? weight, Tensor[] lora_As, Tensor[] lora_Bs, Tensor s, Tensor? mask, "
    "float[] scalings, SymInt[] segments, float dropout_p, bool needs_dx, bool needs_dA, bool needs_dB, bool triton) "
    "-> Tensor[]",
    tags=(torch.Tag.cudagraph_unsafe,),
)


# --- Segments ---------------------------------------------------------------------------------------------------------


def _flat(segments: Sequence[Sequence[int]]) -> tuple[int, ...]:
    for number, segment in enumerate(segments):
        triple = isinstance(segment, (tuple, list)) and len(segment) == 3
        if not triple or not all(isinstance(value, int) for value in segment):
            raise LoraFastError(
                f"segments[{number}] is {segment!r}; expected (first row, end, adapter or -1), three ints in a tuple"
            )
    return tuple(value for segment in segments for value in segment)


# Every layer of a model asks about the same batch. 64 batches are more than a training loop has under way.
@lru_cache(maxsize=64)
def _cached_spans(flat: tuple[int, ...], rows: int, adapters: int) -> tuple[int, ...]:
    """Checked, sorted, without those that have no row or no adapter, neighbours of one adapter joined."""
    segments = _triples(flat)
    for number, (start, end, adapter) in enumerate(segments):
        if not 0 <= start <= end <= rows:
            raise LoraFastError(
                f"segments[{number}] is {(start, end, adapter)}, x has M={rows} rows; expected 0 <= first row <= end "
                "<= M"
            )
        if not -1 <= adapter < adapters:
            raise LoraFastError(
                f"segments[{number}] is {(start, end, adapter)}, lora_As has {adapters} adapters; expected an "
                f"adapter below {adapters}, or -1 for none"
            )
    merged: list[tuple[int, int, int]] = []
    before = (0, 0, -1)
    for start, end, adapter in sorted(segment for segment in segments if segment[0] < segment[1]):
        if start < before[1]:
            raise LoraFastError(f"segments {before} and {(start, end, adapter)} share rows; expected disjoint ones")
        before = start, end, adapter
        if adapter < 0:
            continue
        if merged and merged[-1][1] == start and merged[-1][2] == adapter:
            start = merged.pop()[0]
        merged.append((start, end, adapter))
    return tuple(value for segment in merged for value in segment)


def _spans(segments: Sequence[int], rows: int, adapters: int) -> tuple[int, ...]:
    return _cached_spans(tuple(segments), rows, adapters)


def _triples(flat: Sequence[int]) -> list[tuple[int, int, int]]:
    return list(zip(*[iter(flat)] * 3))


# --- The op in PyTorch and on the kernels -----------------------------------------------------------------------------


class _Copies:
    """What was copied to a device, by what it was made from: the last KEPT of them, and all that a CUDA graph reads.

    A graph reads the same memory at every replay, and nothing tells when it has gone: what was found inside a capture
    is kept as long as the process. Nothing can be copied there: what was not made before is refused."""

    KEPT = 64  # as many as batches above

    def __init__(self, what: str, make: Callable[..., Any]):
        self.what, self.make = what, make
        self.recent: dict[tuple, Any] = {}  # the most recently used last
        self.captured: dict[tuple, Any] = {}
        self.lock = Lock()

    def get(self, *key, device: torch.device) -> Any:
        """make(*key, device), or what it made before."""
        key = (*key, device)
        with self.lock:
            found = self.captured.get(key)
            if found is None:
                found = self.recent.pop(key, None)
            if _is_captured(device):
                if found is None:
                    raise LoraFastError(
                        f"a CUDA graph is being captured, in which {self.what} can't be copied to the GPU; call "
                        "lora_grouped_linear once before the capture, forward and backward, with the same segments, "
                        "ranks, scalings and dropout"
                    )
                self.captured[key] = found
            elif found is None:
                found = self.make(*key)
            if key not in self.captured:
                self.recent[key] = found
                if len(self.recent) > self.KEPT:
                    del self.recent[next(iter(self.recent))]
        return found


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _make_table(flat: tuple[int, ...], ranks: tuple[int, ...], rows: int, device: torch.device):
    return import_module("lora_fast.kernels.grouped").block_table(_triples(flat), ranks, rows, device)


def _make_scales(scales: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(scales, dtype=torch.float32, device=device)


_tables = _Copies("the table of these segments", _make_table)
_scales = _Copies("the scalings", _make_scales)


def _kernels_and_table(x: Tensor, segments, ranks: Sequence[int]):
    """The kernels, and the table of these segments: copied to the device once a batch, for all layers."""
    table = _tables.get(tuple(segments), tuple(ranks), x.shape[0], device=x.device)
    return import_module("lora_fast.kernels.grouped"), table


def _sizes(x: Tensor, weight: Tensor, w: Tensor, table, **others) -> dict:
    """What the choice of a route depends on, for x (M, K or N) times w: weight (N, K) or its transpose."""
    # block_rows stands for the lengths of the segments, on which the choice depends most: each block reads all of W.
    N, K = weight.shape
    sizes = {"M": x.shape[0], "N": N, "K": K, "R": table.width, "rows": table.block_rows, "dtype": x.dtype, **others}
    return sizes | import_module("lora_fast.fused").layout([x], [weight], [w])


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.numel() == 0 else x.contiguous()


def _triton_forward(x, weight, bias, lora_As, lora_Bs, scales, segments, mask, seed, dropout_p):
    """y (M, N), S (M, width), mask."""
    kernels, table = _kernels_and_table(x, segments, ranks_of(lora_As))
    x = _contiguous_rows(x)
    a_all, b_all = kernels.stack_factors(lora_As, lora_Bs, scales, x.dtype)
    if mask is None:
        s, mask = kernels.grouped_shrink(x, a_all, table, seed=seed, dropout_p=dropout_p)
    else:  # only where a mask comes from outside: the kernel draws its own
        s = reference.grouped_shrink(x, a_all.split(ranks_of(lora_As)), _triples(segments), mask)
    if weight is None:
        return kernels.grouped_expand(None, s, b_all, table), s, mask
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype).contiguous()

    def cublas() -> Tensor:
        y = torch.nn.functional.linear(x, weight, bias)
        return kernels.grouped_expand(y, s, b_all, table, out=y)

    routes = {"cublas": cublas, "triton": lambda: kernels.grouped_gemm(x, weight, s, b_all, table, bias=bias)}
    sizes = _sizes(x, weight, weight.t(), table, bias=bias is not None)
    return tuning.run("grouped_linear", sizes, x.device, routes), s, mask


def _triton_backward(
    dy, x, weight, lora_As, lora_Bs, s, mask, scales, segments, needs_dx, needs_dA, needs_dB
) -> tuple[Tensor | None, list[Tensor] | None, list[Tensor] | None]:
    """dx, every dA, every dB; None where not needed."""
    kernels, table = _kernels_and_table(x, segments, ranks_of(lora_As))
    x, dy = _contiguous_rows(x), _contiguous_rows(dy)
    dx = dAs = dBs = None
    if needs_dx or needs_dA:
        a_all, b_all = kernels.stack_factors(lora_As, lora_Bs, scales, x.dtype)
        ds = kernels.grouped_grad_s(dy, b_all, table)
    if needs_dx and weight is None:
        dx = kernels.grouped_grad_x(ds, a_all, table, mask=mask)
    elif needs_dx:
        weight = weight.to(dy.dtype)

        def cublas() -> Tensor:
            dx = dy @ weight
            return kernels.grouped_grad_x(ds, a_all, table, mask=mask, accumulate=dx, out=dx)

        def fused() -> Tensor:
            return kernels.grouped_gemm(dy, weight.t(), ds, a_all.t(), table, mask=mask)

        sizes = _sizes(dy, weight, weight, table, masks=int(mask is not None))
        dx = tuning.run("grouped_grad_x", sizes, dy.device, {"cublas": cublas, "triton": fused})
    if needs_dA:
        dAs = _split(kernels.grouped_grad_a(ds, x, table, mask=mask), lora_As, 0)
    if needs_dB:
        scale_tensor = _scales.get(tuple(scales), device=x.device)
        dBs = _split(kernels.grouped_grad_b(dy, s, table, scale_tensor), lora_Bs, 1)
    return dx, dAs, dBs


def _split(grads: Tensor, factors: Sequence[Tensor], dim: int) -> list[Tensor]:
    """The parts of `grads`, each like its factor and with memory of its own, in one launch where factors are fp32."""
    parts, sizes = [grads.new_empty(factor.shape) for factor in factors], [factor.shape[dim] for factor in factors]
    if _is_captured(grads.device):  # split_with_sizes_copy copies its addresses from memory that a replay finds reused
        torch._foreach_copy_(parts, grads.split(sizes, dim))
    else:
        torch.split_with_sizes_copy(grads, sizes, dim, out=parts)
    return [part.to(factor.dtype) for part, factor in zip(parts, factors)]


def _cast_factors(lora_As, lora_Bs, scales, dtype) -> tuple[list[Tensor], list[Tensor]]:
    pairs = reference.cast_factors([([a], [b], [scale]) for a, b, scale in zip(lora_As, lora_Bs, scales)], dtype)
    return [a for a, _ in pairs], [b for _, (b,) in pairs]


def _torch_forward(x, weight, bias, lora_As, lora_Bs, scales, segments, mask, seed, dropout_p):
    as_, bs = _cast_factors(lora_As, lora_Bs, scales, x.dtype)
    s = reference.grouped_shrink(x, as_, _triples(segments), mask)
    return reference.grouped_linear_lora(x, weight, s, bs, _triples(segments), bias), s, mask


def _torch_backward(dy, x, weight, lora_As, lora_Bs, s, mask, scales, segments, needs_dx, needs_dA, needs_dB):
    ranks, segments = ranks_of(lora_As), _triples(segments)
    as_, bs = _cast_factors(lora_As, lora_Bs, scales, x.dtype)
    dx = dAs = dBs = None
    if needs_dx or needs_dA:
        ds = reference.grouped_grad_s(dy, bs, segments)
    if needs_dx:
        dx = reference.grouped_grad_x(dy, weight, ds, as_, segments, mask)
    if needs_dA:
        dAs = [dA.to(a.dtype) for dA, a in zip(reference.grouped_grad_a(ds, x, ranks, segments, mask), lora_As)]
    if needs_dB:
        dBs = [dB.to(b.dtype) for dB, b in zip(reference.grouped_grad_b(dy, s, ranks, scales, segments), lora_Bs)]
    return dx, dAs, dBs


# --- The op as PyTorch sees it ----------------------------------------------------------------------------------------


@on_own_device
def _forward(x, weight, bias, lora_As, lora_Bs, scalings, segments, mask, seed, dropout_p, triton):
    """[y, S (M, width), and the mask if it was drawn here]."""
    forward, scales = _triton_forward if triton else _torch_forward, scales_of(scalings, dropout_p)
    segments = _spans(segments, row_count(x.shape), len(lora_As))
    y, s, mask = forward(flatten(x), weight, bias, lora_As, lora_Bs, scales, segments, mask, seed, dropout_p)
    y = reshaped(y, (*x.shape[:-1], y.shape[-1]))
    return [y, s] if seed is None else [y, s, mask]


@on_own_device
def _backward(
    dy, x, weight, lora_As, lora_Bs, s, mask, scalings, segments, dropout_p, needs_dx, needs_dA, needs_dB, triton
):
    """[dx, every dA, every dB], empty where not needed."""
    backward, scales = _triton_backward if triton else _torch_backward, scales_of(scalings, dropout_p)
    dy, needs = flatten(dy).to(x.dtype), (needs_dx, needs_dA, needs_dB)
    segments = _spans(segments, dy.shape[0], len(lora_As))
    dx, dAs, dBs = backward(dy, flatten(x), weight, lora_As, lora_Bs, s, mask, scales, segments, *needs)
    nothing = lambda: [x.new_empty(0) for _ in lora_As]  # noqa: E731 - twice in the next line
    return [x.new_empty(0) if dx is None else dx.view(x.shape), *(dAs or nothing()), *(dBs or nothing())]


implement("grouped_forward", _forward)
implement("grouped_backward", _backward)


@torch.library.register_fake("lora_fast::grouped_forward", lib=library)
def _(x, weight, bias, lora_As, lora_Bs, scalings, segments, mask, seed, dropout_p, triton):
    y = x.new_empty(*x.shape[:-1], lora_Bs[0].shape[0])
    s = x.new_empty(row_count(x.shape), reference.grouped_width(ranks_of(lora_As)))
    return [y, s] if seed is None else [y, s, fake_mask(x, 1)]


@torch.library.register_fake("lora_fast::grouped_backward", lib=library)
def _(dy, x, weight, lora_As, lora_Bs, s, mask, scalings, segments, dropout_p, needs_dx, needs_dA, needs_dB, triton):
    needed = [(factor, needs_dA) for factor in lora_As] + [(factor, needs_dB) for factor in lora_Bs]
    return [x.new_empty(x.shape if needs_dx else 0), *(f.new_empty(f.shape if needs else 0) for f, needs in needed)]


def _plain_update(dropped: Tensor, lora_As, lora_Bs, scales, segments) -> Tensor:
    """s'_g · dropped_i A_gᵀ B_gᵀ (M, N) in steps that autograd and torch.func can follow."""
    pieces, end_before = [], 0
    spans = _spans(segments, dropped.shape[0], len(lora_As))
    for start, end, g in [*_triples(spans), (dropped.shape[0], dropped.shape[0], -1)]:
        pieces.append(dropped.new_zeros(start - end_before, lora_Bs[0].shape[0]))
        if g >= 0:
            a, b = lora_As[g].to(dropped.dtype), lora_Bs[g].to(dropped.dtype)
            pieces.append((dropped[start:end] @ a.t() @ b.t()) * scales[g])
        end_before = end
    return torch.cat(pieces)


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, lora_As, lora_Bs, ctx.scalings, ctx.segments, mask, seed, ctx.dropout_p, ctx.triton = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, output[1], mask if seed is None else output[2], *lora_As, *lora_Bs)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, needs_dx, needs_dbias, needs_dA, needs_dB):
    """(dx, dbias, dAs, dBs); needs_dA, needs_dB: a flag per adapter."""
    x, weight, s, mask, *factors = ctx.saved_tensors
    count = len(ctx.scalings)
    lora_As, lora_Bs = factors[:count], factors[count:]
    if dy is None:
        return None, None, [None] * count, [None] * count
    if torch.is_grad_enabled() or is_batched(dy):  # autograd's own gradients of the formula can be differentiated
        with torch.enable_grad():
            factors = [f.view_as(f) for f in factors]  # one may serve two adapters
            dropped = flatten(x) if mask is None else flatten(x) * reference.unpack_mask(mask[0], flatten(x))
            scales = scales_of(ctx.scalings, ctx.dropout_p)
            y = _plain_update(dropped, factors[:count], factors[count:], scales, ctx.segments)
            if weight is not None:
                y = y + flatten(x) @ weight.to(x.dtype).t()
        inputs = [t for t, needed in zip((x, *factors), (needs_dx, *needs_dA, *needs_dB)) if needed]
        if y.requires_grad:
            found = torch.autograd.grad(y, inputs, flatten(dy).to(x.dtype), create_graph=True, materialize_grads=True)
        else:  # bias alone is trained, or adapters without rows
            found = map(torch.zeros_like, inputs)
        found = iter(found)
        dx = next(found) if needs_dx else None
        dAs, dBs = ([next(found) if needed else None for needed in needs] for needs in (needs_dA, needs_dB))
    else:
        backward = torch.ops.lora_fast.grouped_backward if is_observed() else _backward
        saved = x, weight, lora_As, lora_Bs, s, mask, ctx.scalings, ctx.segments, ctx.dropout_p
        dx, *rest = backward(dy, *saved, needs_dx, any(needs_dA), any(needs_dB), ctx.triton)
        dx = dx if needs_dx else None
        dAs = [dA if needed else None for dA, needed in zip(rest[:count], needs_dA)]
        dBs = [dB if needed else None for dB, needed in zip(rest[count:], needs_dB)]
    return dx, flatten(dy).sum(0).to(ctx.bias_dtype) if needs_dbias else None, dAs, dBs


def _backward_registered(ctx, grads):
    needs_dx, _, needs_dbias, needs_dA, needs_dB, *_ = ctx.needs_input_grad
    dx, dbias, dAs, dBs = _gradients(ctx, grads[0], needs_dx, needs_dbias, needs_dA, needs_dB)
    return dx, None, dbias, dAs, dBs, None, None, None, None, None, None


torch.library.register_autograd("lora_fast::grouped_forward", _backward_registered, setup_context=_setup, lib=library)


class _Function(torch.autograd.Function):
    """grouped_forward with its autograd formula, without the dispatcher; only tensors of the top level count."""

    @staticmethod
    def forward(ctx, scalings, segments, mask, seed, dropout_p, triton, x, weight, bias, *factors):
        lora_As, lora_Bs = factors[: len(scalings)], factors[len(scalings) :]
        inputs = x, weight, bias, lora_As, lora_Bs, scalings, segments, mask, seed, dropout_p, triton
        output = _forward(*inputs)
        _setup(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, dy):
        needs_dx, _, needs_dbias, *needs = ctx.needs_input_grad[6:]
        count = len(ctx.scalings)
        dx, dbias, dAs, dBs = _gradients(ctx, dy, needs_dx, needs_dbias, needs[:count], needs[count:])
        return (*((None,) * 6), dx, None, dbias, *dAs, *dBs)


def _adapter_flops(lora_As, lora_Bs, segments, n_times: int, k_times: int) -> int:
    """2 · rows · R · (n_times N + k_times K), summed over the segments."""
    return sum(
        2 * (end - start) * lora_As[g][0] * (n_times * lora_Bs[g][0] + k_times * lora_As[g][1])
        for start, end, g in _triples(segments)
        if g >= 0
    )


@register_flop_formula(torch.ops.lora_fast.grouped_forward)
def _forward_flops(x, weight, bias, lora_As, lora_Bs, scalings, segments, *args, **kwargs) -> int:
    base = 0 if weight is None else 2 * row_count(x) * weight[0] * weight[1]
    return base + _adapter_flops(lora_As, lora_Bs, segments, 1, 1)


@register_flop_formula(torch.ops.lora_fast.grouped_backward)
def _backward_flops(
    dy, x, weight, lora_As, lora_Bs, s, mask, scalings, segments, p, needs_dx, needs_dA, needs_dB, *args, **kwargs
) -> int:
    base = 0 if weight is None or not needs_dx else 2 * row_count(x) * weight[0] * weight[1]
    return base + _adapter_flops(lora_As, lora_Bs, segments, needs_dB + (needs_dx or needs_dA), needs_dA + needs_dx)


def lora_grouped_linear(
    x: Tensor,
    weight: Tensor,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    segments: Sequence[tuple[int, int, int]],
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """A linear layer whose rows have different adapters: y_i = x_i Wᵀ + bias + scaling_g · drop(x_i) A_gᵀ B_gᵀ for the
    rows i of adapter g, and y_i = x_i Wᵀ + bias for rows without one.

    x (..., K), counted as M rows in memory order; segments: (first row, end, g), with g = −1 for none, in any order and
    disjoint, several per adapter or none; rows outside them have no adapter. lora_A_g (R_g, K), lora_B_g (N, R_g) of
    any ranks, fp32 masters allowed; weight (N, K), bias (N,) → y (..., N) in x's dtype (autocast's where it is on). The
    values are those of `lora_linear` on the rows of each adapter; an adapter without rows gets gradients of zero.
    `weight` is frozen: where it requires a gradient, the base product is left to torch and only the update is ours.
    Kept for backward: x, S (M, largest rank rounded up to 16) and, with dropout, one bit per element of x. The kernels
    get a table of the segments, made once a batch for all layers whose adapters have the same ranks, and copied to the
    GPU. That copy can't be part of a CUDA graph: before a capture run the step once as it will be captured (forward,
    backward, training or not), with the same segments, ranks and scalings. A replay then keeps to those segments, and
    the table of a captured batch, 4 bytes a row and 16 a block of rows, is kept as long as the process. torch.compile
    leaves the op out of the CUDA graphs that it makes.
    Raises LoraFastError for segments, sizes, dtypes or devices that do not fit, a backend that can't run, or a capture
    without that first run."""
    check_backend(backend)
    if not len(lora_As) == len(lora_Bs) == len(scalings):
        raise LoraFastError(
            f"{len(lora_As)} lora_As, {len(lora_Bs)} lora_Bs, {len(scalings)} scalings; expected one of each per "
            "adapter"
        )
    no_adapter = weight.new_empty(0, *weight.shape[1:]), weight.new_empty(*weight.shape[:1], 0)
    for lora_A, lora_B in zip(lora_As, lora_Bs) if len(lora_As) else [no_adapter]:
        check_linear(x, weight, lora_A, lora_B, bias, dropout_p)
    segments = _flat(segments)
    x = compute_input(x, weight.dtype)
    p = dropout_p if training else 0.0
    if not len(lora_As):
        if not torch.compiler.is_compiling():
            _spans(segments, row_count(x.shape), 0)  # raises, if anything
        return torch.nn.functional.linear(x, weight, bias)
    scalings, ranks = [float(scaling) for scaling in scalings], ranks_of(lora_As)
    base = None
    if is_transformed() or (torch.is_grad_enabled() and weight.requires_grad):
        base, weight, bias = torch.nn.functional.linear(x, weight, bias), None, None
    if is_transformed():
        dropped = torch.nn.functional.dropout(flatten(x), p, True)
        update = _plain_update(dropped, lora_As, lora_Bs, scales_of(scalings, p), segments)
        return base + update.reshape(base.shape)
    triton = runs_triton(backend, "lora_grouped_linear", x, max(ranks))
    mask, seed = draw_masks(x, 1, p, triton)
    if is_observed():
        op = torch.ops.lora_fast.grouped_forward
        arguments = list(lora_As), list(lora_Bs), scalings, list(segments), mask, seed, p, triton
        y = op(x, weight, bias, *arguments)[0]
    elif not is_differentiated():
        y = _forward(x, weight, bias, lora_As, lora_Bs, scalings, segments, mask, seed, p, triton)[0]
    else:
        y = _Function.apply(scalings, segments, mask, seed, p, triton, x, weight, bias, *lora_As, *lora_Bs)
    return y if base is None else base + y
