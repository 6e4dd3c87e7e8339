"""tuning.run without a GPU: what is timed, what is kept and for how long, and what runs where nothing can be timed.

Device "cuda" is only a name here, and the clock is the test's."""

import json

import pytest
import torch
from triton.runtime.errors import OutOfResources

from lora_fast import LoraFastWarning, tuning

GPU = torch.device("cuda", 0)
SIZES = {"M": 100, "N": 64, "dtype": torch.bfloat16}
KEY = "linear_lora M=128 N=64 dtype=torch.bfloat16"


@pytest.fixture
def ms(monkeypatch, tmp_path):
    """What the clock says of each candidate, an exception to raise instead; a process that has chosen nothing yet."""
    times = {"cublas": 3.0, "triton a": 2.0, "triton b": 1.0}

    def do_bench(call, **options):
        result = times[call()]
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    # What a candidate gives here is its name, which can't be subtracted from another.
    monkeypatch.setattr(tuning, "_difference", lambda call, reference: 0.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU of a test")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    new_process(monkeypatch)
    yield times
    tuning._known.cache_clear()


def new_process(monkeypatch) -> None:
    monkeypatch.setattr(tuning, "_choices", {})
    monkeypatch.setattr(tuning, "_recent", {})
    tuning._known.cache_clear()


def rows_kept(versions=None) -> dict:
    return json.loads(tuning.cache_file().read_text())["gpus"]["GPU of a test"][versions or tuning.versions()]


def candidates(ran=None, names=("cublas", "triton a", "triton b")):
    """Each gives its name, which it also appends to `ran`."""

    def call(name):
        if ran is not None:
            ran.append(name)
        return name

    return {name: lambda name=name: call(name) for name in names}


def test_the_fastest_is_timed_once_and_kept_for_all_processes(ms, monkeypatch):
    ran = []
    assert tuning.run("linear_lora", SIZES, GPU, candidates(ran)) == "triton b"
    assert ran == ["cublas", "triton a", "triton b", "triton b"]  # three timed, one run
    for sizes in (SIZES, SIZES | {"M": 65}, SIZES | {"M": 128}):  # all up to the same power of two
        assert tuning.run("linear_lora", sizes, GPU, candidates(ran)) == "triton b"
    assert len(ran) == 7 and tuning.choices() == {KEY: "triton b"}
    row = rows_kept()[KEY]
    assert row == {"choice": "triton b", "ms": {"cublas": 3.0, "triton a": 2.0, "triton b": 1.0}}
    new_process(monkeypatch)
    ms["triton b"] = 9.0
    ran.clear()
    assert tuning.run("linear_lora", SIZES, GPU, candidates(ran)) == "triton b" and ran == ["triton b"]
    assert tuning.run("linear_lora", SIZES | {"M": 129}, GPU, candidates()) == "triton a"  # another bucket: timed
    assert len(rows_kept()) == 2


def test_other_versions_time_again_and_leave_each_other_their_rows(ms, monkeypatch):
    tuning.run("linear_lora", SIZES, GPU, candidates())
    running = tuning.versions()
    new_process(monkeypatch)
    monkeypatch.setattr(tuning, "versions", lambda: "torch 9, triton 9")
    ms["triton a"] = 0.5
    assert tuning.run("linear_lora", SIZES, GPU, candidates()) == "triton a"
    assert rows_kept()[KEY]["choice"] == "triton a" and rows_kept(running)[KEY]["choice"] == "triton b"
    new_process(monkeypatch)
    monkeypatch.setattr(tuning, "versions", lambda: running)
    ran = []
    assert tuning.run("linear_lora", SIZES, GPU, candidates(ran)) == "triton b" and ran == ["triton b"]


def test_fp32_by_tf32_is_another_choice(ms):
    sizes = SIZES | {"dtype": torch.float32}
    assert tuning.run("linear_lora", sizes, GPU, candidates()) == "triton b"
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        ms["cublas"] = 0.1
        assert tuning.run("linear_lora", sizes, GPU, candidates()) == "cublas"
        assert tuning.run("linear_lora", SIZES, GPU, candidates()) == "cublas"  # bf16, timed now
        assert len(tuning.choices()) == 3
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert tuning.run("linear_lora", sizes, GPU, candidates()) == "triton b"


def test_a_choice_that_is_no_candidate_any_more_is_made_again(ms, monkeypatch):
    tuning.run("linear_lora", SIZES, GPU, candidates())
    new_process(monkeypatch)
    assert tuning.run("linear_lora", SIZES, GPU, candidates(names=("cublas", "triton a"))) == "triton a"


def test_a_home_that_cannot_be_written_costs_nothing_but_the_memory(ms, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert tuning.run("linear_lora", SIZES, GPU, candidates()) == "triton b"
    assert tuning.choices() == {KEY: "triton b"}


def test_a_tile_that_does_not_fit_is_left_out(ms):
    ms["triton b"] = OutOfResources(300_000, 232_448, "shared memory")
    assert tuning.run("linear_lora", SIZES, GPU, candidates()) == "triton a"


def test_a_kernel_that_computes_something_else_is_left_out_and_told_of(ms, monkeypatch):
    off = {"triton a": 0.004, "triton b": 0.5}
    monkeypatch.setattr(tuning, "_difference", lambda call, reference: off[call.args[0]] if reference() else None)
    with pytest.warns(LoraFastWarning, match="triton b differs from cublas by 50% and is left out"):
        assert tuning.run("linear_lora", SIZES, GPU, candidates()) == "triton a"
    assert rows_kept()[KEY]["ms"] == {"cublas": 3.0, "triton a": 2.0}
    # Where every candidate is a kernel of ours there is nothing to hold them against.
    assert tuning.run("other", SIZES, GPU, candidates(names=("triton a", "triton b"))) == "triton b"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_far_two_results_lie_apart(dtype):
    """Over more rows than are looked at at once; a single wrong tile of many shows."""
    expected = torch.randn(2500, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    rounded = (expected.double() * (1 + 2**-8)).to(dtype)
    wrong = expected.clone()
    wrong[2400:, :32] = 0

    def difference(result, expected=expected):
        return tuning._difference(lambda: result, lambda: expected)

    assert difference(expected) == 0.0
    assert 0 < difference(rounded) < tuning.WRONG / 3
    exact = float((wrong.double() - expected.double()).norm() / expected.double().norm())
    assert difference(wrong) == pytest.approx(exact, rel=1e-4) and exact > 4 * tuning.WRONG
    wrong[0, 0] = float("nan")
    assert difference(wrong) == float("inf")
    assert difference(expected, wrong) == 0.0  # of what is not finite nothing can be said
    zeros = torch.zeros(32, 32)
    assert difference(zeros, zeros) == 0.0 and difference(zeros + 1, zeros) == float("inf")
    assert difference(zeros[1:] + 1, zeros[1:]) == 0.0  # too few


def test_memory_too_short_to_compare_is_no_difference():
    def fails():
        raise torch.OutOfMemoryError("of a test")

    assert tuning._difference(fails, fails) == 0.0


def test_while_a_graph_is_captured_the_first_runs_and_nothing_is_kept(ms, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    ran = []
    assert tuning.run("linear_lora", SIZES, GPU, candidates(ran)) == "cublas" and ran == ["cublas"]
    assert not tuning.choices() and not tuning.cache_file().exists()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tuning.run("linear_lora", SIZES, GPU, candidates()) == "triton b"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.run("linear_lora", SIZES, GPU, candidates()) == "triton b"  # what was tuned before is captured


def test_where_memory_is_short_the_first_runs_and_is_not_timed_again_in_this_process(ms, monkeypatch):
    """A training step near the limit would else fail to time, and empty torch's cache, in every layer of every step."""
    ms["triton a"] = torch.OutOfMemoryError("of a test")
    ran = []
    assert tuning.run("linear_lora", SIZES, GPU, candidates(ran)) == "cublas"
    assert ran == ["cublas", "triton a", "cublas"]
    assert tuning.run("linear_lora", SIZES, GPU, candidates(ran)) == "cublas" and len(ran) == 4
    assert not tuning.cache_file().exists()
    new_process(monkeypatch)
    ms["triton a"] = 0.5
    assert tuning.run("linear_lora", SIZES, GPU, candidates()) == "triton a"


def test_only_holds_inside_its_block(ms):
    with tuning.only("triton"):
        assert tuning.run("linear_lora", SIZES, GPU, candidates()) == "triton a"
        with tuning.only("cublas"):
            assert tuning.run("linear_lora", SIZES, GPU, candidates()) == "cublas"
        assert tuning.run("linear_lora", SIZES, GPU, candidates(names=("cublas",))) == "cublas"  # no such candidate
    assert not tuning.choices()
    assert tuning.run("linear_lora", SIZES, GPU, candidates()) == "triton b"


def test_off_a_gpu_the_first_runs(ms):
    assert tuning.run("linear_lora", SIZES, torch.device("cpu"), candidates()) == "cublas" and not tuning.choices()


def test_what_follows_from_a_choice_is_kept_for_like_calls(ms, monkeypatch):
    place = ("linear_lora", GPU, 100)
    assert tuning.recall(place) is None
    assert tuning.keep(place, "a tile") == tuning.recall(place) == "a tile" and tuning.recall((*place, 1)) is None
    with tuning.only("cublas"):  # another choice, with places of its own
        assert tuning.recall(place) is None
        tuning.keep(place, "cublas")
    assert tuning.recall(place) == "a tile"
    monkeypatch.setattr(tuning, "MOST_RECENT", 2)
    tuning.keep(("grad_x",), "another")  # too many: all are forgotten but the last
    assert tuning.recall(place) is None and tuning.recall(("grad_x",)) == "another"


def test_what_was_chosen_in_a_capture_is_not_kept(ms, monkeypatch):
    """There the first candidate runs, whatever is fastest."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.keep(("linear_lora",), "cublas") == "cublas" and tuning.recall(("linear_lora",)) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tuning.keep(("linear_lora",), "cublas") == tuning.recall(("linear_lora",)) == "cublas"
