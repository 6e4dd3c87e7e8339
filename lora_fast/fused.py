"""The steps of reference.py with the same signatures, as Triton kernels and cuBLAS calls: what a GPU runs.

Where several routes compute the same, tuning.py picks the fastest one for the shape: "triton", one kernel that adds the
update before it stores; "cublas", the base product by cuBLAS and the update added to it, which reads and writes y (or
dx) once more; "cublas, update first", which writes the update and lets cuBLAS add the base product to it: as many
bytes, but the update is read inside a long product that leaves memory idle, and y is rounded once instead of twice. For
dS and dB one read of dy, with partial sums, or two."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from lora_fast import tuning
from lora_fast.kernels import adapter_grads, reference, swiglu
from lora_fast.kernels import shrink as shrink_kernels
from lora_fast.kernels.devices import capability_of
from lora_fast.kernels.factors import cast_factors  # noqa: F401 - a step like those below
from lora_fast.kernels.gemm_lora import Tile, are_aligned, candidates, gemm_lora, gemm_lora_sum, is_aligned, pick_tile

UPDATE_FIRST = "cublas, update first"
# Tiles that the tuner tries beside the one that the model of `pick_tile` prefers.
TRIED_TILES = 3
# Partial sums of dS and dB, in bytes of dY, from which on one read of dY isn't timed against two.
MOST_PARTIAL = 3


def _contiguous_rows(x: Tensor) -> Tensor:
    """x, copied where a row is not contiguous: the kernels load along rows."""
    return x if x.stride(-1) == 1 or x.numel() == 0 else x.contiguous()


def shrink_and_draw(x: Tensor, a: Tensor, ranks: Sequence[int], seed: Tensor, dropout_p: float):
    """shrink with masks drawn here: S (M, ΣR), masks (G, M, ⌈K / 8⌉)."""
    return shrink_kernels.shrink(_contiguous_rows(x), a, tuple(ranks), seed=seed, dropout_p=dropout_p)


def shrink(x: Tensor, a: Tensor, ranks: Sequence[int], mask: Tensor | None) -> Tensor:
    if mask is not None:  # only where a mask comes from outside: the kernel draws its own
        return reference.shrink(x, a, ranks, mask)
    return shrink_kernels.shrink(_contiguous_rows(x), a)[0]


def layout(xs: Sequence[Tensor], weights: Sequence[Tensor], ws: Sequence[Tensor]) -> dict[str, Any]:
    """What the speed of Σᵢ xᵢ wᵢ depends on besides sizes: weight: which dimension of the (N, K) weights is contiguous,
    the last ("NK") or the first ("KN"); aligned: whether all rows can be read 16 bytes at a time.

    ws: the weights or their transposes, as they are multiplied."""
    rows, columns = (all(weight.stride(dim) == 1 for weight in weights) for dim in (1, 0))
    return {
        "weight": "NK" if rows else "KN" if columns else "mixed",
        "aligned": are_aligned(xs, ws, capability_of(xs[0])),
    }


@lru_cache(maxsize=256)
def _tiles(
    M: int, N: int, dtype: torch.dtype, capability: tuple[int, int], pairs: int, masks: int, aligned: bool
) -> dict[str, Tile]:
    """{name: tile}: the one that the model of `pick_tile` prefers, then a few others for the tuner to try."""
    kind = {"pairs": pairs, "masks": masks, "aligned": aligned}
    best = pick_tile(M, N, dtype, capability, **kind)
    others = [tile for tile in candidates(dtype, capability, **kind) if tile != best]
    return {
        f"triton {t.block_m}x{t.block_n}x{t.block_k} w{t.num_warps} s{t.num_stages}": t
        for t in (best, *others[:TRIED_TILES])
    }


def _fused_routes(
    call: Callable[[Tile], Tensor], like: Tensor, N: int, pairs: int, masks: int, aligned: bool
) -> dict[str, Callable[[], Tensor]]:
    tiles = _tiles(like.shape[0], N, like.dtype, capability_of(like), pairs, masks, aligned)
    return {name: partial(call, tile) for name, tile in tiles.items()}


def linear_lora(x: Tensor, weight: Tensor, s: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    x = _contiguous_rows(x)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.contiguous()
    (M, K), (N, R) = x.shape, b.shape

    def fused(tile: Tile) -> Tensor:
        return gemm_lora(x, weight.t(), s, b.t(), bias=bias, tile=tile)

    def update_first():
        y = s @ b.t() if bias is None else torch.addmm(bias.to(x.dtype), s, b.t())
        return y.addmm_(x, weight.t())

    lies = layout([x], [weight], [weight.t()])
    routes = {"cublas": lambda: reference.linear_lora(x, weight, s, b, bias), UPDATE_FIRST: update_first}
    routes |= _fused_routes(fused, x, N, 1, 0, lies["aligned"])
    sizes = {"M": M, "N": N, "K": K, "R": R, "dtype": x.dtype, "bias": bias is not None}
    return tuning.run("linear_lora", sizes | lies, x.device, routes)


def update_lora(base: Tensor, s: Tensor, b: Tensor) -> Tensor:
    if base.dtype != s.dtype:
        return reference.update_lora(base, s, b)
    return gemm_lora(None, None, s, b.t(), accumulate=_contiguous_rows(base))


def grad_s_and_b(dy: Tensor, b: Tensor, s: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
    if s is None:  # lora_B is frozen: one product, as any other
        return dy @ b, None
    dy, (M, N), R = _contiguous_rows(dy), dy.shape, b.shape[1]

    def two_reads():
        return dy @ b, (dy.t() @ s).float() * scale

    def one_read():
        return adapter_grads.grad_s_and_b(dy, b, s, scale, tile=tile)

    if M == 0:
        return two_reads()
    tile = adapter_grads.pick_s_and_b_tile(M, N, R, dy.dtype, capability_of(dy))
    # What one read of dy takes in place of a second: bytes of partial sums, some of which stay in L2.
    partial = 0 if tile is None else adapter_grads.partial_bytes(M, N, R, tile)
    if tile is None or partial >= MOST_PARTIAL * M * N * dy.itemsize:
        return two_reads()
    routes = {"triton, one read of dy": one_read, "two reads of dy": two_reads}
    if partial >= M * N * dy.itemsize:
        routes = dict(reversed(routes.items()))
    sizes = {"M": M, "N": N, "R": R, "dtype": dy.dtype, "aligned": is_aligned(dy)}
    return tuning.run("grad_s_and_b", sizes, dy.device, routes)


def grad_b(dy: Tensor, s: Tensor, scale: float) -> Tensor:
    return reference.grad_b(dy, s, scale)


def grad_x_and_a(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    ds: Tensor,
    a: Tensor,
    x: Tensor,
    ranks: Sequence[int],
    mask: Tensor | None,
    needs_dx: bool = True,
    needs_dA: bool = True,
) -> tuple[Tensor | None, list[Tensor] | None]:
    dx = _grad_x(dys, weights, ds, a, x, ranks, mask) if needs_dx else None
    return dx, _grad_a(ds, x, ranks, mask) if needs_dA else None


def _grad_a(ds: Tensor, x: Tensor, ranks: Sequence[int], mask: Tensor | None) -> list[Tensor]:
    return adapter_grads.grad_a(ds, _contiguous_rows(x), tuple(ranks), mask)


def _grad_x(dys, weights, ds, a, x, ranks, mask) -> Tensor:
    pairs = [(_contiguous_rows(dy), weight.to(ds.dtype)) for dy, weight in zip(dys, weights) if weight is not None]
    xs, ws = [dy for dy, _ in pairs], [weight for _, weight in pairs]
    masks = () if mask is None else tuple(mask)
    if not pairs:
        return gemm_lora_sum((), (), ds, a, ranks=ranks, masks=masks)

    def update_first():
        dx = ds @ a if mask is None else gemm_lora_sum((), (), ds, a, ranks=ranks, masks=masks)
        for dy, weight in pairs:
            dx.addmm_(dy, weight)
        return dx

    def base_first():
        return reference.grad_x_and_a(dys, weights, ds, a, x, ranks, None, needs_dA=False)[0]

    def fused(tile: Tile) -> Tensor:
        return gemm_lora_sum(xs, ws, ds, a, ranks=ranks, masks=masks, tile=tile)

    (M, _), (R, K) = ds.shape, a.shape
    Ns = [dy.shape[1] for dy in xs]
    lies = layout(xs, ws, ws)
    routes = {"cublas": base_first} if mask is None else {}  # what a mask drops can't be added to a finished product
    routes |= {UPDATE_FIRST: update_first} | _fused_routes(fused, ds, K, len(xs), len(masks), lies["aligned"])
    sizes = {"M": M, "N": "+".join(map(str, Ns)), "K": K, "R": R, "dtype": ds.dtype, "masks": len(masks)}
    return tuning.run("grad_x", sizes | lies, ds.device, routes)


def swiglu_shrink(g: Tensor, u: Tensor, a: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if mask is not None:
        return reference.swiglu_shrink(g, u, a, mask)
    return swiglu.swiglu_shrink(g, u, a)[:2]


def swiglu_shrink_and_draw(g: Tensor, u: Tensor, a: Tensor, seed: Tensor, dropout_p: float):
    """swiglu_shrink with the mask drawn here: h, S, mask (1, M, ⌈I / 8⌉)."""
    return swiglu.swiglu_shrink(g, u, a, seed=seed, dropout_p=dropout_p)


def swiglu_backward(dh, g, u, ds_down, s_gate, s_up, scale_gate, scale_up, mask):
    return swiglu.swiglu_backward(dh, g, u, ds_down, s_gate, s_up, scale_gate, scale_up, mask)
