"""Runs every launcher before a GPU that does nothing: python tests/launches.py. Needs no GPU, and no pytest.

What `kernels/launch.py` launches by itself is held against Triton's own way: the same arguments in the same order, for
the very kernel that Triton looks up for them, whatever dtypes, sizes and addresses were launched before. Prints what
was compared; the exit status is 1 where something differs, or where no launch was direct."""

import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "unset TRITON_INTERPRET: it decides what @triton.jit makes"

import torch
import triton
import triton.language as tl
from offline import CASES, TARGETS
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_fast.kernels import adapter_grads, factors, gemm_lora, partials, scale_columns, shrink, swiglu
from lora_fast.kernels.launch import Launch

TARGET = TARGETS["sm_90"]
# Of what a compiled kernel is run with, so many come before the kernel's own arguments: grid, stream, function, …
BEFORE = 9
STREAM = 7


class Compiled(CompiledKernel):
    """In the place of what Triton would compile; keeps what it is launched with."""

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel, self.function, self.packed_metadata = kernel, object(), object()
        self.settings: dict[str, Any] = {}

    def launch_metadata(self, grid, stream, *arguments) -> None:
        return None

    @property
    def run(self) -> Callable:
        return lambda *arguments: launched.append((self, arguments))


launched: list[tuple[Compiled, tuple]] = []
asked: Counter = Counter()  # by kernel: what went Triton's way
_run = JITFunction.run


def watched_run(kernel, *arguments, grid, warmup, **settings):
    asked[kernel.__name__] += 1
    compiled = _run(kernel, *arguments, grid=grid, warmup=warmup, **settings)
    names = [parameter.name for parameter in kernel.params]
    compiled.settings = {name: value for name, value in settings.items() if name not in names}
    return compiled


def compile(kernel, key, *rest):
    compiled = kernel.device_caches[0][0][key] = Compiled(kernel)
    return compiled


def taken() -> tuple[list[tuple[Compiled, tuple]], Counter]:
    """What was launched since the last call of this function, and what of it went Triton's way."""
    found = list(launched), Counter(asked)
    launched.clear()
    asked.clear()
    return found


def told(argument: Any) -> Any:
    """What has to be alike in two launches of one call; memory made by the launcher is new each time."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.shape, argument.stride()
    if isinstance(argument, TensorDescriptor):
        return told(argument.base), argument.block_shape
    return tuple(map(told, argument)) if isinstance(argument, tuple) else argument


def compare(call: Callable[[], Any]) -> tuple[int, list[str]]:
    """Launches of the second of two like calls, and what is wrong with them."""
    call()
    first, _ = taken()
    call()
    second, by_triton = taken()
    wrong = [f"{name} goes Triton's way again" for name in by_triton]
    by_ways = [[(args[:3], told(args[BEFORE:])) for _, args in launches] for launches in (first, second)]
    if by_ways[0] != by_ways[1]:
        wrong.append("another grid or other arguments than by Triton")
    for compiled, arguments in second:
        kernel, (x, y, z, stream, function, settings, *hooks) = compiled.kernel, arguments[:BEFORE]
        if (stream, function, settings) != (STREAM, compiled.function, compiled.packed_metadata) or any(hooks):
            wrong.append(f"{kernel.__name__}: {arguments[:BEFORE]}")
        if watched_run(kernel, *arguments[BEFORE:], grid=(x, y, z), warmup=False, **compiled.settings) is not compiled:
            wrong.append(f"{kernel.__name__}: not the kernel that Triton takes")
    taken()
    return len(second), wrong


def shipped() -> Counter:
    """{kernel file: launches compared} of every case that is compiled for sm_90; raises where something differs."""
    compared: Counter = Counter()
    for file, cases in CASES.items():
        for case in cases("sm_90"):
            count, wrong = compare(lambda case=case: case.call(TARGET.capability))
            assert not wrong, f"{file}: {case.label}: {wrong}"
            compared[file] += count
    return compared


def drawn_calls(draw: random.Random) -> list[Callable[[], Any]]:
    """A call of each launcher that trains, with random sizes, dtypes and addresses."""

    def matrix(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Contiguous rows, maybe longer than its own, at an address that 16 may or may not divide."""
        offset, wide = draw.choice((0, 0, 1, 8)), columns + draw.choice((0, 0, 1, 16))
        return torch.empty(offset + rows * wide, dtype=dtype)[offset:].view(rows, wide)[:, :columns]

    M, N, K = (draw.choice((1, 16, 17, 48, 2048)) for _ in range(3))
    R, dtype = draw.choice((1, 8, 16)), draw.choice((torch.bfloat16, torch.float16, torch.float32))
    x, weight, s, a, b = (matrix(*size, dtype) for size in ((M, K), (N, K), (M, R), (R, K), (N, R)))
    dy, g, u, a_down = (matrix(*size, dtype) for size in ((M, N), (M, N), (M, N), (R, N)))
    lora_A, parts, total = matrix(R, K, torch.float32), torch.empty(3, M, N), matrix(M, N, dtype)
    seed, mask = torch.zeros(1, dtype=torch.int64), torch.empty(M, -(-N // 8), dtype=torch.uint8)
    others = [matrix(*size, dtype) for size in ((M, N), (N, K), (M, R))]
    masks = torch.empty(2, M, -(-K // 8), dtype=torch.uint8)
    factor, bias = matrix(1, N, torch.float32)[0], draw.choice((None, matrix(1, N, dtype)[0]))
    kind = {"capability": draw.choice(((8, 0), (9, 0)))}

    def two_masked_products(ranks: tuple[int, int]) -> Callable[[], Tensor]:
        ds, both = matrix(M, sum(ranks), dtype), matrix(sum(ranks), K, dtype)
        xs, ws = [dy, others[0]], [weight, others[1]]
        return lambda: gemm_lora.gemm_lora_sum(xs, ws, ds, both, ranks=ranks, masks=tuple(masks), **kind)

    return [
        lambda: gemm_lora.gemm_lora(x, weight.t(), s, b.t(), **kind),
        lambda: gemm_lora.gemm_lora(dy, weight, s, a, **kind),
        lambda: gemm_lora.gemm_lora(None, None, s, b.t(), accumulate=dy, mask=mask, **kind),
        lambda: shrink.shrink(x, a, **kind),
        lambda: shrink.shrink(x, a, (R,), seed=seed, dropout_p=0.1, **kind),
        lambda: adapter_grads.grad_s_and_b(dy, b, s, 2.0, **kind),
        lambda: adapter_grads.grad_a(s, x, **kind),
        lambda: factors.cast_factors([([lora_A], [b], [0.5])], dtype),
        two_masked_products((5, 3)),
        two_masked_products((3, 5)),
        lambda: partials.add_up([partials.Sum(parts, total)]),
        lambda: partials.add_up([partials.Sum(parts, total), partials.Sum(parts, total, 2.0)]),
        lambda: swiglu.swiglu_shrink(g, u, a_down, **kind),
        lambda: swiglu.swiglu_backward(dy, g, u, s, s, None, **kind),
        lambda: scale_columns.scale_columns(u, factor, bias),
        lambda: scale_columns.scale_columns_backward(dy, u, factor),
    ]


def drawn(rounds: int) -> int:
    """Launches compared in so many rounds of `drawn_calls`; raises where something differs."""
    draw, count = random.Random(0), 0
    for number in range(rounds):
        for place, call in enumerate(drawn_calls(draw)):
            launches, wrong = compare(call)
            assert not wrong, f"round {number}, call {place}: {wrong}"
            count += launches
    return count


def watchers_see(call: Callable[[], Any]) -> None:
    """With a hook of Triton's, for a profiler, say, every launch goes Triton's way; without one, none."""
    compare(call)
    hook, chain = (lambda metadata: None), knobs.runtime.launch_enter_hook

    def launches() -> tuple[int, int]:
        call()
        seen, by_triton = taken()
        return len(seen), by_triton.total()

    chain.add(hook)
    with_hook = launches()
    chain.remove(hook)
    knobs.runtime.launch_enter_hook = hook  # as one may set it too
    with_function = launches()
    knobs.runtime.launch_enter_hook = None
    without = launches()
    knobs.runtime.launch_enter_hook = chain
    count = with_hook[0]
    assert with_hook == with_function == (count, count) and without == launches() == (count, 0) and count, with_hook


@triton.jit
def _any_kernel(operand, number, WIDTH: tl.constexpr):
    pass


def descriptors_differ() -> None:
    """One launch given descriptors of several dtypes and blocks takes a kernel of its own for each."""
    launch = Launch(_any_kernel, (1,), (5,), WIDTH=16)
    descriptors = [
        TensorDescriptor.from_tensor(torch.empty(64, 64, dtype=dtype), block)
        for dtype in (torch.bfloat16, torch.float16)
        for block in ([16, 16], [16, 32])
    ]
    for descriptor in (*descriptors, *descriptors):
        launch(descriptor)
    seen, by_triton = taken()
    kernels = [compiled for compiled, _ in seen]
    assert by_triton == {"_any_kernel": 4} and kernels[:4] == kernels[4:] and len(set(map(id, kernels))) == 4


def main() -> None:
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: STREAM,
            get_current_target=lambda: TARGET.gpu,
            get_device_capability=lambda device=0: TARGET.capability,
        )
    )
    JITFunction.run, JITFunction._do_compile = watched_run, compile
    torch.cuda.current_device = lambda: 0
    for file, count in shipped().items():
        print(f"{file}: {count} launches as by Triton")
        assert count, file
    print(f"random sizes and addresses: {drawn(300)} launches as by Triton")
    x, a = torch.empty(64, 64, dtype=torch.bfloat16), torch.empty(16, 64, dtype=torch.bfloat16)
    descriptors_differ()
    watchers_see(lambda: shrink.shrink(x, a, capability=TARGET.capability))


if __name__ == "__main__":
    sys.exit(main())
