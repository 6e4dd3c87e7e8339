"""Runs that are killed, at several moments and for real, and go on: no arm and no round is measured again."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_fast import LoraFastError
from lora_fast.profiler import profile_ranks
from lora_fast.profiler.resume import PLAN, UnderWay
from lora_fast.profiler.runs import RunFolder, read_profile

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="children end with their parent on Linux")
SCRIPT = Path(sys.executable).parent / "lora-fast"
CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ROUNDS = 120
OPTIONS = ["--ranks", "2", "--batch-size", "2", "--seq-len", "16", "--device", "cpu", "--steps", str(ROUNDS)]


def start(folder, *more):
    command = [SCRIPT, "profile", "config.json", *OPTIONS, "--out", "run", *more]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(path):
    return path.read_text().split("\n")[:-1] if path.exists() else []


def rounds(run):
    return [json.loads(line)["round"] for line in lines(run / "rounds-1.jsonl") if line.startswith('{"round"')]


def kill_when(process, happened):
    limit = time.monotonic() + 120
    while not happened():
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(0.2)  # until the system has ended its child, too


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with a run that was killed as soon as its plan was written."""
    folder = tmp_path_factory.mktemp("begun") / "work"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    kill_when(start(folder), lambda: (folder / "run" / PLAN).exists())
    return folder


@pytest.fixture
def folder(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / begun.name)


def test_a_run_killed_at_several_moments_loses_no_arm_and_no_round(folder):
    run = folder / "run"
    assert not (run / "run.json").exists() and lines(run / "arms.jsonl") == []
    kill_when(start(folder, "--resume"), lambda: len(lines(run / "arms.jsonl")) == 1)
    first = lines(run / "arms.jsonl")
    kill_when(start(folder, "--resume"), lambda: len(rounds(run)) >= 3)
    measured, kept = lines(run / "arms.jsonl"), rounds(run)
    assert measured[0] == first[0] and len(measured) == 2
    time.sleep(1)
    assert rounds(run) == kept and len(kept) < ROUNDS  # nothing goes on without its parent

    last = start(folder, "--resume")
    _, said = last.communicate(timeout=300)
    assert last.returncode in (0, 4), said
    assert "process per arm: 1/2" not in said and f"{ROUNDS}/{ROUNDS}" in said  # no arm's memory was measured again
    profile = read_profile(run)
    assert [arm.peak_MiB for arm in profile.arms] == [json.loads(line)["peak_MiB"] for line in measured]
    for arm in profile.arms:
        assert len(arm.samples_ms) == ROUNDS
        assert arm.samples_ms[: len(kept)] == [taken[arm.name]["step_ms"] for taken in kept]
    assert profile.lora[0].ratio_to_full > 0 and profile.aa["samples_ms"]
    names = sorted(path.name for path in run.iterdir())
    assert names == ["arms.jsonl", "rank_cost.png", "report.html", "run.json"]

    # A run that has ended is only shown.
    before = (run / "run.json").read_bytes()
    given = {"batch_size": 2, "seq_len": 16, "device": "cpu", "steps": ROUNDS, "out": run, "resume": True}
    assert profile_ranks(str(folder / "config.json"), [2], **given).to_dict() == profile.to_dict()
    priced = profile_ranks(str(folder / "config.json"), [2], price_per_hour=9.0, **given)
    assert priced.workload["price_per_hour"] == 9
    for changed, message in (
        ({"steps": ROUNDS + 1}, f"rounds_wanted={ROUNDS}, and now it is {ROUNDS + 1}"),
        ({"layers": True}, "layers=False, and now it is True"),
    ):
        with pytest.raises(LoraFastError, match=message):
            profile_ranks(str(folder / "config.json"), [2], **given | changed)
    with pytest.raises(
        LoraFastError, match=r"measured with arms=\['r2', 'full'\], and now it is \['r2', 'r4', 'full'\]"
    ):
        profile_ranks(str(folder / "config.json"), [2, 4], **given)
    with pytest.raises(LoraFastError, match="measured with dtype='fp32', and now it is 'bf16'"):
        profile_ranks(str(folder / "config.json"), [2], dtype="bf16", **given)
    assert (run / "run.json").read_bytes() == before


def test_why_an_arm_is_not_timed_outlives_a_kill(tmp_path):
    settings, machine = {"arms": ["r2", "full"]}, {"torch": "2"}
    why = {"full": "not timed: beside r2 it needs 90 MiB of 80 MiB"}
    UnderWay(RunFolder(tmp_path / "run"), settings, machine).set_groups([["r2", "r2 again"]], why)
    later = UnderWay(RunFolder(tmp_path / "run", True), settings, machine)
    assert (later.groups, later.reasons) == ([["r2", "r2 again"]], why)


def test_what_does_not_belong_together_is_refused(folder):
    run = folder / "run"
    plan = json.loads((run / PLAN).read_text())
    given = {"batch_size": 2, "seq_len": 16, "device": "cpu", "steps": 6, "out": run}
    config = str(folder / "config.json")
    with pytest.raises(LoraFastError, match=r"go on with it with --resume"):
        profile_ranks(config, [2], **given)
    with pytest.raises(LoraFastError, match=r"measured with arms=\['r2', 'full'\], and now it is \['r4', 'full'\]"):
        profile_ranks(config, [4], resume=True, **given)
    with pytest.raises(LoraFastError, match="batch_size=2, and now it is 3"):
        profile_ranks(config, [2], resume=True, **given | {"batch_size": 3})
    (run / "arms.jsonl").write_text("{bro")
    with pytest.raises(LoraFastError, match=r"arms.jsonl is damaged \(JSONDecodeError.*give another --out"):
        profile_ranks(config, [2], resume=True, **given)
    (run / PLAN).write_text("{bro")
    with pytest.raises(LoraFastError, match=r"resume.json is damaged \(JSONDecodeError"):
        profile_ranks(config, [2], resume=True, **given)
    (run / PLAN).write_text(json.dumps(plan | {"environment": plan["environment"] | {"torch": "1.0"}}))
    with pytest.raises(LoraFastError, match=r"torch='1.0'"):
        profile_ranks(config, [2], resume=True, **given)
    with pytest.raises(LoraFastError, match="give it as --out"):
        profile_ranks(config, [2], resume=True)
