"""LoRA adapters put into a model, switched and taken out again, in place: by predicate, with no per-model code."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MethodType

import torch
from torch import Tensor, nn

from lora_fast.backend import check_backend
from lora_fast.config import BASE_CHANGING_INITS, LoraConfig, LoraFastError, few, inside_of, plain_name, warn
from lora_fast.distributed import check_matrices, distribution_of, give_back, inside_wrapper, overwrite
from lora_fast.linear import LoraLayer, adapter_spec, is_offloaded
from lora_fast.parameter import (
    LoraOwner,
    LoraParameter,
    attach,
    child_name,
    lora_owner,
    lora_parameters_of,
)
from lora_fast.quantized import is_quantized, keep_packing, matrix_shape
from lora_fast.shared_input import find_groups
from lora_fast.swiglu_mlp import fuse_mlps, unfuse_mlps
from lora_fast.targets import (
    embedding_of,
    expert_weights,
    lora_class,
    saved_module_names,
    target_modules,
    target_parameters,
    unadapted_experts,
    unmatched,
    unreached,
)

_STATE = "_lora_fast_state"


@dataclass
class LoraState:
    """What lora-fast remembers about a model, kept as a plain attribute of it: copied, pickled and dropped with the
    model.

    trained_before: the parameters that required a gradient before the first adapter. biases: those that an adapter
    trains, as they were. replaced: other weights of the base that an adapter's file brought along, as they were.
    originals, copies: the modules of modules_to_save as they were, and each adapter's copy of them, by dotted name.
    adapted: the plain names of the modules that hold each adapter's factors.
    kept_packed: the layers that `keep_packing` changed."""

    configs: dict[str, LoraConfig] = field(default_factory=dict)
    trainable: dict[str, bool] = field(default_factory=dict)
    trained_before: frozenset[str] = frozenset()
    biases: dict[str, Tensor] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    originals: dict[str, nn.Module] = field(default_factory=dict)
    copies: dict[str, dict[str, nn.Module]] = field(default_factory=dict)
    adapted: dict[str, frozenset[str]] = field(default_factory=dict)
    hooks: list = field(default_factory=list)
    kept_packed: list[nn.Module] = field(default_factory=list)
    active: str | None = None
    disabled: bool = False
    merged_keep: str | None = None


class _CheckpointInput:
    """Lets gradients into a checkpointed layer that starts from a frozen embedding: reentrant checkpointing needs an
    input that requires a gradient, and without one silently returns none for the adapters. A no-op unless the model
    checkpoints."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, module: nn.Module, args: tuple, output: object) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not isinstance(output, Tensor):
            return
        if output.requires_grad or not self._checkpoints():
            return
        output.requires_grad_(True)

    def _checkpoints(self) -> bool:
        name = "is_activation_checkpointing"  # Transformers' newer name; reading the older one warns
        older = "is_gradient_checkpointing"
        return bool(getattr(self.model, name if hasattr(type(self.model), name) else older, False))

    def __deepcopy__(self, memo: dict) -> "_CheckpointInput":
        # A copied embedding must not bring a copy of the whole model along; a copied model has its copy in `memo`.
        return _CheckpointInput(memo.get(id(self.model), self.model))


def lora_state(model: nn.Module) -> LoraState:
    """The state of a model that carries adapters. Raises LoraFastError where it carries none."""
    give_back(model)
    state = model.__dict__.get(_STATE)
    if state is None and (inner := inside_wrapper(model)):
        raise LoraFastError(f"model is wrapped in a {type(model).__name__}; work on the model inside: model.{inner}")
    if state is None:
        raise LoraFastError(
            f"{type(model).__name__} carries no lora-fast adapter; call apply_lora or load_adapter on it first"
        )
    return state


def still_carries(model: nn.Module, state: LoraState) -> bool:
    """Whether this is the model's state still, which `remove_lora` drops."""
    return model.__dict__.get(_STATE) is state


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """{dotted name: layer} of every adapted linear layer and parameter."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {layer.adapted_name(name): layer for name, layer in layers.items()}


def _standing(state: LoraState, adapter_name: str | None, disabled: bool) -> dict[str, nn.Module]:
    """{dotted name: module} of modules_to_save as they stand with this adapter active, or with adapters disabled."""
    return state.originals | ({} if disabled else state.copies.get(adapter_name, {}))


def _replaced(model: nn.Module, state: LoraState) -> dict[str, set[str]]:
    """{dotted name: the adapters that lost something there} of the modules that another one was put in the place of:
    those with factors, and those of modules_to_save that stand in the model now. One that is inside of what took its
    place, as of a wrapper, is still there; a name that leads nowhere was taken out with its adapter."""
    modules: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        modules.setdefault(plain_name(path), module)  # a wrapper comes before its inside
    lost: dict[str, set[str]] = {}
    for adapter, names in state.adapted.items():
        for name in names & modules.keys():
            parts = (part for part in modules[name].modules() if isinstance(part, LoraLayer))
            if not any(adapter in part.adapter_specs for part in parts):
                lost.setdefault(name, set()).add(adapter)
    for name, module in _standing(state, state.active, state.disabled).items():
        there = modules.get(plain_name(name))
        if there is None or all(part is not inside_of(module) for part in there.modules()):
            trained = not state.disabled and name in state.copies.get(state.active, {})
            lost.setdefault(name, set()).update({state.active} if trained else ())
    return lost


def _resized(state: LoraState, others: Mapping[str, nn.Module]) -> list[str]:
    """The names of modules_to_save that stand in the model now and are of other sizes than `others`, which would take
    their place."""
    standing = _standing(state, state.active, state.disabled)
    return [name for name, other in others.items() if name in standing and _sizes(standing[name]) != _sizes(other)]


def _sizes(module: nn.Module) -> list[int]:
    """What resizing changes. Not the weights' shapes, which FullyShardedDataParallel changes too."""
    attributes = [part.__dict__.get(size) for part in module.modules() for size in ("num_embeddings", "out_features")]
    return [size for size in attributes if size is not None]


def check_in_place(
    model: nn.Module,
    state: LoraState,
    *,
    adapter_name: str | None = None,
    others: Mapping[str, nn.Module] | None = None,
) -> None:
    """Raises LoraFastError where a module that an adapter was put into was replaced since, or one of modules_to_save;
    where adapter_name is given, only one of what that adapter trains. others: the modules that would take the place of
    modules_to_save, which must not have been resized."""
    lost = [n for n, adapters in _replaced(model, state).items() if adapter_name is None or adapter_name in adapters]
    for names, done in ((lost, "replaced"), (_resized(state, others or {}), "resized")):
        if names:
            were = "was" if len(names) == 1 else "were"
            raise LoraFastError(
                f"{few(sorted(map(plain_name, names)))} {were} {done} after its adapter was put in "
                "(resize_token_embeddings does that); resize first, then apply_lora: remove_lora(model) leaves what is "
                "there now"
            )


def check_injection(model: nn.Module, config: LoraConfig, adapter_name: str) -> dict[str, nn.Module]:
    """The modules and parameters that apply_lora would adapt, having changed nothing. Raises LoraFastError where it
    could not."""
    if not isinstance(model, nn.Module):
        raise LoraFastError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if not isinstance(config, LoraConfig):
        remedy = "; LoraConfig.from_peft(config.to_dict()) makes one of PEFT's" if hasattr(config, "peft_type") else ""
        kind = f"{type(config).__module__}.{type(config).__name__}"
        raise LoraFastError(f"config is a {kind}; expected a lora_fast.LoraConfig{remedy}")
    if told := distribution_of(model):
        raise LoraFastError(
            f"model is {told}, so that nothing would average the gradients of adapters put in now; put them in first, "
            "then distribute the model"
        )
    if inner := inside_wrapper(model):
        raise LoraFastError(f"model is wrapped in a {type(model).__name__}; work on the model inside: model.{inner}")
    if hasattr(model, "peft_config"):
        raise LoraFastError(f"{type(model).__name__} already carries PEFT adapters; call accelerate_peft(model) on it")
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise LoraFastError(f"adapter_name={adapter_name!r}; expected a name without dots")
    if hasattr(nn.ModuleDict(), adapter_name):
        raise LoraFastError(f"adapter_name={adapter_name!r} is an attribute of torch.nn.ModuleDict; choose another")
    state = model.__dict__.get(_STATE)
    if state is not None:
        if adapter_name in state.configs:
            raise LoraFastError(
                f"adapter {adapter_name!r} is there already; choose another adapter_name, or remove_lora(model) first"
            )
        if state.merged_keep is not None:
            raise LoraFastError(f"adapter {state.active!r} is merged; unmerge_lora(model) before adding another")
        check_in_place(model, state, others=state.originals)
        changed = [n for n, c in state.configs.items() if c.init_lora_weights in BASE_CHANGING_INITS]
        if changed or config.init_lora_weights in BASE_CHANGING_INITS:
            raise LoraFastError(
                "an adapter that started with PiSSA or OLoRA changes the base weight and must be the only one; here "
                f"would be {', '.join(map(repr, (*state.configs, adapter_name)))}"
            )
        if config.bias != "none" and state.biases:
            raise LoraFastError(
                "two adapters can't both train the base's biases: there is one set of them; use bias='none'"
            )
    elif nested := next((name for name, m in model.named_modules() if _STATE in m.__dict__), None):
        raise LoraFastError(
            f"its submodule {nested} carries adapters of its own; remove_lora it, or work on that submodule"
        )
    if config.bias != "none":
        empty = next((n for n, p in model.named_parameters() if p.is_meta and n.rpartition(".")[2] == "bias"), None)
        if empty is not None:
            raise LoraFastError(
                f"bias={config.bias!r}: {empty} is on the meta device (not loaded yet, or offloaded), and remove_lora "
                "has to know what it was; load the model first"
            )
    targets = target_modules(model, config)
    parameters = target_parameters(model, config)
    for name, layer in parameters.items():
        if layer.owner in targets.values():
            raise LoraFastError(f"target_parameters: {name} is the weight of a layer that target_modules adapts too")
    targets |= parameters
    for name in targets:
        if saved := next((s for s in (state.originals if state else ()) if f"{name}.".startswith(f"{s}.")), None):
            raise LoraFastError(
                f"{name} is in modules_to_save of another adapter, which trains a copy of {saved}; exclude_modules it, "
                "or remove_lora(model) first"
            )
    for name in saved_module_names(model, config):
        if any(isinstance(module, LoraLayer) for module in model.get_submodule(name).modules()):
            raise LoraFastError(
                f"modules_to_save: {name} carries another adapter's factors, and is trained whole or by factors, not "
                "both; leave it out here, or remove_lora(model) first"
            )
        if any(is_offloaded(module) for module in model.get_submodule(name).modules()):
            raise LoraFastError(f"modules_to_save: {name} is offloaded by accelerate; keep it on a device to train it")
        if any(map(is_quantized, model.get_submodule(name).modules())):
            raise LoraFastError(
                f"modules_to_save: {name} is quantized and can't be trained whole; leave it out when the model is "
                "quantized (llm_int8_skip_modules), or adapt it by target_modules"
            )
    for name, module in targets.items():
        if config.use_dora and (reason := _dora_refusal(module)):
            raise LoraFastError(f"use_dora=True: {name} is {reason}")
        if isinstance(module, LoraParameter):
            name, module = name.rpartition(".")[0], module.owner
        attribute = "_old_forward" if "_hf_hook" in module.__dict__ else "forward"  # accelerate's hook calls the former
        if attribute in module.__dict__ and not _is_its_class_forward(module, attribute):
            raise LoraFastError(f"{name}.forward was replaced on the instance; undo that first, or don't target it")
    return targets


def _dora_refusal(module: nn.Module) -> str | None:
    """Why DoRA can't have the lengths of this target's rows, and the remedy, or None."""
    if isinstance(module, nn.Embedding) or is_quantized(module):
        kind = "quantized" if is_quantized(module) else "an embedding"
        return f"{kind}; name it in exclude_modules, or use PEFT for it"
    if is_offloaded(module):
        return "offloaded by accelerate; keep it on a device, or name it in exclude_modules"
    return None


def _is_its_class_forward(module: nn.Module, attribute: str = "forward") -> bool:
    """Whether this attribute of the instance is just its class's forward, bound: what accelerate leaves when it takes a
    hook off."""
    return getattr(module.__dict__.get(attribute), "__func__", None) is type(module).forward


def check_base(layers: Mapping[str, LoraLayer]) -> None:
    """Raises LoraFastError where an adapter changed base weights at its start that can't be put back now."""
    check_matrices({name: layer for name, layer in layers.items() if layer._weight_before_init is not None})


def check_adapter_dtype(adapter_dtype: torch.dtype) -> None:
    """Raises LoraFastError where adapter_dtype can't hold master copies."""
    if not isinstance(adapter_dtype, torch.dtype) or not adapter_dtype.is_floating_point or adapter_dtype.itemsize < 2:
        raise LoraFastError(
            f"adapter_dtype={adapter_dtype!r}; expected a floating-point torch.dtype of 16 bits or more"
        )


def _become(module: nn.Module, cls: type) -> None:
    """Swaps the class of a live module, under accelerate's hook if it has one: that calls its `_old_forward`."""
    if _is_its_class_forward(module):
        del module.__dict__["forward"]
    module.__class__ = cls
    if "_old_forward" in module.__dict__:
        module._old_forward = MethodType(cls.forward, module)


def apply_lora(
    model: nn.Module,
    config: LoraConfig,
    *,
    adapter_name: str = "default",
    backend: str = "auto",
    adapter_dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Puts LoRA adapters into `model` in place and freezes everything else: y += scaling · drop(x) Aᵀ Bᵀ on every
    target.

    The model keeps its class and its weights' names; targets become LoraLinear (LoraConv1D, LoraEmbedding). Called
    again with another adapter_name it adds that adapter, and the newest is active. adapter_dtype: dtype of the master
    copies of A and B; products run in the base's dtype, over the 4-bit and 8-bit layers of bitsandbytes in x's.
    backend: "auto", "torch" or "triton" (a call raises where Triton can't run). Returns `model`.
    Raises LoraFastError, with nothing changed, where nothing matches, or an adapter of that name exists."""
    check_backend(backend)
    check_adapter_dtype(adapter_dtype)
    targets = check_injection(model, config, adapter_name)
    if experts := unadapted_experts(model, config):
        warn(
            f"the experts in {experts[0]} ({len(experts)} modules so) are stacked parameters, no linear layers, and "
            "get no adapter (in PEFT, in many models, they do); to train them name them, as in "
            f"target_parameters={expert_weights(model, experts[0])}"
        )
    inject(model, config, targets, adapter_name, backend=backend, adapter_dtype=adapter_dtype, trainable=True)
    return model


def inject(
    model: nn.Module,
    config: LoraConfig,
    targets: dict[str, nn.Module],
    adapter_name: str,
    *,
    backend: str,
    adapter_dtype: torch.dtype,
    trainable: bool,
    init: bool | str | None = None,
) -> None:
    """What apply_lora and load_adapter do after their checks: adapts `targets` and makes the new adapter active."""
    init = config.init_lora_weights if init is None else init
    specs = {name: adapter_spec(config, name, trainable=trainable) for name in targets}
    _check_ranks(targets, specs, init)
    for field_name in ("target_modules", "exclude_modules"):
        wanted = getattr(config, field_name) or ()
        if field_name == "target_modules" and isinstance(wanted, str):  # a pattern for no module is refused before
            continue
        if missed := unmatched(model, wanted):
            warn(f"{field_name}: no module of {type(model).__name__} is named {missed}")
    for reader, idle in unreached(model, targets).items():
        warn(
            f"{reader} reads the weight of {idle[0]} ({len(idle)} modules so) without calling the module: an adapter "
            "there has no effect; name others in target_modules"
        )
    if init in BASE_CHANGING_INITS:
        _check_base_can_change(model, targets, init)
    state = model.__dict__.get(_STATE)
    if state is None:
        state = LoraState(
            trained_before=frozenset(plain_name(n) for n, p in model.named_parameters() if p.requires_grad)
        )
        model.__dict__[_STATE] = state
        model.requires_grad_(False)
        state.kept_packed = keep_packing(model)
        _watch_checkpointing(model, state)
    for name, module in targets.items():
        if isinstance(module, LoraParameter) and child_name(module) not in module.owner._modules:
            attach(module)
            if not isinstance(module.owner, LoraOwner):
                _become(module.owner, lora_owner(type(module.owner)))
            module.start(backend)
        elif not isinstance(module, LoraLayer):
            _become(module, lora_class(module))
            module.start(backend)
        module.adapters_disabled = state.disabled
        module.add_adapter(adapter_name, specs[name], init, adapter_dtype)
    find_groups(model)
    state.adapted[adapter_name] = frozenset(
        plain_name(name.rpartition(".")[0] if isinstance(module, LoraParameter) else name)
        for name, module in targets.items()
    )
    for name in saved_module_names(model, config):
        original = state.originals.setdefault(name, model.get_submodule(name))
        state.copies.setdefault(adapter_name, {})[name] = _trained_copy(original)
    _train_biases(model, state, config, targets)
    state.configs[adapter_name] = config
    state.trainable[adapter_name] = trainable
    set_adapter(model, adapter_name)
    fuse_mlps(model)


def _check_ranks(targets: dict[str, nn.Module], specs: dict, init: bool | str) -> None:
    too_large = {n: s.r for n, s in specs.items() if s.r > min(matrix_shape(targets[n]))}
    if not too_large:
        return
    name, rank = next(iter(too_large.items()))
    smallest = min(matrix_shape(targets[name]))
    if init in BASE_CHANGING_INITS:
        raise LoraFastError(f"init_lora_weights={init!r} takes at most r=min(N, K)={smallest} for {name}; r={rank}")
    warn(
        f"r={rank} exceeds min(N, K)={smallest} of {name} ({len(too_large)} modules so): the update is never of higher "
        "rank than that, and a full-weight update would train fewer parameters"
    )


def _check_base_can_change(model: nn.Module, targets: dict[str, nn.Module], init: str) -> None:
    tied = tied_weights(model, targets)
    for name, module in targets.items():
        if isinstance(module, nn.Embedding):
            raise LoraFastError(
                f"init_lora_weights={init!r} starts from a linear layer's weight, and {name} is an embedding; exclude "
                "it, or start with init_lora_weights=True"
            )
        if is_quantized(module):
            raise LoraFastError(
                f"init_lora_weights={init!r} changes {name}.weight, which is quantized; start with "
                "init_lora_weights=True"
            )
        if name in tied:
            raise LoraFastError(
                f"init_lora_weights={init!r} changes {name}.weight, which is tied to {tied[name]}; untie them, exclude "
                f"{name}, or start with init_lora_weights=True"
            )
        if is_offloaded(module):
            raise LoraFastError(
                f"init_lora_weights={init!r} changes {name}.weight, which accelerate has offloaded; apply it before "
                "offloading"
            )


def tied_weights(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, str]:
    """{layer's dotted name: another name of the same weight}, of those among `layers` whose weight has one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    others = {n: [o for o in names.get(id(m.weight), ()) if o not in (n, f"{n}.weight")] for n, m in layers.items()}
    return {name: found[0] for name, found in others.items() if found}


def _trained_copy(module: nn.Module) -> nn.Module:
    """A copy for modules_to_save, without our hook: remove_lora takes that off the original."""
    result = copy.deepcopy(module)
    for part in result.modules():
        for key in [key for key, hook in part._forward_hooks.items() if isinstance(hook, _CheckpointInput)]:
            del part._forward_hooks[key]
    return result


def _watch_checkpointing(model: nn.Module, state: LoraState) -> None:
    embeddings = {}
    for module in model.modules():
        if (embedding := embedding_of(module)) is not None:
            embeddings[id(embedding)] = embedding
    hook = _CheckpointInput(model)
    state.hooks = [embedding.register_forward_hook(hook) for embedding in embeddings.values()]


def _train_biases(model: nn.Module, state: LoraState, config: LoraConfig, targets: dict[str, nn.Module]) -> None:
    """Keeps the biases that `config` trains, as they are; set_adapter lets them have gradients."""
    if config.bias == "none":
        return
    adapted = {f"{name}.bias" for name in targets}
    saved = tuple(f"{name}." for name in state.originals)  # their copies are trained whole
    for name, parameter in model.named_parameters():
        wanted = name in adapted if config.bias == "lora_only" else name.rpartition(".")[2] == "bias"
        if wanted and not name.startswith(saved):
            state.biases[name] = parameter.detach().to("cpu", copy=True)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Makes `module` the submodule of this dotted name, on the device of the one that it replaces."""
    parent_name, _, child = name.rpartition(".")
    parent = inside_of(model.get_submodule(parent_name))
    current = getattr(parent, child)
    if current is module:
        return
    tensor = next(current.parameters(), None)
    module.train(current.training)
    setattr(parent, child, module if tensor is None else module.to(tensor.device))


def _arrange_saved_modules(model: nn.Module, state: LoraState) -> None:
    """Puts the active adapter's copies of modules_to_save in place, or the originals where none is active or adapters
    are disabled."""
    for name, module in _standing(state, state.active, state.disabled).items():
        _put(model, name, module)
        state.originals[name].requires_grad_(False)
        if module is not state.originals[name]:
            module.requires_grad_(state.trainable[state.active])


def set_adapter(model: nn.Module, adapter_name: str) -> None:
    """Makes `adapter_name` the active adapter, without touching a file. Its factors require gradients (unless it was
    loaded with trainable=False), the other adapters' don't. Raises LoraFastError, with nothing changed, for an unknown
    name, while an adapter is merged, or where an adapted module or one of modules_to_save was replaced since."""
    state = lora_state(model)
    if adapter_name not in state.configs:
        raise LoraFastError(f"adapter_name={adapter_name!r}; this model carries {', '.join(map(repr, state.configs))}")
    if state.merged_keep is not None:
        raise LoraFastError(f"adapter {state.active!r} is merged; unmerge_lora(model) before switching")
    if adapter_name != state.active and any(state.copies.values()) and (told := distribution_of(model)):
        raise LoraFastError(
            f"model is {told}, with the modules_to_save of adapter {state.active!r}; those of another would be outside "
            "of it: choose the adapter first, then distribute the model"
        )
    check_in_place(model, state, others=_standing(state, adapter_name, state.disabled))
    state.active = adapter_name
    for layer in lora_layers(model).values():
        layer.set_adapter(adapter_name)
    for name in state.biases:
        trained = state.configs[adapter_name].bias != "none" and state.trainable[adapter_name]
        model.get_parameter(name).requires_grad_(trained)
    _arrange_saved_modules(model, state)


def set_disabled(model: nn.Module, state: LoraState, disabled: bool) -> None:
    """What `disable_adapters` does to adapters that are not merged."""
    give_back(model)
    layers = lora_layers(model)
    check_base(layers)
    check_in_place(model, state, others=_standing(state, state.active, disabled))
    for layer in layers.values():
        if disabled != state.disabled:
            layer.swap_start()
        layer.adapters_disabled = disabled
    state.disabled = disabled
    _arrange_saved_modules(model, state)


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """lora_A, lora_B and, of DoRA, the magnitude of the active adapter, module by module, whether or not they are being
    trained."""
    active = lora_state(model).active
    layers = [layer for layer in lora_layers(model).values() if active in layer.adapter_specs]
    return [factor.weight for layer in layers for factor in layer.factor_modules(active)]


def remove_lora(model: nn.Module) -> None:
    """Takes every adapter out: the modules are again of the class they had, and what required a gradient before does
    again.

    The weights are the base's, bit for bit; after `merge_lora` they are the merged ones (and the trained
    modules_to_save and biases stay). A module of modules_to_save, or an adapted one, that was replaced or resized after
    its adapter was put in (resize_token_embeddings does that) stays as it is now, with its weights and biases: what it
    was would no longer fit the model."""
    state = lora_state(model)
    merged = state.merged_keep is not None
    layers = lora_layers(model)
    check_base(layers)
    _forget_replaced(model, state)
    if state.disabled:
        set_disabled(model, state, False)
    unfuse_mlps(model)
    for layer in layers.values():
        if not merged:
            layer.restore_base()
        if isinstance(layer, LoraParameter):
            delattr(layer.owner, child_name(layer))
            if isinstance(layer.owner, LoraOwner) and not lora_parameters_of(layer.owner):
                _become(layer.owner, layer.owner.base_class)
            continue
        for name in layer.STATE_NAMES:
            if name in layer.__dict__ or name in layer._modules:
                delattr(layer, name)
        _become(layer, layer.base_class)
    if not merged:
        state.copies = {}
        _arrange_saved_modules(model, state)
        for name, value in (state.biases | state.replaced).items():
            with torch.no_grad():
                overwrite(model.get_parameter(name), value)
    for hook in state.hooks:
        hook.remove()
    for layer in state.kept_packed:
        layer.support_avx512bf16_for_cpu = True
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(plain_name(name) in state.trained_before)
    del model.__dict__[_STATE]


def _forget_replaced(model: nn.Module, state: LoraState) -> None:
    """Drops what the state would put back into modules that were replaced or resized."""
    trained = _standing(state, state.active, disabled=False)
    others = *_resized(state, state.originals), *_resized(state, trained)
    gone = {plain_name(name) for name in (*_replaced(model, state), *others)}
    state.adapted = {adapter: names - gone for adapter, names in state.adapted.items()}
    for modules in (state.originals, *state.copies.values()):
        for name in [name for name in modules if plain_name(name) in gone]:
            del modules[name]
    parameters = {plain_name(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    for values in (state.biases, state.replaced):
        for name, value in list(values.items()):
            parameter, owner = parameters.get(plain_name(name)), plain_name(name).rpartition(".")[0]
            pieces = hasattr(parameter, "_fsdp_flattened")
            if owner in gone or parameter is None or (parameter.shape != value.shape and not pieces):
                del values[name]
