"""The document of a rank search (search.json) as a table, and as a chart: held-out loss against rank, with the noise
between seeds."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_fast import LoraFastError
from lora_fast.profiler.figures import png
from lora_fast.profiler.report import BLUE, GREY, RED
from lora_fast.profiler.table import si
from lora_fast.rank_search import FULL, SIGNIFICANT

FILE = "search.json"


def read_search(path: str | Path) -> dict:
    """The document of a search's folder, or of its search.json. Raises LoraFastError for what is none."""
    path = Path(path).expanduser()
    file = path / FILE if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        found["search"]["points"], found["ranks"], found["recipe"]["steps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoraFastError(f"{file} is not what lora-fast rank search writes ({type(error).__name__})") from None
    return found


def title(found: Mapping[str, Any]) -> str:
    """Model, data and recipe in one line."""
    model, recipe = found["model"], found["recipe"]
    return (
        f"{model['name']} ({si(model['parameters'])} parameters), {recipe['dtype']}, {recipe['steps']} steps of "
        f"{recipe['tokens_per_step']:,} tokens ({found['data']['epochs']:.2g} epochs), {_modules(recipe)}, AdamW"
    )


def _modules(recipe: Mapping[str, Any]) -> str:
    targets = recipe["target_modules"]
    return targets if isinstance(targets, str) else ",".join(targets)


def print_search(found: Mapping[str, Any], console) -> None:
    """Title, a row per rank, how it was trained, what failed, the verdict."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    say = lambda text: console.print(text, soft_wrap=False, highlight=False, markup=False)  # noqa: E731
    search, recipe, data = found["search"], found["recipe"], found["data"]
    say(title(found))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name, side in (
        *(("rank", "right"), ("trained", "right"), ("held-out loss", "right"), ("± seeds", "right")),
        *(("above best", "right"), ("trainings", "right"), ("seconds", "right"), ("its curve says", "left")),
    ):
        table.add_column(name, justify=side)
    for row in found["ranks"]:
        chosen = row["rank"] == search["best_rank"]
        cells = (
            str(row["rank"]),
            si(row["trained"]) if row["trained"] else "–",
            f"{row['mean']:.4f}",
            "–" if row["spread"] is None else f"{row['spread']:.4f}",
            _above(row),
            str(len(row["values"])),
            "–" if row["seconds"] is None else f"{row['seconds']:.0f}",
            row["reading"]["verdict"] if row["reading"] else "–",
        )
        table.add_row(*map(Text, cells), style="bold" if chosen else None)
    console.print(table)
    share = recipe["full_learning_rate"] / recipe["learning_rate"]
    say(
        f"Trained on {data['train']['file']} ({si(data['train']['tokens'])} tokens of {data['tokenizer']}), evaluated "
        f"on {data['eval']['sequences']} sequences of {data['eval']['file']}, in nats a token."
    )
    source = f", by {recipe['full_learning_rate_source']}" if recipe["full_learning_rate_source"] else ""
    say(
        f"Learning rate {recipe['learning_rate']:g} at every rank, scaling {recipe['scaling_says']}; full fine-tuning "
        f"{recipe['full_learning_rate']:g} (× {share:.2g}{source})."
    )
    for trial in search["trials"]:
        if trial["value"] is None:
            reason = f": {trial['error']}" if trial["error"] else ""
            say(f"No value: rank {trial['rank']}, seed {trial['seed']}, {trial['status']}{reason}")
    if data["same_text"]:
        say("Note: the two texts are one, so this is how well each rank memorizes")
    if found["model"]["weights"] == "random":
        say("Note: the model's weights are random: this is pretraining, not fine-tuning")
    say(f"{len(search['trials'])} trainings took {search['cost_s'] / 60:.1f} minutes.")
    say(f"Verdict: {search['verdict']}. {search['sentence']}")


def _above(row: Mapping[str, Any]) -> str:
    """How far above the best rank, and whether that is more than noise."""
    if row["above_best"] == 0:
        return "best"
    if row["margin"] is None:
        return f"{row['above_best']:+.4f}"
    return f"{row['above_best']:+.4f}{'  ' if abs(row['above_best']) > row['margin'] else ' ≈'}"


def draw_png(found: Mapping[str, Any]) -> bytes:
    """Held-out loss against rank: a point per training, the means' line, full fine-tuning as a line, and the band in
    which a mean can't be told from the best rank's."""
    # The object interface, not pyplot: no global state, and no window system is asked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    search = found["search"]
    figure.suptitle(title(found), fontsize=9.5, x=0.012, ha="left")
    rows = [row for row in found["ranks"] if row["rank"] != FULL]
    full = next((row for row in found["ranks"] if row["rank"] == FULL), None)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(True, color="#e3e3e3", linewidth=0.7)
    axes.set_axisbelow(True)
    if rows:
        ranks = [row["rank"] for row in rows]
        best = min(rows, key=lambda row: row["mean"])
        axes.set_xscale("log", base=2)
        axes.set_xlim(ranks[0] / math.sqrt(2), ranks[-1] * math.sqrt(2))
        if search["noise"] is not None:
            margin = SIGNIFICANT * search["noise"] * math.sqrt(2 / len(best["values"]))
            label = f"as good as r={best['rank']} but for noise: ±{margin:.2g}"
            axes.axhspan(
                best["mean"] - margin, best["mean"] + margin, color=BLUE, alpha=0.13, linewidth=0, label=label, zorder=1
            )
        axes.plot(ranks, [row["mean"] for row in rows], color=BLUE, linewidth=1.8, label="LoRA, mean", zorder=4)
        spots = [(row["rank"], value) for row in rows for value in row["values"]]
        axes.plot(*zip(*spots), color=BLUE, marker="o", markersize=4, linestyle="none", label="a training", zorder=5)
        axes.xaxis.set_major_locator(FixedLocator(ranks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if full is not None:
        axes.axhline(full["mean"], color=GREY, linewidth=1.5, linestyle="--", label="full fine-tuning, mean", zorder=2)
        for value in full["values"]:
            axes.axhline(value, color=GREY, linewidth=0.6, linestyle=":", zorder=2)
    if search["best_rank"] not in (None, FULL):
        axes.axvline(
            search["best_rank"], color=RED, linewidth=1.2, linestyle=":", label=f"r={search['best_rank']} suffices"
        )
    axes.set_xlabel("LoRA rank r (log scale)")
    axes.set_ylabel("held-out loss, nats a token")
    axes.set_title(f"Verdict: {search['verdict']}", fontsize=10, loc="left", fontweight="bold")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", fontsize=8.5, framealpha=1, edgecolor="#dddddd")
    return png(figure)
