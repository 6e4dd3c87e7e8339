"""A Profile as a table with a row per arm, and as sentences: crossovers, and why costs are as they are."""

import math
import textwrap
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_fast.profiler.advice import advise
from lora_fast.profiler.crossover import COSTS, shares_sentence
from lora_fast.profiler.layers_table import layers_table
from lora_fast.profiler.profile import Arm, Profile, usd_per_million_tokens

# Microseconds that PyTorch's host takes for a launch, about: a GPU whose launches are shorter waits for it.
HOST_US = 5.0


def print_profile(profile: Profile, console: Console) -> None:
    """The table with its title and caption, then crossovers and notes. Plain text where the console is no terminal."""
    console.print(_table(profile, console))
    for text in sentences(profile):
        lines = textwrap.fill(text, console.width, subsequent_indent="  ", break_on_hyphens=False)
        console.print(Text(lines), soft_wrap=True)
    if profile.layers:
        console.print(layers_table(profile))


def sentences(profile: Profile) -> list[str]:
    """The crossovers, why costs are as they are, then what else the reader has to know."""
    lines = crossover_sentences(profile)
    lines += [f"Why: {text}" for text in advise(profile)]
    lines += [f"{arm.name}: {reason(arm)}" for arm in profile.arms if arm.error]
    return lines + [f"Note: {note}" for note in profile.notes]


def crossover_sentences(profile: Profile) -> list[str]:
    """One for each cost that the profile knows of, then where trained parameters become many."""
    known = [cost for cost in COSTS if cost in profile.crossover and not (cost == "time" and profile.estimated)]
    lines = [f"Crossover in {profile.shown_crossover(cost).sentence(COSTS[cost])}" for cost in known]
    if "rank_of_share" in profile.workload:
        lines.append(shares_sentence(profile.workload["rank_of_share"], profile.arms))
    return lines


def reason(arm: Arm) -> str:
    """The error; for memory that ran out, instead of the allocator's own words, what it was asked for last."""
    if arm.status == "oom" and arm.requested_MiB is not None:
        return f"out of memory, at an allocation of {_allocation(arm.requested_MiB)}"
    return arm.error


def title(profile: Profile) -> str:
    work, machine = profile.workload, profile.environment
    adapters = work.get("adapter_dtype", "fp32")
    parts = [
        f"{work['model']} ({si(work['parameters'])} parameters)",
        work["dtype"] + (f" ({work['quantize']} under adapters)" if work.get("quantize") else ""),
        *([f"adapters in {adapters}"] if {adapters, work["dtype"]} != {"fp32"} else []),
        f"batch {work['batch_size']} × {work['seq_len']} tokens",
        _targets(work),
    ]
    if profile.estimated:
        return f"{', '.join(parts)}\n{_settings(work)}"
    processor = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, {machine['threads']} threads"
    return f"{', '.join(parts)}, {_settings(work)}\n{processor}, torch {machine['torch']}"


def caption(profile: Profile) -> str:
    """How the numbers were made and how far two equal arms differed."""
    if profile.estimated:
        return _estimate_caption(profile)
    if all(arm.step_ms is None for arm in profile.arms):
        return "Nothing was timed."
    lines = [f"Medians of {profile.workload['rounds']} randomized rounds; [ ] is the 95% interval of the paired ratio."]
    if profile.aa:
        low, high = profile.aa["ci"]
        lines.append(
            f"Noise floor ±{profile.aa['noise_floor']:.1%}: {profile.aa.get('of', 'full')} against a second copy of "
            f"itself gave "
            f"{profile.aa['ratio']:.3f} [{low:.3f}, {high:.3f}]."
        )
    else:
        lines.append("Noise floor not measured: no second copy of full fine-tuning or of a rank ran.")
    if profile.too_noisy:
        lines.append(f"The answer is hidden: {hidden(profile)}.")
    return "\n".join(lines)


def hidden(profile: Profile) -> str:
    """Of a profile that is too noisy."""
    return (
        f"noise floor too high: two equal arms differed by up to {profile.aa['noise_floor']:.1%}, and so near to "
        "full fine-tuning's are times that were to be told from it; quiet the machine, or raise --steps"
    )


def _allocation(MiB: float) -> str:
    """12.5 MiB; 3.1 KiB where a tenth of a MiB would be 0."""
    return f"{MiB:,.1f} MiB" if MiB >= 0.1 else f"{1024 * MiB:.1f} KiB"


def si(value: float) -> str:
    """A count with three digits: 18.5k, 5.00M, 1.24B."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:
            scaled = value / limit
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{suffix}"
    return f"{value:.0f}"


def _targets(work: dict) -> str:
    """all-linear, or q_proj+v_proj, or all-linear except lm_head, each perhaps and experts.down_proj, by DoRA."""
    shown = [
        value if isinstance(value, str) else "+".join(value)
        for value in (work["target_modules"], work.get("exclude_modules"))
        if value
    ]
    by = " by DoRA" if work.get("use_dora") else ""
    return " and ".join([" except ".join(shown), *(work.get("target_parameters") or ())]) + by


def _table(profile: Profile, console: Console) -> Table:
    table = Table(
        title=title(profile),
        caption=caption(profile),
        box=box.ROUNDED if console.is_terminal else box.SIMPLE,
        title_style="bold",
        caption_justify="left",
        title_justify="left",
        show_edge=console.is_terminal,
        collapse_padding=profile.estimated,  # an estimate has many narrow columns
    )
    shown = columns(profile, console.width)
    for column in shown:
        table.add_column(column.header, justify="right", no_wrap=True)
    for arm in profile.arms:
        cells = [column.cell(arm) for column in shown]
        table.add_row(*cells, style=_style(arm), end_section=arm is profile.arms[-2])
    return table


def live_table(profile: Profile) -> Table:
    """While arms are measured: those that have ended, and those to come."""
    table = Table(title=title(profile), box=box.ROUNDED, title_style="bold", title_justify="left")
    for header in ("rank", "trained", "share", "predicted MiB", "peak MiB", "step ms", "time vs full"):
        table.add_column(header, justify="right", no_wrap=True)
    for arm in profile.arms:
        bare = arm.name.removeprefix("r")
        cells = [bare, si(arm.trainable), f"{arm.trainable_share:.2%}", _number(arm.predicted_MiB)]
        waiting = arm.status == "ok" and arm.peak_MiB is None
        cells += ["…" if waiting else _peak(arm), "…" if arm.step_ms is None else _number(arm.step_ms)]
        cells.append("…" if arm.ratio_to_full is None else f"{arm.ratio_to_full:.2f}")
        table.add_row(*cells, style="dim" if waiting else _style(arm))
    return table


class Column(NamedTuple):
    """cell: what is shown of an arm; value: what it is sorted by, or None. goes: how soon the column is left out where
    there is no room for all, the highest first and 0 never."""

    header: str
    goes: int
    cell: Callable[[Arm], str]
    value: Callable[[Arm], float | None]


def columns(profile: Profile, width: float = math.inf) -> list[Column]:
    """As many as fit into `width` characters. Without a limit all of which an arm has a value."""
    left = _of_estimate(profile) if profile.estimated else _of_measurement(profile)
    padding = 2 if profile.estimated else 3  # collapsed, or not, and a line
    while 1 + _width(left, profile.arms, padding) > width and any(column.goes for column in left):
        left.remove(max(left, key=lambda column: column.goes))
    return left


def _of_measurement(profile: Profile) -> list[Column]:
    def known(field: str) -> bool:
        return any(getattr(arm, field) is not None for arm in profile.arms)

    price = profile.workload.get("price_per_hour")
    every = [
        *_of_the_adapter(share_goes=5),
        Column("step ms", 0, lambda arm: _number(arm.step_ms), lambda arm: arm.step_ms),
        Column("fwd / bwd / opt ms", 4, _phases, lambda arm: arm.forward_ms),
        Column("tokens/s", 1, lambda arm: _number(arm.tokens_per_s), lambda arm: arm.tokens_per_s),
        Column("time vs full", 0, _ratio, lambda arm: _to_full(arm, arm.ratio_to_full, arm.step_ms)),
    ]
    if known("cpu_ratio"):
        value = _relative("cpu_ratio", "step_ms")
        every.append(Column("CPU", 6, lambda arm: _two_digits(value(arm)), value))
    if known("flops_ratio"):
        flops = _relative("flops_ratio", "forward_flops")
        every.append(Column("FLOPs", 2, lambda arm: _two_digits(flops(arm)), flops))
    if known("projected_ratio"):
        projected = attrgetter("projected_ratio")
        every.append(Column("projected", 2, lambda arm: _two_digits(projected(arm)), projected))
    if known("executed_utilization"):
        unit, kind, show = "util.", "utilization", _percent
    else:  # the first versions timed no matrix product to hold them against
        unit, kind, show = "TFLOP/s", "tflops_s", _digits
    for header, field in ((unit, f"executed_{kind}"), (f"full-eq. {unit}", f"full_equivalent_{kind}")):
        if known(field):
            rate = attrgetter(field)
            every.append(Column(header, 8, lambda arm, rate=rate: show(rate(arm)), rate))
    every.append(Column("peak MiB", 0, _peak, lambda arm: arm.peak_MiB))
    if known("predicted_MiB"):
        every.append(Column("predicted", 3, _predicted, lambda arm: arm.predicted_MiB))
    memory = _relative("memory_ratio", "peak_MiB")
    every.append(Column("vs full", 7, lambda arm: _two_digits(memory(arm)), memory))
    if price is not None:
        cost = partial(usd_per_million_tokens, usd_per_hour=price)
        every.append(Column("$/1M tok", 0, lambda arm: _digits(cost(arm)), cost))
    return every


def _unit(profile: Profile) -> str:
    """Of an estimate's bytes: models that need a GPU are told in GiB."""
    return "GiB" if max(arm.peak_MiB for arm in profile.arms) >= 1024 else "MiB"


def _of_estimate(profile: Profile) -> list[Column]:
    unit = _unit(profile)

    def size(value: float) -> str:
        return f"{value / 1024:.2f}" if unit == "GiB" else _number(value)

    def held(header: str, category: str, goes: int) -> Column:
        return Column(header, goes, lambda arm: size(arm.by_category[category]), lambda arm: arm.by_category[category])

    fitted = profile.workload["memory_GiB"] is not None
    every = [
        *_of_the_adapter(share_goes=0),
        Column(f"peak\n{unit}", 0, lambda arm: size(arm.peak_MiB), lambda arm: arm.peak_MiB),
        Column("vs\nfull", 0, lambda arm: f"{arm.memory_ratio:.2f}", lambda arm: arm.memory_ratio),
        *(held("weights", "weights", 6), held("adapters", "adapters", 5), held("grads", "gradients", 3)),
        *(held("states", "optimizer", 4), held("activ.", "activations", 1), held("temp.", "temporaries", 2)),
        *([held("gathered", "gathered", 2)] if profile.workload.get("shards", 1) > 1 else ()),
        Column("FLOPs\nvs full", 0, lambda arm: f"{arm.flops_ratio:.3f}", lambda arm: arm.flops_ratio),
    ]
    if profile.full.projected_ms:
        projected = attrgetter("projected_ratio")
        every.append(Column("time\nvs full", 0, lambda arm: f"{projected(arm):.3f}", projected))
        tokens = attrgetter("projected_tokens_per_s")
        every.append(Column("tokens/s\nat most", 2, lambda arm: _number(tokens(arm)), tokens))
    if (price := profile.workload.get("price_per_hour")) is not None:
        cost = partial(usd_per_million_tokens, usd_per_hour=price)
        every.append(Column("$/1M tok\nat least", 0, lambda arm: _digits(cost(arm)), cost))
    if fitted:
        every.append(Column("fits", 0, lambda arm: "yes" if arm.fits["fits"] else "no", lambda arm: arm.fits["fits"]))
        for header, name in (("max\nbatch", "largest_batch_size"), ("max\nlength", "largest_seq_len")):
            every.append(
                Column(
                    header, 0, lambda arm, name=name: str(arm.fits[name] or "–"), lambda arm, name=name: arm.fits[name]
                )
            )
    return every


def _of_the_adapter(share_goes: int) -> list[Column]:
    return [
        Column("rank", 0, lambda arm: arm.name.removeprefix("r"), lambda arm: arm.rank),
        Column("trained", 0, lambda arm: si(arm.trainable), lambda arm: arm.trainable),
        Column("share", share_goes, lambda arm: f"{arm.trainable_share:.2%}", lambda arm: arm.trainable_share),
    ]


def _width(shown: list[Column], arms: list[Arm], padding: int) -> int:
    texts = [[*column.header.split("\n"), *(column.cell(arm) for arm in arms)] for column in shown]
    return sum(padding + max(map(len, column)) for column in texts)


def _to_full(arm: Arm, ratio: float | None, own: float | None) -> float | None:
    """The arm's ratio to full fine-tuning, which is 1 for full itself where it was measured."""
    return (None if own is None else 1.0) if arm.kind == "full" else ratio


def _relative(ratio: str, own: str) -> Callable[[Arm], float | None]:
    return lambda arm: _to_full(arm, getattr(arm, ratio), getattr(arm, own))


def _two_digits(value: float | None) -> str:
    return "–" if value is None else "1" if value == 1 else f"{value:.2f}"


def _digits(value: float | None) -> str:
    """Three significant ones."""
    return "–" if value is None else f"{value:#.3g}" if value < 100 else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _predicted(arm: Arm) -> str:
    """The predicted peak and, where there is a measured one, how far it is off."""
    if arm.predicted_MiB is None:
        return "–"
    off = "" if not arm.peak_MiB else f" {arm.predicted_MiB / arm.peak_MiB - 1:+.1%}"
    return _number(arm.predicted_MiB) + off


def _settings(work: dict) -> str:
    """The optimizer, and what was not left at its default."""
    parts = [f"{work['optimizer']}{' foreach' if work.get('foreach') else ''}"]
    if work.get("gradient_checkpointing"):
        parts.append("checkpointing")
    if work.get("gradient_accumulation", 1) > 1:
        parts.append(f"{work['gradient_accumulation']} batches a step")
    if work.get("lora_dropout"):
        parts.append(f"dropout {work['lora_dropout']:g}")
    if work.get("shards", 1) > 1:
        parts.append(f"FSDP over {work['shards']} GPUs, per GPU")
    return ", ".join(parts)


def _estimate_caption(profile: Profile) -> str:
    work = profile.workload
    lines = [
        f"Predicted from shapes: {_unit(profile)} at the step's peak, without CUDA context and fragmentation; FLOPs "
        "against full."
    ]
    if work.get("shards", 1) > 1:
        lines.append(
            "gathered: parts of the model that other GPUs have shares of, and gradients not yet shared out; FSDP2 "
            "over every decoder layer is meant."
        )
    if gpu := work.get("projected_on"):
        rate = "half" if work["dtype"] in ("bf16", "fp16") else "single"
        lines.append(
            f"time: projected for {gpu['name']}, not measured: every launch at the chip's peaks, {gpu[rate]:g} "
            f"TFLOP/s in {work['dtype']} and {gpu['bandwidth']:g} TB/s, and no wait between. Full fine-tuning takes at "
            f"least {_number(sum(profile.full.projected_ms.values()))} ms a step."
        )
        mean_us = 1000 * sum(profile.full.projected_ms.values()) / work["launches"]
        if mean_us < HOST_US:
            lines.append(
                f"These are {work['launches']:,} launches of {mean_us:.1f} µs on average: the host, which takes longer "
                "for one, decides the time, and the projection says little."
            )
    if work["memory_GiB"] is not None:
        lines.append(
            f"fits: into {work['memory_GiB']:g} GiB less {work['reserve_GiB']:g} for those; max: the largest batch "
            "of this length, and the largest length (in steps of 64) of this batch."
        )
        if (rank := work.get("largest_rank")) is not None:
            lines.append(_largest_rank(rank, work["rank_limit"]))
    return "\n".join(lines)


def _largest_rank(rank: int, limit: int) -> str:
    if rank == limit:
        return f"Every rank up to {limit}, the largest min(N, K), fits at this batch and length."
    if rank == 0:
        return "No rank fits at this batch and length."
    return f"The largest rank that fits at this batch and length is {rank}."


def _style(arm: Arm) -> str:
    if arm.status != "ok" or (arm.fits and not arm.fits["fits"]):
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
