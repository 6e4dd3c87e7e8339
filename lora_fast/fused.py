"""The steps of reference.py with the same signatures, as Triton kernels and cuBLAS calls: what a GPU runs.

Where several routes compute the same, tuning.py picks the fastest one for the shape: "triton", one kernel that adds the
update before it stores; "cublas", the base product by cuBLAS and the update added to it, which reads and writes y (or
dx) once more; "cublas, update first", which writes the update and lets cuBLAS add the base product to it: as many
bytes, but the update is read inside a long product that leaves memory idle, and y is rounded once instead of twice. For
dS and dB one read of dy, with partial sums, or two."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lora_fast import tuning
from lora_fast.kernels import adapter_grads, reference, swiglu
from lora_fast.kernels import shrink as shrink_kernels
from lora_fast.kernels.adapter_grads import grad_b
from lora_fast.kernels.devices import capability_of
from lora_fast.kernels.factors import cast_factors  # noqa: F401 - a step like those below
from lora_fast.kernels.gemm_lora import Prepared, are_aligned, gemm_lora, gemm_lora_sum, is_aligned, prepare
from lora_fast.kernels.gemm_tiles import Tile, ranked_tiles
from lora_fast.kernels.launch import plan
from lora_fast.kernels.partials import Sum, add_up
from lora_fast.tuning import size_class

UPDATE_FIRST = "cublas, update first"
ONE_READ, TWO_READS = "triton, one read of dy", "two reads of dy"
# Tiles that the tuner tries: those that the model of `ranked_tiles` prefers, of one size that many at most. It knows
# nothing of what tells these apart, and takes each GPU for the largest of its kind.
TRIED_TILES, TRIED_OF_A_SIZE = 5, 3
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


@plan
def _routes(
    others: tuple[str, ...],
    M: int,
    N: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    pairs: int,
    masks: int,
    aligned: bool,
    rank: int | None,
) -> dict[str, Tile | None]:
    """{name: tile} of all routes: the `others`, then the tiles that the model of `ranked_tiles` prefers, for the tuner
    to try. M by its `size_class`, so that what was chosen for one M is a route for all that share it."""
    kind = {"pairs": pairs, "masks": masks, "aligned": aligned, "rank": rank}
    tiles, sizes = [], Counter()
    for tile in ranked_tiles(M, N, dtype, capability, **kind):
        sizes[tile[:3]] += 1
        if sizes[tile[:3]] <= TRIED_OF_A_SIZE:
            tiles.append(tile)
    return dict.fromkeys(others) | {f"triton {tile.name}": tile for tile in tiles[:TRIED_TILES]}


def _place(step: str, *operands: Tensor) -> tuple:
    """All that a choice, and what follows from it, depends on, as it comes: where tuning.py keeps it for the next call
    like this one."""
    first = operands[0]
    tf32 = first.dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision
    return step, first.device, tf32, *[(t.dtype, t.shape, t.stride(), t.data_ptr() & 15) for t in operands]


def _route(
    place: tuple,
    step: str,
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    ws: Sequence[Tensor],
    s: Tensor,
    b: Tensor,
    by_cublas: Mapping[str, Callable[[], Tensor]],
    sizes: dict[str, Any],
    *,
    ranks: Sequence[int] | None = None,
    masks: Sequence[Tensor] = (),
    bias: Tensor | None = None,
) -> str | Prepared:
    """The fastest route to Σᵢ xᵢ wᵢ + the update + bias, kept for `place`: one `by_cublas`, or ours. weights (N, K): ws
    or their transposes; sizes: what the choice depends on beside their layout."""
    lies = layout(xs, weights, ws)
    M, N = s.shape[0], b.shape[1]
    rank = max(ranks if masks else b.shape[:1]) if len(xs) == 1 else None
    kind = capability_of(s), len(xs), len(masks), lies["aligned"], rank
    tiles = _routes(tuple(by_cublas), size_class(M), N, s.dtype, *kind)

    @cache  # timed as it will run, once it is kept
    def prepared(name: str) -> Prepared:
        return prepare(xs, ws, s, b, ranks=ranks, masks=masks, tile=tiles[name])

    def call(name: str) -> Tensor:
        return by_cublas[name]() if name in by_cublas else prepared(name).run(xs, ws, s, b, masks, bias)

    name = tuning.choose(step, sizes | lies, s.device, tuple(tiles), call)
    return tuning.keep(place, name if name in by_cublas else prepared(name))


def linear_lora(x: Tensor, weight: Tensor, s: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    x = _contiguous_rows(x)
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    if bias is not None:
        bias = bias.contiguous()
    place = _place("linear_lora", x, weight, s, b), bias is None
    route = tuning.recall(place)
    if type(route) is Prepared:  # before anything is made that only the other routes need
        return route.run((x,), (weight,), s, b, (), bias)
    w, b_t, (M, K), (N, R) = weight.t(), b.t(), x.shape, b.shape

    def update_first() -> Tensor:
        y = s @ b_t if bias is None else torch.addmm(bias.to(x.dtype), s, b_t)
        return y.addmm_(x, w)

    by_cublas = {"cublas": lambda: reference.linear_lora(x, weight, s, b, bias), UPDATE_FIRST: update_first}
    if M == 0 or N == 0:
        return by_cublas["cublas"]()
    if route is None:
        sizes = {"M": M, "N": N, "K": K, "R": R, "dtype": x.dtype, "bias": bias is not None}
        route = _route(place, "linear_lora", [x], [weight], [w], s, b_t, by_cublas, sizes, bias=bias)
    return by_cublas[route]() if type(route) is str else route.run((x,), (w,), s, b_t, (), bias)


def update_lora(base: Tensor, s: Tensor, b: Tensor) -> Tensor:
    if base.dtype != s.dtype:
        return reference.update_lora(base, s, b)
    return gemm_lora(None, None, s, b.t(), accumulate=_contiguous_rows(base))


def grad_s_and_b(
    dys: Sequence[Tensor], bs: Sequence[Tensor], ss: Sequence[Tensor] | None, scales: Sequence[float]
) -> tuple[Tensor, list[Tensor] | None]:
    ranks = [b.shape[1] for b in bs]
    if len(dys) == 1:
        parts = [ds := torch.empty((dys[0].shape[0], ranks[0]), dtype=dys[0].dtype, device=dys[0].device)]
    else:
        ds = torch.empty((dys[0].shape[0], sum(ranks)), dtype=dys[0].dtype, device=dys[0].device)
        parts = ds.split_with_sizes(ranks, 1)
    if ss is None:  # every lora_B is frozen
        for dy, b, part in zip(dys, bs, parts):
            _into(part, dy, b)
        return ds, None
    later: list[Sum] = []  # what all layers have to add up: in one launch
    rows = map(_contiguous_rows, dys)
    dBs = [_grad_s_and_b(*each, later) for each in zip(rows, bs, ss, scales, parts)]
    add_up(later)
    return ds, dBs


def _into(out: Tensor, left: Tensor, right: Tensor) -> None:
    with torch.no_grad():  # PyTorch refuses `out` where the gradient of a gradient could be asked for; here it isn't
        torch.mm(left, right, out=out)


def _grad_s_and_b(dy: Tensor, b: Tensor, s: Tensor, scale: float, ds: Tensor, later: list[Sum]) -> Tensor:
    """dB of one layer; dS goes to `ds`, both complete once `later` is added up."""
    (M, N), R = dy.shape, b.shape[1]

    def call(name: str, later: list[Sum] | None = None) -> Tensor:
        if name == ONE_READ:
            return adapter_grads.grad_s_and_b(dy, b, s, scale, ds=ds, later=later, tile=tile)[1]
        _into(ds, dy, b)
        return grad_b(dy, s, scale)

    place = _place("grad_s_and_b", dy, b, s)
    tile, name = tuning.recall(place) or (None, None)
    if name is not None:
        return call(name, later)
    tile = adapter_grads.pick_s_and_b_tile(M, N, R, dy.dtype, capability_of(dy)) if M else None
    # What one read of dy takes in place of a second: bytes of partial sums, some of which stay in L2.
    partial = 0 if tile is None else adapter_grads.partial_bytes(M, N, R, tile)
    read = M * N * dy.itemsize
    if tile is None or partial >= MOST_PARTIAL * read:
        return call(TWO_READS)
    names = (ONE_READ, TWO_READS) if partial < read else (TWO_READS, ONE_READ)
    sizes = {"M": M, "N": N, "R": R, "dtype": dy.dtype, "aligned": is_aligned(dy)}
    name = tuning.choose("grad_s_and_b", sizes, dy.device, names, call)
    tuning.keep(place, (tile, name))
    return call(name, later)


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
    used = [i for i, weight in enumerate(weights) if weight is not None]
    xs = [_contiguous_rows(dys[i]) for i in used]
    ws = [weights[i] if weights[i].dtype == ds.dtype else weights[i].to(ds.dtype) for i in used]
    masks = () if mask is None else mask.unbind()
    if not used:
        return gemm_lora_sum((), (), ds, a, ranks=ranks, masks=masks)
    # How the ranks are divided counts where each part has a mask of its own.
    place = _place("grad_x", *xs, *ws, ds, a, *masks), tuple(ranks) if masks else None
    route = tuning.recall(place)
    if type(route) is Prepared:
        return route.run(xs, ws, ds, a, masks)

    def base_first() -> Tensor:
        return reference.grad_x_and_a(dys, weights, ds, a, x, ranks, None, needs_dA=False)[0]

    def update_first() -> Tensor:
        dx = ds @ a if mask is None else gemm_lora_sum((), (), ds, a, ranks=ranks, masks=masks)
        for dy, weight in zip(xs, ws):
            dx.addmm_(dy, weight)
        return dx

    # What a mask drops can't be added to a finished product.
    by_cublas = {"cublas": base_first} if mask is None else {}
    by_cublas[UPDATE_FIRST] = update_first
    if ds.shape[0] == 0 or a.shape[1] == 0:
        return update_first()
    if route is None:
        Ns = "+".join(str(dy.shape[1]) for dy in xs)
        sizes = {"M": ds.shape[0], "N": Ns, "K": a.shape[1], "R": a.shape[0], "dtype": ds.dtype, "masks": len(masks)}
        route = _route(place, "grad_x", xs, ws, ws, ds, a, by_cublas, sizes, ranks=ranks, masks=masks)
    return by_cublas[route]() if type(route) is str else route.run(xs, ws, ds, a, masks)


def swiglu_shrink(g: Tensor, u: Tensor, a: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if mask is not None:
        return reference.swiglu_shrink(g, u, a, mask)
    return swiglu.swiglu_shrink(g, u, a)[:2]


def swiglu_shrink_and_draw(g: Tensor, u: Tensor, a: Tensor, seed: Tensor, dropout_p: float):
    """swiglu_shrink with the mask drawn here: h, S, mask (1, M, ⌈I / 8⌉)."""
    return swiglu.swiglu_shrink(g, u, a, seed=seed, dropout_p=dropout_p)


def swiglu_backward(dh, g, u, ds_down, s_gate, s_up, scale_gate, scale_up, mask):
    return swiglu.swiglu_backward(dh, g, u, ds_down, s_gate, s_up, scale_gate, scale_up, mask)
