"""One linear layer with LoRA, forward and backward, against the frozen layer's forward and dX.

    make gpu, or: python benchmarks/bench_lora_linear.py [--rounds 30] [--deadline 120]

Arms: our op as the tuner runs it and by each of its two routes, our layer from apply_lora and from accelerate_peft,
PEFT with its default fp32 adapters and with bf16 ones, and Unsloth's and LoRAFusion's factorings written by us
(baselines.py). The columns are in harness.COLUMNS; gemm_over_cublas is the speed of our GEMM without any adapter over
cuBLAS's in the same rounds. Rows that lose are kept."""

import sys
from collections.abc import Iterator
from typing import NamedTuple

import arms as shared
import baselines
import harness
from modules import linear, module_arms
from timing import Arm
from torch import nn

from lora_fast import lora_linear


class Case(NamedTuple):
    M: int
    K: int
    N: int
    R: int
    dropout: float


def cases(tiny: bool) -> list[Case]:
    """The most telling first: a deadline cuts the end."""
    if tiny:
        return [Case(24, 16, 40, 4, p) for p in (0.0, 0.1)]
    square, up, down = (4096, 4096), (4096, 14336), (14336, 4096)
    larger = ((5120, 5120), (8192, 8192))
    plan = [(8192, *size, 16, p) for size in (square, up, down) for p in (0.0, 0.1)]
    plan += [(8192, *square, R, 0.0) for R in (64, 8, 256)]
    plan += [(M, *square, 16, p) for M in (2048, 4096) for p in (0.0, 0.1)]
    plan += [(8192, *size, 16, p) for size in larger for p in (0.0, 0.1)]
    plan += [(8192, *size, R, 0.0) for size in (up, down) for R in (64, 8, 256)]
    plan += [
        (M, *size, R, p)
        for R in (16, 64, 8, 256)
        for size in (square, up, down, *larger)
        for p in (0.0, 0.1)
        for M in (8192, 4096, 2048)
    ]
    return [Case(*case) for case in dict.fromkeys(plan)]


class Projection(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.proj = linear(weight)

    def forward(self, x):
        return self.proj(x)


def arms_of(case: Case, args) -> tuple[dict[str, Arm], baselines.Layer]:
    p = case.dropout
    layer = shared.random_layer(case.K, case.N, case.R, args.dtype, args.device, seed=1)
    weight, lora_A, lora_B, scaling = layer
    factors = [lora_A, lora_B]
    exact = Arm(lambda x: baselines.exact(x, layer), factors) if p == 0 else None
    arms = shared.frozen_arms(lambda x: baselines.frozen(x, weight))
    arms |= shared.op_arms(lambda x: lora_linear(x, weight, lora_A, lora_B, scaling, dropout_p=p), factors, exact)
    arms |= module_arms(lambda: Projection(weight), {"proj": layer}, p, exact)
    if p == 0:
        arms["Unsloth's factoring"] = Arm(lambda x: baselines.accumulated(x, [layer]), factors, exact=exact)
    arms["LoRAFusion's factoring"] = Arm(lambda x: baselines.split(x, layer, p), factors, exact=exact)
    arms[shared.PLAIN] = Arm(lambda x: shared.plain_linear(x, weight))
    return arms, layer


def measure(case: Case, args) -> Iterator[dict]:
    arms, layer = arms_of(case, args)
    return shared.rows_of(arms, case._asdict(), [case.N], [layer.weight], args)


def main(argv=None) -> int:
    args = harness.arguments(__doc__, argv)
    return harness.run(args, "lora_linear", cases(args.tiny), lambda case: measure(case, args))


if __name__ == "__main__":
    sys.exit(main())
