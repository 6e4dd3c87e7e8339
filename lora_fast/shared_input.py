"""Layers that read the same input (q/k/v, gate/up) computed together: no list of names, no model's forward rewritten.

Which layers those may be is read off their parent's source, once, when adapters are put in: children that one method
calls with one and the same variable, in one block of statements (`self.q_proj(hidden_states)`, `self.k_proj(…`). The
first of them then computes all in one op (`lora_linears`: x is read once for all lora_A, dx is summed in place) and
leaves the others' outputs in this thread's slot. Each of the others takes its own, once, if it is called with that very
tensor, unchanged, and its weights are unchanged too. One that finds nothing, because x or a weight was changed in
between, its adapter was switched, or a hook gave it another tensor, computes by itself: what the source suggested costs
time where it was wrong, never the result. Outputs that nobody took are dropped at the next call of any layer.

The choice is fixed from the first step on, since a recomputed activation checkpoint must save what its forward saved.

torch.func, inference mode and compiled graphs see every layer by itself: there nothing says whether x was changed in
between. Of a tensor that Dynamo traces, `_version` is a number unknown until the graph runs, so that comparing two of
them ends the graph (torch 2.13). What the first layer computed would also have to wait somewhere: changes of a module
or of the slot are refused inside a checkpoint that is compiled; an attribute of x is not, but stays on x, stale, where
x comes from outside the graph. Merging the ops in the graph afterwards would be exact, but it takes a pass that the
user hands to the compiler: before autograd, where x may still be changed in place, it has to prove that nothing does;
after it, it has to find the sums of dx. A compiled q, k and v therefore read x three times for S and three times for
dA, and add up three dx; all else of each layer is the same."""

import ast
import inspect
import textwrap
import threading
import weakref
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lora_fast.dispatch import KERNEL_GROUP, PLAIN_TENSORS, PackedWeight, autocast_dtype, compute_input, in_dtype
from lora_fast.dora import row_norms, scale_columns
from lora_fast.ops import lora_linear, lora_linears, lora_update


class LinearCall(NamedTuple):
    """What `lora_linear` needs of a layer as it stands now: weight (N, K), bias, lora_A (R, K), lora_B (N, R), …; and
    the magnitude m (N,) of DoRA."""

    weight: Tensor | PackedWeight
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float
    backend: str
    magnitude: Tensor | None = None

    def before_scaling(self) -> "LinearCall":
        """What DoRA scales afterwards: LoRA without bias."""
        return self._replace(bias=None, magnitude=None)


# ------------------------------------------------------------------------------------------------- what the source says


def _blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                yield block


def _own_calls(statement: ast.stmt) -> list[ast.Call]:
    """The calls in a statement, without the blocks inside it, in the order of the source."""
    calls = []
    for name, value in ast.iter_fields(statement):
        if name not in ("body", "orelse", "finalbody", "handlers"):
            parts = [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, ast.AST)]
            calls += [node for part in parts for node in ast.walk(part) if isinstance(node, ast.Call)]
    return sorted(calls, key=lambda call: (call.lineno, call.col_offset))


def _calls_and_changes(block: list[ast.stmt]) -> Iterator[tuple[str, str | None]]:
    """In the order of the source: (variable, child) of `self.child(variable)`; (variable, None) where one is set."""
    for statement in block:
        for call in _own_calls(statement):
            function, arguments = call.func, call.args
            own = isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)
            one = len(arguments) == 1 and isinstance(arguments[0], ast.Name) and not call.keywords
            if own and one and function.value.id == "self":
                yield arguments[0].id, function.attr
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        for name in {name.id for name in names if not isinstance(name.ctx, ast.Load)}:
            yield name, None


@cache
def children_called_alike(kind: type) -> tuple[tuple[str, ...], ...]:
    """Names of children that a method of this module class calls with one variable: (("gate_proj", "up_proj"), …).

    Empty where the source can't be read."""
    found = []
    for function in vars(kind).values():
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
        except (OSError, TypeError, SyntaxError, ValueError):
            continue
        for block in _blocks(tree):
            open_groups: dict[str, list[str]] = {}
            for variable, child in _calls_and_changes(block):
                if child is None:
                    found.append(tuple(open_groups.pop(variable, ())))
                elif child not in open_groups.setdefault(variable, []):
                    open_groups[variable].append(child)
            found += map(tuple, open_groups.values())
    return tuple(group for group in found if len(group) > 1)


def find_groups(model: nn.Module) -> None:
    """Sets `followers` of every layer that answers `linear_call`: the layers that it computes along with itself."""
    for parent in model.modules():
        layers = {name: child for name, child in parent.named_children() if hasattr(child, "linear_call")}
        for layer in layers.values():
            layer.followers = ()
        if len(layers) < 2:
            continue
        for kind in type(parent).__mro__:
            for names in () if kind is nn.Module else children_called_alike(kind):
                members = [layers[name] for name in names if name in layers]
                for first in range(0, len(members), KERNEL_GROUP):
                    leader, *others = members[first : first + KERNEL_GROUP]
                    leader.followers = tuple(others)


# --------------------------------------------------------------------------------------------------- one call at a time


class _Slot(threading.local):
    """What this thread computed for layers yet to be called with x: {id of the layer: (call, its `_state`, y)}."""

    def __init__(self):
        self.x = lambda: None  # a weak reference, so that nothing lives longer for having been looked at
        self.version = 0
        self.waiting: dict[int, tuple[LinearCall, tuple, Tensor]] = {}


_slot = _Slot()


def has_global_hooks() -> bool:
    """Whether hooks for all modules are registered, which expect to see every layer called."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def run_linear(layer: nn.Module, x: Tensor, call: LinearCall) -> Tensor:
    """y (..., N) of this layer, counted in its `calls_by_path` as "lora_linears" where it was computed together with
    others, else as "lora_linear"; calls inside a compiled graph are not counted.

    layer must answer `linear_call(x) -> LinearCall | None`: what it would compute now, None where it takes no part."""
    if call.magnitude is not None:
        return _dora(layer, x, call)
    if torch.compiler.is_compiling():
        return _linear(x, call)
    # In inference mode, and in torch.func, a change of x leaves no trace.
    watched = type(x) in PLAIN_TENSORS and not x.is_inference() and not torch._C._are_functorch_transforms_active()
    if _slot.waiting:
        if watched and _slot.x() is x and _slot.version == x._version:
            waiting = _slot.waiting.pop(id(layer), None)
            if waiting is not None and _same(waiting[0], call) and waiting[1] == _state(call, x):
                layer.calls_by_path["lora_linears", None] += 1
                return waiting[2]
        _slot.waiting.clear()
    calls = _calls_together(layer, call, x) if watched and layer.followers else {}
    # Counted first: a recomputed checkpoint may end inside the op, once it has all that backward needs.
    if len(calls) < 2:
        layer.calls_by_path["lora_linear", None] += 1
        return _linear(x, call)
    layer.calls_by_path["lora_linears", None] += 1
    weights, biases, lora_As, lora_Bs, scalings, *_ = (list(column) for column in zip(*calls.values()))
    p, backend = call.dropout_p, call.backend
    ys = lora_linears(x, weights, lora_As, lora_Bs, scalings, biases, dropout_p=p, backend=backend)
    _slot.x, _slot.version = weakref.ref(x), x._version
    _slot.waiting = {id(other): (c, _state(c, x), y) for (other, c), y in zip(calls.items(), ys) if other is not layer}
    return ys[0]


def _dora(layer: nn.Module, x: Tensor, call: LinearCall) -> Tensor:
    """y of DoRA, counted as LoRA is; "lora_update" where dropout takes a base product of its own."""
    if call.dropout_p == 0:
        z = run_linear(layer, x, call.before_scaling())  # first, since it checks sizes and devices
        g = call.magnitude / row_norms(call.weight, call.lora_A, call.lora_B, call.scaling)
        return scale_columns(z, g, call.bias, backend=call.backend)
    if not torch.compiler.is_compiling():
        layer.calls_by_path["lora_update", None] += 1
    x = compute_input(x, call.weight.dtype)
    bias = None if call.bias is None else call.bias.to(x.dtype)
    return update_called(x, torch.nn.functional.linear(x, call.weight, bias), call)


def update_called(x: Tensor, base: Tensor, call: LinearCall) -> Tensor:
    """y of a layer whose base forward gave `base`, bias included."""
    weight, bias, lora_A, lora_B, scaling, p, backend, magnitude = call
    if magnitude is None:
        return lora_update(x, base, lora_A, lora_B, scaling, dropout_p=p, backend=backend)
    product = base
    if p > 0:
        x = torch.nn.functional.dropout(x, p)
        product = torch.nn.functional.linear(x, in_dtype(weight, x.dtype))
    z = lora_update(x, product, lora_A, lora_B, scaling, backend=backend)
    g = magnitude / row_norms(weight, lora_A, lora_B, scaling)
    if p > 0:
        return torch.addcmul(base - product, z, g).to(base.dtype)
    return scale_columns(z, g, None if bias is None else (1 - g) * bias, backend=backend)


def _linear(x: Tensor, call: LinearCall) -> Tensor:
    weight, bias, lora_A, lora_B, scaling, dropout_p, backend, _ = call
    return lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p=dropout_p, backend=backend)


def _same(before: LinearCall, now: LinearCall) -> bool:
    """Whether a layer would still compute what was computed for it; `_state` tells its weight."""
    same = before.bias is now.bias and before.lora_A is now.lora_A and before.lora_B is now.lora_B
    return same and before[4:] == now[4:]


def _state(call: LinearCall, x: Tensor) -> tuple:
    """What the result of a call depends on besides x and what `_same` compares: whether a graph is recorded, autocast's
    dtype, the weight's memory (a weight may be a fresh view of the same, or one tensor be given other memory), and the
    versions of its tensors, which count changes in place."""
    weight = _in_memory(call.weight)
    memory = weight.untyped_storage()._cdata, weight.storage_offset()
    tensors = weight, call.bias, call.lora_A, call.lora_B
    versions = tuple(None if t is None else t._version for t in tensors)
    return torch.is_grad_enabled(), autocast_dtype(x.device), memory, versions


def _in_memory(weight: Tensor | PackedWeight) -> Tensor:
    return weight.packed if isinstance(weight, PackedWeight) else weight


def _calls_together(layer: nn.Module, call: LinearCall, x: Tensor) -> dict[nn.Module, LinearCall]:
    """{layer: call} of all that can be computed with `layer` now, itself first."""
    calls = {layer: call}
    for other in layer.followers:
        # A hook before the other's forward could change its x, or bring its weights only then.
        hooked = other._forward_pre_hooks or "_hf_hook" in other.__dict__
        other_call = None if hooked else other.linear_call(x)
        if other_call is None:
            continue
        if other_call.magnitude is not None:
            other_call = other_call.before_scaling()
        weight, bias, lora_A, lora_B, _, *settings = other_call
        tensors = [t for t in (bias, lora_A, lora_B) if t is not None]
        tensors += [] if isinstance(weight, PackedWeight) else [weight]
        plain = weight.device == x.device and not _in_memory(weight).is_inference()
        plain &= all(type(t) in PLAIN_TENSORS and t.device == x.device and not t.is_inference() for t in tensors)
        alike = weight.dtype == call.weight.dtype and weight.shape[1] == call.weight.shape[1]
        if plain and alike and settings == list(call[5:]):
            calls[other] = other_call
    return calls
