"""The command `lora-fast`: reads the arguments, calls the library, prints, and answers with an exit code.

Exit codes: 0 ok; 2 bad usage or bad input, one line on stderr and nothing written; 3 nothing could be measured; 4 the
noise floor is too high for the answer (the results are printed and written all the same); 130 interrupted.
What takes long to import (torch, Transformers, plotting) is imported by the command that needs it."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

BAD_INPUT, NOTHING_MEASURED, TOO_NOISY, INTERRUPTED = 2, 3, 4, 130
# Plain output has no window to fit into: wide enough for every column.
PLAIN_WIDTH = 120

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def commands() -> None:
    """LoRA at the speed of the frozen model, and what each rank costs on your machine."""


@app.command()
def profile(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A Hugging Face id or a local folder (with weights), a config.json (random weights), or a built-in "
            "shape: llama-5m, llama-25m, llama-1b, llama-3b, llama-8b.  "
            "[default: llama-5m on a CPU, llama-1b on a GPU]",
            show_default=False,
        ),
    ] = None,
    ranks: Annotated[
        str, typer.Option(help="auto, numbers such as 1,2,4, or START:STOP:xFACTOR such as 4:1024:x2.")
    ] = "auto",
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences in a step.  [default: 4 on a CPU, 2 on a GPU]", show_default=False)
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens in a sequence.  [default: 256 on a CPU, 1024 on a GPU]", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Base weights: bf16, fp16 or fp32.  [default: fp32 on a CPU, bf16 on a GPU]", show_default=False
        ),
    ] = None,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, names such as q_proj,v_proj, or a regular expression over module paths.")
    ] = "all-linear",
    exclude_modules: Annotated[
        str | None,
        typer.Option(help="Of those, leave out these: names, or a regular expression.", show_default=False),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Timed rounds, of one step per arm; at least 6.  [default: 30, or what 90 s allow]", show_default=False
        ),
    ] = None,
    time_budget: Annotated[
        float | None,
        typer.Option(help="Stop timing after so many seconds, once there are 6 rounds.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(help="For weights, tokens and the order of the arms.")] = 0,
    memory_limit: Annotated[
        float | None,
        typer.Option(
            help="MiB that each arm may take; one that needs more is a row 'out of memory'.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="New folder for run.json, arms.jsonl, rank_cost.png.  [default: runs/MODEL-DATE-TIME]",
            show_default=False,
        ),
    ] = None,
    json: Annotated[
        str | None,
        typer.Option(
            help="Write run.json's content there too; - prints it, and nothing else, on stdout.", show_default=False
        ),
    ] = None,
) -> None:
    """Measure what each LoRA rank costs here, against full fine-tuning.

    Every arm is one training step with AdamW: LoRA at each rank, and all parameters. Memory is measured in a process
    per arm; time in randomized rounds over all arms, so that ratios to full fine-tuning are paired and carry a 95%
    interval. Prints a table and the ranks from which LoRA is no longer cheaper, and writes them with a chart to a new
    folder.
    """
    from rich.console import Console

    if json is not None and json != "-":
        _check_json_target(Path(json))
    errors = Console(stderr=True)
    with _progress(errors) as report:
        from lora_fast.profiler import runs, sweep

        _quiet()
        result = sweep.profile_ranks(
            model,
            ranks,
            batch_size=batch_size,
            seq_len=seq_len,
            dtype=dtype,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            steps=steps,
            time_budget_s=time_budget,
            device=device,
            seed=seed,
            memory_limit_MiB=memory_limit,
            out=out or sweep.AUTO,
            progress=report,
        )
    document = runs.to_json(result.to_dict())
    if json == "-":
        sys.stdout.write(document)
    else:
        from lora_fast.profiler.table import print_profile

        console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
        print_profile(result, console)
        if json is not None:
            runs.write_whole(Path(json), document)
        console.print(
            f"Written: {result.folder}/ (run.json, arms.jsonl, rank_cost.png)", soft_wrap=True, highlight=False
        )
    if not result.measured:
        _say("nothing could be measured; the table and run.json say why for each arm")
        raise typer.Exit(NOTHING_MEASURED)
    if result.too_noisy:
        _say(
            f"noise floor too high: two equal arms differed by up to {result.aa['noise_floor']:.1%}, more than the "
            f"{result.aa['limit']:.0%} up to which the times mean something; quiet the machine, or raise --steps"
        )
        raise typer.Exit(TOO_NOISY)


def _check_json_target(path: Path) -> None:
    from lora_fast import LoraFastError

    if path.is_dir():
        raise LoraFastError(f"--json {path} is a folder; expected a file, or - for stdout")
    if not path.absolute().parent.is_dir():
        raise LoraFastError(f"--json {path}: the folder {path.absolute().parent} does not exist")


def _quiet() -> None:
    """Transformers' and the Hub's own bars would run through ours."""
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


STAGES = {"memory": "Memory, a process per arm", "time": "Time, randomized rounds"}


@contextlib.contextmanager
def _progress(console) -> Iterator:
    """Yields the callback of `profile_ranks`: bars with the time left on a terminal, a line now and then elsewhere."""
    if not console.is_terminal:
        yield _plain_progress()
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[at]}"),
        console=console,
        transient=True,
    ) as bars:
        tasks: dict[str, int] = {}
        waiting = bars.add_task("Loading", total=None, at="")

        def report(stage: str, done: int, total: int, text: str) -> None:
            if stage not in tasks:
                bars.remove_task(waiting) if not tasks else None
                tasks[stage] = bars.add_task(STAGES[stage], total=total, at=text)
            bars.update(tasks[stage], completed=done, total=total, at=text)

        yield report


def _plain_progress():
    """Lines on stderr: each arm of the memory pass, and every fifth of the rounds."""

    def report(stage: str, done: int, total: int, text: str) -> None:
        if stage == "memory" or done in (0, total) or done * 5 // total != (done - 1) * 5 // total:
            print(f"{STAGES[stage]}: {done}/{total} ({text})", file=sys.stderr, flush=True)

    return report


def _say(text: str) -> None:
    print(f"lora-fast: {text}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console script; arguments default to the command line's. Returns the exit code."""
    try:
        app(arguments, prog_name="lora-fast")
    except SystemExit as stop:  # how typer ends, always
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except Exception as error:
        # Imported here and not above: `lora-fast --help` does without torch.
        from lora_fast import LoraFastError

        # A file or folder that the system refuses is bad input too, and its error names it.
        if not isinstance(error, (LoraFastError, OSError)):
            raise
        _say(f"error: {error}")
        return BAD_INPUT
    return 0
