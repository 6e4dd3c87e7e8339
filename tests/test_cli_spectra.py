"""The commands svd, resize, extract and merge as a user starts them, and what they print, draw and write."""

import io
import json
import math
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.text import Text
from rich.console import Console
from safetensors.torch import load_file, save_file
from support import build, peft_model

from lora_fast import LoraFastError
from lora_fast.checkpoint import read_adapter
from lora_fast.cli import main
from lora_fast.cli_output import progress
from lora_fast.profiler import spectra, spectra_charts
from lora_fast.profiler.spectra_table import notes, print_report, print_spectra, reading_lines
from lora_fast.spectrum import Spectrum

ATTENTION, MLP = "self_attn", "mlp"
# (N, K) of each kind of module; odd, and wider than the rank.
SHAPES = {f"{ATTENTION}.q_proj": (33, 29), f"{ATTENTION}.v_proj": (21, 29), f"{MLP}.down_proj": (29, 45)}
LAYERS, R, SCALING = 3, 8, 1.5


def names() -> list[str]:
    return [f"model.layers.{depth}.{kind}" for depth in range(LAYERS) for kind in SHAPES]


def shape_of(name: str) -> tuple[int, int]:
    return SHAPES[".".join(name.split(".")[3:])]


def factors(seed: int, decay: float = 0.5) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{module: (lora_A, lora_B)} whose products have singular values that fall by about e^decay each."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in names():
        N, K = shape_of(name)
        sizes = 0.3 * torch.exp(-decay * torch.arange(R))
        lora_A = torch.linalg.qr(torch.randn(K, R, generator=generator))[0].mT
        lora_B = torch.linalg.qr(torch.randn(N, R, generator=generator))[0] * sizes
        found[name] = (lora_A.contiguous(), lora_B.contiguous())
    return found


def write(folder: Path, pairs: dict, extra: dict | None = None, **config) -> Path:
    folder.mkdir()
    fields = {
        "peft_type": "LORA",
        "r": R,
        "lora_alpha": R * SCALING,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    tensors = {}
    for name, (lora_A, lora_B) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora_A
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora_B
    tensors |= {f"base_model.model.{key}": value for key, value in (extra or {}).items()}
    save_file({key: value for key, value in tensors.items() if value is not None}, folder / "adapter_model.safetensors")
    return folder


def updates(pairs: dict) -> dict[str, torch.Tensor]:
    return {name: SCALING * b.double() @ a.double() for name, (a, b) in pairs.items()}


def updates_on_disk(folder: Path) -> dict[str, torch.Tensor]:
    config, tensors = read_adapter(folder)
    paths = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {
        path: config.scaling_of(path)
        * tensors[f"{path}.lora_B.weight"].double()
        @ tensors[f"{path}.lora_A.weight"].double()
        for path in paths
    }


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(*shape_of(name), generator=generator) for name in names()}


@pytest.fixture(scope="module")
def made(tmp_path_factory, weights) -> Path:
    """Two adapters, their base in bf16, the base with the first merged, and folders that are wrong."""
    folder = tmp_path_factory.mktemp("made")
    one, two = factors(1), factors(2)
    write(folder / "one", one)
    write(folder / "two", two)
    stored = {f"{name}.weight": weight.bfloat16() for name, weight in weights.items()}
    for name, tensors in (
        ("base", stored | {"model.norm.weight": torch.ones(29).bfloat16()}),
        (
            "tuned",
            {f"{name}.weight": (stored[f"{name}.weight"].double() + d).bfloat16() for name, d in updates(one).items()}
            | {"model.norm.weight": torch.full((29,), 2.0).bfloat16()},
        ),
    ):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    _write_wrong(folder, one, stored)
    return folder


def _write_wrong(folder: Path, one: dict, stored: dict) -> None:
    first = names()[0]
    lora_A, lora_B = one[first]
    write(folder / "lone_A", one | {first: (lora_A, None)})
    write(folder / "ranks_differ", one | {first: (lora_A, lora_B[:, :5].clone())})
    bad = lora_B.clone()
    bad[3, 2] = math.nan
    write(folder / "nan", one | {first: (lora_A, bad)})
    bad = lora_A.clone()
    bad[0, 0] = math.inf
    write(folder / "inf", one | {first: (bad, lora_B)})
    write(folder / "dora", one, {f"{first}.lora_magnitude_vector": torch.ones(33)}, use_dora=True)
    write(folder / "loha", {}, {f"{first}.hada_w1_a": torch.ones(33, 8)}, peft_type="LOHA")
    write(folder / "empty", {}, {"model.norm.weight": torch.ones(29)})
    write(folder / "narrow", {name: (a[:, :-1].contiguous(), b) for name, (a, b) in one.items()})
    (folder / "no_adapter").mkdir()
    (folder / "no_adapter" / "notes.txt").write_text("mine")
    (folder / "damaged").mkdir()
    shutil.copy(folder / "one" / "adapter_config.json", folder / "damaged")
    (folder / "damaged" / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for name, tensors in (
        ("fewer", {key: value for key, value in stored.items() if first not in key}),
        ("wider", stored | {f"{first}.weight": torch.ones(33, 30).bfloat16()}),
        ("poisoned", stored | {f"{first}.weight": torch.full((33, 29), math.nan).bfloat16()}),
    ):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
    (folder / "sharded").mkdir()
    index = {"weight_map": dict.fromkeys(stored, "model-00001-of-00002.safetensors")}
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    """A folder to work in, with links to what was made."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(map(str, arguments)))
    return code, *capsys.readouterr()


def run_json(capsys, *arguments: str) -> dict:
    code, out, err = run(capsys, *arguments, "--json", "-")
    assert code == 0, err
    return json.loads(out)


def test_svd_gives_every_layers_spectrum(here, capsys, weights):
    document = run_json(capsys, "svd", "one", "--base", "base", "--out", "run")
    assert document == json.loads((here / "run" / "spectra.json").read_text()) == spectra.read("run/spectra.json")
    assert sorted(path.name for path in (here / "run").iterdir()) == [
        "effective_rank.png",
        "singular_values.png",
        "spectra.json",
    ]
    assert document["schema_version"] == 1 and document["source"] == {"adapter": "one", "against": None, "base": "base"}
    # By depth, and in a block as it computes.
    assert [layer["name"] for layer in document["layers"]] == names()
    assert [layer["depth"] for layer in document["layers"]] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for layer in document["layers"]:
        delta = updates(factors(1))[layer["name"]]
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        W = weights[layer["name"]].bfloat16().double()
        assert torch.tensor(layer["singular_values"], dtype=torch.float64) == pytest.approx(S[:R], rel=1e-9)
        assert layer["frobenius_norm"] == pytest.approx(float(delta.norm()), rel=1e-12)
        assert layer["relative_size"] == pytest.approx(float(delta.norm() / W.norm()), rel=1e-9)
        amplified = delta.norm() / (U[:, :R].mT @ W @ Vh[:R].mT).norm()
        assert layer["amplification"] == pytest.approx(float(amplified), rel=1e-6)
        energies = S.square().cumsum(0) / S.square().sum()
        assert layer["r99"] == int((energies < 0.99).sum()) + 1
        assert layer["intruders"] is None and layer["rank"] == R and layer["scaling"] == SCALING


def test_kinds_sum_their_layers_up(here, capsys):
    document = run_json(capsys, "svd", "one", "--out", "run")
    assert [kind["kind"] for kind in document["kinds"]] == ["q_proj", "v_proj", "down_proj"]
    for kind in document["kinds"]:
        own = [layer for layer in document["layers"] if layer["kind"] == kind["kind"]]
        assert kind["layers"] == len(own) == LAYERS and kind["status"] == {"ok": LAYERS}
        for name in ("effective_rank", "stable_rank", "frobenius_norm"):
            values = sorted(layer[name] for layer in own)
            assert kind[name]["median"] == values[1] and [kind[name]["min"], kind[name]["max"]] == values[::2]
            assert kind[name]["mean"] == pytest.approx(sum(values) / LAYERS)
        assert kind["relative_size"] is None and kind["corrected_rank"] is None


def test_the_suggestion_keeps_what_it_says(here, capsys):
    advice = run_json(capsys, "svd", "one", "--out", "run")["suggestion"]
    needed = {}
    for name, delta in updates(factors(1)).items():
        S = torch.linalg.svdvals(delta)
        needed[name] = int((S.square().cumsum(0) < 0.99 * S.square().sum()).sum()) + 1
    assert advice["ranks"] == needed and advice["rank"] == max(needed.values())
    sizes = {name: sum(shape_of(name)) for name in names()}
    assert advice["parameters_of_ranks"] == sum(k * sizes[name] for name, k in needed.items())
    assert advice["parameters_now"] == R * sum(sizes.values()) and advice["least_kept_energy"] >= 0.99
    code, out, _ = run(capsys, "svd", "one", "--out", "again")
    assert code == 0 and "lora-fast resize one OUT --energy 0.99" in out
    report = run_json(capsys, "resize", "one", "small", "--energy", "0.99")  # as it suggests
    assert {layer["name"]: layer["rank"] for layer in report["layers"]} == needed


def test_experts_that_peft_adapted(here, capsys):
    """A row for each kind of module; every expert is a layer of it, beside its own base weight."""
    base = build("mixtral", num_local_experts=5)
    base.save_pretrained("mixture")
    torch.manual_seed(3)
    adapted = peft_model(
        build("mixtral", num_local_experts=5), r=4, target_modules="all-linear", init_lora_weights=False
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter *= torch.rand(parameter.shape[1]) ** 2
    adapted.save_pretrained("experts")
    code, out, err = run(capsys, "svd", "experts", "--base", "mixture", "--layers", "--out", "run")
    assert code == 0, err
    table, _, by_layer = out.partition(" layer ")
    rows = [line.split()[:3] for line in table.splitlines() if line[:1] == " " and line.rstrip().endswith("ok")]
    assert rows == [
        *(["q_proj", "2", "4"], ["k_proj", "2", "4"], ["v_proj", "2", "4"], ["o_proj", "2", "4"]),
        *(["experts.gate_up_proj", "10", "8"], ["experts.down_proj", "10", "4"], ["gate", "2", "4"]),
    ]
    assert " 1.mlp.experts.gate_up_proj[4] " in by_layer
    document = spectra.read("run/spectra.json")
    for layer in document["layers"]:
        name, _, expert = layer["name"].partition("[")
        W = base.get_parameter(name if expert else f"{name}.weight")
        W = W[int(expert[0])] if expert else W
        assert layer["weight_norm"] == pytest.approx(float(W.double().norm()), rel=1e-9)
    advice = document["suggestion"]
    needed = [
        layer["r99"] for layer in document["layers"] if layer["name"].startswith("model.layers.0.mlp.experts.gate")
    ]
    assert len(set(needed)) > 1
    assert advice["ranks"]["model.layers.0.mlp.experts.gate_up_proj[0]"] == max(needed)
    report = run_json(capsys, "resize", "experts", "small", "--energy", "0.99")  # as it suggests
    assert {layer["name"]: layer["rank"] for layer in report["layers"]} == advice["ranks"]
    assert report["parameters"] == advice["parameters_of_ranks"]


def test_names_in_what_it_suggests_can_be_pasted(here, capsys):
    (here / "one more").symlink_to(here / "one")
    _, out, _ = run(capsys, "svd", "one more", "--out", "run")
    assert "lora-fast resize 'one more' OUT --energy 0.99" in out


def test_an_output_head_tied_to_the_embedding_has_its_weight(here, capsys):
    """Its checkpoint holds the embedding alone; config.json says that it is both."""
    g = torch.Generator().manual_seed(4)
    embedding, lora_A, lora_B = (torch.randn(*shape, generator=g) for shape in ((33, 29), (R, 29), (33, R)))
    write(here / "head", {"lm_head": (lora_A, lora_B)}, target_modules=["lm_head"])
    base = here / "tied"
    base.mkdir()
    save_file({"model.embed_tokens.weight": embedding}, base / "model.safetensors")
    for config in ({}, {"tie_word_embeddings": False}):
        (base / "config.json").write_text(json.dumps(config))
        code, _, err = run(capsys, "svd", "head", "--base", "tied", "--out", "run")
        assert code == 2 and "base='tied' holds no lm_head.weight" in err
    for run_name, config in (
        ("a", {"tie_word_embeddings": True}),
        ("b", {"text_config": {"tie_word_embeddings": True}}),
    ):
        (base / "config.json").write_text(json.dumps(config))
        (layer,) = run_json(capsys, "svd", "head", "--base", "tied", "--out", run_name)["layers"]
        update = SCALING * lora_B.double() @ lora_A.double()
        assert layer["relative_size"] == pytest.approx(float(update.norm() / embedding.norm()), rel=1e-5)


def test_a_layer_without_an_update_takes_no_gap_from_the_others(here):
    layers = [spectrum(f"model.layers.{i}.mlp.up_proj", [4.0, 2.0 + i] if i < 2 else [0.0, 0.0]) for i in range(3)]
    (kind,) = document_of(*layers)["kinds"]
    gaps = [spectra.value_of(layer, "gap") for layer in document_of(*layers)["layers"]]
    assert gaps[2] is None and kind["zero"] == 1
    assert [kind["gap"]["min"], kind["gap"]["max"]] == sorted(gaps[:2])


def test_the_table_shows_the_numbers_and_the_files(here, capsys):
    code, out, err = run(capsys, "svd", "one", "--base", "base", "--layers")
    assert code == 0 and "\x1b" not in out and "Traceback" not in err
    (folder,) = (here / "runs").iterdir()
    assert folder.name.startswith("svd-one-2") and f"Written: runs/{folder.name}/" in out
    document = spectra.read(folder / "spectra.json")
    kind = document["kinds"][0]
    row = next(line.split() for line in out.splitlines() if line.startswith(" q_proj"))
    assert row[:4] == ["q_proj", str(LAYERS), str(R), str(R)]
    assert row[4] == f"{kind['effective_rank']['median']:.1f}" and row[-1] == "ok"
    assert f"{kind['relative_size']['median']:.2%}" in row
    assert sum(line.split()[:1] == [f"1.{ATTENTION}.v_proj"] for line in out.splitlines()) == 1
    assert "Singular values: 9/9" in err and "Base weights: 9/9" in err


def test_titles_of_panels_do_not_overlap(monkeypatch):
    found = {}
    for i, kind in enumerate(("q_proj", "down_proj", "embed_tokens", "dense_h_to_4h")):
        name = f"layers.{i}.{kind}"
        found[name] = replace(
            spectrum(name, torch.linspace(1.0, 0.1, 16)), rank=None, scaling=None, method="exact", noise_std=1e-3
        )
    figures = []
    monkeypatch.setattr(spectra_charts, "png", lambda figure: figures.append(figure) or b"")
    spectra_charts.singular_values(spectra.document(found, source={"base": "b", "tuned": "t"}, device="cpu"))
    (figure,) = figures
    figure.canvas.draw()
    for axes in figure.axes[:4]:
        titles = {text.get_text(): text for text in axes.findobj(Text)}
        left, right = (titles[axes.get_title(loc=side)].get_window_extent() for side in ("left", "right"))
        assert left.x1 < right.x0 or not left.overlaps(right), axes.get_title(loc="left")


def test_under_torchrun_one_process_speaks_for_all(here):
    script = here / "command.py"
    script.write_text("import sys\nfrom lora_fast.cli import main\n\nsys.exit(main())\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(script), "svd", "--base", "base", "--tuned", "tuned", "--json", "-"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["layers"]) == len(names())
    assert len(list((here / "runs").iterdir())) == 1


def test_what_is_not_as_certain_as_usual_is_told():
    found = {name: spectrum(name, torch.linspace(1.0, 0.1, 16)) for name in names()}
    first, second, *_ = found
    document = lambda: spectra.document(found, source={"adapter": "a"}, device="cpu")  # noqa: E731
    assert not any("refined" in line or "fewer" in line for line in notes(document()))
    found[first] = replace(found[first], status="refined", certificate=1e-8)
    assert any(line.startswith("refined: by QR") for line in notes(document()))
    assert not any("fewer" in line for line in notes(document()))
    found[second] = replace(found[second], status="refined", certificate=math.inf)
    assert f"Known to fewer than six digits: the singular values of {second}." in notes(document())


def test_readings_disagree_and_all_are_shown(capsys):
    """A flat spectrum: too large by the guide, too small by saturation; each with its source."""
    flat = {name: spectrum(name, torch.linspace(1.0, 0.8, 16)) for name in names()}
    lines = reading_lines(spectra.document(flat, source={"adapter": "flat"}, device="cpu"))
    text = "\n".join(lines)
    assert "shape (guide) (too large)" in text and "saturation (too small)" in text
    marks = {line.split(" [")[-1].rstrip("]") for line in lines if line.startswith("    ")}
    sources = [line for line in lines if line.startswith("  [")]
    assert len(marks) == len(sources) == 3 and any("guide" in source for source in sources)


def test_two_adapters_are_compared(here, capsys):
    document = run_json(capsys, "svd", "one", "--against", "two", "--out", "run")
    against = document["against"]
    assert (here / "run" / "similarity.png").exists() and against["adapter"] == "two"
    grids = []
    for entry in against["layers"]:
        V = [torch.linalg.svd(updates(factors(seed))[entry["name"]])[2][:R] for seed in (1, 2)]
        inner = (V[0] @ V[1].mT).square()
        grids.append([[float(inner[:i, :j].sum()) / min(i, j) for j in range(1, R + 1)] for i in range(1, R + 1)])
        assert torch.tensor(entry["phi"]) == pytest.approx(torch.tensor(grids[-1]), abs=1e-5)
    mean = torch.tensor(grids).mean(0)
    assert torch.tensor(against["mean"]) == pytest.approx(mean, abs=1e-5)
    assert [row[0] for row in against["diagonal"]] == [1, 2, 4, 8]
    for n, value, random in against["diagonal"]:
        assert value == pytest.approx(float(mean[n - 1, n - 1]), abs=1e-5)
        assert random == pytest.approx(n * (2 / 29 + 1 / 45) / 3)
    _, out, _ = run(capsys, "svd", "one", "--against", "one", "--layer", names()[4], "--out", "same")
    assert "φ(8, 8) = 1.000" in out and spectra.read("same/spectra.json")["against"]["shown"] == names()[4]


def test_intruders_are_counted_when_asked(here, capsys, weights):
    document = run_json(capsys, "svd", "one", "--base", "base", "--intruders", "--out", "run")
    for layer in document["layers"]:
        W = weights[layer["name"]].bfloat16().double()
        X = torch.linalg.svd(W)[0][:, : min(W.shape)]
        Y = torch.linalg.svd(W + updates(factors(1))[layer["name"]])[0][:, :10]
        cosines = (X.mT @ Y).abs().amax(0)
        assert torch.tensor(layer["intruders"]["cosines"]) == pytest.approx(cosines.float(), abs=1e-5)
        assert layer["intruders"]["count"] == int((cosines < 0.5).sum())


def test_a_full_fine_tune_is_freed_of_rounding_first(here, capsys):
    arguments = ["svd", "--base", "base", "--tuned", "tuned", "--exclude", "down_proj", "--out", "run"]
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "lora-fast extract --base base --tuned tuned" in out
    document = spectra.read("run/spectra.json")
    assert [kind["kind"] for kind in document["kinds"]] == ["q_proj", "v_proj"]
    header = next(line for line in out.splitlines() if "N × K" in line)
    assert header.index("rank") < header.index("‖ΔW‖_F") < header.index("r90", header.index("‖ΔW‖_F"))
    assert "raw: of all of ΔW, what rounding made of it included" in " ".join(out.split())
    for layer in document["layers"]:
        S = torch.linalg.svdvals(
            load_file("tuned/model.safetensors")[f"{layer['name']}.weight"].double()
            - load_file("base/model.safetensors")[f"{layer['name']}.weight"].double()
        )
        assert torch.tensor(layer["singular_values"], dtype=torch.float64) == pytest.approx(S, abs=1e-7)
        assert layer["corrected_rank"] == int((layer["noise_threshold"] < S).sum()) < min(layer["shape"])
        assert layer["corrected"]["r99"] <= layer["r99"]
    top = run_json(capsys, "svd", "--base", "base", "--tuned", "tuned", "--method", "topk", "--k", "2", "--out", "top")
    assert top["source"]["method"] == "topk" and top["source"]["k"] == 2


def test_what_extract_does_not_take_is_not_in_the_suggestion():
    """Its rank and its count are of the linear layers; an embedding's update counts in neither."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, rank, shape in (("model.embed_tokens", 9, (50, 12)), ("model.layers.0.mlp.up_proj", 2, (20, 12))):
        values = torch.zeros(12, dtype=torch.float64)
        values[:rank] = torch.rand(rank, generator=generator, dtype=torch.float64).add(1).sort(descending=True).values
        norm = float(values.norm())
        found[name] = Spectrum(name, values, shape, None, 1.0, norm, 0.0, "ok", "exact", torch.float32)
    advice = spectra.document(found, source={"base": "b", "tuned": "t"}, device="cpu")["suggestion"]
    assert advice["rank"] == 2 and advice["parameters"] == 2 * (20 + 12)
    only = {"lm_head": replace(found["model.embed_tokens"], name="lm_head")}
    assert spectra.document(only, source={"base": "b", "tuned": "t"}, device="cpu")["suggestion"] is None


def test_resize_writes_the_best_approximation(here, capsys):
    code, out, err = run(capsys, "resize", "one", "small", "--rank", "3", "--json", "report.json")
    assert code == 0, err
    report = json.loads((here / "report.json").read_text())
    got = updates_on_disk(here / "small")
    for layer in report["layers"]:
        U, S, Vh = torch.linalg.svd(updates(factors(1))[layer["name"]], full_matrices=False)
        assert torch.dist(got[layer["name"]], (U[:, :3] * S[:3]) @ Vh[:3]) < 1e-6 * S[0]
        assert (layer["old_rank"], layer["rank"]) == (R, 3)
        assert layer["kept_energy"] == pytest.approx(float(S[:3].square().sum() / S.square().sum()), abs=1e-9)
        assert layer["error"] == pytest.approx(float(S[3:].norm()), rel=1e-6)
    assert report["bytes"] == (here / "small" / "adapter_model.safetensors").stat().st_size < report["bytes_before"]
    row = next(line.split() for line in out.splitlines() if line.startswith(" all"))
    assert row[:4] == ["all", "9", str(R), "3"] and f"{report['kept_energy']:.3%}" in row
    assert "Written: small/" in out and "KiB before" in out


@pytest.mark.parametrize("options", [["--energy", "0.9"], ["--error", "0.1"], ["--budget", "1500"], ["--rank", "2"]])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_resize_by_each_criterion(here, capsys, options, scope):
    report = run_json(capsys, "resize", "one", "small", *options, "--scope", scope, "--dtype", "bf16")
    deltas, got = updates(factors(1)), updates_on_disk(here / "small")
    ranks = {layer["name"]: layer["rank"] for layer in report["layers"]}
    spectrum = {name: torch.linalg.svdvals(delta) for name, delta in deltas.items()}
    lost = {name: float(S[ranks[name] :].square().sum()) for name, S in spectrum.items()}
    whole = {name: float(S.square().sum()) for name, S in spectrum.items()}
    if scope == "global":
        lost, whole = {"": sum(lost.values())}, {"": sum(whole.values())}
    value = float(options[1])
    if options[0] == "--energy":
        assert all(lost[key] <= (1 - value) * whole[key] * (1 + 1e-9) for key in lost)
    elif options[0] == "--error":
        assert all(lost[key] <= value**2 * (1 + 1e-9) for key in lost)
    elif options[0] == "--budget":
        assert report["parameters"] == sum(k * sum(shape_of(name)) for name, k in ranks.items()) <= value
    else:
        assert sum(ranks.values()) == 2 * len(names())
    for tensor in load_file(here / "small" / "adapter_model.safetensors").values():
        assert tensor.dtype == torch.bfloat16
    for name, delta in deltas.items():
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        best = (U[:, : ranks[name]] * S[: ranks[name]]) @ Vh[: ranks[name]]
        assert torch.dist(got[name], best) < 0.01 * S[0]


def test_resize_in_place_tells_the_old_size(here, capsys):
    shutil.copytree(here / "one", here / "mine")
    before = (here / "mine" / "adapter_model.safetensors").stat().st_size
    report = run_json(capsys, "resize", "mine", "mine", "--rank", "1")
    assert report["bytes_before"] == before > report["bytes"]
    assert all(int(torch.linalg.matrix_rank(delta)) == 1 for delta in updates_on_disk(here / "mine").values())


def test_extract_finds_the_adapter_in_a_fine_tune(here, capsys):
    code, out, err = run(capsys, "extract", "--base", "base", "--tuned", "tuned", "got", "--rank", str(R))
    assert code == 0 and "dense" in out and "Not carried: model.norm" in out, err
    got = updates_on_disk(here / "got")
    for name, delta in updates(factors(1)).items():
        # bf16 keeps 8 bits of weights of size 1: the sum of squares of its rounding.
        assert torch.dist(got[name], delta) < 2**-8 * math.sqrt(delta.numel()) < 0.5 * delta.norm()
    dtypes = {tensor.dtype for tensor in load_file(here / "got" / "adapter_model.safetensors").values()}
    assert dtypes == {torch.float32}


def test_merge_adds_adapters_exactly(here, capsys):
    report = run_json(capsys, "merge", "one", "two", "both", "--weights", "0.5,-2")
    one, two, got = updates(factors(1)), updates(factors(2)), updates_on_disk(here / "both")
    for name in names():
        wanted = 0.5 * one[name] - 2 * two[name]
        assert torch.dist(got[name], wanted) < 1e-6 * wanted.norm()
    assert {layer["old_rank"] for layer in report["layers"]} == {2 * R} and report["kept_energy"] == pytest.approx(1)
    small = run_json(capsys, "merge", "one", "two", "both", "--weights", "1,1", "--rank", "4")
    assert {layer["rank"] for layer in small["layers"]} == {4} and 0.5 < small["kept_energy"] < 1


FIRST = names()[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["svd", "nowhere"], "nowhere is not a folder"),
        (["svd", "no_adapter"], "holds no adapter_config.json"),
        (["svd", "base"], "holds no adapter_config.json"),
        (["svd", "lone_A"], f"{FIRST} has lora_A and no lora_B"),
        (["svd", "ranks_differ"], f"the ranks of {FIRST} differ"),
        (["svd", "nan"], f"{FIRST}"),
        (["svd", "inf"], f"{FIRST}"),
        (["svd", "dora"], "use_dora=True"),
        (["svd", "loha"], "LOHA"),
        (["svd", "empty"], "no lora_A"),
        (["svd", "damaged"], "damaged"),
        (["svd", "one", "--against", "nowhere"], "nowhere is not a folder"),
        (["svd", "one", "--against", "narrow"], "45 elements"),
        (["svd", "one", "--against", "two", "--layer", "q_prj"], "'q_prj' is not in both adapters"),
        (["svd", "one", "--base", "nowhere/at/all"], "nowhere/at/all"),
        (["svd", "one", "--base", "fewer"], f"holds no {FIRST}.weight"),
        (["svd", "one", "--base", "wider"], "(33, 30)"),
        (["svd", "one", "--base", "sharded"], "model-00001-of-00002.safetensors"),
        (["svd", "one", "--intruders"], "--intruders needs --base"),
        (["svd", "one", "--layer", FIRST], "--layer is for --against"),
        (["svd", "one", "--device", "abacus"], "device='abacus'"),
        (["svd", "one", "--out", "taken"], "not empty"),
        (["svd", "one", "--json", "no/such/file.json"], "does not exist"),
        (["svd"], "nothing to look at"),
        (["svd", "one", "--base", "base", "--tuned", "tuned"], "ADAPTER and --tuned are both given"),
        (["svd", "--tuned", "tuned"], "without --base"),
        (["svd", "--base", "base", "--tuned", "tuned", "--against", "two"], "--against and --intruders"),
        (["svd", "--base", "base", "--tuned", "tuned", "--method", "magic"], "method='magic'"),
        (["svd", "--base", "base", "--tuned", "tuned", "--method", "topk", "--k", "0"], "k=0"),
        (["svd", "--base", "base", "--tuned", "fewer"], f"{FIRST}"),
        (["svd", "--base", "base", "--tuned", "wider"], f"{FIRST}"),
        (["svd", "--base", "base", "--tuned", "poisoned"], f"{FIRST}"),
        (["svd", "--base", "sharded", "--tuned", "tuned"], "model-00001-of-00002.safetensors"),
        (["svd", "--base", "base", "--tuned", "no_adapter"], "model.safetensors"),
        (["resize", "one", "new"], "no criterion given"),
        (["resize", "one", "new", "--rank", "0"], "rank=0"),
        (["resize", "one", "new", "--rank", "2", "--energy", "0.9"], "rank and energy given"),
        (["resize", "one", "new", "--energy", "1.5"], "energy=1.5"),
        (["resize", "one", "new", "--error", "-1"], "error=-1.0"),
        (["resize", "one", "new", "--budget", "10"], "budget=10"),
        (["resize", "one", "new", "--rank", "2", "--scope", "world"], "scope='world'"),
        (["resize", "one", "new", "--rank", "2", "--dtype", "fp8"], "dtype='fp8'"),
        (["resize", "one", "taken", "--rank", "2"], "holds something else"),
        (["resize", "lone_A", "new", "--rank", "2"], f"{FIRST} has lora_A and no lora_B"),
        (["resize", "nan", "new", "--rank", "2"], f"{FIRST}"),
        (["resize", "dora", "new", "--rank", "2"], "use_dora=True"),
        (["extract", "--base", "base", "--tuned", "fewer", "new", "--rank", "2"], f"{FIRST}"),
        (["extract", "--base", "base", "--tuned", "base", "new", "--rank", "2"], "differ in none"),
        (["extract", "--base", "base", "--tuned", "tuned", "new"], "no criterion given"),
        (["merge", "one", "two", "new", "--weights", "1"], "1 weights for 2 adapters"),
        (["merge", "one", "two", "new", "--weights", "1,x"], "--weights '1,x'"),
        (["merge", "one", "two", "new", "--weights", "1,nan"], "expected finite numbers"),
        (["merge", "one", "narrow", "new", "--weights", "1,1"], "(29, 44)"),
        (["merge", "one", "dora", "new", "--weights", "1,1"], "use_dora=True"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(here, capsys, arguments, says):
    (here / "taken").mkdir()
    (here / "taken" / "thesis.txt").write_text("mine")
    before = sorted(here.rglob("*"))
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == ""
    lines = [line for line in err.splitlines() if not line.startswith(("Singular values", "Updates"))]
    assert len(lines) == 1 and lines[0].startswith("lora-fast: error: ") and says in lines[0], err
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("command", ["svd", "resize", "extract", "merge"])
def test_help_and_wrong_usage(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and "--device" in out and "--json" in out
    code, out, err = run(capsys, command, "--nonsense")
    assert code == 2 and "Usage" in err and "Traceback" not in err


def test_what_an_adapter_trains_besides_is_a_line_on_stderr(here, capsys):
    write(here / "head", factors(1), {"lm_head.weight": torch.ones(4, 29)}, modules_to_save=["lm_head"])
    code, _, err = run(capsys, "svd", "head", "--out", "run")
    assert code == 0
    assert [line for line in err.splitlines() if line.startswith("lora-fast: warning: ") and "lm_head" in line]


def spectrum(name: str, s, **changes) -> Spectrum:
    s = torch.as_tensor(s, dtype=torch.float64)
    fields = dict(
        name=name, singular_values=s, shape=(40, 30), rank=len(s), scaling=1.0, frobenius_norm=float(s.norm()),
        certificate=1e-12, status="ok", method="factors", storage_dtype=torch.float32,
    )  # fmt: skip
    return Spectrum(**fields | changes)


def document_of(*spectra_: Spectrum, source=None, **options) -> dict:
    found = {spectrum.name: spectrum for spectrum in spectra_}
    return spectra.document(found, source=source or {"adapter": "made"}, device="cpu", **options)


def seven_kinds(depth: int, r: int = 16) -> list[Spectrum]:
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    kinds += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return [
        spectrum(f"model.layers.{i}.{kind}", torch.exp(-torch.arange(r) * (0.1 + 0.05 * place + 0.01 * i)))
        for i in range(depth)
        for place, kind in enumerate(kinds)
    ]


def pixels(png: bytes):
    from matplotlib.image import imread

    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert 500 < width < 3200 and 200 < height < 3200
    return imread(io.BytesIO(png))[..., :3]


ODD_DOCUMENTS = {
    "two layers": lambda: document_of(*seven_kinds(2)),
    "many layers": lambda: document_of(*seven_kinds(50, r=4)),
    "one value": lambda: document_of(spectrum("model.layers.0.q_proj", [2.0])),
    "all zero": lambda: document_of(*(spectrum(f"model.layers.{i}.q_proj", [0.0, 0.0]) for i in range(2))),
    "some zero": lambda: document_of(spectrum("h.0.c_attn", [1.0, 0.1]), spectrum("h.1.c_attn", [0.0, 0.0])),
    "flat": lambda: document_of(spectrum("h.0.c_attn", [1.0] * 8)),
    "no number in the path": lambda: document_of(spectrum("lm_head", [1.0, 0.5])),
    "two stacks": lambda: document_of(
        *(spectrum(f"{part}.block.{i}.q", [3.0, 1.0 / (1 + i)]) for part in ("encoder", "decoder") for i in range(12))
    ),
    "experts": lambda: document_of(
        *(spectrum(f"model.layers.{i}.mlp.experts.{e}.up_proj", [1.0, 0.2]) for i in range(3) for e in range(9))
    ),
    "stacked experts": lambda: document_of(
        *(spectrum(f"model.layers.0.mlp.experts.up_proj[{e}]", [1.0, 0.2]) for e in range(9))
    ),
    "many kinds": lambda: document_of(*(spectrum(f"net.0.part{i}", [1.0 + i, 0.2]) for i in range(26))),
    "over many decades": lambda: document_of(spectrum("h.0.q", [1.0, 1e-5, 1e-200, 0.0])),
    "dense": lambda: document_of(
        *(
            spectrum(
                f"h.{i}.q", torch.linspace(1, 1e-3, 300), shape=(400, 300), rank=None, scaling=None, method="exact",
                storage_dtype=torch.bfloat16, noise_std=1e-3, weight_norm=40.0,
            )
            for i in range(2)
        ),
        source={"base": "b", "tuned": "t"},
    ),
    "the largest alone": lambda: document_of(
        spectrum("h.0.q", [2.0, 1.0], shape=(400, 300), rank=None, scaling=None, method="topk", frobenius_norm=9.0),
        source={"base": "b", "tuned": "t"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD_DOCUMENTS)
def test_every_document_can_be_shown(case):
    document = ODD_DOCUMENTS[case]()
    assert json.loads(spectra.to_json(document)) == document  # finite, and nothing lost in the shorter lists
    for png in (spectra_charts.singular_values(document), spectra_charts.effective_rank(document)):
        assert pixels(png).min() < 0.5
    for width in (80, 100, 120):
        stream = io.StringIO()
        print_spectra(document, Console(file=stream, width=width), layers=True)
        text = stream.getvalue()
        assert "nan" not in text and "inf" not in text.replace("info", "")
        assert max(len(line) for line in text.splitlines() if "lora-fast " not in line) <= width
        if case != "two stacks":
            assert "…" not in text.partition("Medians")[0]


@pytest.mark.parametrize("width", [60, 80])
def test_tables_fit_into_narrow_windows(width):
    """Of the modules of a 7B model, a full fine-tune's spectra and what was made of an adapter: nothing is cut."""
    shapes = {"q_proj": (4096, 4096), "down_proj": (4096, 11008), "embed_tokens": (32000, 4096)}
    found = {}
    for kind, shape in shapes.items():
        for i, last in enumerate((0.5, 0.1, 0.0)):
            name = f"model.layers.{i}.{kind}"
            values = torch.linspace(1.0, last, 300) if i < 2 else torch.zeros(300)
            fields = {"rank": None, "scaling": None, "method": "exact", "noise_std": 1e-3}
            found[name] = replace(spectrum(name, values), shape=shape, **fields)
    document = spectra.document(found, source={"base": "b", "tuned": "t"}, device="cpu")
    layers = [
        {
            "name": name,
            "shape": [1, 1],
            "old_rank": 128,
            "rank": 100 + i,
            "kept_energy": 0.98765 - i / 1000,
            "error": 0.0607,
        }
        | {"frobenius_norm": 1.0, "noise_energy": None}
        for i, name in enumerate(found)
    ]
    report = {"layers": layers, "rounding_error": 1e-8, "bytes": 5, "bytes_before": 9, "not_carried": []}
    for draw in (lambda console: print_spectra(document, console), lambda console: print_report(report, console)):
        for terminal in (False, True):
            stream = io.StringIO()
            draw(Console(file=stream, width=width, force_terminal=terminal, color_system=None))
            text = stream.getvalue()
            assert "…" not in text and all(kind in text for kind in shapes)
            if terminal:  # a file's lines may be longer, so that nothing is missing
                assert max(len(line) for line in text.splitlines() if "lora-fast " not in line) <= width
    rows = {line.split()[0]: line for line in text.replace("│", " ").splitlines() if line.strip()}
    for i, kind in enumerate(shapes):  # three layers of each: the least of what they keep
        assert f"{0.98765 - (3 * i + 2) / 1000:.3%}" in rows[kind]


def colour_of(value: float, low: float, high: float, scale: str):
    from matplotlib import colormaps

    return torch.tensor(colormaps[scale]((value - low) / (high - low))[:3])


def test_the_heat_map_has_each_layer_in_its_place():
    """Three layers of two kinds, one of them not adapted: its cell is white, the others have their colours."""
    kept = {("q", 0): 1, ("q", 1): 2, ("q", 2): 3, ("v", 0): 4, ("v", 2): 8}
    document = document_of(*(spectrum(f"h.{depth}.{kind}", [1.0] * k) for (kind, depth), k in kept.items()))
    image = torch.from_numpy(pixels(spectra_charts.effective_rank(document)).copy())
    found = {}
    for key, k in kept.items():
        near = (image - colour_of(k, 1, 8, spectra_charts.HEAT)).abs().amax(2) < 0.012
        # The bar beside it has every colour too, in fewer points.
        rows, columns = near[:, : int(0.85 * image.shape[1])].nonzero(as_tuple=True)
        assert len(rows) > 2000
        found[key] = (float(rows.double().mean()), float(columns.double().mean()))
    assert found["q", 0][1] < found["q", 1][1] < found["q", 2][1] and found["q", 0][0] < found["v", 0][0]
    assert found["v", 0][1] == pytest.approx(found["q", 0][1], abs=5)
    row, column = int(found["v", 0][0]), int(found["q", 1][1])
    assert (image[row - 5 : row + 5, column - 5 : column + 5] == 1).all()


def test_the_lines_lie_where_the_singular_values_are(monkeypatch):
    """A panel for each kind, a line for each layer through all its values, on a logarithmic axis."""
    kept = []
    monkeypatch.setattr(spectra_charts, "png", lambda figure: kept.append(figure) or b"")
    spectra_charts.singular_values(document_of(*seven_kinds(3)))
    panels = [axes for axes in kept[0].axes if axes.get_title("left")]
    assert [axes.get_title("left") for axes in panels] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    for place, axes in enumerate(panels):
        assert axes.get_yscale() == "log"
        lines = axes.collections[0].get_segments()
        assert len(lines) == 3
        for i, line in enumerate(lines):
            s = torch.exp(-torch.arange(16) * (0.1 + 0.05 * place + 0.01 * i))
            assert line[:, 0].tolist() == list(range(1, 17)) and line[:, 1] == pytest.approx(s.numpy(), rel=1e-6)
        low, high = axes.get_ylim()
        assert low < min(line[:, 1].min() for line in lines) and max(line[:, 1].max() for line in lines) < high


def test_progress_tells_few_steps_each_and_many_in_parts(capsys):
    with progress({"a": "First", "b": "Second"}) as report:
        for done in range(4):
            report("a", done, 3)
        for done in range(1001):
            report("b", done, 1000, "x")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:4] == ["First: 0/3", "First: 1/3", "First: 2/3", "First: 3/3"]
    assert lines[4:] == [f"Second: {n}/1000 (x)" for n in (0, 200, 400, 600, 800, 1000)]


def test_a_document_of_another_version_is_refused(tmp_path):
    document = document_of(spectrum("h.0.q", [1.0]))
    (tmp_path / "spectra.json").write_text(spectra.to_json(document | {"schema_version": 2}))
    with pytest.raises(LoraFastError, match="schema_version=2"):
        spectra.read(tmp_path / "spectra.json")
