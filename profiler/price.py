"""A price per hour, as the commands take it."""

import re

from lora_fast import LoraFastError


def parse_price(text: str) -> float:
    """--price: "2.50/h", "$2.50/h", "2.50" → US dollars an hour, of all that the arm runs on. Raises LoraFastError."""
    match = re.fullmatch(r"\s*\$?\s*(\d+(?:\.\d+)?|\.\d+)\s*(?:/\s*h(?:our)?)?\s*", text)
    if not match or float(match[1]) == 0:
        raise LoraFastError(f"--price {text!r}; expected dollars an hour, such as 2.50/h")
    return float(match[1])
