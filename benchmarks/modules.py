"""The same frozen layers as modules with adapters: ours by apply_lora, PEFT's own, PEFT's made fast in place."""

import contextlib
import io
from collections.abc import Callable, Mapping

import peft
import torch
from baselines import Layer
from timing import Arm
from torch import Tensor, nn

from lora_fast import LoraConfig, accelerate_peft, apply_lora


def linear(weight: Tensor) -> nn.Linear:
    """A frozen nn.Linear around this very weight (N, K)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def injected(model: nn.Module, names: list[str], rank: int, dropout: float) -> nn.Module:
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=names)
    return apply_lora(model, config).train()


def peft_model(
    model: nn.Module, names: list[str], rank: int, dropout: float, *, fp32_adapters: bool = True
) -> nn.Module:
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=names)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=fp32_adapters).train()


def accelerated(model: nn.Module, names: list[str], rank: int, dropout: float) -> nn.Module:
    model = peft_model(model, names, rank, dropout)
    with contextlib.redirect_stdout(io.StringIO()):  # its report, once for each case
        accelerate_peft(model)
    return model


@torch.no_grad()
def with_factors(model: nn.Module, layers: Mapping[str, Layer]) -> list[Tensor]:
    """Copies the layers' factors into the adapters of those names; returns every lora_A, then every lora_B."""
    As, Bs = [], []
    for name, layer in layers.items():
        (module,) = (m for n, m in model.named_modules() if n.rpartition(".")[2] == name and hasattr(m, "lora_A"))
        As.append(module.lora_A["default"].weight)
        Bs.append(module.lora_B["default"].weight)
        As[-1].copy_(layer.lora_A)
        Bs[-1].copy_(layer.lora_B)
    return [*As, *Bs]


def module_arms(
    build: Callable[[], nn.Module], layers: Mapping[str, Layer], dropout: float, exact: Arm | None
) -> dict[str, Arm]:
    """The arms that are modules; build() makes a fresh frozen module around the layers' weights, which names them so.

    scaling must be 2."""
    names, rank = list(layers), next(iter(layers.values())).lora_A.shape[0]
    arguments = names, rank, dropout
    models = {
        "lora_fast apply_lora": injected(build(), *arguments),
        "lora_fast accelerate_peft": accelerated(build(), *arguments),
        "peft": peft_model(build(), *arguments),
        "peft bf16 adapters": peft_model(build(), *arguments, fp32_adapters=False),
    }
    return {name: Arm(model, with_factors(model, layers), exact=exact) for name, model in models.items()}
