"""Which implementation of an op runs, and why not the other: one function, a sentence for every refusal."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from lora_fast.config import LoraFastError

BACKENDS = ("auto", "triton", "torch")
# Beyond it a rank's factors no longer fit beside a tile of the matrix product, and an update of that rank is hardly
# cheaper than a dense one.
MAX_RANK = 512
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Its bf16 arithmetic is wrong (triton issue 11584); the tests repair it.
INTERPRETED_DTYPES = (torch.float16, torch.float32)


@cache
def _triton_reason() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    return None


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    if _triton_reason() is not None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def triton_unsupported(op: str, device: torch.device, dtype: torch.dtype, rank: int) -> str | None:
    """None where Triton kernels can run `op` on tensors of this device and dtype with this rank, else the reason as a
    sentence.

    A CPU tensor can run in Triton's interpreter only, and never by itself: backend="auto" leaves CPU tensors to
    PyTorch."""
    if device.type == "cuda":
        return _gpu_unsupported(op, device.index, dtype, rank)
    if reason := _triton_reason():
        return reason
    if device.type != "cpu":
        return f"Triton kernels run on a GPU, the tensors are on {device.type}"
    if not interpreted():
        return "the tensors are on the CPU"
    if dtype == torch.bfloat16 and dtype not in INTERPRETED_DTYPES:
        return "Triton's interpreter computes bf16 wrongly"
    return _kernels_unsupported(op, dtype, rank)


@cache  # asked at each call of each layer
def _gpu_unsupported(op: str, index: int | None, dtype: torch.dtype, rank: int) -> str | None:
    if reason := _triton_reason():
        return reason
    from lora_fast.kernels.devices import gpu_capability  # not at the top: without Triton there is none

    major, minor = gpu_capability(index)
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}; 8.0 or newer is needed"
    return _kernels_unsupported(op, dtype, rank)


def _kernels_unsupported(op: str, dtype: torch.dtype, rank: int) -> str | None:
    if dtype not in _DTYPES:
        return f"{op} computes in {dtype}; the kernels take bf16, fp16 and fp32"
    if rank > MAX_RANK:
        return f"r={rank} is above {MAX_RANK}"
    return None


def check_backend(backend: str) -> None:
    """Raises LoraFastError where `backend` is unknown."""
    if backend not in BACKENDS:
        raise LoraFastError(f"backend={backend!r}; expected one of {', '.join(map(repr, BACKENDS))}")


def why_not_triton(backend: str, op: str, device: torch.device, dtype: torch.dtype, rank: int) -> str | None:
    """None where a call with this `backend` takes the Triton kernels, else why it takes PyTorch."""
    if backend == "torch":
        return "backend='torch' was asked for"
    if backend == "auto" and device.type == "cpu":
        return "the tensors are on the CPU"
    return triton_unsupported(op, device, dtype, rank)


# What torch.compiler.assume_constant_result sets, without its import of the compiler: evaluated while tracing, since it
# asks Triton and the driver, which no graph can.
why_not_triton._dynamo_marked_constant = True


def runs_triton(backend: str, op: str, x: Tensor, rank: int) -> bool:
    """Whether this call takes the Triton kernels. Raises LoraFastError with the reason where backend='triton' and they
    can't run it."""
    reason = why_not_triton(backend, op, x.device, x.dtype, rank)
    if reason and backend == "triton":
        raise LoraFastError(f"backend='triton': {reason}; use backend='auto'")
    return reason is None
