"""One training step of one arm, the same for timing and for memory: what is trained, AdamW, a fixed random batch."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from lora_fast import LoraConfig, LoraFastError
from lora_fast.config import ALL_LINEAR
from lora_fast.profiler.models import max_positions, vocab_size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# AdamW with a learning rate of zero does all of its work and leaves the weights bit for bit as they were, so arms that
# share them do not disturb each other. 1e-6 is the smallest usual eps that fp16 still represents; the default 1e-8 is 0
# there.
LEARNING_RATE = 0.0
EPS = 1e-6
FULL, FULL_AGAIN = "full", "full again"


@dataclass(frozen=True)
class Workload:
    """batch_size sequences of seq_len random token ids, no padding; dtype is the base weights'; adapters are fp32."""

    batch_size: int
    seq_len: int
    dtype: str
    target_modules: str | tuple[str, ...]
    device: str
    seed: int
    exclude_modules: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("seq_len", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise LoraFastError(f"{name}={value!r}; expected a whole number of at least {least}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise LoraFastError(f"seed={self.seed!r}; expected a whole number from 0 to 2**63 - 1")
        if self.dtype not in DTYPES:
            raise LoraFastError(f"dtype={self.dtype!r}; expected one of {', '.join(DTYPES)}")

    @property
    def tokens(self) -> int:
        """Tokens in one step (M)."""
        return self.batch_size * self.seq_len

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def lora_config(self, rank: int) -> LoraConfig:
        """scaling 2, as most recipes have it; no dropout."""
        return LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
        )

    def to_dict(self) -> dict:
        return {
            **asdict(self),
            "tokens_per_step": self.tokens,
            "adapter_dtype": "fp32",
            "optimizer": "AdamW",
            "learning_rate": LEARNING_RATE,
        }

    def batch(self, model: nn.Module) -> dict[str, Tensor]:
        """Token ids (batch_size, seq_len) drawn from `seed`, which are their own labels."""
        longest = max_positions(model)
        if longest is not None and self.seq_len > longest:
            raise LoraFastError(f"seq_len={self.seq_len} exceeds the model's max_position_embeddings={longest}")
        if not vocab_size(model):
            raise LoraFastError("the model's config.vocab_size is 0; expected at least one token to draw")
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(0, vocab_size(model), (self.batch_size, self.seq_len), generator=generator).to(self.device)
        return {"input_ids": ids, "labels": ids}


def parse_modules(value: str | Iterable[str], argument: str = "target_modules") -> str | tuple[str, ...]:
    """--target-modules and --exclude-modules: a name or comma-separated names, or else a regular expression over module
    paths; "all-linear" for the first. Raises LoraFastError for anything else."""
    if not isinstance(value, str):
        names = tuple(value) if isinstance(value, Iterable) else (value,)
        if not names or not all(isinstance(name, str) for name in names):
            raise LoraFastError(f"{argument}={value!r}; expected module names such as q_proj,v_proj, or a regex")
        return names
    if argument == "target_modules" and value.strip().lower() == ALL_LINEAR:
        return ALL_LINEAR
    if re.fullmatch(r"\s*[\w.\-]+\s*(,\s*[\w.\-]+\s*)*", value):
        return tuple(name.strip() for name in value.split(","))
    try:
        re.compile(value)
    except re.error as error:
        raise LoraFastError(
            f"{argument}={value!r} is neither names such as q_proj,v_proj nor a regular expression: {error}"
        ) from error
    return value


def adamw(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """PyTorch's own choice of implementation: for-loop on a CPU, foreach on a GPU."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, eps=EPS)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The forward pass; nothing but the loss outlives it."""
    return model(**batch).loss


_MEMORY_MESSAGES = re.compile(r"can't allocate memory|cannot allocate memory|out of memory|bad_alloc", re.IGNORECASE)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out. PyTorch's CPU allocator raises a plain RuntimeError for it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_MEMORY_MESSAGES.search(str(error)))


def requested_MiB(text: str) -> float | None:
    """How much the failed allocation asked for, from the message of PyTorch's CPU or CUDA allocator."""
    match = re.search(r"tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", text, re.IGNORECASE)
    if not match:
        return None
    return float(match[1]) * {"bytes": 2**-20, "kib": 2**-10, "mib": 1.0, "gib": 1024.0}[match[2].lower()]


def describe(error: Exception) -> dict:
    """An exception as status, error and, for memory, how much the allocation that failed asked for."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if not out_of_memory(error):
        return {"status": "failed", "error": text, "requested_MiB": None}
    return {"status": "oom", "error": text, "requested_MiB": requested_MiB(str(error))}
