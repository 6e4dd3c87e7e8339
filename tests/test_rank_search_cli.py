"""`lora-fast rank search` on a tiny model: its numbers against the kept adapters, going on after a kill, bad input."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_fast import load_adapter
from lora_fast.cli import main
from lora_fast.profiler import rank_run, small_example, text_data
from lora_fast.profiler.rank_curve import print_search, read_search
from lora_fast.profiler.rank_trainer import Recipe

pytest.importorskip("optuna")
pytest.importorskip("accelerate")
ROOT = Path(__file__).resolve().parent.parent
SCRIPT = Path(sys.executable).parent / "lora-fast"
SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# Σ (K + N) over q, k, v, o, gate, up, down.
PER_RANK = 64 + 48 + 48 + 64 + 76 + 76 + 76
TRAIN = "the cat sat on the mat, and the dog on the log. " * 40
EVAL = ["the dog sat on the mat, and the cat on the log. " * 3] * 4
STEPS = 10
SMALL = ["--steps", str(STEPS), "--seq-len", "17", "--batch-size", "3", "--device", "cpu", "--learning-rate", "0.02"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with weights, text to train on, and jsonl to evaluate on."""
    path = tmp_path_factory.mktemp("search")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(path / "tiny")
    (path / "train.txt").write_text(TRAIN)
    (path / "eval.jsonl").write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in EVAL))
    return path


def arguments(folder, *more, model="tiny", train="train.txt", evaluation="eval.jsonl"):
    files = ["--model", str(folder / model), "--train", str(folder / train), "--eval", str(folder / evaluation)]
    return ["rank", "search", *files, *SMALL, *more]


@pytest.fixture(scope="module")
def finished(folder):
    options = ["--ranks", "1,4,full", "--strategy", "grid", "--keep-adapters", "--out", str(folder / "run")]
    assert main(arguments(folder, *options, "--json", str(folder / "copy.json"))) == 0
    return json.loads((folder / "run" / "search.json").read_text())


def held_out():
    """(count, 17): the bytes of the jsonl's texts, with two line ends between them."""
    ids = torch.tensor(list("\n\n".join(EVAL).encode()))
    return ids[: len(ids) // 17 * 17].view(-1, 17)


def exact_loss(model):
    """Mean cross-entropy over batches of three rows, in float64."""
    model = model.double().eval()
    rows = held_out()
    with torch.no_grad():
        logits = model(input_ids=rows).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return float(losses.mean())


def test_the_losses_are_those_of_the_kept_adapters(finished, folder):
    base = exact_loss(LlamaForCausalLM.from_pretrained(folder / "tiny"))
    for rank in (1, 4):
        row = next(row for row in finished["ranks"] if row["rank"] == rank)
        assert row["evaluation"][0] == [0, pytest.approx(base, rel=1e-6)]
        for seed, value in enumerate(row["values"]):
            model = LlamaForCausalLM.from_pretrained(folder / "tiny")
            load_adapter(model, folder / "run" / "trainings" / f"r{rank}-seed{seed}")
            assert value == pytest.approx(exact_loss(model), rel=1e-6)
            assert value < base - 0.05


def test_the_document_and_the_files(finished, folder):
    run = folder / "run"
    assert {"search.json", "curve.png", "search.db", "resume.json", "trainings"} == {p.name for p in run.iterdir()}
    assert json.loads((folder / "copy.json").read_text()) == finished == read_search(run)
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert [row["rank"] for row in finished["ranks"]] == [1, 4, "full"]
    assert [row["trained"] for row in finished["ranks"][:2]] == [PER_RANK, 4 * PER_RANK]
    assert finished["ranks"][2]["trained"] == finished["model"]["parameters"]
    assert finished["data"]["train"]["tokens"] == len(TRAIN) // 17 * 17
    assert finished["data"]["eval"]["sequences"] == len(held_out())
    assert finished["data"]["epochs"] == pytest.approx(STEPS * 3 * 17 / (len(TRAIN) // 17 * 17))
    recipe, search = finished["recipe"], finished["search"]
    assert recipe["full_learning_rate"] == pytest.approx(0.002) and "Schulman" in recipe["full_learning_rate_source"]
    for row, point in zip(finished["ranks"], search["points"], strict=True):
        low, high = sorted(row["values"])
        assert row["mean"] == point["mean"] == pytest.approx((low + high) / 2)
        assert row["spread"] == pytest.approx((high - low) / 2**0.5)
        assert row["evaluation"][-1] == [STEPS, pytest.approx(row["mean"])]
        of_full = ("learned little", "fits", "unstable", "overfits", "can't tell")
        of_rank = ("too small", "fits", "too large", "can't tell")
        assert row["reading"]["verdict"] in (of_full if row["rank"] == "full" else of_rank)
    assert len(search["trials"]) == 6 and search["best_rank"] in (1, 4, "full")


def test_a_search_that_learned_nothing_does_not_decide(folder, capsys):
    out = str(folder / "idle")
    options = ["--ranks", "1,4,full", "--steps", "5", "--learning-rate", "1e-6", "--out", out]
    assert main(arguments(folder, *options)) == 0
    rows = json.loads((folder / "idle" / "search.json").read_text())["ranks"]
    assert [row["reading"]["verdict"] for row in rows] == ["too small", "too small", "learned little"]
    capsys.readouterr()
    assert main(["decide", out, "--out", str(folder / "decided")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("Not known yet.") and "hardly anything was learned" in said
    assert "How sure: a guess" in said and "Nothing that could be measured next" not in said
    assert "Measure next: train longer, or with another learning rate, at r=1, 4, full" in said


def test_all_arms_see_the_same_data_in_the_order_of_the_seed(finished, folder):
    """The first training loss is of the untrained model: it tells which sequences came first."""
    first = {}
    for file in (folder / "run" / "trainings").glob("*.json"):
        training = json.loads(file.read_text())
        first[training["rank"], training["seed"]] = training["train"][0]
    assert first[1, 0] == first[4, 0] == first["full", 0]
    assert first[1, 1] == first[4, 1] == first["full", 1] != first[1, 0]


def test_the_table_says_it_all(finished, capsys):
    from rich.console import Console

    print_search(finished, Console(width=120))
    printed = capsys.readouterr().out
    for row in finished["ranks"]:
        assert f"{row['mean']:.4f}" in printed and f"{row['spread']:.4f}" in printed
    assert finished["search"]["sentence"] in " ".join(printed.split())
    assert "scaling 32/r (alpha = 32" in printed and "full fine-tuning 0.002 (× 0.1, by Schulman" in " ".join(
        printed.split()
    )


def test_more_ranks_and_seeds_go_on_from_what_there_is(finished, folder, capfd):
    run = folder / "run"
    before = {file.name: file.stat().st_mtime_ns for file in run.glob("trainings/*.json")}
    more = ["--ranks", "1,2,4,full", "--strategy", "grid", "--seeds", "2", "--out", str(run), "--resume"]
    assert main(arguments(folder, *more, "--json", "-")) == 0
    found = json.loads(capfd.readouterr().out)
    assert [row["rank"] for row in found["ranks"]] == [1, 2, 4, "full"]
    after = {file.name: file.stat().st_mtime_ns for file in run.glob("trainings/*.json")}
    assert after.items() > before.items() and len(after) == 8
    by_rank = {row["rank"]: row["values"] for row in found["ranks"]}
    assert all(by_rank[row["rank"]] == row["values"] for row in finished["ranks"])

    assert main(arguments(folder, "--steps", "11", "--out", str(run), "--resume")) == 2
    assert "was begun with steps=10, and now it is 11" in capfd.readouterr().err
    assert main(arguments(folder, "--out", str(run))) == 2
    assert "holds an earlier run" in capfd.readouterr().err


def test_the_benchmark_of_one_run_reads_the_adapter_of_the_highest_rank(finished, folder, tmp_path):
    """Untruncated its loss is the search's; a rank's distance is counted in doublings of the grid's."""
    sys.path.append(str(ROOT / "benchmarks"))
    import bench_one_run_rank as bench

    rows = bench.held_out_rows(finished, finished["recipe"], folder / "tiny")
    assert torch.equal(rows, held_out())
    losses = bench.truncated(folder / "run", folder / "tiny", 4, 0, rows, 3)
    assert list(losses) == [1, 2, 4]
    values = next(row["values"] for row in finished["ranks"] if row["rank"] == 4)
    assert losses[4] == pytest.approx(values[0], rel=1e-6)
    assert losses[1] != pytest.approx(losses[4], rel=1e-6)

    assert bench.main([str(folder / "run"), "--out", str(tmp_path)]) == 0
    with (tmp_path / "one_run.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert {row["seed"] for row in table} == {"0", "1"} and tuple(table[0]) == bench.COLUMNS
    curve = bench.curve_of(finished)
    for row in table:
        exact = math.log2(int(row["predicted_rank"]) / int(row["grid_rank"]))
        assert float(row["doublings"]) == pytest.approx(exact, abs=0.006)
        assert 1 <= int(row["predicted_rank"]) <= 8
    assert bench.loss_at(curve, 1) == curve.ranks[1].mean
    assert bench.loss_at(curve, 2) == pytest.approx((curve.ranks[1].mean + curve.ranks[4].mean) / 2)
    assert bench.loss_at(curve, 99) == curve.ranks[4].mean


def test_a_killed_search_goes_on(folder):
    options = ["--ranks", "1,2", "--seeds", "2", "--strategy", "grid", "--out", str(folder / "killed")]
    process = subprocess.Popen([SCRIPT, *arguments(folder, *options)], stderr=subprocess.DEVNULL)
    kept = folder / "killed" / "trainings" / "r1-seed0.json"
    deadline = time.monotonic() + 120
    while not kept.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert kept.is_file() and not (folder / "killed" / "search.json").is_file()
    assert main(arguments(folder, *options, "--resume")) == 0
    found = read_search(folder / "killed")
    assert [len(row["values"]) for row in found["ranks"]] == [2, 2]
    assert {trial["status"] for trial in found["search"]["trials"]} == {"ok"}


def test_an_interrupted_search_says_how_to_go_on(folder, monkeypatch, capfd):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(rank_run, "train_rank", interrupt)
    out = folder / "interrupted"
    assert main(arguments(folder, "--ranks", "1", "--out", str(out))) == 130
    printed, said = capfd.readouterr()
    assert printed == ""
    assert said.endswith(f"lora-fast: interrupted; the same command with --out {out} --resume goes on\n")


def test_trainings_that_diverge_are_failed_arms(folder, capfd):
    options = ["--ranks", "1", "--learning-rate", "1e30", "--seeds", "1", "--out", str(folder / "diverged")]
    assert main(arguments(folder, *options)) == 3
    captured = capfd.readouterr()
    assert "no training gave a value" in captured.err and "Traceback" not in captured.err
    assert "rank 1, seed 0, failed: ValueError: train_and_evaluate returned nan" in " ".join(captured.out.split())
    assert read_search(folder / "diverged")["search"]["best_rank"] is None


def test_text_that_is_evaluated_and_trained_on_is_warned_of(folder, capfd):
    options = ["--ranks", "1,2", "--seeds", "1", "--steps", "1", "--out", str(folder / "same")]
    assert main(arguments(folder, *options, evaluation="train.txt")) == 0
    captured = capfd.readouterr()
    assert captured.err.count("warning: ") == 1 and "says the same as" in captured.err
    assert "the two texts are one" in captured.out


@pytest.mark.parametrize(
    ("name", "content", "more", "message"),
    [
        ("absent.txt", None, [], "no such file"),
        ("empty.txt", "", [], "is empty"),
        ("blank.txt", " \n\n ", [], "is empty"),
        ("short.txt", "sixteen letters.", [], "has 16 tokens, less than one sequence of 17"),
        ("latin.txt", b"caf\xe9 " * 30, [], "is not text in UTF-8 (byte 3)"),
        ("field.jsonl", '{"content": "the cat", "id": 3}\n', [], "line 1: no field 'text', it has 'content', 'id'"),
        ("field.jsonl", '{"content": 3}\n', ["--text-field", "content"], "line 1: 'content' is a int; expected text"),
        ("broken.jsonl", '{"text": "the cat"}\n{"text": \n', [], "line 2: no JSON"),
        ("list.jsonl", '["the cat"]\n', [], "line 1: a list; expected an object"),
        ("void.jsonl", '{"text": " "}\n{"text": ""}\n', [], "holds no text in any of its 2 lines"),
    ],
)
def test_bad_files_are_one_line_and_exit_code_2(name, content, more, message, folder, capfd):
    if content is not None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for role in ("train", "evaluation"):
        assert main(arguments(folder, *more, "--out", str(folder / "never"), **{role: name})) == 2
        error = capfd.readouterr().err
        assert error.startswith("lora-fast: error: ") and error.count("\n") == 1
        assert message in error
    assert not (folder / "never").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ranks", "full"], "names no rank"),
        (["--ranks", "4,x"], "'x' is not a rank"),
        (["--ranks", "auto"], "a search takes numbers and ranges"),
        (["--seeds", "0"], "seeds=0; expected at least 1"),
        (["--strategy", "random"], "strategy='random'; expected one of progressive, grid"),
        (["--start", "128"], "start=128 is above every candidate"),
        (["--steps", "0"], "steps=0; expected a whole number of at least 1"),
        (["--seq-len", "65"], "seq_len=65 exceeds the model's max_position_embeddings=64"),
        (["--learning-rate", "-1"], "learning_rate=-1.0; expected a positive number"),
        (["--scaling", "none"], "scaling='none'; expected one of inverse, rslora, constant"),
        (["--dtype", "fp16"], "dtype='fp16' needs a GPU"),
        (["--dtype", "int8"], "dtype='int8'; expected one of"),
        (["--target-modules", "absent_proj"], "absent_proj"),
        (["--eval-sequences", "0"], "held_out_sequences=0; expected at least 1"),
        (["--device", "tpu"], "device='tpu'"),
        (["--storage", "nowhere://x"], "storage='nowhere://x'"),
        (["--text-field", "body"], "no field 'body', it has 'text', 'id'"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(more, message, folder, tmp_path, capfd):
    assert main(arguments(folder, *more, "--out", str(tmp_path / "never"))) == 2
    error = capfd.readouterr().err
    assert message in error and "Traceback" not in error
    assert error.splitlines()[-1].startswith("lora-fast: error: ")
    assert not (tmp_path / "never").exists() or "--storage" in more


def test_a_model_without_text_is_refused(folder, capfd):
    assert main(["rank", "search", "--model", str(folder / "tiny")]) == 2
    assert "--model is given without --train and --eval" in capfd.readouterr().err


def test_a_vocabulary_that_is_too_small_is_refused(folder, capfd):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 100})).save_pretrained(folder / "small")
    assert main(arguments(folder, "--out", str(folder / "never"), model="small")) == 2
    assert "token id 116 of bytes, and the model's vocab_size is 100" in capfd.readouterr().err


def test_the_small_example_needs_no_arguments(tmp_path, monkeypatch, capfd):
    """The same code with a base that is hardly trained; it is trained once."""
    monkeypatch.setitem(rank_run.EXAMPLE_BASE, "steps", 2)
    options = ["rank", "search", "--ranks", "1", "--steps", "2", "--device", "cpu", "--eval-sequences", "4"]
    options += ["--out", str(tmp_path / "run")]
    assert main([*options, "--seeds", "1"]) == 0
    written = (tmp_path / "run" / "base" / "model.safetensors").stat().st_mtime_ns
    assert main([*options, "--seeds", "2", "--resume"]) == 0
    assert (tmp_path / "run" / "base" / "model.safetensors").stat().st_mtime_ns == written
    found = read_search(tmp_path / "run")
    assert found["model"]["example"] and 1e6 <= found["model"]["parameters"] <= 3e6
    assert found["strategy"] == "grid" and found["data"]["eval"]["file"] == "help topics of Python, their last tenth"
    train, held = small_example.split(small_example.prose())
    assert train + held == small_example.prose()
    assert found["data"]["train"]["tokens"] == len(train) // 128 * 128


def test_a_tokenizer_in_the_models_folder_is_taken(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<end>", "<unk>", "the", "cat", "sat"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 5})).save_pretrained(folder / "words")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>").save_pretrained(
        folder / "words"
    )
    encoder = text_data.encoder_of(rank_run.models.resolve(str(folder / "words")))
    ids = text_data.token_ids(text_data.Text.of("two", ["the cat sat", "the dog"]), encoder, 5)
    assert ids.tolist() == [2, 3, 4, 0, 2, 1, 0]


def test_blocks_and_their_choice():
    ids = torch.arange(25)
    rows = text_data.blocks(ids, 6, "x")
    assert rows.tolist() == [list(range(6 * i, 6 * i + 6)) for i in range(4)]
    assert text_data.spread(rows, 9) is rows
    assert text_data.spread(rows, 2).tolist() == [rows[0].tolist(), rows[3].tolist()]
    text = text_data.Text.of("x", ["a", "b"])
    assert text_data.token_ids(text, text_data.BYTES, 256).tolist() == [97, 10, 10, 98]


def test_every_rank_has_the_same_recipe():
    recipe = Recipe(**rank_run.DEFAULTS, full_learning_rate=1e-5)
    for rank in (1, 4, 64):
        assert recipe.lora_config(rank).scaling_of("x") == 32 / rank
    rslora, constant = (
        Recipe(**rank_run.DEFAULTS, full_learning_rate=1e-5, scaling=rule) for rule in ("rslora", "constant")
    )
    assert [rslora.lora_config(rank).scaling_of("x") for rank in (1, 4, 64)] == [8, 4, 1]
    assert {constant.lora_config(rank).scaling_of("x") for rank in (1, 4, 64)} == {2.0}
    assert recipe.tokens_per_step == 8 * 512
