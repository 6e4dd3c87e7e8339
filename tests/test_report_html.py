"""report.html in headless Chromium with the network cut, and what it is made of; the command `lora-fast report`."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import browser
import pytest

from lora_fast import decide
from lora_fast.cli import main
from lora_fast.decision import section
from lora_fast.profiler.html import page
from lora_fast.profiler.html_charts import figures, layer_lines, loss_curve
from lora_fast.profiler.profile import SCHEMA_VERSION
from lora_fast.profiler.report import chart
from lora_fast.profiler.runs import read_profile

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "cpu" / "profile.json"
needs_chromium = pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium (Debian's package of that name)")


@pytest.fixture(scope="module")
def profile():
    return read_profile(RESULTS)


@pytest.fixture(scope="module")
def report(profile, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page([profile]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    made = browser.Browser(tmp_path_factory.mktemp("chromium"))
    yield made
    made.close()


DRAWN = "[...document.querySelectorAll('.chart')].every(c => c.querySelector('.cartesianlayer .subplot'))"


@needs_chromium
def test_the_page_loads_without_the_network_and_without_an_error(chromium, report):
    chromium.open(report)
    chromium.wait(DRAWN)
    assert chromium.errors == []
    assert {url.partition(":")[0] for url in chromium.requests} <= {"file", "data", "blob"}
    assert [url for url in chromium.requests if url.startswith("file:")] == [report.as_uri()]
    # Even what a script would ask for is refused by the page itself.
    refused = chromium.evaluate("fetch('https://example.org/').then(() => 'sent', error => 'refused')")
    assert refused == "refused" and any("Content Security Policy" in text for text in chromium.errors)


@needs_chromium
def test_every_chart_has_its_points(chromium, report, profile):
    chromium.open(report)
    chromium.wait(DRAWN)
    counts = chromium.evaluate(
        "Object.fromEntries([...document.querySelectorAll('.chart')].map(c => [c.id,"
        " {points: c.querySelectorAll('.scatterlayer .point').length, bars: c.querySelectorAll('.barlayer .point path')"
        ".length, lines: c.querySelectorAll('.scatterlayer .js-line').length}]))"
    )
    ranks = len(profile.lora)
    assert counts["run0-first"]["points"] == counts["run0-memory-ratio"]["points"] == ranks + 1  # and the crossover
    assert counts["run0-overlay"]["points"] == 3 * (ranks + 1)
    tallest = max(arm.peak_MiB for arm in profile.arms)
    shown = sum(value > 1e-3 * tallest for arm in profile.arms for value in arm.by_category.values())
    assert counts["run0-memory"]["bars"] >= shown
    assert counts["run0-drift"]["lines"] == len(profile.arms) + 1


@needs_chromium
def test_hovering_shows_the_value(chromium, report, profile):
    chromium.open(report)
    chromium.wait(DRAWN)
    chromium.evaluate("document.getElementById('run0-first').scrollIntoView({block: 'center'})")
    x, y = chromium.evaluate(
        "(() => { const points = document.querySelectorAll('#run0-first .scatterlayer .point');"
        " const box = points[2].getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
    )
    assert chromium.evaluate("document.querySelectorAll('.hoverlayer .hovertext').length") == 0
    chromium.move_mouse(x - 40, y - 60)
    chromium.move_mouse(x, y)
    chromium.wait("document.querySelectorAll('#run0-first .hoverlayer .hovertext').length > 0")
    text = chromium.evaluate("document.querySelector('#run0-first .hoverlayer .hovertext').textContent")
    arm = profile.lora[2]
    assert f"r={arm.rank}" in text and f"{arm.ratio_to_full:.3f} of full" in text and f"{arm.step_ms:,.0f} ms" in text


ROWS = "[...document.querySelectorAll('tbody tr')].map(row => row.cells[0].textContent)"


@needs_chromium
def test_columns_sort_both_ways_by_value(chromium, report, profile):
    chromium.open(report)
    names = [arm.name.removeprefix("r") for arm in profile.arms]
    assert chromium.evaluate(ROWS) == names

    def click(header):
        chromium.evaluate(
            f"[...document.querySelectorAll('th button')].find(b => b.textContent === {json.dumps(header)}).click()"
        )
        return chromium.evaluate(ROWS)

    by_peak = [arm.name.removeprefix("r") for arm in sorted(profile.arms, key=lambda arm: arm.peak_MiB)]
    assert by_peak != names and click("peak MiB") == by_peak
    assert click("peak MiB") == by_peak[::-1]
    by_count = [arm.name.removeprefix("r") for arm in sorted(profile.arms, key=lambda arm: arm.trainable)]
    assert click("trained") == by_count  # 18.5k before 1.18M, which text would not be
    sorts = (
        "[...document.querySelectorAll('th[aria-sort]')].map(h => h.textContent + ' ' + h.getAttribute('aria-sort'))"
    )
    assert chromium.evaluate(sorts) == ["trained ascending"]


@needs_chromium
def test_what_has_no_value_sorts_last(chromium, profile, tmp_path):
    run = json.loads(RESULTS.read_text())
    run["arms"][2] |= dict.fromkeys(("step_ms", "ratio_to_full", "ratio_ci"), None) | {
        "status": "oom",
        "error": "killed",
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    path = tmp_path / "page.html"
    path.write_text(page([read_profile(tmp_path)]))
    chromium.open(path)
    chromium.wait(DRAWN)
    button = "[...document.querySelectorAll('th button')].find(b => b.textContent === 'step ms')"
    for _ in range(2):
        chromium.evaluate(f"{button}.click()")
        assert chromium.evaluate(ROWS)[-1] == "16"
    assert chromium.evaluate("document.querySelector('tr.bad').cells[0].textContent") == "16"
    assert chromium.errors == []


@needs_chromium
@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_phone_scrolls_no_page_sideways(chromium, report, width):
    chromium.open(report, width=width, height=800, phone=True)
    chromium.wait(DRAWN)
    assert chromium.evaluate("innerWidth") == width
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    widths = chromium.evaluate(
        "[...document.querySelectorAll('.chart .main-svg')].map(s => s.getBoundingClientRect().width)"
    )
    assert widths and max(widths) <= width
    assert chromium.errors == []


@needs_chromium
def test_dark_mode_is_dark_and_follows_a_change(chromium, report):
    def lightness(expression):
        colour = chromium.evaluate(expression)
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    page_colour = "getComputedStyle(document.body).backgroundColor"
    text = "getComputedStyle(document.querySelector('.chart .xtitle')).fill"
    chromium.open(report)
    chromium.wait(DRAWN)
    assert lightness(page_colour) > 200 and lightness(text) < 80
    chromium.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    chromium.wait(f"/rgb\\((2|1)\\d\\d,/.test({text})")
    assert lightness(page_colour) < 60 and lightness(text) > 180
    chromium.open(report, dark=True)
    chromium.wait(DRAWN)
    assert lightness(page_colour) < 60 and lightness(text) > 180


def test_the_page_asks_for_nothing_and_is_small(report):
    text = report.read_text(encoding="utf-8")
    assert len(text.encode()) < 6_000_000
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r'(?:src|href)\s*=\s*(?!"data:)', own)
    assert "default-src 'none'" in own and 'name="viewport"' in own


def test_figures_are_what_plotly_takes(profile):
    plotly = pytest.importorskip("plotly.graph_objects")
    found = figures(chart(profile))
    assert set(found) == {"first", "memory-ratio", "memory", "overlay", "drift"}
    for figure in found.values():
        plotly.Figure(data=figure["data"], layout=figure["layout"])  # raises for any property that it does not know


def test_the_method_tells_of_utilization_where_there_is_one():
    profile = read_profile(RESULTS)
    for each in profile.arms:
        each.executed_utilization = None
    assert "Utilization is" not in page([profile], ["run"])
    profile.lora[0].executed_utilization = 0.5
    assert "Utilization is" in page([profile], ["run"])


def test_a_capacity_is_drawn_where_memory_is_what_was_lacking():
    profile = read_profile(RESULTS)
    profile.environment["memory_MiB"] = 24_000.0
    for status, drawn in (("timeout", False), ("oom", True)):
        profile.arms[1].status, profile.arms[1].peak_MiB = status, None
        assert any("capacity" in trace["name"] for trace in figures(chart(profile))["memory"]["data"]) == drawn


def test_each_phase_has_a_bar_of_what_it_holds():
    profile = read_profile(RESULTS)
    held = {"weights": 20.0, "activations": 5.0}
    profile.lora[0].phase_categories_MiB = {"forward": held, "backward": held | {"gradients": 2.0}}
    figure = figures(chart(profile))["phases"]
    found = {trace["name"]: trace["y"] for trace in figure["data"]}
    assert found == {"weights": [20.0, 20.0], "gradients": [0.0, 2.0], "activations": [5.0, 5.0]}
    assert figure["data"][0]["x"] == [["r1", "r1"], ["forward", "backward"]]
    pytest.importorskip("plotly.graph_objects").Figure(data=figure["data"], layout=figure["layout"])


def test_out_of_memory_is_a_cross_on_the_line_of_the_capacity(profile):
    run = profile.to_dict()
    run["workload"] = run["workload"] | {"memory_limit_MiB": 150.0}
    run["arms"][4] |= {"status": "oom", "peak_MiB": None, "by_category": None, "predicted_MiB": 198.0}
    changed = type(profile).from_dict(json.loads(json.dumps(run)))
    data = figures(chart(changed))["memory"]["data"]
    (cross,) = (trace for trace in data if "✕" in trace["name"])
    (line,) = (trace for trace in data if "capacity" in trace["name"])
    assert cross["x"] == ["r256"] and cross["y"] == [150.0] and set(line["y"]) == {150.0}
    assert cross["name"] == "✕ out of memory"
    (predicted,) = (trace for trace in data if trace["name"].startswith("predicted"))
    assert dict(zip(predicted["x"], predicted["y"]))["r256"] == 198.0
    assert all(trace["y"][4] == 0 for trace in data if trace["type"] == "bar")
    # Without a limit it is the machine's memory, where the arms come near it.
    run["workload"] = run["workload"] | {"memory_limit_MiB": None}
    for memory, shown in ((400.0, False), (300.0, True)):
        run["arms"][4] |= {"status": "ok", "peak_MiB": 198.0}
        run["environment"] = run["environment"] | {"memory_MiB": memory}
        data = figures(chart(type(profile).from_dict(json.loads(json.dumps(run)))))["memory"]["data"]
        assert any("capacity 300 MiB" in trace["name"] for trace in data) == shown


def test_the_description_has_every_curve(profile):
    description = chart(profile)
    assert [panel["title"] for panel in description["overlay"]] == ["Step time", "FLOPs", "Peak memory"]
    drift = {series["name"]: series["ratio"] for series in description["drift"]}
    assert set(drift) == {"r1", "r4", "r16", "r64", "r256", "full", "full again"}
    samples = profile.lora[0].samples_ms
    assert drift["r1"][7] == pytest.approx(samples[7] / profile.lora[0].step_ms)
    assert json.loads(json.dumps(description)) == description


def test_drift_names_the_second_copy_after_what_it_is_a_copy_of(profile):
    of_rank = replace(profile, aa=profile.aa | {"of": "r1"})
    assert chart(of_rank)["drift"][-1]["name"] == "r1 again"
    lines = {line["name"]: line["line"]["dash"] for line in figures(chart(of_rank))["drift"]["data"]}
    assert lines["r1 again"] == "dot" and lines["r1"] == "solid"


def test_text_from_a_run_cannot_become_markup(profile):
    changed = type(profile).from_dict(json.loads(json.dumps(profile.to_dict())))
    changed.workload["model"] = "</script><img src=x onerror=alert(1)>"
    changed.notes.append("<b>bold</b>")
    text = page([changed])
    assert "<img" not in text and "<b>bold" not in text and "&lt;img" in text


def test_without_plotly_the_page_says_what_to_install(profile, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    text = page([profile])
    assert "pip install plotly" in text and len(text) < 200_000
    assert (
        f"{profile.full.step_ms:.0f}" in text and "Crossover" not in text.partition("<table")[0].partition("<main>")[0]
    )


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two folders of the same work, one of other work, one of a newer schema, and what is no run."""
    monkeypatch.chdir(tmp_path)
    run = json.loads(RESULTS.read_text())
    works = (("a", {}), ("b", {}), ("other", {"batch_size": 8}), ("older", {}), ("sharded", {"shards": 8}))
    for name, changes in (*works, ("foreach", {"foreach": True})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(run | {"workload": run["workload"] | changes}))
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "run.json").write_text(json.dumps(run | {"schema_version": SCHEMA_VERSION + 1, "arms": {}}))
    for name, content in (
        ("torn", '{"schema_version": 1, "arms": ['),
        ("list", "[]"),
        ("short", '{"schema_version": 1}'),
        ("armless", json.dumps(run | {"arms": []})),
        ("nameless", json.dumps(run | {"workload": {"dtype": "fp32"}})),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(content)
    for name, file in (("killed", "arms.jsonl"), ("thesis", "thesis.txt")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("")
    return tmp_path


def test_a_run_is_reported_again(runs, capsys):
    assert main(["report", "a", "--price", "2.50/h"]) == 0
    out = capsys.readouterr().out
    profile = read_profile(RESULTS)
    assert "Crossover in time" in out and "$/1M tok" in out and "Written: a/report.html" in out
    usd = 2.5 / 3600 / profile.full.tokens_per_s * 1e6
    assert f"{usd:#.3g}" in next(line for line in out.splitlines() if line.strip().startswith("full "))
    text = (runs / "a" / "report.html").read_text()
    assert f"{usd:#.3g}" in text and "$/1M tok" in text
    assert main(["report", "a/run.json", "--json", "-"]) == 0
    (document,) = json.loads(capsys.readouterr().out)["runs"]
    before = json.loads(RESULTS.read_text())
    assert document["crossover"] == before["crossover"]
    assert [arm["samples_ms"] for arm in document["arms"]] == [arm["samples_ms"] for arm in before["arms"]]


@needs_chromium
def test_runs_are_compared_side_by_side(runs, capsys, chromium):
    assert main(["report", "a", "b", "--out", "both"]) == 0
    out = capsys.readouterr().out
    assert out.count("Crossover in memory") == 2 and "Written: both/report.html" in out
    chromium.open(runs / "both" / "report.html")
    chromium.wait(DRAWN)
    assert chromium.errors == []
    left, right = chromium.evaluate(
        "['run0-first', 'run1-first'].map(id => document.getElementById(id).getBoundingClientRect().toJSON())"
    )
    assert left["y"] == right["y"] and left["right"] < right["left"]
    assert chromium.evaluate("document.querySelector('table').tBodies[0].rows[0].textContent").count("×1.00") == 2


def test_different_work_is_compared_only_when_told(runs, capsys):
    assert main(["report", "a", "other"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "batch_size 4 / 8" in err and "--allow-different" in err
    assert not (runs / "runs").exists()
    assert main(["report", "a", "other", "--allow-different", "--out", "told"]) == 0
    assert "did different work" in (runs / "told" / "report.html").read_text()


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ("nowhere", "nowhere is no run"),
        ("thesis", "thesis is no run"),
        ("killed", "has not ended"),
        ("torn", "is not the run.json of a run"),
        ("list", "is not the run.json of a run"),
        ("short", "is not the run.json of a run"),
        ("armless", "arms lacks full fine-tuning"),
        ("nameless", "workload lacks model, parameters, batch_size, seq_len, target_modules"),
        ("sharded", "did different work: shards 1 / 8"),
        ("foreach", "did different work: foreach False / True"),
        ("newer", f"schema_version={SCHEMA_VERSION + 1}"),
    ],
)
def test_what_is_no_run_is_one_line(runs, capsys, run, says):
    assert main(["report", "a", run]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and says in err and err.startswith("lora-fast: error: ")


@pytest.mark.parametrize("price", ["free", "0/h", "-1", "2.50/day", ""])
def test_what_is_no_price_is_refused(runs, capsys, price):
    assert main(["report", "a", f"--price={price}"]) == 2
    assert "expected dollars an hour" in capsys.readouterr().err


def test_a_report_is_not_written_over_something_else(runs, capsys):
    shutil.copytree(runs / "thesis", runs / "out")
    assert main(["report", "a", "b", "--out", "out"]) == 2
    assert "not empty" in capsys.readouterr().err


def searched(losses, full=None, noise=0.01):
    """The dict of a search with two trainings of every rank."""
    means = {**losses, **({} if full is None else {"full": full})}
    trials = [
        {"rank": rank, "seed": seed, "value": mean, "status": "ok", "seconds": 9.0 + (rank == "full"), "error": None}
        for rank, mean in means.items()
        for seed in (0, 1)
    ]
    points = [{"rank": rank, "mean": mean, "count": 2} for rank, mean in means.items()]
    found = {"direction": "minimize", "noise": noise, "verdict": "plateau", "sentence": "r=4 suffices"}
    return found | {"points": points, "trials": trials, "best_rank": 4, "cost_s": 90.0}


LOSSES = {1: 2.2, 4: 2.0, 16: 1.995}


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_a_decision_comes_first_with_its_curve_and_its_evidence(chromium, profile, tmp_path, width):
    found = section(decide(profile, searched(LOSSES, full=1.99), task="simple", target=2.1))
    path = tmp_path / "report.html"
    path.write_text(page([profile], decision=found), encoding="utf-8")
    chromium.open(path, width=width, phone=width < 1000)
    chromium.wait(DRAWN)
    assert chromium.errors == [] and chromium.evaluate("document.documentElement.scrollWidth") <= width
    assert chromium.evaluate("document.querySelector('h1').textContent") == "Which rank, or full fine-tuning?"
    assert chromium.evaluate("document.querySelector('.answer').textContent") == found["answer"]
    assert chromium.evaluate("document.querySelectorAll('#decision .scatterlayer .point').length") == len(LOSSES)
    rows = "[...document.querySelectorAll('.words tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    shown = chromium.evaluate(rows)
    assert [row[0].partition(" [")[0] for row in shown] == [row["name"] for row in found["indicators"]]
    assert [float(row[-1]) for row in shown] == [pytest.approx(row["sure"], abs=5e-3) for row in found["indicators"]]
    # The profile's own tables sort as before.
    chromium.evaluate("document.querySelector('th button').click()")
    assert chromium.evaluate("document.querySelectorAll('th[aria-sort]').length") == 1 and chromium.errors == []


def test_a_decision_needs_neither_profile_nor_curve():
    only = page([], decision=section(decide(search=searched(LOSSES))))
    assert 'id="decision"' in only and "All arms" not in only
    nothing = page([], decision=section(decide(task="simple")))
    assert 'id="decision"' not in nothing and "Which rank, or full fine-tuning?</h1>" in nothing
    bad = section(decide(search=searched(LOSSES) | {"sentence": "<img src=x>", "verdict": "<b>"}, target=1.0))
    assert "<img" not in page([], decision=bad) and "<b>" not in page([], decision=bad)


def test_the_curve_has_its_errors_the_target_and_the_rank():
    plotly = pytest.importorskip("plotly.graph_objects")
    found = section(decide(search=searched(LOSSES, full=1.9), target=2.05, budget=None))
    curve = found["curve"]
    figure = loss_curve(curve)
    plotly.Figure(data=figure["data"], layout=figure["layout"])
    traces = {trace["name"].partition(":")[0]: trace for trace in figure["data"]}
    assert traces["LoRA, mean of the trainings"]["y"] == list(LOSSES.values())
    half = 2.5 * 0.01 / 2**0.5  # 2.5 standard errors of a mean of two
    band = traces["2.5 standard errors"]["y"]
    assert band[:3] == pytest.approx([mean - half for mean in LOSSES.values()])
    assert band[:2:-1] == pytest.approx([mean + half for mean in LOSSES.values()])
    assert set(traces["target"]["y"]) == {2.05} and set(traces["full fine-tuning"]["y"]) == {1.9}
    assert traces["recommended"]["x"] == [found["curve"]["recommended"]] * 2
    low, high = figure["layout"]["yaxis"]["range"]
    assert low < 1.9 and high > 2.2 + half
    assert loss_curve(curve | {"points": []}) is None


def layer_row(K, N, rank, ratio, name):
    times = {
        "ms": 2 * ratio,
        "frozen_ms": 1.4,
        "dense_ms": 2.0,
        "ratio_to_dense": ratio,
        "ratio_to_frozen": ratio / 0.7,
    }
    ends = {"dense_ci": [ratio - 0.01, ratio + 0.02], "frozen_ci": [ratio / 0.7, ratio / 0.7], "noise_floor": 0.03}
    return {"in_features": K, "out_features": N, "names": [name], "rank": rank, "status": "ok", **times, **ends}


@needs_chromium
def test_layers_by_themselves_are_a_chart(chromium, profile, tmp_path):
    run = json.loads(json.dumps(profile.to_dict()))
    rows = [
        layer_row(K, 64, rank, 0.7 + rank / 100, name)
        for K, name in ((64, "q_proj"), (172, "down_proj"))
        for rank in (1, 8)
    ]
    run["layers"] = [*rows, {"in_features": 64, "out_features": 9, "names": ["x"], "rank": 1, "status": "oom"}]
    figure = layer_lines(run["layers"])
    lines = {trace["name"]: trace for trace in figure["data"]}
    assert lines["down_proj (172 → 64)"]["y"] == pytest.approx([0.71, 0.78])
    assert set(lines["q_proj (64 → 64), frozen"]["y"]) == {0.7}
    path = tmp_path / "report.html"
    path.write_text(page([type(profile).from_dict(run)]), encoding="utf-8")
    chromium.open(path)
    chromium.wait(DRAWN)
    assert chromium.evaluate("document.querySelectorAll('#run0-layers .scatterlayer .point').length") == 4
    assert chromium.errors == []
