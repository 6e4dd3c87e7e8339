"""What one adapted layer costs: every distinct shape among a model's targets at every rank, against the frozen layer
and against training its weight.

A step of one layer is forward and backward of y = x Wᵀ, of as many tokens as a pass of the workload has:
- frozen: y and dx, two products; a second copy of it is the A/A arm;
- dense: y, dx and dW, as in full fine-tuning;
- r8: our operator, y, dx, dA and dB.
Where the adapted layer's ratio to dense passes 1 the layer's own crossover lies. (A model's lies elsewhere: attention,
norms and the optimizer cost what they cost.) Arms are stepped in randomized rounds, as `rounds.py` says."""

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lora_fast import apply_lora, lora_linear
from lora_fast.parameter import LoraParameter
from lora_fast.profiler.intervals import ratio_with_interval
from lora_fast.profiler.models import ModelSource, build
from lora_fast.profiler.rounds import Record, Stop, run_rounds
from lora_fast.profiler.timing import timed
from lora_fast.profiler.workload import AGAIN, DTYPES, Workload

FROZEN, DENSE = "frozen", "dense"
# Steps of one layer are short and many: so many are taken at once that a sample lasts about this long.
SAMPLE_MS = 3.0
MAX_REPEATS = 100


def time_layers(
    source: ModelSource,
    workload: Workload,
    ranks: Sequence[int],
    rounds: int,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> dict:
    """{"status": "ok", "layers": rows}: a row for each shape and rank, with in_features, out_features, modules (how
    many targets have the shape), names (the last parts of their paths), rank, tokens, ms (median of a step), frozen_ms,
    dense_ms, ratio_to_frozen and ratio_to_dense with their intervals frozen_ci and dense_ci, and noise_floor: the
    larger distance from 1 of the A/A arm's interval. A rank that can't run has status and error in place of times."""
    shapes = _shapes(source, workload)
    if not shapes:
        return {"status": "failed", "error": "none of what is adapted is a linear layer"}
    rows = []
    for number, ((K, N), paths) in enumerate(shapes.items()):
        progress(number, len(shapes), f"{K} → {N}")
        rows += _rows(K, N, paths, workload, ranks, rounds)
    progress(len(shapes), len(shapes), "done")
    return {"status": "ok", "layers": rows}


def _shapes(source: ModelSource, workload: Workload) -> dict[tuple[int, int], list[str]]:
    """(K, N) → paths of the linear layers with this shape among the targets, in the model's order."""
    model = build(source, device="meta", dtype=workload.torch_dtype)
    apply_lora(model, workload.lora_config(1), adapter_name="probe")
    shapes: dict[tuple[int, int], list[str]] = {}
    for path, module in model.named_modules():
        # Of stacked experts the rows are divided by values, which no shape tells; an embedding multiplies nothing.
        if "probe" in getattr(module, "lora_A", ()) and not isinstance(module, (LoraParameter, nn.Embedding)):
            K, N = module.lora_A["probe"].weight.shape[1], module.lora_B["probe"].weight.shape[0]
            shapes.setdefault((K, N), []).append(path)
    return shapes


def _rows(K: int, N: int, paths: list[str], workload: Workload, ranks: Sequence[int], rounds: int) -> list[dict]:
    steps = _steps(K, N, workload, ranks)
    device = torch.device(workload.device)
    for name in (FROZEN, DENSE):  # allocations, and what a library chooses at its first call
        timed(steps[name], device)
    repeats = max(1, min(MAX_REPEATS, round(SAMPLE_MS / timed(steps[FROZEN], device))))

    def sample(name: str) -> dict[str, float]:
        def several() -> None:
            for _ in range(repeats):
                steps[name]()

        return {"step_ms": timed(several, device) / repeats}

    record = Record()
    run_rounds(list(steps), sample, Stop(rounds), record, seed=workload.seed)
    frozen, dense = record.series(FROZEN), record.series(DENSE)
    _, aa = ratio_with_interval(record.series(FROZEN + AGAIN), frozen)
    rows = []
    for rank in ranks:
        row = {
            "in_features": K,
            "out_features": N,
            "modules": len(paths),
            "names": sorted({path.rsplit(".", 1)[-1] for path in paths}),
            "rank": rank,
            "tokens": workload.batch_size * workload.seq_len,
            "repeats": repeats,
            **record.failed.get(f"r{rank}", {"status": "ok"}),
        }
        if row["status"] == "ok":
            ours = record.series(f"r{rank}")
            row |= {"ms": statistics.median(ours), "rounds": len(ours)}
            for against, base in ((FROZEN, frozen), (DENSE, dense)):
                row[f"{against}_ms"] = statistics.median(base)
                row[f"ratio_to_{against}"], row[f"{against}_ci"] = ratio_with_interval(ours, base)
            row["noise_floor"] = max(abs(end - 1) for end in aa)
        rows.append(row)
    return rows


def _steps(K: int, N: int, workload: Workload, ranks: Sequence[int]) -> dict[str, Callable[[], None]]:
    device, dtype, adapter = workload.device, workload.torch_dtype, DTYPES[workload.adapter_dtype]
    generator = torch.Generator(device).manual_seed(workload.seed)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        """No zeros: products of them are faster than others."""
        return (torch.randn(*shape, generator=generator, device=device) * shape[-1] ** -0.5).to(dtype)

    tokens = workload.batch_size * workload.seq_len
    x, dy, weight = draw(tokens, K).requires_grad_(), draw(tokens, N), draw(N, K)
    trained = weight.clone().requires_grad_()

    def step(forward: Callable[[], Tensor], *gradients: Tensor) -> Callable[[], None]:
        return lambda: torch.autograd.grad(forward(), (x, *gradients), dy) and None

    steps = {
        FROZEN: step(lambda: nn.functional.linear(x, weight)),
        FROZEN + AGAIN: step(lambda: nn.functional.linear(x, weight)),
        DENSE: step(lambda: nn.functional.linear(x, trained), trained),
    }
    for rank in ranks:
        lora_A = draw(rank, K, dtype=adapter).requires_grad_()
        lora_B = draw(N, rank, dtype=adapter).requires_grad_()

        def adapted(lora_A=lora_A, lora_B=lora_B) -> Tensor:
            options = {"dropout_p": workload.lora_dropout, "backend": workload.backend}
            return lora_linear(x, weight, lora_A, lora_B, 2.0, **options)

        steps[f"r{rank}"] = step(adapted, lora_A, lora_B)
    return steps
