"""Writes README's tables from the files that commands wrote.

benchmarks/readme.py [--run DIR] [--estimate DIR] [--svd DIR] [--search DIR] [--check]

A block between `<!-- NAME -->` and `<!-- /NAME -->` is replaced by what the function of that name returns. --run takes
a run of `lora-fast profile` as the one that README shows, --estimate one of `lora-fast estimate`, --svd one of
`lora-fast svd` on an adapter of train_adapter.py, --search one of `lora-fast rank search`.
--check changes nothing; it exits with 1 where README differs.
"""

import argparse
import csv
import io
import json
import re
import shutil
import sys
import textwrap
from functools import partial
from pathlib import Path

import gpu_tables
from rich.console import Console

from lora_fast.profiler import Profile, spectra
from lora_fast.profiler.rank_curve import print_search, read_search
from lora_fast.profiler.spectra_table import print_spectra
from lora_fast.profiler.table import print_profile, si

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TABLE_WIDTH = 120


def profile() -> str:
    """What `make profile` printed, from the run.json that it wrote."""
    run = json.loads((RESULTS / "cpu" / "profile.json").read_text(encoding="utf-8"))
    return printed(lambda console: print_profile(Profile.from_dict(run), console))


def estimate() -> str:
    """What README's lora-fast estimate printed, from the run.json that it wrote."""
    run = json.loads((RESULTS / "predicted" / "llama-8b.json").read_text(encoding="utf-8"))
    return printed(lambda console: print_profile(Profile.from_dict(run), console))


def printed(show) -> str:
    text = io.StringIO()
    show(Console(file=text, width=TABLE_WIDTH))
    lines = (line.rstrip() for line in text.getvalue().splitlines())
    return "```text\n" + "\n".join(lines).strip("\n") + "\n```"


def adapter_training() -> str:
    """How the example adapter was trained, from the training.json of train_adapter.py."""
    run = json.loads((RESULTS / "cpu" / "adapter_training.json").read_text(encoding="utf-8"))
    before, after = run["held_out_loss_before"], run["held_out_loss_after"]
    return textwrap.fill(
        f"A Llama of {si(run['parameters'])} parameters was trained on prose for {run['base_steps']} steps of "
        f"{run['tokens_per_step']:,} bytes, then an adapter of rank {run['rank']} on it on code for {run['steps']}. "
        f"The loss on code that it had not seen fell from {before['code']:.2f} to {after['code']:.2f} nats a byte, "
        f"that on prose rose from {before['prose']:.2f} to {after['prose']:.2f}.",
        TABLE_WIDTH,
    )


def spectra_table() -> str:
    """What `lora-fast svd` printed for that adapter, from the spectra.json that it wrote."""
    found = spectra.read(RESULTS / "cpu" / "spectra.json")
    return printed(lambda console: print_spectra(found, console))


def spectra_words() -> str:
    """What the charts of that adapter show, in figures."""
    found = spectra.read(RESULTS / "cpu" / "spectra.json")
    layers = found["layers"]
    falls = [layer["singular_values"][0] / layer["singular_values"][-1] for layer in layers]
    gap = max(layer["gap"]["ratio"] for layer in layers)
    ranks, r90 = found["suggestion"]["ranks"].values(), [layer["r90"] for layer in layers]
    r = layers[0]["rank"]
    n, value, random = found["against"]["diagonal"][-1]
    return textwrap.fill(
        f"In the {len(layers)} updates σ₁ is {min(falls):.0f} to {max(falls):.0f} times σ_{r}, and no singular value "
        f"is more than {gap:.1f} times the next. {min(r90)} to {max(r90)} directions hold 90% of an update's energy, "
        f"{min(ranks)} to {max(ranks)} hold 99%. A second adapter that differs in nothing but its seed shares "
        f"φ({n}, {n}) = {value:.2f} of the input directions with it; two random subspaces share {random:.2f}.",
        TABLE_WIDTH,
    )


# {heading: arm of bench_train_step.py}, each over PEFT's.
TRAIN_STEP_ARMS = {
    "`apply_lora` / PEFT": "lora_fast",
    "`accelerate_peft` / PEFT": "accelerate_peft",
    "PEFT / PEFT (A/A)": "peft again",
    "PEFT with bf16 adapters / PEFT": "peft bf16 adapters",
    "frozen model / PEFT": "frozen",
}
DORA_ARMS = {
    "`apply_lora` / PEFT's DoRA": "lora_fast",
    "`accelerate_peft`": "accelerate_peft",
    "PEFT's DoRA (A/A)": "peft again",
    "our LoRA": "lora_fast without dora",
    "frozen model": "frozen",
}


def train_step(name: str, arms: dict[str, str]) -> str:
    """Our training step against PEFT's, from a CSV of bench_train_step.py."""
    with (RESULTS / "cpu" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cells: dict[tuple[str, str, str], dict[str, dict]] = {}
    for row in rows:
        cells.setdefault((row["dtype"], row["dropout"], row["R"]), {})[row["provider"]] = row
    first = rows[0]
    lines = [
        f"{first['model']}, {first['M']} tokens a step, all-linear, AdamW; {first['gpu']}, torch {first['torch']}, "
        f"peft {first['peft']}; medians of {first['rounds']} paired rounds, [95% interval].",
        "",
        f"| base | dropout | r | {' | '.join(arms)} | kept for backward, MiB: PEFT → ours |",
        "|---" * (4 + len(arms)) + "|",
    ]
    for (dtype, dropout, rank), of in cells.items():
        ratios = " | ".join(_ratio(of.get(arm)) for arm in arms.values())
        kept = f"{of['peft']['saved_MiB']} → {of['lora_fast']['saved_MiB']}"
        lines.append(f"| {dtype} | {dropout} | {rank} | {ratios} | {kept} |")
    return "\n".join(lines)


def _ratio(row: dict | None) -> str:
    return "" if row is None else f"{row['ratio_to_peft']} [{row['ratio_low']}, {row['ratio_high']}]"


def noise() -> str:
    """How far a busy second core moved ratios, from the CSV of bench_noise.py."""
    with (RESULTS / "cpu" / "noise.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    quiet = {row["provider"]: float(row["ratio_to_full"]) for row in rows if row["load"] == "quiet"}
    loaded = [row for row in rows if row["load"] != "quiet"]
    moved = max(abs(float(row["ratio_to_full"]) - quiet[row["provider"]]) for row in loaded)
    apart = max(abs(float(row["sequential_ratio"]) - quiet[row["provider"]]) for row in rows)
    agree = sum(row["agrees"] == "True" for row in loaded)
    return textwrap.fill(
        "Beside a process that keeps another core busy, all the time or in bursts, ratios to full fine-tuning moved by "
        f"at most {moved:.3f}, {agree} of {len(loaded)} within their intervals; arms timed one after the other, not in "
        f"rounds, were up to {apart:.3f} off (`benchmarks/bench_noise.py`).",
        TABLE_WIDTH,
    )


TRAFFIC_OPS = {"lora_linear": "linear", "qkv": "q, k, v", "swiglu_mlp": "SwiGLU MLP"}


def traffic() -> str:
    """What each factoring moves beyond the frozen layers, from the CSV of bench_traffic.py."""
    with (RESULTS / "counted" / "traffic.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    sums: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for row in rows:
        sums.setdefault((row["op"], row["dropout"]), {}).setdefault(row["provider"], []).append(row)
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    columns = [(op, p) for op in TRAFFIC_OPS for p in sorted({row["dropout"] for row in rows})]
    lines = [
        "| | " + " | ".join(f"{TRAFFIC_OPS[op]}, p={float(p):g}" for op, p in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for provider in providers:
        cells = [_passes(sums[column].get(provider, [])) for column in columns]
        lines.append(f"| {provider} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def projection() -> str:
    """The least time of a step on GPUs that aren't here, from the CSV of bench_projection.py."""
    with (RESULTS / "predicted" / "projection.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault((row["gpu"], row["M"], row["dropout"]), {})[row["provider"]] = row
    headers = ("GPU", "tokens a step", "dropout", "full, ms at least", "lora_fast / full", "PEFT / full")
    headers += ("PEFT with bf16 adapters / full",)
    lines = [f"| {' | '.join(headers)} |", "|---" * len(headers) + "|"]
    for (gpu_name, tokens, dropout), arms in cases.items():
        ratios = [arms[name]["ratio_to_full"] for name in ("lora_fast", "peft", "peft bf16 adapters")]
        recomputed = " (checkpointing)" if arms["full"]["checkpointing"] == "True" else ""
        cells = [gpu_name, f"{int(tokens):,}{recomputed}", dropout, f"{float(arms['full']['ms']):,.0f}", *ratios]
        lines.append(f"| {' | '.join(cells)} |")
    rank = next(row["R"] for row in rows if row["R"])
    heading = f"{rows[0]['model']}, bf16, r={rank}, all-linear, AdamW, peft {rows[0]['peft']}; projected, not measured."
    return "\n".join([heading, "", *lines])


HOST_OPS = {"linear": "linear", "qkv": "q, k, v", "swiglu_mlp": "SwiGLU MLP"}
HOST_ARMS = {
    "frozen": "frozen",
    "peft": "PEFT, fp32 adapters",
    "peft bf16 adapters": "PEFT, bf16 adapters",
    "lora_fast apply_lora": "lora_fast",
    "lora_fast accelerate_peft": "PEFT, accelerated",
}


def host() -> str:
    """What a step costs the host, from the CSV files of bench_host.py: of every GPU, else before no driver."""
    files = sorted(path for path in RESULTS.glob("*/host.csv") if path.parent.name != "cpu")
    return "\n\n".join(map(_host, files or [RESULTS / "cpu" / "host.csv"]))


def _host(path: Path) -> str:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    of: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        of.setdefault((row["op"], row["dropout"]), {})[row["provider"]] = row
    first, where = rows[0], "before a driver that does nothing" if rows[0]["driver"] == "none" else "before CUDA"
    lines = [
        textwrap.fill(
            f"{first['gpu']}, torch {first['torch']}, triton {first['triton']}, {where}; µs of a forward and backward, "
            f"medians of {first['rounds']} rounds; [ ] is the 95% interval of the paired ratio.",
            TABLE_WIDTH,
        ),
        "",
        f"| bf16, r={first['R']} | {' | '.join(HOST_ARMS.values())} | its Triton launches | of PEFT's, fp32 adapters |",
        "|---" * (len(HOST_ARMS) + 3) + "|",
    ]
    low, high = (
        pick(float(arms["lora_fast apply_lora"]["ratio_to_peft"]) for arms in of.values()) for pick in (min, max)
    )
    for (op, dropout), arms in of.items():
        ours = arms["lora_fast apply_lora"]
        cells = [f"{float(arms[name]['host_us']):.0f}" for name in HOST_ARMS]
        ratio = f"{float(ours['ratio_to_peft']):.2f} [{float(ours['ratio_low']):.2f}, {float(ours['ratio_high']):.2f}]"
        lines.append(f"| {HOST_OPS[op]}, p={float(dropout):g} | {' | '.join(cells)} | {ours['launches']} | {ratio} |")
    lines += [
        "",
        textwrap.fill(
            f"So where a step waits for the host, our layers take {low:.2f} to {high:.2f} times as long as PEFT's with "
            "fp32 adapters; where it waits for the GPU, what counts is what the kernels move.",
            TABLE_WIDTH,
        ),
    ]
    return "\n".join(lines)


EXPERT_ARMS = {
    "frozen": "frozen",
    "frozen again": "frozen again (A/A)",
    "peft": "PEFT",
    "lora_fast accelerate_peft": "`accelerate_peft`",
    "lora_fast apply_lora": "`apply_lora`",
    "full": "experts trained in full",
}


def experts() -> str:
    """A mixture's block with LoRA on its experts, from the CSV files of bench_experts.py: of the CPU and every GPU."""
    return "\n\n".join(map(_experts, sorted(RESULTS.glob("*/experts.csv"))))


def _experts(path: Path) -> str:
    with path.open(newline="", encoding="utf-8") as file:
        rows = {row["provider"]: row for row in csv.DictReader(file)}
    first, rank = rows["frozen"], rows["peft"]["R"]
    lines = [
        textwrap.fill(
            f"One block of a mixture, {first['experts']} experts of {int(first['hidden']):,} × "
            f"{int(first['intermediate']):,}, {first['experts_a_token']} a token, {int(first['tokens']):,} tokens, "
            f"r={rank}, {first['dtype']}; {first['gpu']}, torch {first['torch']}, peft {first['peft']}; forward and "
            f"backward, medians of {first['rounds']} paired rounds, [95% interval].",
            TABLE_WIDTH,
        ),
        "",
        "| | ms | over the frozen block | kept for backward, MiB |",
        "|---|---|---|---|",
    ]
    for name, shown in EXPERT_ARMS.items():
        row = rows[name]
        ratio = f"{float(row['ratio_to_frozen']):.2f}"
        ratio += "" if name == "frozen" else f" [{float(row['ratio_low']):.2f}, {float(row['ratio_high']):.2f}]"
        lines.append(f"| {shown} | {float(row['ms_p50']):,.0f} | {ratio} | {float(row['saved_MiB']):,.0f} |")
    return "\n".join(lines)


def _passes(rows: list[dict]) -> str:
    """Passes over X and Y of forward and backward together, as "2 X + Y"."""
    if not rows:
        return ""
    totals = {name: sum(float(row[f"extra_{name}"]) for row in rows) for name in "XY"}
    terms = [name if count == 1 else f"{count:.4g} {name}" for name, count in totals.items() if count]
    return " + ".join(terms) or "0"


SVD_ARMS = {
    "lora_fast from the file": "ours from the file",
    "torch Gram + eigh, fp64": "Gram + eigh, fp64",
    "torch QR + SVD, fp64": "QR + SVD, fp64",
    "torch QR + SVD, fp32": "QR + SVD, fp32",
    "svd_lowrank": "`svd_lowrank` of ΔW",
    "dense": "dense SVD of ΔW",
}


NOT_MEASURED = (
    "**Not yet measured on a GPU.** The kernels are tested in Triton's interpreter against float64, in bf16, "
    "fp16 and fp32, and compiled for sm_80 to sm_120 and gfx942: registers, spills and shared memory are tested, time "
    "is not."
)


def gpu() -> str:
    """What `make gpu` measured, on each GPU that there are results of."""
    measured = []
    for folder in gpu_tables.folders(RESULTS):
        measured.append(gpu_tables.tables(folder))
        if rows := gpu_tables.read(folder / "svd.csv"):
            kernels = [
                f"{row['model'].upper()}, r={row['R']}: {row['ms_p50']} ms"
                for row in rows
                if row["provider"] == "lora_fast kernels"
            ]
            alone = f"\n\nKernels alone, on the GPU's clock: {'; '.join(kernels)}." if kernels else ""
            measured.append(f"All singular values of an adapter:\n\n{svd(folder.name)}{alone}")
    return "\n\n".join(measured) or textwrap.fill(NOT_MEASURED, TABLE_WIDTH)


def svd(folder: str = "cpu") -> str:
    """How long all singular values of an adapter take, from the CSV of bench_svd.py."""
    with (RESULTS / folder / "svd.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    of: dict[tuple[str, ...], dict[str, dict]] = {}
    for row in rows:
        of.setdefault((row["model"], row["R"], row["dtype"], row["matrices"]), {})[row["provider"]] = row
    lines = [
        f"{rows[0]['gpu']}, torch {rows[0]['torch']}; medians of paired rounds. Times of others are over ours.",
        "",
        "| adapter | r | matrices | ours | "
        + " | ".join(SVD_ARMS.values())
        + " | largest error of ours | memory, MiB |",
        "|---" * (6 + len(SVD_ARMS)) + "|",
    ]
    for (model, rank, dtype, matrices), arms in of.items():
        ours = arms["lora_fast"]
        ratios = " | ".join(_times(arms.get(provider)) for provider in SVD_ARMS)
        peak = arms["lora_fast from the file"]["peak_MiB"]
        ms = float(ours["ms_p50"])
        lines.append(
            f"| {model.upper()}, {dtype} | {rank} | {matrices} | {ms:,.{0 if ms >= 10 else 2}f} ms | {ratios} "
            f"| {ours['max_error']} | {peak} |"
        )
    return "\n".join(lines)


def _times(row: dict | None) -> str:
    if row is None:
        return ""
    ratio = float(row["ratio_to_lora_fast"])
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"


def rank_search() -> str:
    """What `lora-fast rank search` printed, from the search.json that it wrote."""
    found = read_search(RESULTS / "rank_quality" / "search.json")
    return printed(lambda console: print_search(found, console))


def one_run() -> str:
    """How far each rule on one adapter's spectrum was from that search, from the CSV of bench_one_run_rank.py."""
    with (RESULTS / "rank_quality" / "one_run.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rules: dict[str, list[dict]] = {}
    for row in rows:
        rules.setdefault(row["rule"], []).append(row)
    first = rows[0]
    lines = [
        f"| rule, on one adapter of r={first['R']} (each seed's) | rank "
        f"| doublings from r={first['grid_rank']}, which the search found | loss above the best rank's |",
        "|---|---|---|---|",
    ]
    for rule, of in rules.items():
        cells = (" / ".join(row[key] for row in of) for key in ("predicted_rank", "doublings", "loss_above_best"))
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    within = [rule for rule, of in rules.items() if all(abs(float(row["doublings"])) <= 1 for row in of)]
    lines += [
        "",
        textwrap.fill(
            f"Between seeds a loss differs by {float(first['noise']):.4f} (standard deviation). Within a doubling of "
            f"r={first['grid_rank']} for every seed are {len(within)} of {len(rules)} rules; what is further off: "
            f"{'; '.join(rule for rule in rules if rule not in within)}.",
            TABLE_WIDTH,
        ),
    ]
    return "\n".join(lines)


BLOCKS = {
    "profile": profile,
    "estimate": estimate,
    "adapter_training": adapter_training,
    "spectra": spectra_table,
    "spectra_words": spectra_words,
    "train_step_512": partial(train_step, "train_step_512", TRAIN_STEP_ARMS),
    "train_step_2048": partial(train_step, "train_step_2048", TRAIN_STEP_ARMS),
    "dora": partial(train_step, "train_step_dora_512", DORA_ARMS),
    "traffic": traffic,
    "projection": projection,
    "experts": experts,
    "host": host,
    "gpu": gpu,
    "svd": svd,
    "noise": noise,
    "rank_search": rank_search,
    "one_run": one_run,
}


def filled(text: str) -> str:
    """README's text with every block as its file says."""
    for name, block in BLOCKS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no block <!-- {name} --> … <!-- /{name} -->")
        text = pattern.sub(lambda found, block=block: f"{found[1]}{block()}\n{found[2]}", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(".")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where README differs")
    parser.add_argument("--run", type=Path, help="a folder of lora-fast profile, to be the one that README shows")
    parser.add_argument("--estimate", type=Path, help="a folder of lora-fast estimate, likewise")
    parser.add_argument("--svd", type=Path, help="a folder of lora-fast svd, likewise")
    parser.add_argument("--search", type=Path, help="a folder of lora-fast rank search, likewise")
    args = parser.parse_args()
    if args.run:
        (RESULTS / "cpu").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(args.run / "run.json", RESULTS / "cpu" / "profile.json")
        shutil.copyfile(args.run / "rank_cost.png", RESULTS / "cpu" / "profile.png")
    if args.estimate:
        shutil.copyfile(args.estimate / "run.json", RESULTS / "predicted" / "llama-8b.json")
        shutil.copyfile(args.estimate / "rank_cost.png", RESULTS / "predicted" / "llama-8b.png")
    if args.svd:
        for name in ("spectra.json", "singular_values.png", "effective_rank.png"):
            shutil.copyfile(args.svd / name, RESULTS / "cpu" / name)
        adapter = Path(spectra.read(args.svd / "spectra.json")["source"]["adapter"])
        shutil.copyfile(adapter.parent / "training.json", RESULTS / "cpu" / "adapter_training.json")
    if args.search:
        (RESULTS / "rank_quality").mkdir(parents=True, exist_ok=True)
        for name in ("search.json", "curve.png"):
            shutil.copyfile(args.search / name, RESULTS / "rank_quality" / name)
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = filled(old)
    if args.check:
        if new != old:
            print("README.md differs from the files under benchmarks/results; run `make readme`", file=sys.stderr)
        return int(new != old)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
