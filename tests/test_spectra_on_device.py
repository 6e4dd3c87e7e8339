"""Spectra, resizing and extraction computed on this machine's GPU, or on its CPU: against dense float64 SVDs."""

import pytest
import torch
from kernel_support import DEVICE
from safetensors.torch import load_file, save_file
from test_svd import CASES, errors, exact

from lora_fast import (
    LoraConfig,
    adapter_factors,
    adapter_spectra,
    amplification_factor,
    apply_lora,
    delta_spectra,
    extract_adapter,
    intruder_dimensions,
    lora_svd,
    resize_adapter,
    save_adapter,
    subspace_similarity,
)
from lora_fast.svd import update_svds

RANK, SHAPES = 6, {"a": (40, 72), "b": (96, 40)}


def svdvals(matrix):
    return torch.linalg.svdvals(matrix.double())


@pytest.mark.parametrize("name", CASES)
def test_singular_values_to_sixty_digits(name):
    lora_A, lora_B, bound = CASES[name]
    (found,) = update_svds([lora_A], [lora_B], [0.3], device=DEVICE, vectors=True)
    relative, absolute = errors(found.S, exact(name, 0.3))
    assert absolute <= 2e-8 and relative <= found.certificate and (bound is None or relative <= bound)
    update = 0.3 * lora_B.double() @ lora_A.double()
    left, right = found.left(lora_B.to(DEVICE)).cpu(), found.right(lora_A.to(DEVICE)).cpu()
    rank = int((found.S > 0).sum())
    for vectors in (left, right):
        assert torch.linalg.matrix_norm(vectors[:, :rank].mT @ vectors[:, :rank] - torch.eye(rank)) <= 1e-6
    assert torch.linalg.matrix_norm(left * found.S @ right.mT - update) <= 1e-6 * torch.linalg.matrix_norm(update)


@pytest.mark.parametrize("R", [64, 65, 128, 300])
def test_ranks_up_to_and_beyond_the_kernels(R):
    g = torch.Generator().manual_seed(R)
    lora_A, lora_B = torch.randn(R, 320, generator=g), torch.randn(400, R, generator=g)
    (found,) = update_svds([lora_A.to(DEVICE)], [lora_B.to(DEVICE)], [0.5])
    exact_values = svdvals(0.5 * lora_B.double() @ lora_A.double())[:R]
    assert ((found.S - exact_values).abs() / exact_values).max() <= max(1e-9, found.certificate) <= 1e-7
    U, S, Vh = lora_svd(lora_A.to(DEVICE), lora_B.to(DEVICE), 0.5, k=5)
    assert torch.allclose(S.cpu(), exact_values[:5], rtol=1e-9, atol=0) and U.shape == (400, 5) and Vh.shape == (5, 320)


def product(factors):
    return factors.scaling * factors.lora_B.double() @ factors.lora_A.double()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """base and tuned checkpoints, an adapter with weights of the same names, and ΔW of both."""
    path, g = tmp_path_factory.mktemp("spectra"), torch.Generator().manual_seed(3)
    base = {f"{name}.weight": torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    dense = {
        name: torch.randn(w.shape[0], RANK, generator=g) @ torch.randn(RANK, w.shape[1], generator=g) / 9
        for name, w in base.items()
    }
    for folder, tensors in (("base", base), ("tuned", {name: base[name] + dense[name] for name in base})):
        (path / folder).mkdir()
        save_file(tensors, path / folder / "model.safetensors")
    model = torch.nn.ModuleDict({name: torch.nn.Linear(k, n, bias=False) for name, (n, k) in SHAPES.items()})
    model.load_state_dict(base)
    apply_lora(model, LoraConfig(r=RANK, lora_alpha=9, target_modules=list(SHAPES), init_lora_weights=False))
    save_adapter(model, path / "adapter")
    return path, {each.name.rpartition(".")[2]: product(each) for each in adapter_factors(path / "adapter")}


def of(found, name):
    """The entry of a layer, however its name is written."""
    (key,) = [key for key in found if key.removesuffix(".weight").rpartition(".")[2] == name]
    return found[key]


def test_an_adapters_spectra_and_what_relates_it_to_its_base(folders):
    path, updates = folders
    spectra = adapter_spectra(path / "adapter", base=path / "base", device=DEVICE)
    factors = amplification_factor(path / "adapter", path / "base", device=DEVICE)
    intruders = intruder_dimensions(path / "adapter", path / "base", k=4, device=DEVICE)
    similar = subspace_similarity(path / "adapter", path / "adapter", device=DEVICE)
    for name, update in updates.items():
        U, S, Vh = torch.linalg.svd(update)
        assert torch.allclose(of(spectra, name).singular_values[:RANK], S[:RANK], rtol=1e-9, atol=0)
        weight = load_file(path / "base" / "model.safetensors")[f"{name}.weight"].double()
        projected = torch.linalg.matrix_norm(U[:, :RANK].mT @ weight @ Vh[:RANK].mT)
        expected = float(torch.linalg.matrix_norm(update) / projected)
        assert of(factors, name).factor == pytest.approx(expected, rel=1e-6)
        tuned = torch.linalg.svd(weight + update)
        cosines = (tuned.U[:, :4].mT @ torch.linalg.svd(weight).U).abs().max(1).values
        assert of(intruders, name).count == int((cosines < 0.5).sum())
        assert torch.allclose(of(similar, name).cpu().diagonal().double(), torch.ones(RANK).double(), atol=1e-6)


@pytest.mark.parametrize("method", ["exact", "topk"])
def test_dense_updates_and_the_adapter_that_is_closest(folders, method, tmp_path):
    path, _ = folders
    spectra = delta_spectra(path / "base", path / "tuned", device=DEVICE, method=method, k=RANK)
    report = extract_adapter(path / "base", path / "tuned", tmp_path / "out", rank=RANK, method=method, device=DEVICE)
    base, tuned = (load_file(path / name / "model.safetensors") for name in ("base", "tuned"))
    for name in SHAPES:
        delta = tuned[f"{name}.weight"].double() - base[f"{name}.weight"].double()
        assert torch.allclose(of(spectra, name).singular_values[:RANK], svdvals(delta)[:RANK], rtol=1e-6, atol=0)
    assert report.kept_energy == pytest.approx(1, abs=1e-6)


def test_resizing_keeps_what_it_says(folders, tmp_path):
    path, updates = folders
    report = resize_adapter(path / "adapter", tmp_path / "small", rank=2, device=DEVICE)
    values = [svdvals(update) for update in updates.values()]
    kept = sum(float(s[:2].square().sum()) for s in values) / sum(float(s.square().sum()) for s in values)
    assert report.kept_energy == pytest.approx(kept, rel=1e-9)
    for factors in adapter_factors(tmp_path / "small"):
        U, S, Vh = torch.linalg.svd(updates[factors.name.rpartition(".")[2]])
        best = U[:, :2] * S[:2] @ Vh[:2]
        assert torch.linalg.matrix_norm(product(factors) - best) <= 1e-5 * torch.linalg.matrix_norm(best)
