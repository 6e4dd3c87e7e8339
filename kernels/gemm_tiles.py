"""Tiles of gemm_lora.py: which are worth timing on which chip, what each needs, what to take where none was timed."""

from typing import Any, NamedTuple

import torch

from lora_fast.kernels.devices import AMD, shared_memory
from lora_fast.kernels.launch import cdiv, next_power_of_2


class Tile(NamedTuple):
    """A program computes block_m × block_n of y, block_k of the sum a step; if persistent, one tile after another, and
    if flat, in a single loop. A descriptor stores it in so many parts, side by side, through shared memory for one of
    them."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    persistent: bool = False
    parts: int = 1
    flat: bool = False

    @property
    def name(self) -> str:
        """Such as "128x256x64 w8 s3 p2 flat": each tile that a call may take has another."""
        name = f"{self.block_m}x{self.block_n}x{self.block_k} w{self.num_warps} s{self.num_stages}"
        return name + (f" p{self.parts}" if self.parts > 1 else "") + (" flat" if self.flat else "")


# Tiles worth timing, from large to small. A large tile reads each element of x and w less often; a small one gives
# every SM something to do when M is small. tests/test_offline_compile.py holds each to its chip's registers and
# shared memory.
TILES = {
    # wgmma needs 64 rows. 128 × 256 on 8 warps is 128 accumulators a thread, and three stages of it leave room for
    # storing y by TMA while the next tile's loads are on their way; four do if y is stored in parts. The last two
    # stream w for decoding: M ≤ 64.
    "sm_90": (
        Tile(128, 256, 64, 8, 3, persistent=True, parts=2, flat=True),
        Tile(128, 256, 64, 8, 4, persistent=True, parts=4, flat=True),
        Tile(128, 256, 64, 8, 4, persistent=True, parts=2),
        Tile(128, 256, 64, 8, 3, persistent=True),
        Tile(128, 256, 64, 8, 3, persistent=True, parts=4, flat=True),
        Tile(128, 128, 64, 8, 4, persistent=True, flat=True),
        Tile(128, 128, 64, 8, 4, persistent=True),
        Tile(64, 128, 64, 4, 4, persistent=True, flat=True),
        Tile(64, 128, 64, 4, 4, persistent=True),
        Tile(64, 64, 128, 4, 4, persistent=True),
        Tile(64, 32, 128, 4, 5, persistent=True),
    ),
    # The accumulator lies in tensor memory. The loop over tiles costs some 30 registers, which spill beside a mask in
    # the largest tile.
    "sm_100": (
        Tile(128, 256, 64, 8, 3),
        Tile(128, 128, 64, 8, 4, persistent=True),
        Tile(64, 128, 64, 4, 4, persistent=True),
        Tile(64, 64, 64, 4, 4, persistent=True),
        Tile(64, 32, 128, 4, 5, persistent=True),
    ),
    # Consumer Blackwell: TMA, but mma.sync, and 99 KiB of shared memory.
    "sm_120": (
        Tile(128, 128, 64, 8, 2, persistent=True),
        Tile(64, 128, 64, 4, 2, persistent=True),
        Tile(64, 64, 64, 4, 3, persistent=True),
        Tile(64, 32, 128, 4, 2, persistent=True),
    ),
    # Operands of mma.sync pass through registers: 128 accumulators a thread leave no room for a mask.
    "sm_80": (
        Tile(128, 256, 32, 8, 3),
        Tile(128, 128, 32, 8, 4),
        Tile(64, 64, 32, 4, 4),
        Tile(16, 64, 128, 4, 4),
    ),
    # The same within 99 KiB.
    "sm_89": (
        Tile(128, 128, 32, 8, 4),
        Tile(64, 64, 32, 4, 4),
        Tile(16, 64, 128, 4, 4),
    ),
    # 64 KiB, and AMD's pipeliner knows two stages.
    "gfx942": (
        Tile(128, 128, 64, 8, 2),
        Tile(64, 64, 64, 4, 2),
        Tile(32, 64, 128, 4, 2),
    ),
    # fp32 products are exact, on the plain arithmetic units: registers hold both operands.
    "fp32": (Tile(64, 64, 32, 8, 2), Tile(32, 32, 32, 4, 2)),
    # Rows that are not aligned are loaded by the element, through registers, on every chip.
    "unaligned": (Tile(64, 128, 32, 8, 2), Tile(64, 64, 32, 8, 2), Tile(32, 32, 32, 4, 2)),
    # Without a product the kernel is bound by reading and writing y.
    "update": (Tile(64, 128, 32, 8, 2), Tile(32, 64, 32, 4, 2)),
}
SMS = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}
BLOCK_R = 32  # adapters of larger rank are summed in blocks of this
FLAT_RANK = 64  # and up to this one in a single block, if the tile is flat


def uses_descriptors(capability: tuple[int, int]) -> bool:
    return capability >= (9, 0) and capability != AMD


def architecture(capability: tuple[int, int]) -> str:
    """The key of TILES for a GPU; (0, 0), the interpreter, counts as the smallest."""
    if capability == AMD:
        return "gfx942"
    if uses_descriptors(capability):
        return {9: "sm_90", 10: "sm_100"}.get(capability[0], "sm_120")
    return "sm_80" if capability in ((8, 0), (8, 7)) else "sm_89"


def rank_block(rank: int, *, flat: bool) -> int:
    """How many ranks are added up at a time: a power of two, and the 16 that a tensor core takes at least."""
    return min(max(next_power_of_2(rank), 16), FLAT_RANK if flat else BLOCK_R)


def _has_room(tile: Tile, capability: tuple[int, int], masks: int, rank: int | None) -> bool:
    """Whether a flat tile can be used for updates of this rank: in one block, beside all else in shared memory, and of
    a masked one with 160 accumulators a thread at most. Several masks would spill."""
    if rank is None or rank > FLAT_RANK or masks > 1:
        return False
    columns = tile.block_n // tile.parts
    if masks and tile.block_m * (tile.block_n + columns) > 160 * 32 * tile.num_warps:
        return False
    stages = tile.num_stages * tile.block_k * (tile.block_m + tile.block_n)
    update = rank_block(rank, flat=True) * (tile.block_m + (columns if masks else tile.block_n))
    barriers = 128
    return 2 * (stages + update + tile.block_m * columns) + barriers <= shared_memory(capability)


def candidates(
    dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    pairs: int = 1,
    masks: int = 0,
    aligned: bool = True,
    rank: int | None = None,
) -> tuple[Tile, ...]:
    """The tiles that `pick_tile` and the tuner choose from, for so many products and masks. rank: the largest of the
    updates', where there is one product; without it no tile is flat."""
    name = architecture(capability)
    if not pairs:
        return TILES["update"]
    if dtype == torch.float32:
        return TILES["fp32"]
    # Accumulators a thread can hold. A masked update has some of its own: one can be the start of the loop's, a second
    # is live beside it. Rows that are not aligned pass through registers.
    most = 128 if masks == 0 or (masks == 1 and name in ("sm_90", "sm_100")) else 64
    if not aligned:
        name, most = "unaligned", 32 if masks == 0 else 16

    def usable(tile: Tile) -> bool:
        if tile.flat:
            return _has_room(tile, capability, masks, rank)
        return tile.block_m * tile.block_n <= most * 32 * tile.num_warps

    return tuple(filter(usable, TILES[name]))


def ranked_tiles(M: int, N: int, dtype: torch.dtype, capability: tuple[int, int], **kind: Any) -> list[Tile]:
    """The `candidates` of this kind, by modelled time: rounds of tiles over the SMs, times a tile's time per step of
    the sum. Where it is the same, in the order of TILES."""

    def cost(tile: Tile) -> int:
        rounds = cdiv(cdiv(M, tile.block_m) * cdiv(N, tile.block_n), SMS[architecture(capability)])
        # Arithmetic goes with the area, loads with the edges; on an H100 an element of the edge, out of L2 at 42 bytes
        # a ns and SM, costs as much as 180 multiply-adds at 3.7 TFLOP/s an SM.
        return rounds * (tile.block_m * tile.block_n + 180 * (tile.block_m + tile.block_n))

    return sorted(candidates(dtype, capability, **kind), key=cost)


def pick_tile(M: int, N: int, dtype: torch.dtype, capability: tuple[int, int], **kind: Any) -> Tile:
    """The first of `ranked_tiles`."""
    return ranked_tiles(M, N, dtype, capability, **kind)[0]
