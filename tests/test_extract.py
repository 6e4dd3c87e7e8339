"""Adapters extracted from two checkpoints, against dense singular value decompositions in float64 and against PEFT."""

import json
import math

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import FAMILIES, VOCABULARY, build, logits

from lora_fast import LoraFastError, extract_adapter, load_adapter
from lora_fast.checkpoint import CONFIG_NAME, WEIGHTS_NAME

PREFIX = "base_model.model."


def checkpoints(
    tmp_path, family="llama", *, others=False, rank=None, size=0.05, dtype=torch.float64, only=None, **config
):
    """Folders of a base and of what "fine-tuning" made of it, and the models: every matrix of a layer has moved by a
    sum of `rank` directions (all of them: None) that fall off; with `others` everything else too."""
    base = build(family, dtype=dtype, **config)
    tuned = build(family, dtype=dtype, **config)
    generator = torch.Generator().manual_seed(7)
    linears = {name for name, _ in linear_weights(base)}
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            module = name.rpartition(".")[0]
            if name.endswith(".weight") and module in linears:
                if only is None or only in module:
                    parameter.add_(update(parameter.shape, rank, generator, size).to(dtype))
            elif others:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype), alpha=size)
    for model, name in ((base, "base"), (tuned, "tuned")):
        model.save_pretrained(tmp_path / name)
    return base, tuned


def update(shape, rank, generator, size):
    count = min(shape) if rank is None else rank
    left, right = (torch.randn(n, count, generator=generator, dtype=torch.float64) for n in shape)
    return size * left * 0.8 ** torch.arange(count) @ right.T / math.sqrt(count)


def linear_weights(model):
    """(name, module) of its linear layers but the head."""
    for name, module in model.named_modules():
        linear = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and module is not model.get_output_embeddings():
            yield name, module


def dense_updates(base, tuned):
    """{layer: ΔW (N, K) float64}."""
    found = {}
    for (name, before), (_, after) in zip(linear_weights(base), linear_weights(tuned)):
        delta = after.weight.detach().double() - before.weight.detach().double()
        found[name] = delta if isinstance(before, torch.nn.Linear) else delta.T
    return found


def written(folder):
    tensors = load_file(folder / WEIGHTS_NAME)
    names = [key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in tensors if ".lora_A." in key]
    pairs = {n: [tensors[f"{PREFIX}{n}.lora_{factor}.weight"].double() for factor in "BA"] for n in names}
    return {name: lora_B @ lora_A for name, (lora_B, lora_A) in pairs.items()}


def truncated(delta, k):
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return U[:, :k] * S[:k] @ Vh[:k]


def config_of(folder):
    return json.loads((folder / CONFIG_NAME).read_text())


def assert_truth(report, before, after, *, to=1e-9):
    """What is written is the best approximation of its rank, and off by what the report says."""
    assert {layer.name for layer in report.layers} == set(after)
    for layer in report.layers:
        full, new = before[layer.name], after[layer.name]
        norm = full.norm()
        assert (new - truncated(full, layer.rank)).norm() <= to * norm
        assert abs(layer.kept_energy - (1 - (full - new).norm() ** 2 / norm**2)) <= 1e-9
        assert abs(layer.error - (full - new).norm()) <= to * norm
        assert abs(layer.frobenius_norm - norm) <= 1e-9 * norm
        assert layer.shape == tuple(full.shape)
        assert layer.old_rank is None
    total = sum(d.norm() ** 2 for d in before.values())
    assert abs(report.kept_energy - sum(after[n].norm() ** 2 for n in after) / total) <= 1e-9


CRITERIA = {
    "rank": {"rank": 3},
    "energy": {"energy": 0.9},
    "error": {"error": 1.0, "scope": "global"},
    "budget": {"budget": 4000},
    "global": {"budget": 5000, "scope": "global"},
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("asked", CRITERIA)
def test_extracted_is_the_best_approximation(tmp_path, family, asked):
    base, tuned = checkpoints(tmp_path, family)
    report = extract_adapter(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "out", dtype=torch.float64, **CRITERIA[asked]
    )
    before = dense_updates(base, tuned)
    assert_truth(report, before, written(tmp_path / "out"))
    assert len(report.layers) == len(before)
    assert report.not_carried == ()
    assert report.parameters == sum(layer.rank * sum(layer.shape) for layer in report.layers)
    assert report.parameters_before == sum(delta.numel() for delta in before.values())
    for layer in report.layers:
        S = torch.linalg.svdvals(before[layer.name]) ** 2
        if asked == "rank":
            assert layer.rank == 3
        if asked == "energy":
            assert S[: layer.rank].sum() >= 0.9 * S.sum() > S[: layer.rank - 1].sum()
    if asked == "error":
        assert 0.9 < report.error <= 1.0
    if asked == "budget":
        one_more = sum((layer.rank + 1) * sum(layer.shape) for layer in report.layers)
        assert report.parameters <= CRITERIA[asked]["budget"] < one_more
        assert len({layer.rank for layer in report.layers}) == 1
    if asked == "global":
        smallest = min(sum(layer.shape) for layer in report.layers)
        assert report.parameters <= CRITERIA[asked]["budget"] < report.parameters + smallest


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_peft_and_lora_fast_load_what_was_extracted(tmp_path, family):
    base, tuned = checkpoints(tmp_path, family)
    extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=4, dtype=torch.float64)
    expected = build(family, dtype=torch.float64)
    with torch.no_grad():
        for name, delta in dense_updates(base, tuned).items():
            module = expected.get_submodule(name)
            module.weight += truncated(delta, 4) if isinstance(module, torch.nn.Linear) else truncated(delta, 4).T
    expected = logits(expected)
    assert (logits(base) - expected).norm() > 1e-2 * expected.norm()
    loaded = peft.PeftModel.from_pretrained(build(family, dtype=torch.float64), tmp_path / "out")
    assert (logits(loaded) - expected).norm() <= 1e-9 * expected.norm()
    ours = load_adapter(build(family, dtype=torch.float64), tmp_path / "out", adapter_dtype=torch.float64)
    assert (logits(ours) - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("qwen2", {}), ("bert", {})],
)
def test_all_of_a_fine_tune_is_carried(tmp_path, family, config):
    """At full rank and with the others, the loaded adapter is the tuned model: embeddings (tied to the head and not),
    norms, biases, a classifier."""
    _, tuned = checkpoints(tmp_path, family, others=True, **config)
    out = tmp_path / "out"
    report = extract_adapter(
        tmp_path / "base", tmp_path / "tuned", out, rank=128, dtype=torch.float64, save_others=True
    )
    assert report.not_carried == ()
    inputs = FAMILIES[family].inputs
    expected = logits(tuned, inputs)
    start = lambda: build(family, dtype=torch.float64, **config)  # noqa: E731
    assert (logits(start(), inputs) - expected).norm() > 0.1 * expected.norm()
    loaded = peft.PeftModel.from_pretrained(start(), out)
    assert (logits(loaded, inputs) - expected).norm() <= 1e-9 * expected.norm()
    ours = load_adapter(start(), out, adapter_dtype=torch.float64)
    assert (logits(ours, inputs) - expected).norm() <= 1e-9 * expected.norm()


def test_what_is_not_carried_is_listed(tmp_path):
    checkpoints(tmp_path, others=True)
    report = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2)
    listed = {entry.name: (entry.shape, entry.size, entry.reason) for entry in report.not_carried}
    assert listed["model.embed_tokens.weight"] == ((VOCABULARY, 32), VOCABULARY * 32, "not among the target modules")
    assert listed["model.norm.weight"] == ((32,), 32, "not a matrix")
    assert set(listed) == {
        *("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"),
        *(f"model.layers.{i}.{n}_layernorm.weight" for i in (0, 1) for n in ("input", "post_attention")),
    }
    assert not any("modules_to_save" in key or "norm" in key for key in load_file(tmp_path / "out" / WEIGHTS_NAME))
    back = json.loads(json.dumps(report.to_dict()))
    assert len(back["not_carried"]) == 7
    assert back["layers"][0]["old_rank"] is None


def test_rounding_of_bf16_is_not_taken_for_an_update(tmp_path):
    """A true rank of 3, stored in bf16."""
    config = {"hidden_size": 160, "intermediate_size": 203, "head_dim": 40, "num_hidden_layers": 1}
    size = 3e-3
    checkpoints(tmp_path, rank=3, size=size, dtype=torch.bfloat16, **config)
    folders = tmp_path / "base", tmp_path / "tuned"
    report = extract_adapter(*folders, tmp_path / "out", energy=0.9999)
    raw = extract_adapter(*folders, tmp_path / "raw", energy=0.9999, denoise=False)
    assert max(layer.rank for layer in report.layers) <= 3
    assert min(layer.rank for layer in raw.layers) > 30
    for layer in report.layers:
        assert 0 < layer.noise_energy < 1
        if layer.rank == 3:  # all that stands above the noise
            assert abs(layer.kept_energy + layer.noise_energy - 1) <= 1e-9


def test_a_layer_that_only_rounded_is_left_out(tmp_path):
    _, tuned = checkpoints(tmp_path, rank=2, size=0.3, dtype=torch.bfloat16, only="q_proj")
    with torch.no_grad():
        weight = tuned.get_submodule("model.layers.0.mlp.down_proj").weight
        moved = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.02
        weight.copy_(torch.where(moved, weight * (1 + 2**-7), weight))
    tuned.save_pretrained(tmp_path / "tuned")
    report = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2)
    assert {layer.name for layer in report.layers} == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert [entry.name for entry in report.not_carried] == ["model.layers.0.mlp.down_proj.weight"]
    assert "rounding" in report.not_carried[0].reason
    for scope in ("layer", "global"):
        report = extract_adapter(
            tmp_path / "base", tmp_path / "tuned", tmp_path / "raw", rank=2, denoise=False, scope=scope
        )
        assert len(report.layers) == 3
        with pytest.raises(LoraFastError, match="none of their 2 linear layers by more than the rounding"):
            extract_adapter(
                *(tmp_path / name for name in ("base", "tuned", "none")),
                rank=2,
                target_modules=["down_proj"],
                scope=scope,
            )


def test_topk_finds_what_exact_finds(tmp_path):
    config = {"hidden_size": 232, "intermediate_size": 301, "head_dim": 58, "num_hidden_layers": 1}
    base, tuned = checkpoints(tmp_path, rank=6, **config)
    folders = tmp_path / "base", tmp_path / "tuned"
    for number, asked in enumerate(({"rank": 5}, {"energy": 0.97}, {"budget": 9000, "scope": "global"})):
        exact = extract_adapter(*folders, tmp_path / f"exact{number}", dtype=torch.float64, **asked)
        topk = extract_adapter(*folders, tmp_path / f"topk{number}", dtype=torch.float64, method="topk", k=8, **asked)
        assert [layer.rank for layer in topk.layers] == [layer.rank for layer in exact.layers]
        assert_truth(topk, dense_updates(base, tuned), written(tmp_path / f"topk{number}"), to=1e-7)
    with pytest.raises(LoraFastError, match="compute more"):
        extract_adapter(*folders, tmp_path / "more", method="topk", k=2, energy=0.99, denoise=False)
    assert not (tmp_path / "more").exists()


def test_topk_of_matrices_that_are_done_exactly_takes_more_than_k(tmp_path):
    base, tuned = checkpoints(tmp_path)
    report = extract_adapter(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "out", energy=0.95, method="topk", k=2, dtype=torch.float64
    )
    assert min(layer.rank for layer in report.layers) > 2
    assert_truth(report, dense_updates(base, tuned), written(tmp_path / "out"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_of_the_factors(tmp_path, dtype):
    base, tuned = checkpoints(tmp_path)
    options = {} if dtype == torch.float32 else {"dtype": dtype}
    report = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=3, **options)
    assert {value.dtype for value in load_file(tmp_path / "out" / WEIGHTS_NAME).values()} == {dtype}
    before, after = dense_updates(base, tuned), written(tmp_path / "out")
    for layer in report.layers:
        lost = (after[layer.name] - truncated(before[layer.name], 3)).norm()
        assert abs(layer.rounding_error - lost) <= 1e-3 * lost
        assert 0 < lost <= torch.finfo(dtype).eps * layer.frobenius_norm


def test_checkpoints_saved_without_the_models_prefix(tmp_path):
    """As gpt2 on the hub: "h.0…" for transformer.h.0… of the model with a head."""
    base, tuned = checkpoints(tmp_path, "gpt2")
    for name in ("base", "tuned"):
        path = tmp_path / name / "model.safetensors"
        bare = {key.removeprefix("transformer."): value for key, value in load_file(path).items()}
        save_file(bare, path, metadata={"format": "pt"})
    report = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=3, dtype=torch.float64)
    assert_truth(report, dense_updates(base, tuned), written(tmp_path / "out"))


def test_only_changed_layers_and_targets(tmp_path):
    checkpoints(tmp_path, only="layers.1.")
    folders = tmp_path / "base", tmp_path / "tuned"
    report = extract_adapter(*folders, tmp_path / "out", rank=2)
    assert {layer.name.split(".")[2] for layer in report.layers} == {"1"}
    assert set(config_of(tmp_path / "out")["target_modules"]) == {layer.name for layer in report.layers}
    assert config_of(tmp_path / "out")["task_type"] == "CAUSAL_LM"
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == str(tmp_path / "base")
    report = extract_adapter(*folders, tmp_path / "some", rank=2, target_modules=["v_proj", "up_proj"])
    assert [layer.name.rpartition(".")[2] for layer in report.layers] == ["up_proj", "v_proj"]
    assert len(report.not_carried) == 5


def test_short_names_where_they_mean_the_same(tmp_path):
    checkpoints(tmp_path, only="_proj")
    extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2)
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert sorted(config_of(tmp_path / "out")["target_modules"]) == sorted(kinds)


def test_without_a_config_names_decide(tmp_path):
    base, tuned = checkpoints(tmp_path, others=True)
    for name in ("base", "tuned"):
        (tmp_path / name / "config.json").unlink()
    report = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2, dtype=torch.float64)
    assert_truth(report, dense_updates(base, tuned), written(tmp_path / "out"))
    assert {layer.name for layer in report.layers} == set(dense_updates(base, tuned))
    report = extract_adapter(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "head", rank=2, target_modules=["lm_head"]
    )
    assert [layer.name for layer in report.layers] == ["lm_head"]
    with pytest.raises(LoraFastError, match="save_others=True"):
        extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "no", rank=2, save_others=True)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_progress_ends_at_its_total(tmp_path, scope):
    checkpoints(tmp_path)
    seen = []
    told = lambda done, total: seen.append((done, total))  # noqa: E731
    extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", energy=0.5, scope=scope, progress=told)
    total = 14 if scope == "layer" else 28
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_what_extraction_refuses(tmp_path):
    checkpoints(tmp_path)
    folders, out = (tmp_path / "base", tmp_path / "tuned"), tmp_path / "out"
    for asked, said in (
        ({}, ("rank", "energy", "error", "budget")),
        ({"rank": 2, "budget": 3}, ("rank", "budget")),
        ({"rank": 0}, ("rank=0",)),
        ({"energy": 2}, ("energy=2",)),
        ({"budget": 100}, ("budget=100", "below the")),
        ({"rank": 2, "method": "qr"}, ("method='qr'",)),
        ({"rank": 2, "k": 0}, ("k=0",)),
        ({"rank": 2, "dtype": torch.int32}, ("dtype=torch.int32",)),
        ({"rank": 2, "target_modules": ["query"]}, ("query", "q_proj")),
        ({"rank": 2, "target_modules": ["embed_tokens"]}, ("embed_tokens", "Embedding")),
        ({"rank": 2, "exclude": ["nothing"]}, ("nothing",)),
    ):
        with pytest.raises(LoraFastError) as error:
            extract_adapter(*folders, out, **asked)
        assert all(part in str(error.value) for part in said), error.value
        assert "\n" not in str(error.value)
    for scope in ("layer", "global"):
        with pytest.raises(LoraFastError, match=r"differ in none of their 14 linear layers$"):
            extract_adapter(folders[0], folders[0], out, rank=2, scope=scope)
    with pytest.raises(LoraFastError, match="holds something else"):
        extract_adapter(*folders, folders[1], rank=2)
    assert (folders[1] / "model.safetensors").is_file()
    assert not out.exists()
