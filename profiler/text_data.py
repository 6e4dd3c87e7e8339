"""From a text file to blocks of token ids: plain text or jsonl, by the model's tokenizer, or by bytes without one."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_fast import LoraFastError
from lora_fast.profiler.models import ModelSource

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
# Between documents where no token ends one.
SEPARATOR = "\n\n"
SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Text:
    """A file's documents; name is its path, digest the first 16 hex digits of the SHA-256 of what they say."""

    name: str
    documents: tuple[str, ...]
    digest: str

    @classmethod
    def of(cls, name: str, documents: Sequence[str]) -> "Text":
        digest = hashlib.sha256("\0".join(documents).encode(errors="surrogatepass")).hexdigest()[:16]
        return cls(name, tuple(documents), digest)


@dataclass(frozen=True)
class Encoder:
    """name: of the tokenizer, or "bytes". encode: a document → its ids. end: the id that ends a document, or None."""

    name: str
    encode: Callable[[str], list[int]]
    end: int | None


BYTES = Encoder("bytes", lambda text: list(text.encode(errors="surrogatepass")), None)


def read_text(path: str | Path, field: str = "text") -> Text:
    """The documents of a file: of .jsonl one per line, in that field; of any other the whole file as one, in UTF-8.

    Raises LoraFastError naming file, line and what was expected."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise LoraFastError(f"{path}: {'this is a folder, a file is expected' if path.is_dir() else 'no such file'}")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise LoraFastError(f"{path} is not text in UTF-8 (byte {error.start}); convert it first") from None
    if not content.strip():
        raise LoraFastError(f"{path} is empty; expected plain text, or jsonl with a field {field!r}")
    documents = [content] if path.suffix not in SUFFIXES else _lines(path, content, field)
    return Text.of(str(path), documents)


def _lines(path: Path, content: str, field: str) -> list[str]:
    documents = []
    for number, line in enumerate(content.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise LoraFastError(f"{path}, line {number}: no JSON ({error}); jsonl has one object a line") from None
        if not isinstance(row, dict):
            raise LoraFastError(f"{path}, line {number}: a {type(row).__name__}; expected an object with {field!r}")
        if field not in row:
            fields = ", ".join(map(repr, list(row)[:8])) or "none"
            raise LoraFastError(
                f"{path}, line {number}: no field {field!r}, it has {fields}; name one with --text-field"
            )
        if not isinstance(row[field], str):
            raise LoraFastError(f"{path}, line {number}: {field!r} is a {type(row[field]).__name__}; expected text")
        documents.append(row[field])
    if not any(document.strip() for document in documents):
        raise LoraFastError(f"{path} is empty: {field!r} holds no text in any of its {len(documents)} lines")
    return documents


def encoder_of(source: ModelSource) -> Encoder:
    """The tokenizer in the model's folder (for a config.json, beside it), or bytes where there is none."""
    folder = Path(source.location)
    folder = folder if source.kind == "folder" else folder.parent
    if source.kind == "shape" or not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return BYTES
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what tokenizers raise is their own choice
        raise LoraFastError(f"{folder}: its tokenizer can't be read: {' '.join(str(error).split())[:300]}") from error
    encode = lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # noqa: E731
    return Encoder(type(tokenizer).__name__, encode, tokenizer.eos_token_id)


def token_ids(text: Text, encoder: Encoder, vocabulary: int) -> Tensor:
    """All documents one after another, each with its end: int64 (count,). Raises LoraFastError for ids that the model's
    embedding doesn't have."""
    ids: list[int] = []
    for document in text.documents:
        if encoder.end is None and ids:
            ids += encoder.encode(SEPARATOR)
        ids += encoder.encode(document)
        if encoder.end is not None:
            ids.append(encoder.end)
    found = torch.tensor(ids, dtype=torch.int64)
    if len(ids) and int(found.max()) >= vocabulary:
        raise LoraFastError(
            f"{text.name}: token id {int(found.max())} of {encoder.name}, and the model's vocab_size is {vocabulary}; "
            "model and tokenizer don't belong together"
        )
    return found


def blocks(ids: Tensor, seq_len: int, name: str) -> Tensor:
    """(count, seq_len): the ids cut into blocks, without the last part of one. Raises LoraFastError for less than
    one."""
    count = len(ids) // seq_len
    if not count:
        raise LoraFastError(
            f"{name} has {len(ids)} tokens, less than one sequence of {seq_len}; give more text, or a smaller --seq-len"
        )
    return ids[: count * seq_len].view(count, seq_len)


def spread(rows: Tensor, count: int) -> Tensor:
    """At most `count` of the rows, evenly over all of them."""
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()]
