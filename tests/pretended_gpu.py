"""Runs a program as on a GPU, without one: python tests/pretended_gpu.py benchmarks/bench_mlp.py --tiny

So that lines which only a GPU reaches (the tuner's timing, the capture of graphs, events) have run before one is at
hand. Tensors on the CPU say that they are on cuda:0, asking for a GPU gives a tensor on the CPU, kernels run in
Triton's interpreter, and the rest of torch.cuda does nothing. Results are right; times, memory and the replay of a
graph mean nothing. While a graph is captured, all that would wait for the GPU raises. What looks at devices in C++
(FakeTensor, torch.compile) can't be deceived. benchmarks/null_driver.py is the other half: launches, no results."""

import contextlib
import functools
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import bf16_interpreter
import torch
from torch.utils._device import DeviceContext
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

GPU, CAPABILITY = torch.device("cuda", 0), (9, 0)
FACTORIES = "arange empty empty_like empty_strided eye full linspace ones ones_like rand randint randn tensor zeros"
METHODS = "new_empty new_full new_ones new_tensor new_zeros to"
# What no graph that is being captured allows: the host has to wait for the number.
WAITING = "__bool__ __float__ __int__ cpu item nonzero numpy tolist"

_capturing = False


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.startswith("cuda") else value


def _redirected(function: Callable, *, waits: bool = False) -> Callable:
    """`function` with the CPU for every GPU among its arguments."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        if waits:
            _wait()
        return function(*map(_on_cpu, args), **{name: _on_cpu(value) for name, value in kwargs.items()})

    return run


def _wait(device: Any = None) -> None:
    if _capturing:
        raise RuntimeError("a graph is being captured: nothing may wait for the GPU")


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        _wait()

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.time - self.time)


class Stream:
    cuda_stream = 0

    def wait_stream(self, stream: "Stream") -> None:
        pass

    def synchronize(self) -> None:
        _wait()


class Graph:
    def replay(self) -> None:
        pass


@contextlib.contextmanager
def _capture(graph: Graph) -> Iterator[None]:
    global _capturing
    _capturing = True
    try:
        yield
    finally:
        _capturing = False


class Driver:
    """What Triton's benchmarking asks of one."""

    get_device_interface = staticmethod(lambda: torch.cuda)
    get_empty_cache_for_benchmark = staticmethod(lambda: torch.empty(1024, dtype=torch.int32))
    clear_cache = staticmethod(lambda cache: None)
    get_active_torch_device = staticmethod(lambda: GPU)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_device_capability = staticmethod(lambda device=0: CAPABILITY)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


def install() -> None:
    """From here on this process has a GPU, as far as Python can see."""
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "current_stream": Stream(),
        "get_device_capability": CAPABILITY,
        "get_device_name": "pretended GPU",
        "get_device_properties": SimpleNamespace(multi_processor_count=132, L2_cache_size=2**20),
        "mem_get_info": (70 * 2**30, 80 * 2**30),
        "memory_allocated": 2**20,
        "max_memory_allocated": 2**20,
        "memory_reserved": 2**20,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    for name in ("_lazy_init", "empty_cache", "init", "manual_seed_all", "reset_peak_memory_stats", "set_device"):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    for name, value in {"Event": Event, "Stream": Stream, "CUDAGraph": Graph, "graph": _capture}.items():
        setattr(torch.cuda, name, value)
    for name in ("device", "stream"):
        setattr(torch.cuda, name, lambda *args: contextlib.nullcontext())
    torch.cuda.synchronize, torch.cuda.is_current_stream_capturing = _wait, lambda: _capturing

    for owner, names, waits in (
        (torch, FACTORIES, False),
        (torch.Tensor, METHODS, False),
        (torch.Tensor, WAITING, True),
        (torch, "is_autocast_enabled get_autocast_dtype", False),
    ):
        for name in names.split():
            setattr(owner, name, _redirected(getattr(owner, name), waits=waits))
    for kind in (torch.autocast, DeviceContext):
        kind.__init__ = _redirected(kind.__init__)
    device_of = torch.Tensor.device.__get__
    torch.Tensor.device = property(lambda tensor: GPU if device_of(tensor).type == "cpu" else device_of(tensor))
    torch.Tensor.is_cuda = property(lambda tensor: device_of(tensor).type == "cpu")
    torch.Tensor.get_device = lambda tensor: 0 if tensor.is_cuda else -1

    class Generator(torch.Generator):
        def __new__(cls, device: Any = "cpu"):
            return super().__new__(cls, "cpu")

    torch.Generator = Generator
    sys.modules["bitsandbytes"] = None  # which loads what is built for CUDA where it finds a GPU
    driver.set_active(Driver())
    bf16_interpreter.install()


if __name__ == "__main__":
    install()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
