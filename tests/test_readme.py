"""README's examples run as they stand, and its tables are what the committed result files say."""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lora_fast
from lora_fast.checkpoint import read_adapter
from lora_fast.cli import main
from lora_fast.profiler import estimate_memory

ROOT = Path(__file__).resolve().parent.parent


def blocks(kind: str, heading: str) -> list[str]:
    """The code blocks of that kind below a heading of README, up to the next one."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    return [text for language, text in fenced if language == kind]


def run_python(folder: Path, text: str) -> str:
    script = folder / "example.py"
    script.write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_command(capsys, command: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in the current folder, in this process, which has imported all."""
    assert command[0] == "lora-fast"
    capsys.readouterr()
    return main(command[1:]), *capsys.readouterr()


def test_the_first_example_runs_and_saves_an_adapter(tmp_path):
    (example,) = blocks("python", "Ten lines")
    run_python(tmp_path, example)
    config, tensors = read_adapter(tmp_path / "adapter")
    assert config.r == 16
    # One AdamW step has moved B away from zero.
    assert tensors["model.layers.0.self_attn.q_proj.lora_B.weight"].abs().max() > 0


def test_the_examples_on_spectra_run_one_after_another(tmp_path, monkeypatch, capsys):
    """After the first example, whose adapter they take: its model is base/, and what merging makes of it tuned/."""
    (first,), (example,) = blocks("python", "Ten lines"), blocks("python", "What an adapter learned")
    first = first.replace("apply_lora(model", 'model.save_pretrained("base")\napply_lora(model', 1)
    merged = "from lora_fast import remove_lora, merge_lora\nmerge_lora(model)\nremove_lora(model)\n"
    merged += 'model.save_pretrained("tuned")\n'
    printed = run_python(tmp_path, first + merged + example)
    assert "model.layers.1.mlp.down_proj" in printed
    assert read_adapter(tmp_path / "smaller")[0].r <= 16
    shutil.copytree(tmp_path / "adapter", tmp_path / "other")
    commands = [line for block in blocks("", "What an adapter learned") for line in block.splitlines()]
    assert len(commands) == 7
    monkeypatch.chdir(tmp_path)
    for command in commands:
        code, out, err = run_command(capsys, shlex.split(command, comments=True))
        assert code == 0 and "Written: " in out, command + err


def test_the_example_of_an_estimate_runs_and_is_the_one_that_is_shown(tmp_path, monkeypatch, capsys):
    """The table below it is of a run with these very settings."""
    heading = "What a model would need that you cannot run"
    commands = [shlex.split(line, comments=True) for line in blocks("", heading)[0].splitlines()]
    assert [command[:2] for command in commands] == [["lora-fast", "estimate"], ["lora-fast", "report"]]
    monkeypatch.chdir(tmp_path)
    for command in commands:
        code, out, err = run_command(capsys, command)
        assert code == 0 and "Crossover in FLOPs" in out, err
    shown = json.loads((ROOT / "benchmarks" / "results" / "predicted" / "llama-8b.json").read_text())
    own = json.loads((tmp_path / "runs" / "8b" / "run.json").read_text())
    settings = ("adapter_dtype", "foreach", "memory_GiB", "batch_size", "seq_len", "dtype", "target_modules", "shards")
    assert {name: shown["workload"][name] for name in settings} == {name: own["workload"][name] for name in settings}
    assert shown["workload"]["model"] == own["workload"]["model"] == "llama-8b"
    for arm, told in zip(own["arms"], shown["arms"], strict=True):
        assert arm["by_category"] == pytest.approx(told["by_category"], rel=1e-3, abs=1)
        assert all(arm[name] == told[name] for name in ("rank", "flops_ratio", "trainable", "fits"))
        assert arm["projected_ms"] == pytest.approx(told["projected_ms"], rel=1e-3)
    assert own["workload"]["projected_on"] == shown["workload"]["projected_on"]


def test_the_projections_shown_are_those_of_today(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import bench_projection

    bench_projection.main(["--tiny", "--commit", "abc", "--out", str(tmp_path)])
    now, shown = (
        list(csv.DictReader((folder / "projection.csv").open(newline="")))
        for folder in (tmp_path, ROOT / "benchmarks" / "results" / "predicted")
    )
    assert len(now) == 24 and len(shown) == 48
    for row, told in zip(now, shown):
        assert float(row.pop("ms")) == pytest.approx(float(told.pop("ms")), rel=1e-3)
        assert {**row, "commit": told["commit"]} == told


def test_the_memory_that_the_profile_shows_is_what_is_predicted_now():
    shown = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "profile.json").read_text())
    work = shown["workload"]
    same = {name: work[name] for name in ("batch_size", "seq_len", "dtype", "adapter_dtype", "foreach", "device")}
    now = estimate_memory(work["model"], [arm["rank"] for arm in shown["arms"] if arm["rank"]], **same)
    for arm, told in zip(now.arms, shown["arms"], strict=True):
        assert arm.peak_MiB == pytest.approx(told["predicted_MiB"], rel=1e-3)
        assert arm.peak_MiB == pytest.approx(told["peak_MiB"], rel=0.01)


def test_the_commands_on_ranks_exist_and_their_example_runs(tmp_path, monkeypatch, capsys):
    """Those that train or read runs are run elsewhere, on small models; here their options are read."""
    heading = "Which rank, or full fine-tuning?"
    commands = [shlex.split(line, comments=True) for line in blocks("", heading)[0].splitlines()]
    assert [command[1] for command in commands] == ["rank", "rank", "rank", "decide", "decide"]
    monkeypatch.chdir(tmp_path)
    for command, wrong in zip(commands, (None, None, "'M'", "runs/profile", "'M'"), strict=True):
        code, _, err = run_command(capsys, command)
        assert (code == 0) if wrong is None else (code == 2 and wrong in err), err
    (example,) = blocks("python", heading)
    curve = "train_and_evaluate = lambda rank, seed: 1.4 + (0 if rank == 'full' else 1 / rank) + seed / 1e4\n"
    assert run_python(tmp_path, curve + example).startswith(("r=", "Full fine-tuning"))


def test_every_public_name_is_explained():
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Names")[2].partition("\n## ")[0]
    assert [name for name in lora_fast.__all__ if not re.search(rf"`{name}\b", table)] == []


def test_the_tables_are_what_the_result_files_say():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "readme.py", "--check"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
