"""Eight adapters in one batch on one linear layer, forward and backward, against a loop over the adapters.

    make gpu, or: python benchmarks/bench_grouped.py [--rounds 30] [--deadline 40]

Arms: the batch in one call, as the tuner runs it and by each of its two routes; a loop that runs our single-adapter op
on each adapter's rows; a loop in PyTorch that runs the base layer once and adds each adapter's update to its rows; all
rows with one adapter, for scale. The denominator is the frozen layer on the whole batch. In the CSV R lists the
adapters' ranks, `segments` their rows."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import arms as shared
import baselines
import harness
import torch
from timing import Arm
from torch import Tensor

from lora_fast import lora_grouped_linear, lora_linear

COLUMNS = (*harness.COLUMNS[:11], "segments", *harness.COLUMNS[11:])


class Case(NamedTuple):
    K: int
    N: int
    lengths: tuple[int, ...]  # rows of each adapter
    ranks: tuple[int, ...]


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [Case(16, 40, (5, 12, 7), (4, 8, 3))]
    equal, uneven = (1024,) * 8, (3000, 2000, 1200, 900, 600, 300, 150, 42)
    same, mixed = (16,) * 8, (8, 16, 16, 32, 64, 8, 16, 32)
    sizes = (4096, 4096), (4096, 14336)
    return [Case(*size, lengths, ranks) for size in sizes for lengths in (equal, uneven) for ranks in (same, mixed)]


def in_pytorch(layers: Sequence[baselines.Layer], segments) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        updates = []
        for start, end, adapter in segments:
            _, lora_A, lora_B, scaling = layers[adapter]
            s = x[start:end] @ lora_A.to(x.dtype).t()
            updates.append(scaling * (s @ lora_B.to(x.dtype).t()))
        return torch.nn.functional.linear(x, layers[0].weight.to(x.dtype)) + torch.cat(updates)

    return forward


def looped(layers: Sequence[baselines.Layer], segments) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat([lora_linear(x[start:end], *layers[adapter]) for start, end, adapter in segments])


def measure(case: Case, args) -> Iterator[dict]:
    K, N, lengths, ranks = case
    weight = shared.random_layer(K, N, 1, args.dtype, args.device, seed=0).weight
    layers = [
        shared.random_layer(K, N, R, args.dtype, args.device, seed=i)._replace(weight=weight)
        for i, R in enumerate(ranks, start=1)
    ]
    M, segments, start = sum(lengths), [], 0
    for adapter, length in enumerate(lengths):
        segments.append((start, start + length, adapter))
        start += length
    _, lora_As, lora_Bs, scalings = (list(column) for column in zip(*layers))
    factors = shared.trained(layers)
    truth = Arm(in_pytorch(layers, segments), factors)
    one = max(layers, key=lambda layer: layer.lora_A.shape[0])
    arms = shared.frozen_arms(lambda x: baselines.frozen(x, weight))
    arms |= shared.op_arms(
        lambda x: lora_grouped_linear(x, weight, lora_As, lora_Bs, scalings, segments), factors, truth
    )
    arms["loop over adapters, lora_fast"] = Arm(looped(layers, segments), factors, exact=truth)
    arms["loop over adapters, PyTorch"] = Arm(in_pytorch(layers, segments), factors, exact=truth)
    arms["one adapter, lora_fast"] = Arm(lambda x: lora_linear(x, *one), [one.lora_A, one.lora_B])
    arms[shared.PLAIN] = Arm(lambda x: shared.plain_linear(x, weight))
    sizes = {"M": M, "K": K, "N": N, "R": "+".join(map(str, ranks)), "dropout": 0.0}
    sizes["segments"] = "+".join(map(str, lengths))
    return shared.rows_of(arms, sizes, [N], [weight], args)


def main(argv=None) -> int:
    args = harness.arguments(__doc__, argv)
    return harness.run(args, "grouped", cases(args.tiny), lambda case: measure(case, args), COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
