"""What others do for the same layers, written by us: every baseline that the benchmarks compare with.

    frozen          the layers without adapters: forward and dX, the denominator
    accumulated     Unsloth's factoring: products by cuBLAS, the update added to y with beta = 1; backward computes
                    S = x Aᵀ again, and dy B twice
    split           LoRAFusion's factoring (split_kernels.py): the update inside the GEMM before its K-loop, dS and dB
                    from one read of dy with atomics; x after dropout and a byte mask are kept
    PEFT            itself: modules.py

Layers are (weight, lora_A, lora_B, scaling) with masters lora_A (R, K) and lora_B (N, R), which every baseline casts
to x's dtype in each call, as these projects do, and gives gradients of. x is (M, K). No code is theirs."""

from collections.abc import Sequence
from typing import NamedTuple

import split_kernels
import torch
from torch import Tensor

from lora_fast.kernels import reference


class Layer(NamedTuple):
    weight: Tensor  # (N, K), frozen
    lora_A: Tensor  # (R, K)
    lora_B: Tensor  # (N, R)
    scaling: float


def frozen(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


def exact(x: Tensor, layer: Layer) -> Tensor:
    """The formula in x's dtype by plain autograd: in fp32 the truth that arms are checked against."""
    update = x @ layer.lora_A.to(x.dtype).t() @ layer.lora_B.to(x.dtype).t()
    return x @ layer.weight.to(x.dtype).t() + layer.scaling * update


class _Accumulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scalings, *tensors):
        count = len(scalings)
        ctx.scalings = scalings
        ctx.save_for_backward(x, *tensors)
        ys = []
        for w, a, b, scaling in zip(tensors[:count], tensors[count : 2 * count], tensors[2 * count :], scalings):
            y = x @ w.t()
            ys.append(y.addmm_(x @ a.to(x.dtype).t(), b.to(x.dtype).t(), alpha=scaling))
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        count = len(dys)
        x, *tensors = ctx.saved_tensors
        dx, dAs, dBs = None, [], []
        for dy, w, lora_A, lora_B, scaling in zip(
            dys, tensors[:count], tensors[count : 2 * count], tensors[2 * count :], ctx.scalings
        ):
            a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
            dAs.append((((dy @ b).t() @ x) * scaling).to(lora_A.dtype))
            dBs.append(((dy.t() @ (x @ a.t())) * scaling).to(lora_B.dtype))
            dx = dy @ w if dx is None else dx.addmm_(dy, w)
            dx.addmm_(dy @ b, a, alpha=scaling)
        return (dx, None, *[None] * count, *dAs, *dBs)


def accumulated(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """Layers on one input, as in Unsloth's LoRA_W and LoRA_QKV; no dropout, which its fast path refuses."""
    weights, lora_As, lora_Bs, scalings = zip(*layers)
    return _Accumulated.apply(x, scalings, *weights, *lora_As, *lora_Bs)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, scaling, p, seed):
        a, b = lora_A.to(x.dtype), lora_B.to(x.dtype) * scaling
        dropped, kept = split_kernels.split_dropout(x, p, seed) if p else (x, None)
        s = dropped @ a.t()
        ctx.save_for_backward(dropped, kept, s, weight, lora_A, lora_B)
        ctx.scaling, ctx.p = scaling, p
        return split_kernels.update_first(x, weight.t(), s, b.t())

    @staticmethod
    def backward(ctx, dy):
        dropped, kept, s, weight, lora_A, lora_B = ctx.saved_tensors
        a, b = lora_A.to(dy.dtype) / (1 - ctx.p), lora_B.to(dy.dtype) * ctx.scaling
        ds, dB = split_kernels.atomic_grads(dy, b, s)
        dA = ds.t() @ dropped
        dx = split_kernels.update_first(dy, weight, ds, a, kept)
        return dx, None, dA.to(lora_A.dtype), (dB * ctx.scaling).to(lora_B.dtype), None, None, None


def split(x: Tensor, layer: Layer, p: float = 0.0, seed: int = 1) -> Tensor:
    """One layer; several on one input are several calls (LoRAFusion itself merges q, k and v into one layer with one A,
    which is another model)."""
    return _Split.apply(x, *layer, p, seed)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, u):
        ctx.save_for_backward(g, u)
        if g.is_cuda:
            from lora_fast.kernels.swiglu import swiglu

            return swiglu(g, u)
        return torch.nn.functional.silu(g).mul_(u)

    @staticmethod
    def backward(ctx, dh):
        g, u = ctx.saved_tensors
        if g.is_cuda:
            from lora_fast.kernels.swiglu import swiglu_grad

            return swiglu_grad(dh, g, u)
        empty = g.new_empty(g.shape[0], 1)
        return reference.swiglu_backward(dh, g, u, empty, empty, empty, 1.0, 1.0, None)[:2]


def swiglu(g: Tensor, u: Tensor) -> Tensor:
    """silu(g) ∘ u by our kernel without adapters: the frozen MLP and all hand-written baselines use it."""
    return _SwiGLU.apply(g, u)
