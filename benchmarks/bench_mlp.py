"""A SwiGLU MLP with LoRA on gate, up and down, forward and backward, against the frozen MLP with our SwiGLU kernel.

    make gpu, or: python benchmarks/bench_mlp.py [--rounds 30] [--deadline 60]

Arms as in bench_lora_linear.py; the modules are Transformers' LlamaMLP. "lora_fast layers" is our ops layer by layer
with the SwiGLU between them: what computing the adapters' share inside the SwiGLU kernels gains. The hand-written
baselines use our SwiGLU kernel too. In the CSV K is the hidden size and N the intermediate size."""

import sys
from collections.abc import Iterator
from typing import NamedTuple

import arms as shared
import baselines
import harness
import torch
from modules import linear, module_arms
from timing import Arm
from torch import nn

from lora_fast import lora_linear, lora_linears, lora_swiglu_mlp

NAMES = ("gate_proj", "up_proj", "down_proj")


class Case(NamedTuple):
    M: int
    K: int
    N: int
    R: int
    dropout: float


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [Case(24, 16, 40, 4, p) for p in (0.0, 0.1)]
    llama_8b, qwen_14b = (4096, 14336), (5120, 13824)
    plan = [(8192, *llama_8b, 16, p) for p in (0.0, 0.1)]
    plan += [(8192, *llama_8b, R, 0.0) for R in (64, 8, 256)]
    plan += [(M, *llama_8b, 16, 0.0) for M in (2048, 4096)]
    plan += [(8192, *qwen_14b, 16, p) for p in (0.0, 0.1)]
    plan += [(M, *llama_8b, 16, 0.1) for M in (2048, 4096)]
    return [Case(*case) for case in plan]


def llama_mlp(K: int, N: int, weights) -> nn.Module:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    with torch.device("meta"):
        mlp = LlamaMLP(LlamaConfig(hidden_size=K, intermediate_size=N, num_attention_heads=1))
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = map(linear, weights)
    return mlp


def arms_of(case: Case, args) -> tuple[dict[str, Arm], list[baselines.Layer]]:
    _, K, N, R, p = case
    make = lambda K, N, seed: shared.random_layer(K, N, R, args.dtype, args.device, seed)  # noqa: E731
    layers = gate, up, down = make(K, N, 1), make(K, N, 2), make(N, K, 3)
    weights, lora_As, lora_Bs, scalings = (list(column) for column in zip(*layers))
    factors = shared.trained(layers)

    def with_layers(both, one):
        """The MLP from gate and up (x → g, u) and down (h → y)."""
        return lambda x: one(baselines.swiglu(*both(x)))

    def frozen(x):
        return [baselines.frozen(x, weight) for weight in weights[:2]]

    def plain(x):
        return [shared.plain_linear(x, weight) for weight in weights[:2]]

    def exact(x):
        g, u = baselines.exact(x, gate), baselines.exact(x, up)
        return baselines.exact(torch.nn.functional.silu(g) * u, down)

    def grouped(x):
        return lora_linears(x, weights[:2], lora_As[:2], lora_Bs[:2], scalings[:2], dropout_p=p)

    def single(h):
        return lora_linear(h, *down, dropout_p=p)

    truth = Arm(exact, factors) if p == 0 else None
    arms = shared.frozen_arms(with_layers(frozen, lambda h: baselines.frozen(h, down.weight)))
    arms |= shared.op_arms(lambda x: lora_swiglu_mlp(x, gate, up, down, dropout_p=p), factors, truth)
    arms["lora_fast layers"] = Arm(with_layers(grouped, single), factors, exact=truth)
    arms |= module_arms(lambda: llama_mlp(K, N, weights), dict(zip(NAMES, layers)), p, truth)
    if p == 0:
        arms["Unsloth's factoring"] = Arm(
            with_layers(lambda x: baselines.accumulated(x, [gate, up]), lambda h: baselines.accumulated(h, [down])[0]),
            factors,
            exact=truth,
        )
    arms["LoRAFusion's factoring"] = Arm(
        with_layers(
            lambda x: (baselines.split(x, gate, p, 1), baselines.split(x, up, p, 2)),
            lambda h: baselines.split(h, down, p, 3),
        ),
        factors,
        exact=truth,
    )
    arms[shared.PLAIN] = Arm(with_layers(plain, lambda h: shared.plain_linear(h, down.weight)))
    return arms, list(layers)


def measure(case: Case, args) -> Iterator[dict]:
    arms, layers = arms_of(case, args)
    return shared.rows_of(arms, case._asdict(), [case.K], [layer.weight for layer in layers], args)


def main(argv=None) -> int:
    args = harness.arguments(__doc__, argv)
    return harness.run(args, "mlp", cases(args.tiny), lambda case: measure(case, args))


if __name__ == "__main__":
    sys.exit(main())
