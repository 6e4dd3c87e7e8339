"""The updates of adapters from folders and models, ours and PEFT's: read, refused, and compared with dense float64."""

import copy
import json
import math
import subprocess
import sys
import warnings
from unittest import mock

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import build, injected, peft_model
from torch import nn

import lora_fast
from lora_fast import (
    LoraConfig,
    LoraFastError,
    LoraFastWarning,
    adapter_factors,
    adapter_spectra,
    amplification_factor,
    apply_lora,
    base_weights,
    intruder_dimensions,
    load_adapter,
    save_adapter,
    subspace_similarity,
    svd,
)

PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
PATTERNS = {
    "r": 4,
    "lora_alpha": 12,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "rank_pattern": {"layers.1.self_attn.q_proj": 7, "down_proj": 3},
    "alpha_pattern": {"v_proj": 5},
    "use_rslora": True,
    "init_lora_weights": False,
}


def dense(factors):
    """{layer: ΔW (N, K)} in float64."""
    return {name: scaling * (b.double() @ a.double()) for name, a, b, scaling in factors}


def assert_spectra_are(spectra, updates):
    assert list(spectra) == list(updates)
    for name, delta in updates.items():
        found, exact = spectra[name], torch.linalg.svdvals(delta.double())
        count = len(found.singular_values)
        assert count == min(found.rank, *delta.shape)
        assert (found.singular_values - exact[:count]).abs().max() <= 1e-12 * exact[0]
        assert found.frobenius_norm == pytest.approx(float(torch.linalg.matrix_norm(delta.double())), rel=1e-12)
        assert (found.name, found.shape, found.method) == (name, tuple(delta.shape), "factors")
        assert found.certificate < 1e-9


def edit(folder, change=None, **config):
    """Changes the tensors and the config of an adapter folder."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if change is not None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def refused(function, *arguments, said, **options):
    """The call raises a LoraFastError of one line, whose end is all of `said`."""
    with pytest.raises(LoraFastError) as error:
        function(*arguments, **options)
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(said), text


@pytest.fixture
def saved(tmp_path):
    save_adapter(injected(lora={"r": 4, "lora_alpha": 6}), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def small_panels(monkeypatch):
    """Panels of a few rows, so that every small weight takes several."""
    monkeypatch.setattr(base_weights, "_PANEL_BYTES", 8 * 32 * 5)


# ---- Where updates come from -----------------------------------------------------------------------------------------


def test_a_folder_that_peft_wrote_gives_pefts_updates(tmp_path):
    """Ranks and alphas of their own per layer, and rsLoRA: get_delta_weight is PEFT's word on what is added."""
    torch.manual_seed(1)
    model = peft_model(build("llama"), **PATTERNS)
    model.save_pretrained(tmp_path)
    layers = {
        name.removeprefix(PREFIX): m for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)
    }
    updates = {name: layer.get_delta_weight("default") for name, layer in layers.items()}
    for adapter in (tmp_path, str(tmp_path), model, nn.DataParallel(model)):
        factors = {f.name: f for f in adapter_factors(adapter)}
        assert factors.keys() == layers.keys()
        for name, layer in layers.items():
            assert torch.equal(factors[name].lora_A, layer.lora_A["default"].weight)
            assert torch.equal(factors[name].lora_B, layer.lora_B["default"].weight)
            assert factors[name].scaling == layer.scaling["default"]
            assert not factors[name].lora_A.requires_grad
        exact = dense(factors.values())
        for name, delta in updates.items():
            assert torch.allclose(exact[name].float(), delta, rtol=1e-5, atol=1e-6)
        assert_spectra_are(adapter_spectra(adapter), exact)
    ranks = {name: found.rank for name, found in adapter_spectra(tmp_path).items()}
    assert ranks["model.layers.1.self_attn.q_proj"] == 7
    assert ranks["model.layers.0.self_attn.q_proj"] == 4
    assert ranks["model.layers.1.mlp.down_proj"] == 3


def test_a_model_of_ours_and_its_folder_give_the_same(tmp_path):
    model = injected(lora=PATTERNS)
    apply_lora(model, LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False), adapter_name="second")
    assert [f.name.rpartition(".")[2] for f in adapter_factors(model)] == ["k_proj", "k_proj"]
    lora_fast.set_adapter(model, "default")
    save_adapter(model, tmp_path / "adapter")
    ours, file = ({f.name: f for f in adapter_factors(source)} for source in (model, tmp_path / "adapter"))
    assert ours.keys() == file.keys()
    for name, found in ours.items():
        assert torch.equal(found.lora_A, file[name].lora_A)
        assert torch.equal(found.lora_B, file[name].lora_B)
        assert found.scaling == file[name].scaling
    assert_spectra_are(adapter_spectra(model), dense(adapter_factors(model)))


def test_layers_come_in_counting_order(tmp_path):
    save_adapter(injected(num_hidden_layers=11, lora={"target_modules": ["v_proj"]}), tmp_path / "adapter")
    assert list(adapter_spectra(tmp_path / "adapter")) == [f"model.layers.{n}.self_attn.v_proj" for n in range(11)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_factors_keep_the_dtype_that_they_are_stored_in(saved, dtype):
    edit(saved, lambda tensors: tensors.update({key: value.to(dtype) for key, value in tensors.items()}))
    factors = adapter_factors(saved)
    assert {f.lora_A.dtype for f in factors} == {f.lora_B.dtype for f in factors} == {dtype}
    spectra = adapter_spectra(saved)
    assert_spectra_are(spectra, dense(factors))
    assert {found.storage_dtype for found in spectra.values()} == {dtype}
    for coarse in ("lora_A", "lora_B"):  # the coarser of two decides
        edit(saved, lambda t: t.update({k: v.to(torch.bfloat16 if coarse in k else dtype) for k, v in t.items()}))  # noqa: B023
        assert {found.storage_dtype for found in adapter_spectra(saved).values()} == {torch.bfloat16}


def test_an_adapter_that_was_never_trained_is_zero(tmp_path):
    save_adapter(apply_lora(build("llama"), LoraConfig(r=4)), tmp_path / "adapter")
    for found in adapter_spectra(tmp_path / "adapter").values():
        assert torch.equal(found.singular_values, torch.zeros(4, dtype=torch.float64))
        assert found.is_zero


class ConvAndEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(23, 9)
        self.conv1 = nn.Conv2d(3, 10, (3, 5))
        self.conv2 = nn.Conv1d(4, 6, 3)

    def forward(self, x):
        return x


def test_convolutions_and_embeddings(tmp_path):
    torch.manual_seed(2)
    base = ConvAndEmbedding()
    kept = {name: value.clone() for name, value in base.state_dict().items()}
    model = peft_model(base, r=3, lora_alpha=5, target_modules=["embed", "conv1", "conv2"], init_lora_weights=False)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    updates = {}
    for name in ("embed", "conv1", "conv2"):
        delta = getattr(model.base_model.model, name).get_delta_weight("default").detach()
        updates[name] = delta.T if name == "embed" else delta.flatten(1)
    save_file(kept, tmp_path / "base.safetensors")
    for adapter in (tmp_path / "adapter", model):
        factors = dense(adapter_factors(adapter))
        spectra = adapter_spectra(adapter, base=tmp_path / "base.safetensors")
        assert_spectra_are(spectra, {name: factors[name] for name in spectra})
        for name, delta in updates.items():
            assert torch.allclose(factors[name].float(), delta, rtol=1e-5, atol=1e-6)
            assert spectra[name].weight_norm == pytest.approx(float(kept[f"{name}.weight"].double().norm()), rel=1e-14)
        assert spectra["conv1"].shape == (10, 45)
        assert spectra["embed"].shape == (9, 23)


def test_weights_trained_in_full_are_left_out_and_named(tmp_path):
    torch.manual_seed(3)
    model = peft_model(
        build("roberta"), r=3, target_modules=["query"], modules_to_save=["classifier"], bias="lora_only"
    )
    model.save_pretrained(tmp_path)
    for adapter in (tmp_path, model, load_adapter(build("roberta"), tmp_path)):
        with pytest.warns(
            LoraFastWarning, match=r"it also trains .*classifier.* in full; that is no product of factors"
        ):
            spectra = adapter_spectra(adapter)
        assert {found.kind for found in spectra.values()} == {"query"}
        with warnings.catch_warnings():
            warnings.simplefilter("error", LoraFastWarning)
            assert len(adapter_factors(adapter)) == len(spectra)


def test_a_copy_of_an_embedding_that_peft_saves_along_is_not_called_trained(tmp_path):
    model = peft_model(build("llama"), r=3, target_modules=["q_proj", "embed_tokens"])
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any(
        key.endswith("embed_tokens.base_layer.weight") for key in load_file(tmp_path / "adapter_model.safetensors")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoraFastWarning)
        assert {found.kind for found in adapter_spectra(tmp_path).values()} == {"q_proj", "embed_tokens"}


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_on_the_base_weights_is_said_and_a_model_of_ours_knows_it(tmp_path, init):
    original = build("llama").state_dict()
    model = apply_lora(build("llama"), LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=init))
    with torch.no_grad():
        for parameter in lora_fast.lora_parameters(model):
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    save_adapter(model, tmp_path / "adapter")
    said = f"init_lora_weights='{init}' took something off the base weights at the start"
    with pytest.warns(LoraFastWarning, match=said):
        file = adapter_spectra(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoraFastWarning)
        whole = adapter_spectra(model)
    change = {}
    for name, layer in lora_fast.injection.lora_layers(model).items():
        change[name] = layer.merged_weight() - original[f"{name}.weight"]
        exact = torch.linalg.svdvals(change[name].double())[:6]
        assert whole[name].rank == 6
        assert (whole[name].singular_values - exact).abs().max() <= 1e-4 * exact[0]
        assert file[name].rank == 3
        assert file[name].frobenius_norm > 2 * whole[name].frobenius_norm  # W's own top singular values are in it
    theirs = peft_model(build("llama"), r=3, target_modules=["q_proj"], init_lora_weights=init)
    with pytest.warns(LoraFastWarning, match=said):
        adapter_spectra(theirs)


def test_progress_is_told_of_matrices(saved):
    told = []
    spectra = adapter_spectra(saved, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (len(spectra), len(spectra))


def test_reading_a_folder_needs_neither_peft_nor_transformers(saved):
    code = (
        "import sys, lora_fast\n"
        f"assert lora_fast.adapter_spectra({str(saved)!r})\n"
        "assert callable(lora_fast.adapter_spectra), 'a module of that name hides the function'\n"
        "assert not {'peft', 'transformers'} & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=saved)
    assert done.returncode == 0, done.stderr


# ---- Bad input -------------------------------------------------------------------------------------------------------


def test_what_is_no_adapter(tmp_path, saved):
    for function in (adapter_factors, adapter_spectra):
        refused(
            function,
            tmp_path / "none",
            said="none is not a folder; expected one with adapter_config.json and adapter_model.safetensors",
        )
        refused(function, tmp_path, said=f"{tmp_path} holds no adapter_config.json")
        refused(function, 7, said="adapter is a int; expected a PEFT folder, or a model that carries an adapter")
        refused(
            function,
            build("llama"),
            said="LlamaForCausalLM carries no lora-fast adapter; call apply_lora or load_adapter on it first",
        )
    edit(
        saved,
        lambda tensors: [tensors.pop(key) for key in list(tensors)] and tensors.update({PREFIX + "x": torch.ones(1)}),
    )
    refused(adapter_spectra, saved, said="holds no lora_A and lora_B; expected the weights of a LoRA adapter")


@pytest.mark.parametrize(("kept", "gone"), [("lora_A", "lora_B"), ("lora_B", "lora_A")])
def test_a_factor_without_the_other(saved, kept, gone):
    edit(saved, lambda tensors: tensors.pop(f"{PREFIX}{Q}.{gone}.weight"))
    for function in (adapter_factors, adapter_spectra):
        refused(
            function,
            saved,
            said=f"adapter_model.safetensors: {Q} has {kept} and no {gone}; the file is incomplete",
        )


def test_ranks_that_differ(saved):
    key = f"{PREFIX}{Q}.lora_A.weight"
    edit(saved, lambda tensors: tensors.update({key: tensors[key][:3].clone()}))
    for function in (adapter_factors, adapter_spectra):
        refused(
            function,
            saved,
            said=f"the ranks of {Q} differ: lora_A is (3, 32), of rank 3, lora_B is (32, 4), of rank 4",
        )


def test_a_rank_that_the_config_does_not_have(saved):
    edit(saved, rank_pattern={Q: 8})
    refused(
        adapter_spectra,
        saved,
        said=f"{Q} has rank 4, adapter_config.json gives it 8 (r, rank_pattern): its scaling can't be known; correct "
        "the config",
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_nan_and_inf_name_the_layer(saved, value, factor):
    key = f"{PREFIX}{Q}.{factor}.weight"
    base = build("llama")
    edit(saved, lambda tensors: tensors[key].view(-1)[5:6].fill_(value))
    diverged = "holds NaN or inf; the training run that wrote it diverged"
    refused(adapter_factors, saved, said=f"{key} {diverged}")
    refused(adapter_spectra, saved, said=f"adapter_model.safetensors: {Q} {diverged}")
    refused(subspace_similarity, saved, saved, said=f"{Q} {diverged}")
    refused(subspace_similarity, saved, saved, of="factor", said=f"{Q} {diverged}")
    refused(amplification_factor, saved, base, said=f"{Q} {diverged}")
    refused(intruder_dimensions, saved, base, said=f"{Q} {diverged}")
    model = injected()
    with torch.no_grad():
        model.get_submodule(Q).get_submodule(f"{factor}.default").weight[1, 2] = value
    for function in (adapter_factors, adapter_spectra):
        refused(function, model, said=f"adapter 'default' of this LlamaForCausalLM: {Q} {diverged}")


def test_dora_and_other_methods_are_refused_by_name(tmp_path, saved):
    not_factors = "update is not scaling · lora_B lora_A, use PEFT for it"
    dora = peft_model(build("llama"), target_modules=["q_proj"], use_dora=True)
    dora.save_pretrained(tmp_path / "dora")
    refused(
        adapter_spectra,
        dora,
        said=f"{Q} is a LoRA variant (DoraLinearVariant, DoRA); its {not_factors}",
    )
    compare = "compare the two (delta_spectra, or lora-fast svd --base BASE --tuned MERGED)"
    refused(adapter_spectra, tmp_path / "dora", said=compare)
    refused(adapter_spectra, injected(lora={"use_dora": True}), said=compare)
    edit(tmp_path / "dora", use_dora=False)  # its magnitudes are still there
    refused(
        adapter_spectra,
        tmp_path / "dora",
        said=f"{Q} has a lora_magnitude_vector, so it is DoRA; its {not_factors}",
    )
    loha = peft.get_peft_model(build("llama"), peft.LoHaConfig(target_modules=["q_proj"]))
    loha.save_pretrained(tmp_path / "loha")
    refused(
        adapter_spectra,
        loha,
        said=f"{Q} is a peft.tuners.loha.layer.Linear; expected plain LoRA, whose update is scaling · lora_B lora_A",
    )
    refused(adapter_spectra, tmp_path / "loha", said="peft_type='LOHA'; only 'LORA' adapters can be loaded")
    biased = peft_model(build("gpt2"), target_modules=["c_attn"], lora_bias=True, fan_in_fan_out=True)
    refused(
        adapter_spectra,
        biased,
        said=f"transformer.h.0.attn.c_attn is a LoRA variant (lora_bias); its {not_factors}",
    )


def test_which_of_several_adapters(saved):
    model = peft_model(build("llama"), target_modules=["q_proj"], init_lora_weights=False)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    assert {found.kind for found in adapter_spectra(model).values()} == {"q_proj"}
    model.set_adapter("second")
    assert {(found.kind, found.rank) for found in adapter_spectra(model).values()} == {("v_proj", 2)}
    model.add_adapter("third", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    model.base_model.set_adapter(["second", "third"])
    refused(
        adapter_spectra,
        model,
        said="2 adapters are active on model.layers.0.self_attn.v_proj (second, third); set_adapter to one",
    )


# ---- Base weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weight_norms_from_a_model_a_file_a_folder_and_shards(tmp_path, family, small_panels):
    model = build(family)
    kinds = ["q_proj", "down_proj"] if family == "llama" else ["c_attn", "c_proj"]
    save_adapter(
        injected(family, lora={"target_modules": kinds, "fan_in_fan_out": family == "gpt2"}), tmp_path / "adapter"
    )
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    adapted = peft_model(build(family), target_modules=kinds, fan_in_fan_out=family == "gpt2")
    for base in (
        *(model, adapted, load_adapter(build(family), tmp_path / "adapter")),
        *(tmp_path / "whole", tmp_path / "whole" / "model.safetensors", str(tmp_path / "shards")),
    ):
        spectra = adapter_spectra(tmp_path / "adapter", base=base)
        assert {found.kind for found in spectra.values()} == set(kinds)
        for name, found in spectra.items():
            exact = float(model.get_submodule(name).weight.detach().double().norm())
            assert found.weight_norm == pytest.approx(exact, rel=1e-14)
            assert found.relative_size == pytest.approx(found.frobenius_norm / exact, rel=1e-14)
    shapes = {found.kind: found.shape for found in spectra.values()}
    assert shapes[kinds[0]] == ((32, 32) if family == "llama" else (96, 32))
    assert family == "gpt2" or shapes["down_proj"] == (32, 44)


def test_weights_are_found_beneath_another_prefix_and_never_guessed(tmp_path, saved):
    weights = {name: value.contiguous() for name, value in build("llama").state_dict().items()}
    expected = {name: found.weight_norm for name, found in adapter_spectra(saved, base=build("llama")).items()}
    file = tmp_path / "renamed.safetensors"
    for change in (lambda name: f"text.{name}", lambda name: name.removeprefix("model.")):
        save_file({change(name): value.clone() for name, value in weights.items()}, file)
        assert {n: f.weight_norm for n, f in adapter_spectra(saved, base=file).items()} == expected
    both = {f"{tower}.{name}": value.clone() for name, value in weights.items() for tower in ("left", "right")}
    save_file(both, file)
    with pytest.raises(
        LoraFastError, match=r"renamed\.safetensors' holds no model\.layers\.0\.mlp.* and 11 more; is this"
    ):
        adapter_spectra(saved, base=file)


def test_a_base_that_does_not_fit(tmp_path, saved):
    refused(
        adapter_spectra,
        saved,
        base=build("llama", hidden_size=16, head_dim=8),
        said="is this the base that the adapter was trained on?",
    )
    refused(
        adapter_spectra,
        saved,
        base=tmp_path / "nothing",
        said="nothing' doesn't exist; expected a .safetensors file or a folder with model.safetensors or "
        "model.safetensors.index.json. One on the hub is fetched first: hf download NAME --local-dir FOLDER",
    )
    build("llama").save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:50])
    with pytest.raises(LoraFastError, match=f"{shards[0].name} can't be read"):
        adapter_spectra(saved, base=tmp_path / "shards")
    shards[0].unlink()
    refused(
        adapter_spectra,
        saved,
        base=tmp_path / "shards",
        said=f"shards lacks {shards[0].name}, which model.safetensors.index.json lists (1 of {len(shards)} shards); "
        "download the checkpoint to its end",
    )
    (tmp_path / "shards" / "model.safetensors.index.json").write_text("{}")
    refused(
        adapter_spectra,
        saved,
        base=tmp_path / "shards",
        said="index.json is not an index of shards (KeyError('weight_map')); copy it anew",
    )
    for dtype, name in ((torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")):
        quantized = {key: (100 * value).to(dtype) for key, value in build("llama").state_dict().items()}
        save_file(quantized, tmp_path / "quantized.safetensors")
        with pytest.raises(LoraFastError, match=f"is {name}; expected the base before it was quantized"):
            adapter_spectra(saved, base=tmp_path / "quantized.safetensors")


# ---- Subspaces -------------------------------------------------------------------------------------------------------


def similarity(U, V):
    """φ of the paper's equation (4), one pair (i, j) at a time."""
    grid = torch.empty(U.shape[1], V.shape[1], dtype=torch.float64)
    for i in range(1, U.shape[1] + 1):
        for j in range(1, V.shape[1] + 1):
            grid[i - 1, j - 1] = torch.linalg.matrix_norm(U[:, :i].T @ V[:, :j]) ** 2 / min(i, j)
    return grid


@pytest.fixture
def two(tmp_path):
    """Two adapters of different ranks on the same base, which share directions, and some layers of each alone."""
    one = injected(seed=5, lora={"r": 5, "target_modules": ["q_proj", "v_proj", "up_proj"]})
    other = injected(seed=6, lora={"r": 8, "lora_alpha": 40, "target_modules": ["q_proj", "up_proj", "down_proj"]})
    with torch.no_grad():
        for name in ("self_attn.q_proj", "mlp.up_proj"):
            mine, theirs = (model.get_submodule(f"model.layers.0.{name}") for model in (one, other))
            theirs.lora_A["default"].weight[:3] += 2 * mine.lora_A["default"].weight[1:4]
            theirs.lora_B["default"].weight[:, :3] += 2 * mine.lora_B["default"].weight[:, 1:4]
    save_adapter(other, tmp_path / "other")
    return one, tmp_path / "other"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("of", ["update", "factor"])
def test_subspace_similarity_is_the_papers(two, side, of):
    found = subspace_similarity(*two, side=side, of=of)
    factors = [{f.name: f for f in adapter_factors(adapter)} for adapter in two]
    assert list(found) == [name for name in factors[0] if name in factors[1]]
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "up_proj"}
    for name, grid in found.items():
        bases = []
        for rank, one in zip((5, 8), (factors[0][name], factors[1][name])):
            a, b = one.lora_A.double(), one.lora_B.double()
            matrix = b @ a if of == "update" else a if side == "right" else b
            u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
            bases.append((vh.T if side == "right" else u)[:, :rank])
        exact = similarity(*bases)
        assert (grid - exact).abs().max() < 1e-9
        assert grid.min() >= 0
        assert grid.max() <= 1 + 1e-9
        assert grid.max() > 1.5 * grid.min()
        cut = subspace_similarity(*two, 3, 2, side=side, of=of)[name]
        assert cut.shape == (3, 2)
        assert (cut - grid[:3, :2]).abs().max() < 1e-14


def test_subspaces_of_one_adapter_and_of_a_zero_update(two):
    (grid, *_) = subspace_similarity(two[0], two[0]).values()
    assert (grid.diagonal() - 1).abs().max() < 1e-12
    zero = apply_lora(build("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    for grid in subspace_similarity(two[0], zero).values():
        assert torch.equal(grid, torch.zeros(5, 2, dtype=torch.float64))


def test_subspaces_that_can_not_be_compared(two, tmp_path):
    refused(subspace_similarity, *two, side="top", said="side='top'; expected 'left' or 'right'")
    refused(subspace_similarity, *two, of="weight", said="of='weight'; expected 'update' or 'factor'")
    refused(subspace_similarity, *two, 0, said="i=0; expected a whole number of at least 1")
    refused(subspace_similarity, *two, 1, 2.0, said="j=2.0; expected a whole number of at least 1")
    alone = injected(lora={"target_modules": ["k_proj"]})
    refused(
        subspace_similarity,
        two[0],
        alone,
        said="the second model.layers.0.self_attn.k_proj, model.layers.1.self_attn.k_proj",
    )
    narrow = injected(hidden_size=16, head_dim=8, lora={"target_modules": ["q_proj"]})
    refused(
        subspace_similarity,
        two[0],
        narrow,
        said=f"{Q}: the right singular vectors of one have 32 elements, of two 16; compare adapters of one base model",
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("r", [None, 1, 3])
def test_amplification_factor_is_the_papers(family, r, small_panels):
    kinds = ["q_proj", "down_proj", "up_proj"] if family == "llama" else ["c_attn", "mlp.c_proj", "attn.c_proj"]
    lora = {"r": 4, "target_modules": kinds, "fan_in_fan_out": family == "gpt2"}
    model = injected(family, lora=lora)
    updates = dense(adapter_factors(model))
    for base in (build(family), model):
        told = []
        found = amplification_factor(model, base, r, progress=lambda *counts, told=told: told.append(counts))
        assert found.keys() == updates.keys()
        assert told == [(done, len(updates)) for done in range(1, len(updates) + 1)]
        for name, delta in updates.items():
            W = build(family).get_submodule(name).weight.detach().double()
            W = W.T if family == "gpt2" else W
            U, _, Vh = torch.linalg.svd(delta)
            norm = torch.linalg.matrix_norm(U[:, : r or 4].T @ W @ Vh[: r or 4].T)
            assert found[name].projected_norm == pytest.approx(float(norm), rel=1e-9)
            assert found[name].update_norm == pytest.approx(float(torch.linalg.matrix_norm(delta)), rel=1e-12)
            assert found[name].factor == pytest.approx(float(torch.linalg.matrix_norm(delta) / norm), rel=1e-9)
            assert found[name].weight_norm == pytest.approx(float(torch.linalg.matrix_norm(W)), rel=1e-12)


def test_square_weights_of_gpt2_are_turned_whatever_the_adapter_comes_from(tmp_path):
    """Where N = K no shape tells that GPT-2 stores (K, N): the adapter does."""
    lora = {"r": 2, "target_modules": ["attn.c_proj"], "fan_in_fan_out": True, "init_lora_weights": False}
    torch.manual_seed(7)
    theirs = peft_model(build("gpt2"), **lora)
    theirs.save_pretrained(tmp_path)
    for adapter in (theirs, tmp_path, load_adapter(build("gpt2"), tmp_path)):
        (name, *_), (found, *_) = zip(*amplification_factor(adapter, build("gpt2")).items())
        delta = dense(adapter_factors(adapter))[name]
        W = build("gpt2").get_submodule(name).weight.detach().double().T
        assert W.shape == (32, 32)
        U, _, Vh = torch.linalg.svd(delta)
        norm = torch.linalg.matrix_norm(U[:, :2].T @ W @ Vh[:2].T)
        assert found.projected_norm == pytest.approx(float(norm), rel=1e-9)


def test_amplification_of_nothing(saved):
    zero = apply_lora(build("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    assert {found[:3] for found in amplification_factor(zero, build("llama")).values()} == {(None, 0.0, 0.0)}
    refused(amplification_factor, saved, build("llama"), 0, said="r=0; expected a whole number of at least 1")


def intruders(W, delta, k, threshold):
    """The definition, by two full SVDs."""
    U, s, _ = torch.linalg.svd(W, full_matrices=False)
    tuned, values, _ = torch.linalg.svd(W + delta, full_matrices=False)
    cosines = (U[:, s > 1e-9 * s[0]].T @ tuned[:, :k]).abs().amax(0)
    return int((cosines < threshold).sum()), cosines, values[:k]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("k", "threshold", "scale"), [(10, 0.5, 1.0), (4, 0.9, 1.0), (100, 0.7, 0.2), (3, 0.5, 1e-7)])
def test_intruder_dimensions_are_the_papers(family, k, threshold, scale, small_panels):
    """Weights that are wide, tall and square; a strong update and one that changes nothing."""
    kinds = ["q_proj", "down_proj", "up_proj"] if family == "llama" else ["c_attn", "mlp.c_proj", "attn.c_proj"]
    lora = {"r": 4, "lora_alpha": 4 * scale, "target_modules": kinds, "fan_in_fan_out": family == "gpt2"}
    model = injected(family, lora=lora)
    told = []
    found = intruder_dimensions(
        model, build(family), k, threshold, progress=lambda done, total: told.append((done, total))
    )
    counts = []
    for name, delta in dense(adapter_factors(model)).items():
        W = build(family).get_submodule(name).weight.detach().double()
        W = W.T if family == "gpt2" else W
        count, cosines, values = intruders(W, delta, k, threshold)
        assert found[name].count == count
        assert torch.allclose(torch.tensor(found[name].cosines, dtype=torch.float64), cosines, atol=1e-7)
        assert torch.allclose(torch.tensor(found[name].singular_values, dtype=torch.float64), values, rtol=1e-10)
        counts.append(count)
    assert told[-1] == (len(counts), len(counts))
    assert (max(counts) > 0) == (scale > 1e-3)


def test_a_direction_outside_the_base_weight_is_an_intruder():
    """Of a weight of low rank only the directions that it has can be met, whichever side is short."""
    for size in ((20, 30), (30, 20)):
        layer = nn.Linear(*size, bias=False)
        model = nn.Sequential(layer)
        N, K = size[::-1]
        with torch.no_grad():
            layer.weight.zero_()
            layer.weight[:3, :3] = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        base = nn.Sequential(nn.Linear(*size, bias=False))
        base.load_state_dict(model.state_dict())
        apply_lora(model, LoraConfig(r=1, lora_alpha=1, target_modules=["0"]))
        with torch.no_grad():
            model[0].lora_A["default"].weight.copy_(torch.eye(K)[9:10])
            model[0].lora_B["default"].weight.copy_(5 * torch.eye(N)[:, 7:8])
        (found,) = intruder_dimensions(model, base, 4).values()
        assert found.count == 1
        assert found.cosines == pytest.approx((0.0, 1.0, 1.0, 1.0), abs=1e-12)
        assert found.singular_values == pytest.approx((5.0, 3.0, 2.0, 1.0), rel=1e-12)


def test_wrong_arguments_of_intruder_dimensions(saved):
    base = build("llama")
    refused(intruder_dimensions, saved, base, 0, said="k=0; expected a whole number of at least 1")
    refused(intruder_dimensions, saved, base, 3, 1.5, said="threshold=1.5; expected a cosine in [0, 1]")


# ---- Stacked experts and other parameters ----------------------------------------------------------------------------

_MIXTURE = {
    **{"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8},
    **{"num_key_value_heads": 2, "num_experts_per_tok": 2},
}
# Transformers' class, its sizes, and the targets: those that PEFT finds by itself have no module's name in them.
# GPT-OSS stores (E, K, N), here as its 20B does with a down_proj that is square.
MIXTURES = {
    "qwen3_moe": (
        "Qwen3Moe",
        {"intermediate_size": 64, "moe_intermediate_size": 24, "num_experts": 6},
        {"target_modules": "all-linear"},
    ),
    "mixtral": ("Mixtral", {"intermediate_size": 20, "num_local_experts": 5}, {"target_modules": "all-linear"}),
    "gpt_oss": (
        "GptOss",
        {"intermediate_size": 32, "num_local_experts": 4},
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "router.weight"],
            "rank_pattern": {"down_proj": 3},
            "alpha_pattern": {"layers.1.mlp.router.weight": 5},
            "use_rslora": True,
        },
    ),
}
EXPERTS = "model.layers.0.mlp.experts"


def mixture(kind, **config):
    name, sizes, _ = MIXTURES[kind]
    torch.manual_seed(8)
    config = getattr(transformers, f"{name}Config")(**(_MIXTURE | sizes | config))
    return getattr(transformers, f"{name}ForCausalLM")(config)


def with_experts(kind, **lora):
    """Adapted by PEFT."""
    model = mixture(kind)
    torch.manual_seed(9)
    targets = MIXTURES[kind][2] if "target_parameters" not in lora else {}
    return peft_model(model, **({"r": 4, "lora_alpha": 8, "init_lora_weights": False} | targets | lora))


def matrices(model):
    """{name: (ΔW, W)} (N, K), float64, of all the matrices in parameters that PEFT adapted, by get_delta_weight."""
    found = {}
    for name, layer in copy.deepcopy(model).double().named_modules():
        if not isinstance(layer, peft.tuners.lora.layer.ParamWrapper):
            continue
        owner = name.removeprefix(PREFIX).replace(".base_layer", "")
        pair = layer.get_delta_weight("default").detach(), layer.get_param().detach()
        if pair[0].dim() == 2:
            found[f"{owner}.{layer.parameter_name}".removesuffix(".weight")] = pair
        elif getattr(layer.get_base_layer(), "is_transposed", False):
            pair = [matrix.mT for matrix in pair]
        if pair[0].dim() == 3:
            for expert, both in enumerate(zip(*pair)):
                found[f"{owner}.{layer.parameter_name}[{expert}]"] = both
    return found


def three_sources(model, base, folder):
    """What PEFT adapted, the folder that it writes, and that folder in a model of ours."""
    model.save_pretrained(folder)
    return model, folder, load_adapter(base, folder)


@pytest.mark.parametrize("kind", MIXTURES)
def test_every_expert_has_pefts_update(tmp_path, kind):
    model = with_experts(kind)
    exact = matrices(model)
    experts = {"qwen3_moe": 6, "mixtral": 5, "gpt_oss": 4}[kind]
    for leaf in ("gate_up_proj", "down_proj"):
        assert {f"model.layers.{i}.mlp.experts.{leaf}[{e}]" for i in (0, 1) for e in range(experts)} <= exact.keys()
    gate = f"model.layers.1.mlp.{'router' if kind == 'gpt_oss' else 'gate'}"
    assert gate in exact
    names = None
    for adapter in three_sources(model, mixture(kind), tmp_path):
        factors = {f.name: f for f in adapter_factors(adapter)}
        spectra = adapter_spectra(adapter)
        assert exact.keys() < factors.keys() == spectra.keys()
        assert names in (None, factors.keys())
        names = factors.keys()
        products = dense(factors.values())
        for name, (delta, _) in exact.items():
            assert (products[name] - delta).norm() <= 1e-14 * delta.norm()
            values = torch.linalg.svdvals(delta)
            found = spectra[name]
            assert (found.singular_values - values[: found.rank]).abs().max() <= 1e-9 * values[0]
            assert (found.shape, found.status) == (tuple(delta.shape), "ok")
        ranks = {"qwen3_moe": (4, 8), "mixtral": (4, 8), "gpt_oss": (3, 4)}[kind]
        assert spectra[f"{EXPERTS}.down_proj[1]"].rank == ranks[0]
        assert spectra[f"{EXPERTS}.gate_up_proj[1]"].rank == ranks[1]
        assert (spectra[f"{EXPERTS}.down_proj[1]"].kind, spectra[gate].kind) == (
            "experts.down_proj",
            gate.rpartition(".")[2],
        )
    updates = {name: delta for name, (delta, _) in exact.items()}
    grids = subspace_similarity(tmp_path, model, side="left")
    for name in (f"{EXPERTS}.down_proj[2]", gate):
        U = torch.linalg.svd(updates[name])[0][:, : grids[name].shape[0]]
        assert (grids[name] - similarity(U, U)).abs().max() < 1e-9


@pytest.mark.parametrize("kind", MIXTURES)
def test_every_expert_is_measured_against_its_own_weight(tmp_path, kind, small_panels):
    """On disk Qwen's and Mixtral's experts are linear layers, gate and up apart; GPT-OSS's are stacks."""
    model = with_experts(kind)
    exact = matrices(model)
    mixture(kind).save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    assert any(".experts.0." in key for key in stored) == (kind != "gpt_oss")
    for adapter in three_sources(model, mixture(kind), tmp_path / "adapter"):
        for base in (mixture(kind), model, tmp_path / "base"):
            spectra = adapter_spectra(adapter, base=base)
            amplified = amplification_factor(adapter, base)
            for name, (delta, W) in exact.items():
                assert spectra[name].weight_norm == pytest.approx(float(W.norm()), rel=1e-12)
                r = spectra[name].rank
                U, _, Vh = torch.linalg.svd(delta)
                norm = float(torch.linalg.matrix_norm(U[:, :r].T @ W @ Vh[:r].T))
                assert amplified[name].projected_norm == pytest.approx(norm, rel=1e-9)
        found = intruder_dimensions(adapter, tmp_path / "base", 6, 0.9)
        for name in (f"{EXPERTS}.gate_up_proj[0]", f"{EXPERTS}.down_proj[2]"):
            delta, W = exact[name]
            count, cosines, values = intruders(W, delta, 6, 0.9)
            assert (found[name].count, count > 0) == (count, True)
            assert torch.allclose(torch.tensor(found[name].cosines, dtype=torch.float64), cosines, atol=1e-7)
            assert torch.allclose(torch.tensor(found[name].singular_values, dtype=torch.float64), values, rtol=1e-10)


def test_experts_of_one_rank_are_computed_together(tmp_path):
    with_experts("qwen3_moe").save_pretrained(tmp_path)
    with mock.patch.object(svd, "_batch_svds", wraps=svd._batch_svds) as batches:
        spectra = adapter_spectra(tmp_path)
    assert sorted(len(call.args[0]) for call in batches.call_args_list) == [12, len(spectra) - 12]


@pytest.mark.parametrize(
    ("targets", "leaves"),
    [
        (["experts.down_proj"], {"down_proj"}),
        (["gate_up_proj"], {"gate_up_proj"}),
        ([f"{EXPERTS}.down_proj", "mlp.experts.gate_up_proj"], {"down_proj", "gate_up_proj"}),
        (["experts.gate_up_proj", "down_proj", "gate.weight"], {"down_proj", "gate_up_proj", "gate"}),
        (["gate.weight"], {"gate"}),
    ],
)
def test_a_folder_says_by_its_targets_which_parameters_it_has(tmp_path, targets, leaves):
    """Names with and without a module's, of one or several parameters of it; ranks by whole names."""
    model = mixture("qwen3_moe")
    ranks = {f"{EXPERTS}.down_proj": 2, "gate_up_proj": 5}
    lora = {"r": 3, "target_modules": ["q_proj"], "target_parameters": targets, "rank_pattern": ranks}
    torch.manual_seed(10)
    apply_lora(model, LoraConfig(**lora, init_lora_weights=False))
    save_adapter(model, tmp_path)
    ours, file = ({f.name: f for f in adapter_factors(source)} for source in (model, tmp_path))
    assert ours.keys() == file.keys()
    kinds = {adapter_spectra(tmp_path)[name].kind for name in file}
    assert {kind.removeprefix("experts.") for kind in kinds} == leaves | {"q_proj"}
    for name, found in ours.items():
        assert torch.equal(found.lora_A, file[name].lora_A)
        assert torch.equal(found.lora_B, file[name].lora_B)
        assert found.scaling == file[name].scaling


class Stacks(nn.Module):
    """Experts whose parameters' names say nothing of their order."""

    def __init__(self):
        super().__init__()
        self.second = nn.Parameter(torch.randn(3, 7, 9))
        self.first = nn.Parameter(torch.randn(3, 9, 7))
        self.single = nn.Parameter(torch.randn(1, 6, 5))

    def forward(self, x):
        return x


def test_what_a_folder_of_parameters_leaves_open(tmp_path):
    model = nn.Sequential(Stacks())
    targets = ["0.first", "0.second"]
    apply_lora(model, LoraConfig(r=2, target_modules=[], target_parameters=targets, init_lora_weights=False))
    save_adapter(model, tmp_path)
    said = (
        f"it can't be known from target_parameters={targets} which parameters of 0 have its 2 pairs of factors; "
        "load_adapter the folder into its model and give that model"
    )
    refused(adapter_spectra, tmp_path, said=said)
    loaded = load_adapter(nn.Sequential(Stacks()), tmp_path)
    shapes = {name: found.shape for name, found in adapter_spectra(loaded).items()}
    assert shapes == {
        f"0.{leaf}[{e}]": size for leaf, size in (("second", (7, 9)), ("first", (9, 7))) for e in range(3)
    }
    with_experts("qwen3_moe", target_modules=[], target_parameters=["experts.down_proj"]).save_pretrained(tmp_path)
    edit(tmp_path, target_parameters=["down_proj", "gate_up_proj"])
    with pytest.raises(LoraFastError, match=r"which parameters of model\.layers\.0\.mlp\.experts have its 1 pairs of"):
        adapter_factors(tmp_path)


def test_a_stack_of_one_expert_is_a_matrix(tmp_path):
    base = nn.Sequential(Stacks())
    model = copy.deepcopy(base)
    apply_lora(model, LoraConfig(r=2, target_modules=[], target_parameters=["0.single"], init_lora_weights=False))
    save_adapter(model, tmp_path / "adapter")
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    for adapter in (model, tmp_path / "adapter"):
        for weights in (base, tmp_path / "base.safetensors"):
            (found,) = adapter_spectra(adapter, base=weights).values()
            assert (found.name, found.shape) == ("0.single", (6, 5))
            assert found.weight_norm == pytest.approx(float(base[0].single.detach().double().norm()), rel=1e-12)


def test_a_convolution_with_one_channel_out_is_no_stack():
    base = nn.Sequential(nn.Conv1d(4, 1, 3))
    model = peft_model(copy.deepcopy(base), r=1, target_modules=["0"], init_lora_weights=False)
    (found,) = adapter_spectra(model, base=base).values()
    assert found.shape == (1, 12)
    assert found.weight_norm == pytest.approx(float(base[0].weight.detach().double().norm()), rel=1e-12)


def test_ranks_of_parameters_that_the_config_does_not_have(tmp_path):
    with_experts("qwen3_moe").save_pretrained(tmp_path)
    edit(tmp_path, rank_pattern={})
    refused(
        adapter_spectra,
        tmp_path,
        said="by the ranks in adapter_config.json (r, rank_pattern) model.layers.0.mlp.experts.down_proj has 6 experts "
        "and model.layers.0.mlp.experts.gate_up_proj 12; correct the config",
    )
    edit(tmp_path, rank_pattern={"down_proj": 5})
    refused(
        adapter_spectra,
        tmp_path,
        said=f"lora_A of {EXPERTS}.down_proj has 24 rows, no multiple of the rank 5 that adapter_config.json gives it "
        "(r, rank_pattern): the number of experts can't be known; correct the config",
    )


def test_factors_in_each_others_place_are_refused(tmp_path):
    with_experts("qwen3_moe").save_pretrained(tmp_path)

    def exchange(tensors):
        for factor in "AB":
            keys = [f"{PREFIX}{EXPERTS}{inner}.lora_{factor}.weight" for inner in ("", ".base_layer")]
            tensors[keys[0]], tensors[keys[1]] = tensors[keys[1]], tensors[keys[0]]

    edit(tmp_path, exchange, rank_pattern={".*down_proj": 8})
    with pytest.raises(LoraFastError, match=r"which parameters of model\.layers\.0\.mlp\.experts have its 2 pairs of"):
        adapter_spectra(tmp_path)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_a_base_of_another_number_of_experts(tmp_path, kind):
    with_experts(kind).save_pretrained(tmp_path / "adapter")
    key = "num_experts" if kind == "qwen3_moe" else "num_local_experts"
    more = mixture(kind, **{key: MIXTURES[kind][1][key] + 1})
    more.save_pretrained(tmp_path / "base")
    for base in (more, tmp_path / "base"):
        with pytest.raises(
            LoraFastError, match=r"but the adapter has updates of \d experts of model\.layers\.0\.mlp\.exp"
        ):
            adapter_spectra(tmp_path / "adapter", base=base)
    rest = {name: value.detach() for name, value in mixture(kind).named_parameters() if ".experts." not in name}
    save_file(rest, tmp_path / "rest.safetensors")
    with pytest.raises(
        LoraFastError, match=r"rest\.safetensors' holds no model\.layers\.0\.mlp\.experts\.down_proj, model"
    ):
        adapter_spectra(tmp_path / "adapter", base=tmp_path / "rest.safetensors")


def test_which_way_square_stacks_lie(tmp_path):
    """A folder doesn't say. Of gate_up_proj and down_proj the one that is not square does; of others the model."""
    turned = mixture("gpt_oss")
    straight = mixture("qwen3_moe", moe_intermediate_size=32)
    halved = mixture("qwen3_moe", moe_intermediate_size=16)  # gate_up_proj is square
    for model, leaf in ((turned, "down_proj"), (straight, "down_proj"), (halved, "gate_up_proj")):
        base = tmp_path / "base.safetensors"
        save_file({name: value.detach() for name, value in model.named_parameters()}, base)
        adapted = copy.deepcopy(model)
        lora = {"r": 2, "target_modules": [], "target_parameters": [f"experts.{leaf}"], "init_lora_weights": False}
        apply_lora(adapted, LoraConfig(**lora))
        save_adapter(adapted, tmp_path / "adapter")
        expected = amplification_factor(adapted, model)
        W = model.get_submodule(EXPERTS)._parameters[leaf].detach().double()
        for name, both in list(expected.items())[:3]:
            delta = dense(adapter_factors(adapted))[name]
            U, _, Vh = torch.linalg.svd(delta)
            weight = W[int(name[-2])].mT if model is turned else W[int(name[-2])]
            norm = torch.linalg.matrix_norm(U[:, :2].T @ weight @ Vh[:2].T)
            assert both.projected_norm == pytest.approx(float(norm), rel=1e-9)
        for adapter in (adapted, tmp_path / "adapter"):
            for weights in (model, base):
                for name, found in amplification_factor(adapter, weights).items():
                    assert found == pytest.approx(expected[name], rel=1e-9)
    alone = {name: value for name, value in load_file(base).items() if "down_proj" not in name}
    save_file(alone, base)
    refused(
        amplification_factor,
        tmp_path / "adapter",
        base,
        said=f"{EXPERTS}.gate_up_proj stacks square matrices, and neither the adapter's folder nor the checkpoint "
        "tells whether they are (N, K) or (K, N); load_adapter the folder into its model and give that model for the "
        "folder",
    )
    assert amplification_factor(adapted, base)[f"{EXPERTS}.gate_up_proj[0]"] == expected[f"{EXPERTS}.gate_up_proj[0]"]
