"""The command `lora-fast`: reads the arguments, calls the library, prints, and answers with an exit code.

Exit codes: 0 ok; 2 bad usage or bad input, one line on stderr and nothing written, or a folder that took no more (what
was measured by then is printed, or kept for --resume); 3 nothing could be measured; 4 the noise floor is too high for
the answer (the results are printed and written all the same); 130 interrupted.
What takes long to import (torch, Transformers, plotting) is imported by the command that needs it."""

import os

import typer

from lora_fast import cli_decide, cli_output, cli_profile, cli_rank, cli_report, cli_spectra

BAD_INPUT, INTERRUPTED = 2, 130

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


for command in (
    *(cli_profile.profile, cli_profile.estimate, cli_report.report, cli_decide.decide),
    *(cli_spectra.svd, cli_spectra.resize, cli_spectra.extract, cli_spectra.merge),
):
    app.command()(command)
app.add_typer(cli_rank.app, name="rank")


@app.callback()
def commands() -> None:
    """LoRA at the speed of the frozen model, what each rank costs on your machine, and what an adapter learned."""


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console script; arguments default to the command line's. Returns the exit code."""
    # Read as torch is loaded: threads that wait by spinning fight with whatever else runs. A policy that is set stays.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(arguments, prog_name="lora-fast")
    except SystemExit as stop:  # how typer ends, always
        if stop.code == INTERRUPTED:  # what typer makes of a KeyboardInterrupt, without a word
            cli_output.say("interrupted")
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        cli_output.say("interrupted")
        return INTERRUPTED
    except cli_output.Interrupted as stop:
        cli_output.say(f"interrupted; {stop}")
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
