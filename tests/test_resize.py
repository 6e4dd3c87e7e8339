"""Resized and merged adapters, against dense singular value decompositions in float64 and against PEFT."""

import dataclasses
import json
import math
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import CAUSAL_LM, FAMILIES, build, logits, peft_model
from torch import nn

import lora_fast
from lora_fast import LoraConfig, LoraFastError, load_adapter, merge_adapters, resize_adapter
from lora_fast.checkpoint import CONFIG_NAME, WEIGHTS_NAME

EPS32 = torch.finfo(torch.float32).eps
PREFIX = "base_model.model."


def random_adapter(folder, family="llama", *, seed=3, dtype=torch.float32, lora=None, **config):
    """A PEFT folder as PEFT writes it, none of whose tensors is as it starts; columns of B fall off, as trained ones
    do."""
    generator = torch.Generator().manual_seed(seed)
    model = peft_model(build(family, **config), **(dict(FAMILIES[family].lora) | (lora or {})))
    randomize(model, generator)
    model.save_pretrained(folder)
    if dtype != torch.float32:
        tensors = {key: value.to(dtype) for key, value in load_file(folder / WEIGHTS_NAME).items()}
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    return folder


@torch.no_grad()
def randomize(model, generator):
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        if ".lora_B." in name:
            R = parameter.shape[1]
            falling = 0.6 ** torch.arange(R)
            parameter.mul_(falling.reshape(1, R, *(1 for _ in parameter.shape[2:])))


def config_of(folder):
    return json.loads((folder / CONFIG_NAME).read_text())


def dense_updates(folder):
    """{layer: ΔW (N, K) float64} of a PEFT folder, with ranks from the tensors and scalings by PEFT's own rule."""
    config = peft.LoraConfig.from_pretrained(folder)
    found = {}
    for key, lora_A in load_file(folder / WEIGHTS_NAME).items():
        name, _, kind = key.removeprefix(PREFIX).partition(".lora_")
        if kind not in ("A.weight", "embedding_A"):
            continue
        lora_B = load_file(folder / WEIGHTS_NAME)[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
        pattern = peft.utils.other.get_pattern_key
        r = config.rank_pattern.get(pattern(config.rank_pattern, name), config.r)
        alpha = config.alpha_pattern.get(pattern(config.alpha_pattern, name), config.lora_alpha)
        assert lora_A.shape[0] == r == lora_B.shape[1]
        scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
        found[name] = scaling * lora_B.flatten(1).double() @ lora_A.flatten(1).double()
    return found


def updates_of_a_mixture(folder, **config):
    """{layer or expert: ΔW (N, K) float64}, as PEFT loads the folder: get_delta_weight."""
    model = peft.PeftModel.from_pretrained(build("mixtral", dtype=torch.float64, **config), folder).double()
    found = {}
    for path, layer in model.named_modules():
        name = path.removeprefix(PREFIX).replace(".base_layer", "")
        if isinstance(layer, peft.tuners.lora.layer.ParamWrapper):
            name, delta = f"{name}.{layer.parameter_name}", layer.get_delta_weight("default").detach()
            if delta.dim() == 3:
                found |= {f"{name}[{expert}]": matrix for expert, matrix in enumerate(delta)}
            else:
                found[name.removesuffix(".weight")] = delta
        elif isinstance(layer, peft.tuners.lora.layer.LoraLayer):
            found[name] = layer.get_delta_weight("default").detach()
    return found


def truncated(delta, k):
    """The best approximation of rank k, float64, by LAPACK."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return U[:, :k] * S[:k] @ Vh[:k]


def assert_truth(report, before, after, *, to=1e-9):
    """Each layer of `after` is the best approximation of `before` of its rank, and is off by what the report says, all
    to `to`."""
    assert [layer.name for layer in report.layers] == list(after)
    for layer in report.layers:
        full, new = before[layer.name], after[layer.name]
        best, norm = truncated(full, layer.rank), full.norm()
        assert (new - best).norm() <= to * norm
        assert abs(layer.kept_energy - (1 - (full - best).norm() ** 2 / norm**2)) <= 1e-9
        assert abs(layer.kept_energy - (1 - (full - new).norm() ** 2 / norm**2)) <= to
        assert abs(layer.error - (full - new).norm()) <= to * norm
        assert abs(layer.frobenius_norm - norm) <= 1e-9 * norm
        assert layer.shape == tuple(full.shape)
    kept = sum((after[n] ** 2).sum() for n in after) / sum((d**2).sum() for d in before.values())
    assert abs(report.kept_energy - kept) <= 2 * to
    off = math.sqrt(sum(((before[n] - after[n]) ** 2).sum() for n in after))
    assert abs(report.error - off) <= to * sum(d.norm() for d in before.values())


def parameters(folder):
    return sum(v.numel() for k, v in load_file(folder / WEIGHTS_NAME).items() if ".lora_" in k)


RESIZED = {
    "llama": {"rank": 3},
    "qwen2": {"energy": 0.9},
    "qwen3": {"budget": 700, "scope": "global"},
    "gpt2": {"energy": 0.97, "scope": "global"},
    "roberta": {"error": 0.4},
}


@pytest.mark.parametrize("family", RESIZED)
def test_resized_in_float64_is_the_truth(tmp_path, family):
    """rsLoRA and biases (qwen2), patterns (qwen3), Conv1D (gpt2), modules_to_save (roberta)."""
    source = random_adapter(tmp_path / "in", family)
    report = resize_adapter(source, tmp_path / "out", dtype=torch.float64, **RESIZED[family])
    assert_truth(report, dense_updates(source), dense_updates(tmp_path / "out"))
    assert report.parameters_before == parameters(source)
    assert report.parameters == parameters(tmp_path / "out") < report.parameters_before
    assert report.rounding_error <= 1e-14 * math.hypot(*(layer.frobenius_norm for layer in report.layers))


def test_ranks_are_those_of_one_layer_and_of_none_whose_path_ends_like_it(tmp_path):
    """One path is the end of the other: PEFT takes a pattern for the end of a path, unless it begins with ^."""

    def network():
        torch.manual_seed(4)
        return nn.ModuleDict({"q": nn.Linear(12, 12), "inner": nn.ModuleDict({"q": nn.Linear(12, 12)})})

    model = peft.get_peft_model(network(), peft.LoraConfig(r=4, target_modules=["q"], init_lora_weights=False))
    with torch.no_grad():
        model.get_submodule("base_model.model.q").lora_B["default"].weight[:, 1:] = 0
    model.save_pretrained(tmp_path / "in")
    report = resize_adapter(tmp_path / "in", tmp_path / "out", energy=1.0, dtype=torch.float64)
    assert {layer.name: layer.rank for layer in report.layers} == {"q": 1, "inner.q": 4}
    again = peft.PeftModel.from_pretrained(network(), tmp_path / "out")
    for path in ("base_model.model.q", "base_model.model.inner.q"):
        before, after = (m.get_submodule(path).get_delta_weight("default") for m in (model, again))
        assert torch.allclose(before, after, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_told_apart(tmp_path, dtype):
    source = random_adapter(tmp_path / "in", dtype=dtype)
    report = resize_adapter(source, tmp_path / "out", rank=3)
    before, after = dense_updates(source), dense_updates(tmp_path / "out")
    written = load_file(tmp_path / "out" / WEIGHTS_NAME)
    assert {value.dtype for value in written.values()} == {dtype}
    for layer in report.layers:
        full, new, best = before[layer.name], after[layer.name], truncated(before[layer.name], 3)
        assert abs(layer.kept_energy - best.norm() ** 2 / full.norm() ** 2) <= 1e-9
        assert abs(layer.error - (full - best).norm()) <= 1e-9 * full.norm()
        assert abs(layer.rounding_error - (new - best).norm()) <= 1e-6 * (new - best).norm()
        assert 0 < layer.rounding_error <= torch.finfo(dtype).eps * best.norm()
        both = math.hypot(layer.error, layer.rounding_error)
        assert abs(both - (full - new).norm()) <= 5e-3 * both


@pytest.mark.parametrize("family", RESIZED)
def test_peft_and_lora_fast_load_the_truncated_update(tmp_path, family):
    source = random_adapter(tmp_path / "in", family)
    report = resize_adapter(source, tmp_path / "out", dtype=torch.float64, **RESIZED[family])
    inputs = FAMILIES[family].inputs
    before = dense_updates(source)
    expected = build(family, dtype=torch.float64)
    tensors = {k.removeprefix(PREFIX): v for k, v in load_file(source / WEIGHTS_NAME).items()}
    with torch.no_grad():
        for layer in report.layers:
            weight = expected.get_submodule(layer.name).weight
            update = truncated(before[layer.name], layer.rank)
            weight += update if weight.shape == update.shape and family != "gpt2" else update.T
        for key, value in tensors.items():  # biases and modules_to_save
            if ".lora_" not in key:
                expected.get_parameter(key.replace(".base_layer.", ".")).copy_(value)
    expected = logits(expected, inputs)
    plain = logits(build(family, dtype=torch.float64), inputs)
    assert (plain - expected).norm() > 1e-2 * expected.norm()

    loaded = peft.PeftModel.from_pretrained(build(family, dtype=torch.float64), tmp_path / "out")
    assert (logits(loaded, inputs) - expected).norm() <= 1e-12 * expected.norm()
    ours = load_adapter(build(family, dtype=torch.float64), tmp_path / "out", adapter_dtype=torch.float64)
    assert (logits(ours, inputs) - expected).norm() <= 1e-12 * expected.norm()
    scalings = [m.scaling["default"] for m in loaded.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert set(scalings) == {1.0}


def test_other_tensors_and_fields_are_carried_over(tmp_path):
    for family, lora in (("roberta", {"init_lora_weights": "gaussian"}), ("gpt2", {})):
        source, out = random_adapter(tmp_path / f"{family}_in", family, lora=lora), tmp_path / f"{family}_out"
        resize_adapter(source, out, rank=1)
        old, new = load_file(source / WEIGHTS_NAME), load_file(out / WEIGHTS_NAME)
        assert set(old) == set(new)
        others = [key for key in old if ".lora_" not in key]
        assert others
        assert all(torch.equal(old[key], new[key]) for key in others)
        changed = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
        old_config, new_config = config_of(source), config_of(out)
        for name in {field.name for field in dataclasses.fields(LoraConfig)} - changed - {"init_lora_weights"}:
            old, new = old_config[name], new_config.get(name)
            assert (set(new) == set(old)) if isinstance(old, list) else (new == old), name
        assert (new_config["r"], new_config["lora_alpha"], new_config["use_rslora"]) == (1, 1, False)
        assert new_config["rank_pattern"] == new_config["alpha_pattern"] == {}


class Mixed(torch.nn.Module):
    """A convolution, an embedding and linear layers of odd sizes."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(17, 11)
        self.conv = torch.nn.Conv2d(1, 7, (3, 2))
        self.out = torch.nn.Linear(7 * 9 * 10, 5)

    def forward(self, tokens):
        return self.out(self.conv(self.embedding(tokens)[:, None]).flatten(1))


def test_convolutions_and_embeddings(tmp_path):
    torch.manual_seed(0)
    base = Mixed().double()
    lora = {"target_modules": ["embedding", "conv", "out"], "r": 5, "lora_alpha": 7}
    model = peft_model(Mixed(), **lora)
    randomize(model, torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "in")
    report = resize_adapter(tmp_path / "in", tmp_path / "out", rank=2, dtype=torch.float64)
    before = dense_updates(tmp_path / "in")
    assert_truth(report, before, dense_updates(tmp_path / "out"))
    tokens = torch.arange(22).reshape(2, 11) % 17
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    torch.manual_seed(0)
    expected = Mixed().double()
    with torch.no_grad():
        for name, delta in before.items():
            delta = truncated(delta, 2)
            weight = expected.get_submodule(name).weight
            weight += delta.T if name == "embedding" else delta.reshape(weight.shape)
        difference = loaded(tokens) - expected(tokens)
        assert difference.norm() <= 1e-12 * expected(tokens).norm()


def test_factors_are_balanced(tmp_path):
    source = random_adapter(tmp_path / "in")
    resize_adapter(source, tmp_path / "out", rank=4, dtype=torch.float64)
    written, before = load_file(tmp_path / "out" / WEIGHTS_NAME), dense_updates(source)
    for name, delta in before.items():
        lora_A, lora_B = (written[f"{PREFIX}{name}.lora_{factor}.weight"] for factor in "AB")
        sigma = torch.diag(torch.linalg.svdvals(delta)[:4])
        assert (lora_A @ lora_A.T - sigma).norm() <= 1e-12 * sigma.norm()
        assert (lora_B.T @ lora_B - sigma).norm() <= 1e-12 * sigma.norm()


def test_one_global_threshold_beats_one_per_layer(tmp_path):
    source = random_adapter(
        tmp_path / "in", lora={"target_modules": ["v_proj", "down_proj"], "layers_to_transform": [0]}
    )
    per_layer = resize_adapter(source, tmp_path / "layer", rank=2, dtype=torch.float64)
    report = resize_adapter(
        source, tmp_path / "global", budget=per_layer.parameters, scope="global", dtype=torch.float64
    )
    assert report.parameters <= per_layer.parameters
    assert_truth(report, dense_updates(source), dense_updates(tmp_path / "global"))
    assert report.error <= per_layer.error


def test_energy_and_error_are_met_and_one_less_would_not(tmp_path):
    source = random_adapter(tmp_path / "in")
    before = dense_updates(source)
    report = resize_adapter(source, tmp_path / "energy", energy=0.8)
    for layer in report.layers:
        S = torch.linalg.svdvals(before[layer.name]) ** 2
        assert S[: layer.rank].sum() >= 0.8 * S.sum() > S[: layer.rank - 1].sum()
    report = resize_adapter(source, tmp_path / "error", error=0.3, scope="global")
    assert report.error <= 0.3
    smallest_kept = min(torch.linalg.svdvals(before[layer.name])[layer.rank - 1] for layer in report.layers)
    assert math.hypot(report.error, smallest_kept) > 0.3


def test_nothing_grows_and_nothing_vanishes(tmp_path):
    """A rank beyond the numerical one, duplicate columns, an update of zero."""
    source = random_adapter(tmp_path / "in", lora={"target_modules": ["q_proj", "v_proj"], "r": 5})
    tensors = load_file(source / WEIGHTS_NAME)
    zero, double = (f"{PREFIX}model.layers.{i}.self_attn.q_proj.lora_B.weight" for i in (0, 1))
    tensors[zero].zero_()
    tensors[double][:, 4] = tensors[double][:, 1]
    save_file(tensors, source / WEIGHTS_NAME, metadata={"format": "pt"})
    report = resize_adapter(source, tmp_path / "out", rank=40)
    ranks = {layer.name.removeprefix("model.layers."): layer.rank for layer in report.layers}
    assert ranks == {"0.self_attn.q_proj": 1, "0.self_attn.v_proj": 5, "1.self_attn.q_proj": 4, "1.self_attn.v_proj": 5}
    assert config_of(tmp_path / "out")["r"] == 5
    written = load_file(tmp_path / "out" / WEIGHTS_NAME)
    assert not written[zero].any()
    assert torch.equal(written[zero.replace("lora_B", "lora_A")], tensors[zero.replace("lora_B", "lora_A")][:1])
    first = report.layers[0]
    assert (first.kept_energy, first.error, first.rounding_error) == (1.0, 0.0, 0.0)
    assert report.parameters == parameters(tmp_path / "out")
    model = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "out", is_trainable=True)
    model(**CAUSAL_LM).loss.backward()
    moved = [n for n, p in model.named_parameters() if p.requires_grad and "0.self_attn.q_proj" in n and p.grad.any()]
    assert len(moved) == 1
    assert ".lora_B." in moved[0]


def test_ill_conditioned_factors(tmp_path):
    """Two columns of B that are equal to 1e-5 and a third of 1e-6 their size: the SVD takes its second pass."""
    source = random_adapter(tmp_path / "in", lora={"target_modules": ["q_proj", "down_proj"]})
    tensors = load_file(source / WEIGHTS_NAME)
    for key, value in tensors.items():
        if ".lora_B." in key:
            value[:, 1] = value[:, 0] + 1e-5 * value[:, 1]
            value[:, 2] *= 1e-6
    save_file(tensors, source / WEIGHTS_NAME, metadata={"format": "pt"})
    for rank in (2, 3, 4):
        report = resize_adapter(source, tmp_path / "out", rank=rank, dtype=torch.float64)
        assert_truth(report, dense_updates(source), dense_updates(tmp_path / "out"))


def test_a_negative_scaling_keeps_its_sign(tmp_path):
    source = random_adapter(tmp_path / "in", lora={"alpha_pattern": {"q_proj": -3.0}})
    report = resize_adapter(source, tmp_path / "out", rank=4, dtype=torch.float64)
    assert_truth(report, dense_updates(source), dense_updates(tmp_path / "out"))


def test_an_adapter_may_be_resized_in_place(tmp_path):
    source = random_adapter(tmp_path / "in")
    before = dense_updates(source)
    report = resize_adapter(source, source, rank=2, dtype=torch.float64)
    assert_truth(report, before, dense_updates(source))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_factors_beyond_their_dtype_are_not_written(tmp_path):
    """√σ of such an update is more than fp16 holds: in place, what was there stays."""
    source = random_adapter(tmp_path / "in", dtype=torch.float16)
    file = source / WEIGHTS_NAME
    save_file({key: torch.full_like(value, 6e4) for key, value in load_file(file).items()}, file)
    before = file.read_bytes()
    refused(lambda: resize_adapter(source, source, rank=1), "reach beyond torch.float16", "another dtype")
    assert file.read_bytes() == before
    report = resize_adapter(source, tmp_path / "out", rank=1, dtype=torch.float32)
    assert report.rounding_error < 1e-5 * max(layer.frobenius_norm for layer in report.layers)


def refused(call, *said):
    with pytest.raises(LoraFastError) as error:
        call()
    for part in said:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_what_resizing_refuses(tmp_path):
    source = random_adapter(tmp_path / "in")
    out = tmp_path / "out"
    for asked, said in (
        ({}, ("rank", "energy", "error", "budget")),
        ({"rank": 2, "energy": 0.5}, ("rank", "energy")),
        ({"rank": 0}, ("rank=0",)),
        ({"rank": 1.5}, ("rank=1.5",)),
        ({"energy": 0.0}, ("energy=0.0",)),
        ({"energy": 1.01}, ("energy=1.01",)),
        ({"error": -1.0}, ("error=-1.0",)),
        ({"budget": 5}, ("budget=5",)),
        ({"rank": 2, "scope": "model"}, ("scope='model'",)),
        ({"rank": 2, "dtype": torch.int8}, ("dtype=torch.int8",)),
    ):
        refused(lambda asked=asked: resize_adapter(source, out, **asked), *said)
    refused(lambda: resize_adapter(build("llama"), out, rank=2), "LlamaForCausalLM", "save_adapter")
    refused(lambda: resize_adapter(tmp_path / "none", out, rank=2), "none", "not a folder")
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    refused(lambda: resize_adapter(source, out, rank=2), "thesis.tex")
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    path = source / CONFIG_NAME
    path.write_text(json.dumps(config_of(source) | {"init_lora_weights": "pissa"}))
    refused(lambda: resize_adapter(source, tmp_path / "new", rank=2), "pissa", "portable=True")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("which", [".lora_B.", "classifier"])
def test_nan_is_refused_by_name(tmp_path, which):
    source = random_adapter(tmp_path / "in", "roberta")
    tensors = load_file(source / WEIGHTS_NAME)
    key = next(key for key in tensors if which in key)
    tensors[key].view(-1)[3] = math.nan
    save_file(tensors, source / WEIGHTS_NAME, metadata={"format": "pt"})
    refused(lambda: resize_adapter(source, tmp_path / "out", rank=2), key, "NaN")
    refused(lambda: merge_adapters([source], [1], tmp_path / "out"), key, "NaN")
    assert not (tmp_path / "out").exists()


def test_a_budget_below_one_rank_a_layer_says_the_least(tmp_path):
    source = random_adapter(tmp_path / "in")
    least = sum(sum(delta.shape) for delta in dense_updates(source).values())
    refused(lambda: resize_adapter(source, tmp_path / "out", budget=least - 1, scope="global"), str(least))
    report = resize_adapter(source, tmp_path / "out", budget=least, scope="global")
    assert {layer.rank for layer in report.layers} == {1}


def test_the_report_goes_through_json(tmp_path):
    source = random_adapter(tmp_path / "in")
    seen = []
    report = resize_adapter(source, tmp_path / "out", rank=2, progress=lambda done, total: seen.append((done, total)))
    back = json.loads(json.dumps(report.to_dict()))
    assert back["layers"][3]["name"] == report.layers[3].name
    assert back["layers"][3]["shape"] == list(report.layers[3].shape)
    assert back["kept_energy"] == report.kept_energy
    assert back["folder"] == str(tmp_path / "out")
    assert seen[-1] == (14, 14)


# Experts --------------------------------------------------------------------------------------------------------------

MIXTURE = {"target_modules": "all-linear", "r": 4, "lora_alpha": 6, "init_lora_weights": False}


def stack(name):
    return name.partition("[")[0]


@pytest.mark.parametrize(
    "asked",
    [
        *({"rank": 2}, {"energy": 0.8}, {"error": 0.05}, {"budget": 4000}),
        *({"budget": 4000, "scope": "global"}, {"energy": 0.8, "scope": "global"}, {"rank": 2, "scope": "global"}),
    ],
)
def test_experts_are_resized_to_the_best_of_their_one_rank(tmp_path, asked):
    """And PEFT loads what is written as the same updates, gate_up_proj (2 r, as PEFT has it) beneath down_proj."""
    source = random_adapter(tmp_path / "in", "mixtral", lora=MIXTURE)
    before = updates_of_a_mixture(source)
    report = resize_adapter(source, tmp_path / "out", dtype=torch.float64, **asked)
    after = updates_of_a_mixture(tmp_path / "out")
    assert before.keys() == after.keys()
    assert_truth(report, before, {layer.name: after[layer.name] for layer in report.layers})
    assert report.parameters == parameters(tmp_path / "out")
    rows = {layer.name: layer for layer in report.layers}
    ranks = {}
    for name, row in rows.items():
        ranks.setdefault(stack(name), set()).add(row.rank)
    assert all(len(of_stack) == 1 for of_stack in ranks.values())
    assert len(ranks) == len(before) - 2 * 2 * 2  # of two blocks' two stacks of 3
    if "scope" in asked or "budget" in asked:
        assert report.parameters <= asked.get("budget", report.parameters_before)
        assert report.kept_energy >= asked.get("energy", 0)
        return
    # The neediest expert's: with one less, one of them would miss.
    for name, of_stack in ranks.items():
        (k,) = of_stack
        members = [delta for other, delta in before.items() if stack(other) == name]
        needed = []
        for delta in members:
            S = torch.linalg.svdvals(delta)
            dropped = (S**2).flip(0).cumsum(0).flip(0)
            if "energy" in asked:
                needed.append(int((dropped > (1 - asked["energy"]) * dropped[0]).sum()))
            else:
                needed.append(int((dropped.sqrt() > asked["error"]).sum()) if "error" in asked else asked["rank"])
        assert k == max(1, *needed)
    if "rank" not in asked:
        assert len({k for of_stack in ranks.values() for k in of_stack}) > 1


def test_a_budget_for_experts_goes_where_a_parameter_keeps_most(tmp_path):
    """One rank more of a stack is a direction of each expert, and costs that many parameters."""
    source = random_adapter(tmp_path / "in", "mixtral", lora=MIXTURE)
    report = resize_adapter(source, tmp_path / "out", budget=5000, scope="global")
    energies, costs = {}, {}
    for name, delta in updates_of_a_mixture(source).items():
        rank = 8 if "gate_up_proj" in name else 3 if "gate" in name else 4  # of 3 experts a router's N is 3
        energies[stack(name)] = energies.get(stack(name), 0) + torch.linalg.svdvals(delta)[:rank] ** 2
        costs[stack(name)] = costs.get(stack(name), 0) + sum(delta.shape)
    ranks, left = dict.fromkeys(costs, 1), 5000 - sum(costs.values())
    steps = [(float(value) / costs[name], name) for name in costs for value in energies[name][1:]]
    for _, name in sorted(steps, reverse=True):
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    assert {stack(layer.name): layer.rank for layer in report.layers} == ranks
    assert len({ranks[name] for name in ranks if "experts" in name}) > 1
    assert report.parameters == parameters(tmp_path / "out") == 5000 - left


def test_experts_that_have_fewer_directions_than_others(tmp_path):
    """They share the others' rank, filled up with zeros; one whose update is zero keeps rows of lora_A to train on."""
    source = random_adapter(tmp_path / "in", "mixtral", lora=MIXTURE)
    key = f"{PREFIX}model.layers.0.mlp.experts.lora_B.weight"
    tensors = load_file(source / WEIGHTS_NAME)
    tensors[key][:, 1::3] = 0.0
    tensors[key][:, 2 + 3 :: 3] = 0.0  # of the third expert one direction is left
    save_file(tensors, source / WEIGHTS_NAME, metadata={"format": "pt"})
    before = updates_of_a_mixture(source)
    resize_adapter(source, tmp_path / "out", rank=3, dtype=torch.float64)
    after, written = updates_of_a_mixture(tmp_path / "out"), load_file(tmp_path / "out" / WEIGHTS_NAME)
    for expert in range(3):
        name = f"model.layers.0.mlp.experts.down_proj[{expert}]"
        assert (after[name] - truncated(before[name], 3)).norm() <= 1e-12 * before[name].norm()
    assert written[key].shape == (32, 9)
    assert not written[key][:, 1::3].any()
    old = tensors[key.replace("lora_B", "lora_A")]
    new = written[key.replace("lora_B", "lora_A")]
    assert torch.equal(new[3:6], old[4:7].double())
    assert not new[7:].any()


def test_parameters_of_several_adapters_are_merged(tmp_path):
    """Each has other parameters of the same modules, so that their places in the file change; one has dropout."""
    targets = [["experts.gate_up_proj"], ["experts.down_proj", "gate.weight"], ["experts.gate_up_proj"]]
    folders = [
        random_adapter(
            tmp_path / str(place),
            "mixtral",
            seed=place,
            lora=MIXTURE | {"target_modules": ["q_proj"], "target_parameters": names, "r": 2 + place},
        )
        for place, names in enumerate(targets)
    ]
    lora = {"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_dropout": 0.1}
    folders.insert(0, random_adapter(tmp_path / "dropout", "mixtral", lora=lora))
    weights = (1.5, 0.5, -2.0, 0.25)
    expected = {}
    for folder, weight in zip(folders, weights):
        for name, delta in updates_of_a_mixture(folder).items():
            expected[name] = expected.get(name, 0) + weight * delta
    report = merge_adapters(folders, weights, tmp_path / "out", dtype=torch.float64)
    found = updates_of_a_mixture(tmp_path / "out")
    assert found.keys() == expected.keys() == {layer.name for layer in report.layers}
    for name, delta in expected.items():
        assert (found[name] - delta).norm() <= 1e-12 * delta.norm()
    ranks = {layer.name: (layer.old_rank, layer.rank) for layer in report.layers}
    assert ranks["model.layers.1.mlp.experts.gate_up_proj[2]"] == (6, 6)
    assert ranks["model.layers.1.mlp.experts.down_proj[0]"] == (3, 3)
    assert ranks["model.layers.0.mlp.gate"] == (3, 3)
    assert config_of(tmp_path / "out")["lora_dropout"] == 0.0
    ours = load_adapter(build("mixtral"), tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(build("mixtral"), tmp_path / "out")
    assert (logits(ours) - logits(theirs)).norm() <= 1e-5 * logits(theirs).norm()


class Stacks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(3, 6, 5)) for _ in range(2))


def test_what_of_parameters_is_not_merged(tmp_path):
    folders = []
    for name in ("first", "second"):
        model = nn.Sequential(Stacks())
        lora = {"r": 2, "target_modules": [], "target_parameters": [f"0.{name}"], "init_lora_weights": False}
        lora_fast.save_adapter(lora_fast.apply_lora(model, LoraConfig(**lora)), tmp_path / name)
        folders.append(tmp_path / name)
    refused(
        lambda: merge_adapters(folders, [1, 1], tmp_path / "out"),
        "the order in which 0 declares first, second is not known",
        "merge adapters of the same parameters",
    )
    model = nn.Sequential(Stacks())
    lora = {"r": 2, "target_modules": [], "target_parameters": ["0.first", "0.second"], "init_lora_weights": False}
    lora_fast.save_adapter(lora_fast.apply_lora(model, LoraConfig(**lora)), tmp_path / "both")
    refused(lambda: resize_adapter(tmp_path / "both", tmp_path / "out", rank=1), "which parameters of 0", "0.second")
    experts = MIXTURE | {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    three = random_adapter(tmp_path / "three", "mixtral", lora=experts)
    four = random_adapter(tmp_path / "four", "mixtral", lora=experts, num_local_experts=4)
    refused(
        lambda: merge_adapters([three, four], [1, 1], tmp_path / "out"),
        "model.layers.0.mlp.experts.down_proj is a parameter of 3 experts of (N, K) = (32, 44) in",
        "and a parameter of 4 experts of (N, K) = (32, 44) in",
    )
    assert not (tmp_path / "out").exists()


# Merging --------------------------------------------------------------------------------------------------------------


def three_adapters(tmp_path):
    """Of different ranks, scalings, targets and dtypes, over one base."""
    two = ["q_proj", "up_proj"]
    return [
        random_adapter(tmp_path / "one", seed=1, lora={"r": 5, "lora_alpha": 3}),
        random_adapter(tmp_path / "two", seed=2, lora={"r": 3, "use_rslora": True, "target_modules": two}),
        random_adapter(tmp_path / "three", seed=3, dtype=torch.bfloat16, lora={"r": 2, "target_modules": ["up_proj"]}),
    ]


def dense_sum(folders, weights):
    total = {}
    for folder, weight in zip(folders, weights):
        for name, delta in dense_updates(folder).items():
            total[name] = total.get(name, 0) + weight * delta
    return total


def test_a_merge_is_the_sum(tmp_path):
    folders, weights = three_adapters(tmp_path), (0.7, -1.3, 2)
    expected = dense_sum(folders, weights)
    report = merge_adapters(folders, weights, tmp_path / "out", dtype=torch.float64)
    found = dense_updates(tmp_path / "out")
    assert set(found) == set(expected)
    for name, delta in expected.items():
        assert (found[name] - delta).norm() <= 1e-12 * delta.norm()
    ranks = {layer.name: (layer.old_rank, layer.rank) for layer in report.layers}
    assert ranks["model.layers.0.self_attn.q_proj"] == (8, 8)
    assert ranks["model.layers.1.mlp.up_proj"] == (10, 10)
    assert ranks["model.layers.1.mlp.gate_proj"] == (5, 5)
    assert report.kept_energy == 1.0
    assert report.error == 0.0
    in_fp32 = merge_adapters(folders, weights, tmp_path / "fp32")
    assert {value.dtype for value in load_file(tmp_path / "fp32" / WEIGHTS_NAME).values()} == {torch.float32}
    for layer in in_fp32.layers:
        off = (dense_updates(tmp_path / "fp32")[layer.name] - expected[layer.name]).norm()
        assert off <= EPS32 * expected[layer.name].norm()
        assert abs(off - layer.rounding_error) <= 1e-3 * off


@pytest.mark.parametrize("asked", [{"rank": 4}, {"energy": 0.9, "scope": "global"}])
def test_a_merge_is_compressed_to_the_best(tmp_path, asked):
    folders, weights = three_adapters(tmp_path), (0.7, -1.3, 2)
    report = merge_adapters(folders, weights, tmp_path / "out", dtype=torch.float64, **asked)
    expected = dense_sum(folders, weights)
    found = dense_updates(tmp_path / "out")
    assert_truth(report, {name: expected[name] for name in found}, found)
    assert report.parameters < report.parameters_before


def test_a_merge_drops_what_is_exactly_zero(tmp_path):
    one = random_adapter(tmp_path / "one", lora={"r": 5})
    report = merge_adapters([one, one], [0.25, 0.5], tmp_path / "out", dtype=torch.float64)
    assert {(layer.old_rank, layer.rank) for layer in report.layers} == {(10, 5)}
    for name, delta in dense_updates(tmp_path / "out").items():
        assert (delta - 0.75 * dense_updates(one)[name]).norm() <= 1e-12 * delta.norm()
    report = merge_adapters([one, one], [1, -1], tmp_path / "nothing")
    assert {(layer.rank, layer.frobenius_norm) for layer in report.layers} == {(1, 0.0)}
    assert all(not delta.any() for delta in dense_updates(tmp_path / "nothing").values())


def test_adapters_without_a_common_layer_are_merged_with_a_word(tmp_path):
    one = random_adapter(tmp_path / "one", lora={"target_modules": ["q_proj"]})
    two = random_adapter(tmp_path / "two", lora={"target_modules": ["v_proj"]})
    with pytest.warns(lora_fast.LoraFastWarning, match="one shares no layer with the other adapters .*q_proj.*v_proj"):
        merge_adapters([one, two], [1, 1], tmp_path / "out")
    expected = dense_updates(one) | dense_updates(two)
    found = dense_updates(tmp_path / "out")
    assert set(found) == set(expected)
    both = random_adapter(tmp_path / "both", lora={"target_modules": ["q_proj", "v_proj"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error", lora_fast.LoraFastWarning)
        merge_adapters([one, two, both], [1, 1, 1], tmp_path / "three")


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_a_merge_agrees_with_pefts(tmp_path, kind):
    one = random_adapter(tmp_path / "one", seed=1, lora={"r": 5, "lora_alpha": 3})
    two = random_adapter(tmp_path / "two", seed=2, lora={"r": 5, "lora_alpha": 8})
    weights = [0.7, 0.4]
    theirs = peft.PeftModel.from_pretrained(build("llama", dtype=torch.float64), one, adapter_name="one")
    theirs.load_adapter(two, adapter_name="two")
    extra = {"svd_rank": 3} if kind == "svd" else {}
    theirs.add_weighted_adapter(["one", "two"], weights, "both", combination_type=kind, **extra)
    theirs.set_adapter("both")
    merge_adapters([one, two], weights, tmp_path / "out", dtype=torch.float64, rank=3 if kind == "svd" else None)
    ours = peft.PeftModel.from_pretrained(build("llama", dtype=torch.float64), tmp_path / "out")
    difference = (logits(ours) - logits(theirs)).norm() / logits(theirs).norm()
    # PEFT's "svd" forms the updates in fp32
    assert difference <= (1e-12 if kind == "cat" else 1e-6)


def test_merged_targets_name_every_layer(tmp_path):
    folders = three_adapters(tmp_path)
    merge_adapters(folders[1:], [1, 1], tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error", lora_fast.LoraFastWarning)
        model = load_adapter(build("llama"), tmp_path / "out")
    adapted = {name for name, module in model.named_modules() if isinstance(module, lora_fast.LoraLinear)}
    assert adapted == set(dense_updates(folders[1])) | set(dense_updates(folders[2]))


def test_a_merge_of_differing_configs(tmp_path):
    """Targets of one that another's exclude_modules would take away; fan_in_fan_out; the widest dtype, in any order."""
    lora = {"bias": "none", "target_modules": ["c_attn", "c_fc"]}
    first = random_adapter(tmp_path / "first", "gpt2", dtype=torch.bfloat16, lora=lora | {"exclude_modules": ["c_fc"]})
    second = random_adapter(tmp_path / "second", "gpt2", lora=lora | {"layers_to_transform": [1]})
    (first / CONFIG_NAME).write_text(json.dumps(config_of(first) | {"fan_in_fan_out": False}))
    report = merge_adapters([first, second], [1, 1], tmp_path / "out")
    assert {value.dtype for value in load_file(tmp_path / "out" / WEIGHTS_NAME).values()} == {torch.float32}
    assert config_of(tmp_path / "out")["fan_in_fan_out"] is True
    model = load_adapter(build("gpt2"), tmp_path / "out")
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {layer.name for layer in report.layers}
    assert {name.removeprefix("transformer.h.") for name in adapted} == {"0.attn.c_attn", "1.attn.c_attn", "1.mlp.c_fc"}


def test_what_merging_refuses(tmp_path):
    one = random_adapter(tmp_path / "one", lora={"r": 5})
    out = tmp_path / "out"
    refused(lambda: merge_adapters([one, one], [1.0], out), "1 weights for 2 adapters")
    refused(lambda: merge_adapters([], [], out), "adapters=[]")
    refused(lambda: merge_adapters(str(one), [1.0], out), "list of adapter folders")
    refused(lambda: merge_adapters([one], [math.nan], out), "weights=[nan]", "finite")
    refused(lambda: merge_adapters([one], [1.0], out, rank=2, energy=0.5), "rank", "energy")
    small = random_adapter(tmp_path / "small", hidden_size=16, head_dim=8)
    refused(lambda: merge_adapters([one, small], [1, 1], out), "down_proj", "(32, 44)", "(16, 44)", "one", "small")
    trained = random_adapter(tmp_path / "trained", "roberta")
    refused(lambda: merge_adapters([trained], [1], out), "trained", "classifier", "merge them into the base")
    other = random_adapter(tmp_path / "other")
    for folder, base in ((one, "meta/llama"), (other, "mistral/mistral")):
        (folder / CONFIG_NAME).write_text(json.dumps(config_of(folder) | {"base_model_name_or_path": base}))
    refused(lambda: merge_adapters([one, other], [1, 1], out), "meta/llama", "mistral/mistral")
    assert not out.exists()
