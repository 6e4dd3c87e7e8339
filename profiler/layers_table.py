"""Times of single layers for people on a terminal: a row per shape, a column per rank."""

from rich import box
from rich.table import Table

from lora_fast.profiler.profile import Profile


def layers_table(profile: Profile) -> Table:
    """Each cell: the adapted layer's time over the frozen one's, and over that of one whose weight is trained."""
    rows = profile.layers or []
    shapes = list(dict.fromkeys((row["in_features"], row["out_features"]) for row in rows))
    ranks = list(dict.fromkeys(row["rank"] for row in rows))
    floor = max((row.get("noise_floor", 0.0) for row in rows), default=0.0)
    table = Table(
        title=f"Layers by themselves: forward and backward of {rows[0]['tokens']:,} tokens" if rows else "Layers",
        caption="At each rank: over the frozen layer's time / over that with the weight trained; below 1 the adapter "
        f"is cheaper. Two equal arms differed by up to {floor:.1%}; intervals are in run.json.",
        box=box.SIMPLE,
        title_style="bold",
        title_justify="left",
        caption_justify="left",
    )
    for header in ("layer", "in → out", "×", "frozen ms", "dense ms"):
        table.add_column(header, justify="left" if header == "layer" else "right")
    for rank in ranks:
        table.add_column(f"r{rank}", justify="right", no_wrap=True)
    for shape in shapes:
        own = {row["rank"]: row for row in rows if (row["in_features"], row["out_features"]) == shape}
        first = own[ranks[0]]
        measured = next((row for row in own.values() if "frozen_ms" in row), None)
        bases = ["–", "–"] if measured is None else [f"{measured[of]:.3g}" for of in ("frozen_ms", "dense_ms")]
        table.add_row(
            " ".join(first["names"]),
            f"{shape[0]:,} → {shape[1]:,}",
            str(first["modules"]),
            *bases,
            *(_cell(own[rank]) for rank in ranks),
        )
    return table


def _cell(row: dict) -> str:
    if row["status"] != "ok":
        return row["status"]
    return f"{row['ratio_to_frozen']:.2f} / {row['ratio_to_dense']:.2f}"
