"""Trains a LoRA adapter whose spectrum is worth a look: benchmarks/train_adapter.py [--base DIR] [--out DIR].

A Llama of 4 layers and 3 M parameters reads bytes. All of it is first trained on prose (the reference of the Python
language, from pydoc_data), then a LoRA adapter on it learns code (the standard library's sources): texts that every
Python has. --out gets base/, adapter/ (PEFT's files) and training.json; --base takes the base of an earlier run and
trains another adapter on it. It takes minutes on two CPU cores."""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_fast import LoraConfig, apply_lora, lora_parameters, save_adapter
from lora_fast.profiler import small_example
from lora_fast.profiler.models import SHAPES
from lora_fast.profiler.runs import default_folder, environment, to_json

SHAPE = "llama-5m"
BATCH, LENGTH = 8, 128
WARM_UP = 0.1
BASE_RATE, ADAPTER_RATE = 1e-3, 2e-3


def split(text: bytes) -> tuple[Tensor, Tensor]:
    """(to train on, held out), as byte ids."""
    parts = small_example.split(text)
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in parts)


@torch.no_grad()
def loss(model: nn.Module, ids: Tensor, batches: int = 16) -> float:
    """Mean cross-entropy in nats a byte, over windows spread evenly over `ids`."""
    starts = torch.linspace(0, len(ids) - LENGTH - 1, batches * BATCH).long()
    rows = torch.stack([ids[start : start + LENGTH] for start in starts])
    return sum(model(input_ids=part, labels=part).loss.item() for part in rows.split(BATCH)) / batches


def train(model: nn.Module, parameters: list[nn.Parameter], ids: Tensor, steps: int, rate: float, seed: int) -> None:
    """AdamW on random windows, with a warm-up and a cosine down to 0."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    warm_up = max(1, int(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=generator)
        rows = torch.stack([ids[start : start + LENGTH] for start in starts])
        found = model(input_ids=rows, labels=rows).loss
        found.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"  step {step + 1}/{steps}: {found.item():.3f} nats a byte", flush=True)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--base", type=Path, help="base/ of an earlier run; default: train one")
    parser.add_argument("--base-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=400, help="of the adapter")
    parser.add_argument("-r", "--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the adapter's start and of its batches")
    parser.add_argument("--out", type=Path, help="a new folder; default: runs/adapter-DATE-TIME")
    args = parser.parse_args(argv)
    out = args.out or default_folder("adapter")
    out.mkdir(parents=True)
    started = time.perf_counter()
    (prose_ids, prose_held), (code_ids, code_held) = split(small_example.prose()), split(small_example.code())

    torch.manual_seed(0)
    if args.base:
        model = LlamaForCausalLM.from_pretrained(args.base)
    else:
        model = small_example.byte_llama(SHAPES[SHAPE], LENGTH)
        print(f"base: {args.base_steps} steps on {len(prose_ids):,} bytes of prose")
        train(model, list(model.parameters()), prose_ids, args.base_steps, BASE_RATE, seed=0)
        model.save_pretrained(out / "base")
    before = {"prose": loss(model, prose_held), "code": loss(model, code_held)}

    torch.manual_seed(args.seed)
    apply_lora(model, LoraConfig(r=args.rank, lora_alpha=2 * args.rank))
    print(f"adapter: r={args.rank}, {args.steps} steps on {len(code_ids):,} bytes of code")
    train(model, lora_parameters(model), code_ids, args.steps, ADAPTER_RATE, seed=1 + args.seed)
    after = {"prose": loss(model, prose_held), "code": loss(model, code_held)}
    save_adapter(model, out / "adapter")
    document = {
        "environment": environment("cpu"),
        "shape": SHAPE,
        "parameters": sum(p.numel() for p in model.parameters() if not p.requires_grad),
        "rank": args.rank,
        "scaling": 2.0,
        "base_steps": None if args.base else args.base_steps,
        "steps": args.steps,
        "tokens_per_step": BATCH * LENGTH,
        "base_learning_rate": BASE_RATE,
        "learning_rate": ADAPTER_RATE,
        "seed": args.seed,
        "held_out_loss_before": before,
        "held_out_loss_after": after,
        "seconds": time.perf_counter() - started,
    }
    (out / "training.json").write_text(to_json(document), encoding="utf-8")
    print(json.dumps({"before": before, "after": after, "seconds": round(document["seconds"])}))
    print(f"{out}/adapter, trained on {args.base or out / 'base'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
