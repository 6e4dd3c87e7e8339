"""What the GPU benchmarks share around the timing: command line, provenance, rows on disk once done, a deadline."""

import argparse
import csv
import platform
import re
import subprocess
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PROVENANCE = ("commit", "gpu", "torch", "triton", "peft")
# What every benchmark's rows hold: provenance, the case, the arm, its figures.
COLUMNS = (
    *PROVENANCE,
    *("op", "provider", "M", "N", "K", "R", "dtype", "dropout"),
    *("ms_p20", "ms_p50", "ms_p80", "peak_MiB", "saved_MiB"),
    *("ratio_to_frozen", "ratio_low", "ratio_high", "gemm_over_cublas"),
    *("route", "rounds", "timed_by", "error"),
)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name} ({torch.get_num_threads()} threads)"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def commit() -> str:
    """What git calls the tree; "unknown" where there is no git or no checkout."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def provenance(device: torch.device, of_commit: str | None = None) -> dict[str, str]:
    return {
        "commit": of_commit or commit(),
        "gpu": device_name(device),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "peft": installed("peft"),
    }


def results_folder(device: torch.device) -> Path:
    """benchmarks/results/<GPU>: "NVIDIA H100 80GB HBM3" → nvidia-h100-80gb-hbm3."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


# What a row says whose arm was not measured because of the deadline: no failure.
NO_TIME = "no time left"


class Deadline:
    """Seconds that remain of a limit, counted from when it is made; None: no limit."""

    def __init__(self, seconds: float | None):
        self.end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        return float("inf") if self.end is None else self.end - time.monotonic()


def kept_MiB(call: Callable[[], Any], left_out: Iterable[torch.Tensor]) -> float:
    """What the graph of a call's result keeps for backward, each storage once, without those of `left_out`.

    What is saved and dropped again with a part of the graph that leads nowhere doesn't count."""
    others = {tensor.untyped_storage().data_ptr() for tensor in left_out}
    saved: list[weakref.ref] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = call()
    storages = [tensor.untyped_storage() for ref in saved if (tensor := ref()) is not None]
    total = sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in others}.values())
    del result
    return total / 2**20


class RowWriter:
    """A CSV file whose rows are on disk as soon as they are written."""

    def __init__(self, path: Path, columns: Sequence[str]):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, columns, restval="")
        self.writer.writeheader()
        self.file.flush()

    def write(self, row: Mapping[str, Any]) -> None:
        self.writer.writerow(row)
        self.file.flush()

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def arguments(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line that all GPU benchmarks have; --deadline becomes a Deadline, --device a torch.device."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try the benchmark out")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds of a case")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="begin no case that would not end by then")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the CSV goes (benchmarks/results/<GPU>)")
    parser.add_argument("--commit", help="what the rows call the commit, where there is no git")
    parser.add_argument("--tiny", action="store_true", help="small sizes and few rounds; its numbers mean nothing")
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu is for --tiny only: the benchmark is about GPUs")
    if args.tiny and args.out is None:
        parser.error("--tiny needs --out: its numbers don't belong among the results")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU: nothing ran", file=sys.stderr)
        raise SystemExit(3)
    args.device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    args.deadline = Deadline(args.deadline)
    args.out = args.out or results_folder(args.device)
    args.dtype_name, args.dtype = args.dtype, DTYPES[args.dtype]
    if args.tiny:
        args.rounds = min(args.rounds, 6)
    return args


def run(
    args: argparse.Namespace,
    op: str,
    cases: Iterable[Any],
    measure: Callable[[Any], Iterable[Mapping[str, Any]]],
    columns: Sequence[str] = COLUMNS,
) -> int:
    """Measures the cases in their order into <op>.csv; returns the exit status, 1 if a case or an arm failed.

    No case begins that would outlast the deadline, judged by the longest one so far."""
    cases = list(cases)
    start_of_row = provenance(args.device, args.commit) | {"op": op, "dtype": args.dtype_name}
    failed, longest = [], 0.0
    with RowWriter(args.out / f"{op}.csv", columns) as writer:
        for number, case in enumerate(cases):
            if args.deadline.left() < longest:
                print(f"{op}: deadline; {len(cases) - number} of {len(cases)} cases left out, from {case} on")
                break
            start = time.monotonic()
            print(f"{op}: {case}", flush=True)
            try:
                for row in measure(case):
                    writer.write(start_of_row | row)
                    print(line(row), flush=True)
                    if row.get("error") not in (None, "", NO_TIME):
                        failed.append(f"{case}, {row['provider']}: {row['error']}")
            except Exception as error:  # the cases after it are worth having
                traceback.print_exc()
                failed.append(f"{case}: {type(error).__name__}: {error}")
            longest = max(longest, time.monotonic() - start)
    print(f"{op}: wrote {writer.path}")
    for what in failed:
        print(f"{op}: FAILED {what}")
    return int(bool(failed))


def line(row: Mapping[str, Any]) -> str:
    """One row for a reader of the log."""
    if row.get("error"):
        return f"  {row['provider']:34} {row['error']}"
    ratio = f"{row['ratio_to_frozen']} [{row['ratio_low']}, {row['ratio_high']}]" if row.get("ratio_to_frozen") else ""
    return f"  {row['provider']:34} {row.get('ms_p50', ''):>10} ms  {ratio:26} {row.get('route', '')}".rstrip()
