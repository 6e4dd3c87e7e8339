"""What each LoRA rank costs on this machine, against full fine-tuning: `profile_ranks` measures, a `Profile` answers.

Both names are imported on first use, so that `lora-fast --help` waits for neither torch nor Transformers."""

__all__ = ["Profile", "profile_ranks"]


def __getattr__(name: str):
    if name in __all__:
        from lora_fast.profiler import sweep

        return getattr(sweep, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
