"""The largest batch and length that a memory holds, told by a few traced steps: against a trace of each size."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_estimate import CONFIGS, workload

from lora_fast.profiler import estimate_memory, fits
from lora_fast.profiler.estimate import RESERVE_GiB
from lora_fast.profiler.fits import Peaks, lagrange, largest
from lora_fast.profiler.models import resolve
from lora_fast.profiler.predict import trace

pytestmark = pytest.mark.filterwarnings("ignore::lora_fast.LoraFastWarning")
RANKS = (2, 6, 16, None)
FLAT = CONFIGS["dense"] | {"num_hidden_layers": 1}  # traced once, not at two depths


def peaks_of(config, folder, work, longest=None, **how):
    (folder / "config.json").write_text(json.dumps(config))
    source = resolve(str(folder / "config.json"))
    return Peaks(source, work, {rank: trace(source, work, rank, **how) for rank in RANKS}, longest, **how)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("grouped attention", {}),
        ("mixture of experts", {"attn_implementation": "eager", "gradient_checkpointing": True, "foreach": True}),
        ("two kinds of layers", {"device": "cuda", "dtype": "bf16", "lora_dropout": 0.1}),
    ],
)
def test_a_step_of_another_size_is_that_of_a_few_others(name, changes, tmp_path):
    """Of a rank between the ends, of an end and of everything; of fewer layers where all are alike."""
    depth = {"num_hidden_layers": 5 if name == "grouped attention" else 2}
    peaks = peaks_of(CONFIGS[name] | depth, tmp_path, workload(**changes))
    for rank, size in ((6, ("batch_size", 7)), (16, ("seq_len", 448)), (None, ("seq_len", 448))):
        rounding = 5e-3 if "device" in changes else 0  # on a GPU each storage is rounded up
        between = (2, 16) if rank == 6 else (rank,)
        assert peaks._between(rank) == between or rounding
        told = peaks._combined(between, rank, *size).extended()
        seen = peaks._trace(rank, *size).extended()
        for phase, held in seen.phases.items():
            assert told.phases[phase] == pytest.approx(held, rel=rounding, abs=rounding * seen.peak), (rank, phase)
        assert told.flops == seen.flops


def test_what_others_tell_is_not_believed_where_a_trace_says_otherwise(tmp_path, monkeypatch):
    """Beyond 300 tokens each token takes four times as much here, which no three lengths below tell."""

    def bent(source, work, rank, **how):
        long = work.seq_len if work.seq_len <= 300 else 4 * work.seq_len - 900
        return trace(source, workload(seq_len=long, batch_size=work.batch_size), rank, **how)

    monkeypatch.setattr(fits, "trace", bent)
    found = peaks_of(FLAT, tmp_path, workload()).fits(2, room := 8 * 2**20)["largest_seq_len"]
    source = resolve(str(tmp_path / "config.json"))
    assert found > 300 and bent(source, workload(seq_len=found), 2).extended().peak <= room
    assert bent(source, workload(seq_len=found + 64), 2).extended().peak > room


@pytest.mark.parametrize("bend", [0, 3])
def test_the_largest_rank_is_found(bend, tmp_path, monkeypatch):
    """Also where ranks above 16 take more than those below tell."""

    def bent(source, work, rank, **how):
        return trace(source, work, rank and rank + bend * max(0, rank - 16), **how)

    monkeypatch.setattr(fits, "trace", bent)
    peaks = peaks_of(FLAT if bend else CONFIGS["dense"], tmp_path, workload())
    room = bent(peaks.source, workload(), 40).extended().peak
    assert [peaks.largest_rank(room, 64), peaks.largest_rank(room - 1, 64)] == [40, 39]
    if not bend:
        assert [peaks.largest_rank(2 * room, 64), peaks.largest_rank(1, 64)] == [64, 0]


@pytest.mark.parametrize("seq_len", [2, 150])
def test_no_length_is_beyond_the_models_positions(seq_len, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FLAT | {"max_position_embeddings": 200}))
    found = estimate_memory(
        str(tmp_path), "4", batch_size=1, seq_len=seq_len, dtype="fp32", device="cpu", memory_GiB=RESERVE_GiB + 1
    )
    assert {arm.fits["largest_seq_len"] for arm in found.arms} == {192}


@given(
    st.integers(0, 10**6), st.integers(1, 10**4), st.integers(0, 50), st.integers(0, 10**8), st.sampled_from([1, 64]),
    st.integers(1, 10**4), st.integers(1, 10**5),
)  # fmt: skip
def test_the_largest_is_found(fixed, linear, square, room, unit, start, most):
    looks = []

    def peak(size):
        looks.append(size)
        return max(fixed + linear * size + square * size**2, 5 * fixed)

    found = largest(peak, room, unit, start, most)
    assert found % unit == 0 and 0 <= found <= most
    assert found == 0 or peak(found) <= room
    assert peak(found + unit) > room or found + unit > most
    assert all(size % unit == 0 and size > 0 for size in looks) and len(looks) < 60


def test_weights_of_a_polynomial():
    assert lagrange((1, 2), 5) == [-3, 4] and lagrange((4,), 4) == [1]
    values = [3 + 2 * n - n**2 for n in (1, 2, 3)]
    assert sum(w * v for w, v in zip(lagrange((1, 2, 3), 7), values)) == pytest.approx(3 + 14 - 49)
