"""The command `lora-fast rank search`: the rank by training at several of them."""

from pathlib import Path
from typing import Annotated

import typer

from lora_fast import cli_output

NOTHING_MEASURED = 3
STAGES = {"base": "Pretraining the example", "search": "Trainings"}


def search(
    model: Annotated[
        str | None,
        typer.Option(
            help="A Hugging Face id or a local folder; its tokenizer is taken, bytes where there is none.  "
            "[default: a small example that a CPU trains in minutes]",
            show_default=False,
        ),
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(help="Text to train on: .jsonl with a field of text, or plain text.", show_default=False),
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="Text that is not trained on.", show_default=False)
    ] = None,
    ranks: Annotated[str, typer.Option(help="Numbers, START:STOP:xFACTOR, and full.")] = "1:64:x2,full",
    strategy: Annotated[
        str | None,
        typer.Option(
            help="grid: every rank; progressive: doubling while it gains more than the noise.  [default: progressive; "
            "the example: grid]",
            show_default=False,
        ),
    ] = None,
    start: Annotated[int, typer.Option(help="Of progressive: the first rank.")] = 1,
    seeds: Annotated[int, typer.Option(help="Trainings of every rank; their spread is the noise.")] = 2,
    steps: Annotated[int | None, typer.Option(help="Of every training.  [default: 200]", show_default=False)] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences in a batch.  [default: 8; the example: 4]", show_default=False)
    ] = None,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches in a step of the optimizer.")] = 1,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens in a sequence.  [default: 512; the example: 128]", show_default=False)
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Of LoRA, at every rank.  [default: 2e-4; the example: 5e-3]", show_default=False),
    ] = None,
    full_learning_rate: Annotated[
        float | None,
        typer.Option(help="Of full fine-tuning.  [default: a tenth of --learning-rate]", show_default=False),
    ] = None,
    scaling: Annotated[
        str,
        typer.Option(help="Of the update, alike at r = 16. inverse: 32/r; rslora: 8/√r; constant: 2."),
    ] = "inverse",
    lora_dropout: Annotated[float, typer.Option(help="Dropout before lora_A.")] = 0.0,
    target_modules: Annotated[str, typer.Option(help="all-linear, names, or a regular expression.")] = "all-linear",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the frozen weights: bf16, fp16 or fp32.  [default: fp32 on a CPU, bf16 on a GPU]",
            show_default=False,
        ),
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute decoder layers in backward.")
    ] = False,
    text_field: Annotated[str, typer.Option(help="Of .jsonl: the field that holds the text.")] = "text",
    eval_sequences: Annotated[
        int, typer.Option(help="The most that are evaluated, spread over --eval; 6 times in a training.")
    ] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    storage: Annotated[
        str | None,
        typer.Option(
            help="As Optuna takes it, such as sqlite:///FILE: searches with the same settings there share the work.  "
            "[default: a file in --out]",
            show_default=False,
        ),
    ] = None,
    keep_adapters: Annotated[
        bool, typer.Option("--keep-adapters", help="Keep each training's adapter, for `lora-fast svd`.")
    ] = False,
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Stop trainings that lag behind the others; the curve then lacks their ranks."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="New folder for search.json and curve.png.  [default: runs/search-MODEL-DATE-TIME]", show_default=False
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the search in --out; more --ranks and --seeds may be asked for than before."
        ),
    ] = False,
    json: Annotated[
        str | None,
        typer.Option(
            help="Write search.json's content there too; - prints it, and nothing else, on stdout.", show_default=False
        ),
    ] = None,
) -> None:
    """Find the rank by training: held-out loss at each rank and of full fine-tuning, against the noise between seeds.

    Trains by Hugging Face's Trainer, the same data, steps and learning rate at every rank. What has ended is kept: a
    search that was stopped goes on with --resume. Without --model, --train and --eval it runs a small example.
    """
    cli_output.check_json_target(json)
    with cli_output.warnings_as_lines():
        from lora_fast.profiler import rank_run, runs

        cli_output.quiet_transformers()
        plan = rank_run.plan_search(
            model,
            train,
            evaluation,
            ranks,
            strategy=strategy,
            start=start,
            seeds=seeds,
            steps=steps,
            batch_size=batch_size,
            seq_len=seq_len,
            learning_rate=learning_rate,
            full_learning_rate=full_learning_rate,
            scaling=scaling,
            dtype=dtype,
            target_modules=target_modules,
            lora_dropout=lora_dropout,
            gradient_accumulation=gradient_accumulation,
            gradient_checkpointing=checkpointing,
            text_field=text_field,
            held_out_sequences=eval_sequences,
            device=device,
            storage=storage,
            keep_adapters=keep_adapters,
            prune=prune,
            out=out,
            resume=resume,
        )
    cli_output.say(f"at most {plan.most} trainings, into {plan.folder.path}/; if stopped, --out and --resume go on")
    with (
        cli_output.resumable(lambda: plan.folder.path),
        cli_output.progress(STAGES) as report,
        cli_output.warnings_as_lines(),
    ):
        run = rank_run.run_search(plan, report)
    cli_output.write_json(json, runs.to_json(run.document))
    if json != "-":
        from lora_fast.profiler.rank_curve import print_search

        console = cli_output.console()
        print_search(run.document, console)
        console.print(f"Written: {run.folder}/ (search.json, curve.png)", soft_wrap=True, highlight=False)
    if run.search.best_rank is None:
        cli_output.say("no training gave a value; the lines above and search.json say why")
        raise typer.Exit(NOTHING_MEASURED)
