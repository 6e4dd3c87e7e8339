"""How far a busy second core moves the ratios of a profile, paired in rounds and one arm after the other.

    .venv/bin/python benchmarks/bench_noise.py [--rounds 40]

The arms of `lora-fast profile`, with one thread, on a Llama of 5M parameters: alone on the machine, beside a process
that multiplies matrices on another core all the time, and beside one that does so in bursts of one second with pauses
of one second. What has to hold: an arm's ratio under load lies within the sum of both intervals' reaches of the quiet
one (agrees). The last columns say what medians over each arm's own block of steps would have said, taken in the same
process under the same load: what paired rounds are there to avoid. A row is an arm under a load; rows that disagree are
kept."""

import argparse
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import harness
import torch

from lora_fast.profiler.intervals import ratio_with_interval
from lora_fast.profiler.models import resolve
from lora_fast.profiler.process import run_in_child
from lora_fast.profiler.runs import environment
from lora_fast.profiler.workload import FULL, FULL_AGAIN, Workload

LOADS = ("quiet", "busy", "bursts")
COLUMNS = (
    *harness.PROVENANCE,
    *("op", "provider", "model", "tokens", "load", "load_average", "rounds", "ms_p50"),
    *("ratio_to_full", "ratio_low", "ratio_high", "agrees", "sequential_ratio"),
)


def burn(bursts: bool) -> None:
    """Keeps one core busy, with pauses or without."""
    torch.set_num_threads(1)
    x = torch.randn(512, 512)
    while True:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            x = torch.nn.functional.normalize(x @ x)
        time.sleep(1 if bursts else 0)


def sequential(model: str, work: Workload, arms: list[str], rounds: int) -> dict[str, float]:
    """Each arm's median ms where its steps come one after the other, in a process of its own."""
    found = {}
    for name in arms:
        result = run_in_child("time", resolve(model), work, {"arms": [name], "rounds": rounds})
        found[name] = statistics.median(result["arms"][name]["step_ms"])
    return found


def measure(model: str, work: Workload, arms: list[str], rounds: int, load: str) -> dict[str, dict]:
    neighbour = None
    if load != "quiet":
        neighbour = multiprocessing.get_context("spawn").Process(target=burn, args=(load == "bursts",), daemon=True)
        neighbour.start()
        time.sleep(5)  # until it has imported torch
    try:
        result = run_in_child("time", resolve(model), work, {"arms": arms, "rounds": rounds})
        series = {name: one["step_ms"] for name, one in result["arms"].items()}
        alone = sequential(model, work, arms, rounds)
        average = environment("cpu")["load_average_1min"]
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.join()
    rows = {}
    for name, values in series.items():
        if name != FULL:
            ratio, ci = ratio_with_interval(values, series[FULL])
            rows[name] = {
                "provider": name,
                "load": load,
                "load_average": average,
                "rounds": len(values),
                "ms_p50": statistics.median(values),
                "ratio": ratio,
                "ci": ci,
                "sequential_ratio": alone[name] / alone[FULL],
            }
    return rows


def agrees(row: dict, quiet: dict) -> bool:
    """Whether two ratios differ by no more than their intervals reach towards each other."""
    high, low = (row, quiet) if row["ratio"] > quiet["ratio"] else (quiet, row)
    return high["ratio"] - low["ratio"] <= (high["ratio"] - high["ci"][0]) + (low["ci"][1] - low["ratio"])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="llama-5m", help="a built-in shape or a config.json")
    parser.add_argument("--ranks", default="8,64")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, metavar="DIR", default=harness.RESULTS / "cpu")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # of the children, too: the other core is the neighbour's
    work = Workload(
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        dtype="fp32",
        target_modules="all-linear",
        device="cpu",
        seed=0,
    )
    arms = [*(f"r{rank}" for rank in args.ranks.split(",")), FULL, FULL_AGAIN]
    start = harness.provenance(torch.device("cpu")) | {"op": "noise", "model": args.model, "tokens": work.tokens}
    quiet: dict[str, dict] = {}
    disagreeing = 0
    with harness.RowWriter(args.out / "noise.csv", COLUMNS) as writer:
        for load in LOADS:
            rows = measure(args.model, work, arms, args.rounds, load)
            quiet = quiet or rows
            for name, row in rows.items():
                fine = agrees(row, quiet[name])
                disagreeing += not fine
                shown = {
                    **{key: row[key] for key in ("provider", "load", "rounds")},
                    "load_average": f"{row['load_average']:.1f}",
                    "ms_p50": f"{row['ms_p50']:.1f}",
                    "ratio_to_full": f"{row['ratio']:.3f}",
                    "ratio_low": f"{row['ci'][0]:.3f}",
                    "ratio_high": f"{row['ci'][1]:.3f}",
                    "agrees": fine,
                    "sequential_ratio": f"{row['sequential_ratio']:.3f}",
                }
                writer.write(start | shown)
                print(
                    f"{load:7} {name:11} {shown['ratio_to_full']} [{shown['ratio_low']}, {shown['ratio_high']}]  "
                    f"one after the other {shown['sequential_ratio']}  {'' if fine else 'DISAGREES'}",
                    flush=True,
                )
    print(f"wrote {writer.path}; {disagreeing} ratios moved by more than their intervals")
    return 0


if __name__ == "__main__":
    sys.exit(main())
