"""What the choice of a tile needs to know of a chip."""

import functools

import torch
import triton
from torch import Tensor

# AMD's gfx942; no Nvidia chip has this capability.
AMD = (9, 4)

# Bytes of shared memory that one program may use. Triton's compiler accepts more and the launch then fails.
_SHARED_MEMORY = {(8, 0): 166_912, (9, 0): 232_448, (10, 0): 232_448, (10, 3): 232_448, AMD: 65_536}
_SHARED_MEMORY_ELSEWHERE = 101_376  # 8.6, 8.9, 12.0

# Programs that occupy a large GPU, one on each multiprocessor: an H100 or H200 has 132, an A100 108, an RTX 4090
# 128, a B200 148. Work split for 132 leaves none of these idle for long, and results are bit-identical between them.
MULTIPROCESSORS = 132


def capability_of(tensor: Tensor) -> tuple[int, int]:
    """The compute capability of the tensor's GPU, AMD for any of AMD's; (0, 0) off a GPU, in Triton's interpreter."""
    if not tensor.is_cuda:
        return 0, 0
    return gpu_capability(tensor.get_device())


@functools.cache  # asked at each call, and PyTorch takes long for the answer
def gpu_capability(device: int | None) -> tuple[int, int]:
    # AMD's numbers mean something else: gfx90a would pass for a Hopper.
    return AMD if torch.version.hip else torch.cuda.get_device_capability(device)


def shared_memory(capability: tuple[int, int]) -> int:
    return _SHARED_MEMORY.get(capability, _SHARED_MEMORY_ELSEWHERE)


def stages_that_fit(wanted: int, stage_bytes: int, capability: tuple[int, int], *, other_bytes: int = 0) -> int:
    """How many of the wanted pipeline stages fit into shared memory beside `other_bytes`; 0 if not even two do."""
    # A tenth stays free for what Triton adds: barriers, layout conversions, masks.
    room = shared_memory(capability) * 9 // 10 - other_bytes
    stages = min(wanted, 2 if capability == AMD else wanted, room // stage_bytes)
    return stages if stages >= 2 else 0


def fp64_dot_options(capability: tuple[int, int]) -> dict[str, int]:
    """What a launch passes besides, if its kernel has an fp64 tl.dot."""
    # triton 3.6 and 3.7 choose AMD's fp64 matrix instruction, and then have no code for it. It is 16 wide; of those 32
    # wide none takes fp64, and asked for these, Triton multiplies in plain registers.
    before_3_9 = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
    return {"matrix_instr_nonkdim": 32} if capability == AMD and before_3_9 else {}
