"""Compiles every kernel for GPUs that aren't here, and says what it takes: python tests/offline.py --json FILE.

Needs torch, triton and lora_fast, no GPU and no pytest, so that it runs in an environment with another triton too. The
launchers are called with tensors on the device "meta"; what they would launch is recorded and specialized as a launch
would (JITFunction's own binder), then compiled for the target. FILE gets a row per compiled kernel; the exit status is
1 if one of them spills, takes more shared memory than the chip has, or loads slowly, with a line for each."""

import argparse
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "unset TRITON_INTERPRET: it decides what @triton.jit makes"
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # triton 3.9's default, said aloud since 3.10 changes it

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature


class Target(NamedTuple):
    gpu: GPUTarget
    capability: tuple[int, int]
    shared_limit: int  # bytes one program may have; the compiler does not check


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), (8, 0), 166_912),
    "sm_89": Target(GPUTarget("cuda", 89, 32), (8, 9), 101_376),
    "sm_90": Target(GPUTarget("cuda", 90, 32), (9, 0), 232_448),
    "sm_100": Target(GPUTarget("cuda", 100, 32), (10, 0), 232_448),
    "sm_120": Target(GPUTarget("cuda", 120, 32), (12, 0), 101_376),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), (9, 4), 65_536),
}


class Case(NamedTuple):
    """One call of a launcher."""

    file: str
    label: str
    call: Callable[[tuple[int, int]], Any]
    main_loops: int = 0  # loops that multiply and have to fetch ahead, in a matrix product of full width
    fp64_loops: int = 0  # loops that multiply in fp64 and have to fetch ahead, where matrix units do fp64
    wide: bool = True  # its large operands can be read 16 bytes at a time
    thorough: bool = False  # only with --all


# --- What is launched: a function per kernel file ---------------------------------------------------------------------


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


# Triton takes an argument of 1 for a constant, which has fewer methods than a number: code that compiles for all other
# sizes may not for this one. 8 numbers of bf16 are the least that 16-byte loads and descriptors take. Where code fails
# on a constant it does so on every chip, and mostly for all constants at once.
ONES = ({"M": 1}, {"R": 1}, {"M": 1, "N": 1, "K": 1, "R": 1})
MORE_ONES = ({"N": 1}, {"K": 1}, {"M": 1, "N": 8, "K": 8})


def ones(file: str, target: str, kind: str, launch: Callable[..., Any], **usual: int) -> Iterator[Case]:
    """launch(capability, **sizes) with sizes of 1 beside the `usual` ones."""
    seen = [usual]
    for changed in (*ONES, *MORE_ONES):
        sizes = {name: changed.get(name, size) for name, size in usual.items()}
        if sizes not in seen:
            seen.append(sizes)
            label = ", ".join([kind, *(f"{name}={size}" for name, size in sizes.items())])
            thorough = target != "sm_90" or changed in MORE_ONES
            yield Case(file, label, functools.partial(launch, **sizes), wide=False, thorough=thorough)


def gemm_lora_cases(target: str) -> Iterator[Case]:
    """Llama-like sizes; M ragged, since most batches are."""
    from lora_fast.kernels.gemm_lora import gemm_lora_sum
    from lora_fast.kernels.gemm_tiles import candidates, uses_descriptors

    def cases(label, *, M=8191, K=4096, N=4096, R=64, pairs=1, masks=0, bias=False, added=False, weight_t=True,
              dtype=torch.bfloat16, first=1):  # fmt: skip
        """This call with every tile that it may be given; the first ones without --all."""
        aligned = N % (8 if uses_descriptors(TARGETS[target].capability) else 16) == 0
        rank = R if pairs == 1 else None
        kind = {"pairs": pairs, "masks": masks, "aligned": aligned, "rank": rank}
        shipped = candidates(dtype, TARGETS[target].capability, **kind)
        for i, tile in enumerate(shipped):

            def call(capability, tile=tile):
                ranks = [R] * max(masks, 1)
                return gemm_lora_sum(
                    [meta(M, K, dtype=dtype) for _ in range(pairs)],
                    [meta(N, K, dtype=dtype).t() if weight_t else meta(K, N, dtype=dtype) for _ in range(pairs)],
                    meta(M, sum(ranks), dtype=dtype),
                    meta(N, sum(ranks), dtype=dtype).t() if weight_t else meta(sum(ranks), N, dtype=dtype),
                    ranks=ranks if masks else None,
                    masks=[meta(M, -(-N // 8), dtype=torch.uint8) for _ in range(masks)],
                    bias=meta(N, dtype=dtype) if bias else None,
                    accumulate=meta(M, N, dtype=dtype) if added else None,
                    tile=tile,
                    capability=capability,
                )

            # Each K-loop, and the update's loop where it has a pipeline: it must not stand in for a K-loop.
            loops = pairs + (masks < 2 and not tile.flat) if pairs and aligned and dtype != torch.float32 else 0
            yield Case("gemm_lora", label, call, loops, wide=aligned, thorough=i >= first)

    # Forward: x Wᵀ with a weight that lies transposed. dx: the weight as it lies.
    yield from cases("forward, r=64", first=9)
    yield from cases("forward, r=16, bias", R=16, bias=True, M=8192, first=2 if target == "sm_90" else 0)
    yield from cases("forward, r=512", R=512, first=0)
    yield from cases("forward, Conv1D, r=16, bias", R=16, weight_t=False, bias=True, first=0)
    yield from cases("dx, r=16", R=16, weight_t=False, first=2 if target == "sm_90" else 0)
    yield from cases("dx, mask, r=16", R=16, masks=1, weight_t=False, first=1 if target == "sm_90" else 0)
    yield from cases("dx, mask, r=64", masks=1, weight_t=False, first=2 if target == "sm_90" else 1)
    yield from cases("dx of q, k, v, r=16", pairs=3, R=48, weight_t=False)
    yield from cases("dx of gate, up, masks, r=64", pairs=2, masks=2, weight_t=False, first=0)
    yield from cases("dx of q, k, v, masks, r=16", pairs=3, masks=3, R=16, weight_t=False)
    yield from cases("dx of q, k, v, masks, r=64", pairs=3, masks=3, weight_t=False, first=0)
    yield from cases("forward, odd sizes, r=64", K=4097, N=4097)
    yield from cases("forward, sizes of 8 mod 16, r=64", K=4104, N=4104)
    yield from cases("dx, odd sizes, mask, r=16", K=4097, N=4097, R=16, masks=1, weight_t=False)
    yield from cases("dx of q, k, v, odd sizes, masks, r=16", K=4097, N=4097, R=16, pairs=3, masks=3, first=0)
    yield from cases("update, masks, r=16, accumulate", pairs=0, masks=3, R=16, weight_t=False, added=True)
    yield from cases("update, mask, r=64", pairs=0, masks=1, weight_t=False, first=0)
    yield from cases("fp32 forward, r=64", dtype=torch.float32)
    yield from cases("fp32 dx, mask, r=64", dtype=torch.float32, masks=1, weight_t=False, first=0)

    def one(capability, M, N, K, R, pairs=1, masks=0, weight_t=True, extra=False):
        return gemm_lora_sum(
            [meta(M, K)] * pairs,
            [meta(N, K).t() if weight_t else meta(K, N)] * pairs,
            meta(M, R * max(masks, 1)),
            meta(R * max(masks, 1), N),
            ranks=[R] * masks,
            masks=[meta(M, -(-N // 8), dtype=torch.uint8)] * masks,
            bias=meta(N) if extra else None,
            accumulate=meta(M, N) if extra and not pairs else None,
            capability=capability,
        )

    for kind, settings in {
        "forward, bias": {"extra": True},
        "dx of q, k, v, masks": {"pairs": 3, "masks": 3, "weight_t": False},
        "update, masks, bias, accumulate": {"pairs": 0, "masks": 2, "extra": True},
    }.items():
        yield from ones("gemm_lora", target, kind, functools.partial(one, **settings), M=70, N=144, K=80, R=16)


def shrink_cases(target: str) -> Iterator[Case]:
    from lora_fast.kernels.shrink import shrink

    for ranks, p, M in itertools.product(((16,), (64,), (16,) * 2, (16,) * 3, (64,) * 3), (0.0, 0.1), (8191, 16)):

        def call(capability, ranks=ranks, p=p, M=M):
            seed = meta(1, dtype=torch.int64) if p else None
            return shrink(meta(M, 4096), meta(sum(ranks), 4096), ranks, seed=seed, dropout_p=p, capability=capability)

        thorough = M == 16 or ranks in ((64,), (16,) * 2)
        yield Case("shrink", f"ranks {ranks}, p={p}, M={M}", call, thorough=thorough)

    def one(capability, M, K, R, adapters=1, p=0.0):
        ranks, seed = (R,) * adapters, meta(1, dtype=torch.int64) if p else None
        return shrink(meta(M, K), meta(sum(ranks), K), ranks, seed=seed, dropout_p=p, capability=capability)

    dropout = functools.partial(one, adapters=3, p=0.1)
    yield from ones("shrink", target, "one adapter", one, M=70, K=80, R=16)
    yield from ones("shrink", target, "three adapters, p=0.1", dropout, M=70, K=80, R=16)


def adapter_grads_cases(target: str) -> Iterator[Case]:
    from lora_fast.kernels.adapter_grads import grad_a, grad_s_and_b, pick_s_and_b_tile

    M, K, N = 8191, 4096, 4096

    def s_and_b(capability, M=M, N=N, R=16, dtype=torch.bfloat16):
        if tile := pick_s_and_b_tile(8191, 4096, R, dtype, capability):  # else two matrix products do it
            dy, b, s = meta(M, N, dtype=dtype), meta(N, R, dtype=dtype), meta(M, R, dtype=dtype)
            grad_s_and_b(dy, b, s, 2.0, tile=tile, capability=capability)

    for r in (16, 32, 64):
        yield Case("adapter_grads", f"dS and dB, r={r}", functools.partial(s_and_b, R=r))
    yield Case("adapter_grads", "fp32 dS and dB, r=16", functools.partial(s_and_b, dtype=torch.float32))
    for r in (16, 64):

        def a(capability, r=r, adapters=1, masked=False):
            mask = meta(adapters, M, K // 8, dtype=torch.uint8) if masked else None
            return grad_a(meta(M, adapters * r), meta(M, K), (r,) * adapters, mask, capability=capability)

        yield Case("adapter_grads", f"dA, r={r}", a)
        yield Case("adapter_grads", f"dA, mask, r={r}", functools.partial(a, masked=True), thorough=r == 64)
        yield Case("adapter_grads", f"dA of q, k, v, r={r}", functools.partial(a, adapters=3), thorough=r == 64)
        yield Case("adapter_grads", f"dA of q, k, v, masks, r={r}", functools.partial(a, adapters=3, masked=True))

    def one_a(capability, M, K, R, adapters):
        mask = meta(adapters, M, -(-K // 8), dtype=torch.uint8) if adapters > 1 else None
        return grad_a(meta(M, adapters * R), meta(M, K), (R,) * adapters, mask, capability=capability)

    yield from ones("adapter_grads", target, "dS and dB", s_and_b, M=70, N=144, R=16)
    for adapters in (1, 3):
        call = functools.partial(one_a, adapters=adapters)
        yield from ones("adapter_grads", target, f"dA of {adapters} adapters", call, M=70, K=80, R=16)


def swiglu_cases(target: str) -> Iterator[Case]:
    from lora_fast.kernels import swiglu

    M, N = 8191, 14336
    g = meta(M, N)
    for r in (16, 64):

        def forward(capability, r=r, p=0.0):
            seed = meta(1, dtype=torch.int64) if p else None
            return swiglu.swiglu_shrink(g, g, meta(r, N), seed=seed, dropout_p=p, capability=capability)

        def backward(capability, r=r, masked=False):
            mask = meta(1, M, N // 8, dtype=torch.uint8) if masked else None
            s = [meta(M, r) for _ in range(3)]
            return swiglu.swiglu_backward(g, g, g, *s, mask=mask, capability=capability)

        yield Case("swiglu", f"forward, r={r}", forward)
        yield Case("swiglu", f"forward, r={r}, p=0.1", functools.partial(forward, p=0.1))
        yield Case("swiglu", f"backward, r={r}", backward)
        yield Case("swiglu", f"backward, mask, r={r}", functools.partial(backward, masked=True), thorough=r == 64)
    yield Case("swiglu", "forward alone", lambda capability: swiglu.swiglu(g, g, capability=capability))
    yield Case("swiglu", "backward alone", lambda capability: swiglu.swiglu_grad(g, g, g, capability=capability))

    def one_forward(capability, M, N, R):
        seed = meta(1, dtype=torch.int64)
        g = meta(M, N)
        return swiglu.swiglu_shrink(g, g, meta(R, N), seed=seed, dropout_p=0.1, capability=capability)

    def one_backward(capability, M, N, R):
        g, mask = meta(M, N), meta(1, M, -(-N // 8), dtype=torch.uint8)
        return swiglu.swiglu_backward(g, g, g, *[meta(M, R)] * 3, mask=mask, capability=capability)

    def one_alone(capability, M, N):
        g = meta(M, N)
        return swiglu.swiglu(g, g, capability=capability), swiglu.swiglu_grad(g, g, g, capability=capability)

    yield from ones("swiglu", target, "forward, p=0.1", one_forward, M=70, N=144, R=16)
    yield from ones("swiglu", target, "backward, mask", one_backward, M=70, N=144, R=16)
    yield from ones("swiglu", target, "alone", one_alone, M=70, N=144)


def grouped_cases(target: str) -> Iterator[Case]:
    """Eight adapters: long segments, and short ones, whose blocks are smaller."""
    from lora_fast.kernels import grouped

    adapters, K = 8, 4096
    for r, length in ((16, 1000), (64, 1000), (16, 20)):
        M = adapters * length
        segments = [(i * length, (i + 1) * length, i) for i in range(adapters)]
        table = grouped.block_table(segments, [r] * adapters, M, "meta")
        x, s, weight = meta(M, K), meta(M, table.width), meta(K, K)
        a, b = meta(adapters * r, K), meta(adapters * r, K).t()
        mask, seed = meta(1, M, K // 8, dtype=torch.uint8), meta(1, dtype=torch.int64)
        scales, stacked = meta(adapters, dtype=torch.float32), meta(adapters, K, K)
        for label, launcher, *args, settings in (
            ("S", grouped.grouped_shrink, x, a, table, {}),
            ("S, p=0.1", grouped.grouped_shrink, x, a, table, {"seed": seed, "dropout_p": 0.1}),
            ("expand", grouped.grouped_expand, x, s, b, table, {}),
            ("dx, mask", grouped.grouped_grad_x, s, a, table, {"mask": mask, "accumulate": x}),
            ("dS", grouped.grouped_grad_s, x, b, table, {}),
            ("dA, mask", grouped.grouped_grad_a, s, x, table, {"mask": mask}),
            ("dB", grouped.grouped_grad_b, x, s, table, scales, {}),
            ("gemm", grouped.grouped_gemm, x, weight, s, b, table, {}),
            ("gemm, mask", grouped.grouped_gemm, x, weight.t(), s, b, table, {"mask": mask}),
            ("gemm, experts", grouped.grouped_gemm, x, stacked, s, b, table, {}),
            ("gemm, experts transposed", grouped.grouped_gemm, x, stacked.mT, s, b, table, {}),
        ):
            call = functools.partial(launcher, *args, **settings)
            loops = 2 if label.startswith("gemm") else 0  # the K-loop and the adapter's
            yield Case(
                "grouped",
                f"{label}, r={r}, {length} rows each",
                lambda capability, call=call: call(capability=capability),
                main_loops=loops,
                thorough=length == 20 or (r == 64 and label in ("S", "S, p=0.1", "dx, mask", "dB", "gemm, experts")),
            )

    def one(capability, M, N, K, R):
        table = grouped.block_table([(0, M, 0)], [R], M, "meta")
        x, dy, s, weight = meta(M, K), meta(M, N), meta(M, table.width), meta(N, K)
        a, b, scales = meta(R, K), meta(R, N).t(), meta(1, dtype=torch.float32)
        mask, seed = meta(1, M, -(-K // 8), dtype=torch.uint8), meta(1, dtype=torch.int64)
        grouped.grouped_shrink(x, a, table, seed=seed, dropout_p=0.1, capability=capability)
        grouped.grouped_expand(dy, s, b, table, capability=capability)
        grouped.grouped_grad_x(s, a, table, mask=mask, capability=capability)
        grouped.grouped_grad_s(dy, b, table, capability=capability)
        grouped.grouped_grad_a(s, x, table, mask=mask, capability=capability)
        grouped.grouped_grad_b(dy, s, table, scales, capability=capability)
        grouped.grouped_gemm(x, weight, s, b, table, bias=meta(N), capability=capability)
        grouped.grouped_gemm(dy, weight.t(), s, a.t(), table, mask=mask, capability=capability)

    yield from ones("grouped", target, "one adapter", one, M=70, N=144, K=80, R=16)
    yield from ones("grouped", target, "one adapter in chunks", one, M=5000, N=144, K=80, R=16)


def expert_table_cases(target: str) -> Iterator[Case]:
    from lora_fast.kernels.expert_table import expert_table

    for experts, rows in ((8, 4096), (128, 32768), (256, 32768), (512, 300)):
        offsets = meta(experts, dtype=torch.int32)
        call = functools.partial(expert_table, offsets, 16, rows)
        yield Case("expert_table", f"{experts} experts", lambda capability, call=call: call(), wide=False)


def scale_columns_cases(target: str) -> Iterator[Case]:
    from lora_fast.kernels.scale_columns import scale_columns, scale_columns_backward

    def both(capability, M, N, dtype=torch.bfloat16, bias=False):
        z, g = meta(M, N, dtype=dtype), meta(N, dtype=torch.float32)
        scale_columns(z, g, meta(N, dtype=dtype) if bias else None)
        scale_columns_backward(z, z, g)

    for dtype, bias in itertools.product((torch.bfloat16, torch.float32), (False, True)):
        call = functools.partial(both, M=8191, N=4096, dtype=dtype, bias=bias)
        yield Case("scale_columns", f"{str(dtype)[6:]}{', bias' if bias else ''}", call)
    yield from ones("scale_columns", target, "bias", functools.partial(both, bias=True), M=70, N=144)


def factors_cases(target: str) -> Iterator[Case]:
    from lora_fast.kernels.factors import cast_factors

    As, Bs = [meta(16, 4096, dtype=torch.float32)] * 3, [meta(4096, 16, dtype=torch.float32)] * 3
    yield Case("factors", "q, k, v", lambda capability: cast_factors([(As, Bs, [2.0] * 3)], torch.bfloat16))

    def one(capability, N, K, R):
        return cast_factors([([meta(R, K)], [meta(N, R)], [1.0])], torch.bfloat16)

    yield from ones("factors", target, "one layer", one, N=144, K=80, R=16)


def gram_cases(target: str) -> Iterator[Case]:
    """Each padded rank; which way a factor lies is decided as the kernel runs."""
    from lora_fast.kernels.gram import Grams, grams

    for R, dtype in itertools.product((16, 32, 64, 128, 256, 512), (torch.bfloat16, torch.float32)):
        factors = [meta(R, 4096, dtype=dtype)] * 2, [meta(11008, R, dtype=dtype)] * 2
        call = functools.partial(grams, *factors)
        yield Case(
            "gram",
            f"r={R}, {str(dtype)[6:]}",
            lambda capability, call=call: call(capability=capability),
            fp64_loops=2,
            thorough=R > 128,
        )
    some = Grams(meta(5, 16, 16, dtype=torch.float64), meta(3, dtype=torch.int32), 16)
    yield Case("gram", "sum", lambda capability: some.sum(), wide=False)


def jacobi_cases(target: str) -> Iterator[Case]:
    """Each padded rank; what is read is read once, in a kernel that waits for its own results."""
    from lora_fast.kernels.gram import Grams
    from lora_fast.kernels.jacobi import svd_of_grams

    for R, vectors in itertools.product((16, 32, 64), (True, False)):
        grams = Grams(meta(1000, R, R, dtype=torch.float64), meta(449, dtype=torch.int32), R)

        def call(capability, grams=grams, vectors=vectors):
            return svd_of_grams(grams, grams.R, meta(224, dtype=torch.float64), vectors=vectors)

        label = f"r={R}, {'vectors' if vectors else 'values'}"
        yield Case("jacobi", label, call, wide=False, thorough=R < 64 and not vectors)


CASES = {
    "gemm_lora": gemm_lora_cases,
    "shrink": shrink_cases,
    "adapter_grads": adapter_grads_cases,
    "swiglu": swiglu_cases,
    "grouped": grouped_cases,
    "expert_table": expert_table_cases,
    "scale_columns": scale_columns_cases,
    "factors": factors_cases,
    "jacobi": jacobi_cases,
    "gram": gram_cases,
}


def available() -> list[str]:
    """Files of CASES that are there."""
    folder = Path(importlib.import_module("lora_fast.kernels").__file__).parent
    return [name for name in CASES if (folder / f"{name}.py").exists()]


# --- From a call to a row ---------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    kernel: JITFunction
    args: tuple
    kwargs: dict[str, Any]


def record(call: Callable[[], Any]) -> list[Launch]:
    """What `call` launches; nothing runs."""
    launches: list[Launch] = []
    run = JITFunction.run

    def recorded(self, *args, grid, warmup, **kwargs):
        launches.append(Launch(self, args, kwargs))

    JITFunction.run = recorded
    try:
        call()
    finally:
        JITFunction.run = run
    return launches


def source_of(launch: Launch, gpu: GPUTarget) -> tuple[ASTSource, Any]:
    """The kernel as this launch would specialize it: types, constants, divisibility by 16, options."""
    kernel, backend = launch.kernel, make_backend(gpu)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*launch.args, debug=False, **launch.kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, dict(launch.kwargs), bound, specialization, options
    )
    return ASTSource(kernel, signature, constants, attributes), options


def compile_launch(launch: Launch, target: str) -> dict[str, Any]:
    start = time.perf_counter()
    source, options = source_of(launch, TARGETS[target].gpu)
    compiled = triton.compile(source, target=TARGETS[target].gpu, options=options.__dict__)
    row = {"shared": compiled.metadata.shared, "shared_limit": TARGETS[target].shared_limit}
    if "ptx" in compiled.asm:
        row |= resources_nvidia(compiled.asm["cubin"]) | instructions_nvidia(compiled.asm["ptx"])
    else:
        row |= read_amd(compiled.asm["amdgcn"])
    return row | {"compile_s": round(time.perf_counter() - start, 1)}


def resources_nvidia(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", said.stdout).groups()
    return {"registers": int(registers), "stack": int(stack), "local": int(local)}


MMA = re.compile(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync")
TMA_LOAD = re.compile(r"cp\.async\.bulk\.tensor\S*\.shared::\w+\.global")
TMA_STORE = re.compile(r"cp\.async\.bulk\.tensor\S*\.global\.shared")
CP_ASYNC = re.compile(r"cp\.async\.c[ag]\.\S+ \[[^]]*\], \[[^]]*\], (?:0x([0-9a-f]+)|(\d+))")
# A wgmma may still run while the next step is prepared.
OVERLAPS = re.compile(r"wgmma\.wait_group\S* [1-9]")
LOAD = re.compile(r"ld\.global\S*?(?:\.v(\d))?\.[a-z]+(\d+)\s")


def instructions_nvidia(ptx: str) -> dict[str, Any]:
    async_bytes = [
        int(hexadecimal, 16) if hexadecimal else int(decimal) for hexadecimal, decimal in CP_ASYNC.findall(ptx)
    ]
    load_bytes = [int(count or 1) * int(bits) // 8 for count, bits in LOAD.findall(ptx)]
    loops = inner_loops(ptx)
    return {
        "wgmma": ptx.count("wgmma.mma_async"),
        "tcgen05": ptx.count("tcgen05.mma."),
        "mma_sync": ptx.count("mma.sync.aligned"),
        "tma_loads": len(TMA_LOAD.findall(ptx)),
        "cp_async_16": async_bytes.count(16),
        "cp_async_less": len(async_bytes) - async_bytes.count(16),
        "ld_global_16": load_bytes.count(16),
        "ld_global_less": len(load_bytes) - load_bytes.count(16),
        # Loops that multiply, and those of them that fetch ahead while they do.
        "mma_loops": sum(bool(MMA.search(loop)) for loop in loops),
        "async_mma_loops": sum(bool(MMA.search(loop)) and fetches_ahead(loop) for loop in loops),
        "overlapped_wgmma_loops": sum(bool(OVERLAPS.search(loop)) for loop in loops),
        # What ends a tile stands in the loop that multiplies: Triton made one of the tiles' loop and this.
        "flat_loops": sum(bool(MMA.search(loop) and TMA_STORE.search(loop)) for loop in loops),
    }


def fetches_ahead(loop: str) -> bool:
    return bool(TMA_LOAD.search(loop) or "cp.async.c" in loop)


def inner_loops(ptx: str) -> list[str]:
    """The text of each loop that holds no other: from a label to a branch back to it."""
    lines = ptx.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"(\$\w+):", line.strip()))}
    ends: dict[int, int] = {}  # of each loop, by where it starts: several branches may lead back to one label
    for i, line in enumerate(lines):
        match = re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line)
        if match and labels.get(match[1], i) < i:
            ends[labels[match[1]]] = i
    return [
        "\n".join(lines[start:end])
        for start, end in ends.items()
        if not any(start < other and last <= end for other, last in ends.items())
    ]


def read_amd(assembly: str) -> dict[str, Any]:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "local": number("vgpr_spill_count"),
        "mfma": len(re.findall(r"\bv_mfma_", assembly)),
        "ld_global_16": len(re.findall(r"(?:global|buffer)_load_dwordx4", assembly)),
        "ld_global_less": len(re.findall(r"(?:global|buffer)_load_(?!dwordx4)", assembly)),
    }


def tile_of(launch: Launch) -> str:
    """Upper-case constants, warps and stages: what names a compiled tile."""
    kernel = launch.kernel
    named = dict(zip(kernel.arg_names, launch.args)) | launch.kwargs
    constants = [f"{p.name}={named[p.name]}" for p in kernel.params if p.is_constexpr and p.name in named]
    return ", ".join(
        [*constants, *(f"{k}={launch.kwargs[k]}" for k in ("num_warps", "num_stages") if k in launch.kwargs)]
    )


# --- What a row is held to --------------------------------------------------------------------------------------------

# Exceptions: kernel, label [tile], target (regular expressions), bytes of stack allowed, reason. ptxas lowers registers
# to fit one more block on a multiprocessor (168 for 3 blocks of 128 threads, 128 for 4), and pays with a few spills.
SPILLS = [
    ("_shrink_kernel", r"ranks \(16, 16, 16\), p=0.0.*", r"sm_120", 8, "for one more block on a multiprocessor"),
    (
        "_grad_a_kernel",
        r"dA, mask, r=16 .*",
        r"sm_100",
        112,
        "offsets, reloaded in the loop; no chip was at hand to tune on",
    ),
    (
        "gemm_lora_kernel",
        r"dx of q, k, v, r=16 .*BLOCK_M=64, BLOCK_N=64, BLOCK_K=64,.*",
        r"sm_100",
        8,
        "two numbers, for five blocks on a multiprocessor",
    ),
    ("gemm_lora_kernel", r"dx, r=16 .*BLOCK_M=64, BLOCK_N=64,.*", r"sm_80|sm_89", 8, "for one more block"),
    ("gemm_lora_kernel", r"dx of q, k, v, (masks|r=16).*BLOCK_N=32,.*", r"sm_120", 16, "for one more block"),
    ("gemm_lora_kernel", r"forward, odd sizes.*", r"sm_100", 16, "of pointers; no chip was at hand to tune on"),
    ("gemm_lora_kernel", r"dx of q, k, v, masks, r=64.*", r"sm_100", 136, "under triton 3.6; no chip to tune on"),
    ("_project_kernel", r"S, p=0.1, r=16.*", r"sm_100", 24, "of drawing the masks; no chip was at hand to tune on"),
    ("_cholesky_kernel", r"r=16, vectors .*", r"sm_120", 8, "for one more block on a multiprocessor"),
    ("_jacobi_kernel", r"r=64, vectors .*", r"sm_120", 24, "of 128 registers; fp64 is slow on this chip"),
    (r".*", r".*\b(N|K)=[18]\b.*", r".*", 4096, "rows of 1 or 8 numbers are read one by one, in microseconds"),
    (
        "_outer_kernel",
        r"dA, mask, r=16.*",
        r"sm_89",
        16,
        "six halves of registers, for four blocks on a multiprocessor",
    ),
]
# triton 3.6's older ptxas spills elsewhere, and gives each kernel with TMA on sm_120 a frame of 8 bytes. The tiles are
# chosen for 3.9; under another version this much is let pass.
SPILLS_ELSEWHERE = 0 if triton.__version__.startswith("3.9.") else 48
# Where loads are less than 16 bytes wide: kernel, label, target, reason.
NARROW = [
    ("_sum_kernel|_add_chunks_kernel", r".*", r".*", "a thread sums one column; neighbours read neighbouring numbers"),
    ("_backward_kernel", r"backward.*", r"gfx942", "a tile of 16 × 64 for 256 threads: eight bytes a thread"),
    ("_shrink_kernel", r"ranks \(64, 64, 64\), p=0.1.*", r"gfx942", "64 × 32 for 512 threads: eight bytes a thread"),
    ("gemm_lora_kernel", r".*BLOCK_M=16,.*", r"sm_80|sm_89", "16 × 32 of s for 128 threads: eight bytes a thread"),
    ("gemm_lora_kernel", r".*BLOCK_N=32,.* BLOCK_R=16,.*", r"sm_90|sm_1.0", "16 × 32 of b for 128 threads: the same"),
]


def exception(table: list[tuple], row: dict) -> tuple | None:
    told = (row["kernel"], f"{row['label']} [{row['tile']}]", row["target"])
    return next((entry for entry in table if all(map(re.fullmatch, entry[:3], told))), None)


def problems(row: dict) -> list[str]:
    """What is wrong with a compiled kernel, in words."""
    if "error" in row:
        return [row["error"]]
    found = []
    spilled = row["stack"] + row["local"]
    allowed = exception(SPILLS, row)
    if spilled > max(allowed[3] if allowed else 0, SPILLS_ELSEWHERE):
        found.append(f"spills {spilled} bytes")
    if row["shared"] > row["shared_limit"]:
        found.append(f"{row['shared']} bytes of shared memory, the chip has {row['shared_limit']}")
    amd = row["target"].startswith("gfx")
    narrow = exception(NARROW, row)
    wide_loads = row["ld_global_16"] + (0 if amd else row["cp_async_16"] + row["tma_loads"])
    if row["wide"] and not wide_loads and not narrow:
        found.append("no 16-byte load")
    if row["target"] in ("sm_80", "sm_90") and row["async_mma_loops"] < row["fp64_loops"]:
        found.append(f"{row['async_mma_loops']} loops multiply and fetch ahead, of {row['fp64_loops']} fp64 loops")
    if row["main_loops"] and amd and not row["mfma"]:
        found.append("no mfma")
    if row["main_loops"] and not amd:
        if row["async_mma_loops"] < row["main_loops"]:
            found.append(f"{row['async_mma_loops']} loops fetch ahead, of {row['main_loops']} main loops")
        if row["target"] == "sm_90" and row["overlapped_wgmma_loops"] < row["main_loops"]:
            found.append(
                f"{row['overlapped_wgmma_loops']} loops multiply on while they prepare, of {row['main_loops']}"
            )
        if "FLAT=True" in row["tile"] and not row["flat_loops"]:
            found.append("a flat tile's loops are two")
        if row["cp_async_less"] and not narrow:
            found.append(f"{row['cp_async_less']} asynchronous copies of less than 16 bytes")
        instruction = {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(row["target"], "mma_sync")
        if not row[instruction]:
            found.append(f"no {instruction}")
    return found


# --- The script -------------------------------------------------------------------------------------------------------

_JOBS: list[tuple[Case, str, Launch]] = []  # inherited by the processes that compile: kernels can't be pickled


def _compile(index: int) -> dict[str, Any]:
    case, target, launch = _JOBS[index]
    row = {
        "file": case.file,
        "label": case.label,
        "kernel": launch.kernel.__name__,
        "tile": tile_of(launch),
        "target": target,
        "main_loops": case.main_loops,
        "fp64_loops": case.fp64_loops,
        "wide": case.wide,
    }
    try:
        return row | compile_launch(launch, target)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {str(error)[:500]}"}


def collect(files: list[str], targets: list[str], thorough: bool) -> list[tuple[Case, str, Launch]]:
    """Every launch once: cases that specialize alike are compiled alike."""
    jobs, seen = [], set()
    for target, file in itertools.product(targets, files):
        for case in CASES[file](target):
            if case.thorough and not thorough:
                continue
            launches = record(lambda case=case, target=target: case.call(TARGETS[target].capability))
            if not launches:
                print(f"{target} {file}: {case.label}: left to cuBLAS", file=sys.stderr)
            for launch in launches:
                source, options = source_of(launch, TARGETS[target].gpu)
                key = (target, source.hash(), options.hash())
                if key not in seen:
                    seen.add(key)
                    jobs.append((case, target, launch))
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where to write the rows")
    parser.add_argument("--files", help="kernel files, separated by commas; all without it")
    parser.add_argument("--targets", help="such as sm_90,gfx942; all without it")
    parser.add_argument("--all", action="store_true", help="every tile in every variant: some ten minutes")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    args = parser.parse_args()
    files = args.files.split(",") if args.files else available()
    targets = args.targets.split(",") if args.targets else list(TARGETS)
    _JOBS.extend(collect(files, targets, args.all))
    start = time.perf_counter()
    with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
        rows = []
        for row in pool.imap_unordered(_compile, range(len(_JOBS))):
            rows.append(row)
            told = {k: v for k, v in row.items() if k not in (*Case._fields, "tile", "target")}
            print(
                f"{row['target']:6} {row['file']}: {row['label']} [{row['tile']}]: {told}", file=sys.stderr, flush=True
            )
    document = {"triton": triton.__version__, "torch": torch.__version__, "rows": rows}
    args.json.write_text(json.dumps(document, indent=1))
    wrong = [
        f"{row['target']} {row['file']}: {row['label']} [{row['tile']}]: {p}" for row in rows for p in problems(row)
    ]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    took_s = time.perf_counter() - start
    print(f"triton {triton.__version__}: {len(rows)} kernels compiled in {took_s:.0f} s, {len(wrong)} problems")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
