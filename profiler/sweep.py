"""The sweep: every rank and full fine-tuning on one model, memory first and time second, and what follows from it."""

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from lora_fast import LoraFastError, apply_lora, remove_lora
from lora_fast.profiler import models
from lora_fast.profiler.crossover import crossovers, ranks_of_shares
from lora_fast.profiler.html import write_results
from lora_fast.profiler.intervals import MIN_ROUNDS, ratio_with_interval
from lora_fast.profiler.memory import MALLOC, MiB
from lora_fast.profiler.predict import predict
from lora_fast.profiler.process import environment_of_children, run_in_child
from lora_fast.profiler.profile import Arm, Profile
from lora_fast.profiler.ranks import auto_ranks, parse_ranks
from lora_fast.profiler.runs import RunFolder, default_folder, environment, resolve_device
from lora_fast.profiler.timing import WARM_UP_ROUNDS
from lora_fast.profiler.workload import DTYPES, FULL, FULL_AGAIN, Workload, describe, parse_modules

# The saving in question is 10-30% of a step. Where two equal arms may differ by more than 10%, the table cannot show
# it.
NOISE_LIMIT = 0.10
# A model, a batch and a length that each kind of machine works through in about two minutes, with ROUNDS or within
# BUDGET_S.
ROUNDS, BUDGET_S = 30, 90.0
DEFAULTS = {
    "cpu": {"model": "llama-5m", "dtype": "fp32", "batch_size": 4, "seq_len": 256},
    "cuda": {"model": "llama-1b", "dtype": "bf16", "batch_size": 2, "seq_len": 1024},
}
AUTO = "auto"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Progress = Callable[[str, int, int, str], None]


def profile_ranks(
    model: str | nn.Module | None = None,
    ranks: str | int | Sequence[int] = "auto",
    *,
    batch_size: int | None = None,
    seq_len: int | None = None,
    dtype: str | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    steps: int | None = None,
    time_budget_s: float | None = None,
    device: str = "auto",
    seed: int = 0,
    memory_limit_MiB: float | None = None,
    out: str | Path | None = None,
    price_per_hour: float | None = None,
    progress: Progress = lambda stage, done, total, text: None,
    watch: Callable[[Profile], None] = lambda so_far: None,
) -> Profile:
    """Measure a training step with AdamW at every rank and with all parameters trained.

    model: a built-in shape, a config.json, a folder with weights, a Hugging Face id, or a Transformers model. The last
    is not touched: copies of it are measured, in its dtype and on its device.
    ranks: as `--ranks`: "auto", "8,64", "4:1024:x2", or numbers.
    target_modules, exclude_modules: "q_proj,v_proj", names, or a regex over module paths; "all-linear" for the first.
    steps: timed rounds, of one step per arm; time_budget_s: stop timing after so many seconds (at least six rounds are
    timed); without both, 30 rounds or 90 seconds.
    memory_limit_MiB: what each arm may take in the memory pass; one that needs more gets the status "oom".
    out: a new folder for run.json, arms.jsonl, rank_cost.png and report.html; "auto": runs/<model>-<date>-<time>.
    price_per_hour: US dollars for the machine, recorded with the run. progress is called with stage ("memory" or
    "time"), done, total, and what is at work; watch with the profile so far whenever an arm has ended.
    Without model and sizes, the defaults are those of the device (`DEFAULTS`).

    Raises LoraFastError for wrong input, before anything is written."""
    wanted = parse_ranks(ranks)
    if time_budget_s is not None and not 0 < time_budget_s < float("inf"):
        raise LoraFastError(f"time_budget_s={time_budget_s!r}; expected a positive number of seconds")
    if steps is None:
        steps, time_budget_s = ROUNDS, BUDGET_S if time_budget_s is None else time_budget_s
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < MIN_ROUNDS:
        raise LoraFastError(
            f"steps={steps!r}; expected a whole number of at least {MIN_ROUNDS}, fewer carry no 95% interval"
        )
    if memory_limit_MiB is not None and not 0 < memory_limit_MiB < float("inf"):
        raise LoraFastError(f"memory_limit_MiB={memory_limit_MiB!r}; expected a positive number")
    folder = None if out in (None, AUTO) else RunFolder(out)
    given = model if isinstance(model, nn.Module) else None
    if given is not None:
        models.check_module(given)
        parameter = next(given.parameters())
        device, dtype = str(parameter.device), _given_dtype(parameter.dtype, dtype)
    device = resolve_device(device)
    defaults = DEFAULTS[torch.device(device).type]
    workload = Workload(
        batch_size=defaults["batch_size"] if batch_size is None else batch_size,
        seq_len=defaults["seq_len"] if seq_len is None else seq_len,
        dtype=dtype or defaults["dtype"],
        target_modules=parse_modules(target_modules),
        exclude_modules=None if exclude_modules is None else parse_modules(exclude_modules, "exclude_modules"),
        device=device,
        seed=seed,
    )

    with contextlib.ExitStack() as stack:
        if given is None:
            source = models.resolve(defaults["model"] if model is None else str(model))
        else:
            file = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lora-fast-")), "model.pt")
            source = models.save_module(given, file)
        subject = models.build(source, device="meta", dtype=workload.torch_dtype)
        if out == AUTO:
            folder = RunFolder(default_folder(source.name))
        workload.batch(subject)  # says now, not after the memory pass, that the length does not fit the model
        total = sum(parameter.numel() for parameter in subject.parameters())
        targets, per_rank = _probe(subject, workload)
        if wanted is None:
            wanted = auto_ranks(subject, [module for _, module in targets], per_rank)
        notes = _too_large(wanted, targets)

        arms = [Arm("lora", r, per_rank * r, per_rank * r / (total + per_rank * r)) for r in wanted]
        arms.append(Arm("full", None, total, 1.0))
        described = {
            "model": source.name,
            "weights": source.weights,
            "parameters": total,
            **workload.to_dict(),
            "foreach": torch.device(device).type == "cuda",
            "attn_implementation": getattr(subject.config, "_attn_implementation", None),
            "rounds_wanted": steps,
            "time_budget_s": time_budget_s,
            "warm_up_rounds": WARM_UP_ROUNDS,
            "memory_limit_MiB": memory_limit_MiB,
            "price_per_hour": price_per_hour,
            "omp_wait_policy": environment_of_children()["OMP_WAIT_POLICY"],
            "rank_of_share": ranks_of_shares(total, per_rank),
            **models.counts(subject, [module for _, module in targets]),
        }
        about = environment(device)

        def ended() -> None:
            watch(Profile(about, described, arms, None, {}))

        notes += _predict(arms, source, workload, progress)
        ended()
        memory = _memory_pass(arms, source, workload, memory_limit_MiB, folder, progress, ended)
        timed, reasons = _timed_arms(arms, memory, device)
        times = _time_pass(source, workload, timed, steps, time_budget_s, progress)

    described["rounds"] = max((len(series.get("step_ms", ())) for series in times.values()), default=0)
    aa = _add_times(arms, times, workload)
    for arm in arms:
        if arm.name in reasons and arm.error is None:
            arm.error = reasons[arm.name]
    _add_utilization(arms)
    profile = Profile(about, described, arms, aa, crossovers(arms, seed), notes, folder.path if folder else None)
    if folder:
        write_results(folder, profile)
    return profile


def _given_dtype(actual: torch.dtype, asked: str | None) -> str:
    name = _NAMES.get(actual)
    if name is None:
        raise LoraFastError(f"the model's dtype is {actual}; expected one of {', '.join(DTYPES)}")
    if asked is not None and asked != name:
        raise LoraFastError(f"dtype={asked!r}, but the model is in {name}; convert the model, or leave dtype out")
    return name


def _probe(model: nn.Module, workload: Workload) -> tuple[list[tuple[str, nn.Module]], int]:
    """The modules that get an adapter, with their paths, and how many parameters one more rank trains: Σ (K + N)."""
    apply_lora(model, workload.lora_config(1), adapter_name="r1")
    targets = [(path, module) for path, module in model.named_modules() if "r1" in getattr(module, "lora_A", ())]
    remove_lora(model)
    return targets, sum(sum(module.weight.shape) for _, module in targets)


def _too_large(ranks: list[int], targets: list[tuple[str, nn.Module]]) -> list[str]:
    """A note where a rank exceeds min(N, K) of a target: it can describe no more updates there, and costs more."""
    smallest = min(min(module.weight.shape) for _, module in targets)
    above = [rank for rank in ranks if rank > smallest]
    if not above:
        return []
    names = sorted({path.rsplit(".", 1)[-1] for path, module in targets if min(module.weight.shape) == smallest})
    return [f"r above {smallest} ({', '.join(map(str, above))}) exceeds min(N, K) of {', '.join(names)}"]


def _predict(arms: list[Arm], source, workload: Workload, progress: Progress) -> list[str]:
    """Fill in what shapes predict, and FLOPs; returns a note where they can't. A measurement does without."""
    try:
        found = []
        for index, arm in enumerate(arms):
            progress("predict", index, len(arms), arm.name)
            found.append(predict(source, workload, arm.rank))
    except Exception as error:  # a model of one's own may do anything but run on tensors without values
        return [f"nothing is predicted: {describe(error)['error']}"]
    finally:
        progress("predict", len(arms), len(arms), "done")
    full = found[-1]
    for arm, one in zip(arms, found, strict=True):
        arm.predicted_MiB = one.peak / MiB
        arm.predicted_by_category = {category: size / MiB for category, size in one.by_category.items()}
        arm.forward_flops, arm.backward_flops = one.forward_flops, one.backward_flops
        arm.flops_ratio = one.flops / full.flops if full.flops else None
    return []


def _add_utilization(arms: list[Arm]) -> None:
    full = next(arm for arm in arms if arm.kind == "full")
    for arm in arms:
        if arm.step_ms is not None and arm.forward_flops is not None:
            # FLOPs per ms, over 10⁹, are 10¹² FLOPs per s.
            arm.executed_tflops_s = (arm.forward_flops + arm.backward_flops) / arm.step_ms / 1e9
            arm.full_equivalent_tflops_s = (full.forward_flops + full.backward_flops) / arm.step_ms / 1e9


def _memory_pass(arms, source, workload, limit, folder, progress, ended) -> dict[str, dict]:
    """One child per arm; arms.jsonl is rewritten after each, so that a killed run keeps what was measured."""
    results: dict[str, dict] = {}
    for index, arm in enumerate(arms):
        progress("memory", index, len(arms), arm.name)
        result = run_in_child(
            "memory", source, workload, {"rank": arm.rank, "memory_limit_MiB": limit}, environment=MALLOC
        )
        results[arm.name] = result
        arm.status, arm.error, arm.requested_MiB = result["status"], result.get("error"), result.get("requested_MiB")
        arm.peak_MiB, arm.peak_phase = result.get("peak_MiB"), result.get("peak_phase")
        arm.by_category, arm.phase_peaks_MiB = result.get("by_category_MiB"), result.get("phase_peaks_MiB")
        arm.resident_peak_MiB = result.get("resident_peak_MiB")
        if folder:
            folder.write_arms([done.to_dict() for done in arms[: index + 1]])
        ended()
    progress("memory", len(arms), len(arms), "done")
    full = arms[-1].peak_MiB
    for arm in arms:
        if full and arm.peak_MiB:
            arm.memory_ratio = arm.peak_MiB / full
    return results


def _timed_arms(arms: list[Arm], memory: dict[str, dict], device: str) -> tuple[list[str], dict[str, str]]:
    """The arms that can share one process, and for the others why not.

    All arms' adapters and optimizer states stay in memory together, beside the weights and one arm's step. The second
    copy of full fine-tuning goes first if that is too much, then the largest arms."""
    sizes = {name: result["after_step_MiB"] for name, result in memory.items() if result["status"] == "ok"}
    if FULL in sizes:
        sizes[FULL_AGAIN] = sizes[FULL]
    states = {name: after["adapters"] + after["optimizer"] for name, after in sizes.items()}
    available = _available_MiB(device)
    names = [arm.name for arm in arms if arm.status != "oom"] + ([FULL_AGAIN] if arms[-1].status != "oom" else [])
    reasons = {arm.name: arm.error or "out of memory" for arm in arms if arm.status == "oom"}

    def needed() -> float:
        steps = [memory[n]["peak_MiB"] - states[n] for n in names if n in states and n in memory]
        return sum(states.get(n, 0.0) for n in names) + max(steps, default=0.0)

    while names and available is not None and needed() > available:
        largest = FULL_AGAIN if FULL_AGAIN in names else max(names, key=lambda n: states.get(n, 0.0))
        reasons[largest] = f"not timed: beside the others it needs {needed():.0f} MiB of {available:.0f} MiB"
        names.remove(largest)
    return names, reasons


def _available_MiB(device: str) -> float | None:
    """Free memory of the device; None where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**20
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _time_pass(source, workload, names, steps, budget_s, progress) -> dict[str, dict]:
    """Each arm's series, or its status where there is none."""
    if not names:
        return {}
    progress("time", 0, WARM_UP_ROUNDS + steps, "loading")
    result = run_in_child(
        "time",
        source,
        workload,
        {"arms": names, "rounds": steps, "budget_s": budget_s},
        progress=lambda done, total: progress("time", done, total, f"{len(names)} arms a round"),
    )
    progress("time", WARM_UP_ROUNDS + steps, WARM_UP_ROUNDS + steps, "done")
    return result["arms"] if result["status"] == "ok" else dict.fromkeys(names, result)


def _add_times(arms: list[Arm], times: dict[str, dict], workload: Workload) -> dict | None:
    """Fill in medians and ratios; returns the A/A result."""
    full = times.get(FULL, {}).get("step_ms")
    for arm in arms:
        measured = times.get(arm.name)
        if measured is None:
            continue
        if measured["status"] != "ok":
            if arm.status == "ok":
                arm.status, arm.requested_MiB = measured["status"], measured.get("requested_MiB")
                arm.error = f"in the timing pass, beside the other arms: {measured['error']}"
            continue
        for phase in ("step_ms", "forward_ms", "backward_ms", "optimizer_ms"):
            setattr(arm, phase, statistics.median(measured[phase]))
        arm.tokens_per_s = 1e3 * workload.tokens / arm.step_ms
        arm.samples_ms = measured["step_ms"]
        if full and arm.kind == "lora":
            arm.ratio_to_full, arm.ratio_ci = ratio_with_interval(measured["step_ms"], full, seed=workload.seed)
            if measured["cpu_ms"]:
                cpu = measured["cpu_ms"], times[FULL]["cpu_ms"]
                arm.cpu_ratio, arm.cpu_ratio_ci = ratio_with_interval(*cpu, seed=workload.seed)
    again = times.get(FULL_AGAIN, {}).get("step_ms")
    if not full or not again:
        return None
    ratio, ci = ratio_with_interval(again, full, seed=workload.seed)
    floor = max(abs(end - 1) for end in ci)
    return {"ratio": ratio, "ci": ci, "noise_floor": floor, "limit": NOISE_LIMIT, "samples_ms": again}
