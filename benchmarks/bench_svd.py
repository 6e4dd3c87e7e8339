"""Singular values of every update of an adapter of a 7B or 70B model: ours, batched torch pipelines, dense SVDs.

    .venv/bin/python benchmarks/bench_svd.py [--device cuda] [--models 7b,70b] [--ranks 16,64]

Every arm computes all singular values of all updates s·B·A. Arms run in randomized rounds in one process, and only
ratios within a round are compared; "lora_fast again" is the same arm a second time and shows the method's noise. The
torch arms get their factors stacked by shape in advance, which spares them a copy that ours makes. "from the file"
reads a PEFT folder, which is in the page cache, and ends with every Spectrum.

dense: torch.linalg.svdvals of ΔW, formed in fp32, and svd_lowrank: torch.svd_lowrank of ΔW, q = R. Both are timed on
one matrix of each shape and multiplied by the number of matrices of that shape; that is what `rounds` = 1 says. A dense
SVD is timed at the smallest rank and counted at all of a model.
"lora_fast kernels", on a GPU: the time that the launches of an update_svds take there by the profiler's count, without
Python's part. max_error: the largest relative error of a singular value above 1e-6 σ₁ over the first layer's updates,
against QR and SVD in fp64. peak_MiB: what the process has at most in memory beyond what imports need, in a process of
its own."""

import argparse
import gc
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Read as torch is loaded. Threads that wait by spinning fight with whatever else runs: on two busy cores all arms took
# many times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from harness import PROVENANCE, RESULTS, Deadline, RowWriter, provenance, results_folder
from safetensors.torch import save_file
from torch import Tensor

from lora_fast import adapter_spectra
from lora_fast.profiler.intervals import MIN_ROUNDS, ratio_with_interval
from lora_fast.svd import update_svds

# (layers, {module: (N, K)}): Llama-2-7B (arXiv:2307.09288) and Llama-3-70B (arXiv:2407.21783), all linear layers.
ATTENTION, MLP = "self_attn.", "mlp."
MODELS = {
    "7b": (
        32,
        {ATTENTION + name: (4096, 4096) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        | {MLP + "gate_proj": (11008, 4096), MLP + "up_proj": (11008, 4096), MLP + "down_proj": (4096, 11008)},
    ),
    "70b": (
        80,
        {ATTENTION + "q_proj": (8192, 8192), ATTENTION + "k_proj": (1024, 8192), ATTENTION + "v_proj": (1024, 8192)}
        | {ATTENTION + "o_proj": (8192, 8192), MLP + "gate_proj": (28672, 8192), MLP + "up_proj": (28672, 8192)}
        | {MLP + "down_proj": (8192, 28672)},
    ),
    "tiny": (2, {ATTENTION + "q_proj": (48, 32), MLP + "down_proj": (32, 80)}),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Beyond this many bytes of factors the torch arms, which hold them twice in fp64, are left out.
TORCH_BYTES = 2 << 30
# A dense SVD of the largest shape above this many multiply-adds takes minutes, on a GPU too.
DENSE_LIMIT = 4096 * 4096 * 11008
# Seconds that have to be left for those of a model.
DENSE_S = 30
SCALING = 2.0
OURS, AGAIN, FILE = "lora_fast", "lora_fast again", "lora_fast from the file"
COLUMNS = (
    *PROVENANCE,
    *("op", "provider", "model", "matrices", "R", "dtype", "ms_p20", "ms_p50", "ms_p80"),
    *("ratio_to_lora_fast", "ratio_low", "ratio_high", "rounds", "max_error", "peak_MiB"),
)


def make_factors(model: str, R: int, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """{module path: (lora_A, lora_B)} with spread-out singular values, as after training."""
    layers, shapes = MODELS[model]
    generator = torch.Generator().manual_seed(0)
    decay = torch.logspace(0, -2, R)
    found = {}
    for layer in range(layers):
        for name, (N, K) in shapes.items():
            a, b = torch.randn(R, K, generator=generator), torch.randn(N, R, generator=generator) * decay
            a, b = (a / math.sqrt(K)).to(dtype), (b / math.sqrt(N)).to(dtype)
            found[f"model.layers.{layer}.{name}"] = a.to(device), b.to(device)
    return found


def write_adapter_folder(folder: Path, factors: dict[str, tuple[Tensor, Tensor]], R: int) -> None:
    tensors = {}
    for path, (a, b) in factors.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = a.cpu()
        tensors[f"base_model.model.{path}.lora_B.weight"] = b.cpu()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    names = sorted({path.rpartition(".")[2] for path in factors})
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 2 * R, "target_modules": names, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def stacked(factors: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    groups: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
    for a, b in factors:
        groups.setdefault((a.shape, b.shape), []).append((a, b))
    return [(torch.stack([a for a, _ in group]), torch.stack([b for _, b in group])) for group in groups.values()]


def gram_eigh(groups: list[tuple[Tensor, Tensor]], scaling: float) -> list[Tensor]:
    """The square roots of the eigenvalues of H AAᵀ Hᵀ with BᵀB = HᵀH, in fp64."""
    found = []
    for a, b in groups:
        a, b = a.double(), b.double()
        values, vectors = torch.linalg.eigh(b.mT @ b)
        half = values.clamp_min(0).sqrt()[:, :, None] * vectors.mT
        squares = torch.linalg.eigvalsh(half @ (a @ a.mT) @ half.mT)
        found.append(scaling * squares.clamp_min(0).sqrt().flip(-1))
    return found


def qr_svd(groups: list[tuple[Tensor, Tensor]], scaling: float, dtype: torch.dtype) -> list[Tensor]:
    found = []
    for a, b in groups:
        upper_b, upper_a = (torch.linalg.qr(factor.to(dtype), mode="r")[1] for factor in (b, a.mT))
        found.append(scaling * torch.linalg.svdvals(upper_b @ upper_a.mT))
    return found


def kernel_ms(call: Callable[[], object], calls: int = 20) -> float:
    """Milliseconds of kernels in one call, on the GPU's own clock."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    others = ("Memcpy", "Memset", "Activity Buffer")  # a resident adapter's spectra need no copy
    events = [event for event in profile.key_averages() if not event.key.startswith(others)]
    return sum(event.self_device_time_total for event in events) / 1e3 / calls


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def rounds_of(
    arms: dict[str, Callable], rounds: int, device: torch.device, deadline: Deadline
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in arms}
    order, names = random.Random(0), list(arms)
    for name in names:  # warm up: libraries, page cache, compilation
        timed(arms[name], device)
    gc.collect()
    gc.disable()
    longest = 0.0
    for done in range(rounds):
        if done >= MIN_ROUNDS and deadline.left() < 2 * longest:
            break
        start = time.monotonic()
        order.shuffle(names)
        for name in names:
            times[name].append(timed(arms[name], device))
        longest = max(longest, time.monotonic() - start)
        gc.collect()
    gc.enable()
    return times


def max_error(S: Tensor, exact: Tensor) -> float:
    counted = exact > 1e-6 * exact[:, :1]
    return float(((S[:, : exact.shape[1]].double().cpu() - exact).abs() / exact)[counted].max())


def sampled_ms(call: Callable[[Tensor], object], factors: list[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Milliseconds of `call` on ΔW for all updates, from one of each shape."""
    shapes: dict[tuple, list] = {}
    for a, b in factors:
        shapes.setdefault((a.shape, b.shape), []).append((a, b))
    if device.type == "cuda":  # cuSOLVER starts slowly
        a, b = factors[0]
        call(b[:256].float() @ a[:, :256].float())
    total = 0.0
    for group in shapes.values():
        a, b = group[0]
        total += len(group) * timed(lambda a=a, b=b: call(b.float() @ a.float()), device)
    return total


def exact_of(sample: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """(updates, R) by QR and SVD in fp64, on the CPU."""
    return torch.stack([qr_svd([(a[None], b[None])], SCALING, torch.float64)[0][0].cpu() for a, b in sample])


def measure(model: str, R: int, dtype_name: str, args) -> Iterator[dict]:
    """A row for each arm that never forms ΔW."""
    device = args.device
    named = make_factors(model, R, DTYPES[dtype_name], device)
    factors = list(named.values())
    As, Bs, scalings = [a for a, _ in factors], [b for _, b in factors], [SCALING] * len(factors)
    size = sum(t.numel() * 8 for pair in factors for t in pair)
    groups = stacked(factors) if size <= TORCH_BYTES or device.type == "cuda" else []
    with tempfile.TemporaryDirectory(prefix="bench-svd-") as folder:
        write_adapter_folder(Path(folder), named, R)
        arms = {
            OURS: lambda: update_svds(As, Bs, scalings),
            AGAIN: lambda: update_svds(As, Bs, scalings),
            FILE: lambda: adapter_spectra(folder, device=device),
        }
        if groups:
            arms["torch Gram + eigh, fp64"] = lambda: gram_eigh(groups, SCALING)
            arms["torch QR + SVD, fp64"] = lambda: qr_svd(groups, SCALING, torch.float64)
            arms["torch QR + SVD, fp32"] = lambda: qr_svd(groups, SCALING, torch.float32)
        times = rounds_of(arms, args.rounds, device, args.deadline)
        peak = peak_MiB(folder, device)

    sample = sample_of(named, model)
    exact = exact_of(sample)
    alone = [(a[None], b[None]) for a, b in sample]
    ours = torch.stack([found.S for found in update_svds(*zip(*sample), [SCALING] * len(sample))])
    errors = {OURS: max_error(ours, exact)}
    for name, call in {
        "torch Gram + eigh, fp64": lambda: gram_eigh(alone, SCALING),
        "torch QR + SVD, fp32": lambda: qr_svd(alone, SCALING, torch.float32),
    }.items():
        errors[name] = max_error(torch.cat(call()), exact)

    for name, samples in times.items():
        ratio, (low, high) = ratio_with_interval(np.array(samples), np.array(times[OURS]))
        p20, p50, p80 = np.percentile(samples, [20, 50, 80])
        row = {"provider": name, "ms_p20": f"{p20:.2f}", "ms_p50": f"{p50:.2f}", "ms_p80": f"{p80:.2f}"}
        row |= {"ratio_to_lora_fast": f"{ratio:.3f}", "ratio_low": f"{low:.3f}", "ratio_high": f"{high:.3f}"}
        row |= {"rounds": len(samples), "max_error": f"{errors[name]:.1e}" if name in errors else ""}
        yield row | {"peak_MiB": f"{peak:.0f}" if name == FILE else ""}
    if device.type == "cuda":
        milliseconds = kernel_ms(arms[OURS])
        row = {"provider": "lora_fast kernels", "ms_p50": f"{milliseconds:.3f}", "rounds": 20}
        yield row | {"ratio_to_lora_fast": f"{milliseconds / float(np.median(times[OURS])):.3f}"}


def sample_of(named: dict[str, tuple[Tensor, Tensor]], model: str) -> list[tuple[Tensor, Tensor]]:
    """The updates of the first layer."""
    return [named[f"model.layers.0.{name}"] for name in MODELS[model][1]]


def measure_dense(
    model: str, R: int, dtype_name: str, args, ours_ms: float, dense_ms: dict[str, float]
) -> Iterator[dict]:
    """A row for each arm that forms ΔW; none where that takes minutes. dense_ms: {model: milliseconds} of what was
    timed already, since ΔW has the same size at every rank, and so a dense SVD of it takes the same time."""
    device = args.device
    named = make_factors(model, R, DTYPES[dtype_name], device)
    factors, (a, b) = list(named.values()), sample_of(named, model)[0]
    if max(a.shape[1] * b.shape[0] * min(a.shape[1], b.shape[0]) for a, b in factors) > DENSE_LIMIT:
        return
    exact = exact_of([(a, b)])
    dense = {"svd_lowrank": lambda w: torch.svd_lowrank(w, q=R, niter=2)[1], "dense": torch.linalg.svdvals}
    for name, call in dense.items():
        known = dense_ms.get(model) if name == "dense" else None
        total = sampled_ms(call, factors, device) if known is None else known
        if name == "dense":
            dense_ms[model] = total
        found = (SCALING * call(b.float() @ a.float())[:R].cpu())[None]
        row = {"provider": name, "ms_p50": f"{total:.2f}", "ratio_to_lora_fast": f"{total / ours_ms:.1f}"}
        yield row | {"rounds": 1, "max_error": f"{max_error(found, exact):.1e}"}


CHILD = r"""
import re, sys, torch
from lora_fast import adapter_spectra
folder, device = sys.argv[1:]
def peak():
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 2**10
torch.linalg.svdvals(torch.ones(64, 64, dtype=torch.float64, device=device))
if device == "cuda":
    torch.cuda.reset_peak_memory_stats()
before = peak()
adapter_spectra(folder, device=device)
print(peak() - before)
"""


def peak_MiB(folder: str, device: torch.device) -> float:
    """The most memory that adapter_spectra adds to a process: resident on a CPU, of the GPU's allocator on a GPU."""
    # -P keeps the current folder off its path: where nothing is installed, it holds half a package.
    command = [sys.executable, "-P", "-c", CHILD, folder, device.type]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--models", default="7b,70b")
    parser.add_argument("--ranks", default="16,64")
    parser.add_argument("--dtypes", default="fp32", help="of the stored factors: fp32, bf16")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="begin no case that would not end by then")
    parser.add_argument("--no-dense", action="store_true", help="leave out what forms ΔW")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the CSV goes (benchmarks/results/…)")
    parser.add_argument("--commit", help="what the rows call the commit, where there is no git")
    args = parser.parse_args(argv)
    args.device, args.deadline = torch.device(args.device), Deadline(args.deadline)
    args.ranks = [int(rank) for rank in args.ranks.split(",")]
    folder = args.out or (results_folder(args.device) if args.device.type == "cuda" else RESULTS / "cpu")
    start_of_row = {**provenance(args.device, args.commit), "op": "svd"}
    cases = [(m, R, dtype) for m in args.models.split(",") for R in args.ranks for dtype in args.dtypes.split(",")]
    longest, ours_ms, dense_ms, failed = 0.0, {}, {}, 0
    with RowWriter(folder / "svd.csv", COLUMNS) as writer:

        def write(case: tuple[str, int, str], rows: Iterator[dict]) -> None:
            nonlocal failed
            model, R, dtype = case
            try:
                for row in rows:
                    size = MODELS[model][0] * len(MODELS[model][1])
                    writer.write(start_of_row | {"model": model, "matrices": size, "R": R, "dtype": dtype, **row})
                    if row["provider"] == OURS:
                        ours_ms[case] = float(row["ms_p50"])
                    print(
                        f"{model} r={R:<3} {dtype} {row['provider']:26} {row['ms_p50']:>10} ms   "
                        f"{row['ratio_to_lora_fast']} × lora_fast   error {row.get('max_error') or '-'}   "
                        f"{row.get('peak_MiB') or '-'} MiB",
                        flush=True,
                    )
            except Exception:  # the cases after it are worth having
                traceback.print_exc()
                failed += 1

        for case in cases:
            if args.deadline.left() < longest:
                print(f"deadline: {case} left out")
                continue
            start = time.monotonic()
            write(case, measure(*case, args))
            longest = max(longest, time.monotonic() - start)
        # Last, since they take the longest and say the least.
        for case in () if args.no_dense else ours_ms:
            if args.deadline.left() < DENSE_S and case[0] not in dense_ms:
                print(f"deadline: dense SVDs of {case} left out")
                continue
            write(case, measure_dense(*case, args, ours_ms[case], dense_ms))
    print(f"wrote {writer.path}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
