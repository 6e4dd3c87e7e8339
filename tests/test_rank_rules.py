"""Rules of thumb as the guides state them, budgets counted on real models, published tables as published."""

import json
import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support import build
from transformers import LlamaConfig, LlamaForCausalLM

from lora_fast import LoraConfig, LoraFastError, apply_lora, lora_parameter_count, rank_for_budget, suggest_rank
from lora_fast.cli import main
from lora_fast.injection import lora_parameters
from lora_fast.rank_evidence import EVIDENCE, QUOTATION, find_evidence
from lora_fast.rank_rules import (
    SCENARIOS,
    SUMMARY,
    TASKS,
    budget_of,
    budget_tradeoffs,
    capacity_rank,
    guide_formula,
    guide_tree,
    rank_by_formula,
)

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}


# ------------------------------------------------------------------------------------------------------------ the guide


@pytest.mark.parametrize(
    ("model_size", "complexity", "data_size", "rank"),
    [
        # Each line worked out by hand from the guide's code.
        (0.5, "simple", 500, 1),
        (0.5, "simple", 1_000, 2),
        (0.5, "medium", 999, 2),
        (0.5, "medium", 50_000, 4),
        (0.5, "complex", 999, 4),
        (0.5, "complex", 50_000, 8),
        (7, "simple", 50_000, 2),
        (7, "medium", 50_000, 4),
        (7, "complex", 10**6, 8),
        (10, "simple", 50_000, 1),
        (10, "medium", 50_000, 2),
        (70, "complex", 50_000, 4),
        (70, "complex", 100, 2),
        (100, "simple", 100, 1),
        (100, "medium", 50_000, 1),
        (175, "complex", 50_000, 2),
        (175, "medium", 50_000, 1),
    ],
)
def test_the_formula_is_the_guides_code(model_size, complexity, data_size, rank):
    assert guide_formula(model_size, complexity, data_size) == rank
    found = suggest_rank(model_size, complexity, data_size)
    assert found.rank == rank and found.rule == "formula" and "如何选择秩" in found.source


def test_the_guides_own_example_contradicts_itself_and_that_is_said():
    found = suggest_rank(model_size=175, task_type="medium", data_size=50000)
    assert found.rank == 1
    said = " ".join(found.disagreements)
    assert "the comment beside this very example" in said and "says 2, its code gives 1" in said
    assert "decision tree" in said and "says 2, the guide's own code 1" in said


def test_the_guides_contradict_each_other_and_that_is_said():
    found = suggest_rank(7, "medium", 50_000)
    assert found.rank == 4 and found.range == (2, 64)
    assert any("8 to 64" in text and "code 4" in text for text in found.disagreements)
    assert not suggest_rank(0.5, "complex", 50_000).disagreements


@pytest.mark.parametrize(
    ("model_size", "complexity", "can_search", "ranks"),
    [
        (7, "medium", True, (1, 8)),
        (175, "simple", True, (1, 8)),
        (7, "simple", False, (2, 2)),
        (175, "simple", False, (2, 2)),
        (175, "complex", False, (2, 2)),
        (100, "medium", False, (4, 8)),
        (7, "complex", False, (4, 8)),
    ],
)
def test_the_decision_tree(model_size, complexity, can_search, ranks):
    answer = guide_tree(model_size, complexity, can_search=can_search)
    assert (answer.low, answer.high) == ranks


def answers(found, rule):
    return [(answer.low, answer.high) for answer in found.answers if answer.rule == rule]


@pytest.mark.parametrize(
    ("model_size", "ranks"), [(0.9, (2, 8)), (1, (2, 8)), (9.9, (2, 8)), (10, (1, 4)), (99, (1, 4)), (100, (1, 2))]
)
def test_the_size_table(model_size, ranks):
    assert answers(suggest_rank(model_size, "medium", 5_000), "model size") == [ranks]


@pytest.mark.parametrize(
    ("data_size", "ranks"), [(0, (1, 2)), (999, (1, 2)), (1_000, (4, 8)), (100_000, (4, 8)), (100_001, (8, None))]
)
def test_the_data_tiers(data_size, ranks):
    assert answers(suggest_rank(7, "medium", data_size), "data size") == [ranks]


@pytest.mark.parametrize(("complexity", "ranks"), [("simple", (1, 2)), ("medium", (4, 8)), ("complex", (8, 16))])
def test_the_task_tiers(complexity, ranks):
    assert answers(suggest_rank(7, complexity, 5_000), "task complexity") == [ranks]


def test_the_task_catalogue():
    assert {name: task.complexity for name, task in TASKS.items()} == {
        **dict.fromkeys(("binary-classification", "text-matching", "single-domain", "style"), "simple"),
        **dict.fromkeys(("classification", "named-entities", "summarization", "understanding"), "medium"),
        **dict.fromkeys(("translation", "dialogue", "reasoning", "code", "mathematics", "domain-knowledge"), "complex"),
        **dict.fromkeys(("continued-pretraining", "reinforcement-learning"), "other"),
    }
    for name, task in TASKS.items():
        if task.complexity != "other":
            (said,) = [a.says for a in suggest_rank(7, name, 5_000).answers if a.rule == "task complexity"]
            assert said.startswith(f"{name} ({task.examples}) counts as a {task.complexity} task")
            assert suggest_rank(7, name, 5_000).rank == suggest_rank(7, task.complexity, 5_000).rank


@pytest.mark.parametrize(
    ("arguments", "row", "ranks"),
    [
        ((7, "medium", 5_000), "default", (4, 8)),
        ((175, "medium", 5_000), "as large as GPT-3", (1, 2)),
        ((7, "simple", 5_000), "simple classification", (2, 2)),
        ((7, "code", 5_000), "generation", (4, 8)),
        ((7, "medium", 999), "small data (under 1,000 samples)", (1, 2)),
        ((7, "medium", 5_000, "constrained"), "few resources", (1, 1)),
    ],
)
def test_the_rows_of_the_summary_table_speak_where_they_apply(arguments, row, ranks):
    found = suggest_rank(*arguments[:3], scenario=arguments[3] if len(arguments) > 3 else None)
    spoken = [a for a in found.answers if a.rule == "summary table" and a.says.startswith(row)]
    assert [(a.low, a.high) for a in spoken] == [ranks]


def test_all_seven_rows_of_the_summary_table_are_kept():
    assert list(SUMMARY.values()) == [(4, 8), (1, 2), (2,), (4, 8), (1, 2), (1,), (4,)]


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("prototype", (4, 4)),
        ("production", (1, 8)),
        ("constrained", (1, 2)),
        ("multi-task", (4, 8)),
        ("continual", (8, 8)),
    ],
)
def test_the_five_scenarios(name, ranks):
    assert len(SCENARIOS) == 5
    assert answers(suggest_rank(7, "medium", 5_000, scenario=name), f"scenario {name}") == [ranks]


def test_the_guide_on_full_fine_tuning():
    rule = "guide on full fine-tuning"
    assert answers(suggest_rank(7, "simple", 5_000), rule) == [(8, 16), (8, 64), (8, 32)]
    assert answers(suggest_rank(13, "medium", 5_000), rule) == [(8, 16), (8, 64)]
    assert answers(suggest_rank(14, "domain-knowledge", 5_000), rule) == [(8, 16), (None, None)]
    said = next(a.says for a in suggest_rank(14, "code", 5_000).answers if a.low is None)
    assert "full fine-tuning is often better" in said and "r=128" in said


def test_later_work_speaks_where_it_measured():
    assert answers(suggest_rank(7, "reinforcement-learning", 5_000), "reinforcement learning") == [(1, 32)]
    (pretraining,) = [a for a in suggest_rank(7, "continued-pretraining", 10**6).answers if a.rule[:9] == "continued"]
    assert pretraining.says.startswith("full fine-tuning") and "2405.09673" in pretraining.source
    assert answers(suggest_rank(7, "code", 5_000), "measured at 7B") == [(64, 256)]


def test_the_capacity_rule_and_where_it_failed():
    """7B has 2.5 million parameters a rank; 73 million tokens give 15, where 256 was needed."""
    assert capacity_rank(73e6, 2_498_560) == pytest.approx(14.6, abs=0.05)
    found = suggest_rank(7, "code", 75_000, tokens=73e6, parameters_per_rank=2_498_560)
    (answer,) = [a for a in found.answers if a.rule == "capacity"]
    assert (answer.low, answer.high) == (15, None)
    assert "needed 256" in answer.says


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7, "poetry", 100), "task_type='poetry'; known are simple, medium, complex, binary-classification"),
        ((0, "simple", 100), "model_size=0; expected a number above 0"),
        ((math.nan, "simple", 100), "model_size=nan"),
        ((True, "simple", 100), "model_size=True"),
        ((7, "simple", -1), "data_size=-1; expected a number of at least 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(LoraFastError, match=message.replace("(", r"\(")):
        suggest_rank(*arguments)
    with pytest.raises(LoraFastError, match="scenario='x'; known are prototype"):
        suggest_rank(7, "simple", 100, scenario="x")


# -------------------------------------------------------------------------------------------------------------- budgets


def test_a_budget_is_counted_on_the_model():
    config = LlamaConfig(**LLAMA_8B)
    found = budget_of(config, 41_943_040)
    assert (found.rank, found.parameters_per_rank, found.modules) == (16, 2_621_440, 224)
    assert found.formulas == {"B/(2Ld)": 160, "B/(4Ld)": 80, "B/(8Ld)": 40}
    (note,) = found.notes
    assert "r=80.0" in note and "5.00 times" in note and "16 is exact" in note
    assert rank_for_budget(config, 41_943_040, ["q_proj", "v_proj"]) == 98
    assert lora_parameter_count(config, 8) == 8 * 2_621_440


def test_the_guides_formula_and_its_example():
    assert rank_by_formula(5_000_000, layers=96, hidden_size=12288) == pytest.approx(1.06, abs=0.005)
    assert [rank_by_formula(10**6, 10, 100, matrices) for matrices in (1, 2, 4)] == [500, 250, 125]


def test_on_a_square_model_the_formula_is_exact():
    config = LlamaConfig(**{**SMALL, "num_key_value_heads": 4})
    found = budget_of(config, 48 * 4 * 3 * 5 + 7, ["q_proj", "v_proj"])
    assert found.rank == math.floor(found.formulas["B/(4Ld)"]) == 5
    assert found.notes == ()


def test_the_formula_that_is_held_against_the_count_is_the_one_for_as_many_matrices():
    config = LlamaConfig(**{**SMALL, "num_key_value_heads": 4})
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert budget_of(config, 5_000, ["q_proj"]).notes == budget_of(config, 5_000, attention).notes == ()
    assert "B/(2Ld) would give" in budget_of(config, 5_000, ["up_proj"]).notes[0]
    assert "B/(8Ld) would give" in budget_of(SMALL_MODEL, 5_000, attention).notes[0]


def test_what_a_large_budget_allows_beyond_use_is_noted():
    total = sum(parameter.numel() for parameter in SMALL_MODEL.parameters())
    least = lora_parameter_count(SMALL_MODEL, 1)
    assert not any("min(N, K)" in note for note in budget_of(SMALL_MODEL, 24 * least).notes)
    above = budget_of(SMALL_MODEL, 25 * least)  # k_proj and v_proj are (24, 48)
    assert above.rank == 25 and "above min(N, K) = 24" in above.notes[-1]
    assert "full fine-tuning fits it too" in budget_of(SMALL_MODEL, total).notes[-1]
    assert not any("fits it too" in note for note in budget_of(SMALL_MODEL, total - 1).notes)


@pytest.mark.parametrize(
    ("config", "per_rank", "query_value"),
    [
        # 2 + 2 blocks: 2 attentions of the encoder, 4 of the decoder, each 4 (60 + 60); 4 MLPs, each 2 (60 + 110).
        (transformers.T5Config(d_model=60, d_kv=20, d_ff=110, num_layers=2, num_heads=3), 4240, ("q", "v")),
        (
            transformers.ViTConfig(
                hidden_size=60, intermediate_size=110, num_hidden_layers=2, num_attention_heads=3, architectures=["x"]
            ),
            2 * (4 * 120 + 2 * 170) + 120,
            ("q_proj", "v_proj"),
        ),
        (
            transformers.BertConfig(
                hidden_size=60,
                intermediate_size=110,
                num_hidden_layers=2,
                num_attention_heads=3,
                architectures=["BertForSequenceClassification"],
            ),
            2 * (4 * 120 + 2 * 170) + 120 + 62,
            ("query", "value"),
        ),
    ],
)
def test_models_that_are_no_decoders(config, per_rank, query_value, tmp_path, capsys):
    """The class that the config names, where it does: here a classifier, whose pooler and head are linear too."""
    found = budget_of(config, 50_000)
    assert (found.parameters_per_rank, found.rank) == (per_rank, 50_000 // per_rank)
    assert query_value in [c.modules for c in budget_tradeoffs(config, 50_000)]
    config.save_pretrained(tmp_path)
    assert main(["rank", "budget", str(tmp_path), "--budget", "50k", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters_per_rank"] == per_rank


@settings(max_examples=500)
@given(budget=st.integers(0, 10**6), targets=st.sampled_from(["all-linear", ["q_proj"], ["k_proj", "down_proj"]]))
def test_a_budget_is_never_exceeded_and_used_to_the_full(budget, targets):
    model = SMALL_MODEL
    least = lora_parameter_count(model, 1, targets)
    if budget < least:
        with pytest.raises(LoraFastError, match=f"take at least {least:,} parameters"):
            rank_for_budget(model, budget, targets)
        return
    rank = rank_for_budget(model, budget, targets)
    assert lora_parameter_count(model, rank, targets) <= budget < lora_parameter_count(model, rank + 1, targets)


with torch.device("meta"):
    SMALL_MODEL = LlamaForCausalLM(LlamaConfig(**SMALL))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "bert"])
def test_the_count_is_what_an_adapter_has(family):
    model = build(family)
    counted = lora_parameter_count(model, 3)
    apply_lora(model, LoraConfig(r=3, target_modules="all-linear"))
    assert counted == sum(parameter.numel() for parameter in lora_parameters(model))
    assert lora_parameter_count(model, 3) == counted


def test_a_config_file_and_its_folder_do_as_well(tmp_path):
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    expected = rank_for_budget(SMALL_MODEL, 50_000)
    assert rank_for_budget(str(tmp_path), 50_000) == rank_for_budget(tmp_path / "config.json", 50_000) == expected


def test_tradeoffs_stay_within_the_budget():
    choices = budget_tradeoffs(SMALL_MODEL, 5_000)
    assert {c.modules for c in choices} >= {("q_proj",), ("q_proj", "v_proj"), ("down_proj", "gate_proj", "up_proj")}
    for choice in choices:
        per_rank = lora_parameter_count(SMALL_MODEL, 1, list(choice.modules))
        assert choice.parameters == choice.rank * per_rank <= 5_000 < (choice.rank + 1) * per_rank
    few, many = choices[0], choices[-1]
    assert few.rank > many.rank and few.adapted < many.adapted


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rank_for_budget(SMALL_MODEL, -5), "budget=-5; expected a whole number of parameters"),
        (lambda: rank_for_budget(SMALL_MODEL, 1.5), "budget=1.5"),
        (lambda: rank_for_budget(SMALL_MODEL, 5), r"budget=5 is less than r=1 trains; these targets take at least"),
        (lambda: rank_for_budget(3, 5), "model_or_config is a int"),
        (lambda: rank_for_budget("nowhere", 5), "nowhere: there is no such file or folder"),
        (lambda: rank_for_budget(SMALL_MODEL, 5_000, ["q_porj"]), "q_porj"),
        (lambda: lora_parameter_count(SMALL_MODEL, 0), "r=0"),
    ],
)
def test_budgets_that_make_no_sense(call, message):
    with pytest.raises(LoraFastError, match=message):
        call()


# ---------------------------------------------------------------------------------------------- evidence and commands


def test_published_tables_as_the_guides_give_them():
    cells = {entry.name: entry.rows for entry in EVIDENCE}
    assert cells["table-18"] == (
        (1, 1.23, 68.72),
        (2, 1.21, 69.17),
        (4, 1.18, 70.38),
        (8, 1.17, 69.57),
        (16, 1.16, 69.61),
        (64, 1.16, 69.24),
    )
    assert cells["table-16"] == (
        (100, 63.8, 60.2, 48.3),
        (1_000, 85.6, 85.8, 82.5),
        (10_000, 89.2, 88.9, 85.9),
        (392_000, 91.7, 89.5, 89.6),
    )
    assert "85.8" in find_evidence("table-16").notes[0]
    assert [row[-1] for row in cells["table-9"] + cells["table-10"]] == [87.5, 90.6, 91.9]
    assert [row[2:] for row in cells["table-11"]] == [(4, 70.4), (4, 70.4)]
    assert [row[2:] for row in cells["table-12"]] == [(2, "73.4%"), (8, "91.7%"), (8, "53.8 R1")]
    assert any("as high as 12,288" in note for note in find_evidence("gpt3-optimal").notes) and "12,288" in QUOTATION
    assert all(entry.source and all(len(row) == len(entry.columns) for row in entry.rows) for entry in EVIDENCE)


def test_the_commands(capsys, tmp_path):
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    common = ["rank", "suggest", "--model-size", "175", "--task", "medium", "--data-size", "50000"]
    assert main(common) == 0
    shown = capsys.readouterr().out
    assert "r=1 by the formula" in shown and "They disagree:" in shown
    assert main([*common, "--tokens", "1e6", "--model", str(tmp_path), "--json", "-"]) == 0
    assert any(a["rule"] == "capacity" for a in json.loads(capsys.readouterr().out)["answers"])

    assert main(["rank", "budget", str(tmp_path), "--budget", "50k", "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["rank"] == rank_for_budget(SMALL_MODEL, 50_000) and document["tradeoffs"]
    assert main(["rank", "budget", str(tmp_path), "--budget", "50k"]) == 0
    assert f"r={document['rank']}:" in capsys.readouterr().out

    assert main(["rank", "evidence"]) == 0
    shown = capsys.readouterr().out
    assert all(entry.title in shown for entry in EVIDENCE) and "2106.09685" in shown
    assert main(["rank", "evidence", "table-18", "--json", "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)["evidence"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["suggest", "--model-size", "7", "--task", "poetry", "--data-size", "5"], "task_type='poetry'; known are"),
        (["suggest", "--model-size", "7", "--task", "code", "--data-size", "5", "--tokens", "9"], "go together"),
        (["budget", "llama-5m", "--budget", "plenty"], "--budget 'plenty'; expected a number of parameters"),
        (["budget", "llama-5m", "--budget", "-3"], "budget=-3"),
        (["budget", "llama-5m", "--budget", ",_"], "--budget ',_'; expected a number of parameters"),
        (["budget", "llama-5m", "--budget", "10"], "budget=10 is less than r=1 trains"),
        (["evidence", "table-99"], "'table-99' is no table; there are gpt3-optimal"),
    ],
)
def test_wrong_input_is_one_line(capsys, arguments, message):
    assert main(["rank", *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err.splitlines()[-1] and said.out == ""
