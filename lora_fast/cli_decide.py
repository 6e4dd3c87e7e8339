"""The command `lora-fast decide`: which rank, or full fine-tuning, from the runs that there are."""

from pathlib import Path
from typing import Annotated

import typer

from lora_fast import cli_output


def decide(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders of lora-fast profile, estimate, rank search and svd, of one model; any of them.",
            metavar="RUN…",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            help="The metric that must be reached, in the search's unit (a loss, a score).", show_default=False
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="simple, medium, complex, or a task such as code; any other word lists them."),
    ] = None,
    domain: Annotated[
        str | None, typer.Option(help="near or far: how far the data are from what the model was pretrained on.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Parameters that may be trained, such as 5000000 or 5M.", show_default=False),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="A rank that you consider.", show_default=False)] = None,
    model_size: Annotated[
        float | None, typer.Option(help="Billions of parameters, where no profile says it.", show_default=False)
    ] = None,
    data_size: Annotated[int | None, typer.Option(help="Training samples.", show_default=False)] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens of all training.", show_default=False)] = None,
    scenario: Annotated[
        str | None,
        typer.Option(help="prototype, production, constrained, multi-task or continual.", show_default=False),
    ] = None,
    price: Annotated[
        str | None,
        typer.Option(help="What the machine costs, such as 2.50/h (US dollars): adds what a training costs."),
    ] = None,
    json: Annotated[
        str | None,
        typer.Option(
            help="Write the decision there as JSON; - prints it, and nothing else, on stdout.", show_default=False
        ),
    ] = None,
) -> None:
    """Which rank, or full fine-tuning: an answer from any of profile, rank search and spectra, with the evidence beside
    it.

    What was measured here counts for more than what has been published, and that for more than rules of thumb; cost
    decides between equals. What is missing lowers the confidence; what to measure next is said.
    """
    cli_output.check_json_target(json)
    from lora_fast import LoraFastError
    from lora_fast import decide as answer
    from lora_fast.profiler.evidence import MADE_BY, read_evidence
    from lora_fast.profiler.price import parse_price
    from lora_fast.profiler.runs import to_json

    if not runs:
        raise LoraFastError(
            f"no run is given; expected folders of {MADE_BY} (`lora-fast rank suggest` does without any)"
        )
    evidence = read_evidence(runs)
    found = answer(
        evidence.profile,
        evidence.search,
        evidence.spectra,
        task,
        target,
        rank=rank,
        domain=domain,
        budget=None if budget is None else _count(budget),
        model_size=model_size,
        data_size=data_size,
        tokens=tokens,
        scenario=scenario,
        price_per_hour=None if price is None else parse_price(price),
    )
    read = [{"path": path, "kind": kind} for path, kind in evidence.read]
    cli_output.write_json(json, to_json(found.to_dict() | {"runs": read, "notes": evidence.notes}))
    if json != "-":
        from lora_fast.profiler.decision_table import print_decision

        print_decision(found, cli_output.console(), evidence.notes)


def _count(text: str) -> int:
    from lora_fast.cli_rank import _count as count

    return count(text)
