"""The sweep: every rank and full fine-tuning on one model, memory first and time second, and what follows from it."""

import contextlib
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lora_fast import LoraFastError, apply_lora, remove_lora
from lora_fast.backend import why_not_triton
from lora_fast.injection import lora_layers
from lora_fast.profiler import models
from lora_fast.profiler.crossover import crossovers, ranks_of_shares
from lora_fast.profiler.html import write_results
from lora_fast.profiler.intervals import MIN_ROUNDS
from lora_fast.profiler.memory import MALLOC, MiB, in_MiB
from lora_fast.profiler.predict import trace
from lora_fast.profiler.process import environment_of_children, run_in_child
from lora_fast.profiler.profile import Arm, Profile, add_projection
from lora_fast.profiler.quantization import note_on
from lora_fast.profiler.ranks import auto_ranks, parameters_per_rank, parse_ranks, smallest_side, too_large
from lora_fast.profiler.resume import UnderWay, finished
from lora_fast.profiler.roofline import chip_named
from lora_fast.profiler.rounds import STABLE, Record
from lora_fast.profiler.runs import RunFolder, default_folder, environment, resolve_device
from lora_fast.profiler.time_pass import (
    Rules,
    add_times,
    available_MiB,
    groups_of,
    time_groups,
    widest,
    with_times_so_far,
)
from lora_fast.profiler.workload import (
    DTYPES,
    FULL,
    LORA,
    PEFT,
    Workload,
    check_peft,
    describe,
    parse_modules,
    parse_parameters,
)

# A model, a batch and a length that each kind of machine works through in about two minutes, with ROUNDS or within
# BUDGET_S.
ROUNDS, BUDGET_S = 30, 90.0
# What a target for the intervals may take, where nothing else is said.
MAX_ROUNDS, BUDGET_AT_TARGET_S = 2000, 600.0
LAYER_ROUNDS = 30
# Longer than any step that is worth waiting for.
ARM_TIMEOUT_S = 1800.0
DEFAULTS = {
    "cpu": {"model": "llama-5m", "dtype": "fp32", "batch_size": 4, "seq_len": 256},
    "cuda": {"model": "llama-1b", "dtype": "bf16", "batch_size": 2, "seq_len": 1024},
}
AUTO = "auto"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Progress = Callable[[str, int, int, str], None]


def profile_ranks(
    model: str | nn.Module | None = None,
    ranks: str | int | Sequence[int] = "auto",
    *,
    batch_size: int | None = None,
    seq_len: int | None = None,
    dtype: str | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    target_parameters: str | Sequence[str] | None = None,
    use_dora: bool = False,
    steps: int | None = None,
    time_budget_s: float | None = None,
    target_ci: float | None = None,
    adapter_dtype: str = "fp32",
    lora_dropout: float = 0.0,
    gradient_accumulation: int = 1,
    gradient_checkpointing: bool = False,
    optimizer: str = "adamw",
    foreach: bool | None = None,
    attn_implementation: str | None = None,
    backend: str = "auto",
    quantize: str | None = None,
    compare_peft: bool = False,
    layers: bool = False,
    device: str = "auto",
    seed: int = 0,
    memory_limit_MiB: float | None = None,
    arm_timeout_s: float | None = ARM_TIMEOUT_S,
    out: str | Path | None = None,
    resume: bool = False,
    price_per_hour: float | None = None,
    progress: Progress = lambda stage, done, total, text: None,
    watch: Callable[[Profile], None] = lambda so_far: None,
) -> Profile:
    """Measure a training step at every rank and with all parameters trained.

    model: a built-in shape, a config.json, a folder with weights, a Hugging Face id, or a Transformers model. The last
    is not touched: copies of it are measured, in its dtype and on its device.
    ranks: as `--ranks`: "auto", "8,64", "4:1024:x2", or numbers.
    target_modules, exclude_modules: "q_proj,v_proj", names, or a regex over module paths; "all-linear" for the first.
    target_parameters: "experts.gate_up_proj,experts.down_proj", or names: as in LoraConfig.
    use_dora: adapters are DoRA.
    steps: timed rounds, of one step per arm; time_budget_s: stop timing after so many seconds (at least six rounds are
    timed); target_ci: stop once every ratio's interval is within ± that share of it (0.02: 2%), a rule on widths and
    never on ratios. Without all three, 30 rounds or 90 seconds; with target_ci alone, at most 10 minutes.
    adapter_dtype: of lora_A and lora_B: "fp32", "bf16", "fp16". gradient_accumulation: batches in a step of the
    optimizer. gradient_checkpointing: recompute decoder layers in backward. optimizer: of all arms, "adamw",
    "adafactor" or "sgd" (without momentum). foreach: its updates over lists of parameters; None: PyTorch's choice.
    attn_implementation: as Transformers takes it. backend: as `apply_lora` takes it.
    quantize: "nf4" or "fp4" packs the weights under adapters in 4 bits (bitsandbytes, as in QLoRA); full fine-tuning
    keeps them in `dtype`.
    compare_peft: PEFT's LoRA beside ours at every rank. layers: also time every distinct layer by itself.
    memory_limit_MiB: what each arm may take in the memory pass; one that needs more gets the status "oom".
    arm_timeout_s: what an arm's memory measurement, or one of its steps, may take; then its status is "timeout".
    resume: go on with the run in `out`, of the same arguments, if it has not ended.
    out: a new folder for run.json, arms.jsonl, rank_cost.png and report.html; "auto": runs/<model>-<date>-<time>.
    price_per_hour: US dollars for the machine, recorded with the run. progress is called with stage ("memory" or
    "time"), done, total, and what is at work; watch with the profile so far, once its folder is begun and whenever an
    arm or a round has ended.
    Without model and sizes, the defaults are those of the device (`DEFAULTS`).

    Raises LoraFastError for wrong input, before anything is written; NotWritten, which holds the profile, where the
    folder takes no more once all is measured."""
    wanted = parse_ranks(ranks)
    for name, value, unit in (
        ("time_budget_s", time_budget_s, "seconds"),
        ("memory_limit_MiB", memory_limit_MiB, "MiB"),
        ("arm_timeout_s", arm_timeout_s, "seconds"),
        ("target_ci", target_ci, "a ratio, such as 0.02 for 2%"),
    ):
        if value is not None and not 0 < value < math.inf:
            raise LoraFastError(f"{name}={value!r}; expected a positive number of {unit}")
    if steps is None:
        steps = ROUNDS if target_ci is None else MAX_ROUNDS
        if time_budget_s is None:
            time_budget_s = BUDGET_S if target_ci is None else BUDGET_AT_TARGET_S
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < MIN_ROUNDS:
        raise LoraFastError(
            f"steps={steps!r}; expected a whole number of at least {MIN_ROUNDS}, fewer carry no 95% interval"
        )
    check_peft(compare_peft)
    if layers and use_dora:
        raise LoraFastError("layers are timed with LoRA alone; leave out use_dora or layers")
    if layers and quantize:
        raise LoraFastError("layers are timed as they are in dtype, not quantized; leave out one of the two")
    if resume and out in (None, AUTO):
        raise LoraFastError("resume needs the folder of the run to go on with; give it as --out")
    folder = None if out in (None, AUTO) else RunFolder(out, resume)
    given = model if isinstance(model, nn.Module) else None
    if given is not None:
        models.check_module(given)
        parameter = next(given.parameters())
        device, dtype = str(parameter.device), _given_dtype(parameter.dtype, dtype)
    device = resolve_device(device)
    defaults = DEFAULTS[torch.device(device).type]
    workload = Workload(
        batch_size=defaults["batch_size"] if batch_size is None else batch_size,
        seq_len=defaults["seq_len"] if seq_len is None else seq_len,
        dtype=dtype or defaults["dtype"],
        target_modules=parse_modules(target_modules),
        exclude_modules=None if exclude_modules is None else parse_modules(exclude_modules, "exclude_modules"),
        target_parameters=parse_parameters(target_parameters),
        use_dora=use_dora,
        device=device,
        seed=seed,
        adapter_dtype=adapter_dtype,
        lora_dropout=lora_dropout,
        gradient_accumulation=gradient_accumulation,
        gradient_checkpointing=gradient_checkpointing,
        optimizer=optimizer,
        foreach=foreach,
        attn_implementation=attn_implementation,
        backend=backend,
        quantize=quantize,
    )

    with contextlib.ExitStack() as stack:
        if given is None:
            source = models.resolve(defaults["model"] if model is None else str(model))
        else:
            file = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lora-fast-")), "model.pt")
            source = models.save_module(given, file)
        subject = models.build(
            source, device="meta", dtype=workload.torch_dtype, attn_implementation=attn_implementation
        )
        if out == AUTO:
            folder = RunFolder(default_folder(source.name))
        if seq_len is None and (longest := models.max_positions(subject)):
            workload = replace(workload, seq_len=min(workload.seq_len, longest))
        workload.batch(subject)  # says now, not after the memory pass, that the length does not fit the model
        total = sum(parameter.numel() for parameter in subject.parameters())
        targets, per_rank = _probe(subject, workload)
        adapted = [module for _, module in targets]
        if wanted is None:
            wanted = auto_ranks(subject, adapted, per_rank)
        notes = too_large(wanted, targets) + note_on(subject, quantize, workload.dtype)
        notes += models.note_on_class(subject) if source.kind != "module" else []

        trained = {r: workload.adapter_parameters(r, adapted) for r in wanted}
        arms = [
            Arm(kind, r, trained[r], trained[r] / (total + trained[r]))
            for kind in ([LORA, PEFT] if compare_peft else [LORA])
            for r in wanted
        ]
        arms.append(Arm(FULL, None, total, 1.0))
        described = {
            "model": source.name,
            "weights": source.weights,
            "parameters": total,
            **workload.to_dict(),
            "attn_implementation": getattr(subject.config, "_attn_implementation", None),
            "rounds_wanted": steps,
            "time_budget_s": time_budget_s,
            "target_ci": target_ci,
            "arm_timeout_s": arm_timeout_s,
            "memory_limit_MiB": memory_limit_MiB,
            "price_per_hour": price_per_hour,
            "omp_wait_policy": environment_of_children()["OMP_WAIT_POLICY"],
            "rank_of_share": ranks_of_shares(total, per_rank),
            "smallest_side": smallest_side(adapted),
            **models.counts(subject, adapted),
        }
        about = environment(device)

        under_way = None
        if folder:
            settings = {"arms": [arm.name for arm in arms], "layers": layers, **described}
            if resume and (ended := finished(folder.path, settings)):
                return ended
            under_way = UnderWay(folder, settings, about)
            records = folder.path
        else:
            records = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lora-fast-")))

        described["implementation"] = _implementation(workload, wanted)
        path = folder.path if folder else None

        def changed() -> None:
            watch(Profile(about, described, arms, None, {}, folder=path))

        if under_way:
            before = under_way.measured()
            arms = [before.get(arm.name, arm) for arm in arms]
        else:
            before = {}
        changed()
        notes += _predict(arms, source, workload, about["gpu"], progress)
        changed()
        _memory_pass(arms, set(before), source, workload, memory_limit_MiB, arm_timeout_s, folder, progress, changed)
        notes += _memory_ratios(arms)

        groups, reasons = (under_way.groups, under_way.reasons) if under_way else (None, {})
        if groups is None:
            groups, reasons = groups_of(arms, available_MiB(device))
            if under_way:
                under_way.set_groups(groups, reasons)
        rules = Rules(steps, time_budget_s, target_ci, arm_timeout_s)

        def step_times(record: Record) -> None:
            watch(Profile(about, described, with_times_so_far(arms, record), None, {}, folder=path))

        timed = time_groups(source, workload, groups, rules, records, partial(progress, "time"), step_times)
        progress("time", steps, steps, "done")
        aa = add_times(arms, timed, workload, rules)
        described |= _of_timing(arms, aa, timed)
        notes += _timing_notes(arms, described)
        rows = None
        if layers:
            changed()
            rows = _layers_pass(source, workload, wanted, progress, notes)

    for arm in arms:
        if arm.name in reasons and arm.error is None:
            arm.error = reasons[arm.name]
    _add_utilization(arms, described["product_tflops_s"])
    profile = Profile(about, described, arms, aa, crossovers(arms, seed), notes, path, rows)
    if folder:
        write_results(folder, profile)
        under_way.end()
    return profile


def _given_dtype(actual: torch.dtype, asked: str | None) -> str:
    name = _NAMES.get(actual)
    if name is None:
        raise LoraFastError(f"the model's dtype is {actual}; expected one of {', '.join(DTYPES)}")
    if asked is not None and asked != name:
        raise LoraFastError(f"dtype={asked!r}, but the model is in {name}; convert the model, or leave dtype out")
    return name


def _probe(model: nn.Module, workload: Workload) -> tuple[list[tuple[str, nn.Module]], int]:
    """What gets an adapter, by its dotted name, and how many parameters one more rank trains: Σ (K + N)."""
    apply_lora(model, workload.lora_config(1), adapter_name="r1")
    targets = list(lora_layers(model).items())
    remove_lora(model)
    return targets, parameters_per_rank(module for _, module in targets)


def _implementation(workload: Workload, ranks: Sequence[int]) -> str:
    """Which code `backend` comes to on this machine: Triton kernels, or PyTorch and why."""
    device, told = torch.device(workload.device), {}
    for rank in ranks:
        reason = why_not_triton(workload.backend, "lora_linear", device, workload.torch_dtype, rank)
        told.setdefault("Triton kernels" if reason is None else f"PyTorch: {reason}", []).append(f"r{rank}")
    return next(iter(told)) if len(told) == 1 else "; ".join(f"{', '.join(names)}: {of}" for of, names in told.items())


def _predict(arms: list[Arm], source, workload: Workload, gpu: dict | None, progress: Progress) -> list[str]:
    """Fill in what shapes predict, FLOPs, and times on a GPU whose peaks are known; returns a note where they can't. A
    measurement does without."""
    try:
        found = []
        for index, arm in enumerate(arms):
            progress("predict", index, len(arms), arm.name)
            found.append(trace(source, workload, arm.rank, peft=arm.kind == PEFT))
    except Exception as error:  # a model of one's own may do anything but run on tensors without values
        return [f"nothing is predicted: {describe(error)['error']}"]
    finally:
        progress("predict", len(arms), len(arms), "done")
    if gpu and (chip := chip_named(gpu["name"])):
        add_projection(arms, [step.seconds(chip) for step in found], workload.tokens)
    predictions = [step.extended() for step in found]
    full = predictions[-1]
    for arm, one in zip(arms, predictions, strict=True):
        arm.predicted_MiB = one.peak / MiB
        arm.predicted_by_category = in_MiB(one.by_category)
        arm.forward_flops, arm.backward_flops = one.forward_flops, one.backward_flops
        arm.flops_ratio = one.flops / full.flops if full.flops else None
    return []


def _add_utilization(arms: list[Arm], product_tflops_s: float | None) -> None:
    full = next(arm for arm in arms if arm.kind == "full")
    for arm in arms:
        if arm.step_ms is not None and arm.forward_flops is not None:
            # FLOPs per ms, over 10⁹, are 10¹² FLOPs per s.
            arm.executed_tflops_s = (arm.forward_flops + arm.backward_flops) / arm.step_ms / 1e9
            arm.full_equivalent_tflops_s = (full.forward_flops + full.backward_flops) / arm.step_ms / 1e9
            if product_tflops_s:
                arm.executed_utilization = arm.executed_tflops_s / product_tflops_s
                arm.full_equivalent_utilization = arm.full_equivalent_tflops_s / product_tflops_s


def _memory_pass(arms, known, source, workload, limit, timeout_s, folder, progress, changed) -> None:
    """One child per arm; arms.jsonl is rewritten after each, so that a killed run keeps what was measured."""
    for index, arm in enumerate(arms):
        if arm.name in known:
            continue
        progress("memory", index, len(arms), arm.name)
        asked = {"kind": arm.kind, "rank": arm.rank, "memory_limit_MiB": limit, "arm_timeout_s": timeout_s}
        result = run_in_child("memory", source, workload, asked, environment=MALLOC)
        arm.status, arm.error, arm.requested_MiB = result["status"], result.get("error"), result.get("requested_MiB")
        arm.peak_MiB, arm.peak_phase = result.get("peak_MiB"), result.get("peak_phase")
        arm.by_category, arm.phase_peaks_MiB = result.get("by_category_MiB"), result.get("phase_peaks_MiB")
        arm.phase_categories_MiB = result.get("phase_categories_MiB")
        arm.resident_peak_MiB, arm.after_step_MiB = result.get("resident_peak_MiB"), result.get("after_step_MiB")
        known.add(arm.name)
        if folder:
            folder.write_arms([done.to_dict() for done in arms if done.name in known])
        changed()
    progress("memory", len(arms), len(arms), "done")


def _memory_ratios(arms: Sequence[Arm]) -> list[str]:
    """Fill in peaks over full fine-tuning's: where that ran out of memory, as it will on the machines that need LoRA
    most, over the one that shapes predict; returns a note then."""
    full = arms[-1]
    if full.peak_MiB is not None:
        for arm in arms:
            if arm.peak_MiB is not None:
                arm.memory_ratio = arm.peak_MiB / full.peak_MiB
        return []
    if full.predicted_MiB is None or all(arm.peak_MiB is None for arm in arms):
        return []  # with nothing measured at all, predictions are estimate's to give
    for arm in arms[:-1]:
        arm.memory_ratio = (arm.predicted_MiB if arm.peak_MiB is None else arm.peak_MiB) / full.predicted_MiB
    return [
        f"full fine-tuning's peak was not measured: memory is held against the {full.predicted_MiB:,.1f} MiB that "
        "shapes predict of it, and what ran out of memory too is held as predicted"
    ]


def _of_timing(arms: list[Arm], aa: dict | None, timed: list[dict]) -> dict:
    """What the workload's description says of the time pass."""
    warm_ups = [one for group in timed for one in group["warm_ups"]]
    stops = {group["stopped"] for group in timed if group["stopped"]}
    rates = [group["product_tflops_s"] for group in timed if group["product_tflops_s"]]
    return {
        "rounds": max((len(arm.samples_ms) for arm in arms), default=0),
        "warm_up_rounds": max((one["rounds"] for one in warm_ups), default=0),
        "warm_up_stable": all(one["stable"] for one in warm_ups),
        "stopped_by": stops.pop() if len(stops) == 1 else ", ".join(sorted(stops)) or None,
        "widest_half_width": widest(arms, aa),
        "product_tflops_s": statistics.median(rates) if rates else None,
    }


def _timing_notes(arms: list[Arm], described: dict) -> list[str]:
    notes = []
    via = sorted({arm.ratio_via for arm in arms if arm.ratio_via})
    if via:
        names = ", ".join(arm.name for arm in arms if arm.ratio_via)
        notes.append(
            f"{names}: not beside full fine-tuning, for lack of memory; each was timed beside {via[0]} in one process, "
            f"and full beside {via[0]} in another, in turns A B B A. The ratios are quotients of the two."
        )
    wanted, reached = described["target_ci"], described["widest_half_width"]
    if wanted is not None and reached is not None and reached > wanted:
        ended = described["stopped_by"]
        notes.append(f"the widest interval is ±{reached:.1%}, not the ±{wanted:.1%} asked for: {ended} ended first")
    if described["rounds"] and not described["warm_up_stable"]:
        notes.append(
            f"steps were still changing by more than {STABLE:.0%} after {described['warm_up_rounds']} rounds of warm-up"
        )
    return notes


def _layers_pass(source, workload, ranks, progress, notes) -> list[dict]:
    """Rows of every distinct layer; none, and a note, where its process failed."""
    progress("layers", 0, 1, "loading")
    asked = {"ranks": list(ranks), "rounds": LAYER_ROUNDS}
    result = run_in_child("layers", source, workload, asked, progress=partial(progress, "layers"))
    if result["status"] != "ok":
        notes.append(f"layers were not timed: {result['error']}")
    return result.get("layers", [])
