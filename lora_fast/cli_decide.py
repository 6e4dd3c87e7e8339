"""The command `lora-fast decide`: which rank, or full fine-tuning, from the runs that there are."""

from pathlib import Path
from typing import Annotated

import typer

from lora_fast import cli_output, cli_profile, cli_search, cli_spectra

STAGES = cli_profile.STAGES | cli_search.STAGES | cli_spectra.STAGES


def decide(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders of lora-fast profile, estimate, rank search and svd, of one model; any of them, and with "
            "--task, --rank or the like none.",
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
    model: Annotated[
        str | None,
        typer.Option(help="With --train and --eval, in place of RUN…: profile, search and spectra in one go."),
    ] = None,
    train: Annotated[
        Path | None, typer.Option(help="Text to train on: .jsonl with a field of text, or plain text.")
    ] = None,
    evaluation: Annotated[Path | None, typer.Option("--eval", help="Text that is not trained on.")] = None,
    time_budget: Annotated[str, typer.Option(help="For all three, such as 10m or 1h30m.")] = "10m",
    ranks: Annotated[
        str | None,
        typer.Option(
            help="To profile and search in one go, full among them.  [default: 1,4,16,64,full]", show_default=False
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="In one go: trainings of every rank.")] = 2,
    steps: Annotated[int, typer.Option(help="In one go: the most steps of a training.")] = 2000,
    batch_size: Annotated[
        int | None, typer.Option(help="In one go: sequences in a step.  [default: 8]", show_default=False)
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            help="In one go: tokens in a sequence.  [default: 512, or what the model allows]", show_default=False
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="In one go: of LoRA at every rank.  [default: 2e-4]", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="In one go: auto, cpu or cuda.")] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            help="New folder for decision.json and report.html, and in one go profile/, search/ and svd/.  [default: "
            "runs/decide-DATE-TIME, in one go runs/decide-MODEL-DATE-TIME]",
            show_default=False,
        ),
    ] = None,
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
    """Which rank, or full fine-tuning: an answer from any of profile, rank search and spectra, and its evidence.

    What was measured here counts for more than what has been published, and that for more than rules of thumb; cost
    decides between equals. What is missing lowers the confidence; what to measure next is said.
    """
    cli_output.check_json_target(json)
    from lora_fast import LoraFastError
    from lora_fast import decide as answer
    from lora_fast.cli_rank import parse_count
    from lora_fast.decision import section
    from lora_fast.profiler import evidence as gathered
    from lora_fast.profiler import html
    from lora_fast.profiler.price import parse_price
    from lora_fast.profiler.runs import RunFolder, default_folder, to_json, write_whole

    given = {"--model": model, "--train": train, "--eval": evaluation}
    missing = [name for name, value in given.items() if value is None]
    if runs and len(missing) < 3:
        raise LoraFastError("RUN… and --model are both given; give runs, or --model, --train and --eval for new ones")
    known = (task, domain, budget, rank, model_size, data_size, tokens, scenario)
    at_once = not runs and len(missing) < 3
    if not runs and not at_once and all(value is None for value in known):
        raise LoraFastError(
            f"no run is given; expected folders of {gathered.MADE_BY}, or --model, --train and --eval to make them "
            "(with --task, --rank, --model-size and the like it does without any)"
        )
    if at_once and missing:
        raise LoraFastError(f"{' and '.join(missing)} missing: one go takes --model, --train and --eval")
    parameters = None if budget is None else parse_count(budget)
    usd_per_hour = None if price is None else parse_price(price)
    options = {"rank": rank, "domain": domain, "budget": parameters, "model_size": model_size, "data_size": data_size}
    options |= {"scenario": scenario, "price_per_hour": usd_per_hour, "task": task, "target": target}
    answer(**options, tokens=tokens)  # what is wrong with these is said before anything is measured
    if not at_once:
        folder, split = RunFolder(out or default_folder("decide")).path, ()
    else:
        made = _at_once(
            *(model, train, evaluation, time_budget),
            ranks=ranks,
            seeds=seeds,
            most_steps=steps,
            batch_size=batch_size,
            seq_len=seq_len,
            learning_rate=learning_rate,
            device=device,
            out=out,
        )
        folder, split = made.folder, made.split
        runs = [path for name in ("profile", "search", "svd") if (path := folder / name).is_dir()]
    evidence = gathered.read_evidence(runs or [])
    found = answer(
        evidence.profile,
        evidence.search,
        evidence.spectra,
        tokens=evidence.tokens if tokens is None else tokens,
        **options,
    )
    read = [{"path": path, "kind": kind} for path, kind in evidence.read]
    document = to_json(found.to_dict() | {"runs": read, "notes": evidence.notes, "time_budget": list(split)})
    cli_output.write_json(json, document)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "decision.json", document)
    profiles = [] if evidence.profile is None else [evidence.profile]
    write_whole(folder / "report.html", html.page(profiles, decision=section(found)))
    if json != "-":
        from lora_fast.profiler.decision_table import print_decision

        console = cli_output.console()
        print_decision(found, console, evidence.notes)
        if split:
            console.print(f"Time: {'; '.join(split)}.", soft_wrap=True, highlight=False)
        made = [f"{run.name}/" for run in runs] if split else []
        names = ", ".join(("decision.json", "report.html", *made))
        console.print(f"Written: {folder}/ ({names})", soft_wrap=True, highlight=False)


def _at_once(model, train, evaluation, time_budget, *, ranks, **options):
    from lora_fast.profiler import decide_run

    seconds = decide_run.parse_duration(time_budget)
    cli_output.quiet_transformers()
    cli_output.say(
        f"{seconds:.0f} s in all: the profile first, its timing a tenth of them; the search what is then left but 5%; "
        "the spectra those"
    )
    with cli_output.warnings_as_lines(), cli_output.progress(STAGES) as report:
        return decide_run.measure_at_once(
            model,
            train,
            evaluation,
            time_budget_s=seconds,
            ranks=ranks or decide_run.RANKS,
            progress=report,
            **options,
        )
