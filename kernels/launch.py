"""Launches a kernel as `kernel[grid](…)` does, in a fraction of the host's time.

To find the compiled kernel of a call Triton looks at every argument, describes all of them in a string and looks that
up: 10 to 25 µs a launch, as long as a small kernel runs, and a training step has a dozen launches for every layer. Here
it is looked up by the arguments themselves, in a fraction of that time. What Triton compiles depends on the dtypes of
tensors and whether 16 divides their addresses, on whether numbers are 1, divisible by 16 or beyond 32 bits, on
constants, and on the GPU. The key holds all of it, numbers and addresses finer than need be; a call whose key was not
seen before goes Triton's way.

On AMD's GPUs the size of a tensor's memory counts too: there every launch goes Triton's way, as it does while somebody
wants to see launches (Triton's hooks, which its profiler uses)."""

from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# Batches of ever new lengths would fill the memory with keys: beyond so many all are forgotten.
MOST_KEYS = 8192
# {key: (kernel, compiled kernel, its function, its settings, constants)}. With the kernel itself kept, no other can
# come to have its id.
_compiled: dict[tuple, tuple[JITFunction, CompiledKernel, Any, Any, tuple]] = {}


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉. triton.cdiv, which kernels can call too, takes 2 µs of a host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()


def _kind(operand: Any) -> Any:
    """What the compiled kernel depends on of a tensor, a descriptor, a tuple of them, or None."""
    if operand is None:
        return None
    if isinstance(operand, Tensor):
        return operand.dtype, operand.data_ptr() & 15
    if type(operand) is TensorDescriptor:  # its base is aligned; sizes and strides are numbers to the kernel
        return operand.base.dtype, *operand.block_shape
    return tuple(map(_kind, operand))


def launch(kernel: JITFunction, grid: tuple[int, ...], operands: tuple, numbers: tuple, **constants: Any) -> None:
    """kernel[grid](*operands, *numbers, **constants), for a grid of one or two dimensions and a kernel whose parameters
    are, in this order, tensors (descriptors, tuples of tensors, None), numbers (tuples of numbers), and constants, with
    num_warps and the like among the last."""
    # Not in the interpreter, nor where launches are only recorded, for a GPU that isn't there.
    direct = type(kernel) is JITFunction and torch.cuda.is_initialized() and not torch.version.hip
    if not direct:
        kernel[grid](*operands, *numbers, **constants)
        return
    device = torch.cuda.current_device()
    key = (id(kernel), device, numbers, tuple(map(_kind, operands)), tuple(constants.values()))
    found = _compiled.get(key)
    if found is not None and not knobs.runtime.launch_enter_hook.calls and not knobs.runtime.launch_exit_hook.calls:
        _, compiled, function, settings, last = found
        x, y = grid if len(grid) == 2 else (grid[0], 1)
        stream = driver.active.get_current_stream(device)
        compiled.run(x, y, 1, stream, function, settings, None, None, None, *operands, *numbers, *last)
        return
    compiled = kernel[grid](*operands, *numbers, **constants)
    if isinstance(compiled, CompiledKernel):
        if len(_compiled) >= MOST_KEYS:
            _compiled.clear()
        names = [parameter.name for parameter in kernel.params][len(operands) + len(numbers) :]
        last = tuple(constants[name] for name in names)
        _compiled[key] = kernel, compiled, compiled.function, compiled.packed_metadata, last
