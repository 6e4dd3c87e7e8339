"""LoRA on stacked experts: a mixture's linear layers, one per expert, whose weights lie in one tensor of three
dimensions.

    y_i = x_i W_eᵀ + scaling · x_i A_eᵀ B_eᵀ    for each row i of expert e, rows sorted by expert

PEFT forms W + ΔW for every expert at each call, and autograd then computes and keeps a dense gradient of it, as full
fine-tuning does. Here neither is formed: x, S = x A_eᵀ and the factors are all that a layer keeps for backward, and an
expert without rows costs nothing.

Where the products run: on a GPU in bf16 in PyTorch's grouped products, which know the borders between experts on the
GPU alone; else expert by expert, for which a GPU is asked for the borders once."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from lora_fast.dispatch import autocast_dtype, compute_input, implement, library, on_own_device

# Without lora_A and lora_B the frozen product alone. offsets (E,) int32: the end of each expert's rows. transposed:
# weight is (E, K, N), as in GPT-OSS, not (E, N, K).
library.define(
    "experts_forward(Tensor x, Tensor weight, Tensor? lora_A, Tensor? lora_B, Tensor offsets, float scaling, "
    "bool transposed) -> Tensor[]"
)
library.define(
    "experts_backward(Tensor dy, Tensor x, Tensor weight, Tensor? lora_A, Tensor? lora_B, Tensor s, Tensor offsets, "
    "float scaling, bool transposed, bool needs_dx, bool needs_dA, bool needs_dB) -> Tensor[]"
)
# Operands of PyTorch's grouped products have rows of whole 16 bytes: 8 numbers in bf16.
_RANK_MULTIPLE = 8
NO_KERNEL = "stacked experts: their products, and those with the factors, are PyTorch's"


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


def _as_stored(dB: Tensor) -> Tensor:
    """(E, N, R) → (N, R·E), the layout of lora_B."""
    return dB.permute(1, 2, 0).reshape(dB.shape[1], -1)


def _cast(lora_A: Tensor, lora_B: Tensor, experts: int, scaling: float, dtype: torch.dtype, multiple: int):
    """A (E, R, K) and scaling · B (E, N, R) in `dtype`, of a rank that is padded to a `multiple` with zeros."""
    a, b = factors_by_expert(lora_A, lora_B, experts)
    more = -a.shape[1] % multiple
    a, b = nn.functional.pad(a, (0, 0, 0, more)), nn.functional.pad(b, (0, more))
    return a.to(dtype).contiguous(), (b * scaling).to(dtype).contiguous()


# -------------------------------------------------------------------------------------------------------- the products


class _Loop:
    """Products expert by expert, those without rows left out; rows beyond the last expert's give 0."""

    multiple = 1

    def __init__(self, offsets: Tensor):
        ends = offsets.tolist()
        self.counts = [end - start for start, end in zip([0, *ends], ends)]
        self.used = [expert for expert, count in enumerate(self.counts) if count]

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """The rows of each expert, and last those of none."""
        return x.split_with_sizes([*self.counts, x.shape[0] - sum(self.counts)])

    def rows(self, x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
        """y_i = x_i w_e, added to `out` if given: x (M, K), w (E, K, N) → (M, N)."""
        y = x.new_empty(x.shape[0], w.shape[2]) if out is None else out
        xs, ws, ys = self._parts(x), w.unbind(), self._parts(y)
        for expert in self.used:
            if out is None:
                torch.mm(xs[expert], ws[expert], out=ys[expert])
            else:
                ys[expert].addmm_(xs[expert], ws[expert])
        if out is None:
            ys[-1].zero_()
        return y

    def sums(self, p: Tensor, q: Tensor, experts: int) -> Tensor:
        """Σ_i p_iᵀ q_i over each expert's rows: p (M, P), q (M, Q) → (E, P, Q)."""
        found = p.new_zeros(experts, p.shape[1], q.shape[1])
        ps, qs, sums = self._parts(p), self._parts(q), found.unbind()
        for expert in self.used:
            torch.mm(ps[expert].t(), qs[expert], out=sums[expert])
        return found


class _Grouped:
    """The same by PyTorch's grouped products; of rows beyond the last expert's the result is undefined."""

    multiple = _RANK_MULTIPLE

    def __init__(self, offsets: Tensor):
        self.offsets = offsets

    def rows(self, x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
        y = nn.functional.grouped_mm(x, w, offs=self.offsets)
        return y if out is None else out.add_(y)

    def sums(self, p: Tensor, q: Tensor, experts: int) -> Tensor:
        return nn.functional.grouped_mm(p.t(), q, offs=self.offsets)


def _runs_grouped(x: Tensor, weight: Tensor) -> bool:
    aligned = all(size % _RANK_MULTIPLE == 0 for size in weight.shape[1:])
    return x.is_cuda and x.dtype == torch.bfloat16 and aligned


# -------------------------------------------------------------------------------------------------------------- the op


@on_own_device
def _forward(x, weight, lora_A, lora_B, offsets, scaling, transposed):
    """[y (M, N), S (M, R)]."""
    products = (_Grouped if _runs_grouped(x, weight) else _Loop)(offsets)
    y = products.rows(x, weight if transposed else weight.mT)
    if lora_A is None:
        return [y, x.new_empty(x.shape[0], 0)]
    a, b = _cast(lora_A, lora_B, weight.shape[0], scaling, x.dtype, products.multiple)
    s = products.rows(x, a.mT)
    return [products.rows(s, b.mT, out=y), s]


@on_own_device
def _backward(dy, x, weight, lora_A, lora_B, s, offsets, scaling, transposed, needs_dx, needs_dA, needs_dB):
    """[dx, dA, dB], empty where not needed."""
    products, experts = (_Grouped if _runs_grouped(x, weight) else _Loop)(offsets), weight.shape[0]
    dy = dy.to(x.dtype).contiguous()
    dx, dA, dB = (x.new_empty(0) for _ in range(3))
    if needs_dx:
        dx = products.rows(dy, weight.mT if transposed else weight)
    if lora_A is None:
        return [dx, dA, dB]
    a, b = _cast(lora_A, lora_B, experts, scaling, x.dtype, products.multiple)
    rank = lora_A.shape[0] // experts
    if needs_dx or needs_dA:
        ds = products.rows(dy, b)
    if needs_dx:
        products.rows(ds, a, out=dx)
    if needs_dA:
        dA = products.sums(ds, x, experts)[:, :rank].reshape(lora_A.shape).to(lora_A.dtype)
    if needs_dB:  # scaled in the masters' dtype: in fp16 it could overflow
        dB = _as_stored(products.sums(dy, s, experts)[:, :, :rank]).to(lora_B.dtype).mul_(scaling)
    return [dx, dA, dB]


implement("experts_forward", _forward)
implement("experts_backward", _backward)


@torch.library.register_fake("lora_fast::experts_forward", lib=library)
def _(x, weight, lora_A, lora_B, offsets, scaling, transposed):
    N = weight.shape[2 if transposed else 1]
    rank = 0 if lora_A is None else lora_A.shape[0] // weight.shape[0]
    padded = rank + -rank % (_RANK_MULTIPLE if _runs_grouped(x, weight) else 1)
    return [x.new_empty(x.shape[0], N), x.new_empty(x.shape[0], padded)]


@torch.library.register_fake("lora_fast::experts_backward", lib=library)
def _(dy, x, weight, lora_A, lora_B, s, offsets, scaling, transposed, needs_dx, needs_dA, needs_dB):
    wanted = ((x, needs_dx), (lora_A, needs_dA), (lora_B, needs_dB))
    return [tensor.new_empty(tensor.shape) if needed else x.new_empty(0) for tensor, needed in wanted]


def _setup(ctx, inputs, output) -> None:
    x, weight, lora_A, lora_B, offsets, ctx.scaling, ctx.transposed = inputs
    ctx.save_for_backward(x, weight, lora_A, lora_B, output[1], offsets)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grads):
    needs_dx, _, needs_dA, needs_dB, *_ = ctx.needs_input_grad
    dx = dA = dB = None
    if grads[0] is not None:
        x, weight, lora_A, lora_B, s, offsets = ctx.saved_tensors
        saved = x, weight, lora_A, lora_B, s, offsets, ctx.scaling, ctx.transposed
        found = torch.ops.lora_fast.experts_backward(grads[0], *saved, needs_dx, needs_dA, needs_dB)
        dx, dA, dB = (g if needed else None for g, needed in zip(found, (needs_dx, needs_dA, needs_dB)))
    return dx, None, dA, dB, None, None, None


torch.library.register_autograd("lora_fast::experts_forward", _gradients, setup_context=_setup, lib=library)


@register_flop_formula(torch.ops.lora_fast.experts_forward)
def _forward_flops(x, weight, lora_A, *args, **kwargs) -> int:
    M, (E, *sides) = x[0], weight
    return 2 * M * (sides[0] * sides[1] + (0 if lora_A is None else lora_A[0] // E * sum(sides)))


@register_flop_formula(torch.ops.lora_fast.experts_backward)
def _backward_flops(
    dy, x, weight, lora_A, lora_B, s, offsets, scaling, transposed, needs_dx, needs_dA, needs_dB, **kwargs
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
    described = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate")
    if not all(hasattr(module, name) for name in described) or not hasattr(module, "down_proj"):
        kind = getattr(type(module), "base_class", type(module))
        return f"{kind.__name__} is no module of experts as Transformers describes them"
    if module._is_expert_parallel:
        return "its experts are spread over processes"
    return None


def call_refusal(module: nn.Module, arguments: tuple, names: Mapping[str, ExpertFactors]) -> str | None:
    """Why this call is not for `run_experts`; names: of the parameters that are adapted."""
    if len(arguments) != 3 or not all(type(argument) is Tensor for argument in arguments):
        return "the call is not of hidden states, top_k_index and top_k_weights"
    x = arguments[0]
    if x.dim() != 2 or arguments[1].dim() != 2:
        return f"hidden states are {tuple(x.shape)}, not (tokens, hidden size)"
    for name in _weights_of(module):
        weight = getattr(module, name)
        if type(weight) is not nn.Parameter or weight.dim() != 3:
            return f"{name} is no plain parameter of three dimensions"
        if weight.requires_grad:
            return f"{name} is trained itself"
        if autocast_dtype(x.device) is None and weight.dtype != x.dtype:
            return f"hidden states are in {x.dtype}, {name} in {weight.dtype}"
    if left := names.keys() - set(_weights_of(module)):
        return f"{min(left)} is adapted too"
    return None


def _weights_of(module: nn.Module) -> tuple[str, str]:
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def run_experts(
    module: nn.Module, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, adapters: Mapping[str, ExpertFactors]
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
    first, second = _weights_of(module)
    between = _linear(module, first, rows, experts, offsets, adapters.get(first))
    between = module._apply_gate(between) if module.has_gate else module.act_fn(between)
    y = _linear(module, second, between, experts, offsets, adapters.get(second))
    if module.has_post_expert_norm:
        y = module.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order][:, None]
    return _Unsorted.apply(y, order, place).view(x.shape[0], count, -1).sum(1).to(dtype)


def _linear(
    module: nn.Module, name: str, x: Tensor, experts: Tensor, offsets: Tensor, adapter: ExpertFactors | None
) -> Tensor:
    weight, (lora_A, lora_B, scaling) = getattr(module, name).to(x.dtype), adapter or (None, None, 0.0)
    y, _ = torch.ops.lora_fast.experts_forward(x, weight, lora_A, lora_B, offsets, scaling, module.is_transposed)
    return y + getattr(module, f"{name}_bias")[experts] if module.has_bias else y
