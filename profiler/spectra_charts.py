"""The charts of a spectra document, as PNG: the singular values of every layer, the effective rank by layer and module,
and how alike two adapters' subspaces are."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_fast.profiler.figures import png

# Both are readable with every kind of colour vision, and in grey. The lines leave out viridis' yellow, which white
# swallows.
LINES, HEAT = "viridis", "cividis"
LAST_LINE_COLOUR = 0.88
GREY = "#555555"
# A panel each up to here; the kinds with the least energy are left out beyond.
MOST_PANELS = 24
# Singular values this far below the largest of all are rounding of the arithmetic, and would take the axis.
FLOOR = 1e-9
# Letters of the size of notes that go above a panel.
TITLE = 44
# From this index on a spectrum is drawn over a logarithmic one.
LONG = 200
# Up to so many columns of a heat map a number fits into a cell.
NUMBERED = 24


def _figure(width: float, height: float):
    # The object interface, not pyplot: no global state, and no window system is asked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def title(found: Mapping[str, Any]) -> str:
    """What was read, in one line: the adapter and its rank, or the two checkpoints."""
    source, layers = found["source"], found["layers"]
    count = f"{len(layers)} layers" if len(layers) != 1 else "1 layer"
    if source.get("adapter"):
        ranks = sorted({layer["rank"] for layer in layers})
        words = f"r={ranks[0]}" if len(ranks) == 1 else f"r={ranks[0]}…{ranks[-1]}"
        return f"{source['adapter']}, {words}, {count}"
    return f"{source['tuned']} − {source['base']}, {count}"


def _grouped(layers: Sequence[Mapping[str, Any]], key: str) -> dict[Any, list[Mapping[str, Any]]]:
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for layer in layers:
        groups.setdefault(layer[key], []).append(layer)
    return groups


def singular_values(found: Mapping[str, Any]) -> bytes:
    """σᵢ of ΔW over i, a panel per kind of module, a line per layer coloured by depth.

    All panels share the logarithmic axis of σ, in the units of the weights: on it a line's shape is its decay, its
    height its size. A dotted line marks the rank that keeps 99% of the energy of the median layer; a grey area is below
    what the rounding of stored weights alone makes, where that is known."""
    kinds = _grouped(found["layers"], "kind")
    energies = {kind: sum(layer["frobenius_norm"] ** 2 for layer in members) for kind, members in kinds.items()}
    shown = [kind for kind in sorted(kinds, key=energies.get, reverse=True) if energies[kind] > 0][:MOST_PANELS]
    kinds = {kind: members for kind, members in kinds.items() if kind in shown} or kinds
    columns = min(4, len(kinds)) if len(kinds) != 3 else 3
    rows = math.ceil(len(kinds) / columns)
    figure = _figure(max(6.0, 2.75 * columns + 1.0), 2.35 * rows + 1.0)
    heading = f"Singular values of ΔW: {title(found)}"
    if len(energies) > len(kinds):
        heading += _left_out(energies, kinds)
    figure.suptitle(heading, fontsize=10.5, x=0.012, ha="left")
    all_axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)

    depths = [layer["depth"] for layer in found["layers"]]
    colour = _depth_colours(min(depths), max(depths))
    positive = [v for members in kinds.values() for m in members for v in m["singular_values"] if v > 0]
    longest = max(len(layer["singular_values"]) for layer in found["layers"])
    for place, axes in enumerate(all_axes.flat):
        if place >= len(kinds):
            axes.set_axis_off()
            continue
        kind = list(kinds)[place]
        _draw_spectra(axes, kind, kinds[kind], colour)
        last_of_column = place + columns >= len(kinds)
        if last_of_column:
            axes.set_xlabel("index i" + (" (log scale)" if longest > LONG else ""), fontsize=9)
            axes.tick_params(labelbottom=True)
        if place % columns == 0:
            axes.set_ylabel("singular value σᵢ (log scale)", fontsize=9)
    _spectra_axes(all_axes[0][0], positive, longest)
    if min(depths) < max(depths):
        _depth_bar(figure, all_axes, min(depths), max(depths))
    return png(figure)


def _left_out(energies: Mapping[str, float], drawn: Mapping[str, Any]) -> str:
    zero = [kind for kind, energy in energies.items() if energy == 0 and kind not in drawn]
    small = len(energies) - len(drawn) - len(zero)
    words = f"; no update: {', '.join(zero[:3])}{' …' if len(zero) > 3 else ''}" if zero else ""
    return words + (f"; not drawn: {small} kinds of modules with smaller updates" if small else "")


def _draw_spectra(axes, kind: str, members: Sequence[Mapping[str, Any]], colour) -> None:
    from matplotlib.collections import LineCollection

    live = [layer for layer in members if layer["spectral_norm"] > 0]
    lines = [
        np.array([(i, value) for i, value in enumerate(layer["singular_values"], 1) if value > 0]) for layer in live
    ]
    colours = [colour(layer["depth"]) for layer in live]
    axes.add_collection(LineCollection(lines, colors=colours, linewidths=1.1 if len(lines) > 8 else 1.5, zorder=3))
    if lines and max(map(len, lines)) <= 32:
        points = np.concatenate(lines)
        each = [c for c, line in zip(colours, lines) for _ in line]
        axes.scatter(points[:, 0], points[:, 1], s=5 if len(lines) > 8 else 9, c=each, linewidths=0, zorder=4)
    axes.set_title(kind, fontsize=9.5, loc="left", fontweight="bold")
    axes.grid(True, color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)

    thresholds = [layer["noise_threshold"] for layer in live if layer["noise_threshold"]]
    dense = any(layer["rank"] is None for layer in live)
    kept = [layer["corrected"] if dense and layer["corrected"] else layer for layer in live]
    ranks = [entry["r99"] for entry in kept if entry["r99"] is not None]
    notes = []
    if ranks:
        middle = statistics.median(ranks)
        axes.axvline(middle, color=GREY, linewidth=1.0, linestyle=":", zorder=2)
        notes.append(f"median r99 = {middle:g}")
    if thresholds:
        axes.axhspan(0, statistics.median(thresholds), color=GREY, alpha=0.12, linewidth=0, zorder=1)
        notes.append("grey: rounding")
    if len(live) < len(members):
        notes.append(f"{len(members) - len(live)} of {len(members)} are zero")
    # Beside the title on the left while both fit, which is half as large again.
    between = "; " if 1.5 * len(kind) + len("; ".join(notes)) <= TITLE else ";\n"
    axes.set_title(between.join(notes), fontsize=7.5, loc="right", color=GREY)


def _spectra_axes(axes, positive: Sequence[float], longest: int) -> None:
    """The shared limits and ticks."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    high = max(positive, default=1.0)
    low = max(min(positive, default=high / 10), high * FLOOR)
    axes.set_yscale("log")
    if high / low < 4:  # a flat spectrum would otherwise fill the panel with nothing
        low = high / 4
    span = math.log10(high / low)
    axes.set_ylim(low / 10 ** (0.06 * span), high * 10 ** (0.06 * span))
    if span < 2.3:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    if longest > LONG:
        axes.set_xscale("log")
        axes.set_xlim(0.9, longest * 1.1)
        return
    axes.set_xlim(1 - 0.03 * longest - 0.1, longest + 0.03 * longest + 0.1)
    if longest <= 8:
        axes.xaxis.set_major_locator(FixedLocator(range(1, longest + 1)))
    else:
        step = next(s for s in (2, 4, 8, 16, 32, 64) if longest / s <= 6)
        axes.xaxis.set_major_locator(FixedLocator([1, *range(step, longest + 1, step)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _depth_colours(first: int, last: int):
    from matplotlib import colormaps

    scale = colormaps[LINES]
    return lambda depth: scale(LAST_LINE_COLOUR * (depth - first) / max(last - first, 1))


def _depth_bar(figure, all_axes, first: int, last: int) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    count = last - first + 1
    scale = LinearSegmentedColormap.from_list("depth", colormaps[LINES](np.linspace(0, LAST_LINE_COLOUR, 256)), count)
    norm = BoundaryNorm(np.arange(first - 0.5, last + 1), count)
    bar = figure.colorbar(ScalarMappable(norm, scale), ax=all_axes, shrink=0.9, aspect=40, pad=0.012)
    bar.set_label("layer", fontsize=9)
    bar.ax.minorticks_off()
    bar.set_ticks(
        list(range(first, last + 1)) if count <= 12 else MaxNLocator(8, integer=True).tick_values(first, last)
    )
    bar.ax.set_ylim(first - 0.5, last + 0.5)
    bar.ax.tick_params(labelsize=8)


def effective_rank(found: Mapping[str, Any]) -> bytes:
    """A heat map of the effective rank, kinds of modules down and layers across: blank where a module is not adapted or
    its effective rank not known, 0 where its update is zero. Of a dense update, that of its part above the rounding."""
    layers = found["layers"]
    rows = list(_grouped(layers, "kind"))
    stacks = list(_grouped(layers, "stack"))
    columns = sorted({(layer["stack"], layer["depth"]) for layer in layers}, key=lambda c: (stacks.index(c[0]), c[1]))
    cells: dict[tuple[int, int], list[float]] = {}
    for layer in layers:
        value = (layer["corrected"] or layer)["effective_rank"]
        if value is not None:
            cells.setdefault((rows.index(layer["kind"]), columns.index((layer["stack"], layer["depth"]))), []).append(
                value
            )
    table = np.full((len(rows), len(columns)), np.nan)
    for at, values in cells.items():
        table[at] = statistics.median(values) or np.nan  # a zero update has no directions, and no colour

    cell = max(0.22, min(0.6, 11 / len(columns)))
    longest = max(map(len, rows))
    figure = _figure(max(6.5, cell * len(columns) + 0.085 * longest + 1.8), max(2.2, 0.34 * len(rows) + 1.5))
    axes = figure.subplots()
    heading = f"Effective rank of ΔW: {title(found)}"
    if any(len(values) > 1 for values in cells.values()):
        heading += "\nthe median, where a cell has several"
    if any(layer["corrected"] for layer in layers):
        heading += ", freed of rounding noise"
    figure.suptitle(heading, fontsize=10.5, x=0.012, ha="left")
    image = _heat(axes, table)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    several = [stack for stack in stacks if stack] if len(stacks) > 1 + ("" in stacks) else []
    names = [f"{_short(stack, several)}{depth}" if stack else "–" for stack, depth in columns]
    every = max(1, math.ceil(len(columns) / (16 if several else 40)))
    shown = range(0, len(columns), every)
    axes.set_xticks(shown, [names[i] for i in shown], fontsize=8, rotation=90 if several else 0)
    axes.set_xlabel("layer", fontsize=9)
    for row, column in (at for at, values in cells.items() if not statistics.median(values)):
        axes.text(column, row, "0", ha="center", va="center", fontsize=7.5, color=GREY)
    if len(columns) <= NUMBERED:
        _number_cells(axes, image, table, 1)
    bar = figure.colorbar(image, ax=axes, shrink=0.95, pad=0.015)
    bar.set_label("effective rank", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return png(figure)


def _short(stack: str, stacks: Sequence[str]) -> str:
    """The first part of a stack's path that tells it from the others, as "encoder " beside decoder.block."""
    if not stacks:
        return ""
    parts = [stack.split(".") for stack in stacks]
    common = 0
    while all(len(p) > common and p[common] == parts[0][common] for p in parts):
        common += 1
    own = stack.split(".")
    return own[min(common, len(own) - 1)] + " "


def _heat(axes, table: np.ndarray, low: float | None = None, high: float | None = None):
    from matplotlib import colormaps

    known = table[~np.isnan(table)]
    if low is None:
        low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
        if high - low < 0.1 * high:  # noise would otherwise be stretched over all colours
            middle = (low + high) / 2
            low, high = 0.95 * middle, 1.05 * middle
        if high == low:
            high = low + 1.0
    scale = colormaps[HEAT].with_extremes(bad="white")
    image = axes.imshow(np.ma.masked_invalid(table), aspect="auto", cmap=scale, vmin=low, vmax=high)
    axes.set_xticks(np.arange(-0.5, table.shape[1]), minor=True)
    axes.set_yticks(np.arange(-0.5, table.shape[0]), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return image


def _number_cells(axes, image, table: np.ndarray, digits: int) -> None:
    if np.nanmax(table, initial=0) >= 100:
        digits = 0
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            dark = image.norm(value) < 0.55
            axes.text(
                column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=7.5,
                color="white" if dark else "black",
            )  # fmt: skip


def similarity(found: Mapping[str, Any]) -> bytes:
    """φ(i, j) between the subspaces of the first i and j singular vectors of two adapters (LoRA paper, section 7.2): of
    one layer, and the mean over all."""
    against = found["against"]
    panels = [
        (f"{against['shown']}", next(e["phi"] for e in against["layers"] if e["name"] == against["shown"])),
        (f"mean over {len(against['layers'])} layers", against["mean"]),
    ]
    if len(against["layers"]) == 1:
        panels = panels[:1]
    figure = _figure(5.2 * len(panels) + 0.8, 4.9)
    heading = f"Subspace similarity φ(i, j): {found['source']['adapter']} and {against['adapter']}"
    figure.suptitle(heading, fontsize=10.5, x=0.012, ha="left")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, phi) in zip(all_axes, panels):
        table = np.array(phi, dtype=float)
        image = _heat(axes, table, 0.0, 1.0)
        if max(table.shape) <= NUMBERED // 2:
            _number_cells(axes, image, table, 2)
        axes.set_title(name, fontsize=9, loc="left", fontweight="bold")
        for count, ticks in zip(table.shape, (axes.set_yticks, axes.set_xticks)):
            step = max(1, math.ceil(count / 12))
            places = [0, *range(step - 1, count, step)] if step > 1 else range(count)
            places = sorted(set(places))
            ticks(places, [str(i + 1) for i in places], fontsize=8)
        axes.set_xlabel("j: first singular vectors of the second adapter", fontsize=9)
    all_axes[0].set_ylabel("i: first singular vectors of the first adapter", fontsize=9)
    bar = figure.colorbar(image, ax=all_axes, shrink=0.95, pad=0.015)
    bar.set_label("φ: 0 orthogonal, 1 one holds the other", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return png(figure)
