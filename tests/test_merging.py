"""Merging, switching and disabling adapters: each gives what it says, and taking it back gives every bit back."""

import pytest
import torch
from support import FAMILIES, adapted, assert_unchanged, build, injected, logits, pair, snapshot, trainable

import lora_fast
from lora_fast import (
    LoraConfig,
    LoraFastError,
    apply_lora,
    disable_adapters,
    lora_parameters,
    merge_lora,
    remove_lora,
    set_adapter,
    unmerge_lora,
)
from lora_fast.linear import LoraLayer

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_merge_gives_the_same_logits_as_the_adapter(family):
    inputs = FAMILIES[family].inputs
    base = build(family)
    plain = logits(base, inputs)
    model = injected(family, model=base)
    adapter = logits(model, inputs)
    merge_lora(model)
    assert not any(layer.adapter_runs() for layer in model.modules() if isinstance(layer, LoraLayer))
    # W + ΔW is rounded once, then the products: two layers of sums of 44 terms.
    torch.testing.assert_close(logits(model, inputs), adapter, rtol=256 * EPS, atol=256 * EPS)
    assert (adapter - plain).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_weight_is_rounded_once(dtype):
    model = injected(dtype=dtype)
    layer = model.model.layers[0].mlp.down_proj
    exact = layer.weight.double() + 2.0 * (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    merge_lora(model)
    # Half a unit in the last place, and the rounding of the fp32 sum before it
    half = exact.abs() * torch.finfo(dtype).eps / 2 + exact.abs().max() * 4 * EPS + torch.finfo(dtype).tiny
    assert ((layer.weight.double() - exact).abs() <= half).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", ["cpu", "device"])
def test_unmerge_is_exact(family, dtype, keep):
    model = injected(family, dtype=dtype)
    before, computed = snapshot(model.eval()), logits(model)
    for _ in range(3):
        merge_lora(model, keep=keep)
        changed = [n for n, v in model.state_dict().items() if not torch.equal(v, before["values"][n])]
        assert {name.removesuffix(".weight") for name in changed} == adapted(model)
        unmerge_lora(model)
        assert_unchanged(model, before)
    assert torch.equal(logits(model), computed)


def test_remove_after_merge_leaves_the_merged_model():
    base = build("bert")
    names = list(base.state_dict())
    lora = dict(FAMILIES["bert"].lora) | {"bias": "all", "modules_to_save": ["word_embeddings"]}
    injected("bert", model=base, lora=lora)
    with torch.no_grad():
        for parameter in trainable(base).values():
            parameter += 0.05
    inputs = FAMILIES["bert"].inputs
    tuned = logits(base, inputs)
    merge_lora(base)
    merged = logits(base, inputs)
    remove_lora(base)
    assert not any(isinstance(module, LoraLayer) for module in base.modules())
    assert not any(module._forward_hooks for module in base.modules())
    assert list(base.state_dict()) == names
    assert all(p.requires_grad for p in base.parameters())
    assert torch.equal(logits(base, inputs), merged)
    torch.testing.assert_close(merged, tuned, rtol=1e-4, atol=1e-5)
    assert (merged - logits(build("bert"), inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "opt"])
def test_tied_weights_survive(family):
    model = build(family, tie_word_embeddings=True)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight
    assert tied is embedding.weight

    def still_tied():
        return head.weight is tied and embedding.weight is tied and model.get_output_embeddings() is head

    injected(family, model=model, lora={"target_modules": "all-linear"})
    assert still_tied() and not isinstance(head, LoraLayer)
    value = tied.clone()
    for act in (merge_lora, unmerge_lora, merge_lora, remove_lora):
        act(model)
        assert still_tied() and torch.equal(tied, value)
    assert head.weight.requires_grad


def test_an_adapter_on_a_tied_head_trains_and_is_not_merged():
    lora = {"target_modules": ["lm_head", "q_proj"], "r": 4, "init_lora_weights": False}
    ours, theirs = pair("llama", lora, tie_word_embeddings=True)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=64 * EPS, atol=64 * EPS)
    before = snapshot(ours)
    with pytest.raises(LoraFastError, match=r"lm_head.weight is tied to model.embed_tokens.weight.*untie"):
        merge_lora(ours)
    assert_unchanged(ours, before)
    remove_lora(ours)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_merging_nan_is_refused(value):
    model = injected()
    lora_parameters(model)[-1].data[0, 0] = value
    before = {name: v.clone() for name, v in model.state_dict().items()}
    with pytest.raises(LoraFastError, match=r"adapter 'default' holds NaN or inf in .*; nothing was merged"):
        merge_lora(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merge_that_overflows_is_refused_whole(family, dtype):
    model = injected(family, dtype=dtype)
    *_, (name, last) = ((n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer))
    top = torch.finfo(dtype).max
    with torch.no_grad():  # scaling 2; the update is 0.75 of the range, on a weight of 0.75
        a, b = last.lora_A["default"].weight.zero_(), last.lora_B["default"].weight.zero_()
        a[0, 0], b[0, 0] = 1.0, 0.375 * top
        last.weight[0, 0] = -0.75 * top
    before = snapshot(model)
    merge_lora(model)  # within the range, though neither the bound nor either part alone shows it
    assert torch.isfinite(last.weight).all()
    unmerge_lora(model)
    assert_unchanged(model, before)
    with torch.no_grad():
        last.weight[0, 0] = 0.75 * top
    before = snapshot(model)
    sentence = rf"adapter 'default' into {name}.weight exceeds what {dtype} holds .*nothing was merged"
    with pytest.raises(LoraFastError, match=sentence):
        merge_lora(model)
    assert_unchanged(model, before)


def test_infinities_that_the_base_already_holds_are_no_overflow():
    model = injected(dtype=torch.float16)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[1, 2], weight[3, 4] = torch.inf, torch.nan
    merge_lora(model)
    assert torch.isinf(weight[1, 2]) and torch.isnan(weight[3, 4]) and (~torch.isfinite(weight)).sum() == 2


# ------------------------------------------------------------------------------------------- several adapters, and none


def test_switching_equals_models_built_alone():
    recipes = {
        "one": {"target_modules": ["q_proj", "v_proj"], "r": 4},
        "two": {"target_modules": ["q_proj", "up_proj"], "r": 7, "lora_alpha": 30, "use_rslora": True},
        "three": {"target_modules": ["down_proj"], "r": 2, "modules_to_save": ["lm_head"]},
    }
    both = build("llama")
    alone = {}
    for seed, (name, lora) in enumerate(recipes.items()):
        injected(model=both, lora=lora, name=name, seed=seed)
        alone[name] = injected(lora=lora, name=name, seed=seed)
    for model in (both, alone["three"]):
        model.lm_head.weight.data += 0.01
    assert both.__dict__["_lora_fast_state"].active == "three"  # the newest
    expected = {name: logits(model) for name, model in alone.items()}
    for name in [*recipes, *reversed(recipes), "two"]:
        set_adapter(both, name)
        assert torch.equal(logits(both), expected[name]), name
        assert trainable(both).keys() == trainable(alone[name]).keys()
        assert [p.shape for p in lora_parameters(both)] == [p.shape for p in lora_parameters(alone[name])]
        with disable_adapters(both):
            assert torch.equal(logits(both), logits(build("llama")))
    set_adapter(both, "two")
    merge_lora(both)
    torch.testing.assert_close(logits(both), expected["two"], rtol=256 * EPS, atol=256 * EPS)
    before = snapshot(both)
    with pytest.raises(LoraFastError, match=r"adapter 'two' is merged; unmerge_lora"):
        set_adapter(both, "one")
    with pytest.raises(LoraFastError, match=r"adapter 'two' is merged; unmerge_lora"):
        apply_lora(both, LoraConfig(), adapter_name="four")
    assert_unchanged(both, before)
    unmerge_lora(both)
    set_adapter(both, "one")
    assert torch.equal(logits(both), expected["one"])


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_module_is_trained_whole_or_by_factors(name):
    """A copy of a layer with another adapter's factors would go on computing that adapter."""
    whole, factors = {"target_modules": ["q_proj"], "modules_to_save": [name]}, {"target_modules": [name, "q_proj"]}
    for first, second in ((whole, factors), (factors, whole)):
        model = injected(lora=first, name="one")
        before = snapshot(model)
        with pytest.raises(LoraFastError, match=rf"{name} (is in modules_to_save of|carries) another adapter"):
            apply_lora(model, LoraConfig(**second), adapter_name="two")
        assert_unchanged(model, before)


def test_disable_adapters():
    base = build("llama")
    plain = logits(base)
    model = injected(lora={"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
    model.lm_head.weight.data += 0.1
    tuned, trained = logits(model), trainable(model).keys()
    with disable_adapters(model):
        assert torch.equal(logits(model), plain)
        with disable_adapters(model):
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), tuned)
    assert trainable(model).keys() == trained
    with pytest.raises(KeyError), disable_adapters(model):
        raise KeyError
    assert torch.equal(logits(model), tuned)


@pytest.mark.parametrize("merged", [False, True])
def test_remove_while_adapters_are_disabled(merged):
    base = build("llama")
    model = build("llama")
    before = snapshot(model)
    injected(model=model, lora={"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
    model.lm_head.weight.data += 0.1
    if merged:
        merge_lora(model)
    with disable_adapters(model):
        remove_lora(model)
    assert_unchanged(model, before)
    assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("keep", ["cpu", "device"])
def test_disable_adapters_of_a_merged_model(keep):
    plain = logits(build("llama"))
    model = injected()
    merge_lora(model, keep=keep)
    merged, before = logits(model), snapshot(model)
    with disable_adapters(model), disable_adapters(model):
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), merged)
    assert_unchanged(model, before)
    unmerge_lora(model)
    with disable_adapters(model):
        assert torch.equal(logits(model), plain)


def test_disable_adapters_warns_of_trained_biases():
    model = injected("qwen2", lora={"bias": "all"})
    with pytest.warns(lora_fast.LoraFastWarning, match="keeps the trained biases") as record, disable_adapters(model):
        pass
    assert record[0].filename == __file__


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changes_the_base_stays_alone_and_is_disabled_whole(init):
    base = logits(build("llama"))
    model = injected(lora={"init_lora_weights": init})
    adapted_logits = logits(model)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.mul_(1.5)
    changed = logits(model)
    assert (changed - adapted_logits).norm() > 1e-3 * changed.norm()
    with disable_adapters(model):
        assert torch.equal(logits(model), base)
        with disable_adapters(model):
            assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), changed)
    with pytest.raises(LoraFastError, match="must be the only one; here would be 'default', 'second'"):
        apply_lora(model, LoraConfig(), adapter_name="second")
    with disable_adapters(model):
        remove_lora(model)
        assert torch.equal(logits(model), base)
