"""A training step of an 8B Llama on GPUs that aren't here, by their peak rates: our LoRA, PEFT's, full fine-tuning.

    .venv/bin/python benchmarks/bench_projection.py

Nothing is measured, and no GPU is needed: every launch of a traced step takes its FLOPs at the chip's peak rate or its
bytes at the peak bandwidth, whichever is longer (profiler/roofline.py). ms is so the least that the step can take;
ratios compare arms that all miss the peaks. LoRA's adapters are trained in fp32, and PEFT's in bf16 too, which spares
it its copies in fp32. A step of many tokens recomputes its layers (gradient checkpointing), as there is no room
otherwise."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness

from lora_fast.profiler.models import resolve_shapes
from lora_fast.profiler.predict import trace
from lora_fast.profiler.roofline import chip_named
from lora_fast.profiler.workload import Workload

COLUMNS = (
    *("commit", "torch", "transformers", "peft", "op", "model", "gpu", "provider", "M", "R", "dtype", "dropout"),
    *("checkpointing", "forward_ms", "backward_ms", "optimizer_ms", "ms", "ratio_to_full"),
)
MODEL, RANK, LENGTH = "llama-8b", 16, 2048
GPUS = ("H100", "A100", "L40S")
# Sequences in a step, and whether layers are recomputed.
STEPS = ((1, False), (8, True))
ARMS = {
    "full": (None, False, "fp32"),
    "lora_fast": (RANK, False, "fp32"),
    "peft": (RANK, True, "fp32"),
    "peft bf16 adapters": (RANK, True, "bf16"),
}


def rows(start: dict[str, Any], steps: tuple[tuple[int, bool], ...]) -> Iterator[dict[str, Any]]:
    source = resolve_shapes(MODEL)
    for batch_size, checkpointing in steps:
        for dropout in (0.0, 0.05):
            work = {"batch_size": batch_size, "seq_len": LENGTH, "dtype": "bf16", "target_modules": "all-linear"}
            work |= {"device": "cuda", "seed": 0, "gradient_checkpointing": checkpointing, "lora_dropout": dropout}
            steps_of = {
                name: trace(source, Workload(**work, adapter_dtype=adapter_dtype), rank, peft=peft)
                for name, (rank, peft, adapter_dtype) in ARMS.items()
            }
            for gpu in GPUS:
                took = {name: step.seconds(chip_named(gpu)) for name, step in steps_of.items()}
                for name, phases in took.items():
                    yield start | {
                        **{"op": "train_step", "model": MODEL, "gpu": gpu, "provider": name, "M": batch_size * LENGTH},
                        **{"R": ARMS[name][0] or "", "dtype": "bf16", "dropout": dropout},
                        "checkpointing": checkpointing,
                        **{f"{phase}_ms": f"{1000 * seconds:.1f}" for phase, seconds in phases.items()},
                        "ms": f"{1000 * sum(phases.values()):.1f}",
                        "ratio_to_full": f"{sum(phases.values()) / sum(took['full'].values()):.3f}",
                    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "predicted", metavar="DIR")
    parser.add_argument("--commit", help="what the rows call the commit, where there is no git")
    parser.add_argument("--tiny", action="store_true", help="one sequence alone, to see that it runs")
    args = parser.parse_args(arguments)
    start = {"commit": args.commit or harness.commit()}
    start |= {name: harness.installed(name) for name in ("torch", "transformers", "peft")}
    with harness.RowWriter(args.out / "projection.csv", COLUMNS) as writer:
        for row in rows(start, STEPS[:1] if args.tiny else STEPS):
            writer.write(row)
            print(
                f"{row['gpu']:6} {row['M']:>6} tokens p={row['dropout']:<5} {row['provider']:20} {row['ms']:>8} ms "
                f"{row['ratio_to_full']:>6} of full",
                flush=True,
            )
    print(f"wrote {writer.path}")


if __name__ == "__main__":
    main()
