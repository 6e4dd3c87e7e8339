"""Which implementation of an op runs, and why not the other: one function, a sentence for every refusal."""

from lora_fast.config import LoraFastError

BACKENDS = ("auto", "triton", "torch")

# Ops that have a Triton kernel. Everything else runs in PyTorch, and fusion_report says so.
_TRITON_OPS: frozenset[str] = frozenset()


def triton_unsupported(op: str) -> str | None:
    """None where Triton kernels can run `op`, else the reason as a sentence."""
    if op not in _TRITON_OPS:
        return f"{op} has no Triton kernel in this version of lora-fast; it runs in PyTorch"
    return None


def check_backend(backend: str, op: str = "lora_linear") -> None:
    """Raises LoraFastError where `backend` is unknown, or asks for Triton where Triton can't run `op`."""
    if backend not in BACKENDS:
        raise LoraFastError(f"backend={backend!r}; expected one of {', '.join(map(repr, BACKENDS))}")
    if backend == "triton" and (reason := triton_unsupported(op)):
        raise LoraFastError(f"backend='triton': {reason}; use backend='auto'")
