"""What a training step has a GPU do, launch by launch, and the least time that it takes: the roofline.

    t = Σ_launches max(FLOPs / rate of their dtype, bytes / bandwidth)

Source: Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785. Rates are the maker's peaks, which no
program reaches, and nothing waits: not for the host, nor one launch for the other's end. So t is a floor, and of two
arms' ratio what both miss of the peaks alike falls out.

A launch is an operator of PyTorch, which reads its inputs and writes its results once, or one of lora-fast's kernels,
which does the same for the whole step that it takes in one pass (`counted_as_kernels`; that the kernels do is what
tests/test_traffic.py counts)."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from lora_fast.dispatch import IMPLEMENTATIONS
from lora_fast.kernels import reference

# --- GPUs -------------------------------------------------------------------------------------------------------------


class Chip(NamedTuple):
    """A GPU by its maker's numbers: memory; 10¹² bytes a second from and to it; 10¹² FLOPs a second of dense products
    in bf16 or fp16 that sum in fp32, and in fp32 (without TF32, as PyTorch multiplies unless told)."""

    name: str
    memory_GB: float
    bandwidth: float
    half: float
    single: float

    def seconds(self, launch: "Launch") -> float:
        rate = self.half if launch.dtype in (torch.bfloat16, torch.float16) else self.single
        return max(launch.flops / rate, launch.bytes / self.bandwidth) / 1e12


# From the makers' data sheets and, of GeForce cards, architecture whitepapers; SXM or OAM modules unless they say PCIe.
CHIPS = (
    Chip("A100", 80, 2.039, 312, 19.5),
    Chip("A100-40GB", 40, 1.555, 312, 19.5),
    Chip("H100", 80, 3.35, 989, 67),
    Chip("H100-PCIe", 80, 2.0, 756, 51),
    Chip("H100-NVL", 94, 3.9, 835, 60),
    Chip("H200", 141, 4.8, 989, 67),
    Chip("B200", 180, 8.0, 2250, 75),
    Chip("L4", 24, 0.3, 121, 30.3),
    Chip("L40S", 48, 0.864, 362, 91.6),
    Chip("A10", 24, 0.6, 125, 31.2),
    Chip("RTX 3090", 24, 0.936, 71, 35.6),
    Chip("RTX 4090", 24, 1.008, 165, 82.6),
    Chip("RTX 5090", 32, 1.792, 210, 105),
    Chip("MI300X", 192, 5.3, 1307, 163),
)


def chip_named(name: str) -> Chip | None:
    """ "h100", "RTX4090", or what a driver calls it, "NVIDIA A100-SXM4-40GB" → the Chip, None where none is meant."""

    def words(text: str) -> set[str]:
        return set(re.findall(r"[a-z0-9]+", text.lower().replace("rtx", "rtx ")))

    given = words(name)
    meant = [chip for chip in CHIPS if words(chip.name) <= given]
    if not meant or given & {"laptop", "max", "d"}:  # slower chips that share the name
        return None
    return max(meant, key=lambda chip: len(words(chip.name)))


# --- Launches ---------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """dtype: of what is multiplied. bytes: read and written."""

    dtype: torch.dtype
    flops: int
    bytes: int


class LaunchCounter(TorchDispatchMode):
    """FLOPs of all operators that have a formula, a multiply-add being two, and every launch, in the order of time.
    lora-fast's own operators are looked into.

    PyTorch's FlopCounterMode hooks into every module, and a model with hooks on its layers takes other paths."""

    looks_inside = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.launches: list[Launch] = []
        self._within = False  # a step that is one launch

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if inside := IMPLEMENTATIONS.get(operation.name()) if operation.namespace == "lora_fast" else None:
            with self:
                return inside(*arguments, **keywords)
        formula = _FORMULAS.get(operation._overloadpacket, _FORMULAS_BY_NAME.get(operation.name()))
        name = operation.name().partition(".")[0]
        if name in _METADATA:
            return NotImplemented
        # A linear layer below autograd, say, is one operator that consists of others.
        if formula is None and operation._can_decompose():
            with self:
                return operation.decompose(*arguments, **keywords)
        if operation._overloadpacket is torch.ops.aten._grouped_mm and arguments[0].dtype != torch.bfloat16:
            # Experts of a mixture: as it runs in any dtype, but its shapes are only told for this one.
            inputs = [value.bfloat16() if i < 2 else value for i, value in enumerate(arguments)]
            result = operation(*inputs, **keywords).to(arguments[0].dtype)
        else:
            result = operation(*arguments, **keywords)
        flops = formula(*arguments, **keywords, out_val=result) if formula else 0
        self.flops += flops
        if not self._within:
            self._launch(flops, _moved(operation, name, arguments, keywords, result), (arguments, keywords, result))
        return result

    def _launch(self, flops: int, moved: int, operands: Any) -> None:
        if flops or moved:
            self.launches.append(Launch(_tensors(operands)[0].dtype, flops, moved))

    @contextmanager
    def _one_launch(self) -> Iterator[None]:
        """What runs meanwhile is no launch of its own, but for its FLOPs."""
        self._within = True
        try:
            yield
        finally:
            self._within = False

    def in_one_launch(self, step: Callable) -> Callable:
        """`step`, counted as a single launch that reads every tensor given and writes every new one."""

        @wraps(step)
        def run(*arguments, **keywords):
            if self._within:
                return step(*arguments, **keywords)
            before = self.flops
            with self._one_launch():
                result = step(*arguments, **keywords)
            given = _tensors((arguments, keywords))
            new = [tensor for tensor in _tensors(result) if not _lies_in(tensor, given)]
            if new:
                self._launch(self.flops - before, sum(map(_size, (*given, *new))), given)
            return result

        return run

    @contextmanager
    def as_kernels(self) -> Iterator[None]:
        """Counts lora-fast's steps as its kernels take them on a GPU, not as PyTorch's operators do on a CPU."""
        grad_x_and_a, dropout_mask = reference.grad_x_and_a, reference.dropout_mask

        @wraps(grad_x_and_a)
        def in_two(dys, weights, ds, a, x, ranks, mask, needs_dx=True, needs_dA=True):
            before = self.flops
            with self._one_launch():
                dx, dAs = grad_x_and_a(dys, weights, ds, a, x, ranks, mask, needs_dx, needs_dA)
            of_a = 0 if dAs is None else 2 * ds.numel() * x.shape[1]
            if dx is not None:
                moved = _tensors((dys, weights, ds, a, mask, dx))
                self._launch(self.flops - before - of_a, sum(map(_size, moved)), ds)
            if dAs is not None:
                self._launch(of_a, sum(map(_size, _tensors((ds, x, mask, dAs)))), ds)
            return dx, dAs

        def drawn_beside(x: Tensor, p: float) -> Tensor:
            """By the kernel that reads x anyway."""
            with self._one_launch():
                mask = dropout_mask(x, p)
            self._launch(0, _size(mask), mask)
            return mask

        steps = {name: self.in_one_launch(getattr(reference, name)) for name in _ONE_LAUNCH}
        steps |= {"grad_x_and_a": in_two, "dropout_mask": drawn_beside}
        with ExitStack() as stack:
            for name, step in steps.items():
                stack.enter_context(mock.patch.object(reference, name, step))
            stack.enter_context(mock.patch.dict(IMPLEMENTATIONS, {"lora_fast::dropout_mask": drawn_beside}))
            yield


# Steps of kernels/reference.py that one kernel takes, or one for each layer of a group.
_ONE_LAUNCH = (
    *("cast_factors", "shrink", "linear_lora", "update_lora", "grad_s_and_b", "grad_b"),
    *("swiglu_shrink", "swiglu_backward", "scale_columns", "scale_columns_backward"),
)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _size(tensor: Tensor) -> int:
    """Bytes that hold it: of an expanded one fewer than it has elements."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def _once(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each part of memory that is given, given once: x · x reads x."""
    parts = {(t.untyped_storage()._cdata, t.storage_offset(), t.shape): t for t in tensors}
    return list(parts.values())


def _lies_in(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    storage = tensor.untyped_storage()._cdata
    return any(other.untyped_storage()._cdata == storage for other in others)


def _moved(operation, name: str, arguments: tuple, keywords: dict, result: Any) -> int:
    """Bytes that an operator reads and writes."""
    if name.startswith(_WITHOUT_VALUES):
        return 0
    given, made = _once(_tensors((arguments, keywords))), _tensors(result)
    written = [
        tensor
        for argument, value in zip(operation._schema.arguments, arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors(value)
    ]
    if written or _tensors(keywords.get("out")):
        written += _tensors(keywords.get("out"))
        overwritten = name in _OVERWRITING or "out" in keywords
        return sum(map(_size, given)) + (0 if overwritten else sum(map(_size, written)))
    if all(_lies_in(tensor, given) for tensor in made):  # a view
        return 0
    if name in _LOOKUPS:
        return 2 * sum(map(_size, made))
    return sum(map(_size, given)) + sum(map(_size, made))


def _attention(query: Tensor, key: Tensor, value: Tensor, *args, out_val=None, **kwargs) -> int:
    return sdpa_flop_count(query.shape, *_for_each_query(query, key, value))


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args, out_val=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, *_for_each_query(query, key, value))


def _for_each_query(query: Tensor, *grouped: Tensor) -> list[tuple[int, ...]]:
    """Shapes with the heads of the queries: a head that several share works for each. PyTorch 2.13 counts so by
    itself, 2.11 refuses."""
    return [(batch, query.shape[1], length, size) for batch, _, length, size in (tensor.shape for tensor in grouped)]


def _grouped_mm(a: Tensor, b: Tensor, *args, out_val=None, **kwargs) -> int:
    """Each row, or column, of a belongs to one group and meets that group's part of b alone."""
    return 2 * a.numel() * b.shape[-1]


def _packed_mm(a: Tensor, b: Tensor, shape: Sequence[int], *args, out_val=None, **kwargs) -> int:
    """a (…, K) by a weight packed in 4 bits, `shape` (N, K); unpacking it is left out."""
    return 2 * a.numel() * shape[0]


# Questions that fake tensors answer themselves; asked again from here, they come back here.
_METADATA = {
    *("prim::layout", "prim::device", "aten::dim", "aten::is_contiguous", "aten::sym_is_contiguous", "aten::size"),
    *("aten::sym_size", "aten::stride", "aten::sym_stride", "aten::storage_offset", "aten::sym_storage_offset"),
    *("aten::numel", "aten::sym_numel", "aten::is_strides_like_format", "aten::is_non_overlapping_and_dense"),
}
_ATTENTION = [
    f"_scaled_dot_product_{name}"
    for name in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
]
_FORMULAS = {
    **flop_registry,
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm],
    torch.ops.aten._grouped_mm: _grouped_mm,
    **{getattr(torch.ops.aten, name): _attention for name in _ATTENTION},
    **{getattr(torch.ops.aten, f"{name}_backward"): _attention_backward for name in _ATTENTION},
}
_FORMULAS_BY_NAME = {"bitsandbytes::gemm_4bit": _packed_mm}  # known to torch.ops only where bitsandbytes is imported
# Operators that read no more of a table than they give.
_LOOKUPS = {"aten::embedding", "aten::index_select", "aten::gather", "aten::index", "aten::nll_loss_forward"}
# In place, without a look at what was there.
_OVERWRITING = {"aten::copy_", "aten::zero_", "aten::fill_", "aten::bernoulli_", "aten::random_"}
_WITHOUT_VALUES = ("aten::empty", "aten::new_empty", "aten::_local_scalar", "aten::lift", "prim::")
