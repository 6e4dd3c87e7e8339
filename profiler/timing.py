"""Step times of all arms in one process, stepped in randomized rounds, so that every arm meets the same disturbances.

Timing one arm after the other is wrong where it looks best: on a busy machine it gave 0.38 of full fine-tuning with a
tight interval where the truth was 0.93. Here each round steps every arm once in a new random order, and only ratios
within a round are compared. The second copy of full fine-tuning (the A/A arm) shows what the method makes of two equal
things.

All arms share the base weights: one adapter per rank in one model, and AdamW with a learning rate of zero."""

import contextlib
import gc
import itertools
import random
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from lora_fast import LoraFastError, disable_adapters, set_adapter
from lora_fast.profiler.intervals import MIN_ROUNDS
from lora_fast.profiler.models import ModelSource, build
from lora_fast.profiler.workload import (
    FULL,
    FULL_AGAIN,
    Workload,
    adamw,
    describe,
    loss_of,
    train_adapter,
    train_full,
)

WARM_UP_ROUNDS = 3


SERIES = ("step_ms", "forward_ms", "backward_ms", "optimizer_ms", "cpu_ms")


class _Arm:
    """What is trained and by which optimizer; `active` makes the shared model compute this arm and no other."""

    def __init__(self, model: nn.Module, adapter: str | None, trained: list[nn.Parameter], workload: Workload):
        self.model, self.adapter, self.passes = model, adapter, workload.gradient_accumulation
        self.optimizer = adamw(trained, workload.foreach)

    @contextlib.contextmanager
    def active(self, base: list[nn.Parameter]):
        if self.adapter is None:
            for parameter in base:
                parameter.requires_grad_(True)
            try:
                with disable_adapters(self.model):
                    yield
            finally:
                for parameter in base:
                    parameter.requires_grad_(False)
        else:
            set_adapter(self.model, self.adapter)
            yield


def time_arms(
    source: ModelSource,
    workload: Workload,
    arms: Sequence[str],
    rounds: int,
    budget_s: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Time `rounds` steps of every arm, after warm-up; arms are names: "r8", "full", "full again".

    After budget_s seconds no round begins, once there are MIN_ROUNDS. (It looks at the clock and not at the ratios, so
    it does not favour a result.) progress is called with the number of rounds done, warm-up included, and their total.
    Returns {"status": "ok", "arms": {name: {"status": "ok", a list with one value per timed round for each of
    SERIES}}}. cpu_ms is the CPU time of all threads, empty on a GPU. An arm that runs out of memory or raises has its
    status and error instead, and no values, since a partial series cannot be paired; the others go on."""
    model = build(
        source,
        device=workload.device,
        dtype=workload.torch_dtype,
        seed=workload.seed,
        attn_implementation=workload.attn_implementation,
    )
    base = train_full(model, workload)
    results: dict[str, dict] = {}
    built: dict[str, _Arm] = {}
    for name in arms:
        try:
            built[name] = _build_arm(model, workload, name, base)
            results[name] = {"status": "ok", **{series: [] for series in SERIES}}
        except LoraFastError:
            raise
        except Exception as error:  # an arm that cannot be built is a row
            results[name] = describe(error)
    for parameter in base:
        parameter.requires_grad_(False)

    batch = workload.batch(model)
    clock = _cuda_step if torch.device(workload.device).type == "cuda" else _cpu_step
    order = random.Random(workload.seed)
    started = time.monotonic()
    gc.disable()  # a collection inside one arm's step would be that arm's bad luck
    try:
        for done in range(WARM_UP_ROUNDS + rounds):
            if budget_s is not None and done >= WARM_UP_ROUNDS + MIN_ROUNDS and time.monotonic() - started > budget_s:
                break
            names = list(built)
            order.shuffle(names)
            for name in names:
                try:
                    with built[name].active(base):
                        sample = clock(built[name], batch)
                except Exception as error:
                    results[name] = describe(error)
                    _release(built.pop(name))
                    continue
                if done >= WARM_UP_ROUNDS:
                    for series, value in sample.items():
                        results[name][series].append(value)
            gc.collect()
            progress(done + 1, WARM_UP_ROUNDS + rounds)
    finally:
        gc.enable()
    return {"status": "ok", "arms": results}


def _build_arm(model: nn.Module, workload: Workload, name: str, base: list[nn.Parameter]) -> _Arm:
    if name in (FULL, FULL_AGAIN):
        return _Arm(model, None, base, workload)
    return _Arm(model, name, train_adapter(model, workload, int(name[1:])), workload)


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
