"""Which rank, or full fine-tuning: one answer from whatever evidence there is, with the evidence beside it.

`decision_answer` says what decides in what order; a Decision adds every indicator, what disagrees, and what to measure
next."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from lora_fast.config import LoraFastError
from lora_fast.decision_answer import Answer, Facts, answer_to
from lora_fast.decision_evidence import Indicator, disagreements_of, indicators_of
from lora_fast.decision_inputs import FULL, costs_of, curve_of, directions_of
from lora_fast.decision_next import Experiment, next_experiment
from lora_fast.rank_rules import COMPLEXITIES, SCENARIOS, TASKS

SCHEMA_VERSION = 1
DOMAINS = ("near", "far")


@dataclass(frozen=True)
class Decision:
    """kind: "rank", "full" (fine-tuning), or "measure": not known, `next` would tell, and `rank` is for until then.
    rank, range: None where the answer is full fine-tuning. confidence: 0 to 1; sure: the same in a word. sentence: the
    answer in words, reasons: what it rests on. target_reached: None where no target was given or nothing was measured.
    disagreements: evidence against the answer, and why it does not change it. next: None where nothing would change the
    answer. curve: the loss-against-rank points, for a chart."""

    kind: str
    rank: int | None
    range: tuple[int, int] | None
    confidence: float
    sentence: str
    reasons: tuple[str, ...]
    indicators: tuple[Indicator, ...]
    disagreements: tuple[str, ...]
    next: Experiment | None
    target: float | None = None
    target_reached: bool | None = None
    curve: dict | None = None

    @property
    def sure(self) -> str:
        return next(word for limit, word in WORDS if self.confidence < limit)

    def to_dict(self) -> dict:
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "sure": self.sure}


WORDS = ((0.25, "a guess"), (0.45, "low"), (0.7, "medium"), (math.inf, "high"))


def decide(
    profile: Any = None,
    search: Any = None,
    spectra: Any = None,
    task: str | None = None,
    target: float | None = None,
    *,
    rank: int | None = None,
    domain: str | None = None,
    budget: int | None = None,
    model_size: float | None = None,
    data_size: int | None = None,
    tokens: float | None = None,
    scenario: str | None = None,
    parameters_per_rank: int | None = None,
    price_per_hour: float | None = None,
) -> Decision:
    """A rank, full fine-tuning, or what to measure next, from any part of the evidence, even none.

    profile: what `profile_ranks` or `estimate_memory` returned, or the content of a run.json. search: what
    `search_rank` returned, or its dict. spectra: {name: Spectrum} of an adapter or a full fine-tune, or the content of
    a spectra.json. task: a name of `rank_rules.TASKS`, or "simple", "medium", "complex". target: the metric that must
    be reached, in the search's unit and direction. rank: one that you consider. domain: "near" or "far" from what the
    model was pretrained on. budget: parameters that may be trained. model_size: billions of parameters. data_size:
    training samples. tokens: of all training. scenario: a name of `rank_rules.SCENARIOS`. parameters_per_rank:
    Σ (K + N) over the adapted layers; a profile, a search.json or spectra say it too. price_per_hour: US dollars for
    the machine. Missing evidence lowers the confidence and blocks nothing.
    Raises LoraFastError for input that is wrong."""
    costs = None if profile is None else costs_of(profile)
    curve = None if search is None else curve_of(search)
    directions = None if spectra is None else directions_of(spectra)
    _check(task, target, rank, domain, budget, model_size, data_size, tokens, scenario, parameters_per_rank)
    if price_per_hour is not None:
        _check_number("price_per_hour", price_per_hour, "US dollars")
    said = (found.parameters_per_rank for found in (costs, curve, directions) if found is not None)
    per_rank = parameters_per_rank or next(filter(None, said), None)
    if budget is not None and per_rank is not None and budget < per_rank:
        raise LoraFastError(
            f"budget={budget:,} is less than r=1 trains; these layers take at least {per_rank:,} parameters (fewer of "
            "them take less)"
        )
    total = (costs and costs.parameters) or (curve and curve.parameters)
    if model_size is None and total:
        model_size = total / 1e9
    if price_per_hour is None and costs is not None:
        price_per_hour = costs.usd_per_hour
    facts = Facts(
        *(costs, curve, directions, task, domain, target, rank, budget),
        *(model_size, data_size, tokens, scenario, per_rank, price_per_hour),
    )
    answer = answer_to(facts)
    return Decision(
        kind=answer.kind,
        rank=None if answer.kind == "full" else answer.rank,
        range=None if answer.kind == "full" else (answer.low, answer.high),
        confidence=answer.confidence,
        sentence=_sentence(facts, answer),
        reasons=answer.reasons,
        indicators=tuple(indicators_of(facts, answer)),
        disagreements=tuple(dict.fromkeys(disagreements_of(facts, answer))),
        next=next_experiment(facts, answer),
        target=target,
        target_reached=answer.target_reached,
        curve=_drawn(facts),
    )


def _check(task, target, rank, domain, budget, model_size, data_size, tokens, scenario, per_rank) -> None:
    if task is not None and task not in COMPLEXITIES and task not in TASKS:
        raise LoraFastError(f"task={task!r}; known are {', '.join((*COMPLEXITIES, *TASKS))}")
    if domain is not None and domain not in DOMAINS:
        raise LoraFastError(f"domain={domain!r}; expected near or far (from what the model was pretrained on)")
    if scenario is not None and scenario not in SCENARIOS:
        raise LoraFastError(f"scenario={scenario!r}; known are {', '.join(SCENARIOS)}")
    if target is not None and (not _is_number(target) or not math.isfinite(target)):
        raise LoraFastError(f"target={target!r}; expected the value of the metric that must be reached")
    for name, value, least in (("rank", rank, 1), ("budget", budget, 1), ("data_size", data_size, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise LoraFastError(f"{name}={value!r}; expected a whole number of at least {least}")
    for name, value in (("model_size", model_size), ("tokens", tokens), ("parameters_per_rank", per_rank)):
        if value is not None:
            _check_number(name, value, "billions of parameters" if name == "model_size" else "")


def _check_number(name: str, value: float, unit: str) -> None:
    if not _is_number(value) or not 0 < value < math.inf:
        raise LoraFastError(f"{name}={value!r}; expected a positive number{f' ({unit})' if unit else ''}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _sentence(f: Facts, answer: Answer) -> str:
    around = "" if answer.low == answer.high else f" ({answer.low} to {answer.high})"
    reasons = "; ".join(answer.reasons)
    if answer.kind == "full":
        return f"Full fine-tuning: {reasons}."
    if answer.kind == "measure":
        return f"Not known yet. Until it is, r={answer.rank}{around}: {reasons}."
    return f"r={answer.rank}{around}: {reasons}."


def _drawn(f: Facts) -> dict | None:
    """The curve as points, for a chart: half_width is SIGNIFICANT standard errors of the mean; None: noise unknown."""
    c = f.curve
    if c is None:
        return None

    def drawn(rank) -> dict:
        point = c.point(rank)
        half = None if c.noise is None else c.margin(rank)
        return {"rank": rank, "mean": point.mean, "count": point.count, "half_width": half}

    return {
        "direction": "minimize" if c.sign == 1 else "maximize",
        "noise": c.noise,
        "verdict": c.verdict,
        "points": [drawn(rank) for rank in c.ranks],
        "full": None if c.full is None else drawn(FULL),
        "seconds": {str(rank): list(values) for rank, values in c.seconds.items()},
    }


def section(decision: Decision) -> dict:
    """What a report shows of a decision, in plain data: title, answer, confidence, curve (points, full, the recommended
    rank, the target), indicators (rows for a table), disagreements, next."""
    curve = None
    if decision.curve is not None:
        curve = decision.curve | {"recommended": decision.rank, "range": decision.range, "target": decision.target}
    return {
        "title": "Which rank, or full fine-tuning?",
        "answer": decision.sentence,
        "kind": decision.kind,
        "confidence": decision.confidence,
        "sure": decision.sure,
        "curve": curve,
        "indicators": [asdict(indicator) for indicator in decision.indicators],
        "disagreements": list(decision.disagreements),
        "next": None if decision.next is None else asdict(decision.next),
    }
