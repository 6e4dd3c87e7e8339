"""Tiny Transformers models with random weights, one per family, and what tests ask of our model and PEFT's alike."""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

torch.set_num_threads(1)  # on tensors this small a second thread only waits: up to 30 times as long on busy cores

VOCABULARY = 61  # sizes that no tile divides
TOKENS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(11))
CAUSAL_LM = {"input_ids": TOKENS, "labels": TOKENS}


@dataclass(frozen=True)
class Family:
    """One family: the Transformers class, the fields of its config, the inputs of a step, the fields of LoraConfig."""

    model_class: str
    config_class: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Tensor] = field(default_factory=lambda: CAUSAL_LM)
    lora: Mapping[str, Any] = field(default_factory=lambda: {"target_modules": "all-linear"})


_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_LABELS = torch.tensor([0, 2])
_IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(12))
_SOUND = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(13))

FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM", "LlamaConfig", _GROUPED, lora={"target_modules": "all-linear", "r": 5, "lora_dropout": 0.1}
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        _GROUPED,
        lora={"target_modules": "all-linear", "r": 3, "use_rslora": True, "bias": "lora_only"},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "Qwen3Config",
        _GROUPED | {"head_dim": 8},
        lora={
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "r": 4,
            "rank_pattern": {"layers.1.self_attn.q_proj": 7, "self_attn.*": 2},
            "alpha_pattern": {"q_proj": 24, "layers.0.mlp.down_proj": 3},
        },
    ),
    "mistral": Family(
        "MistralForCausalLM",
        "MistralConfig",
        _GROUPED,
        lora={"target_modules": r".*\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.up_proj)", "r": 8, "lora_alpha": 32},
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _GROUPED | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        lora={"target_modules": "all-linear", "r": 4, "alpha_pattern": {"gate_proj|up_proj": 17}},
    ),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 32,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        lora={"target_modules": "all-linear", "r": 4, "lora_dropout": 0.05, "bias": "all", "fan_in_fan_out": True},
    ),
    "gpt_neox": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", _SIZES),
    "falcon": Family(
        "FalconForCausalLM",
        "FalconConfig",
        {k: v for k, v in _SIZES.items() if k != "intermediate_size"} | {"bias": True},
        lora={"target_modules": "all-linear", "r": 4, "lora_dropout": 0.1, "bias": "lora_only"},
    ),
    "opt": Family(
        "OPTForCausalLM",
        "OPTConfig",
        _SIZES | {"ffn_dim": 44, "word_embed_proj_dim": 24},
        lora={"target_modules": ["q_proj", "out_proj", "fc1"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "bert": Family(
        "BertForSequenceClassification",
        "BertConfig",
        _SIZES | {"num_labels": 3},
        inputs={"input_ids": TOKENS, "labels": _LABELS},
        lora={"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"},
    ),
    "roberta": Family(
        "RobertaForSequenceClassification",
        "RobertaConfig",
        _SIZES | {"num_labels": 3},
        inputs={"input_ids": TOKENS, "labels": _LABELS},
        lora={"target_modules": "all-linear", "modules_to_save": ["classifier"], "lora_dropout": 0.2},
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 44,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": VOCABULARY,
            "num_mel_bins": 8,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 44,
            "decoder_ffn_dim": 44,
            "max_source_positions": 10,
            "max_target_positions": 16,
            "pad_token_id": 2,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 1,
        },
        inputs={"input_features": _SOUND, "labels": TOKENS},
        lora={"target_modules": ["q_proj", "v_proj", "fc2"], "exclude_modules": ["encoder.layers.0.fc2"]},
    ),
    "vit": Family(
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 32,
            "intermediate_size": 44,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 12,
            "patch_size": 4,
            "num_labels": 3,
        },
        inputs={"pixel_values": _IMAGES, "labels": _LABELS},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        "MixtralConfig",
        _GROUPED | {"num_local_experts": 3},
        lora={"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "r": 4},
    ),
    "mamba": Family(
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 6},
        # The other projections' weights are read by the mixer itself in training: no adapter on them is ever called.
        lora={"target_modules": ["in_proj"], "r": 4},
    ),
}


def build(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """A fresh model of the family in training mode; `config` overrides fields. A seed always gives the same weights."""
    import transformers

    chosen = FAMILIES[family]
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = getattr(transformers, chosen.model_class)(
        getattr(transformers, chosen.config_class)(**{**chosen.config, **config})
    )
    with torch.no_grad():  # Transformers starts biases at 0 and norms at 1: all the same would hide a swap
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.02)
    torch.set_rng_state(state)
    return model.to(dtype).train()


def peft_model(model: nn.Module, **lora: Any) -> nn.Module:
    """`model` wrapped by PEFT, with its defaults for everything but `lora`."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(**lora))


def pair(family, lora, *, seed=5, dtype=torch.float32, **config):
    """Our model and PEFT's on the same weights, with the same config, started under the same seed."""
    import lora_fast

    base = build(family, dtype=dtype, **config)
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lora_fast.LoraFastWarning)
        lora_fast.apply_lora(ours, lora_fast.LoraConfig(**lora))
    torch.manual_seed(seed)
    return ours, peft_model(theirs, **lora)


def injected(family="llama", *, seed=5, dtype=torch.float32, lora=None, model=None, name="default", **config):
    """A model with an adapter whose update is not zero."""
    import lora_fast

    model = build(family, dtype=dtype, **config) if model is None else model
    torch.manual_seed(seed)
    lora = {"r": 4, "lora_alpha": 8, "init_lora_weights": False} | (lora or {})
    return lora_fast.apply_lora(model, lora_fast.LoraConfig(**lora), adapter_name=name)


@torch.no_grad()
def logits(model, inputs=CAUSAL_LM):
    return model.eval()(**inputs).logits


def plain_name(name: str) -> str:
    """A parameter's name as it is without PEFT's wrappers and without the adapter's name."""
    for part in ("base_model.model.", ".base_layer", ".modules_to_save.default", ".default"):
        name = name.replace(part, "")
    return name


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """{plain name: parameter} of all that requires a gradient, in our model or PEFT's."""
    return {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def adapted(model: nn.Module) -> set[str]:
    """The dotted names of the modules that carry an adapter, in our model or PEFT's."""
    names = {name.partition(".lora_A.")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    return {plain_name(name) for name in names}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a refusal must leave as it was: state dict, classes, identities, requires_grad, hooks, attributes."""
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "parameters": {n: (id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)},
        "modules": {
            n: (id(m), type(m), m.training, sorted(m.__dict__), len(m._forward_hooks)) for n, m in model.named_modules()
        },
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert list(after["values"]) == list(before["values"])
    for name, value in after["values"].items():
        assert torch.equal(value, before["values"][name]), name
    assert after["parameters"] == before["parameters"]
    assert after["modules"] == before["modules"]
