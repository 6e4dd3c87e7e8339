"""Which ranks a sweep tries: the text of `--ranks`, the choice made for `auto`; and shares such as 2%."""

import math
import re
from collections.abc import Iterable, Sequence

from torch import nn

from lora_fast import LoraFastError
from lora_fast.quantized import matrix_shape

MAX_AUTO_ARMS = 6
_RANGE = re.compile(r"(\d+):(\d+):x(\d+)")


def parse_ranks(ranks: str | int | Sequence[int]) -> list[int] | None:
    """Ranks in ascending order, each once; None for "auto".

    Text is a list of numbers and of ranges START:STOP:xFACTOR: "1,2,4", "4:1024:x2", "8,64:256:x2".
    Raises LoraFastError for anything else than whole numbers of at least 1."""
    if isinstance(ranks, str):
        if ranks.strip().lower() == "auto":
            return None
        values = [value for part in ranks.split(",") for value in _parse_part(part.strip(), ranks)]
    else:
        values = list(ranks) if isinstance(ranks, Iterable) else [ranks]
    if not values:
        raise LoraFastError("ranks is empty; expected at least one, such as 8,64,256")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise LoraFastError(f"rank {value!r} in ranks; a rank is a whole number from 1 to 2**31 - 1")
    return sorted(set(values))


def parse_share(text: str, argument: str) -> float:
    """ "2%" or "0.02" → 0.02. Raises LoraFastError for what is neither."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", text)
    if not match or not 0 < (value := float(match[1]) / (100 if match[2] else 1)) < 1:
        raise LoraFastError(f"{argument} {text!r}; expected a share such as 2% or 0.02")
    return value


def _parse_part(part: str, text: str) -> list[int]:
    expected = "expected auto, numbers such as 8,64,256, or START:STOP:xFACTOR such as 4:1024:x2"
    if re.fullmatch(r"\d+", part):
        return [int(part)]
    match = _RANGE.fullmatch(part)
    if not match:
        raise LoraFastError(f"--ranks {text!r}: {part!r} is not a rank; {expected}")
    start, stop, factor = map(int, match.groups())
    if start < 1 or stop < start or factor < 2:
        raise LoraFastError(
            f"--ranks {text!r}: {part!r} names no rank; {expected}, with 1 ≤ START ≤ STOP and FACTOR ≥ 2"
        )
    values = []
    while start <= stop:
        values.append(start)
        start *= factor
    return values


def auto_ranks(model: nn.Module, targets: Sequence[nn.Module], per_rank: int) -> list[int]:
    """Powers of two a factor 4 apart, at most six, up to where LoRA cannot be worth it any more.

    per_rank is the number of parameters that one more rank trains, Σ (K + N) over `targets`. The upper end is the
    largest power of two that keeps LoRA's parameters at or below the dense model's, and r ≤ min(N, K) on at least one
    target: at r = min(N, K) the update can be any matrix, and a larger r only costs."""
    dense = sum(parameter.numel() for parameter in model.parameters())
    full_rank = max(min(module.weight.shape[-2:]) for module in targets)
    top = max(1, min(dense // max(1, per_rank), full_rank))
    exponent = int(math.log2(top))
    return sorted(2**e for e in range(exponent, -1, -2))[-MAX_AUTO_ARMS:]


def parameters_per_rank(targets: Iterable[nn.Module]) -> int:
    """How many parameters one more rank trains: Σ (K + N), of stacked experts for each."""
    return sum(getattr(module, "stacked", 1) * sum(matrix_shape(module)) for module in targets)


def smallest_side(targets: Iterable[nn.Module]) -> int:
    """The least min(N, K): a larger rank describes no more updates of that layer than it does."""
    return min(min(module.weight.shape[-2:]) for module in targets)


def too_large(ranks: Sequence[int], targets: Sequence[tuple[str, nn.Module]]) -> list[str]:
    """A note where a rank exceeds min(N, K) of one of the targets (path, module): it only costs more there."""
    smallest = smallest_side(module for _, module in targets)
    above = [rank for rank in ranks if rank > smallest]
    if not above:
        return []
    names = sorted({path.rsplit(".", 1)[-1] for path, module in targets if min(module.weight.shape[-2:]) == smallest})
    return [f"r above {smallest} ({', '.join(map(str, above))}) exceeds min(N, K) of {', '.join(names)}"]
