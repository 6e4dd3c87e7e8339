"""LoRA on a linear layer, in place: the module keeps its identity, its weight and its name, and becomes a subclass of
itself.

Nothing is wrapped, so the base model's state-dict keys, tied weights, hooks' targets and `module.weight` stay what they
were; what is added are `lora_A.<adapter>.weight` (R, K) and `lora_B.<adapter>.weight` (N, R).

How the numbers differ from PEFT's, bit for bit: in one dtype (an fp32 base with fp32 adapters, say) only by the
rounding of the last addition, since y is accumulated into the base product instead of being added as a tensor of its
own. On a bf16 or fp16 base with fp32 adapters PEFT copies x to fp32 and runs the adapter there; here the fp32 master
adapters are rounded to the base's dtype and x is never copied, as under autocast: S = x Aᵀ is rounded to that dtype
once, gradients of the masters are rounded to it before they are stored in fp32. With the same seed, dropout keeps the
same elements as PEFT's.
"""

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_fast.backend import why_not_triton
from lora_fast.config import BASE_CHANGING_INITS, LoraConfig, LoraFastError
from lora_fast.dispatch import PackedWeight
from lora_fast.distributed import overwrite, whole
from lora_fast.dora import Magnitude, row_norms
from lora_fast.quantized import is_quantized, matrix_shape
from lora_fast.shared_input import LinearCall, run_linear

NO_ADAPTER = "the base layer alone: its adapter is merged, disabled or not the active one"


@dataclass(frozen=True)
class AdapterSpec:
    """What one adapter is on one module: r = R, scaling, dropout_p, whether its factors are trained when it is active,
    and whether it is DoRA."""

    r: int
    scaling: float
    dropout_p: float
    trainable: bool
    use_dora: bool = False


class LoraLayer(nn.Module):
    """What LoraLinear, LoraConv1D and LoraEmbedding share; the class beside it in the bases supplies `weight`, `bias`
    and the base forward."""

    fan_in_fan_out = False
    stacked = 1  # matrices that the weight stacks, each with factors of its own
    # Everything that `start` puts on the instance; remove_lora takes it off again.
    STATE_NAMES = (
        "lora_A",
        "lora_B",
        "lora_magnitude_vector",
        "adapter_specs",
        "active_adapter",
        "adapters_disabled",
        "merged_adapter",
        "backend",
        "calls_by_path",
        "followers",
        "_weight_before_merge",
        "_weight_before_init",
    )

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_magnitude_vector: nn.ModuleDict  # only with DoRA
    adapter_specs: dict[str, AdapterSpec]
    active_adapter: str | None
    adapters_disabled: bool
    merged_adapter: str | None
    backend: str
    calls_by_path: Counter[tuple[str, str | None]]
    followers: tuple["LoraLayer", ...]

    def start(self, backend: str) -> None:
        """The state of a layer without adapters, right after its class was swapped."""
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.adapter_specs = {}
        self.active_adapter = None
        self.adapters_disabled = False
        self.merged_adapter = None
        self.backend = backend
        self.calls_by_path = Counter()
        self.followers = ()
        self._weight_before_merge: Tensor | None = None
        self._weight_before_init: Tensor | None = None

    def adapted_name(self, name: str) -> str:
        """The dotted name of what is adapted, for a layer of this name: itself."""
        return name

    def matrix(self) -> Tensor:
        """The base weight as (N, K), a view."""
        return self.weight.t() if self.fan_in_fan_out else self.weight

    @torch.no_grad()
    def add_adapter(self, name: str, spec: AdapterSpec, init: bool | str, dtype: torch.dtype) -> None:
        """Adds factors of rank spec.r, initialized as `init` says (see LoraConfig), as masters of `dtype` on the
        weight's device."""
        device = _execution_device(self) if is_offloaded(self) else self.weight.device
        a, b = self.random_factors(spec, init, "meta" if device.type == "meta" else "cpu")
        if init in BASE_CHANGING_INITS:
            a_start, b_start = self._factors_of(self.matrix(), spec, init)
            a.weight.copy_(a_start)
            b.weight.copy_(b_start)
            if self._weight_before_init is None:
                self._weight_before_init = self.weight.detach().to("cpu", copy=True)
            self._subtract(spec.scaling * (b_start @ a_start))
        if init not in BASE_CHANGING_INITS and self.weight.is_floating_point():
            # PEFT's random starts pass through the base's dtype; so do ours, that a seed gives the same start in bf16
            # too.
            a, b = a.to(self.weight.dtype), b.to(self.weight.dtype)
        self.lora_A[name] = a.to(device=device, dtype=dtype)
        self.lora_B[name] = b.to(device=device, dtype=dtype)
        self.adapter_specs[name] = spec
        if spec.use_dora:
            if "lora_magnitude_vector" not in self._modules:
                self.lora_magnitude_vector = nn.ModuleDict()
            self.lora_magnitude_vector[name] = Magnitude(self.row_norms(name).to(dtype))
        for factor in self.factor_modules(name):
            factor.train(self.training)

    def factor_modules(self, name: str) -> list[nn.Module]:
        """What holds lora_A, lora_B and, of DoRA, the magnitude of this adapter as its `weight`."""
        kinds = ("lora_A", "lora_B", "lora_magnitude_vector")[: 3 if self.adapter_specs[name].use_dora else 2]
        return [self._modules[kind]._modules[name] for kind in kinds]

    def row_norms(self, name: str) -> Tensor:
        """‖W + scaling · B A‖ of each row (N,), fp32."""
        lora_A, lora_B, scaling = self.lora_A[name].weight, self.lora_B[name].weight, self.adapter_specs[name].scaling
        return row_norms(self.matrix(), lora_A, lora_B, scaling)

    def random_factors(self, spec: AdapterSpec, init: bool | str, device: str) -> tuple[nn.Linear, nn.Linear]:
        """What holds A (R, K) and B (N, R), fp32, made where and as PEFT makes them (on the CPU, A before B): the same
        seed then gives the same start."""
        (n, k), ranks = matrix_shape(self), spec.r * self.stacked
        a = nn.Linear(k, ranks, bias=False, device=device, dtype=torch.float32)
        b = nn.Linear(ranks, n, bias=False, device=device, dtype=torch.float32)
        if init == "gaussian":
            nn.init.normal_(a.weight, std=1 / spec.r)
            nn.init.zeros_(b.weight)
        elif init is True:
            nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
            nn.init.zeros_(b.weight)
        return a, b

    @staticmethod
    def _factors_of(weight: Tensor, spec: AdapterSpec, init: str) -> tuple[Tensor, Tensor]:
        """A (R, K) and B (N, R) of PiSSA (the top singular triplets, split evenly) or OLoRA (the first R of a QR) of
        weight (N, K), fp32."""
        weight = weight.detach().float()
        if spec.r > min(weight.shape):
            raise LoraFastError(
                f"init_lora_weights={init!r} takes at most r=min(N, K)={min(weight.shape)} here; r={spec.r}"
            )
        if init == "olora":
            q, r = torch.linalg.qr(weight)
            return r[: spec.r], q[:, : spec.r]
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        root = (s[: spec.r] / spec.scaling).sqrt()
        return root[:, None] * vh[: spec.r], u[:, : spec.r] * root

    def _subtract(self, delta: Tensor) -> None:
        """weight −= delta (N, K), computed in fp32."""
        self.weight.copy_(self.weight.float() - (delta.t() if self.fan_in_fan_out else delta))

    @torch.no_grad()
    def plain_factors(self, name: str, init: bool | str) -> tuple[Tensor, Tensor]:
        """A (R', K) and B (N, R') with B A = the whole update against the base as it was before any adapter, scaling
        included.

        R' is R, or 2 R where `init` took s · B₀ A₀ off the base weight at the start: then B A = s (B A − B₀ A₀)."""
        spec = self.adapter_specs[name]
        a, b = (whole(factor[name].weight).float() for factor in (self.lora_A, self.lora_B))
        b = spec.scaling * b
        if init not in BASE_CHANGING_INITS:
            return a, b
        before = whole(self._weight_before_init).to(self.weight.device)
        a_start, b_start = self._factors_of(before.t() if self.fan_in_fan_out else before, spec, init)
        return torch.cat([a, a_start]), torch.cat([b, -spec.scaling * b_start], dim=1)

    def set_adapter(self, name: str | None) -> None:
        """Makes `name` (or none) the active adapter; only its factors require a gradient, and only where it is
        trainable."""
        self.active_adapter = name if name in self.adapter_specs else None
        for other, spec in self.adapter_specs.items():
            trained = other == self.active_adapter and spec.trainable
            for factor in self.factor_modules(other):
                factor.weight.requires_grad_(trained)

    @torch.no_grad()
    def delta_weight(self, name: str) -> Tensor:
        """scaling · B A in the weight's layout, fp32 (float64 for a float64 weight)."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        delta = self.lora_B[name].weight.to(dtype) @ self.lora_A[name].weight.to(dtype)
        delta *= self.adapter_specs[name].scaling
        return delta.t() if self.fan_in_fan_out else delta

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """weight + scaling · B A of the active adapter, with DoRA in rows of its magnitudes, computed in fp32 and
        rounded once to the weight's dtype."""
        name = self.active_adapter
        merged = self.delta_weight(name).add_(self.weight)
        if self.adapter_specs[name].use_dora:
            g = self.lora_magnitude_vector[name].weight / self.row_norms(name)
            merged *= g if self.fan_in_fan_out else g[:, None]
        return merged.to(self.weight.dtype)

    @torch.no_grad()
    def merge(self, *, keep: str) -> None:
        """weight ← merged_weight(); the weight of before is kept for `unmerge` on the CPU, or on its device with
        keep="device"."""
        merged = self.merged_weight()
        device = "cpu" if keep == "cpu" else self.weight.device
        self._weight_before_merge = self.weight.detach().to(device, copy=True)
        self.weight.copy_(merged)
        self.merged_adapter = self.active_adapter

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the weight of before the merge back, bit for bit."""
        overwrite(self.weight, self._weight_before_merge)
        self._weight_before_merge = None
        self.merged_adapter = None

    @torch.no_grad()
    def restore_base(self) -> None:
        """Undoes what init_lora_weights="pissa" or "olora" did to the base weight, bit for bit."""
        if self._weight_before_init is not None:
            overwrite(self.weight, self._weight_before_init)
            self._weight_before_init = None

    @torch.no_grad()
    def swap_start(self) -> None:
        """Exchanges the weight with the one of before PiSSA or OLoRA changed it, where they did."""
        if self._weight_before_init is not None:
            current = self.weight.detach().to("cpu", copy=True)
            overwrite(self.weight, self._weight_before_init)
            self._weight_before_init = current

    def adapter_runs(self) -> bool:
        """Whether forward adds an update: there is an active adapter, neither disabled nor merged."""
        return self.active_adapter is not None and not self.adapters_disabled and self.merged_adapter is None

    def forward(self, x: Tensor) -> Tensor:
        """y = x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ with the active adapter, with DoRA what dora.py says; the base
        layer alone where none runs."""
        if not self.adapter_runs():
            self.count("base", NO_ADAPTER)
            return super().forward(x)
        return run_linear(self, x, self.linear_call(x))

    def count(self, path: str, reason: str | None) -> None:
        """Notes that a call took this path; a counter would break a graph that is being compiled."""
        if not torch.compiler.is_compiling():
            self.calls_by_path[path, reason] += 1

    def linear_call(self, x: Tensor) -> LinearCall | None:
        """What forward would compute now, or None where no adapter runs."""
        return self.call_with(self.matrix()) if self.adapter_runs() else None

    def call_with(self, weight: Tensor | PackedWeight) -> LinearCall:
        """What an op computes of this base weight and the active adapter."""
        name, children = self.active_adapter, self._modules  # past nn.Module.__getattr__, which is slow
        spec = self.adapter_specs[name]
        magnitude = children["lora_magnitude_vector"]._modules[name].weight if spec.use_dora else None
        return LinearCall(
            weight,
            self.bias,
            children["lora_A"]._modules[name].weight,
            children["lora_B"]._modules[name].weight,
            spec.scaling,
            spec.dropout_p if self.training else 0.0,
            self.backend,
            magnitude,
        )

    def fusion_path(self) -> tuple[str, str | None]:
        """The path that a call takes as the layer stands now, and why not Triton's."""
        if not self.adapter_runs():
            return "base", NO_ADAPTER
        reason = self.why_not_triton("lora_linear")
        return "torch" if reason else "triton", reason

    def why_not_triton(self, op: str) -> str | None:
        """None where this layer's calls of `op` take the Triton kernels, else the reason, outside autocast."""
        lora_A = self.lora_A[self.active_adapter].weight
        # A packed weight doesn't say what x will be in; the adapter is in that dtype or casts to it.
        dtype = lora_A.dtype if is_quantized(self) else self.weight.dtype
        return why_not_triton(self.backend, op, self.weight.device, dtype, lora_A.shape[0] // self.stacked)

    def extra_repr(self) -> str:
        base = super().extra_repr()
        adapters = ", ".join(f"{name}: r={spec.r}" for name, spec in self.adapter_specs.items())
        return f"{base}, adapters=({adapters}), active={self.active_adapter}"


class LoraLinear(LoraLayer, nn.Linear):
    """An nn.Linear with LoRA adapters: y = x Wᵀ + bias + scaling · drop(x) lora_Aᵀ lora_Bᵀ, base frozen.

    Made by `apply_lora`, not by hand. weight (N, K), lora_A.<name>.weight (R, K), lora_B.<name>.weight (N, R). Source:
    arXiv:2106.09685, section 4.1."""

    base_class = nn.Linear


def _hooks(module: nn.Module) -> tuple:
    hook = module.__dict__.get("_hf_hook")
    return tuple(getattr(hook, "hooks", (hook,)))


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's weights elsewhere between calls, and empty ones ("meta") in their place."""
    empty = any(p.device.type == "meta" for p in module.parameters(recurse=False))
    return empty and any(getattr(hook, "offload", False) for hook in _hooks(module))


def _execution_device(module: nn.Module) -> torch.device:
    """Where accelerate runs an offloaded module."""
    devices = (getattr(hook, "execution_device", None) for hook in _hooks(module))
    device = next(device for device in devices if device is not None)
    return torch.empty(0, device=device).device  # accelerate also writes a GPU as its number


def adapter_spec(config: LoraConfig, module_name: str, *, trainable: bool) -> AdapterSpec:
    """What `config` says for the module of this dotted name."""
    return AdapterSpec(
        r=config.rank_of(module_name),
        scaling=config.scaling_of(module_name),
        dropout_p=float(config.lora_dropout),
        trainable=trainable,
        use_dora=config.use_dora,
    )
