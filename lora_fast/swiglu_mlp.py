"""SwiGLU MLPs of a model run as one op (`lora_swiglu_mlp`), found by what they compute: no names, no list of models.

A module with three adapted linear layers, two (K → I) and one (I → N), may be one. Whether it is, and which layer is
which, a probe decides: on random rows its own forward must agree with down(silu(gate(x)) ∘ up(x)), in evaluation and in
training, where it may have a dropout of its own. Its class then becomes a subclass of itself whose forward is the op,
call by call, wherever that computes what the layers would: their adapters run, with one dropout, and nothing hooks into
them. Everywhere else its own forward runs."""

import copy
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import permutations
from types import MethodType

import torch
from torch import Tensor, nn

from lora_fast.dispatch import is_packed
from lora_fast.mlp import lora_swiglu_mlp
from lora_fast.quantized import is_four_bit
from lora_fast.shared_input import LinearCall, has_global_hooks

PROBE_ROWS = 6
# Rows are scaled until gate(x), adapter included, is of this size: silu and gelu are alike near zero and far from it,
# and differ by 8% here.
PROBE_DEVIATION = 3.0
# Of the last two rows gate(x), or up(x), is of this size: where models clamp them (limits of 7 to 16 are in use).
PROBE_FAR = 40.0


OTHER_FORMULA = "its forward computes something else than down(silu(gate(x)) * up(x)), on random rows"
OWN_FORWARD = "its forward is not its class's (accelerate's hooks replace it)"


def _others(parent: nn.Module, names: tuple[str, str, str]) -> list[tuple[nn.Module, float | None]]:
    """The children besides the three layers, with the probability of those that are a dropout."""
    children = parent._modules.items()
    return [(child, getattr(child, "p", None)) for name, child in children if name not in names and child is not None]


def _is_hooked(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or "forward" in layer.__dict__ or "_hf_hook" in layer.__dict__


def _calls(layers: list[nn.Module], x: Tensor) -> list[LinearCall] | str:
    """What gate, up and down would compute now, or why they have to be called one by one."""
    if any(map(_is_hooked, layers)) or has_global_hooks():
        return "a layer inside has hooks or a forward of its own"
    calls = [layer.linear_call(x) if hasattr(layer, "linear_call") else None for layer in layers]
    if None in calls:
        return "not all three layers run a plain adapter"
    if any(call.magnitude is not None for call in calls):
        return "its layers run DoRA, which scales what each of them gives"
    if len({(call.dropout_p, call.backend, call.weight.dtype) for call in calls}) > 1:
        return "the layers differ in dropout, backend or dtype"
    if any(t.device != x.device for call in calls for t in (call.weight, call.lora_A, call.lora_B)):
        return "the layers are on several devices"
    return calls


def _as_one_op(x: Tensor, calls: list[LinearCall]) -> Tensor:
    parts = [(call.weight, call.lora_A, call.lora_B, call.scaling, call.bias) for call in calls]
    y = lora_swiglu_mlp(x, *parts, dropout_p=calls[0].dropout_p, backend=calls[0].backend)
    return y.to(x.dtype) if is_packed([call.weight for call in calls]) else y  # as a 4-bit layer answers


class FusedSwiglu(nn.Module):
    """The forward put before an MLP's own; the class beside it in the bases is that MLP's.

    swiglu_layers: names of the children that are gate, up and down. calls_by_path: {("lora_swiglu_mlp", None) or
    ("layers", reason): calls}, outside compiled graphs."""

    base_class: type[nn.Module]
    swiglu_layers: tuple[str, str, str]
    swiglu_others: list[tuple[nn.Module, float | None]]
    calls_by_path: Counter[tuple[str, str | None]]

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        calls = "the call has arguments besides the input" if args or kwargs else self.swiglu_calls(x)
        fused = not isinstance(calls, str)
        if not torch.compiler.is_compiling():
            self.calls_by_path["lora_swiglu_mlp" if fused else "layers", None if fused else calls] += 1
        return _as_one_op(x, calls) if fused else super().forward(x, *args, **kwargs)

    def swiglu_calls(self, x: Tensor) -> list[LinearCall] | str:
        """What gate, up and down would compute of x now, or why they are called one by one."""
        if not isinstance(x, Tensor):
            return "the input is not a tensor"
        others = _others(self, self.swiglu_layers)
        if others != self.swiglu_others or any(_is_hooked(module) for module, _ in others):
            return "another module inside, an activation or a dropout, was changed or has hooks"
        return _calls([getattr(self, name) for name in self.swiglu_layers], x)

    def __reduce_ex__(self, protocol: int) -> tuple:
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return _empty, (self.base_class,), *state  # no module holds the classes that `_fused_class` makes


@cache
def _fused_class(base: type[nn.Module]) -> type[FusedSwiglu]:
    """The one fused class over `base`, of the same name: wrapping policies know modules by it."""
    return type(base.__name__, (FusedSwiglu, base), {"__module__": base.__module__, "base_class": base})


def _empty(base: type[nn.Module]) -> FusedSwiglu:
    """What a copy or a pickle of such a module starts from."""
    kind = _fused_class(base)
    return kind.__new__(kind)


def _candidates(parent: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Names of children that could be gate, up and down, by their sizes."""
    layers = {name: child for name, child in parent.named_children() if hasattr(child, "linear_call")}
    others = [child for name, child in parent.named_children() if name not in layers]
    if len(layers) != 3 or any(True for child in others for _ in child.parameters()):
        return
    sizes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items() if _has_sizes(layer)}
    for gate, up, down in permutations(sizes, 3):
        if sizes[gate] == sizes[up] and sizes[gate][1] == sizes[down][0]:
            yield gate, up, down


def _has_sizes(layer: nn.Module) -> bool:
    return hasattr(layer, "in_features") and hasattr(layer, "out_features")


def _base(layer: nn.Module) -> nn.Module:
    return getattr(layer, "base_layer", layer)


def _weight(layer: nn.Module) -> Tensor:
    return _base(layer).weight


def _with_plain_layers(parent: nn.Module, names: tuple[str, str, str]) -> nn.Module:
    """A copy of a module with packed weights that can be probed without unpacking them: on the CPU, with small linear
    layers of random numbers in place of the three."""
    generator, sizes = torch.Generator().manual_seed(0), {"K": 48, "I": 112, "N": 80}
    gate, up, down = names
    replaced = {}
    for name, k, n in ((gate, "K", "I"), (up, "K", "I"), (down, "I", "N")):
        layer = nn.utils.skip_init(nn.Linear, sizes[k], sizes[n], bias=False)
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / sizes[k] ** 0.5)
        replaced[id(getattr(parent, name))] = layer
    return copy.deepcopy(parent, replaced)


def _with_values(parent: nn.Module, names: tuple[str, str, str]) -> nn.Module:
    """A copy of a module on the meta device that can compute: on the CPU, with random numbers, its sizes K, I and N
    replaced by small ones (a forward that counts on its own sizes fails the probe then)."""
    gate, _, down = (getattr(parent, name) for name in names)
    small = {gate.in_features: 48, gate.out_features: 112}
    small.setdefault(down.out_features, 80)
    copied = copy.deepcopy(parent)
    generator = torch.Generator().manual_seed(0)
    for module in copied.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    shape = [small.get(size, size) for size in tensor.shape]
                    value = torch.randn(shape, generator=generator) / (shape[-1] if shape else 1) ** 0.5
                    value = value.to(tensor.dtype)
                    tensors[name] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value
        if _has_sizes(module):
            module.in_features, module.out_features = (
                small.get(size, size) for size in (module.in_features, module.out_features)
            )
    return copied


@torch.no_grad()
def _disagrees(parent: nn.Module, names: tuple[str, str, str]) -> str | None:
    """None where the parent's own forward computes the SwiGLU MLP of these layers, on random rows, in both modes, else
    the reason why they stay layers."""
    packed = any(is_four_bit(_base(getattr(parent, name))) for name in names)
    if packed:
        try:
            parent = _with_plain_layers(parent, names)
        except Exception as error:  # whatever a class does when it is copied
            return f"it can't be copied to be probed: {error}"
    weight = _weight(getattr(parent, names[0]))
    if type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point():
        return "its weights are no plain tensors of floating-point numbers"
    if weight.is_meta:
        parent = _with_values(parent, names)
    layers = [getattr(parent, name) for name in names]
    weight = _weight(layers[0])
    generator = torch.Generator().manual_seed(0)  # not torch's own: a training run's seed must not notice the probe
    x = torch.randn(PROBE_ROWS, weight.shape[1], generator=generator).to(weight)
    calls = [] if packed else _calls(layers, x)
    if isinstance(calls, str):
        return calls
    gate, up, down = layers
    nothing = torch.zeros_like(x)
    x *= _factors(gate(x) - gate(nothing), up(x) - up(nothing)).to(x)
    expected = down(nn.functional.silu(gate(x)) * up(x))
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        alike = all(_computes(parent.train(training), layers, x, expected) for training in (False, True))
    return None if alike else OTHER_FORMULA


def _factors(gate: Tensor, up: Tensor) -> Tensor:
    """What each row of x is multiplied by, (PROBE_ROWS, 1), for gate(x) and up(x) of the sizes above: of two rows the
    median's of gate(x), of one the root mean square, of one the largest. Whichever outputs dominate what down adds up,
    one row then has them where activations differ. The last two are for clamps, of gate(x) and of up(x)."""
    rows, others = gate.float().abs(), up.float().abs()
    median = 1.4826 * rows.median(dim=1, keepdim=True).values  # the deviation, of normal numbers
    mean, largest = rows.square().mean(dim=1, keepdim=True).sqrt(), rows.amax(dim=1, keepdim=True)
    far = torch.cat([largest[4:5], others.amax(dim=1, keepdim=True)[5:]])
    near = PROBE_DEVIATION / torch.cat([median[:2], mean[2:3], largest[3:4]]).clamp_min(1e-6)
    return torch.cat([near, PROBE_FAR / far.clamp_min(1e-6)])


def _computes(parent: nn.Module, layers: list[nn.Module], x: Tensor, expected: Tensor) -> bool:
    """Whether forward of the parent, without the dropout of its adapters, gives `expected`."""
    for layer in layers:
        layer.eval()
    try:
        result = parent.forward(x)  # without the hooks of the parent: they stay outside the op too
    except Exception:  # a forward of other arguments: whatever it is, it is no such MLP
        return False
    if not isinstance(result, Tensor) or result.shape != expected.shape or not result.any():
        return False
    # The same layers called in the same dtype: an MLP that is one computes these very bits, or nearly.
    bound = max(torch.finfo(x.dtype).eps / 8, 1e-6)
    same = (expected == result) | (expected.isnan() & result.isnan())  # a row of large numbers may overflow fp16
    off = (expected.float() - result.float()).masked_fill(same, 0.0).norm(dim=1)
    size = result.float().nan_to_num(0.0, 0.0, 0.0).norm(dim=1)
    return bool((off <= bound * size).all())


@contextmanager
def _probed(parent: nn.Module) -> Iterator[None]:
    """The parent in evaluation and its layers on PyTorch, wherever they run later; as it was before, afterwards."""
    modules = list(parent.modules())
    modes = {module: module.training for module in modules}
    counts = {module: Counter(module.calls_by_path) for module in modules if hasattr(module, "calls_by_path")}
    backends = {module: module.backend for module in modules if hasattr(module, "linear_call")}
    parent.eval()
    for module in backends:
        module.backend = "torch"
    try:
        yield
    finally:
        for module in modules:
            module.training = modes[module]
        for module, calls in counts.items():
            module.calls_by_path = calls
        for module, backend in backends.items():
            module.backend = backend


def _kind(parent: nn.Module) -> Hashable:
    """What a module on the meta device is: classes and sizes."""
    return tuple((name, type(m)) for name, m in parent.named_modules()), tuple(
        (name, p.shape, p.dtype) for name, p in parent.named_parameters()
    )


def fuse_mlps(model: nn.Module) -> None:
    """Makes every SwiGLU MLP of the model whose three layers run adapters one op, after a probe of each; of those on
    the meta device, which differ in nothing, one of each class and size is probed. A module with three such layers that
    stays as it is says why in `swiglu_refusal`."""
    known: dict[Hashable, tuple[tuple[str, str, str], str | None]] = {}
    for parent in list(model.modules()):
        parent.__dict__.pop("swiglu_refusal", None)
        found = [] if isinstance(parent, FusedSwiglu) else list(_candidates(parent))
        if not found:
            continue
        if "forward" in parent.__dict__:
            parent.swiglu_refusal = OWN_FORWARD
            continue
        key = _kind(parent) if _weight(getattr(parent, found[0][0])).is_meta else parent
        if key not in known:
            with _probed(parent):
                for names in found:
                    known[key] = names, _disagrees(parent, names)
                    if known[key][1] is None:
                        break
        names, refusal = known[key]
        if refusal is None:
            parent.__class__ = _fused_class(type(parent))
            parent.swiglu_layers, parent.calls_by_path = names, Counter()
            parent.swiglu_others = _others(parent, names)
        else:
            parent.swiglu_refusal = refusal


def unfuse_mlps(model: nn.Module) -> None:
    """Gives every MLP the class back that it had."""
    for module in model.modules():
        module.__dict__.pop("swiglu_refusal", None)
        if isinstance(module, FusedSwiglu):
            del module.swiglu_layers, module.swiglu_others, module.calls_by_path
            module.__class__ = module.base_class
            if "_old_forward" in module.__dict__:  # accelerate's hook, put on since, calls it
                module._old_forward = MethodType(module.__class__.forward, module)
