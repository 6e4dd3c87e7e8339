"""PEFT's own LoRA linears with a fast forward, chosen call by call; what it doesn't cover runs PEFT's forward.

Only the class of a live module changes: parameters, adapters, merging, saving and every other method stay PEFT's.

How the numbers differ from PEFT's: on an fp32 base by the rounding of the last addition. On a bf16 or fp16 base with
fp32 adapters PEFT copies x to fp32 for every layer and runs the adapter there; here the fp32 adapters are rounded to
x's dtype (autocast's where it is on), products accumulate in fp32, and x is never copied. On a CPU the same seed
drops the same elements in all cases; on a GPU that has not been tried."""

from collections import Counter
from typing import NamedTuple

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from lora_fast import experts
from lora_fast.backend import why_not_triton
from lora_fast.dispatch import FLOATS, PackedWeight, autocast_dtype
from lora_fast.ops import lora_update
from lora_fast.quantized import is_four_bit, packed_weight, why_called
from lora_fast.shared_input import LinearCall, has_global_hooks, run_linear

# Exact types: a DTensor, a quantized or a sharded tensor is a subclass, and means something else by a matrix product.
_PLAIN_TENSORS = (nn.Parameter, Tensor)
_HALF = (torch.bfloat16, torch.float16)


def _is_altered(module: nn.Module) -> bool:
    """Whether calling `module` does anything besides its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


class Adapter(NamedTuple):
    """What one call needs of an adapter that is plain LoRA or DoRA: lora_A (R, K), lora_B (N, R), scaling, dropout's p
    now, and DoRA's magnitude (N,)."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float
    magnitude: Tensor | None


def read_adapter(layer: PeftLinear, name: str) -> Adapter | str:
    """The adapter of this name, or why it needs PEFT's forward."""
    magnitude = None
    if name in layer.lora_variant:
        variant = type(layer.lora_variant[name])
        if variant is not DoraLinearVariant:
            return f"the adapter is a LoRA variant, {variant.__name__}"
        holder = layer.lora_magnitude_vector[name]
        if type(holder) is not DoraLinearLayer or _is_altered(holder) or type(holder.weight) not in _PLAIN_TENSORS:
            return "its magnitude is sharded, or has hooks or a forward of its own"
        if layer.ephemeral_gpu_offload:
            return "the adapter visits the GPU call by call (ephemeral_gpu_offload)"
        base = layer.get_base_layer()
        if is_four_bit(base) or _base_matrix(base, base.weight) is None:
            return "the adapter is DoRA, and the base layer's weight is quantized or not at hand"
        magnitude = holder.weight
    weights = []
    for factors in (layer.lora_A, layer.lora_B):
        factor = factors[name]
        if type(factor) is not nn.Linear:
            return f"lora_A or lora_B is a {type(factor).__name__}, not a plain nn.Linear"
        if _is_altered(factor):
            return "lora_A or lora_B has hooks or a forward of its own"
        if factor.bias is not None:
            return "the adapter has a bias of its own (lora_bias)"
        weight = factor.weight
        if type(weight) not in _PLAIN_TENSORS or weight.is_meta:
            return "lora_A or lora_B is sharded, on the meta device or another special tensor"
        weights.append(weight)
    if weights[0].dtype != weights[1].dtype:
        return "lora_A and lora_B are of different dtypes"
    dropout = layer.lora_dropout[name]
    if type(dropout) not in (nn.Dropout, nn.Identity) or _is_altered(dropout):
        return f"its dropout is not a plain nn.Dropout ({type(dropout).__name__})"
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    if p >= 1 or (p > 0 and dropout.inplace):
        return "its dropout drops everything or works in place"
    scaling = layer.scaling[name]
    if not isinstance(scaling, (int, float)):
        return "its scaling is a tensor"
    return Adapter(weights[0], weights[1], scaling, p, magnitude)


def read_layer(layer: PeftLinear) -> Adapter | str:
    """The adapter that the layer applies as it stands, or why it needs PEFT's forward whatever it is called with."""
    if layer._disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        return "the adapter is merged into the base weight"
    factors = layer.lora_A
    active = [name for name in layer.active_adapters if name in factors]
    if len(active) != 1:
        return f"{len(active)} of its adapters are active, not one"
    if not layer.cast_input_dtype_enabled:
        return "PEFT's cast of the input is switched off"
    return read_adapter(layer, active[0])


def _call_refusal(x: object, weight: Tensor | None, adapter_dtype: torch.dtype) -> str | None:
    """Why this input or its surroundings need PEFT's forward; weight is of the base product to be fused, if any."""
    if has_global_hooks():
        return "hooks for all modules are registered"
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "the model is being exported: the graph must not need lora-fast"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "torch.func or forward-mode differentiation, which the op has no rule for"
    if type(x) not in _PLAIN_TENSORS or x.dtype not in FLOATS:
        return "the input is not a plain floating-point tensor"
    dtype = x.dtype
    if (cast := autocast_dtype(x.device)) is not None:
        dtype = cast
        if dtype not in _HALF or x.dtype == torch.float64:
            return f"autocast to {dtype} of an input in {x.dtype}"
    elif weight is not None and weight.dtype != dtype:
        return f"the input is in {dtype}, the base weight in {weight.dtype}"
    if adapter_dtype != dtype and not (adapter_dtype == torch.float32 and dtype in _HALF):
        return f"the adapter is in {adapter_dtype}, the computation in {dtype}"
    return None


def _base_matrix(base: nn.Module, x: Tensor) -> Tensor | PackedWeight | None:
    """The weight (N, K) of a base layer that is but a matrix product of x, read anew at each call; else None."""
    if is_four_bit(base):
        return None if _is_altered(base) else packed_weight(base, x)
    if type(base) not in (nn.Linear, Conv1D) or _is_altered(base):
        return None
    weight = base.weight
    if type(weight) not in _PLAIN_TENSORS or weight.dtype not in FLOATS:
        return None
    return weight if type(base) is nn.Linear else weight.t()


def base_refusal(base: nn.Module) -> str | None:
    """Why a base layer is called as it is, or None where its product is fused with the update."""
    if not _is_altered(base) and is_four_bit(base):
        return None
    if _base_matrix(base, base.weight) is not None:
        return None
    if type(base) in (nn.Linear, Conv1D):
        return "the base layer has hooks, a forward of its own or a special weight: it is called as it is"
    return why_called(type(base), four_bit=False)


class FastForward:
    """The forward put before PEFT's: y = base(x) + scaling · drop(x) lora_Aᵀ lora_Bᵀ as one op, or PEFT's own.

    calls_by_path counts calls by (path, reason): "lora_linear" (base and update in one op), "lora_linears" (so together
    with the layers that read the same input), "lora_update" (the base layer called as it is, the update fused),
    "lora_experts" (stacked experts) or "peft". Calls inside a compiled graph are not counted."""

    calls_by_path: Counter[tuple[str, str | None]]
    backend = "auto"

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        adapter = "the call has arguments besides the input" if args or kwargs else read_layer(self)
        refusal = adapter if isinstance(adapter, str) else None
        if refusal is None:
            base = self.base_layer
            weight = _base_matrix(base, x)
            refusal = _call_refusal(x, weight, adapter.lora_A.dtype)
        if refusal is not None:
            self._count("peft", refusal)
            return super().forward(x, *args, **kwargs)
        lora_A, lora_B, scaling, p, magnitude = adapter
        if weight is None:
            self._count("lora_update", base_refusal(base) or why_called(type(base), four_bit=True))
            return lora_update(x, base(x), lora_A, lora_B, scaling, dropout_p=p, backend=self.backend)
        y = run_linear(self, x, LinearCall(weight, base.bias, lora_A, lora_B, scaling, p, self.backend, magnitude))
        return y.to(x.dtype) if isinstance(weight, PackedWeight) else y  # as its own forward answers

    def linear_call(self, x: Tensor) -> LinearCall | None:
        """What forward would compute now as one op, or None where it takes another path."""
        adapter = read_layer(self)
        weight = None if isinstance(adapter, str) else _base_matrix(self.base_layer, x)
        if weight is None or _call_refusal(x, weight, adapter.lora_A.dtype) is not None:
            return None
        *factors, magnitude = adapter
        return LinearCall(weight, self.base_layer.bias, *factors, self.backend, magnitude)

    def fusion_path(self) -> tuple[str, str | None]:
        """The path that a call takes as the layer stands now, and why not Triton's."""
        adapter = read_layer(self)
        if isinstance(adapter, str):
            return "peft", adapter
        base = base_refusal(self.base_layer)
        op = "lora_linear" if base is None else "lora_update"
        weight = adapter.lora_A if base or is_four_bit(self.base_layer) else self.base_layer.weight
        triton = why_not_triton(self.backend, op, weight.device, weight.dtype, adapter.lora_A.shape[0])
        return "torch" if triton else "triton", "; ".join(filter(None, (base, triton))) or None

    def _count(self, path: str, reason: str | None) -> None:
        if not torch.compiler.is_compiling():  # a counter would break the graph
            self.calls_by_path[path, reason] += 1


class LoraFastPeftLinear(FastForward, PeftLinear):
    """PEFT's lora.Linear (over nn.Linear, its subclasses and Conv1D) with the fast forward."""


class LoraFastPeftExperts(FastForward, ParamWrapper):
    """PEFT's LoRA on a mixture's stacked experts, its wrappers of one module computed together, without ΔW.

    PEFT nests a wrapper for each parameter of a module; the outermost answers for all of them."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        factors = "the call has keyword arguments" if kwargs else self._factors()
        refusal = factors if isinstance(factors, str) else experts.call_refusal(self._module(), (x, *args), factors)
        if refusal is None:
            refusals = (_call_refusal(x, self.get_param(), adapter.lora_A.dtype) for adapter in factors.values())
            refusal = next(filter(None, refusals), None)
        if refusal is not None:
            self._count("peft", refusal)
            return super(FastForward, self).forward(x, *args, **kwargs)
        self._count("lora_experts", None)
        return experts.run_experts(self._module(), x, *args, factors, self.backend)

    def linear_call(self, x: Tensor) -> None:
        return None

    def fusion_path(self) -> tuple[str, str | None]:
        factors = self._factors()
        if isinstance(factors, str):
            return "peft", factors
        weight, rank = self.get_param(), max(len(each.lora_A) for each in factors.values()) // self.num_experts
        reason = why_not_triton(self.backend, "lora_experts", weight.device, weight.dtype, rank)
        return "torch" if reason else "triton", reason

    def _module(self) -> nn.Module:
        return self.get_base_layer()

    def _factors(self) -> dict[str, experts.ExpertFactors] | str:
        """{parameter: factors} of this wrapper and those inside it, or why PEFT's forward has to run."""
        found, layer = {}, self
        while isinstance(layer, ParamWrapper):
            adapter = read_layer(layer)
            if isinstance(adapter, str):
                return adapter
            found[layer.parameter_name] = experts.ExpertFactors(adapter.lora_A, adapter.lora_B, adapter.scaling)
            layer = layer.base_layer
            if _is_altered(layer):
                return "what it wraps has hooks or a forward of its own"
        return experts.refusal(layer) or found


# By this name PEFT knows a wrapper that another adapter may share; pickles go by the qualified one.
LoraFastPeftExperts.__name__ = "ParamWrapper"

# "Linear" stays in each name: PEFT recognizes linear layers by it. Fully at module level, so that they can be pickled.
FAST_CLASSES: dict[type, type] = {PeftLinear: LoraFastPeftLinear, ParamWrapper: LoraFastPeftExperts}

if is_bnb_available():
    from peft.tuners.lora.bnb import Linear8bitLt

    class LoraFastPeftLinear8bitLt(FastForward, Linear8bitLt):
        """PEFT's LoRA over an 8-bit layer of bitsandbytes: the base layer as it is, the update fused."""

    FAST_CLASSES[Linear8bitLt] = LoraFastPeftLinear8bitLt

if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit

    class LoraFastPeftLinear4bit(FastForward, Linear4bit):
        """PEFT's LoRA over a 4-bit layer of bitsandbytes: the base layer as it is, the update fused."""

    FAST_CLASSES[Linear4bit] = LoraFastPeftLinear4bit


def swap_refusal(layer: nn.Module) -> str | None:
    """Why this PEFT layer can't take a fast class, or None."""
    kind = type(layer)
    if kind not in FAST_CLASSES and not isinstance(layer, FastForward):
        return f"{kind.__module__.removeprefix('peft.tuners.')}.{kind.__name__} has no fast path"
    if "forward" in layer.__dict__:
        return "the layer's forward was replaced on the instance"
    return experts.refusal(layer.get_base_layer()) if isinstance(layer, ParamWrapper) else None


def make_fast(layer: nn.Module, backend: str) -> None:
    """Swaps the class of a layer that swap_refusal has nothing against; one that is fast already gets the backend."""
    if not isinstance(layer, FastForward):
        layer.__class__ = FAST_CLASSES[type(layer)]
        layer.calls_by_path = Counter()
        layer.followers = ()
    layer.backend = backend
