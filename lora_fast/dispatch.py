"""What the ops of lora-fast share: the library that they are registered in, their checks, masks, and ways round the
dispatcher."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, wraps
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lora_fast.config import LoraFastError
from lora_fast.kernels import reference

# Layers whose adapters the kernels take in one read of x: q, k and v.
KERNEL_GROUP = 3

# On the kernels adapters are kept for backward as they were cast where they are at most this part of the activations:
# with 2048 rows of x at 4096 × 4096 up to r = 21. An observed op never does, so that `estimate` leaves this part out.
CAST_SHARE = 48

# Whose values and versions are what they seem. A fake tensor has no memory, and else is as plain: what is estimated
# takes the paths of what runs.
PLAIN_TENSORS = (torch.nn.Parameter, Tensor, FakeTensor)

# Of base weights under adapters. Not float8: its values mean something only together with a scale kept elsewhere.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

library = torch.library.Library("lora_fast", "DEF")
# Drawing a mask is random: tagged so that no tool takes two draws for one, or draws one again in backward.
library.define("dropout_mask(Tensor x, float p) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))

# The functions behind the registered ops: a dispatch mode that looks inside an op (a memory tracker) calls these.
IMPLEMENTATIONS: dict[str, Callable] = {}


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A frozen base weight (N, K) in fewer bits, unpacked for each product, in `dtype`. Ops take it in a tensor's place
    and keep it for backward as it is packed; registered ops, which take tensors, are passed by."""

    packed: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    unpack: Callable[[], Tensor]
    requires_grad = False

    @property
    def device(self) -> torch.device:
        return self.packed.device


def is_packed(weights: Sequence[Tensor | PackedWeight | None]) -> bool:
    """Whether any of them is packed."""
    return any(isinstance(weight, PackedWeight) for weight in weights)


def unpacked(weight: Tensor | PackedWeight | None) -> Tensor | None:
    return weight.unpack() if isinstance(weight, PackedWeight) else weight


def tensors_among(weights: Sequence[Tensor | PackedWeight | None]) -> list[Tensor | None]:
    """What autograd keeps of them, and watches for changes until backward: of a packed one what it is packed in."""
    return [weight.packed if isinstance(weight, PackedWeight) else weight for weight in weights]


def is_plain_matrix(weight: Tensor | None, shape: tuple[int, int]) -> bool:
    """Whether a module's weight is a matrix of plain numbers of this shape, so that an update can be merged into it:
    not quantized, packed, sharded, computed from other parameters or not there yet."""
    return type(weight) is torch.nn.Parameter and weight.dtype in FLOATS and weight.shape == shape


def implement(name: str, function: Callable) -> None:
    """Makes `function` what the defined op `name` computes, on every device."""
    library.impl(name, function, "CompositeExplicitAutograd")
    IMPLEMENTATIONS[f"{library.ns}::{name}"] = function


implement("dropout_mask", reference.dropout_mask)


@cache
def steps_for(triton: bool) -> ModuleType:
    # Not at the top: without Triton there is none.
    return import_module("lora_fast.fused") if triton else reference


def on_own_device(op: Callable) -> Callable:
    """`op` with its first tensor's GPU as the current one, which is where Triton launches, and without autocast."""

    @wraps(op)
    def run(first, *arguments):
        tensor = first if isinstance(first, Tensor) else next(t for t in first if t is not None)
        if autocast_dtype(tensor.device) is not None:  # forward has cast what it would; a backward may run inside it
            with torch.autocast(tensor.device.type, enabled=False):
                return run(first, *arguments)
        if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
            with torch.cuda.device(tensor.device):
                return op(first, *arguments)
        return op(first, *arguments)

    return run


_unsafe_view = torch.ops.aten._unsafe_view.default


def flatten(x: Tensor) -> Tensor:
    """(..., K) → (M, K)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype), which takes its time where there is nothing to do too."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def reshaped(y: Tensor, shape: Sequence[int]) -> Tensor:
    """y in this shape and no view of anything: models may change a layer's output in place, which autograd refuses on a
    view that a function returns."""
    return y if len(shape) == 2 else _unsafe_view(y, shape)


def bias_or_none(bias: Tensor | None) -> Tensor | None:
    """A layer's bias; a registered op, whose lists hold tensors alone, has an empty one where there is none."""
    return None if bias is None or bias.numel() == 0 else bias


def scales_of(scalings: Sequence[float], dropout_p: float) -> list[float]:
    """s' = scaling / (1 − p): the part of dropout that is the same for every element."""
    return [scaling / (1 - dropout_p) for scaling in scalings]


def ranks_of(lora_As: Sequence[Tensor]) -> list[int]:
    return [a.shape[0] for a in lora_As]


def owned(part: Tensor, dtype: torch.dtype) -> Tensor:
    """`part` in `dtype`, copied where it shares its memory: no two results of an op may."""
    if part.dtype != dtype:
        return part.to(dtype)
    return part if part.untyped_storage().nbytes() == part.nbytes else part.clone()


def casts_to_keep(casts: Sequence[Tensor], kept: Sequence[Tensor], triton: bool) -> Sequence[Tensor]:
    """What forward keeps for backward of the adapters as they were cast: all or, where they are many beside the
    activations `kept` anyway, nothing, and backward casts them again."""
    small = triton and CAST_SHARE * sum([t.numel() for t in casts]) <= sum([t.numel() for t in kept])
    return casts if small else ()


def shrink_or_draw(steps, rows, a, ranks, mask, seed, dropout_p) -> tuple[Tensor, Tensor | None]:
    if seed is None:
        return steps.shrink(rows, a, ranks, mask), mask
    return steps.shrink_and_draw(rows, a, ranks, seed, dropout_p)


def fake_mask(x: Tensor, count: int) -> Tensor:
    return x.new_empty(count, row_count(x.shape), (x.shape[-1] + 7) // 8, dtype=torch.uint8)


torch.library.register_fake("lora_fast::dropout_mask", lambda x, p: fake_mask(x, 1)[0], lib=library)


def is_observed() -> bool:
    """Whether a compiler or a dispatch mode (FakeTensor, FLOP counter, selective checkpointing) sees the op as one."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def is_transformed() -> bool:
    """Whether torch.func differentiates or batches the call: it has no rule for the ops, but for each step of them."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_differentiated() -> bool:
    """Whether autograd may ask for gradients of the call; where not, its Function is passed by, which takes its time.
    In forward mode it refuses what it has no rule for, with or without a graph."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def is_batched(gradient: Tensor | None) -> bool:
    """Whether torch.autograd.grad(…, is_grads_batched=True) asks for the gradients of many dys at once; of such tensors
    kernels, and all that asks for memory, know nothing."""
    return gradient is not None and torch._C._functorch.is_legacy_batchedtensor(gradient)


def row_count(shape) -> int:
    """M of a shape (..., K). In place of torch.Size.numel, which makes a plain number of a compiler's symbol, so that
    every new length would be compiled anew."""
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Autocast's dtype on this device, None where it is off. The meta device, which models are on before their weights
    are there, has none; it is named, since torch.amp.is_autocast_available breaks the compiler's graph before PyTorch
    2.12."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def without_autocast(device: torch.device) -> AbstractContextManager:
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def compute_input(x: Tensor, other_dtype: torch.dtype | None) -> Tensor:
    """x in the dtype that the products run in: autocast's where it is on, as it would be for torch's own linear."""
    dtype = autocast_dtype(x.device)
    if dtype is not None and x.dtype != torch.float64:
        return x.to(dtype)
    if not x.is_floating_point():
        raise LoraFastError(f"x is {x.dtype}; expected real floating-point numbers")
    if other_dtype is not None and x.dtype != other_dtype:
        raise LoraFastError(f"x is {x.dtype}, weight is {other_dtype}; cast one of them, or run under torch.autocast")
    return x


def check_devices(**tensors: Tensor | PackedWeight | None) -> None:
    places = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    (first, place), *others = places.items()
    if any(other != place for _, other in others):
        told = ", ".join(f"{name} on {other}" for name, other in others)
        raise LoraFastError(f"{first} is on {place}, {told}; expected one device")


def check_one_dtype(weights: Sequence[Tensor]) -> None:
    if any(weight.dtype != weights[0].dtype for weight in weights):
        told = ", ".join(str(weight.dtype) for weight in weights)
        raise LoraFastError(f"the weights are {told}; expected one dtype")


def check_factors(x: Tensor, lora_A: Tensor, lora_B: Tensor, n: int, dropout_p: float) -> None:
    if lora_A.dim() != 2 or lora_B.dim() != 2 or lora_A.shape[0] != lora_B.shape[1]:
        raise LoraFastError(
            f"lora_A is {tuple(lora_A.shape)}, lora_B is {tuple(lora_B.shape)}; expected (R, K) and (N, R) with one R"
        )
    if x.dim() < 1 or x.shape[-1] != lora_A.shape[1]:
        raise LoraFastError(f"x is {tuple(x.shape)}, lora_A is {tuple(lora_A.shape)}; x's last size must be K")
    if lora_B.shape[0] != n:
        raise LoraFastError(f"lora_B has N={lora_B.shape[0]}, the linear layer has N={n}; lora_B is (out_features, R)")
    if not (lora_A.is_floating_point() and lora_B.is_floating_point()):
        raise LoraFastError(f"lora_A is {lora_A.dtype}, lora_B is {lora_B.dtype}; expected real floating-point numbers")
    if not 0 <= dropout_p < 1:
        raise LoraFastError(f"dropout_p={dropout_p}; expected a probability in [0, 1)")


def check_linear(
    x: Tensor, weight: Tensor | PackedWeight, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, p: float
) -> None:
    if len(weight.shape) != 2 or x.dim() < 1 or weight.shape[1] != x.shape[-1]:
        raise LoraFastError(
            f"x is {tuple(x.shape)}, weight is {tuple(weight.shape)}; weight is (out_features, in_features) and "
            "x's last size is in_features"
        )
    check_factors(x, lora_A, lora_B, weight.shape[0], p)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise LoraFastError(f"bias is {tuple(bias.shape)}; expected (N,)={tuple(weight.shape[:1])}")
    device = x.device
    if not (weight.device == device == lora_A.device == lora_B.device and (bias is None or bias.device == device)):
        check_devices(x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias)


def draw_masks(x: Tensor, count: int, dropout_p: float, triton: bool) -> tuple[Tensor | None, Tensor | None]:
    """(the masks of `count` adapters that read x, or None, a seed for kernels that draw them, or None)."""
    if dropout_p == 0:
        return None, None
    if triton:
        # A tensor from torch's generator: a replayed CUDA graph draws anew, recomputed activations draw the same.
        return None, torch.randint(0, 2**63 - 1, (1,), device=x.device)
    if torch.compiler.is_compiling():
        # In aten's own random ops: the compiler's common-subexpression pass knows those by name and ignores the tag, so
        # that it would merge the draws of all layers that read one x (q, k and v) into one mask.
        draw = reference.dropout_mask
    else:
        draw = torch.ops.lora_fast.dropout_mask if is_observed() else reference.dropout_mask
    masks = [draw(x.detach(), dropout_p) for _ in range(count)]
    return masks[0][None] if count == 1 else torch.stack(masks), None
