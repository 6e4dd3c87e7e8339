"""A Profile for people on a terminal: one row per arm, the noise floor in the caption, a sentence per crossover."""

import textwrap
from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_fast.profiler.advice import advise
from lora_fast.profiler.crossover import COSTS, shares_sentence
from lora_fast.profiler.price import usd_per_million_tokens
from lora_fast.profiler.profile import Arm, Profile

# An estimate's whole table takes so many columns; narrower, two go.
WIDE = 118


def print_profile(profile: Profile, console: Console) -> None:
    """The table with its title and caption, then crossovers and notes. Plain text where the console is no terminal."""
    console.print(_table(profile, console))
    _print_sentences(profile, console)


def _print_sentences(profile: Profile, console: Console) -> None:
    for text in sentences(profile):
        lines = textwrap.fill(text, console.width, subsequent_indent="  ", break_on_hyphens=False)
        console.print(Text(lines), soft_wrap=True)


def sentences(profile: Profile) -> list[str]:
    """The crossovers, why costs are as they are, then what else the reader has to know."""
    lines = crossover_sentences(profile)
    lines += [f"Why: {text}" for text in advise(profile)]
    lines += [f"{arm.name}: {reason(arm)}" for arm in profile.arms if arm.error]
    return lines + [f"Note: {note}" for note in profile.notes]


def crossover_sentences(profile: Profile) -> list[str]:
    """One for each cost that the profile knows of, then where trained parameters become many."""
    known = [cost for cost in COSTS if cost in profile.crossover and not (cost == "time" and profile.estimated)]
    lines = [f"Crossover in {profile.crossover[cost].sentence(COSTS[cost])}" for cost in known]
    if "rank_of_share" in profile.workload:
        lines.append(shares_sentence(profile.workload["rank_of_share"], profile.arms))
    return lines


def reason(arm: Arm) -> str:
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
    table = Table(
        title=title(profile),
        caption=caption(profile),
        box=box.ROUNDED if console.is_terminal else box.SIMPLE,
        title_style="bold",
        caption_justify="left",
        title_justify="left",
        show_edge=console.is_terminal,
    )
    columns = _columns(profile, console.width)
    for header in columns:
        table.add_column(header, justify="right", no_wrap=True)
    for arm in profile.arms:
        cells = [cell(arm) for cell in columns.values()]
        table.add_row(*cells, style=_style(arm), end_section=arm is profile.arms[-2])
    return table


def live_table(profile: Profile) -> Table:
    """While arms are measured: those that have ended, and those to come."""
    table = Table(title=title(profile), box=box.ROUNDED, title_style="bold", title_justify="left")
    for header in ("rank", "trained", "share", "predicted MiB", "peak MiB", "step ms"):
        table.add_column(header, justify="right", no_wrap=True)
    for arm in profile.arms:
        bare = arm.name.removeprefix("r")
        cells = [bare, si(arm.trainable), f"{arm.trainable_share:.2%}", _number(arm.predicted_MiB)]
        waiting = arm.status == "ok" and arm.peak_MiB is None
        cells += ["…" if waiting else _peak(arm), "…" if arm.step_ms is None else _number(arm.step_ms)]
        table.add_row(*cells, style="dim" if waiting else _style(arm))
    return table


def _columns(profile: Profile, width: int) -> dict[str, Callable[[Arm], str]]:
    """Header → the arm's cell. As many as fit: columns of which no arm has a value are left out, then those that follow
    from others or that run.json has too."""

    def known(*fields: str) -> bool:
        return any(getattr(arm, field) is not None for arm in profile.arms for field in fields)

    price = profile.workload.get("price_per_hour")
    # Each with how soon it goes: the highest first, 0 never.
    every = [
        ("rank", 0, lambda arm: "full" if arm.kind == "full" else arm.name.removeprefix("r")),
        ("trained", 0, lambda arm: si(arm.trainable)),
        ("share", 5, lambda arm: f"{arm.trainable_share:.2%}"),
        ("step ms", 0, lambda arm: _number(arm.step_ms)),
        ("fwd / bwd / opt ms", 4, _phases),
        ("tokens/s", 1, lambda arm: "–" if arm.tokens_per_s is None else f"{arm.tokens_per_s:,.0f}"),
        ("time vs full", 0, _ratio),
        *([("CPU", 6, lambda arm: _share_of_full(arm, arm.cpu_ratio))] if known("cpu_ratio") else []),
        *([("FLOPs", 2, lambda arm: _share_of_full(arm, arm.flops_ratio))] if known("flops_ratio") else []),
        ("peak MiB", 0, _peak),
        *([("predicted", 2, _predicted)] if known("predicted_MiB") else []),
        ("vs full", 7, lambda arm: "–" if arm.memory_ratio is None else f"{arm.memory_ratio:.2f}"),
        *([("$/1M tok", 0, lambda arm: _price(arm, price))] if price is not None else []),
    ]
    left = list(every)
    while _width(left, profile.arms) > width and any(rank for _, rank, _ in left):
        left.remove(max(left, key=lambda column: column[1]))
    return {header: cell for header, _, cell in left}


def _width(columns: list[tuple], arms: list[Arm]) -> int:
    """Columns of text that a table of these takes, with its padding and, on a terminal, its lines."""
    return 1 + sum(3 + max(len(header), *(len(cell(arm)) for arm in arms)) for header, _, cell in columns)


def _share_of_full(arm: Arm, ratio: float | None) -> str:
    return "1" if arm.kind == "full" else "–" if ratio is None else f"{ratio:.2f}"


def _predicted(arm: Arm) -> str:
    """The predicted peak and, where there is a measured one, how far it is off."""
    if arm.predicted_MiB is None:
        return "–"
    off = "" if not arm.peak_MiB else f" {arm.predicted_MiB / arm.peak_MiB - 1:+.1%}"
    return _number(arm.predicted_MiB) + off


def _price(arm: Arm, usd_per_hour: float) -> str:
    cost = usd_per_million_tokens(arm, usd_per_hour)
    return "–" if cost is None else f"{cost:.3g}" if cost < 100 else f"{cost:,.0f}"


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
    _print_sentences(profile, console)


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
        return {"oom": "out of memory", "ok": "not timed"}.get(arm.status, arm.status)
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
