"""The commands of `lora-fast` on updates: svd looks at them; resize, extract and merge write smaller ones."""

import re
from pathlib import Path
from typing import Annotated

import typer

from lora_fast import cli_output

STAGES = {
    "spectra": "Singular values",
    "base": "Base weights",
    "intruders": "Intruder dimensions",
    "update": "Updates",
}
DEVICE = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
JSON = Annotated[
    str | None,
    typer.Option(help="Write the result there as JSON; - prints it, and nothing else, on stdout.", show_default=False),
]
RANK = Annotated[
    int | None,
    typer.Option(help="Keep this rank, or what there is; with --scope global, on average.", show_default=False),
]
ENERGY = Annotated[float | None, typer.Option(help="Keep this share of ‖ΔW‖_F², such as 0.99.", show_default=False)]
ERROR = Annotated[float | None, typer.Option(help="Stay within this distance ‖ΔW − ΔW_k‖_F.", show_default=False)]
BUDGET = Annotated[int | None, typer.Option(help="Train at most this many parameters.", show_default=False)]
SCOPE = Annotated[
    str,
    typer.Option(help="layer: each layer meets the criterion; global: one threshold on σ runs through all of them."),
]
DTYPE = Annotated[
    str | None,
    typer.Option(
        help="Of the new factors: bf16, fp16 or fp32.  [default: as in the adapters; extract: fp32]", show_default=False
    ),
]
METHOD = Annotated[str, typer.Option(help="Of checkpoints: exact, all singular values; topk, the K largest, faster.")]
K = Annotated[int, typer.Option("--k", help="How many with --method topk.")]
BASE = Annotated[str, typer.Option(help="The checkpoint before fine-tuning, as safetensors.", show_default=False)]
TUNED = Annotated[str, typer.Option(help="The checkpoint after it.", show_default=False)]
EXCLUDE = Annotated[
    str | None,
    typer.Option(help="Of checkpoints, leave out these modules: embed_tokens,lm_head.", show_default=False),
]
OUT = Annotated[Path, typer.Argument(help="Folder for the adapter; one that is there is replaced.", show_default=False)]


def svd(
    adapter: Annotated[
        str | None, typer.Argument(help="A PEFT adapter's folder; or give --base and --tuned.", show_default=False)
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Another adapter of the same base: how alike their subspaces are.", show_default=False),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Base weights (safetensors: a file, a folder, or a Hugging Face id): of ADAPTER, for ‖ΔW‖/‖W‖ and the "
            "amplification; with --tuned, what was fine-tuned.",
            show_default=False,
        ),
    ] = None,
    tuned: Annotated[
        str | None,
        typer.Option(help="A fully fine-tuned checkpoint: the spectra of TUNED − BASE.", show_default=False),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Print a row per layer too.")] = False,
    layer: Annotated[
        str | None,
        typer.Option(
            help="With --against: the layer whose similarity is drawn.  [default: the one with the largest ‖ΔW‖_F]",
            show_default=False,
        ),
    ] = None,
    intruders: Annotated[
        bool,
        typer.Option(
            "--intruders",
            help="With --base: count intruder dimensions. Slow: two eigendecompositions of size min(N, K) per layer, "
            "work for a GPU where that is thousands.",
        ),
    ] = False,
    method: METHOD = "exact",
    k: K = 64,
    exclude: EXCLUDE = None,
    device: DEVICE = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            help="New folder for spectra.json and the charts.  [default: runs/svd-NAME-DATE-TIME]", show_default=False
        ),
    ] = None,
    json: JSON = None,
) -> None:
    """Show the exact spectrum of every update: of a LoRA adapter, or of a full fine-tune.

    Prints, by kind of module, how many directions each update has and needs, and what that says about the rank; writes
    all of it with charts of the singular values and of the effective rank to a new folder. ΔW = s·B·A of an adapter is
    never formed. Of two checkpoints, what the rounding of the stored weights made is told from what was trained. Under
    torchrun the matrices of two checkpoints are spread over its processes.
    """
    _check_svd(adapter, against, base, tuned, layer, intruders)
    cli_output.check_json_target(json)
    from lora_fast.profiler import runs, spectra

    name = Path(adapter or tuned).resolve().name
    folder = runs.RunFolder(out or runs.default_folder(f"svd-{name}"))
    device = runs.resolve_device(device)
    with cli_output.warnings_as_lines(), cli_output.progress(STAGES) as report:
        if tuned is None:
            if base is not None:
                base = _local(base)
            document = spectra.of_adapter(
                adapter, against=against, base=base, layer=layer, intruders=intruders, device=device, progress=report
            )
        else:
            document = spectra.of_checkpoints(
                _local(base), _local(tuned), method=method, k=k, exclude=_names(exclude), device=device, progress=report
            )
            if not _first_process():
                return
        files = spectra.write(document, folder)
    cli_output.write_json(json, spectra.to_json(document))
    if json != "-":
        from lora_fast.profiler.spectra_table import print_spectra

        console = cli_output.console()
        print_spectra(document, console, layers=layers)
        console.print(f"Written: {folder.path}/ ({', '.join(files)})", soft_wrap=True, highlight=False)


def _check_svd(adapter, against, base, tuned, layer, intruders) -> None:
    from lora_fast import LoraFastError

    if adapter is None and tuned is None:
        raise LoraFastError("nothing to look at; give an adapter's folder, or --base and --tuned")
    if adapter is not None and tuned is not None:
        raise LoraFastError("ADAPTER and --tuned are both given; give an adapter, or --base and --tuned")
    if tuned is not None and base is None:
        raise LoraFastError("--tuned is given without --base; the spectra are those of TUNED − BASE")
    if tuned is not None and (against is not None or intruders):
        raise LoraFastError("--against and --intruders are for an adapter, not for --tuned")
    if intruders and base is None:
        raise LoraFastError("--intruders needs --base, the weights that the adapter was trained on")
    if layer is not None and against is None:
        raise LoraFastError("--layer is for --against: it names the layer whose similarity is drawn")


def _first_process() -> bool:
    """Whether this process is to print and write: torchrun's others found the same."""
    from torch import distributed

    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _local(checkpoint: str) -> str:
    """The path of a checkpoint; what is no path and could be a Hugging Face id is looked up, and fetched if need be."""
    if Path(checkpoint).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", checkpoint):
        return checkpoint
    from lora_fast.profiler import models

    return models.resolve(checkpoint).location


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip()) if text else ()


def resize(
    adapter: Annotated[Path, typer.Argument(help="A PEFT adapter's folder.", show_default=False)],
    out: OUT,
    rank: RANK = None,
    energy: ENERGY = None,
    error: ERROR = None,
    budget: BUDGET = None,
    scope: SCOPE = "layer",
    dtype: DTYPE = None,
    device: DEVICE = "auto",
    json: JSON = None,
) -> None:
    """Write ADAPTER into OUT with smaller ranks: the best approximation of every update.

    Exactly one of --rank, --energy, --error, --budget. Ranks are picked against the whole spectrum, so that what is
    reported as kept is the truth. OUT is a PEFT adapter; OUT may be ADAPTER.
    """
    from lora_fast import resize_adapter

    options = {"rank": rank, "energy": energy, "error": error, "budget": budget, "scope": scope}
    _write_adapter(resize_adapter, (adapter, out), options, [adapter], dtype, device, json)


def extract(
    out: OUT,
    base: BASE,
    tuned: TUNED,
    rank: RANK = None,
    energy: ENERGY = None,
    error: ERROR = None,
    budget: BUDGET = None,
    scope: SCOPE = "layer",
    target_modules: Annotated[
        str | None,
        typer.Option(
            help="Names such as q_proj,v_proj, or a regular expression over module paths.  [default: every linear "
            "layer but the output head]",
            show_default=False,
        ),
    ] = None,
    exclude: EXCLUDE = None,
    save_others: Annotated[
        bool, typer.Option("--save-others", help="Take what else changed along whole: norms, embeddings, biases.")
    ] = False,
    keep_noise: Annotated[
        bool,
        typer.Option("--keep-noise", help="Pick ranks from all of ΔW, what the rounding of storage made of it too."),
    ] = False,
    method: METHOD = "exact",
    k: K = 64,
    dtype: DTYPE = None,
    device: DEVICE = "auto",
    json: JSON = None,
) -> None:
    """Write the adapter that comes closest to TUNED − BASE, a full fine-tune, into OUT.

    Exactly one of --rank, --energy, --error, --budget, which count what is above the rounding of the stored weights;
    what is reported as kept is a share of all of ΔW. What the adapter doesn't carry (norms, biases) is listed.
    """
    from lora_fast import extract_adapter
    from lora_fast.profiler.workload import parse_modules

    options = {"rank": rank, "energy": energy, "error": error, "budget": budget, "scope": scope}
    options |= {"exclude": _names(exclude), "save_others": save_others, "denoise": not keep_noise}
    options |= {"method": method, "k": k}
    if target_modules is not None:
        options["target_modules"] = parse_modules(target_modules)
    _write_adapter(extract_adapter, (_local(base), _local(tuned), out), options, [], dtype, device, json)


def merge(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT adapters of one base model.", show_default=False)],
    out: OUT,
    weights: Annotated[
        str, typer.Option(help="One for each adapter, such as 0.5,0.5: the sum is Σ weight · ΔW.", show_default=False)
    ],
    rank: RANK = None,
    energy: ENERGY = None,
    error: ERROR = None,
    budget: BUDGET = None,
    scope: SCOPE = "layer",
    dtype: DTYPE = None,
    device: DEVICE = "auto",
    json: JSON = None,
) -> None:
    """Write the weighted sum of several adapters into OUT: exactly, or with smaller ranks.

    Without --rank, --energy, --error and --budget the sum loses nothing but directions that are exactly zero.
    """
    from lora_fast import merge_adapters

    options = {"rank": rank, "energy": energy, "error": error, "budget": budget, "scope": scope}
    _write_adapter(merge_adapters, (adapters, _numbers(weights), out), options, adapters, dtype, device, json)


def _numbers(text: str) -> list[float]:
    from lora_fast import LoraFastError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise LoraFastError(f"--weights {text!r}; expected numbers such as 0.5,0.5") from None


def _write_adapter(function, arguments, options, sources: list[Path], dtype, device, json) -> None:
    """Call one of the library's three, then print and write its report. sources: the adapters it came from."""
    from lora_fast import LoraFastError
    from lora_fast.checkpoint import WEIGHTS_NAME
    from lora_fast.profiler import runs, workload

    if dtype is not None and dtype not in workload.DTYPES:
        raise LoraFastError(f"dtype={dtype!r}; expected one of {', '.join(workload.DTYPES)}")
    cli_output.check_json_target(json)
    device = runs.resolve_device(device)
    if dtype is not None:
        options = options | {"dtype": workload.DTYPES[dtype]}
    # Before OUT takes the place of one of them.
    files = [source / WEIGHTS_NAME for source in sources]
    bytes_before = sum(file.stat().st_size for file in files if file.is_file()) if files else None
    with cli_output.warnings_as_lines(), cli_output.progress(STAGES) as report:
        written = function(
            *arguments,
            **options,
            device=device,
            progress=lambda done, total, text="": report("update", done, total, text),
        )
    document = written.to_dict() | {
        "bytes_before": bytes_before,
        "bytes": (Path(written.folder) / WEIGHTS_NAME).stat().st_size,
    }
    cli_output.write_json(json, runs.to_json(document))
    if json != "-":
        from lora_fast.profiler.spectra_table import print_report

        console = cli_output.console()
        print_report(document, console)
        console.print(f"Written: {arguments[-1]}/ (a PEFT adapter)", soft_wrap=True, highlight=False)
