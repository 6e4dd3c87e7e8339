"""What forward and backward of layers with LoRA cost the host: microseconds until the last kernel is on its way.

    make gpu, or: python benchmarks/bench_host.py [--rounds 30]

A GPU waits for its host where a step's kernels take less time than Python, PyTorch and Triton take to launch them:
small models, short batches. The layers are modules as users call them: one linear, q/k/v, a SwiGLU MLP. The arms take
turns in random order, `CALLS` calls each a round, timed by the clock until the last call returns; then the GPU is
waited for. ratio_to_peft is a median of paired rounds.

On a GPU with sizes whose kernels take less time than their launches. Without one, before a driver that does nothing
(null_driver.py): ours with the same sizes, since they decide how many kernels there are; the frozen layers and PEFT,
whose ops are PyTorch's own whatever the sizes, on the CPU with matrices so small that the arithmetic is next to
nothing. What a CUDA driver takes for a launch, some 2 µs, is then missing in all arms alike."""

import argparse
import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import harness
import null_driver
import torch
from torch import Tensor, nn

ROUNDS, CALLS, RANK = 30, 20, 16
OPS = ("linear", "qkv", "swiglu_mlp")
FROZEN, AGAIN, PEFT = "frozen", "frozen again", "peft"
COLUMNS = (
    *harness.PROVENANCE,
    *("op", "provider", "M", "K", "N", "R", "dtype", "dropout", "host_us", "launches"),
    *("ratio_to_peft", "ratio_low", "ratio_high", "driver", "rounds"),
)


class Sizes(NamedTuple):
    M: int
    K: int
    N: int


# Enough for partial sums, as large layers have them; little enough for a GPU to be done before its host.
LARGE, SMALL = Sizes(2048, 1024, 2816), Sizes(8, 64, 128)


def module_of(op: str, sizes: Sizes, device: torch.device) -> nn.Module:
    """The frozen layers in bf16, as the GPU's benchmarks of this op have them."""
    from bench_lora_linear import Projection
    from bench_mlp import llama_mlp
    from bench_qkv import Projections

    def weight(N: int, K: int) -> Tensor:
        return torch.randn(N, K, device=device).bfloat16()

    _, K, N = sizes
    if op == "linear":
        return Projection(weight(K, K))
    if op == "qkv":
        return Projections([weight(K, K) for _ in range(3)])
    return llama_mlp(K, N, [weight(N, K), weight(N, K), weight(K, N)])


def step_of(module: nn.Module, sizes: Sizes, device: torch.device) -> Callable[[], None]:
    """One forward and backward of the module."""
    x = torch.randn(sizes.M, sizes.K, device=device).bfloat16().requires_grad_()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    dy = torch.randn(sizes.M, sizes.K, device=device).bfloat16()

    def step() -> None:
        y = module(x)
        torch.autograd.backward(y, [dy] * len(y) if isinstance(y, tuple) else dy)
        for leaf in (x, *trained):
            leaf.grad = None

    return step


def arms_of(op: str, dropout: float, device: torch.device) -> dict[str, Callable[[], None]]:
    from modules import accelerated, injected, peft_model

    others = LARGE if device.type == "cuda" else SMALL

    def made(sizes: Sizes, adapt: Callable[..., nn.Module] | None = None) -> Callable[[], None]:
        module = module_of(op, sizes, device)
        names = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
        return step_of(module if adapt is None else adapt(module, names, RANK, dropout), sizes, device)

    return {
        FROZEN: made(others),
        AGAIN: made(others),
        PEFT: made(others, peft_model),
        "peft bf16 adapters": made(others, partial(peft_model, fp32_adapters=False)),
        "lora_fast apply_lora": made(LARGE, injected),
        "lora_fast accelerate_peft": made(LARGE, accelerated),
    }


def launches_of(step: Callable[[], None]) -> int:
    """How many Triton kernels a step launches; while Triton has a hook, every launch passes it."""
    from triton import knobs

    seen = []
    watch = seen.append
    knobs.runtime.launch_enter_hook.add(watch)
    try:
        step()
    finally:
        knobs.runtime.launch_enter_hook.remove(watch)
    return len(seen)


def time_arms(arms: dict[str, Callable[[], None]], rounds: int, wait: Callable[[], Any]) -> dict[str, list[float]]:
    """{arm: µs of a call, one sample a round}."""
    order, names = random.Random(0), list(arms)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for done in range(rounds + 3):
        order.shuffle(names)
        for name in names:
            step = arms[name]
            start = time.perf_counter()
            for _ in range(CALLS):
                step()
            took = time.perf_counter() - start
            wait()
            if done >= 3:
                samples[name].append(1e6 * took / CALLS)
    return samples


def measure(op: str, dropout: float, device: torch.device, rounds: int):
    from lora_fast import tuning
    from lora_fast.profiler.intervals import ratio_with_interval

    arms = arms_of(op, dropout, device)
    on_gpu = device.type == "cuda"
    with nullcontext() if on_gpu else null_driver.pretended_gpu(), tuning.only("triton"):
        launches = {name: launches_of(step) for name, step in arms.items()}  # compiles them too
        samples = time_arms(arms, rounds, torch.cuda.synchronize if on_gpu else lambda: None)
    for name, values in samples.items():
        middle, (low, high) = ratio_with_interval(values, samples[PEFT])
        sizes = LARGE if on_gpu or name.startswith("lora_fast") else SMALL
        yield {
            **{"op": op, "provider": name, **sizes._asdict(), "R": RANK, "dtype": "bf16", "dropout": dropout},
            **{"host_us": f"{sorted(values)[len(values) // 2]:.1f}", "launches": launches[name] or ""},
            **{"ratio_to_peft": f"{middle:.3f}", "ratio_low": f"{low:.3f}", "ratio_high": f"{high:.3f}"},
            **{"driver": "CUDA" if on_gpu else "none", "rounds": rounds},
        }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--ops", default=",".join(OPS), help="which of them, separated by commas")
    parser.add_argument("--out", type=harness.Path, metavar="DIR", help="where host.csv goes (benchmarks/results/…)")
    parser.add_argument("--commit", help="what the rows call the commit, where there is no git")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="begin no op after it")
    args = parser.parse_args(argv)
    ops = args.ops.split(",")
    if unknown := set(ops) - set(OPS):
        parser.error(f"--ops {','.join(sorted(unknown))}; expected some of {', '.join(OPS)}")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        null_driver.load()
        torch.set_num_threads(1)
    # What a launch costs is asked of one thread: a second one for backward would wait for the first.
    torch.autograd.set_multithreading_enabled(False)
    deadline = harness.Deadline(args.deadline)
    out = args.out or (harness.results_folder(device) if device.type == "cuda" else harness.RESULTS / "cpu")
    with harness.RowWriter(out / "host.csv", COLUMNS) as writer:
        for op, dropout in [(op, p) for op in ops for p in (0.0, 0.1)]:
            if deadline.left() < 0:
                print(f"host: deadline; {op}, p={dropout} and all after it left out")
                break
            print(f"{op}, dropout {dropout}", flush=True)
            for row in measure(op, dropout, device, args.rounds):
                writer.write(harness.provenance(device, args.commit) | row)
                told = f"{row['ratio_to_peft']} [{row['ratio_low']}, {row['ratio_high']}] of PEFT's"
                print(f"  {row['provider']:24} {row['host_us']:>8} µs  {told}  {row['launches']} launches", flush=True)
    print(f"host: wrote {writer.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
