"""DoRA: LoRA whose weight keeps its direction and gets a trained length, one for each output.

    W' = m ∘ (W + ΔW) / ‖W + ΔW‖,  ‖·‖ of each row, and a constant for the gradient          ΔW = scaling · B A
    y  = g ∘ (x Wᵀ + scaling · x Aᵀ Bᵀ) + bias,  g = m / ‖W + ΔW‖                            m (N,), g (N,)

Source: Liu et al. 2024, arXiv:2402.09353, equation 5 and section 4.3. So y is what LoRA computes, times a number for
each column. ΔW is not formed for the norms either: ‖w + s·Σ b_r a_r‖² = ‖w‖² + 2 s Σ b_r ⟨w, a_r⟩ + s² Σ b_q b_r ⟨a_q,
a_r⟩ takes two reads of W. (PEFT sends the identity matrix through A and B, 2 R K (K + N) operations and W anew in
memory at each call.)

With dropout PEFT scales the base product of the dropped input too: y = x Wᵀ + bias + (g − 1) ∘ x' Wᵀ + g ∘ scaling · x'
Aᵀ Bᵀ, x' = drop(x), at the price of a second base product. The same here."""

import torch
from torch import Tensor, nn

from lora_fast.backend import runs_triton
from lora_fast.dispatch import (
    flatten,
    implement,
    is_batched,
    is_differentiated,
    is_observed,
    is_transformed,
    library,
    on_own_device,
    reshaped,
    without_autocast,
)
from lora_fast.kernels import reference

library.define("scale_columns(Tensor z, Tensor g, Tensor? bias, bool triton) -> Tensor")
library.define("scale_columns_backward(Tensor dy, Tensor z, Tensor g, bool needs_dg, bool triton) -> Tensor[]")


class Magnitude(nn.Module):
    """Holds m (N,) of one adapter, under the name that PEFT has for it."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


def row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖W + scaling · B A‖ of each row (N,), in fp32, float64 for a float64 weight; a constant for gradients and for
    tangents.

    weight (N, K), lora_A (R, K), lora_B (N, R). At least the smallest normal number, so that a row of zeros can be
    divided by it."""
    weight, lora_A, lora_B = weight.detach(), lora_A.detach(), lora_B.detach()
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with without_autocast(weight.device):
        square = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square_()
        if weight.device.type == "cpu":  # where so narrow a product takes four times as long in half precision
            weight = weight.to(dtype)
        a, b = lora_A.to(weight.dtype), lora_B.to(dtype)
        along = (weight @ a.t()).to(dtype)  # ⟨w_n, a_r⟩ (N, R)
        a = a.to(dtype)
        along = torch.addmm(along, b, a @ a.t(), alpha=scaling / 2)
        # Not in place: torch.func.vmap may have a batch of factors alone.
        square = square.add((b * along).sum(1), alpha=2 * scaling)
    return square.clamp_min_(0).sqrt_().clamp_min_(torch.finfo(dtype).tiny)


def scale_columns(z: Tensor, g: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """y = z ∘ g + bias: z (..., N), g (N,) in fp32 or float64, bias (N,) → y like z, multiplied in g's dtype and
    rounded once. Kept for backward: z, where g gets a gradient."""
    if is_transformed():
        return reference.scale_columns(z, g, bias)
    triton = runs_triton(backend, "scale_columns", z, 0)
    if is_observed():
        return torch.ops.lora_fast.scale_columns(z, g, bias, triton)
    return _ScaleFunction.apply(z, g, bias, triton) if is_differentiated() else _forward(z, g, bias, triton)


def _steps(triton: bool):
    if not triton:
        return reference
    from lora_fast.kernels import scale_columns  # not at the top: without Triton there is none

    return scale_columns


def _rows(x: Tensor) -> Tensor:
    """x (..., N) as a matrix with contiguous rows."""
    x = flatten(x)
    return x if x.stride(-1) == 1 else x.contiguous()


@on_own_device
def _forward(z, g, bias, triton):
    bias = None if bias is None else bias.contiguous()
    return reshaped(_steps(triton).scale_columns(_rows(z), g.contiguous(), bias), z.shape)


@on_own_device
def _backward(dy, z, g, needs_dg, triton):
    """[dz, dg], dg empty where not needed."""
    rows = _rows(dy.to(z.dtype)), _rows(z) if needs_dg else None, g.contiguous()
    dz, dg = _steps(triton).scale_columns_backward(*rows)
    return [reshaped(dz, z.shape), g.new_empty(0) if dg is None else dg]


implement("scale_columns", _forward)
implement("scale_columns_backward", _backward)


@torch.library.register_fake("lora_fast::scale_columns", lib=library)
def _(z, g, bias, triton):
    return z.new_empty(z.shape)


@torch.library.register_fake("lora_fast::scale_columns_backward", lib=library)
def _(dy, z, g, needs_dg, triton):
    return [z.new_empty(z.shape), g.new_empty(g.shape if needs_dg else 0)]


def _setup(ctx, inputs, output) -> None:
    z, g, bias, ctx.triton = inputs
    # Without a gradient for g what z was counts no more; its place is kept by what is kept anyway.
    ctx.save_for_backward(z if ctx.needs_input_grad[1] else g, g)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy):
    if dy is None:
        return None, None, None, None
    needs_dz, needs_dg, needs_dbias, _ = ctx.needs_input_grad
    z, g = ctx.saved_tensors
    dbias = None
    if needs_dbias:  # not summed in dy's dtype: fp16 ends at 65,504, and a bias in fp32 may go on to g
        dbias = flatten(dy).sum(0, dtype=torch.promote_types(dy.dtype, ctx.bias_dtype)).to(ctx.bias_dtype)
    if torch.is_grad_enabled() or is_batched(dy):  # create_graph=True, or many dys at once: what autograd can follow
        dg = flatten(dy.to(g.dtype) * z).sum(0) if needs_dg else None
        return (dy * g).to(dy.dtype) if needs_dz else None, dg, dbias, None
    arguments = dy, z if needs_dg else dy, g, needs_dg, ctx.triton
    run = torch.ops.lora_fast.scale_columns_backward if is_observed() else _backward
    dz, dg = run(*arguments)
    return dz if needs_dz else None, dg if needs_dg else None, dbias, None


torch.library.register_autograd("lora_fast::scale_columns", _gradients, setup_context=_setup, lib=library)


class _ScaleFunction(torch.autograd.Function):
    """scale_columns with its autograd formula, without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, dy):
        return _gradients(ctx, dy)
