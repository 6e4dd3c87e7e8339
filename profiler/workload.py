"""One training step of one arm, the same for timing and for memory: what is trained, its
optimizer, a fixed random batch."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from lora_fast import LoraConfig, LoraFastError, apply_lora, lora_parameters
from lora_fast.backend import check_backend
from lora_fast.config import ALL_LINEAR
from lora_fast.profiler.models import max_positions, vocab_size
from lora_fast.profiler.quantization import check_kind
from lora_fast.profiler.ranks import parameters_per_rank
from lora_fast.quantized import matrix_shape
from lora_fast.targets import target_modules, target_parameters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# With a learning rate of zero an optimizer does all of its work and leaves the weights bit for bit as they were: arms
# that share them do not disturb each other. 1e-6 is the smallest usual eps that fp16 still represents; AdamW's
# default, 1e-8, is 0 there.
LEARNING_RATE = 0.0
EPS = 1e-6
# State per trained parameter: two numbers; a row's and a column's mean for each matrix; none (there is no momentum).
OPTIMIZERS = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor, "sgd": torch.optim.SGD}
# Kinds of arms, and what a second copy of one (the A/A arm) has behind its name.
LORA, FULL, PEFT, AGAIN = "lora", "full", "peft", " again"
FULL_AGAIN = FULL + AGAIN


@dataclass(frozen=True)
class Workload:
    """batch_size sequences of seq_len random token ids, no padding; dtype is the base weights'.

    gradient_accumulation: forward and backward passes of such a batch in one step. gradient_checkpointing: every
    decoder layer is recomputed in backward (Transformers' own, not reentrant). optimizer: of `OPTIMIZERS`, for LoRA and
    for full fine-tuning. foreach: its updates over lists of parameters, which hold temporaries of their size; None:
    PyTorch's choice (see `uses_foreach`). attn_implementation: as Transformers takes it; None: its choice. backend: as
    apply_lora takes it. quantize: how weights under adapters are packed, of `quantization.KINDS`; None: not. use_dora:
    adapters are DoRA."""

    batch_size: int
    seq_len: int
    dtype: str
    target_modules: str | tuple[str, ...]
    device: str
    seed: int
    exclude_modules: str | tuple[str, ...] | None = None
    target_parameters: tuple[str, ...] | None = None
    adapter_dtype: str = "fp32"
    lora_dropout: float = 0.0
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    foreach: bool | None = None
    attn_implementation: str | None = None
    backend: str = "auto"
    quantize: str | None = None
    use_dora: bool = False

    def __post_init__(self) -> None:
        check_backend(self.backend)
        check_kind(self.quantize)
        if self.use_dora and self.quantize:
            raise LoraFastError(
                f"use_dora with quantize={self.quantize!r}: DoRA is not for packed weights; leave out one"
            )
        for name, least in (("batch_size", 1), ("seq_len", 2), ("gradient_accumulation", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise LoraFastError(f"{name}={value!r}; expected a whole number of at least {least}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise LoraFastError(f"seed={self.seed!r}; expected a whole number from 0 to 2**63 - 1")
        for name in ("dtype", "adapter_dtype"):
            if getattr(self, name) not in DTYPES:
                raise LoraFastError(f"{name}={getattr(self, name)!r}; expected one of {', '.join(DTYPES)}")
        if self.optimizer not in OPTIMIZERS:
            raise LoraFastError(f"optimizer={self.optimizer!r}; expected one of {', '.join(OPTIMIZERS)}")

    @property
    def tokens(self) -> int:
        """Tokens in one step."""
        return self.batch_size * self.seq_len * self.gradient_accumulation

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def uses_foreach(self) -> bool:
        """What PyTorch does unless told: on a GPU foreach, but not for Adafactor, on a CPU a loop."""
        if self.foreach is not None:
            return self.foreach
        return torch.device(self.device).type == "cuda" and self.optimizer != "adafactor"

    def packing(self, kind: str) -> str | None:
        """What the base weights of an arm of this kind are packed in; None: they are as they are."""
        return None if kind == FULL else self.quantize

    def lora_config(self, rank: int) -> LoraConfig:
        """scaling 2, as most recipes have it."""
        return LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
            target_parameters=self.target_parameters,
            use_dora=self.use_dora,
        )

    def adapter_parameters(self, rank: int, targets: Sequence[nn.Module]) -> int:
        """How many parameters an adapter of this rank on `targets` trains: Σ r (K + N), and with DoRA Σ N."""
        magnitudes = sum(matrix_shape(module)[0] for module in targets) if self.use_dora else 0
        return rank * parameters_per_rank(targets) + magnitudes

    def to_dict(self) -> dict:
        return {
            **asdict(self),
            "tokens_per_step": self.tokens,
            "optimizer": OPTIMIZERS[self.optimizer].__name__,
            "foreach": self.uses_foreach,
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


def check_peft(compare_peft: bool) -> None:
    """Raises LoraFastError where PEFT's arms are asked for and it is not there."""
    if compare_peft and find_spec("peft") is None:
        raise LoraFastError("compare_peft needs PEFT, which is not installed; pip install 'lora-fast[peft]'")


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


def parse_parameters(value: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """--target-parameters: comma-separated names of parameters. Raises LoraFastError for a regex."""
    if value is None:
        return None
    names = parse_modules(value, "target_parameters")
    if isinstance(names, str):
        raise LoraFastError(f"target_parameters={value!r}; expected names such as experts.down_proj, and no regex")
    return names


def train_full(model: nn.Module, workload: Workload) -> list[nn.Parameter]:
    """Prepares `model` for full fine-tuning; returns what is trained."""
    _checkpoint(model, workload)
    return list(model.requires_grad_(True).parameters())


def train_adapter(model: nn.Module, workload: Workload, rank: int, name: str = "default") -> list[nn.Parameter]:
    """Puts an adapter of this rank and name beside those that `model` has; returns what is trained."""
    apply_lora(
        model,
        workload.lora_config(rank),
        adapter_name=name,
        backend=workload.backend,
        adapter_dtype=DTYPES[workload.adapter_dtype],
    )
    _checkpoint(model, workload)
    return lora_parameters(model)


def train_peft(model: nn.Module, workload: Workload, rank: int) -> tuple[nn.Module, list[nn.Parameter]]:
    """The same adapter by PEFT's own layers: PEFT's model around `model`, and what is trained."""
    import peft

    _checkpoint(model, workload)
    ours, dtype = workload.lora_config(rank), DTYPES[workload.adapter_dtype]
    names = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in (("target_modules", ours.target_modules), ("exclude_modules", ours.exclude_modules))
    }
    targets = target_modules(model, ours) | target_parameters(model, ours)
    if any(parameter.dim() == 3 for parameter in model.parameters()):
        # PEFT's all-linear means the experts of a mixture too, and at twice the rank where it joins two of their names.
        names["target_modules"] = sorted({name.rpartition(".")[2] for name in target_modules(model, ours)})
        names["target_parameters"] = list(ours.target_parameters or ())
    names["use_dora"] = ours.use_dora
    config = peft.LoraConfig(r=rank, lora_alpha=ours.lora_alpha, lora_dropout=ours.lora_dropout, **names)
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    expected = workload.adapter_parameters(rank, list(targets.values()))
    if (found := sum(parameter.numel() for parameter in trained)) != expected:
        raise LoraFastError(
            f"PEFT adapts other weights of {type(model).__name__} than these targets name ({found:,} parameters, not "
            f"{expected:,}), so that its times would not compare; name target_modules that mean the same to it"
        )
    for parameter in trained:
        parameter.data = parameter.data.to(dtype)
    return wrapped.train(), trained


def train(model: nn.Module, workload: Workload, kind: str, rank: int | None) -> tuple[nn.Module, list[nn.Parameter]]:
    """Prepares `model` for an arm: the model to run, and what is trained."""
    if kind == PEFT:
        return train_peft(model, workload, rank)
    return model, train_full(model, workload) if kind == FULL else train_adapter(model, workload, rank)


def parse_arm(name: str) -> tuple[str, int | None]:
    """ "r8", "peft r8", "full", each perhaps with AGAIN: kind and rank."""
    name = name.removesuffix(AGAIN)
    if name == FULL:
        return FULL, None
    return PEFT if name.startswith(PEFT) else LORA, int(name.rpartition("r")[2])


def _checkpoint(model: nn.Module, workload: Workload) -> None:
    if workload.gradient_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise LoraFastError(f"{type(model).__name__} can't checkpoint; leave gradient_checkpointing out")
        if hasattr(model, "activation_checkpointing_enable"):  # its name in newer versions of Transformers
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})


def optimizer_of(workload: Workload, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The workload's optimizer over what is trained."""
    options = {"eps": EPS} if workload.optimizer == "adamw" else {}
    kind = OPTIMIZERS[workload.optimizer]
    return kind(parameters, lr=LEARNING_RATE, foreach=workload.uses_foreach, **options)


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
