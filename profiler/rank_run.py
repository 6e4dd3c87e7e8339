"""A rank search on a model and text files, from its arguments to the run folder.

The folder: resume.json (what was asked for), search.db (Optuna's study), trainings/ (a file for each training, with its
curves, and the adapters where they are kept), base/ (the model of the small example); at the end search.json and
curve.png."""

import hashlib
import json
import shutil
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lora_fast import LoraFastError, LoraFastWarning
from lora_fast.profiler import models, small_example, text_data
from lora_fast.profiler.models import ModelSource
from lora_fast.profiler.rank_trainer import (
    FULL_RATE_SHARE,
    FULL_RATE_SOURCE,
    SCALINGS,
    Recipe,
    fit,
    train_rank,
)
from lora_fast.profiler.ranks import parse_ranks
from lora_fast.profiler.runs import RunFolder, default_folder, environment, resolve_device, to_json
from lora_fast.profiler.text_data import Text
from lora_fast.profiler.workload import parse_modules
from lora_fast.rank_search import FULL, SIGNIFICANT, Rank, RankSearch, Trial, check_search, search_rank
from lora_fast.training_curve import learned_nothing, read_training_curve

SCHEMA_VERSION = 1
PLAN, DATABASE, RESULT, CHART = "resume.json", "search.db", "search.json", "curve.png"
RANKS = "1:64:x2,full"
# Held-out sequences that a training is evaluated on, spread over the file.
HELD_OUT_SEQUENCES = 128
# Of a model of the caller's own. 2e-4: the usual rate of LoRA recipes (QLoRA, arXiv:2305.14314, up to 13B parameters).
DEFAULTS = {"steps": 200, "batch_size": 8, "seq_len": 512, "learning_rate": 2e-4}
# The small example: a Llama of 1.3M parameters that reads bytes.
EXAMPLE = {"steps": 200, "batch_size": 4, "seq_len": 128, "learning_rate": 5e-3}
EXAMPLE_SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}
EXAMPLE_BASE = {"steps": 600, "batch_size": 8, "seq_len": 128, "learning_rate": 2e-3}

Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Plan:
    """A search whose arguments were found good. rows, held_out: (count, seq_len) of token ids; source: None for the
    small example, whose model is still to be trained. settings: what a search that goes on must have alike."""

    source: ModelSource | None
    train: Text
    evaluation: Text
    rows: Tensor
    held_out: Tensor
    held_out_count: int
    recipe: Recipe
    ranks: tuple[Rank, ...]
    strategy: str
    start: int
    seeds: tuple[int, ...]
    storage: str | None
    folder: RunFolder
    keep_adapters: bool
    prune: bool
    device: str
    settings: dict

    @property
    def most(self) -> int:
        """Trainings, at most: with one seed, two ranks get a second."""
        return len(self.ranks) * len(self.seeds) + (2 if len(self.seeds) == 1 else 0)


@dataclass(frozen=True)
class RankRun:
    """search: the answer. document: search.json's content. folder: where it is, with trainings/r8-seed0/ and so on for
    the adapters, where they were kept."""

    search: RankSearch
    document: dict
    folder: Path

    def adapter(self, rank: int, seed: int) -> Path:
        return self.folder / "trainings" / _name(rank, seed)


def plan_search(
    model: str | None = None,
    train: str | Path | None = None,
    evaluation: str | Path | None = None,
    ranks: str | Sequence[Rank] = RANKS,
    *,
    strategy: str | None = None,
    start: int = 1,
    seeds: int | Sequence[int] = 2,
    steps: int | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
    learning_rate: float | None = None,
    full_learning_rate: float | None = None,
    scaling: str = "inverse",
    dtype: str | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    lora_dropout: float = 0.0,
    gradient_accumulation: int = 1,
    gradient_checkpointing: bool = False,
    text_field: str = "text",
    held_out_sequences: int = HELD_OUT_SEQUENCES,
    device: str = "auto",
    storage: str | None = None,
    keep_adapters: bool = False,
    prune: bool = False,
    out: str | Path | None = None,
    resume: bool = False,
) -> Plan:
    """Look at all arguments, files among them, before anything is trained or written.

    model: as `lora-fast profile` takes it; train, evaluation: plain text, or .jsonl with text_field. Without all three,
    the small example. ranks: "1:64:x2,full", or numbers and "full". strategy, start, seeds: as `search_rank` takes
    them; strategy None: "progressive", in the example "grid". full_learning_rate: None: a tenth of learning_rate.
    dtype: None: fp32 on a CPU, bf16 on a GPU. held_out_sequences: the most that are evaluated. storage: as Optuna takes
    it; None: a SQLite file in the folder. keep_adapters: save each. prune: stop trainings that lag behind (the curve
    then lacks their ranks). out: a new folder, None: runs/search-MODEL-DATE-TIME; resume: go on with the search in it.
    Warns where the two texts are one. Raises LoraFastError for wrong input."""
    device = _device(device)
    source = train_text = evaluation_text = None
    given = [name for name, value in (("model", model), ("train", train), ("eval", evaluation)) if value is not None]
    if len(given) in (1, 2):
        missing = " and ".join(f"--{name}" for name in ("model", "train", "eval") if name not in given)
        raise LoraFastError(f"--{given[0]} is given without {missing}; give all three, or none for the small example")
    if given:
        source = models.resolve(model)
        encoder = text_data.encoder_of(source)
        train_text, evaluation_text = (text_data.read_text(path, text_field) for path in (train, evaluation))
    else:
        encoder = text_data.BYTES
        train_text, evaluation_text = example_texts()
    if train_text.digest == evaluation_text.digest:
        warnings.warn(
            f"{evaluation_text.name} says the same as {train_text.name}: the curve shows what was memorized, which "
            "flatters large ranks; give text that is not trained on as --eval",
            LoraFastWarning,
            stacklevel=2,
        )
    chosen = dict(DEFAULTS if given else EXAMPLE)
    told = {"steps": steps, "batch_size": batch_size, "seq_len": seq_len, "learning_rate": learning_rate}
    chosen |= {name: value for name, value in told.items() if value is not None}
    if full_learning_rate is None:
        full_learning_rate = FULL_RATE_SHARE * chosen["learning_rate"]
    recipe = Recipe(
        **chosen,
        full_learning_rate=full_learning_rate,
        scaling=scaling,
        dtype=dtype or ("fp32" if device == "cpu" or not given else "bf16"),
        target_modules=parse_modules(target_modules),
        lora_dropout=lora_dropout,
        gradient_accumulation=gradient_accumulation,
        gradient_checkpointing=gradient_checkpointing,
    )
    if recipe.dtype == "fp16" and device == "cpu":
        raise LoraFastError("dtype='fp16' needs a GPU to train; use fp32 or bf16 on a CPU")
    if held_out_sequences < 1:
        raise LoraFastError(f"held_out_sequences={held_out_sequences}; expected at least 1")
    vocabulary = small_example.BYTES
    if source is not None:
        vocabulary = _check_model(source, recipe)
    rows, all_held_out = (
        text_data.blocks(text_data.token_ids(text, encoder, vocabulary), recipe.seq_len, text.name)
        for text in (train_text, evaluation_text)
    )
    held_out = text_data.spread(all_held_out, held_out_sequences)
    strategy = strategy or ("progressive" if given else "grid")
    ranks = _ranks(ranks)
    _, _, seeds = check_search(ranks, strategy, start, seeds)
    name = "example" if source is None else source.name
    settings = {
        "model": name if source is None else source.to_dict(),
        "train": {"file": train_text.name, "digest": train_text.digest, "tokens": rows.numel()},
        "eval": {"file": evaluation_text.name, "digest": evaluation_text.digest, "sequences": len(held_out)},
        "tokenizer": encoder.name,
        "recipe": json.loads(json.dumps(recipe.to_dict())),
    }
    return Plan(
        source=source,
        train=train_text,
        evaluation=evaluation_text,
        rows=rows,
        held_out=held_out,
        held_out_count=len(all_held_out),
        recipe=recipe,
        ranks=ranks,
        strategy=strategy,
        start=start,
        seeds=tuple(seeds),
        storage=storage,
        folder=_folder(out or default_folder(f"search-{name}"), settings, resume),
        keep_adapters=keep_adapters,
        prune=prune,
        device=device,
        settings=settings,
    )


def run_search(plan: Plan, progress: Progress = lambda stage, done, total, text: None) -> RankRun:
    """Train, or go on training, and write search.json and curve.png. progress: stage ("base" or "search"), done, total,
    and what is at work."""
    folder = plan.folder
    folder.write(PLAN, to_json(plan.settings))
    (folder.path / "trainings").mkdir(exist_ok=True)
    source = plan.source or _example_model(folder.path, plan.device, progress)
    storage = plan.storage or f"sqlite:///{(folder.path / DATABASE).absolute()}"
    done = len(list(folder.path.glob("trainings/*.json")))

    def tell(text: str) -> None:
        progress("search", min(done, plan.most), plan.most, text)

    def train_and_evaluate(rank: Rank, *, seed: int, report=None) -> float:
        name = _name(rank, seed)
        tell(f"{name}: loading")
        training = train_rank(
            source,
            rank,
            seed,
            plan.recipe,
            plan.rows,
            plan.held_out,
            device=plan.device,
            adapter=folder.path / "trainings" / name if plan.keep_adapters else None,
            on_step=lambda step, steps: tell(f"{name}: step {step}/{steps}"),
            report=report,
        )
        folder.write(f"trainings/{name}.json", json.dumps(training.to_dict()) + "\n")
        return training.loss

    def ended(trial: Trial) -> None:
        nonlocal done
        done += 1
        tell(f"{_name(trial.rank, trial.seed)}: {trial.status if trial.value is None else f'{trial.value:.4f}'}")

    search = search_rank(
        train_and_evaluate if plan.prune else lambda rank, *, seed: train_and_evaluate(rank, seed=seed),
        plan.ranks,
        plan.strategy,
        seeds=plan.seeds,
        start=plan.start,
        storage=storage,
        # Several searches can share a storage; those with other settings are other studies.
        study_name=f"rank-{hashlib.sha256(json.dumps(_shared(plan.settings)).encode()).hexdigest()[:12]}",
        progress=ended,
    )
    found = document(plan, source, search)
    folder.write(RESULT, to_json(found))
    from lora_fast.profiler.rank_curve import draw_png

    folder.write(CHART, draw_png(found))
    return RankRun(search, found, folder.path)


def document(plan: Plan, source: ModelSource, search: RankSearch) -> dict:
    """search.json: where and what, the search, and for each rank its mean, its curves' means and what they say."""
    recipe = plan.recipe
    trainings = _trainings(plan.folder.path)
    model = models.build(source, device="meta", dtype=torch.float32)
    return {
        "schema_version": SCHEMA_VERSION,
        "environment": environment(plan.device),
        "model": {
            "name": source.name,
            "weights": source.weights,
            "example": plan.source is None,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "vocab_size": models.vocab_size(model),
        },
        "data": {
            "train": {**plan.settings["train"], "sequences": len(plan.rows)},
            "eval": {**plan.settings["eval"], "sequences_in_file": plan.held_out_count},
            "tokenizer": plan.settings["tokenizer"],
            "epochs": recipe.steps * recipe.tokens_per_step / plan.rows.numel(),
            "same_text": plan.train.digest == plan.evaluation.digest,
        },
        "recipe": {
            **plan.settings["recipe"],
            "scaling_says": SCALINGS[recipe.scaling][-1],
            "full_learning_rate_source": FULL_RATE_SOURCE
            if recipe.full_learning_rate == FULL_RATE_SHARE * recipe.learning_rate
            else None,
        },
        "strategy": plan.strategy,
        "seeds": list(plan.seeds),
        "search": json.loads(json.dumps(search.to_dict())),
        "ranks": [_rank(point.rank, search, trainings) for point in search.points],
    }


def _rank(rank: Rank, search: RankSearch, trainings: dict) -> dict:
    """One row: its mean and spread, what it took, and its curves."""
    point = next(point for point in search.points if point.rank == rank)
    best = min((p for p in search.points if p.rank != FULL), key=lambda p: p.mean, default=point)
    good = [trial for trial in search.trials if trial.rank == rank and trial.value is not None]
    values = [trial.value for trial in good]
    seconds = [trial.seconds for trial in good if trial.seconds is not None]
    margin = SIGNIFICANT * (search.noise or 0.0) * (1 / point.count + 1 / best.count) ** 0.5
    here = [trainings[rank, trial.seed] for trial in good if (rank, trial.seed) in trainings]
    train, evaluation = (_mean_curve([training[name] for training in here]) for name in ("train", "evaluation"))
    reading = None
    if here:
        # What the best rank reached is no measure where it learned nothing.
        idle = evaluation and learned_nothing([evaluation[0][1], best.mean], margin)
        expected = None if idle else best.mean
        reading = read_training_curve(train, evaluation, expected=expected, noise=margin, full=rank == FULL).to_dict()
    return {
        "rank": rank,
        "mean": point.mean,
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
        "seconds": statistics.fmean(seconds) if seconds else None,
        "trained": here[0]["trained"] if here else None,
        "above_best": point.mean - best.mean,
        "margin": margin if search.noise is not None else None,
        "train": train,
        "evaluation": evaluation,
        "reading": reading,
    }


def _mean_curve(curves: list[list[list[float]]]) -> list[tuple[int, float]]:
    """The mean over seeds, whose steps are the same."""
    return [(points[0][0], statistics.fmean(loss for _, loss in points)) for points in zip(*curves, strict=False)]


def _trainings(folder: Path) -> dict[tuple[Rank, int], dict]:
    found = (json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("trainings/*.json")))
    return {(training["rank"], training["seed"]): training for training in found}


def _name(rank: Rank, seed: int) -> str:
    return f"{rank if rank == FULL else f'r{rank}'}-seed{seed}"


def _shared(settings: dict) -> dict:
    """Settings without the paths of one machine, for a study that several share."""
    found = json.loads(json.dumps(settings))
    if isinstance(found["model"], dict):
        found["model"].pop("location")
    for name in ("train", "eval"):
        found[name].pop("file")
    return found


def _device(name: str) -> str:
    device = resolve_device(name)
    if device not in ("cpu", "cuda"):
        raise LoraFastError(
            f"device={device!r}; Trainer takes the first GPU that it sees: choose one with CUDA_VISIBLE_DEVICES, and "
            "give cuda"
        )
    return device


def _ranks(ranks: str | Sequence[Rank]) -> tuple[Rank, ...]:
    parts = [part.strip() for part in ranks.split(",")] if isinstance(ranks, str) else list(ranks)
    numbers = [part for part in parts if part != FULL]
    if not numbers:
        raise LoraFastError(f"--ranks {ranks!r} names no rank; expected such as {RANKS}")
    found = parse_ranks(",".join(numbers) if isinstance(ranks, str) else numbers)
    if found is None:
        raise LoraFastError(f"--ranks {ranks!r}; a search takes numbers and ranges, such as {RANKS}")
    return (*found, *([FULL] if FULL in parts else []))


def _check_model(source: ModelSource, recipe: Recipe) -> int:
    """Whether the model takes such sequences and has such modules; returns its vocabulary's size."""
    from lora_fast import apply_lora

    model = models.build(source, device="meta", dtype=torch.float32)
    longest = models.max_positions(model)
    if longest is not None and recipe.seq_len > longest:
        raise LoraFastError(f"seq_len={recipe.seq_len} exceeds the model's max_position_embeddings={longest}")
    vocabulary = models.vocab_size(model)
    if not vocabulary:
        raise LoraFastError(f"{source.name}: its config has no vocab_size")
    apply_lora(model, recipe.lora_config(1))
    return vocabulary


def _folder(path: str | Path, settings: dict, resume: bool) -> RunFolder:
    folder = RunFolder(path, resume)
    plan = folder.path / PLAN
    if not plan.is_file():
        if resume and folder.path.is_dir() and any(folder.path.iterdir()):
            raise LoraFastError(
                f"{folder.path} has no {PLAN}, so that no search can be gone on with; give another --out"
            )
        return folder
    before = json.loads(plan.read_text(encoding="utf-8"))
    for name, now in settings.items():
        if before.get(name) != now:
            told, now = _difference(name, before.get(name), now)
            raise LoraFastError(f"{folder.path} was begun with {told}, and now it is {now}; --resume needs the same")
    return folder


def _difference(name: str, before, now) -> tuple[str, str]:
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in (*now, *before) if before.get(key) != now.get(key))
        return f"{key}={before.get(key)!r}", f"{now.get(key)!r}"
    return f"{name}={before!r}", f"{now!r}"


# --------------------------------------------------------------------------------------------------- the small example


def example_texts() -> tuple[Text, Text]:
    if not small_example.code().strip():
        raise LoraFastError("this Python has no sources of its standard library; give --model, --train and --eval")
    parts = small_example.split(small_example.prose())
    names = ("help topics of Python", "help topics of Python, their last tenth")
    return tuple(Text.of(name, [part.decode(errors="ignore")]) for name, part in zip(names, parts))


def _example_model(folder: Path, device: str, progress: Progress) -> ModelSource:
    """A Llama of bytes that has read the standard library's sources, trained once and kept in the folder."""
    base = folder / "base"
    if not base.is_dir():
        recipe = Recipe(**EXAMPLE_BASE, full_learning_rate=EXAMPLE_BASE["learning_rate"])
        text, _ = small_example.split(small_example.code())
        ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        torch.manual_seed(0)
        model = small_example.byte_llama(EXAMPLE_SHAPE, recipe.seq_len)
        rows = text_data.blocks(ids, recipe.seq_len, "the standard library's sources")
        fit(
            model,
            rows,
            None,
            recipe,
            recipe.full_learning_rate,
            0,
            device,
            on_step=lambda step, steps: progress("base", step, steps, "the example's model"),
        )
        partial = folder / ".base"
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        partial.rename(base)
    return replace(models.resolve(str(base)), name="example")
