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
def _reaches(word, least, either):
    """Bits 15 and 31: whether the lower and the upper 16 bits of `word` reach the threshold, by carries (see below)."""
    carried = (word & 0x7FFF7FFF) + least
    return ((carried & word) | (either & (carried | word))) & 0x80008000


@triton.jit
def draw_bytes(seed, index, drop_below):
    """Mask bytes number `index` (any shape, int64: row · ⌈K / 8⌉ + byte of the row) as int32 in 0 … 255.

    seed: an int64 scalar; drop_below: `threshold(p)`. Two comparisons at a time: adding 2¹⁵ − (threshold mod 2¹⁵) to
    the lower 15 bits of a half carries into its top bit where they reach that remainder; then both top bits (threshold
    ≥ 2¹⁵) or either one (below) say "keep". Eight compares and selects cost a third more instructions."""
    w0, w1, w2, w3 = tl.randint4x(seed, index, n_rounds=PHILOX_ROUNDS)
    least = (0x8000 - (drop_below & 0x7FFF)).to(tl.uint32) * 0x10001
    either = tl.where(drop_below < 0x8000, 0xFFFFFFFF, 0).to(tl.uint32)
    kept = _reaches(w0, least, either)
    kept = (kept >> 2) | _reaches(w1, least, either)
    kept = (kept >> 2) | _reaches(w2, least, either)
    kept = (kept >> 2) | _reaches(w3, least, either)
    # Bits 9, 11, 13, 15 hold the lower halves' answers, 25, 27, 29, 31 the upper ones'. The product interleaves them in
    # the top byte, hidden from the compiler, which would turn shifts and masks back into compares.
    return ((kept * 0x8001) >> 24).to(tl.int32)


@triton.jit
def spread_bytes(byte, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Mask bytes (ROWS, COLUMNS / 8) → booleans (ROWS, COLUMNS)."""
    bits = (byte.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, COLUMNS)) != 0
