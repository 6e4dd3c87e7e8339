"""A spectra document, or a report of a written adapter, for people on a terminal: a row per kind of module, or per
layer, then the readings with their sources."""

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_fast.config import few
from lora_fast.profiler.spectra_charts import title
from lora_fast.profiler.table import si
from lora_fast.spectrum import kind_of

# Quantities whose columns go where the window is too narrow, the first ones first; they can be read in spectra.json.
EXPENDABLE = (
    ("numerical_rank", "r95"),
    ("gap", "stable_rank"),
    ("amplification", "r90"),
    ("relative_size", "corrected_effective_rank"),
    ("corrected_r90",),
    ("frobenius_norm",),
    ("shape",),
    ("r99",),
)

# Relative errors above this are told of: an adapter's σ are certified to 1e-9, but for rare ones.
UNCERTAIN = 1e-6

# Heading, then the quantity of a document's layers or kinds, and how it is printed.
ADAPTER_COLUMNS = (
    ("num.\nrank", "numerical_rank", "count"),
    ("eff.\nrank", "effective_rank", "spread"),
    ("stable\nrank", "stable_rank", "number"),
    ("\nr90", "r90", "count"),
    ("\nr95", "r95", "count"),
    ("\nr99", "r99", "count"),
    ("\ngap", "gap", "number"),
    ("\n‖ΔW‖_F", "frobenius_norm", "size"),
    ("‖ΔW‖\n/ ‖W‖", "relative_size", "share"),
    ("amplifi-\ncation", "amplification", "number"),
)
DENSE_COLUMNS = (
    ("\nrank", "corrected_rank", "spread"),
    ("eff.\nrank", "corrected_effective_rank", "number"),
    ("\nr90", "corrected_r90", "count"),
    ("\nr99", "corrected_r99", "count"),
    ("stable\nrank", "stable_rank", "number"),
    ("\n‖ΔW‖_F", "frobenius_norm", "size"),
    ("‖ΔW‖\n/ ‖W‖", "relative_size", "share"),
    ("raw\nr90", "r90", "count"),
    ("raw\nr99", "r99", "count"),
)


def print_spectra(found: Mapping[str, Any], console: Console, *, layers: bool = False) -> None:
    """The table by kind of module (and by layer, if `layers`), then what to know about it, the readings and the
    suggestion. Plain text where the console is no terminal."""
    table = _table(found, console, by_layer=False)
    console.print(table)
    if layers:
        console.print(_table(found, console, by_layer=True))
    ranked = any("num." in str(column.header) for column in table.columns)
    _print_lines(
        [*notes(found, ranked), *_between_words(found), *reading_lines(found), *suggestion_lines(found)], console
    )


def _print_lines(lines: Sequence[str], console: Console) -> None:
    """Wrapped, with the wrapped parts indented below their beginning; commands are left whole."""
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()) + 2 * line.startswith("  "))
        whole = line.lstrip().startswith("lora-fast ")
        parts = [line] if whole else textwrap.wrap(line, console.width, subsequent_indent=indent) or [""]
        for part in parts:
            console.print(Text(part), soft_wrap=True)


def _is_dense(found: Mapping[str, Any]) -> bool:
    return any(layer["rank"] is None for layer in found["layers"])


def _table(found: Mapping[str, Any], console: Console, *, by_layer: bool) -> Table:
    """With all columns that fit."""
    # By layer the names take the place of the columns that tell least.
    for count in range(1 if by_layer else 0, len(EXPENDABLE) + 1):
        hidden = {name for names in EXPENDABLE[:count] for name in names}
        table = _table_without(hidden, found, console, by_layer)
        if _fits(table, console):
            break
    return table


def _fits(table: Table, console: Console) -> bool:
    return table.__rich_measure__(console, console.options.update(width=1000)).maximum <= console.width


def _table_without(hidden: set[str], found: Mapping[str, Any], console: Console, by_layer: bool) -> Table:
    rows = found["layers"] if by_layer else found["kinds"]
    dense = _is_dense(found)
    columns = [column for column in (DENSE_COLUMNS if dense else ADAPTER_COLUMNS) if column[1] not in hidden]
    cells = [[_cell(row, name, form) or "–" for _, name, form in columns] for row in rows]
    # What no layer has, such as a size relative to weights that were not given, takes no column.
    kept = [i for i in range(len(columns)) if any(row[i] != "–" for row in cells)]
    table = _new_table(None if by_layer else title(found), console)
    table.add_column("\n" + ("layer" if by_layer else "module"), no_wrap=not by_layer, overflow="fold")
    if not by_layer:
        table.add_column("\nlayers", justify="right", no_wrap=True)
    sized = not (dense and "shape" in hidden)
    if sized:
        table.add_column("\nN × K" if dense else "\nr", justify="right", no_wrap=True)
    for i in kept:
        table.add_column(columns[i][0], justify="right", no_wrap=True)
    table.add_column("\nstatus", no_wrap=True)
    shared = _shared_prefix([row["name"] for row in rows]) if by_layer else ""
    for row, values in zip(rows, cells):
        first = [row["name"].removeprefix(shared)] if by_layer else [row["kind"], str(row["layers"])]
        of = _shape(row, by_layer) if dense else _rank(row, by_layer)
        table.add_row(*first, *([of] if sized else []), *(values[i] for i in kept), _status(row, by_layer))
    return table


def _shared_prefix(names: Sequence[str]) -> str:
    """Whole parts that all paths begin with, as "model.layers."; none of a single path."""
    parts = [name.split(".") for name in names]
    count = 0
    while len(names) > 1 and all(len(p) > count + 1 and p[count] == parts[0][count] for p in parts):
        count += 1
    return "".join(f"{part}." for part in parts[0][:count])


def _new_table(heading: str | None, console: Console) -> Table:
    return Table(
        title=heading,
        box=box.ROUNDED if console.is_terminal else box.SIMPLE,
        title_style="bold",
        title_justify="left",
        show_edge=console.is_terminal,
    )


def _cell(row: Mapping[str, Any], name: str, form: str) -> str | None:
    """A kind's median, with the range of the layers where form is "spread"; a layer's own value."""
    from lora_fast.profiler.spectra import value_of

    value = row[name] if "layers" in row else value_of(row, name)
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return _number(value, form)
    text = _number(value["median"], form)
    if form == "spread" and value["min"] != value["max"]:
        text += f" [{_number(value['min'], form)}–{_number(value['max'], form)}]"
    return text


def _number(value: float, form: str) -> str:
    if value == 0:
        return "0"
    if form == "count":
        return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"
    if form == "share":
        return f"{value:.2%}" if value >= 1e-4 else f"{value:.1e}"
    if form == "size":
        return (
            f"{value:#.3g}".rstrip(".")
            if 1e-3 <= value < 999.5
            else f"{value:,.0f}"
            if 1 < value < 1e5
            else f"{value:.1e}"
        )
    if value == int(value) and value < 1e4 and form == "spread":
        return f"{value:.0f}"
    return f"{value:.1f}" if value < 999.95 else f"{value:,.0f}" if value < 1e5 else f"{value:.0e}"


def _rank(row: Mapping[str, Any], by_layer: bool) -> str:
    if by_layer:
        return str(row["rank"])
    low, high = row["rank"]["min"], row["rank"]["max"]
    return str(low) if low == high else f"{low}–{high}"


def _shape(row: Mapping[str, Any], by_layer: bool) -> str:
    shapes = [row["shape"]] if by_layer else row["shapes"]
    return " × ".join(map(str, shapes[0])) + (f" +{len(shapes) - 1}" if len(shapes) > 1 else "")


def _status(row: Mapping[str, Any], by_layer: bool) -> str:
    states = {row["status"]: 1} if by_layer else row["status"]
    zero = int(row["spectral_norm"] == 0) if by_layer else row["zero"]
    texts = [state if by_layer or len(states) == 1 else f"{count} {state}" for state, count in states.items()]
    if zero:
        texts.append("zero" if by_layer else f"{zero} zero")
    return ", ".join(texts)


def notes(found: Mapping[str, Any], ranked: bool = False) -> list[str]:
    """What the columns mean, the numerical rank's if it has one, and what is not as it should be."""
    lines = []
    if _is_dense(found):
        lines.append(
            "rank, eff. rank, r90, r99: of the part of ΔW above what the rounding of the stored weights alone makes. "
            "raw: of all of ΔW, what rounding made of it included; these say little about the training."
        )
        if any(layer["corrected"] is None for layer in found["layers"]):
            lines.append(
                "Where that part shows as –, it reaches beyond the computed singular values: more of them with --k, or "
                "all with --method exact."
            )
    lines.append(
        "Medians over layers, [range]. "
        + ("num. rank: how many σ are not zero but for rounding. " if ranked else "")
        + "rXX: rank that keeps XX% of ‖ΔW‖_F². eff. rank: exp of the entropy of σ/Σσ. stable rank: ‖ΔW‖_F²/σ₁²."
        + ("" if _is_dense(found) else " gap: the largest σᵢ/σᵢ₊₁.")
    )
    if any(layer["status"] == "refined" for layer in found["layers"]):
        lines.append("refined: by QR, since columns of the factors nearly depend on each other.")
    uncertain = [
        layer["name"]
        for layer in found["layers"]
        if layer["method"] == "factors" and (layer["certificate"] is None or layer["certificate"] > UNCERTAIN)
    ]
    if uncertain:
        lines.append(f"Known to fewer than six digits: the singular values of {few(uncertain)}.")
    if any(layer["intruders"] for layer in found["layers"]):
        counts = [(layer["name"], layer["intruders"]) for layer in found["layers"] if layer["intruders"]]
        total, tried = sum(of["count"] for _, of in counts), sum(len(of["cosines"]) for _, of in counts)
        most = max(counts, key=lambda pair: pair[1]["count"])
        lines.append(
            f"Intruder dimensions (arXiv:2410.21228): {total} of {tried} leading singular vectors of W + ΔW are like "
            f"none of W, |cos| < {most[1]['threshold']:g}"
            + (f"; most in {most[0]}, {most[1]['count']}" if total else "")
        )
    return lines


def _between_words(found: Mapping[str, Any]) -> list[str]:
    against = found["against"]
    if not against:
        return []
    lines = [f"Subspace similarity φ(i, j) with {against['adapter']}, mean over {len(against['layers'])} layers:"]
    lines += [
        f"  φ({n}, {n}) = {value:.3f}; of two random subspaces {random:.3f}" for n, value, random in against["diagonal"]
    ]
    for text, names in (("only in the first", against["only_first"]), ("only in the second", against["only_second"])):
        if names:
            lines.append(f"  {len(names)} layers are {text}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}")
    return lines


def reading_lines(found: Mapping[str, Any]) -> list[str]:
    """The readings of all layers, then those kinds of modules that a rule reads otherwise; sources as footnotes."""
    readings = found["readings"]
    if not readings:
        return []
    first = readings[0]["group"]
    overall = {reading["rule"]: reading["verdict"] for reading in readings if reading["group"] == first}
    # The ranks that dense updates of a kind need stand in the table.
    apart = [r for r in readings if overall.get(r["rule"]) != r["verdict"] and not r["verdict"].startswith("needs")]
    shown = [r for r in readings if r["group"] == first or r in apart]
    sources = list(dict.fromkeys(reading["source"] for reading in shown))
    lines = ["", "What the spectra say about the rank (rules of thumb; where they disagree, none decides):"]
    group = None
    for reading in shown:
        if reading["group"] != group:
            group = reading["group"]
            lines.append(f"  {group}")
        mark = sources.index(reading["source"]) + 1
        lines.append(f"    {reading['rule']} ({reading['verdict']}): {reading['sentence']} [{mark}]")
    return lines + [f"  [{i}] {source}" for i, source in enumerate(sources, 1)]


def suggestion_lines(found: Mapping[str, Any]) -> list[str]:
    advice = found["suggestion"]
    if advice is None:
        return []
    ranks = sorted(advice["ranks"].values())
    now = advice["parameters_now"]
    share = (lambda count: f", {count / now:.0%} of now") if now else lambda count: ""
    of = "update" if now else "linear layer's update"
    line = (
        f"To keep {advice['energy']:.0%} of every {of}: rank {advice['rank']} everywhere "
        f"({si(advice['parameters'])} parameters{share(advice['parameters'])})"
    )
    if ranks[0] != ranks[-1]:
        total = advice["parameters_of_ranks"]
        line += f", or each layer its own, {ranks[0]} to {ranks[-1]} ({si(total)}{share(total)})"
    source = found["source"]
    command = (
        f"lora-fast resize {shlex.quote(source['adapter'])} OUT --energy {advice['energy']}"
        if source.get("adapter")
        else f"lora-fast extract --base {shlex.quote(source['base'])} --tuned {shlex.quote(source['tuned'])} OUT "
        f"--rank {advice['rank']}"
    )
    return ["", line, f"  {command}"]


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """What was written into an adapter: a row per kind of module, the sums, and the sizes of the files before and now.

    report: a ResizeReport's dict, with bytes (of the weights' file) and bytes_before (of those it came from, or
    None)."""
    from lora_fast.profiler.spectra import KIND_ORDER

    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for layer in report["layers"]:
        kinds.setdefault(kind_of(layer["name"]), []).append(layer)
    order = lambda kind: KIND_ORDER.index(kind) if kind in KIND_ORDER else len(KIND_ORDER)  # noqa: E731
    rows = [(kind, _report_cells(kinds[kind])) for kind in sorted(kinds, key=order)]
    rows.append(("all", _report_cells(report["layers"])))
    expendable = ("trained\nnow", "rank\nbefore", "\nlayers", "error\n‖·‖_F")  # where the window is too narrow
    for hidden in (expendable[:count] for count in range(len(expendable) + 1)):
        table = _new_table(None, console)
        table.add_column("\nmodule", no_wrap=True)
        for head in (head for head in rows[0][1] if head not in hidden):
            table.add_column(head, justify="right", no_wrap=True)
        for kind, cells in rows:
            if kind == "all":
                table.add_section()
            shown = [cell for head, cell in cells.items() if head not in hidden]
            table.add_row(kind, *shown, style="bold" if kind == "all" else None)
        if _fits(table, console):
            break
    console.print(table)
    lines = [
        f"kept energy: Σσ² kept / ‖ΔW‖_F², against the whole update. error: ‖ΔW − ΔW_k‖_F; rounding the factors adds "
        f"{report['rounding_error']:.1e}."
    ]
    noisy = [layer for layer in report["layers"] if layer["noise_energy"] is not None]
    if total := sum(layer["frobenius_norm"] ** 2 for layer in noisy):
        share = sum(layer["noise_energy"] * layer["frobenius_norm"] ** 2 for layer in noisy) / total
        lines.append(f"Of ‖ΔW‖_F², {_number(share, 'share')} is not above the rounding of the stored weights.")
    before = f"{_bytes(report['bytes_before'])} before, " if report["bytes_before"] is not None else ""
    lines.append(f"Size of the file: {before}{_bytes(report['bytes'])} now")
    for entry in report["not_carried"][:5]:
        lines.append(f"Not carried: {entry['name']}: {entry['reason']}")
    if len(report["not_carried"]) > 5:
        lines.append(f"Not carried: {len(report['not_carried']) - 5} more tensors")
    _print_lines(lines, console)


def _report_cells(members: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """{heading: text}."""
    total = sum(layer["frobenius_norm"] ** 2 for layer in members)
    kept = sum(layer["kept_energy"] * layer["frobenius_norm"] ** 2 for layer in members)
    error = sum(layer["error"] ** 2 for layer in members) ** 0.5
    dense = any(layer["old_rank"] is None for layer in members)
    return {
        "\nlayers": str(len(members)),
        "rank\nbefore": "dense" if dense else _range([layer["old_rank"] for layer in members]),
        "rank\nnow": _range([layer["rank"] for layer in members]),
        "trained\nnow": si(sum(layer["rank"] * sum(layer["shape"]) for layer in members)),
        "kept\nenergy": f"{kept / total:.3%}" if total else "100.000%",
        "least\nkept": f"{min(layer['kept_energy'] for layer in members):.3%}",
        "error\n‖·‖_F": _number(error, "size"),
    }


def _range(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)}–{max(values)}"


def _bytes(count: int) -> str:
    for limit, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count} bytes"
