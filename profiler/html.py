"""Profiles as one self-contained web page: `page` writes it, `figures` draws the chart descriptions with plotly.

The page holds plotly.js, its data, style and script in itself, and a content security policy that lets it ask no
server for anything. The tables are in the markup, so that they are there without JavaScript too."""

import json
from html import escape
from pathlib import Path

from lora_fast.profiler.advice import advise
from lora_fast.profiler.crossover import COSTS
from lora_fast.profiler.memory import CATEGORIES
from lora_fast.profiler.profile import Profile
from lora_fast.profiler.report import amount, chart, curve, draw_png
from lora_fast.profiler.runs import RunFolder
from lora_fast.profiler.table import caption, columns, crossover_sentences, reason, title

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
# Middle tones, legible on white and on black; the categories of memory in the order in which they are stacked.
BLUE, GREY, RED, ORANGE, GREEN = "#3f87d6", "#8a929d", "#dd4f45", "#d98a1c", "#2fa37f"
STACK = dict(zip(CATEGORIES, (GREY, BLUE, GREEN, "#9a72d4", ORANGE, "#d9705e"), strict=True))
LINES = {"Step time": BLUE, "FLOPs": ORANGE, "Peak memory": GREEN}
# A capacity is drawn where the arms come near it; a small model on a large GPU would be squeezed flat.
NEAR = 0.5

# What makes two runs' numbers comparable: the same work. Machines, versions and methods may differ, and are listed.
WORK = (
    *("model", "parameters", "dtype", "batch_size", "seq_len", "target_modules", "exclude_modules", "adapter_dtype"),
    *("lora_dropout", "gradient_accumulation", "gradient_checkpointing", "attn_implementation", "optimizer"),
)


def write_results(folder: RunFolder, profile: Profile) -> None:
    """arms.jsonl, rank_cost.png, report.html and, by which a run has ended, run.json."""
    folder.write_arms([arm.to_dict() for arm in profile.arms])
    folder.write_chart(draw_png(chart(profile)))
    folder.write("report.html", page([profile]))
    folder.write_run(profile.to_dict())


def different_work(profiles: list[Profile]) -> dict[str, list]:
    """The settings of WORK in which the runs differ, with each run's value. A setting that an older run did not record
    is not known to differ; neither is Transformers' choice of attention, which an estimate leaves open."""
    found = {}
    for name in WORK:
        values = [profile.workload.get(name) for profile in profiles]
        given = [json.dumps(value) for value in values if value is not None or name == "exclude_modules"]
        if len(set(given)) > 1:
            found[name] = values
    return found


def page(profiles: list[Profile], names: list[str] | None = None) -> str:
    """The whole document. names: what each run is called where there are several."""
    names = names or [profile.workload["model"] for profile in profiles]
    drawn = _drawn(profiles)
    charts = "".join(_card(key, drawn, names) for key in CAPTIONS if any(key in run for run in drawn))
    specifications = [
        {"id": f"run{number}-{key}", "data": figure["data"], "layout": figure["layout"]}
        for number, run in enumerate(drawn)
        for key, figure in run.items()
    ]
    script, missing = _plotly()
    folder = Path(__file__).parent
    heading = "What each LoRA rank costs" + (", compared" if len(profiles) > 1 else "")
    runs = f'<div class="runs" style="--runs: {len(profiles)}">'
    sections = [
        runs
        + "".join(_answers(p, name, len(profiles) > 1) for p, name in zip(profiles, names, strict=True))
        + "</div>",
        _comparison(profiles, names) if len(profiles) > 1 else "",
        f"<h2>Charts</h2>{missing}"
        f'<div class="charts runs-{len(profiles)}" style="--columns: {max(2, len(profiles))}">{charts}</div>',
        "<h2>All arms</h2>" + "".join(_table(p, names[n], len(profiles) > 1) for n, p in enumerate(profiles)),
        "<h2>Why costs are as they are</h2>" + runs + "".join(_why(p) for p in profiles) + "</div>",
        "<h2>Settings and environment</h2>" + runs + _settings(profiles) + "</div>",
        f"<h2>Method</h2>{''.join(f'<p>{_method(e)}</p>' for e in sorted({p.estimated for p in profiles}))}",
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{heading}: {escape(", ".join(names))}</title>
<style>{(folder / "report.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
<h1>{heading}</h1>
{chr(10).join(sections)}
</main>
<script id="charts" type="application/json">{_embedded(specifications)}</script>
<script>{script}</script>
<script>{(folder / "report.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _card(key: str, drawn: list[dict[str, dict]], names: list[str]) -> str:
    """The same chart of every run."""
    cards = ""
    for number, run in enumerate(drawn):
        heading = next(figures[key]["title"] for figures in (run, *drawn) if key in figures)
        heading += f" · {escape(names[number])}" if len(drawn) > 1 else ""
        body = (
            f'<div class="chart" id="run{number}-{key}"></div>' if key in run else '<p class="soft">not in this run</p>'
        )
        cards += f'<figure class="card"><h3>{heading}</h3>{body}<figcaption>{CAPTIONS[key]}</figcaption></figure>'
    return cards


def _plotly() -> tuple[str, str]:
    """plotly.js and nothing, or nothing and what to install."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        hint = "The charts need plotly: <code>pip install plotly</code>, then <code>lora-fast report RUN</code>."
        return "", f'<p class="card">{hint} rank_cost.png holds two of them.</p>'
    return get_plotlyjs(), ""


def _embedded(data) -> str:
    """JSON that cannot end the script element which holds it."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


# The charts -----------------------------------------------------------------------------------------------------------

CAPTIONS = {
    "first": "Ratio to full fine-tuning; below 1 LoRA is cheaper. The diamond is the crossover.",
    "memory-ratio": "Ratio to full fine-tuning's peak.",
    "memory": "At each arm's peak, by what it is.",
    "overlay": "Each cost has a crossover of its own, where its line passes 1.",
    "drift": "Each step over its arm's median: what moves all lines together is the machine, and cancels in ratios.",
}


def _drawn(profiles: list[Profile]) -> list[dict[str, dict]]:
    """Each run's figures, with the same scale for the same chart of all runs."""
    drawn = [figures(chart(profile)) for profile in profiles]
    for key in CAPTIONS:
        axes = [run[key]["layout"]["yaxis"] for run in drawn if key in run]
        units = {axis["title"]["text"] for axis in axes}
        if len(axes) > 1 and len(units) == 1:
            low, high = min(axis["range"][0] for axis in axes), max(axis["range"][1] for axis in axes)
            for axis in axes:
                axis["range"] = [low, high]
    return drawn


def figures(description: dict) -> dict[str, dict]:
    """Chart descriptions (report.chart) as plotly figures and their titles, without the page's colours."""
    first, memory = description["panels"]
    found = {}
    for key, panel in (("first", first), ("memory-ratio", memory)):
        if panel["points"]:
            found[key] = _ratios(panel)
    if any(arm["by_category"] or arm["problem"] for arm in description["memory"]["arms"]):
        found["memory"] = _stack(description["memory"])
    if len(description["overlay"]) > 1:
        found["overlay"] = _overlay(description["overlay"])
    if description["drift"]:
        found["drift"] = _rounds(description["drift"])
    return found


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
    crossover = panel["crossover"]
    if crossover["low"] is not None or crossover["high"] is not None:
        interval = [crossover["low"] or ranks[0], crossover["high"] or ranks[-1]]
        data.append(_area(interval, [low] * 2, [high] * 2, RED, "crossover, 95% interval"))
    elif crossover["rank"] is None and None not in crossover["bracket"]:
        data.append(_area(crossover["bracket"], [low] * 2, [high] * 2, RED, "crossover, between"))
    value = "" if full is None else f": {amount(full, unit)}"
    data.append(_line(ends, [1, 1], GREY, f"full fine-tuning{value}", dash="dash"))
    if panel["beside"]:
        x, y = curve(panel["beside"]["points"])
        data.append(_line(x, y, ORANGE, panel["beside"]["name"], dash="dot", hover="r=%{x:.0f}: %{y:.3f}"))
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
    if capacity and not problems and tallest < NEAR * capacity:
        capacity = None
    scale, unit = (1024, "GiB") if max(tallest, capacity or 0) >= 2000 else (1, "MiB")
    names = [arm["name"] for arm in arms]
    data = [
        {
            "type": "bar",
            "name": category,
            "x": names,
            "y": [arm["by_category"].get(category, 0) / scale for arm in arms],
            "hovertemplate": f"%{{x}}<br>{category}: %{{y:.2f}} {unit}<extra></extra>",
            "marker": {"color": colour},
        }
        for category, colour in STACK.items()
        if any(arm["by_category"].get(category, 0) > 0.001 * tallest for arm in arms)
    ]
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


def _rounds(drift: list[dict]) -> dict:
    palette = (BLUE, ORANGE, GREEN, "#9a72d4", "#d9705e", "#4fb3c9", "#b59a3c", "#c76aa8")
    data = [
        _line(
            list(range(1, len(series["ratio"]) + 1)),
            series["ratio"],
            GREY if series["name"].startswith("full") else palette[number % len(palette)],
            series["name"],
            dash="dot" if series["name"] == "full again" else "solid",
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
    values += [point["ratio"] for point in panel["beside"]["points"]] if panel["beside"] else []
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


# The words ------------------------------------------------------------------------------------------------------------


def _answers(profile: Profile, name: str, several: bool) -> str:
    known = [cost for cost in COSTS if cost in profile.crossover and not (cost == "time" and profile.estimated)]
    label = {"time": "Time", "flops": "FLOPs", "memory": "Memory"}
    cards = "".join(
        f'<div class="card"><span>{label[cost]}: crossover at rank</span>'
        f"<strong>{escape(profile.crossover[cost].short)}</strong>"
        f"<small>{escape(_bare(profile.crossover[cost].sentence(cost)))}</small></div>"
        for cost in known
    )
    heading = f"<h2>{escape(name)}</h2>" if several else ""
    sentences = crossover_sentences(profile)[len(known) :]
    lines = "".join(f"<p>{escape(text)}</p>" for text in (*sentences, *caption(profile).splitlines()))
    work = escape(title(profile)).replace("\n", "<br>")
    return f'<div>{heading}<p class="soft">{work}</p><div class="answers">{cards}</div>{lines}</div>'


def _bare(sentence: str) -> str:
    """Without the cost's name in front."""
    text = sentence.partition(": ")[2]
    return text[0].upper() + text[1:]


def _table(profile: Profile, name: str, several: bool) -> str:
    shown = columns(profile)
    head = "".join(f'<th scope="col"><button>{escape(c.header)}</button></th>' for c in shown)
    rows = []
    for arm in profile.arms:
        kind = "bad" if arm.status != "ok" or (arm.fits and not arm.fits["fits"]) else arm.kind
        cells = "".join(f'<td data-value="{_sorted_by(c.value(arm))}">{escape(c.cell(arm))}</td>' for c in shown)
        rows.append(f'<tr class="{kind}">{cells}</tr>')
    heading = f"<h3>{escape(name)}</h3>" if several else ""
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'{heading}<div class="card scroll">{body}</div>'


def _sorted_by(value) -> str:
    return "" if value is None else repr(float(value))


def _comparison(profiles: list[Profile], names: list[str]) -> str:
    """Arms that the first run shares with others: step time and peak over the first run's."""
    first = {arm.name: arm for arm in profiles[0].arms}
    head = "".join(f"<th scope='col'><button>{escape(text)}</button></th>" for text in _comparison_head(names))
    rows = []
    for name, arm in first.items():
        cells = [(name, float("inf") if arm.rank is None else arm.rank)]
        for field in ("step_ms", "peak_MiB"):
            own = getattr(arm, field)
            cells.append(("–" if own is None else amount(own, ""), own))
            for profile in profiles[1:]:
                other = next((getattr(o, field) for o in profile.arms if o.name == name), None)
                ratio = None if own is None or other is None else other / own
                text = "–" if other is None else amount(other, "") + ("" if ratio is None else f" (×{ratio:.2f})")
                cells.append((text, other))
        body = "".join(f'<td data-value="{_sorted_by(value)}">{escape(text)}</td>' for text, value in cells)
        rows.append(f'<tr class="{arm.kind}">{body}</tr>')
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    differ = different_work(profiles)
    warning = "".join(
        f'<li class="differs">{escape(key)}: {escape(" / ".join(map(_value, values)))}</li>'
        for key, values in differ.items()
    )
    note = f"<p>These runs did different work, so that their numbers answer different questions:</p><ul>{warning}</ul>"
    return f'<h2>Side by side</h2>{note if differ else ""}<div class="card scroll">{table}</div>'


def _comparison_head(names: list[str]) -> list[str]:
    return ["arm", *(f"{what}, {name}" for what in ("step ms", "peak MiB") for name in names)]


def _why(profile: Profile) -> str:
    lines = advise(profile)
    lines += [f"{arm.name}: {reason(arm)}" for arm in profile.arms if arm.error]
    lines += [f"Note: {note}" for note in profile.notes]
    items = "".join(f"<li>{escape(text)}</li>" for text in lines)
    return f'<div class="card">{f"<ul>{items}</ul>" if items else "The numbers name no single cause."}</div>'


def _settings(profiles: list[Profile]) -> str:
    """Each run's workload and environment; what differs between runs is marked."""
    several = len(profiles) > 1
    parts = []
    for profile in profiles:
        lists = []
        for heading, field in (("Settings", "workload"), ("Environment", "environment")):
            rows = ""
            for key, value in getattr(profile, field).items():
                differs = several and any(getattr(other, field).get(key) != value for other in profiles)
                rows += f"<dt>{escape(key)}</dt><dd{' class=differs' if differs else ''}>{escape(_value(value))}</dd>"
            lists.append(f"<details{' open' if several else ''}><summary>{heading}</summary><dl>{rows}</dl></details>")
        parts.append(f'<div class="card">{"".join(lists)}</div>')
    return "".join(parts)


def _value(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value))
    if isinstance(value, float):
        return f"{value:,.6g}"
    return "–" if value is None else str(value)


def _method(estimated: bool) -> str:
    if estimated:
        return (
            "Predicted: one training step with AdamW was traced for every arm on tensors that have shapes and no "
            "memory, through the layers that would run, at two depths that are extended to the model's on a straight "
            "line. Bytes are those of all tensors at the step's peak; the CUDA context and fragmentation are not in "
            "them. A multiply-add is two FLOPs. Nothing was timed."
        )
    return (
        "Measured: an arm is one training step with AdamW, of LoRA at a rank or of all parameters. Memory: a fresh "
        "process for each arm, a tracker that sees every tensor, the peak split by what it holds. Time: one process in "
        "which the arms share the base weights and step in randomized rounds; a ratio is the median over rounds of the "
        "arm's step over full fine-tuning's in the same round, with a 95% interval from resampled rounds. A second "
        "copy of full fine-tuning runs among the arms; how far its ratio's interval reaches from 1 is the noise floor. "
        "A crossover is where the ratios, made non-decreasing in the rank, pass 1, on a straight line in r."
    )
