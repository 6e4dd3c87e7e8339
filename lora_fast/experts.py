"""LoRA on stacked experts: a mixture's linear layers, one per expert, whose weights lie in one tensor of three
dimensions.

    y_i = x_i W_eᵀ + scaling · x_i A_eᵀ B_eᵀ    for each row i of expert e, rows sorted by expert

PEFT forms W + ΔW for every expert at each call, and autograd then computes and keeps a dense gradient of it, as full
fine-tuning does. Here neither is formed: x, S = x A_eᵀ and the factors are all that a layer keeps for backward, and an
expert without rows costs nothing.

With the kernels of grouped.py the borders between experts stay on the GPU, which alone knows them; the frozen product
is PyTorch's grouped one, in bf16, or one kernel with the update in it, whichever is faster. PyTorch alone goes expert
by expert, for which a GPU is asked for the borders once."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from lora_fast import tuning
from lora_fast.backend import runs_triton
from lora_fast.dispatch import PLAIN_TENSORS, autocast_dtype, compute_input, implement, library, on_own_device

# Without lora_A and lora_B the frozen product alone. offsets (E,) int32: the end of each expert's rows. transposed:
# weight is (E, K, N), as in GPT-OSS, not (E, N, K).
library.define(
    "experts_forward(Tensor x, Tensor weight, Tensor? lora_A, Tensor? lora_B, Tensor offsets, float scaling, "
    "bool transposed, bool triton) -> Tensor[]"
)
library.define(
    "experts_backward(Tensor dy, Tensor x, Tensor weight, Tensor? lora_A, Tensor? lora_B, Tensor s, Tensor offsets, "
    "float scaling, bool transposed, bool needs_dx, bool needs_dA, bool needs_dB, "
    "bool triton) -> Tensor[]"
)


class ExpertFactors(NamedTuple):
    """An adapter of one stacked weight, as PEFT stores it: lora_A (E·R, K), expert by expert; lora_B (N, R·E), rank by
    rank. The update of expert e is scaling · B_e A_e with B_e = lora_B[:, e::E] and A_e = lora_A[e·R : (e + 1)·R]."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


# --------------------------------------------------------------------------------------------------------- the factors


def factors_by_expert(lora_A: Tensor, lora_B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """A (E, R, K) and B (E, N, R), views of an adapter's factors."""
    a = lora_A.view(experts, -1, lora_A.shape[1])
    return a, lora_B.view(lora_B.shape[0], -1, experts).permute(2, 0, 1)


def _cast(lora_A: Tensor, lora_B: Tensor, experts: int, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A (E·R, K) and scaling · B, stored expert by expert as (E·R, N), in `dtype`; scaled before the one rounding."""
    rows = lora_B.view(lora_B.shape[0], -1, experts).permute(2, 1, 0) * scaling
    return lora_A.to(dtype), rows.to(dtype).reshape(lora_A.shape[0], -1)


# --------------------------------------------------------------------------------------- the products, by PyTorch alone


class _Loop:
    """Products expert by expert, those without rows left out."""

    def __init__(self, offsets: Tensor, rows: int):
        # What is estimated has no values: all rows are then the first expert's, which takes as much memory.
        ends = [rows] * len(offsets) if isinstance(offsets, FakeTensor) else offsets.tolist()
        self.counts = [end - start for start, end in zip([0, *ends], ends)]
        self.used = [expert for expert, count in enumerate(self.counts) if count]

    def rows(self, x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
        """y_i = x_i w_e, added to `out` if given: x (M, K), w (E, K, N) → (M, N)."""
        y = x.new_empty(x.shape[0], w.shape[2]) if out is None else out
        xs, ws, ys = x.split_with_sizes(self.counts), w.unbind(), y.split_with_sizes(self.counts)
        for expert in self.used:
            if out is None:
                torch.mm(xs[expert], ws[expert], out=ys[expert])
            else:
                ys[expert].addmm_(xs[expert], ws[expert])
        return y

    def sums(self, p: Tensor, q: Tensor) -> Tensor:
        """Σ_i p_iᵀ q_i over each expert's rows: p (M, P), q (M, Q) → (E, P, Q)."""
        found = p.new_zeros(len(self.counts), p.shape[1], q.shape[1])
        ps, qs, sums = p.split_with_sizes(self.counts), q.split_with_sizes(self.counts), found.unbind()
        for expert in self.used:
            torch.mm(ps[expert].t(), qs[expert], out=sums[expert])
        return found


def _library(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's grouped product takes these, operands whose rows are whole 16 bytes."""
    return x.is_cuda and x.dtype == torch.bfloat16 and all(size % 8 == 0 for size in weight.shape[1:])


def _torch_forward(x, weight, lora_A, lora_B, offsets, scaling):
    """y (M, N), S (M, R); weight (E, N, K)."""
    if lora_A is None and _library(x, weight):
        return nn.functional.grouped_mm(x, weight.mT, offs=offsets), x.new_empty(len(x), 0)
    products = _Loop(offsets, x.shape[0])
    y = products.rows(x, weight.mT)
    if lora_A is None:
        return y, x.new_empty(x.shape[0], 0)
    a, b = (f.view(len(weight), -1, f.shape[1]) for f in _cast(lora_A, lora_B, len(weight), scaling, x.dtype))
    s = products.rows(x, a.mT)
    return products.rows(s, b, out=y), s


def _torch_backward(dy, x, weight, lora_A, lora_B, s, offsets, scaling, needs_dx, needs_dA, needs_dB):
    """dx, dA (E·R, K), dB (E·R, N) unscaled; None where not needed."""
    if lora_A is None and _library(x, weight):
        return nn.functional.grouped_mm(dy, weight, offs=offsets) if needs_dx else None, None, None
    products = _Loop(offsets, x.shape[0])
    dx = products.rows(dy, weight) if needs_dx else None
    if lora_A is None:
        return dx, None, None
    if needs_dx or needs_dA:
        a, b = (f.view(len(weight), -1, f.shape[1]) for f in _cast(lora_A, lora_B, len(weight), scaling, x.dtype))
        ds = products.rows(dy, b.mT)
    if needs_dx:
        products.rows(ds, a, out=dx)
    return dx, products.sums(ds, x) if needs_dA else None, products.sums(s, dy) if needs_dB else None


# ------------------------------------------------------------------------------------------------- and with the kernels


def _product(x: Tensor, weight: Tensor, offsets: Tensor, routes: dict[str, Callable[[], Tensor]], step: str) -> Tensor:
    """The fastest of `routes` to x_i W_eᵀ + the update: with PyTorch's grouped product, where it can, or one kernel."""
    if not _library(x, weight):
        routes = {"triton": routes["triton"]}
    _, N, K = weight.shape
    sizes = {"M": x.shape[0], "E": len(weight), "N": N, "K": K, "dtype": x.dtype, "weight": weight.stride(1) >= K}
    return tuning.run(step, sizes, x.device, routes)


def _triton_forward(x, weight, lora_A, lora_B, offsets, scaling):
    kernels, tables = (import_module(f"lora_fast.kernels.{name}") for name in ("grouped", "expert_table"))
    table = tables.expert_table(offsets, len(lora_A) // len(weight), len(x))
    a, b = _cast(lora_A, lora_B, len(weight), scaling, x.dtype)
    s, _ = kernels.grouped_shrink(x, a, table)

    def library() -> Tensor:
        y = nn.functional.grouped_mm(x, weight.mT, offs=offsets)
        return kernels.grouped_expand(y, s, b.t(), table, out=y)

    routes = {"cublas": library, "triton": lambda: kernels.grouped_gemm(x, weight, s, b.t(), table)}
    return _product(x, weight, offsets, routes, "experts_linear"), s


def _triton_backward(dy, x, weight, lora_A, lora_B, s, offsets, scaling, needs_dx, needs_dA, needs_dB):
    kernels, tables = (import_module(f"lora_fast.kernels.{name}") for name in ("grouped", "expert_table"))
    table = tables.expert_table(offsets, len(lora_A) // len(weight), len(x))
    dx = dA = dB = None
    if needs_dx or needs_dA:
        a, b = _cast(lora_A, lora_B, len(weight), scaling, x.dtype)
        ds = kernels.grouped_grad_s(dy, b.t(), table)
    if needs_dx:

        def library() -> Tensor:
            dx = nn.functional.grouped_mm(dy, weight, offs=offsets)
            return kernels.grouped_grad_x(ds, a, table, accumulate=dx, out=dx)

        routes = {"cublas": library, "triton": lambda: kernels.grouped_gemm(dy, weight.mT, ds, a.t(), table)}
        dx = _product(dy, weight.mT, offsets, routes, "experts_grad_x")
    if needs_dA:
        dA = kernels.grouped_grad_a(ds, x, table)
    if needs_dB:  # its rows as those of dA
        dB = kernels.grouped_grad_a(s, dy, table)
    return dx, dA, dB


# -------------------------------------------------------------------------------------------------------------- the op


@on_own_device
def _forward(x, weight, lora_A, lora_B, offsets, scaling, transposed, triton):
    """[y (M, N), S (M, R)], S with the kernels of a rank that 16 divides."""
    triton = triton and lora_A is not None and len(x) > 0
    forward = _triton_forward if triton else _torch_forward
    return list(forward(x.contiguous(), weight.mT if transposed else weight, lora_A, lora_B, offsets, scaling))


@on_own_device
def _backward(dy, x, weight, lora_A, lora_B, s, offsets, scaling, transposed, needs_dx, needs_dA, needs_dB, triton):
    """[dx, dA, dB], empty where not needed."""
    triton = triton and lora_A is not None and len(x) > 0
    backward, weight = _triton_backward if triton else _torch_backward, weight.mT if transposed else weight
    saved = x.contiguous(), weight, lora_A, lora_B, s, offsets, scaling
    dx, dA, dB = backward(dy.to(x.dtype).contiguous(), *saved, needs_dx, needs_dA, needs_dB)
    if dA is not None:
        dA = dA.view(lora_A.shape).to(lora_A.dtype)
    if dB is not None:  # scaled in the masters' dtype: in fp16 it could overflow
        by_expert = dB.view(len(weight), -1, lora_B.shape[0]).to(lora_B.dtype)
        dB = by_expert.permute(2, 1, 0).reshape(lora_B.shape).mul_(scaling)
    return [x.new_empty(0) if gradient is None else gradient for gradient in (dx, dA, dB)]


implement("experts_forward", _forward)
implement("experts_backward", _backward)


@torch.library.register_fake("lora_fast::experts_forward", lib=library)
def _(x, weight, lora_A, lora_B, offsets, scaling, transposed, triton):
    rank = 0 if lora_A is None else lora_A.shape[0] // weight.shape[0]
    width = rank + -rank % 16 if triton and x.shape[0] else rank
    return [x.new_empty(x.shape[0], weight.shape[2 if transposed else 1]), x.new_empty(x.shape[0], width)]


@torch.library.register_fake("lora_fast::experts_backward", lib=library)
def _(dy, x, weight, lora_A, lora_B, s, offsets, scaling, transposed, needs_dx, needs_dA, needs_dB, triton):
    wanted = ((x, needs_dx), (lora_A, needs_dA), (lora_B, needs_dB))
    return [tensor.new_empty(tensor.shape) if needed else x.new_empty(0) for tensor, needed in wanted]


def _setup(ctx, inputs, output) -> None:
    x, weight, lora_A, lora_B, offsets, ctx.scaling, ctx.transposed, ctx.triton = inputs
    ctx.save_for_backward(x, weight, lora_A, lora_B, output[1], offsets)
    ctx.set_materialize_grads(False)


def _plain(x, weight, lora_A, lora_B, offsets, scaling) -> Tensor:
    """y (M, N) in steps that autograd can follow; weight (E, N, K)."""
    ends = offsets.tolist()
    parts = []
    for expert, (start, end) in enumerate(zip([0, *ends], ends)):
        rows = x[start:end]
        y = rows @ weight[expert].mT
        if lora_A is not None:
            a, b = (factor[expert].to(x.dtype) for factor in factors_by_expert(lora_A, lora_B, len(weight)))
            y = y + scaling * (rows @ a.mT @ b.mT)
        parts.append(y)
    return torch.cat(parts)


def _gradients(ctx, grads):
    needs_dx, _, needs_dA, needs_dB, *_ = needs = ctx.needs_input_grad
    found = [None] * 4
    if grads[0] is None:
        return *found, None, None, None, None
    x, weight, lora_A, lora_B, s, offsets = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: by autograd's own gradients of the formula
        matrices = weight.mT if ctx.transposed else weight
        y = _plain(x, matrices, lora_A, lora_B, offsets, ctx.scaling)
        wanted = [place for place in (0, 2, 3) if needs[place]]
        inputs = [(x, weight, lora_A, lora_B)[place] for place in wanted]
        for place, gradient in zip(wanted, torch.autograd.grad(y, inputs, grads[0].to(y.dtype), create_graph=True)):
            found[place] = gradient
    else:
        saved = x, weight, lora_A, lora_B, s, offsets, ctx.scaling, ctx.transposed
        arguments = grads[0], *saved, needs_dx, needs_dA, needs_dB, ctx.triton
        for place, gradient in zip((0, 2, 3), torch.ops.lora_fast.experts_backward(*arguments)):
            found[place] = gradient if needs[place] else None
    return *found, None, None, None, None


torch.library.register_autograd("lora_fast::experts_forward", _gradients, setup_context=_setup, lib=library)


@register_flop_formula(torch.ops.lora_fast.experts_forward)
def _forward_flops(x, weight, lora_A, *args, **kwargs) -> int:
    M, (E, *sides) = x[0], weight
    return 2 * M * (sides[0] * sides[1] + (0 if lora_A is None else lora_A[0] // E * sum(sides)))


@register_flop_formula(torch.ops.lora_fast.experts_backward)
def _backward_flops(
    dy, x, weight, lora_A, lora_B, s, offsets, scaling, transposed, needs_dx, needs_dA, needs_dB, *args, **kwargs
) -> int:
    (M, K), (E, *sides) = x, weight
    N, R = sum(sides) - K, 0 if lora_A is None else lora_A[0] // E
    adapter = R * (N * ((needs_dx or needs_dA) + needs_dB) + K * (needs_dx + needs_dA))
    return 2 * M * (needs_dx * N * K + adapter)


# ------------------------------------------------------------------------------------------------- a mixture's experts


class _Sorted(torch.autograd.Function):
    """x_s = x[order // count]: each row `count` times, in this order; the gradient is summed in a fixed order."""

    @staticmethod
    def forward(ctx, x, order, place, count):
        ctx.save_for_backward(place)
        ctx.count = count
        return x[order // count]

    @staticmethod
    def backward(ctx, dy):
        (place,) = ctx.saved_tensors
        return dy[place].view(-1, ctx.count, dy.shape[-1]).sum(1), None, None, None


class _Unsorted(torch.autograd.Function):
    """y[place], the rows as they were before they were sorted."""

    @staticmethod
    def forward(ctx, y, order, place):
        ctx.save_for_backward(order)
        return y[place]

    @staticmethod
    def backward(ctx, dy):
        (order,) = ctx.saved_tensors
        return dy[order], None, None


def refusal(module: nn.Module) -> str | None:
    """None where this module is what `run_experts` computes: experts as Transformers' `use_experts_implementation`
    describes them, whose attributes tell how weights lie and what happens between the two products."""
    described = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")
    if not all(hasattr(module, name) for name in described) or not hasattr(module, "down_proj"):
        kind = getattr(type(module), "base_class", type(module))
        return f"{kind.__name__} is no module of experts as Transformers describes them"
    if getattr(module, "_is_expert_parallel", False):  # Transformers' older versions have neither this nor the norm
        return "its experts are spread over processes"
    return None


def call_refusal(module: nn.Module, arguments: tuple, names: Mapping[str, ExpertFactors]) -> str | None:
    """Why this call is not for `run_experts`; names: of the parameters that are adapted."""
    if len(arguments) != 3 or not all(type(argument) in PLAIN_TENSORS for argument in arguments):
        return "the call is not of hidden states, top_k_index and top_k_weights"
    x = arguments[0]
    if x.dim() != 2 or arguments[1].dim() != 2:
        return f"hidden states are {tuple(x.shape)}, not (tokens, hidden size)"
    for name in _weights_of(module):
        weight = getattr(module, name)
        if type(weight) not in PLAIN_TENSORS or weight.dim() != 3:
            return f"{name} is no plain parameter of three dimensions"
        if weight.requires_grad:
            # FullyShardedDataParallel's views of a flat parameter seem trained where a part of it is.
            return f"{name} is {'trained itself' if weight.is_leaf else 'computed from what is trained'}"
        if autocast_dtype(x.device) is None and weight.dtype != x.dtype:
            return f"hidden states are in {x.dtype}, {name} in {weight.dtype}"
    if left := names.keys() - set(_weights_of(module)):
        return f"{min(left)} is adapted too"
    return None


def _weights_of(module: nn.Module) -> tuple[str, str]:
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def run_experts(
    module: nn.Module,
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    adapters: Mapping[str, ExpertFactors],
    backend: str = "auto",
) -> Tensor:
    """Σ_j w_tj · expert_{e_tj}(x_t) over each token's experts, with the adapters in both products of an expert.

    x (T, K), top_k_index and top_k_weights (T, k) → (T, K) in x's dtype. module: one that `refusal` has nothing
    against; adapters: {name of the weight: factors}, of one or both. The steps and their order are those of
    Transformers' own grouped implementation; every token's k results are summed in fp32 and rounded once."""
    count, dtype = top_k_index.shape[1], x.dtype
    experts = top_k_index.reshape(-1)
    order = torch.argsort(experts, stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    experts = experts[order]
    ends = torch.arange(module.num_experts, device=order.device, dtype=experts.dtype)
    offsets = torch.searchsorted(experts, ends, right=True, out_int32=True)
    rows = _Sorted.apply(compute_input(x, None), order, place, count)
    rank = max(len(adapter.lora_A) for adapter in adapters.values()) // module.num_experts
    triton = runs_triton(backend, "lora_experts", rows, rank)
    first, second = _weights_of(module)
    between = _linear(module, first, rows, experts, offsets, adapters.get(first), triton)
    between = module._apply_gate(between) if module.has_gate else module.act_fn(between)
    y = _linear(module, second, between, experts, offsets, adapters.get(second), triton)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order][:, None]
    return _Unsorted.apply(y, order, place).view(x.shape[0], count, y.shape[1]).sum(1).to(dtype)


def _linear(
    module: nn.Module,
    name: str,
    x: Tensor,
    experts: Tensor,
    offsets: Tensor,
    adapter: ExpertFactors | None,
    triton: bool,
) -> Tensor:
    x = compute_input(x, None)  # under autocast a bias or an activation may have left fp32
    weight, (lora_A, lora_B, scaling) = getattr(module, name).to(x.dtype), adapter or (None, None, 0.0)
    arguments = x, weight, lora_A, lora_B, offsets, scaling, module.is_transposed, triton
    y, _ = torch.ops.lora_fast.experts_forward(*arguments)
    return y + getattr(module, f"{name}_bias")[experts] if module.has_bias else y
