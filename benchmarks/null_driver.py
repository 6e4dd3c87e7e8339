"""A CUDA driver that does nothing, so that what a step costs the host can be timed on a machine without a GPU.

    with pretended_gpu():
        …   # tensors say that they are on a GPU (they stay on the CPU); kernels are compiled for sm_90, and not run

Real are Python, PyTorch's autograd, lora_fast and Triton's compiler and launcher; a launch ends in a function that
returns at once, where a driver takes some 2 µs. Results of kernels are whatever was in memory. Call `load` before
lora_fast.kernels is imported, without TRITON_INTERPRET. Needs a C compiler, which Triton needs anyway."""

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

CAPABILITY = 9, 0
# What Triton's launcher looks up in libcuda, and what it needs to hear: an H100's limits, and success.
_SOURCE = """
#include <stddef.h>
#include <stdint.h>
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : 232448;
    return 0;
}
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)1; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { *(uint64_t *)data = pointer; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "no driver"; return 0; }
int cuOccupancyMaxActiveClusters(int *count, void *function, void *config) { *count = 1; return 0; }
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
"""
_SUCCEED = (
    *("cuInit", "cuCtxSetCurrent", "cuCtxSetLimit", "cuCtxGetLimit", "cuFuncSetAttribute", "cuFuncSetCacheConfig"),
    *("cuModuleUnload", "cuLaunchKernelEx", "cuLaunchKernel", "cuTensorMapEncodeTiled", "cuTensorMapEncodeIm2col"),
)


def load() -> None:
    """Builds the driver and makes it the process's libcuda.so.1."""
    folder = Path(tempfile.mkdtemp(prefix="null-driver-"))
    source, library = folder / "cuda.c", folder / "libcuda.so.1"
    functions = "\n".join(f"int {name}(void) {{ return 0; }}" for name in _SUCCEED)
    source.write_text(_SOURCE + functions, encoding="utf-8")
    compiler = os.environ.get("CC") or shutil.which("cc") or "gcc"
    command = [compiler, "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    gpu, tensors = torch.device("cuda", 0), torch.Tensor
    properties = SimpleNamespace(multi_processor_count=132, L2_cache_size=50 * 2**20)

    def on_cpu(make):
        return functools.wraps(make)(lambda *size, device=None, **options: make(*size, **options))

    active = CudaDriver()
    active.get_current_device, active.get_current_stream = lambda: 0, lambda device: 0
    active.get_device_capability = lambda device=0: CAPABILITY
    small = torch.zeros(1, 1)

    def matrix_product(one, other, *, out):
        torch._C._VariableFunctions.mm(small, small)  # its dispatch, without its arithmetic
        return out

    with contextlib.ExitStack() as stack:
        replace = lambda *where, **how: stack.enter_context(mock.patch.object(*where, **how))  # noqa: E731
        for name in ("empty", "zeros", "randint"):
            replace(torch, name, on_cpu(getattr(torch, name)))
        replace(torch, "mm", matrix_product)
        replace(tensors, "device", property(lambda tensor: gpu), create=True)
        replace(tensors, "is_cuda", property(lambda tensor: True), create=True)
        replace(tensors, "get_device", lambda tensor: 0, create=True)
        replace(torch.cuda, "current_device", lambda: 0)
        replace(torch.cuda, "get_device_capability", lambda device=None: CAPABILITY)
        replace(torch.cuda, "get_device_properties", lambda device=None: properties)
        replace(torch.cuda, "get_device_name", lambda device=None: "no GPU")
        replace(torch.cuda, "is_current_stream_capturing", lambda: False)
        driver.set_active(active)  # and so it stays: there is no other
        yield
