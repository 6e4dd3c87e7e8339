"""Which modules of a model a config means, by PEFT's matching rules; no per-model code."""

import difflib
import itertools
import re
import sys
from collections.abc import Collection, Mapping

from torch import nn

from lora_fast.config import ALL_LINEAR, HEADS_OF_TASK, LoraConfig, LoraFastError, is_wrapper, plain_name
from lora_fast.dispatch import is_plain_matrix
from lora_fast.embedding import LoraEmbedding, embedding_refusal, source_of
from lora_fast.linear import LoraLayer, LoraLinear, is_offloaded
from lora_fast.parameter import LoraOwner, LoraParameter, lora_parameter
from lora_fast.quantized import is_quantized
from lora_fast.subclass import lora_subclass

# Classification heads that PEFT leaves out of "all-linear" for task_type="SEQ_CLS": they are trained in full instead.
_CLASSIFIER_NAMES = ("score", "classifier")
# These models hand out_proj's weight to a kernel instead of calling the module: an adapter on it would do nothing.
_STATE_SPACE_TYPES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
_STATE_SPACE_UNREACHED = ("out_proj", "conv1d")
# In training they read these weights directly too, on some paths or all: PEFT adapts them without effect, and so do we
# (its adapters have to load), but not silently.
_STATE_SPACE_SELDOM_REACHED = ("dt_proj", "x_proj")
# Names that PEFT, on Transformers 5, takes for the stacked weights of experts in a model of the kind that Transformers'
# table of conversions calls this: never for the linear layers of shared experts or dense blocks that bear them.
_TAKEN_FOR_EXPERTS = ("gate_proj", "up_proj", "down_proj")
_KIND_OF_EXPERTS = "qwen2_moe"
# {class of Transformers: its linear layers whose weight it reads without calling them}. Those marked * only on a GPU in
# training, where the kernels of mamba_ssm are installed.
_READS_WEIGHTS_OF = {
    "BambaMixer": ("out_proj",),  # *
    "GraniteMoeHybridMambaLayer": ("out_proj",),  # *
    "Zamba2MambaMixer": ("out_proj",),  # *
    "JambaMambaMixer": ("dt_proj",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "DetrMHAttentionMap": ("k_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
}


def lora_class(module: nn.Module) -> type[LoraLayer] | None:
    """The class that `module` becomes, or None where it is no linear layer or embedding that can carry an adapter.

    A subclass of nn.Linear keeps a forward of its own. One whose weight is packed or sharded carries none, but for
    those of bitsandbytes, of which it is known what the forward computes."""
    if type(module) is nn.Linear:
        return LoraLinear
    if isinstance(module, nn.Embedding) and not isinstance(module, LoraLayer):
        kind = LoraEmbedding if type(module) is nn.Embedding else lora_subclass(type(module))
        return kind if embedding_refusal(module) is None else None
    # transformers is imported only where a module of it was already met: importing lora_fast must not pull it in.
    if type(module).__module__ == "transformers.pytorch_utils" and type(module).__name__ == "Conv1D":
        from lora_fast.conv1d import LoraConv1D

        return LoraConv1D
    if not isinstance(module, nn.Linear) or isinstance(module, (LoraLayer, LoraOwner)):
        return None
    plain = is_plain_matrix(module._parameters.get("weight"), (module.out_features, module.in_features))
    return lora_subclass(type(module)) if plain or is_quantized(module) else None


def _ends_with_one_of(name: str, suffixes: Collection[str]) -> bool:
    return name in suffixes or any(name.endswith(f".{suffix}") for suffix in suffixes)


def _matches_pattern(pattern: str | Collection[str], name: str) -> bool:
    return re.fullmatch(pattern, name) is not None if isinstance(pattern, str) else _ends_with_one_of(name, pattern)


def saved_module_names(model: nn.Module, config: LoraConfig) -> list[str]:
    """The dotted names of the modules that `modules_to_save` means, outermost only: those whose name ends in one of its
    entries.

    Raises LoraFastError for an entry that means none."""
    names = []
    # A module together with its wrapper, which calls what it was given and nothing put in its place.
    outermost = [n for n, _ in model.named_modules() if n and plain_name(n.rpartition(".")[2])]
    heads = HEADS_OF_TASK.get(config.task_type, ())
    for wanted in config.modules_to_save or ():
        found = [name for name in outermost if plain_name(name).endswith(plain_name(wanted))]
        if not found and wanted not in heads:
            raise LoraFastError(f"modules_to_save: no module's name ends in {wanted!r}{_near(model, (wanted,))}")
        names += found
    if heads and not names:
        raise LoraFastError(
            f"task_type={config.task_type!r} trains a head named {' or '.join(heads)}, and {type(model).__name__} has "
            "none; name its head in modules_to_save, or leave task_type out"
        )
    return [n for n in dict.fromkeys(names) if not any(n.startswith(f"{other}.") for other in names)]


def _layer_index(name: str, layers_pattern: str | Collection[str] | None) -> int | None:
    """The first numbered segment of a dotted name, behind one of `layers_pattern` where given."""
    patterns = (layers_pattern,) if isinstance(layers_pattern, str) else layers_pattern or (None,)
    for pattern in patterns:
        expression = r".*?\.[^.]*\.(?P<idx>\d+)\." if pattern is None else rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."
        if match := re.match(expression, name):
            return int(match["idx"])
    return None


def _base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """{dotted name: module} of the model's own modules, without those of adapters and PyTorch's wrappers."""
    modules = {name: module for name, module in model.named_modules() if name and not is_wrapper(module)}
    factors = ("lora_A", "lora_B", "lora_magnitude_vector")
    inside = [f"{name}.{factor}" for name, m in modules.items() if isinstance(m, LoraLayer) for factor in factors]
    inside += [name for name, module in modules.items() if isinstance(module, LoraParameter)]
    return {name: module for name, module in modules.items() if not name.startswith(tuple(inside))}


def embedding_of(module: nn.Module, getter: str = "get_input_embeddings") -> nn.Module | None:
    """What Transformers' getter of this name gives; None where the class has none or refuses, as those of sound do."""
    try:
        found = getattr(module, getter, lambda: None)()
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None


def _is_adaptable_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer that carries adapters or can."""
    return not isinstance(module, nn.Embedding) and (isinstance(module, LoraLayer) or lora_class(module) is not None)


def _all_linear_names(model: nn.Module, config: LoraConfig) -> set[str]:
    linears = {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, LoraParameter) and (isinstance(module, nn.Linear) or _is_adaptable_linear(module))
    }
    head = embedding_of(model, "get_output_embeddings")
    if head is None and config.task_type == "SEQ_CLS":
        head = next((getattr(model, name) for name in _CLASSIFIER_NAMES if hasattr(model, name)), None)
    within_head = set() if head is None else {id(head)}
    return {plain_name(name) for name, module in linears.items() if name and id(module) not in within_head}


def target_modules(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """{dotted name: module} of every module that `config` adapts, in the model's order; {} with target_modules=[].

    Raises LoraFastError where nothing matches (naming near names), or where something matches that `lora_class` has no
    class for."""
    if not config.target_modules:
        return {}
    every = config.target_modules == ALL_LINEAR or (
        isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR
    )
    wanted = _all_linear_names(model, config) if every else config.target_modules
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    targets = {}
    for path, module in _base_modules(model).items():
        name = plain_name(path)
        if config.exclude_modules and any(_matches_pattern(config.exclude_modules, n) for n in {name, path}):
            continue
        if any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in config.modules_to_save or ()):
            continue
        if not any(_matches_pattern(wanted, n) for n in {name, path}):  # written from either
            continue
        # As in PEFT, layers_to_transform chooses among the matches of a name's end; a whole dotted name stands.
        by_end = config.layers_to_transform and name not in wanted
        if by_end and _layer_index(name, config.layers_pattern) not in config.layers_to_transform:
            continue
        if model_type in _STATE_SPACE_TYPES and _ends_with_one_of(name, _STATE_SPACE_UNREACHED):
            raise LoraFastError(
                f"{name} can't be adapted in a {model_type} model: its weight goes to a fused kernel, not through "
                f"the module; add exclude_modules={list(_STATE_SPACE_UNREACHED)}"
            )
        if not isinstance(module, LoraLayer) and lora_class(module) is None:
            if isinstance(module, nn.Embedding):
                raise LoraFastError(f"{name} can't be adapted: {embedding_refusal(module)}; exclude_modules it")
            raise LoraFastError(
                f"{name} is a {type(module).__module__}.{type(module).__qualname__}; lora-fast adapts torch.nn.Linear, "
                "its subclasses whose weight is a plain floating-point matrix (out_features, in_features), those of "
                "bitsandbytes, Transformers' Conv1D, and torch.nn.Embedding. Make the adapter with PEFT and call "
                "accelerate_peft, or exclude_modules it"
            )
        targets[path] = module
    names = [plain_name(name) for name, _ in model.named_modules()]
    if not targets and any(_matches_pattern(wanted, name) for name in names):
        raise LoraFastError(
            f"target_modules={_shown(config.target_modules)} matches modules of {type(model).__name__}, and "
            "exclude_modules, layers_to_transform or modules_to_save takes all of them away"
        )
    if not targets and isinstance(wanted, str) and any(_ends_with_one_of(name, (wanted,)) for name in names):
        raise LoraFastError(
            f"target_modules={wanted!r} matches no module of {type(model).__name__}: a string is a regular expression "
            f"for whole dotted names; write [{wanted!r}] for the modules of that name"
        )
    if not targets:
        missed = config.target_modules if not isinstance(config.target_modules, str) else (config.target_modules,)
        raise LoraFastError(
            f"target_modules={_shown(config.target_modules)} matches no module of {type(model).__name__}"
            f"{_near(model, missed)}"
        )
    return targets


def target_parameters(model: nn.Module, config: LoraConfig) -> dict[str, LoraParameter]:
    """{dotted name: its adapters, or new ones that the model does not hold yet} of every parameter that `config` names,
    in the model's order.

    Raises LoraFastError for a name that matches no parameter, and for a parameter that can't carry an adapter."""
    wanted = config.target_parameters or ()
    found: dict[str, LoraParameter] = {}
    names = []
    modules = {} if not wanted else {"": model} | _base_modules(model)
    for path, module in modules.items():
        for leaf in module._parameters:
            name = f"{path}.{leaf}" if path else leaf
            names.append(plain_name(name))
            if module._parameters[leaf] is None or not _ends_with_one_of(plain_name(name), wanted):
                continue
            if isinstance(module, LoraLayer):
                raise LoraFastError(
                    f"target_parameters: {name} is the weight of a layer that target_modules adapts; name it in one"
                )
            if is_offloaded(module):
                raise LoraFastError(f"target_parameters: {name} is offloaded by accelerate; keep it on a device")
            layer = lora_parameter(module, leaf)
            if reason := layer.refusal():
                raise LoraFastError(f"target_parameters: {name} is {reason}")
            found[name] = layer
    missed = [w for w in wanted if not any(_ends_with_one_of(name, (w,)) for name in names)]
    if missed:
        ends = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))
        near = [n for w in missed for n in difflib.get_close_matches(w, ends, n=3, cutoff=0.6)]
        stacked = [n for n, m in modules.items() for p in m._parameters.values() if p is not None and p.dim() == 3]
        hint = f"; did you mean {', '.join(dict.fromkeys(near))}?" if near else ""
        hint += f"; stacked experts are in {stacked[0]}" if stacked and not near else ""
        raise LoraFastError(
            f"target_parameters={list(wanted)}: no parameter of {type(model).__name__} is named "
            f"{', '.join(map(repr, missed))}{hint}"
        )
    return found


def unmatched(model: nn.Module, wanted: str | Collection[str]) -> str | None:
    """The entries of a list that no module's name ends in, or the pattern that no name is, with near names; None where
    there is none."""
    every = {name for path in _base_modules(model) for name in (path, plain_name(path))}
    patterns = {wanted: wanted} if isinstance(wanted, str) else {entry: (entry,) for entry in wanted}
    missed = [entry for entry, p in patterns.items() if not any(_matches_pattern(p, name) for name in every)]
    return f"{', '.join(map(repr, missed))}{_near(model, missed)}" if missed else None


def unreached(model: nn.Module, names: Collection[str]) -> dict[str, list[str]]:
    """{who: those among `names` whose module is seldom or never called, because who reads its weight directly}."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    modules = {plain_name(name): module for name, module in _base_modules(model).items()}
    found: dict[str, list[str]] = {}
    for name in names:
        owner_name, _, leaf = plain_name(name).rpartition(".")
        owner = type(modules.get(owner_name, model))
        forward = owner.forward
        if model_type in _STATE_SPACE_TYPES and _ends_with_one_of(name, _STATE_SPACE_SELDOM_REACHED):
            found.setdefault(f"in training a {model_type}", []).append(name)
        elif leaf in _READS_WEIGHTS_OF.get(owner.__name__, ()):
            found.setdefault(owner.__name__, []).append(name)
        elif forward is nn.MultiheadAttention.forward and leaf == "out_proj":
            found.setdefault("torch.nn.MultiheadAttention", []).append(name)
        elif forward is nn.TransformerEncoderLayer.forward and leaf in ("linear1", "linear2"):
            # Its fused path, which it takes outside training where its own weights are frozen.
            found.setdefault("in evaluation torch.nn.TransformerEncoderLayer", []).append(name)
        elif reader := _reader_of_embedding(modules, owner, plain_name(name)):
            found.setdefault(reader, []).append(name)
    return found


def _reader_of_embedding(modules: Mapping[str, nn.Module], owner: type[nn.Module], name: str) -> str | None:
    """Who reads the weight of the embedding of this name, in a module of class `owner` that nowhere calls it: that
    class, or another embedding, which it is tied to, as T5's `shared` is; None where it is called or no embedding."""
    module = modules.get(name)
    if not isinstance(module, nn.Embedding):
        return None
    own = itertools.takewhile(lambda kind: kind is not nn.Module, owner.__mro__)
    source = "".join(source_of(kind) for kind in own if "forward" in vars(kind))
    attribute = rf"\bself\.{re.escape(name.rpartition('.')[2])}"
    if not source or re.search(rf"{attribute}\(", source):
        return None
    if re.search(rf"{attribute}\.weight\b(?!\.(device|dtype|shape|size)\b)", source):
        return owner.__name__
    tied = (n for n, m in modules.items() if m is not module and isinstance(m, nn.Embedding))
    return next((n for n in tied if modules[n].weight is module.weight), None)


def unadapted_experts(model: nn.Module, config: LoraConfig) -> list[str]:
    """The modules whose experts `config` seems to mean, "all-linear" or by a bare name, and that hold them as stacked
    parameters, which are no linear layers."""
    wanted = config.target_modules
    if config.target_parameters:  # said by name
        return []
    meant = wanted.lower() == ALL_LINEAR if isinstance(wanted, str) else not set(_TAKEN_FOR_EXPERTS).isdisjoint(wanted)
    if not meant:
        return []
    return [
        name
        for name, module in _base_modules(model).items()
        if any(n.endswith("_proj") and p is not None and p.dim() == 3 for n, p in module._parameters.items())
    ]


def expert_weights(model: nn.Module, name: str) -> list[str]:
    """What to name in target_parameters for the experts in the module of this name."""
    owner = name.rpartition(".")[2]
    parameters = model.get_submodule(name)._parameters.items()
    return [f"{owner}.{leaf}" for leaf, weight in parameters if weight is not None and weight.dim() == 3]


def misread_by_peft(model: nn.Module, names: Collection[str]) -> list[str]:
    """Those among the adapted `names` that PEFT takes for experts, so that it won't load them from a file."""
    table = getattr(sys.modules.get("transformers.conversion_mapping"), "_MODEL_TO_CONVERSION_PATTERN", {})
    if table.get(getattr(getattr(model, "config", None), "model_type", None)) != _KIND_OF_EXPERTS:
        return []
    return [name for name in names if name.rpartition(".")[2] in _TAKEN_FOR_EXPERTS]


def _shown(value: str | Collection[str]) -> str:
    return repr(value) if isinstance(value, str) else repr(list(value))


def _near(model: nn.Module, wanted: Collection[str]) -> str:
    """What to write instead: the nearest names that exist, else the names of the linear layers."""
    ends = [(plain_name(name).rpartition(".")[2], module) for name, module in _base_modules(model).items()]
    last = list(dict.fromkeys(n for n, m in ends if _is_adaptable_linear(m)))
    every = list(dict.fromkeys(name for name, _ in ends))
    near = [n for w in wanted for n in difflib.get_close_matches(w.rpartition(".")[2], every, n=3, cutoff=0.6)]
    if near:
        return f"; did you mean {', '.join(dict.fromkeys(near))}? Its linear layers are {', '.join(last) or 'none'}"
    return f"; its linear layers are {', '.join(last) or 'none'}"
