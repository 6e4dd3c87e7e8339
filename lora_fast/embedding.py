"""LoRA on embeddings: y = W[ids] + scaling · lora_Aᵀ[ids] lora_Bᵀ, a lookup in each table and one small product.

An embedding is a linear layer of one-hot rows, its weight stored (K, N) = (V, D): V words, D numbers for each. So the
factors are lora_A (R, V) and lora_B (D, R), as PEFT stores them. The work is a lookup and a product over R, the same on
every device: it has no kernel of its own, and no dropout, as in PEFT."""

import inspect
import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_fast.config import LoraFastError
from lora_fast.dispatch import in_dtype, is_plain_matrix, without_autocast
from lora_fast.linear import NO_ADAPTER, AdapterSpec, LoraLayer
from lora_fast.shared_input import LinearCall

# The only way in which the forward of a subclass may get at its rows, and all that it may ask of the table itself.
_LOOKUP = re.compile(r"\bsuper\(\)\.forward\(")
_TABLE = re.compile(r"\bself\.weight\b(?!\.(device|dtype|shape|size)\b)")
_NO_GRADIENT = re.compile(r"\b(no_grad|inference_mode)\b")


class LoraEmbedding(LoraLayer, nn.Embedding):
    """An nn.Embedding with LoRA adapters: y = W[ids] + scaling · lora_Aᵀ[ids] lora_Bᵀ, base frozen.

    Made by `apply_lora`, not by hand. ids (...) → y (..., D); weight (V, D), lora_A.<name>.weight (R, V),
    lora_B.<name>.weight (D, R). A subclass that scales or normalizes what nn.Embedding's forward returns does so to
    W + ΔW, its own class standing before this one. Source: arXiv:2106.09685, section 4.1, for the one-hot rows."""

    base_class = nn.Embedding
    fan_in_fan_out = True

    def forward(self, input: Tensor) -> Tensor:
        base = nn.Embedding.forward(self, input)
        if not self.adapter_runs():
            self.count("base", NO_ADAPTER)
            return base
        self.count("lora_embedding", None)
        name = self.active_adapter
        lora_A, lora_B = self.lora_A[name].weight, self.lora_B[name].weight
        if lora_A.shape[1] != self.weight.shape[0]:
            raise LoraFastError(
                f"lora_A has V={lora_A.shape[1]}, the embedding has V={self.weight.shape[0]}: it was resized after "
                "its adapter was put in; resize first, then apply_lora"
            )
        s = F.embedding(input, lora_A.t(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        s, b = in_dtype(s.reshape(-1, s.shape[-1]), base.dtype), in_dtype(lora_B, base.dtype)
        # Autocast would round the base's rows, which a lookup does not.
        with without_autocast(base.device):
            y = torch.addmm(base.reshape(-1, base.shape[-1]), s, b.t(), alpha=self.adapter_specs[name].scaling)
        return y.view(base.shape)

    def random_factors(self, spec: AdapterSpec, init: bool | str, device: str) -> tuple[nn.Linear, nn.Linear]:
        """As PEFT starts an embedding's: A zero and B normal, whichever of its random starts `init` is; both normal
        where the update is not to be zero."""
        a = torch.randn(spec.r, self.num_embeddings, device=device)
        b = torch.randn(self.embedding_dim, spec.r, device=device)
        if init is not False:
            a.zero_()
            b.normal_()
        return _holding(a), _holding(b)

    def linear_call(self, x: Tensor) -> LinearCall | None:
        return None

    def fusion_path(self) -> tuple[str, str | None]:
        return ("torch", "an embedding is looked up") if self.adapter_runs() else ("base", NO_ADAPTER)


def _holding(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer


def embedding_refusal(module: nn.Embedding) -> str | None:
    """Why this embedding can't carry an adapter, or None."""
    if not is_plain_matrix(module._parameters.get("weight"), (module.num_embeddings, module.embedding_dim)):
        return "its weight is no plain floating-point table (num_embeddings, embedding_dim)"
    if module.max_norm is not None:
        return "it renormalizes its rows as it reads them (max_norm)"
    for kind in type(module).__mro__:
        if kind is nn.Embedding:
            return None
        if "forward" in vars(kind) and (reason := _forward_refusal(source_of(kind.forward))):
            return f"{kind.__name__}.forward {reason}"
    return None


def _forward_refusal(source: str) -> str | None:
    """Why a forward of this source takes no update, or None where it has all rows from the class above it, and its
    gradients too."""
    if not _LOOKUP.search(source) or _TABLE.search(source):
        return "reads the table itself, past the lookup that the update is added to"
    return "records no gradient, so that nothing would be trained" if _NO_GRADIENT.search(source) else None


def source_of(what: object) -> str:
    """The source of a function or a class, "" where there is none."""
    try:
        return inspect.getsource(what)
    except (OSError, TypeError):
        return ""
