"""How far the rank that one training's spectrum suggests is from the rank that training at many ranks finds.

benchmarks/bench_one_run_rank.py SEARCH [--out DIR], SEARCH a folder of `lora-fast rank search --keep-adapters`. Each
rule reads the adapter of the highest rank and names a rank; its distance to the grid's answer is counted in doublings,
and what following it would have cost in held-out loss is read off the grid. One rule evaluates too: it truncates the
adapter and takes the smallest rank whose loss is within the noise."""

import argparse
import csv
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from harness import RESULTS, provenance
from torch import Tensor

from lora_fast import adapter_spectra, load_adapter, readings, resize_adapter
from lora_fast.decision_inputs import Curve, curve_of
from lora_fast.profiler import models, rank_run, text_data
from lora_fast.profiler.rank_curve import read_search
from lora_fast.spectrum import LARGE, SATURATED, Spectrum

COLUMNS = (
    *("commit", "gpu", "torch", "model", "steps", "R", "seed", "rule", "predicted", "predicted_rank"),
    *("grid_rank", "grid_verdict", "doublings", "loss_above_best", "noise"),
)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def rules(spectra: Sequence[Spectrum]) -> dict[str, float]:
    """{rule: the rank that it names}, not rounded. Layers have ranks of their own; the median layer's is taken, and
    where a rule is about all of the updates' energy, the neediest layer's too."""
    r = spectra[0].rank
    large = [int((s.singular_values >= LARGE * s.spectral_norm).sum()) for s in spectra]
    saturation = next(reading for reading in readings(spectra) if reading.rule == "saturation")
    found = {f"guide: singular values from {LARGE:g} σ₁ on, median layer": median(large)}
    for q in (0.9, 0.95, 0.99):
        needed = [s.energy_rank(q) for s in spectra]
        found[f"r{q * 100:.0f}, median layer"] = median(needed)
        found[f"r{q * 100:.0f}, neediest layer"] = max(needed)
    found["effective rank, median layer"] = median([s.effective_rank for s in spectra])
    found["stable rank, median layer"] = median([s.stable_rank for s in spectra])
    found[f"saturation (effective rank ≥ {SATURATED:g} r: twice r, else r)"] = (
        2 * r if saturation.verdict == "too small" else r
    )
    return found


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, rows: Tensor, batch_size: int) -> float:
    """Mean cross-entropy in nats a token."""
    model.eval()
    sums = [model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(batch_size)]
    return sum(sums) / len(rows)


def truncated(folder: Path, base: Path, rank: int, seed: int, rows: Tensor, batch_size: int) -> dict[int, float]:
    """{k: held-out loss of that adapter truncated to rank k}, k = 1, 2, 4 … rank."""
    adapter, source = folder / "trainings" / f"r{rank}-seed{seed}", models.resolve(str(base))
    losses = {}
    with tempfile.TemporaryDirectory() as scratch:
        for k in (2**e for e in range(rank.bit_length())):
            small = adapter
            if k < rank:
                small = Path(scratch, str(k))
                resize_adapter(adapter, small, rank=k)
            model = models.build(source, device="cpu", dtype=torch.float32)
            load_adapter(model, small)
            losses[k] = held_out_loss(model, rows, batch_size)
    return losses


def held_out_rows(found: Mapping, recipe: Mapping, base: Path) -> Tensor:
    """The sequences that the search evaluated on, read again. Stops where they are others here."""
    if found["model"]["example"]:
        _, text = rank_run.example_texts()
        encoder = text_data.BYTES
    else:
        text = text_data.read_text(found["data"]["eval"]["file"])
        encoder = text_data.encoder_of(models.resolve(str(base)))
    if text.digest != found["data"]["eval"]["digest"]:
        raise SystemExit(f"{text.name} is not the text that the search was evaluated on")
    ids = text_data.token_ids(text, encoder, found["model"]["vocab_size"])
    return text_data.spread(text_data.blocks(ids, recipe["seq_len"], text.name), found["data"]["eval"]["sequences"])


def loss_at(curve: Curve, rank: float) -> float:
    """The grid's mean loss there, on straight lines in log r between the ranks tried; at the ends, theirs."""
    ranks = list(curve.ranks)
    rank = min(max(rank, ranks[0]), ranks[-1])
    below = max(r for r in ranks if r <= rank)
    above = min(r for r in ranks if r >= rank)
    low, high = curve.ranks[below].mean, curve.ranks[above].mean
    return low if below == above else low + (high - low) * math.log(rank / below) / math.log(above / below)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("search", type=Path, help="folder of lora-fast rank search --keep-adapters")
    parser.add_argument("--out", type=Path, default=RESULTS / "rank_quality", help="where one_run.csv goes")
    args = parser.parse_args(argv)
    found = read_search(args.search)
    curve, recipe = curve_of(found), found["recipe"]
    ranks = list(curve.ranks)
    grid, best, highest = curve.sufficient(ranks), curve.best(ranks), ranks[-1]
    settings = json.loads((args.search / rank_run.PLAN).read_text(encoding="utf-8"))
    base = args.search / "base" if found["model"]["example"] else Path(settings["model"]["location"])
    rows = held_out_rows(found, recipe, base)
    shared = provenance(torch.device("cpu")) | {
        "model": found["model"]["name"],
        "steps": recipe["steps"],
        "R": highest,
        "grid_rank": grid,
        "grid_verdict": found["search"]["verdict"],
        "noise": f"{curve.noise:.5f}",
    }
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "one_run.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for seed in found["seeds"]:
            adapter = args.search / "trainings" / f"r{highest}-seed{seed}"
            said = rules(list(adapter_spectra(adapter).values()))
            losses = truncated(args.search, base, highest, seed, rows, recipe["batch_size"])
            # Of one training there is no noise between seeds; the search's is lent to this rule.
            within = [k for k, loss in losses.items() if loss - losses[highest] <= curve.margin(highest, highest)]
            said["truncated and evaluated, within the noise"] = min(within)
            for rule, value in said.items():
                rank = max(1, round(value))
                row = shared | {
                    "seed": seed,
                    "rule": rule,
                    "predicted": f"{value:.4g}",
                    "predicted_rank": rank,
                    "doublings": f"{math.log2(rank / grid):+.2f}",
                    "loss_above_best": f"{loss_at(curve, rank) - curve.ranks[best].mean:.4f}",
                }
                writer.writerow(row)
                print(f"seed {seed}  {rule:58} r={rank:<4} {row['doublings']} doublings of r={grid}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
