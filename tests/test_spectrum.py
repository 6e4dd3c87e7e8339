"""Spectrum's quantities against their definitions, the ranks to truncate to against every choice there is, readings."""

import itertools
import json
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_fast import LoraFastError, Spectrum, kept_energy, ranks_for, readings
from lora_fast.spectrum import truncation_error

EPS64 = torch.finfo(torch.float64).eps


def spectrum(values, name="model.layers.0.self_attn.q_proj", **fields):
    """Of an adapter's update, unless `fields` say otherwise; all singular values, unless they give ‖ΔW‖_F."""
    s = torch.as_tensor(values, dtype=torch.float64)
    known = {
        "name": name,
        "singular_values": s,
        "shape": (33, 70),
        "rank": len(s),
        "scaling": 2.0,
        "frobenius_norm": float(torch.linalg.vector_norm(s)),
        "certificate": 1e-12,
        "status": "ok",
        "method": "factors",
        "storage_dtype": torch.float32,
    }
    return Spectrum(**(known | fields))


def dense(values, **fields):
    return spectrum(values, **({"rank": None, "scaling": None, "method": "exact"} | fields))


def random_values(seed, count):
    generator = random.Random(seed)
    return sorted((generator.lognormvariate(0, 1.5) for _ in range(count)), reverse=True)


# ---- Quantities ------------------------------------------------------------------------------------------------------


def test_quantities_of_a_spectrum_worked_out_by_hand():
    found = spectrum([3.0, 2.0, 1.0, 1.0], weight_norm=30.0)
    assert found.numerical_rank == 4
    assert found.stable_rank == pytest.approx(15 / 9, rel=1e-15)
    p = [3 / 7, 2 / 7, 1 / 7, 1 / 7]
    assert found.effective_rank == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)), rel=1e-14)
    # Energies 9, 4, 1, 1 of 15: shares 0.6, 0.8667, 0.9333, 1.
    assert [found.energy_rank(q) for q in (0.5, 0.6, 0.61, 0.9, 0.93, 0.95, 0.99, 1.0)] == [1, 1, 2, 3, 3, 4, 4, 4]
    assert (found.gap.ratio, found.gap.after) == (2.0, 2)
    assert found.relative_size == pytest.approx(math.sqrt(15) / 30, rel=1e-15)
    assert (found.kind, found.spectral_norm, found.is_zero, found.complete) == ("q_proj", 3.0, False, True)


@pytest.mark.parametrize("count", [1, 5, 48])
def test_effective_and_stable_rank_of_equal_values_is_their_number(count):
    found = spectrum([0.3] * count)
    assert found.effective_rank == pytest.approx(count, rel=1e-13)
    assert found.stable_rank == pytest.approx(count, rel=1e-13)
    assert found.energy_rank(1.0) == count
    assert found.gap is None if count == 1 else found.gap.ratio == 1.0


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_quantities_do_not_depend_on_the_scale(scale):
    values = [3.0, 2.0, 1.0, 0.25]
    small, plain = spectrum([scale * v for v in values], frobenius_norm=scale * math.sqrt(14.0625)), spectrum(values)
    for quantity in ("numerical_rank", "effective_rank", "stable_rank"):
        assert getattr(small, quantity) == pytest.approx(getattr(plain, quantity), rel=1e-13)
    assert small.gap.ratio == pytest.approx(4.0)
    assert kept_energy(small, 2) == pytest.approx(13 / 14.0625, rel=1e-14)
    assert ranks_for([small, small], energy=0.95, scope="global") == ranks_for(
        [plain, plain], energy=0.95, scope="global"
    )


@pytest.mark.parametrize("make", [spectrum, dense])
def test_a_zero_update_is_zero_everywhere(make):
    found = make([0.0, 0.0, 0.0], weight_norm=2.0, noise_std=0.01)
    assert (found.numerical_rank, found.effective_rank, found.stable_rank, found.gap) == (0, 0.0, 0.0, None)
    assert [found.energy_rank(q) for q in (0.9, 1.0)] == [0, 0]
    assert [kept_energy(found, k) for k in (0, 1, 3)] == [1.0, 1.0, 1.0]
    assert (found.relative_size, found.corrected_rank, found.corrected.energy_rank(0.9)) == (0.0, 0, 0)
    assert spectrum([0.0], weight_norm=0.0).relative_size is None
    for scope, criterion in itertools.product(
        ("layer", "global"), ({"rank": 2}, {"energy": 0.9}, {"error": 0.1}, {"budget": 300})
    ):
        assert ranks_for([found], **criterion, scope=scope) == [1]
        assert ranks_for([found], **criterion, scope=scope, minimum=0) == [0]


def test_json_holds_finite_numbers_or_null():
    every = [
        spectrum([3.0, 1.0, 0.0], weight_norm=9.0),
        spectrum([0.0]),
        spectrum([1.0], certificate=math.inf),
        dense([2.0, 1.0], method="topk", frobenius_norm=3.0, noise_std=0.5),
        dense([2.0, 1e-3], noise_std=1e-3),
    ]
    for found in every:
        text = json.dumps(found.to_dict(), allow_nan=False)
        back = json.loads(text)
        assert back["singular_values"] == found.singular_values.tolist()
        assert back["shape"] == [33, 70]
        assert back["storage_dtype"] == "float32"
        assert "singular_values" not in found.to_dict(singular_values=False)
    first = every[0].to_dict()
    assert (first["r90"], first["r95"], first["r99"], first["numerical_rank"]) == (1, 2, 2, 2)
    assert first["gap"] == {"ratio": pytest.approx(1 / torch.finfo(torch.float32).eps / 3), "after": 2}
    assert every[2].to_dict()["certificate"] is None
    assert every[4].to_dict()["corrected"]["r90"] == every[4].corrected.energy_rank(0.9) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("unbalanced", [False, True])
def test_numerical_rank_tells_directions_from_the_rounding_of_stored_factors(dtype, unbalanced):
    """Factors of rank 16 whose product has 8 directions, the last 16 times above the tolerance, and then what rounding
    made; unbalanced: all of the decay in B, as at the start of training."""
    generator = torch.Generator().manual_seed(3)
    normal = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    N, K, R, true = 257, 190, 16, 8
    U, V = (torch.linalg.qr(normal(n, R))[0] for n in (N, K))
    tolerance = torch.finfo(dtype).eps
    decay = torch.zeros(R, dtype=torch.float64)
    decay[:true] = torch.logspace(0, math.log10(16 * tolerance), true, dtype=torch.float64)
    mix = torch.linalg.qr(normal(R, R))[0]
    left, right = (decay, torch.ones_like(decay)) if unbalanced else (decay.sqrt(), decay.sqrt())
    lora_B, lora_A = (U * left) @ mix, mix.mT @ (V * right).mT
    s = torch.linalg.svdvals(lora_B.to(dtype).double() @ lora_A.to(dtype).double())[:R]
    found = spectrum(s, shape=(N, K), storage_dtype=dtype)
    if unbalanced:  # what lies there is the rounding of one factor alone; else a product of two roundings
        assert s[true] > 0.01 * tolerance * s[0]
    assert found.numerical_rank == true


def test_numerical_rank_of_exact_factors_has_the_floor_of_the_arithmetic():
    tail = 2 * 70 * EPS64
    assert spectrum([1.0, tail, tail / 4], storage_dtype=torch.float64).numerical_rank == 2
    assert dense([1.0, 2 * math.sqrt(70 * EPS64), 0.5 * math.sqrt(70 * EPS64)]).numerical_rank == 2


# ---- Dense updates and their noise -----------------------------------------------------------------------------------


def gavish_donoho(beta):
    """λ*(β) as their paper's equation (11) writes it."""
    return math.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + math.sqrt(beta**2 + 14 * beta + 1)))


def test_noise_threshold_of_square_and_wide_updates():
    square = dense([1.0], shape=(400, 400), noise_std=0.01)
    assert square.noise_threshold == pytest.approx(4 / math.sqrt(3) * 20 * 0.01, rel=1e-14)
    assert square.noise_edge == pytest.approx(40 * 0.01, rel=1e-14)
    for shape in ((100, 400), (400, 100)):
        found = dense([1.0], shape=shape, noise_std=0.01)
        assert found.noise_threshold == pytest.approx(gavish_donoho(0.25) * 20 * 0.01, rel=1e-14)
        assert found.noise_edge == pytest.approx(30 * 0.01, rel=1e-14)
        assert found.noise_edge < found.noise_threshold


@pytest.mark.parametrize("share", [0.003, 0.01, 0.05])
def test_rounding_to_bf16_hides_the_rank_of_a_dense_update_and_the_corrected_one_finds_it(share):
    """A rank-8 update of a bf16 weight, itself stored in bf16: by its raw spectrum the rank is anything."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    N, K, true = 320, 288, 8
    base = (0.02 * normal(N, K)).bfloat16()
    update = normal(N, true) @ normal(true, K)
    update *= share * torch.linalg.matrix_norm(base.double()) / torch.linalg.matrix_norm(update)
    tuned = (base.double() + update).bfloat16()
    _, exponent = torch.frexp(tuned.double())
    ulp = torch.ldexp(torch.ones_like(base, dtype=torch.float64), exponent - 8)
    s = torch.linalg.svdvals(tuned.double() - base.double())
    found = dense(s, shape=(N, K), storage_dtype=torch.bfloat16, noise_std=float((ulp**2 / 12).mean().sqrt()))
    assert found.corrected_rank == true
    assert found.numerical_rank == min(N, K)
    assert found.corrected.energy_rank(0.9999) <= true < found.energy_rank(0.9999)
    assert found.corrected.effective_rank <= true + 1e-9 < found.effective_rank
    assert found.corrected.frobenius_norm == pytest.approx(float(torch.linalg.vector_norm(s[:true])), rel=1e-14)
    assert (found.corrected.numerical_rank, found.corrected.name) == (true, found.name)


def test_of_the_largest_values_alone_only_what_they_show_is_given():
    values = random_values(1, 20)
    whole = dense(values, shape=(20, 30))
    norm = whole.frobenius_norm
    part = dense(values[:6], shape=(20, 30), method="topk", frobenius_norm=norm)
    assert (part.numerical_rank, part.effective_rank, part.complete) == (None, None, False)
    assert part.stable_rank == pytest.approx(whole.stable_rank, rel=1e-14)
    for k in range(7):
        assert kept_energy(part, k) == pytest.approx(kept_energy(whole, k), abs=1e-12)
    reached = kept_energy(whole, 6)
    for q in (0.5, 0.8, reached - 1e-9):
        assert part.energy_rank(q) == whole.energy_rank(q)
    assert part.energy_rank(reached + 1e-9) is None
    noisy = dense(values[:6], shape=(20, 30), method="topk", frobenius_norm=norm, noise_std=values[3] / 9.5)
    assert noisy.corrected_rank == sum(v > noisy.noise_threshold for v in values) < 6
    quiet = dense(values[:6], shape=(20, 30), method="topk", frobenius_norm=norm, noise_std=1e-9)
    assert (quiet.corrected_rank, quiet.corrected, quiet.to_dict()["corrected"]) == (None, None, None)


# ---- Ranks to truncate to --------------------------------------------------------------------------------------------


def energies_exactly(values):
    """Energies kept by k = 0 … count, as a sum without rounding."""
    total = math.fsum(v * v for v in values)
    return [math.fsum(v * v for v in values[:k]) / total for k in range(len(values) + 1)]


@pytest.mark.parametrize("count", [1, 5, 16, 512])
def test_kept_energy_is_the_truth(count):
    values = random_values(count, count)
    found = spectrum(values)
    for k, exact in enumerate(energies_exactly(values)):
        assert abs(kept_energy(found, k) - exact) < 1e-13
        error = math.sqrt(math.fsum(v * v for v in values[k:]))
        assert truncation_error(found, k) == pytest.approx(error, rel=1e-13)
    assert kept_energy(found, count + 7) == 1.0


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=40), st.floats(0.001, 1.0))
def test_energy_rank_is_the_smallest_that_keeps_the_share(values, q):
    values = sorted(values, reverse=True)
    (k,) = ranks_for([spectrum(values)], energy=q)
    exact = energies_exactly(values)
    assert exact[k] >= q - 1e-9
    assert k == 1 or exact[k - 1] < q + 1e-12


@pytest.mark.parametrize("q", [0.1, 0.2, 0.3, 0.6, 0.7, 0.8, 0.9])
def test_a_share_that_is_reached_exactly_counts_as_reached(q):
    """Ten equal directions: 0.7 is 7 of them, though 7/10 is no binary fraction."""
    assert ranks_for([spectrum([0.3] * 10)], energy=q) == [round(10 * q)]
    assert ranks_for([spectrum([0.3] * 5), spectrum([0.3] * 5)], energy=q, scope="global", minimum=0) == [
        min(5, round(10 * q)),
        max(0, round(10 * q) - 5),
    ]


def test_all_energy_keeps_the_smallest_direction_and_no_zero():
    found = spectrum([1.0, 1e-12, 0.0, 0.0])
    for scope in ("layer", "global"):
        assert ranks_for([found], energy=1.0, scope=scope) == [2]
        assert ranks_for([found], error=0.0, scope=scope) == [2]
        assert ranks_for([found], rank=4, scope=scope) == [2]
        assert ranks_for([found], budget=10**9, scope=scope) == [2]


def test_error_is_an_absolute_distance():
    values = [4.0, 3.0, 2.0, 1.0]
    tails = [math.sqrt(30), math.sqrt(14), math.sqrt(5), 1.0, 0.0]
    for error in (0.5, 1.0, 1.5, math.sqrt(5), 3.0, math.sqrt(14), 5.0):
        (k,) = ranks_for([spectrum(values)], error=error)
        assert k == max(1, next(k for k, tail in enumerate(tails) if tail <= error * (1 + 1e-12)))


SHAPES = [(33, 70), (12, 9), (70, 40), (5, 90)]


def layers(seed, count=4, most=4):
    generator = random.Random(seed)
    return [
        spectrum(random_values(10 * seed + n, generator.randint(1, most)), name=f"layer{n}", shape=SHAPES[n % 4])
        for n in range(count)
    ]


def every_choice(spectra, minimum=1):
    return itertools.product(*(range(minimum, len(s.singular_values) + 1) for s in spectra))


def total_energy(spectra, ranks):
    return math.fsum(v * v for s, k in zip(spectra, ranks) for v in s.singular_values[:k].tolist())


def total_error(spectra, ranks):
    return math.sqrt(math.fsum(v * v for s, k in zip(spectra, ranks) for v in s.singular_values[k:].tolist()))


def parameters(spectra, ranks):
    return sum(k * sum(s.shape) for s, k in zip(spectra, ranks))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("minimum", [0, 1])
def test_global_criteria_against_every_choice_of_ranks(seed, minimum):
    spectra = layers(seed)
    whole = total_energy(spectra, [len(s.singular_values) for s in spectra])
    choices = list(every_choice(spectra, minimum))
    options = {"scope": "global", "minimum": minimum}
    for q in (0.3, 0.8, 0.95, 0.999):
        found = ranks_for(spectra, energy=q, **options)
        fewest = min(sum(ranks) for ranks in choices if total_energy(spectra, ranks) >= q * whole)
        assert total_energy(spectra, found) >= q * whole
        assert sum(found) == fewest
    for error in (0.2, 1.0, 3.0):
        found = ranks_for(spectra, error=error, **options)
        assert total_error(spectra, found) <= error or found == [len(s.singular_values) for s in spectra]
        assert sum(found) == min(sum(ranks) for ranks in choices if total_error(spectra, ranks) <= error)
    for rank in (1, 2, 3):
        found = ranks_for(spectra, rank=rank, **options)
        allowed = [ranks for ranks in choices if sum(ranks) <= max(4 * rank, minimum * 4)]
        assert tuple(found) in allowed
        assert total_energy(spectra, found) == pytest.approx(max(total_energy(spectra, r) for r in allowed), rel=1e-14)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [211, 260, 333, 480, 700, 10**6])
def test_a_budget_is_kept_and_nearly_best_spent(seed, budget):
    spectra = layers(seed)
    found = ranks_for(spectra, budget=budget + 120, scope="global")
    budget += 120
    assert parameters(spectra, found) <= budget
    affordable = [ranks for ranks in every_choice(spectra) if parameters(spectra, ranks) <= budget]
    best = max(total_energy(spectra, ranks) for ranks in affordable)
    refused = [float(s.singular_values[k]) ** 2 for s, k in zip(spectra, found) if k < len(s.singular_values)]
    assert total_energy(spectra, found) >= best - max(refused, default=0.0)
    for s, k in zip(spectra, found):  # nothing that would still fit is left out
        assert k == len(s.singular_values) or parameters(spectra, found) + sum(s.shape) > budget
    uniform = ranks_for(spectra, budget=budget)
    assert parameters(spectra, uniform) <= budget
    r = max(uniform)
    assert uniform == [min(r, len(s.singular_values)) for s in spectra]
    wider = [min(r + 1, len(s.singular_values)) for s in spectra]
    assert wider == uniform or parameters(spectra, wider) > budget


def test_a_global_budget_prefers_what_a_parameter_buys():
    wide, narrow = (
        spectrum([2.0, 2.0], name="wide", shape=(900, 100)),
        spectrum([1.9, 1.9], name="narrow", shape=(5, 5)),
    )
    assert ranks_for([wide, narrow], budget=2010, scope="global") == [1, 2]  # one more of `wide`, or of `narrow`
    assert ranks_for([wide, narrow], budget=2020, scope="global") == [2, 2]
    assert ranks_for([wide, narrow], rank=1, scope="global", minimum=0) == [2, 0]


def test_ties_go_to_the_earlier_layer_and_the_count_is_exact():
    spectra = [spectrum([1.0] * 4, name=f"layer{n}") for n in range(3)]
    assert ranks_for(spectra, rank=2, scope="global", minimum=0) == [4, 2, 0]
    assert ranks_for(spectra, rank=2, scope="global") == [4, 1, 1]
    many = [spectrum([1.0] * 40, name=f"layer{n}") for n in range(5)]
    assert ranks_for(many, rank=10, scope="global", minimum=0) == [40, 10, 0, 0, 0]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(("budget", "rank"), [(103, 1), (205, 1), (206, 2), (308, 2), (309, 3), (10**6, 3)])
def test_a_budget_to_the_parameter(scope, budget, rank):
    assert ranks_for([spectrum([3.0, 2.0, 1.0])], budget=budget, scope=scope) == [rank]


def test_layer_scope_treats_each_alone():
    spectra = layers(3)
    assert ranks_for(spectra, rank=2) == [min(2, len(s.singular_values)) for s in spectra]
    assert ranks_for(spectra, energy=0.9) == [ranks_for([s], energy=0.9)[0] for s in spectra]
    assert ranks_for([], rank=2) == []


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_values_that_were_not_computed_are_asked_for(scope):
    values = random_values(1, 20)
    norm = float(torch.tensor(values, dtype=torch.float64).norm())
    part = dense(values[:3], shape=(20, 30), method="topk", frobenius_norm=norm)
    whole = dense([1e-3 * v for v in values], shape=(20, 30), name="whole")
    for criterion in ({"rank": 8}, {"energy": 0.999}, {"error": 1e-3}, {"budget": 50 * 9}):
        with pytest.raises(LoraFastError, match=r"q_proj than its 3 computed singular values, which hold 0\.\d{4}"):
            ranks_for([part, whole], **criterion, scope=scope)
    assert ranks_for([part], rank=3, scope=scope) == [3]
    assert ranks_for([part], energy=kept_energy(part, 2), scope=scope) == [2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "no criterion given; expected exactly one of rank, energy, error and budget"),
        ({"rank": 2, "energy": 0.9}, "rank and energy given; expected exactly one"),
        ({"rank": 0}, "rank=0; expected a whole number of at least 1"),
        ({"rank": True}, "rank=True; expected a whole number"),
        ({"rank": 2.0}, "rank=2.0; expected a whole number"),
        ({"budget": 1.5}, "budget=1.5; expected a whole number"),
        ({"energy": 0.0}, "energy=0.0; expected a share of the energy in (0, 1], such as 0.99"),
        ({"energy": 90}, "energy=90; expected a share"),
        ({"energy": math.nan}, "energy=nan; expected a share"),
        ({"energy": "0.9"}, "energy='0.9'; expected a number"),
        ({"error": -1.0}, "error=-1.0; expected ‖ΔW − ΔW_k‖_F"),
        ({"error": math.inf}, "error=inf; expected ‖ΔW − ΔW_k‖_F"),
        ({"rank": 2, "scope": "model"}, "scope='model'; expected 'layer' or 'global'"),
        ({"rank": 2, "minimum": -1}, "minimum=-1; expected a whole number of at least 0"),
        ({"budget": 102}, "budget=102 is below the 103 parameters of rank 1 in each of 1 updates"),
        ({"budget": 102, "scope": "global"}, "budget=102 is below the 103 parameters"),
    ],
)
def test_wrong_criteria(arguments, said):
    with pytest.raises(LoraFastError) as error:
        ranks_for([spectrum([2.0, 1.0])], **arguments)
    assert said in str(error.value)


@pytest.mark.parametrize("values", [[1.0, 2.0], [1.0, math.nan], [math.nan, 1.0], [math.inf, 1.0], [1.0, -1.0]])
def test_a_spectrum_that_is_none(values):
    with pytest.raises(LoraFastError, match=r"q_proj: the singular values are not finite, descending"):
        spectrum(values)
    with pytest.raises(LoraFastError, match=r"float32 of shape \(1,\).*expected one float64 vector"):
        spectrum([1.0], singular_values=torch.ones(1))
    with pytest.raises(LoraFastError, match="method='svd'; expected one of factors, exact, topk"):
        spectrum([1.0], method="svd")


# ---- Readings --------------------------------------------------------------------------------------------------------


def verdicts(spectra, group=None):
    return {r.rule: r.verdict for r in readings(spectra) if group in (None, r.group)}


def test_a_flat_spectrum_is_read_in_two_ways():
    """The guide calls it too large, the heuristic too small, and neither is left out."""
    found = verdicts([spectrum([1.0] * 16)])
    assert found == {"energy": "fits", "shape (guide)": "too large", "saturation": "too small"}
    sources = {reading.rule: reading.source for reading in readings([spectrum([1.0] * 16)])}
    assert "如何选择秩" in sources["shape (guide)"]
    assert "without a source" in sources["saturation"]


def test_one_large_value_is_read_in_two_ways():
    found = verdicts([spectrum([1.0, *[0.01] * 15])])
    assert found == {"energy": "too large", "shape (guide)": "too small", "saturation": "fits"}


def test_a_few_large_values_and_a_fast_decay_fit():
    found = verdicts([spectrum([10.0, 8.0, 6.0, 5.0, 0.9, 0.9, 0.9, 0.9])])
    assert found["shape (guide)"] == "fits"
    assert found["saturation"] == "fits"
    assert found["energy"] == "fits"


@pytest.mark.parametrize(
    ("large", "verdict"), [(1, "too small"), (2, "too small"), (3, "fits"), (4, "fits"), (5, "too large")]
)
def test_the_guides_rule_counts_values_within_a_decade(large, verdict):
    found = verdicts([spectrum([1.0, *[0.1] * (large - 1), *[0.099] * (8 - large)])])
    assert found["shape (guide)"] == verdict


@pytest.mark.parametrize(("needed", "verdict"), [(3, "too large"), (4, "too large"), (5, "fits")])
def test_the_energy_rule_asks_for_half_the_parameters(needed, verdict):
    assert verdicts([spectrum([1.0] * needed + [0.01] * (8 - needed))])["energy"] == verdict


def test_saturation_needs_a_high_effective_rank_and_no_gap():
    assert verdicts([spectrum([1.99, *[1.0] * 7])])["saturation"] == "too small"
    assert verdicts([spectrum([2.0, *[1.0] * 7])])["saturation"] == "fits"
    low = spectrum([1.7**-n for n in range(8)])
    assert low.effective_rank < 0.8 * 8
    assert verdicts([low])["saturation"] == "fits"


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_an_error_that_is_reached_exactly_counts_as_reached(scope):
    """As √ of a sum of squares that someone else added up."""
    for seed in range(20):
        values = random_values(seed, 12)
        for k in range(1, 12):
            error = math.sqrt(math.fsum(value**2 for value in reversed(values[k:])))
            assert ranks_for([spectrum(values)], error=error, scope=scope) == [k]
            assert ranks_for([spectrum(values)], error=error * (1 - 1e-9), scope=scope) == [k + 1]


def test_readings_say_their_figures():
    spectra = [
        spectrum([4.0, 0.1, 0.1, 0.1], name="layers.0.q_proj"),
        spectrum([4.0, 3.0, 0.1, 0.1], name="layers.1.q_proj"),
        spectrum([4.0, 0.1, 0.0, 0.0], name="layers.0.v_proj"),
        spectrum([0.0] * 4, name="layers.1.v_proj"),
    ]
    found = readings(spectra)
    assert {reading.group for reading in found} == {"all layers", "q_proj", "v_proj"}
    sentences = {(reading.group, reading.rule): reading.sentence for reading in found}
    assert sentences["all layers", "energy"] == (
        "r=4 is too large: rank 2 keeps 99% of the energy of every update (layers.1.q_proj needs it, the median one "
        "1), and a rank for each, 33% of the parameters"
    )
    assert sentences["all layers", "zero update"] == (
        "1 of 4 updates are exactly 0 (layers.1.v_proj): not trained, or B is still as it started"
    )
    assert sentences["v_proj", "dead directions"].endswith("layers.0.v_proj has 2 of 4")
    assert ("q_proj", "dead directions") not in sentences
    assert all(reading.source and "\n" not in reading.sentence for reading in found)
    assert {reading.group for reading in readings(spectra[:1])} == {"layers.0.q_proj"}
    assert readings([]) == []


def test_small_ranks_have_no_tail_to_read():
    assert verdicts([spectrum([1.0, 0.9])])["shape (guide)"] == "can't tell"
    assert verdicts([spectrum([1.0])]) == {"energy": "fits", "shape (guide)": "can't tell", "saturation": "can't tell"}
    assert set(verdicts([spectrum([0.0, 0.0])])) == {"zero update"}


def test_a_dense_update_is_read_by_its_rank_above_the_noise():
    values = [*[5.0] * 8, *[0.2] * 25]
    clean = dense(values, shape=(33, 33), noise_std=0.05)
    (reading,) = readings([clean])
    assert (reading.rule, reading.verdict) == ("r90 of a dense update", "needs rank 8")
    assert "1 of 1 freed of rounding noise" in reading.sentence
    (reading,) = readings([dense(values[:4], shape=(33, 33), method="topk", frobenius_norm=20.0)])
    assert reading.verdict == "can't tell"
    (reading,) = readings([dense([0.0] * 33, shape=(33, 33))])
    assert (reading.verdict, reading.sentence.partition("): ")[2]) == ("no update", "not trained")  # there is no B
