"""One training of a rank search: a model, LoRA of a rank or all of its parameters, Hugging Face's Trainer, and the loss
on held-out text.

All arms see the same data in an order that the seed alone decides, for the same number of steps."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_fast import LoraConfig, LoraFastError, apply_lora, save_adapter
from lora_fast.profiler import models
from lora_fast.profiler.models import ModelSource
from lora_fast.profiler.workload import DTYPES
from lora_fast.rank_evidence import SCHULMAN
from lora_fast.rank_search import FULL, Rank

# Full fine-tuning's best learning rate is about a tenth of LoRA's. Source: SCHULMAN (10×, 9.8 by their fit).
FULL_RATE_SHARE = 0.1
FULL_RATE_SOURCE = SCHULMAN
# Three rules for alpha, alike at r = 16, where they give 2: alpha of a rank, use_rslora, in words. With AdamW, r
# directions that each move by the learning rate move an update r times as far where they agree, so that under 1/r the
# best rate depends little on the rank; SCHULMAN found so. rsLoRA argues for 1/√r by the size of gradients at large r.
# benchmarks/bench_rank_scaling.py compares them on the small example.
SCALINGS = {
    "inverse": (lambda rank: 32, False, f"32/r (alpha = 32; {SCHULMAN})"),
    "rslora": (lambda rank: 8, True, "8/√r (rsLoRA, arXiv:2312.03732)"),
    "constant": (lambda rank: 2 * rank, False, "2 (alpha = 2r)"),
}
# A training's curve: so many evaluations, the first before it, and so many means of the training loss.
EVALUATIONS, LOSSES = 5, 20
WARM_UP = 0.1

Report = Callable[[int, float], None]


@dataclass(frozen=True)
class Recipe:
    """How every arm of a search is trained; what differs between them is the rank, and full fine-tuning's rate.

    steps of batch_size · gradient_accumulation sequences of seq_len tokens; learning_rate: of LoRA, the same at every
    rank (AdamW, linear warm-up over a tenth of the steps, then a cosine to 0, gradients clipped to norm 1);
    full_learning_rate: of full fine-tuning. scaling: one of SCALINGS. dtype: of the frozen base; adapters are
    fp32, and full fine-tuning keeps fp32 weights under autocast to it: such small updates vanish in bf16's rounding.
    Raises LoraFastError for values out of range."""

    steps: int
    batch_size: int
    seq_len: int
    learning_rate: float
    full_learning_rate: float
    scaling: str = "inverse"
    dtype: str = "fp32"
    target_modules: str | tuple[str, ...] = "all-linear"
    lora_dropout: float = 0.0
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("seq_len", 2), ("gradient_accumulation", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise LoraFastError(f"{name}={value!r}; expected a whole number of at least {least}")
        for name in ("learning_rate", "full_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise LoraFastError(f"{name}={getattr(self, name)!r}; expected a positive number")
        if self.scaling not in SCALINGS:
            raise LoraFastError(f"scaling={self.scaling!r}; expected one of {', '.join(SCALINGS)}")
        if self.dtype not in DTYPES:
            raise LoraFastError(f"dtype={self.dtype!r}; expected one of {', '.join(DTYPES)}")
        self.lora_config(1)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation * self.seq_len

    def lora_config(self, rank: int) -> LoraConfig:
        alpha, use_rslora, _ = SCALINGS[self.scaling]
        return LoraConfig(
            r=rank,
            lora_alpha=alpha(rank),
            use_rslora=use_rslora,
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules,
        )

    def to_dict(self) -> dict:
        return {**asdict(self), "tokens_per_step": self.tokens_per_step, "optimizer": "AdamW", "warm_up": WARM_UP}


@dataclass(frozen=True)
class Training:
    """What one training gave. loss: on the held-out text after it, in nats a token. train, evaluation: (step, loss);
    the first evaluation is before training, a training loss the mean since the one before it. trained: number of
    trained parameters."""

    rank: Rank
    seed: int
    loss: float
    trained: int
    train: tuple[tuple[int, float], ...]
    evaluation: tuple[tuple[int, float], ...]

    def to_dict(self) -> dict:
        return asdict(self)


def train_rank(
    source: ModelSource,
    rank: Rank,
    seed: int,
    recipe: Recipe,
    rows: Tensor,
    held_out: Tensor,
    *,
    device: str,
    adapter: Path | None = None,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
    report: Report | None = None,
) -> Training:
    """Train LoRA of this rank, or all parameters for "full", on rows (count, seq_len) of token ids, and evaluate on
    held_out.

    A fresh model each time. adapter: folder for the trained adapter. on_step is told of every step, report of every
    evaluation after the first; what it raises ends the training."""
    wide = rank == FULL and recipe.dtype != "fp32"
    model = models.build(source, device=device, dtype=torch.float32 if wide else DTYPES[recipe.dtype])
    torch.manual_seed(seed)
    if rank == FULL:
        model.requires_grad_(True)
    else:
        apply_lora(model, recipe.lora_config(rank))
    autocast = recipe.dtype if wide or recipe.dtype == "fp16" else None
    rate = recipe.full_learning_rate if rank == FULL else recipe.learning_rate
    curves = fit(model, rows, held_out, recipe, rate, seed, device, autocast, on_step, report)
    if adapter is not None and rank != FULL:
        save_adapter(model, adapter)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Training(rank, seed, curves[1][-1][1], trained, *curves)


def fit(
    model: nn.Module,
    rows: Tensor,
    held_out: Tensor | None,
    recipe: Recipe,
    rate: float,
    seed: int,
    device: str,
    autocast: str | None = None,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
    report: Report | None = None,
) -> tuple[tuple[tuple[int, float], ...], tuple[tuple[int, float], ...]]:
    """Trains what of the model has gradients, by Hugging Face's Trainer; returns its curves, (step, training loss) and
    (step, loss on held_out)."""
    from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

    train: list[tuple[int, float]] = []
    evaluation: list[tuple[int, float]] = []

    class Curves(TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            on_step(state.global_step, recipe.steps)

        def on_log(self, args, state, control, logs=None, **rest):
            if "loss" in logs:
                train.append((state.global_step, float(logs["loss"])))
            if "eval_loss" in logs:
                evaluation.append((state.global_step, float(logs["eval_loss"])))
                if report is not None and state.global_step:
                    report(state.global_step, float(logs["eval_loss"]))

    with tempfile.TemporaryDirectory(prefix="lora-fast-") as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch_size,
            per_device_eval_batch_size=recipe.batch_size,
            gradient_accumulation_steps=recipe.gradient_accumulation,
            **_checkpointing(TrainingArguments) if recipe.gradient_checkpointing else {},
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, round(WARM_UP * recipe.steps)),
            weight_decay=0.0,
            max_grad_norm=1.0,
            seed=seed,
            data_seed=seed,
            bf16=autocast == "bf16",
            fp16=autocast == "fp16",
            use_cpu=device == "cpu",
            logging_steps=max(1, recipe.steps // LOSSES),
            logging_nan_inf_filter=False,  # the default shows the last good loss instead
            eval_strategy="no" if held_out is None else "steps",
            eval_steps=max(1, recipe.steps // EVALUATIONS),
            eval_on_start=held_out is not None,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            log_level="error",
            dataloader_pin_memory=device != "cpu",
            remove_unused_columns=False,
        )
        if device != "cpu":
            arguments._n_gpu = 1  # else Trainer spreads a batch over every GPU that it sees, which changes the batch
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=_Rows(rows),
            eval_dataset=None if held_out is None else _Rows(held_out),
            data_collator=default_data_collator,
            callbacks=[Curves()],
        )
        from transformers.trainer_callback import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if held_out is not None and evaluation[-1][0] != recipe.steps:
            trainer.evaluate()
    return tuple(train), tuple(evaluation)


def _checkpointing(arguments: type) -> dict:
    """Trainer's settings for recomputing layers in backward, which newer versions call by another name."""
    name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(arguments, n))
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


class _Rows(torch.utils.data.Dataset):
    """Rows of token ids that are their own labels."""

    def __init__(self, rows: Tensor):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}
