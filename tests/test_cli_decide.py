"""`lora-fast decide` on real runs of tiny models, and what it says of folders that are none."""

import html
import json
import math
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from lora_fast.cli import main
from lora_fast.profiler import estimate_memory
from lora_fast.profiler.decide_run import affordable_steps, parse_duration

pytest.importorskip("optuna")
SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
# Σ (K + N) over q, k, v, o, gate, up, down, in two layers.
PER_RANK = 2 * (64 + 48 + 48 + 64 + 76 + 76 + 76)
SCRIPT = Path(sys.executable).parent / "lora-fast"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each decision is written under runs/ of the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A profile, a search and spectra of one tiny model with bytes for tokens, in one go."""
    path = tmp_path_factory.mktemp("work")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    text = "\n".join(topics[name] for name in sorted(topics))
    (path / "train.txt").write_text(text[:20_000])
    (path / "eval.txt").write_text(text[20_000:22_000])
    return path


@pytest.fixture(scope="module")
def at_once(folder):
    command = [SCRIPT, "decide", "--model", "config.json", "--train", "train.txt", "--eval", "eval.txt"]
    command += ["--time-budget", "1h", "--steps", "20", "--ranks", "1,4,full", "--seq-len", "16", "--batch-size", "2"]
    command += ["--learning-rate", "0.01", "--task", "medium", "--device", "cpu", "--out", "runs"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def runs(folder, at_once):
    assert at_once.returncode == 0, at_once.stderr
    return folder / "runs"


def test_in_one_go(at_once, runs):
    assert sorted(path.name for path in runs.iterdir()) == ["decision.json", "profile", "report.html", "search", "svd"]
    found = json.loads((runs / "decision.json").read_text())
    assert [Path(run["path"]).name for run in found["runs"]] == ["profile", "search", "svd"]
    # Every part of the budget is said, before and after.
    assert "3600 s in all: the profile first" in at_once.stderr
    assert "(3 arms × 2 seeds × 20 steps of 32 tokens)" in found["time_budget"][1]
    assert found["time_budget"][-1].endswith("of 60.0 min in all")
    assert f"Time: {'; '.join(found['time_budget'])}." in at_once.stdout
    search = json.loads((runs / "search" / "search.json").read_text())
    assert search["recipe"]["steps"] == 20 and len(search["search"]["trials"]) == 6
    profile = json.loads((runs / "profile" / "run.json").read_text())
    assert [arm["rank"] for arm in profile["arms"]] == [1, 4, None]
    assert json.loads((runs / "svd" / "spectra.json").read_text())["layers"][0]["rank"] == 4
    # The text's tokens are known from the search, and so its capacity.
    (capacity,) = [i for i in found["indicators"] if i["name"] == "capacity"]
    tokens = search["data"]["train"]["tokens"]
    assert capacity["value"] == f"r ≥ {math.ceil(tokens / (2 * PER_RANK))}"


def test_a_decision_on_runs_is_written_too(runs, capsys, tmp_path):
    found = decided(capsys, runs / "search", "--out", tmp_path / "new")
    assert json.loads((tmp_path / "new" / "decision.json").read_text()) == found
    page = (tmp_path / "new" / "report.html").read_text()
    assert found["sentence"] in html.unescape(page) and 'id="decision"' in page and "All arms" not in page
    assert main(["decide", str(runs / "profile"), str(runs / "search")]) == 0
    (folder,) = (tmp_path / "runs").glob("decide-*")
    assert f"Written: {Path('runs', folder.name)}/ (decision.json, report.html)" in capsys.readouterr().out
    assert "All arms" in (folder / "report.html").read_text()
    refused(capsys, runs / "search", "--out", tmp_path / "new")


def decided(capsys, *arguments):
    capsys.readouterr()
    assert main(["decide", *map(str, arguments), "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_all_runs_together(runs, capsys):
    found = decided(capsys, runs / "profile", runs / "search", runs / "svd", "--task", "medium", "--price", "3.6/h")
    assert [run["kind"] for run in found["runs"]] == ["profile", "search", "spectra"]
    seen = {indicator["name"]: indicator for indicator in found["indicators"]}
    assert all(seen[name]["sure"] > 0 for name in seen if name != "budget")
    rank = found["rank"] or 1
    run = json.loads((runs / "profile" / "run.json").read_text())
    assert run["arms"][0]["trainable"] == PER_RANK
    share = rank * PER_RANK / (run["workload"]["parameters"] + rank * PER_RANK)
    assert found["kind"] == "full" or seen["trained share"]["value"] == f"{share:.2%}"
    search = json.loads((runs / "search" / "search.json").read_text())["search"]
    assert [(p["rank"], p["mean"]) for p in found["curve"]["points"]] == [
        (p["rank"], p["mean"]) for p in search["points"] if p["rank"] != "full"
    ]
    # The spectra are those of all adapted layers, and of the profile's; the tiny model has never been trained.
    (note,) = found["notes"]
    assert "random weights" in note


def test_the_answer_comes_first_in_print(runs, capsys):
    capsys.readouterr()
    assert main(["decide", str(runs / "search"), "--target", "0.001"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(("r=", "Full fine-tuning:", "Not known yet."))
    text = "\n".join(lines)
    order = ["How sure:", "The target 0.001 is not reached.", "trained share", "rules of thumb", "\n[1] "]
    assert [text.index(word) for word in order] == sorted(text.index(word) for word in order)
    assert len(lines) < 60 and all(len(line) <= 120 for line in lines)
    assert "Measure next:" in text or "Nothing that could be measured" in text


@pytest.mark.parametrize("kind", ["profile", "search", "svd"])
def test_each_run_by_itself(runs, capsys, kind):
    found = decided(capsys, runs / kind)
    assert found["kind"] in ("rank", "full", "measure") and 0 < found["confidence"] < 1
    name = {"profile": "run.json", "search": "search.json", "svd": "spectra.json"}[kind]
    assert decided(capsys, runs / kind / name)["sentence"] == found["sentence"]


def test_without_any_run_the_rules_answer(capsys):
    found = decided(capsys, "--task", "summarization", "--model-size", "7")
    assert (found["kind"], found["rank"], found["runs"]) == ("rank", 4, [])
    assert "no run is given" in refused(capsys, "--target", "2")


def test_a_search_by_itself_knows_what_its_budget_is(runs, capsys):
    found = decided(capsys, runs / "search", "--budget", str(PER_RANK))
    assert found["kind"] != "full" and found["range"][1] == 1
    assert "take at least 904 parameters" in refused(capsys, runs / "search", "--budget", "903")


def test_a_budget(runs, capsys):
    found = decided(capsys, runs / "profile", runs / "search", "--budget", str(4 * PER_RANK))
    assert found["kind"] != "full" and found["range"][1] <= 4


def test_a_measured_profile_is_taken_before_an_estimate_of_the_same_model(folder, runs, capsys, tmp_path):
    estimate = estimate_memory(str(folder / "config.json"), [4], seq_len=16, device="cpu")
    run = json.loads((runs / "profile" / "run.json").read_text())
    assert estimate.workload["parameters"] == run["workload"]["parameters"]
    file = tmp_path / "estimate.json"
    file.write_text(json.dumps(estimate.to_dict()))
    found = decided(capsys, file, runs / "profile")
    assert found["notes"] == [f"{file} was left out: {runs / 'profile'} is of the same model"]
    alone = decided(capsys, file, "--rank", "4")
    (step,) = [i for i in alone["indicators"] if i["name"] == "step time"]
    assert step["value"].endswith("(FLOPs)")


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main(["decide", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_what_is_no_run_is_refused_in_one_line(folder, runs, capsys, tmp_path):
    assert "no run is given" in refused(capsys)
    assert "is no run: expected a folder of lora-fast profile" in refused(capsys, tmp_path)
    assert "there is no such file or folder" in refused(capsys, tmp_path / "nowhere")
    assert "lora-fast svd" in refused(capsys, runs / "search" / "trainings" / "r4-seed0")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "arms.jsonl").write_text("{}\n")
    assert "the run has not ended" in refused(capsys, tmp_path / "killed")
    for content, said in (("{", "can't be read as JSON"), ("[]", "holds a list"), ("{}", "is no run")):
        (tmp_path / "x.json").write_text(content)
        assert said in refused(capsys, tmp_path / "x.json")
    assert "both hold a search" in refused(capsys, runs / "search", runs / "search")
    assert "task='poetry'; known are" in refused(capsys, runs / "search", "--task", "poetry")
    assert "--budget 'much'" in refused(capsys, runs / "search", "--budget", "much")


@pytest.mark.parametrize(
    ("kind", "name"), [("profile", "run.json"), ("search", "search.json"), ("svd", "spectra.json")]
)
def test_a_newer_schema_is_refused(runs, capsys, tmp_path, kind, name):
    document = json.loads((runs / kind / name).read_text()) | {"schema_version": 99}
    (tmp_path / name).write_text(json.dumps(document))
    error = refused(capsys, tmp_path)
    assert "schema_version=99; this version reads 1" in error and str(tmp_path / name) in error


def test_runs_of_different_models_are_refused(runs, capsys, tmp_path):
    other = {"model_type": "llama", **SIZES, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(other))
    estimate = estimate_memory(str(tmp_path / "config.json"), [4], seq_len=16, device="cpu")
    (tmp_path / "run.json").write_text(json.dumps(estimate.to_dict()))
    assert "are profiles of different models" in refused(capsys, runs / "profile", tmp_path)
    capsys.readouterr()
    found = decided(capsys, tmp_path, runs / "svd")
    assert "other layers, or another model" in found["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m"], "--train and --eval missing"),
        (["x", "--model", "m", "--train", "t", "--eval", "e"], "RUN… and --model are both given"),
        (["--time-budget", "soon"], "--time-budget 'soon'; expected a duration such as 10m"),
        (["--steps", "3"], "--steps 3; expected at least 20"),
        (["--ranks", "full"], "names no rank"),
        (["--domain", "middle"], "domain='middle'"),
        (["--eval", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_is_wrong_in_one_go(folder, capsys, tmp_path, arguments, message):
    files = {"--model": "config.json", "--train": "train.txt", "--eval": "eval.txt"}
    whole = [] if arguments[0] in ("--model", "x") else [w for k, v in files.items() for w in (k, str(folder / v))]
    small = ["--seq-len", "16", "--batch-size", "2", "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert main(["decide", *whole, *arguments, *small]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "seconds"), [("10m", 600), ("90s", 90), ("600", 600), ("1h30m", 5400), ("1.5m", 90), ("2h", 7200)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


def test_steps_that_a_budget_affords():
    assert affordable_steps(100, 0.5, 30) == 120  # 75 s of the 100 at 0.5 s a step, less 30 for evaluations
    assert affordable_steps(10, 0.5, 30) == 0
