"""Eight adapters in one batch on one linear layer, forward and backward, against a loop over the adapters.

    make gpu, or: python benchmarks/bench_grouped.py [--rounds 30] [--deadline 40]

Arms: the batch in one call; a loop that runs our single-adapter op on each adapter's rows; a loop in PyTorch that runs
the base layer once and adds each adapter's update to its rows; all rows with one adapter, for scale. The denominator is
the frozen layer on the whole batch. In the CSV R lists the adapters' ranks, `segments` their rows."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import arms as shared
import baselines
import harness
import torch
from timing import Arm
from torch import Tensor

from lora_fast import lora_linear

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


class _Launchers(torch.autograd.Function):
    """kernels/grouped.py's launchers as one op."""

    @staticmethod
    def forward(ctx, x, weight, scalings, table, *factors):
        from lora_fast.kernels import grouped

        count = len(scalings)
        a_all, b_all = grouped.stack_factors(factors[:count], factors[count:], scalings, x.dtype)
        s, _ = grouped.grouped_shrink(x, a_all, table)
        y = x @ weight.t()
        grouped.grouped_expand(y, s, b_all, table, out=y)
        ctx.save_for_backward(x, weight, s, *factors)
        ctx.scalings, ctx.table = scalings, table
        ctx.scales = torch.tensor(scalings).to(x.device, non_blocking=True)
        return y

    @staticmethod
    def backward(ctx, dy):
        from lora_fast.kernels import grouped

        x, weight, s, *factors = ctx.saved_tensors
        count, table = len(ctx.scalings), ctx.table
        a_all, b_all = grouped.stack_factors(factors[:count], factors[count:], ctx.scalings, x.dtype)
        ds = grouped.grouped_grad_s(dy, b_all, table)
        dx = dy @ weight
        grouped.grouped_grad_x(ds, a_all, table, accumulate=dx, out=dx)
        dA = grouped.grouped_grad_a(ds, x, table).split(list(table.ranks))
        dB = grouped.grouped_grad_b(dy, s, table, ctx.scales).split(list(table.ranks), dim=1)
        return dx, None, None, None, *dA, *dB


def grouped_op(layers: Sequence[baselines.Layer], segments, rows: int, device) -> Callable[[Tensor], Tensor]:
    """`lora_grouped_linear` where the library has it, the kernels' launchers where not."""
    weight, lora_As, lora_Bs, scalings = layers[0].weight, *([layer[i] for layer in layers] for i in (1, 2, 3))
    try:
        from lora_fast.grouped import lora_grouped_linear
    except ImportError:
        if device.type != "cuda":
            return in_pytorch(layers, segments)
        from lora_fast.kernels.grouped import block_table

        table = block_table(segments, [a.shape[0] for a in lora_As], rows, device)
        return lambda x: _Launchers.apply(x, weight, scalings, table, *lora_As, *lora_Bs)
    return lambda x: lora_grouped_linear(x, weight, lora_As, lora_Bs, scalings, segments)


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
    factors = shared.trained(layers)
    truth = Arm(in_pytorch(layers, segments), factors)
    one = max(layers, key=lambda layer: layer.lora_A.shape[0])
    arms = shared.frozen_arms(lambda x: baselines.frozen(x, weight))
    arms["lora_fast grouped"] = Arm(grouped_op(layers, segments, M, args.device), factors, exact=truth)
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
