"""The command `lora-fast`: whole runs as a user starts them, and every kind of wrong input with its exit code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_fast.cli import main
from lora_fast.cli_profile import NOTHING_MEASURED, TOO_NOISY

SCRIPT = Path(sys.executable).parent / "lora-fast"
CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# Σ (K + N) over q (32, 32), k and v (32, 16), o (32, 32), gate and up (32, 48), down (48, 32), in two layers.
PER_RANK = 2 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
SMALL = ["--batch-size", "2", "--seq-len", "16", "--steps", "6", "--device", "cpu"]


def run(arguments, folder):
    """The console script in a process of its own, in that folder."""
    return subprocess.run([SCRIPT, *arguments], cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("work")
    (path / "tiny").mkdir()
    (path / "tiny" / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="module")
def finished(folder):
    modules = ["--target-modules", "q_proj, k_proj,v_proj ,o_proj,gate_proj,up_proj,down_proj,lm_head"]
    modules += ["--exclude-modules", "lm_head, layers.9"]
    arguments = ["profile", "tiny/config.json", "--ranks", "2,16", *SMALL, *modules, "--out", "run", "--json", "-"]
    return run(arguments, folder)


def test_a_run_leaves_its_folder_and_prints_only_json(finished, folder):
    assert finished.returncode in (0, TOO_NOISY), finished.stderr
    assert sorted(path.name for path in (folder / "run").iterdir()) == [
        "arms.jsonl",
        "rank_cost.png",
        "report.html",
        "run.json",
    ]
    document = json.loads(finished.stdout)
    assert document == json.loads((folder / "run" / "run.json").read_text())
    lines = (folder / "run" / "arms.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == document["arms"]
    assert (
        "Traceback" not in finished.stderr
        and "Warning" not in finished.stderr
        and "3/3" in finished.stderr
        and "6/6" in finished.stderr
    )
    # Six rounds of steps of a few milliseconds can be noisy; the code has to say what the file says.
    from lora_fast.profiler.profile import Profile

    assert (finished.returncode == TOO_NOISY) == Profile.from_dict(document).too_noisy
    assert ("noise floor too high" in finished.stderr) == (finished.returncode == TOO_NOISY)


def test_the_document_holds_every_arm(finished):
    document = json.loads(finished.stdout)
    assert document["schema_version"] == 1
    assert {"torch", "transformers", "lora_fast", "cpu", "threads", "commit"} <= set(document["environment"])
    work = document["workload"]
    assert (work["model"], work["weights"], work["dtype"]) == ("tiny", "random", "fp32")
    assert (work["batch_size"], work["seq_len"], work["rounds"]) == (2, 16, 6)
    assert work["target_modules"][:3] == ["q_proj", "k_proj", "v_proj"]
    assert work["exclude_modules"] == ["lm_head", "layers.9"]
    low, high, full = document["arms"]
    assert [(arm["kind"], arm["rank"], arm["status"]) for arm in document["arms"]] == [
        ("lora", 2, "ok"),
        ("lora", 16, "ok"),
        ("full", None, "ok"),
    ]
    assert [low["trainable"], high["trainable"]] == [2 * PER_RANK, 16 * PER_RANK]
    assert full["trainable"] == work["parameters"] == 2 * 64 * 32 + 2 * (2 * 1024 + 2 * 512 + 3 * 1536 + 64) + 32
    assert low["trainable_share"] == pytest.approx(2 * PER_RANK / (2 * PER_RANK + full["trainable"]))
    for arm in document["arms"]:
        assert len(arm["samples_ms"]) == 6 and arm["step_ms"] > 0
        assert arm["tokens_per_s"] == pytest.approx(32e3 / arm["step_ms"])
        assert sum(arm["by_category"].values()) == pytest.approx(arm["peak_MiB"])
        assert list(arm["phase_categories_MiB"]) == ["forward", "backward", "optimizer"]
        for phase, held in arm["phase_categories_MiB"].items():
            assert sum(held.values()) == pytest.approx(arm["phase_peaks_MiB"][phase])
        assert arm["phase_categories_MiB"][arm["peak_phase"]] == arm["by_category"]
        assert arm["predicted_MiB"] == pytest.approx(arm["peak_MiB"], rel=1e-3)
        assert sum(arm["predicted_by_category"].values()) == pytest.approx(arm["predicted_MiB"])
        flops = arm["forward_flops"] + arm["backward_flops"]
        assert arm["executed_tflops_s"] == pytest.approx(flops / arm["step_ms"] / 1e9)
        full_flops = full["forward_flops"] + full["backward_flops"]
        assert arm["flops_ratio"] == pytest.approx(flops / full_flops)
        assert arm["full_equivalent_tflops_s"] == pytest.approx(full_flops / arm["step_ms"] / 1e9)
        for kind in ("executed", "full_equivalent"):
            share = arm[f"{kind}_tflops_s"] / work["product_tflops_s"]
            assert arm[f"{kind}_utilization"] == pytest.approx(share) and 0 < share < 1.5
    for arm in (low, high):
        assert arm["ratio_ci"][0] <= arm["ratio_to_full"] <= arm["ratio_ci"][1]
        assert arm["cpu_ratio"] > 0
        assert arm["memory_ratio"] == pytest.approx(arm["peak_MiB"] / full["peak_MiB"])
        assert arm["by_category"]["adapters"] == pytest.approx(4 * arm["trainable"] / 2**20)
    assert full["by_category"]["adapters"] == 0 and full["ratio_to_full"] is None
    assert high["peak_MiB"] > low["peak_MiB"]
    assert set(document["crossover"]) == {"time", "flops", "memory"}
    assert document["crossover"]["memory"]["r_max"] == 16


def test_what_libraries_warn_their_callers_of_is_not_shown(folder):
    """PEFT's model gives deprecation warnings of Transformers, and bitsandbytes misses kernels."""
    pytest.importorskip("peft")
    script = """
from lora_fast import cli_output
from lora_fast.profiler.models import resolve
from lora_fast.profiler.predict import predict
from lora_fast.profiler.workload import Workload
cli_output.quiet_transformers()
work = Workload(batch_size=2, seq_len=16, dtype="fp32", target_modules="all-linear", device="cpu", seed=0)
print(predict(resolve("tiny/config.json"), work, 2, peft=True).peak)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr
    assert done.stderr == ""


def test_the_chart_is_a_png(finished, folder):
    png = (folder / "run" / "rank_cost.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and 20_000 < len(png) < 2_000_000


def test_no_room_for_any_arm_is_told_in_rows_and_a_code(folder):
    """Wide enough that the model itself exceeds the limit in every arm: real allocations fail in real processes."""
    (folder / "wide").mkdir()
    (folder / "wide" / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 1 << 20}))
    arguments = ["profile", "wide/config.json", "--ranks", "4", *SMALL, "--memory-limit", "100", "--json", "copy.json"]
    result = run(arguments, folder)
    assert result.returncode == NOTHING_MEASURED, result.stderr
    assert "nothing could be measured" in result.stderr and "Traceback" not in result.stderr
    assert result.stdout.count("out of memory") >= 2 and "Written: runs/wide-" in result.stdout
    (made,) = (folder / "runs").iterdir()
    document = json.loads((made / "run.json").read_text())
    assert document == json.loads((folder / "copy.json").read_text())
    assert [arm["status"] for arm in document["arms"]] == ["oom", "oom"]
    assert all(arm["step_ms"] is None and arm["peak_MiB"] is None for arm in document["arms"])
    assert document["crossover"]["memory"]["status"] == "not measured"
    assert (made / "rank_cost.png").exists()


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "odd.json").write_text('{"model_type": "nonesuch"}')
    for name, size in (("hidden_size", 0), ("intermediate_size", -3), ("vocab_size", 0)):
        (tmp_path / f"{name}.json").write_text(json.dumps(CONFIG | {name: size}))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["config.json", "--ranks", "0"], "rank 0"),
        (["config.json", "--ranks", "4,x"], "'x' is not a rank"),
        (["config.json", "--ranks", "-8"], "'-8' is not a rank"),
        (["config.json", "--ranks", "8.5"], "'8.5' is not a rank"),
        (["config.json", "--ranks", "64:4:x2"], "names no rank"),
        (["config.json", "--dtype", "fp8"], "expected one of fp32, bf16, fp16"),
        (["config.json", "--batch-size", "0"], "batch_size=0"),
        (["config.json", "--seq-len", "1"], "seq_len=1"),
        (["config.json", "--seq-len", "65"], "max_position_embeddings=64"),
        (["config.json", "--steps", "5"], "steps=5"),
        (["config.json", "--time-budget", "-1"], "time_budget_s=-1"),
        (["config.json", "--target-ci", "two"], "--target-ci 'two'; expected a share such as 2%"),
        (["config.json", "--target-ci", "0%"], "--target-ci '0%'"),
        (["config.json", "--arm-timeout", "0"], "arm_timeout_s=0"),
        (["config.json", "--adapter-dtype", "int8"], "adapter_dtype='int8'"),
        (["config.json", "--lora-dropout", "1.5"], "lora_dropout=1.5"),
        (["config.json", "--gradient-accumulation", "0"], "gradient_accumulation=0"),
        (["config.json", "--attn-implementation", "slow"], "slow"),
        (["config.json", "--backend", "mlx"], "mlx"),
        (["config.json", "--resume"], "give it as --out"),
        (["config.json", "--memory-limit", "0"], "memory_limit_MiB=0"),
        (["config.json", "--device", "abacus"], "device='abacus'"),
        (["config.json", "--device", "meta"], "device='meta'"),
        (["config.json", "--target-modules", "q_prj"], "q_proj"),
        (["config.json", "--target-modules", "(q"], "regular expression"),
        (["config.json", "--exclude-modules", "(q"], "exclude_modules='(q'"),
        (["config.json", "--exclude-modules", ".*"], "takes all of them away"),
        (["config.json", "--seed", "-1"], "seed=-1"),
        (["config.json", "--seed", "99999999999999999999999"], "seed=99999999999999999999999"),
        (["config.json", "--time-budget", "inf"], "time_budget_s=inf"),
        (["config.json", "--memory-limit", "inf"], "memory_limit_MiB=inf"),
        (["config.json", "--ranks", "2,100000000000000000000000"], "rank 100000000000000000000000"),
        (["hidden_size.json"], "hidden_size: no model has these sizes"),
        (["intermediate_size.json"], "negative dimension -3"),
        (["vocab_size.json"], "vocab_size"),
        (["config.json", "--out", "x" * 300], "File name too long"),
        (["odd.json"], "unknown model type 'nonesuch'"),
        (["nowhere/config.json"], "no such file"),
        (["llama-9b"], "built-in shapes are llama-5m"),
        (["config.json", "--out", "taken"], "not empty"),
        (["config.json", "--out", "config.json"], "is a file"),
        (["config.json", "--json", "no/such/file.json"], "does not exist"),
        (["config.json", "--json", "taken"], "is a folder"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(here, capsys, arguments, says):
    before = sorted(here.rglob("*"))
    sizes = ["--seq-len", "16"] if "--seq-len" not in arguments else []
    assert main(["profile", "--device", "cpu", *sizes, *arguments]) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 1 and lines[0].startswith("lora-fast: error: ") and says in lines[0]
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("arguments", [["profile", "--nonsense"], ["profile", "--steps", "many"], ["bake"], []])
def test_wrong_usage_has_code_2(here, capsys, arguments):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err and "Usage" in out + err


def test_help_names_what_can_be_given(capsys):
    from lora_fast.profiler.models import SHAPES

    assert main(["--help"]) == 0
    assert "profile" in capsys.readouterr().out
    assert main(["profile", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(shape in text for shape in SHAPES)
    codes = " ".join(text.partition("Exit codes: ")[2].partition("Arguments")[0].split())
    assert re.findall(r"(?:^|; )(\d+) (.*?)(?=;|\.$)", codes) == [
        ("0", "ok"),
        ("2", "wrong input, nothing is written"),
        ("3", "nothing could be measured"),
        ("4", "noise hides the answer in time (all is printed and written still)"),
        ("130", "interrupted (--out and --resume go on)"),
    ]
    for flag in (
        "ranks",
        "batch-size",
        "seq-len",
        "dtype",
        "target-modules",
        "exclude-modules",
        "steps",
        "device",
        "seed",
        "out",
        "json",
        *("target-ci", "adapter-dtype", "lora-dropout", "gradient-accumulation", "checkpointing", "no-foreach"),
        "optimizer",
        *("attn-implementation", "backend", "compare-peft", "layers", "resume", "arm-timeout", "quantize"),
    ):
        assert f"--{flag}" in text


def test_help_waits_for_neither_transformers_nor_plotting():
    code = "import sys; from lora_fast.cli import main; main(['--help']); print(sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    loaded = result.stdout.splitlines()[-1]
    assert "'typer'" in loaded
    assert not any(f"'{name}'" in loaded for name in ("transformers", "matplotlib", "lora_fast.profiler.sweep"))


@pytest.mark.parametrize(
    ("floor", "ratios", "code"),
    [
        (0.015, (0.7, 1.0), 0),
        (0.015, (1.01, 0.99), 0),  # all the same, which is an answer
        (0.05, (1.01, 0.99), TOO_NOISY),  # and here none
        (0.05, (1.01, 1.5), 0),
        (0.2, (0.9, 2.0), TOO_NOISY),
        (0.2, (1.5, 2.0), 0),  # a noisy machine, but nobody can doubt it
        (0.02, (), NOTHING_MEASURED),
    ],
)
def test_exit_codes_follow_the_profile(here, monkeypatch, capsys, floor, ratios, code):
    from lora_fast.profiler import sweep
    from lora_fast.profiler.crossover import UNMEASURED, Crossover
    from lora_fast.profiler.profile import Arm, Profile

    pairs = zip((4, 8), ratios)
    arms = [Arm("lora", r, 10, 0.1, step_ms=5.0, ratio_to_full=v, ratio_ci=(v, v)) for r, v in pairs]
    arms.append(Arm("full", None, 100, 1.0))
    aa = {"ratio": 1.0, "ci": (1 - floor, 1.0), "noise_floor": floor, "limit": 0.1, "samples_ms": []}
    found = dict.fromkeys(("time", "memory"), Crossover(UNMEASURED, reason="of this test"))
    made = Profile({}, {}, arms, aa, found)
    monkeypatch.setattr(sweep, "profile_ranks", lambda *arguments, **options: made)
    assert main(["profile", "--json", "-"]) == code
    out, err = capsys.readouterr()
    assert json.loads(out)["arms"][0]["step_ms"] == (5.0 if ratios else None)
    assert (code == 0) == (err == "")
