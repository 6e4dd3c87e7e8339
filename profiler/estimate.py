"""What every rank and full fine-tuning would need, predicted without weights and without a GPU: bytes, FLOPs, what
fits, and the least time on a GPU that is named."""

import json
import math
import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from torch import nn

from lora_fast import LoraFastError, apply_lora
from lora_fast.injection import lora_layers
from lora_fast.profiler.crossover import crossovers, ranks_of_shares
from lora_fast.profiler.fits import Peaks
from lora_fast.profiler.html import write_results
from lora_fast.profiler.memory import MiB, in_MiB
from lora_fast.profiler.models import (
    ModelSource,
    build,
    counts,
    max_positions,
    note_on_class,
    resolve,
    resolve_shapes,
)
from lora_fast.profiler.predict import Prediction, trace
from lora_fast.profiler.profile import Arm, Profile, add_projection
from lora_fast.profiler.quantization import note_on
from lora_fast.profiler.ranks import auto_ranks, parameters_per_rank, parse_ranks, smallest_side, too_large
from lora_fast.profiler.roofline import CHIPS, Chip, chip_named
from lora_fast.profiler.runs import RunFolder, environment
from lora_fast.profiler.workload import FULL, LORA, PEFT, Workload, check_peft, parse_modules, parse_parameters

GiB = 2**30
# Tokens in a sequence, or as many as the model allows.
SEQ_LEN = 2048
# What a GPU's memory holds besides PyTorch's tensors: the CUDA context, cuBLAS's workspaces, and what the allocator
# can't use between blocks. An allowance, not a measurement of this machine.
RESERVE_GiB = 1.0


def estimate_memory(
    model: str | nn.Module | object,
    ranks: str | int | Sequence[int] = "auto",
    *,
    batch_size: int = 1,
    seq_len: int | None = None,
    dtype: str = "bf16",
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    target_parameters: str | Sequence[str] | None = None,
    use_dora: bool = False,
    adapter_dtype: str = "fp32",
    lora_dropout: float = 0.0,
    gradient_accumulation: int = 1,
    gradient_checkpointing: bool = False,
    optimizer: str = "adamw",
    foreach: bool | None = None,
    attn_implementation: str | None = None,
    quantize: str | None = None,
    device: str = "cuda",
    memory_GiB: float | None = None,
    gpu: str | None = None,
    price_per_hour: float | None = None,
    compare_peft: bool = False,
    shards: int = 1,
    whole: bool = False,
    out: str | Path | None = None,
    progress: Callable[[str, int, int, str], None] = lambda stage, done, total, text: None,
) -> Profile:
    """Predict the peak memory and the FLOPs of a training step at every rank and with everything trained.

    model: a built-in shape, a config.json, a folder, a Hugging Face id in the local cache, a Transformers config, or a
    model, of which only the config is looked at. seq_len: None is SEQ_LEN, or what the model allows. device: whose
    allocator and defaults are meant, "cuda" or "cpu". memory_GiB: memory of one GPU; every arm then says whether it
    fits beside RESERVE_GiB, and the largest batch and length that do; workload["largest_rank"] is the largest rank that
    does, up to "rank_limit", the largest min(N, K).
    gpu: one of roofline.CHIPS by name, such as "H100": memory_GiB is then its memory unless given, and the least time
    of every arm's step on it is projected (not for shards, whose times the network decides, nor for adapters on stacked
    experts). price_per_hour: US dollars. compare_peft: PEFT's LoRA beside ours at every rank.
    shards: GPUs that FSDP2 spreads weights, adapters, gradients and optimizer states over, layer by layer; what each
    also holds of gathered layers and of gradients not yet shared out is the category "gathered"
    (profiler/sharding.py). whole: trace every layer even where all are alike.
    out: a new folder for run.json, arms.jsonl, rank_cost.png and report.html.
    The other arguments are those of `profile_ranks`.
    Returns a Profile without measured times: peak_MiB, by_category, phase_peaks_MiB, forward_flops, backward_flops,
    fits, projected_ms, projected_ratio, projected_tokens_per_s. Raises LoraFastError for wrong input."""
    wanted = parse_ranks(ranks)
    chip = None if gpu is None else _chip(gpu)
    if chip and memory_GiB is None:
        memory_GiB = float(chip.memory_GB)  # as makers name their GPUs
    if memory_GiB is not None and not RESERVE_GiB < memory_GiB < math.inf:
        taken = f"the {RESERVE_GiB:g} GiB that the CUDA context and fragmentation take"
        raise LoraFastError(f"memory_GiB={memory_GiB!r}; expected more than {taken}")
    if not isinstance(shards, int) or shards < 1:
        raise LoraFastError(f"shards={shards!r}; expected a whole number of at least 1")
    if device not in ("cuda", "cpu"):
        raise LoraFastError(f"device={device!r}; an estimate is for cuda or cpu")
    if chip and device == "cpu":
        raise LoraFastError(f"gpu={gpu!r} with device='cpu'; leave out one")
    check_peft(compare_peft)
    if shards > 1 and quantize:
        raise LoraFastError("how FSDP2 spreads quantized weights is not predicted; leave out shards or quantize")
    folder = None if out is None else RunFolder(out)
    workload = Workload(
        batch_size=batch_size,
        seq_len=SEQ_LEN if seq_len is None else seq_len,
        dtype=dtype,
        target_modules=parse_modules(target_modules),
        exclude_modules=None if exclude_modules is None else parse_modules(exclude_modules, "exclude_modules"),
        target_parameters=parse_parameters(target_parameters),
        use_dora=use_dora,
        device=device,
        seed=0,
        adapter_dtype=adapter_dtype,
        lora_dropout=lora_dropout,
        gradient_accumulation=gradient_accumulation,
        gradient_checkpointing=gradient_checkpointing,
        optimizer=optimizer,
        foreach=foreach,
        attn_implementation=attn_implementation,
        quantize=quantize,
    )
    with ExitStack() as stack:
        source = _source(model, stack)
        subject = build(source, device="meta", dtype=workload.torch_dtype, attn_implementation=attn_implementation)
        if seq_len is None:
            workload = replace(workload, seq_len=min(SEQ_LEN, max_positions(subject) or SEQ_LEN))
        replace(workload, device="cpu").batch(subject)  # says now that the length does not fit the model
        total = sum(parameter.numel() for parameter in subject.parameters())
        note = note_on(subject, quantize, dtype)
        apply_lora(subject, workload.lora_config(1), adapter_name="r1")
        named = list(lora_layers(subject).items())
        targets = [module for _, module in named]
        per_rank = parameters_per_rank(targets)
        if wanted is None:
            wanted = auto_ranks(subject, targets, per_rank)

        kinds = [(kind, rank) for kind in ([LORA, PEFT] if compare_peft else [LORA]) for rank in wanted]
        kinds.append((FULL, None))
        arms, steps, predictions = [], [], []
        for number, (kind, rank) in enumerate(kinds):
            progress("estimate", number, len(kinds), Arm(kind, rank, 0, 0.0).name)
            steps.append(trace(source, workload, rank, peft=kind == PEFT, whole=whole, shards=shards))
            predictions.append(found := steps[-1].extended())
            arms.append(Arm(kind, rank, found.trainable, found.trainable / found.parameters))
        full = predictions[-1]
        for arm, found in zip(arms, predictions):
            _fill(arm, found, full)
        projected = chip is not None and shards == 1 and not workload.target_parameters
        if projected:
            add_projection(arms, [step.seconds(chip) for step in steps], workload.tokens)
        rank_limit = max(min(module.weight.shape[-2:]) for module in targets)
        largest_rank = None
        if memory_GiB is not None:
            room = int((memory_GiB - RESERVE_GiB) * GiB)
            how = {"longest": max_positions(subject), "whole": whole, "shards": shards}
            ours = {arm.rank: step for arm, step in zip(arms, steps) if arm.kind != PEFT}
            pefts = {arm.rank: step for arm, step in zip(arms, steps) if arm.kind == PEFT}
            peaks = Peaks(source, workload, ours, **how)
            peaks_of_pefts = Peaks(source, workload, pefts, peft=True, **how)
            for number, arm in enumerate(arms):
                progress("fits", number, len(arms), arm.name)
                arm.fits = (peaks_of_pefts if arm.kind == PEFT else peaks).fits(arm.rank, room)
            largest_rank = peaks.largest_rank(room, rank_limit)
            progress("fits", len(arms), len(arms), "done")
    progress("estimate", len(arms), len(arms), "done")
    described = {
        "method": "estimated",
        "model": source.name,
        "weights": "none",
        "parameters": total,
        **workload.to_dict(),
        "attn_implementation": getattr(subject.config, "_attn_implementation", None),
        "memory_GiB": memory_GiB,
        "reserve_GiB": None if memory_GiB is None else RESERVE_GiB,
        "projected_on": chip._asdict() if projected else None,
        "price_per_hour": price_per_hour,
        "launches": steps[-1].launches() if projected else None,
        "largest_rank": largest_rank,
        "rank_limit": rank_limit,
        "shards": shards,
        "traced_layers": list(full.traced_layers),
        "rank_of_share": ranks_of_shares(total, per_rank),
        "smallest_side": smallest_side(targets),
        **counts(subject, targets),
    }
    notes = too_large(wanted, named) + note + note_on_class(subject)
    if chip and not projected:
        why = "several GPUs wait for their network" if shards > 1 else "how tokens choose experts is not in shapes"
        notes.append(f"no time is projected: {why}")
    profile = Profile(environment("cpu"), described, arms, None, crossovers(arms, seed=0), notes)
    if folder:
        profile.folder = folder.path
        write_results(folder, profile)
    return profile


def _source(model, stack: ExitStack) -> ModelSource:
    if isinstance(model, (str, Path)):
        return resolve_shapes(str(model))
    config = getattr(model, "config", model)
    if not hasattr(config, "to_json_string"):
        raise LoraFastError(
            f"model is a {type(model).__name__}; expected a name, a path, a Transformers config or a model with one"
        )
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lora-fast-")))
    fields = json.loads(config.to_json_string(use_diff=False))
    (folder / "config.json").write_text(json.dumps(fields))
    return replace(resolve(str(folder / "config.json")), name=type(model).__name__)


def parse_gpu(text: str) -> dict[str, float | str]:
    """--gpu: "24GB", "80 GiB", "24" → {"memory_GiB": 24.0}, as makers name their GPUs (24 GB on the box are 24 GiB in
    the chip); anything else → {"gpu": it}."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:gi?b?)?\s*", text, re.IGNORECASE)
    if match and float(match[1]) > 0:
        return {"memory_GiB": float(match[1])}
    return {"gpu": _chip(text).name}


def _chip(name: str) -> Chip:
    if (chip := chip_named(name)) is None:
        names = ", ".join(chip.name for chip in CHIPS)
        raise LoraFastError(f"gpu={name!r}; expected the memory of one GPU, such as 24GB, or one of {names}")
    return chip


def _fill(arm: Arm, found: Prediction, full: Prediction) -> None:
    arm.peak_MiB, arm.peak_phase = found.peak / MiB, found.peak_phase
    arm.by_category = in_MiB(found.by_category)
    arm.phase_categories_MiB = {phase: in_MiB(held) for phase, held in found.phases.items()}
    arm.phase_peaks_MiB = {phase: sum(held.values()) for phase, held in arm.phase_categories_MiB.items()}
    arm.memory_ratio = found.peak / full.peak
    arm.forward_flops, arm.backward_flops = found.forward_flops, found.backward_flops
    arm.flops_ratio = found.flops / full.flops
