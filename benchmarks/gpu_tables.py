"""README's tables of what `make gpu` measured, from the CSV files under benchmarks/results/<GPU>."""

import csv
from collections.abc import Sequence
from pathlib import Path

from harness import NO_TIME
from plot import AGAIN, FROZEN, OPS, PLAIN, TITLES, case_of

Row = dict[str, str]
NAMES = {PLAIN: "our GEMM alone", AGAIN: "frozen (A/A)"}


def read(path: Path) -> list[Row]:
    """Its rows, none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def folders(results: Path) -> list[Path]:
    """The folders of GPUs: those with rows of one of these benchmarks."""
    return [path for path in sorted(results.iterdir()) if any(read(path / f"{op}.csv") for op in OPS)]


def tables(folder: Path) -> str:
    """A heading with the provenance, then a table for each benchmark that has rows."""
    of = {op: rows for op in OPS if (rows := read(folder / f"{op}.csv"))}
    first = next(iter(of.values()))[0]
    commits = ", ".join(sorted({row["commit"] for rows in of.values() for row in rows}))
    parts = [
        f"**Measured on one {first['gpu']}**, torch {first['torch']}, triton {first['triton']}, peft {first['peft']}, "
        f"{first['dtype']}, commit {commits}. Ratios are medians of paired rounds, [95% interval], of forward and "
        "backward over the frozen layers' forward and dX; 1 would be LoRA for nothing."
    ]
    for op, rows in of.items():
        parts.append(f"{TITLES[op]}:\n\n" + (steps(rows) if op == "train_step" else ratios(rows)))
    if rows := read(folder / "memory.csv"):
        parts.append("Peak memory of a training step, predicted without the GPU and measured on it:\n\n" + memory(rows))
    return "\n\n".join(parts)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))


def cases(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """{case: {arm: row}}."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(case_of(row).replace("\n", ", "), {})[row["provider"]] = row
    return found


def ratio(row: Row | None, name: str = "ratio_to_frozen", low: str = "ratio_low", high: str = "ratio_high") -> str:
    if row is None or not row[name]:
        return "" if row is None or row["error"] in ("", NO_TIME) else "failed"
    return f"{float(row[name]):.3f} [{float(row[low]):.3f}, {float(row[high]):.3f}]"


def ratios(rows: list[Row]) -> str:
    """A line for each case, a column for each arm."""
    arms = [name for name in dict.fromkeys(row["provider"] for row in rows) if name != FROZEN]
    gemm = any(row["gemm_over_cublas"] for row in rows)
    lines = []
    for case, of in cases(rows).items():
        frozen = of[FROZEN]["ms_p50"] and f"{float(of[FROZEN]['ms_p50']):.3f}"
        told = [ratio(of.get(name)) for name in arms if name != PLAIN]
        lines.append([case, frozen, *told, *([of[FROZEN]["gemm_over_cublas"]] if gemm else [])])
    names = [NAMES.get(name, name) for name in arms if name != PLAIN]
    return table(["case", "frozen, ms", *names, *(["our GEMM's speed / cuBLAS's"] if gemm else [])], lines)


def steps(rows: list[Row]) -> str:
    """A line for each arm of each case."""
    lines = []
    for case, of in cases(rows).items():
        for name, row in of.items():
            others = (ratio(row, f"ratio_to_{o}", f"ratio_to_{o}_low", f"ratio_to_{o}_high") for o in ("full", "peft"))
            size = f"{row['layers']} layers, {row['seq_len']} tokens, {case.partition(', ')[2]}"
            own = row["ms_p50"] and f"{float(row['ms_p50']):.1f}"
            lines.append([size, name, own, row["tokens_per_s"], ratio(row), *others, row["peak_MiB"]])
    header = ["case", "arm", "ms", "tokens/s", "/ frozen", "/ full fine-tuning", "/ PEFT", "peak, MiB"]
    return table(header, lines)


def memory(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        model = f"{row['model']}, {row['batch_size']} × {row['seq_len']}"
        model += ", checkpointing" if row["checkpointing"] == "True" else ""
        measured = row["measured_MiB"] or ("out of memory" if row["fits"] == "False" else "failed")
        errors = (
            value and f"{float(value):+.1f}%" for value in (row["error_percent"], row["calibrated_error_percent"])
        )
        lines.append([model, f"r={row['R']}" if row["R"] else "full", row["predicted_MiB"], measured, *errors])
    return table(["model", "arm", "predicted, MiB", "measured, MiB", "off", "off, calibrated by r=8"], lines)
