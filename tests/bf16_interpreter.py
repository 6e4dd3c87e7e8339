"""Teaches Triton's interpreter to compute in bf16, so that what runs on a GPU in bf16 is tested without one.

The interpreter holds a bf16 number as 16 bits in NumPy's uint16, which has no such type, and computes with them as if
they were integers (triton issue 11584); a cast to bf16 cuts the last bits off where a GPU rounds. Arithmetic widens
them to fp32, where every bf16 number is exact, and rounds the fp32 result to the nearest bf16, ties to even, as a GPU
does; a dot adds up in fp32 as its tensor cores do. Sums and scans in bf16 are refused. What only moves numbers (loads,
stores, views, selects) was right before."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

from lora_fast import backend


def widened(bits: np.ndarray) -> np.ndarray:
    """The fp32 numbers that bf16 `bits` stand for: the same, with 16 zero bits behind them."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def rounded(numbers: np.ndarray) -> np.ndarray:
    """The bits of the bf16 number nearest to each of `numbers`, of two equally near the even one; NaN stays NaN."""
    numbers = np.asarray(numbers).astype(np.float32)
    bits = np.atleast_1d(numbers).view(np.uint32).astype(np.uint64)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), 0x7FC0, nearest.reshape(numbers.shape)).astype(np.uint16)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _as_fp32(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widened(handle.data), tl.float32) if _is_bf16(handle) else handle


def _in_fp32(method):
    """The builder's `method` of bf16 operands, through fp32; a comparison's result stays what it is."""

    def computed(self, *operands):
        handles = [operand for operand in operands if isinstance(operand, TensorHandle)]
        if not any(map(_is_bf16, handles)):
            return method(self, *operands)
        wide = [_as_fp32(operand) if isinstance(operand, TensorHandle) else operand for operand in operands]
        result = method(self, *wide)
        if result.data.dtype == np.bool_:
            return result
        return TensorHandle(rounded(result.data), tl.bfloat16)

    return computed


def _cast(method):
    def cast(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16 and not _is_bf16(src):
            return TensorHandle(rounded(src.data), tl.bfloat16)
        return method(self, _as_fp32(src) if dst_type.scalar != tl.bfloat16 else src, dst_type)

    return cast


def _fp_to_fp(method):
    def convert(self, src, dst_type, rounding_mode):
        if _is_bf16(src) or dst_type.scalar == tl.bfloat16:
            return self.cast_impl(src, dst_type)
        return method(self, src, dst_type, rounding_mode)

    return convert


def _dot(method):
    def dot(self, a, b, d, *settings):
        return method(self, _as_fp32(a), _as_fp32(b), d, *settings)

    return dot


def _refused(method):
    def added_up(self, input):
        if input.dtype.scalar == tl.bfloat16:
            raise NotImplementedError("a sum in bf16: on a GPU its rounding would depend on the tile; sum in fp32")
        return method(self, input)

    return added_up


def _patched_once(call):
    """Triton's `call` of a function from a kernel patches the language each time, in a quarter of all time. What a
    launch and the first such call have patched stays until the launch ends."""

    def called(self, *args, **kwargs):
        if any(tl.core.is_builtin(language.load) for language in (tl, tl.core)):
            return call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    return called


def install() -> None:
    """From here on the interpreter computes in bf16, and lora_fast lets it."""
    InterpretedFunction.__call__ = _patched_once(InterpretedFunction.__call__)
    for name, repaired in {
        **dict.fromkeys(("binary_op", "unary_op", "create_fma", "create_clampf"), _in_fp32),
        "cast_impl": _cast,
        "create_fp_to_fp": _fp_to_fp,
        "create_dot": _dot,
    }.items():
        setattr(InterpreterBuilder, name, repaired(getattr(InterpreterBuilder, name)))
    # Constants, which triton 3.6 has none of.
    InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(rounded([value]), tl.bfloat16)
    for operations, name in ((ReduceOps, "sum"), (ScanOps, "cumsum"), (ScanOps, "cumprod")):
        setattr(operations, name, _refused(getattr(operations, name)))
    backend.INTERPRETED_DTYPES = (*backend.INTERPRETED_DTYPES, torch.bfloat16)
