"""Commands that are interrupted or meet a full disk: what they say, what they print all the same, how a run goes on."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_fast.cli import INTERRUPTED, main
from lora_fast.profiler import estimate, sweep

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
MIXTURE = CONFIG | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
PROFILE = ["profile", "config.json", "--ranks", "2", "--batch-size", "2", "--seq-len", "16", "--device", "cpu"]
ESTIMATE = ["estimate", "config.json", "--ranks", "2", "--seq-len", "16"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


def test_an_interrupted_profile_says_how_to_go_on_and_does(here):
    command = [SCRIPT, *PROFILE, "--steps", "6", "--json", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said = []
        for line in process.stderr:
            said.append(line.rstrip("\n"))
            if line.startswith("Memory, a process per arm: 1/2"):
                time.sleep(0.2)
                process.send_signal(signal.SIGINT)
        assert process.stdout.read() == ""
    assert process.returncode == INTERRUPTED
    (run,) = (here / "runs").iterdir()
    assert said[0] == f"lora-fast: into runs/{run.name}/; if stopped, --out and --resume go on"
    assert said[-1] == f"lora-fast: interrupted; the same command with --out runs/{run.name} --resume goes on"
    assert len((run / "arms.jsonl").read_text().splitlines()) == 1
    more = said[-1].partition(" with ")[2].removesuffix(" goes on")
    done = subprocess.run([*command, *shlex.split(more)], capture_output=True, text=True)
    assert done.returncode in (0, 4), done.stderr
    assert "process per arm: 0/2" not in done.stderr
    assert json.loads(done.stdout) == json.loads((run / "run.json").read_text())


def test_what_has_begun_no_run_is_only_interrupted(here, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "estimate_memory", interrupt)
    monkeypatch.setattr(sweep, "profile_ranks", interrupt)
    for arguments in (ESTIMATE, PROFILE):
        assert main(arguments) == INTERRUPTED
        assert capsys.readouterr() == ("", "lora-fast: interrupted\n")


def test_a_folder_with_odd_characters_is_quoted(here, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "_memory_pass", interrupt)
    assert main([*PROFILE, "--out", "my run"]) == INTERRUPTED
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("interrupted; the same command with --out 'my run' --resume goes on\n")


def limited(arguments, size):
    """The command where no file may become larger: the system refuses it more, as a full disk does."""
    resource = pytest.importorskip("resource")
    return subprocess.run(
        [SCRIPT, *arguments],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        capture_output=True,
        text=True,
    )


def test_a_profile_that_cannot_be_written_is_printed_and_can_go_on(here):
    arguments = [*PROFILE, "--steps", "6", "--out", "run"]
    done = limited([*arguments, "--json", "found.json"], 16_000)  # the chart is larger
    assert done.returncode == 2 and "Noise floor" in done.stdout and "Written" not in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("lora-fast: error: run could not be written: ") and "'run/rank_cost.png'" in last
    assert last.endswith("free space, and the same command with --out run --resume goes on")
    assert sorted(path.name for path in (here / "run").iterdir()) == ["arms.jsonl", "resume.json", "rounds-1.jsonl"]
    again = subprocess.run([SCRIPT, *arguments, "--resume", "--json", "-"], capture_output=True, text=True)
    assert again.returncode in (0, 4), again.stderr
    found = json.loads((here / "found.json").read_text())
    for before, now in zip(found["arms"], json.loads(again.stdout)["arms"], strict=True):
        assert now["samples_ms"] == before["samples_ms"] and now["peak_MiB"] == before["peak_MiB"]


def test_a_full_disk_while_timing_is_no_arms_fault(here):
    done = limited([*PROFILE, "--steps", "600", "--out", "run"], 8_000)
    assert done.returncode == 2 and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("lora-fast: error: ") and "'run/rounds-1.jsonl'" in last
    assert last.endswith("the same command with --out run --resume goes on")
    record = (here / "run" / "rounds-1.jsonl").read_text()
    assert '{"round"' in record and "failed" not in record


def test_an_estimate_that_cannot_be_written_is_printed(here):
    done = limited([*ESTIMATE, "--device", "cpu", "--out", "est"], 16_000)
    assert done.returncode == 2 and "Crossover in memory" in done.stdout and "Written" not in done.stdout
    assert done.stderr.splitlines()[-1].startswith("lora-fast: error: est could not be written: ")


def test_a_table_is_printed_where_the_file_of_the_json_is_refused(here):
    done = limited([*ESTIMATE, "--device", "cpu", "--json", "out.json"], 1_000)
    assert done.returncode == 2 and "Crossover in memory" in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("lora-fast: error: ") and "'out.json'" in last
    assert [path.name for path in here.iterdir()] == ["config.json"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="/proc takes no folders, root's neither")
@pytest.mark.parametrize("arguments", [PROFILE, ESTIMATE, ["svd", "adapter"]])
def test_a_folder_that_cannot_be_made_is_told_before_any_work(here, capsys, arguments):
    assert main([*arguments, "--out", "/proc/nope"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("lora-fast: error: /proc/nope cannot be written: ") and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [PROFILE, ESTIMATE])
def test_a_mixtures_experts_are_warned_of_in_a_line_that_names_the_option(here, monkeypatch, capsys, arguments):
    (here / "config.json").write_text(json.dumps(MIXTURE))
    monkeypatch.setattr(sweep, "_predict", interrupt)
    main(arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if ": warning: " in line]
    assert len(lines) == 1 and lines[0].startswith("lora-fast: warning: the experts in ")
    assert lines[0].endswith("as in --target-parameters experts.gate_up_proj,experts.down_proj")
