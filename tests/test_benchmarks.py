"""The GPU benchmarks: that they run, what they write, that the baselines compute what they should, and `make gpu`.

Sizes are tiny. Without a GPU all but the CUDA graphs runs on the CPU, the baselines' kernels in the interpreter."""

import csv
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import DEVICE, DTYPES, assert_as_exact_as, count_launches, nan_filled, random

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
sys.path.append(str(FOLDER))  # where a script among them finds the others

import baselines  # noqa: E402
import gpu  # noqa: E402
import harness  # noqa: E402
import plot  # noqa: E402
import readme  # noqa: E402
import split_kernels  # noqa: E402
import timing  # noqa: E402
from timing import Arm  # noqa: E402

OURS = {
    *("frozen", "frozen again", "lora_fast op", "lora_fast op, cublas route", "lora_fast op, triton route"),
    *("lora_fast apply_lora", "lora_fast accelerate_peft", "peft", "peft bf16 adapters", "LoRAFusion's factoring"),
    "lora_fast GEMM without adapters",
}
# {benchmark: (its file of rows, providers)}
BENCHES = {
    "bench_lora_linear": ("lora_linear", OURS),
    "bench_qkv": ("qkv", OURS),
    "bench_mlp": ("mlp", OURS | {"lora_fast layers"}),
    "bench_grouped": (
        "grouped",
        {
            *("frozen", "frozen again", "lora_fast op", "lora_fast op, cublas route", "lora_fast op, triton route"),
            "one adapter, lora_fast",
            *("loop over adapters, lora_fast", "loop over adapters, PyTorch", "lora_fast GEMM without adapters"),
        },
    ),
    "bench_train_step_gpu": (
        "train_step",
        {
            *("frozen", "frozen again", "lora_fast apply_lora", "lora_fast accelerate_peft"),
            *("peft", "peft bf16 adapters", "full fine-tuning"),
        },
    ),
}


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ----------------------------------------------------------------------------------------------------- the benchmarks


@pytest.mark.parametrize("name", BENCHES)
def test_a_benchmark_runs_and_writes_its_rows(name, tmp_path):
    op, providers = BENCHES[name]
    bench = importlib.import_module(name)
    arguments = ["--device", DEVICE.type, "--tiny", "--dtype", "fp32", "--commit", "abc", "--out", str(tmp_path)]
    assert bench.main(arguments) == 0
    rows = read(tmp_path / f"{op}.csv")
    assert {row["provider"] for row in rows} == providers | ({"Unsloth's factoring"} if providers >= OURS else set())
    assert tuple(rows[0])[: len(harness.PROVENANCE)] == harness.PROVENANCE
    assert set(harness.COLUMNS) <= set(rows[0])
    for row in rows:
        assert not row["error"], row
        assert row["commit"] == "abc" and row["op"] == op and row["gpu"] and row["torch"] and row["dtype"] == "fp32"
        assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert float(row["ratio_low"]) <= float(row["ratio_to_frozen"]) <= float(row["ratio_high"])
        assert int(row["rounds"]) >= 6
        assert float(row["saved_MiB"]) >= 0
    frozen = [row for row in rows if row["provider"] == "frozen"]
    assert all(float(row["ratio_to_frozen"]) == 1 for row in frozen)
    if providers >= OURS:  # Unsloth's fast path has no dropout
        assert {row["dropout"] for row in rows if row["provider"] == "Unsloth's factoring"} == {"0.0"}
        assert {row["dropout"] for row in frozen} == {"0.0", "0.1"}
        assert all(row["gemm_over_cublas"] for row in rows)


def test_the_svd_benchmark_runs_and_writes_its_rows(tmp_path):
    import bench_svd

    arguments = ["--device", DEVICE.type, "--models", "tiny", "--ranks", "4", "--rounds", "6", "--out", str(tmp_path)]
    assert bench_svd.main([*arguments, "--commit", "abc"]) == 0
    rows = {row["provider"]: row for row in read(tmp_path / "svd.csv")}
    torch_arms = {"torch Gram + eigh, fp64", "torch QR + SVD, fp64", "torch QR + SVD, fp32", "svd_lowrank", "dense"}
    assert torch_arms | {"lora_fast", "lora_fast again", "lora_fast from the file"} <= set(rows)
    assert all(float(row["ms_p50"]) > 0 and row["commit"] == "abc" and row["matrices"] == "4" for row in rows.values())
    assert float(rows["lora_fast"]["max_error"]) < 1e-12 < 1e-8 < float(rows["dense"]["max_error"]) < 1e-4
    # On a GPU this adapter's factors are no whole MiB.
    assert float(rows["lora_fast from the file"]["peak_MiB"]) >= (DEVICE.type == "cpu")
    assert [row["provider"] for row in read(tmp_path / "svd.csv")][-2:] == ["svd_lowrank", "dense"]


def test_the_memory_benchmark_runs_and_writes_its_rows(tmp_path):
    import bench_memory

    arguments = ["--device", DEVICE.type, "--tiny", "--dtype", "fp32", "--commit", "abc", "--out", str(tmp_path)]
    assert bench_memory.main(arguments) == 0
    rows = read(tmp_path / "memory.csv")
    assert [row["R"] for row in rows] == ["4", ""] and tuple(rows[0]) == bench_memory.COLUMNS
    for row in rows:
        assert row["fits"] == "True" and not row["error"] and row["model"] == "llama-5m" and row["commit"] == "abc"
        # Beside a model this small a GPU's counter shows cuBLAS's workspace, some 30 MiB, which no shape tells.
        assert DEVICE.type == "cuda" or abs(float(row["error_percent"])) < 1
        assert abs(float(row["calibrated_error_percent"])) < (1 if DEVICE.type == "cpu" else 5)
        held = sum(float(row[f"predicted_{category}_MiB"]) for category in bench_memory.CATEGORIES)
        assert held == pytest.approx(float(row["predicted_MiB"]), abs=0.4)


def test_the_host_benchmark_runs_and_writes_its_rows(tmp_path, compile_environment, pytestconfig):
    """In a process of its own: it compiles kernels, and without a GPU pretends that there is one."""
    cache = getattr(pytestconfig, "cache", None)  # none under `make gpu`
    compile_environment["TRITON_CACHE_DIR"] = str(cache.mkdir("triton") if cache else tmp_path / "triton")
    command = [sys.executable, FOLDER / "bench_host.py", "--ops", "linear", "--rounds", "6", "--out", tmp_path]
    done = subprocess.run([*command, "--commit", "abc"], env=compile_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    rows = read(tmp_path / "host.csv")
    assert [row["dropout"] for row in rows] == ["0.0"] * 6 + ["0.1"] * 6
    for row in rows:
        assert float(row["host_us"]) > 0 and row["commit"] == "abc" and row["rounds"] == "6"
        assert float(row["ratio_low"]) <= float(row["ratio_to_peft"]) <= float(row["ratio_high"])
        # A cast, S and its parts, dS and dB and their parts, dA and its parts, y and dx.
        assert row["launches"] == ("9" if row["provider"].startswith("lora_fast") else "")
        assert row["driver"] == ("none" if DEVICE.type == "cpu" else "CUDA")
    assert {row["ratio_to_peft"] for row in rows if row["provider"] == "peft"} == {"1.000"}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="it is about processors")
def test_the_experts_benchmark_runs_and_writes_its_rows(tmp_path):
    import bench_experts

    sizes = ["--experts", "4", "--experts-a-token", "2", "--hidden", "32", "--intermediate", "16", "--tokens", "40"]
    arguments = [*sizes, "--rank", "3", "--rounds", "6", "--device", "cpu", "--dtype", "fp32"]
    assert bench_experts.main([*arguments, "--out", str(tmp_path), "--commit", "abc"]) == 0
    rows = {row["provider"]: row for row in read(tmp_path / "experts.csv")}
    arms = ["frozen", "frozen again", "peft", "lora_fast accelerate_peft", "lora_fast apply_lora", "full"]
    assert list(rows) == arms and all(row["commit"] == "abc" and float(row["ms_p50"]) > 0 for row in rows.values())
    kept = {name: float(row["saved_MiB"]) for name, row in rows.items()}
    assert kept["frozen"] <= kept["lora_fast apply_lora"] == kept["lora_fast accelerate_peft"] < kept["peft"]
    assert rows["frozen"]["ratio_to_frozen"] == "1.000" and rows["peft"]["R"] == "3" and rows["full"]["R"] == ""


def test_the_noise_benchmark_compares_loads(tmp_path, monkeypatch):
    import bench_noise

    from lora_fast.profiler.timing import time_arms

    started, run_in_child = [], bench_noise.run_in_child

    def measured(task, *arguments):
        """The first in a process of its own, beside the neighbour; the others, one per arm, here."""
        started.append(arguments[2]["arms"])
        assert task == "time"
        return run_in_child(task, *arguments) if len(started) == 1 else time_arms(*arguments[:2], **arguments[2])

    monkeypatch.setattr(bench_noise, "run_in_child", measured)
    monkeypatch.setattr(bench_noise, "LOADS", ("bursts",))
    threads = torch.get_num_threads()
    arguments = ["--ranks", "4", "--batch-size", "1", "--seq-len", "8", "--rounds", "6", "--out", str(tmp_path)]
    try:
        assert bench_noise.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    assert started == [arms := ["r4", "full", "full again"], *([name] for name in arms)]
    rows = read(tmp_path / "noise.csv")
    assert [(row["load"], row["provider"]) for row in rows] == [("bursts", name) for name in ("r4", "full again")]
    assert all(row["agrees"] == "True" and float(row["sequential_ratio"]) > 0 for row in rows)
    assert all(float(row["ratio_low"]) <= float(row["ratio_to_full"]) <= float(row["ratio_high"]) for row in rows)
    near, far = ({"ratio": ratio, "ci": (ratio - 0.1, ratio + 0.05)} for ratio in (1.0, 1.2))
    assert not bench_noise.agrees(near, far) and not bench_noise.agrees(far, near)
    assert bench_noise.agrees(near, {"ratio": 1.14, "ci": (1.0, 1.2)})


@pytest.mark.parametrize(
    "name",
    [*BENCHES, "bench_svd", "bench_memory", "bench_noise", "bench_one_run_rank", "bench_rank_scaling", "gpu", "plot"],
)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main(["--help"])
    assert ended.value.code == 0
    assert "--out" in capsys.readouterr().out or name == "plot"


def test_a_benchmark_is_a_script(tmp_path):
    command = [sys.executable, FOLDER / "bench_grouped.py", "--device", "cpu", "--tiny", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(read(tmp_path / "grouped.csv")) == 9


@pytest.mark.parametrize("arguments", [["--device", "cpu"], ["--device", "cpu", "--tiny"]])
def test_numbers_of_a_cpu_never_reach_the_results(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        harness.arguments("A benchmark.", arguments)
    assert ended.value.code == 2
    assert "--tiny" in capsys.readouterr().err


def test_the_first_cases_are_the_headline():
    import bench_lora_linear

    first, *others = bench_lora_linear.cases(False)
    assert first == (8192, 4096, 4096, 16, 0.0)
    # Every size, rank and dropout that is asked for, once.
    everything = {(M, K, N, R, p) for M, K, N, R, p in others} | {first}
    assert len(everything) == len(others) + 1 == 5 * 3 * 4 * 2


# --------------------------------------------------------------------------------------------------- rows and deadline


def test_a_row_is_on_disk_once_written(tmp_path):
    with harness.RowWriter(tmp_path / "new" / "rows.csv", ("a", "b")) as writer:
        assert read(writer.path) == []
        writer.write({"a": 1})
        assert read(writer.path) == [{"a": "1", "b": ""}]
        with pytest.raises(ValueError, match="c"):
            writer.write({"c": 1})  # a misspelt column


def options(tmp_path, deadline=None):
    arguments = ["--device", "cpu", "--tiny", "--out", str(tmp_path)]
    return harness.arguments("A benchmark.", arguments + (["--deadline", str(deadline)] if deadline else []))


def test_a_failing_case_or_arm_does_not_stop_the_rest(tmp_path, capsys):
    def measure(case):
        if case == "b":
            raise RuntimeError("no such layer")
        yield {"provider": "ours", "error": "wrong: far off" if case == "a" else ""}

    assert harness.run(options(tmp_path), "trial", ["a", "b", "c"], measure) == 1
    assert [row["error"] for row in read(tmp_path / "trial.csv")] == ["wrong: far off", ""]
    out = capsys.readouterr().out
    assert "FAILED a, ours: wrong: far off" in out and "FAILED b: RuntimeError: no such layer" in out


def test_no_case_begins_that_would_outlast_the_deadline(tmp_path, capsys):
    def measure(case):
        time.sleep(0.3)
        yield {"provider": "ours"}

    assert harness.run(options(tmp_path, deadline=0.5), "trial", range(5), measure) == 0
    assert len(read(tmp_path / "trial.csv")) == 1
    assert "4 of 5 cases left out" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- timing


def test_arms_are_timed_in_changing_order_until_time_is_up():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "abcd"}
    times = timing.time_rounds(calls, torch.device("cpu"), 20)
    assert {name: len(samples) for name, samples in times.items()} == dict.fromkeys("abcd", 20)
    rounds = [tuple(called[i : i + 4]) for i in range(0, len(called), 4)]
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert len(set(rounds)) > 5
    times = timing.time_rounds(calls, torch.device("cpu"), 20, out_of_time=lambda: True)
    assert {len(samples) for samples in times.values()} == {timing.MIN_ROUNDS}


def test_an_arm_that_is_wrong_or_fails_is_not_timed():
    dtype = torch.float32
    weight, a, b = random(12, 8, seed=1), random(3, 8, seed=2).requires_grad_(), random(12, 3, seed=3).requires_grad_()
    layer = baselines.Layer(weight, a, b, 2.0)
    truth = Arm(lambda x: baselines.exact(x, layer), [a, b])

    def forgets(x):  # the gradient of b is right in shape and zero
        return baselines.exact(x, layer._replace(lora_B=b.detach())) + 0 * b.sum()

    def fails(x):
        raise RuntimeError("out of registers\nand more")

    arms = {
        "frozen": Arm(lambda x: baselines.frozen(x, weight)),
        "right": Arm(lambda x: baselines.exact(x, layer), [a, b], exact=truth),
        "unscaled": Arm(lambda x: baselines.exact(x, layer._replace(scaling=1.0)), [a, b], exact=truth),
        "forgets": Arm(forgets, [a, b], exact=truth),
        "fails": Arm(fails, [a, b], exact=truth),
    }
    sets = timing.input_sets(10, 8, [12], dtype, DEVICE)
    measured = timing.compare(arms, sets, [weight], 6)
    assert {name for name, arm in measured.items() if arm.samples} == {"frozen", "right"}
    assert measured["unscaled"].error.startswith("wrong: relative error")
    assert measured["forgets"].error.startswith("wrong: not finite, or all zero")
    assert measured["fails"].error == "RuntimeError: out of registers"
    assert measured["right"].saved_MiB > measured["frozen"].saved_MiB == 0
    rows = timing.figures(measured, "frozen")
    assert "ms_p50" not in rows["fails"] and rows["right"]["ratio_to_frozen"]
    late = timing.compare(dict(reversed(arms.items())), sets, [weight], 6, out_of_time=lambda: True)
    assert late["fails"].error == "RuntimeError: out of registers"  # none could be timed yet: the next one is tried
    assert late["right"].samples and late["frozen"].error == harness.NO_TIME and not late["frozen"].samples


def test_the_route_is_the_one_that_was_taken():
    import lora_fast

    leaves = random(8, 16, seed=1), random(12, 16, seed=2), random(3, 16, seed=3), random(12, 3, seed=4)
    for route in ("cublas", "triton"):
        arm = Arm(lambda x: lora_fast.lora_linear(x, *leaves[1:], backend="triton"), [], route)
        x = leaves[0].clone().requires_grad_()
        taken = timing.routes_of(lambda arm=arm, x=x: arm.step(x, [random(8, 12)]))
        assert taken.count(f": {route}") == 2
        assert "linear_lora N=12 K=16" in taken and "grad_x N=12 K=16" in taken


# ----------------------------------------------------------------------------------------------------------- baselines


def layers_of(k, ns, ranks, dtype=torch.float32):
    return [
        baselines.Layer(
            random(n, k, dtype=dtype, seed=10 + i, scale=k**-0.5),
            random(r, k, seed=20 + i, scale=k**-0.5).requires_grad_(),
            random(n, r, seed=30 + i, scale=r**-0.5).requires_grad_(),
            0.75 + i,
        )
        for i, (n, r) in enumerate(zip(ns, ranks))
    ]


def in_dtype(layers, dtype):
    return [
        layer._replace(**{n: getattr(layer, n).detach().to(dtype).requires_grad_() for n in ("lora_A", "lora_B")})
        for layer in layers
    ]


def results(function, x, layers, dys):
    arm = Arm(lambda x: function(x, layers), [f for layer in layers for f in (layer.lora_A, layer.lora_B)])
    return arm.step(x.detach().clone().requires_grad_(), [dy.to(x.dtype) for dy in dys])


def eager(x, layers):
    return [baselines.exact(x, layer) for layer in layers]


FACTORINGS = {
    "accumulated": baselines.accumulated,
    "split": lambda x, layers: [baselines.split(x, layer) for layer in layers],
}


@pytest.mark.parametrize("name", FACTORINGS)
@settings(max_examples=6)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.sampled_from(DTYPES))
def test_a_factoring_is_as_exact_as_pytorch(name, m, k, n, r, dtype):
    layers = layers_of(k, [n, 7], [r, 5], dtype)
    x, dys = random(m, k, dtype=dtype, seed=1), [random(m, n, dtype=dtype, seed=2), random(m, 7, dtype=dtype, seed=3)]
    with nan_filled(), count_launches() as launches:
        mine = results(FACTORINGS[name], x, layers, dys)
    assert (launches["_update_first_kernel"], launches["_atomic_grads_kernel"]) == (
        (4, 2) if name == "split" else (0, 0)
    )
    low = results(eager, x, layers, dys)
    wide = [layer._replace(weight=layer.weight.double()) for layer in in_dtype(layers, torch.float64)]
    truths = results(eager, x.double(), wide, dys)
    for result, eagers, truth in zip(mine, low, truths, strict=True):
        # A sum of few numbers can be near zero, where one rounding is everything: ones beside it set the scale.
        ones = torch.ones(32, device=DEVICE)
        joined = [torch.cat([ones.to(t.dtype), t.flatten()]) for t in (result.to(eagers.dtype), eagers, truth)]
        assert_as_exact_as(*joined, factor=3)


def test_a_factoring_in_float64():
    layers = in_dtype(layers_of(24, [16, 7], [5, 3]), torch.float64)
    layers = [layer._replace(weight=layer.weight.double()) for layer in layers]
    x, dys = random(33, 24, seed=1).double(), [random(33, 16, seed=2), random(33, 7, seed=3)]
    mine = results(baselines.accumulated, x, layers, dys)
    for result, truth in zip(mine, results(eager, x, layers, dys), strict=True):
        assert torch.allclose(result, truth, rtol=1e-12, atol=1e-12)


def test_split_applies_one_mask_forward_and_backward():
    p, seed = 0.3, 11
    (layer,) = layers_of(70, [33], [5])
    x, dy = random(40, 70, seed=1), random(40, 33, seed=2)
    dropped, kept = split_kernels.split_dropout(x, p, seed)
    share = float(kept.float().mean())
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5  # a binomial five sigmas out
    assert torch.allclose(dropped, x * kept / (1 - p), rtol=1e-6)

    def masked(x, layers):
        update = (x * kept / (1 - p)) @ layer.lora_A.t() @ layer.lora_B.t()
        return [x @ layer.weight.t() + layer.scaling * update]

    with nan_filled():
        mine = results(lambda x, layers: [baselines.split(x, layer, p, seed)], x, [layer], [dy])
    for result, truth in zip(mine, results(masked, x, [layer], [dy]), strict=True):
        assert torch.allclose(result, truth, rtol=1e-4, atol=1e-5)


def test_swiglu_is_autograds():
    g, u = (random(9, 20, seed=i).requires_grad_() for i in (1, 2))
    dh = random(9, 20, seed=3)
    mine = torch.autograd.grad(baselines.swiglu(g, u), [g, u], dh)
    theirs = torch.autograd.grad(torch.nn.functional.silu(g) * u, [g, u], dh)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(mine, theirs))


# ------------------------------------------------------------------------------------------------------------ make gpu


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU here: everything would run")
def test_without_a_gpu_nothing_runs_and_it_says_so(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path / "out")}
    done = subprocess.run([sys.executable, FOLDER / "gpu.py"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "no CUDA GPU" in done.stdout and "nothing ran" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU here: it need not be pretended")
@pytest.mark.parametrize("name", ["bench_lora_linear", "bench_grouped"])
def test_what_only_a_gpu_reaches_has_run(name, tmp_path):
    """Before a GPU that does nothing: routes are timed and kept, every arm is captured, and computes what it should."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "pretended_gpu.py", FOLDER / f"{name}.py", "--tiny", "--out", tmp_path],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    op, providers = BENCHES[name]
    rows = read(tmp_path / f"{op}.csv")
    assert providers <= {row["provider"] for row in rows}
    assert {(row["error"], row["timed_by"]) for row in rows} == {("", "CUDA graph")}, done.stdout
    (tables,) = json.loads((tmp_path / "lora_fast" / "tuning.json").read_text(encoding="utf-8"))["gpus"].values()
    timed = [set(row["ms"]) for table in tables.values() for row in table.values()]
    assert any({"cublas", "cublas, update first"} < names for names in timed), timed
    assert any({"two reads of dy", "triton, one read of dy"} == names for names in timed), timed


def test_the_links_make_one_package_of_the_source_folders(tmp_path):
    path = gpu.link_package(tmp_path / "path")
    gpu.link_package(path)  # again, over the old one
    script = (
        "import importlib.util, lora_fast, lora_fast.kernels.dropout, lora_fast.profiler.intervals, lora_fast.tuning\n"
        "assert importlib.util.find_spec('kernels') is None, 'the root is on the path'\n"
        "assert lora_fast.tuning._known() is not None\n"
        "print(lora_fast.__file__, lora_fast.kernels.dropout.__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        env={**os.environ, "PYTHONPATH": str(path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert all(name.startswith(str(path)) for name in done.stdout.split())


def parts(tmp_path):
    def part(name, weight, code, **settings):
        return gpu.Part(name, weight, [sys.executable, "-c", code], {"MARK": name}, **settings)

    return [
        part("fails", 1, "print('one'); raise SystemExit(3)"),
        part("hangs", 1, "import time; print('two', flush=True); time.sleep(60)"),
        part("works", 8, "import os, sys; print(os.environ['MARK'], sys.argv)", tells_deadline=True),
    ]


def test_benchmarks_compile_beside_the_tests(tmp_path, monkeypatch):
    """Started with one round and a folder and a table of their own, and gone when the tests are."""
    code = (
        "import os, pathlib, sys, time\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "folder.mkdir(parents=True, exist_ok=True)\n"
        "(folder / 'told').write_text(f'{os.getpid()} {sys.argv[1:]} {os.environ[\"XDG_CACHE_HOME\"]}')\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    bench = gpu.Part("mlp", 1, [sys.executable, "-c", code, "--out", "results"], {"XDG_CACHE_HOME": "mine"})
    with gpu.compiling([bench], dict(os.environ)):
        file = tmp_path / "build" / "warm-up" / "told"
        until = time.monotonic() + 30
        while not (file.exists() and file.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        pid, told = file.read_text().split(" ", 1)
    assert "'--rounds', '1'" in told and told.endswith(str(tmp_path / "build" / "warm-up" / "cache"))
    assert not (tmp_path / "results").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_a_failing_part_does_not_stop_the_rest(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(gpu, "no_gpu", lambda: None)
    monkeypatch.setattr(gpu, "environment_line", lambda: "a pretended GPU")
    monkeypatch.setattr(gpu, "parts", lambda out, commit: parts(tmp_path))
    monkeypatch.setattr(gpu, "link_package", lambda folder: tmp_path)
    start = time.monotonic()
    assert gpu.main(["--deadline", "20", "--out", str(out), "--commit", "abc"]) == 1
    assert time.monotonic() - start < 30
    log = (out / "gpu.log").read_text(encoding="utf-8")
    assert log.strip() in capsys.readouterr().out
    assert "a pretended GPU; commit abc" in log
    assert "one\n=== fails: exit status 3" in log
    assert "two\n=== hangs: stopped at its limit of 2 s" in log  # an eighth and a ninth of the time, both cut short
    assert "works ['-c', '--deadline'" in log and "=== works: ok" in log
    assert gpu.main(["--deadline", "20", "--out", str(out), "--only", "works"]) == 0
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(out), "--only", "nothing"])


def test_what_make_gpu_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    listed = gpu.parts(tmp_path, "abc")
    names = [part.name for part in listed]
    assert names == [
        "tests",
        "lora_linear",
        "train_step_gpu",
        "mlp",
        "qkv",
        "grouped",
        "svd",
        "memory",
        "host",
        "compute-sanitizer",
    ]
    # Eight result files are what one call may bring back: those and the log, which has the rows of "host" too.
    assert sum(str(tmp_path) in part.command for part in listed) + 1 == 8
    assert set(gpu.COMPILED) <= set(names)
    named = [Path(word) for part in listed for word in part.command if str(ROOT) in word]
    assert all(path.exists() or path == ROOT / "build" / "host" for path in named)  # the latter is made when it runs
    files = {Path(word).name for word in listed[0].command if word.endswith(".py")}
    assert files >= {path.name for path in (ROOT / "tests").glob("test_kernel_*.py")} | {"test_fused.py", "test_mlp.py"}
    assert "-x" not in listed[0].command and listed[0].environment["TRITON_INTERPRET"] == "0"


HIDDEN = """
import importlib.util, sys
hidden = {"hypothesis", "_hypothesis_pytestplugin", "matplotlib", "plotly", "optuna", "bitsandbytes", "xdist"}

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in hidden else found(name, package)
sys.meta_path.insert(0, Hide())
import pytest
raise SystemExit(pytest.main(sys.argv[1:]))
"""


def test_the_gpu_tests_need_only_what_they_say():
    """Without any other package they are all collected, and those of hypothesis skip."""
    names = "test_any_shape or test_help or test_a_group"
    command = [
        sys.executable,
        "-P",
        "-c",
        HIDDEN,
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        names,
        *map(str, gpu.gpu_tests()),
    ]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "hypothesis is not installed" in done.stdout


# -------------------------------------------------------------------------------------------------------------- charts


def test_charts_are_drawn_from_the_rows(tmp_path):
    pytest.importorskip("matplotlib")

    def row(provider, middle, **changes):
        values = {"ratio_to_frozen": middle, "ratio_low": middle - 0.01, "ratio_high": middle + 0.01}
        case = {"M": 8192, "K": 4096, "N": 4096, "R": 16, "dropout": 0.0, "dtype": "bf16", "gpu": "a GPU", "torch": "2"}
        return {"op": "qkv", "provider": provider, **case, **values, **changes}

    failed = row("peft", 1.0, ratio_to_frozen="", ratio_low="", ratio_high="", error="out of memory")
    rows = [row("frozen", 1.0), row("frozen again", 1.001), row("lora_fast op", 1.05, dropout=0.1), failed]
    with harness.RowWriter(tmp_path / "qkv.csv", harness.COLUMNS) as writer:
        for each in [*rows, row("lora_fast op", 1.2, R=64)]:
            writer.write(each)
    with harness.RowWriter(tmp_path / "mlp.csv", harness.COLUMNS) as writer:
        writer.write(failed)
    assert plot.main([str(tmp_path)]) == 0
    assert (tmp_path / "qkv.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "mlp.png").exists()
    assert plot.case_of(read(tmp_path / "qkv.csv")[2]) == "8192 × 4096 → 4096, r=16, p=0.1"


def test_readme_shows_what_a_gpu_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "train_step_512.csv").write_text("provider\npeft\n")
    assert readme.gpu().startswith("**Not yet measured on a GPU.**")
    folder = tmp_path / "a-gpu"
    base = {
        "commit": "abc",
        "gpu": "a GPU",
        "torch": "2",
        "triton": "3",
        "peft": "0",
        "dtype": "bf16",
        "dropout": "0.0",
    }
    case = {"M": 8192, "K": 4096, "N": 4096, "R": 16, "error": ""}

    def write(op, columns, *rows):
        with harness.RowWriter(folder / f"{op}.csv", columns) as writer:
            for row in rows:
                writer.write({name: value for name, value in (base | row).items() if name in columns})

    def timed(provider, middle, **more):
        figures = {"ms_p50": 0.7 * middle, "ratio_to_frozen": middle, "ratio_low": middle - 0.01}
        return case | {"provider": provider, **figures, "ratio_high": middle + 0.01, "gemm_over_cublas": "0.950"} | more

    late = case | {"provider": "peft", "ratio_to_frozen": "", "error": harness.NO_TIME}
    wrong = case | {"provider": "split", "ratio_to_frozen": "", "error": "wrong"}
    ours = timed("lora_fast op", 1.0876)
    write("lora_linear", harness.COLUMNS, timed("frozen", 1.0), timed("frozen again", 1.001), ours, late, wrong)
    from bench_memory import COLUMNS as MEMORY
    from bench_svd import COLUMNS as SVD
    from bench_train_step_gpu import COLUMNS as STEP

    others = {"ratio_to_full": 0.7, "ratio_to_full_low": 0.69, "ratio_to_full_high": 0.71, "ratio_to_peft": ""}
    step = {"layers": 4, "seq_len": 2048, "tokens_per_s": 9876, "peak_MiB": "5.0", **others}
    write("train_step", STEP, timed("lora_fast apply_lora", 1.04, **step))
    sizes = {"batch_size": 1, "seq_len": 64, "checkpointing": True, "predicted_MiB": "10.0"}
    errors = {"measured_MiB": "9.5", "error_percent": "5.26", "calibrated_error_percent": "0.00"}
    out_of_memory = {"model": "llama-1b", **sizes, "R": "", "fits": False}
    write("memory", MEMORY, {"model": "llama-1b", **sizes, "R": 8, "fits": True, **errors}, out_of_memory)
    spectra = {"model": "7b", "matrices": 224, "R": 16, "ratio_to_lora_fast": 1.0, "peak_MiB": 3, "max_error": "1e-12"}
    providers = ("lora_fast", "lora_fast from the file", "lora_fast kernels")
    write("svd", SVD, *({"provider": name, "ms_p50": 0.412, **spectra} for name in providers))
    shown = readme.gpu()
    assert shown.startswith("**Measured on one a GPU**, torch 2, triton 3, peft 0, bf16, commit abc.")
    for line in (
        "| 8192 × 4096 → 4096, r=16 | 0.700 | 1.001 [0.991, 1.011] | 1.088 [1.078, 1.098] |  | failed | 0.950 |",
        "| 4 layers, 2048 tokens, r=16 | lora_fast apply_lora | 0.7 | 9876 | 1.040 [1.030, 1.050] "
        "| 0.700 [0.690, 0.710] |  | 5.0 |",
        "| llama-1b, 1 × 64, checkpointing | r=8 | 10.0 | 9.5 | +5.3% | +0.0% |",
        "| llama-1b, 1 × 64, checkpointing | full | 10.0 | out of memory |  |  |",
        "Kernels alone, on the GPU's clock: 7B, r=16: 0.412 ms.",
    ):
        assert line in shown.splitlines(), line
    assert "| 7B, bf16 | 16 | 224 | 0.41 ms |" in shown


def test_without_rows_nothing_is_drawn(tmp_path, capsys):
    assert plot.main([str(tmp_path)]) == 2
    assert "no CSV file" in capsys.readouterr().err
