"""The frozen, validated description of one LoRA adapter, and the package's one error class.

Field names and meanings are PEFT's, so that a config can go into and come out of an `adapter_config.json`."""

import math
import re
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

ALL_LINEAR = "all-linear"


class LoraFastError(ValueError):
    """Everything that lora-fast refuses: the message names the argument, its value, what was expected and the
    remedy."""


class LoraFastWarning(UserWarning):
    """Something that lora-fast does as told, but that is seldom meant."""


# These take their start off the base weight; the others set A and B alone.
BASE_CHANGING_INITS = ("pissa", "olora")
INITS = (True, False, "gaussian", *BASE_CHANGING_INITS)

# Fields that PEFT's config has and that change nothing at these values, and are refused at any other: ignoring one
# would silently compute something else.
_UNSUPPORTED_PEFT_FIELDS: Mapping[str, tuple] = {
    "lora_bias": (False, None),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "megatron_config": (None, {}),
    "corda_config": (None, {}),
    "lora_ga_config": (None, {}),
    "loftq_config": (None, {}),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None, {}),
    "use_qalora": (False, None),
    "use_bdlora": (False, None, {}),
    "velora_config": (None, {}),
    "kasa_config": (None, {}),
    "monteclora_config": (None, {}),
    "ensure_weight_tying": (False, None),
}
# Fields that say where an adapter comes from or how it started, or that act only together with an unsupported one.
_INERT_PEFT_FIELDS = frozenset(
    {"peft_type", "peft_version", "megatron_core", "qalora_group_size", "inference_mode", "eva_config"}
)
# Heads that PEFT adds to modules_to_save for a task, because they start untrained: those of these names that exist.
HEADS_OF_TASK: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# Before it PEFT took the first of an expert's sides for its input, whichever it was.
_EXPERTS_AS_NOW = (0, 19, 1)
# Values of init_lora_weights that, once an adapter is saved, no longer matter: they set A and B alone, which the file
# replaces.
_INITS_OF_FACTORS_ALONE = frozenset({"gaussian", "orthogonal", "eva"})


def _names(value: str | Collection[str] | None, name: str) -> str | tuple[str, ...] | None:
    """A regex (str) as it is; names as a tuple (sorted where the collection has no order of its own)."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, Collection) or not all(isinstance(item, str) for item in value):
        raise LoraFastError(f"{name}={value!r}; expected a list of module names, a regex or None")
    return tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)


@dataclass(frozen=True)
class LoraConfig:
    """One LoRA adapter: which modules get y += scaling · drop(x) lora_Aᵀ lora_Bᵀ, with which rank, scaling and start.

    r: rank R, a whole number ≥ 1.
    lora_alpha: scaling = lora_alpha / R, or lora_alpha / √R with use_rslora (arXiv:2312.03732).
    lora_dropout: probability p in [0, 1) of the dropout on the input of lora_A.
    target_modules: module names (each matches a whole dotted name or its end), a regex matched against the whole dotted
        name, or "all-linear" (the default): every nn.Linear, subclasses too, and Conv1D but the output head. An
        nn.Embedding that is named is adapted too, as in PEFT without dropout.
    target_parameters: names of parameters (whole dotted names or their ends) that get ΔW = scaling · B A themselves,
        where no linear layer holds them: the stacked experts of a mixture ("experts.gate_up_proj"), each with factors
        of rank R of its own, or a router's weight. As in PEFT they take no dropout, and target_modules=[] adapts them
        alone.
    exclude_modules: the forms of target_modules, taken away.
    use_dora: DoRA (arXiv:2402.09353): each row of W + ΔW in a trained length of its own.
    layers_to_transform, layers_pattern: only layers of these indices (with names only).
    rank_pattern, alpha_pattern: {regex: r or alpha} for modules whose dotted name ends in a match; the first wins.
    modules_to_save: names of modules trained in full and saved with the adapter.
    bias: "none", "all" (every bias of the model is trained) or "lora_only" (those of the adapted modules).
    init_lora_weights: True (A Kaiming-uniform, B zero), "gaussian" (A normal with std 1/R, B zero), False (both as a
        linear layer starts; the update is not zero), "pissa" (arXiv:2404.02948) or "olora" (arXiv:2406.01775); the last
        two also change the base weight.
    fan_in_fan_out: weight is stored (K, N), as in GPT-2's Conv1D; corrected where it contradicts the module.
    task_type: as in PEFT, "SEQ_CLS", "TOKEN_CLS" and "QUESTION_ANS" add the model's head to modules_to_save.
    base_model_name_or_path, revision, auto_mapping: carried into the saved config for PEFT; the last is the model's
        class, written where there is no task_type.

    Raises LoraFastError for a value out of range."""

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | Collection[str] = ALL_LINEAR
    exclude_modules: str | Collection[str] | None = None
    target_parameters: Collection[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: int | Collection[int] | None = None
    layers_pattern: str | Collection[str] | None = None
    modules_to_save: Collection[str] | None = None
    bias: str = "none"
    init_lora_weights: bool | str = True
    fan_in_fan_out: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    auto_mapping: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731 - the one way into a frozen dataclass
        _check_rank(self.r, "r")
        _check_alpha(self.lora_alpha, "lora_alpha")
        if not isinstance(self.lora_dropout, (int, float)) or not 0 <= self.lora_dropout < 1:
            raise LoraFastError(f"lora_dropout={self.lora_dropout!r}; expected a probability in [0, 1)")
        if self.bias not in ("none", "all", "lora_only"):
            raise LoraFastError(f"bias={self.bias!r}; expected 'none', 'all' or 'lora_only'")
        if not any(self.init_lora_weights is i or self.init_lora_weights == i != True for i in INITS):  # noqa: E712 - 1 == True
            raise LoraFastError(
                f"init_lora_weights={self.init_lora_weights!r}; expected True, False, 'gaussian', 'pissa' or 'olora'"
            )
        if not self.target_modules and not self.target_parameters:
            raise LoraFastError(
                f"target_modules={self.target_modules!r}; expected module names, a regex or '{ALL_LINEAR}'"
            )
        for name in ("target_modules", "exclude_modules", "target_parameters", "layers_pattern", "modules_to_save"):
            set_(name, _names(getattr(self, name), name))
        for name, what in (("modules_to_save", "module"), ("target_parameters", "parameter")):
            if isinstance(getattr(self, name), str):
                raise LoraFastError(f"{name}={getattr(self, name)!r}; expected a list of {what} names")
        if self.target_parameters and self.lora_dropout:
            raise LoraFastError(
                f"lora_dropout={self.lora_dropout!r} with target_parameters={list(self.target_parameters)}: PEFT has "
                "no dropout there and would not load the adapter; expected 0"
            )
        if self.target_parameters and self.bias != "none":
            raise LoraFastError(
                f"bias={self.bias!r} with target_parameters={list(self.target_parameters)}: which biases go with a "
                "parameter is not told; expected 'none'"
            )
        if self.target_parameters and self.use_dora:
            raise LoraFastError(
                f"use_dora=True with target_parameters={list(self.target_parameters)}: DoRA scales what a layer gives; "
                "expected False"
            )
        if self.target_parameters and self.init_lora_weights in BASE_CHANGING_INITS:
            raise LoraFastError(
                f"init_lora_weights={self.init_lora_weights!r} starts from a layer's weight; with target_parameters "
                "expected True, False or 'gaussian'"
            )
        if self.task_type in tuple(HEADS_OF_TASK):
            wanted = (*(self.modules_to_save or ()), *HEADS_OF_TASK[self.task_type])
            set_("modules_to_save", tuple(dict.fromkeys(wanted)))
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), str):
                _check_regex(getattr(self, name), name)
        for name in ("use_rslora", "use_dora", "fan_in_fan_out"):
            if not isinstance(getattr(self, name), bool):
                raise LoraFastError(f"{name}={getattr(self, name)!r}; expected True or False")
        for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
            pattern = getattr(self, name) or {}
            if not isinstance(pattern, Mapping) or not all(isinstance(key, str) for key in pattern):
                raise LoraFastError(f"{name}={pattern!r}; expected a mapping from regular expressions to numbers")
            for key, value in pattern.items():
                _check_regex(key, name)
                check(value, f"{name}[{key!r}]")
            set_(name, MappingProxyType(dict(pattern)))
        if self.auto_mapping is not None:
            set_("auto_mapping", MappingProxyType(dict(self.auto_mapping)))
        patterns = (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern or ()
        for name, values in (("layers_pattern", patterns), ("modules_to_save", self.modules_to_save or ())):
            for value in values:
                _check_regex(value, name)
        if self.init_lora_weights == "pissa" and min(self.lora_alpha, *self.alpha_pattern.values(), 1) <= 0:
            raise LoraFastError(
                "init_lora_weights='pissa' splits the weight by the scaling; lora_alpha must be above 0"
            )
        indices = self.layers_to_transform
        if indices is not None:
            listed = (indices,) if isinstance(indices, int) else indices
            whole = isinstance(listed, Collection) and all(type(i) is int and i >= 0 for i in listed)
            if not whole:
                raise LoraFastError(f"layers_to_transform={indices!r}; expected a layer's index, or a list of them")
            indices = tuple(listed)
            set_("layers_to_transform", indices)
        if (indices is not None or self.layers_pattern) and isinstance(self.target_modules, str):
            raise LoraFastError(
                "layers_to_transform and layers_pattern work on module names; "
                f"target_modules={self.target_modules!r} is one pattern: write the layers into it"
            )
        if self.layers_pattern and indices is None:
            raise LoraFastError(
                f"layers_pattern={_plain(self.layers_pattern)!r} says where layers_to_transform counts; give that too"
            )

    def __getstate__(self) -> dict[str, Any]:  # MappingProxyType can't be pickled or deep-copied
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __hash__(self) -> int:  # nor hashed, and equal mappings may differ in order
        values = (getattr(self, f.name) for f in fields(self))
        return hash(tuple(frozenset(v.items()) if isinstance(v, MappingProxyType) else v for v in values))

    def rank_of(self, module_name: str) -> int:
        """R of the module of this dotted name."""
        return self.rank_pattern.get(_matching_key(self.rank_pattern, module_name), self.r)

    def alpha_of(self, module_name: str) -> float:
        """alpha of the module of this dotted name."""
        return self.alpha_pattern.get(_matching_key(self.alpha_pattern, module_name), self.lora_alpha)

    def scaling_of(self, module_name: str) -> float:
        """scaling of the module of this dotted name: alpha / R, or alpha / √R with use_rslora."""
        rank = self.rank_of(module_name)
        return self.alpha_of(module_name) / (math.sqrt(rank) if self.use_rslora else rank)

    def with_exact_patterns(self, module_names: Collection[str]) -> "LoraConfig":
        """The same ranks and alphas, in patterns whose order doesn't matter.

        PEFT writes its patterns sorted by key and lets the first match win: overlapping keys change their meaning on
        the way through a file. Where two keys match one module, both patterns become exact module names."""
        overlap = any(
            sum(_matches(key, name) for key in pattern) > 1
            for pattern in (self.rank_pattern, self.alpha_pattern)
            for name in module_names
        )
        if not overlap:
            return self
        ranks = {name: self.rank_of(name) for name in module_names if self.rank_of(name) != self.r}
        alphas = {name: self.alpha_of(name) for name in module_names if self.alpha_of(name) != self.lora_alpha}
        escape = {name: "^" + re.escape(name) for name in module_names}
        return replace(
            self,
            rank_pattern={escape[n]: r for n, r in ranks.items()},
            alpha_pattern={escape[n]: a for n, a in alphas.items()},
        )

    def to_peft(self) -> dict[str, Any]:
        """The fields of PEFT's `adapter_config.json`."""
        own = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        if not self.target_parameters:  # which PEFT's older versions don't know
            del own["target_parameters"]
        return {**own, "peft_type": "LORA", "inference_mode": True}

    @classmethod
    def from_peft(cls, peft_config: Mapping[str, Any], *, source: str = "adapter_config.json") -> "LoraConfig":
        """From the content of an `adapter_config.json`. Raises LoraFastError naming any field that would change the
        result and that lora-fast doesn't know how to honour."""
        if not isinstance(peft_config, Mapping):
            raise LoraFastError(f"{source} holds a {type(peft_config).__name__}; expected a JSON object")
        kind = peft_config.get("peft_type")
        if kind != "LORA":
            raise LoraFastError(f"{source}: peft_type={kind!r}; only 'LORA' adapters can be loaded")
        known = {f.name for f in fields(cls)}
        for name, value in peft_config.items():
            neutral = _UNSUPPORTED_PEFT_FIELDS.get(name, (None, False, "", [], {}))
            if name in known or name in _INERT_PEFT_FIELDS or any(value is n or value == n for n in neutral):
                continue
            raise LoraFastError(
                f"{source}: {name}={value!r} is not supported by lora-fast and would change the result; "
                f"load this adapter with PEFT, or set {name} to {neutral[0]!r} if it is not meant"
            )
        for name in ("r", "lora_alpha"):
            if name in peft_config and peft_config[name] is None:
                raise LoraFastError(f"{source}: {name} is null; expected a number")
        values = {name: peft_config[name] for name in known if name in peft_config and peft_config[name] is not None}
        if peft_config.get("target_modules") is None and peft_config.get("target_parameters"):
            values["target_modules"] = []
        elif peft_config.get("target_modules") is None:
            raise LoraFastError(f"{source}: target_modules is missing; write the names of the adapted modules into it")
        version = str(peft_config.get("peft_version") or "")
        if values.get("target_parameters") and version and _release(version) < _EXPERTS_AS_NOW:
            raise LoraFastError(
                f"{source}: peft_version={version!r} stored target_parameters with lora_A and lora_B exchanged (PEFT "
                f"{'.'.join(map(str, _EXPERTS_AS_NOW))} turned them); train it again, or convert it with that PEFT"
            )
        init = values.get("init_lora_weights", True)
        if isinstance(init, str) and init.lower() in _INITS_OF_FACTORS_ALONE:
            values["init_lora_weights"] = True
        return cls(**values)


def _release(version: str) -> tuple[int, ...]:
    """(0, 19, 1) of "0.19.1.dev0"."""
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def _plain(value: Any) -> Any:
    """Without the immutable containers: what JSON and pickle take."""
    if isinstance(value, MappingProxyType):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _check_rank(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LoraFastError(f"{name}={value!r}; expected a whole number of at least 1")


def _check_alpha(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise LoraFastError(f"{name}={value!r}; expected a finite number")


def _check_regex(value: str, name: str) -> None:
    try:
        re.compile(value)
    except re.error as e:
        raise LoraFastError(f"{name}: {value!r} is not a regular expression ({e})") from None


# What PyTorch's wrappers of a module put into the names of all that is in it: torch.compile, FullyShardedDataParallel,
# activation checkpointing.
_WRAPPED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def plain_name(name: str) -> str:
    """A dotted name as it is in the model without wrappers: what configs and files mean."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def inside_of(module: Any) -> Any:
    """The module itself inside PyTorch's wrappers."""
    while is_wrapper(module):
        module = module._modules[next(iter(_WRAPPED & module._modules.keys()))]
    return module


def is_wrapper(module: Any) -> bool:
    """Whether a module is one of PyTorch's wrappers around the module that it is named after."""
    return not _WRAPPED.isdisjoint(module._modules)


def _matches(key: str, module_name: str) -> bool:
    # Either name: a pattern may have been written from the wrapped model's.
    return any(re.match(rf"(.*\.)?({key})$", name) for name in (plain_name(module_name), module_name))


def _matching_key(pattern: Collection[str], module_name: str) -> str | None:
    return next((key for key in pattern if _matches(key, module_name)), None)


def few(names: Sequence[str]) -> str:
    """The first three of them, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def warn(message: str) -> None:
    """A LoraFastWarning shown at the line that called into lora_fast."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("lora_fast", "contextlib"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, LoraFastWarning, stacklevel=level)
