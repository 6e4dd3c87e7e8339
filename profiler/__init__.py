"""What each LoRA rank costs against full fine-tuning: `profile_ranks` measures on this machine, `estimate_memory`
predicts without weights or a GPU, a `Profile` answers.

The names are imported on first use, so that `lora-fast --help` waits for neither torch nor Transformers."""

import importlib

__all__ = ["Profile", "estimate_memory", "profile_ranks"]


_HOMES = {"Profile": "profile", "estimate_memory": "estimate", "profile_ranks": "sweep"}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"lora_fast.profiler.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
