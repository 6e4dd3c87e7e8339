"""What training costs in money: a price per hour and a speed give a price per million tokens."""

import re

from lora_fast import LoraFastError
from lora_fast.profiler.profile import Arm


def parse_price(text: str) -> float:
    """--price: "2.50/h", "$2.50/h", "2.50" → US dollars an hour, of all that the arm runs on. Raises LoraFastError."""
    match = re.fullmatch(r"\s*\$?\s*(\d+(?:\.\d+)?|\.\d+)\s*(?:/\s*h(?:our)?)?\s*", text)
    if not match or float(match[1]) == 0:
        raise LoraFastError(f"--price {text!r}; expected dollars an hour, such as 2.50/h")
    return float(match[1])


def usd_per_million_tokens(arm: Arm, usd_per_hour: float | None) -> float | None:
    """None where the price or the arm's speed is not known."""
    if usd_per_hour is None or not arm.tokens_per_s:
        return None
    return usd_per_hour / 3600 / arm.tokens_per_s * 1e6
