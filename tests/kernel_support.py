"""What every kernel test shares: where kernels run here, in which dtypes, and how their errors are judged."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import bf16_interpreter
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

from lora_fast.kernels.launch import Launch

# On a GPU the same tests run there.
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
if DEVICE.type == "cpu":
    bf16_interpreter.install()


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Standard normal numbers, the same on every device, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)


def error(result: Tensor, exact: Tensor) -> float:
    """‖result − exact‖_F / ‖exact‖_F in float64; NaN anywhere gives NaN, and all zeros give 1."""
    result, exact = result.double().cpu(), exact.double().cpu()
    assert result.shape == exact.shape, f"shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
    return float((result - exact).norm() / exact.norm().clamp_min(1e-300))


def assert_as_exact_as(result: Tensor, eager: Tensor, exact: Tensor, *, factor: float = 2.0) -> None:
    """The kernel's error against float64 is at most `factor` times the error of the same-dtype PyTorch path."""
    # Where PyTorch happens to be exact, one rounding of the result is allowed.
    bound = factor * max(error(eager, exact), torch.finfo(result.dtype).eps / 4)
    actual = error(result, exact)
    assert actual <= bound, f"relative error {actual:.3g}, allowed {bound:.3g}"


def assert_rounded_once(result: Tensor, exact: Tensor) -> None:
    """Sums of numbers in half precision are in fp32: rounded to half at the end, a result errs no more than the exact
    one so rounded; in fp32 it errs hardly at all. A sum of some hundred products rounded on its way errs by half as
    much again at least."""
    if result.dtype == torch.float32:
        bound = 16 * torch.finfo(torch.float32).eps
    else:
        bound = 1.02 * error(exact.to(result.dtype), exact)
    actual = error(result, exact)
    assert actual <= bound, f"relative error {actual:.3g}, rounded once {bound:.3g}"


def assert_product(result: Tensor, left: Tensor, right: Tensor) -> None:
    """Each element of `result` differs from left @ right by no more than rounding can explain; both in result's dtype.

    For the smallest shapes, where a single element may owe its whole relative error to cancellation: the bound is
    (n + 2) · eps · |left| |right| for sums of n products, half of which no order of summation exceeds (Higham 2002,
    section 3.1). One product of n left out still shows."""
    left, right = left.double(), right.double()
    bound = (left.shape[1] + 2) * torch.finfo(result.dtype).eps * (left.abs() @ right.abs())
    difference = (result.double() - left @ right).abs()
    assert bool((difference <= bound).all()), f"differs by {float(difference.max()):.3g}"


@contextlib.contextmanager
def nan_filled() -> Iterator[None]:
    """Inside the block torch.empty and its like hand out floating-point memory full of NaN, integers full of 0x55: what
    a kernel forgets to write shows."""

    def filling(make):
        def filled(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.device.type == "meta":
                return tensor
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 0x55)

        return filled

    new_empty = Tensor.new_empty
    with (
        mock.patch.object(torch, "empty", filling(torch.empty)),
        mock.patch.object(torch, "empty_like", filling(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", filling(new_empty)),
    ):
        yield


@contextlib.contextmanager
def count_launches() -> Iterator[Counter]:
    """Yields a Counter {kernel's name: launches inside the block}, in the interpreter and on a GPU."""
    launches: Counter = Counter()
    inside: list[Launch] = []  # a Launch that goes Triton's way is one launch

    def counting(method, name_of):
        def counted(self, *args, **kwargs):
            if not inside:
                launches[name_of(self)] += 1
            return method(self, *args, **kwargs)

        return counted

    def launched(self, *operands):
        launches[self.kernel.fn.__name__] += 1
        inside.append(self)
        try:
            return launch(self, *operands)
        finally:
            inside.pop()

    launch = Launch.__call__
    with (
        mock.patch.object(Launch, "__call__", launched),
        mock.patch.object(GridExecutor, "__call__", counting(GridExecutor.__call__, lambda self: self.fn.__name__)),
        mock.patch.object(JITFunction, "run", counting(JITFunction.run, lambda self: self.fn.__name__)),
    ):
        yield launches
