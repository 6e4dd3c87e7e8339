"""Counts the memory traffic of a computation: each launch of a Triton kernel in the interpreter, each op of PyTorch.

    with count_traffic() as traffic:
        y = lora_linear(x, weight, lora_A, lora_B, backend="triton")
    traffic.launches()                      # {"_shrink_kernel": 1, …}
    traffic.loaded(x) / x.nbytes            # how many times x was read
    print(traffic.report(X=x, W=weight, Y=y))

What a step of the computation (a launch, an op) loads is counted as unique bytes: an element that many programs of a
launch read counts once, one that two launches read counts twice. That is what a device's memory has to move where each
step's operands outgrow the caches, and where a launch that reads an element again finds it in L2. The bytes that a
launch asks for, with its masks applied, are counted beside it. An op of PyTorch counts as one kernel that reads its
inputs and writes its outputs once; a view or uninitialized memory costs nothing, an op in place reads what it changes,
and ops of lora_fast are looked into. A launch that touches memory outside its arguments is an error. CPU tensors only.
"""

import contextlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor

# Ops in place that do not read what they overwrite.
ONLY_WRITE = {"copy_", "fill_", "zero_", "random_", "bernoulli_", "normal_", "uniform_"}
# Ops that leave their result's memory as it is.
NEVER_WRITE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_"}


@dataclass
class Step:
    """One launch or one op: unique bytes by storage, keyed by its address."""

    name: str
    is_launch: bool
    loaded: Counter = field(default_factory=Counter)
    stored: Counter = field(default_factory=Counter)
    requested_loaded: int = 0
    requested_stored: int = 0


class Traffic:
    def __init__(self) -> None:
        self.steps: list[Step] = []
        # Every storage seen, by address, with the size of its elements; kept alive, so that no address is used twice.
        self.storages: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def see(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self.storages.setdefault(storage.data_ptr(), (storage, tensor.itemsize))
        return storage.data_ptr()

    def launches(self) -> Counter:
        return Counter(step.name for step in self.steps if step.is_launch)

    def ops(self) -> Counter:
        return Counter(step.name for step in self.steps if not step.is_launch)

    def loaded(self, tensor: Tensor | None = None) -> int:
        """Unique bytes that the steps loaded, of this tensor's storage or in all."""
        return self._sum((step.loaded for step in self.steps), tensor)

    def stored(self, tensor: Tensor | None = None) -> int:
        return self._sum((step.stored for step in self.steps), tensor)

    @staticmethod
    def _sum(counters: Iterable[Counter], tensor: Tensor | None) -> int:
        if tensor is None:
            return sum(counter.total() for counter in counters)
        address = tensor.untyped_storage().data_ptr()
        return sum(counter[address] for counter in counters)

    def by_size(self, kinds: Mapping[tuple[int, int], str]) -> Counter:
        """Bytes loaded and stored, by kind of tensor, which its number of elements and their size tell; others count
        as "rest"."""
        found: Counter = Counter()
        for step in self.steps:
            for counter in (step.loaded, step.stored):
                for address, count in counter.items():
                    storage, itemsize = self.storages[address]
                    found[kinds.get((storage.nbytes() // itemsize, itemsize), "rest")] += count
        return found

    def report(self, **tensors: Tensor) -> str:
        """A line for each step: the multiple of each tensor that is loaded and stored, and the bytes of all others."""
        names = {t.untyped_storage().data_ptr(): name for name, t in tensors.items()}

        def part(counter: Counter) -> str:
            words = [
                f"{names[address]} {count / self.storages[address][0].nbytes():.2f}"
                for address, count in counter.items()
                if address in names
            ]
            others = sum(count for address, count in counter.items() if address not in names)
            return ", ".join(words + [f"{others:,} B"] * (others > 0)) or "nothing"

        lines = [f"{s.name:24} loads {part(s.loaded):44} stores {part(s.stored)}" for s in self.steps]
        totals = [
            f"{name} loaded {self.loaded(t) / t.untyped_storage().nbytes():.2f}, "
            f"stored {self.stored(t) / t.untyped_storage().nbytes():.2f} times"
            for name, t in tensors.items()
        ]
        return "\n".join(lines + totals)


class _Launch:
    """What one launch touches of the tensors among its arguments: a flag per element, for loads and for stores."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        spans = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
        self.starts = sorted(spans)
        self.ends = [start + spans[start] for start in self.starts]
        self.touched: dict[str, dict[tuple[int, int], np.ndarray]] = {"loaded": {}, "stored": {}}
        self.requested: Counter = Counter()

    def touch(self, way: str, pointers, mask) -> None:
        """Pointers and mask are the interpreter's: uint64 and bool arrays of one shape."""
        addresses = pointers.data[mask.data]
        if addresses.size == 0:
            return
        itemsize = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        low, high = int(addresses.min()), int(addresses.max())
        place = bisect_right(self.starts, low) - 1
        if place < 0 or high + itemsize > self.ends[place]:
            raise AssertionError(f"a launch touches bytes {low:#x} … {high + itemsize:#x}, no tensor of its arguments")
        start, end = self.starts[place], self.ends[place]
        flags = self.touched[way].get((start, itemsize))
        if flags is None:
            flags = self.touched[way][start, itemsize] = np.zeros((end - start) // itemsize, dtype=bool)
        flags[(addresses - np.uint64(start)) // np.uint64(itemsize)] = True
        self.requested[way] += addresses.size * itemsize

    def step(self, name: str) -> Step:
        step = Step(name, True, requested_loaded=self.requested["loaded"], requested_stored=self.requested["stored"])
        for way, counter in (("loaded", step.loaded), ("stored", step.stored)):
            for (start, itemsize), flags in self.touched[way].items():
                counter[start] += int(flags.sum()) * itemsize
        return step


def _unique_bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements of a tensor: an expanded dimension counts once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride()) if stride != 0 or size == 0]
    return int(np.prod(sizes, dtype=np.int64)) * tensor.itemsize


def _tensors(tree) -> list[Tensor]:
    leaves = tree_leaves(tree)
    return [leaf.base if isinstance(leaf, TensorDescriptor) else leaf for leaf in leaves if _is_memory(leaf)]


def _is_memory(leaf) -> bool:
    return isinstance(leaf, (Tensor, TensorDescriptor))


class _Ops(TorchDispatchMode):
    """Counts the ops of PyTorch."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic
        self.paused = False  # inside a launch, where the interpreter handles tensors too

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if func.namespace == "lora_fast":
            with self, torch.no_grad():
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        self._count(func, args, kwargs, result)
        return result

    def _count(self, func, args, kwargs, result) -> None:
        name = func.overloadpacket.__name__
        if name in NEVER_WRITE:
            return
        step = Step(name, False)
        given, written = {}, {}
        for i, argument in enumerate(func._schema.arguments):
            value = kwargs.get(argument.name) if argument.kwarg_only or i >= len(args) else args[i]
            changed = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(value):
                key = self.traffic.see(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()
                if changed:
                    written[key] = tensor
                if not (changed and (name in ONLY_WRITE or argument.is_out)):
                    given[key] = tensor
        inputs = {tensor.untyped_storage().data_ptr() for tensor in (*given.values(), *written.values())}
        results = _tensors(result)
        fresh = [tensor for tensor in results if tensor.untyped_storage().data_ptr() not in inputs]
        if results and not fresh and not written:
            return  # a view
        for tensor in given.values():
            step.loaded[self.traffic.see(tensor)] += _unique_bytes(tensor)
        for tensor in (*written.values(), *fresh):
            step.stored[self.traffic.see(tensor)] += _unique_bytes(tensor)
        if step.loaded or step.stored:
            self.traffic.steps.append(step)


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Yields a Traffic that holds, once the block is left, every launch and op inside it; backward passes too."""
    traffic = Traffic()
    ops = _Ops(traffic)
    launch: _Launch | None = None
    run, builder = GridExecutor.__call__, InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas

    def counted_run(self, *args, **kwargs):
        nonlocal launch
        tensors = _tensors((args, kwargs))
        ops.paused, launch = True, _Launch(tensors)
        try:
            result = run(self, *args, **kwargs)
            for tensor in tensors:
                traffic.see(tensor)
            traffic.steps.append(launch.step(self.fn.__name__))
        finally:
            ops.paused, launch = False, None
        return result

    def counted_load(self, pointers, mask, *rest):
        launch.touch("loaded", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        launch.touch("stored", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_rmw(self, op, pointers, value, mask, *rest):
        launch.touch("loaded", pointers, mask)
        launch.touch("stored", pointers, mask)
        return rmw(self, op, pointers, value, mask, *rest)

    def counted_cas(self, pointers, *rest):
        everything = mock.Mock(data=np.ones_like(pointers.data, dtype=bool))
        launch.touch("loaded", pointers, everything)
        launch.touch("stored", pointers, everything)
        return cas(self, pointers, *rest)

    # All other ways to memory, tensor descriptors among them, end in these four.
    with (
        mock.patch.object(GridExecutor, "__call__", counted_run),
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        mock.patch.object(builder, "create_atomic_rmw", counted_rmw),
        mock.patch.object(builder, "create_atomic_cas", counted_cas),
        ops,
    ):
        yield traffic
