"""Peak memory of one arm's training step, measured in a process of its own and split by what the memory holds.

A fresh process per arm has a clean allocator, and running out of memory there costs one row, not the run.
- CUDA: `torch.cuda.max_memory_allocated` is the peak, and the tracker splits it.
- CPU: PyTorch has no counter, so the tracker's peak is the peak. Beside it stands the process's resident peak, which
  also holds the libraries' scratch memory. It only means something with glibc's thresholds lowered (`MALLOC`): by
  default freed blocks stay resident, and the peak of a LoRA step reads 50–115% too high (measured on a Llama of 5M
  parameters).
Nothing is timed here: the tracker sees every operation and slows it down."""

import contextlib
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_fast import LoraFastError
from lora_fast.dispatch import IMPLEMENTATIONS
from lora_fast.profiler.models import ModelSource, build
from lora_fast.profiler.quantization import quantize, states_of
from lora_fast.profiler.sharding import Gathered
from lora_fast.profiler.workload import FULL, PEFT, Workload, loss_of, optimizer_of, train

MiB = 2**20
# PyTorch's CUDA allocator hands out multiples of this many bytes.
CUDA_GRANULE = 512
# gathered: what a process of several holds beside its share (profiler/sharding.py); 0 in one process.
CATEGORIES = ("weights", "adapters", "gradients", "optimizer", "activations", "temporaries", "gathered")
PHASES = ("forward", "backward", "optimizer")
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class MemoryTracker(TorchDispatchMode):
    """Bytes alive in tensors, by category, at any moment of a step; each storage is counted once, until it is freed.

    A storage born in the forward is an activation, one born later a temporary, unless `add` says otherwise. round_to is
    the allocator's granule in bytes: 1 on a CPU, 512 on CUDA. lora-fast's own operators are looked into; what another
    one frees inside itself is not seen. Works on fake tensors as on real ones. history: a list that takes (phase,
    moments) for each stretch of a phase, moments being the bytes of each of CATEGORIES whenever one of them grew."""

    looks_inside = True  # of ops

    def __init__(self, round_to: int = 1, history: list[tuple[str, list[tuple[int, ...]]]] | None = None):
        super().__init__()
        self.round_to = round_to
        self.history = history
        self.current = dict.fromkeys(CATEGORIES, 0)
        self.total = self.peak = 0
        self.at_peak = dict(self.current)
        self.peak_phase: str | None = None
        self.phase_peaks: dict[str, dict[str, int]] = {}
        self.phase: str | None = None
        self._highest = 0
        self._live: dict[int, list] = {}

    def add(self, tensor: Tensor, category: str) -> None:
        """Count the tensor's storage under this category, moving it there if it is already counted."""
        storage = tensor.untyped_storage()
        # The storage's address is its identity while it lives; the finalizer removes the entry before it can be reused.
        entry = self._live.get(storage._cdata)
        if entry is not None:
            self.current[entry[1]] -= entry[0]
            self.current[category] += entry[0]
            entry[1] = category
            self._note_peak()
        else:
            self._track(storage, category)

    def _track(self, storage, category: str) -> None:
        size = -(-storage.nbytes() // self.round_to) * self.round_to
        if size == 0:
            return
        key = storage._cdata
        finalizer = weakref.finalize(storage, self._free, key)
        finalizer.atexit = False
        self._live[key] = [size, category]
        self.current[category] += size
        self.total += size
        self._note_peak()

    def _free(self, key: int) -> None:
        size, category = self._live.pop(key)
        self.current[category] -= size
        self.total -= size

    def _note_peak(self) -> None:
        if self.phase is None:
            return
        if self.history is not None:
            self.history[-1][1].append(tuple(self.current.values()))
        if self.total >= self._highest:
            self._highest, self.phase_peaks[self.phase] = self.total, dict(self.current)
        # >=, so that a storage that is only now known to be a gradient is named so in the snapshot of the peak it made.
        if self.total >= self.peak:
            self.peak, self.at_peak, self.peak_phase = self.total, dict(self.current), self.phase

    def reserve(self, size: int) -> None:
        """Count so many bytes more (less, if negative) as gathered, which no tensor shows."""
        self.current["gathered"] += size
        self.total += size
        if size > 0:
            self._note_peak()

    def start(self, phase: str) -> None:
        if phase != self.phase:
            if self.history is not None:
                self.history.append((phase, []))
            self.phase, self._highest = phase, sum(self.phase_peaks.get(phase, {}).values())
        self._note_peak()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        inside = IMPLEMENTATIONS.get(operation.name()) if operation.namespace == "lora_fast" else None
        if inside is None:
            result = operation(*arguments, **(keywords or {}))
        else:
            with self:
                result = inside(*arguments, **(keywords or {}))
        category = "activations" if self.phase == "forward" else "temporaries"
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._live:
                    self._track(storage, category)
        return result


def track_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    *,
    adapters=(),
    round_to: int = 1,
    micro_steps: int = 1,
    mark: Callable[[], None] = lambda: None,
    history: list | None = None,
    shards: int = 1,
) -> dict:
    """One training step under the tracker, after at least one plain step, so that the optimizer's states exist; of
    micro_steps passes forward and backward. mark is called after each forward and each backward. history: as
    MemoryTracker takes it. shards: processes that FSDP2 spreads the model over; what it gathers is counted beside the
    rest, which is counted whole.

    Returns bytes: peak, by_category at the peak (they add up to it), peak_phase, phase_peaks, phase_categories (the
    categories at each phase's peak), and after_step: the categories after the optimizer's step, gradients not yet
    freed."""
    tracker = MemoryTracker(round_to, history)
    adapter_ids = {id(parameter) for parameter in adapters}
    for parameter in model.parameters():
        tracker.add(parameter, "adapters" if id(parameter) in adapter_ids else "weights")
    for tensor in (*model.buffers(), *states_of(model)):
        tracker.add(tensor, "weights")
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                tracker.add(value, "optimizer")
    for tensor in batch.values():
        tracker.add(tensor, "activations")
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gathered = Gathered(model, shards, tracker.reserve) if shards > 1 else None

    def arrived(parameter: nn.Parameter) -> None:
        tracker.add(parameter.grad, "gradients")
        if gathered:
            gathered.gradient(parameter)

    hooks = [p.register_post_accumulate_grad_hook(arrived) for p in trained]
    try:
        with tracker:
            for _ in range(micro_steps):
                tracker.start("forward")
                if gathered:
                    gathered.start_forward()
                loss = loss_of(model, batch)
                mark()
                if gathered:
                    gathered.end_forward()
                tracker.start("backward")
                if gathered:
                    gathered.start_backward()
                loss.backward()
                mark()
                del loss
                if gathered:
                    gathered.end_backward()
            tracker.start("optimizer")
            optimizer.step()
            after_step = dict(tracker.current)
            optimizer.zero_grad(set_to_none=True)
    finally:
        for hook in hooks:
            hook.remove()
        if gathered:
            gathered.remove()
    return {
        "peak": tracker.peak,
        "by_category": tracker.at_peak,
        "peak_phase": tracker.peak_phase,
        "phase_peaks": {phase: sum(held.values()) for phase, held in tracker.phase_peaks.items()},
        "phase_categories": tracker.phase_peaks,
        "after_step": after_step,
    }


def measure_arm(
    source: ModelSource, workload: Workload, kind: str, rank: int | None, memory_limit_MiB: float | None = None
) -> dict:
    """Build one arm ("lora", "full" or "peft") in this process, which should be fresh, and measure its step.

    memory_limit_MiB bounds what this process may take on top of what it had before the model was built.
    Returns status "ok" with peak_MiB, by_category_MiB, phase_peaks_MiB, phase_categories_MiB, peak_phase and
    after_step_MiB, as track_step names them, and resident_peak_MiB (CPU on Linux): the resident peak less what the
    process holds besides tensors, which is mostly code."""
    device = torch.device(workload.device)
    on_cpu = device.type == "cpu"
    _load_libraries(source, workload, kind)
    before, packing = _status_MiB("VmData"), workload.packing(kind)
    if not packing:
        _limit_memory(memory_limit_MiB, device, before)
    model = build(
        source,
        device="cpu" if packing else device,
        dtype=workload.torch_dtype,
        seed=workload.seed,
        attn_implementation=workload.attn_implementation,
    )
    if packing:
        quantize(model, packing, device)
        _limit_memory(memory_limit_MiB, device, before)  # what was there to be packed is not the arm's
    model, trained = train(model, workload, kind, rank)
    adapters = [] if kind == FULL else trained
    optimizer = optimizer_of(workload, trained)
    batch = workload.batch(model)

    # A step on a few tokens creates the optimizer's states and loads the code that a step needs.
    _plain_step(model, optimizer, {name: tensor[:1, :8] for name, tensor in batch.items()})
    resident = _status_MiB("VmRSS")
    besides = None if resident is None else resident - _held_bytes(model, optimizer) / MiB
    _reset_peak(device)
    _plain_step(model, optimizer, batch)
    # From the second pass on, gradients are there while the forward runs; a third changes nothing.
    passes = min(workload.gradient_accumulation, 2)
    round_to = 1 if on_cpu else CUDA_GRANULE
    tracked = track_step(model, optimizer, batch, adapters=adapters, round_to=round_to, micro_steps=passes)
    highest = _status_MiB("VmHWM")
    return {
        "status": "ok",
        "peak_MiB": (tracked["peak"] if on_cpu else torch.cuda.max_memory_allocated(device)) / MiB,
        "tracked_peak_MiB": tracked["peak"] / MiB,
        "resident_peak_MiB": highest - besides if on_cpu and besides is not None and highest is not None else None,
        "by_category_MiB": in_MiB(tracked["by_category"]),
        "phase_peaks_MiB": in_MiB(tracked["phase_peaks"]),
        "phase_categories_MiB": {phase: in_MiB(held) for phase, held in tracked["phase_categories"].items()},
        "peak_phase": tracked["peak_phase"],
        "after_step_MiB": in_MiB(tracked["after_step"]),
    }


def in_MiB(sizes: dict[str, int]) -> dict[str, float]:
    return {name: size / MiB for name, size in sizes.items()}


def _plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, buffers and optimizer states, each storage once: all tensors that live between two steps."""
    states = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    weights = (*model.parameters(), *model.buffers(), *states_of(model))
    storages = (tensor.untyped_storage() for tensor in (*weights, *states))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _load_libraries(source: ModelSource, workload: Workload, kind: str) -> None:
    """Import the model's code and start the thread pools, so that a memory limit leaves them out."""
    build(source, device="meta", dtype=workload.torch_dtype)
    if kind == PEFT:
        import peft  # noqa: F401
    # Large enough that all threads take part.
    layer = nn.Linear(512, 512, device=workload.device, dtype=workload.torch_dtype)
    layer(torch.ones(512, 512, device=workload.device, dtype=workload.torch_dtype)).sum().backward()


def _status_MiB(field: str) -> float | None:
    """A field of /proc/self/status, which counts in KiB; None where there is no such file (macOS, Windows)."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith(field + ":")), None)


def _reset_peak(device: torch.device) -> None:
    """Start the peak anew, so that what building the model took for a moment does not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Where that is refused, the peak includes the building, which errs to the high side.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # 5 sets VmHWM to the present VmRSS (Linux ≥ 4.0)


def _limit_memory(limit_MiB: float | None, device: torch.device, used: float | None) -> None:
    """used: MiB that are not to count, on a CPU."""
    if limit_MiB is None:
        return
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_MiB * MiB / total), device)
        return
    if used is None:
        raise LoraFastError("a memory limit on the CPU needs Linux")
    import resource  # absent on Windows

    limit = int((used + limit_MiB) * MiB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
