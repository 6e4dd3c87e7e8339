"""LoRA on embeddings: against float64, against PEFT, through its files, and what is refused."""

import copy
import io
import pickle
import warnings

import accelerate
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support import (
    CAUSAL_LM,
    FAMILIES,
    TOKENS,
    adapted,
    assert_unchanged,
    build,
    injected,
    logits,
    pair,
    peft_model,
    snapshot,
    trainable,
)
from torch import nn

import lora_fast
from lora_fast import LoraConfig, LoraFastError, LoraFastWarning, apply_lora, load_adapter, merge_lora, remove_lora
from lora_fast.fusion import calls_by_path

EPS = torch.finfo(torch.float32).eps
TARGETS = {
    "llama": ["embed_tokens", "q_proj"],
    "gpt2": ["wte", "wpe", "c_attn"],
    "gemma3": ["embed_tokens", "q_proj"],  # scales what it looks up
    "bert": ["word_embeddings", "token_type_embeddings", "query"],
    "opt": ["embed_tokens", "embed_positions", "q_proj"],  # the positions are computed in the embedding's forward
}
UNTIED = {family: {} if family == "bert" else {"tie_word_embeddings": False} for family in TARGETS}


class Scaled(nn.Embedding):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.register_buffer("embed_scale", torch.tensor(5.5))

    def forward(self, input_ids):
        return super().forward(input_ids) * self.embed_scale


def error(found, exact):
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def plain(parameters):
    """{name: parameter} with PEFT's names for an embedding's factors as ours."""
    return {n.replace("lora_embedding_A", "lora_A.weight").replace("lora_embedding_B", "lora_B.weight"): p
            for n, p in parameters.items()}  # fmt: skip


def single(kind=nn.Embedding, dtype=torch.float32, adapter_dtype=torch.float32, **options):
    """An embedding of 17 words with an adapter of rank 3 and scaling 2, its factors, and W + ΔW in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(kind(17, 6, **options)).to(dtype)
    with torch.no_grad():
        model[0].weight += 0.1  # the row of padding_idx starts at zero
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    apply_lora(model, config, adapter_dtype=adapter_dtype)
    a, b = lora_fast.lora_parameters(model)
    return model, a, b, model[0].weight.double() + 2 * (b.double() @ a.double()).t()


IDS = {
    "scalar": torch.tensor(5),
    "none": torch.zeros(2, 0, 3, dtype=torch.long),
    "repeated": torch.tensor([4, 4, 4, 0, 16, 2, 2]),
    "int32": torch.tensor([[2, 3, 16], [7, 3, 3]], dtype=torch.int32),
    "transposed": torch.arange(12).view(3, 4).t().unsqueeze(1),
}
OPTIONS = ({}, {"padding_idx": 2}, {"padding_idx": -15, "scale_grad_by_freq": True}, {"sparse": True})


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_a_lookup_is_exact(kind, options, ids):
    model, a, b, exact = single(kind, **options)
    scale = 5.5 if kind is Scaled else 1.0
    y = model(ids)
    assert y.shape == (*ids.shape, 6)
    torch.testing.assert_close(y.double(), scale * exact[ids.long()], rtol=8 * EPS, atol=8 * EPS * scale)
    dy = torch.randn(y.shape)
    y.backward(dy)
    rows, dy = ids.long().flatten(), 2 * scale * dy.double().reshape(-1, 6)
    times = torch.bincount(rows, minlength=17)[rows] if "scale_grad_by_freq" in options else torch.ones(len(rows))
    trained = rows != (-1 if model[0].padding_idx is None else model[0].padding_idx)
    ds = (dy @ b.double()) * (trained / times)[:, None]
    dA = torch.zeros(17, 3, dtype=torch.float64).index_add_(0, rows, ds).t()
    torch.testing.assert_close(a.grad.double(), dA, rtol=64 * EPS, atol=64 * EPS * scale)
    torch.testing.assert_close(b.grad.double(), dy.t() @ a.double().t()[rows], rtol=64 * EPS, atol=64 * EPS * scale)
    assert len(rows) == 0 or b.grad.abs().max() > 0
    assert model[0].weight.grad is None and calls_by_path(model) == {("lora_embedding", None): 1}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_exact_as_peft(dtype, autocast):
    model, a, b, exact = single(dtype=dtype)
    lora = {"r": 3, "lora_alpha": 6, "target_modules": ["0"]}
    theirs = peft_model(nn.Sequential(nn.Embedding(17, 6, _weight=model[0].weight.detach().clone())), **lora)
    factors = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for factor, value in zip(factors, (a, b)):
            factor.copy_(value)
    ids, dy = torch.randint(17, (4, 30)), torch.randn(4, 30, 6)
    dA = torch.zeros(17, 3, dtype=torch.float64).index_add_(
        0, ids.flatten(), 2 * (dy.double() @ b.double()).view(-1, 3)
    )
    values = exact[ids], dA.t(), 2 * dy.double().view(-1, 6).t() @ a.double().t()[ids.flatten()]
    results = []
    for run, (lora_A, lora_B) in ((model, (a, b)), (theirs, factors)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = run(ids)
        (y.float() * dy).sum().backward()
        results.append((y, lora_A.grad, lora_B.grad))
    for mine, yours, value in zip(*results, values):
        assert mine.dtype == yours.dtype
        assert error(mine, value) <= 2 * error(yours, value) + 4 * EPS
    assert dtype != torch.float32 or error(results[0][0], exact[ids]) <= 4 * EPS  # under autocast too


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_seed_gives_pefts_start(init, dtype):
    ours, theirs = pair("llama", {"target_modules": TARGETS["llama"], "init_lora_weights": init}, dtype=dtype)
    expected = plain(trainable(theirs))
    assert trainable(ours).keys() == expected.keys()
    for name, parameter in trainable(ours).items():
        assert torch.equal(parameter.float(), expected[name].float()), name
    assert ours.model.embed_tokens.lora_B["default"].weight.abs().max() > 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bert"])
@pytest.mark.parametrize("more", [{"bias": "all", "lora_dropout": 0.1}, {"use_rslora": True}])
def test_a_step_and_the_files_equal_pefts(family, more, tmp_path):
    targets = [name for name in TARGETS[family] if name != "wpe"]
    lora = {"r": 4, "target_modules": targets, "init_lora_weights": False, **more}
    lora |= {"rank_pattern": {targets[0]: 6}, "alpha_pattern": {targets[0]: 11}} if "use_rslora" in more else {}
    inputs, results = FAMILIES[family].inputs, []
    ours, theirs = pair(family, lora)
    assert adapted(ours) >= {name for name, m in ours.named_modules() if name.endswith(targets[0])} != set()
    for model in (ours, theirs):
        found = model.eval()(**inputs)
        found.loss.backward()
        results.append((found.logits.detach(), {n: p.grad for n, p in plain(trainable(model)).items()}))
    (y, gradients), (expected, theirs_gradients) = results
    assert error(y, expected) <= 16 * EPS and gradients.keys() == theirs_gradients.keys()
    for name, gradient in theirs_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=256 * EPS, atol=256 * EPS, msg=name)
    lora_fast.save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    config = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert config.fan_in_fan_out == (family == "gpt2") and set(config.target_modules) == set(targets)
    for folder in ("ours", "theirs"):
        assert error(logits(load_adapter(build(family), tmp_path / folder), inputs), y) <= 16 * EPS
    assert error(logits(peft.PeftModel.from_pretrained(build(family), tmp_path / "ours"), inputs), y) <= 16 * EPS


@pytest.mark.parametrize("tied", [False, True])
def test_files_of_an_embedding_and_its_head(tied, tmp_path):
    """PEFT saves the base weights of both along, under both names where they are one."""
    lora = {"r": 4, "target_modules": ["embed_tokens", "lm_head"], "init_lora_weights": False}
    ours, theirs = pair("llama", lora, tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path / "theirs")
    saved = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert sum(key.endswith(".base_layer.weight") for key in saved) == 2
    loaded = load_adapter(build("llama", tie_word_embeddings=tied), tmp_path / "theirs")
    assert torch.equal(logits(loaded), logits(ours))
    if tied:
        before = snapshot(ours)
        with pytest.raises(LoraFastError, match=r"model.embed_tokens.weight is tied to lm_head.weight"):
            merge_lora(ours)
        assert_unchanged(ours, before)


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_files_resized_merged_and_for_servers(family, tmp_path):
    """Spectra and the best approximation, of our model, PEFT's and their folders; sums of adapters."""
    targets = [TARGETS[family][0], TARGETS[family][-1]]
    lora = {"r": 4, "target_modules": targets, "init_lora_weights": False, "rank_pattern": {targets[0]: 6}}
    ours, theirs = pair(family, lora)
    lora_fast.save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    lora_fast.save_adapter(ours, tmp_path / "portable", portable=True)
    y, layer = logits(ours), ours.get_input_embeddings()
    name = next(name for name, module in ours.named_modules() if module is layer)
    delta = (layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()).t() * 8 / 6
    U, S, V = torch.linalg.svd(delta, full_matrices=False)
    for adapter in (ours, theirs, *(tmp_path / folder for folder in ("ours", "theirs", "portable"))):
        spectrum = lora_fast.adapter_spectra(adapter)[name]
        assert spectrum.shape == (32, 61)
        torch.testing.assert_close(spectrum.singular_values, S[:6], rtol=1e-6, atol=0)
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        lora_fast.resize_adapter(folder, tmp_path / "small", rank=2)
        small = load_adapter(build(family), tmp_path / "small").get_input_embeddings()
        assert error(small.delta_weight("default"), (U[:, :2] * S[:2]) @ V[:2]) <= 32 * EPS
        lora_fast.merge_adapters([folder, folder], [0.25, 0.5], tmp_path / "sum")
        both = load_adapter(build(family), tmp_path / "sum").get_input_embeddings()
        assert error(both.delta_weight("default"), 0.75 * delta) <= 32 * EPS
    for load in (load_adapter, peft.PeftModel.from_pretrained):
        assert error(logits(load(build(family), tmp_path / "portable")), y) <= 64 * EPS


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_switched_merged_and_taken_out(family, dtype):
    inputs, targets = FAMILIES[family].inputs, TARGETS[family]
    model = build(family, dtype=dtype, **UNTIED[family]).eval()
    base, before = logits(model, inputs), snapshot(model)
    expected = {}
    for name, chosen, rank in (("one", targets, 3), ("two", targets[:1], 5)):
        injected(family, model=model, name=name, lora={"target_modules": chosen, "r": rank}, seed=rank)
        expected[name] = logits(model, inputs)
        assert error(expected[name], base) > 0.1
    for name in ("one", "two"):
        lora_fast.set_adapter(model, name)
        assert torch.equal(logits(model, inputs), expected[name])
        carried = snapshot(model)
        merge_lora(model)
        # Two layers of roundings; the positions too that Bart's kind and OPT compute inside the embedding.
        assert error(logits(model, inputs), expected[name]) <= 64 * torch.finfo(dtype).eps
        with lora_fast.disable_adapters(model):
            assert torch.equal(logits(model, inputs), base)
        lora_fast.unmerge_lora(model)
        assert_unchanged(model, carried)
        assert torch.equal(logits(model, inputs), expected[name])
    remove_lora(model)
    assert_unchanged(model, before)
    assert torch.equal(logits(model, inputs), base)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_copies(family):
    model = injected(family, lora={"target_modules": TARGETS[family]})
    y, buffer = logits(model), io.BytesIO()
    torch.save(model, buffer)
    saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model, protocol=0)), saved):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(logits(twin), y)
        remove_lora(twin)
        assert torch.equal(logits(twin), logits(build(family))) and torch.equal(logits(model), y)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_checkpointing_offloading_and_compiling_change_nothing(family):
    options = (
        UNTIED[family] | {"num_hidden_layers": 1} | ({"layer_types": ["full_attention"]} if family == "gemma3" else {})
    )
    lora = {"target_modules": TARGETS[family][:1]}
    model = injected(family, lora=lora, **options)
    offloaded = accelerate.cpu_offload(build(family, **options), execution_device="cpu")
    injected(family, model=offloaded, lora=lora)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for run, reentrant in ((model, None), (offloaded, None), (compiled, None), (model, True), (model, False)):
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        run.zero_grad()
        run(**CAUSAL_LM).loss.backward()
        results.append([p.grad.clone() for p in lora_fast.lora_parameters(offloaded if run is offloaded else model)])
    assert all(gradient.abs().max() > 0 for gradient in results[0])
    for gradients in results[1:]:
        assert all(error(g, expected) <= 16 * EPS for g, expected in zip(gradients, results[0], strict=True))


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
def test_double_gradients_and_transforms(kind):
    model, a, b, _ = single(kind, torch.float64, torch.float64, padding_idx=1)
    ids = torch.randint(2, 17, (3, 4))  # the row of padding_idx has no gradient
    call = lambda a, b, ids=ids: torch.func.functional_call(  # noqa: E731
        model, {"0.lora_A.default.weight": a, "0.lora_B.default.weight": b}, (ids,)
    ).sin()
    assert torch.autograd.gradcheck(call, (a, b)) and torch.autograd.gradgradcheck(call, (a, b))
    each = torch.vmap(torch.func.grad(lambda a, ids: call(a, b, ids).sum()), in_dims=(None, 0))(a, ids)
    torch.testing.assert_close(each.sum(0), torch.autograd.grad(call(a, b).sum(), a)[0])


def test_a_model_without_weights_is_called(tmp_path):
    lora_fast.save_adapter(injected(lora={"target_modules": TARGETS["llama"]}), tmp_path / "adapter")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**FAMILIES["llama"].config))
    load_adapter(model, tmp_path / "adapter")
    assert model(TOKENS.to("meta")).logits.shape == (*TOKENS.shape, 61)


def test_generation_and_a_table_resized_too_late():
    model = injected(lora={"target_modules": TARGETS["llama"]}).eval()
    found = model.generate(TOKENS[:1, :4], max_new_tokens=4, do_sample=False)
    assert torch.equal(logits(model, {"input_ids": found})[:, 3:-1].argmax(-1), found[:, 4:])
    model.resize_token_embeddings(70)
    for act in (logits, merge_lora):
        with pytest.raises(LoraFastError, match=r"resized after its adapter was put in"):
            act(model)
    remove_lora(model)
    assert logits(model).shape[-1] == 70


def test_what_is_counted_and_reported():
    model = build("llama")
    count = lora_fast.lora_parameter_count(model, 4, TARGETS["llama"])
    assert count == 4 * (61 + 32 + 2 * (32 + 32))
    assert [lora_fast.rank_for_budget(model, budget, TARGETS["llama"]) for budget in (count, count - 1)] == [4, 3]
    injected(model=model, lora={"target_modules": TARGETS["llama"]})
    assert sum(p.numel() for p in lora_fast.lora_parameters(model)) == count
    reasons = {row.module: (row.path, row.reason) for row in lora_fast.fusion_report(model).rows}
    assert reasons["model.embed_tokens"] == ("torch", "an embedding is looked up") and len(reasons) == 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "t5", "whisper"])
def test_all_linear_adapts_no_embedding(family):
    embeddings = {name for name, module in build(family).named_modules() if isinstance(module, nn.Embedding)}
    model = injected(family, lora={"target_modules": TARGETS.get(family, ["embed_tokens"])[:1]}, name="first")
    named = adapted(model)
    injected(family, model=model, lora={"target_modules": "all-linear"}, name="second")
    second = {name for name, module in model.named_modules() if "second" in getattr(module, "lora_A", ())}
    assert named <= embeddings and second and not second & embeddings


def whole(module):
    return nn.Sequential(module, nn.Linear(4, 4))


def idefics():
    return whole(transformers.models.idefics.modeling_idefics.IdeficsDecoupledEmbedding(9, 2, 4))


def pegasus():
    return whole(transformers.models.pegasus.modeling_pegasus.PegasusSinusoidalPositionalEmbedding(9, 4))


@pytest.mark.parametrize(
    ("make", "lora", "said"),
    [
        (lambda: whole(nn.Embedding(9, 4, max_norm=1.0)), {}, r"0 can't be adapted: it renormalizes its rows"),
        (lambda: whole(nn.Embedding(9, 4).to(torch.float8_e4m3fn)), {}, r"no plain floating-point table"),
        (idefics, {}, r"IdeficsDecoupledEmbedding.forward reads the table itself"),
        (pegasus, {}, r"PegasusSinusoidalPositionalEmbedding.forward records no gradient"),
        (lambda: build("whisper"), {"target_modules": ["embed_positions"]}, r"reads the table itself"),
        (lambda: build("gpt2"), {"target_modules": ["wte"], "init_lora_weights": "pissa"}, r"wte is an embedding"),
        (lambda: build("gpt2"), {"target_modules": r".*w[tp]e", "init_lora_weights": "olora"}, r"is an embedding"),
        (lambda: build("llama"), {"target_modules": ["embed_token"]}, r"did you mean embed_tokens"),
    ],
)
def test_refusals_change_nothing(make, lora, said):
    model = make()
    before = snapshot(model)
    with pytest.raises(LoraFastError, match=said):
        apply_lora(model, LoraConfig(r=2, **({"target_modules": ["0", "1"]} | lora)))
    assert_unchanged(model, before)


def deberta():
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"intermediate_size": 44, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c"]}
    return transformers.DebertaV2Model(transformers.DebertaV2Config(**sizes, **more))


@pytest.mark.parametrize(
    ("make", "idle", "used", "reader"),
    [
        (lambda: build("t5"), "shared", "embed_tokens", r"encoder\.embed_tokens"),
        (deberta, "rel_embeddings", "word_embeddings", "DebertaV2Encoder"),
    ],
)
def test_an_embedding_that_is_never_called_is_announced(make, idle, used, reader):
    with pytest.warns(LoraFastWarning, match=rf"{reader} reads the weight of (encoder\.)?{idle} .*without calling"):
        apply_lora(make(), LoraConfig(target_modules=[idle]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoraFastWarning)
        apply_lora(make(), LoraConfig(target_modules=[used]))
