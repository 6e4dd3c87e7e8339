"""Profiles, and a decision between ranks, as one self-contained web page; `html_charts` draws its charts.

The page holds plotly.js, its data, style and script in itself, and a content security policy that lets it ask no
server for anything. The tables are in the markup, so that they are there without JavaScript too."""

import json
from html import escape
from pathlib import Path

from lora_fast.profiler.advice import advise
from lora_fast.profiler.crossover import COSTS
from lora_fast.profiler.html_charts import figures, layer_lines, loss_curve
from lora_fast.profiler.profile import NotWritten, Profile
from lora_fast.profiler.report import amount, chart, draw_png
from lora_fast.profiler.runs import RunFolder
from lora_fast.profiler.table import caption, columns, crossover_sentences, reason, title

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
# What makes two runs' numbers comparable: the same work. Machines, versions and methods may differ, and are listed.
WORK = (
    *("model", "parameters", "dtype", "batch_size", "seq_len", "target_modules", "exclude_modules"),
    *("target_parameters", "adapter_dtype", "use_dora"),
    *("lora_dropout", "gradient_accumulation", "gradient_checkpointing", "attn_implementation", "optimizer", "foreach"),
    *("quantize", "shards"),
)
# What runs did that say nothing of it, having been made before there was a choice.
_BEFORE = {"shards": 1, "use_dora": False}
# Settings of which None is a value.
_NONE_IS_KNOWN = ("exclude_modules", "target_parameters", "quantize")


def write_results(folder: RunFolder, profile: Profile) -> None:
    """arms.jsonl, rank_cost.png, report.html and, by which a run has ended, run.json. Raises NotWritten, which holds
    the profile, where the system refuses one of them."""
    try:
        folder.write_arms([arm.to_dict() for arm in profile.arms])
        folder.write_chart(draw_png(chart(profile)))
        folder.write("report.html", page([profile]))
        folder.write_run(profile.to_dict())
    except OSError as error:
        raise NotWritten(profile, error) from error


def different_work(profiles: list[Profile]) -> dict[str, list]:
    """The settings of WORK in which the runs differ, with each run's value. A setting that an older run did not record
    is not known to differ, but for those of `_BEFORE`."""
    found = {}
    for name in WORK:
        values = [profile.workload.get(name, _BEFORE.get(name)) for profile in profiles]
        given = [json.dumps(value) for value in values if value is not None or name in _NONE_IS_KNOWN]
        if len(set(given)) > 1:
            found[name] = values
    return found


def page(profiles: list[Profile], names: list[str] | None = None, decision: dict | None = None) -> str:
    """The whole document. names: what each run is called where there are several. decision: what
    `lora_fast.decision.section` returned; the page then begins with it, and needs no profile."""
    names = names or [profile.workload["model"] for profile in profiles]
    heading = "What each LoRA rank costs" + (", compared" if len(profiles) > 1 else "")
    script, missing = _plotly()
    sections, charts = [missing], []
    if decision is not None:
        sections += _decision(decision, charts)
        sections += [f"<h2>{heading}</h2>"] if profiles else []
        heading = decision["title"]
    if profiles:
        sections += _profiles(profiles, names, charts)
    folder = Path(__file__).parent
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{": ".join([heading, *map(escape, [", ".join(names)] if names else [])])}</title>
<style>{(folder / "report.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
<h1>{heading}</h1>
{chr(10).join(sections)}
</main>
<script id="charts" type="application/json">{_embedded(charts)}</script>
<script>{script}</script>
<script>{(folder / "report.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _profiles(profiles: list[Profile], names: list[str], charts: list[dict]) -> list[str]:
    """Sections; their charts are added to charts."""
    several = len(profiles) > 1
    drawn = _drawn(profiles)
    cards = "".join(_card(key, drawn, names) for key in CAPTIONS if any(key in run for run in drawn))
    charts += [_placed(f"run{number}-{key}", run[key]) for number, run in enumerate(drawn) for key in run]
    runs = f'<div class="runs" style="--runs: {len(profiles)}">'
    return [
        runs + "".join(_answers(p, name, several) for p, name in zip(profiles, names, strict=True)) + "</div>",
        _comparison(profiles, names) if several else "",
        f'<h2>Charts</h2><div class="charts runs-{len(profiles)}" style="--columns: {max(2, len(profiles))}">'
        f"{cards}</div>",
        "<h2>All arms</h2>" + "".join(_table(p, names[n], several) for n, p in enumerate(profiles)),
        "<h2>Why costs are as they are</h2>" + runs + "".join(_why(p) for p in profiles) + "</div>",
        "<h2>Settings and environment</h2>" + runs + _settings(profiles) + "</div>",
        f"<h2>Method</h2>{''.join(f'<p>{text}</p>' for text in dict.fromkeys(map(_method, profiles)))}",
    ]


def _placed(place: str, figure: dict) -> dict:
    return {"id": place, "data": figure["data"], "layout": figure["layout"]}


def _decision(decision: dict, charts: list[dict]) -> list[str]:
    """Sections; their chart is added to charts."""
    curve = decision["curve"]
    figure = None if curve is None else loss_curve(curve)
    parts = [
        f'<p class="answer">{escape(decision["answer"])}</p>',
        f'<p class="soft">How sure: {escape(decision["sure"])} ({decision["confidence"]:.2f} of 1).</p>',
    ]
    if figure is not None:
        charts.append(_placed("decision", figure))
        note = f"{escape(curve['verdict'])}; noise between seeds: "
        note += "not known" if curve["noise"] is None else f"{curve['noise']:.2g} (standard deviation)"
        parts.append(
            f'<figure class="card"><h3>{figure["title"]}</h3><div class="chart" id="decision"></div>'
            f"<figcaption>The search says: {note}.</figcaption></figure>"
        )
    following = decision["next"]
    if following is None:
        parts.append("<p>Nothing that could be measured next would change this answer.</p>")
    else:
        parts.append(
            f'<div class="card"><h3>Measure next: {escape(following["what"])}</h3><p>What it would say: '
            f"{escape(following['why'])}.</p><p><code>{escape(following['command'])}</code></p></div>"
        )
    parts.append(_indicators(decision["indicators"]))
    if decision["disagreements"]:
        items = "".join(f"<li>{escape(text)}</li>" for text in decision["disagreements"])
        parts.append(f'<div class="card"><h3>Against it</h3><ul>{items}</ul></div>')
    return parts


def _indicators(indicators: list[dict]) -> str:
    sources = list(dict.fromkeys(found["source"] for found in indicators))
    rows = ""
    for found in indicators:
        number = sources.index(found["source"]) + 1
        value = found["value"] if found["sure"] else "–"
        cells = (f"{found['name']} [{number}]", value, found["threshold"], found["verdict"], found["says"])
        body = "".join(f"<td>{escape(cell)}</td>" for cell in (*cells, f"{found['sure']:.2f}"))
        rows += f"<tr{'' if found['sure'] else ' class=soft'}>{body}</tr>"
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("indicator", "value", "threshold", "speaks for", "why", "sure")
    )
    notes = "".join(f"<li>{escape(source)}</li>" for source in sources)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<h3>The evidence</h3><div class="card scroll words">{table}</div><ol class="soft">{notes}</ol>'


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
        return (
            "",
            '<p class="card">The charts need plotly: <code>pip install plotly</code>, then the command again.</p>',
        )
    return get_plotlyjs(), ""


def _embedded(data) -> str:
    """JSON that cannot end the script element which holds it."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


# The charts -----------------------------------------------------------------------------------------------------------

CAPTIONS = {
    "first": "Ratio to full fine-tuning; below 1 LoRA is cheaper. The diamond is the crossover.",
    "memory-ratio": "Ratio to full fine-tuning's peak.",
    "memory": "At each arm's peak, by what it is.",
    "phases": "At the peak within the forward, the backward and the optimizer's step.",
    "overlay": "Each cost has a crossover of its own, where its line passes 1.",
    "layers": "A step of one layer, forward and backward, over that of the layer with its weight trained.",
    "drift": "Each step over its arm's median: what moves all lines together is the machine, and cancels in ratios.",
}


def _drawn(profiles: list[Profile]) -> list[dict[str, dict]]:
    """Each run's figures, with the same scale for the same chart of all runs."""
    drawn = [figures(chart(profile)) for profile in profiles]
    for run, profile in zip(drawn, profiles, strict=True):
        if any(row["status"] == "ok" for row in profile.layers or ()):
            run["layers"] = layer_lines(profile.layers)
    for key in CAPTIONS:
        axes = [run[key]["layout"]["yaxis"] for run in drawn if key in run]
        units = {axis["title"]["text"] for axis in axes}
        if len(axes) > 1 and len(units) == 1:
            low, high = min(axis["range"][0] for axis in axes), max(axis["range"][1] for axis in axes)
            for axis in axes:
                axis["range"] = [low, high]
    return drawn


# The words ------------------------------------------------------------------------------------------------------------


def _answers(profile: Profile, name: str, several: bool) -> str:
    known = [cost for cost in COSTS if cost in profile.crossover and not (cost == "time" and profile.estimated)]
    cards = "".join(
        f'<div class="card"><span>{escape(COSTS[cost][0].upper() + COSTS[cost][1:])}: crossover at rank</span>'
        f"<strong>{escape(profile.shown_crossover(cost).short)}</strong>"
        f"<small>{escape(_bare(profile.shown_crossover(cost).sentence(cost)))}</small></div>"
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


def _method(profile: Profile) -> str:
    if profile.estimated:
        return (
            "Predicted: one training step was traced for every arm on tensors that have shapes and no memory, through "
            "the layers that would run, at two depths; from these each number, and memory moment by moment, is "
            "extended to the model's depth on a straight line. Bytes are those of all tensors at the step's peak; the "
            "CUDA context and fragmentation are not in them. A multiply-add is two FLOPs. Nothing was timed."
        ) + (
            " Projected time: of every launch of the step the longer of two times, that of its FLOPs at the GPU's peak "
            "rate and that of the bytes that it reads and writes at the peak bandwidth, added up (roofline; Williams, "
            "Waterman and Patterson 2009). It is the least that the step can take: no program reaches the peaks, and "
            "a small model waits for its host, which is not in it."
            if any(arm.projected_ratio is not None for arm in profile.arms)
            else ""
        )
    return (
        "Measured: an arm is one training step, of LoRA at a rank or of all parameters. Memory: a fresh "
        "process for each arm, a tracker that sees every tensor, the peak split by what it holds. Time: one process in "
        "which the arms share the base weights and step in randomized rounds; a ratio is the median over rounds of the "
        "arm's step over full fine-tuning's in the same round, with a 95% interval from resampled rounds. A second "
        "copy of full fine-tuning (of the smallest rank, where there is no room) runs among the arms; how far its "
        "ratio's interval reaches from 1 is the noise floor. A crossover is where the ratios, made non-decreasing in "
        "the rank, pass 1, on a straight line in r."
    ) + (
        " Utilization is the step's FLOPs a second over what a large matrix product reached before the rounds; "
        "full-equivalent utilization counts full fine-tuning's FLOPs in the arm's time, so that of two arms the faster "
        "one has more of it."
        if any(arm.executed_utilization is not None for arm in profile.arms)
        else ""
    )
