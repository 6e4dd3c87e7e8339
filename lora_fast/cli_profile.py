"""The commands of `lora-fast` on what ranks cost: profile measures, estimate predicts."""

import re
from pathlib import Path
from typing import Annotated

import typer

from lora_fast import cli_output

NOTHING_MEASURED, TOO_NOISY = 3, 4
STAGES = {
    "predict": "Predictions",
    "memory": "Memory, a process per arm",
    "time": "Time, randomized rounds",
    "layers": "Layers by themselves",
}
ESTIMATE_STAGES = {"estimate": "Arms", "fits": "What fits"}

TargetParameters = Annotated[
    str | None,
    typer.Option(
        help="Parameters that no linear layer holds, a mixture's stacked experts: names such as "
        "experts.gate_up_proj,experts.down_proj.",
        show_default=False,
    ),
]
UseDora = Annotated[
    bool, typer.Option("--dora", help="Adapters by DoRA, which trains the length of each row of the weights too.")
]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="Base weights under adapters: nf4 or fp4 (4 bits, by bitsandbytes, as in QLoRA). Full fine-tuning stays "
        "in --dtype.",
        show_default=False,
    ),
]


def _as_options(message: str) -> str:
    """A library's remedy as an option of the two commands: target_parameters=['a', 'b'] → --target-parameters a,b."""
    return re.sub(
        r"target_parameters=\[(.*?)\]",
        lambda match: "--target-parameters " + ",".join(re.findall(r"'([^']*)'", match[1])),
        message,
    )


def profile(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A Hugging Face id or a local folder (with weights), a config.json (random weights), or a built-in "
            "shape: llama-5m, llama-25m, llama-1b, llama-3b, llama-8b, llama-70b.  "
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
        typer.Option(
            help="Tokens in a sequence.  [default: 256 on a CPU, 1024 on a GPU, or what the model allows]",
            show_default=False,
        ),
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
    target_parameters: TargetParameters = None,
    use_dora: UseDora = False,
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
    target_ci: Annotated[
        str | None,
        typer.Option(
            help="Stop timing once every ratio's interval is within so much of it, such as 2%, or after 10 minutes, or "
            "what --time-budget says. The rule looks at the intervals' widths and never at the ratios.",
            show_default=False,
        ),
    ] = None,
    adapter_dtype: Annotated[str, typer.Option(help="lora_A and lora_B: fp32, bf16 or fp16.")] = "fp32",
    lora_dropout: Annotated[float, typer.Option(help="Dropout before lora_A.")] = 0.0,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches in a step of the optimizer.")] = 1,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute decoder layers in backward.")
    ] = False,
    optimizer: Annotated[
        str, typer.Option(help="Of every arm: adamw, adafactor or sgd (without momentum, so without states).")
    ] = "adamw",
    foreach: Annotated[
        bool | None,
        typer.Option(
            "--foreach/--no-foreach",
            help="The optimizer over lists of parameters, with temporaries of their size.  [default: as PyTorch on "
            "DEVICE]",
            show_default=False,
        ),
    ] = None,
    attn_implementation: Annotated[
        str | None, typer.Option(help="As Transformers takes it: sdpa, eager.", show_default=False)
    ] = None,
    quantize: Quantize = None,
    backend: Annotated[str, typer.Option(help="Of the adapted layers: auto, torch or triton.")] = "auto",
    compare_peft: Annotated[
        bool, typer.Option("--compare-peft", help="Also PEFT's LoRA at every rank, through PEFT's own layers.")
    ] = False,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers",
            help="Also every distinct adapted layer by itself: with the adapter, frozen, and with its weight trained.",
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(help="For weights, tokens and the order of the arms.")] = 0,
    memory_limit: Annotated[
        float | None,
        typer.Option(
            help="MiB that each arm may take; one that needs more is a row 'out of memory'.", show_default=False
        ),
    ] = None,
    arm_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds that an arm's memory measurement, or one of its steps, may take; then it is a row 'timeout'."
        ),
    ] = 1800.0,
    price: Annotated[
        str | None,
        typer.Option(help="What the machine costs, such as 2.50/h (US dollars): adds the cost of a million tokens."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="New folder for report.html, run.json, arms.jsonl, rank_cost.png.  [default: runs/MODEL-DATE-TIME]",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --out, which was ended before its time: same arguments."),
    ] = False,
    json: Annotated[
        str | None,
        typer.Option(
            help="Write run.json's content there too; - prints it, and nothing else, on stdout.", show_default=False
        ),
    ] = None,
) -> None:
    """Measure what each LoRA rank costs here, against full fine-tuning.

    Every arm is one training step: LoRA at each rank, and all parameters. Memory is measured in a process per arm; time
    in randomized rounds over all arms, so that ratios to full fine-tuning are paired and carry a 95% interval. Prints a
    table and the ranks from which LoRA is no longer cheaper, and writes them with a chart to a new folder.

    Exit codes: 0 ok; 2 wrong input, nothing is written; 3 nothing could be measured; 4 noise hides the answer in time
    (all is printed and written still); 130 interrupted (--out and --resume go on).
    """
    cli_output.check_json_target(json)
    so_far: list = []

    def live():
        from lora_fast.profiler.table import live_table

        return live_table(so_far[-1]) if so_far else ""

    def watch(now) -> None:
        if not so_far:
            cli_output.say(f"into {now.folder}/; if stopped, --out and --resume go on")
        so_far.append(now)

    with (
        cli_output.resumable(lambda: so_far[-1].folder if so_far else None),
        cli_output.progress(STAGES, live) as report,
        cli_output.warnings_as_lines(_as_options),
    ):
        from lora_fast.profiler import sweep
        from lora_fast.profiler.price import parse_price
        from lora_fast.profiler.profile import results_of
        from lora_fast.profiler.ranks import parse_share

        cli_output.quiet_transformers()
        result, unwritten = results_of(
            sweep.profile_ranks,
            model,
            ranks,
            batch_size=batch_size,
            seq_len=seq_len,
            dtype=dtype,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            target_parameters=target_parameters,
            use_dora=use_dora,
            steps=steps,
            time_budget_s=time_budget,
            target_ci=None if target_ci is None else parse_share(target_ci, "--target-ci"),
            adapter_dtype=adapter_dtype,
            lora_dropout=lora_dropout,
            gradient_accumulation=gradient_accumulation,
            gradient_checkpointing=checkpointing,
            optimizer=optimizer,
            foreach=foreach,
            attn_implementation=attn_implementation,
            quantize=quantize,
            backend=backend,
            compare_peft=compare_peft,
            layers=layers,
            device=device,
            seed=seed,
            memory_limit_MiB=memory_limit,
            arm_timeout_s=arm_timeout,
            out=out or sweep.AUTO,
            resume=resume,
            price_per_hour=None if price is None else parse_price(price),
            progress=report,
            watch=watch,
        )
    _show(result, json, unwritten)
    if unwritten:
        from lora_fast import LoraFastError

        raise LoraFastError(f"{unwritten}; free space, and {cli_output.goes_on(result.folder)}") from unwritten
    if not result.measured:
        cli_output.say("nothing could be measured; the table and run.json say why for each arm")
        raise typer.Exit(NOTHING_MEASURED)
    if result.too_noisy:
        from lora_fast.profiler.table import hidden

        cli_output.say(hidden(result))
        raise typer.Exit(TOO_NOISY)


def estimate(
    model: Annotated[
        str,
        typer.Argument(
            help="A built-in shape (llama-8b, llama-70b, …), a config.json, a local folder, or a Hugging Face id in "
            "the local cache. No weights are read.",
            show_default=False,
        ),
    ],
    ranks: Annotated[str, typer.Option(help="auto, numbers such as 1,2,4, or START:STOP:xFACTOR.")] = "auto",
    batch_size: Annotated[int, typer.Option(help="Sequences in a step.")] = 1,
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens in a sequence.  [default: 2048, or what the model allows]", show_default=False),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Base weights: bf16, fp16 or fp32.")] = "bf16",
    adapter_dtype: Annotated[str, typer.Option(help="lora_A and lora_B: fp32, bf16 or fp16.")] = "fp32",
    lora_dropout: Annotated[float, typer.Option(help="Dropout before lora_A.")] = 0.0,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, names such as q_proj,v_proj, or a regular expression over module paths.")
    ] = "all-linear",
    exclude_modules: Annotated[
        str | None,
        typer.Option(help="Of those, leave out these: names, or a regular expression.", show_default=False),
    ] = None,
    target_parameters: TargetParameters = None,
    use_dora: UseDora = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute decoder layers in backward.")
    ] = False,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches in a step of the optimizer.")] = 1,
    optimizer: Annotated[
        str, typer.Option(help="Of every arm: adamw, adafactor or sgd (without momentum, so without states).")
    ] = "adamw",
    foreach: Annotated[
        bool | None,
        typer.Option(
            "--foreach/--no-foreach",
            help="The optimizer over lists of parameters, with temporaries of their size.  [default: as PyTorch on "
            "DEVICE]",
            show_default=False,
        ),
    ] = None,
    attn_implementation: Annotated[
        str | None, typer.Option(help="As Transformers takes it: sdpa, eager.", show_default=False)
    ] = None,
    quantize: Quantize = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Memory of one GPU, such as 24GB: what fits, and how much. Or its name, such as H100 or RTX4090: also "
            "the least time of a step, by its peak rates.",
            show_default=False,
        ),
    ] = None,
    price: Annotated[
        str | None,
        typer.Option(
            help="What that GPU costs, such as 2.50/h (US dollars): adds the least cost of a million tokens.",
            show_default=False,
        ),
    ] = None,
    compare_peft: Annotated[
        bool,
        typer.Option("--compare-peft", help="Also PEFT's LoRA at every rank, through PEFT's own layers."),
    ] = False,
    shards: Annotated[int, typer.Option(help="GPUs that FSDP spreads weights and states over.")] = 1,
    device: Annotated[str, typer.Option(help="Whose allocator and defaults are meant: cuda or cpu.")] = "cuda",
    out: Annotated[
        Path | None,
        typer.Option(help="New folder for report.html, run.json, arms.jsonl, rank_cost.png.", show_default=False),
    ] = None,
    json: Annotated[
        str | None,
        typer.Option(
            help="Write the result there as JSON; - prints it, and nothing else, on stdout.", show_default=False
        ),
    ] = None,
) -> None:
    """Predict the peak memory and FLOPs of each LoRA rank and of full fine-tuning, without weights or a GPU.

    One training step of every arm is traced on tensors without memory, through the layers that would run. Not in it:
    the CUDA context and fragmentation. With --gpu NAME also the least time of each, and with it the rank from which
    LoRA is no faster: a projection, which `lora-fast profile` on that GPU puts to the test.
    """
    cli_output.check_json_target(json)
    with cli_output.progress(ESTIMATE_STAGES) as report, cli_output.warnings_as_lines(_as_options):
        from lora_fast.profiler import estimate as estimation
        from lora_fast.profiler.price import parse_price
        from lora_fast.profiler.profile import results_of

        cli_output.quiet_transformers()
        result, unwritten = results_of(
            estimation.estimate_memory,
            model,
            ranks,
            batch_size=batch_size,
            seq_len=seq_len,
            dtype=dtype,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            target_parameters=target_parameters,
            use_dora=use_dora,
            adapter_dtype=adapter_dtype,
            lora_dropout=lora_dropout,
            gradient_accumulation=gradient_accumulation,
            gradient_checkpointing=checkpointing,
            optimizer=optimizer,
            foreach=foreach,
            attn_implementation=attn_implementation,
            quantize=quantize,
            device=device,
            **({} if gpu is None else estimation.parse_gpu(gpu)),
            price_per_hour=None if price is None else parse_price(price),
            compare_peft=compare_peft,
            shards=shards,
            out=out,
            progress=report,
        )
    _show(result, json, unwritten)
    if unwritten:
        raise unwritten


def _show(result, json: str | None, unwritten: Exception | None) -> None:
    """The table, or JSON; the table also where the JSON's file is refused, which is raised behind it."""
    from lora_fast.profiler import runs

    try:
        cli_output.write_json(json, runs.to_json(result.to_dict()))
    finally:
        if json != "-":
            from lora_fast.profiler.table import print_profile

            console = cli_output.console()
            print_profile(result, console)
            if result.folder and not unwritten:
                console.print(
                    f"Written: {result.folder}/ (report.html, run.json, arms.jsonl, rank_cost.png)",
                    soft_wrap=True,
                    highlight=False,
                )
