"""Spectra of dense updates against torch's SVD in float64: from every layout on disk, within memory, over processes."""

import json
import math
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_fast import delta
from lora_fast.checkpoint_files import FILE_NAME, INDEX_NAME
from lora_fast.checkpoint_pair import CheckpointPair
from lora_fast.config import LoraFastError
from lora_fast.delta import delta_spectra, dense_svd, host_bytes

EPS = torch.finfo(torch.float64).eps


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def low_rank(N: int, K: int, rank: int, norm: float, seed: int = 5) -> Tensor:
    """(N, K) float64 with this Frobenius norm."""
    product = random(N, rank, seed=seed) @ random(rank, K, seed=seed + 1)
    return product * (norm / product.norm())


def pair_of(folder: Path, base: dict[str, Tensor], tuned: dict[str, Tensor]) -> tuple[Path, Path]:
    """Two single files."""
    files = folder / "base.safetensors", folder / "tuned.safetensors"
    for file, tensors in zip(files, (base, tuned)):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return files


def sharded(folder: Path, tensors: dict[str, Tensor], shards: int = 3) -> Path:
    folder.mkdir()
    names = sorted(tensors)
    places = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for shard in set(places.values()):
        save_file({name: tensors[name].contiguous() for name in names if places[name] == shard}, folder / shard)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


SHAPES = {
    "layers.2.tall.weight": (61, 37),
    "layers.10.wide.weight": (33, 70),
    "embed.weight": (91, 12),
    "row.weight": (1, 9),
    "experts.up_proj": (3, 20, 33),
    "conv1.weight": (7, 5, 3),
    "patch.weight": (11, 3, 5, 5),
    "thin.weight": (150, 1, 2, 2),
    "norm.weight": (37,),
    "class_token": (1, 1, 12),
    "empty.weight": (0, 4),
}
MATRICES = {
    "conv1": (7, 15),
    "embed": (91, 12),
    "experts.up_proj[0]": (20, 33),
    "experts.up_proj[1]": (20, 33),
    "experts.up_proj[2]": (20, 33),
    "layers.2.tall": (61, 37),
    "layers.10.wide": (33, 70),
    "patch": (11, 75),
    "row": (1, 9),
    "thin": (150, 4),
}


def model(base_dtype: torch.dtype, tuned_dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    base = {name: random(*shape, seed=i).to(base_dtype) for i, (name, shape) in enumerate(SHAPES.items())}
    tuned = {
        name: (value.double() + 0.05 * random(*value.shape, seed=50 + i)).to(tuned_dtype)
        for i, (name, value) in enumerate(base.items())
    }
    tokens = torch.arange(12).reshape(3, 4)
    return base | {"positions": tokens}, tuned | {"positions": tokens + 1}


def stored_matrix(name: str, tensors: dict[str, Tensor]) -> Tensor:
    """(N, K) float64."""
    key, _, expert = name.partition("[")
    tensor = tensors[key if key in tensors else key + ".weight"].double()
    return (tensor[int(expert[:-1])] if expert else tensor).flatten(1)


def ulps(stored: Tensor) -> Tensor:
    """Distance to the next larger number of the dtype, float64, by its own means."""
    above = torch.nextafter(stored.abs(), torch.full_like(stored, math.inf))
    return above.double() - stored.abs().double()


DTYPES = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float64),
]


@pytest.mark.parametrize(("base_dtype", "tuned_dtype"), DTYPES)
@pytest.mark.parametrize("layout", ["file", "folder", "sharded"])
def test_all_singular_values_are_those_of_the_svd(tmp_path, base_dtype, tuned_dtype, layout):
    base, tuned = model(base_dtype, tuned_dtype)
    if layout == "sharded":
        files = sharded(tmp_path / "base", base), sharded(tmp_path / "tuned", tuned, shards=2)
    else:
        files = pair_of(tmp_path, base, tuned)
    if layout == "folder":
        for side in ("base", "tuned"):
            (tmp_path / side).mkdir()
            (tmp_path / f"{side}.safetensors").rename(tmp_path / side / FILE_NAME)
        files = tmp_path / "base", tmp_path / "tuned"
    told = []
    spectra = delta_spectra(*files, progress=lambda *call: told.append(call))
    assert {name: spectrum.shape for name, spectrum in spectra.items()} == MATRICES
    assert list(spectra) == list(MATRICES)
    assert [call[:2] for call in told] == [(i + 1, len(MATRICES)) for i in range(len(MATRICES))]
    assert {call[2] for call in told} == set(MATRICES)
    for name, spectrum in spectra.items():
        update = stored_matrix(name, tuned) - stored_matrix(name, base)
        S = torch.linalg.svdvals(update)
        assert (spectrum.singular_values - S).abs().max() <= 1e-12 * S[0]
        assert spectrum.frobenius_norm == pytest.approx(float(update.norm()), rel=1e-13)
        weight = stored_matrix(name, base)
        assert spectrum.weight_norm == pytest.approx(float(weight.norm()), rel=1e-13)
        assert (spectrum.method, spectrum.status, spectrum.storage_dtype) == ("exact", "ok", tuned_dtype)
        assert 0 < spectrum.certificate < 1e-9


def test_pair_reads_the_same_in_panels_of_any_size(tmp_path):
    base, tuned = model(torch.bfloat16, torch.float32)
    pair = CheckpointPair(*pair_of(tmp_path, base, tuned))
    for name in pair.names:
        update = stored_matrix(name, tuned) - stored_matrix(name, base)
        assert torch.equal(pair.delta(name), update)
        panels = list(pair.panels(name, elements=100))
        long = update if update.shape[0] >= update.shape[1] else update.T
        assert torch.equal(torch.cat([one - other for other, one in panels]), long)
        assert len(panels) > 1 or update.numel() <= 100
    assert pair.stored_bytes("embed") == 91 * 12 * (2 + 4)


def test_pair_tells_what_is_no_matrix_and_leaves_out_what_it_is_told_to(tmp_path):
    base, tuned = model(torch.float32, torch.float32)
    base["fixed.bias"] = tuned["fixed.bias"] = random(5)
    files = pair_of(tmp_path, base, tuned)
    pair = CheckpointPair(*files)
    assert pair.skipped == {
        "norm.weight": (37,),
        "class_token": (1, 1, 12),
        "empty.weight": (0, 4),
        "positions": (3, 4),
        "fixed.bias": (5,),
    }
    assert {name for name in pair.skipped if not pair.differs(name)} == {"empty.weight", "fixed.bias"}
    left = delta_spectra(*files, exclude=["tall", "experts.up_proj", "embed"])
    assert list(left) == ["conv1", "layers.10.wide", "patch", "row", "thin"]
    with pytest.raises(LoraFastError, match="exclude names 'tal'"):
        CheckpointPair(*files, exclude=["tal"])
    with pytest.raises(LoraFastError, match="exclude='tall'; expected a list"):
        CheckpointPair(*files, exclude="tall")


def test_matrix_of_many_panels_and_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(delta, "_BLOCK", 48)
    N, K = 130, 20001  # three panels
    base, update = random(N, K).float(), random(N, K, seed=1).float()
    for weight, change in ((base, update), (base.T, update.T)):
        files = pair_of(tmp_path, {"w.weight": weight}, {"w.weight": weight + change})
        exact = torch.linalg.svdvals((weight + change).double() - weight.double())
        assert len(list(CheckpointPair(*files).panels("w"))) == 3
        found = delta_spectra(*files)["w"].singular_values
        assert (found - exact).abs().max() <= 1e-12 * exact[0]


@pytest.mark.parametrize("method", ["exact", "topk"])
def test_same_weights_give_zeros(tmp_path, method):
    base = {"w.weight": random(600, 500).bfloat16(), "v.weight": random(3, 2)}
    for spectrum in delta_spectra(*pair_of(tmp_path, base, base), method=method, k=5).values():
        assert spectrum.singular_values.count_nonzero() == 0
        assert (spectrum.frobenius_norm, spectrum.noise_std, spectrum.certificate) == (0, 0, 0)
        assert (spectrum.corrected_rank, spectrum.energy_rank(0.9)) == (0, 0)


def test_certificate_bounds_the_error_of_a_graded_spectrum(tmp_path):
    """σ from 1 to 1e-9: errors grow as 1/σ², within the certificate above 1e-6 σ₁, and stay below 1.5e-8 σ₁ beyond."""
    n = 90
    S = torch.logspace(0, -9, n, dtype=torch.float64)
    update = torch.linalg.qr(random(200, n))[0] * S @ torch.linalg.qr(random(n, n, seed=1))[0]
    files = pair_of(tmp_path, {"w": torch.zeros(200, n, dtype=torch.float64)}, {"w": update})
    spectrum = delta_spectra(*files)["w"]
    exact = torch.linalg.svdvals(update)
    error = (spectrum.singular_values - exact).abs()
    seen = spectrum.singular_values > 1e-6 * exact[0]
    assert (error / exact)[seen].max() <= spectrum.certificate <= 0.02
    assert error.max() <= 1.5e-8 * exact[0]
    assert (error / exact)[seen].max() > 1e-8  # or the certificate would have nothing to say


def noisy(N: int, K: int) -> tuple[Tensor, Tensor]:
    """A base, and it with an update whose spectrum falls slowly."""
    n = min(N, K)
    S = torch.linspace(1, 0.05, n, dtype=torch.float64) ** 3
    update = torch.linalg.qr(random(N, n, seed=3))[0] * S @ torch.linalg.qr(random(K, n, seed=4))[0].T
    base = random(N, K).float()
    return base, (base.double() + update).float()


@pytest.mark.parametrize(("N", "K"), [(700, 401), (401, 700)])
def test_topk_gives_lower_bounds_and_says_how_far_off_they_can_be(tmp_path, N, K):
    base, tuned = noisy(N, K)
    files = pair_of(tmp_path, {"w": base}, {"w": tuned})
    spectrum = delta_spectra(*files, method="topk", k=20)["w"]
    exact = torch.linalg.svdvals(tuned.double() - base.double())
    found = spectrum.singular_values
    assert (spectrum.method, found.shape) == ("topk", (20,))
    assert spectrum.frobenius_norm == pytest.approx(float(exact.norm()), rel=1e-13)
    assert (found <= exact[:20] * (1 + 1e-13)).all()
    missed = exact.square().sum() - found.square().sum()
    assert (exact[:20].square() <= found.square() + missed).all()
    assert ((exact[:20] - found) / found).max() <= spectrum.certificate
    assert found.square().sum() >= 0.985 * exact[:20].square().sum()
    for q in (0.05, 0.2):
        true = int((exact.square().cumsum(0) < q * exact.square().sum()).sum()) + 1
        assert true <= spectrum.energy_rank(q) <= true + 1
    assert spectrum.energy_rank(0.99) is None

    again = delta_spectra(*files, method="topk", k=20)["w"]
    other = delta_spectra(*files, method="topk", k=20, seed=1)["w"]
    assert torch.equal(again.singular_values, found)
    assert not torch.equal(other.singular_values, found)
    assert delta_spectra(*files, method="topk", k=70)["w"].method == "exact"


def test_the_certificate_of_topk_covers_small_values_below_a_large_one(tmp_path):
    """Their relative error is far above the residual over σ₁."""
    generator = torch.Generator().manual_seed(3)
    values = torch.cat([torch.ones(1), torch.linspace(1.1e-3, 1e-3, 199)]).double()
    U, V = (torch.linalg.qr(torch.randn(n, 200, generator=generator, dtype=torch.float64))[0] for n in (300, 200))
    files = [tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"]
    for file, weight in zip(files, (torch.zeros(300, 200, dtype=torch.float64), U * values @ V.mT)):
        save_file({"a.weight": weight}, file)
    (found,) = delta_spectra(*files, method="topk", k=5).values()
    error = ((values[:5] - found.singular_values) / found.singular_values).max()
    assert 1e-3 < error <= found.certificate


def test_topk_of_a_low_rank_update_is_exact(tmp_path):
    base = random(500, 380)
    files = pair_of(tmp_path, {"w": base}, {"w": base + low_rank(500, 380, 6, 2.0)})
    spectrum = delta_spectra(*files, method="topk", k=10)["w"]
    exact = torch.linalg.svdvals(CheckpointPair(*files).delta("w"))[:10]
    assert (spectrum.singular_values - exact)[:6].abs().max() <= 1e-12 * exact[0]
    assert spectrum.singular_values[6:].max() <= 1.5e-8 * exact[0]
    assert spectrum.certificate <= 1e-9
    assert spectrum.energy_rank(0.99) <= 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_noise_of_alike_elements_is_an_ulp_by_the_square_root_of_12(tmp_path, dtype):
    """In one binade the ulp is the same everywhere."""
    base = (1.1 + 0.8 * torch.rand(300, 200, generator=torch.Generator().manual_seed(0))).to(dtype)
    tuned = (base.double() + 0.01 * random(300, 200, seed=1)).clamp(1, 1.99).to(dtype)
    spectrum = delta_spectra(*pair_of(tmp_path, {"w": base}, {"w": tuned}))["w"]
    assert spectrum.noise_std == pytest.approx(torch.finfo(dtype).eps / math.sqrt(12), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ulps_are_those_of_nextafter(dtype):
    stored = torch.cat(
        [random(500).mul(10.0 ** torch.linspace(-8, 4, 500)).to(dtype), torch.tensor([0.0, 1.0, -2.0]).to(dtype)]
    )
    if dtype == torch.float16:
        stored[0] = 6e-8  # its smallest subnormal number
    assert torch.equal(delta._squared_ulps(stored.double(), dtype), ulps(stored).square())


@pytest.mark.parametrize(("amplitude", "raw_r90", "raw_r99"), [(3e-3, 177, 609), (1e-2, 8, 260), (5e-2, 8, 8)])
def test_rank_8_update_saved_in_bf16_has_rank_8_again(tmp_path, amplitude, raw_r90, raw_r99):
    """‖ΔW‖/‖W‖ = amplitude. Rounding alone makes the raw ranks what they are: they only have to be far off."""
    n = 1024
    base = (0.02 * random(n, n)).bfloat16()
    tuned = (base.double() + low_rank(n, n, 8, amplitude * float(base.double().norm()))).bfloat16()
    files = pair_of(tmp_path, {"w": base}, {"w": tuned})
    spectrum = delta_spectra(*files)["w"]
    assert spectrum.energy_rank(0.9) == pytest.approx(raw_r90, rel=0.1)
    assert spectrum.energy_rank(0.99) == pytest.approx(raw_r99, rel=0.1)
    assert spectrum.corrected_rank == 8
    assert spectrum.corrected.energy_rank(0.99) <= 8
    rms = float((ulps(tuned).square() / 12).mean().sqrt())
    assert rms <= spectrum.noise_std <= 1.12 * rms
    assert delta_spectra(*files, method="topk", k=16)["w"].corrected_rank == 8


@pytest.mark.parametrize("begins_rounded", [False, True])
def test_a_base_with_more_digits_may_have_been_rounded_too(tmp_path, begins_rounded):
    n = 500
    base = (0.02 * random(n, n)).float()
    start = base.bfloat16() if begins_rounded else base
    tuned = (start.double() + low_rank(n, n, 8, 0.05 * float(base.double().norm()))).bfloat16()
    spectrum = delta_spectra(*pair_of(tmp_path, {"w": base}, {"w": tuned}))["w"]
    assert spectrum.corrected_rank == 8
    once = delta_spectra(*pair_of(tmp_path, {"w": base.bfloat16()}, {"w": tuned}))["w"].noise_std
    assert spectrum.noise_std == pytest.approx(math.sqrt(2) * once, rel=1e-6)
    if begins_rounded:  # by the noise of one rounding, its own would count as rank
        assert int((spectrum.singular_values > spectrum.noise_threshold / math.sqrt(2)).sum()) > 8


def test_rows_of_large_weights_do_not_pass_their_rounding_off_as_rank(tmp_path):
    n = 300
    base = (0.02 * random(n, n) * torch.logspace(-1, 1, n, dtype=torch.float64)[:, None]).bfloat16()
    tuned = (base.double() + low_rank(n, n, 5, 0.05 * float(base.double().norm()))).bfloat16()
    spectrum = delta_spectra(*pair_of(tmp_path, {"w": base}, {"w": tuned}))["w"]
    rms = float((ulps(tuned).square() / 12).mean().sqrt())
    threshold = spectrum.noise_threshold / spectrum.noise_std * rms
    assert int((spectrum.singular_values > threshold).sum()) > 5  # by the mean of the noise
    assert spectrum.corrected_rank == 5


def test_rows_that_were_not_trained_carry_no_noise(tmp_path):
    """An embedding of 4000 tokens of which 40 came up."""
    base = (0.02 * random(4000, 64)).bfloat16()
    change = torch.zeros(4000, 64, dtype=torch.float64)
    change[::100] = low_rank(40, 64, 3, 0.003)
    tuned = (base.double() + change).bfloat16()
    spectrum = delta_spectra(*pair_of(tmp_path, {"w": base}, {"w": tuned}))["w"]
    assert spectrum.corrected_rank == 3
    rms = float((ulps(tuned).square() / 12).mean().sqrt())
    threshold = spectrum.noise_threshold / spectrum.noise_std * rms
    assert threshold > spectrum.singular_values[0]  # with the noise of all rows, it would all be noise


@pytest.mark.parametrize(("N", "K"), [(83, 140), (140, 83), (60, 60)])
@pytest.mark.parametrize("method", ["exact", "topk"])
def test_dense_svd_is_the_best_approximation(tmp_path, monkeypatch, N, K, method):
    monkeypatch.setattr(delta, "_OVERSAMPLING", 2)  # so that the basis stays small beside these
    base = random(N, K).float()
    tuned = (base.double() + low_rank(N, K, 3, 1.0) + 1e-4 * random(N, K, seed=9)).float()
    pair = CheckpointPair(*pair_of(tmp_path, {"w.weight": base}, {"w.weight": tuned}))
    update = tuned.double() - base.double()
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    found = dense_svd(pair, "w", 3, method=method)
    assert (found.U.shape, found.S.shape, found.V.shape) == ((N, 3), (3,), (K, 3))
    assert found.spectrum.method == method
    assert (found.S - S[:3]).abs().max() <= 1e-12
    assert (found.U * found.S @ found.V.T - U[:, :3] * S[:3] @ Vh[:3]).norm() <= 1e-9
    for vectors in (found.U, found.V):
        assert (vectors.T @ vectors - torch.eye(3, dtype=torch.float64)).norm() <= 1e-13
    missed = found.spectrum.frobenius_norm**2 - float(found.S.square().sum())
    assert math.sqrt(missed) == pytest.approx(float((update - found.U * found.S @ found.V.T).norm()), rel=1e-6)


def test_dense_svd_takes_the_rank_from_the_spectrum(tmp_path):
    base = random(40, 70).float()
    files = pair_of(tmp_path, {"w": base}, {"w": (base.double() + low_rank(40, 70, 7, 1.0)).float()})
    pair = CheckpointPair(*files)
    found = dense_svd(pair, "w", lambda spectrum: spectrum.energy_rank(0.999999))
    assert found.S.shape == (7,)
    alone = delta_spectra(*files)["w"].singular_values
    assert (found.spectrum.singular_values.square() - alone.square()).abs().max() <= 1e-15 * alone[0] ** 2
    assert dense_svd(pair, "w", 10**6).S.shape == (40,)
    assert dense_svd(pair, "w", 0).U.shape == (40, 0)
    with pytest.raises(LoraFastError, match="k is a function"):
        dense_svd(pair, "w", lambda spectrum: 3, method="topk")


def test_dense_svd_of_no_update(tmp_path):
    same = {"w": random(30, 20)}
    found = dense_svd(CheckpointPair(*pair_of(tmp_path, same, same)), "w", 4)
    assert found.S.count_nonzero() == 0
    assert (found.U.T @ found.U - torch.eye(4, dtype=torch.float64)).norm() <= 1e-14


# Bad input ------------------------------------------------------------------------------------------------------------
def test_all_names_and_shapes_that_differ_are_listed(tmp_path):
    base = {f"layers.{i}.up.weight": random(4, 3) for i in range(12)} | {
        "a.weight": random(5, 4),
        "head.weight": random(6, 4),
    }
    tuned = {f"layers.{i}.up.weight": random(4, 3) for i in range(3)} | {
        "a.weight": random(5, 7),
        "new.weight": random(2, 2),
    }
    files = pair_of(tmp_path, base, tuned)
    with pytest.raises(LoraFastError) as error:
        delta_spectra(*files)
    text = str(error.value)
    assert "10 only in base (head.weight, layers.*.up.weight (9))" in text
    assert "1 only in tuned (new.weight)" in text
    assert "1 of another shape, 5×4 against 5×7 (a.weight)" in text
    assert all(str(file) in text for file in files)
    differing = ["a", "head", "new", *(f"layers.{i}.up" for i in range(3, 12))]
    assert list(delta_spectra(*files, exclude=differing)) == [f"layers.{i}.up" for i in range(3)]


def test_missing_shards_are_named(tmp_path):
    whole = sharded(tmp_path / "base", model(torch.float32, torch.float32)[0])
    (whole / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(LoraFastError, match=r"lacks model-00002-of-00003.safetensors, .* \(1 of 3 shards\)"):
        CheckpointPair(whole, whole)


def test_tensors_that_the_shards_lack_are_named(tmp_path):
    whole = sharded(tmp_path / "base", {"a.weight": random(2, 2), "b.weight": random(2, 2)}, shards=2)
    save_file({"c.weight": random(2, 2)}, whole / "model-00001-of-00002.safetensors")
    with pytest.raises(LoraFastError, match=r"lists a\.weight, which its shards don't hold"):
        CheckpointPair(whole, whole)


@pytest.mark.parametrize("damage", ["cut", "text", "index"])
def test_damaged_files_are_named(tmp_path, damage):
    good, bad = pair_of(tmp_path, {"w": random(9, 9)}, {"w": random(9, 9)})
    if damage == "index":
        bad = tmp_path / "folder"
        bad.mkdir()
        (bad / INDEX_NAME).write_text('{"weight_map": 3}')
        named = INDEX_NAME
    else:
        bad.write_bytes(bad.read_bytes()[:-100] if damage == "cut" else b"not a checkpoint")
        named = bad.name
    with pytest.raises(LoraFastError, match=re.escape(named) + r".* (damaged|is not an index)"):
        delta_spectra(good, bad)


def test_no_checkpoint_there(tmp_path):
    good, _ = pair_of(tmp_path, {"w": random(9, 9)}, {"w": random(9, 9)})
    for name, holds, advice in (
        ("absent", None, "hf download"),
        ("empty", "config.json", "holds neither"),
        ("pickles", "pytorch_model.bin", "save_pretrained"),
        ("adapter", "adapter_config.json", "adapter_spectra"),
        ("variant", "model.fp16.safetensors", r"holds model\.fp16\.safetensors: name the file"),
    ):
        if holds:
            (tmp_path / name).mkdir()
            (tmp_path / name / holds).write_bytes(b"")
        with pytest.raises(LoraFastError, match=f"tuned=.*{name}.*{advice}"):
            delta_spectra(good, tmp_path / name)
    pickle = tmp_path / "pytorch_model.bin"
    torch.save({}, pickle)
    with pytest.raises(LoraFastError, match=r"base=.*expected a \.safetensors file.*save_pretrained"):
        delta_spectra(pickle, good)


@pytest.mark.parametrize("method", ["exact", "topk"])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_and_inf_are_named_with_their_file(tmp_path, method, side):
    tensors = [{"a.weight": random(400, 300), "e.experts": random(3, 4, 5)} for _ in range(2)]
    tensors[side]["a.weight"][7, 5] = math.inf
    files = pair_of(tmp_path, *tensors)
    with pytest.raises(LoraFastError, match=rf"{files[side].name}: a\.weight holds NaN or inf"):
        delta_spectra(*files, method=method, k=2)
    both = [tensors[side], tensors[side]]  # inf − inf
    with pytest.raises(LoraFastError, match=r"a\.weight holds NaN or inf"):
        delta_spectra(*pair_of(tmp_path, *both), method=method, k=2)


def test_quantized_weights_are_refused(tmp_path):
    small = random(4, 4).to(torch.float8_e4m3fn)
    with pytest.raises(LoraFastError, match=r"F8_E4M3 in .*dequantize"):
        delta_spectra(*pair_of(tmp_path, {"w": small}, {"w": small}))
    packed = {"w": torch.ones(4, 4, dtype=torch.int32), "scale": random(4)}
    with pytest.raises(LoraFastError, match="no floating-point weight of two dimensions"):
        delta_spectra(*pair_of(tmp_path, packed, packed))


@pytest.mark.parametrize("arguments", [{"method": "fast"}, {"k": 0}, {"k": 2.5}])
def test_bad_arguments(tmp_path, arguments):
    files = pair_of(tmp_path, {"w": random(3, 3)}, {"w": random(3, 3)})
    (name,) = arguments
    with pytest.raises(LoraFastError, match=f"{name}="):
        delta_spectra(*files, **arguments)


# Memory, threads, processes -------------------------------------------------------------------------------------------
MEMORY = r"""
import re, sys
from pathlib import Path
import torch
from lora_fast.delta import delta_spectra, host_bytes
from lora_fast.checkpoint_pair import CheckpointPair

def status(key):
    return 1024 * int(re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
small, base, tuned, method = sys.argv[1:]
delta_spectra(small, small, method=method, k=8)  # loads what is loaded on first use
before = status("VmRSS")
delta_spectra(base, tuned, method=method, k=8)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("method", ["exact", "topk"])
def test_memory_is_bounded_by_panels_and_the_short_side(tmp_path, method):
    """Resident memory, mapped pages of the files included, in a process of its own with one thread, for two matrices
    one after the other. As stored each is 126 MB with its base, in fp64 504 MB."""
    N, K = 700, 45000
    base = random(N, K).bfloat16()
    files = pair_of(tmp_path, {"w": base, "v": base + 1}, {"w": base + 0.01, "v": base})
    small = tmp_path / "small.safetensors"
    save_file({"w": random(200, 100).bfloat16()}, small)
    script = tmp_path / "memory.py"
    script.write_text(MEMORY)
    done = subprocess.run([sys.executable, script, small, *files, method], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = host_bytes(CheckpointPair(*files), "w", method, 8)
    assert int(done.stdout) <= expected <= 2 * N * K * 2 + 150e6


def test_memory_of_the_largest_matrices_is_within_a_gigabyte_beyond_them(tmp_path, monkeypatch):
    """The arithmetic, for what 70B models hold (of bf16): whatever is measured above, at sizes that no test can run."""
    pair = CheckpointPair(*pair_of(tmp_path, {"w": random(3, 3)}, {"w": random(3, 3)}))
    for shape in ((8192, 8192), (8490, 8490), (28672, 8192), (8192, 28672), (128256, 8192), (1024, 8192)):
        stored = 4 * shape[0] * shape[1]
        monkeypatch.setattr(pair, "shape", lambda name, shape=shape: shape)
        monkeypatch.setattr(pair, "stored_bytes", lambda name, stored=stored: stored)
        for method in ("exact", "topk"):
            assert host_bytes(pair, "w", method, 64) <= 10**9 + stored


def test_matrices_are_spread_by_cost():
    costs = {"a": 7, "b": 7, "c": 6, "d": 6, "e": 5, "f": 5, "g": 4, "h": 4, "i": 4}
    assigned = delta._assigned(costs, 3)
    assert sorted(name for names in assigned for name in names) == sorted(costs)
    assert max(sum(costs[name] for name in names) for names in assigned) <= 4 / 3 * 16
    assert delta._assigned(costs, 3) == assigned
    assert delta._assigned(costs, 1) == [sorted(costs)]
    assert delta._assigned({"a": 1}, 3) == [["a"], [], []]


@pytest.mark.parametrize(("host_bytes", "at_a_time"), [(1, 1), (10**9, 3)])
def test_as_many_matrices_at_a_time_as_memory_holds(tmp_path, monkeypatch, host_bytes, at_a_time):
    files = pair_of(tmp_path, *model(torch.float32, torch.float32))
    one_spectrum, lock, running, most = delta._one_spectrum, threading.Lock(), 0, 0
    full = threading.Barrier(3, timeout=30)

    def counted(*arguments):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        if at_a_time == 3 and "experts" in arguments[1]:
            full.wait()  # passed only by the three of them together
        found = one_spectrum(*arguments)
        with lock:
            running -= 1
        return found

    monkeypatch.setattr(delta, "_HOST_BYTES", host_bytes)
    monkeypatch.setattr(delta, "_one_spectrum", counted)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert list(delta_spectra(*files)) == list(MATRICES)
    finally:
        torch.set_num_threads(before)
    assert most == at_a_time


RANKS = """
import os, pickle, sys
import torch
from torch import distributed
from lora_fast import LoraFastError
from lora_fast.delta import delta_spectra

base, tuned, broken, out, joined = sys.argv[1:]
if joined == "joined":
    torch.set_num_threads(2)
    distributed.init_process_group("gloo")
told = []
found = {m: delta_spectra(base, tuned, method=m, k=8, progress=lambda *c: told.append(c[2])) for m in ("exact", "topk")}
message = None
try:
    delta_spectra(base, broken)
except LoraFastError as error:
    message = str(error)
with open(f"{out}.{os.environ['RANK']}", "wb") as file:
    pickle.dump((found, told, message), file)
if joined == "joined":
    distributed.destroy_process_group()  # left to the interpreter's end, threads of gloo may abort the process
"""


@pytest.mark.parametrize(("processes", "joined"), [(1, "joined"), (2, ""), (3, "joined")])
def test_every_rank_of_torchrun_has_all_of_it_to_the_bit(tmp_path, processes, joined):
    """Sizes at which LAPACK's bits depend on the number of threads; one matrix of the second checkpoint holds NaN."""
    shapes = [(350, 500), (420, 330), (333, 333), (90, 70)]
    base = {f"l.{i}.weight": random(*shape, seed=i).bfloat16() for i, shape in enumerate(shapes)}
    tuned = {name: (w.double() + 0.01 * random(*w.shape, seed=20)).bfloat16() for name, w in base.items()}
    files = pair_of(tmp_path, base, tuned)
    broken, script, out = tmp_path / "broken.safetensors", tmp_path / "ranks.py", tmp_path / "out"
    tuned["l.1.weight"][3, 3] = math.nan
    save_file(tuned, broken)
    script.write_text(RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*torchrun, script, *files, broken, out, joined]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    alone = {method: delta_spectra(*files, method=method, k=8) for method in ("exact", "topk")}
    shares = []
    for rank in range(processes):
        found, told, message = pickle.loads(Path(f"{out}.{rank}").read_bytes())
        for method in ("exact", "topk"):
            assert list(found[method]) == ["l.0", "l.1", "l.2", "l.3"]
            for name, spectrum in alone[method].items():
                assert torch.equal(found[method][name].singular_values, spectrum.singular_values)
                assert found[method][name].to_dict() == spectrum.to_dict()
        assert "l.1.weight holds NaN or inf" in message
        shares += set(told)
    assert sorted(shares) == ["l.0", "l.1", "l.2", "l.3"]  # each did its own and no other's


def test_bits_do_not_depend_on_the_number_of_threads(tmp_path):
    base = {"w": random(700, 350).float()}
    files = pair_of(tmp_path, base, {"w": base["w"] + 0.1 * random(700, 350, seed=1).float()})
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(delta_spectra(*files)["w"].singular_values)
            seen = [torch.get_num_threads()]
            later = threading.Thread(target=lambda seen=seen: seen.append(torch.get_num_threads()))
            later.start()
            later.join()
            assert seen == [threads, threads]  # as before, in threads that start later too
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
