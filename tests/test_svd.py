"""lora_svdvals, lora_svd and update_svds against singular values in 60 digits."""

import functools
import math

import mpmath
import pytest
import torch

from lora_fast import LoraFastError, lora_svd, lora_svdvals, svd
from lora_fast.kernels import reference_svd
from lora_fast.svd import update_svds

SIZES = [(33, 70, 12), (70, 33, 5), (64, 48, 16)]


def orthonormal(n, r, generator):
    return torch.linalg.qr(torch.randn(n, r, dtype=torch.float64, generator=generator))[0]


def cases():
    """name → (lora_A, lora_B, bound on the relative error of σ above 1e-6 σ₁). The bounds are the issue's for each
    factor condition after scaling columns to one length: 1e-9 up to 1e3, 1e-7 up to 1e4."""
    g = torch.Generator().manual_seed(7)
    R, N, K = 16, 64, 48

    def randn(*size):
        return torch.randn(*size, dtype=torch.float64, generator=g)

    def graded(last):
        powers = torch.logspace(0, math.log10(last), R, dtype=torch.float64)
        return orthonormal(N, R, g) * powers.sqrt(), powers.sqrt()[:, None] * orthonormal(K, R, g).mT

    def conditioned(kappa):
        """B = U diag(1…1/κ) Wᵀ with a full W: no scaling of columns mends it."""
        powers = torch.logspace(0, -math.log10(kappa), R, dtype=torch.float64)
        return (orthonormal(N, R, g) * powers) @ orthonormal(R, R, g).mT

    found = {
        "random, bf16": (randn(R, K).bfloat16(), randn(N, R).bfloat16(), 1e-9),
        "random, fp16": (randn(R, K).half(), randn(N, R).half(), 1e-9),
        "random, fp32": (randn(R, K).float(), randn(N, R).float(), 1e-9),
        "condition 300": (randn(R, K).float(), conditioned(300).float(), 1e-9),
        "condition 1e3": (randn(R, K).float(), conditioned(1e3).float(), 1e-9),
        "condition 1e4": (randn(R, K).float(), conditioned(1e4).float(), 1e-7),
        "condition 1e7, both": (conditioned(1e7)[:K].mT.contiguous(), conditioned(1e7), None),
        "condition 1e12": (randn(R, K), conditioned(1e12), None),
    }
    for name, last in (("graded to 1e-8", 1e-8), ("graded to 1e-12", 1e-12)):
        b, a = graded(last)
        found[name] = (a, b, 1e-9)
    b, a = graded(1e-8)
    found["graded to 1e-8, bf16"] = (a.bfloat16(), b.bfloat16(), 1e-9)
    found["duplicate values"] = (3 * orthonormal(K, R, g).mT, orthonormal(N, R, g), 1e-9)
    b = randn(N, R).float()
    b[:, 5], b[:, 11] = b[:, 2], b[:, 2]
    found["duplicate columns"] = (randn(R, K).float(), b, 1e-9)
    found["rank 8"] = (randn(R, K).float(), (randn(N, 8) @ randn(8, R)).float(), 1e-9)
    scales = torch.logspace(0, -12, R, dtype=torch.float64)
    found["columns scaled over 1e12"] = (randn(R, K).bfloat16(), (randn(N, R) * scales).bfloat16(), 1e-9)
    found["columns and rows scaled"] = ((scales[:, None] * randn(R, K)).float(), (randn(N, R) / scales).float(), 1e-9)
    found["zero columns"] = (randn(R, K).float(), randn(N, R).float() * (torch.arange(R) % 3 > 0), 1e-9)
    return found


CASES = cases()


@functools.cache
def exact(name, scaling):
    """Singular values of scaling · B A as the first 30 digits of a computation in 60."""
    lora_A, lora_B, _ = CASES[name]
    with mpmath.workdps(60):
        upper_b, upper_a = (
            mpmath.qr(mpmath.matrix(factor.double().tolist()), mode="skinny")[1] for factor in (lora_B, lora_A.mT)
        )
        return [mpmath.mpf(scaling) * s for s in mpmath.svd_r(upper_b * upper_a.T, compute_uv=False)]


def errors(S, values):
    """(largest relative error above 1e-6 σ₁, largest absolute error over σ₁)."""
    gaps = [abs(mpmath.mpf(s) - value) for s, value in zip(S.tolist(), values, strict=True)]
    relative = [gap / value for gap, value in zip(gaps, values) if value > 1e-6 * values[0]]
    return float(max(relative)), float(max(gaps) / values[0])


@pytest.mark.parametrize("name", CASES)
def test_singular_values_to_sixty_digits(name):
    lora_A, lora_B, bound = CASES[name]
    (found,) = update_svds([lora_A], [lora_B], [0.3])
    relative, absolute = errors(found.S, exact(name, 0.3))
    assert absolute <= 1e-12
    assert relative <= found.certificate
    assert bound is None or relative <= bound
    assert found.S.dtype == torch.float64
    assert (found.S[:-1] >= found.S[1:]).all()


@pytest.mark.parametrize("name", CASES)
def test_vectors_are_orthonormal_and_give_the_update(name):
    lora_A, lora_B, _ = CASES[name]
    U, S, Vh = lora_svd(lora_A, lora_B, 0.3)
    update = 0.3 * lora_B.double() @ lora_A.double()
    rank = int((S > 0).sum())
    for vectors in (U, Vh.mT):
        assert torch.linalg.matrix_norm(vectors[:, :rank].mT @ vectors[:, :rank] - torch.eye(rank)) <= 1e-9
        assert (vectors[:, rank:] == 0).all()
    assert torch.linalg.matrix_norm(U * S @ Vh - update) <= 1e-13 * torch.linalg.matrix_norm(update)


def test_what_needs_a_second_pass_gets_it():
    statuses = {name: update_svds([a], [b], [1.0])[0].status for name, (a, b, _) in CASES.items()}
    refined = {name for name, status in statuses.items() if status == "refined"}
    assert {"condition 1e4", "condition 1e7, both", "condition 1e12", "duplicate columns", "rank 8"} <= refined
    assert not refined & {
        "random, bf16",
        "condition 300",
        "graded to 1e-12",
        "columns scaled over 1e12",
        "zero columns",
    }


@pytest.mark.parametrize("name", ["condition 300", "condition 1e3"])
def test_the_first_pass_alone_keeps_its_certificate(name, monkeypatch):
    monkeypatch.setattr("lora_fast.svd._REFINE_ABOVE", 1.0)
    lora_A, lora_B, bound = CASES[name]
    (found,) = update_svds([lora_A], [lora_B], [0.3])
    relative, _ = errors(found.S, exact(name, 0.3))
    assert found.status == "ok"
    assert relative <= min(bound, found.certificate)


def test_long_sums_count_in_the_certificate():
    """Factors of an embedding: what a Gram matrix rounds away grows with the vocabulary."""
    g = torch.Generator().manual_seed(4)
    lora_A, common = torch.randn(4, 64, generator=g), torch.rand(300_000, 1, generator=g)
    for spread in (0.03, 0.0025):  # conditions of 60 and 800
        lora_B = common + spread * torch.randn(300_000, 4, generator=g)
        (found,) = update_svds([lora_A], [lora_B], [1.0])
        uppers = [torch.linalg.qr(factor.double())[1] for factor in (lora_B, lora_A.mT)]
        values = torch.linalg.svdvals(uppers[0] @ uppers[1].mT)
        assert ((found.S - values).abs() / values).max() <= min(found.certificate, 1e-9)


def test_what_cancels_is_certified_for_less():
    """X Y − X' Y of two nearly equal adapters: of size 1e-8 where its parts are of size 1."""
    g = torch.Generator().manual_seed(5)
    X, Y = (torch.randn(*size, dtype=torch.float64, generator=g) for size in ((40, 3), (3, 33)))
    other = X + 1e-8 * torch.randn(40, 3, dtype=torch.float64, generator=g)
    (found,) = update_svds([torch.cat([Y, Y])], [torch.cat([X, -other], 1)], [1.0])
    values = lora_svdvals(Y, X - other)
    relative = ((found.S[:3] - values).abs() / values).max()
    assert found.status == "refined"
    assert 1e-9 < relative <= found.certificate


def test_the_second_pass_has_one_sign_of_its_bases():
    g = torch.Generator().manual_seed(8)
    factor = torch.randn(2, 33, 5, generator=g)
    q, upper = reference_svd.orthonormal(factor)
    assert (torch.diagonal(upper, dim1=-2, dim2=-1) > 0).all()
    assert torch.allclose(q @ upper, factor.double(), rtol=0, atol=1e-14)


def test_rank_deficient_updates_have_exact_zeros():
    for name, rank in (("duplicate columns", 14), ("zero columns", 10)):
        lora_A, lora_B, _ = CASES[name]
        S = lora_svdvals(lora_A, lora_B)
        assert (S[:rank] > 1e-3).all()
        assert (S[rank:] == 0).all()


@pytest.mark.parametrize("N, K, R", [*SIZES, (1, 9, 3), (9, 1, 3), (6, 70, 8), (70, 6, 8), (5, 4, 1)])
def test_any_shape(N, K, R):
    g = torch.Generator().manual_seed(N * K + R)
    lora_A, lora_B = torch.randn(R, K, generator=g), torch.randn(N, R, generator=g)
    p = min(N, K, R)
    update = 0.7 * lora_B.double() @ lora_A.double()
    values = torch.linalg.svdvals(update)[:p]
    assert lora_svdvals(lora_A, lora_B, 0.7).sub(values).abs().max() <= 1e-13 * values[0]
    for k in (None, 1, p):
        U, S, Vh = lora_svd(lora_A, lora_B, 0.7, k)
        k = p if k is None else k
        assert (U.shape, S.shape, Vh.shape) == ((N, k), (k,), (k, K))
        left, s, right = torch.linalg.svd(update, full_matrices=False)
        best = left[:, :k] * s[:k] @ right[:k]
        assert torch.linalg.matrix_norm(U * S @ Vh - best) <= 1e-12 * s[0]


@pytest.mark.parametrize("N, K, R", [(7, 9, 0), (0, 9, 3), (7, 0, 3)])
def test_sizes_of_zero(N, K, R):
    for leading in ((), (2,)):
        U, S, Vh = lora_svd(torch.ones(*leading, R, K), torch.ones(*leading, N, R))
        assert (U.shape, S.shape, Vh.shape) == ((*leading, N, 0), (*leading, 0), (*leading, 0, K))


def test_zero_columns_beyond_the_smallest_size():
    """R > N, and what is left of R after its zero columns is not: still min(R, N, K) values."""
    g = torch.Generator().manual_seed(9)
    lora_A, lora_B = torch.randn(8, 33, generator=g), torch.randn(5, 8, generator=g)
    lora_B[:, 1::2] = 0
    U, S, Vh = lora_svd(lora_A, lora_B)
    assert (U.shape, S.shape, Vh.shape) == ((5, 5), (5,), (5, 33))
    update = lora_B.double() @ lora_A.double()
    assert torch.allclose(lora_svdvals(lora_A, lora_B), torch.linalg.svdvals(update), rtol=0, atol=1e-13)
    assert torch.allclose(U * S @ Vh, update, rtol=0, atol=1e-13)


@pytest.mark.parametrize("exponent", [-30, 30])
def test_sizes_far_from_one(exponent):
    """Also where what they make is out of fp32's range."""
    g = torch.Generator().manual_seed(6)
    lora_A, lora_B = 10.0**exponent * torch.randn(5, 33, generator=g), 10.0**exponent * torch.randn(40, 5, generator=g)
    update = 0.3 * lora_B.double() @ lora_A.double()
    U, S, Vh = lora_svd(lora_A, lora_B, 0.3)
    assert torch.allclose(S, torch.linalg.svdvals(update)[:5], rtol=1e-13, atol=0)
    assert torch.linalg.matrix_norm(U * S @ Vh - update) <= 1e-13 * S[0]


@pytest.mark.parametrize(("of_A", "of_B"), [(1e80, 1e80), (1e140, 1e20), (1e-80, 1e-80)])
def test_float64_factors_whose_norms_are_beyond_the_square_root_of_its_range(of_A, of_B):
    g = torch.Generator().manual_seed(6)
    lora_A = torch.randn(5, 33, generator=g, dtype=torch.float64)
    lora_B = torch.randn(40, 5, generator=g, dtype=torch.float64)
    (found,) = update_svds([of_A * lora_A], [of_B * lora_B], [0.3])
    expected = torch.linalg.svdvals(0.3 * lora_B @ lora_A)[:5]
    assert found.status == "ok" and torch.allclose(found.S / (of_A * of_B), expected, rtol=1e-9, atol=0)


def test_the_kernels_refuse_factors_of_two_dtypes():
    lora_A, lora_B = torch.eye(2, 5, dtype=torch.float16), torch.eye(4, 2)
    with pytest.raises(
        LoraFastError, match=r"lora_A is torch\.float16, lora_B is torch\.float32; the kernels take one"
    ):
        update_svds([lora_A], [lora_B], [1.0], backend="triton")
    assert update_svds([lora_A], [lora_B], [1.0])[0].status == "ok"


def test_a_scaling_for_each_update():
    lora_A, lora_B, _ = CASES["random, fp32"]
    for scalings in ([1.0], [1.0, 2.0, 3.0]):
        with pytest.raises(LoraFastError, match=f"2 lora_As, 2 lora_Bs and {len(scalings)} scalings"):
            update_svds([lora_A] * 2, [lora_B] * 2, scalings)


def test_batched_over_leading_sizes():
    g = torch.Generator().manual_seed(1)
    lora_A, lora_B = torch.randn(2, 3, 5, 33, generator=g), torch.randn(2, 3, 40, 5, generator=g)
    lora_B[1, 0] = 0
    U, S, Vh = lora_svd(lora_A, lora_B, -2.0)
    assert (U.shape, S.shape, Vh.shape) == ((2, 3, 40, 5), (2, 3, 5), (2, 3, 5, 33))
    update = -2.0 * lora_B.double() @ lora_A.double()
    assert torch.allclose(U * S[..., None, :] @ Vh, update, rtol=0, atol=1e-12)
    assert torch.allclose(S, lora_svdvals(lora_A, lora_B, -2.0), rtol=1e-14, atol=0)
    assert (S[1, 0] == 0).all() and (U[1, 0] == 0).all() and (Vh[1, 0] == 0).all()
    assert lora_svdvals(lora_A[:0], lora_B[:0]).shape == (0, 3, 5)


def test_mixed_shapes_and_ranks_at_once_equal_one_at_a_time(monkeypatch):
    monkeypatch.setattr(reference_svd, "CHUNK", 1 << 9)  # several chunks, and matrices that are cut in pieces
    g = torch.Generator().manual_seed(2)
    As, Bs = [], []
    for i in range(30):
        N, K, R = SIZES[i % 3]
        As.append(torch.randn(R, K, generator=g))
        Bs.append(torch.randn(N + i % 2, R, generator=g) if i % 5 else torch.randn(R, N, generator=g).mT)
    Bs[4] = Bs[4].bfloat16()
    Bs[7] = Bs[7] * torch.nan
    Bs[8][:, 1] = Bs[8][:, 0]
    scalings = [0.5 + i for i in range(30)]
    told = []
    found = update_svds(As, Bs, scalings, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (30, 30)
    assert [f.status for f in found].count("refined") == 1
    for i, (f, a, b) in enumerate(zip(found, As, Bs)):
        if i == 7:
            assert f.status == "not finite" and f.S.isnan().all()
            continue
        values = torch.linalg.svdvals(scalings[i] * b.double() @ a.double())[: len(f.S)]
        assert f.S.sub(values).abs().max() <= 1e-13 * values[0]


def test_each_result_has_memory_of_its_own():
    """Of hundreds that were computed at once one is kept, or sent to another process: not all of them with it."""
    g = torch.Generator().manual_seed(3)
    As, Bs = ([torch.randn(*size, generator=g) for _ in range(5)] for size in ((4, 20), (12, 4)))
    for found in update_svds(As, Bs, [1.0] * 5, vectors=True):
        for part in (found.S, found._left, found._right):
            assert part.untyped_storage().nbytes() == part.nbytes


def test_nothing_is_said_of_vectors_that_were_not_computed():
    lora_A, lora_B, _ = CASES["random, fp32"]
    with pytest.raises(LoraFastError, match="vectors=True"):
        update_svds([lora_A], [lora_B], [1.0])[0].left(lora_B)


@pytest.mark.parametrize(
    ("a", "b", "k", "message"),
    [
        ((4, 9), (7, 5), None, r"lora_A is \(4, 9\), lora_B is \(7, 5\); expected \(R, K\) and \(N, R\) of one R"),
        ((9,), (7, 5), None, "expected"),
        ((2, 4, 9), (3, 7, 4), None, "the same leading sizes"),
        ((4, 9), (7, 4), 5, r"k=5; expected a whole number from 1 to min\(R, N, K\) = 4"),
        ((4, 9), (7, 4), 0, "k=0"),
    ],
)
def test_sizes_that_do_not_fit(a, b, k, message):
    with pytest.raises(LoraFastError, match=message):
        lora_svd(torch.ones(a), torch.ones(b), k=k)


def test_kernels_are_launched_on_the_gpu_of_the_factors():
    """What the wrapper does on a machine with several GPUs, test_fused.py tests."""
    assert svd._core_svds.__wrapped__


@pytest.mark.parametrize("vectors", [False, True])
def test_on_the_kernels_the_same(vectors):
    """Mixed shapes, a rank beyond the core's kernel, one update of each kind that the kernels hand on."""
    pytest.importorskip("triton")
    g = torch.Generator().manual_seed(3)
    As, Bs = [], []
    for N, K, R in [(40, 70, 5), (33, 24, 5), (90, 48, 16), (90, 48, 16), (40, 70, 5), (24, 17, 5), (80, 70, 66)]:
        As.append(torch.randn(R, K, generator=g))
        Bs.append(torch.randn(N, R, generator=g))
    Bs[1].zero_()
    Bs[3][:, 4] = Bs[3][:, 2]
    As[4][2, 3] = torch.inf
    scalings = [0.5, 1.0, 2.0, 2.0, 1.0, -1.5, 1.0]
    found = update_svds(As, Bs, scalings, vectors=vectors, backend="triton")
    assert [f.status for f in found] == ["ok", "ok", "ok", "refined", "not finite", "ok", "ok"]
    for i, (f, a, b) in enumerate(zip(found, As, Bs)):
        if i == 4:
            continue
        update = scalings[i] * b.double() @ a.double()
        values = torch.linalg.svdvals(update)[: len(f.S)]
        assert f.S.sub(values).abs().max() <= 1e-13 * values[0]
        assert f.certificate < 1e-7
        if vectors:
            again = f.left(b) * f.S @ f.right(a).mT
            assert torch.linalg.matrix_norm(again - update) <= 1e-12 * torch.linalg.matrix_norm(update)
