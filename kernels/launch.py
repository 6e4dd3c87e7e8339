"""Launches kernels as `kernel[grid](…)` does, in a fraction of the host's time.

To find the compiled kernel of a call Triton looks at every argument, describes all of them in a string and looks that
up, which takes as long as a small kernel runs, and a training step has a dozen launches for every layer. What it
compiles depends on numbers (whether one is 1, divisible by 16 or beyond 32 bits), on constants, on the dtypes of
tensors and whether 16 divides their addresses, and on the GPU. Here a `Launch` holds all that a call has beside its
tensors, made once for the sizes at hand, and looks its compiled kernel up by what is left: dtypes, addresses, GPU. What
it has not met yet goes Triton's way.

So does every launch on AMD's GPUs, where the size of a tensor's memory counts too, and every launch while somebody
wants to see them (Triton's hooks, which its profiler uses)."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉. triton.cdiv, which kernels can call too, is slow on a host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()


def plan(function: Callable) -> Callable:
    """Remembers what `function` makes of sizes, so that a launcher works it out once: of 4096 calls, so that batches of
    ever new lengths don't fill the memory."""
    return lru_cache(maxsize=4096)(function)


class Launch:
    """kernel[grid](*operands, *numbers, **constants) but for the operands, with which it is called: tensors, tensor
    descriptors, tuples of tensors, or None.

    The kernel's parameters are operands, numbers (or tuples of them) and constants, in this order; grid has one or two
    dimensions; num_warps and the like are among the last of the constants."""

    __slots__ = ("_compiled", "_xy", "constants", "grid", "kernel", "numbers")

    def __init__(self, kernel: JITFunction, grid: tuple[int, ...], numbers: tuple, **constants: Any) -> None:
        self.kernel, self.grid, self.numbers, self.constants = kernel, grid, numbers, constants
        self._xy = grid if len(grid) == 2 else (*grid, 1)
        self._compiled: dict[tuple, tuple[CompiledKernel, Any, Any, tuple]] = {}

    def __call__(self, *operands: Any) -> None:
        if self._compiled and not _watched(knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
            device = torch.cuda.current_device()
            found = self._compiled.get((device, _kinds(operands)))
            if found is not None:
                compiled, function, settings, rest = found
                stream = driver.active.get_current_stream(device)
                compiled.run(*self._xy, 1, stream, function, settings, None, None, None, *operands, *rest)
                return
        compiled = self.kernel[self.grid](*operands, *self.numbers, **self.constants)
        # None in the interpreter, and where launches are only recorded, for a GPU that isn't there.
        if isinstance(compiled, CompiledKernel) and not torch.version.hip:
            names = [parameter.name for parameter in self.kernel.params][len(operands) + len(self.numbers) :]
            rest = *self.numbers, *(self.constants[name] for name in names)
            # With the compiled kernel itself, whose end would unload the function.
            found = compiled, compiled.function, compiled.packed_metadata, rest
            self._compiled[torch.cuda.current_device(), _kinds(operands)] = found


# launch(kernel, grid, numbers, **constants)(*operands), where no plan keeps the Launch.
launch = plan(Launch)


def _watched(enter: Any, leave: Any) -> bool:
    """Whether one of Triton's hooks is set: None, a function, or a chain of them, which may be empty."""
    return bool(getattr(enter, "calls", enter)) or bool(getattr(leave, "calls", leave))


def _kinds(operands: tuple) -> tuple:
    """What the compiled kernel depends on of its operands; of an address, finer than need be, what 16 leaves of it."""
    kinds: list[Any] = []
    for operand in operands:
        # By its type, and not by isinstance, which asks PyTorch of all that is no tensor, for longer than all of this.
        kind = type(operand)
        if operand is None:
            kinds.append(None)
        elif kind is tuple:
            kinds.append(_kinds(operand))
        elif kind is TensorDescriptor:  # its base is aligned; sizes and strides are numbers to the kernel
            kinds += operand.base.dtype, *operand.block_shape
        else:
            kinds += operand.dtype, operand.data_ptr() & 15
    return tuple(kinds)
