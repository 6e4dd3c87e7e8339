"""What a run leaves in its folder while it is under way, and how a later one goes on from there.

resume.json holds what was asked for, the machine, which arms share a process, and why some are in none; arms.jsonl a
line for each arm whose memory was measured; rounds-1.jsonl and so on the timed rounds. The first two are written whole
or not at all, of the third the last line may be cut off. What is in them is not measured again; run.json takes the
place of all but arms.jsonl once the run ends."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lora_fast import LoraFastError
from lora_fast.profiler.profile import Arm, Profile
from lora_fast.profiler.runs import RunFolder, read_profile, to_json

# Settings that say how long to measure and not what.
FREE = {
    *("rounds_wanted", "time_budget_s", "target_ci", "arm_timeout_s", "price_per_hour"),
    *("rounds", "warm_up_rounds", "warm_up_stable", "stopped_by", "widest_half_width"),
}
# Numbers of two machines don't belong into one run, nor those of two versions.
MACHINE = ("lora_fast", "python", "torch", "transformers", "triton", "cpu", "threads", "gpu")
PLAN = "resume.json"


class UnderWay:
    """A run under way in a folder. Raises LoraFastError where the folder's run was of other settings or elsewhere."""

    def __init__(self, folder: RunFolder, settings: dict, environment: dict):
        self.folder, self.groups, self.reasons = folder, None, {}
        self._plan = json.loads(to_json({"settings": settings, "environment": environment, "groups": None}))
        earlier = folder.path / PLAN
        if earlier.is_file():
            with _readable(earlier):
                before = json.loads(earlier.read_text(encoding="utf-8"))
                settings, environment = dict(before["settings"]), dict(before["environment"])
                self.groups, self.reasons = before["groups"], before.get("reasons", {})
            self._compare(settings, environment)
        elif (folder.path / "arms.jsonl").is_file():
            raise LoraFastError(
                f"{folder.path} has no {PLAN}, so that its run can't be gone on with; give another --out"
            )
        else:
            self._write()
        for partial in folder.path.glob(".*.json*"):  # of a write that was cut off
            partial.unlink()

    def _compare(self, settings: dict, environment: dict) -> None:
        now = self._plan["settings"]
        _check_same(self.folder.path, settings, now, (settings.keys() | now.keys()) - FREE)
        _check_same(self.folder.path, environment, self._plan["environment"], MACHINE)

    def _write(self) -> None:
        self.folder.write(PLAN, to_json(self._plan | {"groups": self.groups, "reasons": self.reasons}))

    def set_groups(self, groups: Sequence[Sequence[str]], reasons: dict[str, str]) -> None:
        """The names that each process times, and of arms that are in none why not."""
        self.groups, self.reasons = [list(names) for names in groups], reasons
        self._write()

    def measured(self) -> dict[str, Arm]:
        """Arms that arms.jsonl has a line for, by name."""
        file = self.folder.path / "arms.jsonl"
        with _readable(file):
            lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
            arms = [Arm(**json.loads(line)) for line in lines]
        return {arm.name: arm for arm in arms}

    def end(self) -> None:
        for file in (self.folder.path / PLAN, *self.folder.path.glob("rounds-*.jsonl")):
            file.unlink(missing_ok=True)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise LoraFastError(
            f"{file} is damaged ({type(error).__name__}: {error}), so that its run can't be gone on with; give another "
            "--out"
        ) from error


def finished(path: Path, settings: dict) -> Profile | None:
    """The profile of a folder whose run has ended; None for one whose run has not, or that is not there. Raises
    LoraFastError where it was of other settings, as far as it tells: to show it as that of these would be wrong."""
    if not (path / "run.json").is_file():
        return None
    ended = read_profile(path)
    told = {"arms": [arm.name for arm in ended.arms], "layers": ended.layers is not None, **ended.workload}
    now = json.loads(to_json(settings))
    _check_same(path, told, now, (told.keys() & now.keys()) - {"price_per_hour"})
    return replace(ended, folder=path, workload=ended.workload | {"price_per_hour": now["price_per_hour"]})


def _check_same(path: Path, told: dict, now: dict, names: Iterable[str]) -> None:
    for name in sorted(names):
        if told.get(name) != now.get(name):
            raise LoraFastError(
                f"{path} was measured with {name}={told.get(name)!r}, and now it is {now.get(name)!r}; --resume needs "
                "the same arguments and machine, or give another --out"
            )
