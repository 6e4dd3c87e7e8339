"""What the commands of `lora-fast` share: where JSON goes, the width of tables, progress and warnings on stderr."""

import contextlib
import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Plain output has no window to fit into: wide enough for every column.
PLAIN_WIDTH = 120
# A stage of so few steps gets a line for each of them where there is no terminal, a longer one for every fifth part.
FEW = 20

Report = Callable[[str, int, int, str], None]


class Interrupted(Exception):
    """Ctrl-C where a later call can go on; the text says how."""


def say(text: str) -> None:
    print(f"lora-fast: {text}", file=sys.stderr)


def goes_on(folder: Path) -> str:
    return f"the same command with --out {shlex.quote(str(folder))} --resume goes on"


@contextlib.contextmanager
def resumable(begun: Callable[[], Path | None]) -> Iterator[None]:
    """Where what is inside is interrupted, or the system refuses it a file, the error says how to go on. begun: the
    folder of what is under way, or None where nothing is kept yet."""
    from lora_fast import LoraFastError

    try:
        yield
    except (KeyboardInterrupt, OSError) as error:
        folder = begun()
        if folder is None or isinstance(error, BrokenPipeError):
            raise
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(goes_on(folder)) from None
        raise LoraFastError(f"{error}; {goes_on(folder)}") from error


def check_json_target(json: str | None) -> None:
    """Raises LoraFastError where --json names a place that no file can be written to."""
    from lora_fast import LoraFastError

    if json is None or json == "-":
        return
    path = Path(json)
    if path.is_dir():
        raise LoraFastError(f"--json {path} is a folder; expected a file, or - for stdout")
    if not path.absolute().parent.is_dir():
        raise LoraFastError(f"--json {path}: the folder {path.absolute().parent} does not exist")


def write_json(json: str | None, document: str) -> None:
    from lora_fast.profiler.runs import write_whole

    if json == "-":
        sys.stdout.write(document)
    elif json is not None:
        write_whole(Path(json), document)


def console():
    """For tables on stdout: as wide as the window, or PLAIN_WIDTH where there is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def quiet_transformers() -> None:
    """Transformers' and the Hub's own bars would run through ours, and so would what libraries tell the code that calls
    them: deprecations, which kernels bitsandbytes did not find."""
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:  # with -W or PYTHONWARNINGS somebody asked for them
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\b")


@contextlib.contextmanager
def warnings_as_lines(spell: Callable[[str], str] = str) -> Iterator[None]:
    """What lora-fast warns of inside, as lines on stderr like its errors, at once and once each. spell: the message in
    the words of the command's options."""
    from lora_fast import LoraFastWarning

    told = set()
    others = warnings.showwarning

    def show(message, category, *where, **how) -> None:
        if not issubclass(category, LoraFastWarning):
            others(message, category, *where, **how)
        elif str(message) not in told:
            told.add(str(message))
            say(f"warning: {spell(str(message))}")

    with warnings.catch_warnings():  # which puts showwarning back, too
        warnings.simplefilter("always", LoraFastWarning)
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def progress(stages: Mapping[str, str], above: Callable[[], Any] | None = None) -> Iterator[Report]:
    """Yields report(stage, done, total, text): bars with the time left on a terminal, a line now and then elsewhere,
    both on stderr. stages: what each stage is called. above: what to show above the bars, a renderable of rich, asked
    for anew at each refresh."""
    from rich.console import Console

    errors = Console(stderr=True)
    if not errors.is_terminal:
        yield _lines(stages)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    class TimeLeft(TimeRemainingColumn):
        def render(self, task):
            left = super().render(task)  # empty while nobody knows how much there is to do
            return left.append(" left") if left.plain else left

    class Bars(Progress):
        def get_renderables(self):
            if above is not None:
                yield above()
            yield self.make_tasks_table(self.tasks)

    with Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeLeft(),
        TextColumn("{task.fields[at]}"),
        console=errors,
        transient=True,
    ) as bars:
        tasks: dict[str, int] = {}
        waiting = bars.add_task("Loading", total=None, at="")

        def report(stage: str, done: int, total: int, text: str = "") -> None:
            if stage not in tasks:
                bars.remove_task(waiting) if not tasks else None
                tasks[stage] = bars.add_task(stages[stage], total=total, at=text)
            bars.update(tasks[stage], completed=done, total=total, at=text)

        yield report


def _lines(stages: Mapping[str, str]) -> Report:
    told: dict[str, int] = {}

    def report(stage: str, done: int, total: int, text: str = "") -> None:
        part = done if total <= FEW else total if done == total else done * 5 // total
        if told.get(stage) == part:
            return
        told[stage] = part
        print(f"{stages[stage]}: {done}/{total}" + (f" ({text})" if text else ""), file=sys.stderr, flush=True)

    return report
