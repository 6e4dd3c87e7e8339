"""Step times of all arms in one process, in randomized rounds (`rounds.py`), so that every arm meets the same
disturbances.

All arms share the base weights (all adapters theirs, where those are quantized): one adapter per rank in one model,
PEFT's in copies of its layers around the same parameters, and an optimizer with a learning rate of zero. The second
copy of an arm (the A/A arm) shows what the method makes of two equal things."""

import contextlib
import copy
import faulthandler
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lora_fast import LoraFastError, disable_adapters, set_adapter
from lora_fast.profiler.intervals import MIN_ROUNDS
from lora_fast.profiler.models import ModelSource, build
from lora_fast.profiler.quantization import quantize
from lora_fast.profiler.rounds import Record, Stop, run_rounds
from lora_fast.profiler.workload import (
    FULL,
    PEFT,
    Workload,
    describe,
    loss_of,
    optimizer_of,
    parse_arm,
    train_adapter,
    train_full,
    train_peft,
)

# A large product: from which time on a longer one would not be much faster, and how large at most.
PRODUCT_MS, PRODUCT_SIDE, PRODUCTS = 5.0, 8192, 9
SERIES = ("step_ms", "forward_ms", "backward_ms", "optimizer_ms", "cpu_ms")


class _Arm:
    """What is trained and by which optimizer; `active` makes the model compute this arm and no other.

    adapter: the adapter of the shared model; without one the arm trains `base`, all its parameters, or, where these are
    not given, has a model of its own around them."""

    def __init__(
        self,
        model: nn.Module,
        trained: list[nn.Parameter],
        workload: Workload,
        *,
        adapter: str | None = None,
        base: list[nn.Parameter] | None = None,
    ):
        self.model, self.adapter, self.base, self.passes = model, adapter, base, workload.gradient_accumulation
        self.optimizer = optimizer_of(workload, trained)

    @contextlib.contextmanager
    def active(self):
        if self.adapter is not None:
            set_adapter(self.model, self.adapter)
        if self.base is None:
            yield
            return
        for parameter in self.base:
            parameter.requires_grad_(True)
        try:
            adapted = any(hasattr(module, "lora_A") for module in self.model.modules())
            with disable_adapters(self.model) if adapted else contextlib.nullcontext():
                yield
        finally:
            for parameter in self.base:
                parameter.requires_grad_(False)


def time_arms(
    source: ModelSource,
    workload: Workload,
    arms: Sequence[str],
    rounds: int,
    budget_s: float | None = None,
    target_ci: float | None = None,
    least: int = MIN_ROUNDS,
    final: bool = True,
    record: str | None = None,
    arm_timeout_s: float | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> dict:
    """Time steps of every arm until one of the rules of `rounds.Stop` is met; arms are names: "r8", "peft r8", "full",
    and one of them followed by " again".

    record: the file that rounds are written to as they end, and taken up from; None: none. arm_timeout_s: ends this
    process if building an arm or a step of it takes longer.
    Returns {"status": "ok", "arms": {name: {"status": "ok", a list with one value per timed round for each of SERIES}},
    "warm_ups", "stopped", "product_tflops_s"}. cpu_ms is the CPU time of all threads, empty on a GPU. An arm that runs
    out of memory or raises has its status and error instead, and no values, since a partial series can't be paired; the
    others go on."""
    kept = Record.open(None if record is None else Path(record))
    if kept.product_tflops_s is None:
        with time_limit(arm_timeout_s), contextlib.suppress(torch.OutOfMemoryError):  # no arm's fault
            kept.add("product_tflops_s", product_tflops_s(torch.device(workload.device), workload.torch_dtype))
    # Nobody needs the weights as they were: then they never all are on a GPU that may not hold them.
    alone = workload.quantize and not any(name.startswith(FULL) for name in arms)
    model = build(
        source,
        device="cpu" if alone else workload.device,
        dtype=workload.torch_dtype,
        seed=workload.seed,
        attn_implementation=workload.attn_implementation,
    )
    adapted = model
    if workload.quantize:
        adapted = quantize(model if alone else shared_copy(model), workload.quantize, workload.device)
    base = [] if alone else train_full(model, workload)
    bare = shared_copy(adapted) if any(name.startswith(PEFT) for name in arms) else None
    built: dict[str, _Arm] = {}
    for name in arms:
        if name in kept.failed:
            continue
        kept.add("at", name)
        with time_limit(arm_timeout_s):
            try:
                built[name] = _build_arm(model, adapted, bare, workload, name, base)
            except LoraFastError:
                raise
            except Exception as error:  # an arm that cannot be built is a row
                kept.add("failed", {name: describe(error)})
    for parameter in base:
        parameter.requires_grad_(False)

    batch = workload.batch(model)
    clock = _cuda_step if torch.device(workload.device).type == "cuda" else _cpu_step

    def step(name: str) -> dict[str, float]:
        with time_limit(arm_timeout_s), built[name].active():
            return clock(built[name], batch)

    baseline = FULL if FULL in arms else arms[0]
    gc.disable()  # a collection inside one arm's step would be that arm's bad luck
    try:
        run_rounds(
            [name for name in arms if name in built],
            step,
            Stop(rounds, budget_s, target_ci, baseline, least, final),
            kept,
            seed=workload.seed,
            on_failure=lambda name: _release(built.pop(name)),
            between=gc.collect,
            progress=progress,
        )
    finally:
        gc.enable()
    return {"status": "ok", **results(kept, arms)}


def results(record: Record, arms: Sequence[str]) -> dict:
    """What a record says of these arms."""
    found = {
        name: record.failed.get(name) or {"status": "ok", **{of: record.series(name, of) for of in SERIES}}
        for name in arms
    }
    return {
        "arms": found,
        "warm_ups": record.warm_ups,
        "stopped": record.stopped,
        "product_tflops_s": record.product_tflops_s,
    }


@contextlib.contextmanager
def time_limit(seconds: float | None):
    """Ends this process, with a traceback on stderr, if what is inside takes longer: a thread of faulthandler does so
    wherever this one hangs, in Python or below it."""
    if seconds is not None:
        faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        if seconds is not None:
            faulthandler.cancel_dump_traceback_later()


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the model's modules around the same parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _build_arm(
    model: nn.Module,
    adapted: nn.Module,
    bare: nn.Module | None,
    workload: Workload,
    name: str,
    base: list[nn.Parameter],
) -> _Arm:
    kind, rank = parse_arm(name)
    if kind == FULL:
        return _Arm(model, base, workload, base=base)
    if kind == PEFT:
        return _Arm(*train_peft(shared_copy(bare), workload, rank), workload)
    adapter = name.replace(" ", "-")
    return _Arm(adapted, train_adapter(adapted, workload, rank, adapter), workload, adapter=adapter)


def _cpu_step(arm: _Arm, batch) -> dict[str, float]:
    cpu, marks = time.process_time(), [time.perf_counter()]
    _step(arm, batch, lambda: marks.append(time.perf_counter()))
    spans = [1e3 * (b - a) for a, b in itertools.pairwise(marks)]
    return {"cpu_ms": 1e3 * (time.process_time() - cpu), "step_ms": 1e3 * (marks[-1] - marks[0]), **_phases(spans)}


def _cuda_step(arm: _Arm, batch) -> dict[str, float]:
    """Events mark the phases on the GPU's own clock; one synchronization per step reads them."""
    marks: list[torch.cuda.Event] = []

    def mark() -> None:
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()

    torch.cuda.synchronize()
    mark()
    _step(arm, batch, mark)
    torch.cuda.synchronize()
    spans = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    return {"step_ms": marks[0].elapsed_time(marks[-1]), **_phases(spans)}


def timed(call: Callable[[], None], device: torch.device) -> float:
    """Milliseconds that a call takes, on the GPU's own clock where it runs there."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    marks[0].record()
    call()
    marks[1].record()
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1])


def product_tflops_s(device: torch.device, dtype: torch.dtype) -> float:
    """10¹² FLOPs a second of a large matrix product, a multiply-add being two: the median of PRODUCTS square ones, as
    large as takes PRODUCT_MS, and no larger than PRODUCT_SIDE. What a training step could reach on this machine were it
    nothing but such products."""
    side = 256
    while True:
        generator = torch.Generator(device).manual_seed(0)
        left, right = (torch.randn(side, side, device=device, dtype=dtype, generator=generator) for _ in range(2))
        out = torch.empty_like(left)
        product = partial(torch.mm, left, right, out=out)
        times = [timed(product, device) for _ in range(PRODUCTS)]
        ms = statistics.median(times)
        if ms >= PRODUCT_MS or side >= PRODUCT_SIDE:
            break
        side *= 2
    del left, right, out, product
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return 2 * side**3 / ms / 1e9


def _step(arm: _Arm, batch, mark: Callable[[], None]) -> None:
    """One step, with a mark after each forward, each backward, and the optimizer."""
    for _ in range(arm.passes):
        loss = loss_of(arm.model, batch)
        mark()
        loss.backward()
        mark()
    arm.optimizer.step()
    arm.optimizer.zero_grad(set_to_none=True)
    mark()


def _phases(spans: list[float]) -> dict[str, float]:
    return {"forward_ms": sum(spans[:-1:2]), "backward_ms": sum(spans[1::2]), "optimizer_ms": spans[-1]}


def _release(arm: _Arm) -> None:
    """Give back what a failed step left: gradients and the optimizer's states."""
    arm.optimizer.zero_grad(set_to_none=True)
    arm.optimizer.state.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
