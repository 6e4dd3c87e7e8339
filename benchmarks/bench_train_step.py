"""A training step of a Llama of 25M parameters with our layers, with PEFT's, and with PEFT's accelerated in place.

    .venv/bin/python benchmarks/bench_train_step.py [--rounds 30] [--batch-size 2 --seq-len 256] [--dora]

Every arm trains the same adapter on the same base weights (forward, backward, AdamW on A and B) in one process, stepped
in randomized rounds; only ratios within a round are compared, and a second copy of the baseline (the A/A arm) shows the
method's noise. The frozen model, without adapters and optimizer, is the floor of every LoRA. A row of the CSV is an
arm: its ratio to PEFT's defaults with a 95% interval, and what it keeps for backward in MiB, each storage counted once,
parameters left out. Rows that lose are kept. With --dora all adapters are DoRA but those of one arm more.
"""

import argparse
import copy
import csv
import gc
import random
import time
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from harness import RESULTS, commit, kept_MiB, processor
from torch import nn

from lora_fast import LoraConfig, accelerate_peft, apply_lora
from lora_fast.profiler.intervals import ratio_with_interval
from lora_fast.profiler.models import build, resolve

BASELINE, AGAIN, FROZEN, WITHOUT_DORA = "peft", "peft again", "frozen", "lora_fast without dora"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP_ROUNDS = 3


def peft_model(
    base: nn.Module, rank: int, dropout: float, dora: bool = False, *, fp32_adapters: bool = True
) -> nn.Module:
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, use_dora=dora, target_modules="all-linear"
    )
    torch.manual_seed(0)
    return peft.get_peft_model(base, config, autocast_adapter_dtype=fp32_adapters)


def injected(base: nn.Module, rank: int, dropout: float, dora: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return apply_lora(base, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, use_dora=dora))


def accelerated(base: nn.Module, rank: int, dropout: float, dora: bool = False) -> nn.Module:
    model = peft_model(base, rank, dropout, dora)
    accelerate_peft(model)
    return model


def frozen(base: nn.Module) -> nn.Module:
    """The model without adapters, the gradient let in behind its embeddings: what no LoRA can be faster than."""
    base.enable_input_require_grads()
    return base


def share_weights(base: nn.Module) -> nn.Module:
    """A copy of the model around the same frozen parameters: every arm reads the same weights from the same memory."""
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


def arms_of(base: nn.Module, rank: int, dropout: float, dtype: str, dora: bool) -> dict[str, nn.Module]:
    adapter = rank, dropout, dora
    arms = {
        BASELINE: peft_model(share_weights(base), *adapter),
        AGAIN: peft_model(share_weights(base), *adapter),
        "lora_fast": injected(share_weights(base), *adapter),
        "accelerate_peft": accelerated(share_weights(base), *adapter),
        FROZEN: frozen(share_weights(base)),
    }
    if dtype == "bf16":
        arms["peft bf16 adapters"] = peft_model(share_weights(base), *adapter, fp32_adapters=False)
    if dora:
        arms[WITHOUT_DORA] = injected(share_weights(base), rank, dropout)
    return {name: model.train() for name, model in arms.items()}


def saved_MiB(model: nn.Module, ids: torch.Tensor) -> float:
    """What the decoder keeps between forward and backward, parameters left out."""
    decoder = next(m for m in model.modules() if type(m).__name__ == "LlamaModel")
    return kept_MiB(lambda: decoder(input_ids=ids, use_cache=False).last_hidden_state, model.parameters())


def step(model: nn.Module, optimizer: torch.optim.Optimizer | None, ids: torch.Tensor) -> tuple[float, float]:
    """Milliseconds of one step: on the clock, and of processor time over all threads."""
    cpu, start = time.process_time(), time.perf_counter()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - cpu)


def measure(
    base: nn.Module, ids: torch.Tensor, rank: int, dropout: float, dtype: str, dora: bool, rounds: int
) -> list[dict]:
    arms = arms_of(base, rank, dropout, dtype, dora)
    saved = {name: saved_MiB(model, ids) for name, model in arms.items()}
    # A learning rate of 0 does all of AdamW's work and keeps every arm at the same weights.
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
        for name, model in arms.items()
        if name != FROZEN
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    order, names = random.Random(0), list(arms)
    gc.collect()
    gc.disable()  # a collection inside one arm's step would be that arm's bad luck
    for done in range(WARM_UP_ROUNDS + rounds):
        order.shuffle(names)
        for name in names:
            sample = step(arms[name], optimizers.get(name), ids)
            if done >= WARM_UP_ROUNDS:
                times[name].append(sample)
        gc.collect()
    gc.enable()
    rows = []
    for name in arms:
        samples, baseline = np.array(times[name]), np.array(times[BASELINE])
        ratio, (low, high) = ratio_with_interval(samples[:, 0], baseline[:, 0])
        cpu_ratio, _ = ratio_with_interval(samples[:, 1], baseline[:, 1])
        p20, p50, p80 = np.percentile(samples[:, 0], [20, 50, 80])
        rows.append(
            {
                "provider": name,
                "M": ids.numel(),
                "R": rank,
                "dtype": dtype,
                "dropout": dropout,
                "rounds": rounds,
                "ms_p20": f"{p20:.1f}",
                "ms_p50": f"{p50:.1f}",
                "ms_p80": f"{p80:.1f}",
                "ratio_to_peft": f"{ratio:.3f}",
                "ratio_low": f"{low:.3f}",
                "ratio_high": f"{high:.3f}",
                "cpu_ratio_to_peft": f"{cpu_ratio:.3f}",
                "saved_MiB": f"{saved[name]:.1f}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="llama-25m", help="a built-in shape or a config.json")
    parser.add_argument("--ranks", default="8,16,64")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--dropouts", default="0,0.05")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dora", action="store_true", help="DoRA in place of LoRA, into train_step_dora_….csv")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu")
    args = parser.parse_args()

    provenance = {
        "commit": commit(),
        "gpu": processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "op": "train_step_dora" if args.dora else "train_step",
        "model": args.model,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{provenance['op']}_{args.batch_size * args.seq_len}.csv"
    with path.open("w", newline="") as file:
        writer = None
        for dtype in args.dtypes.split(","):
            base = build(resolve(args.model), dtype=DTYPES[dtype], device="cpu", seed=0).requires_grad_(False)
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(0, base.config.vocab_size, (args.batch_size, args.seq_len), generator=generator)
            for dropout in map(float, args.dropouts.split(",")):
                for rank in map(int, args.ranks.split(",")):
                    found = measure(base, ids, rank, dropout, dtype, args.dora, args.rounds)
                    rows = [{**provenance, **row} for row in found]
                    if writer is None:
                        writer = csv.DictWriter(file, rows[0])
                        writer.writeheader()
                    writer.writerows(rows)
                    file.flush()
                    for row in rows:
                        print(
                            f"{dtype} r={rank:<3} dropout={dropout:<4} {row['provider']:18} "
                            f"{row['ratio_to_peft']} [{row['ratio_low']}, {row['ratio_high']}]  "
                            f"cpu {row['cpu_ratio_to_peft']}  {row['ms_p50']:>7} ms  saved {row['saved_MiB']} MiB",
                            flush=True,
                        )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
