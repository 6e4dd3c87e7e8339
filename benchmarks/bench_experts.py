"""A mixture's block with LoRA on its stacked experts, forward and backward: ours, PEFT's, full, frozen.

    .venv/bin/python benchmarks/bench_experts.py [--tokens 512] [--rounds 20] [--device cuda --dtype bf16]

One block of Qwen3-30B-A3B's shape (128 experts of 2048 × 768, 8 a token), or of another; adapters on both weights of
its experts. Every arm has the same weights in the same memory and takes its turn in randomized rounds; only ratios
within a round are compared. A row is an arm: its time over the frozen block's with a 95% interval, and what it keeps
between forward and backward in MiB, each storage once, parameters left out. Rows that lose are kept.

On a GPU the clock is stopped once it has finished; on 2 cores and in fp32 the default takes minutes and 12 GiB."""

import argparse
import copy
import gc
import io
import random
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial

import harness
import torch
from torch import nn

FROZEN, AGAIN = "frozen", "frozen again"
COLUMNS = (
    *harness.PROVENANCE,
    *("op", "provider", "tokens", "experts", "experts_a_token", "hidden", "intermediate", "R", "dtype"),
    *("ms_p20", "ms_p50", "ms_p80", "ratio_to_frozen", "ratio_low", "ratio_high", "saved_MiB", "rounds"),
)
WEIGHTS = ("experts.gate_up_proj", "experts.down_proj")


def block_of(args: argparse.Namespace) -> nn.Module:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=args.hidden,
        moe_intermediate_size=args.intermediate,
        num_experts=args.experts,
        num_experts_per_tok=args.experts_a_token,
    )
    config._experts_implementation = "grouped_mm"  # Transformers' own choice where it loads a model
    with torch.device(args.device):
        block = Qwen3MoeSparseMoeBlock(config).to(harness.DTYPES[args.dtype])
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.02)
    return block.requires_grad_(False)


def shared(block: nn.Module) -> nn.Module:
    """A copy of the modules around the same weights, in parameters of its own: which of them are trained differs."""
    return copy.deepcopy(block, {id(p): nn.Parameter(p.data, requires_grad=False) for p in block.parameters()})


def peft_block(block: nn.Module, rank: int) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=list(WEIGHTS))
    return peft.inject_adapter_in_model(config, block)


def accelerated(block: nn.Module, rank: int) -> nn.Module:
    from lora_fast import accelerate_peft

    block = peft_block(block, rank)
    with redirect_stdout(io.StringIO()):
        accelerate_peft(block)
    return block


def injected(block: nn.Module, rank: int) -> nn.Module:
    from lora_fast import LoraConfig, apply_lora

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=WEIGHTS)
    return apply_lora(block, config, adapter_dtype=next(block.parameters()).dtype)


def full(block: nn.Module, rank: int) -> nn.Module:
    for weight in block.experts.parameters():
        weight.requires_grad_(True)
    return block


def arms_of(block: nn.Module, rank: int) -> dict[str, nn.Module]:
    make: dict[str, Callable[[nn.Module, int], nn.Module]] = {
        FROZEN: lambda block, rank: block,
        AGAIN: lambda block, rank: block,
        "peft": peft_block,
        "lora_fast accelerate_peft": accelerated,
        "lora_fast apply_lora": injected,
        "full": full,
    }
    return {name: build(shared(block), rank) for name, build in make.items()}


def measure(args: argparse.Namespace, rank: int):
    from lora_fast.profiler.intervals import ratio_with_interval

    torch.manual_seed(0)
    arms = arms_of(block_of(args), rank)
    device = torch.device(args.device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    x, dy = (torch.randn(1, args.tokens, args.hidden, device=device).to(harness.DTYPES[args.dtype]) for _ in range(2))
    x.requires_grad_()

    def step(block: nn.Module) -> float:
        wait()
        start = time.perf_counter()
        y = block(x)
        (y[0] if isinstance(y, tuple) else y).backward(dy)
        wait()
        took = 1e3 * (time.perf_counter() - start)
        for leaf in (x, *block.parameters()):
            leaf.grad = None
        return took

    saved = {name: harness.kept_MiB(partial(block, x), block.parameters()) for name, block in arms.items()}
    order, names = random.Random(0), list(arms)
    samples: dict[str, list[float]] = {name: [] for name in names}
    gc.disable()  # a collection inside one arm's step would be that arm's bad luck
    for done in range(args.rounds + 2):
        order.shuffle(names)
        for name in names:
            took = step(arms[name])
            if done >= 2:
                samples[name].append(took)
        gc.collect()
    gc.enable()
    for name in arms:
        ratio, (low, high) = ratio_with_interval(samples[name], samples[FROZEN])
        ordered = sorted(samples[name])
        ms = {f"ms_p{q}": f"{ordered[round(q / 100 * (len(ordered) - 1))]:.1f}" for q in (20, 50, 80)}
        yield {
            **{"op": "experts", "provider": name, "tokens": args.tokens, "experts": args.experts},
            **{"experts_a_token": args.experts_a_token, "hidden": args.hidden, "intermediate": args.intermediate},
            **{"R": rank if name not in (FROZEN, AGAIN, "full") else "", "dtype": args.dtype, **ms},
            **{"ratio_to_frozen": f"{ratio:.3f}", "ratio_low": f"{low:.3f}", "ratio_high": f"{high:.3f}"},
            **{"saved_MiB": f"{saved[name]:.1f}", "rounds": args.rounds},
        }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bf16" if on_gpu else "fp32", choices=harness.DTYPES)
    parser.add_argument("--tokens", type=int, default=4096 if on_gpu else 512)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--experts-a-token", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30 if on_gpu else 10)
    parser.add_argument("--out", type=harness.Path, metavar="DIR", help="where experts.csv goes (benchmarks/results/…)")
    parser.add_argument("--commit", help="what the rows call the commit, where there is no git")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    out = args.out or (harness.results_folder(device) if device.type == "cuda" else harness.RESULTS / "cpu")
    with harness.RowWriter(out / "experts.csv", COLUMNS) as writer:
        for row in measure(args, args.rank):
            writer.write(harness.provenance(device, args.commit) | row)
            told = f"{row['ratio_to_frozen']} [{row['ratio_low']}, {row['ratio_high']}] of the frozen block's"
            print(f"{row['provider']:26} {row['ms_p50']:>9} ms  {told}  keeps {row['saved_MiB']} MiB", flush=True)
    print(f"experts: wrote {writer.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
