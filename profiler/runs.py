"""The run folder (run.json, arms.jsonl, rank_cost.png, report.html), each file written whole or not at all, and where
it came from."""

import json
import os
import platform
import re
import subprocess
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch

import lora_fast
from lora_fast import LoraFastError
from lora_fast.profiler.profile import Profile
from lora_fast.profiler.workload import FULL


def environment(device: str) -> dict:
    """Versions, processor, GPU, threads, load, and the commit of lora-fast where it runs from a git checkout."""
    gpu = None
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {"name": properties.name, "memory_MiB": properties.total_memory / 2**20, "cuda": torch.version.cuda}
    return {
        "lora_fast": lora_fast.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_MiB": _memory_MiB(),
        "load_average_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": gpu,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _memory_MiB() -> float | None:
    """Of the machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (AttributeError, ValueError, OSError):
        return None


def resolve_device(name: str) -> str:
    """The device that --device names; "auto" is the GPU where there is one. Raises LoraFastError for any other."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise LoraFastError(f"device={name!r}; expected auto, cpu, cuda or cuda:N") from error
    if kind not in ("cpu", "cuda"):
        raise LoraFastError(f"device={name!r}; expected auto, cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise LoraFastError(f"device={name!r}, but PyTorch sees no CUDA GPU here; use --device cpu")
    return name


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def _commit() -> str | None:
    """The checkout's commit, with "+" where files differ from it; None for an installed copy.

    An installed copy may lie inside some other project's repository, so git must know this very file."""
    here = Path(lora_fast.__file__)
    try:
        for question in (["ls-files", "--error-unmatch", here.name], ["rev-parse", "HEAD"]):
            answer = subprocess.run(
                ["git", *question], cwd=here.parent, capture_output=True, text=True, timeout=10, check=True
            )
        changed = subprocess.run(
            ["git", "diff", "--quiet", "HEAD"], cwd=here.parent, capture_output=True, timeout=10
        ).returncode
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() + ("+" if changed else "")


def write_whole(path: Path, data: str | bytes) -> None:
    """Replace the file at path in one step: readers see the old content or the new, never a part. Raises OSError that
    names the file."""
    try:
        _write_whole(path, data)
    except OSError as error:
        if error.errno is None:  # not the system's
            raise
        # A full disk's names no file, any other's the part.
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write_whole(path: Path, data: str | bytes) -> None:
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)  # mkstemp gives 0600, which would keep a run from being shared
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def to_json(document: dict) -> str:
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


RUN_FILES = {"run.json", "arms.jsonl", "resume.json"}


class RunFolder:
    """A new or empty folder, made at the first write. Raises LoraFastError for one that holds something, unless it is
    to go on with what is there, and where it could not be made or written to."""

    def __init__(self, path: str | Path, resume: bool = False):
        self.path = Path(path).expanduser()
        if self.path.is_dir():
            content = sorted(entry.name for entry in self.path.iterdir())
            if resume and RUN_FILES & set(content):
                if "run.json" not in content:  # a run that has ended is only shown
                    self._try_out(self.path)
                return
            if {*RUN_FILES, "spectra.json"} & set(content):
                hint = "go on with it with --resume" if "resume.json" in content else "remove that folder first"
                raise LoraFastError(f"{self.path} holds an earlier run; give another --out, or {hint}")
            if content:
                raise LoraFastError(f"{self.path} exists and is not empty ({content[0]}); give a new folder as --out")
        elif self.path.exists():
            raise LoraFastError(f"{self.path} is a file; --out takes a folder")
        here = self.path.absolute()
        self._try_out(next(folder for folder in (here, *here.parents) if folder.exists()))

    def _try_out(self, there: Path) -> None:
        """Makes a folder there and removes it: permissions alone don't tell, nor do they bind root."""
        try:
            os.rmdir(tempfile.mkdtemp(dir=there, prefix=".lora-fast-"))
        except OSError as error:
            raise LoraFastError(
                f"{self.path} cannot be written: {there} takes no new files ({error.strerror}); give another --out"
            ) from error

    def write(self, name: str, data: str | bytes) -> Path:
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / name, data)
        return self.path / name

    def write_arms(self, arms: list[dict]) -> Path:
        """One line of JSON per arm measured so far."""
        return self.write("arms.jsonl", "".join(json.dumps(arm, allow_nan=False) + "\n" for arm in arms))

    def write_run(self, document: dict) -> Path:
        return self.write("run.json", to_json(document))

    def write_chart(self, png: bytes) -> Path:
        return self.write("rank_cost.png", png)


def default_folder(model_name: str) -> Path:
    """runs/<model>-<date>-<time>, with a number behind it where that exists."""
    safe = re.sub(r"[^\w.-]+", "-", model_name).strip("-.") or "model"
    stem = f"{safe}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidates = (Path("runs", stem + (f"-{n}" if n > 1 else "")) for n in range(1, 1000))
    return next(path for path in candidates if not path.exists())


# What every version wrote of a run and shows of it.
_SHOWN = {
    "workload": ("model", "parameters", "dtype", "batch_size", "seq_len", "target_modules"),
    "environment": ("torch", "cpu", "gpu", "threads"),
}


def read_profile(path: str | Path) -> Profile:
    """The profile of a run folder, or of its run.json. Raises LoraFastError for what is none."""
    path = Path(path).expanduser()
    file = path / "run.json" if path.is_dir() else path
    if not file.is_file():
        if (path / "arms.jsonl").is_file():
            raise LoraFastError(f"{path} has arms.jsonl but no run.json: the run has not ended")
        raise LoraFastError(f"{path} is no run: expected a folder of lora-fast profile or estimate, with run.json")
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(run, dict):
            raise TypeError("its content is not an object")
        profile = Profile.from_dict(run)
        for part, names in _SHOWN.items():
            if missing := [name for name in names if name not in run[part]]:
                raise LoraFastError(f"{part} lacks {', '.join(missing)}")
        if not any(arm.kind == FULL for arm in profile.arms):
            raise LoraFastError("arms lacks full fine-tuning, which every run has")
        return profile
    except LoraFastError as error:
        raise LoraFastError(f"{file}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoraFastError(f"{file} is not the run.json of a run: {type(error).__name__}: {error}") from error
