"""`lora-fast decide` on real runs of tiny models, and what it says of folders that are none."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_fast import LoraConfig, apply_lora, lora_parameters, save_adapter, search_rank
from lora_fast.cli import main
from lora_fast.profiler import estimate_memory

pytest.importorskip("optuna")
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
# Σ (K + N) over q, k, v, o, gate, up, down, in two layers.
PER_RANK = 2 * (64 + 48 + 48 + 64 + 76 + 76 + 76)
TOKENS = torch.arange(96).remainder(61).view(6, 16)  # a rule that a rank of 1 learns in part


def trained(rank, seed, steps=12):
    """(a tiny Llama, adapted at this rank or trained in full, its loss)."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    torch.manual_seed(seed)
    if rank != "full":
        apply_lora(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    parameters = list(model.parameters()) if rank == "full" else lora_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=3e-3 if rank == "full" else 3e-2)
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, float(model(input_ids=TOKENS, labels=TOKENS).loss.detach())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A profile, a search and spectra of one tiny model, each as its command or function makes it."""
    path = tmp_path_factory.mktemp("runs")
    (path / "tiny").mkdir()
    (path / "tiny" / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    small = ["--batch-size", "2", "--seq-len", "16", "--steps", "6", "--device", "cpu"]
    main(["profile", str(path / "tiny" / "config.json"), "--ranks", "4", *small, "--out", str(path / "profile")])
    found = search_rank(lambda rank, seed: trained(rank, seed)[1], [1, 4, 16, "full"], "grid", seeds=2)
    (path / "search").mkdir()
    (path / "search" / "search.json").write_text(json.dumps({"schema_version": 1, "search": found.to_dict()}))
    save_adapter(trained(16, 0)[0], path / "adapter")
    assert main(["svd", str(path / "adapter"), "--out", str(path / "svd")]) == 0
    return path


def decided(capsys, *arguments):
    capsys.readouterr()
    assert main(["decide", *map(str, arguments), "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_all_runs_together(folder, capsys):
    found = decided(
        capsys, folder / "profile", folder / "search", folder / "svd", "--task", "medium", "--price", "3.6/h"
    )
    assert [run["kind"] for run in found["runs"]] == ["profile", "search", "spectra"]
    seen = {indicator["name"]: indicator for indicator in found["indicators"]}
    assert all(seen[name]["sure"] > 0 for name in seen if name not in ("capacity", "budget"))
    rank = found["rank"] or 1
    run = json.loads((folder / "profile" / "run.json").read_text())
    assert run["arms"][0]["trainable"] == 4 * PER_RANK
    share = rank * PER_RANK / (run["workload"]["parameters"] + rank * PER_RANK)
    assert found["kind"] == "full" or seen["trained share"]["value"] == f"{share:.2%}"
    search = json.loads((folder / "search" / "search.json").read_text())["search"]
    assert [(p["rank"], p["mean"]) for p in found["curve"]["points"]] == [
        (p["rank"], p["mean"]) for p in search["points"] if p["rank"] != "full"
    ]
    # The spectra are those of all adapted layers, and of the profile's.
    assert found["notes"] == []


def test_the_answer_comes_first_in_print(folder, capsys):
    capsys.readouterr()
    assert main(["decide", str(folder / "search"), "--target", "0.001"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(("r=", "Full fine-tuning:", "Not known yet."))
    text = "\n".join(lines)
    order = ["How sure:", "The target 0.001 is not reached.", "trained share", "rules of thumb", "\n[1] "]
    assert [text.index(word) for word in order] == sorted(text.index(word) for word in order)
    assert len(lines) < 60 and all(len(line) <= 120 for line in lines)
    assert "Measure next:" in text or "Nothing that could be measured" in text


@pytest.mark.parametrize("kind", ["profile", "search", "svd"])
def test_each_run_by_itself(folder, capsys, kind):
    found = decided(capsys, folder / kind)
    assert found["kind"] in ("rank", "full", "measure") and 0 < found["confidence"] < 1
    name = {"profile": "run.json", "search": "search.json", "svd": "spectra.json"}[kind]
    assert decided(capsys, folder / kind / name)["sentence"] == found["sentence"]


def test_a_budget(folder, capsys):
    found = decided(capsys, folder / "profile", folder / "search", "--budget", str(4 * PER_RANK))
    assert found["kind"] != "full" and found["range"][1] <= 4


def test_a_measured_profile_is_taken_before_an_estimate_of_the_same_model(folder, capsys, tmp_path):
    estimate = estimate_memory(str(folder / "tiny" / "config.json"), [4], seq_len=16, device="cpu")
    run = json.loads((folder / "profile" / "run.json").read_text())
    estimate.workload["model"] = run["workload"]["model"]
    file = tmp_path / "estimate.json"
    file.write_text(json.dumps(estimate.to_dict()))
    found = decided(capsys, file, folder / "profile")
    assert found["notes"] == [f"{file} was left out: {folder / 'profile'} is of the same model"]
    alone = decided(capsys, file, "--rank", "4")
    (step,) = [i for i in alone["indicators"] if i["name"] == "step time"]
    assert step["value"].endswith("(FLOPs)")


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main(["decide", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_what_is_no_run_is_refused_in_one_line(folder, capsys, tmp_path):
    assert "no run is given" in refused(capsys)
    assert "is no run: expected a folder of lora-fast profile" in refused(capsys, tmp_path)
    assert "there is no such file or folder" in refused(capsys, tmp_path / "nowhere")
    assert "lora-fast svd" in refused(capsys, folder / "adapter")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "arms.jsonl").write_text("{}\n")
    assert "the run has not ended" in refused(capsys, tmp_path / "killed")
    for content, said in (("{", "can't be read as JSON"), ("[]", "holds a list"), ("{}", "is no run")):
        (tmp_path / "x.json").write_text(content)
        assert said in refused(capsys, tmp_path / "x.json")
    assert "both hold a search" in refused(capsys, folder / "search", folder / "search")
    assert "task='poetry'; known are" in refused(capsys, folder / "search", "--task", "poetry")
    assert "--budget 'much'" in refused(capsys, folder / "search", "--budget", "much")


@pytest.mark.parametrize(
    ("kind", "name"), [("profile", "run.json"), ("search", "search.json"), ("svd", "spectra.json")]
)
def test_a_newer_schema_is_refused(folder, capsys, tmp_path, kind, name):
    document = json.loads((folder / kind / name).read_text()) | {"schema_version": 99}
    (tmp_path / name).write_text(json.dumps(document))
    error = refused(capsys, tmp_path)
    assert "schema_version=99; this version reads 1" in error and str(tmp_path / name) in error


def test_runs_of_different_models_are_refused(folder, capsys, tmp_path):
    other = {"model_type": "llama", **SIZES, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(other))
    estimate = estimate_memory(str(tmp_path / "config.json"), [4], seq_len=16, device="cpu")
    (tmp_path / "run.json").write_text(json.dumps(estimate.to_dict()))
    assert "are profiles of different models" in refused(capsys, folder / "profile", tmp_path)
    capsys.readouterr()
    found = decided(capsys, tmp_path, folder / "svd")
    assert "other layers, or another model" in found["notes"][0]
