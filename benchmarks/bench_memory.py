"""Predicted against measured peak memory of a training step, LoRA at several ranks and full fine-tuning.

    make gpu, or: python benchmarks/bench_memory.py [--deadline 90]

Every arm is measured in a process of its own (CUDA's counter of allocated bytes) and predicted from shapes, as
`lora-fast profile` does. What no shape tells, the libraries' workspaces among it, is the same for every arm: the
smallest rank of a model calibrates the prediction, and the others are held to it. A row is an arm; error_percent is
predicted over measured, less 1, and calibrated_error_percent the same after adding the smallest rank's difference
(empty where that rank was not measured).
An arm that runs out of memory has fits=False and its prediction."""

import sys
from collections.abc import Iterator
from typing import NamedTuple

import harness

from lora_fast.profiler.memory import CATEGORIES, MiB
from lora_fast.profiler.models import resolve
from lora_fast.profiler.predict import predict
from lora_fast.profiler.process import run_in_child
from lora_fast.profiler.workload import FULL, LORA, Workload

COLUMNS = (
    *harness.PROVENANCE,
    *("op", "provider", "model", "batch_size", "seq_len", "R", "dtype", "adapter_dtype", "checkpointing", "foreach"),
    *("predicted_MiB", "measured_MiB", "tracked_MiB", "error_percent", "calibrated_error_percent", "peak_phase"),
    *(f"predicted_{category}_MiB" for category in CATEGORIES),
    *("fits", "error"),
)
RANKS = (8, 64, 256)


class Case(NamedTuple):
    model: str
    batch_size: int
    seq_len: int
    checkpointing: bool


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [Case("llama-5m", 1, 16, False)]
    return [Case("llama-1b", 2, 1024, False), Case("llama-8b", 1, 2048, False), Case("llama-8b", 1, 2048, True)]


def measure(case: Case, args) -> Iterator[dict]:
    source = resolve(case.model)
    work = Workload(
        batch_size=case.batch_size,
        seq_len=case.seq_len,
        dtype=args.dtype_name,
        target_modules="all-linear",
        device=str(args.device),
        seed=0,
        gradient_checkpointing=case.checkpointing,
        # PyTorch's choice on a GPU would take full fine-tuning of 8B from 62 to 75 GiB, beside which nothing fits.
        foreach=False,
    )
    ranks = (4,) if args.tiny else RANKS
    difference = None
    for rank in (*ranks, None):
        kind = FULL if rank is None else LORA
        found = predict(source, work, rank)
        result = run_in_child("memory", source, work, {"kind": kind, "rank": rank})
        row = {
            "provider": "full fine-tuning" if rank is None else "lora_fast apply_lora",
            **case._asdict(),
            "R": rank or "",
            "adapter_dtype": work.adapter_dtype,
            "foreach": work.foreach,
            "predicted_MiB": f"{found.peak / MiB:.1f}",
            "peak_phase": found.peak_phase,
            **{f"predicted_{category}_MiB": f"{size / MiB:.1f}" for category, size in found.by_category.items()},
            "fits": result["status"] == "ok",
        }
        if result["status"] == "ok":
            measured = result["peak_MiB"]
            row |= {"measured_MiB": f"{measured:.1f}", "tracked_MiB": f"{result['tracked_peak_MiB']:.1f}"}
            row["error_percent"] = f"{100 * (found.peak / MiB / measured - 1):.2f}"
            if rank == ranks[0]:
                difference = measured - found.peak / MiB
            if difference is not None:
                row["calibrated_error_percent"] = f"{100 * ((found.peak / MiB + difference) / measured - 1):.2f}"
        elif result["status"] != "oom":
            row["error"] = f"{result['status']}: {result['error']}"
        name = "full" if rank is None else f"r{rank}"
        print(f"  {name}: predicted {row['predicted_MiB']} MiB, measured {row.get('measured_MiB', 'out of memory')}")
        yield row


def main(argv=None) -> int:
    args = harness.arguments(__doc__, argv)
    return harness.run(args, "memory", cases(args.tiny), lambda case: measure(case, args), COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
