"""LoRA on Transformers' Conv1D, GPT-2's linear layer with its weight stored (K, N)."""

from transformers.pytorch_utils import Conv1D

from lora_fast.linear import LoraLayer


class LoraConv1D(LoraLayer, Conv1D):
    """A Conv1D with LoRA adapters: y = x W + bias + scaling · drop(x) lora_Aᵀ lora_Bᵀ, base frozen.

    weight (K, N); lora_A.<name>.weight (R, K) and lora_B.<name>.weight (N, R), as for a LoraLinear."""

    base_class = Conv1D
    fan_in_fan_out = True

    def __repr__(self) -> str:
        adapters = ", ".join(f"{name}: r={spec.r}" for name, spec in self.adapter_specs.items())
        return f"LoraConv1D(nf={self.nf}, nx={self.nx}, adapters=({adapters}), active={self.active_adapter})"
