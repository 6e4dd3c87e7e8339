"""A measurement in a process of its own: whatever happens to it, out of memory, hanging or killed, comes back as a
status."""

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from lora_fast import LoraFastError
from lora_fast.profiler.layers import time_layers
from lora_fast.profiler.memory import measure_arm
from lora_fast.profiler.models import ModelSource
from lora_fast.profiler.timing import time_arms, time_limit
from lora_fast.profiler.workload import Workload, describe

# Threads that wait by spinning fight with whatever else runs (on two busy cores a step took five times as long), and
# the spinning counts as CPU time. A policy that the user has set stays.
WAITING = "PASSIVE"

# What runs in the child. It takes the parent's search path, however that came about, and nothing from the current
# folder.
_CHILD = """
import json, sys
sys.path[:] = json.load(open(sys.argv[1]))["path"]
from lora_fast.profiler import process
process.child()
"""


def environment_of_children() -> dict[str, str]:
    return {"OMP_WAIT_POLICY": WAITING, **os.environ}


def run_in_child(
    task: str,
    source: ModelSource,
    workload: Workload,
    arguments: dict,
    *,
    environment: dict[str, str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict:
    """Run a task ("memory", "time" or "layers") on source and workload in a fresh process, with these arguments beside
    them.

    Returns its answer, a dict with the status "ok"; or {"status", "error", perhaps "requested_MiB"} where the status is
    "oom": memory ran out, raised or killed for it; "timeout": a `time_limit` ended it; "killed": a signal did, and the
    system counts no process more that it killed for memory; "failed": anything else. Raises LoraFastError where the
    child found the input at fault, OSError where its record could not be written. environment: variables besides
    `environment_of_children`. progress gets what the task reports."""
    kills = _memory_kills()
    with tempfile.TemporaryDirectory(prefix="lora-fast-") as folder:
        request, answer, errors = (Path(folder, name) for name in ("request.json", "answer.json", "stderr"))
        request.write_text(
            json.dumps(
                {
                    "path": sys.path,
                    "parent": os.getpid(),
                    "threads": torch.get_num_threads(),
                    "task": task,
                    "source": source.to_dict(),
                    "workload": vars(workload),
                    "arguments": arguments,
                }
            )
        )
        with (
            errors.open("wb") as stderr,
            subprocess.Popen(
                [sys.executable, "-P", "-c", _CHILD, str(request), str(answer)],
                env={**environment_of_children(), **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                encoding="utf-8",
                errors="replace",
            ) as child,
        ):
            try:
                for line in child.stdout:  # a blocking read: waiting takes no CPU from the child
                    if progress and line.startswith(_MARK):
                        done, total, text = line[len(_MARK) :].rstrip("\n").split(" ", 2)
                        progress(int(done), int(total), text)
            except BaseException:
                child.kill()
                raise
        if answer.is_file():
            result = json.loads(answer.read_text())
            if result["status"] == "bad input":
                raise LoraFastError(result["error"])
            if result["status"] == "not recorded":
                raise OSError(*result["error"])
            return result
        return _death(child.returncode, errors.read_text(errors="replace"), _memory_kills() > kills)


_MARK = "lora-fast progress "


def _report(done: int, total: int, text: str = "") -> None:
    print(f"{_MARK}{done} {total} {text}", flush=True)


def _memory_kills() -> int:
    """Processes that Linux has killed for memory, on this machine and in this control group; 0 where it doesn't say."""
    count = 0
    for file in ("/proc/vmstat", "/sys/fs/cgroup/memory.events"):
        with contextlib.suppress(OSError):
            lines = Path(file).read_text().splitlines()
            count += sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return count


def _death(code: int, stderr: str, for_memory: bool) -> dict:
    """The status of a child that ended without an answer."""
    last = stderr.strip().splitlines()[-1][:300] if stderr.strip() else "no message"
    hung = re.search(r"^Timeout \((\d+):(\d\d):(\d\d(?:\.\d+)?)\)!\n(.*)", stderr, re.MULTILINE | re.DOTALL)
    if hung:
        hours, minutes, seconds, threads = hung.groups()
        short = (int(hours), int(minutes)) == (0, 0)
        after = f"{float(seconds):g} s" if short else f"{hours}:{minutes}:{seconds[:2]}"
        return {"status": "timeout", "error": f"not done after {after}, {_innermost(threads)}"}
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL) and for_memory:
        return {"status": "oom", "error": "killed by the system (SIGKILL), because memory ran out"}
    if "bad_alloc" in stderr or "MemoryError" in stderr:
        return {"status": "oom", "error": f"ended with code {code}: {last}"}
    if code < 0:
        return {"status": "killed", "error": f"killed by {signal.Signals(-code).name}: {last}"}
    return {"status": "failed", "error": f"the measuring process ended with code {code}: {last}"}


def _innermost(traceback: str) -> str:
    """Where the main thread was, from faulthandler's threads: the main thread comes last, its innermost call first."""
    frames = re.findall(r'\(most recent call first\):\n  File "([^"]+)", line (\d+) in (\S+)', traceback)
    if not frames:
        return "where is not known"
    file, line, function = frames[-1]
    return f"in {function} ({Path(file).name}:{line})"


def _end_with(parent: int) -> None:
    """On Linux, let the system end this process when its parent ends, however that may be: what goes on after a kill
    would write into the files of the run that takes this one up."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
        if os.getppid() != parent:
            sys.exit("the parent has ended")


def child() -> None:
    """Entry point of the child: read the request, write the answer whole or not at all."""
    request = json.loads(Path(sys.argv[1]).read_text())
    answer = Path(sys.argv[2])
    _end_with(request["parent"])
    torch.set_num_threads(request["threads"])
    fields = request["workload"]
    for name in ("target_modules", "exclude_modules", "target_parameters"):
        if isinstance(fields[name], list):
            fields[name] = tuple(fields[name])
    source, workload = ModelSource(**request["source"]), Workload(**fields)
    try:
        arguments = request["arguments"]
        if request["task"] == "memory":
            with time_limit(arguments.pop("arm_timeout_s", None)):
                result = measure_arm(source, workload, **arguments)
        elif request["task"] == "time":
            result = time_arms(source, workload, **arguments, progress=_report)
        else:
            result = time_layers(source, workload, **arguments, progress=_report)
    except LoraFastError as error:
        result = {"status": "bad input", "error": str(error)}
    except Exception as error:
        traceback.print_exc()
        result = describe(error)
        record = request["arguments"].get("record")
        if isinstance(error, OSError) and record and error.filename == record:  # no arm's fault
            result = {"status": "not recorded", "error": [error.errno, error.strerror, error.filename]}
    partial = answer.with_suffix(".tmp")
    partial.write_text(json.dumps(result))
    os.replace(partial, answer)
