"""Which rule for the scaling lets one learning rate suit all ranks: bench_rank_scaling.py SEARCH [--out DIR].

On the small example of `lora-fast rank search` (SEARCH is its folder, for the base model), every rule at low and high
ranks and two rates. Under the best rule some one rate costs no rank much; under another, a curve of loss against rank
shows the rate's misfit instead of the rank."""

import argparse
import csv
import sys
from pathlib import Path

import torch
from harness import RESULTS, provenance

from lora_fast.profiler import models, rank_run
from lora_fast.profiler.rank_trainer import SCALINGS, Recipe, train_rank

RANKS, RATES, SEED = (1, 8, 64), (2e-3, 6e-3), 0
COLUMNS = ("commit", "gpu", "torch", "steps", "scaling", "learning_rate", "R", "seed", "loss", "above_best")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("search", type=Path, help="a folder of lora-fast rank search without --model")
    parser.add_argument("--steps", type=int, default=rank_run.EXAMPLE["steps"])
    parser.add_argument("--out", type=Path, default=RESULTS / "rank_quality", help="where scaling.csv goes")
    args = parser.parse_args(argv)
    plan = rank_run.plan_search(device="cpu", steps=args.steps, out=args.out / "unused")
    base, rows = models.resolve(str(args.search / "base")), []
    for scaling in SCALINGS:
        for rate in RATES:
            fields = rank_run.EXAMPLE | {"steps": args.steps, "learning_rate": rate}
            recipe = Recipe(**fields, full_learning_rate=rate, scaling=scaling)
            for rank in RANKS:
                found = train_rank(base, rank, SEED, recipe, plan.rows, plan.held_out, device="cpu")
                rows.append({"scaling": scaling, "learning_rate": rate, "R": rank, "loss": found.loss})
                print(f"{scaling:9} {rate:g} r={rank:<3} {found.loss:.4f}", flush=True)
    best = {rank: min(row["loss"] for row in rows if row["R"] == rank) for rank in RANKS}
    args.out.mkdir(parents=True, exist_ok=True)
    shared = provenance(torch.device("cpu")) | {"steps": args.steps, "seed": SEED}
    with (args.out / "scaling.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            above = f"{row['loss'] - best[row['R']]:.4f}"
            writer.writerow(shared | row | {"loss": f"{row['loss']:.4f}", "above_best": above})
    return 0


if __name__ == "__main__":
    sys.exit(main())
