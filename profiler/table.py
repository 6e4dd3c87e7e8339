"""A Profile for people on a terminal: one row per arm, the noise floor in the caption, a sentence per crossover."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_fast.profiler.crossover import COSTS, shares_sentence
from lora_fast.profiler.profile import Arm, Profile

# The whole table takes 118 columns; narrower, columns go that follow from others, or can be read in run.json.
WIDE, MIDDLE = 118, 92


def print_profile(profile: Profile, console: Console) -> None:
    """The table with its title and caption, then crossovers and notes. Plain text where the console is no terminal."""
    console.print(_table(profile, console))
    for text in sentences(profile):
        console.print(Text(text), soft_wrap=True)


def sentences(profile: Profile) -> list[str]:
    """The crossovers, then what else the reader has to know."""
    lines = crossover_sentences(profile)
    lines += [f"{arm.name}: {_reason(arm)}" for arm in profile.arms if arm.error]
    return lines + [f"Note: {note}" for note in profile.notes]


def crossover_sentences(profile: Profile) -> list[str]:
    """One for each cost that the profile knows of, then where trained parameters become many."""
    known = [cost for cost in COSTS if cost in profile.crossover and not (cost == "time" and profile.estimated)]
    lines = [f"Crossover in {profile.crossover[cost].sentence(COSTS[cost])}" for cost in known]
    if "rank_of_share" in profile.workload:
        lines.append(shares_sentence(profile.workload["rank_of_share"], profile.arms))
    return lines


def _reason(arm: Arm) -> str:
    """The error; for memory that ran out, instead of the allocator's own words, what it was asked for last."""
    if arm.status == "oom" and arm.requested_MiB is not None:
        return f"out of memory, at an allocation of {arm.requested_MiB:,.1f} MiB"
    return arm.error


def title(profile: Profile) -> str:
    work, machine = profile.workload, profile.environment
    processor = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, {machine['threads']} threads"
    return (
        f"{work['model']} ({si(work['parameters'])} parameters), {work['dtype']}, batch {work['batch_size']} × "
        f"{work['seq_len']} tokens, {_targets(work)}, AdamW\n{processor}, torch {machine['torch']}"
    )


def caption(profile: Profile) -> str:
    """How the numbers were made and how far two equal arms differed."""
    lines = [f"Medians of {profile.workload['rounds']} randomized rounds; [ ] is the 95% interval of the paired ratio."]
    if profile.aa:
        low, high = profile.aa["ci"]
        lines.append(
            f"Noise floor ±{profile.aa['noise_floor']:.1%}: full against a second copy of itself gave "
            f"{profile.aa['ratio']:.3f} [{low:.3f}, {high:.3f}]."
        )
    else:
        lines.append("Noise floor not measured: there is no second copy of full fine-tuning to compare with.")
    return "\n".join(lines)


def si(value: float) -> str:
    """A count with three digits: 18.5k, 5.00M, 1.24B."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:
            scaled = value / limit
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{suffix}"
    return f"{value:.0f}"


def _targets(work: dict) -> str:
    """all-linear, or q_proj+v_proj, or all-linear except lm_head."""
    shown = [
        value if isinstance(value, str) else "+".join(value)
        for value in (work["target_modules"], work.get("exclude_modules"))
        if value
    ]
    return " except ".join(shown)


def _table(profile: Profile, console: Console) -> Table:
    wide, middle = console.width >= WIDE, console.width >= MIDDLE
    table = Table(
        title=title(profile),
        caption=caption(profile),
        box=box.ROUNDED if console.is_terminal else box.SIMPLE,
        title_style="bold",
        caption_justify="left",
        title_justify="left",
        show_edge=console.is_terminal,
    )
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("trained", justify="right", no_wrap=True)
    if wide:
        table.add_column("share", justify="right", no_wrap=True)
    table.add_column("step ms", justify="right", no_wrap=True)
    if middle:
        table.add_column("fwd / bwd / opt ms", justify="right", no_wrap=True)
    table.add_column("tokens/s", justify="right", no_wrap=True)
    table.add_column("time vs full", justify="right", no_wrap=True)
    cpu = wide and any(arm.cpu_ratio is not None for arm in profile.arms)
    if cpu:
        table.add_column("CPU", justify="right", no_wrap=True)
    table.add_column("peak MiB", justify="right", no_wrap=True)
    if wide:
        table.add_column("vs full", justify="right", no_wrap=True)
    for arm in profile.arms:
        cells = [arm.name.removeprefix("r"), si(arm.trainable)]
        if wide:
            cells.append(f"{arm.trainable_share:.2%}")
        cells.append(_number(arm.step_ms))
        if middle:
            cells.append(_phases(arm))
        cells += ["–" if arm.tokens_per_s is None else f"{arm.tokens_per_s:,.0f}", _ratio(arm)]
        if cpu:
            cells.append("1" if arm.kind == "full" else "–" if arm.cpu_ratio is None else f"{arm.cpu_ratio:.2f}")
        cells.append(_peak(arm))
        if wide:
            cells.append("–" if arm.memory_ratio is None else f"{arm.memory_ratio:.2f}")
        table.add_row(*cells, style=_style(arm), end_section=arm is profile.arms[-2])
    return table


def print_estimate(profile: Profile, console: Console) -> None:
    """What was predicted: a row per arm, then crossovers and what the reader has to know."""
    work = profile.workload
    wide = console.width >= WIDE
    fitted = work["memory_GiB"] is not None
    table = Table(
        title=f"{work['model']} ({si(work['parameters'])} parameters), {work['dtype']}, adapters in "
        f"{work['adapter_dtype']}, batch {work['batch_size']} × {work['seq_len']} tokens, {_targets(work)}\n"
        f"{_settings(work)}",
        caption=_estimate_caption(work),
        box=box.ROUNDED if console.is_terminal else box.SIMPLE,
        title_style="bold",
        caption_justify="left",
        title_justify="left",
        show_edge=console.is_terminal,
        collapse_padding=True,
    )
    headers = ["rank", "trained", "share", "peak\nGiB", "vs\nfull", "weights", "adapters", "grads", "states"]
    headers += ["activ.", "temp."] if wide else []
    headers += ["FLOPs", "fits", "max\nbatch", "max\nlength"] if fitted else ["FLOPs vs full"]
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for arm in profile.arms:
        held = {category: size / 1024 for category, size in arm.by_category.items()}
        cells = [arm.name.removeprefix("r"), si(arm.trainable), f"{arm.trainable_share:.2%}"]
        cells += [f"{arm.peak_MiB / 1024:.2f}", f"{arm.memory_ratio:.2f}"]
        cells += [f"{held[c]:.2f}" for c in ("weights", "adapters", "gradients", "optimizer")]
        if wide:
            cells += [f"{held['activations']:.2f}", f"{held['temporaries']:.2f}"]
        cells.append(f"{arm.flops_ratio:.3f}")
        if fitted:
            cells.append("yes" if arm.fits["fits"] else "no")
            cells += [str(arm.fits[name] or "–") for name in ("largest_batch_size", "largest_seq_len")]
        style = "bold" if arm.kind == "full" else "" if arm.fits is None or arm.fits["fits"] else "red"
        table.add_row(*cells, style=style, end_section=arm is profile.arms[-2])
    console.print(table)
    for text in crossover_sentences(profile):
        console.print(Text(text), soft_wrap=True)


def _settings(work: dict) -> str:
    parts = [f"AdamW{' foreach' if work['foreach'] else ''}"]
    if work["gradient_checkpointing"]:
        parts.append("checkpointing")
    if work["gradient_accumulation"] > 1:
        parts.append(f"{work['gradient_accumulation']} batches a step")
    if work["lora_dropout"]:
        parts.append(f"dropout {work['lora_dropout']}")
    if work["shards"] > 1:
        parts.append(f"FSDP over {work['shards']} GPUs, per GPU")
    return ", ".join(parts)


def _estimate_caption(work: dict) -> str:
    lines = [
        "Predicted from shapes: GiB at the step's peak, without CUDA context and fragmentation; FLOPs against full."
    ]
    if work["memory_GiB"] is not None:
        lines.append(
            f"fits: into {work['memory_GiB']:g} GiB less {work['reserve_GiB']:g} for those; max: the largest batch "
            "of this length, and the largest length (in steps of 64) of this batch."
        )
    return "\n".join(lines)


def _style(arm: Arm) -> str:
    if arm.status != "ok":
        return "red"
    return "bold" if arm.kind == "full" else ""


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _phases(arm: Arm) -> str:
    if arm.step_ms is None:
        return "–"
    return " / ".join(_number(value) for value in (arm.forward_ms, arm.backward_ms, arm.optimizer_ms))


def _ratio(arm: Arm) -> str:
    if arm.step_ms is None:
        return {"oom": "out of memory", "failed": "failed"}.get(arm.status, "not timed")
    if arm.kind == "full":
        return "1"
    if arm.ratio_to_full is None:
        return "–"
    low, high = arm.ratio_ci
    return f"{arm.ratio_to_full:.2f} [{low:.2f}, {high:.2f}]"


def _peak(arm: Arm) -> str:
    if arm.peak_MiB is not None:
        return _number(arm.peak_MiB)
    return "OOM" if arm.status == "oom" else "–"
