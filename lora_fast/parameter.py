"""LoRA on parameters that no linear layer holds: a mixture's stacked experts, a router's weight.

The module that holds them keeps its identity, its weights and their names, and becomes a subclass of itself; for each
adapted parameter it gets a child `lora_<parameter>` with the factors. Experts run as `run_experts` computes them,
without ΔW; any other module is called as it is with W + ΔW in the parameter's place, as PEFT calls all of them."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lora_fast import experts
from lora_fast.dispatch import FLOATS
from lora_fast.distributed import spread_as, whole
from lora_fast.linear import NO_ADAPTER, LoraLayer
from lora_fast.shared_input import LinearCall


class LoraParameter(LoraLayer):
    """The adapters of one parameter of `owner`: lora_A.<adapter>.weight (E·R, K), lora_B.<adapter>.weight (N, R·E).

    The parameter is (E, N, K), where the owner says `is_transposed` (E, K, N), or one matrix (N, K), of which E is 1.
    ΔW_e = scaling · B_e A_e, laid out as PEFT does (see `ExpertFactors`)."""

    bias = None

    def __init__(self, owner: nn.Module, name: str):
        super().__init__()
        self._owner = (owner,)  # in a tuple, where nn.Module doesn't take it for a child
        self.parameter_name = name
        self.train(owner.training)

    @property
    def owner(self) -> nn.Module:
        return self._owner[0]

    @property
    def weight(self) -> Tensor:
        return getattr(self.owner, self.parameter_name)

    @property
    def stacked(self) -> int:
        return self.weight.shape[0] if self.weight.dim() == 3 else 1

    @property
    def transposed(self) -> bool:
        return self.weight.dim() == 3 and bool(getattr(self.owner, "is_transposed", False))

    @property
    def out_features(self) -> int:
        return self.weight.shape[-1 if self.transposed else -2]

    @property
    def in_features(self) -> int:
        return self.weight.shape[-2 if self.transposed else -1]

    def adapted_name(self, name: str) -> str:
        """The parameter's own name."""
        return name.removesuffix(child_name(self)) + self.parameter_name

    def refusal(self) -> str | None:
        """Why this parameter can't carry an adapter, or None."""
        weight = self.weight
        if type(weight) is not nn.Parameter or weight.dtype not in FLOATS:
            return f"a {type(weight).__name__} of {weight.dtype}; expected a plain floating-point parameter"
        if weight.dim() not in (2, 3):
            return f"of shape {tuple(weight.shape)}; expected (N, K), or (E, N, K) of E experts"
        if not isinstance(getattr(self.owner, child_name(self), self), LoraParameter):
            return (
                f"of a {type(self.owner).__name__} with a {child_name(self)} of its own; the adapters go by that name"
            )
        return None

    def factors(self, name: str) -> experts.ExpertFactors:
        lora_A, lora_B = self.lora_A[name].weight, self.lora_B[name].weight
        return experts.ExpertFactors(lora_A, lora_B, self.adapter_specs[name].scaling)

    def delta_weight(self, name: str) -> Tensor:
        """ΔW in the parameter's layout, in fp32 (float64 for a float64 parameter); autograd can follow."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        lora_A, lora_B, scaling = self.factors(name)
        # Whole where they are sharded: the pieces of lora_A need not end where an expert does.
        a, b = experts.factors_by_expert(whole(lora_A).to(dtype), whole(lora_B).to(dtype), self.stacked)
        delta = scaling * (b @ a)
        return spread_as(self.weight, (delta.mT if self.transposed else delta).view(self.weight.shape))

    def linear_call(self, x: Tensor) -> LinearCall | None:
        return None

    def fusion_path(self) -> tuple[str, str | None]:
        """The path that a call takes as the owner stands now, and why not Triton's."""
        if not self.adapter_runs():
            return "base", NO_ADAPTER
        if reason := experts.refusal(self.owner):
            return "torch", f"W + ΔW is formed at each call: {reason}"
        reason = self.why_not_triton("lora_experts")
        return "torch" if reason else "triton", reason


class LoraOwner(nn.Module):
    """A module of class `base_class` with adapters on its parameters.

    As with LoraSubclass no module holds the classes that `lora_owner` makes: copies and pickles name `base_class`."""

    base_class: type[nn.Module]

    def __reduce_ex__(self, protocol: int) -> tuple:
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return _empty, (self.base_class,), *state

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layers = lora_parameters_of(self)
        running = {layer.parameter_name: layer for layer in layers if layer.adapter_runs()}
        if not running:
            layers[0].count("base", NO_ADAPTER)
            return self.base_class.forward(self, *args, **kwargs)
        adapters = {name: layer.factors(layer.active_adapter) for name, layer in running.items()}
        reason = experts.refusal(self)
        if reason is None:
            reason = "the call has keyword arguments" if kwargs else experts.call_refusal(self, args, adapters)
        if reason is None:
            layers[0].count("lora_experts", None)
            return experts.run_experts(self, *args, adapters, layers[0].backend)
        layers[0].count("formed", reason)
        before = {name: layer.weight for name, layer in running.items()}
        formed = {name: before[name] + layer.delta_weight(layer.active_adapter) for name, layer in running.items()}
        try:
            for name, weight in formed.items():
                self._replace(name, weight.to(before[name].dtype))
            return self.base_class.forward(self, *args, **kwargs)
        finally:
            for name, weight in before.items():
                self._replace(name, weight)

    def _replace(self, name: str, weight: Tensor) -> None:
        """Puts a tensor in a parameter's place, or in both of its places: FullyShardedDataParallel has a view of its
        flat parameter there as a plain attribute too, which comes first."""
        for place in (self.__dict__, self._parameters):
            if name in place:
                place[name] = weight


@cache
def lora_owner(base: type[nn.Module]) -> type[LoraOwner]:
    """The one class with adapters on parameters over `base`."""
    return type(f"Lora{base.__name__}", (LoraOwner, base), {"__module__": __name__, "base_class": base})


def _empty(base: type[nn.Module]) -> LoraOwner:
    kind = lora_owner(base)
    return kind.__new__(kind)


def lora_parameters_of(owner: nn.Module) -> list[LoraParameter]:
    """The adapters of a module's parameters."""
    return [child for child in owner._modules.values() if isinstance(child, LoraParameter)]


def lora_parameter(owner: nn.Module, name: str) -> LoraParameter:
    """The adapters of this parameter: those that the owner holds already, or new ones that it knows nothing of."""
    found = next((layer for layer in lora_parameters_of(owner) if layer.parameter_name == name), None)
    return found or LoraParameter(owner, name)


def attach(layer: LoraParameter) -> None:
    """Makes the owner hold the layer."""
    layer.owner.add_module(child_name(layer), layer)


def child_name(layer: LoraParameter) -> str:
    return f"lora_{layer.parameter_name}"
