"""What `make gpu` runs, in one call and within a deadline: the GPU tests, then the benchmarks, most important first.

    python3 benchmarks/gpu.py [--deadline 520] [--out DIR] [--commit NAME] [--only lora_linear,mlp]

Needs torch, triton, transformers, peft, pytest and numpy in this Python, and neither the network nor an installed
lora-fast: the three source folders are made importable as the one package by links under build/path. (The repository's
root must not be on sys.path; CONTRIBUTING.md says why.) Tests of random shapes run where hypothesis is installed.

Results go to --out, else to $OUT, else to benchmarks/results/<GPU>: a CSV per benchmark, and gpu.log, whose last parts
are the rows of bench_host.py and what the tuner chose, as lora_fast/tuned.json has it; eight files. The parts share the
deadline by weight, and what one leaves over goes to those after it. A part that fails, or is stopped at its limit,
doesn't stop the others; the exit status is 1 then. On a machine without a CUDA GPU nothing runs, and the exit status is
0.

Triton compiles on the CPU: while the tests run, the benchmarks run beside them on other cores, unmeasured, so that
their kernels are compiled when they are measured. Where more than nine minutes can be had, several calls give more
rows, each into a folder of its own: `--only tests`, `--only lora_linear,mlp,qkv,grouped` and `--only
train_step_gpu,svd,memory,host`, one soon after the other so that what was compiled is still there."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Nine minutes are the most that one call may take; what is left over is for imports and the last case of each part.
DEADLINE_S = 520
# A benchmark stops itself at its deadline, between rounds; so long after it, it is stopped.
GRACE_S = 20
# compute-sanitizer runs a kernel some ten times slower, and an allocator without a pool shows it each tensor's end.
SANITIZED = ("test_fused.py", "test_one_layer and 16")
# Triton compiles on the CPU: several processes share that, one GPU is enough for tests this small. The benchmarks that
# compile beside the tests have the other cores.
MAX_WORKERS = 12
# Benchmarks with kernels enough to be worth compiling ahead.
COMPILED = ("lora_linear", "train_step_gpu", "mlp", "qkv", "grouped")
NEEDED = ("triton", "numpy", "transformers", "peft", "pytest")


class Part(NamedTuple):
    """A command, and its share of the time that is left when it starts: weight over the weights still to come."""

    name: str
    weight: float
    command: list[str]
    environment: Mapping[str, str]
    # Told --deadline, so that it ends by itself.
    tells_deadline: bool = False


def gpu_tests() -> list[Path]:
    """Tests whose kernels run on whatever device there is."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    names = [path for path in files if "from kernel_support import" in path.read_text(encoding="utf-8")]
    # Both look at compiled or interpreted kernels, which no GPU changes.
    return [path for path in names if path.name not in ("test_offline_compile.py", "test_traffic.py")]


def link_package(folder: Path) -> Path:
    """Makes `folder` hold one package lora_fast, by links to the source folders, as setup.py would install it."""
    package = folder / "lora_fast"
    shutil.rmtree(folder, ignore_errors=True)
    package.mkdir(parents=True)
    for path in (ROOT / "lora_fast").iterdir():
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    for name in ("kernels", "profiler"):
        (package / name).symlink_to(ROOT / name, target_is_directory=True)
    return folder


def parts(out: Path, commit: str | None) -> list[Part]:
    # -P keeps the current folder, the root, off sys.path.
    pytest = [sys.executable, "-P", "-m", "pytest", "-q", "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    workers = ["-n", str(min(os.cpu_count() or 1, MAX_WORKERS)), "--dist", "worksteal"] if find_spec("xdist") else []
    # Choices for the sizes of tests are nobody's business: a cache of their own.
    testing = {"TRITON_INTERPRET": "0", "XDG_CACHE_HOME": str(ROOT / "build" / "cache-of-tests")}
    listed, last = [Part("tests", 40, [*pytest, *workers, *map(str, gpu_tests())], testing)], []
    if sanitizer := shutil.which("compute-sanitizer"):
        file, expression = SANITIZED
        command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *pytest, "-k", expression]
        command += ["-p", "no:xdist", str(ROOT / "tests" / file)]
        last.append(Part("compute-sanitizer", 10, command, testing | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    benches = [("lora_linear", 30), ("train_step_gpu", 16), ("mlp", 14), ("qkv", 12), ("grouped", 8), ("svd", 8)]
    benches += [("memory", 12), ("host", 4)]
    for name, weight in benches:
        rows = ROOT / "build" / "host" if name == "host" else out
        command = [sys.executable, str(ROOT / "benchmarks" / f"bench_{name}.py"), "--out", str(rows)]
        command += ["--commit", commit] if commit else []
        listed.append(Part(name, weight, command, {"XDG_CACHE_HOME": str(ROOT / "build" / "cache")}, True))
    return listed + last


class Log:
    """Prints lines and writes them to a file, each at once."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", encoding="utf-8")

    def __call__(self, text: str) -> None:
        print(text, flush=True)
        self.file.write(text + "\n")
        self.file.flush()


def run_part(part: Part, limit_s: float, environment: Mapping[str, str], log: Log) -> str:
    """Runs a part for at most limit_s; returns "" or what went wrong."""
    command = [*part.command, *(["--deadline", f"{max(limit_s - GRACE_S, 5):.0f}"] if part.tells_deadline else [])]
    log(f"\n=== {part.name} (at most {limit_s:.0f} s)")
    process = start(command, {**environment, **part.environment}, subprocess.PIPE)
    told = []

    def read() -> None:
        for line in process.stdout:
            log(line.rstrip("\n"))
            told.append("Device not supported" in line)

    # Not waited for longer: a grandchild that outlives all else may keep the pipe open.
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        stop(process)
        return f"stopped at its limit of {limit_s:.0f} s"
    finally:
        reader.join(5)
    if status and part.name == "compute-sanitizer" and any(told):
        log("compute-sanitizer doesn't support this machine's device: not run")
        return ""
    return f"exit status {status}" if status else ""


def start(command: list[str], environment: Mapping[str, str], output: int) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def stop(process: subprocess.Popen) -> None:
    """Ends a process and its children, if there still are any."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def compiling(benches: Sequence[Part], environment: Mapping[str, str]) -> Iterator[None]:
    """Inside the block the benchmarks run for the sake of the kernels that they compile, with a table of choices of
    their own: what is timed side by side is no choice."""
    folder = ROOT / "build" / "warm-up"
    shutil.rmtree(folder, ignore_errors=True)
    environment = {**environment, "XDG_CACHE_HOME": str(folder / "cache")}
    running = []
    for part in benches:
        out = part.command.index("--out") + 1
        command = [*part.command[:out], str(folder), *part.command[out + 1 :], *("--rounds", "1")]
        running.append(start(command, environment, subprocess.DEVNULL))
    try:
        yield
    finally:
        for process in running:
            stop(process)


def environment_line() -> str:
    import platform

    import torch
    import triton

    device = torch.cuda.get_device_properties(0)
    driver = ""
    if tool := shutil.which("nvidia-smi"):
        query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
        driver = f", driver {done.stdout.splitlines()[0].strip()}" if done.stdout.strip() else ""
    return (
        f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {device.multi_processor_count} multiprocessors, "
        f"L2 {device.L2_cache_size / 2**20:.0f} MiB, capability {device.major}.{device.minor}{driver}; "
        f"torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}"
    )


def no_gpu() -> str | None:
    """Why nothing can run here, or None."""
    if find_spec("torch") is None:
        return f"{sys.executable} has no torch"
    import torch

    if not torch.cuda.is_available():
        return "there is no CUDA GPU on this machine"
    return None


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--deadline", type=float, default=DEADLINE_S, metavar="SECONDS", help="for everything")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), metavar="DIR", help="where results go")
    parser.add_argument("--commit", help="what the rows call the commit, where there is no git")
    parser.add_argument("--only", default="", help="these parts, separated by commas")
    args = parser.parse_args(argv)
    began_all = time.monotonic()
    if reason := no_gpu():
        print(f"make gpu: {reason}; nothing ran")
        return 0
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        print(f"make gpu: {sys.executable} has no {', '.join(missing)}; nothing ran", file=sys.stderr)
        return 1
    import harness
    import torch

    out = Path(args.out).resolve() if args.out else harness.results_folder(torch.device("cuda", 0))
    listed = every = parts(out, args.commit)
    if args.only:
        wanted = args.only.split(",")
        if unknown := set(wanted) - {part.name for part in listed}:
            parser.error(f"--only {','.join(sorted(unknown))}: parts are {', '.join(part.name for part in listed)}")
        listed = [part for part in listed if part.name in wanted]
    log = Log(out / "gpu.log")
    log(f"{environment_line()}; commit {args.commit or harness.commit()}")
    host_rows = ROOT / "build" / "host" / "host.csv"
    host_rows.unlink(missing_ok=True)  # an earlier run's
    path = link_package(ROOT / "build" / "path")
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    outcomes = {}
    for number, part in enumerate(listed):
        left = args.deadline - (time.monotonic() - began_all)
        limit = left * part.weight / sum(other.weight for other in listed[number:])
        began = time.monotonic()
        benches = [other for other in every if other.name in COMPILED] if part.name == "tests" else []
        with compiling(benches, environment):
            outcomes[part.name] = run_part(part, limit, environment, log) if left > 5 else "no time left: not run"
        log(f"=== {part.name}: {outcomes[part.name] or 'ok'} ({time.monotonic() - began:.0f} s)")
    log("\n" + "\n".join(f"{name:18} {outcome or 'ok'}" for name, outcome in outcomes.items()))
    log(f"{time.monotonic() - began_all:.0f} s in all; results in {out}")
    for title, path in (
        ("host.csv", host_rows),
        ("what the tuner chose", ROOT / "build" / "cache" / "lora_fast" / "tuning.json"),
    ):
        if path.exists():
            log.file.write(f"\n=== {title}\n{path.read_text(encoding='utf-8')}\n")
    log.file.close()
    return int(any(outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
