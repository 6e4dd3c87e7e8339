"""The commands `lora-fast rank …`: what rules say about a rank, what a budget allows, what has been published; the
search is in cli_search.py."""

from typing import Annotated

import typer

from lora_fast import cli_output, cli_search

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
JSON = Annotated[
    str | None,
    typer.Option(help="Write the result there as JSON; - prints it, and nothing else, on stdout.", show_default=False),
]
app.command()(cli_search.search)
MODEL_HELP = "A built-in shape (llama-8b, …), a config.json, a local folder, or a Hugging Face id in the local cache."


@app.callback()
def commands() -> None:
    """Which rank: by training at several, by rules of thumb with their sources, by a budget, by published results."""


@app.command()
def suggest(
    model_size: Annotated[float, typer.Option(help="Billions of parameters.", show_default=False)],
    task: Annotated[
        str, typer.Option(help="simple, medium, complex, or a task such as code; any other word lists them.")
    ],
    data_size: Annotated[int, typer.Option(help="Training samples.", show_default=False)],
    scenario: Annotated[
        str | None,
        typer.Option(help="prototype, production, constrained, multi-task or continual.", show_default=False),
    ] = None,
    can_search: Annotated[bool, typer.Option("--can-search", help="There are resources for a search.")] = False,
    tokens: Annotated[
        float | None, typer.Option(help="Tokens of the training data; with --model, for the capacity rule.")
    ] = None,
    model: Annotated[str | None, typer.Option(help=MODEL_HELP, show_default=False)] = None,
    target_modules: Annotated[str, typer.Option(help="all-linear, names, or a regular expression.")] = "all-linear",
    json: JSON = None,
) -> None:
    """What rules of thumb say about the rank, each with its source, and where they contradict each other.

    None of them has seen your data; `lora-fast rank search` measures.
    """
    cli_output.check_json_target(json)
    from lora_fast import LoraFastError, lora_parameter_count, suggest_rank
    from lora_fast.profiler.runs import to_json

    if (tokens is None) != (model is None):
        raise LoraFastError("--tokens and --model go together: the capacity rule needs both")
    with cli_output.warnings_as_lines():
        per_rank = None if model is None else lora_parameter_count(_shapes(model), 1, _names(target_modules))
    found = suggest_rank(
        model_size,
        task,
        data_size,
        scenario=scenario,
        can_search=can_search,
        tokens=tokens,
        parameters_per_rank=per_rank,
    )
    cli_output.write_json(json, to_json(found.to_dict()))
    if json == "-":
        return
    console = cli_output.console()
    low, high = found.range
    console.print(f"r={found.rank} by the {found.rule} of the {found.source}; all rules together: {low} to {high}.")
    _print_table(
        console,
        ("rule", "rank", "says", "source"),
        [(answer.rule, _ranks(answer), answer.says, answer.source) for answer in found.answers],
    )
    for text in found.disagreements:
        console.print(f"They disagree: {text}.", soft_wrap=True, highlight=False)


@app.command()
def budget(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)],
    parameters: Annotated[
        str, typer.Option("--budget", help="Parameters that may be trained, such as 5000000 or 5M.", show_default=False)
    ],
    target_modules: Annotated[str, typer.Option(help="all-linear, names, or a regular expression.")] = "all-linear",
    json: JSON = None,
) -> None:
    """The largest rank that a number of trained parameters allows, counted on the model's own layers.

    Beside it the guide's B/(4Ld), and what the budget allows on fewer or more kinds of layers.
    """
    cli_output.check_json_target(json)
    from lora_fast import rank_rules
    from lora_fast.profiler.runs import to_json
    from lora_fast.profiler.table import si

    with cli_output.warnings_as_lines():
        shapes = _shapes(model)
        found = rank_rules.budget_of(shapes, parse_count(parameters), _names(target_modules))
        choices = rank_rules.budget_tradeoffs(shapes, found.budget)
    document = {**found.to_dict(), "tradeoffs": [rank_rules.asdict(choice) for choice in choices]}
    document["advice"] = rank_rules.TRADEOFF_ADVICE
    cli_output.write_json(json, to_json(document))
    if json == "-":
        return
    console = cli_output.console()
    console.print(
        f"r={found.rank}: {found.parameters:,} parameters ({found.share:.2%} of the model) on {found.modules} layers, "
        f"{found.parameters_per_rank:,} a rank; r={found.rank + 1} would take "
        f"{found.parameters + found.parameters_per_rank:,}.",
        soft_wrap=True,
        highlight=False,
    )
    for note in found.notes:
        console.print(f"Note: {note}.", soft_wrap=True, highlight=False)
    _print_table(
        console,
        ("the same budget on", "rank", "parameters", "layers"),
        [
            (
                "+".join(c.modules),
                str(c.rank) if c.rank else "none",
                si(c.parameters) if c.rank else "–",
                str(c.adapted),
            )
            for c in choices
        ],
    )
    console.print(f"Which of them: {rank_rules.TRADEOFF_ADVICE}.", soft_wrap=True, highlight=False)


@app.command()
def evidence(
    name: Annotated[
        str | None, typer.Argument(help="One table, such as table-18; all of them without.", show_default=False)
    ] = None,
    json: JSON = None,
) -> None:
    """What has been published about ranks: tables and findings with their sources, and notes where they err."""
    cli_output.check_json_target(json)
    from lora_fast import LoraFastError
    from lora_fast.profiler.runs import to_json
    from lora_fast.rank_evidence import EVIDENCE, find_evidence

    entries = EVIDENCE if name is None else (find_evidence(name),)
    if None in entries:
        raise LoraFastError(f"{name!r} is no table; there are {', '.join(entry.name for entry in EVIDENCE)}")
    cli_output.write_json(json, to_json({"evidence": [entry.to_dict() for entry in entries]}))
    if json == "-":
        return
    console = cli_output.console()
    for entry in entries:
        rows = [tuple("–" if cell is None else str(cell) for cell in row) for row in entry.rows]
        console.print(f"{entry.title}  [{entry.name}]", style="bold", soft_wrap=True, highlight=False, markup=False)
        _print_table(console, entry.columns, rows)
        console.print(f"Source: {entry.source}", soft_wrap=True, highlight=False, markup=False)
        for note in entry.notes:
            console.print(f"Note: {note}", soft_wrap=True, highlight=False, markup=False)
        console.print()


def _shapes(model: str):
    """A model with shapes alone: of whatever type where the config is at hand, else a language model."""
    from pathlib import Path

    import torch

    from lora_fast import rank_rules
    from lora_fast.profiler import models

    cli_output.quiet_transformers()
    path = Path(model).expanduser()
    if model not in models.SHAPES and (path.suffix == ".json" or (path / "config.json").is_file()):
        return rank_rules.shapes_of(path)
    return models.build(models.resolve_shapes(model), device="meta", dtype=torch.bfloat16)


def _names(target_modules: str):
    from lora_fast.profiler.workload import parse_modules

    return parse_modules(target_modules)


def parse_count(text: str) -> int:
    """5000000, 5_000_000, 5M, 1.5B → a number of parameters."""
    import re

    from lora_fast import LoraFastError

    match = re.fullmatch(r"\s*(-?\d[\d_,]*(?:\.\d+)?)\s*([kMB]?)\s*", text)
    if not match:
        raise LoraFastError(f"--budget {text!r}; expected a number of parameters, such as 5000000 or 5M")
    number = float(match[1].replace("_", "").replace(",", ""))
    return round(number * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}[match[2]])


def _ranks(answer) -> str:
    if answer.low is None:
        return "–"
    if answer.high is None:
        return f"≥ {answer.low}"
    return str(answer.low) if answer.low == answer.high else f"{answer.low}–{answer.high}"


def _print_table(console, headers, rows) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, show_edge=False)
    for header in headers:
        table.add_column(header)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
