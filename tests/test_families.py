"""Every model family against PEFT: the same start, logits, every gradient, and adapters carried over through files."""

import copy

import peft
import pytest
import torch
from support import FAMILIES, adapted, build, peft_model, trainable

import lora_fast

# Both models take the same sums; ours adds the update into the base product, PEFT adds two tensors. What is left are
# the roundings of that one addition, of relative size eps each, through two layers, the loss and back.
ROUNDINGS = 64
EPS = torch.finfo(torch.float32).eps


def assert_equal_to_rounding(ours, theirs, *, scale=0.0):
    """‖ours − theirs‖ ≤ 64 eps ‖theirs‖, or eps · `scale` for a tensor that is a small difference of large ones."""
    assert theirs.norm() > 0
    assert (ours - theirs).norm() <= EPS * (ROUNDINGS * theirs.norm() + scale)


def step(model, inputs):
    """Logits and {name: gradient} of every trained parameter of one training step under a fixed seed."""
    torch.manual_seed(21)
    output = model.train()(**inputs)
    output.loss.backward()
    return output.logits.detach(), {name: p.grad for name, p in trainable(model).items()}


@torch.no_grad()
def logits(model, inputs):
    return model.eval()(**inputs).logits


@torch.no_grad()
def descend(model):
    for parameter in trainable(model).values():
        parameter -= 0.1 * parameter.grad


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, tmp_path):
    family = FAMILIES[name]
    base = build(name)
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    torch.manual_seed(3)
    lora_fast.apply_lora(ours, lora_fast.LoraConfig(**family.lora, init_lora_weights=False))
    torch.manual_seed(3)
    theirs = peft_model(theirs, **family.lora, init_lora_weights=False)

    assert type(ours) is type(base)
    assert adapted(ours) == adapted(theirs) != set()
    assert trainable(ours).keys() == trainable(theirs).keys()
    for key, parameter in trainable(ours).items():
        assert torch.equal(parameter, trainable(theirs)[key]), key

    # One training step, dropout included: the model's own and the adapters' draw the same numbers.
    our_logits, our_gradients = step(ours, family.inputs)
    their_logits, their_gradients = step(theirs, family.inputs)
    assert_equal_to_rounding(our_logits, their_logits)
    largest = max(gradient.norm() for gradient in their_gradients.values())
    for key, gradient in their_gradients.items():
        assert_equal_to_rounding(our_gradients[key], gradient, scale=largest)
    descend(ours)
    descend(theirs)
    trained = logits(theirs, family.inputs)
    assert_equal_to_rounding(logits(ours, family.inputs), trained)
    untrained = logits(base, family.inputs)
    assert (trained - untrained).norm() > 1e-3 * untrained.norm()  # a file that is not read can't pass below

    lora_fast.save_adapter(ours, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert_equal_to_rounding(logits(loaded, family.inputs), trained)

    theirs.save_pretrained(tmp_path / "theirs")
    loaded = lora_fast.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert_equal_to_rounding(logits(loaded, family.inputs), trained)
    assert trainable(loaded).keys() == trainable(ours).keys()
