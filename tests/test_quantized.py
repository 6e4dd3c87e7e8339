"""4-bit and 8-bit base layers of bitsandbytes, whose own CPU kernels run here: ours against PEFT's and float64."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from kernel_support import count_launches
from support import CAUSAL_LM, adapted, assert_unchanged, build, logits, peft_model, snapshot, trainable
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lora_fast import (
    LoraConfig,
    LoraFastError,
    LoraFastWarning,
    accelerate_peft,
    adapter_spectra,
    apply_lora,
    disable_adapters,
    fusion_report,
    load_adapter,
    lora_parameter_count,
    merge_lora,
    remove_lora,
    save_adapter,
    set_adapter,
)
from lora_fast.fusion import calls_by_path
from lora_fast.injection import lora_layers
from lora_fast.profiler.quantization import quantize

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16, torch.float16)}
KINDS = ("nf4", "fp4", "int8")
# How the layers of a Llama run: a weight in 4 bits is unpacked for the op of its group, one in 8 left to its layer.
FOUR_BIT = {"lora_linear", "lora_linears", "lora_swiglu_mlp"}
PATHS = {"nf4": FOUR_BIT, "fp4": FOUR_BIT, "int8": {"lora_update"}}
PEFT, APPLY, ACCELERATE = "peft", "apply_lora", "accelerate_peft"
LORA = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False}


def quantized(layer: nn.Linear, kind: str, dtype: torch.dtype) -> nn.Linear:
    """The layer with its weight in 4 or 8 bits, as Transformers' loading makes one."""
    bias = layer.bias is not None
    if kind == "int8":
        made = bnb.nn.Linear8bitLt(*layer.weight.shape[::-1], bias, has_fp16_weights=False, threshold=0.0)
        made.weight = bnb.nn.Int8Params(layer.weight.data.to(torch.float16), requires_grad=False)
    else:
        made = bnb.nn.Linear4bit(*layer.weight.shape[::-1], bias, compute_dtype=dtype, quant_type=kind)
        made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type=kind, module=made)
    if bias:
        made.bias = nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
    made.support_avx512bf16_for_cpu = False  # such CPUs pack weights anew for inference, and round their scales to bf16
    return made.to("cpu")  # it is this that quantizes


def llama(kind: str, dtype: torch.dtype = torch.float32, **config) -> nn.Module:
    """A tiny Llama with every linear layer but the head quantized."""
    model = build("llama", dtype=dtype, **config)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            model.set_submodule(name, quantized(layer, kind, dtype))
    setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)  # PEFT goes by it
    return model


def with_adapter(base: nn.Module, way: str, **lora) -> nn.Module:
    """The same adapter on the same weights, started under the same seed."""
    model = copy.deepcopy(base)
    torch.manual_seed(4)
    if way == APPLY:
        return apply_lora(model, LoraConfig(**LORA | lora))
    model = peft_model(model, **LORA | lora)
    if way == ACCELERATE:
        accelerate_peft(model)
    return model


def step(model: nn.Module, inputs=CAUSAL_LM, seed: int = 5) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and every gradient of a training step."""
    torch.manual_seed(seed)
    output = model.train()(**inputs)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in trainable(model).items()}
    model.zero_grad()
    return output.logits.detach(), gradients


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_equals_pefts(kind, dropout):
    base = llama(kind)
    expected, gradients = step(with_adapter(base, PEFT, lora_dropout=dropout))
    for way in (APPLY, ACCELERATE):
        model = with_adapter(base, way, lora_dropout=dropout)
        found, ours = step(model)
        torch.testing.assert_close(found, expected, rtol=64 * EPS[torch.float32], atol=64 * EPS[torch.float32])
        assert list(ours) == list(gradients) and len(ours) == 28
        for name, gradient in ours.items():
            assert gradients[name].abs().max() > 0
            scale = float(gradients[name].abs().max())
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=64 * EPS[torch.float32] * scale)
        assert {path for path, _ in calls_by_path(model)} - {"layers"} == PATHS[kind]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_one_layer_against_float64(kind, dtype, autocast):
    """y, dx, dA and dB of a layer (33 → 70) whose dequantized weight is taken as it is; 8-bit layers quantize x too."""
    generator = torch.Generator().manual_seed(3)
    layer = quantized(nn.Linear(33, 70, dtype=dtype), kind, dtype)
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    model = with_adapter(nn.ModuleDict({"layer": layer}), APPLY)
    a, b = (factor["default"].weight.detach().double() for factor in (model.layer.lora_A, model.layer.lora_B))
    x, dy = torch.randn(3, 5, 33, generator=generator), torch.randn(3, 5, 70, generator=generator)
    x = x.to(torch.float32 if autocast else dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model.layer(x)
    assert y.dtype == x.dtype  # as bitsandbytes answers
    y.backward(dy.to(y.dtype))
    exact_x, exact_dy = x.detach().double().flatten(0, 1), dy.to(y.dtype).double().flatten(0, 1)
    scaling = 2.0
    s, ds = exact_x @ a.t(), scaling * exact_dy @ b
    eps = max(EPS[dtype], EPS[torch.bfloat16] if autocast else 0)
    expected = {
        "y": exact_x @ weight.t() + layer.bias.double() + scaling * s @ b.t(),
        "dx": exact_dy @ weight + ds @ a,
        "dA": ds.t() @ exact_x,
        "dB": scaling * exact_dy.t() @ s,
    }
    found = {
        "y": y.flatten(0, 1),
        "dx": x.grad.flatten(0, 1),
        "dA": model.layer.lora_A["default"].weight.grad,
        "dB": model.layer.lora_B["default"].weight.grad,
    }
    for name, value in expected.items():
        error = (found[name].double() - value).norm() / value.norm()
        assert error < 3 * eps, (name, float(error) / eps)


@pytest.mark.parametrize("kind", KINDS)
def test_files_go_both_ways(kind, tmp_path):
    base = llama(kind)
    ours, theirs = with_adapter(base, APPLY), with_adapter(base, PEFT)
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits(theirs)
    import peft

    for loaded in (
        load_adapter(copy.deepcopy(base), tmp_path / "ours"),
        load_adapter(copy.deepcopy(base), tmp_path / "theirs"),
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours"),
    ):
        torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=64 * EPS[torch.float32])
    spectra, of_file = adapter_spectra(ours), adapter_spectra(tmp_path / "ours")
    assert len(spectra) == 14 and spectra.keys() == of_file.keys()
    for name, spectrum in spectra.items():
        torch.testing.assert_close(spectrum.singular_values, of_file[name].singular_values, rtol=1e-12, atol=0)
        assert spectrum.shape == of_file[name].shape and spectrum.singular_values[0] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_peft_layers_made_fast_are_copied_and_switched_as_pefts(kind):
    base = llama(kind)
    ours, theirs = with_adapter(base, ACCELERATE), with_adapter(base, PEFT)
    expected = logits(theirs)
    for model in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=64 * EPS[torch.float32])
        assert {path for path, _ in calls_by_path(model)} - {"layers"} == PATHS[kind]
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_switches_and_comes_out_again(kind):
    base = llama(kind)
    plain, before = logits(base), snapshot(base.eval())
    model = apply_lora(base, LoraConfig(**LORA))
    with_one = logits(model)
    assert not torch.equal(with_one, plain)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), with_one)
    torch.manual_seed(8)
    apply_lora(model, LoraConfig(**LORA | {"r": 7}), adapter_name="second")
    assert not torch.equal(logits(model), with_one)
    set_adapter(model, "default")
    assert torch.equal(logits(model), with_one)
    with disable_adapters(model):
        assert torch.equal(logits(model), plain)
    remove_lora(model)
    assert torch.equal(logits(model), plain)
    assert_unchanged(model, before)


@pytest.mark.parametrize("way", [APPLY, ACCELERATE])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_nothing_unpacked_is_kept_for_backward(dropout, way):
    """A model in 4 bits keeps what the same model keeps whose weights are as they were, weights left out."""

    def kept(base: nn.Module) -> int:
        model = with_adapter(base, way, lora_dropout=dropout).train()
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        saved = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**CAUSAL_LM).loss
        assert loss.requires_grad
        return sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in own)

    assert kept(llama("nf4")) == kept(build("llama")) > 0


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_gradients_and_many_at_once(bias):
    layer = quantized(nn.Linear(33, 70, bias), "nf4", torch.float32)
    plain = nn.Linear(33, 70, bias)
    with torch.no_grad():
        plain.weight.copy_(bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
        if bias:
            plain.bias.copy_(layer.bias)
    models = [with_adapter(nn.ModuleDict({"layer": each}), APPLY).layer for each in (layer, plain)]
    x, dys = torch.randn(5, 33), torch.randn(3, 5, 70)
    found = []
    for model in models:
        factors = [model.lora_A["default"].weight, model.lora_B["default"].weight]
        inputs = [x.clone().requires_grad_(), *factors]
        y = model(inputs[0])
        many = torch.autograd.grad(y, inputs, dys, is_grads_batched=True, retain_graph=True)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        jacobian = torch.func.jacrev(lambda rows, model=model: model(rows).sum(0))(x)
        found.append([*many, *first, *second, jacobian])
    for ours, expected in zip(*found, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_nothing(kind, reentrant):
    base = llama(kind)
    expected, gradients = step(with_adapter(base, APPLY, lora_dropout=0.2))
    model = with_adapter(base, APPLY, lora_dropout=0.2)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found, ours = step(model)
    assert torch.equal(found, expected)
    assert all(torch.equal(ours[name], gradient) for name, gradient in gradients.items()) and len(ours) == 28


@pytest.mark.parametrize("case", ["compute dtype not set", "biases in fp32", "selective"])
def test_a_first_step_is_checkpointed_as_later_ones(case):
    """bitsandbytes chooses a compute dtype, and casts biases in place, when a layer is first called: what is recomputed
    must save what was saved before. Selective checkpointing watches ops by name."""
    base = llama("nf4", torch.bfloat16 if case == "biases in fp32" else torch.float32, attention_bias=True)
    for layer in base.modules():
        if isinstance(layer, bnb.nn.Linear4bit) and case == "compute dtype not set":
            layer.compute_dtype, layer.compute_type_is_set = None, False
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            parameter.data = parameter.data.float()
    found = []
    for checkpointed in (True, False):
        model = with_adapter(base, APPLY, lora_dropout=0.2)
        if checkpointed and case == "selective":
            saved = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
            context = partial(create_selective_checkpoint_contexts, saved)
            for layer in model.model.layers:
                own = layer.mlp.forward
                layer.mlp.forward = partial(checkpoint, own, use_reentrant=False, context_fn=context)
        elif checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(step(model))
    (logits_1, gradients_1), (logits_2, gradients_2) = found
    close = {"rtol": 0, "atol": 1e-5} if case == "selective" else {"rtol": 0, "atol": 0}  # other ops round otherwise
    torch.testing.assert_close(logits_1, logits_2, **close)
    assert len(gradients_1) == 28 and gradients_1.keys() == gradients_2.keys()
    for name, gradient in gradients_1.items():
        torch.testing.assert_close(gradient, gradients_2[name], **close, msg=name)


def test_a_weight_that_was_changed_before_backward_is_noticed():
    model = with_adapter(nn.ModuleDict({"layer": quantized(nn.Linear(33, 70), "nf4", torch.float32)}), APPLY)
    x = torch.randn(4, 33, requires_grad=True)
    y = model.layer(x).sum()
    with torch.no_grad():
        model.layer.weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_weight_is_unpacked_in_the_dtype_of_the_product():
    """As bitsandbytes does: not rounded to the dtype that it had before it was packed."""
    layer = quantized(nn.Linear(64, 70, dtype=torch.bfloat16), "nf4", torch.float32)
    x = torch.randn(8, 64)
    model = with_adapter(nn.ModuleDict({"layer": copy.deepcopy(layer)}), APPLY, init_lora_weights=True)
    torch.testing.assert_close(model.layer(x), layer(x), rtol=0, atol=64 * EPS[torch.float32])


def test_few_rows_without_a_gradient_are_left_to_bitsandbytes():
    model = with_adapter(llama("nf4"), APPLY).eval()
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 7]]))
    assert {path for path, _ in calls_by_path(model)} == {"lora_update", "layers"}
    model(input_ids=torch.tensor([[5, 7]]))
    assert {path for path, _ in calls_by_path(model)} >= FOUR_BIT


class Copied(nn.Module):
    """A SwiGLU MLP of layers of these kinds."""

    def __init__(self, *kinds: str):
        super().__init__()
        for name, kind, sizes in zip(("gate_proj", "up_proj", "down_proj"), kinds, ((32, 64), (32, 64), (64, 32))):
            layer = nn.Linear(*sizes)
            setattr(self, name, layer if kind == "plain" else quantized(layer, kind, torch.float32))

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Uncopied(Copied):
    def __deepcopy__(self, memo):
        raise TypeError("cannot copy this")


def test_an_mlp_that_cannot_be_probed_runs_layer_by_layer():
    model = apply_lora(nn.ModuleDict({"mlp": Uncopied("nf4", "nf4", "nf4")}), LoraConfig(**LORA))
    assert [row.reason for row in fusion_report(model).mlps] == ["it can't be copied to be probed: cannot copy this"]
    assert model.mlp(torch.randn(5, 32)).shape == (5, 32)


@pytest.mark.parametrize("kinds", [("nf4", "plain", "nf4"), ("plain", "plain", "nf4"), ("plain", "nf4", "plain")])
def test_an_mlp_of_packed_and_other_layers_is_one_op(kinds):
    torch.manual_seed(3)
    model = apply_lora(nn.ModuleDict({"mlp": Copied(*kinds)}), LoraConfig(**LORA))
    assert [row.path for row in fusion_report(model).mlps] == ["lora_swiglu_mlp"]
    x = torch.randn(5, 32)
    gate, up, down = (getattr(model.mlp, name) for name in ("gate_proj", "up_proj", "down_proj"))
    torch.testing.assert_close(model.mlp(x), down(nn.functional.silu(gate(x)) * up(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_compiles_without_a_graph_break(kind):
    model = with_adapter(llama(kind), APPLY)
    expected, gradients = step(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found, ours = step(compiled)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert [name.removeprefix("_orig_mod.") for name in ours] == list(gradients)
    for gradient, other in zip(ours.values(), gradients.values()):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_transformers_quantized_when_loading(bits, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    build("llama").save_pretrained(tmp_path)
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {}
    quantization = BitsAndBytesConfig(
        **{f"load_in_{bits}bit": True}, bnb_4bit_use_double_quant=bits == 4, llm_int8_threshold=0.0, **settings
    )
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization, dtype=torch.float32, device_map={"": "cpu"}
    )
    for layer in base.modules():
        layer.support_avx512bf16_for_cpu = False
    ours, theirs = with_adapter(base, APPLY), with_adapter(base, PEFT)
    assert adapted(ours) == adapted(theirs) and len(adapted(ours)) == 14
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=64 * EPS[torch.float32])
    assert torch.equal(ours.generate(**PROMPT), theirs.generate(**PROMPT))
    assert lora_parameter_count(base, 3) == sum(p.numel() for p in trainable(ours).values())


PROMPT = {
    "input_ids": CAUSAL_LM["input_ids"],
    "attention_mask": torch.ones_like(CAUSAL_LM["input_ids"]),
    "max_new_tokens": 5,
    "do_sample": False,
    "pad_token_id": 2,
}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_adapters_run_on_the_kernels(kind, dropout):
    base = llama(kind)
    model = apply_lora(copy.deepcopy(base), LoraConfig(**LORA, lora_dropout=dropout), backend="triton")
    with count_launches() as launches:
        found, gradients = step(model)
    assert fusion_report(model).counts == {"triton": 14}
    assert set(launches) >= {"_cast_kernel", "_shrink_kernel", "_grad_a_kernel"}
    if dropout == 0:  # the kernels' masks are their own
        for layer in lora_layers(model).values():
            layer.backend = "torch"
        expected, others = step(model)
        torch.testing.assert_close(found, expected, rtol=0, atol=256 * EPS[torch.float32])
        for name, gradient in gradients.items():
            scale = float(others[name].abs().max())
            torch.testing.assert_close(gradient, others[name], rtol=0, atol=256 * EPS[torch.float32] * scale, msg=name)


def test_the_report_says_how_the_layers_run():
    """4 bits: q, k and v together, o alone, the MLP as one op; 8 bits: each layer called. Where 4-bit layers compute in
    another dtype than their input's, they are called, too."""
    model = with_adapter(llama("nf4"), APPLY)
    logits(model)
    report = fusion_report(model)
    assert report.counts == {"torch": 14} and {row.path for row in report.mlps} == {"lora_swiglu_mlp"}
    for line in (
        "6 calls so far took lora_linears",
        "2 calls so far took lora_linear",
        "2 calls so far took lora_swiglu",
    ):
        assert line in str(report)
    assert "called as it is" not in str(report)
    with torch.autocast("cpu", torch.bfloat16):
        logits(model)
    told = "14 calls so far took lora_update: the base layer is a Linear4bit: it is called as it is, for few rows"
    assert told in str(fusion_report(model))
    model = with_adapter(llama("int8"), APPLY)
    logits(model)
    assert "14 calls so far took lora_update: the base layer is a Linear8bitLt: it is called" in str(
        fusion_report(model)
    )


@pytest.mark.parametrize(
    "lora, message",
    [
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' changes .*q_proj.weight, which is quantized"),
        ({"init_lora_weights": "olora"}, r"init_lora_weights='olora' changes .*q_proj.weight, which is quantized"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["o_proj"]},
            r"modules_to_save: .*o_proj is quantized and can't be trained whole",
        ),
        ({"modules_to_save": ["mlp"]}, r"modules_to_save: .*mlp is quantized and can't be trained whole"),
        ({"use_dora": True}, r"use_dora=True: .*q_proj is quantized; name it in exclude_modules"),
    ],
)
def test_what_a_quantized_weight_cannot_do_is_refused(lora, message):
    model = llama("nf4")
    before = snapshot(model)
    with pytest.raises(LoraFastError, match=message):
        apply_lora(model, LoraConfig(**LORA | lora))
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", KINDS)
def test_pefts_dora_stays_pefts(kind):
    model = with_adapter(llama(kind, torch.bfloat16), PEFT, use_dora=True)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(LoraFastError) as error:
            accelerate_peft(model)
        assert "14 times: the adapter is DoRA, and the base layer's weight is quantized" in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_refused_and_done_on_the_base_as_it_was(kind, tmp_path):
    model = with_adapter(llama(kind), APPLY)
    before = snapshot(model)
    with pytest.raises(LoraFastError, match=r"q_proj is quantized, .*load the base model unquantized"):
        merge_lora(model)
    assert_unchanged(model, before)
    save_adapter(model, tmp_path)
    whole = load_adapter(build("llama"), tmp_path)
    expected = logits(whole)
    merge_lora(whole)
    torch.testing.assert_close(logits(whole), expected, rtol=1e-4, atol=1e-5)


def test_a_rank_is_held_against_the_matrix_and_not_against_its_packed_bytes():
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoraFastWarning)
        with_adapter(llama("nf4"), APPLY, r=16)
    with pytest.warns(LoraFastWarning, match=r"r=17 exceeds min\(N, K\)=16 of .*k_proj"):
        with_adapter(llama("nf4"), APPLY, r=17)


def test_biases_and_a_whole_head_are_trained_beside_quantized_layers(tmp_path):
    base = llama("nf4", attention_bias=True)
    lora = {"bias": "lora_only", "modules_to_save": ["lm_head"]}
    ours, theirs = with_adapter(base, APPLY, **lora), with_adapter(base, PEFT, **lora)
    (found, gradients), (expected, others) = step(ours), step(theirs)
    torch.testing.assert_close(found, expected, rtol=0, atol=64 * EPS[torch.float32])
    assert gradients.keys() == others.keys() and len(gradients) == 28 + 8 + 1
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-4, atol=1e-6, msg=name)
    save_adapter(ours, tmp_path)
    assert torch.equal(logits(load_adapter(copy.deepcopy(base), tmp_path)), logits(ours))


def packs_anew(**config) -> nn.Module:
    """A Llama in 4 bits that packs its weights anew for an evaluation, as on a CPU with AVX512-BF16, on any CPU."""
    model = llama("nf4", hidden_size=64, intermediate_size=64, num_key_value_heads=4, **config)
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = True
    return model


def is_packed_anew(model: nn.Module) -> list[bool]:
    return [
        getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
        for layer in model.modules()
        if isinstance(layer, bnb.nn.Linear4bit)
    ]


@pytest.mark.parametrize("way", [APPLY, ACCELERATE])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_an_evaluation_leaves_weights_that_gradients_pass(way, targets):
    """Also those of layers without an adapter: without a gradient through them the layers below learn nothing right."""
    model = with_adapter(packs_anew(), way, target_modules=targets)
    before = step(model)[1]
    model.eval()
    with torch.no_grad(), disable_adapters(model) if way == APPLY else model.disable_adapter():
        model(**CAUSAL_LM)
    model.generate(**PROMPT)
    after = step(model)[1]
    assert not any(is_packed_anew(model)) and after.keys() == before.keys()
    for name, gradient in before.items():
        assert gradient.abs().max() > 0 and torch.equal(after[name], gradient), name


@pytest.mark.parametrize("way", [APPLY, ACCELERATE])
@pytest.mark.parametrize("nested", [False, True])
def test_weights_packed_anew_before_are_packed_back(way, nested):
    from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit

    dense = build("llama", hidden_size=64, intermediate_size=64, num_key_value_heads=4)
    base = quantize(copy.deepcopy(dense), "nf4", "cpu") if nested else packs_anew()
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}
    weights = {name: dequantize_4bit(layer.weight.data, layer.weight.quant_state) for name, layer in layers.items()}
    for layer in layers.values():  # as an evaluation does on such a CPU
        packed = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
        layer.weight.data, layer.weight.quant_state = packed
    with pytest.warns(LoraFastWarning, match="the weights of 14 4-bit layers anew, their scales rounded"):
        model = with_adapter(base, way)
    assert not any(is_packed_anew(model))
    found = [
        dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for layer in model.modules()
        if isinstance(layer, bnb.nn.Linear4bit)
    ]
    for (name, weight), now in zip(weights.items(), found, strict=True):
        assert (now - weight).norm() < (4 if nested else 1) * EPS[torch.bfloat16] * weight.norm(), name
        dense.get_submodule(name).weight.data.copy_(now)
    expected = step(with_adapter(dense, APPLY))[1].values()
    for gradient, other in zip(step(model)[1].values(), expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=64 * EPS[torch.float32] * float(other.abs().max()))


def test_without_adapters_bitsandbytes_packs_as_it_likes_again():
    model = copy.deepcopy(with_adapter(packs_anew(), APPLY, target_modules=["q_proj"]))
    layers = [layer for layer in model.modules() if isinstance(layer, bnb.nn.Linear4bit)]
    assert len(layers) == 14 and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    remove_lora(model)
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)
