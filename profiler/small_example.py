"""What the examples that a CPU trains in minutes share: two kinds of text that every Python carries, and a Llama that
reads bytes."""

import sysconfig
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from torch import nn

BYTES = 256
# The end of each text, which nothing trains on.
HELD_OUT = 0.1


def prose() -> bytes:
    """The topics of Python's help(): reST prose, 0.4 MB."""
    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def code() -> bytes:
    """The standard library's own modules, by name: 4 MB."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return b"\n\n".join(file.read_bytes() for file in files)


def split(text: bytes) -> tuple[bytes, bytes]:
    """(to train on, held out)."""
    cut = int(len(text) * (1 - HELD_OUT))
    return text[:cut], text[cut:]


def byte_llama(shape: Mapping[str, Any], length: int) -> nn.Module:
    """A LlamaForCausalLM over the 256 byte values, weights drawn from torch's generator. shape: its sizes, as
    LlamaConfig names them; length: the longest sequence."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {**shape, "vocab_size": BYTES, "max_position_embeddings": length, "use_cache": False}
    # No byte is special: Llama's usual start and end ids are ordinary characters here.
    return LlamaForCausalLM(LlamaConfig(**fields))
