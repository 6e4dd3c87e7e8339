"""Rules of thumb for the rank, each with its source and its known failures, and ranks that a parameter budget allows.

No rule here has seen your data: `search_rank` measures. Where rules contradict each other, or themselves, the answer
says so."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from lora_fast.config import LoraConfig, LoraFastError
from lora_fast.quantized import matrix_shape
from lora_fast.rank_evidence import BIDERMAN, GUIDE_FULL, GUIDE_RANK, SCHULMAN
from lora_fast.targets import target_modules as find_targets

# From this rank on, the guide on full fine-tuning asks for a whole evaluation against it.
EVALUATE_FULL_FROM = 128
# Information that a parameter holds and that a token of text carries at most, in bits.
BITS_PER_PARAMETER, BITS_PER_TOKEN = 2.0, 1.0


@dataclass(frozen=True)
class Task:
    """complexity: "simple", "medium" or "complex", or "other" where neither guide speaks of it. examples: what the
    guide counts as such."""

    name: str
    complexity: str
    examples: str
    source: str = GUIDE_RANK


TASKS = {
    task.name: task
    for task in (
        Task("binary-classification", "simple", "sentiment, spam"),
        Task("text-matching", "simple", "simple matching of texts"),
        Task("single-domain", "simple", "adaptation within one domain"),
        Task("style", "simple", "imitating a style of writing, questions like those of pretraining", GUIDE_FULL),
        Task("classification", "medium", "topics, intents"),
        Task("named-entities", "medium", "named entity recognition"),
        Task("summarization", "medium", "summaries"),
        Task("understanding", "medium", "most tasks of language understanding"),
        Task("translation", "complex", "translation, low-resource languages above all"),
        Task("dialogue", "complex", "open-domain dialogue"),
        Task("reasoning", "complex", "multi-step reasoning"),
        Task("code", "complex", "code generation"),
        Task("mathematics", "complex", "mathematical reasoning", GUIDE_FULL),
        Task("domain-knowledge", "complex", "new knowledge of a field such as medicine or law", GUIDE_FULL),
        Task("continued-pretraining", "other", "billions of tokens of plain text", BIDERMAN),
        Task("reinforcement-learning", "other", "policy gradients on rewards", SCHULMAN),
    )
}
COMPLEXITIES = ("simple", "medium", "complex")


@dataclass(frozen=True)
class Scenario:
    ranks: tuple[int, ...]
    goal: str
    advice: str


SCENARIOS = {
    "prototype": Scenario((4,), "to test an idea quickly", "trains fast and mostly suffices"),
    "production": Scenario((1, 2, 4, 8), "the best quality", "search these on validation data, weigh quality and cost"),
    "constrained": Scenario((1, 2), "as few parameters as possible", "mostly suffices; tune other settings with care"),
    "multi-task": Scenario((4, 8), "one base, many tasks", "one rank for all of them is simpler to manage"),
    "continual": Scenario((8,), "tasks that keep coming", "room for later tasks without changing the set-up"),
}

# The guide's summary table: situation → ranks.
SUMMARY = {
    "default": (4, 8),
    "as large as GPT-3": (1, 2),
    "simple classification": (2,),
    "generation": (4, 8),
    "small data (under 1,000 samples)": (1, 2),
    "few resources": (1,),
    "not sure": (4,),
}
GENERATION = ("summarization", "translation", "dialogue", "code", "mathematics")


@dataclass(frozen=True)
class RuleAnswer:
    """What one rule says: ranks from low to high (high None: or more; both None: something else than a rank)."""

    rule: str
    low: int | None
    high: int | None
    says: str
    source: str


@dataclass(frozen=True)
class RankSuggestion:
    """rank: what the guide's formula gives. range: the least and the largest rank that any rule names. rule, source: of
    `rank`. answers: every rule's. disagreements: sentences on where they contradict each other."""

    rank: int
    range: tuple[int, int]
    rule: str
    source: str
    answers: tuple[RuleAnswer, ...]
    disagreements: tuple[str, ...]

    def to_dict(self) -> dict:
        return asdict(self)


def guide_formula(model_size: float, complexity: str, data_size: int) -> int:
    """The rank by the guide's code, as it stands: model_size in billions of parameters, complexity "simple", "medium"
    or "complex", data_size in samples. Source: guide “如何选择秩 r?”, method 3."""
    rank = 4 if model_size < 10 else 2 if model_size < 100 else 1
    if complexity == "simple":
        rank = max(1, rank // 2)
    elif complexity == "complex":
        rank = min(8, rank * 2)
    if data_size < 1000:
        rank = max(1, rank // 2)
    return rank


def guide_tree(model_size: float, complexity: str, *, can_search: bool = False) -> RuleAnswer:
    """The guide's decision tree: search if resources allow it; a very simple task 2; above 100B 2; else 4 or 8."""
    rule, source = "decision tree", GUIDE_RANK
    if can_search:
        return RuleAnswer(rule, 1, 8, "search over 1, 2, 4, 8 and take the best", source)
    if complexity == "simple":
        return RuleAnswer(rule, 2, 2, "a very simple task: 2", source)
    if model_size > 100:
        return RuleAnswer(rule, 2, 2, "a model above 100B: 2", source)
    return RuleAnswer(rule, 4, 8, "otherwise 4 or 8", source)


def capacity_rank(tokens: float, parameters_per_rank: int) -> float:
    """The least rank whose parameters can hold what the data say: tokens · 1 bit / (2 bits · Σ(K+N)), a real number.

    parameters_per_rank: Σ (K + N) over the adapted layers. A lower bound only: for 73 million tokens on a 7B model it
    says 15, and a measurement needed 256 (arXiv:2405.09673). Source: Schulman et al. 2025."""
    return tokens * BITS_PER_TOKEN / (BITS_PER_PARAMETER * parameters_per_rank)


def suggest_rank(
    model_size: float,
    task_type: str,
    data_size: int,
    *,
    scenario: str | None = None,
    can_search: bool = False,
    tokens: float | None = None,
    parameters_per_rank: int | None = None,
) -> RankSuggestion:
    """What the rules of thumb say about the rank, without having seen the data.

    model_size: billions of parameters. task_type: a name of TASKS, or a complexity, "simple", "medium", "complex".
    data_size: training samples. scenario: a name of SCENARIOS. can_search: whether there are resources for a search.
    tokens, parameters_per_rank: of the training data, and Σ (K + N), for the capacity rule.
    Raises LoraFastError for an unknown task or scenario, or a size that is none."""
    _check_number("model_size", model_size, above=0, unit="billions of parameters")
    _check_number("data_size", data_size, above=-1, unit="training samples")
    for name, value in (("tokens", tokens), ("parameters_per_rank", parameters_per_rank)):
        if value is not None:
            _check_number(name, value, above=0)
    complexity, other = _complexity(task_type)
    if scenario is not None and scenario not in SCENARIOS:
        raise LoraFastError(f"scenario={scenario!r}; known are {', '.join(SCENARIOS)}")

    rank = guide_formula(model_size, complexity, data_size)
    formula = RuleAnswer("formula", rank, rank, f"the guide's code gives {rank}", GUIDE_RANK)
    answers = [formula, guide_tree(model_size, complexity, can_search=can_search), _by_size(model_size)]
    if other is None:
        answers.append(_by_complexity(complexity, task_type))
    answers += [_by_data(data_size), *_by_summary(model_size, complexity, task_type, data_size, scenario)]
    answers += _by_guide_full(model_size, complexity)
    if scenario is not None:
        chosen = SCENARIOS[scenario]
        said = f"{chosen.goal}: {', '.join(map(str, chosen.ranks))}; {chosen.advice}"
        answers.append(RuleAnswer(f"scenario {scenario}", chosen.ranks[0], chosen.ranks[-1], said, GUIDE_RANK))
    answers += _by_later_work(task_type, tokens, parameters_per_rank)
    disagreements = _disagreements(answers)
    if (model_size, complexity, data_size) == (175, "medium", 50_000):
        disagreements.insert(
            0, f"the comment beside this very example in the {GUIDE_RANK} says 2, its code gives {rank}"
        )
    named = [r for answer in answers for r in (answer.low, answer.high) if r is not None]
    return RankSuggestion(
        rank, (min(named), max(named)), formula.rule, GUIDE_RANK, tuple(answers), tuple(disagreements)
    )


def _check_number(name: str, value: float, *, above: float, unit: str = "") -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not above < value < math.inf:
        expected = f"a number {'of at least 0' if above < 0 else f'above {above}'}"
        raise LoraFastError(f"{name}={value!r}; expected {expected}{f' ({unit})' if unit else ''}")


def _complexity(task_type: str) -> tuple[str, Task | None]:
    """The guide's complexity, and the task where the guide doesn't speak of it (counted as complex there)."""
    if task_type in COMPLEXITIES:
        return task_type, None
    if task_type not in TASKS:
        raise LoraFastError(f"task_type={task_type!r}; known are {', '.join((*COMPLEXITIES, *TASKS))}")
    task = TASKS[task_type]
    return ("complex", task) if task.complexity == "other" else (task.complexity, None)


def _by_size(model_size: float) -> RuleAnswer:
    tiers = ((1, 2, 8, "under 1B"), (10, 2, 8, "1B to 10B"), (100, 1, 4, "10B to 100B"), (math.inf, 1, 2, "above 100B"))
    low, high, tier = next((low, high, tier) for limit, low, high, tier in tiers if model_size < limit)
    return RuleAnswer("model size", low, high, f"a model of {tier}: {low} to {high}", GUIDE_RANK)


def _by_complexity(complexity: str, task_type: str) -> RuleAnswer:
    low, high, says = {
        "simple": (1, 2, "a simple task: 1 or 2"),
        "medium": (4, 8, "a medium task: 4 or 8"),
        "complex": (8, 16, "a complex task: 8 or more, seldom above 16"),
    }[complexity]
    if task_type in TASKS:
        says = f"{task_type} ({TASKS[task_type].examples}) counts as {says}"
    else:
        says += f" (such are {', '.join(task.name for task in TASKS.values() if task.complexity == complexity)})"
    return RuleAnswer("task complexity", low, high, says, GUIDE_RANK)


def _by_data(data_size: int) -> RuleAnswer:
    if data_size < 1_000:
        return RuleAnswer("data size", 1, 2, "under 1,000 samples: 1 or 2, against overfitting", GUIDE_RANK)
    if data_size <= 100_000:
        return RuleAnswer("data size", 4, 8, "1,000 to 100,000 samples: 4 or 8", GUIDE_RANK)
    return RuleAnswer("data size", 8, None, "above 100,000 samples: 8 or more, mostly with little gain", GUIDE_RANK)


def _by_summary(
    model_size: float, complexity: str, task_type: str, data_size: int, scenario: str | None
) -> list[RuleAnswer]:
    situations = {
        "as large as GPT-3": model_size > 100,
        "simple classification": complexity == "simple",
        "generation": task_type in GENERATION,
        "small data (under 1,000 samples)": data_size < 1_000,
        "few resources": scenario == "constrained",
    }
    found = [name for name, is_so in situations.items() if is_so] or ["default"]
    return [
        RuleAnswer(
            "summary table", SUMMARY[n][0], SUMMARY[n][-1], f"{n}: {' or '.join(map(str, SUMMARY[n]))}", GUIDE_RANK
        )
        for n in found
    ]


def _by_guide_full(model_size: float, complexity: str) -> list[RuleAnswer]:
    rule = "guide on full fine-tuning"
    found = [RuleAnswer(rule, 8, 16, "start at 8 or 16 and raise it while quality grows", GUIDE_FULL)]
    if 7 <= model_size <= 13:
        found.append(RuleAnswer(rule, 8, 64, "models of 7B to 13B: 8 to 64 is a good balance", GUIDE_FULL))
    if complexity == "simple":
        found.append(RuleAnswer(rule, 8, 32, "a simple task, or one within the domain: 8 to 32", GUIDE_FULL))
    if complexity == "complex":
        says = "new knowledge or far from pretraining: full fine-tuning is often better; from r=128 on, compare with it"
        found.append(RuleAnswer(rule, None, None, says, GUIDE_FULL))
    return found


def _by_later_work(task_type: str, tokens: float | None, parameters_per_rank: int | None) -> list[RuleAnswer]:
    found = []
    if task_type == "continued-pretraining":
        says = "full fine-tuning: at 20B tokens of code r=256 stayed at 0.224 where full fine-tuning reached 0.263"
        found.append(RuleAnswer("continued pretraining", None, None, says, BIDERMAN))
    if task_type == "reinforcement-learning":
        says = "1 to 32: an episode carries about one bit, and rank 1 was as good as full fine-tuning"
        found.append(RuleAnswer("reinforcement learning", 1, 32, says, SCHULMAN))
    if task_type in ("code", "mathematics"):
        says = "instruction tuning gained up to r=256, with all modules adapted (code: 0.358 at 16, 0.498 at 256)"
        found.append(RuleAnswer("measured at 7B", 64, 256, says, BIDERMAN))
    if tokens is not None and parameters_per_rank is not None:
        least = max(1, math.ceil(capacity_rank(tokens, parameters_per_rank)))
        says = (
            f"at least {least}, to hold {tokens:,.0f} bits at 2 a parameter; a lower bound: for 73M tokens at 7B it "
            "says 15, and a measurement needed 256"
        )
        found.append(RuleAnswer("capacity", least, None, says, SCHULMAN))
    return found


def _disagreements(answers: Sequence[RuleAnswer]) -> list[str]:
    """Sentences on rules whose ranks have none in common with the formula's, and on the two guides."""
    formula, *others = answers
    found = [
        f"{answer.rule} ({answer.source}) says {_ranks(answer)}, the guide's own code {formula.low}"
        for answer in others
        if answer.low is not None and not _meets(formula, answer)
    ]
    own = [a for a in others if a.source == GUIDE_RANK and a.low is not None]
    highest = max([formula.high, *(a.high or a.low for a in own)])
    apart = [a for a in others if a.source != GUIDE_RANK and a.low is not None and a.low > highest]
    if apart:
        found.append(f"no rule of the {GUIDE_RANK} reaches what {apart[0].rule} ({apart[0].source}) says")
    return found


def _ranks(answer: RuleAnswer) -> str:
    if answer.high is None:
        return f"{answer.low} or more"
    return str(answer.low) if answer.low == answer.high else f"{answer.low} to {answer.high}"


def _meets(one: RuleAnswer, other: RuleAnswer) -> bool:
    return one.low <= (other.high or math.inf) and other.low <= (one.high or math.inf)


# ------------------------------------------------------------------------------------------------------------- budgets


@dataclass(frozen=True)
class Budget:
    """What a number of trained parameters allows. rank: the largest with r · parameters_per_rank ≤ budget; parameters:
    that many; modules: adapted layers; share: of all parameters of the base. formulas: the guide's B/(4Ld) and its
    kin, for reference. notes: where those mislead."""

    budget: int
    rank: int
    parameters: int
    parameters_per_rank: int
    modules: int
    share: float
    formulas: dict[str, float]
    notes: tuple[str, ...]

    def to_dict(self) -> dict:
        return asdict(self)


def lora_parameter_count(model_or_config, r: int, target_modules: str | Sequence[str] = "all-linear") -> int:
    """Trained parameters of LoRA at rank r: r · Σ (K + N) over the matched layers; of a d × d matrix the guides' 2 d r.

    model_or_config: a model, a Transformers config, or a config.json or the folder that holds one; nothing is loaded.
    Raises LoraFastError for a rank below 1 or targets that match nothing."""
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise LoraFastError(f"r={r!r}; expected a whole number of at least 1")
    return r * _per_rank(_targets(shapes_of(model_or_config), target_modules))


def rank_for_budget(model_or_config, budget: int, target_modules: str | Sequence[str] = "all-linear") -> int:
    """The largest rank whose trained parameters stay within `budget`: ⌊budget / Σ (K + N)⌋ over the matched layers.

    Exact for the model at hand; takes what `lora_parameter_count` takes. Raises LoraFastError where not even r=1 fits
    (it says what the least budget is)."""
    return budget_of(model_or_config, budget, target_modules).rank


def budget_of(model_or_config, budget: int, target_modules: str | Sequence[str] = "all-linear") -> Budget:
    """As `rank_for_budget`, with what it rests on and the guide's formulas beside it."""
    model = shapes_of(model_or_config)
    targets = _targets(model, target_modules)
    per_rank, modules = _per_rank(targets), len(targets)
    _check_budget(budget, per_rank)
    rank = budget // per_rank
    total = sum(parameter.numel() for parameter in model.parameters())
    formulas, notes = _formulas(model, budget, rank, per_rank, modules)
    side = min(min(matrix_shape(module)) for module in targets.values())
    if rank > side:
        notes += (f"r={rank} is above min(N, K) = {side} of an adapted layer, whose update has no higher rank",)
    experts = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 3)
    if experts > total / 10:
        notes += (
            f"{experts / total:.0%} of the parameters are weights of three dimensions (experts), not adapted here",
        )
    if budget >= total:
        notes += (f"the budget is not below the model's own {total:,} parameters: full fine-tuning fits it too",)
    return Budget(budget, rank, rank * per_rank, per_rank, modules, rank * per_rank / total, formulas, notes)


def rank_by_formula(budget: int, layers: int, hidden_size: int, matrices: int = 2) -> float:
    """The guide's r = B / (2 · matrices · L · d), a real number: B/(2Ld) for one matrix a layer, B/(4Ld) for q and v,
    B/(8Ld) for all four of attention; each d × d. 5 million parameters on GPT-3 (L=96, d=12288), q and v: 1.06.

    On models that are not square (grouped attention, MLPs) it is wrong: on all linear layers of Llama-3-8B five times.
    `rank_for_budget` counts instead. Source: guide “如何选择秩 r?”, section on budgets."""
    return budget / (2 * matrices * layers * hidden_size)


TRADEOFF_ADVICE = (
    f"many matrices with a small r cover more, few with a large one go deeper; the {GUIDE_RANK} (with its paper) "
    f"advises q and v, later work all linear layers ({BIDERMAN}; {SCHULMAN})"
)


@dataclass(frozen=True)
class Tradeoff:
    """One choice of modules at a budget: the rank that it allows, what is trained then, and how many layers."""

    modules: tuple[str, ...]
    rank: int
    parameters: int
    adapted: int


def budget_tradeoffs(model_or_config, budget: int) -> list[Tradeoff]:
    """Few matrices with a large r against many with a small one, at one budget: each kind of linear layer alone, q and
    v, attention, MLP, all; what is advised is in TRADEOFF_ADVICE. A rank of 0: even r=1 is more than the budget."""
    model = shapes_of(model_or_config)
    names = sorted({name.rpartition(".")[2] for name in _targets(model, "all-linear")})
    attention = [n for n in names if n in _ATTENTION]
    choices = [(n,) for n in names]
    choices += [tuple(n for n in names if n in chosen) for chosen in (*_QUERY_VALUE, attention)]
    choices += [tuple(n for n in names if n not in attention), tuple(names)]
    found = []
    for chosen in dict.fromkeys(choice for choice in choices if choice):
        targets = _targets(model, list(chosen))
        rank = budget // _per_rank(targets)
        found.append(Tradeoff(chosen, rank, rank * _per_rank(targets), len(targets)))
    return found


_QUERY_VALUE = (("q_proj", "v_proj"), ("query", "value"), ("q", "v"))
_ATTENTION = frozenset(
    (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "qkv_proj",
        "c_attn",
        "query_key_value",
        "dense",
        "out_proj",
        "query",
        "key",
    )
    + ("value", "q", "k", "v", "o")
)


def _check_budget(budget: int, per_rank: int) -> None:
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
        raise LoraFastError(f"budget={budget!r}; expected a whole number of parameters, at least {per_rank:,}")
    if budget < per_rank:
        raise LoraFastError(
            f"budget={budget:,} is less than r=1 trains; these targets take at least {per_rank:,} parameters (fewer "
            "target_modules take less)"
        )


def shapes_of(model_or_config) -> nn.Module:
    """A model with shapes alone, or the one given."""
    if isinstance(model_or_config, nn.Module):
        return model_or_config
    import torch
    from transformers import AutoConfig

    config = model_or_config
    if isinstance(config, (str, Path)):
        path = Path(config).expanduser()
        if not path.exists():
            raise LoraFastError(f"{path}: there is no such file or folder; expected a config.json or its folder")
        try:
            config = AutoConfig.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise LoraFastError(
                f"{path} can't be read as a Transformers config: {' '.join(str(error).split())[:300]}"
            ) from None
    if not hasattr(config, "model_type"):
        raise LoraFastError(
            f"model_or_config is a {type(config).__name__}; expected a model, a Transformers config or a path to one"
        )
    try:
        with torch.device("meta"):
            return _class_of(config)._from_config(config)
    except (ValueError, KeyError, TypeError) as error:
        raise LoraFastError(f"no model can be made of this config: {' '.join(str(error).split())[:300]}") from None


def _class_of(config) -> type[nn.Module]:
    """The class that the config names; else the first of a causal, a sequence-to-sequence and an image-and-text model,
    and a body without a head, that there is of its type."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        named = getattr(transformers, name, None)
        if getattr(named, "config_class", None) is type(config):
            return named
    for task in ("ForCausalLM", "ForSeq2SeqLM", "ForImageTextToText", ""):
        mapping = getattr(transformers, f"AutoModel{task}")._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise LoraFastError(f"no model can be made of this config: Transformers has none of type {config.model_type!r}")


def _targets(model: nn.Module, target_modules: str | Sequence[str]) -> dict[str, nn.Module]:
    names = target_modules if isinstance(target_modules, str) else list(target_modules)
    return find_targets(model, LoraConfig(r=1, target_modules=names))


def _per_rank(targets: Mapping[str, nn.Module]) -> int:
    """Σ (K + N)."""
    return sum(sum(matrix_shape(module)) for module in targets.values())


def _formulas(
    model: nn.Module, budget: int, rank: int, per_rank: int, modules: int
) -> tuple[dict[str, float], tuple[str, ...]]:
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers, hidden = (getattr(text, name, None) for name in ("num_hidden_layers", "hidden_size"))
    if not isinstance(layers, int) or not isinstance(hidden, int):
        return {}, ()
    formulas = {f"B/({2 * matrices}Ld)": rank_by_formula(budget, layers, hidden, matrices) for matrices in (1, 2, 4)}
    # The formula for as many matrices as are adapted in a layer, or the guide's usual one, q and v.
    matrices = modules // layers if modules in (layers, 2 * layers, 4 * layers) else 2
    counts = {1: "one matrix", 2: "q and v", 4: "four matrices"}[matrices]
    name, ratio = f"B/({2 * matrices}Ld)", per_rank / (2 * matrices * layers * hidden)
    if 0.95 <= ratio <= 1.05:
        return formulas, ()
    note = (
        f"the guide's {name} would give r={formulas[name]:.1f}: it counts {counts} as d × d in every layer, "
        f"and these targets train {ratio:.2f} times as much per rank; {rank} is exact"
    )
    return formulas, (note,)
