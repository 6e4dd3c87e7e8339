"""Times competing arms of one computation, forward and backward, in interleaved random rounds on rotating inputs.

Every round runs every arm once, in a new random order, and only ratios within a round are compared: what disturbs the
machine disturbs all arms alike. A second copy of the baseline (the A/A arm) shows what the method makes of two equal
things. An arm's calls rotate through several inputs, together more than twice the L2 cache, so that none finds its
input there. On a GPU the calls over all inputs are captured in one CUDA graph: what is compared is the GPU's work, not
Python's. An arm that can't be captured is launched call by call, and its row says so.

triton.testing.do_bench times one function after the other, so that a clock that changes in between changes the ratio;
it serves where a tile is chosen and no ratio is reported (`fastest`)."""

import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import harness
import numpy as np
import torch
from torch import Tensor

from lora_fast import tuning
from lora_fast.profiler.intervals import MIN_ROUNDS, ratio_with_interval

WARM_UP_ROUNDS = 3
MAX_SETS = 16
# ‖result − exact‖ / ‖exact‖ above which an arm counts as wrong: several roundings of bf16 (2⁻⁹ each) stay below, a
# gradient that is zero or of the wrong scaling does not.
WRONG_ABOVE = {torch.bfloat16: 0.03, torch.float16: 0.01, torch.float32: 1e-3}


class InputSet(NamedTuple):
    """x (M, K), a leaf that requires a gradient, and the gradient of each output (M, N_g)."""

    x: Tensor
    dys: tuple[Tensor, ...]


@dataclass
class Arm:
    """One way to compute: forward(x) gives y, or several; `trained` are the factors, whose gradients it must give.

    route: the only candidates that the tuner may take ("cublas", "triton"), "" leaves the choice to it. exact: the same
    in fp32, which the arm must agree with before it is timed; None: only its numbers being finite is asked for (an arm
    with random masks)."""

    forward: Callable[[Tensor], Any]
    trained: Sequence[Tensor] = ()
    route: str = ""
    exact: "Arm | None" = None

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        ys = self.forward(x)
        return (ys,) if isinstance(ys, Tensor) else tuple(ys)

    def step(self, x: Tensor, dys: Sequence[Tensor]) -> list[Tensor]:
        """Forward and backward: every y, dx, and the gradient of each of `trained`."""
        with tuning.only(self.route) if self.route else nullcontext():
            ys = self.outputs(x)
            return [y.detach() for y in ys] + list(torch.autograd.grad(ys, [x, *self.trained], dys))


@dataclass
class Measured:
    """What one arm did: ms of a call, one sample a round, or the error that kept it from being timed."""

    samples: list[float] = field(default_factory=list)
    timed_by: str = ""
    peak_MiB: float | None = None
    saved_MiB: float | None = None
    route: str = ""
    error: str = ""


def input_sets(M: int, K: int, Ns: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[InputSet]:
    """Random inputs and output gradients, enough sets of them to exceed twice the L2 cache of a GPU."""
    generator = torch.Generator(device).manual_seed(0)
    count = 1
    if device.type == "cuda":
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        count = min(max(2, math.ceil(2 * l2 / (M * (K + sum(Ns)) * dtype.itemsize))), MAX_SETS)

    def draw(columns: int) -> Tensor:
        return torch.randn(M, columns, generator=generator, device=device, dtype=torch.float32).to(dtype)

    return [InputSet(draw(K).requires_grad_(), tuple(draw(N) for N in Ns)) for _ in range(count)]


def saved_MiB(arm: Arm, x: Tensor, frozen: Sequence[Tensor]) -> float:
    """What is kept from forward to backward; `frozen` and the arm's own factors are left out."""
    return harness.kept_MiB(partial(arm.outputs, x), (*frozen, *arm.trained))


def peak_MiB(call: Callable[[], Any], device: torch.device) -> float | None:
    """The most that a call holds beyond what was there before; None off a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def routes_of(call: Callable[[], Any]) -> str:
    """Runs a call and says which candidate each step of it that had a choice took: "grad_x N=4096: cublas; …"."""
    taken: dict[str, str] = {}
    choose = tuning.choose

    def recording(step, sizes, device, names, call):
        name = taken[f"{step} N={sizes.get('N')} K={sizes.get('K')}"] = choose(step, sizes, device, names, call)
        return name

    # With nothing kept from earlier calls, every choice is asked for.
    with mock.patch.object(tuning, "choose", recording), mock.patch.object(tuning, "_recent", {}):
        call()
    return "; ".join(f"{label}: {name}" for label, name in taken.items())


def fastest(calls: Mapping[Any, Callable[[], Any]]) -> Any:
    """The key of the call with the least median time on a GPU with a cold L2 cache."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    ms = {}
    for key, call in calls.items():
        try:
            ms[key] = do_bench(call, warmup=5, rep=20, return_mode="median")
        except OutOfResources:
            continue
    return min(ms, key=ms.get)


def _relative_error(result: Tensor, exact: Tensor) -> float:
    return float((result.float() - exact).norm() / exact.norm().clamp_min(1e-30))


def _complaint(results: Sequence[Tensor], exact: Sequence[Tensor] | None, dtype: torch.dtype) -> str:
    """What is wrong with an arm's results, "" if nothing is."""
    if not all(bool(tensor.isfinite().all()) and bool(tensor.any()) for tensor in results):
        return "wrong: not finite, or all zero"
    if exact is None:
        return ""
    worst = max(_relative_error(result, truth) for result, truth in zip(results, exact, strict=True))
    return "" if worst <= WRONG_ABOVE[dtype] else f"wrong: relative error {worst:.3g} against fp32"


def _captured(arm: Arm, sets: Sequence[InputSet]) -> Callable[[], Any]:
    """Replays the arm's calls over all sets as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch asks for: once on a side stream before the capture
        arm.step(*sets[0])
    torch.cuda.current_stream().wait_stream(side)
    gc.collect()  # of graphs that nothing refers to any longer, and what they hold
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            arm.step(*inputs)
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _prepare(
    arm: Arm, sets: Sequence[InputSet], frozen: Sequence[Tensor], truths: dict[int, list[Tensor]], measured: Measured
) -> Callable[[], Any] | None:
    """Compiles, tunes, checks and captures an arm; None, and measured.error, where it fails."""
    x, dys = sets[0]
    device = x.device
    try:
        results = arm.step(x, dys)
        exact = None
        if arm.exact is not None:
            if id(arm.exact) not in truths:
                x_32 = x.detach().float().requires_grad_()
                truths[id(arm.exact)] = arm.exact.step(x_32, [dy.float() for dy in dys])
            exact = truths[id(arm.exact)]
        if complaint := _complaint(results, exact, x.dtype):
            measured.error = complaint
            return None
        del results
        measured.route = routes_of(lambda: arm.step(x, dys))
        measured.saved_MiB = saved_MiB(arm, x, frozen)
        measured.peak_MiB = peak_MiB(lambda: arm.step(x, dys), device)
    except Exception as error:  # an arm that can't run is a row, and the others go on
        measured.error = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        return None
    if device.type == "cuda":
        try:
            call = _captured(arm, sets)
            measured.timed_by = "CUDA graph"
            return call
        except Exception as error:
            print(f"  not captured ({type(error).__name__}: {str(error).partition(chr(10))[0][:150]})", flush=True)
            torch.cuda.synchronize()
    measured.timed_by = "CUDA events" if device.type == "cuda" else "clock"

    def launched() -> None:
        for inputs in sets:
            arm.step(*inputs)

    return launched


def mark(device: torch.device) -> Any:
    """A point in time: an event on the GPU's stream, or the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def ms_between(start: Any, end: Any) -> float:
    return 1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def time_rounds(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    rounds: int,
    out_of_time: Callable[[], bool] = lambda: False,
) -> dict[str, list[float]]:
    """{name: ms of each round}, all of one length: every round calls all, in random order.

    Once there are enough rounds for an interval, none begins when out_of_time() says so."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, names = random.Random(0), list(calls)
    gc.collect()
    gc.disable()  # a collection inside one arm's call would be that arm's bad luck
    try:
        for done in range(WARM_UP_ROUNDS + rounds):
            if done >= WARM_UP_ROUNDS + MIN_ROUNDS and out_of_time():
                break
            order.shuffle(names)
            marks = {}
            for name in names:
                start = mark(device)
                calls[name]()
                marks[name] = start, mark(device)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if done >= WARM_UP_ROUNDS:
                for name, (start, end) in marks.items():
                    times[name].append(ms_between(start, end))
    finally:
        gc.enable()
    return times


def compare(
    arms: Mapping[str, Arm],
    sets: Sequence[InputSet],
    frozen: Sequence[Tensor],
    rounds: int,
    out_of_time: Callable[[], bool] = lambda: False,
) -> dict[str, Measured]:
    """Prepares every arm, then times all of them; frozen: the weights, which no arm is charged for. Arms whose turn
    comes when out_of_time() are left out, with harness.NO_TIME."""
    device = sets[0].x.device
    measured = {name: Measured() for name in arms}
    truths: dict[int, list[Tensor]] = {}
    calls: dict[str, Callable[[], Any] | None] = {}
    for name, arm in arms.items():
        if any(calls.values()) and out_of_time():  # rather some arms than none: the first is the baseline
            measured[name].error = harness.NO_TIME
        else:
            calls[name] = _prepare(arm, sets, frozen, truths, measured[name])
    truths.clear()
    calls = {name: call for name, call in calls.items() if call is not None}
    for name, samples in time_rounds(calls, device, rounds, out_of_time).items():
        measured[name].samples = [ms / len(sets) for ms in samples]
    del calls
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return measured


def ratio(measured: Measured, baseline: Measured) -> tuple[float, tuple[float, float]] | None:
    """Median of paired ratios and its 95% interval; None where one of the two was not timed."""
    if not measured.samples or not baseline.samples:
        return None
    return ratio_with_interval(measured.samples, baseline.samples)


def figures(measured: Mapping[str, Measured], baseline: str, plain: str | None = None) -> dict[str, dict[str, str]]:
    """{arm: columns of its row}. plain: the arm that computes the baseline's products with our GEMM; how fast it is
    against the baseline's cuBLAS is a column of every row."""
    gemm = ratio(measured[baseline], measured[plain]) if plain in measured else None
    rows = {}
    for name, arm in measured.items():
        row = {
            "rounds": str(len(arm.samples)),
            "timed_by": arm.timed_by,
            "peak_MiB": "" if arm.peak_MiB is None else f"{arm.peak_MiB:.1f}",
            "saved_MiB": "" if arm.saved_MiB is None else f"{arm.saved_MiB:.1f}",
            "gemm_over_cublas": "" if gemm is None else f"{gemm[0]:.3f}",
            "route": arm.route,
            "error": arm.error,
        }
        if arm.samples:
            row |= {f"ms_p{q}": f"{np.percentile(arm.samples, q):.4f}" for q in (20, 50, 80)}
        if (found := ratio(arm, measured[baseline])) is not None:
            middle, (low, high) = found
            row |= {"ratio_to_frozen": f"{middle:.4f}", "ratio_low": f"{low:.4f}", "ratio_high": f"{high:.4f}"}
        rows[name] = row
    return rows
