"""What every op of lora-fast means, in plain PyTorch: the path taken on a CPU, and the oracle of every kernel test.

Sizes: M rows (batch × sequence), K in_features, N out_features, R rank. Matrices are two-dimensional here; ops.py
flattens.

    y  = x Wᵀ + bias + s' · S Bᵀ,    S = (x ∘ m) Aᵀ,    s' = scaling / (1 − p)
    dS = s' · dy B,    dx = dy W + m ∘ (dS A),    dA = dSᵀ (x ∘ m),    dB = s' · dyᵀ S

with m the dropout mask (all ones without dropout) and p its probability. Source: Hu et al. 2021, arXiv:2106.09685,
section 4.1; dropout where PEFT has it, on the input of A.

All products run in x's dtype (fp32 accumulation inside the matrix product); weight, bias, lora_A and lora_B are cast to
it.
What backward needs of the forward pass is x, S (M, R) and the mask in bits: never a second copy of x.
"""

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
    """Booleans of any shape → uint8 (⌈numel / 8⌉,): element i is bit i mod 8 of byte i div 8; the last byte is padded
    with 0."""
    flat = mask.reshape(-1)
    if padding := -flat.numel() % 8:
        flat = torch.cat([flat, flat.new_zeros(padding)])
    return ((flat.view(torch.int64) * _GATHER_BITS) >> 56).to(torch.uint8)


def unpack_mask(packed: Tensor, x: Tensor) -> Tensor:
    """m from `pack_mask` as factors 0 and 1, a new tensor of x's shape and dtype."""
    # A row of eight factors per byte: on a CPU three times as fast as unpacking to booleans and selecting.
    factors = torch.nn.functional.embedding(packed.to(torch.int32), _factors(x.device, x.dtype))
    return factors.view(-1)[: x.numel()].view(x.shape)


def apply_mask(x: Tensor, packed: Tensor) -> Tensor:
    """x ∘ m with m from `pack_mask`, as a new tensor of x's shape and dtype."""
    # Into the factors' own memory: on a CPU a fresh tensor of this size costs more in page faults than in arithmetic.
    return unpack_mask(packed, x).mul_(x)


def dropout_mask(x: Tensor, p: float) -> Tensor:
    """Draws which elements of x are kept, each with probability 1 − p, and packs it: uint8 (⌈numel / 8⌉,).

    Takes the same numbers from torch's generator as `torch.nn.functional.dropout(x, p)`, so that a run with the same
    seed keeps the same elements as PEFT's `nn.Dropout`."""
    if x.is_cuda:
        return pack_mask(torch.native_dropout(x, p, True)[1])
    return pack_mask(torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p))


def lora_linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    mask: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """x (M, K), weight (N, K), bias (N,), lora_A (R, K), lora_B (N, R) → y (M, N), S (M, R) in x's dtype."""
    y = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    s = (x if mask is None else apply_mask(x, mask)) @ lora_A.to(x.dtype).t()
    y.addmm_(s, lora_B.to(x.dtype).t(), alpha=scaling / (1 - dropout_p))
    return y, s


def lora_update_forward(
    x: Tensor, base: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """The same with the base layer's output given: base (M, N) in any dtype → base + s' · S Bᵀ (M, N) in base's dtype,
    S (M, R)."""
    s = (x if mask is None else apply_mask(x, mask)) @ lora_A.to(x.dtype).t()
    factor = scaling / (1 - dropout_p)
    if base.dtype == x.dtype:
        return torch.addmm(base, s, lora_B.to(x.dtype).t(), alpha=factor), s
    return torch.add(base, s @ lora_B.to(x.dtype).t(), alpha=factor).to(base.dtype), s


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout_p: float,
    needs_dx: bool,
    needs_dA: bool,
    needs_dB: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dy (M, N) → dx (M, K) in x's dtype, dA (R, K) and dB (N, R) in their factor's dtype; what isn't needed comes back
    empty.

    Without `weight`, dx is the adapter's part alone (the base layer's own backward supplies the rest)."""
    dy = dy.to(x.dtype)
    factor = scaling / (1 - dropout_p)
    dx, dA, dB = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if needs_dB:
        dB = (dy.t() @ s).to(lora_B.dtype) * factor
    if not (needs_dx or needs_dA):
        return dx, dA, dB
    ds = (dy @ lora_B.to(x.dtype)) * factor
    m = None if mask is None else unpack_mask(mask, x)
    if needs_dx:
        a = lora_A.to(x.dtype)
        if weight is None:
            dx = ds @ a if m is None else (ds @ a).mul_(m)
        elif m is None:
            dx = (dy @ weight.to(x.dtype)).addmm_(ds, a)
        else:
            dx = (ds @ a).mul_(m).addmm_(dy, weight.to(x.dtype))
    if needs_dA:
        if m is not None:  # in m's memory, unless autograd keeps m for a second derivative
            x = m * x if torch.is_grad_enabled() else m.mul_(x)
        dA = (ds.t() @ x).to(lora_A.dtype)
    return dx, dA, dB
