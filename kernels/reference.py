"""What every kernel of lora-fast means, in plain PyTorch: the path taken on a CPU, and the oracle of every kernel test.

Sizes: M rows (batch × sequence), K in_features, N out_features, R rank; I intermediate size of a SwiGLU MLP. Matrices
are two-dimensional here; ops.py flattens. G linear layers that read the same x (q/k/v, gate/up) form a group; with g
its members,

    y_g  = x W_gᵀ + bias_g + S_g b_gᵀ,    S_g = (x ∘ m_g) a_gᵀ,    b_g = s'_g · lora_B_g,    s' = scaling / (1 − p)
    dS_g = dy_g b_g,    dx = Σ_g dy_g W_g + m_g ∘ (dS_g a_g),    dA_g = dS_gᵀ (x ∘ m_g),    dB_g = s'_g · dy_gᵀ S_g

with m_g the dropout mask (all ones without dropout) and p its probability. Source: Hu et al. 2021, arXiv:2106.09685,
section 4.1; dropout where PEFT has it, on the input of A, one mask per adapter.

All products run in x's dtype (fp32 accumulation inside the matrix product); weight, bias, lora_A and lora_B are cast to
it. What backward needs of the forward pass is x, S (M, ΣR) and the masks in bits: never a second copy of x.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Eight bytes 0/1 read as one little-endian int64, times this constant, leave byte i as bit i of the top byte. No
# carries: the 64 partial products of eight single bits each land on distinct positions of the product or above bit 63.
_GATHER_BITS = 0x0102040810204080

_FACTORS: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def _factors(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Row b holds the bits of the byte b as eight numbers 0 or 1 of `dtype`: (256, 8), built once."""
    key = (device, dtype)
    if key not in _FACTORS:
        with torch.inference_mode(False):  # an inference tensor could not be saved for backward later
            table = ((torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1).to(dtype)
        if type(table) is not Tensor:  # a fake tensor, made while tracing: of no use to the next caller
            return table
        _FACTORS[key] = table
    return _FACTORS[key]


def pack_mask(mask: Tensor) -> Tensor:
    """Booleans (M, K) → uint8 (M, ⌈K / 8⌉): element k of a row is bit k mod 8 of its byte k div 8; a row's last byte is
    padded with 0."""
    if padding := -mask.shape[-1] % 8:
        mask = torch.nn.functional.pad(mask, (0, padding))
    return ((mask.contiguous().view(torch.int64) * _GATHER_BITS) >> 56).to(torch.uint8)


def unpack_mask(packed: Tensor, x: Tensor) -> Tensor:
    """m from `pack_mask` as factors 0 and 1, a new tensor of x's shape and dtype."""
    # A row of eight factors per byte: on a CPU three times as fast as unpacking to booleans and selecting.
    factors = torch.nn.functional.embedding(packed.to(torch.int32), _factors(x.device, x.dtype))
    return factors.view(packed.shape[0], 8 * packed.shape[1])[:, : x.shape[1]]


def apply_mask(x: Tensor, packed: Tensor) -> Tensor:
    """x ∘ m with m from `pack_mask`, as a new tensor of x's shape and dtype."""
    # Into the factors' own memory: on a CPU a fresh tensor of this size costs more in page faults than in arithmetic.
    return unpack_mask(packed, x).mul_(x)


def dropout_mask(x: Tensor, p: float) -> Tensor:
    """Draws which elements of x (..., K) are kept, each with probability 1 − p, and packs it: uint8 (M, ⌈K / 8⌉).

    Takes the same numbers from torch's generator as `torch.nn.functional.dropout(x, p)`, so that a run with the same
    seed keeps the same elements as PEFT's `nn.Dropout`."""
    if x.is_cuda:
        kept = torch.native_dropout(x, p, True)[1]
    else:
        kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
    return pack_mask(kept.reshape(-1, x.shape[-1]))


def cast_factors(
    groups: Sequence[tuple[Sequence[Tensor], Sequence[Tensor], Sequence[float]]], dtype: torch.dtype
) -> list[tuple[Tensor, list[Tensor]]]:
    """(lora_A_g (R_g, K), lora_B_g (N_g, R_g), s'_g) of each group → its (a (ΣR, K), all lora_A_g stacked, and every
    b_g = s'_g · lora_B_g) in `dtype`."""
    results = []
    for lora_As, lora_Bs, scales in groups:
        a = lora_As[0] if len(lora_As) == 1 else torch.cat(list(lora_As))
        bs = [b if scale == 1 else b * scale for b, scale in zip(lora_Bs, scales)]
        results.append((a.to(dtype), [b.to(dtype) for b in bs]))
    return results


def shrink(x: Tensor, a: Tensor, ranks: Sequence[int], mask: Tensor | None) -> Tensor:
    """x (M, K), a (ΣR, K), mask (G, M, ⌈K / 8⌉) → S (M, ΣR) with S_g = (x ∘ m_g) a_gᵀ side by side."""
    if mask is None:
        return x @ a.t()
    parts = [apply_mask(x, m) @ part.t() for m, part in zip(mask, a.split(list(ranks)))]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def linear_lora(x: Tensor, weight: Tensor, s: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """y (M, N) = x Wᵀ + bias + s bᵀ: x (M, K), weight (N, K), s (M, R), b (N, R), bias (N,)."""
    y = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y.addmm_(s, b.t())


def update_lora(base: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """The same with the base layer's output given: base (M, N) in any dtype → base + s bᵀ in base's dtype."""
    if base.dtype == s.dtype:
        return torch.addmm(base, s, b.t())
    return torch.add(base, s @ b.t()).to(base.dtype)


def grad_s_and_b(
    dys: Sequence[Tensor], bs: Sequence[Tensor], ss: Sequence[Tensor] | None, scales: Sequence[float]
) -> tuple[Tensor, list[Tensor] | None]:
    """dy_g (M, N_g), b_g (N_g, R_g) with s'_g in it, s_g (M, R_g) → dS (M, ΣR) with dS_g = dy_g b_g side by side, in
    dy's dtype; every dB_g = s'_g · dy_gᵀ s_g (N_g, R_g), None where ss is None."""
    parts = [dy @ b for dy, b in zip(dys, bs)]
    dBs = None if ss is None else [grad_b(dy, s, scale) for dy, s, scale in zip(dys, ss, scales)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), dBs


def grad_b(dy: Tensor, s: Tensor, scale: float) -> Tensor:
    """dB (N, R) = s' · dyᵀ s alone, for an adapter whose lora_A and input need no gradient."""
    return torch.addmm(dy.new_empty(()), dy.t(), s, beta=0, alpha=scale)  # scaled before its one rounding


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
    """dx (M, K) = Σ_g dy_g W_g + m_g ∘ (dS_g a_g) and every dA_g (R_g, K) = dS_gᵀ (x ∘ m_g); None where not needed.
    dy_g (M, N_g), W_g (N_g, K) or None, ds (M, ΣR), a (ΣR, K), x (M, K), mask (G, M, ⌈K / 8⌉). The dA_g may be rows of
    one tensor.

    Without W_g that part of dx is left out: a base layer that ran by itself has a backward of its own."""
    pairs = [(dy, weight.to(ds.dtype)) for dy, weight in zip(dys, weights) if weight is not None and needs_dx]
    dx = dAs = None
    if mask is not None:
        dAs = [] if needs_dA else None
        for ds_g, a_g, bits in zip(ds.split(list(ranks), dim=1), a.split(list(ranks)), mask):
            m = unpack_mask(bits, x)  # once for both
            if needs_dx:
                update = (ds_g @ a_g).mul_(m)
                dx = update if dx is None else dx.add_(update)
            if needs_dA:
                dAs.append(ds_g.t() @ m.mul_(x))
    else:
        if needs_dA:
            dAs = list((ds.t() @ x).split(list(ranks)))
        if pairs:
            (dy, weight), *pairs = pairs
            dx = (dy @ weight).addmm_(ds, a)
        elif needs_dx:
            dx = ds @ a
    for dy, weight in pairs:
        dx.addmm_(dy, weight)
    return dx, dAs


def swiglu_shrink(g: Tensor, u: Tensor, a: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """h = silu(g) ∘ u (M, I) with silu(g) = g σ(g), and S = (h ∘ m) aᵀ (M, R) for the down projection: a (R, I), mask
    (1, M, ⌈I / 8⌉). Source: Shazeer 2020, arXiv:2002.05202."""
    h = torch.nn.functional.silu(g).mul_(u)
    return h, shrink(h, a, (a.shape[0],), mask)


def swiglu_backward(
    dh: Tensor,
    g: Tensor,
    u: Tensor,
    ds_down: Tensor,
    s_gate: Tensor,
    s_up: Tensor,
    scale_gate: float,
    scale_up: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dh (M, I) → dg = dh ∘ u ∘ σ(g) (1 + g (1 − σ(g))), du = dh ∘ silu(g) (M, I), and of the adapters what needs no
    other pass over (M, I): dA_down (R, I) = dS_downᵀ (h ∘ m), dB_gate (I, R) = s'_gate · dgᵀ S_gate, dB_up (I, R) =
    s'_up · duᵀ S_up."""
    silu = torch.nn.functional.silu(g)
    dg, du = torch.ops.aten.silu_backward(dh * u, g), dh * silu
    h = silu.mul_(u)
    dA_down = ds_down.t() @ (h if mask is None else unpack_mask(mask[0], h).mul_(h))
    return dg, du, dA_down, grad_b(dg, s_gate, scale_gate), grad_b(du, s_up, scale_up)


# --- DoRA -------------------------------------------------------------------------------------------------------------


def scale_columns(z: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
    """y = z ∘ g + bias: z (M, N), g (N,), bias (N,) or None; computed in g's dtype where z's is narrower, y in z's."""
    return (z * g if bias is None else torch.addcmul(bias.to(g.dtype), z, g)).to(z.dtype)


def scale_columns_backward(dy: Tensor, z: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor | None]:
    """dz = dy ∘ g in dy's dtype and dg = Σ_m dy ∘ z (N,) in g's, None where z is None."""
    return (dy * g).to(dy.dtype), None if z is None else (dy.to(g.dtype) * z).sum(0)


# --- Several adapters in one batch ------------------------------------------------------------------------------------
# segments: (first row, end, adapter), disjoint; rows outside all of them have no adapter. as_, bs: every a_g (R_g, K)
# and b_g (N, R_g) as above. S and dS are (M, width): a row holds the R_g numbers of its own adapter, then zeros.


def grouped_width(ranks: Sequence[int]) -> int:
    """Columns of S: the largest rank, rounded up to 16 for the kernels' loads."""
    return -(-max(ranks, default=0) // 16) * 16


def _of_adapter(segments: Sequence[tuple[int, int, int]], adapter: int, *tensors: Tensor) -> list[Tensor]:
    """Each tensor's rows of one adapter, copied only where they are in several segments."""
    spans = [slice(start, end) for start, end, owner in segments if owner == adapter]
    if len(spans) == 1:
        return [tensor[spans[0]] for tensor in tensors]
    return [torch.cat([tensor[:0], *(tensor[span] for span in spans)]) for tensor in tensors]


def grouped_shrink(
    x: Tensor, as_: Sequence[Tensor], segments: Sequence[tuple[int, int, int]], mask: Tensor | None
) -> Tensor:
    """x (M, K), mask (1, M, ⌈K / 8⌉) → S (M, width) with S_i = (x_i ∘ m_i) a_gᵀ for the rows i of g."""
    s = x.new_zeros(x.shape[0], grouped_width([a.shape[0] for a in as_]))
    for start, end, g in segments:
        rows = x[start:end] if mask is None else apply_mask(x[start:end], mask[0, start:end])
        s[start:end, : as_[g].shape[0]] = rows @ as_[g].t()
    return s


def grouped_linear_lora(
    x: Tensor,
    weight: Tensor | None,
    s: Tensor,
    bs: Sequence[Tensor],
    segments: Sequence[tuple[int, int, int]],
    bias: Tensor | None = None,
) -> Tensor:
    """y (M, N) = x Wᵀ + bias, plus S_i b_gᵀ for the rows i of g; without W the second part alone."""
    if weight is None:
        y = x.new_zeros(x.shape[0], bs[0].shape[0])
    else:
        y = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    for start, end, g in segments:
        y[start:end].addmm_(s[start:end, : bs[g].shape[1]], bs[g].t())
    return y


def grouped_grad_s(dy: Tensor, bs: Sequence[Tensor], segments: Sequence[tuple[int, int, int]]) -> Tensor:
    """dS (M, width) with dS_i = dy_i b_g for the rows i of g."""
    ds = dy.new_zeros(dy.shape[0], grouped_width([b.shape[1] for b in bs]))
    for start, end, g in segments:
        ds[start:end, : bs[g].shape[1]] = dy[start:end] @ bs[g]
    return ds


def grouped_grad_x(
    dy: Tensor,
    weight: Tensor | None,
    ds: Tensor,
    as_: Sequence[Tensor],
    segments: Sequence[tuple[int, int, int]],
    mask: Tensor | None,
) -> Tensor:
    """dx (M, K) = dy W, plus m_i ∘ (dS_i a_g) for the rows i of g; without W the second part alone."""
    dx = ds.new_zeros(ds.shape[0], as_[0].shape[1]) if weight is None else dy @ weight.to(dy.dtype)
    for start, end, g in segments:
        update = ds[start:end, : as_[g].shape[0]] @ as_[g]
        if mask is not None:
            update.mul_(unpack_mask(mask[0, start:end], update))
        dx[start:end] += update
    return dx


def grouped_grad_a(
    ds: Tensor, x: Tensor, ranks: Sequence[int], segments: Sequence[tuple[int, int, int]], mask: Tensor | None
) -> list[Tensor]:
    """Every dA_g (R_g, K) = dS_gᵀ (x_g ∘ m_g) over the rows of g; zero where g has none."""
    grads = []
    for g, rank in enumerate(ranks):
        ds_g, x_g = _of_adapter(segments, g, ds, x)
        if mask is not None:
            x_g = apply_mask(x_g, *_of_adapter(segments, g, mask[0]))
        grads.append(ds_g[:, :rank].t() @ x_g)
    return grads


def grouped_grad_b(
    dy: Tensor, s: Tensor, ranks: Sequence[int], scales: Sequence[float], segments: Sequence[tuple[int, int, int]]
) -> list[Tensor]:
    """Every dB_g (N, R_g) = s'_g · dy_gᵀ S_g over the rows of g; zero where g has none."""
    pairs = [_of_adapter(segments, g, dy, s) for g in range(len(ranks))]
    return [grad_b(dy_g, s_g[:, :rank], scale) for (dy_g, s_g), rank, scale in zip(pairs, ranks, scales)]
