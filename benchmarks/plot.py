"""Draws the CSV files of the GPU benchmarks: benchmarks/plot.py [DIR …] writes a PNG beside each CSV.

DIR is a folder of results, by default every one in benchmarks/results that has such files. A row of a chart is a case,
a dot an arm's time over the frozen layers' with its 95% interval; the grey band is what the A/A arm makes of two equal
things. Of a file with many cases those of one rank are drawn (--rank), so that a chart stays readable; 0 draws all."""

import argparse
import csv
import sys
from collections import defaultdict
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
OPS = ("lora_linear", "qkv", "mlp", "grouped", "train_step")
FROZEN, AGAIN, PLAIN = "frozen", "frozen again", "lora_fast GEMM without adapters"
TITLES = {
    "lora_linear": "Linear layer with LoRA",
    "qkv": "q, k and v with LoRA",
    "mlp": "SwiGLU MLP with LoRA",
    "grouped": "Several adapters in one batch",
    "train_step": "Training step of Llama-3-8B-shaped layers",
}
# Ours in blues, the others in warm colours and greys.
OURS = ("#0b3c8c", "#1f77b4", "#5aa2e0", "#17becf", "#7fb6c9", "#2a9d8f")
OTHERS = ("#d62728", "#ff7f0e", "#8c564b", "#e377c2", "#bcbd22", "#7f7f7f")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def case_of(row: dict[str, str]) -> str:
    name = f"{row['M']} × {row['K']} → {row['N']}, r={row['R']}"
    if row.get("segments"):
        name += f"\nrows {row['segments']}"
    return name if float(row["dropout"] or 0) == 0 else f"{name}, p={row['dropout']}"


def colours(providers: list[str]) -> dict[str, str]:
    ours = [name for name in providers if name.startswith("lora_fast")]
    others = [name for name in providers if name not in ours]
    ours = [name for name in ours if name != PLAIN]
    picked = {name: OURS[i % len(OURS)] for i, name in enumerate(ours)}
    return {PLAIN: "black"} | picked | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}


def draw(rows: list[dict[str, str]], path: Path, rank: int = 0) -> None:
    """One chart of the rows of one CSV file into the PNG `path`."""
    timed = [row for row in rows if row["ratio_to_frozen"]]
    chosen = [row for row in timed if row["R"] == str(rank)] if rank else timed
    chosen = chosen or timed  # none of that rank: grouped batches have several
    cases: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in chosen:
        cases[case_of(row)].append(row)
    providers = list(dict.fromkeys(row["provider"] for row in chosen if row["provider"] not in (FROZEN, AGAIN)))
    colour = colours(providers)
    named: set[str] = set()
    from matplotlib import pyplot as plt  # not above: make gpu runs where there may be no matplotlib

    plt.switch_backend("Agg")
    figure, axes = plt.subplots(figsize=(10, 1.8 + 0.75 * len(cases)), layout="constrained")
    for place, of_case in enumerate(cases.values()):
        for row in of_case:
            low, middle, high = (float(row[c]) for c in ("ratio_low", "ratio_to_frozen", "ratio_high"))
            if row["provider"] == AGAIN:
                axes.fill_betweenx([place - 0.45, place + 0.45], low, high, color="#cccccc", linewidth=0)
            elif row["provider"] != FROZEN:
                offset = 0.8 * (providers.index(row["provider"]) + 0.5) / len(providers) - 0.4
                errors = [[middle - low], [high - middle]]
                label = "" if row["provider"] in named else row["provider"]  # once for the legend
                named.add(row["provider"])
                style = {"fmt": "o", "ms": 4, "color": colour[row["provider"]], "label": label}
                axes.errorbar(middle, place + offset, xerr=errors, **style)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), list(cases))
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.set_xlabel("time / time of the frozen layers' forward and dX")
    first = rows[0]
    axes.set_title(f"{TITLES.get(first['op'], first['op'])}, {first['dtype']}, {first['gpu']}, torch {first['torch']}")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR")
    parser.add_argument("--rank", type=int, default=16, help="cases of this rank; 0: all")
    args = parser.parse_args(argv)
    drawn = 0
    for folder in args.folders or sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        for op in OPS:
            source = folder / f"{op}.csv"
            if not source.exists():
                continue
            rows = read(source)
            if not any(row["ratio_to_frozen"] for row in rows):
                print(f"{source}: no timed row")
                continue
            draw(rows, source.with_suffix(".png"), args.rank)
            print(f"wrote {source.with_suffix('.png')}")
            drawn += 1
    if not drawn:
        print("no CSV file of a GPU benchmark with a timed row was found", file=sys.stderr)
    return 0 if drawn else 2


if __name__ == "__main__":
    sys.exit(main())
