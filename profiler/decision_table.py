"""A Decision in print: the answer first, then the evidence as a table, what disagrees, and what to measure next."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lora_fast.decision import Decision


def print_decision(decision: Decision, console: Console, notes: Sequence[str] = ()) -> None:
    _say(console, decision.sentence, style="bold")
    _say(console, f"How sure: {decision.sure} ({decision.confidence:.2f} of 1).")
    if decision.target_reached is not None:
        _say(console, f"The target {decision.target:.4g} is {'reached' if decision.target_reached else 'not reached'}.")
    console.print()
    sources = list(dict.fromkeys(indicator.source for indicator in decision.indicators))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header in ("indicator", "value", "threshold", "speaks for", "sure"):
        table.add_column(header, justify="right" if header == "sure" else "left", overflow="fold")
    for found in decision.indicators:
        value = found.value if found.sure else f"– {found.says}"
        number = sources.index(found.source) + 1
        cells = (f"{found.name} [{number}]", value, found.threshold, found.verdict, f"{found.sure:.2f}")
        table.add_row(*(Text(cell) for cell in cells), style=None if found.sure else "dim")
    console.print(table)
    if decision.disagreements:
        console.print()
        _say(console, "Against it:")
        for text in decision.disagreements:
            _say(console, f"- {text}", indent=2)
    console.print()
    if decision.next is None:
        _say(console, "Nothing that could be measured next would change this answer.")
    else:
        _say(console, f"Measure next: {decision.next.what}.")
        _say(console, f"What it would say: {decision.next.why}.", indent=2)
        _say(console, decision.next.command, indent=2)
    for note in notes:
        _say(console, f"Note: {note}.")
    for number, source in enumerate(sources, 1):
        _say(console, f"[{number}] {source}", style="dim")


def _say(console: Console, text: str, *, indent: int = 0, style: str = "") -> None:
    console.print(Padding(Text(text, style=style), (0, 0, 0, indent), expand=False), highlight=False)
