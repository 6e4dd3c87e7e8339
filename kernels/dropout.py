"""Dropout masks inside a kernel: one Philox call draws eight elements, which are one byte of the mask.

A mask of x (M, K) is uint8 (M, ⌈K / 8⌉): bit i of byte j of a row says whether element 8 j + i is kept. The element's
place and the seed decide it, nothing else, so that any kernel can redraw any part of it. Each element gets 16 of the
128 bits of a call and is kept where they reach p · 2¹⁶: the probability is p to within 2⁻¹⁷.

Seven rounds of Philox pass BigCrush (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", table 2); ten
would make a pass over x bound by arithmetic instead of memory."""

import triton
import triton.language as tl

PHILOX_ROUNDS = tl.constexpr(7)


def threshold(dropout_p: float) -> int:
    """The 16-bit number below which an element is dropped."""
    return min(round(dropout_p * 65536), 65535)


@triton.jit
def _eighth(word, shift: tl.constexpr, drop_below, bit: tl.constexpr):
    """1 << bit where the 16 bits of `word` from `shift` on say "keep", else 0."""
    return ((((word >> shift) & 0xFFFF).to(tl.int32) >= drop_below).to(tl.int32)) << bit


@triton.jit
def draw_bytes(seed, index, drop_below):
    """Mask bytes number `index` (any shape, int64: row · ⌈K / 8⌉ + byte of the row) as int32 in 0 … 255.

    seed: an int64 scalar; drop_below: `threshold(p)`."""
    w0, w1, w2, w3 = tl.randint4x(seed, index, n_rounds=PHILOX_ROUNDS)
    byte = _eighth(w0, 0, drop_below, 0) | _eighth(w0, 16, drop_below, 1)
    byte |= _eighth(w1, 0, drop_below, 2) | _eighth(w1, 16, drop_below, 3)
    byte |= _eighth(w2, 0, drop_below, 4) | _eighth(w2, 16, drop_below, 5)
    byte |= _eighth(w3, 0, drop_below, 6) | _eighth(w3, 16, drop_below, 7)
    return byte


@triton.jit
def spread_bytes(byte, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Mask bytes (ROWS, COLUMNS / 8) → booleans (ROWS, COLUMNS)."""
    bits = (byte.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, COLUMNS)) != 0
