"""Three layers on one input, q, k and v with LoRA, forward and backward, against the frozen three.

    make gpu, or: python benchmarks/bench_qkv.py [--rounds 30] [--deadline 60]

Arms as in bench_lora_linear.py. The frozen three are what PyTorch does with them: three products forward, three
backward, and two additions of dX."""

import sys
from collections.abc import Iterator
from typing import NamedTuple

import arms as shared
import baselines
import harness
from modules import linear, module_arms
from timing import Arm
from torch import nn

from lora_fast import lora_linears

NAMES = ("q_proj", "k_proj", "v_proj")


class Case(NamedTuple):
    M: int
    K: int
    Ns: tuple[int, int, int]
    R: int
    dropout: float


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [Case(24, 16, (32, 8, 8), 4, p) for p in (0.0, 0.1)]
    llama_8b, llama_7b, qwen_32b = (4096, (4096, 1024, 1024)), (4096, (4096,) * 3), (5120, (5120, 1024, 1024))
    plan = [(8192, *llama_8b, 16, p) for p in (0.0, 0.1)]
    plan += [(8192, *size, 16, 0.0) for size in (llama_7b, qwen_32b)]
    plan += [(8192, *llama_8b, R, 0.0) for R in (64, 8, 256)]
    plan += [(M, *llama_8b, 16, p) for M in (2048, 4096) for p in (0.0, 0.1)]
    plan += [(8192, *size, 16, 0.1) for size in (llama_7b, qwen_32b)]
    return [Case(*case) for case in plan]


class Projections(nn.Module):
    """As attention modules have them, so that apply_lora finds the group in the source."""

    def __init__(self, weights):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = map(linear, weights)

    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def arms_of(case: Case, args) -> tuple[dict[str, Arm], list[baselines.Layer]]:
    p = case.dropout
    layers = [
        shared.random_layer(case.K, N, case.R, args.dtype, args.device, seed=i) for i, N in enumerate(case.Ns, start=1)
    ]
    weights, lora_As, lora_Bs, scalings = (list(column) for column in zip(*layers))
    factors = shared.trained(layers)
    exact = Arm(lambda x: [baselines.exact(x, layer) for layer in layers], factors) if p == 0 else None

    def ours(x):
        return lora_linears(x, weights, lora_As, lora_Bs, scalings, dropout_p=p)

    arms = shared.frozen_arms(lambda x: [baselines.frozen(x, weight) for weight in weights])
    arms |= shared.op_arms(ours, factors, exact)
    arms |= module_arms(lambda: Projections(weights), dict(zip(NAMES, layers)), p, exact)
    if p == 0:
        arms["Unsloth's factoring"] = Arm(lambda x: baselines.accumulated(x, layers), factors, exact=exact)
    arms["LoRAFusion's factoring"] = Arm(
        lambda x: [baselines.split(x, layer, p, seed) for seed, layer in enumerate(layers)], factors, exact=exact
    )
    arms[shared.PLAIN] = Arm(lambda x: [shared.plain_linear(x, weight) for weight in weights])
    return arms, layers


def measure(case: Case, args) -> Iterator[dict]:
    arms, layers = arms_of(case, args)
    sizes = {"M": case.M, "K": case.K, "N": "+".join(map(str, case.Ns)), "R": case.R, "dropout": case.dropout}
    return shared.rows_of(arms, sizes, case.Ns, [layer.weight for layer in layers], args)


def main(argv=None) -> int:
    args = harness.arguments(__doc__, argv)
    return harness.run(args, "qkv", cases(args.tiny), lambda case: measure(case, args))


if __name__ == "__main__":
    sys.exit(main())
