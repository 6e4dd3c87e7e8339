"""Base layers of bitsandbytes, whose weights are packed in 4 or 8 bits: which are such, and their weights for ops.

The classes are known by name: who has such layers has imported bitsandbytes."""

import copy

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode, _get_current_dispatch_mode_stack

from lora_fast.config import warn
from lora_fast.dispatch import PackedWeight, autocast_dtype, row_count

_MODULE = "bitsandbytes.nn.modules"
_FOUR_BIT = ("Linear4bit", "LinearNF4", "LinearFP4")  # they share one forward

DECODED_ROWS = 4


def is_quantized(module: nn.Module) -> bool:
    """Whether it is a 4-bit or 8-bit linear layer of bitsandbytes, or a subclass of one."""
    return any(
        kind.__module__ == _MODULE and kind.__name__ in ("Linear4bit", "Linear8bitLt") for kind in type(module).__mro__
    )


def is_four_bit(module: nn.Module) -> bool:
    """Whether its weight, packed in 4 bits, can be had for an op (`packed_weight`)."""
    kind = getattr(module, "base_class", type(module))
    return kind.__module__ == _MODULE and kind.__name__ in _FOUR_BIT


def why_called(kind: type[nn.Module], *, four_bit: bool) -> str:
    """Why a base layer of this class is called, and not its weight used in an op."""
    often = ", for few rows without gradient, or since it computes in another dtype than its input's"
    return f"the base layer is a {kind.__name__}: it is called as it is{often if four_bit else ''}"


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(N, K) of the matrix that a linear layer multiplies by, however its weight stores it."""
    if is_quantized(module) or hasattr(module, "parameter_name"):  # packed, or any parameter that carries adapters
        return module.out_features, module.in_features
    return tuple(module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1])


def packed_weight(layer: nn.Module, x: Tensor) -> PackedWeight | None:
    """The weight (N, K) of a layer for an op on x, None where the layer has to be called: where it is no 4-bit layer or
    computes in another dtype than the op would, where a compiler or a dispatch mode wants to see the layer's own op,
    and for a few rows without a gradient, as in decoding, for which bitsandbytes has a kernel that unpacks nothing.

    The answer is the same at a layer's first call as later: a recomputed checkpoint must take the forward's path."""
    if not is_four_bit(layer) or not isinstance(x, Tensor) or torch.compiler.is_compiling() or _is_watched():
        return None
    if not layer.training and not torch.is_grad_enabled() and row_count(x.shape) <= DECODED_ROWS:
        return None
    weight, shape = layer.weight, (layer.out_features, layer.in_features)
    state = getattr(weight, "quant_state", None)
    # As it was made, out of a pickle, or being estimated; sharded ones are of other types.
    plain = type(weight).__name__ in ("Params4bit", "Parameter") or isinstance(weight, FakeTensor)
    # On some CPUs bitsandbytes packs a weight anew for inference, in a form of which it knows no gradient.
    if not plain or state is None or tuple(state.shape) != shape or getattr(state, "packing_format_for_cpu", False):
        return None
    dtype = x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device) or x.dtype
    if not layer.compute_type_is_set:  # what its forward does first of all
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    if layer.compute_dtype != dtype:
        return None
    data, state = weight.detach(), copy.copy(state)  # as they are now: bitsandbytes may pack a layer anew
    state.dtype = dtype

    def unpack() -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(data, state)

    return PackedWeight(weight, shape, dtype, unpack)


def keep_packing(model: nn.Module) -> list[nn.Module]:
    """Keeps 4-bit weights packed as they are, and returns the layers that would have packed theirs anew: bitsandbytes
    does so, unasked, at an evaluation on a CPU with AVX512-BF16 (`support_avx512bf16_for_cpu`).

    No gradient passes through such a weight: layers below it would go on training with wrong ones, and nothing would
    say so. That holds for every layer of a model that is trained, adapted or not. What is packed anew already is packed
    back, by bitsandbytes' own way."""
    kept = [layer for layer in model.modules() if getattr(layer, "support_avx512bf16_for_cpu", False)]
    for layer in kept:
        layer.support_avx512bf16_for_cpu = False
    packed = [
        layer
        for layer in model.modules()
        if is_quantized(layer) and getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False)
    ]
    if packed:
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        for layer in packed:
            weight = layer.weight
            weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
        warn(
            f"an evaluation on this CPU had packed the weights of {len(packed)} 4-bit layers anew, their scales "
            "rounded to bf16; gradients pass them again, the rounding stays: put adapters in before you evaluate"
        )
    return kept


def _is_watched() -> bool:
    """Whether a dispatch mode is on that knows ops by name, as selective checkpointing's does: packed weights go past
    registered ops. Fake tensors don't mind, nor do modes that look inside ops and say so by `looks_inside`."""
    return _get_current_dispatch_mode() is not None and not all(
        isinstance(mode, FakeTensorMode) or getattr(mode, "looks_inside", False)
        for mode in _get_current_dispatch_mode_stack()
    )
