"""The ops of lora-fast as PyTorch sees them: checked, flattened to matrices, registered with torch.library.

Registered (fake implementation, autograd and FLOP formula), so that torch.compile, FakeTensor, selective checkpointing
and the FLOP counter each see one op. Where nobody looks on, the same functions run under a plain autograd.Function: the
dispatcher's way into Python and back costs 70 µs more per forward and backward, which small models feel.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from lora_fast.backend import check_backend
from lora_fast.config import LoraFastError
from lora_fast.kernels import reference

_library = torch.library.Library("lora_fast", "DEF")

# Drawing a mask is random: tagged so that no tool takes two draws for one, or draws one again in backward.
_library.define("dropout_mask(Tensor x, float p) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_library.define(
    "linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, Tensor? mask, "
    "float dropout_p) -> (Tensor, Tensor)"
)
_library.define(
    "update_forward(Tensor x, Tensor base, Tensor lora_A, Tensor lora_B, float scaling, Tensor? mask, float dropout_p) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "linear_backward(Tensor dy, Tensor x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor s, Tensor? mask, "
    "float scaling, float dropout_p, bool needs_dx, bool needs_dA, bool needs_dB) -> (Tensor, Tensor, Tensor)"
)


def _rows(x: Tensor) -> Tensor:
    """(..., K) → (M, K)."""
    return x.reshape(-1, x.shape[-1])


def _linear_forward(x, weight, bias, lora_A, lora_B, scaling, mask, dropout_p):
    y, s = reference.lora_linear_forward(_rows(x), weight, bias, lora_A, lora_B, scaling, mask, dropout_p)
    return y.view(*x.shape[:-1], y.shape[-1]), s


def _update_forward(x, base, lora_A, lora_B, scaling, mask, dropout_p):
    y, s = reference.lora_update_forward(_rows(x), _rows(base), lora_A, lora_B, scaling, mask, dropout_p)
    return y.view(base.shape), s


def _linear_backward(dy, x, weight, lora_A, lora_B, s, mask, scaling, dropout_p, needs_dx, needs_dA, needs_dB):
    dx, dA, dB = reference.lora_linear_backward(
        _rows(dy), _rows(x), weight, lora_A, lora_B, s, mask, scaling, dropout_p, needs_dx, needs_dA, needs_dB
    )
    return dx.view(x.shape) if needs_dx else dx, dA, dB


for _name, _function in {
    "dropout_mask": reference.dropout_mask,
    "linear_forward": _linear_forward,
    "update_forward": _update_forward,
    "linear_backward": _linear_backward,
}.items():
    _library.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("lora_fast::dropout_mask", lib=_library)
def _(x, p):
    return x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


@torch.library.register_fake("lora_fast::linear_forward", lib=_library)
def _(x, weight, bias, lora_A, lora_B, scaling, mask, dropout_p):
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(x.shape[:-1].numel(), lora_A.shape[0])


@torch.library.register_fake("lora_fast::update_forward", lib=_library)
def _(x, base, lora_A, lora_B, scaling, mask, dropout_p):
    return base.new_empty(base.shape), x.new_empty(x.shape[:-1].numel(), lora_A.shape[0])


@torch.library.register_fake("lora_fast::linear_backward", lib=_library)
def _(dy, x, weight, lora_A, lora_B, s, mask, scaling, dropout_p, needs_dx, needs_dA, needs_dB):
    return (
        x.new_empty(x.shape if needs_dx else 0),
        lora_A.new_empty(lora_A.shape) if needs_dA else x.new_empty(0),
        lora_B.new_empty(lora_B.shape) if needs_dB else x.new_empty(0),
    )


def _save_linear(ctx, inputs, output):
    x, weight, bias, lora_A, lora_B, ctx.scaling, mask, ctx.dropout_p = inputs
    ctx.save_for_backward(x, weight, lora_A, lora_B, output[1], mask)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _save_update(ctx, inputs, output):
    x, _, lora_A, lora_B, ctx.scaling, mask, ctx.dropout_p = inputs
    ctx.save_for_backward(x, None, lora_A, lora_B, output[1], mask)
    ctx.set_materialize_grads(False)


def _adapter_gradients(ctx, dy, needs_dx, needs_dA, needs_dB):
    x, weight, lora_A, lora_B, s, mask = ctx.saved_tensors
    backward = torch.ops.lora_fast.linear_backward if _observed() else _linear_backward
    if torch.is_grad_enabled():  # create_graph=True: plain PyTorch, S included, whose derivative autograd knows
        backward = _linear_backward
        s = (_rows(x) if mask is None else reference.apply_mask(_rows(x), mask)) @ lora_A.to(x.dtype).t()
    gradients = backward(
        dy, x, weight, lora_A, lora_B, s, mask, ctx.scaling, ctx.dropout_p, needs_dx, needs_dA, needs_dB
    )
    return (g if needed else None for g, needed in zip(gradients, (needs_dx, needs_dA, needs_dB), strict=True))


def _backward_linear(ctx, dy, _):
    if dy is None:
        return (None,) * 8
    needs_dx, _, needs_dbias, needs_dA, needs_dB, *_ = ctx.needs_input_grad
    dx, dA, dB = _adapter_gradients(ctx, dy, needs_dx, needs_dA, needs_dB)
    dbias = _rows(dy).sum(0).to(ctx.bias_dtype) if needs_dbias else None
    return dx, None, dbias, dA, dB, None, None, None


def _backward_update(ctx, dy, _):
    if dy is None:
        return (None,) * 7
    needs_dx, needs_dbase, needs_dA, needs_dB, *_ = ctx.needs_input_grad
    dx, dA, dB = _adapter_gradients(ctx, dy, needs_dx, needs_dA, needs_dB)
    return dx, dy if needs_dbase else None, dA, dB, None, None, None


torch.library.register_autograd("lora_fast::linear_forward", _backward_linear, setup_context=_save_linear, lib=_library)
torch.library.register_autograd("lora_fast::update_forward", _backward_update, setup_context=_save_update, lib=_library)


# Both save inside forward: with a setup_context, torch inspects forward's signature at each call, for 70 µs.
class _LinearFunction(torch.autograd.Function):
    """linear_forward with its autograd formula, without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _linear_forward(*inputs)
        _save_linear(ctx, inputs, output)
        return output

    backward = staticmethod(_backward_linear)


class _UpdateFunction(torch.autograd.Function):
    """update_forward with its autograd formula, without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _update_forward(*inputs)
        _save_update(ctx, inputs, output)
        return output

    backward = staticmethod(_backward_update)


def _observed() -> bool:
    """Whether a compiler or a dispatch mode (FakeTensor, FLOP counter, selective checkpointing) sees the op as one."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def _transformed() -> bool:
    """Whether torch.func differentiates or batches the call: it has no rule for the ops, but for each step of them."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _rows_of(shape) -> int:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows


@register_flop_formula(torch.ops.lora_fast.linear_forward)
def _linear_forward_flops(x, weight, bias, lora_A, *args, **kwargs) -> int:
    return 2 * _rows_of(x) * (weight[0] * weight[1] + lora_A[0] * (weight[0] + weight[1]))


@register_flop_formula(torch.ops.lora_fast.update_forward)
def _update_forward_flops(x, base, lora_A, *args, **kwargs) -> int:
    return 2 * _rows_of(x) * lora_A[0] * (x[-1] + base[-1])


@register_flop_formula(torch.ops.lora_fast.linear_backward)
def _linear_backward_flops(
    dy, x, weight, lora_A, lora_B, s, mask, scaling, dropout_p, needs_dx, needs_dA, needs_dB, **kwargs
) -> int:
    rank, k, n = lora_A[0], x[-1], dy[-1]
    base = n * k if needs_dx and weight is not None else 0
    adapter = needs_dB * n * rank + (needs_dx or needs_dA) * n * rank + needs_dA * rank * k + needs_dx * rank * k
    return 2 * _rows_of(dy) * (base + adapter)


def _compute_input(x: Tensor, other_dtype: torch.dtype | None) -> Tensor:
    """x in the dtype that the products run in: autocast's where it is on, as it would be for torch's own linear."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device_type))
    if other_dtype is not None and x.dtype != other_dtype:
        raise LoraFastError(f"x is {x.dtype}, weight is {other_dtype}; cast one of them, or run under torch.autocast")
    return x


def _check_factors(x: Tensor, lora_A: Tensor, lora_B: Tensor, n: int, dropout_p: float) -> None:
    if lora_A.dim() != 2 or lora_B.dim() != 2 or lora_A.shape[0] != lora_B.shape[1]:
        raise LoraFastError(
            f"lora_A is {tuple(lora_A.shape)}, lora_B is {tuple(lora_B.shape)}; expected (R, K) and (N, R) with one R"
        )
    if x.dim() < 1 or x.shape[-1] != lora_A.shape[1]:
        raise LoraFastError(f"x is {tuple(x.shape)}, lora_A is {tuple(lora_A.shape)}; x's last size must be K")
    if lora_B.shape[0] != n:
        raise LoraFastError(f"lora_B has N={lora_B.shape[0]}, the linear layer has N={n}; lora_B is (out_features, R)")
    if not 0 <= dropout_p < 1:
        raise LoraFastError(f"dropout_p={dropout_p}; expected a probability in [0, 1)")


def _draw(x: Tensor, dropout_p: float, training: bool) -> tuple[Tensor | None, float]:
    if not training or dropout_p == 0:
        return None, 0.0
    if torch.compiler.is_compiling():
        # In aten's own random ops: the compiler's common-subexpression pass knows those by name and ignores the tag, so
        # that it would merge the draws of all layers that read one x (q, k and v) into one mask.
        return reference.dropout_mask(x, dropout_p), dropout_p
    draw = torch.ops.lora_fast.dropout_mask if _observed() else reference.dropout_mask
    return draw(x.detach(), dropout_p), dropout_p


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
    Kept for backward: x, x's product with lora_A (M, R) and, with dropout, one bit per element of x.
    Raises LoraFastError for sizes or dtypes that do not fit, or a backend that can't run. Source: arXiv:2106.09685,
    section 4.1."""
    check_backend(backend)
    if weight.dim() != 2 or x.dim() < 1 or weight.shape[1] != x.shape[-1]:
        raise LoraFastError(
            f"x is {tuple(x.shape)}, weight is {tuple(weight.shape)}; weight is (out_features, in_features) and "
            "x's last size is in_features"
        )
    _check_factors(x, lora_A, lora_B, weight.shape[0], dropout_p)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise LoraFastError(f"bias is {tuple(bias.shape)}; expected (N,)={tuple(weight.shape[:1])}")
    x = _compute_input(x, weight.dtype)
    if _transformed() or (weight.requires_grad and torch.is_grad_enabled()):
        base = torch.nn.functional.linear(x, weight, bias)
        return lora_update(x, base, lora_A, lora_B, scaling, dropout_p=dropout_p, training=training)
    mask, p = _draw(x, dropout_p, training)
    run = torch.ops.lora_fast.linear_forward if _observed() else _LinearFunction.apply
    return run(x, weight, bias, lora_A, lora_B, scaling, mask, p)[0]


def lora_update(
    x: Tensor,
    base: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """The low-rank update on top of a base layer that runs by itself (quantized, offloaded): y = base + scaling ·
    drop(x) Aᵀ Bᵀ.

    x (..., K), base (..., N), lora_A (R, K), lora_B (N, R) → y like base; the products run in x's dtype (autocast's
    where it is on).
    Raises LoraFastError for sizes that do not fit."""
    if x.dim() < 1 or x.shape[:-1] != base.shape[:-1]:
        raise LoraFastError(f"x is {tuple(x.shape)}, base is {tuple(base.shape)}; all sizes but the last must be equal")
    _check_factors(x, lora_A, lora_B, base.shape[-1], dropout_p)
    x = _compute_input(x, None)
    if _transformed():
        a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
        update = torch.nn.functional.dropout(x, dropout_p, training) @ a.t() @ b.t()
        return torch.add(base, update, alpha=scaling).to(base.dtype)
    mask, p = _draw(x, dropout_p, training)
    run = torch.ops.lora_fast.update_forward if _observed() else _UpdateFunction.apply
    return run(x, base, lora_A, lora_B, scaling, mask, p)[0]
