"""A Profile as charts: `chart` says what to draw, in plain data, and `draw_png` draws it."""

import math
import statistics

import numpy as np

from lora_fast.profiler.crossover import COSTS
from lora_fast.profiler.figures import png
from lora_fast.profiler.profile import Arm, Profile
from lora_fast.profiler.table import title
from lora_fast.profiler.workload import AGAIN, FULL, PEFT

# What is drawn beside a cost.
BESIDE = ("FLOPs", "PEFT's LoRA", "projected", "predicted from shapes")


def chart(profile: Profile) -> dict:
    """The description, in plain data: title, panels, memory and drift.

    panels: time (in an estimate projected time or, without that, FLOPs) and memory, each a ratio to full fine-tuning
    over rank. A panel has points {rank, ratio, low, high} (low and high: 95% interval, or None), absolute {rank, value}
    in unit, failed (ranks
    without a value), full (what a ratio of 1 is, or None; memory's full_name says where it is predicted), noise
    (half-width of the band in which equal arms lie, or None), beside (what is drawn with them, each a name and points:
    another cost, the prediction, PEFT's LoRA), and the crossover: rank, low, high, bracket, text.
    overlay: the points and the crossover of each cost that is known. memory: per arm its categories in MiB at the peak
    and at each phase's, the prediction and what went wrong, and the capacity. drift: per arm, each round's step over
    the arm's median."""
    costs = {"time": _time(profile), "projected": _projected(profile), "flops": _flops(profile)}
    costs["memory"] = _memory(profile)
    for cost, panel in costs.items():
        found = profile.shown_crossover(cost)
        low, high = found.interval or (None, None)
        panel["crossover"] = {
            "rank": found.rank,
            "low": low,
            "high": high,
            "bracket": list(found.bracket),
            "text": found.sentence(COSTS[cost]),
        }
        panel["ranks"] = [arm.rank for arm in profile.lora]
    projected = bool(costs["projected"]["points"])
    cost = "time" if not profile.estimated else "projected" if projected else "flops"
    first = costs[cost]
    for other, name in (("flops", BESIDE[0]), ("projected", BESIDE[2])):
        if cost not in (other, "flops") and costs[other]["points"]:
            first["beside"].append({"name": name, "points": costs[other]["points"]})
    ratios = {"time": "ratio_to_full", "projected": "projected_ratio", "flops": "flops_ratio"}
    for panel, ratio in ((first, ratios[cost]), (costs["memory"], "memory_ratio")):
        points = [{"rank": arm.rank, "ratio": getattr(arm, ratio)} for arm in profile.arms if arm.kind == PEFT]
        if points := [point for point in points if point["ratio"] is not None]:
            panel["beside"].append({"name": BESIDE[1], "points": points})
    return {
        "title": title(profile),
        "panels": [first, costs["memory"]],
        "overlay": [panel for panel in costs.values() if panel["points"]],
        "memory": _bars(profile),
        "drift": _drift(profile),
    }


def _time(profile: Profile) -> dict:
    return {
        "title": "Step time",
        "unit": "ms",
        "full": profile.full.step_ms,
        "noise": profile.aa["noise_floor"] if profile.aa else None,
        "points": [
            {"rank": arm.rank, "ratio": arm.ratio_to_full, "low": low, "high": high}
            for arm in profile.lora
            if arm.ratio_to_full is not None
            for low, high in [arm.ratio_ci or (None, None)]
        ],
        "failed": [arm.rank for arm in profile.lora if arm.step_ms is None],
        "absolute": [{"rank": arm.rank, "value": arm.step_ms} for arm in profile.lora if arm.step_ms is not None],
        "beside": [],
    }


def _projected(profile: Profile) -> dict:
    known = [arm for arm in profile.lora if arm.projected_ratio is not None]
    full = profile.full.projected_ms
    return {
        "title": "Projected step time",
        "unit": "ms",
        "full": sum(full.values()) if full else None,
        "noise": None,
        "points": [{"rank": arm.rank, "ratio": arm.projected_ratio, "low": None, "high": None} for arm in known],
        "failed": [],
        "absolute": [{"rank": arm.rank, "value": sum(arm.projected_ms.values())} for arm in known],
        "beside": [],
    }


def _flops(profile: Profile) -> dict:
    counted = [arm for arm in profile.lora if arm.flops_ratio is not None]
    full = profile.full
    return {
        "title": "FLOPs",
        "unit": "TFLOP",
        "full": (full.forward_flops + full.backward_flops) / 1e12 if full.forward_flops else None,
        "noise": None,
        "points": [{"rank": arm.rank, "ratio": arm.flops_ratio, "low": None, "high": None} for arm in counted],
        "failed": [],
        "absolute": [
            {"rank": arm.rank, "value": (arm.forward_flops + arm.backward_flops) / 1e12}
            for arm in counted
            if arm.forward_flops
        ],
        "beside": [],
    }


def _memory(profile: Profile) -> dict:
    full = profile.full
    tallest = max((arm.peak_MiB for arm in profile.arms if arm.peak_MiB is not None), default=0)
    scale, unit = (1024, "GiB") if tallest >= 10 * 1024 else (1, "MiB")
    held_against = full.peak_MiB or (full.predicted_MiB if any(arm.memory_ratio for arm in profile.lora) else None)
    panel = {
        "title": "Peak memory",
        "unit": unit,
        "full": held_against / scale if held_against else None,
        "full_name": "full fine-tuning" + (", predicted" if held_against and full.peak_MiB is None else ""),
        "noise": None,
        "points": [
            {"rank": arm.rank, "ratio": arm.memory_ratio, "low": None, "high": None}
            for arm in profile.lora
            if arm.memory_ratio is not None
        ],
        "failed": [arm.rank for arm in profile.lora if arm.peak_MiB is None],
        "absolute": [
            {"rank": arm.rank, "value": arm.peak_MiB / scale} for arm in profile.lora if arm.peak_MiB is not None
        ],
        "beside": [],
    }
    predicted = [arm for arm in profile.lora if arm.predicted_MiB is not None and full.peak_MiB]
    if predicted:
        points = [{"rank": arm.rank, "ratio": arm.predicted_MiB / full.peak_MiB} for arm in predicted]
        panel["beside"].append({"name": BESIDE[3], "points": points})
    return panel


def _bars(profile: Profile) -> dict:
    """capacity_MiB: what --memory-limit, --gpu, or the GPU or machine itself gives, or None."""
    work, machine = profile.workload, profile.environment
    # An estimate is seldom for this machine's memory.
    holds = machine.get("gpu") or ({} if profile.estimated else machine)
    capacity = work.get("memory_limit_MiB") or holds.get("memory_MiB")
    if work.get("memory_GiB"):
        capacity = 1024 * work["memory_GiB"]
    return {
        "capacity_MiB": capacity,
        "arms": [
            {
                "name": arm.name,
                "peak_MiB": arm.peak_MiB,
                "by_category": arm.by_category or {},
                "by_phase": arm.phase_categories_MiB or {},
                "predicted_MiB": arm.predicted_MiB,
                "problem": _problem(arm),
            }
            for arm in profile.arms
        ],
    }


def _problem(arm: Arm) -> str | None:
    if arm.status != "ok" and arm.peak_MiB is None:
        return {"oom": "out of memory"}.get(arm.status, arm.status)
    return "does not fit" if arm.fits and not arm.fits["fits"] else None


def _drift(profile: Profile) -> list[dict]:
    series = [(arm.name, arm.samples_ms) for arm in profile.arms]
    if profile.aa:
        series.append((profile.aa.get("of", FULL) + AGAIN, profile.aa["samples_ms"]))
    return [
        {"name": name, "ratio": [value / statistics.median(samples) for value in samples]}
        for name, samples in series
        if samples
    ]


def curve(points: list[dict]) -> tuple[list[float], list[float]]:
    """Ranks and ratios between points, on straight lines in r: on an axis of log r these are curves, and the crossover,
    which lies on such a line, lies on them."""
    ranks, ratios = [point["rank"] for point in points], [point["ratio"] for point in points]
    fine = np.geomspace(ranks[0], ranks[-1], 200)
    return fine.tolist(), np.interp(fine, ranks, ratios).tolist()


BLUE, GREY, RED, ORANGE, GREEN, PURPLE = "#1f5fa8", "#555555", "#c0392b", "#c77d0a", "#2a8c6c", "#7a4fb5"


def draw_png(description: dict) -> bytes:
    """The chart as a PNG of about 1650 × 750 pixels."""
    # The object interface, not pyplot: no global state, and no window system is asked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(description["title"], fontsize=10.5, x=0.012, ha="left")
    for axes, panel in zip(figure.subplots(1, 2), description["panels"], strict=True):
        _draw_panel(axes, panel)
    return png(figure)


def _draw_panel(axes, panel: dict) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    relative = panel["full"] is not None
    points = (
        panel["points"]
        if relative
        else [{"rank": p["rank"], "ratio": p["value"], "low": None, "high": None} for p in panel["absolute"]]
    )
    axes.set_title(panel["title"], fontsize=11, loc="left", fontweight="bold")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("LoRA rank r (log scale)")
    axes.grid(True, color="#e3e3e3", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)

    if points:
        ranks = [point["rank"] for point in points]
        ratios = [point["ratio"] for point in points]
        bounds = [(p["ratio"] - p["low"], p["high"] - p["ratio"]) if p["low"] is not None else (0, 0) for p in points]
        banded = any(low or high for low, high in bounds)
        axes.plot(*curve(points), color=BLUE, linewidth=1.8, zorder=4)
        axes.errorbar(
            ranks,
            ratios,
            yerr=[list(ends) for ends in zip(*bounds, strict=True)] if banded else None,
            color=BLUE,
            marker="o",
            markersize=5,
            linestyle="none",
            elinewidth=1.5,
            capsize=3.5,
            label="LoRA" + (", 95% interval" if banded else ""),
            zorder=4,
        )
    colours = dict(zip(BESIDE, (ORANGE, GREEN, PURPLE, ORANGE)))
    for other in panel["beside"] if relative else []:
        style = {"color": colours[other["name"]], "linewidth": 1.4, "linestyle": (0, (4, 2)), "zorder": 3}
        axes.plot(*curve(other["points"]), label=other["name"], **style)
    if relative:
        axes.axhline(
            1,
            color=GREY,
            linewidth=1.5,
            linestyle="--",
            label=f"{panel.get('full_name', 'full fine-tuning')}: {amount(panel['full'], panel['unit'])}",
            zorder=2,
        )
        name = panel["title"] if panel["title"].startswith("FLOP") else panel["title"].lower()
        axes.set_ylabel(f"{name}, ratio to full fine-tuning")
        right = axes.secondary_yaxis("right", functions=(lambda y: y * panel["full"], lambda y: y / panel["full"]))
        right.set_ylabel(panel["unit"])
        right.tick_params(labelsize=8.5)
        right.spines["right"].set_color("#bbbbbb")
    else:
        axes.set_ylabel(panel["unit"])
    if relative and panel["noise"] is not None:
        axes.axhspan(
            1 - panel["noise"],
            1 + panel["noise"],
            color=GREY,
            alpha=0.13,
            linewidth=0,
            label=f"noise floor ±{panel['noise']:.1%}",
            zorder=1,
        )
    _mark_crossover(axes, panel["crossover"], panel["ranks"])

    _limits(axes, points, panel, relative)
    if panel["failed"]:
        axes.plot(
            panel["failed"],
            [0.97] * len(panel["failed"]),
            transform=axes.get_xaxis_transform(),
            linestyle="none",
            marker="x",
            markersize=9,
            markeredgewidth=2.2,
            color=RED,
            label="not measured, see the table",
            clip_on=False,
        )
    axes.xaxis.set_major_locator(FixedLocator(panel["ranks"]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    # Costs rise from the lower left, so the upper left is the corner that stays empty.
    axes.legend(loc="upper left", fontsize=8.5, framealpha=1, edgecolor="#dddddd")


def _mark_crossover(axes, crossover: dict, ranks: list[int]) -> None:
    if crossover["rank"] is None:
        return
    if crossover["low"] is not None or crossover["high"] is not None:
        low = ranks[0] if crossover["low"] is None else crossover["low"]
        high = ranks[-1] if crossover["high"] is None else crossover["high"]
        axes.axvspan(low, high, color=RED, alpha=0.10, linewidth=0, zorder=0)
    text = f"crossover r≈{crossover['rank']:.0f}"
    if crossover["low"] is not None and crossover["high"] is not None:
        text += f" (95% interval {crossover['low']:.0f}–{crossover['high']:.0f})"
    axes.plot([crossover["rank"]], [1], marker="D", markersize=6, color=RED, linestyle="none", zorder=5)
    axes.axvline(crossover["rank"], color=RED, linewidth=1.3, linestyle=":", label=text, zorder=3)


def _limits(axes, points: list[dict], panel: dict, relative: bool) -> None:
    """Room around the data, and above it for the legend; the line of full fine-tuning is always in view."""
    values = [value for p in points for value in (p["ratio"], p["low"], p["high"]) if value is not None]
    for other in panel["beside"] if relative else []:
        values += [point["ratio"] for point in other["points"]]
    if relative:
        values += [1 - (panel["noise"] or 0), 1 + (panel["noise"] or 0)]
    if values:
        low, high = min(values), max(values)
        span = max(high - low, 0.1 * high, 1e-9)
        axes.set_ylim(max(0, low - 0.08 * span), high + 0.38 * span)
    ranks = panel["ranks"]
    axes.set_xlim(ranks[0] / math.sqrt(2), ranks[-1] * math.sqrt(2))


def amount(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}" if value >= 1 else f"{value:.2g} {unit}"
