"""What a profile looks like: table, chart and run folder, from a profile made by hand."""

import io
import json
import os
import re
import struct
import warnings

import pytest
from rich.console import Console

from lora_fast import LoraFastError
from lora_fast.profiler import runs
from lora_fast.profiler.crossover import UNMEASURED, Crossover, crossover
from lora_fast.profiler.html import page
from lora_fast.profiler.html_charts import figures
from lora_fast.profiler.price import parse_price
from lora_fast.profiler.profile import Arm, Profile, usd_per_million_tokens
from lora_fast.profiler.report import chart, draw_png
from lora_fast.profiler.runs import RunFolder, default_folder, to_json, write_whole
from lora_fast.profiler.table import live_table, print_profile, reason, si

WORKLOAD = {
    "model": "llama-5m",
    "parameters": 4_999_424,
    "dtype": "fp32",
    "batch_size": 4,
    "seq_len": 256,
    "tokens_per_step": 1024,
    "optimizer": "AdamW",
    "device": "cpu",
    "target_modules": "all-linear",
    "rounds": 30,
}
MACHINE = {"gpu": None, "cpu": "A processor of some make", "threads": 2, "torch": "2.13.0"}


def arm(rank, ratio=None, peak=None, **changes) -> Arm:
    ci = None if ratio is None else (ratio - 0.02, ratio + 0.03)
    step = None if ratio is None else 200 * ratio
    made = Arm(
        "full" if rank is None else "lora",
        rank,
        1000 * (rank or 5000),
        0.01 * (rank or 100),
        step_ms=step,
        forward_ms=step and 0.4 * step,
        backward_ms=step and 0.5 * step,
        optimizer_ms=step and 0.1 * step,
        tokens_per_s=step and 1024e3 / step,
        ratio_to_full=ratio if rank else None,
        ratio_ci=ci if rank else None,
        cpu_ratio=ratio if rank else None,
        peak_MiB=peak,
        memory_ratio=peak and peak / 190,
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.fixture
def profile() -> Profile:
    arms = [
        arm(1, 0.8, 139),
        arm(8, 0.91, 141),
        arm(64, 1.1, 160),
        arm(512, status="oom", error="RuntimeError: no room", requested_MiB=64.0),
        arm(None, 1.0, 190),
    ]
    aa = {"ratio": 0.99, "ci": (0.97, 1.02), "noise_floor": 0.03, "limit": 0.1, "samples_ms": []}
    found = {"time": crossover([1, 8, 64], [-0.2, -0.1, 0.1]), "memory": crossover([1, 8, 64], [-0.3, -0.2, -0.1])}
    return Profile(MACHINE, dict(WORKLOAD), arms, aa, found, ["a note"])


def printed(profile, width, terminal=False) -> str:
    stream = io.StringIO()
    print_profile(profile, Console(file=stream, width=width, force_terminal=terminal, color_system=None))
    return stream.getvalue()


def test_the_table_says_it_all(profile):
    text = printed(profile, 120)
    row = next(line for line in text.splitlines() if line.strip().startswith("8 "))
    cells = row.split()
    assert cells[:8] == ["8", "8.00k", "8.00%", "182", "72.8", "/", "91.0", "/"]
    assert cells[8:] == ["18.2", "5,626", "0.91", "[0.89,", "0.94]", "0.91", "141", "0.74"]
    assert "out of memory" in next(line for line in text.splitlines() if line.strip().startswith("512 "))
    assert "r512: out of memory, at an allocation of 64.0 MiB" in text
    assert reason(arm(512, status="oom", error="x", requested_MiB=3 / 1024)).endswith("an allocation of 3.0 KiB")
    assert "Noise floor ±3.0%" in text and "0.990 [0.970, 1.020]" in text
    assert "Crossover in time: LoRA stops being cheaper than full fine-tuning at r≈" in text
    assert "between r=8 and r=64" in text and "Crossover in memory: none up to r=64" in text
    assert "Note: a note" in text
    assert "\x1b" not in text and "╭" not in text


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_table_fits_its_window_and_cuts_no_number(profile, width):
    text = printed(profile, width, terminal=True)
    table = [line for line in text.splitlines() if line.startswith(("╭", "│", "├", "╰"))]
    assert table and max(map(len, table)) <= width
    assert "…" not in text and "0.91 [0.89, 0.94]" in text


def full_house(profile) -> None:
    """Everything that a run can have a column for."""
    profile.workload |= {"price_per_hour": 2.5}
    for made in profile.arms:
        made.flops_ratio = None if made.kind == "full" else 0.7 + made.rank / 100
        made.forward_flops, made.backward_flops = 10**12, 2 * 10**12
        made.predicted_MiB = 101.0 + (made.rank or 0)
        made.executed_tflops_s = made.full_equivalent_tflops_s = 0.0123


@pytest.mark.parametrize("width", [80, 100, 120, 160, 240])
@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("unit", ["TFLOP/s", "util."])
def test_columns_go_before_a_number_is_cut(profile, width, terminal, unit):
    full_house(profile)
    if unit == "util.":
        for made in profile.arms:
            made.executed_utilization, made.full_equivalent_utilization = 0.347, 0.52
    text = printed(profile, width, terminal)
    rows = text.partition("Medians of")[0].splitlines()
    assert max(map(len, rows)) <= width and "…" not in text
    header = next(line for line in rows if "trained" in line)
    for never_goes in ("rank", "step ms", "time vs full", "peak MiB", "$/1M tok"):
        assert never_goes in header
    assert (f"full-eq. {unit}" in header) == (width == 240) and ("FLOPs" in header) == (width >= 100)
    assert ("34.7%" in text) == (width == 240 and unit == "util.")


def test_prediction_price_and_flops_stand_beside_the_measurement(profile):
    full_house(profile)
    row = next(line for line in printed(profile, 240).splitlines() if line.strip().startswith("8 "))
    # 2.50 $/h at 1024e3 / 182 tokens a second; 109 MiB predicted for 141 measured.
    assert f"{2.5 / 3600 / (1024e3 / 182) * 1e6:.3f}" in row.split()
    assert "109" in row and "-22.7%" in row and "0.78" in row.split() and row.split().count("0.0123") == 2
    assert usd_per_million_tokens(profile.arms[1], None) is None
    assert usd_per_million_tokens(profile.arms[3], 2.5) is None  # it ran out of memory
    # An hour of a million tokens a second is 3,600 million tokens.
    assert usd_per_million_tokens(arm(None, tokens_per_s=1e6), 3600.0) == pytest.approx(1.0)


@pytest.mark.parametrize("text", ["2.50/h", "$2.50/h", "2.5", " 2.50 / hour"])
def test_prices_are_dollars_an_hour(text):
    assert parse_price(text) == 2.5


def test_the_live_table_fills_in_as_arms_end(profile):
    profile.arms = [arm(1, None, 139.0), arm(8), arm(64, status="oom", error="killed"), arm(None)]
    profile.arms[1].predicted_MiB = 141.4
    stream = io.StringIO()
    Console(file=stream, width=100, force_terminal=True, color_system=None).print(live_table(profile))
    rows = {line.split()[1]: line for line in stream.getvalue().splitlines() if line.startswith("│")}
    assert "139" in rows["1"] and rows["1"].count("…") == 2
    assert "141" in rows["8"] and rows["8"].count("…") == 3 and "OOM" in rows["64"]


def test_the_noise_floor_says_of_which_arm_it_is(profile):
    assert "full against a second copy of itself" in printed(profile, 120)
    profile.aa |= {"of": "r8"}
    assert "r8 against a second copy of itself" in printed(profile, 120)


def test_sentences_fit_the_window(profile):
    text = printed(profile, 80)
    assert max(map(len, text.partition("gave")[2].splitlines())) <= 80
    assert "Why: Batch: AdamW takes 20 of full's 200 ms (10%)" in text


def test_a_profile_without_a_baseline_is_shown_too(profile):
    for made in profile.arms:
        made.ratio_to_full = made.ratio_ci = made.cpu_ratio = made.memory_ratio = None
    profile.arms[-1] = arm(None, status="oom", error="killed")
    profile.aa = None
    profile.crossover = dict.fromkeys(("time", "memory"), Crossover(UNMEASURED, reason="full ran out of memory"))
    text = printed(profile, 120)
    assert "Noise floor not measured: no second copy" in text and "no crossover, because full ran out of memory" in text
    panels = chart(profile)["panels"]
    assert [panel["full"] for panel in panels] == [None, None]
    assert [len(panel["absolute"]) for panel in panels] == [3, 3]
    assert size_of(draw_png(chart(profile))) == (1650, 750)


def test_a_profile_of_nothing_is_shown_too(profile):
    profile.arms = [arm(4, status="oom", error="killed"), arm(None, status="oom", error="killed")]
    profile.aa = None
    profile.crossover = dict.fromkeys(("time", "memory"), Crossover(UNMEASURED, reason="full ran out of memory"))
    assert not profile.measured
    assert "OOM" in printed(profile, 120)
    assert size_of(draw_png(chart(profile))) == (1650, 750)


def size_of(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and png[-8:-4] == b"IEND"
    return struct.unpack(">II", png[16:24])


def test_the_chart_shows_every_point_and_the_crossover(profile):
    description = chart(profile)
    time, memory = description["panels"]
    assert json.loads(json.dumps(description)) == description  # plain data, so that another drawing can use it
    assert [point["rank"] for point in time["points"]] == [1, 8, 64]
    assert time["points"][1]["ratio"] == 0.91 and time["points"][1]["low"] < 0.91 < time["points"][1]["high"]
    assert time["failed"] == memory["failed"] == [512] and time["noise"] == 0.03
    assert time["crossover"]["rank"] == profile.crossover["time"].rank and memory["crossover"]["rank"] is None
    png = draw_png(description)
    assert size_of(png) == (1650, 750)
    assert len(png) > 20_000  # an empty canvas takes 7 kB


def test_the_chart_is_drawn_and_not_blank(profile):
    from matplotlib.image import imread

    pixels = imread(io.BytesIO(draw_png(chart(profile))))[..., :3]
    blue = (abs(pixels - [0x1F / 255, 0x5F / 255, 0xA8 / 255]) < 0.02).all(axis=2)
    red = (abs(pixels - [0xC0 / 255, 0x39 / 255, 0x2B / 255]) < 0.02).all(axis=2)
    left, right = blue[:, :825], blue[:, 825:]
    assert left.sum() > 500 and right.sum() > 500  # the ranks' line in both panels
    assert red[:, :825].sum(axis=0).max() > 100  # the crossover's upright line, only where there is one
    assert red[:, 825:].sum() > 100  # the rank that was not measured


def test_counts_are_short():
    values = [7, 999, 18_496, 147_968, 999_700, 4_999_424, 47_349_76, 1_235_814_400, 8_030_261_248]
    assert [si(value) for value in values] == ["7", "999", "18.5k", "148k", "1.00M", "5.00M", "4.73M", "1.24B", "8.03B"]


def test_a_profile_becomes_json_and_comes_back(profile):
    document = json.loads(to_json(profile.to_dict()))
    assert document["schema_version"] == 1 and len(document["arms"]) == 5
    assert document["arms"][1]["ratio_ci"] == [0.89, 0.9400000000000001]
    assert document["crossover"]["time"]["bracket"] == [8, 64] and document["aa"]["noise_floor"] == 0.03
    back = Profile.from_dict(document)
    assert json.loads(to_json(back.to_dict())) == document and printed(back, 120) == printed(profile, 120)
    with pytest.raises(LoraFastError, match="schema_version=2"):
        Profile.from_dict({**document, "schema_version": 2})
    assert not profile.too_noisy and "hidden" not in printed(profile, 120)
    profile.aa["noise_floor"] = 0.11
    assert profile.too_noisy and "The answer is hidden: noise floor too high: two equal arms" in printed(profile, 120)


def test_noise_that_hides_the_answer_hides_it_everywhere(profile):
    """In the sentence, on the card and in the charts; what was not timed stays, and run.json keeps what was found."""
    profile.crossover["flops"] = profile.crossover["projected"] = crossover([1, 8, 64], [-0.3, -0.2, 0.1])
    clear = printed(profile, 120)
    assert "not told apart" not in clear and chart(profile)["panels"][0]["crossover"]["rank"] is not None
    assert "not told apart" not in page([profile])
    profile.aa["noise_floor"] = 0.11
    text = printed(profile, 120)
    assert "Crossover in time: not told apart from noise" in text.splitlines()
    kept = [line for line in clear.splitlines() if line.startswith("Crossover in ") and "in time" not in line]
    assert len(kept) == 3 and all(line in text.splitlines() for line in kept)
    drawn = chart(profile)
    assert drawn["panels"][0]["crossover"] == {
        "rank": None,
        "low": None,
        "high": None,
        "bracket": [None, None],
        "text": "time: not told apart from noise",
    }
    cards = re.findall(r'<div class="card"><span>(.*?): .*?<strong>(.*?)</strong><small>(.*?)</small>', page([profile]))
    assert cards[0] == ("Time", "in the noise", "Not told apart from noise")
    assert [name for name, *_ in cards[1:]] == ["Projected time", "FLOPs", "Memory"]
    assert not any("noise" in words for card in cards[1:] for words in card)
    assert profile.to_dict()["crossover"]["time"]["bracket"] == (8, 64)
    # A time that is missing says why, noise or not.
    profile.crossover["time"] = crossover([], [])
    assert "Crossover in time: no crossover, because no rank was measured" in printed(profile, 120)


def test_without_full_fine_tunings_time_flops_are_drawn(profile):
    for ratio, each in zip((0.6, 0.7, 0.9, 1.4, 1.0), profile.arms):
        each.ratio_to_full = each.ratio_ci = each.memory_ratio = None
        each.flops_ratio, each.forward_flops, each.backward_flops = ratio, 10, 20
    profile.full.step_ms = profile.full.peak_MiB = None
    drawn = figures(chart(profile))
    assert drawn["first"]["title"] == "FLOPs against rank" and "overlay" not in drawn
    assert drawn["first"]["data"][-1]["y"] == [0.6, 0.7, 0.9, 1.4]


def test_a_priced_run_says_what_a_million_tokens_cost(profile):
    assert "usd_per_million_tokens" not in profile.to_dict()["arms"][0]
    profile.workload = profile.workload | {"price_per_hour": 3600.0}
    document = json.loads(to_json(profile.to_dict()))
    costs = [each["usd_per_million_tokens"] for each in document["arms"]]
    assert costs[0] == pytest.approx(1e6 / profile.arms[0].tokens_per_s) and costs[3] is None
    assert json.loads(to_json(Profile.from_dict(document).to_dict())) == document


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_whole(path, "old")
    write_whole(path, "new")
    assert path.read_text() == "new" and oct(path.stat().st_mode & 0o777) == "0o644"

    def fails(*_):
        raise OSError("no space left")

    monkeypatch.setattr(runs.os, "fsync", fails)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, "half")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["run.json"]


def test_folders_that_hold_something_are_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "arms.jsonl").write_text("")
    (tmp_path / "empty").mkdir()
    for name, says in (("full", "not empty .thesis.txt"), ("run", "earlier run"), ("run/arms.jsonl", "is a file")):
        with pytest.raises(LoraFastError, match=says):
            RunFolder(tmp_path / name)
    with pytest.raises(LoraFastError, match="cannot be"):
        RunFolder(tmp_path / "full" / "thesis.txt" / "below")
    RunFolder(tmp_path / "empty")
    folder = RunFolder(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()  # made by the first write
    folder.write_arms([{"rank": 1}, {"rank": 2}])
    assert (tmp_path / "new" / "deep" / "arms.jsonl").read_text() == '{"rank": 1}\n{"rank": 2}\n'


def test_default_folders_are_new_and_safe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = default_folder("Qwen/Qwen3 0.6B")
    assert first.parent.name == "runs" and first.name.startswith("Qwen-Qwen3-0.6B-2")
    monkeypatch.setattr(runs.time, "strftime", lambda _: "20260101-000000")
    (tmp_path / "runs" / "m-20260101-000000").mkdir(parents=True)
    assert default_folder("m").name == "m-20260101-000000-2"
    assert default_folder("../..").name == "model-20260101-000000"


def test_the_title_names_what_was_left_out(profile):
    assert "tokens, all-linear, AdamW" in printed(profile, 160)
    profile.workload = WORKLOAD | {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0"]}
    assert "tokens, q_proj+v_proj except layers.0, AdamW" in printed(profile, 160)


def test_a_name_in_letters_that_no_font_has_is_drawn_without_warnings(profile):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert size_of(draw_png(chart(profile) | {"title": "\u4e8c\u6b21 \u0e01"})) == (1650, 750)
