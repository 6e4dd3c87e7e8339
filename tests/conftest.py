"""What every test process needs before torch, triton or transformers is imported.

The repository root leaves sys.path, where `python -m pytest` puts it. It holds our folder `kernels`, which Transformers
would take for Hugging Face's package of that name and import a second time; with that package installed beside it,
`import transformers` then fails. The tests import the installed `lora_fast`, as its users do.

Settings, each only where the caller has not chosen:
- TRITON_INTERPRET=1: kernels run in Triton's interpreter, on the CPU. Triton reads it as a kernel is decorated, so it
  has to be set before the first import. A test that compiles for a GPU starts a process of its own without it, with
  `compile_environment`; on a machine with a GPU, run pytest with TRITON_INTERPRET=0.
- HF_HUB_OFFLINE=1: a test that asks the hub for something fails at once instead of hanging.
- OMP_NUM_THREADS: each worker of pytest-xdist gets its share of the cores, so that they do not fight over them.
- OMP_WAIT_POLICY=PASSIVE: threads that wait sleep instead of spinning. On busy cores spinning made tiny models 10 times
  slower.
- OPENBLAS_CORETYPE=Haswell, on x86: the interpreter's dots are NumPy's, whose BLAS rounds as it likes on each kind of
  processor. With one kind for all, a kernel's error against PyTorch's is the same on every machine.
"""

import os
import platform
import sys
from pathlib import Path

import pytest
import without_hypothesis

ROOT = Path(__file__).resolve().parent.parent

# "" stands for the current folder, which may be the root, or become it.
sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != ROOT]

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if platform.machine() in ("x86_64", "AMD64"):
    os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

without_hypothesis.install()
from hypothesis import settings  # noqa: E402

# No deadline: a kernel's first call compiles it, and no test here asserts a time. CI draws the same examples each run.
settings.register_profile("lora-fast", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("lora-fast")


@pytest.fixture
def compile_environment() -> dict[str, str]:
    """The environment for a process that compiles Triton kernels instead of interpreting them."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
