"""Adapters merged into the base weights and out again, and switched off for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lora_fast.config import LoraFastError, warn
from lora_fast.distributed import check_matrices, whole
from lora_fast.injection import check_in_place, lora_layers, lora_state, set_disabled, still_carries, tied_weights
from lora_fast.linear import LoraLayer, is_offloaded
from lora_fast.parameter import LoraParameter
from lora_fast.quantized import is_quantized, matrix_shape


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block the model computes what its base computes: no updates, the original modules_to_save; a
    merged adapter is unmerged for the block. Trained biases (bias != "none") stay, with a warning: there is one set of
    them. Raises LoraFastError, with nothing changed, where an adapted module or one of modules_to_save was replaced
    since."""
    state = lora_state(model)
    check_in_place(model, state, others=state.originals)
    if state.biases:
        warn("the base's biases are trained too; with adapters disabled the model keeps the trained biases")
    keep, was_disabled = state.merged_keep, state.disabled
    if keep is not None:
        unmerge_lora(model)
    set_disabled(model, state, True)
    try:
        yield
    finally:
        if still_carries(model, state):
            set_disabled(model, state, was_disabled)
            if keep is not None:
                merge_lora(model, keep=keep)


def merge_lora(model: nn.Module, *, keep: str = "cpu") -> None:
    """weight ← weight + scaling · B A in place, added in fp32 and rounded once to the weight's dtype: no adapter work
    in forward any more.

    The weights of before are kept for `unmerge_lora`, on the CPU, or on the weights' device with keep="device".
    Raises LoraFastError, with nothing changed, where an adapter is merged already, holds NaN or inf, sits on a tied
    or a quantized weight, or would make a finite weight overflow its dtype, or where a module was replaced since."""
    state = lora_state(model)
    if keep not in ("cpu", "device"):
        raise LoraFastError(f"keep={keep!r}; expected 'cpu' or 'device'")
    if state.merged_keep is not None:
        raise LoraFastError(f"adapter {state.active!r} is merged already; unmerge_lora(model) first")
    if state.disabled:
        raise LoraFastError("adapters are disabled; merge_lora after the disable_adapters block")
    check_in_place(model, state)
    layers = {name: layer for name, layer in lora_layers(model).items() if layer.active_adapter is not None}
    check_matrices(layers)
    tied = tied_weights(model, layers)
    for name, layer in layers.items():
        if is_quantized(layer):
            raise LoraFastError(
                f"{name} is quantized, and merging would round the update to the steps of its few bits; save_adapter, "
                "load the base model unquantized, then load_adapter and merge_lora there"
            )
        if is_offloaded(layer):
            raise LoraFastError(f"{name}.weight is offloaded by accelerate; move the model to a device, then merge")
        if name in tied:
            raise LoraFastError(
                f"{name}.weight is tied to {tied[name]}: merging would change both; untie them, or leave it unmerged"
            )
        lora_A, lora_B = (factors[layer.active_adapter].weight for factors in (layer.lora_A, layer.lora_B))
        shape = lora_B.shape[0], lora_A.shape[1]
        if shape != matrix_shape(layer):
            raise LoraFastError(
                f"{name}.weight was resized after its adapter was put in: (N, K) is {matrix_shape(layer)}, the "
                f"adapter's {shape}; resize first, then apply_lora"
            )
        for factor in layer.factor_modules(layer.active_adapter):
            if not torch.isfinite(whole(factor.weight)).all():
                raise LoraFastError(f"adapter {state.active!r} holds NaN or inf in {name}; nothing was merged")
    for name, layer in layers.items():
        if _overflows(layer):
            where = name if isinstance(layer, LoraParameter) else f"{name}.weight"
            raise LoraFastError(
                f"merging adapter {state.active!r} into {where} exceeds what {layer.weight.dtype} holds "
                f"(±{torch.finfo(layer.weight.dtype).max:.4g}); nothing was merged: merge in torch.bfloat16 or "
                "torch.float32, or leave it unmerged"
            )
    for layer in layers.values():
        layer.merge(keep=keep)
    state.merged_keep = keep


@torch.no_grad()
def _overflows(layer: LoraLayer) -> bool:
    """Whether a merge would turn finite weights into inf. One layer's merged weight lives at a time, and only where a
    bound on it, max|W| + max|update|, does not settle the question: it costs as much as the merge."""
    name = layer.active_adapter
    a, b = (whole(factor[name].weight).double() for factor in (layer.lora_A, layer.lora_B))
    # |(B A)ₙₖ| ≤ ‖Bₙ‖ ‖A₌ₖ‖, Cauchy-Schwarz; compared so that a NaN in the base counts as unsettled.
    update = abs(layer.adapter_specs[name].scaling) * b.norm(dim=1).max() * a.norm(dim=0).max()
    settled = whole(layer.weight.abs().max()) + update < torch.finfo(layer.weight.dtype).max / 2
    if settled and not layer.adapter_specs[name].use_dora:  # which scales the sum
        return False
    return bool(whole((~torch.isfinite(layer.merged_weight()) & torch.isfinite(layer.weight)).any()))


def unmerge_lora(model: nn.Module) -> None:
    """Puts back the weights of before `merge_lora`, bit for bit in every dtype. Raises LoraFastError, with nothing
    changed, where nothing is merged, or a module was replaced or resized since."""
    state = lora_state(model)
    if state.merged_keep is None:
        raise LoraFastError("no adapter is merged; merge_lora(model) comes first")
    check_in_place(model, state)
    layers = {name: layer for name, layer in lora_layers(model).items() if layer.merged_adapter is not None}
    check_matrices(layers)
    for name, layer in layers.items():
        if layer._weight_before_merge.shape != layer.weight.shape:
            raise LoraFastError(
                f"{name}.weight was resized after its adapter was merged: it was "
                f"{tuple(layer._weight_before_merge.shape)}, is {tuple(layer.weight.shape)}; resize first, then "
                "apply_lora: remove_lora(model) leaves what is there now"
            )
    for layer in layers.values():
        layer.unmerge()
    state.merged_keep = None
