"""lora-fast: LoRA layers in place of PEFT's, and the measured cost of every rank against full fine-tuning.

Names are imported on first use, so that `lora-fast --help` does not wait for torch."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_fast.adapter_updates import adapter_factors
    from lora_fast.checkpoint import load_adapter, save_adapter
    from lora_fast.config import LoraConfig, LoraFastError, LoraFastWarning
    from lora_fast.decision import Decision, decide
    from lora_fast.delta import delta_spectra
    from lora_fast.extract import extract_adapter
    from lora_fast.fusion import FusionReport, fusion_report
    from lora_fast.grouped import lora_grouped_linear
    from lora_fast.injection import apply_lora, lora_parameters, remove_lora, set_adapter
    from lora_fast.linear import LoraLinear
    from lora_fast.merging import disable_adapters, merge_lora, unmerge_lora
    from lora_fast.mlp import lora_swiglu_mlp
    from lora_fast.ops import lora_linear, lora_linears, lora_update
    from lora_fast.peft_bridge import accelerate_peft
    from lora_fast.rank_rules import RankSuggestion, lora_parameter_count, rank_for_budget, suggest_rank
    from lora_fast.rank_search import RankSearch, search_rank
    from lora_fast.resize import ResizeReport, merge_adapters, resize_adapter
    from lora_fast.spectrum import Reading, Spectrum, kept_energy, ranks_for, readings
    from lora_fast.svd import lora_svd, lora_svdvals
    from lora_fast.update_spectra import (
        adapter_spectra,
        amplification_factor,
        intruder_dimensions,
        subspace_similarity,
    )

__version__ = "0.1.0"

__all__ = [
    "Decision",
    "FusionReport",
    "LoraConfig",
    "LoraFastError",
    "LoraFastWarning",
    "LoraLinear",
    "RankSearch",
    "RankSuggestion",
    "Reading",
    "ResizeReport",
    "Spectrum",
    "accelerate_peft",
    "adapter_factors",
    "adapter_spectra",
    "amplification_factor",
    "apply_lora",
    "decide",
    "delta_spectra",
    "disable_adapters",
    "extract_adapter",
    "fusion_report",
    "intruder_dimensions",
    "kept_energy",
    "load_adapter",
    "lora_grouped_linear",
    "lora_linear",
    "lora_linears",
    "lora_parameter_count",
    "lora_parameters",
    "lora_svd",
    "lora_svdvals",
    "lora_swiglu_mlp",
    "lora_update",
    "merge_adapters",
    "merge_lora",
    "rank_for_budget",
    "ranks_for",
    "readings",
    "remove_lora",
    "resize_adapter",
    "save_adapter",
    "search_rank",
    "set_adapter",
    "subspace_similarity",
    "suggest_rank",
    "unmerge_lora",
]

_HOMES = {
    "adapter_updates": ("adapter_factors",),
    "checkpoint": ("load_adapter", "save_adapter"),
    "config": ("LoraConfig", "LoraFastError", "LoraFastWarning"),
    "decision": ("Decision", "decide"),
    "delta": ("delta_spectra",),
    "extract": ("extract_adapter",),
    "fusion": ("FusionReport", "fusion_report"),
    "grouped": ("lora_grouped_linear",),
    "injection": ("apply_lora", "lora_parameters", "remove_lora", "set_adapter"),
    "linear": ("LoraLinear",),
    "merging": ("disable_adapters", "merge_lora", "unmerge_lora"),
    "mlp": ("lora_swiglu_mlp",),
    "ops": ("lora_linear", "lora_linears", "lora_update"),
    "peft_bridge": ("accelerate_peft",),
    "rank_rules": ("RankSuggestion", "lora_parameter_count", "rank_for_budget", "suggest_rank"),
    "rank_search": ("RankSearch", "search_rank"),
    "resize": ("ResizeReport", "merge_adapters", "resize_adapter"),
    "spectrum": ("Reading", "Spectrum", "kept_energy", "ranks_for", "readings"),
    "svd": ("lora_svd", "lora_svdvals"),
    "update_spectra": (
        "adapter_spectra",
        "amplification_factor",
        "intruder_dimensions",
        "subspace_similarity",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str):
    if name in _HOME_OF:
        return getattr(import_module(f"lora_fast.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
