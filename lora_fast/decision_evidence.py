"""The evidence beside a decision: every indicator with its threshold and source, and what disagrees with the answer."""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from lora_fast.decision_answer import (
    COUNTED,
    EVALUATE_SHARE,
    FULL_SHARE,
    NEAR,
    PER_KNOWN,
    PUBLISHED,
    RULES,
    SHARE,
    SPECTRA,
    TIMED,
    Answer,
    Facts,
    by_publications,
    by_rules,
    by_spectra,
    cost_at,
    is_unclear,
    search_sure,
    span,
)
from lora_fast.decision_inputs import FULL, Ratio, ratio_at
from lora_fast.rank_evidence import BIDERMAN, GUIDE_FULL, GUIDE_RANK, SCHULMAN
from lora_fast.rank_rules import EVALUATE_FULL_FROM, capacity_rank, suggest_rank

OURS = "ours"
LORA, FULL_TUNING, EVALUATE, UNKNOWN = "LoRA", "full fine-tuning", "evaluate", "not known"
# Indicators whose verdict is one for or against full fine-tuning.
WEIGHED = ("trained share", "loss against rank", "task and domain", "step time", "training time", "memory")
FITTING = ("fits", "too large", "too small")


@dataclass(frozen=True)
class Indicator:
    """One piece of evidence. value: as text; "–" where there is none. threshold: what it is held against. verdict:
    "LoRA", "full fine-tuning", "evaluate" (full fine-tuning against it), or "not known". says: in words. sure: 0 to 1,
    how far it goes by itself; 0 where it is missing. source: where the rule comes from."""

    name: str
    value: str
    threshold: str
    verdict: str
    says: str
    sure: float
    source: str


def indicators_of(f: Facts, answer: Answer) -> Iterator[Indicator]:
    rank = answer.rank
    yield _share_indicator(f, rank)
    yield _curve_indicator(f)
    yield _training_indicator(f, rank)
    yield _task_indicator(f)
    yield from _cost_indicators(f, rank)
    yield _spectra_indicator(f)
    yield _capacity_indicator(f, rank)
    yield _budget_indicator(f, rank)
    yield _rules_indicator(f)


def _missing(name: str, threshold: str, says: str, source: str) -> Indicator:
    return Indicator(name, "–", threshold, UNKNOWN, says, 0.0, source)


def _share_indicator(f: Facts, rank: int) -> Indicator:
    name, source = "trained share", f"{GUIDE_FULL}, 1; that 20% settle it by themselves is {OURS}"
    threshold = f"{EVALUATE_SHARE:.0%} evaluate, {FULL_SHARE:.0%} full"
    share = f.share(rank)
    if share is None:
        return _missing(name, threshold, "needs the model: a profile, or model_size and parameters_per_rank", source)
    verdict = FULL_TUNING if share >= FULL_SHARE else EVALUATE if share >= EVALUATE_SHARE else LORA
    says = f"r={rank} trains {share:.2%} of the parameters"
    if (cost := cost_at(f, rank)) is not None:
        says += f"; a stand-in for cost, which is known here ({cost.kind})"
    return Indicator(name, f"{share:.2%}", threshold, verdict, says, SHARE, source)


def _curve_indicator(f: Facts) -> Indicator:
    c = f.curve
    name, source = "loss against rank", f"measured here; {GUIDE_FULL}, 2, and {GUIDE_RANK}, signal 2"
    threshold = f"target {f.target:.4g}" if f.target is not None else "a gain above the noise"
    if c is None or not c.ranks:
        says = "no rank was tried on your data: a rank search would" if c is None else "no rank gave a value"
        return _missing(name, threshold, says, source)
    if c.unlearned is not None:
        return _missing(name, threshold, c.unlearned, source)
    best = c.best(list(c.ranks))
    verdict, says = LORA, c.sentence
    if c.full_is == "better":
        verdict = FULL_TUNING
    elif c.full is None and c.verdict == "still rising":
        verdict = EVALUATE
    if f.target is not None:
        reached = c.reaches(best, f.target)
        says = f"the best rank {'reaches' if reached == 'yes' else 'misses'} the target; {c.sentence}"
        if reached == "yes":
            verdict = LORA
        elif c.full is None:
            plateau = c.verdict in ("plateau", "flat") and len(c.ranks) > 1 and reached == "no"
            verdict = FULL_TUNING if plateau else EVALUATE
        elif c.reaches(FULL, f.target) == "yes":
            verdict = FULL_TUNING
    value = f"{c.verdict}; {c.ranks[best].mean:.4g} at r={best}"
    if c.full is not None:
        value += f", {c.full.mean:.4g} full"
    return Indicator(name, value, threshold, verdict, says, search_sure(c), source)


def _training_indicator(f: Facts, rank: int) -> Indicator:
    """Signal 1, of the trainings at the answer's rank, or at the largest that was read."""
    name, source = "training curves", f"{GUIDE_RANK}, signal 1; its thresholds are {OURS}"
    threshold = "both losses fall together"
    known = {} if f.curve is None else {r: said for r, said in f.curve.readings.items() if r != FULL}
    if not known:
        says = "no losses by step: a rank search keeps them"
        if f.curve is not None and f.curve.unlearned is not None:
            says = "they fell too little to say anything of the rank"
        return _missing(name, threshold, says, source)
    at = rank if rank in known else max(known)
    verdict, sentence = known[at]
    if verdict not in FITTING:
        return _missing(name, threshold, f"r={at}: {sentence}", source)
    speaks = EVALUATE if verdict == "too small" and at == max(known) else LORA
    return Indicator(name, f"{verdict}, at r={at}", threshold, speaks, sentence, RULES + PER_KNOWN, source)


def _task_indicator(f: Facts) -> Indicator:
    name, source = "task and domain", f"{GUIDE_FULL}, 3"
    threshold = "new knowledge, complex logic, far"
    if f.task is None and f.domain is None:
        return _missing(name, threshold, "neither the task nor its distance from pretraining was given", source)
    value = ", ".join(word for word in (f.task, f.domain and f"{f.domain} domain") if word)
    if f.task == "continued-pretraining":
        says = "20B tokens of code: r=256 0.224, full fine-tuning 0.263 on HumanEval"
        return Indicator(name, value, threshold, FULL_TUNING, says, PUBLISHED, BIDERMAN)
    if f.task == "reinforcement-learning":
        return Indicator(name, value, threshold, LORA, "an episode carries about one bit", PUBLISHED, SCHULMAN)
    if f.is_demanding:
        says = "full fine-tuning is often better there; with all layers adapted and r=256 LoRA equalled it on code"
        return Indicator(name, value, threshold, EVALUATE, says, RULES + PER_KNOWN, f"{source}; against it {BIDERMAN}")
    says = "changes of behaviour near pretraining need small ranks"
    return Indicator(name, value, threshold, LORA, says, RULES + PER_KNOWN, source)


def _cost_indicators(f: Facts, rank: int) -> Iterator[Indicator]:
    source, threshold = f"measured here; {GUIDE_FULL}, 4; {NEAR} is {OURS}", f"{NEAR} of full"
    costs = f.costs
    steps = None if costs is None else ratio_at(costs.time, rank)
    if steps is not None and costs.noise is None:
        says = f"a step at r={rank} takes {steps} of full fine-tuning's{_price_words(f, rank)}"
        yield Indicator("step time", str(steps), threshold, _cost_verdict(steps), says, TIMED, source)
    elif costs is not None and (projected := ratio_at(costs.projected, rank)) is not None:
        why = f"times say nothing, {costs.noise}" if steps is not None else "no step was timed"
        says = f"{why}; by the GPU's peak rates one at r={rank} takes {projected} of full fine-tuning's"
        verdict = _cost_verdict(projected)
        yield Indicator("step time", f"{projected} (projected)", threshold, verdict, says, COUNTED, source)
    elif costs is not None and (flops := ratio_at(costs.flops, rank)) is not None:
        why = f"times say nothing, {costs.noise}" if steps is not None else "no step was timed"
        says = f"{why}; FLOPs at r={rank} are {flops} of full fine-tuning's"
        yield Indicator("step time", f"{flops} (FLOPs)", threshold, _cost_verdict(flops), says, COUNTED, source)
    else:
        why = "no profile" if costs is None else costs.noise or "no rank and full fine-tuning were both timed"
        yield _missing("step time", threshold, why, source)
    total = None if f.curve is None else f.curve.time_ratio(rank)
    if total is not None:
        each, full = (statistics.fmean(f.curve.seconds[key]) for key in (rank, FULL))
        says = f"a whole training took {each:.3g} s at r={rank}, {full:.3g} s in full{_price_of(f, each, full)}"
        if is_unclear(total):
            says += "; single trainings differ too much to tell"
        verdict = UNKNOWN if is_unclear(total) else _cost_verdict(total)
        yield Indicator("training time", str(total), threshold, verdict, says, TIMED, source)
    else:
        says = "a search with full fine-tuning as an arm would time whole trainings"
        yield _missing("training time", threshold, says, source)
    memory = None if costs is None else ratio_at(costs.memory, rank)
    if costs is not None and costs.full_oom:
        says = "full fine-tuning does not fit here"
        yield Indicator("memory", "full: out of memory", "fits", LORA, says, TIMED, source)
    elif memory is not None:
        word = "predicted" if costs.estimated else "peak"
        says = f"r={rank} takes {memory} of full fine-tuning's memory ({word})"
        sure = COUNTED if costs.estimated else TIMED
        yield Indicator("memory", str(memory), threshold, _cost_verdict(memory), says, sure, source)
    else:
        yield _missing("memory", threshold, "no profile" if costs is None else "full or this rank has no peak", source)


def _cost_verdict(ratio: Ratio) -> str:
    if ratio.value >= NEAR:
        return FULL_TUNING if ratio.bound != "≤" else EVALUATE
    return EVALUATE if ratio.bound == "≥" else LORA


def _price_words(f: Facts, rank: int) -> str:
    """ ", 0.42 against 0.51 US dollars for …" where a price and speeds are known."""
    speeds = f.costs.tokens_per_s
    if f.usd_per_hour is None or rank not in speeds or FULL not in speeds:
        return ""
    tokens = f.tokens or 1e6
    each, full = (f.usd_per_hour / 3600 * tokens / speeds[key] for key in (rank, FULL))
    return f": ${each:.3g} against ${full:.3g} for {tokens:,.0f} tokens"


def _price_of(f: Facts, *seconds: float) -> str:
    if f.usd_per_hour is None:
        return ""
    return ": " + " against ".join(f"${f.usd_per_hour / 3600 * s:.3g}" for s in seconds)


def _spectra_indicator(f: Facts) -> Indicator:
    name, threshold = "spectra", "99% of ‖ΔW‖² in at most r/2"
    source = "Eckart and Young 1936; as a rule for the rank to train with not calibrated"
    if f.spectra is None:
        return _missing(name, threshold, "no spectrum of a trained update", source)
    s = f.spectra
    rank, _, says = by_spectra(s)
    value = f"r99 {s.needed}" + (f" of {s.trained}" if s.trained else "") if s.trained else f"r90 {s.needed}"
    verdict = EVALUATE if rank >= EVALUATE_FULL_FROM else LORA
    return Indicator(name, value, threshold if s.trained else "90% of ‖ΔW‖²", verdict, says, SPECTRA, source)


def _capacity_indicator(f: Facts, rank: int) -> Indicator:
    name, threshold, source = "capacity", "1 bit a token in 2 bits a parameter", SCHULMAN
    if f.tokens is None or f.per_rank is None:
        return _missing(name, threshold, "needs the tokens of the training data and the model", source)
    least = max(1, math.ceil(capacity_rank(f.tokens, f.per_rank)))
    says = f"at least r={least} for {f.tokens:,.0f} tokens; a lower bound (for 73M at 7B it says 15; 256 was needed)"
    return Indicator(name, f"r ≥ {least}", threshold, EVALUATE if least > rank else LORA, says, RULES, source)


def _budget_indicator(f: Facts, rank: int) -> Indicator:
    name, source = "budget", "exact: r · Σ (K + N) over the adapted layers"
    if f.budget is None:
        return _missing(name, "r Σ (K + N) ≤ budget", "no budget was given", source)
    threshold = f"{f.budget:,}"
    if f.per_rank is None:
        return _missing(name, threshold, "needs the model: a profile, or parameters_per_rank", source)
    says = f"allows up to r={f.budget // f.per_rank}"
    return Indicator(name, f"{rank * f.per_rank:,} at r={rank}", threshold, LORA, says, 1.0, source)


def _rules_indicator(f: Facts) -> Indicator:
    found = by_rules(f)
    value = f"r={found.rank} ({span(found.low, found.high)})"
    return Indicator("rules of thumb", value, "rows of the summary table", LORA, found.why, found.sure, GUIDE_RANK)


# ---------------------------------------------------------------------------------------------------- disagreements


def disagreements_of(f: Facts, answer: Answer) -> Iterator[str]:
    """What speaks against the answer, and why it does not decide."""
    full, rank, rules = answer.kind == "full", answer.rank, by_rules(f)
    for found in indicators_of(f, answer):
        if found.sure and found.name in WEIGHED and found.verdict in ((LORA,) if full else (FULL_TUNING, EVALUATE)):
            favours = {EVALUATE: "weighing full fine-tuning"}.get(found.verdict, found.verdict)
            yield f"{found.name} speaks for {favours} ({found.says}); {_why_not(f, answer, found)}"
    seen = f.curve or f.spectra or f.rank or by_publications(f)
    if not full and seen and not rules.low <= rank <= rules.high:
        yield f"{rules.why}, not {rank}; a rule of thumb has not seen your data"
    if not full and f.curve is not None and (read := f.curve.readings.get(rank)) and read[0] in FITTING[1:]:
        yield f"signal 1 reads the training curves of r={rank} as {read[0]} ({read[1]}); losses of other ranks say more"
    sides = [found.smallest_side for found in (f.costs, f.spectra) if found is not None and found.smallest_side]
    if not full and sides and rank > min(sides):
        yield (
            f"r={rank} is above min(N, K) = {min(sides)} of an adapted layer, whose update has no higher rank: "
            "there it only costs more; rank_pattern gives such layers a rank of their own"
        )
    if f.spectra is not None:
        other, _, why = by_spectra(f.spectra)
        if full or not other / 2 <= rank <= 2 * other:
            yield f"the spectra say r={other} ({why}); they show what was learned, not what it took to learn it"
        verdicts = {rule: verdict for rule, verdict, *_ in f.spectra.says if verdict in FITTING}
        if len(set(verdicts.values())) > 1:
            words = ", ".join(f"{rule}: {verdict}" for rule, verdict in verdicts.items())
            yield f"rules on the spectra disagree on the trained rank ({words}); none of them is calibrated"
    capacity = f.tokens is not None and f.per_rank is not None
    if capacity and not full and (least := math.ceil(capacity_rank(f.tokens, f.per_rank))) > answer.rank:
        yield f"capacity asks for r={least} or more for {f.tokens:,.0f} tokens; what was measured here counts for more"
    if f.curve is None and f.rank is not None and f.spectra is not None and f.rank != answer.rank:
        yield f"you consider r={f.rank}; what was learned here fits into r={answer.rank}"
    learned = f.curve is not None and f.curve.unlearned is None
    if learned and f.rank is not None and not full and f.rank != rank:
        yield _considered(f, rank)
    if f.curve is None and f.spectra is None and None not in (f.task, f.model_size, f.data_size):
        yield from suggest_rank(f.model_size, f.task, f.data_size, scenario=f.scenario).disagreements
    if full and f.data_size is not None and f.data_size < 1_000:
        yield f"with under 1,000 samples a low rank regularizes ({GUIDE_RANK}, from Table 16); watch for overfitting"
    if f.curve is not None and f.curve.seconds and f.costs is not None and f.costs.noise is None:
        total, step = cost_at(f, rank), ratio_at(f.costs.time, rank)
        both = total is not None and total.kind == "training time" and step is not None
        if both and total.is_near != (step.value >= NEAR):
            yield f"a step takes {step} of full fine-tuning's, a whole training {total.ratio}; that is what is paid"


def _considered(f: Facts, rank: int) -> str:
    """What the curve says of the rank that the caller considers, beside the answer's."""
    c, said = f.curve, f"you consider r={f.rank}"
    if f.rank not in c.ranks or rank not in c.ranks:
        return f"{said}, which the search did not try"
    gain, margin = c.gain(rank, f.rank), c.margin(rank, f.rank)
    word = "better than" if gain > margin else "worse than" if -gain > margin else "as good as"
    return f"{said}: {c.ranks[f.rank].mean:.4g}, {word} r={rank} ({c.ranks[rank].mean:.4g})"


def _why_not(f: Facts, answer: Answer, found: Indicator) -> str:
    if f.curve is not None and f.curve.unlearned is not None:
        return "but something has to be learned first"
    if answer.kind == "measure":
        return "it is why the answer is open"
    if f.no_full is not None and answer.kind == "rank":
        return f"but {f.no_full}"
    if found.name == "trained share" and cost_at(f, answer.rank) is not None:
        return "measured cost counts for more than its stand-in"
    if found.name == "loss against rank":
        return "what is equal in quality is decided by cost" if answer.kind == "full" else "the target decides"
    if f.curve is not None:
        return "quality measured here counts for more"
    return "other evidence counts for more"
