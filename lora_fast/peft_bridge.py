"""accelerate_peft: the LoRA layers of an existing PEFT model made fast, in place."""

from collections import Counter

from torch import nn

from lora_fast.backend import triton_unsupported
from lora_fast.config import LoraFastError
from lora_fast.injection import FusionReport, FusionRow


def accelerate_peft(peft_model: nn.Module) -> FusionReport:
    """Makes PEFT's LoRA linears in `peft_model` fast, in place; prints and returns which of them run how, and why.

    peft_model: a PeftModel, PEFT's LoraModel or PeftMixedModel, a Transformers model with add_adapter, or any module
    around one (DDP); also after a Trainer was built on it. The layers stay PEFT's in everything but forward, and a call
    that the fast path does not cover (adapters disabled, merged or several active, DoRA, mixed batches, hooks, …) runs
    PEFT's own forward; `calls_by_path` says which calls did. Calling it again is harmless, and wanted after an adapter
    was added to layers that had none.
    Raises LoraFastError, with nothing changed, where peft is missing or no layer can be made fast."""
    if not isinstance(peft_model, nn.Module):
        inner = isinstance(getattr(peft_model, "model", None), nn.Module)
        raise LoraFastError(
            f"peft_model is a {type(peft_model).__name__}; expected a model with PEFT's LoRA layers"
            + (", such as its attribute `model`" if inner else "")
        )
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as e:
        raise LoraFastError(f"accelerate_peft needs peft, and importing it failed ({e}); pip install peft") from e
    # Imported here and not above: it imports peft, and `import lora_fast` must not.
    from lora_fast.peft_layers import FastForward, make_fast, read_adapter, swap_refusal

    layers = {name: module for name, module in peft_model.named_modules() if isinstance(module, BaseTunerLayer)}
    refusals = {name: swap_refusal(layer) for name, layer in layers.items()}
    swappable = [layer for name, layer in layers.items() if refusals[name] is None]
    # One usable adapter is enough: it may be active later, and what is refused now is asked again at each call.
    adapters = [read_adapter(layer, name) for layer in swappable for name in layer.lora_A]
    usable = any(not isinstance(adapter, str) for adapter in adapters)
    if not usable and not any(isinstance(layer, FastForward) for layer in swappable):
        found = Counter([*adapters, *filter(None, refusals.values())])
        raise LoraFastError(
            f"no layer of this {type(peft_model).__name__} can be made fast: "
            + ("; ".join(f"{n} times: {why}" for why, n in found.most_common()) or "it holds no PEFT layer")
        )
    for layer in swappable:
        make_fast(layer)
    report = FusionReport(tuple(_row(name, layer, refusals[name]) for name, layer in layers.items()))
    print(report)
    return report


def _row(name: str, layer: nn.Module, refusal: str | None) -> FusionRow:
    """The path that the layer takes as it stands now."""
    from lora_fast.peft_layers import base_refusal, read_layer

    adapter = refusal or read_layer(layer)
    if isinstance(adapter, str):
        return FusionRow(name, "peft", adapter)
    base = base_refusal(layer.base_layer)
    triton = triton_unsupported("lora_linear" if base is None else "lora_update")
    return FusionRow(name, "torch" if triton else "triton", "; ".join(filter(None, (base, triton))) or None)


def calls_by_path(peft_model: nn.Module) -> Counter[tuple[str, str | None]]:
    """How many calls of the layers made fast took which path, and why: {(path, reason): calls}.

    path: "lora_linear" (base and update in one op), "lora_update" (the base layer called as it is, the update fused)
    or "peft". Calls inside a compiled graph are not counted."""
    counters = (module.__dict__.get("calls_by_path", {}) for module in peft_model.modules())
    return sum(map(Counter, counters), Counter())
