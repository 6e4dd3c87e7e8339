"""Chart descriptions as plotly figures: dicts of title, data and layout, without the page's colours."""

from lora_fast.profiler.memory import CATEGORIES
from lora_fast.profiler.report import BESIDE, amount, curve
from lora_fast.profiler.workload import AGAIN
from lora_fast.rank_search import SIGNIFICANT

# Middle tones, legible on white and on black; the categories of memory in the order in which they are stacked.
BLUE, GREY, RED, ORANGE, GREEN, PURPLE = "#3f87d6", "#8a929d", "#dd4f45", "#d98a1c", "#2fa37f", "#9a72d4"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, "#d9705e", "#4fb3c9", "#b59a3c", "#c76aa8")
STACK = dict(zip(CATEGORIES, (GREY, BLUE, GREEN, PURPLE, ORANGE, "#d9705e", "#4fb3c9"), strict=True))
LINES = {"Step time": BLUE, "Projected step time": PURPLE, "FLOPs": ORANGE, "Peak memory": GREEN}
# A capacity is drawn where the arms come near it; a small model on a large GPU would be squeezed flat.
NEAR = 0.5


def figures(description: dict) -> dict[str, dict]:
    """Of a profile, by the key of the chart; description: what report.chart returned."""
    first, memory = description["panels"]
    if not first["points"]:  # without full fine-tuning's time, what FLOPs say
        first = next((panel for panel in description["overlay"] if panel["title"] != memory["title"]), first)
    found = {}
    for key, panel in (("first", first), ("memory-ratio", memory)):
        if panel["points"]:
            found[key] = _ratios(panel)
    if any(arm["by_category"] or arm["problem"] for arm in description["memory"]["arms"]):
        found["memory"] = _stack(description["memory"])
    if any(arm["by_phase"] for arm in description["memory"]["arms"]):
        found["phases"] = _phases(description["memory"])
    if len(description["overlay"]) > 1:
        found["overlay"] = _overlay(description["overlay"])
    if description["drift"]:
        found["drift"] = _rounds(description["drift"])
    return found


def loss_curve(curve: dict) -> dict | None:
    """Of a decision (its section's curve): the mean at every rank and SIGNIFICANT standard errors, full fine-tuning,
    target, and the rank that is recommended. None where no rank gave a value."""
    points, full, target = curve["points"], curve["full"], curve["target"]
    if not points:
        return None
    ranks = [point["rank"] for point in points]
    ends = [ranks[0] / 1.4, ranks[-1] * 1.4]
    means = [point["mean"] for point in points]
    half = [point["half_width"] or 0.0 for point in points]
    low = [mean - width for mean, width in zip(means, half, strict=True)]
    high = [mean + width for mean, width in zip(means, half, strict=True)]
    data = []
    if full is not None:
        width = full["half_width"] or 0.0
        if width:
            data.append(
                _area(
                    ends,
                    [full["mean"] - width] * 2,
                    [full["mean"] + width] * 2,
                    GREY,
                    f"full, {SIGNIFICANT:g} std. errors",
                )
            )
        data.append(_line(ends, [full["mean"]] * 2, GREY, f"full fine-tuning: {full['mean']:.4g}", dash="dash"))
        low, high = [*low, full["mean"] - width], [*high, full["mean"] + width]
    if any(half):
        data.append(_area(ranks, low[: len(ranks)], high[: len(ranks)], BLUE, f"{SIGNIFICANT:g} standard errors"))
    if target is not None:
        data.append(_line(ends, [target] * 2, ORANGE, f"target: {target:.4g}", dash="dot"))
        low, high = [*low, target], [*high, target]
    room = 0.08 * (max(high) - min(low) or abs(means[0]) or 1.0)
    bottom, top = min(low) - room, max(high) + room
    if curve["recommended"] is not None:
        text = f"recommended: r={curve['recommended']}"
        data.append(_line([curve["recommended"]] * 2, [bottom, top], RED, text, dash="dot"))
    data.append({**_line(ranks, means, BLUE, "LoRA"), "showlegend": False, "line": {"color": BLUE, "width": 2.5}})
    data.append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": "LoRA, mean of the trainings",
            "x": ranks,
            "y": means,
            "text": [
                f"r={p['rank']}: {p['mean']:.4f}"
                + ("" if p["half_width"] is None else f" ± {p['half_width']:.2g}")
                + f"<br>{p['count']} training{'s' if p['count'] > 1 else ''}"
                for p in points
            ],
            "hovertemplate": "%{text}<extra></extra>",
            "marker": {"color": BLUE, "size": 9},
        }
    )
    better = "smaller is better" if curve["direction"] == "minimize" else "larger is better"
    return {
        "title": "Quality against rank",
        "data": data,
        "layout": _layout(ranks, f"held-out metric ({better})", bottom, top),
    }


def layer_lines(rows: list[dict]) -> dict:
    """Of single layers (layers.time_layers): a line per shape over rank, against the layer whose weight is trained; its
    frozen layer as a level of the same colour."""
    rows = [row for row in rows if row["status"] == "ok"]
    ranks = sorted({row["rank"] for row in rows})
    ends = [ranks[0] / 1.4, ranks[-1] * 1.4]
    floor = max(row["noise_floor"] for row in rows)
    data = [
        _area(ends, [1 - floor] * 2, [1 + floor] * 2, GREY, f"noise floor ±{floor:.1%}"),
        _line(ends, [1, 1], GREY, "its weight trained", dash="dash"),
    ]
    values = [1 - floor, 1 + floor]
    shapes = list(dict.fromkeys((row["in_features"], row["out_features"]) for row in rows))
    for number, shape in enumerate(shapes):
        own = sorted((r for r in rows if (r["in_features"], r["out_features"]) == shape), key=lambda row: row["rank"])
        colour, name = PALETTE[number % len(PALETTE)], f"{', '.join(own[0]['names'])} ({shape[0]} → {shape[1]})"
        frozen = own[0]["frozen_ms"] / own[0]["dense_ms"]
        level = _line(ends, [frozen] * 2, colour, f"{name}, frozen", "dot", f"{name}, frozen: {frozen:.3f}")
        line = _line([row["rank"] for row in own], [row["ratio_to_dense"] for row in own], colour, name)
        hover = [
            f"{name}<br>r={row['rank']}: {row['ratio_to_dense']:.3f} [{row['dense_ci'][0]:.3f}, "
            f"{row['dense_ci'][1]:.3f}]<br>{row['ratio_to_frozen']:.3f} of the frozen layer<br>{row['ms']:.3g} ms"
            for row in own
        ]
        line |= {"mode": "lines+markers", "text": hover, "hovertemplate": "%{text}<extra></extra>"}
        line.pop("hoverinfo")
        data += [level | {"showlegend": False}, line]
        values += [frozen, *(end for row in own for end in row["dense_ci"])]
    room = 0.08 * (max(values) - min(values))
    low, high = max(0, min(values) - room), max(values) + room
    return {
        "title": "Layers by themselves (dotted: frozen)",
        "data": data,
        "layout": _layout(ranks, "step / step with the weight trained", low, high),
    }


def _ratios(panel: dict) -> dict:
    points, ranks = panel["points"], panel["ranks"]
    low, high = _range(panel)
    ends = [ranks[0] / 1.4, ranks[-1] * 1.4]
    unit, full = panel["unit"], panel["full"]
    data = []
    if panel["noise"]:
        noise = panel["noise"]
        data.append(_area(ends, [1 - noise] * 2, [1 + noise] * 2, GREY, f"noise floor ±{noise:.1%}"))
    banded = [point for point in points if point["low"] is not None]
    if banded:
        edges = [curve([{"rank": p["rank"], "ratio": p[end]} for p in banded]) for end in ("low", "high")]
        data.append(_area(edges[0][0], edges[0][1], edges[1][1], BLUE, "95% interval"))
    crossover, colours = panel["crossover"], dict(zip(BESIDE, (ORANGE, GREEN, PURPLE, ORANGE)))
    if crossover["low"] is not None or crossover["high"] is not None:
        interval = [crossover["low"] or ranks[0], crossover["high"] or ranks[-1]]
        data.append(_area(interval, [low] * 2, [high] * 2, RED, "crossover, 95% interval"))
    elif crossover["rank"] is None and None not in crossover["bracket"]:
        data.append(_area(crossover["bracket"], [low] * 2, [high] * 2, RED, "crossover, between"))
    value = "" if full is None else f": {amount(full, unit)}"
    data.append(_line(ends, [1, 1], GREY, f"{panel.get('full_name', 'full fine-tuning')}{value}", dash="dash"))
    for other in panel["beside"]:
        hover = f"{other['name']}, r=%{{x:.0f}}: %{{y:.3f}}"
        data.append(_line(*curve(other["points"]), colours[other["name"]], other["name"], dash="dot", hover=hover))
    data.append({**_line(*curve(points), BLUE, "LoRA"), "showlegend": False, "line": {"color": BLUE, "width": 2.5}})
    absolute = {entry["rank"]: entry["value"] for entry in panel["absolute"]}
    hover = [
        f"r={p['rank']}<br>{p['ratio']:.3f} of full"
        + ("" if p["low"] is None else f" [{p['low']:.3f}, {p['high']:.3f}]")
        + (f"<br>{amount(absolute[p['rank']], unit)}" if p["rank"] in absolute else "")
        for p in points
    ]
    data.append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": "LoRA",
            "x": [p["rank"] for p in points],
            "y": [p["ratio"] for p in points],
            "text": hover,
            "hovertemplate": "%{text}<extra></extra>",
            "marker": {"color": BLUE, "size": 9},
        }
    )
    if panel["failed"]:
        data.append(_crosses(panel["failed"], [high - 0.04 * (high - low)] * len(panel["failed"]), "no value"))
    if crossover["rank"] is not None:
        text = _short(crossover)
        data.append(_line([crossover["rank"]] * 2, [low, high], RED, text, dash="dot"))
        data.append(_diamond(crossover["rank"], RED, text))
    title = panel["title"]
    return {
        "title": f"{title} against rank",
        "data": data,
        "layout": _layout(ranks, f"{title if title == 'FLOPs' else title.lower()} / full", low, high),
    }


def _short(crossover: dict) -> str:
    low, high = crossover["low"], crossover["high"]
    text = f"crossover r≈{crossover['rank']:.0f}"
    return text if low is None or high is None else f"{text} [{low:.0f}–{high:.0f}]"


def _overlay(panels: list[dict]) -> dict:
    data, ranks = [], panels[0]["ranks"]
    low, high = min(_range(panel)[0] for panel in panels), max(_range(panel)[1] for panel in panels)
    data.append(_line([ranks[0] / 1.4, ranks[-1] * 1.4], [1, 1], GREY, "full fine-tuning", dash="dash"))
    for panel in panels:
        colour = LINES[panel["title"]]
        hover = f"{panel['title']}, r=%{{x:.0f}}: %{{y:.3f}} of full"
        data.append({**_line(*curve(panel["points"]), colour, panel["title"]), "showlegend": False})
        marks = [[point[name] for point in panel["points"]] for name in ("rank", "ratio")]
        data.append({**_line(*marks, colour, panel["title"], hover=hover), "mode": "markers", "marker": {"size": 8}})
        data[-1]["marker"]["color"] = colour
        if panel["crossover"]["rank"] is not None:
            text = f"{panel['title']}: {_short(panel['crossover'])}"
            data.append(_diamond(panel["crossover"]["rank"], colour, text))
    title = "All costs: " + ", ".join(panel["title"] for panel in panels)
    return {"title": title, "data": data, "layout": _layout(ranks, "ratio to full fine-tuning", low, high)}


def _stack(memory: dict) -> dict:
    arms, capacity = memory["arms"], memory["capacity_MiB"]
    tallest = max((value for arm in arms for value in (arm["peak_MiB"], arm["predicted_MiB"]) if value), default=0)
    problems = [arm for arm in arms if arm["problem"]]
    out_of_memory = any(arm["problem"] in ("out of memory", "does not fit") for arm in arms)
    if capacity and not out_of_memory and tallest < NEAR * capacity:
        capacity = None
    scale, unit = (1024, "GiB") if max(tallest, capacity or 0) >= 2000 else (1, "MiB")
    names = [arm["name"] for arm in arms]
    data = _piled(names, [arm["by_category"] for arm in arms], tallest, scale, unit)
    predicted = [arm for arm in arms if arm["predicted_MiB"] is not None]
    if predicted:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "predicted from shapes",
                "x": [arm["name"] for arm in predicted],
                "y": [arm["predicted_MiB"] / scale for arm in predicted],
                "hovertemplate": f"%{{x}}<br>predicted: %{{y:.2f}} {unit}<extra></extra>",
                "marker": {"symbol": "diamond-open", "size": 9, "color": RED, "line": {"width": 2}},
            }
        )
    if capacity:
        line = _line(names, [capacity / scale] * len(names), RED, f"capacity {capacity / scale:,.4g} {unit}", "dash")
        data.append(line)
    if problems:
        height = (capacity or tallest or scale) / scale
        labels = [arm["problem"] for arm in problems]
        data.append(_crosses([arm["name"] for arm in problems], [height] * len(problems), "out of memory", labels))
    top = 1.12 * max(tallest, capacity or 0, 1e-9) / scale
    layout = _layout(None, unit, 0, top) | {"barmode": "stack", "bargap": 0.35}
    layout["xaxis"] = {"type": "category", "categoryarray": names, "automargin": True}
    return {"title": "What the memory holds", "data": data, "layout": layout}


def _phases(memory: dict) -> dict:
    bars = [(arm["name"], phase, held) for arm in memory["arms"] for phase, held in arm["by_phase"].items()]
    tallest = max(sum(held.values()) for _, _, held in bars)
    scale, unit = (1024, "GiB") if tallest >= 2000 else (1, "MiB")
    places = [[name for name, _, _ in bars], [phase for _, phase, _ in bars]]
    layout = _layout(None, unit, 0, 1.05 * tallest / scale) | {"barmode": "stack", "bargap": 0.25}
    layout["xaxis"] = {"type": "multicategory", "automargin": True, "tickfont": {"size": 10}}
    data = _piled(places, [held for _, _, held in bars], tallest, scale, unit)
    return {"title": "What the memory holds in each phase", "data": data, "layout": layout}


def _piled(x: list, held: list[dict[str, float]], tallest: float, scale: float, unit: str) -> list[dict]:
    """A bar at each x, of the categories that it holds in MiB; those that nowhere show are left out."""
    return [
        {
            "type": "bar",
            "name": category,
            "x": x,
            "y": [one.get(category, 0) / scale for one in held],
            "hovertemplate": f"%{{x}}<br>{category}: %{{y:.2f}} {unit}<extra></extra>",
            "marker": {"color": colour},
        }
        for category, colour in STACK.items()
        if any(one.get(category, 0) > 0.001 * tallest for one in held)
    ]


def _rounds(drift: list[dict]) -> dict:
    data = [
        _line(
            list(range(1, len(series["ratio"]) + 1)),
            series["ratio"],
            GREY if series["name"].startswith("full") else PALETTE[number % len(PALETTE)],
            series["name"],
            dash="dot" if series["name"].endswith(AGAIN) else "solid",
            hover=f"{series['name']}, round %{{x}}: %{{y:.3f}} of its median",
        )
        for number, series in enumerate(drift)
    ]
    values = [value for series in drift for value in series["ratio"]]
    layout = _layout(None, "step / the arm's median", min(values) - 0.03, max(values) + 0.03)
    layout["xaxis"] = {"title": {"text": "round"}, "automargin": True}
    return {"title": "Drift over the rounds", "data": data, "layout": layout}


def _range(panel: dict) -> tuple[float, float]:
    """Room around all points and 1."""
    values = [value for p in panel["points"] for value in (p["ratio"], p["low"], p["high"]) if value is not None]
    values += [1 - (panel["noise"] or 0), 1 + (panel["noise"] or 0)]
    values += [point["ratio"] for other in panel["beside"] for point in other["points"]]
    room = 0.08 * max(max(values) - min(values), 0.1)
    return max(0, min(values) - room), max(values) + room


def _layout(ranks: list[int] | None, y: str, low: float, high: float) -> dict:
    layout = {
        "margin": {"l": 56, "r": 12, "t": 34, "b": 60},
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "font": {"size": 11}},
        "hovermode": "closest",
        "yaxis": {"title": {"text": y}, "range": [low, high], "automargin": True},
    }
    if ranks:
        shown = ranks[:: -(-len(ranks) // 10)]
        layout["xaxis"] = {
            "type": "log",
            "tickvals": shown,
            "ticktext": [str(rank) for rank in shown],
            "title": {"text": "LoRA rank r (log scale)"},
            "automargin": True,
        }
    return layout


def _line(x: list, y: list, colour: str, name: str, dash: str = "solid", hover: str | None = None) -> dict:
    line = {"type": "scatter", "mode": "lines", "x": x, "y": y, "name": name, "line": {"color": colour, "dash": dash}}
    return line | ({"hovertemplate": hover + "<extra></extra>"} if hover else {"hoverinfo": "skip"})


def _area(x: list, low: list[float], high: list[float], colour: str, name: str) -> dict:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [*x, *reversed(x)],
        "y": [*low, *reversed(high)],
        "fill": "toself",
        "fillcolor": f"rgba({red},{green},{blue},0.2)",
        "line": {"width": 0},
        "name": name,
        "hoverinfo": "skip",
    }


def _diamond(rank: float, colour: str, text: str) -> dict:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [rank],
        "y": [1],
        "name": text,
        "hovertemplate": f"{text}<extra></extra>",
        "marker": {"symbol": "diamond", "size": 11, "color": colour},
        "showlegend": False,
    }


def _crosses(x: list, y: list[float], name: str, labels: list[str] | None = None) -> dict:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": x,
        "y": y,
        "name": "✕ " + " or ".join(dict.fromkeys(labels or [name])),
        "text": labels or [name] * len(x),
        "hovertemplate": "%{x}: %{text}<extra></extra>",
        "marker": {"symbol": "x", "size": 12, "color": RED},
    }
