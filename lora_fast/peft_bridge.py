"""accelerate_peft: the LoRA layers of an existing PEFT model made fast, in place."""

from collections import Counter

from torch import nn

from lora_fast.backend import check_backend
from lora_fast.config import LoraFastError
from lora_fast.distributed import distribution_of
from lora_fast.fusion import FusionReport, FusionRow, calls_by_path, mlp_rows
from lora_fast.quantized import keep_packing
from lora_fast.shared_input import find_groups
from lora_fast.swiglu_mlp import fuse_mlps


def accelerate_peft(peft_model: nn.Module, *, backend: str = "auto") -> FusionReport:
    """Makes PEFT's LoRA linears in `peft_model` fast, in place; prints and returns which of them run how, and why.

    peft_model: a PeftModel, PEFT's LoraModel or PeftMixedModel, a Transformers model with add_adapter, or any module
    around one (DDP); also after a Trainer was built on it. The layers stay PEFT's in everything but forward, and a call
    that the fast path does not cover (adapters disabled, merged or several active, mixed batches, hooks, …) runs
    PEFT's own forward; `fusion_report` says which calls did. Calling it again is harmless, and wanted after an adapter
    was added to layers that had none. backend: "auto", "torch" or "triton" (a call raises where Triton can't run).
    Raises LoraFastError, with nothing changed, where peft is missing, no layer can be made fast, all that could be are
    merged, or the model is sharded over processes already."""
    check_backend(backend)
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
    adapters = [(layer, read_adapter(layer, name)) for layer in swappable for name in layer.lora_A]
    usable = [layer for layer, adapter in adapters if not isinstance(adapter, str)]
    again = any(isinstance(layer, FastForward) for layer in swappable)
    if usable and not again and all(layer.merged_adapters for layer in usable):
        raise LoraFastError(
            f"the adapters of this {type(peft_model).__name__} are merged into the base weights: there is no work of "
            "theirs left to make fast; unmerge them first, with peft_model.unmerge_adapter()"
        )
    # FullyShardedDataParallel shows flat pieces of the factors; DTensors are refused above, with a reason of their own.
    told = distribution_of(peft_model) or ""
    if not again and ("FullySharded" in told or ("DTensor" in told and not usable)):
        raise LoraFastError(f"peft_model is {told}; accelerate it first, then distribute it")
    if not usable and not again:
        found = Counter([*(adapter for _, adapter in adapters), *filter(None, refusals.values())])
        raise LoraFastError(
            f"no layer of this {type(peft_model).__name__} can be made fast: "
            + ("; ".join(f"{n} times: {why}" for why, n in found.most_common()) or "it holds no PEFT layer")
        )
    for layer in swappable:
        make_fast(layer, backend)
    keep_packing(peft_model)
    find_groups(peft_model)
    fuse_mlps(peft_model)
    rows = tuple(_row(name, layer, refusals[name]) for name, layer in layers.items())
    report = FusionReport(rows, mlp_rows(peft_model), calls_by_path(peft_model))
    print(report)
    return report


def _row(name: str, layer: nn.Module, refusal: str | None) -> FusionRow:
    """The path that the layer takes as it stands now."""
    return FusionRow(name, *(("peft", refusal) if refusal else layer.fusion_path()))
