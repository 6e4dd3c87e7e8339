"""The command `lora-fast`: reads the arguments, calls the library, prints, and answers with an exit code.

Exit codes: 0 ok; 2 bad usage or bad input, one line on stderr and nothing written; 3 nothing could be measured; 4 the
noise floor is too high for the answer (the results are printed and written all the same); 130 interrupted.
What takes long to import (torch, Transformers, plotting) is imported by the command that needs it."""

from pathlib import Path
from typing import Annotated

import typer

from lora_fast import cli_output, cli_spectra

BAD_INPUT, NOTHING_MEASURED, TOO_NOISY, INTERRUPTED = 2, 3, 4, 130

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


for command in (cli_spectra.svd, cli_spectra.resize, cli_spectra.extract, cli_spectra.merge):
    app.command()(command)


@app.callback()
def commands() -> None:
    """LoRA at the speed of the frozen model, what each rank costs on your machine, and what an adapter learned."""


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
    cli_output.check_json_target(json)
    with cli_output.progress(STAGES) as report:
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
    cli_output.write_json(json, document)
    if json != "-":
        from lora_fast.profiler.table import print_profile

        console = cli_output.console()
        print_profile(result, console)
        console.print(
            f"Written: {result.folder}/ (run.json, arms.jsonl, rank_cost.png)", soft_wrap=True, highlight=False
        )
    if not result.measured:
        cli_output.say("nothing could be measured; the table and run.json say why for each arm")
        raise typer.Exit(NOTHING_MEASURED)
    if result.too_noisy:
        cli_output.say(
            f"noise floor too high: two equal arms differed by up to {result.aa['noise_floor']:.1%}, more than the "
            f"{result.aa['limit']:.0%} up to which the times mean something; quiet the machine, or raise --steps"
        )
        raise typer.Exit(TOO_NOISY)


def _quiet() -> None:
    """Transformers' and the Hub's own bars would run through ours."""
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


STAGES = {"memory": "Memory, a process per arm", "time": "Time, randomized rounds"}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console script; arguments default to the command line's. Returns the exit code."""
    try:
        app(arguments, prog_name="lora-fast")
    except SystemExit as stop:  # how typer ends, always
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        cli_output.say("interrupted")
        return INTERRUPTED
    except Exception as error:
        # Imported here and not above: `lora-fast --help` does without torch.
        from lora_fast import LoraFastError

        # A file or folder that the system refuses is bad input too, and its error names it.
        if not isinstance(error, (LoraFastError, OSError)):
            raise
        cli_output.say(f"error: {error}")
        return BAD_INPUT
    return 0
