"""A stand-in for Hugging Face's distribution `kernels` 0.18.2, the version that Transformers 5.23 accepts.

Run as a file it installs the stand-in into a folder: python tests/kernels_stub.py SITE_PACKAGES
It has every name that Transformers imports from `kernels` when a model is imported; its decorators change nothing."""

import sys
from pathlib import Path

VERSION = "0.18.2"

PACKAGE = """\
import enum


class Mode(enum.Flag):
    INFERENCE = enum.auto()
    TRAINING = enum.auto()
    TORCH_COMPILE = enum.auto()


class _Described:
    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs


class CUDAProperties(_Described): ...
class ROCMProperties(_Described): ...
class Device(_Described): ...
class KernelizeFallback(_Described): ...
class LayerRepository(_Described): ...
class LocalLayerRepository(_Described): ...


def _unchanged(decorated):
    return decorated


def use_kernel_forward_from_hub(layer_name):
    return _unchanged


def use_kernelized_func(*functions):
    return _unchanged


def _needs_the_real_package(*args, **kwargs):
    raise NotImplementedError("this is a stub of the package `kernels`")


get_kernel = kernelize = register_kernel_mapping = _needs_the_real_package
replace_kernel_forward_from_hub = use_kernel_mapping = _needs_the_real_package
"""

METADATA = """\
Metadata-Version: 2.1
Name: kernels
Version: {version}
Summary: Stub of Hugging Face's package `kernels`
"""

WHEEL = """\
Wheel-Version: 1.0
Generator: lora-fast tests
Root-Is-Purelib: true
Tag: py3-none-any
"""


def install(site: Path, version: str = VERSION) -> None:
    """Write the package and its metadata as pip would."""
    info = f"kernels-{version}.dist-info"
    files = {
        "kernels/__init__.py": PACKAGE,
        f"{info}/METADATA": METADATA.format(version=version),
        f"{info}/WHEEL": WHEEL,
        f"{info}/INSTALLER": "lora-fast tests\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    for name, text in files.items():
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    install(Path(sys.argv[1]))
