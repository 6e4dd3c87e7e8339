"""Adapters in the dtype of the products, in one launch: of each group a = all lora_A stacked, b_g = s'_g · lora_B_g.

The masters stay fp32; s' = scaling / (1 − p) is multiplied in before the one rounding, so that no other kernel needs
it. Bytes moved: the masters once, their casts once (r = 16 at 4096 × 4096 in bf16: 0.8 MB). A step's backward may
have its forward's casts (dispatch.CAST_SHARE); nothing is kept from step to step: an optimizer that writes through
`.data` changes a parameter without changing its version."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.kernels.launch import Launch, cdiv, plan

BLOCK = 1024


@triton.jit
def _cast_kernel(sources, targets, sizes, scales, BLOCK: tl.constexpr):
    number = tl.program_id(0)
    first = 0
    for i in tl.static_range(len(sources)):
        blocks = tl.cdiv(sizes[i], BLOCK)
        if (number >= first) & (number < first + blocks):
            place = (number - first).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(sources[i] + place, mask=place < sizes[i], other=0.0).to(tl.float32) * scales[i]
            tl.store(targets[i] + place, value.to(targets[i].dtype.element_ty), mask=place < sizes[i])
        first += blocks


@plan
def _cast(sizes: tuple[int, ...], scales: tuple[float, ...]) -> Launch:
    grid = (sum(cdiv(size, BLOCK) for size in sizes),)
    return Launch(_cast_kernel, grid, (sizes, scales), BLOCK=BLOCK, num_warps=4)


def cast_factors(
    groups: Sequence[tuple[Sequence[Tensor], Sequence[Tensor], Sequence[float]]], dtype: torch.dtype
) -> list[tuple[Tensor, list[Tensor]]]:
    """(lora_A_g (R_g, K), lora_B_g (N_g, R_g), s'_g) of each group → its (a (ΣR, K), [b_g (N_g, R_g)]) in `dtype`, as
    in reference.py."""
    results, sources, targets, factors = [], [], [], []
    for lora_As, lora_Bs, scales in groups:
        ranks = [lora_A.shape[0] for lora_A in lora_As]
        a = torch.empty((sum(ranks), lora_As[0].shape[1]), dtype=dtype, device=lora_As[0].device)
        bs = [torch.empty(b.shape, dtype=dtype, device=b.device) for b in lora_Bs]
        results.append((a, bs))
        sources += [factor.contiguous() for factor in (*lora_As, *lora_Bs)]
        targets += [a, *bs] if len(ranks) == 1 else [*a.split_with_sizes(ranks), *bs]
        factors += [1.0] * len(ranks) + list(scales)
    _cast(tuple([source.numel() for source in sources]), tuple(factors))(tuple(sources), tuple(targets))
    return results
