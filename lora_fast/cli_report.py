"""The command of `lora-fast` that shows runs again: report."""

from pathlib import Path
from typing import Annotated

import typer

from lora_fast import cli_output


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders of lora-fast profile or estimate: one, or several side by side.", metavar="RUN…"),
    ],
    price: Annotated[
        str | None,
        typer.Option(
            help="What the machine costs, such as 2.50/h (US dollars); the run's own if left out.", show_default=False
        ),
    ] = None,
    allow_different: Annotated[
        bool, typer.Option("--allow-different", help="Compare runs of different work too; the page says what differs.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="New folder for report.html.  [default: RUN itself; runs/compare-DATE-TIME for several]",
            show_default=False,
        ),
    ] = None,
    json: Annotated[
        str | None,
        typer.Option(
            help='Write {"runs": […]} there, the content of each run.json; - prints it, and nothing else, on stdout.',
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show a run again, or several side by side: tables here, and one web page that needs no network.

    Runs that did different work are not compared unless told so.
    """
    cli_output.check_json_target(json)
    from lora_fast import LoraFastError
    from lora_fast.profiler import html
    from lora_fast.profiler import runs as folders
    from lora_fast.profiler.price import parse_price

    usd_per_hour = None if price is None else parse_price(price)
    profiles = [folders.read_profile(path) for path in runs]
    differ = html.different_work(profiles)
    if differ and not allow_different:
        texts = (f"{name} {' / '.join(map(str, values))}" for name, values in differ.items())
        raise LoraFastError(f"these runs did different work: {', '.join(texts)}; --allow-different compares them still")
    if usd_per_hour is not None:
        for profile in profiles:
            profile.workload["price_per_hour"] = usd_per_hour
    names = [path.resolve().name if path.is_dir() else path.resolve().parent.name for path in runs]
    if len(set(names)) < len(names):
        names = [str(path) for path in runs]
    page = html.page(profiles, names)
    if out is None and len(runs) == 1:
        written = runs[0] / "report.html" if runs[0].is_dir() else runs[0].with_name("report.html")
        folders.write_whole(written, page)
    else:
        written = folders.RunFolder(out or folders.default_folder("compare")).write("report.html", page)
    cli_output.write_json(json, folders.to_json({"runs": [profile.to_dict() for profile in profiles]}))
    if json == "-":
        return
    from lora_fast.profiler.table import print_profile

    console = cli_output.console()
    for profile, name in zip(profiles, names, strict=True):
        if len(profiles) > 1:
            console.rule(name, align="left")
        print_profile(profile, console)
    console.print(f"Written: {written}", soft_wrap=True, highlight=False)
