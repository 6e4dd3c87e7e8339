"""The SVD of updates from the Grams of their factors, against 60 digits (mpmath) or LAPACK on the factors' QR."""

import math

import mpmath
import pytest
import torch
from kernel_support import DEVICE, count_launches, nan_filled, random
from torch import Tensor

from lora_fast.kernels import gram
from lora_fast.kernels.gram import Grams
from lora_fast.kernels.jacobi import CoreSvd, svd_of_grams

EPS = torch.finfo(torch.float64).eps


def grams_of(Bs: list[Tensor], As: list[Tensor]) -> Grams:
    """Of float64 factors too, which gram.py doesn't take: each in one to three partial sums."""
    R = Bs[0].shape[1]
    RP = max(16, 1 << (R - 1).bit_length())
    partials, first = [], [0]
    for j, factor in enumerate([*Bs, *(A.T for A in As)]):
        for piece in factor.double().chunk(1 + j % 3):
            partials.append(torch.zeros(RP, RP, dtype=torch.float64, device=DEVICE))
            partials[-1][:R, :R] = piece.T @ piece
        first.append(len(partials))
    return Grams(torch.stack(partials), torch.tensor(first, dtype=torch.int32, device=DEVICE), R)


def svd(Bs: list[Tensor], As: list[Tensor], scalings: list[float], *, vectors: bool = True, **settings) -> CoreSvd:
    scales = torch.tensor(scalings, dtype=torch.float64, device=DEVICE)
    with nan_filled():
        return svd_of_grams(grams_of(Bs, As), Bs[0].shape[1], scales, vectors=vectors, **settings)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(random(rows, columns, seed=seed).double())[0]


def powers(R: int, last: float) -> Tensor:
    """R numbers from 1 down to `last`, evenly in their logarithm."""
    return torch.logspace(0, math.log10(last), R, dtype=torch.float64, device=DEVICE)


def conditioned(rows: int, R: int, kappa: float, seed: int) -> Tensor:
    """(rows, R) in fp32 of about this condition, columns of about one norm."""
    return ((orthonormal(rows, R, seed) * powers(R, 1 / kappa)) @ orthonormal(R, R, seed + 1)).float()


def updates(R: int) -> dict[str, tuple[Tensor, Tensor, float]]:
    """B (N, R), A (R, K), s by name."""
    N, K, half = 2 * R + 37, 3 * R + 11, max(R // 2, 1)
    B, A = random(N, R, seed=1), random(R, K, seed=2)
    shuffled = torch.randperm(R, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    twins = B.clone()
    twins[:, R - 1] = 2 * twins[:, 0]
    holes = A.clone()
    holes[R // 3] = 0
    return {
        "random": (B, A, 0.5),
        "bf16, s < 0": (B.bfloat16(), A.bfloat16(), -2.0),
        "condition 1e3": (conditioned(N, R, 1e3, 4), A, 1.0),
        "condition 1e4": (B, conditioned(K, R, 1e4, 6).T, 1.0),
        "graded 1e-8": (orthonormal(N, R, 8) * powers(R, 1e-8), orthonormal(R, R, 9) @ orthonormal(K, R, 10).T, 1.0),
        "graded 1e-12": (orthonormal(N, R, 8) * powers(R, 1e-12)[shuffled], orthonormal(K, R, 10).T, 1.0),
        "equal σ": (orthonormal(N, R, 11), orthonormal(K, R, 12).T, 3.0),
        "scaled over 1e12": (B.double() * powers(R, 1e-12)[shuffled], A, 1e30),
        "a row of A is 0": (B, holes, 1.0),
        "equal columns": (twins, A, 1.0),
        "rank R / 2": (B[:, :half].double() @ random(half, R, seed=13).double(), A, 1.0),
        "rank R / 2 in A": (B, random(R, half, seed=14).double() @ A[:half].double(), 1.0),
        "N < R": (B[: max(R - 2, 1)], A, 1.0),
        "B is 0": (torch.zeros_like(B), A, 1.0),
        "s is 0": (B, A, 0.0),
    }


SOME = ["condition 1e3", "equal columns", "scaled over 1e12", "graded 1e-8", "rank R / 2 in A", "N < R"]
DEPENDENT = {"equal columns", "rank R / 2", "rank R / 2 in A", "N < R"}


def digits_60(B: Tensor, A: Tensor, s: float) -> Tensor:
    """σ of s·B·A: of the square roots of the eigenvalues of √G_B G_A √G_B, each right to 1e-28 of the largest."""
    with mpmath.workdps(60):
        b, a = (mpmath.matrix(factor.double().tolist()) for factor in (B, A))
        values, vectors = mpmath.eigsy(b.T * b)
        root = mpmath.diag([mpmath.sqrt(max(value, 0)) for value in values]) * vectors.T
        squares = mpmath.eigsy(root * (a * a.T) * root.T, eigvals_only=True)
        sigma = [float(abs(s) * mpmath.sqrt(max(square, 0))) for square in squares]
    return torch.tensor(sorted(sigma, reverse=True), dtype=torch.float64)


def lapack(B: Tensor, A: Tensor, s: float) -> Tensor:
    cores = [torch.linalg.qr(factor.double().cpu())[1] for factor in (B, A.T)]
    sigma = torch.linalg.svdvals(cores[0] @ cores[1].T) * abs(s)
    return torch.nn.functional.pad(sigma, (0, B.shape[1] - sigma.numel()))


def check_values(name: str, S: Tensor, exact: Tensor, exactness: float, kappa: float, status: int) -> None:
    """exactness: what the reference errs by, relative to the largest value."""
    R, S = S.numel(), S.cpu()
    assert bool((S[1:] <= S[:-1]).all()), f"{name}: not sorted"
    if exact[0] == 0:
        assert bool((S == 0).all()) and kappa == 0 and status == 1, name
        return
    errors = ((S - exact).abs() - exactness * exact[0]).clamp_min(0)
    assert errors.max() <= 2e-8 * exact[0], f"{name}: off by {errors.max() / exact[0]:.1e} of the largest"
    relative = (errors / exact)[exact > 1e-6 * exact[0]].max()
    if name in DEPENDENT and R > 1:
        rank = int((exact > 1e-14 * exact[0]).sum())
        assert math.isinf(kappa) and status == 1, name
        assert bool((S[rank:] == 0).all()) and relative <= 1e-10, f"{name}: {relative:.1e}"
        return
    assert kappa <= 2e4 * R, name
    # The first is what the library certifies, the second what was asked for.
    assert relative <= (64 + 8 * kappa**2 / R) * EPS, f"{name}: {relative:.1e} at κ = {kappa:.1e}"
    assert relative <= (1e-7 if name == "condition 1e4" else 1e-9), f"{name}: {relative:.1e}"
    assert status == (1 if exact[-1] < 1e-20 * exact[0] else 0) and status == (S[-1] == 0), name


def check_vectors(name: str, B: Tensor, A: Tensor, s: float, found: CoreSvd, index: int) -> None:
    S, certificate = found.S[index], float(found.orthogonality[index])
    U, V = B.double() @ found.X[index], A.double().T @ found.Y[index]
    one = torch.diag((S > 0).double())  # columns beyond the rank are zero
    worst = max(float((vectors.T @ vectors - one).norm()) for vectors in (U, V))
    assert worst <= 1e-6 and certificate <= 1e-6, f"{name}: {worst:.1e}"
    assert worst <= 10 * certificate + 1e-13, f"{name}: {worst:.1e}, certified {certificate:.1e}"
    product = s * B.double() @ A.double()
    assert float(((U * S) @ V.T - product).norm()) <= 1e-12 * float(product.norm()), name


@pytest.mark.parametrize("R", [1, 5, 8, 16, 32, 48, 64])
def test_values_and_vectors(R):
    cases = updates(R)
    if R > 8:  # the interpreter takes up to seconds for each
        cases = {name: cases[name] for name in SOME[: {16: None, 32: 2}.get(R, 1)]}
    Bs, As, scalings = map(list, zip(*cases.values()))
    found = svd(Bs, As, scalings)
    for index, (name, (B, A, s)) in enumerate(cases.items()):
        exact, exactness = (digits_60(B, A, s), 0.0) if R <= 8 else (lapack(B, A, s), 4 * EPS)
        check_values(name, found.S[index], exact, exactness, float(found.kappa[index]), int(found.status[index]))
        check_vectors(name, B, A, s, found, index)
        norms = B.double().norm(dim=0) * A.double().norm(dim=1)
        assert torch.allclose(found.norms[index], norms, rtol=1e-14, atol=0.0), name
    assert int(found.sweeps.max()) <= 12


def test_the_same_bits_wherever_an_update_stands():
    cases = [updates(5)[name] for name in ("condition 1e3", "rank R / 2 in A")]
    Bs, As, scalings = map(list, zip(*cases))
    together, again = svd(Bs, As, scalings), svd(Bs, As, scalings)
    reverse = svd(Bs[::-1], As[::-1], scalings[::-1])
    values = svd(Bs, As, scalings, vectors=False)
    assert values.X is values.Y is values.orthogonality is None
    # Partial sums of a factor differ from place to place, so the reversed batch is held to rounding.
    assert torch.allclose(reverse.S.flip(0), together.S, rtol=1e-9, atol=1e-15)
    for field in CoreSvd._fields:
        if getattr(values, field) is not None:
            assert torch.equal(getattr(values, field), getattr(together, field)), field
        assert torch.equal(getattr(again, field), getattr(together, field)), field


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, of numbers that the kernel then leaves out
def test_a_number_that_is_not_finite_stays_with_its_update():
    B, A = random(21, 5, seed=1), random(5, 30, seed=2)
    with_nan, with_inf = B.clone(), A.clone()
    with_nan[3, 1] = math.nan
    with_inf[4, 7] = -math.inf
    found = svd([B, with_nan, B, B, B], [A, A, with_inf, A, A], [1.0, 1.0, 1.0, math.nan, 1.0])
    assert found.status.tolist() == [0, 3, 3, 3, 0]
    for results in (found.S, found.X, found.Y, found.kappa, found.orthogonality):
        assert bool(results[1:4].isnan().all()) and bool(results[[0, 4]].isfinite().all())
    assert int(found.sweeps.max()) <= 12
    assert torch.allclose(found.S[4].cpu(), lapack(B, A, 1.0), rtol=1e-12, atol=0.0)


def test_the_side_on_the_rows_saves_sweeps():
    """6 or 7 of them; with the other side on the rows 8 where columns depend, else 12 or 13."""
    R, B, A = 16, random(59, 16, seed=2), random(16, 59, seed=3)
    spread = [(conditioned(59, R, 1e7, 4), A), (B, conditioned(59, R, 1e7, 4).T)]
    found = svd(*map(list, zip(*spread, (B[:13], A), (B, A[:, :13]))), [1.0] * 4, vectors=False)
    assert int(found.sweeps.max()) <= 7


def test_sweeps_that_do_not_suffice_are_told():
    case = updates(16)["condition 1e3"]
    found = svd(*([part] for part in case), vectors=False, max_sweeps=2)
    assert found.status.tolist() == [2] and found.sweeps.tolist() == [2] and math.isinf(found.kappa)


def test_directions_count_down_to_the_rounding_of_the_grams():
    """Of a condition of 1e6 the smallest pivot is some 1e-12, a thousand times what counts as zero."""
    B, A = conditioned(59, 5, 1e6, 4), random(5, 40, seed=3)
    found = svd([B], [A], [1.0], vectors=False)
    exact = digits_60(B, A, 1.0)
    assert found.status.tolist() == [0] and 1e5 < float(found.kappa) < 1e7
    assert float((found.S[0].cpu() - exact).abs().max()) <= 1e-9 * exact[0]
    assert float(found.S[0, -1]) == pytest.approx(float(exact[-1]), rel=1e-2)


def test_products_that_cancel_are_zero():
    """B A = b a − b a: what is left of the core is rounding."""
    b, a = random(40, 3, seed=1).double(), random(3, 50, seed=2).double()
    found = svd([torch.cat([b, b], 1)], [torch.cat([a, -a], 0)], [1.0])
    assert bool((found.S == 0).all()) and found.status.tolist() == [1]
    assert bool((found.X == 0).all()) and bool((found.Y == 0).all())


@pytest.mark.parametrize(("vectors", "launches"), [(False, 2), (True, 3)])
def test_launches(vectors, launches):
    """With the Grams that gram.py makes of factors as they are stored, of mixed shapes."""
    Bs = [random(n, 8, dtype=torch.float16, seed=n) for n in (33, 70)]
    As = [random(8, k, dtype=torch.float16, seed=k) for k in (12, 150)]
    grams = gram.grams(As, Bs)
    scalings = torch.tensor([2.0, 0.25], dtype=torch.float64, device=DEVICE)
    with count_launches() as counted, nan_filled():
        found = svd_of_grams(grams, 8, scalings, vectors=vectors)
    assert counted.total() == launches
    for index, (B, A, s) in enumerate(zip(Bs, As, scalings.tolist())):
        assert torch.allclose(found.S[index].cpu(), lapack(B, A, s), rtol=1e-12, atol=0.0)
        if vectors:
            check_vectors("fp16", B, A, s, found, index)


def test_no_updates():
    empty = Grams(torch.empty(0, 16, 16, dtype=torch.float64), torch.zeros(1, dtype=torch.int32), 8)
    found = svd_of_grams(empty, 8, torch.empty(0, dtype=torch.float64), vectors=True)
    assert found.S.shape == (0, 8) and found.X.shape == (0, 8, 8)
