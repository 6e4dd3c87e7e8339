"""Whole Transformers models on the Triton kernels: losses and gradients as in PyTorch, and every kernel used."""

import peft
import pytest
import torch
from kernel_support import DEVICE, count_launches, error
from support import FAMILIES, build

from lora_fast import LoraConfig, accelerate_peft, apply_lora, fusion_report, tuning

EPS = torch.finfo(torch.float32).eps
LORA = {"r": 5, "target_modules": "all-linear", "use_rslora": True, "init_lora_weights": False}
# What every layer launches, by the kernels' names.
LINEAR = {"_cast_kernel", "_shrink_kernel", "_grad_s_and_b_kernel", "_grad_a_kernel"}


def model_of(family, backend, *, with_peft=False, dtype=torch.float32, **lora):
    torch.manual_seed(0)
    model = build(family, dtype=dtype)
    torch.manual_seed(1)
    if with_peft:
        model = peft.get_peft_model(model, peft.LoraConfig(**LORA, **lora))
        accelerate_peft(model, backend=backend)
    else:
        apply_lora(model, LoraConfig(**LORA, **lora), backend=backend)
    return model.to(DEVICE).train()


def step(model, inputs):
    model.zero_grad()
    torch.manual_seed(2)
    loss = model(**{name: value.to(DEVICE) for name, value in inputs.items()}).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("route", ["cublas", "triton"])
@pytest.mark.parametrize("with_peft", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_equal_to_pytorch(family, with_peft, route):
    inputs = FAMILIES[family].inputs
    expected = step(model_of(family, "torch", with_peft=with_peft), inputs)
    model = model_of(family, "triton", with_peft=with_peft)
    with tuning.only(route), count_launches() as launches:
        got = step(model, inputs)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert value.abs().max() > 0, name
        assert (value - expected[name]).abs().max() <= 256 * EPS * expected[name].abs().max(), name
    # Without "triton" the tuner has dS and dB by a kernel or by cuBLAS, as a GPU is faster.
    needed = LINEAR if route == "triton" or DEVICE.type == "cpu" else LINEAR - {"_grad_s_and_b_kernel"}
    assert set(launches) >= needed and ("gemm_lora_kernel" in launches) == (route == "triton")
    mlps = 2 if family != "gpt2" else 0
    assert launches["_backward_kernel"] == mlps  # of the SwiGLU
    report = fusion_report(model)
    assert report.counts == {"triton": len(report.rows)}


@pytest.mark.parametrize("route", ["cublas", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_in_half_precision_it_errs_no_more_than_pytorch(family, dtype, route):
    """What most train: a base in bf16 and adapters in fp32, as PEFT makes them."""
    inputs = FAMILIES[family].inputs
    ours = model_of(family, "triton", with_peft=True, dtype=dtype)
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    exact = step(model_of(family, "torch", with_peft=True, dtype=dtype).double(), inputs)
    with tuning.only(route):
        got = step(ours, inputs)
    eager = step(model_of(family, "torch", with_peft=True, dtype=dtype), inputs)
    assert got.keys() == eager.keys() == exact.keys()
    errors = torch.tensor([[error(value[name], exact[name]) for name in exact] for value in (got, eager)])
    # Of a single tensor either may have the luck to be nearly exact; not of all of them.
    (worst, worst_eager), (mean, mean_eager) = errors.max(1).values, errors.log().mean(1).exp()
    assert worst <= 1.5 * worst_eager and mean <= 1.3 * mean_eager


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_redraw_the_masks_of_a_whole_layer(reentrant):
    model = model_of("llama", "triton", lora_dropout=0.2)
    inputs = FAMILIES["llama"].inputs
    expected = step(model, inputs)
    again = step(model, inputs)
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    recomputed = step(model, inputs)
    # Checkpointing switches the cache off, beside which attention may round differently.
    assert all((recomputed[n] - expected[n]).abs().max() <= 256 * EPS * expected[n].abs().max() for n in expected)
    torch.manual_seed(3)
    assert not torch.equal(model(**inputs).loss, expected["loss"])


def test_compiled_without_a_break():
    model = model_of("llama", "triton").eval()
    inputs = FAMILIES["llama"].inputs
    expected = model(**inputs).logits
    with count_launches() as launches:
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).logits
    assert set(launches) >= {"_shrink_kernel", "_forward_kernel"}
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
