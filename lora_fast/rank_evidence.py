"""What has been published about ranks, as data: tables, findings and guides, each with its source, shown by
`lora-fast rank evidence`.

Two guides are quoted throughout, both anonymous and in Chinese: GUIDE_FULL (from which rank on full fine-tuning is to
be considered), and GUIDE_RANK (how to choose r). Their numbers stand as they stand there; where they contradict a paper
or themselves, a note says so."""

from dataclasses import asdict, dataclass

# "The critical LoRA rank, and the decision for full fine-tuning"; "How to choose the rank r?"
GUIDE_FULL = "guide “LoRA微调rank临界点与全量训练决策”"
GUIDE_RANK = "guide “如何选择秩 r?”"
HU = "Hu et al. 2021, arXiv:2106.09685"
BIDERMAN = "Biderman et al. 2024, arXiv:2405.09673"
SCHULMAN = "Schulman et al. 2025, “LoRA Without Regret” (from notes on it)"


@dataclass(frozen=True)
class Evidence:
    """A table: columns, rows of cells as published (numbers as numbers; None: not given), where it is from, and what
    has to be known beside it."""

    name: str
    title: str
    source: str
    columns: tuple[str, ...]
    rows: tuple[tuple, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict:
        return asdict(self)


QUOTATION = (
    "For GPT-3 175B, we show that a very low rank (i.e., r can be one or two) suffices even when the full rank is as "
    "high as 12,288."
)

EVIDENCE: tuple[Evidence, ...] = (
    Evidence(
        "gpt3-optimal",
        "GPT-3 175B: the rank that was best",
        f"{HU}, as quoted in the {GUIDE_RANK}",
        ("task", "best r", "performance"),
        (("WikiSQL", "1 or 2", "73.4–73.8%"), ("MultiNLI", "1 or 2", "91.3–91.6%"), ("SAMSum", "2", "best")),
        (
            f"Core finding as the guide quotes it: “{QUOTATION}”",
            "The guide's own Table 12 below gives r=8 for MultiNLI and SAMSum: those are the ranks used, not the least "
            "that suffice.",
            "The guide's reading: 1 or 2 is enough for classification, generation may need more, seldom over 8.",
        ),
    ),
    Evidence(
        "table-9",
        "RoBERTa on MNLI (Table 9)",
        f"{HU}, as quoted in the {GUIDE_RANK}",
        ("model", "task", "r", "accuracy %"),
        (("RoBERTa-base", "MNLI", 8, 87.5), ("RoBERTa-large", "MNLI", 8, 90.6)),
    ),
    Evidence(
        "table-10",
        "DeBERTa on MNLI (Table 10)",
        f"{HU}, as quoted in the {GUIDE_RANK}",
        ("model", "task", "r", "accuracy %"),
        (("DeBERTa-XXL (1.5B)", "MNLI", 8, 91.9),),
    ),
    Evidence(
        "table-11",
        "GPT-2 on E2E NLG (Table 11)",
        f"{HU}, as quoted in the {GUIDE_RANK}",
        ("model", "task", "r", "BLEU"),
        (("GPT-2 Medium", "E2E NLG", 4, 70.4), ("GPT-2 Large", "E2E NLG", 4, 70.4)),
    ),
    Evidence(
        "table-12",
        "GPT-3 175B (Table 12)",
        f"{HU}, as quoted in the {GUIDE_RANK}",
        ("model", "task", "r", "performance"),
        (
            ("GPT-3 175B", "WikiSQL", 2, "73.4%"),
            ("GPT-3 175B", "MultiNLI", 8, "91.7%"),
            ("GPT-3 175B", "SAMSum", 8, "53.8 R1"),
        ),
        ("The guide's pattern: r from 2 to 8 in nearly all cases.",),
    ),
    Evidence(
        "table-16",
        "Accuracy against the number of samples, MNLI (Table 16)",
        f"{HU}, section F.3, as quoted in the {GUIDE_RANK}",
        ("samples", "LoRA (r=8) %", "full fine-tuning %", "prefix layer %"),
        ((100, 63.8, 60.2, 48.3), (1_000, 85.6, 85.8, 82.5), (10_000, 89.2, 88.9, 85.9), (392_000, 91.7, 89.5, 89.6)),
        (
            "At 1,000 samples the guide marks LoRA's 85.6 as the best; full fine-tuning's 85.8 beside it is higher.",
            "The guide's reading: LoRA is ahead on small data above all, where a low rank regularizes.",
        ),
    ),
    Evidence(
        "table-18",
        "GPT-2 Medium on E2E NLG against r (Table 18)",
        f"{HU}, as quoted in the {GUIDE_RANK}",
        ("r", "validation loss", "BLEU"),
        ((1, 1.23, 68.72), (2, 1.21, 69.17), (4, 1.18, 70.38), (8, 1.17, 69.57), (16, 1.16, 69.61), (64, 1.16, 69.24)),
        (
            "The best BLEU is at r=4, the lowest validation loss at r=16 and 64: which metric decides is part of "
            "the answer. The guide reads the fall of BLEU as noise from too large an r.",
            "The guide concludes that r=4 to 8 is best; BLEU at 8 (69.57) is below that at 16 (69.61).",
        ),
    ),
    Evidence(
        "biderman",
        "What high ranks bought in code and mathematics, 7B",
        BIDERMAN,
        ("training", "metric", "r=16", "r=64", "r=256", "full fine-tuning"),
        (
            ("code, instructions", "HumanEval", 0.358, 0.417, 0.498, 0.497),
            ("mathematics, instructions", "GSM8K", None, 0.624, 0.634, 0.642),
            ("code, continued pretraining, 20B tokens", "HumanEval", None, None, 0.224, 0.263),
        ),
        (
            "Against the guides' small ranks: instruction tuning on code gains up to r=256, and in "
            "continued pretraining no LoRA reaches full fine-tuning.",
            "Their advice: LoRA for instruction tuning, not for continued pretraining; all modules, r=256, alpha=2r.",
        ),
    ),
    Evidence(
        "schulman",
        "When LoRA equals full fine-tuning",
        SCHULMAN,
        ("setting", "finding"),
        (
            ("supervised, within capacity", "LoRA equals full fine-tuning until the data exceed its parameters"),
            ("capacity", "about 2 bits a parameter; text has at most about 1 bit a token"),
            ("reinforcement learning", "about 1 bit an episode: rank 1 suffices"),
            ("learning rate", "10 times that of full fine-tuning (a fit gives 9.8), whatever the rank"),
            ("targets", "attention alone at r=256 is worse than the MLPs alone at r=128, with as many parameters"),
        ),
    ),
)


def find_evidence(name: str) -> Evidence | None:
    return next((entry for entry in EVIDENCE if entry.name == name), None)
