"""What a sweep measured: a row per arm, and what follows from the rows."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lora_fast import LoraFastError
from lora_fast.profiler.crossover import HIDDEN, UNMEASURED, Crossover
from lora_fast.profiler.workload import FULL

SCHEMA_VERSION = 1
# Two costs that differ by less are the same to anyone who chooses between them.
EQUAL = 0.02
# What each arm has in a document beside its own fields, where the run has a price.
PRICE = "usd_per_million_tokens"


@dataclass
class Arm:
    """One row. kind: "lora", "full" or "peft" (PEFT's LoRA); rank is None for full fine-tuning. Times are medians over
    the rounds; ratios are to full fine-tuning, paired. ratio_via: the rank beside which both this arm and full
    fine-tuning were timed, where the two could not share a process; the ratio is then a quotient of paired ratios.

    status: "ok"; "oom": memory ran out; "timeout": it hung; "killed", by a signal and not for memory; "failed".
    error says what happened, also where only one of the passes is missing. peak_MiB and by_category (MiB, at the
    peak) come from the memory pass, in an estimate from shapes; phase_peaks_MiB and phase_categories_MiB: the peak
    within forward, backward and optimizer, and what it held (a CUDA allocator's own peak is of the step);
    after_step_MiB: what is held after the optimizer's step, by category; samples_ms are the timed steps, in the
    order of the rounds. forward_flops, backward_flops: predicted, of one step, a multiply-add being two;
    flops_ratio: to full fine-tuning. predicted_MiB, predicted_by_category: the peak that shapes predict.
    executed_tflops_s: the step's FLOPs over its time, in 10¹² a second; full_equivalent_tflops_s: full
    fine-tuning's FLOPs over its time, what a full step of the same tokens would have done; executed_utilization,
    full_equivalent_utilization: the same over what a large matrix product reached beside them. projected_ms: the
    least time of each phase by the peak rates of a GPU that is known (profiler/roofline.py); projected_ratio: of the
    whole step, to full fine-tuning; projected_tokens_per_s: the most, from the same. fits: of an estimate
    for a given memory, whether the arm fits, largest_batch_size at the same length and largest_seq_len at the same
    batch (0: none)."""

    kind: str
    rank: int | None
    trainable: int
    trainable_share: float
    status: str = "ok"
    error: str | None = None
    requested_MiB: float | None = None
    step_ms: float | None = None
    forward_ms: float | None = None
    backward_ms: float | None = None
    optimizer_ms: float | None = None
    tokens_per_s: float | None = None
    ratio_to_full: float | None = None
    ratio_ci: tuple[float, float] | None = None
    ratio_via: str | None = None
    cpu_ratio: float | None = None
    cpu_ratio_ci: tuple[float, float] | None = None
    peak_MiB: float | None = None
    memory_ratio: float | None = None
    peak_phase: str | None = None
    by_category: dict[str, float] | None = None
    phase_peaks_MiB: dict[str, float] | None = None
    phase_categories_MiB: dict[str, dict[str, float]] | None = None
    resident_peak_MiB: float | None = None
    after_step_MiB: dict[str, float] | None = None
    forward_flops: int | None = None
    backward_flops: int | None = None
    flops_ratio: float | None = None
    predicted_MiB: float | None = None
    predicted_by_category: dict[str, float] | None = None
    executed_tflops_s: float | None = None
    full_equivalent_tflops_s: float | None = None
    executed_utilization: float | None = None
    full_equivalent_utilization: float | None = None
    projected_ms: dict[str, float] | None = None
    projected_ratio: float | None = None
    projected_tokens_per_s: float | None = None
    samples_ms: list[float] = field(default_factory=list)
    fits: dict | None = None

    @property
    def name(self) -> str:
        if self.rank is None:
            return FULL
        return f"peft r{self.rank}" if self.kind == "peft" else f"r{self.rank}"

    def to_dict(self) -> dict:
        return asdict(self)


def usd_per_million_tokens(arm: Arm, usd_per_hour: float | None) -> float | None:
    """None where the price or the arm's speed is not known; the least where that is projected."""
    tokens_per_s = arm.tokens_per_s or arm.projected_tokens_per_s
    if usd_per_hour is None or not tokens_per_s:
        return None
    return usd_per_hour / 3600 / tokens_per_s * 1e6


def add_projection(arms: list[Arm], seconds: list[dict[str, float]], tokens: int) -> None:
    """Fills in what `seconds` of the phases of each arm's step say, of steps of so many tokens."""
    full = sum(next(took for arm, took in zip(arms, seconds, strict=True) if arm.kind == FULL).values())
    for arm, took in zip(arms, seconds, strict=True):
        arm.projected_ms = {phase: 1000 * value for phase, value in took.items()}
        arm.projected_ratio = sum(took.values()) / full
        arm.projected_tokens_per_s = tokens / sum(took.values())


@dataclass
class Profile:
    """What `profile_ranks` measured; `to_dict` is the content of run.json.

    aa: the second copy of full fine-tuning, or of the arm that `of` names where that did not fit: ratio, ci,
    noise_floor (the larger distance of ci from 1), limit; or None.
    crossover: of "time", "flops" and "memory" (the first versions wrote no "flops") and, where time was projected, of
    "projected". folder: where the run was written, or None. layers: rows of `layers.time_layers`, where they were asked
    for."""

    environment: dict
    workload: dict
    arms: list[Arm]
    aa: dict | None
    crossover: dict[str, Crossover]
    notes: list[str] = field(default_factory=list)
    folder: Path | None = None
    layers: list[dict] | None = None

    @property
    def measured(self) -> bool:
        """Whether any arm has a time or a peak."""
        return any(arm.step_ms is not None or arm.peak_MiB is not None for arm in self.arms)

    @property
    def estimated(self) -> bool:
        """Whether estimate_memory predicted it: nothing in it was measured."""
        return self.workload.get("method") == "estimated"

    @property
    def too_noisy(self) -> bool:
        """Whether noise hides the answer to: is a rank's step faster or slower than full fine-tuning's?

        A rank is hidden if its ratio is as near to 1 as the second copy's may lie. Above the limit, up to which the
        table is to tell savings, one hidden rank is too much; below it the answer is missing where all of them are, but
        for a floor of at most EQUAL, which says that all cost the same."""
        ratios = [arm.ratio_to_full for arm in self.lora if arm.ratio_to_full is not None]
        if self.aa is None or not ratios:
            return False
        floor = self.aa["noise_floor"]
        hidden = [abs(ratio - 1) <= floor for ratio in ratios]
        return floor > EQUAL and (all(hidden) or (floor > self.aa["limit"] and any(hidden)))

    def shown_crossover(self, cost: str) -> Crossover:
        """The crossover of this cost as people are told it: time's is hidden where the profile is too noisy."""
        found = self.crossover.get(cost, Crossover(UNMEASURED, reason="it was not looked for"))
        return Crossover(HIDDEN) if cost == "time" and self.too_noisy and found.status != UNMEASURED else found

    @property
    def full(self) -> Arm:
        return next(arm for arm in self.arms if arm.kind == "full")

    @property
    def lora(self) -> list[Arm]:
        return [arm for arm in self.arms if arm.kind == "lora"]

    def _cost(self, arm: Arm) -> dict:
        price = self.workload.get("price_per_hour")
        return {} if price is None else {PRICE: usd_per_million_tokens(arm, price)}

    def to_dict(self) -> dict:
        return {
            "schema_version": SCHEMA_VERSION,
            "environment": self.environment,
            "workload": self.workload,
            "arms": [arm.to_dict() | self._cost(arm) for arm in self.arms],
            "aa": self.aa,
            "crossover": {name: value.to_dict() for name, value in self.crossover.items()},
            "notes": self.notes,
            "layers": self.layers,
        }

    @classmethod
    def from_dict(cls, run: dict) -> "Profile":
        """From the content of a run.json. Raises LoraFastError for another schema_version."""
        if run.get("schema_version") != SCHEMA_VERSION:
            raise LoraFastError(f"schema_version={run.get('schema_version')!r}; this version reads {SCHEMA_VERSION}")
        return cls(
            environment=run["environment"],
            workload=run["workload"],
            arms=[Arm(**{name: value for name, value in arm.items() if name != PRICE}) for arm in run["arms"]],
            aa=run["aa"],
            crossover={name: Crossover(**value) for name, value in run["crossover"].items()},
            notes=run["notes"],
            layers=run.get("layers"),  # absent in the first versions, as are some of an Arm's fields
        )


class NotWritten(LoraFastError):
    """All is measured, or predicted, but the run's folder took no more; `profile` holds the results."""

    def __init__(self, profile: Profile, error: OSError):
        super().__init__(f"{profile.folder} could not be written: {error}")
        self.profile = profile


def results_of(run: Callable[..., Profile], *arguments, **options) -> tuple[Profile, NotWritten | None]:
    """What `run` returns, also where it could not be written, which is then the second."""
    try:
        return run(*arguments, **options), None
    except NotWritten as unwritten:
        return unwritten.profile, unwritten
